"""The limits of what a page contains."""

from dataclasses import dataclass

#: What the name of a page ends in.
PAGE_ENDINGS = (".html", ".htm")


@dataclass(frozen=True)
class PageLimits:
    """The limits of what a page contains. The page states most of them to its reader.

    Attributes:
        nodes: the largest number of nodes in the graph.
        edges: the largest number of edges in the graph.
        page_bytes: the largest size of the HTML file, in bytes.
        prompt_pairs: the number of prompt pairs that are shown.
        effect_pairs: the number of held-out pairs on which the effect of each node is measured.
        curve_sizes: the number of points on the faithfulness curve up to the circuit's own size.
        passages: the number of passages of the corpus for each node and sign.
        tokens_before_peak: the number of tokens in a passage before its strongest token.
        tokens_from_peak: the number of tokens in a passage from its strongest token onwards.
        next_tokens: the number of most likely next tokens of each prompt and run.
        prompt_tokens: the number of tokens of a prompt that are shown, counted from its end.
        token_chars: the number of characters of a token that are shown.
        top_tokens: the number of tokens for each channel and sign, those with the largest weights.
        histogram_bins: the number of bins in the histogram of a node.
        corpus_values: the number of activations on the corpus that are held in memory. With more
            nodes, fewer rows of the corpus are run.
        program_nodes: circuits of more nodes are shown without their program.
        activation_levels: activations are written as integers of at most this absolute value; each
            node has its own scale.
    """

    nodes: int = 1_500
    edges: int = 10_000
    page_bytes: int = 5_000_000
    prompt_pairs: int = 8
    effect_pairs: int = 32
    curve_sizes: int = 10
    passages: int = 4
    tokens_before_peak: int = 20
    tokens_from_peak: int = 8
    next_tokens: int = 5
    prompt_tokens: int = 96
    token_chars: int = 40
    top_tokens: int = 8
    histogram_bins: int = 24
    corpus_values: int = 30_000_000
    program_nodes: int = 300
    activation_levels: int = 999


LIMITS = PageLimits()
