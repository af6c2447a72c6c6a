"""Documents, built in or the user's, and their packing into rows of tokens."""

import ast
import dataclasses
import json
import os
import random
import re
import tracemalloc
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tl_sparse.data.corpus
from helpers import must_not_run, tiny_config, word_tokenizer
from tl_sparse import train
from tl_sparse.data.config import DataConfig
from tl_sparse.data.corpus import pack_tokens
from tl_sparse.data.documents import load_documents
from tl_sparse.data.stream import Stream
from tl_sparse.data.tokenizer import END_OF_TEXT, train_tokenizer
from tl_sparse.errors import ConfigError, DataError, TokenizerError, TrainError
from tl_sparse.tasks.idioms import WORDS, Writer, idiom_documents
from tl_sparse.training.config import TrainConfig
from tl_sparse.training.tokens import packed_for

pytestmark = pytest.mark.any_line


@pytest.fixture(scope="module")
def idioms():
    return idiom_documents(300_000, seed=0)


@pytest.fixture(scope="module")
def tokenizer(idioms):
    return train_tokenizer(idioms, 400)


def write_files(folder, **texts):
    for name, text in texts.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(text.encode())
    return str(folder)


# Idioms


def test_idioms_are_valid_python_of_a_readable_length(idioms):
    for document in idioms:
        ast.parse(document)
        compile(document, "idiom", "exec")  # finds more: a return outside a function, …
        assert document.endswith("\n")
        assert 5 <= document.count("\n") <= 45
    assert len(set(idioms)) == len(idioms)


@pytest.mark.parametrize(
    "construct",
    [
        r"\('\w+ \w+'\)\n",
        r'\("\w+ \w+"\)\n',
        r"def \w+\(\w+, \w+=None\):\n",
        r"def \w+\(\w+=None, \w+=None\):\n",
        r"(\w+) = set\(\)\n\s*\1\.add\(",
        r"""(\w+) = (''|"")\n\s*\1 \+= """,
        r"def __init__\(self, (\w+)\):\n +self\.\1 = \1\n",
        r"with open\(\S+, 'r'\) as \w+:\n",
        r"\w+ = open\(\S+, 'w'\)\n",
        r"= \{['\"]\w+['\"]: \d+, ",
        r"= \[\[\d+, \d+\], \[\d+, \d+\]\]\n",
        r"for \w+ in \w+:\n",
        r"while \w+:\n",
        r"else:\n",
        r"elif \w+ ",
        r"f(['\"])the \w+ \w+: \{\w+\}\1",
        r" = \w+ if \w+ <?",
        r"(\w+), (\w+) = \2, \1\n",
        r"lambda \w+, \w+: ",
        r"if \w+ == \d+:\n",
        r"for \w+, \w+ in enumerate\(",
        r"for \w+ in range\(",
        r"if \w+ == True:\n",
        r"\w+ = True\n",
        r"while True:\n",
        r"return True\n",
    ],
)
def test_idioms_hold_every_construct_of_the_tasks(idioms, construct):
    assert len(re.findall(construct, "\n".join(idioms))) >= 20


def test_most_idiom_documents_have_both_quotes(idioms):
    assert sum("'" in document and '"' in document for document in idioms) > 0.65 * len(idioms)


@settings(max_examples=20)
@given(seed=st.integers(0, 2**32), n_chars=st.integers(0, 5000))
def test_idioms_are_deterministic_and_of_the_length_asked_for(seed, n_chars):
    documents = idiom_documents(n_chars, seed)
    assert documents == idiom_documents(n_chars, seed)
    assert documents == idiom_documents(2 * n_chars, seed)[: len(documents)]
    assert sum(map(len, documents)) >= n_chars > sum(map(len, documents[:-1])) - (not documents)


def test_numbered_places_differ_from_each_other_and_stay_the_same():
    writer = Writer(random.Random(0))
    for _ in range(200):
        first, second, third, fresh = writer.fill("<var1> <var2> <var1> <vars>").split()
        assert first == third != second
        assert fresh in WORDS["vars"]


