"""Circuits as Python source: NumPy alone computes the logits of the compiled circuit."""

import dataclasses
import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers import (
    drawn_circuit,
    full_config,
    random_circuit,
    random_tokens,
    sparse_configs,
    stock_model,
    tabled_configs,
    tiny_config,
    tiny_model,
    word_tokenizer,
)
from micro import (
    MICRO_TASK,
    VOCABULARY,
    W_O,
    W_U,
    large,
    micro_circuit,
    micro_data,
    micro_model,
)
from tl_sparse import paper_topk
from tl_sparse.errors import CircuitError, ConfigError, DataError, UnsupportedError
from tl_sparse.programs.python_notes import PromptNotes, prompt_notes
from tl_sparse.tasks.pairs import TaskPairs
from tl_sparse.tasks.task import Task
from tl_sparse.tasks.task_data import draw_pairs, make_task_data

ANSWERS = [VOCABULARY["yes"], VOCABULARY["no"]]


def imported(program, folder=None):
    """The module that a program is saved as."""
    folder = Path(folder or tempfile.mkdtemp())
    program.save(folder)
    spec = importlib.util.spec_from_file_location("circuit", folder / "circuit.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_same_as_compiled(circuit, model, wanted, seed=0):
    with tempfile.TemporaryDirectory() as folder:
        module = imported(circuit.to_python(model, wanted), folder)
    tokens = random_tokens(model, 4, seed=seed)
    expected = circuit.compile(model, wanted, torch.float64)(tokens).numpy()
    close = dict(rtol=0, atol=1e-9 * max(1.0, abs(expected).max()))
    for row, logits in zip(tokens.tolist(), expected, strict=True):
        np.testing.assert_allclose(module.logits(row), logits, **close)
        np.testing.assert_allclose(module.logits(row[:2]), logits[:2], **close)


@pytest.mark.any_line
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(
    sparse_configs() | tabled_configs(),
    st.integers(0, 2**20),
    st.sampled_from([0.15, 0.5, 0.9]),
    st.booleans(),
)
def test_every_feature_is_exact(config, seed, share, is_cut):
    circuit, model = drawn_circuit(config, seed, share, is_cut)
    for wanted in (None, [model.cfg.d_vocab - 1, 0]):
        assert_same_as_compiled(circuit, model, wanted, seed)


def test_wide_sums_are_tables():
    """More sources, channels and logits than are written out one by one."""
    config = tiny_config(d_model=32, d_mlp=40, abs_topk=paper_topk(0.5), bigram_table=True)
    model = tiny_model(config, dtype=torch.float64)
    circuit = random_circuit(model, 1.0)
    for wanted in (None, [1, 2], list(range(6))):
        assert_same_as_compiled(circuit, model, wanted)


def test_the_micro_circuit_reads_as_what_it_is():
    """Its statements are those of the formula in tests/micro.py."""
    model = micro_model()
    circuit = micro_circuit(model).with_labels({"0.attn_in 0": "A or B"})
    program = circuit.to_python(model, ANSWERS, {"0.attn_out 2": "was_a"})
    statements = {}
    lines = program.source.splitlines()
    for line in lines:
        target, is_assignment, value = line.strip().partition(" = ")
        if is_assignment:
            statements[target] = value
    assert statements["attn_in_0_0"] == "lookup(ATTN_IN_0_0, tokens, 0.0)  # → attn_v_0_h0_0"
    assert lines[lines.index("ATTN_IN_0_0 = {") + 1].endswith(",  # 'A'")
    assert statements["attn_v_0_h0_0"] == "1.5 * attn_in_0_0  # → z_of_attn_v_0_h0_0"
    assert statements["pattern_0_h0"] == "attention_pattern(np.full((n, n), 0.0))"
    assert statements["was_a"] == f"{W_O} * z_of_attn_v_0_h0_0  # → resid[2]"
    assert "    # A or B" in lines
    assert "    resid[2] += was_a" in lines
    assert f"({W_U} * resid[2]" in statements[f"logit_{ANSWERS[0]}"]
    assert f"(-{W_U} * resid[2]" in statements[f"logit_{ANSWERS[1]}"]
    assert program.names == {
        "0.attn_in 0": "attn_in_0_0",
        "0.attn_v h0.0": "attn_v_0_h0_0",
        "0.attn_out 2": "was_a",
    }
    assert str(program) == program.source
    assert max(len(line) for line in lines) <= 100


def test_it_runs_without_torch(tmp_path):
    model = micro_model()
    data = micro_data(model)
    circuit = micro_circuit(model)
    circuit.to_python(model, ANSWERS).save(tmp_path / "program")
    tokens = data.tokens[0].tolist()
    expected = circuit.compile(model, ANSWERS, torch.float64)(data.tokens[:1])[0]
    script = (
        "import sys; sys.modules['torch'] = None; sys.path.insert(0, sys.argv[1]); import circuit; "
        f"print(*circuit.logits({tokens})[-1].tolist())"
    )
    command = [sys.executable, "-I", "-c", script, str(tmp_path / "program")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    logits = [float(word) for word in printed.split()]
    assert logits == pytest.approx(expected[-1].tolist(), abs=1e-12)


def test_saving(tmp_path):
    model = tiny_model(dtype=torch.float64)
    program = random_circuit(model).to_python(model)
    program.save(tmp_path)
    program.save(tmp_path)  # the same again
    assert {path.name for path in tmp_path.iterdir()} == {"circuit.py", "circuit.npz"}
    other = random_circuit(model, seed=1).to_python(model)
    with pytest.raises(ConfigError, match="holds another Python program"):
        other.save(tmp_path)
    other.save(tmp_path, overwrite=True)
    assert (tmp_path / "circuit.py").read_text(encoding="utf-8") == other.source


def test_wrong_tokens():
    model = tiny_model()
    module = imported(random_circuit(model).to_python(model))
    for tokens, message in [
        ([0, 11], r"tokens must be in \[0, 11\)"),
        ([-1], r"tokens must be in \[0, 11\)"),
        ([1] * 9, "9 tokens do not fit the context of 8"),
        ([], "one sequence of at least one token id"),
        (
            [[1, 2], [3, 4]],
            r"one sequence of at least one token id, not an array of shape \[2, 2\]",
        ),
        ([0.5], "one sequence of at least one token id"),
    ]:
        with pytest.raises(ValueError, match=message):
            module.logits(tokens)


def test_a_batch_of_one_sequence_is_that_sequence():
    """`model.to_tokens` returns one."""
    model = tiny_model()
    module = imported(random_circuit(model).to_python(model))
    assert (module.logits([[1, 2, 3]]) == module.logits([1, 2, 3])).all()


@pytest.mark.parametrize(
    "name", ["two words", "1st", "class", "tokens", "gelu", "logit_3", "Upper", "", "naïve"]
)
def test_names_that_are_no_variables(name):
    model = micro_model()
    with pytest.raises(ConfigError, match=r"'0\.attn_out 2' cannot be called .*identifier"):
        micro_circuit(model).to_python(model, names={"0.attn_out 2": name})


def test_names_of_wrong_nodes():
    model = micro_model()
    circuit = micro_circuit(model)
    names = {"0.attn_out 2": "same", "0.attn_in 0": "same"}
    with pytest.raises(ConfigError, match=r"'0\.attn_in 0' and '0\.attn_out 2' cannot both"):
        circuit.to_python(model, names=names)
    with pytest.raises(ConfigError, match="cannot both be called 'attn_in_0_0'"):
        circuit.to_python(model, names={"0.attn_out 2": "attn_in_0_0"})
    with pytest.raises(CircuitError, match=r"'0\.attn_out 1' .* is not in the circuit"):
        circuit.to_python(model, names={"0.attn_out 1": "nothing"})
    with pytest.raises(CircuitError, match="is not a node"):
        circuit.to_python(model, names={"attention": "nothing"})


def test_what_cannot_be_compiled_is_refused():
    model = micro_model()
    circuit = micro_circuit(model)
    with pytest.raises(CircuitError, match="belongs to the model"):
        circuit.to_python(tiny_model(full_config()))
    with pytest.raises(CircuitError, match="has no means"):
        dataclasses.replace(circuit, means={}).to_python(model)
    with pytest.raises(UnsupportedError, match="only circuits in models of tl_sparse"):
        circuit.to_python(stock_model())
    with pytest.raises(DataError, match="tokens must be in"):
        circuit.to_python(model, [len(VOCABULARY)])


def test_no_line_is_too_long():
    model = tiny_model(tiny_config(d_model=32, d_mlp=40, abs_topk=paper_topk(0.5)))
    program = random_circuit(model, 0.5).to_python(model)
    assert max(len(line) for line in program.source.splitlines()) <= 100


@pytest.fixture
def large_with_pairs():
    circuit, model = large(1, 16, 0.6)
    model.network.double()
    pairs = tuple(draw_pairs(MICRO_TASK, 24, 0))
    split = TaskPairs("micro", "", pairs[:2], pairs[2:4], pairs[4:])
    return dataclasses.replace(circuit, pairs=split), model


def zeros_in_model(circuit, model, hook):
    """The shares of the positions in prompts at which an activation under the circuit is 0."""
    data = make_task_data(Task.from_pairs(circuit.pairs), model.tokenizer, 20, seed=0)
    with torch.no_grad(), circuit.applied(model):
        _, cache = model.run_with_cache(data.tokens, names_filter=hook)
    is_prompt = torch.arange(data.tokens.shape[1]) <= data.last[:, None]
    return (cache[hook][is_prompt] == 0).double().mean(0).flatten()


def test_notes_on_prompts(large_with_pairs):
    """In which tokens prompts differ, and how often AbsTopK makes a node 0, as in the model."""
    circuit, model = large_with_pairs
    compiled = circuit.compile(model, ANSWERS, torch.float64)
    notes = prompt_notes(circuit, model, compiled)
    assert set(notes.telling_tokens) == {VOCABULARY["A"], VOCABULARY["B"]}

    shares = zeros_in_model(circuit, model, "blocks.0.attn.hook_k")
    keys = compiled.blocks[0].attention.heads.key.channels.nodes
    assert keys
    for node in keys:
        expected = shares[circuit.node(node).index].item()
        assert notes.zeros[node] == pytest.approx(expected, abs=1e-12)

    source = circuit.to_python(model, ANSWERS).source
    text = source.replace("\n    # ", " ")  # comments of several lines as one
    percent = ", ".join(f"{notes.zeros[node]:.0%}" for node in keys)
    assert f"In prompts, this is 0 at {percent} of the positions." in text
    assert "prompts differ in 'A' " in text or "prompts differ in 'B' " in text


def test_there_are_no_notes_without_prompts():
    model = tiny_model(abs_topk=paper_topk(0.5))
    circuit = random_circuit(model)
    notes = prompt_notes(circuit, model, circuit.compile(model))
    assert notes == PromptNotes()
    assert "In prompts" not in circuit.to_python(model).source


def test_texts_cannot_become_code(tmp_path):
    """Names of tasks, labels and tokens come from files of others, and the source is run."""
    attack = '"""\nraise SystemExit\n"""\r\nraise SystemExit'
    vocabulary = [f"w{i}" for i in range(9)] + ['"""', "'''"]
    tokenizer = word_tokenizer(vocabulary, bos_token="w0", eos_token="w0", pad_token="w0")
    model = tiny_model(tokenizer=tokenizer, dtype=torch.float64)
    circuit = random_circuit(model)
    labels = dict.fromkeys(circuit.node_names, attack)
    circuit = dataclasses.replace(circuit, task=attack, model_name=attack).with_labels(labels)
    program = circuit.to_python(model, [9, 10])
    module = imported(program, tmp_path)
    expected = circuit.compile(model, [9, 10], torch.float64)(torch.tensor([[1, 9, 10]]))
    np.testing.assert_allclose(module.logits([1, 9, 10]), expected[0].numpy(), rtol=0, atol=1e-9)
    assert "    raise SystemExit" not in program.source.splitlines()
