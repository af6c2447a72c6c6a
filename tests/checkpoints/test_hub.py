"""Pushing models and circuits, and the cards that go with them; the hub is this test's own."""

import dataclasses
import re
import socket
from unittest.mock import create_autospec

import pytest
import torch
from huggingface_hub import HfApi, ModelCard, RepoUrl, constants

from helpers import tiny_model
from loopback import Answer, cache_snapshot, point_hub_at, serving
from tl_sparse.checkpoints.loading import load
from tl_sparse.checkpoints.sources import find
from tl_sparse.circuits.circuit import Circuit
from tl_sparse.circuits.fingerprints import fingerprint
from tl_sparse.errors import CheckpointError
from tl_sparse.evaluation.scores import Evaluation
from tl_sparse.files import read_json
from tl_sparse.tasks.scores import Score

RECORD = {
    "config": {"steps": 10, "lr": 0.01},
    "data": "3 files",
    "training_tokens_seen": 640,
    "training_loss": 1.5,
    "validation_loss": 1.75,
    "device": "cpu",
}
EVALUATION = Evaluation(
    full=Score(0.1, 0.01, 0.99),
    circuit=Score(0.15, 0.02, 0.97),
    ablated=Score(0.7, 0.03, 0.5),
    zero=Score(0.2, 0.04, 0.96),
    resample=Score(0.25, 0.05, 0.95),
    n_pairs=40,
    n_nodes=3,
    n_edges=2,
)
HEAD = """---
library_name: tl_sparse
{more}tags:
- transformer-lens
- weight-sparse
- interpretability
---
# repo

A {what}weight-sparse transformer
([Gao et al. 2025](https://arxiv.org/abs/2511.13653)), written by tl_sparse 0.1.0.

```
"""
FOOT = """
A model is a `HookedTransformer` on TransformerLens 3 and a `TransformerBridge` on 4.
"""


@pytest.fixture(scope="module")
def model():
    return tiny_model(abs_topk={"attn_in": 0.5, "mlp_neuron": 0.25})


@pytest.fixture(scope="module")
def circuit(model):
    kept = {"blocks.0.mlp.hook_post": torch.arange(10) % 4 == 0}
    means = {"blocks.0.mlp.hook_post": torch.arange(10) / 7}
    return Circuit(
        kept,
        means,
        fingerprint(model),
        "my-model",
        "my_task",
        {"heldout": dataclasses.asdict(EVALUATION), "seed": 1},
    )


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """What was asked of the hub; what is uploaded is then in its cache, as if it were fetched."""
    asked = []

    def create_repo(api, repo_id, **options):
        asked.append(("create_repo", repo_id, api.token, options))
        return RepoUrl(f"https://huggingface.co/{repo_id if '/' in repo_id else f'user/{repo_id}'}")

    def create_branch(api, repo_id, **options):
        asked.append(("create_branch", repo_id, options))

    def upload_folder(api, *, repo_id, folder_path, revision, commit_message):
        asked.append(("upload_folder", repo_id, revision, commit_message))
        files = {path.name: path.read_bytes() for path in folder_path.iterdir()}
        cache_snapshot(tmp_path, repo_id, files, revision=revision or "main")

    for method in (create_repo, create_branch, upload_folder):
        real = getattr(HfApi, method.__name__)
        with_its_signature = create_autospec(real, side_effect=method)
        monkeypatch.setattr(HfApi, method.__name__, with_its_signature)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return asked


def test_a_model_comes_back(model, hub):
    assert model.push_to_hub("user/repo") == "https://huggingface.co/user/repo"
    assert hub == [
        ("create_repo", "user/repo", None, {"private": None, "exist_ok": True}),
        ("upload_folder", "user/repo", None, None),
    ]
    folder = find("user/repo")
    assert {path.name for path in folder.iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
    }
    assert (folder / "README.md").read_text() == model.card("user/repo")
    again = load(folder, device="cpu")
    assert again.sparse_cfg == model.sparse_cfg
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_circuit_comes_back(circuit, hub):
    circuit.push_to_hub("user/repo")
    folder = find("user/repo")
    assert {path.name for path in folder.iterdir()} == {
        "README.md",
        "circuit.json",
        "circuit.safetensors",
    }
    assert (folder / "README.md").read_text() == circuit.card("user/repo")
    again = Circuit.load(folder)
    assert again.nodes == circuit.nodes
    assert again.measured == circuit.measured


def test_the_record_of_training_goes_along(model, hub):
    model.push_to_hub("user/repo", record=RECORD)
    folder = find("user/repo")
    assert read_json(folder / "training.json") == RECORD
    assert (folder / "README.md").read_text() == model.card("user/repo", RECORD)


def test_every_choice_reaches_the_hub(circuit, hub):
    address = circuit.push_to_hub(
        "user/repo", private=True, revision="v1", token="hf_secret", commit_message="A circuit"
    )
    assert address == "https://huggingface.co/user/repo"
    assert hub == [
        ("create_repo", "user/repo", "hf_secret", {"private": True, "exist_ok": True}),
        ("create_branch", "user/repo", {"branch": "v1", "exist_ok": True}),
        ("upload_folder", "user/repo", "v1", "A circuit"),
    ]
    assert "secret" not in "".join(
        path.read_text(errors="ignore") for path in find("user/repo", "v1").iterdir()
    )


def test_a_name_without_a_user_is_the_users_own(circuit, hub):
    assert circuit.push_to_hub("repo") == "https://huggingface.co/user/repo"
    assert 'Circuit.load("user/repo")' in (find("user/repo") / "README.md").read_text()


