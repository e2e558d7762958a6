"""Averages of parameters against the same formulas in NumPy, and statistics over batches."""

from __future__ import annotations

import contextlib
import copy
import math
import pickle
import re
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from helpers import LAYOUTS, laid_out
from hypothesis import given
from hypothesis import strategies as st

import roptim
from roptim import SGD, AdamW, Parameter
from roptim._errors import told
from roptim.swa_utils import (
    AveragedModel,
    cumulative_stats,
    get_ema_avg_fn,
    get_ema_multi_avg_fn,
    get_swa_avg_fn,
    get_swa_multi_avg_fn,
)

F32 = np.float32
DTYPES: list[Any] = [np.float32, np.float64, np.complex64, np.complex128, np.float16, ml_dtypes.bfloat16]
#: Averages by name: the arguments that ask for them.
KINDS: dict[str, Callable[[], dict[str, Any]]] = {
    "default": dict,
    "swa": lambda: {"avg_fn": get_swa_avg_fn()},
    "ema 0.999": lambda: {"avg_fn": get_ema_avg_fn()},
    "ema 0.3": lambda: {"avg_fn": get_ema_avg_fn(0.3)},
    "ema 0": lambda: {"avg_fn": get_ema_avg_fn(0)},
    "ema 1": lambda: {"avg_fn": get_ema_avg_fn(np.float32(1))},
    "multi swa": lambda: {"multi_avg_fn": get_swa_multi_avg_fn()},
    "multi ema 0.999": lambda: {"multi_avg_fn": get_ema_multi_avg_fn()},
    "multi ema 0.3": lambda: {"multi_avg_fn": get_ema_multi_avg_fn(decay=0.3)},
    "multi ema 0": lambda: {"multi_avg_fn": get_ema_multi_avg_fn(0.0)},
    "multi ema 1": lambda: {"multi_avg_fn": get_ema_multi_avg_fn(1)},
}


# ---- oracles ------------------------------------------------------------------------------------------------


def decay_of(kind: str) -> float | None:
    return float(kind.rsplit(" ", 1)[1]) if "ema" in kind else None


def parts(a: Any) -> Any:
    """The real numbers that an array consists of, in the precision that an average is computed in."""
    a = np.ascontiguousarray(a).reshape(np.shape(a))
    if a.dtype.kind == "c":
        return a[..., None].view(a.real.dtype)
    return a.astype(F32) if a.dtype.itemsize == 2 else a


def joined(kind: str, average: Any, value: Any, n: int) -> Any:
    """The n-th average, each operation rounded to the dtype of computation; ``n`` counts from 1."""
    dtype, shape = average.dtype, average.shape
    a, x = parts(average), parts(value)
    if n == 1:
        return value.copy()
    real, decay = a.dtype.type, decay_of(kind)
    with np.errstate(all="ignore"):
        if kind.startswith("multi"):
            weight = real(1 / n if decay is None else 1 - decay)
            difference = x - a
            # Interpolation from the nearer end, as torch does it.
            near_a, near_x = a + weight * difference, x + (weight - real(1)) * difference
            result = near_a if abs(weight) < 0.5 else near_x
        elif decay is None:
            result = a + (x - a) / real(n)
        else:
            result = real(decay) * a + real(1 - decay) * x
        if dtype.kind == "c":
            return result.view(dtype)[..., 0].reshape(shape)
        return result.astype(dtype).reshape(shape)


def same(a: Any, b: Any) -> bool:
    """Equal bits but for those of a NaN."""
    a, b = np.asarray(a), np.asarray(b)
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    one, two = (parts(x).astype(np.float64) for x in (a, b))
    number = ~np.isnan(one)
    return np.array_equal(one, two, equal_nan=True) and np.array_equal(np.signbit(one[number]), np.signbit(two[number]))


