"""Our model folders for transformers' Auto classes, and so for TransformerLens 4's `boot_transformers`.

`import tl_sparse.hf` registers them; nothing else of this package changes anything global.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from tl_sparse.config import SparseConfig
from tl_sparse.faces import transformer_lens_line
from tl_sparse.modules import SparseTransformer


class SparsePretrainedConfig(PretrainedConfig):
    """config.json of our folders, as transformers reads it; the fields are `SparseConfig`'s."""

    model_type = "tl_sparse"

    @property
    def sparse_cfg(self) -> SparseConfig:
        return SparseConfig.from_dict({f.name: getattr(self, f.name) for f in fields(SparseConfig)})


class SparseTransformerForCausalLM(PreTrainedModel):
    """The network as a transformers model: token ids in, logits out."""

    config_class = SparsePretrainedConfig

    def __init__(self, config: SparsePretrainedConfig, network: SparseTransformer | None = None) -> None:
        super().__init__(config)
        network = SparseTransformer(config.sparse_cfg) if network is None else network
        # Its modules are this model's own, so that parameters have their usual names.
        self.__dict__["network"] = network
        for name, child in network.named_children():
            setattr(self, name, child)

    @classmethod
    def from_pretrained(cls, source: str, *, config: Any = None, revision: str | None = None, **unused: Any) -> Any:
        """Read by `tl_sparse`'s own reader, which also knows the compact storage of zeros."""
        from tl_sparse.checkpoints import build_network, read_checkpoint
        from tl_sparse.sources import find

        folder = find(source, revision)
        config = config or SparsePretrainedConfig.from_pretrained(folder)
        return cls(config, build_network(*read_checkpoint(folder), folder)).eval()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> CausalLMOutput:
        return CausalLMOutput(logits=self.network(input_ids, attention_mask, position_ids))


AutoConfig.register("tl_sparse", SparsePretrainedConfig)
AutoModelForCausalLM.register(SparsePretrainedConfig, SparseTransformerForCausalLM)
if transformer_lens_line() == 4:
    from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES

    from tl_sparse.bridge import SparseArchitectureAdapter

    # The adapter itself comes by our entry point; but TransformerLens 4.3 looks at entry points only after it
    # has found the architecture in this table.
    SUPPORTED_ARCHITECTURES.setdefault("SparseTransformer", SparseArchitectureAdapter)
