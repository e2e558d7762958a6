"""The learning-rate range test: what it records, what it suggests, and that it leaves everything as it was."""

from __future__ import annotations

import io
import math
import signal
import subprocess
import sys
import threading
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import roptim
from roptim import SGD, Adam, AdamW, Optimizer, Parameter, SparseGrad
from roptim.lr_finder import LRFinder
from roptim.lr_scheduler import CosineAnnealingLR, StepLR
from roptim.optimizer import REGISTRY

DTYPES = (np.float32, np.float64, np.complex64, np.complex128, np.float16, ml_dtypes.bfloat16)


# ---- everything that is to be as it was, as one value -------------------------------------------------------


def bits(value: Any) -> Any:
    """A value that is equal only where type, identity of arrays and all bits are the same."""
    if isinstance(value, Parameter):
        return ("Parameter", id(value), id(value._array), bits(value.data)[2:], bits(value.grad))
    if isinstance(value, np.ndarray):
        return ("array", id(value), value.dtype.str, value.shape, value.strides, value.tobytes())
    if isinstance(value, SparseGrad):
        return ("sparse", id(value), bits(value.values)[2:], bits(value.indices)[2:])
    if isinstance(value, dict):
        return (type(value).__name__, [(key, bits(item)) for key, item in value.items()])
    if isinstance(value, (list, tuple, deque)):
        return (type(value).__name__, [bits(item) for item in value])
    if isinstance(value, Optimizer):
        return snapshot(value)
    return (type(value).__name__, repr(value))


def without_ids(value: Any) -> Any:
    """The same of a state dict, whose arrays are copies."""
    if isinstance(value, np.ndarray):
        return bits(value)[2:]
    if isinstance(value, dict):
        return [(key, without_ids(item)) for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return [without_ids(item) for item in value]
    return bits(value)


def snapshot(opt: Optimizer) -> Any:
    """Everything that belongs to an optimizer."""
    engine = opt._engine
    return (
        [bits(p) for p in opt._parameters()],
        without_ids(opt.state_dict()),
        [(id(group), bits(dict(group))) for group in opt.param_groups],
        opt.update_count,
        [engine.hypers(i) for i in range(len(opt.param_groups))] if engine is not None else bits(opt._state._own),
        "_step_called" in vars(opt),
        opt._step_called,
    )


# ---- problems -----------------------------------------------------------------------------------------------


def odd_bits(dtype: Any) -> Any:
    """Numbers that a careless copy changes: a signalling NaN, a negative zero, a subnormal number, infinities."""
    size = np.dtype(dtype).itemsize // (2 if np.dtype(dtype).kind == "c" else 1)
    patterns = {
        2: [0x7F81 if dtype is ml_dtypes.bfloat16 else 0x7C01, 0x8000, 1, 0xFF80],
        4: [0x7F800001, 0x80000000, 1, 0xFF800000],
        8: [0x7FF0000000000001, 1 << 63, 1, 0xFFF << 52],
    }
    return np.array(patterns[size], f"u{size}").view(dtype)


def arrays(dtype: Any, seed: int = 0) -> list[Any]:
    """One array per layout: C, Fortran, strided, reversed, and one that gets no gradient."""
    rng = np.random.default_rng(seed)

    def numbers(*shape: int) -> Any:
        x = rng.standard_normal(shape)
        return (x + 1j * x[::-1] if np.dtype(dtype).kind == "c" else x).astype(dtype)

    untouched = odd_bits(dtype).reshape(2, -1)
    return [numbers(4, 3), np.asfortranarray(numbers(3, 4)), numbers(4, 6)[:, ::2], numbers(5, 2)[::-1], untouched]


def takes(name: str, dtype: Any) -> bool:
    try:
        getattr(roptim, name)(arrays(dtype))
    except roptim.RoptimTypeError:
        return False
    return True


def as_wanted(name: str, gradients: list[Any]) -> list[Any]:
    """Dense gradients as an optimizer takes them."""
    if not REGISTRY[name]["needs_sparse"]:
        return gradients
    return [None if g is None else SparseGrad(np.arange(len(g)), np.ascontiguousarray(g), g.shape) for g in gradients]


class Quadratic:
    """Half the squared distance from a batch, a number, over all arrays but the last, which has no gradient.

    With ``returns`` the gradients are returned, else they are put into ``.grad``.
    """

    def __init__(self, name: str, params: list[Any], returns: bool) -> None:
        self.name, self.params, self.returns = name, params, returns
        self.calls = 0

    def __call__(self, batch: float) -> Any:
        self.calls += 1
        distances = [np.asarray(p) - np.asarray(p).dtype.type(batch) for p in self.params[:-1]]
        loss = sum(float((np.abs(d.astype(np.complex128)) ** 2).sum()) for d in distances) / 2
        gradients = as_wanted(self.name, [*distances, None])
        if self.returns:
            return loss, gradients
        for p, g in zip(self.params, gradients, strict=True):
            p.grad = g
        return loss


def line(x: Any, batch: Any) -> tuple[float, Any]:
    """Mean squared error of a linear model with weights x, and its gradient."""
    inputs, targets = batch
    error = inputs @ np.asarray(x) - targets
    return float(np.mean(error**2)), 2 * inputs.T @ error / len(targets)


def regression(seed: int = 0, rows: int = 64) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((rows, 5))
    return inputs, inputs @ np.arange(1.0, 6.0) + 0.1 * rng.standard_normal(rows)


def batched(data: tuple[Any, Any], size: int) -> list[Any]:
    return [(data[0][i : i + size], data[1][i : i + size]) for i in range(0, len(data[1]), size)]


# ---- everything is as it was --------------------------------------------------------------------------------


@pytest.mark.parametrize("warm", [False, True], ids=["fresh", "warm"])
@pytest.mark.parametrize("carries", [False, True], ids=["arrays", "Parameters"])
def test_everything_is_restored(optimizer_class: Any, carries: bool, warm: bool) -> None:
    name = optimizer_class.__name__
    tried = 0
    for dtype in filter(lambda dtype: takes(name, dtype), DTYPES):
        plain = arrays(dtype)
        params = [Parameter(a) for a in plain] if carries else plain
        opt = optimizer_class(params, lr=0.01)
        loss = Quadratic(name, params, returns=not carries)
        if warm:
            LRFinder(opt, loss_and_gradients=loss)  # making one changes nothing
            for batch in (0.5, 0.25):
                result = loss(batch)
                if REGISTRY[name]["needs_closure"]:
                    opt.step(lambda loss=loss, batch=batch: loss(batch))
                else:
                    opt.step(result[1] if loss.returns else None)
        opt.param_groups[0]["mine"] = [1, np.arange(3)]
        before, own = snapshot(opt), opt.param_groups[0]["mine"]
        with np.errstate(all="ignore"):
            finder = LRFinder(opt, loss_and_gradients=loss).range_test([0.0, 1.0, -1.0], 0.001, 1.0, 12, diverge_th=1e9)
        assert snapshot(opt) == before
        assert opt.param_groups[0]["mine"] is own
        losses = finder.history["raw_loss"]
        assert len(losses) >= 4
        assert len(set(losses)) > 3, "the test trained"
        tried += 1
    assert tried >= 2


def test_a_run_after_a_test_is_the_run_without() -> None:
    data = batched(regression(), 8)

    def run(tested: bool) -> Any:
        x, rng = Parameter(np.zeros(5)), np.random.default_rng(3)
        opt = AdamW([x], lr=0.05)
        sched = CosineAnnealingLR(opt, T_max=20)

        def step(batch: Any) -> float:
            opt.zero_grad()
            loss, gradient = line(x, batch)
            x.grad = gradient + 0.01 * rng.standard_normal(5)
            roptim.clip_grad_norm_([x], 1.0)
            opt.step()
            return loss

        trace = []
        for epoch in range(6):
            if tested and epoch in (0, 3):
                finder = LRFinder(opt, step, also=rng)
                finder.range_test(data, start_lr=1e-4, num_iter=20)
                finder.reset()
            for batch in data:
                step(batch)
            sched.step()
            trace.append((np.asarray(x).tobytes(), opt.param_groups[0]["lr"], sched.last_epoch))
        return trace, without_ids(opt.state_dict())

    assert run(True) == run(False)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, SystemExit, roptim.RoptimRuntimeError])
