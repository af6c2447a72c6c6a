"""Where a circuit begins and ends: the tokens of its task, and the logits of the two answers."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher

from jaxtyping import Float
from torch import Tensor

from tl_sparse.arguments import checked
from tl_sparse.circuits.nodes import Node
from tl_sparse.hooks import TLModel
from tl_sparse.tasks import Task, make_task_data, token_ids


@dataclass(frozen=True)
class EndWeight:
    """A nonzero weight between a token and a node that reads or writes the residual stream.

    Attributes:
        token: the id of the token.
        node: a read, for an entry of the embedding; a write, for an entry of the unembedding.
        weight: the entry. That of the unembedding includes the weight of the final norm, but not
            its scale.
    """

    token: int
    node: Node
    weight: float


@dataclass(frozen=True)
class TaskEnds:
    """The tokens and answers of a task, and the weights that join them to nodes of a circuit.

    Attributes:
        tokens: the ids of the tokens of one pair in which its prompts differ, and of its answers.
        candidates: the ids of the two answers.
        embed: the weights between the tokens and the reads.
        unembed: the weights between the writes and the candidates.
    """

    tokens: list[int] = field(default_factory=list)
    candidates: list[int] = field(default_factory=list)
    embed: list[EndWeight] = field(default_factory=list)
    unembed: list[EndWeight] = field(default_factory=list)


@checked()
def task_ends(model: TLModel, nodes: Iterable[Node], task: Task) -> TaskEnds:
    """The ends of a task for a circuit of these nodes.

    Weights of the embedding are in the order of the tokens, those of the unembedding in the order
    of the nodes. Positional channels have neither.

    Raises:
        TaskError, TokenizerError: if the task does not fit the model's tokenizer.
    """
    tokens, candidates = task_tokens(model, task)
    in_channels = [node for node in nodes if node.index < model.cfg.d_model]
    embed = []
    for token, row in zip(tokens, model.embed.W_E[tokens].tolist(), strict=True):
        for node in in_channels:
            if node.is_read and row[node.index]:
                embed.append(EndWeight(token, node, row[node.index]))
    unembed = []
    for node in in_channels:
        if node.is_write:
            weights = unembedding(model, node.index)[candidates].tolist()
            for token, weight in zip(candidates, weights, strict=True):
                if weight:
                    unembed.append(EndWeight(token, node, weight))
    return TaskEnds(tokens, candidates, embed, unembed)


@checked()
def task_tokens(model: TLModel, task: Task) -> tuple[list[int], list[int]]:
    """The tokens of one pair of the task that a description of its circuit shows.

    Returns:
        The tokens in which the two prompts differ, followed by the two candidates; and the two
        candidates alone.

    Raises:
        TaskError, TokenizerError: if the task does not fit the model's tokenizer.
    """
    data = make_task_data(task, model.tokenizer, n_pairs=1, seed=0)
    first, second = data.prompts
    first_tokens = token_ids(model.tokenizer, first)
    second_tokens = token_ids(model.tokenizer, second)
    candidates = data.candidates[0].tolist()
    tokens = _differing_tokens(first_tokens, second_tokens)
    without_repeats = dict.fromkeys(tokens + candidates)
    return list(without_repeats), candidates


def _differing_tokens(first: Sequence[int], second: Sequence[int]) -> list[int]:
    """The tokens in which two prompts differ.

    Prompts of the same length are compared position by position. In others, tokens are inserted or
    missing, and what follows them is the same.
    """
    tokens: list[int] = []
    if len(first) == len(second):
        for in_first, in_second in zip(first, second, strict=True):
            if in_first != in_second:
                tokens += [in_first, in_second]
        return tokens
    matcher = SequenceMatcher(None, first, second, autojunk=False)
    for operation, start, end, other_start, other_end in matcher.get_opcodes():
        if operation != "equal":
            tokens += [*first[start:end], *second[other_start:other_end]]
    return tokens


@checked()
def unembedding(model: TLModel, channel: int) -> Float[Tensor, " vocab"]:
    """The contribution to each logit of a 1 in this channel, without the final norm's scale."""
    row: Tensor = model.unembed.W_U.detach()[channel]
    norm = getattr(model.ln_final, "w", getattr(model.ln_final, "weight", None))
    if norm is None:
        return row
    return norm.detach()[channel] * row


@checked()
def has_bigram_table(model: TLModel) -> bool:
    """Whether the logits have a share, of the last token alone, that no node carries."""
    return bool(getattr(getattr(model, "sparse_cfg", None), "bigram_table", False))


@checked()
def why_no_nodes(model: TLModel) -> str:
    """What it means that a circuit of `model` has no nodes."""
    alone = "the embedding of the last token alone reaches"
    if has_bigram_table(model):
        alone = "the bigram table and the embedding of the last token alone reach"
    return (
        f"the circuit has no nodes: with every node at its mean, {alone} the target loss, so there "
        "is nothing to find"
    )


@checked()
def residual_joins(nodes: list[Node]) -> list[tuple[Node, Node]]:
    """The pairs of a write and a later read of the same residual channel.

    `nodes` must be in the order of the forward pass.
    """
    joins = []
    for i, write in enumerate(nodes):
        if not write.is_write:
            continue
        for read in nodes[i + 1 :]:
            if read.is_read and read.index == write.index:
                joins.append((write, read))
    return joins
