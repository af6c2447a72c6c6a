"""The architecture of a network, as a frozen, checked configuration."""

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, Literal

from tl_sparse.config import check, check_known_keys, check_types, short_repr
from tl_sparse.errors import ConfigError

#: Where AbsTopK can act, in the order of the forward pass. The names are those of the published
#: configurations.
TOPK_LOCATIONS = (
    "resid_pre",
    "attn_in",
    "attn_q",
    "attn_k",
    "attn_v",
    "attn_out",
    "resid_post_attn",
    "mlp_in",
    "mlp_neuron",
    "mlp_out",
    "resid_post_mlp",
)
#: The eight locations in the paper's models, which do not include the residual stream itself.
PAPER_TOPK_LOCATIONS = tuple(name for name in TOPK_LOCATIONS if not name.startswith("resid"))

#: The default epsilon of each kind of norm. That of RMSNorm is float32's machine epsilon.
_NORM_EPS = {"rms": 2.0**-23, "layer": 1e-5}

#: A larger size means a damaged configuration, and is refused before memory is allocated.
MAX_SIZE = 100_000_000


def paper_topk(fraction: float) -> dict[str, float]:
    """AbsTopK at the paper's eight locations, with the same `fraction` (A.1; usually 1/4)."""
    return dict.fromkeys(PAPER_TOPK_LOCATIONS, fraction)


