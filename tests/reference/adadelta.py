"""Adadelta.

M. D. Zeiler, "ADADELTA: An Adaptive Learning Rate Method", 2012, Algorithm 1.

    d_k = ±g_k + λ θ_{k-1}                               minus with maximize

Both running averages, unrolled from zero:

    v_t = (1-ρ) Σ_k ρ^(t-k) d_k²
    a_t = (1-ρ) Σ_k ρ^(t-k) δ_k²
    δ_t = RMS[a_{t-1}] / RMS[v_t] · d_t,   RMS[x] = √(x + ε)
    θ_t = θ_0 - lr Σ_k δ_k

=========  ======================
symbol     argument
=========  ======================
ρ          rho
ε          eps
λ          weight_decay
=========  ======================

Deviation from the paper, torch's: the step is multiplied by lr.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Array = np.ndarray


def trajectory(
    p0: Array,
    grads: Sequence[Array | None],
    *,
    lr: float = 1.0,
    rho: float = 0.9,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    maximize: bool = False,
) -> tuple[list[Array], dict[str, Array]]:
    """Parameters after each step, and the last ``step``, ``square_avg``, ``acc_delta``."""
    start = np.array(p0, np.float64)
    theta, path = start, []
    squares, steps = [], []  # d_k² and δ_k of every counted step

    def average(values: list[Array]) -> Array:
        if not values:
            return np.zeros_like(start)
        ages = np.arange(len(values))[::-1]
        return (1.0 - rho) * np.tensordot(float(rho) ** ages, np.stack(values), axes=1)

    for g in grads:
        if g is not None:
            d = (-1.0 if maximize else 1.0) * np.asarray(g, np.float64) + weight_decay * theta
            squares.append(d**2)
            ratio = (average([s**2 for s in steps]) + eps) / (average(squares) + eps)
            steps.append(np.sqrt(ratio) * d)
            theta = start - lr * np.sum(steps, axis=0)
        path.append(np.array(theta))
    if not steps:
        return path, {}
    return path, {
        "step": np.array(len(steps), np.float64),
        "square_avg": np.array(average(squares)),
        "acc_delta": np.array(average([s**2 for s in steps])),
    }
