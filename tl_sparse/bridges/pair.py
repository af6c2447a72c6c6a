"""`Bridges`: a dense model, a sparse model, and the maps between their residual streams."""

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_sparse.bridges.carrying import (
    Change,
    NodeChange,
    adding,
    are_reads,
    change_of_reads,
    change_of_stream,
    default_site,
)
from tl_sparse.bridges.fit import check_maps_fit, check_models_fit
from tl_sparse.bridges.losses import BridgeLosses, SiteLosses, Target, mean_losses, nmse
from tl_sparse.bridges.maps import Maps
from tl_sparse.bridges.sites import site_names, site_number
from tl_sparse.bridges.storage import write_maps
from tl_sparse.bridges.streams import Streams, continued, run_with_streams
from tl_sparse.checkpoints import card_text, push_folder
from tl_sparse.circuits import Circuit, hash_of_model
from tl_sparse.config import check
from tl_sparse.errors import ConfigError, DataError
from tl_sparse.files import write_json
from tl_sparse.hooks import TLModel, tokens_for
from tl_sparse.precision import in_float32
from tl_sparse.records import record_from
from tl_sparse.training import next_token_loss

#: From which model to which: the first part of a hybrid run is the first model's.
Direction = Literal["dense_to_sparse", "sparse_to_dense"]


