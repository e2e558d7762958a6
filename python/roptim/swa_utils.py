"""Averaging of weights over the way of training, with torch's names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from roptim import _roptim
from roptim._averaging import (
    AveragedModel,
    cumulative_stats,
    get_ema_avg_fn,
    get_ema_multi_avg_fn,
    get_swa_avg_fn,
    get_swa_multi_avg_fn,
)
from roptim._errors import RoptimKeyError, refuse
from roptim.lr_scheduler import AT_LEAST_0, COUNT, LRScheduler, one_of, per_group
from roptim.optimizer import Optimizer

__all__ = [
    "SWALR",
    "AveragedModel",
    "cumulative_stats",
    "get_ema_avg_fn",
    "get_ema_multi_avg_fn",
    "get_swa_avg_fn",
    "get_swa_multi_avg_fn",
]


class SWALR(LRScheduler):
    r"""Anneals the learning rate, whatever it is, to a constant one under which weights are averaged.

    .. math:: lr_e = swa \cdot a_e + lr_s (1 - a_e)

    :math:`a` rises from 0 at the start to 1 after ``anneal_epochs`` steps, along half a cosine or a line. The rate
    of the start, :math:`lr_s`, is derived anew in each step from the rate that is found, so that another scheduler
    may act before.

    lr at epochs 0, 1, 2 from 0.1 with ``swa_lr=0.02, anneal_epochs=2, anneal_strategy="linear"``: 0.1, 0.06, 0.02.

    Source: Izmailov, Podoprikhin, Garipov, Vetrov, Wilson, *Averaging weights leads to wider optima and better
    generalization*, UAI 2018.

    Parameters
    ----------
    optimizer : Optimizer
    swa_lr : float or list of float
        The last rate, for all groups or one per group; kept in the groups as ``"swa_lr"``.
    anneal_epochs : int
        Steps from the start to it, >= 0. With 0 it is reached at construction.
    anneal_strategy : {"cos", "linear"}
        Along half a cosine or a line.
    last_epoch : int
        The last epoch done; -1 to begin.

    The steps of this scheduler are counted, not epochs. A group that is added later has no rate to go to: the next
    step is a KeyError.
    """

    _fields = {"anneal_epochs": COUNT}
    _STRATEGIES = ("cos", "linear")
    anneal_epochs: int

    def __init__(
        self,
        optimizer: Optimizer,
        swa_lr: float | Sequence[float],
        anneal_epochs: int = 10,
        anneal_strategy: str = "cos",
        last_epoch: int = -1,
    ) -> None:
        place = type(self).__name__
        self._attach(optimizer)
        self._first = per_group(place, "swa_lr", swa_lr, optimizer, AT_LEAST_0)
        self._anneal_strategy = one_of(place, "anneal_strategy", anneal_strategy, self._STRATEGIES)
        self._set(anneal_epochs=anneal_epochs)
        super().__init__(optimizer, last_epoch)
        # From here on the groups hold it.
        del self._first

    def _enter(self, last_epoch: int) -> None:
        for group, rate in zip(self.optimizer.param_groups, self._first, strict=True):
            group["swa_lr"] = rate
        super()._enter(last_epoch)

    def _choices(self) -> dict[str, tuple[Any, ...]]:
        return {"_anneal_strategy": self._STRATEGIES}

    def get_lr(self) -> list[float]:
        self._warn_outside_step()
        (epochs,) = self._numbers()
        step = self._step_count - 1
        if epochs == 0:
            step = max(1, step)
        length = max(1, epochs)
        before, now = (
            _roptim.anneal_share(self._anneal_strategy, max(0.0, min(1.0, at / length))) for at in (step - 1, step)
        )
        rates = []
        for i, group in enumerate(self.optimizer.param_groups):
            if "swa_lr" not in group:
                place, remedy = f"{type(self).__name__}.step", "add groups before the scheduler"
                raise refuse(RoptimKeyError, place, f"group {i}", "one with 'swa_lr'", "none", remedy)
            swa = group["swa_lr"]
            start = swa if before == 1 else (float(group["lr"]) - before * swa) / (1 - before)
            rates.append(swa * now + start * (1 - now))
        return rates
