// Which words of the source the words of a translation come from.

function alignmentColumn({ alignment, sequences }) {
  const [source, target] = ["source", "target"].map((name) => words(sequences.find((one) => one.name === name)));
  const line = readout();
  const drawn = matrix({
    rows: target,
    columns: source,
    shade: (r, c) => Math.sqrt(alignment.matrix[r][c]),
    marks: alignment.links.map(([from, to]) => [to, from]),
    axes: ["translation", "source"],
    label: "alignment of the translation (rows) with the source (columns)",
    pick: (r, c) => {
      drawn.mark(r, c);
      line.textContent = `${quoted(target[r])} comes from ${quoted(source[c])} with ${percent(alignment.matrix[r][c])}.`;
    },
  });
  const heads = alignment.heads.map(([layer, head]) => `layer ${layer}, head ${head}`).join("; ");
  return card(
    "",
    `Read from ${heads}. Outlined cells are the links; below they are as pairs of source and target word from 0, as fast_align and Moses write them.`,
    drawn.element,
    line,
    element("pre", { class: "pharaoh" }, element("code", {}, alignment.pharaoh)),
  );
}
