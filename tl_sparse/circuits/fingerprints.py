"""Fingerprints, which recognise a model by its weights.

The same weights match in any dtype, on any device, and with TransformerLens 3 or 4.
"""

import hashlib
import json
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tl_sparse.hooks import TLModel, is_sparse_model

#: Sketches match if their distance is at most this fraction of their norm. Rounding the weights to
#: bfloat16 moves a sketch by about 0.001 of its norm, and changing them by 5 % moves it by about
#: 0.05; the sketches of two different matrices differ by about their norm.
TOLERANCE = 0.01
#: An additional absolute tolerance, because rounding to float16 can change even the smallest
#: weights by this much.
ABSOLUTE_TOLERANCE = 1e-6
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
class Fingerprint:
    """What a circuit stores in order to recognise its model."""

    #: A hash of the configuration, which determines the network up to its weights.
    architecture: str
    #: Parameter name → eight projections of its values onto fixed directions.
    sketch: dict[str, list[float]]

    def difference(self, other: "Fingerprint") -> str | None:
        """A description of how `other` differs; None if both belong to the same model."""
        if self.architecture != other.architecture:
            return f"another architecture ({other.architecture}, not {self.architecture})"
        for name, ours in self.sketch.items():
            theirs = other.sketch.get(name, [])
            allowed = TOLERANCE * max(math.hypot(*ours), math.hypot(*theirs)) + ABSOLUTE_TOLERANCE
            if len(ours) != len(theirs) or math.dist(ours, theirs) > allowed:
                return f"other weights in {name}"
        return None


def fingerprint(model: TLModel) -> Fingerprint:
    """The fingerprint of a TransformerLens model."""
    if is_sparse_model(model):
        config = model.sparse_cfg.to_dict()
        parameters = model.network.weights()
    else:
        config = {name: getattr(model.cfg, name, None) for name in _CONFIG_FIELDS}
        parameters = model.named_parameters()
    text = json.dumps(config, sort_keys=True)
    architecture = hashlib.sha256(text.encode()).hexdigest()[:16]
    sketch = {name: _project(weights) for name, weights in parameters}
    return Fingerprint(architecture, sketch)


@torch.no_grad()
def _project(weights: Tensor) -> list[float]:
    """Eight sums of the weights with fixed signs, each over every eighth entry.

    They are divided by the root of the number of weights, so that they are about as large as one
    weight.
    """
    flat = weights.detach().flatten().to("cpu", torch.float64)
    # The signs of the cosines of these angles are as good as random here, and the same on every
    # platform.
    angles = torch.arange(1, flat.numel() + 1, dtype=torch.float64) * 1.8393972058572117
    signed = torch.where(angles.cos() >= 0, flat, -flat)
    sums = F.pad(signed, (0, -len(flat) % 8)).view(-1, 8).sum(0)
    projections = sums / len(flat) ** 0.5
    return [float(f"{value:.6g}") for value in projections.tolist()]
