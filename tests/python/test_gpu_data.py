"""Where numbers live: arrays on the device, sums of gradients, Parameters, and the way there and back."""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from helpers import LAYOUTS, laid_out
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
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
    is_software,
    needs_software,
    same,
    tolerance,
)

import roptim
from roptim import SGD, Adam, NonfiniteError, Parameter, clip_grad_norm_
from roptim.lr_finder import LRFinder
from roptim.optimizer import REGISTRY
from roptim.swa_utils import AveragedModel
from roptim.utils import clip_grad_value_, clip_grads_with_norm_, get_total_norm

pytestmark = pytest.mark.usefixtures("gpu")

#: Elements from which an array on the device is bound directly.
BOUND = 1 << 16


def on_device(x: Any) -> Any:
    return roptim.gpu.array(x, allow_software=True)


# ---- arrays on the device -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0, 2), (63,), (64,), (65,), (7, 3, 5), (BOUND + 1,)], ids=str)
def test_what_goes_there_comes_back(dtype: Any, shape: tuple[int, ...]) -> None:
    x = draw(np.random.default_rng(0), shape, dtype)
    for layout in LAYOUTS:
        laid = laid_out(x, layout)
        laid.flags.writeable = False
        a = on_device(laid)
        assert (a.shape, a.dtype, a.ndim, a.size, a.nbytes) == (x.shape, x.dtype, x.ndim, x.size, x.nbytes)
        for back in (a.numpy(), np.asarray(a), np.array(a)):
            assert (back.dtype, back.shape, back.tobytes()) == (x.dtype, x.shape, x.tobytes())
            assert back.flags.writeable
            back[...] = 0
        assert a.numpy().tobytes() == x.tobytes(), "a copy"
    other = draw(np.random.default_rng(1), shape, dtype)
    a[...] = laid_out(other, "with gaps")
    assert a.numpy().tobytes() == other.tobytes()


def test_special_numbers_travel() -> None:
    x = np.array([0.0, -0.0, 1e-45, math.inf, -math.inf, math.nan], np.float32)
    x = np.concatenate([x, np.array([0x7FA00001, 0xFFC12345], np.uint32).view(np.float32)])
    for n in (1, BOUND):
        assert on_device(np.tile(x, n)).numpy().tobytes() == np.tile(x, n).tobytes()


def test_forms_and_refusals() -> None:
    a = on_device(np.arange(6, dtype=np.float32).reshape(2, 3))
    assert len(a) == 2
    assert np.asarray(a, np.float64).dtype == np.float64
    assert np.add(a, 1).tolist() == [[1, 2, 3], [4, 5, 6]]
    assert "(2, 3)" in repr(a)
    assert "float32" in repr(a)
    for wrong in (f32(3, 2), f32(6), f32(), np.ones((2, 3)), np.ones((2, 3), np.float16), 3.0, [[1.0] * 3] * 2, None):
        with pytest.raises(roptim.RoptimError):
            a[...] = wrong
    with pytest.raises(ValueError, match=r"index must be \.\.\."):
        a[0] = f32(3)
    with pytest.raises(ValueError, match="copy"):
        np.asarray(a, copy=False)
    assert a.numpy().tolist() == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(TypeError, match="len"):
        len(on_device(f32()))
    for wrong in (
        np.ones(2),
        np.ones(2, np.complex128),
        np.arange(3),
        np.array(["a"]),
        [1.0],
        "x",
        None,
        f32(2).astype(">f4"),
    ):
        with pytest.raises(roptim.RoptimError, match=r"^roptim\.gpu\.array: d"):
            on_device(wrong)
    for device in ("cpu", "auto", roptim.devices()[0], "tpu", ""):
        with pytest.raises(roptim.RoptimError, match=r"roptim\.gpu\.array: device"):
            roptim.gpu.array(f32(2), device, allow_software=True)
    for device in (0, None, b"gpu"):
        with pytest.raises(TypeError):
            roptim.gpu.array(f32(2), device, allow_software=True)
    with pytest.raises(roptim.NoAdapterError):
        roptim.gpu.array(f32(2), "gpu:no-such-device", allow_software=True)
    for device in (roptim.devices()[1], "gpu:0", f"gpu:{roptim.devices()[1].name[:4].upper()}"):
        assert roptim.gpu.array(f32(2), device, allow_software=True).numpy().tolist() == [1, 1]
    with pytest.raises(ValueError, match="numpy"):
        __import__("pickle").dumps(a)


