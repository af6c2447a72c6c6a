"""The formats of model folders and their readers."""

from pathlib import Path

from tl_sparse.checkpoints.contents import a_dense_model, contents_of, no_model
from tl_sparse.checkpoints.native import MODEL_FILES, read_native_model
from tl_sparse.checkpoints.network import Checkpoint
from tl_sparse.checkpoints.openai import read_circuitgpt_model, read_openai_model
from tl_sparse.checkpoints.sparse_pretrain import BRIDGED_WEIGHTS, read_sparse_pretrain_model
from tl_sparse.errors import CheckpointError
from tl_sparse.files import read_json
from tl_sparse.outputs import finish_replacing

#: `model_type` in a config.json → its reader.
_READERS = {"tl_sparse": read_native_model, "circuitgpt": read_circuitgpt_model}


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read the model in a folder of any supported format, for `build_network`.

    Raises:
        CheckpointError: if the format is unknown, or a file is missing or damaged.
        ConfigError: for an impossible value in the configuration.
    """
    if (folder / "beeg_config.json").is_file():
        return read_openai_model(folder)
    finish_replacing(MODEL_FILES, folder)
    path = folder / "config.json"
    if not path.is_file() and (folder / BRIDGED_WEIGHTS).is_file():
        return read_sparse_pretrain_model(folder)
    if not path.is_file():
        raise CheckpointError(no_model(folder))
    values = read_json(path)
    if "model_config" in values:
        return read_sparse_pretrain_model(folder)
    reader = _READERS.get(str(values.get("model_type")))
    if reader is None:
        if "auto_map" not in values and contents_of(folder) == "dense model":
            raise CheckpointError(a_dense_model(str(folder)))
        code = "; the code it names (auto_map) is never run" if "auto_map" in values else ""
        raise CheckpointError(
            f"{path}: model_type is not 'tl_sparse' (ours) or 'circuitgpt' (OpenAI's), and there "
            "is no model_config (sparse_pretrain's): not a format that tl_sparse knows" + code
        )
    return reader(folder, values)
