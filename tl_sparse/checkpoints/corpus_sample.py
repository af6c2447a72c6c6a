"""The sample of a model's training tokens that is saved with it, for mean activations."""

from pathlib import Path

from jaxtyping import Int32
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tl_sparse.checkpoints.sources import find
from tl_sparse.data import DataConfig, load_documents, pack_tokens
from tl_sparse.errors import CheckpointError, DataError, TokenizerError
from tl_sparse.files import read_tensors

#: The file with the sample, in the folder of the model.
CORPUS_SAMPLE = "corpus_sample.safetensors"
#: The number of rows, which is enough for stable means.
CORPUS_ROWS = 512


def load_corpus(
    model: str | Path,
    tokenizer: PreTrainedTokenizerFast | None,
    n_ctx: int,
    source: str | None = None,
) -> Int32[Tensor, "seq n_ctx"]:
    """Tokens from the training distribution of a model, for mean activations.

    Args:
        model: the folder of the model, or another name that `load` accepts. `train` saves a sample
            of the training tokens in the folder.
        tokenizer: the tokenizer of the model.
        n_ctx: the length of the rows.
        source: text to use instead of that sample; see `DataConfig.source`.

    Raises:
        DataError: if the folder has no sample and `source` is None, or the source cannot be used.
        TokenizerError: if a source is given, but the model has no tokenizer.
        CheckpointError: if the model does not exist, or the sample is damaged.
    """
    if source is None:
        return _read_sample(find(model) / CORPUS_SAMPLE, n_ctx)
    if tokenizer is None:
        raise TokenizerError("the model has no tokenizer, so text cannot become tokens for it")
    config = DataConfig(source, max_chars=3_000_000, stdlib_chars=300_000, idiom_chars=300_000)
    documents = load_documents(config)
    return pack_tokens(documents.train, tokenizer, n_ctx, seed=0)[:CORPUS_ROWS]


def _read_sample(path: Path, n_ctx: int) -> Int32[Tensor, "seq pos"]:
    if not path.is_file():
        raise DataError(
            f"{path} does not exist; give the text the model was trained on, or one like it "
            "(source=… in Python, --corpus for a command)"
        )
    tokens = read_tensors(path).get("tokens")
    if tokens is None or tokens.ndim != 2 or tokens.is_floating_point() or not len(tokens):
        raise CheckpointError(f"{path} must hold integer tokens [seq, pos]")
    n_pos = tokens.shape[1]
    if n_pos > n_ctx:
        raise DataError(f"{path}: rows of {n_pos} tokens do not fit the context of n_ctx = {n_ctx}")
    return tokens.int()
