"""A panic anywhere in the engine: a named error, a torn optimizer that a load heals, and nobody else harmed."""

from __future__ import annotations

import contextlib
import copy
import itertools
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import fingerprint, step
from twins import FULL

import roptim
from roptim import SGD, Adam, Parameter, _roptim
from roptim.optimizer import REGISTRY
from roptim.swa_utils import AveragedModel
from roptim.utils import clip_grad_norm_, get_total_norm

#: Where in a step panics come, at most.
POSITIONS = 20 if FULL else 5
#: Never reached.
FAR = 2**62
#: One by one, in a step on one thread and in one on several.
SIZES = {"one thread": [(7, 5), (3, 2)], "several threads": [(260, 270), (5, 3), (130, 90)]}
THREADS = 3


@pytest.fixture(autouse=True)
def no_drill_and_no_noise(capfd: Any) -> Iterator[None]:
    """Panics are told on the standard error, by whoever is in a thread of the engine."""
    yield
    assert _roptim._drill(0, False) == 0
    capfd.readouterr()


@contextlib.contextmanager
def drill(n: int, on_pool: bool = False) -> Iterator[None]:
    """The n-th part of the engine's work panics."""
    assert _roptim._drill(n, on_pool) == 0
    try:
        yield
    finally:
        _roptim._drill(0, False)


def parts(work: Callable[[], Any], on_pool: bool = False) -> int:
    """How many parts some work has."""
    assert _roptim._drill(FAR, on_pool) == 0
    work()
    return FAR - _roptim._drill(0, False)


def positions(count: int) -> list[int]:
    """First and last part and some between."""
    return sorted({1 + round(i * (count - 1) / max(POSITIONS - 1, 1)) for i in range(POSITIONS)})


def arrays(sizes: list[tuple[int, ...]], seed: int) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(np.float32) for shape in sizes]


class Twins:
    """An optimizer and what an undisturbed one of its kind comes to."""

    def __init__(self, make: Callable[[list[Any]], Any], sizes: list[tuple[int, ...]], wrap: bool = False) -> None:
        self.gradients = [arrays(sizes, 10 + at) for at in range(3)]
        self.make, self.sizes, self.wrap = make, sizes, wrap
        self.params, self.opt = self.begun()
        self.saved, self.values = copy.deepcopy(self.opt.state_dict()), [np.array(p) for p in self.params]
        params, opt = self.begun()
        for at in (1, 2):
            step(opt, self.gradients[at])
        self.end = fingerprint([params, opt])

    def begun(self) -> tuple[list[Any], Any]:
        """After one step."""
        params = [Parameter(a) for a in arrays(self.sizes, 1)] if self.wrap else arrays(self.sizes, 1)
        opt = self.make(params)
        step(opt, self.gradients[0])
        return params, opt

    def next_step(self) -> None:
        step(self.opt, self.gradients[1])

    def restore(self) -> None:
        for p, value in zip(self.params, self.values, strict=True):
            p[...] = value
        self.opt.load_state_dict(self.saved)

    def go_on(self) -> None:
        """To the end, with the bits of the other."""
        for at in (1, 2):
            step(self.opt, self.gradients[at])
        assert fingerprint([self.params, self.opt]) == self.end


def refuses_all_but_a_load(opt: Any, gradients: list[Any], path: Path) -> None:
    """``step``, ``save`` and everything else that would carry on with what nobody knows."""
    name = type(opt).__name__
    remedy = "an earlier step was interrupted half-way; restore the parameters and call load_state_dict"
    params = list(opt.param_groups[0]["params"])
    kept = fingerprint(params)
    for call, place in [
        (lambda: step(opt, gradients), f"{name}.step"),
        (opt.state_dict, f"{name}.state_dict"),
        (lambda: roptim.save({"optimizer": opt}, path), f"{name}.state_dict"),
        (lambda: roptim.Checkpointer(path.parent / "run").save(1, {"optimizer": opt}), f"{name}.state_dict"),
        (lambda: copy.deepcopy(opt), f"{name}.state_dict"),
        (lambda: pickle.dumps(opt), f"{name}.state_dict"),
        (lambda: opt.to("cpu"), f"{name}.state_dict"),
    ]:
        with pytest.raises(roptim.TornError) as caught:
            call()
        assert str(caught.value) == f"{place}: {remedy}"
    assert not path.exists()
    assert fingerprint(params) == kept


def works(threads: int) -> None:
    """Another optimizer, on this many threads."""
    p = np.zeros(100_003, np.float32)
    opt = SGD([p], lr=1.0, threads=threads, clip_norm=1e9)
    for _ in range(2):
        opt.step([np.ones_like(p)])
    assert np.all(p == -2)


