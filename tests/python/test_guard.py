"""Clipping inside the step, and steps whose gradients are not finite."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from helpers import step
from hypothesis import given
from hypothesis import strategies as st

import roptim
from roptim import SGD, Adam, NonfiniteError, Optimizer, Parameter, SparseGrad, clip_grad_norm_
from roptim.optimizer import REGISTRY
from roptim.utils import clip_grad_value_, get_total_norm

STEPPED = {name: entry for name, entry in REGISTRY.items() if not entry["needs_closure"]}
SPARSE = [name for name, entry in STEPPED.items() if entry["takes_sparse"]]
DTYPES: list[Any] = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64, np.complex64, np.complex128]
BAD = [math.nan, math.inf, -math.inf]
REMEDY = 'nonfinite="skip" leaves such updates out'


@dataclass(frozen=True)
class Device:
    """An optimizer and where it runs."""

    name: str
    options: dict[str, Any]
    exact: bool  # a GPU may fuse the factor with what follows; software adapters do not

    def make(self, params: Any, **kwargs: Any) -> Any:
        return getattr(roptim, self.name)(params, **self.options, **kwargs)

    def settings(self, **wanted: Any) -> dict[str, Any]:
        """Those of the wanted hyperparameters that this optimizer has."""
        return {key: value for key, value in wanted.items() if key in STEPPED[self.name]["defaults"]}

    def shapes(self) -> list[tuple[int, ...]]:
        if self.name == "Muon":
            return [(3, 4), (5, 2), (1, 6), (70, 33)]
        return [(3,), (7, 5), (70, 33), (2, 1, 3)] if self.name == "SparseAdam" else [(3,), (0, 4), (70, 33), ()]

    def norm(self, value: float) -> Any:
        """What a norm must equal: a GPU sums in numbers of 48 bits."""
        return pytest.approx(value, rel=1e-13, nan_ok=True) if self.options else value

    def same(self, a: Any, b: Any) -> bool:
        return equal(a, b) if self.exact else near(a, b)


@pytest.fixture(params=[f"{name} {backend}" for name, entry in STEPPED.items() for backend in entry["backends"]])
def device(request: pytest.FixtureRequest) -> Device:
    """Every optimizer that takes gradients, on every backend it has."""
    name, backend = request.param.split()
    if backend == "cpu":
        return Device(name, {}, True)
    request.getfixturevalue("gpu")
    exact = all(found.software for found in roptim.devices()[1:])
    return Device(name, {"backend": "gpu", "allow_software": True}, exact)


def told(bad: float) -> str:
    """A number that is not finite, as messages call it."""
    return "NaN" if math.isnan(bad) else str(bad)


# ---- what is compared ---------------------------------------------------------------------------------------


def everything(opt: Any, params: list[Any]) -> Any:
    """Parameters, state, groups and counts, but for the count of what was left out."""
    saved = opt.state_dict()
    about = {key: value for key, value in saved["roptim"].items() if key != "skip_count"}
    return [np.array(p) for p in params], saved["state"], saved["param_groups"], about, opt.update_count


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray):
        return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


def near(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray):
        return bool(np.allclose(a, b, rtol=1e-5, atol=1e-6))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(near(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(near, a, b))
    return bool(a == b)


def draw(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any, scale: float = 1.0) -> Any:
    x = scale * rng.standard_normal((2, *shape))
    return (x[0] + 1j * x[1]).astype(dtype) if np.dtype(dtype).kind == "c" else np.asarray(x[0]).astype(dtype)


def wide(g: Any) -> Any:
    """A copy in what the step computes in."""
    return g.astype(np.float32 if g.dtype.itemsize == 2 else g.dtype)


def clipped(gradients: list[Any], clip_norm: Any, clip_value: Any) -> tuple[list[Any], float]:
    """What the options should amount to: copies, bounded by value, then by norm; and the norm between."""
    copies = [None if g is None else wide(g) for g in gradients]
    present = [g for g in copies if g is not None]
    if clip_value is not None:
        clip_grad_value_(present, clip_value)
    norm = get_total_norm(present)
    if clip_norm is not None:
        clip_grad_norm_(present, clip_norm)
    return copies, norm


def bits(gradients: list[Any]) -> list[Any]:
    return [None if g is None else g.tobytes() for g in gradients]


CLIPS = {
    "by norm": (2.0, None),
    "by value": (None, 0.75),
    "by both": (2.0, 0.75),
    "to zero": (0.0, None),
    "to zero by value": (None, 0.0),
}


# ---- clipping -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS)
@pytest.mark.parametrize("decayed", [False, True])
def test_a_clipped_step_is_one_with_clipped_gradients(device: Device, clip: Any, decayed: bool) -> None:
    clip_norm, clip_value = clip
    variants = {"momentum": 0.9, "nesterov": True, "amsgrad": True, "centered": True}
    settings = device.settings(weight_decay=0.1, maximize=True, **variants) if decayed else {}
    rng = np.random.default_rng(0)
    start = [draw(rng, shape, np.float32) for shape in device.shapes()]

    def make(**options: Any) -> tuple[Any, list[Any]]:
        params = [p.copy() for p in start]
        other = device.settings(lr=0.03, **({"weight_decay": 0.2} if decayed else {}))
        groups = [{"params": params[:2]}, {"params": params[2:], **other}]
        return device.make(groups, lr=0.01, **settings, **options), params

    opt, params = make(clip_norm=clip_norm, clip_value=clip_value)
    plain, expected = make()
    free, unclipped = make()
    assert opt.gradient_norm is None
    acted = []
    # Small gradients are within the bounds; the last step has one gradient alone.
    for at, scale in enumerate([1.0, 1e-3, 30.0, 1.0, 1e-3, 30.0]):
        missing = (0, 1, 2) if at == 5 else (at % 3,)
        g = [None if i in missing else draw(rng, p.shape, p.dtype, scale) for i, p in enumerate(params)]
        before = bits(g)
        for array in g:
            if array is not None:
                array.flags.writeable = False
        want, norm = clipped(g, clip_norm, clip_value)
        step(opt, g)
        assert bits(g) == before
        step(plain, want)
        step(free, g)
        acted.append(bits(want) != before)
        assert opt.gradient_norm == (None if clip_norm is None else device.norm(norm))
        assert device.same(everything(opt, params), everything(plain, expected))
    assert all(acted) if 0.0 in clip else acted == [True, False, True, True, False, True]
    assert opt.skip_count == 0
    if device.name != "Rprop":  # which looks at signs
        assert not equal(params, unclipped)


@pytest.mark.parametrize("name", STEPPED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_clipped_steps_in_every_dtype(name: str, dtype: Any) -> None:
    if np.dtype(dtype).kind == "c" and name in ("Adafactor", "Muon", "SparseAdam"):
        return  # of real numbers
    rng = np.random.default_rng(1)
    shapes = [(4, 3), (9, 2)]
    start = [draw(rng, shape, dtype) for shape in shapes]
    for order in "CF":
        params, expected = ([np.asarray(p.copy(), order=order) for p in start] for _ in range(2))
        opt = getattr(roptim, name)(params, lr=0.05, clip_norm=0.5, clip_value=1.0)
        plain = getattr(roptim, name)(expected, lr=0.05)
        for _ in range(3):
            g = [np.asarray(draw(rng, shape, dtype), order=order) for shape in shapes]
            before = bits(g)
            want, norm = clipped(g, 0.5, 1.0)
            step(opt, g)
            step(plain, want)
            assert bits(g) == before
            assert opt.gradient_norm == norm
            assert equal(everything(opt, params), everything(plain, expected))


@pytest.mark.parametrize("clip_value", [0.25, 0.1, 0.3, 1 / 3])
@pytest.mark.parametrize(
    "dtypes", [*([dtype] for dtype in DTYPES), DTYPES], ids=[*(dtype.__name__ for dtype in DTYPES), "mixed"]
)
def test_a_bound_is_rounded_to_what_the_step_computes_in(dtypes: list[Any], clip_value: float) -> None:
    """And the norm is that of the numbers so bounded."""
    rng = np.random.default_rng(2)
    start = [draw(rng, (40, 5), dtype) for dtype in dtypes]
    params, expected = ([p.copy() for p in start] for _ in range(2))
    opt, plain = SGD(params, lr=1.0, clip_norm=0.5, clip_value=clip_value), SGD(expected, lr=1.0)
    for _ in range(8):
        g = [draw(rng, p.shape, p.dtype, 3.0) for p in start]
        want, norm = clipped(g, 0.5, clip_value)
        opt.step(g)
        plain.step(want)
        assert opt.gradient_norm == norm
        assert bits(params) == bits(expected)


def test_what_does_not_bound_changes_no_bit(device: Device) -> None:
    rng = np.random.default_rng(3)
    start = [draw(rng, shape, np.float32) for shape in device.shapes()]
    gradients = [[draw(rng, p.shape, p.dtype, 10.0) for p in start] for _ in range(3)]
    settings = device.settings(weight_decay=0.1)
    results = []
    for options in (
        {},
        {"clip_norm": None, "clip_value": None, "nonfinite": "propagate"},
        {"clip_norm": math.inf, "clip_value": math.inf, "nonfinite": "raise"},
        {"clip_norm": 1e30, "clip_value": 1e30, "nonfinite": "skip"},
        {"clip_norm": 1e300, "clip_value": 1e300},
    ):
        params = [p.copy() for p in start]
        opt = device.make(params, **settings, **options)
        for g in gradients:
            step(opt, g)
        results.append(everything(opt, params))
        assert opt.skip_count == 0
    assert all(device.same(result, results[0]) for result in results[1:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_does_not_bound_in_every_dtype(dtype: Any) -> None:
    """Signs of zero, the smallest numbers and infinities included."""
    tiny = float(ml_dtypes.finfo(np.zeros(1, dtype).real.dtype).smallest_subnormal)
    g = np.array([1.0, -0.0, 0.0, tiny, -tiny, -2.5]).astype(dtype)
    infinite = np.array([1.0, -0.0, 0.0, math.inf, -math.inf, -2.5]).astype(dtype)
    results = []
    for options in ({}, {"clip_norm": math.inf}, {"clip_norm": 1e300, "clip_value": sys.float_info.max}):
        p = np.array([0.0, -0.0, 0.0, 0.0, -0.0, 1.0]).astype(dtype)
        opt = SGD([p], lr=0.5, momentum=0.5, flush_denormals=False, **options)
        opt.step([g])
        opt.step([g])
        if options.get("clip_norm") != 1e300:
            opt.step([infinite])
        results.append((p.tobytes(), opt.state[0]["momentum_buffer"].tobytes()))
    assert results[0] == results[1]
    p = np.zeros(6, dtype)
    SGD([p], clip_norm=1e300, clip_value=sys.float_info.max).step([g])
    q = np.zeros(6, dtype)
    SGD([q]).step([g])
    assert p.tobytes() == q.tobytes()


def test_a_bound_of_zero_stops_and_decay_goes_on(backend: dict[str, Any]) -> None:
    start = np.array([1.0, -2.0, 0.5], np.float32)
    for bound in ({"clip_norm": 0}, {"clip_value": 0}, {"clip_norm": 0.0, "clip_value": 0.0}):
        p, q = start.copy(), start.copy()
        stopped = SGD([p], lr=0.5, momentum=0.9, **bound, **backend)
        decayed = SGD([q], lr=0.5, weight_decay=0.5, **bound, **backend)
        for _ in range(3):
            stopped.step([np.ones(3, np.float32)])
            decayed.step([np.ones(3, np.float32)])
        assert p.tobytes() == start.tobytes()
        assert np.array_equal(q, start * np.float32(0.75) ** 3)
        assert stopped.update_count == decayed.update_count == 3


def test_the_norm_is_over_all_groups_and_counts_no_frozen_parameter() -> None:
    p = [Parameter(np.zeros(1, np.float32)) for _ in range(4)]
    p[2].requires_grad = False
    for parameter, value in zip(p, [3.0, 4.0, 100.0, 12.0], strict=True):
        parameter.grad = np.array([value], np.float32)
    opt = SGD([{"params": p[:1]}, {"params": p[1:3]}, {"params": p[3], "lr": 2.0}], lr=1.0, clip_norm=1.3)
    opt.step()
    assert opt.gradient_norm == 13.0
    factor = np.float32(1.3 / (13.0 + 1e-6))
    want = [-3 * factor, -4 * factor, np.float32(0), -2 * (12 * factor)]
    assert [parameter.data[0] for parameter in p] == want
    assert [parameter.grad[0] for parameter in p] == [3, 4, 100, 12], "left alone"
    p[3].grad = None
    opt.step()
    assert opt.gradient_norm == 5.0


def test_mixed_dtypes_have_one_norm() -> None:
    g = [np.full(2, i + 1).astype(dtype) for i, dtype in enumerate(DTYPES)]
    params, expected = ([np.zeros(2, dtype) for dtype in DTYPES] for _ in range(2))
    opt, plain = SGD(params, lr=1.0, clip_norm=1.0), SGD(expected, lr=1.0)
    opt.step(g)
    norm = math.sqrt(2 * sum((i + 1) ** 2 for i in range(len(DTYPES))))
    assert opt.gradient_norm == pytest.approx(norm, rel=1e-15)
    want, _ = clipped(g, 1.0, None)
    plain.step(want)
    for i, (a, b) in enumerate(zip(params, expected, strict=True)):
        assert a.tobytes() == b.tobytes()
        assert float(a[0].real) == pytest.approx(-(i + 1) / norm, rel=1e-2 if a.dtype.itemsize == 2 else 1e-6)


@given(
    st.lists(st.integers(0, 20_000), min_size=1, max_size=3),
    st.sampled_from([np.float32, np.float64]),
    st.floats(-3, 3),
    st.sampled_from([None, 0.5, 2.0]),
    st.integers(0, 2**32 - 1),
)
def test_the_norm_is_that_of_exact_sums(
    sizes: list[int], dtype: Any, scale: float, clip_value: float | None, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    g = [draw(rng, (n,), dtype, 10**scale) for n in sizes]
    opt = SGD([np.zeros(n, dtype) for n in sizes], clip_norm=1.0, clip_value=clip_value)
    opt.step(g)
    x = np.concatenate(g).astype(np.float64)
    x = x if clip_value is None else np.clip(x, -clip_value, clip_value)
    assert opt.gradient_norm == pytest.approx(math.sqrt(math.fsum(x * x)), rel=1e-14)


def test_threads_change_no_bit() -> None:
    g = np.sin(np.arange(300_001, dtype=np.float32))
    results = []
    for threads in (1, 2, 3):
        p = np.zeros_like(g)
        opt = Adam([p], threads=threads, clip_norm=0.5, clip_value=0.25, nonfinite="raise")
        for _ in range(2):
            opt.step([g])
        results.append((p.tobytes(), opt.gradient_norm))
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_sparse_gradients_are_clipped_by_their_sums(name: str, dtype: Any) -> None:
    rng = np.random.default_rng(6)
    start = draw(rng, (9, 3), dtype)
    params, expected = start.copy(), start.copy()
    opt = getattr(roptim, name)([params], lr=0.1, clip_norm=0.5, clip_value=0.75)
    plain = getattr(roptim, name)([expected], lr=0.1)
    for index in ([4, 1, 4, 0, 4], [8], [2, 2], []):
        values = draw(rng, (len(index), 3), dtype)
        before = values.tobytes()
        g = SparseGrad(np.array(index, np.int64), values, start.shape)
        sums = g.coalesced()
        want, norm = clipped([sums.values], 0.5, 0.75)
        step(opt, [g])
        assert g.values is values
        assert values.tobytes() == before
        assert opt.gradient_norm == norm
        step(plain, [SparseGrad(sums.indices, want[0], start.shape)])
        assert equal(everything(opt, [params]), everything(plain, [expected]))
    assert not equal(params, start)


def test_scipys_arrays_are_clipped() -> None:
    sparse = pytest.importorskip("scipy.sparse")
    p = np.zeros((2, 2))
    opt = SGD([p], lr=1.0, clip_norm=1.0)
    opt.step([sparse.coo_array(([1.0, 2.0, 4.0], ([1, 1, 0], [0, 0, 1])), shape=(2, 2))])
    assert opt.gradient_norm == 5.0
    assert p.tolist() == [[0, -4 * (1 / (5 + 1e-6))], [-3 * (1 / (5 + 1e-6)), 0]]
    guarded = SGD([p], nonfinite="raise")
    with pytest.raises(NonfiniteError, match="gradient of parameter 0 must be finite, got NaN"):
        guarded.step([sparse.coo_array(([math.nan], ([1], [0])), shape=(2, 2))])


def test_the_norm_without_bounds_or_gradients() -> None:
    p = Parameter(np.zeros(2))
    for options in ({}, {"clip_value": 1.0}, {"nonfinite": "raise"}):
        opt = SGD([p], **options)
        opt.step([np.ones(2)])
        assert opt.gradient_norm is None
    opt = SGD([p], clip_norm=1.0)
    opt.step([None])
    assert opt.gradient_norm is None or opt.gradient_norm == 0.0
    opt.step([np.zeros(2)])
    assert opt.gradient_norm == 0.0
    for cls in (roptim.LBFGS, roptim.ConjugateGradient):
        assert cls([p]).gradient_norm is None


# ---- what is not finite -------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [{}, {"clip_norm": 1.0}, {"clip_value": 0.5}, {"clip_norm": 1.0, "clip_value": 0.5}])
def test_a_bad_step_is_as_if_it_had_never_been(device: Device, clip: dict[str, float]) -> None:
    """At the start, between good steps and after another; on parameters that lie on the device, too."""
    rng = np.random.default_rng(7)
    settings = device.settings(weight_decay=0.1, momentum=0.9)
    start = [draw(rng, shape, np.float32) for shape in device.shapes()]
    good = [[draw(rng, p.shape, p.dtype) for p in start] for _ in range(3)]

    def places(n: int) -> list[int]:
        return [0, n - 1, 1234 % n]

    def bad(at: int) -> list[Any]:
        g = [draw(rng, p.shape, p.dtype) for p in start]
        g[2].flat[places(g[2].size)[at]] = BAD[at]
        if at == 1:
            g[0] = None
        return g

    def fresh(options: dict[str, Any], wrap: Callable[[Any], Any] = lambda p: p) -> tuple[Any, list[Any]]:
        params = [wrap(p.copy()) for p in start]
        return device.make(params, **settings, **clip, **options), params

    plain, expected = fresh({})
    skipping, skipped = fresh({"nonfinite": "skip"})
    # On a GPU the next call would report it.
    raising, refused = fresh({"nonfinite": "raise", "nonfinite_sync": True}, Parameter)
    for at in range(3):
        gradients = bad(at)
        before, bytes_before = everything(skipping, skipped), bits(gradients)
        step(skipping, gradients)
        assert equal(everything(skipping, skipped), before)
        assert skipping.skip_count == at + 1
        before = everything(raising, refused)
        got = f"{told(BAD[at])} at flat index {places(start[2].size)[at]}"
        message = f"{device.name}.step: gradient of parameter 2 must be finite, got {got}; {REMEDY}"
        with pytest.raises(NonfiniteError, match=f"^{re.escape(message)}$"):
            step(raising, gradients)
        assert equal(everything(raising, refused), before)
        assert raising.skip_count == 0
        assert bits(gradients) == bytes_before
        for opt in (plain, skipping, raising):
            step(opt, good[at])
    assert device.same(everything(skipping, skipped), everything(plain, expected))
    assert device.same(everything(raising, refused), everything(plain, expected))
    assert plain.update_count == skipping.update_count == raising.update_count == 3
    assert not equal([np.array(p) for p in expected], start)


@given(
    st.lists(st.integers(1, 9000), min_size=1, max_size=3),
    st.lists(st.sampled_from(DTYPES), min_size=3, max_size=3),
    st.sampled_from(BAD),
    st.sampled_from([{}, {"clip_norm": 1.0}, {"clip_value": 0.5}, {"clip_norm": math.inf, "clip_value": 0.0}]),
    st.booleans(),
    st.data(),
)
def test_it_is_noticed_anywhere(
    sizes: list[int], dtypes: list[Any], bad: float, clip: Any, reversed_: bool, data: Any
) -> None:
    which = data.draw(st.integers(0, len(sizes) - 1), "which")
    positions = st.sampled_from([0, sizes[which] - 1, sizes[which] // 2, min(4095, sizes[which] - 1)])
    at = data.draw(positions | st.integers(0, sizes[which] - 1), "at")
    g = [np.full(n, 0.5).astype(dtype) for n, dtype in zip(sizes, dtypes, strict=False)]
    if g[which].dtype.kind == "c" and data.draw(st.booleans(), "imaginary"):
        g[which].imag[at] = bad
    else:
        g[which][at] = bad
    if reversed_:
        g = [x[::-1] for x in g]
        at = sizes[which] - 1 - at
    params = [np.ones(x.shape, x.dtype) for x in g]
    named = {f"p{i}": p for i, p in enumerate(params)}
    raising, skipping = SGD(named, nonfinite="raise", **clip), SGD(params, nonfinite="skip", **clip)
    part = " in the imaginary part" if g[which].imag.flat[at] != 0 else " in the real part"
    got = f"{told(bad)}{part if g[which].dtype.kind == 'c' else ''} at flat index {at}"
    with pytest.raises(NonfiniteError) as raised:
        raising.step({f"p{i}": x for i, x in enumerate(g)})
    assert str(raised.value) == f'SGD.step: gradient of parameter "p{which}" must be finite, got {got}; {REMEDY}'
    assert skipping.step(g) is None
    assert skipping.skip_count == 1
    assert all((p == 1).all() for p in params)
    propagating = SGD(params, lr=1.0)
    propagating.step(g)
    assert (propagating.skip_count, propagating.update_count) == (0, 1)
    stepped = np.concatenate([p.astype(np.complex128) for p in params])
    assert np.count_nonzero(stepped == 0.5) == len(stepped) - 1
    assert not np.isfinite(stepped).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{"nonfinite": "raise"}, {"nonfinite": "skip"}])
def test_large_numbers_are_finite(dtype: Any, options: dict[str, Any]) -> None:
    """Whatever their squares, sums or magnitudes are."""
    largest = ml_dtypes.finfo(np.zeros(1, dtype).real.dtype).max
    g = np.full(100, largest, dtype)
    if g.dtype.kind == "c":
        g.imag[:] = -largest
    for clip in ({}, {"clip_value": 1.0}, {"clip_norm": 1.0}):
        p = np.zeros(100, dtype)
        opt = SGD([p], lr=0.125, **clip, **options)
        opt.step([g])
        assert (opt.update_count, opt.skip_count) == (1, 0)
        assert np.isfinite(p.astype(np.complex128)).all()
        if "clip_value" in clip:
            assert (p.real == -0.125).all()


def test_large_finite_doubles_are_clipped() -> None:
    p = np.zeros(4)
    opt = SGD([p], lr=1.0, clip_norm=1.0, nonfinite="raise")
    opt.step([np.full(4, 1e300)])
    assert opt.gradient_norm == pytest.approx(2e300, rel=1e-15)
    assert p == pytest.approx([-0.5] * 4, rel=1e-12)


def test_the_first_bad_parameter_is_named_as_it_is_known() -> None:
    bad, good = np.array([0.0, math.nan]), np.zeros(2)
    arrays = [np.ones(2) for _ in range(3)]
    by_index = SGD([{"params": arrays[:1]}, {"params": arrays[1:]}], nonfinite="raise")
    with pytest.raises(NonfiniteError, match=r"^SGD\.step: gradient of parameter 1 must be finite, got NaN at flat"):
        by_index.step([good, bad, bad])
    with pytest.raises(NonfiniteError, match="gradient of parameter 2 must be finite, got -inf at flat index 0"):
        by_index.step([None, good, np.array([-math.inf, 1.0])])
    pairs = Adam([("encoder.weight", arrays[0]), ("bias", arrays[1])], nonfinite="raise")
    with pytest.raises(NonfiniteError, match=r'^Adam\.step: gradient of parameter "bias" must be finite'):
        pairs.step([good, bad])
    nested = SGD({"layer": [arrays[0], {"w": arrays[1]}], "head": arrays[2]}, nonfinite="raise")
    with pytest.raises(NonfiniteError, match=r'gradient of parameter "layer\.1\.w" must be finite'):
        nested.step({"layer": [good, {"w": bad}], "head": bad})
    assert all((a == 1).all() for a in arrays)
    assert issubclass(NonfiniteError, RuntimeError)


def test_a_parameters_own_name_is_used() -> None:
    """As in every other message of a step."""
    p = Parameter(np.ones(2), name="embedding")
    opt = SGD([p], nonfinite="raise")
    with pytest.raises(ValueError, match='gradient of parameter "embedding" must be of shape'):
        opt.step([np.ones(3)])
    with pytest.raises(NonfiniteError, match='gradient of parameter "embedding" must be finite'):
        opt.step([np.full(2, math.nan)])


@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_what_has_no_say(nonfinite: str) -> None:
    """Gradients of frozen parameters; values that are not the gradient's; nothing at all."""
    frozen, p = Parameter(np.ones(2), requires_grad=False), Parameter(np.array([math.nan, 1.0]))
    frozen.grad, p.grad = np.full(2, math.nan), np.ones(2)
    opt = SGD([frozen, p], lr=1.0, nonfinite=nonfinite, clip_norm=math.inf)
    opt.step()
    assert p.data[1] == 0.0
    assert (opt.update_count, opt.skip_count) == (1, 0)
    p.grad = None
    opt.step()
    opt.step([None, None])
    assert (opt.update_count, opt.skip_count) == (1, 0)


