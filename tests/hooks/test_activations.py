"""Means, ablation, gates and activation sparsity, on our models and on stock ones."""

import contextlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tl_sparse
from helpers import must_not_run, stock_model
from tl_sparse.errors import ArgumentError, ConfigError, DataError, HookNameError
from tl_sparse.hooks import (
    NodeGates,
    ablating,
    abs_topk,
    hooked,
    mean_activations,
    recording_means,
    sparse_activations,
)
from tl_sparse.hooks import gates as gates_module
from tl_sparse.network.config import SparseConfig

EXAMPLES = settings(max_examples=60)

SIZES = dict(n_layers=2, d_model=12, n_heads=2, d_head=6, d_mlp=16, d_vocab=24, n_ctx=10)
Q, V, Z = (f"blocks.0.attn.hook_{name}" for name in "qvz")
ATTN_OUT = "blocks.0.hook_attn_out"
NEURON = "blocks.1.mlp.hook_post"
MLP_OUT = "blocks.1.hook_mlp_out"
LAST = "blocks.1.hook_resid_post"
#: Hook points that every model here has, in the order of the forward pass, and the shape of their
#: nodes.
SHAPES = {Q: (2, 6), V: (2, 6), ATTN_OUT: (12,), NEURON: (16,), MLP_OUT: (12,)}


def ours(dtype="float32"):
    config = SparseConfig(**SIZES, abs_topk={"attn_in": 0.5, "mlp_neuron": 0.5}, attn_sinks=True)
    return tl_sparse.create(config, seed=0, device="cpu", dtype=dtype)


