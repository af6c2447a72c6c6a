"""What writes nothing that a search keeps is no longer run."""

import pytest
import torch

from helpers import stock_model
from micro import MICRO_TASK, NODES, QUICK_SETTINGS, micro_corpus, micro_model
from tl_sparse.hooks.gates import NodeGates
from tl_sparse.network.blocks import MLP, Attention
from tl_sparse.pruning import settled
from tl_sparse.pruning.config import PruneConfig
from tl_sparse.pruning.pruner import prune
from tl_sparse.pruning.settled import SETTLED_STEPS, SettledWrites

pytestmark = pytest.mark.any_line
ATTN_OUT, MLP_OUT = "blocks.0.hook_attn_out", "blocks.0.hook_mlp_out"


def closed_gates():
    means = {name: torch.zeros(3) for name in (ATTN_OUT, "blocks.0.mlp.hook_post", MLP_OUT)}
    return NodeGates(means, init_bias=-0.5, init_scale=0.0, seed=0)


def test_writes_are_settled_when_they_have_been_closed_for_long():
    gates = closed_gates()
    writes = SettledWrites(micro_model(), gates, PruneConfig())
    for step in range(SETTLED_STEPS):
        assert writes.hook_names == []
        if step == 3:
            gates.tau.data[gates.index[MLP_OUT][1]] = 0.5
        writes.update()
        gates.tau.data.fill_(-0.5)
    assert writes.hook_names == [ATTN_OUT]
    for _ in range(4):
        writes.update()
    assert writes.hook_names == [ATTN_OUT, MLP_OUT]


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (micro_model, {"robust": "subsets"}),
        (micro_model, {"method": "any_size"}),
        (micro_model, {"ablation": "resample"}),
        (stock_model, {}),
    ],
)
def test_nothing_settles_where_all_of_the_model_runs(make, settings):
    writes = SettledWrites(make(), closed_gates(), PruneConfig(**settings))
    for _ in range(2 * SETTLED_STEPS):
        writes.update()
    assert writes.hook_names == []


def test_a_search_runs_only_what_may_write_for_the_circuit(monkeypatch):
    """The MLP of the micro model writes nothing, and after some steps all its gates are closed."""
    runs = {Attention: 0, MLP: 0}

    def counting(kind, run):
        def counted(module, *args):
            runs[kind] += 1
            return run(module, *args)

        return counted

    for kind in runs:
        monkeypatch.setattr(kind, "forward", counting(kind, kind.forward))
    counts = []
    for steps in (5, 10**6):
        monkeypatch.setattr(settled, "SETTLED_STEPS", steps)
        runs.update({Attention: 0, MLP: 0})
        circuit, _ = prune(micro_model(), MICRO_TASK, micro_corpus(), QUICK_SETTINGS, False)
        assert list(circuit.node_names) == NODES
        counts.append(dict(runs))
    assert counts[0][Attention] == counts[1][Attention]
    assert counts[0][MLP] <= counts[1][MLP] - 5
