"""Choosing a device, losing it, its limits, long lives, threads, and checkpoints across backends."""

from __future__ import annotations

import contextlib
import copy
import gc
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
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
    same,
    tolerance,
)

import roptim
from roptim import SGD, Adam, AdamW, DeviceLostError, Parameter, _devices
from roptim.optimizer import register_optimizer_step_post_hook

pytestmark = pytest.mark.usefixtures("gpu")


# ---- which device -------------------------------------------------------------------------------------------


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Seconds of a step by backend, in place of those of this machine."""
    times = {"cpu": 1.0, "gpu": 2.0}
    monkeypatch.setattr(_devices, "_measured", {})
    monkeypatch.setattr(_devices, "_said_before", set())
    monkeypatch.setattr(_devices, "_step_time", lambda backend, *_: times[backend.partition(":")[0]])
    return times


def test_auto_takes_the_faster(measured: dict[str, float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "roptim")
    for seconds, on in ((2.0, "cpu"), (0.5, "gpu")):
        measured["gpu"] = seconds
        _devices._measured.clear()
        for params in (
            f32(3),
            [f32(3), Parameter(f32(2, 2))],
            {"a": f32(3), "b": [f32(2)]},
            [{"params": [f32(3)]}, {"params": f32(2), "lr": 0.1}],
            (f32(n) for n in (1, 2)),
            [("w", f32(3)), ("v", f32(2).astype(np.complex64))],
        ):
            opt = AdamW(params, backend="auto", allow_software=True)
            assert opt.device.startswith("cpu") == (on == "cpu")
            assert sum(len(group["params"]) for group in opt.param_groups) in (1, 2)
            assert copy.deepcopy(opt).device == opt.device
    assert len(caplog.records) == 2, "each choice once"


def test_auto_leaves_generators_inside_groups_alone(measured: dict[str, float]) -> None:
    opt = SGD([{"params": (f32(n) for n in (1, 2))}], backend="auto", allow_software=True)
    assert len(opt.param_groups[0]["params"]) == 2


@pytest.mark.parametrize("seconds", [0.5, 2.0])
def test_auto_where_only_the_cpu_will_do(measured: dict[str, float], seconds: float) -> None:
    measured["gpu"] = seconds
    for name, params in (
        ("SGD", [np.ones(3)]),
        ("SGD", [f32(3), np.ones(3)]),
        ("SGD", [Parameter(np.ones(2, np.complex128))]),
        ("SGD", [{"params": [f32(3)]}, {"params": [np.ones(3)]}]),
        ("SparseAdam", [f32(3)]),
        ("LBFGS", [f32(3)]),
    ):
        opt = getattr(roptim, name)(params, backend="auto", allow_software=True)
        assert opt.device.startswith("cpu")
    for wrong in ([], [3], None, [np.ones(2, np.int32)], {"a": "b"}, [{"params": []}]):
        with pytest.raises(roptim.RoptimError):
            SGD(wrong, backend="auto", allow_software=True)
    if is_software():
        assert SGD([f32(3)], backend="auto").device.startswith("cpu")


def test_auto_measures_without_a_trace() -> None:
    """For real: nobody's hooks see its steps, and what follows computes what it would have."""
    seen: list[Any] = []
    handle = register_optimizer_step_post_hook(lambda opt, *_: seen.append(opt))
    try:
        p, q = f32(3000), f32(3000)
        opt = Adam([p], backend="auto", allow_software=True)
        plain = Adam([q])
        assert seen == []
        for one in (opt, plain):
            one.step([f32(3000)])
        assert seen == [opt, plain]
        assert same(p, q)
    finally:
        handle.remove()


def run(code: str, **environment: str) -> str:
    env = {key: value for key, value in os.environ.items() if not key.startswith("ROPTIM_")}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**env, **environment}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout + done.stderr


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="hides the driver the way Linux finds it")
def test_auto_without_a_gpu() -> None:
    code = (
        "import numpy as np, roptim\n"
        "opt = roptim.AdamW([np.ones(3, np.float32)], backend='auto', allow_software=True)\n"
        "opt.step([np.ones(3, np.float32)])\n"
        "print(opt.device, len(roptim.devices()))\n"
        "opt = roptim.AdamW([np.ones(3, np.float32)], backend='auto')\n"
    )
    said = run(code, VK_DRIVER_FILES="/nonexistent.json", VK_ICD_FILENAMES="/nonexistent.json")
    assert said.startswith("cpu")
    assert " 1\n" in said
    assert said.count("no GPU can be used here") == 1


