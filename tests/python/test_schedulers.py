"""Schedulers against recorded values of torch, against formulas written again, and their own rules."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import math
import pickle
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

import roptim
from roptim import SGD, Adam
from roptim import _roptim as engine
from roptim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    MultiplicativeLR,
    MultiStepLR,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)
from roptim.swa_utils import SWALR

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "schedules.json").read_text())

Spec = list[Any]  # [class, arguments], as in the vectors; parts of composites are specs


class Counting:
    """A function that remembers its calls, and depends on them."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, epoch: int) -> float:
        self.calls += 1
        return 1.0 / (self.calls + epoch)


FUNCTIONS: dict[str, Callable[[], Any]] = {
    "inv": lambda: lambda e: 1 / (1 + e),
    "p95": lambda: lambda e: 0.95**e,
    "c9": lambda: lambda e: 0.9,
    "saw": lambda: lambda e: 1 + (e % 3) * 0.1,
    "counting": Counting,
}


def two_groups(a: float = 0.1, b: float = 0.5, cls: Any = SGD) -> Any:
    one = np.zeros(1, np.float32)
    options = {"momentum": 0.9} if cls is SGD else {}
    return cls([{"params": [one]}, {"params": [one.copy()], "lr": b}], lr=a, **options)


def stepped(opt: Any) -> Any:
    opt.step([None] * len(opt.param_groups))
    return opt


def ready(a: float = 0.1, b: float = 0.5, cls: Any = SGD) -> Any:
    """An optimizer that has done a step, so that no scheduler warns of the order."""
    return stepped(two_groups(a, b, cls))


def build(opt: Any, spec: Spec) -> Any:
    name, kwargs = spec[0], dict(spec[1])
    for key in ("lr_lambda", "scale_fn"):
        if key in kwargs:
            names = kwargs[key]
            kwargs[key] = [FUNCTIONS[n]() for n in names] if isinstance(names, list) else FUNCTIONS[names]()
    if "schedulers" in kwargs:
        kwargs["schedulers"] = [build(opt, part) for part in kwargs["schedulers"]]
    if name == "ChainedScheduler":
        return ChainedScheduler(**kwargs)
    return (SWALR if name == "SWALR" else getattr(roptim.lr_scheduler, name))(opt, **kwargs)


def rates(opt: Any) -> list[float]:
    return [group["lr"] for group in opt.param_groups]


def momenta(opt: Any) -> list[float]:
    return [group["betas"][0] if "betas" in group else group["momentum"] for group in opt.param_groups]


def ran(opt: Any, sched: Any, steps: int) -> list[float]:
    """The first group's rate now and after each of some steps."""
    values = [opt.param_groups[0]["lr"]]
    for _ in range(steps):
        sched.step()
        values.append(opt.param_groups[0]["lr"])
    return values


@contextlib.contextmanager
def silent() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# ---- against torch ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", VECTORS["cases"], ids=lambda c: f"{c['optimizer']}-{json.dumps(c['spec'])}")
def test_values_are_torchs(case: dict[str, Any]) -> None:
    opt = ready(cls=getattr(roptim, case["optimizer"]))
    sched = build(opt, case["spec"])
    for i, want in enumerate(case["trace"]):
        if i:
            sched.step(*([case["metrics"][i - 1]] if case["metrics"] else []))
        assert rates(opt) == pytest.approx([lr for lr, _ in want], rel=1e-13, abs=1e-15), f"step {i}"
        assert momenta(opt) == pytest.approx([m for _, m in want], rel=1e-13, abs=1e-15), f"step {i}"
        assert sched.get_last_lr() == rates(opt)


BASE_KEYS = "base_lrs last_epoch _step_count _is_initial _get_lr_called_within_step _last_lr"
STATE_KEYS: list[tuple[Spec, str]] = [
    (["LambdaLR", {"lr_lambda": "inv"}], f"{BASE_KEYS} lr_lambdas"),
    (["MultiplicativeLR", {"lr_lambda": "c9"}], f"{BASE_KEYS} lr_lambdas"),
    (["StepLR", {"step_size": 3}], f"step_size gamma {BASE_KEYS}"),
    (["MultiStepLR", {"milestones": [3, 3]}], f"milestones gamma {BASE_KEYS}"),
    (["ConstantLR", {}], f"factor total_iters {BASE_KEYS}"),
    (["LinearLR", {}], f"start_factor end_factor total_iters {BASE_KEYS}"),
    (["ExponentialLR", {"gamma": 0.9}], f"gamma {BASE_KEYS}"),
    (["PolynomialLR", {}], f"total_iters power {BASE_KEYS}"),
    (["CosineAnnealingLR", {"T_max": 3}], f"T_max eta_min {BASE_KEYS}"),
    (["CosineAnnealingWarmRestarts", {"T_0": 3}], f"T_0 T_i T_mult eta_min T_cur {BASE_KEYS}"),
    (
        ["CyclicLR", {"base_lr": 0.1, "max_lr": 0.2}],
        "max_lrs total_size step_ratio mode gamma scale_mode cycle_momentum use_beta1 base_momentums max_momentums "
        f"{BASE_KEYS} _scale_fn_custom",
    ),
    (
        ["CyclicLR", {"base_lr": 0.1, "max_lr": 0.2, "cycle_momentum": False}],
        f"max_lrs total_size step_ratio mode gamma scale_mode cycle_momentum {BASE_KEYS} _scale_fn_custom",
    ),
    (
        ["OneCycleLR", {"max_lr": 0.2, "total_steps": 9}],
        f"total_steps _schedule_phases _anneal_func_type cycle_momentum use_beta1 {BASE_KEYS}",
    ),
    (
        ["OneCycleLR", {"max_lr": 0.2, "total_steps": 9, "cycle_momentum": False}],
        f"total_steps _schedule_phases _anneal_func_type cycle_momentum {BASE_KEYS}",
    ),
    (["SWALR", {"swa_lr": 0.2}], f"_anneal_strategy anneal_epochs {BASE_KEYS}"),
    (
        ["SequentialLR", {"schedulers": [["StepLR", {"step_size": 3}]], "milestones": []}],
        "_milestones last_epoch _last_lr _schedulers",
    ),
    (["ChainedScheduler", {"schedulers": [["StepLR", {"step_size": 3}]]}], "_last_lr _schedulers"),
    (
        ["ReduceLROnPlateau", {"verbose": True}],
        "factor default_min_lr min_lrs patience cooldown eps last_epoch _last_lr mode_worse mode threshold "
        "threshold_mode best cooldown_counter num_bad_epochs",
    ),
]
CLASSES = {spec[0] for spec, _ in STATE_KEYS}


def test_every_class_is_among_the_cases() -> None:
    assert {*roptim.lr_scheduler.__all__, "SWALR"} - {"LRScheduler"} == CLASSES
    assert {case["spec"][0] for case in VECTORS["cases"]} == CLASSES


@pytest.mark.parametrize(("spec", "keys"), STATE_KEYS, ids=lambda x: x[0] if isinstance(x, list) else "")
def test_a_state_has_torchs_keys_in_torchs_order(spec: Spec, keys: str, tmp_path: Path) -> None:
    opt = ready()
    sched = build(opt, spec)
    state = sched.state_dict()
    assert " ".join(state) == keys
    roptim.save(state, tmp_path / "s")
    assert roptim.load(tmp_path / "s") == state
    # Nothing in it is the scheduler's own.
    held = [id(value) for value in vars(sched).values() if isinstance(value, (list, dict))]
    assert not [key for key, value in state.items() if id(value) in held]
    kept = copy.deepcopy(state)
    sched.step(*([1.0] if spec[0] == "ReduceLROnPlateau" else []))
    assert state == kept
    # And loading it twice takes nothing out of it, and keeps nothing of it.
    for _ in range(2):
        sched.load_state_dict(state)
        assert state == kept
        assert sched.state_dict() == kept


# ---- against formulas written again -------------------------------------------------------------------------

CLOSED: list[tuple[Any, dict[str, Any]]] = [
    (StepLR, {"step_size": 3, "gamma": 0.5}),
    (MultiStepLR, {"milestones": [7, 2, 5, 5], "gamma": 0.3}),
    (ConstantLR, {"factor": 0.3, "total_iters": 4}),
    (LinearLR, {"start_factor": 0.1, "end_factor": 0.8, "total_iters": 7}),
    (ExponentialLR, {"gamma": 0.9}),
    (PolynomialLR, {"total_iters": 9, "power": 2.5}),
    (CosineAnnealingLR, {"T_max": 7, "eta_min": 0.01}),
]


@pytest.mark.parametrize(("cls", "kwargs"), CLOSED)
def test_recursion_and_closed_form_agree(cls: Any, kwargs: Any) -> None:
    opt, other = ready(), ready()
    sched, closed = cls(opt, **kwargs), cls(other, **kwargs)
    for epoch in range(1, 40):
        sched.step()
        with pytest.warns(UserWarning, match="epoch argument"):
            closed.step(epoch)
        assert sched.get_last_lr() == pytest.approx(closed.get_last_lr(), rel=1e-12, abs=1e-12)
        assert closed.last_epoch == epoch


def cosine(high: float, low: float, part: float) -> float:
    return low + (high - low) * math.cos(math.pi * part / 2) ** 2


