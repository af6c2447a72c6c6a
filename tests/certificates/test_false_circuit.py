"""A circuit that is right for a wrong reason, worked out on paper: its certificate says so.

Beside the path of `micro`, which writes a to channel 2, the second value channel writes -3 a there,
and a to channel 3, from which the MLP gives channel 2 its 3 a back. The model is as good as without
these. The circuit of the first path leaves both errors out, and they cancel as long as both are
held: if the value channel is left as it is, and the MLP is held, channel 2 has -2 a.
"""

import math
from dataclasses import replace

import pytest
import torch

from micro import LOSS, MICRO_TASK, W_O, W_U, W_V, WRITTEN, micro_circuit, micro_corpus, micro_model
from tl_sparse.certificates import certifying
from tl_sparse.certificates.certifying import certify
from tl_sparse.certificates.efforts import QUICK
from tl_sparse.certificates.text import certificate_text

pytestmark = pytest.mark.any_line


@pytest.fixture(scope="module")
def model():
    model = micro_model()
    block = model.blocks[0]
    with torch.no_grad():
        block.attn.W_V[0, 0, 1] = W_V
        block.attn.W_O[0, 1, 2] = -3 * W_O
        block.attn.W_O[0, 1, 3] = W_O
        # The norm before the MLP divides by the root mean square of (0, 1, -2 a, a).
        norm = math.sqrt((1 + 5 * WRITTEN**2) / 4)
        for neuron, sign in enumerate((1.0, -1.0)):
            block.mlp.W_in[3, neuron] = sign
            block.mlp.W_out[neuron, 2] = 3 * norm * sign
    return model


@pytest.fixture(scope="module")
def certificate(model):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(certifying, "QUICK", replace(QUICK, pairs=8, subset_pairs=2, budgets=[1]))
        sections = [each for each in certifying.SECTIONS if each.name in ("sufficiency", "inside")]
        patch.setattr(certifying, "SECTIONS", sections)
        return certify(
            micro_circuit(model),
            model,
            MICRO_TASK,
            corpus=micro_corpus(),
            quick=True,
            progress=False,
        )


def test_it_is_as_good_as_the_model_while_all_others_are_held(certificate):
    measured = certificate.sufficiency
    # Channel 3, which is not in the circuit, makes the last norm of the full model larger.
    full_norm = math.sqrt((1 + 2 * WRITTEN**2) / 4)
    full_loss = math.log1p(math.exp(-2 * W_U * WRITTEN / full_norm))
    assert measured.evaluation.full.loss == pytest.approx(full_loss, rel=1e-3)
    assert measured.alone.loss == pytest.approx(LOSS, rel=1e-3)


def test_the_certificate_says_that_its_errors_cancel(certificate):
    measured = certificate.sufficiency
    assert measured.subsets.worst.accuracy == 0.0
    # One node suffices for the adversary: the second value channel.
    assert measured.attacks[0].adversary.n_left == 1
    assert measured.attacks[0].adversary.score.accuracy == 0.0
    text = " ".join(certificate_text(certificate).split())
    assert "the circuit rests on errors that" in text
    assert "No: an adversary with at most 1 node raises the loss" in text
    assert "False:" not in text
    results = {criterion.code: criterion.result for criterion in certificate.verdict}
    assert results["I2"] == "met"
    assert results["C1"] == "not met"
    assert results["I4"] == "not met"


def test_inside_the_value_has_the_wrong_sign(certificate):
    (written,) = [node for node in certificate.inside.nodes if node.node == "0.attn_out 2"]
    assert written.correlation.value < 0
