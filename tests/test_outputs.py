"""Writing: complete or not at all, never over other results unasked, through links and pipes."""

import dataclasses
import functools
import os
import shutil
import stat
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers import tiny_model, word_tokenizer
from micro import micro_circuit, micro_model, save_micro
from tl_sparse.checkpoints.loading import load
from tl_sparse.circuits.circuit import Circuit
from tl_sparse.circuits.exports import export
from tl_sparse.cli import main
from tl_sparse.errors import CheckpointError, ConfigError
from tl_sparse.files import read_json, write_json, write_tensors, write_text
from tl_sparse.outputs import check_new_file, replacing
from tl_sparse.view import plots
from tl_sparse.view.page import Page

pytestmark = pytest.mark.any_line

#: The audit events of the operations that change files.
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Killed(BaseException):
    """Stands for SIGKILL."""


class Trap:
    """Makes the operation number `at` that changes a file in `folder` fail.

    With `kills`, all later operations fail too, so that nothing can be tidied up.
    """

    def __init__(self):
        self.folder = None  # nothing is watched

    def set(self, folder, at, kills):
        self.folder, self.at, self.kills = str(folder), at, kills
        self.n_seen = 0

    def __call__(self, event, arguments):
        if self.folder is None or not self._is_change(event, arguments):
            return
        self.n_seen += 1
        if self.kills and self.n_seen > self.at:
            raise Killed
        if not self.kills and self.n_seen == self.at + 1:
            raise OSError(28, "No space left on device")

    def _is_change(self, event, arguments):
        if event == "open":
            path, _, flags = arguments
            is_change = bool(flags & WRITING)
        else:
            path = arguments[0] if arguments else None
            is_change = event in CHANGES
        return is_change and isinstance(path, str | Path) and str(path).startswith(self.folder)


TRAP = Trap()
sys.addaudithook(TRAP)


def saved_with_fault(save, folder, at, kills):
    """Whether the fault hit `save`, which otherwise makes no more than `at` operations."""
    TRAP.set(folder, at, kills)
    try:
        with suppress(Killed, CheckpointError):
            save(folder)
    finally:
        TRAP.folder = None
    return TRAP.n_seen > at


def temporary_files(folder):
    return [path for path in folder.rglob(".*") if path.name.startswith((".sav", ".writ"))]


OLD_WORDS, NEW_WORDS = ["<|endoftext|>", "a", "b"], ["<|endoftext|>", "c"]


@functools.cache
def old_model():
    return tiny_model(seed=1, tokenizer=word_tokenizer(OLD_WORDS))


@functools.cache
def new_model():
    return tiny_model(seed=2, act_fn="relu", tokenizer=word_tokenizer(NEW_WORDS))


@functools.cache
def bare_model():
    return tiny_model(seed=3)


@functools.cache
def old_circuit():
    return micro_circuit(micro_model())


@functools.cache
def new_circuit():
    return dataclasses.replace(old_circuit().restricted(set()), task="other", measured={"a": 1})


def save_old_model(folder):
    old_model().save_pretrained(folder)


def save_new_model(folder):
    new_model().save_pretrained(folder, overwrite=True)


def save_bare_model(folder):
    bare_model().save_pretrained(folder, overwrite=True)


def the_model(folder):
    """What is in a model's folder, in a form that can be compared."""
    model = load(folder, device="cpu")
    words = None if model.tokenizer is None else sorted(model.tokenizer.get_vocab())
    return model.sparse_cfg, float(model.embed.W_E[0, 0]), words


def save_old_circuit(folder):
    old_circuit().save(folder)


def save_new_circuit(folder):
    new_circuit().save(folder, overwrite=True)


def the_circuit(folder):
    circuit = Circuit.load(folder)
    return circuit.n_nodes, circuit.task, circuit.measured


SAVES = [
    (save_old_model, save_new_model, the_model),
    (save_old_model, save_bare_model, the_model),
    (save_old_circuit, save_new_circuit, the_circuit),
]


