"""The face for TransformerLens 3: a true `HookedTransformer` that runs our network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.HookedRootModule import HookedRootModule

from tl_sparse.errors import TokenizerError
from tl_sparse.faces import SparseModel, prepare_tokenizer, tl_config_fields
from tl_sparse.modules import SparseTransformer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class SparseHookedTransformer(SparseModel, HookedTransformer):
    """Inherits everything but the network and its set-up from `HookedTransformer`."""

    def __init__(self, network: SparseTransformer, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        # Not HookedTransformer.__init__, which would build components of its own.
        HookedRootModule.__init__(self)
        self.cfg = HookedTransformerConfig(**tl_config_fields(network.cfg, network))
        self.tokenizer = None
        self.dataset = None
        self._adopt(network)
        if tokenizer is not None:
            self.set_tokenizer(tokenizer)
        HookedRootModule.setup(self)

    def set_tokenizer(self, tokenizer: PreTrainedTokenizerBase, default_padding_side: str | None = None) -> None:
        self.tokenizer, self.cfg.tokenizer_prepends_bos = prepare_tokenizer(tokenizer, self.cfg.d_vocab)
        self.tokenizer.padding_side = default_padding_side or self.tokenizer.padding_side

    def to_tokens(self, input: str | list[str], *args: Any, **kwargs: Any) -> Any:
        if self.tokenizer is None:
            raise TokenizerError("this model has no tokenizer, so it takes token ids only; set_tokenizer gives it one")
        return super().to_tokens(input, *args, **kwargs)
