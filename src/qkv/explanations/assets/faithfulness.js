// Whether a map says anything: what becomes of the answer as units go and come, most relevant first.

/** followed: what the curves show, the answer's probability or its value. */
function faithfulnessColumn({ shares, deletion, insertion, random_deletion, random_insertion, verdict }, followed) {
  const gone = `Taken away, most relevant first: the sooner the answer's ${followed} falls, the better.`;
  const back = `Put back, most relevant first: the sooner the answer's ${followed} rises, the better.`;
  const drawn = [
    curves("Deletion", gone, shares, deletion, random_deletion),
    curves("Insertion", back, shares, insertion, random_insertion),
  ];
  return element(
    "div",
    { class: "faithfulness" },
    element("h4", {}, "Does this map hold up?"),
    element("p", { class: "verdict" }, verdict),
    element("div", { class: "curves" }, ...drawn),
  );
}

/** The area under a curve over shares from 0 to 1. */
function area(shares, heights) {
  let sum = 0;
  for (let i = 1; i < shares.length; i++) sum += ((heights[i] + heights[i - 1]) / 2) * (shares[i] - shares[i - 1]);
  return sum;
}

/** What an axis must cover: from 0, or the least value, to a round number. */
function range(heights) {
  const most = Math.max(...heights, 0.001);
  const power = 10 ** Math.floor(Math.log10(most));
  return [Math.min(0, ...heights), [1, 2, 5, 10].map((step) => step * power).find((step) => step >= most)];
}

/** A curve, those of random orders faintly behind it, and the areas under them. */
function curves(title, meaning, shares, ours, random) {
  const [W, H, left, right, top, bottom] = [240, 132, 34, 8, 8, 22];
  const x = (share) => left + (W - left - right) * share;
  const [low, high] = range([ours, ...random].flat());
  const y = (height) => top + ((H - top - bottom) * (high - height)) / (high - low);
  const point = (height, i) => `${x(shares[i]).toFixed(1)},${y(height).toFixed(1)}`;
  const curve = (kind, heights) => shape("polyline", { class: kind, points: heights.map(point).join(" ") });
  const label = (at, height, anchor, text) => shape("text", { x: at, y: height, "text-anchor": anchor }, text);
  const levels = [low, (low + high) / 2, high].flatMap((level) => [
    shape("line", { class: "grid", x1: left, x2: W - right, y1: y(level), y2: y(level) }),
    label(left - 6, y(level) + 4, "end", String(Number(level.toPrecision(2)))),
  ]);
  const mean = random.reduce((sum, heights) => sum + area(shares, heights), 0) / random.length;
  const areas = `area ${area(shares, ours).toFixed(2)}; random orders ${mean.toFixed(2)}`;
  const drawing = shape(
    "svg",
    { class: "curve", viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": `${title}: ${areas}` },
    ...levels,
    ...random.map((heights) => curve("random", heights)),
    curve("ours", ours),
    label(left, H - 5, "start", "0"),
    label((left + W - right) / 2, H - 5, "middle", "share of the input"),
    label(W - right, H - 5, "end", "1"),
  );
  const caption = element("figcaption", {}, element("b", {}, title), ` ${areas}`);
  return element("figure", {}, caption, drawing, element("p", {}, meaning));
}
