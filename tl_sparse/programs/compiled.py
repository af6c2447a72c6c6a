"""A circuit as a module that runs without its model."""

from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_sparse.arguments import checked
from tl_sparse.arrays import as_integers, as_tokens, check_vocabulary
from tl_sparse.errors import CheckpointError, DataError
from tl_sparse.programs.blocks import MLP, Attention, Block, ByHead, Heads
from tl_sparse.programs.channels import Channels
from tl_sparse.programs.storage import read_program, write_program
from tl_sparse.programs.stream import Logits, NormScale, Positioned, Read, Write, buffer
from tl_sparse.programs.token_read import TokenRead


class CompiledCircuit(nn.Module):
    """The logits of a model under a circuit, from kept weights and folded constants.

    `circuit.compile(model)` makes it. It is an ordinary module without parameters: `to` moves it to
    other devices and dtypes.

    Attributes:
        varying: the channels of the residual stream that are computed; see `varying_channels`.
        start: by token, these channels as the token starts them.
        added: by position, what positions add to them; None if positions are not added.
        blocks: the blocks.
        logits: the end of the network.
        n_ctx: the number of tokens in the longest context.
        tokens: the tokens to which the logits belong; None for the whole vocabulary.
        task, model_name: those of the circuit.
    """

    def __init__(
        self,
        varying: Int[Tensor, " varying"],
        start: Float[Tensor, "d_vocab varying"],
        added: Float[Tensor, "n_ctx varying"] | None,
        blocks: nn.ModuleList,
        logits: Logits,
        n_ctx: int,
        tokens: Int[Tensor, " logit"] | None,
        task: str,
        model_name: str,
    ) -> None:
        super().__init__()
        self.varying = nn.Buffer(varying)
        self.start = nn.Buffer(start)
        self.added = buffer(added)
        self.blocks = blocks
        self.logits = logits
        self.n_ctx = n_ctx
        self.tokens = buffer(tokens)
        self.task = task
        self.model_name = model_name

    @property
    def n_parameters(self) -> int:
        """The number of weights, constants and indices."""
        return sum(values.numel() for values in self.buffers())

    @property
    def n_bytes(self) -> int:
        """The memory that they take, in bytes."""
        return sum(values.nbytes for values in self.buffers())

    @torch.no_grad()
    def forward(
        self, tokens: Int[Tensor, "batch pos"], last: Int[Tensor, " batch"] | None = None
    ) -> Float[Tensor, "batch pos logit"]:
        """The logits at every position, as the model has them under the circuit.

        Args:
            tokens: as any kind of array of integers; padding on the right changes nothing before.
            last: one position in each row, usually that of its last token. Only the logits there
                are returned, `[batch, 1, logit]`.

        Raises:
            DataError: for tokens that are not integers or outside the vocabulary, a sequence longer
                than the context, or positions that are not one of each row.
        """
        tokens = as_tokens(tokens).to(self.start.device)
        check_vocabulary(tokens, len(self.start))
        length = tokens.shape[1]
        if length > self.n_ctx:
            context = f"the model's context of n_ctx = {self.n_ctx}"
            raise DataError(f"a sequence of {length} tokens does not fit {context}")
        if last is not None:
            last = _positions_of_rows(last, tokens)
        positions = torch.arange(length, device=tokens.device)[None]
        stream = F.embedding(tokens, self.start)
        if self.added is not None:
            stream = stream + F.embedding(positions, self.added)
        return self._after_start(Positioned(tokens, positions, stream), last)

    def _after_start(self, at: Positioned, last: Int[Tensor, " batch"] | None) -> Tensor:
        """The logits from the stream that enters the first block."""
        # After the last block that looks back, the other positions are not needed.
        last_to_look = -1
        for layer, block in enumerate(self.blocks):
            if isinstance(block, Block) and block.looks_back:
                last_to_look = layer
        if last is not None and last_to_look < 0:
            at = at.only(last)
        for layer, block in enumerate(self.blocks):
            at = block(at, last if layer == last_to_look else None)
        logits: Tensor = self.logits(at)
        return logits

    @checked()
    def save(self, folder: str | Path, overwrite: bool = False) -> None:
        """Write `program.json` and `program.safetensors`: both or none.

        Args:
            folder: created if it does not exist.
            overwrite: whether another compiled circuit in `folder` is replaced.

        Raises:
            CheckpointError: if the files cannot be written.
            ConfigError: if `folder` holds another compiled circuit, and `overwrite` is False.
        """
        write_program(Path(folder), self, overwrite)

    @classmethod
    @checked(called="CompiledCircuit.load")
    def load(cls, folder: str | Path) -> "CompiledCircuit":
        """Read a compiled circuit that `save` wrote; the model is not needed.

        Raises:
            CheckpointError: if a file is missing, damaged, or has another format or version.
        """
        program = read_program(Path(folder), _PARTS)
        if not isinstance(program, cls):
            raise CheckpointError(f"{folder}: program.json describes a part of a compiled circuit")
        return program

    def extra_repr(self) -> str:
        logits = "all logits" if self.tokens is None else f"the logits of {len(self.tokens)} tokens"
        return f"{self.task!r} in {self.model_name!r}, {logits}, n_parameters={self.n_parameters:,}"


#: What a compiled circuit consists of, for `read_program`.
_PARTS = (
    Attention,
    Block,
    ByHead,
    Channels,
    CompiledCircuit,
    Heads,
    Logits,
    MLP,
    NormScale,
    Read,
    TokenRead,
    Write,
)


def _positions_of_rows(
    last: Int[Tensor, " batch"], tokens: Int[Tensor, "batch pos"]
) -> Int[Tensor, " batch"]:
    last = as_integers("last", last).to(tokens.device)
    n_rows, length = tokens.shape
    is_right = last.shape == (n_rows,) and bool(((last >= 0) & (last < length)).all())
    if not is_right:
        raise DataError(
            f"last must be one position in [0, {length}) for each of the {n_rows} rows of tokens"
        )
    return last
