"""A gate step of the pruner against a forward and backward of the same model and batch."""

import time

import torch

import tl_sparse
from tl_sparse.evaluation.running import task_loss
from tl_sparse.hooks import NodeGates
from tl_sparse.hooks.points import frozen, hooked
from tl_sparse.pruning.config import PruneConfig
from tl_sparse.pruning.means import corpus_means
from tl_sparse.pruning.splits import task_splits

ROUNDS = 60


def seconds(run):
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def plain_and_gated(model, n_pairs):
    """A forward and backward of the frozen model to its embedding, and a gate step."""
    corpus = tl_sparse.load_corpus("tiny-python-sparse", model.tokenizer, model.cfg.n_ctx)
    train, _, _ = task_splits(model, tl_sparse.get_task("single_double_quote"), PruneConfig())
    means = {
        name: mean
        for name, mean in corpus_means(model, corpus[:64]).items()
        if not name.endswith("hook_z")
    }
    gates = NodeGates(means, init_bias=0.5, init_scale=0.0, seed=0)
    optimizer = torch.optim.AdamW([gates.tau], lr=0.0, weight_decay=0.0)
    batch = train.pairs(range(n_pairs)).trimmed()

    def with_gradient(activation, hook):
        return activation.detach().requires_grad_()

    def plain():
        with frozen(model), hooked(model, {"hook_embed": with_gradient}):
            task_loss(model, batch).backward()

    def step():
        with frozen(model):
            with gates.attached(model):
                loss = task_loss(model, batch)
            objective = loss + 1e-3 * gates.expected_size()
            optimizer.zero_grad()
            objective.backward()
            optimizer.step()
            gates.clamp()

    return plain, step


def test_gate_step_against_forward_and_backward_to_the_embedding():
    model = tl_sparse.load("tiny-python-sparse", device="cpu")
    for n_pairs in (16, 64):
        plain, step = plain_and_gated(model, n_pairs)
        for warm_up in (plain, step):
            warm_up()
        times = [(seconds(plain), seconds(step)) for _ in range(ROUNDS)]
        of_plain, of_step = (min(column) for column in zip(*times, strict=True))
        ratio = of_step / of_plain
        print(
            f"gate step, {n_pairs} pairs: {1e3 * of_step:.1f} ms, "
            f"{ratio:.2f} of a plain forward and backward"
        )
        assert ratio <= 1.15
