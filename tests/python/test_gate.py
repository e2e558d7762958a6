"""The gate that every array passes: layouts, dtypes, byte orders, read-only memory, overlap, arrays that change."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from helpers import fingerprint
from hypothesis import event, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from twins import FULL, f32

import roptim
from roptim import SGD, Adam, Parameter

SUPPORTED = [np.dtype(t) for t in ("f4", "f8", "c8", "c16", "f2", ml_dtypes.bfloat16)]
FOREIGN = [
    *(np.int8, np.uint16, np.int32, np.uint64, np.bool_, np.longdouble, np.clongdouble, object, "S4", "U1", "V4"),
    *("M8[s]", "m8[s]", [("x", "f4")], ml_dtypes.float8_e4m3fn, ml_dtypes.int4),
]
#: Mostly those that are let in, so that most examples are about the rest.
DTYPES = [*6 * SUPPORTED, *(np.dtype(dtype) for dtype in FOREIGN)]


SELDOM = st.sampled_from([False] * 6 + [True])


# ---- any array at all ---------------------------------------------------------------------------------------


def layout(data: st.DataObject, shape: tuple[int, ...], item: int) -> tuple[tuple[int, ...], int, int]:
    """Strides, offset and bytes of the memory of an array laid out in one of many ways."""
    steps = st.sampled_from([1, 1, 2, 3, -1, -2])
    strides, reach = [0] * len(shape), item
    for axis in data.draw(st.permutations(range(len(shape))), "axes, the densest first"):
        step = data.draw(steps, "step")
        strides[axis] = step * reach
        reach *= abs(step) * max(shape[axis], 1)
    if data.draw(SELDOM, "with any strides"):
        strides = [item * data.draw(st.integers(-4, 6), "stride") for _ in shape]
    elif shape and data.draw(SELDOM, "with an odd stride"):
        odd = st.sampled_from([0, item, -item, item + 1, max(item // 2, 1), 3 * item])
        strides[data.draw(st.integers(0, len(shape) - 1), "axis")] = data.draw(odd, "odd stride")
    ends = [stride * (max(extent, 1) - 1) for stride, extent in zip(strides, shape, strict=True)]
    low, high = sum(min(end, 0) for end in ends), sum(max(end, 0) for end in ends)
    offset = data.draw(st.sampled_from([0, 0, 0, 0, 0, 1, 2, item]), "offset")
    return tuple(strides), offset - low, offset - low + high + item


def draw_array(data: st.DataObject, dtypes: list[Any], shape: tuple[int, ...]) -> tuple[Any, Any]:
    """An array, and the memory that it is a view of."""
    dtype = data.draw(st.sampled_from(dtypes), "dtype")
    if dtype.hasobject:
        array = np.empty(shape, dtype)
        return array, array
    if data.draw(SELDOM, "in the other byte order"):
        dtype = dtype.newbyteorder()
    strides, offset, size = layout(data, shape, dtype.itemsize)
    memory = np.zeros(size + 16, np.uint8)
    # Multiples of 1/8 near 1 in the dtype where they are numbers; other bits stay zero.
    start = (-memory.ctypes.data) % 16
    memory = memory[start : start + size]
    array = np.ndarray(shape, dtype, memory.data, offset, strides)
    kind = "f" if dtype.type is ml_dtypes.bfloat16 else dtype.kind
    if kind in "fc":
        rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), "seed"))
        array[...] = (1 + rng.integers(-8, 8, shape) / 8).astype(array.dtype)
    if data.draw(SELDOM, "read-only"):
        array.flags.writeable = False
    return array, memory


def visits_memory_twice(array: Any) -> bool:
    """Whether two elements have a byte in common, by looking at each."""
    offsets = np.zeros((), np.int64)
    for extent, stride in zip(array.shape, array.strides, strict=True):
        offsets = np.add.outer(offsets, np.arange(extent) * stride)
    return bool(np.any(np.diff(np.sort(offsets, axis=None)) < array.itemsize))


def complaint(array: Any, writes: bool) -> str | None:
    """What the gate must say of an array, from NumPy's own description of it."""
    dtype = array.dtype
    if dtype not in SUPPORTED:
        return "in native byte order" if dtype.byteorder in "<>" else "float32, float64"
    if not array.flags.aligned:
        return "aligned"
    if writes and not array.flags.writeable:
        return "writeable"
    return "without elements that share memory" if writes and visits_memory_twice(array) else None


