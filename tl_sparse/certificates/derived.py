"""Numbers that follow from what the sections measured."""

from tl_sparse.certificates.thresholds import TOLD_APART
from tl_sparse.evaluation import Interchange, Minimality, Without


def slope_of(measured: Interchange) -> float | None:
    """By how much interchange effects under the circuit are smaller or larger than in the model.

    It is the slope through the origin of the circuit's effects over the model's, of which there is
    one for each node: Σ model · circuit / Σ model². None if no node has an effect in the model.
    """
    products = 0.0
    squares = 0.0
    for node in measured.nodes:
        of_model = node.other_answer.model.change.value
        of_circuit = node.other_answer.circuit.change.value
        products += of_model * of_circuit
        squares += of_model**2
    return products / squares if squares else None


def knows_answers(without: Without) -> bool | None:
    """Whether the model without the circuit still tells prompts with the two answers apart.

    None if it seems to, but on so few pairs that this may be chance.
    """
    if without.told_apart.value <= TOLD_APART:
        return False
    return True if without.p_knows_nothing.is_significant else None


def idle_parts(measured: Minimality) -> list[str]:
    """The parts whose effect cannot be told from noise, or from that of random parts."""
    idle = {*measured.indistinct, *measured.superfluous}
    return [part.name for part in measured.parts if part.name in idle]
