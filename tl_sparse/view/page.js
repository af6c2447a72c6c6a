"use strict";
// Everything shown comes from one JSON element. Its texts are untrusted: they only ever become text nodes.
const data = JSON.parse(document.getElementById("data").textContent);
const { nodes, edges, summary, ends, prompts, ladder, caps } = data;
const $ = (id) => document.getElementById(id);

function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (key.startsWith("--")) element.style.setProperty(key, value);
    else if (value !== false && value != null) element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.flat(9).filter((child) => child != null));
  return element;
}
const fill = (id, ...children) => $(id).replaceChildren(...children.flat(9).filter((child) => child != null));
const digits = (x) => (Number.isInteger(x) || Math.abs(x) >= 100 ? Math.round(x).toLocaleString("en") : Math.abs(x) >= 1e-3 ? x.toPrecision(3) : x.toExponential(1));
const number = (x) => (typeof x !== "number" ? "–" : digits(x).replace(/-/g, "−"));
const signed = (x) => (x > 0 ? "+" : "") + number(x);
const fixed = (x) => (typeof x === "number" ? x.toFixed(3) : "–");
const percent = (x) => (typeof x !== "number" ? "" : `${(100 * x).toFixed(1)}\u202f%`);
const count = (n, word) => `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;
const color = (x) => `var(--${x < 0 ? "neg" : "pos"})`;
const cost = (node) => (node.cut_loss == null || data.loss == null ? 0 : Math.max(0, node.cut_loss - data.loss));

// ---------------------------------------------------------------- text of tokens
// Control characters become their pictures; every token is isolated, so that no direction mark reaches its neighbours.
const visible = (text) => text.replace(/[\u0000-\u0008\u000b-\u001f]/g, (c) => String.fromCharCode(0x2400 + c.charCodeAt(0))).replace(/\u007f/g, "␡");
const inText = (id) => visible(data.vocab[id]).replace(/\n/g, "⏎\n").replace(/\t/g, "⇥\t") || "∅";
const inLine = (id) => visible(data.vocab[id]).replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/ /g, "·") || "∅";
const shade = (level) => ({ "--p": color(level), "--share": `${Math.round((80 * Math.abs(level)) / caps.levels)}%` });
const value = (node, level) => (level * node.scale) / caps.levels;
function tokens(ids, levels, node, extra = () => ({})) {
  return ids.map((id, i) => {
    const title = node ? `${node.name} ${number(value(node, levels[i]))}` : null;
    const { class: more, ...rest } = extra(i);
    return h("span", { class: `token ${more || ""}`, title, ...(node ? shade(levels[i]) : {}), ...rest }, inText(id));
  });
}

// ---------------------------------------------------------------- graph: what is joined to what
// Vertices are the nodes, then the task's tokens, then the candidates. Links that are no weights of the circuit: `join`
// (a write and a later read of its channel), `end` (embedding, unembedding) and `pattern` (q and k move what v carries).
const vertices = nodes.map((node, i) => ({ i, node, name: node.name, text: String(node.index), row: `${node.layer}.${node.head != null ? "qkv" : node.location}` }));
const terminal = (ids, row) => ids.map((id) => ({ i: vertices.length, name: inLine(id), text: inLine(id), row, terminal: true })).map((v) => (vertices.push(v), v));
const tokenEnds = [], candidateEnds = [];
for (const id of ends.tokens) tokenEnds.push(...terminal([id], "embedding"));
for (const id of ends.candidates) candidateEnds.push(...terminal([id], "logits"));
const links = edges.map(([s, t, weight]) => ({ kind: "edge", s: vertices[s], t: vertices[t], weight }));
for (const [t, i, weight] of ends.embed) links.push({ kind: "end", s: tokenEnds[t], t: vertices[i], weight });
for (const [i, c, weight] of ends.unembed) links.push({ kind: "end", s: vertices[i], t: candidateEnds[c], weight });
const lanes = d3.group(vertices.filter((v) => v.node?.channel != null), (v) => v.node.channel);
for (const lane of lanes.values())
  for (const write of lane.filter((v) => v.node.location.endsWith("_out")))
    for (const read of lane) if (read.i > write.i && read.node.location.endsWith("_in")) links.push({ kind: "join", s: write, t: read });
for (const head of d3.group(vertices.filter((v) => v.node?.head != null), (v) => `${v.node.layer}.${v.node.head}`).values())
  for (const v of head.filter((v) => v.node.location === "attn_v"))
    for (const other of head) if (other.node.location !== "attn_v") links.push({ kind: "pattern", s: other, t: v });
for (const v of vertices) { v.in = []; v.out = []; }
for (const link of links) { link.s.out.push(link); link.t.in.push(link); }
const strongest = d3.max(edges, (e) => Math.abs(e[2])) || 1, costliest = d3.max(nodes, cost) || 1;

// ---------------------------------------------------------------- layout: rows from bottom to top, channels as lanes
const LEVELS = [["embed_out", "writes"], ["attn_in", "reads"], ["qkv", "q, k, v"], ["attn_out", "writes"], ["mlp_in", "reads"], ["mlp_neuron", "neurons"], ["mlp_out", "writes"]];
const byRow = d3.group(vertices, (v) => v.row), rows = [];
const addRow = (key, label, block) => byRow.has(key) && rows.push({ key, label, block, members: byRow.get(key) });
addRow("embedding", "tokens", "Embedding");
for (let layer = 0; layer < summary.layers; layer++)
  LEVELS.forEach(([location, label], i) => addRow(`${layer}.${location}`, label, i ? `Layer ${layer} ${i < 4 ? "attention" : "MLP"}` : "Embedding"));
addRow("logits", "candidates", "Unembedding");
let height = 0;
rows.forEach((row, i) => { row.y = height -= i && rows[i - 1].block === row.block ? 78 : 62; });
const gap = Math.max(16, Math.min(34, 1100 / lanes.size)), step = 30;
const rowOf = new Map(rows.map((row) => [row.key, row]));
for (const v of vertices) { v.y = rowOf.get(v.row).y; v.order = v.node?.channel != null ? 0 : v.i; }

/** Places groups of vertices side by side, each as near to the mean place of what it is joined to as its neighbours allow. */
function pack(groups) {
  for (const g of groups) g.want = d3.mean(g.members.flatMap((v) => [...v.in, ...v.out].filter((l) => l.kind !== "pattern").map((l) => (l.s === v ? l.t : l.s).x))) ?? 0;
  groups.sort((a, b) => a.want - b.want || a.members[0].i - b.members[0].i);
  let right = -Infinity;
  for (const g of groups) { g.x = Math.max(g.want, right + g.width / 2); right = g.x + g.width / 2; }
  const shift = d3.mean(groups, (g) => g.want - g.x) || 0;
  for (const g of groups) g.members.forEach((v, i) => { v.x = g.x + shift + (i - (g.members.length - 1) / 2) * step; });
}
let order = [...lanes.keys()];
for (let round = 0; round < 14; round++) {  // barycentres, from a fixed start: the same picture every time
  order.forEach((channel, i) => { for (const v of lanes.get(channel)) v.x = i * gap; });
  for (const row of rows.filter((r) => !/_in$|_out$/.test(r.key))) {
    const by = d3.group(row.members, (v) => v.node?.head ?? `${v.row}${v.i}`);
    const wide = row.key === "logits" || row.key === "embedding" ? 84 : step;
    row.heads = [...by].map(([head, members]) => ({ head, members, width: members.length * wide + (row.key.endsWith("qkv") ? 22 : 0) }));
    pack(row.heads);
  }
  const pull = new Map(order.map((c, i) => [c, d3.mean(lanes.get(c).flatMap((v) => [...v.in, ...v.out]).filter((l) => l.kind === "edge"), (l) => (l.s.node.channel != null ? l.t : l.s).x) ?? i * gap]));
  if (round < 13) order = d3.sort(order, (a, b) => pull.get(a) - pull.get(b));
}

// ---------------------------------------------------------------- drawing
const svg = d3.select("#graph"), world = svg.append("g"), gutter = svg.append("g").attr("class", "gutter");
const [left, right] = d3.extent(vertices, (v) => v.x), stretch = Math.max(1, Math.min(3, (0.6 * (right - left)) / -height));
for (const row of rows) for (const v of [row, ...row.members]) v.y *= stretch;  // a wide graph is a tall one, too
for (const [block, members] of d3.group(rows, (r) => r.block))
  world.append("rect").attr("class", "band").attr("rx", 8).attr("x", left - 40).attr("width", right - left + 80).attr("y", members.at(-1).y - 26).attr("height", members[0].y - members.at(-1).y + 52).attr("data-block", block);
for (const [channel, lane] of lanes)
  if (channel[0] !== "p") world.append("path").attr("class", "lane").attr("d", `M${lane[0].x},${rows[0].y + 26}V${rows.at(-1).y - 26}`);
const curve = (a, b) => `M${a.x},${a.y}C${a.x},${(a.y + b.y) / 2} ${b.x},${(a.y + b.y) / 2} ${b.x},${b.y}`;
function path({ kind, s, t }) {
  const lane = (v) => lanes.get(v.node.channel);
  if (kind === "edge" || kind === "join") return curve(s, t);
  if (s.terminal) return `${curve(s, { x: t.x, y: d3.max(lane(t), (v) => v.y) })}L${t.x},${t.y}`;  // along the lane
  const top = { x: s.x, y: d3.min(lane(s), (v) => v.y) };
  return `M${s.x},${s.y}L${top.x},${top.y}${curve(top, t).replace(/^M[^C]*/, "")}`;
}
for (const head of rows.flatMap((row) => (row.key.endsWith("qkv") ? row.heads : []))) {
  const xs = d3.extent(head.members, (v) => v.x), y = head.members[0].y;
  head.label = [`head ${head.head}`, xs[0] - 14, y - 24];
  world.append("rect").attr("class", "headbox").attr("rx", 7).attr("x", xs[0] - 18).attr("width", xs[1] - xs[0] + 36).attr("y", y - 20).attr("height", 46);
}
const drawnLinks = d3.sort(links.filter((l) => l.kind !== "pattern"), (l) => (l.kind === "edge" ? Math.abs(l.weight) : -1));
const linkPaths = world.append("g").style("--lit", edges.length > 400 ? 0.16 : 0.55).selectAll("path").data(drawnLinks).join("path")
  .attr("class", (l) => (l.weight < 0 ? `${l.kind} minus` : l.kind)).attr("d", path)
  .attr("stroke-width", (l) => (l.kind === "edge" ? 0.7 + (4.3 * Math.abs(l.weight)) / strongest : null));
linkPaths.on("pointerenter", function (event, l) {  // 5,000 titles would be half of the page's elements
  if (!this.firstChild) d3.select(this).append("title").text(`${l.s.name} → ${l.t.name}${l.kind === "join" ? "" : `  ${signed(l.weight)}`}`);
});
world.append("g").selectAll("text").data(rows.flatMap((row) => row.heads ?? []).filter((head) => head.label)).join("text")
  .attr("x", ({ label }) => label[1]).attr("y", ({ label }) => label[2]).text(({ label }) => label[0]);
const marks = world.append("g").selectAll("g").data(vertices).join("g")
  .attr("class", (v) => (v.terminal ? "node terminal" : "node")).attr("transform", (v) => `translate(${v.x},${v.y})`)
  .attr("data-name", (v) => v.name).attr("role", "button").attr("aria-label", (v) => v.node?.name ?? v.name)
  .on("click", (event, v) => { event.stopPropagation(); pin(v === state.pinned ? null : v); })
  .on("pointerenter", (event, v) => { state.hover = v; light(); }).on("pointerleave", () => { state.hover = null; light(); });
marks.each(function (v) {
  const g = d3.select(this), r = v.terminal ? 11 : 5 + 5 * Math.sqrt(cost(v.node) / costliest);
  if (v.terminal) g.append("rect").attr("x", -36).attr("y", -r).attr("width", 72).attr("height", 2 * r).attr("rx", 5);
  else {
    g.append("circle").attr("r", r);
    for (const side of [0, 1]) g.append("path").attr("class", "half").attr("data-side", side).attr("d", `M0,${0.7 - r}A${r - 0.7},${r - 0.7} 0 0 ${side} 0,${r - 0.7}Z`);
  }
  const letter = v.node?.head != null ? v.node.location.at(-1) : v.node?.channel?.[0] === "p" ? "p" : "";
  const within = v.node?.head != null ? v.node.name.split(".").at(-1) : String(v.node?.channel ?? v.text).replace(/^p/, "");
  g.append("text").attr("y", v.terminal ? 4 : r + 11).text(v.terminal ? (v.text.length > 10 ? `${v.text.slice(0, 9)}…` : v.text) : letter + within);
  g.append("title").text(v.node?.name ?? v.name);
});
for (const row of rows) {
  row.label = gutter.append("g");
  const first = rows.find((r) => r.block === row.block) === row;
  row.label.append("rect").attr("x", 0).attr("y", -8).attr("width", 118).attr("height", first ? 30 : 16);
  row.label.append("text").attr("x", 14).attr("y", 4).text(row.members[0].terminal ? row.key : { reads: "reads", writes: "writes", neurons: "neurons" }[rowLabel(row)] ?? "q, k, v");
  if (first && !row.members[0].terminal) row.label.append("text").attr("class", "layer").attr("x", 14).attr("y", 18).text(row.block);
}
function rowLabel(row) { return LEVELS.find(([location]) => row.key.endsWith(location))[1]; }

const zoom = d3.zoom().scaleExtent([0.05, 6]).on("zoom", ({ transform }) => {
  world.attr("transform", transform);
  svg.classed("far", Math.min(gap, step) * transform.k < 15).classed("tight", 62 * stretch * transform.k < 38);
  for (const row of rows) row.label.attr("transform", `translate(0,${transform.applyY(row.y)})`);
});
svg.call(zoom).on("dblclick.zoom", null).on("click", () => pin(null));
function fit() {
  const { width, height: tall } = $("graph").getBoundingClientRect();
  const [w, high] = [right - left + 90, rows[0].y - rows.at(-1).y + 90], k = Math.min((width - 140) / w, tall / high, 1.5);
  svg.call(zoom.transform, d3.zoomIdentity.translate(130 + (width - 140) / 2 - (k * (left + right)) / 2, tall / 2 - (k * (rows[0].y + rows.at(-1).y)) / 2).scale(k));
}
function reveal(v) {
  const { width, height: tall } = $("graph").getBoundingClientRect(), [x, y] = d3.zoomTransform(svg.node()).apply([v.x, v.y]);
  if (x < 130 || x > width - 20 || y < 20 || y > tall - 20) svg.call(zoom.translateTo, v.x, v.y);
}

// ---------------------------------------------------------------- state, and what follows from it
const state = { pinned: null, hover: null, pair: 0, back: 0, size: null, weight: 0, effect: 0, found: [] };
const sizeOf = () => (state.size == null ? Infinity : ladder[state.size][0]);
const present = (v) => v.terminal || ((sizeOf() >= nodes.length || v.node.rank < sizeOf()) && cost(v.node) >= state.effect);
const isDrawn = (l) => present(l.s) && present(l.t) && (l.kind !== "edge" || Math.abs(l.weight) >= state.weight);

function walk(start, side, end) {
  const seen = new Set([start]), passed = new Set(), queue = [start];
  for (const v of queue) for (const link of v[side]) if (isDrawn(link)) {
    passed.add(link);
    if (!seen.has(link[end])) { seen.add(link[end]); queue.push(link[end]); }
  }
  return [seen, passed];
}
function light() {
  const self = state.hover ?? state.pinned;
  svg.classed("dimmed", self != null);
  if (!self) { linkPaths.classed("lit", false).classed("near", false); marks.classed("lit", false).classed("near", false).classed("self", false); return; }
  const [above, up] = walk(self, "out", "t"), [below, down] = walk(self, "in", "s");
  const near = new Set([...self.in, ...self.out]), beside = new Set([...near].filter(isDrawn).flatMap((l) => [l.s, l.t]));
  linkPaths.classed("lit", (l) => up.has(l) || down.has(l)).classed("near", (l) => near.has(l));
  marks.classed("lit", (v) => above.has(v) || below.has(v)).classed("near", (v) => beside.has(v)).classed("self", (v) => v === self);
}
function filter() {
  linkPaths.classed("off", (l) => !isDrawn(l));
  marks.classed("off", (v) => !present(v));
  const drawn = links.filter((l) => l.kind === "edge" && isDrawn(l)).length, left = vertices.filter((v) => v.node && present(v)).length;
  $("shown").textContent = `${left} of ${count(nodes.length, "node")}, ${drawn.toLocaleString("en")} of ${count(edges.length, "edge")}`;
  $("weight-value").textContent = number(state.weight);
  $("effect-value").textContent = number(state.effect);
  light();
}
function pin(v) {
  state.pinned = v?.terminal ? null : v;
  state.hover = null;
  light();
  if (state.pinned) reveal(state.pinned);
  showPanel();
  showPrompts();
}
const goTo = (v, ...text) => h("button", { class: "link", onclick: () => pin(v) }, ...text);
function bars(items, shown, top = d3.max(items, ([, x]) => Math.abs(x)) || 1) {
  const lines = items.map(([label, x]) => h("tr", {}, h("td", {}, label), h("td", { class: "meter" }, x == null ? null : h("span", { class: "bar", "--p": color(x), "--width": `${(100 * Math.abs(x)) / top}%` })), h("td", { class: "number" }, x == null ? "" : shown(x))));
  return h("table", { class: "rows" }, ...lines);
}

// ---------------------------------------------------------------- panel of a node
function showPanel() {
  $("panel").scrollTop = 0;
  if (!state.pinned) return showOverview();
  const v = state.pinned, { node } = v, byWeight = (a, b) => Math.abs(b.weight ?? 0) - Math.abs(a.weight ?? 0);
  const list = (side, end, title, kind, shown) => {
    const found = v[side].filter((l) => l.kind === kind).sort(byWeight), most = found.slice(0, 60);
    const label = (other) => (other.terminal ? h("span", { class: "mono token" }, other.name) : goTo(other, other.name));
    return found.length ? [h("h3", {}, `${title} · ${found.length}`), bars(most.map((l) => [label(l[end]), l.weight]), shown), found.length > 60 ? h("p", { class: "note" }, "the 60 largest") : null] : [];
  };
  fill("panel",
    h("h2", {}, node.name), h("p", { class: "aka" }, node.openai, " in OpenAI’s notation"), h("p", {}, `Layer ${node.layer}, ${node.kind}` + (node.head != null ? `: head ${node.head}, channel ${node.name.split(".").at(-1)}` : "")),
    h("dl", { class: "facts" },
      h("div", {}, h("dt", {}, "mean"), h("dd", {}, number(node.mean))),
      h("div", {}, h("dt", {}, "loss when cut"), h("dd", { id: "cut-loss" }, number(node.cut_loss))),
      h("div", {}, h("dt", {}, "difference"), h("dd", {}, node.cut_loss == null ? "–" : signed(node.cut_loss - data.loss)))),
    list("in", "s", "Incoming edges", "edge", signed), list("out", "t", "Outgoing edges", "edge", signed),
    list("in", "s", "Written on this channel by", "join", signed), list("out", "t", "Read on this channel by", "join", signed),
    (node.tokens ?? []).flatMap((found, i) => !found.length ? [] : [
      h("h3", {}, node.location.endsWith("_out") ? `Logits it ${["raises", "lowers"][i]}` : `Tokens that embed ${["positively", "negatively"][i]} here`),
      h("div", { class: "chips" }, found.map(([id, w]) => h("span", { class: "chip", "--p": color(w) }, h("span", { class: "token" }, inLine(id)), h("small", {}, signed(w)))))]),
    histogram(node), patternsOf(node), promptsOf(v.i, node),
    ["positive", "negative"].flatMap((sign, i) => !node.passages[i].length ? [] : [h("h3", {}, `Corpus where it is most ${sign}`),
      node.passages[i].map(([ids, levels, peak]) => h("p", { class: "passage" }, tokens(ids, levels, node, (j) => (j === peak ? { class: "peak", "--p": color(levels[j]) } : {}))))]),
    caps.corpus_tokens ? null : h("p", { class: "note" }, "No corpus was given, so there are no passages and no histogram."));
}
function showOverview() {
  const ranked = [...vertices.filter((v) => v.node)].sort((a, b) => cost(b.node) - cost(a.node)).slice(0, 14);
  fill("panel", h("h2", {}, "Nodes that matter most"),
    h("p", { class: "note" }, data.loss == null ? `Click a node. ${prompts.length ? "" : "Without a task, there are no prompts, and no loss to measure a node by."}` : `What the task loss rises by when a node alone is cut from the circuit. Click one; its paths light up.`),
    h("h3", {}, data.loss == null ? "Nodes" : "Cut alone"), bars(ranked.map((v) => [goTo(v, v.name), data.loss == null ? null : v.node.cut_loss - data.loss]), signed),
    h("p", { class: "note", style: "margin-top:18px" }, "Arrow keys walk along edges, / finds a node, ? explains the rest."));
}
function histogram(node) {
  if (!node.histogram) return [];
  const { low, high, counts } = node.histogram, W = 340, y = d3.scaleLog([0.8, d3.max(counts)], [0, 56]);
  const x = d3.scaleLinear([low, high > low ? high : low + 1], [0, W]), s = d3.create("svg").attr("class", "histogram").attr("viewBox", `0 0 ${W} 74`);
  s.selectAll("rect").data(counts).join("rect").attr("x", (_, i) => (i * W) / counts.length + 0.5).attr("width", W / counts.length - 1).attr("y", (c) => 58 - (c ? y(c) : 0)).attr("height", (c) => (c ? y(c) : 0));
  if (node.mean != null) s.append("line").attr("x1", x(node.mean)).attr("x2", x(node.mean)).attr("y1", 0).attr("y2", 58);
  s.append("text").attr("y", 71).text(number(low));
  s.append("text").attr("y", 71).attr("x", W).attr("text-anchor", "end").text(number(high));
  return [h("h3", {}, "Activations in the corpus"), s.node(), h("p", { class: "note" }, "Counts are logarithmic; the line is the mean.")];
}
function promptsOf(i, node) {
  const found = prompts.flatMap((pair, p) => pair.map((side) => ({ p, side })));
  return ["positive", "negative"].flatMap((sign, k) => {
    const best = d3.sort(found.map((f) => ({ ...f, at: k ? d3.minIndex(f.side.values[i]) : d3.maxIndex(f.side.values[i]) })), (f) => (k ? 1 : -1) * f.side.values[i][f.at]).filter((f) => (k ? -1 : 1) * f.side.values[i][f.at] > 0)
      .filter((f, at, all) => all.findIndex((other) => other.p === f.p) === at).slice(0, 3);  // one side of a pair
    return !best.length ? [] : [h("h3", {}, `Task prompts where it is most ${sign}`), best.map(({ p, side, at }) => {
      const from = Math.max(0, at - 20), cut = (list) => list.slice(from, at + 8);
      return h("button", { class: "passage", title: `Show pair ${p + 1}`, onclick: () => { state.pair = p; showPrompts(); } }, tokens(cut(side.tokens), cut(side.values[i]), node, (j) => (j === at - from ? { class: "peak", "--p": color(side.values[i][at]) } : {})));
    })];
  });
}
function patternsOf(node) {
  const name = `${node.layer}.${node.head}`, pair = prompts[state.pair];
  if (node.head == null || !pair) return [];
  const note = h("p", { class: "note", id: "attention" }, "Rows attend to columns. Point at a cell.");
  const canvases = pair.map((side) => {
    const rows = side.patterns[name], n = rows.length, canvas = h("canvas", { width: n, height: n, role: "img", "aria-label": "Attention pattern" }), ink = canvas.getContext("2d");
    ink.fillStyle = getComputedStyle(document.querySelector(".swatch.pos")).borderTopColor;
    rows.forEach((row, q) => row.forEach((share, k) => { ink.globalAlpha = Math.sqrt(share / 100); ink.fillRect(k, q, 1, 1); }));
    canvas.addEventListener("pointermove", (event) => {
      const box = canvas.getBoundingClientRect(), q = Math.floor(((event.clientY - box.top) / box.height) * n), k = Math.floor(((event.clientX - box.left) / box.width) * n);
      if (rows[q]?.[k] != null) note.replaceChildren(h("span", { class: "token" }, inLine(side.tokens[q])), ` (${q}) attends to `, h("span", { class: "token" }, inLine(side.tokens[k])), ` (${k}): ${rows[q][k]} %`);
    });
    return canvas;
  });
  return [h("h3", {}, `Attention of head ${node.head} on pair ${state.pair + 1}`), h("div", { class: "patterns" }, canvases), note];
}

// ---------------------------------------------------------------- prompts
function showPrompts() {
  const pair = prompts[state.pair];
  if (!pair) return;
  const node = state.pinned?.node, i = state.pinned?.i, shortest = d3.min(pair, (side) => side.tokens.length);
  state.back = Math.min(state.back, shortest - 1);
  const here = pair.map((side) => side.tokens.length - 1 - state.back);  // positions are counted from the end
  $("pair").textContent = `pair ${state.pair + 1} of ${prompts.length}`;
  $("prompt-note").replaceChildren(...(node ? ["Shaded by ", h("span", { class: "mono" }, node.name), ". "] : ["Pin a node to shade the tokens by it. "]), `Click a token to see the values there. Run under ${caps.sees}.`);
  fill("sides", pair.map((side, s) => {
    const other = pair[1 - s].tokens, levels = node ? side.values[i] : [];
    const odds = (logits) => 1 / (1 + Math.exp(logits[1 - side.right] - logits[side.right]));
    const [full, alone] = side.logits, answer = h("span", { class: "token mono" }, inLine(side.answer));
    return h("div", {}, h("div", { class: "prompt", "data-side": s }, tokens(side.tokens, levels, node, (t) => ({
      class: `${t === here[s] ? "here" : ""} ${other[other.length - side.tokens.length + t] !== side.tokens[t] ? "differs" : ""}`,
      onclick: () => { state.back = Math.min(side.tokens.length - 1 - t, shortest - 1); showPrompts(); } }))),
    h("p", { class: "verdict" }, "→ ", answer, alone ? ` circuit ${percent(odds(alone))} · ` : " ", `full model ${percent(odds(full))}`));
  }));
  const level = (k, s) => pair[s].values[k][here[s]], far = (k) => Math.abs(level(k, 0) - level(k, 1)) * nodes[k].scale;
  for (const s of [0, 1]) marks.selectAll(`.half[data-side="${s}"]`).each(function () {
    const v = d3.select(this.parentNode).datum(), tint = $("values").checked ? shade(level(v.i, s)) : { "--share": "0%" };
    for (const [key, x] of Object.entries(tint)) this.style.setProperty(key, x);
  });
  const order = d3.sort(d3.range(nodes.length).filter(far), (k) => -far(k)).slice(0, 12), meter = (k, s) => h("span", { class: "bar", "--p": color(level(k, s)), "--width": `${(100 * Math.abs(level(k, s))) / caps.levels}%` });
  fill("flow", h("h3", {}, "Values at the chosen token, those that differ most between the prompts"), h("table", { class: "rows" }, order.map((k) =>
    h("tr", {}, h("td", {}, goTo(vertices[k], nodes[k].name)), [0, 1].map((s) => [h("td", { class: "number" }, number(value(nodes[k], level(k, s)))), h("td", { class: "meter", style: "width:24%" }, meter(k, s))])))));
}
function turn(by) {
  if (!prompts.length) return;
  state.pair = (state.pair + by + prompts.length) % prompts.length;
  showPrompts();
  if (state.pinned?.node.head != null) showPanel();
}

// ---------------------------------------------------------------- faithfulness curve
function showCurve() {
  const s = d3.select("#curve"), scores = summary.scores, losses = ladder.map((step) => step[2]), top = d3.max([...losses, scores.ablated?.loss ?? 0, 0.7]) * 1.12;
  const x = d3.scaleLog([ladder[0][0], Math.max(ladder.at(-1)[0], ladder[0][0] + 1)], [36, 322]), y = d3.scaleLinear([0, top], [165, 8]);
  s.selectAll("*").remove();
  for (const t of y.ticks(4)) { s.append("line").attr("x1", 36).attr("x2", 322).attr("y1", y(t)).attr("y2", y(t)); s.append("text").attr("x", 30).attr("y", y(t) + 3).attr("text-anchor", "end").text(t); }
  for (const n of x.ticks(4).filter((n) => /^[125]0*$/.test(n))) s.append("text").attr("x", x(n)).attr("y", 180).attr("text-anchor", "middle").text(n);
  s.append("text").attr("x", 337).attr("y", 180).text("nodes");
  for (const [name, label] of [["full", "full model"], ["ablated", "without the circuit"]]) if (scores[name]) {
    s.append("line").attr("class", "level").attr("x1", 36).attr("x2", 322).attr("y1", y(scores[name].loss)).attr("y2", y(scores[name].loss));
    s.append("text").attr("x", 322).attr("y", y(scores[name].loss) - (name === "ablated" ? 7 : y(scores[name].loss) < 140 ? -11 : 3)).attr("text-anchor", "end").text(label);
  }
  s.append("path").attr("class", "path").attr("d", d3.line((step) => x(step[0]), (step) => y(step[2]))(ladder));
  s.selectAll("circle").data(ladder).join("circle").attr("r", 3).attr("cx", (step) => x(step[0])).attr("cy", (step) => y(step[2]))
    .classed("here", (_, i) => i === (state.size ?? whole)).style("cursor", "pointer").on("click", (event, step) => resize(ladder.indexOf(step)));
  const [n, m, loss, accuracy] = ladder[state.size ?? whole];
  $("size-value").textContent = `${count(n, "node")}, ${count(m, "edge")}: task loss ${number(loss)}, accuracy ${percent(accuracy)}`;
}
const whole = ladder.findIndex((step) => step[0] >= nodes.length) >= 0 ? ladder.findIndex((step) => step[0] >= nodes.length) : ladder.length - 1;
function resize(to) {
  if (!ladder.length) return;
  state.size = Math.max(0, Math.min(ladder.length - 1, to));
  $("size").value = state.size;
  showCurve();
  filter();
}

// ---------------------------------------------------------------- heading, controls, keys
const sentence = `${summary.n_nodes.toLocaleString("en")} of ${count(summary.all_nodes, "node")} and ${count(summary.n_edges, "edge")}` + (summary.description ? `: ${summary.description}` : "").replace(/[^?!.]$/, "$&.");
$("model").textContent = summary.model || "a model";
$("task").textContent = summary.task || "Circuit";
$("lede").textContent = sentence + (summary.min_weight ? ` Drawn are the ${count(edges.length, "edge")} of absolute weight ${number(summary.min_weight)} or more, and the ${count(nodes.length, "node")} they join.` : "");
const scored = [["full", "full model"], ["circuit", "circuit alone"], ["ablated", "without the circuit"]].filter(([name]) => summary.scores[name]);
if (scored.length) fill("scores", h("tr", {}, ["", "task loss", "accuracy"].map((t) => h("th", {}, t))), scored.map(([name, label]) => h("tr", name === "circuit" ? { class: "own" } : {}, h("td", {}, label), h("td", {}, fixed(summary.scores[name].loss)), h("td", {}, percent(summary.scores[name].accuracy)))));
$("command").textContent = summary.command;
$("caps").textContent = `Each node has at most ${caps.passages} passages of either sign, ${caps.window} tokens long, from ` +
  `${caps.corpus_tokens.toLocaleString("en")} tokens of the corpus run through the full model, and ${caps.tokens} tokens of either sign; ${count(prompts.length, "pair")} of prompts, their last ` +
  `${caps.prompt_tokens} tokens; losses after a cut are over ${caps.effect_pairs} pairs; a token shows ${caps.token_chars} characters.`;
const quote = [`Circuit of ${summary.task || "no task"} in ${summary.model}: ${sentence}`, ...scored.map(([name, label]) => `${label}: task loss ${number(summary.scores[name].loss)}, accuracy ${percent(summary.scores[name].accuracy)}`), summary.command].filter(Boolean).join("\n");
const theme = () => document.documentElement.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
function flip() { document.documentElement.dataset.theme = theme() === "dark" ? "light" : "dark"; showPanel(); }
function find(text) {
  const wanted = text.trim().toLowerCase();
  state.found = wanted ? vertices.filter((v) => [v.name, v.node?.openai, v.node?.label].some((name) => name?.toLowerCase().includes(wanted))) : [];
  const set = new Set(state.found);
  marks.classed("match", (v) => set.has(v));
  $("found").textContent = wanted ? String(state.found.length) : "";
}
function arrow(key) {
  const v = state.pinned;
  if (!v) return pin(vertices[0]);
  const side = { ArrowUp: ["out", "t"], ArrowDown: ["in", "s"] }[key];
  if (side) { const next = d3.greatest(v[side[0]].filter((l) => !l[side[1]].terminal && isDrawn(l)), (l) => (l.kind === "edge" ? 1 : 0) + Math.abs(l.weight ?? 0)); return next && pin(next[side[1]]); }
  const row = d3.sort(byRow.get(v.row).filter(present), (u) => u.x), at = row.indexOf(v) + (key === "ArrowRight" ? 1 : -1);
  return row[at] && pin(row[at]);
}
const KEYS = [["/", "find a node; Enter goes to it", () => $("search").focus()], ["↑ ↓", "along the strongest edge"], ["← →", "to the next node of the row"], ["Esc", "unpin", () => pin(null), "Escape"],
  ["n p", "next and previous pair", () => turn(1), "n"], ["[ ]", "smaller and larger circuit", () => resize((state.size ?? whole) - 1), "["], ["+ −", "zoom", () => svg.call(zoom.scaleBy, 1.3), "+"],
  ["0", "show all", fit], ["t", "light or dark", flip], ["?", "this help", () => $("help").showModal()]];
const actions = new Map([...KEYS.map(([key, , act, name]) => [name ?? key, act]), ["p", () => turn(-1)], ["]", () => resize((state.size ?? whole) + 1)], ["-", () => svg.call(zoom.scaleBy, 1 / 1.3)]]);
fill("keys", KEYS.flatMap(([key, text]) => [h("dt", {}, key), h("dd", {}, text)]));
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || $("help").open) return;
  if (event.target.matches("input")) {
    if (event.key === "Enter" && state.found.length) pin(state.found[(state.found.indexOf(state.pinned) + 1) % state.found.length]);
    if (event.key === "Escape") { event.target.blur(); $("search").value = ""; find(""); }
    if (event.target.type !== "checkbox") return;
  }
  const act = event.key.startsWith("Arrow") ? () => arrow(event.key) : actions.get(event.key);
  if (act) { event.preventDefault(); act(); }
});
$("search").addEventListener("input", (event) => find(event.target.value));
const ranked = { weight: d3.sort(edges, (e) => Math.abs(e[2])).map((e) => Math.abs(e[2])), effect: d3.sort(nodes.map(cost)) };
for (const what of ["weight", "effect"])  // by rank: each step of the slider hides as many
  $(what).addEventListener("input", (event) => { state[what] = +event.target.value && ranked[what].length ? ranked[what][Math.min(ranked[what].length - 1, Math.round((event.target.value / 100) * ranked[what].length))] : 0; filter(); });
$("size").addEventListener("input", (event) => resize(+event.target.value));
$("values").addEventListener("change", showPrompts);
for (const [id, act] of [["fit", fit], ["theme", flip], ["previous", () => turn(-1)], ["next", () => turn(1)], ["help-button", () => $("help").showModal()]]) $(id).addEventListener("click", act);
$("copy").addEventListener("click", async () => { try { await navigator.clipboard.writeText(quote); $("copy").textContent = "Copied"; } catch { $("lede").textContent = quote; } });  // to be copied by hand, where the browser forbids it
$("prompt-section").hidden = $("values-label").hidden = $("halves").hidden = !prompts.length;
$("curve-section").hidden = !ladder.length;
$("effect-label").hidden = data.loss == null;
if (ladder.length) {
  $("size").max = ladder.length - 1;
  $("size").value = whole;
  $("curve-note").textContent = `The circuit cut down to its most important nodes, as ranked by ${caps.ranked}. The slider shows each size in the graph.`;
  showCurve();
}
showPanel(); showPrompts(); filter(); fit();
new ResizeObserver(fit).observe($("graph"));
// Milliseconds from the start to the first picture, for the tests.
requestAnimationFrame(() => setTimeout(() => { document.documentElement.dataset.ready = Math.round(performance.now()); }));
