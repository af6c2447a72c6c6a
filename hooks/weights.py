"""Weight sparsity as an optimizer step post-hook: after every step, only the largest weights stay.

Gao et al. 2025, section 2.1 and A.2. The hook works with any torch optimizer and any training loop;
where a loop creates its optimizer itself, as TransformerLens' own `train` does, it is found by the
weights it steps.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from tl_sparse.config import check
from tl_sparse.errors import ConfigError
from tl_sparse.kernels import bits, kernel

#: The fraction of weights kept, constant or as a function of the number of optimizer steps done
#: before.
Fraction = float | Callable[[int], float]


@dataclass(frozen=True)
class WeightGroup:
    """Weights that share one top-k budget, seen as one matrix with a row for each neuron or
    channel.

    Attributes:
        name: what `group_fractions` calls it: that of its parameter, or "blocks.0.attn.W_QKV".
        rows: parameters with the einops pattern that makes a matrix of each; those of an inner
            tuple lie side by side (a matrix and its positional rows), the inner tuples below each
            other (q, k, v).
        embedding: whether the embedding fraction applies; no minimum per row then.
        protected: whether each row keeps its `min_nonzero` largest entries.
    """

    name: str
    rows: tuple[tuple[tuple[Tensor, str], ...], ...]
    embedding: bool = False
    protected: bool = True

    @property
    def parameters(self) -> list[Tensor]:
        return [parameter for row in self.rows for parameter, _ in row]

    @torch.no_grad()
    def project(self, fraction: float, min_nonzero: int) -> None:
        """Zero all but the int(fraction · entries) largest entries; see `top_mask`."""
        if fraction == 1:
            return
        parts = [[rearrange(p, pattern) for p, pattern in row] for row in self.rows]
        matrix = torch.cat([torch.cat(row, dim=1) if len(row) > 1 else row[0] for row in parts])
        zero_all_but(matrix, int(fraction * matrix.numel()), min_nonzero if self.protected else 0)
        blocks = matrix.split([len(row[0]) for row in parts])
        for row, part, block in zip(self.rows, parts, blocks, strict=True):
            for (p, pattern), kept in zip(
                row, block.split([m.shape[1] for m in part], dim=1), strict=True
            ):
                before, after = pattern.split(" -> ")
                p.copy_(
                    rearrange(
                        kept,
                        f"{after} -> {before}",
                        **dict(zip(before.split(), p.shape, strict=True)),
                    )
                )


def top_mask(
    magnitudes: Float[Tensor, "row column"], k: int, min_per_row: int
) -> Bool[Tensor, "row column"]:
    """The `k` largest entries, of which the `min_per_row` largest of each row come first (A.2).

    Exactly max(k, protected entries) are kept, also among equal magnitudes.
    """
    mask = torch.zeros_like(magnitudes, dtype=torch.bool)
    if min_per_row > 0:
        protected = magnitudes.topk(min(min_per_row, magnitudes.shape[1]), dim=1).indices
        mask.scatter_(1, protected, True)
        k = max(k, protected.numel()) - protected.numel()
    mask.view(-1)[magnitudes.masked_fill(mask, -1.0).flatten().topk(k, sorted=False).indices] = True
    return mask


def zero_all_but(matrix: Float[Tensor, "row column"], k: int, min_per_row: int) -> None:
    """Zero what is not in the `top_mask` of a contiguous matrix."""
    run, minimum = kernel("zero_all_but", matrix), min(min_per_row, matrix.shape[1])
    if run is None or not run(bits(matrix), max(k, minimum * len(matrix)), minimum):
        matrix.masked_fill_(~top_mask(matrix.abs(), k, min_per_row), 0.0)


#: How parameters of HookedTransformer's names become matrices: (group, pattern). _W_K and _W_V are
#: those of grouped-query attention.
_PATTERNS = {
    r"(.*attn\.)_?W_[QKV](_pos)?": ("W_QKV", "head input channel -> (head channel) input"),
    r"(.*attn\.)W_O": ("W_O", "head channel output -> (head channel) output"),
    r"(.*mlp\.)W_in(_pos)?": ("W_in", "input neuron -> neuron input"),
    r"(.*mlp\.)W_gate": ("W_gate", "input neuron -> neuron input"),
    r"(.*mlp\.)W_out": ("W_out", "neuron output -> neuron output"),
}
_BIASES = {1: "entry -> 1 entry", 2: "head channel -> 1 (head channel)"}
_EMBEDDINGS = re.compile(
    r"(^|\.)(embed|unembed|wte|lm_head|embed_tokens|embed_in|embed_out|tok_embed|head)\.(W_E|W_U|weight)$"
)
_LEFT_ALONE = re.compile(r"bigram|W_pos|pos_embed|position|wpe|(^|\.)pos\.|(^|[._])b(ias)?(_|$)")


def weight_groups(
    model: torch.nn.Module, *, fused_qkv: bool = True, biases: bool = False
) -> list[WeightGroup]:
    """The matrices of a TransformerLens model: per layer QKV, W_O, W_in and W_out, each with its
    positional rows; the embedding and the unembedding. Any other parameter of two or more
    dimensions is a group of its own; norms, the bigram table and positional tables stay dense (A.2,
    published script).

    Args:
        model: any TransformerLens model (or torch module).
        fused_qkv: Q, K and V share one budget (published script); else each has its own.
        biases: the biases of attention and MLPs are groups too (the paper's text).
    """
    fused: dict[str, dict[str, list[tuple[Tensor, str]]]] = {}
    groups: list[WeightGroup] = []
    for name, parameter in model.named_parameters():
        name = name.replace(
            "_original_component.", ""
        )  # TransformerBridge's name for what it wraps
        for regex, (group, pattern) in _PATTERNS.items():
            if (match := re.fullmatch(regex, name)) and parameter.ndim == len(
                pattern.split(" -> ")[0].split()
            ):
                matrix = name.removesuffix("_pos")
                key = match[1] + group if fused_qkv else matrix
                fused.setdefault(key, {}).setdefault(matrix, []).append((parameter, pattern))
                break
        else:
            if biases and re.fullmatch(r".*(attn|mlp)\.b_\w+", name):
                groups.append(
                    WeightGroup(name, (((parameter, _BIASES[parameter.ndim]),),), protected=False)
                )
            elif parameter.ndim >= 2 and not _LEFT_ALONE.search(name):
                before = " ".join(f"d{i}" for i in range(parameter.ndim))
                pattern = f"{before} -> {before.replace('d0 ', 'd0 (', 1)})"
                embedding = _EMBEDDINGS.search(name) is not None
                groups.append(
                    WeightGroup(name, (((parameter, pattern),),), embedding, protected=False)
                )
    return [
        WeightGroup(name, tuple(map(tuple, rows.values()))) for name, rows in fused.items()
    ] + groups


def annealed(
    target: float, start: float, stop: float, shape: Literal["linear", "exponential"] = "linear"
) -> Callable[[int], float]:
    """The fraction 1 until step `start`, from there down to `target` at step `stop`: by equal
    differences (A.2) or, "exponential", by equal factors.

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
        done = (step - start) / (stop - start) if step > start else 0.0
        return 1.0 + done * (target - 1.0) if shape == "linear" else target**done

    return fraction


def _check_fraction(name: str, value: object) -> None:
    check(isinstance(value, int | float) and 0 < value <= 1, name, value, "a fraction in (0, 1]")


class WeightSparsity:
    """Keeps a model weight-sparse while any optimizer trains it.

        with WeightSparsity(model, fraction=1 / 32).attached():
            train(model, …)

    Args:
        model: any TransformerLens model (or torch module).
        fraction: the share of each matrix kept, constant or a function of the step (see
            `annealed`).
        embed_fraction: the same for embedding and unembedding; None: as `fraction` (the paper's
            text; the published script keeps more).
        group_fractions: fractions of their own for groups by name, where "blocks.*.mlp.W_in" is
            those of all layers; the last pattern that fits a group counts.
        min_nonzero: entries kept at least per neuron and attention channel (A.2: 4).
        groups: what shares a budget; None: `weight_groups(model)`.

    Raises:
        ConfigError: for an impossible fraction or minimum, a pattern that fits no group, or a model
            without matrices.
    """

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
        named = {
            "fraction": self.fraction,
            "embed_fraction": self.embed_fraction,
        } | self.group_fractions
        for name, value in named.items():
            if not callable(value):
                _check_fraction(name, value)
        check(min_nonzero >= 0, "min_nonzero", min_nonzero, "at least 0")
        self.min_nonzero = min_nonzero
        self.groups = list(weight_groups(model) if groups is None else groups)
        if not self.groups:
            raise ConfigError(f"{type(model).__name__} has no weight matrices to make sparse")
        names = [group.name for group in self.groups]
        for pattern in self.group_fractions:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ConfigError(
                    f"no group of weights is named {pattern!r}; they are {', '.join(names)}"
                )
        self.steps = 0  # optimizer steps seen

    def fraction_at(self, step: int, group: WeightGroup | None = None) -> float:
        """The fraction of a group kept after optimizer step number `step` (from 0); None: of
        ordinary matrices.
        """
        fraction = self.embed_fraction if group is not None and group.embedding else self.fraction
        for pattern, own in self.group_fractions.items():
            if group is not None and fnmatchcase(group.name, pattern):
                fraction = own
        return fraction(step) if callable(fraction) else fraction

    def project(self) -> None:
        """Zero all but the largest weights, at the fractions of the current step."""
        for group in self.groups:
            group.project(self.fraction_at(self.steps, group), self.min_nonzero)

    def l0(self) -> int:
        """How many of the weights are nonzero."""
        return sum(int(p.count_nonzero()) for group in self.groups for p in group.parameters)

    @contextmanager
    def attached(self, optimizer: Optimizer | None = None) -> Iterator["WeightSparsity"]:
        """Within the context, project after every step of `optimizer`; of None: of any optimizer
        that steps these weights, also one created later inside a training loop."""
        ours = {id(p) for group in self.groups for p in group.parameters}

        def post_hook(stepped: Optimizer, args: Any, kwargs: Any) -> None:
            if any(id(p) in ours for group in stepped.param_groups for p in group["params"]):
                self.project()
                self.steps += 1

        register = (
            register_optimizer_step_post_hook
            if optimizer is None
            else optimizer.register_step_post_hook
        )
        handle = register(post_hook)
        try:
            yield self
        finally:
            handle.remove()
