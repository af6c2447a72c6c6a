"""Configurations: what is refused, that JSON loses nothing, that they import fast."""

import dataclasses
import json
import math
import subprocess
import sys

import pytest
from hypothesis import given, settings

from helpers import full_config, sparse_configs, tiny_config
from tl_sparse.bridges.config import BridgeConfig
from tl_sparse.config import merged
from tl_sparse.data.config import DataConfig
from tl_sparse.errors import ConfigError, TLSparseError
from tl_sparse.network.config import PAPER_TOPK_LOCATIONS, SparseConfig, paper_topk
from tl_sparse.pruning.config import PruneConfig
from tl_sparse.training.config import TrainConfig, laptop_model
from tl_sparse.training.presets import PRESETS, preset

pytestmark = pytest.mark.any_line

SIZES = ("n_layers", "d_model", "n_heads", "d_head", "d_mlp", "d_vocab", "n_ctx")


@pytest.mark.parametrize("size", SIZES)
def test_impossible_sizes(size):
    for value, expected in (
        (0, "at least 1"),
        (-3, "at least 1"),
        (10**12, "at most"),
        (10**400, "at most"),
    ):
        with pytest.raises(
            ConfigError, match=f"^{size} = {value} is not possible; it must be {expected}"
        ):
            tiny_config(**{size: value})
    for value in (True, "4", 4.0, None, [4]):
        with pytest.raises(
            ConfigError, match=rf"^{size} = .* is not possible; it must be of type int"
        ):
            tiny_config(**{size: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(normalization="batch"), "normalization = 'batch' .* one of rms, layer"),
        (dict(act_fn="silu"), "act_fn = 'silu' .* one of gelu, relu"),
        (dict(act_fn=["gelu"]), r"act_fn = \['gelu'\] .* one of gelu, relu"),
        (dict(positions="rotary"), "positions = 'rotary' .* one of none, added, concatenated"),
        (dict(attn_sinks=1), "attn_sinks = 1 .* of type bool"),
        (dict(biases="false"), "biases = 'false' .* of type bool"),
        (dict(tied_unembed=None), "tied_unembed = None .* of type bool"),
        (dict(norm_bias=True), "norm_bias = True .* false with RMSNorm"),
        (dict(sinusoidal=True), "sinusoidal = True .* false without positions"),
        (dict(d_pos=4), "d_pos = 4 .* 0 without concatenated positions"),
        (dict(positions="added", d_pos=4), "d_pos = 4 .* 0 without concatenated positions"),
        (dict(positions="concatenated"), "d_pos = 0 .* at least 1 with concatenated positions"),
        (
            dict(positions="concatenated", d_pos=-1),
            "d_pos = -1 .* at least 1 with concatenated positions",
        ),
        (dict(positions="concatenated", d_pos=10**12), "d_pos = 1000000000000 .* at most"),
        (dict(positions="concatenated", d_pos=True), "d_pos = True .* of type int"),
        (dict(abs_topk=0.25), "abs_topk = 0.25 .* a mapping of location to fraction"),
        (
            dict(abs_topk={"attn": 0.25}),
            "abs_topk location = 'attn' .* one of resid_pre, attn_in, .*, resid_post_mlp",
        ),
        (
            dict(abs_topk={"attn_in": 0}),
            r"abs_topk\['attn_in'\] = 0 .* keeps at least one of the 6 entries",
        ),
        (
            dict(abs_topk={"attn_in": 0.16}),
            r"abs_topk\['attn_in'\] = 0.16 .* keeps at least one of the 6 entries",
        ),
        (dict(abs_topk={"attn_q": 1.5}), r"abs_topk\['attn_q'\] = 1.5 .* a fraction of at most 1"),
        (dict(abs_topk={"mlp_in": float("nan")}), r"abs_topk\['mlp_in'\] = nan .* a fraction"),
        (dict(abs_topk={"mlp_in": float("-inf")}), r"abs_topk\['mlp_in'\] = -inf .* a fraction"),
        (dict(abs_topk={"mlp_in": -1e308}), r"abs_topk\['mlp_in'\] = -1e\+308 .* a fraction"),
        (dict(abs_topk={"mlp_in": "0.5"}), r"abs_topk\['mlp_in'\] = '0.5' .* a fraction"),
        (dict(abs_topk={"mlp_in": True}), r"abs_topk\['mlp_in'\] = True .* a fraction"),
    ],
)
def test_impossible_features(changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny_config(**changes)


def test_a_configuration_error_is_a_value_error_of_this_package():
    assert issubclass(ConfigError, TLSparseError)
    assert issubclass(ConfigError, ValueError)


def test_unknown_and_missing_keys_name_the_valid_ones():
    values = tiny_config().to_dict()
    with pytest.raises(
        ConfigError, match="unknown configuration key 'n_layer'; did you mean 'n_layers'"
    ):
        SparseConfig.from_dict(values | {"n_layer": 2})
    with pytest.raises(
        ConfigError,
        match=r"unknown configuration key 'xyz'; valid keys are n_layers, .*tied_unembed",
    ):
        SparseConfig.from_dict(values | {"xyz": 2})
    del values["d_mlp"], values["n_ctx"]
    with pytest.raises(ConfigError, match="missing configuration keys: d_mlp, n_ctx"):
        SparseConfig.from_dict(values)


def test_how_many_entries_abs_topk_keeps():
    concatenated = dict(positions="concatenated", d_pos=4)
    config = tiny_config(
        abs_topk=dict.fromkeys(("attn_in", "attn_q", "mlp_neuron", "mlp_out"), 0.5), **concatenated
    )
    assert config.d_read == 10
    # Of 6 + 4 channels read, 3 heads of 5, 10 neurons and 6 channels of the stream; half, rounded
    # down.
    kept = {
        location: config.topk(location)
        for location in ("attn_in", "attn_q", "mlp_neuron", "mlp_out", "attn_v")
    }
    assert kept == {"attn_in": 5, "attn_q": 7, "mlp_neuron": 5, "mlp_out": 3, "attn_v": None}


def test_the_papers_locations():
    assert paper_topk(0.25) == dict.fromkeys(
        ("attn_in", "attn_q", "attn_k", "attn_v", "attn_out", "mlp_in", "mlp_neuron", "mlp_out"),
        0.25,
    )
    assert set(paper_topk(1)) == set(PAPER_TOPK_LOCATIONS)


@settings(max_examples=60)
@given(config=sparse_configs())
def test_json_loses_nothing(config):
    assert SparseConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_configuration_cannot_change_after_its_checks():
    fractions = {"attn_in": 0.5}
    config = tiny_config(abs_topk=fractions)
    fractions["attn_in"] = 7
    assert config.abs_topk == {"attn_in": 0.5}
    with pytest.raises(AttributeError):
        config.n_layers = 0


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (
            DataConfig,
            dict(source=""),
            "source = '' .* a folder, a glob pattern, a file, or .hf:. followed by a dataset",
        ),
        (DataConfig, dict(source=3), "source = 3 .* of type str"),
        (DataConfig, dict(stdlib_chars=-1), "stdlib_chars = -1 .* at least 0"),
        (
            DataConfig,
            dict(stdlib_chars=0, idiom_chars=0),
            "stdlib_chars = 0 .* above 0 when idiom_chars is 0",
        ),
        (DataConfig, dict(validation_fraction=1.0), r"validation_fraction = 1.0 .* in \(0, 1\)"),
        (TrainConfig, dict(steps=0), "steps = 0 .* at least 1"),
        (TrainConfig, dict(steps="100"), "steps = '100' .* of type int"),
        (TrainConfig, dict(lr=0), "lr = 0 .* above 0"),
        (TrainConfig, dict(lr=float("nan")), "lr = nan .* above 0"),
        (TrainConfig, dict(beta2=1.0), r"beta2 = 1.0 .* in \[0, 1\)"),
        (TrainConfig, dict(warmup_fraction=1), r"warmup_fraction = 1 .* in \[0, 1\)"),
        (TrainConfig, dict(l0_fraction=0), r"l0_fraction = 0 .* a fraction in \(0, 1\]"),
        (
            TrainConfig,
            dict(l0_fraction_embed=1.1),
            r"l0_fraction_embed = 1.1 .* a fraction in \[0, 1\]",
        ),
        (
            TrainConfig,
            dict(l0_groups=[0.5]),
            r"l0_groups = \[0.5\] .* a mapping of names to fractions",
        ),
        (TrainConfig, dict(l0_groups={"*.W_O": 2}), r"\*.W_O = 2 .* a fraction in \(0, 1\]"),
        (
            TrainConfig,
            dict(l0_fraction=0.01),
            "l0_fraction = 0.01 .* at least 0.03125, since .* 4 of the 128 .* lower min_nonzero",
        ),
        (
            TrainConfig,
            dict(l0_count=13183),
            "l0_count = 13183 .* 0, or from 13,184 to 421,888, all matrix weights",
        ),
        (
            TrainConfig,
            dict(l0_count=430000),
            "l0_count = 430000 .* 0, or from 13,184 to 421,888",
        ),
        (
            TrainConfig,
            dict(topk_anneal_start=0.2),
            r"topk_anneal_start = 0.2 .* in \[0, topk_anneal_stop\]",
        ),
        (
            TrainConfig,
            dict(topk_anneal_stop=0.2, compile=True),
            "compile = True .* false while the fractions of",
        ),
        (TrainConfig, dict(gradient="none"), "gradient = 'none' .* one of divide, clip"),
        (TrainConfig, dict(anneal_start=0.6), r"anneal_start = 0.6 .* in \[0, anneal_stop\]"),
        (TrainConfig, dict(anneal_stop=1.5), r"anneal_stop = 1.5 .* in \[anneal_start, 1\]"),
        (TrainConfig, dict(min_nonzero=-1), "min_nonzero = -1 .* at least 0"),
        (TrainConfig, dict(weight_decay=-0.1), "weight_decay = -0.1 .* at least 0"),
        (TrainConfig, dict(bigram_from_counts="yes"), "bigram_from_counts = 'yes' .* of type bool"),
        (PruneConfig, dict(target_loss=0), "target_loss = 0 .* above 0"),
        (PruneConfig, dict(steps=True), "steps = True .* of type int"),
        (PruneConfig, dict(temperature="1"), "temperature = '1' .* a number"),
        (PruneConfig, dict(init_scale=-1), "init_scale = -1 .* at least 0"),
        (PruneConfig, dict(init_bias=2), r"init_bias = 2 .* in \[-1, 1\]"),
        (PruneConfig, dict(selection_pairs=0), "selection_pairs = 0 .* at least 1"),
    ],
)
def test_impossible_settings(make, changes, message):
    with pytest.raises(ConfigError, match=message):
        make(**changes)


