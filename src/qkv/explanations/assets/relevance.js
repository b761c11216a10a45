// How much each unit has to do with a choice, as each method sees it, and whether that holds up.

/** The methods that any of the explanations has for its first choice, in their order. */
function methodsOf(explanations) {
  return [...new Set(explanations.flatMap(({ choices: [first] }) => first.relevances.map(({ method }) => method)))];
}

/** A choice's map by the method that is chosen, if it has one. */
function mapOf(explanation, state) {
  return chosen(explanation, state).relevances.find(({ method }) => method === state.values.method);
}

function relevanceColumn(explanation, state, methods) {
  const box = element("div");
  let maps = [];
  state.watch(["choice", "method"], ({ method }) => {
    const { name, meaning } = methods[method];
    const relevance = mapOf(explanation, state);
    maps = [];
    if (!relevance) return box.replaceChildren(card("", `${name} was not computed here.`));
    const line = readout("Come to a part to see its number.");
    const say = (said) => (line.textContent = said);
    maps = explanation.sequences
      .filter((sequence) => sequence.name in relevance.values)
      .map((sequence) => relevanceMap(explanation, sequence, relevance, state, say));
    const map = element("div", {}, ...maps.map((one) => one.element), line, legend(relevance));
    const judged = relevance.faithfulness
      ? faithfulnessColumn(relevance.faithfulness, chosen(explanation, state).outcome === "value" ? "value" : "probability")
      : element("p", { class: "faithfulness" }, "Whether this map holds up was not measured.");
    const said = element("p", { class: "meaning" }, meaning);
    box.replaceChildren(card(name, "", said, element("div", { class: "beside" }, map, judged)));
    if (relevance.across) box.append(acrossCard(explanation.sequences[0], relevance.across));
  });
  state.watch(["opacity"], ({ opacity }) => maps.forEach((map) => map.fade(opacity)));
  return box;
}

/** A sequence in the colours of its values: an element, and `fade` for a map over an image. */
function relevanceMap(explanation, sequence, relevance, state, say) {
  const values = relevance.values[sequence.name];
  const order = [...values.keys()].sort((a, b) => values[b] - values[a]);
  const rank = new Map(order.map((unit, i) => [unit, i + 1]));
  const about = (i) =>
    sentence(`${place(sequence, i)}: ${signed(values[i])}, number ${rank.get(i)} of ${values.length}`);
  if (sequence.name === "image") {
    const map = stage(explanation.picture, state, `${relevance.method} over the image`, (unit) => {
      map.mark(unit);
      say(about(unit));
    });
    map.paint(values, relevance.strongest);
    return map;
  }
  const choice = chosen(explanation, state);
  const here = sequence.name === choice.sequence;
  const answer = choice.unit + (explanation.generates ? 1 : 0);
  const options = { attend: (i) => say(about(i)), about };
  const { element: text, items } = strip(sequence, `${sequence.name} by relevance`, options);
  items.forEach((item, i) => {
    tint(item, values[i], relevance.strongest);
    item.classList.toggle("later", here && explanation.generates && i > choice.unit);
    item.classList.toggle("answer", here && i === answer && !sequence.special[i]);
  });
  const name = explanation.sequences.length > 1 ? element("div", { class: "name" }, sequence.name) : null;
  return { element: element("div", {}, name, text), fade: () => {} };
}

/** A unit in words: a token in quotation marks, a patch by its row and column. */
function place({ name, units, special }, i) {
  if (name !== "image") return quoted(units[i]);
  const [row, column] = units[i].split(",");
  return special[i] ? "the class token" : `patch in row ${row}, column ${column}`;
}

function legend({ values }) {
  const against = Object.values(values).flat().some((value) => value < 0);
  return key(against ? "for the answer" : "more relevant", against ? "against it" : "");
}

/** What the two colours mean; against may be "". */
function key(towards, against) {
  const swatch = (kind, said) => element("span", { class: `swatch ${kind}` }, said);
  return element("div", { class: "legend" }, swatch("", towards), against ? swatch("against", against) : null);
}

// ---------------------------------------------------------------- two texts

