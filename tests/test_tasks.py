"""Tasks: what a prompt looks like, the checks on pairs, and the loss."""

import ast
import math
import random
import re
from collections import Counter, defaultdict
from itertools import pairwise, takewhile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_sparse.errors import DataError, TaskError, TokenizerError
from tl_sparse.idioms import PAIRS, Writer, both_sides, idiom_documents
from tl_sparse.tasks import TASKS, Task, candidate_logits, get_task, make_task_data, task_loss_and_accuracy
from tl_sparse.tokenizer import train_tokenizer

QUOTES = TASKS["single_double_quote"]
CANDIDATES = sorted({candidate for task in TASKS.values() for candidate in task.candidates})
#: The tokens that differ within a pair of a task: at most so many, from the first such token to the last.
DIFFERING = {
    "final_kwarg": 10, "set_or_string": 25, "set_or_string_fixedvarname": 25, "class_init": 1, "with_as": 3,
    "bracket_brace": 4, "with_open": 1, "bracket_counting": 4, "for_while": 1, "else_elif": 1, "fstring_brace": 3,
    "if_ternary": 6, "var_swap": 5, "indent_for": 1, "lambda_func": 3, "if_equals": 4, "enumerate_range": 2,
    "var_if": 7, "while_return_true": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(idiom_documents(300_000, seed=0), 1024, required=CANDIDATES)


@pytest.fixture(scope="module")
def data(tokenizer):
    return make_task_data(QUOTES, tokenizer, n_pairs=64, seed=0)


def a_task(*pairs, candidates=("')", '")')):
    """A task that gives these pairs in turn, again and again."""
    count = iter(range(10**9))
    return Task("stub", "for a test", candidates, lambda rng: pairs[next(count) % len(pairs)])


def test_get_task():
    assert all(get_task(name).name == name for name in TASKS)
    with pytest.raises(
        TaskError, match=r"no task 'single_double_quotes'; did you mean 'single_double_quote'\?"
    ):
        get_task("single_double_quotes")
    with pytest.raises(TaskError, match=r"no task 'zzz'\. Tasks: .*single_double_quote"):
        get_task("zzz")


# The quote task


@settings(max_examples=200)
@given(st.integers(0, 2**32))
def test_quote_prompts_differ_in_the_opening_quote_only(seed):
    single, double = QUOTES.sample(random.Random(seed))
    assert QUOTES.sample(random.Random(seed)) == (single, double)
    *context, last = single.split("\n")
    assert double.split("\n")[:-1] == context
    assert 1 <= len(context) <= 4
    differing = [i for i, (a, b) in enumerate(zip(single, double, strict=True)) if a != b]
    assert len(differing) == 1
    assert single[differing[0] - 1 : differing[0] + 1] == "('"
    assert double[differing[0] - 1 : differing[0] + 1] == '("'
    assert re.fullmatch(r"[\w. =]+\('\w+( \w+){0,3}", last)
    for prompt, answer in zip((single, double), QUOTES.candidates, strict=True):
        ast.parse(prompt + answer)


def test_quote_distractors_do_not_give_the_answer_away():
    prompts = [QUOTES.sample(random.Random(seed))[0] for seed in range(500)]
    contexts = [prompt.rpartition("\n")[0] for prompt in prompts]
    assert all("'" in context and '"' in context for context in contexts)
    closed_by = [(context.count("')"), context.count('")')) for context in contexts]
    assert sum(single > 0 and double > 0 for single, double in closed_by) > 100
    assert len(set(closed_by)) > 8  # neither number is fixed, nor their sum or difference
    last_quotes = [max("'\"", key=context.rfind) for context in contexts]
    assert 200 < last_quotes.count("'") < 300


def test_quote_prompts_fit_a_small_context(data):
    assert data.tokens.shape[1] <= 60


# All tasks


def test_the_twenty_tasks():
    assert len(TASKS) == 20
    assert PAIRS.keys() == DIFFERING.keys() == TASKS.keys() - {"single_double_quote"}
    assert {name for name, task in TASKS.items() if not task.same_end} == {"else_elif", "var_if"}


@pytest.mark.parametrize("name", TASKS)
def test_every_task_gives_many_short_fair_pairs(tokenizer, name):
    data = make_task_data(TASKS[name], tokenizer, 64, seed=0)
    assert data.tokens.shape[1] <= 100
    assert data.prompts == make_task_data(TASKS[name], tokenizer, 64, seed=0).prompts
    rng = random.Random(0)
    assert len({TASKS[name].sample(rng) for _ in range(3000)}) >= 2000


@pytest.mark.parametrize("name", PAIRS)
def test_prompts_and_answers_begin_python_that_is_valid(name):
    for seed in range(200):
        whole = both_sides(Writer(random.Random(seed)).pair(name))
        prompts = TASKS[name].sample(random.Random(seed))
        for text, prompt, answer in zip(whole, prompts, TASKS[name].candidates, strict=True):
            assert text.startswith(prompt + answer)
            compile(text, name, "exec")


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_differ_only_where_the_task_says(tokenizer, name):
    """With the same tokens before and after, nothing else can tell the answer."""
    data = make_task_data(TASKS[name], tokenizer, 200, seed=0)
    for pair in zip(data.prompts[::2], data.prompts[1::2], strict=True):
        first, second = (tokenizer.encode(prompt) for prompt in pair)
        before = common(first, second)
        after = common(first[before:][::-1], second[before:][::-1])
        assert (after > 0) == TASKS[name].same_end
        assert max(len(first), len(second)) - before - after <= DIFFERING[name], pair


@pytest.mark.parametrize("name", TASKS)
def test_how_often_a_token_comes_up_does_not_tell_the_answer(tokenizer, name):
    data = make_task_data(TASKS[name], tokenizer, 300, seed=0)
    counts = [Counter(tokenizer.encode(prompt)) for prompt in data.prompts]
    for token in set().union(*counts):
        sides = defaultdict(lambda: [0, 0])
        for row, count in enumerate(counts):
            sides[count[token]][row % 2] += 1
        assert sum(map(max, sides.values())) <= 0.82 * len(counts), tokenizer.decode([token])


def common(first, second):
    """How many tokens two lists have in common at their beginning."""
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))))


