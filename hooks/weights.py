"""Weight sparsity as an optimizer step post-hook: each step zeros all but the largest weights.

Gao et al. 2025, section 2.1 and A.2. The hook works with any torch optimizer and any training loop.
If a loop creates its own optimizer, as TransformerLens' `train` does, the hook recognises the
optimizer by the weights that it steps.
"""

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from tl_sparse.arguments import checked
from tl_sparse.config import check
from tl_sparse.errors import ConfigError, UnsupportedError
from tl_sparse.hooks.layouts import MatrixLayout
from tl_sparse.hooks.selection import largest_in_rows, magnitude_order
from tl_sparse.hooks.sharded_topk import Band, Piece, Selection, zero_all_but_selected
from tl_sparse.hooks.shards import exchange_of, parts_of, shard_of
from tl_sparse.kernels import bits, kernel, zero_all_but_by_triton

#: The fraction of weights kept: a constant, or a function of the optimizer step, counted from 0.
Fraction = float | Callable[[int], float]


@dataclass(frozen=True)
class GroupedWeight:
    """A weight of a group, and its layout in the group's matrix."""

    weight: Tensor
    layout: MatrixLayout

    def matrix(self) -> Float[Tensor, "row column"]:
        return self.layout.matrix(self.weight)

    @property
    def shape(self) -> tuple[int, int]:
        """The numbers of rows and columns that the weight takes up in the group's matrix."""
        return self.layout.matrix_shape(self.weight.shape)

    def piece(self, first_row: int, first_column: int) -> Piece:
        """What this process holds of the weight, whose matrix begins at this row and column."""
        shard = shard_of(self.weight)
        rows, columns = self.layout.rows_and_columns(
            self.weight.shape, shard.first, len(shard.part)
        )
        device = shard.part.device
        return Piece(
            values=shard.part,
            layout=self.layout,
            rows=rows.to(device) + first_row,
            columns=columns.to(device) + first_column,
        )


@dataclass(frozen=True)
class WeightGroup:
    """Weights that share one top-k budget, as one matrix with a row per neuron or channel.

    Attributes:
        name: the name that `group_fractions` matches: that of the parameter, or
            "blocks.0.attn.W_QKV" for Q, K and V together.
        bands: the horizontal bands of the matrix from top to bottom (Q, then K, then V). Each band
            is a tuple of weights side by side (W_Q and W_Q_pos, for example).
        embedding: whether the fraction is `embed_fraction`.
        protected: whether each row keeps at least its `min_nonzero` largest entries.
    """

    name: str
    bands: tuple[tuple[GroupedWeight, ...], ...]
    embedding: bool = False
    protected: bool = True

    @property
    def parameters(self) -> list[Tensor]:
        return [grouped.weight for grouped in itertools.chain(*self.bands)]

    @property
    def shape(self) -> tuple[int, int]:
        """The numbers of rows and columns of the matrix."""
        n_rows = sum(band[0].shape[0] for band in self.bands)
        n_columns = sum(grouped.shape[1] for grouped in self.bands[0])
        return n_rows, n_columns

    def selection(self, fraction: float, min_nonzero: int) -> Selection:
        """What `project` keeps, of weights that are spread over processes."""
        bands = []
        first_row = 0
        for band in self.bands:
            pieces = []
            first_column = 0
            for grouped in band:
                pieces.append(grouped.piece(first_row, first_column))
                first_column += grouped.shape[1]
            first_row += band[0].shape[0]
            bands.append(Band(tuple(pieces), has_whole_rows=0 in band[0].layout.rows))
        n_rows, n_columns = self.shape
        n_kept = int(fraction * (n_rows * n_columns))
        return Selection(tuple(bands), self.shape, n_kept, min_nonzero if self.protected else 0)

    @torch.no_grad()
    def project(self, fraction: float, min_nonzero: int) -> None:
        """Zero all but the int(fraction · entries) largest entries, as `top_mask` chooses them."""
        if fraction == 1:
            return
        matrix = self._joined()
        n_kept = int(fraction * matrix.numel())
        zero_all_but(matrix, n_kept, min_nonzero if self.protected else 0)
        self._write(matrix)

    def _joined(self) -> Float[Tensor, "row column"]:
        """A copy of the weights as one matrix."""
        bands = []
        for band in self.bands:
            matrices = [grouped.matrix() for grouped in band]
            bands.append(torch.cat(matrices, dim=1) if len(matrices) > 1 else matrices[0])
        return torch.cat(bands)

    def _write(self, matrix: Float[Tensor, "row column"]) -> None:
        """Copy the entries of `matrix` back into the weights."""
        first_row = 0
        for band in self.bands:
            n_rows, _ = band[0].shape
            rows = matrix[first_row : first_row + n_rows]
            first_row += n_rows
            first_column = 0
            for grouped in band:
                _, n_columns = grouped.shape
                block = rows[:, first_column : first_column + n_columns]
                first_column += n_columns
                weight = grouped.weight
                weight.copy_(grouped.layout.weight(block, weight.shape))


