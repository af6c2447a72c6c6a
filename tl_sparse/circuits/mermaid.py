"""Circuits in Mermaid, whose flowcharts Markdown can contain."""

import json

from tl_sparse.circuits.circuit import Circuit
from tl_sparse.circuits.diagram import Token, diagram
from tl_sparse.circuits.nodes import Node
from tl_sparse.errors import CircuitError
from tl_sparse.hooks import TLModel
from tl_sparse.tasks import Task

#: The largest number of links in a Mermaid graph: its renderers refuse more than 500, and such a
#: large graph is unreadable anyway.
MERMAID_LINKS = 400
_WORD_JOINER = "\u2060"


def to_mermaid(circuit: Circuit, model: TLModel, task: Task | str | None = None) -> str:
    """The circuit as a Mermaid flowchart for Markdown, drawn from bottom to top.

    It shows the same as `to_dot`: the tokens of the task, the nodes, the two answers, the weights,
    and as dotted lines the residual stream.

    Args:
        circuit: the circuit.
        model: its model.
        task: the task of the tokens and answers; see `diagram`.

    Raises:
        CircuitError: if there are more than `MERMAID_LINKS` links, or `model` is not the circuit's
            model.
        TaskError, TokenizerError, DataError: if there is no such task, or it does not fit the
            model's tokenizer.
    """
    shown = diagram(circuit, model, task)
    if len(shown.links) > MERMAID_LINKS:
        raise CircuitError(
            f"Mermaid can show at most {MERMAID_LINKS} links, not {len(shown.links):,}: use .dot, "
            "or the page, `tl-sparse view`, which can leave out small weights"
        )
    name, *facts = shown.title
    title = f"{name}: {'; '.join(facts)}"
    lines = ["---", f"title: {json.dumps(title, ensure_ascii=False)}", "---", "flowchart BT"]
    lines += [f"  %% {note}" for note in shown.notes]
    for token in (*shown.tokens, *shown.answers):
        text = f"logit of {_escaped(token.text)}" if token.is_answer else _escaped(token.text)
        lines.append(f'  {_name(token)}(["{text}"])')
    for node in shown.nodes:
        text = str(node)
        if node in shown.labels:
            text += f"<br/>{_escaped(shown.labels[node])}"
        lines.append(f'  {_name(node)}["{text}"]')
    for link in shown.links:
        arrow = "-.->" if link.kind == "stream" else "-->"
        lines.append(f'  {_name(link.source)} {arrow}|"{link.text}"| {_name(link.target)}')
    return "\n".join(lines)


def _name(end: Node | Token) -> str:
    """A name of letters, digits and underscores alone."""
    if isinstance(end, Node):
        return f"{end.location}_{end.layer}_{end.index}"
    return f"answer_{end.id}" if end.is_answer else f"token_{end.id}"


def _escaped(text: str) -> str:
    """A text as part of a quoted label, in which Mermaid must see neither markup nor its end.

    Everything but letters, digits and spaces is written as the number of its character. An
    invisible character follows each backslash, because a backslash and an n, as in the text of a
    token that is a newline, would break the line.
    """
    characters = []
    for character in text.replace("\\", f"\\{_WORD_JOINER}"):
        is_plain = character.isalnum() or character == " "
        characters.append(character if is_plain else f"#{ord(character)};")
    return "".join(characters)