@pytest.mark.parametrize(
    ("mode", "scale"),
    [
        ("triangular", lambda e, c: 1.0),
        ("triangular2", lambda e, c: 0.5**c),
        ("exp_range", lambda e, c: 0.9**e),
    ],
)
@pytest.mark.parametrize(("up", "down"), [(4, None), (3, 5), (1, 6), (5, 0), (2.5, 1.5)])
def test_cycles_against_interpolation(mode: str, scale: Any, up: float, down: float | None) -> None:
    opt = ready()
    sched = CyclicLR(opt, [0.01, 0.02], [0.1, 0.3], up, down, mode, 0.9, base_momentum=0.7, max_momentum=[0.9, 0.95])
    length = up + (up if down is None else down)
    for e in range(40):
        height = np.interp(e % length, [0, up, length], [0, 1, 0]) * scale(e, e // length)
        assert rates(opt) == pytest.approx([0.01 + 0.09 * height, 0.02 + 0.28 * height], rel=1e-12)
        assert momenta(opt) == pytest.approx([0.9 - 0.2 * height, 0.95 - 0.25 * height], rel=1e-12)
        sched.step()


@pytest.mark.parametrize("scale_mode", ["cycle", "iterations"])
def test_a_scale_of_ones_own(scale_mode: str) -> None:
    seen: list[Any] = []

    def scale(x: Any) -> float:
        seen.append(x)
        return 1 / (1 + x)

    opt = ready(cls=Adam)
    sched = CyclicLR(opt, 0.0, 1.0, 2, 2, "anything", scale_fn=scale, scale_mode=scale_mode, cycle_momentum=False)
    got = ran(opt, sched, 8)
    x = [e // 4 + 1 if scale_mode == "cycle" else e for e in range(9)]
    assert seen == x
    assert all(type(value) is int for value in seen)
    assert got == pytest.approx([[0, 0.5, 1, 0.5][e % 4] / (1 + x[e]) for e in range(9)])
    assert momenta(opt) == [0.9, 0.9]


@pytest.mark.parametrize("strategy", ["cos", "linear"])
@pytest.mark.parametrize("three_phase", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.25, 0.37, 0.5, 1.0])
def test_one_cycle_against_interpolation(strategy: str, three_phase: bool, share: float) -> None:
    total, opt = 20, ready()
    sched = OneCycleLR(
        opt,
        [0.4, 0.8],
        epochs=4,
        steps_per_epoch=5,
        pct_start=share,
        anneal_strategy=strategy,
        base_momentum=0.8,
        max_momentum=0.9,
        div_factor=4.0,
        final_div_factor=100.0,
        three_phase=three_phase,
    )
    first, last = (1 / 4, 1 / 400)
    if three_phase:
        ends, rate = [0, share * total - 1, 2 * share * total - 2, total - 1], [first, 1.0, first, last]
        momentum = [0.9, 0.8, 0.9, 0.9]
    else:
        ends, rate, momentum = [0, share * total - 1, total - 1], [first, 1.0, last], [0.9, 0.8, 0.9]

    def at(values: list[float], e: int) -> float:
        i = next(i for i in range(1, len(ends)) if e <= ends[i])
        part = (e - ends[i - 1]) / (ends[i] - ends[i - 1])
        if strategy == "linear":
            return float(values[i - 1] + part * (values[i] - values[i - 1]))
        return cosine(values[i - 1], values[i], part)

    for e in range(total):
        assert rates(opt) == pytest.approx([0.4 * at(rate, e), 0.8 * at(rate, e)], rel=1e-11)
        assert momenta(opt) == pytest.approx([at(momentum, e)] * 2, rel=1e-12)
        sched.step()


@pytest.mark.parametrize(("first", "mult"), [(1, 1), (4, 1), (3, 2), (2, 3)])
def test_warm_restarts_against_a_count(first: int, mult: int) -> None:
    opt = ready()
    sched = CosineAnnealingWarmRestarts(opt, first, mult, eta_min=0.01)
    jumped = ready()
    jumps = CosineAnnealingWarmRestarts(jumped, first, mult, eta_min=0.01)
    done, length = 0, first
    for e in range(50):
        want = [cosine(base, 0.01, done / length) for base in (0.1, 0.5)]
        assert rates(opt) == pytest.approx(want, rel=1e-12)
        jumps.step(e)
        assert rates(jumped) == pytest.approx(want, rel=1e-9)
        done += 1
        if done == length:
            done, length = 0, length * mult
        sched.step()
    jumps.step(first + 0.5)
    assert rates(jumped)[0] == pytest.approx(cosine(0.1, 0.01, 0.5 / (first * mult)) if first > 1 else rates(jumped)[0])
    jumps.step()
    assert (jumps.last_epoch, jumps.T_cur % 1) == (first + 1, 0.5 % first)


def test_a_sequence_against_its_parts() -> None:
    parts: list[tuple[int, Spec, Callable[[int], float]]] = [
        (0, ["LinearLR", {"start_factor": 0.2, "total_iters": 4}], lambda e: 0.1 * (0.2 + 0.8 * min(e, 4) / 4)),
        (4, ["CosineAnnealingLR", {"T_max": 6, "eta_min": 0.01}], lambda e: cosine(0.1, 0.01, e / 6)),
        (10, ["CosineAnnealingWarmRestarts", {"T_0": 3}], lambda e: cosine(0.1, 0.0, e % 3 / 3)),
        (16, ["LambdaLR", {"lr_lambda": "inv"}], lambda e: 0.1 / (1 + e)),
        (19, ["CyclicLR", {"base_lr": 0.0, "max_lr": 0.4, "step_size_up": 2}], lambda e: [0, 0.2, 0.4, 0.2][e % 4]),
        (25, ["ExponentialLR", {"gamma": 0.5}], lambda e: 0.1 * 0.5**e),
    ]
    opt = ready()
    milestones = [start for start, _, _ in parts[1:]]
    sched = build(opt, ["SequentialLR", {"schedulers": [spec for _, spec, _ in parts], "milestones": milestones}])
    for e in range(32):
        start, _, value = next(part for part in reversed(parts) if part[0] <= e)
        assert rates(opt)[0] == pytest.approx(value(e - start), rel=1e-10, abs=1e-15), e
        assert sched.last_epoch == e
        sched.step()


def test_swa_anneals_whatever_was_before() -> None:
    for strategy, a in [("linear", lambda x: x), ("cos", lambda x: 1 - cosine(1, 0, x))]:
        opt = ready()
        sched = SWALR(opt, [0.02, 0.05], 6, strategy)
        for e in range(12):
            part = a(min(e / 6, 1))
            assert rates(opt) == pytest.approx([0.02 * part + 0.1 * (1 - part), 0.05 * part + 0.5 * (1 - part)])
            sched.step()
    opt = ready()
    SWALR(opt, 0.3, 0)
    assert rates(opt) == pytest.approx([0.3, 0.3])


DOCUMENTED: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: LambdaLR(o, lambda e: 0.5**e),
    "MultiplicativeLR": lambda o: MultiplicativeLR(o, lambda e: 0.5),
    "StepLR": lambda o: StepLR(o, 2),
    "MultiStepLR": lambda o: MultiStepLR(o, [1, 2]),
    "ConstantLR": lambda o: ConstantLR(o, 0.5, 2),
    "LinearLR": lambda o: LinearLR(o, 0.5, total_iters=2),
    "ExponentialLR": lambda o: ExponentialLR(o, 0.5),
    "PolynomialLR": lambda o: PolynomialLR(o, 2),
    "CosineAnnealingLR": lambda o: CosineAnnealingLR(o, 2),
    "CosineAnnealingWarmRestarts": lambda o: CosineAnnealingWarmRestarts(o, 2),
    "CyclicLR": lambda o: CyclicLR(o, 0.1, 0.5, 2),
    "OneCycleLR": lambda o: OneCycleLR(o, 0.5, 6, pct_start=0.5, div_factor=5, anneal_strategy="linear"),
    "SequentialLR": lambda o: SequentialLR(o, [ConstantLR(o, 0.5), ExponentialLR(o, 0.9)], [1]),
    "ChainedScheduler": lambda o: ChainedScheduler([ConstantLR(o, 0.5, 2), ExponentialLR(o, 0.9)]),
    "SWALR": lambda o: SWALR(o, 0.02, 2, "linear"),
    "ReduceLROnPlateau": lambda o: ReduceLROnPlateau(o, patience=0),
}


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_the_first_values_are_as_documented(name: str) -> None:
    opt = ready()
    sched = DOCUMENTED[name](opt)
    text = re.sub(r"\s+", " ", type(sched).__doc__ or "")
    found = re.search(r"lr (?:at|after) (?:epochs|steps) 0, 1, 2 .*?: ([\d.]+), ([\d.]+), ([\d.]+\d)", text)
    assert found, text
    want = [float(x) for x in found.groups()]
    if name == "ReduceLROnPlateau":
        for value in want:
            sched.step(1.0)
            assert rates(opt)[0] == pytest.approx(value)
    else:
        assert ran(opt, sched, 2) == pytest.approx(want, abs=1e-15)


# ---- resuming -----------------------------------------------------------------------------------------------

LEAVES: list[Spec] = [
    *[[cls.__name__, kwargs] for cls, kwargs in CLOSED[:6]],
    ["CosineAnnealingLR", {"T_max": 4}],
    ["LambdaLR", {"lr_lambda": ["p95", "saw"]}],
    ["LambdaLR", {"lr_lambda": "counting"}],
    ["MultiplicativeLR", {"lr_lambda": "c9"}],
    ["MultiplicativeLR", {"lr_lambda": ["counting", "saw"]}],
    ["CosineAnnealingWarmRestarts", {"T_0": 2, "T_mult": 2, "eta_min": 0.001}],
    ["CyclicLR", {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 3, "mode": "triangular2"}],
    ["CyclicLR", {"base_lr": 0.01, "max_lr": [0.1, 0.2], "step_size_up": 2, "step_size_down": 3, "mode": "exp_range"}],
    ["CyclicLR", {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 3, "scale_fn": "counting", "cycle_momentum": False}],
    ["OneCycleLR", {"max_lr": 0.3, "total_steps": 12}],
    ["OneCycleLR", {"max_lr": [0.3, 0.1], "total_steps": 40, "three_phase": True, "anneal_strategy": "linear"}],
    ["SWALR", {"swa_lr": 0.05, "anneal_epochs": 4}],
    ["ConstantLR", {"factor": 0.5, "total_iters": 0}],
]
#: Those that give the same values however often their functions were called.
PURE = [spec for spec in LEAVES if "counting" not in json.dumps(spec)]
PLATEAUS: list[Spec] = [
    ["ReduceLROnPlateau", {"factor": 0.5, "patience": 1, "cooldown": 1}],
    ["ReduceLROnPlateau", {"mode": "max", "threshold_mode": "abs", "patience": 0, "min_lr": [0.01, 0.2]}],
]
STACKS: list[Spec] = [
    ["SequentialLR", {"schedulers": [LEAVES[3], LEAVES[6], LEAVES[11]], "milestones": [3, 7]}],
    ["ChainedScheduler", {"schedulers": [LEAVES[2], LEAVES[4]]}],
]

