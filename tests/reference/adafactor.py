"""Adafactor.

N. Shazeer, M. Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", ICML 2018,
Algorithm 4 for matrices, Algorithm 5 for vectors.

    d_k = ±g_k                                           minus with maximize

The running mean of d², kept whole here, is a weighted sum whose weights add up to one:

    w_k = k^c                                            the paper's 1 - β̂2_k
    A_t = Σ_k w_k Π_{k<j≤t} (1 - w_j) d_k²

Being linear, it commutes with sums over rows and columns. V_t is the matrix of rank one with the row sums
and the column sums of A_t; vectors and numbers keep A_t itself. Leading axes are a batch of matrices:

    R_t = A_t 1,  C_t = 1ᵀ A_t,  V_t = R_t C_t / (1ᵀ A_t 1)

RMS is over all elements of the parameter, the batch included:

    U_t = d_t / max(√V_t, ε1)
    Û_t = U_t / max(1, RMS(U_t)/D)
    α_t = max(ε2, RMS(θ_{t-1})) min(lr, 1/√t)
    θ_t = κᵗ θ_0 - Σ_k κ^(t-k) α_k Û_k,   κ = 1 - lr·λ

=========  ==========================================================
symbol     argument
=========  ==========================================================
c          beta2_decay
ε1, ε2     eps; None for ε1 is the machine epsilon of the dtype of p0
D          d
λ          weight_decay
=========  ==========================================================

The state's ``row_var`` and ``col_var`` are means, R_t and C_t divided by the number of columns and rows.

Deviations from the paper, torch's:

- The paper adds ε1 to d_k² in the averages. torch bounds by it from below: √V_t, and the mean of A_t that
  V_t is divided by.
- The paper has no weight decay, and fixes min(1e-2, 1/√t) in α_t.

An empty parameter, which torch divides by zero for, has RMS 0 and stays.
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
    beta2_decay: float = -0.8,
    eps: tuple[float | None, float] = (None, 1e-3),
    d: float = 1.0,
    weight_decay: float = 0.0,
    maximize: bool = False,
) -> tuple[list[Array], dict[str, Array]]:
    """Parameters after each step, and the last ``step``, ``row_var``, ``col_var``.

    For arrays of fewer than two dimensions ``variance`` in place of the last two.
    """
    dtype = np.asarray(p0).dtype
    eps1 = np.finfo(dtype if dtype.kind == "f" else np.float64).eps if eps[0] is None else eps[0]
    kappa = 1.0 - lr * weight_decay
    start = np.array(p0, np.float64)
    theta, path = start, []
    history, moves = [], []  # d_k and α_k Û_k of every counted step
    for g in grads:
        if g is not None:
            history.append((-1.0 if maximize else 1.0) * np.asarray(g, np.float64))
            t = len(history)
            w = np.arange(1.0, t + 1.0) ** beta2_decay
            weights = np.array([w[k] * (1.0 - w[k + 1 :]).prod() for k in range(t)])
            average = np.tensordot(weights, np.stack(history) ** 2, axes=1)
            update = history[-1] / np.maximum(np.sqrt(_rank_one(average, eps1)), eps1)
            update = update / max(1.0, _rms(update) / d)
            moves.append(max(eps[1], _rms(theta)) * min(lr, t**-0.5) * update)
            ages = np.arange(t)[::-1]
            theta = kappa**t * start - np.tensordot(kappa**ages, np.stack(moves), axes=1)
        path.append(np.array(theta))
    if not moves:
        return path, {}
    state = {"step": np.array(t, np.float64)}
    if start.ndim < 2:
        return path, state | {"variance": np.array(average)}
    rows, cols = (max(n, 1) for n in start.shape[-2:])
    row_var = average.sum(axis=-1, keepdims=True) / cols
    return path, state | {"row_var": row_var, "col_var": average.sum(axis=-2, keepdims=True) / rows}


def _rank_one(average: Array, eps1: float) -> Array:
    """The matrices of rank one with the sums of rows and columns of the given ones."""
    if average.ndim < 2:
        return average
    size = average.shape[-2] * average.shape[-1]
    total = average.sum(axis=(-2, -1), keepdims=True)
    total = np.maximum(total, eps1 * size)  # deviation: the mean is bounded from below
    return average.sum(axis=-1, keepdims=True) * average.sum(axis=-2, keepdims=True) / total


def _rms(x: Array) -> float:
    return float(np.sqrt(np.sum(x**2) / max(x.size, 1)))
