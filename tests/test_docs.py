"""The documentation: every snippet of Python runs, and every command is one that there is.

The snippets of a page run in one namespace, in order, scaled down to models and searches of
seconds. They run in a folder that has what a reader has who followed the quickstart.
"""

import ast
import dataclasses
import functools
import importlib.util
import json
import linecache
import re
import shlex
import shutil
import traceback
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import tl_sparse
from formats import write_circuitgpt, write_openai
from helpers import full_config, tiny_model
from loopback import cache_snapshot
from tl_sparse.attacks import attack
from tl_sparse.bridges import dense_effects
from tl_sparse.certificates import Effort
from tl_sparse.cli.parser import build_parser
from tl_sparse.data.config import DataConfig
from tl_sparse.evaluation import subset_scores
from tl_sparse.network.config import SparseConfig, paper_topk
from tl_sparse.pruning.config import PruneConfig, as_config
from tl_sparse.training.config import TrainConfig

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
#: What these pages show depends on the version of TransformerLens. All others run on one.
ON_BOTH_LINES = ("loading", "hooks", "tools")
#: A suite takes more than a few seconds, however small.
SLOW = ("machines",)

#: A search of a second or two, whatever it finds.
PRUNE = {
    "target_loss": 5.0,
    "steps": 2,
    "train_pairs": 16,
    "ranking_pairs": 4,
    "selection_pairs": 8,
    "cleanup_pairs": 4,
    "heldout_pairs": 8,
    "exchanges": 0,
    "subsets": 1,
    "subset_pairs": 2,
    "adversaries": 0,
    "adversary_steps": 1,
    "removal_tests": 2,
}
TRAINED = SparseConfig(
    n_layers=2,
    d_model=16,
    n_heads=2,
    d_head=4,
    d_mlp=32,
    d_vocab=512,
    n_ctx=128,
    abs_topk=paper_topk(0.25),
)
QUICKER = Effort(
    pairs=4,
    subsets=2,
    subset_pairs=2,
    adversaries=1,
    adversary_steps=1,
    adversary_pairs=2,
    budgets=[3],
    corpus_rows=1,
    random_circuits=1,
    interchange_pairs=2,
    tested_circuits=1,
    tested_pairs=2,
    part_pairs=2,
    random_parts=1,
    backup_candidates=1,
    other_task_pairs=1,
    searches=False,
)
TEXT = DataConfig(stdlib_chars=20_000, idiom_chars=60_000)


@dataclass(frozen=True)
class Snippet:
    """A block of code in a page.

    Attributes:
        page: its file.
        line: the line of the page on which its code begins.
        language: "python", "sh" or another.
        code: the code, without the indentation of the block.
    """

    page: Path
    line: int
    language: str
    code: str

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def snippets_of(page: Path, language: str) -> list[Snippet]:
    found = []
    block: list[str] | None = None
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        fence = re.fullmatch(r"( *)```(\w*).*", line)
        if fence is None:
            if block is not None:
                block.append(line)
        elif block is None:
            block, indent, start, kind = [], len(fence[1]), number + 1, fence[2]
        else:
            code = "\n".join(line[indent:] for line in block)
            found.append(Snippet(page, start, kind, code))
            block = None
    assert block is None, f"{page}: a block of code without an end"
    return [snippet for snippet in found if snippet.language == language]


def run(snippet: Snippet, namespace: dict) -> None:
    """Run a snippet; where it fails, the message names the page and its line."""
    code = "\n" * (snippet.line - 1) + snippet.code
    name = str(snippet.page.relative_to(ROOT))
    # Where tracebacks look for the source, and nnsight, which other tests import: without this they
    # would read the page as Python.
    linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)
    try:
        exec(compile(code, name, "exec"), namespace)
    except Exception as error:
        line = snippet.line
        for frame in traceback.extract_tb(error.__traceback__):
            if frame.filename == name:
                line = frame.lineno
        pytest.fail(f"{name}:{line}: {type(error).__name__}: {error}", pytrace=True)