def dense():
    """A small model of TransformerLens' own, in which every part matters."""
    model = stock_model(**SIZES)
    # Its biases start at zero and its weights are small.
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(i)
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def state_of(model):
    """What no context may leave changed: modes, flags, weights' versions and every hook."""
    points = model.hook_dict
    return {
        "training": [module.training for module in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "weights": [p._version for p in model.parameters()],
        "hooks": {
            name: ([*map(id, p.fwd_hooks)], [*map(id, p.bwd_hooks)]) for name, p in points.items()
        },
        "torch hooks": {
            name: (list(p._forward_hooks), list(p._forward_pre_hooks), list(p._backward_hooks))
            for name, p in points.items()
        },
        "context level": getattr(model, "context_level", 0),
    }


@pytest.fixture(params=[ours, dense])
def model(request):
    """Each kind of model; whatever a test does to it must leave its state as it was."""
    model = request.param()
    before = state_of(model)
    yield model
    assert state_of(model) == before


def batch(n=3, length=7, seed=0):
    return torch.randint(0, 24, (n, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, tokens=None):
    return model(batch() if tokens is None else tokens)


@torch.no_grad()
def cached(model, names, tokens=None):
    _, cache = model.run_with_cache(batch() if tokens is None else tokens, names_filter=list(names))
    return {name: cache[name] for name in names}


def some_nodes(seed=0, share=0.5, names=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(SHAPES[name], generator=generator) < share for name in names}


def all_nodes(value=True, names=SHAPES):
    return {name: torch.full(SHAPES[name], value) for name in names}


def some_values(seed=0, names=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(SHAPES[name], generator=generator) for name in names}


def gates_of(means, **arguments):
    return NodeGates(means, **(dict(init_bias=0.0, init_scale=0.3, seed=0) | arguments))


@contextlib.contextmanager
def capturing(model, names):
    """Hook name → the tensors that pass there, each able to hold a gradient."""
    seen = {name: [] for name in names}

    def keeper(name):
        def hook_fn(activation, hook):
            if activation.requires_grad:
                activation.retain_grad()
            seen[name].append(activation)
            # a bridge may show a view; what is returned is what the model goes on with
            return activation

        return hook_fn

    with hooked(model, {name: keeper(name) for name in names}):
        yield seen


# What every context has in common: name → how it is opened at one hook point, with a visible effect
# on the logits (but for recording).

CONTEXTS = {
    "hooked": lambda model, name: hooked(model, {name: lambda activation, hook: -activation}),
    "ablating": lambda model, name: ablating(
        model, {name: torch.ones(12) > 0}, {name: torch.ones(12)}
    ),
    "sparse_activations": lambda model, name: sparse_activations(model, {name: 0.25}),
    "recording_means": lambda model, name: recording_means(model, [name]),
    "gates": lambda model, name: gates_of({name: torch.ones(12)}, init_bias=-1).attached(model),
}
every_context = pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)


@every_context
def test_a_context_acts_inside_and_only_there(model, context):
    before = logits(model)
    n_hooks = len(model.hook_dict[ATTN_OUT].fwd_hooks)
    with context(model, ATTN_OUT):
        assert len(model.hook_dict[ATTN_OUT].fwd_hooks) == n_hooks + 1
        inside = logits(model)
    assert torch.equal(logits(model), before)
    if context is CONTEXTS["recording_means"]:
        assert torch.equal(inside, before)
    else:
        assert (inside - before).abs().max() > 1e-3


@every_context
def test_an_exception_takes_the_hooks_off_too(model, context):
    before, state = logits(model), state_of(model)

    def interrupted():
        with context(model, ATTN_OUT):
            logits(model)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interrupted()
    assert state_of(model) == state
    assert torch.equal(logits(model), before)


@every_context
def test_an_unknown_hook_name_names_near_ones_and_leaves_nothing_attached(model, context):
    state = state_of(model)
    with pytest.raises(HookNameError) as error, context(model, "blocks.0.hook_atn_out"):
        pytest.fail("the context opened")
    start, near = str(error.value).split("; near it: ")
    assert start == f"{type(model).__name__} has no hook point 'blocks.0.hook_atn_out'"
    assert ATTN_OUT in near.split(", ")
    assert state_of(model) == state


def test_one_unknown_name_among_good_ones_attaches_nothing(model):
    state = state_of(model)
    nothing = {
        ATTN_OUT: lambda activation, hook: None,
        "blocks.7.hook_attn_out": lambda activation, hook: None,
    }
    with (
        pytest.raises(HookNameError, match=r"no hook point 'blocks\.7\.hook_attn_out'"),
        hooked(model, nothing),
    ):
        pytest.fail("the context opened")
    assert state_of(model) == state


def test_a_name_like_no_other_still_shows_what_names_look_like(model):
    with pytest.raises(HookNameError) as error, hooked(model, {"?": lambda activation, hook: None}):
        pytest.fail("the context opened")
    near = str(error.value).split("; near it: ")[1].split(", ")
    assert len(near) == 3
    assert set(near) <= set(model.hook_dict)


@every_context
def test_hooks_of_the_user_survive(model, context):
    calls = []
    model.add_hook(ATTN_OUT, lambda activation, hook: calls.append("user"))
    with context(model, ATTN_OUT):
        logits(model)
    logits(model)
    assert calls == ["user"] * 2
    model.reset_hooks()


@every_context
def test_modes_and_flags_are_as_before_inside_too(model, context):
    model.train()
    frozen = next(model.parameters())
    frozen.requires_grad_(False)
    state = state_of(model)
    with context(model, ATTN_OUT):
        assert all(module.training for module in model.modules())
        assert state_of(model)["requires_grad"] == state["requires_grad"]
    assert state_of(model) == state
    frozen.requires_grad_(True)
    model.eval()


@every_context
def test_a_context_works_for_the_second_time_too(model, context):
    results = []
    for _ in range(2):
        with context(model, ATTN_OUT):
            results.append(logits(model))
    assert torch.equal(*results)


# hooked


def test_hooked_replaces_what_the_functions_return(model):
    """The last residual stream set to another run's is the other run."""
    other, expected = cached(model, [LAST], batch(seed=1))[LAST], logits(model, batch(seed=1))
    assert not torch.equal(logits(model), expected)
    with hooked(model, {LAST: lambda activation, hook: other}):
        assert torch.equal(logits(model), expected)


def test_hooked_functions_get_activation_and_hook_and_may_return_nothing(model):
    before, seen = logits(model), {}
    with hooked(
        model,
        {
            name: lambda activation, hook, name=name: seen.update({name: activation})
            for name in SHAPES
        },
    ):
        assert torch.equal(logits(model), before)
    clean = cached(model, SHAPES)
    assert {name: activation.shape[2:] for name, activation in seen.items()} == SHAPES
    assert all(torch.equal(seen[name], clean[name]) for name in SHAPES)


# abs_topk and sparse_activations


def topk_by_hand(row, k):
    kept = sorted(range(len(row)), key=lambda i: -abs(row[i]))[:k]
    return [x if i in kept else 0.0 for i, x in enumerate(row)]


@EXAMPLES
@given(
    st.data(), st.integers(1, 6), st.sampled_from([torch.float32, torch.float64, torch.bfloat16])
)
def test_abs_topk_against_sorting(data, k, dtype):
    values = st.lists(
        st.integers(-200, 200), min_size=6, max_size=6, unique_by=abs
    )  # exact in bfloat16, no ties
    rows = data.draw(st.lists(values, min_size=1, max_size=4))
    out = abs_topk(torch.tensor(rows, dtype=dtype), k)
    assert out.dtype == dtype
    assert out.tolist() == [topk_by_hand(row, k) for row in rows]


@EXAMPLES
@given(st.data(), st.integers(1, 8), st.sampled_from([torch.float32, torch.float64, torch.float16]))
def test_abs_topk_keeps_exactly_k_of_equal_magnitudes(data, k, dtype):
    signs = data.draw(st.lists(st.sampled_from([-2.0, -1.0, 1.0, 2.0]), min_size=8, max_size=8))
    out = abs_topk(torch.tensor([signs, signs[::-1]], dtype=dtype), k)
    assert out.count_nonzero(-1).tolist() == [k, k]
    assert out.abs().sum(-1).tolist() == [sum(sorted(map(abs, signs))[-k:])] * 2


def test_abs_topk_lets_gradients_through_kept_entries_only():
    x = torch.tensor([[1.0, -5.0, 3.0, 0.5], [4.0, 2.0, -1.0, 6.0]], requires_grad=True)
    (abs_topk(x, 2) * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
    assert x.grad.tolist() == [[0.0, 2.0, 3.0, 0.0], [1.0, 0.0, 0.0, 4.0]]


@pytest.mark.parametrize("k", [4, 5])
def test_abs_topk_of_everything_is_the_identity(k):
    x = torch.tensor([1.0, -5.0, 0.0, float("inf")])
    assert torch.equal(abs_topk(x, k), x)


@pytest.mark.parametrize("fraction", [0.5, 0.25, 0.1, 1e-9])
def test_sparse_activations_keeps_the_largest_of_all_heads_together(model, fraction):
    clean = cached(model, [Q, ATTN_OUT])
    # One at a time: the second would see what the first changed.
    for name, dim in ((Q, 12), (ATTN_OUT, 12)):
        with sparse_activations(model, {name: fraction}):
            sparse = cached(model, [name])[name]
        k = max(1, int(fraction * dim))
        expected = [topk_by_hand(row, k) for row in clean[name].flatten(2).flatten(0, 1).tolist()]
        assert sparse.shape == clean[name].shape
        assert sparse.flatten(2).flatten(0, 1).tolist() == expected


def test_keeping_everything_is_the_model(model):
    before = logits(model)
    with sparse_activations(model, dict.fromkeys(SHAPES, 1.0)):
        assert torch.equal(logits(model), before)


def test_sparse_activations_at_our_locations_is_the_sparse_architecture():
    """AbsTopK hooked into a dense network computes what AbsTopK in the configuration does."""
    locations = {"attn_q": Q, "attn_v": V, "attn_out": ATTN_OUT}
    for_all = {
        name.replace("blocks.0", f"blocks.{i}"): 0.5
        for name in locations.values()
        for i in range(2)
    }
    plain = tl_sparse.create(SparseConfig(**SIZES), seed=0, device="cpu")
    sparse = tl_sparse.create(
        SparseConfig(**SIZES, abs_topk=dict.fromkeys(locations, 0.5)), seed=0, device="cpu"
    )
    with sparse_activations(plain, for_all):
        assert torch.equal(logits(plain), logits(sparse))
    assert not torch.equal(logits(plain), logits(sparse))


def test_sparse_activations_can_be_trained_through(model):
    with sparse_activations(model, {ATTN_OUT: 0.25}), capturing(model, [ATTN_OUT]) as seen:
        model(batch(), return_type="loss").backward()
    (out,) = seen[ATTN_OUT]
    assert (out.count_nonzero(-1) == 3).all()
    gradients = [p.grad for p in model.blocks[0].attn.parameters() if p.grad is not None]
    assert any(bool(gradient.abs().sum() > 0) for gradient in gradients)


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.01, float("nan")])
def test_impossible_activation_fractions(model, fraction):
    expected = rf"fraction {fraction} at {ATTN_OUT} is not possible; it must be in \(0, 1\]"
    with (
        pytest.raises(ConfigError, match=expected),
        sparse_activations(model, {Q: 0.5, ATTN_OUT: fraction}),
    ):
        pytest.fail("the context opened")


