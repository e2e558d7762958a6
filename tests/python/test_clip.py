"""Norms and clipping of gradients, against exact sums and element by element."""

from __future__ import annotations

import inspect
import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from helpers import LAYOUTS, laid_out
from hypothesis import given
from hypothesis import strategies as st

import roptim
from roptim import Parameter, SparseGrad, clip_grad_norm_
from roptim.utils import clip_grad_value_, clip_grads_with_norm_, get_total_norm

ORDERS: list[Any] = [2, 1, 3, 0.5, -1, math.inf, -math.inf, 0, "inf"]
DTYPES: list[Any] = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64, np.complex64, np.complex128]
#: Each function that writes, with a bound that acts.
WRITERS: dict[str, Callable[[Any], Any]] = {
    "clip_grad_norm_": lambda g: clip_grad_norm_(g, 0.1),
    "clip_grads_with_norm_": lambda g: clip_grads_with_norm_(g, 0.1, 10.0),
    "clip_grad_value_": lambda g: clip_grad_value_(g, 0.1),
}
ALL: dict[str, Callable[[Any], Any]] = {**WRITERS, "get_total_norm": get_total_norm}


# ---- oracles ------------------------------------------------------------------------------------------------


def draw(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any, scale: float = 1.0) -> Any:
    x = scale * rng.standard_normal((2, *shape))
    return (x[0] + 1j * x[1]).astype(dtype) if np.dtype(dtype).kind == "c" else np.asarray(x[0]).astype(dtype)


def parts(a: Any) -> list[Any]:
    """The real numbers that an array consists of, in its own precision."""
    return [a.real, a.imag] if a.dtype.kind == "c" else [a]


def part_dtype(dtype: Any) -> Any:
    return parts(np.zeros(1, dtype))[0].dtype


def exact_norm(arrays: list[Any], p: Any) -> float:
    wide = [a.astype(np.complex128 if a.dtype.kind == "c" else np.float64).ravel() for a in arrays]
    x = np.concatenate([np.abs(a) for a in wide]) if wide else np.zeros(0)
    p = float(p)
    if not x.size or np.isnan(x).any():
        return math.nan if x.size else 0.0
    if math.isinf(p):
        return float(x.max() if p > 0 else x.min())
    if p == 0:
        return float(np.count_nonzero(x))
    if p < 0 and x.min() == 0:
        return 0.0
    total = math.fsum(x**p)
    return float(total ** (1 / p)) if total else (math.inf if p < 0 else 0.0)


def factor(bound: float, norm: float) -> float:
    """torch's, in float64."""
    return min(1.0, bound / (norm + 1e-6)) if math.isfinite(bound) else 1.0


def same(a: Any, b: Any) -> bool:
    """Equal bits but for those of a NaN."""
    pairs = [(x.astype(np.float64), y.astype(np.float64)) for x, y in zip(parts(a), parts(b), strict=True)]
    number = [~np.isnan(x) for x, _ in pairs]
    return (a.dtype, a.shape) == (b.dtype, b.shape) and all(
        np.array_equal(x, y, equal_nan=True) and np.array_equal(np.signbit(x[n]), np.signbit(y[n]))
        for (x, y), n in zip(pairs, number, strict=True)
    )


# ---- norms --------------------------------------------------------------------------------------------------


