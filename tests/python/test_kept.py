"""What an optimizer keeps from step to step must not show.

Each step is compared, bit for bit, with that of an optimizer which was made for it: over copies of the parameters, with
the state loaded and gradients copied, so that it has nothing kept.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from helpers import LAYOUTS, fingerprint, laid_out, step

import roptim
from roptim import SGD, Adagrad, Adam, AdamW, Parameter, RMSprop, SparseGrad
from roptim.optimizer import REGISTRY

#: Another value for each hyperparameter that has one; switches are flipped.
OTHER: dict[str, Any] = {
    "lr": 0.05,
    "betas": (0.5, 0.75),
    "eps": 1e-3,
    "weight_decay": 0.125,
    "momentum": 0.75,
    "dampening": 0.25,
    "rho": 0.5,
    "lr_decay": 0.25,
    "lambd": 0.01,
    "alpha": 0.625,
    "t0": 2.0,
    "momentum_decay": 0.1,
    "etas": (0.25, 1.5),
    "step_sizes": (1e-4, 0.25),
    "beta2_decay": -0.5,
    "d": 2.0,
    "ns_coefficients": (3.0, -4.0, 2.0),
    "ns_steps": 2,
    "adjust_lr_fn": "original",
}
#: Optimizers that are given gradients, dense ones too.
DENSE = [name for name, entry in REGISTRY.items() if not (entry["needs_closure"] or entry["needs_sparse"])]
#: Those whose updates are of one element at a time.
ELEMENTWISE = [name for name in DENSE if name not in ("Adafactor", "Muon")]
SHAPES = [(6, 5), (4, 3), (2, 7)]


def draw(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any = np.float32) -> Any:
    x = rng.standard_normal((2, *shape))
    return np.asarray(x[0] + 1j * x[1] if np.dtype(dtype).kind == "c" else x[0]).astype(dtype)


def arrays(rng: np.random.Generator, dtype: Any = np.float32) -> list[Any]:
    return [draw(rng, shape, dtype) for shape in SHAPES]


def objects(opt: Any) -> list[Any]:
    return [p for group in opt.param_groups for p in group["params"]]


def copied(gradient: Any) -> Any:
    """The same gradient in memory of its own, in C order."""
    if gradient is None:
        return None
    return copy.deepcopy(gradient) if isinstance(gradient, SparseGrad) else np.array(gradient, order="C")


def rebuilt(opt: Any, **options: Any) -> Any:
    """An optimizer of the same class that knows what this one's state says, over copies of the parameters."""
    groups = [{"params": [np.array(p) for p in group["params"]]} for group in opt.param_groups]
    fresh = type(opt)(groups, **options)
    fresh.load_state_dict(opt.state_dict())
    return fresh


def checked_step(opt: Any, gradients: list[Any] | None = None, **options: Any) -> None:
    """One step, compared with that of a rebuilt optimizer; without gradients of the Parameters' own."""
    fresh = rebuilt(opt, **options)
    given = [p.grad for p in objects(opt)] if gradients is None else gradients
    others = [copied(gradient) for gradient in given]
    step(opt, gradients)
    step(fresh, others)
    for p, other in zip(objects(opt), objects(fresh), strict=True):
        assert np.asarray(p).tobytes() == np.asarray(other).tobytes()
    assert fingerprint(opt.state_dict()["state"]) == fingerprint(fresh.state_dict()["state"])


def is_changed(name: str, key: str) -> Any:
    """Another value of a hyperparameter."""
    default = REGISTRY[name]["defaults"][key]
    if isinstance(default, bool):
        return not default
    if name == "Adafactor" and key == "eps":
        return (1e-3, 1e-2)
    return OTHER[key]


# ---- hyperparameters ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "key"),
    [
        (name, key)
        for name, entry in REGISTRY.items()
        if not entry["needs_closure"]
        for key in entry["defaults"]
        if key not in (*entry["fixed"], "initial_accumulator_value")
    ],
)
def test_each_hyperparameter_there_and_back(name: str, key: str) -> None:
    rng = np.random.default_rng(1)
    opt = getattr(roptim, name)(arrays(rng))
    gradients = arrays(rng)
    before, other = opt.param_groups[0][key], is_changed(name, key)
    needed = {"momentum": 0.5} if key == "nesterov" and name == "SGD" else {}
    for changes in ({}, {**needed, key: other}, {key: before}, {}, {key: other}, {key: other}, {key: before}):
        for _ in range(2):
            opt.param_groups[0].update(changes)
            checked_step(opt, gradients)


