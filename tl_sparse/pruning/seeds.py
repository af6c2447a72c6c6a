"""The seeds of a search: one for each purpose, so that nothing random is the same twice.

They are far from each other and from the search's own seed, with which pairs are drawn and gates
start, and with which the circuit may be judged afterwards.
"""

#: From one seed to the next. The first ones, up to the opponent's, are of batches of subsets.
_STEP = 2**20
_OPPONENT = 63
_FIRST_ATTACK = 64


def seed_of_batch(seed: int, batch: int) -> int:
    """The seed of a batch of random subsets, of which there are a few dozen."""
    return seed + (1 + batch) * _STEP


def seed_of_opponent(seed: int) -> int:
    """The seed of the adversary that is met while gates are learned."""
    return seed + _OPPONENT * _STEP


def seed_of_attack(seed: int, attack: int) -> int:
    """The seed of a fresh adversary, the number of which counts from 0."""
    return seed + (_FIRST_ATTACK + attack) * _STEP
