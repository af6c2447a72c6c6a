"""The architecture of a weight-sparse transformer (Gao et al. 2025, appendix A.1) as one frozen dataclass."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal, get_args, get_origin

from tl_sparse.errors import ConfigError

#: Where AbsTopK can act, named as in the published configurations, in the order of the forward pass.
TOPK_LOCATIONS = (
    "attn_in", "attn_q", "attn_k", "attn_v", "attn_out", "resid_post_attn",
    "mlp_in", "mlp_neuron", "mlp_out", "resid_post_mlp",
)  # fmt: skip
#: The eight locations of the paper's models; the residual stream itself is rarely sparsified.
PAPER_TOPK_LOCATIONS = tuple(name for name in TOPK_LOCATIONS if not name.startswith("resid"))


def paper_topk(fraction: float) -> dict[str, float]:
    """AbsTopK with one `fraction` at the paper's eight locations (A.1; usually 1/4)."""
    return dict.fromkeys(PAPER_TOPK_LOCATIONS, fraction)


def check(valid: bool, name: str, value: object, expected: str) -> None:
    """Raise the `ConfigError` all configurations share: field, value, valid range."""
    if not valid:
        raise ConfigError(f"{name} = {value!r} is not possible; it must be {expected}")


def check_types(config: Any) -> None:
    """Reject fields of a config dataclass whose value is not of the annotated type.

    Values come from JSON and command lines, where `"4"` or `true` easily stand for a number.
    """
    for f in dataclasses.fields(config):
        value, annotation = getattr(config, f.name), f.type
        if get_origin(annotation) is Literal:
            check(value in get_args(annotation), f.name, value, f"one of {', '.join(get_args(annotation))}")
        elif annotation is float:
            number = isinstance(value, int | float) and not isinstance(value, bool)
            check(number, f.name, value, "a number")
        elif annotation in (int, bool, str):
            check(type(value) is annotation, f.name, value, f"of type {annotation.__name__}")


@dataclass(frozen=True)
class SparseConfig:
    """Sizes and features of a network; every feature of Gao et al. 2025, A.1 is one field.

    Attributes:
        n_layers, d_model, n_heads, d_head, d_mlp, d_vocab, n_ctx: sizes, in TransformerLens' names. `d_head`
            is free of `d_model`.
        normalization: "rms" (eps is the dtype's machine epsilon) or "layer" (eps 1e-5).
        norm_bias: whether norms have a bias (LayerNorm only).
        act_fn: the MLP's nonlinearity; "gelu" is the exact one.
        resid_relu: apply ReLU to the residual stream after each addition to it.
        abs_topk: AbsTopK location → fraction of the entries kept, k = int(fraction · dim).
        attn_sinks: one learned logit per head in the softmax denominator.
        bigram_table: a dense [d_vocab, d_vocab] table whose row of the current token is added to the logits.
        logits_bias: a learned vector added to the logits.
        positions: "none"; "added" to the token embedding; or "concatenated": `d_pos` read-only channels
            beside what each block reads.
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

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("n_layers", "d_model", "n_heads", "d_head", "d_mlp", "d_vocab", "n_ctx"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        check(not (self.norm_bias and self.normalization == "rms"), "norm_bias", True, "false with RMSNorm")
        concatenated = self.positions == "concatenated"
        expected = "at least 1 with concatenated positions" if concatenated else "0 without concatenated positions"
        check((self.d_pos >= 1) == concatenated and self.d_pos >= 0, "d_pos", self.d_pos, expected)
        check(not (self.sinusoidal and self.positions == "none"), "sinusoidal", True, "false without positions")
        check(isinstance(self.abs_topk, Mapping), "abs_topk", self.abs_topk, "a mapping of location to fraction")
        object.__setattr__(self, "abs_topk", dict(self.abs_topk))
        for location, fraction in self.abs_topk.items():
            expected = f"one of {', '.join(TOPK_LOCATIONS)}"
            check(location in TOPK_LOCATIONS, "abs_topk location", location, expected)
            number = isinstance(fraction, int | float) and not isinstance(fraction, bool)
            dim = self.location_size(location)
            expected = f"a fraction in [1/{dim}, 1], so that at least one of {dim} entries is kept"
            valid = number and fraction <= 1 and int(fraction * dim) >= 1
            check(valid, f"abs_topk[{location!r}]", fraction, expected)

    @property
    def d_read(self) -> int:
        """Width of what a block reads: the residual stream and any concatenated positional channels."""
        return self.d_model + self.d_pos

    def location_size(self, location: str) -> int:
        """Number of entries of the last dimension at an AbsTopK location (all heads together for q, k, v)."""
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
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SparseConfig":
        """The inverse of `to_dict`.

        Raises:
            ConfigError: for an unknown key (naming the nearest valid one), a missing one, or a bad value.
        """
        names = [f.name for f in dataclasses.fields(cls)]
        for key in values:
            if key not in names:
                near = get_close_matches(key, names, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"valid keys are {', '.join(names)}"
                raise ConfigError(f"unknown configuration key {key!r}; {hint}")
        missing = [
            f.name for f in dataclasses.fields(cls)
            if f.default is f.default_factory is dataclasses.MISSING and f.name not in values
        ]  # fmt: skip
        if missing:
            raise ConfigError(f"missing configuration keys: {', '.join(missing)}")
        return cls(**values)
