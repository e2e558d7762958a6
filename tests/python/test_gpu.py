"""The GPU as Python users meet it. The engine's own tests compare whole steps over the registry."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from twins import TOLERANCES

import roptim
from roptim import SGD, Adafactor, Adam, AdamW, Muon, Parameter
from roptim.optimizer import REGISTRY

ON_GPU: dict[str, Any] = {"backend": "gpu", "allow_software": True}
pytestmark = pytest.mark.usefixtures("gpu")


def f32(*shape: int, value: float = 1.0) -> Any:
    return np.full(shape, value, np.float32)


def is_software() -> bool:
    return all(device.software for device in roptim.devices()[1:])


def agree(a: Any, b: Any, tolerance: float = 0.0) -> bool:
    """Software adapters compute the CPU's bits; hardware may fuse and approximate (docs/numerics.md)."""
    if not is_software():
        tolerance += 1e-5
    if tolerance == 0.0:
        return bool(np.array_equal(a, b))
    return bool(np.allclose(a, b, rtol=tolerance, atol=tolerance * float(np.mean(np.abs(a))) if np.size(a) else 0.0))


def test_tolerances_are_capped() -> None:
    assert all(tolerance <= 1e-5 for tolerance in TOLERANCES.values())


@pytest.mark.parametrize("kwargs", [{}, {"weight_decay": 0.1, "maximize": True}])
def test_cpu_and_gpu_agree(optimizer_class: Any, kwargs: dict[str, Any]) -> None:
    entry = REGISTRY[optimizer_class.__name__]
    if "gpu" not in entry["backends"]:
        allowed = f'{optimizer_class.__name__}: backend must be "cpu", got "gpu"; this optimizer has no GPU form'
        with pytest.raises(ValueError, match=allowed):
            optimizer_class([np.zeros((2, 2), np.float32)], **ON_GPU)
        return
    if entry["needs_closure"]:
        pytest.skip("tests/python/test_closure_gpu.py has those that take a closure")
    kwargs = {name: value for name, value in kwargs.items() if name in entry["defaults"]}
    if optimizer_class is SGD:
        kwargs = {**kwargs, "momentum": 0.9, "nesterov": True}
    rng = np.random.default_rng(0)
    shapes = [(3,), (70, 33), (), (0, 4), (5, 1, 7)]
    if optimizer_class is Muon:
        shapes = [(3, 1), (70, 33), (1, 1), (0, 4), (5, 140)]
    tolerance = TOLERANCES.get(optimizer_class.__name__, 0.0)
    cpu = [np.asarray(rng.standard_normal(shape), np.float32) for shape in shapes]
    gpu = [p.copy() for p in cpu]
    resident = [Parameter(p.copy()) for p in cpu]
    one = optimizer_class(cpu, lr=0.01, **kwargs)
    two = optimizer_class(gpu, lr=0.01, **kwargs, **ON_GPU)
    three = optimizer_class(resident, lr=0.01, **kwargs, **ON_GPU)
    for step in range(5):
        g = [None if i == step % 3 else np.asarray(rng.standard_normal(s), np.float32) for i, s in enumerate(shapes)]
        one.step(g)
        two.step(g)
        three.step(g)
    for a, b, c in zip(cpu, gpu, resident, strict=True):
        assert agree(a, b, tolerance)
        assert agree(a, c.data, tolerance)
    for i in range(len(shapes)):
        assert list(one.state[i]) == list(two.state[i]) == list(three.state[i])
        for key in one.state[i]:
            assert np.shape(one.state[i][key]) == np.shape(two.state[i][key])
            assert agree(one.state[i][key], two.state[i][key], tolerance)
            assert agree(one.state[i][key], three.state[i][key], tolerance)


