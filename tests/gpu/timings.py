"""What our kernels and what sparsity take on a device: the tables of `make gpu`.

Each function and the one that it is compared with take turns; the tables have the medians. What
tells most comes first, and rows for which no time or memory is left say so.
"""

import argparse
import dataclasses
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from kernel_timings import KernelSizes, TwoFunctions, time_products, time_rows, time_weights
from measuring import Measurements, both_ways

from tl_sparse.checkpoints import create
from tl_sparse.circuits import node_hooks
from tl_sparse.evaluation import task_loss
from tl_sparse.hooks import NodeGates, WeightSparsity, frozen, hooked, mean_activations
from tl_sparse.network import SparseConfig, paper_topk
from tl_sparse.tasks import TaskData
from tl_sparse.training import TrainConfig, preset
from tl_sparse.training.trainer import Trainer


@dataclass(frozen=True)
class Size:
    """How large the networks are, and how often everything is timed.

    Attributes:
        widths: d_model of the networks in which sparsity is compared with none.
        trained: the architecture of which training steps are timed.
        searched: the architecture of which gate steps are timed.
        pairs: the number of prompt pairs of a gate step, of `n_ctx` / 4 tokens.
    """

    widths: tuple[int, ...]
    n_layers: int
    d_vocab: int
    n_ctx: int
    batch_size: int
    turns: int
    trained: SparseConfig
    searched: SparseConfig
    pairs: int
    kernels: KernelSizes


def _toy() -> SparseConfig:
    return SparseConfig(1, 128, 2, 16, 64, 64, 16, abs_topk=paper_topk(0.25))


SIZES = {
    "full": Size(
        widths=(1024, 2048),
        n_layers=4,
        d_vocab=2048,
        n_ctx=256,
        batch_size=32,
        turns=11,
        trained=preset("paper-4x").model,
        searched=preset("paper-8x").model,
        pairs=16,
        kernels=KernelSizes(
            columns=(256, 512, 1024, 2048, 4096, 8192),
            entries=2**26,
            weights=((512, 1024), (4096, 1024), (8192, 2048), (231_936, 2048)),
            products=(1024, 2048, 4096),
            tokens=8192,
        ),
    ),
    "toy": Size(
        widths=(128,),
        n_layers=1,
        d_vocab=64,
        n_ctx=16,
        batch_size=4,
        turns=2,
        trained=_toy(),
        searched=_toy(),
        pairs=2,
        kernels=KernelSizes(
            columns=(64,), entries=2**10, weights=((32, 64),), products=(32,), tokens=16
        ),
    ),
}


def architecture(width: int, size: Size) -> SparseConfig:
    return SparseConfig(
        n_layers=size.n_layers,
        d_model=width,
        n_heads=width // 16,
        d_head=16,
        d_mlp=4 * width,
        d_vocab=size.d_vocab,
        n_ctx=size.n_ctx,
        abs_topk=paper_topk(0.25),
        attn_sinks=True,
        bigram_table=True,
    )


def trainer(model: SparseConfig, precision: str, sparse: bool, device: torch.device) -> Trainer:
    """A trainer in the middle of a training; not sparse: without AbsTopK and weight top-k."""
    if not sparse:
        model = dataclasses.replace(model, abs_topk={})
    config = TrainConfig(model=model, precision=precision, anneal_start=0.0, anneal_stop=0.0)
    made = Trainer(create(model, seed=0, device=device).train(), config)
    made.sparsity.steps = config.steps // 4
    if not sparse:
        made.sparsity.groups = []
    return made


def random_pairs(tokens: torch.Tensor) -> TaskData:
    n_prompts, n_pos = tokens.shape
    numbers = torch.arange(n_prompts, device=tokens.device)
    return TaskData(
        task="random",
        prompts=tuple(map(str, range(n_prompts))),
        tokens=tokens,
        last=torch.full_like(numbers, n_pos - 1),
        candidates=torch.tensor([[1, 2]], device=tokens.device).repeat(n_prompts, 1),
        correct=numbers % 2,
    )


def gate_step_and_plain(model: torch.nn.Module, tokens: torch.Tensor) -> TwoFunctions:
    """A gate step of the pruner, and a forward and backward to the embedding."""
    names = [name for name in node_hooks(model).values() if not name.endswith("hook_z")]
    gates = NodeGates(
        mean_activations(model, names, [tokens]), init_bias=0.5, init_scale=0.0, seed=0
    )
    optimizer = torch.optim.AdamW([gates.tau], lr=0.0, weight_decay=0.0)
    data = random_pairs(tokens)

    def with_gradient(activation: torch.Tensor, hook: object) -> torch.Tensor:
        return activation.detach().requires_grad_()

    def plain() -> None:
        with frozen(model), hooked(model, {"hook_embed": with_gradient}):
            task_loss(model, data).backward()

    def step() -> None:
        with frozen(model):
            with gates.attached(model):
                loss = task_loss(model, data)
            optimizer.zero_grad()
            (loss + 1e-3 * gates.expected_size()).backward()
            optimizer.step()
            gates.clamp()

    return step, plain


