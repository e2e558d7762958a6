"""The learning-rate range test: one short run through many learning rates, and everything as it was afterwards."""

from __future__ import annotations

import bisect
import copy
import importlib
import itertools
import math
import operator
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self, TypeAlias

import numpy as np

from roptim import _sparse, _tree
from roptim._averaging import AveragedModel
from roptim._errors import (
    NonfiniteError,
    RoptimKeyError,
    RoptimRuntimeError,
    RoptimTypeError,
    RoptimValueError,
    TornError,
    refuse,
    told,
)
from roptim._foreign import has_gradient, view, will_write
from roptim._groups import FixedList, ParamGroup, settled
from roptim._parameter import Parameter
from roptim._sparse import SparseGrad
from roptim.lr_scheduler import LRScheduler
from roptim.optimizer import ClosureOptimizer, Optimizer

__all__ = ["LRFinder"]

_PLACE = "LRFinder"
_TEST = "LRFinder.range_test"
_Array: TypeAlias = np.ndarray[Any, Any]


class LRFinder:
    r"""Finds a learning rate: a short training run in which it grows from step to step, with the losses recorded.

    Where the loss falls fastest the learning rate is good; where the loss turns up it is too large.

    >>> finder = LRFinder(opt, loss_and_gradients=loss_and_gradients)
    >>> finder.range_test(batches, start_lr=1e-6)
    >>> finder.plot()
    >>> opt.param_groups[0]["lr"] = finder.suggestion()

    Afterwards, and after an error or Ctrl-C in the test, everything that belongs to the optimizer is as it was
    before, bit for bit and in the same arrays: parameters, their ``.grad``, state, count of updates, every
    option of every group. No scheduler is stepped but by your own function.

    Source: Smith, *Cyclical learning rates for training neural networks*, WACV 2017, section 3.3. Names and
    defaults are those of the package torch-lr-finder.

    Parameters
    ----------
    opt : Optimizer
        Of any kind; on a GPU, too; also one written in Python. Each group needs an ``"lr"``.
    step : callable, optional
        ``step(batch) -> loss`` is one step of your own loop: it computes the loss, sets or hands over the
        gradients and calls ``opt.step``. It may clip, skip and log, but leaves the learning rate alone, so no
        scheduler is stepped in it.
    loss_and_gradients : callable, optional
        Given in place of ``step``: ``loss_and_gradients(batch)`` returns ``(loss, gradients)``, or the loss
        alone with the gradients in ``.grad``, and the finder calls ``opt.step``. Before each call the
        gradients of Parameters are forgotten, as by ``opt.zero_grad()``. Optimizers that evaluate the loss
        several times in a step (LBFGS) call it as their closure.
    evaluate : callable, optional
        ``evaluate(validation) -> loss``, for a test with the validation loss. Without it that loss is the
        plain mean of what ``loss_and_gradients`` returns for the batches of the validation data.
    also
        What else is to be as before: running means of batch normalization, say, the second optimizer of your
        step, its schedulers and averages, or the ``numpy.random.Generator`` that shuffles. Arrays, Parameters,
        optimizers, LRSchedulers, AveragedModels and generators, in dicts and lists, whose other entries are put
        back, too.

    Attributes
    ----------
    history : dict
        ``"lr"``: learning rates of the first group; ``"loss"``: smoothed losses; ``"raw_loss"``: losses as
        they were computed. Three lists of floats of one length, of the latest test; those of a test that an
        error ended go up to there.
    stopped : str or None
        Why the latest test ended: ``"end"`` after all iterations, ``"diverged"``, ``"nonfinite"`` (NaN or
        infinity in a loss, or in gradients where that is an error), ``"exhausted"`` (an iterator had no more
        batches); None after an error.

    Raises
    ------
    RoptimTypeError
        If an argument is not of its kind.
    RoptimValueError
        If both ``step`` and ``loss_and_gradients`` are given, or none.

    Notes
    -----
    What a test costs besides the steps is a copy of parameters, gradients and state. Not put back is what the
    finder cannot know of: other arrays, schedulers and averages that your step moves, random generators, files; give
    what you can as ``also``. Arrays of
    ``opt.state`` that were looked up before the test are no longer the optimizer's afterwards, as after
    ``load_state_dict``. Rprop reads the learning rate in a parameter's first step only, so that a test tells
    little of it.
    """

    def __init__(
        self,
        opt: Optimizer,
        step: Callable[[Any], Any] | None = None,
        *,
        loss_and_gradients: Callable[[Any], Any] | None = None,
        evaluate: Callable[[Any], Any] | None = None,
        also: Any = (),
    ) -> None:
        if not isinstance(opt, Optimizer):
            raise refuse(RoptimTypeError, _PLACE, "opt", "an Optimizer", _kind(opt))
        functions = {"step": step, "loss_and_gradients": loss_and_gradients, "evaluate": evaluate}
        for name, function in functions.items():
            if function is not None and not callable(function):
                raise refuse(RoptimTypeError, _PLACE, name, "callable", _kind(function))
        if (step is None) == (loss_and_gradients is None):
            got = "none" if step is None else "both"
            raise refuse(RoptimValueError, _PLACE, "step or loss_and_gradients", "given, one of them", got)
        _refuse_unknown(also)
        self._opt = opt
        self._step = step
        self._loss_and_gradients = loss_and_gradients
        self._evaluate = evaluate
        self._also = also
        self.history: dict[str, list[float]] = {"lr": [], "loss": [], "raw_loss": []}
        self.stopped: str | None = None

    # ---- the test ---------------------------------------------------------------------------------------

    def range_test(
        self,
        batches: Any,
        start_lr: float | None = None,
        end_lr: float = 10,
        num_iter: int = 100,
        step_mode: str = "exp",
        smooth_f: float = 0.05,
        diverge_th: float = 5,
        accumulation_steps: int = 1,
        *,
        validation: Any = None,
        progress: bool = True,
    ) -> Self:
        r"""Runs the test and puts everything back.

        With :math:`r_i = i / (num\_iter - 1)` the learning rate of iteration :math:`i = 0, 1, \ldots` is

        .. math::
            lr_i &= start\_lr^{1 - r_i} \cdot end\_lr^{r_i} && \text{("exp")} \\
            lr_i &= (1 - r_i) \cdot start\_lr + r_i \cdot end\_lr && \text{("linear")}

        in the first group; the others keep their ratio to it. The loss that is recorded with :math:`lr_i` is
        that of the training batch, before the step with :math:`lr_i`, or the validation loss after it. It is
        smoothed:

        .. math:: s_0 = loss_0, \quad s_i = smooth\_f \cdot loss_i + (1 - smooth\_f) \cdot s_{i-1}

        The test stops early where :math:`s_i > diverge\_th \cdot \min_{j \le i} s_j`, and before a loss that is
        not finite or a step that raises :class:`~roptim.NonfiniteError`. (Where the smallest :math:`s_j` is
        negative the bound is as far above it as it would be above its magnitude.)

        Parameters
        ----------
        batches
            Any iterable, begun again where it ends; or a function without arguments that returns one, called
            again where that ends. A generator or another iterator can be gone through once only: where it ends
            the test ends, with a warning.
        start_lr : float, optional
            Learning rate of the first step, > 0. By default what the first group has.
        end_lr : float
            Learning rate of the last step, > ``start_lr``.
        num_iter : int
            Steps, >= 1.
        step_mode : {"exp", "linear"}
            Whether the learning rate grows by equal factors or by equal differences.
        smooth_f : float
            Weight of the latest loss in the smoothed one, in [0, 1); with 0 there is no smoothing.
        diverge_th : float
            How many times the best smoothed loss is too much, > 1; ``math.inf`` never to stop for that.
        accumulation_steps : int
            Batches per step: loss and gradients are the mean over so many. Needs ``loss_and_gradients``.
        validation : optional
            Data for the validation loss, an iterable of batches that can be gone through again and again, or
            whatever ``evaluate`` takes. The loss is computed after each step.
        progress : bool
            Whether to show the progress, where the standard error output is a terminal; by tqdm if it is
            installed.

        Returns
        -------
        LRFinder
            The finder itself.

        Raises
        ------
        RoptimTypeError, RoptimValueError, RoptimKeyError
            If an argument is refused, or a loss is no number.
        NonfiniteError
            If the very first loss is NaN or infinite, or the first step raises it.
        RoptimRuntimeError
            If ``step`` never calls ``opt.step``, or changes the learning rate.
        TornError
            If the optimizer is torn to begin with, or something could not be put back. Where another error
            is on its way then, it gets a note instead.
        """
        end_lr = _number("end_lr", end_lr, "a finite number > 0", lambda x: 0 < x < math.inf)
        num_iter = _whole(_TEST, "num_iter", num_iter, 1)
        if not isinstance(step_mode, str) or step_mode not in ("exp", "linear"):
            raise refuse(RoptimValueError, _TEST, "step_mode", "'exp' or 'linear'", told(step_mode))
        smooth_f = _number("smooth_f", smooth_f, "a number in [0, 1)", lambda x: 0 <= x < 1)
        diverge_th = _number("diverge_th", diverge_th, "a number > 1", lambda x: x > 1)
        accumulation_steps = _whole(_TEST, "accumulation_steps", accumulation_steps, 1)
        if accumulation_steps > 1 and self._loss_and_gradients is None:
            remedy = "give loss_and_gradients in place of step"
            raise refuse(
                RoptimValueError, _TEST, "accumulation_steps", "1 with a step function", str(accumulation_steps), remedy
            )
        self._check_validation(validation)
        bases = _bases(self._opt)
        if start_lr is None:
            if bases[0] == 0:
                raise refuse(RoptimValueError, _TEST, "start_lr", "given where the first group's lr is 0", "None")
            start_lr = bases[0]
        start_lr = _number("start_lr", start_lr, "a finite number > 0", lambda x: 0 < x < math.inf)
        rates = _rates(start_lr, end_lr, num_iter, step_mode)
        stream = _endless(batches)

        memory = _Memory()
        memory.keep("the optimizer", self._opt)
        memory.keep("an object of also", self._also)
        self.history = {"lr": [], "loss": [], "raw_loss": []}
        self.stopped = None
        stopped = "end"
        try:
            try:
                with _Progress(num_iter, bool(progress)) as shown:
                    for lr, loss in self._losses(rates, bases, stream, accumulation_steps, validation):
                        if not math.isfinite(loss):
                            if not self.history["lr"]:
                                raise refuse(NonfiniteError, _TEST, "the first loss", "finite", told(loss))
                            stopped = "nonfinite"
                            break
                        self._record(lr, loss, smooth_f)
                        shown.tick(lr, self.history["loss"][-1])
                        if self._has_diverged(diverge_th):
                            stopped = "diverged"
                            break
                    else:
                        stopped = "end" if len(self.history["lr"]) == num_iter else "exhausted"
            finally:
                memory.put_back()
        except BaseException as error:
            # An interrupt may have come before putting back began; after it is done this does nothing.
            memory.put_back()
            for failure in memory.failures:
                error.add_note(str(failure))
            raise
        if memory.failures:
            first, *others = memory.failures
            for failure in others:
                first.add_note(str(failure))
            raise first
        self.stopped = stopped
        if stopped == "exhausted":
            warnings.warn(
                f"{_TEST}: batches ended after {len(self.history['lr'])} of {num_iter} iterations, at lr "
                f"{self.history['lr'][-1]:.3g}; give a list, or a function that returns a new iterator",
                UserWarning,
                stacklevel=2,
            )
        return self

    def reset(self) -> None:
        """Does nothing: :meth:`range_test` has put everything back already.

        In torch-lr-finder this call restores model and optimizer. It may stay where it is in loops that are
        ported, and come at any time: what was trained after a test is left alone.
        """

    def _check_validation(self, validation: Any) -> None:
        if validation is None:
            return
        if self._evaluate is None and self._loss_and_gradients is None:
            raise refuse(RoptimValueError, _TEST, "validation", "None without evaluate", _kind(validation))
        if hasattr(validation, "__next__"):
            remedy = "give a list"
            allowed = "data that can be gone through after each step"
            raise refuse(RoptimTypeError, _TEST, "validation", allowed, _kind(validation), remedy)
        if self._evaluate is None:
            _beginning("validation", validation)

    def _losses(
        self,
        rates: Sequence[float],
        bases: Sequence[float],
        stream: Iterator[Any],
        accumulation_steps: int,
        validation: Any,
    ) -> Iterator[tuple[float, float]]:
        """Learning rates and losses of one iteration after the other; ends early where the batches do."""
        # A rate that a group refuses is refused now, not after many steps: the last one is the largest.
        self._set_rates(rates[-1], bases)
        self._opt._step_called = False
        for iteration, lr in enumerate(rates):
            batches = list(itertools.islice(stream, accumulation_steps))
            if len(batches) < accumulation_steps:
                if iteration == 0:
                    got = f"{len(batches)} of {accumulation_steps} for the first step" if batches else "none"
                    raise refuse(RoptimValueError, _TEST, "batches", "at least one step's", got)
                break
            wanted = self._set_rates(lr, bases)
            try:
                if self._step is not None:
                    loss = _loss(self._step(batches[0]), "the loss that step returns")
                else:
                    loss = self._finders_step(batches)
            except NonfiniteError:
                # Gradients that are not finite, of an optimizer or a clipping that was to raise then.
                if iteration == 0:
                    raise
                loss = math.nan
            self._refuse_changed(wanted)
            if validation is not None and math.isfinite(loss):
                loss = self._validation_loss(validation)
            yield lr, loss
        if self._step is not None and not self._opt._step_called:
            raise refuse(RoptimRuntimeError, _TEST, "step", "a function that calls opt.step", "one that never did")

    def _refuse_changed(self, rates: Sequence[float]) -> None:
        groups = self._opt.param_groups
        if len(groups) != len(rates):
            got = f"{len(groups)} in place of {len(rates)}"
            raise refuse(RoptimRuntimeError, _TEST, "the number of groups", "left alone by the step", got)
        for i, (group, rate) in enumerate(zip(groups, rates, strict=True)):
            if settled(group["lr"]) != rate:
                remedy = "leave schedulers out of the step"
                got = f"{group['lr']!r} in place of {rate!r}"
                raise refuse(RoptimRuntimeError, _TEST, f"lr of group {i}", "left alone by the step", got, remedy)

    def _set_rates(self, lr: float, bases: Sequence[float]) -> list[float]:
        """Gives the first group this learning rate, the others theirs in proportion, and returns all."""
        first = bases[0]
        rates = [lr if base == first else base * (lr / first) for base in bases]
        for group, rate in zip(self._opt.param_groups, rates, strict=True):
            group["lr"] = rate
        return rates

    def _finders_step(self, batches: list[Any]) -> float:
        """One step over the mean of the batches; none where the loss is not finite."""
        if isinstance(self._opt, ClosureOptimizer):
            return _loss(self._opt.step(closure=lambda: self._mean(batches)), "the loss of loss_and_gradients")
        loss, gradients = self._mean(batches)
        if math.isfinite(loss):
            # Without an argument where there is none: optimizers written in Python may take none.
            self._opt.step(*(() if gradients is None else (gradients,)))
        return loss

    def _called(self, batch: Any) -> tuple[float, Any]:
        assert self._loss_and_gradients is not None
        self._opt.zero_grad()
        given = self._loss_and_gradients(batch)
        loss, gradients = given if isinstance(given, tuple) and len(given) == 2 else (given, None)
        return _loss(loss, "the loss of loss_and_gradients"), gradients

    def _mean(self, batches: list[Any]) -> tuple[float, Any]:
        """Loss and gradients of batches, the mean of several; None for gradients that are in ``.grad``."""
        if len(batches) == 1:
            return self._called(batches[0])
        objects, n = self._opt._state._objects, len(batches)
        total, sums = 0.0, [_Sum(n) for _ in objects]
        gradients = None
        for batch in batches:
            loss, gradients = self._called(batch)
            total += loss
            if gradients is None:
                if any(has_gradient(p) and not isinstance(p, Parameter) for p in objects):
                    allowed, remedy = "1 where tensors carry their gradients", "return loss and gradients"
                    raise refuse(RoptimValueError, _TEST, "accumulation_steps", allowed, str(n), remedy)
                leaves = [p.grad if isinstance(p, Parameter) else None for p in objects]
            else:
                leaves = self._opt._read(gradients)
            for one, leaf in zip(sums, leaves, strict=True):
                one.add(leaf)
        means = [one.mean for one in sums]
        if gradients is not None:
            specs = self._opt._specs
            return total / n, _built(specs[0], iter(means)) if len(specs) == 1 else means
        for p, mean in zip(objects, means, strict=True):
            if isinstance(p, Parameter):
                p.grad = mean
        return total / n, None

    def _validation_loss(self, validation: Any) -> float:
        if self._evaluate is not None:
            return _loss(self._evaluate(validation), "the loss that evaluate returns")
        losses = [self._called(batch)[0] for batch in _beginning("validation", validation)()]
        if not losses:
            raise refuse(RoptimValueError, _TEST, "validation", "at least one batch", "none")
        return sum(losses) / len(losses)

    def _record(self, lr: float, loss: float, smooth_f: float) -> None:
        before = self.history["loss"]
        smoothed = smooth_f * loss + (1 - smooth_f) * before[-1] if before and smooth_f > 0 else loss
        for name, value in (("lr", lr), ("loss", smoothed), ("raw_loss", loss)):
            self.history[name].append(value)

    def _has_diverged(self, diverge_th: float) -> bool:
        losses = self.history["loss"]
        best = min(losses)
        # Five times a negative number would be below it.
        return losses[-1] > (diverge_th * best if best > 0 else best + (diverge_th - 1) * abs(best))

    # ---- what it found ----------------------------------------------------------------------------------

    def suggestion(self, method: str = "steepest", skip_start: int = 10, skip_end: int = 5) -> float:
        r"""A learning rate read from the curve of the smoothed loss.

        Parameters
        ----------
        method : {"steepest", "valley", "minimum/10"}
            - "steepest": where the loss falls fastest, that is where :math:`d\,loss / d \log lr` is smallest,
              by central differences.
            - "valley": two thirds of the way through the longest valley, which is the longest subsequence of
              falling losses, from its first to its last point. fastai, whose default it is, describes
              it so; its code takes the middle of as many points as the subsequence has.
            - "minimum/10": a tenth of the learning rate with the smallest loss.
        skip_start, skip_end : int
            So many points are left out at the beginning and at the end, where smoothing starts and where
            the loss explodes.

        Returns
        -------
        float
            A learning rate for the first group.

        Raises
        ------
        RoptimValueError
            If there are too few points, or the loss falls nowhere.
        """
        place = "LRFinder.suggestion"
        if not isinstance(method, str) or method not in _METHODS:
            allowed = ", ".join(map(repr, _METHODS))
            raise refuse(RoptimValueError, place, "method", f"one of {allowed}", told(method))
        lr, loss, _ = self._points(place, skip_start, skip_end)
        if not np.any(np.diff(loss) < 0):
            remedy = "begin at a smaller lr, or take more iterations"
            raise refuse(RoptimValueError, place, "the loss", "falling somewhere", "a loss that never falls", remedy)
        return _METHODS[method](lr, loss)

    def plot(
        self,
        ax: Any = None,
        log_lr: bool = True,
        skip_start: int = 10,
        skip_end: int = 5,
        suggest: bool = True,
    ) -> Any:
        """Draws the losses over the learning rate, by matplotlib.

        Parameters
        ----------
        ax : matplotlib.axes.Axes, optional
            Where to draw; by default in a new figure of pyplot, which ``pyplot.show()`` shows. There the axis of
            the loss has the range of the smoothed losses.
        log_lr : bool
            Whether the axis of the learning rate is logarithmic.
        skip_start, skip_end : int
            So many points are left out at the beginning and at the end.
        suggest : bool
            Whether to mark the suggestions of all methods that have one.

        Returns
        -------
        matplotlib.axes.Axes
            What was drawn in.

        Raises
        ------
        RoptimValueError
            If there are too few points.
        RoptimRuntimeError
            If matplotlib is not installed and ``ax`` is not given.
        """
        place = "LRFinder.plot"
        lr, loss, raw = self._points(place, skip_start, skip_end)
        own_figure = ax is None
        if own_figure:
            try:
                pyplot = importlib.import_module("matplotlib.pyplot")
            except ImportError as error:
                remedy = "pip install matplotlib"
                raise refuse(RoptimRuntimeError, place, "matplotlib", "installed", str(error), remedy) from error
            _, ax = pyplot.subplots(layout="constrained")
        ax.plot(lr, raw, color="#b9c6d3", linewidth=1, label="loss")
        ax.plot(lr, loss, color="#2a6fbb", linewidth=2, label="smoothed loss")
        if log_lr:
            ax.set_xscale("log")
        if suggest:
            styles = zip(_METHODS, ("#d9731a", "#2e8b57", "#8a4fa3"), ("-", "--", ":"), strict=True)
            for method, color, dashes in styles:
                try:
                    rate = self.suggestion(method, skip_start, skip_end)
                except RoptimValueError:
                    continue
                ax.axvline(rate, color=color, linestyle=dashes, linewidth=1.4, label=f"{method}: {rate:.3g}")
                if lr[0] <= rate <= lr[-1]:
                    height = np.interp(math.log(rate), np.log(lr), loss)
                    ax.plot([rate], [height], color=color, marker="o", linestyle="none")
        ax.set_xlabel("learning rate (log scale)" if log_lr else "learning rate")
        ax.set_ylabel("loss")
        low, high = loss.min(), loss.max()
        if own_figure and low < high:
            # Single losses that explode would leave nothing to see of the smoothed ones.
            ax.set_ylim(low - 0.3 * (high - low), high + 0.3 * (high - low))
        ax.legend()
        return ax

    def _points(self, place: str, skip_start: int, skip_end: int) -> tuple[_Array, _Array, _Array]:
        """Learning rates, smoothed and raw losses, without the ends: at least two points."""
        start = _whole(place, "skip_start", skip_start, 0)
        end = _whole(place, "skip_end", skip_end, 0)
        count = len(self.history["lr"])
        if count - start - end < 2:
            allowed = f"{start + end + 2} or more with skip_start={start} and skip_end={end}"
            remedy = "lower these two, or take more iterations" if count else "call range_test first"
            raise refuse(RoptimValueError, place, "the number of recorded points", allowed, str(count), remedy)
        kept = [np.array(self.history[name][start : count - end]) for name in ("lr", "loss", "raw_loss")]
        return kept[0], kept[1], kept[2]


