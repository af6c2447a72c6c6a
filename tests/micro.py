"""A model small enough to work out on paper, and its task.

One layer, one head, four residual channels. The token A embeds to +1 in channel 0, B to -1; `end`
embeds to 1 in channel 1; fillers and the first token to nothing. RMSNorm turns ±1 in one of four
channels into ±2. Queries and keys are zero, so attention is uniform. One value channel reads
channel 0 with weight W_V, and W_O writes it to channel 2, which the unembedding turns into the
logits of the answers.

After `<s> f f A f end` the last position has (0, 1, a, 0) with a = 2 · W_V · W_O / 6 (after B: -a),
which the final RMSNorm divides by sqrt((1 + a²) / 4), so logit(yes) - logit(no) = 2 · W_U · a /
that.
"""

import json
import math
import random
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

import tl_sparse
from helpers import circuit_means, node_means, stock_model, word_tokenizer
from tl_sparse.checkpoints.corpus_sample import CORPUS_SAMPLE
from tl_sparse.circuits.circuit import Circuit
from tl_sparse.circuits.families import node_hooks
from tl_sparse.circuits.fingerprints import fingerprint
from tl_sparse.files import write_tensors
from tl_sparse.tasks.task import Task
from tl_sparse.tasks.task_data import make_task_data

W_V, W_O, W_U = 1.5, 2.0, 3.0
WRITTEN = 2 * W_V * W_O / 6
#: Task loss of the model, and of its circuit: softplus of minus the logit difference.
LOSS = math.log1p(math.exp(-2 * W_U * WRITTEN / math.sqrt((1 + WRITTEN**2) / 4)))
#: A pruning of seconds that finds the circuit.
QUICK_SETTINGS = {
    "target_loss": 2 * LOSS,
    "steps": 30,
    "train_pairs": 32,
    "selection_pairs": 8,
    "heldout_pairs": 8,
}
FILLERS = [f"f{i}" for i in range(30)]
VOCABULARY = {token: i for i, token in enumerate(["<s>", "A", "B", "end", "yes", "no", *FILLERS])}

#: What the circuit is: node and edge for node and edge.
NODES = ["0.attn_in 0", "0.attn_v h0.0", "0.attn_out 2"]
EDGES = [("0.attn_in 0", "0.attn_v h0.0", W_V), ("0.attn_v h0.0", "0.attn_out 2", W_O)]
#: The names of its nodes in files.
INDEXED_NODES = ["0.attn_in.0", "0.attn_v.0", "0.attn_out.2"]


def micro_tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer(list(VOCABULARY), bos_token="<s>", eos_token="<s>", pad_token="<s>")


