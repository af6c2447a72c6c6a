"""Converting numbers and tokens to the form in which a page contains them."""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from tl_sparse.view.limits import LIMITS


def four_digits(value: float | Tensor) -> float:
    """A number rounded to four significant digits."""
    return float(f"{float(value):.4g}")


def activation_levels(
    values: Float[Tensor, "*batch"], scale: Float[Tensor, "*batch"]
) -> Int[Tensor, "*batch"]:
    """Activations as integers: an activation of `scale` becomes `LIMITS.activation_levels`."""
    return (values / scale * LIMITS.activation_levels).round().int()


class Vocabulary:
    """The texts of all tokens that a page shows.

    Attributes:
        texts: token id → the text of the token, shortened to `LIMITS.token_chars`.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.texts: dict[int, str] = {}
        self._tokenizer = tokenizer

    def add(self, tokens: Sequence[int]) -> None:
        """Add the texts of `tokens`."""
        for token in set(tokens) - self.texts.keys():
            self.texts[token] = self._text(token)

    def _text(self, token: int) -> str:
        if self._tokenizer is None:
            return f"⟨{token}⟩"
        text: str = self._tokenizer.decode([token])
        if len(text) > LIMITS.token_chars:
            return text[: LIMITS.token_chars - 1] + "…"
        return text
