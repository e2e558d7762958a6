"""Steps of a few small tensors from Python, for counting instructions: ``fixed_cost_steps.py SCENARIO STEPS``.

The twin of ``fixed_cost.rs``; ``fixed_cost.py`` runs both under valgrind. Without arguments it prints the names of the
scenarios as a JSON list, and the versions that the counts depend on.

What the counts leave out: the cycle collector is off, since it would run in some steps and not in others.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable

import numpy as np

import roptim

Step = Callable[[], object]


def plain(tensors: int, elements: int) -> Step:
    """A step of plain arrays, with the gradients given to it."""
    arrays = [np.ones(elements, np.float32) for _ in range(tensors)]
    gradients = [np.linspace(0.1, 1.0, elements, dtype=np.float32) for _ in range(tensors)]
    opt = roptim.AdamW(arrays, threads=1)
    return lambda: opt.step(gradients)


def parameters(tensors: int, elements: int) -> Step:
    """A step of Parameters, which have their gradients."""
    params = [roptim.Parameter(np.ones(elements, np.float32)) for _ in range(tensors)]
    for p in params:
        p.grad = np.linspace(0.1, 1.0, elements, dtype=np.float32)
    opt = roptim.AdamW(params, threads=1)
    return lambda: opt.step()


SCENARIOS: dict[str, Callable[[], Step]] = {
    "Python, AdamW, one array of 16": lambda: plain(1, 16),
    "Python, AdamW, one Parameter of 16": lambda: parameters(1, 16),
    "Python, AdamW, 100 arrays of 10": lambda: plain(100, 10),
    "Python, AdamW, 100 Parameters of 10": lambda: parameters(100, 10),
}


def main(arguments: list[str]) -> None:
    """Steps, or says what there is."""
    if not arguments:
        import json

        versions = {"python": sys.version, "numpy": np.__version__}
        print(json.dumps({"scenarios": list(SCENARIOS), "versions": versions}))
        return
    name, steps = arguments
    step = SCENARIOS[name]()
    gc.disable()
    for _ in range(int(steps)):
        step()


if __name__ == "__main__":
    main(sys.argv[1:])
