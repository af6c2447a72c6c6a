// The panel on the right: the pinned node or, without one, the nodes that matter most.

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
  const ofNode = wordsFor(vertex.node);
  const words = ofNode ? make("span", { class: "own-label" }, ` ${ofNode}`) : null;
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
    make("h2", { tabindex: -1 }, hasEffects ? "Nodes that matter most" : "Nodes"),
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
  const folder = summary.source || "circuit";
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
    expressionOf(node),
    nodeFacts(node),
    edgesOf(vertex).length ? null : noEdgesNote(vertex),
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
  if (node.head != null) place += `: head ${node.head}`;
  if (node.head != null && !isComponent(node)) place += `, channel ${node.name.split(".").at(-1)}`;
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
    make("h2", { class: "name", tabindex: -1 }, node.name, " ", link),
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
  picture.marks.select("title").text((v) => (v.terminal ? v.name : titleOf(v.node)));
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
      fact("rank", rank, rankMeaning(node)),
      fact("mean", number(node.mean), "The value at which it is held outside a circuit"),
    ]),
    note(node.effect == null ? null : `Effect: ${effectMeaning()} `, rankMeaning(node)),
  ];
}

function rankMeaning(node) {
  return node.rank == null ? null : `Rank: by ${caps.ranked}.`;
}

function effectMeaning() {
  return `the rise of the task loss when it alone is held at its mean ${effectPairs()}.`;
}

function noEdgesNote(vertex) {
  const reasons = whyWithoutEdges(vertex).join(" ");
  return make("p", { class: "explanation" }, make("strong", {}, "No edges. "), reasons);
}
