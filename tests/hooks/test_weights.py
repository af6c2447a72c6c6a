"""Weight sparsity: which weights share a budget and which stay, in any training loop."""

import contextlib
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import SGD, Adam, AdamW
from torch.optim import optimizer as torch_optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

import tl_sparse
from helpers import ON_3, only_on, stock_model, tiny_model
from helpers import copied_parameters as copies
from tl_sparse.errors import ConfigError, UnsupportedError
from tl_sparse.hooks import (
    GroupedWeight,
    MatrixLayout,
    WeightGroup,
    WeightSparsity,
    annealed,
    weight_groups,
)
from tl_sparse.hooks.selection import top_mask
from tl_sparse.network.compact import Compact
from tl_sparse.network.config import SparseConfig, paper_topk

EXAMPLES = settings(max_examples=30)

# Every feature whose weights need a decision; the sizes are all different.
CONFIG = SparseConfig(
    n_layers=2,
    d_model=12,
    n_heads=2,
    d_head=5,
    d_mlp=16,
    d_vocab=24,
    n_ctx=10,
    positions="concatenated",
    d_pos=3,
    bigram_table=True,
    attn_sinks=True,
    logits_bias=True,
    abs_topk=paper_topk(0.5),
)
PLAIN = SparseConfig(n_layers=2, d_model=12, n_heads=2, d_head=5, d_mlp=16, d_vocab=24, n_ctx=10)
#: The parameters of one layer that share a budget, and how many entries they have together.
LAYER = {
    ("attn.W_Q", "attn.W_Q_pos", "attn.W_K", "attn.W_K_pos", "attn.W_V", "attn.W_V_pos"): 450,
    ("attn.W_O",): 2 * 5 * 12,
    ("mlp.W_in", "mlp.W_in_pos"): 16 * (12 + 3),
    ("mlp.W_out",): 16 * 12,
}
BUDGETS = {("embed.W_E",): 24 * 12, ("unembed.W_U",): 12 * 24}
for layer in ("blocks.0", "blocks.1"):
    for names, size in LAYER.items():
        BUDGETS[tuple(f"{layer}.{name}" for name in names)] = size


def ours(config=CONFIG, seed=0):
    return tl_sparse.create(config, seed=seed, device="cpu")


def dense(seed=0):
    sizes = dict(n_layers=2, d_model=12, n_heads=2, d_head=6, d_mlp=16, d_vocab=24, n_ctx=10)
    return stock_model(**sizes, seed=seed)


def tokens(n=8, seed=0):
    return torch.randint(0, 24, (n, 10), generator=torch.Generator().manual_seed(seed))


def nonzero(group):
    return sum(int(parameter.count_nonzero()) for parameter in group.parameters)


def entries(group):
    return sum(parameter.numel() for parameter in group.parameters)


# The rule, written once more in the plainest way: a sort of single entries.


def row_of(name, index):
    """The neuron or attention channel of an entry; None for embeddings, without a minimum."""
    leaf = name.rsplit(".", 1)[-1].removesuffix("_pos")
    if leaf in ("W_Q", "W_K", "W_V"):
        head, _, channel = index  # an output row of the fused QKV matrix
        return leaf, head, channel
    if leaf == "W_O":
        return index[:2]  # an input column: a channel of a head
    if leaf == "W_in":
        return index[1]  # an output row: a neuron
    return index[0] if leaf == "W_out" else None  # an input column: a neuron


def kept_by_hand(magnitudes, rows, k, minimum):
    """Which entries stay, given their magnitudes and the row of each."""
    order = sorted(range(len(magnitudes)), key=lambda i: -magnitudes[i])
    kept, taken = set(), {}
    for i in order:
        if rows[i] is not None and taken.get(rows[i], 0) < minimum:
            taken[rows[i]] = taken.get(rows[i], 0) + 1
            kept.add(i)
    for i in order:
        if len(kept) >= k:
            break
        kept.add(i)
    return kept


def projected_by_hand(weights, budgets, fraction, embed_fraction, minimum):
    expected = {name: weight.clone() for name, weight in weights.items()}
    for names in budgets:
        places = []
        for name in names:
            sizes = map(range, weights[name].shape)
            places += [(name, index) for index in itertools.product(*sizes)]
        magnitudes = [abs(float(weights[name][index])) for name, index in places]
        rows = [row_of(name, index) for name, index in places]
        share = embed_fraction if "embed" in names[0] else fraction
        kept = kept_by_hand(magnitudes, rows, int(share * len(places)), minimum)
        for i, (name, index) in enumerate(places):
            if i not in kept:
                expected[name][index] = 0.0
    return expected


