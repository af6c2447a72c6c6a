"""What is public is described; `make api` makes pages of it."""

import inspect

import pytest

import tl_sparse
import tl_sparse.hooks
from tl_sparse import errors
from tl_sparse.checkpoints import hub
from tl_sparse.circuits import exchange, exports
from tl_sparse.evaluation import judge as evaluation
from tl_sparse.tasks import task as tasks
from tl_sparse.tasks import task_data
from tl_sparse.view import contents as view
from tl_sparse.view import plots

MODULES = [
    tl_sparse,
    tl_sparse.hooks,
    errors,
    evaluation,
    exchange,
    exports,
    hub,
    plots,
    tasks,
    task_data,
    view,
]


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_has_a_docstring(module):
    own = [
        name
        for name, value in vars(module).items()
        if getattr(value, "__module__", None) == module.__name__
    ]
    names = getattr(module, "__all__", [name for name in own if not name.startswith("_")])
    assert names
    for name in names:
        doc = inspect.getdoc(getattr(module, name)) or ""
        assert len(doc) > 20, name
        assert not doc.startswith(f"{name}("), f"{name}: only what @dataclass wrote"