OF_ANY_TYPE = [None, True, "", "0", "x", b"x", 0.5, -1, 10**400, math.nan, [], [None], {}, {"x": 1}]


@pytest.mark.parametrize(
    "config",
    [tiny_config(), TrainConfig(), DataConfig(), PruneConfig(), BridgeConfig()],
    ids=lambda config: type(config).__name__,
)
def test_a_value_of_any_type_is_possible_or_refused(config):
    for field in dataclasses.fields(config):
        n_refused = 0
        for value in OF_ANY_TYPE:
            try:
                merged(config, {field.name: value})
            except ConfigError:
                n_refused += 1
        assert n_refused > 2, field.name


def test_defaults_are_possible():
    assert TrainConfig().model == laptop_model()
    assert DataConfig().source == "builtin"
    assert 0 < PruneConfig().target_loss < 1
    assert full_config().d_read == 10


# --- light to import


#: Prints, when a program ends, which heavy libraries it has imported.
HEAVY = """
import atexit, sys
heavy = "torch", "transformer_lens", "transformers", "datasets", "numpy"
atexit.register(lambda: print([name for name in heavy if name in sys.modules]))
"""


def printed_by(code):
    """The lines that `code` prints in a fresh interpreter, and then HEAVY."""
    command = [sys.executable, "-c", HEAVY + code]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_importing_the_package_loads_no_heavy_library():
    """How long it takes is measured by tests/benchmarks/test_start.py."""
    assert printed_by("import tl_sparse") == ["[]"]


