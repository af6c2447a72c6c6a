"""The pairs of a task with which a circuit is trained, selected and judged."""

import dataclasses
from collections.abc import Iterable, Sequence

from tl_sparse.arguments import checked
from tl_sparse.circuits import Circuit, circuit_task
from tl_sparse.errors import CircuitError, ConfigError, TaskError, counted, warn_user
from tl_sparse.hooks import TLModel
from tl_sparse.pruning.config import PruneConfig
from tl_sparse.tasks import (
    PARTS,
    Pair,
    Part,
    Task,
    TaskData,
    TaskPairs,
    as_task,
    draw_pairs,
    encode_pairs,
    prompts_of,
    too_few_pairs,
    warn_of_shortened,
)

#: Where the pairs that there are must be divided, each part gets at least this many.
LEAST_PAIRS = 2
#: The parts in the order in which they are drawn. The training pairs are drawn last, so that their
#: number does not affect the other two.
_DRAWN: tuple[Part, ...] = ("selection", "heldout", "training")
#: Part → the field of `PruneConfig` with its number of pairs.
_FIELDS: dict[Part, str] = {
    "training": "train_pairs",
    "selection": "selection_pairs",
    "heldout": "heldout_pairs",
}


# --- splitting a task


@checked("task")
def task_splits(
    model: TLModel, task: Task | str, config: PruneConfig
) -> tuple[TaskData, TaskData, TaskData]:
    """Disjoint pairs for training the gates, for choosing the size, and for judging the circuit.

    For their numbers see `split_pairs`. In resample ablation, each prompt has a partner from its
    own set.
    """
    task = as_task(task)
    return encoded_splits(model, task, split_pairs(task, config), config)


@checked()
def split_pairs(task: Task, config: PruneConfig) -> TaskPairs:
    """The pairs of `task`, split into disjoint parts.

    There are as many as `config` says. If the task has fewer pairs than that, those that it has are
    divided in the proportion of the default numbers, with a warning; numbers that differ from the
    defaults are kept. If the task itself is split, these are its parts, or the first pairs of each
    if `config` has a number that is not the default.

    Raises:
        TaskError: if the task has too few pairs to divide.
        ConfigError: if it has fewer pairs than numbers that differ from the defaults.
    """
    pairs = _split(task, config)
    numbers = {part: len(pairs.part(part)) for part in PARTS}
    are_divided = any(numbers[part] < getattr(config, _FIELDS[part]) for part in PARTS)
    if are_divided and task.split is None:
        n_pairs = sum(numbers.values())
        warn_user(
            f"task {task.name} has {counted(n_pairs, 'pair')}: {numbers['training']} train the "
            f"gates, {numbers['selection']} select the size, {numbers['heldout']} judge the circuit"
        )
    return pairs


def _split(task: Task, config: PruneConfig) -> TaskPairs:
    """The same as `split_pairs`, without the warning."""
    if task.split is not None:
        return _first_pairs(task.split, config)
    drawn: dict[Part, list[Pair]] = {part: [] for part in _DRAWN}
    used = set[str]()
    for number, part in enumerate(_DRAWN):
        wanted = getattr(config, _FIELDS[part])
        drawn[part] = draw_pairs(task, wanted, 3 * config.seed + number, used)
        used.update(prompts_of(drawn[part]))
        if len(drawn[part]) < wanted:
            return _divided(task, [pair for pairs in drawn.values() for pair in pairs], config)
    return _task_pairs(task, drawn)


def _task_pairs(task: Task, parts: dict[Part, list[Pair]]) -> TaskPairs:
    return TaskPairs(
        name=task.name,
        description=task.description,
        training=tuple(parts["training"]),
        selection=tuple(parts["selection"]),
        heldout=tuple(parts["heldout"]),
        candidates=task.candidates,
        same_end=task.same_end,
    )


def _chosen_numbers(config: PruneConfig) -> dict[Part, int]:
    """Part → its number of pairs, for the numbers that are not the defaults."""
    default = PruneConfig()
    chosen: dict[Part, int] = {}
    for part, field in _FIELDS.items():
        number = getattr(config, field)
        if number != getattr(default, field):
            chosen[part] = number
    return chosen


