"""Hooks around steps and state dicts: torch's semantics, and what happens when something goes wrong in them."""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from helpers import step

import roptim
from roptim import LBFGS, SGD, Adam, AdamW, Optimizer, Parameter
from roptim import register_optimizer_step_post_hook as register_post_everywhere
from roptim import register_optimizer_step_pre_hook as register_pre_everywhere
from roptim.optimizer import REGISTRY
from roptim.schedules import linear

KINDS = ("step_pre", "step_post", "state_dict_pre", "state_dict_post", "load_state_dict_pre", "load_state_dict_post")
F32 = np.float32


def ones(n: int = 1) -> Any:
    return np.ones(n, F32)


def register(opt: Any, kind: str, hook: Any, **kwargs: Any) -> Any:
    return getattr(opt, f"register_{kind}_hook")(hook, **kwargs)


class Log(list[str]):
    """What was called, in order."""

    def noting(self, what: str) -> Callable[..., None]:
        return lambda *args: self.append(what)

    def taken(self) -> list[str]:
        out = list(self)
        self.clear()
        return out


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.fixture(autouse=True)
def _nothing_stays_registered() -> Iterator[None]:
    """A hook on every optimizer that a test leaves behind would reach all tests after it."""
    from roptim._hooks import EVERYWHERE

    yield
    left = [*EVERYWHERE.step_pre, *EVERYWHERE.step_post]
    EVERYWHERE.step_pre.clear()
    EVERYWHERE.step_post.clear()
    assert not left


# ---- optimizers written by users ----------------------------------------------------------------------------


class Plain(Optimizer):
    """Gradient descent, written in Python."""

    def __init__(self, params: Any, lr: float = 1.0) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, gradients: Any = None, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for i, p in enumerate(group["params"]):
                p -= group["lr"] * (p.grad if gradients is None else gradients[i])
        return loss


class Wrapping(SGD):
    """Calls the step that it extends."""

    def step(self, *args: Any, **kwargs: Any) -> Any:
        return super().step(*args, **kwargs)


class WrappingAgain(Wrapping):
    def step(self, *args: Any, **kwargs: Any) -> Any:
        return super().step(*args, **kwargs)


class Inheriting(WrappingAgain):
    """Has no step of its own."""


class Mixin:
    def step(self, *args: Any, **kwargs: Any) -> Any:
        return super().step(*args, **kwargs)  # type: ignore[misc]  # whatever it is mixed with


class Mixed(Mixin, SGD):
    """Takes its step from a class that is no optimizer."""


class Twice(SGD):
    """Two updates in one step."""

    def step(self, *args: Any, **kwargs: Any) -> Any:
        super().step(*args, **kwargs)
        return super().step(*args, **kwargs)


class PlainAgain(Plain):
    def step(self, gradients: Any = None, closure: Any = None) -> Any:
        return super().step(gradients, closure)


WRITTEN: list[Any] = [SGD, Plain, PlainAgain, Wrapping, WrappingAgain, Inheriting, Mixed, Twice]


def hooked(opt: Any, log: Log) -> contextlib.ExitStack:
    """Two hooks of each kind around steps, those of all optimizers for the time of a block."""
    stack = contextlib.ExitStack()
    for i in (1, 2):
        opt.register_step_post_hook(log.noting(f"post {i}"))
        opt.register_step_pre_hook(log.noting(f"pre {i}"))
        stack.enter_context(register_post_everywhere(log.noting(f"all post {i}")))
        stack.enter_context(register_pre_everywhere(log.noting(f"all pre {i}")))
    return stack


BEFORE = ["all pre 1", "all pre 2", "pre 1", "pre 2"]
AFTER = ["post 1", "post 2", "all post 1", "all post 2"]


