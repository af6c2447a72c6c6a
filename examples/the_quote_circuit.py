"""How a small sparse model closes strings, node by node, and an input on which its circuit predicts
that it fails.

    python examples/the_quote_circuit.py                     # prunes first, in about a minute
    python examples/the_quote_circuit.py --circuit my-circuit

The answer is not written into this script: each number and each conclusion is computed from the
model and its circuit.
"""

# %% The model, the task, and its circuit, which is either pruned here or loaded.
import argparse
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice

import torch

import tl_sparse
from tl_sparse.circuits import LOCATIONS, residual_joins
from tl_sparse.evaluation import effects, holding_circuit, score
from tl_sparse.hooks import recording
from tl_sparse.tasks import Task, make_task_data, table

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument(
    "--model",
    help="folder or name of the model (default: that of the circuit, or tiny-python-wide)",
)
parser.add_argument("--circuit", help="folder of a saved circuit of the task (default: prune one)")
parser.add_argument(
    "--pairs", type=int, default=100, help="number of pairs of prompts (default: %(default)s)"
)
args = parser.parse_args()

task = tl_sparse.get_task("single_double_quote")
name = args.model or "tiny-python-wide"
if args.circuit:
    circuit = tl_sparse.Circuit.load(args.circuit)
    name = args.model or circuit.model_name
model = tl_sparse.load(name, device="cpu").requires_grad_(False)
vocabulary = [model.tokenizer.decode([token]) for token in range(model.cfg.d_vocab)]
corpus = tl_sparse.load_corpus(name, model.tokenizer, model.cfg.n_ctx).long()
if not args.circuit:
    circuit, _ = tl_sparse.prune(model, task, corpus)
edges = circuit.edges(model)
n_ctx = model.cfg.n_ctx - 1  # room for one more token
data = make_task_data(task, model.tokenizer, args.pairs, seed=1, n_ctx=n_ctx)
answers = data.candidates[0]
# The text that opens the string which each answer closes.
marks = [f"({answer[0]}" for answer in task.candidates]
print(circuit)
print(
    f"{len(edges)} edges. After {data.prompts[0]!r}: "
    f"{task.candidates[0]!r} or {task.candidates[1]!r}?"
)

# %% What each node's value depends on, over the corpus: the shares of its variance that the token
# and the position explain, and the tokens or positions with the highest and lowest mean values.
rows = corpus[:64]
positions = torch.arange(rows.shape[1]).repeat(len(rows))
with recording(model, circuit.kept) as in_corpus:
    model(rows)


def values(node, activations):
    hook = circuit.hooks[node.layer, node.location]
    return activations[hook].flatten(2)[..., node.index]


@dataclass
class Dependence:
    """How a node's value depends on a grouping by token or by position.

    Attributes:
        explained: the share of the variance that the groups explain.
        highest: the three groups with the highest means, of those with at least five members.
        lowest: likewise, the three groups with the lowest means.
    """

    explained: float
    highest: list[int]
    lowest: list[int]


def dependence(x, groups):
    counts = torch.bincount(groups)
    means = torch.bincount(groups, x.double()) / counts
    between_groups = ((means[groups] - x.mean()) ** 2).sum()
    total = ((x - x.mean()) ** 2).sum().clamp(min=1e-12)
    frequent = counts >= 5
    order = means.where(frequent, -torch.inf).argsort(descending=True)
    order = order[: int(frequent.sum())].tolist()
    return Dependence(float(between_groups / total), order[:3], order[-3:])


def token_label(token):
    return repr(vocabulary[token])


def position_label(position):
    return f"@{position}"


lines = []
for node in circuit.nodes:
    x = values(node, in_corpus).flatten()
    on_token = dependence(x, rows.flatten())
    on_position = dependence(x, positions)
    if on_token.explained >= on_position.explained:
        highest = map(token_label, on_token.highest)
        lowest = map(token_label, on_token.lowest)
    else:
        highest = map(position_label, on_position.highest)
        lowest = map(position_label, on_position.lowest)
    lines.append(
        [
            str(node),
            LOCATIONS[node.location].description,
            f"{on_token.explained:.0%}",
            f"{on_position.explained:.0%}",
            f"{' '.join(highest)} … {' '.join(lowest)}",
        ]
    )
print("\nWhat the nodes depend on, over the corpus (@ marks positions)\n")
print(table(["node", "kind", "token", "position", "highest … lowest on"], lines))

