"""Hostile values wherever a value is taken: hyperparameters, options, and arguments of schedulers, schedules, clipping
and averages. Each is refused by a named error of one sentence, and nothing has changed."""

from __future__ import annotations

import inspect
import math
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from helpers import fingerprint, step
from hypothesis import given, settings
from hypothesis import strategies as st

import roptim
from roptim import SGD, lr_scheduler, schedules, swa_utils
from roptim._groups import OPTIONS
from roptim.optimizer import REGISTRY
from roptim.utils import clip_grads_with_norm_, get_total_norm

FULL = os.environ.get("ROPTIM_FULL_TESTS") == "1"


class Unfit:
    """A number by its methods, all of which raise."""

    def __float__(self) -> float:
        raise ZeroDivisionError("no number")

    def __index__(self) -> int:
        raise ZeroDivisionError("no number")

    __int__ = __index__
    __bool__: Any = __index__


class Silent(Unfit):
    """The same without a text."""

    def __repr__(self) -> str:
        raise ValueError("nothing to say")


#: What is no number, pair, word or switch; made anew for each use, since some can be used once.
OF_NO_TYPE: dict[str, Callable[[], Any]] = {
    "text": lambda: "1e-3",
    "empty text": lambda: "",
    "bytes": lambda: b"1",
    "bytearray": lambda: bytearray(b"12"),
    "numpy text": lambda: np.str_("0.5"),
    "complex": lambda: 1j,
    "numpy complex": lambda: np.complex64(0.5),
    "array of complex": lambda: np.array(0.5 + 0j),
    "array of text": lambda: np.array("0.5"),
    "array of many": lambda: np.full(1000, 0.5),
    "text that UTF-8 cannot hold": lambda: "0.5\ud800",
    "array of none": lambda: np.array([]),
    "array of objects": lambda: np.array([None]),
    "time": lambda: np.timedelta64(1, "s"),
    "masked": lambda: np.ma.masked,
    "dict": lambda: {0.5: 1, 0.6: 2},
    "set": lambda: {0.5, 0.6},
    "generator": lambda: (x for x in (0.5, 0.6, 0.7)[:2]),
    "empty list": lambda: [],
    "nested list": lambda: [[0.5, 0.6]],
    "list of text": lambda: ["0.5", "0.6"],
    "object": object,
    "class": lambda: int,
    "Ellipsis": lambda: ...,
    "raises": Unfit,
    "raises without text": Silent,
}
#: Of the type of a number, and in no range.
IN_NO_RANGE: dict[str, Callable[[], Any]] = {
    "NaN": lambda: math.nan,
    "numpy NaN": lambda: np.float32(math.nan),
    "array of NaN": lambda: np.array(math.nan),
    "-infinity": lambda: -math.inf,
    "huge": lambda: 10**400,
    "huge and negative": lambda: -(10**400),
    "huger than text may be": lambda: 10**5000,
}


def allows(text: str, value: Any) -> bool:
    """Whether a number, or a tuple of them, is in a range that the registry declares."""
    if text.startswith("None or "):
        return value is None or allows(text.removeprefix("None or "), value)
    number = r"(-?[0-9.]+)"
    if isinstance(value, tuple):
        finite = all(x is None or math.isfinite(x) for x in value)
        if m := re.fullmatch(rf"two numbers in \[{number}, {number}\)", text):
            return len(value) == 2 and all(float(m[1]) <= x < float(m[2]) for x in value)
        if m := re.fullmatch(rf"two finite numbers a, b with {number} < a < {number} < b", text):
            return len(value) == 2 and finite and float(m[1]) < value[0] < float(m[2]) < value[1]
        if m := re.fullmatch(rf"two finite numbers a, b with {number} <= a <= b", text):
            return len(value) == 2 and finite and float(m[1]) <= value[0] <= value[1]
        if m := re.fullmatch(rf"two finite numbers >= {number}, the first of which may be None", text):
            return len(value) == 2 and finite and all(x is None or x >= float(m[1]) for x in value)
        assert text == "three finite numbers", text
        return len(value) == 3 and finite
    if m := re.fullmatch(rf"a (finite |whole )?number (>=|<=|>) {number}", text):
        compare = {">=": value >= float(m[3]), "<=": value <= float(m[3]), ">": value > float(m[3])}[m[2]]
        if m[1] == "whole ":
            return bool(compare and abs(value) <= 2**53 and value == int(value))
        return bool(compare and (m[1] is None or math.isfinite(value)))
    if m := re.fullmatch(rf"a whole number from {number} to {number}", text):
        return float(m[1]) <= value <= float(m[2]) and value == int(value)
    if m := re.fullmatch(rf"a number in \[{number}, {number}([)\]])", text):
        return float(m[1]) <= value and (value < float(m[2]) if m[3] == ")" else value <= float(m[2]))
    assert text == "a finite number", text
    return math.isfinite(value)


