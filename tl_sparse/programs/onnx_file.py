"""A compiled circuit as an ONNX file.

torch traces the module, and its ONNX exporter translates the graph. Two of its translations are not
exact enough, and are replaced here:

- numbers that a tensor is added to, or multiplied or divided by, are rounded to float32;
- GELU becomes Erf, which onnxruntime does not have in float64.

The exporter's own optimizer is not used. In onnxscript 0.7 it takes a ScatterND that adds to a
whole axis for one that overwrites it, so that what a block writes would replace the residual
stream. onnxruntime optimizes the graphs that it loads anyway.
"""

import json
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tl_sparse.arguments import checked
from tl_sparse.config import check
from tl_sparse.errors import ConfigError, UnsupportedError
from tl_sparse.outputs import check_ending, check_new_file, replacing

#: The versions of ONNX's operators that torch's exporter can write.
OPSETS = range(18, 26)
#: The largest message of protobuf, in bytes.
MAX_BYTES = 2**31 - 1
#: The Gauss-Legendre quadrature for erf has this many nodes in [0, 6].
N_NODES = 20


@checked()
def check_onnx(path: str | Path, opset: int = 18, overwrite: bool = False) -> None:
    """Check, before the slow work of compiling a circuit, that `to_onnx` can write it.

    Raises:
        CheckpointError: if the file cannot be written.
        ConfigError: as for `to_onnx`.
    """
    check(opset in OPSETS, "opset", opset, f"from {OPSETS[0]} to {OPSETS[-1]}")
    check_ending(path, [".onnx"], "an ONNX program")
    if find_spec("onnxscript") is None:
        raise ConfigError("ONNX files need onnxscript: pip install 'tl-sparse[onnx]'")
    check_new_file(path, overwrite)


def write_onnx(
    path: Path,
    program: nn.Module,
    inputs: Mapping[str, Tensor],
    axes: Mapping[str, Mapping[int, str]],
    metadata: Mapping[str, Any],
    opset: int,
    overwrite: bool,
) -> None:
    """Write a compiled circuit; see `CompiledCircuit.to_onnx`.

    Args:
        path: the file.
        program: the compiled circuit.
        inputs: examples of its arguments, by name.
        axes: the axes of each of them that may have any size, and what these are called.
        metadata: what the file says of the program beside its graph, as JSON values.
        opset, overwrite: as for `to_onnx`.
    """
    check_onnx(path, opset, overwrite)
    n_bytes = sum(values.nbytes for values in program.buffers())
    if n_bytes > MAX_BYTES:
        raise UnsupportedError(
            f"this compiled circuit takes {n_bytes:,} bytes, and an ONNX file holds at most "
            f"{MAX_BYTES:,}; compile it in float32, or for the logits of fewer tokens"
        )
    with _quiet():
        exported = torch.onnx.export(
            program,
            kwargs=dict(inputs),
            dynamic_shapes=dict(axes),
            output_names=["logits"],
            opset_version=opset,
            dynamo=True,
            custom_translation_table=_translations(),
            optimize=False,
            verbose=False,
        )
    assert exported is not None
    for node in exported.model.graph:
        node.metadata_props.clear()  # among others, where this package is on this machine
    for name, value in metadata.items():
        exported.model.metadata_props[name] = json.dumps(value)
    with replacing(path, overwrite) as temporary:
        exported.save(temporary, external_data=False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Within the context, torch's exporter says nothing of its own affairs."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """torch's operators that are translated here, and how."""
    import onnx_ir
    from onnxscript import opset18 as op

    def constant(value: float, dtype: Any) -> Any:
        return op.Constant(value=onnx_ir.tensor(value, onnx_ir.DataType(dtype)))

    def scalar_tensor(s: float, dtype: int) -> Any:
        return constant(s, dtype)

    def gelu(self: Any, approximate: str = "none") -> Any:
        dtype = self.dtype
        x = op.Mul(self, constant(math.sqrt(0.5), dtype))
        erf = op.Erf(x) if dtype == onnx_ir.DataType.FLOAT else erf_in_float64(x)
        half = op.Mul(self, constant(0.5, dtype))
        return op.Mul(half, op.Add(erf, constant(1.0, dtype)))

    def erf_in_float64(x: Any) -> Any:
        """erf(x) = 2x/√π · ∫₀¹ exp(-x²t²) dt, to 1e-14.

        Beyond 6, 1 - erf is less than that. The integrand is even in t, so of the nodes in [-1, 1]
        only the positive ones are needed.
        """
        dtype = onnx_ir.DataType.DOUBLE
        x = op.Clip(x, constant(-6.0, dtype), constant(6.0, dtype))
        exponent = op.Neg(op.Mul(x, x))
        nodes, weights = np.polynomial.legendre.leggauss(2 * N_NODES)
        integral = constant(0.0, dtype)
        for node, weight in zip(nodes[N_NODES:], weights[N_NODES:], strict=True):
            value = op.Exp(op.Mul(exponent, constant(node**2, dtype)))
            integral = op.Add(integral, op.Mul(value, constant(weight, dtype)))
        return op.Mul(op.Mul(x, constant(2 / math.sqrt(math.pi), dtype)), integral)

    aten = torch.ops.aten
    return {aten.scalar_tensor.default: scalar_tensor, aten.gelu.default: gelu}