def test_momentum_that_comes_and_goes() -> None:
    """Each change of the kernel, with slots that exist or not, in every order."""
    rng = np.random.default_rng(2)
    settings: list[dict[str, Any]] = [
        {"momentum": 0.0, "nesterov": False, "dampening": 0.0},
        {"momentum": 0.9, "nesterov": False, "dampening": 0.5},
        {"momentum": 0.9, "nesterov": True, "dampening": 0.0},
    ]
    for order in itertools.permutations(range(3)):
        opt = SGD(arrays(rng), lr=0.1)
        for k in (*order, *reversed(order), *order):
            opt.param_groups[0].update(settings[k])
            checked_step(opt, arrays(rng))


def test_rmsprop_in_all_its_forms() -> None:
    rng = np.random.default_rng(3)
    forms = list(itertools.product([0.0, 0.9], [False, True]))
    for first, second in itertools.permutations(forms, 2):
        opt = RMSprop(arrays(rng))
        for momentum, centered in (first, second, first):
            opt.param_groups[0].update({"momentum": momentum, "centered": centered})
            checked_step(opt, arrays(rng))
            checked_step(opt, arrays(rng))


def test_switches_of_torch_change_nothing(optimizer_class: Any) -> None:
    if REGISTRY[optimizer_class.__name__]["needs_closure"]:
        pytest.skip("takes no gradients")
    rng = np.random.default_rng(4)
    opt = optimizer_class(arrays(rng))
    for switch, value in (("capturable", False), ("foreach", False), ("fused", True), ("differentiable", None)):
        checked_step(opt, arrays(rng))
        opt.param_groups[0][switch] = value
        checked_step(opt, arrays(rng))


def test_a_value_that_is_refused_leaves_all_as_it_was(optimizer_class: Any) -> None:
    if REGISTRY[optimizer_class.__name__]["needs_closure"]:
        pytest.skip("takes no gradients")
    rng = np.random.default_rng(5)
    opt = optimizer_class(arrays(rng))
    for _ in range(2):
        checked_step(opt, arrays(rng))
        with pytest.raises(roptim.RoptimError):
            opt.param_groups[0]["lr"] = -1.0
        checked_step(opt, arrays(rng))


@pytest.mark.parametrize("odd", [0, 2, 4])
@pytest.mark.parametrize("name", DENSE)
def test_groups_alike_and_not(name: str, odd: int) -> None:
    """Groups with the same hyperparameters share coefficients: only while they have the same."""
    rng = np.random.default_rng(6)
    opt = getattr(roptim, name)([{"params": [draw(rng, (3, 2)), draw(rng, (2, 2))]} for _ in range(5)])
    group = opt.param_groups[odd]
    before = {key: group[key] for key in REGISTRY[name]["defaults"]}
    changes = {"lr": 0.25, "weight_decay": 0.5, "maximize": True}
    for change in ({}, changes, before, {"lr": 0.125}, before, {"maximize": True}, {"maximize": False}):
        group.update({key: value for key, value in change.items() if key in before and key not in ("fixed",)})
        for _ in range(2):
            checked_step(opt, [draw(rng, p.shape) for p in objects(opt)])


@pytest.mark.parametrize("name", DENSE)
def test_each_group_has_its_own_change_in_turn(name: str) -> None:
    rng = np.random.default_rng(7)
    opt = getattr(roptim, name)([{"params": [draw(rng, (3, 2))]} for _ in range(5)])
    for at in (0, 4, 2, 1, 3, 2, 0, 4):
        opt.param_groups[at]["lr"] *= 2.0 if rng.random() < 0.5 else 0.5
        checked_step(opt, [draw(rng, (3, 2)) if rng.random() < 0.8 else None for _ in range(5)])


# ---- groups and state -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DENSE)
def test_groups_are_added(name: str) -> None:
    rng = np.random.default_rng(8)
    opt = getattr(roptim, name)([draw(rng, (3, 2))])
    for count in range(1, 6):
        for _ in range(2):
            checked_step(opt, [draw(rng, (3, 2)) for _ in range(count)])
        opt.add_param_group({"params": [draw(rng, (3, 2))], **({"lr": 0.5} if count % 2 else {})})


@pytest.mark.parametrize("name", DENSE)
def test_a_group_that_is_refused_leaves_all_as_it_was(name: str) -> None:
    rng = np.random.default_rng(9)
    opt = getattr(roptim, name)(arrays(rng))
    for bad in (objects(opt)[0], objects(opt)[1][:1], np.zeros((2, 2), np.int32), "text"):
        checked_step(opt, arrays(rng))
        with pytest.raises(roptim.RoptimError):
            opt.add_param_group({"params": [draw(rng, (2, 2)), bad]})
        checked_step(opt, arrays(rng))
    with pytest.raises(roptim.RoptimError):
        opt.add_param_group({"params": [draw(rng, (2, 2))], "lr": -1.0})
    checked_step(opt, arrays(rng))


