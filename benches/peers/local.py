"""roptim and the NumPy loops, in this process, over the same gradients."""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Sequence
from typing import Any

from peers import numpy_loops
from peers.cases import CASES, OPTIMIZERS, gradients_for, parameters, touched_rows
from peers.side import Side


def as_given(case: str, params: list[Any]) -> list[Any]:
    """What a constructor is given: parameters, or a group for each."""
    return [{"params": [p]} for p in params] if CASES[case].own_groups else params


class LocalSide(Side):
    """An entrant in this process."""

    def setup(self, case: str, optimizer: str) -> list[str]:
        """See Side."""
        self._case_name, self._case, self._contest = case, CASES[case], OPTIMIZERS[optimizer]
        return [""]

    def make(self, mode: str) -> tuple[Callable[[], object], Callable[[], Sequence[Any]]]:
        """See Side."""
        dtype = self._contest.dtype
        params = parameters(self._case, dtype)
        return self.stepper(params, gradients_for(self._case_name, dtype)), lambda: params

    @abc.abstractmethod
    def stepper(self, params: list[Any], gradients: list[Any]) -> Callable[[], object]:
        """What takes a step with these gradients."""


class RoptimSide(LocalSide):
    """roptim."""

    def stepper(self, params: list[Any], gradients: list[Any]) -> Callable[[], object]:
        """See LocalSide."""
        import roptim

        options = {"threads": self.threads, "clip_norm": self._contest.clip_norm}
        given = as_given(self._case_name, params)
        opt = getattr(roptim, self._contest.name)(given, **self._contest.hypers, **options)
        if self._case.rows is None:
            return functools.partial(opt.step, gradients)
        rows, shape = touched_rows(self._case), params[0].shape
        return lambda: opt.step([roptim.SparseGrad(rows, gradients[0], shape)])


class NumpySide(LocalSide):
    """Loops written by hand."""

    def stepper(self, params: list[Any], gradients: list[Any]) -> Callable[[], object]:
        """See LocalSide."""
        step = self._contest.numpy(params, **self._contest.hypers)
        if self._contest.clip_norm is not None:
            step = numpy_loops.clipped(step, self._contest.clip_norm)
        return functools.partial(
            step, gradients if self._case.rows is None else (touched_rows(self._case), gradients[0])
        )
