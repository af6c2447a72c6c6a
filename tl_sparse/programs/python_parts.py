"""The blocks and the logits of a compiled circuit as statements of Python.

The statements compute what the parts compute, in the same order, for one sequence of tokens. Their
variables have one entry for each position.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tl_sparse.programs.blocks import MLP, Attention, Block, ByHead, Heads
from tl_sparse.programs.channels import Channels
from tl_sparse.programs.compiled import CompiledCircuit
from tl_sparse.programs.numpy_functions import Array
from tl_sparse.programs.python_stream import StreamWriter, array
from tl_sparse.programs.python_text import SourceText, Statement, Term, listed, number, sum_pieces
from tl_sparse.programs.stream import Logits

#: Sums of more terms than this are products of a table.
MAX_TERMS = 24
#: Longer lists of variables get a name.
MAX_IN_CALL = 3
#: More logits than this are one array.
MAX_LOGITS = 4


class PythonWriter:
    """Writes the statements of a compiled circuit."""

    def __init__(self, compiled: CompiledCircuit, source: SourceText) -> None:
        self._compiled = compiled
        self._source = source
        self._stream = StreamWriter(compiled, source)

    def write(self) -> None:
        """Write all statements."""
        self._source.section("The residual stream: resid[c] is its channel c.")
        self._stream.start()
        block: Any
        for layer, block in enumerate(self._compiled.blocks):
            self._block(layer, block)
        self._logits(self._compiled.logits)

    # The blocks

    def _block(self, layer: int, block: Block) -> None:
        if block.start is not None:
            self._source.section(f"Block {layer}.")
            self._stream.write(f"{layer}", block.start, [])
        self._source.section(f"Block {layer}, attention.")
        written: list[str] = []
        if block.attention is not None:
            written = self._attention(layer, block.attention)
        self._stream.write(f"{layer}.attn_out", block.after_attention, written)
        self._source.section(f"Block {layer}, MLP.")
        written = []
        if block.mlp is not None:
            written = self._mlp(layer, block.mlp)
        self._stream.write(f"{layer}.mlp_out", block.after_mlp, written)

    def _mlp(self, layer: int, mlp: MLP) -> list[str]:
        reads = self._stream.read(f"{layer}.mlp_in", mlp.read)
        reads_list = self._list("reads", reads)
        neurons = self._channels(f"{layer}.mlp_neuron", mlp.neurons, reads, reads_list)
        neurons_list = self._list("neurons", neurons)
        return self._channels(f"{layer}.mlp_out", mlp.out, neurons, neurons_list)

    def _attention(self, layer: int, attention: Attention) -> list[str]:
        z: list[str] = []
        if attention.heads is not None:
            z = self._heads(layer, attention.heads)
        z_list = self._list("z", z)
        return self._channels(f"{layer}.attn_out", attention.out, z, z_list)

    # Channels

    def _list(self, name: str, variables: Sequence[str]) -> str:
        """The expression of a list, which gets a name if it is long."""
        if len(variables) <= MAX_IN_CALL:
            return listed(variables)
        self._source.write(Statement(f"{name} =", [", ".join(variables)], "[", "]"))
        return name

    def _channels(
        self, location: str, channels: Channels, sources: Sequence[str], sources_list: str
    ) -> list[str]:
        """Write the kept channels at a location, and return their variables.

        Args:
            location: the location.
            channels: the part of the compiled circuit.
            sources: the variables that lead to it.
            sources_list: the expression of their list.
        """
        weight, bias = array(channels.weight), array(channels.bias)
        for column, node in enumerate(channels.nodes):
            pieces = self._channel_pieces(node, weight[:, column], bias[..., column], sources)
            opening, closing = ("", "")
            if channels.act_fn is not None:
                opening, closing = (f"{channels.act_fn}(", ")")
            self._source.write_node(node, pieces, opening, closing)
        names = [self._source.names[node] for node in channels.nodes]
        n_all = weight.shape[1] + channels.rivals.shape[-1]
        if channels.k is not None and channels.k < n_all:
            self._store_rivals(location, channels)
            call = f'{channels.k}, {listed(names)}, "{location}", {sources_list}, position'
            if channels.act_fn is not None:
                call += f", {channels.act_fn}"
            self._source.write_contest(channels.nodes, "after_contest", call)
        return names

    def _channel_pieces(
        self, node: str, weight: Array, bias: Array, sources: Sequence[str]
    ) -> list[str]:
        """The sum that is a channel, before the nonlinearity and AbsTopK."""
        used = np.flatnonzero(weight).tolist()
        terms = []
        if bias.ndim == 1:
            terms.append(Term(1.0, f"{self._source.table(f'{node} bias', bias)}[position]"))
        elif not used:
            return [f"np.full(n, {number(float(bias))})"]
        elif bias != 0.0:
            terms.append(Term(float(bias)))
        if len(used) > MAX_TERMS:
            table = self._source.table(f"{node} weights", weight[used])
            terms.append(Term(1.0, f"{table} @ np.stack({listed(sources[i] for i in used)})"))
        else:
            terms += [Term(float(weight[i]), sources[i]) for i in used]
        return sum_pieces(terms)

    def _store_rivals(self, location: str, channels: Channels) -> None:
        """Store what competes with kept channels in AbsTopK."""
        source = self._source
        if channels.rivals.shape[-1] > 0:
            source.table(f"{location} rivals", as_columns(array(channels.rivals)))
        weight = array(channels.weight)[:, channels.n_kept :]
        if weight.shape[1] > 0:
            biases = array(channels.bias)[..., channels.n_kept :]
            source.table(f"{location} weights of rivals", weight.T)
            source.table(f"{location} biases of rivals", as_columns(biases))

    # Heads

    def _heads(self, layer: int, heads: Heads) -> list[str]:
        """Write the heads of a block, and return the variables of z, head by head."""
        reads = self._stream.read(f"{layer}.attn_in", heads.read)
        reads_list = self._list("reads", reads)
        query = self._by_head(f"{layer}.attn_q", heads.query, reads, reads_list)
        key = self._by_head(f"{layer}.attn_k", heads.key, reads, reads_list)
        value = self._by_head(f"{layer}.attn_v", heads.value, reads, reads_list)
        z: list[str] = []
        for row, index in enumerate(heads.indices):
            head = f"{layer}_h{index}"
            sink = None if heads.sink is None else float(heads.sink[row])
            self._pattern(head, query[row], key[row], heads.scale, sink)
            z += [self._z(head, entry) for entry in value[row]]
        return z

    def _by_head(
        self, location: str, by_head: ByHead, reads: Sequence[str], reads_list: str
    ) -> list[list[str | float]]:
        """The variables or constants of queries, keys or values, by head and channel."""
        names = self._channels(location, by_head.channels, reads, reads_list)
        entries: list[list[str | float]] = by_head.constant.tolist()
        for kept, head, channel in by_head.place.nonzero().tolist():
            entries[head][channel] = names[kept]
        return entries

    def _pattern(
        self,
        head: str,
        query: Sequence[str | float],
        key: Sequence[str | float],
        factor: float,
        sink: float | None,
    ) -> None:
        """Write the attention pattern of a head.

        Args:
            head: its layer and number, as in the names of variables.
            query, key: the variables or constants of its channels.
            factor: the factor of the scores.
            sink: the logit of its sink; None without one.
        """
        constant = 0.0
        terms = []
        for q, k in zip(query, key, strict=True):
            if isinstance(q, str) and isinstance(k, str):
                terms.append(Term(factor, f"np.outer({q}, {k})"))
            elif isinstance(k, str):
                terms.append(Term(factor * float(q), k))
            elif isinstance(q, str):
                terms.append(Term(factor * k, f"{q}[:, None]"))
            else:
                constant += factor * q * k
        comments = []
        if constant != 0.0:
            comments.append("The constant comes from held queries and keys.")
        terms = [term for term in terms if term.factor != 0.0]
        if any(term.expression.startswith("np.outer") for term in terms):
            terms.append(Term(constant))
        else:  # nothing else has the shape of a pattern
            terms.append(Term(1.0, f"np.full((n, n), {number(constant)})"))
        pieces = sum_pieces(terms)
        if sink is not None:
            pieces[-1] += ","
            pieces.append(f"sink={number(sink)}")
        name = f"pattern_{head}"
        self._source.write(
            Statement(f"{name} =", pieces, "attention_pattern(", ")", name, comments=comments)
        )

    def _z(self, head: str, value: str | float) -> str:
        """Write a channel of z, and return its variable."""
        if value == 0.0:
            return "np.zeros(n)"  # no weight leads from it
        if isinstance(value, str):
            name = f"z_of_{value}"
            self._source.assign(name, f"pattern_{head} @ {value}")
        else:
            # The sum of the pattern, which stands for all values outside the circuit.
            name = f"pattern_sum_{head}"
            self._source.assign(name, f"pattern_{head}.sum(-1)")
        return name

    # The end

    def _logits(self, logits: Logits) -> None:
        title = "The logits."
        if logits.table is not None:
            title += " others_… is what held channels add to them by token."
        self._source.section(title)
        table = None if logits.table is None else array(logits.table)
        others = None if table is None else table[:, 0]
        stream = self._stream.scale(logits.scale, "logits", others)
        tokens = self._compiled.tokens
        if tokens is None or len(tokens) > MAX_LOGITS:
            self._all_logits(logits, stream)
            return
        names = []
        for column, token in enumerate(tokens.tolist()):
            name = f"logit_{token}"
            names.append(name)
            pieces = self._logit_pieces(logits, column, token, stream)
            self._source.write(Statement(f"{name} =", pieces, name=name))
        self._source.write(Statement("return", [f"np.stack({listed(names)}, axis=-1)"]))

    def _logit_pieces(self, logits: Logits, column: int, token: int, stream: str) -> list[str]:
        """The sum that is the logit of a token."""
        source = self._source
        weight = array(logits.weight)[:, column]
        used = np.flatnonzero(weight).tolist()
        terms = []
        if len(used) > MAX_TERMS:
            table = source.table(f"logit {token} weights", weight)
            terms.append(Term(1.0, f"{table} @ {self._stream.rows(stream)}"))
        else:
            for row in used:
                terms.append(Term(float(weight[row]), f"{stream}[{self._stream.varying[row]}]"))
        if logits.table is not None:
            values = array(logits.table)[:, 1 + column]
            terms.append(Term(1.0, source.by_token(f"others_{token}", values)))
        pieces = sum_pieces(terms)
        pieces[0] = f"({pieces[0]}"
        pieces[-1] = f"{pieces[-1]}) / scale"
        bias = float(logits.bias[column])
        if bias != 0.0:
            pieces.append(f"+ {number(bias)}")
        if logits.bigram is not None:
            values = array(logits.bigram)[:, column]
            pieces.append(f"+ {source.by_token(f'bigram_{token}', values)}")
        return pieces

    def _all_logits(self, logits: Logits, stream: str) -> None:
        """Write many logits at once, as products of tables."""
        source = self._source
        unembedding = source.table("unembedding", array(logits.weight))
        pieces = [f"({self._stream.rows(stream)}.T @ {unembedding}"]
        if logits.table is not None:
            pieces.append(f"+ {source.table('others', array(logits.table)[:, 1:])}[tokens]")
        pieces[-1] += ") / scale[:, None]"
        if bool(logits.bias.any()):
            pieces.append(f"+ {source.table('biases of logits', array(logits.bias))}")
        if logits.bigram is not None:
            pieces.append(f"+ {source.table('bigram', array(logits.bigram))}[tokens]")
        source.write(Statement("return", pieces))


def as_columns(values: Array) -> Array:
    """Constants as `[channel, 1]`, or as `[channel, n_ctx]` if they depend on the position."""
    return values[:, None] if values.ndim == 1 else values.T
