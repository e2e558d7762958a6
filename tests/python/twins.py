"""One optimizer twice: on the CPU, whose bits are the reference, and on a GPU."""

from __future__ import annotations

import os
import re
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import roptim
from roptim import NonfiniteError, Parameter
from roptim.optimizer import REGISTRY

ON_GPU: dict[str, Any] = {"backend": "gpu", "allow_software": True}
#: Whether tests that may take minutes do.
FULL = os.environ.get("ROPTIM_FULL_TESTS") == "1"
#: Optimizers whose steps run there.
GPU_NAMES = [name for name, entry in REGISTRY.items() if "gpu" in entry["backends"] and not entry["needs_closure"]]
#: What parameters on a GPU may store.
DTYPES: list[Any] = [np.float32, np.float16, ml_dtypes.bfloat16, np.complex64]
#: What sums or products of whole tensors may differ by on any adapter (docs/numerics.md).
TOLERANCES = {"Adafactor": 2.5e-7, "Muon": 5e-6}
#: How parameters are given.
KINDS = ["arrays", "Parameters", "both"]


def is_software() -> bool:
    return all(device.software for device in roptim.devices()[1:])


def needs_software() -> None:
    """Skips on hardware, which may flush subnormal numbers, fuse and approximate (docs/numerics.md)."""
    if not is_software():
        pytest.skip("hardware need not have the CPU's bits")


def f32(*shape: int, value: float = 1.0) -> Any:
    return np.full(shape, value, np.float32)


def draw(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any = np.float32, scale: float = 1.0) -> Any:
    x = scale * rng.standard_normal((2, *shape))
    return np.asarray(x[0] + 1j * x[1] if np.dtype(dtype).kind == "c" else x[0]).astype(dtype)


def tolerance(name: str) -> float:
    """What an optimizer may differ by from the CPU on a software adapter."""
    return TOLERANCES.get(name, 0.0)


def accepted(name: str, arrays: list[Any]) -> list[Any]:
    """What an optimizer takes of these arrays: real numbers, and only matrices where it takes no others."""
    if name in TOLERANCES:
        arrays = [a for a in arrays if a.dtype.kind != "c"]
    return [a if name != "Muon" or a.ndim == 2 else a.reshape(-1, 1) for a in arrays]


def given(arrays: list[Any], kind: str, names: bool = False) -> list[Any]:
    """Copies, as they are given to an optimizer."""
    wrapped = [kind == "Parameters" or (kind == "both" and i % 2 == 0) for i in range(len(arrays))]
    return [
        Parameter(a.copy(), name=f"p{i}" if names else None) if wrap else a.copy()
        for i, (a, wrap) in enumerate(zip(arrays, wrapped, strict=True))
    ]


def bits(a: Any) -> Any:
    """The bits of all real numbers in an array, those of every NaN alike."""
    flat = np.asarray(a).ravel()
    flat = flat.view(flat.real.dtype) if flat.dtype.kind == "c" else flat
    if flat.dtype.kind in "biu":
        return flat
    return np.where(np.isnan(flat.astype(np.float64)), 0, flat.view(f"u{flat.dtype.itemsize}"))


def same(a: Any, b: Any, tolerance: float = 0.0) -> bool:
    """The same bits; near each other on hardware, and where the optimizer has a tolerance.

    A parameter of 16 bits that hardware rounded the other way comes back in state of 32 bits, by way of decay or an
    average: what belongs to such parameters is compared with their tolerance.
    """
    if not is_software() and not tolerance and _has_narrow(a):
        tolerance = 1e-2
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key], tolerance) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y, tolerance) for x, y in zip(a, b, strict=True))
    if isinstance(a, (np.ndarray, Parameter)):
        a, b = np.asarray(a), np.asarray(b)
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        if is_software() and tolerance == 0.0:
            return bool(np.array_equal(bits(a), bits(b)))
        wide = np.complex128 if a.dtype.kind == "c" else np.float64
        if not is_software():
            tolerance += 1e-2 if a.dtype.itemsize == 2 else 1e-5
        elif a.dtype.itemsize == 2:
            # A sum close to the middle of two numbers is rounded the other way.
            tolerance += float(ml_dtypes.finfo(a.dtype).eps)
        return bool(np.allclose(a.astype(wide), b.astype(wide), rtol=tolerance, atol=tolerance, equal_nan=True))
    return bool(a == b)


def _has_narrow(a: Any) -> bool:
    if isinstance(a, (list, tuple)):
        return any(map(_has_narrow, a))
    return isinstance(a, (np.ndarray, Parameter)) and a.dtype.itemsize == 2


def everything(opt: Any, params: list[Any]) -> Any:
    """Parameters, state, groups, counts and schedules."""
    saved = opt.state_dict()
    return [np.array(p) for p in params], saved["state"], saved["param_groups"], saved["roptim"]


def outcome(opt: Any, *args: Any, **kwargs: Any) -> str | None:
    """One step to its end: the message of what it raised, at once or when it was asked for, without the place in the
    gradient, which is known where the gradient is still at hand."""
    try:
        opt.step(*args, **kwargs)
        opt.update_count  # noqa: B018  # asks
    except NonfiniteError as error:
        message = re.sub(r"( in the (real|imaginary) part)? at flat index [0-9]+", "", str(error))
        return re.sub("got -?inf;", "got an infinite number;", message)
    return None
