"""Node pruning on the stock models of TransformerLens 3 and 4, for each model family."""

import copy
import dataclasses

import pytest
import torch
import transformers

from helpers import ON_3, has_hooks, node_means, only_on, stock_model
from micro import (
    EDGES,
    LOSS,
    MICRO_TASK,
    NODES,
    VOCABULARY,
    W_O,
    W_U,
    W_V,
    micro_corpus,
    micro_tokenizer,
    triples,
)
from tl_sparse.circuits.circuit import Circuit
from tl_sparse.circuits.families import node_hooks
from tl_sparse.circuits.fingerprints import fingerprint
from tl_sparse.circuits.nodes import BLOCK_LOCATIONS, LOCATIONS, Node, node_at, weight_matrices
from tl_sparse.errors import CircuitError, HookNameError
from tl_sparse.evaluation.judge import evaluate
from tl_sparse.hooks import ablating
from tl_sparse.pruning.config import PruneConfig
from tl_sparse.pruning.pruner import prune
from tl_sparse.tasks.task_data import make_task_data

on_3 = only_on(3, reason="HookedTransformer is of TransformerLens 3")
on_4 = only_on(4, reason="bridges are of TransformerLens 4")
TOKENS = torch.randint(1, 40, (3, 9), generator=torch.Generator().manual_seed(0))
LAYERS, D, HEADS, D_HEAD, D_MLP = 2, 16, 4, 4, 24

# TransformerLens 3: the options of HookedTransformerConfig that define each family.
SIZES = dict(
    n_layers=LAYERS,
    d_model=D,
    n_heads=HEADS,
    d_head=D_HEAD,
    d_mlp=D_MLP,
    d_vocab=40,
    n_ctx=16,
    act_fn="gelu",
    normalization_type="LN",
    seed=0,
    device="cpu",
)
ROTARY = dict(positional_embedding_type="rotary", rotary_dim=4)
LLAMA = ROTARY | dict(
    normalization_type="RMS", final_rms=True, act_fn="silu", gated_mlp=True, n_key_value_heads=2
)
HOOKED = {
    "gpt2": {},
    "folded": dict(normalization_type="LNPre"),
    "llama": LLAMA,
    "parallel": ROTARY | dict(parallel_attn_mlp=True),
    "attn_only": dict(attn_only=True),
}
HOOKED_REFUSED = {
    "several experts": LLAMA | dict(num_experts=2, experts_per_token=1),
    "norms before and after": LLAMA | dict(use_normalization_before_and_after=True),
    "norms after": LLAMA | dict(original_architecture="Olmo2ForCausalLM"),
    "neurons that mix": dict(act_fn="solu_ln"),
    "no norm": dict(normalization_type=None),
    "positions beside the read": dict(positional_embedding_type="shortformer"),
    "reads split by head": dict(use_split_qkv_input=True),
    "keys copied for each head": LLAMA | dict(ungroup_grouped_query_attention=True),
}

