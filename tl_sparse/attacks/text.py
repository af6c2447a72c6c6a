"""An attack as text."""

import textwrap

from tl_sparse.arguments import checked
from tl_sparse.attacks.record import Attack, Example, FoolingFamily, Prediction, Trial
from tl_sparse.errors import counted
from tl_sparse.evaluation import Estimate
from tl_sparse.parsing import printable
from tl_sparse.tasks import table

#: The width of paragraphs, in characters.
WIDTH = 96
#: In an example, a text that is inserted more often than this stands once.
MOST_REPEATS = 4
_NOTHING = "–"
_HEADER = [
    "n",
    "prompts",
    "tokens",
    "program errs",
    "model errs",
    "prediction holds",
    "random: model errs",
    "program",
    "model",
]


@checked()
def attack_text(attack: Attack) -> str:
    """An attack as text: how often predictions hold, and the families with their examples."""
    title = f"Attack on {printable(attack.task)} in {printable(attack.model)}"
    parts = [f"{title}\n{'=' * len(title)}", _about(attack), prediction_text(attack.prediction)]
    parts += [_paragraph(printable(note)) for note in attack.notes]
    if attack.families:
        parts.append(_heading("Insertions that fool the program"))
        parts += [family_text(family) for family in attack.families]
    parts.append(_heading("Draws of the task, and variations of them"))
    parts.append(_grammar(attack.grammar))
    return "\n\n".join(parts)


def _heading(title: str) -> str:
    return f"{title}\n{'-' * len(title)}"


def _about(attack: Attack) -> str:
    first, second = map(repr, attack.answers)
    cues = " or ".join(map(repr, attack.cues))
    searched = counted(attack.n_searched, "prompt")
    tested = counted(attack.n_tested, "fresh prompt")
    return _paragraph(
        f"{counted(attack.n_nodes, 'node')}. The answers are {first} and {second}; the cue is",
        f"where the two prompts of a pair differ, such as {cues}. The search ran {searched} on the",
        f"program; {tested} ran on the program and on the model. {attack.seconds:.0f} s, seed",
        f"{attack.seed}. The last two columns of tables are the logit of the right answer minus",
        "that of the wrong one. ± is one standard error.",
    )


@checked()
def prediction_text(found: Prediction) -> str:
    """How often the prediction of failure holds, in sentences."""
    all_prompts = counted(found.n_prompts, "prompt")
    if found.holds is None:
        return _paragraph(f"The program errs on none of {all_prompts} that were tested.")
    sentences = [
        f"The program errs on {found.n_predicted:,} of {all_prompts}, and the model on",
        f"{found.n_held:,} of these: the prediction holds for {_share(found.holds)}.",
    ]
    if found.elsewhere is not None:
        share = _share(found.elsewhere)
        sentences.append(f"Where the program does not err, the model errs on {share}.")
    if found.random is not None:
        share, n_random = _share(found.random), counted(found.n_random, "prompt")
        sentences.append(
            f"After random changes of the same kind and length, it errs on {share} of {n_random}."
        )
    return _paragraph(*sentences)


@checked()
def family_text(family: FoolingFamily) -> str:
    """A family of insertions: what is inserted, its trials by strength, and an example."""
    trials = list(family.trials)
    if family.unchanged is not None:
        trials.insert(0, family.unchanged)
    parts = [
        _paragraph(printable(_title(family))),
        _paragraph(f"Made of {family.source}. Right answers are known: {family.known_by}."),
        table(_HEADER, [_row(each) for each in trials]),
    ]
    parts += [_example(example, family.text) for example in family.examples[:1]]
    return "\n".join(parts)


def _title(family: FoolingFamily) -> str:
    where = "" if family.right is None else f", where {family.right!r} is right"
    return f"{family.description}{where}"


def _grammar(families: list[FoolingFamily]) -> str:
    rows = []
    for family in families:
        title = _title(family)
        for trial in family.trials:
            n_lines = counted(trial.strength, "line")
            rows.append([title.replace("n lines", n_lines, 1), *_row(trial)[1:]])
    return table(["prompts", "number", *_HEADER[2:]], rows)


def _row(trial: Trial) -> list[str]:
    held = _NOTHING if trial.holds is None else f"{trial.n_held} of {trial.n_predicted}"
    beside = trial.random
    return [
        str(trial.strength),
        str(trial.n_prompts),
        f"{trial.n_tokens:.0f}",
        _share(trial.program_errs),
        _share(trial.model_errs),
        held,
        _NOTHING if beside is None else _share(beside.model_errs),
        f"{trial.program_difference.value:.2f}",
        f"{trial.model_difference.value:.2f}",
    ]


def _example(example: Example, text: str) -> str:
    """An example, in which a text that is repeated often stands once."""
    prompt = example.prompt
    if text and example.strength > MOST_REPEATS:
        prompt = prompt.replace(text * example.strength, f"⟨{text} × {example.strength}⟩")
    lines = textwrap.indent(printable(prompt, keep="\n"), "    ")
    program, model = f"{example.program_difference:.2f}", f"{example.model_difference:.2f}"
    return (
        f"  For example, n = {example.strength}; {example.right!r} is right, by {program} in the "
        f"program and {model} in the model:\n{lines}"
    )


def _share(estimate: Estimate) -> str:
    """A share in percent, with its standard error."""
    if estimate.standard_error is None:
        return f"{estimate.value:.0%}"
    return f"{estimate.value:.0%} ± {100 * estimate.standard_error:.0f}"


def _paragraph(*sentences: str) -> str:
    return textwrap.fill(" ".join(filter(None, sentences)), WIDTH)
