"""Memory: what steps allocate, what happens where there is none, arrays of more than 2^31 elements, and leaks."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from twins import FULL

import roptim

ON_LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's /proc")


#: Steps in the way that an argument says, as often as another one says.
STEPS = """
import gc, sys
import numpy as np
import roptim

way, steps = sys.argv[1], int(sys.argv[2])
dtype = np.float16 if way == "half" else np.float32
arrays = [np.ones((3, 5), dtype) for _ in range(10)]
gradients = [np.full((3, 5), 0.5, dtype) for _ in range(10)]
options = {"clip_norm": 1.0, "nonfinite": "skip"} if way == "clipped" else {}
if way == "parameters":
    arrays = [roptim.Parameter(array) for array in arrays]
    for parameter, gradient in zip(arrays, gradients):
        parameter.grad = gradient
opt = roptim.AdamW(arrays, threads=1, **options)
gc.disable()
for _ in range(steps):
    opt.step() if way == "parameters" else opt.step(gradients)
"""


def printed(code: str, argument: str) -> str:
    """What a program prints, which may take minutes in its long form; it must end well, and say nothing else."""
    done = subprocess.run([sys.executable, "-c", code, argument], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def allocations(way: str, steps: int) -> int:
    """Allocations of a process from the C library, Python's small objects aside."""
    command = ["valgrind", "--undef-value-errors=no", "--leak-check=no", sys.executable, "-c", STEPS, way, str(steps)]
    environment = os.environ | {"ROPTIM_ISA": "avx2", "PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    found = re.search(r"total heap usage: ([\d,]+) allocs", done.stderr)
    assert found is not None, done.stderr
    return int(found[1].replace(",", ""))


@pytest.mark.skipif(not FULL, reason="takes a minute; ROPTIM_FULL_TESTS=1 runs it")
@pytest.mark.skipif(shutil.which("valgrind") is None, reason="needs valgrind")
@pytest.mark.parametrize("way", ["plain", "parameters", "clipped", "half"])
def test_a_step_from_python_allocates_nothing_of_its_own(way: str) -> None:
    more = allocations(way, 2200) - allocations(way, 200)
    # What grows now and then, as Python's arenas and free lists do.
    assert more < 100, f"{more} allocations in 2,000 steps"


#: Calls in a copy of the process for each limit of its memory above what it has. Of each call it says whether there was
#: memory; an end by a signal, as that of a Rust allocation without memory, is one of the whole program.
LIMITED = """
import json, os, resource, sys
import numpy as np
import roptim

N = 1 << 20

def arrays():
    return [np.linspace(-1, 1, N, dtype=np.float32).reshape(1024, -1), np.linspace(0, 1, N, dtype=np.float32)]

def stepped(cls, **options):
    params = arrays() if cls is not roptim.Muon else arrays()[:1]
    opt = cls(params, threads=1, **options)
    gradients = [np.full_like(p, 0.5) for p in params]
    return params, opt, lambda: opt.step(gradients)

def accumulated():
    params, opt, _ = stepped(roptim.Adam)
    gradients = [np.full_like(p, 0.5) for p in params]
    return params, opt, lambda: opt.accumulate(gradients)

def copied():
    params, opt, step = stepped(roptim.Adam)
    step()
    return params, opt, opt.state_dict

def loaded():
    params, opt, step = stepped(roptim.Adam)
    step()
    saved = opt.state_dict()
    return params, opt, lambda: opt.load_state_dict(saved)

def sparse():
    params = arrays()[:1]
    opt = roptim.SGD(params, lr=0.1, momentum=0.9, threads=1)
    gradient = roptim.SparseGrad(np.arange(0, 1024, 2), np.ones((512, 1024), np.float32), (1024, 1024))
    return params, opt, lambda: opt.step([gradient])

def minimized():
    params = arrays()[1:]
    opt = roptim.LBFGS(params, max_iter=3, threads=1)
    return params, opt, lambda: opt.step(lambda: (float((params[0] ** 2).sum()), [2 * params[0]]))

CALLS = {
    "Adam": lambda: stepped(roptim.Adam, clip_norm=1.0),
    "Adafactor": lambda: stepped(roptim.Adafactor),
    "Muon": lambda: stepped(roptim.Muon),
    "accumulate": accumulated,
    "state_dict": copied,
    "load_state_dict": loaded,
    "sparse": sparse,
    "LBFGS": minimized,
}

def child(call, extra):
    params, opt, act = call()
    before = [p.copy() for p in params]
    updates = opt.update_count
    pages = int(open("/proc/self/statm").read().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + extra, hard))
    try:
        act()
        outcome = 0
    except MemoryError as error:
        outcome = 1
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    if outcome:
        for p, old in zip(params, before):
            np.testing.assert_array_equal(p, old)
        assert opt.update_count == updates
        act()
    return outcome

found = {}
for name, call in CALLS.items():
    found[name] = []
    for extra in json.loads(sys.argv[1]):
        pid = os.fork()
        if pid == 0:
            code = 2
            try:
                code = child(call, extra)
            except BaseException as error:
                print(name, extra, repr(error), file=sys.stderr, flush=True)
            os._exit(code)
        found[name].append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
print(json.dumps(found))
"""


@ON_LINUX
def test_where_the_system_gives_no_more_memory_there_is_a_memory_error() -> None:
    count, most = (30, 48) if FULL else (6, 48)
    limits = [(1 << 20) + i * (most << 20) // (count - 1) for i in range(count)]
    found = json.loads(printed(LIMITED, json.dumps(limits)))
    for name, outcomes in found.items():
        assert set(outcomes) <= {0, 1}, (name, outcomes)
        # Each call needs megabytes, and 48 are enough for it.
        assert (outcomes[0], outcomes[-1]) == (1 if name != "Adafactor" else outcomes[0], 0), (name, outcomes)


def available_bytes() -> int:
    """What the system could give without swapping."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="utf-8"))
    return int(found[1]) * 1024 if found else 0


@ON_LINUX
@pytest.mark.skipif(not FULL, reason="takes 8 GiB; ROPTIM_FULL_TESTS=1 runs it")
def test_an_array_of_more_than_2_to_the_31_elements_is_stepped_to_its_end() -> None:
    if available_bytes() < 14 << 30:
        pytest.skip("needs 14 GiB of free memory")
    n, tail = 2**31 + 64, 128
    w, g = np.full(n, 1.0, np.float16), np.full(n, 0.5, np.float16)
    w[-tail:] = 2.0
    roptim.SGD([w], lr=0.5).step([g])
    # As whole numbers, which NumPy compares faster.
    want, bits = int(np.float16(0.75).view(np.uint16)), w.view(np.uint16)
    block = 1 << 24
    for start in range(0, n - tail, block):
        part = bits[start : min(start + block, n - tail)]
        assert (part.min(), part.max()) == (want, want), start
    assert set(w[-tail:].tolist()) == {1.75}
    assert (g[0], g[-1]) == (0.5, 0.5)


#: Optimizers that come and go, with what goes wrong in between; prints resident memory before and after.
COMING_AND_GOING = """
import gc, resource, sys
import numpy as np
import roptim

def resident():
    gc.collect()
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

class Wrong(Exception):
    pass

def fails():
    raise Wrong

def life(i):
    w, b = np.ones((20, 30), np.float32), np.zeros(7, np.float32)
    good, bad = [np.ones_like(w), np.ones_like(b)], [np.ones_like(w), np.ones(8, np.float32)]
    cls = (roptim.Adam, roptim.SGD, roptim.NAdam, roptim.Adafactor)[i % 4]
    opt = cls([w, b], threads=1)
    opt.step(good)
    for wrong in (bad, [w, b], [good[0]], ["text", None]):
        try:
            opt.step(wrong)
        except (ValueError, TypeError):
            pass
        else:
            raise SystemExit("accepted")
    opt.step(good)
    saved = opt.state_dict()
    cls([w.copy(), b.copy()], threads=1).load_state_dict(saved)
    average = roptim.swa_utils.AveragedModel([w, b])
    average.update_parameters([w, b])
    p = roptim.Parameter(np.ones(5, np.float32))
    p.grad = np.ones(5, np.float32)
    other = roptim.SGD([p], lr=0.1, momentum=0.9)
    other.step()
    if i % 10 == 0:
        try:
            roptim.LBFGS([w]).step(fails)
        except Wrong:
            pass

count = int(sys.argv[1])
for i in range(500):
    life(i)
before = resident()
for i in range(count):
    life(i)
print(resident() - before)
"""


@ON_LINUX
def test_optimizers_that_come_and_go_leave_no_memory_behind() -> None:
    grown = int(printed(COMING_AND_GOING, str(100_000 if FULL else 3_000)))
    assert grown < 3 << 20, f"{grown} bytes more"