def micro_model(tokenizer=None):
    config = tl_sparse.SparseConfig(
        n_layers=1,
        d_model=4,
        n_heads=1,
        d_head=2,
        d_mlp=2,
        d_vocab=len(VOCABULARY),
        n_ctx=8,
        act_fn="relu",
    )
    model = tl_sparse.create(config, seed=0, tokenizer=tokenizer or micro_tokenizer(), device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        block = model.blocks[0]
        for norm in (block.ln1, block.ln2, model.ln_final):
            norm.w.fill_(1.0)
        model.embed.W_E[VOCABULARY["A"], 0] = 1.0
        model.embed.W_E[VOCABULARY["B"], 0] = -1.0
        model.embed.W_E[VOCABULARY["end"], 1] = 1.0
        block.attn.W_V[0, 0, 0] = W_V
        block.attn.W_O[0, 0, 2] = W_O
        model.unembed.W_U[2, VOCABULARY["yes"]] = W_U
        model.unembed.W_U[2, VOCABULARY["no"]] = -W_U
    return model


def wide_head_model(write_weights, n_ctx=8):
    """The micro model with a value channel for each of these weights of W_O, all with W_V."""
    tokenizer = micro_tokenizer()
    config = tl_sparse.SparseConfig(
        n_layers=1,
        d_model=4,
        n_heads=1,
        d_head=len(write_weights),
        d_mlp=2,
        d_vocab=len(VOCABULARY),
        n_ctx=n_ctx,
        act_fn="relu",
    )
    model = tl_sparse.create(config, seed=0, tokenizer=tokenizer, device="cpu")
    original = micro_model(tokenizer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for name in ("embed.W_E", "unembed.W_U", "ln_final.w", "blocks.0.ln1.w", "blocks.0.ln2.w"):
            model.get_parameter(name).copy_(original.get_parameter(name))
        block = model.blocks[0]
        block.attn.W_V[0, 0] = W_V
        block.attn.W_O[0, :, 2] = torch.tensor(write_weights)
    return model


#: By how much `diluting_model` prefers "no" where it sees neither letter.
AGAINST_YES = 3.0


def diluting_model(write_weights=(W_O,), n_ctx=40):
    """The model with a bias against "yes", so that after A it is right in short prompts only.

    Before the final norm divides it, logit(yes) - logit(no) is 2 W_U a - 3 after A, where a = 2 W_V
    W_O / n and n is the number of tokens: 36 / n - 3, so that from 12 tokens on the answer is "no".
    After B it is always "no".
    """
    model = wide_head_model(write_weights, n_ctx)
    with torch.no_grad():
        model.unembed.W_U[1, VOCABULARY["no"]] = AGAINST_YES
    return model


def cancelling_model():
    """The answer is carried by three value channels of weights 1, 3 and -3, of which two cancel.

    A circuit of the first or the second channel alone is as sure of the answer as the model, or
    surer. It is wrong, or knows nothing, when the third is as it is in the model. The first two
    together are right whatever is held: their weights add up to 4, or to 1 with the third.
    """
    return wide_head_model([W_O, 3 * W_O, -3 * W_O])


def _sample(rng: random.Random) -> tuple[str, str]:
    before, between, after = [rng.choice(FILLERS) for _ in range(3)]
    return f"{before} {between} A {after} end", f"{before} {between} B {after} end"


MICRO_TASK = Task("micro", "was it A or B?", (" yes", " no"), _sample)


def micro_corpus() -> torch.Tensor:
    """Rows in which A and B stand equally often, so that the means of the circuit's nodes are 0."""
    start, end = VOCABULARY["<s>"], VOCABULARY["end"]
    first_filler = VOCABULARY["f0"]
    rows = []
    for i in range(20):
        fillers = range(first_filler + i, first_filler + i + 3)
        for letter in (VOCABULARY["A"], VOCABULARY["B"]):
            rows.append([start, fillers[0], fillers[1], letter, fillers[2], end])
    return torch.tensor(rows)


def micro_data(micro, n_pairs=8):
    return make_task_data(MICRO_TASK, micro.tokenizer, n_pairs, seed=0)


def micro_circuit(micro) -> Circuit:
    means = circuit_means(micro, micro_corpus())
    kept = {}
    for name in node_hooks(micro).values():
        kept[name] = torch.zeros_like(means[name], dtype=torch.bool)
    kept["blocks.0.ln1.hook_read"][0] = True
    kept["blocks.0.attn.hook_v"][0, 0] = True
    kept["blocks.0.hook_attn_out"][2] = True
    return Circuit(kept, means, fingerprint(micro), "micro", "micro")


def triples(edges) -> list[tuple[str, str, float]]:
    """Edges as EDGES has them."""
    return [(str(edge.source), str(edge.target), edge.weight) for edge in edges]


def save_micro(folder: Path) -> str:
    """A folder with the model and a sample of its corpus."""
    micro_model().save_pretrained(folder)
    write_tensors(folder / CORPUS_SAMPLE, {"tokens": micro_corpus()})
    return str(folder)


def save_pairs(path: Path, answers: tuple[str, str] = (" yes", " no"), n_pairs: int = 128) -> str:
    """Pairs of the task as a file; with swapped answers it is one that the model does not solve."""
    rng = random.Random(0)
    pairs = {}  # as keys: each pair once, in their order
    while len(pairs) < n_pairs:
        pairs[MICRO_TASK.sample(rng)] = None
    lines = [json.dumps({"prompts": pair, "answers": answers}) for pair in pairs]
    path.write_text("\n".join(lines))
    return str(path)


def large(n_layers, width, keep=1.0):
    """A circuit of random nodes, a fraction `keep`, of a model with the micro task's tokens."""
    config = tl_sparse.SparseConfig(
        n_layers=n_layers,
        d_model=width,
        n_heads=4,
        d_head=width // 4,
        d_mlp=width,
        d_vocab=len(VOCABULARY),
        n_ctx=8,
        abs_topk=tl_sparse.paper_topk(0.5),
        attn_sinks=True,
        bigram_table=True,
        positions="concatenated",
        d_pos=2,
    )
    model = tl_sparse.create(config, seed=0, tokenizer=micro_tokenizer(), device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("blocks.") and "W_" in name:
                parameter *= torch.rand(parameter.shape, generator=generator) < 0.8
    means = node_means(model, micro_corpus())
    kept = {
        name: torch.rand(mean.shape, generator=generator) < keep for name, mean in means.items()
    }
    return Circuit(kept, means, fingerprint(model), "large", "micro"), model


# --- a model in which two components do the task, of this package or dense

#: What its component circuit is. Head 1 carries the letter from its position, and the second MLP
#: turns it into the answer. All other components write channels that nothing reads.
COMPONENTS = ("0.head 1", "1.mlp")


def component_model(make):
    """A model of two layers and two heads, with ReLU and RMSNorm, in which these components do the
    task.

    Args:
        make: makes a model of these sizes: `helpers.tiny_model` or `helpers.stock_model`.
    """
    sizes = dict(n_layers=2, d_model=6, n_heads=2, d_head=3, d_mlp=4, d_vocab=len(VOCABULARY))
    normalization = "normalization_type" if make is stock_model else "normalization"
    norm = "RMS" if make is stock_model else "rms"
    model = make(**sizes, n_ctx=8, act_fn="relu", **{normalization: norm})
    model.tokenizer = micro_tokenizer()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "ln" in name else 0.0)
        model.embed.W_E[VOCABULARY["A"], 0] = 1.0
        model.embed.W_E[VOCABULARY["B"], 0] = -1.0
        model.embed.W_E[VOCABULARY["end"], 1] = 1.0
        first, second = model.blocks
        first.attn.W_V[1, 0, 0] = W_V
        first.attn.W_O[1, 0, 2] = W_O
        for block in (first, second):
            block.attn.W_V[0, 1, 0] = 1.0
            block.attn.W_O[0, 0, 5] = 1.0
        first.mlp.W_in[1, 0] = 1.0
        first.mlp.W_out[0, 3] = 1.0
        second.mlp.W_in[2, 0] = 1.0
        second.mlp.W_in[2, 1] = -1.0
        second.mlp.W_out[0, 4] = 2.0
        second.mlp.W_out[1, 4] = -2.0
        model.unembed.W_U[4, VOCABULARY["yes"]] = W_U
        model.unembed.W_U[4, VOCABULARY["no"]] = -W_U
    return model
