"""Everything that acts on activations or weights during a run, by hook name, on any TransformerLens model."""

from tl_sparse.hooks.ablation import ablating
from tl_sparse.hooks.activations import abs_topk, sparse_activations
from tl_sparse.hooks.gates import NodeGates
from tl_sparse.hooks.means import Means, mean_activations, recording_means
from tl_sparse.hooks.points import hooked
from tl_sparse.hooks.weights import WeightGroup, WeightSparsity, annealed, weight_groups

__all__ = [
    "Means", "NodeGates", "WeightGroup", "WeightSparsity", "ablating", "abs_topk", "annealed", "hooked",
    "mean_activations", "recording_means", "sparse_activations", "weight_groups",
]  # fmt: skip
