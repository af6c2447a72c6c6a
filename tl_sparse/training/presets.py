"""Training configurations by name: sizes, and the two published recipes."""

from dataclasses import replace
from typing import Any

from tl_sparse.config import check
from tl_sparse.network import SparseConfig, paper_topk
from tl_sparse.training.config import TrainConfig, laptop_model

#: Fields of TrainConfig by recipe: where the authors' published training script and the text of
#: their paper differ (Gao et al. 2025, arXiv 2511.13653, sections 2.1 and A.2).
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
}


def preset(name: str, recipe: str | None = None) -> TrainConfig:
    """A training configuration by name: "laptop" (minutes on two cores), "small", "paper-1x" …
    "paper-8x".

    Args:
        name: of the preset.
        recipe: "published" or "paper", to follow either to the letter; None: the published update
            rule, and the last row of the bigram table is trained as the others are.

    Raises:
        ConfigError: for another name.
    """
    check(name in PRESETS, "preset", name, f"one of {', '.join(PRESETS)}")
    config = _PRESETS[name]
    if recipe is None:
        return config
    check(recipe in RECIPES, "recipe", recipe, f"one of {', '.join(RECIPES)}")
    return replace(config, **RECIPES[recipe])


def _small() -> TrainConfig:
    """Twice as wide as "laptop", trained for five times as many steps, and sparser."""
    return TrainConfig(
        replace(laptop_model(), d_model=256, n_heads=16, d_mlp=1024),
        steps=6000,
        lr=8e-3,
        l0_fraction=1 / 64,
        l0_fraction_embed=1 / 16,
        min_nonzero=2,
    )


def _paper(width: int) -> TrainConfig:
    """The published sizes (Gao et al. 2025, section A.1): d_model is 256 · width.

    Every width has as many nonzero weights as 4x, the published script's example, has with 1/64.
    Learning rate, batch and number of steps (32 billion tokens) are that script's; the embeddings'
    fraction is larger by the width; the largest model is annealed until 80 % of training (A.2).
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
