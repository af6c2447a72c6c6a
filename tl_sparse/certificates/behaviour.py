"""The text of sections 1 to 4: what the circuit says, and how it comes to say it."""

from tl_sparse.certificates.derived import slope_of
from tl_sparse.certificates.layout import (
    MOST_ROWS,
    NOTHING,
    accuracy,
    estimate,
    loss,
    number,
    paragraph,
    share,
    shows,
    table_of_words,
)
from tl_sparse.certificates.sufficient import Sufficiency, limit_in_words
from tl_sparse.errors import counted
from tl_sparse.evaluation import Inside, Interchange, Likeness
from tl_sparse.parsing import printable
from tl_sparse.tasks import table


def sufficiency_text(measured: Sufficiency) -> list[str]:
    """Section 1."""
    return [
        _alone_table(measured),
        _subsets_table(measured),
        *_attacks_text(measured),
        shows(
            "whether the circuit alone chooses the right answer, and whether it still does when "
            "others choose what is held.",
            "that the model computes the answer this way, or that it says more than which of the "
            "two answers is right (section 2).",
        ),
    ]


def _attacks_text(measured: Sufficiency) -> list[str]:
    if not measured.attacks:
        return [paragraph(f"No adversaries: {printable(measured.no_attacks)}.")]
    learned = paragraph(
        f"Each adversary learned for {measured.n_steps} steps, on "
        f"{counted(measured.n_training_pairs, 'pair')} that are not among the held-out ones. "
        "As many random nodes, left as they are, stand beside it."
    )
    return [_attacks_table(measured), learned]


def _alone_table(measured: Sufficiency) -> str:
    scores = measured.evaluation
    random = f"{estimate(measured.random_loss)} ({measured.n_random})"
    baselines = {measured.ablation: random}
    rows = [["the full model", loss(scores.full), accuracy(scores.full), NOTHING]]
    held = {"mean": scores.circuit, "zero": scores.zero, "resample": scores.resample}
    for ablation, score in held.items():
        beside = baselines.get(ablation, NOTHING)
        rows.append([f"circuit, the rest by {ablation}", loss(score), accuracy(score), beside])
    rows.append(["no nodes", loss(scores.empty), accuracy(scores.empty), NOTHING])
    return table(["alone", "task loss", "accuracy", "loss of random circuits"], rows)


def _subsets_table(measured: Sufficiency) -> str:
    of_circuit, of_random = measured.subsets, measured.random_subsets
    n_subsets = of_circuit.n_subsets
    rows = [
        [f"mean of {n_subsets}", estimate(of_circuit.mean), NOTHING, estimate(of_random.mean)],
        [
            f"worst ({of_circuit.worst_share:.0%} left)",
            loss(of_circuit.worst),
            accuracy(of_circuit.worst),
            loss(of_random.worst),
        ],
    ]
    header = ["random subsets left as they are", "task loss", "accuracy", "a random circuit's"]
    return table(header, rows)


def _attacks_table(measured: Sufficiency) -> str:
    rows = []
    for attack in measured.attacks:
        adversary = attack.adversary
        rows.append(
            [
                limit_in_words(adversary.budget),
                str(adversary.n_left),
                loss(adversary.score),
                accuracy(adversary.score),
                loss(attack.random),
                " ".join(map(number, adversary.losses)),
            ]
        )
    header = ["adversary", "left", "task loss", "accuracy", "random nodes left", "each start"]
    return table(header, rows)


def likeness_text(measured: Likeness) -> list[str]:
    """Section 2."""
    return [
        _divergence_table(measured),
        _agreement_table(measured),
        paragraph(_errors_in_words(measured), measured.logits.remark),
        shows(
            "how near the circuit is to the model in all that it says next, and whether it is sure "
            "and wrong at the same prompts.",
            "anything about how it comes to say it. The correlation between answers is high for "
            "all circuits that choose rightly; the one within answers is the fair one.",
        ),
    ]


def _divergence_table(measured: Likeness) -> str:
    rows = []
    for place, divergence in (("task prompts", measured.task), ("corpus text", measured.corpus)):
        if divergence is None:
            rows.append([place, *[NOTHING] * 3])
            continue
        found = (divergence.circuit, divergence.no_nodes, divergence.random)
        rows.append([place, *map(estimate, found)])
    return table(["KL from the model, nats", "circuit", "no nodes", "random circuits"], rows)


def _agreement_table(measured: Likeness) -> str:
    logits = measured.logits
    rows = [
        ["between answers", estimate(logits.between_answers), NOTHING],
        [
            "within answers",
            estimate(logits.within_answers),
            estimate(logits.random_within_answers),
        ],
    ]
    return table(["correlation of logit differences", "circuit", "random circuits"], rows)


def _errors_in_words(measured: Likeness) -> str:
    errors = measured.errors
    sentence = (
        f"Of {counted(errors.n_prompts, 'prompt')}, the model errs at {errors.n_model}, the "
        f"circuit at {errors.n_circuit}, both at {errors.n_both} (by chance {errors.by_chance:.1f}"
    )
    if errors.p_value is None:
        return f"{sentence}; no test: {errors.remark})."
    return f"{sentence}; p = {errors.p_value:.2g})."


