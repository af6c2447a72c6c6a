"""From nothing to a circuit: train a sparse model, see which tasks it solves, and cut out the
circuit of one.

    python examples/from_training_to_circuit.py --out my-run          # minutes on two cores
    python examples/from_training_to_circuit.py --out my-run --quick  # half a minute; learns little
"""

# %% Where the results go.
import argparse
import dataclasses
import math
import os
from pathlib import Path

import tl_sparse
from tl_sparse.evaluation import full_evaluation, task_scores
from tl_sparse.files import check_new_folder, write_json
from tl_sparse.pruning import task_splits
from tl_sparse.tasks import TASKS, tasks_table
from tl_sparse.view import evaluation_tables, plots

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument(
    "--out", type=Path, default=Path("my-run"), help="new folder (default: %(default)s)"
)
parser.add_argument(
    "--quick", action="store_true", help="a smaller model, little training, few prompts"
)
args = parser.parse_args()
check_new_folder(args.out)

# %% Train. A `TrainConfig` without arguments is the preset `laptop`: two layers, 4 % of weights.
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
    f"{record['nonzero_weights']:,} of {record['weights']:,} weights, "
    f"loss {record['validation_loss']:.3f}"
)

# %% Which of the paper's tasks does it solve?
scores = task_scores(model, n_pairs=64 if args.quick else 256)
print(tasks_table(scores))

# %% Prune the one it does best, of those whose answer the last token does not give away: to the
# usual target loss, or if the model itself misses that, halfway from its own loss to guessing.
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

# %% Cut the edges that the task does not need.
fewer, _ = tl_sparse.prune_edges(circuit, model, task, pruning)
fewer.save(args.out / "fewer-edges")
n_edges = len(circuit.edges(model))
print(f"{len(fewer.edges(model))} of {n_edges} edges are left, and {fewer.n_nodes} nodes")

# %% Judge both on held-out pairs: at each size, beside random circuits, and with each node and edge
# cut alone.
*_, heldout = task_splits(model, task, pruning)
figures = {
    "pruned by nodes": full_evaluation(circuit, model, heldout),
    "by edges too": full_evaluation(fewer, model, heldout),
}
print(evaluation_tables(figures["by edges too"], most=10))
write_json(args.out / "figures.json", figures["by edges too"])

# %% Look at them: a picture, and a page for any browser.
plots.save(plots.curve(figures), args.out / "curve.png")
fewer.view(model, corpus=corpus).save(args.out / "page.html")
names = sorted(os.listdir(args.out))
print(f"Saved in {args.out}: {', '.join(names)}")
