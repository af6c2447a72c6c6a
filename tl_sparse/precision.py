"""What is computed in float32 even if a model is in half precision.

Sums over many entries, norms, softmax and losses lose too many digits in bfloat16 or float16.
"""

import torch
from jaxtyping import Float
from torch import Tensor

#: The dtypes with too few digits (bfloat16) or too small a range (float16) for sums.
HALF_PRECISION = (torch.bfloat16, torch.float16)


def in_float32(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """`x` in float32 if it is in half precision; otherwise `x` itself."""
    if x.dtype in HALF_PRECISION:
        return x.float()
    return x


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """float32 for a dtype of half precision; otherwise the dtype itself."""
    return torch.float32 if dtype in HALF_PRECISION else dtype
