# The circuit of single_double_quote in tiny-python-sparse: 18 nodes, 12 edges.
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
    # The columns are "')" (274), '")' (284).
    tokens = checked_tokens(tokens, 768, 128)
    n = len(tokens)
    position = np.arange(n)

    # The residual stream: resid[c] is its channel c.
    resid = np.zeros((128, n))
    resid[62] = TABLES["resid_62"][tokens]
    resid[69] = TABLES["resid_69"][tokens]
    resid[104] = TABLES["resid_104"][tokens]

    # Block 0, attention.
    # highest: ' if' 13.1, 'if' 12.8, 'elif' 8.69; lowest: '("' -7.26, 'for' -5.36, ' True:\n' -3.9;
    # prompts differ in '("' -7.26
    # → value_open_paren_double_quote_2
    read_open_paren_double_quote = read_by_token("0.attn_in 32", tokens, position)
    # highest: 'put' 16.6, 'import' 10.9, ' +' 6.61; lowest: '("' -12.6, " '" -11.6, ' "' -11.5;
    # prompts differ in '("' -12.6, "('" -11.2
    # → key_open_paren_double_quote
    read_open_paren_double_quote_2 = read_by_token("0.attn_in 37", tokens, position)
    # highest: 'cess' 15.8, 'bo' 14.1, ' the' 12.2; lowest: 'ity' -17.3, 'forest' -17.3, 'field'
    # -17.3
    read_city = read_by_token("0.attn_in 64", tokens, position)  # → query_city
    # highest: 'send' 13, "('" 12.8, ']]' 9; lowest: '.t' -24.3, '_list' -23.7, '>' -15.3; prompts
    # differ in "('" 12.8, '("' 4.86
    # → value_open_paren_double_quote
    read_open_paren_double_quote_3 = read_by_token("0.attn_in 78", tokens, position)
    # highest: ':' 9.84, ' if' 9.62, 'in' 8.95; lowest: 'rate' -14.6, '@' -14.3, "}')" -12.2;
    # prompts differ in '("' -2.47
    # → value_open_paren_double_quote_2
    read_open_paren_double_quote_4 = read_by_token("0.attn_in 112", tokens, position)
    read_position = read_by_position("0.attn_in p8", tokens, position)  # → key_position
    # → query_position, key_position
    read_position_2 = read_by_position("0.attn_in p10", tokens, position)
    reads = [
        read_open_paren_double_quote, read_open_paren_double_quote_2, read_city,
        read_open_paren_double_quote_3, read_open_paren_double_quote_4, read_position,
        read_position_2
    ]
    query_position = 1.26199149539 + 0.3847516179085 * read_position_2  # → pattern_0_h3
    query_city = -0.360870355123 + 0.2564604878426 * read_city  # → pattern_0_h3
    # In prompts, this is 0 at 17%, 63% of the positions.
    [query_position, query_city] = after_contest(
        18, [query_position, query_city], "0.attn_q", reads, position
    )
    # → pattern_0_h3
    key_position = (
        1.401089825494
        - 0.3781191110611 * read_position
        + 0.1984199285507 * read_position_2
    )
    # → pattern_0_h3
    key_open_paren_double_quote = (
        -0.4627018300585
        + 0.2125238180161 * read_open_paren_double_quote_2
    )
    # In prompts, this is 0 at 0%, 78% of the positions.
    [key_position, key_open_paren_double_quote] = after_contest(
        14, [key_position, key_open_paren_double_quote], "0.attn_k", reads, position
    )
    # → z_of_value_open_paren_double_quote
    value_open_paren_double_quote = (
        0.08527346208502
        + 0.2660354673862 * read_open_paren_double_quote_3
    )
    # → z_of_value_open_paren_double_quote_2
    value_open_paren_double_quote_2 = (
        0.06925047557744
        + 0.2675996720791 * read_open_paren_double_quote
        + 0.3098629713058 * read_open_paren_double_quote_4
    )
    # In prompts, this is 0 at 76%, 88% of the positions.
    [value_open_paren_double_quote, value_open_paren_double_quote_2] = after_contest(
        11, [value_open_paren_double_quote, value_open_paren_double_quote_2], "0.attn_v", reads,
        position
    )
    # The constant comes from held queries and keys.
    pattern_0_h3 = attention_pattern(
        0.25 * np.outer(query_position, key_position)
        + 0.25 * np.outer(query_city, key_open_paren_double_quote)
        + 4.743258770968,
        sink=-1.853967189789
    )
    z_of_value_open_paren_double_quote = pattern_0_h3 @ value_open_paren_double_quote
    z_of_value_open_paren_double_quote_2 = pattern_0_h3 @ value_open_paren_double_quote_2
    pattern_sum_0_h3 = pattern_0_h3.sum(-1)
    # → resid[62]
    write_open_paren_double_quote = (
        TABLES["0.attn_out 62 bias"][position]
        - 0.2712031602859 * z_of_value_open_paren_double_quote
    )
    # → resid[69]
    write_open_paren_double_quote_2 = (
        TABLES["0.attn_out 69 bias"][position]
        + 0.2841485142708 * z_of_value_open_paren_double_quote_2
    )
    # In prompts, this is 0 at 44%, 61% of the positions.
    [write_open_paren_double_quote, write_open_paren_double_quote_2] = after_contest(
        31, [write_open_paren_double_quote, write_open_paren_double_quote_2], "0.attn_out",
        [z_of_value_open_paren_double_quote, z_of_value_open_paren_double_quote_2,
        pattern_sum_0_h3], position
    )
    resid[62] += write_open_paren_double_quote
    resid[69] += write_open_paren_double_quote_2

    # Block 1, MLP.
    resid[69] -= 0.00096393894637
    resid[104] -= 0.000599989289185
    scale = root_mean_square(resid, TABLES["1.mlp_in squares"][tokens], 1.1920928955078125e-07)
    # → neuron_open_paren_double_quote
    mlp_read_open_paren_double_quote = 2.420737266541 * resid[62] / scale
    # In prompts, this is 0 at 54% of the positions.
    [mlp_read_open_paren_double_quote] = read_after_contest(
        19, [mlp_read_open_paren_double_quote], "1.mlp_in", resid, scale, tokens, position
    )
    # → mlp_write_open_paren_double_quote
    neuron_open_paren_double_quote = gelu(
        -1.271891112948
        - 0.4470014572144 * mlp_read_open_paren_double_quote
    )
    # In prompts, this is 0 at 77% of the positions.
    [neuron_open_paren_double_quote] = after_contest(
        12, [neuron_open_paren_double_quote], "1.mlp_neuron", [mlp_read_open_paren_double_quote],
        position, gelu
    )
    # → resid[104]
    mlp_write_open_paren_double_quote = (
        0.03709408503284
        + 0.2968550920486 * neuron_open_paren_double_quote
    )
    # In prompts, this is 0 at 79% of the positions.
    [mlp_write_open_paren_double_quote] = after_contest(
        5, [mlp_write_open_paren_double_quote], "1.mlp_out", [neuron_open_paren_double_quote],
        position
    )
    resid[104] += mlp_write_open_paren_double_quote

    # The logits. others_… is what held channels add to them by token.
    resid[62] -= 0.05313611775637
    resid[69] -= 9.39635992836e-06
    scale = root_mean_square(resid, TABLES["logits squares"][tokens], 1.1920928955078125e-07)
    logit_274 = (
        (1.430447177566 * resid[69]
        + TABLES["others_274"][tokens]) / scale
        + TABLES["bigram_274"][tokens]
    )
    logit_284 = (
        (-0.6337288848986 * resid[69]
        - 0.8079430791498 * resid[104]
        + TABLES["others_284"][tokens]) / scale
        + TABLES["bigram_284"][tokens]
    )
    return np.stack([logit_274, logit_284], axis=-1)


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
