"""SparseAdam: Adam that visits only the rows with a gradient.

D. P. Kingma, J. Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015, Algorithm 1, with the order of
operations that the end of its section 2 gives as the efficient one.

A gradient is a pair (rows, values): whole numbers along the first axis of the parameter, and for each of
them a row of values, shaped (len(rows), *p0.shape[1:]). Values of a row named twice are added. No rows are
still a gradient and count as a step; None does not.

A row's moments run over the n steps k_1 < … < k_n in which it was named (minus with maximize) and do not
decay in between, while the bias corrections count all steps:

    m_n = (1-β1) Σ_i β1^(n-i) g_{k_i}
    v_n = (1-β2) Σ_i β2^(n-i) g_{k_i}²
    θ   = θ_0 - lr Σ_i √(1 - β2^{k_i}) / (1 - β1^{k_i}) · m_i / (√v_i + ε)

=========  ======================
symbol     argument
=========  ======================
β1, β2     betas
ε          eps
=========  ======================

Deviation from Algorithm 1: ε is added to the uncorrected √v.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Array = np.ndarray


def trajectory(
    p0: Array,
    grads: Sequence[tuple[Array, Array] | None],
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    maximize: bool = False,
) -> tuple[list[Array], dict[str, Array]]:
    """Parameters after each step, and the last ``step``, ``exp_avg``, ``exp_avg_sq``."""
    beta1, beta2 = map(float, betas)
    theta, path = np.array(p0, np.float64), []
    m, v = np.zeros_like(theta), np.zeros_like(theta)
    start, seen, moves = theta.copy(), {}, {}  # by row: its gradients and its movements so far
    t = 0
    for pair in grads:
        if pair is not None:
            t += 1
            rows, values = np.asarray(pair[0], np.intp).tolist(), np.asarray(pair[1], np.float64)
            correction = np.sqrt(1.0 - beta2**t) / (1.0 - beta1**t)
            for row in set(rows):
                named = [value for r, value in zip(rows, values, strict=True) if r == row]
                seen.setdefault(row, []).append((-1.0 if maximize else 1.0) * np.sum(named, axis=0))
                history = np.stack(seen[row])
                ages = np.arange(len(history))[::-1]  # n-i for i = 1 … n
                m[row] = (1.0 - beta1) * np.tensordot(beta1**ages, history, axes=1)
                v[row] = (1.0 - beta2) * np.tensordot(beta2**ages, history**2, axes=1)
                moves.setdefault(row, []).append(correction * m[row] / (np.sqrt(v[row]) + eps))
                theta[row] = start[row] - lr * np.sum(moves[row], axis=0)
        path.append(theta.copy())
    if not t:
        return path, {}
    return path, {"step": np.array(t, np.float64), "exp_avg": m, "exp_avg_sq": v}