def threads_alive() -> int:
    """Of the engine in this process, those that are there."""
    if not sys.platform.startswith("linux"):
        return 0
    found = 0
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError):
            found += Path(f"/proc/self/task/{task}/comm").read_text().startswith("roptim-")
    return found


@pytest.mark.parametrize("size", SIZES)
def test_a_panic_in_every_optimizer_anywhere(optimizer_class: Any, size: str, tmp_path: Path) -> None:
    twins = Twins(lambda params: optimizer_class(params, threads=THREADS), SIZES[size])
    count = parts(twins.next_step)
    twins.restore()
    assert count >= len(SIZES[size]), "each tensor is a part at least"
    works(THREADS)
    alive = threads_alive()
    for i, position in enumerate(positions(count)):
        with (
            drill(position),
            pytest.raises(roptim.InternalError, match=r"\.step: the engine panicked: a drill; this is a defect"),
        ):
            twins.next_step()
        assert twins.opt._engine.torn
        if i == 0:
            refuses_all_but_a_load(twins.opt, twins.gradients[1], tmp_path / "state")
            works(THREADS)
        twins.restore()
        twins.go_on()
        twins.restore()
    assert threads_alive() >= alive, "a thread died"


def test_a_panic_of_the_calling_thread_or_of_one_that_helps() -> None:
    """Both do parts of an elementwise step; one that helps may come too late for any, so that it is asked again."""
    twins = Twins(lambda params: Adam(params, threads=THREADS), [(700, 900)])
    seen = {False: 0, True: 0}
    for on_pool in seen:
        for n in itertools.islice(itertools.cycle([1, 2, 5]), 300):
            with drill(n, on_pool), contextlib.suppress(roptim.InternalError):
                twins.next_step()
            if twins.opt._engine.torn:
                seen[on_pool] += 1
            twins.restore()
            if seen[on_pool] == 3:
                break
        twins.go_on()
        twins.restore()
    assert seen == {False: 3, True: 3}
    works(THREADS)


def test_threads_of_the_engine_that_panic() -> None:
    """Those of a tensor rule do all the work, so that one of them panics for certain."""
    twins = Twins(lambda params: roptim.Muon(params, threads=THREADS), [(300, 400)])
    count = parts(twins.next_step, on_pool=True)
    twins.restore()
    assert count > 50
    for position in positions(count):
        with drill(position, on_pool=True), pytest.raises(roptim.InternalError):
            twins.next_step()
        twins.restore()
        twins.go_on()
        twins.restore()
    works(THREADS)


@pytest.mark.parametrize("option", [{"clip_norm": 1.0}, {"nonfinite": "raise"}, {"clip_norm": 1.0, "clip_value": 0.5}])
@pytest.mark.parametrize("n", [1, 3])
def test_a_panic_while_gradients_are_looked_at_changes_nothing(option: dict[str, Any], n: int) -> None:
    """Nothing has been written then, so the optimizer is whole."""
    twins = Twins(lambda params: Adam(params, threads=THREADS, **option), [(260, 270), (130, 90)])
    before = fingerprint([twins.params, twins.opt])
    with drill(n), pytest.raises(roptim.InternalError):
        twins.next_step()
    assert not twins.opt._engine.torn
    assert fingerprint([twins.params, twins.opt]) == before
    twins.go_on()


def test_a_panic_in_norms_of_arrays() -> None:
    gradients = arrays([(300, 200), (5,)], 3)
    before, norm = fingerprint(gradients), get_total_norm(gradients)
    for call in (lambda: get_total_norm(gradients), lambda: clip_grad_norm_(gradients, 1.0)):
        count = parts(lambda: get_total_norm(gradients))
        for position in positions(count):
            with drill(position), pytest.raises(roptim.InternalError):
                call()
            assert fingerprint(gradients) == before
    assert get_total_norm(gradients) == norm


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.complex64])
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_other_dtypes_and_layouts(name: str, dtype: Any) -> None:
    """These go another way through the loop."""

    def made(seed: int) -> list[Any]:
        return [(2 * a[::2]).astype(dtype) for a in arrays([(80, 500), (6, 4)], seed)] + [
            np.asarray(arrays([(9, 8)], seed)[0].astype(dtype), order="F")
        ]

    params, g = made(1), made(2)
    opt = getattr(roptim, name)(params, lr=0.1, threads=2)
    opt.step(g)
    saved, values = copy.deepcopy(opt.state_dict()), [p.copy() for p in params]
    count = parts(lambda: opt.step(g))
    end = fingerprint([params, opt])
    for position in positions(count):
        for p, value in zip(params, values, strict=True):
            p[...] = value
        opt.load_state_dict(saved)
        with drill(position), pytest.raises(roptim.InternalError):
            opt.step(g)
        assert opt._engine.torn  # type: ignore[union-attr]
        for p, value in zip(params, values, strict=True):
            p[...] = value
        opt.load_state_dict(saved)
        opt.step(g)
        assert fingerprint([params, opt]) == end


