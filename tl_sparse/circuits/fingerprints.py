"""Recognising a model: the same weights have the same fingerprint in any dtype, on any device, and
on either TransformerLens line.
"""

import hashlib
import json
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tl_sparse.hooks import TLModel, is_sparse_model

#: Two sketches that differ by less than this share of their length are of the same weights.
#: Rounding to bfloat16 moves a sketch by about 0.001 of its length, a change of the weights by 5 %
#: moves it by about 0.05, and the sketches of two different matrices differ by about 1.
TOLERANCE = 0.01
#: Rounding to float16 can move even the smallest weights by this much.
ABSOLUTE_TOLERANCE = 1e-6
#: What identifies the architecture of a model that is not of this package.
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
    """What a circuit remembers of its model."""

    #: Hash of what the network computes, without its weights.
    architecture: str
    #: Parameter name → eight numbers, projections of its weights on fixed directions.
    sketch: dict[str, list[float]]

    def difference(self, other: "Fingerprint") -> str | None:
        """None if both are of the same model, else what differs."""
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
    """Eight sums of the weights with fixed signs, each over every eighth entry, scaled to about the
    size of a weight.
    """
    flat = weights.detach().flatten().to("cpu", torch.float64)
    # The sign of a cosine of incommensurable angles: as good as random here, and the same on every
    # platform.
    angles = torch.arange(1, flat.numel() + 1, dtype=torch.float64) * 1.8393972058572117
    signed = torch.where(angles.cos() >= 0, flat, -flat)
    sums = F.pad(signed, (0, -len(flat) % 8)).view(-1, 8).sum(0)
    projections = sums / len(flat) ** 0.5
    return [float(f"{value:.6g}") for value in projections.tolist()]
