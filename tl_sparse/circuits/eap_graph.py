"""Graphs of components: which heads and MLPs of a model, and which edges between them, are kept.

It is the graph of EAP-IG (Hanna et al. 2024, arXiv 2403.17806) and of the circuit track of MIB
(Mueller et al. 2025, arXiv 2504.13151).
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_sparse.arguments import checked
from tl_sparse.circuits.component_layout import ComponentLayout
from tl_sparse.config import check
from tl_sparse.errors import CircuitError
from tl_sparse.hooks import TLModel

#: What is ranked: edges; components, each with all that it writes; or residual channels of
#: components.
GraphLevel = Literal["edge", "node", "neuron"]
GRAPH_LEVELS: tuple[GraphLevel, ...] = get_args(GraphLevel)


@dataclass(frozen=True, eq=False)  # comparing tensors gives no single truth value
class EapGraph:
    """A graph of components, with scores.

    In a model that runs under the graph, what a source writes reaches a target as it is if their
    edge is in the graph; else the target reads what the source writes on another prompt. Edges
    alone decide what runs; `nodes_in_graph` only says what was meant.

    All tensors have one row for each source of `layout`, and most have one column for each target.

    Attributes:
        layout: the sizes of the model.
        scores: the score of each edge; zero where there is no edge.
        in_graph: which edges are in the graph.
        nodes_in_graph: which sources are in the graph.
        nodes_scores: the score of each source, NaN for one that has not been scored; None if no
            source has.
        neurons_in_graph: which residual channels of what each source writes are in the graph; None
            if all are.
        neurons_scores: the scores of these channels, NaN for one that has not been scored.
    """

    layout: ComponentLayout
    scores: Float[Tensor, "source target"]
    in_graph: Bool[Tensor, "source target"]
    nodes_in_graph: Bool[Tensor, " source"]
    nodes_scores: Float[Tensor, " source"] | None = None
    neurons_in_graph: Bool[Tensor, "source d_model"] | None = None
    neurons_scores: Float[Tensor, "source d_model"] | None = None

    def __post_init__(self) -> None:
        n_sources, n_targets = self.layout.n_sources, self.layout.n_targets
        by_edge = (n_sources, n_targets)
        by_channel = (n_sources, self.layout.d_model)
        _check_tensor("scores", self.scores, by_edge, is_mask=False)
        _check_tensor("in_graph", self.in_graph, by_edge, is_mask=True)
        _check_tensor("nodes_in_graph", self.nodes_in_graph, (n_sources,), is_mask=True)
        if self.nodes_scores is not None:
            _check_tensor("nodes_scores", self.nodes_scores, (n_sources,), is_mask=False)
        if self.neurons_in_graph is not None:
            _check_tensor("neurons_in_graph", self.neurons_in_graph, by_channel, is_mask=True)
        if self.neurons_scores is not None:
            _check_tensor("neurons_scores", self.neurons_scores, by_channel, is_mask=False)
        self._check_values()

    def _check_values(self) -> None:
        wrong = (~self.scores.isfinite()).nonzero()
        if len(wrong):
            source, target = wrong[0].tolist()
            score = float(self.scores[source, target])
            edge = self.layout.edge_name(source, target)
            raise CircuitError(f"the score of {edge} is {score}; it must be a finite number")
        for name in ("nodes_scores", "neurons_scores"):
            scores = getattr(self, name)
            if scores is not None and bool(scores.isinf().any()):
                raise CircuitError(f"{name} must be finite, or NaN for what has not been scored")
        no_edges = (self.in_graph & ~self.layout.real_edges()).nonzero()
        if len(no_edges):
            source, target = no_edges[0].tolist()
            name = self.layout.edge_name(source, target)
            raise CircuitError(f"{name} is in the graph, but a component only reads earlier ones")

    # Making graphs

    @classmethod
    def full(cls, model: TLModel) -> "EapGraph":
        """The graph with all nodes and edges of a model, and scores of zero.

        Raises:
            UnsupportedError: if the model has no MLPs.
        """
        layout = ComponentLayout.of_model(model)
        in_graph = layout.real_edges()
        nodes_in_graph = torch.ones(layout.n_sources, dtype=torch.bool)
        return cls(layout, torch.zeros(in_graph.shape), in_graph, nodes_in_graph)

    def of_edges(self, in_graph: Bool[Tensor, "source target"]) -> "EapGraph":
        """This graph with these edges and the nodes that they join, and with all their channels."""
        return replace(self, in_graph=in_graph, neurons_in_graph=None).connected()

    @checked("level")
    def top(self, n: int, level: GraphLevel = "edge", absolute: bool = True) -> "EapGraph":
        """The graph of what has the highest scores, without what is then not connected.

        Nodes and channels come with all their edges. Those that have not been scored are always in
        the graph, beside the `n`. Of equal scores, the first ones count as higher.

        Args:
            n: how many edges, nodes or channels to choose.
            level: which of them; "neuron" stands for the channels.
            absolute: rank by the absolute values of the scores.

        Raises:
            CircuitError: if there are not so many, or nothing is scored at this level.
            ConfigError: for an unknown `level`.
        """
        check(level in GRAPH_LEVELS, "level", level, f"one of {', '.join(GRAPH_LEVELS)}")
        real = self.layout.real_edges()
        if level == "edge":
            return self.of_edges(_highest(self.scores, real, n, absolute, "edges"))
        scores = self.nodes_scores if level == "node" else self.neurons_scores
        if scores is None:
            raise CircuitError(f"this graph has no {level}s_scores to rank by")
        is_scored = ~scores.isnan()
        chosen = _highest(scores, is_scored, n, absolute, f"{level}s with a score") | ~is_scored
        if level == "node":
            return self.of_edges(real & chosen[:, None])
        nodes = chosen.any(1)
        return replace(self, in_graph=real & nodes[:, None], neurons_in_graph=chosen).connected()

    def n_scored(self, level: GraphLevel = "edge") -> int:
        """How many edges, nodes or channels have scores."""
        if level == "edge":
            return int(self.layout.real_edges().sum())
        scores = self.nodes_scores if level == "node" else self.neurons_scores
        return 0 if scores is None else int((~scores.isnan()).sum())

    def connected(self) -> "EapGraph":
        """The nodes that edges lead to and from, and the edges between them.

        Nothing leads to `input`. This changes nothing in a run: what is left out computes the same
        on both prompts, or is not read.
        """
        in_graph = self.in_graph
        if self.neurons_in_graph is not None:
            in_graph = in_graph & self.neurons_in_graph.any(1, keepdim=True)
        inputs_of = self.layout.inputs_of_sources()
        n_before = -1
        while int(in_graph.sum()) != n_before:
            n_before = int(in_graph.sum())
            is_read = in_graph.any(0)
            has_input = (inputs_of & is_read).any(1)
            has_input[0] = True
            nodes = has_input & in_graph.any(1)
            is_of_node = (inputs_of & nodes[:, None]).any(0)
            is_of_node[self.layout.logits] = True
            in_graph = in_graph & nodes[:, None] & is_of_node
        neurons = self.neurons_in_graph
        if neurons is not None:
            neurons = neurons & nodes[:, None]
        return replace(self, in_graph=in_graph, nodes_in_graph=nodes, neurons_in_graph=neurons)

    # What is in the graph

    @property
    def nodes(self) -> list[str]:
        """The names of the sources in the graph, such as `a0.h1`."""
        names = self.layout.sources
        return [names[i] for i in self.nodes_in_graph.nonzero()[:, 0].tolist()]

    @property
    def edges(self) -> dict[str, float]:
        """The name of each edge in the graph, such as `m0->a1.h2<q>` → its score."""
        sources, targets = self.layout.sources, self.layout.targets
        edges = {}
        for source, target in self.in_graph.nonzero().tolist():
            edges[f"{sources[source]}->{targets[target]}"] = float(self.scores[source, target])
        return edges

    @property
    def n_edges(self) -> int:
        """The number of edges in the graph."""
        return int(self.in_graph.sum())

    @property
    def weighted_edges(self) -> float:
        """The number of edges, each counted as the share of its source's channels in the graph."""
        if self.neurons_in_graph is None:
            return float(self.n_edges)
        shares = self.neurons_in_graph.double().mean(1)
        return float((self.in_graph.sum(1) * shares).sum())

    def check_model(self, model: TLModel) -> None:
        """Raise `CircuitError` if the components of `model` are not those of this graph."""
        expected = ComponentLayout.of_model(model)
        for name, value in self.layout.to_json().items():
            if getattr(expected, name) != value:
                raise CircuitError(
                    f"this graph belongs to a model with {name} = {value}; the given one has "
                    f"{getattr(expected, name)}"
                )

    # Files

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Write the graph as EAP-IG does.

        Args:
            path: the file; it ends in .json or .pt.
            overwrite: whether a file with other contents is replaced.

        Raises:
            ConfigError: for another ending, or if there is a file with other contents and
                `overwrite` is False.
            CheckpointError: if the file cannot be written.
        """
        # Imported here because the reader needs this class.
        from tl_sparse.circuits.eap_files import write_graph

        write_graph(self, Path(path), overwrite)

    @classmethod
    def load(cls, path: str | Path) -> "EapGraph":
        """Read a graph that `save`, EAP-IG or MIB wrote; no code in the file is run.

        What a file leaves out has no score and is not in the graph.

        Raises:
            CheckpointError: if the file is missing, damaged, or not such a graph.
            CircuitError: if a node or edge does not exist, or the score of an edge is not finite.
        """
        from tl_sparse.circuits.eap_files import read_graph

        return read_graph(Path(path))

    def __repr__(self) -> str:
        return (
            f"EapGraph({len(self.nodes)} of {self.layout.n_sources} nodes, {self.n_edges} of "
            f"{self.n_scored()} edges)"
        )


def _check_tensor(name: str, value: object, shape: tuple[int, ...], is_mask: bool) -> None:
    expected = "a boolean tensor" if is_mask else "a float tensor"
    if not isinstance(value, Tensor):
        raise CircuitError(f"{name} must be {expected}, not a {type(value).__name__}")
    has_kind = value.dtype == torch.bool if is_mask else value.is_floating_point()
    if not has_kind or value.shape != shape:
        raise CircuitError(
            f"{name} must be {expected} of {list(shape)}, not {value.dtype} of {list(value.shape)}"
        )


def _highest(
    scores: Float[Tensor, "*shape"], allowed: Bool[Tensor, "*shape"], n: int, absolute: bool,
    what: str,
) -> Bool[Tensor, "*shape"]:  # fmt: skip
    """A mask of the `n` allowed entries with the highest scores."""
    n_allowed = int(allowed.sum())
    if not 0 <= n <= n_allowed:
        raise CircuitError(f"n is {n}; the graph has {n_allowed} {what}")
    candidates: Int[Tensor, " candidate"] = allowed.flatten().nonzero()[:, 0]
    values = scores.flatten()[candidates]
    if absolute:
        values = values.abs()
    order = values.argsort(descending=True, stable=True)
    chosen = torch.zeros(allowed.numel(), dtype=torch.bool)
    chosen[candidates[order[:n]]] = True
    return chosen.view(allowed.shape)