@pytest.mark.parametrize("name", [name for name, entry in REGISTRY.items() if not entry["needs_closure"]])
def test_state_that_is_emptied_or_loaded(name: str) -> None:
    rng = np.random.default_rng(10)
    opt = getattr(roptim, name)(arrays(rng))
    early = None

    def restart() -> None:
        opt.state = {}

    def load() -> None:
        opt.load_state_dict(early)

    def load_without_the_second() -> None:
        saved = opt.state_dict()
        saved["state"].pop(1, None)
        saved["roptim"].get("steps", {}).pop(1, None)
        opt.load_state_dict(saved)

    events: list[Callable[[], None]] = [
        lambda: None,
        restart,
        lambda: opt.reset(1),
        load,
        lambda: opt.reset(0),
        load_without_the_second,
        load,
        lambda: opt.state.clear(),
    ]
    for event in events:
        event()
        if early is None:
            checked_step(opt, arrays(rng))
            early = opt.state_dict()
        for _ in range(2):
            checked_step(opt, arrays(rng))


def test_state_with_other_slots_is_loaded() -> None:
    """What is loaded has no slot that the steps before had, or one that they had not."""
    rng = np.random.default_rng(11)
    pairs: list[tuple[Any, dict[str, Any], dict[str, Any]]] = [
        (SGD, {"momentum": 0.9}, {"momentum": 0.0}),
        (Adam, {"amsgrad": True}, {"amsgrad": False}),
        (AdamW, {"amsgrad": True}, {"amsgrad": False}),
        (RMSprop, {"momentum": 0.9, "centered": True}, {"momentum": 0.0, "centered": False}),
        (RMSprop, {"momentum": 0.9}, {"centered": True}),
    ]
    for cls, one, two in pairs:
        for mine, theirs in ((one, two), (two, one)):
            opt, other = cls(arrays(rng), **mine), cls(arrays(rng), **theirs)
            for _ in range(3):
                checked_step(opt, arrays(rng))
                checked_step(other, arrays(rng))
            opt.load_state_dict(other.state_dict())
            checked_step(opt, arrays(rng))
            opt.load_state_dict(other.state_dict(), hparams="keep")
            opt.param_groups[0].update(mine)
            checked_step(opt, arrays(rng))
            checked_step(opt, arrays(rng))


def test_state_that_is_written_to_is_what_steps_read() -> None:
    rng = np.random.default_rng(12)
    opt = Adam(arrays(rng), amsgrad=True)
    for at in range(4):
        checked_step(opt, arrays(rng))
        opt.state[0]["exp_avg"][...] = draw(rng, SHAPES[0])
        opt.state[1]["exp_avg_sq"] = np.square(draw(rng, SHAPES[1]))
        opt.state[2]["step"] = 10 * at + 1
        checked_step(opt, arrays(rng))


@pytest.mark.parametrize("name", DENSE)
def test_counts_that_differ_within_a_group(name: str) -> None:
    """Neighbours at different steps have different coefficients, however they alternate."""
    rng = np.random.default_rng(13)
    opt = getattr(roptim, name)([draw(rng, (2, 3)) for _ in range(6)], **({"t0": 2.0} if name == "ASGD" else {}))
    for pattern in ("xxxxxx", "x.x.x.", "xxxxxx", ".x.x.x", "xxx...", "xxxxxx", "...xxx", "x....x", "xxxxxx", "xxxxxx"):
        checked_step(opt, [draw(rng, (2, 3)) if x == "x" else None for x in pattern])


@pytest.mark.parametrize("name", DENSE)
def test_every_pattern_of_gradients_after_every_other(name: str) -> None:
    rng = np.random.default_rng(14)
    opt = getattr(roptim, name)([draw(rng, (2, 2)) for _ in range(3)])
    kept = [draw(rng, (2, 2)) for _ in range(3)]
    patterns = list(itertools.product([False, True], repeat=3))
    for one, two in itertools.product(patterns, patterns):
        if rng.random() < 0.2 or sum(one) + sum(two) in (1, 5):
            for pattern in (one, two):
                checked_step(opt, [g if present else None for g, present in zip(kept, pattern, strict=True)])


# ---- gradients ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex64, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("name", DENSE)
def test_gradients_in_ever_other_forms(name: str, dtype: Any) -> None:
    """Any layout after any other, at the same address and elsewhere; wide ones for parameters of 16 bits."""
    if name not in ELEMENTWISE and np.dtype(dtype).kind == "c":
        pytest.skip("takes no complex numbers")
    rng = np.random.default_rng(15)
    params = arrays(rng, dtype)
    opt = getattr(roptim, name)(params)
    same = arrays(rng, dtype)
    gradients: list[Any] = list(same)
    wide = np.dtype(np.float32) if np.dtype(dtype).itemsize == 2 else np.dtype(dtype)
    for _ in range(16):
        for i, shape in enumerate(SHAPES):
            form = rng.integers(8)
            if form < len(LAYOUTS):
                gradients[i] = laid_out(draw(rng, shape, dtype), LAYOUTS[form])
            elif form == 4:
                gradients[i] = same[i]
            elif form == 5:
                gradients[i] = None
            elif form == 6:
                gradients[i] = same[i].view()  # another object there
            else:
                gradients[i] = laid_out(draw(rng, shape, wide), LAYOUTS[rng.integers(4)])
        checked_step(opt, gradients)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", DENSE)