@pytest.mark.parametrize("where", ["step", "after step", "loss", "batches", "evaluate"])
@pytest.mark.parametrize("at", [0, 1, 4])
def test_everything_is_restored_after_an_error(error: Any, where: str, at: int) -> None:
    params = [Parameter(a) for a in arrays(np.float32)]
    opt = Adam(params, lr=0.01, amsgrad=True)
    loss = Quadratic("Adam", params, returns=False)
    loss(1.0)
    opt.step()
    count = 0

    def fail(here: str) -> None:
        if here == where and count == at:
            raise error("on purpose")

    def batches() -> Iterator[float]:
        while True:
            fail("batches")
            yield 1.0

    def evaluate(_: Any) -> float:
        fail("evaluate")
        return loss(0.0)

    def step(batch: float) -> float:
        nonlocal count
        fail("step")
        value = loss(batch)
        fail("loss")
        opt.step()
        fail("after step")
        count += 0 if where == "evaluate" and count == at else 1
        return value

    before = snapshot(opt)
    finder = LRFinder(opt, step, evaluate=evaluate)
    with pytest.raises(error, match=r"on purpose"):
        finder.range_test(batches, 0.01, 1.0, 8, validation="data" if where == "evaluate" else None)
    assert snapshot(opt) == before
    assert finder.stopped is None
    assert len(finder.history["lr"]) == len(finder.history["loss"]) == at - (where == "evaluate" and at > 0)


def test_an_interrupt_anywhere() -> None:
    """Ctrl-C may arrive between any two instructions, also of the code that puts everything back."""
    code = sys.modules[LRFinder.__module__].__file__
    params = [Parameter(a) for a in arrays(np.float64)[:2]]
    opt = SGD(params, lr=0.1, momentum=0.9)
    loss = Quadratic("SGD", params, returns=False)
    loss(1.0)
    opt.step()
    before = snapshot(opt)
    count, fatal = 0, 0

    def tracer(frame: types.FrameType, event: str, _: Any) -> Any:
        nonlocal count
        if frame.f_code.co_filename != code:
            return None
        frame.f_trace_opcodes = True
        if event in ("line", "opcode"):
            count += 1
            if count == fatal:
                raise KeyboardInterrupt
        return tracer

    def run() -> None:
        nonlocal count
        count = 0
        finder = LRFinder(opt, loss_and_gradients=loss)
        previous = sys.gettrace()
        sys.settrace(tracer)
        try:
            finder.range_test([0.0, 1.0], 0.1, 1.0, 2, progress=False)
        finally:
            sys.settrace(previous)

    run()
    places = count
    assert places > 500
    for fatal in range(1, places + 1):
        with pytest.raises(KeyboardInterrupt):
            run()
        assert snapshot(opt) == before, f"at {fatal} of {places}"


def test_interrupts_while_everything_is_put_back() -> None:
    class Slow(np.ndarray):
        """Whoever waits for it becomes impatient, more than once."""

        patience = 5

        def __setitem__(self, index: Any, value: Any) -> None:
            type(self).patience -= 1
            if self.patience >= 0:
                raise KeyboardInterrupt
            super().__setitem__(index, value)

    slow, x = np.zeros(3).view(Slow), np.zeros(5)
    opt = SGD([x], lr=0.1)

    def loss_and_gradients(batch: Any) -> Any:
        np.add(slow, 1, out=slow)
        loss, gradient = line(x, batch)
        return loss, [gradient]

    before = (snapshot(opt), bits(slow))
    with pytest.raises(KeyboardInterrupt):
        LRFinder(opt, loss_and_gradients=loss_and_gradients, also=slow).range_test(batched(regression(), 8))
    assert Slow.patience < 0
    assert (snapshot(opt), bits(slow)) == before


@pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason="signals reach the main thread")
def test_a_real_interrupt() -> None:
    x = np.zeros(5)
    opt = SGD([x], lr=0.01)

    def loss_and_gradients(batch: Any) -> Any:
        if np.any(x != 0):
            signal.raise_signal(signal.SIGINT)
        loss, gradient = line(x, batch)
        return loss, [gradient]

    before = snapshot(opt)
    with pytest.raises(KeyboardInterrupt):
        LRFinder(opt, loss_and_gradients=loss_and_gradients).range_test(batched(regression(), 8))
    assert snapshot(opt) == before


def test_whatever_the_step_does_to_the_optimizer() -> None:
    params = {name: Parameter(a) for name, a in zip("abcde", arrays(np.float32), strict=True)}
    opt = AdamW([{"params": {n: params[n]}, "lr": lr, "of mine": n} for n, lr in zip("abc", (1e-3, 1, 2), strict=True)])
    gradient, buffer = np.ones((4, 3), np.float32), np.ones((3, 4), np.float32)
    params["a"].grad, params["b"].grad = gradient, buffer
    opt.param_groups[1]["betas"] = (0, 0.5)  # shown as it was given: an int stays an int
    before = snapshot(opt)

    def step(_: Any) -> float:
        for group in opt.param_groups:
            group["weight_decay"] = group["weight_decay"] + 0.1
            group["betas"] = (0.5, 0.5)
            group["step's own"] = 1
            group.pop("of mine", None)
        buffer[...] = np.nan
        params["c"].grad = SparseGrad([0], np.ones((1, 3), np.float32), (4, 3))
        opt.step({"a": gradient * 2, "b": buffer, "c": None})
        opt.state = {}
        opt.load_state_dict(opt.state_dict())
        for p in params.values():
            p[...] = 3
            p.grad = None
        opt.scribble = "on the optimizer"  # type: ignore[attr-defined]
        return 1.0

    LRFinder(opt, step, also=params).range_test([0], 1e-3, 1, 3)
    assert snapshot(opt) == before
    assert params["a"].grad is gradient
    assert params["b"].grad is buffer
    assert np.all(buffer == 1)
    assert not hasattr(opt, "scribble")
    assert opt.param_groups[1]["betas"] == (0, 0.5)
    assert [np.asarray(p).tobytes() for p in params.values()] == [a.tobytes() for a in arrays(np.float32)]


def test_sparse_gradients_in_grad_are_restored() -> None:
    table = Parameter(np.arange(12, dtype=np.float32).reshape(4, 3))
    opt = roptim.SparseAdam([table], lr=0.1)
    table.grad = SparseGrad([2, 0], np.ones((2, 3), np.float32), (4, 3))
    before = snapshot(opt)

    def step(row: int) -> float:
        table.grad.values[...] *= 2
        opt.step()
        table.grad = SparseGrad([row], np.ones((1, 3), np.float32), (4, 3))
        opt.step()
        return float(np.asarray(table).sum())

    LRFinder(opt, step).range_test([0, 3], end_lr=1, num_iter=5)
    assert snapshot(opt) == before


