"""Adagrad.

J. Duchi, E. Hazan, Y. Singer, "Adaptive Subgradient Methods for Online Learning and Stochastic
Optimization", JMLR 12, 2011: the diagonal form.

    d_k = ±g_k + λ θ_{k-1}                               minus with maximize

    s_t = s_0 + Σ_k d_k²
    θ_t = θ_0 - Σ_k lr/(1 + (k-1) η) · d_k / (√s_k + ε)

=========  =========================
symbol     argument
=========  =========================
s_0        initial_accumulator_value
η          lr_decay
ε          eps
λ          weight_decay
=========  =========================

Deviations from the paper, torch's: s_0 and the decay of lr. The paper's δ is ε.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Array = np.ndarray


def trajectory(
    p0: Array,
    grads: Sequence[Array | None],
    *,
    lr: float = 1e-2,
    lr_decay: float = 0.0,
    weight_decay: float = 0.0,
    initial_accumulator_value: float = 0.0,
    eps: float = 1e-10,
    maximize: bool = False,
) -> tuple[list[Array], dict[str, Array]]:
    """Parameters after each step, and the last ``step``, ``sum``."""
    start = np.array(p0, np.float64)
    theta, path = start, []
    d, moves = [], []  # of every counted step
    for g in grads:
        if g is not None:
            d.append((-1.0 if maximize else 1.0) * np.asarray(g, np.float64) + weight_decay * theta)
            total = initial_accumulator_value + np.sum(np.stack(d) ** 2, axis=0)
            moves.append(d[-1] / (np.sqrt(total) + eps))
            rates = lr / (1.0 + lr_decay * np.arange(len(d)))
            theta = start - np.tensordot(rates, np.stack(moves), axes=1)
        path.append(np.array(theta))
    if not d:
        return path, {}
    return path, {"step": np.array(len(d), np.float64), "sum": np.array(total)}