def length(text: str) -> int:
    """How many numbers a value has: 0 for one that is none."""
    if text.startswith("None or "):
        return length(text.removeprefix("None or "))
    if text.startswith(("two ", "three ")):
        return 2 if text.startswith("two ") else 3
    return 1 if "number" in text else 0


EDGES = [0.0, -0.0, 5e-324, -5e-324, 1.0, math.nextafter(1, 0), math.nextafter(1, 2), -1.0, 99.0, 100.0, 0.5]
EDGES += [1.5, 2.0**53, 1.7976931348623157e308, -1.7976931348623157e308, math.inf, -math.inf, math.nan]
#: For each range of several numbers, one value within.
WITHIN = {
    "two numbers in [0, 1)": (0.5, 0.25),
    "two finite numbers a, b with 0 < a < 1 < b": (0.5, 1.5),
    "two finite numbers a, b with 0 <= a <= b": (0.5, 1.5),
    "two finite numbers >= 0, the first of which may be None": (0.5, 0.25),
    "three finite numbers": (0.5, 0.25, 0.125),
}


def hostile(text: str, default: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What a hyperparameter of this range must refuse."""
    yield from OF_NO_TYPE.items()
    if not text.startswith("None or "):
        yield "None", lambda: None
    count = length(text)
    if isinstance(default, bool):
        for value in (0, 1, 1.0, 0.0, math.nan, (True, False), np.array([True, False]), np.array(1)):
            yield f"{value!r} as a switch", lambda value=value: value
        return
    yield from IN_NO_RANGE.items()
    yield "True", lambda: True
    yield "numpy True", lambda: np.True_
    yield "array of True", lambda: np.array([True])
    if count == 0:
        for word in ("Original", "original ", "ORIGINAL", "strong-wolfe", "none", "\ud800"):
            yield word, lambda word=word: word
    if count == 1:
        for edge in EDGES:
            if not allows(text, edge):
                yield f"{edge!r}", lambda edge=edge: edge
    if count > 1:
        good = WITHIN[text]
        yield "one number", lambda: 0.5
        yield "too few", lambda: good[1:]
        yield "too many", lambda: (*good, 0.5)
        for i in range(count):
            for name, make in {**OF_NO_TYPE, **IN_NO_RANGE, "True": lambda: True, "inf": lambda: math.inf}.items():
                yield f"{name} at {i}", lambda i=i, make=make: (*good[:i], make(), *good[i + 1 :])
            for edge in EDGES:
                value = (*good[:i], edge, *good[i + 1 :])
                if not allows(text, value):
                    yield f"{edge!r} at {i}", lambda value=value: value


def settable(name: str) -> dict[str, str]:
    """The hyperparameters that users set, and their ranges."""
    entry = REGISTRY[name]
    return {key: text for key, text in entry["ranges"].items() if key not in entry["fixed"]}


CONFIGURATIONS = [
    (name, key, label) for name in REGISTRY for key, text in settable(name).items()
    for label, _ in hostile(text, REGISTRY[name]["defaults"][key])
]  # fmt: skip


def test_there_are_enough_configurations() -> None:
    assert len(CONFIGURATIONS) >= 60
    assert {(name, key) for name, key, _ in CONFIGURATIONS} == {(n, key) for n in REGISTRY for key in settable(n)}


def refusal(give: Callable[[Any], Any], value: Any) -> str:
    """The message of the error that a value meets; empty where it is taken."""
    try:
        give(value)
    except roptim.RoptimError as error:
        return str(error)
    return ""


def one_sentence(message: str) -> bool:
    """Of the project's form, on one line, not long."""
    return len(message) <= 400 and re.fullmatch(r"\S.*: .+ must be .+, got .+", message) is not None


@pytest.mark.parametrize("name", REGISTRY)
@pytest.mark.filterwarnings("error")
def test_hostile_hyperparameters_change_nothing(name: str) -> None:
    cls, first, second = getattr(roptim, name), np.ones((2, 2)), np.ones((3, 2))
    opt = cls([first])
    step(opt, [np.full((2, 2), 0.25)])
    group, saved = opt.param_groups[0], opt.state_dict()
    before = fingerprint([opt, first, second])
    for key, text in settable(name).items():
        for label, make in hostile(text, REGISTRY[name]["defaults"][key]):

            def state_dict(value: Any, key: str = key) -> None:
                opt.load_state_dict({**saved, "param_groups": [{**saved["param_groups"][0], key: value}]})

            ways: dict[str, Callable[[Any], Any]] = {
                "constructor": lambda value, key=key: cls([second], **{key: value}),
                "group": lambda value, key=key: cls([{"params": [second], key: value}]),
                "added group": lambda value, key=key: opt.add_param_group({"params": [second], key: value}),
                "assignment": lambda value, key=key: group.__setitem__(key, value),
                "update": lambda value, key=key: group.update({"mine": 1, key: value}),
                "update of two": lambda value, key=key: group.update({**dict(group), key: value}),
                "joined": lambda value, key=key: group.__ior__({key: value}),
                "state dict": state_dict,
            }
            for way, give in ways.items():
                if " at " in label and way not in ("constructor", "assignment", "state dict") and not FULL:
                    continue  # one of several numbers goes the way of a single one
                said = refusal(give, make())
                assert one_sentence(said), (key, label, way, said)
                if way == "state dict":
                    assert re.match(rf"({name}\.load_state_dict|state_dict): ", said), (key, label, said)
                    assert key in said
                else:
                    assert re.match(f"{name}( group 1)?: {key}", said), (key, label, way, said)
    assert fingerprint([opt, first, second]) == before
    assert len(opt.param_groups) == 1
    step(opt, [np.full((2, 2), 0.25)])


def numbers(text: str) -> st.SearchStrategy[Any]:
    """Floats of all kinds, and often ones that are near to or in what is allowed."""
    x = st.floats() | st.floats(0, 1) | st.sampled_from(EDGES) | st.floats(0, 5e-308) | st.integers(0, 120).map(float)
    first = st.none() | x if "may be None" in text else x
    return x if length(text) == 1 else st.tuples(*[first, x, x][: length(text)])


@pytest.mark.parametrize("name", REGISTRY)
@settings(max_examples=2000 if FULL else 40)
@given(data=st.data())
def test_a_number_is_taken_if_and_only_if_it_is_in_the_declared_range(name: str, data: st.DataObject) -> None:
    """And then it is what the group shows and what the engine has."""
    p = np.ones((2, 2))
    opt = getattr(roptim, name)([p])
    group = opt.param_groups[0]
    for key, text in settable(name).items():
        if length(text) == 0:
            continue
        value = data.draw(numbers(text), key)
        before = dict(group)
        if allows(text, value):
            group[key] = value
            assert (group[key], opt._engine.hypers(0)[key]) == (value, value)
            assert getattr(roptim, name)([p], **{key: value}).param_groups[0][key] == value
        else:
            with pytest.raises(roptim.RoptimError, match=f"^{name}: {key}"):
                group[key] = value
            with pytest.raises(roptim.RoptimError, match=f"^{name}: {key}"):
                getattr(roptim, name)([p], **{key: value})
            assert dict(group) == before
            assert opt._engine.hypers(0)[key] == before[key]
    assert (p == 1).all()


@pytest.mark.parametrize("name", REGISTRY)
def test_what_is_given_is_copied(name: str) -> None:
    """A number in an array of none or one axis, and pairs in lists and arrays, changed afterwards."""
    p = [np.ones((2, 2)) for _ in range(4)]
    for key, text in settable(name).items():
        count = length(text)
        if count == 0 or text.startswith("None or") or "may be None" in text:
            continue
        good: Any = REGISTRY[name]["defaults"][key] if count == 1 else WITHIN[text]
        for given_value in [np.array(good), np.array([good])] if count == 1 else [np.array(good), list(good)]:
            constructed = getattr(roptim, name)([p[0]], **{key: given_value})
            grouped = getattr(roptim, name)([{"params": [p[1]], key: given_value}])
            assigned = getattr(roptim, name)([p[2]])
            assigned.param_groups[0][key] = given_value
            if isinstance(given_value, list):
                given_value[:] = [math.nan] * count
            else:
                given_value[...] = 7  # out of most ranges
            if not REGISTRY[name]["needs_closure"]:
                constructed.add_param_group({"params": [p[3]]})
            for opt in (constructed, grouped, assigned):
                for group in opt.param_groups:
                    assert group[key] == good
                    assert not isinstance(group[key], (np.ndarray, list))
                assert opt._engine.hypers(0)[key] == good
            assert constructed.defaults[key] == good


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, np.longdouble, np.int8, np.uint64])
def test_numpy_numbers_are_numbers(kind: Any) -> None:
    for value in (kind(1), np.array(1, kind), np.array([[1]], kind)):
        opt = SGD([np.ones(2)], lr=value, momentum=value)
        assert (opt.param_groups[0]["lr"], opt.param_groups[0]["momentum"]) == (1, 1)
        assert type(opt.param_groups[0]["lr"]) in (int, float)
    assert roptim.Adam([np.ones(2)], betas=(kind(0), kind(0))).param_groups[0]["betas"] == (0, 0)


