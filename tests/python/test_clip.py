"""Clipping by global norm."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import roptim
from roptim import Parameter, clip_grad_norm_


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


def test_a_norm_within_the_bound_changes_nothing() -> None:
    g = np.array([0.3, -0.4, -0.0])
    before = g.tobytes()
    clip_grad_norm_([g], 1.0)
    assert g.tobytes() == before


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


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([np.ones(2)], -1.0), "max_norm must be a number >= 0, got -1.0"),
        (([np.ones(2)], math.nan), "max_norm must be a number >= 0, got nan"),
        (([np.ones(2)], "1"), "max_norm must be a number >= 0, got '1'"),
        (([np.ones(2)], 1.0, np.ones(2)), "norm_type must be a number or an infinity, got array([1., 1.])"),
        (([np.ones(2)], 1.0, math.nan), "norm_type must be a number or an infinity, got nan"),
        (([np.ones(2)], 1.0, "fro"), "norm_type must be a number or an infinity, got 'fro'"),
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
    ],
)
def test_refusals(arguments: Any, message: str) -> None:
    with pytest.raises(roptim.RoptimError) as raised:
        clip_grad_norm_(*arguments)
    assert str(raised.value) == f"clip_grad_norm_: {message}"
