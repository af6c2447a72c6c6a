"""What the measurements of a circuit are compared with, and the circuits that are refused."""

import dataclasses

import pytest

from helpers import tiny_model
from tl_sparse.errors import CircuitError
from tl_sparse.evaluation.baselines import check_measurable, random_circuits_like, without_nodes


def test_random_circuits_differ_and_have_the_same_size_everywhere(circuit):
    drawn = random_circuits_like(circuit, 6, seed=1)
    sizes = {name: int(mask.sum()) for name, mask in circuit.kept.items()}
    assert all({n: int(m.sum()) for n, m in each.kept.items()} == sizes for each in drawn)
    assert len({tuple(each.nodes) for each in drawn}) > 1
    again = random_circuits_like(circuit, 6, seed=1)
    assert [each.nodes for each in again] == [each.nodes for each in drawn]
    assert random_circuits_like(circuit, 0) == []


def test_no_nodes(circuit):
    assert without_nodes(circuit).n_nodes == 0
    assert circuit.n_nodes == 3


def test_circuits_that_cannot_be_measured(circuit, micro):
    check_measurable(circuit, micro)
    with pytest.raises(CircuitError, match="this circuit belongs to the model 'micro'"):
        check_measurable(circuit, tiny_model())
    with pytest.raises(CircuitError, match=r"no means to hold nodes at; circuit\.with_means\("):
        check_measurable(dataclasses.replace(circuit, means={}), micro)
    with pytest.raises(CircuitError, match="has no nodes, so there is nothing to measure"):
        check_measurable(without_nodes(circuit), micro)