# TransformerLens 4: small models of the transformers library.
BASE = dict(
    vocab_size=40,
    hidden_size=D,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    intermediate_size=D_MLP,
    max_position_embeddings=16,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=0,
)
GROUPED = BASE | dict(num_key_value_heads=2)
GPT = dict(
    vocab_size=40, n_embd=D, n_layer=LAYERS, n_head=HEADS, n_inner=D_MLP, n_positions=16
) | dict.fromkeys(("bos_token_id", "eos_token_id"), 0)
BRIDGED = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT),
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", BASE),
    "gptj": ("GPTJForCausalLM", "GPTJConfig", GPT | dict(rotary_dim=4)),
}
ONE = BASE | dict(num_hidden_layers=1)
BRIDGED_ALSO = {
    "gemma": ("GemmaForCausalLM", "GemmaConfig", ONE | dict(num_key_value_heads=2, head_dim=4)),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", ONE | dict(num_key_value_heads=2, head_dim=4)),
    "phi": ("PhiForCausalLM", "PhiConfig", ONE),
    "falcon": ("FalconForCausalLM", "FalconConfig", {n: ONE[n] for n in list(ONE)[:4]}),
    "granite": ("GraniteForCausalLM", "GraniteConfig", ONE | dict(residual_multiplier=0.5)),
}
#: Architecture → the class and options of its configuration, and part of the error message.
BRIDGED_REFUSED = {
    "MixtralForCausalLM": (
        "MixtralConfig",
        GROUPED | dict(num_local_experts=2),
        "mixture of experts",
    ),
    "Gemma2ForCausalLM": (
        "Gemma2Config",
        GROUPED | dict(head_dim=4),
        "attn_out is not what the weights alone",
    ),
    "Olmo2ForCausalLM": ("Olmo2Config", BASE, "attn_out is not what the weights alone"),
    "BertForMaskedLM": ("BertConfig", BASE, "attn_out is not what the weights alone"),
    "FalconH1ForCausalLM": (
        "FalconH1Config",
        GROUPED,
        "the change of the residual stream is not the sum of attn_out and mlp_out",
    ),
    "OpenAIGPTLMHeadModel": (
        "OpenAIGPTConfig",
        dict(vocab_size=40, n_embd=D, n_layer=1, n_head=4, n_positions=16),
        "the forward pass does not run",
    ),
    "MambaForCausalLM": (
        "MambaConfig",
        dict(vocab_size=40, hidden_size=D, num_hidden_layers=2),
        "has no hook point",
    ),
    "T5ForConditionalGeneration": (
        "T5Config",
        dict(vocab_size=40, d_model=D, d_kv=4, d_ff=20, num_layers=2, num_heads=4),
        "has no hook point",
    ),
}
FAMILIES = list(HOOKED if ON_3 else BRIDGED)


