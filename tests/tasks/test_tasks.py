"""Tasks: what a prompt looks like, the checks on pairs, and the loss."""

import ast
import json
import math
import pickle
import random
import re
from collections import Counter, defaultdict
from itertools import pairwise, takewhile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from helpers import tiny_model, word_tokenizer
from tl_sparse.data.tokenizer import train_tokenizer
from tl_sparse.errors import DataError, TaskError, TokenizerError
from tl_sparse.evaluation.judge import score
from tl_sparse.tasks.idioms import PAIRS, Writer, both_sides, idiom_documents
from tl_sparse.tasks.task import TASKS, Task, get_task
from tl_sparse.tasks.task_data import candidate_logits, make_task_data, task_loss_and_accuracy

pytestmark = pytest.mark.any_line

QUOTES = TASKS["single_double_quote"]
CANDIDATES = sorted({candidate for task in TASKS.values() for candidate in task.candidates})
#: The tokens that differ within a pair of a task: at most so many, from the first such token to the
#: last.
DIFFERING = {
    "final_kwarg": 10, "set_or_string": 25, "set_or_string_fixedvarname": 25, "class_init": 1,
    "with_as": 3, "bracket_brace": 4, "with_open": 1, "bracket_counting": 4, "for_while": 1,
    "else_elif": 1, "fstring_brace": 3, "if_ternary": 6, "var_swap": 5, "indent_for": 1,
    "lambda_func": 3, "if_equals": 4, "enumerate_range": 2, "var_if": 7, "while_return_true": 3,
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
    with pytest.raises(
        TaskError, match=r"no task 'zzz'\. Tasks: .*quote.*, or a file of pairs, \*\.jsonl$"
    ):
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
            assert (
                "set" in kinds.values()
            ) is not is_set  # the other variable is of the other kind


def test_a_swap_gives_back_the_first_name():
    for seed in range(100):
        for prompt, answer in zip(
            TASKS["var_swap"].sample(random.Random(seed)), (" name", " value"), strict=True
        ):
            left, right = prompt.splitlines()[-1].strip().split(" = ")
            assert left.split(", ") == [answer.strip(), right.strip(",")]


# TaskData


def test_tokens_begin_with_bos_and_are_padded_on_the_right(tokenizer, data):
    assert (data.task, data.n_pairs, len(data.prompts)) == ("single_double_quote", 64, 128)
    assert (
        data.tokens.dtype
        == data.last.dtype
        == data.candidates.dtype
        == data.correct.dtype
        == torch.int64
    )
    for prompt, row, last in zip(
        data.prompts, data.tokens.tolist(), data.last.tolist(), strict=True
    ):
        assert row[: last + 1] == [tokenizer.bos_token_id, *tokenizer.encode(prompt)]
        assert set(row[last + 1 :]) <= {tokenizer.pad_token_id}
    assert data.last.max() == data.tokens.shape[1] - 1
    assert data.candidates.shape == (128, 2)
    assert tokenizer.convert_ids_to_tokens(data.candidates.unique(dim=0)[0].tolist()) == [
        "')",
        '")',
    ]
    assert len(data.candidates.unique(dim=0)) == 1
    assert data.correct.tolist() == [0, 1] * 64


def test_pairs_select_both_prompts(data):
    chosen = data.pairs([3, 0])
    assert chosen.prompts == (*data.prompts[6:8], *data.prompts[0:2])
    assert torch.equal(chosen.tokens, data.tokens[[6, 7, 0, 1]])
    assert torch.equal(chosen.last, data.last[[6, 7, 0, 1]])
    assert chosen.correct.tolist() == [0, 1, 0, 1]
    assert torch.equal(chosen.candidates, data.candidates[[6, 7, 0, 1]])
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
    at_most = (
        r"^task stub has 2 pairs of distinct prompts; n_pairs \(--pairs\) is 3, and must be at "
    )
    with pytest.raises(TaskError, match=at_most + "most 2$"):
        make_task_data(a_task(*pairs), tokenizer, 3, seed=0)
    besides = (
        r"has 1 pair of distinct prompts besides the 1 prompt that is excluded; n_pairs .* most 1"
    )
    with pytest.raises(TaskError, match=besides):
        make_task_data(a_task(*pairs), tokenizer, 2, seed=0, exclude={"f('a"})
    with pytest.raises(TaskError, match="has no pairs of distinct prompts besides the 4 prompts"):
        make_task_data(a_task(*pairs), tokenizer, 2, seed=0, exclude=[*pairs[0], *pairs[1]])
    with pytest.raises(TaskError, match=r"n_pairs \(--pairs\) is 0; it must be at least 1"):
        make_task_data(QUOTES, tokenizer, 0, seed=0)


@pytest.mark.parametrize(
    ("pair", "candidates", "fault"),
    [
        (("f('a", "f('a"), ("')", '")'), "have the same tokens"),
        (("f('a", 'f("b'), ("')", '")'), "end in different tokens"),
        (("x = 1\nx", "x = 2\nx"), (" =", "="), None),
        (("x = a", "y = b"), (" =", "="), "end in different tokens"),
    ],
)
def test_pairs_that_break_the_rules(tokenizer, pair, candidates, fault):
    if fault is None:
        assert (
            make_task_data(a_task(pair, candidates=candidates), tokenizer, 1, seed=0).n_pairs == 1
        )
        return
    with pytest.raises(TaskError) as error:
        make_task_data(a_task(pair, candidates=candidates), tokenizer, 1, seed=0)
    assert fault in str(error.value)
    assert str(error.value).endswith(f"{pair[0]!r} and {pair[1]!r}")


def test_where_the_last_token_tells_the_answer_the_first_must_not(tokenizer):
    def data(*pair):
        return make_task_data(
            Task("plural", "is or are?", (" =", "."), lambda rng: pair, False), tokenizer, 1, seed=0
        )

    assert data("x = a", "x = b").n_pairs == 1
    with pytest.raises(
        TaskError, match=r"plural neither begin nor end in the same token: 'x = a' and 'y = b'$"
    ):
        data("x = a", "y = b")


# Answers: of each pair, and shortened


def test_each_pair_may_have_its_own_answers(tokenizer):
    pairs = [
        ("f('a", 'f("a', "')", '")'),
        ("x = [[1", "x = [(1", "]", ")"),
        ("f('b", 'f("b', "')", '")'),
    ]
    data = make_task_data(a_task(*pairs, candidates=None), tokenizer, 3, seed=0)
    texts = [[tokenizer.decode([i]) for i in row] for row in data.candidates.tolist()]
    assert texts == [["')", '")'], ["')", '")'], ["]", ")"], ["]", ")"], ["')", '")'], ["')", '")']]
    assert data.prompts == tuple(prompt for pair in pairs for prompt in pair[:2])
    assert data.correct.tolist() == [0, 1] * 3
    chosen = data.pairs([1, 0])
    assert torch.equal(chosen.candidates, data.candidates[[2, 3, 0, 1]])
    logits = torch.randn(6, data.tokens.shape[1], 1024)
    for row in range(6):
        expected = logits[row, data.last[row], data.candidates[row]]
        assert torch.equal(candidate_logits(logits, data)[row], expected)


@pytest.mark.parametrize(
    ("given", "candidates", "wanted"),
    [
        (("a", "b"), None, "two prompts and two answers, since candidates is None"),
        (("a", "b", "x", "y"), (" x", " y"), "two prompts"),
        (("a",), (" x", " y"), "two prompts"),
        (("a", 2), (" x", " y"), "two prompts"),
        ("ab", (" x", " y"), "two prompts"),  # not the prompts "a" and "b"
        (None, (" x", " y"), "two prompts"),
    ],
)
def test_a_sample_that_is_no_pair(tokenizer, given, candidates, wanted):
    message = f"sample of task stub must return a tuple of {wanted}, not {given!r}"
    with pytest.raises(TaskError, match=re.escape(message) + "$"):
        make_task_data(a_task(given, candidates=candidates), tokenizer, 1, seed=0)


def test_an_answer_of_several_tokens_is_shortened_to_one(tokenizer):
    pair = ("f('a", 'f("a', "') + name", '")\n')
    message = (
        r"""^task stub: "'\) \+ name" is not one token of this tokenizer; its beginning "'\)" """
        r"stands for it \(and so for 1 other answer\)$"
    )
    with pytest.warns(UserWarning, match=message):
        data = make_task_data(a_task(pair, candidates=None), tokenizer, 1, seed=0)
    assert tokenizer.convert_ids_to_tokens(data.candidates[0].tolist()) == ["')", '")']
    assert data.shortened == {"') + name": "')", '")\n': '")'}


@pytest.mark.parametrize(
    ("pair", "candidates", "longest"),
    [
        (("f('a", 'f("a'), ("')", "')\n"), ("')", "')")),  # shortened, they are the same
        (
            ("x =", "y ="),
            (" =", "="),
            (" =", None),
        ),  # `==` is one token: the prompt would end otherwise
        (("f('a", 'f("a'), ("", "')"), (None, "')")),
    ],
)
def test_answers_that_cannot_be_told_apart(tokenizer, pair, candidates, longest):
    with pytest.raises(TokenizerError) as error:
        make_task_data(a_task((*pair, *candidates), candidates=None), tokenizer, 1, seed=0)
    assert str(error.value) == (
        f"the answers {candidates[0]!r} and {candidates[1]!r} of task stub are, whole or "
        f"shortened, not two different single tokens after {pair[0]!r} and {pair[1]!r}: "
        f"the longest that are one token are {longest[0]!r} and {longest[1]!r}"
    )


def test_an_unknown_word_is_no_answer():
    words = word_tokenizer(["[UNK]", "<s>", "a", "b", "end", "yes"], bos_token="<s>")
    task = a_task(("a end", "b end"), candidates=(" yes", " perhaps"))
    with pytest.raises(TokenizerError, match="the longest that are one token are ' yes' and None"):
        make_task_data(task, words, 1, seed=0)


@pytest.fixture(scope="module")
def like_gpt2():
    """A byte-level BPE as GPT-2's, with one special token that begins, ends and pads."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    texts = [
        *idiom_documents(100_000, seed=0),
        "Mary met John. John thanked Mary. Mary thanked John.\n" * 100,
    ]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, **special
    )


def test_tasks_of_ours_in_another_tokenizer(like_gpt2):
    """GPT-2 never has `):` and its newline, or `=` and `None`, in one token."""
    spellings = {
        "final_kwarg": ["=", "):"],
        "class_init": [" name", " value"],
        "else_elif": [":", " value"],
    }
    for name, spelling in spellings.items():
        data = make_task_data(TASKS[name], like_gpt2, 16, seed=0)
        assert {tuple(like_gpt2.decode([i]) for i in row) for row in data.candidates.tolist()} == {
            tuple(spelling)
        }
        assert set(data.tokens[:, 0].tolist()) == {like_gpt2.bos_token_id}
        for row, last in zip(data.tokens.tolist(), data.last.tolist(), strict=True):
            assert set(row[last + 1 :]) <= {like_gpt2.bos_token_id}
    with pytest.raises(TokenizerError, match=r"are ' True' and ' True'$"):
        make_task_data(TASKS["var_if"], like_gpt2, 16, seed=0)


# A task from a file


def write_pairs(path, *pairs):
    lines = [{"prompts": pair[:2], "answers": pair[2:]} for pair in pairs]
    path.write_text(
        "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8"
    )
    return path


def thanks(n_pairs):
    return [
        (
            f"Mary met John {n} times. John thanked",
            f"Mary met John {n} times. Mary thanked",
            " Mary",
            " John",
        )
        for n in range(n_pairs)
    ]


def test_a_task_from_a_file(like_gpt2, tmp_path):
    pairs = thanks(40)
    path = write_pairs(tmp_path / "ioi.jsonl", *pairs)
    task = get_task(str(path))
    assert (task.name, task.candidates, task.description) == ("ioi", None, f"the pairs in {path}")
    assert Task.from_jsonl(path, "names").name == "names"
    every = make_task_data(task, like_gpt2, 40, seed=0, n_ctx=20)
    drawn = list(zip(every.prompts[::2], every.prompts[1::2], strict=True))
    assert sorted(drawn) == sorted(pair[:2] for pair in pairs)
    assert drawn != [pair[:2] for pair in pairs]
    assert {like_gpt2.decode(row) for row in every.candidates.tolist()} == {" Mary John"}
    assert (
        make_task_data(pickle.loads(pickle.dumps(task)), like_gpt2, 40, seed=0).prompts
        == every.prompts
    )
    assert make_task_data(task, like_gpt2, 40, seed=1).prompts != every.prompts
    model = tiny_model(d_vocab=len(like_gpt2), n_ctx=20, tokenizer=like_gpt2)
    assert 0 <= score(model, every, batch_size=8).accuracy <= 1


@pytest.mark.parametrize("sizes", [(1, 1), (30, 10), (10, 30)])
def test_splits_of_a_file_are_disjoint_up_to_its_last_pair(like_gpt2, tmp_path, sizes):
    first, second = sizes
    task = Task.from_jsonl(write_pairs(tmp_path / "ioi.jsonl", *thanks(first + second)))
    selection = make_task_data(task, like_gpt2, first, seed=0)
    heldout = make_task_data(task, like_gpt2, second, seed=0, exclude=selection.prompts)
    assert len({*selection.prompts, *heldout.prompts}) == 2 * (first + second)
    message = f"distinct prompts besides the {2 * first} prompts that are excluded; "
    message += rf"n_pairs \(--pairs\) is {second + 1}, and must be at most {second}$"
    with pytest.raises(TaskError, match=message):
        make_task_data(task, like_gpt2, second + 1, seed=0, exclude=selection.prompts)


def test_the_last_pair_of_a_long_file_is_found(like_gpt2, tmp_path):
    pairs = thanks(3000)
    task = Task.from_jsonl(write_pairs(tmp_path / "ioi.jsonl", *pairs))
    taken = [prompt for pair in pairs[:-1] for prompt in pair[:2]]
    assert make_task_data(task, like_gpt2, 1, seed=0, exclude=taken).prompts == pairs[-1][:2]


def test_what_a_file_may_hold_beside_pairs(tmp_path):
    path = tmp_path / "odd.jsonl"
    line = '{"prompts": ["é\u2028a", "b"], "answers": [" x", " y"], "source": 3}'
    path.write_bytes(f"\n{line}\r\n  \n".encode())
    assert Task.from_jsonl(path).pair(random.Random(0)) == ("é\u2028a", "b", " x", " y")


SHAPE = (
    'must be {"prompts": ["…", "…"], "answers": ["…", "…"]}, without empty texts, with two '
    "different prompts and two different answers, not "
)
GOOD = '{"prompts": ["a", "b"], "answers": ["x", "y"]}'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            r'{"prompts": ["\ud800", "d"], "answers": ["x", "y"]}',
            "line 2 is not valid JSON: 'utf-8' codec",
        ),
        (
            "{'prompts'",
            "line 2 is not valid JSON: Expecting property name enclosed in double quotes",
        ),
        ("[" * 100_000, "line 2 is not valid JSON: "),
        ('{"prompts": ["c", "d"]}', f'line 2 {SHAPE}{{"prompts": ["c", "d"]}}'),
        ('{"prompts": ["c", "d"], "answers": "xy"}', f"line 2 {SHAPE}"),
        ('{"prompts": ["c", 4], "answers": ["x", "y"]}', f"line 2 {SHAPE}"),
        ('{"prompts": ["c", "d", "e"], "answers": ["x", "y"]}', f"line 2 {SHAPE}"),
        ('{"prompts": ["c", "d"], "answers": ["x", ""]}', f"line 2 {SHAPE}"),
        ('{"prompts": ["c", "c"], "answers": ["x", "y"]}', f"line 2 {SHAPE}"),
        ('{"prompts": ["c", "d"], "answers": ["x", "x"]}', f"line 2 {SHAPE}"),
        ('["c", "d"]', f'line 2 {SHAPE}["c", "d"]'),
        (GOOD, "line 2: an earlier line has the same two prompts; remove one of them"),
        (
            '{"prompts": ["b", "a"], "answers": ["z", "w"]}',
            "line 2: an earlier line has the same two prompts",
        ),
    ],
)
def test_lines_that_are_no_pairs(tmp_path, text, message):
    path = tmp_path / "pairs.jsonl"
    path.write_text(f"{GOOD}\n{text}\n", encoding="utf-8")
    with pytest.raises(DataError) as error:
        get_task(str(path))
    assert str(error.value).startswith(f"{path}, {message}")


def test_a_file_of_another_program(tmp_path):
    lines = [json.dumps({"prompts": [f"{i} a", f"{i} b"], "answers": ["a", "b"]}) for i in "12"]
    path = tmp_path / "Pairs.JSONL"
    path.write_bytes(("\ufeff" + "\r\n".join(lines) + "\r\n").encode())
    task = get_task(str(path))
    prompts = {task.pair(random.Random(seed)).first_prompt for seed in range(20)}
    assert (task.name, prompts) == ("Pairs", {"1 a", "2 a"})


def test_files_that_are_no_tasks(tmp_path):
    path = tmp_path / "pairs.jsonl"
    with pytest.raises(DataError, match=r"^there is no file .*pairs\.jsonl$"):
        get_task(str(path))
    with pytest.raises(
        DataError, match=r"cannot read .* as UTF-8 text: it is a folder, not a file"
    ):
        Task.from_jsonl(tmp_path)
    path.write_bytes(GOOD.replace("a", "ä").encode("latin-1"))
    with pytest.raises(
        DataError, match=r"cannot read .*pairs\.jsonl as UTF-8 text: .*can't decode byte 0xe4"
    ):
        get_task(str(path))
    path.write_text(" \n")
    with pytest.raises(
        DataError, match=r"pairs\.jsonl is empty; it must have a pair on each line, {\"prompts\""
    ):
        get_task(str(path))


def test_a_prompt_longer_than_the_context(tokenizer, data):
    longest = data.tokens.shape[1]
    assert make_task_data(QUOTES, tokenizer, 64, seed=0, n_ctx=longest).n_pairs == 64
    with pytest.raises(
        DataError, match=f"has {longest} tokens, more than the context of {longest - 1}"
    ):
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
    logits = torch.arange(4 * few.tokens.shape[1] * vocab, dtype=torch.float32).reshape(
        4, -1, vocab
    )
    chosen = candidate_logits(logits, few)
    for row in range(4):
        expected = [
            logits[row, few.last[row], candidate].item() for candidate in few.candidates[row]
        ]
        assert chosen[row].tolist() == expected


def test_a_guess_that_ignores_the_opening_quote_loses_at_least_log_2(data):
    """A pair's prompts differ in the opening quote alone: a blind model cannot win both."""
    blind = torch.randn(
        data.n_pairs, 2, generator=torch.Generator().manual_seed(0)
    ).repeat_interleave(2, dim=0)
    losses, right = task_loss_and_accuracy(blind, data.correct)
    assert losses.mean() >= math.log(2)
    assert right.float().mean() == 0.5
    assert all(
        a[: a.rfind("\n")] == b[: b.rfind("\n")] for a, b in list(pairwise(data.prompts))[::2]
    )
