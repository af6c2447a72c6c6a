"""Prompts whose right answer is known, also after text is inserted.

An answer is called right only if one of these rules says so, and the rule is named beside it:

- `BY_TASK`: the prompt is a draw of the task, or of its held-out contexts.
- `BY_STATEMENTS`: with the right answer and the code that follows it, the changed text is Python
  whose last statements are those of the unchanged text. So comments, spaces, or whole statements
  before it are all that was inserted.
- `BY_PARSER`: with the right answer and the code that follows it, the changed text is valid Python;
  with the wrong answer and what follows that, it is not.
- `BY_DECLARATION`: the user says that the text changes no right answer.
"""

import ast
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile

from tl_sparse.tasks import Pair, WholePair

BY_TASK = "the prompts are draws of the task or of its held-out contexts"
BY_STATEMENTS = "the statements of the prompt are the same as before, says Python's parser"
BY_PARSER = "with the code that follows each answer, only the right one gives valid Python"
BY_DECLARATION = "the inserted texts were declared neutral"


@dataclass(frozen=True)
class Question:
    """A prompt of a pair.

    Attributes:
        prompt: its text.
        side: the right answer, 0 or 1.
        cue: where the part begins and ends in which the prompts of the pair differ.
        right_ending, wrong_ending: the right answer with the code that follows it, and the wrong
            answer with what follows the other prompt; empty if the task does not tell.
    """

    prompt: str
    side: int
    cue: tuple[int, int]
    right_ending: str = ""
    wrong_ending: str = ""


def question_of(drawn: Pair | WholePair, side: int) -> Question:
    """The prompt of a pair to which answer `side` is right."""
    if isinstance(drawn, WholePair):
        cue = _cue(drawn.pair.prompts, side)
        right, wrong = drawn.endings[side], drawn.endings[1 - side]
        return Question(drawn.pair.prompts[side], side, cue, right, wrong)
    return Question(drawn.prompts[side], side, _cue(drawn.prompts, side))


def _cue(prompts: tuple[str, str], side: int) -> tuple[int, int]:
    """Where the prompts differ, in whole words."""
    prompt, other = prompts[side], prompts[1 - side]
    start = _n_common(prompt, other)
    end = len(prompt) - _n_common(prompt[start:][::-1], other[start:][::-1])
    # Letters that two different words have in common belong to the words.
    while _is_in_a_word(prompt, start):
        start -= 1
    while _is_in_a_word(prompt, end):
        end += 1
    return start, end


def _n_common(first: str, second: str) -> int:
    """The number of characters that two texts have in common at their beginning."""
    pairs = zip(first, second, strict=False)
    return len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))


def _is_in_a_word(text: str, at: int) -> bool:
    """Whether the characters before and after a place belong to one word."""
    return 0 < at < len(text) and (text[at - 1] + text[at]).replace("_", "a").isalnum()


@dataclass(frozen=True)
class Place:
    """Where text is inserted.

    Attributes:
        name: how a description says it.
        offset: the number of characters of a question's prompt that stand before the inserted text.
        before, after: what is inserted on both sides of the text.
    """

    name: str
    offset: Callable[[Question], int]
    before: str = ""
    after: str = ""

    def changed(self, question: Question, text: str) -> str:
        """The prompt with the text inserted."""
        at = self.offset(question)
        prompt = question.prompt
        return f"{prompt[:at]}{self.before}{text}{self.after}{prompt[at:]}"


def _before_the_cue(question: Question) -> int:
    return len(question.prompt[: question.cue[0]].rstrip(" "))


def _before_the_last_line(question: Question) -> int:
    return question.prompt.rstrip("\n").rfind("\n") + 1


def _before_the_last_word(question: Question) -> int:
    prompt = question.prompt
    start = len(prompt) - 1
    while _is_in_a_word(prompt, start):
        start -= 1
    return len(prompt[:start].rstrip(" "))


AT_THE_BEGINNING = Place("on lines of its own at the beginning", lambda question: 0)
IN_A_COMMENT = Place("in a comment above the last line", _before_the_last_line, "#", "\n")
BEFORE_THE_CUE = Place("before the cue", _before_the_cue)
AFTER_THE_CUE = Place("after the cue", lambda question: question.cue[1])
BEFORE_THE_LAST_WORD = Place("before the last word or sign", _before_the_last_word)
AT_THE_END = Place("at the end", lambda question: len(question.prompt))


def how_known(question: Question, changed: str) -> str | None:
    """The rule by which the answer that is right before a change is right after it, or None.

    Args:
        question: the question before the change.
        changed: the prompt after it.
    """
    before = _statements(question.prompt + question.right_ending)
    after = _statements(changed + question.right_ending)
    if before is None or after is None:
        return None
    if after[-len(before) :] == before:
        return BY_STATEMENTS
    if _statements(changed + question.wrong_ending) is None:
        return BY_PARSER
    return None


@lru_cache(maxsize=4096)
def _statements(text: str) -> tuple[str, ...] | None:
    """The statements of a text, written as syntax trees; None if it is no valid Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as that of "0 is 0"
            body = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return tuple(map(ast.dump, body))
