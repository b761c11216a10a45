// An image with a heat map over it: a patch of the map covers exactly the pixels that the model saw as that patch.

/** The pixels of a patch: [left, top, width, height]. unit: 1 + row * columns + column. */
function patchPixels({ grid: [rows, columns], height, width }, unit) {
  const row = Math.floor((unit - 1) / columns), column = (unit - 1) % columns;
  const [left, right] = [column, column + 1].map((c) => Math.floor((c * width) / columns));
  const [top, bottom] = [row, row + 1].map((r) => Math.floor((r * height) / rows));
  return [left, top, right - left, bottom - top];
}

/**
 * The image under a map. attend(unit): called when a patch is come to.
 * Returns the element; `paint(values, most)`, with values by unit; `mark(unit)`, which outlines a patch, and with 0
 * none; and `fade(opacity)`.
 */
function stage(picture, state, label, attend) {
  const { height, width, grid: [rows, columns] } = picture;
  const image = element("img", { src: picture.image, alt: "the image that the model saw", width, height });
  const map = element("canvas", { class: "overlay", width, height });
  const outline = element("div", { class: "outline", hidden: true });
  const zoom = Math.max(1, Math.floor(384 / Math.max(width, height)));
  const style = { width: `${width * zoom}px`, "aspect-ratio": `${width} / ${height}` };
  const look = { class: "stage", style, tabindex: 0, role: "img", "aria-label": label };
  const box = element("div", look, image, map, outline);
  let at = [0, 0];

  const go = ([row, column]) => attend(1 + row * columns + column);
  const point = (event) => {
    const { left, top, width, height } = map.getBoundingClientRect();
    const row = Math.floor(((event.clientY - top) / height) * rows);
    const column = Math.floor(((event.clientX - left) / width) * columns);
    go([clamp(row, rows), clamp(column, columns)]);
  };
  box.addEventListener("pointermove", point);
  box.addEventListener("pointerdown", point);
  box.addEventListener("keydown", (event) => {
    const to = stepped(event.key, at, rows, columns);
    if (!to) return;
    event.preventDefault();
    go(to);
  });
  const mark = (unit) => {
    outline.hidden = unit === 0;
    if (unit === 0) return;
    at = [Math.floor((unit - 1) / columns), (unit - 1) % columns];
    const [x, y, w, h] = patchPixels(picture, unit);
    const sides = { left: x / width, top: y / height, width: w / width, height: h / height };
    Object.entries(sides).forEach(([side, share]) => outline.style.setProperty(side, `${100 * share}%`));
  };
  const paint = (values, most) => paintHeat(map, picture, values, most);
  const fade = (opacity) => {
    map.style.setProperty("opacity", opacity);
    image.style.setProperty("filter", `grayscale(${opacity})`); // the map's colours are then the only ones
  };
  fade(state.values.opacity);
  return { element: box, paint, mark, fade };
}

function paintHeat(map, picture, values, most) {
  const context = map.getContext("2d");
  const [towards, against] = [colour("--heat"), colour("--heat-against")].map((parts) => parts.join(" "));
  context.clearRect(0, 0, map.width, map.height);
  for (let unit = 1; unit < values.length; unit++) {
    const opacity = Math.min(1, Math.abs(values[unit]) / most);
    context.fillStyle = `rgb(${values[unit] < 0 ? against : towards} / ${opacity})`;
    context.fillRect(...patchPixels(picture, unit));
  }
}

/** A slider for how much of the image the maps cover. */
function opacitySlider(state) {
  const slide = () => state.change({ opacity: input.valueAsNumber });
  const input = element("input", { type: "range", min: 0, max: 1, step: 0.05, oninput: slide });
  state.watch(["opacity"], ({ opacity }) => (input.value = opacity));
  return element("label", { class: "slider" }, element("span", {}, "Opacity of the map"), input);
}
