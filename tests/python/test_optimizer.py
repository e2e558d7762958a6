"""Groups, state, state dicts, copies, subclasses, threads and processes."""

from __future__ import annotations

import copy
import math
import multiprocessing
import os
import pickle
import re
import threading
from typing import Any

import numpy as np
import pytest
from helpers import Sign, step

import roptim
from roptim import SGD, Adam, AdamW, Optimizer, Parameter
from roptim.optimizer import REGISTRY


def f32(*shape: int, value: float = 1.0) -> Any:
    return np.full(shape, value, np.float32)


def trained(cls: Any, steps: int = 3, **kwargs: Any) -> tuple[Any, list[Any]]:
    shapes = [(3, 1), (5, 1), (2, 2)] if cls is roptim.Muon else [(3,), (5,), (4,)]
    params = [np.linspace(-1, 1, math.prod(shape), dtype=np.float32).reshape(shape) for shape in shapes]
    # Optimizers that take a closure have one vector, and so one learning rate.
    lr = {} if cls.__name__ in REGISTRY and REGISTRY[cls.__name__]["needs_closure"] else {"lr": 0.01}
    opt = cls([{"params": params[:2]}, {"params": params[2], **lr}], **kwargs)
    run(opt, params, range(steps))
    return opt, params


def run(opt: Any, params: list[Any], steps: Any) -> None:
    for at in steps:
        step(opt, [np.sin(np.arange(p.size, dtype=np.float32) + at).reshape(p.shape) for p in params])


def everything(opt: Any, params: list[Any]) -> Any:
    state = opt.state_dict()["state"]
    return [p.tobytes() for p in params], {i: {k: bits(v) for k, v in entry.items()} for i, entry in state.items()}


def bits(value: Any) -> Any:
    if isinstance(value, list):
        return [bits(item) for item in value]
    return value.tobytes() if isinstance(value, np.ndarray) else value


# ---- groups -------------------------------------------------------------------------------------------------


def test_a_learning_rate_set_by_hand_takes_effect() -> None:
    a, b = f32(2), f32(2)
    opt = SGD([{"params": [a]}, {"params": [b], "lr": 0.25}], lr=0.5)
    opt.step([f32(2), f32(2)])
    assert (a[0], b[0]) == (0.5, 0.75)
    for group in opt.param_groups:
        group["lr"] *= 2
    opt.step([f32(2), f32(2)])
    assert (a[0], b[0]) == (-0.5, 0.25)
    opt.param_groups[0].update(lr=0.0, momentum=0.9)
    opt.step([f32(2), None])
    assert a[0] == -0.5
    assert "momentum_buffer" in opt.state[a]