def random_tokens(shape: tuple[int, int], d_vocab: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(d_vocab, shape, generator=generator).to(device)


def time_training(measured: Measurements, size: Size) -> None:
    """Steps of a published size: against a dense network, and with torch.topk instead of Triton.

    Dense weights and torch.topk are the form of the community's implementation.
    """
    model = size.trained
    tokens = random_tokens((size.batch_size, model.n_ctx), model.d_vocab, measured.device)
    title = (
        f"Training step, d_model {model.d_model:,} × {model.n_layers}, {tokens.numel():,} tokens"
    )

    def with_and_without_topk(precision: str) -> TwoFunctions:
        return both_ways(trainer(model, precision, True, measured.device).step, tokens)

    def sparse_and_dense(precision: str) -> TwoFunctions:
        sparse = trainer(model, precision, True, measured.device)
        dense = trainer(model, precision, False, measured.device)
        return partial(sparse.step, tokens), partial(dense.step, tokens)

    measured.heading(title, "sparse", "the other")
    for precision in ("bfloat16", "float32"):
        measured.row(f"{precision}, against dense", partial(sparse_and_dense, precision))
        what = f"{precision}, against torch.topk"
        measured.row(what, partial(with_and_without_topk, precision))


def time_search(measured: Measurements, size: Size) -> None:
    """A gate step of the pruner on a large model, against a forward and backward pass."""
    config = size.searched
    shape = (2 * size.pairs, max(2, config.n_ctx // 4))
    tokens = random_tokens(shape, config.d_vocab, measured.device)

    def make() -> TwoFunctions:
        model = create(config, seed=0, device=measured.device).eval()
        WeightSparsity(model, 1 / 256, min_nonzero=0).project()
        return gate_step_and_plain(model, tokens)

    n_weights = config.n_matrix_weights
    title = f"Circuit search, {n_weights:,} matrix weights, {size.pairs} pairs of {shape[1]} tokens"
    measured.heading(title, "gate step", "forward and backward")
    measured.row("gate step, float32", make)


def time_sparsity(measured: Measurements, size: Size, width: int) -> None:
    """What each part of sparsity costs in a network of this width."""
    config = architecture(width, size)
    device = measured.device
    tokens = random_tokens((size.batch_size, size.n_ctx), config.d_vocab, device)

    def steps(precision: str) -> TwoFunctions:
        sparse = trainer(config, precision, True, device)
        dense = trainer(config, precision, False, device)
        return partial(sparse.step, tokens), partial(dense.step, tokens)

    def projection_and_step() -> TwoFunctions:
        sparse = trainer(config, "bfloat16", True, device)
        dense = trainer(config, "bfloat16", False, device)
        return sparse.sparsity.project, partial(dense.step, tokens)

    def forwards() -> TwoFunctions:
        sparse = create(config, seed=0, device=device).eval()
        dense = create(dataclasses.replace(config, abs_topk={}), seed=0, device=device).eval()
        run = torch.no_grad()
        return partial(run(sparse.forward), tokens), partial(run(dense.forward), tokens)

    def gates() -> TwoFunctions:
        return gate_step_and_plain(create(config, seed=0, device=device).eval(), tokens)

    title = f"Sparsity, d_model {width:,} × {size.n_layers}, {tokens.numel():,} tokens"
    measured.heading(title, "sparse", "dense")
    for precision in ("float32", "bfloat16"):
        measured.row(f"training step, {precision}", partial(steps, precision))
    what = "weight top-k / dense training step, bfloat16"
    measured.row(what, projection_and_step)
    measured.row("forward, float32", forwards)
    measured.row("gate step / forward and backward to the embedding", gates)


def tables(size: Size, device: torch.device, seconds: float) -> str:
    """All tables, as Markdown; after this many seconds no further row is begun."""
    card = "a CPU"
    if device.type == "cuda":
        card = torch.cuda.get_device_name(device)
    measured = Measurements(device, size.turns, end=time.monotonic() + seconds)
    time_rows(measured, size.kernels)
    time_weights(measured, size.kernels)
    time_training(measured, size)
    time_search(measured, size)
    for width in size.widths:
        time_sparsity(measured, size, width)
    time_products(measured, size.kernels)
    heading = [
        f"# Timings on {card}",
        "",
        f"`make gpu` with torch {torch.__version__}: medians of up to {size.turns} calls that take "
        "turns. Memory is the most that a call takes beyond what is in use before it.",
    ]
    return "\n".join(heading + measured.lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--seconds", type=float, default=400.0, help="the time for all tables")
    parser.add_argument("--out", type=Path, required=True, help="the Markdown file to write")
    args = parser.parse_args()
    text = tables(SIZES[args.size], torch.device(args.device), args.seconds)
    args.out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
