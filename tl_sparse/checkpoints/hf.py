"""Support for our model folders in transformers' Auto classes.

TransformerLens 4's `boot_transformers` uses these classes. `import tl_sparse.checkpoints.hf`
registers our format with them; no other module of this package changes global state.
"""

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from tl_sparse.checkpoints.formats import read_checkpoint
from tl_sparse.checkpoints.native import save_model
from tl_sparse.checkpoints.network import build_network, resolve_dtype
from tl_sparse.checkpoints.sources import find
from tl_sparse.errors import UnsupportedError
from tl_sparse.faces import transformer_lens_line
from tl_sparse.network import SparseConfig, SparseTransformer, init_weights


class SparsePretrainedConfig(PretrainedConfig):
    """config.json of our folders as a transformers config; it has `SparseConfig`'s fields."""

    model_type = "tl_sparse"

    @property
    def sparse_cfg(self) -> SparseConfig:
        """The architecture."""
        values = {}
        for field in fields(SparseConfig):
            if hasattr(self, field.name):
                values[field.name] = getattr(self, field.name)
        return SparseConfig.from_dict(values)


class SparseTransformerForCausalLM(PreTrainedModel):
    """The network as a transformers model from token ids to logits.

    Models from `tl_sparse.load` have more features.
    """

    config_class = SparsePretrainedConfig
    tokenizer = None

    def __init__(
        self, config: SparsePretrainedConfig, network: SparseTransformer | None = None
    ) -> None:
        super().__init__(config)
        if network is None:
            network = SparseTransformer(config.sparse_cfg)
            seed = int(torch.randint(2**31, ()))  # as in transformers, torch's own seed decides
            init_weights(network, seed)
        # The network's modules become children of this model, so parameters keep their names.
        self.__dict__["network"] = network
        for name, child in network.named_children():
            setattr(self, name, child)

    @classmethod
    def from_pretrained(
        cls,
        source: str,
        *,
        config: Any = None,
        revision: str | None = None,
        device_map: Any = None,
        **options: Any,
    ) -> Any:
        """Load a model onto the CPU with our own reader, which supports the compact storage."""
        if device_map is not None:
            raise UnsupportedError(
                "device_map is not possible: the model runs on one device; move it with .to(device)"
            )
        dtype = options.get("dtype", options.get("torch_dtype"))
        if dtype == "auto":
            dtype = None
        folder = find(source, revision)
        network = build_network(read_checkpoint(folder), folder, dtype=resolve_dtype(dtype))
        if not config:
            config = SparsePretrainedConfig.from_pretrained(folder)
        return cls(config, network).eval()

    @property
    def sparse_cfg(self) -> SparseConfig:
        """The architecture."""
        return self.network.cfg

    def save_pretrained(self, folder: str | Path, overwrite: bool = False, **unused: Any) -> None:
        """Write our format, like the `save_pretrained` of models from `tl_sparse.load`."""
        save_model(
            Path(folder), self.state_dict(), self.sparse_cfg, self.tokenizer, overwrite=overwrite
        )

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> CausalLMOutput:
        """Logits [batch, pos, d_vocab]."""
        return CausalLMOutput(logits=self.network(input_ids, attention_mask, position_ids))


AutoConfig.register("tl_sparse", SparsePretrainedConfig)
AutoModelForCausalLM.register(SparsePretrainedConfig, SparseTransformerForCausalLM)
if transformer_lens_line() == 4:
    from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES

    from tl_sparse.faces import SparseArchitectureAdapter

    # Our entry point registers the adapter, but TransformerLens 4.3 reads entry points only after
    # it has found the architecture in this table.
    SUPPORTED_ARCHITECTURES.setdefault("SparseTransformer", SparseArchitectureAdapter)