class Momentum(Optimizer):
    """An optimizer written in Python, with every kind of state and attributes of its own."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})
        self.count = 0
        self.norms: list[float] = []
        self.latest: deque[Any] = deque(maxlen=3)

    def step(self) -> None:  # type: ignore[override]
        self.count += 1
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(m=np.zeros_like(p), n=0, past=[], tree=OrderedDict(a={"b": np.zeros(2)}))
                state["m"] *= 0.9
                state["m"] += p.grad
                state["n"] += 1
                state["past"].append(float(np.linalg.norm(p.grad)))
                state["tree"]["a"]["b"] += 1
                state["tree"].move_to_end("a")
                state["tree"][str(state["n"])] = state["n"]
                p -= group["lr"] * state["m"]
                self.norms.append(state["past"][-1])
                self.latest.append(np.array(p))


@pytest.mark.parametrize("warm", [False, True], ids=["fresh", "warm"])
def test_an_optimizer_written_in_python(warm: bool) -> None:
    params = [Parameter(a) for a in arrays(np.float64)[:3]]
    opt = Momentum(params)
    loss = Quadratic("SGD", [*params, Parameter(np.zeros(1))], returns=False)
    if warm:
        for batch in (1.0, 2.0):
            loss(batch)
            opt.step()
    before, own = snapshot(opt), bits(opt.norms) + bits(opt.latest)
    held = {key: opt.state[0][key] for key in ("m", "past", "tree")} if warm else {}
    LRFinder(opt, loss_and_gradients=loss).range_test([0.0, 1.0], 0.01, 1, 8)
    assert snapshot(opt) == before
    assert opt.count == (2 if warm else 0)
    assert bits(opt.norms) + bits(opt.latest) == own
    assert all(opt.state[0][key] is value for key, value in held.items()), "the same objects, not copies"

    def failing(_: Any) -> float:
        loss(1.0)
        opt.load_state_dict(opt.state_dict())
        opt.step()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        LRFinder(opt, failing).range_test([0.0])
    assert snapshot(opt) == before
    assert all(opt.state[0][key] is value for key, value in held.items())


def test_an_optimizer_around_another() -> None:
    class Lookahead(Optimizer):
        """Keeps an engine's optimizer, and slow weights outside of the state."""

        def __init__(self, params: list[Any], lr: float) -> None:
            super().__init__(params, {"lr": lr})
            self.fast = Adam(params, lr=lr)
            self.slow = [np.array(p) for p in params]

        def step(self) -> None:  # type: ignore[override]
            self.fast.param_groups[0]["lr"] = self.param_groups[0]["lr"]
            self.fast.step()
            for p, slow in zip(self.param_groups[0]["params"], self.slow, strict=True):
                slow += 0.5 * (p - slow)
                p[...] = slow

    params = [Parameter(a) for a in [*arrays(np.float32)[:-1], np.zeros(2, np.float32)]]
    opt, loss = Lookahead(params, 0.01), Quadratic("Adam", params, returns=False)
    loss(1.0)
    opt.step()
    slow = opt.slow
    before = (snapshot(opt), snapshot(opt.fast), bits(slow))
    LRFinder(opt, loss_and_gradients=loss).range_test([0.0, 1.0], end_lr=1, num_iter=5)
    assert (snapshot(opt), snapshot(opt.fast), bits(opt.slow)) == before
    assert opt.slow is slow


def test_also() -> None:
    x, y, mean = np.zeros(5), np.ones(3), np.zeros(2)
    opt, other = SGD([x], lr=0.1), Adam([y])
    rng = np.random.default_rng(0)
    stats = {"mean": mean, "count": 0}

    def step(batch: Any) -> float:
        rng.standard_normal(3)
        stats["mean"] += 1
        stats["count"] += 1
        stats["new"] = True
        other.step([np.ones(3)])
        loss, gradient = line(x, batch)
        opt.step([gradient])
        return loss

    before = (snapshot(opt), snapshot(other), bits(stats), repr(rng.bit_generator.state))
    LRFinder(opt, step, also=[stats, other, (rng, None)]).range_test(batched(regression(), 8), num_iter=5)
    assert (snapshot(opt), snapshot(other), bits(stats), repr(rng.bit_generator.state)) == before
    assert stats["mean"] is mean


def test_parameters_on_a_gpu(backend: dict[str, Any]) -> None:
    host = np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)
    p, array = Parameter(host), host[::-1].copy()
    opt = Adam([p, array], lr=0.1, **backend)

    def step(batch: float) -> float:
        distances = [p - np.float32(batch), array - np.float32(batch)]
        opt.step(distances)
        return float(sum((d * d).sum() for d in distances))

    step(0.5)
    twin = Adam([np.array(p), array.copy()], lr=0.1)
    twin.load_state_dict(opt.state_dict())
    before = snapshot(opt)
    LRFinder(opt, step).range_test([0.0, 1.0], end_lr=1, num_iter=6)
    assert snapshot(opt) == before
    assert (p._array is host) == (backend["backend"] == "cpu")

    def failing(batch: float) -> float:
        step(batch)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        LRFinder(opt, failing).range_test([0.0])
    assert snapshot(opt) == before
    # The device goes on from there, too.
    step(0.25)
    start = [np.asarray(q) for q in twin._parameters()]
    twin.step([q - np.float32(0.25) for q in start])
    assert np.allclose(np.asarray(p), start[0], rtol=1e-5, atol=1e-6)
    assert np.allclose(array, start[1], rtol=1e-5, atol=1e-6)


def test_a_scheduler_is_not_advanced() -> None:
    x = np.zeros(5)
    opt = SGD([x], lr=0.5)
    sched = StepLR(opt, 1, 0.5)
    before = (snapshot(opt), sched.state_dict())

    def step(batch: Any) -> float:
        loss, gradient = line(x, batch)
        opt.step([gradient])
        return loss

    data = batched(regression(), 8)
    LRFinder(opt, step).range_test(data, start_lr=1e-3, num_iter=10)
    assert (snapshot(opt), sched.state_dict()) == before
    # It still warns where it is stepped before the optimizer.
    with pytest.warns(UserWarning, match=r"before optimizer.step"):
        sched.step()
    before = snapshot(opt)

    def stepping_both(batch: Any) -> float:
        loss = step(batch)
        sched.step()
        return loss

    with pytest.raises(
        roptim.RoptimRuntimeError,
        match=r"^LRFinder.range_test: lr of group 0 must be left alone by the step, got 0.0005 in place of 0.001; "
        r"leave schedulers out of the step$",
    ):
        LRFinder(opt, stepping_both).range_test(data, start_lr=1e-3, num_iter=10)
    assert snapshot(opt) == before


def test_what_cannot_be_restored_is_said() -> None:
    x = np.zeros(5)
    opt = SGD({"x": x}, lr=0.1)
    raises = False

    def step(batch: Any) -> float:
        loss, gradient = line(x, batch)
        opt.step({"x": gradient})
        x.flags.writeable = False
        if raises:
            raise ZeroDivisionError
        return loss

    sentence = "LRFinder.range_test: parameter 'x' must be put back after the test, got ValueError: "
    with pytest.raises(roptim.TornError, match=f"^{sentence}.*read-only"):
        LRFinder(opt, step).range_test(batched(regression(), 8), num_iter=1)
    x.flags.writeable = True
    raises = True
    with pytest.raises(ZeroDivisionError) as raised:
        LRFinder(opt, step).range_test(batched(regression(), 8))
    assert raised.value.__notes__[0].startswith(sentence)
    assert opt.update_count == 0, "what could be put back was"


# ---- what it records ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["step", "returned", "in grad"])
@pytest.mark.parametrize("smooth_f", [0, 0.05, 0.5])
def test_history_is_that_of_a_loop_written_by_hand(form: str, smooth_f: float) -> None:
    data = batched(regression(), 16)
    x = np.full(5, 0.25)
    p = Parameter(x)
    opt = SGD([p], lr=0.5, momentum=0.9)

    def loss_and_gradients(batch: Any) -> Any:
        loss, gradient = line(x, batch)
        if form == "returned":
            return loss, [gradient]
        p.grad = gradient
        return loss

    def step(batch: Any) -> Any:
        loss = loss_and_gradients(batch)
        opt.step()
        return np.float64(loss)

    finder = (
        LRFinder(opt, step) if form == "step" else LRFinder(opt, None, loss_and_gradients=loss_and_gradients)
    ).range_test(data, 1e-4, 1, 50, smooth_f=smooth_f, diverge_th=math.inf, progress=False)

    w, velocity, smoothed, want = np.full(5, 0.25), np.zeros(5), None, []
    for i in range(50):
        inputs, targets = data[i % len(data)]
        lr = 1e-4 * 10 ** (4 * i / 49)
        error = inputs @ w - targets
        loss = error @ error / len(targets)
        smoothed = loss if smoothed is None or smooth_f == 0 else smooth_f * loss + (1 - smooth_f) * smoothed
        want.append((lr, smoothed, loss))
        velocity = 0.9 * velocity + 2 / len(targets) * (error @ inputs)
        w = w - lr * velocity
    got = zip(finder.history["lr"], finder.history["loss"], finder.history["raw_loss"], strict=True)
    assert np.allclose(list(got), want, rtol=1e-9, atol=0)
    assert list(finder.history) == ["lr", "loss", "raw_loss"]
    assert {type(value) for values in finder.history.values() for value in values} == {float}
    assert finder.stopped == "end"


