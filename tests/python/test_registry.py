"""The Python classes against the registry: one text, checked where it stands twice."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import roptim
from roptim.__main__ import state_bytes, state_names
from roptim._groups import OPTIONS
from roptim.optimizer import REGISTRY

EXTRAS = set(OPTIONS)
SWITCHES = {"foreach", "fused", "capturable", "differentiable"}
# torch's order of positional arguments.
POSITIONAL = {
    "SGD": ["lr", "momentum", "dampening", "weight_decay", "nesterov"],
    "Adam": ["lr", "betas", "eps", "weight_decay", "amsgrad"],
    "AdamW": ["lr", "betas", "eps", "weight_decay", "amsgrad"],
    "Adadelta": ["lr", "rho", "eps", "weight_decay", "foreach"],
    "Adafactor": ["lr", "beta2_decay", "eps", "d", "weight_decay"],
    "Adagrad": ["lr", "lr_decay", "weight_decay", "initial_accumulator_value", "eps", "foreach"],
    "ASGD": ["lr", "lambd", "alpha", "t0", "weight_decay", "foreach", "maximize", "differentiable", "capturable"],
    "ConjugateGradient": ["lr", "max_iter", "max_eval", "tolerance_grad", "tolerance_change", "restart"],
    "LBFGS": [
        "lr",
        "max_iter",
        "max_eval",
        "tolerance_grad",
        "tolerance_change",
        "history_size",
        "line_search_fn",
    ],
    "Muon": ["lr", "weight_decay", "momentum", "nesterov", "ns_coefficients", "eps", "ns_steps", "adjust_lr_fn"],
    "NAdam": ["lr", "betas", "eps", "weight_decay", "momentum_decay", "decoupled_weight_decay"],
    "RMSprop": [
        "lr",
        "alpha",
        "eps",
        "weight_decay",
        "momentum",
        "centered",
        "capturable",
        "foreach",
        "maximize",
        "differentiable",
    ],
    "Rprop": ["lr", "etas", "step_sizes"],
    "SparseAdam": ["lr", "betas", "eps", "maximize"],
    "Adamax": ["lr", "betas", "eps", "weight_decay", "foreach"],
    "RAdam": ["lr", "betas", "eps", "weight_decay", "decoupled_weight_decay"],
}


def test_signature_is_torchs_with_the_registrys_defaults(optimizer_class: Any) -> None:
    entry = REGISTRY[optimizer_class.__name__]
    parameters = dict(inspect.signature(optimizer_class).parameters)
    del parameters["params"]
    positional = [n for n, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == POSITIONAL[optimizer_class.__name__]
    settable = set(entry["defaults"]) - set(entry["fixed"])
    assert set(parameters) - EXTRAS - SWITCHES == settable
    for name in settable:
        assert parameters[name].default == entry["defaults"][name], name


def test_defaults_and_group_keys_are_complete(optimizer_class: Any) -> None:
    opt = optimizer_class([np.zeros((2, 2), np.float32)])
    assert set(opt.defaults) == set(REGISTRY[optimizer_class.__name__]["defaults"])
    assert set(opt.param_groups[0]) == {"params", *opt.defaults}
    assert not EXTRAS & set(opt.defaults)


def test_the_declared_ranges_are_what_messages_say(optimizer_class: Any) -> None:
    entry = REGISTRY[optimizer_class.__name__]
    for name, default in entry["defaults"].items():
        if name in entry["fixed"]:
            continue
        wrong: Any = float("nan") if type(default) is float else "yes"
        shown = "NaN" if type(default) is float else "'yes'"
        with pytest.raises(roptim.RoptimError) as raised:
            optimizer_class([np.zeros(1, np.float32)], **{name: wrong})
        want = f"{optimizer_class.__name__}: {name} must be {entry['ranges'][name]}, got {shown}"
        assert str(raised.value) == want


def test_docstring_names_every_argument_and_slot(optimizer_class: Any) -> None:
    entry = REGISTRY[optimizer_class.__name__]
    doc = optimizer_class.__doc__
    for name in inspect.signature(optimizer_class).parameters:
        assert name in doc, name
    for slot in entry["slots"] + entry["scalars"] + entry["joint"]:
        assert slot in doc, slot
    assert "{common}" not in doc


def test_every_optimizer_is_exported() -> None:
    for name in REGISTRY:
        assert name in roptim.__all__
        assert issubclass(getattr(roptim, name), roptim.Optimizer)


def test_command_line_lists_every_optimizer() -> None:
    done = subprocess.run([sys.executable, "-m", "roptim", "list"], capture_output=True, text=True, check=True)
    for name, entry in REGISTRY.items():
        line = next(line for line in done.stdout.splitlines() if line.startswith(name + " "))
        assert entry["paper"] in line
        assert ", ".join(entry["backends"]) in line
        assert f" {state_bytes(name):.3g} " in line


def test_the_readmes_table_is_the_registry() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    table = readme.split("<!-- registry", 1)[1].split("<!-- end of registry", 1)[0]
    rows = [
        tuple(cell.strip() for cell in line.strip("|").split("|")) for line in table.splitlines() if line[:1] == "|"
    ]
    want = [
        (
            name,
            ", ".join(entry["backends"]),
            f"{state_bytes(name):.3g}",
            state_names(entry),
            entry["paper"],
        )
        for name, entry in REGISTRY.items()
    ]
    assert rows[2:] == want
