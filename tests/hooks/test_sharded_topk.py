"""The top-k of weights that are spread over processes; the processes are threads here."""

import threading
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_sparse.errors import UnsupportedError
from tl_sparse.hooks import GroupedWeight, MatrixLayout, WeightGroup
from tl_sparse.hooks import groups as groups_module
from tl_sparse.hooks.sharded_topk import zero_all_but_selected
from tl_sparse.hooks.shards import Shard, exchange_of

pytestmark = pytest.mark.any_line


class SharedMemory:
    """The exchange of threads, each of which stands for a process."""

    def __init__(self, n):
        self.barrier = threading.Barrier(n)
        self.parts = [None] * n

    def of(self, rank):
        return _Exchange(self, rank)


class _Exchange:
    def __init__(self, memory, rank):
        self.memory = memory
        self.rank = rank

    def _all(self, part):
        self.memory.parts[self.rank] = part
        self.memory.barrier.wait(10)
        parts = [each.clone() for each in self.memory.parts]
        self.memory.barrier.wait(10)
        return parts

    def total(self, counts):
        return torch.stack(self._all(counts)).sum(0)

    def collected(self, part):
        return torch.cat(self._all(part), dim=-1)


def project_in_parts(groups, fraction, minimum, n):
    """Project the groups as `n` processes would, each of which holds what FSDP2 gives it."""
    selections = []
    for rank in range(n):

        def part(weight, rank=rank):
            length = -(-len(weight) // n)
            return Shard(
                weight[rank * length : (rank + 1) * length], min(rank * length, len(weight))
            )

        with mock.patch.object(groups_module, "shard_of", part):
            selections.append([group.selection(fraction, minimum) for group in groups])
    memory = SharedMemory(n)
    with ThreadPoolExecutor(n) as pool:
        ranks = range(n)
        list(pool.map(zero_all_but_selected, selections, map(memory.of, ranks)))


def copied(groups):
    """The same groups with weights of their own."""
    copies = []
    for group in groups:
        bands = []
        for band in group.bands:
            bands.append(tuple(GroupedWeight(each.weight.clone(), each.layout) for each in band))
        copies.append(WeightGroup(group.name, tuple(bands), protected=group.protected))
    return copies


BY_HEAD = MatrixLayout(rows=(0, 2), columns=(1,))
FROM_HEAD = MatrixLayout(rows=(0, 1), columns=(2,))
BY_NEURON = MatrixLayout(rows=(1,), columns=(0,))
AS_STORED = MatrixLayout(rows=(0,), columns=(1,))


def groups_of(draw_weight, dtype):
    """QKV with positions, W_O, W_in with positions, an embedding and a bias."""

    def weight(*shape):
        return draw_weight(shape).to(dtype)

    def band(layout, *shapes):
        return tuple(GroupedWeight(weight(*shape), layout) for shape in shapes)

    qkv = (band(BY_HEAD, (2, 5, 3), (2, 1, 3)), band(BY_HEAD, (2, 5, 3), (2, 1, 3)))
    return [
        WeightGroup("QKV", qkv),
        WeightGroup("W_O", (band(FROM_HEAD, (2, 3, 5)),)),
        WeightGroup("W_in", (band(BY_NEURON, (5, 4), (1, 4)),)),
        WeightGroup("W_U", (band(AS_STORED, (5, 7)),), protected=False),
        WeightGroup("b", (band(MatrixLayout(rows=(), columns=(0,)), (7,)),), protected=False),
    ]


def assert_same_bits(found, expected):
    for group, other in zip(found, expected, strict=True):
        for weight, wanted in zip(group.parameters, other.parameters, strict=True):
            assert torch.equal(weight.view(torch.uint8), wanted.view(torch.uint8)), group.name


@settings(max_examples=25)
@given(
    seed=st.integers(0, 1000),
    n_values=st.sampled_from([1, 2, 4, 1000]),
    fraction=st.floats(0, 0.999),
    minimum=st.integers(0, 7),
    n=st.integers(1, 4),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_any_number_of_processes_keeps_the_same_weights(
    seed, n_values, fraction, minimum, n, dtype
):
    """With few values, ties and zeros of both signs are everywhere."""
    generator = torch.Generator().manual_seed(seed)

    def draw(shape):
        magnitudes = torch.randint(0, n_values + 1, shape, generator=generator) / n_values
        return magnitudes * (torch.randint(0, 2, shape, generator=generator) * 2 - 1)

    parts = groups_of(draw, dtype)
    expected = copied(parts)
    for group in expected:
        group.project(fraction, minimum)
    project_in_parts(parts, fraction, minimum, n)
    assert_same_bits(parts, expected)


def one_matrix(values, protected=False):
    weight = torch.tensor(values)
    return WeightGroup("W", ((GroupedWeight(weight, AS_STORED),),), protected=protected), weight


def test_of_equal_weights_the_first_are_kept():
    """Rows 0 and 1 are with the first process, row 2 with the second."""
    for n in (1, 2, 3):
        group, weight = one_matrix([[1.0, 2.0, -1.0], [1.0, 0.5, 1.0], [-1.0, 1.0, 3.0]])
        project_in_parts([group], 5 / 9, 0, n)
        assert weight.tolist() == [[1.0, 2.0, -1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 3.0]]


def test_a_process_without_any_of_the_weights():
    for n in (3, 5):
        group, weight = one_matrix([[0.1, -4.0], [3.0, 0.2]], protected=True)
        project_in_parts([group], 0.25, 1, n)
        assert weight.tolist() == [[0.0, -4.0], [3.0, 0.0]]


def test_infinity_and_no_number_are_the_largest():
    group, weight = one_matrix([[float("inf"), 2.0], [3.0, float("nan")], [4.0, 1.0]])
    project_in_parts([group], 0.5, 0, 2)
    assert weight.nan_to_num(nan=7, posinf=8).tolist() == [[8.0, 0.0], [0.0, 7.0], [4.0, 0.0]]


def test_no_groups():
    project_in_parts([], 0.5, 0, 2)


def test_weights_of_which_only_some_are_sharded_are_refused(monkeypatch):
    weights = [torch.ones(2), torch.zeros(2)]
    monkeypatch.setattr("tl_sparse.hooks.shards.is_sharded", lambda weight: bool(weight.any()))
    with pytest.raises(UnsupportedError, match="1 of 2 weights are sharded over processes"):
        exchange_of(weights)