# Groups


def test_which_weights_of_our_model_share_a_budget():
    model = ours()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = weight_groups(model)
    found = {tuple(names[id(p)] for p in group.parameters): group for group in groups}
    assert {frozenset(key) for key in found} == {frozenset(key) for key in BUDGETS}
    assert len(found) == len(BUDGETS)
    for key, group in found.items():
        assert group.embedding == (key in {("embed.W_E",), ("unembed.W_U",)})
        assert group.protected == (not group.embedding)


def test_added_positions_and_a_tied_unembedding():
    config = SparseConfig(
        n_layers=1,
        d_model=6,
        n_heads=1,
        d_head=6,
        d_mlp=8,
        d_vocab=9,
        n_ctx=5,
        positions="added",
        tied_unembed=True,
    )
    model = ours(config)
    before = copies(model)
    WeightSparsity(model, 0.25).project()
    changed = {
        name for name, weight in copies(model).items() if not torch.equal(weight, before[name])
    }
    layer = [
        f"blocks.0.{name}"
        for name in ("attn.W_Q", "attn.W_K", "attn.W_V", "attn.W_O", "mlp.W_in", "mlp.W_out")
    ]
    assert changed == {"embed.W_E", *layer}


DENSE_GROUPS_ON_3 = [
    ["blocks.{layer}.attn.W_Q", "blocks.{layer}.attn.W_K", "blocks.{layer}.attn.W_V"],
    ["blocks.{layer}.attn.W_O"],
    ["blocks.{layer}.mlp.W_in"],
    ["blocks.{layer}.mlp.W_out"],
]
#: The same under their names on TransformerLens 4, which are like those of Hugging Face.
DENSE_GROUPS_ON_4 = [
    [
        "layers.{layer}.attn.q.weight",
        "layers.{layer}.attn.k.weight",
        "layers.{layer}.attn.v.weight",
    ],
    ["layers.{layer}.attn.o.weight"],
    ["layers.{layer}.mlp.fc_in.weight"],
    ["layers.{layer}.mlp.fc_out.weight"],
]


def test_the_groups_of_a_dense_model_of_transformer_lens():
    model = dense()
    names = {
        id(p): name.replace("_original_component.", "") for name, p in model.named_parameters()
    }
    groups = [
        (tuple(names[id(p)] for p in group.parameters), group.embedding, group.protected)
        for group in weight_groups(model)
    ]
    assert len({names for names, _, _ in groups}) == len(groups)
    found = {(frozenset(names), embedding, protected) for names, embedding, protected in groups}
    expected = set()
    for names in DENSE_GROUPS_ON_3 if ON_3 else DENSE_GROUPS_ON_4:
        for layer in range(2):
            group = frozenset(name.format(layer=layer) for name in names)
            expected.add((group, False, True))
    for name in ("embed.W_E", "unembed.W_U") if ON_3 else ("tok_embed.weight", "head.weight"):
        expected.add((frozenset([name]), True, False))
    assert found == expected


class Holder(torch.nn.Module):
    """A module whose only parameters have the given dotted names."""

    def __init__(self, shapes):
        super().__init__()
        for name, shape in shapes.items():
            *path, leaf = name.split(".")
            module = self
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, torch.nn.Module())
                module = getattr(module, part)
            module.register_parameter(leaf, torch.nn.Parameter(torch.randn(shape)))


def test_grouped_query_attention_and_gated_mlps():
    """By HookedTransformer's names: `_W_K`, `_W_V` with fewer heads, and `_b_K`, `_b_V`."""
    attention = {"attn.W_Q": (4, 6, 3), "attn._W_K": (2, 6, 3), "attn._W_V": (2, 6, 3)}
    biases = {"attn.b_Q": (4, 3), "attn._b_K": (2, 3), "attn._b_V": (2, 3)}
    gated = {"mlp.W_in": (6, 8), "mlp.W_gate": (6, 8), "mlp.W_out": (8, 6)}
    model = Holder(
        {f"blocks.0.{name}": shape for name, shape in (attention | biases | gated).items()}
    )
    before = copies(model)
    sparsity = WeightSparsity(model, 0.01, min_nonzero=2)
    sparsity.project()
    after = copies(model)
    assert [len(group.parameters) for group in sparsity.groups] == [3, 1, 1, 1]
    for name in attention:  # two inputs for each of the channels of each head
        assert (after[f"blocks.0.{name}"].count_nonzero(1) == 2).all(), name
    for name in ("mlp.W_in", "mlp.W_gate"):
        assert (after[f"blocks.0.{name}"].count_nonzero(0) == 2).all(), name
    assert (after["blocks.0.mlp.W_out"].count_nonzero(1) == 2).all()
    for name in biases:
        assert torch.equal(after[f"blocks.0.{name}"], before[f"blocks.0.{name}"]), name


