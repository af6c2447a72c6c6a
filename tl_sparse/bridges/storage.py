"""The files of bridges, beside those of their sparse model.

`bridges.json` describes the maps, and names the dense model. `bridges.safetensors` has the tensors:
`sites.{number}.encoder.…` and `sites.{number}.decoder.…`. The files of sparse_pretrain are read
too: `bridges.bin`, with settings in `config.json` or `training_config.yaml`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from tl_sparse.bridges.config import EncoderKind
from tl_sparse.bridges.maps import Maps
from tl_sparse.checkpoints import sparse_pretrain_settings
from tl_sparse.checksums import FILES, check_files, checksums_of
from tl_sparse.config import check, is_number
from tl_sparse.errors import CheckpointError
from tl_sparse.files import (
    errors_name_file,
    read_json,
    read_state_dict,
    read_tensors,
    write_json,
    write_tensors,
)
from tl_sparse.outputs import FileSet, finish_replacing, replacing_together

FORMAT = "tl_sparse bridges"
FORMAT_VERSION = 1
BRIDGE_FILES = FileSet(
    what="bridges", described_by="bridges.json", required=("bridges.safetensors",)
)
#: The maps of sparse_pretrain.
_SPARSE_PRETRAIN_MAPS = "bridges.bin"


@dataclass(frozen=True, eq=False)
class StoredMaps:
    """What the files of bridges hold.

    Attributes:
        tensors: the tensors by the names that they have in `Maps`, not yet checked.
        path: the file that they are in, for messages.
        kind: which entries an encoder keeps; see `Encoder`.
        fraction: the share of its entries that an encoder with AbsTopK keeps.
        dense_source: the folder or name of the dense model; "" if it is not known.
        dense_hash: the hash of its weights; "" if it is not known.
        record: what else is known, as JSON values.
    """

    tensors: dict[str, Tensor]
    path: Path
    kind: EncoderKind
    fraction: float
    dense_source: str
    dense_hash: str
    record: dict[str, Any]


def write_maps(
    folder: Path, maps: Maps, dense: Mapping[str, str], record: Mapping[str, Any]
) -> None:
    """Write maps into the folder of their sparse model, in place of any others.

    Args:
        folder: the folder.
        maps: the maps.
        dense: the source and the hash of the dense model.
        record: what is known of them, as JSON values.

    Raises:
        CheckpointError: if they cannot be written.
    """
    values = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "dense": dict(dense),
        "encoder": maps.kind,
        "fraction": maps.fraction,
        "record": dict(record),
    }
    with replacing_together(BRIDGE_FILES, folder, overwrite=True) as new:
        write_tensors(new / "bridges.safetensors", maps.state_dict())
        write_json(new / "bridges.json", {**values, FILES: checksums_of(new)})


def has_maps(folder: Path) -> bool:
    """Whether a folder has the files of bridges, of ours or of sparse_pretrain."""
    finish_replacing(BRIDGE_FILES, folder)
    return (folder / "bridges.json").is_file() or (folder / _SPARSE_PRETRAIN_MAPS).is_file()


def read_maps(folder: Path) -> StoredMaps:
    """Read the maps in a folder of ours or of sparse_pretrain.

    Raises:
        CheckpointError: if there are none, or a file is damaged.
        ConfigError: for an impossible value in a configuration.
    """
    finish_replacing(BRIDGE_FILES, folder)
    if (folder / "bridges.json").is_file():
        return _read_ours(folder)
    path = folder / _SPARSE_PRETRAIN_MAPS
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no bridges: neither bridges.json (ours) nor {path.name} "
            "(sparse_pretrain's); tl_sparse.load opens a model without bridges"
        )
    return _read_sparse_pretrain(folder, path)


def _read_ours(folder: Path) -> StoredMaps:
    path = folder / "bridges.json"
    weights = folder / "bridges.safetensors"
    values = read_json(path)
    check_files(path, values, weights)
    if values.get("format") != FORMAT or values.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format is not {FORMAT!r}, or format_version not {FORMAT_VERSION}: a newer "
            "tl_sparse wrote it"
        )
    dense, record = values.get("dense"), values.get("record")
    if not isinstance(dense, dict) or not isinstance(record, dict):
        raise CheckpointError(f"{path}: dense and record must be JSON objects")
    with errors_name_file(path):
        kind = _kind(values.get("encoder"))
        fraction = _fraction("fraction", values.get("fraction"))
    return StoredMaps(
        tensors=read_tensors(weights),
        path=weights,
        kind=kind,
        fraction=fraction,
        dense_source=str(dense.get("source", "")),
        dense_hash=str(dense.get("hash", "")),
        record=record,
    )


def _read_sparse_pretrain(folder: Path, path: Path) -> StoredMaps:
    settings = sparse_pretrain_settings(folder)
    tensors = {}
    for name, tensor in read_state_dict(path).items():
        # bridges.0.decoder.linear.weight is sites.0.decoder.weight here.
        ours = name.replace("bridges.", "sites.", 1).replace("decoder.linear.", "decoder.")
        tensors[ours] = tensor
    has_thresholds = any(name.endswith("log_eps") for name in tensors)
    named = settings.bridges.get("bridge_act_fn", "threshold" if has_thresholds else "abstopk")
    with errors_name_file(settings.file):
        kind = _kind("abs_topk" if named == "abstopk" else named)
        fraction = _fraction("encoder_afrac", settings.bridges.get("encoder_afrac", 0.25))
    if has_thresholds and kind != "threshold":
        raise CheckpointError(f"{path} has thresholds (log_eps), but {settings.file} says AbsTopK")
    return StoredMaps(tensors, path, kind, fraction, settings.dense, "", {})


def _kind(value: Any) -> EncoderKind:
    kinds = get_args(EncoderKind)
    check(value in kinds, "encoder", value, f"one of {', '.join(kinds)}")
    kind: EncoderKind = value
    return kind


def _fraction(name: str, value: Any) -> float:
    check(is_number(value) and 0 < value <= 1, name, value, "a fraction in (0, 1]")
    return float(value)


def build_maps(stored: StoredMaps, n_sites: int, d_dense: int, d_sparse: int) -> Maps:
    """The maps between streams of these widths, with exactly the stored tensors.

    Raises:
        CheckpointError: if a tensor is missing, unknown, of another shape or dtype, or has entries
            that are no finite numbers.
    """
    with torch.device("meta"):
        maps = Maps(n_sites, d_dense, d_sparse, stored.kind, stored.fraction)
    expected = maps.state_dict()
    problems = [f"missing {name}" for name in sorted(expected.keys() - stored.tensors.keys())]
    problems += [f"unexpected {name}" for name in sorted(stored.tensors.keys() - expected.keys())]
    if problems:
        shown = ", ".join(problems[:3]) + (", …" if len(problems) > 3 else "")
        raise CheckpointError(
            f"{stored.path}: its tensors are not those of bridges at {n_sites} sites: {shown}"
        )
    state = {}
    for name, meta in expected.items():
        tensor = stored.tensors[name]
        if tensor.shape != meta.shape or not tensor.is_floating_point():
            raise CheckpointError(
                f"{stored.path}: {name} is {tensor.dtype} of shape {list(tensor.shape)}; the two "
                f"models need floats of {list(meta.shape)}"
            )
        if not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{stored.path}: {name} has entries that are NaN or infinite")
        state[name] = tensor.clone()
    maps.load_state_dict(state, assign=True)
    return maps