def inside_text(measured: Inside) -> list[str]:
    """Section 3."""
    parts = [
        paragraph(
            "Correlations are those of a node's value under the circuit with its value in the "
            "model: 1 is best. The normalised error is 0 at best, and 1 for a node held at its "
            "mean."
        ),
        _values_table(measured),
        _nodes_table(measured),
    ]
    if measured.heads:
        parts += [
            paragraph(
                "Distances of attention patterns go from 0, equal, to 1, no token in common. The "
                "nearer the circuit is to the model, the better; a circuit that attends evenly to "
                "all tokens is as far from the model as the model is from uniform."
            ),
            _heads_table(measured),
        ]
    else:
        parts.append(paragraph(f"No attention patterns: {measured.no_heads}."))
    parts.append(
        shows(
            "whether each node has under the circuit the value that it has in the model, and "
            "whether heads attend to the same tokens.",
            "that these values matter for the answer (sections 4 and 6). Nodes of the first layers "
            "follow the model in any circuit, as the random ones show.",
        )
    )
    return parts


def _values_table(measured: Inside) -> str:
    summary = measured.summary
    of_share = None if summary.share is None else f"{summary.share:.0%}"
    rows = [
        [
            "median correlation",
            number(summary.median_correlation),
            estimate(measured.random_median_correlation),
        ],
        ["nodes above 0.9", of_share or NOTHING, share(measured.random_share)],
    ]
    varying = counted(summary.n_varying, "node")
    header = [f"values of {varying} that vary", "circuit", f"random ({measured.n_random})"]
    return table(header, rows)


def _nodes_table(measured: Inside) -> str:
    rows = []
    for node in measured.nodes[:MOST_ROWS]:
        rows.append([node.node, estimate(node.correlation), estimate(node.error), node.remark])
    text = table_of_words(["node", "correlation", "normalised error", ""], rows)
    n_more = len(measured.nodes) - len(rows)
    return f"{text}\n  … and {n_more} more in certificate.json" if n_more > 0 else text


def _heads_table(measured: Inside) -> str:
    rows = []
    for head in measured.heads[:MOST_ROWS]:
        rows.append(
            [
                f"{head.layer}.h{head.head}",
                estimate(head.distance),
                estimate(head.model_to_uniform),
                estimate(head.circuit_to_uniform),
                head.remark,
            ]
        )
    header = ["head", "from the model", "model from uniform", "circuit from uniform", ""]
    return table_of_words(header, rows)


def interchange_text(measured: Interchange) -> list[str]:
    """Section 4."""
    slope = slope_of(measured)
    in_words = (
        "" if slope is None else f"Slope of the circuit's effects over the model's: {slope:.2f}."
    )
    correlation = measured.no_correlation and f"No correlation: {measured.no_correlation}."
    if measured.correlation is not None:
        correlation = f"Correlation over nodes: {estimate(measured.correlation)}."
    return [
        paragraph(
            "Changes of the logit difference, right answer minus wrong, when values are taken from "
            "a prompt with the other answer; from one with the same answer, how large the change "
            "is, up or down. Flips are prompts at which the preferred answer changes. The circuit "
            "should do what the model does."
        ),
        _exchanges_table(measured),
        _exchanged_nodes_table(measured),
        paragraph(correlation, in_words, measured.no_same_answer),
        shows(
            "whether a node carries under the circuit what it carries in the model: a value from "
            "a prompt with the same answer should change little, one from the other answer as much "
            "as in the model.",
            "that the values mean the answer: they may stand for a token that goes with it. A "
            "node before attention acts where its token stands, in the model too.",
        ),
    ]


def _exchanges_table(measured: Interchange) -> str:
    together = measured.all_nodes
    other, same = together.other_answer, together.same_answer
    rows = [
        [
            "all nodes, other answer",
            estimate(other.model.change),
            estimate(other.circuit.change),
            share(other.model.flips),
            share(other.circuit.flips),
        ],
    ]
    if same is not None:
        rows.append(
            [
                "all nodes, same answer: size",
                estimate(same.model.size),
                estimate(same.circuit.size),
                share(same.model.flips),
                share(same.circuit.flips),
            ]
        )
    for change in measured.random[:1]:
        rows.append(
            [
                "random nodes, other answer",
                estimate(change.change),
                NOTHING,
                share(change.flips),
                NOTHING,
            ]
        )
    everything = measured.everything
    rows.append(
        [
            "the whole other prompt",
            estimate(everything.model.change),
            estimate(everything.circuit.change),
            share(everything.model.flips),
            share(everything.circuit.flips),
        ]
    )
    header = [
        "values exchanged",
        "model: change",
        "circuit: change",
        "model: flips",
        "circuit: flips",
    ]
    return table(header, rows)


def _exchanged_nodes_table(measured: Interchange) -> str:
    largest = sorted(measured.nodes, key=lambda node: -abs(node.other_answer.model.change.value))[
        :MOST_ROWS
    ]
    rows = []
    for node in largest:
        same = node.same_answer
        rows.append(
            [
                node.node,
                estimate(node.other_answer.model.change),
                estimate(node.other_answer.circuit.change),
                estimate(None if same is None else same.model.size),
                estimate(None if same is None else same.circuit.size),
            ]
        )
    header = [
        "node alone",
        "model: other",
        "circuit: other",
        "model: same, size",
        "circuit: same, size",
    ]
    return table(header, rows)