# %% What each node does in the task: its mean value in the prompts of each answer, where the string
# opens and at the last token; the edges into it; and the change of the loss when it alone is
# mean-ablated.
prompts = torch.arange(len(data.tokens))
differs = data.tokens[::2] != data.tokens[1::2]
opened = differs.int().argmax(1).repeat_interleave(2)  # the first position at which a pair differs
with recording(model, circuit.kept) as in_prompts:
    model(data.tokens)


def means_by_side(node, position_of_prompt):
    """The node's mean value in the prompts of each answer, at one position of each prompt."""
    x = values(node, in_prompts)[prompts, position_of_prompt]
    return x.view(-1, 2).mean(0)


loss_if_cut = effects(circuit, model, data)
joins = residual_joins(circuit.nodes)
lines = []
for node in circuit.nodes:
    at_mark = means_by_side(node, opened).tolist()
    at_end = means_by_side(node, data.last).tolist()
    sources = []
    for edge in edges:
        if edge.target == node:
            sources.append(f"{edge.source} ({edge.weight:+.2f})")
    for write, read in joins:
        if read == node:
            sources.append(f"{write} (stream)")
    lines.append(
        [
            str(node),
            f"{at_mark[0]:+.2f} / {at_mark[1]:+.2f}",
            f"{at_end[0]:+.2f} / {at_end[1]:+.2f}",
            f"{loss_if_cut[node]:+.3f}",
            ", ".join(sources) or "the stream",
        ]
    )
print(f"\nWhat the nodes do in the task: mean values after {marks[0]} / after {marks[1]}\n")
print(table(["node", "where it opens", "at the end", "loss if cut", "reads"], lines))


# %% Which head moves which information: where the last token attends in the heads with value nodes
# in the circuit.
def pattern_hook(layer):
    return f"blocks.{layer}.attn.hook_pattern"


