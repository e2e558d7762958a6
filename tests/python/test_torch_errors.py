"""What torch's own tests expect to fail, and what roptim does with each of it.

A row is one optimizer and what its constructor is given. SAME: refused by the same built-in class as in torch.
DIFFERENT: roptim differs on purpose; the row says what it does instead, and why. Everything is refused at
construction, what torch refuses at the first step too.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

import roptim
from roptim import Parameter
from roptim.optimizer import REGISTRY

NAMES = ["Adadelta", "Adafactor", "Adagrad", "Adam", "Adamax", "AdamW", "ASGD", "LBFGS", "Muon"]
NAMES += ["NAdam", "RAdam", "RMSprop", "Rprop", "SGD", "SparseAdam"]

Params = Callable[[Any, Any], Any]


@dataclass(frozen=True)
class Row:
    """What one optimizer is given."""

    optimizer: str
    what: str
    torch: type[Exception]  # what torch raises, or warns of
    params: Params  # made from two parameters of shape (1, 1)
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    message: str = ""  # regular expression for what follows "optimizer: "; empty if roptim takes it

    def __str__(self) -> str:
        return f"{self.optimizer}: {self.what}"

    def construct(self, p: Any, q: Any) -> Any:
        return getattr(roptim, self.optimizer)(self.params(p, q), **self.kwargs)


@dataclass(frozen=True)
class Difference(Row):
    """A row with what roptim does instead."""

    raises: type[Exception] | None = None
    takes: Mapping[str, Any] = field(default_factory=dict)  # what the group holds if nothing is raised
    why: str = ""


class Coo:
    """Another library's sparse array."""

    shape, dtype = (3,), np.dtype(np.float32)


def hyper(optimizer: str, name: str, allowed: str, got: Any, /, **kwargs: Any) -> Row:
    """A hyperparameter out of range: refused before parameters are looked at, so there are none."""
    message = f"{re.escape(name)} must be .*{re.escape(allowed)}.*, got {re.escape(str(got))}"
    return Row(optimizer, f"{name}={got}", ValueError, lambda p, q: None, kwargs, message)


def same_in_all(optimizer: str) -> Iterable[Row]:
    yield Row(
        optimizer,
        "one parameter in two groups",
        ValueError,
        lambda p, q: [{"params": p}, {"params": p}],
        message=r"parameter 1 must be memory of its own, got the array of parameter 0",
    )
    yield Row(
        optimizer,
        "names for some parameters of a list",
        ValueError,
        lambda p, q: [("weight", p), q],
        message=".+ must be .*name",
    )
    yield Row(
        optimizer,
        "names for some groups",
        ValueError,
        lambda p, q: [{"params": [p], "lr": 1e-2}, {"params": [("weight", q)]}],
        message="parameters of all groups must be without names .*, got named",
    )


