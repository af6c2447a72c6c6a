# The circuit of with_as in tiny-python-sparse: 19 nodes, 11 edges.
"""A circuit as a program.

It computes the logits that the model has while all other nodes are held at their means. Each node
has one statement, and → says what is computed from it. Variables have one entry for each position.
Tables by token or position are in the .npz file beside this one, and so is what competes with the
nodes in AbsTopK.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray
TABLES = dict(np.load(Path(__file__).with_suffix(".npz")))


def logits(tokens: Any) -> Array:
    """The logits after each token, [pos, logit]."""
    # The columns are '\n' (198), ' as' (303).
    tokens = checked_tokens(tokens, 768, 128)
    n = len(tokens)
    position = np.arange(n)

    # The residual stream: resid[c] is its channel c.
    resid = np.zeros((128, n))
    resid[36] = TABLES["resid_36"][tokens]
    resid[49] = TABLES["resid_49"][tokens]
    resid[70] = TABLES["resid_70"][tokens]
    resid[121] = TABLES["resid_121"][tokens]

    # Block 0, attention.
    # highest: '")' 15.5, "')" 14.4, '}")' 11.5; lowest: 'parts' -17, 'points' -16.9, 'records'
    # -16.6
    read_underscore = TABLES["0.attn_in 40"][tokens]  # → query_underscore
    # highest: '6' 16.4, '3' 16.3, '2' 15.7; lowest: '\\' -16.7, 'with' -12.4, ' __init__' -11.6
    read_1 = read_by_token("0.attn_in 48", tokens, position)  # → key_1
    # highest: '.json' 16.7, '.csv' 16.7, '.py' 16.6; lowest: 'cl' -17.6, 'ou' -17.2, 'ers' -11.2
    read_cl = read_by_token("0.attn_in 79", tokens, position)  # → value_cl
    # highest: '.value' 14.2, ' range' 12.2, ' current' 8.82; lowest: 'while' -11.4, 'with' -9.24,
    # '):\n' -8.64
    read_range = read_by_token("0.attn_in 110", tokens, position)  # → value_range
    read_position = read_by_position("0.attn_in p7", tokens, position)  # → key_position
    reads = [read_underscore, read_1, read_cl, read_range, read_position]
    query_underscore = 2.034232418463 + 0.1658392548561 * read_underscore  # → pattern_0_h7
    # In prompts, this is 0 at 1% of the positions.
    [query_underscore] = after_contest(7, [query_underscore], "0.attn_q", reads, position)
    key_1 = -0.1643080710091 - 0.2304833233356 * read_1  # → pattern_0_h7
    key_position = -2.801084051176 + 0.4356084764004 * read_position  # → pattern_0_h7
    # In prompts, this is 0 at 75%, 11% of the positions.
    [key_1, key_position] = after_contest(12, [key_1, key_position], "0.attn_k", reads, position)
    value_range = 0.05839899029064 - 0.3143912255764 * read_range  # → z_of_value_range
    value_cl = -0.02549655308767 - 0.3186772763729 * read_cl  # → z_of_value_cl
    # In prompts, this is 0 at 92%, 81% of the positions.
    [value_range, value_cl] = after_contest(
        11, [value_range, value_cl], "0.attn_v", reads, position
    )
    # The constant comes from held queries and keys.
    pattern_0_h7 = attention_pattern(
        0.25 * np.outer(query_underscore, key_1)
        - 1.413914084435 * key_position
        + 0.4229926849225,
        sink=-1.785631537437
    )
    z_of_value_range = pattern_0_h7 @ value_range
    z_of_value_cl = pattern_0_h7 @ value_cl
    pattern_sum_0_h7 = pattern_0_h7.sum(-1)
    # → resid[36]
    write_range = TABLES["0.attn_out 36 bias"][position] + 0.3612387180328 * z_of_value_range
    # → resid[49]
    write_cl = TABLES["0.attn_out 49 bias"][position] - 0.2095638811588 * z_of_value_cl
    # In prompts, this is 0 at 20%, 2% of the positions.
    [write_range, write_cl] = after_contest(
        32, [write_range, write_cl], "0.attn_out", [z_of_value_range, z_of_value_cl,
        pattern_sum_0_h7], position
    )
    resid[36] += write_range
    resid[49] += write_cl

    # Block 0, MLP.
    resid[70] -= 0.005672920495272
    scale = root_mean_square(resid, TABLES["0.mlp_in squares"][tokens], 1.1920928955078125e-07)
    # → only the AbsTopK of other nodes
    mlp_read_open_paren_double_quote = TABLES["0.mlp_in 35"][tokens] / scale
    # → neuron_double_quote_close_paren
    mlp_read_double_quote_close_paren = TABLES["0.mlp_in 40"][tokens] / scale
    mlp_read_return = 1.9988104105 * resid[49] / scale  # → neuron_return
    # In prompts, this is 0 at 82%, 87%, 3% of the positions.
    [
        mlp_read_open_paren_double_quote, mlp_read_double_quote_close_paren, mlp_read_return
    ] = read_after_contest(
        22, [mlp_read_open_paren_double_quote, mlp_read_double_quote_close_paren, mlp_read_return],
        "0.mlp_in", resid, scale, tokens, position
    )
    neuron_return = gelu(-0.3219320211613 + 0.2842264175415 * mlp_read_return)  # → mlp_write_return
    # → mlp_write_double_quote_close_paren
    neuron_double_quote_close_paren = gelu(
        -0.5354620463544
        + 0.3200285434723 * mlp_read_double_quote_close_paren
    )
    # In prompts, this is 0 at 6%, 5% of the positions.
    [neuron_return, neuron_double_quote_close_paren] = after_contest(
        29, [neuron_return, neuron_double_quote_close_paren], "0.mlp_neuron",
        [mlp_read_open_paren_double_quote, mlp_read_double_quote_close_paren, mlp_read_return],
        position, gelu
    )
    # → resid[70]
    mlp_write_double_quote_close_paren = (
        -0.01395065223662
        + 0.1935275644064 * neuron_double_quote_close_paren
    )
    mlp_write_return = -0.1173403987149 + 0.2372938245535 * neuron_return  # → resid[121]
    # In prompts, this is 0 at 5%, 12% of the positions.
    [mlp_write_double_quote_close_paren, mlp_write_return] = after_contest(
        3, [mlp_write_double_quote_close_paren, mlp_write_return], "0.mlp_out", [neuron_return,
        neuron_double_quote_close_paren], position
    )
    resid[70] += mlp_write_double_quote_close_paren
    resid[121] += mlp_write_return

    # The logits. others_… is what held channels add to them by token.
    resid[36] -= 0.03447246571174
    resid[49] += 0.02181301824749
    resid[70] -= 0.1502646282315
    resid[121] -= 0.1167685389519
    scale = root_mean_square(resid, TABLES["logits squares"][tokens], 1.1920928955078125e-07)
    logit_198 = (
        (-1.063719455047 * resid[36]
        + 1.190992007128 * resid[70]
        + TABLES["others_198"][tokens]) / scale
        + TABLES["bigram_198"][tokens]
    )
    logit_303 = (
        (1.600216471696 * resid[121]
        + TABLES["others_303"][tokens]) / scale
        + TABLES["bigram_303"][tokens]
    )
    return np.stack([logit_198, logit_303], axis=-1)


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


def by_position(constants: Array, position: Array) -> Array:
    """Constants [channel, 1] as they are, and those that depend on the position there."""
    return constants if constants.shape[1] == 1 else constants[:, position]


def abs_topk(k: int, values: Array, *others: Array) -> Array:
    """The values, with 0 where they are not among the k largest magnitudes of all at a position."""
    competing = [values]
    for other in others:
        competing.append(np.broadcast_to(other, (len(other), values.shape[1])))
    order = np.argsort(-abs(np.concatenate(competing)), axis=0, kind="stable")
    is_kept = np.zeros(order.shape, dtype=bool)
    np.put_along_axis(is_kept, order[:k], True, axis=0)
    return np.where(is_kept[: len(values)], values, 0.0)


def gelu(x: Array) -> Array:
    """The exact GELU."""
    erf = np.vectorize(math.erf, otypes=[float])
    return 0.5 * x * (1.0 + erf(x / math.sqrt(2.0)))