#: Tiny models of transformers: GPT-2's Conv1D stores [input, output], a Linear [output, input].
SMALL = dict(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
SMALL_LLAMA = SMALL | dict(intermediate_size=12, num_key_value_heads=1)
FAMILIES = {
    "GPT2": dict(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_inner=12),
    "Llama": SMALL_LLAMA,  # gated, grouped queries
    "Phi3": SMALL_LLAMA | dict(pad_token_id=0),  # q, k, v in one matrix; gate and input in one
    "GPTNeoX": SMALL | dict(intermediate_size=12),
    "OPT": SMALL | dict(ffn_dim=12, word_embed_proj_dim=8),
    "GPTJ": dict(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_inner=12, rotary_dim=4),
}
#: The ends of the names of weights that lead out of neurons and channels; others lead into them.
WRITES = ("o_proj", "out_proj", "c_proj", "dense", "dense_4h_to_h", "down_proj", "fc_out", "fc2")


@pytest.mark.parametrize("family", FAMILIES)
def test_each_neuron_of_another_librarys_model_keeps_its_minimum(family):
    """Counted by neuron and channel: their inputs in maps that lead to them, else their outputs."""
    import transformers

    config = getattr(transformers, f"{family}Config")(**FAMILIES[family])
    model = getattr(transformers, f"{family}ForCausalLM" if family != "GPT2" else "GPT2LMHeadModel")
    model = model(config)
    WeightSparsity(model, fraction=1 / 64, min_nonzero=2).project()
    n_checked = 0
    for name, module in model.named_modules():
        is_conv = type(module).__name__ == "Conv1D"
        if (not is_conv and not isinstance(module, torch.nn.Linear)) or name.endswith("lm_head"):
            continue
        if name == "embed_out":
            continue
        weight = module.weight.T if is_conv else module.weight  # [output, input]
        counts = weight.count_nonzero(0 if name.endswith(WRITES) else 1)
        assert (counts == 2).all(), name
        n_checked += 1
    assert n_checked >= 4


def bridged(family):
    """A bridge around a tiny model of transformers."""
    import transformers
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    architecture = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family])
    hf = getattr(transformers, architecture)(config)
    return build_bridge_from_module(hf, architecture, hf_config=hf.config, device="cpu")


@only_on(4, "on TransformerLens 3, these models become a HookedTransformer")
@pytest.mark.parametrize("family", ["GPT2", "Phi3", "GPTNeoX", "Llama"])
def test_only_the_weights_that_a_bridge_computes_with_are_in_groups(family):
    """It computes with parts of some matrices, and keeps the whole ones as parameters too."""
    model = bridged(family)
    model(torch.arange(6)[None], return_type="loss").backward()
    groups = weight_groups(model)
    weights = [weight for group in groups for weight in group.parameters]
    assert all(weight.grad is not None for weight in weights)
    bands = [len(group.bands) for group in groups]
    assert sorted(bands) == [1] * (len(groups) - 1) + [3]  # Q, K and V share a budget

    apart = weight_groups(model, fused_qkv=False)
    assert [len(group.bands) for group in apart] == [1] * (len(groups) + 2)
    n_trained = 0
    for parameter in model.parameters():
        if parameter.grad is not None and parameter.ndim == 2:
            n_trained += parameter.numel()
    positions = model.pos_embed.weight.numel() if family == "GPT2" else 0  # these stay dense
    assert sum(weight.numel() for weight in weights) == n_trained - positions
    sparsity = WeightSparsity(model, fraction=1 / 4, min_nonzero=0)
    sparsity.project()
    n_kept = sum(int(weight.count_nonzero()) for weight in weights)
    assert sparsity.l0() == n_kept == sum(group.n_kept(1 / 4) for group in groups)


def test_q_k_and_v_of_different_widths_have_a_budget_each():
    """In cross-attention, K and V may read another stream than Q."""
    model = torch.nn.Module()
    model.attn = torch.nn.ModuleDict(
        {"q_proj": torch.nn.Linear(6, 4), "k_proj": torch.nn.Linear(8, 4)}
    )
    names = [group.name for group in weight_groups(model)]
    assert names == ["attn.q_proj.weight", "attn.k_proj.weight"]


