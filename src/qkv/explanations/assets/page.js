// The page: what is there of an explanation, or of two side by side, section by section.

function start() {
  const { explanations, methods, matches } = JSON.parse(document.getElementById("values").textContent);
  const [first] = explanations;
  const state = new State({
    choice: 0,
    method: first.choices[0].relevances[0]?.method,
    stack: first.attention[0]?.stack,
    ...neediest(first),
    opacity: 0.75,
  });
  const parts = [answerSection, relevanceSection, attentionSection, layersSection, alignmentSection];
  const made = parts.map((part) => part(explanations, state, { methods, matches }));
  document.querySelector("main").append(...made.filter((one) => one !== null));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => state.redraw());
}

/** Where to begin: the head that the first answer needs most, or the first of the last layer. */
function neediest({ attention: [stack], choices: [choice] }) {
  const values = stack && choice.head_importance[stack.stack];
  if (!values) return { layer: Math.max(0, (stack?.layers.length ?? 0) - 1), head: 0 };
  const here = stack.layers.map((layer) => values[layer]);
  const most = Math.max(...here.flat());
  const layer = here.findIndex((heads) => heads.includes(most));
  return { layer, head: here[layer].indexOf(most) };
}

/** One column an explanation, named where there are two. */
function columns(explanations, build) {
  const name = explanations[0].model === explanations.at(-1).model ? "input" : "model";
  const named = (explanation, i) => element("div", { class: "column" }, element("h3", { class: "which", dir: "auto" }, `${i + 1}. ${explanation[name]}`), build(explanation));
  if (explanations.length === 1) return build(explanations[0]);
  return element("div", { class: "columns" }, ...explanations.map(named));
}

function answerSection(explanations, state) {
  return section("answer", "The answer", "What the model said, and what else it might have said.", columns(explanations, (one) => answerColumn(one, state)));
}

function relevanceSection(explanations, state, { methods, matches }) {
  if (!explanations.some(({ choices }) => choices.some(({ relevances }) => relevances.length))) return null;
  const lead = "How much each part of the input has to do with the answer. Methods differ, and a map can be wrong: beside each stands how it did when it was put to the test.";
  const names = methodsOf(explanations, state);
  const controls = element("div", { class: "controls" }, chooser("Method", "method", names.map((name) => [name, methods[name].name]), state));
  if (explanations.some(({ picture }) => picture)) controls.append(opacitySlider(state));
  const difference = explanations.length === 2 ? differenceCard(explanations, matches, state) : null;
  return section("relevance", "What it rests on", lead, controls, columns(explanations, (one) => relevanceColumn(one, state, methods)), difference);
}

function attentionSection(explanations, state) {
  const stacks = [...new Set(explanations.flatMap(({ attention }) => attention.map(({ stack }) => stack)))];
  if (!stacks.length) return null;
  const least = Math.max(...explanations.map((one) => one.least));
  const left = least > 0 ? ` Weights under ${percent(least)} are not shown, so that the page stays small.` : "";
  const lead = `Where each head of each layer looks. Attention shows what was read, not what the answer rests on. Weights are rounded by at most 0.4 %, small ones by less.${left}`;
  const residual = Math.max(...explanations.map((one) => one.residual));
  const controls = element("div", { class: "controls" }, chooser("Attention of", "stack", stacks.map((stack) => [stack, STACKS[stack]]), state));
  const made = section("attention", "Where it looks", lead, controls, columns(explanations, (one) => attentionColumn(one, state)));
  made.append(element("p", { class: "note" }, `The weights were computed beside the kernel that answered; what they give differs from its result by at most ${residual === 0 ? 0 : residual.toExponential(0)}.`));
  watchHeads(state);
  return made;
}

function layersSection(explanations, state) {
  if (!explanations.some(({ choices }) => choices.some(({ lens }) => lens.length))) return null;
  const build = (explanation) => {
    const box = element("div");
    state.watch(["choice"], () => {
      const choice = chosen(explanation, state);
      box.replaceChildren(choice.lens.length ? card("", "The model's own last step, put behind each layer (“logit lens”). The answer that was given is marked.", lensTable(choice)) : card("", "There is no lens here."));
    });
    return box;
  };
  return section("layers", "Layer by layer", "What the model would have answered, had it stopped there.", columns(explanations, build));
}

function alignmentSection(explanations) {
  if (!explanations.some(({ alignment }) => alignment)) return null;
  const build = (one) => (one.alignment ? alignmentColumn(one) : card("", "There is no alignment here."));
  return section("alignment", "Word by word", "Which words of the source each word of the translation comes from.", columns(explanations, build));
}

start();
