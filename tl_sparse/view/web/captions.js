// Where the names of nodes stand in the graph.
//
// They are placed one after another, the most important first, each where it covers no node and no
// other name, and as few edges as possible. Those that find no place are not shown.

const CAPTION_HEIGHT = 13;
const LABEL_LENGTH = 24; // So much of the words for a node is shown in the graph.
const MOST_EDGES = 2; // More edges than this do not run through a caption.
const canvasForText = document.createElement("canvas").getContext("2d");

/** The name of a node in the graph, followed by the words for it. */
function captionOf(vertex) {
  const words = wordsFor(vertex.node);
  return words ? `${vertex.short} ${cut(words, LABEL_LENGTH)}` : vertex.short;
}

/** The places for a caption beside a node, the best first: to its right, left, below and above. */
function placesBeside(x, y, r, width) {
  const [h, gap] = [CAPTION_HEIGHT, 3];
  const place = (left, top, anchor) => ({
    left,
    top,
    right: left + width,
    bottom: top + h,
    anchor,
  });
  return [
    place(x + r + gap, y - h / 2, "start"),
    place(x - r - gap - width, y - h / 2, "end"),
    place(x + r * 0.6, y + r * 0.6, "start"),
    place(x + r * 0.6, y - r * 0.6 - h, "start"),
    place(x - r * 0.6 - width, y + r * 0.6, "end"),
    place(x - r * 0.6 - width, y - r * 0.6 - h, "end"),
    place(x - width / 2, y + r + 1, "middle"),
    place(x - width / 2, y - r - 1 - h, "middle"),
  ];
}

function overlap(a, b) {
  return a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
}

/** Places the captions of all nodes for this zoom. */
function placeCaptions(transform) {
  const { shown, marks, panel, nodeScale } = picture;
  canvasForText.font = getComputedStyle(byId("graph")).getPropertyValue("--caption-font");
  const onScreen = (v) => transform.apply([v.x, v.y]);
  const taken = shown.map((v) => boxOfMark(v, onScreen(v), nodeScale, transform.k));
  for (const head of picture.heads) {
    const [x, y] = transform.apply([head.left + 7, head.members[0].y]);
    taken.push({ left: x, right: x + 18, top: y - 7, bottom: y + 7 });
  }
  const samples = edgeSamples(transform);
  const placed = new Map();
  for (const v of byImportance(shown)) {
    const [x, y] = onScreen(v);
    if (x < panel.gutter || x > panel.width || y < 0 || y > panel.height) continue;
    const width = canvasForText.measureText(captionOf(v)).width + 2;
    const r = radiusOf(v) * nodeScale;
    const free = placesBeside(x, y, r, width).filter((place) => {
      const isInside = place.left > panel.gutter && place.right < panel.width;
      return isInside && !taken.some((box) => overlap(box, place));
    });
    const best = d3.least(free, (place) => edgesWithin(place, samples) + free.indexOf(place) / 10);
    if (!best || (!isWanted(v) && edgesWithin(best, samples) > MOST_EDGES)) continue;
    taken.push(best);
    placed.set(v, { ...best, dx: best.left - x, dy: best.top - y, width });
  }
  marks.select(".caption").each(function show(v) {
    const place = placed.get(v);
    const text = d3.select(this).text(place ? captionOf(v) : "");
    if (!place) return;
    const shift = { start: 0, middle: place.width / 2, end: place.width }[place.anchor];
    text
      .attr("text-anchor", place.anchor)
      .attr("x", place.dx + shift)
      .attr("y", place.dy + 10);
  });
}

function boxOfMark(vertex, [x, y], nodeScale, k) {
  if (vertex.terminal) {
    const half = terminalScale(k) * Math.max(15, 3.4 * Math.min(10, vertex.short.length) + 7);
    return { left: x - half, right: x + half, top: y - 11, bottom: y + 11 };
  }
  const r = radiusOf(vertex) * nodeScale;
  return { left: x - r, right: x + r, top: y - r, bottom: y + r };
}

/** Whether a node has a caption also where many edges run through it. */
function isWanted(vertex) {
  return mostImportant.has(vertex) || vertex === state.pinned || state.found.includes(vertex);
}

/** The nodes in the order in which their captions are placed. */
function byImportance(shown) {
  const beside = new Set();
  if (state.pinned) {
    for (const link of [...state.pinned.in, ...state.pinned.out]) {
      if (isDrawn(link)) beside.add(link.source).add(link.target);
    }
  }
  const urgency = (v) => {
    if (v === state.pinned) return 4;
    if (state.found.includes(v)) return 3;
    if (beside.has(v)) return 2;
    return labelOf(v.node) ? 1 : 0;
  };
  const strength = (v) => d3.sum(edgesOf(v), relativeStrength);
  const named = shown.filter((v) => v.node);
  return d3
    .sort(
      named.map((v) => ({ v, urgency: urgency(v), cost: cost(v.node), strength: strength(v) })),
      (a, b) => b.urgency - a.urgency || b.cost - a.cost || b.strength - a.strength,
    )
    .map(({ v }) => v);
}

/** Points along the edges on the screen, by the height at which they are, for edgesWithin. */
function edgeSamples(transform) {
  const byHeight = new Map();
  for (const link of picture.drawn) {
    if (link.kind !== "edge" && link.kind !== "end") continue;
    const [x0, y0] = transform.apply([link.source.x, link.source.y]);
    const [x1, y1] = transform.apply([link.target.x, link.target.y]);
    for (let i = 0; i <= 16; i++) {
      const t = i / 16;
      const across = t * t * (3 - 2 * t); // the curve of curveBetween, nearly
      const y = y0 + t * (y1 - y0);
      const key = Math.floor(y / CAPTION_HEIGHT);
      if (!byHeight.has(key)) byHeight.set(key, []);
      byHeight.get(key).push([x0 + across * (x1 - x0), y, relativeStrength(link)]);
    }
  }
  return byHeight;
}

/** How many edges run through a place, each counted by its strength. */
function edgesWithin(place, samples) {
  let found = 0;
  const first = Math.floor(place.top / CAPTION_HEIGHT);
  for (let key = first; key <= Math.floor(place.bottom / CAPTION_HEIGHT); key++) {
    for (const [x, y, strength] of samples.get(key) ?? []) {
      const isWithin =
        x > place.left - 2 && x < place.right + 2 && y > place.top && y < place.bottom;
      if (isWithin) found += 0.3 + strength;
    }
  }
  return found;
}
