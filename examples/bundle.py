"""Make the models that are bundled with the package, in tl_sparse/models, from finished runs.

    tl-sparse train examples/tiny-python-wide.yaml --out runs/tiny-python-wide
    tl-sparse train examples/tiny-python-wide-dense.yaml --out runs/tiny-python-wide-dense
    tl-sparse train examples/tiny-python-sparse.yaml --out runs/tiny-python-sparse
    tl-sparse train examples/tiny-python-dense.yaml --out runs/tiny-python-dense
    python examples/bundle.py runs/tiny-python-*

Another one is trained beside `tiny-python-dense`, with bridges to it:

    tl-sparse bridge tiny-python-dense examples/tiny-python-bridged.yaml \
        --sites-per-step 2 --out runs/tiny-python-bridged
    python examples/bundle.py runs/tiny-python-bridged

Dense weights are rounded to float16, and everything in the model cards is measured after that.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor

import tl_sparse
from tl_sparse.checkpoints import CORPUS_ROWS, CORPUS_SAMPLE, save_model
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
    record["command"] = f"tl-sparse train examples/{folder.name}.yaml"
    card = model.card(folder.name, record)
    if (run / "bridges.json").is_file():
        card = bundle_bridges(run, folder, record, validation)
    record.pop("command")
    write_json(folder / "training.json", record)
    write_text(folder / "README.md", card)


def bundle_bridges(
    run: Path, folder: Path, record: dict[str, Any], validation: Int[Tensor, "seq pos"]
) -> str:
    """Save the bridges of a run with fewer bits per number; the card of the model with them."""
    bridges = tl_sparse.load_bridges(run, device="cpu")
    bridges.maps.half()
    bridges.save_maps(folder)
    bridges = tl_sparse.load_bridges(folder, device="cpu")
    losses = bridges.losses(validation[:CORPUS_ROWS], 64)
    record["bridge_losses"] = dataclasses.asdict(losses)
    facts = {name: record[name] for name in ("bridges", "bridge_losses")}
    facts["command"] = (
        f"tl-sparse bridge {bridges.dense_source} examples/{folder.name}.yaml --sites-per-step "
        f"{record['bridges']['sites_per_step']}"
    )
    bridges = bridges.with_record(facts)
    bridges.maps.half()
    bridges.save_maps(folder)
    return bridges.card(folder.name)


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