def test_parameters_in_every_layout(name: str, layout: str) -> None:
    rng = np.random.default_rng(16)
    opt = getattr(roptim, name)([laid_out(a, layout if i != 1 else "C") for i, a in enumerate(arrays(rng))])
    same = arrays(rng)
    for at in range(6):
        checked_step(opt, [laid_out(g, LAYOUTS[(at + i) % 4]) if at % 2 else g for i, g in enumerate(same)])


def rows(rng: np.random.Generator, shape: tuple[int, ...]) -> SparseGrad:
    """Some rows, one of them twice."""
    index = rng.integers(0, shape[0], 3)
    return SparseGrad(index, draw(rng, (3, *shape[1:])), shape)


@pytest.mark.parametrize(
    ("cls", "options"), [(SGD, {}), (SGD, {"momentum": 0.9}), (SGD, {"momentum": 0.9, "nesterov": True}), (Adagrad, {})]
)
def test_sparse_gradients_and_dense_ones_alternate(cls: Any, options: dict[str, Any]) -> None:
    rng = np.random.default_rng(17)
    opt = cls(arrays(rng), **options)
    same = arrays(rng)
    for _ in range(40):
        gradients: list[Any] = []
        for i, shape in enumerate(SHAPES):
            form = rng.integers(4)
            gradients.append([rows(rng, shape), same[i], laid_out(same[i], "F"), None][form])
        checked_step(opt, gradients)


def test_sparse_gradients_while_momentum_comes_and_goes() -> None:
    rng = np.random.default_rng(18)
    opt = SGD(arrays(rng))
    for at in range(24):
        opt.param_groups[0]["momentum"] = 0.9 if at % 5 > 1 else 0.0
        checked_step(opt, [rows(rng, shape) if rng.random() < 0.5 else draw(rng, shape) for shape in SHAPES])
        if at % 7 == 6:
            opt.reset(at % 3)


def test_sparse_adam_over_other_rows() -> None:
    rng = np.random.default_rng(19)
    opt = roptim.SparseAdam(arrays(rng))
    for _ in range(12):
        checked_step(opt, [rows(rng, shape) if rng.random() < 0.7 else None for shape in SHAPES])


@pytest.mark.filterwarnings("ignore:Setting the (shape|dtype|strides)")
@pytest.mark.parametrize("name", DENSE)
def test_a_gradient_whose_header_changes(name: str) -> None:
    """The object and the address are those of the step before."""
    rng = np.random.default_rng(20)
    p, g = draw(rng, (4, 3)), draw(rng, (4, 3))
    opt = getattr(roptim, name)([p])
    for _ in range(2):
        checked_step(opt, [g])
    before, state = p.tobytes(), fingerprint(opt)

    def refused(kind: type[Exception], message: str) -> None:
        with pytest.raises(kind, match=message):
            opt.step([g])
        assert (p.tobytes(), fingerprint(opt)) == (before, state)

    g.shape = (3, 4)
    refused(ValueError, r"gradient of parameter 0 must be of shape \(4, 3\), got \(3, 4\)")
    g.shape = (12,)
    refused(ValueError, "shape")
    g.shape = (4, 3)
    for dtype in (np.int32, np.uint32):
        g.dtype = dtype
        refused(TypeError, f"must be float32, got {np.dtype(dtype)}")
    g.dtype = np.dtype(np.float32).newbyteorder()
    refused(ValueError, "native byte order")
    g.dtype = np.dtype(np.float16)
    refused(ValueError, "shape")
    g.dtype = np.dtype(np.float32)
    g.setflags(align=False)
    refused(ValueError, "aligned")
    g.setflags(align=True)
    g.strides = (4, 16)
    checked_step(opt, [g])
    g.strides = (12, 4)
    g.flags.writeable = False
    checked_step(opt, [g])
    checked_step(opt, [g])


