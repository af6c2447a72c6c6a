"""Searching for texts that fool the program when they are inserted into prompts."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from time import monotonic

from tqdm.auto import tqdm

from tl_sparse.attacks.asking import Asker
from tl_sparse.attacks.questions import Place, Question, how_known

#: A text is a sequence of pieces, such as tokens, so that it can be mutated.
Pieces = tuple[str, ...]

#: Texts are repeated up to about this number of tokens while they are compared.
INSERTED_TOKENS = 24
#: What a place inserts beside the text takes at most so many tokens.
_SPARE_TOKENS = 3
#: The number of texts that run together, and of the best ones that are mutated.
_GENERATION, _N_PARENTS = 32, 12
#: The largest number of pieces of a text.
_MOST_PIECES = 6
#: Proposals whose right answer is not known, or that are not new, cost less than prompts: so many
#: are allowed for one text that is tried, and at least so many in all.
_REFUSALS_PER_TEXT, _LEAST_REFUSALS = 20, 300


@dataclass(frozen=True)
class Material:
    """What is inserted at a place, and from what texts are made.

    Attributes:
        place: the place.
        first: the texts that are tried first.
        pieces: what mutated texts are made of.
        known_by: the rule by which right answers are known; None if Python's parser must say.
        source: where the pieces are from.
    """

    place: Place
    first: Sequence[Pieces]
    pieces: Sequence[str]
    known_by: str | None
    source: str


@dataclass(frozen=True)
class Tried:
    """A text that was tried.

    Attributes:
        pieces: the text.
        fooled: the share of the prompts on which the program then errs.
        difference: the mean logit of the right answer minus that of the wrong one.
    """

    pieces: Pieces
    fooled: float
    difference: float

    @property
    def text(self) -> str:
        """The text as it is inserted once."""
        return "".join(self.pieces)


@dataclass
class Budget:
    """What is left of the prompts and of the time.

    Attributes:
        prompts: how many prompts may still run.
        deadline: when the search must end, as `time.monotonic` tells it; None for no limit.
        bar: shows how many prompts have run.
        n_spent: how many have run.
    """

    prompts: int
    deadline: float | None
    bar: "tqdm[None]"
    n_spent: int = 0

    def spend(self, n_prompts: int) -> None:
        """Count prompts that run."""
        self.prompts -= n_prompts
        self.n_spent += n_prompts
        self.bar.update(n_prompts)

    @property
    def is_left(self) -> bool:
        """Whether more prompts may run."""
        in_time = self.deadline is None or monotonic() < self.deadline
        return self.prompts > 0 and in_time


@dataclass
class PlaceSearch:
    """The search for texts that fool the program at one place.

    Attributes:
        asker: the program.
        questions: prompts into which every text is inserted, all with the same right answer.
        material: the place, and from what texts are made.
        rng: the random generator.
        tried: every text that was run; the right answers with it are known.
    """

    asker: Asker
    questions: Sequence[Question]
    material: Material
    rng: random.Random
    tried: list[Tried] = field(default_factory=list)
    _seen: set[Pieces] = field(default_factory=set)
    _n_refused: int = 0

    def run(self, budget: Budget, n_prompts: int) -> None:
        """Try texts on about `n_prompts` prompts, unless nothing new is found.

        First come the given texts, for at most half of the prompts, and then mutations of the best.
        """
        first = list(self.material.first)
        self.rng.shuffle(first)
        end = budget.n_spent + n_prompts
        while budget.is_left and budget.n_spent < end:
            if budget.n_spent > end - n_prompts / 2:
                first.clear()
            generation = self._generation(first)
            if not generation:
                break
            self._try(generation, budget)

    def best(self) -> Tried | None:
        """The text that fools the program most often; of those that fool it as often, the shortest.

        Right answers must be known in all prompts, and not only in the first one.
        """
        in_order = sorted(self.tried, key=_rank)
        for tried in in_order[:_GENERATION]:
            if self._known_in_all(tried.pieces):
                return tried
        return None

    def repeats(self, pieces: Pieces) -> int:
        """How often a text is repeated while texts are compared."""
        return max(1, self._room // max(1, self.asker.n_tokens("".join(pieces))))

    @cached_property
    def _room(self) -> int:
        """The number of tokens that are inserted."""
        rows = self.asker.rows([question.prompt for question in self.questions])
        return min(INSERTED_TOKENS, self.asker.n_ctx - max(map(len, rows)) - _SPARE_TOKENS)

    def _generation(self, first: list[Pieces]) -> list[Pieces]:
        """New texts with which the right answer to the first question is known."""
        parents = sorted(self.tried, key=_rank)[:_N_PARENTS]
        generation: list[Pieces] = []
        allowed = max(_LEAST_REFUSALS, _REFUSALS_PER_TEXT * len(self.tried))
        while len(generation) < _GENERATION and self._n_refused < allowed:
            if first:
                proposed = first.pop()
            else:
                proposed = self._mutated(parents)
            if proposed in self._seen or not self._is_known(self.questions[0], proposed):
                self._n_refused += 1
            else:
                generation.append(proposed)
            self._seen.add(proposed)
        return generation

    def _mutated(self, parents: Sequence[Tried]) -> Pieces:
        """A new text from one of the best ones."""
        new = self.rng.choice(self.material.pieces)
        if not parents:
            return (new,)
        pieces = list(self.rng.choice(parents).pieces)
        at = self.rng.randrange(len(pieces) + 1)
        action = self.rng.random()
        if action < 0.4:
            pieces.insert(at, new)
        elif action < 0.6:
            pieces[at % len(pieces)] = new
        elif action < 0.8:
            pieces += self.rng.choice(parents).pieces
        else:
            del pieces[at % len(pieces)]
        return tuple(pieces[:_MOST_PIECES]) or (new,)

    def _try(self, generation: Sequence[Pieces], budget: Budget) -> None:
        prompts: list[str] = []
        for pieces in generation:
            text = "".join(pieces) * self.repeats(pieces)
            prompts += [self.material.place.changed(each, text) for each in self.questions]
        rows = self.asker.rows(prompts)
        n_questions = len(self.questions)
        fits = [len(row) <= self.asker.n_ctx for row in rows]
        rows = [row[: self.asker.n_ctx] for row in rows]
        sides = [question.side for question in self.questions] * len(generation)
        differences = self.asker.program_differences(rows, sides)
        budget.spend(len(rows))
        for number, pieces in enumerate(generation):
            chosen = slice(number * n_questions, (number + 1) * n_questions)
            if all(fits[chosen]):
                of_text = differences[chosen]
                fooled = float((of_text <= 0).float().mean())
                self.tried.append(Tried(pieces, fooled, float(of_text.mean())))

    def _is_known(self, question: Question, pieces: Pieces) -> bool:
        """Whether the right answer is known, and is still one token after the prompt."""
        text = "".join(pieces) * self.repeats(pieces)
        prompt = self.material.place.changed(question, text)
        if self.material.known_by is None and how_known(question, prompt) is None:
            return False
        (row,) = self.asker.rows([prompt])
        return self.asker.can_ask(prompt, row)

    def _known_in_all(self, pieces: Pieces) -> bool:
        return all(self._is_known(question, pieces) for question in self.questions)


def _rank(tried: Tried) -> tuple[float, int, float]:
    """Sorts the texts that fool the program most often, and then the shortest, to the front."""
    return -round(tried.fooled, 1), len(tried.pieces), tried.difference
