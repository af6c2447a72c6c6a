"""What expressions are fitted and judged on: prompts and text, each in two halves."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_sparse.circuits import Circuit, Node, holding_reads
from tl_sparse.errors import DataError, TaskError, UnsupportedError
from tl_sparse.evaluation import logits_at_all_positions, sees_padding
from tl_sparse.explanations.expressions import TokenLiteral
from tl_sparse.explanations.parsing import Vocabulary
from tl_sparse.explanations.sequences import Sequences, Values
from tl_sparse.hooks import TLModel, recording
from tl_sparse.pruning import as_corpus, heldout_pairs
from tl_sparse.tasks import Task, TaskData, telling_tokens

#: The rows of the corpus in each half; longer rows are divided, so that no row is longer than this.
ROWS, ROW_LENGTH = 128, 128
#: The pairs of prompts in each half.
PAIRS = 64
#: Every token of a vocabulary up to this size is run once, since text has not all of them.
MOST_TOKENS = 4096


@dataclass(eq=False)
class Sample:
    """Sequences, and the values that nodes have on them under the circuit.

    Attributes:
        name: "text", "prompts" or "tokens".
        sequences: the sequences.
        values: node → its values.
        patterns: (layer, head) → its attention pattern.
        data: the prompts; None for text.
    """

    name: str
    sequences: Sequences
    values: dict[Node, Values]
    patterns: dict[tuple[int, int], Float[Tensor, "seq query key"]]
    data: TaskData | None = None

    def real(self, values: Values) -> Float[Tensor, " value"]:
        """The values at real tokens, in a row."""
        return values[self.sequences.is_real]


@dataclass(frozen=True, eq=False)
class Samples:
    """The samples on which expressions are fitted, and those on which they are judged.

    Attributes:
        fit: prompts, text if there is a corpus, and every token once in the smallest sequence.
        heldout: other prompts and other text.
        vocabulary: the texts of the model's tokens.
        no_text: why there is no text; empty if there is.
    """

    fit: list[Sample]
    heldout: list[Sample]
    vocabulary: Vocabulary
    no_text: str

    def all(self) -> list[Sample]:
        """All samples."""
        return [*self.fit, *self.heldout]

    @property
    def heldout_prompts(self) -> TaskData:
        """The prompts on which losses are measured."""
        for sample in self.heldout:
            if sample.data is not None:
                return sample.data
        raise TaskError("there are no prompts")

    @cached_property
    def telling(self) -> set[TokenLiteral]:
        """The tokens that tell the prompts of a pair apart, as expressions name them."""
        tokens = telling_tokens(self.heldout_prompts)
        return {self.vocabulary.literal_of(token) for token in tokens}

    @property
    def heldout_text(self) -> Int[Tensor, "seq pos"] | None:
        """The text on which perplexities are measured; None if there is none."""
        for sample in self.heldout:
            if sample.data is None:
                return sample.sequences.tokens
        return None


def draw_samples(
    circuit: Circuit,
    model: TLModel,
    task: Task | str | None,
    corpus: Int[Tensor, "seq pos"] | None,
    seed: int,
) -> Samples:
    """Draw the samples, and record the values of the circuit's nodes under it.

    Raises:
        UnsupportedError: if positions of the model attend to later ones.
        CircuitError, TaskError, DataError, TokenizerError: if there are not two pairs of prompts.
    """
    if sees_padding(model):
        raise UnsupportedError(
            "positions of this model attend to later ones, and expressions only look back"
        )
    data = heldout_pairs(circuit, model, task)
    if data.n_pairs < 2:
        raise TaskError(
            f"task {data.task} has one held-out pair; two are needed, to fit expressions and to "
            "judge them"
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(data.n_pairs, generator=generator)
    half = min(PAIRS, data.n_pairs // 2)
    parts = [order[:half], order[half : half + PAIRS]]
    vocabulary = vocabulary_of(model)
    runs = _Recorder(circuit, model, vocabulary)
    halves: list[list[Sample]] = []
    texts, no_text = _text(model, corpus, generator)
    for pairs, text in zip(parts, texts, strict=True):
        prompts = runs.prompts(data.pairs(pairs).trimmed())
        halves.append([prompts] if text is None else [prompts, runs.text("text", text)])
    if len(vocabulary.texts) <= MOST_TOKENS and model.cfg.n_ctx > 1:
        first = data.tokens[0, 0].cpu().expand(len(vocabulary.texts))
        every_token = torch.stack([first, torch.arange(len(vocabulary.texts))], dim=1)
        halves[0].append(runs.text("tokens", every_token))
    return Samples(halves[0], halves[1], vocabulary, no_text)


def vocabulary_of(model: TLModel) -> Vocabulary:
    """The texts of the model's tokens; of a model without a tokenizer, all are empty."""
    n_tokens = int(model.cfg.d_vocab)
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        return Vocabulary.of_texts([""] * n_tokens)
    texts = tokenizer.batch_decode(
        [[token] for token in range(n_tokens)], clean_up_tokenization_spaces=False
    )
    return Vocabulary.of_texts(texts)


