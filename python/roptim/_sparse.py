"""Gradients that touch some rows only."""

from __future__ import annotations

import math
import operator
import sys
from typing import Any

import numpy as np

from roptim._errors import RoptimTypeError, RoptimValueError, refuse, told
from roptim._foreign import coordinates

_PLACE = "SparseGrad"


class SparseGrad:
    """A gradient that is zero but in some rows: that of an embedding table, say.

    :class:`~roptim.SparseAdam`, :class:`~roptim.SGD`, :class:`~roptim.Adagrad`, :class:`~roptim.LBFGS` and
    :class:`~roptim.ConjugateGradient` take it in place of an array, as gradient of a step or as
    ``Parameter.grad``. A row that is named several times counts with the sum of its values.

    Parameters
    ----------
    indices : integer array
        Which rows: shape ``(n,)``, each in ``[0, shape[0])``. With shape ``(k, n)`` the gradient is sparse
        in its first ``k`` axes, as in torch's COO tensors.
    values : array
        What the gradient is there: shape ``(n, *shape[k:])``, in the parameter's dtype.
    shape : tuple of int
        Shape of the parameter.

    Raises
    ------
    RoptimValueError, RoptimTypeError
        If indices, values and shape do not belong together.

    Examples
    --------
    >>> table = np.zeros((1000, 8), np.float32)
    >>> opt = roptim.SparseAdam([table], lr=0.1)
    >>> opt.step([roptim.SparseGrad([3, 7, 3], np.ones((3, 8), np.float32), table.shape)])
    """

    def __init__(self, indices: Any, values: Any, shape: Any) -> None:
        try:
            self._shape = tuple(operator.index(axis) for axis in shape)
        except TypeError:
            raise refuse(RoptimTypeError, _PLACE, "shape", "a tuple of integers", told(shape)) from None
        if not self._shape or min(self._shape) < 0 or math.prod(self._shape) > np.iinfo(np.intp).max:
            raise refuse(RoptimValueError, _PLACE, "shape", "one that an array can have, of axes", told(shape))
        try:
            self._values, index = np.asarray(values), np.array(indices)
        except (TypeError, ValueError):
            raise refuse(RoptimTypeError, _PLACE, "indices and values", "arrays", "ragged ones") from None
        if index.size == 0:
            index = index.astype(np.int64)
        if index.dtype.kind not in "iu":
            raise refuse(RoptimTypeError, _PLACE, "indices", "integers", str(index.dtype))
        # A copy, which nobody changes after it was checked.
        index.flags.writeable = False
        self._indices = index
        axes = index.reshape(1, -1) if index.ndim == 1 else index
        if axes.ndim != 2 or not 1 <= len(axes) <= len(self.shape):
            allowed = f"of shape (n,) or (k, n) with k from 1 to {len(self.shape)}"
            raise refuse(RoptimValueError, _PLACE, "indices", allowed, str(index.shape))
        for axis, (numbers, extent) in enumerate(zip(axes, self.shape, strict=False)):
            wrong = numbers[(numbers < 0) | (numbers >= extent)]
            if wrong.size:
                name = "indices" if index.ndim == 1 else f"indices[{axis}]"
                raise refuse(RoptimValueError, _PLACE, name, f"in [0, {extent})", str(wrong[0]))
        wanted = (axes.shape[1], *self.shape[len(axes) :])
        if self.values.shape != wanted:
            raise refuse(RoptimValueError, _PLACE, "values", f"of shape {wanted}", str(self.values.shape))
        self._axes = axes

    @property
    def indices(self) -> np.ndarray[Any, Any]:
        """Which rows, read-only."""
        return self._indices

    @property
    def values(self) -> np.ndarray[Any, Any]:
        """What the gradient is there: the array that was given. It may be written to, not exchanged."""
        return self._values

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter."""
        return self._shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """What the values are."""
        dtype: np.dtype[Any] = self.values.dtype
        return dtype

    def coalesced(self) -> SparseGrad:
        """The same gradient with each row once, in ascending order.

        Sums of half-precision rows are taken, and returned, in float32.
        """
        rows = np.zeros(self._axes.shape[1], np.int64)
        for numbers, extent in zip(self._axes, self.shape, strict=False):
            rows = rows * extent + numbers.astype(np.int64)
        order = np.argsort(rows, kind="stable")
        kept, where = np.unique(rows, return_inverse=True)
        if len(kept) == len(rows):
            values = self.values[order]
        else:
            values = np.zeros((len(kept), *self.values.shape[1:]), _sum_dtype(self.values))
            # In the order given, so that the bits do not depend on anything else.
            # A sum that is not finite is the business of whoever takes the gradient.
            with np.errstate(all="ignore"):
                np.add.at(values, where.reshape(-1), self.values.astype(values.dtype, copy=False))
        index = np.stack(np.unravel_index(kept, self.shape[: len(self._axes)])) if self.indices.ndim == 2 else kept
        out = SparseGrad(index, values, self.shape)
        out._rows = kept
        return out

    #: Rows counted over all sparse axes, ascending; known once coalesced.
    _rows: Any = None

    def _is_unique(self) -> bool:
        """Whether no row is named twice."""
        return bool(len(np.unique(self._axes, axis=1).T) == self._axes.shape[1])

    def _become(self, other: SparseGrad) -> None:
        """Takes the place of another gradient of this shape."""
        self.__dict__.update(other.__dict__)

    def toarray(self) -> np.ndarray[Any, Any]:
        """As a dense array; sums of half-precision rows are float32."""
        dense = np.zeros(self.shape, self.values.dtype if self._is_unique() else _sum_dtype(self.values))
        with np.errstate(all="ignore"):
            np.add.at(dense, tuple(self._axes), self.values.astype(dense.dtype, copy=False))
        return dense

    def __repr__(self) -> str:
        return f"SparseGrad(shape={self.shape}, dtype={self.dtype}, rows={self._axes.shape[1]})"


def _sum_dtype(values: np.ndarray[Any, Any]) -> np.dtype[Any]:
    """What values are summed in: half precision in single."""
    is_half = values.dtype.name in ("float16", "bfloat16")
    dtype: np.dtype[Any] = np.dtype(np.float32) if is_half else values.dtype
    return dtype


def _coordinates(coo: Any) -> Any:
    """Indices of the entries of scipy's COO array along each axis, of which older releases only know two."""
    return np.stack(coo.coords if hasattr(coo, "coords") else [coo.row, coo.col])


def parts(gradient: object) -> tuple[Any, Any, tuple[int, ...]] | None:
    """Ascending rows, their values and the dense shape of a sparse gradient; None if it is none."""
    sparse = sys.modules.get("scipy.sparse")
    if sparse is not None and sparse.issparse(gradient):
        coo = gradient.tocoo()  # type: ignore[attr-defined]  # scipy's, which issparse knows
        gradient = SparseGrad(_coordinates(coo), coo.data, coo.shape)
    elif (of_torch := coordinates(gradient)) is not None:
        gradient = SparseGrad(*of_torch)
    if not isinstance(gradient, SparseGrad):
        return None
    if gradient._rows is None:
        gradient = gradient.coalesced()
    return gradient._rows, np.ascontiguousarray(gradient.values), gradient.shape