def scramble(model):
    """Randomise all parameters, also biases and norms, and zero a third of the matrix entries."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
            if parameter.ndim > 1:
                parameter.mul_(torch.rand(parameter.shape, generator=generator) > 0.3)
    return model.eval()


def hooked(**options):
    return scramble(stock_model(**(SIZES | options)))


def small(family):
    """A small model of a family, for the installed TransformerLens version."""
    return hooked(**HOOKED[family]) if ON_3 else bridge(of_transformers(*BRIDGED[family]))


def of_transformers(architecture, config, options):
    torch.manual_seed(0)
    return scramble(getattr(transformers, architecture)(getattr(transformers, config)(**options)))


def bridge(model):
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    return build_bridge_from_module(
        model, type(model).__name__, hf_config=model.config, device="cpu"
    )


@pytest.fixture(params=FAMILIES, scope="module")
def family(request):
    """The name, the model, the model whose weights are edited, the hook points and the means.

    On TransformerLens 4, the weights that are edited are those of the transformers model.
    """
    name = request.param
    if ON_3:
        model = plain = hooked(**HOOKED[name])
    else:
        plain = of_transformers(*BRIDGED[name])
        model = bridge(copy.deepcopy(plain))
    return name, model, plain, node_hooks(model), node_means(model, TOKENS)


def logits(model):
    out = model(TOKENS)
    return (out if isinstance(out, torch.Tensor) else out.logits).detach()


def with_nodes(model, kept, means=None):
    """The circuit that keeps all nodes or no node."""
    means = means or node_means(model, TOKENS)
    return Circuit(
        {n: torch.full(m.shape, kept) for n, m in means.items()}, means, fingerprint(model)
    )


def views(name, model):
    """The weights [in, out] and biases of layer 1, as views into `model`.

    The output axes of Q, K and V are [head, d_head].
    """
    if ON_3:
        return views_of_hooked(name, model)
    views_of = {
        "neox": views_of_neox,
        "gpt2": views_of_gpt2,
        "gptj": views_of_gptj,
        "llama": views_of_llama,
    }
    parts = views_of[name](model)
    for letter in "QKV":
        parts[letter] = by_head(*parts[letter])
    return parts


def views_of_hooked(name, model):
    block = model.blocks[1]
    attn = block.attn
    parts = {"Q": (attn.W_Q.permute(1, 0, 2), attn.b_Q)}
    if name == "llama":  # W_K and W_V are copies that repeat each head
        parts["K"] = (attn._W_K.permute(1, 0, 2), attn._b_K)
        parts["V"] = (attn._W_V.permute(1, 0, 2), attn._b_V)
    else:
        parts["K"] = (attn.W_K.permute(1, 0, 2), attn.b_K)
        parts["V"] = (attn.W_V.permute(1, 0, 2), attn.b_V)
    parts["O"] = (attn.W_O.view(D, D), attn.b_O)
    if name != "attn_only":
        parts["in"] = (block.mlp.W_in, block.mlp.b_in)
        parts["out"] = (block.mlp.W_out, block.mlp.b_out)
    if name == "llama":
        parts["gate"] = (block.mlp.W_gate, None)
    return parts


def of_linear(module):
    return module.weight.T, module.bias


def of_conv1d(module):
    """The weight of the Conv1D of transformers is already [in, out]."""
    return module.weight, module.bias


def views_of_neox(model):
    attn, mlp = model.gpt_neox.layers[1].attention, model.gpt_neox.layers[1].mlp
    weights = attn.query_key_value.weight.view(HEADS, 3, D_HEAD, D).permute(1, 3, 0, 2)
    biases = attn.query_key_value.bias.view(HEADS, 3, D_HEAD).transpose(0, 1)
    parts = dict(zip("QKV", zip(weights, biases, strict=True), strict=True))
    parts["O"] = of_linear(attn.dense)
    parts["in"] = of_linear(mlp.dense_h_to_4h)
    parts["out"] = of_linear(mlp.dense_4h_to_h)
    return parts


def views_of_gpt2(model):
    block = model.transformer.h[1]
    weights = block.attn.c_attn.weight.split(D, 1)
    biases = block.attn.c_attn.bias.split(D)
    parts = dict(zip("QKV", zip(weights, biases, strict=True), strict=True))
    parts["O"] = of_conv1d(block.attn.c_proj)
    parts["in"] = of_conv1d(block.mlp.c_fc)
    parts["out"] = of_conv1d(block.mlp.c_proj)
    return parts


def views_of_gptj(model):
    block = model.transformer.h[1]
    return {
        "Q": of_linear(block.attn.q_proj),
        "K": of_linear(block.attn.k_proj),
        "V": of_linear(block.attn.v_proj),
        "O": of_linear(block.attn.out_proj),
        "in": of_linear(block.mlp.fc_in),
        "out": of_linear(block.mlp.fc_out),
    }


def views_of_llama(model):
    layer = model.model.layers[1]
    return {
        "Q": of_linear(layer.self_attn.q_proj),
        "K": of_linear(layer.self_attn.k_proj),
        "V": of_linear(layer.self_attn.v_proj),
        "O": of_linear(layer.self_attn.o_proj),
        "in": of_linear(layer.mlp.up_proj),
        "gate": of_linear(layer.mlp.gate_proj),
        "out": of_linear(layer.mlp.down_proj),
    }


def by_head(weight, bias):
    if weight.ndim == 3:
        return weight, bias
    heads = (weight.shape[1] // D_HEAD, D_HEAD)
    return weight.unflatten(1, heads), None if bias is None else bias.view(heads)


#: Location → the matrices that read its nodes (READERS), or write them (WRITERS).
READERS = {"attn_in": "QKV", "mlp_in": ("in", "gate"), "mlp_neuron": ("out",)}
WRITERS = {"attn_q": "Q", "attn_k": "K", "attn_v": "V", "attn_out": "O", "mlp_out": ("out",)}


@torch.no_grad()
def cut(parts, location, index):
    """Remove a node by its weights: zero those that read it, and those that write it."""
    for part in READERS.get(location, ()):
        if part in parts:
            weight, _ = parts[part]
            weight[index] = 0
    output = divmod(index, D_HEAD) if LOCATIONS[location].is_by_head else (index,)
    for part in WRITERS.get(location, ()):
        weight, bias = parts[part]
        weight[(..., *output)] = 0
        if bias is not None:
            bias[output] = 0


def read_as_zero(model, name, location, index):
    """The activation that its readers see as 0, since the norm's weight and bias may follow it."""
    norm_follows = ON_3 and name in ("gpt2", "parallel", "attn_only")
    if not norm_follows or location not in ("attn_in", "mlp_in"):
        return 0.0
    norm = model.blocks[1].ln1 if location == "attn_in" else model.blocks[1].ln2
    return -(norm.b[index] / norm.w[index]).item()


