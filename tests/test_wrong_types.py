"""Every function that a room hands out, called with a wrong value for each of its arguments.

It works, or it raises an error of the package. No other exception reaches the user.
"""

import builtins
import contextlib
import copy
import dataclasses
import importlib
import inspect
import itertools
import json
import types

import numpy as np
import pytest
import torch

from micro import MICRO_TASK, QUICK_SETTINGS, micro_circuit, micro_corpus, micro_data, micro_model
from tl_sparse import arguments
from tl_sparse.attacks.attacking import attack
from tl_sparse.certificates import certifying
from tl_sparse.circuits.attribution import attribution_graph
from tl_sparse.circuits.nodes import Edge
from tl_sparse.data.tokenizer import train_tokenizer
from tl_sparse.errors import ArgumentError, DataError, TaskError, TLSparseError
from tl_sparse.evaluation.judge import evaluate, full_evaluation
from tl_sparse.files import write_json
from tl_sparse.hooks.ablation import ablating
from tl_sparse.hooks.gates import NodeGates
from tl_sparse.hooks.means import mean_activations
from tl_sparse.hooks.points import recording
from tl_sparse.pruning.config import PruneConfig
from tl_sparse.pruning.pruner import prune
from tl_sparse.tasks.pairs import Pair
from tl_sparse.tasks.scores import Score

pytestmark = pytest.mark.any_line

ROOMS = [
    "hooks",
    "tasks",
    "circuits",
    "evaluation",
    "programs",
    "attacks",
    "pruning",
    "explanations",
    "certificates",
    "view",
]
WRONG = {
    "text": "no such thing",
    "empty text": "",
    "number": 3.5,
    "negative": -1,
    "object": object(),
    "list": [None],
    "empty list": [],
    "mapping": {"no": None},
    "empty mapping": {},
    "tensor": torch.full((2, 3), torch.nan),
    "empty tensor": torch.zeros(0),
    "None": None,
}


def functions():
    found = []
    for room in ROOMS:
        module = importlib.import_module(f"tl_sparse.{room}")
        for name in module.__all__:
            value = getattr(module, name)
            if isinstance(value, types.FunctionType):
                found.append(pytest.param(value, id=f"{room}.{name}"))
    return found