def test_brackets_are_as_many_as_are_open():
    lengths = {0: set(), 1: set()}
    for seed in range(500):
        for side, prompt in enumerate(TASKS["bracket_counting"].sample(random.Random(seed))):
            *closed, last = prompt.splitlines()
            assert all(line.count("[") == line.count("]") for line in closed)
            assert last.count("[") - last.count("]") == side + 1
            lengths[side].add((last.count(","), last.count("[")))
    assert len(lengths[0] & lengths[1]) >= 3  # neither elements nor opening brackets tell the depth


@pytest.mark.parametrize("name", ["set_or_string", "set_or_string_fixedvarname"])
def test_the_variable_is_what_it_was_made_as(name):
    for seed in range(500):
        prompts = TASKS[name].sample(random.Random(seed))
        for prompt, is_set in zip(prompts, (True, False), strict=True):
            variable = prompt.split()[-1]
            kinds = dict(re.findall(r"^(\w+) = (set|['\"])", prompt, flags=re.MULTILINE))
            assert len(kinds) == 2
            assert (kinds.pop(variable) == "set") is is_set
            assert ("set" in kinds.values()) is not is_set  # the other variable is of the other kind


def test_a_swap_gives_back_the_first_name():
    for seed in range(100):
        for prompt, answer in zip(TASKS["var_swap"].sample(random.Random(seed)), (" name", " value"), strict=True):
            left, right = prompt.splitlines()[-1].strip().split(" = ")
            assert left.split(", ") == [answer.strip(), right.strip(",")]


# TaskData


def test_tokens_begin_with_bos_and_are_padded_on_the_right(tokenizer, data):
    assert (data.task, data.n_pairs, len(data.prompts)) == ("single_double_quote", 64, 128)
    assert data.tokens.dtype == data.last.dtype == data.candidates.dtype == data.correct.dtype == torch.int64
    for prompt, row, last in zip(data.prompts, data.tokens.tolist(), data.last.tolist(), strict=True):
        assert row[: last + 1] == [tokenizer.bos_token_id, *tokenizer.encode(prompt)]
        assert set(row[last + 1 :]) <= {tokenizer.pad_token_id}
    assert data.last.max() == data.tokens.shape[1] - 1
    assert tokenizer.convert_ids_to_tokens(data.candidates.tolist()) == ["')", '")']
    assert data.correct.tolist() == [0, 1] * 64


def test_pairs_select_both_prompts(data):
    chosen = data.pairs([3, 0])
    assert chosen.prompts == (*data.prompts[6:8], *data.prompts[0:2])
    assert torch.equal(chosen.tokens, data.tokens[[6, 7, 0, 1]])
    assert torch.equal(chosen.last, data.last[[6, 7, 0, 1]])
    assert chosen.correct.tolist() == [0, 1, 0, 1]
    assert torch.equal(chosen.candidates, data.candidates)
    assert chosen.n_pairs == 2
    assert data.pairs(torch.tensor([5])).prompts == data.prompts[10:12]


