"""Recognising a model: the same weights have the same fingerprint in any dtype, on any device and face."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tl_sparse.hooks.points import TLModel
from tl_sparse.config import SparseConfig

#: Two sketches closer than this are the same weights: rounding to bfloat16 moves a sketch of 2-D weights by
#: about 0.001, and two different weight matrices differ by about 1.
TOLERANCE = 0.02


@dataclass(frozen=True)
class Fingerprint:
    """What a circuit remembers of its model.

    Attributes:
        architecture: hash of what the network computes, without its weights.
        sketch: parameter name → one number, the projection of the normalised weights on a fixed direction.
    """

    architecture: str
    sketch: dict[str, float]

    def difference(self, other: Fingerprint) -> str | None:
        """None if both are of the same model, else what differs."""
        if self.architecture != other.architecture:
            return f"another architecture ({other.architecture}, not {self.architecture})"
        for name, value in self.sketch.items():
            if name not in other.sketch or abs(value - other.sketch[name]) > TOLERANCE:
                return f"other weights in {name}"
        return None


def fingerprint(model: TLModel) -> Fingerprint:
    """The fingerprint of a TransformerLens model."""
    cfg: SparseConfig | None = getattr(model, "sparse_cfg", None)
    if cfg is not None:
        described: dict[str, Any] = cfg.to_dict()
    else:
        names = ("n_layers", "d_model", "n_heads", "d_head", "d_mlp", "d_vocab", "n_ctx", "act_fn")
        described = {name: getattr(model.cfg, name, None) for name in names}
    text = json.dumps(described, sort_keys=True)
    sketch = {name: _project(parameter) for name, parameter in model.named_parameters()}
    return Fingerprint(hashlib.sha256(text.encode()).hexdigest()[:16], sketch)


@torch.no_grad()
def _project(weights: Tensor) -> float:
    """⟨w, r⟩ / |w| for a fixed r of about unit variance in each entry, computed in float64."""
    flat = weights.detach().flatten().to("cpu", torch.float64)
    norm = float(flat.norm())
    if norm == 0.0:
        return 0.0
    # A cosine of incommensurable angles: as good as random here, and the same on every platform to 1e-9.
    direction = 2**0.5 * torch.cos(torch.arange(1, flat.numel() + 1, dtype=torch.float64) * 1.8393972058572117)
    return round(float(flat @ direction) / norm, 6)
