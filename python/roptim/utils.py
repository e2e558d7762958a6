"""Gradient clipping."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from roptim._errors import NonfiniteError, RoptimTypeError, RoptimValueError, refuse
from roptim._parameter import Parameter
from roptim._roptim import norm as _norm

_PLACE = "clip_grad_norm_"


def clip_grad_norm_(
    parameters: Any, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
) -> float:
    r"""Scales gradients in place so that their common norm is at most ``max_norm``.

    The factor is :math:`\min(1, max\_norm / (norm + 10^{-6}))` as in torch; the norm is that of all
    gradients together, summed in float64, and the same to the last bit for any number of threads.

    Parameters
    ----------
    parameters
        Parameters, whose ``.grad`` is clipped (None is skipped), or plain arrays, which *are* the
        gradients: one, or an iterable or dict of them. float32 or float64, writeable.
    max_norm : float
        Largest norm, >= 0.
    norm_type : float
        2, or ``math.inf`` for the largest magnitude.
    error_if_nonfinite : bool
        Raise where the norm is NaN or infinite, before anything is changed. By default a NaN norm makes
        every gradient NaN and an infinite one makes finite entries zero, as in torch.

    Returns
    -------
    float
        The norm before clipping; 0.0 without gradients.

    Raises
    ------
    RoptimValueError, RoptimTypeError
        If an argument is refused; nothing has changed then.
    NonfiniteError
        With ``error_if_nonfinite``.
    """
    if isinstance(max_norm, bool) or not isinstance(max_norm, (int, float, np.number)):
        raise refuse(RoptimTypeError, _PLACE, "max_norm", "a number >= 0", repr(max_norm))
    if not max_norm >= 0:
        raise refuse(RoptimValueError, _PLACE, "max_norm", "a number >= 0", repr(max_norm))
    if (
        isinstance(norm_type, bool)
        or not isinstance(norm_type, (int, float, np.number))
        or norm_type not in (2, np.inf)
    ):
        raise refuse(RoptimValueError, _PLACE, "norm_type", "2 or inf", repr(norm_type))
    gradients = _gradients(parameters)
    total = _norm(gradients, norm_type != 2)
    if error_if_nonfinite and not np.isfinite(total):
        raise refuse(NonfiniteError, _PLACE, "the norm of the gradients", "finite", repr(total))
    # An infinite bound clips nothing; a NaN norm goes on into every gradient.
    factor = 1.0 if max_norm == np.inf and not np.isnan(total) else float(max_norm) / (total + 1e-6)
    factor = 1.0 if factor > 1.0 else factor
    if factor != 1.0:
        with np.errstate(invalid="ignore"):
            for g in gradients:
                np.multiply(g, g.dtype.type(factor), out=g)
    return total


def _gradients(parameters: Any) -> list[Any]:
    """The arrays to scale; the engine looks at each."""
    if isinstance(parameters, (np.ndarray, Parameter)):
        parameters = [parameters]
    elif isinstance(parameters, dict):
        parameters = list(parameters.values())
    elif not isinstance(parameters, Iterable) or isinstance(parameters, (str, bytes)):
        raise refuse(RoptimTypeError, _PLACE, "parameters", "Parameters or arrays", repr(parameters))
    gradients = []
    for p in parameters:
        g = p.grad if isinstance(p, Parameter) else p
        if g is None:
            continue
        if isinstance(g, np.generic) and isinstance(p, Parameter):
            g = p.grad = np.array(g)
        gradients.append(g)
    return gradients
