"""Every file that the package reads, damaged: it is read, or refused with an error of our own, in
bounded time and memory.

Run as a program, `test_broken_files.py COUNT FORMAT...`, it reads COUNT damaged copies of each
format and prints what became of them; without formats, of all. The tests run it in a process of its
own, so that a crash, a hang and the memory that it takes are the reader's.
"""

import contextlib
import dataclasses
import faulthandler
import functools
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

import tl_sparse
from file_damage import damaged
from formats import write_circuitgpt, write_openai, write_sparse_pretrain
from helpers import (
    GOLDEN,
    full_config,
    run_as_script,
    tiny_config,
    tiny_model,
    without_checksums,
)
from micro import (
    MICRO_TASK,
    QUICK_SETTINGS,
    micro_circuit,
    micro_model,
    micro_tokenizer,
    save_micro,
    save_pairs,
)
from tl_sparse.bridges import Bridges, Maps
from tl_sparse.checkpoints.steps import (
    StepRecord,
    kept_steps,
    read_step_record,
    step_folder,
    step_path,
    write_step_record,
)
from tl_sparse.circuits import Circuit, EapGraph, from_prune_scores, to_prune_scores
from tl_sparse.cli.config_flags import changed_by_file
from tl_sparse.data import load_documents, load_tokenizer
from tl_sparse.errors import CircuitError, TLSparseError
from tl_sparse.evaluation import full_evaluation
from tl_sparse.programs import CompiledCircuit
from tl_sparse.pruning import PruneConfig, recorded_config
from tl_sparse.suites import optuna_search as search_module
from tl_sparse.suites import suite
from tl_sparse.suites.optuna_search import search
from tl_sparse.suites.suite import run_suite
from tl_sparse.tasks import PARTS, Task, TaskPairs, make_task_data, token_ids
from tl_sparse.training.trainer import Trainer
from tl_sparse.view import plots

pytestmark = pytest.mark.any_line

SECONDS = 20  # for one reading
BYTES = 2**30  # of address space, for one reading


@dataclasses.dataclass(frozen=True)
class Format:
    """How files of a format are written into a folder, and read from it.

    Attributes:
        write: writes undamaged files into a folder.
        read: what the files in a folder hold, as a text; equal texts mean that damage had no
            effect.
        damage: the files to damage, as a pattern.
        keeps: whether reading leaves the folder as it was.
    """

    write: Callable[[Path], object]
    read: Callable[[Path], str]
    damage: str = "*"
    keeps: bool = True


FORMATS: dict[str, Format] = {}


