"""Where models come from: a folder, the Hugging Face hub, or OpenAI's public storage."""

import difflib
import os
import re
import shutil
import time
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import Request, urlopen

from filelock import FileLock
from huggingface_hub import constants, errors, snapshot_download
from tqdm.auto import tqdm

from tl_sparse.errors import CheckpointError

#: The models that come with the package.
_BUNDLED = {
    name: Path(__file__).parents[1] / "models" / name
    for name in ("tiny-python-sparse", "tiny-python-dense")
}
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
#: Data alone: code in a repository is neither fetched nor run. Pickles only where there is no
#: safetensors file.
_DATA = ["*.json", "*.safetensors", "*.txt", "*.tiktoken", "README.md"]
_PICKLES = ["pytorch_model*.bin", "final_model.pt"]
_DESCRIBED_BY = ("config.json", "beeg_config.json", "circuit.json")

STORAGE = "https://openaipublic.blob.core.windows.net/circuit-sparsity/models"
_STORED = ("beeg_config.json", "final_model.pt")
_OPENAI_NAME = re.compile(
    r"csp_(yolo|bridges?)[12]|csp_sweep1_Nx_N[kM]?nonzero_afracN|dense\d_Nx".replace(
        "N", r"\d+(\.\d+)?"
    ),
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
    "csp_sweep1_1x_3.7Mnonzero_afrac0.250",  # one of many
)
_ATTEMPTS = 5
_PAUSE = 0.5  # seconds before the second attempt; doubled before each further one
_TIMEOUT = 30.0  # seconds without a byte


def find(source: str | Path, revision: str | None = None) -> Path:
    """The local folder of a model or circuit, fetched into the cache if it is not there yet.

    The cache is Hugging Face's, below `HF_HOME`; with `HF_HUB_OFFLINE=1` nothing is fetched.

    Args:
        source: a folder; "tiny-python-sparse" or "tiny-python-dense", which come with the package;
            `"user/repo"` on the Hugging Face hub; or the name of a model that OpenAI published.
        revision: of a hub repository: a branch, a tag or a commit; default: its main branch.

    Raises:
        CheckpointError: if there is no such thing, it may not be read, or the network or the disk
            fails.
    """
    if isinstance(source, str) and not os.path.exists(source):
        if _HUB_NAME.fullmatch(source):
            return _hub_folder(source, revision)
        if _OPENAI_NAME.fullmatch(source) and revision is None:
            return _openai_folder(source)
        if source in _BUNDLED and revision is None:
            return _BUNDLED[source]
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


def openai_tokenizer(local_only: bool = False) -> Path | None:
    """A folder with OpenAI's tokenizer `tinypython_2k`, from their hub repository, or with
    `local_only` from the cache; None if it cannot be had."""
    try:
        folder = _snapshot(
            "openai/circuit-sparsity",
            None,
            ["tokenizer*.json", "special_tokens_map.json"],
            local_only,
        )
    except CheckpointError:
        return None
    return folder if (folder / "tokenizer.json").is_file() else None


def _hub_folder(repo: str, revision: str | None) -> Path:
    folder = _snapshot(repo, revision, _DATA)
    if not any((folder / f"{kind}.safetensors").is_file() for kind in ("model", "circuit")):
        folder = _snapshot(repo, folder.name, _PICKLES)  # of the same commit
    if not any((folder / name).is_file() for name in _DESCRIBED_BY):
        raise CheckpointError(
            f"{repo!r} on the hub is no model or circuit: it has none of {', '.join(_DESCRIBED_BY)}"
        )
    return folder


def _snapshot(
    repo: str, revision: str | None, patterns: list[str], local_only: bool = False
) -> Path:
    """The files of a repository that fit `patterns`, without those in folders inside it."""
    try:
        path = snapshot_download(
            repo,
            revision=revision,
            allow_patterns=patterns,
            ignore_patterns=["*/*"],
            local_files_only=local_only,
        )
    except (
        Exception
    ) as error:  # among others those of httpx or httpx2, by the version of huggingface_hub
        raise CheckpointError(f"{repo!r} {_hub_problem(error, repo, revision)}") from error
    return Path(path)


