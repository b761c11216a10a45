// Tokens as people read them, and strips of tokens that can be walked through.

const HIDDEN = /[\u0000-\u001f\u007f-\u00a0\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g;

/** A token with its unseen characters made seen. */
function visible(unit) {
  if (unit === "") return "∅";
  const signs = { "\n": "↵", "\t": "⇥", "\r": "␍", "\u00a0": "⍽" };
  const seen = unit.replace(HIDDEN, (one) => signs[one] ?? `⟨${one.codePointAt(0).toString(16)}⟩`);
  return /^ +$/.test(seen) ? "␣".repeat(seen.length) : seen.trim();
}

/** A token in quotation marks. */
function quoted(unit) {
  return `“${visible(unit)}”`;
}

/**
 * The tokens of a sequence as running text.
 * attend(i): called when a pointer, a finger or the keyboard comes to token i; about(i): what its tooltip says.
 * Returns the element and the buttons by unit. Of some units only: those in `shown`.
 */
function strip(sequence, label, { attend, about = () => undefined, shown = sequence.units.keys() }) {
  const box = element("div", { class: "strip", dir: "auto", role: "group", "aria-label": label });
  const items = new Map();
  let segment = 0;
  for (const i of shown) {
    const unit = sequence.units[i];
    if (sequence.segments.length && sequence.segments[i] !== segment) {
      segment = sequence.segments[i];
      box.append(element("span", { class: "break" }));
    }
    const go = () => attend(i);
    const item = element(
      "button",
      { type: "button", class: "unit", "data-item": true, "data-unit": i, title: about(i), onpointerenter: go, onfocus: go, onclick: go },
      element("bdi", {}, visible(unit)),
    );
    item.classList.toggle("special", sequence.special[i]);
    if (/^ +\S/.test(unit)) box.append(" ");
    box.append(item);
    if (unit.includes("\n")) box.append(element("br"));
    items.set(i, item);
  }
  roving(box);
  return { element: box, items };
}

/** Colour a token by a value of at most `most`: one colour for what speaks for the answer, one for what speaks against. */
function tint(item, value, most) {
  item.style.setProperty("--weight", most > 0 ? Math.abs(value) / most : 0);
  item.classList.toggle("against", value < 0);
}

/** The parts of a sequence that a model's tokens make words of, "" where it has none. */
function words(sequence) {
  const made = [];
  sequence.units.forEach((unit, i) => {
    const word = sequence.words[i];
    if (word >= 0) made[word] = (made[word] ?? "") + unit;
  });
  return [...made].map((word) => (word ?? "").trim());
}
