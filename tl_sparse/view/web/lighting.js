// What is emphasised: the node that is pinned or pointed at, and the paths to and from it.

const FAINTEST = 0.03; // Weaker paths are not emphasised.

/**
 * Vertex and link → the strength of the strongest path between them and a vertex.
 *
 * Along a path, the strength is multiplied by how strong each link is among those of its kind that
 * enter the same vertex (on the way down, side "in") or leave it (on the way up, side "out"). The
 * strongest path thus has strength 1.
 */
function pathStrengths(start, side) {
  const next = side === "in" ? "source" : "target";
  const strengths = new Map([[start, 1]]);
  const open = new Set([start]);
  while (open.size) {
    const vertex = d3.greatest(open, (v) => strengths.get(v));
    open.delete(vertex);
    const around = vertex[side].filter(isDrawn);
    const largest = (kind) => {
      return d3.max(around, (link) => (link.kind === kind ? relativeStrength(link) : 0));
    };
    const most = { edge: largest("edge"), end: largest("end"), join: 1, pattern: 1 };
    for (const link of around) {
      const strength = (strengths.get(vertex) * relativeStrength(link)) / most[link.kind];
      strengths.set(link, strength);
      if (strength > (strengths.get(link[next]) ?? 0)) {
        strengths.set(link[next], strength);
        open.add(link[next]);
      }
    }
  }
  return strengths;
}

function hover(vertex) {
  state.hover = vertex;
  light();
}

/** Emphasises the paths of the vertex that is pointed at or, without one, of the pinned one. */
function light() {
  const self = state.hover ?? state.pinned;
  svg.classed("dimmed", self != null);
  svg.attr("aria-activedescendant", state.pinned ? `v${state.pinned.i}` : null);
  if (!self) {
    picture.links.classed("lit near", false).attr("stroke-opacity", restingOpacity);
    picture.marks.classed("lit near self", false);
    return;
  }
  const strengths = pathStrengths(self, "in");
  for (const [key, strength] of pathStrengths(self, "out")) strengths.set(key, strength);
  const isLit = (key) => (strengths.get(key) ?? 0) >= FAINTEST;
  const near = new Set([...self.in, ...self.out].filter(isDrawn));
  const beside = new Set([...near].flatMap((link) => [link.source, link.target]));
  picture.links
    .classed("lit", isLit)
    .classed("near", (link) => near.has(link))
    .attr("stroke-opacity", (link) => litOpacity(link, strengths.get(link), near.has(link)));
  picture.marks
    .classed("lit", isLit)
    .classed("near", (v) => beside.has(v))
    .classed("self", (v) => v === self);
}

/** How opaque a link is while a node is emphasised, by the strength of its path. */
function litOpacity(link, strength = 0, isNear = false) {
  if (isNear) return 0.55 + 0.45 * strength;
  if (strength >= FAINTEST) return 0.1 + 0.6 * strength;
  return link.kind === "join" ? 0.3 : 0.05;
}

/** Marks the vertices of which a name or the label contains a text. */
function find(text) {
  const wanted = text.trim().toLowerCase();
  const namesOf = (v) => [v.name, v.node.openai, labelOf(v.node), explained.get(v.node.name)?.name];
  const contains = (name) => name?.toLowerCase().includes(wanted);
  state.found = wanted ? vertices.filter((v) => v.node && namesOf(v).some(contains)) : [];
  markFound();
  byId("found").textContent = wanted ? String(state.found.length) : "";
}

function markFound() {
  const found = new Set(state.found);
  picture.marks.classed("match", (v) => found.has(v));
}
