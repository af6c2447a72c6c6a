"""The model class for TransformerLens 3: a true `HookedTransformer` that runs our network."""

from collections.abc import Callable, Iterator
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.HookedRootModule import HookedRootModule
from transformers import PreTrainedTokenizerBase

from tl_sparse.errors import UnsupportedError
from tl_sparse.faces.model import SparseModel
from tl_sparse.faces.tl_config import tl_config_fields
from tl_sparse.network import SparseTransformer


class SparseHookedTransformer(SparseModel, HookedTransformer):
    """Inherits everything but the network and its set-up from `HookedTransformer`."""

    def __init__(
        self, network: SparseTransformer, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> None:
        # HookedTransformer.__init__ is not called, because it would build its own components.
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
        """Parameters by TransformerLens' names, including W_U even if it is tied."""
        return dict(self.named_parameters()) | {"unembed.W_U": self.W_U}

    def to(self, *args: Any, print_details: bool = True, **kwargs: Any) -> Any:
        """`torch.nn.Module.to` with any of its signatures; `cfg` is updated too."""
        return torch.nn.Module.to(self, *args, **kwargs)

    def generate(self, input: Any = "", *args: Any, **kwargs: Any) -> Any:
        """`HookedTransformer.generate` without a key-value cache.

        Each step runs on the whole sequence, and `use_past_kv_cache` is ignored.
        """
        # TransformerLens' loop passes only embeddings to `forward`. The bigram table needs the
        # tokens, so a hook on the embedding records them.
        self._embedded_tokens: list[Tensor] = []

        def keep_tokens(module: torch.nn.Module, args: tuple[Tensor]) -> None:
            self._embedded_tokens.append(args[0])

        handle = self.embed.register_forward_pre_hook(keep_tokens)
        try:
            prompt = self._prompt(input)
            return super().generate(**_without_cache(super().generate, prompt, *args, **kwargs))
        finally:
            handle.remove()
            del self._embedded_tokens

    def generate_stream(self, input: Any = "", *args: Any, **kwargs: Any) -> Iterator[Any]:
        """`HookedTransformer.generate_stream`; each step runs on the whole sequence."""
        prompt = self._prompt(input)
        arguments = _without_cache(super().generate_stream, prompt, *args, **kwargs)
        yield from super().generate_stream(**arguments)

    def forward(self, input: Any, *args: Any, **kwargs: Any) -> Any:
        """`SparseModel.forward`, which also takes the arguments that TransformerLens 3 passes."""
        kwargs.pop("shortformer_pos_embed", None)
        if kwargs.pop("past_kv_cache", None) is not None:
            raise UnsupportedError(
                "this model has no past_kv_cache: it runs on whole sequences, so pass all tokens"
            )
        embedded_tokens = getattr(self, "_embedded_tokens", None)
        if kwargs.get("start_at_layer") == 0 and embedded_tokens:
            kwargs.setdefault("tokens", torch.cat(embedded_tokens, dim=1))
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
        """HookedTransformer's method: the residual stream that enters block 0.

        It is the sum of the token embeddings and any added positions.
        """
        position_ids = self.network.position_ids(embed, attention_mask)
        resid = self.network.add_positions(embed, position_ids)
        return (resid, None) if return_shortformer_pos_embed else resid


def _without_cache(method: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The arguments of a call of `method` by name, with `use_past_kv_cache` set to False."""
    call = signature(method).bind(*args, **kwargs)
    generation_kwargs = call.arguments.pop("generation_kwargs", {})
    return {**call.arguments, **generation_kwargs, "use_past_kv_cache": False}