@given(
    st.lists(
        st.tuples(
            st.integers(0, 90), st.integers(1, 60), st.sampled_from(DTYPES), st.sampled_from(LAYOUTS), st.booleans()
        ),
        max_size=4,
    ),
    st.sampled_from(ORDERS),
    st.sampled_from([1e-3, 1.0, 30.0]),
    st.sampled_from([0.0, 0.3, 1e3, math.inf]),
    st.integers(0, 2**32 - 1),
)
def test_norms_of_every_order(arrays: Any, p: Any, scale: float, bound: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    drawn = [draw(rng, (rows, columns), dtype, scale) for rows, columns, dtype, _, _ in arrays]
    for g, (*_, with_zero) in zip(drawn, arrays, strict=True):
        if with_zero and g.size:
            g.flat[-1] = 0
    one, two, three = ([laid_out(g, how) for g, (*_, how, _) in zip(drawn, arrays, strict=True)] for _ in range(3))
    want = exact_norm(drawn, p)
    norm = get_total_norm(one, p)
    assert norm == pytest.approx(want, rel=1e-12, abs=0)
    assert get_total_norm(drawn, p) == norm, "the layout does not matter"
    assert all(same(a, b) for a, b in zip(one, drawn, strict=True)), "only read"
    assert clip_grad_norm_(one, bound, p) == norm
    clip_grads_with_norm_(two, bound, norm)
    assert [a.tobytes() for a in one] == [a.tobytes() for a in two]
    if p == 2:
        assert clip_grad_norm_(three, bound) == norm
        assert [a.tobytes() for a in one] == [a.tobytes() for a in three], "2 is the default"
    c = factor(bound, norm)
    for clipped, g in zip(one, drawn, strict=True):
        if c == 1.0:
            assert clipped.tobytes() == g.tobytes()
        elif g.dtype.itemsize > 2:
            for got, x in zip(parts(clipped), parts(g), strict=True):
                assert np.array_equal(got, x * x.dtype.type(c)), "one rounding"


@pytest.mark.parametrize("p", ORDERS)
def test_norms_of_nothing(p: Any) -> None:
    nothing: list[Any] = [[], (), {}, np.zeros(0), [np.zeros((3, 0), np.float16)], Parameter(np.ones(3))]
    for g in nothing:
        assert get_total_norm(g, p) == 0.0
        assert clip_grad_norm_(g, 0.0, p) == 0.0
        clip_grads_with_norm_(g, 0.0, 1.0)
        clip_grad_value_(g, 0.0)
    beside = [np.zeros(0, np.float32), np.array([2.0])]
    assert get_total_norm(beside, p) == (1.0 if p == 0 else 2.0), "an empty array adds nothing"


@pytest.mark.parametrize("scale", [1e-306, 1e-160, 1e160, 1e306])
@pytest.mark.parametrize("p", [1, 2, 3, 0.5, -1, -3])
@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
def test_powers_neither_overflow_nor_vanish(scale: float, p: float, dtype: Any) -> None:
    x = draw(np.random.default_rng(5), (4,), dtype)
    want = exact_norm([x], p)
    assert get_total_norm(x * scale, p) == pytest.approx(want * scale, rel=1e-13, abs=0)
    dominant = max(scale, 1.0) if p > 0 else min(scale, 1.0)
    assert get_total_norm([x * scale, x], p) == pytest.approx(want * dominant, rel=1e-13, abs=0)


def test_what_the_orders_mean() -> None:
    """Where torch has another meaning or none: 0 counts elements, not arrays, and empty arrays are welcome."""
    g = [np.array([3.0, 4.0]), np.array([12.0, 0.0])]
    assert [get_total_norm(g, p) for p in (1, 2, math.inf, "inf", -math.inf, -1, 0)] == [19, 13, 12, 12, 0, 0, 3]
    assert get_total_norm(np.array([3 + 4j, 5j]), 1) == 10.0, "magnitudes, not parts"
    assert get_total_norm(np.array([3 + 4j, 1j]), math.inf) == 5.0
    assert get_total_norm(np.array([3 + 4j, 1j]), -math.inf) == 1.0
    assert get_total_norm(np.array([3 + 4j, 0j]), 0) == 1.0
    assert get_total_norm([np.float64(3.0), np.array(4.0, np.float32)]) == 5.0, "what is read may be a scalar"
    twice = np.array([3.0, 4.0])
    assert get_total_norm([twice, twice]) == pytest.approx(math.sqrt(50), rel=1e-15)
    assert get_total_norm(np.broadcast_to(2.0, 4)) == 4.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_in_every_order(bad: float, p: Any, dtype: Any) -> None:
    for at in (0, 4095, 4096, 4999):
        g = [np.ones(3, np.float32), np.full(5000, 2, dtype)]
        g[1][at] = bad
        before = [x.tobytes() for x in g]
        want = math.nan if math.isnan(bad) else exact_norm(g, p)
        norm = get_total_norm(g, p)
        assert norm == pytest.approx(want, rel=1e-12, nan_ok=True)
        if math.isfinite(want):  # the smallest, and the number of elements
            assert get_total_norm(g, p, error_if_nonfinite=True) == norm
        else:
            got = "nan" if math.isnan(want) else "inf"
            for call, place in (
                (lambda g: clip_grad_norm_(g, 1.0, p, error_if_nonfinite=True), "clip_grad_norm_"),
                (lambda g: get_total_norm(g, p, error_if_nonfinite=True), "get_total_norm"),
            ):
                with pytest.raises(
                    roptim.NonfiniteError, match=f"^{place}: the norm of the gradients must be finite, got {got}$"
                ):
                    call(g)
        assert [x.tobytes() for x in g] == before


THREADS = """
import hashlib, math, ml_dtypes, numpy as np, roptim
from roptim.utils import clip_grad_norm_, get_total_norm
digest = hashlib.sha256()
for dtype in (np.float32, np.float64, np.float16, ml_dtypes.bfloat16, np.complex64):
    x = np.sin(np.arange(300_001) * 0.7) * 3.1
    g = [(x + 1j * np.cos(x)).astype(dtype) if np.dtype(dtype).kind == "c" else x.astype(dtype), np.ones(3, dtype)]
    views = [np.repeat(g[0], 2)[::2], g[1][::-1]]
    for p in (2, 1, 3, 0.5, -1, math.inf, -math.inf, 0):
        assert get_total_norm(views, p) == get_total_norm(g, p)
        digest.update(get_total_norm(g, p).hex().encode())
    p = np.ones(300_001, dtype)
    opt = roptim.SGD([p], clip_norm=0.5, clip_value=2.0, nonfinite="raise")
    opt.step([g[0]])
    clip_grad_norm_(g, 0.5)
    digest.update(opt.gradient_norm.hex().encode() + p.tobytes() + g[0].tobytes())
print(digest.hexdigest(), opt.device)
"""


def test_the_number_of_threads_changes_no_bit() -> None:
    printed = []
    for count in ("1", "3"):
        environment = {**os.environ, "ROPTIM_NUM_THREADS": count}
        done = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout.split(maxsplit=1))
    assert [device.strip() for _, device in printed] == ["cpu (1 threads)", "cpu (3 threads)"]
    assert printed[0][0] == printed[1][0]


