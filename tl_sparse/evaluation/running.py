"""Running a model on the prompts of a task: the logits of the two candidates, and the loss."""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_sparse.arguments import checked
from tl_sparse.circuits import holding_reads
from tl_sparse.errors import UnsupportedError
from tl_sparse.hooks import (
    TLModel,
    all_treat_positions_alike,
    is_sparse_model,
    new_scope,
    norm_scale_hooks,
    recording,
    treats_positions_alike,
)
from tl_sparse.network import select_position
from tl_sparse.precision import in_float32
from tl_sparse.tasks import TaskData, task_loss_and_accuracy

#: A function that returns the context in which a model runs on a batch of prompts, for example
#: under a circuit.
RunContext = Callable[[TaskData], AbstractContextManager[None]]


def task_logits(model: TLModel, data: TaskData) -> Float[Tensor, "prompt 2"]:
    """The logits of the two candidates at the last position of each prompt.

    A model of this package computes its last block at that position alone, unless something that
    acts on its run, such as a hook of the user's, may need the others.

    Raises:
        UnsupportedError: if the model would see the padding; see `check_padding`.
    """
    logits = _last_logits(model, data)
    return in_float32(logits.gather(1, data.candidates.to(logits.device)))


def next_token_logits(model: TLModel, data: TaskData) -> Float[Tensor, "prompt d_vocab"]:
    """The logits of all tokens at the last position of each prompt, at least in float32.

    The errors are those of `task_logits`.
    """
    return in_float32(_last_logits(model, data))


def _last_logits(model: TLModel, data: TaskData) -> Float[Tensor, "prompt d_vocab"]:
    check_padding(model, data.last)
    data.check_context(model.cfg.n_ctx)
    data = data.trimmed()
    if is_sparse_model(model) and treats_positions_alike(model):
        return model.network(data.tokens, last=data.last)[:, 0]
    with _unembedding_only(model, data.last):
        logits = logits_at_all_positions(model, data.tokens)
    if logits.shape[1] == 1:
        return logits[:, 0]
    rows = torch.arange(len(data.last), device=logits.device)
    return logits[rows, data.last.to(logits.device)]


