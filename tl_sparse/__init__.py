"""Weight-sparse transformers as TransformerLens models: load, train, prune to circuits.

What is listed here is imported when first used, so that `import tl_sparse` is fast and changes nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tl_sparse.checkpoints import create, load
    from tl_sparse.circuit import Circuit
    from tl_sparse.config import DataConfig, PruneConfig, SparseConfig, TrainConfig, paper_topk
    from tl_sparse.data import load_corpus
    from tl_sparse.errors import TLSparseError
    from tl_sparse.evaluation import evaluate
    from tl_sparse.nodes import Edge, Node
    from tl_sparse.pruning import prune, prune_edges
    from tl_sparse.tables import report
    from tl_sparse.tasks import get_task, make_task_data
    from tl_sparse.training import train

__all__ = [
    "Circuit", "DataConfig", "Edge", "Node", "PruneConfig", "SparseConfig", "TLSparseError", "TrainConfig",
    "create", "evaluate", "get_task", "load", "load_corpus", "make_task_data", "paper_topk", "prune", "prune_edges",
    "report", "train",
]  # fmt: skip
#: Name → the module it is in.
_HOME = {
    "create": "checkpoints", "load": "checkpoints", "Circuit": "circuit", "Edge": "nodes", "DataConfig": "config",
    "PruneConfig": "config", "SparseConfig": "config", "TrainConfig": "config", "paper_topk": "config",
    "load_corpus": "data", "TLSparseError": "errors", "evaluate": "evaluation", "Node": "nodes", "prune": "pruning",
    "prune_edges": "pruning", "report": "tables", "get_task": "tasks", "make_task_data": "tasks",
    "train": "training",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'tl_sparse' has no attribute {name!r}")
    return getattr(import_module(f"tl_sparse.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
