from .compiled import CompiledCircuit as CompiledCircuit
from .compiling import compile_circuit as compile_circuit
from .onnx_file import check_onnx as check_onnx
from .python_source import PythonProgram as PythonProgram
from .python_source import check_python as check_python
from .python_source import python_program as python_program
from .storage import check_program as check_program
