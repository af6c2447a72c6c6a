"""The residual stream of a compiled circuit as statements of Python: start, writes and reads."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from tl_sparse.programs.compiled import CompiledCircuit
from tl_sparse.programs.numpy_functions import Array
from tl_sparse.programs.python_text import SourceText, Statement, Term, listed, number, sum_pieces
from tl_sparse.programs.stream import NormScale, Read, Write
from tl_sparse.programs.token_read import TokenRead

#: Channels of the stream that are written out one by one; more of them are one array.
MAX_CHANNELS = 8


class StreamWriter:
    """Writes what happens to the residual stream.

    In the source, `resid[c]` is channel c, and 0 if the circuit does not compute it.

    Attributes:
        varying: the channels that the circuit computes.
    """

    def __init__(self, compiled: CompiledCircuit, source: SourceText) -> None:
        self.varying: list[int] = compiled.varying.tolist()
        self._compiled = compiled
        self._source = source
        self._d_model = compiled.logits.scale.d_model
        # What held nodes have written since the stream was last read.
        self._means = np.zeros(len(self.varying))

    def rows(self, stream: str = "resid") -> str:
        """The expression of the varying channels, `[varying, pos]`."""
        if len(self.varying) == self._d_model:
            return stream
        if len(self.varying) > MAX_CHANNELS:
            return f"{stream}[{self._source.table('channels', self.varying)}]"
        return f"{stream}[{self.varying}]"

    def start(self) -> None:
        """The stream as tokens and positions start it."""
        source, compiled = self._source, self._compiled
        start = array(compiled.start)
        source.assign("resid", f"np.zeros(({self._d_model}, n))")
        if len(self.varying) > MAX_CHANNELS:
            table = source.table("resid", start)
            source.write(Statement(f"{self.rows()} =", [f"{table}[tokens].T"]))
        else:
            for column, channel in enumerate(self.varying):
                if start[:, column].any():
                    value = source.by_token(f"resid_{channel}", start[:, column])
                    source.write(Statement(f"resid[{channel}] =", [value]))
        if compiled.added is not None:
            table = source.table("added positions", array(compiled.added))
            source.write(Statement(f"{self.rows()} +=", [f"{table}[position].T"]))

    # Writes

    def write(self, location: str, write: Write, written: Sequence[str]) -> None:
        """What is added to the stream, and what happens to it then.

        Args:
            location: where it comes from, for the names of tables.
            write: the part of the compiled circuit.
            written: the variables of the kept writes.
        """
        source = self._source
        channels = [self.varying[place] for place in write.channels.tolist()]
        for channel, node in zip(channels, written, strict=True):
            target = f"resid[{channel}]"
            source.write(Statement(f"{target} +=", [node], name=target))
        if write.constant is not None:
            self._means += array(write.constant)
        if write.relu or write.k is not None:
            self._write_means(location)
        if write.relu:
            source.assign("resid", "relu(resid)")
        if write.k is not None:
            source.assign("resid", f"abs_topk({write.k}, resid)")

    def _write_means(self, location: str) -> None:
        """Add what held nodes have written since the stream was last read."""
        means, self._means = self._means, np.zeros(len(self.varying))
        rows = np.flatnonzero(means)
        if len(rows) > MAX_CHANNELS:
            table = self._source.table(f"{location} means", means)
            self._source.write(Statement(f"{self.rows()} +=", [f"{table}[:, None]"]))
            return
        for row in rows.tolist():
            sign = "-" if means[row] < 0 else "+"
            target = f"resid[{self.varying[row]}] {sign}="
            self._source.write(Statement(target, [number(abs(means[row]))]))

    # Norms

    def scale(self, scale: NormScale, location: str, others: Array | None) -> str:
        """Write what a norm divides by.

        Args:
            scale: the part of the compiled circuit.
            location: where it is, for the names of tables.
            others: by token, the squares of the channels that are not computed; None without any.

        Returns:
            The name of the stream that is divided.
        """
        self._write_means(location)
        stream = "resid"
        if scale.centered:
            stream = "centered"
            self._source.assign(stream, "resid - resid.mean(0)")
        squares = "0.0"
        if others is not None:
            squares = f"{self._source.table(f'{location} squares', others)}[tokens]"
        text = f"root_mean_square({stream}, {squares}, {scale.eps!r})"
        self._source.assign("scale", text)
        return stream

    # Reads

    def read(self, location: str, read: Read | TokenRead) -> list[str]:
        """Write the channels that are read at a location, and return their variables."""
        if isinstance(read, TokenRead):
            self._token_read(location, read)
        else:
            self._read(location, read)
        return [self._source.names[node] for node in read.nodes]

    def _token_read(self, location: str, read: TokenRead) -> None:
        """Channels that are functions of the token, and positional ones."""
        values = array(read.values)
        n_values = values.shape[1]
        for column, node in enumerate(read.nodes[:n_values]):
            if read.limits is None or read.by_position is None:
                self._read_table(node, values[:, column], "token")
                continue
            limits = array(read.limits)[:, column]
            self._read_limited(node, values[:, column], array(read.by_position), limits, "token")
        if read.positions is None:
            return
        positions = array(read.positions)
        for column, node in enumerate(read.nodes[n_values:]):
            if read.places is None or read.by_token is None:
                self._read_table(node, positions[:, column], "position")
                continue
            limits = array(read.places)[:, column]
            self._read_limited(node, positions[:, column], array(read.by_token), limits, "position")

    def _read_table(self, node: str, values: Array, by: str) -> None:
        """A channel that is a function of the token or of the position, as `by` says."""
        if by == "position":
            self._source.write_node(node, [f"{self._source.table(node, values)}[position]"])
            return
        expression = self._source.by_token(node, values)
        is_table = expression.startswith("TABLES")
        comments = [self._source.strongest_tokens(values)] if is_table else []
        self._source.write_node(node, [expression], comments=comments)

    def _read_limited(self, node: str, values: Array, least: Array, limits: Array, by: str) -> None:
        """Such a channel, which AbsTopK keeps where it reaches a limit that depends on the other.

        For the arguments see `without_small`, and for the limits `TokenRead`.
        """
        values, is_certain = without_small(values, least, limits)
        if is_certain:
            self._read_table(node, values, by)
            return
        source = self._source
        other = {"token": "position", "position": "token"}[by]
        source.table(node, values)
        source.table(f"{node} limits", limits)
        source.table(f"{_location(node)} largest by {other}", least)
        comments = [source.strongest_tokens(values)] if by == "token" else []
        source.write_node(node, [f'read_by_{by}("{node}", tokens, position)'], comments=comments)

    def _read(self, location: str, read: Read) -> None:
        """Channels of the normalized stream, and positional ones."""
        others = None if read.table is None else array(read.table)[:, 0]
        stream = self.scale(read.scale, location, others)
        for node, place in zip(read.nodes, read.chosen.tolist(), strict=True):
            self._source.write_node(node, self._read_pieces(read, node, place, stream))
        if read.k is None or len(read.nodes) == 0:
            return
        n_rivals = self._store_rivals(location, read)
        if read.k < len(read.nodes) + n_rivals:
            nodes = listed(self._source.names[node] for node in read.nodes)
            call = f'{read.k}, {nodes}, "{location}", {stream}, scale, tokens, position'
            self._source.write_contest(read.nodes, "read_after_contest", call)

    def _read_pieces(self, read: Read, node: str, place: int, stream: str) -> list[str]:
        """The sum that is a channel of a read, before AbsTopK.

        Args:
            read: the part of the compiled circuit.
            node: the name of the channel.
            place: its place among the channels of the table, the stream and the positions.
            stream: the name of the stream.
        """
        groups = _Groups(read, len(self.varying))
        if read.table is not None and place < groups.stream:
            by_token = self._source.by_token(node, array(read.table)[:, 1 + place])
            return [f"{by_token} / scale"]
        if read.positions is not None and place >= groups.positions:
            values = array(read.positions)[:, place - groups.positions]
            return [f"{self._source.table(node, values)}[position]"]
        column = place - groups.stream
        terms = [Term(float(read.weight[column]), f"{stream}[{self.varying[column]}] / scale")]
        if read.bias is not None:
            terms.append(Term(float(read.bias[column])))
        return sum_pieces(terms)

    def _store_rivals(self, location: str, read: Read) -> int:
        """Store what competes with the kept channels of a read in AbsTopK, and count it."""
        groups = _Groups(read, len(self.varying))
        chosen = set(read.chosen.tolist())
        rivals = [place for place in range(groups.end) if place not in chosen]
        in_table = [place for place in rivals if place < groups.stream]
        in_stream = [
            place - groups.stream for place in rivals if groups.stream <= place < groups.positions
        ]
        in_positions = [place - groups.positions for place in rivals if place >= groups.positions]
        if read.table is not None and in_table:
            self._source.table(f"{location} rivals", array(read.table)[:, 1:][:, in_table])
        if in_stream:
            weights = array(read.weight)[in_stream]
            biases = np.zeros(len(in_stream))
            if read.bias is not None:
                biases = array(read.bias)[in_stream]
            self._source.table(f"{location} rivals in resid", np.array(self.varying)[in_stream])
            self._source.table(f"{location} weights of rivals", weights[:, None])
            self._source.table(f"{location} biases of rivals", biases[:, None])
        if read.positions is not None and in_positions:
            values = array(read.positions)[:, in_positions]
            self._source.table(f"{location} positional rivals", values)
        return len(rivals)


class _Groups:
    """Where the groups of channels that a read consists of begin: the table, then these.

    Attributes:
        stream, positions: the place of the first channel of the stream, and of the positions.
        end: the number of all channels.
    """

    def __init__(self, read: Read, n_varying: int) -> None:
        n_positions = 0 if read.positions is None else read.positions.shape[1]
        self.stream = 0 if read.table is None else read.table.shape[1] - 1
        self.positions = self.stream + n_varying
        self.end = self.positions + n_positions


def without_small(values: Array, least: Array, limits: Array) -> tuple[Array, bool]:
    """Values without those that AbsTopK never keeps, and whether it always keeps the others.

    Args:
        values: by row, a channel.
        least: the limits, of which each row of the other kind has one in each column.
        limits: by row of `values`, the column of its limit.
    """
    magnitudes = abs(values)
    values = np.where(magnitudes >= least.min(0)[limits], values, 0.0)
    is_always_kept = (values == 0.0) | (magnitudes >= least.max(0)[limits])
    return values, bool(is_always_kept.all())


def array(values: Tensor) -> Array:
    """A buffer of a compiled circuit as an array."""
    converted: Array = values.detach().cpu().numpy()
    return converted


def _location(node: str) -> str:
    """The location of a node: `0.attn_in 6` → `0.attn_in`."""
    return node.partition(" ")[0]
