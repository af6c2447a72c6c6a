"""The face for TransformerLens 3: a true `HookedTransformer` that runs our network."""

from collections.abc import Callable, Iterator
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.HookedRootModule import HookedRootModule
from transformers import PreTrainedTokenizerBase

from tl_sparse.errors import UnsupportedError
from tl_sparse.faces.model import SparseModel, tl_config_fields
from tl_sparse.network import SparseTransformer


class SparseHookedTransformer(SparseModel, HookedTransformer):
    """Inherits everything but the network and its set-up from `HookedTransformer`."""

    def __init__(
        self, network: SparseTransformer, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> None:
        # Not HookedTransformer.__init__, which would build components of its own.
        HookedRootModule.__init__(self)
        self.cfg = HookedTransformerConfig(**tl_config_fields(network))
        self.tokenizer = None
        self.dataset = None
        self.__dict__["network"] = network  # outside the module tree
        self.adopt_network(self.cfg)
        if tokenizer is not None:
            self.set_tokenizer(tokenizer)
        HookedRootModule.setup(self)

    def tl_parameters(self) -> dict[str, Tensor]:
        """Parameters by TransformerLens' names; tied or not, the unembedding is among them."""
        return dict(self.named_parameters()) | {"unembed.W_U": self.W_U}

    def to(self, *args: Any, print_details: bool = True, **kwargs: Any) -> Any:
        """`torch.nn.Module.to`, whose every form is taken; `cfg` follows."""
        return torch.nn.Module.to(self, *args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`HookedTransformer.generate`; each step reads the whole sequence, whatever
        `use_past_kv_cache` says.
        """
        # TransformerLens' loop hands `forward` only the tokens' embeddings; the bigram table needs
        # the tokens.
        self._embedded: list[Tensor] = []
        handle = self.embed.register_forward_pre_hook(
            lambda module, args: self._embedded.append(args[0])
        )
        try:
            return super().generate(**_without_cache(super().generate, *args, **kwargs))
        finally:
            handle.remove()
            del self._embedded

    def generate_stream(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        """`HookedTransformer.generate_stream`; each step reads the whole sequence."""
        yield from super().generate_stream(
            **_without_cache(super().generate_stream, *args, **kwargs)
        )

    def forward(self, input: Any, *args: Any, **kwargs: Any) -> Any:
        """`SparseModel.forward`, with what TransformerLens 3's own methods pass beside it."""
        kwargs.pop("shortformer_pos_embed", None)
        if kwargs.pop("past_kv_cache", None) is not None:
            raise UnsupportedError(
                "this model reads whole sequences: it has no past_kv_cache; pass all tokens"
            )
        if kwargs.get("start_at_layer") == 0 and getattr(self, "_embedded", None):
            kwargs.setdefault("tokens", torch.cat(self._embedded, dim=1))
        return super().forward(input, *args, **kwargs)

    def get_residual(
        self,
        embed: Tensor,
        pos_offset: int = 0,
        prepend_bos: bool | None = None,
        attention_mask: Tensor | None = None,
        tokens: Tensor | None = None,
        return_shortformer_pos_embed: bool = True,
        device: torch.device | None = None,
    ) -> Any:
        """HookedTransformer's method: embeddings with added positions, the stream entering the
        first block.
        """
        resid = self.network.add_positions(embed, self.network.position_ids(embed, attention_mask))
        return (resid, None) if return_shortformer_pos_embed else resid


def _without_cache(method: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The arguments of a call of `method`, by name, with `use_past_kv_cache` off."""
    call = signature(method).bind(*args, **kwargs)
    generation_kwargs = call.arguments.pop("generation_kwargs", {})
    return call.arguments | generation_kwargs | {"use_past_kv_cache": False}
