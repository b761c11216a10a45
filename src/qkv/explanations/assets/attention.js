// Attention: all heads as small pictures, how much the answer needs each, and one head in detail.

const STACKS = { encoder: "encoder", decoder: "decoder", cross: "decoder to encoder" };
/** Height in pixels of a token beside the lines, as in the style sheet. */
const ROW = 24;
/** More tokens than these are shown as running text, not beside lines. */
const LONG = 64;

function attentionColumn(explanation, state) {
  const stacks = new Map(explanation.attention.map((packed) => [packed.stack, new Stack(packed, explanation)]));
  const heads = Math.max(...[...stacks.values()].map((stack) => stack.heads.length));
  const room = { style: { "flex-basis": `${60 + 58 * Math.min(8, heads)}px` } };
  const grid = element("div", room), importance = element("div", room), detail = element("div");
  let tables = {};
  let view = null;

  state.watch(["stack"], ({ stack }) => {
    const here = stacks.get(stack);
    tables.grid = here && headGrid(here, explanation, state);
    grid.replaceChildren(tables.grid?.card ?? card("", `This model has no ${STACKS[stack]} attention.`));
  });
  state.watch(["choice", "stack"], ({ stack }) => {
    const here = stacks.get(stack);
    const { outcome, head_importance } = chosen(explanation, state);
    const values = here && head_importance[stack];
    tables.importance = values && importanceTable(here, values, outcome, state);
    importance.replaceChildren(...(values ? [tables.importance.card] : []));
    importance.hidden = !values;
  });
  state.watch(["layer", "head"], ({ layer, head }) => {
    for (const table of [tables.grid, tables.importance]) table?.show(layer, head);
  });
  state.watch(["stack", "layer", "head", "choice"], async ({ stack, layer, head }) => {
    const here = stacks.get(stack);
    if (!here || layer >= here.layers.length || head >= here.heads.length) return detail.replaceChildren();
    const weights = await here.head(layer, head);
    const { values } = state;
    if (values.stack !== stack || values.layer !== layer || values.head !== head) return; // the reader has gone on
    view = headDetail(here, weights, explanation, state);
    detail.replaceChildren(view.card);
  });
  state.watch(["opacity"], ({ opacity }) => view?.fade(opacity));
  return element("div", { class: "stacked" }, element("div", { class: "tables" }, grid, importance), detail);
}

// ---------------------------------------------------------------- all heads

/**
 * A button a head, a row a layer, and before each row its number. cell(layer, head): what is in it, and what is said
 * of it beside its name. Returns the element, the buttons, and `show`, which marks the head that is chosen.
 */
function headTable(stack, state, label, cell) {
  const look = { class: "heads", role: "group", "aria-label": label, style: { "--heads": stack.heads.length } };
  const box = element("div", look);
  const items = [];
  stack.layers.forEach((number, layer) => {
    box.append(element("span", { class: "number" }, number));
    stack.heads.forEach((headNumber, head) => {
      const go = () => state.change({ layer, head });
      const { content, about = "" } = cell(number, headNumber);
      const name = `layer ${number}, head ${headNumber}${about}`;
      const named = { type: "button", class: "head", "data-item": true, "aria-label": name, title: name };
      items.push(element("button", { ...named, onclick: go, onfocus: go }, content));
      box.append(items.at(-1));
    });
  });
  const show = (layer, head) => setCurrent(items, layer * stack.heads.length + head);
  show(state.values.layer, state.values.head);
  roving(box, stack.heads.length);
  return { element: box, items, show };
}

function headGrid(stack, explanation, state) {
  const [height, width] = stack.packed.thumbnail;
  const cell = () => ({ content: element("canvas", { width, height }) });
  const { element: box, items, show } = headTable(stack, state, "all heads", cell);
  box.setAttribute("aria-busy", true);
  stack.thumbnails().then((bytes) => {
    const ink = colour("--accent");
    items.forEach((item, i) => paintBytes(item.firstChild, bytes(i), ink));
    box.setAttribute("aria-busy", false);
  });
  const shown = explanation.picture
    ? "Over the image, how much the class token looks at each patch: the more colour, the more."
    : "Rows look at columns: the more colour, the more.";
  const caption = `${shown} Each row of pictures is a layer; layers and heads count from 0. Choose one to see it below.`;
  return { card: card("All heads", caption, box), show };
}

