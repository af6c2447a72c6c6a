"""Where a circuit is false: what its certificate found against it, in plain words."""

from collections.abc import Callable, Mapping
from typing import Any

from tl_sparse.certificates.derived import idle_parts, knows_answers, slope_of
from tl_sparse.certificates.layout import listed
from tl_sparse.certificates.record import Certificate
from tl_sparse.certificates.sufficient import Sufficiency, limit_in_words
from tl_sparse.certificates.thresholds import (
    FOLLOWS,
    LARGEST_SLOPE,
    LOST,
    RESTS_ON_LUCK,
    SPARED,
    SURER,
    WITHSTOOD,
)
from tl_sparse.errors import counted
from tl_sparse.evaluation import (
    Inside,
    Interchange,
    Likeness,
    Minimality,
    Necessity,
    Specificity,
)


def findings(certificate: Certificate) -> dict[str, list[str]]:
    """Section → the sentences against the circuit, of the sections that have some."""
    found = {}
    for section, against in _AGAINST.items():
        measured = getattr(certificate, section)
        sentences = [] if measured is None else against(measured)
        if sentences:
            found[section] = sentences
    return found


def _sufficiency(measured: Sufficiency) -> list[str]:
    if measured.alone.loss > WITHSTOOD:
        return [f"Alone the circuit does not do the task: its loss is {measured.alone.loss:.2f}."]
    sentences = []
    worst = measured.subsets.worst
    if worst.loss > WITHSTOOD:
        what_it_means = "."
        if worst.loss > RESTS_ON_LUCK * measured.alone.loss:
            what_it_means = ": the circuit rests on errors that cancel."
        sentences.append(
            f"With {measured.subsets.worst_share:.0%} of all nodes left as they are the loss is "
            f"{worst.loss:.2f}{what_it_means}"
        )
    broken = [each for each in measured.attacks if each.adversary.score.loss > WITHSTOOD]
    if broken:
        adversary = broken[0].adversary
        sentences.append(
            f"An adversary with {limit_in_words(adversary.budget)} raises the loss to "
            f"{adversary.score.loss:.2f} (accuracy {adversary.score.accuracy:.0%}) by leaving "
            f"{counted(adversary.n_left, 'node')} as they are."
        )
    evaluation = measured.evaluation
    otherwise = {"at their means": evaluation.circuit, "at zero": evaluation.zero}
    if evaluation.resample is not None:
        otherwise["as on another prompt"] = evaluation.resample
    for name, score in otherwise.items():
        if score.loss > WITHSTOOD:
            sentences.append(f"With all other nodes {name} the loss is {score.loss:.2f}.")
    return sentences


def _likeness(measured: Likeness) -> list[str]:
    sentences = []
    circuit, nothing = measured.task.circuit.value, measured.task.no_nodes.value
    if circuit >= nothing:
        sentences.append(
            f"Among all tokens the circuit is no nearer to the model ({circuit:.2f} nats) than no "
            f"nodes at all ({nothing:.2f})."
        )
    within = measured.logits.within_answers
    if within is not None and within.value < SURER:
        sentences.append(
            "It is not surer where the model is surer: within answers the correlation of the logit "
            f"differences is {within.value:.2f}."
        )
    return sentences


def _inside(measured: Inside) -> list[str]:
    sentences = []
    median = measured.summary.median_correlation
    if median is not None and median < FOLLOWS:
        sentences.append(
            f"Half of its nodes follow their value in the model with a correlation below "
            f"{median:.2f}."
        )
    for head in measured.heads:
        if head.attends_otherwise:
            sentences.append(f"Head {head.head} of layer {head.layer} {head.remark}.")
    return sentences


def _interchange(measured: Interchange) -> list[str]:
    sentences = []
    slope = slope_of(measured)
    if slope is not None and not 1 / LARGEST_SLOPE <= slope <= LARGEST_SLOPE:
        how = "only " if 0 <= slope < 1 else ""
        sentences.append(
            f"Values from prompts with the other answer move the circuit {how}{slope:.2f} times as "
            "far as they move the model."
        )
    correlation = measured.correlation
    if correlation is not None and correlation.value < FOLLOWS:
        sentences.append(
            "Which nodes matter under the circuit is not which matter in the model: over nodes the "
            f"correlation of the effects is {correlation.value:.2f}."
        )
    return sentences


def _necessity(measured: Necessity) -> list[str]:
    sentences = []
    for without in (measured.mean, measured.resample):
        if without is not None and knows_answers(without):
            sentences.append(
                f"Without the circuit ({without.ablation} ablation) the model still tells "
                f"{without.told_apart.value:.0%} of the pairs apart: other parts know the answer."
            )
    return sentences


def _minimality(measured: Minimality) -> list[str]:
    idle = idle_parts(measured)
    if not idle:
        return []
    return [
        f"{len(idle)} of {counted(len(measured.parts), 'part')} cannot be told from noise, or from "
        f"random parts: {listed(idle)}."
    ]


def _specificity(measured: Specificity) -> list[str]:
    sentences = []
    if measured.own.rise.value < LOST:
        sentences.append(
            f"Its own task loses only {measured.own.rise.value:.2f} without the circuit."
        )
    if measured.mean_rise is not None and measured.mean_random_rise is not None:
        more = measured.mean_rise.value - measured.mean_random_rise.value
        if more > SPARED:
            sentences.append(
                f"Other tasks lose {more:.2f} more without it than without random nodes."
            )
    return sentences


#: Section → the function that finds what speaks against the circuit in the section's record.
_AGAINST: Mapping[str, Callable[[Any], list[str]]] = {
    "sufficiency": _sufficiency,
    "likeness": _likeness,
    "inside": _inside,
    "interchange": _interchange,
    "necessity": _necessity,
    "minimality": _minimality,
    "specificity": _specificity,
}
