// The panel on the right: the pinned node or, without one, the nodes that matter most.

const LISTED_EDGES = 60;

/** Shows the panel; it keeps its place if what it is about has not changed. */
function showPanel(isAboutAnother = true) {
  const panel = byId("panel");
  if (isAboutAnother) panel.scrollTop = 0;
  const focused = document.activeElement?.closest("#panel") ? document.activeElement.id : "";
  if (state.pinned) showNode(state.pinned);
  else showOverview();
  if (focused) byId(focused)?.focus();
}

/** A button that pins a node. */
function nodeLink(vertex, text = vertex.name) {
  const label = labelOf(vertex.node);
  const words = label ? make("span", { class: "own-label" }, ` ${label}`) : null;
  return make("button", { class: "link", onclick: () => pin(vertex) }, text, words);
}

function nameOfEnd(vertex) {
  return vertex.terminal ? tokenElement(vertex.id) : nodeLink(vertex);
}

/** A bar of this share of the room, in the colour of the number's sign. */
function bar(x, largest) {
  const width = largest ? (100 * Math.abs(x)) / largest : 0;
  return make("span", { class: "bar", "--p": colorOf(x), "--width": `${width}%` });
}

/** A table of names and numbers with bars. */
function barTable(items) {
  const largest = d3.max(items, ([, x]) => Math.abs(x));
  const rows = items.map(([name, x]) => {
    const meter = x == null ? null : bar(x, largest);
    const text = x == null ? "" : signed(x);
    return make("tr", {}, [
      make("td", {}, name),
      make("td", { class: "meter" }, meter),
      make("td", { class: "number" }, text),
    ]);
  });
  return make("table", { class: "rows" }, rows);
}

function heading(text) {
  return make("h3", {}, text);
}

function note(...children) {
  return make("p", { class: "note" }, ...children);
}

// ----------------------------------------------------------------------------------- overview

function showOverview() {
  const shown = byEffect.slice(0, 14);
  const introduction = hasEffects
    ? `How much the task loss rises when the node alone is held at its mean ${effectPairs()}. ` +
      "Click a node: its paths light up, and this panel shows its edges, values and texts."
    : "Click a node: its paths light up, and this panel shows its edges, values and texts.";
  const withoutTask = prompts.length ? "" : " Without a task there are no prompts and no effects.";
  fill(
    "panel",
    make("h2", {}, hasEffects ? "Nodes that matter most" : "Nodes"),
    note(introduction, withoutTask),
    heading(hasEffects ? "Effect on the task loss" : "Nodes"),
    barTable(shown.map((v) => [nodeLink(v), v.node.effect])),
    nodesWithoutEdges(),
    labelActions(),
    note("Arrow keys walk along edges, / finds a node, ? explains the rest."),
  );
}

/** On how many pairs the effects are measured, in brackets. */
function effectPairs() {
  return summary.n_effect_pairs ? `(mean of ${count(summary.n_effect_pairs, "pair")})` : "";
}

/** The nodes without edges, by why they are in the circuit. */
function nodesWithoutEdges() {
  const found = verticesWithoutEdges();
  if (!found.length) return null;
  const most = found.slice(0, 24);
  const more = found.length - most.length;
  return [
    heading(`Without edges · ${found.length}`),
    note(
      "No weight joins these to another node of the circuit (dashed circles). ",
      "Each says why it is there.",
    ),
    make(
      "p",
      { class: "names" },
      most.map((v) => nodeLink(v)),
      more ? `and ${more} more` : null,
    ),
  ];
}

/** A button that copies the labels, with what to do with them. */
function labelActions() {
  const json = () => labelsAsJson();
  const button = make("button", { id: "copy-labels" }, "Copy labels");
  button.addEventListener("click", () => copyText(json(), button, "Labels"));
  if (json() === "{}") return null;
  const folder = summary.labelled_from || "circuit";
  return [
    heading("Your labels"),
    note(
      "This browser keeps them for this circuit. To keep them with it: ",
      make("code", {}, `Circuit.load("${folder}").with_labels(…)`),
      " takes what this copies.",
    ),
    make("p", {}, button),
  ];
}