# Means


def batches_of_different_length():
    return [batch(3, 7, seed=0), batch(1, 10, seed=1), batch(5, 2, seed=2)]


def means_by_hand(model, names):
    """In float64, every position of every row counted once."""
    rows = {name: [] for name in names}
    for tokens in batches_of_different_length():
        for name, activation in cached(model, names, tokens).items():
            rows[name].append(activation.double().flatten(0, 1))
    return {name: torch.cat(parts).mean(0) for name, parts in rows.items()}


def test_means_over_batches_of_different_length(model):
    expected = means_by_hand(model, SHAPES)
    means = mean_activations(model, list(SHAPES), iter(batches_of_different_length()))
    assert means.keys() == SHAPES.keys()
    for name, mean in means.items():
        assert mean.shape == SHAPES[name]
        assert mean.dtype == torch.float32
        assert not mean.requires_grad
        torch.testing.assert_close(mean.double(), expected[name], rtol=1e-6, atol=1e-7)


def test_means_need_no_gradients_on_the_way(model):
    """Graphs of a whole corpus would fill the memory."""
    with capturing(model, [MLP_OUT]) as seen:
        mean_activations(model, [Q], batches_of_different_length())
    assert [activation.requires_grad for activation in seen[MLP_OUT]] == [False] * 3
    assert torch.is_grad_enabled()


def test_means_keep_the_models_dtype():
    model = ours("float64")
    means = mean_activations(model, [Q], batches_of_different_length())
    assert means[Q].dtype == torch.float64
    torch.testing.assert_close(means[Q], means_by_hand(model, [Q])[Q], rtol=1e-12, atol=1e-14)


def test_means_do_not_lose_small_values_beside_large_ones(model):
    """2²⁴ once, 1 fourteen times, 0 once: a sum in float32 loses the ones, though the mean fits."""
    values = iter([2.0**24] + [1.0] * 14 + [0.0])
    with hooked(
        model, {MLP_OUT: lambda activation, hook: torch.full_like(activation, next(values))}
    ):
        means = mean_activations(model, [MLP_OUT], [batch(1, 1)] * 16)
    assert means[MLP_OUT].tolist() == [(2**24 + 14) / 16] * 12


def test_means_are_recorded_inside_the_context_only(model):
    first, second = batch(2, 5, seed=3), batch(4, 3, seed=4)
    logits(model, second)
    with recording_means(model, [Q, NEURON]) as means:
        logits(model, first)
    inside = means.result(torch.float32)
    logits(model, second)
    after = means.result(torch.float32)
    for name, activation in cached(model, [Q, NEURON], first).items():
        torch.testing.assert_close(inside[name], activation.mean((0, 1)), rtol=1e-5, atol=1e-7)
        assert torch.equal(inside[name], after[name])


def test_recording_during_training_leaves_loss_and_gradients_as_they_are(model):
    gradients = []
    for context in (contextlib.nullcontext(), recording_means(model, list(SHAPES))):
        with context as means:
            model.zero_grad()
            model(batch(), return_type="loss").backward()
            gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) > 10
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert not any(mean.requires_grad for mean in means.result(torch.float32).values())


