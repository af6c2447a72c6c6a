"""The rooms of the package: who may import whom, and through which door.

A room is a folder of the package. It imports only from rooms below it, so that no circle can arise,
and only what the door of that room, its `__init__.pyi`, hands out.
"""

import ast
import importlib
from dataclasses import dataclass
from pathlib import Path

import pytest

import tl_sparse
from helpers import ON_3

pytestmark = pytest.mark.any_line

ROOT = Path(__file__).parents[1]

#: From the ground up. Rooms in one line do not know each other.
FLOORS = [
    ["errors"],
    ["version"],
    [
        "arguments",
        "arrays",
        "config",
        "parsing",
        "pickles",
        "checksums",
        "records",
        "precision",
        "memory",
    ],
    ["resuming"],
    ["outputs", "locks"],
    ["files"],
    ["kernels"],
    ["hooks"],
    ["network"],
    ["tasks"],
    ["data"],
    ["faces"],
    ["checkpoints"],
    ["training", "circuits"],
    ["evaluation"],
    ["programs", "bridges"],
    ["attacks", "pruning"],
    ["explanations"],
    ["certificates"],
    ["view"],
    ["suites"],
    ["cli"],
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

#: The pairs of rooms in which an object needs something above it, imported inside a method:
#: `SparseModel.from_pretrained` and its like, `Circuit.compile`, `Circuit.explain`, `Circuit.view`
#: and its like.
UPWARDS = {
    ("faces", "checkpoints"),
    ("circuits", "programs"),
    ("circuits", "explanations"),
    ("circuits", "view"),
}


@dataclass(frozen=True)
class Import:
    """`from module import name` in a file of a room."""

    room: str
    path: Path
    line: int
    module: str
    name: str
    is_at_top: bool

    @property
    def target(self) -> str:
        """The room that is imported from."""
        inner = self.module.removeprefix("tl_sparse").strip(".")
        return inner.split(".")[0] or self.name

    def __str__(self):
        where = self.path.relative_to(ROOT)
        return f"{where}:{self.line}: from {self.module} import {self.name}"


def room_of(path):
    """The room that a file of the package is in: its folder, or its name at the package's root."""
    if path.is_relative_to(ROOT / "hooks"):
        return "hooks"
    return path.relative_to(ROOT / "tl_sparse").parts[0].removesuffix(".py")


def package_files():
    files = list((ROOT / "hooks").glob("*.py"))
    for path in (ROOT / "tl_sparse").rglob("*.py"):
        in_a_room = path.name not in ("__main__.py", "__init__.py")
        if in_a_room and room_of(path) != "hooks":
            files.append(path)
    return files


def imports_of(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
            assert not any(module.startswith("tl_sparse.") for module in modules), path
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("tl_sparse"):
            continue
        for alias in node.names:
            is_at_top = node.col_offset == 0
            found.append(
                Import(room_of(path), path, node.lineno, node.module, alias.name, is_at_top)
            )
    return found


@pytest.fixture(scope="module")
def across():
    """All imports of one room from another."""
    found = []
    for path in package_files():
        found += [each for each in imports_of(path) if each.target != each.room]
    assert len(found) > 100
    return found


def test_every_room_has_a_floor(across):
    rooms = {room_of(path) for path in package_files()}
    assert rooms == FLOOR_OF.keys()
    assert {each.target for each in across} <= FLOOR_OF.keys()


def test_imports_run_downwards(across):
    upwards = [each for each in across if FLOOR_OF[each.target] >= FLOOR_OF[each.room]]
    unmarked = [str(each) for each in upwards if (each.room, each.target) not in UPWARDS]
    assert not unmarked
    at_top = [str(each) for each in upwards if each.is_at_top]
    assert not at_top
    assert {(each.room, each.target) for each in upwards} == UPWARDS


def test_other_rooms_come_in_through_the_door(across):
    beside_the_door = [str(each) for each in across if each.module.count(".") > 1]
    assert not beside_the_door
    private = [str(each) for each in across if each.name.startswith("_")]
    assert not private


ROOMS = sorted(path.parent for path in (ROOT / "tl_sparse").glob("*/__init__.pyi"))


@pytest.mark.parametrize(
    "folder", [ROOT / "tl_sparse", ROOT / "hooks", *ROOMS], ids=lambda x: x.name
)
def test_a_door_hands_out_what_it_lists(folder):
    is_inner = folder != ROOT / "tl_sparse"
    module = importlib.import_module(f"tl_sparse.{folder.name}" if is_inner else "tl_sparse")
    listed = []
    for node in ast.parse((folder / "__init__.pyi").read_text()).body:
        for alias in node.names:
            assert alias.asname == alias.name  # marks it as handed out, for type checkers
            listed.append(alias.name)
    assert sorted(listed) == module.__all__
    files = {path.stem for path in folder.glob("*.py")}
    assert not files & set(listed), (
        "a name may not be that of a file beside it, which would hide it"
    )
    for name in listed:
        needs_4 = name == "SparseArchitectureAdapter"
        if not (needs_4 and ON_3):
            assert getattr(module, name) is not None


def test_the_package_gives_only_what_its_door_lists():
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = tl_sparse.nothing_of_the_kind


def test_test_files_have_different_names():
    """Tests are in folders without __init__.py, so pytest cannot tell files of one name apart."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    repeated = {name for name in names if names.count(name) > 1}
    assert not repeated
