"""Products with the network's weight matrices: dense, or by their nonzero entries alone where that
is faster.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_sparse.kernels import bits, kernel, n_threads, shared_out
from tl_sparse.network.compact import Compact

Kernels = Literal["auto", "dense", "sparse"]
#: Of fewer tokens a product is dense.
MIN_TOKENS = 32


@dataclass(frozen=True)
class Compressed:
    """The nonzero entries of a matrix, row by row: those of row r are [starts[r], starts[r +
    1]).
    """

    starts: Int[Tensor, "row_1"]
    indices: Int[Tensor, " entry"]
    values: Float[Tensor, " entry"]
    n_columns: int

    @classmethod
    def empty(cls, n_rows: int, n_columns: int, n_entries: int, like: Tensor) -> "Compressed":
        starts = like.new_zeros(n_rows + 1, dtype=torch.int64)
        return cls(
            starts,
            like.new_empty(n_entries, dtype=torch.int32),
            like.new_empty(n_entries),
            n_columns,
        )

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.starts, self.indices, self.values

    @cached_property
    def transposed(self) -> "Compressed":
        """The same matrix, column by column."""
        found = self.empty(self.n_columns, len(self.starts) - 1, len(self.values), self.values)
        kernel("transpose", self.values)(*self.parts, *found.parts)
        return found


class WeightsHolder(nn.Module):
    """A part of the network whose weights can be held compact, not as parameters.

    Then a dense copy of one is made each time it is asked for, and what is done to that copy is
    lost. A weight that is assigned, or loaded from a state_dict, is held compact again.
    """

    def hold_compact(self, name: str, weight: Compact) -> None:
        """Hold a weight so, in the place of the parameter."""
        self._parameters.pop(name, None)
        self.__dict__.setdefault("compact", {})[name] = weight

    @property
    def _held(self) -> dict[str, Compact]:
        return self.__dict__.get("compact", {})

    def compact_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Name and dense copy of each weight that is held compact."""
        return ((name, getattr(self, name)) for name in self._held)

    def __getattr__(self, name: str) -> Any:
        if (held := self._held.get(name)) is not None:
            return held.dense(held.values.device, held.dtype)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._held and isinstance(value, Tensor):
            self.hold_compact(name, Compact.of(value))
        else:
            super().__setattr__(name, value)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        for name, held in self._held.items():
            self.hold_compact(name, held.mapped(fn))
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update((prefix + name, weight) for name, weight in self.compact_weights())

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        metadata: Any,
        strict: bool,
        missing: Any,
        unexpected: Any,
        errors: Any,
    ) -> None:
        state_dict = dict(state_dict)
        for name, held in self._held.items():
            value = state_dict.pop(prefix + name, None)
            if value is None:
                missing.append(prefix + name)
            elif value.shape != held.shape:
                errors.append(
                    f"size mismatch for {prefix + name}: {list(value.shape)}, not {list(held.shape)}"
                )
            else:
                self.hold_compact(name, Compact.of(value.to(held.values)))
        super()._load_from_state_dict(
            state_dict, prefix, metadata, strict, missing, unexpected, errors
        )


