from .config import PruneConfig as PruneConfig
from .means import corpus_means as corpus_means
from .pruner import prune as prune
from .pruner import prune_edges as prune_edges
from .pruner import task_splits as task_splits
