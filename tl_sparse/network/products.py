"""Products with the network's weight matrices.

A product is either dense, or it uses only the nonzero weights, where that is faster.
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tl_sparse.hooks import MatrixLayout, Scope
from tl_sparse.kernels import bits, kernel, n_threads, shared_out
from tl_sparse.network.compact import Compact
from tl_sparse.network.compressed import Compressed, StackedEntries
from tl_sparse.network.cuts import Cut
from tl_sparse.network.nonzeros import NonzeroMatrix

Kernels = Literal["auto", "dense", "sparse"]
#: A product with fewer tokens than this is dense, unless its weights are held compact.
MIN_TOKENS = 32
#: The layout of a weight that already is a matrix `[d_in, d_out]`.
INPUT_BY_OUTPUT = MatrixLayout(rows=(0,), columns=(1,))
#: Held while cuts are added to a product or removed from it.
_changing_cuts = threading.Lock()


@dataclass(frozen=True, eq=False)
class _Cache:
    """Cache of a product: identity, nonzero count and compressed entries of its weights.

    The cache is immutable and replaced as a whole, because several threads may use the product.

    Attributes:
        weights: the identity of the weights: the dtype of the product and, for each weight, its
            checksum or the `Compact` that holds it.
        n_nonzero: the number of nonzero weights.
        entries: the nonzero weights as compressed rows of Wᵀ; None until they are needed.
    """

    weights: tuple[Any, ...] = ()
    n_nonzero: int = 0
    entries: Compressed | None = None


class Product(nn.Module):
    """The product x · W + bias, where W stacks the weights `names` of `owner` along its rows.

    On a CPU with numba, a product can use only the nonzero weights. These are extracted once, and
    again whenever a checksum shows that the weights have changed. With `kernels` = "auto", the
    product uses only the nonzero weights where this is faster according to measured costs; with
    "sparse" always, with "dense" never. Gradients equal those of the dense product.

    Products under autocast or in `torch.compile` are always dense. Products of fewer than 32 tokens
    are dense too, unless the weights are held compact. A dense product with compact weights makes a
    dense copy of them each time.

    Args:
        owner: the module that has the weights; it does not become a submodule of the product.
        names: the names of the weights, in the order of their rows in W.
        layout: the layout of each weight as a matrix `[d_in, d_out]`.
    """

    def __init__(
        self, owner: nn.Module, names: Sequence[str], layout: MatrixLayout = INPUT_BY_OUTPUT
    ) -> None:
        super().__init__()
        self.owner: Any
        # An ordinary attribute would register the owner as a submodule of the product, which is
        # itself a submodule of the owner.
        self.__dict__["owner"] = owner
        self.names = names
        self.layout = layout
        self.kernels: Kernels = "auto"
        #: The entries of W that are cut, by the scope in which they are. This mapping is replaced,
        #: never changed, because several threads may use the product.
        self.cuts: Mapping[Scope, Cut] = {}
        #: During a step of training that leaves zeros as they are, the nonzero entries of W.
        self.trained: NonzeroMatrix | None = None
        self._cache = _Cache()

    def __getstate__(self) -> dict[str, Any]:
        """The state for copies and pickles, which include only what the product itself needs."""
        return {**self.__dict__, "cuts": {}, "trained": None, "_cache": _Cache()}

    @property
    def shape(self) -> tuple[int, int]:
        """The numbers of rows and columns of W."""
        d_in = d_out = 0
        for name in self.names:
            n_rows, d_out = self.layout.matrix_shape(self._stored(name).shape)
            d_in += n_rows
        return d_in, d_out

    def _stored(self, name: str) -> Tensor | Compact:
        """A weight in the form in which the owner holds it."""
        if self._is_compact:
            compact: Compact = self.owner.compact[name]
            return compact
        return getattr(self.owner, name)

    def matrix(self) -> Float[Tensor, "d_in d_out"]:
        """W as a dense matrix."""
        parts = [self.layout.matrix(getattr(self.owner, name)) for name in self.names]
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts)

    def add_cut(self, scope: Scope, cut: Cut) -> None:
        """Cut entries of W wherever `scope` is open."""
        with _changing_cuts:
            self.cuts = {**self.cuts, scope: cut}

    def remove_cut(self, scope: Scope) -> None:
        """Undo `add_cut` for this scope, if it has been called."""
        with _changing_cuts:
            remaining = dict(self.cuts)
            remaining.pop(scope, None)
            self.cuts = remaining

    def _cut(self, d_out: int) -> Cut | None:
        """The cut that acts here, which several scopes may have contributed to."""
        acting = None
        for scope, cut in self.cuts.items():
            if scope.is_open_here():
                acting = cut if acting is None else acting.and_also(cut, d_out)
        return acting

    def matrix_and_bias(self, bias: Tensor) -> tuple[Float[Tensor, "d_in d_out"], Tensor]:
        """W as a dense matrix, and the bias `[d_out]`, both with the cut that acts here."""
        cut = self._cut(len(bias))
        if cut is None:
            return self.matrix(), bias
        return cut.from_matrix(self.matrix(), bias)

    def forward(
        self, x: Float[Tensor, "*batch d_in"], bias: Tensor
    ) -> Float[Tensor, "*batch d_out"]:
        trained = self._nonzeros_to_train(x)
        if trained is not None:
            return self._times_nonzeros(trained, x, bias)
        entries = self._entries(x)
        learns = self._learns()
        cut = self._cut(len(bias))
        if entries is None or (cut is not None and learns):
            matrix, bias = self.matrix_and_bias(bias)
            return F.linear(x, matrix.T, bias)
        if cut is not None:
            entries, bias = cut.from_entries(entries, bias)
        # Autograd needs the dense W only if the weights are trained.
        dense = self.matrix() if learns else None
        return _SparseProduct.apply(x, dense, bias, entries)

    def _nonzeros_to_train(self, x: Float[Tensor, "*batch d_in"]) -> NonzeroMatrix | None:
        """W, if the gradients are to be those of its nonzero entries alone."""
        trained = self.trained
        if trained is None or self.cuts or x.dtype != trained.dtype:
            return None
        if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
            return None
        return None if kernel("sampled_product", x) is None else trained

    def _times_nonzeros(
        self, trained: NonzeroMatrix, x: Float[Tensor, "*batch d_in"], bias: Tensor
    ) -> Float[Tensor, "*batch d_out"]:
        """The product while only the nonzero weights are trained."""
        n_tokens = x.numel() // x.shape[-1]
        n_nonzero = len(trained.by_input.values)
        is_sparse = self.kernels == "sparse" or (
            self.kernels == "auto" and _is_faster(n_tokens, *self.shape, n_nonzero)
        )
        dense = None if is_sparse else self.matrix().detach()
        return trained.times(x, bias, dense)

    def _learns(self) -> bool:
        """Whether any of the weights may receive a gradient."""
        if self._is_compact or not torch.is_grad_enabled():
            return False
        return any(getattr(self.owner, name).requires_grad for name in self.names)

    @property
    def _is_compact(self) -> bool:
        """Whether the owner holds these weights compact; it does so for all of them or none."""
        return self.names[0] in self.owner.__dict__.get("compact", ())

    @torch.no_grad()
    def _entries(self, x: Float[Tensor, "*batch d_in"]) -> Compressed | None:
        """The nonzero weights as Wᵀ; None if the product with `x` is to be dense."""
        if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
            return None
        if self.kernels == "dense" or kernel("multiply", x) is None:
            return None
        if self._is_compact:
            return self._entries_of_compact_weights(x.dtype)
        n_tokens = x.numel() // x.shape[-1]
        if n_tokens < MIN_TOKENS:
            return None
        return self._entries_of_dense_weights(n_tokens, x.dtype)

    def _entries_of_dense_weights(self, n_tokens: int, dtype: torch.dtype) -> Compressed | None:
        """`_entries` for weights that are parameters."""
        weights = [getattr(self.owner, name).detach() for name in self.names]
        if weights[0].dtype != dtype:
            return None
        matrix_shapes = [self.layout.matrix_shape(weight.shape) for weight in weights]
        d_in = sum(n_rows for n_rows, _ in matrix_shapes)
        d_out = matrix_shapes[0][1]
        is_auto = self.kernels == "auto"
        # If even an all-zero matrix would not be faster, the nonzero weights need not be counted.
        if is_auto and not _is_faster(n_tokens, d_in, d_out, n_nonzero=0):
            return None
        cache = self._cache
        identity = (dtype, *map(_checksum, weights))
        if cache.weights != identity:
            n_nonzero = sum(int(weight.count_nonzero()) for weight in weights)
            cache = _Cache(identity, n_nonzero)
        is_used = not is_auto or _is_faster(n_tokens, d_in, d_out, cache.n_nonzero)
        if is_used and cache.entries is None:
            by_input = Compressed.of(self.matrix(), cache.n_nonzero)
            cache = replace(cache, entries=by_input.transposed)
        self._cache = cache
        if not is_used:
            return None
        return cache.entries

    def _entries_of_compact_weights(self, dtype: torch.dtype) -> Compressed:
        """`_entries` for weights that are held compact, without making dense copies of them."""
        weights: list[Compact] = [self.owner.compact[name] for name in self.names]
        cache = self._cache
        identity = (dtype, *weights)
        if cache.weights == identity and cache.entries is not None:
            return cache.entries
        shapes = [weight.shape for weight in weights]
        stacked = StackedEntries.of([weight.positions for weight in weights], shapes, self.layout)
        entries = Compressed.of_entries(
            rows=stacked.columns,
            columns=stacked.rows,
            values=torch.cat([weight.values.to(dtype) for weight in weights]),
            n_rows=stacked.n_columns,
            n_columns=stacked.n_rows,
        )
        self._cache = _Cache(identity, len(entries.values), entries)
        return entries


def _checksum(weight: Tensor) -> int:
    """A checksum of the values of a weight."""
    # A transposed matrix, such as a tied unembedding, is read in memory order, to avoid a copy.
    is_transposed = weight.ndim == 2 and not weight.is_contiguous()
    in_memory = weight.T if is_transposed else weight
    flat = bits(in_memory.contiguous()).view(-1).numpy()
    unsigned = flat.view(f"u{flat.itemsize}")
    return sum(shared_out(kernel("checksum", weight), len(flat), len(flat), unsigned))


def _is_faster(n_tokens: int, d_in: int, d_out: int, n_nonzero: int) -> bool:
    """Whether a product with only the nonzero weights is faster than a dense one.

    The costs were measured with AVX-512. Their unit is one multiplication of a dense product on one
    thread. Per token, each nonzero weight costs 5, each input 15 and each output 60. The overhead
    of a sparse product is 6 million.
    """
    sparse_threads = n_threads(n_tokens * (d_in + d_out))
    sparse_cost = (5 * n_nonzero + 15 * d_in + 60 * d_out) / sparse_threads
    dense_cost = d_in * d_out / torch.get_num_threads()
    return n_tokens * (dense_cost - sparse_cost) > 6e6


class _SparseProduct(torch.autograd.Function):
    """x · W + bias from compressed rows of Wᵀ; `matrix` is W if it needs a gradient, else None."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, matrix: Tensor | None, bias: Tensor | None, compressed: Compressed
    ) -> Float[Tensor, "*batch d_out"]:
        out = compressed.times(x, bias)
        # Only the gradient of W needs x.
        ctx.save_for_backward(None if matrix is None else x, matrix)
        ctx.compressed = compressed
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, matrix = ctx.saved_tensors
        needs_x, needs_matrix, needs_bias, _ = ctx.needs_input_grad
        grad_x = grad_matrix = grad_bias = None
        if needs_x:
            transposed = None if matrix is None else matrix.T
            grad_x = _SparseProduct.apply(grad, transposed, None, ctx.compressed.transposed)
        if needs_matrix:
            grad_matrix = x.flatten(0, -2).T @ grad.flatten(0, -2)
        if needs_bias:
            grad_bias = grad.flatten(0, -2).sum(0)
        return grad_x, grad_matrix, grad_bias, None
