"""Documents: the idioms, the standard library, the user's files; and their packing into rows of tokens."""

import ast
import random
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_sparse.config import DataConfig
from tl_sparse.data import load_documents, pack_tokens
from tl_sparse.errors import ConfigError, DataError
from tl_sparse.idioms import WORDS, Writer, idiom_documents
from tl_sparse.tokenizer import END_OF_TEXT, train_tokenizer


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


@settings(max_examples=20, deadline=None)
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
        ({"source": ""}, "source = '' is not possible; it must be \"builtin\", a folder, a glob pattern or a file"),
        ({"source": Path("x")}, "source = PosixPath('x') is not possible; it must be of type str"),
        ({"stdlib_chars": -1}, "stdlib_chars = -1 is not possible; it must be at least 0"),
        ({"idiom_chars": 1.5}, "idiom_chars = 1.5 is not possible; it must be of type int"),
        ({"seed": True}, "seed = True is not possible; it must be of type int"),
        ({"stdlib_chars": 0, "idiom_chars": 0}, "stdlib_chars = 0 is not possible; it must be above 0 when"),
        ({"validation_fraction": 0.0}, "validation_fraction = 0.0 is not possible; it must be in (0, 1)"),
        ({"validation_fraction": 1}, "validation_fraction = 1 is not possible; it must be in (0, 1)"),
        ({"validation_fraction": float("nan")}, "validation_fraction = nan is not possible; it must be in (0, 1)"),
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
    # As many characters as fit into the fraction: no further idiom file, all below 1,500 characters, would.
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
    source = write_files(tmp_path, b_py="b\n", a__c_txt="c\r\nd\n", z_md="no", e_py="  \n", d_py="\ufeffd\n")
    documents = load_documents(DataConfig(source, validation_fraction=0.4))
    assert sorted(documents.train + documents.validation) == ["b\n", "c\nd\n", "d\n"]
    assert (len(documents.train), len(documents.validation)) == (2, 1)
    assert documents.description == f"3 {source} files (8 characters)"


def test_the_split_does_not_depend_on_the_order_of_the_file_system(tmp_path, monkeypatch):
    source = write_files(tmp_path, **{f"f{i}_py": f"x = {i}\n" for i in range(30)})
    documents = load_documents(DataConfig(source, seed=3))
    rglob = Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda self, pattern: reversed(list(rglob(self, pattern))))
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
    with pytest.raises(DataError, match="nothing but white space in the 2 files of"):
        load_documents(DataConfig(source))
    write_files(tmp_path, a_py="x = 1")
    with pytest.raises(DataError, match=r"too little text .* 1 .* file \(5 characters\)"):
        load_documents(DataConfig(source))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\0b", r"bad\.py is not text: it has a NUL byte"),
        (b"ab\xff", r"bad\.py is not UTF-8 text: .* at byte 2"),
    ],
)
def test_files_that_are_not_text(tmp_path, content, message):
    (tmp_path / "bad.py").write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_documents(DataConfig(str(tmp_path)))


def test_unreadable_file(tmp_path):
    (tmp_path / "gone.py").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"cannot read .*gone\.py: No such file"):
        load_documents(DataConfig(str(tmp_path)))


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
    with pytest.raises(DataError, match="the documents are 2 tokens, fewer than one row of n_ctx = 8"):
        pack_tokens(["x"], tokenizer, 8, seed=0)
    with pytest.raises(DataError, match="the documents are 0 tokens"):
        pack_tokens([], tokenizer, 8, seed=0)


def test_packing_does_not_depend_on_how_the_tokenizer_was_last_used(tokenizer):
    documents = ["x = 1\n" * 50, "print('the red house')\n" * 20]
    before = pack_tokens(documents, tokenizer, 16, seed=0)
    tokenizer(["x = 1", "y"], truncation=True, max_length=2, padding=True)
    assert torch.equal(pack_tokens(documents, tokenizer, 16, seed=0), before)