// --------------------------------------------------------------------------------------- node

function showNode(vertex) {
  const { node } = vertex;
  fill(
    "panel",
    nodeHeading(node),
    labelField(vertex),
    nodeFacts(node),
    edgesOf(vertex).length ? null : explanation(vertex),
    edgeTable(vertex, "in", "edge", "Incoming edges"),
    edgeTable(vertex, "out", "edge", "Outgoing edges"),
    productNote(vertex),
    edgeTable(vertex, "in", "join", "Written on this channel by"),
    edgeTable(vertex, "out", "join", "Read on this channel by"),
    edgeTable(vertex, "in", "end", "Embedded on this channel"),
    edgeTable(vertex, "out", "end", "Adds to the logits of the answers"),
    tokensOf(node),
    histogramOf(node),
    patternsOf(node),
    promptsOf(vertex.i, node),
    passagesOf(node),
    caps.corpus_tokens ? null : note("Without a corpus there are no passages and no histogram."),
  );
}

function nodeHeading(node) {
  let place = `Layer ${node.layer}, ${node.kind}`;
  if (node.head != null) place += `: head ${node.head}, channel ${node.name.split(".").at(-1)}`;
  else if (node.channel != null) place += `: ${channelName(node)}`;
  const link = make(
    "a",
    { class: "permalink", href: permalink(), title: "Link to this node", id: "permalink" },
    "#",
  );
  link.addEventListener("click", (event) => {
    event.preventDefault();
    copyText(location.href.split("#")[0] + permalink(), link, "Link");
  });
  return [
    make("h2", { class: "name" }, node.name, " ", link),
    make("p", { class: "aka" }, node.openai, " in OpenAI’s notation"),
    make("p", {}, place),
  ];
}

/** The field in which the reader writes a label. */
function labelField(vertex) {
  const { node } = vertex;
  const field = make("input", {
    id: "label",
    type: "text",
    maxlength: 200,
    placeholder: "your words for it",
    value: labelOf(node),
  });
  const answer = make("span", { class: "note", role: "status" });
  field.addEventListener("input", () => {
    const isKept = setLabel(node, field.value.trim());
    answer.textContent = isKept
      ? ""
      : "Not kept by this browser: copy the labels before you leave.";
    showLabels();
    copy.hidden = labelsAsJson() === "{}";
  });
  const copy = make(
    "button",
    { id: "copy-labels", hidden: labelsAsJson() === "{}" },
    "Copy labels",
  );
  copy.addEventListener("click", () => copyText(labelsAsJson(), copy, "Labels"));
  return make(
    "p",
    { class: "label-field" },
    make("label", { for: "label" }, "label"),
    field,
    copy,
    answer,
  );
}

/** Shows changed labels in the graph. */
function showLabels() {
  picture.marks.select("title").text((v) => (v.terminal ? v.name : nameWithLabel(v.node)));
  picture.marks.attr("aria-label", (v) => (v.terminal ? v.name : nameWithLabel(v.node)));
  placeCaptions(d3.zoomTransform(svg.node()));
}

function nodeFacts(node) {
  const fact = (name, value, title) => {
    return make("div", { title }, make("dt", {}, name), make("dd", {}, value));
  };
  const rank = node.rank == null ? "–" : `${node.rank + 1} of ${nodes.length}`;
  return [
    make("dl", { class: "facts" }, [
      fact("effect", make("span", { id: "effect-of-node" }, signed(node.effect)), effectMeaning()),
      fact("rank", rank, `By ${caps.ranked}`),
      fact("mean", number(node.mean), "The value at which it is held outside a circuit"),
    ]),
    node.effect == null ? null : note(`Effect: ${effectMeaning()}`),
  ];
}

function effectMeaning() {
  return `the rise of the task loss when it alone is held at its mean ${effectPairs()}.`;
}

function explanation(vertex) {
  const reasons = whyWithoutEdges(vertex).join(" ");
  return make("p", { class: "explanation" }, make("strong", {}, "No edges. "), reasons);
}

