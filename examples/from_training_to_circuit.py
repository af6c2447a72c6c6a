"""From training to a circuit: train a sparse model, measure which tasks it solves, and prune it to
the circuit of one of them.

    python examples/from_training_to_circuit.py --out my-run          # minutes on two cores
    python examples/from_training_to_circuit.py --out my-run --quick  # half a minute, learns little
"""

# %% The arguments, and the folder for the results.
import argparse
import dataclasses
import math
import os
from pathlib import Path

import tl_sparse
from tl_sparse.evaluation import full_evaluation, task_scores
from tl_sparse.files import write_json
from tl_sparse.outputs import check_new_folder
from tl_sparse.pruning import task_splits
from tl_sparse.tasks import TASKS, tasks_table
from tl_sparse.view import evaluation_tables, plots

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument(
    "--out",
    type=Path,
    default=Path("my-run"),
    help="a new folder for the results (default: %(default)s)",
)
parser.add_argument(
    "--quick", action="store_true", help="use a smaller model, little training and few prompts"
)
args = parser.parse_args()
check_new_folder(args.out)

# %% Train a model. A `TrainConfig` without arguments is the preset `laptop`, which has two layers
# and 4 % of its weights nonzero.
config = tl_sparse.TrainConfig()
pruning = tl_sparse.PruneConfig()
if args.quick:
    small = dataclasses.replace(
        config.model, n_layers=1, d_model=64, n_heads=4, d_mlp=128, d_vocab=512
    )
    text = tl_sparse.DataConfig(stdlib_chars=0, idiom_chars=400_000)
    config = tl_sparse.TrainConfig(small, text, steps=220, batch_size=16, l0_fraction=0.2)
    pruning = tl_sparse.PruneConfig(steps=60, train_pairs=128, selection_pairs=32, heldout_pairs=32)
model, record = tl_sparse.train(config, args.out / "model")
print(
    f"{record['nonzero_weights']:,} of {record['weights']:,} weights are nonzero, "
    f"validation loss {record['validation_loss']:.3f}"
)

# %% Measure which of the paper's tasks the model solves.
scores = task_scores(model, n_pairs=64 if args.quick else 256)
print(tasks_table(scores))

# %% Prune the model for the task with the lowest loss among those whose prompts end in the same
# token. The target loss is the default one or, if this is larger, halfway from the model's own loss
# to that of guessing.
losses = {}
for name, score in scores.items():
    if score is not None and TASKS[name].same_end:
        losses[name] = score.loss
task = TASKS[min(losses, key=losses.get)]
halfway = (losses[task.name] + math.log(2)) / 2
pruning = dataclasses.replace(pruning, target_loss=max(pruning.target_loss, halfway))
corpus = tl_sparse.load_corpus(args.out / "model", model.tokenizer, model.cfg.n_ctx)
circuit, evaluation = tl_sparse.prune(model, task, corpus, pruning)
circuit.save(args.out / "circuit")
print(tl_sparse.report(circuit, model, task, evaluation))

# %% Prune the edges that the task does not need.
fewer, _ = tl_sparse.prune_edges(circuit, model, task, pruning)
fewer.save(args.out / "fewer-edges")
n_edges = len(circuit.edges(model))
print(f"{len(fewer.edges(model))} of {n_edges} edges are left, and {fewer.n_nodes} nodes")

# %% Evaluate both circuits on held-out pairs: at each size, in comparison with random circuits, and
# with each node and each edge ablated alone.
*_, heldout = task_splits(model, task, pruning)
figures = {
    "pruned by nodes": full_evaluation(circuit, model, heldout),
    "by edges too": full_evaluation(fewer, model, heldout),
}
print(evaluation_tables(figures["by edges too"], most=10))
write_json(args.out / "figures.json", figures["by edges too"])

# %% Save a plot of both circuits, and an interactive page that any browser shows.
plots.save(plots.curve(figures), args.out / "curve.png")
fewer.view(model, corpus=corpus).save(args.out / "page.html")
names = sorted(os.listdir(args.out))
print(f"Saved in {args.out}: {', '.join(names)}")
