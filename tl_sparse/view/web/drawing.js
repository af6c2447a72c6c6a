// The picture of the graph.
//
// Positions are in the units of the layout, and zooming scales them. Nodes, texts and lines keep
// their size on the screen, so that zooming in makes room for more names.

const GUTTER = 126; // On the left of a wide picture stand the names of the rows.
const NARROW = 620; // A picture of this width or less has no gutter.

const svg = d3.select("#graph");
const world = svg.append("g").attr("class", "world");
const gutter = svg.append("g").attr("class", "gutter");
const zoom = d3.zoom().scaleExtent([0.1, 12]).on("zoom", showZoomed);
let picture = null; // what is drawn: the layout, its selections and the size of the panel

svg
  .call(zoom)
  .on("dblclick.zoom", null)
  .on("click", () => pin(null));

/** Lays out what is left of the graph, and draws it. */
function drawGraph() {
  const shown = vertices.filter(isLeft);
  const isShown = new Set(shown);
  const drawn = links.filter((link) => {
    return isShown.has(link.source) && isShown.has(link.target) && isDrawn(link);
  });
  const panel = setHeight(rowsOf(shown).length, drawn.length);
  const room = panel.width - panel.gutter - 3 * MARGIN;
  const layout = arrange(shown, drawn, room, panel.height - 3 * MARGIN);
  picture = { ...layout, shown, drawn, panel };
  world.selectChildren().remove();
  gutter.selectChildren().remove();
  drawBackground();
  picture.links = drawLinks();
  drawHeadNames();
  picture.marks = drawMarks();
  drawRowNames();
  fit();
}

/** Sets the height of the graph to what its rows and links need, and returns its size. */
function setHeight(nRows, nLinks) {
  const most = clamp(innerHeight - 190, 420, 860);
  const perRow = nLinks > 80 ? 90 : 60;
  const height = clamp(perRow * nRows, 360, most);
  byId("graph").style.height = `${height}px`;
  const width = byId("graph").getBoundingClientRect().width || 800;
  return { width, height, gutter: width <= NARROW ? 0 : GUTTER };
}

function drawBackground() {
  const { rows, lanes, heads, left, right } = picture;
  for (const [block, members] of d3.group(rows, (row) => row.block)) {
    const [bottom, top] = [members[0].y + 22, members.at(-1).y - 22];
    const band = world.append("rect").attr("class", "band").attr("rx", 8).attr("data-block", block);
    band
      .attr("x", left - 50)
      .attr("width", right - left + 110)
      .attr("y", top);
    band.attr("height", bottom - top);
  }
  for (const lane of lanes.values()) {
    if (isPositional(lane[0].node)) continue;
    const line = `M${lane[0].x},${rows[0].y + 22}V${rows.at(-1).y - 22}`;
    world.append("path").attr("class", "lane").attr("d", line);
  }
  for (const head of heads) {
    const box = world.append("rect").attr("class", "headbox").attr("rx", 7);
    box.attr("x", head.left + 2).attr("width", head.width - 4);
    box.attr("y", head.members[0].y - 15).attr("height", 30);
  }
}

/** The names of heads, above the edges. */
function drawHeadNames() {
  const names = world.append("g").selectAll("g").data(picture.heads).join("g");
  names.attr("class", "fixed headname");
  names.attr("data-x", (head) => head.left + 7).attr("data-y", (head) => head.members[0].y);
  names
    .append("text")
    .attr("y", 4)
    .text((head) => `h${head.head}`);
}

/** A curve that leaves and reaches its ends vertically. */
function curveBetween(a, b) {
  const middle = (a.y + b.y) / 2;
  return `M${a.x},${a.y}C${a.x},${middle} ${b.x},${middle} ${b.x},${b.y}`;
}

