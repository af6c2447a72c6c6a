"""Damaged model folders: a reader gives exactly what the files say, or raises our error; in bounded
time and memory.

Run as a program, `test_reader_fuzz.py COUNT FORMAT...`, it reads COUNT folders of each class of
damage and prints how many were read and refused. The tests run it in a process of its own, so that
a crash, a hang and the memory it takes are the reader's.
"""

import contextlib
import io
import json
import mmap
import random
import re
import resource
import signal
import struct
import sys
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from dataclasses import MISSING
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from formats import (
    circuitgpt_tensors,
    circuitgpt_values,
    openai_tensors,
    openai_values,
    sparse_pretrain_tensors,
    sparse_pretrain_values,
)
from helpers import full_config, run_as_script, tiny_config, tiny_model
from tl_sparse.checkpoints.formats import read_checkpoint
from tl_sparse.checkpoints.network import build_network
from tl_sparse.errors import TLSparseError
from tl_sparse.network.config import SparseConfig

pytestmark = pytest.mark.any_line

SECONDS, BYTES = 20, 64 * 2**20  # for one folder


def native_tensors(cfg, w):
    return dict(w)


def native_values(storage):
    about = {"model_type": "tl_sparse", "architectures": ["SparseTransformer"], "format_version": 1}
    return lambda cfg: about | {"storage": storage} | cfg.to_dict()


#: Format → the names of its two files, and what they hold for a configuration and a state dict of
#: ours.
FORMATS = {
    "openai": ("beeg_config.json", "final_model.pt", openai_values, openai_tensors),
    "circuitgpt": ("config.json", "model.safetensors", circuitgpt_values, circuitgpt_tensors),
    "sparse_pretrain": (
        "config.json",
        "pytorch_model.bin",
        sparse_pretrain_values,
        sparse_pretrain_tensors,
    ),
    "dense": ("config.json", "model.safetensors", native_values("dense"), native_tensors),
    "compact": ("config.json", "model.safetensors", native_values("compact"), native_tensors),
}


def model_of(kind):
    """A model with all features that the format has; for compact storage it is sparse."""
    if kind == "sparse_pretrain":
        return tiny_model(
            tiny_config(
                n_layers=2,
                n_heads=2,
                d_head=3,
                attn_sinks=True,
                bigram_table=True,
                positions="added",
                abs_topk={"attn_in": 0.5, "resid_post_attn": 0.5},
            )
        )
    if kind != "compact":
        return tiny_model(full_config())
    model = tiny_model(full_config(d_model=24, d_mlp=40))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() > 100:
                parameter[
                    torch.rand(parameter.shape, generator=torch.Generator().manual_seed(0)) > 0.05
                ] = 0
    return model


class Folder:
    """What the files of an undamaged folder hold."""

    def __init__(self, kind):
        self.kind, model = kind, model_of(kind)
        self.config_name, self.weights_name, values, tensors = FORMATS[kind]
        with tempfile.TemporaryDirectory() as name:
            model.save_pretrained(Path(name), dense=kind != "compact")
            weights = (Path(name) / "model.safetensors").read_bytes()
        cfg = model.sparse_cfg
        self.zip = self.weights_name != "model.safetensors"
        self.values = values(cfg)
        stored = tensors_in(weights) if kind == "compact" else tensors(cfg, model.state_dict())
        self.tensors = {
            name: x.clone(memory_format=torch.contiguous_format) for name, x in stored.items()
        }
        self.config = json.dumps(self.values).encode()
        self.weights = self.packed(self.tensors)

    def packed(self, tensors):
        """`tensors` as the content of a weights file."""
        if not self.zip:
            return save({name: x.contiguous().clone() for name, x in tensors.items()})
        torch.save(tensors, file := io.BytesIO())
        return file.getvalue()


# --- what a file says, read in another way

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
}


