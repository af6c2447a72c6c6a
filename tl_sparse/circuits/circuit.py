"""A circuit: the nodes of a model that are kept, and the means at which all others are held."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool
from torch import Tensor

from tl_sparse.checkpoints import card_text, find, push_folder
from tl_sparse.circuits import algebra
from tl_sparse.circuits.edges import bias_at, cutting, edge_shares, edges_between, uncut_edges
from tl_sparse.circuits.exchange import edge_list, read_edge_list, read_openai_circuit
from tl_sparse.circuits.fingerprints import fingerprint
from tl_sparse.circuits.nodes import LOCATIONS, Edge, Node
from tl_sparse.circuits.parts import CircuitParts
from tl_sparse.circuits.storage import read_circuit, write_circuit
from tl_sparse.errors import CircuitError
from tl_sparse.files import write_json
from tl_sparse.hooks import NodeMasks, NodeValues, TLModel, ablating

if TYPE_CHECKING:
    from tl_sparse.view import Page


@dataclass(frozen=True, eq=False)
class Circuit(CircuitParts):
    """Kept nodes, means, and the model and task they belong to (Gao et al. 2025, section 2.2).

    The fields stand in `CircuitParts`, with what they say of the nodes; here is what takes a model,
    makes other circuits, or exchanges them.

    Attributes:
        kept: which nodes are kept, as a mask at each hook point, in the order of the forward pass.
        means: mean activations over the training corpus at these hook points, and at any others: a
            cut edge that leaves a head needs the mean of `hook_z`. Empty if they are not known:
            such a circuit can be looked at, but no model runs under it.
        model: the fingerprint of the model that the circuit was found in.
        model_name: the name of that model.
        task: the name of the task.
        measured: what was measured of it, as plain JSON values: losses, settings, seeds …
        edge_set: source and target of the edges that edge pruning has left. None if edges are not
            pruned: then every nonzero weight between kept nodes is an edge.
        scores: how the search ranked all nodes, the kept ones first, at the same hook points; empty
            if it is not known.
    """

    def __post_init__(self) -> None:
        if self.means and not self.kept.keys() <= self.means.keys():
            missing = sorted(self.kept.keys() - self.means.keys())
            raise CircuitError(f"no means at {', '.join(missing)}")
        if self.scores and self.kept.keys() != self.scores.keys():
            raise CircuitError("kept nodes and scores must name the same hook points")
        for name, mask in self.kept.items():
            mean = self.means[name] if self.means else torch.zeros(mask.shape)
            if mask.dtype != torch.bool or mask.shape != mean.shape:
                raise CircuitError(
                    f"{name}: kept must be a boolean mask of the means' shape {list(mean.shape)}, "
                    f"not {mask.dtype} of {list(mask.shape)}"
                )
            if not bool(mean.isfinite().all()):
                raise CircuitError(f"{name}: a mean is NaN or infinite")

    # Edges, and other weights of the model

    def check_model(self, model: TLModel) -> None:
        """Raise `CircuitError` if `model` is not the one this circuit was found in."""
        difference = self.model.difference(fingerprint(model))
        if difference is not None:
            name = self.model_name or self.model.architecture
            raise CircuitError(
                f"this circuit belongs to the model {name!r}; the given one has {difference}"
            )

    def edges(self, model: TLModel) -> list[Edge]:
        """Every nonzero weight of `model` that joins two kept nodes and is not cut, in the order of
        the forward pass.

        Where several weights join the same two nodes (gated MLPs, grouped queries), each is an
        edge.

        Raises:
            CircuitError: if `model` is not this circuit's, as for `applied` and `ablated`.
        """
        self.check_model(model)
        return uncut_edges(self, model)

    def cut_edges(self, model: TLModel) -> list[Edge]:
        """The nonzero weights between kept nodes that edge pruning has cut."""
        if self.edge_set is None:
            return []
        return [edge for edge in edges_between(self.nodes, model) if edge.ends not in self.edge_set]

    def edge_shares(self, model: TLModel) -> dict[tuple[int, str, str], float]:
        """(layer, source, target) → the share of the nonzero weights there that are edges of this
        circuit.
        """
        return edge_shares(self.edges(model), model)

    def biases(self, model: TLModel) -> dict[Node, float]:
        """The bias of each kept node that edges lead to, where it is not zero: the node's value
        without its edges.
        """
        self.check_model(model)
        biases = {}
        for node in self.nodes:
            bias = bias_at(model, node)
            if bias is not None and bias != 0:
                biases[node] = float(bias)
        return biases

    def sinks(self, model: TLModel) -> dict[tuple[int, int], float]:
        """(layer, head) → the logit of its attention sink, for heads with kept value channels;
        empty for models without sinks.
        """
        self.check_model(model)
        if getattr(model.blocks[0].attn, "sink", None) is None:
            return {}
        heads = set()
        for node in self.nodes:
            if node.location == "attn_v":
                heads.add((node.layer, node.index // model.cfg.d_head))
        sinks = {}
        for layer, head in sorted(heads):
            sinks[layer, head] = model.blocks[layer].attn.sink[head].item()
        return sinks

    # The model under the circuit

    def with_means(self, means: NodeValues) -> Circuit:
        """This circuit with other means: `circuit.with_means(mean_activations(model,
        list(circuit.kept), batches))`.

        Raises:
            CircuitError: if a hook point has no mean, or one of another shape.
        """
        needed = {}
        for name, mean in means.items():
            if name in self.kept or name.endswith(".hook_z"):
                needed[name] = mean
        return replace(self, means=needed)

    def applied(self, model: TLModel) -> AbstractContextManager[None]:
        """Within the context, whatever `model` runs, runs under the circuit: all other nodes are at
        their means, and if the circuit is pruned by edges, what each cut edge contributes is too.
        """
        self.check_model(model)
        return self.holding(model, self.dropped, self.means, self.cut_edges(model))

    def ablated(self, model: TLModel) -> AbstractContextManager[None]:
        """The inverse of `applied`: the circuit's nodes are at their means, all others as they are.
        This shows whether the circuit is necessary.
        """
        self.check_model(model)
        return self.holding(model, self.kept, self.means, ())

    @property
    def dropped(self) -> dict[str, Bool[Tensor, " *node"]]:
        """All nodes but the kept ones."""
        return {name: ~mask for name, mask in self.kept.items()}

    @contextmanager
    def holding(
        self, model: TLModel, nodes: NodeMasks, values: Mapping[str, Tensor], cut: Collection[Edge]
    ) -> Iterator[None]:
        """Within the context, `nodes` are held at `values`, as by `hooks.ablating`, and what the
        edges `cut` contribute is held at its mean. Whether `model` is the circuit's is not checked.
        """
        if not self.means:
            raise CircuitError(
                "this circuit has no means to hold nodes at; circuit.with_means("
                "tl_sparse.hooks.mean_activations(model, list(circuit.kept), batches_of_tokens)) "
                "gives it some"
            )
        with cutting(model, cut, self.means), ablating(model, nodes, values):
            yield

    # Other circuits from this one

    def __or__(self, other: Circuit) -> Circuit:
        """The nodes, and edges, of either circuit.

        Raises:
            CircuitError: if the circuits are of different models, as for & and -.
        """
        return algebra.union(self, other)

    def __and__(self, other: Circuit) -> Circuit:
        """The nodes, and edges, that are in both circuits."""
        return algebra.intersection(self, other)

    def __sub__(self, other: Circuit) -> Circuit:
        """This circuit's nodes that are not in the other, and the edges between them."""
        return algebra.difference(self, other)

    def restricted(self, layers: Collection[int]) -> Circuit:
        """This circuit's nodes in some layers, and the edges between them."""
        return algebra.restricted(self, layers)

    def without(self, parts: Iterable[Node | Edge], model: TLModel) -> Circuit:
        """This circuit without some of its nodes and edges.

        Raises:
            CircuitError: for a node or an edge that it does not have.
        """
        return algebra.without(self, parts, model)

    def of_size(self, n_nodes: int) -> Circuit:
        """The `n_nodes` nodes ranked highest, this circuit's before all others, with all weights
        between them.

        Raises:
            CircuitError: if the ranking is not known, or there are not so many nodes.
        """
        return algebra.of_size(self, n_nodes)

    # Files

    def save(self, folder: str | Path) -> None:
        """Write `circuit.json` and `circuit.safetensors`."""
        write_circuit(Path(folder), self)

    @classmethod
    def load(cls, source: str | Path, revision: str | None = None) -> Circuit:
        """Read what `save` wrote: a folder, or a repository of the Hugging Face hub ("user/repo").

        Raises:
            CheckpointError: if a file is missing, damaged, or of another format or version.
            CircuitError: if the masks and means in it do not fit each other.
        """
        return cls(**vars(read_circuit(find(source, revision))))

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the circuit, as `save` writes it, with a card; returns the repository's address.

        Args:
            repo_id: `"user/repo"`, made if it does not exist; the card in it is replaced.
            options: `private`, `revision`, `token` and `commit_message`; see
                `tl_sparse.checkpoints.push_folder`.

        Raises:
            CheckpointError: if the hub cannot be reached, or refuses.
        """
        return push_folder(repo_id, self.save, self.card, **options)

    def card(self, repo_id: str) -> str:
        """The repository's README.md: what was measured of the circuit, and how to load it."""
        # Above this room: a marked exception, see tests/test_rooms.py.
        from tl_sparse.view import circuit_facts

        return card_text(
            repo_id,
            what="A circuit of a weight-sparse transformer",
            facts=circuit_facts(self),
            load=f'circuit = tl_sparse.Circuit.load("{repo_id}")',
        )

    # Exchange with other tools

    def edge_list(self, model: TLModel) -> dict[str, Any]:
        """The circuit, without its means, as JSON values that any tool can read: names of nodes,
        and edges with weights.

        Raises:
            CircuitError: if `model` is not the circuit's, or the circuit has no mask at one of its
                node locations.
        """
        return edge_list(self, self.edges(model), model)

    def save_edge_list(self, path: str | Path, model: TLModel) -> None:
        """Write `edge_list` as JSON."""
        write_json(Path(path), self.edge_list(model))

    @classmethod
    def from_edge_list(
        cls, path: str | Path, model: TLModel, means: NodeValues | None = None
    ) -> Circuit:
        """Read what `save_edge_list`, or another tool, wrote: the circuit of the `nodes` in an edge
        list, or if it has none, of the ends of its `edges`.

        Lists of other tools need no more than `edges`. Weights may be left out, and nodes may have
        OpenAI's names.

        Raises:
            CheckpointError: if the file is missing, damaged, or not an edge list.
            CircuitError: if a node does not exist, or an edge is not a weight of the model, to 1 %.
        """
        return cls._from_parts(read_edge_list(Path(path), model), means)

    @classmethod
    def from_openai(
        cls, path: str | Path, model: TLModel, means: NodeValues | None = None, task: str = ""
    ) -> Circuit:
        """A circuit that OpenAI published (a `viz_data.pt`, from `viz/` on their public storage).

        Neither means nor the task's name are in the file; without means the circuit can be viewed
        and counted, until `with_means`. Kept entries of `final_resid` are left out, since they are
        not nodes here. `measured["openai"]` has the task losses of the `full` model and the
        `circuit`, `pruning_losses` [step, loss] (all as means over both sides of a pair; the file
        has sums), `num_total_nodes` and `prune_config`, as far as the file has them.

        Raises:
            CheckpointError: if the file is missing, damaged, or not a circuit of OpenAI's.
            CircuitError: if it, or a mean, does not fit the model; the message names the location.
        """
        return cls._from_parts(read_openai_circuit(Path(path), model, task), means)

    @classmethod
    def _from_parts(cls, parts: CircuitParts, means: NodeValues | None) -> Circuit:
        circuit = cls(**vars(parts))
        return circuit if means is None else circuit.with_means(means)

    # For people to read

    def view(self, model: TLModel, *args: Any, **options: Any) -> Page:
        """An interactive page, shown in notebooks, with a `save(path)`; see
        `tl_sparse.view.page_data`.
        """
        # Above this room, as in `card`.
        from tl_sparse.view import Page, page_data

        return Page(page_data(self, model, *args, **options))

    def __repr__(self) -> str:
        task = self.task or "no task"
        model_name = self.model_name or "a model"
        lines = [f"Circuit({task} in {model_name}: {self.n_nodes} nodes"]
        n_nodes_at = Counter(node.location for node in self.nodes)
        if n_nodes_at:
            counts = [f"{n_nodes_at[name]} {name}" for name in LOCATIONS if n_nodes_at[name]]
            lines.append(", ".join(counts))
        if self.edge_set is not None:
            lines.append(f"pruned to {len(self.edge_set)} edges")
        losses = self._measured_losses()
        if losses:
            texts = [f"{name} {loss:.3f}" for name, loss in losses.items()]
            lines.append(f"task loss: {', '.join(texts)}")
        if not self.means:
            lines.append("without means: to be looked at, not run")
        return "\n  ".join(lines) + ")"

    def _measured_losses(self) -> dict[str, float]:
        """The task losses in `measured`, as `prune` or `from_openai` left them there."""
        scores = self.measured.get("heldout", self.measured.get("openai"))
        losses = {}
        if isinstance(scores, Mapping):
            for name, score in scores.items():
                loss = score.get("loss") if isinstance(score, Mapping) else None
                if isinstance(loss, float):
                    losses[name] = loss
        return losses
