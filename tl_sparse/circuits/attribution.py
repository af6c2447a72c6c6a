"""Attribution graphs: how a circuit comes to its answer after one prompt, in the JSON that the
viewers of circuit-tracer and Neuronpedia read.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_sparse.circuits.circuit import Circuit
from tl_sparse.circuits.nodes import EMBED_HOOK, LOCATIONS, node_at, node_label
from tl_sparse.hooks import TLModel, frozen, hooked
from tl_sparse.tasks import Task, get_task, make_task_data

#: Nodes of the graph with less influence are left out.
LEAST_INFLUENCE = 0.005
#: The features of a location are numbered from a multiple of this.
_FEATURES_PER_LOCATION = 1_000_000


def attribution_graph(
    circuit: Circuit, model: TLModel, task: Task | str | None = None, pair: int = 0
) -> dict[str, Any]:
    """How the circuit comes to its answer after one prompt, as circuit-tracer's and Neuronpedia's
    viewers read it.

    Nodes are the circuit's at a position (feature: a million times the number of the location, plus
    the index), the prompt's tokens, and the logits of the candidates. The weight of a link is what
    the source is beyond its mean (a token's embedding: beyond 0) times the derivative of the
    target, all other nodes and the norms' scales held: the direct effect of cutting the source, to
    first order. A node's influence is its share of these effects, handed down from the logits;
    nodes with less than `LEAST_INFLUENCE` are left out.

    Args:
        task: by default the circuit's own; the prompt is the first of its pair number `pair`.

    Raises:
        CircuitError: if the circuit has no means, or is another model's.
        TaskError: if there is no such task.
        TaskError, DataError, TokenizerError: if its prompts do not fit the model.
    """
    if not isinstance(task, Task):
        task = get_task(task or circuit.task)
    prompt = _prompt(model, task, pair)
    with circuit.applied(model), frozen(model), torch.enable_grad():
        run = _run_in_pieces(circuit, model, prompt)
        influence, links = _trace(run, prompt)
    nodes = {}
    for vertex in sorted(influence):
        if influence[vertex] >= LEAST_INFLUENCE:
            nodes[vertex] = _node_values(vertex, influence[vertex], model, prompt, run)
    link_values = []
    for link in links:
        if link.source in nodes:
            source_id = nodes[link.source]["node_id"]
            target_id = nodes[link.target]["node_id"]
            link_values.append({"source": source_id, "target": target_id, "weight": link.weight})
    name = f"{circuit.model_name} {task.name} {pair}"
    return {
        "metadata": {
            "slug": re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"),
            "scan": circuit.model_name,
            "prompt": prompt.text,
            "prompt_tokens": [model.tokenizer.decode([token]) for token in prompt.tokens],
            "info": {
                "generator": {"name": "tl_sparse", "version": version("tl_sparse"), "url": ""}
            },
        },
        "qParams": {},
        "nodes": list(nodes.values()),
        "links": link_values,
    }


@dataclass(frozen=True)
class _Prompt:
    text: str
    tokens: list[int]
    #: The tokens between which the task asks.
    candidates: list[int]


def _prompt(model: TLModel, task: Task, pair: int) -> _Prompt:
    """The first prompt of a pair."""
    data = make_task_data(task, model.tokenizer, pair + 1, 0, model.cfg.n_ctx)
    row = 2 * pair
    length = int(data.last[row]) + 1
    return _Prompt(
        text=data.prompts[row],
        tokens=data.tokens[row, :length].tolist(),
        candidates=data.candidates[row].tolist(),
    )


@dataclass(frozen=True)
class _RunInPieces:
    """A forward pass that is cut at every node location: what comes after it starts from a leaf of
    its own, so that no gradient leads through a node to what is before it.

    All lists have one entry for each hook point, in the order of the forward pass; the first is for
    the embedding.
    """

    hooks: list[str]
    #: What reached the hook points, as functions of the leaves before.
    values: list[Float[Tensor, "pos node"]]
    #: What was passed on from there, with the same values.
    leaves: list[Float[Tensor, "1 pos *node"]]
    #: The part of the leaves that is beyond the mean; of the embedding, all.
    beyond_mean: list[Float[Tensor, "1 pos *node"]]
    #: At the last position.
    logits: Float[Tensor, "d_vocab"]


def _run_in_pieces(circuit: Circuit, model: TLModel, prompt: _Prompt) -> _RunInPieces:
    """Run the model, to which the circuit is applied, on the prompt."""
    values: dict[str, Tensor] = {}
    leaves: dict[str, Tensor] = {}

    def separate(name: str, activation: Tensor, hook: object) -> Tensor:
        values[name] = activation[0].flatten(1)
        leaves[name] = activation.detach().requires_grad_()
        return leaves[name]

    def hold(scale: Tensor, hook: object) -> Tensor:
        return scale.detach()

    functions: dict[str, Any] = {}
    for name in (EMBED_HOOK, *circuit.kept):
        functions[name] = partial(separate, name)
    for name in model.hook_dict:
        # Along the whole stream, a norm whose scale is not held has no derivative at all.
        if name.endswith("hook_scale"):
            functions[name] = hold
    device = next(model.parameters()).device
    with hooked(model, functions):
        logits = model(torch.tensor([prompt.tokens], device=device))[0, -1]
    beyond_mean = []
    for name, leaf in leaves.items():
        change = leaf.detach()
        if name != EMBED_HOOK:
            kept = circuit.kept[name].to(device)
            change = (change - circuit.means[name].to(device)) * kept
        beyond_mean.append(change)
    return _RunInPieces(
        list(leaves), list(values.values()), list(leaves.values()), beyond_mean, logits
    )


@dataclass(frozen=True, order=True)
class _Vertex:
    """A node of the graph."""

    #: The number of its hook point in the order of the forward pass: 0 for tokens, one more than
    #: there are for logits.
    depth: int
    position: int
    #: Among the nodes of the hook point; of a logit, its token; of a token, 0.
    index: int


@dataclass(frozen=True)
class _Link:
    source: _Vertex
    target: _Vertex
    weight: float


def _trace(run: _RunInPieces, prompt: _Prompt) -> tuple[dict[_Vertex, float], list[_Link]]:
    """Follow the answer back from the logits to the tokens: the influence of each vertex, and the
    links.
    """
    logits_depth = len(run.hooks)
    last = len(prompt.tokens) - 1
    influence = {_Vertex(logits_depth, last, token): 0.5 for token in prompt.candidates}
    links = []
    # From the top down: when a depth is reached, all influence on its vertices is known.
    for depth in range(logits_depth, 0, -1):
        for target in list(influence):
            if target.depth != depth or influence[target] < LEAST_INFLUENCE:
                continue
            if depth == logits_depth:
                value = run.logits[target.index]
            else:
                value = run.values[depth][target.position, target.index]
            effects = _direct_effects(value, run.leaves, run.beyond_mean)
            total = sum(map(abs, effects.values()))
            for source, effect in effects.items():
                handed_down = influence[target] * abs(effect) / total
                influence[source] = influence.get(source, 0.0) + handed_down
                links.append(_Link(source, target, effect))
    return influence, links


def _direct_effects(
    value: Tensor, leaves: Sequence[Tensor], beyond_mean: Sequence[Tensor]
) -> dict[_Vertex, float]:
    """The effects on `value`, other than 0, of what each vertex is beyond its mean."""
    effects = {}
    gradients = torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True)
    for depth, (gradient, change) in enumerate(zip(gradients, beyond_mean, strict=True)):
        if gradient is not None:
            effect = (gradient * change)[0].flatten(1)
            if depth == 0:
                # The embedding of a token counts as one.
                effect = effect.sum(1, keepdim=True)
            for position, index in effect.nonzero().tolist():
                effects[_Vertex(depth, position, index)] = float(effect[position, index])
    return effects


@dataclass(frozen=True)
class _Feature:
    """How the viewers tell a vertex from others, and what they show of it."""

    layer: str
    number: int
    kind: str
    label: str


def _node_values(
    vertex: _Vertex, influence: float, model: TLModel, prompt: _Prompt, run: _RunInPieces
) -> dict[str, Any]:
    """A vertex as JSON values."""
    feature = _feature(vertex, model, prompt, run)
    prefix = f"{feature.layer}_{feature.number}"
    values = {
        "node_id": f"{prefix}_{vertex.position}",
        "feature": feature.number,
        "layer": feature.layer,
        "ctx_idx": vertex.position,
        "clerp": feature.label,
        "feature_type": feature.kind,
        "jsNodeId": f"{prefix}-{vertex.position}",
        "influence": influence,
    }
    if 0 < vertex.depth < len(run.hooks):
        values["activation"] = run.values[vertex.depth][vertex.position, vertex.index].item()
    return values


def _feature(vertex: _Vertex, model: TLModel, prompt: _Prompt, run: _RunInPieces) -> _Feature:
    if vertex.depth == 0:
        token = prompt.tokens[vertex.position]
        return _Feature("E", token, "embedding", repr(model.tokenizer.decode([token])))
    if vertex.depth == len(run.hooks):
        token = vertex.index
        probability = torch.softmax(run.logits.detach(), 0)[token]
        label = f"{model.tokenizer.decode([token])!r} (p={probability:.2f})"
        return _Feature(str(model.cfg.n_layers + 1), token, "logit", label)
    node = node_at(run.hooks[vertex.depth], vertex.index)
    number = _FEATURES_PER_LOCATION * list(LOCATIONS).index(node.location) + node.index
    # The viewers draw only this type as an ordinary node.
    return _Feature(str(node.layer), number, "cross layer transcoder", node_label(model, node))
