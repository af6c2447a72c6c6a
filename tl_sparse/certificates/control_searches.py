"""What the search that found a circuit finds where there is nothing to find.

The controls are answers that make no sense (Drori 2026), random labels (Zhang et al. 2017, arXiv
1611.03530) and the model with the weights of each matrix permuted (Adebayo et al. 2018, arXiv
1810.03292). A circuit says something of the model only as far as it is smaller, or withstands more,
than what the same search finds there.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_sparse.arguments import checked
from tl_sparse.certificates.again import Found, Search, search_of
from tl_sparse.circuits import Circuit, circuit_task
from tl_sparse.config import check
from tl_sparse.errors import ConfigError, DataError, TaskError, TokenizerError, UnsupportedError
from tl_sparse.hooks import TLModel, permuted_weights
from tl_sparse.pruning import corpus_means, heldout_pairs, task_splits
from tl_sparse.tasks import Task, nonsense_task, shuffled_task

#: Controls are searched up to so many times the nodes of the circuit. That there is none below says
#: enough, and removing what is superfluous from a thousand nodes takes many minutes.
LIMIT = 10
#: Why there are no controls of a search for what says what the model says.
_WITHOUT_ANSWERS = "the search compares a circuit with its model, whatever the answers are"
#: Errors that say why a control is not possible for a task or a model.
_NOT_POSSIBLE = (ConfigError, DataError, TaskError, TokenizerError, UnsupportedError)


@dataclass(frozen=True)
class Controls:
    """What the same search finds on controls. That nothing is found is a result.

    Attributes:
        real: the circuit itself.
        searches: control ("nonsense", "shuffled", "permuted") → what the search found there.
        left_out: control → why it is not possible.
        target_loss: the loss that each search had to reach, in nats.
        n_pairs: the number of held-out pairs on which losses are measured, at most.
        n_subsets: the number of random subsets of which the worst is reported.
        max_nodes: the largest number of nodes that the searches tried, before they removed those
            that are not needed; None in older files, for no limit.
        objective: what the losses measure, which is what the search had to reach; see `Objective`.
    """

    real: Found
    searches: dict[str, Found]
    left_out: dict[str, str]
    target_loss: float
    n_pairs: int
    n_subsets: int
    max_nodes: int | None = None
    objective: str = "candidates"


@checked("task", "corpus")
def controls(
    circuit: Circuit,
    model: TLModel,
    task: Task | str | None = None,
    corpus: Int[Tensor, "seq pos"] | None = None,
    n_pairs: int = 128,
    n_subsets: int = 16,
    batch_size: int = 256,
    seed: int = 0,
    progress: bool = True,
) -> Controls:
    """Repeat the search that found a circuit where there is nothing to find.

    The controls are the same prompts with answers that make no sense ("nonsense"; see
    `nonsense_task`), with random labels ("shuffled"; see `shuffled_task`), and the model with
    permuted weights ("permuted"; see `permuted_weights`), of which the means are taken anew. The
    settings are those that the circuit records, but the full model may fail on the task, and sizes
    are tried only up to 10 times the number of the circuit's nodes.

    With `objective="model"` there are no controls: that search does not look at answers, and in a
    model with permuted weights it would look for what says what that model says.

    Args:
        circuit: a circuit that `prune` or `prune_edges` found.
        model: its model.
        task: its task, or the name of that; by default the circuit's own.
        corpus: tokens of the training distribution, for the means of the permuted model. None means
            the sample in the folder that the model was loaded from.
        n_pairs: the number of held-out pairs on which losses are measured.
        n_subsets: the number of random subsets of which the worst is reported.
        batch_size: the number of prompts to run at once.
        seed: the seed of the labels, the permutations and the subsets.
        progress: show a progress bar.

    Raises:
        CircuitError: if the circuit is of another model, has no means or no nodes, or does not
            record the settings of its search; or if its task is not known.
        ConfigError: if a number is out of range.
        TaskError, DataError, TokenizerError: if the task does not fit the model.
    """
    check(n_pairs >= 1, "n_pairs", n_pairs, "at least 1")
    search = search_of(circuit, model, n_subsets, batch_size, seed)
    task = circuit_task(circuit, task)
    real = search.measured(circuit, model, heldout_pairs(circuit, model, task).first(n_pairs))
    max_nodes = min(LIMIT * circuit.n_nodes, circuit.n_candidates)
    if search.config.max_nodes is not None:
        max_nodes = min(max_nodes, search.config.max_nodes)
    config = dataclasses.replace(search.config, max_nodes=max_nodes)
    search = dataclasses.replace(search, config=config)

    def on_task(control: Task) -> Found:
        return _searched(search, circuit, model, control, n_pairs)

    runs: dict[str, Callable[[], Found]] = {
        "nonsense": lambda: on_task(nonsense_task(task, model.tokenizer)),
        "shuffled": lambda: on_task(shuffled_task(task, seed)),
        "permuted": lambda: _permuted(search, circuit, model, task, corpus, n_pairs),
    }
    found: dict[str, Found] = {}
    left_out: dict[str, str] = {}
    if config.objective == "model":
        left_out = dict.fromkeys(runs, _WITHOUT_ANSWERS)
        runs = {}
    for name, run in tqdm(runs.items(), desc="control searches", disable=not progress):
        try:
            found[name] = run()
        except _NOT_POSSIBLE as error:
            left_out[name] = str(error)
    return Controls(
        real,
        found,
        left_out,
        config.target_loss,
        n_pairs,
        n_subsets,
        max_nodes,
        config.objective,
    )


def _searched(
    search: Search, circuit: Circuit, model: TLModel, control: Task, n_pairs: int
) -> Found:
    """What the search finds for a control task."""
    _, _, heldout = task_splits(model, control, search.config)
    return search.outcome(model, control, circuit.means, heldout.first(n_pairs))


def _permuted(
    search: Search,
    circuit: Circuit,
    model: TLModel,
    task: Task,
    corpus: Int[Tensor, "seq pos"] | None,
    n_pairs: int,
) -> Found:
    """What the search finds in the model with permuted weights."""
    _, _, heldout = task_splits(model, task, search.config)
    config = search.config
    with permuted_weights(model, search.seed):
        means = corpus_means(
            model, corpus, search.batch_size, config.embed_gates, kind=config.nodes
        )
        return search.outcome(model, task, means, heldout.first(n_pairs))
