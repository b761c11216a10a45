// What was answered: the choices one by one, their alternatives, and what each layer would have said.

/** The choice of an explanation that the reader has come to. */
function chosen(explanation, state) {
  return explanation.choices[Math.min(state.values.choice, explanation.choices.length - 1)];
}

function answerColumn(explanation, state) {
  const several = explanation.choices.length > 1;
  const alternatives = element("div");
  state.watch(["choice"], () => {
    const choice = chosen(explanation, state);
    alternatives.replaceChildren(guesses(choice));
  });
  return card("", answerCaption(explanation), several ? choiceStrip(explanation, state) : null, alternatives);
}

function answerCaption({ generates, choices: [{ outcome }, ...more] }) {
  if (outcome === "value" && more.length) return "The model gave one value; it is explained for each of these.";
  if (outcome === "value") return "The value that the model gave.";
  if (outcome === "label") return "The likeliest labels, and how probable the model finds each, whatever the others.";
  if (!more.length) return "The likeliest answers, and how probable the model finds each.";
  const what = generates ? "The answer was made token by token." : "The model chose one answer for each of these.";
  return `${what} Each has the model's probability below it; choose one to see what else it might have been.`;
}

/** All choices in a row, each with its probability; arrows step through them. */
function choiceStrip(explanation, state) {
  const box = element("div", { class: "choices", dir: "auto", role: "group", "aria-label": "choices" });
  if (explanation.family === "gpt") box.append(element("span", { class: "prompt" }, prompt(explanation)));
  const items = explanation.choices.map((choice, i) => {
    const go = () => state.change({ choice: i });
    const said = amount(choice, choice.probability);
    const about = `${quoted(choice.answer)}, ${said}`;
    const look = { type: "button", class: "choice", "data-item": true, "aria-label": about };
    const sequence = explanation.sequences.find(({ name }) => name === choice.sequence);
    return element(
      "button",
      { ...look, onclick: go, onfocus: go },
      explanation.generates ? null : element("small", {}, reader(sequence, choice.unit)),
      element("bdi", {}, visible(choice.answer)),
      element("small", {}, said),
    );
  });
  box.append(...items);
  state.watch(["choice"], ({ choice }) => setCurrent(items, choice));
  roving(box);
  return box;
}

/** Where a choice was made: at a token, or by the marker of one of two texts for all of it. */
function reader({ units, special, segments }, unit) {
  if (special[unit] && segments.includes(1)) return segments[unit] ? "second text" : "first text";
  return visible(units[unit]);
}

/** What a text generator was given: all up to its first choice, but for the first bytes of letters. */
function prompt({ sequences: [{ units, special, words }], choices: [first] }) {
  const text = units.slice(0, first.unit + 1).filter((unit, i) => special[i] || words[i] >= 0 || !unit.trim());
  return text.map((unit) => (unit.trim() ? unit : visible(unit))).join("");
}

/** Answers with bars of their probabilities; the one that was given stands out. */
function guesses(choice) {
  const items = choice.alternatives.map(({ name, probability }) =>
    element(
      "li",
      { class: name === choice.answer ? "ours" : "" },
      element("span", { class: "bar", style: { width: `${100 * strength(choice, probability)}%` } }),
      element("bdi", {}, visible(name)),
      element("span", {}, amount(choice, probability)),
    ),
  );
  return element("ol", { class: "guesses" }, ...items);
}

/** How probable an answer is, or where it is a value, that. */
function amount({ outcome }, probability) {
  return outcome === "value" ? signed(probability) : percent(probability);
}

/** How strongly to show it, from 0 to 1. */
function strength({ outcome }, probability) {
  return outcome === "value" ? 0 : probability;
}

/** Layer by layer, what the model would have answered had it ended there. */
function lensTable(choice) {
  const { lens, outcome } = choice;
  const places = Array.from({ length: Math.max(...lens.map((layer) => layer.length)) }, (_, i) => i);
  const names = ["after layer", ...places.map((i) => (i ? `${i + 1}.` : outcome === "value" ? "value" : "likeliest"))];
  const head = element("tr", {}, ...names.map((name) => element("th", { scope: "col" }, name)));
  const rows = lens.map((layer, i) =>
    element("tr", {}, element("th", { scope: "row" }, i), ...layer.map((guess) => lensCell(guess, choice))),
  );
  const body = element("tbody", {}, ...rows);
  return element("div", { class: "scroll" }, element("table", { class: "lens" }, element("thead", {}, head), body));
}

function lensCell({ name, probability }, choice) {
  const look = { class: name === choice.answer ? "ours" : "", style: { "--weight": strength(choice, probability) } };
  const said = element("small", {}, amount(choice, probability));
  return element("td", look, element("bdi", {}, visible(name)), " ", said);
}
