"""Locating models: in a folder, on the Hugging Face hub, or in OpenAI's public storage."""

import difflib
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path

from filelock import FileLock
from huggingface_hub import constants, errors, snapshot_download

from tl_sparse.checkpoints.contents import (
    Wanted,
    a_dense_model,
    a_model_is_no_circuit,
    contents_of,
)
from tl_sparse.checkpoints.download import download
from tl_sparse.checkpoints.steps import folder_of_step
from tl_sparse.errors import CheckpointError

_MODELS = Path(__file__).parents[1] / "models"
#: The models that come with the package.
_BUNDLED = {
    "tiny-python-sparse": _MODELS / "tiny-python-sparse",
    "tiny-python-dense": _MODELS / "tiny-python-dense",
    "tiny-python-wide": _MODELS / "tiny-python-wide",
    "tiny-python-wide-dense": _MODELS / "tiny-python-wide-dense",
    "tiny-python-bridged": _MODELS / "tiny-python-bridged",
}
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
#: The files that are fetched from a hub repository: only data, no code.
_DATA = ["*.json", "*.jsonl", "*.yaml", "*.safetensors", "*.txt", "*.tiktoken", "README.md"]
_SAFETENSORS = ("model.safetensors", "circuit.safetensors")
#: The files that are also fetched if the repository has no safetensors file.
_PICKLES = ["pytorch_model*.bin", "final_model.pt", "sparse_model.bin", "bridges.bin"]
_DESCRIBED_BY = ("config.json", "beeg_config.json", "circuit.json")

STORAGE = "https://openaipublic.blob.core.windows.net/circuit-sparsity/models"
_STORED = ("beeg_config.json", "final_model.pt")
_NUMBER = r"\d+(\.\d+)?"
_OPENAI_NAME = re.compile(
    r"csp_(yolo|bridges?)[12]"
    rf"|csp_sweep1_{_NUMBER}x_{_NUMBER}[kM]?nonzero_afrac{_NUMBER}"
    rf"|dense\d_{_NUMBER}x",
    re.ASCII,
)
_OPENAI_NAMES = (
    "csp_yolo1",
    "csp_yolo2",
    "csp_bridges1",
    "csp_bridges2",
    "dense1_1x",
    "dense1_2x",
    "dense1_4x",
    "csp_sweep1_1x_3.7Mnonzero_afrac0.250",  # an example of the many models in this sweep
)


def find(source: str | Path, revision: str | None = None, wanted: Wanted = "model") -> Path:
    """The local folder of a model or circuit, which is downloaded unless it is in the cache.

    The cache is Hugging Face's, under `HF_HOME`. With `HF_HUB_OFFLINE=1`, nothing is downloaded.

    Args:
        source: a folder; "RUN@STEP", a step that the training run in the folder RUN keeps, such as
            "run@100"; "tiny-python-sparse", "tiny-python-dense" or "tiny-python-bridged", which
            come with the package;
            `"user/repo"` on the Hugging Face hub; or the name of a model that OpenAI published.
            What can only be a path, such as "./x", "~/x" or "a/b/c", is never looked up elsewhere.
        revision: a branch, tag or commit of a hub repository; by default its main branch.
        wanted: what is looked for, for messages. Only models have names of their own.

    Raises:
        CheckpointError: if the source does not exist, access is denied, or the network or the disk
            fails.
    """
    if not isinstance(source, str | os.PathLike) or not str(source):
        raise CheckpointError(f"{str(source)!r} is not a folder, nor the name of a {wanted}")
    is_name = isinstance(source, str) and not os.path.exists(source) and not is_path(source)
    if is_name:
        folder = _folder_of_name(str(source), revision, wanted)
        if folder is not None:
            return folder
    if revision is not None:
        raise CheckpointError(
            f"revision = {revision!r} is not possible: {str(source)!r} is not a hub repository"
        )
    if os.path.isdir(source):
        return Path(source)
    if os.path.exists(source):
        raise CheckpointError(_not_a_folder(Path(source), wanted))
    folder = folder_of_step(source)
    if folder is not None:
        return folder
    if is_name:
        raise CheckpointError(_no_such_name(str(source), wanted))
    raise CheckpointError(f"there is no folder {str(source)!r}{_did_you_mean(source)}")


