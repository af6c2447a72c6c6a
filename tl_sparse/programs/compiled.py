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
from tl_sparse.programs.onnx_file import write_onnx
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
        if not torch.compiler.is_exporting():
            tokens, last = self._checked(tokens, last)
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        stream = F.embedding(tokens, self.start)
        if self.added is not None:
            stream = stream + F.embedding(positions, self.added)
        return self._after_start(Positioned(tokens, positions, stream), last)

    def _checked(
        self, tokens: object, last: object | None
    ) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, " batch"] | None]:
        """Tokens and positions of `forward` as tensors."""
        checked_tokens = as_tokens(tokens).to(self.start.device)
        check_vocabulary(checked_tokens, len(self.start))
        length = checked_tokens.shape[1]
        if length > self.n_ctx:
            context = f"the model's context of n_ctx = {self.n_ctx}"
            raise DataError(f"a sequence of {length} tokens does not fit {context}")
        if last is None:
            return checked_tokens, None
        return checked_tokens, _positions_of_rows(last, checked_tokens)

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

    @checked()
    def to_onnx(
        self, path: str | Path, last: bool = False, opset: int = 18, overwrite: bool = False
    ) -> None:
        """Write an ONNX program with the same logits, in the dtype of this module.

        Its input is `tokens`, int64 `[batch, pos]`, its output `logits`, `[batch, pos, logit]`;
        batch and pos may have any size. It checks nothing, so the tokens must be in the vocabulary,
        and pos at most `n_ctx`. Where equal magnitudes compete in AbsTopK, other runtimes may keep
        others of them than torch does.

        `n_ctx`, `tokens`, `task` and `model_name` are in its metadata, as JSON.

        Args:
            path: the file, *.onnx.
            last: whether it has a second input, `last`, int64 `[batch]`: one position of each row.
                The logits there alone are then its output, `[batch, 1, logit]`.
            opset: the version of ONNX's operators.
            overwrite: whether another file at `path` is replaced.

        Raises:
            CheckpointError: if the file cannot be written.
            ConfigError: if onnxscript is missing; for an opset that is too old or too new, or
                another ending of the file; if `path` exists, and `overwrite` is False.
            UnsupportedError: if there is more than an ONNX file can hold.
        """
        # An axis of size 1 in the examples would have that size in the program.
        inputs = {"tokens": self.start.new_zeros(2, min(2, self.n_ctx), dtype=torch.long)}
        axes = {"tokens": {0: "batch"}}
        if self.n_ctx > 1:
            axes["tokens"][1] = "pos"
        if last:
            inputs["last"] = self.start.new_zeros(2, dtype=torch.long)
            axes["last"] = {0: "batch"}
        metadata = {
            "n_ctx": self.n_ctx,
            "tokens": None if self.tokens is None else self.tokens.tolist(),
            "task": self.task,
            "model_name": self.model_name,
        }
        write_onnx(Path(path), self, inputs, axes, metadata, opset, overwrite)

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
        try:
            program([[0] * min(2, program.n_ctx)], [0])
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{folder}: the parts of this compiled circuit do not fit together: {error}"
            ) from error
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


def _positions_of_rows(last: object, tokens: Int[Tensor, "batch pos"]) -> Int[Tensor, " batch"]:
    positions = as_integers("last", last).to(tokens.device)
    n_rows, length = tokens.shape
    is_in_row = (positions >= 0) & (positions < length)
    if positions.shape != (n_rows,) or not bool(is_in_row.all()):
        raise DataError(
            f"last must be one position in [0, {length}) for each of the {n_rows} rows of tokens"
        )
    return positions
