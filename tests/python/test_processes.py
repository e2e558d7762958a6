"""Several threads in one optimizer, forks, other ways to start processes, and interpreters beside the main one."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from helpers import Sign, fingerprint, step
from processes import run
from twins import FULL

import roptim
from roptim import SGD, Adam, AdamW, Parameter

FORKS = 200 if FULL else 20
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
#: For what takes turns, so that a call is cut where it may be.
SMALL, LARGE = 1000, 300_000


def normal(n: int, seed: int = 1) -> Any:
    return np.random.default_rng(seed).standard_normal(n).astype(np.float32)


def in_threads(work: Callable[[int], Any], count: int) -> None:
    """At once in so many threads; an error in one is the test's."""
    errors: list[BaseException] = []
    start = threading.Barrier(count)

    def guarded(i: int) -> None:
        start.wait(timeout=60)
        try:
            work(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive(), "a thread hangs"
    for error in errors:
        raise error


@pytest.fixture
def short_turns() -> Any:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


# ---- threads --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [SMALL, LARGE])
@pytest.mark.parametrize("name", ["AdamW", "NAdam"])
def test_each_call_of_many_threads_steps_or_is_refused(n: int, name: str, short_turns: None) -> None:
    """8 threads, 500 calls each: as many steps as succeeded, no matter whose, and their bits."""
    threads, calls = 8, 500 if FULL or n == SMALL else 100
    p, g = normal(n), normal(n, 2)
    twin = p.copy()
    opt = getattr(roptim, name)([p], threads=2, clip_norm=1.0)
    steps, refusals = [0] * threads, set[str]()

    def work(i: int) -> None:
        for _ in range(calls):
            try:
                opt.step([g])
                steps[i] += 1
            except roptim.ConcurrentStepError as error:
                refusals.add(str(error))

    in_threads(work, threads)
    assert refusals <= {f"{name}: another thread is using this optimizer; call it from one thread at a time"}
    total = sum(steps)
    assert 0 < total <= threads * calls
    assert opt.update_count == opt.state[0]["step"] == total
    other = getattr(roptim, name)([twin], threads=2, clip_norm=1.0)
    for _ in range(total):
        other.step([g])
    assert fingerprint([p, opt]) == fingerprint([twin, other])


@pytest.mark.parametrize("n", [SMALL, LARGE])
def test_every_other_call_beside_steps(n: int, tmp_path: Any, short_turns: None) -> None:
    """They succeed or are refused; what they see is a state between two steps."""
    p, g = Parameter(np.zeros(n, np.float32)), np.ones(n, np.float32)
    opt = Adam([p], threads=2)
    over = threading.Event()
    succeeded: dict[str, int] = {}

    def consistent(saved: Any) -> None:
        if saved["state"]:
            assert saved["state"][0]["step"] == saved["roptim"]["update_count"]
            mean = saved["state"][0]["exp_avg"]
            assert mean.min() == mean.max(), "one of the middle of a step"

    def calls(i: int) -> None:
        def save() -> None:
            roptim.save(opt, tmp_path / str(i))
            consistent(roptim.load(tmp_path / str(i)))

        def load() -> None:
            opt.load_state_dict(first)

        def add() -> None:
            if len(opt.param_groups) < 40:
                opt.add_param_group({"params": [Parameter(np.zeros(3, np.float32))]})

        named: dict[str, Callable[[], Any]] = {
            "state_dict": lambda: consistent(opt.state_dict()),
            "zero_grad": opt.zero_grad,
            "save": save,
            "copy": lambda: consistent(copy.deepcopy(opt).state_dict()) if n == SMALL else None,
            "groups": lambda: opt.param_groups[0].__setitem__("lr", 1.0),
            "add": add,
            "load": load,
            "look": lambda: (opt.update_count, opt.skip_count, opt.gradient_norm, opt.device, repr(opt)),
            "state": lambda: [np.array(v) for v in opt.state[0].values()],
        }
        while not over.is_set():
            for name, call in named.items():
                try:
                    call()
                    succeeded[name] = succeeded.get(name, 0) + 1
                except roptim.ConcurrentStepError:
                    pass
                except roptim.RoptimValueError:
                    # A group was added meanwhile, or is there already that the saved state lacks.
                    assert name in ("load", "copy")
                except KeyError:
                    # Of a view of state that a load or a reset made empty while it was read.
                    assert name == "state"

    first = opt.state_dict()
    stepped = 0

    def steps(i: int) -> None:
        nonlocal stepped
        end = time.monotonic() + (5 if FULL else 1)
        while time.monotonic() < end:
            p.grad = g
            try:
                opt.step()
                stepped += 1
            except roptim.ConcurrentStepError:
                pass
        over.set()

    in_threads(lambda i: steps(i) if i == 0 else calls(i), 3)
    assert stepped > 0
    print(f"{stepped} steps beside {succeeded}")
    assert sum(succeeded.values()) > len(succeeded) > 3
    assert p.data.min() == p.data.max(), "no step was cut"
    assert not opt._engine.torn  # type: ignore[union-attr]


def test_groups_that_threads_add_have_one_order(short_turns: None) -> None:
    """The engine's and the optimizer's: a group's options are those of its parameters."""
    opt = SGD([np.zeros(1, np.float32)], lr=1.0)
    added = [0] * 4

    def work(i: int) -> None:
        for k in range(150):
            lr = float(1000 * i + k + 2)
            with contextlib.suppress(roptim.ConcurrentStepError):
                opt.add_param_group({"params": [np.full(2, lr, np.float32)], "lr": lr})
                added[i] += 1

    in_threads(work, 4)
    assert len(opt.param_groups) == 1 + sum(added) > 1
    opt.step([np.ones_like(p) for group in opt.param_groups for p in group["params"]])
    for group in opt.param_groups[1:]:
        assert np.all(group["params"][0] == 0), "it began with its lr"
        group["lr"] = 0.5
    opt.step([np.ones_like(p) for group in opt.param_groups for p in group["params"]])
    assert all(np.all(group["params"][0] == -0.5) for group in opt.param_groups[1:])


def test_two_optimizers_in_two_threads_do_not_mind_each_other(short_turns: None) -> None:
    """They share the pool of threads."""
    params = [normal(LARGE, i) for i in range(2)]
    twins = [p.copy() for p in params]
    opts = [Adam([p], threads=3) for p in params]

    def work(i: int) -> None:
        for _ in range(30):
            opts[i].step([twins[1 - i]])

    in_threads(work, 2)
    for i, start in enumerate(twins):
        p = start.copy()
        opt = Adam([p], threads=1)
        for _ in range(30):
            opt.step([twins[1 - i]])
        assert fingerprint([p, opt]) == fingerprint([params[i], opts[i]])


# ---- forks ----------------------------------------------------------------------------------------------------


def child_of(work: Callable[[], bool], seconds: float = 10.0) -> None:
    """A forked child that does the work, finds it well done and exits in time."""
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        code = 3
        try:
            code = 0 if work() else 1
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
        finally:
            os._exit(code)
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        if time.monotonic() - began > seconds:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
            pytest.fail("the child hangs")
        time.sleep(0.001)
    assert os.waitstatus_to_exitcode(status) == 0


@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forks_while_threads_are_in_steps() -> None:
    """A child has its parent's optimizers as they are between two steps, and goes on from there with the right bits:
    that of the thread that forks, those that other threads are stepping, and one of its own."""
    # With work that is done without the interpreter lock, and that a fork nearly always finds under way.
    start = [normal(300_000), normal(300_000), normal(200 * 200).reshape(200, 200)]
    g = [normal(300_000, 2), normal(300_000, 2), normal(200 * 200, 2).reshape(200, 200)]

    def made() -> tuple[list[Any], list[Any]]:
        params = [a.copy() for a in start]
        return params, [kind([p], threads=2) for kind, p in zip((Adam, Adam, roptim.Muon), params, strict=True)]

    params, opts = made()
    for i, opt in enumerate(opts):
        opt.step([g[i]])
    over = threading.Event()

    def steps(i: int) -> None:
        while not over.is_set():
            opts[i].step([g[i]])
            time.sleep(0.001)

    threads = [threading.Thread(target=steps, args=(i,)) for i in (1, 2)]
    for thread in threads:
        thread.start()
    found: list[tuple[int, int, str]] = []
    try:
        for _ in range(FORKS):
            receive, send = os.pipe()

            def child(send: int = send) -> bool:
                for i, (p, opt) in enumerate(zip(params, opts, strict=True)):
                    for _ in range(2):
                        opt.step([g[i]])
                    told = f"{i} {opt.update_count} {hashlib.sha256(p.tobytes()).hexdigest()}\n"
                    os.write(send, told.encode())
                q = np.zeros(200_000, np.float32)
                own = SGD([q], lr=1.0, threads=2)
                own.step([np.ones_like(q)])
                return bool(np.all(q == -1))

            child_of(child)
            os.close(send)
            with os.fdopen(receive) as told:
                lines = [line.split() for line in told]
            assert [line[0] for line in lines] == ["0", "1", "2"]
            found += [(int(line[0]), int(line[1]), line[2]) for line in lines]
            opts[0].step([g[0]])
    finally:
        over.set()
        for thread in threads:
            thread.join()
    found += [(i, opt.update_count, hashlib.sha256(params[i].tobytes()).hexdigest()) for i, opt in enumerate(opts)]
    # As undisturbed optimizers have them.
    params, others = made()
    for i, k, seen in sorted(found):
        while others[i].update_count < k:
            others[i].step([g[i]])
        assert hashlib.sha256(params[i].tobytes()).hexdigest() == seen, f"optimizer {i} after {k} steps"
    assert all(len({k for j, k, _ in found if j == i}) > FORKS // 2 for i in range(3))


@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forks_while_threads_load_and_save() -> None:
    """A child can use the optimizer at once: nobody who is not there holds it."""
    opt = Adam([normal(SMALL)])
    opt.step([normal(SMALL)])
    saved = opt.state_dict()
    over = threading.Event()

    def calls() -> None:
        while not over.is_set():
            with contextlib.suppress(roptim.ConcurrentStepError):
                opt.load_state_dict(saved)
                opt.state_dict()

    threads = [threading.Thread(target=calls) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(FORKS):
            child_of(lambda: opt.step([normal(SMALL)]) is None)
    finally:
        over.set()
        for thread in threads:
            thread.join()


@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forks_do_not_refuse_a_call_of_another_thread() -> None:
    """Who looks whether an optimizer is in use must not be taken for one who uses it."""
    opt = Adam([normal(SMALL)])
    opt.step([normal(SMALL)])
    over = threading.Event()
    errors: list[BaseException] = []

    def calls() -> None:
        while not over.is_set():
            try:
                opt.state_dict()
                opt.step([normal(SMALL)])
            except BaseException as error:
                errors.append(error)

    thread = threading.Thread(target=calls)
    thread.start()
    for _ in range(FORKS):
        child_of(lambda: True)
    over.set()
    thread.join()
    assert not errors


@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_while_another_thread_evaluates_a_closure() -> None:
    """Nobody ends that step in the child: the optimizer is torn there, and whole once it is loaded."""
    p = np.full(4, 3.0)
    opt = roptim.LBFGS([p])
    opt.step(lambda: (float((p**2).sum()), [2 * p]))
    saved, before = opt.state_dict(), p.copy()
    inside, go_on = threading.Event(), threading.Event()
    calls = 0

    def bowl() -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            inside.set()
            assert go_on.wait(60)
        return float(((p - 1) ** 4).sum()), [4 * (p - 1) ** 3]

    thread = threading.Thread(target=lambda: opt.step(bowl))
    thread.start()
    assert inside.wait(60)

    def child() -> bool:
        try:
            opt.step(lambda: (0.0, [p]))
        except roptim.TornError:
            p[...] = before
            opt.load_state_dict(saved)
            opt.step(lambda: (float((p**2).sum()), [2 * p]))
            return opt.update_count == 2
        return False

    child_of(child)
    go_on.set()
    thread.join()
    assert opt.update_count == 2
    assert not opt._engine.torn  # type: ignore[union-attr]


@needs_fork
def test_a_fork_within_a_closure_goes_on_in_both() -> None:
    p = np.full(4, 3.0)
    opt = roptim.LBFGS([p], max_iter=4)
    calls = 0
    pid = -1

    def bowl() -> Any:
        nonlocal calls, pid
        calls += 1
        if calls == 2:
            pid = os.fork()
        return float(((p - 1) ** 4).sum()), [4 * (p - 1) ** 3]

    opt.step(bowl)
    if pid == 0:
        os._exit(0 if opt.update_count == 1 and opt.state_dict()["state"] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert opt.update_count == 1


@needs_fork
def test_handlers_of_others_may_step_and_threads_need_not_wait_for_them() -> None:
    """A handler that is called after the library's may itself step, or wait for a thread that steps under a lock."""
    code = """
import os, sys, threading, time
lock, opts = threading.Lock(), []
def before():
    opts[0].step([g])
    lock.acquire()
os.register_at_fork(before=before, after_in_parent=lock.release, after_in_child=lock.release)
import numpy as np, roptim
g = np.ones(100_000, np.float32)
params = [np.zeros(100_000, np.float32) for _ in range(2)]
opts += [roptim.SGD([p], lr=1.0, threads=2) for p in params]
held = threading.Event()
def work():
    with lock:
        held.set()
        time.sleep(0.2)
        opts[1].step([g])
thread = threading.Thread(target=work)
thread.start()
held.wait()
began = time.monotonic()
child = os.fork()
if child == 0:
    opts[0].step([g])
    opts[1].step([g])
    os._exit(0 if params[0][0] == -2 and params[1][0] == -2 else 1)
assert os.waitpid(child, 0)[1] == 0
thread.join()
assert time.monotonic() - began < 5
print(params[0][0], params[1][0])
"""
    assert run(code) == "-1.0 -1.0\n"


@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_optimizers_on_a_gpu_are_refused_in_children(gpu: str) -> None:
    """At once, also where the parent was in a step."""
    on_gpu: dict[str, Any] = {"backend": gpu, "allow_software": True}
    params = [Parameter(normal(50_000)) for _ in range(2)]
    opts = [AdamW([p], **on_gpu) for p in params]
    g = normal(50_000, 2)
    over = threading.Event()

    def steps() -> None:
        while not over.is_set():
            opts[1].step([g])

    opts[0].step([g])
    thread = threading.Thread(target=steps)
    thread.start()

    def child() -> bool:
        refused = 0
        for call in (
            lambda: opts[0].step([g]),
            lambda: opts[1].step([g]),
            lambda: np.array(params[1].data),
            lambda: opts[1].state_dict(),
            lambda: AdamW([normal(3)], **on_gpu),
        ):
            try:
                call()
            except roptim.ForkedGpuError:
                refused += 1
        p = np.zeros(200_000, np.float32)
        SGD([p], lr=1.0, threads=2).step([np.ones_like(p)])
        return refused == 5 and bool(np.all(p == -1))

    try:
        for _ in range(max(FORKS // 10, 3)):
            child_of(child)
            opts[0].step([g])
    finally:
        over.set()
        thread.join()
    assert np.isfinite(params[0].data).all()


# ---- other ways to begin a process ----------------------------------------------------------------------------


def steps_elsewhere(opt: Any, params: Any, g: Any) -> bytes:
    """Three steps in another process, of an optimizer as it arrived there."""
    for _ in range(3):
        step(opt, [g])
    held = params if params is not None else list(opt.param_groups[0]["params"])
    return fingerprint([held, opt])


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_optimizers_travel_to_processes(method: str) -> None:
    """Pickled with their parameters, or, forked, as they are."""
    g = normal(100_000, 2)
    jobs = []
    for make in (lambda p: Adam([p], threads=2), lambda p: roptim.LBFGS([p]), lambda p: Sign([Parameter(p)])):
        p = normal(100_000)
        opt = make(p)
        if isinstance(opt, Sign):
            opt.param_groups[0]["params"][0].grad = g
            opt.step()
        else:
            step(opt, [g])
        jobs.append((opt, None if isinstance(opt, Sign) else p))
    opt, p = jobs[0]
    lbfgs, q = jobs[1]
    with multiprocessing.get_context(method).Pool(2) as pool:
        arrived = pool.starmap(steps_elsewhere, [(opt, None, g), (lbfgs, None, g)])
        sign = pool.apply(same_groups, (jobs[2][0],))
    assert arrived == [steps_elsewhere(opt, [p], g), steps_elsewhere(lbfgs, [q], g)]
    assert sign == same_groups(jobs[2][0])


def same_groups(opt: Any) -> bytes:
    """What an optimizer written in Python is in another process."""
    return fingerprint([opt, *[p.data for p in opt.param_groups[0]["params"]]])


# ---- interpreters beside the main one -------------------------------------------------------------------------


@pytest.mark.skipif(sys.version_info[:2] < (3, 8), reason="has none")
@pytest.mark.parametrize("main_first", [True, False])
def test_a_subinterpreter_is_refused_and_the_main_one_works(main_first: bool) -> None:
    code = """
import importlib, sys
for name in ("_interpreters", "_xxsubinterpreters"):
    try:
        interpreters = importlib.import_module(name)
        break
    except ImportError:
        pass
else:
    print("none")
    sys.exit()
if sys.argv[1] == "True":
    import roptim
source = '''
for _ in range(2):
    try:
        import roptim
        raise SystemError("imported")
    except ImportError as error:
        said = str(error)
    want = "roptim: the interpreter must be the main one of its process, got a subinterpreter; use threads or processes"
    if said != want:
        raise SystemError(said)
'''
for _ in range(2):
    other = interpreters.create()
    run = getattr(interpreters, "run_string")
    outcome = run(other, source)
    assert outcome is None, outcome
    interpreters.destroy(other)
import numpy as np, roptim
p = np.zeros(200_000, np.float32)
roptim.SGD([p], lr=1.0, threads=2).step([np.ones_like(p)])
print("works" if np.all(p == -1) else p)
"""
    said = run(code, main_first).strip()
    if said == "none":
        pytest.skip("there is no module of interpreters")
    assert said == "works"