def test_help_loads_no_heavy_library():
    *usage, heavy = printed_by("from tl_sparse.cli import main; main(['--help'])")
    assert heavy == "[]"
    assert usage[0].startswith("usage: tl-sparse")
    assert all(command in "\n".join(usage) for command in ("train", "prune", "demo"))


@pytest.mark.parametrize("command", [["train"], ["bridge", "gpt2"], ["prune", "m", "with_as"]])
def test_a_folder_with_other_files_is_refused_before_the_slow_work(command, tmp_path):
    (tmp_path / "other").touch()
    arguments = [*command, "--out", str(tmp_path)]
    *_, heavy = printed_by(f"from tl_sparse.cli import main; assert main({arguments}) == 1")
    assert heavy == "[]"


def test_repr_is_the_shortest_call():
    config = SparseConfig(1, 6, 3, 5, 10, 11, 8, act_fn="relu", abs_topk={"attn_in": 0.5})
    sizes = "n_layers=1, d_model=6, n_heads=3, d_head=5, d_mlp=10, d_vocab=11, n_ctx=8"
    assert repr(config) == f"SparseConfig({sizes}, act_fn='relu', abs_topk={{'attn_in': 0.5}})"
    training = TrainConfig(steps=5, model=config, min_nonzero=0)
    assert repr(training) == f"TrainConfig(model={config!r}, steps=5, min_nonzero=0)"
    assert repr(PruneConfig(target_loss=0.3)) == "PruneConfig(target_loss=0.3)"
    for one in (config, laptop_model(), TrainConfig(), PruneConfig(seed=3), DataConfig(source="x")):
        assert eval(repr(one)) == one
    assert "abs_topk=paper_topk(0.25)" in repr(laptop_model())