def test_numpy_numbers_are_read_at_the_assignment() -> None:
    a = f32(1)
    lr = np.array(0.5)
    opt = SGD([a], lr=lr)
    lr[...] = 100.0
    opt.step([f32(1)])
    assert a[0] == 0.5
    opt.param_groups[0]["lr"] = np.float32(0.25)
    assert type(opt.param_groups[0]["lr"]) is float
    opt.step([f32(1)])
    assert a[0] == 0.25


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"lr": -1.0}, ValueError, "AdamW: lr must be a finite number >= 0, got -1.0"),
        ({"lr": float("nan")}, ValueError, "AdamW: lr must be a finite number >= 0, got NaN"),
        ({"lr": float("inf")}, ValueError, "AdamW: lr must be a finite number >= 0, got inf"),
        ({"lr": "fast"}, TypeError, "AdamW: lr must be a finite number >= 0, got 'fast'"),
        ({"lr": True}, TypeError, "AdamW: lr must be a finite number >= 0, got True"),
        ({"lr": None}, TypeError, "AdamW: lr must be a finite number >= 0, got None"),
        ({"lr": 1j}, TypeError, "AdamW: lr must be a finite number >= 0, got 1j"),
        ({"lr": np.ones(2)}, TypeError, "AdamW: lr must be a finite number >= 0, got array([1., 1.])"),
        ({"betas": (0.9, 1.0)}, ValueError, "AdamW: betas[1] must be a number in [0, 1), got 1.0"),
        ({"betas": (-0.1, 0.9)}, ValueError, "AdamW: betas[0] must be a number in [0, 1), got -0.1"),
        ({"betas": (0.9,)}, TypeError, "AdamW: betas must be two numbers in [0, 1), got (0.9,)"),
        ({"betas": 0.9}, TypeError, "AdamW: betas must be two numbers in [0, 1), got 0.9"),
        ({"eps": -1e-8}, ValueError, "AdamW: eps must be a finite number >= 0, got -1e-8"),
        ({"weight_decay": -0.1}, ValueError, "AdamW: weight_decay must be a finite number >= 0, got -0.1"),
        ({"amsgrad": 1}, TypeError, "AdamW: amsgrad must be True or False, got 1"),
        ({"decoupled_weight_decay": False}, ValueError, "AdamW: decoupled_weight_decay must be True, got False"),
        (
            {"weigth_decay": 0.1},
            KeyError,
            "AdamW: group key must be a hyperparameter or a name of your own, got 'weigth_decay'; "
            "did you mean 'weight_decay'?",
        ),
    ],
)
def test_refused_hyperparameters(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    exact = f"^{re.escape(message)}$"
    (name,) = change
    if name in ("weigth_decay", "decoupled_weight_decay"):
        with pytest.raises(TypeError):
            AdamW([f32(1)], **change)
    else:
        with pytest.raises(kind, match=exact):
            AdamW([f32(1)], **change)
    with pytest.raises(kind, match=exact):
        AdamW([{"params": [f32(1)], **change}])
    opt = AdamW([f32(1)])
    before = dict(opt.param_groups[0])
    for assign in (
        lambda g: g.__setitem__(name, change[name]),
        lambda g: g.update(change),
        lambda g: g.__ior__(change),
    ):
        with pytest.raises(kind, match=exact) as raised:
            assign(opt.param_groups[0])
        assert isinstance(raised.value, roptim.RoptimError)
        assert dict(opt.param_groups[0]) == before
    with pytest.raises(kind, match=exact):
        opt.add_param_group({"params": [f32(2)], **change}) if len(opt.param_groups) > 1 else AdamW(
            [{"params": [f32(1)], **change}]
        )
    assert len(opt.param_groups) == 1
    a = f32(1)
    assert len(SGD([a], **({"lr": 1.0})).param_groups) == 1


def test_a_refused_update_changes_none_of_its_keys() -> None:
    opt = SGD([f32(1)], lr=0.5)
    with pytest.raises(ValueError, match="nesterov must be False unless momentum > 0"):
        opt.param_groups[0].update(lr=0.1, nesterov=True)
    assert opt.param_groups[0]["lr"] == 0.5
    opt.param_groups[0].update(momentum=0.9, nesterov=True)
    with pytest.raises(ValueError, match="nesterov"):
        opt.param_groups[0]["momentum"] = 0.0
    assert opt.param_groups[0]["momentum"] == 0.9


def test_own_keys_and_scheduler_keys_are_free() -> None:
    opt = AdamW([{"params": [f32(1)], "initial_lr": 0.1, "layer": 3}])
    group = opt.param_groups[0]
    group["max_lr"], group["tag"], group["foreach"] = 1.0, "x", None
    assert (group["initial_lr"], group["layer"], group["tag"]) == (0.1, 3, "x")
    del group["tag"]
    with pytest.raises(KeyError):
        del group["lr"]
    with pytest.raises(KeyError):
        group.clear()
    with pytest.raises(KeyError, match="add_param_group"):
        group["params"] = []


def test_the_list_of_groups_is_not_a_place_for_changes() -> None:
    opt = SGD([f32(1)])
    for change in (
        lambda: opt.param_groups.append({}),
        lambda: opt.param_groups.__setitem__(0, {}),
        lambda: opt.param_groups.pop(),
        lambda: opt.param_groups.clear(),
    ):
        with pytest.raises(TypeError, match="param_groups: the list must be left as it is"):
            change()
    assert len(opt.param_groups) == 1


def test_add_param_group() -> None:
    a, b = f32(1), f32(1)
    opt = SGD({"a": a}, lr=0.5)
    given = {"params": {"b": b}, "lr": 0.25}
    opt.add_param_group(given)
    assert set(given) == {"params", "lr"}
    opt.step({"a": f32(1), "b": f32(1)})
    assert (a[0], b[0]) == (0.5, 0.75)
    with pytest.raises(ValueError, match="must be named like the first group's, got without names"):
        opt.add_param_group({"params": [f32(1)]})
    with pytest.raises(ValueError, match="names must be different, got 'a' twice"):
        opt.add_param_group({"params": {"a": f32(1)}})
    with pytest.raises(TypeError, match="param_group must be a dict, got an object of type list"):
        opt.add_param_group([f32(1)])  # type: ignore[arg-type]
    with pytest.raises(KeyError, match="'params' entry"):
        opt.add_param_group({"lr": 0.1})
    assert len(opt.param_groups) == 2


def test_switches_of_torch() -> None:
    SGD([f32(1)], foreach=True, fused=False, differentiable=False)
    Adam([f32(1)], fused=True, capturable=False)
    with pytest.raises(ValueError, match=r"^Adam: capturable must be False or None, got True"):
        Adam([f32(1)], capturable=True)
    with pytest.raises(ValueError, match=r"^AdamW: differentiable must be"):
        AdamW([f32(1)], differentiable=True)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"backend": "tpu"},
        {"backend": 3},
        {"backend": "cpu:1"},
        {"threads": 0},
        {"threads": 1.5},
        {"threads": "2"},
        {"threads": "many"},
        {"threads": True},
    ],
)
def test_refused_options(kwargs: dict[str, Any]) -> None:
    with pytest.raises(roptim.RoptimError, match=f"^SGD: {next(iter(kwargs))} must be "):
        SGD([f32(1)], **kwargs)


