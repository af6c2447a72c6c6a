"""The sample of a model's training tokens that is saved beside it; means are taken over it."""

from pathlib import Path

from jaxtyping import Int32
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tl_sparse.checkpoints.sources import find
from tl_sparse.data import DataConfig, load_documents, pack_tokens
from tl_sparse.errors import CheckpointError, DataError, TokenizerError
from tl_sparse.files import read_tensors

#: A sample of the training tokens, saved with a model; enough rows for stable means wherever it is
#: pruned.
CORPUS_SAMPLE = "corpus_sample.safetensors"
CORPUS_ROWS = 512


def load_corpus(
    model: str | Path,
    tokenizer: PreTrainedTokenizerFast | None,
    n_ctx: int,
    source: str | None = None,
) -> Int32[Tensor, "seq n_ctx"]:
    """Tokens of a model's training distribution, to take means over.

    Args:
        model: its folder, or another name that `load` knows; `train` leaves a sample of the
            training tokens there.
        tokenizer: of the model.
        n_ctx: length of the rows.
        source: text to use instead of that sample: see `DataConfig.source`.

    Raises:
        DataError: no sample in the folder and no `source`; or the source cannot be used.
        TokenizerError: a source is given, but there is no tokenizer.
        CheckpointError: there is no such model, or the sample is damaged.
    """
    if source is None:
        sample = find(model) / CORPUS_SAMPLE
        if not sample.is_file():
            raise DataError(
                f"{sample} does not exist; give the text the model was trained on, or one like it"
            )
        tokens = read_tensors(sample).get("tokens")
        if tokens is None or tokens.ndim != 2 or tokens.is_floating_point() or not len(tokens):
            raise CheckpointError(f"{sample} must hold integer tokens [seq, pos]")
        if tokens.shape[1] > n_ctx:
            raise DataError(
                f"{sample}: rows of {tokens.shape[1]} tokens do not fit the context of n_ctx = {n_ctx}"
            )
        return tokens.int()
    if tokenizer is None:
        raise TokenizerError("the model has no tokenizer, so text cannot become tokens for it")
    documents = load_documents(
        DataConfig(source, max_chars=3_000_000, stdlib_chars=300_000, idiom_chars=300_000)
    )
    return pack_tokens(documents.train, tokenizer, n_ctx, seed=0)[:CORPUS_ROWS]
