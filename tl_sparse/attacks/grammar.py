"""Draws of the task itself, and systematic variations of them."""

from collections.abc import Sequence
from dataclasses import dataclass

from tl_sparse.attacks.asking import Asker
from tl_sparse.attacks.questions import BY_TASK, question_of
from tl_sparse.attacks.testing import (
    LEAST_SHARE,
    Asked,
    Changed,
    Step,
    Tested,
    ask,
    family_of,
)
from tl_sparse.tasks import (
    ContextKind,
    Pair,
    Task,
    WholePair,
    context_tells_sides,
    draw_pairs,
    held_out_contexts,
    is_built_in,
    whole_pairs,
)

#: Numbers of lines of context.
N_LINES = (1, 3, 5, 9, 17, 33)


@dataclass(frozen=True)
class Variation:
    """A kind of prompts of the task, for one or more numbers of lines of context.

    Attributes:
        description: what the prompts are.
        right: the right answer, 0 or 1; None for both in turn.
        n_lines: the numbers of lines; only 0 if they are not varied.
        kind: the kind of held-out context.
        side: the answer that all lines of context show.
    """

    description: str
    right: int | None = None
    n_lines: tuple[int, ...] = (0,)
    kind: ContextKind | None = None
    side: int | None = None


def variations(task: Task, answers: tuple[str, str]) -> list[Variation]:
    """The kinds of prompts that are tried; of tasks that are not built in, only its own draws."""
    found = [Variation("draws of the task")]
    if not is_built_in(task):
        return found
    for kind, of_kind in held_out_contexts(task).items():
        title = of_kind.name.removeprefix(task.name).strip(" ()")
        found.append(Variation(f"held-out contexts: {title}", kind=kind))
    found.append(Variation("n lines of context, which show both answers", n_lines=N_LINES))
    if context_tells_sides(task):
        for right in (0, 1):
            description = f"n lines of context, all of which show {answers[1 - right]!r}"
            found.append(Variation(description, right, N_LINES, side=1 - right))
    return found


def tested_variation(
    asker: Asker, task: Task, variation: Variation, n_test: int, seed: int
) -> Tested:
    """What happens on these prompts, beside as many lines of context that show both answers."""
    steps = []
    for n_lines in variation.n_lines:
        asked = _asked(asker, task, variation, n_lines, n_test, seed)
        if len(asked) < LEAST_SHARE * n_test:
            break
        beside = None
        if variation.side is not None:
            balanced = Variation("", variation.right)
            beside = _asked(asker, task, balanced, n_lines, n_test, seed + 1)
        steps.append(Step(n_lines, asked, beside))
    family = family_of(asker, steps, variation.description, variation.right)
    return Tested(family, steps)


def _asked(
    asker: Asker, task: Task, variation: Variation, n_lines: int, n_test: int, seed: int
) -> Asked:
    changed = []
    for number, pair in enumerate(_drawn(task, variation, n_lines, n_test, seed)):
        right = number % 2 if variation.right is None else variation.right
        question = question_of(pair, right)
        changed.append(Changed(question, question.prompt, BY_TASK))
    return ask(asker, changed)


def _drawn(
    task: Task, variation: Variation, n_lines: int, n_test: int, seed: int
) -> Sequence[Pair | WholePair]:
    if variation.kind is not None:
        return whole_pairs(task, n_test, seed, kind=variation.kind)
    if n_lines > 0:
        return whole_pairs(task, n_test, seed, n_lines=n_lines, side=variation.side)
    return draw_pairs(task, n_test, seed)
