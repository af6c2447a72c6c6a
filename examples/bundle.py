"""Make the models that are bundled with the package, in tl_sparse/models, from two finished runs.

    tl-sparse train examples/tiny-python-sparse.yaml --out runs/tiny-python-sparse
    tl-sparse train examples/tiny-python-dense.yaml --out runs/tiny-python-dense
    python examples/bundle.py runs/tiny-python-sparse runs/tiny-python-dense

Dense weights are rounded to float16, and everything in the model cards is measured after that.
"""

import argparse
import dataclasses
from pathlib import Path

import tl_sparse
from tl_sparse.checkpoints import CORPUS_SAMPLE, save_model
from tl_sparse.data import DataConfig, load_documents, pack_tokens
from tl_sparse.evaluation import task_scores
from tl_sparse.files import read_json, read_tensors, write_json, write_tensors, write_text
from tl_sparse.outputs import check_new_folder
from tl_sparse.training import evaluate_loss

MODELS = Path(tl_sparse.__file__).parent / "models"


def bundle(run: Path, folder: Path) -> None:
    check_new_folder(folder)
    record = read_json(run / "training.json")
    write_rounded(run, folder)

    model = tl_sparse.load(folder, device="cpu")
    documents = load_documents(DataConfig(**record["config"]["data"]))
    validation = pack_tokens(
        documents.validation, model.tokenizer, model.cfg.n_ctx, record["config"]["seed"]
    )
    record["validation_loss"] = evaluate_loss(model, validation, 64)
    record["tasks"] = {}
    for name, score in task_scores(model, 512, seed=1).items():
        record["tasks"][name] = None if score is None else dataclasses.asdict(score)
    write_json(folder / "training.json", record)
    record["command"] = f"tl-sparse train examples/{folder.name}.yaml"
    write_text(folder / "README.md", model.card(folder.name, record))


def write_rounded(run: Path, folder: Path) -> None:
    """Save the model and the corpus sample of a run with fewer bits per number."""
    model = tl_sparse.load(run, device="cpu")
    state = model.state_dict()
    for name, tensor in state.items():
        is_dense = tensor.count_nonzero() > tensor.numel() / 2
        if ".W_" in name and is_dense:
            state[name] = tensor.half()
    save_model(folder, state, model.sparse_cfg, model.tokenizer)
    sample = read_tensors(run / CORPUS_SAMPLE)["tokens"]
    write_tensors(folder / CORPUS_SAMPLE, {"tokens": sample.short()})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        help="finished runs; each is bundled under the name of its folder",
    )
    parser.add_argument(
        "--out", type=Path, default=MODELS, help="folder for the models (default: %(default)s)"
    )
    args = parser.parse_args()
    for run in args.runs:
        folder = args.out / run.name
        bundle(run, folder)
        n_bytes = sum(path.stat().st_size for path in folder.iterdir())
        print(f"{folder}: {n_bytes:,} bytes")


if __name__ == "__main__":
    main()
