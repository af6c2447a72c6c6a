"""Testing a kind of change on fresh prompts: does the model err where the program errs?"""

import math
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_sparse.attacks.asking import Asker
from tl_sparse.attacks.questions import Question, how_known
from tl_sparse.attacks.record import (
    Example,
    FoolingFamily,
    Prediction,
    RandomTrial,
    Trial,
)
from tl_sparse.attacks.searching import Material, Pieces
from tl_sparse.evaluation import Estimate, mean_of

#: A strength is left out if fewer than this share of the prompts fit the context with it, and have
#: answers that are known.
LEAST_SHARE = 0.5
#: A family has at most so many examples.
N_EXAMPLES = 3


@dataclass(frozen=True, eq=False)
class Asked:
    """The answers of the program and of the model to some prompts.

    Attributes:
        origins: for each prompt, the one that it was made of.
        prompts: their texts.
        sides: the right answer to each, 0 or 1.
        n_tokens: the number of tokens of each.
        program, model: the logit of the right answer minus that of the wrong one.
        rules: the rules by which right answers are known.
    """

    origins: list[str]
    prompts: list[str]
    sides: list[int]
    n_tokens: Float[Tensor, " prompt"]
    program: Float[Tensor, " prompt"]
    model: Float[Tensor, " prompt"]
    rules: list[str]

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def predicted(self) -> Bool[Tensor, " prompt"]:
        """Where the program errs; a tie is an error."""
        return self.program <= 0

    @property
    def failed(self) -> Bool[Tensor, " prompt"]:
        """Where the model errs."""
        return self.model <= 0


@dataclass(frozen=True, eq=False)
class Step:
    """The answers to prompts that were changed with one strength.

    Attributes:
        strength: the strength.
        asked: the answers.
        beside: those to random changes; None if there are no others.
    """

    strength: int
    asked: Asked
    beside: Asked | None

    @property
    def both(self) -> float:
        """The share of the prompts on which both the program and the model err."""
        return float((self.asked.predicted & self.asked.failed).float().mean())

    @property
    def beyond_random(self) -> float:
        """The same, minus the share of the random changes on which the model errs.

        Without any, nothing tells that the model would not err on all of them.
        """
        if self.beside is None or len(self.beside) == 0:
            return self.both - 1.0
        return self.both - float(self.beside.failed.float().mean())


@dataclass(frozen=True, eq=False)
class Tested:
    """A family, and the answers behind its numbers.

    Attributes:
        family: the family.
        steps: the answers, by strength.
    """

    family: FoolingFamily
    steps: list[Step]

    @property
    def asked(self) -> list[Asked]:
        """The answers to changed prompts."""
        return [step.asked for step in self.steps]

    @property
    def beside(self) -> list[Asked]:
        """The answers to random changes."""
        return [step.beside for step in self.steps if step.beside is not None]

    @property
    def n_prompts(self) -> int:
        """The number of prompts that were asked."""
        return sum(map(len, (*self.asked, *self.beside)))


@dataclass(frozen=True)
class Changed:
    """A prompt after a change.

    Attributes:
        question: the prompt before.
        prompt: the prompt after.
        rule: how its right answer is known.
    """

    question: Question
    prompt: str
    rule: str


def inserted(
    questions: Sequence[Question], material: Material, texts: Sequence[str]
) -> list[Changed]:
    """The prompts into which these texts are inserted, one in each, whose answers are known."""
    found = []
    for question, text in zip(questions, texts, strict=True):
        prompt = material.place.changed(question, text)
        rule = material.known_by or how_known(question, prompt)
        if rule is not None:
            found.append(Changed(question, prompt, rule))
    return found


def ask(asker: Asker, changed: Sequence[Changed]) -> Asked:
    """Ask about those prompts that fit the context, and after which both answers are one token."""
    kept = []
    rows = []
    for each, row in zip(changed, asker.rows([each.prompt for each in changed]), strict=True):
        if asker.can_ask(each.prompt, row):
            kept.append(each)
            rows.append(row)
    sides = [each.question.side for each in kept]
    return Asked(
        origins=[each.question.prompt for each in kept],
        prompts=[each.prompt for each in kept],
        sides=sides,
        n_tokens=torch.tensor([float(len(row)) for row in rows]),
        program=asker.program_differences(rows, sides),
        model=asker.model_differences(rows, sides),
        rules=sorted({each.rule for each in kept}),
    )


def random_texts(
    asker: Asker, others: Sequence[Pieces], n_tokens: int, n_texts: int, rng: random.Random
) -> list[str]:
    """Random ones of these texts, each repeated to about that number of tokens."""
    texts = []
    for _ in range(n_texts):
        text = "".join(rng.choice(others))
        repeats = max(1, round(n_tokens / max(1, asker.n_tokens(text))))
        texts.append(text * repeats)
    return texts


