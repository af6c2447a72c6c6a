"""A circuit as readable Python source that needs NumPy alone."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from tl_sparse.arguments import checked
from tl_sparse.circuits import Circuit
from tl_sparse.errors import CircuitError, ConfigError
from tl_sparse.hooks import TLModel
from tl_sparse.outputs import FileSet, check_new_files, replacing_together
from tl_sparse.parsing import printable
from tl_sparse.programs import numpy_functions
from tl_sparse.programs.compiled import CompiledCircuit
from tl_sparse.programs.compiling import compile_circuit
from tl_sparse.programs.numpy_functions import Array
from tl_sparse.programs.python_notes import prompt_notes
from tl_sparse.programs.python_parts import PythonWriter
from tl_sparse.programs.python_text import (
    INDENT,
    SourceText,
    as_comments,
    identifier,
    is_identifier,
)

PYTHON_FILES = FileSet(what="Python program", described_by="circuit.py", required=("circuit.npz",))
#: What the source may call, in the order in which it is copied.
FUNCTIONS = (
    numpy_functions.checked_tokens,
    numpy_functions.lookup,
    numpy_functions.read_by_token,
    numpy_functions.read_by_position,
    numpy_functions.root_mean_square,
    numpy_functions.attention_pattern,
    numpy_functions.after_contest,
    numpy_functions.read_after_contest,
    numpy_functions.by_position,
    numpy_functions.abs_topk,
    numpy_functions.gelu,
    numpy_functions.relu,
)
#: What every source says of itself.
INTRODUCTION = """\
A circuit as a program.

