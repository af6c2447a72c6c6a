"""Downloads over HTTP that continue where they were interrupted."""

import time
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import Request, urlopen

from tqdm.auto import tqdm

from tl_sparse.errors import CheckpointError

_ATTEMPTS = 5
_PAUSE = 0.5  # seconds before the second attempt; doubled before each further one
_TIMEOUT = 30.0  # seconds without a byte
_CHUNK = 1 << 20  # bytes
#: Errors of the client after which another attempt may succeed: Request Timeout, Range Not
#: Satisfiable (the file has just been replaced by a shorter one), Too Many Requests.
_PASSING_STATUSES = (408, 416, 429)


@dataclass(frozen=True)
class _RemoteFile:
    """A file as the server describes it.

    Attributes:
        url: its address.
        size: in bytes.
        etag: the server's name for exactly this content, or "".
    """

    url: str
    size: int
    etag: str


def download(url: str, path: Path, hint: str) -> None:
    """Fetch the file at `url`; `path` is complete or not there.

    A download that was interrupted continues, in this call or in a later one.

    Raises:
        CheckpointError: if the server refuses, with `hint` in the message; or if no attempt
            succeeds.
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
        f"{url} cannot be fetched to {path}: {problem}; call again to go on"
    ) from problem


def _is_refusal(error: Exception) -> bool:
    """Whether another attempt would get the same answer."""
    if not isinstance(error, HTTPError):
        return False
    return error.code < 500 and error.code not in _PASSING_STATUSES


def _attempt(url: str, path: Path) -> None:
    """Fetch what is missing of a file: all of it, or what an earlier attempt left to fetch."""
    if path.is_file():
        return
    remote = _describe(url)
    # The name of the partial file says of which content it is the beginning.
    partial = path.with_name(f"{path.name}.{quote(remote.etag, safe='')}.partial")
    start = 0
    # A weak ETag, W/"…", does not promise the same bytes.
    if partial.is_file() and remote.etag.startswith('"'):
        start = partial.stat().st_size
    if start != remote.size:
        _fetch_from(start, remote, partial)
    size = partial.stat().st_size
    if size != remote.size:
        raise ConnectionError(f"{size:,} of {remote.size:,} bytes came")
    partial.replace(path)
    for stale in path.parent.glob(f"{path.name}.*.partial"):
        stale.unlink()


def _describe(url: str) -> _RemoteFile:
    with urlopen(Request(url, method="HEAD"), timeout=_TIMEOUT) as response:
        length = response.headers.get("Content-Length", "")
        etag = response.headers.get("ETag", "")
    if not length.isdecimal() or int(length) == 0:
        raise CheckpointError(f"{url} cannot be fetched: the server does not say how long it is")
    return _RemoteFile(url, int(length), etag)


def _fetch_from(start: int, remote: _RemoteFile, partial: Path) -> None:
    """Append what follows the first `start` bytes, or begin again if the server sends all."""
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
    """Raise `ConnectionError` unless this is the described file, from byte `start` on."""
    content_range = None
    if start > 0:
        content_range = f"bytes {start}-{remote.size - 1}/{remote.size}"
    is_same_file = response.headers.get("ETag", "") == remote.etag
    if not is_same_file or response.headers.get("Content-Range") != content_range:
        raise ConnectionError(
            "the file changed meanwhile, or another part of it came than asked for"
        )