def family_of(
    asker: Asker,
    steps: list[Step],
    description: str,
    right: int | None,
    unchanged: Asked | None = None,
) -> FoolingFamily:
    """The family of these steps, in which nothing is inserted; for the arguments see there."""
    rules: set[str] = set()
    for step in steps:
        rules.update(step.asked.rules)
    return FoolingFamily(
        description=description,
        right=None if right is None else asker.answers[right],
        place="",
        text="",
        source="",
        known_by="; or ".join(sorted(rules)),
        unchanged=None if unchanged is None else _trial(Step(0, unchanged, None)),
        trials=[_trial(step) for step in steps],
        examples=_examples(asker, steps),
    )


def _trial(step: Step) -> Trial:
    asked, beside = step.asked, step.beside
    n_predicted = int(asked.predicted.sum())
    return Trial(
        strength=step.strength,
        n_prompts=len(asked),
        n_tokens=float(asked.n_tokens.mean()),
        program_errs=_share(asked.predicted),
        model_errs=_share(asked.failed),
        program_difference=mean_of(asked.program),
        model_difference=mean_of(asked.model),
        n_predicted=n_predicted,
        n_held=int((asked.predicted & asked.failed).sum()),
        holds=_share(asked.failed[asked.predicted]) if n_predicted else None,
        random=_random_trial(beside) if beside is not None and len(beside) > 0 else None,
    )


def _random_trial(asked: Asked) -> RandomTrial:
    return RandomTrial(
        n_prompts=len(asked),
        n_tokens=float(asked.n_tokens.mean()),
        program_errs=_share(asked.predicted),
        model_errs=_share(asked.failed),
        model_difference=mean_of(asked.model),
    )


def _share(are: Bool[Tensor, " prompt"]) -> Estimate:
    return mean_of(are.float())


def _examples(asker: Asker, steps: Sequence[Step]) -> list[Example]:
    """Some prompts on which the program errs; first those on which the model errs too.

    They are of the least strength that fools both, or else the program, half as often as any.
    """
    if not steps:
        return []
    shares = [step.both for step in steps]
    if max(shares) == 0:
        shares = [float(step.asked.predicted.float().mean()) for step in steps]
    enough = [number for number, share in enumerate(shares) if share >= max(shares) / 2]
    step = steps[enough[0]]
    asked = step.asked
    rows = asked.predicted.nonzero()[:, 0].tolist()
    rows.sort(key=lambda row: float(asked.model[row]))
    found = []
    for row in rows[:N_EXAMPLES]:
        side = asked.sides[row]
        found.append(
            Example(
                strength=step.strength,
                prompt=asked.prompts[row],
                right=asker.answers[side],
                wrong=asker.answers[1 - side],
                program_difference=float(asked.program[row]),
                model_difference=float(asked.model[row]),
            )
        )
    return found


def prediction(tested: Sequence[Tested]) -> Prediction:
    """How often the model errs where the program does, over all prompts that were tested."""
    asked = [each for family in tested for each in family.asked]
    beside = [each for family in tested for each in family.beside]
    predicted = _joined([each.predicted for each in asked])
    failed = _joined([each.failed for each in asked])
    origins = [origin for each in asked for origin in each.origins]
    random_failed = _joined([each.failed for each in beside])
    random_origins = [origin for each in beside for origin in each.origins]
    return Prediction(
        n_prompts=len(origins),
        n_predicted=int(predicted.sum()),
        n_held=int((predicted & failed).sum()),
        holds=_share_among(failed, predicted, origins),
        elsewhere=_share_among(failed, ~predicted, origins),
        n_random=len(random_origins),
        random=_share_among(random_failed, torch.ones_like(random_failed), random_origins),
    )


def _joined(parts: Sequence[Bool[Tensor, " prompt"]]) -> Bool[Tensor, " prompt"]:
    return torch.cat([torch.zeros(0, dtype=torch.bool), *parts])


def _share_among(
    are: Bool[Tensor, " prompt"], among: Bool[Tensor, " prompt"], origins: Sequence[str]
) -> Estimate | None:
    """The share of some prompts that have a property; None if there are none.

    Prompts that are made of the same one depend on each other. The standard error is that of a
    ratio of two sums over such groups (Cochran, Sampling Techniques, 1977, section 6.3).
    """
    n_among = int(among.sum())
    if n_among == 0:
        return None
    share = int((are & among).sum()) / n_among
    deviations: dict[str, float] = defaultdict(float)
    for is_one, counts, origin in zip(are.tolist(), among.tolist(), origins, strict=True):
        if counts:
            deviations[origin] += is_one - share
    n_groups = len(deviations)
    if n_groups < 2:
        return Estimate(share, None)
    squares = sum(deviation**2 for deviation in deviations.values())
    standard_error = math.sqrt(squares * n_groups / (n_groups - 1)) / n_among
    return Estimate(share, standard_error)
