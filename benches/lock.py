"""What it costs a step to give up the interpreter lock, which elementwise optimizers do from 256 Ki elements on.

AdamW on one thread, by size, alone and beside a Python thread that computes all the time. Who gives the lock up gets it
back when that thread lets go of it, after ``sys.getswitchinterval()`` (5 milliseconds): short steps keep it. Prints the
time of a step, and how far the other thread came in it, as part of what it does alone.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable

import numpy as np

import roptim

SIZES = [2**k for k in range(10, 23, 2)] + [2**18 - 1]
SECONDS = 0.4


def stepper(elements: int) -> tuple[roptim.AdamW, list[np.ndarray]]:
    """An optimizer of one tensor, and its gradients."""
    gradients = [np.full(elements, 0.01, np.float32)]
    optimizer = roptim.AdamW([np.ones(elements, np.float32)], threads=1)
    for _ in range(3):
        optimizer.step(gradients)
    return optimizer, gradients


def step_seconds(elements: int) -> float:
    """Mean seconds of a step: waiting for the lock is rare and long."""
    optimizer, gradients = stepper(elements)
    count, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < SECONDS:
        optimizer.step(gradients)
        count += 1
    return passed / count


class Counter(threading.Thread):
    """Counts, in Python."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.count = 0
        self.stopped = False

    def run(self) -> None:
        """Until told to stop."""
        while not self.stopped:
            self.count += 1


def beside_counter(work: Callable[[], float]) -> tuple[float, float]:
    """What the work returns, and counts a second meanwhile."""
    counter = Counter()
    counter.start()
    before, start = counter.count, time.perf_counter()
    result = work()
    speed = (counter.count - before) / (time.perf_counter() - start)
    counter.stopped = True
    counter.join()
    return result, speed


def sleep() -> float:
    """As long as the steps take."""
    time.sleep(SECONDS)
    return 0.0


def main() -> None:
    """Prints the table."""
    alone = beside_counter(sleep)[1]
    print(f"{'elements':>9} {'alone':>10} {'beside a busy thread':>22} {'which comes to':>15}")
    for elements in sorted(SIZES):
        quiet = step_seconds(elements)
        busy, speed = beside_counter(functools.partial(step_seconds, elements))
        print(f"{elements:9} {1e6 * quiet:7.1f} us {1e6 * busy:19.1f} us {100 * speed / alone:13.0f} %")


if __name__ == "__main__":
    main()