@pytest.fixture(scope="module")
def right():
    """The name of an argument → a value with which every function that has it works."""
    model = micro_model()
    circuit = micro_circuit(model)
    scores = {name: circuit.means[name] for name in circuit.kept}
    config = PruneConfig(**(QUICK_SETTINGS | {"steps": 3, "train_pairs": 8}))
    measured = {"config": config.to_json()}
    circuit = dataclasses.replace(circuit, scores=scores, measured=measured)
    data = micro_data(model, n_pairs=2)
    attacked = attack(circuit, model, MICRO_TASK, n_prompts=0, n_test=2, progress=False)
    name = "blocks.0.hook_mlp_out"
    return {
        "model": model,
        "circuit": circuit,
        "data": data,
        "selection": data,
        "heldout": data,
        "task": MICRO_TASK,
        "name": MICRO_TASK.name,
        "corpus": micro_corpus(),
        "tokens": micro_corpus(),
        "batches": [micro_corpus()],
        "mask": torch.ones_like(micro_corpus()),
        "masks": None,
        "config": config,
        "means": circuit.means,
        "progress": False,
        "names": [name],
        "functions": {name: lambda activation, hook: None},
        "nodes": {name: torch.ones(4, dtype=torch.bool)},
        "values": {name: torch.zeros(4)},
        "openings": {name: torch.ones(4)},
        "fractions": {name: 0.5},
        "x": torch.ones(2, 4),
        "k": 2,
        "target": 0.5,
        "start": 1,
        "stop": 3,
        "n_pairs": 4,
        "seed": 0,
        "n_ctx": 8,
        "n_found": 3,
        "n_wanted": 4,
        "n_excluded": 0,
        "pairs": [Pair("A end", "B end", " yes", " no")],
        "parts": [data],
        "source": "",
        "prompts": [],
        "text": "A end",
        "what": "a text",
        "tokenizer": model.tokenizer,
        "logits": torch.zeros(4, 8, model.cfg.d_vocab),
        "correct": data.correct,
        "last": data.last,
        "n_chars": 100,
        "score": Score(1.0, 0.1, 0.5),
        "scores": {"micro": Score(1.0, 0.1, 0.5)},
        "header": ["a", "b"],
        "rows": [["1", "2"]],
        "layer": 0,
        "node": circuit.nodes[0],
        "edges": [Edge(circuit.nodes[0], circuit.nodes[1], 0.5)],
        "location": "attn_v",
        "index": 0,
        "path": "circuit.csv",
        "batch_size": 256,
        "ablation": "mean",
        "objective": "candidates",
        "frozen": False,
        "kind": "channels",
        "why": "a program computes each node as a number",
        "subset": circuit.dropped,
        "scales": {"ln_final.hook_scale": torch.ones(1, 1, 1)},
        "train": data,
        "steps": 2,
        "restarts": 1,
        "n_subsets": 2,
        "n_circuits": 2,
        "pairs_per_batch": 1,
        "half_octaves": [0, 1],
        "evaluation": evaluate(circuit, model, data),
        "measured": full_evaluation(circuit, model, data),
        "circuits": {"micro": circuit},
        "first": ["0.attn_in 0"],
        "second": ["0.attn_in 0"],
        "tasks": [MICRO_TASK],
        "n_random": 2,
        "n_random_pairs": 2,
        "n_permutations": 20,
        "max_parts": 2,
        "n_candidates": 2,
        "certificate": micro_certificate(model, circuit),
        "explanation": circuit.explain(model, MICRO_TASK, corpus=micro_corpus(), progress=False),
        "own": {},
        "n_seeds": 0,
        "n_samples": 0,
        "n_draws": 1,
        "attack": attacked,
        "found": attacked.prediction,
        "family": attacked.grammar[0],
        "n_prompts": 0,
        "n_test": 2,
        "n_statements": 2,
        "graph": circuit.to_eap(model),
        "intervention": "patching",
        "method": "eap",
        "level": "edge",
        "hook_point": model.hook_dict[name],
        "made_by": [model.blocks[0].mlp],
        "modules": [model.blocks[0].mlp],
        "weight": model.W_E,
        "weights": [model.W_E, model.W_U],
        "whole": model.W_E,
    }


#: Arguments of some functions that differ from those of the same name of others.
OTHERWISE = {
    "certify": {"family": None},  # the other kind of family is one of prompts
    "explain_circuit": {"names": {}},
    "compile_circuit": {"tokens": [1, 2]},
    "check_onnx": {"path": "program.onnx"},
    "check_program": {"folder": "program"},
    "check_python": {"folder": "program"},
    "python_program": {"tokens": [1, 2], "names": {}},
    "right_minus_wrong": {"logits": torch.zeros(4, 2)},
    "task_loss_and_accuracy": {"logits": torch.zeros(4, 2)},
    "residual_joins": {"nodes": []},
    "circuit_of": {"names": ["0.attn_in 0"]},
    "removal_rises": {"parts": []},
    "mean_of_pairs": {"values": torch.ones(4)},
    "read_pairs": {"path": "pairs.jsonl"},
    "read_certificate": {"path": "certificate.json"},
    "score_next_tokens": {"logits": torch.zeros(4, 36), "full_logits": torch.zeros(4, 36)},
    "task_ends": {"nodes": []},
    "correlation_of_changes": {
        "first": [1.0, 2.0, 3.0],
        "second": [1.0, 2.0, 4.0],
        "places": ("here", "there"),
    },
    "from_other_of_pair": {"activation": torch.zeros(4, 6, 2)},
    "mean_of": {"values": torch.ones(3)},
    "ratio_of_pairs": {"numerators": torch.ones(4), "denominators": torch.ones(4)},
    "to_prune_scores": {"path": "scores.pt"},
    "from_prune_scores": {
        "source": {
            "blocks.0.hook_q_input": torch.ones(1, 1),
            "blocks.0.hook_k_input": torch.ones(1, 1),
            "blocks.0.hook_v_input": torch.ones(1, 1),
            "blocks.0.hook_mlp_in": torch.ones(2),
            "blocks.0.hook_resid_post": torch.ones(3),
        }
    },
    "unembedding": {"channel": 2},
    "get_task": {"name": "single_double_quote"},
    "held_out_contexts": {"task": "single_double_quote"},
    "whole_pairs": {"task": "single_double_quote", "kind": None},
    "whole_statements": {"task": "single_double_quote"},
    "context_tells_sides": {"task": "single_double_quote"},
    "nonsense_task": {
        "task": "single_double_quote",
        "tokenizer": train_tokenizer(["print('a')"], 262, required=[" in", ":"]),
    },
    "read_results": {"values": {"models": {}, "geometric_mean_edges": {"node_pruned": {}}}},
    "summary": {
        "summaries": {"nodes": {"median": 3.0}},
        "figure": "nodes",
        "statistic": "median",
        "place": "a suite",
    },
}


