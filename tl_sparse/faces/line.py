"""Which of the two supported major versions of TransformerLens is installed."""

from importlib.metadata import version


def transformer_lens_line() -> int:
    """The major version of the installed TransformerLens: 3 or 4."""
    return int(version("transformer-lens").split(".")[0])