@pytest.mark.parametrize("kills", [True, False], ids=["killed", "disk full"])
@pytest.mark.parametrize(
    ("save_old", "save_new", "contents"), SAVES, ids=["model", "bare", "circuit"]
)
def test_a_save_that_fails_anywhere_leaves_the_old_or_the_new(
    save_old, save_new, contents, kills, tmp_path
):
    start = tmp_path / "start"
    save_old(start)
    write_text(start / ".git" / "config", "mine")
    write_text(start / "README.md", "mine")
    old = contents(start)
    save_new(shutil.copytree(start, tmp_path / "end"))
    new = contents(tmp_path / "end")
    found = []
    at = 0
    while True:
        folder = shutil.copytree(start, tmp_path / f"at-{at}")
        if not saved_with_fault(save_new, folder, at, kills):
            break
        found.append(contents(folder))
        assert (folder / "README.md").read_text() == "mine"
        assert (folder / ".git" / "config").read_text() == "mine"
        if not kills and found[-1] == old:
            assert temporary_files(folder) == []
        at += 1
    n_old = found.count(old)
    assert 0 < n_old < len(found) == n_old + found.count(new)
    if kills:  # there is one moment from which on the new files count
        assert found == sorted(found, key=lambda each: each == new)
    save_new(folder)
    assert contents(folder) == new


