"""Scores of all edges between components, by gradients.

Edge attribution patching (Syed et al. 2023, arXiv 2310.10348), and with integrated gradients from
the other prompt's embedding to the prompt's own (Hanna et al. 2024, arXiv 2403.17806).
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from tl_sparse.arguments import checked
from tl_sparse.circuits import EapGraph
from tl_sparse.config import check
from tl_sparse.evaluation.batches import ordinary
from tl_sparse.evaluation.component_hooks import ComponentHooks, separate_components
from tl_sparse.evaluation.graph_runs import outputs_on_other_prompts
from tl_sparse.evaluation.running import logits_at_all_positions, prompt_batches, task_logits
from tl_sparse.hooks import (
    HookFn,
    TLModel,
    differentiating,
    frozen,
    hooked,
    recording,
)
from tl_sparse.tasks import TaskData, right_minus_wrong

#: - "eap": the gradients are those of the prompt's own run;
#: - "eap_ig": they are averaged over runs with embeddings on the line from the other prompt's to
#:   the prompt's own, the former included ("EAP-IG-inputs" in MIB).
EdgeMethod = Literal["eap", "eap_ig"]
EDGE_METHODS: tuple[EdgeMethod, ...] = get_args(EdgeMethod)
EMBED_HOOK = "hook_embed"


@checked("method")
def edge_scores(
    model: TLModel,
    data: TaskData,
    method: EdgeMethod = "eap_ig",
    steps: int = 5,
    batch_size: int = 32,
) -> EapGraph:
    """The graph with all edges of a model, scored by what cutting each would do to the task.

    The score of an edge is, to first order, how far the logit difference, right answer minus wrong
    one, falls if the target reads what the source writes on the other prompt of the pair: the mean
    over prompts of Σ (source on this prompt - on the other) · gradient at the target's input, over
    positions and channels. The score of a node is the sum over the edges that leave it. For how
    prompts of different lengths are aligned see `applying_graph`.

    Where query heads share one key or value input, as on TransformerLens 4, each gets an equal part
    of its score.

    Args:
        data: the prompts of the task.
        method: where the gradients are taken; see `EdgeMethod`.
        steps: the number of runs over which "eap_ig" averages.
        batch_size: the largest number of prompts to run at a time. It changes nothing but rounding.

    Raises:
        ConfigError: for an unknown `method`, or `steps` below 1.
        UnsupportedError: as for `applying_graph`.
    """
    check(method in EDGE_METHODS, "method", method, f"one of {', '.join(EDGE_METHODS)}")
    check(steps >= 1, "steps", steps, "at least 1")
    with differentiating(model), frozen(model), separate_components(model):
        hooks = ComponentHooks.of_model(model)
        data = ordinary(data)
        hooks.check_stream(model, data)
        total = torch.zeros(hooks.layout.n_sources, hooks.layout.n_targets)
        # How far from the other prompt's embedding each run starts.
        shares = [1.0] if method == "eap" else [step / steps for step in range(steps)]
        for batch in prompt_batches(model, data, batch_size):
            own, other = _outputs(model, hooks, batch.data)
            for share in shares:
                embedding = other[:, :, 0] + share * (own[:, :, 0] - other[:, :, 0])
                gradients = _gradients(model, hooks, batch.data, embedding)
                total += _products(hooks, own - other, gradients)
    scores = total / (len(shares) * len(data.prompts))
    return replace(EapGraph.full(model), scores=scores, nodes_scores=scores.sum(1))


@torch.no_grad()
def _outputs(
    model: TLModel, hooks: ComponentHooks, data: TaskData
) -> tuple[Float[Tensor, "prompt pos source d_model"], Float[Tensor, "prompt pos source d_model"]]:
    """What each source writes on each prompt, and on the other prompt of the pair."""
    with recording(model, hooks.writers) as activations:
        logits_at_all_positions(model, data.trimmed().tokens)
    return hooks.stacked(activations), outputs_on_other_prompts(model, hooks, data)


def _gradients(
    model: TLModel,
    hooks: ComponentHooks,
    data: TaskData,
    embedding: Float[Tensor, "prompt pos d_model"],
) -> list[Float[Tensor, "prompt pos *head d_model"]]:
    """The gradient of the logit difference at what each reader reads, in a run with this embedding.

    The logit differences are summed over the prompts.
    """
    inputs: dict[str, Tensor] = {}

    def embed(activation: Tensor, hook: object) -> Tensor:
        return embedding.detach().clone().requires_grad_()

    def remember(name: str, activation: Tensor, hook: object) -> None:
        inputs[name] = activation

    functions: dict[str, HookFn] = {EMBED_HOOK: embed}
    for reader in hooks.readers:
        functions[reader.hook_name] = partial(remember, reader.hook_name)
    with hooked(model, functions):
        logits = task_logits(model, data)
    margin = right_minus_wrong(logits, data.correct.to(logits.device)).sum()
    at_inputs = [inputs[reader.hook_name] for reader in hooks.readers]
    return list(torch.autograd.grad(margin, at_inputs, materialize_grads=True))


def _products(
    hooks: ComponentHooks,
    change: Float[Tensor, "prompt pos source d_model"],
    gradients: Sequence[Float[Tensor, "prompt pos *head d_model"]],
) -> Float[Tensor, "source target"]:
    """The effect of each edge to first order, summed over prompts, positions and channels."""
    products = torch.zeros(hooks.layout.n_sources, hooks.layout.n_targets)
    for reader, gradient in zip(hooks.readers, gradients, strict=True):
        outputs = change[:, :, : reader.n_sources]
        if gradient.ndim == 3:
            effects = torch.einsum("bpsd,bpd->s", outputs, gradient)
        else:
            effects = torch.einsum("bpsd,bphd->sh", outputs, gradient)
            shared_by = hooks.layout.n_heads // gradient.shape[2]
            effects = effects.repeat_interleave(shared_by, dim=1) / shared_by
        products[: reader.n_sources, reader.targets] = effects.float().cpu()
    return products
