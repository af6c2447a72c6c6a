"""What the kernels take against torch.topk, and sparse products against dense ones."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from measuring import Measurements, both_ways
from torch import Tensor

from tl_sparse.hooks import abs_topk
from tl_sparse.hooks.selection import zero_all_but
from tl_sparse.kernels import gpu, triton_in_use

#: From the abstract of RTop-K's paper (Xie et al. 2025, arXiv 2409.00822).
RTOPK = (
    "RTop-K, which bisects as well, is published as up to 7.29 times as fast as torch.topk on "
    "average where it keeps exactly k, and 11.49 times where it stops early (Xie et al. 2025, "
    "arXiv 2409.00822: the selection alone, on other GPUs and other sizes)."
)

TwoFunctions = tuple[Callable[[], object], Callable[[], object]]


@dataclass(frozen=True)
class KernelSizes:
    """How large the rows and matrices are.

    Attributes:
        columns: the numbers of columns of AbsTopK.
        entries: the number of entries of all its rows.
        weights: the shapes of weight matrices.
        products: the widths of the square weights of products.
        tokens: the number of tokens in a product.
    """

    columns: tuple[int, ...]
    entries: int
    weights: tuple[tuple[int, int], ...]
    products: tuple[int, ...]
    tokens: int


def time_rows(measured: Measurements, sizes: KernelSizes) -> None:
    """AbsTopK by Triton, also for fewer columns than it is used for, against torch.topk."""
    measured.heading("AbsTopK, a quarter of the columns kept", "Triton", "torch.topk")
    smallest = gpu.MIN_COLUMNS
    gpu.MIN_COLUMNS = 1
    try:
        for dtype in (torch.float32, torch.bfloat16):
            for n_columns in sizes.columns:
                shape = (max(1, sizes.entries // n_columns), n_columns)
                what = f"{shape[0]:,} × {n_columns:,}, {str(dtype).removeprefix('torch.')}"
                measured.row(what, partial(_forward, shape, dtype, measured.device))
                what += ", with backward"
                measured.row(what, partial(_backward, shape, dtype, measured.device))
    finally:
        gpu.MIN_COLUMNS = smallest
    used = f"{gpu.MIN_COLUMNS:,} to {gpu.MAX_COLUMNS:,} columns"
    in_use = triton_in_use(measured.device)
    measured.lines += ["", f"Triton here: {in_use}. It is used for {used}.", "", RTOPK]


def _forward(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> TwoFunctions:
    x = torch.randn(shape, device=device).to(dtype)
    return both_ways(abs_topk, x, shape[1] // 4)


def _backward(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> TwoFunctions:
    x = torch.randn(shape, device=device).to(dtype).requires_grad_()
    incoming = torch.ones_like(x)

    def run() -> Tensor:
        out = abs_topk(x, shape[1] // 4)
        return torch.autograd.grad(out, x, incoming)[0]

    return both_ways(run)


def time_weights(measured: Measurements, sizes: KernelSizes) -> None:
    """The weight top-k of whole matrices, with and without a minimum for each row."""
    measured.heading("Weight top-k, 1/64 kept", "Triton", "torch.topk")
    smallest = gpu.MIN_WEIGHTS
    gpu.MIN_WEIGHTS = 1
    try:
        for shape in sizes.weights:
            for minimum in (0, 4):
                what = f"{shape[0] * shape[1]:,} weights, at least {minimum} in a row"
                measured.row(what, partial(_weights, shape, minimum, measured.device))
    finally:
        gpu.MIN_WEIGHTS = smallest


def _weights(shape: tuple[int, int], minimum: int, device: torch.device) -> TwoFunctions:
    original = torch.randn(shape, device=device)
    matrix = torch.empty_like(original)

    def run() -> None:
        matrix.copy_(original)  # in the other function too
        zero_all_but(matrix, original.numel() // 64, minimum)

    return both_ways(run)


def time_products(measured: Measurements, sizes: KernelSizes) -> None:
    """Products with sparse weights in torch's compressed rows against dense products.

    Blocks are not tried: where single weights are zero, hardly any block of 16 × 16 is.
    """
    title = f"Product of {sizes.tokens:,} tokens with a square weight, float32"
    measured.heading(title, "torch.sparse", "dense")
    for width in sizes.products:
        for one_in in (64, 256):
            what = f"width {width:,}, 1/{one_in} nonzero"
            measured.row(what, partial(_product, width, one_in, sizes.tokens, measured.device))


def _product(width: int, one_in: int, n_tokens: int, device: torch.device) -> TwoFunctions:
    weight = torch.randn(width, width, device=device)
    weight *= torch.rand(width, width, device=device) < 1 / one_in
    x = torch.randn(width, n_tokens, device=device)
    return partial(torch.sparse.mm, weight.to_sparse_csr(), x), partial(torch.mm, weight, x)
