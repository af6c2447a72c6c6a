"""The tokens that tell the prompts of pairs apart."""

import pytest

from micro import VOCABULARY, micro_data, micro_model
from tl_sparse.tasks import telling_tokens

pytestmark = pytest.mark.any_line


def test_the_answers_cause_tells_and_fillers_do_not():
    model = micro_model()
    assert set(telling_tokens(micro_data(model))) == {VOCABULARY["A"], VOCABULARY["B"]}


def test_rare_differences_and_padding_do_not_count():
    model = micro_model()
    data = micro_data(model, n_pairs=20)
    data.tokens[0, 1] = VOCABULARY["yes"]  # in one of twenty pairs
    data.tokens[:, -1] = VOCABULARY["no"]
    data.last[:] = data.tokens.shape[1] - 2
    assert set(telling_tokens(data)) == {VOCABULARY["A"], VOCABULARY["B"]}
