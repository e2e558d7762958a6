"""roptim and the NumPy loops, in this process, over the same gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from peers import numpy_loops
from peers.cases import CASES, OPTIMIZERS, gradients_for, parameters, touched_rows
from peers.side import Side


def as_given(case: str, params: list[Any]) -> list[Any]:
    """What a constructor is given: parameters, or a group for each."""
    return [{"params": [p]} for p in params] if CASES[case].own_groups else params


class RoptimSide(Side):
    """roptim."""

    def setup(self, case: str, optimizer: str) -> list[str]:
        """See Side."""
        self._case, self._optimizer = case, optimizer
        return [""]

    def make(self, mode: str) -> tuple[Callable[[], object], Callable[[], Sequence[Any]]]:
        """See Side."""
        import roptim

        case, contest = CASES[self._case], OPTIMIZERS[self._optimizer]
        params, gradients = parameters(case, contest.dtype), gradients_for(self._case, contest.dtype)
        options = {"threads": self.threads, "clip_norm": contest.clip_norm}
        opt = getattr(roptim, contest.name)(as_given(self._case, params), **contest.hypers, **options)
        if case.rows is None:
            return functools.partial(opt.step, gradients), lambda: params
        rows, shape = touched_rows(case), params[0].shape
        return lambda: opt.step([roptim.SparseGrad(rows, gradients[0], shape)]), lambda: params


class NumpySide(Side):
    """Loops written by hand."""

    def setup(self, case: str, optimizer: str) -> list[str]:
        """See Side."""
        self._case, self._optimizer = case, optimizer
        return [""]

    def make(self, mode: str) -> tuple[Callable[[], object], Callable[[], Sequence[Any]]]:
        """See Side."""
        case, contest = CASES[self._case], OPTIMIZERS[self._optimizer]
        params, gradients = parameters(case, contest.dtype), gradients_for(self._case, contest.dtype)
        step = contest.numpy(params, **contest.hypers)
        if contest.clip_norm is not None:
            step = numpy_loops.clipped(step, contest.clip_norm)
        given = gradients if case.rows is None else (touched_rows(case), gradients[0])
        return functools.partial(step, given), lambda: params