def test_to_moves_every_tensor(data):
    moved = data.to("meta")
    assert all(getattr(moved, name).is_meta for name in ("tokens", "last", "candidates", "correct"))
    assert moved.prompts == data.prompts


def test_seeds_and_exclusion(tokenizer, data):
    again = make_task_data(QUOTES, tokenizer, 64, seed=0)
    assert again.prompts == data.prompts
    assert torch.equal(again.tokens, data.tokens)
    held_out = make_task_data(QUOTES, tokenizer, 64, seed=0, exclude=data.prompts)
    assert len({*data.prompts, *held_out.prompts}) == 256
    assert make_task_data(QUOTES, tokenizer, 64, seed=1).prompts != data.prompts


def test_a_task_with_too_few_prompts(tokenizer):
    pairs = [("f('a", 'f("a'), ("f('b", 'f("b')]
    assert make_task_data(a_task(*pairs), tokenizer, 2, seed=0).n_pairs == 2
    with pytest.raises(
        TaskError, match="task stub gave only 2 of 3 pairs of distinct prompts, 0 prompts excluded"
    ):
        make_task_data(a_task(*pairs), tokenizer, 3, seed=0)
    with pytest.raises(TaskError, match=r"gave only 1 of 2 pairs .* 1 prompts excluded"):
        make_task_data(a_task(*pairs), tokenizer, 2, seed=0, exclude={"f('a"})
    with pytest.raises(TaskError, match="n_pairs is 0; it must be at least 1"):
        make_task_data(QUOTES, tokenizer, 0, seed=0)


@pytest.mark.parametrize(
    ("pair", "candidates", "fault"),
    [
        (("f('a", "f('a"), ("')", '")'), "have the same tokens"),
        (("f('a", 'f("b'), ("')", '")'), "end in different tokens"),
        (("x = 1\nx", "x = 2\nx"), (" =", "="), None),
        (("x =", "y ="), (" =", "="), "are not the same tokens and one more"),
    ],
)
def test_pairs_that_break_the_rules(tokenizer, pair, candidates, fault):
    if fault is None:
        assert make_task_data(a_task(pair, candidates=candidates), tokenizer, 1, seed=0).n_pairs == 1
        return
    with pytest.raises(TaskError) as error:
        make_task_data(a_task(pair, candidates=candidates), tokenizer, 1, seed=0)
    assert fault in str(error.value)
    assert str(error.value).endswith(f"{pair[0]!r} and {pair[1]!r}")


def test_candidates_must_be_single_tokens(tokenizer):
    with pytest.raises(TokenizerError, match="'xyzzy' is not one token"):
        make_task_data(a_task(("f('a", 'f("a'), candidates=("')", "xyzzy")), tokenizer, 1, seed=0)


def test_a_prompt_longer_than_the_context(tokenizer, data):
    longest = data.tokens.shape[1]
    assert make_task_data(QUOTES, tokenizer, 64, seed=0, n_ctx=longest).n_pairs == 64
    with pytest.raises(DataError, match=f"has {longest} tokens, more than the context of {longest - 1}"):
        make_task_data(QUOTES, tokenizer, 64, seed=0, n_ctx=longest - 1)


# Loss


def test_loss_and_accuracy_by_hand():
    logits = torch.tensor([[0.0, math.log(3)], [0.0, math.log(3)], [2.0, 2.0]])
    losses, right = task_loss_and_accuracy(logits, torch.tensor([0, 1, 0]))
    torch.testing.assert_close(losses, torch.tensor([math.log(4), math.log(4 / 3), math.log(2)]))
    assert right.tolist() == [False, True, False]  # a tie is not right


def test_candidate_logits_are_those_after_the_last_token(data):
    few = data.pairs([0, 1])
    vocab = int(few.candidates.max()) + 1
    logits = torch.arange(4 * few.tokens.shape[1] * vocab, dtype=torch.float32).reshape(4, -1, vocab)
    chosen = candidate_logits(logits, few)
    for row in range(4):
        expected = [logits[row, few.last[row], candidate].item() for candidate in few.candidates]
        assert chosen[row].tolist() == expected


def test_a_guess_that_ignores_the_opening_quote_loses_at_least_log_2(data):
    """The two prompts of a pair are the same but for the opening quote, so a blind model cannot win both."""
    blind = torch.randn(data.n_pairs, 2, generator=torch.Generator().manual_seed(0)).repeat_interleave(
        2, dim=0
    )
    losses, right = task_loss_and_accuracy(blind, data.correct)
    assert losses.mean() >= math.log(2)
    assert right.float().mean() == 0.5
    assert all(a[: a.rfind("\n")] == b[: b.rfind("\n")] for a, b in list(pairwise(data.prompts))[::2])