# ---- around steps -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", WRITTEN)
def test_each_hook_is_called_once_and_in_order(cls: Any, log: Log) -> None:
    opt = cls([ones()])
    with hooked(opt, log):
        opt.step([ones()])
        assert log.taken() == BEFORE + AFTER
        opt.step([ones()])
        assert log.taken() == BEFORE + AFTER
    opt.step([ones()])
    assert log == ["pre 1", "pre 2", "post 1", "post 2"]


def test_every_optimizer_of_the_registry_has_them(optimizer_class: Any, log: Log) -> None:
    p = np.zeros((2, 2), F32)
    opt = optimizer_class([p])

    def before(*_: Any) -> None:
        log.append("moved" if p.any() else "still")

    opt.register_step_pre_hook(before)
    opt.register_step_post_hook(before)
    with hooked(opt, log):
        step(opt, [np.ones((2, 2), F32)])
    assert log == ["all pre 1", "all pre 2", "still", "pre 1", "pre 2", "moved", *AFTER]


@pytest.mark.parametrize("cls", [SGD, Plain, Wrapping, Mixed])
def test_what_hooks_get(cls: Any) -> None:
    seen: list[tuple[Any, ...]] = []
    p = Parameter(ones())
    opt = cls([p])
    opt.register_step_pre_hook(lambda *args: seen.append(args))
    opt.register_step_post_hook(lambda *args: seen.append(args))
    p.grad = ones()
    opt.step()
    g = [ones()]
    opt.step(g)
    opt.step(gradients=g)

    def closure() -> float:
        return 3.0

    assert opt.step(closure=closure) == 3.0, "the step's result"
    want: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((), {}),
        ((g,), {}),
        # The engine's steps show their first argument in its place however it was given.
        ((g,), {}) if cls in (SGD, Mixed) else ((), {"gradients": g}),
        ((), {"closure": closure}),
    ]
    assert len(seen) == 8
    for i, (args, kwargs) in enumerate(want):
        for optimizer, given_args, given_kwargs in seen[2 * i : 2 * i + 2]:
            assert optimizer is opt
            assert type(given_args) is tuple
            assert given_args[0] is opt, "args begin with the optimizer"
            assert len(given_args) == 1 + len(args)
            assert all(a is b for a, b in zip(given_args[1:], args, strict=True))
            assert given_kwargs == kwargs


@pytest.mark.parametrize("cls", [SGD, Plain, WrappingAgain, Mixed])
def test_a_hook_may_replace_the_arguments(cls: Any) -> None:
    p = Parameter(np.zeros(1, F32))
    opt = cls([p], lr=1.0)
    seen: list[Any] = []
    with opt.register_step_pre_hook(lambda o, args, kwargs: ((*args[:1], [4 * ones()]), {})):
        opt.register_step_pre_hook(lambda o, args, kwargs: seen.append((args, kwargs)))
        opt.register_step_post_hook(lambda o, args, kwargs: seen.append((args, kwargs)))
        opt.step([ones()])
    assert p.data[0] == -4
    for args, kwargs in seen:
        assert (args[0], args[1][0][0], kwargs) == (opt, 4, {}), "hooks after it see what it left"
    with opt.register_step_pre_hook(lambda o, args, kwargs: (args[:1], {"gradients": [2 * ones()]})):
        opt.step([ones()])
    assert p.data[0] == -6
    opt.step([ones()])
    assert p.data[0] == -7, "only where it is registered"


@pytest.mark.parametrize("cls", [SGD, Plain])
def test_a_hook_may_drop_the_closure(cls: Any) -> None:
    p = Parameter(np.zeros(1, F32))
    opt = cls([p], lr=1.0)
    p.grad = ones()
    calls = []

    def closure() -> float:
        calls.append(1)
        return 5.0

    assert opt.step(closure=closure) == 5.0
    with opt.register_step_pre_hook(lambda o, args, kwargs: (args[:1], {})):
        assert opt.step(closure=closure) is None
    assert (len(calls), p.data[0]) == (1, -2)