value_nodes = [node for node in circuit.nodes if node.location == "attn_v"]
heads = sorted({(node.layer, node.index // model.cfg.d_head) for node in value_nodes})
with recording(model, {pattern_hook(layer) for layer, _ in heads}) as patterns:
    model(data.tokens)
quotes = [token for token, text in enumerate(vocabulary) if "'" in text or '"' in text]
has_quote = torch.isin(data.tokens, torch.tensor(quotes))
for layer, head in heads:
    attention = patterns[pattern_hook(layer)][prompts, head, data.last]
    on_mark = attention[prompts, opened]
    on_quotes = (attention * has_quote).sum(1)
    on_tokens = attention.sum(1)  # the remainder to 1 is on the attention sink, if there is one
    evenly = 1 / (data.last + 1)
    print(
        f"\nHead {layer}.{head}: the last token attends {on_mark.mean():.0%} to the token that "
        f"opened the string, {(on_quotes - on_mark).mean():.0%} to other tokens with a quote, "
        f"{(on_tokens - on_quotes).mean():.0%} to the remaining tokens, and "
        f"{(1 - on_tokens).mean().abs():.0%} to no token; uniform attention would be "
        f"{evenly.mean():.0%} to each token."
    )

# %% Which logits each node that writes to the residual stream raises, ignoring the scale of the
# final norm: those of the two answers, and the largest of all tokens.
readout = model.W_U
if getattr(model.ln_final, "w", None) is not None:
    readout = model.ln_final.w[:, None] * model.W_U
moved_apart = {}
lines = []
for node in circuit.nodes:
    if not node.location.endswith("_out"):
        continue
    at_end = means_by_side(node, data.last)
    logits = readout[node.index]
    of_answers = logits[answers]
    moved_apart[node] = float((at_end[0] - at_end[1]) * (of_answers[0] - of_answers[1]))
    strongest = logits.abs().topk(3).indices.tolist()
    lines.append(
        [
            str(node),
            f"{of_answers[0]:+.2f}",
            f"{of_answers[1]:+.2f}",
            f"{moved_apart[node]:+.2f}",
            " ".join(map(token_label, strongest)),
        ]
    )
header = ["write", *map(repr, task.candidates), "moves the answers apart by", "strongest on"]
print("\nUnembedding entries of the writing nodes, and the effect of the mean values above\n")
print(table(header, lines))

# %% The paths from the value nodes of the heads to the answers.
targets = defaultdict(list)
for edge in edges:
    targets[edge.source].append(edge.target)
for write, read in joins:
    targets[write].append(read)


def paths(node):
    """All paths from a node to a write that moves the answers apart."""
    if abs(moved_apart.get(node, 0)) >= 0.01:
        yield [node]
    for target in targets[node]:
        for rest in paths(target):
            yield [node, *rest]


print("\nPaths from value nodes to the answers, and how far the last node moves these apart\n")
for path in islice(chain.from_iterable(map(paths, value_nodes)), 12):
    labels = [str(node) for node in path]
    print(f"  {' → '.join(labels)}: {moved_apart[path[-1]]:+.2f}")


# %% A prediction. A string in Python may contain the other kind of quote. Which token with such a
# quote, inserted directly after the token that opened the string, misleads the circuit most?
def last_logits(row, tokens):
    """The circuit's logits after a prompt, unchanged and with each of the tokens in its string."""
    prompt = data.tokens[row, : data.last[row] + 1]
    start = int(opened[row]) + 1
    changed = [torch.cat([prompt[:start], token, prompt[start:]]) for token in tokens.view(-1, 1)]
    with circuit.applied(model):
        return torch.cat([model(prompt[None])[:, -1], model(torch.stack(changed))[:, -1]])


worst = []
for side in (0, 1):
    own_quote = marks[side][-1]
    other_quote = marks[1 - side][-1]
    tokens = []
    for token, text in enumerate(vocabulary):
        if other_quote in text and own_quote not in text:
            tokens.append(token)
    leads = []
    for row in range(side, min(32, len(data.tokens)), 2):
        logits = last_logits(row, torch.tensor(tokens))
        leads.append(logits[:, answers[side]] - logits[:, answers[1 - side]])
    without, *with_token = torch.stack(leads).mean(0).tolist()
    smallest = min(with_token)
    worst.append(vocabulary[tokens[with_token.index(smallest)]])
    print(
        f"\nIn a string that {marks[side]} opens, the worst of {len(tokens)} tokens is "
        f"{worst[side]!r}: the logit of the right answer minus that of the wrong one is "
        f"{smallest:+.2f} with it, {without:+.2f} without it, and "
        f"{sum(with_token) / len(with_token):+.2f} on average over the tokens"
    )


# %% The check on the full model: prompts whose string contains that token, in a call that is closed
# again, compared with ordinary prompts and with prompts that have the same words but no quotes. The
# right answer does not change, because the outer string is still open.
def first_difference(first, second):
    index = 0
    while first[index] == second[index]:
        index += 1
    return index


def sample_with(inserts, rng):
    """A pair of the task with a text inserted at the start of each prompt's open string."""
    pair = task.sample(rng)
    start = first_difference(*pair) + 1  # after the quote that opens the string
    changed = []
    for prompt, insert in zip(pair, inserts, strict=True):
        changed.append(prompt[:start] + insert + prompt[start:])
    return tuple(changed)


# Each call begins with the worst token and ends with the other answer.
calls = (f"see{worst[0]}it{task.candidates[1]} ", f"see{worst[1]}it{task.candidates[0]} ")
inserts = {
    "ordinary": ("", ""),
    "with a call without quotes": ("see(it) ", "see(it) "),
    "with 1 in the other quotes": calls,
    "with 2 in the other quotes": (2 * calls[0], 2 * calls[1]),
}
lines = []
by_circuit = {}
by_model = {}
for kind, texts in inserts.items():
    changed_task = Task(kind, "", task.candidates, partial(sample_with, texts))
    prompts_of_kind = make_task_data(
        changed_task, model.tokenizer, args.pairs, seed=2, n_ctx=model.cfg.n_ctx
    )
    circuit_score = score(model, prompts_of_kind, run_context=holding_circuit(circuit, model))
    by_circuit[kind] = 1 - circuit_score.accuracy
    by_model[kind] = 1 - score(model, prompts_of_kind).accuracy
    last_line = prompts_of_kind.prompts[0].splitlines()[-1]
    lines.append([kind, f"{by_circuit[kind]:.0%}", f"{by_model[kind]:.0%}", repr(last_line)])
header = ["prompts", "by the circuit", "by the full model", "last line of an example"]
print(f"\nShare of {2 * args.pairs} prompts for which the wrong quote is chosen\n")
print(table(header, lines))
predicted = by_circuit["with 2 in the other quotes"]
fooled = by_model["with 2 in the other quotes"]
ordinary = by_model["ordinary"]
verdict = "holds" if min(predicted, fooled) > 0.5 > ordinary else "does not hold"
print(
    f"\nOn the last kind of prompt the circuit is wrong in {predicted:.0%} of cases and the full "
    f"model in {fooled:.0%}, compared with {ordinary:.0%} on ordinary prompts: the prediction "
    f"{verdict}."
)
