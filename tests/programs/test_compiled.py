"""Compiled circuits: the same logits as the model under the circuit, without the model."""

import copy
import dataclasses
import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

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
    without_checksums,
)
from micro import LOSS, VOCABULARY, micro_circuit, micro_data, micro_model
from tl_sparse import paper_topk
from tl_sparse.circuits.circuit import Circuit
from tl_sparse.circuits.families import node_hooks
from tl_sparse.circuits.fingerprints import fingerprint
from tl_sparse.circuits.nodes import EMBED_HOOK
from tl_sparse.errors import (
    ArgumentError,
    CheckpointError,
    CircuitError,
    ConfigError,
    DataError,
    UnsupportedError,
)
from tl_sparse.hooks import mean_activations
from tl_sparse.programs import CompiledCircuit
from tl_sparse.programs.stream import Read
from tl_sparse.programs.token_read import TokenRead


def under_circuit(circuit, model, tokens):
    with torch.no_grad(), circuit.applied(model):
        return model(tokens)


def assert_same_logits(circuit, model, seed=0):
    """All logits and those of some tokens, everywhere and at one position of each row."""
    tokens = random_tokens(model, 6, seed=seed)
    expected = under_circuit(circuit, model, tokens)
    generator = torch.Generator().manual_seed(seed)
    last = torch.randint(model.cfg.n_ctx, (len(tokens),), generator=generator)
    rows = torch.arange(len(tokens))
    for wanted in (None, [model.cfg.d_vocab - 1, 0]):
        compiled = circuit.compile(model, wanted)
        of_wanted = expected if wanted is None else expected[..., wanted]
        close = dict(rtol=0, atol=1e-9 * max(1.0, float(expected.abs().max())))
        torch.testing.assert_close(compiled(tokens), of_wanted, **close)
        at_last = compiled(tokens, last)
        torch.testing.assert_close(at_last, of_wanted[rows, last][:, None], **close)
        short = compiled(tokens[:, :2])
        torch.testing.assert_close(short, of_wanted[:, :2], **close)


many = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])


@many
@given(
    sparse_configs() | tabled_configs(),
    st.integers(0, 2**20),
    st.sampled_from([0.15, 0.5, 0.9]),
    st.booleans(),
)
def test_every_feature_is_exact(config, seed, share, is_cut):
    circuit, model = drawn_circuit(config, seed, share, is_cut)
    assert_same_logits(circuit, model, seed)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_nothing_kept_and_everything_kept(share):
    for config in (tiny_config(attn_sinks=True, bigram_table=True), full_config()):
        model = tiny_model(config, dtype=torch.float64)
        assert_same_logits(random_circuit(model, share), model)


def test_a_sink_takes_its_share_of_constant_values():
    """Values are held at their means, yet what attention writes depends on the pattern."""
    model = tiny_model(attn_sinks=True, dtype=torch.float64)
    circuit = random_circuit(model, 0.0)
    for name, mask in circuit.kept.items():
        if name.endswith(("hook_attn_out", "hook_q", "hook_k", "ln1.hook_read")):
            mask.fill_(True)
    tokens = random_tokens(model)
    logits = under_circuit(circuit, model, tokens)
    swapped = tokens.clone()
    swapped[:, 0] = (tokens[:, 0] + 1) % model.cfg.d_vocab
    assert not torch.allclose(logits[:, -1], under_circuit(circuit, model, swapped)[:, -1])
    assert_same_logits(circuit, model)


def test_nodes_of_the_embedding():
    model = tiny_model(full_config(), dtype=torch.float64)
    names = [EMBED_HOOK, *node_hooks(model).values()]
    means = mean_activations(model, names, [random_tokens(model)])
    generator = torch.Generator().manual_seed(0)
    kept = {name: torch.rand(mean.shape, generator=generator) < 0.6 for name, mean in means.items()}
    assert_same_logits(Circuit(kept, means, fingerprint(model)), model)


def test_locations_without_nodes_run():
    model = tiny_model(abs_topk=paper_topk(0.5), dtype=torch.float64)
    circuit = random_circuit(model, 0.4)
    names = [name for name in circuit.kept if "mlp" in name]
    kept = {name: circuit.kept[name] for name in names}
    means = {name: circuit.means[name] for name in names}
    assert_same_logits(Circuit(kept, means, fingerprint(model)), model)


