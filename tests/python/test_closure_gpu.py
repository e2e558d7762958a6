"""LBFGS and ConjugateGradient with their vectors on a GPU. The engine's own tests compare points and sums."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import roptim
from roptim import LBFGS, SGD, ConjugateGradient, Parameter

ON_GPU: dict[str, Any] = {"backend": "gpu", "allow_software": True}
METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "LBFGS": (LBFGS, {"lr": 0.5}),
    "LBFGS with search": (LBFGS, {"line_search_fn": "strong_wolfe"}),
    "ConjugateGradient": (ConjugateGradient, {}),
}
Make = Callable[..., Any]
pytestmark = pytest.mark.usefixtures("gpu")


@pytest.fixture(params=list(METHODS))
def make(request: pytest.FixtureRequest) -> Make:
    """Makes an optimizer of each kind in turn, on the GPU unless told otherwise."""
    cls, own = METHODS[request.param]
    return lambda params, **kwargs: cls(params, **{**ON_GPU, **own, **kwargs})


def f32(values: Any) -> Any:
    return np.asarray(values, np.float32)


def bowl(params: list[Any]) -> tuple[float, list[Any]]:
    """Convex, with its minimum at 1 and the axes' weights from 1 to 10."""
    loss, gradients = 0.0, []
    for p in params:
        weights = np.linspace(1, 10, p.size).reshape(p.shape)
        gradients.append((weights * (p - 1)).astype(p.dtype))
        loss += float((weights * np.abs(p - 1) ** 2).sum() / 2)
    return loss, gradients


def start() -> list[Any]:
    rng = np.random.default_rng(0)
    return [f32(rng.standard_normal(shape)) for shape in [(7,), (40, 30), (), (0, 3), (5, 1, 2)]]


