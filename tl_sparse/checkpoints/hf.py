"""Our model folders for transformers' Auto classes, and so for `boot_transformers` of
TransformerLens 4.

`import tl_sparse.checkpoints.hf` registers them; nothing else of this package changes anything
global.
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
    """config.json of our folders, as transformers reads it; the fields are `SparseConfig`'s."""

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
    """The network as a transformers model: token ids in, logits out. `tl_sparse.load` has more."""

    config_class = SparsePretrainedConfig
    tokenizer = None

    def __init__(
        self, config: SparsePretrainedConfig, network: SparseTransformer | None = None
    ) -> None:
        super().__init__(config)
        if network is None:
            network = SparseTransformer(config.sparse_cfg)
            seed = int(torch.randint(2**31, ()))  # transformers too follows torch's own seed
            init_weights(network, seed)
        # Its modules are this model's own, so that parameters have their usual names.
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
        """Read a model, onto one device, with our own reader, which knows the compact storage."""
        if device_map is not None:
            raise UnsupportedError(
                "device_map is not possible: the model is on one device; move it with .to(device)"
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

    def save_pretrained(self, folder: str | Path, **unused: Any) -> None:
        """Write our format, as `tl_sparse`'s own models do."""
        save_model(Path(folder), self.state_dict(), self.sparse_cfg, self.tokenizer)

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

    # The adapter itself comes by our entry point; but TransformerLens 4.3 looks at entry points
    # only after it has found the architecture in this table.
    SUPPORTED_ARCHITECTURES.setdefault("SparseTransformer", SparseArchitectureAdapter)
