"""The model class for TransformerLens 4: a true `TransformerBridge` that runs our network."""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import ArchitectureAdapter, TransformerBridge
from transformers import PreTrainedTokenizerBase

from tl_sparse.errors import UnsupportedError
from tl_sparse.faces.model import SparseModel
from tl_sparse.faces.tl_config import tl_config_fields
from tl_sparse.faces.tokens import prepare_tokenizer
from tl_sparse.network import SparseTransformer


class SparseArchitectureAdapter(ArchitectureAdapter):
    """Maps no components, because the network already has TransformerLens' names and hooks."""

    supports_kv_cache = False

    def __init__(self, cfg: TransformerBridgeConfig) -> None:
        super().__init__(cfg)
        self.component_mapping: dict[str, Any] = {}
        self.reads_bigram_table = False

    def apply_output_logits_transform(self, logits: Tensor) -> Tensor:
        """Check logits that TransformerLens' logit lenses read from the residual stream alone.

        Raises:
            UnsupportedError: if the model has a bigram table.
        """
        if self.reads_bigram_table:
            raise UnsupportedError(
                "a part of this model's logits comes from its bigram table, which bypasses the "
                "residual stream, so the stream alone does not give the logits: add "
                "cache['hook_bigram'] to unembed(ln_final(resid))"
            )
        return super().apply_output_logits_transform(logits)

    def validate_output_logits_transform(self) -> None:
        """Run the same check before a logit lens starts."""
        self.apply_output_logits_transform(torch.zeros(1))

    def setup_hook_compatibility(self, bridge: TransformerBridge) -> None:
        """Give the bridge the network's modules; TransformerBridge calls this in its set-up."""
        # `boot_transformers` builds TransformerLens' own class, whose forward method cannot handle
        # padding or the bigram table.
        bridge.__class__ = SparseTransformerBridge
        for name, value in tl_config_fields(bridge.network).items():
            if name != "model_name":
                object.__setattr__(bridge.cfg, name, value)
        self.reads_bigram_table = bridge.network.cfg.bigram_table
        # This is the bridge's fallback for parameters without a component; here, modules own them.
        bridge._modules.pop("_container_state_owners", None)
        bridge.adopt_network(bridge.cfg)
        # As in TransformerLens 4's own models, these hook points have a second name in `attn`.
        for block in bridge.blocks:
            for name in ("hook_q_input", "hook_k_input", "hook_v_input", "hook_attn_in"):
                setattr(block.attn, name, getattr(block, name))
        bridge.clear_hook_registry()
        bridge._initialize_hook_registry()


class SparseTransformerBridge(SparseModel, TransformerBridge):
    """Inherits everything but `forward` and its set-up from `TransformerBridge`."""

    # TransformerLens' aliases refer to components of its own bridge. Here, hook points already have
    # these names.
    hook_aliases: dict[str, str | list[str]] = {}

    def __init__(
        self, network: SparseTransformer, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> None:
        cfg = TransformerBridgeConfig(architecture="SparseTransformer", **tl_config_fields(network))
        if tokenizer is not None:
            tokenizer, cfg.tokenizer_prepends_bos = prepare_tokenizer(tokenizer, cfg.d_vocab)
        TransformerBridge.__init__(self, network, SparseArchitectureAdapter(cfg), tokenizer)

    @property
    def network(self) -> SparseTransformer:  # type: ignore[override]
        """The network that runs: the wrapped model, or the network inside a transformers model."""
        model: Any = self.original_model
        return getattr(model, "network", model)

    def run_with_cache(self, *args: Any, stop_at_layer: int | None = None, **kwargs: Any) -> Any:
        """`TransformerBridge.run_with_cache` with a `stop_at_layer` that works on our blocks.

        TransformerBridge's own `stop_at_layer` works only on TransformerBridge's own blocks.
        """
        if stop_at_layer is None:
            return super().run_with_cache(*args, **kwargs)
        self.__dict__["forward"] = partial(self.forward, stop_at_layer=stop_at_layer)
        try:
            return super().run_with_cache(*args, **kwargs)
        finally:
            del self.__dict__["forward"]

    def generate(
        self, input: Any = "", *args: Any, prepend_bos: bool | None = None, **kwargs: Any
    ) -> Any:
        """`TransformerBridge.generate`, which masks padding according to `prepend_bos`.

        TransformerBridge itself masks padding according to `cfg.default_prepend_bos` only.
        """
        default = self.cfg.default_prepend_bos
        if prepend_bos is not None:
            self.cfg.default_prepend_bos = prepend_bos
        try:
            prompt = self._prompt(input)
            return super().generate(prompt, *args, prepend_bos=prepend_bos, **kwargs)
        finally:
            self.cfg.default_prepend_bos = default

    def enable_compatibility_mode(
        self, disable_warnings: bool = False, no_processing: bool = False, **processing: Any
    ) -> None:
        """TransformerBridge's method. Names and shapes are HookedTransformer's in either mode.

        Raises:
            UnsupportedError: unless `no_processing`, because the weights must stay as they are.
        """
        if not no_processing:
            self._refuse_processing()
        self.compatibility_mode = True

    def _validate_attention_fork_supported(self, flag_name: str) -> None:
        """Accept every flag; TransformerBridge checks here which flags its attention supports."""