def test_means_of_no_batch(model):
    with pytest.raises(DataError, match="means need at least one batch of tokens"):
        mean_activations(model, [Q], iter([]))


# Ablation


def test_ablating_to_means_changes_the_chosen_nodes_only(model):
    """Each hook point by itself, so that the activation before it is that of the whole model."""
    means = mean_activations(model, list(SHAPES), batches_of_different_length())
    clean = cached(model, SHAPES)
    for name, nodes in some_nodes().items():
        with ablating(model, {name: nodes}, means):
            ablated = cached(model, [name])[name]
        assert 0 < nodes.sum() < nodes.numel()
        assert torch.equal(ablated[..., ~nodes], clean[name][..., ~nodes])
        assert torch.equal(ablated[..., nodes], means[name][nodes].expand(3, 7, -1))


def test_ablating_to_zero_is_what_transformer_lens_run_with_hooks_gives(model):
    nodes = some_nodes()

    def zero(name):
        def hook_fn(activation, hook):
            activation = activation.clone()
            activation[:, :, nodes[name]] = 0.0
            return activation

        return hook_fn

    with torch.no_grad():
        expected = model.run_with_hooks(batch(), fwd_hooks=[(name, zero(name)) for name in SHAPES])
    with ablating(model, nodes, {name: torch.zeros(shape) for name, shape in SHAPES.items()}):
        assert torch.equal(logits(model), expected)


def test_a_whole_head(model):
    nodes = {Z: torch.tensor([[False] * 6, [True] * 6])}
    clean = cached(model, [Z])[Z]
    with ablating(model, nodes, {Z: torch.zeros(2, 6)}):
        ablated = cached(model, [Z])[Z]
    assert torch.equal(ablated[:, :, 0], clean[:, :, 0])
    assert not ablated[:, :, 1].any()
    assert clean[:, :, 1].any()


def test_ablating_everything_to_another_run_is_the_other_run(model):
    """Values may differ between rows and positions."""
    other = cached(model, [LAST], batch(seed=1))
    expected = logits(model, batch(seed=1))
    assert not torch.equal(logits(model), expected)
    with ablating(model, {LAST: torch.ones(12, dtype=torch.bool)}, other):
        assert torch.equal(logits(model), expected)


def test_ablating_some_nodes_to_another_run(model):
    clean, other = cached(model, [NEURON]), cached(model, [NEURON], batch(seed=1))
    nodes = some_nodes(names=[NEURON])
    with ablating(model, nodes, other):
        mixed = cached(model, [NEURON])[NEURON]
    for node in range(16):
        source = other if nodes[NEURON][node] else clean
        assert torch.equal(mixed[..., node], source[NEURON][..., node])


def test_ablating_nothing_is_the_model_and_attaches_nothing(model):
    before, state = logits(model), state_of(model)
    with ablating(model, all_nodes(False), some_values()):
        assert state_of(model)["hooks"] == state["hooks"]
        assert torch.equal(logits(model), before)
    with ablating(model, {}, {}):
        assert torch.equal(logits(model), before)


def test_ablating_every_node_at_every_hook_point(model):
    values = some_values()
    with ablating(model, all_nodes(), values):
        ablated = cached(model, SHAPES)
    for name, activation in ablated.items():
        assert torch.equal(activation, values[name].expand_as(activation))


def test_nested_ablations(model):
    """Different nodes add up; at the same node the inner value counts, then the outer again."""
    outer, inner = torch.tensor([True] * 8 + [False] * 4), torch.tensor([False] * 4 + [True] * 8)
    clean = cached(model, [ATTN_OUT])[ATTN_OUT]
    before = logits(model)
    with ablating(model, {ATTN_OUT: outer}, {ATTN_OUT: torch.full((12,), 5.0)}):
        only_outer = logits(model)
        with ablating(model, {ATTN_OUT: inner}, {ATTN_OUT: torch.full((12,), -3.0)}):
            both = cached(model, [ATTN_OUT])[ATTN_OUT]
        back = cached(model, [ATTN_OUT])[ATTN_OUT]
        assert torch.equal(logits(model), only_outer)
    assert torch.equal(both, torch.tensor([5.0] * 4 + [-3.0] * 8).expand_as(both))
    assert torch.equal(back[..., :8], torch.full_like(back[..., :8], 5.0))
    assert torch.equal(back[..., 8:], clean[..., 8:])
    assert torch.equal(logits(model), before)


def test_a_hook_of_the_user_at_the_same_place(model):
    """The user's, added before, acts before; and it still acts after the context."""
    model.add_hook(ATTN_OUT, lambda activation, hook: torch.full_like(activation, 2.0))
    try:
        with ablating(
            model, {ATTN_OUT: torch.tensor([True] + [False] * 11)}, {ATTN_OUT: torch.zeros(12)}
        ):
            inside = cached(model, [ATTN_OUT])[ATTN_OUT]
        outside = cached(model, [ATTN_OUT])[ATTN_OUT]
    finally:
        model.reset_hooks()
    assert torch.equal(inside, torch.tensor([0.0] + [2.0] * 11).expand_as(inside))
    assert torch.equal(outside, torch.full_like(outside, 2.0))


