"""The machine's limit: a C loop that moves what a step moves, with as many threads, compiled when it is needed."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from peers.cases import CASES, OPTIMIZERS, Contest, gradients_for, parameters
from peers.side import Side

#: Elements that one thread takes at a time.
CHUNK = 2**16
#: Slots that limit.c can take.
MOST_SLOTS = 3


def compiled() -> ctypes.CDLL:
    """limit.c as a library. Raises OSError or CalledProcessError where the machine has no such compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        raise OSError("no cc")
    with tempfile.TemporaryDirectory() as folder:
        library = str(Path(folder) / "limit.so")
        source = str(Path(__file__).with_name("limit.c"))
        command = [compiler, "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", source, "-o", library]
        subprocess.run(command, check=True, capture_output=True)
        return ctypes.CDLL(library)


def array_slots(contest: Contest) -> int:
    """How many arrays an optimizer keeps per parameter, asked of a small one after a step."""
    import roptim

    p = np.ones(2, contest.dtype)
    opt = getattr(roptim, contest.name)([p], **contest.hypers)
    opt.step([p / 8])
    return sum(getattr(value, "shape", None) == p.shape for value in opt.state[p].values())


class LimitSide(Side):
    """The loop over arrays of its own, which NumPy allocates; the gradients are those of roptim."""

    def __init__(self, library: ctypes.CDLL) -> None:
        super().__init__()
        self._library = library
        self._alive: tuple[Any, ...] = ()

    def setup(self, case: str, optimizer: str) -> list[str]:
        """See Side."""
        self._case, self._contest = case, OPTIMIZERS[optimizer]
        return [""]

    def make(self, mode: str) -> tuple[Callable[[], object], Callable[[], Sequence[Any]]]:
        """See Side."""
        case, dtype = CASES[self._case], self._contest.dtype
        slots = array_slots(self._contest)
        if slots > MOST_SLOTS:
            raise SystemExit(f"compare.py: limit.c takes at most {MOST_SLOTS} slots, {self._contest.name} has {slots}")
        params, gradients = parameters(case, dtype), gradients_for(self._case, dtype)
        state = [[np.full_like(p, 0.01) for p in params] for _ in range(slots)]
        p, length = chunks(params)
        g, _ = chunks(gradients)
        s = np.concatenate([chunks(arrays)[0] for arrays in state]) if slots else np.zeros(1, np.uintp)
        loop = getattr(self._library, f"limit_{dtype}")
        threads = self.threads if case.elements >= 2 * CHUNK else 1
        pointers = [ctypes.c_void_p(array.ctypes.data) for array in (length, p, g, s)]
        numbers = ctypes.c_int(threads), ctypes.c_double(1), ctypes.c_double(0)
        step = functools.partial(loop, ctypes.c_longlong(len(length)), ctypes.c_longlong(slots), *pointers, *numbers)
        # The pointers do not keep their arrays alive.
        self._alive = (params, gradients, state, p, g, s, length)
        return step, lambda: params

    def free(self) -> None:
        """See Side."""
        self._alive = ()
        super().free()


def chunks(arrays: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Addresses and lengths of the pieces that threads take."""
    pieces = [
        (array.ctypes.data + start * array.itemsize, min(CHUNK, array.size - start))
        for array in arrays
        for start in range(0, array.size, CHUNK)
    ]
    return np.array([at for at, _ in pieces], np.uintp), np.array([n for _, n in pieces], np.int64)
