"""Attacking a circuit: searching on its program, and testing on the full model."""

import random
from collections.abc import Sequence
from time import monotonic, perf_counter

from tqdm.auto import tqdm

from tl_sparse.arguments import checked
from tl_sparse.attacks.asking import asker_of
from tl_sparse.attacks.grammar import tested_variation, variations
from tl_sparse.attacks.insertions import draws_of, search_insertions, tested_insertion
from tl_sparse.attacks.record import Attack
from tl_sparse.attacks.searching import Budget
from tl_sparse.attacks.testing import Tested, prediction
from tl_sparse.circuits import Circuit, circuit_task, hash_of_circuit
from tl_sparse.config import check
from tl_sparse.errors import counted
from tl_sparse.hooks import TLModel
from tl_sparse.tasks import Task, encode_pairs, is_built_in


@checked("task")
def attack(
    circuit: Circuit,
    model: TLModel,
    task: Task | str | None = None,
    *,
    neutral: Sequence[str] = (),
    n_prompts: int = 20_000,
    seconds: float | None = None,
    n_test: int = 64,
    n_families: int = 8,
    progress: bool = True,
    batch_size: int = 256,
    seed: int = 0,
) -> Attack:
    """Search prompts on which the program of a circuit errs, and try them on the full model.

    First come draws of the task, its held-out contexts, and longer and misleading contexts. Then
    texts are searched that fool the compiled circuit when they are inserted at a place in a prompt,
    several times in a row: statements, parts of the task's own prompts, tokens, and mutations of
    the best of these. Each kind of change is then tested, by strength, on prompts that the search
    has not seen, beside random changes of the same kind and length.

    Only prompts whose right answer is known count. For tasks that are built in, draws of the task
    are right by construction, and Python's parser tells the right answer after an insertion: either
    the statements are the same as before, or the whole text is valid Python with one answer only.
    For other tasks, texts that change no answer must be declared `neutral`.

    Args:
        circuit: the circuit.
        model: its model.
        task: the task of the prompts; by default the circuit's own.
        neutral: texts that change no right answer, wherever in a prompt they are inserted before
            its last word. Spaces count.
        n_prompts: the number of prompts that the search runs on the program.
        seconds: the search ends after this time even if prompts are left; with it, the result
            depends on the speed of the machine. By default there is no limit.
        n_test: the number of fresh prompts on which each change is tested.
        n_families: the largest number of insertions that are tested on the model.
        progress: show a bar over the search, and one over the tests.
        batch_size: the largest number of prompts to run at a time. It changes nothing but rounding.
        seed: the seed of everything random.

    Raises:
        CircuitError: if the circuit is of another model, or has no means, or its task is not known.
        UnsupportedError: if the circuit cannot be compiled; see `Circuit.compile`.
        TaskError: if the task has too few pairs, or pairs with different answers.
        TokenizerError: if the model has no tokenizer that suits the task.
        DataError: if a prompt does not fit the context.
        ConfigError: for impossible numbers, or an empty text in `neutral`.
    """
    started = perf_counter()
    _check_numbers(n_prompts, seconds, n_test, n_families, batch_size)
    check("" not in neutral, "neutral", list(neutral), "texts that are not empty")
    circuit.check_model(model)
    task = circuit_task(circuit, task)
    draws = draws_of(task, n_test, seed)
    data = encode_pairs(task, draws.pairs, model.tokenizer, model.cfg.n_ctx)
    asker = asker_of(circuit, model, data, draws.pairs[0].answers, batch_size)
    with tqdm(total=n_prompts, desc="searching", unit="prompt", disable=not progress) as bar:
        deadline = None if seconds is None else monotonic() + seconds
        budget = Budget(n_prompts, deadline, bar)
        found = search_insertions(asker, task, draws, neutral, budget, random.Random(seed))
    chosen = found[:n_families]
    kinds = variations(task, asker.answers)
    grammar, families = [], []
    with tqdm(total=len(kinds) + len(chosen), desc="testing", disable=not progress) as bar:
        for variation in kinds:
            grammar.append(tested_variation(asker, task, variation, n_test, seed + 1))
            bar.update()
        for insertion in chosen:
            families.append(tested_insertion(asker, insertion, draws, random.Random(seed)))
            bar.update()
    families.sort(key=_success, reverse=True)
    return Attack(
        model=circuit.model_name,
        task=task.name,
        circuit=hash_of_circuit(circuit),
        seed=seed,
        n_nodes=circuit.n_nodes,
        answers=list(asker.answers),
        cues=draws.cues,
        n_searched=budget.n_spent,
        n_tested=sum(tested.n_prompts for tested in (*grammar, *families)),
        seconds=perf_counter() - started,
        grammar=[tested.family for tested in grammar],
        families=[tested.family for tested in families],
        prediction=prediction([*grammar, *families]),
        notes=_notes(task, neutral, len(found), n_families),
    )


def _check_numbers(
    n_prompts: int, seconds: float | None, n_test: int, n_families: int, batch_size: int
) -> None:
    check(n_prompts >= 0, "n_prompts (--prompts)", n_prompts, "at least 0")
    is_time = seconds is None or seconds > 0
    check(is_time, "seconds (--seconds)", seconds, "more than 0, or None for no limit")
    check(n_test >= 2, "n_test (--test-prompts)", n_test, "at least 2")
    check(n_families >= 0, "n_families (--families)", n_families, "at least 0")
    check(batch_size >= 1, "batch_size", batch_size, "at least 1")


def _success(tested: Tested) -> float:
    """How much more often both err than the model does after random changes, at best."""
    return max((step.beyond_random for step in tested.steps), default=-1.0)


def _notes(task: Task, neutral: Sequence[str], n_found: int, n_families: int) -> list[str]:
    notes = []
    if not is_built_in(task) and not neutral:
        notes.append(
            f"Nothing was inserted: task {task.name} is not built in, and no text was declared "
            "neutral, so no other prompts are known whose right answer is known."
        )
    elif n_found == 0:
        notes.append("No insertion was found that fools the program.")
    if n_found > n_families:
        n_more = counted(n_found - n_families, "further insertion")
        notes.append(
            f"{n_more} that fool the program, like those below or more rarely, were not tested."
        )
    return notes
