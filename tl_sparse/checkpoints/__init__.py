"""Models on disk: OpenAI's folders and our own, read into the network; our own written."""

from __future__ import annotations

from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tl_sparse.checkpoints.native import read_ours as read_ours
from tl_sparse.checkpoints.native import save_model as save_model
from tl_sparse.checkpoints.network import Checkpoint as Checkpoint
from tl_sparse.checkpoints.network import build_network as build_network
from tl_sparse.checkpoints.network import resolve_device as resolve_device
from tl_sparse.checkpoints.network import resolve_dtype as resolve_dtype
from tl_sparse.checkpoints.openai import read_openai as read_openai
from tl_sparse.config import SparseConfig
from tl_sparse.errors import CheckpointError
from tl_sparse.faces import wrap
from tl_sparse.modules import SparseTransformer, init_weights
from tl_sparse.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load(source: str | Path, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None) -> Any:
    """Open a model folder as a true TransformerLens model, in eval mode.

    Args:
        source: a folder of ours (`config.json`, `model.safetensors`) or of OpenAI's (`beeg_config.json`,
            `final_model.pt`); a tokenizer.json in it becomes the model's tokenizer.
        device: None is the GPU if there is one, else the CPU.
        dtype: None keeps the file's (the widest, if it has several).

    Returns:
        A `HookedTransformer` on TransformerLens 3, a `TransformerBridge` on 4.

    Raises:
        CheckpointError: if a file is missing, damaged or does not fit its configuration.
        ConfigError: for a bad configuration value, `device` or `dtype`.
    """
    folder = Path(source)
    device, dtype = resolve_device(device), resolve_dtype(dtype)
    cfg, state = read_checkpoint(folder)
    network = build_network(cfg, state, folder)
    if dtype is None:
        dtype = reduce(torch.promote_types, (tensor.dtype for tensor in state.values()))
    network.to(device=device, dtype=dtype)
    tokenizer = load_tokenizer(folder) if (folder / "tokenizer.json").is_file() else None
    model = wrap(network, tokenizer)
    model.cfg.model_name = folder.resolve().name
    return model


def create(
    config: SparseConfig,
    seed: int,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> Any:
    """A fresh model from its architecture and a seed; otherwise as `load`."""
    network = SparseTransformer(config)
    init_weights(network, seed)
    return wrap(network.to(device=resolve_device(device), dtype=resolve_dtype(dtype)), tokenizer)


def read_checkpoint(folder: Path) -> Checkpoint:
    """The configuration and the network's state dict in a folder of any known format."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; give one with config.json or beeg_config.json in it")
    if (folder / "beeg_config.json").is_file():
        return read_openai(folder)
    if (folder / "config.json").is_file():
        return read_ours(folder)
    raise CheckpointError(f"{folder} holds no model: neither config.json (ours) nor beeg_config.json (OpenAI's)")
