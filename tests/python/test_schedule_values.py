"""Schedules as values: against their formulas in plain arithmetic, as text, and as hyperparameters."""

from __future__ import annotations

import bisect
import copy
import json
import math
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import step
from hypothesis import given, settings
from hypothesis import strategies as st

import roptim
from roptim import LBFGS, SGD, Adafactor, Adam, AdamW, schedules
from roptim._errors import told
from roptim.optimizer import REGISTRY
from roptim.schedules import (
    Schedule,
    constant,
    cosine,
    cyclic,
    exponential,
    inverse_sqrt,
    linear,
    one_cycle,
    piecewise,
    polynomial,
    sequence,
    sqrt_decay,
    warm_restarts,
    warmup,
    warmup_stable_decay,
)

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "schedules.json").read_text())
FAR = (2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1)

# ---- formulas, written again --------------------------------------------------------------------------------


def line(start: float, end: float, steps: int) -> Callable[[int], float]:
    return lambda t: start + (end - start) * (min(t, steps) / steps)


def power_of_the_rest(steps: int, peak: float, floor: float, power: float) -> Callable[[int], float]:
    return lambda t: floor + (peak - floor) * (1 - min(t, steps) / steps) ** power


def falling_cosine(steps: int, peak: float, floor: float) -> Callable[[int], float]:
    return lambda t: floor + (peak - floor) * (1 + math.cos(math.pi * (min(t, steps) / steps))) / 2


def one_minus_root(steps: int, peak: float, floor: float) -> Callable[[int], float]:
    return lambda t: floor + (peak - floor) * (1 - math.sqrt(min(t, steps) / steps))


def restarted(t: int, first: int, mult: int, peak: float, floor: float) -> float:
    length = first
    if mult == 1:
        t %= first
    while t >= length:
        t -= length
        length *= mult
    return floor + (peak - floor) * (1 + math.cos(math.pi * (t / length))) / 2


def triangles(
    t: int, up: int, down: int, base: float, peak: float, mode: str = "triangular", gamma: float = 1
) -> float:
    cycle, rest = divmod(t, up + down)
    height = rest / up if rest <= up else (up + down - rest) / down
    return base + (peak - base) * height * {"triangular": 1.0, "triangular2": 0.5**cycle, "exp_range": gamma**t}[mode]


def up_and_down(
    t: int, steps: int, peak: float, pct: float, div: float, final: float, three_phase: bool, anneal: str
) -> float:
    low, lowest = peak / div, peak / div / final
    phases = [(pct * steps - 1, low, peak)]
    phases += [(2 * pct * steps - 2, peak, low), (steps - 1, low, lowest)] if three_phase else []
    phases += [] if three_phase else [(steps - 1, peak, lowest)]
    t, begin = min(t, steps - 1), 0.0
    for end, a, b in phases:  # noqa: B007  # the phase that it stops at
        if t <= end:
            break
        begin = end
    part = (t - begin) / (end - begin)
    return a + (b - a) * part if anneal == "linear" else a + (b - a) * (1 - math.cos(math.pi * part)) / 2


def knots(t: int, points: dict[int, float], lines: bool) -> float:
    if lines:
        return float(np.interp(t, list(points), list(points.values())))
    return list(points.values())[bisect.bisect_right(list(points), t) - 1]


def stable(t: int, up: int, along: int, tail: Callable[[int], float], peak: float) -> float:
    if t < up:
        return peak * t / up
    return peak if t < up + along else tail(t - up - along)


