"""Gradient clipping."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, SupportsFloat

import numpy as np

from roptim import _roptim
from roptim._errors import NonfiniteError, RoptimTypeError, RoptimValueError, refuse, told
from roptim._foreign import has_gradient, is_array, view
from roptim._parameter import Parameter
from roptim._sparse import SparseGrad
from roptim._values import flag, is_real

__all__ = ["clip_grad_norm_", "clip_grad_value_", "clip_grads_with_norm_", "get_total_norm"]


def clip_grad_norm_(
    parameters: Any,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Any:
    r"""Scales gradients in place so that their common norm is at most ``max_norm``.

    The factor is :math:`\min(1, max\_norm / (norm + 10^{-6}))` as in torch, without a bound 1; the norm is that of all
    gradients together, summed in float64, and the same to the last bit for any number of threads. To clip
    within a step, without a pass of its own and without touching the gradients, give ``clip_norm`` to the
    optimizer.

    Parameters
    ----------
    parameters
        Parameters or torch tensors, whose ``.grad`` is clipped (None is skipped), or plain arrays, which *are* the
        gradients: one, or an iterable or dict of them. Of any dtype that parameters have, writeable. Of a
        SparseGrad the values are clipped, by the norm of its sums.
    max_norm : float
        Largest norm, >= 0.
    norm_type : float
        p of the p-norm; ``math.inf`` (or ``"inf"``) for the largest magnitude, ``-math.inf`` for the smallest, 0
        for the number of elements that are not zero.
    error_if_nonfinite : bool
        Raise where the norm is NaN or infinite, before anything is changed. By default a NaN norm makes
        every gradient NaN and an infinite one makes finite entries zero, as in torch.
    foreach
        torch's choice between its kernels; means nothing here.

    Returns
    -------
    float
        The norm before clipping; 0.0 without gradients. Of gradients on a GPU (:mod:`roptim.gpu`) a number that is
        fetched when it is first used as one: nothing waits for the device until then.

    Raises
    ------
    RoptimValueError, RoptimTypeError
        If an argument is refused; nothing has changed then.
    NonfiniteError
        With ``error_if_nonfinite``.
    """
    place = "clip_grad_norm_"
    error_if_nonfinite = flag(place, "error_if_nonfinite", error_if_nonfinite)
    bound, p = _bound(place, "max_norm", max_norm), _order(place, norm_type)
    gradients = _gradients(place, parameters, written=True)
    if _on_device(place, gradients, p):
        if error_if_nonfinite:
            _refuse_nonfinite(place, float(_device_norm(place, gradients, None)))
        return _device_norm(place, gradients, bound)
    total = _norm(place, gradients, p, written=True)
    if error_if_nonfinite:
        _refuse_nonfinite(place, total)
    _scale(gradients, _roptim.clip_factor(bound, total))
    return total


def _on_device(place: str, gradients: list[Any], p: float | None) -> bool:
    """Whether the gradients lie on a device, where only their 2-norm is known."""
    on_device = [isinstance(g, _roptim.DeviceArray) for g in gradients]
    if not any(on_device):
        return False
    if not all(on_device):
        raise refuse(RoptimValueError, place, "gradients", "all on a device or all on the host", "both")
    if p is None:
        remedy = "give clip_value or clip_norm to the optimizer"
        raise refuse(RoptimValueError, place, "gradients", "on the host", "some on a device", remedy)
    if p != 2:
        remedy = "take another on the host: a.numpy()"
        raise refuse(RoptimValueError, place, "norm_type of gradients on a device", "2", told(p), remedy)
    return True


def _device_norm(place: str, gradients: list[Any], bound: float | None) -> Any:
    from roptim.gpu import Norm

    return Norm(_roptim.clip_norm_on_device(gradients, bound, place))


def get_total_norm(
    tensors: Any, norm_type: float = 2.0, error_if_nonfinite: bool = False, foreach: bool | None = None
) -> Any:
    """The norm of all gradients together, in float64; see :func:`clip_grad_norm_`.

    Parameters
    ----------
    tensors
        Plain arrays or, as in torch, tensors; or Parameters, whose ``.grad`` counts: one, or an iterable or dict of
        them.
    norm_type, error_if_nonfinite, foreach
        As in :func:`clip_grad_norm_`.

    Returns
    -------
    float
        0.0 without arrays.
    """
    place = "get_total_norm"
    error_if_nonfinite = flag(place, "error_if_nonfinite", error_if_nonfinite)
    p = _order(place, norm_type)
    gradients = _gradients(place, tensors, written=False)
    if _on_device(place, gradients, p):
        norm = _device_norm(place, gradients, None)
        if error_if_nonfinite:
            _refuse_nonfinite(place, float(norm))
        return norm
    total = _norm(place, gradients, p, written=False)
    if error_if_nonfinite:
        _refuse_nonfinite(place, total)
    return total


def clip_grads_with_norm_(parameters: Any, max_norm: float, total_norm: float, foreach: bool | None = None) -> None:
    """Scales gradients in place by the factor that :func:`clip_grad_norm_` would use if ``total_norm`` were theirs.

    Parameters
    ----------
    parameters, max_norm, foreach
        As in :func:`clip_grad_norm_`.
    total_norm : float
        A norm that :func:`get_total_norm` returned, of more gradients perhaps, >= 0.
    """
    place = "clip_grads_with_norm_"
    bound = _bound(place, "max_norm", max_norm)
    total = _number(place, "total_norm", total_norm, "a number >= 0")
    if total < 0:
        raise refuse(RoptimValueError, place, "total_norm", "a number >= 0", told(total_norm))
    gradients = _gradients(place, parameters, written=True)
    _on_device(place, gradients, None)
    # For its checks: what is scaled must be writeable, and none twice.
    _norm(place, gradients, math.inf, written=True)
    _scale(gradients, _roptim.clip_factor(bound, total))


def clip_grad_value_(parameters: Any, clip_value: float, foreach: bool | None = None) -> None:
    """Brings each element of the gradients into ``[-clip_value, clip_value]``, in place. NaN stays NaN.

    Parameters
    ----------
    parameters, foreach
        As in :func:`clip_grad_norm_`; of complex gradients real and imaginary parts are bounded, of a SparseGrad
        the sums of its rows.
    clip_value : float
        The bound, >= 0.
    """
    place = "clip_grad_value_"
    bound = _bound(place, "clip_value", clip_value)
    gradients = _gradients(place, parameters, written=True)
    _on_device(place, gradients, None)
    _norm(place, gradients, math.inf, written=True)
    with np.errstate(all="ignore"):
        for g in gradients:
            if isinstance(g, SparseGrad) and not g._is_unique():
                g._become(g.coalesced())
            for part in _parts(g):
                # A bound that the dtype cannot hold is infinite in it, and bounds nothing.
                limit = np.asarray(bound).astype(part.dtype)
                np.copyto(part, limit, where=part > limit)
                np.copyto(part, -limit, where=part < -limit)


def _number(place: str, name: str, value: Any, allowed: str) -> float:
    if isinstance(value, SupportsFloat) and type(value).__module__ == "roptim.gpu":
        # A norm on a device, which get_total_norm returned.
        return float(value)
    if not is_real(value):
        raise refuse(RoptimTypeError, place, name, allowed, told(value))
    try:
        return float(value)
    except OverflowError:
        raise refuse(RoptimValueError, place, name, allowed, "one beyond all floats") from None


def _bound(place: str, name: str, value: Any) -> float:
    bound = _number(place, name, value, "a number >= 0")
    if not bound >= 0:
        raise refuse(RoptimValueError, place, name, "a number >= 0", told(value))
    return abs(bound)


def _order(place: str, norm_type: Any) -> float:
    allowed = "a number or an infinity"
    p = (
        math.inf
        if isinstance(norm_type, str) and norm_type == "inf"
        else _number(place, "norm_type", norm_type, allowed)
    )
    if math.isnan(p):
        raise refuse(RoptimValueError, place, "norm_type", allowed, told(norm_type))
    return p


def _refuse_nonfinite(place: str, total: float) -> None:
    if not math.isfinite(total):
        raise refuse(NonfiniteError, place, "the norm of the gradients", "finite", told(total))


def _norm(place: str, gradients: list[Any], p: float, *, written: bool) -> float:
    sums = [g.coalesced().values if isinstance(g, SparseGrad) else g for g in gradients]
    total = _roptim.norm(sums, p, written, place)
    if written:
        # What is scaled of a sparse gradient is its own values, not their sums.
        own = [g.values if isinstance(g, SparseGrad) else g for g in gradients]
        if any(isinstance(g, SparseGrad) for g in gradients):
            _roptim.norm(own, math.inf, True, place)
    return total


def _parts(g: Any) -> list[Any]:
    """What of a gradient is written to, as reals."""
    array = g.values if isinstance(g, SparseGrad) else g
    return [array.real, array.imag] if array.dtype.kind == "c" else [array]


def _scale(gradients: list[Any], factor: float) -> None:
    """Multiplies in the type that a step computes in, and rounds once."""
    if factor == 1.0:
        return
    # Nothing here is the caller's business, and nothing may stop it half-way.
    with np.errstate(all="ignore"):
        for g in gradients:
            for part in _parts(g):
                if part.dtype.itemsize == 2:
                    part[...] = (part.astype(np.float32) * np.float32(factor)).astype(part.dtype)
                else:
                    np.multiply(part, part.dtype.type(factor), out=part)


def _gradients(place: str, parameters: Any, *, written: bool) -> list[Any]:
    """The arrays to look at and scale; the engine looks at each.

    What is given to be scaled are parameters, in torch too; a norm is that of the tensors themselves.
    """
    known = (np.ndarray, SparseGrad, _roptim.DeviceArray)
    if isinstance(parameters, (Parameter, *known)) or is_array(parameters):
        parameters = [parameters]
    elif isinstance(parameters, dict):
        parameters = list(parameters.values())
    elif not isinstance(parameters, Iterable) or isinstance(parameters, (str, bytes)):
        raise refuse(RoptimTypeError, place, "parameters", "Parameters or arrays", told(parameters))
    is_generator = isinstance(parameters, Iterator)
    gradients: list[Any] = []
    count = 0
    for p in parameters:
        count += 1
        g = p.grad if isinstance(p, Parameter) or (written and has_gradient(p)) else p
        if g is None:
            continue
        if isinstance(g, np.generic) and isinstance(p, Parameter):
            g = p.grad = np.array(g)
        if not isinstance(g, (np.generic, *known)):
            g = view(g, place, f"gradient {len(gradients)}", written)
        gradients.append(g)
    if is_generator and not count:
        # A generator that somebody used up before is a mistake that nothing else would show.
        warnings.warn(f"{place}: parameters is an empty generator, so there is nothing to clip", stacklevel=3)
    return gradients
