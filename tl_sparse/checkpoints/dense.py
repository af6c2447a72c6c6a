"""Opening any model that the commands take: ours, or a dense one through TransformerLens."""

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int32
from torch import Tensor

from tl_sparse.checkpoints.contents import contents_of
from tl_sparse.checkpoints.corpus_sample import load_corpus
from tl_sparse.checkpoints.loading import load
from tl_sparse.checkpoints.network import resolve_device
from tl_sparse.checkpoints.sources import find, is_dense_name
from tl_sparse.data import check_source
from tl_sparse.errors import CheckpointError, DataError, TokenizerError, UnsupportedError
from tl_sparse.faces import transformer_lens_line
from tl_sparse.files import printable_name
from tl_sparse.hooks import is_sparse_model

#: The length of the rows of text over which means are taken in a dense model, whose context may be
#: as long as a book.
_ROW_TOKENS = 256
#: Any of these files of Hugging Face holds the vocabulary of a tokenizer.
_TOKENIZER_FILES = ("tokenizer.json", "vocab.*", "*.model", "*.tiktoken", "tekken.json")


def open_model(source: str | Path, device: str | torch.device | None = None) -> Any:
    """Open a model: one of this package, as `load` does, or a dense one of Hugging Face.

    A dense model is a `TransformerBridge` on TransformerLens 4. On TransformerLens 3 it is a
    `HookedTransformer`, and must be one of those that TransformerLens lists by name. Its weights
    are not processed (folded, centered).

    Args:
        source: a folder of either kind of model, or a name: one that `load` knows, "owner/name" on
            the Hugging Face hub, or one that TransformerLens knows, such as "gpt2".
        device: None means the GPU if there is one, else the CPU.

    Raises:
        CheckpointError: as for `load`, or if TransformerLens cannot open the dense model.
        UnsupportedError: for a dense model in a folder, on TransformerLens 3.
        TokenizerError: if a dense model in a folder has no tokenizer.
        ConfigError: if there is no such device.
    """
    device = resolve_device(device)
    if not is_dense(source):
        return load(source, device)
    is_folder = os.path.isdir(source)
    if is_folder:
        _check_tokenizer(Path(source))
    with warnings.catch_warnings():
        # TransformerLens says that names and classes will go in its next version.
        warnings.simplefilter("ignore", DeprecationWarning)
        model = _boot(str(source), device)
    model.cfg.model_name = printable_name(Path(source)) if is_folder else str(source)
    return model.eval()


def _check_tokenizer(folder: Path) -> None:
    """Raise `TokenizerError` unless there is a tokenizer beside a dense model.

    Transformers would make one up that knows only a few special tokens.
    """
    if not any(next(folder.glob(pattern), None) for pattern in _TOKENIZER_FILES):
        raise TokenizerError(
            f"no tokenizer is beside the model in {folder}; save the model's own there with "
            f"tokenizer.save_pretrained({str(folder)!r})"
        )


def is_dense(source: str | Path) -> bool:
    """Whether a source is that of a dense model of Hugging Face.

    Raises:
        CheckpointError: if there is no such folder or name.
    """
    if isinstance(source, str) and not os.path.exists(source) and is_dense_name(source):
        return True
    return contents_of(find(source)) == "dense model"


def open_with_corpus(
    source: str | Path, corpus: str | None = None, device: str | torch.device | None = None
) -> tuple[Any, Int32[Tensor, "seq pos"]]:
    """A model as `open_model` returns it, and its corpus as `corpus_of` returns it.

    Raises:
        CheckpointError, ConfigError, UnsupportedError: as for `open_model`.
        DataError, TokenizerError: as for `corpus_of`.
    """
    # Mistakes are said before a large model is opened.
    if corpus is not None:
        check_source(corpus)
    elif is_dense(source):
        raise DataError(_no_sample(source))
    model = open_model(source, device)
    return model, corpus_of(model, source, corpus)


def corpus_of(
    model: Any, source: str | Path, corpus: str | None = None
) -> Int32[Tensor, "seq pos"]:
    """Tokens of the training distribution of a model.

    Args:
        model: the model, opened from `source`.
        corpus: the text of the tokens; see `DataConfig.source`. None means the sample that is
            stored with a model of this package.

    Raises:
        DataError: if there is no such sample and `corpus` is None, or a text cannot be used.
        TokenizerError: if the model has no tokenizer for a text.
    """
    if is_sparse_model(model):
        return load_corpus(source, model.tokenizer, model.cfg.n_ctx, corpus)
    if corpus is None:
        raise DataError(_no_sample(source))
    return load_corpus(source, model.tokenizer, min(model.cfg.n_ctx, _ROW_TOKENS), corpus)


def _no_sample(source: str | Path) -> str:
    return (
        f"{source} is a dense model, with which no sample of text is stored: give text like that "
        "it was trained on with --corpus, a folder, a glob pattern, a file or 'builtin'"
    )


def _boot(source: str, device: torch.device) -> Any:
    """The dense model as TransformerLens opens it, in eval mode, with its weights as they are."""
    line = transformer_lens_line()
    if line == 3 and not is_dense_name(source):
        raise UnsupportedError(
            f"{source} is a dense model that TransformerLens 3 does not list by name, and it opens "
            "no others; TransformerLens 4 does"
        )
    try:
        if line == 4:
            from transformer_lens.model_bridge import TransformerBridge

            return TransformerBridge.boot_transformers(source, device=device)
        from transformer_lens import HookedTransformer

        return HookedTransformer.from_pretrained_no_processing(source, device=device)
    # Any exception: transformers, the hub's client and TransformerLens each raise their own.
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(
            f"TransformerLens cannot open the dense model {source}: {reason[0][:300]}"
        ) from error