function importanceTable(stack, values, outcome, state) {
  const unit = outcome === "value" ? "" : " nats";
  const most = Math.max(...values.flat().map(Math.abs), 0.1); // what is next to nothing has next to no colour
  const cell = (layer, head) => {
    const value = values[layer][head];
    const look = { class: value < 0 ? "heat against" : "heat", style: { "--weight": Math.abs(value) / most } };
    const shown = Math.abs(value) < 0.005 ? "·" : value.toFixed(2).replace("-", "−");
    return { content: element("span", look, shown), about: `: ${signed(value)}${unit}` };
  };
  const { element: box, show } = headTable(stack, state, "importance of heads", cell);
  const caption =
    outcome === "value"
      ? "How much the value falls when this head alone is switched off; below 0, it rises."
      : "How much less probable the answer becomes when this head alone is switched off, as a fall of its " +
        "log-probability in nats (0.69 halves it); below 0, it becomes more probable.";
  return { card: card("Which heads matter", caption, box), show };
}

// ---------------------------------------------------------------- one head

/** The head that is chosen: a card, and `fade` for the map over an image. */
function headDetail(stack, weights, explanation, state) {
  const { layer, head } = state.values;
  const line = readout();
  const view = { stack, weights, focus: null, marks: [] };
  const show = (side, unit, other = -1) => {
    view.focus = { side, unit };
    line.textContent = looked(view, other, explanation.least);
    for (const mark of view.marks) mark(side, unit, other);
  };
  const drawn = matrix({
    rows: stack.queries.units,
    columns: stack.keys.units,
    shade: (r, c) => weights.shade(r, c),
    labels: stack.keys.name !== "image",
    axes: ["looks", "is looked at"],
    label: `attention from ${stack.queries.name} (rows) to ${stack.keys.name} (columns)`,
    pick: (r, c) => show("query", r, c),
  });
  view.marks.push((side, unit, other) => (side === "query" ? drawn.mark(unit, other) : drawn.mark(-1, unit)));
  const { element: left, caption, fade = () => {} } = besideMatrix(view, explanation, state, show);
  const choice = chosen(explanation, state);
  show("query", choice.sequence === stack.queries.name ? choice.unit : 0);
  const title = `Layer ${stack.layers[layer]}, head ${stack.heads[head]}`;
  return { card: card(title, caption, line, element("div", { class: "beside even" }, left, drawn.element)), fade };
}

/** What shows a head beside its matrix: the image, running text, or lines between tokens. */
function besideMatrix(view, { picture }, state, show) {
  if (picture && view.stack.keys.name === "image") {
    const caption = "Come to a patch of the image to see where it looks; the matrix has all patches.";
    return { ...attendedImage(view, picture, state, show), caption };
  }
  if (Math.max(view.weights.rows, view.weights.columns) > LONG) {
    const caption = "Come to a token to see what it looks at; the matrix has them all.";
    return { element: runningText(view, show), caption };
  }
  const caption =
    "Left looks at right. Come to a token on the left to see what it looks at, or on the right to see what looks " +
    "at it; the matrix has them all.";
  return { element: lines(view, show), caption };
}

/** What the reader has come to, in a sentence. other: a unit to name first; least: smaller weights are not shown. */
function looked({ stack, weights, focus: { side, unit } }, other, least) {
  const query = side === "query";
  const [here, there] = query ? [stack.queries, stack.keys] : [stack.keys, stack.queries];
  const values = query ? weights.row(unit) : weights.column(unit);
  const order = [...values.keys()].filter((i) => values[i] > 0).sort((a, b) => values[b] - values[a]);
  const first = other >= 0 ? [other, ...order.filter((i) => i !== other)] : order;
  const named = first.slice(0, 4).map((i) => `${place(there, i)} ${percent(values[i])}`);
  const list = named.join(" · ") || "nothing";
  const said = sentence(`${place(here, unit)} ${query ? "looks at" : "is looked at by"} ${list}.`);
  const rest = 1 - values.reduce((sum, value) => sum + value, 0);
  if (!query || !least || rest < 0.005) return said;
  return `${said} ${percent(rest)} of its attention is on weights under ${limit(least)}, which are not shown.`;
}

