"""Attribution graphs: how a circuit computes its answer on one prompt.

The graphs are in the JSON that the viewers of circuit-tracer and Neuronpedia read.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_sparse.arguments import checked
from tl_sparse.circuits.circuit import Circuit
from tl_sparse.circuits.nodes import EMBED_HOOK, LOCATIONS, Node, NodeSizes, node_at
from tl_sparse.circuits.parts import check_channels
from tl_sparse.circuits.reads import shared_reads
from tl_sparse.circuits.task import circuit_task
from tl_sparse.errors import TaskError, UnsupportedError
from tl_sparse.hooks import TLModel, differentiating, frozen, hooked, without_inference
from tl_sparse.tasks import Task, make_task_data

#: Nodes of the graph with less influence than this are left out.
LEAST_INFLUENCE = 0.005
#: The features of each node location are numbered from a different multiple of this.
_FEATURES_PER_LOCATION = 1_000_000


@checked("task")
def attribution_graph(
    circuit: Circuit, model: TLModel, task: Task | str | None = None, pair: int = 0
) -> dict[str, Any]:
    """The attribution graph of the circuit on one prompt, as JSON values.

    The viewers of circuit-tracer and Neuronpedia read it. The nodes of the graph are the circuit's
    nodes at each position, the tokens of the prompt, and the logits of the two candidates. The
    feature number of a circuit's node is 1,000,000 times the number of its location, plus its
    index.

    The weight of a link is the source's deviation from its mean (for a token, its whole embedding)
    times the derivative of the target with respect to the source, while all other nodes and the
    scales of the norms are held constant. To first order, this is the direct effect on the target
    of ablating the source. A node's influence is its share of these effects, passed down from the
    logits; nodes with less influence than `LEAST_INFLUENCE` are left out.

    Args:
        task: the task that the prompt is from; by default the circuit's own. Of a task whose
            pairs the circuit keeps, held-out pairs are used.
        pair: the number of the prompt pair; its first prompt is used.

    Raises:
        CircuitError: if the circuit has no means, or belongs to another model; or if no task is
            given, and the circuit's own is not known.
        UnsupportedError: if the nodes are components, whose outputs are vectors, or the circuit
            has `frozen_norms`.
        TaskError: if there is no such task, or `pair` is negative.
        TaskError, DataError, TokenizerError: if the prompts of the task do not fit the model.
    """
    check_channels(circuit, "a node of an attribution graph has one value at each position")
    if circuit.frozen_norms:
        raise UnsupportedError(
            "this circuit runs with the norm scales of the full model, and an attribution graph "
            "with its own; search without freeze_norms for a circuit that has one"
        )
    if pair < 0:
        raise TaskError(f"pair is {pair}; it must be at least 0, the first pair")
    task = circuit_task(circuit, task)
    prompt = _prompt(model, task, pair)
    circuit.check_model(model)
    with differentiating(model), frozen(model), shared_reads(model):
        circuit = replace(
            circuit,
            kept=without_inference(circuit.kept),
            means=without_inference(circuit.means),
        )
        with circuit.holding(model, circuit.dropped, circuit.means, circuit.cut_edges(model)):
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
    #: The two tokens that the task asks the model to choose between.
    candidates: list[int]


def _prompt(model: TLModel, task: Task, pair: int) -> _Prompt:
    """The first prompt of pair number `pair`."""
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
    """A forward pass that is detached at every node location.

    The activation at each location is replaced by a new leaf tensor with the same values, so that
    no gradient flows through a node to earlier nodes.

    Each list has one entry for each hook point, in the order of the forward pass; the first is for
    the embedding.
    """

    hooks: list[str]
    #: The activations that reached the hook points, as functions of the earlier leaves.
    values: list[Float[Tensor, "pos node"]]
    #: The leaves that replaced the activations, with the same values.
    leaves: list[Float[Tensor, "1 pos *node"]]
    #: The deviation of the kept nodes from their means; for the embedding, the whole activation.
    deviations: list[Float[Tensor, "1 pos *node"]]
    #: The logits at the last position.
    logits: Float[Tensor, "d_vocab"]
    #: The user's own words for nodes.
    labels: dict[Node, str]


def _run_in_pieces(circuit: Circuit, model: TLModel, prompt: _Prompt) -> _RunInPieces:
    """Run the model on the prompt; the circuit must already be applied to it."""
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
        # A norm is invariant to the scale of the residual stream: unless its scale is held, its
        # derivative along the whole stream is zero.
        if name.endswith("hook_scale"):
            functions[name] = hold
    device = next(model.parameters()).device
    with hooked(model, functions):
        logits = model(torch.tensor([prompt.tokens], device=device))[0, -1]
    deviations = []
    for name, leaf in leaves.items():
        deviation = leaf.detach()
        if name != EMBED_HOOK:
            kept = circuit.kept[name].to(device)
            deviation = (deviation - circuit.means[name].to(device)) * kept
        deviations.append(deviation)
    return _RunInPieces(
        hooks=list(leaves),
        values=list(values.values()),
        leaves=list(leaves.values()),
        deviations=deviations,
        logits=logits,
        labels=circuit.labels,
    )


@dataclass(frozen=True, order=True)
class _Vertex:
    """A node of the graph: a token, a node of the circuit at one position, or a logit."""

    #: The number of its hook point in the order of the forward pass: 0 for tokens; for logits, the
    #: number of hook points.
    depth: int
    position: int
    #: The index among the nodes of the hook point; for a logit, its token; for a token, 0.
    index: int


@dataclass(frozen=True)
class _Link:
    source: _Vertex
    target: _Vertex
    weight: float


def _trace(run: _RunInPieces, prompt: _Prompt) -> tuple[dict[_Vertex, float], list[_Link]]:
    """Trace the answer back from the logits to the tokens.

    Returns:
        The influence of each vertex, and the links.
    """
    logits_depth = len(run.hooks)
    last = len(prompt.tokens) - 1
    influence = {_Vertex(logits_depth, last, token): 0.5 for token in prompt.candidates}
    links = []
    # From the logits down: by the time a depth is reached, the influence of its vertices is final.
    for depth in range(logits_depth, 0, -1):
        for target in list(influence):
            if target.depth != depth or influence[target] < LEAST_INFLUENCE:
                continue
            if depth == logits_depth:
                value = run.logits[target.index]
            else:
                value = run.values[depth][target.position, target.index]
            effects = _direct_effects(value, run.leaves, run.deviations)
            total = sum(map(abs, effects.values()))
            for source, effect in effects.items():
                handed_down = influence[target] * abs(effect) / total
                influence[source] = influence.get(source, 0.0) + handed_down
                links.append(_Link(source, target, effect))
    return influence, links


def _direct_effects(
    value: Tensor, leaves: Sequence[Tensor], deviations: Sequence[Tensor]
) -> dict[_Vertex, float]:
    """The nonzero effects on `value` of each vertex's deviation from its mean."""
    effects = {}
    gradients = torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True)
    for depth, (gradient, deviation) in enumerate(zip(gradients, deviations, strict=True)):
        if gradient is not None:
            effect = (gradient * deviation)[0].flatten(1)
            if depth == 0:
                # The whole embedding of a token is one vertex.
                effect = effect.sum(1, keepdim=True)
            for position, index in effect.nonzero().tolist():
                effects[_Vertex(depth, position, index)] = float(effect[position, index])
    return effects


@dataclass(frozen=True)
class _Feature:
    """The fields by which the viewers identify a vertex, and the label that they show."""

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
    node = node_at(run.hooks[vertex.depth], vertex.index, NodeSizes.of_model(model))
    number = _FEATURES_PER_LOCATION * list(LOCATIONS).index(node.location) + node.index
    label = str(node)
    if node in run.labels:
        label += f": {run.labels[node]}"
    # The viewers draw only this type as an ordinary node.
    return _Feature(str(node.layer), number, "cross layer transcoder", label)
