"""Circuits in DOT, the language of Graphviz."""

import textwrap
from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise

from tl_sparse.circuits.circuit import Circuit
from tl_sparse.circuits.diagram import Diagram, Link, LinkKind, Token, diagram
from tl_sparse.circuits.nodes import LOCATIONS, Node
from tl_sparse.hooks import TLModel
from tl_sparse.tasks import Task

#: The largest number of edges in a drawing: more are a tangle, which Graphviz takes minutes to lay
#: out.
DOT_EDGES = 400
#: A drawing with more lines than this has no weights beside them: there is no room.
MAX_WRITTEN_WEIGHTS = 150
#: The user's labels of nodes are wrapped at this number of characters.
LABEL_WIDTH = 24
_POSITIVE, _NEGATIVE = "#1b6cb5", "#cd4f22"
_KEY = (
    "blue arrows: positive weights; orange bars: negative weights",
    "dashed: the residual stream, from a write to a later read of its channel",
)
#: What the two boxes of a layer are called, by the beginning of the names of their locations.
_BLOCKS = {"attn": "attention", "head": "attention", "mlp": "MLP", "embed": "embedding"}


def to_dot(circuit: Circuit, model: TLModel, task: Task | str | None = None) -> str:
    """The circuit in DOT, drawn from bottom to top.

    At the bottom are the tokens of the task, with their entries of the embedding, and at the top
    its two answers, with their entries of the unembedding. The nodes of a layer's attention and MLP
    are in a box each, and the queries, keys and values of a head in a box of their own. The colour
    and the end of a line show the sign of its weight, its width the absolute weight, relative to
    the largest of its kind. Dashed lines lead from each write to the later reads of the same
    residual channel. Of more than `DOT_EDGES` edges, the strongest are drawn.

    Args:
        circuit: the circuit.
        model: its model.
        task: the task of the tokens and answers; see `diagram`.

    Raises:
        CircuitError: if `model` is not the circuit's model.
        TaskError, TokenizerError, DataError: if there is no such task, or it does not fit the
            model's tokenizer.
    """
    shown = diagram(circuit, model, task, DOT_EDGES)
    title = "\\n".join(_escaped(line) for line in [*shown.title, *_KEY])
    lines = [f"// {note}" for note in shown.notes]
    lines += [
        "digraph circuit {",
        f'  label="{title}"; labelloc=t; fontname=Helvetica; fontsize=12;',
        "  rankdir=BT; newrank=true; ranksep=0.7; nodesep=0.2;",
        '  node [shape=box, style="rounded,filled", fillcolor=white, fontname=Courier,',
        "    fontsize=10, margin=0.06, height=0.3];",
        "  edge [fontname=Helvetica, fontsize=8, arrowsize=0.6];",
        *_tokens_box("tokens", shown.tokens),
        *_node_boxes(shown),
        *_tokens_box("logits of the answers", shown.answers),
        *_order(shown),
        *_links(shown.links),
        "}",
    ]
    return "\n".join(lines)


def _escaped(text: str) -> str:
    """A text as part of a quoted label, in which Graphviz must see no escape and no entity."""
    return text.replace("&", "&amp;").replace("\\", "\\\\").replace('"', '\\"')


def _name(end: Node | Token) -> str:
    """The name of a node or token, which needs no escapes."""
    if isinstance(end, Node):
        return str(end)
    return f"answer {end.id}" if end.is_answer else f"token {end.id}"


def _tokens_box(title: str, tokens: Sequence[Token]) -> Iterator[str]:
    if not tokens:
        return
    yield f'  subgraph "cluster {title}" {{'
    yield f'    label="{title}"; style=dotted; labeljust=l;'
    for token in tokens:
        yield f'    "{_name(token)}" [label="{_escaped(token.text)}", shape=ellipse, style=filled];'
    yield "  }"


def _node_boxes(shown: Diagram) -> Iterator[str]:
    """A box for the attention and for the MLP of each layer, with the nodes in it."""
    for (layer, block), nodes in groupby(shown.nodes, lambda node: (node.layer, _block(node))):
        yield f'  subgraph "cluster {layer}.{block}" {{'
        yield f'    label="layer {layer}: {_BLOCKS[block]}"; style="rounded,filled";'
        yield '    labeljust=l; color="#cccccc"; fillcolor="#f7f7f7";'
        in_head: dict[str, list[Node]] = {}
        for node in nodes:
            head = _head(node)
            if head:
                in_head.setdefault(head, []).append(node)
            else:
                yield f"    {_box(shown, node)}"
        for head, nodes_of_head in in_head.items():
            yield f'    subgraph "cluster {layer}.{head}" {{'
            yield f'      label="head {head.removeprefix("h")}"; fillcolor=white;'
            yield from (f"      {_box(shown, node)}" for node in nodes_of_head)
            yield "    }"
        yield "  }"


def _block(node: Node) -> str:
    """attn, head, mlp or embed: the beginning of the name of the node's location."""
    return node.location.split("_")[0]


def _head(node: Node) -> str:
    """The head as the node's name shows it, such as h3; "" at locations without heads."""
    if LOCATIONS[node.location].is_by_head:
        return node.shown_index.partition(".")[0]
    return ""


def _box(shown: Diagram, node: Node) -> str:
    lines = [str(node), *textwrap.wrap(shown.labels.get(node, ""), LABEL_WIDTH)]
    text = "\\n".join(map(_escaped, lines))
    tooltip = LOCATIONS[node.location].description
    return f'"{node}" [label="{text}", tooltip="{tooltip}"];'


def _order(shown: Diagram) -> Iterator[str]:
    """Lines that place what is computed later higher up, also where nothing is drawn between."""
    rows: list[list[str]] = [[_name(token) for token in shown.tokens]]
    for _, nodes in groupby(shown.nodes, _row):
        rows.append([str(node) for node in nodes])
    rows.append([_name(answer) for answer in shown.answers])
    rows = [row for row in rows if row]
    for row in rows:
        names = " ".join(f'"{name}";' for name in row)
        yield f"  {{ rank=same; {names} }}"
    for lower, upper in pairwise(rows):
        yield f'  "{lower[0]}" -> "{upper[0]}" [style=invis, weight=0];'


def _row(node: Node) -> tuple[int, str]:
    """The layer and the location of a node; queries, keys and values are in one row."""
    is_by_head = LOCATIONS[node.location].is_by_head
    return node.layer, "heads" if is_by_head else node.location


def _links(links: Sequence[Link]) -> Iterator[str]:
    """A line for each link; its weight is relative to the largest of its kind."""
    largest: dict[LinkKind, float] = {}
    for link in links:
        largest[link.kind] = max(largest.get(link.kind, 0.0), abs(link.weight or 0.0))
    for link in links:
        style = {"tooltip": f"{_name(link.source)} → {_name(link.target)}: {link.text}"}
        if len(links) <= MAX_WRITTEN_WEIGHTS:
            style["label"] = f" {link.text} "  # the spaces keep it off the line
        if link.weight is None:
            style |= {"style": "dashed", "color": "#777777", "fontcolor": "#777777"}
        else:
            width = 0.5 + 3 * abs(link.weight) / largest[link.kind]
            style["penwidth"] = f"{width:.2f}"
            style["color"] = style["fontcolor"] = _POSITIVE if link.weight > 0 else _NEGATIVE
            if link.weight < 0:
                style["arrowhead"] = "tee"
        attributes = ", ".join(f'{key}="{value}"' for key, value in style.items())
        yield f'  "{_name(link.source)}" -> "{_name(link.target)}" [{attributes}];'
