"""What training with bridges minimises: the terms of Gao et al. 2025, section A.3."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_sparse.bridges.config import BridgeConfig
from tl_sparse.bridges.losses import Target, nmse
from tl_sparse.bridges.maps import Maps, init_maps
from tl_sparse.bridges.pair import Bridges
from tl_sparse.bridges.sites import site_names
from tl_sparse.bridges.streams import Streams, continued, run_with_streams
from tl_sparse.checkpoints import CORPUS_ROWS
from tl_sparse.hooks import TLModel
from tl_sparse.precision import in_float32
from tl_sparse.training import Objective, TrainConfig, next_token_loss


@dataclass(frozen=True, eq=False)
class _Run:
    """Both models' runs on a part of a batch.

    Attributes:
        tokens: the tokens.
        share: the share of the batch that they are.
        dense: the run of the dense model.
        sparse: the run of the sparse model, with its graph.
        target: the dense model's distribution.
        sharpness: how steeply the thresholds of encoders set in.
    """

    tokens: Int[Tensor, "part pos"]
    share: float
    dense: Streams
    sparse: Streams
    target: Target
    sharpness: float


class BridgeObjective(Objective):
    """The loss of a sparse model and its bridges to a dense one.

    The passes that go on from a site are taken one after the other, and the graph of each is freed
    at once. What arrives at the sparse model's stream is kept, and one backward pass then takes it
    through the model below all sites.

    Args:
        dense: the dense model, frozen and in eval mode.
        config: the weights of the terms.
        dense_source: where the dense model was opened; see `Bridges`.
    """

    name = "bridges"
    command = "bridge"
    can_shard = False  # what is trained beside the model would not be sharded
    may_jump = True  # the normalised error of a token whose stream is near the mean is large

    def __init__(self, dense: TLModel, config: BridgeConfig, dense_source: str = "") -> None:
        n_sites = 2 * dense.cfg.n_layers + 1
        maps = Maps(
            n_sites,
            dense.cfg.d_model,
            config.train.model.d_model,
            config.encoder,
            config.encoder_fraction,
            config.threshold_log_eps,
        )
        init_maps(maps, config.train.seed)
        super().__init__(maps)
        self.maps = maps
        self.sparse: Any = None  # until training starts
        self.dense = dense
        self.dense_source = dense_source
        self.bridge_config = config
        self.tokenizer = dense.tokenizer
        self.names = site_names(dense.cfg.n_layers)
        self.settings = {
            "dense": str(getattr(dense.cfg, "model_name", "")),
            **config.settings,
        }
        self._latest: dict[str, float] = {}

    def start(self, model: TLModel, config: TrainConfig, device: torch.device) -> None:
        """Prepare to train `model`, and move the maps to its device."""
        super().start(model, config, device)
        self.sparse = model
        self.maps.to(device)

    def backward(
        self, tokens: Int[Tensor, "part pos"], share: float, step: int
    ) -> Float[Tensor, ""]:
        """Accumulate the gradients of the loss of a part of a batch; see `Objective.backward`."""
        config = self.bridge_config
        run = self._run(tokens, share, config.sharpness(step))
        loss = self._own_loss(run)
        total = loss.detach()
        streams: list[Tensor] = []
        arrived: list[Tensor] = []
        chosen = self._sites(step)
        weight = len(self.names) / len(chosen)
        for site in chosen:
            stream = run.sparse.written[site]
            leaf = stream.detach().requires_grad_()
            total = total + self._encode_backward(site, run, weight)
            total = total + self._decode_backward(site, run, weight, leaf)
            if leaf.grad is not None:
                streams.append(stream)
                arrived.append(leaf.grad)
        torch.autograd.backward([loss, *streams], [torch.ones_like(loss), *arrived])
        return total

    def _run(self, tokens: Int[Tensor, "part pos"], share: float, sharpness: float) -> _Run:
        with torch.no_grad(), self.computing(tokens):
            dense = run_with_streams(self.dense, tokens)
        with self.computing(tokens):
            sparse = run_with_streams(self.sparse, tokens)
        target = Target.of(in_float32(dense.logits), self.bridge_config.top_tokens)
        return _Run(tokens, share, dense, sparse, target, sharpness)

    def _sites(self, step: int) -> list[int]:
        """The sites whose terms a step takes: all, or some that depend on seed and step only."""
        n_chosen = self.bridge_config.sites_per_step
        n_sites = len(self.names)
        if n_chosen in (0, n_sites):
            return list(range(n_sites))
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + step)
        order = torch.randperm(n_sites, generator=generator)
        return sorted(order[:n_chosen].tolist())

    def _own_loss(self, run: _Run) -> Float[Tensor, ""]:
        """The terms without a site, times the share of the part."""
        config = self.bridge_config
        logits = in_float32(run.sparse.logits)
        ce = next_token_loss(logits, run.tokens)
        kl = run.target.kl(logits)
        self._latest["ce_sparse"] = float(ce.detach())
        self._latest["kl_sparse"] = float(kl.detach())
        return (config.weight_ce * ce + config.weight_kl * kl) * run.share

    def _encode_backward(self, site: int, run: _Run, weight: float) -> Float[Tensor, ""]:
        """Take the terms of an encoder back to it and to the sparse model above the site."""
        config = self.bridge_config
        with self.computing(run.tokens):
            encoded = self.maps[site].encoder(run.dense.read[site], run.sharpness)
            logits = continued(self.sparse, run.tokens, site, encoded)
        error = nmse(in_float32(encoded), in_float32(run.sparse.read[site]))
        kl = run.target.kl(in_float32(logits))
        self._note({"nmse_encoder": error, "kl_dense_to_sparse": kl}, site)
        terms = config.weight_nmse * error + config.weight_kl_dense_to_sparse * kl
        return _taken_back(terms * (weight * run.share))

    def _decode_backward(
        self, site: int, run: _Run, weight: float, stream: Float[Tensor, "part pos d_sparse"]
    ) -> Float[Tensor, ""]:
        """Take the terms of a decoder back to it and to the sparse stream, a leaf."""
        config = self.bridge_config
        with self.computing(run.tokens):
            decoded = self.maps[site].decoder(stream)
            logits = continued(self.dense, run.tokens, site, decoded)
        error = nmse(in_float32(decoded), in_float32(run.dense.read[site]))
        kl = run.target.kl(in_float32(logits))
        self._note({"nmse_decoder": error, "kl_sparse_to_dense": kl}, site)
        terms = config.weight_nmse * error + config.weight_kl_sparse_to_dense * kl
        return _taken_back(terms * (weight * run.share))

    def _note(self, terms: Mapping[str, Tensor], site: int) -> None:
        """Keep the terms of a site for the log."""
        for name, term in terms.items():
            self._latest[f"{name}/{self.names[site]}"] = float(term.detach())

    def measured(self) -> dict[str, float]:
        """The terms of the loss in the last step that took them, by site."""
        return dict(self._latest)

    def record(self, validation: Int[Tensor, "seq pos"], batch_size: int) -> dict[str, Any]:
        """The settings, and the losses by site on validation text."""
        losses = self.bridges().losses(validation[:CORPUS_ROWS], batch_size)
        return {"bridges": dict(self.settings), "bridge_losses": asdict(losses)}

    def save(self, folder: Path, record: Mapping[str, Any]) -> None:
        """Write the maps into the folder of the sparse model."""
        facts = {name: record[name] for name in ("bridges", "bridge_losses")}
        self.bridges().with_record(facts).save_maps(folder)

    def bridges(self) -> Bridges:
        """The models and maps as they are now."""
        maps = self.maps.eval()
        return Bridges(self.sparse, self.dense, maps, dense_source=self.dense_source)


def _taken_back(loss: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """A loss whose gradients have been accumulated, without its graph."""
    loss.backward()
    return loss.detach()
