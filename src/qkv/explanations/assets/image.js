// An image with a heat map over it: each patch of the grid covers exactly the pixels that the model saw as that patch.

/** The pixels of a patch: [left, top, width, height]. unit: 1 + row * columns + column. */
function patchPixels({ grid: [rows, columns], height, width }, unit) {
  const row = Math.floor((unit - 1) / columns), column = (unit - 1) % columns;
  const [left, right] = [column, column + 1].map((c) => Math.floor((c * width) / columns));
  const [top, bottom] = [row, row + 1].map((r) => Math.floor((r * height) / rows));
  return [left, top, right - left, bottom - top];
}

/**
 * The image under a map. attend(unit): called when a patch is come to.
 * Returns the element, `paint(values, most)`: values by unit, and `mark(unit)`, which outlines a patch.
 */
function stage(picture, state, label, attend) {
  const { height, width, grid: [rows, columns] } = picture;
  const image = element("img", { src: picture.image, alt: "the image that the model saw", width, height });
  const map = element("canvas", { class: "overlay", width, height });
  const outline = element("div", { class: "outline", hidden: true });
  const zoom = Math.max(1, Math.floor(384 / Math.max(width, height)));
  const style = { width: `${width * zoom}px`, "aspect-ratio": `${width} / ${height}` };
  const box = element("div", { class: "stage", style, tabindex: 0, role: "img", "aria-label": label }, image, map, outline);
  let at = 1;

  const mark = (unit) => {
    outline.hidden = unit < 1;
    if (unit < 1) return;
    at = unit;
    const [x, y, w, h] = patchPixels(picture, unit);
    const sides = { left: x / width, top: y / height, width: w / width, height: h / height };
    for (const [side, share] of Object.entries(sides)) outline.style.setProperty(side, `${100 * share}%`);
  };
  const point = (event) => {
    const box = map.getBoundingClientRect();
    const row = clamp(Math.floor(((event.clientY - box.top) / box.height) * rows), rows);
    const column = clamp(Math.floor(((event.clientX - box.left) / box.width) * columns), columns);
    attend(1 + row * columns + column);
  };
  box.addEventListener("pointermove", point);
  box.addEventListener("pointerdown", point);
  box.addEventListener("keydown", (event) => {
    const [row, column] = [Math.floor((at - 1) / columns), (at - 1) % columns];
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!step) return;
    event.preventDefault();
    attend(1 + clamp(row + step[0], rows) * columns + clamp(column + step[1], columns));
  });
  const paint = (values, most) => paintHeat(map, picture, values, most);
  const fade = (opacity) => map.style.setProperty("opacity", opacity);
  fade(state.values.opacity);
  return { element: box, paint, mark, fade };
}

function paintHeat(map, picture, values, most) {
  const context = map.getContext("2d");
  const [towards, against] = [colour("--heat"), colour("--heat-against")];
  context.clearRect(0, 0, map.width, map.height);
  for (let unit = 1; unit < values.length; unit++) {
    const opacity = most > 0 ? Math.abs(values[unit]) / most : 0;
    context.fillStyle = `rgb(${(values[unit] < 0 ? against : towards).join(" ")} / ${opacity})`;
    context.fillRect(...patchPixels(picture, unit));
  }
}

/** A slider for how much of the image the maps cover. */
function opacitySlider(state) {
  const input = element("input", { type: "range", min: 0, max: 1, step: 0.05, oninput: () => state.change({ opacity: input.valueAsNumber }) });
  state.watch(["opacity"], ({ opacity }) => (input.value = opacity));
  return element("label", { class: "slider" }, element("span", {}, "Opacity of the map"), input);
}