/** The line of a link: those to tokens and candidates run along the lane of their node. */
function lineOf({ kind, source, target }) {
  if (kind !== "end") return curveBetween(source, target);
  const laneOf = (v) => picture.lanes.get(v.node.channel);
  if (source.terminal) {
    const foot = { x: target.x, y: d3.max(laneOf(target), (v) => v.y) };
    return `${curveBetween(source, foot)}L${target.x},${target.y}`;
  }
  const top = { x: source.x, y: d3.min(laneOf(source), (v) => v.y) };
  return `${curveBetween(target, top)}L${source.x},${source.y}`;
}

function strokeWidth(link) {
  const thinner = clamp(120 / picture.drawn.length, 0.4, 1);
  if (link.kind === "edge") return 0.7 + 4.3 * thinner * relativeStrength(link);
  if (link.kind === "end") return 0.8 + 1.7 * relativeStrength(link);
  return 1.2;
}

/** How opaque a link is while no node is pinned: the strongest most. */
function restingOpacity(link) {
  if (link.kind === "join") return 1;
  if (link.kind === "end") return 0.35 + 0.3 * relativeStrength(link);
  const faintest = clamp(100 / picture.drawn.length, 0.06, 0.3);
  return faintest + (0.9 - faintest) * Math.sqrt(relativeStrength(link));
}

/** Draws the links, the strongest above the others. */
function drawLinks() {
  const kinds = ["join", "end", "edge"];
  const visible = picture.drawn.filter((link) => link.kind !== "pattern");
  visible.sort((a, b) => {
    return (
      kinds.indexOf(a.kind) - kinds.indexOf(b.kind) || relativeStrength(a) - relativeStrength(b)
    );
  });
  // Thousands of dashed lines are slow, and not told apart.
  svg.classed("many", visible.length > 1000);
  const paths = world
    .append("g")
    .attr("class", "links")
    .selectAll("path")
    .data(visible)
    .join("path");
  paths.attr("class", (link) => (link.weight < 0 ? `${link.kind} minus` : link.kind));
  paths.attr("d", lineOf).attr("stroke-width", strokeWidth).attr("stroke-opacity", restingOpacity);
  // Thousands of titles would be half of the page's elements, so each is made when it is needed.
  paths.on("pointerenter", function addTitle(event, link) {
    if (this.firstChild) return;
    const weight = link.kind === "join" ? "" : `  ${signed(link.weight)}`;
    d3.select(this).append("title").text(`${link.source.name} → ${link.target.name}${weight}`);
  });
  return paths;
}

function radiusOf(vertex) {
  if (vertex.terminal) return 11;
  return 5 + 5 * Math.sqrt(cost(vertex.node) / costliest);
}

function drawMarks() {
  const marks = world
    .append("g")
    .attr("class", "nodes")
    .selectAll("g")
    .data(picture.shown)
    .join("g");
  marks.attr("class", (v) => (v.terminal ? "node terminal fixed" : "node fixed"));
  marks.attr("data-x", (v) => v.x).attr("data-y", (v) => v.y);
  marks.attr("id", (v) => `v${v.i}`).attr("data-name", (v) => v.name);
  marks.attr("role", (v) => (v.terminal ? "img" : "button"));
  marks.attr("aria-label", (v) => (v.terminal ? v.name : nameWithLabel(v.node)));
  marks.classed("loose", (v) => v.node && !edgesOf(v).length);
  marks.on("click", (event, v) => {
    event.stopPropagation();
    pin(v === state.pinned ? null : v);
  });
  marks.on("pointerenter", (event, v) => hover(v)).on("pointerleave", () => hover(null));
  marks.append("title").text((v) => (v.terminal ? v.name : titleOf(v.node)));
  marks.filter((v) => v.terminal).each(drawTerminal);
  marks.filter((v) => !v.terminal).each(drawNode);
  return marks;
}