def refused(array: Any, error: roptim.RoptimError, expected: str | None) -> None:
    assert isinstance(error, (TypeError, ValueError)), error
    assert expected is not None, error
    assert f" must be {expected}" in str(error), (error, array.dtype, array.strides)


SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)
ANY = settings(max_examples=5000 if FULL else 150)


@pytest.mark.parametrize("shape", [(2, 2, 2), (3, 2, 2), (2, 2, 2, 2)])
def test_axes_that_nest_two_by_two_but_not_all_together(shape: tuple[int, ...]) -> None:
    strides = (12, 8, 4) if len(shape) == 3 else (24, 12, 8, 4)
    array = np.lib.stride_tricks.as_strided(np.zeros(40, np.float32), shape, strides)
    assert visits_memory_twice(array)
    with pytest.raises(ValueError, match="without elements that share memory"):
        SGD([array], lr=1.0)
    apart = np.lib.stride_tricks.as_strided(np.zeros(40, np.float32), (2, 2, 2), (16, 8, 4))
    SGD([apart], lr=1.0).step([np.ones((2, 2, 2), np.float32)])
    assert (apart == -1).all()


@ANY
@given(st.data(), SHAPES)
def test_any_array_as_a_parameter(data: st.DataObject, shape: tuple[int, ...]) -> None:
    array, memory = draw_array(data, DTYPES, shape)
    expected, before = complaint(array, writes=True), memory.tobytes()
    try:
        opt = Adam([array], weight_decay=0.1)
    except roptim.RoptimError as error:
        refused(array, error, expected)
        assert memory.tobytes() == before
        return
    assert expected is None, (array.dtype, array.strides)
    plain = np.array(array, order="C")
    twin = Adam([plain], weight_decay=0.1)
    gradient = np.full(shape, 0.75, array.dtype)
    for _ in range(2):
        opt.step([gradient])
        twin.step([gradient])
    assert np.array(array, order="C").tobytes() == plain.tobytes()
    assert fingerprint(opt) == fingerprint(twin)
    # Nothing beside the elements was written.
    array[...] = np.zeros((), array.dtype)
    untouched = np.frombuffer(before, np.uint8).copy()
    np.ndarray(shape, array.dtype, untouched.data, array.ctypes.data - memory.ctypes.data, array.strides)[...] = 0
    assert memory.tobytes() == untouched.tobytes()


@ANY
@given(st.data(), SHAPES, st.booleans())
def test_any_array_as_a_gradient(data: st.DataObject, shape: tuple[int, ...], clears: bool) -> None:
    gradient, memory = draw_array(data, DTYPES, shape)
    # Mostly that of the gradient, so that most examples are about its layout.
    other = data.draw(SELDOM, "another dtype")
    own = np.dtype(data.draw(st.sampled_from(SUPPORTED), "dtype") if other else gradient.dtype.newbyteorder("="))
    own = own if own in SUPPORTED else np.dtype(np.float32)
    parameter = np.full(shape, 0.5, own)
    opt, before, values = Adam([parameter], weight_decay=0.1), memory.tobytes(), np.array(gradient, order="C")
    expected = complaint(gradient, writes=clears)
    is_foreign = gradient.dtype.newbyteorder("=") not in SUPPORTED
    wide = gradient.dtype == np.float32 and own in SUPPORTED[4:]
    if (expected is None and gradient.dtype != own and not wide) or is_foreign:
        expected = str(own)
    try:
        opt.step([gradient], zero_grad=clears)
    except roptim.RoptimError as error:
        refused(gradient, error, expected)
        assert np.all(parameter == np.asarray(0.5, own))
        assert memory.tobytes() == before
        assert opt.state_dict()["state"] == {}
        return
    assert expected is None, (gradient.dtype, gradient.strides)
    plain = np.full(shape, 0.5, own)
    twin = Adam([plain], weight_decay=0.1)
    twin.step([values])
    assert parameter.tobytes() == plain.tobytes()
    assert fingerprint(opt) == fingerprint(twin)
    untouched = np.frombuffer(before, np.uint8).copy()
    if clears:
        at = gradient.ctypes.data - memory.ctypes.data
        np.ndarray(shape, gradient.dtype, untouched.data, at, gradient.strides)[...] = 0
    assert memory.tobytes() == untouched.tobytes()