@pytest.mark.parametrize(
    ("start", "end", "count"), [(1e-7, 10, 100), (0.3, 0.7, 7), (1e-300, 1e300, 11), (0.1, 1, 2), (0.1, 1, 1)]
)
def test_the_sequence_of_learning_rates(start: float, end: float, count: int) -> None:
    opt = SGD([np.zeros(1)], lr=0.3)
    seen: list[float] = []

    def step(_: Any) -> float:
        seen.append(opt.param_groups[0]["lr"])
        opt.step([np.zeros(1)])
        return 1.0

    finder = LRFinder(opt, step)
    for mode in ("exp", "linear"):
        seen.clear()
        finder.range_test([0], start, end, count, mode)
        parts = [i / max(1, count - 1) for i in range(count)]
        want = [start ** (1 - r) * end**r if mode == "exp" else (1 - r) * start + r * end for r in parts]
        assert finder.history["lr"] == seen == want
        assert seen[0] == start
        assert count == 1 or seen[-1] == end
        steps = np.diff(np.log(seen) if mode == "exp" else seen)
        assert np.allclose(steps, steps[:1], rtol=1e-9)
    seen.clear()
    finder.range_test([0], end_lr=0.9, num_iter=3)
    assert seen[0] == 0.3, "the current one where none is given"


def test_groups_keep_their_ratios() -> None:
    opt = SGD([{"params": [np.zeros(1)], "lr": lr} for lr in (0.3, 0.03, 0.3, 0.0)])
    seen: list[list[float]] = []

    def step(_: Any) -> float:
        seen.append([group["lr"] for group in opt.param_groups])
        opt.step([np.zeros(1)] * 4)
        return 1.0

    finder = LRFinder(opt, step)
    finder.range_test([0], num_iter=20)
    assert seen[0] == [0.3, 0.03, 0.3, 0.0], "the first step is that of the current rates, exactly"
    assert finder.history["lr"] == [rates[0] for rates in seen]
    assert all(rates[2] == rates[0] and rates[3] == 0 for rates in seen)
    assert np.allclose([rates[1] / rates[0] for rates in seen], 0.1, rtol=1e-15)
    assert [group["lr"] for group in opt.param_groups] == [0.3, 0.03, 0.3, 0.0]
    # All zero, at the beginning of a warm-up: they are equal.
    for group in opt.param_groups:
        group["lr"] = 0.0
    finder.range_test([0], 0.1, 1, 3)
    assert seen[-1] == [1.0] * 4


def finder_of(losses: list[float], **kwargs: Any) -> LRFinder:
    """A test in which the step has these losses."""
    p = Parameter(np.zeros(1))
    opt = SGD([p], lr=0.1)

    def step(loss: float) -> float:
        p.grad = np.ones(1)
        opt.step()
        return loss

    return LRFinder(opt, step).range_test(losses, **{"num_iter": len(losses), "smooth_f": 0, **kwargs})


def test_it_stops_where_the_loss_diverges() -> None:
    finder = finder_of([2.0, 1.0, 4.0, 5.0, 5.1, 0.0])
    assert finder.history["loss"] == [2.0, 1.0, 4.0, 5.0, 5.1]
    assert finder.stopped == "diverged"
    assert finder_of([2.0, 1.0, 1.9, 2.0, 2.1, 0.0], diverge_th=2).history["loss"][-1] == 2.1
    # The smoothed loss counts, in both places.
    losses = [1.0, 9.0, 9.0, 9.0, 1.0]
    smooth = finder_of(losses, smooth_f=0.25, diverge_th=5)
    assert smooth.history["raw_loss"] == [1.0, 9.0, 9.0, 9.0]
    assert smooth.history["loss"] == [1.0, 3.0, 4.5, 5.625]
    assert finder_of(losses, smooth_f=0.25, diverge_th=math.inf).stopped == "end"
    # Logarithms of likelihoods: below -1 by 4 times its magnitude is above by as much.
    finder = finder_of([1.0, -1.0, -0.2, 2.9, 3.1, 0.0])
    assert finder.history["loss"] == [1.0, -1.0, -0.2, 2.9, 3.1]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, np.float32("nan")])
def test_it_stops_before_a_loss_that_is_not_finite(bad: float) -> None:
    finder = finder_of([2.0, 1.0, bad, 0.0])
    assert finder.history == {"lr": finder.history["lr"], "loss": [2.0, 1.0], "raw_loss": [2.0, 1.0]}
    assert len(finder.history["lr"]) == 2
    assert finder.stopped == "nonfinite"
    with pytest.raises(roptim.NonfiniteError, match=r"^LRFinder.range_test: the first loss must be finite, got"):
        finder_of([bad, 1.0])
    # The finder makes no step with gradients of such a loss.
    x = np.zeros(2)
    opt, seen = SGD([x], lr=0.1), []

    def loss_and_gradients(_: Any) -> Any:
        seen.append(x.copy())
        return (bad, "no gradients") if len(seen) == 3 else (1.0, [np.ones(2)])

    assert LRFinder(opt, loss_and_gradients=loss_and_gradients).range_test([0]).stopped == "nonfinite"
    assert len(seen) == 3


def test_it_stops_where_a_step_refuses_gradients_that_are_not_finite() -> None:
    p = Parameter(np.zeros(2))
    opt = SGD([p], lr=0.1)
    gradients = iter([1.0, 2.0, math.inf])

    def step(_: Any) -> float:
        p.grad = np.full(2, next(gradients))
        roptim.clip_grad_norm_([p], 1.0, error_if_nonfinite=True)
        opt.step()
        return 1.0

    before = snapshot(opt)
    finder = LRFinder(opt, step).range_test([0])
    assert finder.stopped == "nonfinite"
    assert finder.history["loss"] == [1.0, 1.0]
    gradients = iter([math.inf])
    with pytest.raises(roptim.NonfiniteError, match=r"^clip_grad_norm_"):
        finder.range_test([0])
    assert snapshot(opt) == before


# ---- batches ------------------------------------------------------------------------------------------------


def test_batches_of_every_kind() -> None:
    opt, seen = SGD([np.zeros(1)], lr=0.1), []

    def step(batch: Any) -> float:
        seen.append(batch)
        opt.step([np.zeros(1)])
        return 1.0

    def generator() -> Iterator[int]:
        yield from (1, 2, 3)

    class Sequence:
        def __getitem__(self, index: int) -> int:
            return (1, 2, 3)[index]

    class Loader:
        """Iterable and callable, as loaders of other libraries are: it is gone through."""

        def __iter__(self) -> Iterator[int]:
            return generator()

        def __call__(self) -> None:
            raise AssertionError

    finder = LRFinder(opt, step)
    for batches in ([1, 2, 3], np.array([1, 2, 3]), generator, lambda: [1, 2, 3], Sequence(), Loader()):
        seen.clear()
        finder.range_test(batches, num_iter=7)
        assert seen == [1, 2, 3, 1, 2, 3, 1]
        assert finder.stopped == "end"
    once = generator()
    for batches in (generator(), iter([1, 2, 3]), lambda: once):
        seen.clear()
        before = snapshot(opt)
        with pytest.warns(
            UserWarning,
            match=r"^LRFinder.range_test: batches ended after 3 of 7 iterations, at lr 0.464; give a list, or a "
            r"function that returns a new iterator$",
        ):
            finder.range_test(batches, num_iter=7)
        assert seen == [1, 2, 3]
        assert (finder.stopped, len(finder.history["lr"])) == ("exhausted", 3)
        assert snapshot(opt) == before
    finder.range_test(generator(), num_iter=3)
    assert finder.stopped == "end"
    for empty in ([], iter(()), lambda: [], lambda: once):
        with pytest.raises(
            roptim.RoptimValueError, match=r"^LRFinder.range_test: batches must be at least one step's, got none$"
        ):
            finder.range_test(empty)
    for wrong, kind in ((7, "int"), (None, None), (object(), "object")):
        got = "None" if kind is None else f"an object of type {kind}"
        sentence = f"batches must be an iterable, or a function that returns one, got {got}"
        with pytest.raises(roptim.RoptimTypeError, match=f"^LRFinder.range_test: {sentence}$"):
            finder.range_test(wrong)
    with pytest.raises(
        roptim.RoptimTypeError, match=r"a function that returns an iterable, got one that returns None$"
    ):
        finder.range_test(lambda: None)