def test_other_refusals_come_first() -> None:
    p, q = np.ones(2), np.ones(2)
    opt = SGD([p, q], nonfinite="skip", clip_norm=1.0)
    bad = np.full(2, math.nan)
    with pytest.raises(ValueError, match=r"gradient of parameter 1 must be of shape \(2,\), got \(3,\)"):
        opt.step([bad, np.ones(3)])
    with pytest.raises(TypeError, match="gradient of parameter 1 must be float64, got float32"):
        opt.step([bad, np.ones(2, np.float32)])
    assert (opt.update_count, opt.skip_count, opt.gradient_norm) == (0, 0, None)


def test_infinities_are_bounded_where_they_may_pass(backend: dict[str, Any]) -> None:
    g = np.array([math.inf, -math.inf, 0.5, -3.0], np.float32)
    p, q = np.zeros(4, np.float32), np.zeros(4, np.float32)
    opt = SGD([p], lr=1.0, clip_value=2.0, **backend)
    opt.step([g])
    assert p.tolist() == [-2.0, 2.0, -0.5, 2.0]
    both = SGD([q], lr=1.0, clip_value=2.0, clip_norm=1.0, **backend)
    both.step([g])
    assert both.gradient_norm == math.sqrt(12.25)
    assert np.array_equal(q, p * np.float32(1 / (3.5 + 1e-6)))
    for nonfinite in ("raise", "skip"):
        r = np.zeros(4, np.float32)
        guarded = SGD([r], lr=1.0, clip_value=2.0, nonfinite=nonfinite, **backend)
        if nonfinite == "raise":
            with pytest.raises(NonfiniteError, match="got inf at flat index 0"):
                guarded.step([g])
        else:
            guarded.step([g])
        assert not r.any()
        assert guarded.update_count == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("clip", [{}, {"clip_value": 2.0}, {"clip_norm": 1.0}, {"clip_norm": math.inf}])
