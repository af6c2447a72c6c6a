// Where the vertices of the graph stand.
//
// The model runs from bottom to top, in rows. Reads and writes stand on the lane of their residual
// channel, a vertical line. Heads, neurons and tokens stand as near as possible to what they are
// joined to. The layout is always computed from the same start, so that the same choices give the
// same picture.

const LOCATIONS = [
  ["embed_out", "writes"],
  ["attn_in", "reads"],
  ["qkv", "q, k, v"],
  ["attn_out", "writes"],
  ["head", "heads"],
  ["mlp_in", "reads"],
  ["mlp_neuron", "neurons"],
  ["mlp_out", "writes"],
  ["mlp", "MLP"],
];
const MARGIN = 28; // the room around the picture
const NEAREST = 9; // the least distance between two nodes of a row
const TERMINAL_WIDTH = 84; // the room of a token
const HEAD_PADDING = 44; // in the box of a head, the room beside its nodes
const ROUNDS = 14; // in which the order of the lanes is improved

/** All rows that there can be, from bottom to top, with the block that each belongs to. */
function allRows() {
  const rows = [{ key: "embedding", label: "tokens", block: "Embedding" }];
  for (let layer = 0; layer < summary.layers; layer++) {
    LOCATIONS.forEach(([location, label], i) => {
      let block = `Layer ${layer} ${i < 5 ? "attention" : "MLP"}`;
      if (location === "embed_out") block = "Embedding";
      rows.push({ key: `${layer}.${location}`, label, block });
    });
  }
  rows.push({ key: "logits", label: "answers", block: "Unembedding" });
  return rows;
}

/** The rows that have members among these vertices. */
function rowsOf(shown) {
  const byRow = d3.group(shown, (v) => v.row);
  const rows = allRows().filter((row) => byRow.has(row.key));
  for (const row of rows) {
    row.members = byRow.get(row.key);
    row.isInStream = /_(in|out)$/.test(row.key);
    row.isTerminal = row.members[0].terminal ?? false;
  }
  return rows;
}

/**
 * Sets x and y of the vertices, for a picture of about this width and height.
 *
 * Returns the rows, the lanes (channel → its vertices), the boxes of heads, the extent from left
 * to right, and the least distance between two nodes of a row.
 */
function arrange(shown, drawn, width, height) {
  const rows = rowsOf(shown);
  const lanes = d3.group(
    shown.filter((v) => v.node?.channel != null),
    (v) => v.node.channel,
  );
  const lane = clamp(width / Math.max(1, lanes.size), NEAREST, 150);
  for (const row of rows) row.step = clamp((0.8 * width) / widthInSteps(row), NEAREST, 56);
  const neighbours = neighboursOf(shown, drawn);
  const groups = rows.filter((row) => !row.isInStream).map(groupsOf);
  placeInLanes(lanes, groups, neighbours, lane);
  const [left, right] = d3.extent(shown, (v) => v.x);
  // What is wider than the panel will be made smaller, so it may be higher, too.
  const shrinking = Math.min(1, width / (right - left || 1));
  placeRows(rows, drawn, height / shrinking);
  const nearest = Math.min(
    lane,
    d3.min(rows, (row) => row.step),
  );
  const heads = groups.flat().filter((group) => group.head != null);
  return { rows, lanes, heads, left, right, nearest };
}

/** How many nodes would fit into a row if nothing but nodes stood in it. */
function widthInSteps(row) {
  if (row.isInStream || row.isTerminal) return 1;
  const heads = new Set(row.members.map((v) => v.node.head ?? -1));
  return row.members.length + (row.key.endsWith("qkv") ? 2 * heads.size : 0);
}

/** Sets y of the vertices. Rows that many edges join are further apart, and so are blocks. */
function placeRows(rows, drawn, height) {
  const nEdges = d3.rollup(
    drawn.filter((link) => link.kind === "edge"),
    (ofRow) => ofRow.length,
    (link) => link.target.row,
  );
  let total = 0;
  rows.forEach((row, i) => {
    if (i) total += Math.min(3, 1 + Math.sqrt(nEdges.get(row.key) ?? 0) / 8);
    if (i && rows[i - 1].block !== row.block) total += 0.2;
    row.y = total;
  });
  const unit = clamp(height / Math.max(1, total), 38, 110);
  for (const row of rows) {
    row.y *= -unit;
    for (const v of row.members) v.y = row.y;
  }
}