def test_repr_is_torchs() -> None:
    opt = SGD([{"params": [f32(1)]}, {"params": [f32(1)], "lr": 0.5}], lr=0.1)
    assert repr(opt).splitlines() == [
        "SGD (",
        "Parameter Group 0",
        "    dampening: 0",
        "    lr: 0.1",
        "    maximize: False",
        "    momentum: 0",
        "    nesterov: False",
        "    weight_decay: 0",
        "",
        "Parameter Group 1",
        "    dampening: 0",
        "    lr: 0.5",
        "    maximize: False",
        "    momentum: 0",
        "    nesterov: False",
        "    weight_decay: 0",
        ")",
    ]


# ---- state --------------------------------------------------------------------------------------------------


def test_state_by_object_name_and_index() -> None:
    a, b = f32(2), f32(3)
    opt = Adam({"a": a, "b": b})
    assert a not in opt.state
    assert dict(opt.state[a]) == {}
    assert len(opt.state) == 0
    opt.step({"a": f32(2), "b": None})
    assert opt.state[a]["step"] == opt.state["a"]["step"] == opt.state[0]["step"] == 1
    assert type(opt.state[a]["step"]) is int
    assert list(opt.state[a]) == ["step", "exp_avg", "exp_avg_sq"]
    assert [obj is a for obj in opt.state] == [True]
    for key in ("c", 2, -1, True, f32(2), None):
        with pytest.raises(KeyError, match="state: key must be a parameter of this optimizer, its name or its index"):
            opt.state[key]
    with pytest.raises(KeyError):
        opt.state[a]["momentum_buffer"]


def test_state_arrays_are_the_optimizers_own_and_never_move() -> None:
    a = f32(2, 3)
    opt = Adam([a], betas=(0.5, 0.999))
    opt.step([f32(2, 3)])
    m = opt.state[a]["exp_avg"]
    assert m.shape == (2, 3)
    assert np.all(m == 0.5)
    opt.step([f32(2, 3)])
    assert np.all(m == 0.75)
    m[...] = 0.0
    opt.step([f32(2, 3)])
    assert np.all(m == 0.5)
    opt.state[a]["exp_avg"] = f32(2, 3, value=3.0)
    assert np.all(m == 3.0)
    opt.state[a]["step"] = 100
    assert opt.state_dict()["state"][0]["step"] == 100
    with pytest.raises(ValueError, match=r"state: exp_avg must be of shape \(2, 3\), got \(3,\)"):
        opt.state[a]["exp_avg"] = f32(3)
    opt.state = {}
    assert np.all(m == 3.0), "a view outlives the state it showed"
    assert a not in opt.state


def test_reset() -> None:
    fresh_opt, fresh = trained(Adam, steps=0)
    opt, params = trained(Adam)
    for mine, theirs in zip(params, fresh, strict=True):
        mine[...] = theirs
    opt.state = {}
    run(opt, params, range(3))
    run(fresh_opt, fresh, range(3))
    assert everything(opt, params) == everything(fresh_opt, fresh)
    opt.reset(1)
    assert list(opt.state_dict()["state"]) == [0, 2]
    with pytest.raises(ValueError, match="use load_state_dict"):
        opt.state = {0: {}}


# ---- state dicts --------------------------------------------------------------------------------------------