# ---- options and arguments ----------------------------------------------------------------------------------

HOSTILE = {
    **OF_NO_TYPE,
    **IN_NO_RANGE,
    "True": lambda: True,
    "numpy True": lambda: np.True_,
    "array of True": lambda: np.array([True, False]),
}


class Argument:
    """Something that takes a value, and which of the hostile ones it takes for a reason."""

    def __init__(self, name: str, give: Callable[[Any], Any], *takes: str) -> None:
        self.name, self.give, self.takes = name, give, set(takes)

    def __repr__(self) -> str:
        return self.name


SWITCH = ("True", "numpy True")
#: The arguments that each scheduler needs; what else it takes is in its signature.
SCHEDULERS: dict[str, dict[str, Any]] = {
    "LambdaLR": {"lr_lambda": lambda epoch: 1.0},
    "MultiplicativeLR": {"lr_lambda": lambda epoch: 1.0},
    "StepLR": {"step_size": 2},
    "MultiStepLR": {"milestones": [2]},
    "ConstantLR": {},
    "LinearLR": {},
    "ExponentialLR": {"gamma": 0.5},
    "PolynomialLR": {},
    "CosineAnnealingLR": {"T_max": 3},
    "CosineAnnealingWarmRestarts": {"T_0": 3},
    "CyclicLR": {"base_lr": 0.1, "max_lr": 0.2},
    "OneCycleLR": {"max_lr": 0.1, "total_steps": 5},
    "ReduceLROnPlateau": {},
    "SWALR": {"swa_lr": 0.1},
}
SCHEDULES: dict[str, dict[str, Any]] = {
    "constant": {"value": 1.0},
    "linear": {"start": 0.0, "end": 1.0, "steps": 3},
    "warmup": {"steps": 3},
    "polynomial": {"steps": 3},
    "exponential": {"gamma": 0.5},
    "step": {"every": 2},
    "cosine": {"steps": 3},
    "sqrt_decay": {"steps": 3},
    "inverse_sqrt": {"timescale": 3},
    "warm_restarts": {"first": 3},
    "one_cycle": {"steps": 9},
    "cyclic": {"up": 3},
    "warmup_stable_decay": {"warmup_steps": 1, "stable_steps": 2, "decay_steps": 3},
}


