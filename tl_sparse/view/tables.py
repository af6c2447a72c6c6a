"""Circuits and their measurements as text tables."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from jaxtyping import Float
from torch import Tensor

from tl_sparse.arguments import checked
from tl_sparse.circuits import (
    LOCATIONS,
    Circuit,
    Edge,
    Node,
    circuit_task,
    residual_joins,
    task_tokens,
    why_no_nodes,
)
from tl_sparse.errors import CircuitError, DataError, counted
from tl_sparse.evaluation import Evaluation, SizedScore, scores_table
from tl_sparse.explanations import Explanation, explanation_text
from tl_sparse.hooks import TLModel
from tl_sparse.tasks import Task, score_row, table
from tl_sparse.view.explained import explanation_of, program_of
from tl_sparse.view.measurements import read_tabulated

#: A report lists at most as many edges, the strongest.
STRONGEST = 40
_CONSTANT = "nothing kept leads to it, so it is its bias everywhere"
#: What a node at each location does in a circuit without edges to other nodes.
_WITHOUT_EDGES = {
    "embed_out": "it brings the tokens' embedding to its channel",
    "attn_in": "nothing kept uses what it reads",
    "attn_q": f"{_CONSTANT}; it still shapes its head's attention",
    "attn_k": f"{_CONSTANT}; it still shapes its head's attention",
    "attn_v": f"{_CONSTANT}, and nothing kept uses it",
    "attn_out": "nothing kept leads to it, so it writes its bias everywhere",
    "mlp_in": "nothing kept uses what it reads",
    "mlp_neuron": f"{_CONSTANT}, and nothing kept uses it",
    "mlp_out": "nothing kept leads to it, so it writes its bias everywhere",
    "head": "no other component of the circuit reads it, or is read by it",
    "mlp": "no other component of the circuit reads it, or is read by it",
}


@checked("task")
def report(
    circuit: Circuit,
    model: TLModel,
    task: Task | str | None = None,
    evaluation: Evaluation | None = None,
    explanation: Explanation | None = None,
) -> str:
    """A description of the circuit of `task` in `model`, which must be a model of this package.

    It lists the nodes by layer and location, the `STRONGEST` edges with their weights, what is
    written on a residual channel and read further up, nodes that no edge reaches, the weights of
    embedding and unembedding for the task's tokens (or for those of one pair, if each pair has its
    own), and the scores.

    Args:
        circuit: the circuit.
        model: its model.
        task: the task of the circuit; by default its own.
        evaluation: the scores; by default those that the circuit records, if it does and `task` is
            its own.
        explanation: the explanation of the circuit, which the report then prints, with the circuit
            as a program that has its names.

    Raises:
        CircuitError: if `model` is not the circuit's model, if no task is given and the circuit's
            own is not known, if the recorded scores are damaged, or if `explanation` is that of
            another circuit.
    """
    task = circuit_task(circuit, task)
    if evaluation is None and task.name == circuit.task:
        evaluation = _recorded_evaluation(circuit)
    title = f"Circuit of {task.name} in {circuit.model_name}"
    if task.candidates:
        first, second = task.candidates
        title += f": {first!r} or {second!r}?"
    sections = [
        title + "\n" + "=" * len(title),
        _nodes_table(circuit, model),
        *_joined_tables(circuit, model),
        *_token_tables(circuit, model, task),
    ]
    if evaluation is not None:
        sections.append(scores_table(evaluation))
    if explanation is not None:
        sections.append(explained_report(circuit, model, task, explanation))
    return "\n\n".join(sections)


@checked("task")
def explained_report(
    circuit: Circuit, model: TLModel, task: Task | str | None, explanation: Explanation
) -> str:
    """The explanation of a circuit as text, and then the circuit as a program with its names.

    Raises:
        CircuitError: if the explanation is that of another circuit, or if no task is given and the
            circuit's own is not known.
    """
    shown = explanation_of(circuit, explanation, "")
    assert shown is not None
    sections = [explanation_text(shown)]
    task = circuit_task(circuit, task)
    candidates = task_tokens(model, task)[1] if task.candidates else []
    program = program_of(circuit, model, list(candidates), shown)
    if program is not None:
        sections.append(f"The circuit as Python\n---------------------\n\n{program.source}")
    return "\n\n".join(sections)


#: How much a comparison with random nodes says.
_WHAT_RANDOM_SHOWS = """\
  As many nodes at each location as the circuit has. Few edges join them, so they are a weak
  control: that they do not do the task does not say that the circuit is the model's own way."""


