"""Recognising a model: the same weights have the same fingerprint in any dtype, on any device and
face.
"""

import hashlib
import json
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tl_sparse.hooks import TLModel

#: Two sketches that differ by less than this share of their length are of the same weights:
#: rounding to bfloat16 moves one by about 0.001, weights that changed by 5 % by about 0.05, and two
#: different matrices differ by about 1.
TOLERANCE = 0.01
#: What rounding to float16 can do to weights of any size.
ABSOLUTE_TOLERANCE = 1e-6


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
    if (cfg := getattr(model, "sparse_cfg", None)) is not None:
        described = cfg.to_dict()
    else:
        names = ["n_layers", "d_model", "n_heads", "d_head", "d_mlp", "d_vocab", "n_ctx", "act_fn"]
        names += [
            "n_key_value_heads",
            "parallel_attn_mlp",
            "positional_embedding_type",
            "rotary_dim",
        ]
        described = {name: getattr(model.cfg, name, None) for name in names}
    text = json.dumps(described, sort_keys=True)
    named = model.named_parameters() if cfg is None else model.network.weights()
    sketch = {name: _project(parameter) for name, parameter in named}
    return Fingerprint(hashlib.sha256(text.encode()).hexdigest()[:16], sketch)


@torch.no_grad()
def _project(weights: Tensor) -> list[float]:
    """Sums of the weights with fixed signs, of every eighth entry each, about as large as a
    weight.
    """
    flat = weights.detach().flatten().to("cpu", torch.float64)
    # The sign of a cosine of incommensurable angles: as good as random here, and the same on every
    # platform.
    angles = torch.arange(1, flat.numel() + 1, dtype=torch.float64) * 1.8393972058572117
    signed = torch.where(angles.cos() >= 0, flat, -flat)
    sums = F.pad(signed, (0, -len(flat) % 8)).view(-1, 8).sum(0)
    return [float(f"{value:.6g}") for value in (sums / len(flat) ** 0.5).tolist()]
