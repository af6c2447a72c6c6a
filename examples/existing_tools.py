"""TransformerLens' own tools on a sparse model, with and without a circuit applied: logit
differences, activation patching, and gradient attribution. None of this code depends on the model
being sparse, and it runs on TransformerLens 3 and 4.

    python examples/existing_tools.py                        # prunes first, in about a minute
    python examples/existing_tools.py --circuit my-circuit
"""

# %% A sparse model, the circuit of a task, and a pair of prompts with two answers.
import argparse
import random
from collections import defaultdict
from dataclasses import dataclass
from functools import partial

import torch
from transformer_lens import ActivationCache, patching

import tl_sparse
from tl_sparse.tasks import make_task_data, table

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument(
    "--model",
    help="folder or name of the model (default: that of the circuit, or tiny-python-wide)",
)
parser.add_argument("--circuit", help="folder of a saved circuit of the task (default: prune one)")
args = parser.parse_args()

task = tl_sparse.get_task("single_double_quote")
if args.circuit:
    circuit = tl_sparse.Circuit.load(args.circuit)
    model = tl_sparse.load(args.model or circuit.model_name, device="cpu")
else:
    model = tl_sparse.load(args.model or "tiny-python-wide", device="cpu")
    circuit, _ = tl_sparse.prune(model, task)
data = make_task_data(task, model.tokenizer, n_pairs=1, seed=0, n_ctx=model.cfg.n_ctx).trimmed()
# The two prompts have the same length and differ in the quote that opens the string.
clean = data.tokens[:1]
corrupt = data.tokens[1:]
right, wrong = data.candidates[0]
print(f"{circuit!r}\nclean:   {data.prompts[0]!r}\ncorrupt: {data.prompts[1]!r}")


# %% Logit differences.
def logit_difference(logits):
    return logits[0, -1, right] - logits[0, -1, wrong]


@dataclass
class Baseline:
    """Logit differences on both prompts, and all activations on the clean prompt."""

    clean: torch.Tensor
    corrupt: torch.Tensor
    clean_cache: ActivationCache

    def recovered(self, logits):
        """The recovered share of the logit difference: 0 is the corrupt prompt, 1 the clean one."""
        return (logit_difference(logits) - self.corrupt) / (self.clean - self.corrupt)


@torch.no_grad()
def run_both():
    clean_logits, clean_cache = model.run_with_cache(clean)
    corrupt_logits = model(corrupt)
    return Baseline(logit_difference(clean_logits), logit_difference(corrupt_logits), clean_cache)


alone = run_both()
with circuit.applied(model):
    under_circuit = run_both()
rows = [
    ["clean", f"{alone.clean:+.2f}", f"{under_circuit.clean:+.2f}"],
    ["corrupt", f"{alone.corrupt:+.2f}", f"{under_circuit.corrupt:+.2f}"],
]
print(f"\nLogit of {task.candidates[0]!r} minus that of {task.candidates[1]!r}\n")
print(table(["prompt", "the model", "under the circuit"], rows))


# %% Activation patching with TransformerLens: the output of each head, and resid_pre at each
# position, are patched from the clean run into the corrupt run.
def patch_heads_and_stream(baseline):
    inputs = (model, corrupt, baseline.clean_cache, baseline.recovered)
    heads = patching.get_act_patch_attn_head_out_all_pos(*inputs)
    stream = patching.get_act_patch_resid_pre(*inputs)
    return heads, stream


def print_best(place, heads, stream):
    layer, head = divmod(int(heads.argmax()), model.cfg.n_heads)
    before_first_layer = stream[0]
    position = int(before_first_layer.argmax())
    token = model.tokenizer.decode([int(clean[0, position])])
    print(
        f"\nIn {place}, patching head {layer}.{head} recovers most, {heads.max():.0%}; "
        f"the median head recovers {heads.median():.0%}. "
        f"Of the positions of resid_pre before the first layer, position {position}, {token!r}, "
        f"recovers most, {before_first_layer[position]:.0%}."
    )


