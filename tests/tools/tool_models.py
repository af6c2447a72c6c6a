"""What the tests of other people's tools share: small models and small helpers."""

from importlib.util import find_spec

import pytest
import torch

from helpers import LINE, random_tokens, tiny_config, tiny_model, word_tokenizer
from tl_sparse.network.config import TOPK_LOCATIONS

#: The paper's eight locations: all but the stream itself.
ADDITIVE_LOCATIONS = [name for name in TOPK_LOCATIONS if "resid" not in name]

WORDS = ["<unk>", "<|endoftext|>", "a", "b", "c", "d", "e", "f", "g", "h", "i"]


def tool_model(dtype=torch.float64, tokenizer=True, seed=0, **changes):
    """Two layers, in which every parameter is random; further features by keyword."""
    config = tiny_config(n_layers=2, **changes)
    words = None
    if tokenizer:
        end = WORDS[1]
        words = word_tokenizer(WORDS, bos_token=end, eos_token=end, pad_token=end)
    return tiny_model(config, seed=seed, dtype=dtype, tokenizer=words)


def dense_model(**changes):
    """A plain transformer: LayerNorm, biases, added positions."""
    features = dict(normalization="layer", norm_bias=True, positions="added", biases=True)
    return tool_model(**(features | changes))


def sparse_model(**changes):
    """What published models have: AbsTopK at eight locations, sinks, concatenated positions."""
    features = dict(
        abs_topk=dict.fromkeys(ADDITIVE_LOCATIONS, 0.6),
        attn_sinks=True,
        positions="concatenated",
        d_pos=4,
        biases=True,
        logits_bias=True,
    )
    return tool_model(**(features | changes))


def stream_model(**changes):
    """A residual ReLU and AbsTopK on the stream itself: no sum of what its components write."""
    return sparse_model(
        abs_topk=dict.fromkeys(TOPK_LOCATIONS, 0.7), resid_relu=True, bigram_table=True, **changes
    )


def prompts(model, batch=2, length=5):
    """A clean and a corrupt batch of tokens."""
    return random_tokens(model, batch, length, seed=1), random_tokens(model, batch, length, seed=2)


def difference(logits):
    """The metric: token 3 against token 4 at the last position, summed over prompts."""
    return (logits[:, -1, 3] - logits[:, -1, 4]).sum()


def requires(module, line=None):
    """Skip a test module without this tool, or on a line that the tool does not support."""
    if line not in (None, LINE):
        pytest.skip(f"{module} needs TransformerLens {line}", allow_module_level=True)
    if find_spec(module) is None:
        pytest.skip(f"{module} is not installed (see pyproject.toml)", allow_module_level=True)