SIZES = [(5,), (), (0,), (300, 7), (BOUND - 1,), (BOUND,), (3, BOUND)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_there_are_gradients_here(dtype: Any, kind: str) -> None:
    """Small and large ones, among others from the host, with every option, made anew or written again."""
    rng = np.random.default_rng(2)
    start = [draw(rng, shape, dtype) for shape in SIZES]
    for options in ({}, {"clip_norm": 0.5, "clip_value": 2.0, "nonfinite": "skip"}):
        cpu, gpu = given(start, kind), given(start, kind)
        one, two = (Adam(p, lr=0.1, weight_decay=0.1, **options, **b) for p, b in ((cpu, {}), (gpu, ON_GPU)))
        kept: dict[int, Any] = {}
        for at in range(4):
            g = [None if (i + at) % 5 == 4 else draw(rng, s, dtype) for i, s in enumerate(SIZES)]
            if at == 2 and g[5] is not None:
                g[5][77] = math.nan
            there: list[Any] = list(g)
            for i, x in enumerate(g):
                if x is None or (i + at) % 3 == 0:
                    continue
                if i in kept and at % 2:
                    kept[i][...] = x
                else:
                    kept[i] = on_device(x)
                there[i] = kept[i]
            one.step(g)
            two.step(there)
            assert same(everything(one, cpu), everything(two, gpu))
            assert all(same(a.numpy(), x) for a, x in zip(there, g, strict=True) if isinstance(a, roptim.gpu.Array))


def test_an_array_written_after_a_step_does_not_change_it() -> None:
    p = Parameter(f32(2 * BOUND))
    small = Parameter(f32(4))
    opt = SGD([p, small], lr=1.0, **ON_GPU)
    a, b = on_device(f32(2 * BOUND)), on_device(f32(4))
    for at in range(5):
        a[...] = f32(2 * BOUND, value=at)
        b[...] = f32(4, value=at)
        opt.step([a, b])
    assert (p.data == 1 - 10).all()
    assert (small.data == 1 - 10).all()


@pytest.mark.parametrize("size", [3, BOUND + 3])
def test_where_device_arrays_are_taken(size: int) -> None:
    g = on_device(f32(size))
    p, q = f32(size), f32(size)
    SGD(p, lr=1.0, **ON_GPU).step(g)
    assert not p.any()
    p[...] = 1
    SGD({"a": p}, lr=1.0, **ON_GPU).step({"a": g})
    assert not p.any()
    p[...] = 1
    SGD([{"params": p}, {"params": q, "lr": 0.5}], lr=1.0, **ON_GPU).step([g, g])
    assert not p.any()
    assert (q == 0.5).all()
    assert SGD([p], lr=1.0, **ON_GPU).step(lambda: (2.0, [g])) == 2.0
    assert (p == -1).all()
    w = Parameter(f32(size))
    w.grad = g
    opt = SGD([w], lr=1.0, **ON_GPU)
    opt.step()
    assert w.grad is g
    assert not w.data.any()
    w.requires_grad = False
    opt.step()
    assert not w.data.any()
    opt.zero_grad()
    assert w.grad is None
    w.grad = g
    w.grad += f32(size)
    assert np.all(np.asarray(w.grad) == 2)
    # By value, on the CPU.
    for opt in (SGD([p], lr=1.0), Adam([p]), roptim.LBFGS([p]), roptim.Adafactor([p])):
        before = p.copy()
        step = [g] if REGISTRY[type(opt).__name__]["needs_closure"] is False else lambda: (1.0, [g])
        opt.step(step)
        assert not np.array_equal(p, before)
    assert (g.numpy() == 1).all()


@pytest.mark.parametrize("backend", [{}, ON_GPU], ids=["cpu", "gpu"])
@pytest.mark.parametrize("call", ["step", "accumulate"])
def test_wrong_device_arrays_are_refused_by_name(backend: dict[str, Any], call: str) -> None:
    for wrong, message in (
        (f32(4), r"of shape \(3,\), got \(4,\)"),
        (f32(3, 1), r"of shape \(3,\), got \(3, 1\)"),
        (f32(3).astype(np.float16), "float32, got float16"),
        (f32(3).astype(np.complex64), "float32, got complex64"),
    ):
        for p in ({"w": f32(2), "v": f32(3)}, [Parameter(f32(2), name="w"), Parameter(f32(3), name="v")]):
            opt = SGD(p, lr=1.0, **backend)
            g = [f32(2), on_device(wrong)]
            with pytest.raises(roptim.RoptimError, match=rf'SGD\.{call}: gradient of parameter "v" must be {message}'):
                getattr(opt, call)(dict(zip("wv", g, strict=True)) if isinstance(p, dict) else g)
            assert opt.update_count == 0
            assert all((np.asarray(x) == 1).all() for x in (p.values() if isinstance(p, dict) else p))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("max_norm", [0.0, 0.5, 1e3, math.inf])
def test_clipping_on_the_device(dtype: Any, max_norm: float) -> None:
    rng = np.random.default_rng(4)
    host = [draw(rng, shape, dtype) for shape in SIZES]
    there, owners = [on_device(g) for g in host], [Parameter(np.zeros_like(g)) for g in host]
    for p, g in zip(owners, host, strict=True):
        p.grad = on_device(g)
    with np.errstate(all="ignore"):
        want = clip_grad_norm_(host, max_norm)
    totals = [get_total_norm(there), get_total_norm(owners)]
    got = [clip_grad_norm_(there, max_norm), clip_grad_norm_(iter(owners), max_norm), *totals]
    assert all(float(norm) == pytest.approx(want, rel=1e-13) for norm in got)
    assert same([a.numpy() for a in there], host)
    assert same([p.grad.numpy() for p in owners], host)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_clipping_what_is_not_finite(bad: float) -> None:
    for error, bound in ((False, 1.0), (True, 1.0), (False, math.inf)):
        host = [f32(5), f32(BOUND + 1)]
        host[1][BOUND] = bad
        there = [on_device(g) for g in host]
        if error:
            for call in (
                lambda x: clip_grad_norm_(x, 1.0, error_if_nonfinite=True),
                lambda x: get_total_norm(x, 2, True),
            ):
                with pytest.raises(NonfiniteError, match="norm of the gradients must be finite"):
                    call(there)
        else:
            want, got = clip_grad_norm_(host, bound), clip_grad_norm_(there, bound)
            assert np.array_equal(want, float(got), equal_nan=True)
        assert same([a.numpy() for a in there], host)


def test_a_norm_is_a_number() -> None:
    a = on_device(f32(4))
    norm = clip_grad_norm_(a, 1.0)
    assert isinstance(float(norm), float)
    assert norm.item() == norm == 2.0 == norm
    assert 1 < norm <= 2 <= norm < 2.5 < 3
    assert norm != 3
    assert f"{norm:.3f} {norm} {norm!r}" == "2.000 2.0 2.0"
    assert "%.1f" % norm == "2.0"  # noqa: UP031
    assert math.sqrt(norm) == math.sqrt(2)
    assert np.asarray(norm) == 2.0
    assert max(norm, 1.0) == min(norm, 3) == sum([norm]) == 2
    assert (norm + 1, 1 + norm, 2 * norm, norm * 2, norm / 4) == (3, 3, 4, 4, 0.5)
    assert bool(norm)
    assert norm in {2.0}
    a[...] = f32(4, value=100.0)
    assert norm == 2.0


@pytest.mark.parametrize(
    "use",
    [
        lambda x: x - 1,
        lambda x: 1 - x,
        lambda x: 1 / x,
        lambda x: -x,
        lambda x: x**2,
        abs,
        int,
        round,
        lambda x: round(x, 2),
    ],
    ids=["minus", "from", "over", "negative", "squared", "abs", "int", "round", "round to"],
)
def test_arithmetic_with_a_norm_is_a_floats(use: Callable[[Any], Any]) -> None:
    assert use(clip_grad_norm_([on_device(f32(4))], 1.0)) == use(2.0)


def test_refusals_of_clipping() -> None:
    a, b = on_device(f32(4)), on_device(f32(4))
    p = Parameter(f32(4))
    p.grad = b
    before = a.numpy()
    for gradients in ([a, f32(4)], [f32(4), p], {"a": a, "b": f32(4)}):
        for call in (lambda g: clip_grad_norm_(g, 0.1), get_total_norm):
            with pytest.raises(ValueError, match="all on a device or all on the host, got both"):
                call(gradients)
    for norm_type in (1, math.inf, 0, 3.0):
        with pytest.raises(ValueError, match="must be 2"):
            clip_grad_norm_([a, b], 0.1, norm_type)
    with pytest.raises(ValueError, match="memory of its own, got gradient 0 again"):
        clip_grad_norm_([b, p], 0.1)
    with pytest.raises(roptim.RoptimError, match="clip_value"):
        clip_grad_value_([a], 0.1)
    with pytest.raises(roptim.RoptimError):
        clip_grads_with_norm_([a], 0.1, 2.0)
    with pytest.raises(ValueError, match="max_norm"):
        clip_grad_norm_([a], -1.0)
    assert same(a.numpy(), before)
    assert same(b.numpy(), before)
    assert float(clip_grad_norm_([on_device(f32(0))], 1.0)) == 0.0


# ---- sums of gradients --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 2, 7])
def test_accumulated_gradients_are_their_sum(dtype: Any, kind: str, count: int) -> None:
    rng = np.random.default_rng(5)
    start = [draw(rng, shape, dtype) for shape in SIZES[:6]]
    wide = np.float32 if np.dtype(dtype).itemsize == 2 else dtype
    options = {"lr": 0.1, "clip_norm": 1.0, "nonfinite": "skip"}
    params = [given(start, kind) for _ in range(4)]
    cpu, gpu, there, plain = (Adam(p, **options, **b) for p, b in zip(params, ({}, ON_GPU, ON_GPU, {}), strict=True))
    for at in range(3):
        sums: list[Any] = [None] * len(start)
        for batch in range(count):
            # In step 1 parameter 1 has no gradient; others miss some.
            missing = {1} if at == 1 else {batch % len(start)} if count > 1 else set()
            g = [None if i in missing else draw(rng, a.shape, dtype) for i, a in enumerate(start)]
            sums = [
                s if x is None else x.astype(wide) if s is None else s + x.astype(wide)
                for s, x in zip(sums, g, strict=True)
            ]
            cpu.accumulate(g)
            gpu.accumulate(g)
            there.accumulate([x if x is None or i % 2 else on_device(x) for i, x in enumerate(g)])
        for opt in (cpu, gpu, there):
            opt.step()
        plain.step(sums)
        want = everything(plain, params[3])
        for opt, p in zip((cpu, gpu, there), params, strict=False):
            assert same(everything(opt, p), want)
            assert not opt._engine.has_sums


EDGES = [0.0, -0.0, 1e-45, -1e-45, 1e-40, 1.1754944e-38, -1e-38, 6e-8, 1.0, -1.0, 6e4, -1e19, 1e38, 3.4028235e38]
NUMBERS = st.one_of(st.sampled_from([*EDGES, math.inf, math.nan]), st.floats(width=32))


@settings(max_examples=5000 if FULL else 100)
@drawn(
    st.lists(st.one_of(st.none(), st.lists(NUMBERS, min_size=5, max_size=5)), min_size=1, max_size=6),
    st.sampled_from(DTYPES),
    st.sampled_from(["arrays", "Parameters"]),
    st.integers(0, 63),
)
def test_sums_of_hostile_numbers(batches: list[Any], dtype: Any, kind: str, there: int) -> None:
    needs_software()
    start = [np.zeros(5, dtype), np.zeros(2, dtype)]
    cpu, gpu = given(start, kind), given(start, kind)
    one, two = (SGD(p, lr=1.0, momentum=0.5, maximize=True, **b) for p, b in ((cpu, {}), (gpu, ON_GPU)))
    with np.errstate(all="ignore"):
        gradients = [None if batch is None else np.array(batch, np.float32).astype(dtype) for batch in batches]
    for _ in range(2):
        for i, g in enumerate(gradients):
            one.accumulate([g, None])
            two.accumulate([on_device(g) if g is not None and there >> i & 1 else g, None])
        if any(g is not None for g in gradients):
            one.step()
            two.step()
        assert same(everything(one, cpu), everything(two, gpu))


@pytest.fixture(params=["cpu", "gpu"])
def side(request: pytest.FixtureRequest) -> dict[str, Any]:
    return ON_GPU if request.param == "gpu" else {}


def test_signs_of_zero_and_single_sums(side: dict[str, Any]) -> None:
    p = np.array([-0.0, 0.0, 1.0], np.float32)
    opt = SGD([p], lr=1.0, maximize=True, **side)
    opt.accumulate([np.array([-0.0, -0.0, -1.0], np.float32)])
    opt.step()
    assert np.signbit(p).tolist() == [True, False, False]


def test_sums_begin_anew(side: dict[str, Any]) -> None:
    p = Parameter(f32(3), name="w")
    opt = SGD([p], lr=1.0, **side)
    opt.accumulate([f32(3)])
    opt.zero_grad()
    p.grad = f32(3, value=10.0)
    opt.step()
    assert (p.data == -9).all(), "forgotten"
    opt.accumulate()
    opt.accumulate([f32(3)])
    opt.step()
    assert (p.data == -20).all(), "the gradient of p and the other"
    opt.step()
    assert (p.data == -30).all(), "p.grad again"
    opt.accumulate([None])
    opt.step()
    assert (p.data == -40).all(), "nothing was added"
    p.requires_grad = False
    opt.accumulate()
    assert not opt._engine.has_sums
    assert opt.update_count == 4


def test_sums_and_other_gradients(side: dict[str, Any]) -> None:
    """Gradients that are given are the step's; the sums are still there for the next."""
    p = f32(3)
    opt = SGD([p], lr=1.0, **side)
    opt.accumulate([f32(3)])
    opt.step([f32(3, value=2.0)])
    assert (p == -1).all()
    assert opt._engine.has_sums
    opt.step()
    assert (p == -2).all()


def test_a_load_forgets_the_sums(side: dict[str, Any]) -> None:
    p = f32(3)
    opt = SGD([p], lr=1.0, **side)
    saved = opt.state_dict()
    opt.accumulate([f32(3)])
    opt.load_state_dict(saved)
    assert not opt._engine.has_sums
    opt.accumulate([f32(3, value=2.0)])
    opt.step()
    assert (p == -1).all()


def test_a_refused_gradient_leaves_the_sums(side: dict[str, Any]) -> None:
    p = [f32(3), f32(2)]
    opt = SGD(p, lr=1.0, **side)
    opt.accumulate([f32(3), None])
    for wrong in ([f32(3), f32(3)], [f32(3)], [np.ones(3), f32(2)], [f32(3), on_device(f32(3))], [p[0], f32(2)], 3):
        with pytest.raises(roptim.RoptimError):
            opt.accumulate(wrong)
    with pytest.raises(TypeError, match="accumulate"):
        opt.accumulate()
    opt.step()
    assert (p[0] == 0).all()
    assert (p[1] == 1).all()


def test_what_is_not_finite_in_sums(side: dict[str, Any]) -> None:
    for how in ("skip", "raise"):
        for kind in KINDS:
            p = given([f32(3), f32(2)], kind, names=True)
            opt = SGD(p, lr=1.0, nonfinite=how, nonfinite_sync=True, **side)
            opt.accumulate([f32(3), f32(2, value=3e38)])
            opt.accumulate([f32(3), f32(2, value=3e38)])
            if how == "skip":
                opt.step()
            else:
                with pytest.raises(
                    NonfiniteError, match=r"parameter .*1.* must be finite, got (inf at|an infinite number)"
                ):
                    opt.step()
            assert (np.asarray(p[0]) == 1).all()
            assert (opt.update_count, opt.skip_count) == (0, int(how == "skip"))
            assert not opt._engine.has_sums
            opt.accumulate([f32(3), None])
            opt.step()
            assert (np.asarray(p[0]) == 0).all()


def test_sums_outlast_what_does_not_step(side: dict[str, Any]) -> None:
    p, q = Parameter(f32(3)), f32(2)
    opt = Adam([p], lr=0.5, nonfinite="skip", **side)
    plain_p = f32(3)
    plain = Adam([plain_p], lr=0.5)
    opt.step([f32(3)])
    plain.step([f32(3)])
    opt.accumulate([f32(3)])
    with pytest.warns(UserWarning, match="not part of it"):
        opt.state_dict()
    opt.sync()
    p[...] = 2.0
    plain_p[...] = 2.0
    opt.param_groups[0]["lr"] = 0.25
    plain.param_groups[0]["lr"] = 0.25
    opt.add_param_group({"params": [q]})
    with pytest.raises(ValueError, match="sums of gradients must be none, got accumulated ones"):
        opt.to("cpu")
    opt.accumulate([f32(3), f32(2)])
    opt.step()
    plain.step([f32(3, value=2.0)])
    assert same(np.array(p), plain_p)
    assert (q != 1).all()


def test_a_bad_step_is_reported_before_anything_is_added() -> None:
    """So that a loop which goes on after the error adds nothing twice."""
    p = Parameter(f32(3), name="w")
    opt = SGD([p], lr=1.0, nonfinite="raise", **ON_GPU)
    opt.accumulate([f32(3, value=math.nan)])
    opt.step()
    with pytest.raises(NonfiniteError, match='"w"'):
        opt.accumulate([f32(3)])
    opt.accumulate([f32(3)])
    opt.accumulate([f32(3)])
    opt.step()
    assert (p.data == -1).all()
    assert (opt.update_count, opt._engine.has_sums) == (1, False)


def test_many_sums_take_no_more_memory() -> None:
    p = Parameter(f32(BOUND + 5))
    opt = SGD([p], lr=1.0, **ON_GPU)
    g = on_device(f32(BOUND + 5))
    opt.accumulate([g])
    size = opt._engine.device_bytes
    for _ in range(199):
        opt.accumulate([g])
    opt.step()
    assert opt._engine.device_bytes == size
    assert (p.data == -199).all()


# ---- where the truth lives ----------------------------------------------------------------------------------


class Truth(RuleBasedStateMachine):
    """Parameters on the GPU and their twins on the CPU, read and written in every way between steps."""

    @initialize(dtype=st.sampled_from([np.float32, np.float16]), options=st.sampled_from([{}, {"nonfinite": "skip"}]))
    def begin(self, dtype: Any, options: Any) -> None:
        self.rng = np.random.default_rng(0)
        self.cpu = [Parameter(draw(self.rng, (4, 3), dtype)), Parameter(draw(self.rng, (5,), dtype))]
        self.gpu = [Parameter(np.array(p.data)) for p in self.cpu]
        self.opts = [SGD(p, lr=0.5, momentum=0.5, **options, **b) for p, b in ((self.cpu, {}), (self.gpu, ON_GPU))]
        self.others = [SGD([p[0]], lr=0.25, **b) for p, b in ((self.cpu, {}), (self.gpu, ON_GPU))]

    def both(self, i: int, act: Callable[[Any], Any]) -> None:
        results = [act(p[i]) for p in (self.cpu, self.gpu)]
        if isinstance(results[0], (np.ndarray, np.generic, float, bool)):
            assert same(np.asarray(results[0]), np.asarray(results[1]))

    @rule(which=st.integers(0, 2))
    def step(self, which: int) -> None:
        g = [None if which == i else draw(self.rng, p.shape, p.dtype) for i, p in enumerate(self.cpu)]
        for opt in self.opts:
            opt.step(g)

    @rule()
    def bad_step(self) -> None:
        if self.opts[0]._options["nonfinite"] == "skip":
            for opt in self.opts:
                opt.step([None, np.full(5, math.nan, self.cpu[1].dtype)])

    @rule()
    def step_of_another(self) -> None:
        g = draw(self.rng, (4, 3), self.cpu[0].dtype)
        for opt in self.others:
            opt.step([g])

    @rule()
    def accumulate(self) -> None:
        g = [draw(self.rng, p.shape, p.dtype) for p in self.cpu]
        for opt in self.opts:
            opt.accumulate(g)
            opt.accumulate(g)
            opt.step()

    @rule(
        i=st.integers(0, 1),
        how=st.sampled_from(
            [
                "data",
                "all",
                "number",
                "part",
                "item",
                "mask",
                "host",
                "host part",
                "out",
                "out of two",
                "where",
                "inplace",
                "itself",
                "reversed",
                "refused",
                "swap",
            ]
        ),
    )
    def write(self, i: int, how: str) -> None:
        x = draw(self.rng, self.cpu[i].shape, self.cpu[i].dtype)

        def act(p: Any) -> None:
            if how == "data":
                p.data = x
            elif how == "all":
                p[...] = x
            elif how == "number":
                p.data = 0.25
            elif how == "part":
                p[1:3] = x[1:3]
            elif how == "item":
                p[-1] = 7.0
            elif how == "mask":
                p[p.data > 0] = -1.0
            elif how == "host":
                with p.host() as a:
                    a += 1
            elif how == "host part":
                with contextlib.suppress(KeyError), p.host() as a:
                    a[0] = 3.0
                    raise KeyError
            elif how == "out":
                np.add(p, x, out=p)
            elif how == "out of two":
                np.divmod(x, p.dtype.type(2), out=(p, np.empty_like(x)))
            elif how == "where":
                np.multiply(x, x, out=p, where=x > 0)
            elif how == "inplace":
                p *= 0.5
                p -= x
                p += p
            elif how == "itself":
                p.data = p
            elif how == "reversed":
                p.data = p.data[::-1]
            elif how == "refused":
                for wrong in (np.ones(77, p.dtype), np.array(["a"]), np.complex64(1j)):
                    with pytest.raises(roptim.RoptimError):
                        p.data = wrong
                with pytest.raises(IndexError):
                    p[99] = 1.0
                with pytest.raises((ValueError, TypeError)):
                    np.add(p, np.ones(77), out=p)
            else:
                p[0], p[1] = p[1].copy(), p[0].copy()

        self.both(i, act)

    @rule(
        i=st.integers(0, 1),
        how=st.sampled_from(
            ["data", "asarray", "array", "item", "part", "sum", "ufunc", "iter", "repr", "T", "sync", "copy"]
        ),
    )
    def read(self, i: int, how: str) -> None:
        if how == "sync":
            self.opts[1].sync()
        elif how == "repr":
            assert repr(self.cpu[i]) == repr(self.gpu[i])
        else:
            reads: dict[str, Callable[[Any], Any]] = {
                "data": lambda p: p.data,
                "asarray": np.asarray,
                "array": np.array,
                "item": lambda p: p[1],
                "part": lambda p: p[1:],
                "sum": np.sum,
                "ufunc": lambda p: np.exp(-abs(p)),
                "iter": lambda p: np.stack(list(p)),
                "T": lambda p: p.T.copy(),
                "copy": lambda p: __import__("copy").deepcopy(p).data,
            }
            self.both(i, reads[how])

    @rule()
    def reset(self) -> None:
        for opt, p in zip(self.opts, (self.cpu, self.gpu), strict=True):
            opt.reset(p[0])

    @rule()
    def resume(self) -> None:
        for opt in self.opts:
            opt.load_state_dict(opt.state_dict())

    @rule(device=st.sampled_from(["cpu", "gpu"]))
    def move(self, device: str) -> None:
        self.opts[1].to(device, allow_software=True)

    def teardown(self) -> None:
        if hasattr(self, "gpu"):
            assert same(self.cpu, self.gpu)
            assert same(self.opts[0].state_dict()["state"], self.opts[1].state_dict()["state"])


Truth.TestCase.settings = settings(
    max_examples=1000 if FULL else 60, stateful_step_count=30, deadline=None, derandomize=True
)
TestTruth = pytest.mark.usefixtures("gpu")(Truth.TestCase)


def stepped_parameter(array: Any) -> tuple[Any, Any]:
    p = Parameter(array)
    opt = SGD([p], lr=0.5, **ON_GPU)
    opt.step([np.ones_like(array)])
    return p, opt


def test_the_array_behind_a_parameter_cannot_be_written_unseen() -> None:
    for look in (False, True):
        w = f32(3)
        p, opt = stepped_parameter(w)
        if look:
            p.data  # noqa: B018  # brings the values home
        with pytest.raises(ValueError, match="read-only"):
            w[0] = 100.0
        with pytest.raises(ValueError, match="read-only"):
            w += 1
        opt.step([f32(3)])
        assert (p.data == 0).all()
        opt.to("cpu")
        assert (w == 0).all(), "the wrapped array has the values again"
        assert w.flags.writeable
        w[0] = 3.0
        assert p.data[0] == 3.0


@pytest.mark.parametrize("reach", ["view", "base", "data before", "memoryview"])
def test_other_views_of_the_array_are_not_lost_silently(reach: str) -> None:
    """A write through them is refused, used, or told of when the parameter is next looked at."""
    base = f32(6)
    w = base[:3] if reach == "base" else base
    p = Parameter(w)
    other = {"view": w[:], "base": base, "data before": p.data[1:], "memoryview": memoryview(w)}[reach]
    opt = SGD([p], lr=0.5, **ON_GPU)
    opt.step([np.ones_like(w)])
    try:
        other[0] = 100.0
    except (ValueError, TypeError):
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            opt.step([np.ones_like(w)])
            values = p.data.tolist()
            opt.to("cpu")
        except (roptim.RoptimError, Warning):
            return
    assert 99.5 in values or 100.0 in values, "neither used nor told of"


def test_adding_at_indices_is_a_write() -> None:
    """NumPy's ufunc.at heeds no read-only flag."""
    found = []
    for backend in ({}, ON_GPU):
        p = Parameter(f32(4))
        opt = SGD([p], lr=0.5, **backend)
        for _ in range(2):
            opt.step([f32(4)])
            np.add.at(p, [0, 0, 2], [1.0, 2.0, 3.0])
            np.negative.at(p, [3])
        found.append(np.array(p))
    assert same(*found)


def test_a_step_inside_a_host_block_is_not_lost() -> None:
    """What the block wrote is the truth; of the rest, what the step made; or the step is refused."""
    found = []
    for backend in ({}, ON_GPU):
        p = Parameter(f32(3))
        opt = SGD([p], lr=0.5, **backend)
        with p.host() as a:
            try:
                opt.step([f32(3)])
            except roptim.RoptimError:
                return
            a[0] = 9.0
        found.append(p.data.tolist())
    assert found[0] == found[1]


@pytest.mark.parametrize("wrong", ["overflow", "shape", "dtype"])
def test_a_failed_write_loses_nothing(wrong: str) -> None:
    p, opt = stepped_parameter(f32(3))
    with np.errstate(all="raise"), pytest.raises((FloatingPointError, ValueError, TypeError)):
        p.data = {"overflow": np.full(3, 1e300), "shape": f32(4), "dtype": np.full(3, 1j)}[wrong]
    if wrong != "overflow":
        assert (p.data == 0.5).all()
    else:
        assert all(x in (0.5, math.inf) for x in p.data.tolist()), "old values or what was written"
    opt.step([f32(3)])


def test_arrays_of_refused_optimizers_are_free() -> None:
    """What was not registered is as before."""
    for kwargs, wrong in (
        ({}, np.ones(2)),
        ({"lr": -1.0}, f32(2)),
        ({"nonfinite": "no"}, f32(2)),
        ({"clip_norm": -1.0}, f32(2)),
    ):
        w = f32(3)
        p = Parameter(w)
        with pytest.raises(roptim.RoptimError):
            SGD([{"params": [p]}, {"params": [Parameter(wrong)]}], **{**ON_GPU, **kwargs})
        assert not p._on_device
        assert w.flags.writeable
        p.data[0] = 5.0
        assert w[0] == 5.0


def test_a_parameter_outlives_its_optimizer() -> None:
    w = f32(3)
    p, opt = stepped_parameter(w)
    del opt
    gc.collect()
    assert (p.data == 0.5).all()
    p[...] = 2.0
    again = SGD([p], lr=1.0)
    again.step([f32(3)])
    assert (w == 1).all()
    assert (p.data == 1).all()
    assert w.flags.writeable
    assert not p._on_device


def test_views_of_one_array_as_parameters() -> None:
    base = f32(2, 4)
    p = [Parameter(base[0]), Parameter(base[1])]
    opt = SGD(p, lr=1.0, **ON_GPU)
    opt.step([f32(4), f32(4, value=2.0)])
    assert [q.data.tolist() for q in p] == [[0] * 4, [-1] * 4]
    opt.to("cpu")
    assert base.tolist() == [[0] * 4, [-1] * 4]
    opt.step([f32(4), f32(4)])
    assert base.tolist() == [[-1] * 4, [-2] * 4]


@pytest.mark.parametrize("limits", ["0", "1"])
@pytest.mark.parametrize("size", [5, 2_000_000])
def test_a_gradient_may_be_written_over_at_once(size: int, limits: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After step and accumulate; so may an array that was sent, and a value that was assigned."""
    monkeypatch.setenv("ROPTIM_GPU_MIN_LIMITS", limits)
    p, g, x = Parameter(f32(size)), f32(size), f32(size)
    opt = SGD([p], lr=1.0, **ON_GPU)
    for at in range(3):
        g[...] = at
        opt.step([g])
        g[...] = math.nan
        g[...] = at
        opt.accumulate([g])
        g[...] = at
        there = on_device(g)
        g[...] = math.nan
        opt.accumulate([there])
        there[...] = f32(size, value=math.nan)
        opt.step()
    assert (p.data == 1 - 3 * (0 + 1 + 2)).all()
    x[...] = 5.0
    p.data = x
    x[...] = math.nan
    opt.step([f32(size)])
    assert (p.data == 4).all()


def test_the_smallest_parameters() -> None:
    for shape in ((), (0,), (1,)):
        p = Parameter(np.full(shape, 2.0, np.float32))
        opt = SGD([p], lr=1.0, **ON_GPU)
        for _ in range(2):
            opt.step([np.ones(shape, np.float32)])
            np.add(p, 1, out=p)
            p *= 2
            with p.host() as a:
                a -= 1
            p[...] = p - 1
        assert p.data.shape == shape
        assert (p.data == 2.0).all()
        assert isinstance(p.data, np.ndarray)


def test_a_file_behind_a_parameter(tmp_path: Any) -> None:
    w = np.memmap(tmp_path / "w", np.float32, "w+", shape=(5,))
    w[...] = 1
    p = Parameter(w)
    opt = SGD([p], lr=0.5, **ON_GPU)
    opt.step([f32(5)])
    assert (p.data == 0.5).all()
    with pytest.raises(ValueError, match="read-only"):
        w[0] = 3.0
    opt.to("cpu")
    opt.step([f32(5)])
    w.flush()
    assert (np.fromfile(tmp_path / "w", np.float32) == 0).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameters_of_every_layout(layout: str) -> None:
    x = draw(np.random.default_rng(6), (4, 6))
    w = laid_out(x, layout)
    p = Parameter(w)
    opt = SGD([p], lr=0.5, **ON_GPU)
    want = x.copy()
    plain = SGD([want], lr=0.5)
    for _ in range(2):
        g = draw(np.random.default_rng(7), (4, 6))
        opt.step([laid_out(g, layout)])
        plain.step([g])
        assert same(np.array(p), want)
        p[1:] = 0.5
        want[1:] = 0.5
    opt.to("cpu")
    assert same(np.array(w), want)


def test_averages_and_the_finder_follow_the_device() -> None:
    found = []
    for backend in ({}, ON_GPU):
        p = Parameter(f32(3))
        opt = SGD([p], lr=0.5, **backend)
        averaged = AveragedModel([p])
        for value in (1.0, 2.0, 3.0):
            opt.step([f32(3, value=value)])
            averaged.update_parameters([p])
        average = np.array(averaged.module[0])

        def parabola(batch: Any, p: Any = p) -> Any:
            return float((p.data**2).sum()), [2 * p.data]

        before = np.array(p)
        LRFinder(opt, loss_and_gradients=parabola).range_test([0], num_iter=5, end_lr=1.0)
        assert same(np.array(p), before)
        opt.step([f32(3)])
        found.append((average, np.array(p), opt.state_dict()["param_groups"]))
    assert same(found[0], found[1])


def test_the_finder_ends_with_a_bad_step() -> None:
    """Whose error comes when everything is put back."""
    for backend in ({}, ON_GPU):
        p = Parameter(f32(3))
        opt = Adam([p], lr=0.1, nonfinite="raise", **backend)
        opt.step([f32(3)])
        before = everything(opt, [p])
        calls = itertools.count()
        finder = LRFinder(
            opt, loss_and_gradients=lambda batch, c=calls: (1.0, [f32(3, value=math.nan if next(c) == 4 else 1.0)])
        )
        finder.range_test([0], num_iter=5, end_lr=1.0)
        assert same(everything(opt, [p]), before)
        opt.step([f32(3)])
        assert opt.update_count == 2


# ---- there and back -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GPU_NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_move_changes_no_bit(name: str, kind: str) -> None:
    rng = np.random.default_rng(8)
    start = [draw(rng, (20, 3)), draw(rng, (7,)), draw(rng, (5,), np.float16), draw(rng, (4,), ml_dtypes.bfloat16)]
    start = accepted(name, start)
    guard = {"clip_norm": 2.0, "clip_value": 1.5, "nonfinite": "skip"}
    opts, params = [], []
    for _ in range(2):
        p = given(start, kind)
        lr = roptim.schedules.linear(0.1, 0.01, 12)
        opts.append(getattr(roptim, name)([{"params": p[:2], "lr": lr}, {"params": p[2:]}], lr=0.05, **guard))
        params.append(p)
    moved = opts[1]
    for at, device in enumerate(["gpu", "gpu", "cpu", "gpu:0", "cpu", "gpu"]):
        assert moved.to(device, allow_software=True) is moved
        for k in range(2):
            g = [None if i == at % 5 else draw(rng, a.shape, a.dtype, 3.0) for i, a in enumerate(start)]
            if k and at == 2 and g[1] is not None:
                g[1].flat[0] = math.nan
            for opt in opts:
                opt.step(g)
        if at == 3:
            for opt, p in zip(opts, params, strict=True):
                opt.param_groups[1]["lr"] = 0.02
                opt.reset(p[1])
        assert same(everything(opts[0], params[0]), everything(moved, params[1]), tolerance(name))
        assert opts[0].param_groups[0]["lr"] == moved.param_groups[0]["lr"]
        assert moved.skip_count == opts[0].skip_count


def test_a_scheduler_goes_on_after_a_move() -> None:
    opts, params, schedulers = [], [], []
    for _ in range(2):
        p = given([f32(3), f32(2)], "both")
        opts.append(SGD([{"params": p[:1]}, {"params": p[1:], "lr": 0.2}], lr=0.4, momentum=0.9))
        params.append(p)
        schedulers.append(roptim.lr_scheduler.StepLR(opts[-1], 2, gamma=0.5))
    calls = itertools.count()
    opts[1].register_step_post_hook(lambda *_: next(calls))
    for device in ("gpu", "cpu", "gpu"):
        opts[1].to(device, allow_software=True)
        for _ in range(3):
            for opt, scheduler in zip(opts, schedulers, strict=True):
                opt.step([f32(3), f32(2)])
                scheduler.step()
            assert schedulers[0].get_last_lr() == schedulers[1].get_last_lr()
            assert same(everything(opts[0], params[0]), everything(opts[1], params[1]))
    assert next(calls) == 9
    opts[1].add_param_group({"params": [f32(4)], "lr": 1.0})
    opts[1].step([f32(3), f32(2), f32(4)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", [{}, ON_GPU], ids=["cpu", "gpu"])
def test_a_failed_move_leaves_everything(kind: str, backend: dict[str, Any]) -> None:
    arrays = [f32(3), f32(2)]
    p = given(arrays, kind)
    opt = Adam([{"params": p[:1]}, {"params": p[1:]}], lr=0.1, **backend)
    opt.step([f32(3), f32(2)])
    engine, before = opt._engine, everything(opt, p)
    for device in ("gpu:no-such-device", "tpu", "auto", 3, None, "cpu:1"):
        with pytest.raises(roptim.RoptimError):
            opt.to(device, allow_software=True)
        assert opt._engine is engine
        assert same(everything(opt, p), before)
    if is_software():
        opt.to("cpu")
        with pytest.raises(roptim.NoAdapterError):
            opt.to("gpu", allow_software=False)
        assert opt.device.startswith("cpu")
        opt.step([f32(3), f32(2)])


@pytest.mark.parametrize("kind", KINDS)
def test_a_move_that_one_dtype_refuses(kind: str) -> None:
    wrapped = [f32(3), np.ones(2)]
    p = [Parameter(a) if kind == "Parameters" or (kind == "both" and i == 0) else a for i, a in enumerate(wrapped)]
    opt = Adam([{"params": p[:1]}, {"params": p[1:]}], lr=0.1)
    opt.step([f32(3), np.ones(2)])
    before = everything(opt, p)
    with pytest.raises(TypeError, match="parameter 1 must be float32"):
        opt.to("gpu", allow_software=True)
    assert opt.device.startswith("cpu")
    assert same(everything(opt, p), before)
    assert all(a.flags.writeable for a in wrapped)
    assert not any(q._on_device for q in p if isinstance(q, Parameter))
    wrapped[0][0] = 7.0
    assert np.asarray(p[0])[0] == 7.0
    opt.step([f32(3), np.ones(2)])


def test_a_way_back_that_numpy_refuses() -> None:
    """It may be tried again: nothing was lost at the first try."""
    base = f32(6)
    p = Parameter(base[:3])
    opt = SGD([p], lr=0.5, **ON_GPU)
    opt.step([f32(3)])
    base.flags.writeable = False
    with pytest.raises((roptim.RoptimError, ValueError)):
        opt.to("cpu")
    assert opt.device != "cpu"
    assert (p.data == 0.5).all()
    opt.step([f32(3)])
    assert (p.data == 0).all()
    base.flags.writeable = True
    opt.to("cpu")
    assert base.tolist() == [0, 0, 0, 1, 1, 1]
    opt.step([f32(3)])
    assert base.tolist() == [-0.5] * 3 + [1] * 3


def test_state_that_was_asked_for_follows_the_move() -> None:
    p = Parameter(f32(3))
    opt = Adam([p])
    opt.step([f32(3)])
    state, group = opt.state[p], opt.param_groups[0]
    opt.to("gpu", allow_software=True)
    opt.step([f32(3)])
    assert opt.state[p]["step"] == 2
    assert state["step"] == 2, "an old look at the state shows the old engine's"
    group["lr"] = 0.5
    assert opt._engine.hypers(0)["lr"] == 0.5


def test_the_norm_outlives_a_move() -> None:
    opt = SGD([f32(4)], clip_norm=1.0)
    opt.step([f32(4)])
    opt.to("gpu", allow_software=True)
    assert opt.gradient_norm == 2.0


def test_a_bad_step_is_told_before_a_move() -> None:
    p = Parameter(f32(3), name="w")
    opt = SGD([p], lr=1.0, nonfinite="raise", **ON_GPU)
    opt.step([f32(3, value=math.nan)])
    with pytest.raises(NonfiniteError, match='"w"'):
        opt.to("cpu")
    opt.to("cpu")
    opt.step([f32(3)])
    assert (p.data == 0).all()


def test_optimizers_without_a_gpu_form_stay() -> None:
    for name, entry in REGISTRY.items():
        if "gpu" not in entry["backends"]:
            opt = getattr(roptim, name)([f32(2, 2)])
            with pytest.raises(ValueError, match="no GPU form"):
                opt.to("gpu", allow_software=True)
            assert opt.to("cpu") is opt


def test_the_value_of_a_write_is_known_before_it_begins() -> None:
    class Stepping:
        def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
            opt.step([f32(4)])
            return f32(value=7.0)

    p = Parameter(f32(4))
    opt = SGD([p], lr=1.0, **ON_GPU)
    opt.step([f32(4)])
    p[0] = Stepping()
    assert p.data.tolist() == [7.0, -1.0, -1.0, -1.0]


@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_the_wrapped_array_has_the_values_when_the_parameter_goes(nonfinite: str) -> None:
    """Also where the last update was left out and nobody was told yet."""
    w = f32(8)
    p = Parameter(w)
    opt = SGD([p], lr=0.125, nonfinite=nonfinite, **ON_GPU)
    for _ in range(8):
        opt.step([f32(8)])
    opt.step([f32(8, value=math.nan)])
    del opt, p
    assert w.flags.writeable
    assert (w == 0).all()