def test_locations_of_a_family(family):
    name, model, _, hooks, means = family
    locations = [location.name for location in BLOCK_LOCATIONS]
    if name == "attn_only":
        locations = [where for where in locations if where.startswith("attn")]
    assert list(hooks) == [(layer, where) for layer in range(LAYERS) for where in locations]
    assert all(
        node_at(hook, 3).indexed_name == f"{layer}.{where}.3"
        for (layer, where), hook in hooks.items()
    )
    assert node_hooks(model, ["attn_q"]) == {
        (i, "attn_q"): f"blocks.{i}.attn.hook_q" for i in range(LAYERS)
    }
    sizes = {where: m.shape for (_, where), m in zip(hooks, means.values(), strict=True)}
    groups = 2 if name == "llama" else HEADS
    assert sizes["attn_q"] == (HEADS, D_HEAD)
    assert sizes["attn_k"] == sizes["attn_v"] == (groups, D_HEAD)
    assert all(sizes[where] == (D,) for where in locations if where.endswith(("_in", "_out")))


def test_all_nodes_are_the_model_and_every_nonzero_weight_an_edge(family, tmp_path):
    name, model, plain, _, means = family
    circuit, before = with_nodes(model, True, means), logits(model)
    with circuit.applied(model):
        assert torch.equal(logits(model), before)
    last = [edge for edge in circuit.edges(model) if edge.source.layer == 1]
    assert len(last) == sum(
        int(weight.count_nonzero()) for weight, _ in views(name, plain).values()
    )
    circuit.save(tmp_path)
    again = Circuit.load(tmp_path)
    assert again.nodes == circuit.nodes
    assert again.edges(model) == circuit.edges(model)
    assert circuit.edge_list(model)["edges"][0]["source"] == "0.attn_in.0"


def test_edges_are_the_weights_between_their_nodes(family):
    name, model, plain, *_ = family
    parts = views(name, plain)
    found = {}
    for source, target, matrix in weight_matrices(model, 1):
        found.setdefault((source, target), []).append(matrix)
    for c in "QKV":
        assert torch.equal(found["attn_in", f"attn_{c.lower()}"][0], parts[c][0].flatten(1))
    by_head = parts["O"][0].view(HEADS, D_HEAD, D)
    shared = HEADS // len(parts["V"][0][0])
    for i, matrix in enumerate(
        found["attn_v", "attn_out"]
    ):  # query heads i, shared + i, … read the value heads 0, 1, …
        assert torch.equal(matrix, by_head[i::shared].flatten(0, 1))
    assert len(found["attn_v", "attn_out"]) == shared
    if "in" in parts:
        expected = [parts[c][0] for c in ("in", "gate") if c in parts]
        assert all(map(torch.equal, found["mlp_in", "mlp_neuron"], expected))
        assert torch.equal(found["mlp_neuron", "mlp_out"][0], parts["out"][0])


@pytest.mark.parametrize("location", [location.name for location in BLOCK_LOCATIONS])
def test_an_ablated_node_is_one_taken_out_of_the_weights(family, location):
    name, model, plain, hooks, means = family
    if (1, location) not in hooks:
        pytest.skip("no MLPs")
    hook = hooks[1, location]
    mean = means[hook]
    index = mean.numel() - 3
    node = torch.arange(mean.numel()).view(mean.shape) == index
    edited = copy.deepcopy(plain)
    cut(views(name, edited), location, index)
    value = torch.full(mean.shape, read_as_zero(model, name, location, index))
    with ablating(model, {hook: node}, {hook: value}):
        ablated = logits(model)
    torch.testing.assert_close(ablated, logits(edited), rtol=1e-4, atol=1e-5)
    assert (ablated - logits(model)).abs().max() > 1e-4


def test_every_node_can_be_held_at_its_mean(family):
    _, model, _, _, means = family
    circuit = with_nodes(model, False, means)
    with circuit.applied(model):
        _, cache = model.run_with_cache(TOKENS)
    for name, mean in circuit.means.items():
        torch.testing.assert_close(cache[name], mean.expand_as(cache[name]), rtol=0, atol=0)


