// Tokens as people read them, and strips of tokens that can be walked through.

const SIGNS = { "\n": "↵", "\t": "⇥", "\r": "␍", "\u00a0": "⍽" };
/** Joiners are not among these: they make one picture of several, and shape letters. */
const NO_INK = /(?![\u200c\u200d])[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\u00a0]/gu;

/** A token as it can be seen: what has no ink by signs or by its number; spaces around it are left out. */
function visible(unit) {
  const seen = unit.replace(NO_INK, (letter) => SIGNS[letter] ?? `⟨${letter.codePointAt(0).toString(16)}⟩`);
  return seen.replace(/^ +| +$/g, "") || "␣".repeat(seen.length) || "∅";
}

/** A token in quotation marks; from right to left, it leaves the order of what is around it alone. */
function quoted(unit) {
  const seen = visible(unit);
  return RIGHT_TO_LEFT.test(seen) ? `“\u2068${seen}\u2069”` : `“${seen}”`;
}

const RIGHT_TO_LEFT = /[\p{Script=Hebrew}\p{Script=Arabic}\p{Script=Syriac}\p{Script=Thaana}\p{Script=Nko}]/u;

/**
 * The tokens of a sequence as running text, the second of two texts on a line of its own.
 * attend(i): called when a pointer, a finger or the keyboard comes to token i; about(i): what its tooltip says.
 * Returns the element and its buttons, one a token.
 */
function strip({ units, special, segments }, label, { attend, about = () => undefined }) {
  const box = element("div", { class: "strip", dir: "auto", role: "group", "aria-label": label });
  const items = units.map((unit, i) => {
    const go = () => attend(i);
    const kind = special[i] ? "unit special" : unit.trim() ? "unit" : "unit blank";
    const look = { type: "button", class: kind, "data-item": true, title: about(i) };
    const shown = element("bdi", {}, visible(unit));
    return element("button", { ...look, onpointerenter: go, onfocus: go, onclick: go }, shown);
  });
  items.forEach((item, i) => {
    if (i > 0 && segments[i] !== segments[i - 1]) box.append(element("span", { class: "break" }));
    if (/^ +\S/.test(units[i])) box.append(" ");
    box.append(item);
    if (units[i].includes("\n")) box.append(element("br"));
  });
  roving(box);
  return { element: box, items };
}

/** Colour a token by a value; from `most` on it has the full colour. What speaks against the answer has a colour of its own. */
function tint(item, value, most) {
  item.style.setProperty("--weight", Math.min(1, Math.abs(value) / most));
  item.classList.toggle("against", value < 0);
  item.dataset.value = value;
}
