"""The architecture of a network, as a frozen, checked configuration."""

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, Literal

from tl_sparse.config import check, check_known_keys, check_types, short_repr
from tl_sparse.errors import ConfigError

#: Where AbsTopK can act, named as in the published configurations, in the order of the forward
#: pass.
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
#: The eight locations of the paper's models; the residual stream itself is rarely sparsified.
PAPER_TOPK_LOCATIONS = tuple(name for name in TOPK_LOCATIONS if not name.startswith("resid"))

#: No size of a network is larger; a damaged configuration is refused before anything is allocated.
MAX_SIZE = 100_000_000


def paper_topk(fraction: float) -> dict[str, float]:
    """AbsTopK with one `fraction` at the paper's eight locations (A.1; usually 1/4)."""
    return dict.fromkeys(PAPER_TOPK_LOCATIONS, fraction)


@dataclass(frozen=True)
class SparseConfig:
    """Sizes and features of a network; every feature of Gao et al. 2025, A.1 is one field.

    Attributes:
        n_layers, d_model, n_heads, d_head, d_mlp, d_vocab, n_ctx: sizes, in TransformerLens' names.
            `d_head` is free of `d_model`.
        normalization: "rms" (eps is the dtype's machine epsilon) or "layer" (eps 1e-5).
        norm_bias: whether norms have a bias (LayerNorm only).
        act_fn: the MLP's nonlinearity; "gelu" is the exact one.
        resid_relu: apply ReLU to the residual stream after each addition to it.
        abs_topk: AbsTopK location → fraction of the entries kept, k = int(fraction · dim).
        attn_sinks: one learned logit per head in the softmax denominator.
        bigram_table: a dense [d_vocab, d_vocab] table whose row of the current token is added to
            the logits.
        logits_bias: a learned vector added to the logits.
        positions: "none"; "added" to the token embedding; or "concatenated": `d_pos` read-only
            channels beside what each block reads.
        sinusoidal: positions are fixed sinusoids instead of learned.
        biases: whether the linear maps of attention and MLP have biases.
        tied_unembed: the unembedding is the transposed embedding.

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
        for name in ("n_layers", "d_model", "n_heads", "d_head", "d_mlp", "d_vocab", "n_ctx"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
            check(
                getattr(self, name) <= MAX_SIZE, name, getattr(self, name), f"at most {MAX_SIZE:,}"
            )
        check(
            not (self.norm_bias and self.normalization == "rms"),
            "norm_bias",
            True,
            "false with RMSNorm",
        )
        concatenated = self.positions == "concatenated"
        expected = (
            "at least 1 with concatenated positions"
            if concatenated
            else "0 without concatenated positions"
        )
        check((self.d_pos >= 1) == concatenated and self.d_pos >= 0, "d_pos", self.d_pos, expected)
        check(self.d_pos <= MAX_SIZE, "d_pos", self.d_pos, f"at most {MAX_SIZE:,}")
        check(
            not (self.sinusoidal and self.positions == "none"),
            "sinusoidal",
            True,
            "false without positions",
        )
        check(
            isinstance(self.abs_topk, Mapping),
            "abs_topk",
            self.abs_topk,
            "a mapping of location to fraction",
        )
        object.__setattr__(self, "abs_topk", dict(self.abs_topk))
        for location, fraction in self.abs_topk.items():
            expected = f"one of {', '.join(TOPK_LOCATIONS)}"
            check(location in TOPK_LOCATIONS, "abs_topk location", location, expected)
            number = isinstance(fraction, int | float) and not isinstance(fraction, bool)
            dim = self.location_size(location)
            expected = f"a fraction of at most 1 that keeps at least one of the {dim} entries there"
            valid = number and 0 < fraction <= 1 and int(fraction * dim) >= 1
            check(valid, f"abs_topk[{location!r}]", fraction, expected)

    @property
    def d_read(self) -> int:
        """Width of what a block reads: the residual stream and any concatenated positional
        channels.
        """
        return self.d_model + self.d_pos

    @property
    def n_matrix_weights(self) -> int:
        """How many weights the attention and MLP matrices of all layers have."""
        heads = self.n_heads * self.d_head
        return self.n_layers * (
            heads * (3 * self.d_read + self.d_model) + self.d_mlp * (self.d_read + self.d_model)
        )

    def location_size(self, location: str) -> int:
        """Number of entries of the last dimension at an AbsTopK location (all heads together for q,
        k, v).
        """
        if location in ("attn_in", "mlp_in"):
            return self.d_read
        if location in ("attn_q", "attn_k", "attn_v"):
            return self.n_heads * self.d_head
        return self.d_mlp if location == "mlp_neuron" else self.d_model

    def topk(self, location: str) -> int | None:
        """How many entries AbsTopK keeps at `location`; None where it does not act."""
        fraction = self.abs_topk.get(location)
        return None if fraction is None else int(fraction * self.location_size(location))

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
        check_known_keys(cls, values)
        missing = [
            f.name
            for f in fields(cls)
            if f.default is f.default_factory is MISSING and f.name not in values
        ]
        if missing:
            raise ConfigError(f"missing configuration keys: {', '.join(missing)}")
        return cls(**values)