class Own(np.ndarray):
    """A subclass as users write them."""


class OwnMap(np.memmap):
    """One of what is let in itself."""


@pytest.mark.filterwarnings("ignore:the matrix subclass")
@pytest.mark.parametrize("kind", ["matrix", "MaskedArray", "recarray", "Own", "OwnMap"])
def test_subclasses_are_refused(kind: str, tmp_path: Path) -> None:
    """They may mean something else by their elements (a mask, say), and by what is done with them."""
    a = f32(2, 2)
    made = {
        "matrix": lambda: np.matrix(a),
        "MaskedArray": lambda: np.ma.masked_array(a, mask=a > 0),
        "recarray": lambda: a.view(np.recarray),
        "Own": lambda: a.view(Own),
        "OwnMap": lambda: OwnMap(tmp_path / "x", np.float32, "w+", shape=(2, 2)),
    }[kind]()
    before, opt, p = made.tobytes(), SGD([a]), Parameter(f32(2, 2))
    tell = rf"must be a numpy.ndarray, got an object of type \S*{kind}; convert it with numpy.asarray$"
    for attempt in (
        lambda: SGD([made]),
        lambda: Parameter(made),
        lambda: opt.step([made]),
        lambda: opt.step([made], zero_grad=True),
        lambda: roptim.clip_grad_norm_([made], 1.0),
    ):
        with pytest.raises(roptim.RoptimTypeError, match=tell):
            attempt()
    p.grad = made
    with pytest.raises(roptim.RoptimTypeError, match=tell):
        SGD([p]).step()
    assert made.tobytes() == before
    assert np.all(a == 1)
    assert np.all(p.data == 1)


def test_slices_of_memory_maps_are_arrays(tmp_path: Path) -> None:
    m = np.memmap(tmp_path / "x", np.float32, "w+", shape=(6, 4))
    g = np.memmap(tmp_path / "g", np.float32, "w+", shape=(6, 2))
    g[...] = 1
    SGD([m[:, ::2], m[:, 1::2].T], lr=1.0).step([g[...], f32(2, 6)])
    m.flush()
    assert np.all(np.fromfile(tmp_path / "x", np.float32) == -1)
    assert np.all(g == 1)


# ---- read-only ----------------------------------------------------------------------------------------------


class Interface:
    """An object that says by itself whether its memory may be written to."""

    def __init__(self, array: Any, read_only: bool) -> None:
        given = array.__array_interface__
        self.array = array
        self.__array_interface__ = {**given, "data": (given["data"][0], read_only)}


def flagged(_: Path) -> Any:
    a = f32(3)
    a.flags.writeable = False
    return a


def a_view_of_one(path: Path) -> Any:
    return flagged(path)[::2]


def of_bytes(_: Path) -> Any:
    return np.frombuffer(f32(3).tobytes(), np.float32)


def broadcast(_: Path) -> Any:
    return np.broadcast_to(f32(3), (2, 3))


def mapped(path: Path) -> Any:
    f32(3).tofile(path / "x")
    return np.memmap(path / "x", np.float32, "r")


def loaded_as_a_map(path: Path) -> Any:
    np.save(path / "x.npy", f32(3))
    return np.load(path / "x.npy", mmap_mode="r")


def of_a_read_only_buffer(_: Path) -> Any:
    return np.asarray(memoryview(f32(3)).toreadonly())


def of_an_interface(_: Path) -> Any:
    return np.asarray(Interface(f32(3), read_only=True))


