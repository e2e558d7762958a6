"""Nonlinear conjugate gradients, Polak–Ribière+.

E. Polak, G. Ribière, "Note sur la convergence de méthodes de directions conjuguées", RIRO 16, 1969.
J. Nocedal, S. J. Wright, "Numerical Optimization", 2nd edition, 2006, algorithm 5.4 with (5.44) and (5.45):

    β_k = max(0, g_k·(g_k - g_{k-1})/(g_{k-1}·g_{k-1}))
    d_k = -g_k + β_k d_{k-1}

Written out, with the gradients g_0 … g_k since the last restart, at which d_0 = -g_0:

    d_k = -Σ_i (β_{i+1} β_{i+2} … β_k) g_i

A restart takes place where an iteration is the cycle's last, where |g_k·g_{k-1}| ≥ 0.2 g_k·g_k (M. J. D. Powell,
"Restart procedures for the conjugate gradient method", Mathematical Programming 12, 1977), where β_k = 0, and where
d_k would not go downhill.

Steps come from the line search of `lbfgs.py`, with c₂ = 0.1 (page 121 of the book: c₂ < 1/2). It first tries, page 59,

    t = t_{k-1} min(10, (g_{k-1}·d_{k-1})/(g_k·d_k))

=========  ============
symbol     argument
=========  ============
cycle      restart
=========  ============

Deviations:

- The factor 10 is not in the book. Where there is no such t > 0, as at first, it is lr min(1, 1/Σ|g|).
- All limits and tolerances are those of `lbfgs.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .lbfgs import Array, Function, Path, descend


def trajectory(
    p0: Array,
    functions: Sequence[Function],
    *,
    lr: float = 1.0,
    max_iter: int = 20,
    max_eval: int | None = None,
    tolerance_grad: float = 1e-7,
    tolerance_change: float = 1e-9,
    restart: int | None = None,
) -> tuple[list[Path], dict[str, Any]]:
    """The path of each step, and the state after the last one under torch's keys and ``since_restart``.

    ``functions`` has one entry per step: what gives loss and gradient at a point, both finite.
    """
    method = _Cycle(np.size(p0) if restart is None else restart)
    return descend(method, p0, functions, lr, max_iter, max_eval, tolerance_grad, tolerance_change)


class _Cycle:
    c2 = 0.1
    searches = True

    def __init__(self, length: int) -> None:
        self.length = length
        self.gradients: list[Array] = []  # since the restart
        self.betas: list[float] = []  # β₁ … β_k of these
        self.last: tuple[float, float] = (np.nan, np.nan)  # step length and slope of the last iteration

    def direction(self, g: Array) -> Array:
        if self.gradients:
            before = self.gradients[-1]
            overlap = g @ before
            beta = (g @ g - overlap) / (before @ before)
            if len(self.gradients) < self.length and abs(overlap) < 0.2 * (g @ g) and beta > 0.0:
                weights = np.cumprod([1.0, beta, *self.betas[::-1]])[::-1]
                d = -np.tensordot(weights, np.stack([*self.gradients, g]), axes=1)
                if g @ d < 0.0:
                    self.gradients.append(g)
                    self.betas.append(float(beta))
                    return d
        self.gradients, self.betas = [g], []
        return -g

    def first_trial(self, g: Array, d: Array) -> float | None:
        t, slope = self.last
        t = t * min(10.0, slope / (g @ d))
        return t if t > 0.0 else None  # not where it is NaN

    def moved(self, g: Array, d: Array, t: float) -> None:
        self.last = (t, float(g @ d))

    def state(self) -> dict[str, Any]:
        return {"since_restart": len(self.betas)}