# --- presets, files, flags


def test_presets_are_possible_and_of_the_published_sizes():
    assert preset("laptop") == TrainConfig()
    assert PRESETS == ("laptop", "small", "paper-1x", "paper-2x", "paper-4x", "paper-8x")
    widths = {name: preset(name).model.d_model for name in PRESETS}
    assert [widths[f"paper-{x}x"] for x in (1, 2, 4, 8)] == [256, 512, 1024, 2048]
    published = preset("paper-4x")
    assert (published.l0_fraction, published.l0_fraction_embed, published.batch_size) == (
        1 / 64,
        1 / 16,
        512,
    )
    assert published.steps * 512 * 256 == pytest.approx(32e9, rel=1e-5)
    matrices = {
        x: preset(f"paper-{x}x").l0_fraction * preset(f"paper-{x}x").model.d_model ** 2
        for x in (1, 2, 4, 8)
    }
    assert len(set(matrices.values())) == 1  # as many nonzero weights at every width
    with pytest.raises(ConfigError, match=r"preset = 'laptoq' .* one of laptop, small, paper-1x"):
        preset("laptoq")


def test_merged_changes_what_is_named_and_no_more():
    changed = merged(TrainConfig(), {"lr": "1e-3", "model": {"d_mlp": 64}, "data": {"source": "x"}})
    expected = dataclasses.replace(
        TrainConfig(),
        lr=1e-3,
        model=dataclasses.replace(laptop_model(), d_mlp=64),
        data=DataConfig(source="x"),
    )
    assert changed == expected
    assert merged(TrainConfig(), {}) == TrainConfig()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rate": 1}, "unknown configuration key 'learning_rate'; "),
        ({"stepz": 1}, "unknown configuration key 'stepz'; did you mean 'steps'?"),
        ({"model": {"d_modle": 1}}, "unknown configuration key 'd_modle'; did you mean 'd_model'?"),
        ({"model": 3}, "model = 3 is not possible; it must be a mapping of fields to values"),
        ({"lr": "fast"}, "lr = 'fast' is not possible; it must be a number"),
        ({"max_jump": 0}, "max_jump = 0 .* above 0"),
        ({"keep_checkpoints": 0}, "keep_checkpoints = 0 .* at least 1"),
        ({"validate_steps": -1}, "validate_steps = -1 .* at least 0"),
    ],
)
def test_what_cannot_be_merged(values, message):
    with pytest.raises(ConfigError, match=message):
        merged(TrainConfig(), values)
