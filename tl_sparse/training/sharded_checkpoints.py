"""Checkpoints of runs whose weights are sharded: folders to which every process writes its part.

torch.distributed.checkpoint writes and reads them, as safetensors files without pickles. So any
other number of processes can read them, and so can a process that holds the whole model.
"""

import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tl_sparse.checksums import FILES, check_files, checksums_of
from tl_sparse.errors import CheckpointError
from tl_sparse.files import read_json, write_json
from tl_sparse.outputs import UNFINISHED_FOLDER
from tl_sparse.training.processes import Processes

#: The file in such a folder with the checksums of the others.
_DESCRIPTION = "checkpoint.json"


def write_shards(folder: Path, tensors: Mapping[str, Tensor], processes: Processes) -> None:
    """Write tensors, some of which are sharded, to a new folder: all of its files, or none.

    All processes call this together.

    Raises:
        CheckpointError: in all processes, if they cannot be written.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    temporary = folder.with_name(UNFINISHED_FOLDER + folder.name)
    with processes.main_alone() as main:
        if main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
    writer = HuggingFaceStorageWriter(str(temporary), save_distributed=True)
    try:
        save(dict(tensors), storage_writer=writer)
    except CheckpointException as error:
        causes = "; ".join(str(cause) for cause, _ in error.failures.values())
        raise CheckpointError(f"cannot write {folder}: {causes}") from error
    with processes.main_alone() as main:
        if main:
            write_json(temporary / _DESCRIPTION, {FILES: checksums_of(temporary)})
            shutil.rmtree(folder, ignore_errors=True)
            temporary.rename(folder)


def read_shards(
    folder: Path, empty: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Read a folder that `write_shards` wrote, or of each tensor the part that is needed here.

    Args:
        folder: the folder.
        empty: from the tensors in the folder, without their values, makes the tensors that they are
            read into. These may be sharded.

    Raises:
        CheckpointError: if the folder is damaged, or as `empty` raises it.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    description = folder / _DESCRIPTION
    check_files(description, read_json(description), folder)
    reader = HuggingFaceStorageReader(str(folder))
    stored = {}
    contents: Mapping[str, Any] = reader.read_metadata().state_dict_metadata
    for name, about in contents.items():
        dtype = about.properties.dtype
        stored[name] = torch.empty(about.size, dtype=dtype, device="meta")
    tensors = empty(stored)
    with warnings.catch_warnings():
        # Each process reads for itself what it needs, which is how it is meant.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load(tensors, storage_reader=reader, no_dist=True)
    return tensors