@only_on(4, "on TransformerLens 3, these models become a HookedTransformer")
@pytest.mark.parametrize("make", ["GPT2", "native"])
def test_each_neuron_in_a_bridge_keeps_its_minimum(make):
    model = dense() if make == "native" else bridged("GPT2")
    WeightSparsity(model, fraction=1 / 64, min_nonzero=2).project()
    block = model.blocks[0]
    assert (block.mlp.W_in.count_nonzero(0) == 2).all()  # [input, neuron]
    assert (block.mlp.W_out.count_nonzero(1) == 2).all()  # [neuron, output]
    for name in ("W_Q", "W_K", "W_V"):
        assert (getattr(block.attn, name).count_nonzero(1) == 2).all(), name
    assert (block.attn.W_O.count_nonzero(-1) == 2).all()


def test_compact_weights_are_refused():
    model = tiny_model()
    mlp = model.blocks[0].mlp
    mlp.hold_compact("W_in", Compact.of(mlp.W_in.detach()))
    for make in (
        lambda: WeightSparsity(model, 0.5),
        lambda: weight_groups(model),
    ):
        with pytest.raises(UnsupportedError, match=r"blocks.0.mlp are held compact.*dense_weights"):
            make()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("transformer.wte.weight", "embedding"),
        ("transformer.wte._original_component.weight", "embedding"),
        ("lm_head._original_component.weight", "embedding"),
        ("model.embed_tokens.weight", "embedding"),
        ("gpt_neox.embed_in.weight", "embedding"),
        ("embed_out.weight", "embedding"),
        ("transformer.wpe.weight", "dense"),
        ("pos._original_component.weight", "dense"),
        ("model.decoder.embed_positions.weight", "dense"),
        ("bert.embeddings.position_embeddings.weight", "dense"),
        ("blocks.0.attn.b_Q", "dense"),
        ("transformer.h.0.mlp.c_fc.weight", "matrix"),
        ("model.layers.0.self_attn.o_proj.weight", "matrix"),
    ],
)
def test_names_of_other_libraries(name, kind):
    groups = weight_groups(Holder({name: (6, 4), "norm.weight": (4,), "fc.bias": (4,)}))
    assert [group.embedding for group in groups] == {
        "embedding": [True],
        "dense": [],
        "matrix": [False],
    }[kind]


# The projection


@EXAMPLES
@given(
    st.floats(0.005, 1.0),
    st.floats(0.005, 1.0),
    st.integers(0, 6),
    st.integers(0, 3),
)
def test_the_projection_against_a_sort_of_single_entries(fraction, embed_fraction, minimum, seed):
    """All of the state: the matrices as the plain rule says, everything else untouched."""
    model = ours(seed=seed)
    before = copies(model)
    WeightSparsity(model, fraction, embed_fraction=embed_fraction, min_nonzero=minimum).project()
    expected = projected_by_hand(before, BUDGETS, fraction, embed_fraction, minimum)
    for name, weight in copies(model).items():
        assert torch.equal(weight, expected[name]), name


@pytest.mark.parametrize("fraction", [1.0, 0.5, 0.3, 1 / 7])
def test_exactly_the_budget_is_kept_and_it_is_the_largest(fraction):
    model = ours()
    before = copies(model)
    sparsity = WeightSparsity(model, fraction, min_nonzero=0)
    sparsity.project()
    after = copies(model)
    for names, size in BUDGETS.items():
        magnitudes = torch.cat([before[name].abs().flatten() for name in names])
        kept = torch.cat([after[name].flatten() for name in names]) != 0
        assert kept.sum() == int(fraction * size)
        assert fraction == 1.0 or magnitudes[kept].min() > magnitudes[~kept].max()
    assert sparsity.l0() == sum(int(fraction * size) for size in BUDGETS.values())


@pytest.mark.parametrize("minimum", [1, 4, 12, 100])
def test_the_minimum_of_each_neuron_and_channel_wins_over_a_smaller_budget(minimum):
    """Per output of QKV and W_in, with positional inputs, and per input of W_O and W_out."""
    model = ours()
    WeightSparsity(model, 1e-6, min_nonzero=minimum).project()
    for block in model.blocks:
        for letter in "QKV":
            channels = torch.cat(
                [getattr(block.attn, f"W_{letter}"), getattr(block.attn, f"W_{letter}_pos")], dim=1
            )
            assert (channels.count_nonzero(1) == min(minimum, 15)).all()
        assert (
            torch.cat([block.mlp.W_in, block.mlp.W_in_pos]).count_nonzero(0) == min(minimum, 15)
        ).all()
        assert (block.attn.W_O.count_nonzero(2) == min(minimum, 12)).all()
        assert (block.mlp.W_out.count_nonzero(1) == min(minimum, 12)).all()
    assert (
        model.embed.W_E.count_nonzero() == model.unembed.W_U.count_nonzero() == 0
    )  # no minimum there