def test_a_panic_in_the_first_step_and_a_load_of_no_state() -> None:
    """State that the step made is gone with it."""
    params, g = arrays([(40, 30)], 1), arrays([(40, 30)], 2)
    values = [p.copy() for p in params]
    opt = Adam(params)
    nothing = opt.state_dict()
    with drill(1), pytest.raises(roptim.InternalError):
        opt.step(g)
    for p, value in zip(params, values, strict=True):
        p[...] = value
    opt.load_state_dict(nothing)
    assert opt.state_dict()["state"] == {}
    twin = Adam([v.copy() for v in values])
    for either in (opt, twin):
        either.step(g)
    assert fingerprint(opt) == fingerprint(twin)


def test_a_panic_while_gradients_are_added_up() -> None:
    """Half of what was added is no sum."""
    params = [Parameter(a) for a in arrays([(3, 2), (4, 1)], 1)]
    g = arrays([(3, 2), (4, 1)], 2)
    opt = SGD(params, lr=1.0)
    saved = opt.state_dict()
    values = [np.array(p) for p in params]
    opt.accumulate(g)
    with drill(2), pytest.raises(roptim.InternalError):
        opt.accumulate(g)
    for call in (opt.step, lambda: opt.accumulate(g)):
        with pytest.raises(roptim.TornError, match=r"^SGD\.(step|accumulate): an earlier step was interrupted"):
            call()
    opt.load_state_dict(saved)
    assert not opt._engine.has_sums  # type: ignore[union-attr]
    opt.accumulate(g)
    opt.step()
    assert all(np.array_equal(p, v - d) for p, v, d in zip(params, values, g, strict=True))


# ---- closures -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, entry in REGISTRY.items() if entry["needs_closure"]])
def test_errors_of_a_closure_do_not_tear(name: str) -> None:
    """Whoever raises, after however many evaluations, parameters and state are as before."""
    params = arrays([(30, 20), (3,)], 1)
    opt = getattr(roptim, name)(params, max_iter=6)

    def bowl() -> Any:
        return float(sum(np.square(p - 1, dtype=np.float64).sum() for p in params)), [2 * (p - 1) for p in params]

    opt.step(bowl)
    before = fingerprint([params, opt])
    for error in (ZeroDivisionError, KeyboardInterrupt, SystemExit, roptim.InternalError):
        for last in (1, 2, 4):
            calls = itertools.count(1)

            def failing(error: type[BaseException] = error, last: int = last, calls: Iterator[int] = calls) -> Any:
                if next(calls) == last:
                    raise error
                loss, gradients = bowl()
                return loss + 1000 * last, [g * (-1) ** last for g in gradients]

            with contextlib.suppress(error):
                opt.step(failing)
            assert not opt._engine.torn
            if next(calls) > last:
                assert fingerprint([params, opt]) == before
            else:
                before = fingerprint([params, opt])


@pytest.mark.parametrize("name", [name for name, entry in REGISTRY.items() if entry["needs_closure"]])
def test_a_panic_between_evaluations_gives_the_values_back(name: str) -> None:
    """The step began at values that are known: the parameters have them again, whatever is done with the state."""
    twins = Twins(lambda params: getattr(roptim, name)(params, threads=THREADS), [(260, 270), (5, 3)])
    count = parts(twins.next_step)
    twins.restore()
    for position in positions(count):
        with drill(position), pytest.raises(roptim.InternalError):
            twins.next_step()
        assert fingerprint(twins.params) == fingerprint(twins.values)
        twins.restore()


# ---- on a GPU --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("name", [name for name, entry in REGISTRY.items() if "gpu" in entry["backends"]])
def test_a_panic_around_the_work_of_a_gpu(gpu: str, name: str, wrap: bool) -> None:
    """Arrays on their way to the device and back, and between."""
    on_gpu: dict[str, Any] = {"backend": gpu, "allow_software": True}
    few = {"max_iter": 4} if REGISTRY[name]["needs_closure"] else {}
    twins = Twins(lambda params: getattr(roptim, name)(params, **few, **on_gpu), [(60, 70), (40, 20)], wrap)
    count = parts(twins.next_step)
    twins.restore()
    assert count > len(twins.params)
    for position in positions(count):
        with drill(position), pytest.raises(roptim.InternalError):
            twins.next_step()
        assert twins.opt._engine.torn
        with pytest.raises(roptim.TornError):
            twins.opt.state_dict()
        other = SGD([p := Parameter(np.zeros(50_000, np.float32))], lr=1.0, **on_gpu)
        other.step([np.ones(50_000, np.float32)])
        assert np.all(p.data == -1)
        twins.restore()
        twins.go_on()
        twins.restore()


