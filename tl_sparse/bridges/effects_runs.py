"""The runs of a sparse and a dense model that measure what changes of nodes do in both."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float
from torch import Tensor

from tl_sparse.bridges.carrying import (
    NodeChange,
    are_reads,
    decoded_difference,
    default_site,
    difference_of_reads,
    masks_of,
)
from tl_sparse.bridges.pair import Bridges
from tl_sparse.bridges.probes import Probe
from tl_sparse.bridges.streams import Streams, run_with_streams
from tl_sparse.circuits import Node
from tl_sparse.evaluation import check_padding, from_other_of_pair
from tl_sparse.hooks import NodeMasks, NodeValues, TLModel, recording
from tl_sparse.tasks import TaskData, candidate_logits, right_minus_wrong


@dataclass(frozen=True, eq=False)
class Margins:
    """Logit differences, right answer minus wrong one.

    The last axes of some are the kinds of change (0: interchanged, 1: ablated) and the sets of
    nodes (0: the circuit's, then those at random).

    Attributes:
        sparse: in the sparse model as it is.
        dense: in the dense model as it is.
        sparse_changed: in the sparse model with the circuit's nodes changed.
        sparse_at_site: the same if the change acts at one site alone.
        dense_at_site: in the dense model with the decoded change at one site.
        everything: in the dense model with its stream at a site interchanged.
        probe: with its stream at a site moved along the probe; no sites without probes.
        probe_is_right: no logit difference, but whether the probe at a site tells the right answer.
        node_sparse: in the sparse model with one node interchanged.
        node_dense: in the dense model with the change of one node carried over.
    """

    sparse: Float[Tensor, " prompt"]
    dense: Float[Tensor, " prompt"]
    sparse_changed: Float[Tensor, "prompt kind"]
    sparse_at_site: Float[Tensor, "prompt kind site"]
    dense_at_site: Float[Tensor, "prompt kind set site"]
    everything: Float[Tensor, "prompt site"]
    probe: Float[Tensor, "prompt site"]
    probe_is_right: Float[Tensor, "prompt site"]
    node_sparse: Float[Tensor, "prompt node"]
    node_dense: Float[Tensor, "prompt node"]


def joined(parts: Sequence[Margins]) -> Margins:
    """The margins of several batches, one after the other."""
    values = {}
    for field in fields(Margins):
        values[field.name] = torch.cat([getattr(part, field.name) for part in parts])
    return Margins(**values)


def in_batches(data: TaskData, batch_size: int) -> list[TaskData]:
    """The pairs in batches of at most `batch_size` prompts, but at least a pair, in their order."""
    batches = []
    for pairs in torch.arange(data.n_pairs).split(max(1, batch_size // 2)):
        batches.append(data.pairs(pairs).trimmed())
    return batches


def streams_at_the_end(
    model: TLModel, data: TaskData, batch_size: int
) -> list[Float[Tensor, "prompt d_model"]]:
    """The stream of a model at the last position of each prompt, for every site.

    Raises:
        UnsupportedError: if the model sees padding, and prompts differ in length.
    """
    of_batches = []
    for batch in in_batches(data, batch_size):
        check_padding(model, batch.last)
        streams = run_with_streams(model, batch.tokens).read
        of_batches.append([at_the_end(stream, batch) for stream in streams])
    return [torch.cat(of_site) for of_site in zip(*of_batches, strict=True)]


def at_the_end(
    stream: Float[Tensor, "prompt pos d_model"], data: TaskData
) -> Float[Tensor, "prompt d_model"]:
    """The stream at the last position of each prompt."""
    return stream[torch.arange(len(stream), device=stream.device), data.last]


@dataclass(frozen=True, eq=False)
class Changes:
    """What is changed.

    Attributes:
        sets: masks of the circuit's nodes, and of sets of random nodes.
        means: the values of ablated nodes.
        alone: the nodes that are changed alone.
        probes: a probe for each site, or none.
        strength: what differences are multiplied by where they are added to a stream.
    """

    sets: Sequence[NodeMasks]
    means: NodeValues
    alone: Sequence[Node]
    probes: Sequence[Probe]
    strength: float


@dataclass(frozen=True, eq=False)
class Batch:
    """Some pairs of prompts, and the runs of both models on them.

    Attributes:
        bridges: the models.
        data: the prompts.
        changes: what is changed.
        sparse: the run of the sparse model.
        dense: the run of the dense model.
        own: hook point → the values that the nodes have on the prompts.
        others: hook point → those that they have on the other prompt of the pair.
    """

    bridges: Bridges
    data: TaskData
    changes: Changes
    sparse: Streams
    dense: Streams
    own: NodeValues
    others: NodeValues

    @classmethod
    def of(cls, bridges: Bridges, data: TaskData, changes: Changes) -> "Batch":
        """Run both models.

        Raises:
            UnsupportedError: if one sees padding, and prompts differ in length.
        """
        for model in (bridges.sparse, bridges.dense):
            check_padding(model, data.last)
        with recording(bridges.sparse, changes.sets[0]) as values:
            sparse = run_with_streams(bridges.sparse, data.tokens)
        others = {name: from_other_of_pair(value, data) for name, value in values.items()}
        dense = run_with_streams(bridges.dense, data.tokens)
        return cls(bridges, data, changes, sparse, dense, values, others)

    def margins(self) -> Margins:
        """The logit differences with all changes."""
        sparse_changed, sparse_at_site, dense_at_site = [], [], []
        for values in (self.others, self.changes.means):
            of_sets = []
            for number, nodes in enumerate(self.changes.sets):
                after = self._with_nodes(NodeChange(nodes, values))
                of_sets.append(self._carried(after))
                if number == 0:
                    sparse_changed.append(self._margins(after.logits))
                    sparse_at_site.append(self._sparse_at_sites(after))
            dense_at_site.append(torch.stack(of_sets, dim=1))
        node_sparse, node_dense = self._nodes_alone()
        probe, probe_is_right = self._along_probes()
        return Margins(
            sparse=self._margins(self.sparse.logits),
            dense=self._margins(self.dense.logits),
            sparse_changed=torch.stack(sparse_changed, dim=1),
            sparse_at_site=torch.stack(sparse_at_site, dim=1),
            dense_at_site=torch.stack(dense_at_site, dim=1),
            everything=self._everything(),
            probe=probe,
            probe_is_right=probe_is_right,
            node_sparse=node_sparse,
            node_dense=node_dense,
        )

    def _margins(self, logits: Float[Tensor, "prompt pos d_vocab"]) -> Float[Tensor, " prompt"]:
        return right_minus_wrong(candidate_logits(logits, self.data), self.data.correct)

    def _with_nodes(self, change: NodeChange) -> Streams:
        """The run of the sparse model with nodes changed."""
        with change.applied(self.bridges.sparse):
            return run_with_streams(self.bridges.sparse, self.data.tokens)

    def _in_dense(self, number: int, difference: Tensor) -> Float[Tensor, " prompt"]:
        """The dense model's margins with a difference added to its stream at a site."""
        stream = self.dense.read[number]
        changed = stream + self.changes.strength * difference.to(stream)
        return self._margins(self.bridges.dense_from(self.data.tokens, number, changed))

    def _carried(self, after: Streams) -> Float[Tensor, "prompt site"]:
        """The dense model's margins with a change of the sparse run decoded at each site."""
        of_sites = []
        for number, before in enumerate(self.sparse.written):
            difference = decoded_difference(self.bridges, number, after.written[number] - before)
            of_sites.append(self._in_dense(number, difference))
        return torch.stack(of_sites, dim=1)

    def _sparse_at_sites(self, after: Streams) -> Float[Tensor, "prompt site"]:
        """The sparse model's own margins with the change of its stream at each site."""
        of_sites = []
        for number, before in enumerate(self.sparse.read):
            changed = before + self.changes.strength * (after.read[number] - before)
            logits = self.bridges.sparse_from(self.data.tokens, number, changed)
            of_sites.append(self._margins(logits))
        return torch.stack(of_sites, dim=1)

    def _everything(self) -> Float[Tensor, "prompt site"]:
        """The dense model's margins with all of its stream at a site interchanged."""
        of_sites = []
        for number, stream in enumerate(self.dense.read):
            difference = from_other_of_pair(stream, self.data) - stream
            of_sites.append(self._in_dense(number, difference))
        return torch.stack(of_sites, dim=1)

    def _along_probes(self) -> tuple[Float[Tensor, "prompt site"], Float[Tensor, "prompt site"]]:
        """The dense model's margins moved along each probe, and whether each probe is right."""
        of_sites, are_right = [], []
        rows = torch.arange(len(self.data.prompts), device=self.data.last.device)
        for number, probe in enumerate(self.changes.probes):
            stream = self.dense.read[number]
            own = at_the_end(stream, self.data)
            other = at_the_end(from_other_of_pair(stream, self.data), self.data)
            difference = torch.zeros_like(stream)
            difference[rows, self.data.last] = probe.moved(own, other)
            of_sites.append(self._in_dense(number, difference))
            are_right.append((probe.predictions(own) == self.data.correct).float())
        return _columns(of_sites, self.data), _columns(are_right, self.data)

    def _nodes_alone(self) -> tuple[Float[Tensor, "prompt node"], Float[Tensor, "prompt node"]]:
        """The margins of both models with each node interchanged alone."""
        of_sparse, of_dense = [], []
        for node in self.changes.alone:
            change = NodeChange(masks_of(self.bridges.sparse, [node]), self.others)
            after = self._with_nodes(change)
            of_sparse.append(self._margins(after.logits))
            number = default_site(self.bridges.sparse, change)
            if are_reads(change):
                (name,) = change.nodes
                reads = self.own[name]
                difference = difference_of_reads(self.bridges, change, reads, self.sparse)
            else:
                own = after.written[number] - self.sparse.written[number]
                difference = decoded_difference(self.bridges, number, own)
            of_dense.append(self._in_dense(number, difference))
        return _columns(of_sparse, self.data), _columns(of_dense, self.data)


def _columns(columns: Sequence[Tensor], data: TaskData) -> Float[Tensor, "prompt column"]:
    """Columns side by side, of which there may be none."""
    if not columns:
        return torch.zeros(len(data.prompts), 0, device=data.tokens.device)
    return torch.stack(list(columns), dim=1)