def test_slots_of_other_shapes_travel(tmp_path: Any) -> None:
    rng = np.random.default_rng(1)
    start = [np.asarray(rng.standard_normal(shape), np.float32) for shape in [(4, 30, 20), (7,), (3, 5)]]
    cpu, gpu = [p.copy() for p in start], [p.copy() for p in start]
    one, two = Adafactor(cpu), Adafactor(gpu, **ON_GPU)
    g = [np.asarray(rng.standard_normal(p.shape), np.float32) for p in start]
    two.step(g)
    for p, q in zip(cpu, gpu, strict=True):
        p[...] = q
    roptim.save(two.state_dict(), tmp_path / "state")
    one.load_state_dict(roptim.load(tmp_path / "state"))
    assert one.state[0]["row_var"].shape == two.state[0]["row_var"].shape == (4, 30, 1)
    for key, value in one.state[0].items():
        assert np.array_equal(value, two.state[0][key])
    two.load_state_dict(one.state_dict())
    for opt in (one, two):
        opt.step(g)
    assert all(agree(p, q, TOLERANCES["Adafactor"]) for p, q in zip(cpu, gpu, strict=True))


def test_a_parameter_lives_on_the_device() -> None:
    host = f32(4)
    p = Parameter(host)
    opt = SGD([p], lr=0.5, **ON_GPU)
    opt.step([f32(4)])
    assert np.all(p.data == 0.5)
    assert np.all(host == 1.0), "the wrapped array is no longer the parameter's"
    with pytest.raises(ValueError, match="read-only"):
        host[0] = 3.0
    with pytest.raises(ValueError, match="read-only"):
        p.data[0] = 3.0
    p[...] = 2.0
    opt.step([f32(4)])
    assert np.all(np.asarray(p) == 1.5)
    p[1:3] = 7.0
    assert p.data.tolist() == [1.5, 7.0, 7.0, 1.5]
    p.data = np.arange(4)
    with p.host() as array:
        array += 1
    p *= 2
    opt.step([f32(4)])
    assert p.data.tolist() == [1.5, 3.5, 5.5, 7.5]
    assert np.all(p + 1 == p.data + 1)


def test_plain_arrays_are_the_truth() -> None:
    a = f32(4)
    opt = SGD({"a": a}, lr=0.5, **ON_GPU)
    opt.step({"a": f32(4)})
    assert np.all(a == 0.5)
    a[...] = 3.0
    opt.step({"a": f32(4)})
    assert np.all(a == 2.5)


def test_strided_and_fortran_arrays() -> None:
    x = np.zeros((4, 6), np.float32)
    f = np.asfortranarray(f32(3, 2))
    opt = SGD([x[:, ::2], x[:, 1::2], f], lr=1.0, **ON_GPU)
    opt.step([f32(4, 3), f32(4, 3, value=2.0), np.arange(6, dtype=np.float32).reshape(3, 2)])
    assert np.all(x[:, ::2] == -1.0)
    assert np.all(x[:, 1::2] == -2.0)
    assert np.array_equal(f, 1 - np.arange(6).reshape(3, 2))


def test_a_parameter_moves_between_optimizers() -> None:
    p = Parameter(f32(3))
    first, second, third = SGD([p], lr=0.5, **ON_GPU), SGD([p], lr=0.25, **ON_GPU), SGD([p], lr=0.125)
    first.step([f32(3)])
    second.step([f32(3)])
    first.step([f32(3)])
    assert np.all(p.data == -0.25)
    first.step([f32(3)])
    third.step([f32(3)])
    assert np.all(p.data == -0.875)


def test_nothing_is_lost_with_the_optimizer() -> None:
    p = Parameter(f32(3))
    opt = SGD([p], lr=0.5, **ON_GPU)
    opt.step([f32(3)])
    del opt
    assert np.all(p.data == 0.5)


