"""The tokenizer: what is one piece, what is one token, and that no text is lost."""

import base64
import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from helpers import word_tokenizer
from tl_sparse.data.corpus import pack_tokens
from tl_sparse.data.tokenizer import (
    END_OF_TEXT,
    PIECES,
    load_tokenizer,
    train_tokenizer,
)
from tl_sparse.errors import TokenizerError
from tl_sparse.tasks import make_task_data, token_ids
from tl_sparse.tasks.idioms import idiom_documents

pytestmark = pytest.mark.any_line

VOCAB_SIZE = 512
CANDIDATES = ("')", '")', "=None", "):\n", ".add", " +=", "]]", " True:\n", " True\n", " ==")


@pytest.fixture(scope="module")
def texts():
    return idiom_documents(200_000, seed=0)


@pytest.fixture(scope="module")
def tokenizer(texts):
    return train_tokenizer(texts, VOCAB_SIZE, required=CANDIDATES)


def single_token(tokenizer, text):
    [token] = token_ids(tokenizer, text)
    return token


def pieces(text):
    split = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    return [text[start:end] for _, (start, end) in split.pre_tokenize_str(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("print('the red house')\n", ["print", "('", "the", " red", " house", "')", "\n"]),
        ("log(\"a\", 'b')", ["log", '("', "a", '",', " '", "b", "')"]),
        (
            "def f(a, b=None):\n    x",
            ["def", " f", "(", "a", ",", " b", "=None", "):\n", "    ", "x"],
        ),
        ("x.add(1)", ["x", ".add", "(", "1", ")"]),
        ("','.join(x)", ["','", ".join", "(", "x", ")"]),
        ("if x == True:\n", ["if", " x", " ==", " True:\n"]),
        ("return True\n\n", ["return", " True\n", "\n"]),
        ("isTrue:\n", ["isTrue", ":\n"]),
        ("[[1, 2], [3]]\n", ["[[", "1", ",", " 2", "],", " [", "3", "]]", "\n"]),
        ("x += ''\n", ["x", " +=", " ''", "\n"]),
        ("x=NoneType", ["x", "=", "NoneType"]),
        ("f'{x}'", ["f", "'{", "x", "}'"]),
        ("a  # b\r\n\tc", ["a", "  ", "#", " b", "\r", "\n", "\t", "c"]),
        ("...x", ["..", ".x"]),
    ],
)
def test_pieces(text, expected):
    assert pieces(text) == expected


@given(
    st.text(
        alphabet=st.one_of(
            st.sampled_from(" \n.:=()'\"_aTrueNone1é日\t"), st.characters(codec="utf-8")
        )
    )
)
def test_pieces_never_join_a_quote_with_a_letter_or_a_newline(text):
    parts = pieces(text)
    assert "".join(parts) == text
    for part in parts:
        if "'" in part or '"' in part:
            assert not any(character.isalpha() for character in part)
            assert "\n" not in part or part.endswith(":\n")


@settings(max_examples=200)
@given(text=st.text())
def test_decoding_gives_back_any_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_decoding_gives_back_code_and_its_spaces(tokenizer, texts):
    for text in [
        *texts[:20],
        "a , b . c ! d ' s do n't\n\n   x  ",
        END_OF_TEXT + " x" + END_OF_TEXT,
        "",
    ]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_size_and_special_token(tokenizer):
    assert len(tokenizer) == tokenizer.vocab_size == VOCAB_SIZE
    assert sorted(tokenizer.get_vocab().values()) == list(range(VOCAB_SIZE))
    ids = {
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
        tokenizer.unk_token_id,
    }
    assert ids == {VOCAB_SIZE - 1}
    assert tokenizer.encode(END_OF_TEXT) == [VOCAB_SIZE - 1]
    assert VOCAB_SIZE - 1 not in tokenizer.encode("x = 1\n")  # nothing is added around a text


@pytest.mark.parametrize("text", CANDIDATES)
def test_required_strings_are_single_tokens(tokenizer, text):
    assert tokenizer.decode([single_token(tokenizer, text)]) == text


def test_a_required_string_that_never_occurs_becomes_a_token(texts):
    tokenizer = train_tokenizer(texts, VOCAB_SIZE, required=("<=>!", ".quux"))
    assert tokenizer.tokenize("a<=>!") == ["a", "<=>!"]
    single_token(tokenizer, ".quux")


def test_training_is_deterministic_and_reads_an_iterator_once(texts, tokenizer):
    again = train_tokenizer(iter(texts), VOCAB_SIZE, required=CANDIDATES)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.encode(texts[0]) == tokenizer.encode(texts[0])


