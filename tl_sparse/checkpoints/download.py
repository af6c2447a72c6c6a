"""Downloads over HTTP that resume where they were interrupted."""

import time
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import Request, urlopen

# The bar of its own downloads, which one call switches off together with ours.
from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

from tl_sparse.errors import CheckpointError

_ATTEMPTS = 5
_PAUSE = 0.5  # seconds before the second attempt; doubled before each further one
_TIMEOUT = 30.0  # seconds without a byte
_CHUNK = 1 << 20  # bytes
#: Client errors (4xx) after which another attempt may succeed: Request Timeout, Range Not
#: Satisfiable (if the file was just replaced by a shorter one), Too Many Requests.
_PASSING_STATUSES = (408, 416, 429)


@dataclass(frozen=True)
class _RemoteFile:
    """A file as the server describes it.

    Attributes:
        url: the address of the file.
        size: the size in bytes.
        etag: the ETag, by which the server identifies exactly this content, or "".
    """

    url: str
    size: int
    etag: str


def download(url: str, path: Path, hint: str) -> None:
    """Download the file at `url` to `path`, which exists only once it is complete.

    A download that was interrupted is resumed, in the same call or in a later one.

    Raises:
        CheckpointError: if the server refuses, with `hint` in the message, or if all attempts
            fail.
    """
    for attempt in range(_ATTEMPTS):
        if attempt > 0:
            time.sleep(_PAUSE * 2 ** (attempt - 1))
        try:
            return _attempt(url, path)
        except (OSError, HTTPException) as error:
            if _is_refusal(error):
                raise CheckpointError(f"{url} cannot be fetched: {error}; {hint}") from error
            problem = error
    raise CheckpointError(
        f"{url} cannot be fetched to {path}: {problem}; call again to resume"
    ) from problem


def _is_refusal(error: Exception) -> bool:
    """Whether another attempt would fail in the same way."""
    if not isinstance(error, HTTPError):
        return False
    return error.code < 500 and error.code not in _PASSING_STATUSES


def _attempt(url: str, path: Path) -> None:
    """Fetch the file, or the rest of it if an earlier attempt fetched the beginning."""
    if path.is_file():
        return
    remote = _describe(url)
    # The name of the partial file has the ETag of the content that it is the beginning of.
    partial = path.with_name(f"{path.name}.{quote(remote.etag, safe='')}.partial")
    start = 0
    # A weak ETag, W/"…", does not guarantee identical bytes, so the download starts over.
    if partial.is_file() and remote.etag.startswith('"'):
        start = partial.stat().st_size
    if start != remote.size:
        _fetch_from(start, remote, partial)
    size = partial.stat().st_size
    if size != remote.size:
        raise ConnectionError(f"only {size:,} of {remote.size:,} bytes arrived")
    partial.replace(path)
    for stale in path.parent.glob(f"{path.name}.*.partial"):
        stale.unlink()


def _describe(url: str) -> _RemoteFile:
    with urlopen(Request(url, method="HEAD"), timeout=_TIMEOUT) as response:
        length = response.headers.get("Content-Length", "")
        etag = response.headers.get("ETag", "")
    if not length.isdecimal() or int(length) == 0:
        raise CheckpointError(f"{url} cannot be fetched: the server does not state its size")
    return _RemoteFile(url, int(length), etag)


def _fetch_from(start: int, remote: _RemoteFile, partial: Path) -> None:
    """Append the bytes from `start` on; start over if the server sends the whole file."""
    headers = {}
    if 0 < start < remote.size:
        headers = {"Range": f"bytes={start}-", "If-Range": remote.etag}
    request = Request(remote.url, headers=headers)
    with urlopen(request, timeout=_TIMEOUT) as response, open(partial, "ab") as file:
        if response.status != 206:  # Partial Content
            start = 0
        _check_answer(response, remote, start)
        file.truncate(start)
        name = partial.parent.name
        with tqdm(desc=name, total=remote.size, initial=start, unit="B", unit_scale=True) as bar:
            while chunk := response.read(_CHUNK):
                bar.update(file.write(chunk))


def _check_answer(response: Any, remote: _RemoteFile, start: int) -> None:
    """Raise `ConnectionError` unless the response is the file `remote` from byte `start` on."""
    content_range = None
    if start > 0:
        content_range = f"bytes {start}-{remote.size - 1}/{remote.size}"
    is_same_file = response.headers.get("ETag", "") == remote.etag
    if not is_same_file or response.headers.get("Content-Range") != content_range:
        raise ConnectionError(
            "the file has changed meanwhile, or the server sent another part than the requested one"
        )