SAME: list[Row] = [
    *(row for name in NAMES for row in same_in_all(name)),
    hyper("Adadelta", "rho", "[0, 1]", 1.1, lr=1e-2, rho=1.1),
    hyper("Adafactor", "eps[0]", ">= 0", "-1e-30", eps=(-1e-30, 1e-3)),
    hyper("Adafactor", "d", ">= 1", 0.0, d=0.0),
    hyper("Adafactor", "beta2_decay", "<= 0", 0.8, beta2_decay=0.8),
    hyper("Adagrad", "lr_decay", ">= 0", -0.5, lr=1e-2, lr_decay=-0.5),
    hyper("Adam", "betas[0]", "[0, 1)", 1.0, lr=1e-2, betas=(1.0, 0.0)),
    hyper("Adam", "weight_decay", ">= 0", -1.0, lr=1e-2, weight_decay=-1),
    hyper("AdamW", "betas[0]", "[0, 1)", 1.0, lr=1e-2, betas=(1.0, 0.0)),
    hyper("AdamW", "weight_decay", ">= 0", -1.0, lr=1e-2, weight_decay=-1),
    hyper("Adamax", "betas[1]", "[0, 1)", 1.0, lr=1e-2, betas=(0.0, 1.0)),
    hyper("ASGD", "weight_decay", ">= 0", -0.5, lr=1e-2, weight_decay=-0.5),
    Row(
        "Muon",
        "three axes",
        ValueError,
        lambda p, q: [np.ones((2, 3, 4), np.float32)],
        message=r"parameter 0 must be of two axes, got 3 in shape \(2, 3, 4\); give vectors",
    ),
    Row(
        "Muon",
        "adjust_lr_fn=arbitrary",
        ValueError,
        lambda p, q: [p],
        {"adjust_lr_fn": "arbitrary"},
        "adjust_lr_fn must be .*original.*match_rms_adamw.*, got .?arbitrary",
    ),
    hyper("NAdam", "betas[0]", "[0, 1)", 1.0, lr=1e-2, betas=(1.0, 0.0)),
    hyper("NAdam", "momentum_decay", ">= 0", -0.2, lr=1e-2, momentum_decay=-0.2),
    hyper("RAdam", "betas[0]", "[0, 1)", 1.0, lr=1e-2, betas=(1.0, 0.0)),
    hyper("RAdam", "weight_decay", ">= 0", -1.0, lr=1e-2, weight_decay=-1),
    hyper("RMSprop", "momentum", ">= 0", -1.0, lr=1e-2, momentum=-1.0),
    # Either the pair or its first number may be named.
    Row(
        "Rprop",
        "etas=(1.0, 0.5)",
        ValueError,
        lambda p, q: None,
        {"lr": 1e-2, "etas": (1.0, 0.5)},
        r"etas(\[0\])? must be .+, got \(?1\.0",
    ),
    hyper("SGD", "momentum", ">= 0", -0.5, lr=1e-2, momentum=-0.5),
    hyper("SparseAdam", "betas[0]", "[0, 1)", 1.0, lr=1e-2, betas=(1.0, 0.0)),
]


def different_in_all(optimizer: str) -> Iterable[Difference]:
    yield Difference(
        optimizer,
        "one parameter alone",
        TypeError,
        lambda p, q: p,
        why="one array is a container of one",
    )
    yield Difference(
        optimizer,
        "one parameter twice in a group",
        UserWarning,
        lambda p, q: [p, p],
        message="parameter 1 must be memory of its own, got the array of parameter 0",
        raises=ValueError,
        why="a mistake, and each step would move it twice",
    )
    yield Difference(
        optimizer,
        "an lr of two numbers",
        ValueError,
        lambda p, q: None,
        {"lr": np.array([1e-3, 1e-3])},
        r"lr must be .+, got array\(\[0\.001, 0\.001\]\)",
        TypeError,
        why="two numbers are of the wrong type where one is expected",
    )


def numpy_numbers(optimizer: str) -> Iterable[Difference]:
    def row(takes: Mapping[str, Any], **kwargs: Any) -> Difference:
        what = ", ".join(f"{key}={value!r}" for key, value in kwargs.items())
        return Difference(optimizer, what, ValueError, lambda p, q: [p], kwargs, takes=takes, why=why)

    why = "a NumPy number is read when it is given, and foreach asks for nothing"
    betas = {"betas": (0.9, 0.99)}
    yield row({"lr": 0.001}, lr=np.array(0.001), foreach=True)
    yield row(betas, lr=1e-2, betas=(0.9, np.array(0.99)))
    yield row(betas, lr=1e-2, betas=(np.array(0.9), 0.99))
    yield row(betas, lr=1e-2, betas=(np.array(0.9), np.array(0.99)), foreach=True)


def complex_parameter(optimizer: str, torch: type[Exception]) -> Difference:
    return Difference(
        optimizer,
        "a complex parameter",
        torch,
        lambda p, q: [np.ones((2, 3), np.complex64)],
        message="parameter 0 must be .+, got complex64",
        raises=TypeError,
        why="a wrong dtype is a TypeError, and known before the first step",
    )


def sparse_parameter(what: str, params: Params) -> Difference:
    return Difference(
        "SparseAdam",
        what,
        ValueError,
        params,
        message=r"parameter 0 must be a numpy\.ndarray.*, got an object of type .*Coo",
        raises=TypeError,
        why="NumPy has no sparse array: anything else is of the wrong type",
    )