#: Composites with parts that write more than the rate.
KEY_WRITERS: list[Spec] = [
    ["SequentialLR", {"schedulers": [LEAVES[3], LEAVES[15]], "milestones": [2]}],
    [
        "SequentialLR",
        {"schedulers": [["ChainedScheduler", {"schedulers": [LEAVES[12]]}], LEAVES[16]], "milestones": [2]},
    ],
]

Observed = list[tuple[list[float], list[float], list[list[float]]]]


def metric(spec: Spec, i: int) -> list[float]:
    return [1.0 + i % 5] if spec[0] == "ReduceLROnPlateau" else []


def observe(opt: Any, scheds: list[Any]) -> Any:
    return rates(opt), momenta(opt), [sched.get_last_lr() for sched in scheds]


def go(opt: Any, scheds: list[Any], specs: list[Spec], start: int, end: int) -> Observed:
    seen = []
    for i in range(start, end):
        for sched, spec in zip(scheds, specs, strict=True):
            sched.step(*metric(spec, i))
        seen.append(observe(opt, scheds))
    return seen


def filed(tree: Any) -> Any:
    """Through the bytes of a file."""
    return engine.loads(engine.dumps(tree))


ORDERS = ["scheduler first", "optimizer first", "optimizer before the scheduler is built"]


def resume(order: str, cls: Any, specs: list[Spec], saved: Any) -> tuple[Any, list[Any]]:
    """New objects with a saved state."""
    saved = filed(saved)
    opt = ready(0.3, 0.7, cls)
    if order == ORDERS[2]:
        opt.load_state_dict(saved["opt"])
        before = rates(opt), momenta(opt)
        scheds = []
        for spec, state in zip(specs, saved["scheds"], strict=True):
            with silent():
                scheds.append(build(opt, spec))
            assert (rates(opt), momenta(opt)) == before
            scheds[-1].load_state_dict(state)
        return opt, scheds
    scheds = [build(opt, spec) for spec in specs]
    if order == ORDERS[1]:
        opt.load_state_dict(saved["opt"])
    for sched, state in zip(scheds, saved["scheds"], strict=True):
        sched.load_state_dict(state)
    if order == ORDERS[0]:
        opt.load_state_dict(saved["opt"])
    return opt, scheds


def reject_negative_rates(error: ValueError) -> None:
    """Annealing to a rate above the present one may lead below 0, which the groups refuse."""
    if "must be a finite number >= 0, got -" not in str(error):
        raise error
    reject()


def check_resuming(cls: Any, specs: list[Spec], splits: list[int], orders: list[str], steps: int) -> None:
    opt = ready(cls=cls)
    scheds = [build(opt, spec) for spec in specs]
    states = []
    seen = []
    for i in range(steps):
        states.append({"opt": opt.state_dict(), "scheds": [sched.state_dict() for sched in scheds]})
        seen += go(opt, scheds, specs, i, i + 1)
    for split in splits:
        for order in orders:
            again, resumed = resume(order, cls, specs, states[split])
            assert observe(again, resumed)[:2] == (seen[split - 1][:2] if split else (rates(again), momenta(again)))
            assert go(again, resumed, specs, split, steps) == seen[split:], (order, split)
            assert [s.state_dict() for s in resumed] == [s.state_dict() for s in scheds]


@pytest.mark.parametrize("cls", [SGD, Adam])
@pytest.mark.parametrize("spec", LEAVES + PLATEAUS + STACKS, ids=lambda spec: spec[0])
@pytest.mark.filterwarnings("ignore:OneCycleLR. step")
def test_resume_at_every_split(spec: Spec, cls: Any) -> None:
    check_resuming(cls, [spec], list(range(14)), ORDERS, 14)


def trees(depth: int) -> st.SearchStrategy[Spec]:
    leaf = st.sampled_from(LEAVES)
    if depth == 0:
        return leaf
    parts = st.lists(trees(depth - 1), min_size=1, max_size=3)

    def sequence(parts: list[Spec]) -> st.SearchStrategy[Spec]:
        at = st.lists(st.integers(0, 11), min_size=len(parts) - 1, max_size=len(parts) - 1).map(sorted)
        return at.map(lambda at: ["SequentialLR", {"schedulers": parts, "milestones": at}])

    chained = parts.map(lambda parts: ["ChainedScheduler", {"schedulers": parts}])
    return st.one_of(leaf, parts.flatmap(sequence), parts.flatmap(sequence), chained)


@settings(max_examples=120)
@given(
    st.lists(st.one_of(trees(3), st.sampled_from(PLATEAUS)), min_size=1, max_size=2),
    st.sampled_from([SGD, Adam]),
    st.integers(0, 13),
    st.sampled_from(ORDERS),
)
@pytest.mark.filterwarnings("ignore:OneCycleLR. step")
def test_random_stacks_resume(specs: list[Spec], cls: Any, split: int, order: str) -> None:
    try:
        check_resuming(cls, specs, [split], [order], 14)
    except ValueError as error:
        reject_negative_rates(error)


def loaded(spec: Spec, steps: int) -> Any:
    """An optimizer with loaded groups from a run with a scheduler."""
    opt = ready()
    sched = build(opt, spec)
    for _ in range(steps):
        sched.step()
    again = ready(0.3, 0.7)
    again.load_state_dict(opt.state_dict())
    return again


@pytest.mark.parametrize("spec", [*PURE, *STACKS, *KEY_WRITERS], ids=lambda spec: spec[0])
def test_a_scheduler_that_is_never_loaded_begins_with_its_first_step(spec: Spec) -> None:
    """Until then the groups are as loaded, from then on they have the values of torch, which begins at once."""
    opt, torchs = (loaded(["StepLR", {"step_size": 2, "gamma": 0.5}], 5) for _ in range(2))
    before = [dict(group) for group in opt.param_groups]
    with silent():
        sched = build(opt, spec)
    assert sched.get_last_lr() == rates(opt)
    for group, old in zip(opt.param_groups, before, strict=True):
        assert {key: group[key] for key in old} == old
    torchs._resumed = False
    other = build(torchs, spec)
    for i in range(10):
        sched.step()
        other.step()
        assert observe(opt, [sched]) == observe(torchs, [other]), i
    mine, theirs = sched.state_dict(), other.state_dict()
    assert mine == theirs


def test_what_is_said_of_a_construction_that_is_held_back() -> None:
    opt = loaded(["LinearLR", {"start_factor": 0.5, "total_iters": 2}], 1)
    assert rates(opt) == pytest.approx([0.075, 0.375])
    message = re.escape(f"LinearLR: the groups keep lr {rates(opt)} as loaded, where a new schedule begins with lr ")
    with pytest.warns(UserWarning, match=message + r"\[0.0375\d*, 0.1875\]; load the scheduler's state, too") as record:
        SequentialLR(opt, [LinearLR(opt, 0.5, total_iters=2), ConstantLR(opt, 0.5)], [2])
    assert len(record) == 1  # once for all
    assert record[0].filename == __file__
    assert rates(opt) == pytest.approx([0.075, 0.375])
    # Momentum counts, too.
    opt = loaded(["StepLR", {"step_size": 2}], 3)
    both = r"keep lr .* and momentum \[0.9, 0.9\] as loaded, .* and momentum \[0.95, 0.95\]"
    with pytest.warns(UserWarning, match=both):
        OneCycleLR(opt, 0.3, 20)
    # What was not written is not written later either.
    for group in opt.param_groups:
        group.update(initial_lr=0.4, momentum=0.5)
    sched = StepLR(opt, 2)
    for group in opt.param_groups:
        group["momentum"] = 0.25
    sched.step()
    assert (rates(opt)[0], momenta(opt)) == (pytest.approx(0.01), [0.25, 0.25])
    # A part whose beginning is held back begins with the whole, even if that is built in another time.
    opt = loaded(["StepLR", {"step_size": 2}], 3)
    with silent():
        part = OneCycleLR(opt, 0.3, 20)
    ExponentialLR(opt, 1.0).step()
    sched = SequentialLR(opt, [part], [])
    assert (rates(opt), momenta(opt)) == ([pytest.approx(0.012)] * 2, [0.95, 0.95])
    other = ready()
    assert ran(opt, sched, 5) == ran(other, OneCycleLR(other, 0.3, 20), 5)
    # Nothing is said where nothing is held back.
    opt = loaded(["StepLR", {"step_size": 2}], 3)
    assert ran(opt, ExponentialLR(opt, 0.5), 1) == pytest.approx([0.01, 0.005])
    # A scheduler that comes later in the same run begins as ever.
    SWALR(opt, 0.2, 0)
    assert rates(opt) == [0.2, 0.2]
    # And so does the first one of groups that never had one, or no longer have.
    opt = ready()
    opt.load_state_dict(ready().state_dict())
    LinearLR(opt, 0.5)
    ConstantLR(opt, 0.5)
    assert rates(opt) == [0.025, 0.125]
    opt = loaded(["StepLR", {"step_size": 2}], 3)
    for group in opt.param_groups:
        del group["initial_lr"]
    LinearLR(opt, 0.5)
    ConstantLR(opt, 0.5)
    assert rates(opt)[0] == pytest.approx(0.0025)


@pytest.mark.parametrize("spec", [*LEAVES, *PLATEAUS, *STACKS], ids=lambda spec: spec[0])
def test_copies_take_their_optimizer_along(spec: Spec) -> None:
    opt = ready()
    sched = build(opt, spec)
    go(opt, [sched], [spec], 0, 4)
    copies = [copy.deepcopy(sched)]
    if not re.search("inv|p95|c9|saw", json.dumps(spec)):  # a lambda cannot be pickled
        copies.append(pickle.loads(pickle.dumps(sched)))
    want = go(opt, [sched], [spec], 4, 10)
    for twin in copies:
        assert twin.optimizer is not opt
        assert go(twin.optimizer, [twin], [spec], 4, 10) == want


