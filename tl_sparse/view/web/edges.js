// In the panel: the links of the pinned node, with weight × activation on the chosen prompts.

const LISTED_EDGES = 60;

/** The links of one kind on one side of a vertex, the strongest first. */
function edgeTable(vertex, side, kind, title) {
  const end = side === "in" ? "source" : "target";
  const found = vertex[side].filter((link) => link.kind === kind);
  if (!found.length) return null;
  found.sort((a, b) => Math.abs(b.weight ?? 0) - Math.abs(a.weight ?? 0));
  const listed = found.slice(0, LISTED_EDGES);
  const isWeighted = kind !== "join";
  const hasProducts =
    isWeighted && prompts.length > 0 && !vertex[side].some((l) => hasNoValue(l.source));
  const largest = d3.max(listed, (link) => Math.abs(link.weight ?? 0));
  const rows = listed.map((link) => {
    const cells = [make("td", {}, nameOfEnd(link[end]))];
    if (isWeighted) {
      cells.push(make("td", { class: "meter" }, bar(link.weight, largest)));
      cells.push(make("td", { class: "number" }, signed(link.weight)));
    }
    if (hasProducts) {
      for (const s of d3.range(sidesOfPair())) {
        cells.push(make("td", { class: "number product" }, signed(productOf(link, s), 2)));
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

/** Whether the end of a link has no value that its weight could multiply. */
function hasNoValue(end) {
  return end.terminal || isComponent(end.node);
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
  const found = edgesOf(vertex).filter((link) => !isComponent(link.source.node));
  if (!prompts.length || !found.length) return null;
  const at = prompts[state.pair].map((side, s) => tokenElement(side.tokens[chosenToken(s)]));
  const throughHead = found.some((link) => link.source.node.location === "attn_v");
  return note(
    `× ${sidesOfPair() === 1 ? "value" : "left, × right"}: weight × value of the source at the `,
    `chosen token of ${pairName(state.pair)} (`,
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
