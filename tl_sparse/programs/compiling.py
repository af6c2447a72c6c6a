"""Compiling a circuit: from a model and a circuit to a module that runs without the model."""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor, nn

from tl_sparse.arguments import checked, described
from tl_sparse.arrays import as_integers
from tl_sparse.circuits import Circuit, check_channels
from tl_sparse.config import check
from tl_sparse.errors import DataError, UnsupportedError
from tl_sparse.hooks import TLModel, is_sparse_model
from tl_sparse.precision import at_least_float32
from tl_sparse.programs.compiled import CompiledCircuit
from tl_sparse.programs.folding import Folding


@checked("tokens", called="circuit.compile")
@torch.no_grad()
def compile_circuit(
    circuit: Circuit,
    model: TLModel,
    tokens: Sequence[int] | Int[Tensor, " logit"] | None = None,
    dtype: torch.dtype | None = None,
) -> CompiledCircuit:
    """A module with the logits of `model` under the circuit; see `Circuit.compile`."""
    if not is_sparse_model(model):
        raise UnsupportedError(
            "only circuits in models of tl_sparse can be compiled: in a "
            f"{type(model).__name__}, all channels depend on all tokens through dense weights"
        )
    if circuit.frozen_norms:
        raise UnsupportedError(
            "this circuit runs with the norm scales of the full model, which only the full model "
            "can compute, so it cannot be compiled; search for one with freeze_norms=False"
        )
    check_channels(circuit, "a compiled circuit computes each node as one number")
    circuit.check_means()
    network = model.network
    weights = network.embed.W_E
    dtype = dtype or at_least_float32(weights.dtype)
    check(dtype in (torch.float32, torch.float64), "dtype", dtype, "torch.float32 or torch.float64")
    wanted = None if tokens is None else _checked_tokens(tokens, len(weights))
    with circuit.applied(model):  # in which edges are cut
        folding = Folding(circuit, network, wanted)
        start = folding.start()
        blocks = [folding.block(layer) for layer in range(network.cfg.n_layers)]
        compiled = CompiledCircuit(
            varying=folding.varying,
            start=start,
            added=folding.added(),
            blocks=nn.ModuleList(blocks),
            logits=folding.logits(),
            n_ctx=network.cfg.n_ctx,
            tokens=wanted,
            task=circuit.task,
            model_name=circuit.model_name,
        )
    return compiled.to(weights.device, dtype).eval()


def _checked_tokens(
    tokens: Sequence[int] | Int[Tensor, " logit"], d_vocab: int
) -> Int[Tensor, " logit"]:
    """The tokens whose logits are asked for.

    Raises:
        DataError: if they are not a list of tokens of the vocabulary.
    """
    expected = "tokens must be a list of at least one token id, those whose logits are wanted"
    try:
        wanted = as_integers("tokens", tokens).cpu()
    except DataError as error:
        raise DataError(f"{expected}, not {described(tokens)}") from error
    if wanted.ndim != 1 or len(wanted) == 0:
        raise DataError(f"{expected}, not integers of shape {list(wanted.shape)}")
    if int(wanted.min()) < 0 or int(wanted.max()) >= d_vocab:
        raise DataError(f"tokens must be in [0, {d_vocab}), the model's vocabulary")
    return wanted
