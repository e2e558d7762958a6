"""Muon, for matrices.

K. Jordan, Y. Jin, V. Boza, J. You, F. Cesista, L. Newhouse, J. Bernstein, "Muon: An optimizer for hidden
layers in neural networks", 2024.
J. Liu et al., "Muon is Scalable for LLM Training", 2025: weight decay and the factor match_rms_adamw.

    B_t = (1-μ) Σ_k μ^(t-k) g_k
    M_t = (1-μ) g_t + μ B_t                              with nesterov, else B_t

Newton-Schulz applies X ← a X + b (X Xᵀ) X + c (X Xᵀ)² X to X = M/max(‖M‖_F, ε), ns_steps times. With the
singular value decomposition X = P diag(σ) Qᵀ this acts on each singular value alone and leaves P and Q:

    φ(σ) = a σ + b σ³ + c σ⁵
    O_t  = P diag(φ(φ(…σ…))) Qᵀ
    θ_t  = κᵗ θ_0 - lr f Σ_k κ^(t-k) O_k,   κ = 1 - lr·λ

    f = √max(1, rows/cols)                               adjust_lr_fn None or "original"
    f = 0.2 √max(rows, cols)                             "match_rms_adamw"

=========  ======================
symbol     argument
=========  ======================
μ          momentum
a, b, c    ns_coefficients
ε          eps
λ          weight_decay
=========  ======================

Deviations:

- Jordan et al. accumulate B_t = μ B_{t-1} + g_t; torch averages. O_t is the same up to ε.
- torch iterates in bfloat16. Here all is float64: compare by the distance travelled.
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
    weight_decay: float = 0.1,
    momentum: float = 0.95,
    nesterov: bool = True,
    ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
    eps: float = 1e-7,
    ns_steps: int = 5,
    adjust_lr_fn: str | None = None,
) -> tuple[list[Array], dict[str, Array]]:
    """Parameters after each step, and the last ``momentum_buffer``."""
    start = np.array(p0, np.float64)
    rows, cols = start.shape
    if adjust_lr_fn == "match_rms_adamw":
        factor = 0.2 * np.sqrt(max(rows, cols))
    else:
        factor = np.sqrt(max(1.0, rows / max(cols, 1)))
    kappa = 1.0 - lr * weight_decay
    theta, path = start, []
    history, moves = [], []  # g_k and O_k of every counted step
    for g in grads:
        if g is not None:
            history.append(np.asarray(g, np.float64))
            t = len(history)
            ages = np.arange(t)[::-1]
            weights = (1.0 - momentum) * float(momentum) ** ages
            average = np.tensordot(weights, np.stack(history), axes=1)
            direction = (1.0 - momentum) * history[-1] + momentum * average if nesterov else average
            moves.append(_orthogonalized(direction, ns_coefficients, ns_steps, eps))
            theta = kappa**t * start - lr * factor * np.tensordot(kappa**ages, np.stack(moves), axes=1)
        path.append(np.array(theta))
    if not moves:
        return path, {}
    return path, {"momentum_buffer": np.array(average)}


def _orthogonalized(m: Array, coefficients: tuple[float, float, float], steps: int, eps: float) -> Array:
    a, b, c = coefficients
    p, sigma, qt = np.linalg.svd(m / max(np.sqrt(np.sum(m**2)), eps), full_matrices=False)
    for _ in range(steps):
        sigma = a * sigma + b * sigma**3 + c * sigma**5
    return p * sigma @ qt
