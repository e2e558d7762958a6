"""Steps over arrays of every layout, dtype and length near a vector's, for a checker of memory accesses.

`test_gate.py` runs it under valgrind in the full tests. By itself it takes seconds. Each array ends where its
allocation does.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from helpers import LAYOUTS, laid_out, step

import roptim
from roptim.optimizer import REGISTRY

LENGTHS = [0, 1, 3, 7, 8, 15, 17, 31, 33, 65]
DTYPES = ["f4", "f8", "c8", "c16", "f2", ml_dtypes.bfloat16]


def offset_gradient(values: Any) -> Any:
    """The same numbers from the second element of their memory on."""
    return np.concatenate([values.ravel()[:0], np.zeros(1, values.dtype), values.ravel()])[1:].reshape(values.shape)


def shapes(name: str, length: int) -> list[tuple[int, ...]]:
    if name == "Muon":
        return [(length, 3)]
    return [(length,), (length, 2)]


def every_layout() -> int:
    """How many steps were taken."""
    steps = 0
    for name, entry in REGISTRY.items():
        for dtype in DTYPES:
            kind = np.dtype(dtype)
            if kind.kind == "c" and name in ("Muon", "Adafactor", "SparseAdam"):
                continue
            params, gradients = [], []
            for length in LENGTHS:
                for shape, layout in [(s, layout) for s in shapes(name, length) for layout in LAYOUTS]:
                    params.append(laid_out(np.ones(shape, dtype), layout))
                    values = np.full(shape, 0.5, dtype)
                    gradients.append(laid_out(values, layout) if len(params) % 2 else offset_gradient(values))
            if name != "Muon" and not entry["needs_sparse"]:
                params.append(np.ones((), dtype))
                gradients.append(np.ones((), dtype))
            plain = not (entry["needs_closure"] or entry["needs_sparse"])
            opt = getattr(roptim, name)(params, **({"clip_norm": 1.0} if plain else {}))
            for _ in range(2):
                step(opt, gradients)
                steps += 1
            opt.load_state_dict(opt.state_dict())
            if plain:
                roptim.clip_grad_norm_(gradients, 0.1)
                opt.accumulate(gradients)
                opt.step()
                opt.step(gradients, zero_grad=True)
                steps += 2
    return steps


if __name__ == "__main__":
    print(f"{every_layout()} steps")
