"""Rprop, in the form without backtracking.

M. Riedmiller, H. Braun, "A Direct Adaptive Method for Faster Backpropagation Learning: The RPROP
Algorithm", IEEE International Conference on Neural Networks, 1993.
C. Igel, M. Hüsken, "Improving the Rprop Learning Algorithm", NC 2000: this form is their iRprop⁻.

Every element has a step size Δ of its own and is treated alone. With d_k = ±g_k (minus with maximize),
d_0 = 0 and Δ_0 = lr, its step t is one of

    d_{t-1} d_t > 0     Δ_t = min(η⁺ Δ_{t-1}, Δmax)
    d_{t-1} d_t < 0     Δ_t = max(η⁻ Δ_{t-1}, Δmin), and d_t counts as zero from now on
    d_{t-1} d_t = 0     Δ_t = Δ_{t-1}

    θ_t = θ_0 - Σ_k sign(d_k) Δ_k

=============  ================
symbol         argument
=============  ================
Δ_0            lr
η⁻, η⁺         etas
Δmin, Δmax     step_sizes
=============  ================

Deviations from the papers:

- Riedmiller and Braun take back the last movement where the sign changed; here, as in iRprop⁻, the
  element rests for that step.
- torch keeps Δ_t in [Δmin, Δmax] in all three cases, so an lr outside is moved to the nearer end in the
  first step.
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
    etas: tuple[float, float] = (0.5, 1.2),
    step_sizes: tuple[float, float] = (1e-6, 50.0),
    maximize: bool = False,
) -> tuple[list[Array], dict[str, Array]]:
    """Parameters after each step, and the last ``step``, ``prev``, ``step_size``."""
    start = np.array(p0, np.float64)
    counted = [np.asarray(g, np.float64) for g in grads if g is not None]
    if not counted:
        return [start.copy() for _ in grads], {}
    d = (-1.0 if maximize else 1.0) * np.stack(counted)
    moves, sizes, last = np.empty_like(d), np.empty_like(start), np.empty_like(start)
    for at in np.ndindex(start.shape):
        line = (slice(None), *at)
        moves[line], sizes[at], last[at] = _element(d[line].tolist(), float(lr), etas, step_sizes)
    path, t = [], 0
    for g in grads:
        t += g is not None
        path.append(np.array(start - moves[:t].sum(axis=0)))
    return path, {"step": np.array(t, np.float64), "prev": last, "step_size": sizes}


def _element(
    d: list[float], size: float, etas: tuple[float, float], step_sizes: tuple[float, float]
) -> tuple[list[float], float, float]:
    """One element: its movements, the last step size, and the last gradient that counted."""
    shrink, grow = etas
    smallest, largest = step_sizes
    before, moves = 0.0, []
    for now in d:
        if (before > 0.0 and now > 0.0) or (before < 0.0 and now < 0.0):
            size, counts = grow * size, now
        elif (before > 0.0 and now < 0.0) or (before < 0.0 and now > 0.0):
            size, counts = shrink * size, 0.0
        else:
            counts = now
        size = min(max(size, smallest), largest)  # deviation: in every case
        moves.append(size if counts > 0.0 else -size if counts < 0.0 else 0.0)
        before = counts
    return moves, size, before