def is_path(source: str) -> bool:
    """Whether this can only be the path of a folder, and not the name of a model."""
    is_relative_or_absolute = source.startswith((".", "~", "/")) or "\\" in source
    return is_relative_or_absolute or ("/" in source and not _HUB_NAME.fullmatch(source))


def _folder_of_name(name: str, revision: str | None, wanted: Wanted) -> Path | None:
    """The folder of the model called `name`, if one exists; only hub models have revisions."""
    if _HUB_NAME.fullmatch(name):
        return _hub_folder(name, revision)
    if revision is not None:
        return None
    is_published = _OPENAI_NAME.fullmatch(name) is not None
    if wanted == "circuit" and (is_published or name in _BUNDLED):
        raise CheckpointError(a_model_is_no_circuit(name))
    if is_published:
        return _openai_folder(name)
    return _BUNDLED.get(name)


def _not_a_folder(path: Path, wanted: Wanted) -> str:
    """A message about a file that was given where a folder is wanted."""
    hint = ""
    if contents_of(path.parent) == wanted:
        hint = f"; did you mean its folder, {str(path.parent)!r}?"
    return f"{str(path)!r} is a file, not the folder of a {wanted}{hint}"


def _no_such_name(name: str, wanted: Wanted) -> str:
    """A message about a name that is neither that of a folder nor that of a model."""
    if wanted == "circuit":
        places = "a circuit is a folder that prune wrote, or 'user/repo' on the Hugging Face hub"
        return f"there is no folder {name!r}; {places}{_did_you_mean(name)}"
    if is_dense_name(name):
        return a_dense_model(name)
    message = f"there is no folder {name!r}, nor a model of that name"
    hint = _did_you_mean(name, *_BUNDLED, *_OPENAI_NAMES)
    if hint:
        return message + hint
    return (
        f"{message}: {', '.join(_BUNDLED)} come with tl_sparse, OpenAI published "
        f"{', '.join(_OPENAI_NAMES)}, …, and the Hugging Face hub has 'user/repo'"
    )


def is_dense_name(name: str) -> bool:
    """Whether TransformerLens knows a dense model by this name."""
    # Imported here, because only the message about a wrong name, and dense models, need it.
    from transformer_lens.supported_models import MODEL_ALIASES, OFFICIAL_MODEL_NAMES

    return name in OFFICIAL_MODEL_NAMES or any(name in known for known in MODEL_ALIASES.values())


def _did_you_mean(source: str | Path, *names: str) -> str:
    """A hint at the folder, or at one of these names, that is most like `source`; "" if none is."""
    if str(source).startswith("~") and os.path.isdir(os.path.expanduser(source)):
        return f"; did you mean {os.path.expanduser(source)!r}? Only the shell expands '~'"
    near = difflib.get_close_matches(str(source), names, n=1)
    folder = _nearest_folder(str(source))
    if folder is not None:
        near = [folder]
    return f"; did you mean {near[0]!r}?" if near else ""


def _nearest_folder(source: str) -> str | None:
    """The folder whose name is most like the first part of the path that does not exist."""
    missing = source.rstrip("/")
    while not os.path.isdir(os.path.dirname(missing) or "."):
        missing = os.path.dirname(missing)
    parent, name = os.path.split(missing)
    folders = []
    with suppress(OSError), os.scandir(parent or ".") as entries:
        folders = [entry.name for entry in entries if entry.is_dir()]
    near = difflib.get_close_matches(name, folders, n=1)
    return os.path.join(parent, near[0]) if near else None


