"""Train a grid of small models and compare their validation losses: a table, a plot and the
numbers.

    python examples/sweep.py size --out results        # L0 against width
    python examples/sweep.py recipe --out results      # learning rate, ε, recipe, minimum nonzeros,
    …

Every finished model's numbers are kept in a file of its own, so that an interrupted sweep goes on
where it was.
"""

import argparse
import dataclasses
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from tl_sparse import DataConfig, TrainConfig
from tl_sparse.config import merged
from tl_sparse.files import write_json
from tl_sparse.training import RECIPES, laptop_model


def size_grid(config: TrainConfig) -> dict[str, TrainConfig]:
    """Three widths with three numbers of nonzero weights each."""
    return {
        f"width {width}, L0 {l0}": dataclasses.replace(
            config,
            model=dataclasses.replace(
                laptop_model(), d_model=width, n_heads=width // 16, d_mlp=4 * width
            ),
            l0_count=l0,
            min_nonzero=2,
        )
        for width in (64, 128, 256)
        for l0 in (12_800, 25_600, 51_200)
    }


def recipe_grid(config: TrainConfig) -> dict[str, TrainConfig]:
    """The settings of the preset, changed in one respect at a time."""
    changes: list[dict[str, object]] = [{}]
    changes += [{"lr": lr} for lr in (5e-3, 1e-2, 4e-2)]
    changes += [{"eps": 1e-8, "lr": lr} for lr in (3e-3, 1e-2)] + [{"eps": 1e-2}]
    changes += [{"min_nonzero": minimum} for minimum in (0, 1, 2)]
    changes += [
        {"sharkfin": False},
        {"anneal_shape": "exponential"},
        {"anneal_stop": 0.8},
        {"weight_decay": 0.0},
    ]
    changes += [{"gradient": "clip"}, {"gradient": "clip", "eps": 1e-8, "lr": 3e-3}]
    grid = {
        ", ".join(f"{k} {v}" for k, v in change.items()) or "preset": merged(config, change)
        for change in changes
    }
    grid["no positions"] = merged(config, {"model": {"positions": "none", "d_pos": 0}})
    return grid | {
        f"recipe {name}": dataclasses.replace(config, **values) for name, values in RECIPES.items()
    }


GRIDS = {"size": size_grid, "recipe": recipe_grid}


def train_one(config: TrainConfig, path: Path) -> None:
    import torch

    from tl_sparse.training import train

    torch.set_num_threads(1)
    _, record = train(config, device="cpu", progress=False)
    names = ("validation_loss", "training_loss", "nonzero_weights", "weights", "tokens_per_second")
    write_json(path, {name: record[name] for name in names})


def table(results: dict[str, dict[str, float]]) -> str:
    lines = ["| model | validation loss | nonzero | weights |", "|---|---|---|---|"]
    for name, values in results.items():
        counts = f"{values['nonzero_weights']:,} | {values['weights']:,}"
        lines.append(f"| {name} | {values['validation_loss']:.3f} | {counts} |")
    return "\n".join(lines) + "\n"


def plot(results: dict[str, dict[str, float]], path: Path) -> None:
    """Validation loss against the number of nonzero weights, a line for each total."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5.5, 3.6), layout="constrained")
    for total in sorted({values["weights"] for values in results.values()}):
        points = [v for v in results.values() if v["weights"] == total]
        x, y = [v["nonzero_weights"] for v in points], [v["validation_loss"] for v in points]
        axes.plot(x, y, marker="o", label=f"{total:,} weights in all")
    axes.set(xscale="log", xlabel="nonzero weights", ylabel="validation loss (nats per token)")
    axes.legend(frameon=False)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("grid", choices=GRIDS)
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for the results")
    parser.add_argument(
        "--processes", type=int, default=2, help="models trained at once, each with one thread"
    )
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument(
        "--idiom-chars", type=int, default=3_000_000, help="of training text (default: %(default)s)"
    )
    parser.add_argument("--only", type=int, help="of the grid only the first so many")
    args = parser.parse_args()
    config = TrainConfig(steps=args.steps, data=DataConfig(idiom_chars=args.idiom_chars))
    grid = dict(list(GRIDS[args.grid](config).items())[: args.only])
    paths = {name: args.out / args.grid / f"{name}.json" for name in grid}
    (args.out / args.grid).mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn")) as pool:
        left = [name for name in grid if not paths[name].is_file()]
        for name, _ in zip(
            left, pool.map(train_one, map(grid.get, left), map(paths.get, left)), strict=True
        ):
            print(f"{name}: done", flush=True)
    results = {name: json.loads(path.read_text()) for name, path in paths.items()}
    (args.out / f"{args.grid}.md").write_text(table(results))
    if args.grid == "size":
        plot(results, args.out / "size.svg")
    print(table(results))


if __name__ == "__main__":
    main()
