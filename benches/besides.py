"""What a step costs that also brings an average up to date, or takes norms, beside doing so afterwards.

Entrants take turns within each round; shown are the medians of their times, and of the ratios round by round.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np

import roptim
from roptim.swa_utils import AveragedModel, get_ema_avg_fn

CASES = {"1 x 2^24": [2**24], "1 x 100,000": [100_000], "1000 x 1000": [1000] * 1000}
ROUNDS = 15
#: Elements of a turn.
TURN = 2**21


def norms(gradients: list[np.ndarray], before: list[np.ndarray], params: list[np.ndarray]) -> list[float]:
    """By NumPy, as people take them."""
    pairs = zip(params, before, strict=True)
    groups = (gradients, [p - b for p, b in pairs], params)
    return [float(np.sqrt(sum(np.vdot(x, x) for x in arrays))) for arrays in groups]


def entrants(name: str, sizes: list[int]) -> dict[str, Callable[[], object]]:
    """Ways to step, each with parameters of its own."""

    def made() -> tuple[list[np.ndarray], roptim.Optimizer]:
        params = [np.ones(n, np.float32) for n in sizes]
        return params, getattr(roptim, name)(params)

    gradients = [np.full(n, 1e-3, np.float32) for n in sizes]
    (_, plain), (apart, apart_opt), (within, within_opt), (noted, noted_opt), (_, measured) = (made() for _ in range(5))
    ema = {"avg_fn": get_ema_avg_fn(0.999)}
    after, follower = AveragedModel(apart, **ema), AveragedModel(within, **ema)

    def separate() -> None:
        apart_opt.step(gradients)
        after.update_parameters(apart)

    def by_numpy() -> None:
        before = [p.copy() for p in noted]
        noted_opt.step(gradients)
        norms(gradients, before, noted)

    return {
        "step": lambda: plain.step(gradients),
        "average after": separate,
        "average within": lambda: within_opt.step(gradients, average=follower),
        "norms by NumPy": by_numpy,
        "norms within": lambda: (measured.step(gradients, statistics=True), measured.statistics),
    }


def main() -> None:
    """Prints the table."""
    heads = ["step", "average after", "average within", "norms by NumPy", "norms within"]
    print(f"{'milliseconds':<20}", *(f"{head:>15}" for head in heads), f"{'average':>9} {'norms':>7}")
    for name in ("SGD", "AdamW"):
        for case, sizes in CASES.items():
            calls = entrants(name, sizes)
            count = max(1, TURN // sum(sizes))
            times: dict[str, list[float]] = {key: [] for key in calls}
            for _ in range(ROUNDS):
                for key, call in calls.items():
                    start = time.perf_counter()
                    for _ in range(count):
                        call()
                    times[key].append((time.perf_counter() - start) / count)
            ratios = [
                statistics.median(a / b for a, b in zip(times[slow], times[fast], strict=True))
                for slow, fast in (("average after", "average within"), ("norms by NumPy", "norms within"))
            ]
            medians = (f"{1e3 * statistics.median(times[head]):15.4f}" for head in heads)
            print(f"{f'{name}, {case}':<20}", *medians, f"{ratios[0]:8.2f}x {ratios[1]:6.2f}x")


if __name__ == "__main__":
    main()