@only_on(4, reason="GPT-J's one norm is two in a HookedTransformer")
def test_parallel_reads_of_one_norm_are_apart():
    model = bridge(of_transformers(*BRIDGED["gptj"]))
    hooks = node_hooks(model)
    _, whole = model.run_with_cache(TOKENS)
    for gated, other in (("attn_in", "mlp_neuron"), ("mlp_in", "attn_q")):
        name = hooks[0, gated]
        with ablating(model, {name: torch.ones(D, dtype=torch.bool)}, {name: torch.zeros(D)}):
            _, cache = model.run_with_cache(TOKENS)
        assert torch.equal(cache[hooks[0, other]], whole[hooks[0, other]])


@on_3
@pytest.mark.parametrize("name", HOOKED_REFUSED)
def test_hooked_transformers_whose_nodes_are_something_else(name):
    model = hooked(**HOOKED_REFUSED[name])
    with pytest.raises(
        HookNameError, match=r"^nodes of \w+ \(HookedTransformer\) cannot be gated: "
    ):
        node_hooks(model)
    assert not has_hooks(model)


@on_3
def test_encoders_are_refused():
    from transformer_lens import HookedEncoder, HookedTransformerConfig

    model = HookedEncoder(HookedTransformerConfig(**SIZES, attention_dir="bidirectional"))
    with torch.no_grad():
        for parameter in model.parameters():  # HookedEncoder leaves its parameters uninitialised
            parameter.zero_()
    with pytest.raises(
        HookNameError, match=r"\(HookedEncoder\) cannot be gated: in layer 0, attn_q is not what"
    ):
        node_hooks(scramble(model))


@on_4
@pytest.mark.parametrize("architecture", BRIDGED_REFUSED)
def test_bridges_whose_nodes_are_something_else(architecture):
    config, options, why = BRIDGED_REFUSED[architecture]
    model = bridge(of_transformers(architecture, config, options))
    with pytest.raises(
        HookNameError, match=rf"^nodes of {architecture} \(\w+\) cannot be gated: .*{why}"
    ):
        node_hooks(model)


@on_4
@pytest.mark.parametrize("name", BRIDGED_ALSO)
def test_further_bridges(name):
    model = bridge(of_transformers(*BRIDGED_ALSO[name]))
    circuit, before = with_nodes(model, True), logits(model)
    with circuit.applied(model):
        assert torch.equal(logits(model), before)
    for hook, mask in circuit.kept.items():  # a value set at any hook point affects the logits
        with ablating(model, {hook: mask}, circuit.means):
            assert not torch.equal(logits(model), before), hook


@on_4
@pytest.mark.parametrize("name", BRIDGED)
def test_folded_bridges(name):
    model = bridge(of_transformers(*BRIDGED[name]))
    circuit = with_nodes(model, True)
    n_edges = len(circuit.edges(model))
    model.enable_compatibility_mode(disable_warnings=True)
    with pytest.raises(CircuitError, match="other weights"):
        circuit.edges(model)
    folded = with_nodes(model, True)
    assert folded.nodes == circuit.nodes
    # Centring makes zeros nonzero in the matrices that write to the residual stream.
    assert len(folded.edges(model)) >= n_edges


def shifted_by_position(x, hook):
    return x + torch.arange(x.shape[1])[:, None]


def normalized(x, hook):
    return x / (x.norm(dim=(2, 3), keepdim=True) + 1e-6)


def plus_one(x, hook):
    return x + 1


@pytest.mark.parametrize(
    ("point", "change", "why"),
    [
        ("mlp.hook_pre", shifted_by_position, "mlp_neuron is not what the weights"),
        ("attn.hook_z", normalized, "attn_out is not what"),
        ("hook_resid_post", plus_one, "the change of the residual stream is not the sum"),
    ],
)
def test_whatever_comes_between_nodes_is_noticed(point, change, why):
    model = small("gpt2")
    model.add_hook(f"blocks.1.{point}", change)
    with pytest.raises(HookNameError, match=f"in layer 1, {why}"):
        node_hooks(model)
    model.reset_hooks()
    assert len(node_hooks(model)) == LAYERS * len(BLOCK_LOCATIONS)


def test_models_in_lower_precision():
    model = small("llama").to(torch.bfloat16)
    model.train()
    assert len(node_hooks(model)) == LAYERS * len(BLOCK_LOCATIONS)
    assert model.training