// -------------------------------------------------------------------------------------- edges

/** The links of one kind on one side of a vertex, the strongest first. */
function edgeTable(vertex, side, kind, title) {
  const end = side === "in" ? "source" : "target";
  const found = vertex[side].filter((link) => link.kind === kind);
  if (!found.length) return null;
  found.sort((a, b) => Math.abs(b.weight ?? 0) - Math.abs(a.weight ?? 0));
  const listed = found.slice(0, LISTED_EDGES);
  const isWeighted = kind !== "join";
  const hasProducts =
    isWeighted && prompts.length > 0 && !vertex[side].some((l) => l.source.terminal);
  const largest = d3.max(listed, (link) => Math.abs(link.weight ?? 0));
  const rows = listed.map((link) => {
    const cells = [make("td", {}, nameOfEnd(link[end]))];
    if (isWeighted) {
      cells.push(make("td", { class: "meter" }, bar(link.weight, largest)));
      cells.push(make("td", { class: "number" }, signed(link.weight)));
    }
    if (hasProducts) {
      for (const s of d3.range(sidesOfPair())) {
        cells.push(make("td", { class: "number product" }, signed(productOf(link, s))));
      }
    }
    return make("tr", {}, cells);
  });
  const isCut = found.length > listed.length;
  return [
    heading(`${title} · ${found.length}`),
    make("table", { class: "rows edges" }, isWeighted ? edgeTableHead(hasProducts) : null, rows),
    isCut ? note(`The ${LISTED_EDGES} largest.`) : null,
  ];
}

function edgeTableHead(hasProducts) {
  const cells = ["", "", "weight"];
  if (hasProducts) cells.push(...(sidesOfPair() === 1 ? ["× value"] : ["× left", "× right"]));
  return make(
    "tr",
    {},
    cells.map((text) => make("th", {}, text)),
  );
}

/** What the columns with products mean. */
function productNote(vertex) {
  const found = [...vertex.in, ...vertex.out].filter((link) => link.kind === "edge");
  if (!prompts.length || !found.length) return null;
  const at = prompts[state.pair].map((side, s) => tokenElement(side.tokens[chosenToken(s)]));
  const throughHead = found.some((link) => link.source.node.location === "attn_v");
  return note(
    `× ${sidesOfPair() === 1 ? "value" : "left, × right"}: weight × value of the source at the `,
    `chosen token of pair ${state.pair + 1} (`,
    at.flatMap((token, s) => (s ? [", ", token] : [token])),
    ")",
    throughHead ? "; of value channels, their mean over the tokens attended to." : ".",
  );
}

/** Weight × activation of a link at the chosen token of one prompt; null where it is not known. */
function productOf(link, s) {
  const side = prompts[state.pair][s];
  const { source, target } = link;
  const at = chosenToken(s);
  const levels = side.values[source.i];
  if (source.node.location !== "attn_v" || target.terminal) {
    return link.weight * activationOf(source.node, levels[at]);
  }
  const pattern = side.patterns[`${source.node.layer}.${source.node.head}`];
  if (!pattern || sharesItsValues(source)) return null;
  const moved = d3.sum(pattern[at], (share, key) => (share / 100) * levels[key]);
  return link.weight * activationOf(source.node, moved);
}

/** Whether several heads share a value channel, which then has several edges to one node. */
function sharesItsValues(vertex) {
  const targets = vertex.out.filter((link) => link.kind === "edge").map((link) => link.target);
  return new Set(targets).size < targets.length;
}

// ------------------------------------------------------------------------------- tokens, texts

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
  return [heading("Activations in the corpus"), plot.node(), note(scale)];
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
    return [
      heading(`Task prompts where it is most ${sign > 0 ? "positive" : "negative"}`),
      passages,
    ];
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
    { class: "passage", title: `Show pair ${p + 1}`, onclick: () => choosePair(p) },
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
  const title = `Attention of head ${node.head} on pair ${state.pair + 1}`;
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
