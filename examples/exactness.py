"""How exact compiled circuits are: the measurements behind examples/results/programs.md.

`examples/results.py` runs this for every circuit that its searches have found.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from tl_sparse.circuits import Circuit
from tl_sparse.files import read_json, write_json
from tl_sparse.pruning import heldout_pairs
from tl_sparse.records import record_from
from tl_sparse.suites import markdown_table

#: Length → how many sequences of random tokens: 10,000 in all.
RANDOM = {4: 8000, 8: 1700, 32: 250, 128: 50}
#: Length → how many passages of corpus text: 1,000 in all.
CORPUS = {16: 900, 128: 100}
#: A sequence whose logits differ by more than this in float32 has met another AbsTopK. Rounding
#: alone makes a hundredth of it.
FLIP = 1e-3

Logits = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Exactness:
    """How exact the program of one circuit is.

    Attributes:
        nodes, edges: the size of the circuit.
        seconds: the time that compiling took.
        n_bytes: the memory of the program in float32.
        random, corpus: the greatest difference of a logit to the model under the circuit in
            float64, on random tokens and on text.
        onnx: the same of the ONNX program in onnxruntime, on both.
        flips: the share of sequences that differ by more than `FLIP` in float32.
        float32: the greatest difference on the others.
    """

    nodes: int
    edges: int
    seconds: float
    n_bytes: int
    random: float
    corpus: float
    onnx: float
    flips: float
    float32: float


def measured(
    path: Path, circuit: Circuit, model: Any, precise_model: Any, corpus: Tensor
) -> Exactness:
    """The measurement that is stored in a file or, if there is none, a new one, which is stored.

    Args:
        path: the file.
        circuit: the circuit.
        model, precise_model: its model in float32 and float64.
        corpus: the tokens of a corpus.
    """
    if not path.exists():
        made = exactness(circuit, model, precise_model, corpus, path.with_suffix(".onnx"))
        write_json(path, asdict(made))
    return record_from(Exactness, read_json(path))


def exactness(
    circuit: Circuit, model: Any, precise_model: Any, corpus: Tensor, onnx_path: Path
) -> Exactness:
    """Compare a circuit's program with its model; see `measured`."""
    wanted = heldout_pairs(circuit, model).candidates[0]
    start = time.perf_counter()
    compiled = circuit.compile(precise_model, wanted)
    seconds = time.perf_counter() - start
    rough = circuit.compile(model, wanted)
    compiled.to_onnx(onnx_path, overwrite=True)
    in_onnxruntime = onnx_logits(onnx_path)
    onnx_path.unlink()

    differences: dict[str, list[Tensor]] = {"random": [], "corpus": [], "onnx": [], "float32": []}
    for kind, tokens in sequences(model.cfg, corpus):
        expected = under_circuit(circuit, precise_model, tokens, wanted)
        differences[kind].append(difference(compiled(tokens), expected))
        differences["onnx"].append(difference(in_onnxruntime(tokens), expected))
        expected = under_circuit(circuit, model, tokens, wanted)
        differences["float32"].append(difference(rough(tokens), expected))
    in_float32 = torch.cat(differences["float32"])
    is_flip = in_float32 > FLIP
    return Exactness(
        nodes=circuit.n_nodes,
        edges=len(circuit.edges(model)),
        seconds=seconds,
        n_bytes=rough.n_bytes,
        random=float(torch.cat(differences["random"]).max()),
        corpus=float(torch.cat(differences["corpus"]).max()),
        onnx=float(torch.cat(differences["onnx"]).max()),
        flips=float(is_flip.float().mean()),
        float32=float(in_float32[~is_flip].max()),
    )


def sequences(cfg: Any, corpus: Tensor) -> Iterable[tuple[str, Tensor]]:
    """Batches of tokens, each of one length, and whether they are "random" or from the "corpus"."""
    generator = torch.Generator().manual_seed(0)
    for length, number in RANDOM.items():
        shape = (number, min(length, cfg.n_ctx))
        for tokens in torch.randint(cfg.d_vocab, shape, generator=generator).split(2000):
            yield "random", tokens
    for length, number in CORPUS.items():
        rows = torch.randint(len(corpus), (number,), generator=generator)
        yield "corpus", corpus[rows, :length].long()


@torch.no_grad()
def under_circuit(circuit: Circuit, model: Any, tokens: Tensor, wanted: Tensor) -> Tensor:
    """The model's logits of some tokens under a circuit."""
    with circuit.applied(model):
        logits: Tensor = model(tokens)
    return logits[..., wanted]


def onnx_logits(path: Path) -> Logits:
    """What computes the logits of an ONNX program, with one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(tokens: Tensor) -> Tensor:
        (logits,) = session.run(["logits"], {"tokens": np.asarray(tokens)})
        return torch.from_numpy(logits)

    return run


def difference(logits: Tensor, expected: Tensor) -> Tensor:
    """The greatest difference of a logit in each sequence."""
    return (logits - expected).abs().flatten(1).amax(1)


def exactness_text(rows: Mapping[str, Exactness]) -> str:
    """The page programs.md: a table with one row for each circuit."""
    cells = []
    for name, row in rows.items():
        sizes = [str(row.nodes), str(row.edges), f"{row.seconds:.1f}", f"{row.n_bytes / 1000:,.0f}"]
        exact = [f"{value:.0e}" for value in (row.random, row.corpus, row.onnx)]
        cells.append([name, *sizes, *exact, f"{row.flips:.2%}", f"{row.float32:.0e}"])
    header = ["circuit", "nodes", "edges", "compiled in s", "kB"]
    header += ["random", "corpus", "ONNX", "flips", "float32"]
    text = [
        "# How exact are programs?",
        "",
        "The greatest difference of a logit between a compiled circuit and the model under the",
        f"circuit: in float64 on {sum(RANDOM.values()):,} sequences of random tokens and "
        f"{sum(CORPUS.values()):,} passages of the corpus,",
        "and of the ONNX program in onnxruntime on both. In float32, rounding can decide which of",
        "two entries AbsTopK keeps: `flips` is the share of sequences that differ by more than "
        f"{FLIP:g},",
        "and `float32` the greatest difference on the others. The logits of the two candidates at",
        f"every position count. Lengths: {lengths(RANDOM)} (random),",
        f"{lengths(CORPUS)} (corpus). `kB` is the memory of the program in float32.",
        "",
        markdown_table(header, cells),
    ]
    return "\n".join(text)


def lengths(numbers: Mapping[int, int]) -> str:
    return ", ".join(f"{number:,} of {length} tokens" for length, number in numbers.items())