@pytest.mark.parametrize("name", DENSE)
def test_other_gradients_at_the_same_address(name: str) -> None:
    rng = np.random.default_rng(21)
    memory = draw(rng, (48,))
    p = draw(rng, (4, 3))
    opt = getattr(roptim, name)([p])
    views = [
        memory[:12].reshape(4, 3),
        memory[:24].reshape(4, 6)[:, ::2],
        memory[:12].reshape(3, 4).T,
        memory[:12].reshape(4, 3),
        memory[:24:2].reshape(4, 3),
        np.broadcast_to(memory[:3], (4, 3)),
        np.broadcast_to(memory[:1], (4, 3)),
        memory[:12].reshape(4, 3),
    ]
    for view in (*views, *reversed(views)):
        memory[...] = draw(rng, (48,))
        checked_step(opt, [view])
    with pytest.raises(ValueError, match="shape"):
        opt.step([memory[:12].reshape(3, 4)])
    with pytest.raises(TypeError, match="float64"):
        opt.step([memory[:24].view(np.float64).reshape(4, 3)])
    checked_step(opt, [views[0]])


# ---- parameters -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, entry in REGISTRY.items() if not entry["needs_closure"]])
def test_parameters_whose_values_are_replaced(name: str) -> None:
    rng = np.random.default_rng(22)
    params = [Parameter(a) for a in arrays(rng)]
    opt = getattr(roptim, name)(params)
    for at in range(8):
        checked_step(opt, arrays(rng))
        i = at % 3
        params[i].data = laid_out(draw(rng, SHAPES[i]), LAYOUTS[at % 4])  # copied into the array
        checked_step(opt, arrays(rng))


@pytest.mark.filterwarnings("ignore:Setting the (shape|dtype|strides)")
@pytest.mark.parametrize("name", DENSE)
def test_parameters_that_are_closed_moved_or_reshaped(name: str) -> None:
    rng = np.random.default_rng(23)
    a, b = draw(rng, (4, 3)), draw(rng, (4, 3))
    opt = getattr(roptim, name)([a, b])
    gradients = [draw(rng, (4, 3)), draw(rng, (4, 3))]
    for _ in range(2):
        checked_step(opt, gradients)
    for p in (a, b):

        def refused(kind: type[Exception], message: str) -> None:
            before = (a.tobytes(), b.tobytes(), fingerprint(opt))
            for _ in range(2):
                with pytest.raises(kind, match=message):
                    opt.step(gradients)
            assert (a.tobytes(), b.tobytes(), fingerprint(opt)) == before

        p.flags.writeable = False
        refused(ValueError, "writeable")
        p.flags.writeable = True
        checked_step(opt, gradients)
        p.shape = (3, 4)
        refused(ValueError, "shape")
        p.shape = (4, 3)
        checked_step(opt, gradients)
        p.dtype = np.int32
        refused(TypeError, "int32")
        p.dtype = np.float32
        checked_step(opt, gradients)
        # Elsewhere, and back to its shape with the same numbers.
        p.resize((4000, 3), refcheck=False)
        refused(ValueError, "shape")
        p.resize((4, 3), refcheck=False)
        checked_step(opt, gradients)
        p.strides = (4, 16)
        checked_step(opt, gradients)
        p.strides = (12, 4)
        checked_step(opt, gradients)


def test_a_parameter_that_was_resized_away_is_not_written_to() -> None:
    """Reallocated memory is found at the very next step, whatever its address was."""
    rng = np.random.default_rng(24)
    a = draw(rng, (1000, 30))
    opt = Adam([a])
    g = draw(rng, (1000, 30))
    for size in (40_000, 100_000, 60_000):
        checked_step(opt, [g])
        others = [np.ones(size, np.float32) for _ in range(3)]
        a.resize((size, 30), refcheck=False)
        a.resize((1000, 30), refcheck=False)
        checked_step(opt, [g])
        assert all(np.all(other == 1.0) for other in others)


@pytest.mark.parametrize("name", DENSE)
def test_two_optimizers_over_the_same_parameters_in_turn(name: str) -> None:
    rng = np.random.default_rng(25)
    params = [Parameter(a) for a in arrays(rng)]
    one, two = getattr(roptim, name)(params), AdamW(params[::-1])
    for at in range(6):
        for p in params:
            p.grad = draw(rng, p.shape) if rng.random() < 0.8 else None
        checked_step(one)
        checked_step(two)
        if at == 3:
            params[1].data = draw(rng, SHAPES[1])


@pytest.mark.parametrize("way", ["pickle", "deepcopy"])
@pytest.mark.parametrize("name", [name for name, entry in REGISTRY.items() if not entry["needs_closure"]])
def test_copies_go_their_own_way(name: str, way: str) -> None:
    rng = np.random.default_rng(26)
    opt = getattr(roptim, name)(arrays(rng))
    gradients = arrays(rng)
    for _ in range(2):
        checked_step(opt, gradients)
    other = pickle.loads(pickle.dumps(opt)) if way == "pickle" else copy.deepcopy(opt)
    checked_step(other, gradients)
    before = [p.tobytes() for p in objects(opt)]
    for _ in range(2):
        other.param_groups[0]["lr"] *= 2
        checked_step(other, gradients)
    assert [p.tobytes() for p in objects(opt)] == before
    checked_step(opt, gradients)
    assert opt.param_groups[0]["lr"] != other.param_groups[0]["lr"]