def test_parameter_names_are_distinct():
    assert not set(WORDS["var"]) & set(WORDS["vars"])


# DataConfig


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"source": ""},
            "source = '' is not possible; "
            'it must be "builtin", a folder, a glob pattern, a file, or',
        ),
        ({"source": "hf:"}, "source = 'hf:' is not possible; it must be \"builtin\", a folder"),
        ({"max_chars": 0}, "max_chars = 0 is not possible; it must be at least 1"),
        ({"source": Path("x")}, "source = PosixPath('x') is not possible; it must be of type str"),
        ({"stdlib_chars": -1}, "stdlib_chars = -1 is not possible; it must be at least 0"),
        ({"idiom_chars": 1.5}, "idiom_chars = 1.5 is not possible; it must be of type int"),
        ({"seed": True}, "seed = True is not possible; it must be of type int"),
        (
            {"stdlib_chars": 0, "idiom_chars": 0},
            "stdlib_chars = 0 is not possible; it must be above 0 when",
        ),
        (
            {"validation_fraction": 0.0},
            "validation_fraction = 0.0 is not possible; it must be in (0, 1)",
        ),
        (
            {"validation_fraction": 1},
            "validation_fraction = 1 is not possible; it must be in (0, 1)",
        ),
        (
            {"validation_fraction": float("nan")},
            "validation_fraction = nan is not possible; it must be in (0, 1)",
        ),
    ],
)
def test_impossible_values(values, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        DataConfig(**values)


# load_documents


def test_builtin_documents():
    config = DataConfig(stdlib_chars=300_000, idiom_chars=100_000)
    documents = load_documents(config)
    assert documents == load_documents(config)
    idioms = set(idiom_documents(100_000, 0))
    both = documents.train + documents.validation
    library = [document for document in both if document not in idioms]
    assert len(both) == len(library) + len(idioms)
    assert 299_000 < sum(map(len, library)) <= 300_000
    held_out_idioms = [document for document in documents.validation if document in idioms]
    # As many characters as fit into the fraction: no further idiom file, all below 1,500
    # characters, would.
    room = 0.05 * sum(map(len, idioms))
    assert room - 1_500 < sum(map(len, held_out_idioms)) <= room
    assert 1 <= len(documents.validation) - len(held_out_idioms) < len(library)
    assert not set(documents.train) & set(documents.validation)
    assert re.fullmatch(
        r"\d+ standard library files \(\d{3},\d{3} characters\), "
        r"\d+ synthetic idiom files \(\d{3},\d{3} characters\)",
        documents.description,
    )


def test_seeds_give_other_documents():
    first, second = (
        load_documents(DataConfig(stdlib_chars=50_000, idiom_chars=0, seed=seed)) for seed in (0, 1)
    )
    assert set(first.train).isdisjoint(second.train)


def test_a_folder_is_read_recursively_and_in_order(tmp_path):
    source = write_files(
        tmp_path, b_py="b\n", a__c_txt="c\r\nd\n", z_md="no", e_py="  \n", d_py="\ufeffd\n"
    )
    documents = load_documents(DataConfig(source, validation_fraction=0.4))
    assert sorted(documents.train + documents.validation) == ["b\n", "c\nd\n", "d\n"]
    assert (len(documents.train), len(documents.validation)) == (2, 1)
    assert documents.description == f"3 {source} files (8 characters)"


def texts_of(source):
    documents = load_documents(DataConfig(str(source)))
    return sorted(documents.train + documents.validation)


def write_named(folder, *names):
    """Files whose text is their name."""
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text(name)


def test_what_is_left_out_of_a_folder(tmp_path):
    mine = ["a.py", "b.TXT", "c.Py", "build/d.py", "deep/er/e.txt", "environment.py"]
    foreign = [
        ".git/x.txt",
        ".venv/lib/python3.11/site-packages/numpy.py",
        "deep/__pycache__/x.py",
        "deep/node_modules/y.txt",
        "lib/site-packages/z.py",
        "mine.egg-info/SOURCES.txt",
        "my-env/activate.py",
        "conda/x.py",
        ".hidden.py",
        "vendor/other.py",
    ]
    write_named(tmp_path, *mine, *foreign)
    (tmp_path / "my-env" / "pyvenv.cfg").touch()
    (tmp_path / "conda" / "conda-meta").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path)
    with pytest.warns(UserWarning, match="left out of .*: ") as warned:
        assert texts_of(tmp_path) == sorted(mine)
    message = str(warned[0].message)
    for name in [".git", ".hidden.py", ".venv", "__pycache__", "conda", "loop", "mine.egg-info"]:
        assert f"{name}, " in message
    assert "my-env and 3 more" in message


