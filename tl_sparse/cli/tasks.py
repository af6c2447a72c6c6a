"""`tl-sparse tasks`."""

import argparse

import tl_sparse
from tl_sparse.cli.arguments import MODEL_HELP, Commands, add_command, seed


def add_tasks(commands: Commands) -> None:
    """Add the command `tasks` to the parser."""
    parser = add_command(commands, "tasks", "Measure how well a model does each task.", _run_tasks)
    parser.add_argument("model", help=MODEL_HELP)
    parser.add_argument(
        "--pairs",
        type=int,
        default=256,
        help="The number of prompt pairs of each task (default: %(default)s).",
    )
    parser.add_argument(
        "--seed", type=seed, default=0, help="The seed of the pairs (default: %(default)s)."
    )


def _run_tasks(args: argparse.Namespace) -> None:
    from tl_sparse.evaluation import task_scores
    from tl_sparse.tasks import tasks_table

    model = tl_sparse.load(args.model, args.device)
    print(tasks_table(task_scores(model, args.pairs, args.seed)))