def draw(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> Any:
    x = rng.standard_normal((2, *shape))
    return np.asarray(x[0] + 1j * x[1] if np.dtype(dtype).kind == "c" else x[0]).astype(dtype)


def f32(*shape: int, value: float = 1.0) -> Any:
    return np.full(shape, value, F32)


def values_of(average: AveragedModel) -> list[Any]:
    return [np.array(a) for a in average._averages]


def snapshot(average: AveragedModel) -> Any:
    buffers = [(b.dtype.str, b.shape, b.tobytes()) for b in average._buffers]
    arrays = [(a.dtype.str, a.shape, a.tobytes()) for a in values_of(average)]
    return average.n_averaged, arrays, buffers, [id(a) for a in average._averages]


# ---- the formulas -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("kind", KINDS)
def test_averages_are_the_formula_in_the_dtype(kind: str, dtype: Any, layout: str) -> None:
    rng = np.random.default_rng(1)
    shapes = [(5, 7), (), (33,), (0, 4), (2, 3, 4)]
    start = [laid_out(draw(rng, shape, dtype), layout) for shape in shapes]
    average = AveragedModel(start, **KINDS[kind]())
    want = [a.copy() for a in start]
    assert all(same(a, b) for a, b in zip(values_of(average), want, strict=True)), "a copy until the first update"
    for n in range(1, 8):
        values = [laid_out(draw(rng, shape, dtype), layout) for shape in shapes]
        for value in values:
            value.flags.writeable = False
        average.update_parameters(values)
        want = [joined(kind, a, x, n) for a, x in zip(want, values, strict=True)]
        assert all(same(a, b) for a, b in zip(average.module, want, strict=True)), n
        assert average.n_averaged == n
        assert type(average.n_averaged) is int


def special(dtype: Any) -> Any:
    """Infinities, NaN, signed zeros, subnormal and huge numbers."""
    info = ml_dtypes.finfo(dtype) if dtype is ml_dtypes.bfloat16 else np.finfo(dtype)
    tiny, huge = float(info.smallest_subnormal), float(info.max)
    numbers = [0.0, -0.0, math.inf, -math.inf, math.nan, tiny, -3 * tiny, huge, -huge, 1.0, float(info.tiny)]
    return np.array(numbers).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_and_what_is_subnormal(kind: str, dtype: Any) -> None:
    one = special(dtype)
    values = [np.repeat(one, len(one)), np.tile(one, len(one)), np.repeat(one[::-1], len(one))]
    average, want = AveragedModel(values[1], **KINDS[kind]()), values[1]
    for n, value in enumerate(values, 1):
        average.update_parameters(value)
        want = joined(kind, want, value, n)
        assert same(average.module, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("kind", KINDS)
def test_the_first_update_is_a_copy_to_the_last_bit(kind: str, dtype: Any) -> None:
    size = np.dtype(dtype).itemsize // (2 if np.dtype(dtype).kind == "c" else 1)
    patterns = {
        2: [0x7FC1 if dtype is ml_dtypes.bfloat16 else 0x7E01, 0x8000, 1, 0x0041],
        4: [0x7FC00001, 0x80000000, 1, 0x00041111],
        8: [(0x7FF8 << 48) + 1, 1 << 63, 1, 0x41111],
    }
    odd = np.array(patterns[size], f"u{size}").view(dtype)
    for start in (np.zeros_like(odd), odd[::-1].copy(), np.full_like(odd, np.nan), np.full_like(odd, np.inf)):
        average = AveragedModel([start], **KINDS[kind]())
        assert average.module[0].tobytes() == start.tobytes()
        average.update_parameters([odd])
        assert average.module[0].tobytes() == odd.tobytes()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [np.float32, np.complex64])
def test_devices_give_the_same_bits(kind: str, dtype: Any, gpu: str) -> None:
    rng = np.random.default_rng(2)
    shapes = [(70, 33), (), (5,), (0, 4)]
    start = [draw(rng, shape, dtype) for shape in shapes]
    on = {"backend": gpu, "allow_software": True}
    cpu, arrays = AveragedModel(start, **KINDS[kind]()), AveragedModel(start, **KINDS[kind](), **on)
    named = AveragedModel(start, gpu, allow_software=True, **KINDS[kind]())
    resident = AveragedModel([Parameter(a.copy()) for a in start], **KINDS[kind](), **on)
    software = all(device.software for device in roptim.devices()[1:])
    for _ in range(5):
        values = [draw(rng, shape, dtype) for shape in shapes]
        for average in (cpu, arrays, named, resident):
            average.update_parameters(values)
        for other in (arrays, named, resident):
            for a, b in zip(values_of(cpu), values_of(other), strict=True):
                assert same(a, b) if software else np.allclose(a, b, rtol=1e-5, atol=1e-6)
    assert [type(a) for a in resident.module] == [Parameter] * 4


@pytest.mark.parametrize("kind", ["default", "ema 0.3", "multi swa"])
def test_any_number_of_threads_gives_the_same_bits(kind: str) -> None:
    rng = np.random.default_rng(3)
    values = [draw(rng, (300, 1001), F32) for _ in range(3)]
    want = values[0]
    averages = [AveragedModel(values[0], threads=threads, **KINDS[kind]()) for threads in (None, 1, 2, 5)]
    for n, value in enumerate(values, 1):
        want = joined(kind, want, value, n)
        for average in averages:
            average.update_parameters(value)
            assert average.module.tobytes() == want.tobytes()


@given(
    st.sampled_from(list(KINDS)),
    st.lists(st.lists(st.floats(-(2.0**90), 2.0**90, width=32), min_size=3, max_size=3), min_size=1, max_size=6),
)
def test_any_numbers(kind: str, rows: list[list[float]]) -> None:
    values = [np.array(row, F32) for row in rows]
    average, want = AveragedModel({"w": values[0]}, **KINDS[kind]()), values[0]
    for n, value in enumerate(values, 1):
        average.update_parameters({"w": value})
        want = joined(kind, want, value, n)
    assert same(average.module["w"], want)
    exact = np.array(rows).mean(axis=0)
    if decay_of(kind) is None:
        assert np.allclose(average.module["w"], exact, rtol=1e-5, atol=1e-6 * np.abs(rows).max())


def test_the_mean_and_the_exponential_mean() -> None:
    """What the formulas come to, in closed form."""
    swa, ema = AveragedModel(np.zeros(1)), AveragedModel(np.zeros(1), avg_fn=get_ema_avg_fn(0.5))
    for x in (8.0, 4.0, 0.0, -4.0):
        swa.update_parameters(np.array([x]))
        ema.update_parameters(np.array([x]))
    assert swa.module[0] == 2.0
    assert ema.module[0] == 8 / 8 + 4 / 8 + 0 / 4 - 4 / 2, "the start is not in it"


# ---- containers ---------------------------------------------------------------------------------------------


def test_containers() -> None:
    x, y = f32(2, value=1), f32(3, value=2)
    shapes: list[tuple[Any, Any, Any]] = [
        ([x, y], lambda a, b: [a, b], None),
        ((x, y), lambda a, b: (a, b), None),
        ({"x": x, "y": y}, lambda a, b: {"y": b, "x": a}, ["x", "y"]),
        ([("x", x), ("y", y)], lambda a, b: [("x", a), ("y", b)], ["x", "y"]),
        ([("x", x), ("y", y)], lambda a, b: {"y": b, "x": a}, ["x", "y"]),
        ({"l": {"w": x}, "m": [y]}, lambda a, b: {"m": [b], "l": {"w": a}}, ["l.w", "m.0"]),
        ([{"w": x}, [y]], lambda a, b: [{"w": a}, (b,)], ["0.w", "1.0"]),
        ((each for each in (x, y)), lambda a, b: [a, b], None),
    ]
    for model, like, names in shapes:
        average = AveragedModel(model)
        average.update_parameters(like(f32(2, value=3), f32(3, value=4)))
        average.update_parameters(like(f32(2, value=5), f32(3, value=6)))
        assert [a.tolist() for a in average._averages] == [[4] * 2, [5] * 3]
        state = average.state_dict()
        if names is None:
            assert [a.tolist() for a in state["module"]] == [[4] * 2, [5] * 3]
        else:
            assert {k: a.tolist() for k, a in state["module"].items()} == {names[0]: [4] * 2, names[1]: [5] * 3}
        target = (np.zeros(2, F32), np.zeros(3, F32))
        average.copy_to(like(*target))
        assert [t.tolist() for t in target] == [[4] * 2, [5] * 3]
    assert (x[0], y[0]) == (1, 2), "the parameters are copied"


def test_the_average_has_the_shape_of_the_model() -> None:
    x, y = f32(2), Parameter(f32(3, value=2), name="y", requires_grad=False)
    average = AveragedModel({"l": {"x": x}, "m": [y, x]})
    module = average.module
    assert list(module) == ["l", "m"]
    assert list(module["l"]) == ["x"]
    assert type(module["m"][0]) is Parameter
    assert module["m"][0].name == "y"
    assert module["m"][0] is not y
    assert module["l"]["x"] is not module["m"][1], "an array given twice has two averages"
    average.update_parameters({"l": {"x": 2 * x}, "m": [Parameter(f32(3, value=5)), 3 * x]})
    assert (module["l"]["x"][0], module["m"][0].data[0], module["m"][1][0]) == (2, 5, 3), "the same arrays are updated"
    assert average.module is module
    single = AveragedModel(x)
    single.update_parameters(4 * x)
    assert isinstance(single.module, np.ndarray)
    assert single.module.tolist() == [4, 4]
    lone = AveragedModel(Parameter(f32(2)))
    lone.update_parameters(Parameter(f32(2, value=7)))
    assert type(lone.module) is Parameter
    assert lone.module.data.tolist() == [7, 7]
    x[...] = 100
    assert single.module.tolist() == [4, 4]
    assert single.state_dict()["module"][0].tolist() == [4, 4]


def test_along_with_an_optimizer(backend: dict[str, Any]) -> None:
    """Parameters on the device of their optimizer, the average on the same one."""
    p = Parameter(np.linspace(-1, 1, 6, dtype=F32))
    opt = AdamW([p], lr=0.1, **backend)
    average = AveragedModel([p], avg_fn=get_ema_avg_fn(0.9), **backend)
    want = p.data.copy()
    software = all(device.software for device in roptim.devices()[1:])
    for n in range(1, 6):
        opt.step([np.sin(np.arange(6, dtype=F32) + n)])
        average.update_parameters([p])
        want = joined("ema 0.9", want, np.array(p.data), n)
        got = average.module[0].data
        assert same(got, want) if software or backend["backend"] == "cpu" else np.allclose(got, want, rtol=1e-5)
    before = p.data.tobytes()
    with average.applied_to([p]):
        assert np.array_equal(p.data, average.module[0].data)
    assert p.data.tobytes() == before
    opt.step([np.ones(6, F32)])
    assert p.data.tobytes() != before


# ---- functions of one's own ---------------------------------------------------------------------------------


def test_a_function_of_ones_own() -> None:
    calls: list[tuple[float, float, int]] = []

    def largest(average: Any, value: Any, count: int) -> Any:
        calls.append((float(average[0]), float(value[0]), count))
        assert type(count) is int
        average[...] = -99.0  # its own to write to
        return np.maximum(calls[-1][0], value)

    average = AveragedModel([f32(1, value=9), f32(2, value=9)], avg_fn=largest)
    for x in (1.0, 3.0, 2.0):
        average.update_parameters([f32(1, value=x), f32(2, value=2 * x)])
    assert calls == [(1, 3, 1), (2, 6, 1), (3, 2, 2), (6, 4, 2)], "the first update is a copy"
    assert [a.tolist() for a in average.module] == [[3], [6, 6]]
    assert average.n_averaged == 3


def test_a_function_of_ones_own_for_lists() -> None:
    calls: list[tuple[list[float], list[float], int]] = []

    def mixed(averages: list[Any], values: list[Any], count: int) -> None:
        calls.append(([float(a[0]) for a in averages], [float(x[0]) for x in values], count))
        averages[0] += values[0]
        averages[1] = values[1] * 2

    average = AveragedModel({"a": f32(1), "b": f32(2)}, multi_avg_fn=mixed)
    module = average.module
    for x in (1.0, 3.0, 2.0):
        average.update_parameters({"a": f32(1, value=x), "b": f32(2, value=10 * x)})
    assert calls == [([1, 10], [3, 30], 1), ([4, 60], [2, 20], 2)]
    assert (module["a"].tolist(), module["b"].tolist()) == ([6], [40, 40])


@pytest.mark.parametrize("dtype", [*DTYPES, np.int64, np.uint8], ids=lambda dtype: np.dtype(dtype).name)
def test_results_take_the_dtype_of_the_average(dtype: Any) -> None:
    average = AveragedModel([np.ones(3, dtype)], avg_fn=lambda a, x, n: (a.astype(np.complex128) + x).real / 2)
    average.update_parameters([np.ones(3, dtype)])
    average.update_parameters([np.full(3, 4, dtype)])
    assert average.module[0].dtype == dtype
    assert average.module[0].astype(np.complex128).tolist() == [2 if np.dtype(dtype).kind in "iu" else 2.5] * 3


@pytest.mark.parametrize("multi", [False, True])
def test_an_error_in_a_function_changes_nothing(multi: bool) -> None:
    fails = [True]

    def one(average: Any, value: Any, count: int) -> Any:
        result = average + value
        average[...] = -99.0
        if fails[0] and len(value) == 2:
            raise ZeroDivisionError
        return result

    def several(averages: list[Any], values: list[Any], count: int) -> None:
        for a, x in zip(averages, values, strict=True):
            a[...] = one(a, x, count)

    kwargs: dict[str, Any] = {"multi_avg_fn": several} if multi else {"avg_fn": one}
    average = AveragedModel([f32(1), f32(2)], buffers=[f32(1)], **kwargs)
    average.update_parameters([f32(1), f32(2)], [f32(1)])
    before = snapshot(average)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            average.update_parameters([f32(1, value=5), f32(2, value=5)], [f32(1, value=5)])
        assert snapshot(average) == before
    fails[0] = False
    average.update_parameters([f32(1, value=5), f32(2, value=5)], [f32(1, value=5)])
    assert [a.tolist() for a in average.module] == [[6], [6, 6]]
    assert average.buffers[0].tolist() == [5]


@pytest.mark.parametrize(
    ("result", "got"),
    [(lambda a: f32(3), "(3,)"), (lambda a: None, "()"), (lambda a: a[None], "(1, 2)"), (lambda a: 1.0, "()")],
)
def test_a_function_must_return_the_shape(result: Any, got: str) -> None:
    average = AveragedModel([f32(2), f32(2)], avg_fn=lambda a, x, n: a if x[0] == 1 else result(a))
    average.update_parameters([f32(2), f32(2)])
    before = snapshot(average)
    message = f"AveragedModel: average 1 must be of shape (2,), got {got}"
    with pytest.raises(roptim.RoptimValueError, match=f"^{re.escape(message)}$"):
        average.update_parameters([f32(2), f32(2, value=3)])
    assert snapshot(average) == before


@pytest.mark.parametrize("multi", [False, True])
def test_a_real_average_takes_no_complex_result(multi: bool) -> None:
    def several(averages: list[Any], values: list[Any], count: int) -> None:
        averages[1] = averages[1] * 1j

    one = {"avg_fn": lambda a, x, n: a * 1j if len(a) == 3 else a + x}
    average = AveragedModel([f32(2), f32(3)], **({"multi_avg_fn": several} if multi else one))
    average.update_parameters([f32(2), f32(3)])
    before = snapshot(average)
    with pytest.raises(roptim.RoptimTypeError, match=r"^AveragedModel: average 1 must be .*got complex64"):
        average.update_parameters([f32(2), f32(3)])
    assert snapshot(average) == before


@pytest.mark.parametrize(
    "spoil",
    [lambda a: a.pop(), lambda a: a.append(a[0]), lambda a: a.clear(), lambda a: a.__setitem__(0, None)],
    ids=["one less", "one more", "none", "no array"],
)
def test_a_function_must_leave_the_list_whole(spoil: Any) -> None:
    average = AveragedModel([f32(2), f32(2)], multi_avg_fn=lambda a, x, n: spoil(a))
    average.update_parameters([f32(2), f32(2)])
    before = snapshot(average)
    with pytest.raises(roptim.RoptimError, match=r"^AveragedModel"):
        average.update_parameters([f32(2), f32(2, value=3)])
    assert snapshot(average) == before


@pytest.mark.parametrize("kind", KINDS)
def test_the_engines_averages_as_plain_functions(kind: str) -> None:
    (function,) = KINDS[kind]().values() if kind != "default" else (get_swa_avg_fn(),)
    decay, rng = decay_of(kind), np.random.default_rng(4)
    a, x = rng.standard_normal(5), rng.standard_normal(5)
    for count in (1, 2, 7):
        swa, ema = a + (x - a) / (count + 1), None if decay is None else decay * a + (1 - decay) * x
        if kind.startswith("multi"):
            mine, other = a.copy(), 2 * a
            assert function([mine, other], [x, 2 * x], count) is None
            want = swa if ema is None else ema
            assert np.allclose(mine, want, rtol=1e-14, atol=1e-15)
            assert np.allclose(other, 2 * want, rtol=1e-14, atol=1e-15)
        else:
            kept = a.copy()
            assert np.array_equal(function(a, x, count), swa if ema is None else ema)
            assert np.array_equal(a, kept), "only read"
    name = kind.replace("default", "swa").replace("multi ", "")
    shown = f"get_{name[:3]}{'_multi' if 'multi' in kind else ''}_avg_fn({'' if decay is None else repr(decay)})"
    assert repr(function) == shown
    average = AveragedModel([f32(1)], **KINDS[kind]())
    assert repr(average) == f"AveragedModel({shown}, n_averaged=0)"


@pytest.mark.parametrize("make", [get_ema_avg_fn, get_ema_multi_avg_fn])
def test_decays(make: Any) -> None:
    for good in (0, 1, 0.0, 1.0, 0.5, np.float32(0.5), np.int8(1)):
        AveragedModel([f32(1)], **{"multi_avg_fn" if "multi" in make.__name__ else "avg_fn": make(good)})
    for wrong in (-0.1, 1.1, 2, math.nan, math.inf, -math.inf, np.float64(1.5), 10**400):
        message = f"{make.__name__}: decay must be a number in [0, 1], got {told(wrong)}"
        with pytest.raises(roptim.RoptimValueError, match=f"^{re.escape(message)}$"):
            make(wrong)
    for other in (True, "x", None, 1j, [0.5], np.array(0.5), np.complex64(1)):
        message = f"{make.__name__}: decay must be a number in [0, 1], got {told(other)}"
        with pytest.raises(roptim.RoptimTypeError, match=f"^{re.escape(message)}$"):
            make(other)


# ---- buffers ------------------------------------------------------------------------------------------------


def buffered(dtype: Any, values: list[Any], **kwargs: Any) -> list[Any]:
    """The buffer after each of these."""
    average = AveragedModel([f32(1)], buffers={"b": np.array([77], dtype)}, **kwargs)
    seen = []
    for value in values:
        average.update_parameters([f32(1)], {"b": np.array([value], dtype)})
        seen.append(average.buffers["b"][0])
    assert average.buffers["b"].dtype == dtype
    return seen


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.bool_, *DTYPES], ids=lambda dtype: np.dtype(dtype).name)
def test_buffers_are_copied(dtype: Any) -> None:
    assert [bool(b == x) for b, x in zip(buffered(dtype, [5, 3, 9]), [5, 3, 9], strict=True)] == [True] * 3 or (
        dtype is np.bool_
    )
    assert buffered(np.bool_, [True, False, True]) == [True, False, True]
    assert buffered(np.float64, [math.inf, 1.0], avg_fn=get_ema_avg_fn(0.5)) == [math.inf, 1.0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_buffers_are_averaged_where_asked(kind: str, dtype: Any) -> None:
    values = [5.0, -3.0, 9.0, 0.25]
    want, means = [5.0], 5.0
    decay = decay_of(kind)
    for n, x in enumerate(values[1:], 2):
        means = means + (x - means) / n if decay is None else decay * means + (1 - decay) * x
        want.append(means)
    got = buffered(dtype, values, use_buffers=True, **KINDS[kind]())
    assert got == pytest.approx(want, rel=1e-6 if dtype is np.float32 else 1e-14)
    assert buffered(dtype, values, **KINDS[kind]()) == values


WHOLE: dict[str, dict[str, Any]] = {
    "default": {},
    "ema 0.5": {"avg_fn": get_ema_avg_fn(0.5)},
    "multi swa": {"multi_avg_fn": get_swa_multi_avg_fn()},
    "multi ema 0.5": {"multi_avg_fn": get_ema_multi_avg_fn(0.5)},
}


@pytest.mark.parametrize(
    "dtype",
    [np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64],
    ids=lambda d: d.__name__,
)
@pytest.mark.parametrize("kind", WHOLE)
def test_whole_numbers_are_cut(kind: str, dtype: Any) -> None:
    for values in ([5, 2, 9, 9], [9, 1, 0, 0], [0, 100, 3, 120], [120, 0, 0, 7]):
        want = [values[0]]
        for n, x in enumerate(values[1:], 2):
            a = want[-1]
            want.append((a + x) // 2 if "ema" in kind else (a * (n - 1) + x) // n)
        assert [int(b) for b in buffered(dtype, values, use_buffers=True, **WHOLE[kind])] == want


def test_negative_whole_numbers_are_cut_towards_zero() -> None:
    assert [int(b) for b in buffered(np.int64, [-5, 2, -9], use_buffers=True)] == [-5, -1, -3]
    assert [int(b) for b in buffered(np.int8, [-100, 100, 100], use_buffers=True)] == [-100, 0, 33]


def test_buffers_go_through_ones_own_function() -> None:
    def last(averages: list[Any], values: list[Any], count: int) -> None:
        for a, x in zip(averages, values, strict=True):
            a[...] = x

    assert buffered(np.float64, [0.0, 10.0, 20.0], use_buffers=True, avg_fn=lambda a, x, n: x) == [0, 10, 20]
    assert buffered(np.float64, [0.0, 10.0, 20.0], use_buffers=True, multi_avg_fn=last) == [0, 10, 20]


def test_buffers_are_copies() -> None:
    given_at_first, model = {"mean": np.zeros(2)}, [f32(1)]
    average = AveragedModel(model, buffers=given_at_first)
    given_at_first["mean"][...] = 5
    assert average.buffers["mean"].tolist() == [0, 0]
    new = {"mean": np.ones(2)}
    average.update_parameters(model, new)
    new["mean"][...] = 7
    assert average.buffers["mean"].tolist() == [1, 1]
    assert AveragedModel(model).buffers is None


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("kind", ["default", "multi ema 0.3", "own"])
def test_buffers_that_do_not_fit_change_nothing(kind: str, use_buffers: bool) -> None:
    kwargs = {"avg_fn": lambda a, x, n: a + x} if kind == "own" else KINDS[kind]()
    average = AveragedModel([f32(1)], buffers={"a": np.zeros(2), "n": np.array(0)}, use_buffers=use_buffers, **kwargs)
    good = {"a": np.ones(2), "n": np.array(4)}
    place = "AveragedModel.update_parameters"
    refused: list[tuple[Any, type[Exception], str]] = [
        (None, TypeError, f"{place}: buffers must be given as at construction, got none"),
        ({**good, "a": np.ones(3)}, ValueError, f"{place}: buffer 0 must be of shape (2,), got (3,)"),
        ({**good, "n": np.ones(1)}, ValueError, f"{place}: buffer 1 must be of shape (), got (1,)"),
        ({"a": np.ones(2)}, KeyError, ""),
        ({**good, "more": np.ones(2)}, KeyError, ""),
        ([np.ones(2), np.array(4)], TypeError, ""),
        ({**good, "n": np.array(1j)}, TypeError, ""),
        ({**good, "a": np.ones(2, complex)}, TypeError, ""),
        ({**good, "a": np.array(["x", "y"])}, TypeError, ""),
        ({**good, "a": np.array([None, 1.0])}, TypeError, ""),
    ]
    for _ in range(2):
        before = snapshot(average)
        for wrong, error, message in refused:
            with pytest.raises(error, match=f"^{re.escape(message)}" + ("$" if message else "")) as caught:
                average.update_parameters([f32(1, value=5)], wrong)
            assert snapshot(average) == before
            assert isinstance(caught.value, roptim.RoptimError)
        average.update_parameters([f32(1)], good)
    plain = AveragedModel([f32(1)])
    message = f"{place}: buffers must be given at construction too, got none there"
    with pytest.raises(roptim.RoptimTypeError, match=f"^{re.escape(message)}$"):
        plain.update_parameters([f32(1)], [f32(1)])
    assert plain.n_averaged == 0


@pytest.mark.parametrize("use_buffers", [False, True])
def test_a_function_that_fails_on_a_buffer_changes_nothing(use_buffers: bool) -> None:
    def picky(average: Any, value: Any, count: int) -> Any:
        if value.dtype == np.int64:
            raise ZeroDivisionError
        return average + value

    average = AveragedModel([f32(1)], buffers=[np.zeros(1), np.array([3])], use_buffers=use_buffers, avg_fn=picky)
    average.update_parameters([f32(1)], [np.ones(1), np.array([4])])
    before = snapshot(average)
    if use_buffers:
        with pytest.raises(ZeroDivisionError):
            average.update_parameters([f32(1, value=5)], [np.ones(1), np.array([4])])
        assert snapshot(average) == before
    else:
        average.update_parameters([f32(1, value=5)], [np.ones(1), np.array([5])])
        assert average.buffers[1][0] == 5


@pytest.mark.parametrize("kind", ["default", "ema 0.3", "multi swa", "multi ema 0.3"])
def test_truth_values_are_averaged_or_refused_before_anything_changes(kind: str) -> None:
    average = AveragedModel([f32(1)], buffers=[np.array([True])], use_buffers=True, **KINDS[kind]())
    average.update_parameters([f32(1)], [np.array([True])])
    before = snapshot(average)
    try:
        average.update_parameters([f32(1, value=5)], [np.array([False])])
    except roptim.RoptimError:
        assert snapshot(average) == before
    else:
        assert average.n_averaged == 2


@pytest.mark.parametrize("wrong", [["x"], [None], [object()], "x", {"a": "text"}], ids=repr)
def test_buffers_are_arrays(wrong: Any) -> None:
    with pytest.raises(roptim.RoptimError, match=r"^AveragedModel"):
        AveragedModel([f32(1)], buffers=wrong)


# ---- in place of the parameters -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("as_parameter", [False, True])
def test_applied_to_restores_every_bit(dtype: Any, as_parameter: bool) -> None:
    own = [special(dtype), np.arange(12).astype(dtype).reshape(4, 3)[::2]]
    model: Any = {"a": Parameter(own[0]) if as_parameter else own[0], "b": own[1]}
    average = AveragedModel({"a": np.zeros_like(own[0]), "b": np.ones_like(own[1])})
    bits = [a.tobytes() for a in own]
    for error in (None, ZeroDivisionError, KeyboardInterrupt, roptim.RoptimError):
        expected: Any = contextlib.nullcontext() if error is None else pytest.raises(error)
        with expected as caught, average.applied_to(model) as nothing:
            assert nothing is None
            assert not np.asarray(model["a"]).astype(np.complex128).any()
            assert (own[1] == 1).all()
            own[1][...] = 9  # what is written within is gone afterwards
            if error is not None:
                raise error
        assert error is None or caught.type is error
        assert [a.tobytes() for a in own] == bits
    assert average.n_averaged == 0
    assert average.module["b"].astype(np.complex128).tolist() == [[1] * 3] * 2, "the average is its own array"


def test_applied_to_gives_back_all_it_can_and_says_what_not() -> None:
    params = [f32(3, value=5), f32(2, value=5), f32(1, value=5)]
    average = AveragedModel([f32(3), f32(2), f32(1)])
    with (
        pytest.raises(roptim.RoptimValueError, match="applied_to: parameter 0, parameter 1 must be writeable, got"),
        average.applied_to(params),
    ):
        params[0].flags.writeable = params[1].flags.writeable = False
    assert [p[0] for p in params] == [1, 1, 5]


def test_applied_to_keeps_the_class_of_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that is lost is no array that is shut."""
    params = [Parameter(f32(3, value=5)), f32(2, value=5)]

    def lost(*_: Any) -> None:
        raise roptim.DeviceLostError("gone")

    average = AveragedModel([f32(3), f32(2)])
    with pytest.raises(roptim.DeviceLostError, match="gone"), average.applied_to(params):
        monkeypatch.setattr(Parameter, "__setitem__", lost)
    assert params[1].tolist() == [5, 5]


def test_applied_to_nests() -> None:
    p = f32(2, value=1)
    two, three = AveragedModel(f32(2, value=2)), AveragedModel(f32(2, value=3))
    with two.applied_to(p):
        assert p[0] == 2
        with three.applied_to(p):
            assert p[0] == 3
        assert p[0] == 2
        two.update_parameters(p * 5)
        assert (p[0], two.module[0]) == (2, 10)
    assert p[0] == 1


def test_copy_to() -> None:
    average = AveragedModel([f32(2), f32(3)])
    average.update_parameters([f32(2, value=4), f32(3, value=5)])
    a, b = np.zeros((2, 2), F32)[:, 0], Parameter(np.zeros(3, F32))
    average.copy_to([a, b])
    assert (a.tolist(), b.data.tolist()) == ([4, 4], [5, 5, 5])
    a += 1
    assert average.module[0].tolist() == [4, 4], "a copy"


def write(average: AveragedModel, how: str, model: Any) -> None:
    if how == "copy_to":
        average.copy_to(model)
        return
    with average.applied_to(model):
        pytest.fail("the block is not entered")


def read_only(a: Any) -> Any:
    a = a.copy()
    a.flags.writeable = False
    return a


@pytest.mark.parametrize("how", ["copy_to", "applied_to"])
@pytest.mark.parametrize(
    ("second", "error", "message"),
    [
        (f32(4), ValueError, "AveragedModel.{how}: parameter 1 must be of shape (3,), got (4,)"),
        (f32(1, 3), ValueError, "AveragedModel.{how}: parameter 1 must be of shape (3,), got (1, 3)"),
        (3.0, TypeError, ""),
        (None, TypeError, ""),
        ("x", TypeError, ""),
        (read_only(f32(3)), ValueError, ""),
        (np.zeros(3, np.int64), TypeError, ""),
        (np.zeros(3, bool), TypeError, ""),
    ],
    ids=["shape", "axes", "a number", "None", "text", "read-only", "whole numbers", "truth values"],
)
def test_parameters_that_do_not_fit_are_not_written(how: str, second: Any, error: Any, message: str) -> None:
    first = f32(2, value=7)
    average = AveragedModel({"a": f32(2), "b": f32(3)})
    model = {"a": first, "b": second}
    with pytest.raises(error, match=f"^{re.escape(message.format(how=how))}" + ("$" if message else "")) as caught:
        write(average, how, model)
    assert first.tolist() == [7, 7], "all or nothing"
    assert isinstance(caught.value, roptim.RoptimError)


@pytest.mark.parametrize("how", ["copy_to", "applied_to", "update_parameters"])
def test_names_and_containers_that_do_not_fit(how: str) -> None:
    average = AveragedModel({"a": f32(2), "b": f32(3)})
    first = f32(2, value=7)
    for model, error in [
        ({"a": first}, KeyError),
        ({"a": first, "b": f32(3), "c": f32(3)}, KeyError),
        ({"a": first, "c": f32(3)}, KeyError),
        ([first, f32(3)], TypeError),
        (first, TypeError),
        (None, TypeError),
        ({"a": [first], "b": f32(3)}, (TypeError, ValueError)),
    ]:
        before = snapshot(average)
        with pytest.raises(error) as caught:
            average.update_parameters(model) if how == "update_parameters" else write(average, how, model)
        assert isinstance(caught.value, roptim.RoptimError)
        assert str(caught.value).startswith(f"AveragedModel.{how}: ")
        assert snapshot(average) == before
        assert first.tolist() == [7, 7]


def test_messages_speak_of_parameters() -> None:
    """And not of the gradients that the same containers hold elsewhere."""
    single, average = AveragedModel(f32(2)), AveragedModel({"a": f32(2)}, buffers={"m": f32(2)})
    attempts: list[Callable[[], Any]] = [
        lambda: average.update_parameters({"b": f32(2)}, {"m": f32(2)}),
        lambda: average.update_parameters([f32(2)], {"m": f32(2)}),
        lambda: average.update_parameters({"a": f32(2)}, {"n": f32(2)}),
        lambda: average.update_parameters({"a": f32(2)}, [f32(2)]),
        lambda: average.copy_to({"b": f32(2)}),
        lambda: single.update_parameters([f32(2)]),
        lambda: single.copy_to([f32(2)]),
    ]
    for attempt in attempts:
        with pytest.raises(roptim.RoptimError) as caught:
            attempt()
        assert "gradient" not in str(caught.value)
        assert "skip" not in str(caught.value)


@pytest.mark.parametrize("kind", ["default", "multi ema 0.3", "own"])
@pytest.mark.parametrize(
    ("second", "error", "message"),
    [
        (f32(4), ValueError, "parameter 1 must be of shape (3,), got (4,)"),
        (f32(3, 1), ValueError, "parameter 1 must be of shape (3,), got (3, 1)"),
        (np.float32(3), ValueError, "parameter 1 must be of shape (3,), got ()"),
        (np.ones(3), TypeError, "parameter 1 must be float32, got float64"),
        (np.ones(3, np.complex64), TypeError, "parameter 1 must be float32, got complex64"),
        (np.ones(3, ">f4"), TypeError, "parameter 1 must be float32, got >f4"),
        (np.ones(3, np.int64), TypeError, "parameter 1 must be float32, got int64"),
        ([1.0, 2.0, 3.0], TypeError, None),
        (None, TypeError, None),
        ("x", (TypeError, ValueError), None),
    ],
    ids=["shape", "axes", "a number", "wider", "complex", "swapped", "whole", "a list", "None", "text"],
)
def test_values_that_do_not_fit(kind: str, second: Any, error: Any, message: str | None) -> None:
    average = AveragedModel([f32(2), f32(3)], **({"avg_fn": lambda a, x, n: a + x} if kind == "own" else KINDS[kind]()))
    exact = f"^AveragedModel.update_parameters: {re.escape(message or '')}" + ("" if message is None else "$")
    for _ in range(2):
        before = snapshot(average)
        with pytest.raises(error, match=exact) as caught:
            average.update_parameters([f32(2, value=5), second])
        assert snapshot(average) == before
        assert isinstance(caught.value, roptim.RoptimError)
        average.update_parameters([f32(2), f32(3)])


# ---- state --------------------------------------------------------------------------------------------------


def run(average: AveragedModel, steps: Any, seed: int = 0) -> None:
    for t in steps:
        rng = np.random.default_rng([seed, t])
        values = {"l": [rng.standard_normal((3, 2)).astype(F32)], "b": rng.standard_normal(4).astype(F32)}
        buffers = [rng.standard_normal(2), np.array(rng.integers(100))]
        average.update_parameters(values, buffers)


def built(kind: str, **kwargs: Any) -> AveragedModel:
    model = {"l": [np.zeros((3, 2), F32)], "b": np.zeros(4, F32)}
    own = {"avg_fn": halfway} if kind == "own" else {"multi_avg_fn": several_halfway} if kind == "own multi" else {}
    buffers = [np.zeros(2), np.array(0)]
    return AveragedModel(model, buffers=buffers, use_buffers=True, **(own or KINDS[kind]()), **kwargs)


def halfway(average: Any, value: Any, count: int) -> Any:
    return average + (value - average) / (count + 2)


def several_halfway(averages: list[Any], values: list[Any], count: int) -> None:
    for a, x in zip(averages, values, strict=True):
        a += (x - a) / (count + 2)


STATEFUL = ["default", "ema 0.3", "multi swa", "multi ema 0.999", "own", "own multi"]


@pytest.mark.parametrize("kind", STATEFUL)
def test_resuming_at_every_split(kind: str, tmp_path: Any) -> None:
    whole = built(kind)
    run(whole, range(6))
    for split in range(7):
        first = built(kind)
        run(first, range(split))
        file = tmp_path / f"{split}.safetensors"
        roptim.save({"average": first.state_dict(), "epoch": 1}, file)
        second = built(kind)
        run(second, [50, 51])
        second.load_state_dict(roptim.load(file)["average"])
        assert snapshot(second)[:3] == snapshot(first)[:3]
        run(second, range(split, 6))
        assert snapshot(second)[:3] == snapshot(whole)[:3], split


@pytest.mark.parametrize("from_gpu", [False, True])
def test_state_travels_between_devices(from_gpu: bool, gpu: str) -> None:
    on = {"backend": gpu, "allow_software": True}
    one, two = (built("ema 0.3", **(on if here else {})) for here in (from_gpu, not from_gpu))
    run(one, range(3))
    two.load_state_dict(one.state_dict())
    assert snapshot(two)[:3] == snapshot(one)[:3]
    if all(device.software for device in roptim.devices()[1:]):
        run(one, range(3, 6))
        run(two, range(3, 6))
        assert snapshot(two)[:3] == snapshot(one)[:3]


def test_the_state_is_a_copy() -> None:
    average = built("default")
    run(average, range(3))
    state, before = average.state_dict(), snapshot(average)
    assert list(state) == ["n_averaged", "module", "buffers"]
    assert state["n_averaged"] == 3
    assert list(state["module"]) == ["l.0", "b"]
    for array in (*state["module"].values(), *state["buffers"]):
        array[...] = 9
    assert snapshot(average) == before
    other = built("default")
    other.load_state_dict(state)
    loaded = snapshot(other)
    for array in (*state["module"].values(), *state["buffers"]):
        array[...] = 11
    assert snapshot(other) == loaded
    assert other.n_averaged == 3
    plain = AveragedModel([f32(1)])
    assert list(plain.state_dict()) == ["n_averaged", "module"]


def test_names_find_their_arrays() -> None:
    average = AveragedModel({"a": f32(2), "b": f32(2)})
    average.load_state_dict({"n_averaged": 2, "module": {"b": f32(2, value=5), "a": f32(2, value=4)}})
    assert (average.module["a"][0], average.module["b"][0], average.n_averaged) == (4, 5, 2)
    average.load_state_dict({"n_averaged": np.array(3), "module": [f32(2, value=6), f32(2, value=7)]})
    assert (average.module["a"][0], average.module["b"][0], average.n_averaged) == (6, 7, 3)
    plain = AveragedModel([f32(2), f32(2)])
    plain.load_state_dict({"n_averaged": np.int64(1), "module": {"x": f32(2, value=8), "y": f32(2, value=9)}})
    assert [a[0] for a in plain.module] == [8, 9]
    plain.update_parameters([f32(2), f32(2)])
    assert [a[0] for a in plain.module] == [4.5, 5], "the count goes on from the loaded one"
    plain.load_state_dict({"n_averaged": 0, "module": [f32(2, value=8), f32(2, value=9)]})
    plain.update_parameters([f32(2), f32(2)])
    assert [a[0] for a in plain.module] == [1, 1], "a count of 0 begins anew"


@pytest.mark.parametrize("kind", ["default", "own"])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (3, TypeError, "state_dict must be a dict, got an object of type int"),
        (None, TypeError, "state_dict must be a dict, got an object of type NoneType"),
        ({"n_averaged": ...}, KeyError, "state_dict must be a dict with 'n_averaged', got ['buffers', 'module']"),
        ({"module": ...}, KeyError, "state_dict must be a dict with 'module', got ['buffers', 'n_averaged']"),
        ({"n_averaged": -1}, ValueError, "n_averaged must be a whole number >= 0, got -1"),
        ({"n_averaged": 1.5}, ValueError, "n_averaged must be a whole number >= 0, got 1.5"),
        ({"n_averaged": True}, ValueError, "n_averaged must be a whole number >= 0, got True"),
        ({"n_averaged": None}, ValueError, "n_averaged must be a whole number >= 0, got None"),
        ({"n_averaged": "3"}, ValueError, "n_averaged must be a whole number >= 0, got '3'"),
        ({"n_averaged": np.arange(2)}, ValueError, "n_averaged must be a whole number >= 0, got array([0, 1])"),
        (
            {"module": {"l.0": f32(3, 2), "c": f32(4)}},
            KeyError,
            "module must be one with ['l.0', 'b'], got ['c', 'l.0']",
        ),
        ({"module": {"l.0": f32(3, 2)}}, KeyError, "module must be one with ['l.0', 'b'], got ['l.0']"),
        ({"module": [f32(3, 2)]}, ValueError, "number of averages must be 2, got 1"),
        (
            {"module": [f32(3, 2), f32(5)]},
            ValueError,
            "average 1 must be float32 of shape (4,), got float32 of shape (5,)",
        ),
        (
            {"module": [f32(3, 2), np.ones(4)]},
            ValueError,
            "average 1 must be float32 of shape (4,), got float64 of shape (4,)",
        ),
        ({"module": None}, TypeError, None),
        ({"module": 3}, TypeError, None),
        ({"module": "text"}, roptim.RoptimError, None),
        ({"buffers": None}, TypeError, None),
        ({"buffers": 3}, TypeError, None),
        ({"buffers": ...}, ValueError, "number of buffers must be 2, got 0"),
        ({"buffers": [np.zeros(2)]}, ValueError, "number of buffers must be 2, got 1"),
        (
            {"buffers": [np.zeros(2), np.zeros(1, int)]},
            ValueError,
            "buffer 1 must be int64 of shape (), got int64 of shape (1,)",
        ),
        (
            {"buffers": [np.zeros(2, F32), np.array(0)]},
            ValueError,
            "buffer 0 must be float64 of shape (2,), got float32 of shape (2,)",
        ),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_states_that_do_not_fit_change_nothing(kind: str, change: Any, error: Any, message: str | None) -> None:
    average = built(kind)
    run(average, range(2))
    state = average.state_dict()
    wrong: Any = change
    if isinstance(change, dict):
        wrong = {key: value for key, value in {**state, **change}.items() if value is not ...}
    run(average, [2])
    before = snapshot(average)
    exact = f"^AveragedModel.load_state_dict: {re.escape(message or '')}" + ("" if message is None else "$")
    with pytest.raises(error, match=exact) as caught:
        average.load_state_dict(wrong)
    assert isinstance(caught.value, roptim.RoptimError)
    assert snapshot(average) == before
    run(average, [3])
    other = built(kind)
    run(other, range(4))
    assert snapshot(average)[:3] == snapshot(other)[:3]


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda average: pickle.loads(pickle.dumps(average))])
@pytest.mark.parametrize("kind", STATEFUL)
def test_copies_go_on_alone(kind: str, copied: Any) -> None:
    average = built(kind)
    run(average, range(3))
    other = copied(average)
    assert type(other) is AveragedModel
    assert repr(other).split(" at ")[0] == repr(average).split(" at ")[0]
    assert snapshot(other)[:3] == snapshot(average)[:3]
    before = snapshot(other)
    run(average, range(3, 6))
    assert snapshot(other) == before
    run(other, range(3, 6))
    assert snapshot(other)[:3] == snapshot(average)[:3]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda average: pickle.loads(pickle.dumps(average))])
def test_copies_take_the_same_containers(copied: Any) -> None:
    x, y = f32(2, value=3), f32(3, value=5)
    containers: list[Any] = [
        [x, y],
        (x, y),
        {"a": x, "b": y},
        [("a", x), ("b", y)],
        [{"a": x}, [y]],
        [[("a", x)], [("b", y)]],
        [Parameter(x, name="p"), y],
        x,
    ]
    for model in containers:
        average = AveragedModel(model, threads=2)
        other = copied(average)
        for each in (average, other):
            each.update_parameters(model)
            each.copy_to(model)
        assert snapshot(other)[:3] == snapshot(average)[:3]
        assert repr(other.module) == repr(average.module)
        names = [list(module) if isinstance(module, dict) else None for module in map(module_of, (average, other))]
        assert names[0] == names[1]


def module_of(average: AveragedModel) -> Any:
    return average.state_dict()["module"]


def test_copies_of_a_subclass_keep_what_it_added() -> None:
    average = Noted([f32(1)])
    average.note = "mine"
    for other in (copy.deepcopy(average), pickle.loads(pickle.dumps(average))):
        assert type(other) is Noted
        assert other.note == "mine"


class Noted(AveragedModel):
    note: str


# ---- hostile arguments --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (
            lambda: AveragedModel([f32(1)], avg_fn=get_swa_avg_fn(), multi_avg_fn=get_swa_multi_avg_fn()),
            ValueError,
            "AveragedModel: multi_avg_fn must be None beside avg_fn, got get_swa_multi_avg_fn()",
        ),
        (lambda: AveragedModel([f32(1)], avg_fn=3), TypeError, "AveragedModel: avg_fn must be callable, got 3"),
        (
            lambda: AveragedModel([f32(1)], multi_avg_fn="x"),
            TypeError,
            "AveragedModel: multi_avg_fn must be callable, got 'x'",
        ),
        (
            lambda: AveragedModel(None),
            TypeError,
            "AveragedModel: params must be arrays or Parameters in a container, got None",
        ),
        (lambda: AveragedModel({1}), TypeError, "AveragedModel: params must be ordered, got a set; use a list"),
        (
            lambda: AveragedModel([3.0]),
            TypeError,
            "AveragedModel: parameter 0 must be a numpy.ndarray, got an object of type float; "
            "convert it with numpy.asarray",
        ),
        (
            lambda: AveragedModel([f32(1), [None]]),
            TypeError,
            "AveragedModel: parameter 1 must be a numpy.ndarray, got an object of type NoneType; "
            "convert it with numpy.asarray",
        ),
        (
            lambda: AveragedModel([("a", f32(1)), ("a", f32(1))]),
            ValueError,
            "AveragedModel: names must be different, got 'a' twice",
        ),
        (
            lambda: AveragedModel([f32(1)], threads=0),
            ValueError,
            "AveragedModel: threads must be None or a whole number from 1 to 65535, got 0",
        ),
        (
            lambda: AveragedModel([f32(1)], 3),
            TypeError,
            'AveragedModel: backend must be "cpu", "gpu", "auto" or a Device, got 3',
        ),
        (
            lambda: AveragedModel([f32(1)], "gpu", avg_fn=lambda a, x, n: a),
            ValueError,
            "AveragedModel: backend must be \"cpu\" for a function of your own, got 'gpu'",
        ),
    ],
)
def test_refused_arguments(make: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^{re.escape(message)}$") as caught:
        make()
    assert isinstance(caught.value, roptim.RoptimError)


def test_what_no_engine_takes_is_refused_by_this_name() -> None:
    for wrong in (
        np.ones(3, np.int64),
        np.array(["x"]),
        np.array([None]),
        np.ones(3, np.longdouble),
        np.ones(3, ">f4"),
    ):
        with pytest.raises(roptim.RoptimError, match=r"^AveragedModel: parameter 1 must be "):
            AveragedModel([f32(1), wrong])
    for device in ("cuda", "tpu", ""):
        with pytest.raises(roptim.RoptimError, match=r"^AveragedModel: backend must be "):
            AveragedModel([f32(1)], backend=device)
        with pytest.raises(roptim.RoptimError, match=r"^AveragedModel: backend must be "):
            AveragedModel([f32(1)], device=device)


def test_a_model_is_not_its_own_average() -> None:
    """The averages themselves as the next value: refused, or the same average again."""
    average = AveragedModel([f32(3)])
    average.update_parameters([f32(3, value=2)])
    before = snapshot(average)
    try:
        average.update_parameters(average.module)
    except roptim.RoptimError:
        assert snapshot(average) == before
    else:
        assert average.module[0].tolist() == [2, 2, 2]


# ---- statistics over batches --------------------------------------------------------------------------------


@given(
    st.lists(st.integers(2, 7), min_size=1, max_size=6),
    st.sampled_from([0, 1, -1, (0,), (0, 1), (0, 2), (-1, 0), (0, 1, 2)]),
    st.sampled_from([np.float16, np.float32, np.float64, np.int64]),
    st.integers(0, 2**32 - 1),
)
def test_statistics_are_means_over_batches(rows: list[int], axis: Any, dtype: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    axes = axis if isinstance(axis, tuple) else (axis,)
    batches = []
    for n in rows:
        shape = [n if a in axes or a - 3 in axes else 2 + a for a in range(3)]
        batches.append((10 * rng.standard_normal(shape) + 3).astype(dtype))
    kept = [b.copy() for b in batches]
    mean, variance = cumulative_stats(iter(batches), axis)
    wide = [b.astype(np.float64) for b in batches]
    means, variances = [], []
    for x in wide:
        count = math.prod(x.shape[a] for a in axes)
        centre = x.sum(axis=axes, keepdims=True) / count
        means.append(centre.reshape([k for a, k in enumerate(x.shape) if a not in axes and a - 3 not in axes]))
        variances.append(((x - centre) ** 2).sum(axis=axes) / (count - 1))
    assert np.allclose(mean, np.mean(means, axis=0), rtol=1e-12, atol=1e-12)
    assert np.allclose(variance, np.mean(variances, axis=0), rtol=1e-11, atol=1e-12)
    assert np.shape(mean) == np.shape(variance) == means[0].shape
    assert np.asarray(mean).dtype == np.asarray(variance).dtype == np.float64
    assert all(np.array_equal(a, b) for a, b in zip(batches, kept, strict=True))


def test_statistics_by_hand() -> None:
    mean, variance = cumulative_stats([[[1.0, 0.0], [3.0, 0.0]], [[5.0, 6.0], [5.0, 0.0], [2.0, 0.0]]])
    assert mean.tolist() == [(2 + 4) / 2, (0 + 2) / 2]
    assert variance.tolist() == [(2 + 3) / 2, (0 + 12) / 2]
    one = cumulative_stats([np.arange(4.0)])
    assert one == (1.5, pytest.approx(5 / 3))
    assert cumulative_stats(np.array([[1.0, 3.0], [5.0, 5.0]])) == (3.5, 1.0), "an array is its rows"
    shifted = cumulative_stats([1e9 + np.arange(4.0), 1e9 + np.arange(4.0)])
    assert shifted == (1e9 + 1.5, pytest.approx(5 / 3)), "no cancellation"


@pytest.mark.parametrize(
    ("batches", "axis", "message"),
    [
        ([], 0, "cumulative_stats: batches must be at least one, got none"),
        ([np.ones((1, 3))], 0, "cumulative_stats: batch 0 must be of at least 2 rows, got 1"),
        ([np.ones((2, 3)), np.ones((1, 3))], 0, "cumulative_stats: batch 1 must be of at least 2 rows, got 1"),
        ([np.ones((0, 3))], 0, "cumulative_stats: batch 0 must be of at least 2 rows, got 0"),
        ([np.ones((3, 2))], (), "cumulative_stats: batch 0 must be of at least 2 rows, got 1"),
        ([np.ones((4, 3)), np.ones((4, 1))], 0, None),
        ([np.ones((4, 3)), np.ones((4, 2))], 0, None),
        ([np.ones((4, 3)), np.ones(4)], 0, None),
        ([np.ones((4, 3))], 2, None),
        ([np.ones((4, 3))], -3, None),
        ([np.ones((4, 3))], (0, 0), None),
        ([np.ones((4, 3))], (0, -2), None),
        ([np.ones((4, 3))], 1.0, None),
        ([np.ones((4, 3))], "x", None),
        ([np.ones((4, 3))], None, None),
        ([np.array(3.0)], 0, None),
        (3, 0, None),
        (None, 0, None),
        ([None], 0, None),
        (["x"], 0, None),
        ([np.ones((3, 2), complex)], 0, None),
    ],
    ids=lambda value: repr(value).replace("\n", "")[:40],
)
def test_batches_without_statistics(batches: Any, axis: Any, message: str | None) -> None:
    with pytest.raises(roptim.RoptimError, match=r"^cumulative_stats: " if message is None else f"^{message}$"):
        cumulative_stats(batches, axis)


def test_what_is_not_finite_in_a_batch_is_seen() -> None:
    for wrong in (math.inf, -math.inf, math.nan):
        with np.errstate(invalid="ignore"):
            mean, variance = cumulative_stats([[1.0, 2.0], [1.0, wrong], [1.0, 2.0]])
        assert not math.isfinite(mean)
        assert math.isnan(variance)


# ---- a whole run --------------------------------------------------------------------------------------------


def test_the_average_of_a_noisy_run_is_nearer() -> None:
    rng = np.random.default_rng(5)
    p = {"w": np.zeros(20)}
    target = rng.standard_normal(20)
    opt = SGD(p, lr=0.5)
    swa, ema = AveragedModel(p), AveragedModel(p, avg_fn=get_ema_avg_fn(0.95))
    trail = []
    for t in range(300):
        opt.step({"w": p["w"] - target + rng.standard_normal(20)})
        ema.update_parameters(p)
        if t >= 50:
            swa.update_parameters(p)
            trail.append(p["w"].copy())
    assert np.allclose(swa.module["w"], np.mean(trail, axis=0), rtol=1e-12)
    distance = {
        name: np.abs(a["w"] - target).mean() for name, a in [("p", p), ("swa", swa.module), ("ema", ema.module)]
    }
    assert 3 * distance["swa"] < distance["p"]
    assert 1.5 * distance["ema"] < distance["p"]
    with swa.applied_to(p):
        assert np.array_equal(p["w"], swa.module["w"])
    assert np.array_equal(p["w"], trail[-1])


def test_a_count_of_zero_begins_a_new_average() -> None:
    average, w = AveragedModel([f32(2)]), f32(2, value=9)
    average.update_parameters([f32(2)])
    average.update_parameters([f32(2, value=3)])
    average.n_averaged = 0
    average.update_parameters([w])
    assert average.module[0].tolist() == [9, 9]
    assert average.n_averaged == 1
    for wrong in (-1, 1.5, True, "2", None):
        with pytest.raises(roptim.RoptimValueError, match="n_averaged must be a whole number >= 0"):
            average.n_averaged = wrong  # type: ignore[assignment]  # wrong types are what is refused


def test_functions_of_ones_own_cannot_reach_the_parameters() -> None:
    def greedy(average: Any, value: Any, count: int) -> Any:
        value += 100
        return average

    def several(averages: list[Any], values: list[Any], count: int) -> None:
        values[0] += 100

    for kwargs in ({"avg_fn": greedy}, {"multi_avg_fn": several}):
        average, w = AveragedModel([f32(2)], **kwargs), f32(2)  # type: ignore[arg-type]
        average.update_parameters([w])
        average.update_parameters([w])
        assert w.tolist() == [1, 1]


def test_generators_and_the_average_itself_are_taken() -> None:
    params = [f32(2), f32(3, value=2)]
    average = AveragedModel(p for p in params)
    average.update_parameters(p for p in params)
    average.update_parameters(average.module)
    assert [a.tolist() for a in average.module] == [p.tolist() for p in params]
