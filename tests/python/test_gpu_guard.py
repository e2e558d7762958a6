"""Clipping and steps whose gradients are not finite, decided on the GPU."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from twins import (
    DTYPES,
    FULL,
    GPU_NAMES,
    KINDS,
    ON_GPU,
    accepted,
    draw,
    everything,
    f32,
    given,
    needs_software,
    outcome,
    same,
    tolerance,
)

import roptim
from roptim import SGD, Adam, NonfiniteError, Parameter
from roptim.optimizer import REGISTRY

pytestmark = pytest.mark.usefixtures("gpu")

BAD = [math.nan, math.inf, -math.inf]
SHAPES: list[tuple[int, ...]] = [(3,), (70, 61), (), (0, 4), (5, 1, 7)]


def same_norm(a: float | None, b: float | None) -> bool:
    if a is None or b is None:
        return a is b
    return a == pytest.approx(b, rel=1e-13, abs=0, nan_ok=True)


def spoiled(g: Any, at: int, bad: float) -> Any:
    g = g.copy()
    g.flat[at % g.size] = bad
    return g


# ---- the CPU's bits -----------------------------------------------------------------------------------------

OPTIONS: list[dict[str, Any]] = [
    {"clip_norm": 2.0},
    {"clip_value": 0.3},
    {"clip_norm": 1.0, "clip_value": 0.7, "nonfinite": "skip"},
    {"nonfinite": "skip"},
    {"nonfinite": "raise"},
    {"clip_norm": 1.0, "nonfinite": "raise"},
    {"clip_norm": 1.0, "nonfinite": "raise", "nonfinite_sync": True},
    {"clip_norm": 3.0, "nonfinite": "propagate"},
]


@pytest.mark.parametrize("name", GPU_NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_guard_is_the_cpus(name: str, dtype: Any, kind: str) -> None:
    """Over groups, missing gradients, and gradients that are not finite first, later and twice in a row."""
    rng = np.random.default_rng(0)
    start = accepted(name, [draw(rng, shape, dtype) for shape in SHAPES])
    if not start:
        return  # of real numbers
    shapes = [a.shape for a in start]
    decay = {key: 0.1 for key in ("weight_decay",) if key in REGISTRY[name]["defaults"]}
    for options in OPTIONS if FULL or name in ("SGD", "NAdam") else OPTIONS[2::2]:
        opts, params = [], []
        for backend in ({}, ON_GPU):
            p = given(start, kind, names=True)
            groups = [{"params": p[:2]}, {"params": p[2:], "lr": 0.02, **decay}]
            opts.append(getattr(roptim, name)(groups, lr=0.05, **options, **backend))
            params.append(p)
        for at, bad in enumerate([math.nan, None, None, math.inf, -math.inf, None]):
            g = [None if i == at % 4 else draw(rng, s, dtype, 10.0 ** (at % 3 - 1)) for i, s in enumerate(shapes)]
            if bad is not None and options.get("nonfinite") != "propagate":
                which = 1 if g[1] is not None else 0
                g[which] = spoiled(g[which], 1000 * at + 1, bad)
            said = [outcome(opt, g) for opt in opts]
            assert said[0] == said[1]
            assert (said[0] is not None) == (bad is not None and options.get("nonfinite") == "raise")
            assert same_norm(opts[0].gradient_norm, opts[1].gradient_norm)
            assert opts[0].skip_count == opts[1].skip_count
            found = [everything(opt, p) for opt, p in zip(opts, params, strict=True)]
            assert same(*found, tolerance(name)), (options, at)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_gradients_wider_than_their_parameters(dtype: Any) -> None:
    rng = np.random.default_rng(1)
    start = [draw(rng, (300,), dtype), draw(rng, (40, 3), dtype)]
    cpu, gpu = given(start, "Parameters"), given(start, "Parameters")
    one, two = (Adam(p, clip_norm=0.1, nonfinite="skip", **b) for p, b in ((cpu, {}), (gpu, ON_GPU)))
    for at in range(5):
        # One in float32, one in the parameter's own dtype, beyond float16 in the end.
        g = [draw(rng, (300,), np.float32, 1e5 if at == 4 else 1.0), draw(rng, (40, 3), dtype)]
        one.step(g)
        two.step(g)
        assert same_norm(one.gradient_norm, two.gradient_norm)
        assert same(everything(one, cpu), everything(two, gpu))


def test_float32_sums_in_all_dtypes_at_once() -> None:
    rng = np.random.default_rng(2)
    start = [draw(rng, (50 + i,), dtype) for i, dtype in enumerate(DTYPES)]
    cpu, gpu = given(start, "both"), given(start, "both")
    one, two = (Adam(p, clip_norm=0.5, clip_value=1.5, **b) for p, b in ((cpu, {}), (gpu, ON_GPU)))
    for _ in range(3):
        g = [draw(rng, p.shape, p.dtype, 3.0) for p in start]
        one.step(g)
        two.step(g)
        assert same_norm(one.gradient_norm, two.gradient_norm)
        assert same(everything(one, cpu), everything(two, gpu))


# ---- hostile numbers ----------------------------------------------------------------------------------------

EDGES = [0.0, -0.0, 1e-45, -1e-45, 1e-40, 1.1754944e-38, 1e-38, 1e-30, 1.0, -1.0, 1e19, -1e19, 1e38, 3.4028235e38]
NUMBERS = st.one_of(st.sampled_from(EDGES), st.floats(width=32, allow_nan=False, allow_infinity=False))
NORMS = st.one_of(
    st.sampled_from([0.0, 5e-324, 1e-300, 1e-45, 1e-38, 1e-6, 1.0, 1e19, 3.5e38, 1e300, math.inf]),
    st.floats(0, 1e300),
    st.floats(-40, 40).map(lambda x: 10**x),
)


@st.composite
def arrays(draw: Any) -> Any:
    size = draw(st.sampled_from([1, 2, 3, 5, 64, 255, 257]))
    few = draw(st.lists(NUMBERS, min_size=1, max_size=8))
    return np.resize(np.array(few, np.float32), size)


@settings(max_examples=20_000 if FULL else 250)
@drawn(
    st.lists(arrays(), min_size=1, max_size=3),
    st.one_of(st.none(), NORMS),
    st.one_of(st.none(), st.sampled_from([0.0, 1e-40, 0.3, 1e38, 1e300])),
    st.sampled_from(["propagate", "skip", "raise"]),
    st.one_of(st.none(), st.tuples(st.sampled_from(BAD), st.integers(0, 1000), st.integers(0, 2))),
    st.sampled_from(KINDS),
    st.booleans(),
)
def test_hostile_numbers(
    g: list[Any],
    clip_norm: float | None,
    clip_value: float | None,
    nonfinite: str,
    bad: Any,
    kind: str,
    momentum: bool,
) -> None:
    needs_software()
    if bad is not None:
        value, at, which = bad
        g = [spoiled(a, at, value) if i == which % len(g) else a for i, a in enumerate(g)]
    options = {"clip_norm": clip_norm, "clip_value": clip_value, "nonfinite": nonfinite}
    start = [np.ones_like(a) for a in g]
    cpu, gpu = given(start, kind), given(start, kind)
    kwargs: dict[str, Any] = {"lr": 1.0, "momentum": 0.5 if momentum else 0.0, **options}
    one, two = SGD(cpu, **kwargs), SGD(gpu, **kwargs, **ON_GPU)
    for gradients in (g, [a[::-1].copy() for a in g]):
        assert outcome(one, gradients) == outcome(two, gradients)
        if clip_norm is not None and 0 < clip_norm / (one.gradient_norm + 1e-6) < 1.2e-38:
            return  # see test_a_factor_below_the_normal_numbers
        assert same_norm(one.gradient_norm, two.gradient_norm), (one.gradient_norm, two.gradient_norm)
        assert one.skip_count == two.skip_count
        assert same(everything(one, cpu), everything(two, gpu))


def test_a_factor_below_the_normal_numbers() -> None:
    """It is rounded once, as on the CPU."""
    needs_software()
    rng = np.random.default_rng(3)
    for _ in range(100):
        g = np.array([10 ** rng.uniform(37.5, 38.4)], np.float32)
        max_norm = 10 ** rng.uniform(-3, 0)
        found = []
        for backend in ({}, ON_GPU):
            p = f32(1, value=0.0)
            SGD([p], lr=1.0, clip_norm=max_norm, **backend).step([g])
            found.append(p)
        assert same(*found), (g, max_norm)


@pytest.mark.parametrize("magnitude", [1e-45, 1e-38, 1e-20, 1e19, 3.4e38])
@pytest.mark.parametrize("max_norm", [0.0, 1e-30, 1.0, 1e30, 1e300, math.inf])
def test_many_of_one_magnitude(magnitude: float, max_norm: float) -> None:
    """Whose sum of squares no float32 holds."""
    needs_software()
    g = [f32(100_003, value=magnitude), f32(7, value=-magnitude)]
    cpu, gpu = given([f32(100_003), f32(7)], "both"), given([f32(100_003), f32(7)], "both")
    one, two = (SGD(p, lr=0.5, clip_norm=max_norm, **b) for p, b in ((cpu, {}), (gpu, ON_GPU)))
    one.step(g)
    two.step(g)
    assert same_norm(one.gradient_norm, two.gradient_norm)
    assert one.gradient_norm == pytest.approx(np.float64(np.float32(magnitude)) * math.sqrt(100_010), rel=1e-13)
    assert same(cpu, gpu)


@pytest.mark.parametrize("bad", BAD)
def test_one_bad_number_anywhere_is_found(bad: float) -> None:
    """At the seams of chunks, vectors and tensors."""
    sizes = [1, 3, 4095, 4096, 4097, 10_001, 70_000]
    p = [Parameter(f32(n), name=f"w{n}") for n in sizes]
    opt = SGD(p, lr=1.0, nonfinite="raise", **ON_GPU)
    fine = [f32(n) for n in sizes]
    for i, n in enumerate(sizes):
        for at in sorted({0, 1, n // 2, n - 2, n - 1, 4095, 4096} & set(range(n))):
            g = [spoiled(a, at, bad) if i == j else a for j, a in enumerate(fine)]
            kind = "NaN" if math.isnan(bad) else "an infinite number"
            said = outcome(opt, g)
            assert said == (
                f'SGD.step: gradient of parameter "w{n}" must be finite, got {kind}; '
                'nonfinite="skip" leaves such updates out'
            )
    assert all(bool((q.data == 1).all()) for q in p)
    assert (opt.update_count, opt.skip_count) == (0, 0)


def test_the_first_of_several_is_named() -> None:
    """What it has is the first such number where the gradient is at hand, else the worst."""
    for first, second in ((math.inf, math.nan), (math.nan, math.inf), (math.inf, -math.inf)):
        said = []
        for backend in ({}, ON_GPU):
            p = [Parameter(f32(5000)) for _ in range(4)]
            opt = SGD([{"params": p[:1]}, {"params": p[1:]}], nonfinite="raise", **backend)
            g = [f32(5000) for _ in range(4)]
            g[1][10], g[1][4999], g[3][0] = first, second, math.nan
            said.append(outcome(opt, g))
        assert all("gradient of parameter 1 must be finite, got " in str(message) for message in said)
        assert math.isnan(second) or said[0] == said[1]


# ---- errors that come later ---------------------------------------------------------------------------------

ASK: dict[str, Callable[[Any, Any], Any]] = {
    "step": lambda opt, p: opt.step([f32(3), f32(2)]),
    "step without gradients": lambda opt, p: opt.step([None, None]),
    "step of closure": lambda opt, p: opt.step(lambda: (1.0, [f32(3), f32(2)])),
    "update_count": lambda opt, p: opt.update_count,
    "skip_count": lambda opt, p: opt.skip_count,
    "state_dict": lambda opt, p: opt.state_dict(),
    "data": lambda opt, p: p.data,
    "asarray": lambda opt, p: np.asarray(p),
    "arithmetic": lambda opt, p: p * 2,
    "item": lambda opt, p: p[0],
    "write to a part": lambda opt, p: p.__setitem__(slice(1, 2), 0.0),
    "host": lambda opt, p: p.host().__enter__(),
    "sync": lambda opt, p: opt.sync(),
    "state step": lambda opt, p: opt.state[p]["step"],
    "state slot": lambda opt, p: opt.state[p]["exp_avg"],
    "state of": lambda opt, p: p in opt.state,
    "reset": lambda opt, p: opt.reset(p),
    "to": lambda opt, p: opt.to("cpu"),
    "deepcopy": lambda opt, p: copy.deepcopy(opt),
    "pickle": lambda opt, p: pickle.dumps(opt),
    "add_param_group": lambda opt, p: opt.add_param_group({"params": [f32(2)]}),
    "another optimizer": lambda opt, p: SGD([p]),
    "another optimizer's step": lambda opt, p: SECOND[0].step([f32(3)]),
}
SECOND: list[Any] = []


@pytest.mark.parametrize("ask", ASK.values(), ids=ASK)
@pytest.mark.parametrize("earlier", [0, 2])
def test_who_asks_is_told_once(ask: Callable[[Any, Any], Any], earlier: int) -> None:
    def make(**backend: Any) -> tuple[Any, list[Any]]:
        p = [Parameter(f32(3), name="w"), Parameter(f32(2), name="v")]
        return Adam(p, lr=0.1, nonfinite="raise", **backend), p

    (opt, p), (twin, q) = make(**ON_GPU), make()
    SECOND[:] = [SGD([p[0]], **ON_GPU)]
    for at in range(earlier):
        for one in (opt, twin):
            one.step([f32(3, value=at), f32(2, value=2.0)])
    before = everything(twin, q)
    opt.step([np.array([1, math.nan, 2], np.float32), f32(2)])
    with pytest.raises(NonfiniteError, match=r'^Adam.step: gradient of parameter "w" must be finite, got NaN'):
        ask(opt, p[0])
    assert same(everything(opt, p), before)
    for one in (opt, twin):
        one.step([f32(3, value=-1.0), None])
    opt.sync()
    assert same(everything(opt, p), everything(twin, q))


def test_what_is_written_after_a_bad_step_is_kept() -> None:
    p = Parameter(f32(3), name="w")
    opt = SGD([p], lr=1.0, nonfinite="raise", **ON_GPU)
    opt.step([f32(3, value=math.nan)])
    p.data = f32(3, value=5.0)
    with pytest.raises(NonfiniteError):
        opt.sync()
    assert (p.data == 5).all()
    opt.step([f32(3)])
    assert (p.data == 4).all()


def test_every_bad_step_is_told() -> None:
    """A loop that catches and goes on: the step that tells was not made."""
    p = Parameter(f32(3), name="w")
    opt = SGD([p], lr=1.0, nonfinite="raise", **ON_GPU)
    made = told = 0
    for value in (1.0, math.nan, 1.0, math.inf, math.nan, 1.0, 1.0):
        while True:
            try:
                opt.step([f32(3, value=value)])
                break
            except NonfiniteError:
                told += 1
        made += math.isfinite(value)
    assert (told, opt.update_count) == (3, made)
    assert (p.data == 1 - made).all()


@pytest.mark.parametrize("kind", ["arrays", "both", "Parameters"])
def test_steps_that_wait_raise_themselves(kind: str) -> None:
    for sync in (False, True) if kind != "Parameters" else (True,):
        p = given([f32(3), f32(2)], kind)
        opt = SGD(p, lr=1.0, nonfinite="raise", nonfinite_sync=sync, momentum=0.9, **ON_GPU)
        for at in range(2):
            with pytest.raises(
                NonfiniteError, match="gradient of parameter 1 must be finite, got -inf at flat index 1;"
            ):
                opt.step([f32(3), spoiled(f32(2), 1, -math.inf)])
            assert (opt.update_count, opt.skip_count) == (at, 0)
            opt.step([f32(3), f32(2)])
        assert np.allclose(np.asarray(p[0]), 1 - 1 - 1.9)


def test_a_deferred_error_is_not_lost_with_a_schedule() -> None:
    p = Parameter(f32(3), name="w")
    opt = SGD([p], lr=roptim.schedules.linear(1.0, 0.0, 4), nonfinite="raise", **ON_GPU)
    opt.step([f32(3)])
    # The schedule needs the count, so the step waits.
    with pytest.raises(NonfiniteError, match='parameter "w"'):
        opt.step([f32(3, value=math.nan)])
    opt.sync()
    assert (opt.update_count, opt.skip_count) == (1, 0)
    assert opt.param_groups[0]["lr"] == 0.75


def test_a_deferred_error_is_told_once_with_a_schedule() -> None:
    p = Parameter(f32(3), name="w")
    opt = SGD([p], lr=roptim.schedules.linear(1.0, 0.0, 4), nonfinite="raise", **ON_GPU)
    told = 0
    for value in (1.0, math.nan, 1.0, 1.0):
        told += outcome(opt, [f32(3, value=value)]) is not None
    assert told == 1
    assert opt.update_count == 3
    assert np.allclose(p.data, 1 - 1 - 0.75 - 0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_schedules_follow_the_applied_updates(kind: str) -> None:
    opts, params = [], []
    for backend in ({}, ON_GPU):
        p = given([f32(3), f32(2)], kind)
        lr = roptim.schedules.cosine(6, peak=1.0, floor=0.1)
        opts.append(SGD([{"params": p[:1], "lr": lr}, {"params": p[1:]}], lr=0.5, nonfinite="skip", **backend))
        params.append(p)
    for value in (1.0, math.nan, math.nan, 1.0, math.inf, 1.0):
        for opt in opts:
            opt.step([f32(3, value=value), f32(2)])
        assert opts[0].param_groups[0]["lr"] == opts[1].param_groups[0]["lr"]
        assert same(everything(opts[0], params[0]), everything(opts[1], params[1]))
    assert [(opt.update_count, opt.skip_count) for opt in opts] == [(3, 3)] * 2


def test_skipped_steps_of_parameters_need_no_question() -> None:
    """Many in a row, counted in the end."""
    p = Parameter(f32(3))
    opt = Adam([p], nonfinite="skip", **ON_GPU)
    for at in range(50):
        opt.step([f32(3, value=math.nan if at % 2 else 1.0)])
    assert (opt.update_count, opt.skip_count, opt.state[p]["step"]) == (25, 25, 25)


def test_the_norm_is_of_the_last_step() -> None:
    for kind in KINDS:
        p = given([f32(4), f32(2)], kind)
        opt = SGD(p, clip_norm=1.0, nonfinite="skip", **ON_GPU)
        assert opt.gradient_norm is None
        opt.step([f32(4, value=2.0), None])
        assert opt.gradient_norm == 4.0
        opt.step([None, None])
        assert opt.gradient_norm == 4.0
        opt.step([None, f32(2, value=math.inf)])
        assert opt.gradient_norm == math.inf
        opt.step([f32(4, value=math.nan), None])
        assert math.isnan(opt.gradient_norm)
        opt.step([f32(4, value=0.5), None])
        assert opt.gradient_norm == 1.0
        assert (opt.update_count, opt.skip_count) == (2, 2)