@pytest.mark.parametrize("name", ["SGD", "AdamW", "RMSprop", "Adafactor", "Muon"])
def test_threads_that_are_limited_in_between(name: str) -> None:
    rng = np.random.default_rng(27)
    opt = getattr(roptim, name)([draw(rng, (400, 250)), draw(rng, (3, 5))], clip_norm=1.0)
    gradients = [draw(rng, (400, 250)), draw(rng, (3, 5))]
    for n in (None, 1, 3, None, 2, 1):
        with contextlib.nullcontext() if n is None else roptim.threads(n):
            checked_step(opt, gradients, clip_norm=1.0)


def test_sums_of_gradients_between_steps_with_gradients() -> None:
    rng = np.random.default_rng(28)
    opt, twin = (Adam([np.ones((20, 3), np.float32), np.ones(5, np.float32)]) for _ in range(2))
    gradients = [draw(rng, (20, 3)), draw(rng, (5,))]
    for at in range(8):
        if at % 3 == 1:
            opt.accumulate(gradients)
            opt.step()
            twin.step([g.copy() for g in gradients])
        else:
            given = gradients if at % 3 else [gradients[0], None]
            opt.step(given)
            twin.step(given)
        assert fingerprint([objects(opt), opt]) == fingerprint([objects(twin), twin])


def test_a_refused_or_skipped_step_in_between() -> None:
    rng = np.random.default_rng(29)
    opt = AdamW(arrays(rng), nonfinite="skip")
    good = arrays(rng)
    bad = [good[0], np.full(SHAPES[1], np.nan, np.float32), None]
    for _ in range(3):
        checked_step(opt, good)
        checked_step(opt, bad, nonfinite="skip")
        with pytest.raises(ValueError, match="shape"):
            opt.step([good[0], good[1], good[0]])
        checked_step(opt, [good[0], None, good[2].copy()])


# ---- memory in common -----------------------------------------------------------------------------------------


def plain(numbers: Any) -> Any:
    """A parameter as an array."""
    return numbers


@pytest.mark.parametrize("wrap", [plain, Parameter])
@pytest.mark.parametrize("zero_grad", [False, True])
@pytest.mark.parametrize("name", DENSE)
def test_a_gradient_that_a_new_parameter_lies_on(name: str, zero_grad: bool, wrap: Any) -> None:
    memory = np.ones(64, np.float32)
    p, g = np.ones((4, 3), np.float32), memory[:12].reshape(4, 3)
    opt = getattr(roptim, name)([wrap(p)])
    for _ in range(3):
        opt.step([g], zero_grad=zero_grad)
    opt.add_param_group({"params": [wrap(memory[10:16].reshape(2, 3))]})
    before = (p.tobytes(), memory.tobytes(), fingerprint(opt))
    for _ in range(2):
        for second in (None, np.ones((2, 3), np.float32)):
            with pytest.raises(ValueError, match=r"gradient of parameter 0 must be memory of its own"):
                opt.step([g, second], zero_grad=zero_grad)
    assert (p.tobytes(), memory.tobytes(), fingerprint(opt)) == before
    checked_step(opt, [memory[20:32].reshape(4, 3), np.ones((2, 3), np.float32)])


@pytest.mark.filterwarnings("ignore:Setting the (shape|dtype|strides)")
@pytest.mark.parametrize("wrap", [plain, Parameter])
@pytest.mark.parametrize("name", DENSE)
def test_a_gradient_that_a_parameter_grows_onto_by_its_strides(name: str, wrap: Any) -> None:
    memory = np.ones(64, np.float32)
    p, g = memory[:12].reshape(4, 3), memory[12:24].reshape(4, 3)
    opt = getattr(roptim, name)([wrap(p)])
    for _ in range(3):
        checked_step(opt, [g])
    for strides in ((24, 4), (20, 4), (12, 16)):
        p.strides = strides
        before = (memory.tobytes(), fingerprint(opt))
        for _ in range(2):
            with pytest.raises(ValueError, match="memory of parameter 0"):
                opt.step([g])
        assert (memory.tobytes(), fingerprint(opt)) == before
        checked_step(opt, [memory[40:52].reshape(4, 3)])
        p.strides = (12, 4)
        checked_step(opt, [g])


