"""The torch-shaped parameter: an array with a gradient."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

from roptim._errors import RoptimTypeError, RoptimValueError, refuse
from roptim._roptim import ParameterBase


def _plain(x: Any) -> Any:
    return x.data if isinstance(x, Parameter) else x


class Parameter(ParameterBase, NDArrayOperatorsMixin):
    """An array with a gradient, for training loops shaped like torch's.

    Parameters
    ----------
    data : numpy.ndarray
        float32 or float64, any shape and layout; wrapped, not copied, so that on the CPU whoever holds
        the array sees each update. It must be writeable, aligned and in native byte order.
    requires_grad : bool
        Optimizers leave the parameter untouched where this is False.
    name : str, optional
        Used in error messages.

    Attributes
    ----------
    data : numpy.ndarray
        The array. While an optimizer on a GPU owns the parameter this is a read-only array with the
        device's values; write through ``p.data = x``, ``p[...] = x`` or ``with p.host() as a:``. The array that
        was wrapped is read-only then and keeps its values; it has the parameter's when that is back on the CPU.
    grad : numpy.ndarray or None
        The gradient of the next step, of the parameter's shape and dtype. ``p.grad += g`` accumulates, once
        there is one.

    NumPy functions and operators take a parameter like its array: ``x @ W + b`` is a plain array.
    Parameters compare by value and hash by identity.

    Raises
    ------
    RoptimTypeError, RoptimValueError
        If the array cannot be updated in place.
    """

    __array_priority__ = 1000.0

    @property
    def data(self) -> np.ndarray[Any, Any]:
        """The array, with the device's values where a device has newer ones; read-only then."""
        array = self._host()
        # A view, so that nobody holds the array itself, whose memory the device's values come to.
        return array.view() if self._on_device else array

    @data.setter
    def data(self, value: Any) -> None:
        if value is not self._array:
            self._write(Ellipsis, value)

    def _write(self, index: Any, value: Any) -> None:
        # First, since it may run anybody's code.
        value = np.asarray(_plain(value))
        self._lend(True)
        try:
            self._replace(index, value)
        finally:
            self._lend(False)

    def _replace(self, index: Any, value: np.ndarray[Any, Any]) -> None:
        # What is replaced as a whole need not come home first: it may be lost with its device.
        array = self._array if index is Ellipsis else self._host()
        if not np.can_cast(value.dtype, array.dtype, "same_kind"):
            raise refuse(
                RoptimTypeError, "Parameter.data", "value", f"numbers that {array.dtype} can hold", str(value.dtype)
            )
        if index is Ellipsis and value.shape not in ((), array.shape):
            raise refuse(
                RoptimValueError, "Parameter.data", "value", f"of shape {array.shape} or a number", str(value.shape)
            )
        away = not array.flags.writeable and self._on_device
        try:
            if away:
                array.flags.writeable = True
            array[index] = value
        finally:
            if away:
                array.flags.writeable = False
            self._host_written()

    @contextmanager
    def host(self) -> Iterator[np.ndarray[Any, Any]]:
        """The array, writeable for the time of the block; what was written becomes the truth.

        While the parameter is on a GPU it is a copy, steps within the block are refused, and what is written to the
        copy after it has no effect.
        """
        array = self._host()
        if self._on_device:
            self._lend(True)
            try:
                copy = self._host().copy()
                try:
                    yield copy
                finally:
                    self._write(Ellipsis, copy)
            finally:
                self._lend(False)
            return
        try:
            yield array
        finally:
            self._host_written()

    @property
    def shape(self) -> tuple[int, ...]:
        """Extent of each axis."""
        shape: tuple[int, ...] = self._array.shape
        return shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """What the array stores."""
        dtype: np.dtype[Any] = self._array.dtype
        return dtype

    @property
    def size(self) -> int:
        """Number of elements."""
        return self._array.size

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return self._array.ndim

    @property
    def T(self) -> np.ndarray[Any, Any]:
        """The array, transposed."""
        return self.data.T

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        if copy:
            return np.array(self.data, dtype=dtype)
        array = self.data
        if dtype is not None and array.dtype != dtype:
            if copy is False:
                raise refuse(RoptimValueError, "Parameter", "copy", "None or True to change the dtype", "False")
            array = array.astype(dtype)
        return array

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        if method == "at":
            return self._changed_at(ufunc, *inputs, **kwargs)
        outputs = kwargs.get("out", ())
        with_written = [x for x in outputs if isinstance(x, Parameter)]
        for parameter in with_written:
            parameter._lend(True)
        try:
            # What lies on a device is written as a whole afterwards.
            away = {id(x): x._host().copy() for x in with_written if x._on_device}
            if with_written:
                kwargs["out"] = tuple(away.get(id(x), x._host()) if isinstance(x, Parameter) else x for x in outputs)
            try:
                result = getattr(ufunc, method)(*map(_plain, inputs), **kwargs)
            finally:
                # Also after an error: NumPy may have written a part.
                for parameter in with_written:
                    if id(parameter) in away:
                        parameter._write(Ellipsis, away[id(parameter)])
                    else:
                        parameter._host_written()
        finally:
            for parameter in with_written:
                parameter._lend(False)
        return with_written[0] if len(outputs) == 1 and with_written else result

    @staticmethod
    def _changed_at(ufunc: np.ufunc, target: Any, *inputs: Any, **kwargs: Any) -> None:
        """``ufunc.at``, which writes to its first argument and heeds no read-only flag."""
        if not isinstance(target, Parameter):
            ufunc.at(target, *map(_plain, inputs), **kwargs)
            return
        with target.host() as array:
            ufunc.at(array, *map(_plain, inputs), **kwargs)

    def __getitem__(self, index: Any) -> Any:
        return self.data[_plain(index)]

    def __setitem__(self, index: Any, value: Any) -> None:
        self._write(index, value)

    def __len__(self) -> int:
        return len(self._array)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.data)

    def __bool__(self) -> bool:
        return bool(self.data)

    def __float__(self) -> float:
        return float(self.data)

    def item(self) -> float:
        """The one element as a Python number."""
        return float(self.data.item())

    __hash__ = object.__hash__

    def __repr__(self) -> str:
        name = f", name={self.name!r}" if self.name is not None else ""
        frozen = "" if self.requires_grad else ", requires_grad=False"
        return f"Parameter({self.data!r}{frozen}{name})"

    def __reduce__(self) -> tuple[Any, ...]:
        state = {"grad": self.grad, "attributes": dict(vars(self))}
        return _rebuild, (type(self), np.array(self.data), self.requires_grad, self.name), state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.grad = state["grad"]
        vars(self).update(state["attributes"])


def _rebuild(cls: type[Parameter], data: Any, requires_grad: bool, name: str | None) -> Parameter:
    """A Parameter of a subclass whose constructor may take other arguments."""
    return cls.__new__(cls, data, requires_grad, name)
