// What the reader has chosen. Figures name the choices that they show, and are drawn again when these change.

class State {
  constructor(values) {
    this.values = values;
    this.watchers = [];
  }

  change(values) {
    const changed = Object.keys(values).filter((name) => this.values[name] !== values[name]);
    Object.assign(this.values, values);
    for (const { names, draw } of this.watchers) {
      if (names.some((name) => changed.includes(name))) draw(this.values);
    }
  }

  /** Draw now, and whenever one of the named values changes. */
  watch(names, draw) {
    this.watchers.push({ names, draw });
    draw(this.values);
  }

  /** Draw everything, as when the colours change. */
  redraw() {
    for (const { draw } of this.watchers) draw(this.values);
  }
}

/** Radio buttons side by side for one value of the state; hidden if there is no choice. options: [value, label]. */
function chooser(legend, name, options, state) {
  const inputs = options.map(([value]) => {
    const choose = () => state.change({ [name]: value });
    return element("input", { type: "radio", name, value, onchange: choose });
  });
  const labels = options.map(([, label], i) => element("label", {}, inputs[i], element("span", {}, label)));
  state.watch([name], (values) => inputs.forEach((input) => (input.checked = input.value === values[name])));
  return element(
    "fieldset",
    { class: "chooser", hidden: options.length < 2 },
    element("legend", {}, legend),
    ...labels,
  );
}
