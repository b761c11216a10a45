// Attention: all heads as small pictures, one head in detail, and how much the answer needs each.

const STACKS = { encoder: "encoder", decoder: "decoder", cross: "decoder to encoder" };
const ROW = 24;
/** Height of a token beside the lines, in pixels: as in the style sheet. */
const LONG = 64;
/** More tokens than these are shown as running text, not beside lines. */

function attentionColumn(explanation, state) {
  const stacks = new Map(explanation.attention.map((packed) => [packed.stack, new Stack(packed, explanation)]));
  const wide = { "flex-basis": `${60 + 58 * Math.min(8, ...explanation.attention.map((one) => one.heads[0].length))}px` };
  const grid = element("div", { style: wide }), detail = element("div");
  state.watch(["stack"], ({ stack }) => {
    const here = stacks.get(stack);
    grid.replaceChildren(here ? headGrid(here, explanation, state) : card("", `This model has no ${STACKS[stack]} attention.`));
  });
  state.watch(["stack", "layer", "head", "choice"], async ({ stack, layer, head }) => {
    const here = stacks.get(stack);
    if (!here || layer >= here.layers.length || head >= here.heads) return detail.replaceChildren();
    const weights = await here.head(layer, head);
    const { values } = state;
    if (values.stack !== stack || values.layer !== layer || values.head !== head) return; // the reader has gone on
    detail.replaceChildren(headDetail(here, weights, explanation, state));
  });
  const importance = element("div", { style: wide });
  state.watch(["choice", "stack"], ({ stack }) => {
    const values = chosen(explanation, state).head_importance[stack];
    importance.hidden = !values;
    importance.replaceChildren(...(values && stacks.has(stack) ? [importanceCard(stacks.get(stack), values, state)] : []));
  });
  return element("div", { class: "stacked" }, element("div", { class: "tables" }, grid, importance), detail);
}

// ---------------------------------------------------------------- all heads

/** A table of buttons, a row a layer and a column a head, and beside each row its layer. */
function headTable(stack, state, label, cell) {
  const box = element("div", { class: "heads", role: "group", "aria-label": label, style: { "--heads": stack.heads } });
  const items = [];
  stack.layers.forEach((number, layer) => {
    box.append(element("span", { class: "number" }, number));
    for (let head = 0; head < stack.heads; head++) {
      const go = () => state.change({ layer, head });
      const { about, content, style = {} } = cell(layer, head);
      const name = `layer ${number}, head ${head}${about}`;
      const item = element("button", { type: "button", class: "head", "data-item": true, "aria-label": name, title: name, style, onclick: go, onfocus: go }, ...content);
      items.push(item);
      box.append(item);
    }
  });
  const sync = ({ layer, head }) => items.forEach((item, i) => item.setAttribute("aria-current", i === layer * stack.heads + head));
  sync(state.values);
  roving(box, stack.heads);
  return { element: box, items, sync };
}

function headGrid(stack, explanation, state) {
  const [height, width] = stack.packed.thumbnail;
  const { element: box, items, sync } = headTable(stack, state, "all heads", () => ({
    about: "",
    content: [element("canvas", { width, height })],
  }));
  heads.set(box, sync);
  stack.thumbnails().then((bytes) => {
    const ink = colour("--accent");
    items.forEach((item, i) => paintBytes(item.firstChild, bytes(Math.floor(i / stack.heads), i % stack.heads), ink));
  });
  const shown = explanation.picture ? "Over the image, how much the class token looks at each patch" : "Rows look at columns";
  return card("All heads", `${shown}; the more colour, the more. Each row of pictures is a layer; layers and heads count from 0. Choose one to see it below.`, box);
}

function importanceCard(stack, values, state) {
  const most = Math.max(...values.flat().map(Math.abs), 1e-9);
  const { element: box, sync } = headTable(stack, state, "importance of heads", (layer, head) => {
    const value = values[stack.layers[layer]][head];
    return {
      about: `: ${signed(value)} nats`,
      content: [element("span", { class: value < 0 ? "heat against" : "heat", "data-value": value, style: { "--weight": Math.abs(value) / most } }, Math.abs(value) < 0.005 ? "·" : value.toFixed(2))],
    };
  });
  heads.set(box, sync);
  return card(
    "Which heads matter",
    "How much less probable the answer becomes when this head alone is switched off, as a fall of its log-probability in nats (0.69 halves it); below 0, it becomes more probable.",
    box,
  );
}

/** Tables of heads and how each shows which head is chosen; gone with their elements. */
const heads = new Map();

function watchHeads(state) {
  state.watch(["layer", "head"], (values) => {
    for (const [box, sync] of heads) box.isConnected ? sync(values) : heads.delete(box);
  });
}

// ---------------------------------------------------------------- one head

