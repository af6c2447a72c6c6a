from .compiled import CompiledCircuit as CompiledCircuit
from .compiling import compile_circuit as compile_circuit
from .onnx_file import check_onnx as check_onnx
from .storage import check_program as check_program
