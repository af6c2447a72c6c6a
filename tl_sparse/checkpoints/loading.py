"""Models on disk, one format per file: read into the network whatever wrote them; ours written."""

import warnings
from pathlib import Path
from typing import Any, get_args

import torch
from transformers import PreTrainedTokenizerBase

from tl_sparse.checkpoints.formats import read_checkpoint
from tl_sparse.checkpoints.native import save_model
from tl_sparse.checkpoints.network import build_network, resolve_device, resolve_dtype
from tl_sparse.checkpoints.sources import find, openai_tokenizer
from tl_sparse.config import check
from tl_sparse.data import find_tokenizer, load_tokenizer
from tl_sparse.errors import TokenizerError
from tl_sparse.faces import wrap
from tl_sparse.files import read_json
from tl_sparse.kernels import kernel
from tl_sparse.network import Kernels, Product, SparseConfig, SparseTransformer, init_weights

__all__ = [
    "build_network",
    "create",
    "load",
    "read_checkpoint",
    "resolve_device",
    "resolve_dtype",
    "save_model",
]
#: The tokenizer of the models in OpenAI's folders, which is in none of them; and its number of
#: entries.
_OPENAI_TOKENIZER, _OPENAI_VOCAB = "tinypython_2k", 2048


def load(
    source: str | Path,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    *,
    revision: str | None = None,
    tokenizer: PreTrainedTokenizerBase | str | Path | None = None,
    kernels: Kernels = "auto",
    dense_weights: bool = True,
) -> Any:
    """Open a model as a true TransformerLens model (line 3: `HookedTransformer`, 4:
    `TransformerBridge`), in eval mode.

    The formats: ours (`config.json` and `model.safetensors`), OpenAI's model folders
        (`beeg_config.json` and
    `final_model.pt`), the model they packaged for the hub, and those of sparse_pretrain. No code
    that comes with a model is run.

    Args:
        source: a folder, or a name that `tl_sparse.checkpoints.find` knows.
        device: None is the GPU if there is one, else the CPU.
        dtype: None keeps the file's (the widest, if it has several).
        revision: of a hub repository: a branch, tag or commit.
        tokenizer: a tokenizer, or where `load_tokenizer` finds one; None: the one beside the model,
            or OpenAI's from their hub repository for their models, if it can be had; for a folder
            here only from the cache.
        kernels: how weights multiply, see `tl_sparse.network.Product`: "sparse" by their nonzero
            entries, where that can be (on a CPU with numba, in float32 and float64, from 32 tokens
            on, not under autocast or in `torch.compile`); "auto" where it is faster; "dense" never.
        dense_weights: False keeps of the weights of the blocks only what is not zero, to look at
            and to run: `W_in` and the others are then no parameters but dense copies, made when
                they are asked for. Without numba, that is
            whenever they multiply.

    Raises:
        CheckpointError: if a file is missing, damaged or does not fit its configuration.
        ConfigError: for a bad configuration value, `device`, `dtype` or `kernels`.
        TokenizerError: if the tokenizer is none, cannot be read or has more tokens than the model.
    """
    _check_tokenizer(tokenizer, str | Path | PreTrainedTokenizerBase)
    device, dtype = resolve_device(device), resolve_dtype(dtype)
    check(
        kernels in get_args(Kernels), "kernels", kernels, f"one of {', '.join(get_args(Kernels))}"
    )
    folder = find(source, revision)
    cfg, state = read_checkpoint(folder)
    tokenizer = find_tokenizer(folder) if tokenizer is None else tokenizer
    if tokenizer is None and (path := folder / "beeg_config.json").is_file():
        named = read_json(path).get("tokenizer_name")
        if cfg.d_vocab == _OPENAI_VOCAB and named in (None, _OPENAI_TOKENIZER):
            tokenizer = openai_tokenizer(local_only=Path(source).is_dir())
    if isinstance(tokenizer, str | Path):
        tokenizer = load_tokenizer(tokenizer)
    model = wrap(build_network(cfg, state, folder, device, dtype, dense_weights), tokenizer)
    for product in (module for module in model.network.modules() if isinstance(module, Product)):
        product.kernels = kernels
    if kernels == "sparse" and kernel("multiply", model.network.embed.W_E) is None:
        warnings.warn(
            f"kernels = 'sparse' needs numba (pip install 'tl-sparse[fast]'), a CPU, and float32 or float64; here, on "
            f"{model.cfg.device} in {model.cfg.dtype}, products are dense",
            stacklevel=2,
        )
    model.cfg.model_name = folder.resolve().name if Path(source).is_dir() else str(source)
    return model


def create(
    config: SparseConfig,
    seed: int,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> Any:
    """A fresh model from its architecture and a seed; otherwise as `load`."""
    check(isinstance(config, SparseConfig), "config", config, "a SparseConfig")
    check(isinstance(seed, int) and -(2**63) <= seed < 2**64, "seed", seed, "an integer of 64 bits")
    _check_tokenizer(tokenizer, PreTrainedTokenizerBase)
    network = SparseTransformer(config)
    init_weights(network, seed)
    return wrap(network.to(device=resolve_device(device), dtype=resolve_dtype(dtype)), tokenizer)


def _check_tokenizer(tokenizer: object, kinds: Any) -> None:
    if tokenizer is not None and not isinstance(tokenizer, kinds):
        raise TokenizerError(
            f"tokenizer = {tokenizer!r} is not a tokenizer of transformers, nor a place of one"
        )
