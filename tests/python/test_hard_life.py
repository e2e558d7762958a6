"""Hostile objects, arrays that change under the optimizer, and errors that must leave nothing half-done."""

from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import sys
import threading
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

import roptim
from roptim import SGD, Adam, Optimizer, Parameter
from roptim.lr_scheduler import CosineAnnealingLR, LRScheduler, ReduceLROnPlateau, StepLR


def f32(*shape: int, value: float = 1.0) -> Any:
    return np.full(shape, value, np.float32)


# ---- arrays that change -------------------------------------------------------------------------------------


def test_a_gradient_whose_conversion_frees_a_parameter() -> None:
    """The parameters are looked at after every conversion: the step sees the new shape and refuses."""
    code = """
import numpy as np, roptim
W, v = np.ones(1 << 20, np.float32), np.array(1.0, np.float32)
opt = roptim.SGD([W, v], lr=1.0)
class Hostile(np.float32):
    def __array__(self, dtype=None, copy=None):
        W.resize(4, refcheck=False)
        return np.array(1.0, np.float32)
try:
    opt.step([np.ones(1 << 20, np.float32), Hostile(1)])
except roptim.RoptimError as error:
    print(error)
class Liar:
    __class__ = property(lambda self: np.float32)
try:
    opt.step([None, Liar()])
except TypeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "must be a numpy.ndarray" in done.stdout


def test_state_is_refused_as_a_parameter() -> None:
    a = f32(4)
    opt = Adam([a])
    opt.step([f32(4)])
    for _ in range(2):
        with pytest.raises(
            ValueError, match="parameter 1 must be memory of its own, got memory of state of parameter 0"
        ):
            opt.add_param_group({"params": [opt.state[0]["exp_avg"]]})
        opt.load_state_dict(opt.state_dict())
    assert len(opt.param_groups) == 1


@pytest.mark.filterwarnings("ignore:Setting the strides")
def test_an_array_that_moves_onto_another_stays_refused() -> None:
    base = np.zeros(8, np.float32)
    a, b = base[:4].view(), base[4:].view()
    opt = SGD([a, b], lr=1.0)
    opt.step([f32(4), f32(4)])
    b.strides = (-4,)
    for _ in range(2):
        with pytest.raises(ValueError, match="memory"):
            opt.step([f32(4), f32(4)])
    b.strides = (4,)
    opt.step([f32(4), f32(4)])
    assert np.all(base == -2.0)


# ---- Python code in odd places ------------------------------------------------------------------------------


def test_values_that_run_python_code_while_they_are_read(backend: dict[str, Any]) -> None:
    """Nothing is locked meanwhile: reading the Parameter inside must not hang."""
    p = Parameter(f32(2, value=0.5))
    opt = SGD([p], lr=0.5, **backend)
    p.grad = f32(2)
    opt.step()

    class FromParameter:
        def __float__(self) -> float:
            return float(p.data[0]) + 0.25

    done = []

    def work() -> None:
        opt.param_groups[0]["lr"] = FromParameter()
        opt.add_param_group({"params": [Parameter(f32(1))], "lr": FromParameter()})
        done.append(True)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(timeout=60)
    assert done, "the assignment hung"
    assert [group["lr"] for group in opt.param_groups] == [0.25, 0.25]


def test_finalizers_may_read_parameters(backend: dict[str, Any]) -> None:
    p = Parameter(f32(2))
    opt = SGD([p], **backend)

    class Cycle:
        def __init__(self) -> None:
            self.me = self

        def __del__(self) -> None:
            p.data.sum()

    thresholds = gc.get_threshold()

    def work() -> None:
        for _ in range(50):
            Cycle()
            opt.state_dict()
            opt.param_groups[0]["lr"] = 0.1

    thread = threading.Thread(target=work, daemon=True)
    gc.set_threshold(1, 1, 1)
    try:
        thread.start()
        thread.join(timeout=60)
    finally:
        gc.set_threshold(*thresholds)
    assert not thread.is_alive(), "a finalizer hung"


# ---- groups show what the engine uses -----------------------------------------------------------------------


def test_a_group_shows_what_the_engine_uses() -> None:
    opt = Adam([f32(2)])
    group = opt.param_groups[0]
    betas = [0.5, 0.9]
    group["betas"] = betas
    betas[0] = 0.1
    assert group["betas"] == (0.5, 0.9)
    group["betas"] = np.array([0.25, 0.75])
    assert group["betas"] == (0.25, 0.75)
    group["lr"] = Fraction(1, 4)
    assert group["lr"] == 0.25
    assert type(group["lr"]) is float
    group["weight_decay"] = 0
    assert type(group["weight_decay"]) is int
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    pickle.loads(pickle.dumps(opt))
    opt.param_groups[0] |= {"lr": 0.125}
    assert opt.param_groups[0]["lr"] == 0.125


def test_parameters_of_a_group_stay() -> None:
    opt = SGD({"a": f32(2)})
    group = opt.param_groups[0]
    for change in (
        lambda: group["params"].append(f32(1)),
        lambda: group["params"].__setitem__(0, f32(2)),
        lambda: group.__setitem__("params", []),
        lambda: group.__setitem__("param_names", ["b"]),
        lambda: group.pop("param_names"),
    ):
        with pytest.raises((TypeError, KeyError), match=r"add_param_group|must be kept"):
            change()
    assert opt.state_dict()["param_groups"][0]["params"] == [0]


def test_names() -> None:
    for names, message in [
        (["a", "a"], "names must be different, got 'a' twice"),
        (["a"], "param_names must be 2 names, got 1"),
        (5, "param_names must be a list of strings, got 5"),
        ([1, 2], "names must be strings, got 1"),
        (["a", "\ud800"], "names must be text that UTF-8 can hold"),
    ]:
        with pytest.raises((ValueError, TypeError), match=f"^SGD: {message}"):
            SGD([{"params": [f32(1), f32(1)], "param_names": names}])
    with pytest.raises(ValueError, match="text that UTF-8 can hold"):
        SGD({"\ud800": f32(1)})
    assert SGD([{"params": [f32(1)], "param_names": ["é"]}]).param_groups[0]["param_names"] == ["é"]


# ---- all or nothing -----------------------------------------------------------------------------------------


def test_a_load_that_fails_late_changes_nothing() -> None:
    class NoCopy:
        def __deepcopy__(self, memo: Any) -> Any:
            raise RuntimeError("not copied")

    opt = Adam([f32(2)])
    opt.step([f32(2)])
    before = opt.state_dict()
    bad = {**before, "param_groups": [{**before["param_groups"][0], "lr": 0.7, "mine": NoCopy()}]}
    bad["state"] = {0: {**before["state"][0], "step": 99}}
    with pytest.raises(RuntimeError):
        opt.load_state_dict(bad)
    assert opt.state[0]["step"] == 1
    assert opt.param_groups[0]["lr"] == 1e-3


def test_own_keys_are_the_files() -> None:
    opt = SGD([f32(1)], lr=0.1)
    CosineAnnealingLR(opt, 10)
    opt.load_state_dict({"state": {}, "param_groups": [{"lr": 0.01, "mine": 3, "params": [0]}]})
    assert "initial_lr" not in opt.param_groups[0]
    assert opt.param_groups[0]["mine"] == 3
    assert CosineAnnealingLR(opt, 10).base_lrs == [0.01]


def test_state_is_assigned_as_a_whole() -> None:
    opt = Adam([f32(2)])
    opt.step([f32(2)])
    before = {key: np.array(value) for key, value in opt.state[0].items()}
    for bad in (
        {"exp_avg": f32(2), "exp_avg_sq": f32(3)},
        {"exp_avg": f32(2), "nonsense": 1},
        {"exp_avg": f32(2), "step": 0},
        {"exp_avg": f32(2), "step": 2**64},
        {"exp_avg": f32(2), "step": "x"},
        {"exp_avg": np.array(["7", "x"])},
        5,
    ):
        with pytest.raises(roptim.RoptimError, match=r"^state: "):
            opt.state[0] = bad
        assert all(np.array_equal(opt.state[0][key], before[key]) for key in before)
    opt.state[0] = {"exp_avg": f32(2, value=3.0), "step": 7}
    assert opt.state[0]["step"] == 7
    assert np.all(opt.state[0]["exp_avg"] == 3.0)


@pytest.mark.parametrize("missing", ["step", "exp_avg"])
def test_a_state_without_what_it_needs_is_refused(missing: str) -> None:
    opt = Adam([f32(2)])
    opt.step([f32(2)])
    saved = opt.state_dict()
    del saved["state"][0][missing]
    with pytest.raises(ValueError, match=f"{missing} of parameter 0 must be present"):
        opt.load_state_dict(saved)


def test_repeated_indices_are_refused() -> None:
    opt = Adam([f32(2), f32(2)])
    opt.step([f32(2), f32(2)])
    saved = opt.state_dict()
    saved["param_groups"][0]["params"] = [0, 0]
    with pytest.raises(ValueError, match="indices of parameters must be different, got 0 twice"):
        opt.load_state_dict(saved)


def test_a_write_that_fails_leaves_the_device_in_step(backend: dict[str, Any]) -> None:
    p = Parameter(f32(4))
    opt = SGD([p], lr=0.5, **backend)
    opt.step([f32(4)])
    with np.errstate(divide="raise"), pytest.raises(FloatingPointError):
        np.divide(p, np.zeros(4, np.float32), out=p)
    shown = np.array(p.data)
    opt.step([np.zeros(4, np.float32)])
    assert np.array_equal(p.data, shown)
    p.data = 1.0
    for bad, kind in (
        (np.array(["7", "x", "8", "9"]), TypeError),
        (np.ones(4) * 1j, TypeError),
        (np.ones(3), ValueError),
    ):
        with pytest.raises(kind, match=r"^Parameter.data: value must be"):
            p[...] = bad
    opt.step([f32(4)])
    assert np.all(p.data == 0.5)


def test_a_schedule_writes_all_groups_or_none() -> None:
    class Bad(LRScheduler):
        values = (0.5, 0.5)

        def get_lr(self) -> Any:
            return list(self.values)

    opt = SGD([{"params": [f32(1)]}, {"params": [f32(1)]}], lr=0.1)
    sched = Bad(opt)
    opt.step([None, None])
    for values in ((0.25, float("nan")), (0.25,), (0.25, "x")):
        sched.values = values  # type: ignore[assignment]
        with pytest.raises(roptim.RoptimError):
            sched.step()
        assert [group["lr"] for group in opt.param_groups] == [0.5, 0.5]
        assert sched.last_epoch == 0


# ---- bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("params", [[[]], {"a": []}, [{"params": []}], [{"params": []}, {"params": {}}]])
def test_no_parameter_at_all(params: Any) -> None:
    with pytest.raises(ValueError, match=r"^SGD: params must be at least one array, got an empty container$"):
        SGD(params)


def test_deep_and_recursive_containers() -> None:
    cycle: list[Any] = []
    cycle.append(cycle)
    with pytest.raises(ValueError, match="params must be within 100 containers, got one more"):
        SGD(cycle)


def test_schedulers_keep_out_what_is_not_theirs() -> None:
    opt = SGD([f32(1)])
    sched = StepLR(opt, 3)
    good = sched.state_dict()
    for bad, message in [
        ({**good, "step": 5}, "key must be of the scheduler's state, got 'step'"),
        ({**good, "last_epoch": "x"}, "last_epoch must be of type int, got an object of type str"),
        ({**good, "base_lrs": 3}, "base_lrs must be of type list, got an object of type int"),
        ({"last_epoch": 1}, "state_dict must be of StepLR, got a state without 'step_size'"),
        (5, "state_dict must be a dict, got an object of type int"),
    ]:
        with pytest.raises(roptim.RoptimError, match=f"^StepLR.load_state_dict: {message}"):
            sched.load_state_dict(bad)  # type: ignore[arg-type]
    sched.step_size = 0
    opt.step([None])
    with pytest.raises(ValueError, match="step_size must be a whole number >= 1, got 0"):
        sched.step()
    with pytest.raises(TypeError, match="metrics must be a number, got 'x'"):
        ReduceLROnPlateau(opt).step("x")


def test_an_optimizer_written_in_python_refuses_odd_states() -> None:
    class Own(Optimizer):
        def step(self, closure: Any = None) -> Any:  # type: ignore[override]
            for p in self.param_groups[0]["params"]:
                self.state[p]["n"] = 1

    with pytest.raises(ValueError, match='backend must be "cpu" for an optimizer written in Python'):
        Own([f32(1)], {}, backend="gpu")
    opt = Own([Parameter(f32(1)), Parameter(f32(1))], {"lr": 1.0})
    opt.step()
    good = opt.state_dict()
    group = good["param_groups"][0]
    for change in (
        {"roptim": 5},
        {"state": {"x": 1}},
        {"state": {0: 5}},
        {"state": {7: {}}},
        {"param_groups": [{}]},
        {"param_groups": [{**group, "params": 5}]},
        {"param_groups": [{**group, "params": [[], []]}]},
        {"param_groups": [{**group, "params": [0, 0]}]},
    ):
        with pytest.raises(roptim.RoptimError, match=r"^Own.load_state_dict: "):
            opt.load_state_dict({**good, **change})
        assert opt.state[0] == {"n": 1}
    opt.load_state_dict(good)


@pytest.mark.parametrize("name", ["SGD", "Adam", "Adafactor"])
def test_accumulated_gradients_are_of_one_run(name: str) -> None:
    """A load forgets them; nothing copies or saves an optimizer as if it had none."""
    p, g = np.zeros((2, 2), np.float32), np.ones((2, 2), np.float32)
    opt = getattr(roptim, name)([p], lr=1.0)
    opt.step([g])
    saved, before = opt.state_dict(), p.copy()
    opt.accumulate([g])
    with pytest.warns(UserWarning, match="gradients that were accumulated are not part of it"):
        opt.state_dict()
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(roptim.RoptimValueError, match=f"copy of {name}: sums of gradients must be none"):
            copied(opt)
    opt.load_state_dict(saved)
    with pytest.raises(TypeError, match="gradients must be given"):
        opt.step()
    assert np.array_equal(p, before)
    opt.step([2 * g])
    q = np.zeros_like(p)
    twin = getattr(roptim, name)([q], lr=1.0)
    twin.step([g])
    twin.step([2 * g])
    assert np.array_equal(p, q)


def test_groups_are_not_exchanged() -> None:
    opt = SGD([np.ones(2)], lr=0.5)
    for groups in ([], [{"params": [], "lr": 5.0}], list(opt.param_groups), None):
        with pytest.raises(roptim.RoptimTypeError, match="param_groups must be the list that it is") as told:
            opt.param_groups = groups
        assert "add_param_group" in str(told.value)
    opt.param_groups = opt.param_groups
    assert [group["lr"] for group in opt.param_groups] == [0.5]


def test_files_refuse_what_they_cannot_hold(tmp_path: Any) -> None:
    for tree in ("\ud800", {"\ud800": 1}, 10**5000):
        with pytest.raises(ValueError, match=r"^roptim.save: "):
            roptim.save(tree, tmp_path / "x")
    for path in ("", "a\0b", "a\ud800"):
        with pytest.raises(ValueError, match="path must be the name of a file"):
            roptim.save(1, path)
    with pytest.raises(TypeError, match="path must be a path, got an object of type int"):
        roptim.load(3)  # type: ignore[arg-type]
    for call in (lambda: roptim.save(1, tmp_path / "x", progress=5), lambda: roptim.load(tmp_path / "x", progress=5)):  # type: ignore[arg-type]  # that is the point
        with pytest.raises(roptim.RoptimTypeError, match="progress must be None or callable, got 5"):
            call()
    assert not (tmp_path / "x").exists()
    roptim.save(1, bytes(tmp_path / "x"))  # type: ignore[arg-type]
    assert roptim.load(tmp_path / "x") == 1


def test_odd_calls() -> None:
    opt = SGD([{"params": [f32(1)], 3: "a key of one's own"}])  # type: ignore[dict-item]
    assert "3: a key" in repr(opt)
    with pytest.raises(TypeError, match=r"SGD.step: closure must be callable, got an object of type int"):
        opt.step(closure=5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="gradients must be 1 in number, got 2"):
        opt._engine.step([None, None])  # type: ignore[union-attr]


def test_a_parameter_subclass_is_copied_with_its_attributes() -> None:
    class Tagged(Parameter):
        def __init__(self, data: Any, tag: str = "none") -> None:
            self.tag = tag

        def __new__(cls, data: Any, *args: Any, **kwargs: Any) -> Any:
            return super().__new__(cls, data)

    p = Tagged(f32(2), tag="x")
    p.grad = f32(2)
    q = copy.deepcopy(p)
    assert type(q) is Tagged
    assert (q.tag, q.grad.tolist()) == ("x", [1.0, 1.0])
    assert bool(Parameter(np.zeros(()))) is False
