"""A peer: something that can be set up for a case and asked for timed steps, here or in a worker process."""

from __future__ import annotations

import base64
import gc
import json
import math
import os
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from peers.cases import gradients_for

#: Untimed steps before the first round: they allocate the state and give the values that are compared.
WARM_UP_STEPS = 3
#: Pause before each turn, in which the threads of the one before fall asleep.
PAUSE_SECS = 0.01
#: Values per entrant that are compared, spread over all tensors.
SAMPLE_SIZE = 65536


class Side(ABC):
    """One library with its entrants, one per mode; most have one mode, without a name."""

    def __init__(self) -> None:
        self._steps: dict[str, Callable[[], object]] = {}
        #: What workers add to the record; local sides have no versions of their own.
        self.versions: dict[str, str] = {}

    def start(self, threads: int) -> dict[str, str]:
        """Gets ready; returns versions."""
        self.threads = threads
        return {}

    @abstractmethod
    def setup(self, case: str, optimizer: str) -> list[str]:
        """Makes what the entrants of a case share; returns their modes."""

    @abstractmethod
    def make(self, mode: str) -> tuple[Callable[[], object], Callable[[], Sequence[Any]]]:
        """One entrant, at its start: its step, and a function that returns its parameters."""

    def settle(self, mode: str) -> None:  # noqa: B027 - not abstract: most sides have nothing to do here
        """Called when a mode's first steps are taken and sampled."""

    def begin(self, mode: str) -> dict[str, Any]:
        """Makes one entrant and takes its first steps: seconds of each, and some values of every parameter."""
        step, params = self.make(mode)
        self._steps[mode] = step
        seconds = timed(step, WARM_UP_STEPS, 1)
        sample = sampled(params())
        self.settle(mode)
        return {"seconds": seconds, "sample": base64.b64encode(sample.tobytes()).decode()}

    def run(self, mode: str, batches: int, steps: int) -> list[float]:
        """Seconds per step of each batch."""
        time.sleep(PAUSE_SECS)
        return timed(self._steps[mode], batches, steps)

    def free(self) -> None:
        """Forgets the case."""
        self._steps.clear()
        gradients_for.cache_clear()
        gc.collect()

    def close(self) -> None:  # noqa: B027 - not abstract: a side in this process has nothing to end
        """Ends the worker, if it has one."""


def timed(step: Callable[[], object], batches: int, steps: int) -> list[float]:
    """Seconds per step of each of so many batches of steps. The clock is read twice per batch: reading it takes
    nearly as long as the shortest steps."""
    seconds = []
    for _ in range(batches):
        start = time.perf_counter()
        for _ in range(steps):
            step()
        seconds.append((time.perf_counter() - start) / steps)
    return seconds


def sampled(params: Sequence[Any]) -> np.ndarray:
    """Some values of every parameter, float64, one row."""
    quota = max(1, SAMPLE_SIZE // len(params))
    flat = [np.asarray(p).reshape(-1) for p in params]
    return np.concatenate([values[:: math.ceil(values.size / quota)] for values in flat]).astype(np.float64)


def worker_side(name: str) -> Side:
    """The side that a worker runs."""
    if name == "torch":
        from peers.torch_peer import TorchSide

        return TorchSide()
    from peers.optax_peer import OptaxSide

    return OptaxSide()


class RemoteSide:
    """A side in a worker, which another interpreter may run; it is asked by one JSON object per line."""

    def __init__(self, name: str, python: str, threads: int) -> None:
        self.name = name
        command = [python, str(Path(__file__).resolve().parents[1] / "compare.py"), "--worker", name]
        try:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        except OSError as error:
            raise SystemExit(f"compare.py: --{name}-python must be an interpreter, got {python!r}: {error}") from error
        self.versions: dict[str, str] = self.ask("start", threads=threads)

    def ask(self, do: str, **arguments: Any) -> Any:
        """Sends one request and waits for its answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps({"do": do, **arguments}), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._process.wait()
            raise SystemExit(f"compare.py: the {self.name} worker ended during {do!r} (exit code {code})")
        answer = json.loads(line)
        if "error" in answer:
            raise SystemExit(f"compare.py: the {self.name} worker failed during {do!r}: {answer['error']}")
        return answer["value"]

    def setup(self, case: str, optimizer: str) -> list[str]:
        """See Side."""
        return self.ask("setup", case=case, optimizer=optimizer)

    def begin(self, mode: str) -> dict[str, Any]:
        """See Side."""
        return self.ask("begin", mode=mode)

    def run(self, mode: str, batches: int, steps: int) -> list[float]:
        """See Side."""
        return self.ask("run", mode=mode, batches=batches, steps=steps)

    def free(self) -> None:
        """See Side."""
        self.ask("free")

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()


def serve(name: str) -> None:
    """Answers requests until the input ends. What libraries print goes to stderr, not into the answers."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    gc.disable()
    side, frozen = worker_side(name), False
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"value": getattr(side, request.pop("do"))(**request)}
        except Exception as error:  # whatever it is, the other process reports it
            answer = {"error": f"{type(error).__name__}: {error}"}
        if not frozen:
            gc.freeze()  # what the library's import left need not be looked through after each case
            frozen = True
        print(json.dumps(answer), file=answers, flush=True)
