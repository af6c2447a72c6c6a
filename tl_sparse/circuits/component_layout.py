"""The components of a model and the edges between them, as EAP-IG and MIB number them.

Sources write to the residual stream: `input` (the token embedding), each head and each MLP. Targets
read it: the query, key and value input of each head, the input of each MLP, and the logits.
"""

import re
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from tl_sparse.errors import CircuitError, UnsupportedError
from tl_sparse.hooks import TLModel

#: The largest number of pairs of a source and a target: 70 billion weights in 80 layers of 64 heads
#: have 80 million.
MAX_PAIRS = 2**27
#: The largest number of entries in what is known of each channel of each source.
MAX_CHANNELS = 2**26
_SIZES = ("n_layers", "n_heads", "d_model")
_LETTERS = "qkv"
_HEAD = re.compile(r"a([0-9]{1,9})\.h([0-9]{1,9})", re.ASCII)
_MLP = re.compile(r"m([0-9]{1,9})", re.ASCII)
_HEAD_INPUT = re.compile(r"(.*)<([qkv])>", re.ASCII)


@dataclass(frozen=True)
class ComponentLayout:
    """The sizes of a model, on which its components depend.

    Sources are numbered in the order of the forward pass: `input`, then in each layer its heads
    (`a0.h0`, `a0.h1`, …) and its MLP (`m0`). Targets are in each layer the query inputs of its
    heads (`a0.h0<q>`, …), their key inputs, their value inputs, and the input of the MLP (`m0`);
    at last `logits`.

    Attributes:
        n_layers: the number of layers.
        n_heads: the number of query heads in each layer.
        d_model: the number of residual channels.
        parallel_attn_mlp: whether the MLP of a layer reads the same stream as its heads, so that no
            edge leads from the heads to it.
    """

    n_layers: int
    n_heads: int
    d_model: int
    parallel_attn_mlp: bool = False

    def __post_init__(self) -> None:
        for name in _SIZES:
            size = getattr(self, name)
            if type(size) is not int or size < 1:
                raise CircuitError(f"{name} = {size!r} is not possible; it must be at least 1")
        if type(self.parallel_attn_mlp) is not bool:
            raise CircuitError(
                f"parallel_attn_mlp = {self.parallel_attn_mlp!r} is not possible; "
                "it must be true or false"
            )
        too_many_pairs = self.n_sources * self.n_targets > MAX_PAIRS
        if too_many_pairs or self.n_sources * self.d_model > MAX_CHANNELS:
            raise CircuitError(
                f"a model of {self.n_layers:,} layers with {self.n_heads:,} heads and "
                f"{self.d_model:,} residual channels is larger than any that this package reads"
            )

    @classmethod
    def of_model(cls, model: TLModel) -> "ComponentLayout":
        """The components of a model.

        Raises:
            UnsupportedError: if the model has no MLPs, which the format does not allow.
        """
        cfg = model.cfg
        if getattr(cfg, "attn_only", False):
            raise UnsupportedError(
                "a graph of EAP-IG has an MLP in each layer, and this model has none"
            )
        is_parallel = bool(getattr(cfg, "parallel_attn_mlp", False))
        return cls(cfg.n_layers, cfg.n_heads, cfg.d_model, is_parallel)

    def to_json(self) -> dict[str, Any]:
        """The sizes as EAP-IG writes them."""
        return {
            "n_layers": self.n_layers,
            "n_heads": self.n_heads,
            "parallel_attn_mlp": self.parallel_attn_mlp,
            "d_model": self.d_model,
        }

    @property
    def n_sources(self) -> int:
        """The number of components that write to the stream."""
        return 1 + self.n_layers * (self.n_heads + 1)

    @property
    def n_targets(self) -> int:
        """The number of inputs that read the stream."""
        return self.n_layers * (3 * self.n_heads + 1) + 1

    # The numbers of components

    def heads(self, layer: int) -> slice:
        """The numbers of the sources that are the heads of a layer."""
        first = 1 + layer * (self.n_heads + 1)
        return slice(first, first + self.n_heads)

    def mlp(self, layer: int) -> int:
        """The number of the source that is the MLP of a layer."""
        return self.heads(layer).stop

    def head_inputs(self, layer: int, letter: str) -> slice:
        """The numbers of the targets that are the `q`, `k` or `v` inputs of a layer's heads."""
        first = layer * (3 * self.n_heads + 1) + _LETTERS.index(letter) * self.n_heads
        return slice(first, first + self.n_heads)

    def mlp_input(self, layer: int) -> int:
        """The number of the target that is the input of the MLP of a layer."""
        return self.head_inputs(layer, "v").stop

    @property
    def logits(self) -> int:
        """The number of the target that is the logits."""
        return self.n_targets - 1

    def n_before_heads(self, layer: int) -> int:
        """How many sources the heads of a layer read: the first ones."""
        return self.heads(layer).start

    def n_before_mlp(self, layer: int) -> int:
        """How many sources the MLP of a layer reads: the first ones."""
        return self.heads(layer).start if self.parallel_attn_mlp else self.mlp(layer)

    # Names

    @property
    def sources(self) -> list[str]:
        """The names of the sources, in the order of their numbers."""
        names = ["input"]
        for layer in range(self.n_layers):
            names += [f"a{layer}.h{head}" for head in range(self.n_heads)]
            names.append(f"m{layer}")
        return names

    @property
    def targets(self) -> list[str]:
        """The names of the targets, in the order of their numbers."""
        names = []
        for layer in range(self.n_layers):
            for letter in _LETTERS:
                names += [f"a{layer}.h{head}<{letter}>" for head in range(self.n_heads)]
            names.append(f"m{layer}")
        return [*names, "logits"]

    def source_number(self, name: str) -> int:
        """The number of the source with this name.

        Raises:
            CircuitError: if there is no such source; `edge_number` raises it too.
        """
        if name == "input":
            return 0
        if match := _MLP.fullmatch(name):
            layer = int(match[1])
            if layer < self.n_layers:
                return self.mlp(layer)
        if match := _HEAD.fullmatch(name):
            layer, head = int(match[1]), int(match[2])
            if layer < self.n_layers and head < self.n_heads:
                return self.heads(layer).start + head
        raise CircuitError(
            f"there is no node {name[:60]!r} in a model of {self.n_layers} layers with "
            f"{self.n_heads} heads; nodes are 'input', 'a0.h0' to "
            f"'a{self.n_layers - 1}.h{self.n_heads - 1}', 'm0' to 'm{self.n_layers - 1}' "
            "and 'logits'"
        )

    def edge_number(self, name: str) -> tuple[int, int]:
        """The numbers of the source and the target of an edge, such as `input->a1.h2<q>`."""
        source_name, arrow, target_name = name.partition("->")
        source = self.source_number(source_name)
        target = self._target_number(target_name) if arrow else None
        if target is None or source >= self._n_before(target_name):
            raise CircuitError(
                f"{name[:60]!r} is no edge; edges lead to a later node, and those to a head name "
                "its input, as 'm0->a1.h2<q>' does"
            )
        return source, target

    def _target_number(self, name: str) -> int | None:
        """The number of the target with this name; None if it names no input."""
        if name == "logits":
            return self.logits
        letter = ""
        if match := _HEAD_INPUT.fullmatch(name):
            name, letter = match[1], match[2]
        source = self.source_number(name)
        layer, place = divmod(source - 1, self.n_heads + 1)
        is_head = source > 0 and place < self.n_heads
        if source == 0 or is_head != bool(letter):
            return None
        return self.head_inputs(layer, letter).start + place if is_head else self.mlp_input(layer)

    def _n_before(self, target_name: str) -> int:
        """How many sources a target reads."""
        if target_name == "logits":
            return self.n_sources
        source = self.source_number(target_name.partition("<")[0])
        layer, place = divmod(source - 1, self.n_heads + 1)
        return self.n_before_heads(layer) if place < self.n_heads else self.n_before_mlp(layer)

    def edge_name(self, source: int, target: int) -> str:
        """The name of an edge by its numbers."""
        return f"{self.sources[source]}->{self.targets[target]}"

    def real_edges(self) -> Bool[Tensor, "source target"]:
        """Which pairs of a source and a target are edges: the source is before the target."""
        is_edge = torch.zeros(self.n_sources, self.n_targets, dtype=torch.bool)
        for layer in range(self.n_layers):
            inputs = slice(self.head_inputs(layer, "q").start, self.head_inputs(layer, "v").stop)
            is_edge[: self.n_before_heads(layer), inputs] = True
            is_edge[: self.n_before_mlp(layer), self.mlp_input(layer)] = True
        is_edge[:, self.logits] = True
        return is_edge

    def inputs_of_sources(self) -> Bool[Tensor, "source target"]:
        """Which targets are inputs of which source; `input` has none."""
        is_input = torch.zeros(self.n_sources, self.n_targets, dtype=torch.bool)
        for layer in range(self.n_layers):
            heads = torch.arange(self.n_heads)
            for letter in _LETTERS:
                first_input = self.head_inputs(layer, letter).start
                is_input[self.heads(layer).start + heads, first_input + heads] = True
            is_input[self.mlp(layer), self.mlp_input(layer)] = True
        return is_input