It computes the logits that the model has while all other nodes are held at their means. Each node
has one statement, and → says what is computed from it. Variables have one entry for each position.
Tables by token or position are in the .npz file beside this one, and so is what competes with the
nodes in AbsTopK.
"""
MAX_TOKENS_IN_TITLE = 8
#: Names that the source uses itself.
RESERVED = {"centered", "logits", "math", "n", "neurons", "np", "position", "reads", "resid"}
RESERVED |= {"scale", "tokens", "z"}
RESERVED |= {function.__name__ for function in FUNCTIONS}
RESERVED_BEGINNINGS = ("logit_", "pattern_", "z_of_")


@checked()
def check_python(folder: str | Path, overwrite: bool = False) -> None:
    """Check, before the slow work of compiling a circuit, that `PythonProgram.save` can write it.

    Raises:
        CheckpointError: if it cannot.
        ConfigError: if `folder` holds a Python program, and `overwrite` is False.
    """
    check_new_files(PYTHON_FILES, folder, overwrite)


@dataclass(frozen=True, eq=False)
class PythonProgram:
    """A circuit as Python source.

    Attributes:
        source: the source of a module with a function `logits(tokens)`, for one sequence of tokens.
        tables: the arrays that it reads from the .npz file beside it.
        names: node → the variable that stands for it.
    """

    source: str
    tables: Mapping[str, Array]
    names: Mapping[str, str]

    def __str__(self) -> str:
        return self.source

    @checked()
    def save(self, folder: str | Path, overwrite: bool = False) -> None:
        """Write `circuit.py` and `circuit.npz`: both or none. They need NumPy alone.

        Args:
            folder: created if it does not exist.
            overwrite: whether other files of these names in `folder` are replaced.

        Raises:
            CheckpointError: if the files cannot be written.
            ConfigError: if `folder` holds another program, and `overwrite` is False.
        """
        with replacing_together(PYTHON_FILES, Path(folder), overwrite) as new:
            np.savez_compressed(new / "circuit.npz", allow_pickle=False, **self.tables)
            (new / "circuit.py").write_text(self.source, encoding="utf-8")


@checked("tokens", called="circuit.to_python")
def python_program(
    circuit: Circuit,
    model: TLModel,
    tokens: Sequence[int] | Int[Tensor, " logit"] | None = None,
    names: Mapping[str, str] | None = None,
) -> PythonProgram:
    """A circuit as readable Python source; see `Circuit.to_python`."""
    identifiers = _identifiers(circuit, names or {})
    compiled = compile_circuit(circuit, model, tokens, torch.float64)
    labels = {str(node): label for node, label in circuit.labels.items()}
    notes = prompt_notes(circuit, model, compiled)
    source = SourceText(identifiers, labels, _text_of(model), notes)
    PythonWriter(compiled, source).write()
    title = f"{_title(circuit)}: {len(circuit.nodes)} nodes, {len(circuit.edges(model))} edges."
    text = _module(title, compiled, source)
    return PythonProgram(text, source.tables, identifiers)


def _identifiers(circuit: Circuit, names: Mapping[str, str]) -> dict[str, str]:
    """Node → its variable: those given, and the others from the names of the nodes.

    Raises:
        CircuitError: if a node is not in the circuit.
        ConfigError: if a name cannot stand for a variable, or stands for two nodes.
    """
    given = {str(circuit.node(node)): name for node, name in names.items()}
    for node, name in given.items():
        if node not in circuit.node_names:
            raise CircuitError(f"{node!r} has the name {name!r}, but is not in the circuit")
        is_usable = is_identifier(name) and name.islower() and name not in RESERVED
        if not is_usable or name.startswith(RESERVED_BEGINNINGS):
            raise ConfigError(
                f"{node!r} cannot be called {name!r}: a name must be a Python identifier in small "
                "ASCII letters that the program does not use itself"
            )
    node_of: dict[str, str] = {}
    for node in circuit.node_names:
        name = given.get(node, identifier(node))
        if name in node_of:
            raise ConfigError(f"{node_of[name]!r} and {node!r} cannot both be called {name!r}")
        node_of[name] = node
    return {node: name for name, node in node_of.items()}


def _text_of(model: TLModel) -> Callable[[int], str]:
    """Token → its text as a Python string, or its number if the model has no tokenizer."""
    tokenizer = model.tokenizer

    def text(token: int) -> str:
        return repr(tokenizer.decode([token])) if tokenizer is not None else str(token)

    return text


def _title(circuit: Circuit) -> str:
    title = f"The circuit of {printable(circuit.task)}" if circuit.task else "A circuit"
    return f"{title} in {printable(circuit.model_name)}" if circuit.model_name else title


def _columns(compiled: CompiledCircuit, source: SourceText) -> str:
    """What the columns of the logits are."""
    if compiled.tokens is None:
        return "the tokens of the vocabulary"
    tokens = compiled.tokens.tolist()
    shown = [f"{source.text_of(token)} ({token})" for token in tokens[:MAX_TOKENS_IN_TITLE]]
    if len(tokens) > len(shown):
        shown.append(f"{len(tokens) - len(shown)} more")
    return ", ".join(shown)


def _module(title: str, compiled: CompiledCircuit, source: SourceText) -> str:
    """The whole source: what it is, its dictionaries, its statements, and what they call."""
    body = source.body()
    check = f"checked_tokens(tokens, {len(compiled.start)}, {compiled.n_ctx})"
    begin = [
        # In a comment, since a text in a docstring could end it and begin code.
        *as_comments([title], indent=""),
        f'"""{INTRODUCTION}"""',
        "",
        "import math",
        "from pathlib import Path",
        "from typing import Any",
        "",
        "import numpy as np",
        "",
        "Array = np.ndarray",
        'TABLES = dict(np.load(Path(__file__).with_suffix(".npz")))',
        *source.constants,
        "",
        "",
    ]
    main = [
        "def logits(tokens: Any) -> Array:",
        f'{INDENT}"""The logits after each token, [pos, logit]."""',
        *as_comments([f"The columns are {_columns(compiled, source)}."]),
        f"{INDENT}tokens = {check}",
        f"{INDENT}n = len(tokens)",
        f"{INDENT}position = np.arange(n)",
        *body,
    ]
    called = _called("\n".join(main))
    return "\n".join([*begin, *main, "", "", "\n\n".join(called)])


def _called(text: str) -> list[str]:
    """The sources of the functions that a text calls, directly or not."""
    sources = {function.__name__: inspect.getsource(function) for function in FUNCTIONS}
    called: set[str] = set()
    found = {name for name in sources if f"{name}(" in text}
    while found:
        called |= found
        found = {
            name
            for name in sources.keys() - called
            if any(f"{name}(" in sources[caller] for caller in called)
        }
    return [text for name, text in sources.items() if name in called]