def test_what_is_named_is_read_wherever_it_is(tmp_path):
    names = [".git/a.txt", ".git/b.txt"]
    write_named(tmp_path, *names)
    assert texts_of(tmp_path / ".git") == names
    assert texts_of(tmp_path / ".git" / "*") == names


def test_a_file_is_read_once_however_many_links_lead_to_it(tmp_path):
    write_named(tmp_path, "a.py", "b.py")
    (tmp_path / "c.py").symlink_to(tmp_path / "a.py")
    assert texts_of(tmp_path) == ["a.py", "b.py"]
    assert texts_of(tmp_path / "*.py") == ["a.py", "b.py"]


def test_encodings_and_line_ends(tmp_path):
    text = "caf\u00e9 = 1\n"
    (tmp_path / "plain.py").write_bytes(b"a\r\nb\rc\n")
    (tmp_path / "marked.txt").write_bytes(f"1{text}".encode("utf-8-sig"))
    (tmp_path / "wide.txt").write_bytes(f"2{text}".encode("utf-16"))
    (tmp_path / "wider.txt").write_bytes(f"3{text}".encode("utf-32"))
    declared = f"# -*- coding: latin-1 -*-\n{text}"
    (tmp_path / "declared.py").write_bytes(declared.encode("latin-1"))
    expected = ["a\nb\nc\n", f"1{text}", f"2{text}", f"3{text}", declared]
    assert texts_of(tmp_path) == sorted(expected)


def test_a_pipe_is_not_read(tmp_path):
    write_named(tmp_path, "a.py", "b.py")
    os.mkfifo(tmp_path / "pipe.py")
    for source in (tmp_path, tmp_path / "pipe.py", tmp_path / "*"):
        with pytest.raises(DataError, match=r"cannot read .*pipe\.py: it is a named pipe"):
            load_documents(DataConfig(str(source)))


def test_a_folder_that_cannot_be_listed(tmp_path, monkeypatch):
    write_named(tmp_path, "a.py", "b.py")

    def refused(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refused)  # root may read whatever there is
    with pytest.raises(DataError, match=r"cannot read .*: Permission denied"):
        load_documents(DataConfig(str(tmp_path)))


@pytest.mark.parametrize("source", ["~no_such_user_here/x", "x" * 5000])
def test_sources_that_cannot_be_paths(source):
    with pytest.raises(DataError, match=r"cannot read |no files at "):
        load_documents(DataConfig(source))


def test_the_split_does_not_depend_on_the_order_of_the_file_system(tmp_path, monkeypatch):
    source = write_files(tmp_path, **{f"f{i}_py": f"x = {i}\n" for i in range(30)})
    documents = load_documents(DataConfig(source, seed=3))
    walk = os.walk

    def reversed_walk(*arguments, **options):
        for folder, subfolders, names in walk(*arguments, **options):
            yield folder, subfolders, names[::-1]

    monkeypatch.setattr(os, "walk", reversed_walk)
    assert load_documents(DataConfig(source, seed=3)) == documents
    assert any(load_documents(DataConfig(source, seed=seed)) != documents for seed in range(4, 8))


