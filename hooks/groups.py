"""The weight matrices of a model, in groups that share one budget of nonzero weights.

Each group is one matrix with a row per neuron or attention channel, however the model stores its
weights. Which parameter is what is told by its name.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tl_sparse.arguments import checked
from tl_sparse.errors import UnsupportedError
from tl_sparse.hooks.layouts import MatrixLayout
from tl_sparse.hooks.selection import zero_all_but
from tl_sparse.hooks.sharded_topk import Band, Piece, Selection
from tl_sparse.hooks.shards import shard_of


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
            "blocks.0.attn.W_QKV" or, in models of other libraries, "….attn.qkv.weight" for Q, K and
            V together.
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

    def n_kept(self, fraction: float) -> int:
        """The number of entries that are kept of the matrix, unless more are protected."""
        n_rows, n_columns = self.shape
        return int(fraction * (n_rows * n_columns))

    def min_per_row(self, min_nonzero: int) -> int:
        """The number of entries that each row keeps at least."""
        return min_nonzero if self.protected else 0

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
        n_kept = self.n_kept(fraction)
        return Selection(tuple(bands), self.shape, n_kept, self.min_per_row(min_nonzero))

    @torch.no_grad()
    def project(self, fraction: float, min_nonzero: int) -> None:
        """Zero all but the largest entries, as `top_mask` chooses them."""
        if fraction == 1:
            return
        matrix = self._joined()
        zero_all_but(matrix, self.n_kept(fraction), self.min_per_row(min_nonzero))
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
#: The names of Q, K and V in other libraries, where each is a matrix of its own.
_Q_K_OR_V = re.compile(r"(?P<attention>.*)\.(q|k|v|q_proj|k_proj|v_proj|query|key|value)\.weight")
#: The classes of TransformerLens 4 that compute with parts of a matrix.
_SPLITTING = ("JointQKVAttentionBridge", "JointGateUpMLPBridge")
#: Where these hold the module that they have split, and its matrix.
_BEFORE_SPLITTING = ("_original_component", "qkv", "gate_up")
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
    dense (A.2, published script). So do the joint matrices of a `TransformerBridge` that computes
    with parts of them: these parts are in the groups.

    Args:
        model: any TransformerLens model (or torch module).
        fused_qkv: whether Q, K and V share one budget (published script) or have one each.
        biases: whether the biases of attention and MLPs are groups too (the paper's text).

    Raises:
        UnsupportedError: if the model holds its weights compact.
    """
    check_held_dense(model)
    # Group name → matrix name → that matrix and the weights that read positional channels.
    bands: dict[str, dict[str, list[GroupedWeight]]] = {}
    single_weights: list[WeightGroup] = []
    split = _split_by_bridges(model)
    for stored_name, parameter in model.named_parameters():
        if id(parameter) in split:
            continue
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
            q_k_or_v = _Q_K_OR_V.fullmatch(name)
            group = name
            if fused_qkv and q_k_or_v is not None:
                group = f"{q_k_or_v['attention']}.qkv.weight"
            bands.setdefault(group, {})[name] = [GroupedWeight(parameter, by_neuron)]
        elif biases and _BIAS.fullmatch(name):
            one_row = MatrixLayout(rows=(), columns=tuple(range(parameter.ndim)))
            single_weights.append(_single_weight(name, parameter, one_row))
        elif parameter.ndim >= 2 and not _STAYS_DENSE.search(name):
            as_stored = MatrixLayout(rows=(0,), columns=tuple(range(1, parameter.ndim)))
            single_weights.append(_single_weight(name, parameter, as_stored))
    groups = []
    for name, matrices in bands.items():
        groups += _groups_of_bands(name, matrices)
    return groups + single_weights


def _split_by_bridges(model: torch.nn.Module) -> set[int]:
    """The ids of parameters that a bridge does not compute with, because it has split them.

    Their parts are parameters too, which may share memory with them.
    """
    split = set()
    for module in model.modules():
        if not any(cls.__name__ in _SPLITTING for cls in type(module).__mro__):
            continue
        used = set()
        for name, child in module.named_children():
            if name not in _BEFORE_SPLITTING:
                used |= set(map(id, child.parameters()))
        split |= set(map(id, module.parameters())) - used
    return split


def _groups_of_bands(
    name: str, matrices: Mapping[str, Sequence[GroupedWeight]]
) -> list[WeightGroup]:
    """One group of all the matrices or, if these differ in width, one group of each.

    In cross-attention, K and V may read a stream of another width than Q.
    """
    bands = {matrix: tuple(band) for matrix, band in matrices.items()}
    widths = {sum(grouped.shape[1] for grouped in band) for band in bands.values()}
    if len(widths) == 1:
        return [WeightGroup(name, tuple(bands.values()))]
    return [WeightGroup(matrix, (band,)) for matrix, band in bands.items()]


def layer_matrices(model: torch.nn.Module) -> list[str]:
    """The names, in `model.named_parameters()`, of the weight matrices of attention and MLPs."""
    split = _split_by_bridges(model)
    found = []
    for stored_name, parameter in model.named_parameters():
        known = _known_layout(_short_name(stored_name), parameter.ndim)
        by_neuron = _layout_by_neuron(model, stored_name)
        if id(parameter) not in split and (known is not None or by_neuron is not None):
            found.append(stored_name)
    return found


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


def _single_weight(name: str, parameter: Tensor, layout: MatrixLayout) -> WeightGroup:
    """A group of one weight, without protected entries: its rows are not neurons or channels."""
    bands = ((GroupedWeight(parameter, layout),),)
    is_embedding = _EMBEDDINGS.search(name) is not None
    return WeightGroup(name, bands, is_embedding, protected=False)


def check_held_dense(model: torch.nn.Module) -> None:
    """Raise `UnsupportedError` if the model holds some of its weights compact."""
    for name, module in model.named_modules():
        if vars(module).get("compact"):
            raise UnsupportedError(
                f"the weights of {name} are held compact, and a change of such a weight is lost: "
                "load the model with dense_weights=True to make it sparse or train it"
            )