def test_propagation_is_clipping_before_the_step(dtype: Any, clip: dict[str, float]) -> None:
    for bad in BAD:
        g = [np.array([1.0, bad, -8.0]).astype(dtype), np.array([0.5]).astype(dtype)]
        start = [np.array([1.0, 1.0, 1.0]).astype(dtype), np.array([1.0]).astype(dtype)]
        params, expected = ([p.copy() for p in start] for _ in range(2))
        with np.errstate(all="ignore"):
            want, norm = clipped(g, clip.get("clip_norm"), clip.get("clip_value"))
        opt, plain = SGD(params, lr=1.0, nonfinite="propagate", **clip), SGD(expected, lr=1.0)
        opt.step(g)
        plain.step(want)
        for a, b in zip(params, expected, strict=True):
            assert np.array_equal(
                a.astype(np.complex128).view(float), b.astype(np.complex128).view(float), equal_nan=True
            )
        assert opt.gradient_norm == (pytest.approx(norm, nan_ok=True, rel=0) if "clip_norm" in clip else None)
        assert math.isnan(params[0][1].real) or not math.isnan(bad)
        if "clip_norm" in clip and math.isnan(bad):
            assert np.isnan(params[1].astype(np.complex128)).all(), "a NaN norm makes everything NaN"


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("index", [[1], [3, 1, 3], [0, 1, 2, 3, 4]])
def test_sparse_gradients_that_are_not_finite(name: str, bad: float, index: list[int]) -> None:
    table = np.ones((5, 2))
    values = np.ones((len(index), 2))
    values[-1, 1] = bad
    g = SparseGrad(index, values, table.shape)
    raising, skipping = (getattr(roptim, name)([table], nonfinite=how) for how in ("raise", "skip"))
    with pytest.raises(NonfiniteError, match=f"^{name}.step: gradient of parameter 0 must be finite"):
        raising.step([g])
    skipping.step([g])
    assert (skipping.skip_count, skipping.update_count, raising.update_count) == (1, 0, 0)
    assert (table == 1).all()
    assert skipping.state_dict()["state"] == {}
    fine = SparseGrad([1], np.ones((1, 2)), table.shape)
    skipping.step([fine])
    assert skipping.update_count == 1


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("values", [[math.inf, -math.inf], [3e38, 3e38], [-3e38, -3e38]])
def test_sparse_rows_whose_sum_is_not_finite(name: str, values: list[float]) -> None:
    """The sum is what counts, and taking it is no reason for a warning."""
    table = np.ones((3, 1), np.float32)
    g = SparseGrad([2, 2], np.array(values, np.float32)[:, None], table.shape)
    opt = getattr(roptim, name)([table], nonfinite="skip")
    opt.step([g])
    assert (opt.skip_count, opt.update_count) == (1, 0)
    with pytest.raises(NonfiniteError):
        getattr(roptim, name)([table], nonfinite="raise").step([g])
    assert (table == 1).all()