def test_a_glob_takes_any_text_file(tmp_path):
    source = write_files(tmp_path, a__x_md="x", a__y_md="y", z_py="z")
    documents = load_documents(DataConfig(f"{source}/**/*.md"))
    assert sorted(documents.train + documents.validation) == ["x", "y"]


def test_a_single_file_is_cut_at_the_end_of_a_line(tmp_path):
    write_files(tmp_path, book_txt="one\ntwo\nthree\nfour\n")
    documents = load_documents(DataConfig(str(tmp_path / "book.txt"), validation_fraction=0.25))
    assert (documents.train, documents.validation) == (["one\ntwo\nthree\n"], ["four\n"])


def test_unusable_sources(tmp_path):
    with pytest.raises(DataError, match=r"no files at .*nothing"):
        load_documents(DataConfig(str(tmp_path / "nothing")))
    with pytest.raises(DataError, match=r"no files at .*\*\.py or \*\.txt"):
        load_documents(DataConfig(str(tmp_path)))
    source = write_files(tmp_path, a_py=" \n", b_py="")
    with pytest.raises(DataError, match=r"the 2 files of .* hold only white space"):
        load_documents(DataConfig(source))
    write_files(tmp_path, a_py="x = 1")
    with pytest.raises(DataError, match=r"too little text .* 1 .* file \(5 characters\)"):
        load_documents(DataConfig(source))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\0b", r"bad\.py is not text: it has a NUL byte"),
        (b"ab\xff", r"bad\.py is not UTF-8 text: .* at byte 2"),
        (b"\xff\xfea", r"bad\.py is not UTF-16.* text: .* at byte"),
        (b"# coding: nonsense\n", r"bad\.py is not text: unknown encoding"),
        (b"# coding: rot13\n", r"bad\.py is not text: 'rot13' is not a text encoding"),
        (b"# coding: utf-7\n+2AA-", r"bad\.py is not .*text"),
    ],
)
def test_files_that_are_not_text(tmp_path, content, message):
    (tmp_path / "bad.py").write_bytes(content)
    with pytest.raises(DataError, match=f"no file of .* holds text: .*{message}"):
        load_documents(DataConfig(str(tmp_path)))
    write_named(tmp_path, "good.py", "better.py")
    with pytest.warns(UserWarning, match=f"left out of .*{message}"):
        assert texts_of(tmp_path) == ["better.py", "good.py"]


def test_unreadable_file(tmp_path):
    (tmp_path / "gone.py").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"^there is no file .*gone\.py$"):
        load_documents(DataConfig(str(tmp_path)))


def test_file_without_permission(tmp_path, monkeypatch):
    source = write_files(tmp_path, a_py="x", b_py="y")

    def refused(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refused)  # root may read whatever there is
    with pytest.raises(DataError, match=r"cannot read .*a\.py: Permission denied"):
        load_documents(DataConfig(source))


# pack_tokens


def test_packed_rows(tokenizer):
    documents = ["x = 1\n", "print('the red house')\n", "y = 2\n"]
    packed = pack_tokens(documents, tokenizer, n_ctx=4, seed=0)
    assert packed.dtype == torch.int32
    assert packed.shape[1] == 4
    expected = sum(len(tokenizer.encode(document)) + 1 for document in documents)
    assert packed.shape[0] == expected // 4
    text = tokenizer.decode(packed.flatten().tolist())
    assert text.startswith(END_OF_TEXT)
    whole = tokenizer.decode(pack_tokens(documents, tokenizer, n_ctx=expected, seed=0)[0].tolist())
    assert whole.startswith(text)
    assert sorted(whole.split(END_OF_TEXT)) == sorted(["", *documents])