# ---- scaling ------------------------------------------------------------------------------------------------


def test_parameters_have_their_gradients_clipped() -> None:
    p, q, frozen = Parameter(np.zeros(2)), Parameter(np.zeros(1)), Parameter(np.zeros(3))
    p.grad, q.grad = np.array([3.0, 0.0]), np.array([4.0])
    assert clip_grad_norm_([p, q, frozen], 1.0) == 5.0
    assert p.grad == pytest.approx([0.6, 0.0], rel=1e-6)
    assert q.grad == pytest.approx([0.8], rel=1e-6)
    assert frozen.grad is None
    assert np.hypot(p.grad[0], q.grad[0]) < 1.0


def test_plain_arrays_are_the_gradients() -> None:
    g = {"a": np.array([3.0, 4.0], np.float32)}
    norm = clip_grad_norm_(g, 2.5)
    assert type(norm) is float
    assert norm == 5.0
    # torch: g * R(max / R(total + 1e-6)); the factor is taken in float64 here and rounded once.
    assert np.array_equal(g["a"], np.array([3.0, 4.0], np.float32) * np.float32(2.5 / (5.0 + 1e-6)))
    assert clip_grad_norm_(np.array([3.0, 4.0]), 10.0) == 5.0
    assert clip_grad_norm_([], 1.0) == 0.0
    assert clip_grad_norm_([np.array([3.0, -7.0])], 1.0, norm_type=math.inf) == 7.0


def test_repeated_and_overlapping_gradients_are_refused() -> None:
    g = np.ones(4)
    for pair in ([g, g], [g[:3], g[2:]]):
        with pytest.raises(ValueError, match="gradient 1 must be memory of its own, got memory of gradient 0"):
            clip_grad_norm_(pair, 1.0)
    assert np.all(g == 1.0)
    clip_grad_norm_([g[::2], g[1::2]], 1.0)
    assert g == pytest.approx([0.5] * 4, rel=1e-5)


@pytest.mark.parametrize("norm_type", [2, math.inf])
def test_nan_anywhere_is_the_norm(norm_type: float) -> None:
    for i in range(2):
        g = [np.ones(300, np.float32), np.ones(2)]
        g[i][-1] = np.nan
        with pytest.raises(roptim.NonfiniteError):
            clip_grad_norm_(g, 0.5, norm_type, error_if_nonfinite=True)
        assert g[1 - i][0] == 1.0
        assert math.isnan(clip_grad_norm_(g, 0.5, norm_type))
        assert np.isnan(g[1 - i]).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_norm_within_the_bound_changes_nothing(dtype: Any) -> None:
    g = np.array([0.3, -0.4, -0.0]).astype(dtype)
    if np.dtype(dtype).kind == "c":
        g.imag[2] = -0.0
    before = g.tobytes()
    for bound in (1.0, np.float32(1.0), 2, math.inf):
        clip_grad_norm_([g], bound)
        assert g.tobytes() == before
    infinite = np.array([1.0, -0.0, math.inf]).astype(dtype)
    before = infinite.tobytes()
    assert clip_grad_norm_(infinite, math.inf) == math.inf, "no bound clips nothing"
    assert infinite.tobytes() == before


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bound_of_zero_leaves_zeros(dtype: Any) -> None:
    g = draw(np.random.default_rng(1), (50,), dtype)
    signs = [np.signbit(x.astype(np.float64)) for x in parts(g)]
    assert clip_grad_norm_(g, 0) > 0
    assert not g.any()
    if np.dtype(dtype).kind != "c":
        assert np.array_equal(np.signbit(g.astype(np.float64)), signs[0])


