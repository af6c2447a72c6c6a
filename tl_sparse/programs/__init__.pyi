from .compiled import CompiledCircuit as CompiledCircuit
from .compiling import compile_circuit as compile_circuit