READ_ONLY = [
    flagged,
    a_view_of_one,
    of_bytes,
    broadcast,
    mapped,
    loaded_as_a_map,
    of_a_read_only_buffer,
    of_an_interface,
]


@pytest.mark.parametrize("make", READ_ONLY)
def test_what_is_read_only_from_the_start(make: Callable[[Path], Any], tmp_path: Path) -> None:
    a = make(tmp_path)
    before = a.tobytes()
    for attempt in (lambda: SGD([a]), lambda: SGD({"W": f32(1), "b": a}), lambda: Parameter(a)):
        with pytest.raises(ValueError, match=r"must be writeable, got a read-only array; copy it with .copy\(\)$"):
            attempt()
    opt = SGD([f32(*a.shape)], lr=0.5)
    with pytest.raises(ValueError, match=r"^SGD.step: gradient of parameter 0 must be writeable"):
        opt.step([a], zero_grad=True)
    assert np.all(opt.param_groups[0]["params"][0] == 1)
    opt.step([a])
    assert np.all(opt.param_groups[0]["params"][0] == 0.5)
    assert a.tobytes() == before


def shut(array: Any, shuts: bool) -> None:
    array.flags.writeable = not shuts


def an_array(_: Path) -> tuple[Any, Any]:
    return (a := f32(6)), a


def a_strided_view(_: Path) -> tuple[Any, Any]:
    return (a := f32(6, 3)[::2, ::-1]), a


def a_0d_array(_: Path) -> tuple[Any, Any]:
    return (a := f32()), a


def an_empty_array(_: Path) -> tuple[Any, Any]:
    return (a := f32(0, 3)), a


def a_writeable_map(path: Path) -> tuple[Any, Any]:
    return (a := np.memmap(path / "x", np.float32, "w+", shape=(6,))), a


def a_map_of_a_copy(path: Path) -> tuple[Any, Any]:
    f32(6).tofile(path / "x")
    return (a := np.memmap(path / "x", np.float32, "c")), a


def over_a_bytearray(_: Path) -> tuple[Any, Any]:
    return (a := np.frombuffer(bytearray(24), np.float32)), a


def a_parameters_array(_: Path) -> tuple[Any, Any]:
    p = Parameter(f32(6))
    return p, p.data


CLOSING = [
    *(an_array, a_strided_view, a_0d_array, an_empty_array, a_writeable_map, a_map_of_a_copy, over_a_bytearray),
    a_parameters_array,
]


@pytest.mark.parametrize("make", CLOSING)
def test_what_becomes_read_only_later(make: Callable[[Path], tuple[Any, Any]], tmp_path: Path) -> None:
    given, array = make(tmp_path)
    other = f32(2)
    # In a group added later, so that it is not the first that is looked at.
    opt = Adam([other])
    opt.add_param_group({"params": [given]})
    gradients = [f32(2), f32(*array.shape)]
    opt.step(gradients)
    before, values = fingerprint(opt), [other.tobytes(), array.tobytes()]
    shut(array, True)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^Adam.step: parameter 1 must be writeable, got a read-only array"):
            opt.step(gradients)
        assert fingerprint(opt) == before
        assert [other.tobytes(), array.tobytes()] == values
    shut(array, False)
    opt.step(gradients)
    assert opt.update_count == 2


def test_read_only_by_the_time_of_the_update() -> None:
    """Hooks, closures and values that run Python code may shut an array after the step began."""
    a = f32(3)
    opt = SGD([a], lr=0.5)
    handle = opt.register_step_pre_hook(lambda *_: shut(a, True))
    with pytest.raises(ValueError, match="must be writeable"):
        opt.step([f32(3)])
    handle.remove()
    shut(a, False)
    with pytest.raises(ValueError, match="must be writeable"):
        opt.step(lambda: (shut(a, True), [f32(3)]))
    assert np.all(a == 1)


# ---- shared memory ------------------------------------------------------------------------------------------