def test_replacements_go_from_hook_to_hook() -> None:
    p = np.zeros(1, F32)
    opt = SGD([p], lr=1.0)

    def times(factor: float) -> Any:
        return lambda o, args, kwargs: ((args[0], [factor * args[1][0] + 1]), kwargs)

    with register_pre_everywhere(times(10)):
        opt.register_step_pre_hook(times(100))
        opt.step([ones()])
    assert p[0] == -1101, "those of all come first"


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize(
    "wrong",
    [
        *(1, "x", True, [], (), (1,), ((), {}, 1), [(), {}], {"args": ()}),
        *((None, None), ((), {}), (1, {}), ((1,), {}), ((), {1: 2}), ("x", {})),
    ],
    ids=repr,
)
@pytest.mark.parametrize("cls", [SGD, Plain])
def test_anything_else_is_no_answer(cls: Any, wrong: Any, everywhere: bool, log: Log) -> None:
    p = np.zeros(1, F32)
    opt = cls([p], lr=1.0)
    opt.register_step_post_hook(log.noting("post"))
    message = (
        f"{cls.__name__}.step: what a step hook returns must be None or a tuple of new args, the first of which is the "
        f"optimizer, and new kwargs, got {wrong!r}"
    )
    with (register_pre_everywhere if everywhere else opt.register_step_pre_hook)(lambda *_: wrong):
        for _ in range(2):
            with pytest.raises(roptim.RoptimTypeError, match=f"^{re.escape(message)}$"):
                opt.step([ones()])
    assert (p[0], opt.update_count, log) == (0, 0, [])
    opt.step([ones()])
    assert (p[0], log) == (-1, ["post"])


def test_what_post_hooks_return_is_nothing_to_anyone() -> None:
    p = np.zeros(1, F32)
    opt = SGD([p], lr=1.0)
    with opt.register_step_post_hook(lambda *_: ((), {})), register_post_everywhere(lambda *_: 3):
        assert opt.step(lambda: (5.0, [ones()])) == 5.0
    assert p[0] == -1


def test_a_pre_hook_sets_what_this_step_takes() -> None:
    p = np.zeros(1, F32)
    opt = SGD([p], lr=1.0)

    def halve(o: Any, *_: Any) -> None:
        o.param_groups[0]["lr"] *= 0.5

    opt.register_step_pre_hook(halve)
    for want in (-0.5, -0.75):
        opt.step([ones()])
        assert p[0] == want
    scheduled = SGD([p], lr=linear(1, 0, 4))
    scheduled.register_step_pre_hook(halve)
    scheduled.step([ones()])
    assert p[0] == -1.25, "a number that a hook assigns ends a schedule"
    assert scheduled.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("cls", WRITTEN)
@pytest.mark.parametrize("everywhere", [False, True])
def test_an_error_in_a_pre_hook_leaves_everything(cls: Any, everywhere: bool, log: Log) -> None:
    p = np.zeros(1, F32)
    opt = cls([p], lr=1.0)
    opt.step([ones()])
    before, count, state = p.tobytes(), opt.update_count, opt.state_dict()
    with hooked(opt, log):
        handle = (register_pre_everywhere if everywhere else opt.register_step_pre_hook)(lambda *_: 1 / 0)
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                opt.step([ones()])
            assert log.taken() == (BEFORE[:2] if everywhere else BEFORE), "no hook comes after it"
        assert (p.tobytes(), opt.update_count, opt.state_dict()) == (before, count, state)
        handle.remove()
        opt.step([ones()])
        assert log.taken() == BEFORE + AFTER
    assert p[0] == -(4 if cls is Twice else 2)


@pytest.mark.parametrize("cls", WRITTEN)
def test_post_hooks_do_not_follow_a_step_that_raised(cls: Any, log: Log) -> None:
    p = np.zeros(1, F32)
    opt = cls([p], lr=1.0)
    with hooked(opt, log):
        for _ in range(2):
            with pytest.raises((TypeError, ValueError)):
                opt.step(["no gradient"])
            assert log.taken() == BEFORE
        assert p[0] == 0
        opt.step([ones()])
        assert log.taken() == BEFORE + AFTER


