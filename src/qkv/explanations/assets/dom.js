// Elements made from values. Text is only ever set as text: what an explanation holds is shown, never run.

const SVG = "http://www.w3.org/2000/svg";

/** An element. Attributes that start with "on" are listeners, `style` is an object, booleans are flags. */
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
    else if (name === "style") Object.entries(value).forEach(([key, to]) => made.style.setProperty(key, to));
    else if (value !== false && value !== undefined) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

/** A part of the page under a heading. */
function section(key, title, lead, ...content) {
  const said = element("p", { class: "lead" }, lead);
  return element("section", { id: key }, element("h2", {}, title), said, ...content);
}

/** A card with a heading and, below, how to read it; either may be "". */
function card(title, caption, ...content) {
  const heading = title ? element("h3", {}, title) : null;
  const below = caption ? element("p", {}, caption) : null;
  return element("article", {}, heading, ...content, below);
}

/** A line that is spoken when it changes, about what a pointer or the keyboard is on. */
function readout(said = "") {
  return element("p", { class: "readout", "aria-live": "polite" }, said);
}

/** Mark one of some elements as where the reader is. */
function setCurrent(items, index) {
  items.forEach((item, i) => item.setAttribute("aria-current", i === index));
}

/**
 * One stop for the tab key, and arrows between the items in it.
 * columns: of a grid, in which up and down move by a row; 0 where these keys stay the page's.
 */
function roving(container, columns = 0) {
  const items = [...container.querySelectorAll("[data-item]")];
  const settle = (chosen) => items.forEach((item) => (item.tabIndex = item === chosen ? 0 : -1));
  settle(items.find((item) => item.getAttribute("aria-current") === "true") ?? items[0]);
  container.addEventListener("focusin", (event) => settle(event.target));
  container.addEventListener("keydown", (event) => {
    const at = items.indexOf(document.activeElement);
    const onward = getComputedStyle(container).direction === "rtl" ? -1 : 1;
    const to = { ArrowLeft: at - onward, ArrowRight: at + onward, Home: 0, End: items.length - 1 };
    if (columns) Object.assign(to, { ArrowUp: at - columns, ArrowDown: at + columns });
    if (at < 0 || !(event.key in to)) return;
    event.preventDefault();
    items[to[event.key]]?.focus();
  });
}

/** The place in a grid that an arrow leads to; null for another key. */
function stepped(key, [row, column], rows, columns) {
  const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[key];
  return step ? [clamp(row + step[0], rows), clamp(column + step[1], columns)] : null;
}

function clamp(value, count) {
  return Math.max(0, Math.min(count - 1, value));
}

/** Words with a capital letter at their start. */
function sentence(words) {
  return words[0].toUpperCase() + words.slice(1);
}

/** 0.934 as 93 %, 0.004 as 0.4 %. */
function percent(share) {
  const value = 100 * share;
  if (value === 0) return "0 %";
  if (value < 0.1) return "under 0.1 %";
  return `${value.toFixed(value < 9.95 ? 1 : 0)} %`;
}

/** A small limit below which something is left out: 0.0005 as 0.05 %. */
function limit(share) {
  return `${Number((100 * share).toPrecision(2))} %`;
}

/** A number with its sign and the three digits that count. */
function signed(value) {
  const small = value !== 0 && Math.abs(value) < 0.001;
  const text = small ? value.toExponential(1) : String(Number(value.toPrecision(3)));
  return value > 0 ? `+${text}` : text.replace("-", "−");
}
