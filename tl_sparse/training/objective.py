"""What training minimises: by default the next-token loss, and nothing beside the model learns."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from tl_sparse.hooks import TLModel
from tl_sparse.precision import in_float32
from tl_sparse.training.config import TrainConfig


class Objective:
    """The next-token loss. Subclasses train something else beside the model, towards another loss.

    A run calls `start` once, and `backward` for every part of every batch.

    Args:
        beside: what is trained beside the model, with dense weights; None for nothing.

    Attributes:
        name: what is trained, for messages, and the prefix of the names in checkpoints of what is
            trained beside the model.
        command: the command that trains with this objective.
        settings: settings beside the `TrainConfig`, as JSON values. They are stored with a run,
            which can be resumed with the same ones only.
        can_shard: whether a model can be trained so whose weights are sharded over processes.
        may_jump: whether its loss may jump up without harm, so that `TrainConfig.max_jump` does not
            hold.
        tokenizer: the tokenizer of the text; None means one that is trained on it.
        beside: what is trained beside the model.
    """

    name = "model"
    command = "train"
    settings: Mapping[str, Any] = {}
    can_shard = True
    may_jump = False
    tokenizer: PreTrainedTokenizerFast | None = None

    def __init__(self, beside: nn.Module | None = None) -> None:
        self.beside = beside if beside is not None else nn.Module()

    def start(self, model: TLModel, config: TrainConfig, device: torch.device) -> None:
        """Prepare to train `model`, which is new or about to be restored from a checkpoint."""
        self.config = config
        self.forward = torch.compile(model) if config.compile else model

    def backward(
        self, tokens: Int[Tensor, "part pos"], share: float, step: int
    ) -> Float[Tensor, ""]:
        """Accumulate the gradients of the mean loss of a part of a batch, times its share.

        Args:
            tokens: the rows of the part.
            share: the share of the batch that the part is, at most 1.
            step: the number of this step, from 0.

        Returns:
            The loss times `share`, without its graph.
        """
        loss = next_token_loss(self.logits(self.forward, tokens), tokens) * share
        loss.backward()
        return loss.detach()

    def logits(
        self, model: Any, tokens: Int[Tensor, "part pos"]
    ) -> Float[Tensor, "part pos d_vocab"]:
        """The logits of a model in float32, computed in the precision of the configuration."""
        with self.computing(tokens):
            logits = model(tokens)
        return in_float32(logits)

    def computing(self, tokens: Int[Tensor, "part pos"]) -> AbstractContextManager[Any]:
        """The context in which models run on these tokens, in the configuration's precision."""
        in_bfloat16 = self.config.precision == "bfloat16"
        return torch.autocast(tokens.device.type, torch.bfloat16, enabled=in_bfloat16)

    def measured(self) -> dict[str, float]:
        """What is logged beside the loss: measurements of the last step."""
        return {}

    def record(self, validation: Int[Tensor, "seq pos"], batch_size: int) -> dict[str, Any]:
        """What is added to the record of the finished training, as JSON values."""
        return {}

    def save(self, folder: Path, record: Mapping[str, Any]) -> None:
        """Write what was trained beside the model into its folder."""


def next_token_loss(
    logits: Float[Tensor, "batch pos d_vocab"], tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, ""]:
    """The mean next-token loss, in nats.

    It equals the loss that the model returns with `return_type="loss"`, but without copies of the
    logits.
    """
    targets = F.pad(tokens[:, 1:], (0, 1), value=-100)  # the last token has no target
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
