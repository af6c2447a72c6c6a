"""`tl-sparse train`."""

import argparse
import os
from typing import Any

import tl_sparse
from tl_sparse.cli.arguments import (
    Commands,
    add_command,
    add_config_flags,
    changed_by_file,
    given_fields,
)
from tl_sparse.config import merged
from tl_sparse.data import DataConfig
from tl_sparse.network import SparseConfig
from tl_sparse.training import PRESETS, RECIPES, TrainConfig, preset


def add_train(commands: Commands) -> None:
    """Add the command `train` to the parser."""
    parser = add_command(
        commands,
        "train",
        "Train a weight-sparse model.",
        _run_train,
        SparseConfig,
        DataConfig,
        TrainConfig,
    )
    parser.add_argument(
        "config",
        nargs="?",
        help="A YAML file with fields of TrainConfig, in which `model` and `data` hold fields of "
        "SparseConfig and DataConfig. The file overrides the preset, and flags override the file.",
    )
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        default="laptop",
        help="The configuration that the file and the flags override (default: %(default)s).",
    )
    parser.add_argument(
        "--recipe",
        choices=RECIPES,
        help="Follow the authors' published training script, or the text of their paper, to the "
        "letter.",
    )
    parser.add_argument(
        "--out", required=True, help="A new folder for the model and the record of its training."
    )
    parser.add_argument(
        "--resume", action="store_true", help="Continue the unfinished run in --out."
    )
    laptop = preset("laptop")
    add_config_flags(parser, laptop.model)
    add_config_flags(parser, laptop.data, skip=["seed"])
    add_config_flags(parser, laptop, skip=["model", "data"])


def _run_train(args: argparse.Namespace) -> None:
    # Made first, so that a mistake in it is reported before the slow imports.
    config = train_config(args)
    _, record = tl_sparse.train(config, args.out, args.device, resume=args.resume)
    is_main_process = os.environ.get("RANK", "0") == "0"
    if is_main_process:
        print(training_summary(record))
        print(f"Saved in {args.out}; open it with tl_sparse.load({args.out!r})")


def train_config(args: argparse.Namespace) -> TrainConfig:
    """The preset, overridden by the file, which is overridden by the flags."""
    config = changed_by_file(preset(args.preset, args.recipe), args.config)
    changes = given_fields(args, TrainConfig)
    changes["model"] = given_fields(args, SparseConfig)
    changes["data"] = given_fields(args, DataConfig)  # --seed is also the seed of the data
    if "abs_topk" in changes["model"]:
        fraction = args.abs_topk
        changes["model"]["abs_topk"] = {} if fraction == 1 else tl_sparse.paper_topk(fraction)
    return merged(config, changes)


def training_summary(record: dict[str, Any]) -> str:
    """A summary of the training record, in one line."""
    tokens = f"{record['training_tokens_seen']:,} tokens"
    seconds = f"{record['seconds']['training']:.0f} s"
    speed = f"{record['tokens_per_second']:,.0f} tokens/s"
    loss = f"validation loss {record['validation_loss']:.3f} nats per token"
    weights = f"{record['nonzero_weights']:,} of {record['weights']:,} weights nonzero"
    return f"Trained on {tokens} in {seconds} ({speed}): {loss}, {weights}"
