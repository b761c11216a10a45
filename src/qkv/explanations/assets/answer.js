// What was answered: the choices one by one, the likeliest alternatives of each, and what each layer would have said.

/** The choice of an explanation that the reader has come to. */
function chosen(explanation, state) {
  return explanation.choices[Math.min(state.values.choice, explanation.choices.length - 1)];
}

function answerColumn(explanation, state) {
  const alternatives = element("div");
  state.watch(["choice"], () => {
    const choice = chosen(explanation, state);
    alternatives.replaceChildren(guesses(choice.alternatives, choice.answer));
  });
  const caption = explanation.choices.length > 1
    ? `${quotedChoices(explanation)} Each has the model's probability below it; choose one to see what else it might have been.`
    : "The likeliest answers, and how probable the model finds each.";
  return card("", caption, explanation.choices.length > 1 ? choiceStrip(explanation, state) : null, alternatives);
}

function quotedChoices(explanation) {
  return explanation.generates ? "The answer was made token by token." : "The model chose one answer for each of these.";
}

/** All choices in a row, each with its probability; arrows step through them. */
function choiceStrip(explanation, state) {
  const box = element("div", { class: "choices", dir: "auto", role: "group", "aria-label": "choices" });
  if (explanation.family === "gpt") box.append(element("span", { class: "prompt" }, prompt(explanation)));
  const items = explanation.choices.map((choice, i) => {
    const go = () => state.change({ choice: i });
    const about = `${quoted(choice.answer)}, ${percent(choice.probability)}`;
    const unit = explanation.sequences.find((one) => one.name === choice.sequence).units[choice.unit];
    const said = explanation.generates ? [] : [element("small", {}, visible(unit))];
    return element(
      "button",
      { type: "button", class: "choice", "data-item": true, "aria-label": about, onclick: go, onfocus: go },
      ...said,
      element("bdi", {}, visible(choice.answer)),
      element("small", {}, percent(choice.probability)),
    );
  });
  box.append(...items);
  state.watch(["choice"], ({ choice }) => items.forEach((item, i) => item.setAttribute("aria-current", i === choice)));
  roving(box);
  return box;
}

/** What a text generator was given: all up to its first choice. */
function prompt(explanation) {
  const [sequence] = explanation.sequences;
  return sequence.units.slice(0, explanation.choices[0].unit + 1).map((unit) => (unit.trim() ? unit : visible(unit))).join("");
}

/** Answers with bars of their probabilities; the one that was given stands out. */
function guesses(list, answer) {
  const items = list.map(({ name, probability }) =>
    element(
      "li",
      name === answer ? { class: "ours" } : {},
      element("span", { class: "bar", style: { width: `${100 * probability}%` } }),
      element("bdi", {}, visible(name)),
      element("span", {}, percent(probability)),
    ),
  );
  return element("ol", { class: "guesses" }, ...items);
}

/** Layer by layer, what the model would have answered had it ended there. */
function lensTable(choice) {
  const width = Math.max(...choice.lens.map((layer) => layer.length));
  const head = element("tr", {}, element("th", { scope: "col" }, "after layer"), ...Array.from({ length: width }, (_, i) => element("th", { scope: "col" }, i ? `${i + 1}.` : "likeliest")));
  const rows = choice.lens.map((layer, i) =>
    element("tr", {}, element("th", { scope: "row" }, i), ...layer.map((guess) => lensCell(guess, choice.answer))),
  );
  return element("div", { class: "scroll" }, element("table", { class: "lens" }, element("thead", {}, head), element("tbody", {}, ...rows)));
}

function lensCell({ name, probability }, answer) {
  const cell = element("td", name === answer ? { class: "ours" } : {}, element("bdi", {}, visible(name)), " ", element("small", {}, percent(probability)));
  cell.style.setProperty("--weight", probability);
  return cell;
}
