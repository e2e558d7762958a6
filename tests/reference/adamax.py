"""Adamax.

D. P. Kingma, J. Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015, Algorithm 2 and section 7.1.

    d_k = ±g_k + λ θ_{k-1}                               minus with maximize

The moment is a weighted mean as in Adam; the norm is, unrolled (the paper's equation 12), the largest
of the decayed magnitudes:

    m_hat_t = Σ_k β1^(t-k) d_k / Σ_k β1^(t-k)
    u_t     = max_k β2^(t-k) (|d_k| + ε)
    θ_t     = θ_0 - lr Σ_k m_hat_k / u_k

=========  ======================
symbol     argument
=========  ======================
β1, β2     betas
ε          eps
λ          weight_decay
=========  ======================

Deviation from the paper, torch's: ε is added to each magnitude.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Array = np.ndarray


def trajectory(
    p0: Array,
    grads: Sequence[Array | None],
    *,
    lr: float = 2e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    maximize: bool = False,
) -> tuple[list[Array], dict[str, Array]]:
    """Parameters after each step, and the last ``step``, ``exp_avg``, ``exp_inf``."""
    beta1, beta2 = map(float, betas)
    start = np.array(p0, np.float64)
    theta, path = start, []
    d, moves = [], []  # of every counted step
    for g in grads:
        if g is not None:
            d.append((-1.0 if maximize else 1.0) * np.asarray(g, np.float64) + weight_decay * theta)
            ages = np.arange(len(d))[::-1]
            weights = beta1**ages
            mean = np.tensordot(weights, np.stack(d), axes=1)
            decayed = [beta2 ** float(age) * (np.abs(x) + eps) for age, x in zip(ages, d, strict=True)]
            norm = np.max(np.stack(decayed), axis=0)
            moves.append(mean / weights.sum() / norm)
            theta = start - lr * np.sum(moves, axis=0)
        path.append(np.array(theta))
    if not d:
        return path, {}
    return path, {
        "step": np.array(len(d), np.float64),
        "exp_avg": np.array((1.0 - beta1) * mean),
        "exp_inf": np.array(norm),
    }
