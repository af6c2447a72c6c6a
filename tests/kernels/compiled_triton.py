"""Compile every Triton kernel for GPUs that need not be there; `test_triton.py` runs this file.

It prints a line for each.
"""

import triton.language as tl
from triton import compile as compile_for
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tl_sparse.kernels import launch
from tl_sparse.kernels.float_bits import FLOAT_BITS
from tl_sparse.kernels.triton_matrices import count_digits, count_ties, cut
from tl_sparse.kernels.triton_rows import abs_topk, row_bounds, times

#: The compute capabilities of the A100 and the H200.
TARGETS = [80, 90]
SIZES = {"i16": "bfloat16", "i32": "float32", "i64": "float64"}
EVERY = dict(size="i32", segment="i32", n_columns="i32")


def kernels(x, key):
    """Each kernel with the types of its arguments, for numbers and magnitudes of these types."""
    row = dict(n_columns="i32")
    with_mask = dict(mask="*u8", out=x, n_bytes="i32")
    matrix = dict(x=x, bounds=key, lasts="*i32", threshold=key, **EVERY)
    return [
        (abs_topk, dict(x=x, k="i32", **row, **with_mask), {}),
        (times, dict(x=x, **row, **with_mask), {}),
        (row_bounds, dict(x=x, bounds=key, lasts="*i32", k="i32", **row), {}),
        (
            count_digits,
            dict(**matrix, counts="*i32", shift="i32", above="i32"),
            dict(HAS_MINIMUM=True, DIGITS=1 << launch.DIGIT_BITS),
        ),
        (
            count_ties,
            dict(**matrix, n_ties="*i32", n_ties_kept="*i64", counts="*i32"),
            dict(HAS_MINIMUM=True),
        ),
        (
            cut,
            dict(**matrix, n_ties_kept="*i64", n_ties_before="*i64"),
            dict(HAS_MINIMUM=True),
        ),
    ]


for target in TARGETS:
    for size, dtype in SIZES.items():
        of_dtype = next(b for d, b in FLOAT_BITS.items() if str(d) == f"torch.{dtype}")
        key = "i64" if size == "i64" else "i32"
        constants = dict(UNSIGNED=of_dtype.unsigned, INFINITY=of_dtype.infinity)
        constants |= dict(KEY=getattr(tl, f"int{key[1:]}"), BLOCK=2048)
        for kernel, types, more in kernels(f"*{size}", f"*{key}"):
            values = constants | more
            signature = types | dict.fromkeys(values, "constexpr")
            # The order of the signature is that of the kernel's arguments.
            signature = {name: signature[name] for name in kernel.arg_names}
            source = ASTSource(kernel, signature, values)
            compiled = compile_for(source, GPUTarget("cuda", target, 32))
            print(kernel.__name__, dtype, target, len(compiled.asm["cubin"]))
