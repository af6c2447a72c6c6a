"""`tl-sparse bridge`, and the bridges of a circuit's model."""

import argparse
import os
from dataclasses import replace
from typing import Any

import tl_sparse
from tl_sparse.cli.arguments import Commands, add_command, add_running_flags, remark
from tl_sparse.cli.config_flags import add_config_flags, given_fields
from tl_sparse.cli.training import add_training_flags, check_out, train_config, training_summary
from tl_sparse.errors import BridgeError, TLSparseError, warn_user

#: Group of flags → the fields of BridgeConfig in it.
BRIDGE_FLAGS = {
    "the bridges": (
        "encoder encoder_fraction threshold_log_eps sharpness_start sharpness_stop "
        "threshold_anneal_start threshold_anneal_stop"
    ),
    "the terms of the loss": (
        "weight_ce weight_kl weight_nmse weight_kl_dense_to_sparse weight_kl_sparse_to_dense "
        "top_tokens sites_per_step"
    ),
}


def open_bridges(source: str, dense: str | None, device: str | None) -> Any:
    """The bridges of a circuit's model; None if it has none.

    A dense model that is not given, and cannot be opened, is a warning: what needs it is left out.

    Args:
        source: the source of the circuit's model.
        dense: the dense model, if it is given.
        device: the device of all of them.

    Raises:
        BridgeError: if a dense model is given for a model without bridges.
        TLSparseError: as for `load_bridges`, if the dense model is given.
    """
    from tl_sparse.bridges import has_bridges

    if not has_bridges(source):
        if dense is not None:
            raise BridgeError(f"--dense is not possible: {source} has no bridges to a dense model")
        return None
    try:
        return tl_sparse.load_bridges(source, dense, device)
    except TLSparseError as error:
        if dense is not None:
            raise
        warn_user(f"nothing is measured in the dense model (--dense MODEL names it): {error}")
        return None


def add_bridge(commands: Commands) -> None:
    """Add the command `bridge` to the parser."""
    parser = add_command(
        commands,
        "bridge",
        "DENSE [FILE.yaml] --out FOLDER [options]",
        "Train a weight-sparse model beside a frozen dense one, with bridges between them.",
        _run_bridge,
    )
    parser.add_argument_group("the dense model").add_argument(
        "dense",
        metavar="DENSE",
        help="A folder, a name that tl_sparse.load knows, or a dense model of Hugging Face.",
    )
    # The layers and the vocabulary of the sparse model are those of the dense one.
    add_training_flags(parser, without=("n_layers", "d_vocab", "task_answers"))
    defaults = tl_sparse.BridgeConfig()
    for title, names in BRIDGE_FLAGS.items():
        add_config_flags(parser.add_argument_group(title), defaults, *names.split())
    add_running_flags(parser)


def _run_bridge(args: argparse.Namespace) -> None:
    # First what is quick, so that a mistake in it is reported before the slow work.
    check_out(args)
    train = train_config(args)
    changes = given_fields(args, tl_sparse.BridgeConfig)
    dense: Any = args.dense
    if args.resume:
        from tl_sparse.bridges import bridge_config_of_run

        config = replace(bridge_config_of_run(args.out), train=train, **changes)
    else:
        from tl_sparse.checkpoints import open_model

        dense = open_model(args.dense, args.device)
        config = tl_sparse.BridgeConfig.fitting(dense, train, **changes)
    bridges, record = tl_sparse.train_bridges(
        dense,
        config,
        args.out,
        args.device,
        not args.quiet,
        args.resume,
        dense_source=args.dense,
    )
    is_main_process = os.environ.get("RANK", "0") == "0"
    if is_main_process:
        print(training_summary(record))
        print(bridges.recorded_losses())
        opened = f"tl_sparse.load_bridges({args.out!r})"
        remark(f"Saved in {args.out}; open it with {opened}", args.quiet)