function headDetail(stack, weights, explanation, state) {
  const { layer, head } = state.values;
  const line = readout();
  const choice = chosen(explanation, state);
  const view = { stack, weights, least: explanation.least, focus: null, marks: [] };
  const show = (side, unit, other = -1) => {
    view.focus = { side, unit };
    line.textContent = looked(view, other);
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
  const picture = explanation.picture && stack.keys.name === "image" ? attendedImage(view, explanation.picture, state, show) : null;
  const long = Math.max(weights.rows, weights.columns) > LONG;
  const left = picture ?? (long ? runningText(view, show) : lines(view, show));
  const start = choice.sequence === stack.queries.name ? choice.unit : 0;
  show("query", start);
  const caption = picture
    ? "Come to a patch of the image to see where it looks; the matrix has all patches."
    : long
      ? "Come to a token to see what it looks at; the matrix has them all."
      : "Left looks at right. Come to a token on the left to see what it looks at, or on the right to see what looks at it; the matrix has them all.";
  return card(`Layer ${stack.layers[layer]}, head ${head}`, caption, line, element("div", { class: "beside even" }, left, drawn.element));
}

/** What the reader has come to, in a sentence. */
function looked({ stack, weights, least, focus: { side, unit } }, other) {
  const query = side === "query";
  const [here, there] = query ? [stack.queries, stack.keys] : [stack.keys, stack.queries];
  const values = query ? weights.row(unit) : weights.column(unit);
  const named = (i) => `${place(there.units[i], there)} ${percent(values[i])}`;
  const order = values.map((_, i) => i).filter((i) => values[i] > 0).sort((a, b) => values[b] - values[a]);
  const first = other >= 0 ? [other, ...order.filter((i) => i !== other)] : order;
  const list = first.slice(0, 4).map(named).join(", ") || "nothing that is shown";
  const rest = 1 - values.reduce((sum, value) => sum + value, 0);
  const hidden = query && least > 0 && rest > 0.005 ? ` ${percent(rest)} of its attention is on weights under ${percent(least)}, which are not shown.` : "";
  return `${place(here.units[unit], here)} ${query ? "looks at" : "is looked at by"} ${list}.${hidden}`;
}

/** Tokens that look, on the left, and that are looked at, on the right, with a line for each weight between. */
function lines(view, show) {
  const { stack, weights, marks } = view;
  const column = (side, sequence) => {
    const box = element("div", { class: side, role: "group", "aria-label": side === "query" ? "looks" : "is looked at" });
    const items = sequence.units.map((unit, i) => {
      const go = () => show(side, i);
      const item = element("button", { type: "button", class: "unit", "data-item": true, onpointerenter: go, onfocus: go, onclick: go }, element("bdi", {}, visible(unit)));
      box.append(item);
      return item;
    });
    roving(box, 1);
    return { box, items };
  };
  const queries = column("query", stack.queries), keys = column("key", stack.keys);
  const canvas = element("canvas", { class: "threads" });
  const box = element("div", { class: "lines" }, queries.box, element("div", { class: "between" }, canvas), keys.box);
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

/** Tokens as running text: the one that looks, and in colour what it looks at. */
function runningText({ stack, weights, marks }, show) {
  const keys = strip(stack.keys, "is looked at", { attend: (i) => stack.keys === stack.queries ? show("query", i) : show("key", i) });
  const queries = stack.keys === stack.queries ? keys : strip(stack.queries, "looks", { attend: (i) => show("query", i) });
  marks.push((side, unit) => {
    const [here, there, list] = side === "query" ? [queries, keys, weights.row(unit)] : [keys, queries, weights.column(unit)];
    for (const [i, item] of here.items) light(item, 0, i === unit);
    for (const [i, item] of there.items) light(item, list[i], here === there && i === unit);
  });
  return element("div", { class: "looking" }, ...(keys === queries ? [] : [queries.element]), keys.element);
}

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
  const y = (unit) => (unit + 0.5) * ROW - box.scrollTop;
  const seen = (from, to) => Math.max(from, to) > 0 && Math.min(from, to) < height;
  const stroke = (query, key, opacity, thickness) => {
    const [from, to] = [y(query), y(key)];
    if (!opacity || !seen(from, to)) return;
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
function attendedImage(view, picture, state, show) {
  const map = stage(picture, state, "attention over the image", (unit) => show("query", unit));
  const first = strip({ ...view.stack.queries, units: ["class token"], special: [true], segments: [] }, "class token", { attend: () => show("query", 0) });
  view.marks.push((side, unit) => {
    const values = side === "query" ? view.weights.row(unit) : view.weights.column(unit);
    map.paint(values, Math.max(...values.slice(1)));
    map.mark(unit);
    first.items.get(0).setAttribute("aria-current", unit === 0);
  });
  state.watch(["opacity"], ({ opacity }) => map.fade(opacity));
  return element("div", {}, map.element, first.element);
}
