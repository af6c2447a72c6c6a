"""The facts about a model that are printed on its card."""

import json
from collections.abc import Mapping
from typing import Any

from tl_sparse.network import SparseConfig
from tl_sparse.tasks import Score, tasks_table

#: The entries in the record of a training run that the card shows.
_TRAINING_FACTS = (
    "command",
    "data",
    "training_tokens_seen",
    "training_loss",
    "validation_loss",
    "config",
)


def model_facts(model_repr: str, config: SparseConfig, record: Mapping[str, Any]) -> str:
    """The facts for a model's card, as several lines of text.

    Args:
        model_repr: the repr of the model, with its sizes and sparsity.
        config: the architecture.
        record: the record of the training run that `train` returned; may be empty.
    """
    topk = [f"{location} {fraction:g}" for location, fraction in config.abs_topk.items()]
    lines = [model_repr, f"AbsTopK, fraction kept: {', '.join(topk) or 'none'}"]
    if record:
        training = {key: record[key] for key in _TRAINING_FACTS if key in record}
        lines.append(f"training: {json.dumps(training, indent=2, ensure_ascii=False)}")
    if "tasks" in record:
        scores: dict[str, Score | None] = {}
        # A score is None if the task does not work with this tokenizer.
        for name, score in record["tasks"].items():
            scores[name] = Score(**score) if score else None
        lines.append("")
        lines.append("Tasks, a choice between two next tokens (a coin has loss 0.693):")
        lines.append(tasks_table(scores))
    return "\n".join(lines)
