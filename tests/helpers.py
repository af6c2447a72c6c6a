"""Small models, configurations, circuits and tokenizers, and other things that many tests need."""

import dataclasses
import functools
import json
import multiprocessing
import os
import random
import subprocess
import sys
import tracemalloc
import warnings
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hypothesis import assume
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tl_sparse import checksums
from tl_sparse.checkpoints.loading import create
from tl_sparse.circuits.circuit import Circuit
from tl_sparse.circuits.families import node_hooks
from tl_sparse.circuits.fingerprints import fingerprint
from tl_sparse.faces.line import transformer_lens_line
from tl_sparse.hooks import mean_activations
from tl_sparse.network.config import TOPK_LOCATIONS, SparseConfig
from tl_sparse.tasks.task_data import TaskData

#: The installed line of TransformerLens, 3 or 4.
LINE = transformer_lens_line()
ON_3 = LINE == 3
GOLDEN = Path(__file__).parent / "golden"

needs_numba = pytest.mark.skipif(find_spec("numba") is None, reason="numba is not installed")


def only_on(line, reason):
    """The mark of tests for one line of TransformerLens, 3 or 4."""
    return pytest.mark.skipif(line != LINE, reason=reason)


@contextmanager
def taking_less_than(n_bytes):
    """A context in which Python objects must never take so much memory at once."""
    tracemalloc.start()
    try:
        yield
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < n_bytes


def must_not_run(what):
    """A stand-in for a function that the test expects not to be called; `what` is what it does."""

    def stub(*args, **kwargs):
        pytest.fail(f"this must not happen: {what}")

    return stub


def script_environment():
    """The environment in which a test file can be run as a script: it finds these helpers."""
    folders = [str(Path(__file__).parent)]
    if "PYTHONPATH" in os.environ:
        folders.append(os.environ["PYTHONPATH"])
    return os.environ | {"PYTHONPATH": os.pathsep.join(folders)}


