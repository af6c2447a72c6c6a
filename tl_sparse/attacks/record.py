"""What an attack found, as plain values."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tl_sparse.errors import CheckpointError, DataError
from tl_sparse.evaluation import Estimate
from tl_sparse.files import read_json, write_json
from tl_sparse.records import record_from


@dataclass(frozen=True)
class RandomTrial:
    """Prompts into which random text was inserted, at the same place and about as long.

    Attributes:
        n_prompts: the number of prompts.
        n_tokens: the mean number of their tokens.
        program_errs, model_errs: the share on which the program, or the model, errs.
        model_difference: the model's logit of the right answer minus that of the wrong one.
    """

    n_prompts: int
    n_tokens: float
    program_errs: Estimate
    model_errs: Estimate
    model_difference: Estimate


@dataclass(frozen=True)
class Trial:
    """Fresh prompts that were changed with one strength.

    Shares and differences are means over prompts, each of a pair of its own.

    Attributes:
        strength: how often the text is inserted, or how many lines of context there are.
        n_prompts: the number of prompts that fit the context, with answers that are known.
        n_tokens: the mean number of their tokens.
        program_errs, model_errs: the share on which the program, or the model, errs.
        program_difference, model_difference: the logit of the right answer minus that of the wrong
            one.
        n_predicted: the number of prompts on which the program errs.
        n_held: of these, the number on which the model errs as well.
        holds: the latter divided by the former; None if the program errs on none.
        random: random changes of the same kind and length; None if there are no others.
    """

    strength: int
    n_prompts: int
    n_tokens: float
    program_errs: Estimate
    model_errs: Estimate
    program_difference: Estimate
    model_difference: Estimate
    n_predicted: int
    n_held: int
    holds: Estimate | None
    random: RandomTrial | None


@dataclass(frozen=True)
class Example:
    """A changed prompt on which the program errs.

    Attributes:
        strength: that of the change.
        prompt: its text.
        right, wrong: the candidates.
        program_difference, model_difference: the logit of the right answer minus that of the wrong
            one.
    """

    strength: int
    prompt: str
    right: str
    wrong: str
    program_difference: float
    model_difference: float


@dataclass(frozen=True)
class FoolingFamily:
    """A kind of change of prompts, with one parameter, its strength.

    Attributes:
        description: what is changed; n in it is the strength.
        right: the right answer of all prompts; None if both answers occur.
        place: where text is inserted; empty if the prompts are drawn anew.
        text: the text that is inserted.
        source: where the pieces of the text are from.
        known_by: how the right answer is known.
        unchanged: the same prompts before the change, with strength 0; None if drawn anew.
        trials: what happens at each strength.
        examples: some prompts on which the program errs, first those that fool the model too, at
            the least strength that fools both half as often as any.
    """

    description: str
    right: str | None
    place: str
    text: str
    source: str
    known_by: str
    unchanged: Trial | None
    trials: list[Trial]
    examples: list[Example]


@dataclass(frozen=True)
class Prediction:
    """How often the model errs where the program does, over all changed prompts that were tested.

    Standard errors allow for several prompts being made of the same one.

    Attributes:
        n_prompts: the number of prompts.
        n_predicted: the number on which the program errs.
        n_held: of these, the number on which the model errs as well.
        holds: the latter divided by the former; None if the program errs on none.
        elsewhere: the share on which the model errs of those on which the program does not; None if
            there are none.
        n_random: the number of prompts with random changes.
        random: the share of them on which the model errs; None without any.
    """

    n_prompts: int
    n_predicted: int
    n_held: int
    holds: Estimate | None
    elsewhere: Estimate | None
    n_random: int
    random: Estimate | None


@dataclass(frozen=True)
class Attack:
    """What an attack on a circuit found.

    Attributes:
        model, task: the names of the model and of the task.
        circuit: the hash of the circuit.
        seed: the seed of everything random.
        n_nodes: the number of the circuit's nodes.
        answers: the two candidates.
        cues: the parts in which the prompts of one pair differ.
        n_searched: the number of prompts that the search ran on the program.
        n_tested: the number of fresh prompts that ran on both the program and the model.
        seconds: how long all of it took.
        grammar: what happens on draws of the task, and on systematic variations of them.
        families: insertions that the search found to fool the program. First come those that fool
            both it and the model much more often than random changes fool the model.
        prediction: how often the model errs where the program does.
        notes: what was left out, and why.
    """

    model: str
    task: str
    circuit: str
    seed: int
    n_nodes: int
    answers: list[str]
    cues: list[str]
    n_searched: int
    n_tested: int
    seconds: float
    grammar: list[FoolingFamily]
    families: list[FoolingFamily]
    prediction: Prediction
    notes: list[str]

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Write a JSON file.

        Raises:
            CheckpointError: if the file cannot be written.
            ConfigError: if there is a file with other contents, and `overwrite` is False.
        """
        write_json(path, asdict(self), overwrite)

    @classmethod
    def load(cls, path: str | Path) -> "Attack":
        """Read a file that `save` wrote.

        Raises:
            CheckpointError: if it is missing, damaged, or not an attack.
        """
        values = read_json(Path(path))
        try:
            return cls.from_dict(values)
        except (DataError, ValueError) as error:
            raise CheckpointError(f"{path} is damaged, or not an attack: {error}") from error

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Attack":
        """The inverse of `dataclasses.asdict`.

        Raises:
            DataError: if an entry is missing or has the wrong type.
        """
        return record_from(cls, values)