@pytest.mark.parametrize("dtype", [np.complex64, np.complex128])
def test_the_parts_of_complex_gradients_are_scaled_as_reals_are(dtype: Any) -> None:
    values = [complex(a, b) for a, b in itertools.product([3.0, -0.0, 0.0, -1.0], repeat=2)]
    g = np.array(values, dtype)
    reals = np.stack(parts(g))
    assert clip_grad_norm_(g, 1.0) == clip_grad_norm_(reals, 1.0)
    assert np.stack(parts(g)).tobytes() == reals.tobytes(), "the sign of zero, too"


@given(
    st.sampled_from([(np.float16, 10, -14), (ml_dtypes.bfloat16, 7, -126)]),
    st.integers(1, 3000),
    st.floats(-9, 4),
    st.floats(-8, 2),
    st.integers(0, 2**32 - 1),
)
def test_half_precision_is_rounded_once(half: Any, n: int, scale: float, bound: float, seed: int) -> None:
    dtype, digits, smallest = half
    g = np.clip(draw(np.random.default_rng(seed), (n,), np.float64, 10**scale), -6e4, 6e4).astype(dtype)
    before = g.astype(np.float64)
    want = before * factor(10**bound, clip_grad_norm_(g, 10**bound))
    ulp = np.ldexp(1.0, np.maximum(np.frexp(want)[1] - 1, smallest) - digits)
    assert (np.abs(g.astype(np.float64) - want) <= 0.501 * ulp).all()


def test_half_precision_gradients_of_scaled_losses_do_not_vanish() -> None:
    """Their factor is below float16's smallest number, the clipped gradients are not."""
    g = np.full(1_000_000, 6e4, np.float16)
    assert clip_grad_norm_(g, 1.0) == pytest.approx(6e7, rel=1e-3)
    assert np.linalg.norm(g.astype(np.float64)) == pytest.approx(1.0, rel=1e-3)


