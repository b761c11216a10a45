// Whether a map says anything: what happens to the answer as units go and come, most relevant first.

function faithfulnessColumn({ shares, deletion, insertion, random_deletion, random_insertion, verdict }) {
  return element(
    "div",
    { class: "faithfulness" },
    element("h4", {}, "Does this map hold up?"),
    element("p", { class: "verdict" }, verdict),
    element(
      "div",
      { class: "curves" },
      curves("Deletion", "Taken away, most relevant first: the sooner the answer's probability falls, the better.", shares, deletion, random_deletion),
      curves("Insertion", "Put back, most relevant first: the sooner the answer's probability rises, the better.", shares, insertion, random_insertion),
    ),
  );
}

/** The area under a curve: its mean height. */
function area(shares, heights) {
  let sum = 0;
  for (let i = 1; i < shares.length; i++) sum += ((heights[i] + heights[i - 1]) / 2) * (shares[i] - shares[i - 1]);
  return sum / (shares.at(-1) - shares[0]);
}

/** A curve, those of random orders faintly behind it, and the areas under them. */
function curves(title, meaning, shares, ours, random) {
  const [W, H, left, top, bottom] = [240, 132, 34, 8, 22];
  const x = (share) => left + (W - left - 8) * share;
  const y = (probability) => top + (H - top - bottom) * (1 - probability);
  const path = (heights) => heights.map((height, i) => `${x(shares[i]).toFixed(1)},${y(height).toFixed(1)}`).join(" ");
  const mean = random.reduce((sum, heights) => sum + area(shares, heights), 0) / random.length;
  const areas = `area ${area(shares, ours).toFixed(2)}; random orders ${mean.toFixed(2)}`;
  const levels = [0, 0.5, 1].map((level) => [
    shape("line", { class: "grid", x1: left, x2: W - 8, y1: y(level), y2: y(level) }),
    shape("text", { x: left - 6, y: y(level) + 4, "text-anchor": "end" }, `${100 * level}`),
  ]);
  const ends = [
    shape("text", { x: left, y: H - 5 }, "0"),
    shape("text", { x: (left + W - 8) / 2, y: H - 5, "text-anchor": "middle" }, "% of the input"),
    shape("text", { x: W - 8, y: H - 5, "text-anchor": "end" }, "100"),
  ];
  const drawing = shape(
    "svg",
    { class: "curve", viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": `${title}: ${areas}` },
    ...levels.flat(),
    ...random.map((heights) => shape("polyline", { class: "random", points: path(heights) })),
    shape("polyline", { class: "ours", points: path(ours) }),
    ...ends,
  );
  return element("figure", {}, element("figcaption", {}, element("b", {}, title), ` ${areas}`), drawing, element("p", {}, meaning));
}
