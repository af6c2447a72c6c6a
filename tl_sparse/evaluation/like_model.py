"""Whether a circuit behaves like its model, and is not only right where the model is right."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_sparse.arguments import checked
from tl_sparse.circuits import Circuit
from tl_sparse.config import check
from tl_sparse.errors import DataError
from tl_sparse.evaluation.agreement import Agreement, AgreementSums
from tl_sparse.evaluation.baselines import (
    check_measurable,
    random_circuits_like,
    without_nodes,
)
from tl_sparse.evaluation.estimates import Estimate, mean_of, mean_of_pairs
from tl_sparse.evaluation.holding import holding_nodes
from tl_sparse.evaluation.objectives import divergences
from tl_sparse.evaluation.running import (
    RunContext,
    all_next_token_logits,
    logits_at_all_positions,
)
from tl_sparse.evaluation.scores import Ablation
from tl_sparse.hooks import TLModel
from tl_sparse.precision import in_float32
from tl_sparse.tasks import Partners, TaskData, right_minus_wrong, task_loss_and_accuracy

#: The test of shared errors needs the model to err on at least so many prompts.
LEAST_ERRORS = 5
#: Correlations within answers need so many prompts more than there are kinds of answers.
LEAST_WITHIN = 3
#: The most logits of corpus text that are computed at a time: 64 MiB in float32.
LOGITS_AT_ONCE = 2**24


@dataclass(frozen=True)
class Divergence:
    """How far the distributions of the next token are from the full model's.

    It is the Kullback-Leibler divergence KL(full model ‖ run) in nats. That of the full model from
    itself is 0.

    Attributes:
        circuit: the mean divergence of the circuit.
        no_nodes: that of no circuit at all: every node is held.
        random: the mean over random circuits with as many nodes at each hook point; None if none
            were drawn.
        random_median: the median over these circuits.
        n_distributions: the number of prompts, or of positions of text, of which `circuit` and
            `no_nodes` are means.
    """

    circuit: Estimate
    no_nodes: Estimate
    random: Estimate | None
    random_median: float | None
    n_distributions: int


@dataclass(frozen=True)
class LogitAgreement:
    """How the logit difference of the two answers under the circuit follows the full model's.

    Attributes:
        between_answers: the correlation over prompts of the second answer's logit minus the
            first's. Where both choose rightly, there are two clusters of prompts, one for each
            answer, which alone make it high.
        within_answers: the correlation of the right answer's logit minus the wrong one's, after the
            mean over the prompts with the same two answers and the same right one is taken away.
            The fair number: it shows whether the circuit is surer where the model is surer.
        random_within_answers: the mean of `within_answers` over random circuits of equal size.
            None if none of them varies.
        n_prompts: the number of prompts.
        remark: why a correlation is None; else empty.
    """

    between_answers: Estimate | None
    within_answers: Estimate | None
    random_within_answers: Estimate | None
    n_prompts: int
    remark: str = ""


@dataclass(frozen=True)
class SharedErrors:
    """Whether the circuit chooses wrongly where the full model does.

    Attributes:
        n_prompts: the number of prompts.
        n_model: the number of prompts at which the full model chooses the wrong answer.
        n_circuit: the same for the circuit.
        n_both: the number of prompts at which both do.
        by_chance: how many these would be on average if the circuit's errors fell on any prompts.
        p_value: the probability of `n_both` or more by chance: the upper tail of the hypergeometric
            distribution (Fisher's exact test). A preference for one answer that the circuit shares
            with the model makes it small, too. None if the model makes too few errors to tell.
        remark: why there is no p-value; else empty.
    """

    n_prompts: int
    n_model: int
    n_circuit: int
    n_both: int
    by_chance: float
    p_value: float | None
    remark: str = ""


@dataclass(frozen=True)
class Likeness:
    """How like its model a circuit behaves.

    Attributes:
        task: the divergence of the next-token distributions after the task's prompts.
        corpus: the same at all positions of text from the corpus; None if no text was given.
        logits: how the logit differences agree, prompt by prompt.
        errors: whether the circuit errs where the model errs.
        ablation: the values at which the other nodes were held.
        n_pairs: the number of pairs of prompts.
        n_random: the number of random circuits.
        no_corpus: why `corpus` is None; else empty.
    """

    task: Divergence
    corpus: Divergence | None
    logits: LogitAgreement
    errors: SharedErrors
    ablation: str
    n_pairs: int
    n_random: int
    no_corpus: str = ""


@checked("ablation")
@torch.no_grad()
def likeness(
    circuit: Circuit,
    model: TLModel,
    data: TaskData,
    corpus: Int[Tensor, "seq pos"] | None = None,
    ablation: Ablation = "mean",
    n_random: int = 4,
    batch_size: int = 256,
    seed: int = 0,
) -> Likeness:
    """Measure how like its model a circuit behaves, beside no nodes and random circuits.

    Args:
        data: the prompts of the task.
        corpus: rows of tokens from the corpus; 32 rows of 128 tokens are enough for two digits.
            In resample ablation, the partner of a row is the row before it.
        ablation: the values at which the other nodes are held.
        n_random: the number of random circuits.
        batch_size: the largest number of prompts to run at a time. It changes nothing but rounding.
        seed: the seed of the random circuits, and of partners in resample ablation.

    Raises:
        CircuitError: if `model` is not the circuit's model, or the circuit has no means or nodes.
        ConfigError: for an unknown `ablation`, or a negative `n_random`.
        DataError: if the corpus has no tokens, does not fit the model's context or vocabulary, or
            has a single row, although `ablation` is "resample".
        TaskError: if there is a single pair, although `ablation` is "resample".
    """
    check_measurable(circuit, model)
    check(n_random >= 0, "n_random", n_random, "at least 0")
    if corpus is not None:
        _check_corpus(corpus, model, ablation)
    # The circuit, no nodes, and then random circuits: in this order in all that follows.
    circuits = [circuit, without_nodes(circuit), *random_circuits_like(circuit, n_random, seed)]
    contexts = [holding_nodes(each, model, ablation) for each in circuits]
    full_logits = all_next_token_logits(model, data, batch_size)
    full_log_probabilities = full_logits.log_softmax(1)
    on_prompts = []
    answers = []
    for context in contexts:
        logits = all_next_token_logits(model, data, batch_size, context, seed)
        of_prompts = divergences(full_log_probabilities, logits.log_softmax(1))
        on_prompts.append(mean_of_pairs(of_prompts))
        answers.append(logits.gather(1, data.candidates))
    of_corpus = None
    if corpus is not None:
        of_corpus = _divergence_on_corpus(model, contexts, corpus, batch_size)
    full_answers = full_logits.gather(1, data.candidates)
    return Likeness(
        task=_divergence(on_prompts, len(full_logits)),
        corpus=of_corpus,
        logits=_logit_agreement(data, full_answers, answers[0], answers[2:]),
        errors=_shared_errors(data, full_answers, answers[0]),
        ablation=ablation,
        n_pairs=data.n_pairs,
        n_random=n_random,
        no_corpus="no text was given" if corpus is None else "",
    )


# --- divergence


def _divergence(means: Sequence[Estimate], n_distributions: int) -> Divergence:
    """The record of the mean divergences of the circuit, no nodes, and random circuits."""
    circuit, no_nodes, *random = means
    of_random = [each.value for each in random]
    return Divergence(
        circuit=circuit,
        no_nodes=no_nodes,
        random=mean_of(torch.tensor(of_random)) if of_random else None,
        random_median=median(of_random) if of_random else None,
        n_distributions=n_distributions,
    )


def _divergence_on_corpus(
    model: TLModel,
    contexts: Sequence[RunContext],
    corpus: Int[Tensor, "seq pos"],
    batch_size: int,
) -> Divergence:
    """The divergence at all positions of the corpus, of which no more than a batch is kept."""
    of_rows: list[list[Tensor]] = [[] for _ in contexts]
    for batch in _corpus_batches(model, corpus, batch_size):
        full = in_float32(logits_at_all_positions(model, batch.tokens)).log_softmax(-1)
        for context, found in zip(contexts, of_rows, strict=True):
            with context(batch):
                logits = in_float32(logits_at_all_positions(model, batch.tokens))
            found.append(divergences(full, logits.log_softmax(-1)).mean(1))
    # The positions of a row depend on each other, so the standard error is that over rows.
    means = [mean_of(torch.cat(found)) for found in of_rows]
    return _divergence(means, corpus.numel())


def _corpus_batches(
    model: TLModel, corpus: Int[Tensor, "seq pos"], batch_size: int
) -> Iterator[TaskData]:
    """The rows of the corpus in the form in which prompts run, each with the row before it as its
    partner in resample ablation.
    """
    device = next(model.parameters()).device
    corpus = corpus.long().to(device)
    n_rows, n_pos = corpus.shape
    partners = corpus.roll(1, 0)
    n_at_once = LOGITS_AT_ONCE // (n_pos * model.cfg.d_vocab)
    n_at_once = max(1, min(batch_size, n_at_once))
    for start in range(0, n_rows, n_at_once):
        tokens = corpus[start : start + n_at_once]
        last = tokens.new_full((len(tokens),), n_pos - 1)
        yield TaskData(
            task="corpus",
            prompts=("",) * len(tokens),
            tokens=tokens,
            last=last,
            candidates=tokens.new_zeros(len(tokens), 2),  # there are no answers
            correct=tokens.new_zeros(len(tokens)),
            partners=Partners(partners[start : start + n_at_once], last),
        )


def _check_corpus(corpus: Int[Tensor, "seq pos"], model: TLModel, ablation: Ablation) -> None:
    n_rows, n_pos = corpus.shape
    if corpus.numel() == 0:
        raise DataError("the corpus has no tokens")
    if n_pos > model.cfg.n_ctx:
        raise DataError(
            f"the rows of the corpus have {n_pos} tokens, more than the context of "
            f"{model.cfg.n_ctx}; corpus[:, :{model.cfg.n_ctx}] fits"
        )
    if int(corpus.min()) < 0 or int(corpus.max()) >= model.cfg.d_vocab:
        raise DataError(
            f"the tokens of the corpus must be from 0 to {model.cfg.d_vocab - 1}, the model's "
            f"vocabulary; they run from {int(corpus.min())} to {int(corpus.max())}"
        )
    if ablation == "resample" and n_rows == 1:
        raise DataError(
            "resample ablation needs at least 2 rows of the corpus, because each row is resampled "
            "from another one; there is 1"
        )


# --- agreement of the two answers' logits


def _logit_agreement(
    data: TaskData,
    full_answers: Float[Tensor, "prompt 2"],
    answers: Float[Tensor, "prompt 2"],
    random_answers: Sequence[Float[Tensor, "prompt 2"]],
) -> LogitAgreement:
    n_prompts = len(answers)
    between = value_agreement(full_answers.diff(dim=1), answers.diff(dim=1))
    _, n_groups = groups_by_answer(data)
    if n_prompts - n_groups < LEAST_WITHIN:
        remark = f"too few prompts have the same answers: {n_prompts} of {n_groups} kinds"
        return LogitAgreement(between.correlation, None, None, n_prompts, remark)
    full_within, *within = [
        within_answers(right_minus_wrong(of_run, data.correct), data)
        for of_run in [full_answers, answers, *random_answers]
    ]
    circuit, *random = [value_agreement(full_within, of_run) for of_run in within]
    of_random = [each.correlation.value for each in random if each.correlation is not None]
    return LogitAgreement(
        between_answers=between.correlation,
        within_answers=circuit.correlation,
        random_within_answers=mean_of(torch.tensor(of_random)) if of_random else None,
        n_prompts=n_prompts,
        remark=_why_no_correlation(circuit),
    )


def groups_by_answer(data: TaskData) -> tuple[Int[Tensor, " prompt"], int]:
    """For each prompt, the number of its group: the prompts with the same two answers and the same
    right one; and how many groups there are.
    """
    kinds = torch.cat([data.candidates, data.correct[:, None]], dim=1)
    distinct, groups = kinds.unique(dim=0, return_inverse=True)
    return groups, len(distinct)


def within_answers(margins: Float[Tensor, " prompt"], data: TaskData) -> Float[Tensor, "prompt 1"]:
    """The right answer's logit minus the wrong one's, without the means of the groups of prompts
    with the same answers.

    The mean size of the differences is added, which changes no correlation, so that what is only
    rounding beside it can be told.
    """
    margins = margins.double()
    groups, n_groups = groups_by_answer(data)
    sums = margins.new_zeros(n_groups).index_add(0, groups, margins)
    means = sums / groups.bincount(minlength=n_groups)
    return (margins - means[groups] + margins.abs().mean())[:, None]


def value_agreement(
    reference: Float[Tensor, "prompt 1"], value: Float[Tensor, "prompt 1"]
) -> Agreement:
    """The agreement of one value for each prompt."""
    n_pairs = len(reference) // 2
    sums = AgreementSums([1], n_pairs)
    sums.add(reference, value, torch.arange(n_pairs).repeat_interleave(2))
    (agreement,) = sums.agreements()
    return agreement


def _why_no_correlation(agreement: Agreement) -> str:
    """Empty if there is one."""
    same = "logit difference is the same at all prompts with the same right answer"
    if not agreement.reference_varies:
        return f"the model's {same}"
    return "" if agreement.varies else f"the circuit's {same}"


# --- shared errors


def _shared_errors(
    data: TaskData, full_answers: Float[Tensor, "prompt 2"], answers: Float[Tensor, "prompt 2"]
) -> SharedErrors:
    _, full_right = task_loss_and_accuracy(full_answers, data.correct)
    _, right = task_loss_and_accuracy(answers, data.correct)
    n_prompts = len(right)
    n_model = int((~full_right).sum())
    n_circuit = int((~right).sum())
    n_both = int((~full_right & ~right).sum())
    p_value = None
    remark = ""
    if n_model >= LEAST_ERRORS:
        p_value = probability_of_overlap(n_prompts, n_model, n_circuit, n_both)
    else:
        remark = (
            f"the full model errs on {n_model} of {n_prompts} prompts, and a test needs at least "
            f"{LEAST_ERRORS}"
        )
    by_chance = n_model * n_circuit / n_prompts
    return SharedErrors(n_prompts, n_model, n_circuit, n_both, by_chance, p_value, remark)


def probability_of_overlap(n: int, n_first: int, n_second: int, n_both: int) -> float:
    """The probability that two random subsets of n things share at least `n_both` of them.

    Args:
        n_first, n_second: the sizes of the subsets.
    """
    n_ways = 0
    for n_shared in range(n_both, min(n_first, n_second) + 1):
        n_ways += math.comb(n_first, n_shared) * math.comb(n - n_first, n_second - n_shared)
    return n_ways / math.comb(n, n_second)