def digest(*parts):
    """A text that is equal only for equal tensors, mappings of tensors, and values."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, dict):
            for name in sorted(part, key=str):
                found.update(f"{name} {digest(part[name])}".encode(errors="surrogatepass"))
        elif isinstance(part, torch.Tensor):
            found.update(f"{part.dtype} {list(part.shape)}".encode())
            found.update(part.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        else:
            found.update(repr(part).encode(errors="surrogatepass"))
    return found.hexdigest()


# --- models


def read_model(folder):
    model = tl_sparse.load(folder, device="cpu")
    repr(model)
    return digest(model.sparse_cfg, dict(model.network.state_dict()))


def sparse_micro(folder):
    micro_model().save_pretrained(folder)


def one_of_sparse_pretrain(folder, safetensors):
    config = tiny_config(n_heads=2, d_head=3, attn_sinks=True, bigram_table=True)
    write_sparse_pretrain(folder, tiny_model(config), safetensors=safetensors)


FORMATS["dense"] = Format(
    lambda folder: tiny_model(full_config()).save_pretrained(folder, dense=True), read_model
)
FORMATS["compact"] = Format(sparse_micro, read_model, "[cm]*")
FORMATS["openai"] = Format(lambda f: write_openai(f, tiny_model(full_config())), read_model)
FORMATS["circuitgpt"] = Format(lambda f: write_circuitgpt(f, tiny_model(full_config())), read_model)
FORMATS["sparse_pretrain"] = Format(lambda f: one_of_sparse_pretrain(f, False), read_model)
FORMATS["sparse_pretrain safetensors"] = Format(
    lambda folder: one_of_sparse_pretrain(folder, True), read_model
)


# --- bridges


def micro_bridges():
    torch.manual_seed(0)
    dense = micro_model()
    return Bridges(micro_model(), dense, Maps(3, 4, 4, kind="threshold"))


def write_bridges(folder):
    micro_bridges().save_pretrained(folder)


def write_bridge_model(folder):
    """Bridges as sparse_pretrain publishes them, with the whole configuration of the training."""
    shutil.copytree(GOLDEN / "bridges" / "bridge", folder, dirs_exist_ok=True)
    settings = {"sparsity": {"activation_topk_fraction": 0.25}, "bridges": {"encoder_afrac": 0.25}}
    (folder / "training_config.yaml").write_text(json.dumps(settings))


def read_bridges(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        bridges = tl_sparse.load_bridges(folder, dense_for(folder), "cpu")
    repr(bridges)
    bridges.facts()
    config = (bridges.sparse.sparse_cfg, bridges.maps.kind, bridges.maps.fraction)
    return digest(config, dict(bridges.sparse.network.state_dict()), bridges.maps.state_dict())


@functools.cache
def golden_dense():
    return tl_sparse.load(GOLDEN / "bridges" / "dense", device="cpu")


@functools.cache
def micro_dense():
    return micro_model()


def dense_for(folder):
    is_published = (folder / "bridges.bin").exists()
    return golden_dense() if is_published else micro_dense()


FORMATS["bridges"] = Format(write_bridges, read_bridges, "bridges*")
FORMATS["sparse_pretrain bridges"] = Format(write_bridge_model, read_bridges)


# --- training


TRAINED = tl_sparse.TrainConfig(
    model=tl_sparse.SparseConfig(
        n_layers=1, d_model=8, n_heads=1, d_head=4, d_mlp=8, d_vocab=384, n_ctx=32
    ),
    data=tl_sparse.DataConfig(stdlib_chars=0, idiom_chars=20_000),
    steps=4,
    batch_size=2,
    l0_fraction=0.5,
    checkpoint_steps=1,
    validate_steps=1,
    keep_checkpoints=2,
)


def write_run(folder):
    """A run of four steps that was stopped after three."""
    step = Trainer.step

    def stopping(trainer, tokens):
        if trainer.sparsity.steps == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer, tokens)

    folder.rmdir()
    with pytest.MonkeyPatch.context() as patched, contextlib.suppress(TLSparseError):
        patched.setattr(Trainer, "step", stopping)
        tl_sparse.train(TRAINED, folder, "cpu", progress=False)


def read_run(folder):
    model, _ = tl_sparse.train(TRAINED, folder, "cpu", progress=False, resume=True)
    return digest(dict(model.network.state_dict()), (folder / "log.jsonl").read_text())


def read_sample(folder):
    return digest(tl_sparse.load_corpus(folder, None, 8))


def write_step(folder):
    """A run that keeps one step."""
    step = step_path(folder, 10)
    save_micro(step)
    write_step_record(step, StepRecord(10, 2.0, 2.5, 7, 10))


def read_step(folder):
    step = step_folder(folder, 10)
    found = [read_step_record(step), kept_steps(folder), tl_sparse.load_corpus(step, None, 8)]
    return digest(*found, read_model(f"{folder}@10"))


FORMATS["step of a run"] = Format(write_step, read_step, "steps/*/*")
FORMATS["run"] = Format(write_run, read_run, "*.json*", keeps=False)
FORMATS["training checkpoint"] = Format(write_run, read_run, "checkpoints/*", keeps=False)
FORMATS["packed data"] = Format(write_run, read_run, "data/*", keeps=False)
FORMATS["corpus sample"] = Format(save_micro, read_sample, "corpus_sample.safetensors")


# --- circuits


@functools.cache
def micro_again():
    return micro_model()


def write_circuit(folder):
    model = micro_again()
    circuit = micro_circuit(model)
    data = make_task_data(MICRO_TASK, model.tokenizer, 4, 0, model.cfg.n_ctx)
    measured = tl_sparse.evaluate(circuit, model, data)
    kept = {
        "config": dataclasses.asdict(PruneConfig()),
        "heldout": json.loads(json.dumps(dataclasses.asdict(measured))),
    }
    edges = frozenset(edge.ends for edge in circuit.edges(model))
    rng = random.Random(0)
    parts = [(MICRO_TASK.pair(rng),) for _ in PARTS]
    pairs = TaskPairs("micro", "was it A or B?", *parts, candidates=MICRO_TASK.candidates)
    dataclasses.replace(circuit, measured=kept, edge_set=edges, pairs=pairs).save(folder)


def read_circuit(folder):
    circuit = Circuit.load(folder)
    card = circuit.card("user/circuit")
    config = recorded_config(circuit)
    with tempfile.TemporaryDirectory() as again:
        circuit.save(again)
    circuit.check_model(micro_again())
    edges = circuit.edges(micro_again())
    texts = (card, config, circuit.task, circuit.pairs)
    return digest(circuit.kept, circuit.means, edges, *texts)


def write_edge_list(folder):
    micro_circuit(micro_again()).save_edge_list(folder / "edges.json", micro_again())


def read_edge_list(folder):
    circuit = Circuit.from_edge_list(folder / "edges.json", micro_again())
    with tempfile.TemporaryDirectory() as again:
        circuit.save(again)
    return digest(circuit.kept, circuit.task)


def write_viz_data(folder):
    circuit_data = {"0.attn.act_in": torch.tensor([0]), "0.attn.v": torch.tensor([0])}
    values = {
        "circuit_data": circuit_data,
        "importances": {
            "loss": torch.tensor(0.2),
            "interv_loss": 0.3,
            "beeg_model_config": {"n_layer": 1, "d_model": 4},
        },
        "num_total_nodes": 20,
        "all_loss": [[0, 1.0], [1, 0.5]],
        "prune_config": {"k_coef": 1e-3, "names": ["a", "b"]},
    }
    torch.save(values, folder / "viz_data.pt")


def read_viz_data(folder):
    circuit = Circuit.from_openai(folder / "viz_data.pt", micro_again())
    with tempfile.TemporaryDirectory() as again:
        circuit.save(again)
    return digest(circuit.kept, circuit.measured)


def write_program(folder):
    micro_circuit(micro_again()).compile(micro_again()).save(folder)


def read_program(folder):
    compiled = CompiledCircuit.load(folder)
    logits = compiled([[1, 2, 3]], [1])
    return digest(dict(compiled.named_buffers()), repr(compiled), compiled.n_ctx, logits)


def write_graph(folder, name):
    graph = micro_circuit(micro_again()).to_eap(micro_again())
    channels = torch.arange(12.0).view(3, 4)
    nodes_scores = torch.tensor([torch.nan, 1.0, 2.0])
    dataclasses.replace(
        graph,
        nodes_scores=nodes_scores,
        neurons_in_graph=channels > 3,
        neurons_scores=channels,
    ).save(folder / name)


def read_graph(folder):
    graph = EapGraph.load(next(folder.iterdir()))
    repr(graph)
    graph.top(min(3, graph.n_scored()))
    with contextlib.suppress(CircuitError), tempfile.TemporaryDirectory() as again:
        Circuit.from_eap(graph, micro_again()).save(again)
    return digest(vars(graph))


def write_prune_scores(folder):
    graph = micro_circuit(micro_again()).to_eap(micro_again())
    to_prune_scores(graph, folder / "scores.pt")


def read_prune_scores(folder):
    return digest(vars(from_prune_scores(folder / "scores.pt", micro_again())))


FORMATS["circuit"] = Format(write_circuit, read_circuit)
FORMATS["component graph"] = Format(lambda folder: write_graph(folder, "graph.json"), read_graph)
FORMATS["component graph pt"] = Format(lambda folder: write_graph(folder, "graph.pt"), read_graph)
FORMATS["prune scores"] = Format(write_prune_scores, read_prune_scores)
FORMATS["edge list"] = Format(write_edge_list, read_edge_list)
FORMATS["viz data"] = Format(write_viz_data, read_viz_data)
FORMATS["program"] = Format(write_program, read_program)
FORMATS["program without checksums"] = Format(
    lambda folder: (write_program(folder), without_checksums(folder)), read_program
)


# --- texts


def write_tiktoken(folder):
    import base64

    lines = [b"%s %d" % (base64.b64encode(bytes([i])), i) for i in range(256)]
    lines += [
        b"%s %d" % (base64.b64encode(text), 256 + i) for i, text in enumerate((b"ab", b"abc"))
    ]
    (folder / "x.tiktoken").write_bytes(b"\n".join(lines))


def write_bpe(folder):
    load_tokenizer(tl_sparse.checkpoints.find("tiny-python-sparse")).backend_tokenizer.model.save(
        str(folder)
    )


def read_tokenizer(folder):
    tokenizer = load_tokenizer(folder)
    tokens = token_ids(tokenizer, "A = abc B end")
    with tempfile.TemporaryDirectory() as again:
        tokenizer.save_pretrained(again)
    return digest(tokens, len(tokenizer), tokenizer.decode([0, 1, 2]))


def read_documents(folder):
    return digest(load_documents(tl_sparse.DataConfig(source=str(folder))))


def write_documents(folder):
    for name in "ab":
        (folder / f"{name}.py").write_text(f"def {name}():\n    return 'é'\n" * 50)


def read_config(folder):
    config = changed_by_file(PruneConfig(), str(folder / "prune.yaml"))
    return digest(config, changed_by_file(TRAINED, str(folder / "train.yaml")))


def write_config(folder):
    (folder / "prune.yaml").write_text(yaml.safe_dump(dataclasses.asdict(PruneConfig())))
    (folder / "train.yaml").write_text(yaml.safe_dump(dataclasses.asdict(TRAINED)))


FORMATS["tokenizer"] = Format(micro_tokenizer().save_pretrained, read_tokenizer)
FORMATS["tiktoken"] = Format(write_tiktoken, read_tokenizer)
FORMATS["vocab and merges"] = Format(write_bpe, read_tokenizer)
FORMATS["documents"] = Format(write_documents, read_documents)
FORMATS["task"] = Format(
    lambda folder: save_pairs(folder / "task.jsonl", n_pairs=8),
    lambda folder: digest(
        make_task_data(Task.from_jsonl(folder / "task.jsonl"), micro_tokenizer(), 4, 0).tokens
    ),
)
FORMATS["YAML"] = Format(write_config, read_config)


# --- suites, searches and figures

QUICK = PruneConfig(**QUICK_SETTINGS)


@functools.cache
def suite_models():
    folder = Path(tempfile.mkdtemp(prefix="tl_sparse_fuzz_"))
    return [save_micro(folder / "one")], [save_pairs(folder / "micro.jsonl")]


def write_suite(folder):
    run_suite(*suite_models(), folder, (0, 1), QUICK)


def read_suite(folder):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(suite, "find_spec", lambda name: None)  # no picture, which takes long
        return digest(run_suite(*suite_models(), folder, (0, 1), QUICK))


def write_search(folder):
    models, tasks = suite_models()
    search(models[0], tasks, folder, 2, config=QUICK)


def read_search(folder):
    def pruned(*args):
        raise search_module.PruneError("a trial is run again")

    models, tasks = suite_models()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(search_module, "prune", pruned)
        return digest(search(models[0], tasks, folder, 2, config=QUICK))


def write_figures(folder):
    model = micro_again()
    data = make_task_data(MICRO_TASK, model.tokenizer, 4, 0, model.cfg.n_ctx)
    found = full_evaluation(micro_circuit(model), model, data)
    (folder / "evaluation.json").write_text(json.dumps(found))
    with tempfile.TemporaryDirectory() as out:
        results = run_suite(*suite_models(), Path(out, "suite"), (0, 1), QUICK)
    (folder / "results.json").write_text(json.dumps(results))
    record = dataclasses.asdict(StepRecord(10, 2.0, 2.5, 7, 10))
    along = results | {"steps": {"run": [{"model": "one", "record": record}]}}
    (folder / "along.json").write_text(json.dumps(along))


def read_figures(folder):
    from tl_sparse.files import read_json

    names = ("evaluation.json", "results.json", "along.json")
    values = {name: read_json(folder / name) for name in names}
    figures = [
        plots.curve({"a": values["evaluation.json"]}),
        plots.tasks(values["results.json"]),
        plots.frontier({name: values[name] for name in ("evaluation.json", "results.json")}),
        plots.training(values["along.json"]),
    ]
    for figure in figures:
        figure.canvas.draw()
    return digest(values)


FORMATS["suite"] = Format(write_suite, read_suite, "*/*/*/*.json", keeps=False)
FORMATS["search"] = Format(write_search, read_search, "*.journal", keeps=False)
FORMATS["figures"] = Format(write_figures, read_figures)


# --- the program


class Hang(BaseException):
    """Raised in a reader that takes too long; nothing in the package catches it."""


def outcome(read, folder, expected):
    """What becomes of one reading."""

    def ring(*_):
        raise Hang

    signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    faulthandler.dump_traceback_later(4 * SECONDS, exit=True)  # for what Python cannot interrupt
    try:
        found = read(folder)
    except TLSparseError as error:
        str(error)
        return "refused", ""
    except Hang:
        return "hang", ""
    except BaseException as error:
        return "other", f"{type(error).__name__}: {str(error)[:200]}"
    finally:
        signal.alarm(0)
        faulthandler.cancel_dump_traceback_later()
    return ("same" if found == expected else "changed"), ""


def fuzz(name, count, first=0):
    """Counter of outcomes; prints a line for what should not be."""
    entry = FORMATS[name]
    counts = Counter()
    with tempfile.TemporaryDirectory() as temporary:
        whole = Path(temporary, "whole")
        whole.mkdir()
        entry.write(whole)
        names = sorted(str(p.relative_to(whole)) for p in whole.glob(entry.damage) if p.is_file())
        contents = {file: (whole / file).read_bytes() for file in names}
        copy = Path(temporary, "copy")
        shutil.copytree(whole, copy)
        expected = entry.read(copy)
        limit_memory()
        for i in range(first, first + count):
            rng = random.Random(f"{name} {i}")
            if not entry.keeps:
                shutil.rmtree(copy, ignore_errors=True)
                shutil.copytree(whole, copy)
            file = rng.choice(names)
            content = damaged(contents[file], Path(file).suffix, rng)
            (copy / file).write_bytes(content)
            print(f"{name} {i} {file}", file=sys.stderr, flush=True)
            found, message = outcome(entry.read, copy, expected)
            if content == contents[file]:
                found = "undamaged" if found == "same" else f"undamaged, {found}"
            counts[found] += 1
            if message or found == "hang":
                print(f"  {found}: {message}", file=sys.stderr, flush=True)
            if entry.keeps:
                (copy / file).write_bytes(contents[file])
    return counts


def limit_memory():
    """Let this process take only `BYTES` more address space."""
    sizes = Path("/proc/self/statm")
    if sizes.exists():
        used = int(sizes.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, resource.RLIM_INFINITY))


def run(count, *names, seconds):
    done = run_as_script(__file__, str(count), *names, seconds=seconds)
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


#: Formats of which one reading takes a part of a second; only `make test-all` reads them.
SLOW = ("run", "training checkpoint", "packed data", "suite", "search", "figures")
#: What may become of a damaged file. "changed" is not always wrong: a letter in a prompt makes
#: another prompt.
RIGHT = {"refused", "same", "changed", "undamaged"}


def assert_right(counts, errors, count):
    for name, outcomes in counts.items():
        assert outcomes.keys() <= RIGHT, f"{name}: {outcomes}\n{errors[-3000:]}"
        assert sum(outcomes.values()) == count


def test_damaged_files():
    counts, errors = run(5, *(FORMATS.keys() - set(SLOW)), seconds=600)
    assert len(counts) == len(FORMATS) - len(SLOW)
    assert_right(counts, errors, 5)


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_many_damaged_files(name):
    counts, errors = run(2000, name, seconds=3600)
    assert_right(counts, errors, 2000)


def main():
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    count = int(sys.argv[1])
    counts = {}
    first = int(os.environ.get("FIRST", "0"))  # where to go on after a crash
    for name in sys.argv[2:] or FORMATS:
        counts[name] = fuzz(name, count, first)
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