POINTS = {0: 0.5, 3: -1.0, 4: 2.0, 9: 0.25}
#: Schedule, formula, length.
CASES: dict[str, tuple[Schedule, Callable[[int], float], int | None]] = {
    "constant": (constant(0.3), lambda t: 0.3, None),
    "constant with length": (constant(-2, steps=5), lambda t: -2.0, 5),
    "linear": (linear(0.1, 0.7, 7), line(0.1, 0.7, 7), 7),
    "linear down": (linear(start=3, end=-1, steps=1), line(3, -1, 1), 1),
    "linear of numpy's numbers": (linear(np.float32(0.5), np.int8(2), np.int64(3)), line(0.5, 2, 3), 3),
    "warmup": (warmup(6), line(0, 1, 6), 6),
    "warmup from elsewhere": (warmup(5, peak=0.3, start=0.01), line(0.01, 0.3, 5), 5),
    "polynomial": (polynomial(8), power_of_the_rest(8, 1, 0, 1), 8),
    "polynomial, a root": (polynomial(9, 0.7, 0.1, 0.5), power_of_the_rest(9, 0.7, 0.1, 0.5), 9),
    "polynomial, cubic": (polynomial(11, peak=2.0, floor=-1.0, power=3.0), power_of_the_rest(11, 2, -1, 3), 11),
    "polynomial, flat": (polynomial(4, 2.0, 1.0, 0), lambda t: 2.0, 4),
    "exponential": (exponential(0.9), lambda t: 0.9**t, None),
    "exponential with length": (exponential(1.5, start=0.2, steps=9), lambda t: 0.2 * 1.5 ** min(t, 9), 9),
    "exponential of nothing": (exponential(0.0, 3.0), lambda t: 3.0 if t == 0 else 0.0, None),
    "step": (schedules.step(3), lambda t: 0.1 ** (t // 3), None),
    "step, halves": (schedules.step(every=4, gamma=0.5, start=0.3), lambda t: 0.3 * 0.5 ** (t // 4), None),
    "cosine": (cosine(10), falling_cosine(10, 1, 0), 10),
    "cosine to a floor": (cosine(7, 0.3, 1e-5), falling_cosine(7, 0.3, 1e-5), 7),
    "cosine up": (cosine(1, peak=0.0, floor=1.0), falling_cosine(1, 0, 1), 1),
    "sqrt_decay": (sqrt_decay(9), one_minus_root(9, 1, 0), 9),
    "sqrt_decay to a floor": (sqrt_decay(6, peak=0.5, floor=0.05), one_minus_root(6, 0.5, 0.05), 6),
    "inverse_sqrt": (inverse_sqrt(4), lambda t: math.sqrt(4 / (4 + t)), None),
    "inverse_sqrt, higher": (inverse_sqrt(100, peak=3.0), lambda t: 3 * math.sqrt(100 / (100 + t)), None),
    "warm_restarts": (warm_restarts(5), lambda t: restarted(t, 5, 1, 1, 0), None),
    "warm_restarts, longer": (warm_restarts(3, 2, 0.8, 0.1), lambda t: restarted(t, 3, 2, 0.8, 0.1), None),
    "warm_restarts of one": (warm_restarts(1, mult=3), lambda t: restarted(t, 1, 3, 1, 0), None),
    "one_cycle": (one_cycle(20), lambda t: up_and_down(t, 20, 1, 0.3, 25, 1e4, False, "cos"), 20),
    "one_cycle in three phases": (
        one_cycle(25, peak=0.5, pct_start=0.4, div_factor=10, final_div_factor=100.0, three_phase=True),
        lambda t: up_and_down(t, 25, 0.5, 0.4, 10, 100, True, "cos"),
        25,
    ),
    "one_cycle along lines": (
        one_cycle(17, 2.0, 0.25, 4, 8, anneal="linear"),
        lambda t: up_and_down(t, 17, 2, 0.25, 4, 8, False, "linear"),
        17,
    ),
    "one_cycle in three phases along lines": (
        one_cycle(10, three_phase=np.bool_(True), anneal="linear"),
        lambda t: up_and_down(t, 10, 1, 0.3, 25, 1e4, True, "linear"),
        10,
    ),
    "cyclic": (cyclic(4), lambda t: triangles(t, 4, 4, 0.1, 1), None),
    "cyclic, lopsided": (cyclic(3, 5, 0.2, 0.6), lambda t: triangles(t, 3, 5, 0.2, 0.6), None),
    "cyclic, halved": (
        cyclic(2, base=0.1, peak=0.9, mode="triangular2"),
        lambda t: triangles(t, 2, 2, 0.1, 0.9, "triangular2"),
        None,
    ),
    "cyclic, fading": (
        cyclic(1, 3, mode="exp_range", gamma=0.9),
        lambda t: triangles(t, 1, 3, 0.1, 1, "exp_range", 0.9),
        None,
    ),
    "piecewise": (piecewise(POINTS), lambda t: knots(t, POINTS, True), 9),
    "piecewise, held": (piecewise(POINTS.items(), lines=False), lambda t: knots(t, POINTS, False), 9),
    "piecewise of one": (piecewise([(0, 4)]), lambda t: 4.0, 0),
    "piecewise of numpy's numbers": (
        piecewise(zip(np.array([0, 2]), np.array([1.0, 2.0]), strict=True)),
        lambda t: knots(t, {0: 1.0, 2: 2.0}, True),
        2,
    ),
    "warmup_stable_decay": (
        warmup_stable_decay(3, 4, 5),
        lambda t: stable(t, 3, 4, line(1, 0, 5), 1),
        12,
    ),
    "warmup_stable_decay, a root": (
        warmup_stable_decay(2, 3, 8, "sqrt", 0.4, 0.02),
        lambda t: stable(t, 2, 3, one_minus_root(8, 0.4, 0.02), 0.4),
        13,
    ),
    "warmup_stable_decay, a cosine": (
        warmup_stable_decay(1, 1, 6, tail="cosine", peak=2.0, floor=1.0),
        lambda t: stable(t, 1, 1, falling_cosine(6, 2, 1), 2),
        8,
    ),
    "the transformer's": (
        0.5 * warmup(4).then(inverse_sqrt(4)),
        lambda t: 0.5 * (t / 4 if t < 4 else math.sqrt(4 / t)),
        None,
    ),
}
#: Those that are exact afar only where a period begins.
AFAR = {"cyclic": FAR[::3], "cyclic, lopsided": FAR[::3], "cyclic, halved": FAR[::3], "cyclic, fading": FAR[::3]}
AFAR["warm_restarts of one"] = FAR[:-1]


def near(got: float, want: float, scale: float = 1.0) -> bool:
    return type(got) is float and math.isclose(got, want, rel_tol=1e-14, abs_tol=1e-15 * scale)


@pytest.mark.parametrize("name", CASES)
def test_values_follow_the_formula(name: str) -> None:
    schedule, formula, length = CASES[name]
    assert schedule.length == length
    n = 70 if length is None else length
    for t in [*range(n + 20), *AFAR.get(name, FAR)]:
        assert near(schedule(t), formula(t)), t
    if length is not None:
        last = schedule(length)
        assert [schedule(t) for t in (length + 1, 3 * length + 7, *FAR)] == [last] * (2 + len(FAR)), "held"
    for count in (0, 1, n - 1, n, n + 1, n + 9):
        values = schedule.values(max(count, 0))
        assert (values.dtype, values.shape) == (np.float64, (max(count, 0),))
        assert values.tolist() == [schedule(t) for t in range(count)]
    for start in (1, max(n - 1, 0), n, n + 1, 2**63, 2**64 - 5):
        assert schedule.values(4, start).tolist() == [schedule(start + i) for i in range(4)]
    assert schedule.values(n=np.int32(2), start=np.uint8(1)).tolist() == [schedule(1), schedule(2)]


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if name != "polynomial, flat"])
def test_ends_are_exact(name: str) -> None:
    """The numbers at the ends are those that were written down, to the last bit."""
    schedule = CASES[name][0]
    ((kind, fields),) = json.loads(schedule.to_json()).items()
    ends = {
        "linear": ("start", "end"),
        "polynomial": (None, "floor"),
        "cosine": (None, "floor"),
        "sqrt_decay": (None, "floor"),
        "exponential": ("start", None),
        "step": ("start", None),
        "inverse_sqrt": ("peak", None),
        "cyclic": ("base", None),
    }
    first, last = ends.get(kind, (None, None))
    if first is not None:
        assert schedule(0) == fields[first]
    if last is not None:
        assert schedule(schedule.length or 0) == schedule(2**63) == fields[last]
    if kind == "piecewise":
        for t, value in fields["points"]:
            assert schedule(t) == value


@pytest.mark.parametrize("group", [0, 1])
def test_values_are_torchs(group: int) -> None:
    """Recorded runs of torch's schedulers, which are functions of the epoch."""
    start = (0.1, 0.5)[group]

    def chosen(value: Any) -> Any:
        return value[group] if isinstance(value, list) else value

    def of(name: str, kw: dict[str, Any]) -> tuple[Schedule, int | None] | None:
        if name == "StepLR":
            return schedules.step(kw["step_size"], kw["gamma"], start), None
        if name == "ConstantLR":
            return constant(kw["factor"] * start, kw["total_iters"]).then(start), None
        if name == "LinearLR":
            return start * linear(kw["start_factor"], kw["end_factor"], kw["total_iters"]), None
        if name == "ExponentialLR":
            return exponential(kw["gamma"], start), None
        if name == "CosineAnnealingLR":
            return cosine(kw["T_max"], start, kw["eta_min"]), kw["T_max"]  # torch's rises again
        if name == "PolynomialLR":
            return polynomial(kw["total_iters"], start, power=kw["power"]), None
        if name == "CosineAnnealingWarmRestarts":
            return warm_restarts(kw["T_0"], kw["T_mult"], start, kw["eta_min"]), None
        if name == "CyclicLR":
            waves = [kw["step_size_up"], kw.get("step_size_down"), chosen(kw["base_lr"]), chosen(kw["max_lr"])]
            return cyclic(*waves, kw.get("mode", "triangular"), kw.get("gamma", 1.0)), None
        if name == "OneCycleLR":
            steps = kw.get("total_steps") or kw["epochs"] * kw["steps_per_epoch"]
            shape = {"three_phase": kw.get("three_phase", False), "anneal": kw.get("anneal_strategy", "cos")}
            return one_cycle(steps, chosen(kw["max_lr"]), **shape), steps - 1
        return None

    met = 0
    for case in VECTORS["cases"]:
        found = of(*case["spec"])
        if found is None:
            continue
        schedule, last = found
        trace = case["trace"] if last is None else case["trace"][: last + 1]
        for t, now in enumerate(trace):
            assert schedule(t) == pytest.approx(now[group][0], rel=1e-12, abs=1e-15), (case["spec"], t)
        met += len(trace)
    assert met > 150


@given(st.integers(0, 2**64 - 1), st.integers(1, 2**40), st.integers(1, 2**40), st.integers(1, 5))
def test_any_t_has_a_value_within_the_bounds(t: int, up: int, down: int, mult: int) -> None:
    for schedule in (
        cyclic(up, down, -0.5, 2.0),
        cyclic(up, down, -0.5, 2.0, "triangular2"),
        cyclic(up, down, -0.5, 2.0, "exp_range", 0.999),
        warm_restarts(up, mult, 2.0, -0.5),
        cosine(up, 2.0, -0.5),
        linear(-0.5, 2.0, up),
        sqrt_decay(up, 2.0, -0.5),
        polynomial(up, 2.0, -0.5, 0.3),
        inverse_sqrt(up, 2.0),
        one_cycle(up + 9, 2.0),
        one_cycle(up + 9, 2.0, three_phase=True, anneal="linear"),
    ):
        assert -0.5 - 1e-9 <= schedule(t) <= 2.0 + 1e-9


# ---- the algebra --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """A schedule beside its meaning: the value at t in plain arithmetic, and the length."""

    schedule: Schedule
    at: Callable[[int], float]
    length: int | None

    def __repr__(self) -> str:
        return repr(self.schedule)

    def then(self, other: Model) -> Model:
        n = self.length
        assert n is not None
        length = None if other.length is None else n + other.length
        return Model(self.schedule.then(other.schedule), lambda t: self.at(t) if t < n else other.at(t - n), length)

    def times(self, other: Model) -> Model:
        both = (self.length, other.length)
        length = None if None in both else max(n for n in both if n is not None)
        return Model(self.schedule * other.schedule, lambda t: self.at(t) * other.at(t), length)

    def scaled(self, factor: float, from_the_left: bool) -> Model:
        schedule = factor * self.schedule if from_the_left else self.schedule * factor
        return Model(schedule, lambda t: factor * self.at(t), self.length)

    def clipped(self, low: float | None, high: float | None) -> Model:
        below, above = -math.inf if low is None else low, math.inf if high is None else high
        return Model(self.schedule.clip(low, high), lambda t: min(max(self.at(t), below), above), self.length)

    def shifted(self, by: int) -> Model:
        length = None if self.length is None else max(self.length + by, 0)
        return Model(self.schedule.shift(by), lambda t: self.at(max(t - by, 0)), length)


def leaves() -> st.SearchStrategy[Model]:
    x, n = st.floats(-2, 2), st.integers(1, 12)
    pieces = st.lists(st.tuples(st.integers(1, 4), x), max_size=4)

    def points(first: float, later: list[tuple[int, float]], lines: bool) -> Model:
        t, out = 0, {0: first}
        for gap, value in later:
            t += gap
            out[t] = value
        return Model(piecewise(out, lines), lambda at: knots(at, out, lines), t)

    def cycle(steps: int, peak: float, three: bool, anneal: str) -> Model:
        schedule = one_cycle(steps, peak, three_phase=three, anneal=anneal)
        return Model(schedule, lambda t: up_and_down(t, steps, peak, 0.3, 25, 1e4, three, anneal), steps)

    return st.one_of(
        st.builds(lambda v, k: Model(constant(v, k), lambda t: v, k), x, n),
        st.builds(lambda a, b, k: Model(linear(a, b, k), line(a, b, k), k), x, x, n),
        st.builds(
            lambda a, b, k, p: Model(polynomial(k, a, b, p), power_of_the_rest(k, a, b, p), k), x, x, n, st.floats(0, 3)
        ),
        st.builds(
            lambda a, g, k: Model(exponential(g, a, k), lambda t: a * g ** min(t, k), k), x, st.floats(0, 1.5), n
        ),
        st.builds(lambda a, b, k: Model(cosine(k, a, b), falling_cosine(k, a, b), k), x, x, n),
        st.builds(lambda a, b, k: Model(sqrt_decay(k, a, b), one_minus_root(k, a, b), k), x, x, n),
        st.builds(cycle, st.integers(7, 20), x, st.booleans(), st.sampled_from(["cos", "linear"])),
        st.builds(points, x, pieces, st.booleans()),
    )


def endless() -> st.SearchStrategy[Model]:
    x, n = st.floats(-2, 2), st.integers(1, 6)
    modes = st.sampled_from(["triangular", "triangular2", "exp_range"])
    return st.one_of(
        st.builds(
            lambda a, g, k: Model(schedules.step(k, g, a), lambda t: a * g ** (t // k), None), x, st.floats(0, 1), n
        ),
        st.builds(lambda a, g: Model(exponential(g, a), lambda t: a * g**t, None), x, st.floats(0, 1)),
        st.builds(lambda a, k: Model(inverse_sqrt(k, a), lambda t: a * math.sqrt(k / (k + t)), None), x, n),
        st.builds(
            lambda a, b, k, m: Model(warm_restarts(k, m, a, b), lambda t: restarted(t, k, m, a, b), None), x, x, n, n
        ),
        st.builds(
            lambda a, b, k, m, mode: Model(
                cyclic(k, m, a, b, mode, 0.9), lambda t: triangles(t, k, m, a, b, mode, 0.9), None
            ),
            x,
            x,
            n,
            n,
            modes,
        ),
    )


def expressions() -> st.SearchStrategy[Model]:
    """Any schedule with an end, made of several."""
    bound = st.one_of(st.none(), st.floats(0, 1))

    def larger(inner: st.SearchStrategy[Model]) -> st.SearchStrategy[Model]:
        return st.one_of(
            st.builds(Model.then, inner, inner),
            st.builds(Model.times, inner, inner),
            st.builds(Model.scaled, inner, st.floats(-3, 3), st.booleans()),
            st.builds(lambda m, low, high: m.clipped(None if low is None else -low, high), inner, bound, bound),
            st.builds(Model.shifted, inner, st.integers(-15, 15)),
        )

    return st.recursive(leaves(), larger, max_leaves=6)


def any_schedule() -> st.SearchStrategy[Model]:
    with_end, without = expressions(), endless()
    return st.one_of(
        with_end,
        without,
        st.builds(Model.then, with_end, without),
        st.builds(Model.times, without, with_end),
        st.builds(lambda m, by: m.shifted(by).clipped(-1, 1).scaled(0.5, True), without, st.integers(-15, 15)),
    )


@given(any_schedule())
def test_expressions_mean_what_they_say(model: Model) -> None:
    schedule = model.schedule
    assert schedule.length == model.length
    n = 30 if model.length is None else model.length
    wanted = [model.at(t) for t in range(n + 5)]
    scale = max(1.0, *map(abs, wanted))
    for t, want in enumerate(wanted):
        assert math.isclose(schedule(t), want, rel_tol=1e-12, abs_tol=1e-12 * scale), t
    assert schedule.values(n + 5).tolist() == [schedule(t) for t in range(n + 5)]
    if model.length is not None:
        assert {schedule(n + later) for later in (1, 17, 2**32)} | {schedule(2**64 - 1)} == {schedule(n)}


@given(any_schedule(), any_schedule())
def test_text_and_copies(model: Model, other: Model) -> None:
    schedule = model.schedule
    text = schedule.to_json()
    json.loads(text, parse_constant=pytest.fail)
    expression, curve = repr(schedule).rsplit("  ", 1)
    again = [
        Schedule.from_json(text),
        Schedule.from_json(json.dumps(json.loads(text), indent=1)),
        pickle.loads(pickle.dumps(schedule)),
        copy.deepcopy(schedule),
        copy.copy(schedule),
        eval(expression, vars(schedules)),
    ]
    ts = [*range(20), 2**63]
    for each in again:
        assert type(each) is Schedule
        assert each == schedule
        assert (each != schedule) is False
        assert hash(each) == hash(schedule)
        assert each.to_json() == text
        assert [each(t) for t in ts] == [schedule(t) for t in ts]
    assert len(curve) == 24
    assert set(curve) <= set("▁▂▃▄▅▆▇█")
    assert (schedule == other.schedule) == (json.loads(text) == json.loads(other.schedule.to_json()))
    assert len({schedule, *again}) == 1


@given(expressions(), expressions(), any_schedule(), st.integers(0, 60))
def test_laws_of_then(a: Model, b: Model, c: Model, t: int) -> None:
    n = a.length
    assert n is not None
    both = a.schedule.then(b.schedule)
    assert both(t) == (a.schedule(t) if t < n else b.schedule(t - n))
    left, right = both.then(c.schedule), a.schedule.then(b.schedule.then(c.schedule))
    assert left == right == sequence(a.schedule, b.schedule, c.schedule) == sequence(both, c.schedule)
    assert sequence(sequence(a.schedule, b.schedule), sequence(c.schedule)) == left
    assert sequence(c.schedule) == c.schedule
    assert left(n) == b.schedule(0) if b.length else left(n) == c.schedule(0)


def test_boundaries_of_then() -> None:
    both = linear(5, 6, 3).then(constant(7, 2)).then(linear(8, 9, 2)).then(1)
    assert both.values(9).tolist() == [5, 5 + 1 / 3, 5 + 2 / 3, 7, 7, 8, 8.5, 1, 1], "6 and 9 are never reached"
    assert both.length is None, "a number has no end"
    assert linear(5, 6, 3).then(linear(6, 7, 2)).values(7).tolist() == [5, 5 + 1 / 3, 5 + 2 / 3, 6, 6.5, 7, 7]
    assert piecewise({0: 3.0}).then(linear(0, 1, 2)).values(3).tolist() == [0, 0.5, 1], "of length 0"
    lr = 1e-3 * warmup(500).then(cosine(9500, floor=0.01))
    assert (lr(0), lr(500), lr(10_000), lr(10_001), lr(2**63)) == (0.0, 1e-3, 1e-5, 1e-5, 1e-5)
    assert lr.length == 10_000
    assert sequence(1.5) == constant(1.5)
    assert sequence(
        warmup(3),
        2,
    ) == warmup(3).then(constant(2.0))


def test_products() -> None:
    s = linear(1, 2, 4)
    want = [2, 2.5, 3, 3.5, 4, 4]
    factors: list[Any] = [2, 2.0, np.float64(2), np.float32(2), np.int8(2), constant(2)]
    for factor in factors:
        assert (factor * s).values(6).tolist() == (s * factor).values(6).tolist() == want
        assert (factor * s).length == (s * factor).length == 4, "a number has no length of its own in a product"
    assert (s * s).values(6).tolist() == [x * x for x in (1, 1.25, 1.5, 1.75, 2, 2)]
    assert (s * linear(1, 0, 8)).length == 8
    assert (s * inverse_sqrt(3)).length is None
    assert (2 * s * 3).then(s).values(6, 3).tolist() == [10.5, 1, 1.25, 1.5, 1.75, 2]
    assert s * 2 != 2 * cosine(4)
    for wrong in (True, "x", None, [1], 1j, np.ones(2), np.array(2.0)):
        with pytest.raises(TypeError):
            s * wrong
        with pytest.raises(TypeError):
            wrong * s


def test_clip_and_shift() -> None:
    s = linear(-1, 3, 4)
    assert s.clip(0, 2).values(6).tolist() == [0, 0, 1, 2, 2, 2]
    assert s.clip(low=0).values(5).tolist() == [0, 0, 1, 2, 3]
    assert s.clip(high=np.float32(0.5)).values(5).tolist() == [-1, 0, 0.5, 0.5, 0.5]
    assert s.clip(1, 1).values(3).tolist() == [1, 1, 1]
    assert s.clip().values(5).tolist() == s.values(5).tolist()
    assert s.shift(2).values(8).tolist() == [-1, -1, -1, 0, 1, 2, 3, 3]
    assert s.shift(2).length == 6
    assert s.shift(-3).values(3).tolist() == [2, 3, 3]
    assert (s.shift(-3).length, s.shift(-4).length, s.shift(-9).length) == (1, 0, 0)
    assert s.shift(-9).then(s)(0) == -1
    assert inverse_sqrt(4).shift(np.int64(7)).length is None
    assert inverse_sqrt(4).shift(-12)(0) == 0.5
    assert s.shift(2**63 - 1)(2**63 - 1) == -1
    assert s.shift(2**63 - 1)(2**63 + 3) == 3
    assert s.shift(-(2**62))(0) == 3
    assert s.shift(1).shift(-1).values(5).tolist() == s.values(5).tolist()
    assert s.shift(-1).shift(1).values(5).tolist() == [0, 0, 1, 2, 3], "what is gone is gone"


def test_a_number_times_a_number_is_as_endless_as_either() -> None:
    product = 2 * constant(3.0)
    assert product(0) == product(2**63) == 6.0
    assert product.length is None
    with pytest.raises(roptim.RoptimValueError, match="schedules but the last must be of some length"):
        product.then(warmup(3))


def test_equality_and_hash() -> None:
    assert constant(1) == constant(1.0) == constant(np.float32(1))
    assert linear(0, 1, 3) == warmup(3)
    assert linear(0, 1, 3) != linear(0, 1, 4)
    assert linear(0, 1, 3) != polynomial(3, 0, 1)
    assert constant(1) != 1
    assert (constant(1) == "x") is False
    assert {linear(0, 1, 3): "a"}[warmup(3)] == "a"
    with pytest.raises(AttributeError):
        warmup(3).steps = 4  # type: ignore[attr-defined]


def test_what_is_equal_has_one_hash() -> None:
    assert constant(0.0) == constant(-0.0)
    assert hash(constant(0.0)) == hash(constant(-0.0))


def test_curves_as_text() -> None:
    assert linear(0, 7, 7).sparkline(8) == "▁▂▃▄▅▆▇█"
    assert linear(7, 0, 7).sparkline(8) == "█▇▆▅▄▃▂▁"
    assert constant(3).sparkline(5) == "▁▁▁▁▁"
    assert cosine(100).sparkline(1) == "▁"
    assert repr(linear(0, 7, 7)).startswith("linear(start=0.0, end=7.0, steps=7)  ▁▁▁")
    assert repr(0.5 * warmup(2).then(cosine(8))).startswith(
        "linear(start=0.0, end=1.0, steps=2).then(cosine(peak=1.0, floor=0.0, steps=8)) * 0.5  "
    )


@pytest.mark.parametrize(
    "schedule",
    [
        constant(2) * constant(3),
        2 * constant(3) * warmup(4),
        (2 * constant(3)).clip(high=5),
        warmup(3).then(2 * constant(3)),
        constant(2).shift(1) * 4,
    ],
    ids=lambda s: s.to_json(),
)
def test_products_of_numbers_read_back(schedule: Schedule) -> None:
    assert eval(repr(schedule).rsplit("  ", 1)[0], vars(schedules)) == schedule


@pytest.mark.parametrize(
    "make",
    [
        lambda: exponential(10.0),
        lambda: exponential(1e300, steps=3),
        lambda: linear(-1e308, 1e308, 10),
        lambda: linear(0, 1, 2**63),
        lambda: constant(1, 2**64 - 1),
        lambda: linear(0, 1, 2**62),
        lambda: constant(5e-324),
        lambda: linear(0, 5e-324, 3),
    ],
    ids=["1e999", "1e900", "a wide line", "2**63", "2**64 - 1", "2**62", "subnormal", "to subnormal"],
)
def test_every_schedule_has_a_text(make: Callable[[], Schedule]) -> None:
    schedule = make()
    expression, curve = repr(schedule).rsplit("  ", 1)
    assert eval(expression, vars(schedules)) == schedule
    assert len(curve) == 24


@pytest.mark.parametrize(
    ("schedule", "want"),
    [
        (exponential(2.0, start=0.0), 0.0),
        (schedules.step(1, 2.0, start=0.0), 0.0),
        (cyclic(1, mode="exp_range", gamma=2.0), 0.1),
    ],
    ids=["exponential", "step", "cyclic"],
)
def test_nothing_times_what_grows_is_nothing(schedule: Schedule, want: float) -> None:
    assert schedule(4000) == want


def test_a_line_between_huge_numbers_has_its_ends() -> None:
    wide = linear(-1e308, 1e308, 10)
    assert (wide(0), wide(5), wide(10)) == (-1e308, 0.0, 1e308)


def test_no_number_is_rounded_on_the_way() -> None:
    rng = np.random.default_rng(0)
    with np.errstate(over="ignore", under="ignore"):
        numbers = (rng.standard_normal(3000) * 10.0 ** rng.integers(-320, 309, 3000)).tolist()
    for x in [*filter(math.isfinite, numbers), 5e-324, -0.0, 1.7976931348623157e308, 0.1, 1 / 3]:
        assert math.copysign(1, constant(x)(0)) == math.copysign(1, x)
        assert constant(x)(0) == Schedule.from_json(constant(x).to_json())(0) == x


def test_plot() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.figure import Figure

    def data(ax: Any) -> tuple[list[float], list[float]]:
        (curve,) = ax.lines
        return list(curve.get_xdata()), list(curve.get_ydata())

    s = 0.1 * warmup(10).then(cosine(40))
    mine = Figure().subplots()
    assert s.plot(mine) is mine
    assert data(mine) == (list(range(56)), s.values(56).tolist()), "a tenth more than its length"
    assert (mine.get_xlabel(), mine.get_ylabel()) == ("update", "value")
    assert data(s.plot(Figure().subplots(), n=7)) == (list(range(7)), s.values(7).tolist())
    assert data(s.plot(Figure().subplots(), 1)) == ([0], [0.0])
    assert len(data(inverse_sqrt(3).plot(Figure().subplots()))[0]) == 1000
    t, values = data(cosine(10**7).plot(Figure().subplots()))
    assert len(t) == 2000
    assert (t[0], t[-1], values[0], values[-1]) == (0, 11 * 10**6, 1.0, 0.0)
    try:
        own = s.plot()
        assert own.figure in [plt.figure(k) for k in plt.get_fignums()]
        assert len(data(own)[0]) == 56
    finally:
        plt.close("all")
    with pytest.raises(ValueError, match=r"^plot: n must be a whole number >= 1, got 0$"):
        s.plot(mine, 0)


# ---- hostile arguments --------------------------------------------------------------------------------------

S = linear(0, 1, 3)
NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: S(-1), ValueError, "schedule: t must be a whole number >= 0, got -1"),
        (lambda: S(np.int64(-1)), ValueError, "schedule: t must be a whole number >= 0, got np.int64(-1)"),
        (lambda: S(1.0), TypeError, "schedule: t must be a whole number >= 0, got 1.0"),
        (lambda: S(NAN), TypeError, "schedule: t must be a whole number >= 0, got nan"),
        (lambda: S(True), TypeError, "schedule: t must be a whole number >= 0, got True"),
        (lambda: S("3"), TypeError, "schedule: t must be a whole number >= 0, got '3'"),
        (lambda: S(None), TypeError, "schedule: t must be a whole number >= 0, got None"),
        (lambda: S(np.arange(2)), TypeError, "schedule: t must be a whole number >= 0, got array([0, 1])"),
        (lambda: S.values(-1), ValueError, "schedule: n must be a whole number >= 0, got -1"),
        (lambda: S.values(2.0), TypeError, "schedule: n must be a whole number >= 0, got 2.0"),
        (lambda: S.values(2, -1), ValueError, "schedule: start must be a whole number >= 0, got -1"),
        (lambda: S.sparkline(0), ValueError, "sparkline: width must be a whole number >= 1, got 0"),
        (lambda: S.then("x"), TypeError, "then: the other must be a schedule or a number, got 'x'"),
        (lambda: S.then(True), TypeError, "then: the other must be a schedule or a number, got True"),
        (lambda: S.then(NAN), ValueError, "schedules.constant: value must be a finite number, got nan"),
        (
            lambda: constant(1).then(S),
            ValueError,
            "schedules.sequence: schedules but the last must be of some length, got an endless constant",
        ),
        (
            lambda: S.then(inverse_sqrt(3)).then(S),
            ValueError,
            "schedules.sequence: schedules but the last must be of some length, got an endless inverse_sqrt",
        ),
        (
            lambda: (S * cyclic(3)).then(S),
            ValueError,
            "schedules.sequence: schedules but the last must be of some length, got an endless product",
        ),
        (
            lambda: sequence(S, warm_restarts(2).clip(0, 1), S),
            ValueError,
            "schedules.sequence: schedules but the last must be of some length, got an endless clip",
        ),
        (lambda: sequence(), ValueError, "schedules.sequence: schedules must be at least one, got none"),
        (
            lambda: sequence([S, S]),
            TypeError,
            f"schedules.sequence: the other must be a schedule or a number, got {told([S, S])}",
        ),
        (lambda: S * NAN, ValueError, "schedules.constant: value must be a finite number, got nan"),
        (lambda: -INF * S, ValueError, "schedules.constant: value must be a finite number, got -inf"),
        (lambda: S.clip("x"), TypeError, "clip: low must be a number, got 'x'"),
        (lambda: S.clip(high=True), TypeError, "clip: high must be a number, got True"),
        (lambda: S.clip(NAN), ValueError, "schedules.clip: low must be a finite number, got NaN"),
        (lambda: S.clip(high=INF), ValueError, "schedules.clip: high must be a finite number, got inf"),
        (lambda: S.clip(2, 1.5), ValueError, "schedules.clip: low must be at most high, got 2 and 1.5"),
        (lambda: S.shift(1.0), TypeError, "shift: by must be a whole number, got 1.0"),
        (lambda: S.shift(False), TypeError, "shift: by must be a whole number, got False"),
        (lambda: constant("x"), TypeError, "schedules.constant: value must be a number, got 'x'"),
        (lambda: constant(1j), TypeError, "schedules.constant: value must be a number, got 1j"),
        (lambda: constant(True), TypeError, "schedules.constant: value must be a number, got True"),
        (lambda: constant(S), TypeError, f"schedules.constant: value must be a number, got {S!r}"),
        (lambda: constant(NAN), ValueError, "schedules.constant: value must be a finite number, got nan"),
        (lambda: constant(1, 0), ValueError, "schedules.constant: steps must be a whole number >= 1, got 0"),
        (lambda: linear(NAN, 1, 3), ValueError, "schedules.linear: start must be a finite number, got nan"),
        (lambda: linear(0, -INF, 3), ValueError, "schedules.linear: end must be a finite number, got -inf"),
        (lambda: linear(0, 1, 0), ValueError, "schedules.linear: steps must be a whole number >= 1, got 0"),
        (lambda: linear(0, 1, -5), ValueError, "schedules.linear: steps must be a whole number >= 1, got -5"),
        (lambda: linear(0, 1, 3.0), TypeError, "schedules.linear: steps must be a whole number >= 1, got 3.0"),
        (lambda: warmup(0), ValueError, "schedules.linear: steps must be a whole number >= 1, got 0"),
        (lambda: warmup(3, None), TypeError, "schedules.linear: end must be a number, got None"),
        (lambda: polynomial(3, power=-1), ValueError, "schedules.polynomial: power must be a number >= 0, got -1"),
        (lambda: polynomial(True), TypeError, "schedules.polynomial: steps must be a whole number >= 1, got True"),
        (lambda: exponential(-0.5), ValueError, "schedules.exponential: gamma must be a number >= 0, got -0.5"),
        (lambda: exponential(INF), ValueError, "schedules.exponential: gamma must be a finite number, got inf"),
        (lambda: exponential(0.5, 1, 0), ValueError, "schedules.exponential: steps must be a whole number >= 1, got 0"),
        (lambda: schedules.step(0), ValueError, "schedules.step: every must be a whole number >= 1, got 0"),
        (lambda: schedules.step(2, -1), ValueError, "schedules.step: gamma must be a number >= 0, got -1"),
        (lambda: cosine(0), ValueError, "schedules.cosine: steps must be a whole number >= 1, got 0"),
        (lambda: cosine(3, floor="x"), TypeError, "schedules.cosine: floor must be a number, got 'x'"),
        (lambda: sqrt_decay(3, NAN), ValueError, "schedules.sqrt_decay: peak must be a finite number, got nan"),
        (lambda: inverse_sqrt(0), ValueError, "schedules.inverse_sqrt: timescale must be a whole number >= 1, got 0"),
        (lambda: warm_restarts(3, 0), ValueError, "schedules.warm_restarts: mult must be a whole number >= 1, got 0"),
        (lambda: warm_restarts(0), ValueError, "schedules.warm_restarts: first must be a whole number >= 1, got 0"),
        (
            lambda: one_cycle(3),
            ValueError,
            "schedules.one_cycle: pct_start must be a part of the steps that leaves each phase some, got 0.3 of 3",
        ),
        (
            lambda: one_cycle(30, pct_start=1.0),
            ValueError,
            "schedules.one_cycle: pct_start must be a part of the steps that leaves each phase some, got 1 of 30",
        ),
        (
            lambda: one_cycle(30, pct_start=0.6, three_phase=True),
            ValueError,
            "schedules.one_cycle: pct_start must be a part of the steps that leaves each phase some, got 0.6 of 30",
        ),
        (lambda: one_cycle(9, div_factor=0), ValueError, "schedules.one_cycle: div_factor must be a number > 0, got 0"),
        (
            lambda: one_cycle(9, final_div_factor=-2.5),
            ValueError,
            "schedules.one_cycle: final_div_factor must be a number > 0, got -2.5",
        ),
        (
            lambda: one_cycle(9, anneal="x"),
            ValueError,
            "schedules.one_cycle: anneal must be 'cos' or 'linear', got 'x'",
        ),
        (
            lambda: one_cycle(9, three_phase=1),
            TypeError,
            "schedules.one_cycle: three_phase must be True or False, got 1",
        ),
        (lambda: cyclic(0), ValueError, "schedules.cyclic: up must be a whole number >= 1, got 0"),
        (lambda: cyclic(2, 0), ValueError, "schedules.cyclic: down must be a whole number >= 1, got 0"),
        (lambda: cyclic(2, gamma=-1), ValueError, "schedules.cyclic: gamma must be a number >= 0, got -1"),
        (
            lambda: cyclic(2, mode="x"),
            ValueError,
            "schedules.cyclic: mode must be 'triangular', 'triangular2' or 'exp_range', got 'x'",
        ),
        (
            lambda: piecewise({}),
            ValueError,
            "schedules.piecewise: points must be pairs (t, value) with t ascending from 0, got []",
        ),
        (
            lambda: piecewise({1: 2.0}),
            ValueError,
            "schedules.piecewise: points must be pairs (t, value) with t ascending from 0, got [(1, 2.0)]",
        ),
        (
            lambda: piecewise([(0, 1.0), (3, 2.0), (3, 4.0)]),
            ValueError,
            "schedules.piecewise: points must be pairs (t, value) with t ascending from 0, "
            "got [(0, 1.0), (3, 2.0), (3, 4.0)]",
        ),
        (lambda: piecewise(3), TypeError, "schedules.piecewise: points must be a dict or pairs (t, value), got 3"),
        (lambda: piecewise([1]), TypeError, "schedules.piecewise: points must be a dict or pairs (t, value), got [1]"),
        (lambda: piecewise({0: "x"}), TypeError, "schedules.piecewise: a value must be a number, got 'x'"),
        (lambda: piecewise({0: NAN}), ValueError, "schedules.piecewise: a value must be a finite number, got nan"),
        (lambda: piecewise({-1: 1.0}), ValueError, "schedules.piecewise: t must be a whole number >= 0, got -1"),
        (lambda: piecewise({0.0: 1.0}), TypeError, "schedules.piecewise: t must be a whole number >= 0, got 0.0"),
        (
            lambda: warmup_stable_decay(1, 1, 1, "x"),
            ValueError,
            "schedules.warmup_stable_decay: tail must be 'linear', 'sqrt' or 'cosine', got 'x'",
        ),
        (
            lambda: warmup_stable_decay(1, 0, 1),
            ValueError,
            "schedules.constant: steps must be a whole number >= 1, got 0",
        ),
        (lambda: Schedule.from_json(b"x"), TypeError, "schedules.from_json: text must be a str, got bytes"),
        (lambda: Schedule.from_json(None), TypeError, "schedules.from_json: text must be a str, got NoneType"),
        (
            lambda: Schedule.from_json("\ud800\U0001f600"),
            ValueError,
            r"schedules.from_json: text must be text that UTF-8 can hold, got '\ud800\U0001f600'",
        ),
    ],
)
def test_refused_arguments(make: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^{re.escape(message)}$") as caught:
        make()
    assert isinstance(caught.value, roptim.RoptimError)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: S(2**64), "schedule: t must be "),
        (lambda: linear(0, 1, 2**64), "schedules.linear: steps must be "),
        (lambda: S.shift(2**63), "shift: by must be "),
        (lambda: S.shift(-(2**63) - 1), "shift: by must be "),
        (lambda: constant(10**400), "schedules.constant: value must be "),
        (lambda: S * 10**400, r"schedules.constant: value must be "),
        (lambda: S.clip(low=-(10**400)), "clip: low must be "),
        (lambda: one_cycle(9, anneal=["cos"]), "schedules.one_cycle: anneal must be "),
        (lambda: one_cycle(9, anneal=np.ones(2)), "schedules.one_cycle: anneal must be "),
        (lambda: cyclic(3, mode=np.ones(2)), "schedules.cyclic: mode must be "),
        (lambda: warmup_stable_decay(1, 1, 1, tail=["linear"]), "schedules.warmup_stable_decay: tail must be "),
        (lambda: piecewise([(0, 1.0, 2.0)]), "schedules.piecewise: points must be "),
        (lambda: piecewise("x"), "schedules.piecewise: points must be "),
        (lambda: piecewise(None), "schedules.piecewise: points must be "),
    ],
)
def test_what_is_far_out_is_refused_by_name(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(roptim.RoptimError, match="^" + re.escape(message)):
        make()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "1",
        "{",
        "{}",
        '{"nothing":{}}',
        '{"linear":{}}',
        '{"linear":{"start":0,"end":1,"steps":3,"more":1}}',
        '{"linear":{"start":0,"end":1,"steps":0}}',
        '{"linear":{"start":0,"end":1,"steps":-3}}',
        '{"linear":{"start":0,"end":1,"steps":1.5}}',
        '{"linear":{"start":0,"end":1e999,"steps":3}}',
        '{"linear":{"start":0,"end":NaN,"steps":3}}',
        '{"linear":{"start":0,"end":"1","steps":3}}',
        '{"linear":{"start":0,"end":1,"steps":3}} trailing',
        '{"linear":{"start":0,"end":1,"steps":3},"cosine":{"peak":1,"floor":0,"steps":3}}',
        '{"linear":{"start":0,"start":1,"end":1,"steps":3}}',
        '{"sequence":[]}',
        '{"sequence":[{"step":{"start":1,"every":1,"gamma":1}},{"linear":{"start":0,"end":1,"steps":3}}]}',
        '{"cyclic":{"base":0,"peak":1,"up":1,"down":1,"mode":"other","gamma":1}}',
        '{"piecewise":{"points":[],"lines":true}}',
        '{"piecewise":{"points":[[0,1],[0,1]],"lines":true}}',
        '{"clip":{"of":{"linear":{"start":0,"end":1,"steps":3}},"low":2,"high":1}}',
        '{"shift":{"of":{"linear":{"start":0,"end":1,"steps":3}},"by":9223372036854775808}}',
        '{"sequence":[' * 100_000,
        '{"clip":{"of":' * 100_000,
        "\ud800",
    ],
    ids=lambda text: ascii(text[:40]),
)
def test_texts_that_are_no_schedules(text: str) -> None:
    with pytest.raises(roptim.RoptimValueError, match=r"^schedules"):
        Schedule.from_json(text)


