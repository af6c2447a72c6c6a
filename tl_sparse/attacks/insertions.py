"""Insertions that fool the program: the search for them at all places, and their tests."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tl_sparse.attacks.asking import Asker
from tl_sparse.attacks.materials import declared_materials, python_materials
from tl_sparse.attacks.questions import BY_TASK, Question, question_of
from tl_sparse.attacks.searching import Budget, Material, Pieces, PlaceSearch, Tried
from tl_sparse.attacks.testing import (
    LEAST_SHARE,
    Changed,
    Step,
    Tested,
    ask,
    family_of,
    inserted,
    random_texts,
)
from tl_sparse.tasks import (
    Pair,
    Task,
    WholePair,
    draw_pairs,
    is_built_in,
    too_few_pairs,
    whole_pairs,
)

#: Every text is tried in so many prompts, on which the program must be right before.
N_QUESTIONS = 8
#: For each of them, so many are drawn.
DRAWS_PER_QUESTION = 4
#: An insertion must fool the program on this share of them.
LEAST_FOOLED = 0.25
#: How often a text is inserted in the tests.
STRENGTHS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Draws:
    """Pairs of the task.

    Attributes:
        searched: those of the search.
        fresh: those on which insertions are tested.
    """

    searched: Sequence[Pair | WholePair]
    fresh: Sequence[Pair | WholePair]

    @property
    def pairs(self) -> list[Pair]:
        """All of them, without what follows their prompts."""
        pairs = []
        for each in (*self.searched, *self.fresh):
            pairs.append(each.pair if isinstance(each, WholePair) else each)
        return pairs

    @property
    def cues(self) -> list[str]:
        """The parts in which the prompts of the first pair differ."""
        questions = [question_of(self.searched[0], side) for side in (0, 1)]
        return [question.prompt[slice(*question.cue)] for question in questions]


def draws_of(task: Task, n_test: int, seed: int) -> Draws:
    """Different pairs for the search and for the tests.

    Raises:
        TaskError: if the task has less than four pairs.
    """
    n_searched = N_QUESTIONS * DRAWS_PER_QUESTION
    n_pairs = n_searched + n_test
    drawn: Sequence[Pair | WholePair]
    if is_built_in(task):
        drawn = whole_pairs(task, n_pairs, seed)
    else:
        drawn = draw_pairs(task, n_pairs, seed)
    if len(drawn) < 4:
        raise too_few_pairs(task, len(drawn), 4, 0)
    n_searched = min(n_searched, len(drawn) - min(n_test, len(drawn) // 2))
    return Draws(drawn[:n_searched], drawn[n_searched:][:n_test])


@dataclass(frozen=True)
class Insertion:
    """A text that fools the program at a place.

    Attributes:
        side: the right answer of the prompts, 0 or 1.
        material: the place.
        best: the text.
        others: all other texts that were tried there.
    """

    side: int
    material: Material
    best: Tried
    others: list[Pieces]


def search_insertions(
    asker: Asker,
    task: Task,
    draws: Draws,
    neutral: Sequence[str],
    budget: Budget,
    rng: random.Random,
) -> list[Insertion]:
    """The best insertion at each place, of each source and for each right answer.

    All of these share the budget evenly; what one of them leaves goes to the next ones.
    """
    found = []
    searches = []
    for side in (0, 1):
        questions = _answered_questions(asker, draws.searched, side)
        if not questions:
            continue  # the program errs on all prompts before any change
        materials = declared_materials(neutral, questions)
        if is_built_in(task):
            materials += python_materials(task, questions, asker.tokenizer, rng)
        for material in materials:
            if material.pieces:
                searches.append(PlaceSearch(asker, questions, material, rng))
    for number, search in enumerate(searches):
        search.run(budget, budget.prompts // (len(searches) - number))
        best = search.best()
        if best is not None and best.fooled >= LEAST_FOOLED:
            others = [tried.pieces for tried in search.tried if tried.pieces != best.pieces]
            side = search.questions[0].side
            found.append(Insertion(side, search.material, best, others))
    return _various(found)


def _various(found: Sequence[Insertion]) -> list[Insertion]:
    """The strongest insertions first, of which no two are alike; then the other ones."""
    by_strength = sorted(found, key=lambda insertion: insertion.best.fooled, reverse=True)
    first: dict[tuple[str, str], Insertion] = {}
    others = []
    for insertion in by_strength:
        kind = (insertion.material.place.name, insertion.material.source)
        if kind in first:
            others.append(insertion)
        else:
            first[kind] = insertion
    return [*first.values(), *others]


def _answered_questions(
    asker: Asker, drawn: Sequence[Pair | WholePair], side: int
) -> list[Question]:
    """Prompts with this right answer on which the program is right."""
    questions = [question_of(each, side) for each in drawn]
    rows = asker.rows([question.prompt for question in questions])
    is_right = asker.program_differences(rows, [side] * len(rows)) > 0
    answered = [each for each, right in zip(questions, is_right.tolist(), strict=True) if right]
    return answered[:N_QUESTIONS]


def tested_insertion(
    asker: Asker, insertion: Insertion, draws: Draws, rng: random.Random
) -> Tested:
    """What an insertion does to fresh prompts, by strength, beside random insertions."""
    material, text = insertion.material, insertion.best.text
    questions = [question_of(each, insertion.side) for each in draws.fresh]
    steps = []
    for strength in STRENGTHS:
        texts = [text * strength] * len(questions)
        asked = ask(asker, inserted(questions, material, texts))
        if len(asked) < LEAST_SHARE * len(questions):
            break
        beside = None
        if insertion.others:
            n_tokens = strength * asker.n_tokens(text)
            others = random_texts(asker, insertion.others, n_tokens, len(questions), rng)
            beside = ask(asker, inserted(questions, material, others))
        steps.append(Step(strength, asked, beside))
    family = family_of(
        asker,
        steps,
        description=f"insert {_shown(text)} n times {material.place.name}",
        right=insertion.side,
        unchanged=ask(asker, [Changed(each, each.prompt, BY_TASK) for each in questions]),
    )
    family = replace(family, place=material.place.name, text=text, source=material.source)
    return Tested(family, steps)


def _shown(text: str) -> str:
    """A text in a description; many equal characters by their number."""
    is_run = len(text) > 3 and len(set(text)) == 1
    return f"{text[0]!r} × {len(text)}" if is_run else repr(text)
