"""A small EAP-style evaluator of circuits of edges, for the tests.

EAP-IG itself is not on the package index; test_eap_ig.py compares the two where it is there. Its
graph: every reader (each head's q, k and v input, each MLP's input, the logits) reads the sum of
what the writers before it (embedding, heads, MLPs) write to the stream.
"""

from functools import partial
from itertools import product

from helpers import ON_3

#: A bigram table has an edge of its own, from the tokens to the logits.
TABLE_EDGE = (("hook_bigram", None), ("logits", None))


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
    """The graph of a model, and its logits with only some of the edges.

    Attributes:
        writers: (hook point, head or None) of each, in the order of the forward pass.
        edges: (writer, reader) of each; readers are named as writers are.
        n_biases: of each reader, how many attention layers, whose biases b_O it reads, are before
            it.
    """

    def __init__(self, model):
        self.model = model
        self.writers = [("hook_embed", None)]
        if "hook_pos_embed" in model.hook_dict:
            self.writers.append(("hook_pos_embed", None))
        self.edges = []
        self.n_biases = {}
        heads = range(model.cfg.n_heads)
        for layer in range(model.cfg.n_layers):
            for letter, head in product("qkv", heads):
                self._add_reader((fork(layer, letter), head), layer)
            self.writers += [(f"blocks.{layer}.attn.hook_result", head) for head in heads]
            self._add_reader((f"blocks.{layer}.hook_mlp_in", None), layer + 1)
            self.writers.append((f"blocks.{layer}.hook_mlp_out", None))
        last = model.cfg.n_layers - 1
        self._add_reader((f"blocks.{last}.hook_resid_post", None), last + 1)
        if model.sparse_cfg.bigram_table:
            self.edges.append(TABLE_EDGE)

    def _add_reader(self, reader, n_biases):
        self.edges += [(writer, reader) for writer in self.writers]
        self.n_biases[reader] = n_biases

    def outputs(self, tokens):
        """Hook point → what its writers write."""
        names = {name for name, _ in self.writers} | {"hook_bigram"}
        return self.model.run_with_cache(tokens, names_filter=lambda name: name in names)[1]

    def _input(self, reader, current_outputs, corrupt_outputs, kept):
        """The sum of what a reader reads."""
        total = sum(block.attn.b_O for block in self.model.blocks[: self.n_biases[reader]])
        for edge in self.edges:
            writer, its_reader = edge
            if its_reader == reader:
                outputs = current_outputs if edge in kept else corrupt_outputs
                total = total + output_of(writer, outputs)
        return total

    def logits(self, clean, corrupt_outputs, kept):
        """The clean run, in which every edge outside `kept` carries the corrupt run's value."""
        current_outputs = {}

        def remember(x, hook):
            current_outputs[hook.name] = x

        def input_of(reader):
            return self._input(reader, current_outputs, corrupt_outputs, kept)

        def replace_input(x, hook, name):
            for reader in self.n_biases:
                reader_name, head = reader
                if reader_name == name and head is None:
                    x = input_of(reader)
                elif reader_name == name:
                    x = x.clone()
                    x[:, :, head] = input_of(reader)
            return x

        def replace_table(x, hook):
            return x if TABLE_EDGE in kept else corrupt_outputs["hook_bigram"]

        hooks = [(name, remember) for name in {name for name, _ in self.writers}]
        for name in {name for name, _ in self.n_biases}:
            hooks.append((name, partial(replace_input, name=name)))
        if self.model.sparse_cfg.bigram_table:
            hooks.append(("hook_bigram", replace_table))
        return self.model.run_with_hooks(clean, fwd_hooks=hooks)


def output_of(writer, outputs):
    name, head = writer
    return outputs[name] if head is None else outputs[name][:, :, head]