def test_state_is_read_only_copies() -> None:
    p = Parameter(f32(3))
    opt = Adam([p], betas=(0.5, 0.999), **ON_GPU)
    opt.step([f32(3)])
    m = opt.state[p]["exp_avg"]
    assert np.all(m == 0.5)
    with pytest.raises(ValueError, match="read-only"):
        m[0] = 1.0
    with pytest.raises(TypeError, match="state: exp_avg must be read only here"):
        opt.state[p]["exp_avg"] = f32(3)
    opt.reset(p)
    assert p not in opt.state


def test_state_travels_between_devices(tmp_path: Any) -> None:
    cpu, gpu = f32(50), f32(50)
    one, two = AdamW([cpu]), AdamW([gpu], **ON_GPU)
    one.step([np.sin(np.arange(50, dtype=np.float32))])
    gpu[...] = cpu
    roptim.save(one.state_dict(), tmp_path / "state")
    two.load_state_dict(roptim.load(tmp_path / "state"))
    for opt, p in ((one, cpu), (two, gpu)):
        opt.step([np.cos(np.arange(50, dtype=np.float32))])
        assert opt.state[p]["step"] == 2
    assert agree(cpu, gpu)


def test_copies() -> None:
    for duplicate in (copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))):
        p = Parameter(f32(5))
        opt = Adam([p], **ON_GPU)
        opt.step([f32(5)])
        q, again = duplicate((p, opt))
        for x, o in ((p, opt), (q, again)):
            o.step([f32(5, value=2.0)])
            assert o.device == opt.device
            assert x._on_device
        assert np.array_equal(p.data, q.data)


def test_refusals_name_the_remedy() -> None:
    allowed = "float32, float16, bfloat16 or complex64 on the GPU"
    with pytest.raises(TypeError, match=f'^Adam: parameter "w" must be {allowed}, got float64; use backend="cpu"'):
        Adam({"w": np.ones(2)}, **ON_GPU)
    with pytest.raises(roptim.NoAdapterError, match="no-such-device") as raised:
        SGD([f32(1)], backend="gpu:no-such-device", allow_software=True)
    assert isinstance(raised.value, RuntimeError)


@pytest.mark.skipif(not is_software(), reason="a hardware GPU needs no permission")
def test_a_software_adapter_is_used_only_when_asked_for() -> None:
    code = (
        "import numpy as np, roptim\n"
        "def build(**kwargs): return roptim.SGD([np.ones(1, np.float32)], backend='gpu', **kwargs)\n"
        "try: build()\n"
        "except roptim.NoAdapterError as error: assert 'allow_software' in str(error), error\n"
        "else: raise SystemExit('used without being asked for')\n"
        "build(allow_software=True)\n"
        "import os; os.environ['ROPTIM_ALLOW_SOFTWARE'] = '1'; build()\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "ROPTIM_ALLOW_SOFTWARE"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="hides the driver the way Linux finds it")
def test_without_any_adapter() -> None:
    code = (
        "import numpy as np, roptim\n"
        "try: roptim.SGD([np.ones(1, np.float32)], backend='gpu', allow_software=True)\n"
        "except roptim.NoAdapterError as error: print(error)\n"
        "else: raise SystemExit('found one')\n"
    )
    hidden = {**os.environ, "VK_DRIVER_FILES": "/nonexistent.json", "VK_ICD_FILENAMES": "/nonexistent.json"}
    done = subprocess.run([sys.executable, "-c", code], check=True, env=hidden, capture_output=True, text=True)
    assert done.stdout.startswith("SGD: ")
    assert "driver" in done.stdout


def _in_child(opt: Any, results: Any) -> None:
    try:
        opt.step([f32(3)])
    except roptim.ForkedGpuError as error:
        results.put(str(error))
    else:
        results.put("stepped")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_is_refused() -> None:
    opt = SGD([f32(3)], **ON_GPU)
    opt.step([f32(3)])
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    process = context.Process(target=_in_child, args=(opt, results))
    process.start()
    assert "fork" in results.get(timeout=60)
    process.join(timeout=60)
    assert process.exitcode == 0
