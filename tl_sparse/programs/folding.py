"""From a model and a circuit to the parts of a compiled circuit.

Every node outside the circuit is a constant, so everything that depends on such nodes alone is
computed here, once, in float64.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tl_sparse.circuits import Circuit, Node, NodeSizes
from tl_sparse.network import SparseConfig, SparseTransformer
from tl_sparse.programs.blocks import MLP, Attention, Block, ByHead, Heads
from tl_sparse.programs.channels import Channels, fold_channels, smaller_contest
from tl_sparse.programs.nodes_held import HeadNodes, Location, Matrix, matrix_of, precise
from tl_sparse.programs.stream import Logits, NormScale, Read, Write
from tl_sparse.programs.token_read import TokenRead, fold_token_read
from tl_sparse.programs.varying import normalized_positions, varying_channels


class Folding:
    """Folds a network under a circuit, block by block.

    It must be used in the context in which the network runs under the circuit, where its weight
    matrices are those with the circuit's edges cut.

    Attributes:
        varying: the channels of the residual stream that the compiled circuit computes.
        table: by token, the residual stream where the folding has arrived. In the varying channels
            it has no meaning.
    """

    def __init__(
        self, circuit: Circuit, network: SparseTransformer, tokens: Int[Tensor, " logit"] | None
    ) -> None:
        self._circuit = circuit
        self._network = network
        self._cfg: SparseConfig = network.cfg
        self._tokens = tokens
        embedding = precise(network.embed.W_E)
        embed = self.location(0, "embed_out", self._cfg.d_model)
        self.table = torch.where(embed.is_kept, embedding, embed.means)
        self.varying = varying_channels(circuit, network, tokens)
        # Whether the stream is still a function of the token: none of its channels varies yet.
        self._is_of_token = len(self.varying) < self._cfg.d_model

    @property
    def _is_varying(self) -> Bool[Tensor, " d_model"]:
        mask = torch.zeros(self._cfg.d_model, dtype=torch.bool)
        mask[self.varying] = True
        return mask

    def location(self, layer: int, name: str, size: int) -> Location:
        """The nodes at a location. Where the circuit has no mask, all nodes run."""
        hook_name = self._circuit.hooks.get((layer, name))
        if hook_name is None:
            return Location(torch.ones(size, dtype=torch.bool), torch.zeros(size).double())
        means = precise(self._circuit.means[hook_name]).flatten()
        return Location(self._circuit.kept[hook_name].flatten().cpu(), means)

    def block_location(self, layer: int, name: str) -> Location:
        return self.location(layer, name, self._cfg.location_size(name))

    def _names(self, layer: int, name: str, is_kept: Bool[Tensor, " node"]) -> list[str]:
        """The names of the nodes at a location where the mask is true."""
        sizes = NodeSizes(self._cfg.d_model, self._cfg.d_head)
        names = []
        for index in is_kept.nonzero()[:, 0].tolist():
            names.append(str(Node(layer, name, index, sizes.shown_index(name, index))))
        return names

    def _block(self, layer: int) -> Any:
        """The network's block, whose attributes have no types that are known to type checkers."""
        return self._network.blocks[layer]

    # The stream

    def start(self) -> Float[Tensor, "d_vocab varying"]:
        """By token, the varying channels as they enter the first block, without positions."""
        return self.table[:, self.varying]

    def added(self) -> Float[Tensor, "n_ctx varying"] | None:
        """By position, what positions add to them."""
        if self._cfg.positions != "added":
            return None
        return precise(self._network.pos_embed.W_pos)[:, self.varying]

    def _norm_scale(self) -> NormScale:
        cfg = self._cfg
        return NormScale(cfg.d_model, cfg.eps, cfg.normalization == "layer")

    def _others(self) -> Float[Tensor, "d_vocab other"]:
        """By token, the stream in the channels that do not vary."""
        return self.table[:, ~self._is_varying]

    def read(self, layer: int, name: str) -> Read | TokenRead:
        """The kept channels of what attention (`attn_in`) or the MLP (`mlp_in`) reads now."""
        cfg = self._cfg
        block = self._block(layer)
        norm = block.ln1 if name == "attn_in" else block.ln2
        weight = precise(norm.w)
        location = self.block_location(layer, name)
        if self._is_of_token:
            squares = self.table.square().mean(-1, keepdim=True)
            stream = self.table / (squares + cfg.eps).sqrt() * weight
            k = cfg.topk(name)
            nodes = self._names(layer, name, location.is_kept)
            return fold_token_read(stream, self._positions(norm), location.is_kept, k, nodes)
        is_own = location.is_kept[: cfg.d_model] & ~self._is_varying
        table, k = self._read_table(name, weight, is_own)
        # Where each channel of the read is among those that are computed.
        n_table = 0 if table is None else table.shape[1] - 1
        n_varying = len(self.varying)
        place = torch.zeros(cfg.d_read, dtype=torch.long)
        place[: cfg.d_model][is_own] = torch.arange(int(is_own.sum()))
        place[self.varying] = n_table + torch.arange(n_varying)
        place[cfg.d_model :] = n_table + n_varying + torch.arange(cfg.d_pos)
        return Read(
            scale=self._norm_scale(),
            table=table,
            weight=weight[self.varying],
            bias=precise(norm.b)[self.varying] if cfg.norm_bias else None,
            positions=self._positions(norm),
            k=k,
            chosen=place[location.kept],
            nodes=self._names(layer, name, location.is_kept),
        )

    def _read_table(
        self, name: str, weight: Float[Tensor, " d_model"], is_own: Bool[Tensor, " d_model"]
    ) -> tuple[Float[Tensor, "d_vocab column"] | None, int | None]:
        """The `table` of a read, and its `k`."""
        k = self._cfg.topk(name)
        is_other = ~self._is_varying
        if not bool(is_other.any()):
            return None, k
        columns = [self._others().square().sum(-1, keepdim=True)]
        columns.append((self.table * weight)[:, is_own])
        if k is not None:
            rivals = (self.table * weight)[:, is_other & ~is_own].abs()
            n_rivals = rivals.shape[1]
            n_always_kept, k_among = smaller_contest(k, self._cfg.d_read - n_rivals)
            largest = rivals.topk(min(k, n_rivals)).values
            columns.append(largest[:, n_always_kept:])
            k = k_among
        return torch.cat(columns, dim=1), k

    def _positions(self, norm: Any) -> Float[Tensor, "n_ctx d_pos"] | None:
        """By position, the positional channels that a block reads after this norm."""
        if self._cfg.positions != "concatenated":
            return None
        return normalized_positions(self._network, norm)

    def write(self, layer: int, name: str, topk_name: str) -> Write:
        """What attention (`attn_out`) or the MLP (`mlp_out`) adds to the stream.

        The table moves on past this write.
        """
        cfg = self._cfg
        location = self.block_location(layer, name)
        self._is_of_token &= not bool(location.is_kept.any())
        self.table = self.table + location.held
        if cfg.resid_relu:
            self.table = F.relu(self.table)
        place = torch.zeros(cfg.d_model, dtype=torch.long)
        place[self.varying] = torch.arange(len(self.varying))
        constant = location.held[self.varying]
        return Write(
            constant=constant if bool(constant.any()) else None,
            channels=place[location.kept],
            relu=cfg.resid_relu,
            k=cfg.topk(topk_name),
        )

    # The blocks

    def block(self, layer: int) -> Block:
        """One block; blocks must be folded in their order."""
        start = None
        k = self._cfg.topk("resid_pre")
        if k is not None:
            start = Write(None, self.varying[:0], relu=False, k=k)
        attention = self._attention(layer)
        after_attention = self.write(layer, "attn_out", "resid_post_attn")
        mlp = self._mlp(layer)
        after_mlp = self.write(layer, "mlp_out", "resid_post_mlp")
        return Block(start, attention, after_attention, mlp, after_mlp)

    def _channels(
        self, layer: int, name: str, matrix: Matrix, act_fn: str | None = None
    ) -> Channels:
        """The kept channels at a location that this matrix leads to."""
        is_kept = self.block_location(layer, name).is_kept
        nodes = self._names(layer, name, is_kept)
        k = self._cfg.topk(name)
        return fold_channels(matrix.weight, matrix.bias, is_kept, k, act_fn, nodes)

    def _mlp(self, layer: int) -> MLP | None:
        if not bool(self.block_location(layer, "mlp_out").is_kept.any()):
            return None
        mlp = self._block(layer).mlp
        into = matrix_of(mlp.times_in, mlp.b_in).from_kept(self.block_location(layer, "mlp_in"))
        out = matrix_of(mlp.times_out, mlp.b_out)
        out = out.from_kept(self.block_location(layer, "mlp_neuron"))
        return MLP(
            self.read(layer, "mlp_in"),
            self._channels(layer, "mlp_neuron", into, self._cfg.act_fn),
            self._channels(layer, "mlp_out", out),
        )

    def _attention(self, layer: int) -> Attention | None:
        if not bool(self.block_location(layer, "attn_out").is_kept.any()):
            return None
        rows, bias = self._output_rows(layer)
        out = self._channels(layer, "attn_out", Matrix(rows.flatten(0, 1), bias))
        # Which rows lead to a kept channel, or to one that competes with it: [head, channel].
        weight = out.weight.unflatten(0, rows.shape[:2])
        matters = weight.ne(0).any(-1)
        heads = matters.any(-1).nonzero()[:, 0]
        channels = matters.any(0)
        out.weight = nn.Buffer(weight[heads][:, channels].flatten(0, 1))
        if len(heads) == 0:
            return Attention(None, out)
        return Attention(self._heads(layer, heads, matters), out)

    def _output_rows(
        self, layer: int
    ) -> tuple[Float[Tensor, "head channel d_model"], Float[Tensor, "*n_ctx d_model"]]:
        """What each kept channel of z writes, and the sum of each head's pattern; and the bias.

        A value channel outside the circuit is a constant, so its z is its mean times the sum of the
        pattern. That is 1 without a sink, and belongs to the bias. With a sink it varies, and has
        the last row of each head; if no query, key or value of the head is kept, it depends on the
        position alone, and belongs to a bias by position.
        """
        attn = self._block(layer).attn
        by_head = (self._cfg.n_heads, self._cfg.d_head)
        value = self.block_location(layer, "attn_v")
        matrix = matrix_of(attn.times_O, attn.b_O)
        kept_rows = matrix.weight.masked_fill(~value.is_kept[:, None], 0.0).unflatten(0, by_head)
        held = (value.held[:, None] * matrix.weight).unflatten(0, by_head).sum(1)
        if attn.sink is None:
            rows = torch.cat([kept_rows, torch.zeros_like(held)[:, None]], dim=1)
            return rows, matrix.bias + held.sum(0)
        is_constant = torch.ones(self._cfg.n_heads, dtype=torch.bool)
        for name in ("attn_q", "attn_k", "attn_v"):
            is_kept = self.block_location(layer, name).is_kept.unflatten(0, by_head)
            is_constant &= ~is_kept.any(1)
        bias = matrix.bias
        if bool(held[is_constant].any()):
            bias = bias + self._constant_shares(layer)[:, is_constant] @ held[is_constant]
        held = held.masked_fill(is_constant[:, None], 0.0)
        return torch.cat([kept_rows, held[:, None]], dim=1), bias

    def _constant_shares(self, layer: int) -> Float[Tensor, "n_ctx head"]:
        """The sum of each head's pattern by position, with its queries and keys at their means.

        With equal scores s at n positions, it is n · e^s / (n · e^s + e^sink).
        """
        attn = self._block(layer).attn
        query = self.block_location(layer, "attn_q").means
        key = self.block_location(layer, "attn_k").means
        by_head = (self._cfg.n_heads, self._cfg.d_head)
        scores = (query * key).unflatten(0, by_head).sum(1) * attn.scale
        n_positions = torch.arange(1, self._cfg.n_ctx + 1).double()
        return torch.sigmoid(scores + n_positions.log()[:, None] - precise(attn.sink))

    def _heads(
        self,
        layer: int,
        heads: Int[Tensor, " used"],
        matters: Bool[Tensor, "head channel"],
    ) -> Heads:
        """These heads of a block; `matters` says which channels of z do, as in `_attention`."""
        attn = self._block(layer).attn
        query = self._nodes_of_heads(layer, "attn_q", heads)
        key = self._nodes_of_heads(layer, "attn_k", heads)
        value = self._nodes_of_heads(layer, "attn_v", heads)
        # The channels in which a query or a key varies. All others add a constant to the scores.
        varies = (query.is_kept | key.is_kept).any(0)
        constant = (query.held * key.held)[:, ~varies].sum(1, keepdim=True)
        one = torch.ones_like(constant)
        of_value = HeadNodes(value.is_kept & matters[heads, :-1], torch.zeros_like(value.held))
        sink = None if attn.sink is None else precise(attn.sink)[heads]
        return Heads(
            self.read(layer, "attn_in"),
            self._by_head(layer, "attn_q", heads, query.columns(varies).and_one(constant), query),
            self._by_head(layer, "attn_k", heads, key.columns(varies).and_one(one), key),
            self._by_head(
                layer, "attn_v", heads, of_value.and_one(one).columns(matters.any(0)), of_value
            ),
            attn.scale,
            sink,
            heads.tolist(),
        )

    def _nodes_of_heads(self, layer: int, name: str, heads: Int[Tensor, " used"]) -> HeadNodes:
        location = self.block_location(layer, name)
        by_head = (self._cfg.n_heads, self._cfg.d_head)
        is_kept = location.is_kept.unflatten(0, by_head)[heads]
        return HeadNodes(is_kept, location.held.unflatten(0, by_head)[heads])

    def _by_head(
        self,
        layer: int,
        name: str,
        heads: Int[Tensor, " used"],
        wanted: HeadNodes,
        nodes: HeadNodes,
    ) -> ByHead:
        """Queries, keys or values.

        Args:
            layer, name: the location.
            heads: the heads that are used.
            wanted: the channels that they have in the compiled circuit.
            nodes: all their channels, with the same ones kept.
        """
        attn = self._block(layer).attn
        times, bias = {
            "attn_q": (attn.times_Q, attn.b_Q),
            "attn_k": (attn.times_K, attn.b_K),
            "attn_v": (attn.times_V, attn.b_V),
        }[name]
        matrix = matrix_of(times, bias.flatten()).from_kept(self.block_location(layer, "attn_in"))
        is_kept = torch.zeros(self._cfg.n_heads, self._cfg.d_head, dtype=torch.bool)
        is_kept[heads] = nodes.is_kept
        of_all_heads = is_kept.flatten()
        names = self._names(layer, name, of_all_heads)
        k = self._cfg.topk(name)
        channels = fold_channels(matrix.weight, matrix.bias, of_all_heads, k, None, names)
        # Kept channels come head by head, as `nonzero` finds their places.
        places = wanted.is_kept.nonzero()
        place = torch.zeros(len(places), *wanted.is_kept.shape).double()
        place[torch.arange(len(places)), places[:, 0], places[:, 1]] = 1.0
        return ByHead(channels, place, wanted.held)

    # The end

    def logits(self) -> Logits:
        """The end of the network, after all blocks are folded."""
        network: Any = self._network
        norm = network.ln_final
        tokens = slice(None) if self._tokens is None else self._tokens
        unembedding = precise(network.unembed.W_U)[:, tokens]
        bias = precise(network.unembed.b_U)[tokens]
        if self._cfg.norm_bias:
            bias = bias + precise(norm.b) @ unembedding
        weight = precise(norm.w)[:, None] * unembedding
        is_other = ~self._is_varying
        table = None
        if bool(is_other.any()):
            squares = self._others().square().sum(-1, keepdim=True)
            table = torch.cat([squares, self._others() @ weight[is_other]], dim=1)
        bigram = None
        if self._cfg.bigram_table:
            bigram = precise(network.bigram.W_bigram)[:, tokens]
        return Logits(self._norm_scale(), table, weight[self.varying], bias, bigram)
