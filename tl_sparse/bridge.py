"""The face for TransformerLens 4: a true `TransformerBridge` that runs our network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import ArchitectureAdapter, TransformerBridge

from tl_sparse.errors import TokenizerError
from tl_sparse.faces import SparseModel, prepare_tokenizer, tl_config_fields
from tl_sparse.modules import SparseTransformer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class SparseArchitectureAdapter(ArchitectureAdapter):
    """Maps nothing: the network's modules already have TransformerLens' names and hook points."""

    supports_kv_cache = False

    def __init__(self, cfg: TransformerBridgeConfig) -> None:
        super().__init__(cfg)
        self.component_mapping: dict[str, Any] = {}

    def setup_hook_compatibility(self, bridge: TransformerBridge) -> None:
        """Give the bridge the network's modules. TransformerBridge calls this while it is being set up."""
        # The bridge's fallback for parameters that no component owns; now the modules themselves own them.
        bridge._modules.pop("_container_state_owners", None)
        for name, child in bridge.original_model.named_children():
            setattr(bridge, name, child)
        bridge.clear_hook_registry()
        bridge._initialize_hook_registry()


class SparseTransformerBridge(SparseModel, TransformerBridge):
    """Inherits everything but `forward` and its set-up from `TransformerBridge`."""

    # The stock aliases point at components of the stock bridge; here the names are the hook points' own.
    hook_aliases: dict[str, str | list[str]] = {}

    def __init__(self, network: SparseTransformer, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        cfg = TransformerBridgeConfig(architecture="SparseTransformer", **tl_config_fields(network.cfg, network))
        if tokenizer is not None:
            tokenizer, cfg.tokenizer_prepends_bos = prepare_tokenizer(tokenizer, cfg.d_vocab)
        TransformerBridge.__init__(self, network, SparseArchitectureAdapter(cfg), tokenizer)

    @property
    def network(self) -> SparseTransformer:  # type: ignore[override]
        network: Any = self.original_model
        return network

    def to_tokens(self, input: str | list[str], *args: Any, **kwargs: Any) -> Any:
        if self.tokenizer is None:
            raise TokenizerError("this model has no tokenizer, so it takes token ids only; model.tokenizer = … sets it")
        return super().to_tokens(input, *args, **kwargs)