def tensors_in(weights):
    """The tensors in the content of a safetensors or a torch.save file."""
    if weights[:2] == b"PK":
        return torch.load(io.BytesIO(weights), weights_only=True, map_location="cpu")
    end = 8 + struct.unpack("<Q", weights[:8])[0]
    header = json.loads(weights[8:end])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        data, dtype = bytearray(weights[end + start : end + stop]), DTYPES[entry["dtype"]]
        flat = torch.frombuffer(data, dtype=dtype) if data else torch.zeros(0, dtype=dtype)
        tensors[name] = flat.view(entry["shape"])
    return tensors


def expanded(tensors):
    """The tensors behind those of compact storage."""
    names = {name.removesuffix(".shape") for name in tensors if name.endswith(".shape")}
    out = {name: x for name, x in tensors.items() if name.rpartition(".")[0] not in names}
    for name in names:
        values, positions = tensors[f"{name}.values"], tensors[f"{name}.positions"].tolist()
        assert len(set(positions)) == len(values)
        dense = torch.zeros(tensors[f"{name}.shape"].prod().item(), dtype=values.dtype)
        for position, value in zip(positions, values, strict=True):
            assert position >= 0
            dense[position] = value
        out[name] = dense.view(tensors[f"{name}.shape"].tolist())
    return out