def random_view(rng: np.random.Generator, memory: Any) -> Any:
    """A view of up to three axes that visits no memory twice."""
    while True:
        dtype = np.dtype(rng.choice(np.array(SUPPORTED[:4], object)))
        whole = memory.view(dtype)
        shape = rng.integers(1, 6, rng.integers(1, 4))
        strides = rng.integers(-9, 10, len(shape)) * dtype.itemsize
        ends = (shape - 1) * strides
        low, high = int(ends[ends < 0].sum()), int(ends[ends > 0].sum())
        if high - low + dtype.itemsize <= memory.nbytes:
            starts = range(-low, memory.nbytes - high - dtype.itemsize + 1, dtype.itemsize)
            view = np.ndarray(tuple(shape), dtype, whole.data, int(rng.choice(starts)), tuple(strides))
            if not visits_memory_twice(view):
                return view


def overlap_is_told(attempt: Callable[[], object], shared: bool) -> None:
    tells = pytest.raises(ValueError, match="must be memory of its own")
    with tells if shared else contextlib.nullcontext():
        attempt()


def share(views: list[Any]) -> bool:
    return any(np.shares_memory(a, b) for a, b in itertools.combinations(views, 2))


def test_pairs_of_views_against_numpy() -> None:
    """2000 pairs, as parameters, as parameter and gradient, and as gradients that are cleared."""
    rng = np.random.default_rng(0)
    memory = np.zeros(40, np.complex128).view(np.uint8)
    views = [random_view(rng, memory) for _ in range(500)]
    counts = {True: 0, False: 0}
    for first, second in rng.integers(len(views), size=(2000, 2)):
        a, b = views[first], views[second]
        shared = np.shares_memory(a, b)
        counts[shared] += 1
        overlap_is_told(lambda a=a, b=b: SGD([a, b], lr=0.0), shared)  # type: ignore[misc]  # bound in this turn
        of_a = np.zeros(a.shape, a.dtype)
        opt = SGD([of_a, np.zeros(b.shape, b.dtype)], lr=0.0)
        overlap_is_told(lambda opt=opt, a=a, b=b: opt.step([a, b], zero_grad=True), shared)  # type: ignore[misc]
        opt = SGD([b, np.zeros(a.shape, a.dtype)], lr=0.0)
        overlap_is_told(lambda opt=opt, a=a: opt.step([None, a]), shared)  # type: ignore[misc]
        overlap_is_told(lambda a=a, b=b: roptim.clip_grad_value_([a, b], 1.0), shared)  # type: ignore[misc]
    assert min(counts.values()) > 400, counts


def best(call: Callable[[], object], rounds: int = 2) -> float:
    """Seconds of this thread on a processor, whatever else is on it."""

    def once() -> float:
        start = time.thread_time()
        call()
        return time.thread_time() - start

    return min(once() for _ in range(rounds))


def test_overlap_does_not_take_the_square_of_the_number() -> None:
    """A ratio within one run: with a sorted insert of each it would be twenty."""
    base = np.zeros((60_000, 4), np.float32)
    rows = list(base)
    backwards = rows[::-1]
    assert best(lambda: SGD(backwards)) < 6 * best(lambda: SGD(rows))