class Product(nn.Module):
    """x · W + bias for a matrix W, in whose rows are the weights `names` of `owner`, each
    rearranged by `pattern`.

    On a CPU with numba its nonzero entries are taken out once, and again after any change of the
    weights, which is noticed by a checksum. `kernels` = "auto" uses them alone where the measured
    times of both ways say so; gradients are those of the dense product. Products of fewer than 32
    tokens are dense, unless the weights are held compact; so are all under autocast and in
    `torch.compile`. `torch.func` needs "dense".
    """

    def __init__(self, owner: nn.Module, names: Sequence[str], pattern: str) -> None:
        super().__init__()
        self.owner: Any
        self.__dict__["owner"] = owner  # not a part of this
        self.names, self.pattern = names, pattern
        self.kernels: Kernels = "auto"
        # Of which weights, how many entries are not zero, and these once needed. Replaced whole:
        # threads may share it.
        self._taken: tuple[tuple[Any, ...], int, Compressed | None] = (), 0, None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_taken": ((), 0, None)}

    def matrix(self) -> Float[Tensor, "d_in d_out"]:
        """W."""
        parts = [rearrange(getattr(self.owner, name), self.pattern) for name in self.names]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def forward(
        self, x: Float[Tensor, "*batch d_in"], bias: Tensor
    ) -> Float[Tensor, "*batch d_out"]:
        entries = self._compressed(x)
        if entries is None:
            return F.linear(x, self.matrix().T, bias)
        learns = not self._is_compact and any(
            getattr(self.owner, name).requires_grad for name in self.names
        )
        matrix = self.matrix() if learns and torch.is_grad_enabled() else None
        return _SparseProduct.apply(x, matrix, bias, entries)

    @torch.no_grad()
    def _compressed(self, x: Tensor) -> Compressed | None:
        """Wᵀ compressed; None if the product is better done densely, or has to be."""
        if (
            torch.compiler.is_compiling()
            or torch.is_autocast_enabled("cpu")
            or kernel("multiply", x) is None
        ):
            return None
        if self._is_compact:
            weights = x.dtype, *(self.owner.compact[name] for name in self.names)
            known, _, entries = self._taken
            if known != weights or entries is None:
                entries = self._of_compact(x.dtype)
                self._taken = weights, len(entries.values), entries
            return entries
        few_tokens = x.numel() < MIN_TOKENS * x.shape[-1]
        return None if self.kernels == "dense" or few_tokens else self._of_dense(x)

    def _of_dense(self, x: Tensor) -> Compressed | None:
        parts = [getattr(self.owner, name).detach() for name in self.names]
        d_in, n_weights = x.shape[-1], sum(part.numel() for part in parts)
        sizes = x.numel() // d_in, d_in, n_weights // d_in
        auto = self.kernels == "auto"
        if parts[0].dtype != x.dtype or (auto and not _pays(*sizes, n_nonzero=0)):
            return None
        weights = x.dtype, *map(_checksum, parts)
        known, n_nonzero, entries = self._taken
        if known != weights:
            n_nonzero, entries = sum(int(part.count_nonzero()) for part in parts), None
        pays = not auto or _pays(*sizes, n_nonzero)
        if pays and entries is None:
            matrix = self.matrix().contiguous()
            by_input = Compressed.empty(d_in, n_weights // d_in, n_nonzero, matrix)
            kernel("compress", matrix)(matrix, *by_input.parts)
            entries = by_input.transposed
        self._taken = weights, n_nonzero, entries
        return entries if pays else None

    @property
    def _is_compact(self) -> bool:
        return self.names[0] in self.owner.__dict__.get("compact", ())

    def _of_compact(self, dtype: torch.dtype) -> Compressed:
        """Wᵀ of weights that are held compact, without any dense copy."""
        before, after = self.pattern.split(" -> ")
        sides = [re.sub(r"[()]", "", side).split() for side in re.findall(r"\(.*?\)|\S+", after)]
        found, n_inputs = [], 0
        for weight in (self.owner.compact[name] for name in self.names):
            sizes = dict(zip(before.split(), weight.shape, strict=True))
            at = dict(
                zip(sizes, np.unravel_index(weight.positions.numpy(), weight.shape), strict=True)
            )
            inputs, outputs = (
                np.ravel_multi_index([at[x] for x in axes], [sizes[x] for x in axes])
                for axes in sides
            )
            found.append(
                (
                    torch.from_numpy(inputs) + n_inputs,
                    torch.from_numpy(outputs),
                    weight.values.to(dtype),
                )
            )
            more_inputs, n_outputs = (math.prod(sizes[axis] for axis in axes) for axes in sides)
            n_inputs += more_inputs
        column, row, values = (torch.cat(parts) for parts in zip(*found, strict=True))
        order = (row * n_inputs + column).argsort()
        starts = F.pad(row.bincount(minlength=n_outputs).cumsum(0), (1, 0))
        return Compressed(starts, column[order].int(), values[order], n_inputs)


def _checksum(weight: Tensor) -> int:
    """A number that changes with the weight."""
    stored = (
        weight.T if weight.ndim == 2 and not weight.is_contiguous() else weight
    )  # a tied unembedding, for one
    flat = bits(stored.contiguous()).view(-1).numpy()
    return sum(
        shared_out(kernel("checksum", weight), len(flat), len(flat), flat.view(f"u{flat.itemsize}"))
    )


def _pays(n_tokens: int, d_in: int, d_out: int, n_nonzero: int) -> bool:
    """Whether a product takes less time by the nonzero entries alone.

    Measured with AVX-512, in units of a dense multiplication on one thread: an entry takes 5, a
    number of the input 15, of the output 60, and everything around it 6 million.
    """
    entries = (5 * n_nonzero + 15 * d_in + 60 * d_out) / n_threads(n_tokens * (d_in + d_out))
    return n_tokens * (d_in * d_out / torch.get_num_threads() - entries) > 6e6


class _SparseProduct(torch.autograd.Function):
    """x · W + bias, with the rows of Wᵀ compressed; `matrix` is W where it has a gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, matrix: Tensor | None, bias: Tensor | None, compressed: Compressed
    ) -> Float[Tensor, "*batch d_out"]:
        rows, d_out = x.detach().reshape(-1, x.shape[-1]).contiguous(), len(compressed.starts) - 1
        offsets = rows.new_empty(0) if bias is None else bias.detach().contiguous()
        # NumPy's memory is of huge pages where the system has them: it comes several times sooner
        # than torch's. All of it, not a view of it: what works in place on a view makes autograd
        # copy the gradient.
        out = torch.from_numpy(np.empty((*x.shape[:-1], d_out), rows.numpy().dtype))
        arguments = rows, *compressed.parts, offsets, out.view(len(rows), d_out)
        shared_out(kernel("multiply", rows), len(rows), rows.numel() + out.numel(), *arguments)
        ctx.save_for_backward(x if matrix is not None else None, matrix)
        ctx.compressed = compressed
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, matrix = ctx.saved_tensors
        needs_x, needs_matrix, needs_bias = ctx.needs_input_grad[:3]
        transposed = None if matrix is None else matrix.T
        of_x = (
            _SparseProduct.apply(grad, transposed, None, ctx.compressed.transposed)
            if needs_x
            else None
        )
        of_matrix = x.flatten(0, -2).T @ grad.flatten(0, -2) if needs_matrix else None
        return of_x, of_matrix, grad.flatten(0, -2).sum(0) if needs_bias else None, None
