"""RMSprop, plain and centered, with momentum.

T. Tieleman, G. Hinton, "Lecture 6.5 - rmsprop: Divide the gradient by a running average of its recent
magnitude", COURSERA: Neural Networks for Machine Learning, 2012.
A. Graves, "Generating Sequences With Recurrent Neural Networks", 2013, equations 38 to 41: the centered
form, with momentum.

    d_k = ±g_k + λ θ_{k-1}                               minus with maximize

The running averages, unrolled from zero; the weights of both add up to W_t:

    w_k(t) = (1-α) α^(t-k),   W_t = Σ_k w_k(t)
    v_t = Σ_k w_k(t) d_k²,    ḡ_t = Σ_k w_k(t) d_k

Centered, the squares are taken around ḡ_t. Written as a sum of squares, v_t - ḡ_t² cannot be negative:

    s_t = v_t                                            plain
    s_t = Σ_k w_k(t) (d_k - ḡ_t)² + (1-W_t) ḡ_t²         centered; equal to v_t - ḡ_t²

    r_t = d_t / (√s_t + ε)
    b_t = Σ_k μ^(t-k) r_k
    θ_t = θ_0 - lr Σ_k (1 + μ + … + μ^(t-k)) r_k

=========  ======================
symbol     argument
=========  ======================
α          alpha
μ          momentum
ε          eps
λ          weight_decay
=========  ======================

Deviations from Graves, torch's: ε is added to the root, not under it, and lr is not inside b_t.
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
    alpha: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    centered: bool = False,
    maximize: bool = False,
) -> tuple[list[Array], dict[str, Array]]:
    """Parameters after each step, and the last ``step``, ``square_avg``.

    With ``momentum`` also ``momentum_buffer``, with ``centered`` also ``grad_avg``.
    """
    start = np.array(p0, np.float64)
    theta, path = start, []
    d, r = [], []  # of every counted step
    for g in grads:
        if g is not None:
            d.append((-1.0 if maximize else 1.0) * np.asarray(g, np.float64) + weight_decay * theta)
            ages = np.arange(len(d))[::-1]  # t-k for k = 1 … t
            weights = (1.0 - alpha) * float(alpha) ** ages
            history = np.stack(d)
            mean = np.tensordot(weights, history, axes=1)
            square = np.tensordot(weights, history**2, axes=1)
            spread = square
            if centered:
                spread = np.tensordot(weights, (history - mean) ** 2, axes=1) + (1.0 - weights.sum()) * mean**2
            r.append(d[-1] / (np.sqrt(spread) + eps))
            powers = float(momentum) ** np.arange(len(r))
            applied = np.array([powers[: age + 1].sum() for age in ages])
            theta = start - lr * np.tensordot(applied, np.stack(r), axes=1)
        path.append(np.array(theta))
    if not d:
        return path, {}
    state = {"step": np.array(len(d), np.float64), "square_avg": np.array(square)}
    if momentum > 0.0:
        state["momentum_buffer"] = np.array(np.tensordot(powers[ages], np.stack(r), axes=1))
    if centered:
        state["grad_avg"] = np.array(mean)
    return path, state
