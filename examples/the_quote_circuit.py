"""How a small sparse model closes strings, node by node, and an input on which its circuit says it
will fail.

    python examples/the_quote_circuit.py                     # prunes first, in about a minute
    python examples/the_quote_circuit.py --circuit my-circuit

Nothing here knows the answer: each number and each conclusion is computed from the model and its
circuit.
"""

# %% The model, its task, and the circuit: found here, or opened.
import argparse
from collections import defaultdict
from functools import partial
from itertools import islice

import torch

import tl_sparse
from tl_sparse.circuits import KINDS, node_label, residual_joins
from tl_sparse.evaluation import effects, holding_circuit, score
from tl_sparse.hooks import recording
from tl_sparse.tasks import Task, make_task_data
from tl_sparse.text import table

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument(
    "--model", default="tiny-python-sparse", help="a folder or name (default: %(default)s)"
)
parser.add_argument("--circuit", help="a saved circuit of the task (default: prune one)")
parser.add_argument(
    "--pairs", type=int, default=100, help="of prompts, for every number (default: %(default)s)"
)
args = parser.parse_args()

model = tl_sparse.load(args.model, device="cpu").requires_grad_(False)
task = tl_sparse.get_task("single_double_quote")
corpus = tl_sparse.load_corpus(args.model, model.tokenizer, model.cfg.n_ctx).long()
circuit = (
    tl_sparse.Circuit.load(args.circuit)
    if args.circuit
    else tl_sparse.prune(model, task, corpus)[0]
)
data = make_task_data(
    task, model.tokenizer, args.pairs, seed=1, n_ctx=model.cfg.n_ctx - 1
)  # room for a token
marks = [
    f"({answer[0]}" for answer in task.candidates
]  # what opens the string that ends in `answer`
answers = data.candidates[0]
edges, text = circuit.edges(model), lambda token: repr(model.tokenizer.decode([token]))
print(
    f"{circuit!r}\n{len(edges)} edges. After {data.prompts[0]!r}: {' or '.join(map(repr, task.candidates))}?"
)

# %% What each node's value depends on: over the corpus, how much of its variance the token at that
# position explains, how much the position, and at which of them the values are highest and lowest.
hooks, rows = circuit.hooks, corpus[:64]
with recording(model, circuit.kept) as in_corpus:
    model(rows)
with recording(model, circuit.kept) as in_prompts:
    model(data.tokens)
opened = (
    (data.tokens[::2] != data.tokens[1::2]).int().argmax(1).repeat_interleave(2)
)  # where the two prompts differ
prompts = torch.arange(len(data.tokens))


def values(node, found):
    return found[hooks[node.layer, node.location]].flatten(2)[..., node.index]


def by_group(x, groups):
    """What share of the variance the groups explain, and the three of at least five members with
    the highest means, and with the lowest."""
    counts = torch.bincount(groups)
    means = torch.bincount(groups, x.double()) / counts
    explained = ((means[groups] - x.mean()) ** 2).sum() / ((x - x.mean()) ** 2).sum().clamp(
        min=1e-12
    )
    order = (
        means.where(counts >= 5, -torch.inf)
        .argsort(descending=True)[: int((counts >= 5).sum())]
        .tolist()
    )
    return float(explained), order[:3], order[-3:]


lines = []
for node in circuit.nodes:
    x = values(node, in_corpus).flatten()
    token_share, *tokens = by_group(x, rows.flatten())
    position_share, *positions = by_group(x, torch.arange(rows.shape[1]).repeat(len(rows)))
    named, ends = (text, tokens) if token_share >= position_share else ("@{}".format, positions)
    extremes = " … ".join(" ".join(map(named, end)) for end in ends)
    shares = [f"{token_share:.0%}", f"{position_share:.0%}"]
    lines.append([node_label(model, node), KINDS[node.location], *shares, extremes])
print("\nWhat the nodes depend on, over the corpus (@: positions)\n")
print(table(["node", "kind", "token", "position", "highest … lowest on"], lines))

# %% What each node does in the task: its value in the two kinds of prompts, where the string opens
# and at the end; its edges; and what becomes of the loss when it alone is held at its mean.
cut, lines = effects(circuit, model, data), []
joins = residual_joins(circuit.nodes)
for node in circuit.nodes:
    x = values(node, in_prompts)
    at_mark, at_end = (
        x[prompts, where].view(-1, 2).mean(0).tolist() for where in (opened, data.last)
    )
    sources = [
        f"{node_label(model, e.source)} ({e.weight:+.2f})" for e in edges if e.target == node
    ]
    sources += [f"{node_label(model, write)} (stream)" for write, read in joins if read == node]
    numbers = [f"{a:+.2f} / {b:+.2f}" for a, b in (at_mark, at_end)]
    lines.append(
        [node_label(model, node), *numbers, f"{cut[node]:+.3f}", ", ".join(sources) or "the stream"]
    )
print(f"\nWhat they do in the task: mean values after {marks[0]} / after {marks[1]}\n")
print(table(["node", "where it opens", "at the end", "loss if cut", "reads"], lines))

