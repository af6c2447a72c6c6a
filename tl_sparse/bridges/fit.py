"""Whether two models, and the maps between their streams, fit each other."""

from typing import Any

from tl_sparse.bridges.maps import Maps
from tl_sparse.bridges.streams import check_has_sites
from tl_sparse.errors import BridgeError
from tl_sparse.hooks import TLModel


def check_models_fit(dense: TLModel, sparse: TLModel) -> None:
    """Check that bridges can join two models.

    Raises:
        BridgeError: if they differ in layers, vocabulary, tokenizer or device.
        UnsupportedError: if one has no stream between attention and MLP.
    """
    for name, what in (("n_layers", "layers"), ("d_vocab", "tokens in its vocabulary")):
        ours, others = getattr(sparse.cfg, name), getattr(dense.cfg, name)
        if ours != others:
            raise BridgeError(
                f"the dense model has {others} {what}, the sparse one {ours}; bridges join models "
                "with equal numbers of them"
            )
    check_tokenizers_fit(dense.tokenizer, sparse.tokenizer)
    devices = [next(model.parameters()).device for model in (dense, sparse)]
    if devices[0] != devices[1]:
        raise BridgeError(
            f"the dense model is on {devices[0]} and the sparse one on {devices[1]}; move one of "
            "them with .to(device)"
        )
    check_has_sites(dense)
    check_has_sites(sparse)


def check_tokenizers_fit(dense: Any, sparse: Any) -> None:
    """Raise `BridgeError` if two tokenizers give other ids for the same text; None fits all."""
    if dense is None or sparse is None:
        return
    dense_ids, sparse_ids = dense.get_vocab(), sparse.get_vocab()
    for token in sorted(sparse_ids, key=sparse_ids.__getitem__):
        number, other = sparse_ids[token], dense_ids.get(token)
        if number != other:
            raise BridgeError(
                f"the dense model and the sparse one have different tokenizers: {token!r} is token "
                f"{number} of the sparse one, and {other} of the dense one"
            )


def check_maps_fit(maps: Maps, dense: TLModel, sparse: TLModel) -> None:
    """Raise `BridgeError` if two models have other numbers of sites or channels than the maps."""
    sizes = {
        "sites": (len(maps), 2 * sparse.cfg.n_layers + 1),
        "channels of the dense stream": (maps.d_dense, dense.cfg.d_model),
        "channels of the sparse stream": (maps.d_sparse, sparse.cfg.d_model),
    }
    for what, (of_maps, of_models) in sizes.items():
        if of_maps != of_models:
            raise BridgeError(f"the bridges are for {of_maps} {what}, the models have {of_models}")
