"""The hook points at which components write to the residual stream, and read it."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tl_sparse.circuits import ComponentLayout
from tl_sparse.errors import UnsupportedError
from tl_sparse.evaluation.running import logits_at_all_positions
from tl_sparse.hooks import TLModel, recording
from tl_sparse.tasks import TaskData

#: The flags of TransformerLens with which these hook points run, and the one that would put the
#: inputs of heads together again.
_FLAGS = {
    "use_attn_result": True,
    "use_attn_in": False,
    "use_split_qkv_input": True,
    "use_hook_mlp_in": True,
    "ungroup_grouped_query_attention": True,
}


@contextmanager
def separate_components(model: TLModel) -> Iterator[None]:
    """Within the context, each head has its own hook points for what it reads and writes.

    Raises:
        UnsupportedError: if TransformerLens has no such hook points for this model.
    """
    changed = []
    try:
        for flag, value in _FLAGS.items():
            has_setter = hasattr(model, f"set_{flag}")
            if has_setter and bool(getattr(model.cfg, flag, False)) != value:
                _set(model, flag, value)
                changed.append(flag)
        yield
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the user has seen the warning of the flag
            for flag in reversed(changed):
                _set(model, flag, not _FLAGS[flag])


def _set(model: TLModel, flag: str, value: bool) -> None:
    try:
        getattr(model, f"set_{flag}")(value)
    except NotImplementedError as error:
        raise UnsupportedError(
            f"the heads of this model have no hook points of their own, which graphs of components "
            f"need: {error}"
        ) from error


@dataclass(frozen=True)
class Reader:
    """A hook point at which the stream is read.

    Attributes:
        hook_name: its name; the activation is `[batch, pos, head, d_model]`, or without heads.
        n_sources: how many sources it reads: the first ones.
        targets: the numbers of its inputs: one for each query head, or one in all.
    """

    hook_name: str
    n_sources: int
    targets: slice | int


@dataclass(frozen=True)
class ComponentHooks:
    """All these hook points of a model, within `separate_components`.

    Attributes:
        layout: the components of the model.
        writers: hook point → the numbers of the sources whose outputs are there.
        readers: the hook points at which the stream is read, in the order of the forward pass.
    """

    layout: ComponentLayout
    writers: dict[str, slice | int]
    readers: list[Reader]

    @classmethod
    def of_model(cls, model: TLModel) -> "ComponentHooks":
        """The hook points of a model.

        Raises:
            UnsupportedError: if the model has no MLPs, or not these hook points.
        """
        layout = ComponentLayout.of_model(model)
        writers: dict[str, slice | int] = {"hook_embed": 0}
        readers = []
        for layer in range(layout.n_layers):
            block = f"blocks.{layer}"
            for letter in "qkv":
                name = f"{block}.hook_{letter}_input"
                if name not in model.hook_dict:  # TransformerLens 4 has moved it
                    name = f"{block}.attn.hook_{letter}_input"
                inputs = layout.head_inputs(layer, letter)
                readers.append(Reader(name, layout.n_before_heads(layer), inputs))
            mlp_input = layout.mlp_input(layer)
            readers.append(Reader(f"{block}.hook_mlp_in", layout.n_before_mlp(layer), mlp_input))
            writers[f"{block}.attn.hook_result"] = layout.heads(layer)
            writers[f"{block}.hook_mlp_out"] = layout.mlp(layer)
        last = f"blocks.{layout.n_layers - 1}.hook_resid_post"
        readers.append(Reader(last, layout.n_sources, layout.logits))
        missing = {*writers, *(reader.hook_name for reader in readers)} - model.hook_dict.keys()
        if missing:
            raise UnsupportedError(
                f"graphs of components need the hook point {min(missing)}, which this "
                f"{type(model).__name__} does not have"
            )
        return cls(layout, writers, readers)

    def stacked(self, outputs: Mapping[str, Tensor]) -> Float[Tensor, "batch pos source d_model"]:
        """What all sources write, from the activations at the hook points in `writers`."""
        by_source = []
        for name in self.writers:
            output = outputs[name]
            by_source.append(output if output.ndim == 4 else output.unsqueeze(2))
        return torch.cat(by_source, dim=2)

    @torch.no_grad()
    def check_stream(self, model: TLModel, data: TaskData) -> None:
        """Check, on the first pair of `data`, that the stream is the sum of what sources write.

        What does not depend on the tokens, such as biases and positions, may come to it: it is the
        same in both runs of each pair.

        Raises:
            UnsupportedError: if it is not, as where the stream passes a ReLU or AbsTopK itself, or
                norms follow the components.
        """
        pair = data.first(1).trimmed()
        last = self.readers[-1].hook_name
        with recording(model, [*self.writers, last]) as activations:
            logits_at_all_positions(model, pair.tokens)
        stream = activations[last]
        n_common = int(pair.last.min()) + 1
        outputs = self.stacked(activations).sum(2)
        change = (stream[0] - stream[1])[:n_common]
        unexplained = change - (outputs[0] - outputs[1])[:n_common]
        eps = torch.finfo(stream.dtype).eps
        if not unexplained.norm() <= 0.01 * change.norm() + 4 * eps * stream.norm():
            raise UnsupportedError(
                "the residual stream of this model is not the sum of what its components write, so "
                "that it has no edges between them that could be cut one by one"
            )
