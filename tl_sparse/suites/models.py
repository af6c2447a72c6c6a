"""The model of a job with the means over its corpus, recognised by its contents."""

import functools
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from tl_sparse.checkpoints import find, is_dense, open_with_corpus
from tl_sparse.circuits import NodeKind
from tl_sparse.hooks import NodeValues, TLModel
from tl_sparse.pruning import PruneConfig, corpus_means
from tl_sparse.suites.content import check_unchanged, content_of_model


def model_name(source: str) -> str:
    """What a suite calls a model: the last part of its folder or name."""
    return Path(source).resolve().name


def name_in_study(source: str) -> str:
    """What the stored settings of a search call a model: the name of its folder."""
    return model_name(source) if is_dense(source) else find(source).resolve().name


def loaded(
    source: str,
    corpus: str | None,
    device: str | None,
    config: PruneConfig,
    contents: Mapping[str, str],
) -> tuple[TLModel, Tensor, NodeValues]:
    """A model, the tokens [seq, pos] of its corpus, and their `corpus_means`; cached.

    Args:
        contents: the hashes with which the suite or search began, see `content_of_model`.

    Raises:
        SuiteError: if the model or its corpus has other contents.
    """
    expected = frozenset(contents.items())
    gated = (config.embed_gates, config.nodes)
    return _loaded(source, corpus, device, config.batch_size, *gated, expected)


# Jobs are ordered by model, so one is enough. The contents belong to the key: a later suite of this
# process may find another model in the same folder.
@functools.lru_cache(maxsize=1)
def _loaded(
    source: str,
    corpus: str | None,
    device: str | None,
    batch_size: int,
    embed: bool,
    kind: NodeKind,
    expected: frozenset[tuple[str, str]],
) -> tuple[TLModel, Tensor, NodeValues]:
    model, tokens = open_with_corpus(source, corpus, device)
    check_unchanged(dict(expected), content_of_model(model_name(source), model, tokens))
    return model, tokens, corpus_means(model, tokens, batch_size, embed, kind=kind)
