"""A small EAP-style evaluator of circuits of edges, for the tests.

EAP-IG itself is not on the package index. Its graph: every reader (each head's q, k and v input,
each MLP's input, the logits) reads the sum of what the writers before it (embedding, heads, MLPs)
write to the stream.
"""

from functools import partial
from itertools import product

from helpers import ON_3


def with_edge_hooks(model):
    model.set_use_attn_result(True)
    model.set_use_split_qkv_input(True)
    model.set_use_hook_mlp_in(True)
    return model


def fork(layer, letter):
    """The hook point of the heads' own q, k or v input; TransformerLens 4 moved it."""
    module = f"blocks.{layer}" if ON_3 else f"blocks.{layer}.attn"
    return f"{module}.hook_{letter}_input"


class Graph:
    """A small EAP-style evaluator. Writers and readers are named by (hook point, head or None)."""

    def __init__(self, model):
        self.model, cfg = model, model.cfg
        heads = range(cfg.n_heads)
        self.embed = [("hook_embed", None)] + [("hook_pos_embed", None)] * (
            "hook_pos_embed" in model.hook_dict
        )
        self.writers, self.edges = list(self.embed), []
        # reader: how many attention layers, whose biases b_O it reads, are before it
        self.n_biases = {}
        for layer in range(cfg.n_layers):
            for letter, head in product("qkv", heads):
                self._add_reader((fork(layer, letter), head), layer)
            self.writers += [(f"blocks.{layer}.attn.hook_result", head) for head in heads]
            self._add_reader((f"blocks.{layer}.hook_mlp_in", None), layer + 1)
            self.writers.append((f"blocks.{layer}.hook_mlp_out", None))
        self._add_reader((f"blocks.{cfg.n_layers - 1}.hook_resid_post", None), cfg.n_layers)
        if model.sparse_cfg.bigram_table:  # an edge of its own, from the tokens to the logits
            self.edges.append((("hook_bigram", None), ("logits", None)))

    def _add_reader(self, reader, n_biases):
        self.edges += [(writer, reader) for writer in self.writers]
        self.n_biases[reader] = n_biases

    def outputs(self, tokens):
        names = {name for name, _ in self.writers} | {"hook_bigram"}
        return self.model.run_with_cache(tokens, names_filter=lambda name: name in names)[1]

    def logits(self, clean, corrupt_outputs, kept):
        """The clean run, in which every edge outside `kept` carries the corrupt run's value."""
        current, hooks = {}, []
        writers_of = {reader: [w for w, r in self.edges if r == reader] for reader in self.n_biases}

        def remember(x, hook):
            current[hook.name] = x

        def value(writer, reader):
            name, head = writer
            x = (current if (writer, reader) in kept else corrupt_outputs)[name]
            return x if head is None else x[:, :, head]

        def replace_input(x, hook, name):
            for reader in (reader for reader in self.n_biases if reader[0] == name):
                bias = sum(block.attn.b_O for block in self.model.blocks[: self.n_biases[reader]])
                total = sum(value(writer, reader) for writer in writers_of[reader]) + bias
                if reader[1] is None:
                    x = total
                else:
                    x = x.clone()
                    x[:, :, reader[1]] = total
            return x

        def replace_table(x, hook):
            return (
                x
                if (("hook_bigram", None), ("logits", None)) in kept
                else corrupt_outputs["hook_bigram"]
            )

        hooks += [(name, remember) for name in {name for name, _ in self.writers}]
        hooks += [
            (name, partial(replace_input, name=name))
            for name in {name for name, _ in self.n_biases}
        ]
        if self.model.sparse_cfg.bigram_table:
            hooks.append(("hook_bigram", replace_table))
        return self.model.run_with_hooks(clean, fwd_hooks=hooks)
