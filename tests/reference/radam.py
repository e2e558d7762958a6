"""RAdam.

L. Liu, H. Jiang, P. He, W. Chen, X. Liu, J. Gao, J. Han, "On the Variance of the Adaptive Learning Rate
and Beyond", ICLR 2020, Algorithm 2.

    d_k = ±g_k + λ θ_{k-1}                               minus with maximize; no λ term when decoupled
    m_hat_t = Σ_k β1^(t-k) d_k / Σ_k β1^(t-k)
    v_t     = (1-β2) Σ_k β2^(t-k) d_k²

ρ_t is the length of the simple average that the exponential one resembles (the paper's section 4.1):

    ρ_t = (1+β2)/(1-β2) - 2 t β2ᵗ/(1 - β2ᵗ)

    u_t = m_hat_t √(1-β2ᵗ)/(√v_t + ε) · √((ρ_t-4)(ρ_t-2)ρ_∞ / ((ρ_∞-4)(ρ_∞-2)ρ_t))   where ρ_t > 5
    u_t = m_hat_t                                                                    elsewhere
    θ_t = κᵗ θ_0 - lr Σ_k κ^(t-k) u_k,   κ = 1 - lr·λ when the decay is decoupled, else 1

=========  ======================
symbol     argument
=========  ======================
β1, β2     betas
ε          eps
λ          weight_decay
=========  ======================

Deviations from the paper, torch's: the threshold is 5, not 4, and ε is added to the uncorrected √v.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Array = np.ndarray


def trajectory(
    p0: Array,
    grads: Sequence[Array | None],
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
) -> tuple[list[Array], dict[str, Array]]:
    """Parameters after each step, and the last ``step``, ``exp_avg``, ``exp_avg_sq``."""
    beta1, beta2 = map(float, betas)
    penalty = 0.0 if decoupled_weight_decay else weight_decay
    kappa = 1.0 - lr * weight_decay if decoupled_weight_decay else 1.0
    longest = (1.0 + beta2) / (1.0 - beta2)
    start = np.array(p0, np.float64)
    theta, path = start, []
    d, moves = [], []  # of every counted step
    for g in grads:
        if g is not None:
            d.append((-1.0 if maximize else 1.0) * np.asarray(g, np.float64) + penalty * theta)
            t = len(d)
            ages = np.arange(t)[::-1]
            weights1, weights2 = beta1**ages, beta2**ages
            history = np.stack(d)
            sum1 = np.tensordot(weights1, history, axes=1)
            v = (1.0 - beta2) * np.tensordot(weights2, history**2, axes=1)
            total2 = (1.0 - beta2) * weights2.sum()  # 1 - β2ᵗ
            length = longest - 2.0 * t * beta2**t / total2
            move = sum1 / weights1.sum()
            if length > 5.0:
                variance = (length - 4) * (length - 2) / length * (longest / ((longest - 4) * (longest - 2)))
                move = move * np.sqrt(variance * total2) / (np.sqrt(v) + eps)
            moves.append(move)
            theta = kappa**t * start - lr * np.tensordot(kappa**ages, np.stack(moves), axes=1)
        path.append(np.array(theta))
    if not d:
        return path, {}
    return path, {
        "step": np.array(len(d), np.float64),
        "exp_avg": np.array((1.0 - beta1) * sum1),
        "exp_avg_sq": np.array(v),
    }
