"""The tokens that tell the two prompts of a pair apart."""

from collections import Counter

from tl_sparse.arguments import checked
from tl_sparse.tasks.task_data import TaskData


@checked()
def telling_tokens(data: TaskData, n_tokens: int) -> list[int]:
    """The tokens that most often stand in one prompt of a pair and not in the other.

    Args:
        data: the pairs.
        n_tokens: the number of tokens, if there are so many; the most frequent ones come first.
    """
    prompts = []
    for tokens, last in zip(data.tokens.tolist(), data.last.tolist(), strict=True):
        prompts.append(set(tokens[: last + 1]))
    counts = Counter[int]()
    for first, second in zip(prompts[0::2], prompts[1::2], strict=True):
        counts.update(sorted(first ^ second))
    return [token for token, _ in counts.most_common(n_tokens)]
