"""Locating models: in a folder, on the Hugging Face hub, or in OpenAI's public storage."""

import difflib
import os
import re
import shutil
from pathlib import Path

from filelock import FileLock
from huggingface_hub import constants, errors, snapshot_download

from tl_sparse.checkpoints.download import download
from tl_sparse.errors import CheckpointError

_MODELS = Path(__file__).parents[1] / "models"
#: The models that come with the package.
_BUNDLED = {
    "tiny-python-sparse": _MODELS / "tiny-python-sparse",
    "tiny-python-dense": _MODELS / "tiny-python-dense",
}
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
#: The files that are fetched from a hub repository: only data, no code.
_DATA = ["*.json", "*.jsonl", "*.safetensors", "*.txt", "*.tiktoken", "README.md"]
_SAFETENSORS = ("model.safetensors", "circuit.safetensors")
#: The files that are also fetched if the repository has no safetensors file.
_PICKLES = ["pytorch_model*.bin", "final_model.pt"]
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


def find(source: str | Path, revision: str | None = None) -> Path:
    """The local folder of a model or circuit, which is downloaded unless it is in the cache.

    The cache is Hugging Face's, under `HF_HOME`. With `HF_HUB_OFFLINE=1`, nothing is downloaded.

    Args:
        source: a folder; "tiny-python-sparse" or "tiny-python-dense", which come with the package;
            `"user/repo"` on the Hugging Face hub; or the name of a model that OpenAI published.
        revision: a branch, tag or commit of a hub repository; by default its main branch.

    Raises:
        CheckpointError: if the source does not exist, access is denied, or the network or the disk
            fails.
    """
    if isinstance(source, str) and not os.path.exists(source):
        folder = _folder_of_name(source, revision)
        if folder is not None:
            return folder
    if revision is not None:
        raise CheckpointError(
            f"revision = {revision!r} is not possible: {str(source)!r} is not a hub repository"
        )
    if not isinstance(source, str | os.PathLike) or not os.path.isdir(source):
        raise CheckpointError(
            f"{str(source)!r} is not a folder, nor 'user/repo' on the Hugging Face hub, nor one of "
            f"{', '.join(_BUNDLED)}, which come with tl_sparse, nor a model that OpenAI published: "
            f"{_openai_names(str(source))}"
        )
    return Path(source)


def _folder_of_name(name: str, revision: str | None) -> Path | None:
    """The folder of the model called `name`, if one exists; only hub models have revisions."""
    if _HUB_NAME.fullmatch(name):
        return _hub_folder(name, revision)
    if revision is not None:
        return None
    if _OPENAI_NAME.fullmatch(name):
        return _openai_folder(name)
    return _BUNDLED.get(name)


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
    folder = _snapshot(repo, revision, _DATA)
    if not any((folder / name).is_file() for name in _SAFETENSORS):
        commit = folder.name
        folder = _snapshot(repo, commit, _PICKLES)
    if not any((folder / name).is_file() for name in _DESCRIBED_BY):
        raise CheckpointError(
            f"{repo!r} on the hub is not a model or circuit: it has none of "
            f"{', '.join(_DESCRIBED_BY)}"
        )
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
        raise CheckpointError(f"{repo!r} {_hub_problem(error, repo, revision)}") from error
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
        return (
            "is neither a folder here nor a hub repository you may read; if it is private, log in: "
            "`hf auth login`"
        )
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
        hint = f"OpenAI's models are {_openai_names(name)}"
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


def _openai_names(name: str) -> str:
    """For an error message: the names of OpenAI's models, and the one closest to `name`."""
    names = ", ".join(_OPENAI_NAMES) + ", …"
    near = difflib.get_close_matches(name, _OPENAI_NAMES, n=1)
    return f"{names}; did you mean {near[0]!r}?" if near else names