@pytest.mark.parametrize("name", DENSE)
def test_parameters_whose_memory_is_made_anew(name: str) -> None:
    """`__setstate__` gives an array other memory, as loading a pickle does."""
    rng = np.random.default_rng(36)
    a, b = draw(rng, (60, 50)), Parameter(draw(rng, (4, 3)))
    opt = getattr(roptim, name)([a, b])
    gradients = [draw(rng, (60, 50)), draw(rng, (4, 3))]
    for _ in range(4):
        checked_step(opt, gradients)
        held = np.full((60, 50), 3, np.float32)
        made: list[Any] = [a, b.data]
        for array in made:
            array.__setstate__(array.__reduce__()[2])
        checked_step(opt, gradients)
        assert np.all(held == 3)


def slots(opt: Any) -> list[tuple[Any, str, Any]]:
    return [
        (p, key, value)
        for p in range(len(objects(opt)))
        for key, value in opt.state[p].items()
        if isinstance(value, np.ndarray) and value.shape == objects(opt)[p].shape
    ]


@pytest.mark.parametrize("name", DENSE)
def test_gradients_in_state_are_refused_after_any_number_of_steps(name: str) -> None:
    rng = np.random.default_rng(30)
    opt = getattr(roptim, name)([draw(rng, (4, 3)), draw(rng, (4, 3))])
    given = [draw(rng, (4, 3)), draw(rng, (4, 3))]
    for count in (1, 5):
        for _ in range(count):
            checked_step(opt, given)
        before = fingerprint([objects(opt), opt])
        for index, _, slot in slots(opt):
            for view in (slot, slot.reshape(3, 4).T, slot[:, ::-1], np.broadcast_to(slot[0], (4, 3))):
                for gradients in ([view, given[1]], [given[0], view], [view, None]):
                    with pytest.raises(ValueError, match=f"memory of state of parameter {index}"):
                        opt.step(gradients)
        for p in objects(opt):
            with pytest.raises(ValueError, match="memory of parameter"):
                opt.step([given[0], p[...]])
        assert fingerprint([objects(opt), opt]) == before
        checked_step(opt, given)


def test_a_slot_that_comes_to_lie_where_a_gradient_was() -> None:
    """Memory of gradients is freed, and the slots that momentum asks for may be given it: the old view of a slot is a
    gradient that steps accepted, until it is a slot."""
    rng = np.random.default_rng(31)
    for n in (12, 1000, 3000):
        for _ in range(20):
            opt = SGD([draw(rng, (n,))], lr=0.1)
            g = draw(rng, (n,))
            address = g.ctypes.data
            for _ in range(3):
                opt.step([g])
            del g
            opt.param_groups[0]["momentum"] = 0.9
            opt.step([draw(rng, (n,))])
            slot = opt.state[0]["momentum_buffer"]
            with pytest.raises(ValueError, match="memory of state of parameter 0"):
                opt.step([slot])
            if slot.ctypes.data == address:
                break


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_view_of_dropped_state_is_a_gradient_until_it_is_not(momentum: float) -> None:
    """After a reset the memory is the view's own; what is allocated then is state again."""
    rng = np.random.default_rng(32)
    opt = SGD([draw(rng, (50,))], lr=0.1, momentum=0.9)
    checked_step(opt, [draw(rng, (50,))])
    old = opt.state[0]["momentum_buffer"]
    with pytest.raises(ValueError, match="memory of state"):
        opt.step([old])
    opt.reset(0)
    opt.param_groups[0]["momentum"] = momentum
    for _ in range(3):
        checked_step(opt, [old])
    opt.load_state_dict(opt.state_dict())
    checked_step(opt, [old])
    if momentum:
        with pytest.raises(ValueError, match="memory of state"):
            opt.step([opt.state[0]["momentum_buffer"]])


def test_a_gradient_of_one_optimizer_is_state_of_another() -> None:
    """Only what a step writes itself is refused."""
    rng = np.random.default_rng(33)
    one, two = Adam([draw(rng, (8,))]), SGD([draw(rng, (8,))], lr=0.1)
    checked_step(one, [draw(rng, (8,))])
    moment = one.state[0]["exp_avg"]
    for _ in range(3):
        checked_step(two, [moment])
        checked_step(one, [draw(rng, (8,))])
    two.add_param_group({"params": [moment]})
    with pytest.raises(ValueError, match="memory of parameter 1"):
        two.step([moment, None])


@pytest.mark.parametrize("count", [2, 7])
def test_many_optimizers_made_and_dropped_over_the_same_memory(count: int) -> None:
    """Addresses come again and again; each optimizer knows only its own."""
    rng = np.random.default_rng(34)
    memory = draw(rng, (count * 12,))
    cells = [memory[12 * i : 12 * i + 12].reshape(4, 3) for i in range(count)]
    for at in range(12):
        p, g = cells[at % count], cells[(at + 1) % count]
        opt = Adam([p])
        for _ in range(2):
            checked_step(opt, [g])
        with pytest.raises(ValueError, match="memory of parameter 0"):
            opt.step([p])