def published(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Small models in the caches, where the real ones of these names would be after a download."""
    model = tiny_model(full_config())
    packaged = write_circuitgpt(folder / "packaged", model)
    files = {path.name: path.read_bytes() for path in packaged.iterdir()}
    cache_snapshot(folder / "hub", "openai/circuit-sparsity", files)
    write_openai(folder / "assets" / "tl_sparse" / "openai" / "csp_yolo1", model)
    patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "hub"))
    patch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", str(folder / "assets"))
    patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def some_nodes(ranking, criterion, *_):
    """In place of choosing a size: a few nodes, so that there is something to look at.

    Two neurons that read and write, and what they read and write.
    """
    if ranking.empty.node_kind == "components":
        return ranking.circuit(3)
    kept = {name: torch.zeros_like(mask) for name, mask in ranking.empty.kept.items()}
    mlp = criterion.model.blocks[0].mlp
    for read, neuron in mlp.W_in.nonzero()[:4].tolist():
        kept["blocks.0.ln2.hook_read"][read] = True
        kept["blocks.0.mlp.hook_post"][neuron] = True
        written = mlp.W_out[neuron].nonzero().flatten()[:1]
        kept["blocks.0.hook_mlp_out"][written] = True
    scores = {name: mask.float() for name, mask in kept.items()}
    return dataclasses.replace(ranking.empty, kept=kept, scores=scores)


def scale_down(patch: pytest.MonkeyPatch) -> None:
    small = functools.partial(
        TrainConfig, model=TRAINED, data=TEXT, steps=3, batch_size=4, l0_fraction=0.25
    )
    patch.setattr("tl_sparse.TrainConfig", small)
    patch.setattr("tl_sparse.training.TrainConfig", small)

    def quick_settings(config):
        return config if isinstance(config, PruneConfig) else as_config(PRUNE | (config or {}))

    patch.setattr("tl_sparse.pruning.pruner.as_config", quick_settings)
    patch.setattr("tl_sparse.PruneConfig", functools.partial(PruneConfig, **PRUNE))
    patch.setattr("tl_sparse.pruning.pruner.discretise", some_nodes)

    def few_rows(*arguments):
        return tl_sparse.load_corpus(*arguments)[:8]

    patch.setattr("tl_sparse.pruning.means.load_corpus", few_rows)
    patch.setattr("tl_sparse.view.contents.load_corpus", few_rows)
    patch.setattr("tl_sparse.certificates.certifying.QUICK", QUICKER)
    two_subsets = functools.partial(subset_scores, n_subsets=2)
    patch.setattr("tl_sparse.suites.robustness.subset_scores", two_subsets)
    short = functools.partial(attack, n_test=2, n_families=1, seconds=0.5)
    patch.setattr("tl_sparse.attacks.attack", short)
    few = functools.partial(dense_effects, n_pairs=2, n_random=1)
    patch.setattr("tl_sparse.bridges.dense_effects", few)


@pytest.fixture(scope="session")
def of_a_reader(tmp_path_factory):
    """A folder with the circuit, the model and the files that the pages speak of."""
    folder = tmp_path_factory.mktemp("docs")
    with pytest.MonkeyPatch.context() as patch:
        scale_down(patch)
        patch.chdir(folder)
        model = tl_sparse.load("tiny-python-wide", device="cpu")
        circuit, _ = tl_sparse.prune(model, "single_double_quote", progress=False)
        circuit.save("my-circuit")
        tl_sparse.train(tl_sparse.TrainConfig(), "my-model", "cpu", progress=False)
        tiny_model(full_config()).save_pretrained("run@100")  # as if a run had kept this step
        torch.save({"circuit_data": {"0.attn.act_in": torch.tensor([3])}}, "viz_data.pt")
    return folder


@pytest.fixture
def reading(of_a_reader, tmp_path, monkeypatch):
    scale_down(monkeypatch)
    published(tmp_path / "published", monkeypatch)
    shutil.copytree(of_a_reader, tmp_path / "reader")
    monkeypatch.chdir(tmp_path / "reader")


def page_parameters():
    parameters = []
    for page in PAGES:
        if snippets_of(page, "python"):
            marks = [] if page.stem in ON_BOTH_LINES else [pytest.mark.any_line]
            if page.stem in SLOW:
                marks.append(pytest.mark.slow)
            parameters.append(pytest.param(page, id=page.stem, marks=marks))
    return parameters


@pytest.mark.parametrize("page", page_parameters())
def test_snippets_run(page, reading):
    namespace: dict = {}
    for snippet in snippets_of(page, "python"):
        run(snippet, namespace)


@pytest.mark.any_line
def test_a_snippet_that_fails_names_its_page_and_line(tmp_path):
    page = ROOT / "docs" / "broken.md"  # is not there: only its name is used
    snippet = Snippet(page, 7, "python", "a = 1\n\nb = a / 0")
    with pytest.raises(pytest.fail.Exception, match=r"docs/broken\.md:9: ZeroDivisionError"):
        run(snippet, {})


@pytest.mark.any_line
def test_commands_are_commands():
    n_commands = 0
    for page in PAGES:
        for snippet in snippets_of(page, "sh"):
            for line in snippet.code.replace("\\\n", " ").splitlines():
                # Variables of a job script stand for numbers and for parts of names.
                words = shlex.split(re.sub(r"\$\w+", "1", line), comments=True)
                if words[:1] == ["tl-sparse"] and words[1:] not in (["--help"], ["--version"]):
                    parsed = build_parser().parse_args(words[1:])
                    assert parsed.run.__name__ == f"_run_{words[1]}", snippet.place
                    n_commands += 1
    assert n_commands > 30


@pytest.mark.any_line
def test_the_first_circuit_is_five_lines():
    first = snippets_of(ROOT / "README.md", "python")[0]
    assert len([line for line in first.code.splitlines() if line.strip()]) <= 5


def public_names(door: Path) -> set[str]:
    names = set()
    for node in ast.parse(door.read_text(encoding="utf-8")).body:
        names |= {alias.name for alias in node.names}
    return names


DOORS = {folder.parent.name: folder for folder in (ROOT / "tl_sparse").glob("*/__init__.pyi")}
DOORS |= {"hooks": ROOT / "hooks" / "__init__.pyi"}


@pytest.mark.any_line
@pytest.mark.parametrize("room", sorted(DOORS.keys() - {"cli", "kernels"}))
def test_the_api_has_every_public_name(room):
    page = (DOCS / "api" / f"{room}.md").read_text()
    described = set(re.findall(r"^::: \S+\.(\w+)$", page, flags=re.MULTILINE))
    assert public_names(DOORS[room]) <= described


@pytest.mark.any_line
@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_links_lead_to_files(name):
    """Those within docs/ are checked by `make docs`."""
    text = (ROOT / name).read_text()
    links = re.findall(r"\]\(([^)#\s]+)|(?:src|srcset)=\"([^\"]+)\"", text)
    files = [one or other for one, other in links if not (one or other).startswith("http")]
    assert files
    missing = [file for file in files if not (ROOT / file).exists()]
    assert not missing


NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))


def code_cells(notebook: Path) -> list[dict]:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.any_line
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_have_outputs_and_are_small(notebook):
    cells = code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = [output["output_type"] for cell in cells for output in cell["outputs"]]
    assert "error" not in kinds
    assert len(kinds) >= len(cells) / 2
    assert notebook.stat().st_size < 100_000
    for number, cell in enumerate(cells, start=1):
        compile("".join(cell["source"]), f"{notebook.name}, cell {number}", "exec")


@pytest.mark.slow
@pytest.mark.any_line
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(notebook, tmp_path, monkeypatch):
    """As they are, not scaled down."""
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    for number, cell in enumerate(code_cells(notebook), start=1):
        code = compile("".join(cell["source"]), f"{notebook.name}, cell {number}", "exec")
        exec(code, namespace)


@pytest.mark.any_line
def test_the_map_and_the_picture_have_every_room():
    text = (DOCS / "architecture.md").read_text()
    missing = [room for room in DOORS if f"{room}/ " not in text]
    assert not missing
    picture = (DOCS / "images" / "rooms.svg").read_text()
    missing = [room for room in DOORS if f">{room}<" not in picture]
    assert not missing


@pytest.mark.any_line
def test_the_picture_of_the_rooms_is_that_of_the_code():
    spec = importlib.util.spec_from_file_location("pictures", DOCS / "pictures.py")
    pictures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pictures)
    drawn = pictures.rooms_svg(pictures.without_shortcuts(pictures.imports_of_rooms()))
    assert drawn == (DOCS / "images" / "rooms.svg").read_text(), "run `make pictures`"