def test_values_of_another_dtype_become_the_models(model):
    with ablating(
        model, all_nodes(names=[MLP_OUT]), {MLP_OUT: torch.full((12,), 0.5, dtype=torch.float64)}
    ):
        ablated = cached(model, [MLP_OUT])[MLP_OUT]
    assert ablated.dtype == torch.float32
    assert torch.equal(ablated, torch.full_like(ablated, 0.5))


def test_no_gradient_reaches_what_is_ablated(model):
    nodes = torch.tensor([True] * 5 + [False] * 7)
    with (
        capturing(model, [ATTN_OUT]) as seen,  # before the ablation
        ablating(model, {ATTN_OUT: nodes}, {ATTN_OUT: torch.zeros(12)}),
    ):
        model(batch(), return_type="loss").backward()
    gradient = seen[ATTN_OUT][0].grad
    assert not gradient[..., nodes].any()
    assert gradient[..., ~nodes].any()


def test_missing_values_are_named(model):
    state = state_of(model)
    expected = f"^no values to ablate with at {Q}, {V}, {ATTN_OUT}, {NEURON}$"
    context = ablating(model, some_nodes(), some_values(names=[MLP_OUT]))
    with pytest.raises(HookNameError, match=expected), context:
        pytest.fail("the context opened")
    assert state_of(model) == state


EVERY_Q = torch.ones(2, 6, dtype=torch.bool)


@pytest.mark.parametrize(
    ("mask", "values", "message"),
    [
        (
            EVERY_Q[0],
            torch.zeros(2, 6),
            r"boolean tensor of \[2, 6\], not .* \[6\]$|float32 of \[2, 6\]$",
        ),
        (
            EVERY_Q.float(),
            torch.zeros(2, 6),
            rf"nodes\['{Q}'\] must be a boolean tensor.*float32 of",
        ),
        (EVERY_Q, torch.zeros(6), rf"at {Q} .* \[2, 6\] or \[batch, pos, 2, 6\], not .* \[6\]$"),
        (EVERY_Q, torch.zeros(2, 6).long(), rf"values\['{Q}'\] must be a float tensor.*int64 of"),
        (EVERY_Q, torch.zeros(7, 2, 6), r"float32 of \[7, 2, 6\]$"),
    ],
)
def test_masks_and_values_that_do_not_fit_each_other_are_refused_at_once(
    model, mask, values, message
):
    state = state_of(model)
    masks, held_at = {V: EVERY_Q, Q: mask}, {V: torch.zeros(2, 6), Q: values}
    with pytest.raises(ArgumentError, match=message), ablating(model, masks, held_at):
        pytest.fail("the context opened")
    assert state_of(model) == state


def test_nodes_of_another_hook_point_are_refused_before_a_run_or_in_it(model):
    """Before it if the shape is known from the configuration, as in our models."""
    nodes, values = {NEURON: torch.ones(12, dtype=torch.bool)}, {NEURON: torch.zeros(12)}
    in_a_run = type(model).__name__ == "TransformerBridge"
    message = rf"mask at {NEURON} must be a boolean tensor of \[16\], not torch.bool of \[12\]"
    if in_a_run:
        message = rf"nodes at {NEURON} is of \[16\], but the mask or the values are of \[12\]"
    run = logits if in_a_run else must_not_run("the model")
    with pytest.raises(ArgumentError, match=message), ablating(model, nodes, values):
        run(model)
    gates = gates_of({ATTN_OUT: torch.zeros(12), NEURON: torch.zeros(12)})
    with pytest.raises(ArgumentError, match=rf"at {NEURON}"), gates.attached(model):
        run(model)


def test_values_of_another_batch_are_named(model):
    nodes = {LAST: torch.ones(12, dtype=torch.bool)}
    message = r"are of \[2, 7, 12\], but the activation of this run is of \[3, 7, 12\]"
    with (
        ablating(model, nodes, {LAST: torch.zeros(2, 7, 12)}),
        pytest.raises(ArgumentError, match=message),
    ):
        logits(model)


def test_gates_name_the_values_that_are_missing(model):
    gates = gates_of(some_values())
    message = f"^no values for the gates at {Q}, {V}, {ATTN_OUT}, {NEURON}$"
    context = gates.attached(model, values=some_values(names=[MLP_OUT]))
    with pytest.raises(HookNameError, match=message), context:
        pytest.fail("the context opened")


@pytest.mark.parametrize("ablated", [True, False])
def test_an_unknown_name_is_an_error_whatever_is_ablated_there(model, ablated):
    nodes, values = (
        {"blocks.0.hook_atn_out": torch.tensor([ablated])},
        {"blocks.0.hook_atn_out": torch.zeros(1)},
    )
    expected = "no hook point 'blocks.0.hook_atn_out'; near it: .*blocks.0.hook_attn_out"
    with pytest.raises(HookNameError, match=expected), ablating(model, nodes, values):
        pytest.fail("the context opened")


# Gates


def set_tau(gates, kept):
    with torch.no_grad():
        gates.tau.copy_(torch.cat([(2.0 * kept[name] - 1).flatten() for name in gates.index]) * 0.7)


def test_open_gates_are_the_model_exactly(model):
    before = logits(model)
    with gates_of(some_values(), init_bias=1.0, init_scale=0.0).attached(model):
        assert torch.equal(logits(model), before)


