"""Hashes of what measurements belong to: the exact weights of a model, tensors, and circuits."""

import hashlib
import json

import torch
from torch import Tensor

from tl_sparse.arguments import checked
from tl_sparse.circuits.fingerprints import fingerprint
from tl_sparse.circuits.parts import CircuitParts
from tl_sparse.hooks import TLModel, is_sparse_model


@checked()
def hash_of_model(model: TLModel) -> str:
    """The hash of a model's architecture, all its weights, and the vocabulary of its tokenizer.

    A circuit accepts its model up to rounding. This hash tells apart any two different weights.
    """
    digest = hashlib.sha256()
    digest.update(fingerprint(model).architecture.encode())
    named = model.network.weights() if is_sparse_model(model) else model.named_parameters()
    for parameter, values in named:
        digest.update(parameter.encode())
        digest.update(_bytes(values))
    if model.tokenizer is not None:
        vocabulary = json.dumps(model.tokenizer.get_vocab(), sort_keys=True)
        digest.update(vocabulary.encode())
    return digest.hexdigest()


@checked()
def hash_of_tensor(x: Tensor) -> str:
    """The hash of the entries of a tensor."""
    return hashlib.sha256(_bytes(x)).hexdigest()


@checked()
def hash_of_circuit(circuit: CircuitParts) -> str:
    """The hash of what a run under a circuit depends on: nodes, edges, means, and frozen norms."""
    edges = None
    if circuit.edge_set is not None:
        edges = sorted(f"{source} {target}" for source, target in circuit.edge_set)
    # The means are in one order, since files do not keep the one that a circuit has.
    without_nodes = sorted(circuit.means.keys() - circuit.kept.keys())
    means = {}
    for name in (*circuit.kept, *without_nodes):
        if name in circuit.means:
            means[name] = hash_of_tensor(circuit.means[name])
    described = {
        "kept": {name: hash_of_tensor(mask) for name, mask in circuit.kept.items()},
        "means": means,
        "edges": edges,
        "frozen_norms": circuit.frozen_norms,
    }
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def _bytes(values: Tensor) -> bytes:
    flat = values.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()
