"""Weight sparsity as an optimizer step post-hook: each step zeros all but the largest weights.

Gao et al. 2025, section 2.1 and A.2. The hook works with any torch optimizer and any training loop.
If a loop creates its own optimizer, as TransformerLens' `train` does, the hook recognises the
optimizer by the weights that it steps.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from tl_sparse.arguments import checked
from tl_sparse.config import check
from tl_sparse.errors import ConfigError
from tl_sparse.hooks.groups import WeightGroup, check_held_dense, weight_groups
from tl_sparse.hooks.sharded_topk import zero_all_but_selected
from tl_sparse.hooks.shards import exchange_of, parts_of

#: The fraction of weights kept: a constant, or a function of the optimizer step, counted from 0.
Fraction = float | Callable[[int], float]


@checked()
def annealed(
    target: float, start: float, stop: float, shape: Literal["linear", "exponential"] = "linear"
) -> Callable[[int], float]:
    """A fraction that is 1 until step `start`, and then falls to `target` at step `stop`.

    It falls linearly (A.2) or, if `shape` is "exponential", by the same factor at each step.

    Raises:
        ConfigError: unless 0 < target ≤ 1 and 0 ≤ start ≤ stop.
    """
    _check_fraction("target", target)
    if not 0 <= start <= stop:
        raise ConfigError(
            f"the annealing window ({start}, {stop}) is not possible; it needs 0 <= start <= stop"
        )

    def fraction(step: int) -> float:
        if step >= stop:
            return target
        if step <= start:
            return 1.0
        done = (step - start) / (stop - start)
        if shape == "linear":
            return 1.0 + done * (target - 1.0)
        return target**done

    return fraction


def _check_fraction(name: str, fraction: object) -> None:
    """Raise `ConfigError` for a constant outside (0, 1]; values of a function are not checked."""
    if not callable(fraction):
        is_valid = isinstance(fraction, int | float) and 0 < fraction <= 1
        check(is_valid, name, fraction, "a fraction in (0, 1]")


class WeightSparsity:
    """Keeps a model weight-sparse while any optimizer trains it.

        with WeightSparsity(model, fraction=1 / 32).attached():
            train(model, …)

    Args:
        model: any TransformerLens model (or torch module).
        fraction: the fraction of each group's entries that is kept: a constant, or a function of
            the step (see `annealed`).
        embed_fraction: the same for the embedding and the unembedding. None means `fraction` (the
            paper's text; the published script keeps more).
        group_fractions: group name → a fraction for that group only. A name may be a pattern:
            "blocks.*.mlp.W_in" matches this group in all layers. If several patterns match a group,
            the last one applies.
        min_nonzero: the minimum number of entries kept per neuron and attention channel (A.2: 4).
        groups: the groups of weights that are made sparse. None means `weight_groups(model)`.

    Raises:
        ConfigError: for an impossible fraction or minimum, a pattern that matches no group, or a
            model without weight matrices.
        UnsupportedError: if the model holds its weights compact.
    """

    @checked("fraction", "embed_fraction")
    def __init__(
        self,
        model: torch.nn.Module,
        fraction: Fraction,
        *,
        embed_fraction: Fraction | None = None,
        group_fractions: Mapping[str, Fraction] | None = None,
        min_nonzero: int = 4,
        groups: Sequence[WeightGroup] | None = None,
    ) -> None:
        self.fraction = fraction
        self.embed_fraction = fraction if embed_fraction is None else embed_fraction
        self.group_fractions = dict(group_fractions or {})
        _check_fraction("fraction", self.fraction)
        _check_fraction("embed_fraction", self.embed_fraction)
        for pattern, group_fraction in self.group_fractions.items():
            _check_fraction(pattern, group_fraction)
        check(min_nonzero >= 0, "min_nonzero", min_nonzero, "at least 0")
        self.min_nonzero = min_nonzero
        check_held_dense(model)
        self.groups = list(weight_groups(model) if groups is None else groups)
        if not self.groups:
            raise ConfigError(f"{type(model).__name__} has no weight matrices to make sparse")
        self._check_patterns()
        self.steps = 0  # optimizer steps so far

    def _check_patterns(self) -> None:
        """Raise `ConfigError` for a pattern in `group_fractions` that matches no group."""
        names = [group.name for group in self.groups]
        for pattern in self.group_fractions:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ConfigError(
                    f"no group of weights matches {pattern!r}; the groups are {', '.join(names)}"
                )

    def fraction_at(self, step: int, group: WeightGroup | None = None) -> float:
        """The fraction of a group kept after optimizer step number `step`, counted from 0.

        Without a group, this is the fraction of matrices other than embedding and unembedding.
        """
        fraction = self.fraction
        if group is not None:
            if group.embedding:
                fraction = self.embed_fraction
            for pattern, group_fraction in self.group_fractions.items():
                if fnmatchcase(group.name, pattern):
                    fraction = group_fraction
        return fraction(step) if callable(fraction) else fraction

    def project(self, groups: Sequence[WeightGroup] | None = None) -> None:
        """Zero all but the largest weights, at the fractions of the current step.

        If the weights are spread over processes, all of these must call this together.

        Args:
            groups: some of the groups; None means all of them.
        """
        exchange = exchange_of(self._parameters)
        selections = []
        for group in self.groups if groups is None else groups:
            fraction = self.fraction_at(self.steps, group)
            if exchange is None:
                group.project(fraction, self.min_nonzero)
            elif fraction < 1:
                selections.append(group.selection(fraction, self.min_nonzero))
        if exchange is not None:
            zero_all_but_selected(selections, exchange)

    def l0(self) -> int:
        """The number of nonzero weights in all groups, over all processes.

        If the weights are spread over processes, all of these must call this together.
        """
        counts = [part.count_nonzero() for part in parts_of(self._parameters)]
        total = torch.stack(counts).sum()
        exchange = exchange_of(self._parameters)
        if exchange is not None:
            total = exchange.total(total)
        return int(total)

    @property
    def _parameters(self) -> list[Tensor]:
        """The weights of all groups."""
        parameters = []
        for group in self.groups:
            parameters += group.parameters
        return parameters

    @contextmanager
    def attached(self, optimizer: Optimizer | None = None) -> Iterator["WeightSparsity"]:
        """Within the context, project after every step of `optimizer`.

        None means every optimizer that steps these weights, including one that a training loop
        creates later.
        """
        sparse_weights = set(map(id, self._parameters))

        def project_after_step(stepped: Optimizer, args: Any, kwargs: Any) -> None:
            for param_group in stepped.param_groups:
                if not sparse_weights.isdisjoint(map(id, param_group["params"])):
                    self.project()
                    self.steps += 1
                    return

        if optimizer is None:
            handle = register_optimizer_step_post_hook(project_after_step)
        else:
            handle = optimizer.register_step_post_hook(project_after_step)
        try:
            yield self
        finally:
            handle.remove()
