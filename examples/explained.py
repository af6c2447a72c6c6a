"""The tables of explanations: circuits side by side, then all nodes of each."""

from collections.abc import Mapping
from pathlib import Path
from statistics import median

from tl_sparse.circuits import Circuit
from tl_sparse.explanations import EXPLAINED, Explanation, Fit, NodeExplanation
from tl_sparse.hooks import TLModel
from tl_sparse.suites import markdown_table

#: Expressions of at most so many symbols are called short.
SHORT = 30
#: Expressions are cut to so many characters in the tables; the files have them whole.
LONGEST = 160
ABOUT = f"""\
For each node of a circuit, `circuit.explain(model)` searches for an expression over the tokens, on
one half of the held-out prompts and of text, and judges it on the other half. Names of other nodes
stand for their expressions, not for their values, so that errors add up. A node counts as explained
if the explained variance (for nodes with two levels, balanced accuracy) is at least {EXPLAINED} on
text and on prompts, both. Size counts names, functions, operators, numbers and tokens. Losses are
cross-entropies between the two answers on held-out prompts, 0.693 is chance; ± is one standard
error. In the full model, the circuit's heads get the attention patterns of the expressions; for
comparison, a quarter of the heads of another model swapped for programs that a language model had
written cost 16 % of perplexity (arXiv 2606.19317). Seconds are those of
one core of two, of which the other one explained another circuit."""


def explained(store: Path, circuit: Circuit, model: TLModel, task: str) -> Explanation:
    """The explanation of a circuit, made once."""
    if not store.exists():
        circuit.explain(model, task).save(store)
    return Explanation.load(store)


def explanations_text(found: Mapping[str, Explanation]) -> str:
    """The tables of circuits, by what they are called."""
    header = ["circuit", "nodes", "explained", f"in at most {SHORT} symbols", "by themselves"]
    header += ["median size", "loss, accuracy"]
    header += ["all replaced", "all at their means", "seconds"]
    rows = [_circuit_row(name, each) for name, each in found.items()]
    parts = ["# Circuits in words", "", ABOUT, "", markdown_table(header, rows), ""]
    parts += [_smallest(found), "", "## Heads in the full model", ""]
    parts.append(_heads(found))
    for name, each in found.items():
        parts += ["", f"## {name}", "", _nodes(each)]
    return "\n".join(parts)


def _circuit_row(name: str, each: Explanation) -> list[str]:
    n_alone = sum(node.given_others >= EXPLAINED for node in each.nodes)
    results = []
    for measured in (each.circuit_alone, each.all_replaced, each.nothing_kept):
        results.append(f"{measured.loss}, {measured.accuracy.value:.1%}")
    n_explained = sum(node.is_explained for node in each.nodes)
    n_short = sum(node.is_explained and node.size <= SHORT for node in each.nodes)
    size = median(node.size for node in each.nodes)
    counts = [len(each.nodes), f"{n_explained} ({each.share_explained:.0%})", n_short, n_alone]
    counts.append(f"{size:g}")
    return [name, *map(str, counts), *results, f"{each.seconds:.0f}"]


def _smallest(found: Mapping[str, Explanation]) -> str:
    """How many nodes of the five circuits with the fewest nodes are explained, all together."""
    of_tasks: dict[str, Explanation] = {}
    for each in found.values():
        of_tasks.setdefault(each.task, each)  # that with pruned edges, which comes first
    smallest = sorted(of_tasks.values(), key=lambda each: len(each.nodes))[:5]
    nodes = [node for each in smallest for node in each.nodes]
    n_explained = sum(node.is_explained for node in nodes)
    on_text = sum((_score(node.text) or 0) >= EXPLAINED for node in nodes)
    alone = sum(node.given_others >= EXPLAINED for node in nodes)
    return (
        f"Of the {len(nodes)} nodes of the {len(smallest)} smallest circuits, {n_explained} "
        f"({n_explained / len(nodes):.0%}) are explained, {on_text} on text alone, and {alone} "
        f"({alone / len(nodes):.0%}) by themselves: if all that an expression names has its "
        "true values."
    )


def _heads(found: Mapping[str, Explanation]) -> str:
    header = ["circuit", "heads", "perplexity", "with expressions", "even attention", "at means"]
    rows = []
    for name, each in found.items():
        swapped = each.swapped
        if swapped is None:
            continue
        cells = [f"{swapped.n_heads} of {swapped.n_all_heads}", f"{swapped.model:.3f}"]
        for value in (swapped.swapped, swapped.evenly, swapped.held):
            cells.append(f"{value:.3f} ({value / swapped.model - 1:+.1%})")
        rows.append([name, *cells])
    phrases = [["circuit and head", "looks", "covers", "if even", "to nothing", "overlap"]]
    for name, each in found.items():
        for head in each.heads:
            overlap = "–" if head.overlap is None else f"{head.overlap:.0%}"
            shares = [f"{head.covered:.0%}", f"{head.evenly:.0%}", f"{head.nothing:.0%}", overlap]
            label = f"{name}: {head.layer}.{head.head}"
            phrases.append([label, _cell(head.phrase), *shares])
    return f"{markdown_table(header, rows)}\n\n{markdown_table(phrases[0], phrases[1:])}"


def _nodes(each: Explanation) -> str:
    header = ["node", "expression", "size", "written out", "text", "prompts", "by itself"]
    header += ["one number", "loss in circuit", "in model", "at its mean"]
    rows = []
    for node in each.nodes:
        rows.append([*_what(node), *_how_good(node)])
    return markdown_table(header, rows)


def _what(node: NodeExplanation) -> list[str]:
    expression = _cell(f"{node.name} = {node.expression}")
    return [node.node, expression, str(node.size), str(node.whole_size)]


def _how_good(node: NodeExplanation) -> list[str]:
    scores = [_shown(node.text), _shown(node.prompts), f"{node.given_others:.3f}"]
    losses = [node.in_circuit, node.in_model, node.held_in_circuit]
    return [
        *scores,
        f"{node.levels.explained:.2f}",
        *(f"{measured.loss.value:.3f}" for measured in losses),
    ]


def _score(fit: Fit | None) -> float | None:
    return None if fit is None else fit.score


def _shown(fit: Fit | None) -> str:
    score = _score(fit)
    return "–" if score is None else f"{score:.3f}"


def _cell(text: str) -> str:
    """A text as code in a cell, in which a bar would end the cell and a backtick the code."""
    shown = text if len(text) <= LONGEST else f"{text[:LONGEST]}…"
    shown = shown.replace("|", "¦").replace("`", "'")
    return f"`{shown}`"
