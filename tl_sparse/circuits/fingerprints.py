"""Fingerprints, which recognise a model by its weights.

The same weights match in any dtype, on any device, and with TransformerLens 3 or 4.
"""

import hashlib
import json
import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from tl_sparse.arguments import checked
from tl_sparse.errors import CircuitError
from tl_sparse.hooks import TLModel, is_sparse_model

#: Sketches match if their distance is at most this fraction of the root mean square of the weights.
#: Rounding all weights to bfloat16 moves a sketch by 0.001 to 0.003 of it, and changing them by 5 %
#: moves it by about 0.05; the sketches of two different matrices differ by about all of it.
TOLERANCE = 0.01
#: An additional absolute tolerance, because rounding to float16 can change even the smallest
#: weights by this much.
ABSOLUTE_TOLERANCE = 1e-6
#: The formats of weights that are told apart, the least precise first.
FORMATS = ("bfloat16", "float16", "float32")
#: The number of projections in the sketch of a parameter.
_N_PROJECTIONS = 8
#: The fields of `cfg` that identify the architecture of a model from outside this package.
_CONFIG_FIELDS = (
    "n_layers",
    "d_model",
    "n_heads",
    "d_head",
    "d_mlp",
    "d_vocab",
    "n_ctx",
    "act_fn",
    "n_key_value_heads",
    "parallel_attn_mlp",
    "positional_embedding_type",
    "rotary_dim",
)


@dataclass(frozen=True)
class WeightFacts:
    """What is stored about a parameter besides its sketch.

    Attributes:
        rms: the root mean square of the values.
        digests: a hash of the values rounded to each of `FORMATS`, by the name of the format.
    """

    rms: float
    digests: dict[str, str]

    @property
    def format(self) -> str:
        """The first of `FORMATS` that has all the values."""
        formats = [name for name in FORMATS if self.digests[name] == self.digests["float32"]]
        return formats[0]

    def rules_out(self, other: "WeightFacts") -> bool:
        """Whether the values differ by more than rounding, as far as digests can tell.

        Values of the same format must be equal. Values of different formats may be the same ones,
        rounded once or twice; then only the sketch can tell.
        """
        is_equal = self.digests["float32"] == other.digests["float32"]
        return not is_equal and self.format == other.format


@dataclass(frozen=True)
class Fingerprint:
    """What a circuit stores in order to recognise its model.

    Attributes:
        architecture: a hash of the configuration, which determines the network up to its weights.
        sketch: parameter name → eight projections of its values onto fixed directions.
        weights: parameter name → more facts about its values. It is empty in circuits saved by the
            first versions, of which only the sketch is compared.

    Raises:
        CircuitError: if there is no parameter, or a sketch is not eight finite numbers.
    """

    architecture: str
    sketch: dict[str, list[float]]
    weights: dict[str, WeightFacts] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.sketch:
            raise CircuitError("the sketch of a model must have an entry for each parameter")
        for name, projections in self.sketch.items():
            if len(projections) != _N_PROJECTIONS or not all(map(math.isfinite, projections)):
                raise CircuitError(
                    f"the sketch of {name} must be {_N_PROJECTIONS} finite numbers, "
                    f"not {projections}"
                )
        if self.weights and self.weights.keys() != self.sketch.keys():
            raise CircuitError("the sketch and the facts about weights must name the same ones")

    def difference(self, other: "Fingerprint") -> str | None:
        """A description of how `other` differs; None if both belong to the same model.

        Every change of a weight is seen if the weights of both models are of the same format.
        Otherwise, those of one model may be rounded, and they must be as close to each other as
        rounding leaves them.
        """
        if self.architecture != other.architecture:
            return f"another architecture ({other.architecture}, not {self.architecture})"
        for name in self.sketch:
            if name not in other.sketch:
                return f"no weights {name}"
            if not self._has_same_weights(other, name):
                return f"other weights in {name}"
        for name in other.sketch:
            if name not in self.sketch:
                return f"additional weights {name}"
        return None

    def _has_same_weights(self, other: "Fingerprint", name: str) -> bool:
        ours = self.weights.get(name)
        theirs = other.weights.get(name)
        if ours is not None and theirs is not None and ours.rules_out(theirs):
            return False
        our_sketch, their_sketch = self.sketch[name], other.sketch[name]
        rms = min((facts.rms for facts in (ours, theirs) if facts is not None), default=0.0)
        size = max(math.hypot(*our_sketch), math.hypot(*their_sketch), rms)
        return math.dist(our_sketch, their_sketch) <= TOLERANCE * size + ABSOLUTE_TOLERANCE


@checked()
def fingerprint(model: TLModel) -> Fingerprint:
    """The fingerprint of a TransformerLens model.

    Raises:
        CircuitError: if a weight is NaN or infinite.
    """
    if is_sparse_model(model):
        config = model.sparse_cfg.to_dict()
        if config["norm_eps"] is None:
            del config["norm_eps"]  # circuits saved before this field existed must still fit
        parameters = model.network.weights()
    else:
        config = {name: getattr(model.cfg, name, None) for name in _CONFIG_FIELDS}
        parameters = model.named_parameters()
    text = json.dumps(config, sort_keys=True)
    architecture = hashlib.sha256(text.encode()).hexdigest()[:16]
    sketch = {}
    weights = {}
    for name, parameter in parameters:
        flat = parameter.detach().flatten().cpu()
        sketch[name] = _project(flat.double())
        weights[name] = _facts(flat)
    return Fingerprint(architecture, sketch, weights)


def _project(flat: Float[Tensor, " weight"]) -> list[float]:
    """Eight sums of the weights with fixed signs, each over every eighth entry.

    They are divided by the root of the number of weights, so that they are about as large as one
    weight.
    """
    # The signs of the cosines of these angles are as good as random here, and the same on every
    # platform.
    numbers = torch.arange(1, flat.numel() + 1, dtype=torch.float64, device=flat.device)
    angles = numbers * 1.8393972058572117
    signed = torch.where(angles.cos() >= 0, flat, -flat)
    padded = F.pad(signed, (0, -len(flat) % _N_PROJECTIONS))
    sums = padded.view(-1, _N_PROJECTIONS).sum(0)
    projections = sums / len(flat) ** 0.5
    return [float(f"{value:.6g}") for value in projections.tolist()]


def _facts(flat: Float[Tensor, " weight"]) -> WeightFacts:
    rms = float(flat.double().square().mean().sqrt())
    digests = {}
    for name in FORMATS:
        rounded = flat.to(getattr(torch, name)).float()
        rounded += 0.0  # turns -0.0, which some roundings give, into 0.0
        digests[name] = hashlib.blake2b(rounded.numpy().data, digest_size=8).hexdigest()
    return WeightFacts(rms, digests)
