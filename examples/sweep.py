"""Train a grid of small models, and compare their validation losses in a table and a plot.

    python examples/sweep.py size --out results        # L0 and width
    python examples/sweep.py recipe --out results      # learning rate, ε, min_nonzero, …

The numbers of each finished model are saved in a file of its own, so that an interrupted sweep
continues where it stopped.
"""

import argparse
import dataclasses
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from tl_sparse import DataConfig, TrainConfig
from tl_sparse.config import merged
from tl_sparse.files import read_json, write_json, write_text
from tl_sparse.suites import end_with_parent
from tl_sparse.training import RECIPES, laptop_model


def size_grid(config: TrainConfig) -> dict[str, TrainConfig]:
    """Three widths, each with three numbers of nonzero weights (L0)."""
    grid = {}
    for width in (64, 128, 256):
        model = dataclasses.replace(
            laptop_model(), d_model=width, n_heads=width // 16, d_mlp=4 * width
        )
        for l0 in (12_800, 25_600, 51_200):
            grid[f"width {width}, L0 {l0}"] = dataclasses.replace(
                config, model=model, l0_count=l0, min_nonzero=2
            )
    return grid


# The changes of the recipe grid to the preset: one setting each, or several that belong together.
CHANGES: list[dict[str, object]] = [
    {},
    {"lr": 5e-3},
    {"lr": 1e-2},
    {"lr": 4e-2},
    {"eps": 1e-8, "lr": 3e-3},
    {"eps": 1e-8, "lr": 1e-2},
    {"eps": 1e-2},
    {"min_nonzero": 0},
    {"min_nonzero": 1},
    {"min_nonzero": 2},
    {"sharkfin": False},
    {"anneal_shape": "exponential"},
    {"anneal_stop": 0.8},
    {"weight_decay": 0.0},
    {"gradient": "clip"},
    {"gradient": "clip", "eps": 1e-8, "lr": 3e-3},
]


def recipe_grid(config: TrainConfig) -> dict[str, TrainConfig]:
    """The preset with each of `CHANGES`, the preset without positions, and each recipe."""
    grid = {}
    for change in CHANGES:
        name = ", ".join(f"{key} {value}" for key, value in change.items())
        grid[name or "preset"] = merged(config, change)
    grid["no positions"] = merged(config, {"model": {"positions": "none", "d_pos": 0}})
    for recipe, values in RECIPES.items():
        grid[f"recipe {recipe}"] = dataclasses.replace(config, **values)
    return grid


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
    """Validation loss against the number of nonzero weights, with a line for each model size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from tl_sparse.view import plots

    figure, axes = plt.subplots(figsize=(5.5, 3.6), layout="constrained")
    for total in sorted({values["weights"] for values in results.values()}):
        points = [values for values in results.values() if values["weights"] == total]
        nonzero = [point["nonzero_weights"] for point in points]
        losses = [point["validation_loss"] for point in points]
        axes.plot(nonzero, losses, marker="o", label=f"{total:,} weights in all")
    axes.set(xscale="log", xlabel="nonzero weights", ylabel="validation loss (nats per token)")
    axes.legend(frameon=False)
    plots.save(figure, path, overwrite=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("grid", choices=GRIDS, help="the grid of models to train")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for the results")
    parser.add_argument(
        "--processes",
        type=int,
        default=2,
        help="number of models trained at once, each with one thread (default: %(default)s)",
    )
    parser.add_argument(
        "--steps", type=int, default=600, help="training steps of each model (default: %(default)s)"
    )
    parser.add_argument(
        "--idiom-chars",
        type=int,
        default=3_000_000,
        help="characters of synthetic training text (default: %(default)s)",
    )
    parser.add_argument(
        "--only", type=int, help="train only this many models, the first of the grid"
    )
    args = parser.parse_args()
    config = TrainConfig(steps=args.steps, data=DataConfig(idiom_chars=args.idiom_chars))
    grid = GRIDS[args.grid](config)
    names = list(grid)[: args.only]
    folder = args.out / args.grid
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / f"{name}.json" for name in names}
    missing = [name for name in names if not paths[name].is_file()]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.processes, context, end_with_parent) as pool:
        finished = pool.map(train_one, map(grid.get, missing), map(paths.get, missing))
        for name, _ in zip(missing, finished, strict=True):
            print(f"{name}: done", flush=True)
    results = {name: read_json(path) for name, path in paths.items()}
    write_text(args.out / f"{args.grid}.md", table(results))
    if args.grid == "size":
        plot(results, args.out / "size.svg")
    print(table(results))


if __name__ == "__main__":
    main()