def test_closed_gates_are_mean_ablation_exactly(model):
    means = mean_activations(model, list(SHAPES), batches_of_different_length())
    with ablating(model, all_nodes(), means):
        expected = logits(model)
    with gates_of(means, init_bias=-1.0, init_scale=0.0).attached(model):
        assert torch.equal(logits(model), expected)


def test_gates_are_ablation_of_what_they_do_not_keep(model):
    means = some_values()
    gates = gates_of(means)
    kept = some_nodes()
    set_tau(gates, kept)
    assert all(torch.equal(gates.kept()[name], kept[name]) for name in SHAPES)
    with ablating(model, {name: ~nodes for name, nodes in kept.items()}, means):
        expected = logits(model)
    with gates.attached(model):
        assert torch.equal(logits(model), expected)


def test_a_gate_at_exactly_zero_is_closed(model):
    gates = gates_of({ATTN_OUT: torch.full((12,), 3.0)}, init_bias=0.0, init_scale=0.0)
    assert not gates.kept()[ATTN_OUT].any()
    assert gates.expected_size().item() == 0
    with gates.attached(model):
        activation = cached(model, [ATTN_OUT])[ATTN_OUT]
    assert torch.equal(activation, torch.full_like(activation, 3.0))


def surrogate_slope(tau, temperature):
    """σ'(τ/T)/T, by exponentials."""
    return torch.exp(-tau / temperature) / (1 + torch.exp(-tau / temperature)) ** 2 / temperature


@pytest.mark.parametrize("temperature", [1.0, 0.3, 2.3])
def test_the_gradient_of_tau_by_hand(model, temperature):
    """Σ grad · (x − mean) · σ'(τ/T)/T over batch and position; x has a gradient where open."""
    means = some_values()
    gates = gates_of(means, temperature=temperature)
    with (
        capturing(model, SHAPES) as before,
        gates.attached(model),
        capturing(model, SHAPES) as after,
    ):
        model(batch(), return_type="loss").backward()
    slopes = gates.at_nodes(surrogate_slope(gates.tau.detach().double(), temperature))
    gradients = gates.at_nodes(gates.tau.grad)
    for name, kept in gates.kept().items():
        (x,), (gated,) = before[name], after[name]
        by_hand = (gated.grad.double() * (x.detach().double() - means[name])).sum((0, 1)) * slopes[
            name
        ]
        scale = by_hand.abs().max()
        assert scale > 1e-5
        torch.testing.assert_close(gradients[name].double(), by_hand, rtol=1e-4, atol=1e-5 * scale)
        assert torch.equal(x.grad, torch.where(kept, gated.grad, 0.0))
        assert 0 < kept.sum() < kept.numel()


def test_gradients_against_autograd_on_a_straight_through_gate():
    """The same in float64 with the gate (τ > 0) + σ(τ/T) − σ(τ/T).detach(), for all weights."""
    model = ours("float64")
    means = {name: mean.double() for name, mean in some_values().items()}
    gates = gates_of(means, temperature=0.7)
    assert gates.tau.dtype == torch.float64
    tau = gates.tau.detach().clone().requires_grad_(True)

    def straight_through(name):
        def hook_fn(activation, hook):
            soft = torch.sigmoid(gates.at_nodes(tau)[name] / 0.7)
            gate = (gates.at_nodes(tau)[name] > 0) + soft - soft.detach()
            return gate * activation + (1 - gate) * means[name]

        return hook_fn

    results = []
    for context in (
        gates.attached(model),
        hooked(model, {name: straight_through(name) for name in SHAPES}),
    ):
        model.zero_grad()
        with context:
            loss = model(batch(), return_type="loss")
        loss.backward()  # the context is over: the graph holds all it needs
        results.append((loss, {name: p.grad for name, p in model.named_parameters()}))
    (loss, gradients), (expected_loss, expected) = results
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(gates.tau.grad, tau.grad, rtol=1e-9, atol=1e-13)
    assert (gates.tau.grad != 0).float().mean() > 0.8
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-9, atol=1e-13)


def test_each_forward_pass_reaches_tau(model):
    """Two passes in one backward pass give the sum of their gradients."""
    gates = gates_of(some_values())
    separate = []
    with gates.attached(model):
        for seed in range(2):
            gates.tau.grad = None
            model(batch(seed=seed), return_type="loss").backward()
            separate.append(gates.tau.grad.clone())
        gates.tau.grad = None
        sum(model(batch(seed=seed), return_type="loss") for seed in range(2)).backward()
    torch.testing.assert_close(gates.tau.grad, separate[0] + separate[1], rtol=1e-5, atol=1e-8)


def test_gates_learn_on_a_frozen_model(model):
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    gates = gates_of(
        some_values(), init_bias=-0.1, init_scale=0.0
    )  # all closed: they can still reopen
    with gates.attached(model):
        model(batch(), return_type="loss").backward()
    for parameter in model.parameters():
        assert parameter.grad is None
        parameter.requires_grad_(True)
    assert gates.at_nodes(gates.tau.grad)[MLP_OUT].abs().min() > 0


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_expected_size_by_hand(temperature):
    gates = gates_of({Q: torch.zeros(2, 2), NEURON: torch.zeros(2)}, temperature=temperature)
    with torch.no_grad():
        gates.tau.copy_(torch.tensor([0.5, -0.5, 0.0, 1.0, 0.01, -1.0]))
    size = gates.expected_size()
    assert size.shape == ()
    assert size.item() == 3
    (2.0 * size).backward()
    torch.testing.assert_close(gates.tau.grad, 2 * surrogate_slope(gates.tau.detach(), temperature))
    if temperature == 1.0:  # σ'(0) = 1/4, σ'(1) = e/(1+e)²
        assert gates.tau.grad[2].item() == pytest.approx(0.5)
        assert gates.tau.grad[3].item() == pytest.approx(2 * 0.19661193)


