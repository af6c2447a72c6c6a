"""The explanation of a circuit: what was found for each node and head, and what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tl_sparse.circuits import hash_of_circuit, hash_of_model
from tl_sparse.errors import CheckpointError, CircuitError, DataError
from tl_sparse.evaluation import Estimate
from tl_sparse.explanations.measures import EXPLAINED, Fit, Levels
from tl_sparse.files import read_json, write_json
from tl_sparse.parsing import printable
from tl_sparse.records import record_from

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor

    from tl_sparse.circuits import Circuit
    from tl_sparse.hooks import TLModel
    from tl_sparse.programs import PythonProgram
    from tl_sparse.tasks import Task

#: Longer expressions are left out in comments.
IN_COMMENTS = 160
#: The file of an explanation.
EXPLANATION_JSON = "explanation.json"


@dataclass(frozen=True)
class Shorter:
    """An expression that is shorter than the one that was chosen, and fits less well.

    Attributes:
        expression: the expression.
        size: the number of its symbols.
        explained: the explained variance on the data for fitting.
    """

    expression: str
    size: int
    explained: float


@dataclass(frozen=True)
class Replaced:
    """The task on held-out prompts while nodes have the values of expressions.

    Attributes:
        loss: the loss between the two answers, in nats.
        accuracy: the share of the prompts with the right answer.
    """

    loss: Estimate
    accuracy: Estimate


@dataclass(frozen=True)
class NodeExplanation:
    """The expression of a node, and how good it is.

    Attributes:
        node: the node, such as "0.attn_v h3.7".
        name: its name in expressions.
        expression: the expression.
        size: the number of its symbols: names, functions, operators, numbers and tokens.
        whole_size: the same, with the expressions of all nodes that it names written out.
        origin: "found" by the search, or the user's "own".
        depends_on: what the values under the circuit depend on: "nothing", "token", "position",
            "token and position", or "earlier tokens".
        levels: two numbers that explain most of the values.
        text: how well the expression fits on held-out text; None without a corpus. What it names
            has the values of its expressions.
        prompts: the same on held-out prompts of the task.
        given_others: the explained variance on all of these together if what the expression names
            has its true values: how good the expression is by itself.
        in_circuit: the task under the circuit if the node has the value of the expression.
        in_model: the same in the full model.
        held_in_circuit: for comparison, under the circuit if the node is held at its mean.
        held_in_model: for comparison, in the full model if the node is held at its mean.
        shorter: shorter expressions that fit less well.
    """

    node: str
    name: str
    expression: str
    size: int
    whole_size: int
    origin: str
    depends_on: str
    levels: Levels
    text: Fit | None
    prompts: Fit
    given_others: float
    in_circuit: Replaced
    in_model: Replaced
    held_in_circuit: Replaced
    held_in_model: Replaced
    shorter: list[Shorter] = field(default_factory=list)

    @property
    def score(self) -> float:
        """The lower of the scores on text and on prompts, where they are defined."""
        scores = []
        for fit in (self.text, self.prompts):
            if fit is not None and fit.score is not None:
                scores.append(fit.score)
        return min(scores, default=0.0)

    @property
    def is_explained(self) -> bool:
        """Whether the score is at least 0.9 on text and on prompts."""
        return self.score >= EXPLAINED


@dataclass(frozen=True)
class HeadExplanation:
    """What a head looks at under the circuit.

    Attributes:
        layer, head: the head.
        phrase: which tokens it looks at, from which, in words.
        covered: the share of the attention that the phrase covers on held-out data.
        evenly: for comparison, the share that it would cover if all tokens so far got the same.
        nothing: the share that the attention sink takes.
        score: the score of each earlier token as an expression, of which the pattern is the
            softmax; None for models that are not of tl_sparse.
        nothing_score: the score of the attention sink beside it; None without `score`.
        overlap: the share of the attention, with that of the sink, which this pattern puts where
            the head does, on held-out data; None without `score`.
        looks_at: the tokens that get most of it: each with its share, and its share of the tokens.
    """

    layer: int
    head: int
    phrase: str
    covered: float
    evenly: float
    nothing: float
    score: str | None
    nothing_score: float | None
    overlap: float | None
    looks_at: list[LooksAt]


@dataclass(frozen=True)
class LooksAt:
    """A token that a head looks at.

    Attributes:
        token: the token, as expressions write it.
        share: the share of the head's attention that it gets, on held-out data.
        frequency: the share that it has of the tokens to which the head could look.
    """

    token: str
    share: float
    frequency: float


@dataclass(frozen=True)
class Swapped:
    """The full model on held-out text with patterns of expressions in the circuit's heads.

    Attributes:
        n_heads: how many heads are swapped.
        n_all_heads: how many the model has.
        model: the perplexity of the model as it is.
        swapped: its perplexity with the patterns of the expressions.
        evenly: for comparison, with even attention in these heads.
        held: for comparison, with their outputs held at their means.
    """

    n_heads: int
    n_all_heads: int
    model: float
    swapped: float
    evenly: float
    held: float


@dataclass(frozen=True)
class Explanation:
    """The expressions of all nodes of a circuit.

    Attributes:
        model, task: the names of both.
        seed: the seed of the draws of text and prompts.
        n_pairs: the number of held-out pairs of prompts.
        n_rows: the number of held-out rows of text; 0 without a corpus.
        no_text: why there is no text; empty if there is.
        contents: "circuit", "model", "prompts", "text" → the hash of its contents.
        nodes: the nodes, in the order of the forward pass.
        heads: the heads.
        model_alone: the task in the full model.
        circuit_alone: the task under the circuit.
        all_replaced: the task if all nodes of the circuit have the values of their expressions.
        nothing_kept: for comparison, if all of them are held at their means.
        swapped: the full model with the heads' patterns of expressions; None without text or where
            no head has an expression.
        seconds: how long it took.
        subject: what was explained, for `test`; None for an explanation that was read from a file.
    """

    model: str
    task: str
    seed: int
    n_pairs: int
    n_rows: int
    no_text: str
    contents: dict[str, str]
    nodes: list[NodeExplanation]
    heads: list[HeadExplanation]
    model_alone: Replaced
    circuit_alone: Replaced
    all_replaced: Replaced
    nothing_kept: Replaced
    swapped: Swapped | None
    seconds: float
    subject: Any = field(default=None, compare=False, repr=False)

    @property
    def names(self) -> dict[str, str]:
        """Node → its name in expressions, which is an identifier in Python."""
        return {node.node: node.name for node in self.nodes}

    @property
    def share_explained(self) -> float:
        """The share of the nodes whose expressions explain at least 0.9 of them."""
        if not self.nodes:
            return 1.0
        return sum(node.is_explained for node in self.nodes) / len(self.nodes)

    def __getitem__(self, node: str) -> NodeExplanation:
        """The explanation of a node, by its name in the circuit or in expressions."""
        for each in self.nodes:
            if str(node) in (each.node, each.name):
                return each
        known = ", ".join(each.node for each in self.nodes)
        raise DataError(f"no node {str(node)!r} is explained; there are {known}")

    def test(
        self,
        node: str,
        expression: str,
        circuit: Circuit | None = None,
        model: TLModel | None = None,
        *,
        task: Task | str | None = None,
        corpus: Int[Tensor, "seq pos"] | None = None,
    ) -> NodeExplanation:
        """Measure an expression of the user's own for a node, as those that were found.

        Args:
            node: the node, by its name in the circuit or in expressions.
            expression: the expression; it may name earlier nodes.
            circuit: the circuit, which an explanation that was read from a file needs.
            model: the model of the circuit, likewise.
            task: the task, if `explain` was given one.
            corpus: the text, if `explain` was given some.

        Raises:
            DataError: if there is no such node, or the text is not an expression; or if text and
                prompts are others than those of the explanation.
            ConfigError: if the circuit and model are needed.
            CircuitError: if they are others than those of the explanation.
        """
        from tl_sparse.explanations.explaining import Source, tested

        return tested(self, node, expression, Source(circuit, model, task, corpus))

    def to_python(
        self,
        circuit: Circuit,
        model: TLModel,
        tokens: Sequence[int] | Int[Tensor, " logit"] | None = None,
    ) -> PythonProgram:
        """`circuit.to_python` with the names of this explanation, and some of its expressions.

        Comments have those expressions of reads that are short, and those of the user's own.

        Args:
            circuit: the circuit that is explained.
            model: its model.
            tokens: the tokens whose logits are wanted; by default all.

        Raises:
            CircuitError: if the circuit or the model is another than that of the explanation.
            TLSparseError: whatever `circuit.to_python` refuses.
        """
        self.check(circuit, model)
        comments = {}
        for node in self.nodes:
            # What depends on earlier nodes is as clear in the program itself.
            is_table = node.depends_on in ("token", "position", "token and position")
            is_clear = is_table and node.is_explained and len(node.expression) <= IN_COMMENTS
            if node.origin == "own" or (is_clear and node.node.split()[0].endswith("_in")):
                comments[node.node] = f"{node.name} = {printable(node.expression)}"
        return circuit.with_labels(comments).to_python(model, tokens, self.names)

    def check(self, circuit: Circuit, model: TLModel) -> None:
        """Check that this is the explanation of a circuit.

        Raises:
            CircuitError: if the circuit or the model is another one.
        """
        now = {"circuit": hash_of_circuit(circuit), "model": hash_of_model(model)}
        for what, content in now.items():
            if self.contents.get(what) != content:
                raise CircuitError(f"the explanation is of another {what} than this one")

    def to_json(self) -> dict[str, Any]:
        """All but `subject`, as plain JSON values."""
        values = {}
        for each in fields(self):
            if each.name != "subject":
                values[each.name] = _plain(getattr(self, each.name))
        return values

    def save(self, path: str | Path) -> None:
        """Write the explanation as JSON.

        Args:
            path: a file ending in .json, or a folder, which gets explanation.json.

        Raises:
            CheckpointError, ConfigError: if it cannot be written.
        """
        write_json(_file(path), self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Explanation:
        """Read an explanation that `save` wrote.

        Raises:
            CheckpointError: if the file is missing, damaged, or not an explanation.
        """
        file = _file(path)
        values = read_json(file)
        try:
            return record_from(cls, {**values, "subject": None})
        except (DataError, ValueError) as error:
            raise CheckpointError(f"{file} is damaged, or not an explanation: {error}") from error

    def __str__(self) -> str:
        from tl_sparse.explanations.text import explanation_text

        return explanation_text(self)


def shortened(expression: str, longest: int) -> str:
    """An expression as text, cut short if it has more characters than `longest`."""
    text = printable(expression)
    return text if len(text) <= longest else f"{text[:longest]}… ({len(text):,} characters)"


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [asdict(each) for each in value]
    return asdict(value) if hasattr(value, "__dataclass_fields__") else value


def _file(path: str | Path) -> Path:
    path = Path(path)
    return path if path.suffix == ".json" else path / EXPLANATION_JSON
