"""What a room hands out is described; the site has pages of it."""

import importlib
import inspect

import pytest

from helpers import ON_3

pytestmark = pytest.mark.any_line

ROOMS = [
    "tl_sparse",
    "tl_sparse.errors",
    "tl_sparse.hooks",
    "tl_sparse.network",
    "tl_sparse.tasks",
    "tl_sparse.data",
    "tl_sparse.faces",
    "tl_sparse.checkpoints",
    "tl_sparse.training",
    "tl_sparse.circuits",
    "tl_sparse.evaluation",
    "tl_sparse.pruning",
    "tl_sparse.view",
    "tl_sparse.view.plots",
    "tl_sparse.suites",
]


def names_of(module):
    """What the module says it hands out, or else the public names that it defines itself."""
    if hasattr(module, "__all__"):
        return module.__all__
    names = []
    for name, value in vars(module).items():
        is_its_own = getattr(value, "__module__", None) == module.__name__
        if is_its_own and not name.startswith("_"):
            names.append(name)
    return names


@pytest.mark.parametrize("room", ROOMS)
def test_every_public_function_and_class_has_a_docstring(room):
    module = importlib.import_module(room)
    names = names_of(module)
    assert names
    for name in names:
        if name == "SparseArchitectureAdapter" and ON_3:
            continue
        value = getattr(module, name)
        if not (inspect.isfunction(value) or inspect.isclass(value)):
            continue  # a constant, or the name of a type, is described by the comment above it
        doc = inspect.getdoc(value) or ""
        assert len(doc) > 20, name
        assert not doc.startswith(f"{name}("), f"{name}: only what @dataclass wrote"