def test_packing_is_deterministic_and_shuffles(tokenizer, idioms):
    packed = pack_tokens(idioms, tokenizer, 32, seed=1)
    assert torch.equal(packed, pack_tokens(list(idioms), tokenizer, 32, seed=1))
    other = pack_tokens(idioms, tokenizer, 32, seed=2)
    assert packed.shape == other.shape
    assert not torch.equal(packed, other)


def test_too_few_tokens_for_a_row(tokenizer):
    with pytest.raises(
        DataError, match="the documents have 2 tokens, fewer than one row of n_ctx = 8"
    ):
        pack_tokens(["x"], tokenizer, 8, seed=0)
    with pytest.raises(DataError, match="the documents have 0 tokens"):
        pack_tokens([], tokenizer, 8, seed=0)


def test_packing_does_not_depend_on_how_the_tokenizer_was_last_used(tokenizer):
    documents = ["x = 1\n" * 50, "print('the red house')\n" * 20]
    before = pack_tokens(documents, tokenizer, 16, seed=0)
    tokenizer(["x = 1", "y"], truncation=True, max_length=2, padding=True)
    assert torch.equal(pack_tokens(documents, tokenizer, 16, seed=0), before)


def in_memory(documents, tokenizer, n_ctx, seed):
    """Rows as they were packed before there were files: all tokens in one list."""
    tokens = []
    for document in random.Random(seed).sample(documents, len(documents)):
        tokens += [tokenizer.eos_token_id, *tokenizer.encode(document, add_special_tokens=False)]
    return torch.tensor(tokens[: len(tokens) // n_ctx * n_ctx], dtype=torch.int32).view(-1, n_ctx)


@settings(max_examples=25)
@given(
    documents=st.lists(st.text(st.characters(codec="utf-8"), min_size=1), min_size=1, max_size=200),
    n_ctx=st.integers(1, 9),
    seed=st.integers(0, 2**32),
)
def test_rows_from_a_file_are_those_from_memory(tokenizer, documents, n_ctx, seed):
    expected = in_memory(documents, tokenizer, n_ctx, seed)
    if len(expected):
        assert torch.equal(pack_tokens(documents, tokenizer, n_ctx, seed), expected)
        assert torch.equal(
            pack_tokens(iter(documents), tokenizer, 1, seed)[:1], torch.tensor([[399]])
        )


@pytest.mark.parametrize(("n_words", "dtype"), [(2**16, torch.uint16), (2**16 + 1, torch.int32)])
def test_sixteen_bits_where_the_vocabulary_fits(n_words, dtype, tmp_path):
    words = word_tokenizer(["<unk>", *(f"w{i}" for i in range(1, n_words))], eos_token="<unk>")
    with open(tmp_path / "rows", "w+b") as file:
        rows = tl_sparse.data.corpus._write_rows(
            file, ["w1 w2", f"w{n_words - 1}"], words, 1, seed=0
        )
    assert rows.dtype == dtype
    assert sorted(rows.flatten().tolist()) == [0, 0, 1, 2, n_words - 1]
    assert (tmp_path / "rows").stat().st_size == 5 * dtype.itemsize
    rows[:] = 0  # the file is not changed
    assert np.fromfile(tmp_path / "rows", "H" if dtype == torch.uint16 else "i").any()


def test_packing_takes_little_memory(tokenizer, tmp_path):
    lines = "".join(f"x{i} = {i}\n" for i in range(100))
    sizes = {}
    for n_documents in (500, 2_500):
        tracemalloc.start()
        with open(tmp_path / "rows", "w+b") as file:
            rows = tl_sparse.data.corpus._write_rows(
                file, (f"n = {i}\n{lines}" for i in range(n_documents)), tokenizer, 64, 0
            )
        sizes[n_documents] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert (rows == tokenizer.eos_token_id).sum() == n_documents
    assert rows.nbytes > 2 * sizes[2_500]
    assert sizes[2_500] < 1.2 * sizes[500]


# Streams


def write_rows(folder, texts, name="part.jsonl", column="text"):
    folder.mkdir(exist_ok=True)
    lines = [json.dumps({"id": i, column: text}) + "\n" for i, text in enumerate(texts)]
    (folder / name).write_text("".join(lines))
    return f"hf:{folder}"


def test_a_stream_is_split_and_shuffled_by_its_seed(tmp_path):
    texts = [f"document {i}\n" for i in range(200)]
    source = write_rows(tmp_path / "set", [*texts, None, "", "  \n"])
    config = DataConfig(source, validation_fraction=0.2)
    documents = load_documents(config)
    train_texts = list(documents.train)
    assert train_texts == list(documents.train) == list(load_documents(config).train)
    assert sorted(train_texts + documents.validation) == sorted(texts)
    assert 20 < len(documents.validation) < 60
    assert train_texts != [text for text in texts if text in train_texts]
    assert documents.description == f"the dataset {source} (at most 1,000,000,000 characters)"
    other = load_documents(dataclasses.replace(config, seed=1))
    assert set(other.validation) != set(documents.validation)
    assert (
        list(load_documents(DataConfig(f"{source}/part.jsonl", validation_fraction=0.2)).train)
        == train_texts
    )


def test_a_stream_may_be_parquet_with_another_column_and_split(tmp_path, monkeypatch):
    # Five seconds after each pass over a Parquet file, which only matter when the process ends.
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)
    texts = [f"document {i}" for i in range(10)]
    (tmp_path / "set").mkdir()
    pq.write_table(pa.table({"code": texts}), tmp_path / "set" / "test.parquet")
    documents = load_documents(
        DataConfig(f"hf:{tmp_path / 'set'}", split="test", text_column="code")
    )
    assert sorted([*documents.train, *documents.validation]) == sorted(texts)


def test_how_much_is_taken_of_a_stream(tmp_path, monkeypatch):
    source = write_rows(tmp_path / "set", [f"{i:09}\n" for i in range(1000)])
    documents = load_documents(DataConfig(source, max_chars=2_000, validation_fraction=0.5))
    assert len(list(documents.train)) + len(documents.validation) == 200
    # The whole is longer than what is held out of it may be.
    monkeypatch.setattr("tl_sparse.data.stream.STREAM_VALIDATION_CHARS", 300)
    documents = load_documents(DataConfig(source, validation_fraction=0.5))
    assert len(documents.validation) == 30
    assert len(set(documents.train) - set(documents.validation)) == 970


@pytest.mark.parametrize(
    ("texts", "changes", "message"),
    [
        ([], {}, "cannot read the dataset|0 documents with text"),
        (["", None, " \n"], {}, "has 0 documents with text in 'text'; give at least two"),
        (["one"], {}, "has 1 document with text in 'text'; give at least two"),
        (
            ["one", "two"],
            {"text_column": "code"},
            "has no column 'code'; text_column must be one of id, text",
        ),
        ([1, 2], {}, "column 'text' of .* must hold text, not int"),
        ([["one"], ["two"]], {}, "column 'text' of .* must hold text, not list"),
        (
            ["one", "two"],
            {"split": "test"},
            r"cannot read the dataset .*: test. Available splits: \['train'\]",
        ),
    ],
)
def test_unusable_datasets(texts, changes, message, tmp_path):
    config = DataConfig(write_rows(tmp_path / "set", texts), **changes)
    with pytest.raises(DataError, match=message):
        train(tiny(config), tmp_path / "run", device="cpu", progress=False)
    assert not (tmp_path / "run").exists()


def test_datasets_that_cannot_be_read(tmp_path):
    with pytest.raises(
        DataError,
        match=r"cannot read the dataset hf:.*nothing: .*; it must be \"hf:owner/name\" as",
    ):
        load_documents(DataConfig(f"hf:{tmp_path}/nothing"))
    with pytest.raises(
        DataError, match=r"cannot read the dataset hf:.*doesn't contain any data files; it must be"
    ):
        load_documents(DataConfig(f"hf:{tmp_path}"))
    source = write_rows(tmp_path / "set", ["one", "two"])
    with open(tmp_path / "set" / "part.jsonl", "a") as file:
        file.write('{"text": "thr')
    with pytest.raises(DataError, match=r"cannot read the dataset hf:.*JSON"):
        load_documents(DataConfig(source))
    (tmp_path / "binary").mkdir()
    (tmp_path / "binary" / "train.txt").write_bytes(b"\xff\xfe\0")
    with pytest.raises(DataError, match=r"cannot read the dataset hf:.*can't decode byte 0xff"):
        load_documents(DataConfig(f"hf:{tmp_path / 'binary'}"))


def test_a_dataset_when_offline(monkeypatch):
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda path, **_: (_ for _ in ()).throw(ConnectionError("offline")),
    )
    with pytest.raises(
        DataError, match="cannot read the dataset hf:owner/name: offline; it must be"
    ):
        load_documents(DataConfig("hf:owner/name"))