def micro_dense():
    """The model of micro.py as a stock Llama model, whose MLP computes zero."""
    model, norms, embed, value, output, unembed = micro_hooked() if ON_3 else micro_bridge()
    model.tokenizer = micro_tokenizer()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for norm in norms:
            norm.fill_(1.0)
        embed[VOCABULARY["A"], 0] = 1.0
        embed[VOCABULARY["B"], 0] = -1.0
        embed[VOCABULARY["end"], 1] = 1.0
        value[0, 0] = W_V
        output[0, 2] = W_O
        unembed[2, VOCABULARY["yes"]] = W_U
        unembed[2, VOCABULARY["no"]] = -W_U
    return model


def micro_hooked():
    """A model, the weights of its norms, and views of its W_E, W_V, W_O and W_U."""
    sizes = dict(n_layers=1, d_model=4, n_heads=1, d_head=2, d_mlp=2, d_vocab=len(VOCABULARY))
    options = dict(n_ctx=8, eps=1e-12, rotary_dim=2, n_key_value_heads=1)
    model = hooked(**(LLAMA | sizes | options))
    block = model.blocks[0]
    norms = (block.ln1.w, block.ln2.w, model.ln_final.w)
    attn = block.attn
    return model, norms, model.embed.W_E, attn._W_V[0], attn.W_O[0], model.unembed.W_U


def micro_bridge():
    """The counterpart of `micro_hooked` for TransformerLens 4."""
    config = transformers.LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=4,
        num_hidden_layers=1,
        num_attention_heads=1,
        head_dim=2,
        intermediate_size=2,
        max_position_embeddings=8,
        rms_norm_eps=1e-12,
        tie_word_embeddings=False,
    )
    plain = transformers.LlamaForCausalLM(config).eval()
    model = bridge(plain)
    norms = [parameter for name, parameter in plain.named_parameters() if "norm" in name]
    attn = plain.model.layers[0].self_attn
    embed = next(plain.model.embed_tokens.parameters())
    value = next(attn.v_proj.parameters()).T
    output = next(attn.o_proj.parameters()).T
    unembed = next(plain.lm_head.parameters()).T
    return model, norms, embed, value, output, unembed


def test_biases_of_keys_and_values_that_query_heads_share():
    """Four query heads share two key and two value heads of four channels."""
    if ON_3:
        model = hooked(**LLAMA)
        attn = model.blocks[1].attn
        key_bias, value_bias = attn._b_K, attn._b_V
    else:
        plain = of_transformers("Qwen2ForCausalLM", "Qwen2Config", GROUPED)
        model = bridge(plain)
        attn = plain.model.layers[1].self_attn
        key_bias = next(p for n, p in attn.k_proj.named_parameters() if n.endswith("bias"))
        value_bias = next(p for n, p in attn.v_proj.named_parameters() if n.endswith("bias"))
    with torch.no_grad():
        key_bias.copy_(torch.arange(1.0, 9.0).view_as(key_bias))
        value_bias.copy_(torch.arange(11.0, 19.0).view_as(value_bias))
    biases = with_nodes(model, True).biases(model)
    for index in range(8):  # head 0 has the channels 0 to 3, head 1 the channels 4 to 7
        assert biases[Node(1, "attn_k", index)] == 1.0 + index
        assert biases[Node(1, "attn_v", index)] == 11.0 + index


def test_pruning_a_dense_model_finds_the_circuit_on_paper(tmp_path):
    model = micro_dense()
    config = PruneConfig(
        target_loss=2 * LOSS,
        steps=60,
        train_pairs=32,
        selection_pairs=8,
        heldout_pairs=8,
        pairs_per_step=8,
    )
    circuit, measured = prune(model, MICRO_TASK, micro_corpus(), config, progress=False)
    assert [str(node) for node in circuit.nodes] == NODES
    assert triples(circuit.edges(model)) == EDGES
    assert measured.circuit.loss == pytest.approx(LOSS, abs=1e-5)
    assert measured.ablated.loss == pytest.approx(0.6931, abs=1e-4)
    circuit.save(tmp_path)
    data = make_task_data(MICRO_TASK, model.tokenizer, 8, seed=9)
    assert evaluate(Circuit.load(tmp_path), model, data) == evaluate(circuit, model, data)
    other = dataclasses.replace(circuit, model=fingerprint(micro_dense()))
    assert other.model == circuit.model
    assert not has_hooks(model)