def two_neurons(protected):
    """Their weights on two channels and on one of positions, and the group of both matrices."""
    W_in = torch.tensor([[9.0, 0.1], [-8.0, 0.2]])
    W_in_pos = torch.tensor([[7.0, -0.3]])
    by_neuron = MatrixLayout(rows=(1,), columns=(0,))
    band = (GroupedWeight(W_in, by_neuron), GroupedWeight(W_in_pos, by_neuron))
    return W_in, W_in_pos, WeightGroup("W_in", (band,), protected=protected)


def test_a_projection_by_hand():
    """Two neurons that read three channels, one positional: a budget of 3 of 6 entries."""
    W_in, W_in_pos, group = two_neurons(protected=True)
    group.project(0.5, min_nonzero=1)
    # Neuron 0 keeps its 9, neuron 1 its -0.3, and -8 is the largest other.
    assert W_in.tolist() == [[9.0, 0.0], [-8.0, 0.0]]
    torch.testing.assert_close(W_in_pos, torch.tensor([[0.0, -0.3]]), rtol=0, atol=0)


def test_a_projection_without_a_minimum_by_hand():
    W_in, W_in_pos, group = two_neurons(protected=False)
    group.project(0.5, min_nonzero=1)
    assert W_in.tolist() == [[9.0, 0.0], [-8.0, 0.0]]
    assert W_in_pos.tolist() == [[7.0, 0.0]]


def test_equal_magnitudes():
    """Exactly the budget, also where every weight is as large as any other."""
    model = ours()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randint(0, 2, parameter.shape) * 2 - 1)
    sparsity = WeightSparsity(model, 0.4, min_nonzero=3)
    sparsity.project()
    assert [nonzero(group) for group in sparsity.groups] == [
        int(0.4 * entries(group)) for group in sparsity.groups
    ]
    for block in model.blocks:
        assert (block.mlp.W_out.count_nonzero(1) >= 3).all()