# ---- averages -------------------------------------------------------------------------------------------------


def test_averages() -> None:
    model, later = arrays([(300, 200), (4,)], 1), arrays([(300, 200), (4,)], 2)
    ema = AveragedModel(model)
    ema.update_parameters(model)
    saved = ema.state_dict()
    count = parts(lambda: ema.update_parameters(later))
    end = fingerprint(ema.state_dict())
    for position in positions(count):
        ema.load_state_dict(saved)
        with drill(position), pytest.raises(roptim.InternalError):
            ema.update_parameters(later)
        sentence = r": an earlier (step|update) was interrupted half-way; "
        kept = fingerprint(model)
        for call in (
            lambda: ema.update_parameters(later),
            ema.state_dict,
            lambda: copy.deepcopy(ema),
            lambda: ema.copy_to(model),
            lambda: ema.applied_to(model).__enter__(),
        ):
            with pytest.raises(roptim.TornError, match=sentence):
                call()
        assert fingerprint(model) == kept
        ema.load_state_dict(saved)
        assert fingerprint(ema.state_dict()) == fingerprint(saved)
        ema.update_parameters(later)
        assert fingerprint(ema.state_dict()) == end


# ---- what heals ------------------------------------------------------------------------------------------------


def test_a_run_with_torn_optimizers_is_restored(tmp_path: Path) -> None:
    """Their states cannot be kept for the case that the restoring fails, and need not be."""
    params = arrays([(30, 20)], 1)
    opts = [Adam(params), roptim.AdamW([q := np.ones(3, np.float32)])]
    ema = AveragedModel(params)
    g = arrays([(30, 20)], 2)
    run = {"params": params, "q": q, "a": opts[0], "b": opts[1], "ema": ema}

    def go_on() -> bytes:
        opts[0].step(g)
        opts[1].step([np.ones(3, np.float32)])
        ema.update_parameters(params)
        return fingerprint([params, q, *opts, ema.state_dict()])

    go_on()
    roptim.save(run, tmp_path / "run")
    end = go_on()
    for torn in ([0], [1], [0, 1, 2]):
        for i in torn:
            with drill(1), pytest.raises(roptim.InternalError):
                [
                    lambda: opts[0].step(g),
                    lambda: opts[1].step([np.ones(3, np.float32)]),
                    lambda: ema.update_parameters(params),
                ][i]()
        with pytest.raises(roptim.TornError):
            roptim.save(run, tmp_path / "other")
        roptim.restore(tmp_path / "run", run)
        assert go_on() == end


@pytest.mark.parametrize("wrap", [False, True])
def test_a_run_with_a_lost_device_is_restored(gpu: str, wrap: bool, tmp_path: Path) -> None:
    """With another optimizer beside, whose load could have failed."""
    params = [Parameter(np.ones(50, np.float32))] if wrap else [np.ones(50, np.float32)]
    opts = [Adam(params, backend=gpu, allow_software=True), Adam([q := np.ones(3, np.float32)])]
    run = {"params": params, "q": q, "a": opts[0], "b": opts[1]}

    def go_on() -> bytes:
        opts[0].step([np.full(50, 0.5, np.float32)])
        opts[1].step([np.ones(3, np.float32)])
        return fingerprint([params, q, *opts])

    go_on()
    roptim.save(run, tmp_path / "run")
    end = go_on()
    opts[0]._engine._lose_device()  # type: ignore[union-attr]
    with pytest.raises(roptim.DeviceLostError):
        go_on()
    roptim.restore(tmp_path / "run", run)
    assert go_on() == end


def test_a_refused_load_does_not_heal() -> None:
    p = np.ones(4, np.float32)
    opt = Adam([p])
    with drill(1), pytest.raises(roptim.InternalError):
        opt.step([p.copy()])
    with pytest.raises(roptim.RoptimError):
        opt.load_state_dict({"state": {0: {"step": -1}}, "param_groups": [{"params": [0]}]})
    with pytest.raises(roptim.TornError):
        opt.step([p.copy()])
    assert "lr: 0.001" in repr(opt)
    opt.param_groups[0]["lr"] = 0.5
    opt.zero_grad()
    with pytest.raises(roptim.TornError):
        opt.step([p.copy()])


def test_an_optimizer_that_nobody_drills_counts_no_parts() -> None:
    """The hook is off unless a test turns it on."""
    works(THREADS)
    assert _roptim._drill(0, False) == 0