def test_whole_numbers_in_a_text_are_numbers() -> None:
    assert Schedule.from_json(' {"linear": {"steps": 3, "end": 1, "start": 0}} ') == linear(0, 1, 3)


@pytest.mark.parametrize("text", ['{"product":[]}', '{"shift":{"of":{"product":[]},"by":1}}'])
def test_a_product_of_nothing_is_refused_or_has_a_text(text: str) -> None:
    try:
        schedule = Schedule.from_json(text)
    except roptim.RoptimError:
        return
    assert eval(repr(schedule).rsplit("  ", 1)[0], vars(schedules)) == schedule


def test_nesting() -> None:
    deep = S
    for depth in range(1, 60):
        deep = deep.shift(1) if depth % 2 else deep.clip(0, 1)
        assert deep(1000) == 1.0
    sentence = "schedules.linear: schedules within it must be within 60 of each other, got one more"
    for one_more in (lambda: deep.shift(1), lambda: deep.clip(0, 1), lambda: deep * S, lambda: deep.then(S)):
        with pytest.raises(roptim.RoptimValueError, match=f"^{sentence}$"):
            one_more()
    long = S
    for _ in range(300):
        long = long.then(S)
    assert (long.length, long(3 * 300 + 1)) == (903, 1 / 3), "sequences do not nest"
    assert Schedule.from_json(long.to_json()) == long


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s.shift(1),
        lambda s: s.clip(0, 1),
        lambda s: (s * S).then(S),
        lambda s: (s.then(S) * S).shift(-1).clip(-1, 2),
    ],
    ids=["shift", "clip", "product and sequence", "all"],
)
def test_whatever_can_be_made_can_be_read(wrap: Callable[[Schedule], Schedule]) -> None:
    deep = S
    while True:
        try:
            deep = wrap(deep)
        except roptim.RoptimValueError:
            break
    assert Schedule.from_json(deep.to_json()) == deep
    assert copy.deepcopy(deep) == pickle.loads(pickle.dumps(deep)) == deep
    assert eval(repr(deep).rsplit("  ", 1)[0], vars(schedules)) == deep