def test_auto_hears_what_the_environment_allows() -> None:
    if not is_software():
        pytest.skip("a hardware GPU needs no permission")
    code = "import numpy as np, roptim; roptim.AdamW([np.ones(3, np.float32)], backend='auto')"
    assert "takes" in run(code, ROPTIM_ALLOW_SOFTWARE="1"), "it measured"


def test_devices_can_be_named() -> None:
    devices = roptim.devices()
    assert devices[0].backend == "cpu"
    assert SGD([f32(1)], backend=devices[0]).device.startswith("cpu")
    for device in devices[1:]:
        for backend in (device, device.backend, f"gpu: {device.name.upper()} ", f"gpu:{device.name}"):
            p = f32(2)
            opt = SGD([p], lr=1.0, backend=backend, allow_software=True)
            opt.step([f32(2)])
            assert not p.any()
            assert device.name in opt.device
            assert copy.deepcopy(opt).device == opt.device
    for wrong in ("gpu:99", "gpu:-1", "gpu:none of these"):
        with pytest.raises(roptim.NoAdapterError):
            SGD([f32(1)], backend=wrong, allow_software=True)
    for wrong in ("", "GPU", "cuda", "gpu0", "cpu:0", "auto:1"):
        with pytest.raises(ValueError, match="backend"):
            SGD([f32(1)], backend=wrong, allow_software=True)
    for wrong in (None, 0, b"gpu", ["gpu"]):
        with pytest.raises(TypeError, match="backend"):
            SGD([f32(1)], backend=wrong, allow_software=True)


def test_the_command_lists_the_devices() -> None:
    done = subprocess.run([sys.executable, "-m", "roptim", "devices"], capture_output=True, text=True, check=True)
    for device in roptim.devices():
        (line,) = (line for line in done.stdout.splitlines() if line.split()[:1] == [device.backend])
        assert device.name in line
        assert ("allow_software" in line) == device.software


# ---- a lost device ------------------------------------------------------------------------------------------


class Run:
    """An optimizer on the GPU, a checkpoint, and what comes after it without a loss."""

    def __init__(self, kind: str, name: str = "Adam", **options: Any) -> None:
        rng = np.random.default_rng(0)
        start = [draw(rng, (40,)), draw(rng, (3, 5), np.float16), draw(rng, (4,), np.complex64)]
        self.gradients = [[draw(rng, a.shape, a.dtype) for a in start] for _ in range(8)]
        self.params = given(start, kind, names=True)
        self.opt = getattr(roptim, name)(self.params, lr=0.1, **options, **ON_GPU)
        for g in self.gradients[:3]:
            self.opt.step(g)
        self.values = [np.array(p) for p in self.params]
        self.state = self.opt.state_dict()
        after = [v.copy() for v in self.values]
        plain = getattr(roptim, name)(after, lr=0.1, **options)
        plain.load_state_dict(self.state)
        for g in self.gradients[3:]:
            plain.step(g)
        self.after = everything(plain, after)
        for g in self.gradients[3:5]:
            self.opt.step(g)

    def restore(self, order: str) -> None:
        for what in order:
            if what == "s":
                self.opt.load_state_dict(self.state)
                continue
            for p, value in zip(self.params, self.values, strict=True):
                p[...] = value

    def go_on(self) -> None:
        for g in self.gradients[3:]:
            self.opt.step(g)
        assert same(everything(self.opt, self.params), self.after)
        assert not self.opt._engine.torn


