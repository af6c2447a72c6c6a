"""`load` and `create`: TransformerLens models from a checkpoint, or from a config and a seed."""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from transformers import PreTrainedTokenizerBase

from tl_sparse.checkpoints.formats import read_checkpoint
from tl_sparse.checkpoints.network import (
    build_network,
    check_weights_fit,
    resolve_device,
    resolve_dtype,
)
from tl_sparse.checkpoints.sources import find, openai_tokenizer
from tl_sparse.checkpoints.steps import folder_of_step, name_of_model
from tl_sparse.config import check
from tl_sparse.data import find_tokenizer, load_tokenizer
from tl_sparse.errors import TokenizerError, warn_user
from tl_sparse.faces import wrap
from tl_sparse.files import read_json
from tl_sparse.kernels import kernel
from tl_sparse.network import Kernels, Product, SparseConfig, SparseTransformer, init_weights

#: The tokenizer of OpenAI's models, which their folders do not include, and its number of tokens.
_OPENAI_TOKENIZER = "tinypython_2k"
_OPENAI_VOCAB = 2048


def load(
    source: str | Path,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    *,
    revision: str | None = None,
    tokenizer: PreTrainedTokenizerBase | str | Path | None = None,
    kernels: Kernels = "auto",
    dense_weights: bool = True,
    abs_topk: Mapping[str, float] | None = None,
) -> Any:
    """Load a model as a true TransformerLens model, in eval mode.

    It is a `HookedTransformer` on TransformerLens 3 and a `TransformerBridge` on TransformerLens 4.
    The supported formats are ours (`config.json` and `model.safetensors`), OpenAI's model folders
    (`beeg_config.json` and `final_model.pt`), the model that OpenAI packaged for the hub, and those
    of sparse_pretrain. A model with bridges to a dense one is opened without them; see
    `tl_sparse.load_bridges`. No code that comes with a model is run.

    Args:
        source: a folder, or a name that `tl_sparse.checkpoints.find` accepts, such as "run@100" for
            the model that a training run keeps of its step 100. Its AbsTopK is that of the step.
        device: None means the GPU if there is one, else the CPU.
        dtype: None means the dtype in the file (the widest one, if there are several).
        revision: a branch, tag or commit of a hub repository.
        tokenizer: a tokenizer, or a source for `load_tokenizer`. None means the one in the folder
            of the model. OpenAI's folders have none; their tokenizer comes from their hub
            repository if it is available, but for a local folder only from the cache.
        kernels: how products with weights are computed, see `tl_sparse.network.Product`. "sparse"
            uses only nonzero weights where possible (on a CPU with numba, in float32 or float64,
            for at least 32 tokens, not under autocast or in `torch.compile`). "auto" does so where
            it is faster, "dense" never.
        dense_weights: False keeps only the nonzero weights of the blocks in memory, for inspection
            and inference. `W_in` and the other weights are then not parameters; each access makes
            a dense copy. Without numba, every product makes such a copy.
        abs_topk: the AbsTopK of the model, location → fraction kept, instead of what its files say;
            see `SparseConfig.abs_topk`. For published models with bridges, whose files contradict
            each other, None means AbsTopK as it was in training, which a warning says.

    Raises:
        CheckpointError: if a file is missing, damaged or does not fit its configuration.
        ConfigError: for a bad configuration value, `device`, `dtype`, `kernels`, `dense_weights` or
            `abs_topk`.
        DeviceMemoryError: if the GPU has too little free memory for the weights.
        TokenizerError: if `tokenizer` is not a tokenizer, cannot be read, or has more tokens than
            the vocabulary of the model.
    """
    _check_tokenizer(tokenizer, str | Path | PreTrainedTokenizerBase)
    device = resolve_device(device)
    dtype = resolve_dtype(dtype)
    choices = get_args(Kernels)
    check(kernels in choices, "kernels", kernels, f"one of {', '.join(choices)}")
    is_flag = isinstance(dense_weights, bool)
    check(is_flag, "dense_weights", dense_weights, "true or false")
    folder = find(source, revision)
    is_local = Path(source).is_dir() or folder_of_step(source) is not None
    checkpoint = read_checkpoint(folder)
    if abs_topk is not None:
        checkpoint = replace(checkpoint, config=replace(checkpoint.config, abs_topk=abs_topk))
    elif checkpoint.remark:
        warn_user(checkpoint.remark)
    if tokenizer is None:
        tokenizer = _tokenizer_for(folder, checkpoint.config, is_local)
    if isinstance(tokenizer, str | Path):
        tokenizer = load_tokenizer(tokenizer)
    network = build_network(checkpoint, folder, device, dtype, dense_weights)
    model = wrap(network, tokenizer)
    _choose_kernels(network, kernels)
    model.folder = folder.resolve()
    model.cfg.model_name = name_of_model(folder) if is_local else str(source)
    return model


def _tokenizer_for(folder: Path, config: SparseConfig, is_local: bool) -> Path | None:
    """The folder of the tokenizer: the model's own, or the one that OpenAI's models share."""
    beside = find_tokenizer(folder)
    openai_config = folder / "beeg_config.json"
    if beside is not None or not openai_config.is_file():
        return beside
    name = read_json(openai_config).get("tokenizer_name")
    if config.d_vocab == _OPENAI_VOCAB and name in (None, _OPENAI_TOKENIZER):
        return openai_tokenizer(local_only=is_local)
    return None


def _choose_kernels(network: SparseTransformer, kernels: Kernels) -> None:
    for module in network.modules():
        if isinstance(module, Product):
            module.kernels = kernels
    weight = network.embed.W_E
    if kernels == "sparse" and kernel("multiply", weight) is None:
        warnings.warn(
            "kernels = 'sparse' needs numba (pip install 'tl-sparse[fast]'), a CPU, and float32 or "
            f"float64; here, on {weight.device} in {weight.dtype}, products are dense",
            stacklevel=3,
        )


def create(
    config: SparseConfig,
    seed: int,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> Any:
    """A new model with weights drawn from `seed`; other arguments are those of `load`."""
    check(isinstance(config, SparseConfig), "config", config, "a SparseConfig")
    _check_tokenizer(tokenizer, PreTrainedTokenizerBase)
    device = resolve_device(device)
    network = SparseTransformer(config)
    check_weights_fit(network, device, resolve_dtype(dtype) or torch.get_default_dtype())
    init_weights(network, seed)
    network.to(device=device, dtype=resolve_dtype(dtype))
    return wrap(network, tokenizer)


def _check_tokenizer(tokenizer: object, kinds: Any) -> None:
    if tokenizer is not None and not isinstance(tokenizer, kinds):
        raise TokenizerError(
            f"tokenizer = {tokenizer!r} is not a tokenizer from transformers, nor the path or name "
            "of one"
        )
