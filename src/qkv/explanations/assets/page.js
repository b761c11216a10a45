// The page: what there is of an explanation, or of two side by side, section by section.

function start() {
  const main = document.querySelector("main");
  if (!("DecompressionStream" in window)) {
    main.append(element("p", {}, "This browser is too old to unpack the page: any of 2023 or later will do."));
    return;
  }
  const { explanations, method, methods, matches } = JSON.parse(document.getElementById("values").textContent);
  const [first] = explanations;
  const state = new State({
    choice: 0,
    method,
    stack: first.attention[0]?.stack,
    ...neediest(first),
    opacity: 0.75,
  });
  const parts = [
    answerSection(explanations, state),
    relevanceSection(explanations, state, methods, matches),
    attentionSection(explanations, state),
    layersSection(explanations, state),
    alignmentSection(explanations, state),
  ];
  main.append(...parts.filter((part) => part !== null));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => state.redraw());
}

/** Where to begin: the head that the first answer needs most, or the first of the last layer. */
function neediest({ attention: [stack], choices: [choice] }) {
  const values = stack && choice.head_importance[stack.stack];
  if (!values) return { layer: Math.max(0, (stack?.layers.length ?? 0) - 1), head: 0 };
  const here = stack.layers.map((layer) => stack.heads.map((head) => values[layer][head]));
  const most = Math.max(...here.flat());
  const layer = here.findIndex((heads) => heads.includes(most));
  return { layer, head: here[layer].indexOf(most) };
}

/** One column an explanation, named by what they differ in where there are two. */
function columns(explanations, build) {
  if (explanations.length === 1) return build(explanations[0]);
  const name = explanations[0].model === explanations[1].model ? "input" : "model";
  const named = (one, i) => {
    const title = element("h3", { class: "which", dir: "auto" }, `${i + 1}. ${one[name]}`);
    return element("div", { class: "column" }, title, build(one));
  };
  return element("div", { class: "columns" }, ...explanations.map(named));
}

function answerSection(explanations, state) {
  const lead = "What the model said, and what else it might have said.";
  return section("answer", "The answer", lead, columns(explanations, (one) => answerColumn(one, state)));
}

function relevanceSection(explanations, state, methods, matches) {
  const names = methodsOf(explanations);
  if (!names.length) return null;
  const lead =
    "How much each part of the input has to do with the answer. Methods differ, and a map can be wrong: " +
    "beside each stands how it did when it was put to the test.";
  const options = names.map((name) => [name, methods[name].name]);
  const controls = element("div", { class: "controls" }, chooser("Method", "method", options, state));
  if (explanations.some(({ picture }) => picture)) controls.append(opacitySlider(state));
  const maps = columns(explanations, (one) => relevanceColumn(one, state, methods));
  const difference = explanations.length > 1 ? differenceColumn(explanations, matches, state) : null;
  return section("relevance", "What it rests on", lead, controls, maps, difference);
}

function attentionSection(explanations, state) {
  const stacks = [...new Set(explanations.flatMap(({ attention }) => attention.map(({ stack }) => stack)))];
  if (!stacks.length) return null;
  const least = Math.max(...explanations.map((one) => one.least));
  const lead =
    "Where each head of each layer looks. Attention shows what was read, not what the answer rests on. " +
    "Weights are rounded by at most 0.4 %, small ones by less." +
    (least > 0 ? ` Weights under ${limit(least)} are not shown, so that the page stays small.` : "");
  const options = stacks.map((stack) => [stack, STACKS[stack]]);
  const controls = element("div", { class: "controls" }, chooser("Attention of", "stack", options, state));
  const residual = Math.max(...explanations.map((one) => one.residual));
  const note =
    "The weights were computed beside the kernel that answered; what they give differs from its result by " +
    `${residual === 0 ? 0 : residual.toExponential(1)} at most.`;
  const heads = columns(explanations, (one) => attentionColumn(one, state));
  return section("attention", "Where it looks", lead, controls, heads, element("p", { class: "note" }, note));
}

function layersSection(explanations, state) {
  if (!explanations.some(({ choices }) => choices.some(({ lens }) => lens.length))) return null;
  const caption = "The model's own last step, put behind each layer (“logit lens”). The answer is marked.";
  const build = (explanation) => {
    const box = element("div");
    state.watch(["choice"], () => {
      const choice = chosen(explanation, state);
      const missing = "What its layers would have answered was not computed.";
      box.replaceChildren(choice.lens.length ? card("", caption, lensTable(choice)) : card("", missing));
    });
    return box;
  };
  const lead = "What the model would have answered, had it stopped there.";
  return section("layers", "Layer by layer", lead, columns(explanations, build));
}

function alignmentSection(explanations, state) {
  if (!explanations.some(({ alignment }) => alignment)) return null;
  const build = (one) => (one.alignment ? alignmentColumn(one, state) : card("", "There is no alignment here."));
  const lead = "Which words of the source each word of the translation comes from.";
  return section("alignment", "Word by word", lead, columns(explanations, build));
}

start();