def said(folder, values):
    """What a configuration file says of the model, with defaults for what it leaves out."""
    if folder.kind in ("dense", "compact"):
        fields = SparseConfig.__dataclass_fields__.values()
        defaults = {f.name: f.default for f in fields if f.default is not MISSING} | {
            "abs_topk": {}
        }
        return {f.name: values.get(f.name, defaults.get(f.name)) for f in fields}
    if folder.kind == "sparse_pretrain":
        defaults = SPARSE_PRETRAIN_DEFAULTS | {
            "enable_activation_sparsity": "sparsity_config" in values
        }
        values = values["model_config"] | values.get("sparsity_config", {})
    else:
        defaults = OPENAI_DEFAULTS | {"d_head": values["d_model"] // values["n_head"]}
    defaults |= {"d_mlp": 4 * values["d_model"]}
    says = {
        key: values.get(key, defaults.get(key)) for key in REQUIRED[folder.kind] | defaults.keys()
    }
    says |= {key: defaults[key] for key in OR_NULL & defaults.keys() if says[key] is None}
    where, share = ACTIVATIONS[folder.kind]
    says[where] = list(dict.fromkeys(filter(None, says[where].split(","))))
    if folder.kind != "sparse_pretrain":
        return says if says[share] is not None else says | {where: []}
    if not says.pop("enable_activation_sparsity") or not says[where]:
        return says | {where: [], share: 0.25}  # what the writer says without AbsTopK
    return says | {
        share: says[share] if int(says[share] * 6) else 0.25
    }  # of six entries at least one is kept


#: What stands for an absent key, and for null where that is allowed.
OPENAI_DEFAULTS = dict(
    bias=True, ln_bias=True, rms_norm=False, residual_activation_type="identity",
    activation_type="gelu", afrac=None, afrac_loctypes="attn_in,attn_out,mlp_in,mlp_out",
    tied_unembed=True, enable_bigram_table=False, d_pos_emb=None, sinusoidal_cat_pos_emb=False,
    sink=False,
)  # fmt: skip
SPARSE_PRETRAIN_DEFAULTS = dict(
    use_rms_norm=True, tie_embeddings=False, use_positional_embeddings=False, use_bigram_table=True,
    use_attention_sinks=True, activation="gelu", use_bias=True, activation_topk_fraction=0.25,
    activation_sparsity_locations="attn_in,attn_q,attn_k,attn_v,attn_out,mlp_in,mlp_neuron,mlp_out",
)  # fmt: skip
OR_NULL = {"d_head", "d_mlp", "d_pos_emb", "afrac", "afrac_loctypes"}
OPENAI_REQUIRED = {"block_size", "vocab_size", "n_layer", "n_head", "d_model"}
REQUIRED = {
    "openai": OPENAI_REQUIRED,
    "circuitgpt": OPENAI_REQUIRED,
    "sparse_pretrain": {"n_layer", "d_model", "n_ctx", "d_head", "vocab_size"},
}
ACTIVATIONS = {
    "openai": ("afrac_loctypes", "afrac"),
    "circuitgpt": ("afrac_loctypes", "afrac"),
    "sparse_pretrain": ("activation_sparsity_locations", "activation_topk_fraction"),
}


def check_same(folder, config, weights, cfg, state):
    """What was read, put back into the format, is what the files say."""
    _, _, values_of, tensors_of = FORMATS[folder.kind]
    expected, read = said(folder, json.loads(config)), said(folder, values_of(cfg))
    assert read == expected, f"read as {read}, the file has {expected}"
    stored = expanded(tensors_in(weights)) if folder.kind == "compact" else tensors_in(weights)
    read = tensors_of(cfg, state)
    widest = next(iter(state.values())).dtype
    for name, tensor in stored.items():
        same = torch.equal(
            tensor.to(widest).contiguous().view(torch.uint8),
            read[name].contiguous().view(torch.uint8),
        )
        assert same, f"{name} is not what the file says"
    missing = read.keys() - stored.keys()
    assert all(name.endswith(("wpe.weight", "lm_head.weight")) for name in missing), (
        f"{missing} are not in the file"
    )


# --- damage


def flipped(content, rng, regions, most=4):
    """One to `most` bits flipped in the `regions` (start, stop) of `content`."""
    content, (start, stop) = bytearray(content), rng.choice(regions)
    for _ in range(rng.randint(1, most)):
        content[rng.randrange(start, stop)] ^= 1 << rng.randrange(8)
    return bytes(content)


def rezipped(content, change):
    """The archive with its records as `change` (name, content) gives them, and right checksums."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return out.getvalue()


def in_pickle(content, change):
    """The archive with its pickle as `change` gives it."""
    return rezipped(content, lambda name, data: change(data) if name.endswith("data.pkl") else data)


def numbers(rng, huge):
    """A wrong size."""
    if huge:
        return rng.choice(
            [2**31 - 1, 2**31, 2**32, 2**40, 2**62, 2**63 - 1, 2**64, 10**30]
        ) - rng.randrange(2)
    return rng.choice([0, 1, 2, -1, rng.randrange(50), rng.randrange(100_000)])


def renumbered_json(content, rng, huge):
    """One integer in a JSON text changed."""
    places = list(re.finditer(rb"(?<![\d.e\"])\d+(?![\d.e\"])", content))
    place = rng.choice(places)
    old = int(place[0])
    new = (
        numbers(rng, huge) if huge or rng.random() < 0.5 else max(0, old + rng.choice([-1, 1, old]))
    )
    return content[: place.start()] + str(new).encode() + content[place.end() :]


def renumbered_header(content, rng, huge):
    """One number in a safetensors header changed, and its length, so that the rest stays."""
    end = 8 + struct.unpack("<Q", content[:8])[0]
    header = renumbered_json(content[8:end], rng, huge)
    return struct.pack("<Q", len(header)) + header + content[end:]


def renumbered_pickle(data, rng, huge):
    """One small integer in a pickle changed (K: one byte, M: two bytes)."""
    places = list(re.finditer(rb"K(.)|M(..)", data, re.DOTALL))
    place = rng.choice(places)
    number = numbers(rng, huge)
    new = (
        b"\x8a\x10" + number.to_bytes(16, "little", signed=True)
        if huge
        else b"J" + struct.pack("<i", number)
    )
    return data[: place.start()] + new + data[place.end() :]


def truncated(folder, rng):
    if rng.random() < 0.2:
        return folder.config[: rng.randrange(len(folder.config))], folder.weights
    return folder.config, folder.weights[: rng.randrange(len(folder.weights))]


def header_bits(folder, rng):
    w = folder.weights
    if not folder.zip:
        return folder.config, flipped(w, rng, [(0, 8), (8, 8 + struct.unpack("<Q", w[:8])[0])])
    if rng.random() < 0.5:
        return folder.config, in_pickle(w, lambda data: flipped(data, rng, [(0, len(data))]))
    starts = [m.start() for m in re.finditer(b"PK\x03\x04", w)]
    return folder.config, flipped(w, rng, [(start, start + 64) for start in starts])


def index_bits(folder, rng):
    w = folder.weights
    if folder.zip:
        return folder.config, flipped(w, rng, [(w.index(b"PK\x01\x02"), len(w))])
    end = 8 + struct.unpack("<Q", w[:8])[0]
    if folder.kind == "compact" and rng.random() < 0.7:
        name = rng.choice(
            [name for name in folder.tensors if name.endswith((".positions", ".shape"))]
        )
        start, stop = json.loads(w[8:end])[name]["data_offsets"]
        return folder.config, flipped(w, rng, [(end + start, end + stop)], most=2)
    places = [m.span() for m in re.finditer(rb'"data_offsets":\[\d+,\d+\]', w[:end])]
    return folder.config, flipped(w, rng, places, most=2)


def sizes(folder, rng, huge=False):
    w, where = folder.weights, rng.random()
    if where < 0.3:
        return renumbered_json(folder.config, rng, huge), w
    if not folder.zip:
        if where < 0.4:
            return folder.config, struct.pack("<Q", numbers(rng, huge) % 2**64) + w[8:]
        if folder.kind == "compact" and where < 0.7:
            name = rng.choice([name for name in folder.tensors if name.endswith(".shape")])
            shape = folder.tensors[name].clone()
            shape[rng.randrange(len(shape))] = numbers(rng, huge) % 2**63
            return folder.config, folder.packed(folder.tensors | {name: shape})
        return folder.config, renumbered_header(w, rng, huge)
    if where < 0.7:
        return folder.config, in_pickle(w, lambda data: renumbered_pickle(data, rng, huge))
    # The sizes in a local (offset 18) or central (20) header of a record.
    signature, offset = rng.choice([(b"PK\x03\x04", 18), (b"PK\x01\x02", 20)])
    start = rng.choice([m.start() for m in re.finditer(signature, w)]) + offset + rng.choice([0, 4])
    return folder.config, w[:start] + struct.pack("<I", numbers(rng, huge) % 2**32) + w[start + 4 :]


def huge_sizes(folder, rng):
    return sizes(folder, rng, huge=True)


def swapped(folder, rng):
    a, b = rng.sample(sorted(folder.tensors), 2)
    same = [
        name
        for name, x in folder.tensors.items()
        if x.shape == folder.tensors[a].shape and name != a
    ]
    b = rng.choice(same) if same and rng.random() < 0.7 else b
    return folder.config, folder.packed(
        folder.tensors | {a: folder.tensors[b], b: folder.tensors[a]}
    )


def missing(folder, rng):
    gone = rng.sample(sorted(folder.tensors), rng.randint(1, 3))
    return folder.config, folder.packed(
        {name: x for name, x in folder.tensors.items() if name not in gone}
    )


def duplicated(folder, rng):
    name = rng.choice(sorted(folder.tensors))
    where = rng.random()
    if where < 0.3 and folder.zip:
        with zipfile.ZipFile(out := io.BytesIO(folder.weights), "a") as archive:
            record = rng.choice(archive.namelist())
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                archive.writestr(record, archive.read(record))
        return folder.config, out.getvalue()
    if where < 0.3:
        end = 8 + struct.unpack("<Q", folder.weights[:8])[0]
        header = json.loads(folder.weights[8:end])
        again = f',"{name}":{json.dumps(header[rng.choice(sorted(header))])}}}'.encode()
        text = folder.weights[8:end].rstrip()[:-1] + again
        return folder.config, struct.pack("<Q", len(text)) + text + folder.weights[end:]
    others = [
        name.replace(".0.", ".7."),
        name.replace("transformer.", ""),
        f"transformer.{name}",
        f"{name}.values",
        name.removesuffix(".values").removesuffix(".positions").removesuffix(".shape"),
        f"{name} ",
        f"blocks.{name}",
        name.replace("transformer.h.", "blocks."),
        name.replace("circuit_model.", ""),
        name.upper(),
    ]
    other = rng.choice([other for other in others if other != name])
    return folder.config, folder.packed(folder.tensors | {other: folder.tensors[name]})


def mis_shaped(folder, rng):
    name = rng.choice(sorted(folder.tensors))
    x = folder.tensors[name]
    changed = rng.choice(
        [
            x[None],
            x.flatten(),
            x[..., :-1],
            x[1:],
            x.transpose(0, -1),
            x.flatten()[0],
            x[:0],
            torch.cat([x, x]),
            x.reshape(-1, x.shape[0]),
            x[..., None],
        ]
    )
    if folder.zip and rng.random() < 0.2:
        changed = x.flatten()[:1].expand(rng.choice([10, 10**6, 10**15]))
    return folder.config, folder.packed(folder.tensors | {name: changed})


def wrong_dtypes(folder, rng):
    name = rng.choice(sorted(folder.tensors))
    x = folder.tensors[name]
    dtype = rng.choice(
        [
            torch.int64,
            torch.int32,
            torch.int8,
            torch.uint8,
            torch.bool,
            torch.float16,
            torch.bfloat16,
            torch.float64,
            torch.complex64,
            torch.float8_e4m3fn,
        ]
    )
    changed = x.to(dtype)
    if folder.zip and rng.random() < 0.1:
        changed = torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8)
    elif rng.random() < 0.2 and x.is_floating_point():
        changed = x.clone()
        changed.view(-1)[rng.randrange(x.numel())] = rng.choice([torch.nan, torch.inf, -torch.inf])
    return folder.config, folder.packed(folder.tensors | {name: changed})


def damaged_json(folder, rng):
    if rng.random() < 0.3:
        return flipped(folder.config, rng, [(0, len(folder.config))]), folder.weights
    values = json.loads(folder.config)
    inner = (
        values[rng.choice(["model_config", "sparsity_config"])]
        if "model_config" in values
        else values
    )
    key = rng.choice(sorted(inner))
    strange = [
        None,
        [],
        {},
        "x",
        "",
        -1,
        0,
        1,
        0.5,
        True,
        False,
        1e308,
        -1e308,
        float("nan"),
        -float("inf"),
        [[1]],
        {"a": 1},
        "relu",
    ]
    where = rng.random()
    if where < 0.1:
        del inner[key]
    elif where < 0.2:
        inner[rng.choice(["extra", key.upper(), f" {key}"])] = inner[key]
    elif where < 0.3:
        inner[key] = inner[rng.choice(sorted(inner))]
    else:
        inner[key] = rng.choice(strange)
    text = json.dumps(values).encode()
    if where > 0.95:
        text = text.replace(b"{", b"[" * rng.choice([1, 1000, 100_000]) + b"{", 1)
    return text, folder.weights


DAMAGE = (
    truncated,
    header_bits,
    index_bits,
    sizes,
    huge_sizes,
    swapped,
    missing,
    duplicated,
    mis_shaped,
    wrong_dtypes,
    damaged_json,
)

# --- the program and the tests


def status():
    """What the system says of this process, in bytes; nothing where it does not tell."""
    path = Path("/proc/self/status")
    found = re.findall(r"(Vm\w+):\s*(\d+)", path.read_text()) if path.exists() else ()
    return {name: int(size) * 1024 for name, size in found}


def most_taken(call):
    """What `call()` returns, and the bytes by which this process grew at most meanwhile.

    Of memory, whose high-water mark Linux can put back to what is in use now. Of address space,
    which also counts what is asked for and never written, only if it came higher than ever before.
    """
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    before, most = status(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = call()
    after = status()
    if not after:
        return result, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most
    reserved = after["VmPeak"] - before["VmSize"] if after["VmPeak"] > before["VmPeak"] else 0
    return result, max(after["VmHWM"] - before["VmRSS"], reserved)


def read(path):
    """The configuration and state dict in a folder, or None and the error."""
    try:
        checkpoint = read_checkpoint(path)
        return checkpoint.config, build_network(checkpoint, path).state_dict()
    except TLSparseError as error:
        return None, error


def fuzz(kinds, count):
    torch.set_num_threads(1)
    counts = {}
    with tempfile.TemporaryDirectory() as name:
        path = Path(name)
        for kind in kinds:
            folder = Folder(kind)
            for file in path.iterdir():
                file.unlink()
            for damage in DAMAGE:
                outcomes = counts[f"{kind} {damage.__name__}"] = Counter()
                for i in [None, *range(count)]:
                    rng = random.Random(f"{kind} {damage.__name__} {i}")
                    config, weights = (
                        (folder.config, folder.weights) if i is None else damage(folder, rng)
                    )
                    (path / folder.config_name).write_bytes(config)
                    (path / folder.weights_name).write_bytes(weights)
                    print(f"{kind} {damage.__name__} {i}", file=sys.stderr)
                    signal.alarm(SECONDS)
                    (cfg, state), taken = most_taken(lambda: read(path))
                    dense = 0
                    if cfg is not None:
                        dense = sum(x.nbytes for x in state.values())
                        check_same(folder, config, weights, cfg, state)
                    assert cfg is not None or (str(path) in str(state) and i is not None), state
                    outcomes["refused" if cfg is None else "read"] += i is not None
                    signal.alarm(0)
                    assert taken <= 4 * max(len(weights), dense) + BYTES, f"{taken:,} bytes"
    return counts


def run(count, *kinds, seconds):
    start = time.monotonic()
    done = run_as_script(__file__, str(count), *kinds, seconds=seconds)
    print(f"{time.monotonic() - start:.0f} s", done.stdout)
    return json.loads(done.stdout)


def test_an_allocation_is_seen_after_another_and_a_larger_one():
    # A mapping of its own: what malloc hands out may be memory that an earlier test left to it, and
    # then nothing grows.
    def fill(mebibytes):
        with mmap.mmap(-1, mebibytes * 2**20) as fresh:
            for page in range(0, len(fresh), mmap.PAGESIZE):
                fresh[page] = 1

    for size in (60, 115, 60):
        _, taken = most_taken(lambda size=size: fill(size))
        assert size - 5 <= taken / 2**20 <= size + 25


#: Keys that a configuration may leave out, and the model is another one without them.
OPTIONAL_KEYS = {
    "openai": [
        "bias",
        "ln_bias",
        "afrac",
        "afrac_loctypes",
        "d_mlp",
        "sink",
        "activation_type",
        "residual_activation_type",
        "d_pos_emb",
    ],
    "sparse_pretrain": [
        "d_mlp",
        "activation_topk_fraction",
        "activation_sparsity_locations",
        "use_positional_embeddings",
    ],
    "dense": ["act_fn", "abs_topk", "attn_sinks", "norm_bias", "resid_relu", "normalization"],
}


@pytest.mark.parametrize("kind", OPTIONAL_KEYS)
def test_a_wrong_default_is_seen(kind):
    folder = Folder(kind)
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / folder.config_name).write_bytes(folder.config)
        (Path(name) / folder.weights_name).write_bytes(folder.weights)
        cfg, state = read(Path(name))
    check_same(folder, folder.config, folder.weights, cfg, state)
    for key in OPTIONAL_KEYS[kind]:
        values = json.loads(folder.config)
        section = "sparsity_config" if key.startswith("activation_") else "model_config"
        del values.get(section, values)[key]
        without_key = json.dumps(values).encode()
        if key in ("bias", "ln_bias"):  # these two were at their defaults
            check_same(folder, without_key, folder.weights, cfg, state)
        else:
            with pytest.raises(AssertionError, match="read as"):
                check_same(folder, without_key, folder.weights, cfg, state)


def test_damaged_folders():
    counts = run(5, *FORMATS, seconds=120)
    assert len(counts) == len(FORMATS) * len(DAMAGE)
    assert all(sum(outcomes.values()) == 5 for outcomes in counts.values())


@pytest.mark.slow
@pytest.mark.parametrize("kind", FORMATS)
def test_many_damaged_folders(kind):
    counts = run(500, kind, seconds=1200)
    assert all(sum(outcomes.values()) == 500 for outcomes in counts.values())
    for damage in ("truncated", "missing"):
        assert counts[f"{kind} {damage}"]["refused"] > 450


if __name__ == "__main__":
    print(json.dumps(fuzz(sys.argv[2:], int(sys.argv[1]))))