def state(opt: Any) -> bytes:
    """All of it, as text in which no two floats are the same."""

    def plain(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return value.dtype.str, value.shape, value.tobytes()
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    return repr(plain(opt.state_dict())).encode()


def bits(params: Any) -> list[bytes]:
    return [np.asarray(p).tobytes() for p in params]


def test_plain_arrays_come_to_the_minimum(make: Make) -> None:
    params = start()
    opt = make(params)
    assert opt.device == make(start(), backend="gpu").device
    for _ in range(4):
        opt.step(lambda: bowl(params))
    assert all(np.abs(p - 1).max(initial=0) < 1e-3 for p in params)


def test_parameters_stay_with_the_host(make: Make) -> None:
    params = [Parameter(p) for p in start()]
    opt = make(params)

    def closure() -> float:
        opt.zero_grad()
        loss, gradients = bowl([p.data for p in params])
        for p, g in zip(params, gradients, strict=True):
            p.grad = g
        return loss

    before = closure()
    assert opt.step(closure) == before
    assert not any(p._on_device for p in params)
    for _ in range(3):
        opt.step(closure)
    assert all(np.abs(p.data - 1).max(initial=0) < 1e-3 for p in params)


def test_a_parameter_that_lived_on_the_device_comes_home(make: Make) -> None:
    p = Parameter(f32([3.0, 4.0]))
    sgd = SGD([p], lr=0.5, **ON_GPU)
    sgd.step([f32([2.0, 2.0])])
    opt = make([p])
    opt.step(lambda: (float((p.data**2).sum()), [2 * p.data]))
    assert not p._on_device
    moved = p.data.copy()
    assert not np.array_equal(moved, [2.0, 3.0])
    sgd.step([f32([2.0, 2.0])])
    assert np.array_equal(p.data, moved - 1)


def test_both_backends_have_the_same_first_step(make: Make) -> None:
    cpu, gpu = start(), start()
    one, two = make(cpu, backend="cpu", allow_software=False), make(gpu)
    losses: list[list[float]] = [[], []]
    for opt, params, seen in ((one, cpu, losses[0]), (two, gpu, losses[1])):

        def closure(params: Any = params, seen: Any = seen) -> Any:
            answer = bowl(params)
            seen.append(answer[0])
            return answer

        opt.step(closure)
    np.testing.assert_allclose(losses[1][:4], losses[0][:4], rtol=1e-5)
    for a, b in zip(cpu, gpu, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3)


@pytest.mark.parametrize("call", [1, 2, 4])
@pytest.mark.parametrize("fault", ["raises", "no gradients", "wrong shape"])
def test_a_closure_that_fails_changes_no_bit(make: Make, fault: str, call: int) -> None:
    params = start()
    opt = make(params)
    opt.step(lambda: bowl(params))
    for p in params:
        p += f32(0.5)
    before, saved, calls = bits(params), state(opt), 0

    def closure() -> Any:
        nonlocal calls
        calls += 1
        loss, gradients = bowl(params)
        if calls < call:
            return loss, gradients
        if fault == "raises":
            raise KeyboardInterrupt
        return loss, None if fault == "no gradients" else [g.reshape(-1)[:-1] for g in gradients]

    with pytest.raises((KeyboardInterrupt, roptim.RoptimError)):
        opt.step(closure)
    assert calls == call
    assert bits(params) == before
    assert state(opt) == saved
    opt.step(lambda: bowl(params))


@pytest.mark.parametrize("to_gpu", [True, False])
def test_state_moves_between_backends_with_its_bits(make: Make, to_gpu: bool, tmp_path: Any) -> None:
    on_cpu = {"backend": "cpu", "allow_software": False}
    params = start()
    first = make(params, **(on_cpu if to_gpu else {}))
    for _ in range(2):
        first.step(lambda: bowl(params))
    second = make([p.copy() for p in params], **({} if to_gpu else on_cpu))
    roptim.save(first.state_dict(), tmp_path / "state")
    second.load_state_dict(roptim.load(tmp_path / "state"))
    assert state(second) == state(first)
    assert second.state_dict()["state"][0]["d"].dtype == np.float32
    with pytest.raises(ValueError, match="read-only"):
        second.state[second.param_groups[0]["params"][0]]["d"][0] = 1.0


@pytest.mark.parametrize("how", ["load_state_dict", "deepcopy", "pickle"])
def test_a_resumed_run_has_the_bits_of_one_that_went_on(make: Make, how: str) -> None:
    params = [Parameter(p) for p in start()]
    opt = make(params, max_iter=3)

    def step(opt: Any, params: Any) -> None:
        opt.step(lambda: bowl([p.data for p in params]))

    step(opt, params)
    if how == "load_state_dict":
        others = [Parameter(p.data.copy()) for p in params]
        other = make(others, max_iter=3)
        other.load_state_dict(opt.state_dict())
    elif how == "deepcopy":
        others, other = copy.deepcopy((params, opt))
    else:
        others, other = pickle.loads(pickle.dumps((params, opt)))
    assert other.device == opt.device
    for _ in range(3):
        step(opt, params)
        step(other, others)
    assert bits(p.data for p in params) == bits(p.data for p in others)
    assert state(opt) == state(other)


def test_complex_numbers_are_pairs(make: Make) -> None:
    z = np.array([1 + 2j, -3j], np.complex64)
    x = z.view(np.float32).copy()
    both = make([z]), make([x])
    for opt, p in zip(both, (z, x), strict=True):
        opt.step(lambda p=p: (float((p.view(np.float32) ** 2).sum()), [p + p]))
    assert z.tobytes() == x.tobytes()


def test_a_group_added_later_and_a_reset(make: Make) -> None:
    params = [f32([1.0, 2.0]), f32([5.0])]
    opt = make(params[:1])
    opt.step(lambda: bowl(params[:1]))
    opt.add_param_group({"params": [params[1]]})
    assert set(opt.state[0]) == {"func_evals", "n_iter"}
    for _ in range(3):
        opt.step(lambda: (bowl(params)[0], [[g] for g in bowl(params)[1]]))
    assert all(np.abs(p - 1).max() < 1e-3 for p in params)
    opt.reset(params[0])
    assert not opt.state


def test_a_step_where_nothing_is_finite_changes_counts_alone(make: Make) -> None:
    params = start()
    opt = make(params)
    before = bits(params)
    opt.step(lambda: (np.nan, bowl(params)[1]))
    assert bits(params) == before
    bad = bowl(params)[1]
    bad[1][3, 4] = np.inf
    opt.step(lambda: (1.0, bad))
    assert bits(params) == before
    assert opt.state[0]["func_evals"] == 2


@pytest.mark.parametrize("dtype", ["float64", "complex128"])
def test_other_dtypes_are_refused(make: Make, dtype: str) -> None:
    allowed = "float32, float16, bfloat16 or complex64 on the GPU"
    with pytest.raises(TypeError, match=rf'^\w+: parameter "w" must be {allowed}, got {dtype}; use backend="cpu" for'):
        make({"w": np.ones(2, dtype)})


def test_half_precision_is_rounded_from_the_vector(make: Make) -> None:
    """The vector is float32, on the device as on the host; a point beyond float16 is none."""
    target = np.array([3.0, -2.0, 0.5, 1e-3], np.float16)
    params = {"w": np.zeros(4, np.float16)}
    opt = make(params)

    def bowl() -> tuple[float, dict[str, Any]]:
        away = params["w"].astype(np.float32) - target
        return 0.5 * float(away @ away), {"w": away}

    for _ in range(5):
        opt.step(bowl)
    assert np.abs(params["w"].astype(np.float32) - target).max() < 2e-2


def test_other_threads_run_while_the_device_works(make: Make) -> None:
    ends = []

    def train() -> None:
        params = start()
        opt = make(params)
        for _ in range(2):
            opt.step(lambda: bowl(params))
        ends.append(bits(params))

    threads = [threading.Thread(target=train) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ends) == 3
    assert ends.count(ends[0]) == 3


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="forks")
def test_a_forked_child_is_refused_and_the_parent_goes_on(make: Make) -> None:
    params = start()
    opt = make(params)
    opt.step(lambda: bowl(params))

    def child(queue: Any) -> None:
        before = bits(params)
        try:
            opt.step(lambda: bowl(params))
        except roptim.DeviceError as error:
            queue.put((str(error), bits(params) == before))
        else:
            queue.put(("stepped", False))

    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=child, args=(queue,))
    process.start()
    message, unchanged = queue.get(timeout=60)
    process.join(60)
    assert process.exitcode == 0
    assert "forked" in message
    assert unchanged
    opt.step(lambda: bowl(params))