/** Vertex → the vertices at the other ends of its links, each with the strength of the link. */
function neighboursOf(shown, drawn) {
  const neighbours = new Map(shown.map((v) => [v, []]));
  for (const link of drawn) {
    if (link.kind === "join" || link.kind === "pattern") continue;
    const strength = 0.05 + relativeStrength(link) * (link.kind === "end" ? 0.3 : 1);
    neighbours.get(link.source)?.push([link.target, strength]);
    neighbours.get(link.target)?.push([link.source, strength]);
  }
  return neighbours;
}

/** The parts of a row that stay together: the nodes of a head, else each vertex by itself. */
function groupsOf(row) {
  const { step } = row;
  const isHeads = row.key.endsWith("qkv");
  const members = d3.group(row.members, (v) => (isHeads ? v.node.head : v.i));
  return [...members.values()].map((ofGroup) => {
    const head = isHeads ? ofGroup[0].node.head : null;
    const letter = (v) => "qkv".indexOf(v.short[0]);
    const sorted = isHeads
      ? d3.sort(ofGroup, (a, b) => letter(a) - letter(b) || a.i - b.i)
      : ofGroup;
    let width = step * sorted.length + (isHeads ? HEAD_PADDING : 0);
    if (row.isTerminal) width = TERMINAL_WIDTH;
    return { row: row.key, head, members: sorted, width, step };
  });
}

/** Sets x of the vertices, with the order of lanes in which the links are shortest. */
function placeInLanes(lanes, groups, neighbours, lane) {
  let order = [...lanes.keys()];
  const inside = [-MARGIN, (order.length - 1) * lane + MARGIN];
  let best = { length: Infinity, order };
  for (let round = 0; round < ROUNDS; round++) {
    place(order);
    const length = totalLength(neighbours);
    if (length < best.length) best = { length, order };
    const wish = new Map(
      order.map((channel, i) => [channel, wishOf(lanes.get(channel), i * lane)]),
    );
    order = d3.sort(order, (a, b) => wish.get(a) - wish.get(b));
  }
  place(best.order);

  function place(channels) {
    channels.forEach((channel, i) => {
      for (const v of lanes.get(channel)) v.x = i * lane;
    });
    for (const ofRow of groups) pack(ofRow, wishOf, inside);
  }

  /** The mean place of what these vertices are joined to. */
  function wishOf(members, otherwise) {
    let sum = 0;
    let total = 0;
    for (const v of members) {
      for (const [other, strength] of neighbours.get(v)) {
        if (other.x == null) continue;
        sum += strength * other.x;
        total += strength;
      }
    }
    return total ? sum / total : otherwise;
  }
}

function totalLength(neighbours) {
  let total = 0;
  for (const [v, others] of neighbours) {
    for (const [other, strength] of others) total += strength * Math.abs(v.x - other.x);
  }
  return total;
}

/**
 * Places groups side by side, each as near to its wish as its neighbours allow: groups that would
 * overlap become one run, whose place is the mean of their wishes.
 */
function pack(groups, wishOf, inside) {
  for (const group of groups) group.wish = wishOf(group.members, group.members[0].x ?? 0);
  const areCandidates = groups[0].row === "logits"; // They stand in the order of the prompts.
  if (!areCandidates) groups.sort((a, b) => a.wish - b.wish || a.members[0].i - b.members[0].i);
  const runs = [];
  for (const group of groups) {
    let run = { groups: [group], width: group.width, left: group.wish - group.width / 2 };
    while (runs.length && runs.at(-1).left + runs.at(-1).width > run.left) {
      run = joinedRun(runs.pop(), run);
    }
    runs.push(run);
  }
  moveInside(runs, inside);
  for (const run of runs) {
    let left = run.left;
    for (const group of run.groups) {
      placeMembers(group, left);
      left += group.width;
    }
  }
}

/** Moves runs between these bounds, if they fit there; else to both sides of them. */
function moveInside(runs, [low, high]) {
  const excess = Math.max(0, d3.sum(runs, (run) => run.width) - (high - low));
  let limit = high + excess / 2;
  for (const run of [...runs].reverse()) {
    run.left = Math.min(run.left, limit - run.width);
    limit = run.left;
  }
  limit = low - excess / 2;
  for (const run of runs) {
    run.left = Math.max(run.left, limit);
    limit = run.left + run.width;
  }
}

function joinedRun(first, second) {
  const [m, n] = [first.groups.length, second.groups.length];
  return {
    groups: [...first.groups, ...second.groups],
    width: first.width + second.width,
    left: (m * first.left + n * (second.left - first.width)) / (m + n),
  };
}

function placeMembers(group, left) {
  group.left = left;
  const isHead = group.head != null;
  const middle = left + group.width / 2 + (isHead ? HEAD_PADDING / 4 : 0);
  group.members.forEach((v, i) => {
    v.x = middle + (i - (group.members.length - 1) / 2) * group.step;
  });
}
