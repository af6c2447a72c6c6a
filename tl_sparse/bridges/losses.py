"""How well bridges join two models: by site, from a dense and a sparse run on the same tokens.

The terms are those of Gao et al. 2025, section A.3, in the form of the community's implementation.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


def nmse(
    predicted: Float[Tensor, "batch pos d_model"], target: Float[Tensor, "batch pos d_model"]
) -> Float[Tensor, ""]:
    """The normalised squared error of a stream, the mean over tokens.

    For each token it is |predicted - target|² / (|target - m|² + 1e-8), where m is the mean of the
    target over all tokens. No gradient flows to the target.
    """
    target = target.detach()
    mean = target.mean(dim=(0, 1), keepdim=True)
    squares = (target - mean).square().sum(-1)
    errors = (predicted - target).square().sum(-1)
    return (errors / (squares + 1e-8)).mean()


@dataclass(frozen=True, eq=False)
class Target:
    """The distribution that other logits are compared with.

    Attributes:
        probs: its probabilities of the likeliest tokens, or of all.
        tokens: which tokens these are; None for all.
        entropy: the mean of its entropy over tokens, in nats.
    """

    probs: Float[Tensor, "batch pos token"]
    tokens: Int[Tensor, "batch pos token"] | None
    entropy: Float[Tensor, ""]

    @classmethod
    def of(cls, logits: Float[Tensor, "batch pos d_vocab"], n_tokens: int = 0) -> "Target":
        """The distribution of `logits`, without gradient.

        Args:
            logits: the logits of the model that others should be like.
            n_tokens: how many of the likeliest tokens count, with their probabilities scaled to a
                sum of 1; 0 for all.
        """
        logits = logits.detach()
        tokens = None
        if 0 < n_tokens < logits.shape[-1]:
            logits, tokens = logits.topk(n_tokens, dim=-1)
        log_probs = logits.log_softmax(-1)
        probs = log_probs.exp()
        return cls(probs, tokens, -(probs * log_probs).sum(-1).mean())

    def kl(self, logits: Float[Tensor, "batch pos d_vocab"]) -> Float[Tensor, ""]:
        """KL(this distribution ‖ that of `logits`), in nats, the mean over tokens."""
        if self.tokens is not None:
            logits = logits.gather(-1, self.tokens)
        # This form needs no log-probabilities, which would be another two tensors of this size.
        cross_entropy = logits.logsumexp(-1) - torch.einsum("bpv,bpv->bp", self.probs, logits)
        return cross_entropy.mean() - self.entropy


@dataclass(frozen=True)
class SiteLosses:
    """What the two maps at a site lose.

    Attributes:
        site: the hook point of the site.
        nmse_encoder: the normalised squared error of the encoded dense stream; see `nmse`.
        nmse_decoder: that of the decoded sparse stream.
        kl_dense_to_sparse: KL(dense model ‖ sparse model that goes on from the encoded stream), in
            nats per token.
        kl_sparse_to_dense: KL(dense model ‖ dense model that goes on from the decoded stream).
    """

    site: str
    nmse_encoder: float
    nmse_decoder: float
    kl_dense_to_sparse: float
    kl_sparse_to_dense: float


@dataclass(frozen=True)
class BridgeLosses:
    """What two models and the bridges between them lose on some tokens.

    Attributes:
        ce_dense: the next-token loss of the dense model, in nats.
        ce_sparse: the next-token loss of the sparse model.
        kl_sparse: KL(dense model ‖ sparse model), in nats per token.
        sites: the losses at each site.
    """

    ce_dense: float
    ce_sparse: float
    kl_sparse: float
    sites: list[SiteLosses]

    def __str__(self) -> str:
        lines = [
            f"next-token loss {self.ce_dense:.3f} (dense), {self.ce_sparse:.3f} (sparse); "
            f"KL(dense ‖ sparse) {self.kl_sparse:.3f}",
            f"{'site':<26}{'NMSE enc':>10}{'NMSE dec':>10}{'KL d→s':>10}{'KL s→d':>10}",
        ]
        for site in self.sites:
            numbers = (
                site.nmse_encoder,
                site.nmse_decoder,
                site.kl_dense_to_sparse,
                site.kl_sparse_to_dense,
            )
            lines.append(f"{site.site:<26}" + "".join(f"{number:>10.3f}" for number in numbers))
        return "\n".join(lines)


def mean_losses(parts: list[BridgeLosses], weights: list[int]) -> BridgeLosses:
    """The mean of the losses on several batches, weighted by their numbers of rows."""
    total = sum(weights)

    def mean(values: list[float]) -> float:
        return sum(value * weight for value, weight in zip(values, weights, strict=True)) / total

    sites = []
    for number, site in enumerate(parts[0].sites):
        at_site = [part.sites[number] for part in parts]
        sites.append(
            SiteLosses(
                site=site.site,
                nmse_encoder=mean([each.nmse_encoder for each in at_site]),
                nmse_decoder=mean([each.nmse_decoder for each in at_site]),
                kl_dense_to_sparse=mean([each.kl_dense_to_sparse for each in at_site]),
                kl_sparse_to_dense=mean([each.kl_sparse_to_dense for each in at_site]),
            )
        )
    return BridgeLosses(
        ce_dense=mean([part.ce_dense for part in parts]),
        ce_sparse=mean([part.ce_sparse for part in parts]),
        kl_sparse=mean([part.kl_sparse for part in parts]),
        sites=sites,
    )
