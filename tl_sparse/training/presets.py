"""Named training configurations: presets of several sizes, and the two published recipes."""

from dataclasses import replace
from typing import Any

from tl_sparse.config import check
from tl_sparse.network import SparseConfig, paper_topk
from tl_sparse.training.config import TrainConfig, laptop_model

#: Recipe → the fields of `TrainConfig` in which it differs from others. "published" and "paper" are
#: the authors' published training script and the text of their paper (Gao et al. 2025, arXiv
#: 2511.13653, sections 2.1 and A.2). "sparse" is ours: in most steps, zeros have no gradients.
RECIPES: dict[str, dict[str, Any]] = {
    "published": dict(
        gradient="divide",
        decay="after",
        fused_qkv=True,
        sparse_biases=False,
        last_bigram_row=False,
    ),
    "paper": dict(
        gradient="clip",
        decay="adamw",
        fused_qkv=False,
        sparse_biases=True,
        l0_fraction_embed=0.0,
    ),
    "sparse": dict(dense_gradient_steps=8),
}


def preset(name: str, recipe: str | None = None) -> TrainConfig:
    """The training configuration of a preset.

    Args:
        name: "laptop" (trains in minutes on two CPU cores), "small", or "paper-1x", "paper-2x",
            "paper-4x" or "paper-8x".
        recipe: "published" or "paper", to follow that recipe to the letter. None uses the published
            update rule, except that the last row of the bigram table is trained like the others.
            "sparse" does the same, with dense gradients in some steps only: in wide models, a step
            takes less time and lowers the loss a little less.

    Raises:
        ConfigError: if there is no such preset or recipe.
    """
    check(isinstance(name, str) and name in PRESETS, "preset", name, f"one of {', '.join(PRESETS)}")
    config = _PRESETS[name]
    if recipe is None:
        return config
    check(
        isinstance(recipe, str) and recipe in RECIPES,
        "recipe",
        recipe,
        f"one of {', '.join(RECIPES)}",
    )
    return replace(config, **RECIPES[recipe])


def _small() -> TrainConfig:
    """A model twice as wide as "laptop" and sparser, trained for five times as many steps."""
    return TrainConfig(
        replace(laptop_model(), d_model=256, n_heads=16, d_mlp=1024),
        steps=6000,
        lr=8e-3,
        l0_fraction=1 / 64,
        l0_fraction_embed=1 / 16,
        min_nonzero=2,
    )


def _paper(width: int) -> TrainConfig:
    """A model of the published sizes (Gao et al. 2025, section A.1), with d_model = 256 · width.

    Every width has as many nonzero weights as width 4 has at the fraction 1/64, which is the
    example of the published script. The learning rate, batch size and number of steps (32 billion
    tokens) are also those of that script. The fraction of the embeddings is `width` times that of
    the other matrices. The largest model is annealed until 80 % of training (section A.2).
    """
    d_model = 256 * width
    fraction = 1 / 64 * (4 / width) ** 2
    model = SparseConfig(
        n_layers=8,
        d_model=d_model,
        n_heads=d_model // 16,
        d_head=16,
        d_mlp=4 * d_model,
        d_vocab=2048,
        n_ctx=256,
        abs_topk=paper_topk(0.25),
        attn_sinks=True,
        bigram_table=True,
    )
    return TrainConfig(
        model,
        steps=244_141,
        batch_size=512,
        lr=1.28e-2,
        l0_fraction=fraction,
        anneal_stop=0.8 if width == 8 else 0.5,
        l0_fraction_embed=min(1.0, fraction * width),
        checkpoint_minutes=30.0,
        bigram_from_counts=False,
    )


_PRESETS = {
    "laptop": TrainConfig(),
    "small": _small(),
    "paper-1x": _paper(1),
    "paper-2x": _paper(2),
    "paper-4x": _paper(4),
    "paper-8x": _paper(8),
}
PRESETS = tuple(_PRESETS)