def run_as_script(path, *arguments, seconds):
    """Run a test file in a process of its own, which must succeed; what it writes is returned."""
    done = subprocess.run(
        [sys.executable, path, *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=seconds,
        env=script_environment(),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@functools.cache
def fork_server():
    """Starts processes at once, as forks of one that has imported what takes seconds.

    It is a context of `multiprocessing`; the processes use one thread for torch.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preload"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        # Before Python 3.13 the server does not get our `sys.path`, and then imports nothing.
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        first = context.Process(target=int)  # the server starts, in this environment, with it
        first.start()
        first.join()
    return context


def tiny_config(**changes):
    """One layer, no optional feature; no two sizes are equal, so that no shape fits by accident."""
    sizes = dict(n_layers=1, d_model=6, n_heads=3, d_head=5, d_mlp=10, d_vocab=11, n_ctx=8)
    return SparseConfig(**(sizes | changes))


def quick_config(**changes):
    """A network with a vocabulary for real text, of which training takes milliseconds a step."""
    sizes = dict(n_layers=1, d_model=16, n_heads=2, d_head=4, d_mlp=32, d_vocab=384, n_ctx=32)
    return SparseConfig(**(sizes | {"bigram_table": True} | changes))


def full_config(**changes):
    """Two layers with every feature that fits beside the others."""
    features = dict(
        n_layers=2,
        normalization="layer",
        norm_bias=True,
        positions="concatenated",
        d_pos=4,
        attn_sinks=True,
        act_fn="relu",
        resid_relu=True,
        abs_topk=dict.fromkeys(TOPK_LOCATIONS, 0.7),
        bigram_table=True,
        logits_bias=True,
    )
    return tiny_config(**(features | changes))


def tiny_model(config=None, seed=0, dtype=None, tokenizer=None, **changes):
    """A model in which every learned parameter matters: norms, biases and sinks are random too."""
    if config is None:
        config = tiny_config(**changes)
    model = create(config, seed, tokenizer, device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.7)
    model.network.to(dtype)
    return model


def without_checksums(folder):
    """Take the checksums out of a saved model or circuit, as if an older version had written it."""
    for path in folder.glob("*.json"):
        values = json.loads(path.read_text())
        values.pop(checksums.ENTRY, None)
        values.pop(checksums.FILES, None)
        path.write_text(json.dumps(values))
    for path in folder.glob("*.safetensors"):
        save_file(load_file(path), path)
    return folder


def stock_model(**changes):
    """A small dense model of TransformerLens' own, on either line."""
    sizes = dict(n_layers=1, d_model=8, n_heads=2, d_head=4, d_mlp=12, d_vocab=24, n_ctx=10)
    options = dict(act_fn="gelu", normalization_type="LN", seed=0, device="cpu")
    config = sizes | options | changes
    if ON_3:
        from transformer_lens import HookedTransformer, HookedTransformerConfig

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return HookedTransformer(HookedTransformerConfig(**config))
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_native(config)


def random_tokens(model_or_config, batch=2, length=None, seed=0):
    """Tokens [batch, length]; the whole context if no length is given."""
    cfg = getattr(model_or_config, "cfg", model_or_config)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(cfg.d_vocab, (batch, length or cfg.n_ctx), generator=generator)


def node_means(model, *batches):
    """Hook name → mean, of every hook point whose entries can be nodes of a circuit."""
    return mean_activations(model, list(node_hooks(model).values()), batches)


def circuit_means(model, *batches):
    """The same, and the means of z that cutting edges needs in a model of tl_sparse."""
    z_hooks = [f"blocks.{layer}.attn.hook_z" for layer in range(model.cfg.n_layers)]
    return mean_activations(model, [*node_hooks(model).values(), *z_hooks], batches)


def random_masks(means, share, generator):
    """Hook name → which nodes are kept: each with the probability `share`."""
    masks = {}
    for name, mean in means.items():
        if not name.endswith(".hook_z"):  # z is no node location
            masks[name] = torch.rand(mean.shape, generator=generator) < share
    return masks


def random_data(model, n_pairs=6, seed=0, lengths=None):
    """Random prompts of different lengths, padded with random tokens, and random candidates."""
    n_prompts = 2 * n_pairs
    cfg = model.cfg
    generator = torch.Generator().manual_seed(seed)
    last = lengths
    if last is None:
        last = torch.randint(1, cfg.n_ctx, (n_prompts,), generator=generator)
    candidates = [torch.randperm(cfg.d_vocab, generator=generator)[:2] for _ in range(n_pairs)]
    return TaskData(
        task="t",
        prompts=tuple(map(str, range(n_prompts))),
        tokens=random_tokens(model, n_prompts, cfg.n_ctx, seed),
        last=last,
        candidates=torch.stack(candidates).repeat_interleave(2, 0),
        correct=torch.arange(2).repeat(n_pairs),
    )


def random_circuit(model, share=0.5, seed=0):
    """A circuit of random nodes, with random scores."""
    means = circuit_means(model, random_tokens(model, seed=5))
    generator = torch.Generator().manual_seed(seed)
    kept = random_masks(means, share, generator)
    scores = {name: torch.rand(mask.shape, generator=generator) for name, mask in kept.items()}
    return Circuit(kept, means, fingerprint(model), "m", "t", scores=scores)


def drawn_circuit(config, seed, share, is_cut):
    """A random circuit in a random model in float64, and the model; perhaps with cut edges."""
    model = tiny_model(config, seed=seed, dtype=torch.float64)
    assume(not cancels(model, random_tokens(model, 6, seed=seed)))
    circuit = random_circuit(model, share, seed)
    if is_cut:
        circuit = with_random_cuts(circuit, model, 0.6, seed)
    return circuit, model


def with_random_cuts(circuit, model, share, seed):
    """The circuit with a random part of its edges."""
    rng = random.Random(seed)
    left = [edge.ends for edge in circuit.edges(model) if rng.random() < share]
    return dataclasses.replace(circuit, edge_set=frozenset(left))


def has_hooks(model):
    """Whether any function is attached to a hook point."""
    return any(point.has_hooks() for point in model.hook_dict.values())


def copied_parameters(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def cancels(model, tokens):
    """Whether the residual stream is mere rounding noise somewhere, which norms make large."""
    _, cache = model.run_with_cache(tokens, names_filter=lambda name: "resid" in name)
    largest = torch.stack([resid.abs().amax(-1) for resid in cache.values()])
    return bool(((largest > 0) & (largest < 1e-9)).any())


@st.composite
def sparse_configs(draw):
    """Random `SparseConfig`s that together have every feature, in every combination."""
    normalization = draw(st.sampled_from(["rms", "layer"]))
    positions = draw(st.sampled_from(["none", "added", "concatenated"]))
    config = SparseConfig(
        n_layers=draw(st.integers(1, 2)),
        d_model=draw(st.integers(3, 7)),
        n_heads=draw(st.integers(1, 3)),
        d_head=draw(st.integers(1, 4)),
        d_mlp=draw(st.integers(1, 9)),
        d_vocab=draw(st.integers(2, 9)),
        n_ctx=draw(st.integers(4, 6)),
        normalization=normalization,
        norm_bias=draw(st.booleans()) if normalization == "layer" else False,
        act_fn=draw(st.sampled_from(["gelu", "relu"])),
        resid_relu=draw(st.booleans()),
        attn_sinks=draw(st.booleans()),
        bigram_table=draw(st.booleans()),
        logits_bias=draw(st.booleans()),
        positions=positions,
        d_pos=draw(st.integers(1, 4)) if positions == "concatenated" else 0,
        sinusoidal=draw(st.booleans()) if positions != "none" else False,
        biases=draw(st.booleans()),
        tied_unembed=draw(st.booleans()),
    )
    topk = {}
    for location in draw(st.sets(st.sampled_from(TOPK_LOCATIONS))):
        size = config.location_size(location)
        # Halfway between two values of k, where no rounding can change it.
        topk[location] = min(1.0, (draw(st.integers(1, size)) + 0.5) / size)
    return SparseConfig.from_dict(config.to_dict() | {"abs_topk": topk})


@st.composite
def tabled_configs(draw):
    """Random configurations in which channels without kept writes become tables by token."""
    config = draw(sparse_configs()).to_dict()
    topk = {name: share for name, share in config["abs_topk"].items() if name[:5] != "resid"}
    concatenated = draw(st.booleans())
    config |= {
        "normalization": "rms",
        "norm_bias": False,
        "abs_topk": topk,
        "positions": "concatenated" if concatenated else "none",
        "d_pos": draw(st.integers(1, 4)) if concatenated else 0,
        "sinusoidal": False,
    }
    for name in ("attn_in", "mlp_in"):  # whose sizes may have changed
        size = config["d_model"] + config["d_pos"]
        topk[name] = min(1.0, (draw(st.integers(1, size)) + 0.5) / size)
    return SparseConfig.from_dict(config)


def word_tokenizer(words, **special):
    """A tokenizer of the given words, in the order of their ids; the first is the unknown one."""
    vocabulary = {word: i for i, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=words[0]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token=words[0], **special)


def command_flags(settings):
    """Settings as the flags of a command: {"l0_fraction": 0.5} → ["--l0-fraction", "0.5"]."""
    flags = []
    for name, value in settings.items():
        flags += ["--" + name.replace("_", "-"), str(value)]
    return flags
