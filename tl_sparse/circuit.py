"""A circuit: the nodes of a model that are kept, and the means at which all others are held."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange

from tl_sparse.errors import CheckpointError, CircuitError
from tl_sparse.files import read_json, read_tensors, write_json, write_tensors
from tl_sparse.fingerprint import Fingerprint, fingerprint
from tl_sparse.hooks.ablation import ablating
from tl_sparse.hooks.points import NodeMasks, NodeValues, TLModel
from tl_sparse.nodes import LOCATION_HOOKS, Node, node_at
from tl_sparse.sources import find

if TYPE_CHECKING:
    from tl_sparse.view import Page

FORMAT, FORMAT_VERSION = "tl_sparse circuit", 1
#: Weight matrices that join node locations of one layer (METHOD §4): parameter, source, target, and how the weight
#: becomes a matrix from source to target. From the writes to later reads there is no weight: the residual stream joins
#: them.
_EDGES = (
    ("attn.W_Q", "attn_in", "attn_q", "head source d_head -> source (head d_head)"),
    ("attn.W_K", "attn_in", "attn_k", "head source d_head -> source (head d_head)"),
    ("attn.W_V", "attn_in", "attn_v", "head source d_head -> source (head d_head)"),
    ("attn.W_O", "attn_v", "attn_out", "head d_head target -> (head d_head) target"),
    ("mlp.W_in", "mlp_in", "mlp_neuron", "source target -> source target"),
    ("mlp.W_out", "mlp_neuron", "mlp_out", "source target -> source target"),
)


@dataclass(frozen=True, order=True)
class Edge:
    """A nonzero weight whose input and output nodes are both kept."""

    source: Node
    target: Node
    weight: float

    def __str__(self) -> str:
        return f"{self.source} → {self.target}  {self.weight:+.3f}"


@dataclass(frozen=True, eq=False)
class Circuit:
    """Kept nodes, means, and the model and task they belong to (Gao et al. 2025, section 2.2)."""

    kept: NodeMasks
    means: NodeValues
    """Mean activations over the training corpus, at the same hook points. Empty if they are not known: such a circuit
    can be looked at, but no model runs under it."""
    model: Fingerprint
    model_name: str = ""
    task: str = ""
    measured: dict[str, Any] = field(default_factory=dict)
    """What was measured of it, as plain JSON values: losses, settings, seeds …"""

    def __post_init__(self) -> None:
        if self.means and self.kept.keys() != self.means.keys():
            raise CircuitError("kept nodes and means must name the same hook points")
        for name, mask in self.kept.items():
            mean = self.means[name] if self.means else torch.zeros(mask.shape)
            if mask.dtype != torch.bool or mask.shape != mean.shape:
                expected, found = f"a boolean mask of the means' shape {list(mean.shape)}", list(mask.shape)
                raise CircuitError(f"{name}: kept must be {expected}, not {mask.dtype} of {found}")
            if not bool(mean.isfinite().all()):
                raise CircuitError(f"{name}: a mean is NaN or infinite")

    @property
    def nodes(self) -> list[Node]:
        """The kept nodes, in the order of the forward pass."""
        kept = ((name, mask.flatten().nonzero()[:, 0].tolist()) for name, mask in self.kept.items())
        return [node_at(name, index) for name, indices in kept for index in indices]

    @property
    def n_nodes(self) -> int:
        """How many nodes are kept."""
        return sum(int(mask.sum()) for mask in self.kept.values())

    def nodes_by_location(self) -> dict[tuple[int, str], list[int]]:
        """(layer, location) → indices of the kept nodes there."""
        groups = itertools.groupby(self.nodes, key=lambda node: (node.layer, node.location))
        return {place: [node.index for node in nodes] for place, nodes in groups}

    def edges(self, model: TLModel) -> list[Edge]:
        """Every nonzero weight of `model` that joins two kept nodes, in the order of the forward pass.

        `CircuitError` if `model` is not this circuit's, as for `applied` and `ablated`.
        """
        self.check_model(model)
        parameters, kept, edges = dict(model.named_parameters()), self.nodes_by_location(), []
        for layer, (name, source, target, pattern) in itertools.product(range(model.cfg.n_layers), _EDGES):
            sources, targets = kept.get((layer, source), []), kept.get((layer, target), [])
            if not sources or not targets:
                continue
            # Positional rows, where there are some, are below the others.
            rows = [parameters[key] for end in ("", "_pos") if (key := f"blocks.{layer}.{name}{end}") in parameters]
            matrix = rearrange(torch.cat(rows, dim=-2).detach(), pattern)
            for i, j in matrix[sources][:, targets].nonzero().tolist():
                ends = Node(layer, source, sources[i]), Node(layer, target, targets[j])
                edges.append(Edge(*ends, float(matrix[sources[i], targets[j]])))
        return edges

    def check_model(self, model: TLModel) -> None:
        """Raise `CircuitError` if `model` is not the one this circuit was found in."""
        if different := self.model.difference(fingerprint(model)):
            name = self.model_name or self.model.architecture
            raise CircuitError(f"this circuit belongs to the model {name!r}; the given one has {different}")

    def with_means(self, means: NodeValues) -> Circuit:
        """This circuit with other means: `circuit.with_means(mean_activations(model, list(circuit.kept), batches))`.

        `CircuitError` if a hook point has no mean, or one of another shape.
        """
        if missing := self.kept.keys() - means.keys():
            raise CircuitError(f"no means at {', '.join(sorted(missing))}")
        return dataclasses.replace(self, means={name: means[name] for name in self.kept})

    def applied(self, model: TLModel) -> AbstractContextManager[None]:
        """Within the context, whatever `model` runs, runs under the circuit: all other nodes at their means."""
        return self._at_means(model, {name: ~mask for name, mask in self.kept.items()})

    def ablated(self, model: TLModel) -> AbstractContextManager[None]:
        """The inverse of `applied`: the circuit's nodes at their means, all others as they are (necessity)."""
        return self._at_means(model, self.kept)

    @contextmanager
    def _at_means(self, model: TLModel, nodes: NodeMasks) -> Iterator[None]:
        self.check_model(model)
        if not self.means:
            call = "circuit.with_means(tl_sparse.hooks.mean_activations(model, list(circuit.kept), batches_of_tokens))"
            raise CircuitError(f"this circuit has no means to hold nodes at; {call} gives it some")
        with ablating(model, nodes, self.means):
            yield

    def save(self, folder: str | Path) -> None:
        """Write `circuit.json` and `circuit.safetensors`."""
        tensors = {f"kept/{name}": mask for name, mask in self.kept.items()}
        tensors |= {f"mean/{name}": mean for name, mean in self.means.items()}
        write_tensors(Path(folder, "circuit.safetensors"), tensors)
        about = {  # a circuit pruned by edges also holds `edge/<parameter>` masks; this version writes none
            "format": FORMAT, "format_version": FORMAT_VERSION, "edge_mask": False,
            "task": self.task, "model_name": self.model_name, "model": dataclasses.asdict(self.model),
            "n_nodes": self.n_nodes, "hooks": list(self.kept), "means": bool(self.means), "measured": self.measured,
        }  # fmt: skip
        write_json(Path(folder, "circuit.json"), about)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the circuit with a card; options and errors are `tl_sparse.hub.push_to_hub`'s."""
        from tl_sparse.hub import push_to_hub

        return push_to_hub(self, repo_id, **options)

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
            raise CheckpointError(f"{path}: format is not {FORMAT!r}: this is not a circuit of tl_sparse")
        if about.get("format_version") != FORMAT_VERSION or about.get("edge_mask") is not False:
            raise CheckpointError(f"{path}: this version reads format_version {FORMAT_VERSION} without an edge mask")
        try:
            sketch = {str(name): [float(x) for x in values] for name, values in about["model"]["sketch"].items()}
            model = Fingerprint(str(about["model"]["architecture"]), sketch)
            hooks, texts = list(about["hooks"]), (str(about["model_name"]), str(about["task"]))
            measured = dict(about["measured"])
            kinds = ("kept", "mean") if about.get("means", True) else ("kept",)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: missing or malformed entry: {error}") from error
        path = folder / "circuit.safetensors"
        tensors = read_tensors(path)
        if wrong := tensors.keys() ^ {f"{kind}/{name}" for kind in kinds for name in hooks}:
            raise CheckpointError(f"{path}: tensors do not fit circuit.json: {', '.join(sorted(wrong))}")
        kept = {name: tensors[f"kept/{name}"] for name in hooks}
        means = {name: tensors[f"mean/{name}"] for name in hooks if "mean" in kinds}
        return cls(kept, means, model, *texts, measured)

    @classmethod
    def from_openai(cls, path: str | Path, model: TLModel, means: NodeValues | None = None, task: str = "") -> Circuit:
        """A circuit that OpenAI published (`viz_data.pt`); see `tl_sparse.exchange.read_openai`."""
        from tl_sparse.exchange import read_openai

        return read_openai(Path(path), model, means, task)

    def view(self, model: TLModel, *args: Any, **options: Any) -> Page:
        """An interactive page, shown in notebooks, with a `save(path)`; see `tl_sparse.view.page_data`."""
        from tl_sparse.view import Page, page_data

        return Page(page_data(self, model, *args, **options))

    def edge_list(self, model: TLModel) -> dict[str, Any]:
        """The circuit as a plain list of nodes and edges; see `tl_sparse.exchange.edge_list`."""
        from tl_sparse.exchange import edge_list

        return edge_list(self, model)

    def save_edge_list(self, path: str | Path, model: TLModel) -> None:
        """Write `edge_list` as JSON."""
        write_json(Path(path), self.edge_list(model))

    @classmethod
    def from_edge_list(cls, path: str | Path, model: TLModel, means: NodeValues | None = None) -> Circuit:
        """Read what `save_edge_list`, or another tool, wrote; see `tl_sparse.exchange.read_edge_list`."""
        from tl_sparse.exchange import read_edge_list

        return read_edge_list(Path(path), model, means)

    def __repr__(self) -> str:
        at = Counter(node.location for node in self.nodes)
        counts = ", ".join(f"{at[location]} {location}" for location in LOCATION_HOOKS if at[location])
        lines = [f"Circuit({self.task or 'no task'} in {self.model_name or 'a model'}: {self.n_nodes} nodes"]
        lines += [counts] if counts else []
        scores = self.measured.get("heldout", self.measured.get("openai"))  # as `prune`, or `from_openai`, left them
        if isinstance(scores, Mapping):
            losses = {name: score.get("loss") for name, score in scores.items() if isinstance(score, Mapping)}
            shown = [f"{name} {loss:.3f}" for name, loss in losses.items() if isinstance(loss, float)]
            lines += ["task loss: " + ", ".join(shown)] if shown else []
        lines += [] if self.means else ["without means: to be looked at, not run"]
        return "\n  ".join(lines) + ")"