# What a run packs


def tiny(data, d_vocab=384, seed=0):
    return TrainConfig(
        tiny_config(d_vocab=d_vocab, n_ctx=16),
        data,
        steps=3,
        batch_size=2,
        min_nonzero=0,
        seed=seed,
    )


IDIOMS = DataConfig(stdlib_chars=0, idiom_chars=20_000)


@pytest.fixture(scope="module")
def streamed(tmp_path_factory):
    source = write_rows(tmp_path_factory.mktemp("stream") / "set", idiom_documents(40_000, 0))
    return DataConfig(source, validation_fraction=0.2)


@pytest.mark.parametrize("where", ["folder", "temporary"])
def test_a_corpus_is_what_its_documents_pack_to(where, tmp_path):
    folder = tmp_path / "run" / "data" if where == "folder" else None
    corpus = packed_for(tiny(IDIOMS, seed=5), ["):\n"], folder)
    documents = load_documents(IDIOMS)
    tokenizer = train_tokenizer(documents.train, 384, ["):\n"])
    assert corpus.tokenizer.get_vocab() == tokenizer.get_vocab()
    for ours, texts in ((corpus.train, documents.train), (corpus.validation, documents.validation)):
        assert ours.dtype == torch.uint16
        assert torch.equal(ours.int(), in_memory(texts, tokenizer, 16, 5))
    if folder is not None:
        assert sorted(os.listdir(folder.parent)) == ["data"]
        assert {"train", "validation", "tokenizer.json"} <= set(os.listdir(folder))


