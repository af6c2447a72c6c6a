"""TransformerLens' own tools on a sparse model, alone and under a circuit: logit differences,
activation patching, and attribution by gradients. Nothing in here knows that the model is sparse;
it runs on TransformerLens 3 and 4.

    python examples/existing_tools.py                        # prunes first, in about a minute
    python examples/existing_tools.py --circuit my-circuit
"""

# %% A sparse model, the circuit of a task, and a pair of prompts with two answers.
import argparse
import random
from functools import partial

import torch
from transformer_lens import patching

import tl_sparse
from tl_sparse.tasks import make_task_data
from tl_sparse.text import table

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument(
    "--model", default="tiny-python-sparse", help="a folder or name (default: %(default)s)"
)
parser.add_argument("--circuit", help="a saved circuit of the task (default: prune one)")
args = parser.parse_args()

model = tl_sparse.load(args.model, device="cpu")
task = tl_sparse.get_task("single_double_quote")
if args.circuit:
    circuit = tl_sparse.Circuit.load(args.circuit)
else:
    corpus = tl_sparse.load_corpus(args.model, model.tokenizer, model.cfg.n_ctx)
    circuit, _ = tl_sparse.prune(model, task, corpus)
data = make_task_data(task, model.tokenizer, n_pairs=1, seed=0, n_ctx=model.cfg.n_ctx).trimmed()
clean, corrupt = (
    data.tokens[:1],
    data.tokens[1:],
)  # of one length, and they differ in the quote that opens the string
right, wrong = data.candidates[0]
print(f"{circuit!r}\nclean:   {data.prompts[0]!r}\ncorrupt: {data.prompts[1]!r}")


# %% Logit differences.
def difference(logits):
    return logits[0, -1, right] - logits[0, -1, wrong]


def recovered(logits, of):
    """0: as on the corrupt prompt; 1: as on the clean one."""
    return (difference(logits) - of["corrupt"]) / (of["clean"] - of["corrupt"])


@torch.no_grad()
def runs():
    logits, cache = model.run_with_cache(clean)
    of = {"clean": difference(logits), "corrupt": difference(model(corrupt))}
    return of, cache


alone, cache = runs()
with circuit.applied(model):
    under, circuit_cache = runs()
lines = [
    [name, *(f"{float(of[name]):+.2f}" for of in (alone, under))] for name in ("clean", "corrupt")
]
print(f"\nLogit of {task.candidates[0]!r} minus that of {task.candidates[1]!r}\n")
print(table(["prompt", "the model", "under the circuit"], lines))

# %% Activation patching, TransformerLens' own: heads, and the stream at each position, of the clean
# run put into the corrupt one.
metrics = [partial(recovered, of=of) for of in (alone, under)]
heads = [patching.get_act_patch_attn_head_out_all_pos(model, corrupt, cache, metrics[0])]
stream = [patching.get_act_patch_resid_pre(model, corrupt, cache, metrics[0])]
with circuit.applied(model):
    heads.append(
        patching.get_act_patch_attn_head_out_all_pos(model, corrupt, circuit_cache, metrics[1])
    )
    stream.append(patching.get_act_patch_resid_pre(model, corrupt, circuit_cache, metrics[1]))
for where, found in (("the model", 0), ("the circuit", 1)):
    layer, head = divmod(int(heads[found].argmax()), model.cfg.n_heads)
    first, at = stream[found][0], int(stream[found][0].argmax())
    token = model.tokenizer.decode([int(clean[0, at])])
    print(
        f"\nIn {where}, head {layer}.{head} recovers most, {float(heads[found].max()):.0%}; the median head "
        f"{float(heads[found].median()):.0%}. Of the positions before the first layer it is {at}, {token!r}, with "
        f"{float(first[at]):.0%}."
    )

# %% Attribution by gradients, through backward hooks: (clean − corrupt) · gradient of every node,
# in the whole model.
gradients = {}


def save(name, gradient, hook):
    gradients[name] = gradient.detach().clone()


_, corrupt_cache = model.run_with_cache(corrupt)
with model.hooks(bwd_hooks=[(name, partial(save, name)) for name in circuit.kept]):
    metrics[0](model(corrupt)).backward()
changes = {name: (cache[name] - corrupt_cache[name]).detach() for name in circuit.kept}
attributed = {
    name: (changes[name] * gradients[name]).sum((0, 1)) for name in circuit.kept
}  # over positions
nodes = [(name, index) for name, mask in circuit.kept.items() for index in range(mask.numel())]
inside = [node for node in nodes if circuit.kept[node[0]].flatten()[node[1]]]
ranked = sorted(nodes, key=lambda node: -attributed[node[0]].flatten()[node[1]].abs())
found = len(set(ranked[: len(inside)]) & set(inside))
print(
    f"\nOf the {len(inside)} nodes with the largest attribution, {found} are among the {len(inside)} of the circuit. "
    f"Of as many drawn from all {len(nodes):,} it would be {len(inside) ** 2 / len(nodes):.1f}."
)


# %% Patching nodes one by one: those of the circuit, and as many outside, drawn from those that
# differ between the two prompts, since patching the others could do nothing.
@torch.no_grad()
def patched(chosen, source, metric):
    """What is recovered when the chosen nodes are as in `source`, at all positions."""

    def put(indices, name, activation, hook):
        activation.flatten(2)[:, :, indices] = source[name].flatten(2)[:, :, indices]
        return activation

    at = {name: [index for hook, index in chosen if hook == name] for name, _ in chosen}
    hooks = [(name, partial(put, indices, name)) for name, indices in at.items()]
    return float(metric(model.run_with_hooks(corrupt, fwd_hooks=hooks)))


differ = {name: change.abs().amax((0, 1)).flatten() > 0 for name, change in changes.items()}
outside = random.Random(0).sample(
    [(n, i) for n, i in nodes if differ[n][i] and (n, i) not in inside], len(inside)
)
lines = []
for where, chosen in (("inside the circuit", inside), ("outside, at random", outside)):
    effects = [abs(patched([node], cache, metrics[0])) for node in chosen]
    together = patched(chosen, cache, metrics[0])
    with circuit.applied(model):
        under_effects = [abs(patched([node], circuit_cache, metrics[1])) for node in chosen]
    means = (
        sum(effects) / len(effects),
        max(effects),
        together,
        sum(under_effects) / len(under_effects),
    )
    lines.append([where, str(len(chosen)), *(f"{value:.1%}" for value in means)])
print("\nWhat patching recovers: one node at a time (absolute values), and all of them at once\n")
print(table(["nodes", "number", "mean", "largest", "at once", "mean, under the circuit"], lines))
rest = patched([node for node in nodes if node not in set(inside)], cache, metrics[0])
print(f"\nAll {len(nodes) - len(inside):,} nodes outside at once recover {rest:.1%}.")