def _text(
    model: TLModel, corpus: Int[Tensor, "seq pos"] | None, generator: torch.Generator
) -> tuple[list[Int[Tensor, "seq pos"] | None], str]:
    """Two halves of text, or None and why there is none."""
    try:
        rows = as_corpus(corpus, model)
    except DataError as error:
        if corpus is not None:
            raise
        return [None, None], str(error)
    if len(rows) < 2:
        return [None, None], "the corpus has only one row, and two are needed"
    rows = rows[torch.randperm(len(rows), generator=generator)].cpu().long()
    half = min(ROWS, len(rows) // 2)
    return [rows[:half, :ROW_LENGTH], rows[half : half + ROWS, :ROW_LENGTH]], ""


@dataclass(frozen=True)
class _Recorder:
    """Records what the nodes of a circuit do under it."""

    circuit: Circuit
    model: TLModel
    vocabulary: Vocabulary

    def prompts(self, data: TaskData) -> Sample:
        data = data.to("cpu")
        positions = torch.arange(data.tokens.shape[1])
        sequences = Sequences(data.tokens, positions <= data.last[:, None], self.vocabulary)
        return self._sample("prompts", sequences, data)

    def text(self, name: str, tokens: Int[Tensor, "seq pos"]) -> Sample:
        is_real = torch.ones_like(tokens, dtype=torch.bool)
        return self._sample(name, Sequences(tokens, is_real, self.vocabulary), None)

    def _sample(self, name: str, sequences: Sequences, data: TaskData | None) -> Sample:
        nodes = self.circuit.nodes
        heads = heads_of(self.circuit)
        values, patterns = node_values(self.circuit, self.model, sequences.tokens, nodes, heads)
        return Sample(name, sequences, values, patterns, data)


def heads_of(circuit: Circuit) -> list[tuple[int, int]]:
    """The (layer, head) of each head with kept nodes."""
    heads = set()
    hooks = circuit.hooks
    for node in circuit.nodes:
        mask = circuit.kept[hooks[node.layer, node.location]]
        if mask.ndim == 2:
            heads.add((node.layer, node.index // mask.shape[1]))
    return sorted(heads)


@torch.no_grad()
def node_values(
    circuit: Circuit,
    model: TLModel,
    tokens: Int[Tensor, "seq pos"],
    nodes: Iterable[Node],
    heads: Iterable[tuple[int, int]] = (),
    under_circuit: bool = True,
) -> tuple[dict[Node, Values], dict[tuple[int, int], Float[Tensor, "seq query key"]]]:
    """The values of nodes and the patterns of heads, under the circuit or in the full model."""
    nodes, heads = list(nodes), list(heads)
    hooks = circuit.hooks
    cut = circuit.cut_edges(model) if under_circuit else []
    names = {hooks[node.layer, node.location] for node in nodes}
    names |= {pattern_hook(layer) for layer, _ in heads}
    values: dict[Node, list[Tensor]] = {node: [] for node in nodes}
    patterns: dict[tuple[int, int], list[Tensor]] = {head: [] for head in heads}
    device = next(model.parameters()).device
    for rows in tokens.split(32):
        held: AbstractContextManager[None] = nullcontext()
        if under_circuit:
            held = circuit.holding(model, circuit.dropped, circuit.means, cut)
        with held, holding_reads(model), recording(model, names) as activations:
            logits_at_all_positions(model, rows.to(device))
        for node in nodes:
            at = activations[hooks[node.layer, node.location]].flatten(2)
            values[node].append(at[..., node.index].double().cpu())
        for layer, head in heads:
            patterns[layer, head].append(activations[pattern_hook(layer)][:, head].float().cpu())
    joined = {node: torch.cat(parts) for node, parts in values.items()}
    return joined, {head: torch.cat(parts) for head, parts in patterns.items()}


def pattern_hook(layer: int) -> str:
    """The hook point of the attention patterns of a layer."""
    return f"blocks.{layer}.attn.hook_pattern"
