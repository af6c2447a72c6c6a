// The graph: its vertices, and the links between them.
//
// Vertices are the nodes of the circuit, then the tokens of the task, then its candidates. A link
// is of one of four kinds:
//   edge     a weight between two nodes, or a path between two components;
//   end      a weight of the embedding (token to read) or of the unembedding (write to candidate);
//   join     a write, and a later read of the same residual channel;
//   pattern  a query or key channel, and a value channel of its head: the pattern that the first
//            takes part in moves what the second carries. It is walked along, but not drawn.

const vertices = nodes.map(nodeVertex);
const tokenEnds = ends.tokens.map((id) => addTerminal(id, "embedding"));
const candidateEnds = ends.candidates.map((id) => addTerminal(id, "logits"));
const links = [...edgeLinks(), ...endLinks(), ...joinLinks(), ...patternLinks()];
for (const v of vertices) Object.assign(v, { in: [], out: [] });
for (const link of links) {
  link.source.out.push(link);
  link.target.in.push(link);
}

const strongestEdge = d3.max(edges, (edge) => Math.abs(edge[2])) || 1;
const strongestEnd = d3.max([...ends.embed, ...ends.unembed], (end) => Math.abs(end[2])) || 1;
const hasEffects = nodes.some((node) => node.effect != null);
const costliest = d3.max(nodes, cost) || 1;

/** By how much the task loss rises when the node alone is held at its mean, at least 0. */
function cost(node) {
  return Math.max(0, node.effect ?? 0);
}

function nodeVertex(node, i) {
  const isInHead = node.head != null && !isComponent(node);
  const row = `${node.layer}.${isInHead ? "qkv" : node.location}`;
  return { i, node, name: node.name, short: shortName(node), row };
}

/** Whether a node is the output of a whole head or MLP, whose value is a distance from its mean. */
function isComponent(node) {
  return ["head", "mlp"].includes(node.location);
}

/** The name of a node within its row: "v7" in the box of its head, "p2" for a position channel. */
function shortName(node) {
  if (node.location === "head") return `h${node.index}`;
  if (node.location === "mlp") return "MLP";
  if (node.head != null) return node.location.at(-1) + node.name.split(".").at(-1);
  return String(node.channel ?? node.index);
}

function addTerminal(id, row) {
  const name = tokenInLine(id);
  const vertex = { i: vertices.length, node: null, name, short: name, row, terminal: true, id };
  vertices.push(vertex);
  return vertex;
}

function edgeLinks() {
  return edges.map(([source, target, weight]) => {
    return { kind: "edge", source: vertices[source], target: vertices[target], weight };
  });
}

function endLinks() {
  const embed = ends.embed.map(([token, i, weight]) => {
    return { kind: "end", source: tokenEnds[token], target: vertices[i], weight };
  });
  const unembed = ends.unembed.map(([i, candidate, weight]) => {
    return { kind: "end", source: vertices[i], target: candidateEnds[candidate], weight };
  });
  return [...embed, ...unembed];
}

function joinLinks() {
  const found = [];
  const inStream = vertices.filter((v) => v.node?.channel != null);
  for (const lane of d3.group(inStream, (v) => v.node.channel).values()) {
    const reads = lane.filter((v) => v.node.location.endsWith("_in"));
    for (const source of lane.filter((v) => v.node.location.endsWith("_out"))) {
      for (const target of reads) {
        if (target.i > source.i) found.push({ kind: "join", source, target });
      }
    }
  }
  return found;
}

function patternLinks() {
  const found = [];
  const inHeads = vertices.filter((v) => v.node?.head != null && !isComponent(v.node));
  for (const head of d3.group(inHeads, (v) => `${v.node.layer}.${v.node.head}`).values()) {
    const values = head.filter((v) => v.node.location === "attn_v");
    for (const source of head.filter((v) => v.node.location !== "attn_v")) {
      for (const target of values) found.push({ kind: "pattern", source, target });
    }
  }
  return found;
}

/** How strong a link is among those of its kind, from 0 to 1. */
function relativeStrength(link) {
  if (link.kind === "edge") return Math.abs(link.weight) / strongestEdge;
  if (link.kind === "end") return Math.abs(link.weight) / strongestEnd;
  return 1;
}

function edgesOf(vertex) {
  return [...vertex.in, ...vertex.out].filter((link) => link.kind === "edge");
}

/** The nodes that no weight of the circuit joins to another. */
function verticesWithoutEdges() {
  return vertices.filter((v) => v.node && !edgesOf(v).length);
}

/** Why a node without edges is in the circuit, as a list of sentences. */
function whyWithoutEdges(vertex) {
  const { node } = vertex;
  const reasons = [];
  if (["attn_q", "attn_k"].includes(node.location)) {
    const what = node.location === "attn_q" ? "query" : "key";
    reasons.push(
      `It is read by the attention pattern: head ${node.head} multiplies ${what} channels with ` +
        "each other, which is no weight between two nodes.",
    );
  }
  if (isPositional(node)) {
    reasons.push(`It is ${channelName(node)}, which holds where in the prompt a token stands.`);
  }
  const joins = [...vertex.in, ...vertex.out].filter((link) => link.kind === "join");
  const atEnds = [...vertex.in, ...vertex.out].filter((link) => link.kind === "end");
  if (joins.length || atEnds.length) {
    reasons.push("Only the residual stream joins it to others; see below.");
  }
  if (isComponent(node)) {
    reasons.push("No other component of the circuit reads it, or is read by it.");
  }
  if (!reasons.length) {
    reasons.push("Nothing joins it to another node: no weight, channel or attention pattern.");
  }
  if (hasConstantValue(vertex))
    reasons.push("Its value is the same at every token of the prompts.");
  if (node.effect != null && Math.abs(node.effect) < 0.001) {
    reasons.push(
      "Held at its mean, it changes the task loss by less than 0.001: it has no effect.",
    );
  }
  return reasons;
}

function isPositional(node) {
  return String(node.channel ?? "").startsWith("p");
}

/** The channel of the residual stream that a node reads or writes, in words. */
function channelName(node) {
  if (isPositional(node)) return `position channel ${node.channel.slice(1)}`;
  return `residual channel ${node.channel}`;
}

/** Whether a node has the same value at all tokens of all prompts of the page. */
function hasConstantValue(vertex) {
  const levels = prompts.flat().flatMap((side) => side.values[vertex.i]);
  return levels.length > 0 && levels.every((level) => level === levels[0]);
}