def test_functions_are_saved_as_torch_does() -> None:
    opt = ready()
    functions = [Counting(), functools.partial(pow, 0.5)]
    sched = LambdaLR(opt, functions)
    sched.step()
    assert sched.state_dict()["lr_lambdas"] == [{"calls": 2}, {}]
    assert LambdaLR(ready(), math.cos).state_dict()["lr_lambdas"] == [None, None]
    assert LambdaLR(ready(), lambda e: 1.0).state_dict()["lr_lambdas"] == [None, None]
    other = LambdaLR(ready(), [Counting(), lambda e: 1.0])
    state = sched.state_dict()
    other.load_state_dict(state)
    assert other.lr_lambdas[0].calls == 2  # type: ignore[attr-defined]
    other.step()
    assert state["lr_lambdas"][0] == {"calls": 2}
    for bad, message in [
        ([{"calls": 2}], "a list of 2"),
        ([None, 5], "None or a dict per function"),
        ([None, {"x": 1}], "None for a function without attributes"),
        (None, "a list of 2"),
    ]:
        with pytest.raises(roptim.RoptimError, match=f"^LambdaLR.load_state_dict: lr_lambdas must be {message}"):
            other.load_state_dict({**state, "lr_lambdas": bad, "last_epoch": 99})
        assert other.last_epoch == 2


def test_states_are_taken_up_completely_or_not_at_all() -> None:
    spec = ["SequentialLR", {"schedulers": [STACKS[1], LEAVES[6], LEAVES[15]], "milestones": [3, 6]}]
    sched = build(ready(), spec)
    before = sched.state_dict()
    good = copy.deepcopy(before)
    good["last_epoch"] = 5

    def with_part(index: int, **changes: Any) -> dict[str, Any]:
        parts = copy.deepcopy(good["_schedulers"])
        parts[index].update(changes)
        return {**good, "_schedulers": parts}

    phases = before["_schedulers"][2]["_schedule_phases"]
    for bad, message in [
        ({**good, "_schedulers": []}, "SequentialLR.load_state_dict: _schedulers must be a list of 3 states, got 0"),
        ({**good, "_schedulers": 1}, "SequentialLR.load_state_dict: _schedulers must be a list of 3 states"),
        ({"last_epoch": 1}, "SequentialLR.load_state_dict: state_dict must be a dict with '_schedulers'"),
        ({**good, "_milestones": [3]}, "SequentialLR.load_state_dict: _milestones must be one fewer than the 3 sched"),
        ({**good, "_milestones": [3, 2]}, "SequentialLR.load_state_dict: _milestones must be ascending"),
        ({**good, "_milestones": [3, 2.5]}, "SequentialLR.load_state_dict: _milestones must be a whole number >= 0"),
        (with_part(2, _schedule_phases=[]), ".*scheduler 2: _schedule_phases must be 2 or 3 phases, got 0"),
        (with_part(1, T_max=0), "SequentialLR.load_state_dict: scheduler 1: T_max must be a whole number >= 1, got 0"),
        (with_part(1, base_lrs=[0.1, "x"]), r".*scheduler 1: base_lrs must be of type float, got an object of type"),
        (with_part(1, get_lr=3), ".*scheduler 1: key must be of the scheduler's state, got 'get_lr'"),
        (with_part(0, _schedulers=[{}, {}]), ".*scheduler 0: scheduler 0: state_dict must be a dict with 'last_epoch'"),
        (with_part(2, use_beta1=True), ".*scheduler 2: use_beta1 must be False, got True"),
        (with_part(2, _anneal_func_type="up"), ".*scheduler 2: _anneal_func_type must be 'cos' or 'linear', got 'up'"),
        (with_part(2, _schedule_phases=[{}, {}]), ".*scheduler 2: _schedule_phases must be dicts with 'end_step'"),
        (
            with_part(2, _schedule_phases=[{**phases[0], "end_lr": "lr"}] * 2),
            ".*scheduler 2: end_lr must be 'initial_lr'",
        ),
    ]:
        with pytest.raises(roptim.RoptimError, match="^" + message):
            sched.load_state_dict(bad)
        assert sched.state_dict() == before
    sched.load_state_dict(good)
    assert sched.state_dict() == good
    cyclic = build(ready(), LEAVES[12])
    plain = CyclicLR(ready(), 0.1, 0.2, cycle_momentum=False)
    plain.load_state_dict(cyclic.state_dict())
    plain.step()
    plain = CyclicLR(ready(), 0.1, 0.2, cycle_momentum=False)
    short = {key: value for key, value in cyclic.state_dict().items() if key != "base_momentums"}
    with pytest.raises(KeyError, match="state_dict must be a dict with 'base_momentums' for cycle_momentum"):
        plain.load_state_dict(short)
    for key, value in [("mode", "square"), ("scale_mode", "x")]:
        with pytest.raises(ValueError, match=f"^CyclicLR.load_state_dict: {key} must be"):
            cyclic.load_state_dict({**cyclic.state_dict(), key: value})


def test_states_through_json_and_from_older_torch() -> None:
    sched = MultiStepLR(opt := ready(), [2, 2, 4], 0.5)
    sched.step()
    again = MultiStepLR(ready(), [1])
    again.load_state_dict(json.loads(json.dumps(sched.state_dict())))
    assert again.milestones == sched.milestones == {2: 2, 4: 1}
    with pytest.raises(ValueError, match="milestones must be a whole number >= 0, got 'x'"):
        again.load_state_dict({**sched.state_dict(), "milestones": {"x": 1}})
    sched.load_state_dict({**sched.state_dict(), "verbose": False})
    assert "verbose" not in sched.state_dict()
    one = OneCycleLR(opt, 0.1, 10)
    one.load_state_dict({**one.state_dict(), "anneal_func": None, "verbose": True})
    assert not {"anneal_func", "verbose"} & one.state_dict().keys()
    plateau = ReduceLROnPlateau(opt)
    plateau.load_state_dict({**plateau.state_dict(), "verbose": True, "best": 3})
    assert (plateau.best, plateau.verbose) == (3, False)


def test_a_part_with_its_own_way_of_loading() -> None:
    class Own(LRScheduler):
        def get_lr(self) -> list[float]:
            return [base / (1 + self.last_epoch) for base in self.base_lrs]

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            super().load_state_dict(state_dict)
            self.was_loaded = True

    opt = ready()
    part = Own(opt)
    part.table = np.ones(2)
    sched = SequentialLR(opt, [part, ExponentialLR(opt, 0.5)], [3])
    sched.step()
    saved = sched.state_dict()["_schedulers"][0]["table"]
    part.table[0] = 5.0
    assert saved.tolist() == [1.0, 1.0]
    again = ready()
    own = Own(again)
    other = SequentialLR(again, [own, ExponentialLR(again, 0.5)], [3])
    other.load_state_dict(sched.state_dict())
    again.load_state_dict(opt.state_dict())
    assert own.was_loaded
    assert ran(again, other, 5) == ran(opt, sched, 5)


# ---- schedulers of schedulers -------------------------------------------------------------------------------


def sequence(parts: list[Spec], milestones: list[int]) -> Spec:
    return ["SequentialLR", {"schedulers": parts, "milestones": milestones}]


@settings(max_examples=60)
@given(st.lists(st.sampled_from(PURE), min_size=3, max_size=4), st.data())
@pytest.mark.filterwarnings("ignore:OneCycleLR. step")
def test_nesting_is_transparent(parts: list[Spec], data: st.DataObject) -> None:
    """A nested sequence gives the values of the flat one, at whichever end it is nested, bit for bit."""
    count = len(parts)
    at = data.draw(st.lists(st.integers(0, 9), min_size=count - 1, max_size=count - 1).map(sorted))
    cut = data.draw(st.integers(1, count - 1))
    left = sequence([sequence(parts[:cut], at[: cut - 1]), *parts[cut:]], at[cut - 1 :])
    inner = [m - at[cut - 1] for m in at[cut:]]
    right = sequence([*parts[:cut], sequence(parts[cut:], inner)], at[:cut])
    wrapped = sequence([sequence(parts, at)], [])
    chained = sequence([["ChainedScheduler", {"schedulers": [part]}] for part in parts], at)
    runs = []
    for spec in (sequence(parts, at), left, right, wrapped, chained):
        opt = ready()
        sched = build(opt, spec)
        try:
            runs.append([(rates(opt), momenta(opt)), *[seen[:2] for seen in go(opt, [sched], [spec], 0, 12)]])
        except ValueError as error:
            reject_negative_rates(error)
    assert runs == [runs[0]] * 5


def test_nested_schedules_that_torch_changes_or_refuses() -> None:
    """torch advances the inner schedule at construction if it comes first, and fails at its milestone if not."""

    def constants(opt: Any) -> Any:
        return SequentialLR(opt, [ConstantLR(opt, 0.5, 2), ConstantLR(opt, 0.2, 10)], [2])

    opt = ready()
    assert ran(opt, SequentialLR(opt, [constants(opt)], []), 4) == pytest.approx([0.05, 0.05, 0.02, 0.02, 0.02])

    def chain(opt: Any) -> Any:
        return ChainedScheduler([ConstantLR(opt, 0.5, 2), ExponentialLR(opt, 0.9)])

    opt = two_groups()
    sched = SequentialLR(opt, [chain(opt)], [])  # and no warning of the order
    stepped(opt)
    want = [0.05, 0.045, 0.081, 0.0729]
    assert ran(opt, sched, 3) == pytest.approx(want)
    opt = ready()
    assert ran(opt, SequentialLR(opt, [ConstantLR(opt, 0.1), chain(opt)], [2]), 5) == pytest.approx([0.01, 0.01, *want])
    opt = ready()
    late = [ConstantLR(opt, 0.1), ChainedScheduler([ExponentialLR(opt, 0.9), ConstantLR(opt, 0.5, 2)])]
    assert ran(opt, SequentialLR(opt, late, [2]), 5) == pytest.approx([0.01, 0.01, *want])
    opt = ready()
    sched = SequentialLR(opt, [chain(opt), constants(opt)], [2])
    assert ran(opt, sched, 5) == pytest.approx([0.05, 0.045, 0.05, 0.05, 0.02, 0.02])
    assert sched.get_last_lr() == rates(opt)


