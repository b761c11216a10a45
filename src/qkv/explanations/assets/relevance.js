// How much each unit has to do with a choice, as each method sees it, and whether that holds up.

/** The methods that any of the explanations has for the choice, in their order. */
function methodsOf(explanations, state) {
  return [...new Set(explanations.flatMap((one) => chosen(one, state).relevances.map(({ method }) => method)))];
}

function relevanceColumn(explanation, state, methods) {
  const box = element("div");
  let maps = [];
  state.watch(["choice", "method"], ({ method }) => {
    const choice = chosen(explanation, state);
    const relevance = choice.relevances.find((one) => one.method === method);
    maps = [];
    if (!relevance) return box.replaceChildren(card("", `${methods[method].name} was not computed here.`));
    const line = readout("Come to a part to see its number.");
    const parts = explanation.sequences
      .filter(({ name }) => name in relevance.values)
      .map((sequence) => relevanceMap(explanation, sequence, relevance, choice, state, (said) => (line.textContent = said), maps));
    const map = element("div", { class: "map-side" }, ...parts, line, legend(relevance));
    const judged = relevance.faithfulness
      ? faithfulnessColumn(relevance.faithfulness)
      : element("p", { class: "faithfulness" }, "Whether this map holds up was not measured.");
    const meaning = element("p", { class: "meaning" }, methods[method].meaning);
    box.replaceChildren(card(methods[method].name, "", meaning, element("div", { class: "beside" }, map, judged)));
    if (relevance.across) box.append(acrossCard(explanation.sequences[0], relevance.across));
  });
  state.watch(["opacity"], ({ opacity }) => maps.forEach((map) => map.fade(opacity)));
  return box;
}

/** The largest value without its sign, of all sequences: they are coloured alike. */
function largest(relevance) {
  return Math.max(...Object.values(relevance.values).flatMap((values) => values.map(Math.abs)), 0);
}

function relevanceMap(explanation, sequence, relevance, choice, state, say, maps) {
  const values = relevance.values[sequence.name];
  const most = largest(relevance);
  const order = values.map((_, i) => i).sort((a, b) => values[b] - values[a]);
  const about = (i) => `${place(sequence.units[i], sequence)}: ${signed(values[i])}, number ${order.indexOf(i) + 1} of ${values.length}`;
  if (sequence.name === "image") {
    const map = stage(explanation.picture, state, `map of ${relevance.method} over the image`, (unit) => {
      map.mark(unit);
      say(about(unit));
    });
    map.paint(values, most);
    maps.push(map);
    return map.element;
  }
  const { element: box, items } = strip(sequence, `${sequence.name} by relevance`, { attend: (i) => say(about(i)), about });
  for (const [i, item] of items) {
    tint(item, values[i], most);
    item.dataset.value = values[i];
    const later = explanation.generates && sequence.name === choice.sequence && i > choice.unit;
    item.classList.toggle("later", later);
    item.classList.toggle("answer", sequence.name === choice.sequence && i === choice.unit + (explanation.generates ? 1 : 0) && !sequence.special[i]);
  }
  const name = explanation.sequences.length > 1 ? element("div", { class: "name" }, sequence.name) : null;
  return element("div", {}, name, box);
}

/** A unit in words: a token in quotation marks, a patch by its row and column. */
function place(unit, sequence) {
  if (sequence.name !== "image") return quoted(unit);
  const [row, column] = unit.split(",");
  return column === undefined ? unit : `patch in row ${row}, column ${column}`;
}

function legend(relevance) {
  const negative = Object.values(relevance.values).some((values) => values.some((value) => value < 0));
  return element(
    "div",
    { class: "legend" },
    element("span", { class: "swatch" }, negative ? "for the answer" : "more relevant"),
    negative ? element("span", { class: "swatch against" }, "against it") : null,
  );
}

/** Of a pair: what the tokens of one text took from those of the other. */
function acrossCard(sequence, { units, scale, blocks }) {
  const body = element("div", { class: "beside" });
  const names = units.map((list) => list.map((i) => sequence.units[i]));
  for (const [from, to] of [[0, 1], [1, 0]]) {
    const holder = element("div");
    body.append(holder);
    Weights.unpack(blocks[from], units[from].length, units[to].length, scale).then((weights) => {
      const axes = ["first text", "second text"];
      const line = readout();
      const drawn = matrix({
        rows: names[from],
        columns: names[to],
        shade: (r, c) => weights.shade(r, c),
        axes: [axes[from], axes[to]],
        label: `what the ${axes[from]} took from the ${axes[to]}`,
        pick: (r, c) => {
          drawn.mark(r, c);
          line.textContent = `${quoted(names[from][r])} took ${signed(weights.at(r, c))} from ${quoted(names[to][c])}.`;
        },
      });
      holder.append(drawn.element, line);
    });
  }
  return card("Across the two texts", "How much each token (rows) took from each token of the other text (columns) on the way to the answer.", body);
}

/** By how much the share of each unit in the whole map differs in the second explanation. */
function differenceCard([first, second], matches, state) {
  const box = element("div");
  state.watch(["choice", "method"], ({ method }) => {
    const [before, after] = [first, second].map((one) => chosen(one, state).relevances.find((found) => found.method === method));
    if (!before || !after) return box.replaceChildren();
    const [old, now] = [before, after].map(inShares);
    const line = readout("Come to a part to see its numbers.");
    const parts = second.sequences.filter(({ name }) => name in now && name in old && name !== "image").map((sequence) => {
      const { name } = sequence;
      const twin = new Map(matches[name].map(([a, b]) => [b, a]));
      const change = (i) => now[name][i] - (twin.has(i) ? old[name][twin.get(i)] : 0);
      const most = Math.max(...sequence.units.map((_, i) => (twin.has(i) ? Math.abs(change(i)) : 0)), 1e-9);
      const said = (i) => (twin.has(i) ? `${quoted(sequence.units[i])}: ${percent(Math.abs(old[name][twin.get(i)]))} → ${percent(Math.abs(now[name][i]))}, by ${signed(100 * change(i))} points` : `${quoted(sequence.units[i])} is in the second only.`);
      const { element: made, items } = strip(sequence, `${name}: change of relevance`, { attend: (i) => (line.textContent = said(i)), about: said });
      for (const [i, item] of items) {
        tint(item, twin.has(i) ? change(i) : 0, most);
        item.dataset.value = change(i);
        item.classList.toggle("new", !twin.has(i));
      }
      return made;
    });
    if (!parts.length) return box.replaceChildren();
    const caption = "The share of each token in its whole map, in the second compared with the first. Dotted: the first has no such token.";
    const key = element("div", { class: "legend" }, element("span", { class: "swatch" }, "matters more in the second"), element("span", { class: "swatch against" }, "matters less"));
    box.replaceChildren(card("Difference", caption, ...parts, line, key));
  });
  return box;
}

/** Values divided by the sum of their sizes, so that maps of two models can be compared. */
function inShares({ values }) {
  const sum = Object.values(values).flat().reduce((total, value) => total + Math.abs(value), 0) || 1;
  return Object.fromEntries(Object.entries(values).map(([name, list]) => [name, list.map((value) => value / sum)]));
}