def top_mask(
    magnitudes: Float[Tensor, "row column"], k: int, min_per_row: int
) -> Bool[Tensor, "row column"]:
    """Mask of the `k` largest entries; the `min_per_row` largest of each row go first (A.2).

    Exactly max(k, number of protected entries) are kept, even when magnitudes are tied: then the
    first ones, see `selection`.
    """
    order = magnitude_order(magnitudes)
    mask = largest_in_rows(order, min_per_row)
    n_protected = len(order) * min(min_per_row, order.shape[1])
    others = order.masked_fill(mask, -1).view(1, -1)
    return mask | largest_in_rows(others, k - n_protected).view_as(mask)


def zero_all_but(matrix: Float[Tensor, "row column"], k: int, min_per_row: int) -> None:
    """Zero the entries of a contiguous matrix that are not in its `top_mask`, in place.

    A kept -0.0 becomes 0.0 as well.
    """
    minimum = min(min_per_row, matrix.shape[1])
    n_kept = max(k, minimum * len(matrix))
    if zero_all_but_by_triton(matrix, n_kept, minimum):
        return
    compiled = kernel("zero_all_but", matrix)
    if compiled is not None and compiled(bits(matrix), n_kept, minimum):
        return
    is_kept = top_mask(matrix, k, min_per_row) & (matrix != 0)
    matrix.masked_fill_(~is_kept, 0.0)


#: Regular expression for a parameter name of HookedTransformer → the layout that has one row per
#: neuron or attention channel. `_W_K` and `_W_V` occur in grouped-query attention.
_LAYOUTS = {
    # [head, input, channel]
    r".*attn\._?W_[QKV](_pos)?": MatrixLayout(rows=(0, 2), columns=(1,)),
    # [head, channel, output]
    r".*attn\.W_O": MatrixLayout(rows=(0, 1), columns=(2,)),
    # [input, neuron]
    r".*mlp\.(W_in(_pos)?|W_gate)": MatrixLayout(rows=(1,), columns=(0,)),
    # [neuron, output]
    r".*mlp\.W_out": MatrixLayout(rows=(0,), columns=(1,)),
}
#: Regular expressions for the last part of a module's name in other libraries: maps whose outputs
#: are the neurons and attention channels, and maps whose inputs are.
_INTO_NEURONS = re.compile(
    r"(.*\.)?(q|k|v|qkv|q_proj|k_proj|v_proj|qkv_proj|query|key|value|query_key_value|c_attn|Wqkv|"
    r"c_fc|fc_in|fc1|dense_h_to_4h|up_proj|gate_proj|gate_up_proj|w1|w3|intermediate\.dense|"
    r"mlp\.in|mlp\.gate)"
)
_OUT_OF_NEURONS = re.compile(
    r"(.*\.)?(o|o_proj|out_proj|c_proj|dense|fc_out|fc2|dense_4h_to_h|down_proj|w2|mlp\.out)"
)
_BIAS = re.compile(r".*(attn|mlp)\.b_\w+")
_EMBEDDINGS = re.compile(
    r"(^|\.)(embed|unembed|wte|lm_head|embed_tokens|embed_in|embed_out|tok_embed|head)\.(W_E|W_U|weight)$"
)
_STAYS_DENSE = re.compile(r"bigram|W_pos|pos_embed|position|wpe|(^|\.)pos\.|(^|[._])b(ias)?(_|$)")