@dataclass(frozen=True, eq=False)
class Bridges:
    """A frozen dense model, a sparse model of as many layers, and the maps between their streams.

    A site is named by its hook point: `blocks.0.hook_resid_pre`, `blocks.i.hook_resid_mid` or
    `blocks.i.hook_resid_post`; `blocks.i.hook_resid_pre` is the same site as
    `blocks.{i-1}.hook_resid_post` (Gao et al. 2025, section 2.3).

    Attributes:
        sparse: the sparse model, one of this package.
        dense: the dense model, any TransformerLens model.
        maps: the encoders and decoders by site.
        record: what is known of them, as JSON values: settings, and losses by site.
        dense_source: the folder or name from which the dense model was opened, by which
            `load_bridges` finds it again; "" if it is not known.

    Raises:
        BridgeError: if the models do not fit each other or the maps.
        UnsupportedError: if a model has no stream between attention and MLP.
    """

    sparse: TLModel
    dense: TLModel
    maps: Maps
    record: Mapping[str, Any] = field(default_factory=dict)
    dense_source: str = ""

    def __post_init__(self) -> None:
        check_models_fit(self.dense, self.sparse)
        check_maps_fit(self.maps, self.dense, self.sparse)

    @property
    def sites(self) -> list[str]:
        """The hook points of all sites, in the order of the forward pass."""
        return site_names(self.sparse.cfg.n_layers)

    def encode(
        self, site: str, dense_resid: Float[Tensor, "*batch d_dense"]
    ) -> Float[Tensor, "*batch d_sparse"]:
        """The dense model's stream at a site in terms of the sparse one.

        Raises:
            HookNameError: if there is no such site.
            DataError: if the stream has another width.
        """
        maps = self.maps[self._number(site)]
        encoded: Tensor = maps.encoder(_stream(dense_resid, maps.encoder.linear))
        return encoded

    def decode(
        self, site: str, sparse_resid: Float[Tensor, "*batch d_sparse"]
    ) -> Float[Tensor, "*batch d_dense"]:
        """The sparse model's stream at a site in terms of the dense one; errors as for `encode`.

        In a model with AbsTopK on the stream itself, this is the stream before it.
        """
        decoder = self.maps[self._number(site)].decoder
        decoded: Tensor = decoder(_stream(sparse_resid, decoder))
        return decoded

    def hybrid(
        self, tokens: Int[Tensor, "batch pos"], site: str, direction: Direction
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """The logits of one model up to a site, and of the other from there on.

        Args:
            tokens: the tokens.
            site: where the stream of the first model is translated.
            direction: "dense_to_sparse" starts with the dense model and ends with the sparse one,
                "sparse_to_dense" the other way round.

        Raises:
            ConfigError: for another direction.
            HookNameError: if there is no such site.
            DataError: if the tokens are not those of the models.
        """
        directions = get_args(Direction)
        check(direction in directions, "direction", direction, f"one of {', '.join(directions)}")
        number = self._number(site)
        tokens = self._tokens(tokens)
        if direction == "dense_to_sparse":
            stream = run_with_streams(self.dense, tokens).read[number]
            return self.sparse_from(tokens, number, self.encode(site, stream))
        stream = run_with_streams(self.sparse, tokens).written[number]
        return self.dense_from(tokens, number, self.decode(site, stream))

    def sparse_from(
        self,
        tokens: Int[Tensor, "batch pos"],
        number: int,
        stream: Float[Tensor, "batch pos d_sparse"],
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """The logits of the sparse model that goes on from a stream at site number `number`."""
        return continued(self.sparse, tokens, number, stream.to(_dtype(self.sparse)))

    def dense_from(
        self,
        tokens: Int[Tensor, "batch pos"],
        number: int,
        stream: Float[Tensor, "batch pos d_dense"],
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """The logits of the dense model that goes on from a stream at site number `number`."""
        return continued(self.dense, tokens, number, stream.to(_dtype(self.dense)))

    @contextmanager
    def carried(
        self,
        change: Change,
        tokens: Int[Tensor, "batch pos"],
        site: str | None = None,
        strength: float = 1.0,
    ) -> Iterator[Float[Tensor, "batch pos d_dense"]]:
        """Within the context, a change of the sparse model also acts in the dense model.

        The sparse model is run on the tokens, as it is and with the change. The difference of its
        streams at the site is decoded and added to the dense model's stream, in every run on tokens
        of this shape, so that any TransformerLens call can be made on the dense model: patching,
        caching, attribution. Nodes that attention or an MLP reads from the stream (`attn_in`,
        `mlp_in`) are carried to the site where they are read (sections 3.3 and A.4).

        Args:
            change: nodes with other values, a circuit under which the sparse model runs, or any
                context of hooks on the sparse model.
            tokens: the tokens on which the dense model will be run.
            site: where the change is carried over. None means the first site that sees the whole
                change; for a circuit, that is the last one. Contexts of hooks need a site.
            strength: what the difference is multiplied by; between 0 and 1, the change is partial.

        Returns:
            A context that yields what is added to the dense stream.

        Raises:
            ConfigError: if there is no site for a context of hooks, or `strength` is not finite.
            HookNameError: if there is no such site.
            CircuitError: if a circuit belongs to another model, or a node does not exist.
            DataError: if the tokens are not those of the models.
        """
        check(math.isfinite(strength), "strength", strength, "a finite number")
        tokens = self._tokens(tokens)
        if site is not None:
            number = self._number(site)
        elif isinstance(change, NodeChange | Circuit):
            number = default_site(self.sparse, change)
        else:
            raise ConfigError("site must name a site for a context of hooks, whose nodes it hides")
        if site is None and isinstance(change, NodeChange) and are_reads(change):
            difference = change_of_reads(self, change, tokens)
        else:
            difference = change_of_stream(self, change, tokens, number)
        with adding(self.dense, number, strength * difference):
            yield strength * difference

    @torch.no_grad()
    def encoded(
        self, tokens: Int[Tensor, "batch pos"]
    ) -> dict[str, Float[Tensor, "batch pos d_sparse"]]:
        """The dense model's stream on these tokens in terms of the sparse one, at every site.

        Raises:
            DataError: if the tokens are not those of the models.
        """
        streams = run_with_streams(self.dense, self._tokens(tokens)).read
        return {
            site: self.encode(site, stream)
            for site, stream in zip(self.sites, streams, strict=True)
        }

    @torch.no_grad()
    def losses(self, tokens: Int[Tensor, "seq pos"], batch_size: int = 16) -> BridgeLosses:
        """What the models and the maps lose on rows of tokens: the terms of section A.3, by site.

        Args:
            tokens: rows of at least two tokens.
            batch_size: the number of rows that are computed at once. The normalised squared errors
                depend on it a little, since they compare with the mean stream of a batch.

        Raises:
            DataError: if the tokens are not those of the models.
            ConfigError: if `batch_size` is not an integer of at least 1.
        """
        is_positive = type(batch_size) is int and batch_size >= 1
        check(is_positive, "batch_size", batch_size, "an integer of at least 1")
        tokens = self._tokens(tokens)
        if tokens.shape[1] < 2:
            raise DataError("tokens must have at least two positions, so that there is a next one")
        parts = []
        weights = []
        for rows in tokens.split(batch_size):
            parts.append(self._losses_of_batch(rows))
            weights.append(len(rows))
        return mean_losses(parts, weights)

    def _losses_of_batch(self, tokens: Int[Tensor, "batch pos"]) -> BridgeLosses:
        dense = run_with_streams(self.dense, tokens)
        sparse = run_with_streams(self.sparse, tokens)
        target = Target.of(in_float32(dense.logits))
        sites = []
        for number, name in enumerate(self.sites):
            sites.append(self._losses_of_site(number, name, tokens, dense, sparse, target))
        return BridgeLosses(
            ce_dense=float(next_token_loss(in_float32(dense.logits), tokens)),
            ce_sparse=float(next_token_loss(in_float32(sparse.logits), tokens)),
            kl_sparse=float(target.kl(in_float32(sparse.logits))),
            sites=sites,
        )

    def _losses_of_site(
        self,
        number: int,
        name: str,
        tokens: Int[Tensor, "batch pos"],
        dense: Streams,
        sparse: Streams,
        target: Target,
    ) -> SiteLosses:
        encoded = self.encode(name, dense.read[number])
        decoded = self.decode(name, sparse.written[number])
        to_sparse = self.sparse_from(tokens, number, encoded)
        to_dense = self.dense_from(tokens, number, decoded)
        return SiteLosses(
            site=name,
            nmse_encoder=float(nmse(encoded, sparse.read[number])),
            nmse_decoder=float(nmse(decoded, dense.read[number])),
            kl_dense_to_sparse=float(target.kl(in_float32(to_sparse))),
            kl_sparse_to_dense=float(target.kl(in_float32(to_dense))),
        )

    def save_pretrained(self, folder: str | Path, overwrite: bool = False) -> None:
        """Write the sparse model and the maps; `tl_sparse.load_bridges` reads them.

        The dense model is not written, only where it was opened and a hash of its weights.
        `tl_sparse.load` opens the sparse model in the folder alone.

        Raises:
            CheckpointError: if the folder cannot be written to.
            ConfigError: if it holds another model, and `overwrite` is False.
        """
        self.sparse.save_pretrained(folder, overwrite=overwrite)
        self.save_maps(Path(folder))

    def save_maps(self, folder: Path, is_local: bool = True) -> None:
        """Write the maps beside their sparse model, whose folder this is.

        Args:
            folder: the folder.
            is_local: whether it stays on this machine, where the folder of a dense model can be
                found again.
        """
        name = str(getattr(self.dense.cfg, "model_name", ""))
        source = self.dense_source or name
        if os.path.isdir(source):
            source = str(Path(source).resolve()) if is_local else name
        dense = {"source": source, "hash": hash_of_model(self.dense)}
        write_maps(folder, self.maps, dense, self.record)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the sparse model and the maps, with a card that shows the losses by site.

        Args:
            repo_id: `"user/repo"`, created if it does not exist; the card in it is replaced.
            options: `private`, `revision`, `token` and `commit_message`; see
                `tl_sparse.checkpoints.push_folder`.

        Returns:
            The repository's address.

        Raises:
            CheckpointError: if the hub cannot be reached or refuses the upload.
        """

        def write(folder: Path) -> None:
            self.sparse.save_pretrained(folder)
            self.save_maps(folder, is_local=False)
            if self.record:
                write_json(folder / "training.json", self.record)

        return push_folder(repo_id, write, self.card, **options)

    def card(self, repo_id: str) -> str:
        """The README.md for the repository of these bridges; see `push_to_hub`."""
        return card_text(
            repo_id,
            what="A weight-sparse transformer with bridges to a dense one",
            facts=self.facts(),
            load=f'bridges = tl_sparse.load_bridges("{repo_id}")',
            pipeline_tag="text-generation",
        )

    def facts(self) -> str:
        """The models, the maps and their losses by site, as several lines of text."""
        name = getattr(self.dense.cfg, "model_name", "") or "a model without a name"
        encoders: str = self.maps.kind
        if encoders == "abs_topk":
            encoders += f", fraction kept {self.maps.fraction:g}"
        lines = [
            f"sparse: {self.sparse!r}",
            f"dense: {name}, {self.maps.d_dense} wide",
            f"bridges at {len(self.maps)} sites; encoders: {encoders}",
        ]
        if "command" in self.record:
            lines.append(f"trained by: {self.record['command']}")
        losses = self.recorded_losses()
        if losses is not None:
            lines += ["", "On validation text, in nats per token:", str(losses)]
        return "\n".join(lines)

    def recorded_losses(self) -> BridgeLosses | None:
        """The losses on the validation text of the training; None if they are not known."""
        values = self.record.get("bridge_losses")
        return record_from(BridgeLosses, values) if values else None

    def with_record(self, record: Mapping[str, Any]) -> "Bridges":
        """The same models and maps with other facts about them."""
        return replace(self, record=record)

    def __repr__(self) -> str:
        return f"Bridges({len(self.maps)} sites, d_dense {self.maps.d_dense}, {self.sparse!r})"

    def _number(self, site: str) -> int:
        return site_number(site, self.sparse.cfg.n_layers)

    def _tokens(self, tokens: Any) -> Int[Tensor, "batch pos"]:
        device = next(self.sparse.parameters()).device
        return tokens_for(self.sparse, tokens).to(device)


def _stream(resid: Tensor, linear: torch.nn.Linear) -> Tensor:
    """A stream in the dtype of a map and on its device.

    Raises:
        DataError: if it has another width.
    """
    width = linear.in_features
    if not isinstance(resid, Tensor) or not resid.is_floating_point() or resid.ndim == 0:
        raise DataError(f"a stream must be a tensor of floats [..., {width}]")
    if resid.shape[-1] != width:
        raise DataError(f"the stream must be {width} wide, not {resid.shape[-1]}")
    return resid.to(linear.weight)


def _dtype(model: TLModel) -> torch.dtype:
    dtype: torch.dtype = next(model.parameters()).dtype
    return dtype
