"""``roptim.threads``: a bound for the time of a block, which no bit depends on."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import re
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest
from helpers import fingerprint, step

import roptim
from roptim import SGD, AdamW, _roptim
from roptim.optimizer import REGISTRY
from roptim.utils import clip_grad_norm_, get_total_norm


def bound() -> int | None:
    """What holds in this thread now."""
    now: int | None = _roptim.limit_threads(None)
    _roptim.limit_threads(now)
    return now


def used(opt: Any) -> int:
    """The threads that an optimizer says it uses."""
    found = re.fullmatch(r"cpu \((\d+) threads\)", opt.device)
    assert found is not None
    return int(found[1])


@pytest.fixture(autouse=True)
def unbound_before_and_after() -> Any:
    assert bound() is None
    yield
    assert bound() is None


# ---- blocks ---------------------------------------------------------------------------------------------------


def test_a_block_bounds_and_ends() -> None:
    opt = SGD([np.zeros(3, np.float32)], threads=6)
    assert used(opt) == 6
    for n in (1, 2, 5, 6):
        with roptim.threads(n):
            assert used(opt) == n
        assert used(opt) == 6
    with roptim.threads(100):
        assert used(opt) == 6


def test_an_inner_block_only_lowers() -> None:
    opt = SGD([np.zeros(3, np.float32)], threads=8)
    with roptim.threads(4):
        with roptim.threads(7):
            assert used(opt) == 4
            with roptim.threads(2):
                assert used(opt) == 2
                with roptim.threads(3), roptim.threads(1), roptim.threads(8):
                    assert used(opt) == 1
                assert used(opt) == 2
            assert used(opt) == 4
        assert used(opt) == 4
        opt = SGD([np.zeros(3, np.float32)], threads=8)
        assert used(opt) == 4
    assert used(opt) == 8


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit, StopIteration])
def test_it_ends_with_exceptions(kind: type[BaseException]) -> None:
    @roptim.threads(2)
    def raises() -> None:
        assert bound() == 2
        raise kind

    # What a generator may not raise arrives as a RuntimeError, which contextlib turns back.
    with roptim.threads(3):
        with pytest.raises(kind):
            raises()
        assert bound() == 3
    assert bound() is None


def test_errors_of_steps_pass_through() -> None:
    opt = SGD([np.zeros(3, np.float32)])
    with pytest.raises(ValueError, match="shape"), roptim.threads(1):
        opt.step([np.zeros(4, np.float32)])
    assert bound() is None


def test_a_refused_bound_changes_nothing() -> None:
    with roptim.threads(3):
        for wrong in (0, -1, None, 2.5):
            with pytest.raises(roptim.RoptimError), roptim.threads(wrong):  # type: ignore[arg-type]  # a type to refuse
                pytest.fail("entered")
            assert bound() == 3


def test_it_decorates_functions() -> None:
    opt = SGD([np.zeros(3, np.float32)], threads=8)

    @roptim.threads(2)
    def count(x: int, *, times: int = 1) -> int:
        """Of use."""
        return used(opt) * x * times

    assert [count(1), count(2, times=3), count(1)] == [2, 12, 2]
    assert (count.__name__, count.__doc__) == ("count", "Of use.")
    with roptim.threads(1):
        assert count(1) == 1
    assert used(opt) == 8

    @roptim.threads(2)
    def recursive(depth: int) -> list[int]:
        return [used(opt)] + (recursive(depth - 1) if depth else [])

    assert recursive(3) == [2, 2, 2, 2]


def test_nothing_happens_before_the_block_is_entered() -> None:
    block = roptim.threads(1)
    assert bound() is None
    with block:
        assert bound() == 1
    later = roptim.threads(0)  # as with every generator
    with pytest.raises(ValueError, match="n must be a whole number >= 1"):
        later.__enter__()


def test_it_is_each_threads_own() -> None:
    opt = SGD([np.zeros(3, np.float32)], threads=8)
    entered, leave = threading.Barrier(4), threading.Barrier(4)
    seen: dict[int, list[int | None]] = {}

    def work(n: int) -> None:
        before = used(opt)
        with roptim.threads(n):
            entered.wait(timeout=30)
            now = used(opt)
            leave.wait(timeout=30)
        seen[n] = [before, now, used(opt)]

    with roptim.threads(7):
        threads = [threading.Thread(target=work, args=(n,)) for n in (1, 2, 3)]
        for thread in threads:
            thread.start()
        entered.wait(timeout=30)
        assert used(opt) == 7
        leave.wait(timeout=30)
        for thread in threads:
            thread.join(timeout=30)
    assert seen == {n: [8, n, 8] for n in (1, 2, 3)}


def test_generators_and_coroutines_leave_it_as_it_was_when_they_end() -> None:
    def numbers() -> Any:
        with roptim.threads(2):
            yield bound()

    walk = numbers()
    assert next(walk) == 2
    walk.close()
    assert bound() is None

    async def steps() -> int | None:
        with roptim.threads(2):
            return bound()

    assert asyncio.run(steps()) == 2
    assert bound() is None
    with contextlib.ExitStack() as stack:
        for n in (5, 3, 4):
            stack.enter_context(roptim.threads(n))
        assert bound() == 3


# ---- values ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [True, False, 2.5, 2.0, "2", None, [2], 2j, np.True_, np.float32(2), np.array(2)])
def test_what_is_no_whole_number(n: Any) -> None:
    with pytest.raises(TypeError) as caught, roptim.threads(n):
        pytest.fail("entered")
    assert isinstance(caught.value, roptim.RoptimError)
    assert str(caught.value) == f"threads: n must be a whole number >= 1, got {n!r}"


@pytest.mark.parametrize("n", [0, -1, -(2**70), np.int8(0), np.int64(-5), np.uint8(0)])
def test_what_is_too_small(n: Any) -> None:
    with pytest.raises(ValueError, match="whole number") as caught, roptim.threads(n):
        pytest.fail("entered")
    assert isinstance(caught.value, roptim.RoptimError)
    assert str(caught.value) == f"threads: n must be a whole number >= 1, got {n!r}"


@pytest.mark.parametrize("kind", [int, np.int8, np.uint8, np.int16, np.int32, np.uint32, np.int64, np.uint64])
def test_whole_numbers_of_every_kind(kind: Any) -> None:
    with roptim.threads(kind(3)):
        assert bound() == 3


@pytest.mark.parametrize("n", [2**16, 2**31, 2**32, 2**63, 2**64 - 1, np.uint64(2**64 - 1)])
def test_large_bounds_bound_nothing(n: Any) -> None:
    opt = SGD([np.zeros(3, np.float32)], threads=3)
    with roptim.threads(n):
        assert used(opt) == 3
        with roptim.threads(2):
            assert used(opt) == 2
        assert used(opt) == 3


# ---- bits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_no_bit_depends_on_it(optimizer_class: Any, clip_norm: float | None) -> None:
    if clip_norm is not None and REGISTRY[optimizer_class.__name__]["needs_closure"]:
        pytest.skip("bounds no gradients")
    rng = np.random.default_rng(1)
    starts = [rng.standard_normal((350, 301)).astype(np.float32), rng.standard_normal((3, 7)).astype(np.float32)]
    gradients = [[rng.standard_normal(a.shape).astype(np.float32) for a in starts] for _ in range(2)]
    found = set()
    for n in (None, 1, 2, 3, 5):
        params = [a.copy() for a in starts]
        opt = optimizer_class(params, threads=5, **({} if clip_norm is None else {"clip_norm": clip_norm}))
        with contextlib.nullcontext() if n is None else roptim.threads(n):
            for given in gradients:
                step(opt, given)
        found.add((fingerprint([params, opt.state_dict()["state"]]), opt.gradient_norm))
    assert len(found) == 1


def test_one_optimizer_under_bounds_in_turn() -> None:
    rng = np.random.default_rng(2)
    start = rng.standard_normal(200_003).astype(np.float32)
    opt, twin = (AdamW([start.copy()], threads=4, clip_norm=1.0) for _ in range(2))
    for n in (1, 4, 2, 1, 3, 4):
        g = rng.standard_normal(200_003).astype(np.float32)
        with roptim.threads(n):
            opt.step([g])
        twin.step([g])
        assert fingerprint([opt, *opt.param_groups[0]["params"]]) == fingerprint(
            [twin, *twin.param_groups[0]["params"]]
        )


def test_norms_of_many_arrays() -> None:
    """Of all sizes, empty ones at both ends and between: over the lengths at which blocks and tasks begin."""
    rng = np.random.default_rng(3)
    sizes = [0, 0, 1, 7, 0, 4095, 4096, 4097, 3, 0, 0, 65_537, 31, 0, 8193, 32_767, 1, 0]
    arrays = [rng.standard_normal(n).astype(np.float32) for n in sizes]
    for p in (1.0, 2.0, 3.0, float("inf")):
        found = set()
        for n in (None, 1, 2, 3, 8):
            with contextlib.nullcontext() if n is None else roptim.threads(n):
                found.add(float(get_total_norm(arrays, p)))
        assert len(found) == 1
    found_bytes = set()
    for n in (None, 1, 2):
        copies = [a.copy() for a in arrays]
        with contextlib.nullcontext() if n is None else roptim.threads(n):
            clip_grad_norm_(copies, 1.0)
        found_bytes.add(b"".join(a.tobytes() for a in copies))
    assert len(found_bytes) == 1
    exact = np.sqrt(sum(np.square(a.astype(np.float64)).sum() for a in arrays))
    assert float(get_total_norm(arrays)) == pytest.approx(exact, rel=1e-6)


# ---- threads that are started ---------------------------------------------------------------------------------

COUNT = """
import json, os, sys
os.environ.update(OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1")
import numpy as np
import roptim
from roptim.optimizer import REGISTRY
from roptim.utils import clip_grad_norm_
sys.path.insert(0, sys.argv[1])
from helpers import step

def now():
    return len(os.listdir("/proc/self/task"))

g = np.ones((400, 500), np.float32)
before, found = now(), {}
with roptim.threads(1):
    for name, entry in REGISTRY.items():
        options = {} if entry["needs_closure"] else {"clip_norm": 1.0, "nonfinite": "raise"}
        opt = getattr(roptim, name)([np.ones_like(g)], threads=4, **options)
        for _ in range(2):
            step(opt, [g])
        opt.state_dict()
        found[name] = now() - before
    opt = roptim.SGD([np.ones_like(g)], threads=4, lr=0.1)
    opt.step([g.copy()], zero_grad=True)
    clip_grad_norm_([g.copy()], 1.0)
    found["others"] = now() - before
with roptim.threads(2):
    opt.step([g])
    found["two"] = now() - before
opt.step([g])
found["four"] = now() - before
print(json.dumps(found))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts in /proc")
def test_with_one_thread_no_other_is_started() -> None:
    done = subprocess.run(
        [sys.executable, "-c", COUNT, os.path.dirname(__file__)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    two, four = found.pop("two"), found.pop("four")
    assert found == dict.fromkeys([*REGISTRY, "others"], 0)
    # And with more of them there are: the calling thread works, too.
    assert two == 1
    assert four == 1 + 3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_keeps_the_bound() -> None:
    opt = SGD([p := np.zeros(200_000, np.float32)], lr=1.0, threads=4)
    g = np.ones_like(p)
    opt.step([g])
    gc.collect()
    with roptim.threads(2):
        child = os.fork()
        if child == 0:
            code = 1
            with contextlib.suppress(BaseException):
                opt.step([g])
                code = 0 if used(opt) == 2 and np.all(p == -2) else 2
            os._exit(code)
        _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert np.all(p == -1)


# ---- what was found -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2**64, 10**30])
def test_bounds_beyond_all_machines_bound_nothing(n: int) -> None:
    with roptim.threads(n):
        assert used(SGD([np.zeros(3, np.float32)], threads=3)) == 3


def test_blocks_that_do_not_nest_leave_no_bound_behind() -> None:
    """Two coroutines of one thread, of which the first to enter is the first to leave."""
    opt = SGD([np.zeros(3, np.float32)], threads=3)

    async def block(before: float, within: float, n: int) -> None:
        await asyncio.sleep(before)
        with roptim.threads(n):
            await asyncio.sleep(within)

    async def both() -> None:
        await asyncio.gather(block(0, 0.02, 1), block(0.01, 0.02, 2))

    asyncio.run(both())
    assert used(opt) == 3