@EXAMPLES
@given(st.data(), st.integers(1, 5), st.integers(1, 5), st.integers(0, 7))
def test_top_mask_keeps_the_best_that_the_minimum_allows(data, rows, columns, minimum):
    """Ties are everywhere: of equal entries, the first stay."""
    values = data.draw(
        st.lists(st.integers(0, 3), min_size=rows * columns, max_size=rows * columns)
    )
    k = data.draw(st.integers(0, rows * columns))
    mask = top_mask(torch.tensor(values).float().view(rows, columns), k, minimum).flatten()
    expected = kept_by_hand(values, [i // columns for i in range(len(values))], k, minimum)
    assert set(mask.nonzero().flatten().tolist()) == expected
    assert len(expected) == max(k, rows * min(minimum, columns))


def test_projecting_twice_changes_nothing_more():
    model = ours()
    sparsity = WeightSparsity(model, 0.2)
    sparsity.project()
    once = copies(model)
    sparsity.project()
    assert all(torch.equal(weight, once[name]) for name, weight in copies(model).items())


@pytest.mark.parametrize(
    ("embed_fraction", "kept"), [(None, int(0.1 * 288)), (0.5, 144), (1.0, 288)]
)
def test_the_embedding_fraction(embed_fraction, kept):
    model = ours()
    WeightSparsity(model, 0.1, embed_fraction=embed_fraction).project()
    assert model.embed.W_E.count_nonzero() == model.unembed.W_U.count_nonzero() == kept
    assert (
        model.blocks[0].mlp.W_out.count_nonzero() == 16 * 4
    )  # 19 in the budget, 4 for each neuron


def test_chosen_groups():
    model = ours()
    before = copies(model)
    group = WeightGroup(
        "W_out",
        ((GroupedWeight(model.blocks[1].mlp.W_out, MatrixLayout(rows=(0,), columns=(1,))),),),
        protected=False,
    )
    WeightSparsity(model, 0.25, groups=[group]).project()
    changed = [
        name for name, weight in copies(model).items() if not torch.equal(weight, before[name])
    ]
    assert changed == ["blocks.1.mlp.W_out"]
    assert model.blocks[1].mlp.W_out.count_nonzero() == 16 * 12 // 4


# The schedule


def test_annealing_by_hand():
    fraction = annealed(0.2, start=2, stop=6)
    expected = [1.0, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2, 0.2, 0.2]
    assert [fraction(step) for step in range(9)] == pytest.approx(expected, abs=1e-12)
    assert annealed(1 / 32, 0.5, 2.5)(1) == pytest.approx(
        1 - 0.25 * (31 / 32), abs=1e-12
    )  # windows need no integers


@pytest.mark.parametrize(("start", "expected"), [(0, [0.25, 0.25, 0.25]), (2, [1.0, 1.0, 0.25])])
def test_annealing_in_no_time(start, expected):
    assert [annealed(0.25, start, start)(step) for step in range(3)] == expected


def test_annealing_to_everything_keeps_everything():
    assert [annealed(1.0, 1, 4)(step) for step in range(6)] == [1.0] * 6


def test_functions_of_the_step_get_the_number_of_steps_done_before():
    model = ours()
    asked = []

    def fraction(step):
        asked.append(step)
        return [0.9, 0.5, 0.3][step]

    sparsity = WeightSparsity(
        model, fraction, embed_fraction=lambda step: 0.8 - 0.1 * step, min_nonzero=0
    )
    optimizer = SGD(model.parameters(), lr=0.1)
    counts = []
    with sparsity.attached(optimizer):
        for _ in range(3):
            with torch.no_grad():  # dense again
                for parameter in model.parameters():
                    parameter.normal_()
            optimizer.step()
            counts.append(
                (
                    int(model.blocks[0].mlp.W_out.count_nonzero()),
                    int(model.embed.W_E.count_nonzero()),
                )
            )
    assert sorted(set(asked)) == [0, 1, 2]
    assert sparsity.steps == 3
    assert counts == [
        (int(f * 192), int(e * 288)) for f, e in ((0.9, 0.8), (0.5, 0.7), (0.3, 0.8 - 0.1 * 2))
    ]
    embedding = next(group for group in sparsity.groups if group.embedding)
    assert (sparsity.fraction_at(1), sparsity.fraction_at(1, embedding)) == (
        0.5,
        pytest.approx(0.7),
    )


def test_projecting_by_hand_is_no_step():
    sparsity = WeightSparsity(ours(), 0.5)
    sparsity.project()
    assert sparsity.steps == 0


def test_steps_count_on_over_contexts():
    model = ours()
    optimizer = SGD(model.parameters(), lr=0.1)
    sparsity = WeightSparsity(model, annealed(0.25, 0, 4), min_nonzero=0)
    for _ in range(5):
        with torch.no_grad():
            model.blocks[0].mlp.W_out.normal_()
        with sparsity.attached(optimizer) as attached:
            optimizer.step()
        assert attached is sparsity
    assert sparsity.steps == 5
    assert model.blocks[0].mlp.W_out.count_nonzero() == 48


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(fraction=0), r"fraction = 0 is not possible; it must be a fraction in \(0, 1\]"),
        (dict(fraction=1.5), r"fraction = 1\.5 is not possible; it must be a fraction in \(0, 1\]"),
        (dict(fraction=float("nan")), r"fraction = nan is not possible"),
        (dict(fraction="1/4"), r"fraction = '1/4' is not possible"),
        (dict(fraction=0.5, embed_fraction=-0.1), r"^embed_fraction = -0\.1 is not possible"),
        (
            dict(fraction=0.5, min_nonzero=-1),
            r"min_nonzero = -1 is not possible; it must be at least 0",
        ),
        (dict(fraction=0.5, groups=[]), r"has no weight matrices to make sparse"),
    ],
)
def test_impossible_arguments(arguments, message):
    with pytest.raises(ConfigError, match=message):
        WeightSparsity(ours(PLAIN), **arguments)


def test_a_model_without_matrices():
    with pytest.raises(ConfigError, match="LayerNorm has no weight matrices to make sparse"):
        WeightSparsity(torch.nn.LayerNorm(4), 0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0, 0, 1), r"target = 0\.0 is not possible; it must be a fraction in \(0, 1\]"),
        ((1.1, 0, 1), r"target = 1\.1 is not possible"),
        (
            (0.5, 3, 2),
            r"the annealing window \(3, 2\) is not possible; it needs 0 <= start <= stop",
        ),
        ((0.5, -1, 2), r"the annealing window \(-1, 2\) is not possible"),
    ],
)
def test_impossible_annealing(arguments, message):
    with pytest.raises(ConfigError, match=message):
        annealed(*arguments)


# The hook

OPTIMIZERS = {
    "SGD": lambda parameters: SGD(parameters, lr=0.5, momentum=0.9),
    "Adam": lambda parameters: Adam(parameters, lr=0.01),
    "AdamW": lambda parameters: AdamW(parameters, lr=0.01, weight_decay=0.1),
}