def _first_pairs(split: TaskPairs, config: PruneConfig) -> TaskPairs:
    """The first pairs of each part for which `config` has a number that is not the default."""
    first = {part: list(split.part(part)) for part in PARTS}
    for part, number in _chosen_numbers(config).items():
        pairs = split.part(part)
        if len(pairs) < number:
            raise ConfigError(
                f"{_named([part], config)} is not possible: task {split.name} has "
                f'{counted(len(pairs), "pair")} with the "split" {part}'
            )
        first[part] = list(pairs[:number])
    return _task_pairs(Task.from_pairs(split), first)


def _divided(task: Task, pairs: list[Pair], config: PruneConfig) -> TaskPairs:
    """All pairs of a task, divided into parts."""
    numbers = _divided_numbers(task, len(pairs), config)
    parts = {}
    start = 0
    for part in _DRAWN:
        parts[part] = pairs[start : start + numbers[part]]
        start += numbers[part]
    return _task_pairs(task, parts)


def _divided_numbers(task: Task, n_pairs: int, config: PruneConfig) -> dict[Part, int]:
    """Part → its share of the pairs.

    Parts whose number is not the default get that number. The others get the rest, in the
    proportion of the default numbers.
    """
    numbers = _chosen_numbers(config)
    default = PruneConfig()
    weights = {}
    for part in PARTS:
        if part not in numbers:
            weights[part] = getattr(default, _FIELDS[part])
    n_left = n_pairs - sum(numbers.values())
    n_needed = 0
    if weights:
        n_needed = LEAST_PAIRS * sum(weights.values()) // min(weights.values())
    if n_left < n_needed:
        raise _cannot_be_divided(task, n_pairs, n_needed, list(numbers), config)
    for part, weight in weights.items():
        numbers[part] = n_left * weight // sum(weights.values())
    if weights:
        first = next(iter(weights))  # which gets what rounding has left
        numbers[first] += n_pairs - sum(numbers.values())
    return numbers


def _cannot_be_divided(
    task: Task, n_pairs: int, n_needed: int, chosen: list[Part], config: PruneConfig
) -> TaskError | ConfigError:
    """The error if a task has too few pairs.

    Args:
        n_pairs: how many it has.
        n_needed: how many the parts need whose number is the default.
        chosen: the other parts.
    """
    has = f"task {task.name} has {counted(n_pairs, 'pair')} of distinct prompts"
    if not chosen:
        return TaskError(
            f"{has}; at least {n_needed} are needed, to train the gates, to select the size and to "
            "judge the circuit"
        )
    is_or_are = "is" if len(chosen) == 1 else "are"
    message = f"{_named(chosen, config)} {is_or_are} not possible: {has}"
    if n_needed:
        others = " and ".join(_FIELDS[part] for part in PARTS if part not in chosen)
        message += f", and {others} need at least {n_needed} of them"
    return ConfigError(message)


def _named(parts: Iterable[Part], config: PruneConfig) -> str:
    """The fields with the numbers of these parts, and their flags."""
    names = []
    for part in parts:
        field = _FIELDS[part]
        names.append(f"{field} = {getattr(config, field)} (--{field.replace('_', '-')})")
    return " and ".join(names)


def encoded_splits(
    model: TLModel, task: Task, pairs: TaskPairs, config: PruneConfig
) -> tuple[TaskData, TaskData, TaskData]:
    """The training, selection and held-out pairs as tokens; see `task_splits`."""
    parts = [_encoded(model, task, pairs.part(part), config) for part in PARTS]
    warn_of_shortened(task, parts)
    training, selection, heldout = parts
    return training, selection, heldout


def _encoded(model: TLModel, task: Task, pairs: Sequence[Pair], config: PruneConfig) -> TaskData:
    """The pairs of a part as tokens, with the partners that the search gives them."""
    data = encode_pairs(task, pairs, model.tokenizer, model.cfg.n_ctx)
    if config.ablation == "resample":
        data = data.with_partners(config.seed)
    return data.to(next(model.parameters()).device)