# ---- reading the curve --------------------------------------------------------------------------------------


def _steepest(lr: _Array, loss: _Array) -> float:
    return float(lr[np.gradient(loss, np.log(lr)).argmin()])


def _valley(lr: _Array, loss: _Array) -> float:
    """Patience sorting: of all falling subsequences of a length, only the highest last loss matters."""
    lasts: list[float] = []  # by length - 1: that loss, negated so that they ascend
    where: list[int] = []  # and its index
    before: list[int] = []  # by index: where the subsequence that ends there was before
    end = 0
    for i, height in enumerate((-loss).tolist()):
        length = bisect.bisect_left(lasts, height)
        before.append(where[length - 1] if length else i)
        if length == len(lasts):
            lasts.append(height)
            where.append(i)
            end = i
        else:
            lasts[length] = height
            where[length] = i
    begin = end
    while before[begin] != begin:
        begin = before[begin]
    return float(lr[begin + 2 * (end - begin) // 3])


def _tenth_of_minimum(lr: _Array, loss: _Array) -> float:
    return float(lr[loss.argmin()]) / 10


_METHODS = {"steepest": _steepest, "valley": _valley, "minimum/10": _tenth_of_minimum}


# ---- arguments ----------------------------------------------------------------------------------------------


def _kind(value: object) -> str:
    return "None" if value is None else f"an object of type {type(value).__name__}"


def _number(name: str, value: Any, allowed: str, fits: Callable[[float], bool]) -> float:
    value = settled(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise refuse(RoptimTypeError, _TEST, name, allowed, told(value))
    try:
        number = float(value)
    except OverflowError:
        number = math.nan
    # NaN fails every range.
    if not fits(number):
        raise refuse(RoptimValueError, _TEST, name, allowed, told(value))
    return number


def _whole(place: str, name: str, value: Any, low: int) -> int:
    allowed = f"a whole number >= {low}"
    try:
        number = None if isinstance(value, (bool, np.bool_)) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise refuse(RoptimTypeError, place, name, allowed, told(value))
    if number < low:
        raise refuse(RoptimValueError, place, name, allowed, told(value))
    return number


def _loss(value: Any, name: str) -> float:
    value = settled(value)
    try:
        # float would read a text.
        if not isinstance(value, (str, bytes)):
            return float(value)
    except (TypeError, ValueError, OverflowError):
        pass
    raise refuse(RoptimTypeError, _TEST, name, "a number", _kind(value))


def _bases(opt: Optimizer) -> list[float]:
    """The learning rate of each group, from which ratios are taken."""
    bases: list[float] = []
    for i, group in enumerate(opt.param_groups):
        if "lr" not in group:
            raise refuse(RoptimKeyError, _TEST, f"group {i}", "one with 'lr'", "none")
        value = settled(group["lr"])
        remedy = "the test sets the learning rate itself: give the optimizer a number, without a schedule"
        if "lr" in opt._scheduled.get(i, {}):
            raise refuse(RoptimTypeError, _TEST, f"lr of group {i}", "a number", "a schedule", remedy)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise refuse(RoptimTypeError, _TEST, f"lr of group {i}", "a number", _kind(value), remedy)
        if not 0 <= value < math.inf:
            raise refuse(RoptimValueError, _TEST, f"lr of group {i}", "a finite number >= 0", told(value))
        if i and bases[0] == 0 and value != 0:
            remedy = "the others keep their ratio to it"
            raise refuse(RoptimValueError, _TEST, "lr of group 0", "> 0 or that of every group", "0", remedy)
        bases.append(float(value))
    return bases


def _rates(start: float, end: float, count: int, mode: str) -> list[float]:
    """Learning rates of the first group, from start to end, both exact."""
    if not end > start:
        raise refuse(RoptimValueError, _TEST, "end_lr", f"above start_lr = {start!r}", told(end))
    parts = [i / max(1, count - 1) for i in range(count)]
    if mode == "exp":
        # Not start · (end / start)^r: the quotient may overflow, and the end would be off by rounding.
        rates = [start ** (1 - r) * end**r for r in parts]
    else:
        rates = [(1 - r) * start + r * end for r in parts]
    if any(a >= b for a, b in itertools.pairwise(rates)):
        allowed = f"far enough above start_lr for {count} different rates"
        raise refuse(RoptimValueError, _TEST, "end_lr", allowed, f"{end!r} with start_lr = {start!r}")
    return rates


def _beginning(name: str, batches: Any) -> Callable[[], Iterator[Any]]:
    """A function that begins to go through the batches, each time it is called."""
    try:
        iter(batches)
    except TypeError:
        if not callable(batches):
            allowed = "an iterable, or a function that returns one"
            raise refuse(RoptimTypeError, _TEST, name, allowed, _kind(batches)) from None
    else:
        return lambda: iter(batches)

    def call() -> Iterator[Any]:
        made = batches()
        try:
            return iter(made)
        except TypeError:
            allowed = "a function that returns an iterable"
            raise refuse(RoptimTypeError, _TEST, name, allowed, f"one that returns {_kind(made)}") from None

    return call


def _endless(batches: Any) -> Iterator[Any]:
    """Batches, again and again; ends where they cannot be begun again."""
    begin = _beginning("batches", batches)

    def run() -> Iterator[Any]:
        empty = False
        while not empty:
            empty = True
            for batch in begin():
                empty = False
                yield batch

    return run()


# ---- means of gradients -------------------------------------------------------------------------------------


class _Sum:
    """The mean over so many batches of one parameter's gradient, as it comes in."""

    def __init__(self, n: int) -> None:
        self._n = n
        self.mean: Any = None

    def add(self, gradient: Any) -> None:
        """Adds the gradient of one batch; None is zero, and the mean of nothing else is None."""
        if gradient is None:
            return
        parts = _sparse.parts(gradient)
        # Divided before it is added, as the loss is in torch's loops, so that no sum overflows; in float32
        # where it is narrower. The first is a copy: the caller may use its array again for the next batch.
        if parts is not None:
            rows, values, shape = parts
            axes = shape[: len(shape) - values.ndim + 1]
            part: Any = SparseGrad(np.stack(np.unravel_index(rows, axes)), self._share(values), shape)
            if isinstance(self.mean, SparseGrad) and self.mean.indices.shape[:-1] == part.indices.shape[:-1]:
                indices = np.concatenate([self.mean.indices, part.indices], axis=-1)
                part = SparseGrad(indices, np.concatenate([self.mean.values, part.values]), part.shape)
            elif self.mean is not None:
                part = np.asarray(_dense(self.mean) + part.toarray())
        else:
            part = self._share(np.asarray(gradient))
            if self.mean is not None:
                part = np.asarray(_dense(self.mean) + part)
        self.mean = part

    def _share(self, array: _Array) -> _Array:
        # float16, and bfloat16, which NumPy does not know: its kind is "V".
        if array.dtype.itemsize == 2 and array.dtype.kind in "fV":
            array = array.astype(np.float32)
        # The divisor has the array's type, which NumPy 1 would widen where there are no axes.
        n = array.dtype.type(self._n) if array.dtype.kind in "fc" else self._n
        return np.asarray(array / n)


def _dense(gradient: Any) -> Any:
    return gradient.toarray() if isinstance(gradient, SparseGrad) else gradient


def _built(spec: _tree.Spec, leaves: Iterator[Any]) -> Any:
    """A container of the parameters' shape with these leaves."""
    if spec.kind == "leaf":
        return next(leaves)
    children = [_built(child, leaves) for child in spec.children]
    return children if spec.kind == "sequence" else dict(zip(spec.keys, children, strict=True))


# ---- everything as it was -----------------------------------------------------------------------------------

#: Where an object of these types stands in a container, the container keeps it.
_UNCHANGING = (type(None), bool, int, float, complex, str, bytes, np.generic, np.dtype, type)


def _refuse_unknown(value: Any) -> None:
    """Raises where ``also`` holds what cannot be put back."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            _refuse_unknown(item)
    elif not isinstance(
        value, (*_UNCHANGING, np.ndarray, Parameter, Optimizer, LRScheduler, AveragedModel, np.random.Generator)
    ):
        allowed = "arrays, Parameters, optimizers, schedulers, averages and generators in dicts and lists"
        raise refuse(RoptimTypeError, _PLACE, "also", allowed, _kind(value))


class _Memory:
    """What objects hold now, to be put back into the same objects, whoever else knows them."""

    def __init__(self) -> None:
        self._actions: list[tuple[str, Callable[[], None]]] = []
        # By id: the object, so that its id stays its own, and what stands for it.
        self._known: dict[int, tuple[Any, Any]] = {}
        self._done = False
        self.failures: list[Exception] = []

    def put_back(self) -> None:
        """Puts everything back. An interrupt meanwhile is kept until all is done; once it is, does nothing."""
        late = None
        while not self._done:
            try:
                failures: list[Exception] = []
                for what, action in self._actions:
                    try:
                        action()
                    except Exception as error:
                        got = f"{type(error).__name__}: {error}"
                        remedy = "restore parameters and state from a copy of your own"
                        failures.append(refuse(TornError, _TEST, what, "put back after the test", got, remedy))
                self.failures = failures
                self._done = True
            except KeyboardInterrupt as interrupt:
                late = interrupt
        if late is not None:
            raise late

    def keep(self, what: str, value: Any, copied: bool = False) -> Any:
        """Remembers an object with all that it holds, and returns what to put where it stands now: the object.

        With ``copied`` that is a copy of an object whose inside is unknown.
        """
        if isinstance(value, _UNCHANGING):
            return value
        if id(value) in self._known:
            return self._known[id(value)][1]
        self._known[id(value)] = (value, value)
        if isinstance(value, np.ndarray):
            if value.flags.writeable:
                self._keep_array(what, value)
        elif isinstance(value, Parameter):
            self._keep_parameter(what, value)
        elif isinstance(value, Optimizer):
            self._keep_optimizer(value)
        elif isinstance(value, LRScheduler):
            for member in value._tree():
                self.keep(what, vars(member), copied=True)
        elif isinstance(value, AveragedModel):
            self._keep_average(what, value)
        elif isinstance(value, SparseGrad):
            self.keep(what, vars(value))
        elif isinstance(value, np.random.Generator):
            self._keep_generator(what, value)
        elif isinstance(value, (tuple, FixedList)):
            for item in value:
                self.keep(what, item, copied)
        elif isinstance(value, (dict, list, deque, set)):
            self._keep_container(what, value, copied)
        elif copied:
            try:
                self._known[id(value)] = (value, copy.deepcopy(value))
            except Exception:
                # What cannot be copied stays where it is, as it is.
                return value
        return self._known[id(value)][1]

    def _keep_array(self, what: str, array: _Array) -> None:
        saved = np.array(array, copy=True)

        def back() -> None:
            _refill(array, saved)

        self._actions.append((what, back))

    def _keep_parameter(self, what: str, parameter: Parameter) -> None:
        saved, gradient = np.array(parameter.data, copy=True), parameter.grad
        self.keep(f"the gradient of {what}", gradient)

        def back() -> None:
            # All of the wrapped array is written, so what a device has, if it is still there, is not fetched first.
            _fits(parameter._array, saved)
            parameter._write(Ellipsis, saved)
            parameter.grad = gradient

        self._actions.append((what, back))

    def _keep_foreign(self, what: str, parameter: Any) -> None:
        """An array of another library, which may carry its gradient."""
        saved, gradient = np.array(view(parameter, _TEST, what, True)), getattr(parameter, "grad", None)
        of_gradient = None if gradient is None else np.array(view(gradient, _TEST, f"the gradient of {what}", True))

        def back() -> None:
            will_write([parameter])
            _refill(view(parameter, _TEST, what, True), saved)
            if has_gradient(parameter):
                parameter.grad = gradient
            if of_gradient is not None:
                _refill(view(gradient, _TEST, f"the gradient of {what}", True), of_gradient)

        self._actions.append((what, back))

    def _keep_average(self, what: str, average: AveragedModel) -> None:
        count = average.n_averaged
        self.keep(what, average._averages)
        self.keep(what, average._buffers)

        def back() -> None:
            average.n_averaged = count

        self._actions.append((what, back))

    def _keep_generator(self, what: str, generator: np.random.Generator) -> None:
        state = copy.deepcopy(generator.bit_generator.state)

        def back() -> None:
            generator.bit_generator.state = state

        self._actions.append((what, back))

    def _keep_container(self, what: str, value: Any, copied: bool) -> None:
        if isinstance(value, dict):
            saved: Any = {key: self.keep(what, item, copied) for key, item in value.items()}
        elif isinstance(value, set):
            saved = set(value)
        else:
            saved = [self.keep(what, item, copied) for item in value]

        def back() -> None:
            if isinstance(value, ParamGroup):
                # What was checked once is not checked again, and stands in its old order.
                dict.clear(value)
                dict.update(value, saved)
            elif isinstance(value, (dict, set)):
                value.clear()
                value.update(saved)
            else:
                value.clear()
                value.extend(saved)

        self._actions.append((what, back))

    def _keep_optimizer(self, opt: Optimizer) -> None:
        name = type(opt).__name__
        engine = opt._engine
        if engine is not None and engine.torn:
            remedy = "restore the parameters and call load_state_dict"
            raise refuse(TornError, _TEST, name, "whole", "an optimizer that an interrupted step left torn", remedy)
        objects, names = opt._state._objects, opt._state._names
        for i, (obj, label) in enumerate(zip(objects, names, strict=True)):
            label = label or getattr(obj, "name", None)
            what = f"parameter {i if label is None else repr(label)}"
            if isinstance(obj, (np.ndarray, Parameter)):
                self.keep(what, obj)
            else:
                self._keep_foreign(what, obj)
        if engine is not None:
            saved = engine.state_dict()
            self._actions.append((f"the state of {name}", lambda: engine.load(engine.prepare_load(saved))))
        own = opt._state._own

        def own_back() -> None:
            opt._state._own = own

        self._actions.append((f"the state of {name}", own_back))
        self.keep(f"the state of {name}", own, copied=True)
        for i, group in enumerate(opt.param_groups):
            # After the state, which brings the engine's own copy of the options.
            self.keep(f"group {i} of {name}", group)
        # Its flags, and what optimizers written in Python keep beside their state. The shapes of containers
        # belong to the groups, which nobody takes back.
        shapes = ("_specs", "_all")
        attributes = {
            key: self.keep(f"attribute {key} of {name}", value) for key, value in vars(opt).items() if key not in shapes
        }

        def attributes_back() -> None:
            for key in vars(opt).keys() - attributes.keys() - set(shapes):
                del vars(opt)[key]
            vars(opt).update(attributes)

        self._actions.append((f"the attributes of {name}", attributes_back))


def _refill(array: _Array, saved: _Array) -> None:
    _fits(array, saved)
    array[...] = saved


def _fits(array: _Array, saved: _Array) -> None:
    if array.shape != saved.shape or array.dtype != saved.dtype:
        raise ValueError(f"an array of shape {saved.shape} and {saved.dtype} became {array.shape} and {array.dtype}")


# ---- what a terminal shows ----------------------------------------------------------------------------------


class _Progress:
    """A bar of tqdm, a line without it, or nothing."""

    def __init__(self, total: int, wanted: bool) -> None:
        self._total = total
        self._count = 0
        self._bar: Any = None
        self._line = False
        if wanted and sys.stderr is not None and sys.stderr.isatty():
            try:
                self._bar = importlib.import_module("tqdm").tqdm(total=total, desc="range test", unit="step")
            except ImportError:
                self._line = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._line:
            print(file=sys.stderr)

    def tick(self, lr: float, loss: float) -> None:
        """Shows that one more iteration is done."""
        self._count += 1
        text = f"lr {lr:.2e}, loss {loss:.4g}"
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update()
        elif self._line:
            print(f"\rrange test: {self._count}/{self._total}, {text}   ", end="", file=sys.stderr, flush=True)