def test_a_streamed_corpus_keeps_documents_and_order(streamed):
    first, second = (packed_for(tiny(streamed), []) for _ in range(2))
    assert first.about == second.about
    assert torch.equal(first.train.int(), second.train.int())
    text = first.tokenizer.decode(first.train.flatten().tolist())
    documents = text.split(END_OF_TEXT)[1:]
    assert documents[:-1] == list(load_documents(streamed).train)[: len(documents) - 1]


def test_the_tokenizer_is_trained_on_the_beginning_of_a_stream(streamed, monkeypatch):
    monkeypatch.setattr("tl_sparse.data.corpus.STREAM_TOKENIZER_CHARS", 20_000)
    texts = []
    real = train_tokenizer
    monkeypatch.setattr(
        "tl_sparse.data.corpus.train_tokenizer",
        lambda sample, *rest: real(texts.extend(sample) or texts, *rest),
    )
    corpus = packed_for(tiny(streamed), [])
    assert texts == list(Stream(streamed, load_documents(streamed).train.held_out))[: len(texts)]
    assert 10_000 < sum(map(len, texts)) < 21_000
    assert corpus.train.numel() > sum(len(corpus.tokenizer.encode(text)) for text in texts) + 1_000


def test_a_packed_corpus_is_found_again(tmp_path, monkeypatch):
    folder = tmp_path / "run" / "data"
    made = packed_for(tiny(IDIOMS), [], folder)
    with monkeypatch.context() as patch:
        for name in ("train_tokenizer", "load_documents"):
            patch.setattr(f"tl_sparse.data.corpus.{name}", must_not_run(f"{name} is called again"))
        found = packed_for(tiny(IDIOMS), [], folder, made.about)
    assert found.about == made.about
    assert found.tokenizer.backend_tokenizer.to_str() == made.tokenizer.backend_tokenizer.to_str()
    assert torch.equal(found.train.int(), made.train.int())
    assert torch.equal(found.validation.int(), made.validation.int())


