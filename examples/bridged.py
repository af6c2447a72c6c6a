"""What circuits of a bridged model do in its dense model, measured and as tables."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import mean

from tl_sparse import PruneConfig, prune
from tl_sparse.bridges import AtSite, BridgeLosses, Bridges, DenseEffects, dense_effects
from tl_sparse.checkpoints import open_with_corpus
from tl_sparse.circuits import Circuit
from tl_sparse.evaluation import Change
from tl_sparse.files import read_json, write_json
from tl_sparse.pruning import heldout_pairs
from tl_sparse.records import record_from
from tl_sparse.suites import markdown_table

#: The search. Exchanges at its end would make some circuits smaller.
SEARCH = PruneConfig(exchanges=0)
#: The number of pairs that are measured; probes are trained on the other held-out ones.
N_PAIRS = 64

ABOUT = """\
A circuit is found in the sparse model. Its nodes then take the values that they have on the other
prompt of a pair (interchanged), or are held at their means (ablated), on held-out pairs. What this
does to the sparse stream at a site is decoded and added to the dense stream there, at one site at a
time. Cells are the change of the logit difference, right answer minus wrong one, ± one standard
error over pairs, and in brackets the share of prompts at which the preferred answer changes.

- sparse: what the change at this site alone does in the sparse model;
- dense: what it does in the dense model;
- random: in the dense model, the mean over draws of as many nodes at each hook point, chosen at
  random among all nodes there;
- probe: the dense stream at the last position is moved along the direction of a linear probe of the
  right answer to the other prompt's value; in brackets also how often the probe is right;
- whole stream: all of the dense stream at the site is the other prompt's, at every position."""


def circuit_of(folder: Path, source: str | Path, task: str) -> Circuit:
    """The circuit of a task, searched once."""
    if not folder.exists():
        model, corpus = open_with_corpus(source)
        circuit, _ = prune(model, task, corpus, SEARCH)
        circuit.save(folder)
    return Circuit.load(folder)


def measured(store: Path, circuit: Circuit, bridges: Bridges) -> DenseEffects:
    """What the circuit's nodes do in the dense model, measured once."""
    if not store.exists():
        data = heldout_pairs(circuit, bridges.sparse)
        write_json(store, asdict(dense_effects(circuit, bridges, data, N_PAIRS)))
    return record_from(DenseEffects, read_json(store))


def bridges_text(losses: BridgeLosses, found: Mapping[str, DenseEffects]) -> str:
    """The losses by site, and the effects by task and site."""
    parts = ["# Bridges to the bundled dense model", "", _losses(losses), ""]
    parts += ["## What the circuits do in the dense model", "", ABOUT, "", _summary(found)]
    for task, effects in found.items():
        parts += ["", f"## {task}", "", _effects(effects)]
    return "\n".join(parts)


def _losses(losses: BridgeLosses) -> str:
    rows = []
    for site in losses.sites:
        numbers = (
            site.nmse_encoder,
            site.nmse_decoder,
            site.kl_dense_to_sparse,
            site.kl_sparse_to_dense,
        )
        rows.append([f"`{site.site}`", *(f"{number:.3f}" for number in numbers)])
    header = ["site", "NMSE of the encoder", "of the decoder", "KL of dense → sparse"]
    return (
        f"On validation text the next-token loss is {losses.ce_dense:.3f} nats in the dense model "
        f"and {losses.ce_sparse:.3f} in the sparse one, and KL(dense ‖ sparse) is "
        f"{losses.kl_sparse:.3f}. KL of a hybrid, which is one model up to the site and then the "
        "other, is that from the dense model.\n\n"
        + markdown_table([*header, "of sparse → dense"], rows)
    )


def _summary(found: Mapping[str, DenseEffects]) -> str:
    """For each task, the site at which the dense model is moved most."""
    rows = []
    for task, effects in found.items():
        best = max(effects.sites, key=lambda site: -site.interchanged.dense.change.value)
        correlation = "–" if effects.correlation is None else str(effects.correlation)
        cells = [_cell(effects.interchanged), _cell(best.interchanged.dense)]
        cells += [_cell_of_draws(best.interchanged.random), f"`{best.site}`"]
        rows.append([task, str(len(effects.nodes)), *cells, correlation])
    header = ["task", "nodes", "interchanged in the sparse model", "in the dense one, at most"]
    header += ["random nodes there", "site", "correlation over single nodes"]
    return markdown_table(header, rows)