def openai_tokenizer(local_only: bool = False) -> Path | None:
    """The folder of OpenAI's tokenizer `tinypython_2k`, from their hub repository.

    Args:
        local_only: whether to look only in the cache.

    Returns:
        The folder; None if the tokenizer is not available.
    """
    files = ["tokenizer*.json", "special_tokens_map.json"]
    try:
        folder = _snapshot("openai/circuit-sparsity", None, files, local_only)
    except CheckpointError:
        return None
    return folder if (folder / "tokenizer.json").is_file() else None


def _hub_folder(repo: str, revision: str | None) -> Path:
    """The folder of a repository; of a dense model, which `load` cannot read, without weights."""
    folder = _snapshot(repo, revision, ["*.json"])
    if not any((folder / name).is_file() for name in _DESCRIBED_BY):
        raise CheckpointError(
            f"{repo!r} on the hub is not a model or circuit: it has none of "
            f"{', '.join(_DESCRIBED_BY)}"
        )
    if contents_of(folder) == "dense model":
        return folder
    commit = folder.name
    folder = _snapshot(repo, commit, _DATA)
    if not any((folder / name).is_file() for name in _SAFETENSORS):
        folder = _snapshot(repo, commit, _PICKLES)
    return folder


def _snapshot(
    repo: str, revision: str | None, patterns: list[str], local_only: bool = False
) -> Path:
    """Fetch the files of a repository that match `patterns`, except those in subfolders."""
    try:
        path = snapshot_download(
            repo,
            revision=revision,
            allow_patterns=patterns,
            ignore_patterns=["*/*"],
            local_files_only=local_only,
        )
    # Any exception: depending on its version, huggingface_hub also raises those of httpx or
    # httpx2.
    except Exception as error:
        problem = _hub_problem(error, repo, revision)
        raise CheckpointError(
            f"there is no folder {repo!r}, and on the Hugging Face hub {repo!r} {problem}"
            f"{_did_you_mean(repo)}"
        ) from error
    return Path(path)


def _hub_problem(error: Exception, repo: str, revision: str | None) -> str:
    """An explanation of an error of huggingface_hub, and what to do about it."""
    page = f"{constants.ENDPOINT}/{repo}"
    if constants.HF_HUB_OFFLINE:
        return (
            f"is not (fully) in the cache {constants.HF_HUB_CACHE}; to reach the hub, unset "
            "HF_HUB_OFFLINE"
        )
    if isinstance(error, errors.GatedRepoError):
        return f"is gated: accept its terms on {page}, then log in with `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"has no revision {revision!r}; its branches and tags are on {page}/tree/main"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "is no repository that you may read; if it is private, log in: `hf auth login`"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return f"is not in the cache, and the hub cannot be reached: {error.__cause__}"
    return f"cannot be fetched: {error}"


def _openai_folder(name: str) -> Path:
    folder = Path(constants.HF_ASSETS_CACHE) / "tl_sparse" / "openai" / name
    missing = [file for file in _STORED if not (folder / file).is_file()]
    if not missing:
        return folder
    if constants.HF_HUB_OFFLINE:
        raise CheckpointError(
            f"{name!r} is not in the cache {folder}; to fetch it, unset HF_HUB_OFFLINE"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        near = _did_you_mean(name, *_OPENAI_NAMES)
        hint = f"OpenAI's models are {', '.join(_OPENAI_NAMES)}, …{near}"
        with FileLock(folder / ".lock"):  # another process may be fetching the same model
            for file in missing:
                download(f"{STORAGE}/{name}/{file}", folder / file, hint)
    except CheckpointError as error:
        is_unknown = getattr(error.__cause__, "code", None) == 404
        if is_unknown and not any(folder.glob("[!.]*")):
            shutil.rmtree(folder, ignore_errors=True)
        raise
    except OSError as error:
        raise CheckpointError(
            f"{name!r} cannot be written to the cache, which is under HF_HOME: {error}"
        ) from error
    return folder