INTERLEAVED: dict[str, Callable[[int], list[Any]]] = {
    "columns": lambda n: list(np.zeros((2, n), np.float32).T),
    "parts of columns": lambda n: list(np.zeros((2, n, 8), np.float32)[:, :, ::2].swapaxes(0, 1)),
    "matrices of each width": lambda n: [np.zeros((2, 2 + i % 500), np.float32)[:, :1] for i in range(n)],
    "columns with gaps beside columns without": lambda n: (lambda x: [*x[:, : n // 2].T, *x[::2, n // 2 :].T])(
        np.zeros((4, n), np.float32)
    ),
}


@pytest.mark.parametrize("kind", INTERLEAVED)
def test_interleaved_views_do_not_take_the_square_of_the_number(kind: str) -> None:
    """A ratio within one run: ten times as many would take a hundred times as long pair by pair."""
    many, few = ([INTERLEAVED[kind](n) for _ in range(2)] for n in (20_000, 2000))

    def work(arrays: list[Any], gradients: list[Any]) -> Callable[[], object]:
        return lambda: SGD(arrays, lr=0.0).step(gradients, zero_grad=True)

    assert best(work(*many)) < 30 * best(work(*few))


@given(st.data())
@settings(max_examples=1000 if FULL else 150)
def test_sets_of_views_against_numpy(data: st.DataObject) -> None:
    """Tiles with gaps of matrices in one memory, at odd distances from its start, and whole pieces between."""
    memory = np.zeros(2000, np.float32)
    views: list[Any] = []
    for _ in range(data.draw(st.integers(2, 12), "views")):
        width = data.draw(st.sampled_from([7, 12, 12, 12, 24, 30]), "width")
        start = data.draw(st.integers(0, 40), "start")
        rows = memory[start : start + 20 * width].reshape(20, width)
        first, step = data.draw(st.integers(0, 15), "first row"), data.draw(st.sampled_from([1, 1, 2, 3, -1]), "step")
        column, columns = data.draw(st.integers(0, width - 1), "column"), data.draw(st.integers(1, 5), "columns")
        view = rows[first::step][: data.draw(st.integers(1, 6), "rows"), column : column + columns]
        if data.draw(SELDOM, "even if shared") or not any(np.shares_memory(view, other) for other in views):
            views.append(view)
    shared = share(views)
    event(f"shared: {shared}")
    overlap_is_told(lambda: SGD(views, lr=0.0), shared)
    overlap_is_told(lambda: roptim.clip_grad_value_(views, 1.0), shared)
    opt = SGD([np.zeros(view.shape, np.float32) for view in views], lr=0.0)
    overlap_is_told(lambda: opt.step(views, zero_grad=True), shared)
    *others, last = views
    if not share(others):
        opt = SGD([*others, np.zeros(last.shape, np.float32)], lr=0.0)
        overlap_is_told(lambda: opt.step([None] * len(others) + [last]), share(views))


def test_columns_and_blocks_of_one_matrix() -> None:
    """Their byte ranges all meet, none shares memory; one more that does is found."""
    x = np.zeros((8, 400), np.float32)
    parts = [*x.T[:100], *(x[::-1, i : i + 3] for i in range(100, 250, 3)), x[:4, 250:], x[4:, 250:]]
    SGD(parts, lr=1.0).step([f32(*part.shape) for part in parts])
    assert np.all(x == -1)
    for more in (x[3:4, 120:121], x[::7, 99], x[5:, 398:], x[2]):
        with pytest.raises(ValueError, match=f"parameter {len(parts)} must be memory of its own"):
            SGD([*parts, more])


# ---- arrays that change in other threads --------------------------------------------------------------------

#: With more elements than this a step gives up the interpreter lock, so that other threads run within it.
LARGE, SMALL = 300_000, 1000
STEPS = 2000 if FULL else 300


@contextlib.contextmanager
def beside(work: Callable[[], object]) -> Iterator[None]:
    """Does the work again and again in another thread meanwhile; what it raises is raised at the end."""
    ends, errors = threading.Event(), []

    def loop() -> None:
        try:
            while not ends.is_set():
                work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=loop)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    thread.start()
    try:
        yield
    finally:
        ends.set()
        thread.join()
        sys.setswitchinterval(interval)
    if errors:
        raise errors[0]


def test_resizing_is_refused_while_arrays_are_held() -> None:
    """NumPy resizes nothing that somebody else holds, and the optimizer holds its parameters."""
    a, refusals = f32(LARGE), []
    opt = Adam([a])

    def resize() -> None:
        for n in (LARGE // 2, 2 * LARGE):
            with pytest.raises(ValueError, match="resize"):
                a.resize(n)
            refusals.append(n)
        time.sleep(0)

    gradient = f32(LARGE)
    with beside(resize):
        for _ in range(STEPS):
            opt.step([gradient])
    assert refusals
    assert opt.update_count == STEPS


@pytest.mark.parametrize("size", [LARGE, SMALL])
def test_gradients_are_exchanged_and_deleted_during_steps(size: int) -> None:
    p, plain = Parameter(f32(size)), f32(size)
    given = {"p": f32(size), "plain": f32(size)}
    opt = SGD({"p": p, "plain": plain}, lr=1e-9)

    def exchange() -> None:
        p.grad = f32(size)
        given["plain"] = f32(size, value=2.0)
        p.grad = None
        given["p"] = None  # type: ignore[assignment]
        given["plain"] = np.asfortranarray(f32(size))
        given["p"] = f32(size)

    with beside(exchange):
        for _ in range(STEPS):
            opt.step(given)
            opt.step({"p": p.grad, "plain": None})
    assert np.isfinite(p.data).all()


def test_resizing_without_a_check_between_steps() -> None:
    """Short steps keep the interpreter lock: whoever resizes in spite of all comes before one or after it."""
    a, g = f32(SMALL), f32(SMALL)
    opt = SGD([a], lr=1e-9)
    sizes = itertools.cycle([SMALL // 2, SMALL, 3 * SMALL, SMALL])
    stepped, refusals = 0, set()

    def resize() -> None:
        size = next(sizes)
        a.resize(size, refcheck=False)
        time.sleep(0)
        g.resize(size, refcheck=False)
        time.sleep(0)

    with beside(resize):
        for _ in range(5 * STEPS):
            try:
                opt.step([g])
                stepped += 1
            except ValueError as error:
                refusals.add(str(error).partition(", got")[0].replace(" as registered", ""))
    assert opt.update_count == stepped
    assert refusals <= {
        f"SGD.step: {what} must be of shape (1000,)" for what in ("parameter 0", "gradient of parameter 0")
    }


def test_an_array_is_written_to_during_steps() -> None:
    """Its values may mix, as with any operation that runs without the interpreter lock; nothing else happens."""
    a, g, rest = f32(LARGE, value=0.0), f32(LARGE), f32(LARGE, value=0.0)
    opt = SGD([a, rest], lr=1.0)
    values = itertools.cycle([-4.0, 4.0])

    def write() -> None:
        a[...] = next(values)

    with beside(write):
        for _ in range(STEPS):
            opt.step([g, g])
    assert np.all(np.abs(a) <= STEPS + 4)
    assert np.all(rest == -STEPS)


def test_names_are_deleted_during_steps() -> None:
    """The optimizer holds what it steps; a gradient is held for the time of its step."""
    holder: dict[str, Any] = {"a": f32(LARGE)}
    opt = SGD([holder["a"]], lr=1.0)

    def drop() -> None:
        holder.pop("a", None)
        holder.pop("g", None)

    with beside(drop):
        for _ in range(STEPS):
            holder["g"] = f32(LARGE)
            with contextlib.suppress(KeyError):
                opt.step([holder["g"]])
    assert np.all(opt.param_groups[0]["params"][0] == 1.0 - opt.update_count)


# ---- under valgrind -----------------------------------------------------------------------------------------


STRESS = Path(__file__).with_name("gate_stress.py")
#: Another thread changes arrays in these tests.
CHANGES = "are_held or during_steps or between_steps"


@pytest.mark.skipif(not FULL or shutil.which("valgrind") is None, reason="takes minutes, and needs valgrind")
@pytest.mark.parametrize(
    "what",
    [
        pytest.param([STRESS], id="beside arrays"),
        pytest.param(["-m", "pytest", "-p", "no:cacheprovider", "-k", CHANGES, __file__], id="of other threads"),
    ],
)
def test_no_byte_is_touched_that_is_not_the_arrays(what: list[str]) -> None:
    """Valgrind sees each access: one beside an allocation is an error, one to memory that is gone as well."""
    # Whether values are initialized is not asked: CPython's own optimized code answers falsely.
    options = ["--error-exitcode=77", "--leak-check=no", "--undef-value-errors=no"]
    options.append(f"--suppressions={STRESS.with_suffix('.supp')}")
    # Python's own allocator hands out parts of larger blocks, at whose ends valgrind sees nothing.
    environment = {**os.environ, "PYTHONMALLOC": "malloc", "OPENBLAS_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = ["valgrind", *options, sys.executable, *what]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1800, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert re.search(r"\d steps|\b6 passed", done.stdout), done.stdout