/** Tokens that look, on the left, and that are looked at, on the right, with a line for each weight between. */
function lines(view, show) {
  const { stack, weights, marks } = view;
  const queries = tokenColumn("query", "looks", stack.queries, show);
  const keys = tokenColumn("key", "is looked at", stack.keys, show);
  const canvas = element("canvas", { class: "threads" });
  const between = element("div", { class: "between" }, canvas);
  const box = element("div", { class: "lines" }, queries.element, between, keys.element);
  const draw = () => paintLines(canvas, box, view);
  marks.push((side, unit) => {
    const query = side === "query";
    queries.items.forEach((item, i) => light(item, query ? 0 : weights.at(i, unit), query && i === unit));
    keys.items.forEach((item, i) => light(item, query ? weights.at(unit, i) : 0, !query && i === unit));
    draw();
  });
  box.addEventListener("scroll", draw, { passive: true });
  new ResizeObserver(draw).observe(box);
  return box;
}

function tokenColumn(side, label, sequence, show) {
  const items = sequence.units.map((unit, i) => {
    const go = () => show(side, i);
    const look = { type: "button", class: "unit", "data-item": true };
    return element("button", { ...look, onpointerenter: go, onfocus: go, onclick: go }, element("bdi", {}, visible(unit)));
  });
  const box = element("div", { class: side, role: "group", "aria-label": label }, ...items);
  roving(box, 1);
  return { element: box, items };
}

/** Tokens as running text: the one that looks, and in colour what it looks at. */
function runningText({ stack, weights, marks }, show) {
  const self = stack.keys === stack.queries;
  const keys = strip(stack.keys, "is looked at", { attend: (i) => show(self ? "query" : "key", i) });
  const queries = self ? keys : strip(stack.queries, "looks", { attend: (i) => show("query", i) });
  marks.push((side, unit) => {
    const [here, there] = side === "query" ? [queries, keys] : [keys, queries];
    const values = side === "query" ? weights.row(unit) : weights.column(unit);
    here.items.forEach((item, i) => light(item, 0, i === unit));
    there.items.forEach((item, i) => light(item, values[i], self && i === unit));
  });
  return element("div", { class: "looking" }, self ? null : queries.element, keys.element);
}

/** Colour a token by a weight. here: whether the reader is on it. */
function light(item, weight, here) {
  item.style.setProperty("--weight", Math.sqrt(weight));
  item.dataset.weight = weight;
  item.setAttribute("aria-current", here);
}

/** The lines that can be seen where the box is scrolled to. */
function paintLines(canvas, box, { weights, focus }) {
  const [width, height] = [canvas.parentElement.clientWidth, box.clientHeight];
  if (!width || !focus) return;
  const dots = window.devicePixelRatio;
  [canvas.width, canvas.height] = [width, height].map((pixels) => Math.round(pixels * dots));
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.scale(dots, dots);
  context.strokeStyle = getComputedStyle(box).getPropertyValue("--accent");
  const stroke = (query, key, opacity, thickness) => {
    const [from, to] = [query, key].map((unit) => (unit + 0.5) * ROW - box.scrollTop);
    if (!opacity || Math.max(from, to) < 0 || Math.min(from, to) > height) return;
    context.globalAlpha = opacity;
    context.lineWidth = thickness;
    context.beginPath();
    context.moveTo(0, from);
    context.bezierCurveTo(width / 2, from, width / 2, to, width, to);
    context.stroke();
  };
  for (let query = 0; query < weights.rows; query++) {
    for (let key = 0; key < weights.columns; key++) {
      const shade = weights.shade(query, key);
      if (focus.unit === (focus.side === "query" ? query : key)) stroke(query, key, shade, 1 + 3 * shade);
      else if (shade > 0.3) stroke(query, key, 0.12 * shade, 1);
    }
  }
}

/** The image under the attention of one patch, or of the class token. */
function attendedImage({ weights, marks }, picture, state, show) {
  const map = stage(picture, state, "attention over the image", (unit) => show("query", unit));
  const only = { units: ["class token"], special: [true], segments: [] };
  const first = strip(only, "class token", { attend: () => show("query", 0) });
  marks.push((side, unit) => {
    const values = side === "query" ? weights.row(unit) : weights.column(unit);
    map.paint(values, Math.max(...values.slice(1)) || 1);
    map.mark(unit);
    first.items[0].setAttribute("aria-current", unit === 0);
  });
  return { element: element("div", {}, map.element, first.element), fade: map.fade };
}
