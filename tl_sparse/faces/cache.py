"""The activation cache of our models: TransformerLens' cache, with AbsTopK accounted for."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import ActivationCache
from transformer_lens.utilities.slice import Slice


class SparseActivationCache(ActivationCache):
    """TransformerLens' cache, in which head and neuron results sum to the output of their layer.

    In a channel that AbsTopK drops, each head or neuron writes an equal share of minus the bias, so
    that their sum with the bias is zero.
    """

    def apply_slice_to_batch_dim(self, batch_slice: Any) -> "SparseActivationCache":
        """The cache of the given part of the batch."""
        sliced = super().apply_slice_to_batch_dim(batch_slice)
        return SparseActivationCache(sliced.cache_dict, self.model, sliced.has_batch_dim)

    def decompose_resid(self, *args: Any, **kwargs: Any) -> Any:
        """TransformerLens' method; warns if the residual stream is not a sum of its components."""
        self.model.warn_if_not_additive("decompose_resid")
        return super().decompose_resid(*args, **kwargs)

    def get_full_resid_decomposition(self, *args: Any, **kwargs: Any) -> Any:
        """TransformerLens' method; warns if the residual stream is not a sum of its components."""
        self.model.warn_if_not_additive("get_full_resid_decomposition")
        return super().get_full_resid_decomposition(*args, **kwargs)

    def compute_head_results(self) -> None:
        """Cache what each head writes: attn_out = Σ hook_result + b_O."""
        self._ensure_head_results()

    def _ensure_head_results(self) -> bool:
        names = [f"blocks.{layer}.attn.hook_result" for layer in range(self.model.cfg.n_layers)]
        missing = [name for name in names if name not in self.cache_dict]
        for name in missing:
            module_name = name.removesuffix(".hook_result")
            attn = self.model.get_submodule(module_name)
            z = self.cache_dict[f"{module_name}.hook_z"]
            self.cache_dict[name] = attn.head_results(z)
        return not missing

    def get_neuron_results(
        self,
        layer: int,
        neuron_slice: Any = None,
        pos_slice: Any = None,
        project_output_onto: Tensor | None = None,
    ) -> Float[Tensor, "*batch pos neuron d_model"]:
        """What each neuron writes: mlp_out = Σ results + b_out."""
        block = self.model.blocks[layer]
        if block.topk_mlp_out.k is None:
            return super().get_neuron_results(layer, neuron_slice, pos_slice, project_output_onto)
        results = super().get_neuron_results(layer, neuron_slice, pos_slice)
        mlp_out = Slice.unwrap(pos_slice).apply(self["mlp_out", layer], dim=-2)
        is_kept = mlp_out.ne(0).unsqueeze(-2)
        n_neurons = block.mlp.W_out.shape[0]
        results = torch.where(is_kept, results, -block.mlp.b_out / n_neurons)
        return results if project_output_onto is None else results @ project_output_onto

    def _stack_neuron_results_apply_ln_projected(
        self,
        layer: int,
        pos_slice: Slice,
        neuron_slice: Slice,
        project_2d: Tensor,
        **mlp_input: bool,
    ) -> Float[Tensor, "neuron *batch pos output"]:
        # TransformerLens' own method folds norm and projection into W_out, and therefore cannot
        # leave out the channels that AbsTopK drops.
        stacked = self.stack_neuron_results(layer, pos_slice=pos_slice, neuron_slice=neuron_slice)
        normalized = self.apply_ln_to_stack(stacked, layer, pos_slice=pos_slice, **mlp_input)
        return normalized @ project_2d