def test_an_error_of_a_post_hook_comes_after_the_update(log: Log) -> None:
    p = np.zeros(1, F32)
    opt = SGD([p], lr=1.0)
    with hooked(opt, log):
        with opt.register_step_post_hook(lambda *_: 1 / 0), pytest.raises(ZeroDivisionError):
            opt.step([ones()])
        assert log.taken() == [*BEFORE, "post 1", "post 2"]
        assert (p[0], opt.update_count) == (-1, 1)
        opt.step([ones()])
        assert log.taken() == BEFORE + AFTER


def test_the_base_class_has_no_step_to_follow(log: Log) -> None:
    opt = Optimizer([ones()], {"lr": 1.0})
    with hooked(opt, log):
        with pytest.raises(NotImplementedError):
            opt.step()
        assert log == BEFORE


@pytest.mark.parametrize("cls", [LBFGS, roptim.ConjugateGradient])
def test_once_per_step_and_not_per_evaluation(cls: Any, log: Log) -> None:
    p = np.array([-1.2, 1.0])
    opt = cls([p], max_iter=5)

    def closure() -> Any:
        log.append("loss")
        x, y = p
        gradient = np.array([2 * (x - 1) - 40 * x * (y - x * x), 20 * (y - x * x)])
        return (1 - x) ** 2 + 10 * (y - x * x) ** 2, [gradient]

    with hooked(opt, log):
        opt.step(closure)
        evaluations = log.count("loss")
        assert evaluations > 2
        assert log.taken() == [*BEFORE, *["loss"] * evaluations, *AFTER]
        seen = []
        with opt.register_step_pre_hook(lambda o, args, kwargs: seen.append((args[0] is opt, args[1:], kwargs))):
            opt.step(closure=closure)
        assert seen == [(True, (), {"closure": closure})]
        log.clear()
        with pytest.raises(ZeroDivisionError):
            opt.step(lambda: 1 / 0)
        assert log.taken() == BEFORE
        with opt.register_step_pre_hook(lambda o, args, kwargs: (args[:1], {})):
            message = f"{cls.__name__}.step: closure must be given, got none"
            with pytest.raises(roptim.RoptimTypeError, match=re.escape(message)):
                opt.step(closure)


def test_without_gradients_a_step_is_a_step(log: Log) -> None:
    opt = SGD([ones()], nonfinite="skip")
    with hooked(opt, log):
        opt.step([None])
        assert log.taken() == BEFORE + AFTER
        opt.step([np.nan * ones()])
        assert log.taken() == BEFORE + AFTER
    assert opt.update_count == 0


def test_one_optimizer_within_another(log: Log) -> None:
    """Hooks of all optimizers come around the inner one's steps too."""
    inner = SGD([np.zeros(1, F32)], lr=1.0)

    class Outer(Optimizer):
        def step(self, gradients: Any = None, closure: Any = None) -> None:
            inner.step(gradients)
            log.append("between")
            inner.step(gradients)

    outer = Outer([ones()], {})
    inner.register_step_pre_hook(log.noting("inner"))
    outer.register_step_pre_hook(log.noting("outer"))
    with register_pre_everywhere(lambda o, *_: log.append(type(o).__name__)):
        outer.step([ones()])
    assert log == ["Outer", "outer", "SGD", "inner", "between", "SGD", "inner"]


def test_hooks_belong_to_one_optimizer(log: Log) -> None:
    a, b = SGD([ones()]), SGD([ones()])
    a.register_step_pre_hook(log.noting("a"))
    b.register_step_pre_hook(log.noting("b"))
    b.step([ones()])
    assert log.taken() == ["b"]
    with register_post_everywhere(log.noting("all")):
        a.step([ones()])
        SGD([ones()]).step([ones()])
    assert log.taken() == ["a", "all", "all"]


