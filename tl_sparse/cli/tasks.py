"""`tl-sparse tasks`."""

import argparse
import random
import textwrap
from typing import Any

from tl_sparse.cli.arguments import MODEL_HELP, Commands, add_command, add_running_flags, seed
from tl_sparse.errors import DataError, TaskError, TokenizerError

#: How the end of a line is shown in the middle of one.
_NEWLINE = "⏎"


def add_tasks(commands: Commands) -> None:
    """Add the command `tasks` to the parser."""
    parser = add_command(
        commands,
        "tasks",
        "[MODEL] [options]",
        "List the built-in tasks or, with a model, measure how well it does each of them.",
        _run_tasks,
    )
    group = parser.add_argument_group("what to measure")
    group.add_argument("model", nargs="?", help=f"{MODEL_HELP} Without one, the tasks are listed.")
    group.add_argument(
        "--pairs",
        type=int,
        default=256,
        metavar="N",
        help="The number of prompt pairs of each task (default: %(default)s).",
    )
    group.add_argument(
        "--seed",
        type=seed,
        default=0,
        metavar="N",
        help="The seed of the pairs (default: %(default)s).",
    )
    add_running_flags(parser)


def _run_tasks(args: argparse.Namespace) -> None:
    if args.model is None:
        print(_list_of_tasks(args.seed))
        return
    from tl_sparse.checkpoints import open_model
    from tl_sparse.evaluation import task_scores
    from tl_sparse.tasks import tasks_table

    model = open_model(args.model, args.device)
    scores = task_scores(model, args.pairs, args.seed)
    problems = {}
    for name, score in scores.items():
        if score is None:
            problems[name] = _problem(model, name, args.pairs, args.seed)
    if len(problems) == len(scores):
        name, problem = next(iter(problems.items()))
        raise TaskError(
            f"none of the {len(scores)} tasks is possible with {args.model}: {name}: {problem}"
        )
    print(tasks_table(scores, problems))


def _problem(model: Any, name: str, n_pairs: int, seed: int) -> str:
    """Why a task is not possible with the model's tokenizer and context."""
    from tl_sparse.tasks import TASKS, make_task_data

    try:
        make_task_data(TASKS[name], model.tokenizer, n_pairs, seed, model.cfg.n_ctx)
    except (DataError, TaskError, TokenizerError) as error:
        return textwrap.shorten(str(error), 240, placeholder=" …")
    return ""


def _list_of_tasks(seed: int) -> str:
    """For each built-in task, what it is and the ends of the two prompts of a pair."""
    from tl_sparse.tasks import TASKS

    entries = []
    for task in TASKS.values():
        pair = task.pair(random.Random(seed))
        first, second = _ends(*pair.prompts)
        width = max(len(first), len(second))
        entries.append(
            f"{task.name}: {task.description}\n"
            f"    {first:{width}}  →  {pair.first_answer!r}\n"
            f"    {second:{width}}  →  {pair.second_answer!r}"
        )
    entries.append(
        f"{_NEWLINE} is a new line. `tl-sparse tasks MODEL` measures a model on all tasks."
    )
    return "\n\n".join(entries)


def _ends(first: str, second: str) -> tuple[str, str]:
    """The last lines of two prompts, from the last one in which they differ, each as one line."""
    first_lines = first.split("\n")
    second_lines = second.split("\n")
    n_lines = 1
    most = min(len(first_lines), len(second_lines))
    while n_lines < most and first_lines[-n_lines] == second_lines[-n_lines]:
        n_lines += 1
    return _NEWLINE.join(first_lines[-n_lines:]), _NEWLINE.join(second_lines[-n_lines:])
