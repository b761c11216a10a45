// Elements made from values. Text is only ever set as text: whatever an explanation holds is shown, never run.

const SVG = "http://www.w3.org/2000/svg";

/** An element; attributes that start with "on" are listeners, `style` is an object, true and false are flags. */
function element(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

/** An element of SVG. */
function shape(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

function filled(made, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name === "style") for (const [key, to] of Object.entries(value)) made.style.setProperty(key, to);
    else if (value !== false && value !== undefined) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.flat().filter((child) => child !== null));
  return made;
}

/** A part of the page under a heading. */
function section(key, title, lead, ...content) {
  return element("section", { id: key }, element("h2", {}, title), element("p", { class: "lead" }, lead), ...content);
}

/** A card with a heading and, below, a sentence that says how to read it. */
function card(title, caption, ...content) {
  const heading = title ? element("h3", {}, title) : null;
  const below = caption ? element("p", {}, caption) : null;
  return element("article", {}, heading, ...content, below);
}

/** A line that is spoken when it changes, for what a pointer or the keyboard is on. */
function readout(said = "") {
  return element("p", { class: "readout", "aria-live": "polite" }, said);
}

/**
 * One stop for the tab key, and arrows between the items in it.
 * columns: of a grid, in which up and down move by a row; 0 where they stay the page's.
 */
function roving(container, columns = 0) {
  const items = () => [...container.querySelectorAll("[data-item]")];
  const settle = (chosen) => items().forEach((item) => (item.tabIndex = item === chosen ? 0 : -1));
  container.addEventListener("focusin", (event) => {
    const item = event.target.closest("[data-item]");
    if (item) settle(item);
  });
  container.addEventListener("keydown", (event) => {
    const all = items();
    const at = all.indexOf(document.activeElement);
    const onward = getComputedStyle(container).direction === "rtl" ? -1 : 1;
    const to = { ArrowLeft: at - onward, ArrowRight: at + onward, Home: 0, End: all.length - 1 };
    if (columns) Object.assign(to, { ArrowUp: at - columns, ArrowDown: at + columns });
    if (at < 0 || !(event.key in to)) return;
    event.preventDefault();
    all[to[event.key]]?.focus();
  });
  settle(container.querySelector("[data-item][aria-current=true]") ?? items()[0]);
}

/** 0.934 as 93 %, 0.004 as 0.4 %. */
function percent(share) {
  const value = 100 * share;
  if (value === 0) return "0 %";
  return value < 0.1 ? "under 0.1 %" : value < 9.95 ? `${value.toFixed(1)} %` : `${value.toFixed(0)} %`;
}

/** A number with its sign and three digits that count. */
function signed(value) {
  const text = Math.abs(value) >= 0.001 || value === 0 ? String(Number(value.toPrecision(3))) : value.toExponential(1);
  return value > 0 ? `+${text}` : text.replace("-", "−");
}