# ---- accumulation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["list", "dict", "pairs", "nested", "one array", "groups", "Parameters", "one buffer"])
def test_accumulated_batches_are_one_big_batch(form: str) -> None:
    data = regression()
    shape: dict[str, Callable[[Any, Any], Any]] = {
        "list": lambda a, b: [a, b],
        "dict": lambda a, b: {"a": a, "b": b},
        "pairs": lambda a, b: [("a", a), ("b", b)],
        "nested": lambda a, b: {"x": [a, {"y": b}]},
        "groups": lambda a, b: [a, b],
    }

    def history(size: int, accumulation_steps: int) -> Any:
        x = np.full(6, 0.5)
        a, b, buffer = x[:5], x[5:], np.zeros(6)
        p = Parameter(x)
        if form in ("one array", "one buffer"):
            params: Any = x
        elif form == "groups":
            params = [{"params": [a]}, {"params": [b]}]
        else:
            params = p if form == "Parameters" else shape[form](a, b)
        opt = Adam(params, lr=0.5)

        def loss_and_gradients(batch: Any) -> Any:
            inputs, targets = batch
            loss, gradient = line(x, (np.column_stack([inputs, np.ones(len(inputs))]), targets))
            if form == "Parameters":
                assert p.grad is None, "forgotten before each batch"
                p.grad = gradient
                return loss
            if form in ("one array", "one buffer"):
                # The same memory for each batch is the caller's right.
                buffer[...] = gradient
                return loss, buffer if form == "one buffer" else gradient
            return loss, shape[form](gradient[:5], gradient[5:])

        before = snapshot(opt)
        finder = LRFinder(opt, loss_and_gradients=loss_and_gradients)
        finder.range_test(batched(data, size), 1e-3, 1, 12, accumulation_steps=accumulation_steps)
        assert snapshot(opt) == before
        return np.array(finder.history["raw_loss"])

    small, big = history(8, 4), history(32, 1)
    assert len(big) == 12
    assert np.allclose(small, big, rtol=1e-12, atol=0)
    assert not np.allclose(history(8, 1), big, rtol=1e-2)


def test_accumulated_gradients_of_every_kind() -> None:
    half, none, mixed = np.zeros(2, np.float16), np.zeros(2, np.float32), np.zeros((4, 2), np.float32)
    scalar, single = np.zeros((), np.float32), np.zeros(2, np.complex64)
    opt = SGD([half, none, mixed, scalar, single], lr=1.0)
    rows = SparseGrad([1, 3, 1], np.ones((3, 2), np.float32), (4, 2))
    given = {
        1: [np.full(2, 6e4, np.float16), None, rows, np.float32(1), np.full(2, 1j, np.complex64)],
        2: [np.full(2, 6e4, np.float16), None, rows, np.float32(2), np.full(2, 1, np.complex64)],
        3: [None, None, np.ones((4, 2), np.float32), np.float32(6), None],
    }
    after: list[Any] = []

    def evaluate(_: Any) -> float:
        after.append([a.copy() for a in (half, none, mixed, scalar, single)])
        return 1.0

    def loss_and_gradients(batch: int) -> Any:
        return float(batch), given[batch]

    finder = LRFinder(opt, loss_and_gradients=loss_and_gradients, evaluate=evaluate)
    for order in ([1, 2, 3], [3, 2, 1], [1, 3, 2]):
        after.clear()
        finder.range_test(order, 1.0, 2.0, 1, accumulation_steps=3, validation=0)
        h, n, m, s, c = after[0]
        assert np.all(h == np.float16(-4e4)), "a sum in float16 would be infinite"
        assert np.all(n == 0)
        assert np.allclose(m, -np.array([[1], [5], [1], [3]]) / 3 * np.ones(2), rtol=1e-6)
        assert np.isclose(s, -3)
        assert np.allclose(c, -(1 + 1j) / 3)
    # Half precision is added up in single, where 2048 and 1 have a mean, and the step takes it.
    half[...] = 1024
    given = {1: [np.full(2, 2048, np.float16)] + [None] * 4, 2: [np.ones(2, np.float16)] + [None] * 4}
    after.clear()
    finder.range_test([1, 2], 1.0, 2.0, 1, accumulation_steps=2, validation=0)
    assert np.all(after[0][0] == -0.5)
    table = np.zeros((4, 2), np.float32)
    opt = roptim.SparseAdam([table], lr=1.0)
    finder = LRFinder(opt, loss_and_gradients=lambda rows: (1.0, [SparseGrad(rows, np.ones((2, 2), "f4"), (4, 2))]))
    before = snapshot(opt)
    finder.range_test([[0, 1], [1, 0], [1, 1]], end_lr=2, num_iter=3, accumulation_steps=2)
    assert snapshot(opt) == before


def test_an_incomplete_accumulation_makes_no_step() -> None:
    opt = SGD([np.zeros(1)], lr=0.1)
    finder = LRFinder(opt, loss_and_gradients=lambda batch: (float(batch), [np.zeros(1)]))
    with pytest.warns(UserWarning, match=r"after 2 of 9"):
        finder.range_test(iter([1, 3, 2, 4, 9]), num_iter=9, accumulation_steps=2)
    assert finder.history["raw_loss"] == [2.0, 3.0]
    finder.range_test([1, 3, 5], num_iter=3, accumulation_steps=2)
    assert finder.history["raw_loss"] == [2.0, 3.0, 4.0], "on over the end of a list"
    with pytest.raises(roptim.RoptimValueError, match=r"at least one step's, got 1 of 2 for the first step$"):
        finder.range_test(iter([1]), accumulation_steps=2)


# ---- validation ---------------------------------------------------------------------------------------------


def test_validation_loss() -> None:
    train, test = batched(regression(), 16), batched(regression(1), 32)
    x = np.zeros(5)
    opt = SGD([x], lr=0.1)

    def loss_and_gradients(batch: Any) -> Any:
        loss, gradient = line(x, batch)
        return loss, [gradient]

    def step(batch: Any) -> float:
        loss, gradient = line(x, batch)
        opt.step([gradient])
        return loss

    def evaluate(data: Any) -> float:
        return float(np.mean([line(x, batch)[0] for batch in data]))

    w, want = np.zeros(5), []
    for i in range(10):
        w = w - 1e-3 * 100 ** (i / 9) * line(w, train[i % 4])[1]
        want.append(np.mean([line(w, batch)[0] for batch in test]))
    for finder in (
        LRFinder(opt, loss_and_gradients=loss_and_gradients),
        LRFinder(opt, loss_and_gradients=loss_and_gradients, evaluate=evaluate),
        LRFinder(opt, step, evaluate=evaluate),
    ):
        before = snapshot(opt)
        finder.range_test(train, 1e-3, 0.1, 10, validation=test)
        assert np.allclose(finder.history["raw_loss"], want, rtol=1e-12)
        assert snapshot(opt) == before
    finder = LRFinder(opt, loss_and_gradients=loss_and_gradients)
    finder.range_test(train, 1e-3, 0.1, 10, validation=lambda: iter(test))
    assert np.allclose(finder.history["raw_loss"], want, rtol=1e-12)
    for kind, wrong, sentence in (
        (roptim.RoptimTypeError, iter(test), "data that can be gone through after each step, got an object of type "),
        (roptim.RoptimTypeError, 3, "an iterable, or a function that returns one, got an object of type int"),
        (roptim.RoptimValueError, [], "at least one batch, got none"),
    ):
        with pytest.raises(kind, match=f"^LRFinder.range_test: validation must be {sentence}"):
            finder.range_test(train, validation=wrong)
    with pytest.raises(
        roptim.RoptimValueError, match=r"^LRFinder.range_test: validation must be None without evaluate"
    ):
        LRFinder(opt, step).range_test(train, validation=test)
    assert snapshot(opt) == before