def an_optimizer() -> Any:
    return SGD([np.ones(2)], lr=0.1, momentum=0.5)


def bounded(n: Any) -> None:
    with roptim.threads(n):
        pass


def arguments() -> Iterator[Argument]:
    for name, needed in SCHEDULERS.items():
        cls = getattr(lr_scheduler, name, None) or getattr(swa_utils, name)
        for key, parameter in list(inspect.signature(cls).parameters.items())[1:]:
            takes = SWITCH if isinstance(parameter.default, bool) else ()
            # torch takes these: no milestone, and functions of any kind.
            takes += {"milestones": ("empty list", "array of none"), "scale_fn": ("class",)}.get(key, ())
            takes += ("class",) if key == "lr_lambda" else ()
            yield Argument(
                f"{name}.{key}",
                lambda value, cls=cls, key=key, needed=needed: cls(an_optimizer(), **{**needed, key: value}),
                *takes,
            )
    for name, needed in SCHEDULES.items():
        make = getattr(schedules, name)
        for key, parameter in inspect.signature(make).parameters.items():
            takes = SWITCH if isinstance(parameter.default, bool) else ()
            give = lambda value, make=make, key=key, needed=needed: make(**{**needed, key: value})  # noqa: E731
            yield Argument(f"schedules.{name}.{key}", give, *takes)
    half = schedules.constant(0.5)
    yield Argument("schedules.piecewise", lambda value: schedules.piecewise(value))
    yield Argument("a value of schedules.piecewise", lambda value: schedules.piecewise({0: value}))
    yield Argument("a place of schedules.piecewise", lambda value: schedules.piecewise([(value, 1.0)]))
    yield Argument("schedules.sequence", lambda value: schedules.sequence(value))
    yield Argument("Schedule.__call__", half)
    yield Argument("Schedule.clip", half.clip)
    yield Argument("Schedule.shift", half.shift)
    yield Argument("Schedule.then", half.then)
    g = np.ones(3)
    yield Argument("clip_grad_norm_.max_norm", lambda value: roptim.clip_grad_norm_([g], value))
    yield Argument("clip_grad_norm_.norm_type", lambda value: roptim.clip_grad_norm_([g], 9.0, value), "-infinity")
    yield Argument("clip_grad_norm_.error", lambda value: roptim.clip_grad_norm_([g], 9.0, 2.0, value), *SWITCH)
    yield Argument("clip_grad_value_", lambda value: roptim.clip_grad_value_([g], value))
    yield Argument("clip_grads_with_norm_.max_norm", lambda value: clip_grads_with_norm_([g], value, 1.0))
    some = ("NaN", "numpy NaN")
    yield Argument(
        "clip_grads_with_norm_.total_norm", lambda value: clip_grads_with_norm_([np.ones(3)], 9.0, value), *some
    )
    yield Argument("get_total_norm.norm_type", lambda value: get_total_norm([g], value), "-infinity")
    for option in OPTIONS:
        takes = SWITCH if isinstance(OPTIONS[option], bool) else ()
        yield Argument(option, lambda value, option=option: SGD([g], **{option: value}), *takes)
    yield Argument("grad_scale", lambda value: setattr(an_optimizer(), "grad_scale", value))
    yield Argument("step.zero_grad", lambda value: an_optimizer().step([np.ones(2)], zero_grad=value), *SWITCH)
    yield Argument("zero_grad", lambda value: an_optimizer().zero_grad(value), *SWITCH)
    texts = [label for label, make in OF_NO_TYPE.items() if isinstance(make(), str) and "UTF-8" not in label]
    yield Argument("Parameter.name", lambda value: roptim.Parameter(np.ones(2), name=value), *texts)
    yield Argument("name of a Parameter", lambda value: setattr(roptim.Parameter(np.ones(2)), "name", value), *texts)
    yield Argument("requires_grad", lambda value: roptim.Parameter(np.ones(2), requires_grad=value), *SWITCH)
    yield Argument(
        "requires_grad of a Parameter",
        lambda value: setattr(roptim.Parameter(np.ones(2)), "requires_grad", value),
        *SWITCH,
    )
    yield Argument("param_groups", lambda value: setattr(an_optimizer(), "param_groups", value))
    renamed = roptim.Adam({"a": g})
    yield Argument("rename", lambda value: renamed.load_state_dict(renamed.state_dict(), rename=value))
    yield Argument("a name of rename", lambda value: renamed.load_state_dict(renamed.state_dict(), rename={"b": value}))
    yield Argument("step", lambda value: an_optimizer().step(value))
    yield Argument("add_param_group", lambda value: an_optimizer().add_param_group(value))
    yield Argument("load_state_dict", lambda value: an_optimizer().load_state_dict(value))
    yield Argument("threads", bounded, "huge", "huger than text may be")
    yield Argument("get_ema_avg_fn", swa_utils.get_ema_avg_fn)
    yield Argument("get_ema_multi_avg_fn", swa_utils.get_ema_multi_avg_fn)
    for key in ("avg_fn", "multi_avg_fn", "use_buffers", "backend", "allow_software", "threads"):
        takes = SWITCH if key in ("use_buffers", "allow_software") else ()
        takes += ("class",) if key.endswith("avg_fn") else ()
        yield Argument(
            f"AveragedModel.{key}", lambda value, key=key: swa_utils.AveragedModel([g], **{key: value}), *takes
        )