def micro_certificate(model, circuit):
    """A certificate in which nothing is measured."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(certifying, "SECTIONS", ())
        return certifying.certify(circuit, model, MICRO_TASK, corpus=micro_corpus())


def call(function, arguments):
    """Call a function, enter the context it returns, and take what it yields."""
    result = function(**arguments)
    if isinstance(result, contextlib.AbstractContextManager):
        with result:
            pass
    elif inspect.isgenerator(result):
        list(itertools.islice(result, 100))


@pytest.mark.parametrize("function", functions())
def test_wrong_values_of_each_argument(function, right, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = {"prompts": ["A end", "B end"], "answers": [" yes", " no"]}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(line))
    write_json(tmp_path / "certificate.json", dataclasses.asdict(right["certificate"]))
    monkeypatch.setattr(certifying, "SECTIONS", ())  # only the arguments matter here
    parameters = inspect.signature(function).parameters
    arguments = {}
    for name, parameter in parameters.items():
        known = right | OTHERWISE.get(function.__name__, {})
        if name in known:
            arguments[name] = known[name]
        else:
            assert parameter.default is not inspect.Parameter.empty, f"no right value for {name}"
    call(function, arguments)
    for name, parameter in parameters.items():
        for kind, wrong in WRONG.items():
            # An empty configuration is the default one, with which pruning takes long.
            if wrong is parameter.default or (name == "config" and wrong == {}):
                continue
            try:
                with contextlib.suppress(TLSparseError):
                    call(function, arguments | {name: copy.copy(wrong)})
            except Exception as error:
                pytest.fail(f"{name} = {kind}: {type(error).__name__}: {error}")


def test_the_message_names_function_argument_and_type():
    with pytest.raises(
        ArgumentError,
        match="evaluate: model must be a TransformerLens model, not the str 'micro'; "
        r"tl_sparse.load\(…\) opens one",
    ):
        evaluate(micro_circuit(micro_model()), "micro", micro_data(micro_model()))
    with pytest.raises(ArgumentError, match=r"evaluate: data must be a TaskData, not the int 3"):
        evaluate(micro_circuit(micro_model()), micro_model(), 3)
    with pytest.raises(
        ArgumentError, match=r"circuit must be a Circuit, not the str 'c'; Circuit.load\(…\) reads"
    ):
        evaluate("c", micro_model(), micro_data(micro_model()))
    with pytest.raises(ArgumentError, match=r"view: min_weight must be float, not the str 'x'"):
        micro_circuit(micro_model()).view(micro_model(), min_weight="x")


MASK = torch.ones(4, dtype=torch.bool)
VALUES = torch.zeros(4)
OUT, RESID = "blocks.0.hook_mlp_out", "blocks.0.hook_attn_out"
PLACE = r"\['blocks.0.hook_mlp_out'\] must be "


@pytest.mark.parametrize(
    ("mask", "values", "message"),
    [
        (MASK.float(), VALUES, rf"nodes{PLACE}a boolean tensor \[\*node\], not torch.float32 of"),
        (MASK.int(), VALUES, rf"nodes{PLACE}a boolean tensor \[\*node\], not torch.int32 of"),
        (MASK.numpy(), VALUES, rf"nodes{PLACE}a boolean tensor .* not a numpy.ndarray, bool of"),
        ([True] * 4, VALUES, rf"nodes{PLACE}a boolean tensor .* not the list \[True"),
        (MASK, VALUES.int(), rf"values{PLACE}a float tensor \[\*node\].*not torch.int32 of"),
        (MASK, VALUES.to(torch.complex64), rf"values{PLACE}.*not torch.complex64 of"),
        (MASK, np.zeros(4), rf"values{PLACE}.*not a numpy.ndarray, float64 of"),
        (MASK, VALUES * torch.nan, "the values at blocks.0.hook_mlp_out .* some are NaN"),
    ],
)
def test_the_message_names_the_wrong_entry_of_a_mapping(mask, values, message):
    nodes = {RESID: MASK, OUT: mask}
    held_at = {RESID: VALUES, OUT: values}
    with (
        pytest.raises(ArgumentError, match=message) as raised,
        ablating(micro_model(), nodes, held_at),
    ):
        pass
    assert "jax" not in str(raised.value)


def test_gates_refuse_means_that_are_no_numbers():
    settings = {"init_bias": 0.0, "init_scale": 0.1, "seed": 0}
    with pytest.raises(ArgumentError, match=rf"NodeGates: means{PLACE}a float tensor .*int64 of"):
        NodeGates({OUT: torch.ones(4).long()}, **settings)
    with pytest.raises(ArgumentError, match="some are NaN"):
        NodeGates({OUT: VALUES / 0}, **settings)


def test_a_text_is_no_list_of_names():
    message = "names must be a list of names, not the text 'blocks.0.hook_mlp_out'"
    with pytest.raises(ArgumentError, match=f"mean_activations: {message}"):
        mean_activations(micro_model(), OUT, [micro_corpus()])
    with pytest.raises(ArgumentError, match=f"recording: {message}"), recording(micro_model(), OUT):
        pass


def test_texts_and_settings_are_no_tokens():
    with pytest.raises(
        DataError, match=r"tokens .* these are texts; model\.to_tokens\(text\) makes"
    ):
        mean_activations(micro_model(), [OUT], ["A end"])
    with pytest.raises(DataError, match=r"the corpus .* these are texts; model\.to_tokens"):
        prune(micro_model(), MICRO_TASK, ["A end"])
    for settings in ({"steps": 3}, PruneConfig()):
        with pytest.raises(ArgumentError, match="looks like settings: pass them as config=…"):
            prune(micro_model(), MICRO_TASK, settings)


def test_a_prompt_is_no_task():
    circuit = micro_circuit(micro_model())
    with pytest.raises(TaskError, match="a task or the name of one, and this looks like a prompt"):
        attribution_graph(circuit, micro_model(), "print('the red house")


def test_after_nnsight_arguments_are_not_checked(monkeypatch):
    """It gives every object a method that cannot be hashed, so that beartype cannot be imported."""
    real_import = builtins.__import__

    def failing(name, *arguments):
        if name.startswith("beartype"):
            raise TypeError("unhashable type: 'instancemethod'")
        return real_import(name, *arguments)

    arguments._type_checker.cache_clear()
    monkeypatch.setattr(builtins, "__import__", failing)
    try:
        assert arguments._type_checker()(3, str)
    finally:
        arguments._type_checker.cache_clear()