NOTICE: dict[str, Callable[[Run], Any]] = {
    "step": lambda run: run.opt.step(run.gradients[5]),
    "data": lambda run: run.params[0].data,
    "state_dict": lambda run: run.opt.state_dict(),
    "slot": lambda run: run.opt.state[0]["exp_avg"],
    "accumulate": lambda run: run.opt.accumulate(run.gradients[5]),
    "sync": lambda run: run.opt.sync(),
    "to": lambda run: run.opt.to("cpu"),
    "deepcopy": lambda run: copy.deepcopy(run.opt),
    "add_param_group": lambda run: run.opt.add_param_group({"params": [f32(7)], "param_names": None}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", ["ps", "sp"])
@pytest.mark.parametrize("notice", NOTICE)
def test_a_run_goes_on_after_a_loss(kind: str, order: str, notice: str) -> None:
    if kind == "arrays" and notice in ("data", "sync"):
        return  # at home anyhow
    run = Run(kind)
    run.opt._engine._lose_device()
    with pytest.raises(DeviceLostError):
        NOTICE[notice](run)
    run.restore(order)
    run.go_on()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", ["ps", "sp"])
@pytest.mark.parametrize("name", ["Adam", "SGD", "NAdam"])
def test_a_loss_that_only_the_restoring_notices(kind: str, order: str, name: str) -> None:
    run = Run(kind, name)
    run.opt._engine._lose_device()
    run.restore(order)
    run.go_on()


def test_a_loss_before_state_of_another_kind_is_loaded() -> None:
    """Whose memory was never made."""
    source = SGD([f32(3)], lr=0.5, momentum=0.9)
    source.step([f32(3)])
    p = Parameter(f32(3))
    opt = SGD([p], lr=0.5, **ON_GPU)
    opt.step([f32(3)])
    opt._engine._lose_device()
    for _ in range(2):
        with pytest.raises(roptim.RoptimRuntimeError):
            opt.step([f32(3)])
    p.data = 1.0
    opt.load_state_dict(source.state_dict())
    opt.step([f32(3)])
    assert np.allclose(p.data, 1 - 0.5 * 1.9)
    later = SGD([Parameter(f32(3))], lr=0.5, **ON_GPU)
    later._engine._lose_device()
    later.load_state_dict(source.state_dict())
    later.step([f32(3)])


@pytest.mark.parametrize("options", [{"nonfinite": "raise"}, {"nonfinite": "skip", "clip_norm": 1.0}])
def test_a_loss_with_the_guard(options: dict[str, Any]) -> None:
    run = Run("Parameters", **options)
    run.opt.step([np.full_like(g, np.nan) for g in run.gradients[5]])
    run.opt._engine._lose_device()
    with pytest.raises(DeviceLostError):
        run.opt.update_count  # noqa: B018
    with contextlib.suppress(roptim.RoptimError):
        run.opt.step(run.gradients[5])
    run.restore("ps")
    run.go_on()


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_goes_on_half_restored(kind: str) -> None:
    for order in ("", "p", "s", "ppp", "ss"):
        if order.startswith("s") and kind == "arrays":
            continue  # the arrays are at home
        run = Run(kind)
        run.opt._engine._lose_device()
        for _ in range(2):
            with pytest.raises(roptim.RoptimRuntimeError):
                run.opt.step(run.gradients[5])
            assert run.opt._engine.torn
        run.restore(order)
        for _ in range(2):
            with pytest.raises(roptim.RoptimRuntimeError, match=r"restore|assign|load_state_dict"):
                run.opt.step(run.gradients[5])
            with pytest.raises(roptim.RoptimRuntimeError):
                run.opt.accumulate(run.gradients[5])
        run.restore("ps")
        run.go_on()


def test_one_parameter_of_several_not_restored() -> None:
    run = Run("Parameters")
    run.opt._engine._lose_device()
    with pytest.raises(DeviceLostError):
        run.opt.step(run.gradients[5])
    for p, value in zip(run.params[:2], run.values, strict=False):
        p.data = value
    run.opt.load_state_dict(run.state)
    with pytest.raises(DeviceLostError, match='"p2"'):
        run.opt.step(run.gradients[5])
    run.params[2][...] = run.values[2]
    run.go_on()


def test_a_lost_value_is_never_shown() -> None:
    run = Run("Parameters")
    p = run.params[0]
    run.opt._engine._lose_device()
    reads: list[Callable[[], Any]] = [
        lambda: p.data,
        lambda: np.asarray(p),
        lambda: p + 1,
        lambda: p[0],
        lambda: repr(p),
        lambda: p.__setitem__(0, 1.0),
        lambda: np.add(p, 1, out=p),
        lambda: p.host().__enter__(),
        lambda: copy.deepcopy(p),
        lambda: SGD([p]),
        lambda: SGD([p], **ON_GPU),
        lambda: run.opt.sync(),
    ]
    for _ in range(2):
        for read in reads:
            with pytest.raises(DeviceLostError, match=r"; ") as raised:
                read()
            assert any(word in str(raised.value) for word in ("assign", "restore", "load_state_dict"))
    p.data = 3.0
    assert (p.data == 3).all()
    with pytest.raises(DeviceLostError):
        run.params[1].data  # noqa: B018
    other = SGD([p], lr=1.0)
    other.step([f32(40)])
    assert (p.data == 2).all()


def test_a_value_that_was_home_is_not_lost() -> None:
    run = Run("Parameters")
    values = [np.array(p) for p in run.params]
    run.opt._engine._lose_device()
    assert same([np.array(p) for p in run.params], values)
    with pytest.raises(DeviceLostError):
        run.opt.step(run.gradients[5])
    assert same([np.array(p) for p in run.params], values), "a step that failed changed nothing"


def test_plain_arrays_keep_the_last_step() -> None:
    run = Run("arrays")
    values = [p.copy() for p in run.params]
    run.opt._engine._lose_device()
    with pytest.raises(DeviceLostError):
        run.opt.step(run.gradients[5])
    assert same(run.params, values)


def test_others_on_and_off_the_lost_device() -> None:
    run, other = Run("Parameters"), Run("Parameters")
    array = roptim.gpu.array(f32(40), allow_software=True)
    run.opt._engine._lose_device()
    later = Run("both")
    later.restore("ps")
    later.go_on()
    for read in (array.numpy, lambda: np.asarray(array), lambda: array.__setitem__(..., f32(40))):
        with pytest.raises(DeviceLostError):
            read()
    with pytest.raises(DeviceLostError):
        other.opt.step(other.gradients[5])
    for one in (run, other):
        with pytest.raises(roptim.RoptimRuntimeError):
            one.opt.step(one.gradients[5])
        one.restore("sp")
    # An array of the lost device is no gradient of the new one.
    for call in (run.opt.step, run.opt.accumulate, Adam([f32(40), f32(3, 5), f32(4)], **ON_GPU).step):
        with pytest.raises(roptim.RoptimError):
            call([array, None, None])
        with pytest.raises(roptim.RoptimError):
            roptim.clip_grad_norm_([array], 1.0)
    fresh = roptim.gpu.array(run.gradients[3][0], allow_software=True)
    run.opt.step([fresh, *run.gradients[3][1:]])
    run.restore("ps")
    for one in (run, other):
        one.go_on()


def test_sums_are_lost_with_the_device() -> None:
    run = Run("Parameters")
    run.opt.accumulate(run.gradients[5])
    run.opt._engine._lose_device()
    with pytest.raises(DeviceLostError):
        run.opt.step()
    run.restore("ps")
    assert not run.opt._engine.has_sums
    run.go_on()


def test_a_device_may_be_lost_again() -> None:
    run = Run("both")
    for order in ("ps", "sp", "ps"):
        run.opt._engine._lose_device()
        with pytest.raises(DeviceLostError):
            run.opt.step(run.gradients[5])
        run.restore(order)
        run.opt.step(run.gradients[3])
    run.restore("sp")
    run.go_on()


def test_a_lost_optimizer_moves_to_the_cpu_once_restored() -> None:
    run = Run("Parameters")
    run.opt._engine._lose_device()
    with pytest.raises(DeviceLostError):
        run.opt.to("cpu")
    run.restore("ps")
    run.opt.to("cpu")
    run.go_on()


# ---- limits -------------------------------------------------------------------------------------------------


@pytest.fixture
def least(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROPTIM_GPU_MIN_LIMITS", "1")


@pytest.mark.usefixtures("least")
@pytest.mark.parametrize("name", GPU_NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_least_limits_change_no_bit(name: str, kind: str) -> None:
    rng = np.random.default_rng(1)
    start = [draw(rng, shape, dtype) for dtype in DTYPES for shape in ((3,), (), (0, 2), (70, 61))]
    start.append(draw(rng, (70_000,)))
    start = accepted(name, start)
    cpu, gpu = given(start, kind), given(start, kind)
    options = {"clip_norm": 5.0, "nonfinite": "skip"}
    one, two = (getattr(roptim, name)(p, lr=0.01, **options, **b) for p, b in ((cpu, {}), (gpu, ON_GPU)))
    for at in range(4):
        g = [None if i % 4 == at else draw(rng, a.shape, a.dtype) for i, a in enumerate(start)]
        if at == 1:
            g[-1].flat[69_999] = np.inf
        there = [
            roptim.gpu.array(x, allow_software=True) if x is not None and i % 3 == 0 else x for i, x in enumerate(g)
        ]
        one.step(g)
        if at == 2:
            two.accumulate(there)
            two.step()
        else:
            two.step(there)
    assert same(everything(one, cpu), everything(two, gpu), tolerance(name))


@pytest.mark.parametrize("kind", ["arrays", "Parameters"] if FULL else ["Parameters"])
@pytest.mark.parametrize("count", [10_000, 70_000] if FULL else [10_000])
def test_many_small_tensors(count: int, kind: str) -> None:
    """With more workgroups than one axis of a grid has, if need be."""
    start = [f32(1 + i % 7, value=i) for i in range(count)]
    cpu, gpu = given(start, kind), given(start, kind)
    one, two = (Adam(p, lr=0.1, clip_norm=10.0, **b) for p, b in ((cpu, {}), (gpu, ON_GPU)))
    for _ in range(2):
        g = [f32(*a.shape, value=1 + i % 3) for i, a in enumerate(start)]
        one.step(g)
        two.step(g)
    assert one.gradient_norm == pytest.approx(two.gradient_norm, rel=1e-13)
    assert same(cpu, gpu)


def test_two_thousand_groups() -> None:
    start = [f32(3, value=i) for i in range(2000)]
    found = []
    for backend in ({}, ON_GPU):
        p = given(start, "Parameters")
        groups = [{"params": [q], "lr": 1e-3 * (i + 1), "weight_decay": 1e-4 * i} for i, q in enumerate(p)]
        opt = AdamW(groups, **backend)
        for _ in range(2):
            opt.step([f32(3, value=1 + i) for i in range(2000)])
            opt.param_groups[7]["lr"] = 0.5
        opt.sync()
        found.append(p)
    assert same(*found)


def test_groups_added_between_steps() -> None:
    """Memory grows; what is in it stays."""
    rng = np.random.default_rng(2)
    opts = [Adam(given([f32(5)], "Parameters"), lr=0.1, nonfinite="skip", **b) for b in ({}, ON_GPU)]
    for at in range(12):
        p = draw(rng, (1 + 100 * at,), DTYPES[at % 4])
        for opt in opts:
            opt.add_param_group({"params": given([p], "both" if at % 2 else "arrays"), "lr": 0.01 * at})
        params = [[q for group in opt.param_groups for q in group["params"]] for opt in opts]
        g = [None if (i + at) % 3 == 0 else draw(rng, q.shape, q.dtype) for i, q in enumerate(params[0])]
        for opt in opts:
            opt.accumulate(g)
            opt.step()
            opt.step(g)
        assert same(everything(opts[0], params[0]), everything(opts[1], params[1]))


@pytest.mark.usefixtures("least")
@pytest.mark.parametrize("kind", ["arrays", "Parameters"] if FULL else ["Parameters"])
def test_a_tensor_beyond_one_binding(kind: str) -> None:
    n = 33_600_000
    start = np.arange(n, dtype=np.float32)
    (p,) = given([start], kind)
    opt = SGD([p], lr=0.5, clip_norm=1e30, **ON_GPU)
    g = np.resize(np.array([1, -2, 3], np.float32), n)
    opt.step([g])
    there = roptim.gpu.array(g, allow_software=True)
    opt.step([there])
    assert np.array_equal(np.asarray(p), start - np.float32(0.5) * g - np.float32(0.5) * g)
    assert opt.gradient_norm == pytest.approx(np.sqrt(n / 3 * 14), rel=1e-13)
    assert np.array_equal(there.numpy(), g)


OUT_OF_MEMORY = """
import gc, resource
import numpy as np, roptim
on = {"backend": "gpu", "allow_software": True}
small = np.ones(8, np.float32)
warm = roptim.Adam([small.copy()], **on)
warm.step([small])
size = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (size + (3 << 30), resource.RLIM_INFINITY))
q = roptim.Parameter(small.copy())
w = np.zeros((1 << 30) // 4, np.float32)
p = roptim.Parameter(w)
for make in (
    lambda: roptim.Adam([q, p], **on),
    lambda: roptim.Adam([{"params": [q]}, {"params": [p]}], **on),
    lambda: warm.add_param_group({"params": [q, p]}),
    lambda: cpu.to("gpu", allow_software=True),
):
    cpu = roptim.SGD([q, p], lr=1.0, momentum=0.9, weight_decay=0.1)
    try:
        make()
    except (roptim.OutOfMemoryError, roptim.DeviceError) as error:
        print(type(error).__name__, error)
    else:
        raise SystemExit("no error")
    gc.collect()
    assert len(warm.param_groups) == 1
    assert not p._on_device and not q._on_device and w.flags.writeable, "registered"
    q.data[0] = 1.0
    roptim.SGD([q, p], lr=1.0).step([small, None])
    cpu.step([small, None])
    assert q.data[0] < 0
warm.step([small])
ok = roptim.Adam([q], **on)
ok.step([small])
q.data
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="bounds memory the way Linux does")
def test_out_of_memory_at_construction() -> None:
    if not is_software():
        pytest.skip("needs a device whose memory is the process's")
    run(OUT_OF_MEMORY)


# ---- long lives ---------------------------------------------------------------------------------------------


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def grows(sizes: list[int], by: int) -> bool:
    """Whether the second half lies above the first by more than this."""
    half = len(sizes) // 2
    return min(sizes[half:]) > min(sizes[half // 2 : half]) + by or sizes[-1] > sizes[half] + 4 * by


needs_proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")


@needs_proc
def test_create_step_drop() -> None:
    sizes = []
    for at in range(2000 if FULL else 200):
        p = [Parameter(f32(20_000)), f32(30), Parameter(f32(70_000).astype(np.float16))]
        opt = Adam(p, clip_norm=1.0, nonfinite="skip", **ON_GPU)
        g = [roptim.gpu.array(f32(20_000), allow_software=True), f32(30), f32(70_000)]
        opt.step(g)
        opt.accumulate(g)
        opt.step()
        if at % 2:
            opt.sync()
        if at % 3 == 0:
            opt.to("cpu")
        if at % 5 == 0:
            opt.state_dict()
        del p, opt, g
        sizes.append(resident())
    assert not grows(sizes, 4 << 20), [size >> 20 for size in sizes[:: len(sizes) // 20]]


@needs_proc
def test_a_long_run_takes_no_more_memory() -> None:
    rng = np.random.default_rng(3)
    shapes = [(100,), (70_000,), (300, 30), (7,), (66_000,)]
    p = [Parameter(draw(rng, shape)) for shape in shapes]
    q = [np.array(x) for x in p]
    opt = Adam(p, lr=0.01, clip_norm=1.0, nonfinite="skip", **ON_GPU)
    plain = Adam(q, lr=0.01, clip_norm=1.0, nonfinite="skip")
    gradients = [draw(rng, shape) for shape in shapes]
    sizes, bytes_ = [], []
    steps = 10_000 if FULL else 300
    for at in range(steps):
        missing = at % 32
        g = [None if missing >> i & 1 else x for i, x in enumerate(gradients)]
        there = [
            roptim.gpu.array(x, allow_software=True) if x is not None and (at + i) % 2 else x for i, x in enumerate(g)
        ]
        opt.step(there)
        if at % 7 == 0:
            opt.accumulate(there)
            opt.step()
        if at % 50 == 49:
            opt.update_count  # noqa: B018
        if at < 100:
            plain.step(g)
            if at % 7 == 0:
                plain.step(g)
        if at == 99:
            assert same(everything(opt, p), everything(plain, q))
        sizes.append(resident())
        bytes_.append(opt._engine.device_bytes)
    assert len(set(bytes_[64:])) == 1
    assert not grows(sizes[64:], 4 << 20), [size >> 20 for size in sizes[:: steps // 20]]


def test_device_bytes_are_given_back_by_a_move() -> None:
    p = Parameter(f32(100_000))
    opt = Adam([p], **ON_GPU)
    opt.step([f32(100_000)])
    assert opt._engine.device_bytes >= 4 * 4 * 100_000
    opt.to("cpu")
    assert opt._engine.device_bytes == 0


def test_two_optimizers_take_turns() -> None:
    rng = np.random.default_rng(4)
    start = [draw(rng, (50,)), draw(rng, (70_000,)), draw(rng, (9,), ml_dtypes.bfloat16)]
    found = []
    for backend in ({}, ON_GPU):
        p, rng = given(start, "Parameters"), np.random.default_rng(5)
        # The parameter in the middle is both's.
        opts = [Adam(p[:2], lr=0.1, nonfinite="skip", **backend), SGD(p[1:], lr=0.1, momentum=0.9, **backend)]
        for at in range(20):
            which = int(rng.integers(2))
            mine = p[:2] if which == 0 else p[1:]
            g = [None if at % 5 == i else draw(rng, q.shape, q.dtype) for i, q in enumerate(mine)]
            opts[which].step(g)
            if at % 6 == 0:
                p[1][:3] = 0.5
        found.append([everything(opts[0], p[:2]), everything(opts[1], p[1:])])
    assert same(*found)


def run_together(work: Callable[[int], object], count: int) -> None:
    """Calls it with 0, 1 … in as many threads, which must come to an end."""
    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive(), "a deadlock"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", [{}, ON_GPU], ids=["cpu", "gpu"])
def test_threads_at_one_optimizer(kind: str, backend: dict[str, Any]) -> None:
    p = given([f32(20_000, value=0.0), f32(5, value=0.0)], kind)
    opt = SGD(p, lr=1.0, nonfinite="skip", **backend)
    g = [f32(20_000), f32(5)]
    steps, surprises = [0] * 4, []
    end = time.monotonic() + (5.0 if FULL else 0.4)

    def work(me: int) -> None:
        acts: list[Callable[[], Any]] = [
            lambda: opt.step(g),
            lambda: opt.update_count,
            lambda: np.array(p[0]) if isinstance(p[0], Parameter) else None,
            lambda: opt.state_dict(),
        ]
        at = me
        while time.monotonic() < end:
            try:
                at += 1
                act = at % 8 if at % 8 < 4 else 0
                acts[act]()
                steps[me] += act == 0
            except roptim.ConcurrentStepError:
                pass
            except BaseException as error:
                surprises.append(error)

    run_together(work, 4)
    assert surprises == []
    assert sum(steps) > 0
    assert opt.update_count == sum(steps)
    assert all((np.asarray(q) == -sum(steps)).all() for q in p)


def in_threads(*works: Callable[[], object]) -> list[int]:
    """How often each ran without being refused because of the others, in some time."""
    counts = [0] * len(works)
    surprises: list[BaseException] = []
    end = time.monotonic() + (5.0 if FULL else 0.4)

    def run(k: int) -> None:
        while time.monotonic() < end and not surprises:
            try:
                works[k]()
                counts[k] += 1
            except roptim.ConcurrentStepError:
                pass
            except BaseException as error:
                surprises.append(error)

    run_together(run, len(works))
    assert surprises == []
    assert sum(counts) > 0
    return counts


def test_no_step_is_lost_between_two_optimizers_of_one_parameter() -> None:
    p = Parameter(f32(1000, value=0.0))
    opts = [SGD([p], lr=1.0, **ON_GPU) for _ in range(2)]
    counts = in_threads(*(lambda opt=opt: opt.step([f32(1000)]) for opt in opts))
    assert counts == [opt.update_count for opt in opts]
    assert (p.data == -sum(counts)).all()


@pytest.mark.parametrize("write", ["part", "operator"])
def test_no_step_is_lost_beside_writes(write: str) -> None:
    p = Parameter(f32(1000, value=0.0))
    opt = SGD([p], lr=1.0, **ON_GPU)

    def change() -> None:
        nonlocal p
        if write == "part":
            p[:1] = 0.0
        else:
            p += 0.0

    steps, _ = in_threads(lambda: opt.step([f32(1000)]), change)
    assert steps == opt.update_count
    assert (p.data[1:] == -steps).all()


def test_arrays_on_the_device_are_written_and_read_beside_steps() -> None:
    g = roptim.gpu.array(f32(70_000), allow_software=True)
    values = f32(70_000)
    p = Parameter(f32(70_000, value=0.0))
    opt = SGD([p], lr=1.0, **ON_GPU)

    def write() -> None:
        g[...] = values

    steps, _, _ = in_threads(lambda: opt.step([g]), write, g.numpy)
    assert (p.data == -steps).all()


def test_threads_with_a_common_parameter() -> None:
    p = Parameter(f32(1000, value=0.0))
    opts = [SGD([p], lr=1.0, **b) for b in (ON_GPU, ON_GPU, {})]
    surprises: list[BaseException] = []
    end = time.monotonic() + (5.0 if FULL else 0.4)

    def work(opt: Any) -> None:
        while time.monotonic() < end:
            try:
                opt.step([f32(1000)])
                p.data  # noqa: B018
            except (roptim.ConcurrentStepError, RuntimeWarning):
                pass  # the warning: a step on the CPU wrote an array that a device had taken over meanwhile
            except BaseException as error:
                surprises.append(error)

    threads = [threading.Thread(target=work, args=(opt,), daemon=True) for opt in opts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive(), "a deadlock"
    assert surprises == []


def test_optimizers_go_while_parameters_live() -> None:
    p = [Parameter(f32(70_000)) for _ in range(3)]
    for at in range(20):
        opt = Adam(p, lr=0.1, nonfinite="skip", **ON_GPU)
        opt.step([f32(70_000), None, roptim.gpu.array(f32(70_000), allow_software=True)])
        if at % 2:
            opt.state_dict()
        del opt
        gc.collect()
    q = [f32(70_000) for _ in range(3)]
    for _ in range(20):
        Adam(q, lr=0.1).step([f32(70_000), None, f32(70_000)])
    assert same([np.array(x) for x in p], q)
    array = roptim.gpu.array(f32(5), allow_software=True)
    opt = SGD([p[0]], lr=1.0, **ON_GPU)
    del p, opt
    gc.collect()
    assert (array.numpy() == 1).all()


# ---- checkpoints --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GPU_NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_are_of_no_backend(name: str, kind: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    start = accepted(name, [draw(rng, shape, dtype) for dtype in DTYPES for shape in ((7, 3), ())])
    names = [f"p{i}" for i in range(len(start))]
    gradients = [
        [None if (i + at) % 4 == 0 else draw(rng, a.shape, a.dtype) for i, a in enumerate(start)] for at in range(6)
    ]
    options = {"lr": roptim.schedules.linear(0.1, 0.01, 10), "clip_norm": 3.0, "nonfinite": "skip"}

    def make(values: list[Any], backend: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        p = dict(zip(names, given(values, kind), strict=True))
        return getattr(roptim, name)(p, **options, **backend), p

    def train(opt: Any, which: slice) -> None:
        for g in gradients[which]:
            opt.step(dict(zip(names, g, strict=True)))
        opt.step({n: None if g is None else np.full_like(g, np.nan) for n, g in zip(names, gradients[0], strict=True)})

    files, ends = [], []
    for i, backend in enumerate(({}, ON_GPU)):
        opt, p = make(start, backend)
        train(opt, slice(0, 3))
        files.append(tmp_path / f"{i}.safetensors")
        roptim.save({"model": {n: np.array(x) for n, x in p.items()}, "opt": opt.state_dict()}, files[i])
        train(opt, slice(3, 6))
        ends.append(everything(opt, list(p.values())))
    if is_software() and tolerance(name) == 0.0:
        assert files[0].read_bytes() == files[1].read_bytes()
    for file, backend in zip(files, (ON_GPU, {}), strict=True):
        saved = roptim.load(file)
        opt, p = make([np.zeros_like(a) for a in start], backend)
        for n, x in p.items():
            x[...] = saved["model"][n]
        opt.load_state_dict(saved["opt"])
        assert (opt.update_count, opt.skip_count) == (3, 1)
        train(opt, slice(3, 6))
        ends.append(everything(opt, list(p.values())))
    assert all(same(end, ends[0], tolerance(name)) for end in ends)