@pytest.mark.parametrize("positions", ["added", "concatenated"])
def test_sinusoids_with_equal_magnitudes_at_the_first_position(positions):
    model = tiny_model(
        tiny_config(
            positions=positions,
            d_pos=6 if positions == "concatenated" else 0,
            sinusoidal=True,
            abs_topk={"attn_in": 0.4, "mlp_in": 0.4},
        ),
        dtype=torch.float64,
    )
    with torch.no_grad():
        for block in model.blocks:
            for norm in (block.ln1, block.ln2):
                for name, weight in norm.named_parameters():
                    weight.fill_(0.0 if name.startswith("b") else 1.0)
    assert_same_logits(random_circuit(model, 0.7), model)


def test_the_micro_circuit_is_a_few_numbers():
    model = micro_model()
    answers = [VOCABULARY["yes"], VOCABULARY["no"]]
    compiled = micro_circuit(model).compile(model, answers)
    data = micro_data(model)
    logits = compiled(data.tokens, data.last)[:, 0]
    loss = torch.nn.functional.cross_entropy(logits, data.correct)
    assert loss.item() == pytest.approx(LOSS, abs=1e-5)
    # The circuit writes to one channel, which alone is computed beside the tables by token.
    assert compiled.start.shape == (len(VOCABULARY), 1)
    assert compiled.blocks[0].mlp is None
    assert compiled.n_bytes < sum(p.nbytes for p in model.parameters())


def test_what_depends_on_one_token_or_on_the_position_is_a_table():
    """Before the first kept write, reads are tables; so are heads without kept q, k and v."""
    config = full_config(
        normalization="rms",
        norm_bias=False,
        resid_relu=False,
        abs_topk=paper_topk(0.4),
    )
    model = tiny_model(config, dtype=torch.float64)
    circuit = random_circuit(model, 0.0)
    for name, indices in {
        "blocks.0.ln1.hook_read": [0, 3, 7],
        "blocks.0.attn.hook_q": [5],
        "blocks.0.attn.hook_v": [6],
        "blocks.0.hook_attn_out": [2, 4],
        "blocks.1.ln2.hook_read": [2, 5, 9],
        "blocks.1.mlp.hook_post": [1, 2, 3],
        "blocks.1.hook_mlp_out": [0],
    }.items():
        circuit.kept[name].view(-1)[indices] = True
    compiled = circuit.compile(model, [0, 1])
    attention = compiled.blocks[0].attention
    assert isinstance(attention.heads.read, TokenRead)
    assert len(attention.heads.sink) == 1  # of three heads, the one with kept channels
    assert attention.out.bias.shape[0] == model.cfg.n_ctx
    assert isinstance(compiled.blocks[1].mlp.read, Read)
    assert compiled.start.shape == (model.cfg.d_vocab, 3)
    assert_same_logits(circuit, model)


def test_it_runs_without_the_model():
    model = tiny_model(full_config(), dtype=torch.float64)
    circuit = random_circuit(model)
    compiled = circuit.compile(model)
    tokens = random_tokens(model)
    expected = under_circuit(circuit, model, tokens)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(compiled(tokens), expected)
    torch.testing.assert_close(copy.deepcopy(compiled)(tokens.numpy()), expected)
    assert not list(compiled.parameters())


def test_dtypes():
    model = tiny_model(abs_topk=paper_topk(0.5))
    circuit = random_circuit(model)
    tokens = random_tokens(model)
    logits = circuit.compile(model)(tokens)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, under_circuit(circuit, model, tokens), rtol=1e-4, atol=1e-4)
    precise = circuit.compile(model, dtype=torch.float64)(tokens)
    torch.testing.assert_close(logits.double(), precise, rtol=1e-4, atol=1e-4)
    model.network.to(torch.bfloat16)
    assert circuit.compile(model)(tokens).dtype == torch.float32
    with pytest.raises(ConfigError, match=r"dtype.*torch.float32 or torch.float64"):
        circuit.compile(model, dtype=torch.bfloat16)


# Files


@pytest.mark.parametrize("wanted", [None, [3, 1]])
def test_saving_and_loading(tmp_path, wanted):
    for i, config in enumerate((tiny_config(attn_sinks=True), full_config())):
        model = tiny_model(config, dtype=torch.float64)
        compiled = random_circuit(model).compile(model, wanted)
        compiled.save(tmp_path / str(i))
        loaded = CompiledCircuit.load(tmp_path / str(i))
        tokens = random_tokens(model)
        assert torch.equal(loaded(tokens), compiled(tokens))
        assert repr(loaded) == repr(compiled)
        assert loaded.n_parameters == compiled.n_parameters
        compiled.save(tmp_path / str(i))  # the same again
    names = {path.name for path in (tmp_path / "0").iterdir()}
    assert names == {"program.json", "program.safetensors"}


