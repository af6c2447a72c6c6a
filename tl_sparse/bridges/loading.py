"""`load_bridges`: a sparse model with its bridges, and the dense model that they lead to."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from tl_sparse.arguments import checked, described
from tl_sparse.bridges.fit import check_models_fit
from tl_sparse.bridges.pair import Bridges
from tl_sparse.bridges.storage import build_maps, has_maps, read_maps
from tl_sparse.checkpoints import find, load, open_model
from tl_sparse.circuits import hash_of_model
from tl_sparse.errors import (
    ArgumentError,
    BridgeError,
    CheckpointError,
    TLSparseError,
    warn_user,
)
from tl_sparse.hooks import TLModel


@checked("source", "device", "dtype", "tokenizer", "abs_topk")
def load_bridges(
    source: str | Path,
    dense: TLModel | str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    *,
    revision: str | None = None,
    tokenizer: PreTrainedTokenizerBase | str | Path | None = None,
    abs_topk: Mapping[str, float] | None = None,
) -> Bridges:
    """Open a sparse model together with its bridges to a dense model.

    The formats are ours, which `Bridges.save_pretrained` and `train_bridges` write, and that of
    sparse_pretrain, including the local checkpoints of its runs. `tl_sparse.load` opens the sparse
    model of such a folder alone.

    Args:
        source: a folder, `"user/repo"` on the Hugging Face hub, or another name that `load` takes.
        dense: the dense model: a TransformerLens model, or the folder or name of one. None means
            the one that the files name.
        device: the device of all three; None means that of a given dense model or else, as for
            `load`, the GPU if there is one.
        dtype: the dtype of the sparse model and the maps; None means that in the files.
        revision: a branch, tag or commit of a hub repository.
        tokenizer: as for `load`.
        abs_topk: as for `load`.

    Raises:
        CheckpointError: if a file is missing or damaged, or the dense model cannot be opened.
        BridgeError: if the dense model does not fit the sparse one.
        ConfigError, TokenizerError: as for `load`.
        UnsupportedError: if the dense model has no stream between attention and MLP.
    """
    given: Any = None  # the dense model, if it is given as such
    if not isinstance(dense, str | Path | None):
        given = as_model(dense)
        device = device if device is not None else next(given.parameters()).device
    folder = find(source, revision)
    stored = read_maps(folder)
    sparse = load(source, device, dtype, revision=revision, tokenizer=tokenizer, abs_topk=abs_topk)
    weight = next(sparse.parameters())
    dense_source = ""
    if given is None:
        dense_source = str(dense if dense is not None else stored.dense_source)
        given = _open_dense(source, dense_source, weight.device)
    check_models_fit(given, sparse)
    n_sites = 2 * sparse.cfg.n_layers + 1
    maps = build_maps(stored, n_sites, given.cfg.d_model, sparse.cfg.d_model)
    maps.to(device=weight.device, dtype=weight.dtype)
    bridges = Bridges(sparse, given, maps.eval(), stored.record, dense_source)
    if stored.dense_hash and stored.dense_hash != hash_of_model(given):
        warn_user(
            "the dense model does not have the weights that it had when the bridges were made: it "
            "is another model, or it was opened in another dtype or processed otherwise"
        )
    return bridges


@checked("source")
def has_bridges(source: str | Path) -> bool:
    """Whether there are bridges beside a model, so that `load_bridges` opens both.

    Args:
        source: the source of a model that has been opened. A model that is not in a folder, nor in
            the cache of the Hugging Face hub, has none.
    """
    try:
        folder = find(source)
    except CheckpointError:
        return False
    return has_maps(folder)


def as_model(dense: Any) -> Any:
    """A dense model that a user gives as such.

    Raises:
        ArgumentError: if it is none.
    """
    if not hasattr(type(dense), "hook_dict") and not hasattr(dense, "hook_dict"):
        raise ArgumentError(
            "dense must be a TransformerLens model, or the folder or name of one, not "
            f"{described(dense)}"
        )
    return dense


def _open_dense(source: str | Path, dense_source: str, device: torch.device) -> Any:
    """The dense model that is given, or that the files of the bridges name."""
    advice = (
        "give it with dense=…, a TransformerLens model or the folder or name of one; "
        f"tl_sparse.load({str(source)!r}) opens the sparse model alone"
    )
    if not dense_source:
        raise BridgeError(f"the files of {source} do not name the dense model; {advice}")
    try:
        return open_model(dense_source, device)
    except TLSparseError as error:
        raise type(error)(
            f"the dense model of {source} cannot be opened: {error}; {advice}"
        ) from error
