"""Where models come from; every request goes to a server on this machine."""

import errno
import io
import os
import re
import socket
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest
from huggingface_hub import constants

from helpers import must_not_run
from loopback import Answer, FakeHub, cache_snapshot, point_hub_at, serving
from tl_sparse.checkpoints import download, sources
from tl_sparse.errors import CheckpointError

pytestmark = pytest.mark.any_line

#: How the message about a wrong name ends, if no name is like it.
PLACES = (
    ": tiny-python-sparse, tiny-python-dense, tiny-python-wide, tiny-python-wide-dense, "
    "tiny-python-bridged come with tl_sparse, OpenAI published csp_yolo1, csp_yolo2, "
    "csp_bridges1, csp_bridges2, dense1_1x, dense1_2x, dense1_4x, "
    "csp_sweep1_1x_3.7Mnonzero_afrac0.250, …, and the Hugging Face hub has 'user/repo'"
)
CONFIG, MODEL = b'{"n_layer": 1}', bytes(range(256)) * 40


def failure(source, revision=None, wanted="model"):
    """The message with which `find` fails."""
    with pytest.raises(CheckpointError) as caught:
        sources.find(source, revision, wanted)
    return str(caught.value)


@pytest.fixture(autouse=True)
def _nothing_real(tmp_path, monkeypatch):
    """Empty caches, no network, no waiting."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
    monkeypatch.setattr(sources, "STORAGE", "http://127.0.0.1:9/nothing-listens-here")
    monkeypatch.setattr(download, "_PAUSE", 0.0)


# --- Folders and names


@pytest.mark.parametrize("kind", [str, Path])
def test_a_folder_is_itself(tmp_path, kind):
    assert sources.find(kind(tmp_path)) == tmp_path
    assert isinstance(sources.find(kind(tmp_path)), Path)


def test_a_folder_comes_before_a_published_or_a_hub_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("csp_yolo1", "user/repo"):
        Path(name).mkdir(parents=True)
        assert sources.find(name) == Path(name)


@pytest.mark.parametrize(
    "source",
    [
        "csp_yolo3",
        "no_such_folder",
        "a\0b",
        "csp_sweep1_..x_1Mnonzero_afrac..",
        "csp_sweep1_1x_1Mnonzero_afrac0.",
        "dense1_.x",
        "dense1_1.2.3x",
    ],
)
def test_anything_else_is_refused_with_what_is_possible(source):
    message = failure(source)
    start = f"there is no folder {source!r}, nor a model of that name"
    if source in ("no_such_folder", "a\0b"):
        assert message == start + PLACES
    else:
        assert message.startswith(f"{start}; did you mean '")


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("csp-yolo1", "csp_yolo1"),
        ("tiny-python-spars", "tiny-python-sparse"),
        ("tiny_python_dense", "tiny-python-dense"),
        ("dense_2x", "dense1_2x"),
        ("csp_sweep_1x_3.7Mnonzero_afrac0.25", "csp_sweep1_1x_3.7Mnonzero_afrac0.250"),
    ],
)
def test_a_misspelled_published_name_is_answered_with_the_nearest(typo, meant):
    assert failure(typo).endswith(f"did you mean {meant!r}?")


@pytest.mark.parametrize("wanted", ["model", "circuit"])
def test_a_file_is_not_a_folder(wanted, tmp_path):
    path = tmp_path / "final_model.pt"
    path.touch()
    message = f"{str(path)!r} is a file, not the folder of a {wanted}"
    assert failure(path, wanted=wanted) == message
    (tmp_path / "circuit.json").touch()
    hint = f"; did you mean its folder, {str(tmp_path)!r}?" if wanted == "circuit" else ""
    assert failure(path, wanted=wanted) == message + hint


def test_a_path_is_never_a_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert failure(Path("user/repo")) == "there is no folder 'user/repo'"
    assert failure(Path("csp_yolo1")) == "there is no folder 'csp_yolo1'"


@pytest.mark.parametrize(
    "source",
    ["./user", "./user/repo", "../repo", "/no/such/folder", "~/model", "a/b/c", "a/", "a\\b"],
)
@pytest.mark.parametrize("wanted", ["model", "circuit"])
def test_what_can_only_be_a_path_is_looked_up_nowhere_else(source, wanted, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sources, "_snapshot", must_not_run("asking the hub"))
    assert failure(source, wanted=wanted) == f"there is no folder {source!r}"


@pytest.mark.parametrize(
    ("source", "meant"),
    [
        ("./my-modle", "./my-model"),
        ("runs/my-modle", "runs/my-model"),
        ("rums/my-model", "runs"),
        ("my-modle/", "my-model"),
        ("my-modle", "my-model"),
        ("user/repo/my-model", None),
        ("runs/other", None),
    ],
)
@pytest.mark.parametrize("wanted", ["model", "circuit"])
def test_the_nearest_folder_is_suggested(source, meant, wanted, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for folder in ("my-model", "runs/my-model"):
        Path(folder).mkdir(parents=True)
    message = failure(source, wanted=wanted)
    assert message.startswith(f"there is no folder {source!r}")
    if meant is None:
        assert "did you mean" not in message
    else:
        assert f"; did you mean {meant!r}?" in message


def test_a_home_folder_that_the_shell_did_not_expand(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    hint = f"did you mean {str(tmp_path / 'model')!r}? Only the shell expands '~'"
    assert failure("~/model") == f"there is no folder '~/model'; {hint}"


def test_a_folder_that_is_missing_is_named_before_the_hub(tmp_path):
    message = failure("runs/my-model")
    assert message.startswith("there is no folder 'runs/my-model', and on the Hugging Face hub ")


def test_names_of_models_are_not_offered_where_a_circuit_is_wanted():
    places = "a circuit is a folder that prune wrote, or 'user/repo' on the Hugging Face hub"
    assert failure("my-circuit", wanted="circuit") == f"there is no folder 'my-circuit'; {places}"


@pytest.mark.parametrize("name", ["tiny-python-sparse", "csp_yolo1"])
def test_the_name_of_a_model_where_a_circuit_is_wanted(name):
    command = f"`tl-sparse prune {name} TASK --out FOLDER` finds a circuit in it"
    assert failure(name, wanted="circuit") == f"{name} is a model, not a circuit; {command}"


@pytest.mark.parametrize("name", ["gpt2", "pythia-70m", "distilgpt2"])
def test_the_name_of_a_dense_model(name):
    assert failure(name).startswith(f"{name} is a dense model, which TransformerLens opens: ")


def test_only_hub_repositories_have_revisions(tmp_path):
    for source in (tmp_path, str(tmp_path), "csp_yolo1"):
        assert (
            failure(source, "v1")
            == f"revision = 'v1' is not possible: {str(source)!r} is not a hub repository"
        )


@pytest.mark.parametrize(
    "name",
    [
        "csp_yolo1",
        "csp_yolo2",
        "csp_bridges1",
        "csp_bridge2",
        "dense1_1x",
        "dense1_4x",
        "csp_sweep1_1x_3.7Mnonzero_afrac0.250",
        "csp_sweep1_16x_7.4Mnonzero_afrac0.125",
    ],
)
def test_published_names_are_known_and_need_the_network_once(name, tmp_path):
    folder = tmp_path / "assets" / "tl_sparse" / "openai" / name
    assert (
        failure(name) == f"{name!r} is not in the cache {folder}; to fetch it, unset HF_HUB_OFFLINE"
    )
    assert not (tmp_path / "assets").exists()  # an off-line question leaves nothing behind


# --- OpenAI's storage


class Storage:
    """OpenAI's storage, with one model; and its misbehaviour.

    Attributes:
        etag: of every file; None: it sends none.
        cuts: after how many bytes the connection of each successive GET of the model ends; None:
            never.
        before_get: called before each GET of the model.
        ranges: whether `Range` is honoured; "always": even if the file is no longer the one asked
            for.
        statuses: of the answers to successive GETs of the model; None: as usual.
        headers: further ones, of every answer.
        asked: the GETs and their ranges.
    """

    def __init__(self):
        self.files = {"beeg_config.json": CONFIG, "final_model.pt": MODEL}
        self.etag, self.cuts, self.ranges, self.headers, self.before_get = (
            '"v/1"',
            [],
            True,
            {},
            lambda: None,
        )
        self.asked, self.statuses = [], []

    def __call__(self, method, path, headers):
        _, models, name, file = path.split("/")
        if (models, name) != ("models", "csp_yolo1") or file not in self.files:
            return Answer(status=404)
        if method == "GET":
            self.asked.append((file, headers.get("Range")))
            if file == "final_model.pt":
                self.before_get()
                if self.statuses and (status := self.statuses.pop(0)) is not None:
                    return Answer(status=status)
        body, about = self.files[file], {} if self.etag is None else {"ETag": self.etag}
        cut = (
            self.cuts.pop(0) if self.cuts and method == "GET" and file == "final_model.pt" else None
        )
        same = self.ranges == "always" or (self.ranges and headers.get("If-Range") == self.etag)
        if "Range" in headers and same:
            start = int(re.fullmatch(r"bytes=(\d+)-", headers["Range"])[1])
            if start >= len(body):
                return Answer(status=416)
            about["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
            return Answer(body[start:], 206, about | self.headers, cut)
        return Answer(body, 200, about | self.headers, cut)

    @property
    def model_ranges(self):
        return [span for file, span in self.asked if file == "final_model.pt"]


@pytest.fixture
def storage(monkeypatch):
    storage = Storage()
    with serving(storage) as url:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(sources, "STORAGE", f"{url}/models")
        yield storage


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "assets" / "tl_sparse" / "openai" / "csp_yolo1"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


COMPLETE = {"beeg_config.json": CONFIG, "final_model.pt": MODEL}


def test_a_published_model_is_fetched_once(storage, folder, monkeypatch, capsys):
    assert sources.find("csp_yolo1") == folder
    assert contents(folder) == COMPLETE
    assert storage.asked == [("beeg_config.json", None), ("final_model.pt", None)]
    bar = capsys.readouterr().err
    assert "csp_yolo1: 100%" in bar
    assert "10.2k/10.2k" in bar
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # the cache needs no network
    assert sources.find("csp_yolo1") == folder
    assert len(storage.asked) == 2


def test_files_are_made_as_the_umask_says(storage, folder):
    old = os.umask(0o027)
    try:
        sources.find("csp_yolo1")
    finally:
        os.umask(old)
    assert (folder / "final_model.pt").stat().st_mode & 0o777 == 0o640


def test_only_what_is_missing_is_fetched(storage, folder):
    folder.mkdir(parents=True)
    (folder / "final_model.pt").write_bytes(b"here already")
    sources.find("csp_yolo1")
    assert contents(folder) == {"beeg_config.json": CONFIG, "final_model.pt": b"here already"}
    assert storage.asked == [("beeg_config.json", None)]


def test_half_a_model_in_the_cache_is_not_a_model_off_line(folder):
    folder.mkdir(parents=True)
    (folder / "beeg_config.json").write_bytes(CONFIG)
    assert "is not in the cache" in failure("csp_yolo1")


def test_a_dropped_connection_goes_on_where_it_ended(storage, folder):
    storage.cuts = [1000, 3000, None]
    sources.find("csp_yolo1")
    assert contents(folder) == COMPLETE
    assert storage.model_ranges == [None, "bytes=1000-", "bytes=4000-"]


def test_an_interrupted_download_goes_on_in_the_next_call(storage, folder, monkeypatch):
    storage.cuts = [5000]
    monkeypatch.setattr(download, "_ATTEMPTS", 1)
    size = len(MODEL)
    message = failure("csp_yolo1")
    assert message == (
        f"{sources.STORAGE}/csp_yolo1/final_model.pt cannot be fetched to "
        f"{folder / 'final_model.pt'}: only 5,000 of {size:,} bytes arrived; call again to resume"
    )
    assert contents(folder) == {
        "beeg_config.json": CONFIG,
        "final_model.pt.%22v%2F1%22.partial": MODEL[:5000],
    }
    storage.asked.clear()
    sources.find("csp_yolo1")
    assert storage.asked == [("final_model.pt", "bytes=5000-")]
    assert contents(folder) == COMPLETE


def test_ctrl_c_keeps_what_came(storage, folder, monkeypatch):
    class Interrupted(download.tqdm):
        def update(self, size):
            raise KeyboardInterrupt

    storage.files["final_model.pt"] = MODEL * 150
    folder.mkdir(parents=True)
    (folder / "beeg_config.json").write_bytes(CONFIG)
    with monkeypatch.context() as patch:
        patch.setattr(download, "tqdm", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            sources.find("csp_yolo1")
    assert contents(folder)["final_model.pt.%22v%2F1%22.partial"] == (MODEL * 150)[: 1 << 20]
    sources.find("csp_yolo1")
    assert storage.model_ranges == [None, f"bytes={1 << 20}-"]
    assert contents(folder) == {"beeg_config.json": CONFIG, "final_model.pt": MODEL * 150}


def test_a_download_that_ended_before_its_last_step_asks_for_nothing_again(storage, folder):
    folder.mkdir(parents=True)
    (folder / "final_model.pt.%22v%2F1%22.partial").write_bytes(MODEL)
    sources.find("csp_yolo1")
    assert storage.asked == [("beeg_config.json", None)]
    assert contents(folder) == COMPLETE


@pytest.mark.parametrize("beginning", [b"", MODEL + b"more"])
def test_a_beginning_of_an_impossible_length_is_not_gone_on_from(storage, folder, beginning):
    folder.mkdir(parents=True)
    (folder / "final_model.pt.%22v%2F1%22.partial").write_bytes(beginning)
    sources.find("csp_yolo1")
    assert storage.model_ranges == [None]
    assert contents(folder) == COMPLETE


def test_a_file_that_changed_since_is_fetched_anew(storage, folder):
    storage.cuts = [1000] * 5
    failure("csp_yolo1")
    storage.files["final_model.pt"], storage.etag = MODEL[::-1], '"v2"'
    storage.asked.clear()
    sources.find("csp_yolo1")
    assert storage.model_ranges == [None]
    assert contents(folder) == {
        "beeg_config.json": CONFIG,
        "final_model.pt": MODEL[::-1],
    }  # and no old .partial


@pytest.mark.parametrize("ranges", [True, "always"])
def test_a_file_that_changes_while_it_is_fetched_is_not_mixed(storage, folder, ranges):
    """It changes before the rest is fetched, whether or not the server honours If-Range."""
    storage.cuts, storage.ranges = [1000, None, None], ranges
    gets = iter([False, True, False])

    def change():
        if next(gets):
            storage.files["final_model.pt"], storage.etag = MODEL[::-1], '"v2"'

    storage.before_get = change
    sources.find("csp_yolo1")
    assert contents(folder)["final_model.pt"] == MODEL[::-1]
    assert storage.model_ranges == [None, "bytes=1000-", None]


def test_a_file_that_became_shorter_is_fetched_anew(storage, folder):
    storage.cuts, storage.ranges = [9000, None, None], "always"
    gets = iter([False, True, False])

    def change():
        if next(gets):
            storage.files["final_model.pt"], storage.etag = b"short", '"v2"'

    storage.before_get = change
    sources.find("csp_yolo1")
    assert contents(folder)["final_model.pt"] == b"short"


def test_a_server_without_ranges_sends_the_file_again(storage, folder):
    storage.cuts, storage.ranges = [1000, None], False
    sources.find("csp_yolo1")
    assert storage.model_ranges == [None, "bytes=1000-"]
    assert contents(folder) == COMPLETE


@pytest.mark.parametrize("etag", [None, 'W/"weak"'])
def test_without_a_strong_etag_a_download_starts_over(storage, folder, etag):
    storage.cuts, storage.etag = [1000, None], etag
    sources.find("csp_yolo1")
    assert storage.model_ranges == [None, None]
    assert contents(folder) == COMPLETE


def test_another_part_than_asked_for_is_refused(storage, folder):
    storage.cuts, storage.headers = (
        [1000],
        {"Content-Range": f"bytes 0-{len(MODEL) - 1}/{len(MODEL)}"},
    )
    assert "the server sent another part than the requested one; call again" in failure("csp_yolo1")
    assert "final_model.pt" not in contents(folder)


def test_a_length_that_never_comes_is_an_error(storage, folder):
    storage.headers, storage.ranges = {"Content-Length": str(len(CONFIG) + 7)}, False
    message = failure("csp_yolo1")
    assert message.endswith("only 14 of 21 bytes arrived; call again to resume")
    assert storage.asked == [("beeg_config.json", None)] + [("beeg_config.json", "bytes=14-")] * 4
    assert "beeg_config.json" not in contents(folder)


@pytest.mark.parametrize("length", [None, "0", "-1", "many"])
def test_a_missing_or_impossible_length_is_an_error(storage, length):
    storage.headers = {"Content-Length": length}
    url = f"{sources.STORAGE}/csp_yolo1/beeg_config.json"
    assert failure("csp_yolo1") == f"{url} cannot be fetched: the server does not state its size"


def test_a_model_that_the_storage_does_not_have(storage, folder):
    url = f"{sources.STORAGE}/csp_yolo2/beeg_config.json"
    expected = f"{url} cannot be fetched: HTTP Error 404: Not Found; "
    names = ", ".join(sources._OPENAI_NAMES)
    expected += f"OpenAI's models are {names}, …; did you mean "
    assert failure("csp_yolo2").startswith(expected)
    assert storage.asked == []
    assert list(folder.parent.iterdir()) == []  # not an empty folder for each misspelled name


def test_half_a_model_in_the_storage_is_kept(storage, folder):
    del storage.files["final_model.pt"]
    assert "HTTP Error 404" in failure("csp_yolo1")
    assert contents(folder) == {"beeg_config.json": CONFIG}


def test_a_refusal_is_not_asked_for_again(storage):
    storage.statuses = [403]
    assert "HTTP Error 403: Forbidden" in failure("csp_yolo1")
    assert storage.model_ranges == [None]


def test_a_server_in_trouble_is_asked_again(storage, folder):
    storage.statuses = [500, 503, 429, 408, None]
    sources.find("csp_yolo1")
    assert contents(folder) == COMPLETE
    storage.statuses = [503] * 5
    (folder / "final_model.pt").unlink()
    assert failure("csp_yolo1").endswith(
        "HTTP Error 503: Service Unavailable; call again to resume"
    )
    assert len(storage.model_ranges) == 10


def test_pauses_double(storage, monkeypatch):
    pauses = []
    monkeypatch.setattr(download, "_PAUSE", 0.5)
    monkeypatch.setattr(download, "time", type("time", (), {"sleep": pauses.append}))
    storage.statuses = [503] * 5
    failure("csp_yolo1")
    assert pauses == [0.5, 1, 2, 4]


def test_no_network(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(sources, "STORAGE", f"http://127.0.0.1:{free.getsockname()[1]}/models")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        assert failure("csp_yolo1").endswith("Connection refused>; call again to resume")


def test_a_silent_server_is_given_up(storage, monkeypatch):
    monkeypatch.setattr(download, "_TIMEOUT", 0.05)
    monkeypatch.setattr(download, "_ATTEMPTS", 2)
    silence = threading.Event()
    storage.before_get = silence.wait
    try:
        assert failure("csp_yolo1").endswith("timed out; call again to resume")
    finally:
        silence.set()


def test_an_unwritable_cache(storage, tmp_path):
    (tmp_path / "assets").write_text("a file where a folder should be")
    message = failure("csp_yolo1")
    assert message.startswith(
        "'csp_yolo1' cannot be written to the cache, which is under HF_HOME: [Errno "
    )
    assert str(tmp_path / "assets") in message


def test_a_full_disk_keeps_nothing_wrong(storage, folder, monkeypatch):
    class Full(io.FileIO):
        def write(self, chunk):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(download, "open", lambda path, mode: Full(path, mode[0]), raising=False)
    assert "[Errno 28] No space left on device; call again" in failure("csp_yolo1")
    assert not (folder / "beeg_config.json").exists()


def test_two_at_once_fetch_it_once(storage, folder):
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(sources.find("csp_yolo1"))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [folder] * 4
    assert contents(folder) == COMPLETE
    assert storage.asked == [("beeg_config.json", None), ("final_model.pt", None)]


# --- The Hugging Face hub

NO_FOLDER = "there is no folder 'user/repo', and on the Hugging Face hub 'user/repo'"
OURS = {
    "config.json": b"{}",
    "model.safetensors": b"weights",
    "tokenizer.json": b"{}",
    "README.md": b"# card",
}
CODE = {"modeling.py": b"raise SystemExit", "run.sh": b"exit 1", "setup.cfg": b""}


@pytest.fixture
def on_hub(tmp_path, monkeypatch):
    """A function that puts a repository on a hub, and returns the hub."""
    with ExitStack() as servers:

        def put(files, **options):
            hub = FakeHub("user/repo", files, **options)
            url = servers.enter_context(serving(hub))
            point_hub_at(monkeypatch, url, tmp_path / "hub")
            return hub

        yield put


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_repository_is_fetched_once_and_without_its_code(on_hub, tmp_path, monkeypatch):
    others = {
        "pytorch_model.bin": b"pickle",
        "optimizer.pt": b"pickle",
        "checkpoint-1/config.json": b"{}",
    }
    hub = on_hub(OURS | CODE | others)
    folder = sources.find("user/repo")
    assert folder == tmp_path / "hub" / "models--user--repo" / "snapshots" / hub.commit
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == OURS
    assert set(hub.asked) == set(OURS)
    hub.asked.clear()
    assert sources.find("user/repo") == folder
    assert hub.asked == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert sources.find("user/repo") == sources.find("user/repo", hub.commit) == folder


@pytest.mark.parametrize(
    "files",
    [
        {"config.json": b"{}", "pytorch_model.bin": b"pickle"},
        {"beeg_config.json": b"{}", "final_model.pt": b"pickle"},
    ],
)
def test_pickles_come_where_there_is_no_safetensors_file(on_hub, files):
    hub = on_hub(files | CODE | {"training_args.bin": b"x", "optimizer.pt": b"x"})
    folder = sources.find("user/repo")
    assert names(folder) == sorted(files)
    assert set(hub.asked) == set(files)


def test_of_a_dense_model_no_weights_are_fetched(on_hub):
    config = {"config.json": b'{"model_type": "gpt2"}'}
    hub = on_hub(config | {"model.safetensors": b"weights", "pytorch_model.bin": b"pickle"})
    assert names(sources.find("user/repo")) == ["config.json"]
    assert set(hub.asked) == {"config.json"}


def test_circuits_are_found_too(on_hub):
    files = {"circuit.json": b"{}", "circuit.safetensors": b"x"}
    on_hub(files | {"final_model.pt": b"pickle"})
    assert names(sources.find("user/repo")) == sorted(files)


def test_a_revision(on_hub):
    hub = on_hub(OURS, revisions=["main", "v1"])
    folder = sources.find("user/repo", "v1")
    assert folder.name == hub.commit
    assert (folder.parents[1] / "refs" / "v1").read_text() == hub.commit
    assert failure("user/repo", "v2") == (
        f"{NO_FOLDER} has no revision 'v2'; "
        f"its branches and tags are on {constants.ENDPOINT}/user/repo/tree/main"
    )


def test_a_repository_that_does_not_exist_or_is_private(on_hub):
    on_hub(OURS)
    assert failure("user/other") == (
        "there is no folder 'user/other', and on the Hugging Face hub 'user/other' is no "
        "repository that you may read; if it is private, log in: `hf auth login`"
    )


@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_repository(on_hub, status):
    on_hub(OURS, refused={"files": Answer(status=status, headers={"X-Error-Code": "GatedRepo"})})
    page = f"{constants.ENDPOINT}/user/repo"
    assert (
        failure("user/repo")
        == f"{NO_FOLDER} is gated: accept its terms on {page}, then log in with `hf auth login`"
    )


def test_a_repository_without_a_model(on_hub):
    on_hub({"README.md": b"# nothing", "data.parquet": b"x"} | CODE)
    assert failure("user/repo") == (
        "'user/repo' on the hub is not a model or circuit: "
        "it has none of config.json, beeg_config.json, circuit.json"
    )


def test_an_impossible_repository_name(on_hub):
    on_hub(OURS)
    assert "'user/--repo' cannot be fetched: " in failure("user/--repo")


def test_the_hub_in_trouble(on_hub):
    on_hub(OURS, refused={"api": Answer(status=418)})
    message = failure("user/repo")
    assert message.startswith(
        f"{NO_FOLDER} is not in the cache, and the hub cannot be reached: Client error '418"
    )


def test_the_hub_without_a_network(monkeypatch, tmp_path):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the hub's client tries again later
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        point_hub_at(monkeypatch, f"http://127.0.0.1:{free.getsockname()[1]}", tmp_path / "hub")
        message = failure("user/repo")
        assert message.startswith(
            f"{NO_FOLDER} is not in the cache, and the hub cannot be reached: "
        )
        assert message.endswith("Connection refused")
        folder = cache_snapshot(tmp_path / "hub", "user/repo", OURS)
        assert sources.find("user/repo") == folder


def test_the_cache_of_huggingface_hub_is_read_off_line(tmp_path):
    folder = cache_snapshot(tmp_path / "hub", "user/repo", OURS)
    assert sources.find("user/repo") == folder
    assert sources.find("user/repo", "main") == folder
    problem = (
        f"is not (fully) in the cache {tmp_path / 'hub'}; to reach the hub, unset HF_HUB_OFFLINE"
    )
    assert failure("user/repo", "v2") == f"{NO_FOLDER} {problem}"
    assert failure("user/other") == f"{NO_FOLDER.replace('repo', 'other')} {problem}"


def test_a_half_fetched_repository_is_not_used_off_line(on_hub, monkeypatch):
    on_hub(OURS)
    (sources.find("user/repo") / "model.safetensors").unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "'user/repo' is not (fully) in the cache" in failure("user/repo")


def test_openai_tokenizer(on_hub, tmp_path):
    assert sources.openai_tokenizer() is None  # off line, nothing cached
    cache_snapshot(tmp_path / "hub", "openai/circuit-sparsity", {"config.json": b"{}"})
    assert sources.openai_tokenizer() is None  # cached by someone who did not want it


def test_openai_tokenizer_comes_from_the_hub_and_then_from_the_cache(tmp_path, monkeypatch):
    hub = FakeHub("openai/circuit-sparsity", OURS | CODE | {"tokenizer_config.json": b"{}"})
    with serving(hub) as url:
        point_hub_at(monkeypatch, url, tmp_path / "hub")
        folder = sources.openai_tokenizer()
    assert names(folder) == ["tokenizer.json", "tokenizer_config.json"]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert sources.openai_tokenizer() == folder


def test_openai_tokenizer_can_be_had_without_a_request(tmp_path, monkeypatch):
    asked = []
    with serving(lambda method, path, headers: asked.append(path) or Answer(status=500)) as url:
        point_hub_at(monkeypatch, url, tmp_path / "hub")
        assert sources.openai_tokenizer(local_only=True) is None
        folder = cache_snapshot(
            tmp_path / "hub", "openai/circuit-sparsity", {"tokenizer.json": b"{}"}
        )
        assert sources.openai_tokenizer(local_only=True) == folder
    assert asked == []