def test_saving_over_another(tmp_path):
    model = tiny_model(dtype=torch.float64)
    random_circuit(model).compile(model).save(tmp_path)
    other = random_circuit(model, seed=1).compile(model)
    with pytest.raises(ConfigError, match="holds another program"):
        other.save(tmp_path)
    other.save(tmp_path, overwrite=True)
    tokens = random_tokens(model)
    assert torch.equal(CompiledCircuit.load(tmp_path)(tokens), other(tokens))


def test_damaged_files(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no compiled circuit.*program\.json"):
        CompiledCircuit.load(tmp_path)
    model = tiny_model()
    random_circuit(model).compile(model).save(tmp_path)
    without_checksums(tmp_path)
    path = tmp_path / "program.json"
    values = json.loads(path.read_text())
    tensors = load_file(tmp_path / "program.safetensors")

    def loads_with(**changes):
        save_file(tensors, tmp_path / "program.safetensors")
        path.write_text(json.dumps(values | changes))
        CompiledCircuit.load(tmp_path)

    loads_with()
    for change, message in [
        ({"format": "tl_sparse circuit"}, "not a compiled circuit"),
        ({"format_version": 2}, "reads format_version 1"),
        ({"program": {}}, "malformed entry: 'arguments'"),
        ({"program": {"part": "Linear", "arguments": {}}}, "malformed entry: 'Linear'"),
        ({"program": values["program"]["arguments"]["logits"]}, "malformed entry"),
        ({"program": "no"}, "malformed entry"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            loads_with(**change)
    scale = {"part": "NormScale", "arguments": {"d_model": 6, "eps": 0.1, "centered": False}}
    with pytest.raises(CheckpointError, match="a part of a compiled circuit"):
        loads_with(program=scale)
    del tensors["start"]
    with pytest.raises(CheckpointError, match="start"):
        loads_with()


# What is refused


def test_wrong_tokens():
    model = tiny_model()
    compiled = random_circuit(model).compile(model)
    with pytest.raises(DataError, match=r"token ids must be in \[0, 11\)"):
        compiled([[0, 11]])
    with pytest.raises(DataError, match=r"token ids must be in \[0, 11\)"):
        compiled([[-1, 1]])
    with pytest.raises(DataError, match="9 tokens does not fit the model's context of n_ctx = 8"):
        compiled([[1] * 9])
    with pytest.raises(DataError, match="must be integers"):
        compiled([[0.5]])
    for last in ([2], [0, 0], [[0]]):
        with pytest.raises(DataError, match=r"one position in \[0, 2\) for each of the 1 rows"):
            compiled([[0, 1]], last)


def test_wrong_wanted_tokens():
    model = tiny_model()
    circuit = random_circuit(model)
    with pytest.raises(DataError, match="a list of at least one token id"):
        circuit.compile(model, [])
    with pytest.raises(DataError, match="a list of at least one token id"):
        circuit.compile(model, [[1]])
    with pytest.raises(DataError, match=r"must be in \[0, 11\)"):
        circuit.compile(model, [11])
    with pytest.raises(DataError, match=r"a list of at least one token id.*\[0\.5\]"):
        circuit.compile(model, [0.5])


def test_models_and_circuits_that_cannot_be_compiled():
    model = tiny_model()
    circuit = random_circuit(model)
    with pytest.raises(UnsupportedError, match="only circuits in models of tl_sparse"):
        circuit.compile(stock_model())
    with pytest.raises(CircuitError, match="belongs to the model"):
        circuit.compile(tiny_model(seed=1))
    with pytest.raises(CircuitError, match="no means"):
        dataclasses.replace(circuit, means={}).compile(model)
    with pytest.raises(UnsupportedError, match="norm scales of the full model"):
        dataclasses.replace(circuit, frozen_norms=True).compile(model)
    with pytest.raises(ArgumentError, match=r"circuit\.compile: model must be"):
        circuit.compile("model")
    without_z = {name: circuit.means[name] for name in circuit.kept}
    cut = dataclasses.replace(circuit, means=without_z, edge_set=frozenset())
    with pytest.raises(CircuitError, match=r"needs the mean at blocks\.0\.attn\.hook_z"):
        cut.compile(model)
