"""What the search finds in values that are made from a known expression."""

import pytest
import torch

from tl_sparse.circuits.nodes import Node
from tl_sparse.explanations.fitting import Target, best
from tl_sparse.explanations.measures import fit_of, two_levels
from tl_sparse.explanations.names import name_of
from tl_sparse.explanations.parsing import Vocabulary, parse
from tl_sparse.explanations.samples import Sample
from tl_sparse.explanations.search import search
from tl_sparse.explanations.sequences import Sequences, values_of
from tl_sparse.explanations.structure import Wiring
from tl_sparse.explanations.tables import position_functions, token_tables

pytestmark = pytest.mark.any_line

TEXTS = ["<s>", "'", '"', "(", ")", "\n", ",", *[f"w{i}" for i in range(23)]]
VOCABULARY = Vocabulary.of_texts(TEXTS)
NODE = Node(0, "mlp_neuron", 0)


def target_of(text, noise=0.0, n_seq=40, n_pos=24):
    """Values of an expression on random sequences, as if a node had them."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, len(TEXTS), (n_seq, n_pos), generator=generator)
    tokens[:, 0] = 0
    sequences = Sequences(tokens, torch.ones_like(tokens, dtype=torch.bool), VOCABULARY)
    values = values_of(parse(text, VOCABULARY), sequences)
    values = values + noise * torch.randn(values.shape, generator=generator, dtype=torch.float64)
    return Target.of_node(NODE, [Sample("text", sequences, {NODE: values}, {})])


def found(text, noise=0.0):
    target = target_of(text, noise)
    wiring = Wiring(None, None, {}, {})
    return best(search(target, NODE, wiring, VOCABULARY))


@pytest.mark.parametrize(
    "text",
    [
        'inside("\'")',
        'depth("(")',
        "repeated",
        "position",
        'previous == "("',
        'line_start == "("',
    ],
)
def test_one_term_is_found_again(text):
    expression = found(f"1 + 2 * ({text})").expression
    assert str(parse(text, VOCABULARY)) in str(expression)
    assert expression.size <= parse(f"1 + 2 * ({text})", VOCABULARY).size + 1


def test_the_last_of_two_sets_is_found_again():
    last = found('1 + 2 * last({"\'"}, {"\\""})')
    assert last.score > 0.999
    assert "last(" in str(last.expression)


def test_terms_are_joined():
    both = found('3 * (inside("\'") and not seen({"("}))')
    assert both.score > 0.9
    assert "and" in str(both.expression)
    linear = found('2 * depth("(") - 5 * inside("\'")', noise=0.01)
    assert linear.score > 0.99
    assert linear.expression.size <= 10


def test_noise_has_no_expression():
    assert found("0 * position", noise=1.0).score < 0.2


def test_tables_of_tokens_have_the_fewest_tokens():
    target = target_of('7 if token in {"w1", "w2"} else -3 if token == "w3" else 1')
    best_table = best(token_tables(target, "token", VOCABULARY), 0.99)
    assert (
        str(best_table.expression) == '7 if token in {"w1", "w2"} else -3 if token == "w3" else 1'
    )


def test_functions_of_the_position_are_found_in_pieces():
    target = target_of("2 * position if position < 10 else 7 if position < 20 else 0")
    best_function = best(position_functions(target), 0.99)
    assert best_function.score == pytest.approx(1)
    assert best_function.expression.size <= 13


def test_measures_by_hand():
    values = torch.tensor([0.0, 0.0, 0.0, 4.0])
    levels = two_levels(values)
    assert (levels.low, levels.high, levels.threshold, levels.explained) == (0, 4, 2, 1)
    fit = fit_of(torch.tensor([0.0, 0.0, 3.0, 3.0]), values, levels)
    assert fit.explained == pytest.approx(1 - 2.5 / 3)
    assert fit.balanced_accuracy == pytest.approx((1 + 2 / 3) / 2)
    assert fit.score == fit.balanced_accuracy
    spread = two_levels(torch.arange(4.0))
    assert spread.explained == pytest.approx(0.8)  # 0, 1 against 2, 3
    assert not spread.are_two
    constant = fit_of(torch.ones(3), torch.ones(3), two_levels(torch.ones(3)))
    assert (constant.explained, constant.balanced_accuracy) == (1, None)
    assert fit_of(torch.zeros(3), torch.ones(3), two_levels(torch.ones(3))).score is None


def test_names_are_of_the_tokens_that_tell_prompts_apart():
    """Of the tokens in an expression, those on which the task turns make the better name."""
    expression = parse('3 if token == "w1" else 1 if token in {"w2", "("} else 0', VOCABULARY)
    node = Node(0, "attn_in", 0)
    assert name_of(node, expression, {}, []) == ("read_w1", "w1")
    assert name_of(node, expression, {}, [], {"(", "w9"}) == ("read_open_paren", "open_paren")
