// What the reader has chosen, what of the graph is then left, and the link that restores it.

const LARGE = 400; // A circuit with more edges than this …
const AUTOMATIC_EDGES = 250; // … starts with its strongest ones.
const ALWAYS_LEFT = 12; // This many nodes, those of the largest effect, no threshold takes away.

/**
 * pinned, hover: vertices; pair: the number of the prompt pair; back: the chosen token, counted
 * from the end of the prompt; size: a position in the ladder, or null for the whole circuit;
 * weight, effect: thresholds; found: the vertices that the search has found.
 */
const state = {
  pinned: null,
  hover: null,
  pair: 0,
  back: 0,
  size: null,
  weight: automaticThreshold(),
  effect: 0,
  found: [],
};

const byEffect = d3.sort(
  vertices.filter((v) => v.node),
  (v) => -cost(v.node),
);
const mostImportant = new Set(hasEffects ? byEffect.slice(0, ALWAYS_LEFT) : []);

/** The threshold that leaves AUTOMATIC_EDGES edges of a large circuit; 0 for others. */
function automaticThreshold() {
  if (edges.length <= LARGE) return 0;
  const weights = d3.sort(
    edges.map((edge) => Math.abs(edge[2])),
    (weight) => -weight,
  );
  return weights[AUTOMATIC_EDGES - 1];
}

/** The position in the ladder of the whole circuit, or -1 if the ladder does not have it. */
const wholeSize = ladder.findIndex((step) => step[0] === summary.n_nodes);

/** The position in the ladder of the size that is shown. */
function shownSize() {
  return state.size ?? (wholeSize >= 0 ? wholeSize : ladder.length - 1);
}

/** The number of nodes of the circuit that the reader has cut it down to, at most all. */
function nodesOfSize() {
  return state.size == null ? nodes.length : Math.min(nodes.length, ladder[state.size][0]);
}

/** Whether neither the size nor the effect's threshold leaves a vertex out. */
function isKept(vertex) {
  if (vertex.terminal) return true;
  const inSize = nodesOfSize() >= nodes.length || vertex.node.rank < nodesOfSize();
  return inSize && (state.effect === 0 || cost(vertex.node) >= state.effect);
}

/** Whether a link is left. */
function isDrawn(link) {
  if (!isKept(link.source) || !isKept(link.target)) return false;
  if (link.kind === "edge") return Math.abs(link.weight) >= state.weight;
  if (link.kind === "end") return Math.abs(link.weight) >= endThreshold();
  return true;
}

const sortedWeights = d3.sort(edges.map((edge) => Math.abs(edge[2])));
const sortedEnds = d3.sort([...ends.embed, ...ends.unembed].map((end) => Math.abs(end[2])));

/** The threshold that leaves as large a share of the ends as the weight's leaves of the edges. */
function endThreshold() {
  if (state.weight === 0) return 0;
  const hidden = d3.bisectLeft(sortedWeights, state.weight) / sortedWeights.length;
  return sortedEnds[Math.min(sortedEnds.length - 1, Math.floor(hidden * sortedEnds.length))];
}

/**
 * Whether a vertex is left. A weight's threshold leaves out the nodes that lose all their edges,
 * except the most important ones.
 */
function isLeft(vertex) {
  if (vertex === state.pinned) return true;
  if (!isKept(vertex)) return false;
  if (vertex.terminal || state.weight === 0 || mostImportant.has(vertex)) return true;
  const itsEdges = edgesOf(vertex);
  return !itsEdges.length || itsEdges.some(isDrawn);
}

// ---------------------------------------------------------------------------------- permalinks

/** The name of a node in a link. */
function slug(name) {
  return name.replaceAll(" ", "-");
}

/** The part of a link after the "#" that restores the node, the pair and the size shown. */
function permalink(pinned = state.pinned) {
  const parts = [];
  if (pinned) parts.push(slug(pinned.name));
  if (state.pair) parts.push(`pair=${state.pair + 1}`);
  if (state.size != null) parts.push(`size=${ladder[state.size][0]}`);
  return `#${parts.join("&")}`;
}

/** Writes the permalink into the address; a new node is a new entry of the browser's history. */
function writePermalink(isNewNode = false) {
  if (permalink() === (location.hash || "#")) return;
  try {
    if (isNewNode) history.pushState(null, "", permalink());
    else history.replaceState(null, "", permalink());
  } catch {
    // A notebook's frame has no address of its own.
  }
}

/** Restores what the address says. */
function readPermalink() {
  let text = location.hash.slice(1);
  try {
    text = decodeURIComponent(text);
  } catch {
    // Not encoded, so it is taken as it is.
  }
  const found = { pinned: null, pair: 0, size: null };
  for (const part of text.split("&")) {
    const [, key, value] = /^(pair|size)=(\d+)$/.exec(part) ?? [];
    if (key === "pair") found.pair = clamp(Number(value) - 1, 0, Math.max(0, prompts.length - 1));
    else if (key === "size") found.size = ladder.findIndex((step) => step[0] === Number(value));
    else found.pinned = byEffect.find((v) => slug(v.name) === part || v.node.openai === part);
  }
  state.pinned = found.pinned ?? null;
  state.pair = found.pair;
  state.size = found.size == null || found.size < 0 ? null : found.size;
}
