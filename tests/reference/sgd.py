"""SGD with momentum, as torch.optim defines it.

Momentum and Nesterov's variant: I. Sutskever, J. Martens, G. Dahl, G. Hinton, "On the importance
of initialization and momentum in deep learning", ICML 2013, equations 1 to 4. Each step uses

    d_k = ±g_k + λ θ_{k-1}                              minus with maximize; λ is an L2 penalty

and the buffer after step t, all steps written out, is

    b_t = a_1 μ^(t-1) d_1 + a_2 μ^(t-2) d_2 + … + a_t d_t
    a_1 = 1,  a_k = 1 - τ for k ≥ 2

The movement of step k is lr·b_k, with Nesterov lr·(d_k + μ b_k), without momentum lr·d_k. Summing
the movements of steps 1 to t gathers, for each d_k, a geometric series:

    θ_t = θ_0 - lr Σ_k c(t-k) d_k
    S(n)           = 1 + μ + … + μ^n                    how much of d_k has been applied n steps later
    momentum       c(t-k) = a_k S(t-k)
    Nesterov       c(t-k) = 1 + μ a_k S(t-k)
    no momentum    c(t-k) = 1

=========  ============
symbol     argument
=========  ============
lr         lr
μ          momentum
τ          dampening
λ          weight_decay
=========  ============

Deviations from the paper, all torch's:

- The paper's velocity is v_t = -lr·b_t, so there lr is inside the buffer. The same while lr is
  constant, as it is here.
- The paper has no dampening. torch leaves the first buffer undamped: a_1 = 1.
- The paper evaluates Nesterov's gradient at θ + μv. Here the gradient is given, and the look-ahead
  point is what is stored as θ.
- Without momentum there is no buffer, and dampening has no effect.
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
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
) -> tuple[list[Array], dict[str, Array]]:
    """Parameters after each step, and the last ``momentum_buffer`` (none without momentum)."""
    start = np.array(p0, np.float64)
    theta, d, path = start, [], []
    for g in grads:
        if g is not None:
            sign = -1.0 if maximize else 1.0
            d.append(sign * np.asarray(g, np.float64) + weight_decay * theta)
            age = np.arange(len(d))[::-1]  # t-k for k = 1 … t
            a = np.where(np.arange(len(d)) == 0, 1.0, 1.0 - dampening)  # deviation: a_1 is not damped
            if momentum == 0.0:
                c = np.ones(len(d))
            else:
                powers = float(momentum) ** np.arange(len(d))
                c = a * np.array([powers[: n + 1].sum() for n in age])
                if nesterov:
                    c = 1.0 + momentum * c
            theta = start - lr * np.tensordot(c, np.stack(d), axes=1)
        path.append(np.array(theta))
    if not d or momentum == 0.0:
        return path, {}
    return path, {"momentum_buffer": np.array(np.tensordot(a * powers[age], np.stack(d), axes=1))}