# ---- handles ------------------------------------------------------------------------------------------------


def registrations(opt: Any) -> list[Callable[..., Any]]:
    return [
        *(getattr(opt, f"register_{kind}_hook") for kind in KINDS),
        register_pre_everywhere,
        register_post_everywhere,
    ]


def test_ids_increase() -> None:
    handles = [add(lambda *_: None) for opt in (SGD([ones()]), Plain([ones()])) for add in registrations(opt)]
    ids = [handle.id for handle in handles]
    assert ids == sorted(set(ids))
    for handle in handles:
        handle.remove()
    with register_pre_everywhere(lambda *_: None) as last:
        assert last.id > ids[-1], "none is used again"


@pytest.mark.parametrize("kind", KINDS)
def test_removing(kind: str, log: Log) -> None:
    opt = SGD([ones()])
    first, second, third = (register(opt, kind, log.noting(name)) for name in "abc")

    def all_that_calls() -> list[str]:
        opt.step([ones()])
        opt.load_state_dict(opt.state_dict())
        return log.taken()

    assert all_that_calls() == ["a", "b", "c"]
    second.remove()
    assert all_that_calls() == ["a", "c"]
    second.remove()
    second.remove()
    assert all_that_calls() == ["a", "c"]
    with first as same:
        assert same is first
        assert all_that_calls() == ["a", "c"]
    assert all_that_calls() == ["c"]
    with pytest.raises(ZeroDivisionError), third:
        raise ZeroDivisionError
    assert all_that_calls() == []
    register(opt, kind, log.noting("d"))
    second.remove()
    assert all_that_calls() == ["d"], "an old handle removes nobody else's"


def test_one_function_registered_twice_is_called_twice(log: Log) -> None:
    opt = SGD([ones()])
    hook = log.noting("x")
    first = opt.register_step_pre_hook(hook)
    opt.register_step_pre_hook(hook)
    opt.step([ones()])
    assert log.taken() == ["x", "x"]
    first.remove()
    opt.step([ones()])
    assert log.taken() == ["x"]


def test_a_handle_outlives_its_optimizer() -> None:
    opt = SGD([ones()])
    handle = opt.register_step_pre_hook(lambda *_: None)
    del opt
    gc.collect()
    handle.remove()


@pytest.mark.parametrize("kind", KINDS)
def test_prepending(kind: str, log: Log) -> None:
    opt = SGD([ones()])
    register(opt, kind, log.noting("a"))
    if kind.startswith("step"):
        with pytest.raises(TypeError, match="prepend"):
            register(opt, kind, log.noting("b"), prepend=True)
        return
    handle = register(opt, kind, log.noting("b"), prepend=True)
    register(opt, kind, log.noting("c"), prepend=True)
    register(opt, kind, log.noting("d"))
    opt.load_state_dict(opt.state_dict())
    assert log.taken() == ["c", "b", "a", "d"]
    handle.remove()
    opt.load_state_dict(opt.state_dict())
    assert log.taken() == ["c", "a", "d"]