def train_step(model, optimizer):
    optimizer.zero_grad()
    model(tokens(), return_type="loss").backward()
    optimizer.step()


@contextlib.contextmanager
def no_hooks_left(*optimizers):
    """torch's own tables of post-hooks are the same before and after."""
    tables = [
        torch_optimizer._global_optimizer_post_hooks,
        *(o._optimizer_step_post_hooks for o in optimizers),
    ]
    before = [dict(table) for table in tables]
    yield
    assert [dict(table) for table in tables] == before


@pytest.mark.parametrize("given_optimizer", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_zeros_hold_after_every_step_and_not_after_the_context(name, given_optimizer):
    model = ours()
    optimizer = OPTIMIZERS[name](model.parameters())
    sparsity = WeightSparsity(model, 0.25, min_nonzero=2)
    budget = [int(0.25 * entries(group)) for group in sparsity.groups]
    bigram = model.bigram.W_bigram.clone()
    supports = []
    with no_hooks_left(optimizer), sparsity.attached(optimizer if given_optimizer else None):
        for _ in range(6):
            train_step(model, optimizer)
            assert [nonzero(group) for group in sparsity.groups] == budget
            supports.append(model.embed.W_E != 0)
    assert sparsity.steps == 6
    assert (model.bigram.W_bigram != bigram).any()  # dense weights are trained
    assert (supports[-1] & ~supports[0]).any()  # a weight that was zero can come back

    train_step(model, optimizer)
    assert sparsity.steps == 6
    assert all(
        nonzero(group) > 1.5 * kept for group, kept in zip(sparsity.groups, budget, strict=True)
    )


def test_optimizer_moments_stay_dense():
    model = ours()
    optimizer = Adam(model.parameters(), lr=0.01)
    with WeightSparsity(model, 0.1).attached(optimizer):
        for _ in range(3):
            train_step(model, optimizer)
    W_out = model.blocks[0].mlp.W_out
    zeros = W_out == 0
    assert zeros.float().mean() > 0.6
    assert (optimizer.state[W_out]["exp_avg_sq"][zeros] > 0).float().mean() > 0.95
    assert (W_out.grad[zeros] != 0).float().mean() > 0.8


@pytest.mark.parametrize("given_optimizer", [True, False])
def test_an_exception_takes_the_hook_off_too(given_optimizer):
    model = ours()
    optimizer = SGD(model.parameters(), lr=0.1)
    sparsity = WeightSparsity(model, 0.25, min_nonzero=0)

    def interrupted():
        with sparsity.attached(optimizer if given_optimizer else None):
            train_step(model, optimizer)
            raise ZeroDivisionError

    with no_hooks_left(optimizer), pytest.raises(ZeroDivisionError):
        interrupted()
    assert sparsity.l0() == sum(int(0.25 * size) for size in BUDGETS.values())
    train_step(model, optimizer)
    assert sparsity.steps == 1
    assert sparsity.l0() > 0.5 * sum(BUDGETS.values())


def test_a_given_optimizer_is_the_only_one():
    model = ours()
    chosen, other = (SGD(model.parameters(), lr=0.1) for _ in range(2))
    sparsity = WeightSparsity(model, 0.25)
    with sparsity.attached(chosen):
        train_step(model, other)
        assert sparsity.steps == 0
        assert sparsity.l0() == sum(BUDGETS.values())
        train_step(model, chosen)
        assert sparsity.steps == 1
        assert sparsity.l0() < 0.3 * sum(BUDGETS.values())


def test_without_an_optimizer_any_that_steps_these_weights_counts_and_no_other():
    model, stranger = ours(), ours(seed=1)
    sparsity = WeightSparsity(model, 0.25)
    with no_hooks_left(), sparsity.attached():
        train_step(stranger, Adam(stranger.parameters(), lr=0.01))
        train_step(
            model, SGD([model.bigram.W_bigram], lr=0.1)
        )  # ours, but none of the sparse weights
        assert sparsity.steps == 0
        assert sparsity.l0() == sum(BUDGETS.values())
        one_layer = Adam(model.blocks[0].parameters(), lr=0.01)  # created inside the context
        train_step(model, one_layer)
        assert sparsity.steps == 1
        assert sparsity.l0() < 0.3 * sum(BUDGETS.values())
    assert WeightSparsity(stranger, 0.25).l0() == sum(BUDGETS.values())


def test_two_models_at_once():
    models = ours(), ours(seed=1)
    first, second = (
        WeightSparsity(model, f, min_nonzero=0)
        for model, f in zip(models, (0.5, 0.25), strict=True)
    )
    with no_hooks_left(), first.attached(), second.attached():
        for model in models:
            train_step(model, SGD(model.parameters(), lr=0.1))
        train_step(models[1], SGD(models[1].parameters(), lr=0.1))
    assert (first.steps, second.steps) == (1, 2)
    assert first.l0() == sum(int(0.5 * size) for size in BUDGETS.values())
    assert second.l0() == sum(int(0.25 * size) for size in BUDGETS.values())


def test_training_flags_and_gradients_are_left_alone():
    model = ours().train()
    model.embed.W_E.requires_grad_(False)
    optimizer = SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    with WeightSparsity(model, 0.25).attached(optimizer):
        train_step(model, optimizer)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(p.is_leaf and (p.grad is not None) == p.requires_grad for p in model.parameters())
    assert all(module.training for module in model.modules())


# TransformerLens' own loop

if ON_3:
    from transformer_lens.train import HookedTransformerTrainConfig as LoopConfig
    from transformer_lens.train import train as transformer_lens_train
else:
    from transformer_lens.tools.training import TrainConfig as LoopConfig
    from transformer_lens.tools.training import train as transformer_lens_train


class Counting(torch.utils.data.Dataset):
    """Rows that count upwards from a random start: easy to learn, also with few weights."""

    def __init__(self, n_rows):
        starts = torch.arange(n_rows) * 7 % 24
        self.tokens = (starts[:, None] + torch.arange(10)) % 24

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, index):
        return {"tokens": self.tokens[index]}


