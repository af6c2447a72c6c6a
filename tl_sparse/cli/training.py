"""`tl-sparse train`."""

import argparse
import os
from collections.abc import Collection
from dataclasses import fields
from typing import Any

import tl_sparse
from tl_sparse.cli.arguments import Commands, add_command, add_running_flags, remark
from tl_sparse.cli.config_flags import add_config_flags, changed_by_file, given_fields
from tl_sparse.config import merged
from tl_sparse.data import DataConfig
from tl_sparse.network import SparseConfig
from tl_sparse.training import PRESETS, RECIPES, TrainConfig, preset

#: Group of flags → the fields of TrainConfig in it. --seed is also the seed of the text.
TRAINING_FLAGS = {
    "the update": (
        "steps batch_size accumulation lr eps beta1 beta2 warmup_fraction sharkfin gradient "
        "weight_decay decay bigram_from_counts last_bigram_row precision compile seed"
    ),
    "the sparsity": (
        "l0_fraction l0_count l0_fraction_embed l0_groups fused_qkv sparse_biases min_nonzero "
        "anneal_start anneal_stop anneal_shape dense_gradient_steps topk_anneal_start "
        "topk_anneal_stop"
    ),
    "the run": (
        "validate_steps target_validation_loss max_jump checkpoint_steps checkpoint_minutes "
        "keep_checkpoints track"
    ),
}


def add_train(commands: Commands) -> None:
    """Add the command `train` to the parser."""
    parser = add_command(
        commands,
        "train",
        "[FILE.yaml] --out FOLDER [options]",
        "Train a weight-sparse model.",
        _run_train,
    )
    add_training_flags(parser)
    add_running_flags(parser)


def add_training_flags(parser: argparse.ArgumentParser, without: Collection[str] = ()) -> None:
    """Add the flags of a training: the result, the settings, the model, the text and the update.

    Args:
        parser: the parser.
        without: the fields of `SparseConfig` and `DataConfig` that get no flag.
    """
    group = parser.add_argument_group("the result")
    group.add_argument(
        "--out",
        required=True,
        metavar="FOLDER",
        help="A new folder for the model and the record of its training.",
    )
    group.add_argument(
        "--resume",
        action="store_true",
        help="Continue the unfinished run in --out, with the settings that it was begun with.",
    )
    group = parser.add_argument_group("where settings come from; flags override them all")
    group.add_argument(
        "config",
        nargs="?",
        metavar="FILE.yaml",
        help="Fields of TrainConfig, in which `model` and `data` hold fields of SparseConfig and "
        "DataConfig. The file overrides the preset.",
    )
    group.add_argument(
        "--preset",
        choices=PRESETS,
        help="The configuration to begin with (default: laptop).",
    )
    group.add_argument(
        "--recipe",
        choices=RECIPES,
        help="Follow the authors' published training script, or the text of their paper, to the "
        "letter; or compute dense gradients in some steps only, for wide models (sparse).",
    )
    laptop = preset("laptop")
    model_fields = [field.name for field in fields(SparseConfig) if field.name not in without]
    not_of_data = {"seed", *without}
    data_fields = [field.name for field in fields(DataConfig) if field.name not in not_of_data]
    add_config_flags(parser.add_argument_group("the model"), laptop.model, *model_fields)
    add_config_flags(parser.add_argument_group("the text"), laptop.data, *data_fields)
    for title, names in TRAINING_FLAGS.items():
        add_config_flags(parser.add_argument_group(title), laptop, *names.split())


def _run_train(args: argparse.Namespace) -> None:
    # First what imports quickly, so that a mistake is reported at once.
    check_out(args)
    config = train_config(args)
    _, record = tl_sparse.train(config, args.out, args.device, not args.quiet, args.resume)
    is_main_process = os.environ.get("RANK", "0") == "0"
    if is_main_process:
        print(training_summary(record))
        remark(f"Saved in {args.out}; open it with tl_sparse.load({args.out!r})", args.quiet)


def check_out(args: argparse.Namespace) -> None:
    """Check that a run can begin in --out, unless it is to be resumed there.

    Raises:
        ConfigError: if there are files of others.
    """
    if not args.resume:
        from tl_sparse.training import check_no_other_files

        check_no_other_files(args.out)


def train_config(args: argparse.Namespace) -> TrainConfig:
    """The preset, overridden by the file, which is overridden by the flags.

    To resume a run, its own settings take the place of the preset, unless one is given.
    """
    config = changed_by_file(_first_config(args), args.config)
    changes = given_fields(args, TrainConfig)
    changes["model"] = given_fields(args, SparseConfig)
    changes["data"] = given_fields(args, DataConfig)  # --seed is also the seed of the data
    if "abs_topk" in changes["model"]:
        fraction = args.abs_topk
        changes["model"]["abs_topk"] = {} if fraction == 1 else tl_sparse.paper_topk(fraction)
    return merged(config, changes)


def _first_config(args: argparse.Namespace) -> TrainConfig:
    if args.resume and args.preset is None and args.recipe is None:
        from tl_sparse.training import config_of_run

        return config_of_run(args.out)
    return preset(args.preset or "laptop", args.recipe)


def training_summary(record: dict[str, Any]) -> str:
    """A summary of the training record, in one line."""
    tokens = f"{record['training_tokens_seen']:,} tokens"
    seconds = f"{record['seconds']['training']:.0f} s"
    speed = f"{record['tokens_per_second']:,.0f} tokens/s"
    loss = f"validation loss {record['validation_loss']:.3f} nats per token"
    weights = f"{record['nonzero_weights']:,} of {record['weights']:,} weights nonzero"
    return f"Trained on {tokens} in {seconds} ({speed}): {loss}, {weights}"
