"""AdamW: Adam with decoupled weight decay.

I. Loshchilov, F. Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, Algorithm 2:

    θ_t = θ_{t-1} - lr·λ θ_{t-1} - lr·m_hat_t / (√v_hat_t + ε)

The moments, the unrolled form, AMSGrad and the table of symbols are in `adam.py`; only two things
differ here: the decay never enters the moments, and ``weight_decay`` is 1e-2 unless given.

Deviation from the paper, torch's: the decay is multiplied by lr, in the paper by the schedule
multiplier alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from . import adam

Array = np.ndarray


def trajectory(
    p0: Array,
    grads: Sequence[Array | None],
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    amsgrad: bool = False,
    maximize: bool = False,
) -> tuple[list[Array], dict[str, Array]]:
    """Parameters after each step, and the last ``step``, ``exp_avg``, ``exp_avg_sq``.

    With ``amsgrad`` also ``max_exp_avg_sq``.
    """
    return adam.trajectory(
        p0,
        grads,
        lr=lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        amsgrad=amsgrad,
        maximize=maximize,
        decoupled_weight_decay=True,
    )
