"""Damage to files that carry checksums is noticed, wherever it is."""

import json
import struct

import pytest
import safetensors.torch
import torch

from helpers import taking_less_than
from tl_sparse.checksums import ENTRY, FILES, check_files, checksums_of, file_checksum
from tl_sparse.errors import CheckpointError
from tl_sparse.files import read_json, read_tensors, write_json, write_tensors

pytestmark = pytest.mark.any_line

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([True, False])}
VALUES = {"name": "é", "sizes": [1, 2.5], "known": None}


def same(tensors):
    return tensors.keys() == TENSORS.keys() and all(
        torch.equal(tensor, TENSORS[name]) for name, tensor in tensors.items()
    )


def test_every_flipped_bit_of_a_tensor_file_is_noticed(tmp_path):
    path = tmp_path / "file.safetensors"
    write_tensors(path, TENSORS)
    assert same(read_tensors(path))
    whole = path.read_bytes()
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"file\.safetensors is (truncated or )?damaged"):
            read_tensors(path)


def test_every_flipped_bit_of_a_json_file_is_noticed_or_harmless(tmp_path):
    path = tmp_path / "file.json"
    write_json(path, VALUES)
    assert read_json(path) == VALUES
    whole = path.read_bytes()
    n_noticed = 0
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            found = read_json(path)
        except CheckpointError:
            n_noticed += 1
        else:  # the flip was in the whitespace, or in the name of the checksum's entry
            assert {name: found[name] for name in VALUES} == VALUES
    assert n_noticed > 0.7 * len(whole)


def test_a_file_cut_short_or_continued_is_noticed(tmp_path):
    path = tmp_path / "file.safetensors"
    write_tensors(path, TENSORS)
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:20], whole[:4], b"", whole + b"\0"):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="damaged"):
            read_tensors(path)


def test_a_header_longer_than_the_file_takes_no_memory(tmp_path):
    path = tmp_path / "file.safetensors"
    write_tensors(path, TENSORS)
    whole = path.read_bytes()
    for length in (len(whole) - 7, 2**26, 10**8, 2**63):  # 10**8: the limit of the library
        path.write_bytes(struct.pack("<Q", length) + whole[8:])
        refused = r"damaged: the header is (longer than|too long)"
        with taking_less_than(2**20), pytest.raises(CheckpointError, match=refused):
            read_tensors(path)


def test_files_without_checksums_are_accepted(tmp_path):
    safetensors.torch.save_file(TENSORS, tmp_path / "a.safetensors")
    assert same(read_tensors(tmp_path / "a.safetensors"))
    safetensors.torch.save_file(TENSORS, tmp_path / "b.safetensors", metadata={"format": "pt"})
    assert same(read_tensors(tmp_path / "b.safetensors"))
    (tmp_path / "c.json").write_text('{"a": 1}')
    assert read_json(tmp_path / "c.json") == {"a": 1}


def test_an_edited_json_file_says_how_it_is_accepted(tmp_path):
    path = tmp_path / "file.json"
    write_json(path, VALUES)
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values))  # the layout may change
    assert read_json(path) == VALUES
    values["name"] = "mine"
    path.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=f"remove its entry '{ENTRY}'"):
        read_json(path)
    del values[ENTRY]
    path.write_text(json.dumps(values))
    assert read_json(path) == {**VALUES, "name": "mine"}


def test_writing_is_deterministic(tmp_path):
    write_tensors(tmp_path / "a", TENSORS)
    write_tensors(tmp_path / "b", TENSORS)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_files_that_belong_together(tmp_path):
    described_by = tmp_path / "about.json"
    tensors = tmp_path / "t.safetensors"
    text = tmp_path / "t.txt"
    write_tensors(tensors, TENSORS)
    text.write_text("text")
    values = {FILES: checksums_of(tmp_path)}
    assert list(values[FILES]) == ["t.safetensors", "t.txt"]
    check_files(described_by, values, tensors)
    write_tensors(tensors, {"a": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"t\.safetensors does not belong to .*about\.json"):
        check_files(described_by, values, tensors)
    write_tensors(tensors, TENSORS)
    text.write_text("Text")
    with pytest.raises(CheckpointError, match=r"t\.txt does not belong to .*two different saves"):
        check_files(described_by, values, tensors)
    text.unlink()
    with pytest.raises(CheckpointError, match=r"t\.txt is missing; it was saved together"):
        check_files(described_by, values, tensors)


@pytest.mark.parametrize("name", ["../about.json", "/etc/hostname", "", ".", "a/b"])
def test_only_files_beside_are_compared(tmp_path, name):
    with pytest.raises(CheckpointError, match="not the name of a file beside it"):
        check_files(
            tmp_path / "about.json", {FILES: {name: "blake2b:"}}, tmp_path / "t.safetensors"
        )


def test_the_checksum_of_any_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    # As `b2sum -l 256` prints it.
    digits = "bddd813c634239723171ef3fee98579b94964e3bb1cb3e427262c8c068d52319"
    assert file_checksum(path) == f"blake2b:{digits}"
    with pytest.raises(CheckpointError, match="cannot read"):
        file_checksum(tmp_path / "none")