def test_random_lives(optimizer_class: Any) -> None:
    """Everything above in any order."""
    name = optimizer_class.__name__
    entry = REGISTRY[name]
    if entry["needs_closure"] or entry["needs_sparse"]:
        pytest.skip("takes no dense gradients")
    rng = np.random.default_rng(35)
    params = [Parameter(a) for a in arrays(rng)]
    opt = optimizer_class(params)
    flags = [key for key, value in entry["defaults"].items() if value is False and key not in entry["fixed"]]
    same = arrays(rng)
    for _ in range(40):
        event = rng.integers(9)
        group = opt.param_groups[rng.integers(len(opt.param_groups))]
        i = int(rng.integers(len(params)))
        if event == 0:
            group["lr"] = float(rng.choice([0.0, 0.01, 0.1]))
        elif event == 1 and flags:
            # Some switches exclude others.
            with contextlib.suppress(roptim.RoptimError):
                group[flags[rng.integers(len(flags))]] = bool(rng.integers(2))
        elif event == 2:
            opt.reset(i)
        elif event == 3:
            opt.load_state_dict(opt.state_dict())
        elif event == 4 and len(params) < 8:
            params.append(Parameter(draw(rng, (3, 2))))
            same.append(draw(rng, (3, 2)))
            opt.add_param_group({"params": [params[-1]]})
        elif event == 5:
            params[i].data = laid_out(draw(rng, params[i].shape), LAYOUTS[rng.integers(4)])
        elif event == 6:
            opt = copy.deepcopy(opt) if rng.integers(2) else opt
            params = objects(opt)
        elif event == 7 and "momentum" in entry["defaults"] and not group.get("nesterov"):
            group["momentum"] = float(rng.choice([0.0, 0.9]))
        gradients = [[g, None, g.copy(), laid_out(g, "F"), g, g][rng.integers(6)] for g in same]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            checked_step(opt, gradients)


# ---- memory of state ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("elements", [1, 16, 1023, 1024, 1025, 1_048_000, 1_048_448, 1_048_576, 1_048_577])
def test_state_of_every_size_is_memory_of_its_own(elements: int) -> None:
    """Around a page, and around where memory is mapped; views of it outlive everything."""
    rng = np.random.default_rng(37)
    p, g = draw(rng, (elements,)), draw(rng, (elements,))
    opt = Adam([p])
    for _ in range(2):
        checked_step(opt, [g])
    first, second = opt.state[0]["exp_avg"], opt.state[0]["exp_avg_sq"]
    assert not np.shares_memory(first, second)
    assert all(slot.ctypes.data % 64 == 0 and slot.size == elements for slot in (first, second))
    copies = first.copy(), second.copy()
    saved = opt.state_dict()
    opt.reset(0)
    checked_step(opt, [g])
    assert np.array_equal(first, copies[0])
    opt.load_state_dict(saved)
    assert np.array_equal(opt.state[0]["exp_avg"], copies[0])
    checked_step(opt, [first])
    del opt, saved
    assert np.array_equal(first, copies[0])
    assert np.array_equal(second, copies[1])


# ---- what was found -------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Setting the dtype")
def test_a_parameter_whose_dtype_is_another_at_the_address_of_the_one_before() -> None:
    """A dtype with metadata is an object of its own; when it goes, the next one takes its memory."""
    g = np.ones(4, np.float32)
    for _ in range(20):
        p: Any = np.ones(4, np.dtype(np.float32, metadata={"x": 1}))
        opt = SGD([p], lr=1.0)
        opt.step([g])
        p.dtype = np.float32
        p.dtype = np.dtype(np.int32, metadata={"x": 1})
        with pytest.raises(TypeError, match="int32"):
            opt.step([g])


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_groups_that_differ_in_the_sign_of_zero_are_not_alike(name: str) -> None:
    """The bits of a group's step do not depend on the group before it."""
    alone, first, second = (np.full(3, -0.0, np.float32) for _ in range(3))
    cls, g = getattr(roptim, name), np.ones(3, np.float32)
    cls([alone], lr=-0.0).step([g])
    cls([{"params": [first], "lr": 0.0}, {"params": [second], "lr": -0.0}]).step([g, g])
    assert second.tobytes() == alone.tobytes()


def test_state_loads_whatever_switches_a_group_was_given() -> None:
    """What may be assigned, or given to add_param_group, must not be what a load refuses."""
    opt = SGD([np.ones(2, np.float32)])
    with contextlib.suppress(roptim.RoptimError):
        opt.param_groups[0]["capturable"] = True
    opt.load_state_dict(opt.state_dict())