def test_a_skipped_step_returns_the_loss() -> None:
    p = Parameter(np.ones(2))
    bad = np.full(2, math.inf)
    opt = SGD([p], lr=1.0, nonfinite="skip")
    assert opt.step([bad]) is None
    assert opt.step(lambda: (5.0, [bad])) == 5.0
    p.grad = bad

    def closure() -> float:
        assert p.grad is bad
        return 7.5

    assert opt.step(closure) == 7.5
    assert opt.step() is None
    assert p.grad is bad
    assert (opt.skip_count, opt.update_count) == (4, 0)
    assert (p.data == 1).all()
    assert opt.step(lambda: (2.0, [np.ones(2)])) == 2.0
    assert not p.data.any()
    assert (opt.skip_count, opt.update_count) == (4, 1)


def test_a_scheduler_after_a_skipped_step_does_not_warn() -> None:
    p = np.ones(2)
    opt = SGD([p], lr=1.0, nonfinite="skip")
    scheduler = roptim.lr_scheduler.StepLR(opt, 1, gamma=0.5)
    opt.step([np.full(2, math.nan)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler.step()
    assert scheduler.get_last_lr() == [0.5]
    opt.step([np.ones(2)])
    assert p.tolist() == [0.5, 0.5]
    untouched = SGD([p], nonfinite="skip")
    with pytest.warns(UserWarning, match="before optimizer"):
        roptim.lr_scheduler.StepLR(untouched, 1).step()


@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_a_schedule_waits_for_the_next_update(nonfinite: str) -> None:
    p, q = np.zeros(1), np.zeros(1)
    schedule = roptim.schedules.linear(1.0, 0.0, 4)
    opt, plain = SGD([p], lr=schedule, nonfinite=nonfinite), SGD([q], lr=schedule)
    for at in range(4):
        for bad in BAD[: at + 1]:
            try:
                opt.step([np.array([bad])])
            except NonfiniteError:
                assert nonfinite == "raise"
            assert opt.param_groups[0]["lr"] == 1.0 - at / 4
        for one in (opt, plain):
            one.step([np.ones(1)])
    assert p[0] == q[0] == -(1.0 + 0.75 + 0.5 + 0.25)
    assert opt.skip_count == (9 if nonfinite == "skip" else 0)


# ---- counts and options last --------------------------------------------------------------------------------


def skipped_twice(**options: Any) -> tuple[Any, Any]:
    p = np.ones(3, np.float32)
    opt = Adam({"p": p}, lr=0.1, nonfinite="skip", **options)
    for value in (math.nan, 1.0, math.inf):
        opt.step({"p": np.full(3, value, np.float32)})
    assert (opt.skip_count, opt.update_count) == (2, 1)
    return opt, p


def test_the_count_is_saved(tmp_path: Any, backend: dict[str, Any]) -> None:
    opt, p = skipped_twice(**backend)
    saved = opt.state_dict()
    assert saved["roptim"]["skip_count"] == 2
    assert saved["roptim"]["update_count"] == 1
    roptim.save({"p": p, "opt": saved}, tmp_path / "run.safetensors")
    for state in (saved, roptim.load(tmp_path / "run.safetensors")["opt"], pickle.loads(pickle.dumps(saved))):
        again = Adam({"p": p.copy()}, nonfinite="skip", **backend)
        again.load_state_dict(state)
        assert (again.skip_count, again.update_count) == (2, 1)
        assert equal(again.state_dict(), saved)
        again.step({"p": np.full(3, math.nan, np.float32)})
        assert again.skip_count == 3
    assert opt.skip_count == 2
    # An option of the optimizer, not of its state.
    other = Adam({"p": p.copy()})
    other.load_state_dict(saved)
    assert other.skip_count == 2
    other.step({"p": np.full(3, math.nan, np.float32)})
    assert other.skip_count == 2
    assert other.update_count == 2


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt)), copy.copy])
def test_copies_count_and_clip_as_the_original_does(clone: Any, backend: dict[str, Any]) -> None:
    opt, _ = skipped_twice(clip_norm=0.5, clip_value=0.75, **backend)
    again = clone(opt)
    assert (again.skip_count, again.update_count) == (2, 1)
    for value in (math.nan, 2.0, 0.125):
        for one in (opt, again):
            one.step({"p": np.full(3, value, np.float32)})
    mine, theirs = (o.param_groups[0]["params"] for o in (opt, again))
    assert again.skip_count == opt.skip_count == 3
    assert again.gradient_norm == opt.gradient_norm == pytest.approx(math.sqrt(3 / 64), rel=1e-14)
    assert equal(everything(again, theirs), everything(opt, mine))
    raising = SGD([np.ones(2)], nonfinite="raise")
    with pytest.raises(NonfiniteError):
        clone(raising).step([np.full(2, math.nan)])


