"""CircuitsVis: HTML of our tokens, patterns, activations and logits, on both lines."""

import json
import re

import pytest
import torch
from tool_models import requires, sparse_model

requires("circuitsvis")

import circuitsvis

TEXT = "a b c a b"
TOKENS = ["<|endoftext|>", "a", "b", "c", "a", "b"]


def run():
    model = sparse_model(dtype=torch.float32)
    with torch.no_grad():
        logits, cache = model.run_with_cache(TEXT)
    return model, model.to_str_tokens(TEXT), logits, cache


def properties(html):
    """What the page hands its component."""
    return [json.loads(found) for found in re.findall(r"\n\s*(\{.*\})\s*\n", str(html))]


@pytest.mark.parametrize("view", ["attention_patterns", "attention_heads"])
def test_attention(view):
    _, tokens, _, cache = run()
    pattern = cache["pattern", 0][0]
    (shown,) = properties(getattr(circuitsvis.attention, view)(tokens=tokens, attention=pattern))
    assert shown["tokens"] == TOKENS
    torch.testing.assert_close(torch.tensor(shown["attention"]), pattern, atol=1e-6, rtol=0)
    assert pattern.sum(-1).max() < 0.99, "the sinks' share is not shown"


def test_activations_of_neurons():
    _, tokens, _, cache = run()
    neurons = torch.stack(
        [cache["post", layer][0] for layer in (0, 1)], dim=1
    )  # [token, layer, neuron]
    (shown,) = properties(circuitsvis.activations.text_neuron_activations(tokens, neurons))
    assert shown["tokens"] == TOKENS
    torch.testing.assert_close(torch.tensor(shown["activations"]), neurons, atol=1e-6, rtol=0)


def test_tokens_coloured_by_a_neuron():
    _, tokens, _, cache = run()
    (shown,) = properties(circuitsvis.tokens.colored_tokens(tokens, cache["post", 1][0, :, 2]))
    assert shown["tokens"] == TOKENS
    torch.testing.assert_close(
        torch.tensor(shown["values"]), cache["post", 1][0, :, 2], atol=1e-6, rtol=0
    )


def test_log_probabilities_of_tokens():
    model, _, logits, _ = run()
    ids, log_probs = model.to_tokens(TEXT)[0], logits[0].log_softmax(-1)
    (shown,) = properties(circuitsvis.logits.token_log_probs(ids, log_probs, model.to_string))
    assert shown["prompt"] == TOKENS
    assert shown["topKTokens"][0][0] == model.to_string(log_probs[0].argmax())
    correct = log_probs[range(5), ids[1:]]
    torch.testing.assert_close(
        torch.tensor(shown["correctTokenLogProb"]), correct, atol=1e-6, rtol=0
    )