def test_a_first_save_that_fails_leaves_nothing(tmp_path, circuit):
    bad = dataclasses.replace(circuit, measured={"nested": {"loss": float("nan")}})
    with pytest.raises(CheckpointError, match=r"measured\.nested\.loss is nan, which JSON cannot"):
        bad.save(tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_a_save_that_cannot_be_completed_is_named(tmp_path, circuit, monkeypatch):
    circuit.save(tmp_path)
    (tmp_path / ".saved-circuit").mkdir()
    shutil.copy(tmp_path / "circuit.json", tmp_path / ".saved-circuit")

    def refused(*arguments):
        raise PermissionError("read-only")

    monkeypatch.setattr(Path, "replace", refused)
    with pytest.raises(CheckpointError, match="interrupted, and cannot be completed: read-only"):
        Circuit.load(tmp_path)
    monkeypatch.undo()
    assert Circuit.load(tmp_path).n_nodes == 3
    assert not (tmp_path / ".saved-circuit").exists()


def test_files_of_two_saves_are_noticed(tmp_path, circuit):
    other = circuit.restricted(set())
    circuit.save(tmp_path / "a")
    other.save(tmp_path / "b")
    name = "circuit.safetensors"
    shutil.copy(tmp_path / "b" / name, tmp_path / "a")
    with pytest.raises(CheckpointError, match=rf"{name} does not belong to .*circuit\.json: they"):
        Circuit.load(tmp_path / "a")
    # Likewise if one of the two is from before there were checksums.
    values = read_json(tmp_path / "b" / "circuit.json")
    del values["files"]
    write_json(tmp_path / "b" / "circuit.json", values)
    with pytest.raises(CheckpointError, match="they come from two different saves"):
        Circuit.load(tmp_path / "b")

    save_old_model(tmp_path / "m")
    save_new_model(tmp_path / "n")
    for name in ("model.safetensors", "tokenizer.json"):
        mixed = shutil.copytree(tmp_path / "m", tmp_path / f"mixed-{name}")
        shutil.copy(tmp_path / "n" / name, mixed)
        with pytest.raises(CheckpointError, match=f"{name} does not belong to .*config.json"):
            load(mixed, device="cpu")
    (tmp_path / "m" / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing; it was saved together"):
        load(tmp_path / "m", device="cpu")


def test_a_tokenizer_may_be_put_beside_a_model(tmp_path):
    save_bare_model(tmp_path)
    word_tokenizer(NEW_WORDS).save_pretrained(tmp_path)
    assert the_model(tmp_path)[2] == sorted(NEW_WORDS)


# --- what is there already


@pytest.fixture
def writers(micro, circuit, tmp_path):
    """Kind → a function that writes the first or second of two results to a path."""
    second = dataclasses.replace(circuit.restricted(set()), task="other")
    circuits = {1: circuit, 2: second}
    models = {1: tiny_model(seed=1), 2: tiny_model(seed=2)}
    return {
        "circuit": lambda n, path, **o: circuits[n].save(path, **o),
        "model": lambda n, path, **o: models[n].save_pretrained(path, **o),
        "edges.json": lambda n, path, **o: circuits[n].save_edge_list(path, micro, **o),
        "graph.dot": lambda n, path, **o: export(circuits[n], micro, path, **o),
        "table.csv": lambda n, path, **o: export(circuits[n], micro, path, **o),
        "page.html": lambda n, path, **o: a_page(f"text {n}").save(path, **o),
        "figure.svg": lambda n, path, **o: plots.save(a_figure(n), path, **o),
    }


KINDS = ["circuit", "model", "edges.json", "graph.dot", "table.csv", "page.html"]
KINDS += ["figure.svg"]


def a_page(text):
    page = Page({})
    page.__dict__["html"] = text  # in place of the cached property
    return page


def a_figure(n):
    from matplotlib.figure import Figure

    figure = Figure()
    figure.subplots().plot([0, n])
    return figure


def files_in(path):
    if path.is_file():
        return path.read_bytes()
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.mark.parametrize("kind", KINDS)
def test_other_results_are_only_overwritten_if_asked_to(kind, writers, tmp_path):
    if kind.startswith("figure"):
        pytest.importorskip("matplotlib")
    write = writers[kind]
    path = tmp_path / kind
    write(1, path)
    first = files_in(path)
    write(1, path)  # the same again, as when the cell of a notebook is run twice
    assert files_in(path) == first
    with pytest.raises(ConfigError, match=rf"{kind} .*, or set overwrite"):
        write(2, path)
    assert files_in(path) == first
    write(2, path, overwrite=True)
    assert files_in(path) != first
    assert temporary_files(tmp_path) == []


def test_a_command_asks_before_its_work(tmp_path):
    path = tmp_path / "new" / "page.html"
    check_new_file(path, overwrite=False)
    path.write_text("mine")
    with pytest.raises(ConfigError, match=r"page\.html exists already; choose another name, or"):
        check_new_file(path, overwrite=False)
    check_new_file(path, overwrite=True)
    check_new_file("/dev/stdout", overwrite=False)
    with pytest.raises(CheckpointError, match=r"cannot write .*new: it is a folder"):
        check_new_file(path.parent, overwrite=True)


def test_a_command_overwrites_if_it_is_told_to(tmp_path, circuit, capfd):
    circuit.save(tmp_path / "c")
    path = tmp_path / "c.dot"
    command = ["export", str(tmp_path / "c"), "--model", save_micro(tmp_path / "m"), "-o"]
    assert main([*command, str(path)]) == 0
    assert capfd.readouterr().out == f"Saved {path}\n"
    path.write_text("mine")
    assert main([*command, str(path)]) == 1
    assert f"{path} exists already; choose another name, or" in capfd.readouterr().err
    assert path.read_text() == "mine"
    assert main([*command, str(path), "--overwrite"]) == 0
    assert "digraph" in path.read_text()
    capfd.readouterr()
    # What is written to a pipe or device has nothing else in it.
    pipe = tmp_path / "pipe.dot"
    os.mkfifo(pipe)
    received = []
    reader = threading.Thread(target=lambda: received.append(pipe.read_bytes()))
    reader.start()
    assert main([*command, str(pipe)]) == 0
    reader.join()
    assert received == [path.read_bytes()]
    assert capfd.readouterr().out == ""


# --- a full disk


@pytest.mark.parametrize("kind", KINDS)
def test_every_writer_names_a_full_disk(kind, writers, tmp_path):
    """Every file is larger than what the system lets this process write."""
    if kind.startswith("figure"):
        pytest.importorskip("matplotlib")
    resource = pytest.importorskip("resource")
    write = writers[kind]
    path = tmp_path / kind
    write(1, path)
    first = files_in(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4, hard))  # Python ignores SIGXFSZ
    try:
        with pytest.raises(CheckpointError, match=f"cannot write .*{kind}.*: "):
            write(2, path, overwrite=True)
        with pytest.raises(CheckpointError, match=f"cannot write .*new-{kind}.*: "):
            write(2, path.with_name(f"new-{kind}"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files_in(path) == first
    assert [file.name for file in tmp_path.iterdir()] == [kind]


# --- links, pipes, devices and permissions


def test_a_link_is_written_through(tmp_path):
    target = tmp_path / "disk" / "text"
    write_text(target, "old")
    link = tmp_path / "link"
    link.symlink_to(target)
    write_text(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert [path.name for path in target.parent.iterdir()] == ["text"]
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "elsewhere" / "text")
    write_text(dangling, "new")
    assert (tmp_path / "elsewhere" / "text").read_text() == "new"
    round_trip = tmp_path / "round"
    round_trip.symlink_to(round_trip)
    with pytest.raises(CheckpointError, match=r"cannot write .*round: "):
        write_text(round_trip, "new")


def test_a_linked_file_of_a_folder_is_written_through(tmp_path, circuit):
    circuit.save(tmp_path / "c")
    link = tmp_path / "c" / "circuit.safetensors"
    target = tmp_path / "disk"
    link.rename(target)
    link.symlink_to(target)
    target.chmod(0o600)
    circuit.restricted(set()).save(tmp_path / "c", overwrite=True)
    assert link.is_symlink()
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert Circuit.load(tmp_path / "c").n_nodes == 0


def test_a_pipe_is_written_to(tmp_path, circuit, micro):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    received = []
    reader = threading.Thread(target=lambda: received.append(pipe.read_bytes()))
    reader.start()
    circuit.save_edge_list(pipe, micro)
    reader.join()
    circuit.save_edge_list(tmp_path / "file", micro)
    assert received == [(tmp_path / "file").read_bytes()]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


@pytest.mark.parametrize("redirected_to", ["pipe", "file"])
def test_standard_output_is_written_to(redirected_to, tmp_path):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from tl_sparse.outputs import replacing\n"
        "print('before')\n"
        "with replacing('/dev/stdout') as path: path.write_text('contents\\n')\n"
        "with replacing('/dev/null') as path: path.write_text('contents')\n"
        "print('after')\n"
    )
    command = [sys.executable, "-c", code]
    if redirected_to == "pipe":
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    else:
        path = tmp_path / "out"
        with open(path, "w") as file:
            subprocess.run(command, stdout=file, check=True)
        out = path.read_text()
    assert out == "before\ncontents\nafter\n"
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


@pytest.mark.parametrize("mode", [0o600, 0o664, 0o640])
def test_a_file_keeps_its_permissions(mode, tmp_path):
    for name, write in [("text", write_text), ("json", write_json), ("tensors", write_tensors)]:
        contents = "x" if name == "text" else {"x": torch.tensor(1.0)}
        path = tmp_path / name
        path.touch()
        path.chmod(mode)
        write(path, contents)
        assert path.stat().st_size > 0
        assert stat.S_IMODE(path.stat().st_mode) == mode


def test_new_contents_are_never_more_readable_than_the_old(tmp_path):
    path = tmp_path / "secret"
    path.touch()
    path.chmod(0o600)
    with replacing(path) as temporary:
        assert stat.S_IMODE(temporary.stat().st_mode) == 0o600


def test_a_read_only_file_is_not_replaced(tmp_path, circuit):
    path = tmp_path / "text"
    write_text(path, "old")
    path.chmod(0o444)
    with pytest.raises(CheckpointError, match=r"cannot write .*text: the file is read-only"):
        write_text(path, "new")
    assert path.read_text() == "old"
    circuit.save(tmp_path / "c")
    (tmp_path / "c" / "circuit.json").chmod(0o444)
    with pytest.raises(CheckpointError, match=r"cannot write .*c: the file is read-only"):
        circuit.restricted(set()).save(tmp_path / "c", overwrite=True)
    assert Circuit.load(tmp_path / "c").n_nodes == 3


# --- what JSON can hold


def test_scalars_of_numpy_and_torch_are_plain_numbers(tmp_path):
    values = {
        "a": np.float32(0.5),
        "b": [np.int64(3), np.bool_(True), np.str_("x")],
        "c": (torch.tensor(2), 1),
        "d": {4: None},
    }
    write_json(tmp_path / "x.json", values)
    plain = {"a": 0.5, "b": [3, True, "x"], "c": [2, 1], "d": {"4": None}}
    assert read_json(tmp_path / "x.json") == plain


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), r"a\[1\]\.b is nan, which JSON cannot hold"),
        (np.float32("inf"), r"a\[1\]\.b is inf, which JSON cannot hold"),
        ("\ud800", r"a\[1\]\.b = '\\ud800' has half of a surrogate pair"),
        ({1.5: 0}, r"a\[1\]\.b has the key 1\.5, which is not text"),
        (Path("x"), r"a\[1\]\.b is a PosixPath, which JSON cannot hold"),
        (np.ones(2), r"a\[1\]\.b is a ndarray, which JSON cannot hold"),
        (10**5000, "limit"),
    ],
    ids=["nan", "inf", "surrogate", "key", "path", "array", "huge"],
)
def test_values_that_json_cannot_hold_are_refused(value, message, tmp_path):
    with pytest.raises(CheckpointError, match=rf"cannot write .*x\.json: .*{message}"):
        write_json(tmp_path / "x.json", {"a": [0, {"b": value}]})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a\nb", "'\"`", "# a", "a b ", "ü", "x" * 240, b"\xff\xfe"])
def test_odd_names(name, tmp_path, circuit, micro):
    if isinstance(name, bytes):
        name = os.fsdecode(name)
    folder = tmp_path / name
    circuit.save(folder)
    assert Circuit.load(str(folder)).n_nodes == 3
    circuit.save_edge_list(folder / name, micro)
    assert Circuit.from_edge_list(folder / name, micro).n_nodes == 3
    save_old_model(folder / "model")
    assert the_model(str(folder / "model"))[2] == sorted(OLD_WORDS)
    save_old_model(folder / "m" / name)
    found = load(folder / "m" / name, device="cpu")
    dataclasses.replace(circuit, model_name=found.cfg.model_name).save(tmp_path / "named")