# --- the pairs that judge a circuit


@checked("task")
def heldout_pairs(
    circuit: Circuit,
    model: TLModel,
    task: Task | str | None = None,
    n_pairs: int | None = None,
    seed: int | None = None,
) -> TaskData:
    """The pairs that judge a circuit: none of them was used to find it, as far as that is recorded.

    These are the pairs on which the circuit was judged when it was found: those in `circuit.pairs`
    or, for a built-in task, the same draws again. Other pairs are drawn if `n_pairs` or `seed` is
    given, or the circuit does not record its settings.

    Args:
        circuit: the circuit.
        model: its model.
        task: the task of the pairs, or its name; by default the circuit's own.
        n_pairs: the number of new pairs; by default as many as judged the circuit, or all that
            there are.
        seed: the seed of new pairs; by default 0.

    Raises:
        CircuitError: if no task is given, and the circuit's own is not known; or if the settings
            that the circuit records are damaged.
        TaskError: if there is no such task, or it has not as many pairs.
        TaskError, DataError, TokenizerError: if its prompts do not fit the model.
    """
    if n_pairs is not None and n_pairs < 1:
        raise TaskError(f"n_pairs (--pairs) is {n_pairs}; it must be at least 1")
    is_own = task is None
    task = circuit_task(circuit, task)
    config = recorded_config(circuit)
    known = _known_split(circuit, task, config)
    searched = circuit.pairs or known
    used = searched.searched_prompts if searched else set[str]()
    if known is not None and n_pairs is None and seed is None:
        # Of another version of the task, some may have been used to find the circuit.
        pairs = [pair for pair in known.heldout if used.isdisjoint(pair.prompts)]
    else:
        pairs = draw_pairs(task, n_pairs or config.heldout_pairs, seed or 0, used)
        config = dataclasses.replace(config, ablation="mean")  # the search gave them no partners
    if len(pairs) < (n_pairs or 1):
        if is_own and circuit.pairs is not None:
            raise _only_kept_pairs(circuit.pairs, len(pairs), n_pairs or 1)
        raise too_few_pairs(task, len(pairs), n_pairs or 1, len(used))
    data = _encoded(model, task, pairs, config)
    if not is_own:
        warn_of_shortened(task, [data])
    return data


def _only_kept_pairs(kept: TaskPairs, n_found: int, n_wanted: int) -> TaskError:
    """The error if more pairs are asked for than a circuit of the user's own task keeps."""
    n_searched = len(kept.training) + len(kept.selection)
    return TaskError(
        f"n_pairs (--pairs) is {n_wanted}, and must be at most {n_found}: of task {kept.name} the "
        f"circuit keeps only the pairs with which it was made, {counted(n_searched, 'pair')} that "
        f"found it and {counted(n_found, 'pair')} to judge it; give others with --task FILE (in "
        "Python, task=…)"
    )


def _known_split(circuit: Circuit, task: Task, config: PruneConfig) -> TaskPairs | None:
    """The split of the task with which the circuit was found, if that can be known."""
    if task.split is not None:
        return task.split
    if not circuit.measured.get("config") or task.name != circuit.task:
        return None
    try:
        return _split(task, config)
    except (ConfigError, TaskError):  # another version of the task, which has too few pairs
        return None


@checked()
def recorded_config(circuit: Circuit) -> PruneConfig:
    """The recorded settings with which the circuit was found; defaults if it records none.

    The circuit may come from another version, so unknown fields are ignored and missing fields have
    their defaults.

    Raises:
        CircuitError, ConfigError: if the record is damaged.
    """
    recorded = circuit.measured.get("config", {})
    if not isinstance(recorded, dict):
        raise CircuitError(f"the circuit's 'measured.config' is damaged: {recorded!r}")
    known = [field.name for field in dataclasses.fields(PruneConfig)]
    return PruneConfig(**{name: recorded[name] for name in known if name in recorded})
