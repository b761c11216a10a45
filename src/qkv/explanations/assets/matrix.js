// A matrix with named rows and columns on a canvas, walked through by pointer, finger and arrows.

const LABEL = '11px ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace';
const LONGEST = 120;

/**
 * rows, columns: names. shade(r, c): from 0 to 1. pick(r, c): called when a cell is come to.
 * labels: whether the names are written. marks: cells to outline. axes: what rows and columns are.
 * Returns the element and `mark(r, c)`, which shows where the reader is.
 */
function matrix({ rows, columns, shade, pick, labels = true, marks = [], axes, label }) {
  const canvas = element("canvas", { class: "matrix", tabindex: 0, role: "img", "aria-label": label });
  const box = element("div", { class: "matrix-box" }, canvas);
  let at = null;
  let place = null;

  const draw = () => {
    place = layout(canvas, box.clientWidth, { rows, columns, labels, axes });
    paintMatrix(canvas, place, { rows, columns, shade, marks, axes, at });
  };
  const cell = (event) => {
    const { left, top } = canvas.getBoundingClientRect();
    const row = Math.floor((event.clientY - top - place.top) / place.side);
    const column = Math.floor((event.clientX - left - place.left) / place.side);
    if (row === clamp(row, rows.length) && column === clamp(column, columns.length)) pick(row, column);
  };
  canvas.addEventListener("pointermove", cell);
  canvas.addEventListener("pointerdown", cell);
  canvas.addEventListener("keydown", (event) => {
    const from = (at ?? [0, 0]).map((place) => Math.max(0, place));
    const to = stepped(event.key, from, rows.length, columns.length);
    if (!to) return;
    event.preventDefault();
    pick(...to);
  });
  new ResizeObserver(draw).observe(box);
  const mark = (row, column) => {
    at = [row, column];
    if (place) draw(); // else it is not on the page yet
  };
  return { element: box, mark };
}

/** Sizes in CSS pixels, and the canvas made as large as they need. */
function layout(canvas, width, { rows, columns, labels, axes }) {
  const context = canvas.getContext("2d");
  context.font = LABEL;
  const length = (name) => Math.min(LONGEST, context.measureText(visible(name)).width);
  const widest = (names) => Math.max(...names.map(length));
  const named = labels && rows.length <= 80 && columns.length <= 80;
  const left = named ? widest(rows) + 26 : 20;
  const top = named ? widest(columns) + 26 : 20;
  const [least, most] = named ? [12, 22] : [2, 16];
  const side = Math.max(least, Math.min(most, Math.floor((width - left - 2) / columns.length)));
  const place = { left: Math.ceil(left), top: Math.ceil(top), side, named };
  const [down, across] = axes.map((name) => context.measureText(`${name} →`).width);
  const size = [
    place.left + Math.max(side * columns.length, across) + 2,
    place.top + Math.max(side * rows.length, down) + 2,
  ];
  const dots = window.devicePixelRatio;
  [canvas.width, canvas.height] = size.map((pixels) => Math.round(pixels * dots));
  canvas.style.width = `${size[0]}px`;
  canvas.style.height = `${size[1]}px`;
  context.setTransform(dots, 0, 0, dots, 0, 0);
  return place;
}

function paintMatrix(canvas, { left, top, side, named }, { rows, columns, shade, marks, axes, at }) {
  const context = canvas.getContext("2d");
  const style = getComputedStyle(document.documentElement);
  const ink = (name) => style.getPropertyValue(name).trim();
  context.save();
  context.translate(left, top);
  context.fillStyle = ink("--accent");
  context.globalAlpha = 0.05;
  context.fillRect(0, 0, side * columns.length, side * rows.length);
  for (let r = 0; r < rows.length; r++) {
    for (let c = 0; c < columns.length; c++) {
      const opacity = shade(r, c);
      if (opacity === 0) continue;
      context.globalAlpha = opacity;
      context.fillRect(c * side, r * side, side, side);
    }
  }
  context.globalAlpha = 1;
  context.strokeStyle = ink("--warm");
  context.lineWidth = 2;
  for (const [r, c] of marks) context.strokeRect(c * side + 1, r * side + 1, side - 2, side - 2);
  if (at) {
    context.strokeStyle = ink("--ink");
    context.lineWidth = 1;
    const [r, c] = at;
    if (r >= 0) context.strokeRect(0.5, r * side + 0.5, side * columns.length - 1, side - 1);
    if (c >= 0) context.strokeRect(c * side + 0.5, 0.5, side - 1, side * rows.length - 1);
  }
  context.font = LABEL;
  context.textAlign = "left";
  context.textBaseline = "middle";
  if (named) {
    context.fillStyle = ink("--ink");
    context.textAlign = "right";
    rows.forEach((name, r) => context.fillText(fitted(context, name), -6, (r + 0.5) * side, LONGEST));
    context.textAlign = "left";
    columns.forEach((name, c) => upward(context, fitted(context, name), (c + 0.5) * side, -6));
  }
  context.fillStyle = ink("--soft");
  context.fillText(`${axes[1]} →`, 0, 10 - top);
  context.textAlign = "right";
  upward(context, `← ${axes[0]}`, 10 - left, 0);
  context.restore();
}

function upward(context, text, x, y) {
  context.save();
  context.translate(x, y);
  context.rotate(-Math.PI / 2);
  context.fillText(text, 0, 0);
  context.restore();
}

/** A name, its end cut where it is too long. */
function fitted(context, name) {
  let text = visible(name);
  if (context.measureText(text).width <= LONGEST) return text;
  while (context.measureText(`${text}…`).width > LONGEST) text = [...text].slice(0, -1).join("");
  return `${text}…`;
}