def test_what_is_no_function_is_refused() -> None:
    opt = SGD([ones()])
    places = [*(f"SGD.register_{kind}_hook" for kind in KINDS)]
    places += ["register_optimizer_step_pre_hook", "register_optimizer_step_post_hook"]
    for add, place in zip(registrations(opt), places, strict=True):
        for wrong, name in ((None, "NoneType"), (3, "int"), ("x", "str")):
            message = f"{place}: hook must be callable, got an object of type {name}"
            with pytest.raises(roptim.RoptimTypeError, match=f"^{re.escape(message)}$"):
                add(wrong)
    opt.step([ones()])
    opt.load_state_dict(opt.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_that_come_and_go_while_hooks_run(kind: str, log: Log) -> None:
    opt = SGD([ones()])
    handles: dict[str, Any] = {}

    def changing(*_: Any) -> None:
        log.append("a")
        for name in "ab":
            handles[name].remove()
        handles["new"] = register(opt, kind, log.noting("new"))

    def run() -> list[str]:
        opt.step([ones()])
        opt.load_state_dict(opt.state_dict())
        return log.taken()

    handles["a"] = register(opt, kind, changing)
    handles["b"] = register(opt, kind, log.noting("b"))
    handles["c"] = register(opt, kind, log.noting("c"))
    first = run()
    assert first[0] == "a"
    assert first[-1] == "c"
    assert "new" not in first, "from the next time on"
    assert run() == ["c", "new"]


def test_hooks_of_all_that_come_and_go_while_hooks_run(log: Log) -> None:
    opt = SGD([ones()])
    with contextlib.ExitStack() as stack:

        def changing(*_: Any) -> None:
            log.append("a")
            handle.remove()
            stack.enter_context(register_pre_everywhere(log.noting("new")))

        handle = register_pre_everywhere(changing)
        stack.enter_context(register_pre_everywhere(log.noting("b")))
        opt.step([ones()])
        assert log.taken() == ["a", "b"]
        opt.step([ones()])
        assert log.taken() == ["b", "new"]


# ---- around state dicts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [SGD, Plain])
def test_around_state_dict(cls: Any, log: Log) -> None:
    opt = cls([ones()], lr=0.5)
    seen: list[tuple[Any, ...]] = []

    def before(*args: Any) -> int:
        seen.append(args)
        args[0].param_groups[0]["lr"] = 0.25
        return 3

    opt.register_state_dict_pre_hook(before)
    opt.register_state_dict_post_hook(lambda *args: seen.append(args))
    state = opt.state_dict()
    (pre,), (post, given) = seen
    assert pre is post is opt
    assert given is state
    assert state["param_groups"][0]["lr"] == 0.25, "what a hook changes beforehand is in it"
    assert list(state) == ["state", "param_groups", "roptim"], "what a hook before it returns is ignored"
    seen.clear()
    opt.step([ones()])
    assert not seen


def test_the_state_dict_may_be_changed_or_replaced() -> None:
    opt = SGD([ones()], lr=0.5)
    opt.register_state_dict_post_hook(lambda o, state: state.update(mine=1))
    assert opt.state_dict()["mine"] == 1
    other = {"other": 2}
    received: list[Any] = []
    with opt.register_state_dict_post_hook(lambda o, state: other):
        opt.register_state_dict_post_hook(lambda o, state: received.append(state))
        assert opt.state_dict() is other
    assert received == [other], "a hook after it gets the replacement"
    assert opt.state_dict()["mine"] == 1
    with opt.register_state_dict_post_hook(lambda o, state: {}):
        assert opt.state_dict() == {}, "not None is a replacement"


@pytest.mark.parametrize("cls", [SGD, Plain])
def test_a_load_hook_gets_a_shallow_copy(cls: Any) -> None:
    state = cls([ones()], lr=0.5).state_dict()
    state["mine"] = [1]
    kept = dict(state)
    opt = cls([ones()])
    seen: list[Any] = []

    def change(o: Any, given: Any) -> None:
        seen.append((o, given))
        assert given is not state
        assert given == kept
        assert all(given[key] is state[key] for key in state), "shallow"
        del given["mine"]
        given["param_groups"] = [{**given["param_groups"][0], "lr": 0.125}]

    opt.register_load_state_dict_pre_hook(change)
    opt.register_load_state_dict_pre_hook(lambda o, given: seen.append((o, given)))
    opt.load_state_dict(state)
    assert opt.param_groups[0]["lr"] == 0.125
    assert [o for o, _ in seen] == [opt, opt]
    assert seen[0][1] is seen[1][1]
    assert state == kept, "the caller's dict is as it was"
    assert all(state[key] is kept[key] for key in kept)
    assert state["param_groups"][0]["lr"] == 0.5


@pytest.mark.parametrize("cls", [SGD, Plain])
def test_what_is_loaded_may_be_replaced(cls: Any) -> None:
    good, other = cls([ones()], lr=0.5).state_dict(), cls([ones()], lr=0.25).state_dict()
    opt = cls([ones()])
    received: list[Any] = []
    with opt.register_load_state_dict_pre_hook(lambda o, given: other):
        opt.register_load_state_dict_pre_hook(lambda o, given: received.append(given))
        opt.load_state_dict(good)
    assert received == [other]
    assert received[0] is other
    assert opt.param_groups[0]["lr"] == 0.25
    opt.load_state_dict(good)
    assert opt.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("key", ["state", "param_groups"])
def test_a_load_hook_may_add_what_is_missing(key: str) -> None:
    """Hooks come before the checks, as in torch: an old format may be brought up to date."""
    state = SGD([ones()], lr=0.5).state_dict()
    old = {k: v for k, v in state.items() if k != key}
    opt = SGD([ones()])
    with pytest.raises(KeyError):
        opt.load_state_dict(old)
    with opt.register_load_state_dict_pre_hook(lambda o, given: given.update({key: state[key]})):
        opt.load_state_dict(old)
    assert opt.param_groups[0]["lr"] == 0.5
    opt.register_load_state_dict_pre_hook(lambda o, given: {**given, key: state[key]})
    opt.load_state_dict(old)
    assert key not in old


@pytest.mark.parametrize(
    "wrong",
    [3, [], "x", {}, {"state": {}}, {"param_groups": []}, {"state": 3, "param_groups": []}],
    ids=lambda wrong: repr(wrong),
)
@pytest.mark.parametrize("cls", [SGD, Plain])
def test_a_replacement_is_checked_as_well(cls: Any, wrong: Any, log: Log) -> None:
    p = ones()
    opt = cls([p], lr=0.5)
    opt.step([ones()])
    state = opt.state_dict()
    opt.register_load_state_dict_post_hook(log.noting("post"))
    with opt.register_load_state_dict_pre_hook(lambda o, given: wrong), pytest.raises(roptim.RoptimError):
        opt.load_state_dict(state)
    assert opt.state_dict() == state
    assert log == []
    opt.load_state_dict(state)
    assert log == ["post"]


@pytest.mark.parametrize("cls", [SGD, Plain])
def test_after_a_load(cls: Any) -> None:
    state = cls([ones()], lr=0.5).state_dict()
    opt = cls([ones()])
    seen: list[Any] = []

    def after(*args: Any) -> int:
        seen.append((args, args[0].param_groups[0]["lr"]))
        args[0].param_groups[0]["lr"] = 0.125
        return 3

    opt.register_load_state_dict_post_hook(after)
    assert opt.load_state_dict(state).hparams == {"group 0: lr": (0.001 if cls is SGD else 1.0, 0.5)}
    assert seen == [((opt,), 0.5)], "everything is in place"
    assert opt.param_groups[0]["lr"] == 0.125


@pytest.mark.parametrize("cls", [AdamW, Plain])
def test_errors_around_loads(cls: Any, log: Log) -> None:
    state = cls([ones()], lr=0.5).state_dict()
    opt = cls([ones()])
    opt.step([ones()])
    before = pickle.dumps(opt.state_dict())
    opt.register_load_state_dict_post_hook(log.noting("post"))
    with opt.register_load_state_dict_pre_hook(lambda *_: 1 / 0), pytest.raises(ZeroDivisionError):
        opt.load_state_dict(state)
    with pytest.raises(roptim.RoptimError):
        opt.load_state_dict({**state, "param_groups": []})
    assert pickle.dumps(opt.state_dict()) == before
    assert log == [], "after a load that did not happen nobody is called"
    with opt.register_load_state_dict_post_hook(lambda *_: 1 / 0, prepend=True), pytest.raises(ZeroDivisionError):
        opt.load_state_dict(state)
    assert log == []
    assert opt.param_groups[0]["lr"] == 0.5, "it was loaded before the hook failed"
    with opt.register_state_dict_pre_hook(lambda *_: 1 / 0), pytest.raises(ZeroDivisionError):
        opt.state_dict()
    opt.load_state_dict(opt.state_dict())
    assert log == ["post"]


def test_resuming_with_hooks_gives_the_same_bits(tmp_path: Any) -> None:
    """State that a hook keeps travels in the optimizer's dict."""

    def build(params: Any) -> tuple[Any, dict[str, Any]]:
        opt, own = Adam(params, lr=0.1), {"steps": 0}

        def count(*_: Any) -> None:
            own["steps"] += 1

        def write(o: Any, state: Any) -> None:
            state["mine"] = dict(own)

        def read(o: Any, state: Any) -> None:
            own.update(state.pop("mine"))

        opt.register_step_post_hook(count)
        opt.register_state_dict_post_hook(write)
        opt.register_load_state_dict_pre_hook(read)
        return opt, own

    p = ones(5)
    opt, own = build([p])
    for t in range(4):
        opt.step([np.sin(np.arange(5, dtype=F32) + t)])
    roptim.save({"p": p, "opt": opt.state_dict()}, tmp_path / "x")
    saved = roptim.load(tmp_path / "x")
    again, own_again = build([saved["p"]])
    again.load_state_dict(saved["opt"])
    for t in range(4, 7):
        opt.step([np.sin(np.arange(5, dtype=F32) + t)])
        again.step([np.sin(np.arange(5, dtype=F32) + t)])
    assert saved["p"].tobytes() == p.tobytes()
    assert own_again == own == {"steps": 7}
    assert "mine" in saved["opt"], "a hook got a copy"


# ---- copies -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda opt: pickle.loads(pickle.dumps(opt))])
@pytest.mark.parametrize("cls", [SGD, Plain, Inheriting, LBFGS])
def test_copies_have_no_hooks(cls: Any, copied: Any, log: Log) -> None:
    opt = cls([ones()])
    for kind in KINDS:
        register(opt, kind, log.noting(kind))
    other = copied(opt)
    assert log == [], "nor does copying call them"
    closure = (lambda: (0.0, [ones()])) if cls is LBFGS else None
    other.step(closure) if closure else other.step([ones()])
    other.load_state_dict(other.state_dict())
    assert log == []
    opt.step(closure) if closure else opt.step([ones()])
    opt.load_state_dict(opt.state_dict())
    assert log == [
        "step_pre",
        "step_post",
        "state_dict_pre",
        "state_dict_post",
        "load_state_dict_pre",
        "load_state_dict_post",
    ]
    log.clear()
    handle = other.register_step_pre_hook(log.noting("other"))
    opt.step(closure) if closure else opt.step([ones()])
    assert "other" not in log.taken()
    handle.remove()


def test_a_copy_made_within_a_hook_can_step(log: Log) -> None:
    opt = SGD([np.zeros(1, F32)], lr=1.0)
    copies: list[Any] = []
    opt.register_step_pre_hook(lambda o, *_: copies.append(copy.deepcopy(o)))
    opt.step([ones()])
    (other,) = copies
    other.register_step_pre_hook(log.noting("copy"))
    other.step([ones()])
    assert other.param_groups[0]["params"][0][0] == -1
    assert log == ["copy"]


def test_step_keeps_its_name_and_text() -> None:
    for cls in (SGD, LBFGS, *WRITTEN):
        assert cls.step.__name__ == "step"
    assert SGD.step.__doc__ == Optimizer.step.__doc__
    assert Optimizer.step.__doc__
    assert {name for name in REGISTRY if getattr(roptim, name).step.__doc__} == set(REGISTRY)
