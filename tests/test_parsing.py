"""Values from files of strangers: what is read, what is refused, and that both take a moment."""

import json
import os

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_sparse.cli import main
from tl_sparse.errors import CheckpointError, ConfigError, DataError, TLSparseError
from tl_sparse.files import read_json, read_tensors, read_torch, read_yaml, write_json
from tl_sparse.parsing import MAX_JSON_BYTES, MAX_YAML_BYTES, parse_json, parse_yaml, printable
from tl_sparse.tasks import get_task

pytestmark = pytest.mark.any_line

few = settings(max_examples=50, deadline=None, derandomize=True)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
SCALARS = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | TEXTS
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner), max_leaves=20
)


class WithoutAliases(yaml.SafeDumper):
    def ignore_aliases(self, data):
        return True


@few
@given(VALUES)
def test_what_json_writes_is_read(value):
    text = json.dumps(value, ensure_ascii=False)
    assert json.dumps(parse_json(text), ensure_ascii=False) == text


@few
@given(VALUES)
def test_what_yaml_writes_is_read(value):
    text = yaml.dump(value, Dumper=WithoutAliases, allow_unicode=True)
    assert yaml.dump(parse_yaml(text), Dumper=WithoutAliases, allow_unicode=True) == text


def nested(depth):
    return "[" * depth + "]" * depth


@pytest.mark.parametrize("parse", [parse_json, parse_yaml])
def test_a_hundred_levels_are_enough(parse):
    assert repr(parse(nested(100))) == nested(100)
    for depth in (101, 900, 950, 996, 5000, 50_000):
        with pytest.raises(ValueError, match="more than 100 levels"):
            parse(nested(depth))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f'{{"a": {10**400}}}', "has 401 digits"),
        (f'{{"a": -{"9" * 100_000}}}', "digits"),
        (f'{{"a": {2**64}}}', "does not fit into 64"),
        ('{"a": "\\ud800"}', "surrogates not allowed"),
        ('{"\\udfff": 1}', "surrogates not allowed"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' is there twice"),
        ("{", "Expecting property name"),
        ("", "Expecting value"),
    ],
)
def test_json_that_is_refused(text, message, tmp_path):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(CheckpointError, match=rf"x\.json is not valid JSON: .*{message}"):
        read_json(path)


def test_json_keeps_what_is_unusual_and_usable():
    text = f'{{"a": [{2**64 - 1}, {-(2**63)}, 1e999, NaN, "\\ud83d\\ude00"]}}'
    assert repr(parse_json(text)) == repr(
        {"a": [2**64 - 1, -(2**63), float("inf"), float("nan"), "😀"]}
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &x [1]\nb: *x", "aliases .* are not read"),
        ("a: &x [*x]", "aliases .* are not read"),
        ("a: &x {b: 1}\nc: {<<: *x}", "aliases .* are not read"),
        ("a: 1\na: 2", "a key is there twice"),
        ("a: 2001-01-01", r"datetime\.date\(2001, 1, 1\) is not a text, a number"),
        ("a: !!binary aGk=", "b'hi' is not a text, a number"),
        ("a: !!set {b}", "is not a text, a number"),
        ("a: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("1: a", "the key 1 is not a text"),
        ("a: 0x" + "f" * 9000, "36000 bits"),
        ("a: " + "9" * 9000, "4300"),
        ("a: 1\n---\na: 2", "expected a single document"),
        ("a: [", "expected the node content"),
        ("- 1", "must hold a mapping of fields to values, not a list"),
    ],
)
def test_yaml_that_is_refused(text, message, tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=rf"(?s)x\.yaml .*{message}"):
        read_yaml(path)


@pytest.mark.parametrize(
    ("read", "size"), [(read_json, MAX_JSON_BYTES), (read_yaml, MAX_YAML_BYTES)]
)
def test_files_that_are_too_large(read, size, tmp_path):
    path = tmp_path / "large"
    with open(path, "wb") as file:
        file.truncate(size + 1)  # takes no space on the disk
    with pytest.raises(TLSparseError, match=f"it has {size + 1:,} bytes, and at most {size:,} are"):
        read(path)


@pytest.mark.parametrize("read", [read_json, read_yaml])
def test_files_of_other_programs(read, tmp_path):
    path = tmp_path / "x.JSON"
    path.write_bytes('\ufeff{\r\n"a": [1,\r\n"é"]\r\n}\r\n'.encode())
    assert read(path) == {"a": [1, "é"]}
    path.write_bytes('{"a": 1}'.encode("utf-16"))
    with pytest.raises(TLSparseError, match="utf-8"):
        read(path)


READERS = {
    "JSON": (read_json, CheckpointError),
    "YAML": (read_yaml, ConfigError),
    "safetensors": (read_tensors, CheckpointError),
    "torch": (read_torch, CheckpointError),
    "task": (lambda path: get_task(str(path)), DataError),
}


@pytest.mark.parametrize("name", READERS)
def test_what_is_no_file(name, tmp_path):
    read, error = READERS[name]
    path = tmp_path / "x.jsonl"
    os.mkfifo(path)  # opening it would wait for ever for somebody who writes
    with pytest.raises(error, match=r"x\.jsonl.* it is a named pipe or a device, not a file"):
        read(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(error, match=r"x\.jsonl.* it is a folder, not a file"):
        read(path)
    link = tmp_path / "link.jsonl"
    link.symlink_to("/dev/zero")
    with pytest.raises(error, match=r"link\.jsonl.* it is a named pipe or a device, not a file"):
        read(link)


@few
@given(TEXTS)
def test_printable_texts_say_which_characters_they_had(text):
    written = printable(text)
    assert written.isprintable()
    if "\\" not in text:
        assert written.encode("latin-1", "backslashreplace").decode("unicode_escape") == text


def test_an_error_does_not_steer_the_terminal(tmp_path, capsys):
    folder = tmp_path / "model"
    folder.mkdir()
    write_json(
        folder / "config.json", {"model_type": "tl_sparse", "format_version": 1, "\x1b[2J": 1}
    )
    assert main(["tasks", str(folder)]) == 1
    assert "\x1b" not in capsys.readouterr().err
