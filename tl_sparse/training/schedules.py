"""How weights and activations become sparse over the steps of a run."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from tl_sparse.errors import TrainError
from tl_sparse.hooks import TLModel, WeightGroup, WeightSparsity, annealed, weight_groups
from tl_sparse.network import AbsTopK
from tl_sparse.training.config import TrainConfig


def weight_sparsity(model: TLModel, config: TrainConfig) -> WeightSparsity:
    """The top-k of the weights, with an annealing schedule for the fraction of each group."""
    start = config.anneal_start * config.steps
    stop = config.anneal_stop * config.steps

    def schedule(final_fraction: float) -> Callable[[int], float]:
        return annealed(final_fraction, start, stop, config.anneal_shape)

    return WeightSparsity(
        model,
        schedule(config.matrix_fraction),
        embed_fraction=schedule(config.l0_fraction_embed or config.matrix_fraction),
        group_fractions={name: schedule(value) for name, value in config.l0_groups.items()},
        min_nonzero=config.min_nonzero,
        groups=_trained_groups(model, config),
    )


def _trained_groups(model: TLModel, config: TrainConfig) -> list[WeightGroup]:
    """The weights that are made sparse, without those that are frozen."""
    groups = []
    for group in weight_groups(model, fused_qkv=config.fused_qkv, biases=config.sparse_biases):
        bands = []
        for band in group.bands:
            trained = tuple(each for each in band if each.weight.requires_grad)
            if trained:
                bands.append(trained)
        if bands:
            groups.append(replace(group, bands=tuple(bands)))
    if not groups:
        raise TrainError("no weight matrix of the model can be trained: all of them are frozen")
    return groups


@dataclass(frozen=True)
class AnnealedTopK:
    """An AbsTopK module whose k is annealed.

    Attributes:
        module: the module.
        final_k: its k at the end of the schedule.
        fraction: step → the fraction of activations that it keeps.
    """

    module: AbsTopK
    final_k: int
    fraction: Callable[[int], float]

    def set_k(self, step: int) -> None:
        k = int(self.fraction(step) * self.module.dim)
        self.module.k = max(self.final_k, k)


def annealed_topks(model: TLModel, config: TrainConfig) -> list[AnnealedTopK]:
    """The AbsTopK modules of the model, each with its schedule."""
    start = config.topk_anneal_start * config.steps
    stop = config.topk_anneal_stop * config.steps
    topks = []
    for module in model.network.modules():
        if isinstance(module, AbsTopK) and module.k is not None:
            fraction = annealed(module.k / module.dim, start, stop)
            topks.append(AnnealedTopK(module, module.k, fraction))
    return topks
