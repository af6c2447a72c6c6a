"""Whether a training fits the memory of its GPU, before the model is made."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tl_sparse.memory import check_fits, is_limited, parameter_bytes, saved_bytes
from tl_sparse.network import SparseTransformer
from tl_sparse.training.config import TrainConfig
from tl_sparse.training.objective import next_token_loss


def check_training_fits(
    config: TrainConfig, n_processes: int, is_sharded: bool, device: torch.device
) -> None:
    """Raise an error if a training needs more memory than its GPU has free.

    Raises:
        DeviceMemoryError: it says how much is needed, for what, and what would need less.
    """
    if is_limited(device):
        parts = training_bytes(config, n_processes, is_sharded)
        advice = "use a smaller batch_size, a larger accumulation, or a smaller model"
        check_fits("this training", parts, device, advice)


def training_bytes(
    config: TrainConfig, n_processes: int = 1, is_sharded: bool = False
) -> dict[str, int]:
    """What a training keeps on the GPU of one process at least → bytes.

    These are the weights, Adam's two moments, and what is there at the same time of the activations
    that the backward pass needs and of the gradients. A step takes somewhat more, for example for
    the copies in which it selects the largest weights.

    Args:
        config: the training.
        n_processes: the number of processes, which divide each batch.
        is_sharded: whether they divide the weights too.
    """
    with torch.device("meta"):
        network = SparseTransformer(config.model)
    weights = parameter_bytes(network)
    if is_sharded:
        weights //= n_processes
    activations = _activation_bytes(network, config, n_processes)
    parts = {"weights": weights, "moments of Adam": 2 * weights}
    if config.accumulation > 1:  # the gradients of the first part are there in the second
        return parts | {"gradients": weights, "activations": activations}
    if activations > weights:
        return parts | {"activations": activations}
    return parts | {"gradients": weights}


def _activation_bytes(network: SparseTransformer, config: TrainConfig, n_processes: int) -> int:
    """The bytes of the activations that are kept for the backward pass of one part of a batch."""
    if config.compile:
        return 0  # what the compiler keeps, and what it computes again, is its own choice
    n_rows = config.batch_size // n_processes
    n_rows = -(-n_rows // config.accumulation)
    tokens = torch.empty(n_rows, config.model.n_ctx, dtype=torch.int64, device="meta")
    if config.precision == "bfloat16":
        network = network.to(torch.bfloat16)
    with _FusedAttention():
        return saved_bytes(lambda: next_token_loss(network(tokens), tokens), network)


class _FusedAttention(TorchFunctionMode):
    """Within it, attention keeps what it keeps on a GPU, where it is fused.

    On the device "meta", it would also keep the patterns.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            q, k, v = args
            return _KeptByFusedAttention.apply(q, k, v)
        return func(*args, **(kwargs or {}))


class _KeptByFusedAttention(torch.autograd.Function):
    """Tensors of the shapes of attention, without their values."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        z = torch.empty_like(v)
        ctx.save_for_backward(q, k, v, z)
        return z