# %% Which head moves what: where the last token attends in the heads that carry values of the
# circuit.
heads = sorted(
    {(n.layer, n.index // model.cfg.d_head) for n in circuit.nodes if n.location == "attn_v"}
)
with recording(model, {f"blocks.{layer}.attn.hook_pattern" for layer, _ in heads}) as patterns:
    model(data.tokens)
quotes = torch.tensor(
    [token for token in range(model.cfg.d_vocab) if set(text(token)[1:-1]) & set("'\"")]
)
quoted = torch.isin(data.tokens, quotes)
for layer, head in heads:
    attention = patterns[f"blocks.{layer}.attn.hook_pattern"][prompts, head, data.last]
    on_mark, on_quotes = attention[prompts, opened], (attention * quoted).sum(1)
    everywhere, evenly = (
        attention.sum(1),
        1 / (data.last + 1),
    )  # the rest is the sink's, if there is one
    parts = (on_mark, on_quotes - on_mark, everywhere - on_quotes, 1 - everywhere, evenly)
    mark, others, rest, sink, even = (float(part.mean()) for part in parts)
    print(
        f"\nHead {layer}.{head}: the last token attends {mark:.0%} to what opened the string, {others:.0%} to other "
        f"tokens with a quote, {rest:.0%} to the rest, {abs(sink):.0%} to none; evenly it would be {even:.0%} each."
    )

# %% Which logits each write raises, the final norm's scale aside: of the two answers, and of all
# tokens.
norm = getattr(model.ln_final, "w", None)
readout, lines, moved = model.W_U if norm is None else norm[:, None] * model.W_U, [], {}
for node in (node for node in circuit.nodes if node.location.endswith("_out")):
    at_end = values(node, in_prompts)[prompts, data.last].view(-1, 2).mean(0)
    row = readout[node.index]
    moved[node] = float((at_end[0] - at_end[1]) * (row[answers[0]] - row[answers[1]]))
    top = " ".join(text(int(token)) for token in row.abs().topk(3).indices)
    lines.append(
        [
            node_label(model, node),
            *(f"{float(row[a]):+.2f}" for a in answers),
            f"{moved[node]:+.2f}",
            top,
        ]
    )
header = ["write", *map(repr, task.candidates), "moves the answers apart by", "strongest on"]
print("\nEntries of the unembedding, and what they make of the values above\n")
print(table(header, lines))

# %% So the paths from the values that heads move to the answers.
steps = defaultdict(list)
for source, target in [*((edge.source, edge.target) for edge in edges), *joins]:
    steps[source].append(target)


def paths(node):
    if abs(moved.get(node, 0)) >= 0.01:
        yield [node]
    yield from ([node, *rest] for following in steps[node] for rest in paths(following))


print("\nPaths from values to answers, with what the last node of each moves these apart\n")
for path in islice(
    (path for node in circuit.nodes if node.location == "attn_v" for path in paths(node)), 12
):
    print(f"  {' → '.join(node_label(model, node) for node in path)}: {moved[path[-1]]:+.2f}")

# %% A prediction. Python allows quotes of the other kind in a string: by which token that has some,
# put right behind what opened the string, is the circuit led astray most?
worst, vocabulary = [], [model.tokenizer.decode([token]) for token in range(model.cfg.d_vocab)]
for side in (0, 1):
    own, other = marks[side][-1], marks[1 - side][-1]
    tokens = torch.tensor(
        [i for i, token in enumerate(vocabulary) if other in token and own not in token]
    )
    margins = []
    with circuit.applied(model):
        for row in range(side, min(32, len(data.tokens)), 2):
            prompt, at = data.tokens[row, : data.last[row] + 1], int(opened[row]) + 1
            inserted = torch.stack(
                [torch.cat([prompt[:at], token, prompt[at:]]) for token in tokens.view(-1, 1)]
            )
            logits = torch.cat([model(prompt[None])[:, -1], model(inserted)[:, -1]])
            margins.append(logits[:, answers[side]] - logits[:, answers[1 - side]])
    without, *found = torch.stack(margins).mean(0).tolist()
    worst.append(vocabulary[tokens[found.index(min(found))]])
    print(
        f"\nIn a string that {marks[side]} opens, of {len(tokens)} tokens {worst[side]!r} is worst: the right answer's "
        f"logit is {min(found):+.2f} ahead with it, {without:+.2f} without, {sum(found) / len(found):+.2f} on average"
    )

# %% The check, on the full model: prompts in whose string that token stands, in a call that is
# closed again, beside ordinary ones, and some with the same words but no quotes. The right answer
# stays: the outer string is still open.


def sample(inserts, rng):
    pair = task.sample(rng)
    at = 1 + next(
        i for i, (a, b) in enumerate(zip(*pair, strict=False)) if a != b
    )  # after the quote that opens
    return tuple(
        prompt[:at] + insert + prompt[at:] for prompt, insert in zip(pair, inserts, strict=True)
    )


inserts = {"ordinary": ("", ""), "with a call without quotes": ("see(it) ", "see(it) ")}
for times in (1, 2):
    calls = (f"see{mark}it{end} " for mark, end in zip(worst, task.candidates[::-1], strict=True))
    inserts[f"with {times} in the other quotes"] = tuple(call * times for call in calls)
lines, wrong = [], {}
for kind, texts in inserts.items():
    changed = Task(kind, "", task.candidates, partial(sample, texts))
    found = make_task_data(changed, model.tokenizer, args.pairs, seed=2, n_ctx=model.cfg.n_ctx)
    wrong[kind] = [
        1 - score(model, found, run_context=state).accuracy
        for state in (holding_circuit(circuit, model), None)
    ]
    lines.append(
        [kind, *(f"{share:.0%}" for share in wrong[kind]), repr(found.prompts[0].splitlines()[-1])]
    )
print(f"\nHow often the wrong quote is chosen, of {2 * args.pairs} prompts\n")
print(
    table(["prompts", "by the circuit", "by the full model", "for example, the last line"], lines)
)
(_, ordinary), *_, (predicted, fooled) = wrong.values()
verdict = "holds" if min(predicted, fooled) > 0.5 > ordinary else "does not hold"
print(
    f"\nThe circuit is wrong on {predicted:.0%} of the last, and the full model on {fooled:.0%} of them, beside "
    f"{ordinary:.0%} of ordinary prompts: the prediction {verdict}."
)
