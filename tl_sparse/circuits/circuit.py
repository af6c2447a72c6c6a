"""A circuit: the nodes of a model that are kept, and the means at which all others are held."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tl_sparse.checkpoints import card_text, find, push_folder
from tl_sparse.circuits import algebra
from tl_sparse.circuits.description import described
from tl_sparse.circuits.eap_circuits import EdgeScoring, circuit_of_graph, graph_of_circuit
from tl_sparse.circuits.eap_graph import EapGraph
from tl_sparse.circuits.edges import (
    bias_at,
    cutting,
    edge_shares,
    edges_between,
    n_edges_of,
    uncut_edges,
)
from tl_sparse.circuits.exchange import edge_list, read_edge_list, read_openai_circuit
from tl_sparse.circuits.fingerprints import fingerprint
from tl_sparse.circuits.kinds import NodeKind
from tl_sparse.circuits.nodes import Edge, Node
from tl_sparse.circuits.parts import CircuitParts, with_labels
from tl_sparse.circuits.reads import holding_reads
from tl_sparse.circuits.storage import read_circuit, write_circuit
from tl_sparse.errors import CircuitError
from tl_sparse.files import write_json
from tl_sparse.hooks import NodeMasks, NodeValues, TLModel, ablating
from tl_sparse.tasks import Task, TaskPairs

if TYPE_CHECKING:
    from tl_sparse.explanations import Explanation
    from tl_sparse.programs import CompiledCircuit, PythonProgram
    from tl_sparse.view import Page


@dataclass(frozen=True, eq=False)
class Circuit(CircuitParts):
    """Kept nodes, means, and the model and task they belong to (Gao et al. 2025, section 2.2).

    `CircuitParts` defines the fields and the properties that depend on them alone. This class adds
    the methods that take a model, make other circuits, or read and write circuits.

    Attributes:
        kept: which nodes are kept: hook point → boolean mask, in the order of the forward pass. The
            nodes are channels, one for each mean, or in a component circuit the outputs of heads at
            `hook_z`, `[n_heads, 1]`, and of MLPs at `hook_mlp_out`, `[1]`, held as whole vectors.
        means: mean activations over the training corpus at these hook points, and optionally at
            `hook_z`, which cutting an edge that leaves a value channel needs. Empty if they are not
            known: such a circuit can be viewed, but no model can run under it.
        model: the fingerprint of the model that the circuit was found in.
        model_name: the name of that model.
        task: the name of the task.
        measured: the measurements of the circuit as plain JSON values: losses, settings, seeds …
        edge_set: the (source, target) pairs of the edges that edge pruning has left. None if edges
            were not pruned: every nonzero weight between kept nodes is then an edge.
        scores: the score by which the search ranked each node, at the same hook points; the kept
            nodes have the highest scores. Empty if they are not known.
        labels: the user's own words for nodes; see `with_labels`.
        pairs: the pairs of a task that is not built in, with which the circuit was found and
            judged. None for built-in tasks, which draw the same pairs again, and if they are not
            known.
        frozen_norms: whether the circuit runs with the norm scales that the full model has on the
            same prompts. `tl_sparse.evaluation.holding_circuit` does that.
    """

    def __post_init__(self) -> None:
        if self.means and not self.kept.keys() <= self.means.keys():
            missing = sorted(self.kept.keys() - self.means.keys())
            raise CircuitError(f"no means at {', '.join(missing)}")
        if not isinstance(self.pairs, TaskPairs | None):
            raise CircuitError(f"pairs must be a TaskPairs or None, not {type(self.pairs)}")
        self._check_scores()
        self._check_kept()

    def _check_kept(self) -> None:
        components = self.component_hooks
        if components and len(components) < len(self.kept):
            others = sorted(self.kept.keys() - set(components))
            raise CircuitError(
                "the nodes of a circuit are either channels or components; there are components "
                f"at {components[0]}, and channels at {others[0]}"
            )
        for name, mask in self.kept.items():
            shape = self.means[name].shape if self.means else mask.shape
            whose = "the means' shape"
            if name in components:
                shape = torch.Size([*shape[:-1], 1])
                whose = "the components' shape"
            if mask.dtype != torch.bool or mask.shape != shape:
                raise CircuitError(
                    f"{name}: kept must be a boolean mask of {whose} {list(shape)}, "
                    f"not {mask.dtype} of {list(mask.shape)}"
                )
            if self.means and not bool(self.means[name].isfinite().all()):
                raise CircuitError(f"{name}: a mean is NaN or infinite")

    def _check_scores(self) -> None:
        if self.scores and self.kept.keys() != self.scores.keys():
            raise CircuitError("kept nodes and scores must name the same hook points")
        for name, score in self.scores.items():
            shape = self.kept[name].shape
            if score.shape != shape:
                raise CircuitError(
                    f"{name}: scores must have the shape of kept, {list(shape)}, "
                    f"not {list(score.shape)}"
                )
            if bool(score.isnan().any()):
                raise CircuitError(f"{name}: a score is NaN")

    # Edges and other parameters of the model

    def check_model(self, model: TLModel) -> None:
        """Raise `CircuitError` if `model` is not the one this circuit was found in."""
        difference = self.model.difference(fingerprint(model))
        if difference is not None:
            name = self.model_name or self.model.architecture
            raise CircuitError(
                f"this circuit belongs to the model {name!r}; the given one has {difference}"
            )

    def check_means(self) -> None:
        """Raise `CircuitError` if this circuit has no means, which every run under it needs."""
        if not self.means:
            raise CircuitError(
                "this circuit has no means to hold nodes at; circuit.with_means("
                "tl_sparse.hooks.mean_activations(model, circuit.mean_hooks, batches_of_tokens)) "
                "adds them"
            )

    def edges(self, model: TLModel) -> list[Edge]:
        """Every nonzero weight of `model` that joins two kept nodes and is not cut.

        The edges are in the order of the forward pass. Where several weights join the same two
        nodes (gated MLPs, grouped-query attention), each of them is an edge. In a component
        circuit, an edge leads from a component to each later one that reads what it writes to the
        residual stream; its weight is the norm of the product of the matrices between them.

        Raises:
            CircuitError: if `model` is not this circuit's model; `applied` and `ablated` raise it
                too.
        """
        self.check_model(model)
        return uncut_edges(self, model)

    def n_edges(self, model: TLModel) -> int:
        """The number of `edges`, which takes far less time in a dense model.

        Raises:
            CircuitError: if `model` is not this circuit's model.
        """
        self.check_model(model)
        return n_edges_of(self, model)

    def cut_edges(self, model: TLModel) -> list[Edge]:
        """The nonzero weights between kept nodes that edge pruning has cut.

        This does not check that `model` is the circuit's model.
        """
        if self.edge_set is None:
            return []
        return [edge for edge in edges_between(self.nodes, model) if edge.ends not in self.edge_set]

    def edge_shares(self, model: TLModel) -> dict[tuple[int, str, str], float]:
        """(layer, source location, target location) → the fraction of the nonzero weights between
        these locations that are edges of this circuit.

        Raises:
            UnsupportedError: if the edges are between components.
        """
        return edge_shares(self.edges(model), model)

    def biases(self, model: TLModel) -> dict[Node, float]:
        """The nonzero biases of the kept nodes at locations that edges lead to.

        The bias is the node's value when no edge contributes to it.
        """
        self.check_model(model)
        biases = {}
        for node in self.nodes:
            bias = bias_at(model, node)
            if bias is not None and bias != 0:
                biases[node] = float(bias)
        return biases

    def sinks(self, model: TLModel) -> dict[tuple[int, int], float]:
        """(layer, head) → the logit of the head's attention sink.

        It covers the kept heads, or those with kept value channels, and is empty for models without
        sinks.
        """
        self.check_model(model)
        if getattr(model.blocks[0].attn, "sink", None) is None:
            return {}
        heads = set()
        for node in self.nodes:
            if node.location == "attn_v":  # whose nodes are numbered head by head
                heads.add((node.layer, node.index // model.cfg.d_head))
            elif node.location == "head":
                heads.add((node.layer, node.index))
        sinks = {}
        for layer, head in sorted(heads):
            sinks[layer, head] = model.blocks[layer].attn.sink[head].item()
        return sinks

    # The model under the circuit

    @property
    def mean_hooks(self) -> list[str]:
        """The hook points at which this circuit needs means: those of its nodes, and `hook_z`.

        W_O reads z, so an edge that leaves a head is cut by holding z at its mean.
        """
        z_hooks = []
        for hook_name in self.kept:
            if hook_name.endswith(".attn.hook_v"):
                z_hooks.append(hook_name.removesuffix("hook_v") + "hook_z")
        return [*self.kept, *z_hooks]

    def with_means(self, means: NodeValues) -> Circuit:
        """This circuit with other means.

        For example: `circuit.with_means(mean_activations(model, circuit.mean_hooks, batches))`.

        If the circuit had other means before, nothing has been measured under the new ones: of
        `measured`, only the settings of the search, `config`, are kept.

        Raises:
            CircuitError: if a hook point has no mean, or a mean has the wrong shape.
        """
        needed = {}
        for name, mean in means.items():
            if name in self.kept or name.endswith(".hook_z"):
                needed[name] = mean
        measured = self.measured
        if self.means and not _are_equal(self.means, needed):
            measured = {name: measured[name] for name in ("config",) if name in measured}
        return replace(self, means=needed, measured=measured)

    def with_labels(self, labels: Mapping[str, str] | Mapping[Node, str]) -> Circuit:
        """This circuit with the user's own words for some of its nodes.

        For example: `circuit.with_labels({"0.attn_v h3.7": "inside a string"})`. They are saved
        with the circuit, and shown on its page and in its exports.

        Args:
            labels: a node of the circuit, or its name → its label. They are added to the labels
                that are there; an empty text removes one.

        Raises:
            ArgumentError: if `labels` is not a mapping.
            CircuitError: if a node is not in this circuit, or a label is not a text.
        """
        return replace(self, labels=with_labels(self, labels))

    def applied(self, model: TLModel) -> AbstractContextManager[None]:
        """A context in which every forward pass of `model` runs under the circuit.

        All other nodes are held at their means. If edges were pruned, the contribution of each cut
        edge is held at its mean too.

        Raises:
            CircuitError: if `model` is not this circuit's model, or the circuit has `frozen_norms`,
                which depend on the prompts.
        """
        self.check_model(model)
        self._check_own_norms()
        return self.holding(model, self.dropped, self.means, self.cut_edges(model))

    def ablated(self, model: TLModel) -> AbstractContextManager[None]:
        """The inverse of `applied`: the circuit's nodes are held at their means, all others run.

        This shows whether the circuit is necessary. Edges play no part in it: only nodes are held.

        Raises:
            CircuitError: if `model` is not this circuit's model, or the circuit has `frozen_norms`,
                which depend on the prompts.
        """
        self.check_model(model)
        self._check_own_norms()
        return self.holding(model, self.kept, self.means, ())

    def _check_own_norms(self) -> None:
        """Raise `CircuitError` if the circuit runs with the norm scales of the full model."""
        if self.frozen_norms:
            raise CircuitError(
                "this circuit runs with the norm scales of the full model, which depend on the "
                "prompts: tl_sparse.evaluation.holding_circuit(circuit, model) gives a context for "
                "prompts"
            )

    @property
    def dropped(self) -> dict[str, Bool[Tensor, " *node"]]:
        """The inverse of `kept`: masks of all nodes outside the circuit."""
        return {name: ~mask for name, mask in self.kept.items()}

    @contextmanager
    def holding(
        self, model: TLModel, nodes: NodeMasks, values: Mapping[str, Tensor], cut: Collection[Edge]
    ) -> Iterator[None]:
        """A context in which `nodes` are held at `values`, and the edges `cut` at their means.

        Nodes are held by `hooks.ablating`; for edges, it is their contribution that is held. This
        does not check that `model` is the circuit's model.
        """
        self.check_means()
        with (
            holding_reads(model),
            cutting(model, cut, self.means),
            ablating(model, nodes, values),
        ):
            yield

    def compile(
        self,
        model: TLModel,
        tokens: Sequence[int] | Int[Tensor, " logit"] | None = None,
        dtype: torch.dtype | None = None,
    ) -> CompiledCircuit:
        """A module that computes the logits of `model` under this circuit, without the model.

        All nodes outside the circuit are constants, and everything that depends on these alone is
        computed once, in float64. What is left is exact, up to rounding, for every sequence of
        tokens within the context. Where two entries that compete in AbsTopK are equally large and
        not zero, another one of them may be kept.

        Args:
            model: the circuit's model, of tl_sparse.
            tokens: the tokens whose logits are wanted, such as the candidates of a task; by default
                all. Fewer tokens make the module smaller and faster.
            dtype: float32 or float64; by default that of the model, and float32 for a model in half
                precision.

        Raises:
            CircuitError: if `model` is not this circuit's model, or the circuit has no means.
            UnsupportedError: if the model is not of tl_sparse, the nodes are components, or the
                circuit has `frozen_norms`.
            DataError: if `tokens` are not in the vocabulary.
            ConfigError: for another dtype.
        """
        # Imported here for the same reason as in `card`.
        from tl_sparse.programs import compile_circuit

        return compile_circuit(self, model, tokens, dtype)

    def explain(
        self,
        model: TLModel,
        task: Task | str | None = None,
        *,
        corpus: Int[Tensor, "seq pos"] | None = None,
        own: Mapping[str, str] | None = None,
        names: Mapping[str, str] | None = None,
        progress: bool = True,
        seed: int = 0,
    ) -> Explanation:
        """An expression over the tokens for each node, found by search, and what it is worth.

        For example: `print(circuit.explain(model))`. The arguments and errors are those of
        `tl_sparse.explanations.explain_circuit`.
        """
        # Imported here for the same reason as in `card`.
        from tl_sparse.explanations import explain_circuit

        return explain_circuit(
            self, model, task, corpus=corpus, own=own, names=names, progress=progress, seed=seed
        )

    def to_python(
        self,
        model: TLModel,
        tokens: Sequence[int] | Int[Tensor, " logit"] | None = None,
        names: Mapping[str, str] | None = None,
    ) -> PythonProgram:
        """The program that `compile` makes as readable Python source, which needs NumPy alone.

        Each node is a statement. `print` shows the source, and its `save` writes it with the tables
        by token and position that it reads. Its logits are equal to those of the compiled circuit
        in float64, up to about 1e-10. This circuit's labels become comments.

        Args:
            model: the circuit's model, of tl_sparse.
            tokens: the tokens whose logits are wanted, such as the candidates of a task; by default
                all. The fewer there are, the shorter is the source.
            names: node → the name of its variable, such as `{"0.mlp_neuron 7": "in_string"}`. Other
                variables are called after their nodes.

        Raises:
            CircuitError, UnsupportedError, DataError: as for `compile`; CircuitError also if a node
                of `names` is not in the circuit.
            ConfigError: if a name is no variable of Python, or stands for something else.
        """
        # Imported here for the same reason as in `card`.
        from tl_sparse.programs import python_program

        return python_program(self, model, tokens, names)

    # Other circuits from this one

    def __or__(self, other: Circuit) -> Circuit:
        """The nodes and edges that are in at least one of the two circuits.

        If only one of them has edges that are cut, the result has all edges between its nodes. As
        in all circuits made from others, the means and scores are this circuit's, and nothing has
        been measured. `pairs` are kept if the two circuits have the same ones.

        Raises:
            CircuitError: if the circuits belong to different models; & and - raise it too.
        """
        return algebra.union(self, other)

    def __and__(self, other: Circuit) -> Circuit:
        """The nodes and edges that are in both circuits."""
        return algebra.intersection(self, other)

    def __sub__(self, other: Circuit) -> Circuit:
        """This circuit's nodes that are not in `other`, and its edges between them."""
        return algebra.difference(self, other)

    def restricted(self, layers: Collection[int]) -> Circuit:
        """This circuit's nodes in `layers`, and its edges between them.

        Raises:
            CircuitError: if the model has no such layer.
        """
        return algebra.restricted(self, layers)

    def without(self, parts: Iterable[Node | Edge | str], model: TLModel) -> Circuit:
        """This circuit without the nodes and edges in `parts`.

        Args:
            parts: nodes, names of nodes as `node` takes them, and edges.
            model: the circuit's model.

        Raises:
            CircuitError: if a node, or an end of an edge, is not in this circuit.
        """
        return algebra.without(self, parts, model)

    def of_size(self, n_nodes: int) -> Circuit:
        """The circuit of the `n_nodes` highest-ranked nodes, with all nonzero weights between them.

        This circuit's nodes rank above all others; within each group, the scores decide.

        Raises:
            CircuitError: if this circuit has no scores, or `n_nodes` is negative or larger than the
                number of all nodes.
        """
        return algebra.of_size(self, n_nodes)

    # Files

    def save(self, folder: str | Path, overwrite: bool = False) -> None:
        """Write `circuit.json`, `circuit.safetensors` and, if the circuit has `pairs`,
        `pairs.jsonl`: all of them or none.

        Args:
            folder: created if it does not exist.
            overwrite: whether another circuit in `folder` is replaced. Saving the same circuit
                again is always possible.

        Raises:
            CheckpointError: if the files cannot be written, or JSON cannot hold a value in
                `measured`.
            ConfigError: if `folder` holds another circuit, and `overwrite` is False.
        """
        write_circuit(Path(folder), self, overwrite)

    @classmethod
    def load(cls, source: str | Path, revision: str | None = None) -> Circuit:
        """Read a circuit that `save` wrote.

        Args:
            source: a folder, or a repository on the Hugging Face Hub ("user/repo").
            revision: the revision of the repository.

        Raises:
            CheckpointError: if a file is missing, damaged, or has another format or version.
            CircuitError: if the masks and means do not fit each other.
        """
        return cls._from_parts(read_circuit(find(source, revision, "circuit")), means=None)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the files that `save` writes, and a model card, to the Hugging Face Hub.

        Args:
            repo_id: `"user/repo"`. The repository is created if it does not exist, and an existing
                card is replaced.
            options: `private`, `revision`, `token` and `commit_message`; see
                `tl_sparse.checkpoints.push_folder`.

        Returns:
            The address of the repository.

        Raises:
            CheckpointError: if the Hub cannot be reached, or refuses the upload.
        """
        return push_folder(repo_id, self.save, self.card, **options)

    def card(self, repo_id: str) -> str:
        """The text of the repository's README.md: the circuit's scores, and how to load it."""
        # Imported here because `view` imports this package; see UPWARDS in tests/test_rooms.py.
        from tl_sparse.view import circuit_facts

        return card_text(
            repo_id,
            what="A circuit of a weight-sparse transformer",
            facts=circuit_facts(self),
            load=f'circuit = tl_sparse.Circuit.load("{repo_id}")',
        )

    # Exchange with other tools

    def edge_list(self, model: TLModel) -> dict[str, Any]:
        """The names of the nodes, and the edges with their weights, as plain JSON values.

        The means are not included.

        Raises:
            CircuitError: if `model` is not the circuit's model, or the circuit has no mask at one
                of the model's node locations.
        """
        return edge_list(self, self.edges(model), model)

    def save_edge_list(self, path: str | Path, model: TLModel, overwrite: bool = False) -> None:
        """Write `edge_list` to a JSON file.

        Args:
            path: the file.
            model: the circuit's model.
            overwrite: whether a file with other contents is replaced.

        Raises:
            CheckpointError: if the file cannot be written.
            ConfigError: if there is a file with other contents, and `overwrite` is False.
        """
        write_json(path, self.edge_list(model), overwrite)

    @classmethod
    def from_edge_list(
        cls, path: str | Path, model: TLModel, means: NodeValues | None = None
    ) -> Circuit:
        """Read an edge list that `save_edge_list` or another tool wrote.

        The circuit keeps the `nodes` of the list or, if it has no such entry, the ends of its
        `edges`. A list from another tool needs only `edges`; their weights may be left out, and
        nodes may have OpenAI's names.

        Raises:
            CheckpointError: if the file is missing, damaged, or not an edge list.
            CircuitError: if a node does not exist, or the weight of an edge differs from the
                model's by more than 1 %, or is zero there.
        """
        return cls._from_parts(read_edge_list(Path(path), model), means)

    @classmethod
    def from_openai(
        cls, path: str | Path, model: TLModel, means: NodeValues | None = None, task: str = ""
    ) -> Circuit:
        """Read a circuit published by OpenAI: a `viz_data.pt` from `viz/` in their public storage.

        The file contains neither means nor the name of the task. Without means the circuit can be
        viewed and its nodes and edges counted; `with_means` makes it runnable. The kept entries of
        `final_resid` are left out, because they are not nodes here.

        `measured["openai"]` has the task losses of the `full` model and of the `circuit`,
        `pruning_losses` as [step, loss], `num_total_nodes` and `prune_config`, each if the file has
        it. All losses are means over the two prompts of a pair; the file has their sums.

        Raises:
            CheckpointError: if the file is missing, damaged, or not one of OpenAI's circuits.
            CircuitError: if the circuit, or a mean, does not fit the model; the message names the
                location.
        """
        return cls._from_parts(read_openai_circuit(Path(path), model, task), means)

    def to_eap(
        self,
        model: TLModel,
        path: str | Path | None = None,
        scores: EdgeScoring | EapGraph = "weights",
        overwrite: bool = False,
    ) -> EapGraph:
        """The graph of components, of EAP-IG and MIB, that this circuit is a part of.

        An edge is in the graph if a path of kept nodes and uncut edges joins the two components: a
        value channel or neuron of the one, a residual channel that it writes and the other reads,
        and a query, key or value channel or a neuron of the other. The tokens write, and the logits
        read, the channels at which W_E and W_U are not all zero. A head is in the graph if one of
        its query, key or value channels is kept, and an MLP if one of its neurons is. In a
        component circuit, paths lead through all channels of the kept components.

        The graph holds what it leaves out at the values of other prompts, not at means, and it has
        all channels of its components: how well it does must be measured again, for example by
        `tl_sparse.evaluation.graph_score`.

        Args:
            model: the circuit's model.
            path: a file to write the graph to, *.json or *.pt; by default none.
            scores: "weights" scores an edge by the sum, over its paths, of the product of their two
                absolute weights; norms are left out, and W_E and W_U are those of the mean token.
                "ranking" scores all edges of the model by the best path of each, and a path by the
                lowest rank of its nodes in the search, as the share of all nodes that rank no
                higher: edges that score above 1 - n/N are those of `of_size(n)`, of N nodes.
                A graph gives its own scores; see `tl_sparse.evaluation.edge_scores`.
            overwrite: whether a file with other contents is replaced.

        Raises:
            CircuitError: if `model` is not the circuit's model, or the circuit has no `scores`.
            ConfigError: for unknown `scores`; and for a file as for `EapGraph.save`.
            UnsupportedError: if the model has no MLPs.
        """
        self.check_model(model)
        graph = graph_of_circuit(self, model, scores)
        if path is not None:
            graph.save(path, overwrite)
        return graph

    @classmethod
    def from_eap(
        cls,
        source: str | Path | EapGraph,
        model: TLModel,
        means: NodeValues | None = None,
        task: str = "",
        nodes: NodeKind = "channels",
    ) -> Circuit:
        """The circuit of the heads and MLPs in a graph of EAP-IG or MIB.

        Edges between components cannot be told from a circuit, in which a component reads all that
        was written before it: it may have more of them than the graph.
        `tl_sparse.evaluation.applying_graph` runs a model under the graph itself.

        Args:
            source: the graph, or its file.
            model: the model to which it belongs.
            means: the means of the circuit's nodes; without them it cannot run.
            task: the name of the task.
            nodes: "components" makes a component circuit, whose nodes are the outputs of heads and
                MLPs. "channels" keeps all channels of them: of a head, its query, key and value
                channels, of each kind if an edge leads to that input; and of what a component
                writes, the residual channels that are in the graph. What several heads share is
                kept for any of them.

        Raises:
            CheckpointError: if the file is missing, damaged, or not such a graph.
            CircuitError: if the graph is empty or does not fit the model, or a node or edge does
                not exist.
            ConfigError: for unknown `nodes`.
        """
        graph = source if isinstance(source, EapGraph) else EapGraph.load(source)
        return cls._from_parts(circuit_of_graph(graph, model, task, nodes), means)

    @classmethod
    def _from_parts(cls, parts: CircuitParts, means: NodeValues | None) -> Circuit:
        circuit = cls(**vars(parts))
        return circuit if means is None else circuit.with_means(means)

    # Display

    def view(self, model: TLModel, *args: Any, **options: Any) -> Page:
        """An interactive page, which notebooks display and `save(path)` writes.

        For the arguments see `tl_sparse.view.page_data`.
        """
        # Imported here for the same reason as in `card`.
        from tl_sparse.view import Page, page_data

        return Page(page_data(self, model, *args, **options))

    def __repr__(self) -> str:
        return described(self)


def _are_equal(values: NodeValues, others: NodeValues) -> bool:
    """Whether two sets of means are the same."""
    if values.keys() != others.keys():
        return False
    return all(torch.equal(value.cpu(), others[name].cpu()) for name, value in values.items())
