from .config import PruneConfig as PruneConfig
from .means import as_corpus as as_corpus
from .means import corpus_means as corpus_means
from .pruner import prune as prune
from .pruner import prune_edges as prune_edges
from .splits import heldout_pairs as heldout_pairs
from .splits import recorded_config as recorded_config
from .splits import task_splits as task_splits