def test_a_state_without_the_count_or_with_a_wrong_one() -> None:
    opt, p = skipped_twice()
    saved = opt.state_dict()
    before = everything(opt, [p])
    for wrong in (-1, 1.5, "2", None, True, 2**64, [2], math.nan):
        state = {**saved, "roptim": {**saved["roptim"], "skip_count": wrong}}
        with pytest.raises(roptim.RoptimError, match="skip_count"):
            opt.load_state_dict(state)
        assert opt.skip_count == 2
        assert equal(everything(opt, [p]), before)
    largest = {**saved, "roptim": {**saved["roptim"], "skip_count": 2**64 - 1}}
    opt.load_state_dict(largest)
    opt.step({"p": np.full(3, math.nan, np.float32)})
    assert opt.skip_count == 2**64 - 1, "it stays at the largest"
    old = {**saved, "roptim": {key: value for key, value in saved["roptim"].items() if key != "skip_count"}}
    opt.load_state_dict(old)
    assert (opt.skip_count, opt.update_count) == (0, 1)
    opt.load_state_dict(saved)
    opt.load_state_dict({"state": saved["state"], "param_groups": saved["param_groups"]})  # from torch
    assert opt.skip_count == 0


# ---- options ------------------------------------------------------------------------------------------------

OPTIONS = {"clip_norm": 1.5, "clip_value": 0.5, "nonfinite": "skip"}