@contextmanager
def _unembedding_only(model: TLModel, last: Int[Tensor, " prompt"]) -> Iterator[None]:
    """Within the context, the unembedding is given one position of each prompt alone.

    A fifth of the weights of SmolLM2-135M are in it, and its output is the largest tensor of a run.
    If anything else acts on it or on the model, it is given all positions.
    """
    unembed = getattr(model, "unembed", None)
    if not isinstance(unembed, nn.Module):
        yield
        return
    seeing_logits = [model, getattr(model, "original_model", model), *unembed.modules()]
    if not all_treat_positions_alike(seeing_logits):
        yield
        return
    with new_scope() as scope:

        def select(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            if not scope.is_open_here():
                return None
            resid, *others = inputs
            return select_position(resid, last.to(resid.device)), *others

        handle = unembed.register_forward_pre_hook(select)
        try:
            yield
        finally:
            handle.remove()


@checked()
def logits_at_all_positions(
    model: TLModel, tokens: Int[Tensor, "prompt pos"]
) -> Float[Tensor, "prompt pos vocab"]:
    """The logits at every position."""
    if not is_sparse_model(model):
        return model(tokens)
    # With a tokenizer that pads on the left, the model would take a first token that is also the
    # padding token for padding.
    return model(tokens, attention_mask=torch.ones_like(tokens))


@checked()
def task_loss(model: TLModel, data: TaskData) -> Float[Tensor, ""]:
    """The mean task loss, through which gradients flow."""
    logits = task_logits(model, data)
    losses, _ = task_loss_and_accuracy(logits, data.correct)
    return losses.mean()


@checked()
@torch.no_grad()
def all_logits(
    model: TLModel,
    data: TaskData,
    batch_size: int = 256,
    run_context: RunContext | None = None,
    seed: int = 0,
) -> Float[Tensor, "prompt 2"]:
    """The logits of the two candidates for every prompt, in the order of the prompts.

    Args:
        batch_size: the largest number of prompts to run at a time. It changes nothing but rounding.
        run_context: the context in which each batch runs; by default the model runs as it is.
        seed: decides which other prompt each prompt is resampled from, if the context resamples and
            `data` has no partners yet; see `TaskData.with_partners`.

    Raises:
        UnsupportedError: if the model sees padding, and the prompts of a pair differ in length.
    """
    return in_batches(task_logits, model, data, batch_size, run_context, seed)


@checked()
@torch.no_grad()
def all_next_token_logits(
    model: TLModel,
    data: TaskData,
    batch_size: int = 256,
    run_context: RunContext | None = None,
    seed: int = 0,
) -> Float[Tensor, "prompt d_vocab"]:
    """The logits of all tokens after every prompt.

    For the arguments and errors see `all_logits`.
    """
    return in_batches(next_token_logits, model, data, batch_size, run_context, seed)


def in_batches(
    logits_of: Callable[[TLModel, TaskData], Tensor],
    model: TLModel,
    data: TaskData,
    batch_size: int,
    run_context: RunContext | None,
    seed: int,
) -> Float[Tensor, "prompt token"]:
    """What `logits_of` returns for all batches, in the order of the prompts."""
    batches = prompt_batches(model, data, batch_size, seed)
    logits = []
    for batch in batches:
        context = run_context(batch.data) if run_context else nullcontext()
        with context:
            logits.append(logits_of(model, batch.data))
    by_pair = torch.cat(logits).unflatten(0, (-1, 2))
    original_order = torch.cat([batch.pairs for batch in batches]).argsort()
    return by_pair[original_order].flatten(0, 1)


@dataclass(frozen=True)
class PromptBatch:
    """Some pairs of a task that run together.

    Attributes:
        pairs: the numbers of the pairs among all pairs of the task.
        data: their prompts.
    """

    pairs: Int[Tensor, " pair"]
    data: TaskData


def prompt_batches(
    model: TLModel, data: TaskData, batch_size: int, seed: int = 0
) -> list[PromptBatch]:
    """All pairs in batches of at most `batch_size` prompts, but at least one pair.

    Each prompt has a partner for resample ablation, drawn with this seed from all prompts, so that
    it does not depend on the batches. Only a single pair has none.
    """
    data = data.partnered(seed)
    batches = []
    for pairs in _batches(model, data, max(1, batch_size // 2)):
        batches.append(PromptBatch(pairs, data.pairs(pairs)))
    return batches


def _batches(model: TLModel, data: TaskData, n_pairs: int) -> list[Int[Tensor, " pair"]]:
    """The indices of the pairs of each batch, at most `n_pairs`."""
    pair_lengths = data.last.view(-1, 2).amax(1)
    by_length = pair_lengths.argsort(stable=True)
    if not sees_padding(model):
        # Pairs of similar length run together, so that little computation is spent on padding.
        return list(by_length.split(n_pairs))
    of_length = defaultdict[int, list[int]](list)
    for pair in by_length.tolist():
        of_length[int(pair_lengths[pair])].append(pair)
    batches: list[Tensor] = []
    for pairs in of_length.values():
        batches.extend(torch.tensor(pairs, device=by_length.device).split(n_pairs))
    return batches


@checked()
def sees_padding(model: TLModel) -> bool:
    """Whether positions of the model attend to later ones, and so to the padding on the right."""
    if getattr(model.cfg, "attention_dir", "causal") != "causal":
        return True
    wrapped = getattr(model, "original_model", None)
    hf_config = getattr(wrapped, "config", None)
    return bool(
        getattr(hf_config, "is_encoder_decoder", False)
        or getattr(hf_config, "is_causal", True) is False
    )


@checked()
def check_padding(model: TLModel, last: Int[Tensor, " prompt"]) -> None:
    """Check that the logits after the last tokens do not depend on the padding behind them.

    Args:
        last: the position of each prompt's last token.

    Raises:
        UnsupportedError: if the model sees padding, and the prompts differ in length.
    """
    if sees_padding(model) and bool((last != last[0]).any()):
        lengths = sorted(set((last + 1).tolist()))
        raise UnsupportedError(
            "this model attends to later positions, so padding would change its answers: the "
            f"prompts of a batch must have the same length, not {lengths} tokens"
        )


@checked()
@torch.no_grad()
def resampled(
    model: TLModel, data: TaskData, names: Collection[str], seed: int = 0
) -> dict[str, Float[Tensor, "prompt pos *node"]]:
    """The values at which the nodes are held in resample ablation.

    For each prompt, these are the activations at the hook points `names` on its partner, another
    prompt of the task. Each position is held at the value of the same position; where the partner
    is shorter, at the value of the partner's last position.

    Args:
        seed: the seed of the partners, if `data` has none yet; see `TaskData.with_partners`.

    Raises:
        TaskError: if `data` has no partners, and only one pair to draw them from.
        UnsupportedError: if the model would see the padding of the partners.
    """
    partners = data.partners or data.drawn_partners(seed)
    n_positions = int(data.last.max()) + 1
    tokens = partners.tokens[:, :n_positions]
    check_padding(model, torch.cat([data.last, partners.last]))
    with holding_reads(model), recording(model, names) as activations:
        logits_at_all_positions(model, tokens)
    if bool((partners.last >= n_positions - 1).all()):
        return activations
    positions = torch.arange(n_positions, device=tokens.device)
    positions = positions.minimum(partners.last[:, None])
    rows = torch.arange(len(tokens), device=tokens.device)[:, None]
    return {name: activation[rows, positions] for name, activation in activations.items()}


@checked()
@torch.no_grad()
def full_norm_scales(model: TLModel, data: TaskData) -> dict[str, Float[Tensor, "prompt pos 1"]]:
    """The scales of the norms in the full model, at every position of the prompts.

    Raises:
        UnsupportedError: if the scales of this model cannot be held; see `norm_scale_hooks`.
    """
    with holding_reads(model), recording(model, norm_scale_hooks(model)) as scales:
        logits_at_all_positions(model, data.trimmed().tokens)
    return scales
