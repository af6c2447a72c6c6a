"""The files in a circuit's folder.

`circuit.json` describes the circuit. `circuit.safetensors` has its masks, means and scores. The
name of each tensor is the name of its hook point, prefixed with `kept/`, `mean/` or `score/`.
`pairs.jsonl` has the pairs of a task that is not built in; `Task.from_jsonl` reads it too.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from tl_sparse.checkpoints import no_circuit
from tl_sparse.checksums import FILES, check_files, checksums_of
from tl_sparse.circuits.fingerprints import FORMATS, Fingerprint, WeightFacts
from tl_sparse.circuits.nodes import Node
from tl_sparse.circuits.parts import CircuitParts
from tl_sparse.errors import CheckpointError, CircuitError, ConfigError, DataError
from tl_sparse.files import read_json, read_tensors, write_json, write_tensors
from tl_sparse.outputs import FileSet, finish_replacing, replacing_together
from tl_sparse.tasks import PARTS, TaskPairs, read_pairs

FORMAT = "tl_sparse circuit"
FORMAT_VERSION = 1
CIRCUIT_FILES = FileSet(
    what="circuit",
    described_by="circuit.json",
    required=("circuit.safetensors",),
    optional=("pairs.jsonl",),
)


def write_circuit(folder: Path, circuit: CircuitParts, overwrite: bool) -> None:
    """Write all files of a circuit, or none.

    Raises:
        CheckpointError: if the files cannot be written.
        ConfigError: if there is another circuit in the folder, or a `pairs.jsonl` that belongs to
            none, and `overwrite` is False.
    """
    _check_other_pairs(folder, circuit.pairs, overwrite)
    tensors: dict[str, Tensor] = {}
    by_prefix = {"kept/": circuit.kept, "mean/": circuit.means, "score/": circuit.scores}
    for prefix, tensor_at in by_prefix.items():
        for hook_name, tensor in tensor_at.items():
            tensors[prefix + hook_name] = tensor
    edges = None
    if circuit.edge_set is not None:
        edges = []
        for source, target in sorted(circuit.edge_set):
            edges.append([source.indexed_name, target.indexed_name])
    values = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "task": circuit.task,
        "model_name": circuit.model_name,
        "model": asdict(circuit.model),
        "n_nodes": circuit.n_nodes,
        "hooks": list(circuit.kept),
        "means": bool(circuit.means),
        "scores": bool(circuit.scores),
        "edge_mask": edges is not None,
        "edges": edges,
        "measured": circuit.measured,
        "labels": {node.indexed_name: label for node, label in circuit.labels.items()},
        "pairs": _task_values(circuit.pairs),
        "frozen_norms": circuit.frozen_norms,
    }
    with replacing_together(CIRCUIT_FILES, folder, overwrite) as new:
        write_tensors(new / "circuit.safetensors", tensors)
        if circuit.pairs is not None:
            circuit.pairs.write(new / "pairs.jsonl")
        write_json(new / "circuit.json", {**values, FILES: checksums_of(new)})


def _check_other_pairs(folder: Path, pairs: TaskPairs | None, overwrite: bool) -> None:
    """Raise `ConfigError` if the pairs would replace a file that is not part of a circuit."""
    path = folder / "pairs.jsonl"
    is_part_of_circuit = (folder / "circuit.json").exists()
    if pairs is not None and path.exists() and not is_part_of_circuit and not overwrite:
        raise ConfigError(
            f"{path} exists already, and does not belong to a circuit; save the circuit in a "
            "folder of its own, or set overwrite (overwrite=True)"
        )


def read_circuit(folder: Path) -> CircuitParts:
    """Read the files of a circuit.

    Raises:
        CheckpointError: if a file is missing, damaged, or has another format or version, or if they
            do not belong together.
    """
    finish_replacing(CIRCUIT_FILES, folder)
    path = folder / "circuit.json"
    if not path.exists():
        raise CheckpointError(no_circuit(folder))
    values = read_json(path)
    check_files(path, values, folder / "circuit.safetensors")
    if values.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: format is not {FORMAT!r}: this is not a circuit of tl_sparse"
        )
    if values.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format_version is {values.get('format_version')!r}; "
            f"this version of tl_sparse reads format_version {FORMAT_VERSION}"
        )
    try:
        model = _read_fingerprint(values["model"])
        model_name = str(values["model_name"])
        task = str(values["task"])
        measured = dict(values["measured"])
        edge_set = _read_edge_set(values)
        labels = _read_labels(values)
        expected = _expected_tensors(values)
        n_nodes = values["n_nodes"]
    except (
        AttributeError,
        CircuitError,
        KeyError,
        OverflowError,
        TypeError,
        ValueError,
    ) as error:
        raise CheckpointError(f"{path}: missing or malformed entry: {error}") from error
    path = folder / "circuit.safetensors"
    parts = _read_parts(path, expected)
    circuit = CircuitParts(
        kept=parts["kept"],
        means=parts["mean"],
        model=model,
        model_name=model_name,
        task=task,
        measured=measured,
        edge_set=edge_set,
        scores=parts["score"],
        labels=labels,
        pairs=_read_pairs(folder, values.get("pairs")),
        frozen_norms=bool(values.get("frozen_norms", False)),
    )
    if circuit.n_nodes != n_nodes:
        raise CheckpointError(
            f"{path}: the masks keep {circuit.n_nodes} nodes, but n_nodes in circuit.json is "
            f"{n_nodes!r}"
        )
    return circuit


def _task_values(pairs: TaskPairs | None) -> dict[str, Any] | None:
    """What makes the task again, together with its pairs; older files do not have this entry."""
    if pairs is None:
        return None
    fields = ("name", "description", "candidates", "same_end")
    return {field: getattr(pairs, field) for field in fields}


def _read_pairs(folder: Path, values: Any) -> TaskPairs | None:
    """The pairs of a task that is not built in; None if `circuit.json` announces none."""
    if values is None:
        return None
    try:
        parts = read_pairs(folder / "pairs.jsonl").parts
        training, selection, heldout = [parts[part] for part in PARTS]
    except DataError as error:
        raise CheckpointError(str(error)) from error
    except KeyError as error:
        raise CheckpointError(f'{folder / "pairs.jsonl"}: no pair has a "split"') from error
    try:
        candidates = values["candidates"]
        if candidates is not None:
            first, second = map(str, candidates)
            candidates = (first, second)
        return TaskPairs(
            name=str(values["name"]),
            description=str(values["description"]),
            training=training,
            selection=selection,
            heldout=heldout,
            candidates=candidates,
            same_end=bool(values["same_end"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder / 'circuit.json'}: malformed entry 'pairs': {error}"
        ) from error


def _read_parts(path: Path, expected: list[str]) -> dict[str, dict[str, Tensor]]:
    """Part of a circuit, such as "kept" → hook point → tensor."""
    tensors = read_tensors(path)
    # There may also be means at `hook_z` where no mask is: cutting an edge that leaves a head's
    # value channel needs them.
    head_means = [name for name in tensors if name.startswith("mean/") and name.endswith(".hook_z")]
    head_means = [name for name in head_means if name not in expected]
    wrong = (tensors.keys() - set(head_means)) ^ set(expected)
    if wrong:
        raise CheckpointError(
            f"{path}: tensors do not fit circuit.json: {', '.join(sorted(wrong))}"
        )
    parts: dict[str, dict[str, Tensor]] = {"kept": {}, "mean": {}, "score": {}}
    for name in [*expected, *head_means]:
        part, hook_name = name.split("/", 1)
        parts[part][hook_name] = tensors[name]
    return parts


def _read_fingerprint(values: Mapping[str, Any]) -> Fingerprint:
    sketch = {}
    for parameter, numbers in values["sketch"].items():
        projections = list(map(_finite, numbers))
        if not projections:
            raise ValueError(f"the sketch of {parameter} must be finite numbers")
        sketch[str(parameter)] = projections
    if not sketch:
        raise ValueError("the sketch must not be empty: it would fit every model")
    weights = {}
    for parameter, facts in values.get("weights", {}).items():  # older files do not have this key
        weights[str(parameter)] = WeightFacts(
            rms=_finite(facts["rms"]),
            digests={name: str(facts["digests"][name]) for name in FORMATS},
        )
    return Fingerprint(str(values["architecture"]), sketch, weights)


def _finite(number: Any) -> float:
    """A number as a float; `ValueError` if it is NaN or infinite, which would fit every model."""
    if not math.isfinite(number):
        raise ValueError(f"{number} is not a finite number")
    return float(number)


def _read_edge_set(values: Mapping[str, Any]) -> frozenset[tuple[Node, Node]] | None:
    pairs = values.get("edges")  # the first files did not have this entry
    if values["edge_mask"] is not (pairs is not None):
        raise ValueError("edge_mask must be true if there are edges, and false if edges is null")
    if pairs is None:
        return None
    return frozenset((Node.parse(source), Node.parse(target)) for source, target in pairs)


def _read_labels(values: Mapping[str, Any]) -> dict[Node, str]:
    labels = {}
    for name, label in values.get("labels", {}).items():  # older files do not have this key
        if not isinstance(label, str):
            raise ValueError(f"the label of {name} must be a text, not {label!r}")
        labels[Node.parse(name)] = label
    return labels


def _expected_tensors(values: Mapping[str, Any]) -> list[str]:
    """The names of the tensors that `circuit.json` announces, in the order of its hook points."""
    prefixes = ["kept/"]
    # Files that were written before these two entries existed have means and no scores.
    if values.get("means", True):
        prefixes.append("mean/")
    if values.get("scores", False):
        prefixes.append("score/")
    names: list[str] = []
    for prefix in prefixes:
        names.extend(prefix + hook_name for hook_name in values["hooks"])
    return names