def test_clamp():
    gates = gates_of({Q: torch.zeros(2, 3)})
    with torch.no_grad():
        gates.tau.copy_(torch.tensor([1.5, -1.5, 0.3, -0.3, 1.0, -1.0]))
    gates.clamp()
    torch.testing.assert_close(
        gates.tau.detach(), torch.tensor([1.0, -1.0, 0.3, -0.3, 1.0, -1.0]), rtol=0, atol=0
    )
    assert gates.tau.requires_grad


def test_initial_gates():
    means = {NEURON: torch.zeros(4000)}
    random_state = torch.get_rng_state()
    tau = gates_of(means, init_bias=0.1, init_scale=0.2).tau.detach()
    assert torch.equal(torch.get_rng_state(), random_state)
    assert tau.mean().item() == pytest.approx(0.1, abs=0.02)
    assert tau.std().item() == pytest.approx(0.2, abs=0.02)
    wide = gates_of(means, init_bias=0.4, init_scale=2.0).tau
    assert (wide.min().item(), wide.max().item()) == (-1.0, 1.0)
    assert (gates_of(means, init_bias=0.25, init_scale=0.0).tau == 0.25).all()


def test_the_seed_decides_the_initial_gates():
    means = some_values()
    assert torch.equal(gates_of(means, seed=3).tau, gates_of(means, seed=3).tau)
    assert not torch.equal(gates_of(means, seed=3).tau, gates_of(means, seed=4).tau)


def test_gates_as_a_module():
    """One parameter to optimise; the means are copies."""
    means = some_values()
    gates = gates_of(means)
    assert [(name, p.shape) for name, p in gates.named_parameters()] == [
        ("tau", (12 + 12 + 12 + 16 + 12,))
    ]
    assert {name: mean.shape for name, mean in gates.means.items()} == SHAPES
    assert all(torch.equal(gates.means[name], mean) for name, mean in means.items())
    only = {Q: means[Q].clone()}
    copied = gates_of(only)
    only[Q].zero_()
    assert torch.equal(copied.means[Q], means[Q])


def test_each_node_has_a_gate_of_its_own():
    gates = gates_of(some_values())
    numbers = torch.cat([index.flatten() for index in gates.index.values()])
    assert numbers.tolist() == list(range(len(gates.tau)))
    assert {name: part.shape for name, part in gates.at_nodes(gates.tau).items()} == SHAPES


# Tied gates, values of another run, the model without the circuit

K = "blocks.0.attn.hook_k"


def straight_through(gates, tau, values, temperature, inverted):
    """The gates of A.5 as autograd sees them: a Heaviside step forward, σ(τ/T) backward."""

    def at(name):
        def hook_fn(activation, hook):
            soft = torch.sigmoid(tau[gates.index[name]] / temperature)
            gate = (tau[gates.index[name]] > 0) + soft - soft.detach()
            gate = 1 - gate if inverted else gate
            return gate * activation + (1 - gate) * values[name]

        return hook_fn

    return {name: at(name) for name in gates.index}


@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("per_element", [False, True], ids=["means", "values"])
@pytest.mark.parametrize("tied", [None, {K: Q}], ids=["untied", "tied"])
def test_gates_and_their_gradients_by_the_formula(tied, per_element, inverted):
    model = ours("float64")
    shapes = {name: cached(model, [name])[name].shape for name in (ATTN_OUT, Q, K, NEURON, MLP_OUT)}
    generator = torch.Generator().manual_seed(3)
    random = {
        name: torch.randn(shape, generator=generator).double() for name, shape in shapes.items()
    }
    means = {name: value[0, 0] for name, value in random.items()}
    gates = gates_of(means, tied=tied, temperature=0.7)
    assert len(gates.tau) == sum(mean.numel() for mean in means.values()) - (
        means[K].numel() if tied else 0
    )
    values = random if per_element else means
    tau = gates.tau.detach().clone().requires_grad_(True)
    losses = []
    contexts = (
        gates.attached(model, inverted, values if per_element else None),
        hooked(model, straight_through(gates, tau, values, 0.7, inverted)),
    )
    for context in contexts:
        with context:
            losses.append(model(batch(), return_type="loss"))
        losses[-1].backward()
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=0)
    torch.testing.assert_close(gates.tau.grad, tau.grad, rtol=1e-9, atol=1e-13)
    assert all(part.abs().max() > 1e-9 for part in gates.at_nodes(tau.grad).values())