# ---- optimizers that take closures --------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, entry in REGISTRY.items() if entry["needs_closure"]])
@pytest.mark.parametrize("form", ["step", "returned", "in grad"])
def test_optimizers_that_evaluate_the_loss_several_times(name: str, form: str) -> None:
    data = batched(regression(), 16)
    p = Parameter(np.zeros(5))
    opt = getattr(roptim, name)([p], max_iter=2, lr=0.1)

    def loss_and_gradients(batch: Any) -> Any:
        loss, gradient = line(p, batch)
        if form == "returned":
            return loss, [gradient]
        p.grad = gradient
        return loss

    def step(batch: Any) -> float:
        loss: float = opt.step(lambda: loss_and_gradients(batch))
        return loss

    opt.step(lambda: loss_and_gradients(data[0]))
    before = snapshot(opt)
    finder = LRFinder(opt, step) if form == "step" else LRFinder(opt, loss_and_gradients=loss_and_gradients)
    finder.range_test(data, 1e-3, 1.0, 12)
    assert snapshot(opt) == before
    by_hand = []
    for i, lr in enumerate(finder.history["lr"]):
        opt.param_groups[0]["lr"] = lr
        by_hand.append(step(data[i % 4]))
    assert finder.history["raw_loss"] == by_hand
    if form == "returned":
        opt = getattr(roptim, name)([p], max_iter=2, lr=0.1)
        big, small = batched(regression(), 32), batched(regression(), 8)
        finder = LRFinder(opt, loss_and_gradients=loss_and_gradients)
        want = finder.range_test(big, 1e-3, 0.1, 4).history["raw_loss"]
        got = finder.range_test(small, 1e-3, 0.1, 4, accumulation_steps=4).history["raw_loss"]
        assert np.allclose(got, want, rtol=1e-9)


# ---- suggestions --------------------------------------------------------------------------------------------


def with_curve(lr: Any, loss: Any) -> LRFinder:
    finder = LRFinder(SGD([np.zeros(1)]), lambda batch: 1.0)
    lr, loss = [float(x) for x in lr], [float(x) for x in loss]
    finder.history = {"lr": lr, "loss": loss, "raw_loss": loss}
    return finder


def test_the_steepest_point_is_that_over_the_logarithm() -> None:
    lr = np.logspace(-6, 0, 61)
    falling = 1 / (1 + np.exp(5 * (np.log10(lr) + 3)))  # steepest at 1e-3
    assert with_curve(lr, falling).suggestion() == pytest.approx(1e-3)
    assert with_curve(lr, falling + 3).suggestion("steepest", 0, 0) == pytest.approx(1e-3)
    # The same curve at evenly spaced rates: over the rate itself it would be steepest at the smallest ones.
    lr = np.linspace(1e-4, 1e-2, 100)
    falling = 1 / (1 + np.exp(5 * (np.log10(lr) + 3)))
    assert with_curve(lr, falling).suggestion(skip_start=0) == pytest.approx(1e-3, rel=0.06)
    # What is skipped does not count.
    lr = np.logspace(-6, 0, 61)
    cliffs = -0.01 * np.arange(61.0)
    cliffs[3:] -= 5
    cliffs[30:] -= 1
    cliffs[58:] -= 9
    assert with_curve(lr, cliffs).suggestion() in (lr[29], lr[30])
    assert with_curve(lr, cliffs).suggestion(skip_start=0, skip_end=5) in (lr[2], lr[3])
    assert with_curve(lr, cliffs).suggestion(skip_end=0) in (lr[57], lr[58])


