"""What changes of a circuit's nodes do in a dense model, as records and as tables."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

from tl_sparse.errors import counted
from tl_sparse.evaluation import Change, Estimate
from tl_sparse.tasks import table

#: The table of single nodes has at most so many.
_NODES_SHOWN = 12


@dataclass(frozen=True)
class Answers:
    """How a model answers the task as it is.

    Attributes:
        accuracy: the share of prompts at which the right answer has the larger logit.
        difference: the logit of the right answer minus that of the wrong one.
    """

    accuracy: Estimate
    difference: Estimate


@dataclass(frozen=True)
class AtSite:
    """What a change of nodes moves if it acts in the stream at one site alone.

    Attributes:
        sparse: in the sparse model, whose stream there is as the change makes it.
        dense: in the dense model, to whose stream the decoded difference is added.
        random: the same in the dense model, for each draw of as many random nodes at each hook
            point.
    """

    sparse: Change
    dense: Change
    random: list[Change]


@dataclass(frozen=True)
class AlongProbe:
    """What moves if the dense stream moves along the direction of a linear probe.

    Attributes:
        change: the stream at the last position takes the other prompt's value in this direction.
        accuracy: how often the probe tells the right answer of the prompts, on which it was not
            trained; 0.5 is chance.
    """

    change: Change
    accuracy: Estimate


@dataclass(frozen=True)
class SiteEffects:
    """What changes move at one site.

    Attributes:
        site: the hook point of the site.
        interchanged: the circuit's nodes take the values of the other prompt of the pair.
        ablated: the circuit's nodes are held at their means.
        probe: what a probe of the right answer moves there; None if there is no probe.
        everything: the whole dense stream there is that of the other prompt of the pair, which is
            what an interchange can reach.
    """

    site: str
    interchanged: AtSite
    ablated: AtSite
    probe: AlongProbe | None
    everything: Change


@dataclass(frozen=True)
class NodeAlone:
    """What a node moves that alone takes the value of the other prompt of the pair.

    Attributes:
        node: the name of the node.
        site: the site at which its change is carried over; see `Bridges.carried`.
        sparse: what it moves in the sparse model.
        dense: what it moves in the dense model.
    """

    node: str
    site: str
    sparse: Change
    dense: Change


@dataclass(frozen=True)
class DenseEffects:
    """What changes of a circuit's nodes do in the dense model, carried over the bridges.

    `print` shows it as tables.

    Attributes:
        sparse: how the sparse model answers as it is.
        dense: how the dense model answers as it is.
        interchanged: what the circuit's nodes move in the sparse model, in all of it, if they take
            the values of the other prompt of the pair.
        ablated: what they move in the sparse model if they are held at their means.
        sites: what the same changes move at each site, in the order of the forward pass.
        nodes: what each node moves alone, those that move the sparse model most first.
        correlation: the correlation over these nodes of the dense model's change with the sparse
            one's. Its standard error is the asymptotic one. None if it cannot be told.
        strength: what every difference was multiplied by where it was added.
        n_pairs: the number of pairs of prompts.
        n_probe_pairs: the number of other pairs, on which the probes were trained.
        no_correlation: why `correlation` is None; else empty.
        no_probe: why there are no probes; else empty.
        no_nodes: why no node is changed alone; else empty.
    """

    sparse: Answers
    dense: Answers
    interchanged: Change
    ablated: Change
    sites: list[SiteEffects]
    nodes: list[NodeAlone]
    correlation: Estimate | None
    strength: float
    n_pairs: int
    n_probe_pairs: int
    no_correlation: str = ""
    no_probe: str = ""
    no_nodes: str = ""

    def __str__(self) -> str:
        return _text(self)


def _text(effects: DenseEffects) -> str:
    sections = [_heading(effects), _interchanged(effects), _ablated(effects)]
    if effects.nodes:
        sections.append(_nodes(effects))
    if effects.no_nodes:
        sections.append(f"No node is changed alone: {effects.no_nodes}.")
    return "\n\n".join(sections)


def _heading(effects: DenseEffects) -> str:
    rows = []
    for name, answers in (("sparse", effects.sparse), ("dense", effects.dense)):
        rows.append([name, _percent(answers.accuracy.value), str(answers.difference)])
    lines = [
        f"Through the bridges, in the dense model, on {counted(effects.n_pairs, 'pair')}",
        "",
        table(["model as it is", "accuracy", "logit difference"], rows),
        "",
        "  Below: the change of the logit difference ± its standard error, and in brackets the",
        "  share of prompts at which the preferred answer changes. At a site, it acts there alone.",
    ]
    if effects.strength != 1:
        lines.append(f"  At the sites, differences are multiplied by {effects.strength:g}.")
    return "\n".join(lines)


def _interchanged(effects: DenseEffects) -> str:
    header = ["site", "sparse", "dense", "random nodes", "probe", "whole stream"]
    rows = [["(all of the model)", _cell(effects.interchanged), "", "", "", ""]]
    for site in effects.sites:
        probe = _cell(site.probe.change) if site.probe else "–"
        at_site = site.interchanged
        cells = [_cell(at_site.sparse), _cell(at_site.dense), _cell_of_draws(at_site.random)]
        rows.append([site.site, *cells, probe, _cell(site.everything)])
    text = f"The circuit's nodes have the values of the other prompt\n{table(header, rows)}"
    if effects.no_probe:
        return f"{text}\n  There is no probe: {effects.no_probe}."
    accuracies = [site.probe.accuracy.value for site in effects.sites if site.probe]
    return (
        f"{text}\n  probe: a linear probe of the right answer at the last position, trained on "
        f"{counted(effects.n_probe_pairs, 'other pair')};\n"
        f"  it is right at {_percent(min(accuracies))} to {_percent(max(accuracies))} of the "
        "prompts, depending on the site"
    )


def _ablated(effects: DenseEffects) -> str:
    rows = [["(all of the model)", _cell(effects.ablated), "", ""]]
    for site in effects.sites:
        at_site = site.ablated
        cells = [_cell(at_site.sparse), _cell(at_site.dense), _cell_of_draws(at_site.random)]
        rows.append([site.site, *cells])
    header = ["site", "sparse", "dense", "random nodes"]
    return f"The circuit's nodes are held at their means\n{table(header, rows)}"


def _nodes(effects: DenseEffects) -> str:
    rows = []
    for node in effects.nodes[:_NODES_SHOWN]:
        rows.append([node.node, node.site, _cell(node.sparse), _cell(node.dense)])
    parts = [
        "One node has the value of the other prompt",
        table(["node", "site", "sparse", "dense"], rows),
    ]
    if len(effects.nodes) > _NODES_SHOWN:
        parts.append(f"  … and {len(effects.nodes) - _NODES_SHOWN} nodes that move it less")
    if effects.correlation is not None:
        parts.append(
            f"  correlation of dense and sparse changes over {counted(len(effects.nodes), 'node')}:"
            f" {effects.correlation}"
        )
    return "\n".join(parts)


def _cell(change: Change) -> str:
    return f"{_signed(change.change)} ({_percent(change.flips.value)})"


def _cell_of_draws(draws: Sequence[Change]) -> str:
    """The mean over draws of random nodes."""
    if not draws:
        return "–"
    change = mean(draw.change.value for draw in draws)
    flips = mean(draw.flips.value for draw in draws)
    return f"{change:+.2f} ({_percent(flips)})"


def _signed(estimate: Estimate) -> str:
    error = "" if estimate.standard_error is None else f" ± {estimate.standard_error:.2f}"
    return f"{estimate.value:+.2f}{error}"


def _percent(share: float) -> str:
    return f"{share:.0%}"