def test_the_opening_of_a_nested_sequence_leaves_no_momentum() -> None:
    """It is that of the constructors alone, as in the flat sequence."""
    a: Spec = ["CyclicLR", {"base_lr": 0.01, "max_lr": 0.1, "max_momentum": 0.7}]
    b: Spec = ["OneCycleLR", {"max_lr": 0.1, "total_steps": 9}]
    step: Spec = ["StepLR", {"step_size": 3}]
    for cls in (SGD, Adam):
        for flat, nested in [
            ([step, a, b], [step, sequence([a, b], [3])]),
            ([step, a, b, step, a, b], [step, sequence([a, b], [3]), sequence([step], []), sequence([a, b], [3])]),
            ([step, a, b, a], [step, ["ChainedScheduler", {"schedulers": [sequence([a, b], [3])]}], a]),
        ]:
            runs = []
            for parts in (flat, nested):
                opt = ready(cls=cls)
                build(opt, sequence(parts, list(range(3, len(parts) + 2))))
                runs.append((rates(opt), momenta(opt)))
            assert runs[0] == runs[1]
    # Whenever the parts were built.
    opt = ready()
    parts = [build(opt, spec) for spec in (step, a, b, a, b)]
    assert momenta(opt) == [0.95, 0.95]
    SequentialLR(opt, [parts[0], *[SequentialLR(opt, parts[i : i + 2], [3]) for i in (1, 3)]], [3, 6])
    assert momenta(opt) == [0.95, 0.95]


def test_chains_within_chains() -> None:
    opt, flat = ready(), ready()
    a = ChainedScheduler([ChainedScheduler([StepLR(opt, 2, 0.5), ExponentialLR(opt, 0.9)]), LinearLR(opt, 0.5)])
    b = ChainedScheduler([StepLR(flat, 2, 0.5), ExponentialLR(flat, 0.9), LinearLR(flat, 0.5)])
    assert ran(opt, a, 9) == ran(flat, b, 9)
    # As in torch, a sequence writes the closed form at its milestone, and the others go on from there.
    opt = ready()
    parts = [SequentialLR(opt, [ConstantLR(opt, 0.5), ExponentialLR(opt, 0.8)], [2]), ExponentialLR(opt, 0.9)]
    want = [0.05, 0.05 * 0.9, 0.1 * 0.9, 0.1 * 0.9**2 * 0.8]
    assert ran(opt, ChainedScheduler(parts), 3) == pytest.approx(want)


def test_a_step_of_many_is_one() -> None:
    """Where a part fails, the others are as before, and so are the groups."""
    opt = ready()
    factors = {"bad": 1.0}
    sched = SequentialLR(
        opt,
        [ChainedScheduler([ExponentialLR(opt, 0.9), CyclicLR(opt, 0.1, 0.2), LambdaLR(opt, lambda e: factors["bad"])])],
        [],
    )
    sched.step()
    before = sched.state_dict(), [dict(group) for group in opt.param_groups]
    factors["bad"] = -1.0
    with pytest.raises(ValueError, match="lr must be"):
        sched.step()
    assert before == (sched.state_dict(), [dict(group) for group in opt.param_groups])
    for build_one in (lambda: LambdaLR(opt, lambda e: math.nan), lambda: OneCycleLR(opt, -1.0, 10)):
        with pytest.raises(ValueError, match="lr must be"):
            build_one()
        assert before == (sched.state_dict(), [dict(group) for group in opt.param_groups])
    opt = ready()
    parts = [ExponentialLR(opt, 0.9), StepLR(opt, 2)]
    opt.add_param_group({"params": [np.zeros(1, np.float32)]})
    memory = [part.state_dict() for part in parts]
    with pytest.raises(KeyError, match=r"^SequentialLR: group 2 must be one with 'initial_lr', got none; add groups"):
        SequentialLR(opt, parts, [2])
    assert memory == [part.state_dict() for part in parts]


# ---- what is torch's, odd as it may be ----------------------------------------------------------------------


def test_construction_is_a_transition() -> None:
    opt = ready()
    first = ConstantLR(opt, 0.5)
    assert (rates(opt), first.last_epoch, first._step_count) == ([0.05, 0.25], 0, 1)
    # A second one starts from the same initial rates, not from what the first has made of them.
    second = LambdaLR(opt, lambda e: 1.0)
    assert (rates(opt), second.base_lrs) == ([0.1, 0.5], [0.1, 0.5])
    opt.param_groups[0]["lr"] = 0.7
    CyclicLR(opt, 0.01, 0.2)  # its first value, too, begins at "initial_lr"
    assert rates(opt) == [0.1, 0.5]


def test_the_state_of_a_scheduler_has_no_rates_to_write() -> None:
    opt = ready()
    sched = StepLR(opt, 1, 0.5)
    sched.step()
    other = ready()
    StepLR(other, 1, 0.5).load_state_dict(sched.state_dict())
    assert rates(other) == [0.1, 0.5]


def test_resuming_by_constructor_applies_a_factor_twice_at_its_epoch() -> None:
    opt = ready()
    StepLR(opt, 1, 0.1).step()
    StepLR(opt, 1, 0.1, last_epoch=0)
    assert rates(opt)[0] == pytest.approx(0.001)
    opt = ready()
    sched = ConstantLR(opt, 0.5, 2)
    for _ in range(2):
        sched.step()
    ConstantLR(opt, 0.5, 2, last_epoch=1)
    assert rates(opt)[0] == pytest.approx(0.2)
    opt = ready()
    sched = ExponentialLR(opt, 0.5)
    sched.step()
    again = ExponentialLR(opt, 0.5, last_epoch=0)
    assert (rates(opt)[0], again.last_epoch) == (0.05, 1)


def test_zero_epochs_of_warmup_stay_at_the_start() -> None:
    opt = ready()
    assert ran(opt, LinearLR(opt, 0.5, total_iters=0), 3) == [0.05] * 4
    opt = ready()
    assert ran(opt, ConstantLR(opt, 0.5, 0), 3) == [0.05] * 4
    opt = ready()
    assert ran(opt, PolynomialLR(opt, 0), 3) == [0.1] * 4
    # Their closed form divides by 0, which is refused where it would be needed.
    for cls in (LinearLR, PolynomialLR):
        opt = ready()
        message = f"total_iters must be a whole number >= 1 where {cls.__name__} begins by its closed form, got 0"
        with pytest.raises(ValueError, match=f"^SequentialLR: scheduler 1: {message}"):
            SequentialLR(opt, [StepLR(opt, 2), ChainedScheduler([cls(opt, total_iters=0)])], [4])
        with pytest.raises(ValueError, match=message), pytest.warns(UserWarning, match="epoch argument"):
            cls(opt, total_iters=0).step(3)
        SequentialLR(opt, [cls(opt, total_iters=0), StepLR(opt, 2)], [4])
        SequentialLR(opt, [StepLR(opt, 2), cls(opt, total_iters=0)], [0])


def test_the_cosine_rises_again() -> None:
    opt = ready()
    values = ran(opt, CosineAnnealingLR(opt, 4), 8)
    assert values == pytest.approx([cosine(0.1, 0.0, e / 4) for e in range(9)], abs=1e-15)


def test_warm_restarts_count_no_steps() -> None:
    opt = two_groups()
    sched = CosineAnnealingWarmRestarts(opt, 3)
    sched.step()  # before the optimizer's first, and no warning
    assert sched._step_count == 0


def test_cycles_turn_momentum_on() -> None:
    opt = stepped(SGD([np.zeros(1, np.float32)], lr=0.1))
    CyclicLR(opt, 0.01, 0.1)
    assert opt.param_groups[0]["momentum"] == 0.9
    OneCycleLR(opt, 0.1, 10)
    assert opt.param_groups[0]["momentum"] == 0.95
    adam = ready(cls=Adam)
    OneCycleLR(adam, 0.1, 10, max_momentum=0.6)
    assert [group["betas"] for group in adam.param_groups] == [(0.6, 0.999)] * 2


def test_one_cycle_overwrites_the_initial_rates() -> None:
    opt = ready()
    sched = OneCycleLR(opt, 0.3, 20)
    group = opt.param_groups[0]
    assert [group[k] for k in ("lr", "initial_lr", "max_lr")] == pytest.approx([0.012, 0.012, 0.3])
    assert [group[k] for k in ("min_lr", "max_momentum", "base_momentum")] == pytest.approx([1.2e-6, 0.95, 0.85])
    assert sched.base_lrs == [0.012, 0.012]
    opt = ready()
    sched = SequentialLR(opt, [ConstantLR(opt, 0.5), OneCycleLR(opt, 0.3, 20)], [3])
    assert rates(opt)[0] == pytest.approx(0.006)


def test_a_product_goes_on_from_whatever_was_before_its_milestone() -> None:
    opt = ready()
    sched = SequentialLR(opt, [ExponentialLR(opt, 0.5), MultiplicativeLR(opt, lambda e: 0.9)], [2])
    assert ran(opt, sched, 3) == pytest.approx([0.1, 0.05, 0.045, 0.0405])


def test_a_negative_best_metric_counts_the_wrong_way_in_mode_rel() -> None:
    opt = ready()
    sched = ReduceLROnPlateau(opt, patience=0, threshold=0.1)
    for value in (-1.0, -0.95, -0.9, -0.85):
        sched.step(value)
    assert (rates(opt), sched.best, sched.num_bad_epochs) == ([0.1, 0.5], -0.85, 0)
    sched = ReduceLROnPlateau(opt, patience=0, threshold=0.1, threshold_mode="abs")
    for value in (-1.0, -0.95):
        sched.step(value)
    assert rates(opt)[0] == pytest.approx(0.01)


