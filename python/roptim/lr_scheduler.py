"""Learning-rate schedulers with torch's names, arguments and values."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from roptim import _roptim
from roptim._errors import RoptimKeyError, RoptimTypeError, RoptimValueError, refuse
from roptim.optimizer import Optimizer

__all__ = ["CosineAnnealingLR", "LRScheduler", "ReduceLROnPlateau", "StepLR"]


def _whole(place: str, name: str, value: Any, low: int) -> int:
    try:
        if not isinstance(value, bool) and int(value) == value and value >= low:
            return int(value)
    except (TypeError, ValueError, OverflowError):
        pass
    raise refuse(RoptimValueError, place, name, f"a whole number >= {low}", repr(value))


def _number(place: str, name: str, value: Any, allowed: str = "a finite number", low: float = -math.inf) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise refuse(RoptimTypeError, place, name, allowed, repr(value)) from None
    if not math.isfinite(number) or number < low:
        raise refuse(RoptimValueError, place, name, allowed, repr(value))
    return number


class LRScheduler:
    """Base class of schedulers: a subclass defines :meth:`get_lr`.

    Constructing a scheduler performs its first transition (to epoch 0); each :meth:`step` performs the
    next one and writes ``"lr"`` into every group. ``"initial_lr"`` in a group is what the schedule starts
    from; a second scheduler on the same optimizer starts from the same.

    Parameters
    ----------
    optimizer : Optimizer
    last_epoch : int
        The last epoch done; -1 to begin. Any other value needs ``"initial_lr"`` in every group.

    Attributes
    ----------
    base_lrs : list of float
        What each group started from.
    last_epoch : int
        The epoch that runs now.
    """

    #: The engine's transition, where the class has one.
    _chain: ClassVar[str] = ""

    optimizer: Optimizer

    def __init__(self, optimizer: Optimizer, last_epoch: int = -1) -> None:
        self._attach(optimizer)
        for i, group in enumerate(optimizer.param_groups):
            if last_epoch == -1:
                group.setdefault("initial_lr", group["lr"])
            elif "initial_lr" not in group:
                raise refuse(
                    RoptimKeyError,
                    type(self).__name__,
                    f"group {i}",
                    "one with 'initial_lr' to resume",
                    "none",
                    "use last_epoch=-1 to begin",
                )
        self.base_lrs: list[float] = [float(group["initial_lr"]) for group in optimizer.param_groups]
        self.last_epoch = last_epoch
        self._step_count = 0
        self._is_initial = True
        self._get_lr_called_within_step = False
        try:
            self.step()
        finally:
            self._is_initial = False

    def _attach(self, optimizer: Optimizer) -> None:
        if not isinstance(optimizer, Optimizer):
            got = f"an object of type {type(optimizer).__name__}"
            raise refuse(RoptimTypeError, type(self).__name__, "optimizer", "an Optimizer", got)
        self.optimizer = optimizer

    def get_lr(self) -> list[float]:
        """The value of each group for ``self.last_epoch``. To be defined by subclasses, called by step."""
        raise NotImplementedError(f"{type(self).__name__} must define get_lr")

    def get_last_lr(self) -> list[float]:
        """The values that the last :meth:`step` wrote, one per group."""
        return self._last_lr

    def _chain_next(self, numbers: list[float]) -> list[float]:
        """torch's transition of this class from the current values."""
        groups = self.optimizer.param_groups
        values = [(float(group["lr"]), float(group.get("initial_lr", group["lr"]))) for group in groups]
        return _roptim.chain_next(type(self)._chain, numbers, values, self.last_epoch, self._is_initial)

    def _chain_closed(self, numbers: list[float]) -> list[float]:
        """torch's closed form of this class."""
        return _roptim.chain_closed(type(self)._chain, numbers, self.base_lrs, self.last_epoch)

    def _warn_outside_step(self) -> None:
        if not self._get_lr_called_within_step:
            warnings.warn(
                "get_lr computes the next value of the recursion; use get_last_lr for the current one",
                UserWarning,
                stacklevel=3,
            )

    def step(self, epoch: int | None = None) -> None:
        """Goes to the next epoch and writes each group's ``"lr"``.

        Parameters
        ----------
        epoch : int, optional
            Go to this epoch instead, by the closed form where there is one. Deprecated, as in torch.
        """
        if self._step_count == 1 and not self.optimizer._step_called:
            warnings.warn(
                "lr_scheduler.step() was called before optimizer.step(): the first value of the schedule is skipped",
                UserWarning,
                stacklevel=2,
            )
        before = (self._step_count, self.last_epoch)
        self._step_count += 1
        self._get_lr_called_within_step = True
        try:
            if epoch is None:
                self.last_epoch += 1
                values = self.get_lr()
            else:
                warnings.warn("the epoch argument of step is deprecated", UserWarning, stacklevel=2)
                self.last_epoch = epoch
                closed = getattr(self, "_get_closed_form_lr", None)
                values = closed() if closed is not None else self.get_lr()
            self._write(values)
        except BaseException:
            self._step_count, self.last_epoch = before
            raise
        finally:
            self._get_lr_called_within_step = False

    def _write(self, values: Sequence[float]) -> None:
        """All groups or, where a value is refused, none."""
        groups = self.optimizer.param_groups
        if len(values) != len(groups):
            got = f"{len(values)} for {len(groups)} groups"
            raise refuse(RoptimValueError, f"{type(self).__name__}.step", "values", "one per group", got)
        before = [group["lr"] for group in groups]
        try:
            for group, value in zip(groups, values, strict=True):
                group["lr"] = value
        except BaseException:
            for group, value in zip(groups, before, strict=True):
                group["lr"] = value
            raise
        self._last_lr = [float(group["lr"]) for group in groups]

    def state_dict(self) -> dict[str, Any]:
        """Everything but the optimizer."""
        return {
            key: list(value) if isinstance(value, list) else value
            for key, value in vars(self).items()
            if key != "optimizer"
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up a saved state. The optimizer's own state holds the current ``"lr"``: load it, too."""
        place = f"{type(self).__name__}.load_state_dict"
        if not isinstance(state_dict, dict):
            got = f"an object of type {type(state_dict).__name__}"
            raise refuse(RoptimTypeError, place, "state_dict", "a dict", got)
        if "last_epoch" not in state_dict:
            raise refuse(
                RoptimKeyError, place, "state_dict", "a dict with 'last_epoch'", str(sorted(map(str, state_dict)))
            )
        known = self.state_dict()
        for key, value in state_dict.items():
            if not isinstance(key, str) or hasattr(type(self), key):
                raise refuse(RoptimKeyError, place, "key", "of the scheduler's state", repr(key))
            numbers = (int, float, np.number)
            mine = known.get(key)
            alike = type(value) is type(mine) or (isinstance(value, numbers) and isinstance(mine, numbers))
            if not alike and mine is not None and value is not None:
                want, got = type(mine).__name__, f"an object of type {type(value).__name__}"
                raise refuse(RoptimTypeError, place, key, f"of type {want}", got)
        vars(self).update({key: value for key, value in state_dict.items() if key != "optimizer"})


class StepLR(LRScheduler):
    r"""Decays the learning rate by a factor every few epochs.

    .. math:: lr_e = lr_0 \cdot gamma^{\lfloor e / step\_size \rfloor}

    Parameters
    ----------
    optimizer : Optimizer
    step_size : int
        Epochs between decays, >= 1.
    gamma : float
        Factor of each decay.
    last_epoch : int
        The last epoch done; -1 to begin.
    """

    _chain = "StepLR"

    def __init__(self, optimizer: Optimizer, step_size: int, gamma: float = 0.1, last_epoch: int = -1) -> None:
        self.step_size = _whole("StepLR", "step_size", step_size, 1)
        self.gamma = _number("StepLR", "gamma", gamma)
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float]:
        self._warn_outside_step()
        return self._chain_next([self.step_size, self.gamma])

    def _get_closed_form_lr(self) -> list[float]:
        return self._chain_closed([self.step_size, self.gamma])