def test_layout_is_torchs() -> None:
    opt, _ = trained(AdamW)
    saved = opt.state_dict()
    assert list(saved) == ["state", "param_groups", "roptim"]
    shapes = [{"shape": p.shape, "dtype": "float32"} for group in opt.param_groups for p in group["params"]]
    about = {"optimizer": "AdamW", "format": 1, "update_count": 3, "skip_count": 0}
    assert saved["roptim"] == {**about, "parameters": dict(enumerate(shapes))}
    assert [group["params"] for group in saved["param_groups"]] == [[0, 1], [2]]
    assert list(saved["state"]) == [0, 1, 2]
    assert list(saved["state"][0]) == ["step", "exp_avg", "exp_avg_sq"]
    assert "param_names" not in saved["param_groups"][0]
    assert SGD([f32(1)]).state_dict()["state"] == {}
    sgd, _ = trained(SGD)
    assert sgd.state_dict()["state"] == {}, "plain SGD has no state, as in torch"
    sgd, _ = trained(SGD, momentum=0.9)
    assert list(sgd.state_dict()["state"][0]) == ["momentum_buffer"]


def test_a_state_dict_is_a_snapshot() -> None:
    opt, params = trained(AdamW)
    saved = opt.state_dict()
    before = copy.deepcopy(saved)
    run(opt, params, range(2))
    assert all(
        np.array_equal(saved["state"][i][key], before["state"][i][key])
        for i in saved["state"]
        for key in saved["state"][i]
    )
    saved["state"][0]["exp_avg"][...] = 77
    saved["param_groups"][0]["lr"] = 77
    assert opt.param_groups[0]["lr"] == 1e-3
    assert not np.any(opt.state[0]["exp_avg"] == 77)


def test_load_then_step_equals_step(optimizer_class: Any, backend: dict[str, Any]) -> None:
    if backend["backend"] not in REGISTRY[optimizer_class.__name__]["backends"]:
        backend = {"backend": "cpu"}
    known = REGISTRY[optimizer_class.__name__]["defaults"]
    settings = {key: value for key, value in (("momentum", 0.9), ("amsgrad", True)) if key in known}
    opt, params = trained(optimizer_class, **settings, **backend)
    other = [p.copy() for p in params]
    again = optimizer_class([{"params": other[:2]}, {"params": other[2]}], lr=7.0, **backend)
    again.load_state_dict(opt.state_dict())
    assert [group["lr"] for group in again.param_groups] == [group["lr"] for group in opt.param_groups]
    run(opt, params, range(3, 6))
    run(again, other, range(3, 6))
    assert everything(opt, params) == everything(again, other)
    assert again.update_count == 6


def test_parameters_are_matched_by_name() -> None:
    a, b = f32(2), f32(2)
    opt = Adam({"a": a, "b": b})
    opt.step({"a": f32(2), "b": f32(2, value=5.0)})
    other = Adam({"b": f32(2), "a": f32(2)})
    other.load_state_dict(opt.state_dict())
    assert np.array_equal(other.state["b"]["exp_avg"], opt.state["b"]["exp_avg"])
    assert not np.array_equal(other.state["a"]["exp_avg"], other.state["b"]["exp_avg"])
    with pytest.raises(ValueError, match='must be named "a", "c", got none for "c" and a surplus "b"; missing='):
        Adam({"a": f32(2), "c": f32(2)}).load_state_dict(opt.state_dict())


