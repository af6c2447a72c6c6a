"""Models and circuits onto the Hugging Face hub, with a card of what was measured of them."""


import json
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCardData

from tl_sparse.circuits import Circuit
from tl_sparse.errors import CheckpointError
from tl_sparse.evaluation import Evaluation, scores_table
from tl_sparse.faces import SparseModel
from tl_sparse.files import write_json
from tl_sparse.tasks import Score, tasks_table


def push_to_hub(
    source: SparseModel | Circuit, repo_id: str, *, record: Mapping[str, Any] | None = None,
    private: bool | None = None, revision: str | None = None, token: str | None = None,
    commit_message: str | None = None, dense: bool = False,
) -> str:  # fmt: skip
    """Upload a model or circuit, as `save_pretrained` or `save` writes it, with a model card; returns its address.

    Args:
        repo_id: `"user/repo"`, made if it does not exist; the card in it is replaced.
        record: of a model's training, for the card: what `train` returned and wrote to `training.json`.
        private: of a new repository; None: as the account's settings say.
        revision: a branch, made if it does not exist; None: the main branch.
        token: None: that of `hf auth login`.
        dense: of a model, as in `save_pretrained`.

    Raises:
        CheckpointError: if the hub cannot be reached, or refuses.
    """
    with tempfile.TemporaryDirectory() as name:
        folder, api = Path(name), HfApi(token=token)
        if isinstance(source, Circuit):
            source.save(folder)
        else:
            source.save_pretrained(folder, dense)
        if record is not None:
            write_json(folder / "training.json", record)
        try:
            url = api.create_repo(repo_id, private=private, exist_ok=True)
            if revision is not None:
                api.create_branch(url.repo_id, branch=revision, exist_ok=True)
            (folder / "README.md").write_text(model_card(source, url.repo_id, record), encoding="utf-8")
            api.upload_folder(repo_id=url.repo_id, folder_path=folder, revision=revision, commit_message=commit_message)
        except Exception as error:  # among others those of httpx or httpx2, by the version of huggingface_hub
            status = getattr(getattr(error, "response", None), "status_code", None)
            hint = "; log in with a token that may write there: `hf auth login`" if status in (401, 403) else ""
            raise CheckpointError(f"cannot push to {repo_id!r}: {error}{hint}") from error
    return str(url)


def model_card(source: SparseModel | Circuit, repo_id: str, record: Mapping[str, Any] | None = None) -> str:
    """The README.md of a repository: what was measured of a model or circuit, and how to load it."""
    data = ModelCardData(library_name="tl_sparse", tags=["transformer-lens", "weight-sparse", "interpretability"])
    if isinstance(source, Circuit):
        facts, load = _circuit_facts(source), f'circuit = tl_sparse.Circuit.load("{repo_id}")'
    else:
        data.pipeline_tag = "text-generation"
        facts, load = _model_facts(source, record or {}), f'model = tl_sparse.load("{repo_id}")'
    return f"""---
{data.to_yaml()}
---
# {repo_id.split("/")[-1]}

A {"circuit of a " * isinstance(source, Circuit)}weight-sparse transformer
([Gao et al. 2025](https://arxiv.org/abs/2511.13653)), written by tl_sparse {version("tl-sparse")}.

```
{facts}
```

```python
import tl_sparse

{load}
```

A model is a `HookedTransformer` on TransformerLens 3 and a `TransformerBridge` on 4.
"""


def _model_facts(model: SparseModel, record: Mapping[str, Any]) -> str:
    topk = ", ".join(f"{where} {fraction:g}" for where, fraction in model.sparse_cfg.abs_topk.items())
    keys = "command", "data", "training_tokens_seen", "training_loss", "validation_loss", "config"
    training = json.dumps({key: record[key] for key in keys if key in record}, indent=2, ensure_ascii=False)
    facts = f"{model!r}\nAbsTopK, fraction kept: {topk or 'none'}" + (f"\ntraining: {training}" if record else "")
    if "tasks" in record:
        scores = {name: values and Score(**values) for name, values in record["tasks"].items()}
        facts += f"\n\nTasks, a choice between two next tokens (a coin has loss 0.693):\n{tasks_table(scores)}"
    return facts


def _circuit_facts(circuit: Circuit) -> str:
    heldout = circuit.measured.get("heldout")  # as `prune` writes it
    if heldout is None:
        return repr(circuit)
    evaluation = Evaluation.from_dict(heldout)
    return f"{circuit!r}\n{evaluation.n_edges} edges\n\n{scores_table(evaluation)}"
