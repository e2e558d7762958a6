"""What a step may say of itself."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple


class Norms(NamedTuple):
    """2-norms of one parameter, or of all together, in a step."""

    #: Of the gradient as it was given, before bounds, with ``grad_scale`` divided out.
    gradient: float
    #: Of what the step added to the parameter.
    update: float
    #: Of the parameter after the step.
    parameter: float

    @property
    def ratio(self) -> float:
        """How much of the parameter the step changed: ``update / parameter``; infinite or NaN where the latter is 0."""
        if self.parameter:
            return self.update / self.parameter
        return math.inf if self.update else math.nan


class Statistics(NamedTuple):
    """2-norms of a step: ``opt.step(gradients, statistics=True)`` leaves them in ``opt.statistics``.

    Squares are added in float64, in an order that depends on neither threads nor the machine's instruction set. Of
    numbers beyond about 1e154, which only float64 and complex128 have, they are infinite; below 1e-154 they vanish.
    """

    #: Of all parameters that had a gradient together.
    total: Norms
    #: Of each of them, by its name where parameters have names, else by its position.
    by_parameter: Mapping[str | int, Norms]


def statistics_of(squares: list[tuple[float, float, float] | None], names: list[str | int]) -> Statistics | None:
    """From sums of squares by parameter; None where there are none."""
    present = {name: sums for name, sums in zip(names, squares, strict=False) if sums is not None}
    if not present:
        return None
    total = [0.0, 0.0, 0.0]
    for sums in present.values():
        total = [a + b for a, b in zip(total, sums, strict=True)]
    return Statistics(_norms(total), {name: _norms(sums) for name, sums in present.items()})


def _norms(squares: Iterable[float]) -> Norms:
    return Norms(*map(math.sqrt, squares))
