"""What the Python source of a circuit calls; each function is copied into the sources that need it.

They are written for readers of those files: plain NumPy, with one axis for positions, the last one.
"""

import math
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

#: The arrays in the .npz file of a source, in which this name stands for them.
TABLES: dict[str, Array] = {}


def checked_tokens(tokens: Any, d_vocab: int, n_ctx: int) -> Array:
    """The tokens as an array of one axis, if they are one sequence that fits the model."""
    tokens = np.asarray(tokens)
    shape = tokens.shape
    if tokens.ndim == 2 and len(tokens) == 1:
        tokens = tokens[0]
    if tokens.ndim != 1 or len(tokens) == 0 or tokens.dtype.kind not in "iu":
        raise ValueError(
            "tokens must be one sequence of at least one token id, not an array of shape "
            f"{list(shape)} of {tokens.dtype}"
        )
    if len(tokens) > n_ctx:
        raise ValueError(f"{len(tokens)} tokens do not fit the context of {n_ctx}")
    if tokens.min() < 0 or tokens.max() >= d_vocab:
        raise ValueError(f"tokens must be in [0, {d_vocab})")
    return tokens


def lookup(values: dict[int, float], tokens: Array, other: float) -> Array:
    """The value of each token; `other` for tokens that are not among `values`."""
    return np.array([values.get(token, other) for token in tokens.tolist()])


def read_by_token(node: str, tokens: Array, position: Array) -> Array:
    """A channel that depends on the token, where AbsTopK keeps it beside the positional ones."""
    location = node.split()[0]
    values = TABLES[node][tokens]
    least = TABLES[f"{location} largest by position"]
    limits = TABLES[f"{node} limits"][tokens]
    return np.where(abs(values) >= least[position, limits], values, 0.0)


def read_by_position(node: str, tokens: Array, position: Array) -> Array:
    """A positional channel, where AbsTopK keeps it beside those that depend on the token."""
    location = node.split()[0]
    values = TABLES[node][position]
    least = TABLES[f"{location} largest by token"]
    limits = TABLES[f"{node} limits"][position]
    return np.where(abs(values) >= least[tokens, limits], values, 0.0)


def abs_topk(k: int, values: Array, *others: Array) -> Array:
    """The values, with 0 where they are not among the k largest magnitudes of all at a position."""
    competing = [values]
    for other in others:
        competing.append(np.broadcast_to(other, (len(other), values.shape[1])))
    order = np.argsort(-abs(np.concatenate(competing)), axis=0, kind="stable")
    is_kept = np.zeros(order.shape, dtype=bool)
    np.put_along_axis(is_kept, order[:k], True, axis=0)
    return np.where(is_kept[: len(values)], values, 0.0)


def after_contest(
    k: int,
    nodes: list[Array],
    location: str,
    sources: list[Array],
    position: Array,
    act: Any = None,
) -> Array:
    """The nodes after AbsTopK, in which the other channels at their location compete with them.

    Most of these are constants. The others depend on the same sources as the nodes.
    """
    others = []
    if f"{location} rivals" in TABLES:
        others.append(by_position(TABLES[f"{location} rivals"], position))
    if f"{location} weights of rivals" in TABLES:
        biases = by_position(TABLES[f"{location} biases of rivals"], position)
        values = TABLES[f"{location} weights of rivals"] @ np.stack(sources) + biases
        others.append(act(values) if act is not None else values)
    return abs_topk(k, np.stack(nodes), *others)


def by_position(constants: Array, position: Array) -> Array:
    """Constants [channel, 1] as they are, and those that depend on the position there."""
    return constants if constants.shape[1] == 1 else constants[:, position]


def read_after_contest(
    k: int,
    nodes: list[Array],
    location: str,
    resid: Array,
    scale: Array,
    tokens: Array,
    position: Array,
) -> Array:
    """What is read from resid, after AbsTopK, in which all other channels compete."""
    others = []
    if f"{location} rivals" in TABLES:
        others.append(TABLES[f"{location} rivals"][tokens].T / scale)
    if f"{location} rivals in resid" in TABLES:
        weights = TABLES[f"{location} weights of rivals"]
        biases = TABLES[f"{location} biases of rivals"]
        others.append(weights * resid[TABLES[f"{location} rivals in resid"]] / scale + biases)
    if f"{location} positional rivals" in TABLES:
        others.append(TABLES[f"{location} positional rivals"][position].T)
    return abs_topk(k, np.stack(nodes), *others)


def root_mean_square(resid: Array, others: Array | float, eps: float) -> Array:
    """What a norm divides by; `others` is the sum of squares of channels that are not in resid."""
    return np.sqrt(((resid**2).sum(0) + others) / len(resid) + eps)


def attention_pattern(scores: Array, sink: float | None = None) -> Array:
    """How much each position (row) looks at each earlier one and itself (column).

    A sink takes a share of its own, so the rows then sum to less than 1.
    """
    later = np.triu(np.ones(scores.shape, dtype=bool), 1)
    scores = np.where(later, -np.inf, scores)
    largest = scores.max(-1, keepdims=True)
    if sink is not None:
        largest = np.maximum(largest, sink)
    shares = np.exp(scores - largest)
    total = shares.sum(-1, keepdims=True)
    if sink is not None:
        total = total + np.exp(sink - largest)
    return shares / total


def gelu(x: Array) -> Array:
    """The exact GELU."""
    erf = np.vectorize(math.erf, otypes=[float])
    return 0.5 * x * (1.0 + erf(x / math.sqrt(2.0)))


def relu(x: Array) -> Array:
    """0 where x is negative."""
    return np.maximum(x, 0.0)