@pytest.mark.parametrize("n", [2**47, 2**60, 2**64 - 1])
def test_more_values_than_memory_are_an_error(n: int) -> None:
    code = f"""
from roptim.schedules import constant
try:
    constant(1.0).values({n})
except Exception as error:
    print(isinstance(error, MemoryError) or type(error).__name__.startswith("Roptim"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr[:300]


# ---- as hyperparameters -------------------------------------------------------------------------------------

F32 = np.float32


def arrays() -> list[Any]:
    return [np.linspace(-1, 1, rows * columns, dtype=F32).reshape(rows, columns) for rows, columns in [(3, 2), (2, 4)]]


def gradients(t: int, params: list[Any]) -> list[Any]:
    """They grow, so that what bounds an update matters."""
    return [(1 + t) * np.sin(np.arange(p.size, dtype=F32) + 3 * t + i).reshape(p.shape) for i, p in enumerate(params)]


def advance(opt: Any, t: int, params: list[Any]) -> None:
    """Update ``t``; of optimizers that take a closure on a bowl around another place each time."""
    if not REGISTRY[type(opt).__name__]["needs_closure"]:
        step(opt, gradients(t, params))
        return
    weights = [1 + np.arange(p.size, dtype=F32).reshape(p.shape) for p in params]

    def closure() -> Any:
        off = [p - np.sin(w + t) for p, w in zip(params, weights, strict=True)]
        loss = sum(float(np.sum(w * d * d * (1 + d * d))) for w, d in zip(weights, off, strict=True))
        return loss, [w * (2 * d + 4 * d**3) for w, d in zip(weights, off, strict=True)]

    opt.step(closure)


def bits(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [bits(item) for item in value]
    return (value.dtype.str, value.shape, value.tobytes()) if isinstance(value, np.ndarray) else repr(value)


def everything(opt: Any, params: list[Any]) -> Any:
    """Parameters, state and counts to the last bit."""
    state = opt.state_dict()
    about = {key: value for key, value in state["roptim"].items() if key != "schedules"}
    return [bits(p) for p in params], bits(state["state"]), about


def ones(n: int = 1) -> Any:
    return np.ones(n, F32)


def sgd(lr: Any, **kwargs: Any) -> tuple[SGD, Any]:
    """One parameter that falls by the learning rate at each step."""
    p = np.zeros(1, F32)
    return SGD([p], lr=lr, **kwargs), p


#: A function of the update for each hyperparameter of the registry: numbers that matter and are allowed.
VARYING: dict[str, Callable[[int], Any]] = {
    "lr": lambda t: 0.02 / (t + 1),
    "momentum": lambda t: 0.5 + 0.05 * t,
    "dampening": lambda t: 0.1 * t,
    "weight_decay": lambda t: 0.1 * (t + 1),
    "eps": lambda t: 0.1 * (t + 1),
    "rho": lambda t: 0.9 - 0.1 * t,
    "alpha": lambda t: 0.9 - 0.1 * t,
    "lr_decay": lambda t: 0.1 * (t + 1),
    "initial_accumulator_value": lambda t: 0.1 * (t + 1),
    "lambd": lambda t: 0.01 * (t + 1),
    "t0": lambda t: 1.0 + t % 2,
    "momentum_decay": lambda t: 0.1 * (t + 1),
    "beta2_decay": lambda t: -0.8 + 0.1 * t,
    "d": lambda t: 1.0 + 0.1 * t,
    "nesterov": lambda t: t % 2 == 1,
    "maximize": lambda t: t % 2 == 1,
    "amsgrad": lambda t: t >= 2,
    "centered": lambda t: t >= 2,
    "decoupled_weight_decay": lambda t: t % 2 == 1,
    "ns_steps": lambda t: 1 + t,
    "adjust_lr_fn": lambda t: (None, "original", "match_rms_adamw")[t % 3],
    "max_iter": lambda t: 1 + t,
    "max_eval": lambda t: 1 + t,
    "tolerance_grad": lambda t: 10.0 if t == 2 else 1e-7,
    "tolerance_change": lambda t: 10.0 if t == 2 else 1e-9,
    "history_size": lambda t: 1 + t,
    "restart": lambda t: 1 + t % 2,
    "line_search_fn": lambda t: (None, "strong_wolfe")[t % 2],
}
#: The same for those that are tuples, entry by entry.
PAIRS: dict[str, tuple[Any, ...]] = {
    "betas": (lambda t: 0.9 - 0.1 * t, lambda t: 0.99 - 0.1 * t),
    "etas": (lambda t: 0.5 - 0.05 * t, lambda t: 1.2 + 0.1 * t),
    "step_sizes": (lambda t: 1e-3 * (t + 1), lambda t: 2e-3 * (t + 1)),
    "ns_coefficients": (lambda t: 3.0 + 0.1 * t, -4.775, lambda t: 2.0 + 0.01 * t),
}
#: What needs another hyperparameter to matter.
BESIDE: dict[tuple[str, str], dict[str, Any]] = {
    ("SGD", "nesterov"): {"momentum": 0.9},
    ("SGD", "dampening"): {"momentum": 0.9},
    ("LBFGS", "history_size"): {"max_iter": 5},
    ("LBFGS", "max_iter"): {"max_eval": 50},
    ("ConjugateGradient", "max_iter"): {"max_eval": 50},
    ("ConjugateGradient", "restart"): {"max_iter": 5},
}
for each in ("Adam", "NAdam", "RAdam"):
    BESIDE[each, "decoupled_weight_decay"] = {"weight_decay": 0.3}
#: What only the first update reads.
READ_ONCE = {("Adagrad", "initial_accumulator_value"), ("Rprop", "lr"), ("ConjugateGradient", "lr")}


def scheduled_form(optimizer: str, name: str) -> Any:
    """The hyperparameter as a function, a tuple with functions where it is a tuple."""
    if name == "eps" and optimizer == "Adafactor":
        return (None, lambda t: 1.0 + t)
    if name == "eps" and optimizer == "Muon":
        return lambda t: 10.0 * (t + 1)  # a norm is at least that
    return PAIRS[name] if name in PAIRS else VARYING[name]


def at(form: Any, t: int) -> Any:
    if isinstance(form, tuple):
        return tuple(at(item, t) for item in form)
    return form(t) if callable(form) else form


def run_of(cls: Any, kwargs: dict[str, Any], by_hand: dict[str, Any], steps: int = 6, **device: Any) -> Any:
    """A run whose group is written before each step and after it, ``by_hand`` being functions of the update."""
    params = arrays()
    first = {name: at(form, 0) for name, form in by_hand.items()}
    opt = cls(params, **{**kwargs, **first}, **device)
    seen = []
    for t in range(steps):
        for name, form in by_hand.items():
            opt.param_groups[0][name] = at(form, t)
        advance(opt, t, params)
        for name, form in by_hand.items():
            opt.param_groups[0][name] = at(form, t + 1)
        seen.append(everything(opt, params))
    return seen


def scheduled_run(cls: Any, kwargs: dict[str, Any], forms: dict[str, Any], steps: int = 6, **device: Any) -> Any:
    params = arrays()
    opt = cls(params, **{**kwargs, **forms}, **device)
    seen = []
    for t in range(steps):
        for name, form in forms.items():
            assert opt.param_groups[0][name] == at(form, t), "the group shows the coming update's value"
        advance(opt, t, params)
        seen.append(everything(opt, params))
    for name, form in forms.items():
        assert opt.param_groups[0][name] == at(form, steps)
    return seen


HYPERPARAMETERS = [
    (optimizer, name)
    for optimizer, entry in REGISTRY.items()
    for name in entry["defaults"]
    if name not in entry["fixed"]
]


@pytest.mark.parametrize(("optimizer", "name"), HYPERPARAMETERS)
def test_a_function_is_what_setting_the_group_by_hand_is(optimizer: str, name: str) -> None:
    cls = getattr(roptim, optimizer)
    form, beside = scheduled_form(optimizer, name), BESIDE.get((optimizer, name), {})
    scheduled = scheduled_run(cls, beside, {name: form})
    assert scheduled == run_of(cls, beside, {name: form})
    if (optimizer, name) not in READ_ONCE:
        still = run_of(cls, {**beside, name: at(form, 0)}, {})
        assert still[0][0] == scheduled[0][0]
        assert still[-1] != scheduled[-1], "the function matters"


LR = 0.02 * warmup(3, start=0.1).then(cosine(4, floor=0.1))


def lr_by_hand(t: int) -> float:
    """The same once more."""
    return 0.02 * (0.1 + 0.9 * t / 3 if t < 3 else 0.1 + 0.9 * (1 + math.cos(math.pi * min((t - 3) / 4, 1))) / 2)


def test_the_learning_rate_of_every_optimizer(optimizer_class: Any) -> None:
    assert [LR(t) for t in range(9)] == pytest.approx([lr_by_hand(t) for t in range(9)], rel=1e-14)
    scheduled = scheduled_run(optimizer_class, {}, {"lr": LR}, 9)
    assert scheduled == run_of(optimizer_class, {}, {"lr": LR}, 9)
    if (optimizer_class.__name__, "lr") not in READ_ONCE:
        assert scheduled[-1] != run_of(optimizer_class, {"lr": LR(0)}, {}, 9)[-1]


@pytest.mark.parametrize(
    ("cls", "forms"),
    [
        (SGD, {"lr": LR, "momentum": linear(0.5, 0.9, 4), "weight_decay": 0.1 * warmup(5)}),
        (AdamW, {"lr": LR, "betas": (linear(0.5, 0.9, 4), 0.999), "weight_decay": cosine(5, 0.3)}),
        (AdamW, {"betas": (0.9, exponential(0.99, 0.99)), "eps": exponential(0.5, 1e-2)}),
        (roptim.RMSprop, {"lr": LR, "alpha": linear(0.5, 0.9, 4), "eps": lambda t: 1e-3 / (t + 1)}),
    ],
)
def test_several_at_once_on_each_device(cls: Any, forms: dict[str, Any], backend: dict[str, Any]) -> None:
    scheduled = scheduled_run(cls, {}, forms, **backend)
    assert scheduled == run_of(cls, {}, forms, **backend)
    if backend["backend"] == "gpu" and all(device.software for device in roptim.devices()[1:]):
        assert scheduled == scheduled_run(cls, {}, forms), "and the CPU's bits"


def test_update_t_takes_the_value_of_t() -> None:
    opt, p = sgd(linear(1, 0, 4))
    group = opt.param_groups[0]
    seen = []
    for _ in range(6):
        lr = group["lr"]
        opt.step([ones()])
        seen.append((lr, p[0]))
    assert seen == [(1, -1), (0.75, -1.75), (0.5, -2.25), (0.25, -2.5), (0, -2.5), (0, -2.5)]
    assert type(group["lr"]) is float


def test_groups_have_schedules_of_their_own() -> None:
    a, b, c = (np.zeros(1, F32) for _ in range(3))
    groups = [{"params": [a], "lr": linear(1, 0, 4)}, {"params": [b], "lr": 2.0}, {"params": [c]}]
    opt = SGD(groups, lr=lambda t: 2.0**-t, momentum=piecewise({0: 0.0, 2: 0.5}, lines=False))
    assert [group["lr"] for group in opt.param_groups] == [1, 2, 1]
    for _ in range(2):
        opt.step([ones(), ones(), ones()])
    assert (a[0], b[0], c[0]) == (-1.75, -4, -1.5)
    assert [group["lr"] for group in opt.param_groups] == [0.5, 2, 0.25]
    assert [group["momentum"] for group in opt.param_groups] == [0.5] * 3
    opt.step([ones(), ones(), ones()])
    assert (a[0], b[0], c[0]) == (-2.25, -6, -1.75), "the buffers begin at the gradient"
    opt.step([ones(), ones(), ones()])
    assert (a[0], b[0], c[0]) == (-2.25 - 0.25 * 1.5, -6 - 2 * 1.5, -1.75 - 0.125 * 1.5)


def test_assigning_begins_and_ends_schedules() -> None:
    opt, p = sgd(1.0)
    group = opt.param_groups[0]
    opt.step([ones()])
    opt.step([ones()])
    group["lr"] = linear(1, 0, 4)
    assert group["lr"] == 0.5, "the clock is the optimizer's"
    opt.step([ones()])
    assert (p[0], group["lr"]) == (-2.5, 0.25)
    group["lr"] = 0.125
    for _ in range(3):
        opt.step([ones()])
        assert group["lr"] == 0.125
    assert p[0] == -2.875
    assert "schedules" not in opt.state_dict()["roptim"]
    group.update(lr=lambda t: t, momentum=0.0)
    assert group["lr"] == 6
    group |= {"lr": lambda t: 2 * t}
    assert group["lr"] == 12
    opt.param_groups[0] |= {"lr": constant(0.5)}
    opt.step([ones()])
    assert p[0] == -3.375
    group["lr"] = group["lr"]
    assert "schedules" not in opt.state_dict()["roptim"], "what the group shows is a number"


def test_an_assignment_leaves_the_other_schedules() -> None:
    opt, p = sgd(linear(1, 0, 4), momentum=piecewise({0: 0.0, 1: 0.5}, lines=False))
    group = opt.param_groups[0]
    group["weight_decay"] = 0.0
    opt.step([ones()])
    assert (group["lr"], group["momentum"]) == (0.75, 0.5)
    group["momentum"] = 0.0
    opt.step([ones()])
    group["weight_decay"] = constant(0.0)
    opt.step([ones()])
    assert (p[0], group["lr"], group["momentum"]) == (-2.25, 0.25, 0.0)
    assert set(opt.state_dict()["roptim"]["schedules"][0]) == {"lr", "weight_decay"}


def test_what_is_refused_at_an_assignment_changes_nothing() -> None:
    opt, p = sgd(linear(1, 0, 4), momentum=0.0)
    group = opt.param_groups[0]
    refused: list[tuple[dict[str, Any], str]] = [
        ({"lr": constant(-1)}, "SGD: lr must be a finite number >= 0, got -1.0"),
        ({"lr": lambda t: "fast"}, "SGD: lr must be a finite number >= 0, got 'fast'"),
        ({"lr": constant(2), "momentum": -1.0}, "SGD: momentum must be a finite number >= 0, got -1.0"),
        ({"lr": 0.5, "momentum": constant(-1)}, "SGD: momentum must be a finite number >= 0, got -1.0"),
        ({"lr": (constant(1), 2)}, "SGD: lr must be a finite number >= 0, got (1.0, 2)"),
        ({"nesterov": constant(1)}, "SGD: nesterov must be True or False, got 1.0"),
    ]
    for changes, message in refused:
        with pytest.raises(roptim.RoptimError, match=f"^{re.escape(message)}$"):
            group.update(changes)
        assert (group["lr"], group["momentum"], group["nesterov"]) == (1.0, 0.0, False)
    with pytest.raises(ZeroDivisionError):
        group["lr"] = lambda t: 1 / 0
    for want in (-1, -1.75, -2.25):
        opt.step([ones()])
        assert p[0] == want


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lr": constant(-1)}, "AdamW: lr must be a finite number >= 0, got -1.0"),
        ({"lr": lambda t: math.nan}, "AdamW: lr must be a finite number >= 0, got NaN"),
        ({"lr": lambda t: math.inf}, "AdamW: lr must be a finite number >= 0, got inf"),
        ({"lr": lambda t: None}, "AdamW: lr must be a finite number >= 0, got None"),
        ({"lr": lambda t: True}, "AdamW: lr must be a finite number >= 0, got True"),
        ({"lr": lambda t: 1j}, "AdamW: lr must be a finite number >= 0, got 1j"),
        ({"lr": lambda t: [0.1]}, "AdamW: lr must be a finite number >= 0, got [0.1]"),
        ({"lr": float}, "AdamW: lr must be a finite number >= 0, got <class 'float'>"),
        ({"betas": (constant(1.0), 0.9)}, "AdamW: betas[0] must be a number in [0, 1), got 1.0"),
        ({"betas": [0.9, lambda t: -0.5]}, "AdamW: betas[1] must be a number in [0, 1), got -0.5"),
        ({"betas": (constant(0.9),)}, "AdamW: betas must be two numbers in [0, 1), got (0.9,)"),
        ({"betas": constant(0.9)}, "AdamW: betas must be two numbers in [0, 1), got 0.9"),
        ({"weight_decay": linear(-1, 0, 3)}, "AdamW: weight_decay must be a finite number >= 0, got -1.0"),
        ({"eps": lambda t: "x"}, "AdamW: eps must be a finite number >= 0, got 'x'"),
    ],
)
def test_refused_at_construction(given: dict[str, Any], message: str) -> None:
    exact = f"^{re.escape(message)}$".replace("AdamW", "AdamW( group 1)?")
    with pytest.raises(roptim.RoptimError, match=exact):
        AdamW([ones()], **given)
    with pytest.raises(roptim.RoptimError, match=exact):
        AdamW([{"params": [ones()], **given}])
    p = ones()
    opt = AdamW([p])
    with pytest.raises(roptim.RoptimError, match=exact):
        opt.add_param_group({"params": [ones()], **given})
    assert len(opt.param_groups) == 1
    opt.step([ones()])


@pytest.mark.parametrize("where", ["lr", "momentum", "the second group's lr"])
def test_a_value_that_goes_wrong_later_stops_before_anything_is_written(where: str) -> None:
    name = where.split()[-1]
    wrong = piecewise({0: 0.5, 2: -0.5, 3: 0.25}, lines=False)
    params = [np.zeros(1, F32), np.zeros(1, F32)]
    plain = {"lr": 0.5, "momentum": 0.5}
    own = {name: wrong}
    groups = [{"params": params[:1]}, {"params": params[1:]}]
    if where == "lr" or where == "momentum":
        opt = SGD(groups, **{**plain, **own})
    else:
        opt = SGD([groups[0], {**groups[1], **own}], **plain)
    for _ in range(2):
        opt.step([ones(), ones()])
    before = everything(opt, params)
    for _ in range(2):
        message = f"SGD group {int(where != name)}: {name} must be a finite number >= 0, got -0.5"
        with pytest.raises(roptim.RoptimValueError, match=f"^{re.escape(message)}$"):
            opt.step([ones(), ones()])
        assert everything(opt, params) == before
        assert opt.update_count == 2
    for group in opt.param_groups:
        group[name] = 0.125
    opt.step([ones(), ones()])
    assert opt.update_count == 3


def test_an_error_of_the_function_stops_the_step_that_needs_its_value() -> None:
    asked = []

    def lr(t: int) -> float:
        asked.append(t)
        if t == 2:
            raise ZeroDivisionError
        return 0.5

    opt, p = sgd(lr)
    opt.step([ones()])
    opt.step([ones()])
    assert p[0] == -1
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            opt.step([ones()])
    assert (p[0], opt.update_count) == (-1, 2)
    opt.param_groups[0]["lr"] = 1.0
    opt.step([ones()])
    assert p[0] == -2
    assert set(asked) == {0, 1, 2}
    assert all(type(t) is int for t in asked)


@pytest.mark.parametrize(
    "number", [np.float64, np.float32, np.float16, np.longdouble, np.array, lambda x: np.array([x])], ids=str
)
def test_functions_may_return_numpys_numbers(number: Any) -> None:
    opt, p = sgd(lambda t: number(0.5**t))
    for want in (-1, -1.5, -1.75):
        opt.step([ones()])
        assert p[0] == want
        assert type(opt.param_groups[0]["lr"]) is float
    ints, q = sgd(lambda t: np.int64(t))
    for _ in range(3):
        ints.step([ones()])
    assert q[0] == -3
    betas = Adam([ones()], betas=(lambda t: number(0.5), 0.999))
    betas.step([ones()])
    assert betas.param_groups[0]["betas"] == (0.5, 0.999)


@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
def test_what_is_left_out_does_not_count(nonfinite: str) -> None:
    opt, p = sgd(linear(1, 0, 4), nonfinite=nonfinite)
    group = opt.param_groups[0]
    opt.step([ones()])
    for left_out in (None, math.nan * ones(), None, math.inf * ones(), np.ones(3, F32)):
        try:
            opt.step([left_out])
        except roptim.RoptimError:
            assert nonfinite == "raise" or left_out.shape == (3,)
        assert (opt.update_count, group["lr"], p[0]) == (1, 0.75, -1)
    opt.step([ones()])
    assert (opt.update_count, group["lr"], p[0]) == (2, 0.5, -1.75)


def test_one_gradient_is_an_update_for_all() -> None:
    a, b = np.zeros(1, F32), np.zeros(1, F32)
    opt = SGD([a, b], lr=linear(1, 0, 4))
    opt.step([ones(), None])
    opt.step([None, ones()])
    assert (a[0], b[0]) == (-1, -0.75), "the clock is the optimizer's, not the parameter's"


def test_a_closure_sees_the_value_that_its_update_takes() -> None:
    opt, p = sgd(linear(1, 0, 4))
    seen = []

    def closure() -> Any:
        seen.append(opt.param_groups[0]["lr"])
        return 0.0, [ones()]

    for _ in range(3):
        opt.step(closure)
    assert seen == [1, 0.75, 0.5]
    assert p[0] == -2.25


@pytest.mark.parametrize("cls", [LBFGS, roptim.ConjugateGradient])
def test_a_step_of_many_evaluations_has_one_value(cls: Any) -> None:
    """Once per step, not per evaluation, against setting it by hand on a curved function."""

    rates = [0.3 + (0.05 - 0.3) * (t / 4) for t in range(4)] + [0.05, 0.05]

    def train(by_hand: bool) -> tuple[list[Any], list[list[float]]]:
        p = np.array([-1.2, 1.0])
        opt = cls([p], lr=1.0 if by_hand else linear(0.3, 0.05, 4), max_iter=3)
        trail, evaluations = [], []
        for t in range(6):
            seen: list[float] = []

            def closure(seen: list[float] = seen) -> Any:
                seen.append(opt.param_groups[0]["lr"])
                x, y = p
                gradient = np.array([2 * (x - 1) - 40 * x * (y - x * x), 20 * (y - x * x)])
                return (1 - x) ** 2 + 10 * (y - x * x) ** 2, [gradient]

            if by_hand:
                opt.param_groups[0]["lr"] = rates[t]
            opt.step(closure)
            trail.append(p.tobytes())
            evaluations.append(seen)
        assert opt.update_count == 6
        return trail, evaluations

    scheduled, hand = train(False), train(True)
    assert scheduled == hand
    assert [set(seen) for seen in scheduled[1]] == [{rate} for rate in rates]
    assert max(len(seen) for seen in scheduled[1]) > 1


@pytest.mark.parametrize("cls", [LBFGS, roptim.ConjugateGradient])
def test_a_wrong_value_stops_before_the_closure(cls: Any) -> None:
    p = np.array([3.0, 1.0])
    opt = cls([p], lr=piecewise({0: 0.5, 1: -0.5}, lines=False), max_iter=2)
    calls: list[int] = []

    def closure() -> Any:
        calls.append(1)
        return float(p @ p), [2 * p]

    opt.step(closure)
    before, evaluations = (p.tobytes(), bits(opt.state_dict()["state"])), len(calls)
    message = f"{cls.__name__}: lr must be a finite number >= 0, got -0.5"
    with pytest.raises(roptim.RoptimValueError, match=f"^{re.escape(message)}$"):
        opt.step(closure)
    assert (p.tobytes(), bits(opt.state_dict()["state"])) == before
    assert (len(calls), opt.update_count) == (evaluations, 1)


def test_an_error_in_a_closure_does_not_advance() -> None:
    p = np.array([3.0])
    opt = LBFGS([p], lr=linear(1, 0, 4))

    def fails() -> Any:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        opt.step(fails)
    assert (opt.update_count, opt.param_groups[0]["lr"]) == (0, 1.0)
    opt.step(lambda: (float(p[0] ** 2), [2 * p]))
    assert (opt.update_count, opt.param_groups[0]["lr"]) == (1, 0.75)


# ---- resuming -----------------------------------------------------------------------------------------------

TOTAL = 9


def decay(t: int) -> float:
    return 0.01 * (t % 4)


RESUMED: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    # class, what both runs are given, what only the first is given.
    "SGD": (SGD, {"momentum": 0.9}, {"lr": LR, "weight_decay": 0.1 * warmup(5)}),
    "AdamW": (AdamW, {}, {"lr": LR, "betas": (linear(0.8, 0.9, 6), 0.99), "eps": exponential(0.5, 1e-3)}),
    "AdamW with a function": (AdamW, {"weight_decay": decay}, {"lr": LR}),
    "AdamW with one in a tuple": (AdamW, {"betas": (lambda t: 0.9 - 0.01 * t, 0.99)}, {"lr": LR}),
    "Adagrad": (roptim.Adagrad, {}, {"lr": warm_restarts(3, peak=0.1), "lr_decay": constant(0.1)}),
    "LBFGS": (LBFGS, {"max_iter": 3}, {"lr": LR}),
}


@cache
def unbroken(name: str) -> list[Any]:
    cls, both, first = RESUMED[name]
    params = arrays()
    opt = cls(params, **both, **first)
    seen = []
    for t in range(TOTAL):
        seen.append((everything(opt, params), [dict(group, params=None) for group in opt.param_groups]))
        advance(opt, t, params)
    seen.append((everything(opt, params), [dict(group, params=None) for group in opt.param_groups]))
    return seen


@pytest.mark.parametrize("given", ["the same", "none", "others"])
@pytest.mark.parametrize("name", RESUMED)
def test_resume_at_every_split(name: str, given: str, tmp_path: Path) -> None:
    cls, both, first = RESUMED[name]
    lr = REGISTRY[cls.__name__]["defaults"]["lr"]
    again = {"the same": first, "none": {}, "others": {key: cosine(3, lr) for key in first if key == "lr"}}[given]
    for split in range(TOTAL + 1):
        params = arrays()
        opt = cls(params, **both, **first)
        for t in range(split):
            advance(opt, t, params)
        file = tmp_path / f"{split}.safetensors"
        roptim.save({"params": params, "opt": opt.state_dict()}, file)
        del opt
        saved = roptim.load(file)
        resumed = cls(saved["params"], **both, **again)
        resumed.load_state_dict(saved["opt"])
        params = saved["params"]
        for t in range(split, TOTAL + 1):
            want, groups = unbroken(name)[t]
            assert everything(resumed, params) == want, (split, t)
            assert [dict(group, params=None) for group in resumed.param_groups] == groups, (split, t)
            if t < TOTAL:
                advance(resumed, t, params)


def test_a_saved_schedule_is_text_in_the_file(tmp_path: Path) -> None:
    opt = AdamW(
        [{"params": [ones()], "lr": LR}, {"params": [ones()], "weight_decay": decay}],
        betas=(linear(0.8, 0.9, 3), 0.99),
    )
    about = opt.state_dict()["roptim"]["schedules"]
    betas = [linear(0.8, 0.9, 3).to_json(), 0.99]
    assert about == {0: {"lr": LR.to_json(), "betas": betas}, 1: {"weight_decay": "function", "betas": betas}}
    roptim.save(opt.state_dict(), tmp_path / "x")
    assert roptim.load(tmp_path / "x")["roptim"]["schedules"] == about
    assert "schedules" not in AdamW([ones()]).state_dict()["roptim"]


def saved_by(**hypers: Any) -> tuple[dict[str, Any], SGD]:
    opt, _ = sgd(**hypers)
    opt.step([ones()])
    return opt.state_dict(), opt


@pytest.mark.parametrize(
    ("given", "got"),
    [
        ({}, "none"),
        ({"lr": 0.5}, "none"),
        ({"lr": linear(1, 0, 4)}, repr(linear(1, 0, 4))),
    ],
    ids=["nothing", "a number", "a schedule"],
)
def test_functions_must_be_given_again(given: dict[str, Any], got: str) -> None:
    state, _ = saved_by(lr=lambda t: 0.25)
    p = ones()
    opt = SGD([p], **given)
    opt.step([ones()])
    before = everything(opt, [p])
    message = (
        "SGD.load_state_dict: lr of group 0 must be the function that it was in the saved run, "
        f"got {got}; no file holds a function: construct the optimizer with it"
    )
    with pytest.raises(roptim.RoptimValueError, match=f"^{re.escape(message)}$"):
        opt.load_state_dict(state)
    assert everything(opt, [p]) == before
    assert opt.param_groups[0]["lr"] == (
        given["lr"](1) if isinstance(given.get("lr"), Schedule) else given.get("lr", 1e-3)
    )


def test_functions_in_a_tuple_must_be_given_again_at_their_place() -> None:
    opt = Adam([ones()], betas=(lambda t: 0.5, linear(0.9, 0.99, 4)))
    opt.step([ones()])
    state = opt.state_dict()
    assert state["roptim"]["schedules"][0]["betas"] == ["function", linear(0.9, 0.99, 4).to_json()]
    for wrong in ((0.5, 0.9), (0.5, lambda t: 0.9), (linear(0.5, 0.6, 3), 0.9)):
        other = Adam([ones()], betas=wrong)
        with pytest.raises(roptim.RoptimValueError, match="betas of group 0 must be the function"):
            other.load_state_dict(state)
    good = Adam([ones()], betas=(lambda t: 0.25, 0.9))
    good.load_state_dict(state)
    assert good.param_groups[0]["betas"] == (0.25, linear(0.9, 0.99, 4)(1))


def test_a_schedule_where_the_saved_run_had_none() -> None:
    state, _ = saved_by(lr=0.25)
    opt, p = sgd(linear(1, 0, 4), momentum=linear(0, 0.5, 2))
    opt.step([ones()])
    with pytest.warns(UserWarning, match="of group 0 was no schedule") as caught:
        opt.load_state_dict(state)
    assert sorted(str(w.message) for w in caught) == [
        f"SGD.load_state_dict: {name} of group 0 was no schedule in the saved run, whose value it takes; "
        "assign the schedule again to go on with it"
        for name in ("lr", "momentum")
    ]
    assert all(w.filename == __file__ for w in caught)
    group = opt.param_groups[0]
    assert (group["lr"], group["momentum"], p[0]) == (0.25, 0.0, -1)
    opt.step([ones()])
    assert (group["lr"], p[0]) == (0.25, -1.25)
    group["lr"] = linear(1, 0, 4)
    assert group["lr"] == 0.5
    again, q = sgd(linear(1, 0, 4))
    with pytest.raises(UserWarning, match="was no schedule"):
        again.load_state_dict(state)
    again.step([ones()])
    assert (q[0], again.update_count) == (-1, 1), "where warnings are errors nothing has changed"


def test_a_dict_of_torchs_keeps_the_schedule() -> None:
    opt = Adam([ones()], lr=0.5)
    for _ in range(3):
        opt.step([ones()])
    state = opt.state_dict()
    del state["roptim"]
    p = ones()
    other = Adam([p], lr=linear(1, 0, 4), betas=(0.9, constant(0.99)))
    other.load_state_dict(state)
    assert other.update_count == 3
    assert (other.param_groups[0]["lr"], other.param_groups[0]["betas"]) == (0.25, (0.9, 0.99))
    other.step([ones()])
    assert other.param_groups[0]["lr"] == 0.0
    q = ones()
    third = Adam([q], lr=linear(1, 0, 4))
    for _ in range(3):
        third.step([ones()])
    third.load_state_dict(state)
    assert third.param_groups[0]["lr"] == 0.25, "also where the count is the same"


@pytest.mark.parametrize(
    "saved",
    [
        5,
        None,
        [],
        {"0": {"lr": LR.to_json()}},
        {1: {"lr": LR.to_json()}},
        {0: [1]},
        {0: None},
        {0: {"nothing": LR.to_json()}},
        {0: {"lr": "x"}},
        {0: {"lr": b"x"}},
        {0: {"lr": True}},
        {0: {"lr": {}}},
        {0: {"lr": '{"linear":{"start":0,"end":1,"steps":0}}'}},
        {0: {"lr": 5}},
        {0: {"lr": [linear(1, 0, 4).to_json()]}},
        {0: {"lr": []}},
        {0: {"lr": constant(-1).to_json()}},
        {0: {"lr": linear(1, 0, 4).to_json(), "nesterov": constant(1).to_json()}},
    ],
    ids=str,
)
def test_hostile_schedules_in_a_file(saved: Any) -> None:
    state, opt = saved_by(lr=LR, momentum=0.5)
    state["roptim"]["schedules"] = saved
    p = ones()
    opt = SGD([p], lr=linear(1, 0, 4), momentum=0.5)
    opt.step([ones()])
    before, group = everything(opt, [p]), dict(opt.param_groups[0])
    with pytest.raises(roptim.RoptimError):
        opt.load_state_dict(state)
    assert everything(opt, [p]) == before
    assert {key: value for key, value in opt.param_groups[0].items() if key != "params"} == {
        key: value for key, value in group.items() if key != "params"
    }
    opt.step([ones()])
    assert opt.param_groups[0]["lr"] == 0.5


def test_a_tuple_with_none_in_it_is_saved() -> None:
    """Adafactor's first eps may be None."""
    p = arrays()
    opt = Adafactor(p, eps=(None, constant(1e-3)))
    opt.step(gradients(0, p))
    state = opt.state_dict()
    other = Adafactor(arrays(), eps=(None, 1e-3))
    other.load_state_dict(state)
    assert other.param_groups[0]["eps"] == (None, 1e-3)
    copy.deepcopy(opt)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_go_on_alone(copied: Any) -> None:
    params = arrays()
    groups = [{"params": params[0], "lr": LR}, {"params": params[1], "weight_decay": decay}]
    opt = AdamW(groups, lr=linear(0.1, 0, 6), betas=(linear(0.8, 0.9, 3), 0.99))
    for t in range(3):
        advance(opt, t, params)
    other, others = copied((opt, params))
    other.defaults["lr"](0)
    assert [dict(g, params=None) for g in other.param_groups] == [dict(g, params=None) for g in opt.param_groups]
    assert other.state_dict()["roptim"] == opt.state_dict()["roptim"]
    for t in range(3, 7):
        advance(opt, t, params)
    opt.param_groups[0]["lr"] = 5.0
    others = [p for group in other.param_groups for p in group["params"]]
    for t in range(3, 7):
        advance(other, t, others)
    assert everything(other, others) == everything(opt, params)
    assert other.param_groups[0]["lr"] == LR(7)
    other.add_param_group({"params": np.zeros((2, 2), F32)})
    assert other.param_groups[2]["lr"] == 0.0, "the defaults keep their schedule"


