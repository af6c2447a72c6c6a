"""A web server on this machine that answers by a function: for tests of all that is fetched."""

import json
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from huggingface_hub import constants


@dataclass
class Answer:
    """What a server answers.

    Attributes:
        headers: Content-Length is the body's, unless it is here with another value or None.
        cut: the connection ends after so many bytes of the body.
    """

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None


@contextmanager
def serving(respond):
    """The address of a server that gives the `Answer` of `respond(method, path, headers)`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            answer = respond(self.command, self.path, self.headers)
            self.send_response(answer.status)
            for name, value in {"Content-Length": str(len(answer.body)), **answer.headers}.items():
                if value is not None:
                    self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer.body[: answer.cut])

        do_HEAD = do_POST = do_GET

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *args: None  # clients that leave early are part of the tests
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class FakeHub:
    """What `snapshot_download` uses of the hub: for one repository with one commit.

    Attributes:
        files: path → content.
        refused: "api" or "files" → the `Answer` to each such request instead.
        asked: the paths of the requested files.
    """

    commit = "0123456789abcdef0123456789abcdef01234567"

    def __init__(self, repo, files, refused=None, revisions=("main",)):
        self.repo = repo
        self.files = files
        self.refused = refused or {}
        self.revisions = revisions
        self.asked = []

    def __call__(self, method, path, headers):
        path = path.partition("?")[0]
        if path.startswith("/api/"):
            return self.refused.get("api") or self._api(path)
        if not path.startswith(f"/{self.repo}/resolve/{self.commit}/"):
            return Answer(status=404, headers={"X-Error-Code": "EntryNotFound"})
        file = path.split("/", 5)[5]
        self.asked.append(file)
        about = {"X-Repo-Commit": self.commit, "ETag": f'"{abs(hash(self.files[file])):040x}"'}
        return self.refused.get("files") or Answer(self.files[file], headers=about)

    def _api(self, path):
        if path.startswith(f"/api/models/{self.repo}/tree/"):
            listing = []
            for name, content in self.files.items():
                listing.append(
                    {"type": "file", "oid": "0" * 40, "size": len(content), "path": name}
                )
            return Answer(json.dumps(listing).encode())
        if not path.startswith(f"/api/models/{self.repo}"):
            return Answer(status=404, headers={"X-Error-Code": "RepoNotFound"})
        revision = path.partition("/revision/")[2] or "main"
        if revision not in self.revisions:
            return Answer(status=404, headers={"X-Error-Code": "RevisionNotFound"})
        return Answer(json.dumps({"id": self.repo, "sha": self.commit, "siblings": []}).encode())


def cache_snapshot(cache, repo, files, commit=FakeHub.commit, revision="main"):
    """A repository in huggingface_hub's cache, as a download would have left it."""
    storage = cache / f"models--{repo.replace('/', '--')}"
    snapshot = storage / "snapshots" / commit
    (storage / "blobs").mkdir(parents=True)
    (storage / "refs").mkdir()
    snapshot.mkdir(parents=True)
    (storage / "refs" / revision).write_text(commit)
    for number, (name, content) in enumerate(files.items()):
        blob = storage / "blobs" / f"{number:040x}"
        blob.write_bytes(content)
        (snapshot / name).symlink_to(blob)
    return snapshot


def point_hub_at(monkeypatch, url, cache):
    """Make huggingface_hub ask `url` and keep what it fetches in `cache`, for this test."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
    )