@checked()
def evaluation_tables(measured: Mapping[str, Any], most: int = 40) -> str:
    """Tables of what `full_evaluation` returns, with the `most` largest effects.

    Raises:
        DataError: if `measured` does not have the form of such measurements.
    """
    read = read_tabulated(measured)
    kinds = [[kind, str(number)] for kind, number in read.kinds.items()]
    effects = [[part, f"{effect:+.3f}"] for part, effect in read.effects.items()]
    random_table = _sizes_table("nodes at random", read.random)
    sections = [
        scores_table(read.evaluation),
        table(["kind of node or edge", "number"], kinds),
        _sizes_table("nodes ranked highest", read.ladder),
        f"{random_table}\n{_random_ranges(read.random)}\n{_WHAT_RANDOM_SHOWS}",
        table(["node held at its mean, or edge cut", "rise of the task loss"], effects[:most]),
    ]
    return "\n\n".join(sections)


@checked()
def circuit_facts(circuit: Circuit) -> str:
    """A description of a circuit that does not need its model.

    It has the number of nodes at each location and, if `prune` found the circuit, its scores.

    Raises:
        CircuitError: if its recorded scores are damaged.
    """
    evaluation = _recorded_evaluation(circuit)
    if evaluation is None:
        return repr(circuit)
    return f"{circuit!r}\n{counted(evaluation.n_edges, 'edge')}\n\n{scores_table(evaluation)}"


def _recorded_evaluation(circuit: Circuit) -> Evaluation | None:
    """The scores on held-out pairs that the circuit records, if it does."""
    heldout = circuit.measured.get("heldout")
    if heldout is None:
        return None
    try:
        return Evaluation.from_dict(heldout)
    except DataError as error:
        raise CircuitError(
            f"the circuit's scores are damaged: 'measured.heldout': {error}"
        ) from error


def _nodes_table(circuit: Circuit, model: TLModel) -> str:
    if not circuit.n_nodes:
        return f"0 nodes of {circuit.n_candidates:,}. {why_no_nodes(model).capitalize()}."
    rows = []
    for (layer, location), nodes in groupby(circuit.nodes, lambda n: (n.layer, n.location)):
        which = [node.shown_index for node in nodes]
        kind = LOCATIONS[location].description
        rows.append([f"{layer}.{location}", kind, str(len(which)), " ".join(which)])
    counts = f"{counted(circuit.n_nodes, 'node')} of {circuit.n_candidates:,}"
    heading = f"{counts}; every other node is held at its mean"
    sections = [heading + "\n" + table(["location", "kind", "nodes", "which"], rows)]
    positional = [node.shown_index for node in circuit.nodes if node.shown_index.startswith("p")]
    if positional:
        shown = positional[0]
        sections.append(
            f"  {shown} is positional channel {shown[1:]}: it holds where a token stands, not "
            "which it is."
        )
    if circuit.labels:
        labels = [
            [str(node), circuit.labels[node]] for node in circuit.nodes if node in circuit.labels
        ]
        sections.append(table(["node", "label"], labels))
    return "\n\n".join(sections)


#: Kind of nodes → what the edges between them are, and what their weights are.
_WHAT_EDGES_ARE = {
    "channels": "the nonzero weights between these nodes",
    "components": "the later component reads what the earlier one writes, and the weight is the "
    "norm of the product of their matrices",
}


