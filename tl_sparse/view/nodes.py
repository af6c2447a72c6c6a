"""The page's descriptions of nodes, and of the tokens that they read and write."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float
from torch import Tensor

from tl_sparse.circuits import (
    LOCATIONS,
    Circuit,
    Node,
    TaskEnds,
    has_bigram_table,
    task_ends,
    unembedding,
)
from tl_sparse.hooks import TLModel
from tl_sparse.tasks import Task
from tl_sparse.view.activations import node_points
from tl_sparse.view.limits import LIMITS
from tl_sparse.view.writing import Vocabulary, four_digits


@dataclass
class PageNode:
    """The page's description of a node. The fields are keys of the page's JSON, in its order.

    Attributes:
        name: the name of the node, `str(node)`.
        openai: the name of the node in OpenAI's notation.
        label: the user's own words for the node; see `Circuit.with_labels`.
        kind: a description of the nodes at this location.
        head: the number of the head; None at locations without heads.
        mean: the mean at which the node is held when it is ablated; None for components, whose mean
            is a vector, and if the circuit has no means.
        effect: by how much the task loss rises when this node alone is held at its mean; None if
            it is not measured.
        passages: the passages with the most positive activations, and those with the most negative
            ones; see `strongest_passages`.
        channel: for reads and writes, the channel of the residual stream. A positional channel is
            "p" followed by its number.
        tokens: for reads and writes in other channels, the tokens with the largest positive and the
            largest negative weights in the embedding or unembedding, each with its weight.
        rank: how many nodes of the circuit are more important; None if it is not measured.
        scale: the activation that is written as `LIMITS.activation_levels`.
        histogram: a histogram of the activations on the corpus; None without a corpus. The
            activation of a component is the distance of its output from its mean.
    """

    name: str
    openai: str
    label: str
    kind: str
    layer: int
    location: str
    index: int
    head: int | None
    mean: float | None
    effect: float | None = None
    passages: list[list[Any]] = field(default_factory=lambda: [[], []])
    channel: int | str | None = None
    tokens: list[list[Any]] | None = None
    rank: int | None = None
    scale: float = 1.0
    histogram: dict[str, Any] | None = None

    def as_json(self) -> dict[str, Any]:
        """The fields by name; some are left out if they are None."""
        values = dict(vars(self))
        for name in ("channel", "tokens", "rank", "histogram"):
            if values[name] is None:
                del values[name]
        return values


def page_nodes(
    circuit: Circuit, model: TLModel, nodes: Sequence[Node], vocabulary: Vocabulary
) -> list[PageNode]:
    """Descriptions of the nodes without their activations, which need a forward pass."""
    described = []
    for node, point in zip(nodes, node_points(circuit, nodes), strict=True):
        head = None
        if LOCATIONS[node.location].is_by_head:
            head = node.index // model.cfg.d_head
        elif node.location == "head":
            head = node.index
        mean = None
        if circuit.means and not node.is_component:
            mean = four_digits(circuit.means[point.hook].flatten()[node.index])
        page_node = PageNode(
            name=str(node),
            openai=node.openai_name,
            label=circuit.labels.get(node, ""),
            kind=LOCATIONS[node.location].description,
            layer=node.layer,
            location=node.location,
            index=node.index,
            head=head,
            mean=mean,
        )
        if node.is_read or node.is_write:
            _describe_channel(page_node, model, node, vocabulary)
        described.append(page_node)
    return described


def page_ends(
    model: TLModel, nodes: Sequence[Node], task: Task | None, vocabulary: Vocabulary
) -> dict[str, Any]:
    """The `tokens` and `candidates` of a task, and the weights that join them to nodes.

    `bigram` says whether the logits also have the share of a bigram table, which no node carries.

    `embed` lists the nonzero weights of the embedding between these tokens and reads, each with the
    position of its token and of its node. `unembed` lists the nonzero weights of the unembedding
    between writes and the candidates, each with the position of its node and of its candidate.
    """
    ends = TaskEnds() if task is None else task_ends(model, nodes, task)
    vocabulary.add(ends.tokens)
    vocabulary.add(ends.candidates)
    position_of = {node: position for position, node in enumerate(nodes)}
    embed = []
    for entry in ends.embed:
        token = ends.tokens.index(entry.token)
        embed.append([token, position_of[entry.node], four_digits(entry.weight)])
    unembed = []
    for entry in ends.unembed:
        candidate = ends.candidates.index(entry.token)
        unembed.append([position_of[entry.node], candidate, four_digits(entry.weight)])
    return {
        "tokens": ends.tokens,
        "candidates": ends.candidates,
        "embed": embed,
        "unembed": unembed,
        "bigram": has_bigram_table(model),
    }


def _describe_channel(
    page_node: PageNode, model: TLModel, node: Node, vocabulary: Vocabulary
) -> None:
    """Set the channel of a read or write, and the tokens with the largest weights in it."""
    if node.index >= model.cfg.d_model:
        page_node.channel = f"p{node.index - model.cfg.d_model}"
        return
    page_node.channel = node.index
    if node.is_write:
        weights = unembedding(model, node.index)
    else:
        weights = model.embed.W_E[:, node.index]
    page_node.tokens = [_top_tokens(weights, sign, vocabulary) for sign in (1, -1)]


def _top_tokens(
    weights: Float[Tensor, " vocab"], sign: int, vocabulary: Vocabulary
) -> list[list[Any]]:
    """The tokens with the largest absolute weights of this sign, each with its weight."""
    top = (sign * weights).topk(min(LIMITS.top_tokens, len(weights)))
    tokens = top.indices.tolist()
    vocabulary.add(tokens)
    entries: list[list[Any]] = []
    for token, size in zip(tokens, top.values.tolist(), strict=True):
        if size > 0:
            entries.append([token, four_digits(sign * size)])
    return entries