def loop_config(**changes):
    return LoopConfig(
        **(dict(num_epochs=5, batch_size=8, lr=1e-2, device="cpu", print_every=None) | changes)
    )


@pytest.mark.parametrize("build", [ours, dense])
@pytest.mark.parametrize(
    "changes",
    [
        dict(optimizer_name="Adam"),
        dict(optimizer_name="AdamW", weight_decay=0.1, max_grad_norm=1.0, warmup_steps=2),
        dict(optimizer_name="SGD", lr=0.5, momentum=0.9),
    ],
    ids=lambda changes: changes["optimizer_name"],
)
def test_transformer_lens_train_loop_with_nothing_but_our_hook(build, changes):
    model, data = build(), Counting(48)
    before = copies(model)
    sparsity = WeightSparsity(model, annealed(0.2, 2, 12), embed_fraction=0.5, min_nonzero=2)
    seen = []

    def check(optimizer, args, kwargs):  # registered after ours, so called after it
        for group in sparsity.groups:
            budget = int(sparsity.fraction_at(len(seen), group) * entries(group))
            assert nonzero(group) <= budget
        seen.append(sparsity.l0())

    with torch.no_grad():
        loss_before = model(data.tokens, return_type="loss").item()
    with no_hooks_left(), sparsity.attached():
        handle = register_optimizer_step_post_hook(check)
        try:
            trained = transformer_lens_train(model, loop_config(**changes), data)
        finally:
            handle.remove()
    assert trained is model
    assert len(seen) == sparsity.steps == 5 * 48 // 8
    assert seen[0] > 1.9 * seen[-1]
    assert sparsity.l0() == seen[-1]
    with torch.no_grad():
        loss_after = model(data.tokens, return_type="loss").item()
    assert loss_after < loss_before - 0.3
    moved = {
        name for name, weight in copies(model).items() if not torch.equal(weight, before[name])
    }
    assert {id(p) for name, p in model.named_parameters() if name in moved} >= {
        id(p) for group in sparsity.groups for p in group.parameters
    }

    again = changes | dict(num_epochs=1, warmup_steps=0)
    transformer_lens_train(model, loop_config(**again), data)  # without the hook: dense again
    assert len(seen) == sparsity.steps
    assert sparsity.l0() > 1.5 * seen[-1]


def test_a_step_under_the_hook_is_the_step_and_then_the_projection():
    """One plain SGD step and a projection by hand give what the hook gives."""
    model, twin = ours(), ours()
    for m in (model, twin):
        m(tokens(), return_type="loss").backward()
    with WeightSparsity(model, 0.3).attached() as sparsity:
        SGD(model.parameters(), lr=0.1).step()
    with torch.no_grad():
        stepped = {name: p - 0.1 * p.grad for name, p in twin.named_parameters()}
    expected = projected_by_hand(stepped, BUDGETS, 0.3, 0.3, sparsity.min_nonzero)
    for name, weight in copies(model).items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-6, atol=1e-8)