def test_what_does_not_fit_is_refused_and_changes_nothing() -> None:
    opt, params = trained(Adam)
    good = opt.state_dict()

    def changed(change: Any) -> Any:
        saved = copy.deepcopy(good)
        change(saved)
        return saved

    def shapes(s: Any) -> None:
        s["state"][1]["exp_avg"] = f32(4)

    def dtypes(s: Any) -> None:
        s["state"][1]["exp_avg"] = np.ones(5)

    def keys(s: Any) -> None:
        s["state"][1]["momentum_buffer"] = f32(5)

    def missing(s: Any) -> None:
        del s["state"][1]["exp_avg_sq"]

    def range_(s: Any) -> None:
        s["param_groups"][1]["lr"] = -1.0

    def counts(s: Any) -> None:
        s["param_groups"][0]["params"] = [0]

    def groups(s: Any) -> None:
        s["param_groups"].pop()

    def cls(s: Any) -> None:
        s["roptim"]["optimizer"] = "SGD"

    def form(s: Any) -> None:
        s["roptim"]["format"] = 2

    def step(s: Any) -> None:
        s["state"][0]["step"] = 1.5

    def ids(s: Any) -> None:
        s["param_groups"][0]["params"] = [0, 7]

    def spelled(s: Any) -> None:
        s["param_groups"][0]["bettas"] = 1

    want = {
        shapes: "exp_avg of parameter 1 must be of shape (5,), got (4,)",
        dtypes: "exp_avg of parameter 1 must be float32, got float64",
        keys: "state key of parameter 1 must be one of exp_avg, exp_avg_sq, max_exp_avg_sq, got momentum_buffer",
        missing: "exp_avg_sq of parameter 1 must be present, got none",
        range_: "lr must be a finite number >= 0, got -1.0",
        counts: "number of parameters in group 0 must be 2, got 1",
        groups: "number of parameter groups must be 2, got 1",
        cls: "state must be of Adam or AdamW, got of SGD",
        form: "state_dict: roptim.format must be 1, got 2; use the roptim version that wrote it",
        step: "state_dict: state[0].step must be an integer from 0 to 2^64 - 1, got the float 1.5",
        ids: "state must be of parameters in the groups, got one for 1",
        spelled: "did you mean 'betas'?",
    }
    before = everything(opt, params), [dict(group) for group in opt.param_groups]
    for change, message in want.items():
        with pytest.raises(roptim.RoptimError, match=re.escape(message)):
            opt.load_state_dict(changed(change))
        after = everything(opt, params), [dict(group) for group in opt.param_groups]
        assert str(after) == str(before), change
    for nonsense in (
        None,
        [],
        {},
        {"state": {}},
        {"state": [], "param_groups": []},
        {"state": {}, "param_groups": 3},
        {"state": {}, "param_groups": [3]},
        {"state": {}, "param_groups": [{}, {}]},
        {"state": {}, "param_groups": [{"params": 3}, {"params": [2]}]},
        {"state": {}, "param_groups": [{"params": ["a", 1]}, {"params": [2]}]},
        {**good, "state": {"a": {}}},
        {**good, "state": {0: 3}},
        {**good, "state": {0: {"step": None}}},
        {**good, "state": {0: {"step": 1, "exp_avg": "x"}}},
        {**good, "roptim": 3},
        {**good, "roptim": {}},
        {**good, "more": 1},
        {**good, "param_groups": [{"params": [0, 1], "lr": object()}, {"params": [2]}]},
    ):
        with pytest.raises(roptim.RoptimError, match=r"^(Adam.load_state_dict|state_dict): "):
            opt.load_state_dict(nonsense)  # type: ignore[arg-type]


def test_a_dict_from_torch_loads_if_it_fits() -> None:
    switches = {"foreach": None, "capturable": False, "differentiable": False, "fused": None}
    group = {"lr": 0.5, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0, "amsgrad": False, "maximize": False}
    state = {0: {"step": np.array(4.0, np.float32), "exp_avg": f32(3), "exp_avg_sq": f32(3, value=2.0)}}
    opt = Adam([f32(3)])
    opt.load_state_dict({"state": state, "param_groups": [{**group, **switches, "params": [0]}]})
    assert opt.state[0]["step"] == 4
    assert opt.update_count == 4
    assert opt.param_groups[0]["betas"] == (0.8, 0.9)
    opt.step([f32(3)])
    sgd = SGD([f32(3)], momentum=0.9)
    sgd.load_state_dict(
        {
            "state": {0: {"momentum_buffer": None}},
            "param_groups": [{"lr": 1.0, "momentum": 0.9, "params": [0], "fused": False}],
        }
    )
    assert 0 not in sgd.state
    with pytest.raises(ValueError, match=r"^SGD.load_state_dict: state_dict must be of SGD, got a state with 'betas'"):
        sgd.load_state_dict({"state": {}, "param_groups": [{**group, "params": [0]}]})


# ---- copies -------------------------------------------------------------------------------------------------


def test_deepcopy_and_pickle_go_on_with_the_same_bits(optimizer_class: Any) -> None:
    for duplicate in (copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))):
        opt, params = trained(optimizer_class)
        opt.note = ["kept"]
        opt.param_groups[1]["mine"] = 3
        again, others = duplicate((opt, params))
        assert type(again) is optimizer_class
        assert again.note == ["kept"]
        assert again.param_groups[1]["mine"] == 3
        assert again.param_groups[1]["params"][0] is others[2]
        assert again.update_count == 3
        run(opt, params, range(3, 5))
        run(again, others, range(3, 5))
        assert everything(opt, params) == everything(again, others)
        again.param_groups[0]["lr"] = 0.125
        assert opt.param_groups[0]["lr"] == REGISTRY[optimizer_class.__name__]["defaults"]["lr"]