GROUP_ADDED: dict[str, tuple[Spec, type[Exception] | None, int]] = {
    "StepLR": (["StepLR", {"step_size": 2}], None, 0),
    "MultiStepLR": (["MultiStepLR", {"milestones": [2]}], None, 0),
    "ConstantLR": (["ConstantLR", {}], None, 0),
    "LinearLR": (["LinearLR", {}], None, 0),
    "ExponentialLR": (["ExponentialLR", {"gamma": 0.9}], None, 0),
    "PolynomialLR": (["PolynomialLR", {}], None, 0),
    "LambdaLR": (["LambdaLR", {"lr_lambda": "inv"}], ValueError, 1),
    "MultiplicativeLR": (["MultiplicativeLR", {"lr_lambda": "inv"}], ValueError, 1),
    "CosineAnnealingLR": (["CosineAnnealingLR", {"T_max": 4}], ValueError, 5),
    "CosineAnnealingWarmRestarts": (["CosineAnnealingWarmRestarts", {"T_0": 4}], ValueError, 1),
    "CyclicLR": (["CyclicLR", {"base_lr": 0.1, "max_lr": 0.2}], ValueError, 1),
    "OneCycleLR": (["OneCycleLR", {"max_lr": 0.1, "total_steps": 9}], KeyError, 1),
    "SWALR": (["SWALR", {"swa_lr": 0.1}], KeyError, 1),
    "ReduceLROnPlateau": (["ReduceLROnPlateau", {"patience": 0}], None, 0),
    "SequentialLR": (sequence([["StepLR", {"step_size": 2}], ["LambdaLR", {"lr_lambda": "inv"}]], [3]), ValueError, 3),
    "ChainedScheduler": (["ChainedScheduler", {"schedulers": [["StepLR", {"step_size": 2}]]}], None, 0),
}


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_a_group_added_later(name: str) -> None:
    spec, kind, fails_at = GROUP_ADDED[name]
    opt, two = ready(), ready()
    sched, other = build(opt, spec), build(two, spec)
    opt.add_param_group({"params": [np.zeros(1, np.float32)], "lr": 0.1})
    for i in range(1, 8):
        if i == fails_at:
            before = rates(opt)
            with pytest.raises(roptim.RoptimError, match=r"^\w+.step: .* must be .*, got .*") as caught:
                sched.step()
            assert isinstance(caught.value, kind or Exception)
            assert rates(opt) == before
            return
        sched.step(*metric(spec, 1))
        other.step(*metric(spec, 1))
        assert rates(opt)[:2] == rates(two)
        if kind is None and name != "ReduceLROnPlateau":
            step = ["StepLR", "MultiStepLR", "ExponentialLR", "PolynomialLR", "ChainedScheduler"]
            if name in step:
                assert rates(opt)[2] == rates(two)[0]
        assert len(sched.get_last_lr()) == 3
    assert kind is None


def test_lists_per_group_may_be_tuples() -> None:
    def values(opt: Any, sched: Any) -> Any:
        for _ in range(3):
            sched.step()
        return rates(opt), momenta(opt)

    for make in (
        lambda o, seq: LambdaLR(o, seq([lambda e: 0.5**e, lambda e: 0.9**e])),
        lambda o, seq: CyclicLR(o, seq([0.1, 0.2]), seq([0.3, 0.5]), 4, base_momentum=seq([0.5, 0.6])),
        lambda o, seq: OneCycleLR(o, seq([0.1, 0.2]), 10, max_momentum=seq([0.9, 0.8])),
        lambda o, seq: SWALR(o, seq([0.1, 0.2])),
    ):
        a, b = ready(), ready()
        one, other = values(a, make(a, list)), values(b, make(b, tuple))
        assert one == other
        assert one[0][0] != one[0][1]


# ---- what is roptim's ---------------------------------------------------------------------------------------


def test_past_the_end_one_cycle_holds() -> None:
    """torch rises again in the step after the last, and raises in the one after that."""
    opt = ready()
    sched = OneCycleLR(opt, 0.1, 10)
    values = ran(opt, sched, 10)  # a step after each of ten batches is in order
    assert values[9] == values[10] == pytest.approx(4e-7)
    with pytest.warns(UserWarning, match="^OneCycleLR: step 11 is past the total_steps of 10; the last") as record:
        sched.step()
    assert record[0].filename == __file__
    assert ran(opt, sched, 5) == [values[9]] * 6  # warned once
    assert momenta(opt) == pytest.approx([0.95, 0.95])
    assert sched.last_epoch == 16


def test_plateaus_print_if_asked(capsys: pytest.CaptureFixture[str]) -> None:
    for verbose in (False, True):
        opt = ready()
        sched = ReduceLROnPlateau(opt, patience=0, min_lr=[0.0, 0.5], verbose=verbose)
        for _ in range(2):
            sched.step(1.0)
        lines = capsys.readouterr().out.splitlines()
        assert lines == ["ReduceLROnPlateau: epoch 2, lr of group 0 reduced to 1.0000e-02"] * verbose


def test_a_scheduler_of_ones_own_and_chaining() -> None:
    class Halving(LRScheduler):
        def get_lr(self) -> list[float]:
            return [base * 0.5**self.last_epoch for base in self.base_lrs]

    opt = ready(0.8, 0.4)
    sched = Halving(opt)
    sched.step()
    assert rates(opt) == [0.4, 0.2]
    first, second = StepLR(o := ready(0.8), 1, 0.5), StepLR(o, 2, 0.5)
    for _ in range(2):
        first.step()
        second.step()
    assert o.param_groups[0]["lr"] == pytest.approx(0.8 * 0.5**3)
    opt = ready(0.8)
    sched = SequentialLR(opt, [StepLR(opt, 5), Halving(opt)], [1])
    assert ran(opt, sched, 3) == [0.8, 0.8, 0.4, 0.2]


def test_the_step_takes_the_scheduled_rate() -> None:
    p = np.zeros(1)
    opt = SGD([p], lr=1.0)
    sched = StepLR(opt, 1, 0.5)
    for _ in range(3):
        opt.step([np.ones(1)])
        sched.step()
    assert p[0] == -1.75


def test_sparse_adam_at_a_rate_of_zero() -> None:
    p = np.ones((3, 2), np.float32)
    opt = roptim.SparseAdam([p], lr=0.1)
    sched = PolynomialLR(opt, 1)
    gradient = roptim.SparseGrad(np.array([1]), np.ones((1, 2), np.float32), (3, 2))
    opt.step([gradient])
    sched.step()
    before = p.copy()
    opt.step([gradient])
    assert rates(opt) == [0.0]
    assert np.array_equal(p, before)


@pytest.mark.parametrize("name", ["LBFGS", "ConjugateGradient"])
def test_closure_methods_take_schedules(name: str) -> None:
    """Their groups are one vector: group after group is written, and a step needs them equal."""
    a, b = np.ones(2), np.ones(3)
    opt = getattr(roptim, name)([{"params": [a]}, {"params": [b]}], lr=0.5, max_iter=1)

    def closure() -> Any:
        return float((a**2).sum() + (b**2).sum()), [2 * a, 2 * b]

    sched = SequentialLR(opt, [LinearLR(opt, 0.5, total_iters=2), CosineAnnealingLR(opt, 4)], [2])
    for _ in range(5):
        loss = opt.step(closure)
        sched.step()
        assert len(set(rates(opt))) == 1
    assert closure()[0] < loss
    with pytest.raises(ValueError, match="cycle_momentum must be False for an optimizer without momentum or betas"):
        OneCycleLR(opt, 0.1, 10)


# ---- warnings and errors ------------------------------------------------------------------------------------


def test_warnings() -> None:
    sched = StepLR(two_groups(), 3)
    with pytest.warns(UserWarning, match="before optimizer.step") as record:
        sched.step()
    assert record[0].filename == __file__
    sched.step()  # not again
    with pytest.warns(UserWarning, match="use get_last_lr"):
        sched.get_lr()
    opt = two_groups()
    sched = StepLR(opt, 3)
    stepped(opt)
    sched.step()
    stepped(opt)
    plateau = ReduceLROnPlateau(opt)
    with pytest.warns(UserWarning, match="epoch argument"):
        plateau.step(1.0, 5)
    assert plateau.last_epoch == 5
    for spec, _ in STATE_KEYS:
        if spec[0] not in ("SequentialLR", "ChainedScheduler", "ReduceLROnPlateau"):
            sched = build(ready(), spec)
            before = rates(sched.optimizer), momenta(sched.optimizer)
            with pytest.warns(UserWarning, match="use get_last_lr") as record:
                sched.get_lr()
            assert [warning.filename for warning in record] == [__file__]
            assert before == (rates(sched.optimizer), momenta(sched.optimizer))


def test_get_last_lr_is_a_copy() -> None:
    sched = StepLR(ready(), 3)
    sched.get_last_lr().append(5.0)
    assert sched.get_last_lr() == [0.1, 0.5]