/** Of a pair: what the tokens of one text took from those of the other. */
function acrossCard(sequence, { units, scale, blocks }) {
  const names = units.map((list) => list.map((i) => sequence.units[i]));
  const axes = ["first text", "second text"];
  const sides = [[0, 1], [1, 0]].map(([from, to]) => {
    const holder = element("div");
    Weights.unpack(blocks[from], names[from].length, names[to].length, scale).then((weights) => {
      const line = readout("Come to a cell to see its number.");
      const drawn = matrix({
        rows: names[from],
        columns: names[to],
        shade: (r, c) => weights.shade(r, c),
        axes: [axes[from], axes[to]],
        label: `what the ${axes[from]} took from the ${axes[to]}`,
        pick: (r, c) => {
          drawn.mark(r, c);
          const [taker, giver] = [quoted(names[from][r]), quoted(names[to][c])];
          line.textContent = `${taker} took ${signed(weights.at(r, c))} from ${giver}.`;
        },
      });
      holder.append(drawn.element, line);
    });
    return holder;
  });
  const caption = "How much each token (rows) took from each token of the other text (columns) on the way to the answer.";
  return card("Across the two texts", caption, element("div", { class: "beside even" }, ...sides));
}

// ---------------------------------------------------------------- two explanations

/** By how much the share of each unit in the whole map differs in the second explanation. */
function differenceColumn([first, second], matches, state) {
  const box = element("div");
  state.watch(["choice", "method"], () => {
    const [before, after] = [first, second].map((one) => mapOf(one, state));
    if (!before || !after) return box.replaceChildren();
    const [old, now] = [before, after].map(inShares);
    const line = readout("Come to a part to see its numbers.");
    const both = second.sequences.filter(({ name }) => name in now && name in old && name !== "image");
    const parts = both.map((sequence) => {
      const was = matched(old[sequence.name], matches[sequence.name], sequence.units.length);
      const from = new Map(matches[sequence.name].map(([a, b]) => [b, a]));
      const [own, theirs] = [second, first].map((one) => chosen(one, state));
      const makes = ({ sequence: name, unit }, i) => name === sequence.name && unit === i;
      const read = sequence.units.map((_, i) => !sequence.special[i] && !makes(own, i) && !makes(theirs, from.get(i)));
      return differenceStrip(sequence, read, was, now[sequence.name], (said) => (line.textContent = said));
    });
    if (!parts.length) return box.replaceChildren();
    const caption =
      "The share of each token in all that was read, in the second compared with the first. " +
      "Dotted: the first has no such token. Without the model's markers and the token that the answer was made at.";
    const colours = key("matters more in the second", "matters less");
    box.replaceChildren(card("Difference", caption, ...parts, line, colours));
  });
  return box;
}

/** The first explanation's values at the units of the second, NaN where it has no such unit. */
function matched(values, pairs, count) {
  const made = new Array(count).fill(NaN);
  for (const [from, to] of pairs) made[to] = values[from];
  return made;
}

/** read: whether each unit counts among what was read. */
function differenceStrip(sequence, read, was, is, say) {
  const change = is.map((value, i) => (read[i] ? value - was[i] : 0));
  const most = Math.max(...change.filter((value) => !Number.isNaN(value)).map(Math.abs), 1e-9);
  const about = (i) => {
    if (!read[i]) return `${quoted(sequence.units[i])} is not counted.`;
    if (Number.isNaN(was[i])) return `${quoted(sequence.units[i])} is in the second only.`;
    const points = signed(100 * change[i]);
    return `${quoted(sequence.units[i])}: ${signed(100 * was[i])} % → ${signed(100 * is[i])} %, by ${points} points`;
  };
  const options = { attend: (i) => say(about(i)), about };
  const { element: text, items } = strip(sequence, `${sequence.name}: change of relevance`, options);
  items.forEach((item, i) => {
    item.classList.toggle("new", Number.isNaN(change[i]));
    tint(item, Number.isNaN(change[i]) ? 0 : change[i], most);
  });
  return text;
}

/** Values by their share of all that was read, so that maps of two models can be compared. */
function inShares({ values, total }) {
  return Object.fromEntries(Object.entries(values).map(([name, list]) => [name, list.map((value) => value / total)]));
}