@checked()
def weight_groups(
    model: torch.nn.Module, *, fused_qkv: bool = True, biases: bool = False
) -> list[WeightGroup]:
    """The weights of a TransformerLens model that are made sparse, grouped by shared budget.

    Per layer, the groups are QKV, W_O, W_in and W_out, with the weights that read positional
    channels in the group of their matrix. The embedding, the unembedding and any other parameter of
    two or more dimensions are groups of their own. In the attention and MLPs of transformers'
    models, also inside a `TransformerBridge`, the rows of each group are its neurons or attention
    channels, whichever way the model stores it. Norms, the bigram table and positional tables stay
    dense (A.2, published script).

    Args:
        model: any TransformerLens model (or torch module).
        fused_qkv: whether Q, K and V share one budget (published script) or have one each.
        biases: whether the biases of attention and MLPs are groups too (the paper's text).

    Raises:
        UnsupportedError: if the model holds its weights compact.
    """
    _check_dense(model)
    # Group name → matrix name → that matrix and the weights that read positional channels.
    bands: dict[str, dict[str, list[GroupedWeight]]] = {}
    single_weights: list[WeightGroup] = []
    for stored_name, parameter in model.named_parameters():
        name = _short_name(stored_name)
        layout = _known_layout(name, parameter.ndim)
        if layout is not None:
            matrix = name.removesuffix("_pos")
            group = re.sub(r"_?W_[QKV]$", "W_QKV", matrix) if fused_qkv else matrix
            band = bands.setdefault(group, {}).setdefault(matrix, [])
            band.append(GroupedWeight(parameter, layout))
            continue
        by_neuron = _layout_by_neuron(model, stored_name)
        if by_neuron is not None:
            single_weights.append(_single_weight(name, parameter, by_neuron, protected=True))
        elif biases and _BIAS.fullmatch(name):
            one_row = MatrixLayout(rows=(), columns=tuple(range(parameter.ndim)))
            single_weights.append(_single_weight(name, parameter, one_row))
        elif parameter.ndim >= 2 and not _STAYS_DENSE.search(name):
            as_stored = MatrixLayout(rows=(0,), columns=tuple(range(1, parameter.ndim)))
            single_weights.append(_single_weight(name, parameter, as_stored))
    groups = []
    for name, matrices in bands.items():
        groups.append(WeightGroup(name, tuple(tuple(band) for band in matrices.values())))
    return groups + single_weights


def is_layer_matrix(model: torch.nn.Module, stored_name: str, parameter: Tensor) -> bool:
    """Whether a parameter is a weight matrix of attention or of an MLP.

    Args:
        model: the model.
        stored_name: the name of the parameter in `model.named_parameters()`.
        parameter: the parameter.
    """
    if _known_layout(_short_name(stored_name), parameter.ndim) is not None:
        return True
    return _layout_by_neuron(model, stored_name) is not None


def _short_name(stored_name: str) -> str:
    """The name without what TransformerBridge adds for each component that it wraps."""
    return stored_name.replace("_original_component.", "")


def _known_layout(name: str, n_axes: int) -> MatrixLayout | None:
    for pattern, layout in _LAYOUTS.items():
        if re.fullmatch(pattern, name) and len(layout.rows + layout.columns) == n_axes:
            return layout
    return None


def _layout_by_neuron(model: torch.nn.Module, stored_name: str) -> MatrixLayout | None:
    """The layout with a row for each neuron or channel of a weight of another library's model.

    It is None if the weight does not lead into neurons or channels or out of them, or if its module
    does not tell in which order it stores inputs and outputs.
    """
    path, _, parameter_name = stored_name.rpartition(".")
    module = model.get_submodule(path)
    if isinstance(module, torch.nn.Linear):
        outputs, inputs = 0, 1
    elif type(module).__name__ == "Conv1D":  # of transformers: a linear map stored transposed
        outputs, inputs = 1, 0
    else:
        return None
    if parameter_name != "weight":
        return None
    path = path.replace("_original_component.", "").removesuffix("._original_component")
    if _INTO_NEURONS.fullmatch(path):
        return MatrixLayout(rows=(outputs,), columns=(inputs,))
    if _OUT_OF_NEURONS.fullmatch(path):
        return MatrixLayout(rows=(inputs,), columns=(outputs,))
    return None


def _single_weight(
    name: str, parameter: Tensor, layout: MatrixLayout, protected: bool = False
) -> WeightGroup:
    """A group of one weight. Entries are protected only if its rows are neurons or channels."""
    bands = ((GroupedWeight(parameter, layout),),)
    is_embedding = _EMBEDDINGS.search(name) is not None
    return WeightGroup(name, bands, is_embedding, protected)


def _check_dense(model: torch.nn.Module) -> None:
    for name, module in model.named_modules():
        if vars(module).get("compact"):
            raise UnsupportedError(
                f"the weights of {name} are held compact, and a change of such a weight is lost: "
                "load the model with dense_weights=True to make it sparse or train it"
            )


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
        _check_dense(model)
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
