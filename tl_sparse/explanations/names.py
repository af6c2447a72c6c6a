"""Short names for nodes, made from their expressions, which are identifiers in Python."""

import re
from collections.abc import Collection, Mapping

from tl_sparse.circuits import Circuit, Node
from tl_sparse.errors import CircuitError, DataError
from tl_sparse.explanations.expressions import (
    Average,
    Depth,
    Expression,
    Inside,
    Is,
    Position,
    Ref,
    TokenLiteral,
)
from tl_sparse.explanations.parsing import check_name

#: The location of a node → how its name begins.
PREFIXES = {
    "embed_out": "embed",
    "attn_in": "read",
    "attn_q": "query",
    "attn_k": "key",
    "attn_v": "value",
    "attn_out": "write",
    "mlp_in": "mlp_read",
    "mlp_neuron": "neuron",
    "mlp_out": "mlp_write",
}
_PUNCTUATION = {
    "(": "open_paren",
    ")": "close_paren",
    "[": "open_square",
    "]": "close_square",
    "{": "open_brace",
    "}": "close_brace",
    "'": "quote",
    '"': "double_quote",
    "\n": "newline",
    " ": "space",
    ".": "dot",
    ",": "comma",
    ":": "colon",
    "=": "equals",
    "+": "plus",
    "-": "minus",
    "*": "star",
    "/": "slash",
    "<": "less",
    ">": "greater",
    "#": "hash",
    "@": "at",
    "%": "percent",
    "!": "not",
    "_": "underscore",
}


def name_of(
    node: Node,
    expression: Expression,
    words: Mapping[str, str],
    taken: Collection[str],
    telling: Collection[TokenLiteral] = (),
) -> tuple[str, str]:
    """A name for a node that is not taken, and the word in it that its expression is about.

    Args:
        words: name of an earlier node → the word in it.
        taken: the names of other nodes.
        telling: the tokens that tell prompts of the task apart. One of them makes a better name
            than others that the expression names too.
    """
    word = _word(expression, words, telling)
    base = f"{PREFIXES[node.location]}_{word}" if word else f"{PREFIXES[node.location]}_constant"
    name = base
    number = 1
    while name in taken:
        number += 1
        name = f"{base}_{number}"
    return name, word


def _word(
    expression: Expression, words: Mapping[str, str], telling: Collection[TokenLiteral]
) -> str:
    """What an expression is about, in one word; empty for a constant."""
    first = expression.value if isinstance(expression, Average) else expression
    for part in first.walk():
        if isinstance(part, Is) and part.tokens.tokens:
            tokens = tokens_in(first)
            named = [token for token in tokens if token in telling]
            return word_of_token([*named, *part.tokens.tokens][0])
        if isinstance(part, Ref):
            return words.get(part.name, "")
        if isinstance(part, Position):
            return "position"
        if isinstance(part, Inside):
            return "string"
        if isinstance(part, Depth):
            return "depth"
        if isinstance(part, Average):
            return _word(part, words, telling)
    return type(first).__name__.lower() if first.parts or first.is_boolean else ""


def tokens_in(expression: Expression) -> list[TokenLiteral]:
    """The tokens that an expression names, in their order."""
    tokens: list[TokenLiteral] = []
    for part in expression.walk():
        if isinstance(part, Is):
            tokens += part.tokens.tokens
    return tokens


def word_of_token(token: str | int) -> str:
    """A token as part of a name: its letters and digits, or the names of its first two signs."""
    if isinstance(token, int):
        return f"token_{token}"
    letters = re.sub(r"[^a-z0-9]+", "_", token.lower()).strip("_")
    if letters:
        return letters[:16]
    signs = [_PUNCTUATION.get(char, "sign") for char in (token.strip(" ") or " ")[:2]]
    return "_".join(dict.fromkeys(signs))


def checked_names(names: Mapping[str, str], circuit: Circuit) -> dict[Node, str]:
    """Names that the user gives to nodes of a circuit.

    Raises:
        CircuitError: if a node is not in the circuit.
        DataError: if a name is no identifier, has a meaning in expressions, or is there twice.
    """
    found: dict[Node, str] = {}
    for key, name in names.items():
        node = kept_node(circuit, key)
        if not isinstance(name, str):
            raise DataError(f"the name of {node} must be a text, not {name!r}")
        check_name(name)
        for other, given in found.items():
            if given == name:
                raise DataError(f"the name {name!r} is given to two nodes, {other} and {node}")
        found[node] = name
    return found


def kept_node(circuit: Circuit, name: str) -> Node:
    """The node of this name.

    Raises:
        CircuitError: if it is not in the circuit.
    """
    node = circuit.node(str(name))
    if node not in set(circuit.nodes):
        raise CircuitError(f"{node} is not in this circuit, so there is nothing to explain")
    return node
