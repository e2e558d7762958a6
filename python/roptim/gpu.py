"""Arrays on a GPU: gradients that need not cross the bus.

>>> import numpy as np, roptim
>>> W = roptim.Parameter(np.ones(1000, np.float32))
>>> opt = roptim.SGD([W], lr=0.1, backend="gpu")
>>> W.grad = roptim.gpu.array(np.ones(1000, np.float32))    # once over the bus
>>> for _ in range(10):
...     opt.step()                                          # nothing crosses the bus
>>> W.data                                                  # home again

They are for gradients that stay the same, are added up (:meth:`roptim.Optimizer.accumulate`), or are sent ahead
while the device is busy.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from roptim import _roptim
from roptim._devices import Device, selected
from roptim._errors import RoptimValueError, refuse, told

__all__ = ["Array", "Norm", "array", "synchronize"]


class Array(_roptim.DeviceArray):
    """Numbers on a GPU; see :func:`array`.

    ``a[...] = x`` replaces its values by those of an array of the same shape and dtype, NumPy's or one on the same
    device; ``a.numpy()`` and ``np.asarray(a)`` are copies on the host.

    Attributes
    ----------
    shape : tuple of int
    device : str
        Name of the device.
    """

    @property
    def dtype(self) -> np.dtype[Any]:
        """What it stores."""
        return _dtype(self.dtype_name)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return self.size * self.dtype.itemsize

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        if copy is False:
            raise refuse(RoptimValueError, "roptim.gpu.Array", "copy", "None or True", "False")
        values: np.ndarray[Any, Any] = self.numpy()
        return values if dtype is None else values.astype(dtype, copy=False)

    def __setitem__(self, index: Any, value: Any) -> None:
        if index is not Ellipsis:
            raise refuse(RoptimValueError, "roptim.gpu.Array", "index", "...", told(index), "replace all values")
        self.write(value)

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of an array without axes")
        return int(self.shape[0])

    def __repr__(self) -> str:
        return f"roptim.gpu.Array(shape={self.shape}, dtype={self.dtype_name}, device={self.device!r})"

    def __reduce__(self) -> Any:
        allowed, got, remedy = "on the host", "one on a device", "send a.numpy()"
        raise refuse(RoptimValueError, "roptim.gpu.Array", "an array to be pickled", allowed, got, remedy)


def _dtype(name: str) -> np.dtype[Any]:
    if name == "bfloat16":
        import ml_dtypes

        bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return bfloat16
    return np.dtype(name)


def array(x: Any, device: str | Device = "gpu", *, allow_software: bool = False) -> Array:
    """A copy of an array on a GPU.

    Parameters
    ----------
    x : numpy.ndarray
        float32, float16, bfloat16 or complex64, of any shape and layout.
    device : str or Device
        As ``backend`` of an optimizer: gradients must lie on the device that steps.
    allow_software : bool
        Whether a software adapter will do.

    Raises
    ------
    RoptimTypeError, NoAdapterError, OutOfMemoryError
        If the dtype has no form on a GPU, no adapter fits, or its memory does not hold the array.
    """
    return Array(x, _selector("roptim.gpu.array", device), allow_software)


def synchronize(device: str | Device = "gpu", *, allow_software: bool = False) -> None:
    """Waits until a GPU has done all it was given: for measuring time."""
    _roptim.synchronize(_selector("roptim.gpu.synchronize", device), allow_software)


def _selector(place: str, device: str | Device) -> str:
    kind, _, selector = selected(place, device).partition(":")
    if kind != "gpu":
        raise refuse(RoptimValueError, place, "device", '"gpu" or "gpu:<index or name>"', told(device))
    return selector


class Norm:
    """A norm on a GPU, which is fetched when it is first used as a number."""

    def __init__(self, norm: _roptim.DeviceNorm) -> None:
        self._norm = norm
        self._value: float | None = None

    def __float__(self) -> float:
        if self._value is None:
            self._value = self._norm.value()
        return self._value

    def item(self) -> float:
        """The number."""
        return float(self)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        return np.array(float(self), dtype)

    def __bool__(self) -> bool:
        return bool(float(self))

    def __eq__(self, other: object) -> bool:
        return float(self) == other

    def __hash__(self) -> int:
        return hash(float(self))

    def __lt__(self, other: Any) -> bool:
        return bool(float(self) < other)

    def __le__(self, other: Any) -> bool:
        return bool(float(self) <= other)

    def __gt__(self, other: Any) -> bool:
        return bool(float(self) > other)

    def __ge__(self, other: Any) -> bool:
        return bool(float(self) >= other)

    def __neg__(self) -> float:
        return -float(self)

    def __pos__(self) -> float:
        return float(self)

    def __abs__(self) -> float:
        return abs(float(self))

    def __int__(self) -> int:
        return int(float(self))

    def __round__(self, digits: int | None = None) -> Any:
        return round(float(self), digits)

    def __format__(self, spec: str) -> str:
        return format(float(self), spec)

    def __repr__(self) -> str:
        return repr(float(self))


def _forwarded(name: str) -> Any:
    """A binary operator of float, for a norm."""

    def operate(self: Norm, other: Any) -> Any:
        return getattr(float(self), name)(float(other) if isinstance(other, Norm) else other)

    operate.__name__ = name
    return operate


for _operator in ("add", "sub", "mul", "truediv", "floordiv", "mod", "divmod", "pow"):
    for _name in (f"__{_operator}__", f"__r{_operator}__"):
        setattr(Norm, _name, _forwarded(_name))
