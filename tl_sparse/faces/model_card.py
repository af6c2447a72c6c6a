"""What the card of a model says about it."""

import json
from collections.abc import Mapping
from typing import Any

from tl_sparse.network import SparseConfig
from tl_sparse.tasks import Score, tasks_table

#: What the card shows of the record of a training run.
_TRAINING_FACTS = (
    "command",
    "data",
    "training_tokens_seen",
    "training_loss",
    "validation_loss",
    "config",
)


def model_facts(model_repr: str, config: SparseConfig, record: Mapping[str, Any]) -> str:
    """The facts on a model's card, in several lines.

    Args:
        model_repr: sizes and sparsity, as the model prints itself.
        config: the architecture.
        record: how the model was trained, as `train` returned it; may be empty.
    """
    topk = [f"{location} {fraction:g}" for location, fraction in config.abs_topk.items()]
    lines = [model_repr, f"AbsTopK, fraction kept: {', '.join(topk) or 'none'}"]
    if record:
        training = {key: record[key] for key in _TRAINING_FACTS if key in record}
        lines.append(f"training: {json.dumps(training, indent=2, ensure_ascii=False)}")
    if "tasks" in record:
        scores: dict[str, Score | None] = {}
        for name, score in record["tasks"].items():  # None: not possible with this tokenizer
            scores[name] = Score(**score) if score else None
        lines.append("")
        lines.append("Tasks, a choice between two next tokens (a coin has loss 0.693):")
        lines.append(tasks_table(scores))
    return "\n".join(lines)
