"""The explanation of a circuit, and its program, as its page shows them."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from tl_sparse.arguments import checked
from tl_sparse.circuits import Circuit, hash_of_circuit
from tl_sparse.errors import CircuitError, ConfigError, UnsupportedError, counted, warn_user
from tl_sparse.explanations import (
    EXPLAINED,
    EXPLANATION_JSON,
    Explanation,
    HeadExplanation,
    NodeExplanation,
)
from tl_sparse.hooks import TLModel
from tl_sparse.programs import PythonProgram
from tl_sparse.view.limits import LIMITS

#: What stands in place of the source of a circuit that is too large to be read.
TOO_LARGE = "This circuit has too many nodes for a program that can be read"


@checked()
def explanation_of(
    circuit: Circuit, explanation: Explanation | str | Path | None, source: str
) -> Explanation | None:
    """The explanation that a page shows; None if there is none.

    Args:
        circuit: the circuit of the page.
        explanation: its explanation, or the file; None means the one in the circuit's folder.
        source: the folder or repository of the circuit.

    Raises:
        CheckpointError: if the given file is missing or damaged.
        CircuitError: if the given explanation is of another circuit.
    """
    if explanation is None:
        found = Path(source, EXPLANATION_JSON)
        if not source or not found.is_file():
            return None
        explanation = Explanation.load(found)
        if not _belongs(explanation, circuit):
            warn_user(f"there is no explanation to show: {found} is of another circuit")
            return None
    if not isinstance(explanation, Explanation):
        explanation = Explanation.load(explanation)
    if not _belongs(explanation, circuit):
        raise CircuitError(
            "the given explanation is of another circuit; `circuit.explain` makes a new one"
        )
    return explanation


def _belongs(explanation: Explanation, circuit: Circuit) -> bool:
    return explanation.contents.get("circuit") == hash_of_circuit(circuit)


def program_of(
    circuit: Circuit, model: TLModel, candidates: list[int], explanation: Explanation | None
) -> PythonProgram | None:
    """The program of a circuit; None if it cannot be compiled.

    Args:
        candidates: the tokens whose logits it computes; all of them if there are none.
        explanation: gives names to the variables, unless one of them cannot be a variable.
    """
    tokens = candidates or None
    try:
        if explanation is None:
            return circuit.to_python(model, tokens)
        try:
            return circuit.to_python(model, tokens, explanation.names)
        except ConfigError:
            return circuit.to_python(model, tokens)
    except (UnsupportedError, CircuitError):
        return None


def program_to_show(
    circuit: Circuit, model: TLModel, candidates: list[int], explanation: Explanation | None
) -> dict[str, Any] | None:
    """The program as JSON values; None if the circuit cannot be compiled."""
    if circuit.n_nodes > LIMITS.program_nodes:
        about = f"{TOO_LARGE}; circuit.to_python(model).save(folder) writes it."
        return {"about": about, "source": ""}
    program = program_of(circuit, model, candidates, explanation)
    if program is None:
        return None
    whose = "the two answers" if candidates else "all tokens"
    about = (
        f"The whole circuit as Python that needs NumPy alone; it computes the logits of {whose}. "
        "circuit.to_python(model).save(folder) writes it with its tables."
    )
    return {"about": about, "source": program.source}


def explanation_to_show(explanation: Explanation) -> dict[str, Any]:
    """An explanation as JSON values."""
    n_explained = sum(node.is_explained for node in explanation.nodes)
    held_out = counted(explanation.n_pairs, "pair")
    if explanation.n_rows:
        held_out += f" and {counted(explanation.n_rows, 'row')} of text"
    about = (
        f"An expression over the tokens for each node, found by search. {n_explained} of "
        f"{counted(len(explanation.nodes), 'node')} are explained to {EXPLAINED} or more on "
        f"{held_out}, all held out: the explained variance or, for nodes with two levels, the "
        "balanced accuracy (acc.). The losses are the circuit's while the node has the value of "
        "its expression, and while it is held at its mean; ± is one standard error. Pin a node for "
        "the whole of a long expression."
    )
    measured = {
        "full model": explanation.model_alone,
        "circuit": explanation.circuit_alone,
        "circuit, all nodes by their expressions": explanation.all_replaced,
        "circuit, all nodes at their means": explanation.nothing_kept,
    }
    replaced = []
    for what, of_these in measured.items():
        replaced.append({"what": what, **asdict(of_these)})
    return {
        "about": about,
        "replaced": replaced,
        "nodes": [_node_values(node) for node in explanation.nodes],
        "heads": [_head_text(head) for head in explanation.heads],
    }


def _node_values(node: NodeExplanation) -> dict[str, Any]:
    return {
        "node": node.node,
        "name": node.name,
        "expression": node.expression,
        "origin": node.origin,
        "is_explained": node.is_explained,
        "text": None if node.text is None else asdict(node.text),
        "prompts": asdict(node.prompts),
        "in_circuit": asdict(node.in_circuit.loss),
        "in_model": asdict(node.in_model.loss),
        "held_in_circuit": asdict(node.held_in_circuit.loss),
        "held_in_model": asdict(node.held_in_model.loss),
    }


def _head_text(head: HeadExplanation) -> str:
    return (
        f"Head {head.layer}.{head.head}, {head.phrase}: {head.covered:.0%} of its attention to "
        f"tokens ({head.evenly:.0%} if it were even); {head.nothing:.0%} is to nothing."
    )