@dataclass(frozen=True)
class SparseConfig:
    """Sizes and features of a network, with one field per feature of Gao et al. 2025, A.1.

    Attributes:
        n_layers: the number of layers.
        d_model: the number of channels of the residual stream.
        n_heads: the number of attention heads in each layer. `n_heads * d_head` need not equal
            `d_model`.
        d_head: the number of channels of a head.
        d_mlp: the number of neurons in the MLP of each layer.
        d_vocab: the number of tokens in the vocabulary.
        n_ctx: the number of tokens in the longest context.
        normalization: the kind of norm.
        norm_eps: the epsilon of the norms, whatever the dtype in which the model runs. None means
            that of a model trained in float32: 2**-23, float32's machine epsilon, with "rms", and
            1e-5 with "layer". In OpenAI's own code, some versions of torch take the machine epsilon
            of the dtype in which the model happens to run, which changes what it computes;
            `2.0**-7`, that of bfloat16, gives what their code then computes in bfloat16.
        norm_bias: whether norms have a bias. Only LayerNorm can have one.
        act_fn: the nonlinearity of the MLP. "gelu" is the exact GELU, not its tanh approximation.
        resid_relu: whether ReLU is applied to the residual stream after each addition to it.
        abs_topk: AbsTopK location → fraction of the entries kept, where k = int(fraction · dim).
        attn_sinks: whether each head has a learned logit in its softmax denominator.
        bigram_table: whether the logits get the row of the current token in a dense table
            `[d_vocab, d_vocab]`.
        logits_bias: whether a learned vector is added to the logits.
        positions: how the model knows positions. "added" to the token embedding; or
            "concatenated", as `d_pos` channels that each block reads together with the residual
            stream and cannot write to.
        d_pos: the number of concatenated positional channels; 0 for other positions.
        sinusoidal: whether positions are fixed sinusoids instead of learned.
        biases: whether the linear maps of attention and MLP have biases.
        tied_unembed: whether the unembedding is the transpose of the embedding.

    Raises:
        ConfigError: for a value of the wrong type or out of range.
    """

    n_layers: int
    d_model: int
    n_heads: int
    d_head: int
    d_mlp: int
    d_vocab: int
    n_ctx: int
    normalization: Literal["rms", "layer"] = "rms"
    norm_eps: float | None = None
    norm_bias: bool = False
    act_fn: Literal["gelu", "relu"] = "gelu"
    resid_relu: bool = False
    abs_topk: Mapping[str, float] = field(default_factory=dict)
    attn_sinks: bool = False
    bigram_table: bool = False
    logits_bias: bool = False
    positions: Literal["none", "added", "concatenated"] = "none"
    d_pos: int = 0
    sinusoidal: bool = False
    biases: bool = True
    tied_unembed: bool = False

    def __repr__(self) -> str:
        fraction = next(iter(self.abs_topk.values()), None)
        if fraction is not None and self.abs_topk == paper_topk(fraction):
            return short_repr(self, {"abs_topk": f"paper_topk({fraction!r})"})
        return short_repr(self)

    def __post_init__(self) -> None:
        check_types(self)
        self._check_sizes()
        rms_bias = self.norm_bias and self.normalization == "rms"
        check(not rms_bias, "norm_bias", True, "false with RMSNorm")
        self._check_norm_eps()
        self._check_positions()
        self._check_abs_topk()

    def _check_sizes(self) -> None:
        for name in ("n_layers", "d_model", "n_heads", "d_head", "d_mlp", "d_vocab", "n_ctx"):
            size = getattr(self, name)
            check(size >= 1, name, size, "at least 1")
            check(size <= MAX_SIZE, name, size, f"at most {MAX_SIZE:,}")

    def _check_norm_eps(self) -> None:
        eps = self.norm_eps
        if eps is not None:
            is_number = isinstance(eps, int | float) and not isinstance(eps, bool)
            check(is_number and 0 < eps < 1, "norm_eps", eps, "a number in (0, 1), or null")

    def _check_positions(self) -> None:
        if self.positions == "concatenated":
            expected = "at least 1 with concatenated positions"
            check(self.d_pos >= 1, "d_pos", self.d_pos, expected)
        else:
            check(self.d_pos == 0, "d_pos", self.d_pos, "0 without concatenated positions")
        check(self.d_pos <= MAX_SIZE, "d_pos", self.d_pos, f"at most {MAX_SIZE:,}")
        sinusoids_of_nothing = self.sinusoidal and self.positions == "none"
        check(not sinusoids_of_nothing, "sinusoidal", True, "false without positions")

    def _check_abs_topk(self) -> None:
        expected = "a mapping of location to fraction"
        check(isinstance(self.abs_topk, Mapping), "abs_topk", self.abs_topk, expected)
        # Copy the mapping, so that later changes to it do not change this frozen configuration.
        object.__setattr__(self, "abs_topk", dict(self.abs_topk))
        for location, fraction in self.abs_topk.items():
            expected = f"one of {', '.join(TOPK_LOCATIONS)}"
            check(location in TOPK_LOCATIONS, "abs_topk location", location, expected)
            dim = self.location_size(location)
            is_number = isinstance(fraction, int | float) and not isinstance(fraction, bool)
            is_valid = is_number and 0 < fraction <= 1 and int(fraction * dim) >= 1
            expected = f"a fraction of at most 1 that keeps at least one of the {dim} entries there"
            check(is_valid, f"abs_topk[{location!r}]", fraction, expected)

    @property
    def eps(self) -> float:
        """The epsilon of the norms: `norm_eps`, or its default."""
        if self.norm_eps is None:
            return _NORM_EPS[self.normalization]
        return self.norm_eps

    @property
    def d_read(self) -> int:
        """Width of the input of attention and MLPs: d_model and any positional channels."""
        return self.d_model + self.d_pos

    @property
    def n_matrix_weights(self) -> int:
        """The number of weights in the attention and MLP matrices of all layers."""
        attention = self.n_heads * self.d_head * (3 * self.d_read + self.d_model)
        mlp = self.d_mlp * (self.d_read + self.d_model)
        return self.n_layers * (attention + mlp)

    def location_size(self, location: str) -> int:
        """The number of entries from which AbsTopK chooses at a location.

        For q, k and v, these are the channels of all heads together.

        Raises:
            ConfigError: if there is no such location.
        """
        is_location = location in TOPK_LOCATIONS
        check(is_location, "location", location, f"one of {', '.join(TOPK_LOCATIONS)}")
        if location in ("attn_in", "mlp_in"):
            return self.d_read
        if location in ("attn_q", "attn_k", "attn_v"):
            return self.n_heads * self.d_head
        if location == "mlp_neuron":
            return self.d_mlp
        return self.d_model

    def topk(self, location: str) -> int | None:
        """The number of entries that AbsTopK keeps at `location`; None if it does not act there."""
        size = self.location_size(location)
        fraction = self.abs_topk.get(location)
        if fraction is None:
            return None
        return int(fraction * size)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-serialisable values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SparseConfig":
        """The inverse of `to_dict`.

        Raises:
            ConfigError: for an unknown key (naming the nearest valid one), a missing one, or a bad
                value.
        """
        check(isinstance(values, Mapping), "values", values, "a mapping of fields to values")
        check_known_keys(cls, values)
        required = [f.name for f in fields(cls) if f.default is f.default_factory is MISSING]
        missing = [name for name in required if name not in values]
        if missing:
            raise ConfigError(f"missing configuration keys: {', '.join(missing)}")
        return cls(**values)
