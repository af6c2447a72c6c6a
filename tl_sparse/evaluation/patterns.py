"""Whether heads attend under a circuit as they do in the model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_sparse.circuits import Circuit
from tl_sparse.evaluation.estimates import Estimate, mean_of_pairs
from tl_sparse.hooks import TLModel
from tl_sparse.precision import in_float32

#: Attention is called uniform, or fixed, if its distance from that is below this.
DEGENERATE = 0.05
_BY_HEAD = ("attn_q", "attn_k", "attn_v", "head")

Pattern = Float[Tensor, "prompt head query key"]


@dataclass(frozen=True)
class HeadAttention:
    """How a head attends under a circuit, beside the full model.

    Distances are total variation, from 0 (equal) to 1 (no token in common), at each query position,
    averaged over query positions and prompts. What an attention sink takes counts as one more
    token.

    Attributes:
        layer, head: the numbers of the layer and of the head, from 0.
        locations: where the head has kept nodes: "attn_q", "attn_k", "attn_v".
        distance: the distance of the circuit's pattern from the model's.
        model_to_uniform: that of the model's pattern from uniform attention to all tokens up to the
            query, with nothing for the sink. What a circuit that attends to nothing in particular
            would have as its `distance`, if there are no sinks.
        circuit_to_uniform: that of the circuit's pattern from uniform attention.
        model_spread: how much the model's pattern differs from prompt to prompt: the root of the
            summed variances over prompts, averaged over query positions. Near 0, the head attends
            by position alone.
        circuit_spread: the same for the circuit's pattern.
        remark: degenerate attention in words; else empty.
    """

    layer: int
    head: int
    locations: list[str]
    distance: Estimate
    model_to_uniform: Estimate
    circuit_to_uniform: Estimate
    model_spread: float
    circuit_spread: float
    remark: str = ""

    @property
    def attends_otherwise(self) -> bool:
        """Whether attention is degenerate in one way in the model, and not so under the circuit."""
        in_model = _kind(self.model_to_uniform, self.model_spread)
        return in_model != _kind(self.circuit_to_uniform, self.circuit_spread)


def heads_of(circuit: Circuit, model: TLModel) -> dict[tuple[int, int], list[str]]:
    """(layer, head) → the locations at which the head has kept nodes.

    In a component circuit, these are the heads themselves. With grouped queries, the nodes of a key
    or value head belong to all the heads that share it.
    """
    found: dict[tuple[int, int], list[str]] = {}
    for (layer, location), name in circuit.hooks.items():
        if location not in _BY_HEAD:
            continue
        has_nodes = circuit.kept[name].flatten(1).any(1)
        n_sharing = model.cfg.n_heads // len(has_nodes)
        for head in has_nodes.repeat_interleave(n_sharing).nonzero()[:, 0].tolist():
            found.setdefault((layer, head), []).append(location)
    return dict(sorted(found.items()))


def pattern_hook(layer: int) -> str:
    """The hook point of the attention patterns of a layer."""
    return f"blocks.{layer}.attn.hook_pattern"


@dataclass
class _Spread:
    """Sums over prompts, by query and key, from which the spread of a pattern follows."""

    n: Tensor  # [query]
    sums: Tensor  # [head, query, key]; the last key is the sink
    squares: Tensor

    @classmethod
    def of_length(cls, n_heads: int, length: int, device: torch.device) -> "_Spread":
        n = torch.zeros(length, dtype=torch.float64, device=device)
        sums = n.new_zeros(n_heads, length, length + 1)
        return cls(n, sums, sums.clone())

    def add(self, pattern: Pattern, counted: Float[Tensor, "prompt query"]) -> None:
        """Add the patterns of a batch at its counted queries; the last key is the sink."""
        length = pattern.shape[2]
        pattern = pattern.double() * counted[:, None, :, None]
        self.n[:length] += counted.sum(0)
        for sums, terms in ((self.sums, pattern), (self.squares, pattern.square())):
            sums[:, :length, :length] += terms[..., :-1].sum(0)
            sums[:, :length, -1] += terms[..., -1].sum(0)

    def of_heads(self) -> Float[Tensor, " head"]:
        """The spread of each head, averaged over queries by how many prompts have them."""
        n = self.n.clamp(min=1)[:, None]
        variances = (self.squares / n - (self.sums / n).square()).clamp(min=0)
        return (variances.sum(-1).sqrt() * self.n).sum(1) / self.n.sum()


@dataclass
class PatternSums:
    """What is measured of the patterns of one layer, batch by batch.

    Attributes:
        heads: the heads that are measured.
        length: the length of the longest prompt.
    """

    heads: Sequence[int]
    length: int
    _distances: list[Tensor] = field(default_factory=list)
    _rows: list[Tensor] = field(default_factory=list)
    _spreads: list[_Spread] = field(default_factory=list)

    def add(
        self,
        of_model: Pattern,
        of_circuit: Pattern,
        rows: Int[Tensor, " prompt"],
        counted: Float[Tensor, "prompt query"],
    ) -> None:
        """Add the patterns of all heads on a batch of prompts.

        Args:
            rows: the number of each prompt among all of them.
            counted: 1 at the query positions that count, else 0.
        """
        heads = torch.tensor(self.heads, device=of_model.device)
        model_pattern = _with_sink(of_model[:, heads])
        circuit_pattern = _with_sink(of_circuit[:, heads])
        uniform = _uniform_like(model_pattern)
        distances = [
            _distance(model_pattern, circuit_pattern, counted),
            _distance(model_pattern, uniform, counted),
            _distance(circuit_pattern, uniform, counted),
        ]
        self._distances.append(torch.stack(distances, dim=2))
        self._rows.append(rows)
        if not self._spreads:
            for _ in range(2):
                spread = _Spread.of_length(len(self.heads), self.length, of_model.device)
                self._spreads.append(spread)
        self._spreads[0].add(model_pattern, counted)
        self._spreads[1].add(circuit_pattern, counted)

    def results(self, layer: int, locations: Mapping[int, list[str]]) -> list[HeadAttention]:
        """The record of each head; `locations` are those of its kept nodes."""
        in_order = torch.cat(self._rows).argsort()
        distances = torch.cat(self._distances)[in_order]  # [prompt, head, which]
        spreads = torch.stack([spread.of_heads() for spread in self._spreads], dim=1)
        found = []
        for i, head in enumerate(self.heads):
            distance, model_to_uniform, circuit_to_uniform = map(
                mean_of_pairs, distances[:, i].unbind(1)
            )
            model_spread, circuit_spread = spreads[i].tolist()
            remark = _remark(
                _kind(model_to_uniform, model_spread), _kind(circuit_to_uniform, circuit_spread)
            )
            found.append(
                HeadAttention(
                    layer=layer,
                    head=head,
                    locations=locations[head],
                    distance=distance,
                    model_to_uniform=model_to_uniform,
                    circuit_to_uniform=circuit_to_uniform,
                    model_spread=model_spread,
                    circuit_spread=circuit_spread,
                    remark=remark,
                )
            )
        return found


def _with_sink(pattern: Pattern) -> Pattern:
    """The pattern with one more key: the share that an attention sink takes, 0 without sinks."""
    pattern = in_float32(pattern)
    sink = 1 - pattern.sum(-1, keepdim=True)
    return torch.cat([pattern, sink], dim=-1)


def _uniform_like(pattern: Pattern) -> Pattern:
    """Uniform attention of each query to itself and all tokens before it, and none to the sink."""
    length = pattern.shape[2]
    seen = torch.ones(length, length + 1, device=pattern.device).tril()
    return (seen / seen.sum(1, keepdim=True)).expand_as(pattern)


def _distance(
    pattern: Pattern, other: Pattern, counted: Float[Tensor, "prompt query"]
) -> Float[Tensor, "prompt head"]:
    """The total variation distance, averaged over the queries that count."""
    distances = (pattern - other).abs().sum(-1) / 2
    return (distances * counted[:, None]).sum(-1) / counted.sum(1)[:, None]


def _kind(to_uniform: Estimate, spread: float) -> str:
    """How degenerate attention is: "uniform", "fixed" or, if it is not, ""."""
    if to_uniform.value < DEGENERATE:
        return "uniform"
    return "fixed" if spread < DEGENERATE else ""


def _remark(in_model: str, in_circuit: str) -> str:
    """What is said of a head whose attention is degenerate in the model or under the circuit.

    The sentence is about the model unless it names the circuit.
    """
    words = {
        "uniform": "spreads its attention evenly over all tokens",
        "fixed": "attends by position alone, whatever the prompt says",
        "": "attends by what the prompt says",
    }
    if in_model == in_circuit:
        return f"{words[in_model]}, in the model and under the circuit" if in_model else ""
    return f"{words[in_model]}; under the circuit it {words[in_circuit]}"
