"""Damage to files: changed bits and bytes, and changed values inside JSON, YAML and pickles."""

import io
import json
import re
import struct
import zipfile
from itertools import pairwise

import yaml

#: What stands where another value should be. "@deep@" becomes lists in lists, see `_text`.
STRANGE = [
    None,
    True,
    False,
    0,
    1,
    -1,
    0.5,
    2**31,
    2**63,
    10**15,
    10**400,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "0",
    "relu",
    "\x00",
    "\ud800",
    "\x1b[31m",
    "x" * 10_000,
    [],
    {},
    [[1]],
    [None],
    {"a": 1},
    {"": None},
    "@deep@",
]
#: Texts that only YAML takes apart: references, tags, dates, numbers in base 60, deep nesting.
YAML_TEXTS = [
    "a: &a [x, x]\n" + "".join(f"{b}: &{b} [{f'*{a}, ' * 9}]\n" for a, b in pairwise("abcdefghij")),
    "a: &a {x: 1}\n"
    + "".join(f"{b}: &{b} {{<<: [{f'*{a}, ' * 9}]}}\n" for a, b in pairwise("abcdefghi")),
    "steps: &a [*a]\n",
    "steps: !!python/object/apply:os.getcwd []\n",
    "steps: !!set {1, 2}\n",
    "steps: !!binary aGk=\n",
    "steps: !!timestamp 2001-01-01\n",
    "steps: 2001-01-01\n",
    "steps: 1:2:3\n",
    "steps: 0x" + "f" * 9000 + "\n",
    "steps: " + "9" * 9000 + "\n",
    "2001-01-01: 1\n",
    "? [a, b]\n: 1\n",
    "steps: " + "[" * 3000 + "\n",
    "? " * 2000 + "\n",
    "- " * 2000 + "\n",
    "steps: 1\n---\nsteps: 2\n",
    "steps: 1\nsteps: 2\n",
    "%YAML 9.9\n---\nsteps: 1\n",
    "",
    "\ufeffsteps: 1\r\n",
]  # fmt: skip


def damaged(content, kind, rng):
    """`content`, damaged in a way that `rng` chooses; `kind` is the ending of the file's name."""
    inside = _INSIDE.get(kind)
    if inside is not None and rng.random() < 0.5:
        return inside(content, rng)
    return rng.choice(_BYTES)(content, rng)


# --- bytes


def _flipped(content, rng):
    changed = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        if changed:
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _truncated(content, rng):
    return content[: rng.randrange(len(content) + 1)]


def _piece(content, rng):
    """A start and an end inside `content`, mostly near each other."""
    start = rng.randrange(len(content) + 1)
    return start, min(len(content), start + rng.choice([1, 2, 8, 64, 1000]))


def _deleted(content, rng):
    start, end = _piece(content, rng)
    return content[:start] + content[end:]


def _duplicated(content, rng):
    start, end = _piece(content, rng)
    return content[:end] + content[start:]


def _spliced(content, rng):
    start, end = _piece(content, rng)
    place = rng.randrange(len(content) + 1)
    return content[:place] + content[start:end] + content[place + end - start :]


def _overwritten(content, rng):
    start, end = _piece(content, rng)
    filling = rng.choice(
        [b"\0", b"\xff", b"\xef\xbb\xbf", b"\r\n", b"[", b'"', b"{", rng.randbytes(1)]
    )
    return content[:start] + filling * rng.choice([1, end - start]) + content[end:]


_BYTES = [_flipped, _truncated, _deleted, _duplicated, _spliced, _overwritten]


# --- values


def _places(value, found):
    """All (container, key) inside `value`."""
    items = []
    if isinstance(value, dict):
        items = list(value.items())
    if isinstance(value, list):
        items = list(enumerate(value[:50]))
    for key, inner in items:
        found.append((value, key))
        _places(inner, found)
    return found


def changed_value(value, rng):
    """A JSON value in which something is another type, missing, doubled, huge or deep."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice([1, 1, 1, 3])):
        places = _places(value, [])
        if not places or rng.random() < 0.02:
            return rng.choice(STRANGE)
        container, key = rng.choice(places)
        other, other_key = rng.choice(places)
        match rng.randrange(6):
            case 0:
                del container[key]
            case 1:
                container[key] = (
                    json.loads(json.dumps(other[other_key])) if _has(other, other_key) else 1
                )
            case 2 if isinstance(container, dict):
                container[rng.choice(["extra", f"{key} ", "", "\ud800", "x" * 5000])] = container[
                    key
                ]
            case 2:
                container *= 3
            case _:
                container[key] = rng.choice(STRANGE)
    return value


def _has(container, key):
    return key in container if isinstance(container, dict) else key < len(container)


def _text(value, rng, indent=None):
    text = json.dumps(value, indent=indent)
    depth = rng.choice([50, 150, rng.randint(900, 996), 5000, 100_000])
    text = text.replace('"@deep@"', "[" * depth + "]" * depth)
    if rng.random() < 0.1:
        text = re.sub(r"(\"\w+\": )", r"\1 1, \1", text, count=1)  # a key twice
    encoding = rng.choice(["utf-8"] * 8 + ["utf-8-sig", "utf-16"])
    return text.encode(encoding)


def _json(content, rng):
    return _text(changed_value(json.loads(content), rng), rng, indent=1)


def _jsonl(content, rng):
    lines = content.splitlines(keepends=True)
    number = rng.randrange(len(lines))
    lines[number] = _text(changed_value(json.loads(lines[number]), rng), rng) + b"\n"
    return b"".join(lines)


def _yaml(content, rng):
    if rng.random() < 0.5:
        return rng.choice(YAML_TEXTS).encode()
    values = changed_value(yaml.safe_load(content), rng)
    if rng.random() < 0.5:
        return _text(values, rng)
    try:
        return yaml.safe_dump(values, allow_unicode=True).encode("utf-8", "surrogatepass")
    except ValueError:  # an integer with too many digits
        return _text(values, rng)


def _safetensors(content, rng):
    end = 8 + struct.unpack("<Q", content[:8])[0]
    header = _text(changed_value(json.loads(content[8:end]), rng), rng)
    return struct.pack("<Q", len(header)) + header + content[end:]


def _pickle(content, rng):
    """The archive of torch.save with another pickle in it, and right checksums."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            record = old.read(name)
            if name.endswith("data.pkl"):
                record = rng.choice(_BYTES)(record, rng)
            new.writestr(name, record)
    return out.getvalue()


#: Ending → the damage that knows the format.
_INSIDE = {
    ".json": _json,
    ".jsonl": _jsonl,
    ".journal": _jsonl,
    ".yaml": _yaml,
    ".safetensors": _safetensors,
    ".pt": _pickle,
    ".bin": _pickle,
}