class CosineAnnealingLR(LRScheduler):
    r"""Anneals the learning rate along half a cosine; past ``T_max`` it rises again, as torch's does.

    .. math:: lr_e = \eta_{min} + (lr_0 - \eta_{min}) \frac{1 + \cos(\pi e / T_{max})}{2}

    Source: Loshchilov, Hutter, *SGDR: stochastic gradient descent with warm restarts*, ICLR 2017,
    without the restarts.

    Parameters
    ----------
    optimizer : Optimizer
    T_max : int
        Epochs from the top to the bottom, >= 1.
    eta_min : float
        The lowest value.
    last_epoch : int
        The last epoch done; -1 to begin.
    """

    _chain = "CosineAnnealingLR"

    def __init__(self, optimizer: Optimizer, T_max: int, eta_min: float = 0.0, last_epoch: int = -1) -> None:
        self.T_max = _whole("CosineAnnealingLR", "T_max", T_max, 1)
        self.eta_min = _number("CosineAnnealingLR", "eta_min", eta_min)
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float]:
        self._warn_outside_step()
        return self._chain_next([self.T_max, self.eta_min])

    def _get_closed_form_lr(self) -> list[float]:
        return self._chain_closed([self.T_max, self.eta_min])


class ReduceLROnPlateau(LRScheduler):
    """Reduces the learning rate when a metric stops improving.

    Parameters
    ----------
    optimizer : Optimizer
    mode : {"min", "max"}
        Whether a smaller or a larger metric is better.
    factor : float
        New rate = old rate times this, < 1.
    patience : int
        Epochs without improvement that are let pass.
    threshold : float
        How much better a metric must be to count.
    threshold_mode : {"rel", "abs"}
        Whether the threshold is a fraction of the best metric or a difference.
    cooldown : int
        Epochs after a reduction in which nothing is counted.
    min_lr : float or list of float
        Lower bound, for all groups or one per group.
    eps : float
        A reduction by no more than this is left out.

    ``step(metric)`` takes the metric of the epoch. A NaN metric counts as no improvement. As in torch, in
    mode "rel" a negative best metric makes slightly worse metrics count as better.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        mode: str = "min",
        factor: float = 0.1,
        patience: int = 10,
        threshold: float = 1e-4,
        threshold_mode: str = "rel",
        cooldown: int = 0,
        min_lr: float | Sequence[float] = 0,
        eps: float = 1e-8,
    ) -> None:
        place = "ReduceLROnPlateau"
        self.factor = _number(place, "factor", factor, "a number in [0, 1)", 0.0)
        if self.factor >= 1.0:
            raise refuse(RoptimValueError, place, "factor", "a number in [0, 1)", repr(factor))
        if mode not in ("min", "max"):
            raise refuse(RoptimValueError, place, "mode", "'min' or 'max'", repr(mode))
        if threshold_mode not in ("rel", "abs"):
            raise refuse(RoptimValueError, place, "threshold_mode", "'rel' or 'abs'", repr(threshold_mode))
        self._attach(optimizer)
        if isinstance(min_lr, (list, tuple)):
            if len(min_lr) != len(optimizer.param_groups):
                raise refuse(
                    RoptimValueError, place, "min_lr", f"{len(optimizer.param_groups)} numbers", str(len(min_lr))
                )
            self.default_min_lr: float | None = None
            self.min_lrs = [_number(place, "min_lr", x) for x in min_lr]
        else:
            self.default_min_lr = _number(place, "min_lr", min_lr)
            self.min_lrs = [self.default_min_lr] * len(optimizer.param_groups)
        self.patience = _whole(place, "patience", patience, 0)
        self.cooldown = _whole(place, "cooldown", cooldown, 0)
        self.eps = _number(place, "eps", eps)
        self.mode = mode
        self.threshold = _number(place, "threshold", threshold)
        self.threshold_mode = threshold_mode
        self.best = math.inf if mode == "min" else -math.inf
        self.cooldown_counter = 0
        self.num_bad_epochs = 0
        self.last_epoch = 0
        self._last_lr = [float(group["lr"]) for group in optimizer.param_groups]

    @property
    def in_cooldown(self) -> bool:
        """Whether nothing is counted now."""
        return self.cooldown_counter > 0

    def step(self, metrics: Any, epoch: int | None = None) -> None:  # type: ignore[override]  # torch's signature
        """Counts one epoch with its metric and reduces where it is due."""
        try:
            metric = float(metrics)
        except (TypeError, ValueError):
            raise refuse(RoptimTypeError, "ReduceLROnPlateau.step", "metrics", "a number", repr(metrics)) from None
        if epoch is not None:
            warnings.warn("the epoch argument of step is deprecated", UserWarning, stacklevel=2)
        self.last_epoch = self.last_epoch + 1 if epoch is None else epoch
        rule = (self.mode, self.threshold_mode, self.threshold, self.patience, self.cooldown)
        memory = (self.best, self.num_bad_epochs, self.cooldown_counter)
        (self.best, self.num_bad_epochs, self.cooldown_counter), reduce = _roptim.plateau_observe(rule, memory, metric)
        groups = self.optimizer.param_groups
        if len(groups) != len(self.min_lrs):
            if self.default_min_lr is None:
                got = f"{len(self.min_lrs)} for {len(groups)} groups"
                raise refuse(RoptimValueError, "ReduceLROnPlateau.step", "min_lr", "one number per group", got)
            self.min_lrs = [self.default_min_lr] * len(groups)
        if reduce:
            for group, floor in zip(groups, self.min_lrs, strict=True):
                group["lr"] = _roptim.plateau_reduced(float(group["lr"]), self.factor, floor, self.eps)
        self._last_lr = [float(group["lr"]) for group in groups]