def test_a_group_added_later_inherits_the_schedule() -> None:
    a, b, c, d = (np.zeros(1, F32) for _ in range(4))
    opt = SGD([a], lr=linear(1, 0, 4))
    opt.step([ones()])
    opt.add_param_group({"params": [b]})
    opt.add_param_group({"params": [c], "lr": 0.125})
    opt.add_param_group({"params": [d], "lr": lambda t: t})
    assert [group["lr"] for group in opt.param_groups] == [0.75, 0.75, 0.125, 1]
    opt.step([ones()] * 4)
    assert [p[0] for p in (a, b, c, d)] == [-1.75, -0.75, -0.125, -1]
    assert [group["lr"] for group in opt.param_groups] == [0.5, 0.5, 0.125, 2]
    assert set(opt.state_dict()["roptim"]["schedules"]) == {0, 1, 3}
    opt.param_groups[0]["lr"] = 1.0
    opt.step([ones()] * 4)
    assert [p[0] for p in (a, b)] == [-2.75, -1.25], "each group has its own"


def test_resetting_state_leaves_the_clock() -> None:
    opt, p = sgd(linear(1, 0, 4), momentum=0.5)
    opt.step([ones()])
    opt.state = {}
    assert (opt.update_count, opt.param_groups[0]["lr"]) == (1, 0.75)
    opt.step([ones()])
    assert p[0] == -1.75