@pytest.mark.parametrize(
    "damage", ["truncated", "no validation", "no tokenizer", "no folder", "damaged tokenizer"]
)
def test_a_packed_corpus_that_does_not_fit_is_made_again(damage, tmp_path):
    folder = tmp_path / "run" / "data"
    made = packed_for(tiny(IDIOMS), [], folder)
    before = {name: (folder / name).read_bytes() for name in os.listdir(folder)}
    gone = {
        "no validation": ["validation"],
        "no tokenizer": ["tokenizer.json"],
        "no folder": before,
    }
    for name in gone.get(damage, []):
        (folder / name).unlink()
    if damage == "truncated":
        (folder / "train").write_bytes(before["train"][:-2])
    if damage == "damaged tokenizer":
        (folder / "tokenizer.json").write_bytes(before["tokenizer.json"][:-20])
    if damage == "no folder":
        folder.rmdir()
    assert packed_for(tiny(IDIOMS), [], folder, made.about).about == made.about
    assert {name: (folder / name).read_bytes() for name in os.listdir(folder)} == before


def test_other_text_is_refused_and_what_was_there_stays(tmp_path):
    source = write_files(
        tmp_path / "text", a_py="x = 1\n" * 99, b_py="print('the red house')\n" * 99
    )
    config = tiny(DataConfig(source), d_vocab=260)
    folder = tmp_path / "run" / "data"
    made = packed_for(config, [], folder)
    (folder / "validation").unlink()
    write_files(tmp_path / "text", a_py="y = 1\n" * 99)
    before = sorted(os.listdir(folder))
    with pytest.raises(
        TrainError,
        match=r"run was trained on different text: DataConfig\(.*\) no longer gives the same",
    ):
        packed_for(config, [], folder, made.about)
    assert sorted(os.listdir(folder)) == before
    assert os.listdir(tmp_path / "run") == ["data"]


def test_nothing_is_left_where_packing_fails(tmp_path, monkeypatch):
    folder = tmp_path / "run" / "data"
    with pytest.raises(TokenizerError, match="the text is too small for vocab_size 384"):
        packed_for(
            tiny(DataConfig(write_files(tmp_path / "text", a_py="x = 1\n", b_py="x = 1\n"))),
            [],
            folder,
        )
    assert not folder.parent.exists()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tl_sparse.data.corpus._write_rows", full)
    with pytest.raises(
        DataError, match=r"cannot write the packed tokens of .*run: .*No space left on device"
    ):
        packed_for(tiny(IDIOMS), [], folder)
    assert os.listdir(folder.parent) == []


def test_training_on_a_stream(streamed, tmp_path):
    model, record = train(tiny(streamed), tmp_path / "run", device="cpu", progress=False)
    assert record["data"].startswith("the dataset hf:")
    assert record["config"]["data"]["source"] == streamed.source
    _, again = train(tiny(streamed), device="cpu", progress=False)
    assert again["validation_loss"] == record["validation_loss"]
    assert not (tmp_path / "run" / "data").exists()
    sample = tl_sparse.load_corpus(tmp_path / "run", model.tokenizer, 16)
    assert sample.dtype == torch.int32
    assert (
        tl_sparse.load_corpus(tmp_path, model.tokenizer, 16, streamed.source).dtype == torch.int32
    )
