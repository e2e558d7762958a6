"""NAdam, with L2 and with decoupled weight decay.

T. Dozat, "Incorporating Nesterov Momentum into Adam", ICLR 2016 Workshop.

    d_k = ±g_k + λ θ_{k-1}                               minus with maximize; no λ term when decoupled

The moments are Adam's, unrolled (`adam.py`):

    m_t     = (1-β1) Σ_k β1^(t-k) d_k
    v_hat_t = Σ_k β2^(t-k) d_k² / Σ_k β2^(t-k)

The momentum warms up, and its products take the place of β1ᵗ in the bias corrections:

    μ_k = β1 (1 - ½ 0.96^(kψ)),   Π_t = μ_1 μ_2 … μ_t

    m_hat_t = μ_{t+1} m_t / (1 - Π_{t+1}) + (1-μ_t) d_t / (1 - Π_t)
    u_t     = m_hat_t / (√v_hat_t + ε)
    θ_t     = κᵗ θ_0 - lr Σ_k κ^(t-k) u_k,   κ = 1 - lr·λ when the decay is decoupled, else 1

=========  ======================
symbol     argument
=========  ======================
β1, β2     betas
ψ          momentum_decay
ε          eps
λ          weight_decay
=========  ======================

Deviations:

- The paper averages the gradients with μ_t itself, m_t = μ_t m_{t-1} + (1-μ_t) d_t; torch with β1.
- torch keeps Π_t in float32. Here it is float64, like everything else.
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
    momentum_decay: float = 4e-3,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
) -> tuple[list[Array], dict[str, Array]]:
    """Parameters after each step, and the last ``step``, ``mu_product``, ``exp_avg``, ``exp_avg_sq``."""
    beta1, beta2 = map(float, betas)
    penalty = 0.0 if decoupled_weight_decay else weight_decay
    kappa = 1.0 - lr * weight_decay if decoupled_weight_decay else 1.0
    start = np.array(p0, np.float64)
    theta, path = start, []
    d, u = [], []  # of every counted step
    for g in grads:
        if g is not None:
            d.append((-1.0 if maximize else 1.0) * np.asarray(g, np.float64) + penalty * theta)
            t = len(d)
            ages = np.arange(t)[::-1]  # t-k for k = 1 … t
            history = np.stack(d)
            m = (1.0 - beta1) * np.tensordot(beta1**ages, history, axes=1)
            v_hat = np.tensordot(beta2**ages / (beta2**ages).sum(), history**2, axes=1)
            mu = beta1 * (1.0 - 0.5 * 0.96 ** (momentum_decay * np.arange(1, t + 2)))  # μ_1 … μ_{t+1}
            product = mu[:t].prod()
            m_hat = mu[t] * m / (1.0 - mu.prod()) + (1.0 - mu[t - 1]) * d[-1] / (1.0 - product)
            u.append(m_hat / (np.sqrt(v_hat) + eps))
            theta = kappa**t * start - lr * np.tensordot(kappa**ages, np.stack(u), axes=1)
        path.append(np.array(theta))
    if not d:
        return path, {}
    return path, {
        "step": np.array(t, np.float64),
        "mu_product": np.array(product),
        "exp_avg": np.array(m),
        "exp_avg_sq": np.array((1.0 - beta2) * (beta2**ages).sum() * v_hat),
    }