def _hub_problem(error: Exception, repo: str, revision: str | None) -> str:
    """What an error of huggingface_hub means, and what to do."""
    page = f"{constants.ENDPOINT}/{repo}"
    if constants.HF_HUB_OFFLINE:
        return f"is not (fully) in the cache {constants.HF_HUB_CACHE}; to reach the hub, unset HF_HUB_OFFLINE"
    if isinstance(error, errors.GatedRepoError):
        return f"is gated: accept its terms on {page}, then log in with `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"has no revision {revision!r}; its branches and tags are on {page}/tree/main"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "is neither a folder here nor a hub repository you may read; if it is private, log in: `hf auth login`"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return f"is not in the cache, and the hub cannot be reached: {error.__cause__}"
    return f"cannot be fetched: {error}"


def _openai_names(name: str) -> str:
    near = difflib.get_close_matches(name, _OPENAI_NAMES, n=1)
    return ", ".join(_OPENAI_NAMES) + (f", …; did you mean {near[0]!r}?" if near else ", …")


def _openai_folder(name: str) -> Path:
    folder = Path(constants.HF_ASSETS_CACHE) / "tl_sparse" / "openai" / name
    missing = [file for file in _STORED if not (folder / file).is_file()]
    if missing and constants.HF_HUB_OFFLINE:
        raise CheckpointError(
            f"{name!r} is not in the cache {folder}; to fetch it, unset HF_HUB_OFFLINE"
        )
    if missing:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / ".lock"):  # another process may be fetching the same
                for file in missing:
                    _download(f"{STORAGE}/{name}/{file}", folder / file)
        except CheckpointError as error:
            if getattr(error.__cause__, "code", None) == 404 and not any(folder.glob("[!.]*")):
                shutil.rmtree(folder, ignore_errors=True)  # there is no such model
            raise
        except OSError as error:
            raise CheckpointError(
                f"{name!r} cannot be kept in the cache; HF_HOME is its place: {error}"
            ) from error
    return folder


def _download(url: str, path: Path) -> None:
    """Fetch a file, which is complete or not there; a broken download goes on, in this call or in a
    later one.
    """
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(_PAUSE * 2 ** (attempt - 1))
        try:
            return _continue(url, path)
        except (OSError, HTTPException) as error:
            problem = error
            if (
                isinstance(error, HTTPError)
                and error.code < 500
                and error.code not in (408, 416, 429)
            ):
                names = _openai_names(path.parent.name)
                raise CheckpointError(
                    f"{url} cannot be fetched: {error}; OpenAI's models are {names}"
                ) from error
    raise CheckpointError(
        f"{url} cannot be fetched to {path}: {problem}; call again to go on"
    ) from problem


def _continue(url: str, path: Path) -> None:
    """One attempt, from where an earlier one ended if the server still has the same file."""
    if path.is_file():
        return
    with urlopen(Request(url, method="HEAD"), timeout=_TIMEOUT) as head:
        length, etag = head.headers.get("Content-Length", ""), head.headers.get("ETag", "")
    if not length.isdecimal() or (total := int(length)) == 0:
        raise CheckpointError(f"{url} cannot be fetched: the server does not say how long it is")
    # The name says of which file this is the beginning. A weak ETag (W/"…") does not promise the
    # same bytes.
    partial = path.with_name(f"{path.name}.{quote(etag, safe='')}.partial")
    start = partial.stat().st_size if partial.is_file() and etag.startswith('"') else 0
    if start != total:
        asked = {"Range": f"bytes={start}-", "If-Range": etag} if 0 < start < total else {}
        with (
            urlopen(Request(url, headers=asked), timeout=_TIMEOUT) as response,
            open(partial, "ab") as file,
        ):
            start = start if response.status == 206 else 0
            expected = f"bytes {start}-{total - 1}/{total}" if start else None
            if (response.headers.get("ETag", ""), response.headers.get("Content-Range")) != (
                etag,
                expected,
            ):
                raise ConnectionError(
                    "the file changed meanwhile, or another part of it came than asked for"
                )
            file.truncate(start)
            with tqdm(
                desc=path.parent.name, total=total, initial=start, unit="B", unit_scale=True
            ) as bar:
                while chunk := response.read(1 << 20):
                    bar.update(file.write(chunk))
    if (size := partial.stat().st_size) != total:
        raise ConnectionError(f"{size:,} of {total:,} bytes came")
    partial.replace(path)
    for stale in path.parent.glob(f"{path.name}.*.partial"):
        stale.unlink()