def test_the_valley_and_a_tenth_of_the_minimum() -> None:
    lr = np.logspace(-6, 0, 61)
    loss = np.concatenate([np.linspace(0.9, 0.95, 20), np.linspace(1, 0.1, 31), np.linspace(0.2, 2, 10)])
    finder = with_curve(lr, loss)
    # From point 20, where it begins to fall, to point 50, the lowest.
    assert finder.suggestion("valley") == lr[40]
    assert finder.suggestion("minimum/10") == lr[50] / 10
    assert finder.suggestion("minimum/10", skip_end=15) == lr[45] / 10
    assert finder.suggestion("valley", 26, 0) == lr[26 + 2 * 24 // 3]
    # A bump inside of the valley is passed over, and a deeper but shorter one does not count.
    loss[30] = 5
    assert with_curve(lr, loss).suggestion("valley") == lr[40]
    loss = np.concatenate([np.linspace(1, 0.5, 40), [3.0, -1.0], np.full(19, 4.0)])
    assert with_curve(lr, loss).suggestion("valley", 0) == lr[2 * 41 // 3], "the last point of it is the lowest"


@given(st.lists(st.integers(0, 12), min_size=2, max_size=40))
def test_the_valley_is_the_longest_falling_subsequence(heights: list[int]) -> None:
    lengths: list[int] = []
    before: list[int] = []
    for i, height in enumerate(heights):
        higher = [j for j in range(i) if heights[j] > height]
        lengths.append(1 + max((lengths[j] for j in higher), default=0))
        before.append(max((j for j in higher if lengths[j] == lengths[i] - 1), default=i))
    end = begin = lengths.index(max(lengths))
    while before[begin] != begin:
        begin = before[begin]
    lr = [float(i + 1) for i in range(len(heights))]
    finder = with_curve(lr, heights)
    if max(lengths) == 1:
        with pytest.raises(roptim.RoptimValueError, match=r"falling somewhere"):
            finder.suggestion("valley", 0, 0)
    else:
        assert finder.suggestion("valley", 0, 0) == lr[begin + 2 * (end - begin) // 3]


@pytest.mark.parametrize("method", ["steepest", "valley", "minimum/10"])
def test_curves_that_suggest_nothing(method: str) -> None:
    place = "LRFinder.suggestion"
    lr = np.logspace(-6, 0, 61)
    for loss in (np.ones(61), np.linspace(1, 2, 61)):
        with pytest.raises(
            roptim.RoptimValueError,
            match=f"^{place}: the loss must be falling somewhere, got a loss that never falls; begin at a smaller lr, "
            "or take more iterations$",
        ):
            with_curve(lr, loss).suggestion(method)
    few = "the number of recorded points must be 17 or more with skip_start=10 and skip_end=5"
    with pytest.raises(
        roptim.RoptimValueError, match=f"^{place}: {few}, got 16; lower these two, or take more iterations$"
    ):
        with_curve(lr[:16], -lr[:16]).suggestion(method)
    assert with_curve(lr[:17], -lr[:17]).suggestion(method) > 0
    assert with_curve(lr[:2], -lr[:2]).suggestion(method, 0, 0) > 0
    with pytest.raises(roptim.RoptimValueError, match=f"^{place}: {few}, got 0; call range_test first$"):
        with_curve([], []).suggestion(method)
    for name in ("skip_start", "skip_end"):
        with pytest.raises(roptim.RoptimValueError, match=f"^{place}: {name} must be a whole number >= 0, got -1$"):
            with_curve(lr, -lr).suggestion(method, **{name: -1})
        with pytest.raises(roptim.RoptimTypeError, match=f"^{place}: {name} must be a whole number >= 0, got 0.5$"):
            with_curve(lr, -lr).suggestion(method, **{name: 0.5})


def test_a_suggestion_on_a_real_problem() -> None:
    data = batched(regression(rows=256), 16)
    x = Parameter(np.zeros(5))
    opt = SGD([x], lr=1e-5)

    def loss_and_gradients(batch: Any) -> float:
        loss, x.grad = line(x, batch)
        return loss

    finder = LRFinder(opt, loss_and_gradients=loss_and_gradients)
    assert finder.range_test(data).stopped == "diverged"
    for method in ("steepest", "valley", "minimum/10"):
        # Plain gradient descent on these inputs diverges from about 1 on.
        assert 1e-3 < finder.suggestion(method) < 1
        opt.param_groups[0]["lr"] = finder.suggestion(method)
        x[...] = 0
        for batch in data * 20:
            loss_and_gradients(batch)
            opt.step()
        assert line(x, regression(rows=256))[0] < 0.02


# ---- the picture --------------------------------------------------------------------------------------------


@pytest.fixture
def pyplot() -> Iterator[Any]:
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("Agg")
    yield plt
    plt.close("all")


# Older releases of matplotlib call what its parser deprecates.
@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
def test_plot(pyplot: Any, tmp_path: Path) -> None:
    lr = np.logspace(-6, 0, 61)
    loss = np.concatenate([np.linspace(0.9, 0.95, 20), np.linspace(1, 0.1, 31), np.linspace(0.2, 2, 10)])
    finder = with_curve(lr, loss)
    finder.history["raw_loss"] = [x + 0.01 for x in loss]
    ax = finder.plot()
    assert ax.get_xlabel() == "learning rate (log scale)"
    assert ax.get_ylabel() == "loss"
    assert ax.get_xscale() == "log"
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    suggestions = [f"{method}: {finder.suggestion(method):.3g}" for method in ("steepest", "valley", "minimum/10")]
    assert labels == ["loss", "smoothed loss", *suggestions]
    lines = {drawn.get_label(): drawn for drawn in ax.get_lines()}
    assert np.array_equal(lines["smoothed loss"].get_xydata(), np.column_stack([lr, loss])[10:-5])
    assert np.array_equal(lines["loss"].get_ydata(), loss[10:-5] + 0.01)
    assert lines[suggestions[1]].get_xdata()[0] == lr[40]
    bottom, top = ax.get_ylim()
    assert bottom < min(loss[10:-5])
    assert top > max(loss[10:-5])
    ax.figure.savefig(tmp_path / "plot.png")
    finder.history["raw_loss"][30] = 1e6
    assert finder.plot().get_ylim() == (bottom, top), "one loss that explodes hides nothing"

    figure, mine = pyplot.subplots()
    assert finder.plot(mine, log_lr=False, skip_start=0, skip_end=0, suggest=False) is mine
    assert (mine.get_xlabel(), mine.get_xscale()) == ("learning rate", "linear")
    assert len(mine.get_lines()) == 2
    assert len(mine.get_lines()[0].get_xdata()) == 61
    figure.savefig(tmp_path / "mine.png")
    # A curve that suggests nothing is drawn all the same.
    assert len(with_curve(lr, np.ones(61)).plot().get_lines()) == 2
    with pytest.raises(roptim.RoptimValueError, match=r"^LRFinder.plot: the number of recorded points must be 17"):
        with_curve(lr[:3], loss[:3]).plot()
    with pytest.raises(roptim.RoptimValueError, match=r"^LRFinder.plot: skip_end must be a whole number >= 0, got -1$"):
        finder.plot(skip_end=-1)


def test_plot_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib", "matplotlib.pyplot"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        roptim.RoptimRuntimeError,
        match=r"^LRFinder.plot: matplotlib must be installed, got .*; pip install matplotlib$",
    ):
        with_curve(np.arange(1.0, 40), -np.arange(1.0, 40)).plot()


# ---- progress -----------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("has_tqdm", [True, False])
def test_progress(has_tqdm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if has_tqdm:
        pytest.importorskip("tqdm")
    else:
        monkeypatch.setitem(sys.modules, "tqdm", None)
    for stderr, wanted, shown in (
        (Terminal(), True, True),
        (Terminal(), False, False),
        (io.StringIO(), True, False),
        (None, True, False),
    ):
        monkeypatch.setattr(sys, "stderr", stderr)
        finder_of([3.0, 2.0, 1.0, 1.5], progress=wanted)
        if stderr is not None:
            text = stderr.getvalue()
            assert ("range test" in text and "4/4" in text and "loss 1.5" in text) == shown
            assert shown or not text
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with pytest.raises(roptim.RoptimTypeError):
        finder_of([1.0, None])  # type: ignore[list-item]
    assert terminal.getvalue().endswith("\n"), "closed after an error"


def test_nothing_optional_is_imported_with_the_module() -> None:
    code = "import sys, roptim.lr_finder; print([m for m in ('matplotlib', 'tqdm', 'scipy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---- errors -------------------------------------------------------------------------------------------------


def test_arguments_of_the_constructor() -> None:
    opt, f = SGD([np.zeros(1)]), lambda batch: 1.0
    allowed = "arrays, Parameters, optimizers, schedulers, averages and generators in dicts and lists"
    cases: list[tuple[Any, type[Exception], str]] = [
        (lambda: LRFinder(None, f), TypeError, "opt must be an Optimizer, got None"),
        (lambda: LRFinder([1], f), TypeError, "opt must be an Optimizer, got an object of type list"),
        (lambda: LRFinder(opt), ValueError, "step or loss_and_gradients must be given, one of them, got none"),
        (
            lambda: LRFinder(opt, f, loss_and_gradients=f),
            ValueError,
            "step or loss_and_gradients must be given, one of them, got both",
        ),
        (lambda: LRFinder(opt, 3), TypeError, "step must be callable, got an object of type int"),
        (
            lambda: LRFinder(opt, loss_and_gradients="f"),
            TypeError,
            "loss_and_gradients must be callable, got an object of type str",
        ),
        (lambda: LRFinder(opt, f, evaluate=[]), TypeError, "evaluate must be callable, got an object of type list"),
        (
            lambda: LRFinder(opt, f, also=[{"a": [lambda: 1]}]),
            TypeError,
            f"also must be {allowed}, got an object of type function",
        ),
    ]
    for build, kind, sentence in cases:
        with pytest.raises(roptim.RoptimError, match=f"^LRFinder: {sentence}$") as raised:
            build()
        assert isinstance(raised.value, kind)


RANGES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"end_lr": 0.1}, ValueError, "end_lr must be above start_lr = 0.1, got 0.1"),
    ({"end_lr": 0.01}, ValueError, "end_lr must be above start_lr = 0.1, got 0.01"),
    ({"start_lr": 20}, ValueError, "end_lr must be above start_lr = 20.0, got 10.0"),
    ({"end_lr": math.inf}, ValueError, "end_lr must be a finite number > 0, got inf"),
    ({"end_lr": math.nan}, ValueError, "end_lr must be a finite number > 0, got nan"),
    ({"end_lr": 10**400}, ValueError, "end_lr must be a finite number > 0, got 10+(\\.\\.\\.)?"),
    ({"end_lr": "1"}, TypeError, "end_lr must be a finite number > 0, got '1'"),
    ({"end_lr": True}, TypeError, "end_lr must be a finite number > 0, got True"),
    ({"start_lr": 0}, ValueError, "start_lr must be a finite number > 0, got 0"),
    ({"start_lr": -1.0}, ValueError, "start_lr must be a finite number > 0, got -1.0"),
    ({"start_lr": [1]}, TypeError, r"start_lr must be a finite number > 0, got \[1\]"),
    ({"num_iter": 0}, ValueError, "num_iter must be a whole number >= 1, got 0"),
    ({"num_iter": 2.0}, TypeError, "num_iter must be a whole number >= 1, got 2.0"),
    ({"num_iter": True}, TypeError, "num_iter must be a whole number >= 1, got True"),
    ({"step_mode": "log"}, ValueError, "step_mode must be 'exp' or 'linear', got 'log'"),
    ({"step_mode": ["exp"]}, ValueError, r"step_mode must be 'exp' or 'linear', got \['exp'\]"),
    ({"smooth_f": 1}, ValueError, r"smooth_f must be a number in \[0, 1\), got 1"),
    ({"smooth_f": -0.1}, ValueError, r"smooth_f must be a number in \[0, 1\), got -0.1"),
    ({"smooth_f": math.nan}, ValueError, r"smooth_f must be a number in \[0, 1\), got nan"),
    ({"diverge_th": 1}, ValueError, "diverge_th must be a number > 1, got 1"),
    ({"diverge_th": math.nan}, ValueError, "diverge_th must be a number > 1, got nan"),
    ({"diverge_th": None}, TypeError, "diverge_th must be a number > 1, got None"),
    ({"accumulation_steps": 0}, ValueError, "accumulation_steps must be a whole number >= 1, got 0"),
    (
        {"accumulation_steps": 2},
        ValueError,
        "accumulation_steps must be 1 with a step function, got 2; give loss_and_gradients in place of step",
    ),
    (
        {"start_lr": 1.0, "end_lr": 1 + 1e-15},
        ValueError,
        "end_lr must be far enough above start_lr for 100 different rates, got 1.000000000000001 with start_lr = 1.0",
    ),
]


@pytest.mark.parametrize(("kwargs", "kind", "sentence"), RANGES, ids=lambda value: str(value)[:40])
def test_arguments_of_the_test(kwargs: dict[str, Any], kind: type[Exception], sentence: str) -> None:
    opt = SGD([np.zeros(1)], lr=0.1)
    finder = LRFinder(opt, lambda batch: pytest.fail("nothing runs before the arguments are checked"))
    finder.history["lr"].append(1.0)
    before = snapshot(opt)
    with pytest.raises(roptim.RoptimError, match=f"^LRFinder.range_test: {sentence}$") as raised:
        finder.range_test([0], **kwargs)
    assert isinstance(raised.value, kind)
    assert snapshot(opt) == before
    assert finder.history["lr"] == [1.0], "the history of the test before"


