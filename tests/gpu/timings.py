"""What sparsity costs on a device, as ratios to the same network without it: `make gpu`.

Each function and the one that it is compared with take turns; the table has the medians.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from tl_sparse.checkpoints import create
from tl_sparse.circuits import node_hooks
from tl_sparse.evaluation import task_loss
from tl_sparse.hooks import NodeGates, abs_topk, frozen, hooked, mean_activations
from tl_sparse.network import SparseConfig, paper_topk
from tl_sparse.tasks import TaskData
from tl_sparse.training import TrainConfig
from tl_sparse.training.trainer import Trainer


@dataclass(frozen=True)
class Size:
    """How large the networks are, and how often everything is timed."""

    widths: tuple[int, ...]
    n_layers: int
    d_vocab: int
    n_ctx: int
    batch_size: int
    turns: int


SIZES = {
    "full": Size(widths=(1024, 2048), n_layers=4, d_vocab=2048, n_ctx=256, batch_size=32, turns=11),
    "toy": Size(widths=(128,), n_layers=1, d_vocab=64, n_ctx=16, batch_size=4, turns=2),
}


@dataclass
class Measured:
    """One row of the table; milliseconds, and bytes (0 where they are not counted)."""

    width: int
    what: str
    sparse_ms: float
    dense_ms: float
    sparse_bytes: int
    dense_bytes: int

    @property
    def row(self) -> str:
        memory = "–"
        if self.dense_bytes:
            ratio = self.sparse_bytes / self.dense_bytes
            memory = (
                f"{self.sparse_bytes / 2**30:.2f} / {self.dense_bytes / 2**30:.2f} = {ratio:.2f}"
            )
        return (
            f"| {self.width} | {self.what} | {self.sparse_ms:.2f} | {self.dense_ms:.2f} "
            f"| {self.sparse_ms / self.dense_ms:.2f} | {memory} |"
        )


def milliseconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    first.record()
    run()
    last.record()
    torch.cuda.synchronize(device)
    return first.elapsed_time(last)


def added_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The most memory that a call takes beyond what is in use before it."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def compared(
    width: int,
    what: str,
    sparse: Callable[[], object],
    dense: Callable[[], object],
    turns: int,
    device: torch.device,
) -> Measured:
    times: dict[str, list[float]] = {"sparse": [], "dense": []}
    for run in (sparse, dense):  # the first call warms up
        run()
    for _ in range(turns):
        times["sparse"].append(milliseconds(sparse, device))
        times["dense"].append(milliseconds(dense, device))
    return Measured(
        width,
        what,
        sparse_ms=statistics.median(times["sparse"]),
        dense_ms=statistics.median(times["dense"]),
        sparse_bytes=added_bytes(sparse, device),
        dense_bytes=added_bytes(dense, device),
    )


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


def gate_step_and_plain(
    model: torch.nn.Module, tokens: torch.Tensor
) -> tuple[Callable[[], object], Callable[[], object]]:
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


def measurements(width: int, size: Size, device: torch.device) -> list[Measured]:
    config = architecture(width, size)
    generator = torch.Generator().manual_seed(0)
    shape = (size.batch_size, size.n_ctx)
    tokens = torch.randint(config.d_vocab, shape, generator=generator).to(device)
    found = []

    def compare(what: str, sparse: Callable[[], object], dense: Callable[[], object]) -> None:
        found.append(compared(width, what, sparse, dense, size.turns, device))

    for precision in ("float32", "bfloat16"):
        sparse = trainer(config, precision, True, device)
        dense = trainer(config, precision, False, device)
        step, dense_step = partial(sparse.step, tokens), partial(dense.step, tokens)
        compare(f"training step, {precision}", step, dense_step)
    compare("weight top-k / dense training step, bfloat16", sparse.sparsity.project, dense_step)
    with torch.no_grad():
        compare("forward, float32", partial(sparse.model, tokens), partial(dense.model, tokens))
    step, plain = gate_step_and_plain(sparse.model.eval(), tokens)
    compare("gate step / forward and backward to the embedding", step, plain)
    x = torch.randn(tokens.numel(), config.d_mlp, generator=generator).to(device)
    topk = partial(abs_topk, x, config.d_mlp // 4)
    compare("AbsTopK of the neurons / GELU", topk, partial(F.gelu, x))
    return found


def table(size: Size, device: torch.device) -> str:
    card = "a CPU"
    if device.type == "cuda":
        card = torch.cuda.get_device_name(device)
    lines = [
        f"# Timings on {card}",
        "",
        f"`make gpu` with torch {torch.__version__}: {size.n_layers} layers, "
        f"{size.batch_size} × {size.n_ctx} tokens, medians of {size.turns} calls that take turns. "
        "Memory is the most that a call takes beyond what is in use before it.",
        "",
        "| d_model | what | sparse ms | dense ms | ratio | memory, GiB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for width in size.widths:
        lines += [measured.row for measured in measurements(width, size, device)]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--out", type=Path, required=True, help="the Markdown file to write")
    args = parser.parse_args()
    text = table(SIZES[args.size], torch.device(args.device))
    args.out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