function drawTerminal(vertex) {
  const text = vertex.short.length > 10 ? `${vertex.short.slice(0, 9)}…` : vertex.short;
  const width = Math.max(30, 6.7 * text.length + 14);
  const group = d3.select(this);
  group
    .append("rect")
    .attr("x", -width / 2)
    .attr("y", -11)
    .attr("width", width)
    .attr("height", 22);
  group.select("rect").attr("rx", 5);
  group.append("text").attr("class", "inside").attr("y", 4).text(text);
}

/** A circle, with the halves that show the values on the two prompts. */
function drawNode(vertex) {
  const body = d3.select(this).append("g").attr("class", "body");
  const r = radiusOf(vertex);
  const inner = r - 0.7;
  body.append("circle").attr("r", r);
  for (const side of [0, 1]) {
    const half = body.append("path").attr("class", "half").attr("data-side", side);
    half.attr("d", `M0,${-inner}A${inner},${inner} 0 0 ${side} 0,${inner}Z`);
  }
  d3.select(this).append("text").attr("class", "caption");
}

/** Row names on the left; in a narrow picture, the names of blocks above their bands. */
function drawRowNames() {
  const { rows, panel } = picture;
  if (panel.gutter) {
    gutter
      .append("rect")
      .attr("class", "back")
      .attr("width", GUTTER - 8)
      .attr("height", panel.height);
  }
  for (const row of rows) {
    const begins = rows.find((other) => other.block === row.block) === row;
    row.name = gutter.append("g");
    const { name } = row;
    if (panel.gutter) name.append("text").attr("x", 14).attr("y", 4).text(row.label);
    if (!begins || row.isTerminal) continue;
    const block = name
      .append("text")
      .attr("class", "layer")
      .attr("x", panel.gutter ? 14 : 4);
    block.attr("y", panel.gutter ? 19 : 30).text(row.block);
  }
}

/** How large tokens are at this zoom: as always, as long as they keep clear of each other. */
function terminalScale(k) {
  return Math.min(1, (TERMINAL_WIDTH * k) / 64);
}

/** Follows the zoom: moves what keeps its size, and places the captions again. */
function showZoomed({ transform }) {
  world.attr("transform", transform);
  if (!picture) return;
  const { k } = transform;
  const nodeScale = clamp((picture.nearest * k) / 20, 0.45, 1);
  world.selectAll(".fixed").attr("transform", function place() {
    const scale = this.classList.contains("terminal") ? terminalScale(k) / k : 1 / k;
    return `translate(${this.dataset.x},${this.dataset.y})scale(${scale})`;
  });
  world.selectAll(".body").attr("transform", `scale(${nodeScale})`);
  picture.nodeScale = nodeScale;
  for (const row of picture.rows)
    row.name.attr("transform", `translate(0,${transform.applyY(row.y)})`);
  svg.classed("tight", d3.min(d3.pairs(picture.rows), ([a, b]) => a.y - b.y) * k < 30);
  placeCaptions(transform);
}

/** Shows the whole graph. */
function fit() {
  const { rows, left, right, panel } = picture;
  const width = panel.width - panel.gutter;
  const [bottom, top] = [rows[0].y, rows.at(-1).y];
  const scale = Math.min(
    width / (right - left + 116),
    panel.height / (bottom - top + 2 * MARGIN),
    1.5,
  );
  const x = panel.gutter + width / 2 - (scale * (left + right + 10)) / 2;
  const y = panel.height / 2 - (scale * (bottom + top)) / 2;
  svg.call(zoom.transform, d3.zoomIdentity.translate(x, y).scale(scale));
}

/** Moves the picture if a vertex is outside it. */
function reveal(vertex) {
  const { panel } = picture;
  const [x, y] = d3.zoomTransform(svg.node()).apply([vertex.x, vertex.y]);
  const isInside = x > panel.gutter && x < panel.width - 20 && y > 20 && y < panel.height - 20;
  if (!isInside) svg.call(zoom.translateTo, vertex.x, vertex.y);
}
