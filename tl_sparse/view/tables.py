"""A circuit as tables that a person can read."""

from collections.abc import Iterator, Mapping
from typing import Any

from tl_sparse.circuits import LOCATIONS, Circuit, index_label, node_label
from tl_sparse.evaluation import Evaluation, scores_table
from tl_sparse.hooks import TLModel
from tl_sparse.tasks import Score, Task, make_task_data, score_row
from tl_sparse.text import table


def report(circuit: Circuit, model: TLModel, task: Task, evaluation: Evaluation) -> str:
    """What the circuit of `task` in `model`, one of ours, is: its nodes by layer and kind, each
    edge with its weight, what embedding and unembedding say of the task's tokens (of one pair's, if
    each has its own), and how well it does.

    Raises:
        CircuitError: if `model` is not the circuit's.
    """
    question = ": {!r} or {!r}?".format(*task.candidates) if task.candidates else ""
    title = f"Circuit of {task.name} in {circuit.model_name}{question}"
    tables = [
        _nodes_table(circuit, model),
        _edges_table(circuit, model),
        *_tokens_tables(circuit, model, task),
    ]
    return "\n\n".join([title, "=" * len(title), *tables, scores_table(evaluation)])


def evaluation_tables(found: Mapping[str, Any], most: int = 40) -> str:
    """What `full_evaluation` gives, with the `most` largest effects."""
    parts = [scores_table(Evaluation.from_dict(found["evaluation"]))]
    parts.append(
        table(
            ["kind of node or edge", "number"],
            [[kind, str(n)] for kind, n in found["kinds"].items()],
        )
    )
    for heading, sized_scores in (
        ("nodes ranked highest", found["ladder"]),
        ("nodes at random", found["random"]),
    ):
        rows = [
            [f"{r['n_nodes']:,}", f"{r['n_edges']:,}", *score_row("", Score(**r["circuit"]))[1:]]
            for r in sized_scores
        ]
        parts.append(table([heading, "edges", "task loss", "accuracy"], rows))
    for what, digits in (("loss", ".3f"), ("accuracy", ".1%")):
        values = [sized["circuit"][what] for sized in found["random"]]
        mean, low, high = (
            format(value, digits) for value in (sum(values) / len(values), min(values), max(values))
        )
        parts[-1] += f"\n  mean {what} at random: {mean} ({low}–{high})"
    rows = [[name, f"{effect:+.3f}"] for name, effect in found["effects"].items()]
    parts.append(table(["node held at its mean, or edge cut", "task loss"], rows[:most]))
    return "\n\n".join(parts)


def _nodes_table(circuit: Circuit, model: TLModel) -> str:
    rows = []
    for (layer, location), indices in circuit.nodes_by_location().items():
        which = " ".join(index_label(model, location, index) for index in indices)
        rows.append(
            [str(layer), location, LOCATIONS[location].description, str(len(indices)), which]
        )
    heading = (
        f"{circuit.n_nodes} nodes of {circuit.n_candidates:,}; every other node is held at its mean"
    )
    return heading + "\n" + table(["layer", "location", "kind", "nodes", "which"], rows)


def _edges_table(circuit: Circuit, model: TLModel) -> str:
    edges = circuit.edges(model)
    rows = [
        [node_label(model, e.source), "→", node_label(model, e.target), f"{e.weight:+.3f}"]
        for e in edges
    ]
    heading = f"{len(edges)} edges: the nonzero weights between these nodes"
    return heading + ("\n" + table(["from", "", "to", "weight"], rows) if rows else "")


def _tokens_tables(circuit: Circuit, model: TLModel, task: Task) -> Iterator[str]:
    """Entries of embedding and unembedding: of the task's tokens, in the channels that the circuit
    reads or writes.
    """
    tokens, answers = task_tokens(model, task)
    whose = "the task's" if task.candidates else "one pair's"
    for ending, ids, weights, heading in (
        (
            "_in",
            tokens,
            model.embed.W_E.T,
            f"What {whose} tokens bring to the channels read: entries of the embedding",
        ),
        (
            "_out",
            answers,
            model.unembed.W_U,
            "What the writes say of the answer: entries of the unembedding",
        ),
    ):
        indices = {node.index for node in circuit.nodes if node.location.endswith(ending)}
        channels = sorted(
            i for i in indices if i < model.cfg.d_model
        )  # further ones are positional channels
        entries = zip(channels, weights.detach()[channels][:, ids].tolist(), strict=True)
        rows = [
            [str(c), *(f"{weight:+.3f}" if weight else "." for weight in row)]
            for c, row in entries
            if any(row)
        ]
        if rows:
            header = ["channel", *(repr(model.tokenizer.decode([i])) for i in ids)]
            yield f"{heading} (not counted as edges)\n{table(header, rows)}"


def task_tokens(model: TLModel, task: Task) -> tuple[list[int], list[int]]:
    """The tokens in which the prompts of a pair differ, with its candidates; and the candidates
    alone.

    Raises TaskError, TokenizerError: if the task does not fit the model's tokenizer.
    """
    data = make_task_data(task, model.tokenizer, n_pairs=1, seed=0)
    prompts = [model.tokenizer.encode(text, add_special_tokens=False) for text in data.prompts]
    different = [i for pair in zip(*prompts, strict=False) if pair[0] != pair[1] for i in pair]
    answers = data.candidates[0].tolist()
    return list(dict.fromkeys(different + answers)), answers


def circuit_facts(circuit: Circuit) -> str:
    """What is known of a circuit without its model: its nodes by location, and what `prune`
    measured of it.
    """
    heldout = circuit.measured.get("heldout")  # as `prune` writes it
    if heldout is None:
        return repr(circuit)
    evaluation = Evaluation.from_dict(heldout)
    return f"{circuit!r}\n{evaluation.n_edges} edges\n\n{scores_table(evaluation)}"