patched_alone = patch_heads_and_stream(alone)
with circuit.applied(model):
    patched_under_circuit = patch_heads_and_stream(under_circuit)
print_best("the model", *patched_alone)
print_best("the circuit", *patched_under_circuit)

# %% Gradient attribution with backward hooks: (clean − corrupt) · gradient for every node, in the
# whole model, summed over positions.
gradients = {}


def save_gradient(name, gradient, hook):
    gradients[name] = gradient.detach().clone()


_, corrupt_cache = model.run_with_cache(corrupt)
with model.hooks(bwd_hooks=[(name, partial(save_gradient, name)) for name in circuit.kept]):
    alone.recovered(model(corrupt)).backward()
changes = {}
attributions = {}
for name in circuit.kept:
    changes[name] = (alone.clean_cache[name] - corrupt_cache[name]).detach()
    attributions[name] = (changes[name] * gradients[name]).sum((0, 1)).flatten()

# A node is the name of a hook and an index into its activation.
nodes = []
inside = []
for name, mask in circuit.kept.items():
    for index, is_kept in enumerate(mask.flatten().tolist()):
        nodes.append((name, index))
        if is_kept:
            inside.append((name, index))


def attribution_size(node):
    name, index = node
    return float(attributions[name][index].abs())


ranked = sorted(nodes, key=attribution_size, reverse=True)
n_shared = len(set(ranked[: len(inside)]) & set(inside))
print(
    f"\nOf the {len(inside)} nodes with the largest attribution, "
    f"{n_shared} are among the {len(inside)} of the circuit. Of as many nodes drawn at random from "
    f"all {len(nodes):,}, {len(inside) ** 2 / len(nodes):.1f} would be expected to be."
)


# %% Patch nodes one by one: the nodes of the circuit, and as many nodes outside it. The latter are
# drawn from nodes that differ between the two prompts, since patching the others has no effect.
def put_clean(indices, clean_activation, activation, hook):
    activation.flatten(2)[:, :, indices] = clean_activation.flatten(2)[:, :, indices]
    return activation


@torch.no_grad()
def patched(chosen, baseline):
    """The recovered share when the chosen nodes are patched from the clean prompt everywhere."""
    indices = defaultdict(list)
    for name, index in chosen:
        indices[name].append(index)
    hooks = []
    for name in indices:
        hooks.append((name, partial(put_clean, indices[name], baseline.clean_cache[name])))
    return float(baseline.recovered(model.run_with_hooks(corrupt, fwd_hooks=hooks)))


def patched_one_by_one(chosen, baseline):
    return [abs(patched([node], baseline)) for node in chosen]


outside = [node for node in nodes if node not in inside]
changed_outside = []
for name, index in outside:
    if changes[name].flatten(2)[..., index].abs().max() > 0:
        changed_outside.append((name, index))
drawn_outside = random.Random(0).sample(changed_outside, len(inside))

rows = []
for place, chosen in (("inside the circuit", inside), ("outside, at random", drawn_outside)):
    effects = patched_one_by_one(chosen, alone)
    at_once = patched(chosen, alone)
    with circuit.applied(model):
        circuit_effects = patched_one_by_one(chosen, under_circuit)
    rows.append(
        [
            place,
            str(len(chosen)),
            f"{sum(effects) / len(effects):.1%}",
            f"{max(effects):.1%}",
            f"{at_once:.1%}",
            f"{sum(circuit_effects) / len(circuit_effects):.1%}",
        ]
    )
print(
    "\nShare recovered by patching: one node at a time (absolute values), and all of them at once\n"
)
print(table(["nodes", "number", "mean", "largest", "at once", "mean, under the circuit"], rows))
print(
    f"\nPatching all {len(outside):,} outside nodes at once recovers {patched(outside, alone):.1%}."
)