def test_a_pickled_optimizer_carries_its_state_in_the_projects_own_format() -> None:
    opt, _ = trained(Adam)
    assert b"__metadata__" in opt.__getstate__()["state"]
    p = pickle.loads(pickle.dumps(Parameter(f32(2), name="x")))
    assert (p.name, p.data.tolist()) == ("x", [1.0, 1.0])


# ---- subclasses ---------------------------------------------------------------------------------------------


def test_an_optimizer_written_in_python() -> None:
    p, q = Parameter(f32(2)), Parameter(f32(2))
    opt = Sign([{"params": [p]}, {"params": [q], "lr": 0.5}])
    p.grad = q.grad = f32(2)
    opt.step()
    assert np.allclose(p.data, 0.9)
    assert np.allclose(q.data, 0.5)
    opt.param_groups[0]["lr"] = 0.4
    opt.step()
    assert np.allclose(p.data, 0.5)
    saved = opt.state_dict()
    assert saved["state"][0]["count"] == 2
    other = Sign([{"params": [Parameter(f32(2))]}, {"params": [Parameter(f32(2))]}])
    other.load_state_dict(saved)
    assert other.state[0]["count"] == 2
    assert other.param_groups[1]["lr"] == 0.5
    other.state[0]["sum"][...] = 9
    assert not np.any(opt.state[0]["sum"] == 9)
    assert "lr: 0.5" in repr(other)
    with pytest.raises(NotImplementedError, match="Optimizer must define step"):
        Optimizer([f32(1)], {}).step()
    again = copy.deepcopy(opt)
    assert again.state[0]["count"] == 2
    with pytest.raises(ValueError, match="state must be of Sign, got of SGD"):
        opt.load_state_dict(trained(SGD)[0].state_dict())


def test_a_subclass_of_an_engine_optimizer() -> None:
    class Halved(SGD):
        def step(self, *args: Any, **kwargs: Any) -> Any:
            return super().step(*args, **kwargs)

    a = f32(1)
    Halved([a], lr=0.5).step([f32(1)])
    assert a[0] == 0.5


# ---- threads and processes ----------------------------------------------------------------------------------


def test_same_bits_for_any_number_of_threads(optimizer_class: Any) -> None:
    outcomes = []
    for threads in (1, 2, 5):
        p = np.linspace(-1, 1, 200_000, dtype=np.float32).reshape(400, 500)
        opt = optimizer_class([p], threads=threads)
        for at in range(3):
            step(opt, [np.sin(p + at)])
        outcomes.append(p.tobytes())
    assert len(set(outcomes)) == 1


def test_concurrent_steps_are_errors_or_steps() -> None:
    p = np.zeros(100_000, np.float32)
    opt = SGD([p], lr=1.0)
    g = np.ones_like(p)
    outcomes: list[str] = []

    def work() -> None:
        for _ in range(50):
            try:
                opt.step([g])
                outcomes.append("step")
            except roptim.ConcurrentStepError:
                outcomes.append("refused")

    threads = [threading.Thread(target=work) for _ in range(6)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert len(outcomes) == 300
    assert np.all(p == -outcomes.count("step"))
    assert opt.update_count == outcomes.count("step")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_steps_in_forked_children() -> None:
    p = np.zeros(300_000, np.float32)
    opt = SGD([p], lr=1.0, threads=2)
    g = np.ones_like(p)
    opt.step([g])  # the pool exists now

    def child(results: Any) -> None:
        for _ in range(3):
            opt.step([g])
        results.put(float(p.min()) if p.min() == p.max() else None)

    context = multiprocessing.get_context("fork")
    for _ in range(5):
        results = context.Queue()
        process = context.Process(target=child, args=(results,))
        process.start()
        assert results.get(timeout=60) == -4.0
        process.join(timeout=60)
        assert process.exitcode == 0
    opt.step([g])
    assert np.all(p == -2.0)


def test_no_reference_is_leaked() -> None:
    import gc
    import weakref

    class Holder:
        pass

    p = Parameter(f32(4))
    opt = Adam([p])
    p.grad = f32(4)
    opt.step()
    p.owner = holder = Holder()  # type: ignore[attr-defined]
    holder.opt = opt  # type: ignore[attr-defined]
    ref = weakref.ref(holder)
    del p, opt, holder
    gc.collect()
    assert ref() is None
