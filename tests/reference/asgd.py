"""Averaged SGD.

B. T. Polyak, A. B. Juditsky, "Acceleration of Stochastic Approximation by Averaging", SIAM Journal on
Control and Optimization 30(4), 1992.
The step sizes: W. Xu, "Towards Optimal One Pass Large Scale Learning with Averaged Stochastic Gradient
Descent", 2011; L. Bottou, "Stochastic Gradient Descent Tricks", 2012.

    d_k = ±g_k + λ θ_{k-1}                               minus with maximize

Step k moves by η_{k-1} and averages with weight ν_{k-1}:

    η_k = lr / (1 + l lr k)^α,     ν_0 = 1,   ν_k = 1/max(1, k-t0)

The shrinking by l takes a factor from everything that stood before it, so a step's share in θ_t is the
product of all later factors; and a parameter's share in the average is what later weights leave of it:

    θ_t  = θ_0 Π_{j≤t} (1 - l η_{j-1}) - Σ_k η_{k-1} d_k Π_{k<j≤t} (1 - l η_{j-1})
    ax_t = Σ_k ν_{k-1} θ_k Π_{k<j≤t} (1 - ν_{j-1})

For a whole t0 ≥ 0 this is ax_t = θ_t up to t = t0 + 2, and later the plain mean of θ_{t0+2} … θ_t.

=========  ======================
symbol     argument
=========  ======================
l          lambd
α          alpha
t0         t0
λ          weight_decay
=========  ======================

The state's ``eta`` and ``mu`` are η_t and ν_t, those of the next step.

Deviation from torch, which keeps ``eta`` and ``mu`` in float32: here they are float64.
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
    lambd: float = 1e-4,
    alpha: float = 0.75,
    t0: float = 1e6,
    weight_decay: float = 0.0,
    maximize: bool = False,
) -> tuple[list[Array], dict[str, Array]]:
    """Parameters after each step, and the last ``step``, ``eta``, ``mu``, ``ax``."""
    start = np.array(p0, np.float64)
    theta, path = start, []
    d, thetas = [], []  # of every counted step
    for g in grads:
        if g is not None:
            d.append((-1.0 if maximize else 1.0) * np.asarray(g, np.float64) + weight_decay * theta)
            k = np.arange(len(d) + 1)
            eta = lr / (1.0 + lambd * lr * k) ** alpha
            kept = _later_products(1.0 - lambd * eta[:-1])
            theta = kept[0] * start - np.tensordot(eta[:-1] * kept[1:], np.stack(d), axes=1)
            thetas.append(theta)
        path.append(np.array(theta))
    if not d:
        return path, {}
    nu = np.where(k == 0, 1.0, 1.0 / np.maximum(1.0, k - t0))
    shares = nu[:-1] * _later_products(1.0 - nu[:-1])[1:]
    return path, {
        "step": np.array(len(d), np.float64),
        "eta": np.array(eta[-1]),
        "mu": np.array(nu[-1]),
        "ax": np.array(np.tensordot(shares, np.stack(thetas), axes=1)),
    }


def _later_products(factors: Array) -> Array:
    """Entry k is the product of factors k, k+1 …; the last entry, one more than the factors, is 1."""
    return np.array([factors[k:].prod() for k in range(len(factors) + 1)])