def test_dense_is_passed_on(model, hub, monkeypatch):
    asked, save = [], type(model).save_pretrained

    def save_pretrained(self, folder, dense=False):
        asked.append(dense)
        save(self, folder)

    monkeypatch.setattr(type(model), "save_pretrained", save_pretrained)
    model.push_to_hub("user/repo", dense=True)
    assert asked == [True]


# --- Cards


def test_the_card_of_a_model(model):
    expected = HEAD.format(more="pipeline_tag: text-generation\n", what="")
    expected += f"""{model!r}
AbsTopK, fraction kept: attn_in 0.5, mlp_neuron 0.25
```

```python
import tl_sparse

model = tl_sparse.load("user/repo")
```
"""
    assert model.card("user/repo") == expected + FOOT


def test_the_card_of_a_trained_model():
    model = tiny_model()
    expected = f"""
{model!r}
AbsTopK, fraction kept: none
training: {{
  "data": "3 files",
  "training_tokens_seen": 640,
  "training_loss": 1.5,
  "validation_loss": 1.75,
  "config": {{
    "steps": 10,
    "lr": 0.01
  }}
}}
```
"""
    assert expected in model.card("user/repo", RECORD)


def test_names_do_not_break_out_of_a_card(circuit):
    name = "x\n````\n<script>1</script>\n\x1b[2J```"
    card = dataclasses.replace(circuit, task=name, model_name=name).card("user/repo")
    (block,) = re.findall(r"^(`{5,})\n(.*?)^\1\n", card, flags=re.MULTILINE | re.DOTALL)
    assert "<script>" not in card.replace(block[1], "")
    assert "\x1b" not in card
    assert not any(line.startswith("`") for line in block[1].splitlines())


def test_the_card_of_a_circuit(circuit):
    expected = HEAD.format(more="", what="circuit of a ")
    expected += f"""{circuit!r}
2 edges

On 40 held-out pairs of prompts
"""
    card = circuit.card("user/repo")
    assert card.startswith(expected)
    rows = [line.split("  ") for line in card.splitlines() if " ± 0" in line]
    assert [[cell.strip() for cell in row if cell.strip()] for row in rows] == [
        ["the full model", "0.100 ± 0.010", "99.0%", "–", "–"],
        ["the circuit alone (sufficient?)", "0.150 ± 0.020", "97.0%", "–", "–"],
        ["… the rest at zero, not at its mean", "0.200 ± 0.040", "96.0%", "–", "–"],
        ["… the rest resampled", "0.250 ± 0.050", "95.0%", "–", "–"],
        ["without the circuit (necessary?)", "0.700 ± 0.030", "50.0%", "–", "–"],
    ]
    assert card.endswith(
        'import tl_sparse\n\ncircuit = tl_sparse.Circuit.load("user/repo")\n```\n' + FOOT
    )


def test_the_card_of_a_circuit_that_nobody_measured(circuit):
    unmeasured = dataclasses.replace(circuit, measured={})
    expected = HEAD.format(more="", what="circuit of a ") + f"{unmeasured!r}\n```\n"
    assert unmeasured.card("user/repo").startswith(expected)


def test_huggingface_hub_reads_the_cards(model, circuit):
    tags = ["transformer-lens", "weight-sparse", "interpretability"]
    expected = {"library_name": "tl_sparse", "tags": tags, "pipeline_tag": "text-generation"}
    assert ModelCard(model.card("user/repo", RECORD)).data.to_dict() == expected
    assert ModelCard(circuit.card("user/repo")).data.to_dict() == {
        "library_name": "tl_sparse",
        "tags": tags,
    }


# --- Refusals


@pytest.mark.parametrize("status", [401, 403])
def test_without_the_right_to_write(circuit, status, tmp_path, monkeypatch):
    with serving(lambda method, path, headers: Answer(status=status)) as url:
        point_hub_at(monkeypatch, url, tmp_path)
        with pytest.raises(CheckpointError) as caught:
            circuit.push_to_hub("user/repo", token="hf_wrong")
    message = str(caught.value)
    assert message.startswith("cannot push to 'user/repo': ")
    assert message.endswith("; log in with a token that may write there: `hf auth login`")
    assert "hf_wrong" not in message


def test_a_refusal_of_another_kind(circuit, tmp_path, monkeypatch):
    with serving(lambda method, path, headers: Answer(status=422)) as url:
        point_hub_at(monkeypatch, url, tmp_path)
        with pytest.raises(
            CheckpointError, match=r"(?s)cannot push to 'user/repo': .*422"
        ) as caught:
            circuit.push_to_hub("user/repo", token="hf_any")
    assert "log in" not in str(caught.value)


def test_without_a_network(circuit, tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        point_hub_at(monkeypatch, f"http://127.0.0.1:{free.getsockname()[1]}", tmp_path)
        with pytest.raises(
            CheckpointError, match=r"cannot push to 'user/repo': .*Connection refused"
        ):
            circuit.push_to_hub("user/repo")


def test_off_line(circuit, tmp_path, monkeypatch):
    point_hub_at(monkeypatch, "http://127.0.0.1:9", tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        CheckpointError, match=r"cannot push to 'user/repo': .*offline mode is enabled"
    ):
        circuit.push_to_hub("user/repo")


def test_an_impossible_name(circuit, tmp_path, monkeypatch):
    point_hub_at(monkeypatch, "http://127.0.0.1:9", tmp_path)
    with pytest.raises(CheckpointError, match="cannot push to 'a/b/c': "):
        circuit.push_to_hub("a/b/c")
