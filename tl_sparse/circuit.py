"""A circuit: the nodes of a model that are kept, and the means at which all others are held."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_sparse.errors import CheckpointError, CircuitError
from tl_sparse.files import read_json, read_tensors, write_json, write_tensors
from tl_sparse.fingerprint import Fingerprint, fingerprint
from tl_sparse.hooks.ablation import ablating
from tl_sparse.hooks.points import TLModel
from tl_sparse.nodes import LOCATION_HOOKS, Node, node_at

FORMAT_VERSION = 1

#: Weight matrices that join node locations of one layer (METHOD §4): parameter, source, target.
#: From the writes to later reads there is no weight: the residual stream joins them.
_EDGES = (
    ("attn.W_Q", "attn_in", "attn_q"),
    ("attn.W_K", "attn_in", "attn_k"),
    ("attn.W_V", "attn_in", "attn_v"),
    ("attn.W_O", "attn_v", "attn_out"),
    ("mlp.W_in", "mlp_in", "mlp_neuron"),
    ("mlp.W_out", "mlp_neuron", "mlp_out"),
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
    """Kept nodes, means, and the model and task they belong to (Gao et al. 2025, section 2.2).

    Attributes:
        kept: hook name → which nodes are kept, in the shape of an activation without batch and position.
        means: hook name → mean activation over the training corpus, in the same shape.
        model: the fingerprint of the model.
        model_name: its name, for people.
        task: the name of the task.
        measured: what was measured of it, as plain JSON values (losses, settings, seeds …).
    """

    kept: Mapping[str, Bool[Tensor, " *node"]]
    means: Mapping[str, Float[Tensor, " *node"]]
    model: Fingerprint
    model_name: str = ""
    task: str = ""
    measured: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kept.keys() != self.means.keys():
            raise CircuitError("kept nodes and means must name the same hook points")
        for name, mask in self.kept.items():
            if mask.dtype != torch.bool or mask.shape != self.means[name].shape:
                raise CircuitError(
                    f"{name}: kept must be a boolean mask of the means' shape {list(self.means[name].shape)}, "
                    f"not {mask.dtype} of {list(mask.shape)}"
                )
            if not bool(self.means[name].isfinite().all()):
                raise CircuitError(f"{name}: a mean is NaN or infinite")

    @property
    def nodes(self) -> list[Node]:
        """The kept nodes, in the order of the forward pass."""
        return [
            node_at(name, int(index)) for name, mask in self.kept.items() for index in mask.flatten().nonzero()[:, 0]
        ]

    @property
    def n_nodes(self) -> int:
        return sum(int(mask.sum()) for mask in self.kept.values())

    def nodes_by_location(self) -> dict[tuple[int, str], list[int]]:
        """(layer, location) → indices of the kept nodes there."""
        grouped: dict[tuple[int, str], list[int]] = {}
        for node in self.nodes:
            grouped.setdefault((node.layer, node.location), []).append(node.index)
        return grouped

    def edges(self, model: TLModel) -> list[Edge]:
        """Every nonzero weight of `model` that joins two kept nodes, in the order of the forward pass.

        Raises:
            CircuitError: if `model` is not this circuit's.
        """
        self.check_model(model)
        parameters, kept = dict(model.named_parameters()), self.nodes_by_location()
        edges = []
        for layer in range(model.cfg.n_layers):
            for name, source, target in _EDGES:
                sources, targets = kept.get((layer, source), []), kept.get((layer, target), [])
                if not sources or not targets:
                    continue
                matrix = _source_by_target(parameters, f"blocks.{layer}.{name}")
                for i, j in matrix[sources][:, targets].nonzero().tolist():
                    ends = Node(layer, source, sources[i]), Node(layer, target, targets[j])
                    edges.append(Edge(*ends, float(matrix[sources[i], targets[j]])))
        return edges

    def check_model(self, model: TLModel) -> None:
        """Raise `CircuitError` if `model` is not the one this circuit was found in."""
        different = self.model.difference(fingerprint(model))
        if different is not None:
            raise CircuitError(
                f"this circuit belongs to the model {self.model_name or self.model.architecture!r}; "
                f"the given one has {different}"
            )

    @contextmanager
    def applied(self, model: TLModel) -> Iterator[None]:
        """Within the context, whatever `model` runs, runs under the circuit: all other nodes at their means.

        Raises:
            CircuitError: if `model` is not this circuit's.
        """
        self.check_model(model)
        with ablating(model, {name: ~mask for name, mask in self.kept.items()}, self.means):
            yield

    @contextmanager
    def ablated(self, model: TLModel) -> Iterator[None]:
        """The inverse of `applied`: the circuit's nodes at their means, all others as they are (necessity)."""
        self.check_model(model)
        with ablating(model, self.kept, self.means):
            yield

    def save(self, folder: str | Path) -> None:
        """Write `circuit.json` and `circuit.safetensors`."""
        folder = Path(folder)
        tensors = {f"kept/{name}": mask for name, mask in self.kept.items()}
        tensors |= {f"mean/{name}": mean for name, mean in self.means.items()}
        write_tensors(folder / "circuit.safetensors", tensors)
        about = {
            "format": "tl_sparse circuit",
            "format_version": FORMAT_VERSION,
            "task": self.task,
            "model_name": self.model_name,
            "model": dataclasses.asdict(self.model),
            "n_nodes": self.n_nodes,
            # A circuit pruned by edges also holds `edge/<parameter>` masks; this version writes none.
            "edge_mask": False,
            "hooks": list(self.kept),
            "measured": self.measured,
        }
        write_json(folder / "circuit.json", about)

    @classmethod
    def load(cls, folder: str | Path) -> Circuit:
        """Read what `save` wrote.

        Raises:
            CheckpointError: if a file is missing, damaged, or of another format or version.
            CircuitError: if the masks and means in it do not fit each other.
        """
        folder = Path(folder)
        path = folder / "circuit.json"
        about = read_json(path)
        if about.get("format") != "tl_sparse circuit":
            raise CheckpointError(f"{path}: format is not 'tl_sparse circuit': this is not a circuit of tl_sparse")
        if about.get("format_version") != FORMAT_VERSION or about.get("edge_mask") is not False:
            raise CheckpointError(f"{path}: this version reads format_version {FORMAT_VERSION} without an edge mask")
        try:
            sketch = {str(name): [float(x) for x in values] for name, values in about["model"]["sketch"].items()}
            model = Fingerprint(str(about["model"]["architecture"]), sketch)
            hooks, texts = list(about["hooks"]), (str(about["model_name"]), str(about["task"]))
            measured = dict(about["measured"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: missing or malformed entry: {error}") from error
        tensors = read_tensors(folder / "circuit.safetensors")
        expected = {f"{kind}/{name}" for kind in ("kept", "mean") for name in hooks}
        if tensors.keys() != expected:
            wrong = ", ".join(sorted(tensors.keys() ^ expected))
            raise CheckpointError(f"{folder / 'circuit.safetensors'}: tensors do not fit circuit.json: {wrong}")
        kept = {name: tensors[f"kept/{name}"] for name in hooks}
        means = {name: tensors[f"mean/{name}"] for name in hooks}
        return cls(kept, means, model, *texts, measured)

    def __repr__(self) -> str:
        counts = ", ".join(
            f"{sum(len(v) for (_, where), v in self.nodes_by_location().items() if where == location)} {location}"
            for location in LOCATION_HOOKS
        )
        return f"Circuit({self.task or 'no task'} in {self.model_name or 'a model'}: {self.n_nodes} nodes: {counts})"


def _source_by_target(parameters: Mapping[str, Tensor], name: str) -> Float[Tensor, "source target"]:
    """A weight as a matrix from source node to target node, positional rows below the others."""
    weight = parameters[name].detach()
    if f"{name}_pos" in parameters:
        weight = torch.cat([weight, parameters[f"{name}_pos"].detach()], dim=-2)
    if weight.ndim == 2:  # W_in, W_out
        return weight
    if name.endswith("W_O"):  # [head, channel, output]
        return weight.flatten(0, 1)
    return weight.transpose(0, 1).flatten(1)  # [head, input, channel]
