"""What is inserted into prompts, and where."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tl_sparse.attacks.questions import (
    AFTER_THE_CUE,
    AT_THE_BEGINNING,
    AT_THE_END,
    BEFORE_THE_CUE,
    BEFORE_THE_LAST_WORD,
    BY_DECLARATION,
    IN_A_COMMENT,
    Place,
    Question,
)
from tl_sparse.attacks.searching import Material, Pieces
from tl_sparse.tasks import Task, token_ids, whole_statements

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

#: Where the pieces of texts are from.
STATEMENTS = "whole statements"
OWN_PARTS = "parts of the task's own prompts"
TOKENS = "any tokens"
DECLARED = "texts that were declared neutral"
#: The number of whole statements that are tried.
N_STATEMENTS = 200
#: At most so many tokens of the vocabulary are tried.
MOST_TOKENS = 4000
#: The longest part of the task's own prompts that is tried, in tokens.
LONGEST_SPAN = 4


def python_materials(
    task: Task,
    questions: Sequence[Question],
    tokenizer: PreTrainedTokenizerFast,
    rng: random.Random,
) -> list[Material]:
    """What is inserted into prompts of a built-in task; Python's parser tells right answers."""
    statements = []
    for statement in whole_statements(task, N_STATEMENTS, rng.randrange(2**31)):
        statements.append(statement + "\n")
    vocabulary = token_texts(tokenizer, rng)
    in_one_line = [text for text in vocabulary if "\n" not in text]
    of_prompts = spans_of_last_lines(questions, tokenizer)
    in_prompts = [pieces[0] for pieces in of_prompts if len(pieces) == 1]
    materials = [
        Material(AT_THE_BEGINNING, singles(statements), statements, None, STATEMENTS),
        Material(IN_A_COMMENT, singles(in_one_line), in_one_line, None, TOKENS),
    ]
    places = [AFTER_THE_CUE, BEFORE_THE_CUE, BEFORE_THE_LAST_WORD, AT_THE_END]
    for place in different_places(places, questions):
        materials.append(Material(place, of_prompts, in_prompts, None, OWN_PARTS))
        materials.append(Material(place, singles(vocabulary), vocabulary, None, TOKENS))
    return materials


def declared_materials(neutral: Sequence[str], questions: Sequence[Question]) -> list[Material]:
    """Texts that the user has declared neutral, at every place within a prompt."""
    if not neutral:
        return []
    texts = list(dict.fromkeys(neutral))
    materials = []
    places = [AFTER_THE_CUE, BEFORE_THE_CUE, BEFORE_THE_LAST_WORD]
    for place in different_places(places, questions):
        materials.append(Material(place, singles(texts), texts, BY_DECLARATION, DECLARED))
    return materials


def different_places(places: Sequence[Place], questions: Sequence[Question]) -> list[Place]:
    """The places, without those that are the same as an earlier one in all questions."""
    found: dict[tuple[int, ...], Place] = {}
    for place in places:
        found.setdefault(tuple(map(place.offset, questions)), place)
    return list(found.values())


def singles(texts: Sequence[str]) -> list[Pieces]:
    """Each text as a sequence of one piece."""
    return [(text,) for text in texts]


def token_texts(tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> list[str]:
    """The texts of the tokens that are printable, or end a line; of a large vocabulary, a part."""
    tokens = sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids))
    if len(tokens) > MOST_TOKENS:
        tokens = rng.sample(tokens, MOST_TOKENS)
    texts = []
    for token in tokens:
        text = tokenizer.decode([token])
        # Part of a character decodes to the replacement character.
        if (
            text
            and text.replace("\n", "").isprintable()
            and "\N{REPLACEMENT CHARACTER}" not in text
        ):
            texts.append(text)
    return texts


def spans_of_last_lines(
    questions: Sequence[Question], tokenizer: PreTrainedTokenizerFast
) -> list[Pieces]:
    """All short sequences of tokens in the last lines of the prompts."""
    found: dict[Pieces, None] = {}
    for question in questions:
        last_line = question.prompt.rstrip("\n").rsplit("\n", 1)[-1]
        ids = token_ids(tokenizer, last_line)
        pieces = [tokenizer.decode([token]) for token in ids]
        for length in range(1, LONGEST_SPAN + 1):
            for start in range(len(pieces) - length + 1):
                found[tuple(pieces[start : start + length])] = None
    return list(found)