def test_save_and_load(tokenizer, texts, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    for text in [*texts[:20], "a , b ! do n't  "]:
        assert loaded.encode(text) == tokenizer.encode(text)
        assert loaded.decode(loaded.encode(text)) == text
    assert loaded.special_tokens_map == tokenizer.special_tokens_map


def test_load_a_tokenizer_json_alone(tokenizer, texts, tmp_path):
    tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.encode(texts[0]) == tokenizer.encode(texts[0])
    assert loaded.decode(loaded.encode("a , b !")) == "a , b !"
    assert (loaded.bos_token_id, loaded.pad_token_id, len(loaded)) == (
        VOCAB_SIZE - 1,
        VOCAB_SIZE - 1,
        VOCAB_SIZE,
    )


def test_load_errors(tmp_path):
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json in .*save_pretrained"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(
        TokenizerError, match=r"tokenizer\.json is not a tokenizer that can be read"
    ):
        load_tokenizer(tmp_path)


def test_vocabulary_too_small(texts):
    with pytest.raises(TokenizerError, match=r"vocab_size is 256; .* at least 257 .*--d-vocab"):
        train_tokenizer(texts, 256)
    assert len(train_tokenizer(texts, 257)) == 257
    no_room = r"""257 entries has no room for 1 of the 2 strings .* "'\)" .* larger.*--d-vocab"""
    with pytest.raises(TokenizerError, match=no_room):
        train_tokenizer(texts, 257, required=("')", "r"))


def test_text_too_small():
    with pytest.raises(
        TokenizerError,
        match=r"too small for vocab_size 300: it gives only 259 entries.*--d-vocab.*at most 259",
    ):
        train_tokenizer(["abc"], 300)


def test_a_required_string_that_is_cut(texts):
    with pytest.raises(
        TokenizerError, match=r"cannot be one token: the pre-tokenizer cuts it into \['x', '\.y'\]"
    ):
        train_tokenizer(texts, VOCAB_SIZE, required=("x.y",))


def test_what_lies_beside_a_tokenizer(tmp_path):
    folder = tmp_path / "model"
    word_tokenizer(["a", "b"], eos_token="a").save_pretrained(folder)
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    os.mkfifo(folder / "special_tokens_map.json")
    with pytest.raises(TokenizerError, match="it is a named pipe or a device, not a file"):
        load_tokenizer(folder)
    (folder / "special_tokens_map.json").unlink()
    for limit in ("many", {}, [1]):
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": limit}))
        with pytest.raises(TokenizerError, match=r"model_max_length = .* is not a number"):
            load_tokenizer(folder)
    path.write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "extra": "\ud800"}))
    with pytest.raises(TokenizerError, match=r"can't encode character '.ud800'"):
        load_tokenizer(folder)


def test_a_tiktoken_file_with_capitals(tmp_path):
    lines = [b"%s %d" % (base64.b64encode(bytes([i])), i) for i in range(256)]
    (tmp_path / "X.TIKTOKEN").write_bytes(b"\r\n".join(lines))
    assert load_tokenizer(tmp_path).encode("ab") == [97, 98]


def write_tokens(folder, name, ids):
    """A tokenizer with these tokens in one of the formats that we read."""
    if name == "vocab.json":
        (folder / "merges.txt").write_text("")
        (folder / name).write_text(json.dumps(ids))
    elif name == "x.tiktoken":
        ranks = {bytes([i]): i for i in range(255)} | {b"\xff": ids["b"]}
        lines = [b"%s %d" % (base64.b64encode(token), rank) for token, rank in ranks.items()]
        (folder / name).write_bytes(b"\n".join(lines))
    else:
        model = models.WordLevel(ids, unk_token="a")
        PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model)).save_pretrained(folder)
        if name == "tokenizer.json alone":
            (folder / "tokenizer_config.json").unlink()


FORMATS = ["vocab.json", "x.tiktoken", "tokenizer.json", "tokenizer.json alone"]


@pytest.mark.parametrize("name", FORMATS)
def test_an_id_far_above_the_others(name, tmp_path):
    """When such a tokenizer was copied, the library took 4 bytes for each id between."""
    write_tokens(tmp_path, name, {"a": 0, "b": 1_002_000})
    with pytest.raises(TokenizerError, match=r"a token has the id 1,002,00[01], which leaves more"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", FORMATS)
def test_ids_without_a_token(name, tmp_path):
    write_tokens(tmp_path, name, {"a": 0, "b": 1000})
    assert max(load_tokenizer(tmp_path).get_vocab().values()) in (1000, 1001)


def test_words_that_a_tokenizer_does_not_know(tmp_path):
    backend = Tokenizer(models.WordLevel({"<s>": 0, "a": 1}, unk_token="no such token"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="<s>"
    ).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert pack_tokens(["a a"], tokenizer, 3, seed=0).tolist() == [[0, 1, 1]]
    message = r"the tokenizer has no tokens for .*; use words of its vocabulary, or a tokenizer"
    with pytest.raises(TokenizerError, match=message):
        single_token(tokenizer, "b")
    with pytest.raises(TokenizerError, match=message):
        pack_tokens(["a b"], tokenizer, 3, seed=0)
    with pytest.raises(TokenizerError, match=message):
        make_task_data("single_double_quote", tokenizer, 1, 0)
