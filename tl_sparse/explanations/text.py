"""An explanation as text."""

from tl_sparse.arguments import checked
from tl_sparse.errors import counted
from tl_sparse.explanations.measures import EXPLAINED, Fit
from tl_sparse.explanations.record import (
    Explanation,
    HeadExplanation,
    NodeExplanation,
    Swapped,
    shortened,
)
from tl_sparse.parsing import printable
from tl_sparse.tasks import table

#: Longer expressions are cut short in the text; the record has them whole.
LONGEST = 300


@checked()
def explanation_text(explanation: Explanation) -> str:
    """An explanation as text: the whole circuit, then node after node, then the heads."""
    parts = [_head(explanation), _table(explanation)]
    parts += [_node(node) for node in explanation.nodes]
    if explanation.heads:
        parts.append("\n".join(_attention(head) for head in explanation.heads))
    if explanation.swapped is not None:
        parts.append(_swapped(explanation.swapped))
    if explanation.no_text:
        parts.append(f"There is no text: {explanation.no_text}")
    return "\n\n".join(parts)


def _head(explanation: Explanation) -> str:
    title = f"Explanation: {printable(explanation.task)} in {printable(explanation.model)}"
    if not explanation.nodes:
        return f"{title}\n{'=' * len(title)}\n\nThe circuit has no nodes to explain."
    n_explained = sum(node.is_explained for node in explanation.nodes)
    held_out = counted(explanation.n_pairs, "pair")
    if explanation.n_rows:
        held_out += f" and {counted(explanation.n_rows, 'row')} of text"
    lines = [
        title,
        "=" * len(title),
        "",
        f"{n_explained} of {counted(len(explanation.nodes), 'node')} are explained to "
        f"{EXPLAINED:.1f} or more on {held_out}, all of them held out. Explained is the lower of "
        "text and prompts: explained variance or, for nodes with two levels, balanced accuracy.",
    ]
    return "\n".join(lines)


def _table(explanation: Explanation) -> str:
    rows = []
    for label, measured in (
        ("full model", explanation.model_alone),
        ("circuit", explanation.circuit_alone),
        ("circuit, all nodes by their expressions", explanation.all_replaced),
        ("circuit, all nodes at their means", explanation.nothing_kept),
    ):
        rows.append([label, str(measured.loss), str(measured.accuracy)])
    return table(["", "loss", "accuracy"], rows)


def _node(node: NodeExplanation) -> str:
    verdict = "" if node.is_explained else f" – not explained to {EXPLAINED:.1f}"
    origin = " (your own)" if node.origin == "own" else ""
    scores = f"prompts {_fit(node.prompts)}"
    if node.text is not None:
        scores = f"text {_fit(node.text)}, {scores}"
    lines = [
        f"{node.name} = {shortened(node.expression, LONGEST)}",
        f"    {node.node}{origin}: size {node.size}, depends on {node.depends_on}; "
        f"{scores}{verdict}",
        f"    one number on each side of a threshold explains {node.levels.explained:.2f}; "
        f"replaced, the loss is {node.in_circuit.loss.value:.3f} in the circuit and "
        f"{node.in_model.loss.value:.3f} in the model (at its mean "
        f"{node.held_in_circuit.loss.value:.3f} and {node.held_in_model.loss.value:.3f})",
    ]
    return "\n".join(lines)


def _fit(fit: Fit) -> str:
    if fit.balanced_accuracy is not None:
        return f"{fit.balanced_accuracy:.3f} (accuracy)"
    return "does not vary" if fit.explained is None else f"{fit.explained:.3f}"


def _attention(head: HeadExplanation) -> str:
    text = (
        f"head {head.layer}.{head.head}, {printable(head.phrase)}: {head.covered:.0%} of its "
        f"attention to tokens ({head.evenly:.0%} if it were even); {head.nothing:.0%} is to nothing"
    )
    if head.overlap is not None:
        text += f". Its pattern and that of the expressions overlap by {head.overlap:.0%}"
    return text


def _swapped(swapped: Swapped) -> str:
    rise = swapped.swapped / swapped.model - 1
    return (
        f"With the patterns of the expressions in {counted(swapped.n_heads, 'head')} of "
        f"{swapped.n_all_heads} of the full model, perplexity on text is {swapped.swapped:.3f} "
        f"instead of {swapped.model:.3f} ({rise:+.1%}); {swapped.evenly:.3f} with even attention, "
        f"{swapped.held:.3f} with their outputs at their means"
    )