def test_constructing_leaves_everything_as_it_was() -> None:
    """A schedule has no state: any number of optimizers may share it."""
    lr = linear(1, 0, 4)
    text = lr.to_json()
    first, p = sgd(lr)
    first.step([ones()])
    second, q = sgd(lr)
    second.step([ones()])
    first.step([ones()])
    assert (p[0], q[0], lr.to_json(), first.param_groups[0]["lr"]) == (-1.75, -1, text, 0.5)


@settings(max_examples=25)
@given(any_schedule(), st.integers(0, 8), st.booleans())
def test_any_schedule_trains_and_resumes(model: Model, split: int, keep: bool) -> None:
    lr = model.schedule.clip(0, 4) * 0.25
    params, others = arrays(), arrays()
    opt = SGD(params, lr=lr, momentum=0.5)
    by_hand = SGD(others, momentum=0.5)
    for t in range(8):
        by_hand.param_groups[0]["lr"] = lr(t)
        by_hand.step(gradients(t, others))
        if t == split:
            state = opt.state_dict()
            opt = SGD(params, lr=lr if keep else 1.0, momentum=0.0)
            opt.load_state_dict(state)
        opt.step(gradients(t, params))
        assert bits(params) == bits(others)
    assert opt.param_groups[0]["lr"] == lr(8)


def test_an_optimizer_written_in_python_has_no_clock() -> None:
    class Own(roptim.Optimizer):
        def __init__(self, params: Any, lr: Any) -> None:
            super().__init__(params, {"lr": lr})

    sentence = "Own: lr must be a value, got a schedule; an optimizer written in Python has no count of updates"
    with pytest.raises(roptim.RoptimTypeError, match=f"^{re.escape(sentence)}"):
        Own([ones()], warmup(3))
    opt = Own([ones()], 0.5)
    with pytest.raises(roptim.RoptimTypeError, match=f"^{re.escape(sentence)}"):
        opt.param_groups[0]["lr"] = warmup(3)
    assert opt.param_groups[0]["lr"] == 0.5