@pytest.mark.parametrize("per_element", [False, True])
def test_infinite_values_behind_a_gate_are_not_seen(per_element):
    """0 · inf is NaN; a closed gate gives its value whatever is behind it, and the reverse."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, generator=generator)
    x[0, 1, 0], x[1, 2, 0] = torch.inf, torch.nan  # where the gate is closed
    x.requires_grad_()
    tau = torch.tensor([-0.5, 0.5, -0.5, 0.5], requires_grad=True)
    value = torch.tensor([1.0, torch.inf, 2.0, torch.nan])  # where the gate is open
    if per_element:
        value = value.expand(2, 3, 4).contiguous()
    opening = gates_module._open(tau, temperature=1.0)
    gated = gates_module._Gate.apply(x, opening, value)
    assert torch.equal(gated, torch.where(tau > 0, x, value))
    gated.sum().backward()
    assert torch.equal(x.grad, (tau > 0).float().expand(2, 3, 4))
    assert tau.grad.isfinite().all()


@pytest.mark.parametrize("inverted", [False, True])
def test_gates_hold_each_prompt_at_values_of_its_own(model, inverted):
    """As `ablating` does with activations of another run."""
    gates, kept = gates_of(some_values()), some_nodes()
    set_tau(gates, kept)
    other = cached(model, SHAPES, batch(seed=1))
    nodes = kept if inverted else {name: ~mask for name, mask in kept.items()}
    with ablating(model, nodes, other):
        expected = logits(model)
    with gates.attached(model, inverted=inverted, values=other):
        assert torch.equal(logits(model), expected)
    assert not torch.equal(logits(model), expected)


def test_inverted_gates_are_ablation_of_what_they_keep(model):
    gates, kept, means = gates_of(some_values()), some_nodes(), some_values()
    set_tau(gates, kept)
    with ablating(model, kept, means):
        expected = logits(model)
    with gates.attached(model, inverted=True):
        assert torch.equal(logits(model), expected)


def test_both_nodes_follow_the_gate_they_share(model):
    values = {
        name: torch.randn(SHAPES[Q], generator=torch.Generator().manual_seed(1)) for name in (Q, K)
    }
    gates = gates_of(values, tied={K: Q})
    assert torch.equal(gates.index[Q], gates.index[K])
    assert len(gates.tau) == values[Q].numel()
    assert gates.kept()[Q].any()
    assert not gates.kept()[Q].all()
    for flip in (1, -1):
        with torch.no_grad():
            gates.tau.mul_(flip)
        expected = (gates.tau > 0).view(SHAPES[Q])
        assert torch.equal(gates.kept()[Q], expected)
        assert torch.equal(gates.kept()[K], expected)
        with gates.attached(model):
            seen = cached(model, [Q, K])
        for name in (Q, K):
            held = seen[name] == values[name]
            assert torch.equal(held.all(0).all(0), ~expected), name
    assert gates.expected_size().item() == int(
        expected.sum()
    )  # a gate is counted once, not for each of its nodes


def test_the_gradient_of_a_shared_gate_is_the_sum_of_its_nodes(model):
    values = {
        name: torch.randn(SHAPES[Q], generator=torch.Generator().manual_seed(1)) for name in (Q, K)
    }
    tied, untied = gates_of(values, tied={K: Q}), gates_of(values)
    with torch.no_grad():
        untied.tau.copy_(torch.cat([tied.tau, tied.tau]))
    for gates in (tied, untied):
        with gates.attached(model):
            model(batch(), return_type="loss").backward()
    parts = untied.at_nodes(untied.tau.grad)
    torch.testing.assert_close(
        tied.at_nodes(tied.tau.grad)[Q], parts[Q] + parts[K], rtol=1e-4, atol=1e-7
    )
    assert parts[K].abs().max() > 1e-6


def test_the_gates_with_the_highest_tau_are_opened():
    gates = gates_of({MLP_OUT: torch.zeros(4)}, init_bias=0.0, init_scale=0.0)
    gates.tau.data = torch.tensor([-0.4, -0.1, -0.2, -0.3])
    assert gates.openings().tolist() == [0, 0, 0, 0]
    assert gates.openings(2).tolist() == [0, 1, 1, 0]
    assert gates.openings(0).tolist() == [0, 0, 0, 0]
    assert gates.openings(4).tolist() == [1, 1, 1, 1]
    # The gradient is that of sigmoid(τ - threshold): here σ'(0.2), σ'(0.1), σ'(0) for the gate that
    # is the threshold, and σ'(-0.1).
    gates.openings(2).sum().backward()
    distances = torch.tensor([-0.1, 0.2, 0.1, 0.0])
    soft = torch.sigmoid(distances)
    torch.testing.assert_close(gates.tau.grad, soft * (1 - soft))


def test_more_gates_cannot_be_opened_than_there_are():
    gates = gates_of({MLP_OUT: torch.zeros(4)}, init_bias=0.0, init_scale=0.0)
    with pytest.raises(ConfigError, match="must be at least 0 and at most 4"):
        gates.openings(5)


def test_given_openings_take_the_place_of_tau(model):
    gates = gates_of(some_values(), init_bias=1.0, init_scale=0.0)
    kept = some_nodes()
    openings = gates.of_nodes(kept).float().requires_grad_()
    assert all(torch.equal(mask, kept[name]) for name, mask in gates.at_nodes(openings > 0).items())
    with ablating(model, {name: ~mask for name, mask in kept.items()}, gates.means):
        expected = logits(model)
    with gates.attached(model, openings=openings):
        assert torch.equal(logits(model), expected)
        model(batch(), return_type="loss").backward()
    assert openings.grad.abs().max() > 0
    assert gates.tau.grad is None


def test_openings_of_another_number_of_gates_are_refused(model):
    gates = gates_of(some_values(), init_bias=1.0, init_scale=0.0)
    context = gates.attached(model, openings=torch.ones(3))
    with pytest.raises(ArgumentError, match=r"openings have the shape \[3\]; there are"), context:
        pass