def refusals() -> list[tuple[Callable[[Any], Any], type[Exception], str]]:
    """Constructor calls with the built-in class of torch's error, or of the one it ends in later, and the message."""
    value, kind, key = ValueError, TypeError, KeyError

    def other(o: Any) -> Any:
        return StepLR(ready(), 2)

    return [
        (lambda o: StepLR(None, 3), kind, "StepLR: optimizer must be an Optimizer, got an object of type NoneType"),
        (lambda o: LambdaLR(None, lambda e: 1), kind, "LambdaLR: optimizer must be an Optimizer"),
        (lambda o: CyclicLR(None, 1, 1), kind, "CyclicLR: optimizer must be an Optimizer"),
        (lambda o: OneCycleLR("x", 1, 5), kind, "OneCycleLR: optimizer must be an Optimizer"),
        (lambda o: SWALR(3, 1), kind, "SWALR: optimizer must be an Optimizer"),
        (lambda o: ReduceLROnPlateau(3), kind, "ReduceLROnPlateau: optimizer must be an Optimizer"),
        (lambda o: SequentialLR(3, [], []), kind, "SequentialLR: optimizer must be an Optimizer"),
        (lambda o: StepLR(o, 3, last_epoch=4), key, "StepLR: group 0 must be one with 'initial_lr' to resume, got"),
        (lambda o: OneCycleLR(o, 1, 9, last_epoch=4), key, "OneCycleLR: group 0 must be one with 'initial_lr'"),
        (lambda o: StepLR(o, 0), value, "StepLR: step_size must be a whole number >= 1, got 0"),
        (lambda o: StepLR(o, 1.5), value, "StepLR: step_size must be a whole number >= 1, got 1.5"),
        (lambda o: StepLR(o, 3, float("nan")), value, "StepLR: gamma must be a finite number, got nan"),
        (lambda o: StepLR(o, 3, "0.1"), kind, "StepLR: gamma must be a finite number, got '0.1'"),
        (lambda o: MultiStepLR(o, 3), kind, "MultiStepLR: milestones must be a list of whole numbers, got 3"),
        (lambda o: MultiStepLR(o, [1, -2]), value, "MultiStepLR: milestones must be a whole number >= 0, got -2"),
        (lambda o: ConstantLR(o, 1.5), value, r"ConstantLR: factor must be a number in \(0, 1\], got 1.5"),
        (lambda o: ConstantLR(o, 0.0), value, r"ConstantLR: factor must be a number in \(0, 1\], got 0.0"),
        (lambda o: ConstantLR(o, -0.5), value, "ConstantLR: factor must be"),
        (lambda o: ConstantLR(o, 0.5, -1), value, "ConstantLR: total_iters must be a whole number >= 0, got -1"),
        (lambda o: LinearLR(o, 0.0), value, r"LinearLR: start_factor must be a number in \(0, 1\], got 0.0"),
        (lambda o: LinearLR(o, 1.1), value, "LinearLR: start_factor must be"),
        (lambda o: LinearLR(o, end_factor=1.1), value, r"LinearLR: end_factor must be a number in \[0, 1\], got 1.1"),
        (lambda o: LinearLR(o, end_factor=-0.1), value, "LinearLR: end_factor must be"),
        (lambda o: PolynomialLR(o, 5, -1.0), value, "PolynomialLR: power must be a number >= 0, got -1.0"),
        (lambda o: CosineAnnealingLR(o, 0), value, "CosineAnnealingLR: T_max must be a whole number >= 1, got 0"),
        (lambda o: CosineAnnealingWarmRestarts(o, 0), value, "CosineAnnealingWarmRestarts: T_0 must be a whole number"),
        (lambda o: CosineAnnealingWarmRestarts(o, 1.5), value, "CosineAnnealingWarmRestarts: T_0 must be"),
        (lambda o: CosineAnnealingWarmRestarts(o, 5, 0), value, "CosineAnnealingWarmRestarts: T_mult must be"),
        (lambda o: CosineAnnealingWarmRestarts(o, 5, 1.5), value, "CosineAnnealingWarmRestarts: T_mult must be"),
        (lambda o: CosineAnnealingWarmRestarts(o, 5).step(-1), value, "CosineAnnealingWarmRestarts.step: epoch must"),
        (lambda o: StepLR(o, 5).step("x"), kind, "StepLR.step: epoch must be a number, got 'x'"),
        (lambda o: LambdaLR(o, [lambda e: 1]), value, "LambdaLR: lr_lambda must be 2 functions, got 1"),
        (lambda o: LambdaLR(o, 0.5), kind, "LambdaLR: lr_lambda must be a function or one per group, got an object"),
        (lambda o: MultiplicativeLR(o, [lambda e: 1] * 3), value, "MultiplicativeLR: lr_lambda must be 2 functions"),
        (lambda o: MultiplicativeLR(o, [lambda e: 1, 5]), kind, "MultiplicativeLR: lr_lambda must be a function"),
        (lambda o: CyclicLR(o, [0.1], 1), value, "CyclicLR: base_lr must be 2 numbers, got 1"),
        (lambda o: CyclicLR(o, 0.1, [1] * 3), value, "CyclicLR: max_lr must be 2 numbers, got 3"),
        (lambda o: CyclicLR(o, 0.1, 1, base_momentum=[1]), value, "CyclicLR: base_momentum must be 2 numbers, got 1"),
        (lambda o: CyclicLR(o, 0.1, 1, max_momentum=[1]), value, "CyclicLR: max_momentum must be 2 numbers, got 1"),
        (lambda o: CyclicLR(o, 0.1, 1, mode="x"), value, "CyclicLR: mode must be 'triangular' or 'triangular2' or"),
        (lambda o: CyclicLR(o, 0.1, 1, 0), value, "CyclicLR: step_size_up must be a number > 0, got 0"),
        (lambda o: CyclicLR(o, 0.1, 1, 5, -1), value, "CyclicLR: step_size_down must be a number >= 0, got -1"),
        (lambda o: CyclicLR(o, 0.1, 1, scale_fn=5), kind, "CyclicLR: scale_fn must be a function, got 5"),
        (lambda o: CyclicLR(o, 0.1, 1, scale_fn=abs, scale_mode="x"), value, "CyclicLR: scale_mode must be 'cycle' or"),
        (lambda o: OneCycleLR(o, 1), value, "OneCycleLR: total_steps must be given, or both epochs and"),
        (lambda o: OneCycleLR(o, 1, epochs=5), value, "OneCycleLR: total_steps must be given, or both"),
        (lambda o: OneCycleLR(o, 1, 0), value, "OneCycleLR: total_steps must be a whole number >= 1, got 0"),
        (lambda o: OneCycleLR(o, 1, 2.5), value, "OneCycleLR: total_steps must be"),
        (lambda o: OneCycleLR(o, 1, None, 0, 5), value, "OneCycleLR: epochs must be a whole number >= 1, got 0"),
        (lambda o: OneCycleLR(o, 1, None, 5, -1), value, "OneCycleLR: steps_per_epoch must be a whole number >= 1"),
        (lambda o: OneCycleLR(o, 1, 9, pct_start=1.5), value, r"OneCycleLR: pct_start must be a number in \[0, 1\]"),
        (lambda o: OneCycleLR(o, 1, 4, pct_start=0.25), value, "OneCycleLR: pct_start must be a part of total_steps"),
        (lambda o: OneCycleLR(o, 1, 9, anneal_strategy="x"), value, "OneCycleLR: anneal_strategy must be 'cos' or"),
        (lambda o: OneCycleLR(o, [1], 9), value, "OneCycleLR: max_lr must be 2 numbers, got 1"),
        (lambda o: OneCycleLR(o, 1, 9, div_factor=0), value, "OneCycleLR: div_factor must be a number > 0, got 0"),
        (lambda o: OneCycleLR(o, 1, 9, final_div_factor=0), value, "OneCycleLR: final_div_factor must be a number > 0"),
        (lambda o: SWALR(o, [1]), value, "SWALR: swa_lr must be 2 numbers, got 1"),
        (lambda o: SWALR(o, 1, -1), value, "SWALR: anneal_epochs must be a whole number >= 0, got -1"),
        (lambda o: SWALR(o, 1, 2.5), value, "SWALR: anneal_epochs must be a whole number >= 0, got 2.5"),
        (lambda o: SWALR(o, 1, 5, "x"), value, "SWALR: anneal_strategy must be 'cos' or 'linear', got 'x'"),
        (lambda o: SequentialLR(o, [], []), value, r"SequentialLR: schedulers must be a list of at least one"),
        (lambda o: SequentialLR(o, [5], []), kind, "SequentialLR: scheduler 0 must be an LRScheduler, got an object"),
        (lambda o: SequentialLR(o, [other(o)], []), value, "SequentialLR: scheduler 0 must be of the same optimizer"),
        (lambda o: SequentialLR(o, [ReduceLROnPlateau(o)], []), value, "SequentialLR: scheduler 0 must be one of"),
        (lambda o: SequentialLR(o, [StepLR(o, 2)], [3]), value, "SequentialLR: milestones must be one fewer than the"),
        (lambda o: SequentialLR(o, [StepLR(o, 2)], 3), kind, "SequentialLR: milestones must be a list of whole"),
        (lambda o: SequentialLR(o, [StepLR(o, 2)] * 3, [3, 2]), value, "SequentialLR: milestones must be ascending,"),
        (lambda o: SequentialLR(o, [StepLR(o, 2)], []).step(3), kind, ".*positional argument"),
        (lambda o: ChainedScheduler([]), value, "ChainedScheduler: schedulers must be a list of at least one"),
        (lambda o: ChainedScheduler([5], o), kind, "ChainedScheduler: scheduler 0 must be an LRScheduler"),
        (lambda o: ChainedScheduler([StepLR(o, 2), other(o)]), value, "ChainedScheduler: scheduler 1 must be of the"),
        (lambda o: ChainedScheduler([ReduceLROnPlateau(o)], o), value, "ChainedScheduler: scheduler 0 must be one of"),
        (lambda o: ReduceLROnPlateau(o, "up"), value, "ReduceLROnPlateau: mode must be 'min' or 'max', got 'up'"),
        (lambda o: ReduceLROnPlateau(o, factor=1.0), value, r"ReduceLROnPlateau: factor must be a number in \[0, 1\)"),
        (lambda o: ReduceLROnPlateau(o, threshold_mode="x"), value, "ReduceLROnPlateau: threshold_mode must be 'rel'"),
        (lambda o: ReduceLROnPlateau(o, min_lr=[0.1]), value, "ReduceLROnPlateau: min_lr must be 2 numbers, got 1"),
        (lambda o: ReduceLROnPlateau(o).step("1"), kind, "ReduceLROnPlateau.step: metrics must be a number, got '1'"),
        (lambda o: StepLR(o, 3, verbose=True), kind, ".*unexpected keyword argument 'verbose'"),
        (lambda o: StepLR(o, 2).load_state_dict({}), key, "StepLR.load_state_dict: state_dict must be a dict with"),
        (lambda o: ChainedScheduler([StepLR(o, 2)]).load_state_dict({}), key, "ChainedScheduler.load_state_dict:"),
    ]


@pytest.mark.parametrize(("call", "kind", "message"), refusals(), ids=[message[:40] for _, _, message in refusals()])
def test_refusals(call: Any, kind: type[Exception], message: str) -> None:
    opt = ready()
    with pytest.raises(kind, match=f"^{message}"), silent():
        call(opt)


@pytest.mark.parametrize("name", sorted(CLASSES - {"SequentialLR", "ChainedScheduler"}))
def test_a_rate_that_is_a_schedule_needs_no_scheduler(name: str) -> None:
    opt = two_groups(b=roptim.schedules.linear(0.1, 0.2, 5))  # type: ignore[arg-type]
    message = f"^{name}: lr of group 1 must be a number, got a schedule; assign a number to it first"
    with pytest.raises(ValueError, match=message):
        DOCUMENTED[name](opt)
    assert "initial_lr" not in opt.param_groups[0]
    opt.param_groups[1]["lr"] = 0.1
    DOCUMENTED[name](opt)


def test_the_base_class_has_no_values() -> None:
    with pytest.raises(NotImplementedError):
        LRScheduler(two_groups())
    sched = StepLR(opt := ready(), 2)
    with pytest.raises(NotImplementedError):
        SequentialLR(opt, [sched], []).get_lr()


