// Which words of the source the words of a translation come from.

function alignmentColumn({ alignment }, state) {
  const box = element("div");
  state.watch([], () => box.replaceChildren(alignmentCard(alignment)));
  return box;
}

function alignmentCard(alignment) {
  const { source, target } = alignment.words;
  const line = readout("Come to a cell to see its share.");
  const drawn = matrix({
    rows: target,
    columns: source,
    shade: (r, c) => Math.sqrt(alignment.matrix[r][c]),
    marks: alignment.links.map(([from, to]) => [to, from]),
    axes: ["translation", "source"],
    label: "alignment of the translation (rows) with the source (columns)",
    pick: (r, c) => {
      drawn.mark(r, c);
      const share = percent(alignment.matrix[r][c]);
      line.textContent = `${quoted(target[r])} comes from ${quoted(source[c])} with ${share}.`;
    },
  });
  const heads = alignment.heads.map(([layer, head]) => `layer ${layer}, head ${head}`).join("; ");
  const caption =
    `Read from ${heads}. Outlined cells are the links; below they are as pairs of source and target word, ` +
    "counted from 0, as fast_align and Moses write them.";
  const links = element("pre", { class: "pharaoh" }, element("code", {}, alignment.pharaoh));
  return card("", caption, drawn.element, line, links);
}
