"""Running a model under a graph of components, edge by edge.

It is what EAP-IG's `evaluate_graph` does (Hanna et al. 2024, arXiv 2403.17806), by hooks.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from tl_sparse.arguments import checked
from tl_sparse.circuits import EapGraph
from tl_sparse.config import check
from tl_sparse.errors import UnsupportedError
from tl_sparse.evaluation.component_hooks import ComponentHooks, Reader, separate_components
from tl_sparse.evaluation.interchanging import other_of_pair
from tl_sparse.evaluation.running import (
    RunContext,
    logits_at_all_positions,
    prompt_batches,
    resampled,
)
from tl_sparse.hooks import HookFn, TLModel, hooked, recording
from tl_sparse.tasks import Partners, TaskData

#: What a component reads where an edge is not in the graph, in EAP-IG's words:
#: - "patching": what the source writes on the other prompt of the pair;
#: - "mean": the mean of what it writes, over all positions of the prompts;
#: - "zero": nothing.
Intervention = Literal["patching", "mean", "zero"]
INTERVENTIONS: tuple[Intervention, ...] = get_args(Intervention)


@checked("intervention")
def applying_graph(
    graph: EapGraph, model: TLModel, data: TaskData, intervention: Intervention = "patching"
) -> RunContext:
    """The `RunContext` in which `model` runs under a graph: a component reads what the sources of
    its edges write as it is, and what all other sources write on the other prompt of the pair.

    For example: `score(model, data, run_context=applying_graph(graph, model, data))`. The prompts
    of a pair are aligned from their first token; where the other prompt is shorter, its last
    position stands for those after it. What is not in the stream, such as a bigram table, has no
    edges: it reads the prompt as it is.

    Query heads may share keys and values. On TransformerLens 4 they then have one key and one value
    input together, to which an edge leads if it does for one of them.

    Args:
        data: the prompts of the task; "mean" takes the mean over them.
        intervention: what is read where there is no edge; see `Intervention`.

    Raises:
        ConfigError: for an unknown `intervention`.
        CircuitError: if the graph does not fit the model.
        UnsupportedError: if the model has no MLPs or no hook points for each head, or if its stream
            is not a sum.
    """
    graph.check_model(model)
    return GraphRuns.prepared(model, data, intervention).under(graph)


@dataclass(frozen=True)
class GraphRuns:
    """What all runs of a model under graphs on the same prompts need.

    Attributes:
        model: the model.
        hooks: its hook points.
        is_patching: whether the other prompt of the pair stands in where there is no edge.
        held: what is read where there is no edge, if it is the same at every position:
            `[source, d_model]`; None for zero.
    """

    model: TLModel
    hooks: ComponentHooks
    is_patching: bool
    held: Float[Tensor, "source d_model"] | None

    @classmethod
    def prepared(cls, model: TLModel, data: TaskData, intervention: Intervention) -> "GraphRuns":
        """Check model and arguments, and measure the means; for the errors see `applying_graph`."""
        possible = ", ".join(INTERVENTIONS)
        check(intervention in INTERVENTIONS, "intervention", intervention, f"one of {possible}")
        with separate_components(model):
            hooks = ComponentHooks.of_model(model)
            hooks.check_stream(model, data)
            held = mean_outputs(model, hooks, data) if intervention == "mean" else None
        return cls(model, hooks, intervention == "patching", held)

    def under(self, graph: EapGraph) -> RunContext:
        """The context in which the model runs under a graph, which is known to be of this model."""

        @contextmanager
        def apply(batch: TaskData) -> Iterator[None]:
            with separate_components(self.model):
                held = self.held
                if self.is_patching:
                    held = outputs_on_other_prompts(self.model, self.hooks, batch)
                run = _Run.under(graph, self.model, held)
                with hooked(self.model, run.functions(self.hooks)):
                    yield

        return apply


@torch.no_grad()
def outputs_on_other_prompts(
    model: TLModel, hooks: ComponentHooks, data: TaskData
) -> Float[Tensor, "prompt pos source d_model"]:
    """What each source writes on the other prompt of the pair."""
    others = other_of_pair(data)
    paired = replace(data, partners=Partners(data.tokens[others], data.last[others]))
    return hooks.stacked(resampled(model, paired, hooks.writers))


@torch.no_grad()
def mean_outputs(
    model: TLModel, hooks: ComponentHooks, data: TaskData, batch_size: int = 64
) -> Float[Tensor, "source d_model"]:
    """The mean of what each source writes, over all positions of all prompts."""
    layout = hooks.layout
    total = next(model.parameters()).new_zeros(layout.n_sources, layout.d_model)
    for batch in prompt_batches(model, data, batch_size):
        with recording(model, hooks.writers) as activations:
            logits_at_all_positions(model, batch.data.trimmed().tokens)
        outputs = hooks.stacked(activations)
        positions = torch.arange(outputs.shape[1], device=outputs.device)
        is_token = (positions <= batch.data.last[:, None]).to(outputs)
        total = total + torch.einsum("bpsd,bp->sd", outputs, is_token)
    return total / int((data.last + 1).sum())


@dataclass
class _Run:
    """One run of a model under a graph.

    Attributes:
        held: what is read where there is no edge: `[prompt, pos, source, d_model]`, or the same at
            every position; None for zero.
        cut: 1 for each edge that is not in the graph, and for what is no edge.
        channels: 1 for each residual channel of a source that is in the graph; None if all are.
        change: what is held, minus what the sources have written so far in this run.
        n_written: the number of sources that have written so far in this run.
    """

    held: Tensor | None
    cut: Float[Tensor, "source target"]
    channels: Float[Tensor, "source d_model"] | None
    change: Float[Tensor, "prompt pos source d_model"] | None = None
    n_written: int = 0

    @classmethod
    def under(cls, graph: EapGraph, model: TLModel, held: Tensor | None) -> "_Run":
        like = next(model.parameters())
        channels = graph.neurons_in_graph
        if channels is not None:
            channels = channels.to(like)
        return cls(held, (~graph.in_graph).to(like), channels)

    def functions(self, hooks: ComponentHooks) -> dict[str, HookFn]:
        """The functions at the hook points of the model."""
        functions: dict[str, HookFn] = {}
        for name, sources in hooks.writers.items():
            functions[name] = partial(self._written, sources, hooks.layout.n_sources)
        for reader in hooks.readers:
            cuts = self.cut[: reader.n_sources, reader.targets]
            some_channels = self.channels is not None and bool((self.channels == 0).any())
            if some_channels or bool(cuts.any()):
                functions[reader.hook_name] = partial(self._read, reader)
        return functions

    def _written(self, sources: slice | int, n_sources: int, output: Tensor, hook: object) -> None:
        if sources == 0:  # the embedding, the first of all
            shape = (*output.shape[:2], n_sources, output.shape[2])
            self.change = output.new_zeros(shape)
            if self.held is not None:
                self.change += self.held
            self.n_written = 0
        by_source = output if output.ndim == 4 else output.unsqueeze(2)
        first = sources.start if isinstance(sources, slice) else sources
        change = self._from_embedding(is_in_order=first == self.n_written)
        self.n_written += by_source.shape[2]
        change[:, :, first : self.n_written] -= by_source

    def _read(self, reader: Reader, stream: Tensor, hook: object) -> Tensor:
        """The stream, in which the outputs of other sources than those of edges are replaced."""
        change = self._from_embedding(is_in_order=self.n_written >= reader.n_sources)
        change = change[:, :, : reader.n_sources]
        cut = self.cut[: reader.n_sources, reader.targets]
        if stream.ndim == 4:
            # Query heads that share one key or value input read it with the edges of all of them.
            cut = cut.unflatten(1, (stream.shape[2], -1)).amin(-1)
        replaced = stream
        if self.channels is not None:
            channels = self.channels[: reader.n_sources]
            outside = (change * (1 - channels)).sum(2)
            replaced = replaced + (outside if stream.ndim == 3 else outside.unsqueeze(2))
            change = change * channels
        pattern = "bpsd,s->bpd" if stream.ndim == 3 else "bpsd,sh->bphd"
        return replaced + torch.einsum(pattern, change, cut)

    def _from_embedding(self, is_in_order: bool) -> Float[Tensor, "prompt pos source d_model"]:
        """`change`, of a run in which all sources so far have written, in their order."""
        if self.change is None or not is_in_order:
            raise UnsupportedError(
                "a model runs under a graph of components from the tokens on: from a middle layer "
                "on (start_at_layer), what earlier components wrote is not known"
            )
        return self.change