def test_learning_rates_that_cannot_be_scaled() -> None:
    class Own(Optimizer):
        def step(self) -> None:  # type: ignore[override]
            pass

    def tested(opt: Optimizer, **kwargs: Any) -> None:
        LRFinder(opt, lambda batch: 1.0).range_test([0], **kwargs)

    x, y = np.zeros(1), np.zeros(1)
    remedy = "the test sets the learning rate itself: give the optimizer a number, without a schedule"
    cases: list[tuple[Optimizer, type[Exception], str]] = [
        (Own([x], {"eta": 0.1}), KeyError, "group 0 must be one with 'lr', got none"),
        (Own([x], {"lr": "fast"}), TypeError, f"lr of group 0 must be a number, got an object of type str; {remedy}"),
        (Own([x], {"lr": lambda t: 0.1}), TypeError, f"lr of group 0 must be a number, .* function; {remedy}"),
        (Own([x], {"lr": math.nan}), ValueError, "lr of group 0 must be a finite number >= 0, got nan"),
        (SGD([x], lr=0.0), ValueError, "start_lr must be given where the first group's lr is 0, got None"),
        (
            SGD([{"params": [x], "lr": 0.0}, {"params": [y], "lr": 0.1}]),
            ValueError,
            "lr of group 0 must be > 0 or that of every group, got 0; the others keep their ratio to it",
        ),
    ]
    for opt, kind, sentence in cases:
        with pytest.raises(roptim.RoptimError, match=f"^LRFinder.range_test: {sentence}$") as raised:
            tested(opt)
        assert isinstance(raised.value, kind)
    # A rate that the optimizer refuses is refused before the first step.
    opt = SGD([{"params": [x], "lr": 1e-300}, {"params": [y], "lr": 1.0}])
    before = snapshot(opt)
    with pytest.raises(ValueError, match=r"^SGD group 1: lr must be a finite number >= 0, got inf$"):
        LRFinder(opt, lambda batch: pytest.fail("no step")).range_test([0], end_lr=1e10)
    assert snapshot(opt) == before


@pytest.mark.parametrize("wrong", [None, "1.0", 1j, (1.0, 2.0), np.ones(2), object(), 10**400])
def test_losses_that_are_no_numbers(wrong: Any) -> None:
    x = np.zeros(1)
    opt = SGD([x], lr=0.1)

    def step(_: Any) -> Any:
        opt.step([np.ones(1)])
        return wrong

    kind = "None" if wrong is None else f"an object of type {type(wrong).__name__}"
    before = snapshot(opt)
    for finder, name, validation in (
        (LRFinder(opt, step), "the loss that step returns", None),
        (LRFinder(opt, loss_and_gradients=lambda _: (wrong, [np.ones(1)])), "the loss of loss_and_gradients", None),
        (
            LRFinder(opt, loss_and_gradients=lambda _: (1.0, [np.ones(1)]), evaluate=lambda _: wrong),
            "the loss that evaluate returns",
            [0],
        ),
    ):
        with pytest.raises(roptim.RoptimTypeError, match=f"^LRFinder.range_test: {name} must be a number, got {kind}$"):
            finder.range_test([0], validation=validation)
        assert snapshot(opt) == before
    assert finder_of([np.array([2.0]), np.float32(1.0), np.array(0.5), 1]).history["loss"] == [2.0, 1.0, 0.5, 1.0]  # type: ignore[list-item]


def test_steps_that_do_not_step() -> None:
    x = np.zeros(1)
    opt = SGD([x], lr=0.1)
    before = snapshot(opt)
    with pytest.raises(
        roptim.RoptimRuntimeError,
        match=r"^LRFinder.range_test: step must be a function that calls opt.step, got one that never did$",
    ):
        LRFinder(opt, lambda batch: 1.0).range_test([0])
    assert snapshot(opt) == before

    # A step of one's own may accumulate: it steps now and then.
    def now_and_then(batch: int) -> float:
        if batch == 3:
            opt.step([np.ones(1)])
        return 1.0

    LRFinder(opt, now_and_then).range_test([1, 2, 3])
    assert snapshot(opt) == before

    def adding(_: Any) -> float:
        opt.step([np.ones(1)] * len(opt.param_groups))
        opt.add_param_group({"params": [np.zeros(1)]})
        return 1.0

    with pytest.raises(
        roptim.RoptimRuntimeError,
        match=r"^LRFinder.range_test: the number of groups must be left alone by the step, got 2 in place of 1",
    ) as raised:
        LRFinder(opt, adding).range_test([0])
    assert "the state of SGD must be put back" in "".join(raised.value.__notes__)
    assert x[0] == 0


def test_a_torn_optimizer_is_refused() -> None:
    x = np.zeros(3)
    opt = roptim.LBFGS([x])

    def closing() -> Any:
        x.flags.writeable = False
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        opt.step(closing)
    x.flags.writeable = True
    with pytest.raises(
        roptim.TornError,
        match=r"^LRFinder.range_test: LBFGS must be whole, got an optimizer that an interrupted step left torn; "
        r"restore the parameters and call load_state_dict$",
    ):
        LRFinder(opt, lambda batch: 1.0).range_test([0])


def test_reset_does_nothing_at_any_time() -> None:
    x = np.zeros(5)
    opt = SGD([x], lr=0.01)
    data = batched(regression(), 8)
    finder = LRFinder(opt, loss_and_gradients=lambda batch: (line(x, batch)[0], [line(x, batch)[1]]))
    finder.reset()
    finder.range_test(data, num_iter=5)
    history = finder.history
    opt.step([np.ones(5)])
    before = snapshot(opt)
    finder.reset()
    assert snapshot(opt) == before
    assert finder.history is history


def test_a_scheduled_learning_rate_is_refused_and_others_go_on() -> None:
    p, q = np.ones(3), np.ones(3)
    schedule = roptim.schedules.linear(0.0, 0.5, 20)
    with pytest.raises(roptim.RoptimTypeError, match="lr of group 0 must be a number, got a schedule"):
        LRFinder(roptim.SGD([p], lr=schedule), loss_and_gradients=lambda _: (1.0, [p])).range_test([0], num_iter=3)
    tested, plain = (roptim.SGD([x], lr=0.1, momentum=schedule) for x in (p, q))
    LRFinder(tested, loss_and_gradients=lambda _: (float(p @ p), [2 * p])).range_test([0], num_iter=5)
    for opt, x in ((tested, p), (plain, q)):
        for _ in range(4):
            opt.step([2 * x])
    assert np.array_equal(p, q)
    assert tested.param_groups[0]["momentum"] == plain.param_groups[0]["momentum"] == schedule(4)


def test_schedulers_and_averages_of_the_step_are_put_back_where_given() -> None:
    p = np.ones(3)
    opt = roptim.SGD([p], lr=0.1)
    inner = [roptim.lr_scheduler.StepLR(opt, 1000), roptim.lr_scheduler.ConstantLR(opt, 1.0, 500)]
    sched = roptim.lr_scheduler.ChainedScheduler(inner)
    average = roptim.swa_utils.AveragedModel([p], buffers=[np.zeros(2)])
    average.update_parameters([p], [np.ones(2)])

    def step(batch: Any) -> float:
        opt.step([2 * p])
        sched.step()
        average.update_parameters([p], [np.full(2, 7.0)])
        return float(p @ p)

    opt.step([2 * p])
    before = sched.state_dict(), average.state_dict()
    LRFinder(opt, step, also=[sched, average]).range_test([0], num_iter=5)
    after = sched.state_dict(), average.state_dict()
    assert after[0] == before[0]
    assert after[1]["n_averaged"] == before[1]["n_averaged"] == 1
    assert all(np.array_equal(a, b) for a, b in zip(after[1]["module"], before[1]["module"], strict=True))
    assert average.buffers[0].tolist() == [1, 1]
    average.update_parameters([p], [np.ones(2)])
    assert average.n_averaged == 2