DIFFERENT: list[Difference] = [
    *(row for name in NAMES for row in different_in_all(name)),
    *(row for name in ("Adam", "AdamW") for row in numpy_numbers(name)),
    complex_parameter("Adafactor", RuntimeError),
    complex_parameter("Muon", RuntimeError),
    complex_parameter("SparseAdam", ValueError),
    sparse_parameter("a sparse parameter", lambda p, q: [Coo()]),
    sparse_parameter("a sparse parameter in a group", lambda p, q: [{"params": [Coo()]}]),
]


def switches(optimizer: str, raises: type[Exception] | None, message: str, why: str, **kwargs: bool) -> Difference:
    what = ", ".join(f"{key}={value}" for key, value in kwargs.items())
    torch = AssertionError if "capturable" in kwargs else RuntimeError
    return Difference(optimizer, what, torch, lambda p, q: [p], kwargs, message, raises, why=why)


# What torch refuses besides: not in its table of errors for the CPU, so not in the count below.
BESIDES: list[Difference] = [
    *(
        Difference(
            name,
            "a dict of parameters",
            TypeError,
            lambda p, q: {"weight": p},
            takes={"param_names": ["weight"]},
            why="names are keys here",
        )
        for name in NAMES
    ),
    *(
        Difference(
            name,
            "betas=(0, 0.9)",
            ValueError,
            lambda p, q: [p],
            {"betas": (0, 0.9)},
            takes={"betas": (0, 0.9)},
            why="an int means what it says",
        )
        for name in ("Adam", "AdamW")
    ),
    *(
        switches(name, None, "", "both ask for nothing", foreach=True, fused=True)
        for name in ("Adagrad", "Adam", "AdamW")
    ),
    *(
        switches(
            name, ValueError, "differentiable must be .+, got True", "no such mode", fused=True, differentiable=True
        )
        for name in ("Adagrad", "Adam", "AdamW")
    ),
    *(
        switches(name, ValueError, "capturable must be .+, got True", "no such mode", capturable=True)
        for name in ("Adadelta", "Adam", "Adamax", "AdamW", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop")
    ),
]


def pairs_of_parameters() -> Iterable[tuple[Any, Any]]:
    """Two arrays, and two Parameters."""
    for kind in (lambda x: x, Parameter):
        yield kind(np.ones((1, 1), np.float32)), kind(np.ones((1, 1), np.float32))


def test_every_error_of_torch_has_a_row() -> None:
    rows = [*SAME, *DIFFERENT]
    # One for each pair of an optimizer and a wrong input to it that torch's own tests make on the CPU.
    assert len(rows) == 124
    assert Counter(row.torch for row in rows) == {ValueError: 92, TypeError: 15, UserWarning: 15, RuntimeError: 2}
    assert len({str(row) for row in [*rows, *BESIDES]}) == len(rows) + len(BESIDES)
    assert all(row.why and bool(row.message) == (row.raises is not None) for row in [*DIFFERENT, *BESIDES])


@pytest.mark.parametrize("row", [row for row in SAME if row.optimizer in REGISTRY], ids=str)
def test_refused_as_in_torch(row: Row) -> None:
    for p, q in pairs_of_parameters():
        with pytest.raises(row.torch, match=f"^{row.optimizer}: {row.message}") as raised:
            row.construct(p, q)
        assert isinstance(raised.value, roptim.RoptimError)


@pytest.mark.parametrize("row", [row for row in [*DIFFERENT, *BESIDES] if row.optimizer in REGISTRY], ids=str)
def test_deliberate_differences(row: Difference) -> None:
    for p, q in pairs_of_parameters():
        if row.raises is not None:
            with pytest.raises(row.raises, match=f"^{row.optimizer}: {row.message}") as raised:
                row.construct(p, q)
            assert isinstance(raised.value, roptim.RoptimError)
            assert not isinstance(raised.value, row.torch), "no difference: the row belongs to SAME"
        else:
            (group,) = row.construct(p, q).param_groups
            assert len(group["params"]) == 1
            assert group["params"][0] is p
            for key, value in row.takes.items():
                assert group[key] == value
                assert type(group[key]) is type(value)
