"""The learned maps between two residual streams: an encoder and a decoder at each site."""

import math
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_sparse.bridges.config import EncoderKind
from tl_sparse.hooks import abs_topk


class Encoder(nn.Module):
    """From the dense stream to the sparse one: linear, then all but the large entries are zeroed.

    With `kind="abs_topk"`, the k largest magnitudes are kept (Gao et al. 2025, section 2.3). With
    "threshold", entry c is kept where its magnitude is at least exp(log_eps[c]), which is learned.

    Args:
        d_dense: the width of the dense stream.
        d_sparse: the width of the sparse stream.
        kind: which entries are kept.
        k: the number of entries that AbsTopK keeps.
        log_eps: the logarithm of all thresholds at the beginning.
    """

    def __init__(
        self, d_dense: int, d_sparse: int, kind: EncoderKind, k: int, log_eps: float
    ) -> None:
        super().__init__()
        self.kind = kind
        self.k = k
        self.linear = nn.Linear(d_dense, d_sparse)
        if kind == "threshold":
            self.log_eps = nn.Parameter(torch.full((d_sparse,), log_eps))

    def forward(
        self, dense: Float[Tensor, "*batch d_dense"], sharpness: float = math.inf
    ) -> Float[Tensor, "*batch d_sparse"]:
        """The dense stream in sparse terms.

        Args:
            dense: the dense stream.
            sharpness: how steeply a threshold sets in: an entry z is multiplied by
                sigmoid(sharpness · (|z| - threshold)). Finite values are for training, since
                thresholds get no gradient otherwise. AbsTopK has none.
        """
        z: Tensor = self.linear(dense)
        if self.kind == "abs_topk":
            return abs_topk(z, self.k)
        above = z.abs() - self.log_eps.exp()
        if math.isinf(sharpness):
            return z * (above >= 0)
        return z * torch.sigmoid(sharpness * above)


class SiteMaps(nn.Module):
    """The two maps at one site.

    Attributes:
        encoder: from the dense stream to the sparse one.
        decoder: from the sparse stream to the dense one, linear.
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = nn.Linear(encoder.linear.out_features, encoder.linear.in_features)


class Maps(nn.Module):
    """The maps at all sites.

    Args:
        n_sites: the number of sites, 2 · n_layers + 1.
        d_dense: the width of the dense stream.
        d_sparse: the width of the sparse stream.
        kind: see `Encoder`.
        fraction: the share of its entries that an encoder with AbsTopK keeps, at least one entry.
        log_eps: see `Encoder`.
    """

    def __init__(
        self,
        n_sites: int,
        d_dense: int,
        d_sparse: int,
        kind: EncoderKind = "abs_topk",
        fraction: float = 0.25,
        log_eps: float = -1.0,
    ) -> None:
        super().__init__()
        self.d_dense = d_dense
        self.d_sparse = d_sparse
        self.kind = kind
        self.fraction = fraction
        k = max(1, int(fraction * d_sparse))
        sites = []
        for _ in range(n_sites):
            sites.append(SiteMaps(Encoder(d_dense, d_sparse, kind, k, log_eps)))
        self.sites = nn.ModuleList(sites)

    def __len__(self) -> int:
        return len(self.sites)

    def __getitem__(self, site: int) -> SiteMaps:
        return cast(SiteMaps, self.sites[site])


@torch.no_grad()
def init_maps(maps: Maps, seed: int) -> None:
    """Draw new maps from `seed`: weights uniform within ±1/sqrt(inputs), and biases of zero.

    A map then neither enlarges nor shrinks a stream by much; only the scale matters, since training
    begins with a new sparse model.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in maps.named_parameters():
        if name.endswith(("linear.weight", "decoder.weight")):
            bound = parameter.shape[1] ** -0.5
            drawn = torch.rand(parameter.shape, generator=generator)
            parameter.copy_((2 * drawn - 1) * bound)
        elif name.endswith("bias"):
            parameter.zero_()
