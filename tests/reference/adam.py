"""Adam, with AMSGrad and with decoupled weight decay.

D. P. Kingma, J. Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015, Algorithm 1.
S. J. Reddi, S. Kale, S. Kumar, "On the Convergence of Adam and Beyond", ICLR 2018, Algorithm 2.
I. Loshchilov, F. Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, Algorithm 2.

    d_k = ±g_k + λ θ_{k-1}                              minus with maximize; no λ term when decoupled

Section 3 of the first paper unrolls the moments (its equation 1), which also shows that dividing by
1 - βᵗ turns each into a weighted mean, because (1-β) Σ_k β^(t-k) = 1 - βᵗ:

    m_t = (1-β1) Σ_k β1^(t-k) d_k         m_hat_t = Σ_k β1^(t-k) d_k  / Σ_k β1^(t-k)
    v_t = (1-β2) Σ_k β2^(t-k) d_k²        v_hat_t = Σ_k β2^(t-k) d_k² / Σ_k β2^(t-k)

AMSGrad replaces v_t by the elementwise maximum of v_1 … v_t, which is corrected like v_t. The
parameter is its start plus all movements u_k, written out:

    u_k = m_hat_k / (√v_hat_k + ε)
    θ_t = ρᵗ θ_0 - lr Σ_k ρ^(t-k) u_k
    ρ   = 1 - lr·λ when the decay is decoupled, else 1

=========  ======================
symbol     argument
=========  ======================
lr (α)     lr
β1, β2     betas
ε          eps
λ          weight_decay
=========  ======================

Deviations from the papers, all torch's:

- The AMSGrad paper has no bias correction. torch takes the maximum over the uncorrected v, then
  divides it by the present 1 - β2ᵗ.
- Loshchilov and Hutter scale the decay by a schedule multiplier only; torch multiplies it by lr.
- With ``maximize`` only the gradient changes sign, not the L2 term, so the penalty shrinks the
  parameter in either direction.
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
    amsgrad: bool = False,
    maximize: bool = False,
    decoupled_weight_decay: bool = False,
) -> tuple[list[Array], dict[str, Array]]:
    """Parameters after each step, and the last ``step``, ``exp_avg``, ``exp_avg_sq``.

    With ``amsgrad`` also ``max_exp_avg_sq``.
    """
    beta1, beta2 = map(float, betas)
    penalty = 0.0 if decoupled_weight_decay else weight_decay
    rho = 1.0 - lr * weight_decay if decoupled_weight_decay else 1.0
    start = np.array(p0, np.float64)
    theta, path = start, []
    d, v, u = [], [], []  # of every counted step
    for g in grads:
        if g is not None:
            sign = -1.0 if maximize else 1.0
            d.append(sign * np.asarray(g, np.float64) + penalty * theta)
            age = np.arange(len(d))[::-1]  # t-k for k = 1 … t
            weights1, weights2 = beta1**age, beta2**age
            history = np.stack(d)
            sum1 = np.tensordot(weights1, history, axes=1)
            v.append((1.0 - beta2) * np.tensordot(weights2, history**2, axes=1))
            second = np.max(np.stack(v), axis=0) if amsgrad else v[-1]
            m_hat = sum1 / weights1.sum()
            v_hat = second / ((1.0 - beta2) * weights2.sum())  # deviation: AMSGrad's maximum is corrected too
            u.append(m_hat / (np.sqrt(v_hat) + eps))
            theta = rho ** len(u) * start - lr * np.tensordot(rho**age, np.stack(u), axes=1)
        path.append(np.array(theta))
    if not d:
        return path, {}
    state = {
        "step": np.array(len(d), np.float64),
        "exp_avg": np.array((1.0 - beta1) * sum1),
        "exp_avg_sq": np.array(v[-1]),
    }
    if amsgrad:
        state["max_exp_avg_sq"] = np.array(second)
    return path, state