def _findings(effects: DenseEffects) -> str:
    """Where the dense model is moved as the sparse one, and where it is not."""
    lines = []
    for site in effects.sites:
        verdict = _verdict(site.interchanged)
        moved = site.interchanged.dense.change.value
        if site.probe is not None and moved < site.probe.change.change.value:
            verdict += "; that is more than along the probe"
        lines.append(f"- `{site.site}`: {verdict};")
    lines.append(f"- ablated: {_where_ablation_fails(effects)}.")
    return "\n".join(lines)


def _verdict(changed: AtSite) -> str:
    """What an interchange does at a site, and whether it fails there."""
    if changed.sparse.size.value == 0:
        return "nothing changes there, since all nodes of the circuit act later"
    moved = changed.dense.change
    if moved.value > -2 * (moved.standard_error or 0.0):
        return "fails: the answer is not moved towards the other one"
    strongest = min(draw.change.value for draw in changed.random)
    if moved.value >= strongest:
        return f"fails: a draw of random nodes moves it as much ({strongest:+.2f})"
    share = moved.value / changed.sparse.change.value
    flips = changed.dense.flips.value
    text = (
        f"moves {share:.0%} of what it moves in the sparse model, and flips {flips:.0%} of the "
        f"answers beside {changed.sparse.flips.value:.0%}"
    )
    if flips == 0:
        return f"{text}, so it fails to turn any"
    return text


def _where_ablation_fails(effects: DenseEffects) -> str:
    """The sites at which ablating the circuit is no more than ablating random nodes."""
    failing = []
    for site in effects.sites:
        changed = site.ablated
        strongest = min(draw.change.value for draw in changed.random)
        if changed.sparse.size.value > 0 and changed.dense.change.value >= strongest:
            failing.append(f"`{site.site}` ({strongest:+.2f})")
    if not failing:
        return "moves the dense model more than every draw of random nodes, where it acts at all"
    places = ", ".join(failing)
    return f"fails, since a draw of random nodes moves the dense model as much, at {places}"


def _effects(effects: DenseEffects) -> str:
    models = []
    for name, answers in (("sparse", effects.sparse), ("dense", effects.dense)):
        accuracy, difference = answers.accuracy.value, answers.difference
        models.append(f"{name} {accuracy:.0%} with a logit difference of {difference}")
    rows = []
    for site in effects.sites:
        probe = "–"
        if site.probe is not None:
            probe = f"{_cell(site.probe.change)[:-1]}; right {site.probe.accuracy.value:.0%})"
        changed = site.interchanged
        cells = [_cell(changed.sparse), _cell(changed.dense), _cell_of_draws(changed.random)]
        rows.append([f"`{site.site}`", *cells, probe, _cell(site.everything)])
    header = ["interchanged", "sparse", "dense", "random", "probe", "whole stream"]
    interchanged = markdown_table(header, rows)
    rows = []
    for site in effects.sites:
        changed = site.ablated
        cells = [_cell(changed.sparse), _cell(changed.dense), _cell_of_draws(changed.random)]
        rows.append([f"`{site.site}`", *cells])
    ablated = markdown_table(["ablated", "sparse", "dense", "random"], rows)
    return (
        f"{effects.n_pairs} pairs; probes are trained on {effects.n_probe_pairs} others. As they "
        f"are, the models are right at: {', '.join(models)}. In all of the sparse model, the "
        f"interchange moves {_cell(effects.interchanged)}, the ablation "
        f"{_cell(effects.ablated)}.\n\n{_findings(effects)}\n\n{interchanged}\n\n{ablated}\n\n{_nodes(effects)}"
    )


def _nodes(effects: DenseEffects) -> str:
    rows = []
    for node in effects.nodes[:8]:
        rows.append([node.node, f"`{node.site}`", _cell(node.sparse), _cell(node.dense)])
    return markdown_table(["interchanged alone", "at", "sparse", "dense"], rows)


def _cell(change: Change) -> str:
    error = change.change.standard_error
    of_error = "" if error is None else f" ± {error:.2f}"
    return f"{change.change.value:+.2f}{of_error} ({change.flips.value:.0%})"


def _cell_of_draws(draws: list[Change]) -> str:
    change = mean(draw.change.value for draw in draws)
    return f"{change:+.2f} ({mean(draw.flips.value for draw in draws):.0%})"