@pytest.mark.parametrize("name", STEPPED)
def test_options_are_no_hyperparameters(name: str) -> None:
    opt = getattr(roptim, name)([np.ones((2, 2))], **OPTIONS)
    assert not OPTIONS.keys() & opt.defaults.keys()
    assert not OPTIONS.keys() & opt.param_groups[0].keys()
    assert not OPTIONS.keys() & opt.state_dict()["param_groups"][0].keys()
    parameters = inspect.signature(getattr(roptim, name)).parameters
    for option, default in {"clip_norm": None, "clip_value": None, "nonfinite": "propagate"}.items():
        assert parameters[option].kind is inspect.Parameter.KEYWORD_ONLY
        assert parameters[option].default == default


@pytest.mark.parametrize("option", ["clip_norm", "clip_value"])
@pytest.mark.parametrize(
    ("value", "kind", "got"),
    [
        (-1, ValueError, "-1.0"),
        (-1e-300, ValueError, "-1e-300"),
        (np.float32(-2), ValueError, "-2.0"),
        (-math.inf, ValueError, "-inf"),
        (math.nan, ValueError, "NaN"),
        ("1", TypeError, "'1'"),
        (True, TypeError, "True"),
        (1j, TypeError, "1j"),
        ([1.0], TypeError, "[1.0]"),
        (np.ones(2), TypeError, "array([1., 1.])"),
        ((), TypeError, "()"),
        (10**400, ValueError, "one beyond all floats"),
    ],
    ids=lambda value: repr(value)[:20] if not isinstance(value, type) else "",
)
def test_refused_bounds(option: str, value: Any, kind: type[Exception], got: str) -> None:
    with pytest.raises(kind) as raised:
        Adam([np.ones(2)], **{option: value})
    assert isinstance(raised.value, roptim.RoptimError)
    assert str(raised.value) == f"Adam: {option} must be None or a number >= 0, got {got}"
    with pytest.raises(roptim.RoptimTypeError, match=f"^Adam: {option} must be None or a number >= 0, got .*True"):
        Adam([np.ones(2)], **{option: np.True_})


