"""Pickles in files of torch.save: those of models are read, and bombs are refused at once."""

import io
import pickle
import struct
import zipfile
from collections import OrderedDict

import pytest
import torch

from helpers import taking_less_than
from tl_sparse.errors import CheckpointError
from tl_sparse.files import read_torch

pytestmark = pytest.mark.any_line


def write_archive(path, content, **further):
    """A file of torch.save with this pickle, and further records."""
    torch.save({}, whole := io.BytesIO())
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            new.writestr(name, content if name.endswith("data.pkl") else old.read(name))
        for name, record in further.items():
            new.writestr(name, record)


def dictionary(value):
    """The pickle of a dictionary with one value, given as instructions."""
    return b"\x80\x02}X\x01\x00\x00\x00a" + value + b"s."


def doubled(times, pair=b"\x86"):
    """Instructions of a value that holds the one before it twice, and so on."""
    steps = [b"q" + bytes([i]) + b"h" + bytes([i]) + pair for i in range(times)]
    return b"K\x01" + b"".join(steps)


def call(name, argument):
    return b"c" + name.replace(" ", "\n").encode() + b"\n" + argument + b"\x85R"


HUGE = b"\x8a\x08" + struct.pack("<q", 2 * 10**9)
BOMBS = {
    "bytes of any number": dictionary(call("builtins bytearray", HUGE)),
    "bytes by their name in Python 2": dictionary(call("__builtin__ bytearray", HUGE)),
    "a storage of any size": dictionary(call("torch FloatStorage", HUGE)),
    "an untyped storage": dictionary(call("torch.storage UntypedStorage", HUGE)),
    "a tensor of any size": dictionary(call("torch Tensor", HUGE)),
    "a quantized tensor": dictionary(call("torch._utils _rebuild_qtensor", HUGE)),
    "any function": dictionary(call("torch._tensor _rebuild_from_type_v2", HUGE)),
    "what a call returned is called": dictionary(call("torch Size", b")")[:-1] + b"RK\x01\x85R"),
    "a tuple doubled as a key": b"\x80\x02}(" + doubled(40) + b"K\x01u.",
    "a tuple doubled as a value": dictionary(doubled(40)),
    "one text, many times": dictionary(
        b"X" + struct.pack("<I", 10**5) + b"x" * 10**5 + b"q\x00" + b"h\x00\x86" * 50
    ),
    "a tuple in a tuple in a tuple": dictionary(b")" + b"\x85" * 10_000),
    "a list in itself": dictionary(b"]q\x00h\x00a"),
    "an object": dictionary(b"ccollections\nOrderedDict\n)\x81"),
    "attributes of a tensor": dictionary(b"}}b"),
    "a text of Python 2": dictionary(b"S'a'\n"),
    "an integer of any length": dictionary(b"\x8b" + struct.pack("<I", 1000) + b"\x01" * 1000),
    "instructions without values": b"\x80\x02s.",
    "a value that was never stored": dictionary(b"h\x07"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused(name, tmp_path):
    path = tmp_path / "final_model.pt"
    write_archive(path, BOMBS[name])
    refused = r"final_model\.pt is refused: besides tensors"
    with taking_less_than(30e6), pytest.raises(CheckpointError, match=refused):
        read_torch(path)


@pytest.mark.parametrize("name", ["bytes of any number", "a tuple doubled as a key"])
def test_bombs_in_old_files_are_refused(name, tmp_path):
    path = tmp_path / "final_model.pt"
    torch.save({}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes().replace(b"\x80\x02}q\x00.", BOMBS[name]))
    with pytest.raises(CheckpointError, match=r"final_model\.pt is refused: besides tensors"):
        read_torch(path)


@pytest.mark.parametrize("size", [1, 2**20, 2**31 - 1, 2**32 - 2])
def test_a_record_with_two_sizes_is_refused_and_takes_no_memory(size, tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"a": torch.tensor([1.0])}, path)
    content = bytearray(path.read_bytes())
    place = content.index(b"PK\x01\x02") + 20  # the compressed size of data.pkl in the index
    content[place : place + 4] = struct.pack("<I", size)
    path.write_bytes(content)
    refused = r"x\.pt is truncated .* overlap or are compressed"
    with taking_less_than(2**20), pytest.raises(CheckpointError, match=refused):
        read_torch(path)


def test_another_pickle_in_an_archive_is_not_taken(tmp_path):
    path = tmp_path / "x.pt"
    bomb = BOMBS["a tuple doubled as a key"]
    write_archive(path, b"\x80\x02}.", **{"archive/DATA.PKL": bomb})
    with pytest.raises(CheckpointError, match=r"overlap or are compressed|2 records called"):
        read_torch(path)
    write_archive(path, b"\x80\x02}.")
    good = path.read_bytes()
    write_archive(path, bomb)
    path.write_bytes(path.read_bytes() + good)  # zipfile reads the second archive, torch the first
    with pytest.raises(CheckpointError, match="its first record is not at the beginning"):
        read_torch(path)
    path.write_bytes(bomb + good)  # and here torch reads what is before the archive
    with pytest.raises(CheckpointError, match="is refused"):
        read_torch(path)


@pytest.mark.filterwarnings("ignore:.*non-zipfile")
@pytest.mark.parametrize("is_new", [True, False])
def test_files_of_tensors_and_plain_values_are_read(is_new, tmp_path):
    shared = {"a": list(range(100)), "b": "text"}
    weight = torch.nn.Parameter(torch.randn(3, 4))
    names = "float32 float64 float16 bfloat16 int64 uint8 bool int8 complex64"
    tensors = {}
    for name in names.split():
        tensors[name] = torch.zeros(2, 3, dtype=getattr(torch, name))[:, 1:]
    values = {
        "state": torch.nn.Linear(2, 3).state_dict(),  # an OrderedDict with attributes
        "tied": [weight, weight],
        "tensors": tensors,
        "plain": [1, -1, 2**40, 0.5, None, True, False, "é", (), (1, 2, 3, 4, 5), {1, 2}, {}],
        "types": [torch.float32, torch.device("cpu"), torch.Size([1, 2])],
        "shared": [shared] * 100,
        "ordered": OrderedDict(a=1),
    }
    path = tmp_path / "x.pt"
    torch.save(values, path, _use_new_zipfile_serialization=is_new)
    read = read_torch(path)
    assert torch.equal(read["tied"][0], weight)
    assert all(torch.equal(read["tensors"][name], tensor) for name, tensor in tensors.items())
    for name in ("plain", "types", "shared", "ordered"):
        assert read[name] == values[name]
    assert read["state"].keys() == values["state"].keys()


@pytest.mark.parametrize(
    "number",
    [b"K\x01K\x02a", b"K\x01K\x02K\x03s", b"K\x01(K\x02K\x03e", b"N(NNu", b"(K\x01a"],
    ids=["an item", "a value with its key", "items", "values with their keys", "a mark"],
)
def test_values_inside_what_holds_none_are_refused_and_leave_nothing_behind(number, tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"a": [1, None], "b": (2, torch.tensor([3]))}, tmp_path / "good.pt")
    write_archive(path, dictionary(number))
    for _ in range(3):
        with pytest.raises(CheckpointError, match=r"x\.pt is refused: .* no container"):
            read_torch(path)
        assert read_torch(tmp_path / "good.pt")["a"] == [1, None]


def test_many_tensors_are_read(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({f"layer.{i}.weight": torch.tensor([i]) for i in range(1000)}, path)
    assert read_torch(path)["layer.999.weight"] == 999


def test_a_pickle_without_torch_is_refused(tmp_path):
    path = tmp_path / "x.pt"
    path.write_bytes(pickle.dumps({"a": [1, 2]}, protocol=2))
    with pytest.raises(CheckpointError, match=r"x\.pt is truncated or damaged"):
        read_torch(path)
