// In the panel: the tokens, activations, attention and texts that show what a node does.

/** The tokens with the largest weights in the embedding or unembedding. */
function tokensOf(node) {
  const writes = node.location.endsWith("_out");
  const titles = writes
    ? ["Logits it raises", "Logits it lowers"]
    : ["Tokens that embed positively here", "Tokens that embed negatively here"];
  const lists = (node.tokens ?? []).map((found, i) => {
    if (!found.length) return null;
    const chips = found.map(([id, weight]) => {
      const small = make("small", {}, signed(weight));
      return make("span", { class: "chip", "--p": colorOf(weight) }, tokenElement(id), small);
    });
    return [heading(titles[i]), make("div", { class: "chips" }, chips)];
  });
  if (writes && node.tokens && ends.bigram) lists.push(note(BIGRAM));
  return lists;
}

const BIGRAM =
  "The bigram table also adds to the logits, by the last token alone; no node carries its share.";

function histogramOf(node) {
  if (!node.histogram) return null;
  const { low, high, counts } = node.histogram;
  const width = 340;
  const x = d3.scaleLinear([low, high > low ? high : low + 1], [0, width]);
  const y = d3.scaleLog([0.8, d3.max(counts)], [0, 56]);
  const plot = d3.create("svg").attr("class", "histogram").attr("viewBox", `0 0 ${width} 74`);
  plot.attr("role", "img").attr("aria-label", `From ${number(low)} to ${number(high)}`);
  const barWidth = width / counts.length;
  plot
    .selectAll("rect")
    .data(counts)
    .join("rect")
    .attr("x", (_, i) => i * barWidth + 0.5)
    .attr("width", barWidth - 1)
    .attr("y", (n) => 58 - (n ? y(n) : 0))
    .attr("height", (n) => (n ? y(n) : 0));
  if (node.mean != null) {
    const at = x(node.mean);
    plot.append("line").attr("x1", at).attr("x2", at).attr("y1", 0).attr("y2", 58);
  }
  plot.append("text").attr("y", 71).text(number(low));
  plot.append("text").attr("y", 71).attr("x", width).attr("text-anchor", "end").text(number(high));
  const scale = "Counts are logarithmic" + (node.mean == null ? "." : "; the line is the mean.");
  const what = isComponent(node) ? "Distances of the output from its mean" : "Activations";
  return [heading(`${what} in the corpus`), plot.node(), note(scale)];
}

/** The passages of the task's prompts where a node is strongest, one side of a pair at most. */
function promptsOf(i, node) {
  const sides = prompts.flatMap((pair, p) => pair.map((side) => ({ p, side })));
  return [1, -1].map((sign) => {
    const peaks = sides.map(({ p, side }) => {
      const at = d3.greatestIndex(side.values[i], (level) => sign * level);
      return { p, side, at, height: sign * side.values[i][at] };
    });
    const strongest = d3.sort(
      peaks.filter(({ height }) => height > 0),
      ({ height }) => -height,
    );
    const ofEachPair = [...d3.group(strongest, ({ p }) => p).values()].map(([first]) => first);
    if (!ofEachPair.length) return null;
    const passages = ofEachPair.slice(0, 3).map((peak) => promptPassage(peak, i, node));
    return [heading(`Prompts where it is most ${sign > 0 ? "positive" : "negative"}`), passages];
  });
}

/** A part of a prompt around a peak, as a button that shows its pair. */
function promptPassage({ p, side, at }, i, node) {
  const from = Math.max(0, at - 20);
  const part = (list) => list.slice(from, at + 8);
  const peak = { class: "peak", "--p": colorOf(side.values[i][at]) };
  const extra = (j) => (j === at - from ? peak : {});
  return make(
    "button",
    { class: "passage", title: `Show ${pairName(p)}`, onclick: () => choosePair(p) },
    tokenElements(part(side.tokens), part(side.values[i]), node, extra),
  );
}

function passagesOf(node) {
  return ["positive", "negative"].map((sign, k) => {
    if (!node.passages[k].length) return null;
    const passages = node.passages[k].map(([ids, levels, peak]) => {
      const mark = { class: "peak", "--p": colorOf(levels[peak]) };
      const extra = (j) => (j === peak ? mark : {});
      return make("p", { class: "passage" }, tokenElements(ids, levels, node, extra));
    });
    return [heading(`Corpus where it is most ${sign}`), passages];
  });
}

/** The attention patterns of the node's head on the chosen pair. */
function patternsOf(node) {
  const pair = prompts[state.pair];
  if (node.head == null || !pair) return null;
  const pointedAt = make(
    "p",
    { class: "note", id: "attention" },
    "Rows attend to columns. Point at a cell.",
  );
  const canvases = pair.map((side) => {
    return patternCanvas(side, side.patterns[`${node.layer}.${node.head}`], pointedAt);
  });
  const title = `Attention of head ${node.head} on ${pairName(state.pair)}`;
  return [heading(title), make("div", { class: "patterns" }, canvases), pointedAt];
}

function patternCanvas(side, rows, pointedAt) {
  const n = rows.length;
  const label = "Attention pattern";
  const canvas = make("canvas", { width: n, height: n, role: "img", "aria-label": label });
  const ink = canvas.getContext("2d");
  ink.fillStyle = getComputedStyle(document.querySelector(".swatch.pos")).borderTopColor;
  rows.forEach((row, query) => {
    row.forEach((share, key) => {
      ink.globalAlpha = Math.sqrt(share / 100);
      ink.fillRect(key, query, 1, 1);
    });
  });
  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect();
    const query = Math.floor(((event.clientY - box.top) / box.height) * n);
    const key = Math.floor(((event.clientX - box.left) / box.width) * n);
    const share = rows[query]?.[key];
    if (share == null) return;
    const [from, to] = [query, key].map((at) => tokenElement(side.tokens[at]));
    pointedAt.replaceChildren(from, ` (${query}) attends to `, to, ` (${key}): ${share} %`);
  });
  return canvas;
}