@pytest.mark.parametrize(
    ("value", "kind", "got"),
    [
        ("ignore", ValueError, '"ignore"'),
        ("Skip", ValueError, '"Skip"'),
        ("", ValueError, '""'),
        (None, TypeError, "None"),
        (True, TypeError, "True"),
        (0, TypeError, "0"),
        (b"skip", TypeError, "b'skip'"),
        (["skip"], TypeError, "['skip']"),
    ],
)
def test_refused_ways_with_what_is_not_finite(value: Any, kind: type[Exception], got: str) -> None:
    with pytest.raises(kind) as raised:
        SGD([np.ones(2)], nonfinite=value)
    assert isinstance(raised.value, roptim.RoptimError)
    assert str(raised.value) == f'SGD: nonfinite must be "propagate", "raise" or "skip", got {got}'


@pytest.mark.parametrize(
    "value", [2, 2.0, np.float32(2), np.float64(2), np.int64(2), np.array(2.0), np.array(2), np.array([2.0])]
)
def test_numbers_are_read_at_construction(value: Any) -> None:
    p, q = np.zeros(2), np.zeros(2)
    by_norm, by_value = SGD([p], lr=1.0, clip_norm=value), SGD([q], lr=1.0, clip_value=value)
    if isinstance(value, np.ndarray):
        value[...] = 100
    g = np.array([30.0, -40.0])
    by_norm.step([g])
    by_value.step([g])
    assert p.tolist() == [-30 * (2 / (50 + 1e-6)), 40 * (2 / (50 + 1e-6))]
    assert q.tolist() == [-2.0, 2.0]
    again = pickle.loads(pickle.dumps(by_value))
    again.step([g])
    assert again.param_groups[0]["params"][0].tolist() == [-4.0, 4.0]