@pytest.mark.parametrize("argument", list(arguments()), ids=repr)
@pytest.mark.filterwarnings("error")
def test_hostile_arguments(argument: Argument) -> None:
    for label, make in HOSTILE.items():
        said = refusal(argument.give, make())
        if label in argument.takes:
            assert said == "", label
        else:
            assert one_sentence(said), (label, said)


def test_every_scheduler_and_schedule_has_its_arguments() -> None:
    composed = {"LRScheduler", "SequentialLR", "ChainedScheduler"}
    named = {name for name in lr_scheduler.__all__ if inspect.isclass(getattr(lr_scheduler, name))}
    assert named - composed - {"ReduceLROnPlateau"} <= SCHEDULERS.keys()
    functions = {name for name in schedules.__all__ if inspect.isfunction(getattr(schedules, name))}
    assert functions - {"piecewise", "sequence"} == SCHEDULES.keys()


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.filterwarnings("error")
def test_a_refused_scheduler_leaves_the_optimizer_as_it_is(name: str) -> None:
    cls = getattr(lr_scheduler, name, None) or getattr(swa_utils, name)
    opt = an_optimizer()
    before = fingerprint([opt])
    for key in list(inspect.signature(cls).parameters)[1:]:
        for make in (Unfit, lambda: b"1", lambda: math.nan, lambda: 10**400, lambda: np.full(1000, 0.5)):
            assert refusal(lambda value, key=key: cls(opt, **{**SCHEDULERS[name], key: value}), make())
            assert fingerprint([opt]) == before