def _joined_tables(circuit: Circuit, model: TLModel) -> list[str]:
    """Tables of the edges, of the joins by the residual stream, and of nodes without edges."""
    edges = circuit.edges(model)
    strongest = sorted(edges, key=lambda edge: -abs(edge.weight))[:STRONGEST]
    shown = set(strongest)
    rows = []
    for edge in edges:
        if edge in shown:
            rows.append([str(edge.source), "→", str(edge.target), f"{edge.weight:+.3f}"])
    heading = f"{counted(len(edges), 'edge')}: {_WHAT_EDGES_ARE[circuit.node_kind]}"
    if len(edges) > len(rows):
        heading += (
            f". These are the {STRONGEST} of the largest absolute weight; circuit.edges(model), "
            "`tl-sparse export` and the page (`tl-sparse view`) have all of them"
        )
    tables = [heading]
    if rows:
        tables[0] += "\n" + table(["from", "", "to", "weight"], rows)
    joins = residual_joins(circuit.nodes)
    if joins:
        rows = [[str(write), "→", str(read)] for write, read in joins[:STRONGEST]]
        heading = (
            f"{counted(len(joins), 'link')} by the residual stream: written, and read further up"
        )
        if len(joins) > len(rows):
            heading += f". These are the first {STRONGEST}"
        tables.append(heading + "\n" + table(["written by", "", "read by"], rows))
    alone = _nodes_without_edges(circuit, edges)
    if alone:
        rows = [[str(node), _WITHOUT_EDGES[node.location]] for node in alone[:STRONGEST]]
        heading = f"{counted(len(alone), 'node')} without edges to other nodes of the circuit"
        tables.append(heading + "\n" + table(["node", "what it does"], rows))
    return tables


def _nodes_without_edges(circuit: Circuit, edges: Sequence[Edge]) -> list[Node]:
    joined = set[Node]()
    for edge in edges:
        joined.update(edge.ends)
    return [node for node in circuit.nodes if node not in joined]


def _token_tables(circuit: Circuit, model: TLModel, task: Task) -> list[str]:
    """Tables of the embedding and unembedding weights of the task's tokens.

    They cover the channels that the circuit reads and writes. A table without nonzero weights is
    left out.
    """
    tokens, candidates = task_tokens(model, task)
    whose = "the task's" if task.candidates else "one pair's"
    brought = f"What {whose} tokens bring to the channels read: entries of the embedding"
    said = "What the writes say of the answer: entries of the unembedding"
    read = _channels(circuit, model, "_in")
    written = _channels(circuit, model, "_out")
    embedding = _channels_table(model, read, tokens, model.embed.W_E.T)
    unembedding = _channels_table(model, written, candidates, model.unembed.W_U)
    tables = []
    if embedding:
        tables.append(f"{brought} (not counted as edges)\n{embedding}")
    if unembedding:
        tables.append(f"{said} (not counted as edges)\n{unembedding}")
    return tables


def _channels(circuit: Circuit, model: TLModel, ending: str) -> list[int]:
    """The residual channels of the circuit's nodes at locations whose names end in `ending`.

    Indices from d_model upwards are left out: they are positional channels, in which tokens have no
    embedding weights.
    """
    channels = set()
    for node in circuit.nodes:
        if node.location.endswith(ending) and node.index < model.cfg.d_model:
            channels.add(node.index)
    return sorted(channels)


def _channels_table(
    model: TLModel,
    channels: Sequence[int],
    tokens: Sequence[int],
    matrix: Float[Tensor, "channel vocab"],
) -> str:
    """A table of the nonzero weights of `tokens` in `channels`; "" if there are none."""
    rows = []
    entries = matrix.detach()[channels][:, tokens].tolist()
    for channel, weights in zip(channels, entries, strict=True):
        if any(weights):
            cells = [f"{weight:+.3f}" if weight else "." for weight in weights]
            rows.append([str(channel), *cells])
    if not rows:
        return ""
    texts = [repr(model.tokenizer.decode([token])) for token in tokens]
    return table(["channel", *texts], rows)


def _sizes_table(heading: str, sized_scores: Sequence[SizedScore]) -> str:
    """A table of the scores of circuits by size."""
    rows = []
    for sized in sized_scores:
        _, loss, accuracy = score_row("", sized.circuit)
        rows.append([f"{sized.n_nodes:,}", f"{sized.n_edges:,}", loss, accuracy])
    return table([heading, "edges", "task loss", "accuracy"], rows)


def _random_ranges(sized_scores: Sequence[SizedScore]) -> str:
    """Lines with the mean and the range of loss and accuracy over random circuits."""
    values = {
        "loss": [sized.circuit.loss for sized in sized_scores],
        "accuracy": [sized.circuit.accuracy for sized in sized_scores],
    }
    formats = {"loss": ".3f", "accuracy": ".1%"}
    lines = []
    for measure, of_measure in values.items():
        if not of_measure:
            continue
        mean = format(sum(of_measure) / len(of_measure), formats[measure])
        low = format(min(of_measure), formats[measure])
        high = format(max(of_measure), formats[measure])
        lines.append(f"  mean {measure} at random: {mean} ({low}–{high})")
    return "\n".join(lines)
