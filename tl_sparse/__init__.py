"""Weight-sparse transformers as TransformerLens models: load, train, prune to circuits.

What is listed here is imported when first used, so that `import tl_sparse` is fast and changes nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tl_sparse.checkpoints import create as create
    from tl_sparse.checkpoints import load as load
    from tl_sparse.circuit import Circuit as Circuit
    from tl_sparse.circuit import Edge as Edge
    from tl_sparse.config import (
        DataConfig as DataConfig,
    )
    from tl_sparse.config import (
        PruneConfig as PruneConfig,
    )
    from tl_sparse.config import (
        SparseConfig as SparseConfig,
    )
    from tl_sparse.config import (
        TrainConfig as TrainConfig,
    )
    from tl_sparse.config import (
        paper_topk as paper_topk,
    )
    from tl_sparse.data import load_corpus as load_corpus
    from tl_sparse.errors import TLSparseError as TLSparseError
    from tl_sparse.evaluation import evaluate as evaluate
    from tl_sparse.nodes import Node as Node
    from tl_sparse.pruning import prune as prune
    from tl_sparse.tables import report as report
    from tl_sparse.tasks import get_task as get_task
    from tl_sparse.tasks import make_task_data as make_task_data
    from tl_sparse.training import train as train

_HOME = {
    "checkpoints": ("create", "load"),
    "circuit": ("Circuit", "Edge"),
    "config": ("DataConfig", "PruneConfig", "SparseConfig", "TrainConfig", "paper_topk"),
    "data": ("load_corpus",),
    "errors": ("TLSparseError",),
    "evaluation": ("evaluate",),
    "nodes": ("Node",),
    "pruning": ("prune",),
    "tables": ("report",),
    "tasks": ("get_task", "make_task_data"),
    "training": ("train",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}
__all__ = sorted(_MODULE_OF)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'tl_sparse' has no attribute {name!r}")
    return getattr(import_module(f"tl_sparse.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
