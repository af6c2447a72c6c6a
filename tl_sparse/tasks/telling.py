"""The tokens that tell the two prompts of a pair apart."""

from collections import Counter

from tl_sparse.arguments import checked
from tl_sparse.tasks.task_data import TaskData

#: In so many of the pairs a token must differ, as a share of them.
LEAST_SHARE = 0.1


@checked()
def telling_tokens(data: TaskData) -> list[int]:
    """The tokens that stand in one prompt of a pair and not in the other, in enough of the pairs.

    The most frequent ones come first. Names that a task draws at random are in too few pairs.
    """
    prompts = []
    for tokens, last in zip(data.tokens.tolist(), data.last.tolist(), strict=True):
        prompts.append(set(tokens[: last + 1]))
    counts = Counter[int]()
    for first, second in zip(prompts[0::2], prompts[1::2], strict=True):
        counts.update(sorted(first ^ second))
    enough = LEAST_SHARE * data.n_pairs
    return [token for token, count in counts.most_common() if count >= enough]
