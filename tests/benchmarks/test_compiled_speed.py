"""docs: prompts per second and memory of a compiled circuit, as ratios to its model.

Ratios of the shortest times of each, both sides taking turns in one process: these machines are
noisy.
"""

import time
from pathlib import Path

import torch

import tl_sparse
from tl_sparse.tasks import make_task_data

#: A circuit of 18 nodes and 12 edges, found by `prune` with its default settings.
CIRCUIT = Path(__file__).parent / "quote_circuit"
N_PAIRS = 512
TURNS = 20
#: A forward of the model is measured once in so many turns.
MODEL_EVERY = 4


def seconds(run):
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@torch.no_grad()
def test_two_logits_at_the_last_token_against_the_model():
    model = tl_sparse.load("tiny-python-sparse", device="cpu")
    circuit = tl_sparse.Circuit.load(CIRCUIT)
    data = make_task_data(circuit.task, model.tokenizer, N_PAIRS, 0, model.cfg.n_ctx)
    compiled = circuit.compile(model, data.candidates[0])
    of_compiled, of_model = [], []
    for turn in range(TURNS):
        of_compiled.append(seconds(lambda: compiled(data.tokens, data.last)))
        if turn % MODEL_EVERY == 0:
            of_model.append(seconds(lambda: model(data.tokens)))
    ratio = min(of_model[1:]) / min(of_compiled[1:])
    n_bytes = sum(values.nbytes for values in model.parameters())
    print(
        f"compiled quote circuit, {len(data.tokens):,} prompts of {data.tokens.shape[1]} tokens at "
        f"most, {torch.get_num_threads()} threads: "
        f"{len(data.tokens) / min(of_compiled[1:]):,.0f} prompts/s, "
        f"{ratio:.0f} times the model; memory 1/{n_bytes / compiled.n_bytes:.1f}"
    )
    assert ratio >= 50
    assert n_bytes >= 20 * compiled.n_bytes
