"""The task and the text while nodes have the values of expressions instead of their own."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_sparse.circuits import Node
from tl_sparse.errors import DataError
from tl_sparse.evaluation import all_logits, logits_at_all_positions, mean_of_pairs
from tl_sparse.explanations.expressions import Expression
from tl_sparse.explanations.record import Replaced, Swapped
from tl_sparse.explanations.samples import pattern_hook
from tl_sparse.explanations.sequences import Values, values_of
from tl_sparse.explanations.subject import Subject
from tl_sparse.hooks import ablating, hooked
from tl_sparse.tasks import TaskData, task_loss_and_accuracy

#: Prompts of similar length run together, so many at a time.
BATCH_SIZE = 32
#: A function from tokens to the values of some nodes.
ValuesOn = Callable[[Int[Tensor, "seq pos"]], Mapping[Node, Values]]
#: A head's pattern as expressions: the score of each earlier token, and of looking at nothing.
PatternExpression = tuple[Expression, float]


def replaced(
    subject: Subject, data: TaskData, values_on: ValuesOn | None, under_circuit: bool
) -> Replaced:
    """The task on these prompts.

    Args:
        values_on: the values that nodes have instead of their own; None leaves them as they are.
        under_circuit: whether all other nodes are held, or the full model runs.
    """

    @contextmanager
    def hold(batch: TaskData) -> Iterator[None]:
        held: AbstractContextManager[None] = nullcontext()
        if under_circuit:
            held = subject.under_circuit()
        with held:
            if values_on is None:
                yield
                return
            tokens = batch.trimmed().tokens
            with _with_values(subject, values_on(tokens)):
                yield

    device = next(subject.model.parameters()).device
    logits = all_logits(subject.model, data.to(device), BATCH_SIZE, run_context=hold).cpu()
    losses, is_right = task_loss_and_accuracy(logits, data.correct.cpu())
    return Replaced(mean_of_pairs(losses), mean_of_pairs(is_right.float()))


@contextmanager
def _with_values(subject: Subject, values: Mapping[Node, Values]) -> Iterator[None]:
    """Within the context, these nodes have these values at each position."""
    circuit = subject.circuit
    masks = circuit.masks_of(values)
    full: dict[str, Tensor] = {}
    hooks = circuit.hooks
    for node, of_node in values.items():
        name = hooks[node.layer, node.location]
        shape = circuit.kept[name].shape
        if name not in full:
            full[name] = torch.zeros(*of_node.shape, *shape, dtype=of_node.dtype)
        full[name].view(*of_node.shape, -1)[..., node.index] = of_node
    device = next(subject.model.parameters()).device
    held = {name: masks[name].to(device) for name in full}
    with ablating(subject.model, held, {name: value.to(device) for name, value in full.items()}):
        yield


def all_expressions(subject: Subject) -> ValuesOn:
    """The values of the expressions of all nodes."""
    return subject.values_on


def one_expression(subject: Subject, node: Node, expression: Expression) -> ValuesOn:
    """The values of an expression of one node."""
    return lambda tokens: {node: values_of(expression, subject.sequences_of(tokens))}


def means_on(subject: Subject, nodes: Iterable[Node]) -> ValuesOn:
    """The means of these nodes, for comparison."""
    circuit = subject.circuit
    chosen = list(nodes)

    def values_on(tokens: Int[Tensor, "seq pos"]) -> Mapping[Node, Values]:
        values = {}
        for node in chosen:
            mean = circuit.means[circuit.hooks[node.layer, node.location]].flatten()[node.index]
            values[node] = torch.full(tokens.shape, float(mean), dtype=torch.float64)
        return values

    return values_on


# --- heads in the full model


def swapped(
    subject: Subject,
    patterns: Mapping[tuple[int, int], PatternExpression],
    tokens: Int[Tensor, "seq pos"],
) -> Swapped:
    """The perplexity of the full model with the patterns of these expressions in their heads."""
    cfg = subject.model.cfg
    heads: dict[int, list[int]] = {}
    for layer, head in patterns:
        heads.setdefault(layer, []).append(head)
    return Swapped(
        n_heads=len(patterns),
        n_all_heads=cfg.n_layers * cfg.n_heads,
        model=_perplexity(subject, tokens, lambda rows: nullcontext()),
        swapped=_perplexity(subject, tokens, partial(_with_patterns, subject, patterns)),
        evenly=_perplexity(subject, tokens, partial(_evenly, subject, heads)),
        held=_perplexity(subject, tokens, partial(_with_means, subject, heads)),
    )


@torch.no_grad()
def _perplexity(
    subject: Subject,
    tokens: Int[Tensor, "seq pos"],
    context: Callable[[Int[Tensor, "seq pos"]], AbstractContextManager[None]],
) -> float:
    """exp of the mean cross-entropy of the next token, in a context for each batch of rows."""
    if tokens.shape[1] < 2:
        raise DataError("rows of text need at least two tokens, to predict the second one")
    device = next(subject.model.parameters()).device
    total = 0.0
    for rows in tokens.split(16):
        rows = rows.to(device)
        with context(rows):
            logits = logits_at_all_positions(subject.model, rows)[:, :-1].float()
        total += float(
            torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum"
            )
        )
    return float(torch.tensor(total / tokens[:, 1:].numel(), dtype=torch.float64).exp())


@contextmanager
def _with_patterns(
    subject: Subject,
    patterns: Mapping[tuple[int, int], PatternExpression],
    tokens: Int[Tensor, "seq pos"],
) -> Iterator[None]:
    sequences = subject.sequences_of(tokens)
    made = {}
    for head, (score, nothing) in patterns.items():
        made[head] = sequences.pattern(score, nothing).float()
    with hooked(subject.model, _setting_patterns(made)):
        yield


@contextmanager
def _evenly(
    subject: Subject, heads: Mapping[int, list[int]], tokens: Int[Tensor, "seq pos"]
) -> Iterator[None]:
    n_seq, n_pos = tokens.shape
    even = torch.ones(n_pos, n_pos).tril()
    even = (even / even.sum(1, keepdim=True)).expand(n_seq, -1, -1)
    made = {(layer, head): even for layer, of_layer in heads.items() for head in of_layer}
    with hooked(subject.model, _setting_patterns(made)):
        yield


def _setting_patterns(
    made: Mapping[tuple[int, int], Float[Tensor, "seq query key"]],
) -> dict[str, Callable[[Tensor, object], Tensor]]:
    """Functions at the hook points of the patterns that set those of some heads."""

    def set_heads(layer: int, pattern: Tensor, hook: object) -> Tensor:
        pattern = pattern.clone()
        for (of_layer, head), values in made.items():
            if of_layer == layer:
                pattern[:, head] = values.to(pattern)
        return pattern

    return {pattern_hook(layer): partial(set_heads, layer) for layer, _ in made}


@contextmanager
def _with_means(
    subject: Subject, heads: Mapping[int, list[int]], tokens: Int[Tensor, "seq pos"]
) -> Iterator[None]:
    """Within the context, the outputs z of the heads are held at their means."""
    masks = {}
    for layer, of_layer in heads.items():
        name = f"blocks.{layer}.attn.hook_z"
        mask = torch.zeros_like(subject.circuit.means[name], dtype=torch.bool)
        mask[of_layer] = True
        masks[name] = mask
    with ablating(subject.model, masks, subject.circuit.means):
        yield