@given(
    st.lists(st.integers(0, 70_000), min_size=1, max_size=4),
    st.sampled_from([np.float32, np.float64]),
    st.sampled_from([1e-30, 1e-3, 1.0, 1e15]),
    st.integers(0, 2**32 - 1),
)
def test_the_norm_is_that_of_exact_sums(sizes: list[int], dtype: Any, scale: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    arrays = [(scale * rng.standard_normal(n)).astype(dtype) for n in sizes]
    want = math.sqrt(math.fsum((np.concatenate(arrays).astype(np.float64) / scale) ** 2)) * scale
    copies = [a[::-1].copy()[::-1] for a in arrays]
    assert clip_grad_norm_(arrays, math.inf) == pytest.approx(want, rel=1e-14)
    assert clip_grad_norm_(copies, math.inf) == clip_grad_norm_(arrays, math.inf), "the layout does not matter"


def test_large_and_nonfinite_gradients() -> None:
    g = np.full(128, 1e19, np.float32)
    assert clip_grad_norm_([g], 1.0) == pytest.approx(1e19 * math.sqrt(128), rel=1e-7)
    assert np.all(np.isfinite(g))
    assert np.linalg.norm(g) == pytest.approx(1.0, rel=1e-5)
    for bad in (np.nan, np.inf, -np.inf):
        g = np.array([1.0, bad])
        with pytest.raises(roptim.NonfiniteError, match="the norm of the gradients must be finite"):
            clip_grad_norm_([g], 1.0, error_if_nonfinite=True)
        assert g[0] == 1.0
        norm = clip_grad_norm_([g], 1.0)
        assert not math.isfinite(norm)
        assert np.isnan(g[1])
        assert math.isnan(g[0]) if math.isnan(bad) else g[0] == 0.0


def test_a_norm_from_elsewhere() -> None:
    """As of gradients that are spread over several lists."""
    lists = [[np.array([3.0, 4.0], np.float32)], [np.array([12.0])]]
    total = get_total_norm([g for gradients in lists for g in gradients])
    together = [g.copy() for gradients in lists for g in gradients]
    assert clip_grad_norm_(together, 2.0) == total == 13.0
    for gradients in lists:
        assert clip_grads_with_norm_(gradients, 2.0, total) is None
    assert [g[0].tobytes() for g in lists] == [g.tobytes() for g in together]
    for norm, want in ((np.float32(4.0), 0.25), (0, 1.0), (1.0, 1.0), (math.inf, 0.0), (math.nan, math.nan)):
        g = np.array([1.0])
        clip_grads_with_norm_(g, 1.0, norm)
        assert g[0] == pytest.approx(want, rel=1e-6, nan_ok=True)
    g = np.array([1.0])
    clip_grads_with_norm_(g, math.inf, math.inf)
    assert g[0] == 1.0


# ---- values -------------------------------------------------------------------------------------------------


@given(
    st.integers(1, 60),
    st.integers(1, 20),
    st.sampled_from(DTYPES),
    st.sampled_from(LAYOUTS),
    st.sampled_from([0.0, 0.1, 0.5, 1, np.float32(2.5), math.inf]),
    st.lists(st.sampled_from([math.nan, math.inf, -math.inf, -0.0, 0.0, 0.5, -0.5]), max_size=6),
    st.integers(0, 2**32 - 1),
)
def test_values_are_bounded(
    rows: int, columns: int, dtype: Any, layout: str, bound: Any, special: list[float], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    g = draw(rng, (rows, columns), dtype)
    for value in special:
        parts(g)[rng.integers(len(parts(g)))][rng.integers(rows), rng.integers(columns)] = value
    view = laid_out(g, layout)
    assert clip_grad_value_({"g": view}, bound) is None
    limit = float(part_dtype(dtype).type(bound))
    for got, x in zip(parts(view), parts(g), strict=True):
        flat = x.astype(np.float64).ravel()
        want = [v if math.isnan(v) or abs(v) <= limit else math.copysign(limit, v) for v in flat]
        assert same(got, np.array(want).reshape(x.shape).astype(x.dtype))
    if layout == "with gaps":
        assert np.all(view.base[1::2] == 7), "what lies between is left alone"


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays(dtype: Any) -> None:
    g = np.array([math.nan, 3.0]).astype(dtype)
    clip_grad_value_(g, 1.0)
    assert math.isnan(g[0].real)
    assert g[1] == 1.0


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bound_that_the_dtype_cannot_hold(dtype: Any) -> None:
    """As for a float16 gradient beside a float64 one."""
    largest = ml_dtypes.finfo(part_dtype(dtype)).max
    g = np.array([1.0, -largest, largest]).astype(dtype)
    before = g.tobytes()
    clip_grad_value_(g, sys.float_info.max)
    assert g.tobytes() == before
    clip_grad_norm_(g[:1], sys.float_info.max)
    assert g.tobytes() == before


@pytest.mark.parametrize("call", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_callers_floating_point_errors_stay_out_of_it(call: Any, dtype: Any) -> None:
    """Under ``numpy.seterr(all="raise")`` an underflow would stop half-way."""
    tiny = float(ml_dtypes.finfo(part_dtype(dtype)).tiny)
    drawn = [np.array([3.0, -1.0, tiny]).astype(dtype), np.array([tiny, 2.0, math.nan, math.inf]).astype(dtype)]
    for used in (1, 2):
        quiet, strict = [g.copy() for g in drawn[:used]], [g.copy() for g in drawn[:used]]
        call(quiet)
        with np.errstate(all="raise"):
            call(strict)
        assert all(same(a, b) for a, b in zip(quiet, strict, strict=True))


# ---- sparse gradients ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", ORDERS)
def test_a_sparse_gradients_norm_is_that_of_its_sums(dtype: Any, p: Any) -> None:
    rng = np.random.default_rng(3)
    values, beside = draw(rng, (5, 3), dtype), draw(rng, (4,), np.float32)
    index, before, beside_before = np.array([4, 1, 4, 0, 4]), values.copy(), beside.copy()
    sums = np.zeros((7, 3), np.complex128)
    np.add.at(sums, index, values.astype(np.complex128))
    g = SparseGrad(index, values, sums.shape)
    want = exact_norm([np.abs(sums[[0, 1, 4]]), beside], p)
    norm = get_total_norm([g, beside], p)
    assert norm == pytest.approx(want, rel=1e-12 if part_dtype(dtype) == np.float64 else 1e-6)
    assert values.tobytes() == before.tobytes(), "only read"
    assert clip_grad_norm_([g, beside], math.inf, p) == norm
    assert values.tobytes() == before.tobytes(), "within the bound"
    assert clip_grad_norm_([g, beside], 0.25, p) == norm
    assert g.values is values, "scaled where they are, uncoalesced"
    assert g.indices.tolist() == index.tolist()
    c = factor(0.25, norm)
    assert np.array_equal(beside, beside_before * np.float32(c))
    rough = {"float16": 2e-3, "bfloat16": 2e-2}.get(np.dtype(dtype).name, 1e-6)
    assert values.astype(np.complex128) == pytest.approx(before.astype(np.complex128) * c, rel=rough)


def test_sparse_rows_that_cancel_have_no_norm() -> None:
    values = np.array([3.0, -3.0])
    assert clip_grad_norm_(SparseGrad([1, 1], values, (4,)), 1.0) == 0.0
    assert values.tolist() == [3.0, -3.0]
    half = SparseGrad([0, 0], np.full(2, 6e4, np.float16), (3,))
    assert get_total_norm(half) == 2 * float(np.float16(6e4)), "sums of half precision are wider"
    assert get_total_norm(SparseGrad([], np.zeros((0, 2)), (5, 2)), -1) == 0.0


@pytest.mark.parametrize("dtype", DTYPES)
def test_of_a_sparse_gradient_the_sums_are_bounded(dtype: Any) -> None:
    rng = np.random.default_rng(4)
    for index in ([4, 1, 4, 0, 4], [4, 1, 3, 0, 2], []):
        values = draw(rng, (len(index), 3), dtype)
        parameter = Parameter(np.zeros((7, 3), dtype))
        parameter.grad = g = SparseGrad(np.array(index, np.int64), values, parameter.shape)
        dense = g.toarray()
        clip_grad_value_([parameter], 0.5)
        clip_grad_value_(dense, 0.5)
        assert parameter.grad is g
        assert same(g.toarray(), dense)
        again = g.coalesced()
        assert again.indices.tolist() == sorted(set(index))
        # Rows that are named once are bounded where they lie.
        assert g.indices.tolist() == (index if len(index) == len(set(index)) else sorted(set(index)))
        before = g.toarray()
        clip_grad_value_(g, 0.5)
        assert same(g.toarray(), before), "once is enough"


@pytest.mark.parametrize("name", ["SGD", "Adagrad"])
def test_a_bounded_sparse_gradient_is_stepped_with(name: str) -> None:
    rng = np.random.default_rng(5)
    tables = [np.zeros((6, 2)), np.zeros((6, 2))]
    opts = [getattr(roptim, name)([table], lr=0.5) for table in tables]
    for _ in range(3):
        g = SparseGrad(rng.integers(6, size=8), rng.standard_normal((8, 2)), (6, 2))
        dense = g.toarray()
        clip_grad_value_([g], 0.25)
        opts[0].step([g])
        opts[1].step([np.clip(dense, -0.25, 0.25)])
    assert np.array_equal(*tables)
    assert tables[0].any()


# ---- what is taken ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ALL.values(), ids=ALL)
def test_containers(call: Any) -> None:
    """Whatever holds them, all gradients count once."""

    def fresh() -> list[Any]:
        return [Parameter(np.zeros(2)), Parameter(np.zeros(3, np.float32)), Parameter(np.zeros(()))]

    def gradients() -> list[Any]:
        return [np.array([3.0, -4.0]), None, np.array(12.0)]

    want = gradients()
    result = call([g for g in want if g is not None])
    containers: list[Callable[[list[Any]], Any]] = [
        list,
        tuple,
        iter,
        lambda items: (item for item in items),
        lambda items: dict(zip("abc", items, strict=True)),
        lambda items: dict(zip("abc", items, strict=True)).values(),
    ]
    for contain in containers:
        for as_parameters in (True, False):
            items, arrays = fresh(), gradients()
            for p, g in zip(items, arrays, strict=True):
                p.grad = g
            held = contain(items if as_parameters else arrays)
            assert call(held) == result
            assert items[1].grad is None
            for got, expected in ((items[0].grad, want[0]), (items[2].grad, want[2])):
                assert got.tobytes() == expected.tobytes()
            if isinstance(held, Iterator):
                assert next(held, "the end") == "the end"


@pytest.mark.parametrize("call", ALL.values(), ids=ALL)
def test_one_alone(call: Any) -> None:
    arrays: list[Any] = [np.array(7.0), np.array([7.0], np.float16), np.array([[3.0, -7.0]]), np.array(3 - 7j)]
    for array in arrays:
        p, alone, listed = Parameter(np.zeros_like(array)), array.copy(), array.copy()
        p.grad = array.copy()
        assert call(alone) == call([listed]) == call(p)
        assert alone.tobytes() == listed.tobytes() == p.grad.tobytes()
        assert (alone.tobytes() == array.tobytes()) == (call is get_total_norm)
    p = Parameter(np.zeros(()))
    p.grad = np.float64(7.0)
    call(p)
    assert (p.grad < 7.0) == (call is not get_total_norm), "a NumPy number is exchanged for what was scaled"


@pytest.mark.parametrize(("name", "call"), ALL.items(), ids=ALL)
def test_an_empty_generator_is_a_mistake(name: str, call: Any) -> None:
    message = f"^{name}: parameters is an empty generator, so there is nothing to clip$"
    used = (p for p in [Parameter(np.zeros(2))])
    assert list(used)
    for empty in (used, iter(())):
        with pytest.warns(UserWarning, match=message) as raised:
            result = call(empty)
        assert result == (0.0 if "norm" in name and name != "clip_grads_with_norm_" else None)
        assert len(raised) == 1
    call(p for p in [Parameter(np.zeros(2))])  # without gradients, but not empty
    call([])


def test_the_warning_names_the_callers_line() -> None:
    for call in ALL.values():
        with pytest.warns(UserWarning, match="is an empty generator") as raised:
            call(iter(()))
        assert raised[0].filename == __file__


def test_torchs_choice_of_kernels_means_nothing() -> None:
    for foreach in (None, True, False):
        g = np.array([3.0, 4.0])
        assert get_total_norm(g, 2.0, False, foreach) == 5.0
        assert clip_grad_norm_(g, 2.5, 2.0, False, foreach) == 5.0
        clip_grads_with_norm_(g, 1.0, 1.0, foreach)
        clip_grad_value_(g, 1.75, foreach)
        assert g.tolist() == [3.0 * (2.5 / (5.0 + 1e-6)) * (1 / (1 + 1e-6)), 1.75]
    for function in (clip_grad_norm_, clip_grads_with_norm_, clip_grad_value_, get_total_norm):
        assert inspect.signature(function).parameters["foreach"].default is None


# ---- refusals -----------------------------------------------------------------------------------------------


def misaligned() -> Any:
    return np.frombuffer(bytearray(25), np.uint8)[1:].view(np.float64)


def read_only() -> Any:
    a = np.ones(2)
    a.flags.writeable = False
    return a


BAD: dict[str, Callable[[Any], Any]] = {
    "a list": lambda first: [1.0],
    "a NumPy number": lambda first: np.float64(1.0),
    "integers": lambda first: np.ones(2, int),
    "objects": lambda first: np.ones(2, object),
    "another byte order": lambda first: np.ones(2, np.dtype(np.float64).newbyteorder()),
    "misaligned": lambda first: misaligned(),
    "read-only": lambda first: read_only(),
    "elements in one place": lambda first: np.lib.stride_tricks.as_strided(np.ones(1), (3,), (0,)),
    "itself again": lambda first: first,
    "a part of it": lambda first: first[1:2],
    "a masked array": lambda first: np.ma.masked_array([3.0, 4.0], [0, 1]),
    "sparse, read-only": lambda first: SparseGrad([0, 0], read_only(), (4,)),
    "sparse, integers": lambda first: SparseGrad([0, 0], np.ones(2, int), (4,)),
    "sparse, with its values": lambda first: SparseGrad([0, 0], first[:2], (4,)),
}


@pytest.mark.parametrize("call", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_a_refusal_changes_nothing(call: Any, bad: Any) -> None:
    first, values = np.arange(4.0) + 9, np.arange(3.0) + 9
    sparse, second = SparseGrad([2, 0, 2], values, (3,)), bad(first)
    held = second.values if isinstance(second, SparseGrad) else np.asarray(second)
    before = held.tobytes()
    with pytest.raises(roptim.RoptimError, match="gradient 2 must be "):
        call([first, sparse, second])
    assert first.tolist() == [9, 10, 11, 12]
    assert values.tolist() == [9, 10, 11]
    assert sparse.values is values
    assert held.tobytes() == before


@pytest.mark.parametrize(
    "call",
    [
        lambda g: clip_grad_norm_(g, -1.0),
        lambda g: clip_grad_norm_(g, 1.0, math.nan),
        lambda g: clip_grads_with_norm_(g, -1.0, 1.0),
        lambda g: clip_grads_with_norm_(g, 1.0, -1.0),
        lambda g: clip_grad_value_(g, -1.0),
        lambda g: clip_grad_value_(g, math.nan),
        lambda g: get_total_norm(g, "2"),
    ],
)
def test_a_refused_argument_changes_nothing(call: Any) -> None:
    """Nor does it use up a generator."""
    g = np.array([3.0, 4.0])
    held = iter([g])
    with pytest.raises(roptim.RoptimError):
        call(held)
    assert g.tolist() == [3.0, 4.0]
    assert next(held) is g


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([np.ones(2)], -1.0), "max_norm must be a number >= 0, got -1.0"),
        (([np.ones(2)], math.nan), "max_norm must be a number >= 0, got nan"),
        (([np.ones(2)], "1"), "max_norm must be a number >= 0, got '1'"),
        (([np.ones(2)], None), "max_norm must be a number >= 0, got None"),
        (([np.ones(2)], True), "max_norm must be a number >= 0, got True"),
        (([np.ones(2)], np.complex64(1)), f"max_norm must be a number >= 0, got {np.complex64(1)!r}"),
        (([np.ones(2)], 1.0, np.ones(2)), "norm_type must be a number or an infinity, got array([1., 1.])"),
        (([np.ones(2)], 1.0, math.nan), "norm_type must be a number or an infinity, got nan"),
        (([np.ones(2)], 1.0, "fro"), "norm_type must be a number or an infinity, got 'fro'"),
        (([np.ones(2)], 1.0, None), "norm_type must be a number or an infinity, got None"),
        (
            ([[1.0]], 1.0),
            "gradient 0 must be a numpy.ndarray, got an object of type list; convert it with numpy.asarray",
        ),
        (
            ([np.ones(2, int)], 1.0),
            "gradient 0 must be float32, float64, complex64, complex128, float16 or bfloat16, got int64; "
            "convert it with .astype(numpy.float32)",
        ),
        (([np.broadcast_to(1.0, 3)], 1.0), "gradient 0 must be writeable, got a read-only array; copy it with .copy()"),
        ((3, 1.0), "parameters must be Parameters or arrays, got 3"),
        (("W", 1.0), "parameters must be Parameters or arrays, got 'W'"),
        ((None, 1.0), "parameters must be Parameters or arrays, got None"),
    ],
)
def test_refusals(arguments: Any, message: str) -> None:
    with pytest.raises(roptim.RoptimError) as raised:
        clip_grad_norm_(*arguments)
    assert str(raised.value) == f"clip_grad_norm_: {message}"


@pytest.mark.parametrize(
    ("function", "arguments", "kind", "message"),
    [
        (clip_grad_value_, ([np.ones(2)], -0.5), ValueError, "clip_value must be a number >= 0, got -0.5"),
        (clip_grad_value_, ([np.ones(2)], math.nan), ValueError, "clip_value must be a number >= 0, got nan"),
        (clip_grad_value_, ([np.ones(2)], None), TypeError, "clip_value must be a number >= 0, got None"),
        (clip_grad_value_, (3, 1.0), TypeError, "parameters must be Parameters or arrays, got 3"),
        (get_total_norm, ([np.ones(2)], "L2"), TypeError, "norm_type must be a number or an infinity, got 'L2'"),
        (get_total_norm, ([np.ones(2)], math.nan), ValueError, "norm_type must be a number or an infinity, got nan"),
        (clip_grads_with_norm_, ([np.ones(2)], -1, 1.0), ValueError, "max_norm must be a number >= 0, got -1"),
        (clip_grads_with_norm_, ([np.ones(2)], 1.0, -1), ValueError, "total_norm must be a number >= 0, got -1"),
        (clip_grads_with_norm_, ([np.ones(2)], 1.0, "5"), TypeError, "total_norm must be a number >= 0, got '5'"),
        (clip_grads_with_norm_, ([np.ones(2)], 1.0, None), TypeError, "total_norm must be a number >= 0, got None"),
    ],
)
def test_refusals_of_the_others(function: Any, arguments: Any, kind: Any, message: str) -> None:
    with pytest.raises(kind) as raised:
        function(*arguments)
    assert isinstance(raised.value, roptim.RoptimError)
    assert str(raised.value) == f"{function.__name__}: {message}"


@pytest.mark.parametrize(
    "call",
    [
        lambda g, x: clip_grad_norm_(g, x),
        lambda g, x: clip_grad_norm_(g, 1.0, x),
        lambda g, x: clip_grads_with_norm_(g, 1.0, x),
        lambda g, x: clip_grad_value_(g, x),
    ],
)
def test_a_whole_number_beyond_all_floats_is_refused_by_name(call: Any) -> None:
    g = np.array([3.0])
    with pytest.raises(roptim.RoptimError, match="must be a number"):
        call(g, 10**400)
    assert g[0] == 3.0


def test_a_norm_of_a_device_is_a_total_norm(gpu: None) -> None:
    held = roptim.gpu.array(np.full(4, 2.0, np.float32), allow_software=True)
    g = np.full(3, 8.0, np.float32)
    roptim.clip_grads_with_norm_([g], 2.0, roptim.get_total_norm([held]))
    assert g == pytest.approx(8.0 * 2.0 / (4.0 + 1e-6))
    with pytest.raises(ValueError, match="clip_grad_value_: gradients must be on the host, got some on a device"):
        roptim.clip_grad_value_([held], 1.0)
