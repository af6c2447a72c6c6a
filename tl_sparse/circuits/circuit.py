"""A circuit: the nodes of a model that are kept, and the means at which all others are held."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool
from torch import Tensor

from tl_sparse.checkpoints import card_text, find, push_folder
from tl_sparse.circuits.edges import bias_at, cutting
from tl_sparse.circuits.fingerprints import Fingerprint, fingerprint
from tl_sparse.circuits.nodes import KINDS, Edge, Node, node_at, weight_matrices
from tl_sparse.errors import CheckpointError, CircuitError
from tl_sparse.files import read_json, read_tensors, write_json, write_tensors
from tl_sparse.hooks import NodeMasks, NodeValues, TLModel, ablating

if TYPE_CHECKING:
    from tl_sparse.view import Page


FORMAT, FORMAT_VERSION = "tl_sparse circuit", 1


@dataclass(frozen=True, eq=False)
class Circuit:
    """Kept nodes, means, and the model and task they belong to (Gao et al. 2025, section 2.2).

    Attributes:
        means: mean activations over the training corpus at these hook points, and any others: a cut
            edge that leaves a head needs the mean of `hook_z`. Empty if they are not known: such a
            circuit can be looked at, but no model runs under it.
        measured: what was measured of it, as plain JSON values: losses, settings, seeds …
        edge_set: pruned by edges: source and target of those that are left. None: every weight
            between kept nodes is an edge.
        scores: how the search ranked all nodes, the kept ones first, at the same hook points; empty
            if it is not known.
    """

    kept: NodeMasks
    means: NodeValues
    model: Fingerprint
    model_name: str = ""
    task: str = ""
    measured: dict[str, Any] = field(default_factory=dict)
    edge_set: frozenset[tuple[Node, Node]] | None = None
    scores: NodeValues = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.means and not self.kept.keys() <= self.means.keys():
            raise CircuitError(
                f"no means at {', '.join(sorted(self.kept.keys() - self.means.keys()))}"
            )
        if self.scores and self.kept.keys() != self.scores.keys():
            raise CircuitError("kept nodes and scores must name the same hook points")
        for name, mask in self.kept.items():
            mean = self.means[name] if self.means else torch.zeros(mask.shape)
            if mask.dtype != torch.bool or mask.shape != mean.shape:
                expected, found = (
                    f"a boolean mask of the means' shape {list(mean.shape)}",
                    list(mask.shape),
                )
                raise CircuitError(f"{name}: kept must be {expected}, not {mask.dtype} of {found}")
            if not bool(mean.isfinite().all()):
                raise CircuitError(f"{name}: a mean is NaN or infinite")

    @property
    def nodes(self) -> list[Node]:
        """The kept nodes, in the order of the forward pass."""
        kept = ((name, mask.flatten().nonzero()[:, 0].tolist()) for name, mask in self.kept.items())
        return [node_at(name, index) for name, indices in kept for index in indices]

    @property
    def hooks(self) -> dict[tuple[int, str], str]:
        """(layer, location) → the hook point there."""
        return {
            (first.layer, first.location): name for name in self.kept if (first := node_at(name, 0))
        }

    @property
    def n_nodes(self) -> int:
        """How many nodes are kept."""
        return sum(int(mask.sum()) for mask in self.kept.values())

    @property
    def n_candidates(self) -> int:
        """How many nodes there are to keep or to hold."""
        return sum(mask.numel() for mask in self.kept.values())

    def nodes_by_location(self) -> dict[tuple[int, str], list[int]]:
        """(layer, location) → indices of the kept nodes there."""
        groups = itertools.groupby(self.nodes, key=lambda node: (node.layer, node.location))
        return {place: [node.index for node in nodes] for place, nodes in groups}

    def edges(self, model: TLModel) -> list[Edge]:
        """Every nonzero weight of `model` that joins two kept nodes and is not cut, in the order of
        the forward pass.

        Where several weights join the same two nodes (gated MLPs, grouped queries), each is an
        edge. `CircuitError` if `model` is not this circuit's, as for `applied` and `ablated`.
        """
        self.check_model(model)
        return self._left(model)

    def _left(self, model: TLModel) -> list[Edge]:
        left = self.edge_set
        return [
            edge
            for edge in self._weights(model)
            if left is None or (edge.source, edge.target) in left
        ]

    def _weights(self, model: TLModel) -> list[Edge]:
        """The edges, and those that are cut."""
        kept, edges = self.nodes_by_location(), []
        joined = (
            (layer, *found)
            for layer in range(model.cfg.n_layers)
            for found in weight_matrices(model, layer)
        )
        for layer, source, target, matrix in joined:
            sources, targets = kept.get((layer, source), []), kept.get((layer, target), [])
            for i, j in matrix[sources][:, targets].nonzero().tolist():
                ends = Node(layer, source, sources[i]), Node(layer, target, targets[j])
                edges.append(Edge(*ends, float(matrix[sources[i], targets[j]])))
        return edges

    def biases(self, model: TLModel) -> dict[Node, float]:
        """The bias of each kept node that edges lead to, where it is not zero: what it is without
        its edges.
        """
        self.check_model(model)
        found = ((node, bias_at(model, node)) for node in self.nodes)
        return {node: float(bias) for node, bias in found if bias is not None and bias}

    def sinks(self, model: TLModel) -> dict[tuple[int, int], float]:
        """(layer, head) → the logit of its sink, of heads with kept value channels; empty for
        models without sinks.
        """
        self.check_model(model)
        heads = sorted(
            {(n.layer, n.index // model.cfg.d_head) for n in self.nodes if n.location == "attn_v"}
        )
        if getattr(model.blocks[0].attn, "sink", None) is None:
            return {}
        return {(layer, head): model.blocks[layer].attn.sink[head].item() for layer, head in heads}

    def edge_shares(self, model: TLModel) -> dict[tuple[int, str, str], float]:
        """(layer, source, target) → the share of that matrix' nonzero weights that are edges of
        this circuit.
        """
        used = Counter(
            (e.source.layer, e.source.location, e.target.location) for e in self.edges(model)
        )
        total = Counter[tuple[int, str, str]]()
        for layer in range(model.cfg.n_layers):
            for source, target, matrix in weight_matrices(model, layer):
                total[layer, source, target] += int(matrix.count_nonzero())
        return {place: used[place] / max(1, n_weights) for place, n_weights in total.items()}

    def check_model(self, model: TLModel) -> None:
        """Raise `CircuitError` if `model` is not the one this circuit was found in."""
        if different := self.model.difference(fingerprint(model)):
            name = self.model_name or self.model.architecture
            raise CircuitError(
                f"this circuit belongs to the model {name!r}; the given one has {different}"
            )

    def with_means(self, means: NodeValues) -> Circuit:
        """This circuit with other means: `circuit.with_means(mean_activations(model,
        list(circuit.means), batches))`.

        `CircuitError` if a hook point has no mean, or one of another shape.
        """
        known = {
            name: mean
            for name, mean in means.items()
            if name in self.kept or name.endswith(".hook_z")
        }
        return replace(self, means=known)

    def applied(self, model: TLModel) -> AbstractContextManager[None]:
        """Within the context, whatever `model` runs, runs under the circuit: all other nodes at
        their means.

        So is what each cut edge contributes, if the circuit is pruned by edges.
        """
        self.check_model(model)
        return self.holding(model, self.dropped, self.means, self.cut_edges(model))

    def ablated(self, model: TLModel) -> AbstractContextManager[None]:
        """The inverse of `applied`: the circuit's nodes at their means, all others as they are
        (necessity).
        """
        self.check_model(model)
        return self.holding(model, self.kept, self.means, ())

    @property
    def dropped(self) -> dict[str, Bool[Tensor, " *node"]]:
        """All nodes but the kept ones."""
        return {name: ~mask for name, mask in self.kept.items()}

    def cut_edges(self, model: TLModel) -> list[Edge]:
        """The nonzero weights between kept nodes that edge pruning has cut."""
        left = self.edge_set
        return (
            []
            if left is None
            else [e for e in self._weights(model) if (e.source, e.target) not in left]
        )

    @contextmanager
    def holding(
        self, model: TLModel, nodes: NodeMasks, values: Mapping[str, Tensor], cut: Collection[Edge]
    ) -> Iterator[None]:
        """Within the context, `nodes` are held at `values`, as by `hooks.ablating`, and what the
        edges `cut` contribute at its mean. Whether `model` is the circuit's is not checked."""
        if not self.means:
            call = "circuit.with_means(tl_sparse.hooks.mean_activations(model, list(circuit.kept), batches_of_tokens))"
            raise CircuitError(f"this circuit has no means to hold nodes at; {call} gives it some")
        with cutting(model, cut, self.means), ablating(model, nodes, values):
            yield

    # --- other circuits from this one
    # -------------------------------------------------------------------------

    def __or__(self, other: Circuit) -> Circuit:
        """The nodes, and edges, of either circuit. `CircuitError` if they are of different models,
        as for & and -.
        """
        both = self.edge_set is not None and other.edge_set is not None
        edges = (
            frozenset.union(self.edge_set or frozenset(), other.edge_set or frozenset())
            if both
            else None
        )
        return self._combined(other, "|", torch.Tensor.logical_or, edges)

    def __and__(self, other: Circuit) -> Circuit:
        """The nodes, and edges, that are in both circuits."""
        edge_sets = [edges for edges in (self.edge_set, other.edge_set) if edges is not None]
        edges = frozenset.intersection(*edge_sets) if edge_sets else None
        return self._combined(other, "&", torch.Tensor.logical_and, edges)

    def __sub__(self, other: Circuit) -> Circuit:
        """This circuit's nodes that are not in the other, and the edges between them."""
        return self._combined(other, "-", lambda ours, theirs: ours & ~theirs, self.edge_set)

    def _combined(self, other: Circuit, sign: str, combine: Any, edges: Any) -> Circuit:
        if different := self.model.difference(other.model):
            raise CircuitError(
                f"circuits of different models have no {sign}: the second one's has {different}"
            )
        if self.kept.keys() != other.kept.keys():
            raise CircuitError(f"circuits over different hook points have no {sign}")
        kept = {name: combine(mask, other.kept[name]) for name, mask in self.kept.items()}
        return self._with(
            kept, f"({self.task} {sign} {other.task})", None if edges is None else frozenset(edges)
        )

    def restricted(self, layers: Collection[int]) -> Circuit:
        """This circuit's nodes in some layers, and the edges between them."""
        kept = {name: mask & (node_at(name, 0).layer in layers) for name, mask in self.kept.items()}
        return self._with(kept, self.task, self.edge_set)

    def without(self, parts: Iterable[Node | Edge], model: TLModel) -> Circuit:
        """This circuit without some of its nodes and edges; `CircuitError` for one that it does not
        have.
        """
        kept, cut = {name: mask.clone() for name, mask in self.kept.items()}, set()
        hooks, nodes = self.hooks, set(self.nodes)
        for part in parts:
            ends = (part.source, part.target) if isinstance(part, Edge) else (part,)
            if not nodes.issuperset(ends):
                raise CircuitError(f"{part} is not in this circuit")
            if isinstance(part, Edge):
                cut.add((part.source, part.target))
            else:
                kept[hooks[part.layer, part.location]].view(-1)[part.index] = False
        edge_set = (
            frozenset((e.source, e.target) for e in self._left(model)) - cut
            if cut
            else self.edge_set
        )
        return self._with(kept, self.task, edge_set)

    def of_size(self, n_nodes: int) -> Circuit:
        """The `n_nodes` nodes ranked highest, this circuit's before all others, with all weights
        between them.

        `CircuitError` if the ranking is not known, or there are not so many nodes.
        """
        total = self.n_candidates
        if not self.scores or not 0 <= n_nodes <= total:
            raise CircuitError(
                f"n_nodes = {n_nodes}; it must be in [0, {total}], of a circuit that has scores"
            )
        flat = torch.cat([score.flatten() for score in self.scores.values()])
        order = flat.argsort(descending=True, stable=True)
        kept = torch.cat([self.kept[name].flatten() for name in self.scores])
        rank = order[
            kept[order].logical_not().argsort(stable=True)
        ].argsort()  # also where nodes were dropped later
        parts = (rank < n_nodes).split([score.numel() for score in self.scores.values()])
        largest = {
            n: p.view(score.shape) for (n, score), p in zip(self.scores.items(), parts, strict=True)
        }
        return self._with(largest, self.task, None)

    def _with(
        self, kept: NodeMasks, task: str, edge_set: frozenset[tuple[Node, Node]] | None
    ) -> Circuit:
        circuit = replace(self, kept=kept, task=task, edge_set=None, measured={})
        if edge_set is None:
            return circuit
        nodes = set(circuit.nodes)  # edges go with their nodes
        return replace(circuit, edge_set=frozenset(e for e in edge_set if nodes.issuperset(e)))

    # --- files
    # ------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write `circuit.json` and `circuit.safetensors`."""
        tensors = {f"kept/{name}": mask for name, mask in self.kept.items()}
        tensors |= {f"mean/{name}": mean for name, mean in self.means.items()}
        tensors |= {f"score/{name}": score for name, score in self.scores.items()}
        write_tensors(Path(folder, "circuit.safetensors"), tensors)
        edges = (
            None if self.edge_set is None else [[str(a), str(b)] for a, b in sorted(self.edge_set)]
        )
        about = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "task": self.task,
            "model_name": self.model_name,
            "model": asdict(self.model),
            "n_nodes": self.n_nodes,
            "hooks": list(self.kept),
            "means": bool(self.means),
            "scores": bool(self.scores),
            "edge_mask": edges is not None,
            "edges": edges,
            "measured": self.measured,
        }
        write_json(Path(folder, "circuit.json"), about)

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
        """The README.md of the circuit's repository: what was measured of it, and how to load
        it.
        """
        from tl_sparse.view import (
            circuit_facts,
        )  # above this room: a marked exception, see tests/test_rooms.py

        return card_text(
            repo_id,
            what="A circuit of a weight-sparse transformer",
            facts=circuit_facts(self),
            load=f'circuit = tl_sparse.Circuit.load("{repo_id}")',
        )

    @classmethod
    def load(cls, source: str | Path, revision: str | None = None) -> Circuit:
        """Read what `save` wrote: a folder, or a repository of the Hugging Face hub ("user/repo").

        Raises:
            CheckpointError: if a file is missing, damaged, or of another format or version.
            CircuitError: if the masks and means in it do not fit each other.
        """
        folder = find(source, revision)
        path = folder / "circuit.json"
        about = read_json(path)
        if about.get("format") != FORMAT:
            raise CheckpointError(
                f"{path}: format is not {FORMAT!r}: this is not a circuit of tl_sparse"
            )
        if about.get("format_version") != FORMAT_VERSION:
            raise CheckpointError(f"{path}: this version reads format_version {FORMAT_VERSION}")
        try:
            sketch = {
                str(name): [float(x) for x in values]
                for name, values in about["model"]["sketch"].items()
            }
            model = Fingerprint(str(about["model"]["architecture"]), sketch)
            hooks, texts = list(about["hooks"]), (str(about["model_name"]), str(about["task"]))
            measured = dict(about["measured"])
            kinds = (
                ["kept"]
                + ["mean"] * about.get("means", True)
                + ["score"] * about.get("scores", False)
            )
            pairs = (
                [(Node.parse(a), Node.parse(b)) for a, b in about["edges"]]
                if about["edge_mask"]
                else None
            )
        except (AttributeError, CircuitError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: missing or malformed entry: {error}") from error
        path = folder / "circuit.safetensors"
        tensors = read_tensors(path)
        further = {
            name for name in tensors if name.startswith("mean/") and name.endswith(".hook_z")
        }
        if wrong := (tensors.keys() - further) ^ {
            f"{kind}/{name}" for kind in kinds for name in hooks
        }:
            raise CheckpointError(
                f"{path}: tensors do not fit circuit.json: {', '.join(sorted(wrong))}"
            )
        kept, means, scores = (
            {name: tensors[f"{kind}/{name}"] for name in hooks if kind in kinds}
            for kind in ("kept", "mean", "score")
        )
        means |= {name.removeprefix("mean/"): tensors[name] for name in further}
        edges = None if pairs is None else frozenset(pairs)
        return cls(kept, means, model, *texts, measured, edges, scores)

    @classmethod
    def from_openai(
        cls, path: str | Path, model: TLModel, means: NodeValues | None = None, task: str = ""
    ) -> Circuit:
        """A circuit that OpenAI published (`viz_data.pt`); see `tl_sparse.circuits.read_openai`."""
        from tl_sparse.circuits.exchange import read_openai

        return read_openai(Path(path), model, means, task)

    def view(self, model: TLModel, *args: Any, **options: Any) -> Page:
        """An interactive page, shown in notebooks, with a `save(path)`; see
        `tl_sparse.view.page_data`.
        """
        from tl_sparse.view import Page, page_data  # above this room, as in `card`

        return Page(page_data(self, model, *args, **options))

    def edge_list(self, model: TLModel) -> dict[str, Any]:
        """The circuit as a plain list of nodes and edges; see `tl_sparse.circuits.edge_list`."""
        from tl_sparse.circuits.exchange import edge_list

        return edge_list(self, model)

    def save_edge_list(self, path: str | Path, model: TLModel) -> None:
        """Write `edge_list` as JSON."""
        write_json(Path(path), self.edge_list(model))

    @classmethod
    def from_edge_list(
        cls, path: str | Path, model: TLModel, means: NodeValues | None = None
    ) -> Circuit:
        """Read what `save_edge_list`, or another tool, wrote; see
        `tl_sparse.circuits.read_edge_list`.
        """
        from tl_sparse.circuits.exchange import read_edge_list

        return read_edge_list(Path(path), model, means)

    def __repr__(self) -> str:
        at = Counter(node.location for node in self.nodes)
        counts = ", ".join(f"{at[location]} {location}" for location in KINDS if at[location])
        lines = [
            f"Circuit({self.task or 'no task'} in {self.model_name or 'a model'}: {self.n_nodes} nodes"
        ]
        lines += [counts] if counts else []
        lines += [] if self.edge_set is None else [f"pruned to {len(self.edge_set)} edges"]
        scores = self.measured.get(
            "heldout", self.measured.get("openai")
        )  # as `prune`, or `from_openai`, left them
        if isinstance(scores, Mapping):
            losses = {
                name: score.get("loss")
                for name, score in scores.items()
                if isinstance(score, Mapping)
            }
            shown = [
                f"{name} {loss:.3f}" for name, loss in losses.items() if isinstance(loss, float)
            ]
            lines += ["task loss: " + ", ".join(shown)] if shown else []
        lines += [] if self.means else ["without means: to be looked at, not run"]
        return "\n  ".join(lines) + ")"