@pytest.mark.parametrize("name", [name for name, entry in REGISTRY.items() if entry["needs_closure"]])
@pytest.mark.parametrize("option", [*OPTIONS.items(), ("clip_norm", None), ("nonfinite", "propagate")])
def test_closure_optimizers_have_no_such_argument(name: str, option: Any) -> None:
    cls = getattr(roptim, name)
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{option[0]}'"):
        cls([np.ones(2)], **dict([option]))
    assert not OPTIONS.keys() & inspect.signature(cls).parameters.keys()
    assert cls([np.ones(2)]).skip_count == 0


class Own(Optimizer):
    """An optimizer written in Python."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, {"lr": 1.0}, **options)

    def step(self, gradients: Any = None, *, closure: Any = None) -> None:
        pass


def test_optimizers_written_in_python_take_the_defaults_only() -> None:
    own = Own([np.ones(2)], clip_norm=None, clip_value=None, nonfinite="propagate")
    assert (own.skip_count, own.gradient_norm) == (0, None)
    for name, value, allowed in (
        ("clip_norm", 1.0, "None"),
        ("clip_norm", math.inf, "None"),
        ("clip_norm", 0, "None"),
        ("clip_value", 1.0, "None"),
        ("nonfinite", "skip", '"propagate"'),
        ("nonfinite", None, '"propagate"'),
    ):
        with pytest.raises(roptim.RoptimValueError) as raised:
            Own([np.ones(2)], **{name: value})
        message = f"Own: {name} must be {allowed} for an optimizer written in Python, got {value!r}"
        assert str(raised.value) == message


def test_optimizers_written_in_python_refuse_arrays_by_name() -> None:
    with pytest.raises(roptim.RoptimError, match="clip_norm must be None for an optimizer written in Python"):
        Own([np.ones(2)], clip_norm=np.ones(2))


def test_a_subclass_clips_as_its_base_does() -> None:
    class Mine(SGD):
        pass

    p = np.zeros(1)
    opt = Mine([p], lr=1.0, clip_value=0.5, nonfinite="raise")
    opt.step([np.array([3.0])])
    assert p[0] == -0.5
    with pytest.raises(NonfiniteError, match="gradient of parameter 0 must be finite"):
        opt.step([np.array([math.nan])])


# ---- scaled gradients ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [{}, {"clip_norm": 2.0}, {"clip_value": 0.75}, {"clip_norm": 2.0, "clip_value": 0.75}])
@pytest.mark.parametrize("power", [-9, 1, 12])
def test_scaled_gradients_give_the_bits_of_plain_ones(device: Device, clip: dict[str, float], power: int) -> None:
    rng = np.random.default_rng(3)
    start = [draw(rng, shape, np.float32) for shape in device.shapes()]
    settings = device.settings(weight_decay=0.1, maximize=True)
    params, expected = ([p.copy() for p in start] for _ in range(2))
    opt = device.make(params, lr=0.02, nonfinite="skip", **settings, **clip)
    plain = device.make(expected, lr=0.02, **settings, **clip)
    opt.grad_scale = 2.0**power
    for at in range(4):
        g = [draw(rng, shape, np.float32) for shape in device.shapes()]
        step(opt, [x * np.float32(2.0**power) for x in g])
        step(plain, g)
        if "clip_norm" in clip:
            assert opt.gradient_norm == device.norm(plain.gradient_norm)
        if at == 1:
            step(opt, [x * np.float32(np.inf) for x in g])
    assert device.same(everything(opt, params), everything(plain, expected))
    assert opt.skip_count == 1


@pytest.mark.parametrize("scale", [0, -2.0, 3.0, math.nan, math.inf, 2.0**200, "2", None, True])
def test_what_is_no_scale(scale: Any) -> None:
    opt = SGD([np.ones(2, np.float32)])
    opt.grad_scale = 4
    with pytest.raises((ValueError, TypeError), match="SGD: grad_scale must be a power of two"):
        opt.grad_scale = scale
    assert opt.grad_scale == 4.0
    with pytest.raises(ValueError, match="LBFGS: grad_scale must be 1"):
        roptim.LBFGS([np.ones(2)]).grad_scale = 2.0
