"""What a page holds at most."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PageLimits:
    """What a page holds at most. The page itself tells its reader most of these.

    Attributes:
        nodes: nodes of the graph.
        edges: edges of the graph.
        page_bytes: size of the HTML file.
        prompt_pairs: pairs of prompts to look at.
        effect_pairs: pairs of prompts over which the loss after a cut is measured.
        curve_sizes: circuits on the faithfulness curve up to the size of this one.
        passages: passages of the corpus for each node and sign.
        tokens_before_peak: tokens of a passage before its strongest.
        tokens_from_peak: tokens of a passage from its strongest on.
        prompt_tokens: tokens of a prompt, its last.
        token_chars: characters of a token.
        top_tokens: tokens for each channel and sign, those with the largest weights.
        histogram_bins: bins of a node's histogram.
        corpus_values: activations on the corpus that are held in memory; the more nodes there are,
            the fewer rows of the corpus are run.
        activation_levels: activations are written as whole numbers up to this one, times a scale
            for each node.
    """

    nodes: int = 1_500
    edges: int = 10_000
    page_bytes: int = 5_000_000
    prompt_pairs: int = 8
    effect_pairs: int = 16
    curve_sizes: int = 16
    passages: int = 4
    tokens_before_peak: int = 20
    tokens_from_peak: int = 8
    prompt_tokens: int = 96
    token_chars: int = 40
    top_tokens: int = 8
    histogram_bins: int = 24
    corpus_values: int = 30_000_000
    activation_levels: int = 999


LIMITS = PageLimits()