def test_plateau_with_a_floor_per_group_and_a_group_added_later() -> None:
    opt = two_groups(1.0, 1.0)
    sched = ReduceLROnPlateau(opt, factor=0.1, patience=0, min_lr=[0.0, 0.5])
    for _ in range(3):
        sched.step(1.0)
    assert rates(opt) == pytest.approx([0.01, 0.5])
    opt.add_param_group({"params": [np.zeros(2, np.float32)], "lr": 1.0})
    before = sched.state_dict()
    with pytest.raises(
        RuntimeError, match=r"^ReduceLROnPlateau.step: min_lr must be one number per group, got 2 for 3"
    ):
        sched.step(1.0)
    assert sched.state_dict() == before
    opt = two_groups(1.0, 1.0)
    sched = ReduceLROnPlateau(opt, factor=0.1, patience=0)
    opt.add_param_group({"params": [np.zeros(2, np.float32)], "lr": 1.0})
    sched.step(1.0)
    sched.step(float("nan"))
    assert rates(opt) == pytest.approx([0.1] * 3)
    assert sched.in_cooldown is False


def test_what_a_schedule_writes_no_scheduler_does() -> None:
    schedule = roptim.schedules.linear(0.1, 0.0, 5)
    for kwargs, make, name in (
        ({"lr": schedule}, lambda opt: StepLR(opt, 3), "lr"),
        ({"momentum": schedule}, lambda opt: roptim.lr_scheduler.OneCycleLR(opt, 0.1, 10), "momentum"),
        ({"momentum": schedule}, lambda opt: roptim.lr_scheduler.CyclicLR(opt, 0.1, 0.2), "momentum"),
    ):
        opt = SGD([np.ones(2)], **{"lr": 0.1, **kwargs})
        before = dict(opt.param_groups[0])
        with pytest.raises(ValueError, match=f"{name} of group 0 must be a number, got a schedule; assign a number"):
            make(opt)
        assert dict(opt.param_groups[0]) == before
    opt = SGD([np.ones(2)], lr=schedule)
    opt.param_groups[0]["lr"] = 0.1
    StepLR(opt, 3)


def test_a_schedule_that_comes_later_stops_the_scheduler() -> None:
    """Assigned, loaded, or in a group that is added: a step refuses to end it."""
    schedule = roptim.schedules.cosine(10)
    saved = SGD([np.ones(2)], lr=schedule).state_dict()
    for spoil in (
        lambda opt: opt.param_groups[0].update(lr=schedule),
        lambda opt: opt.load_state_dict(saved),
        lambda opt: opt.add_param_group({"params": [np.ones(3)], "lr": schedule}),
    ):
        for make in (lambda opt: StepLR(opt, 1), lambda opt: ReduceLROnPlateau(opt, patience=0)):
            opt = SGD([np.ones(2)], lr=0.5)
            sched = make(opt)
            opt._step_called = True
            spoil(opt)
            index = len(opt.param_groups) - 1
            before, state = dict(opt.param_groups[index]), sched.state_dict()
            with pytest.raises(ValueError, match=f"lr of group {index} must be a number, got a schedule"):
                sched.step(*[1.0] * isinstance(sched, ReduceLROnPlateau))
            assert dict(opt.param_groups[index]) == before
            assert sched.state_dict() == state
            assert opt.state_dict()["roptim"]["schedules"][index]["lr"] == schedule.to_json()
    opt = SGD([np.ones(2)], lr=0.5)
    sched = roptim.lr_scheduler.OneCycleLR(opt, 0.1, 10)
    opt._step_called = True
    opt.param_groups[0]["momentum"] = roptim.schedules.linear(0.5, 0.9, 5)
    with pytest.raises(ValueError, match="momentum of group 0 must be a number, got a schedule"):
        sched.step()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))])
@pytest.mark.parametrize(
    "make",
    [
        lambda opt: roptim.lr_scheduler.LinearLR(opt, 0.25, total_iters=8),
        lambda opt: roptim.lr_scheduler.ConstantLR(opt, 0.5, total_iters=4),
        lambda opt: roptim.lr_scheduler.OneCycleLR(opt, 0.1, 20),
        lambda opt: StepLR(opt, 2),
    ],
)
@pytest.mark.filterwarnings("ignore:.*the groups keep")
def test_resume_from_a_copied_optimizer(make: Any, copied: Any) -> None:
    def values(opt: Any, sched: Any, steps: int) -> list[Any]:
        seen = []
        for _ in range(steps):
            opt.step([np.ones(2)])
            sched.step()
            seen.append((opt.param_groups[0]["lr"], opt.param_groups[0]["momentum"]))
        return seen

    for split in range(6):
        opt = SGD([np.ones(2)], lr=0.1, momentum=0.9)
        sched = make(opt)
        values(opt, sched, split)
        other = copied(opt)
        again = make(other)
        again.load_state_dict(sched.state_dict())
        assert values(other, again, 6) == values(opt, sched, 6)


def followed(sched: Any, steps: int) -> list[float]:
    """The rate of the first group at epochs 0, 1, and so on."""
    opt = sched.optimizer if hasattr(sched, "optimizer") else sched._schedulers[0].optimizer
    seen = [opt.param_groups[0]["lr"]]
    for _ in range(steps):
        opt.step([np.ones(2)])
        sched.step()
        seen.append(opt.param_groups[0]["lr"])
    return seen


@pytest.mark.filterwarnings("ignore:.*the groups keep", "ignore:.*total_steps")
def test_what_users_of_torch_reported_has_the_right_values() -> None:
    """Faults that torch does not tell of: the rate is another one than the schedule says."""
    linear, cosine = roptim.lr_scheduler.LinearLR, roptim.lr_scheduler.CosineAnnealingLR
    exponential, sequential = roptim.lr_scheduler.ExponentialLR, roptim.lr_scheduler.SequentialLR
    chained = roptim.lr_scheduler.ChainedScheduler

    def fresh() -> Any:
        return SGD([np.ones(2)], lr=1.0)

    # Building a scheduler on a loaded optimizer changes its rate; resumed runs jump or are one epoch off.
    opt = fresh()
    sched = linear(opt, 0.1, total_iters=10)
    want = followed(sched, 4)[-1]
    other = fresh()
    other.load_state_dict(opt.state_dict())
    again = linear(other, 0.1, total_iters=10)
    assert other.param_groups[0]["lr"] == want
    again.load_state_dict(sched.state_dict())
    assert followed(again, 12) == followed(sched, 12)
    # Warmup, then cosine, as one schedule: the cosine begins at the top, at the milestone.
    opt = fresh()
    both = followed(sequential(opt, [linear(opt, 0.1, total_iters=5), cosine(opt, 10)], [5]), 15)
    assert both == pytest.approx(
        [0.1 + 0.18 * e for e in range(5)] + [(1 + math.cos(math.pi * e / 10)) / 2 for e in range(11)]
    )
    # A chain that comes first in a sequence is one epoch ahead; later in it, it cannot be used.
    opt = fresh()
    ahead = followed(sequential(opt, [chained([exponential(opt, 0.5)]), exponential(opt, 0.9)], [3]), 5)
    assert ahead == pytest.approx([1, 0.5, 0.25, 1, 0.9, 0.81])
    opt = fresh()
    later = followed(sequential(opt, [exponential(opt, 0.9), chained([exponential(opt, 0.5)])], [2]), 4)
    assert later == pytest.approx([1, 0.9, 1, 0.5, 0.25])
    # Nesting is another way to write a sequence, and must not change it.
    opt = fresh()
    inner = sequential(opt, [linear(opt, 0.5, total_iters=2), exponential(opt, 0.9)], [2])
    nested = followed(sequential(opt, [inner, exponential(opt, 0.5)], [5]), 9)
    opt = fresh()
    flat = [linear(opt, 0.5, total_iters=2), exponential(opt, 0.9), exponential(opt, 0.5)]
    assert nested == followed(sequential(opt, flat, [2, 5]), 9)
    # A run that goes on past the end of one-cycle rebounds, then dies.
    opt = fresh()
    cycle = followed(roptim.lr_scheduler.OneCycleLR(opt, 1.0, 10), 14)
    assert cycle[9:] == [cycle[9]] * 6
    assert cycle[9] == pytest.approx(1 / 25 / 1e4)


def test_a_state_of_another_class_is_refused() -> None:
    def made(name: str) -> Any:
        opt = roptim.SGD([np.ones(1)], lr=0.1, momentum=0.9)
        arguments: dict[str, Any] = {
            "StepLR": {"step_size": 3},
            "MultiStepLR": {"milestones": [2]},
            "ExponentialLR": {"gamma": 0.9},
            "PolynomialLR": {},
            "CosineAnnealingLR": {"T_max": 5},
            "CosineAnnealingWarmRestarts": {"T_0": 5},
            "ReduceLROnPlateau": {},
            "OneCycleLR": {"max_lr": 0.2, "total_steps": 9},
        }
        return getattr(roptim.lr_scheduler, name)(opt, **arguments[name])

    names = [
        "StepLR",
        "MultiStepLR",
        "ExponentialLR",
        "PolynomialLR",
        "CosineAnnealingLR",
        "CosineAnnealingWarmRestarts",
    ]
    names += ["ReduceLROnPlateau", "OneCycleLR"]
    for source in names:
        for target in names:
            scheduler = made(target)
            before = repr(scheduler.state_dict())
            if source == target:
                scheduler.load_state_dict(made(source).state_dict())
            else:
                with pytest.raises(roptim.RoptimError, match=rf"^{target}.load_state_dict: "):
                    scheduler.load_state_dict(made(source).state_dict())
                assert repr(scheduler.state_dict()) == before


@pytest.mark.parametrize(
    ("name", "arguments", "later"),
    [
        ("ReduceLROnPlateau", {}, "default_min_lr"),
        ("CyclicLR", {"base_lr": 0.1, "max_lr": 0.2}, "use_beta1"),
        ("StepLR", {"step_size": 3}, "_is_initial"),
    ],
)
def test_what_came_with_a_later_version_may_be_missing(name: str, arguments: dict[str, Any], later: str) -> None:
    def made() -> Any:
        return getattr(roptim.lr_scheduler, name)(roptim.SGD([np.ones(1)], lr=0.1, momentum=0.9), **arguments)

    state = made().state_dict()
    assert state.pop(later, None) is not None
    scheduler = made()
    scheduler.note = "an attribute of one's own"
    scheduler.load_state_dict(state)
    assert scheduler.last_epoch == state["last_epoch"]
