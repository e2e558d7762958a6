"""Learning-rate schedulers with torch's names, arguments and values.

A scheduler changes ``"lr"`` in the groups of its optimizer, and some change momentum too. Building one performs the
transition to epoch 0, each ``step()`` the one to the next epoch; the updates between run with the values written
last. So with one ``step()`` after each update, update number ``t`` (from 0) uses the value of epoch ``t``.
Recursive schedulers change the value they find, so several on one optimizer multiply; ``ChainedScheduler`` steps
several with one call, ``SequentialLR`` one after the other.

To go on exactly, save and load the state of the optimizer (it holds the values in the groups) *and* of the
scheduler (it holds the epoch), in either order. A scheduler that is built on an optimizer whose loaded groups come
from a run with a scheduler leaves them as they are, with a warning where it would have changed them. Loaded then, it
goes on as if never interrupted. Stepped instead, it begins: its first ``step()`` makes up for the construction on the
values found, and goes to epoch 1. To begin at once, take ``"initial_lr"`` out of the groups before building.
"""

from __future__ import annotations

import contextlib
import math
import types
import warnings
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple
from weakref import WeakSet

import numpy as np

from roptim import _roptim
from roptim._errors import RoptimKeyError, RoptimRuntimeError, RoptimTypeError, RoptimValueError, refuse, told
from roptim._foreign import number_of
from roptim._groups import SCHEDULER_KEYS, settled
from roptim._values import flag
from roptim.optimizer import Optimizer

__all__ = [
    "ChainedScheduler",
    "ConstantLR",
    "CosineAnnealingLR",
    "CosineAnnealingWarmRestarts",
    "CyclicLR",
    "ExponentialLR",
    "LRScheduler",
    "LambdaLR",
    "LinearLR",
    "MultiStepLR",
    "MultiplicativeLR",
    "OneCycleLR",
    "PolynomialLR",
    "ReduceLROnPlateau",
    "SequentialLR",
    "StepLR",
]

#: What schedulers write into groups.
_WRITTEN = ("lr", "momentum", "betas", *sorted(SCHEDULER_KEYS))
#: Optimizers of which a construction that is held back was told, once for all schedulers.
_TOLD: WeakSet[Optimizer] = WeakSet()
#: What a class saves besides the numbers of ``_fields`` and has had in every version.
_LISTS = ("milestones",)
#: Entries of older torch states that mean nothing here.
_FORGOTTEN = frozenset({"verbose", "anneal_func", "_scale_fn_ref"})


#: What Python or NumPy would make numbers of.
_NO_NUMBERS = (bool, str, bytes, bytearray, np.bool_, np.timedelta64, np.ma.MaskedArray)


class _Range(NamedTuple):
    """Which numbers an argument may be."""

    low: float = -math.inf
    high: float = math.inf
    whole: bool = False
    without_low: bool = False
    without_high: bool = False

    def __str__(self) -> str:
        if self.whole:
            return f"a whole number >= {self.low:g}"
        if self.high < math.inf:
            return f"a number in {'[('[self.without_low]}{self.low:g}, {self.high:g}{'])'[self.without_high]}"
        if self.low > -math.inf:
            return f"a number {'>' if self.without_low else '>='} {self.low:g}"
        return "a finite number"

    def holds(self, x: float) -> bool:
        above = x > self.low if self.without_low else x >= self.low
        return above and (x < self.high if self.without_high else x <= self.high)

    def check(self, place: str, name: str, value: Any) -> Any:
        """The value as an int or float, or an error."""
        value = settled(value)
        if self.whole:
            # Whatever the value's own conversion raises, it is no number.
            with contextlib.suppress(Exception):
                is_number = not isinstance(value, _NO_NUMBERS)
                if is_number and int(value) == value and self.holds(value) and value < 2**63:
                    return int(value)
            raise refuse(RoptimValueError, place, name, str(self), told(value))
        try:
            number = None if isinstance(value, _NO_NUMBERS) else float(value)
        except OverflowError:
            number = math.inf
        except Exception:
            number = None
        if number is None:
            raise refuse(RoptimTypeError, place, name, str(self), told(value))
        if not math.isfinite(number) or not self.holds(number):
            raise refuse(RoptimValueError, place, name, str(self), told(value))
        return number


NUMBER = _Range()
COUNT = _Range(0, whole=True)
LENGTH = _Range(1, whole=True)
_EPOCH = _Range(-1, whole=True)
POSITIVE = _Range(0, without_low=True)
AT_LEAST_0 = _Range(0)
_SHARE = _Range(0, 1)
_SHARE_ABOVE_0 = _Range(0, 1, without_low=True)
_SHARE_BELOW_1 = _Range(0, 1, without_high=True)


def one_of(place: str, name: str, value: Any, choices: tuple[str, ...]) -> str:
    """The value if it is one of these words, else an error."""
    if isinstance(value, str) and value in choices:
        return value
    raise refuse(RoptimValueError, place, name, " or ".join(map(repr, choices)), told(value))


def per_group(place: str, name: str, value: Any, optimizer: Optimizer, allowed: _Range = NUMBER) -> list[float]:
    """A number for each group: one for all, or a list or tuple."""
    count = len(optimizer.param_groups)
    if not isinstance(value, (list, tuple)):
        return [allowed.check(place, name, value)] * count
    if len(value) != count:
        raise refuse(RoptimValueError, place, name, f"{count} numbers", str(len(value)))
    return [allowed.check(place, name, x) for x in value]


def _copied(value: Any) -> Any:
    """The same value in containers and arrays of its own, of types that :func:`roptim.save` takes."""
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        copies = [_copied(item) for item in value]
        return copies if isinstance(value, list) else tuple(copies)
    return value.copy() if isinstance(value, np.ndarray) else value


def _attributes(function: Any) -> dict[str, Any] | None:
    """What a callable object remembers; None for plain functions, which are code."""
    plain = function is None or isinstance(function, (types.FunctionType, types.BuiltinFunctionType, type))
    attributes = None if plain else getattr(function, "__dict__", None)
    return attributes if isinstance(attributes, dict) else None


def _put_back(groups: Sequence[Any], before: Sequence[dict[str, Any]]) -> None:
    """The groups as they were."""
    for group, old in zip(groups, before, strict=True):
        for key in [key for key in group if key not in old]:
            del group[key]
        group.update({key: value for key, value in old.items() if group.get(key) is not value})


class LRScheduler:
    """Base class of schedulers: a subclass defines :meth:`get_lr`.

    Constructing a scheduler performs its first transition (to epoch 0); each :meth:`step` performs the
    next one and writes ``"lr"`` into every group. ``"initial_lr"`` in a group is what the schedule starts
    from; a second scheduler on the same optimizer starts from the same.

    Parameters
    ----------
    optimizer : Optimizer
    last_epoch : int
        The last epoch done; -1 to begin. Any other value needs ``"initial_lr"`` in every group and is torch's
        old way to resume, where a class may apply the factor of that epoch again: prefer :meth:`load_state_dict`.

    Attributes
    ----------
    base_lrs : list of float
        What each group started from.
    last_epoch : int
        The epoch that runs now.

    Raises
    ------
    RoptimError
        If an argument is refused, here or by a group; nothing has changed then. The same holds for every step.

    Warns
    -----
    UserWarning
        If the first :meth:`step` comes before any step of the optimizer; if the construction's effect is held back
        because the groups were loaded (see the module).
    """

    #: Numbers the schedule consists of: checked at construction, when loaded, and when used.
    _fields: ClassVar[dict[str, _Range]] = {}
    #: Attributes that are functions, or lists of them: not saved, but for what callable objects remember.
    _functions: ClassVar[tuple[str, ...]] = ()
    #: What a state must have.
    _required: ClassVar[tuple[str, ...]] = ("last_epoch",)
    #: What no state has.
    _unsaved: ClassVar[frozenset[str]] = frozenset({"optimizer", "_pending", "_with_lr"})

    optimizer: Optimizer
    #: While the construction's effect is held back: what it wrote into each group besides the rate.
    _pending: list[dict[str, Any]] | None = None
    #: What get_lr wants written together with the rates.
    _with_lr: list[dict[str, Any]] | None = None

    def __init__(self, optimizer: Optimizer, last_epoch: int = -1) -> None:
        self._attach(optimizer)
        last_epoch = _EPOCH.check(type(self).__name__, "last_epoch", last_epoch)
        with self._all_or_nothing():
            before = [dict(group) for group in optimizer.param_groups]
            self._enter(last_epoch)
            self.base_lrs: list[float] = [float(group["initial_lr"]) for group in optimizer.param_groups]
            self.last_epoch = last_epoch
            self._initial_step()
            self._leave_as_loaded(before, last_epoch, 4)

    # ---- construction -----------------------------------------------------------------------------------

    def _attach(self, optimizer: Optimizer) -> None:
        if not isinstance(optimizer, Optimizer):
            got = f"an object of type {type(optimizer).__name__}"
            raise refuse(RoptimTypeError, type(self).__name__, "optimizer", "an Optimizer", got)
        self.optimizer = optimizer
        self._refuse_scheduled("lr")

    def _writes(self) -> tuple[str, ...]:
        """The hyperparameters that it writes."""
        return ("lr",)

    def _refuse_scheduled(self, name: str) -> None:
        """Refuses to write what a schedule writes."""
        for index, scheduled in self.optimizer._scheduled.items():
            if name in scheduled:
                remedy, what = "assign a number to it first", f"{name} of group {index}"
                raise refuse(RoptimValueError, type(self).__name__, what, "a number", "a schedule", remedy)

    def _set(self, **values: Any) -> None:
        """Takes over the numbers of :attr:`_fields`."""
        for name, value in values.items():
            setattr(self, name, self._fields[name].check(type(self).__name__, name, value))

    def _numbers(self) -> list[float]:
        """The numbers of :attr:`_fields`, checked because anybody may have assigned them."""
        return [allowed.check(type(self).__name__, name, getattr(self, name)) for name, allowed in self._fields.items()]

    def _enter(self, last_epoch: int) -> None:
        """Writes what the class keeps in groups."""
        for i, group in enumerate(self.optimizer.param_groups):
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

    def _initial_step(self) -> None:
        """The transition of the construction."""
        self._step_count = 0
        self._is_initial = True
        try:
            self.step()
        finally:
            self._is_initial = False

    def _undo(self) -> None:
        """Back before the construction's transition, but for the groups."""
        self.last_epoch -= 1

    # ---- construction on loaded groups ------------------------------------------------------------------

    def _leave_as_loaded(self, before: list[dict[str, Any]], last_epoch: int, stacklevel: int) -> None:
        """Holds back the effect of the construction where the groups are as loaded."""
        optimizer = self.optimizer
        if last_epoch != -1 or not optimizer._resumed:
            return
        if not any("initial_lr" in group for group in before):
            # The first scheduler these groups see: it begins, and so do those that follow.
            optimizer._resumed = False
            return
        groups = optimizer.param_groups
        written = [{key: group[key] for key in _WRITTEN if key in group} for group in groups]
        changed = [
            {key for key in new if key in old and old[key] != new[key]}
            for new, old in zip(written, before, strict=True)
        ]
        self._pending = [
            {key: value for key, value in new.items() if key != "lr" and (key in keys or key not in old)}
            for new, old, keys in zip(written, before, changed, strict=True)
        ]
        for group, old, keys in zip(groups, before, changed, strict=True):
            group.update({key: old[key] for key in keys})
        self._last_lr = [float(group["lr"]) for group in groups]
        differing = [key for key in ("lr", "momentum", "betas") if any(key in keys for keys in changed)]
        if differing and optimizer not in _TOLD:
            kept = " and ".join(f"{key} {[old.get(key) for old in before]}" for key in differing)
            given_up = " and ".join(f"{key} {[new.get(key) for new in written]}" for key in differing)
            warnings.warn(
                f"{type(self).__name__}: the groups keep {kept} as loaded, where a new schedule begins with "
                f"{given_up}; load the scheduler's state, too, or its first step() makes up for the beginning",
                UserWarning,
                stacklevel=stacklevel,
            )
            _TOLD.add(optimizer)

    def _replay(self) -> None:
        """Writes what was held back, but for the rate, which the next initial step computes."""
        pending, self._pending = self._pending, None
        vars(self).pop("_pending", None)
        # A group added meanwhile had no part in the construction.
        for group, values in zip(self.optimizer.param_groups, pending or (), strict=False):
            group.update(values)

    def _begin(self) -> None:
        """Makes up for what was held back."""
        self._replay()
        self._undo()
        self._initial_step()

    def _go_on(self) -> None:
        """What every step begins with, but the construction's."""
        for name in self._writes():
            self._refuse_scheduled(name)
        if self._pending is not None:
            self._begin()
        self.optimizer._resumed = False
        _TOLD.discard(self.optimizer)

    # ---- steps ------------------------------------------------------------------------------------------

    def _tree(self) -> Iterator[LRScheduler]:
        """This scheduler and those it consists of."""
        yield self

    @contextlib.contextmanager
    def _all_or_nothing(self, others: Sequence[LRScheduler] = ()) -> Iterator[None]:
        """Groups and schedulers are as before if the body raises."""
        members = [member for root in (self, *others) for member in root._tree()]
        memory = [dict(vars(member)) for member in members]
        groups = list(self.optimizer.param_groups)
        before = [dict(group) for group in groups]
        try:
            yield
        except BaseException:
            for member, attributes in zip(members, memory, strict=True):
                vars(member).clear()
                vars(member).update(attributes)
            _put_back(groups, before)
            raise

    def get_lr(self) -> list[float]:
        """The value of each group for ``self.last_epoch``. To be defined by subclasses, called by step."""
        raise NotImplementedError(f"{type(self).__name__} must define get_lr")

    def get_last_lr(self) -> list[float]:
        """The values that the last :meth:`step` wrote, one per group."""
        return list(self._last_lr)

    def _warn_outside_step(self) -> None:
        if not self._get_lr_called_within_step:
            warnings.warn(
                "get_lr computes the next value of the recursion; use get_last_lr for the current one",
                UserWarning,
                stacklevel=3,
            )

    def _one_per_group(self, name: str, count: int) -> None:
        groups = len(self.optimizer.param_groups)
        if count != groups:
            got = f"{count} for {groups} groups"
            remedy = "add groups before the scheduler" if count < groups else None
            raise refuse(RoptimValueError, f"{type(self).__name__}.step", name, "one per group", got, remedy)

    def step(self, epoch: int | None = None) -> None:
        """Goes to the next epoch and writes each group's ``"lr"``.

        Parameters
        ----------
        epoch : int, optional
            Go to this epoch instead, by the closed form where there is one. Deprecated, as in torch.
        """
        with self._all_or_nothing():
            if not self._is_initial:
                self._go_on()
            if self._step_count == 1 and not self.optimizer._step_called:
                warnings.warn(
                    "lr_scheduler.step() was called before optimizer.step(): the first value of the schedule "
                    "is skipped",
                    UserWarning,
                    stacklevel=2,
                )
            self._step_count += 1
            if epoch is not None:
                warnings.warn("the epoch argument of step is deprecated", UserWarning, stacklevel=2)
                epoch = self._epoch(epoch)
            self._update_lr(epoch)

    def _epoch(self, epoch: Any) -> Any:
        epoch = settled(epoch)
        if isinstance(epoch, bool) or not isinstance(epoch, (int, float)) or not math.isfinite(epoch):
            raise refuse(RoptimTypeError, f"{type(self).__name__}.step", "epoch", "a number", told(epoch))
        return epoch

    def _update_lr(self, epoch: int | None = None) -> None:
        """Goes to the next epoch by recursion, or to this one by the closed form where there is one."""
        self._get_lr_called_within_step = True
        try:
            if epoch is None:
                self.last_epoch += 1
                values = self.get_lr()
            else:
                self.last_epoch = epoch
                closed = getattr(self, "_get_closed_form_lr", None)
                values = closed() if closed is not None else self.get_lr()
            self._write(values)
        finally:
            self._get_lr_called_within_step = False

    def _write(self, values: Sequence[float]) -> None:
        groups = self.optimizer.param_groups
        self._one_per_group("values", len(values))
        others = self._with_lr if self._with_lr is not None else [{} for _ in groups]
        vars(self).pop("_with_lr", None)
        for group, value, more in zip(groups, values, others, strict=True):
            group.update({"lr": value, **more})
        self._last_lr = [float(group["lr"]) for group in groups]

    def _check_milestone(self, place: str) -> None:
        """Refuses what cannot be begun at a milestone."""

    # ---- state ------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """A copy of everything but the optimizer, in torch's layout; functions are not saved.

        Of a callable object what it remembers (its ``__dict__``) is saved, None stands for a plain function.
        """
        state = {
            key: _copied(value)
            for key, value in vars(self).items()
            if key not in self._unsaved and key not in self._functions
        }
        for key in self._functions:
            value = getattr(self, key)
            many = isinstance(value, list)
            saved = [_copied(_attributes(function)) for function in (value if many else [value])]
            state[key] = saved if many else saved[0]
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up a saved state, torch's own too. The optimizer's state holds the current ``"lr"``: load it, too.

        Raises
        ------
        RoptimError
            If an entry is missing or of the wrong type or range; nothing has changed then.
        """
        self._take(self._checked(state_dict, f"{type(self).__name__}.load_state_dict"))

    def _choices(self) -> dict[str, tuple[Any, ...]]:
        """Attributes that are one of these."""
        return {}

    def _checked(self, state_dict: Any, place: str) -> dict[str, Any]:
        """What to take up of a saved state."""
        if not isinstance(state_dict, dict):
            got = f"an object of type {type(state_dict).__name__}"
            raise refuse(RoptimTypeError, place, "state_dict", "a dict", got)
        for key in self._required:
            if key not in state_dict:
                got = str(sorted(map(str, state_dict)))
                raise refuse(RoptimKeyError, place, "state_dict", f"a dict with {key!r}", got)
        known = vars(self)
        self._refuse_other_class(state_dict, place)
        changes: dict[str, Any] = {}
        for key, value in state_dict.items():
            if key in self._unsaved or key in _FORGOTTEN:
                continue
            if not isinstance(key, str) or hasattr(type(self), key):
                raise refuse(RoptimKeyError, place, "key", "of the scheduler's state", told(key))
            if key in self._functions:
                changes[key] = _checked_functions(place, key, known[key], value)
            elif key in self._fields:
                number = self._fields[key].check(place, key, value)
                # A whole number stays one, so that a resumed run has the bits of one that never stopped.
                changes[key] = value if type(value) is int else number
            else:
                changes[key] = _alike(place, key, known.get(key), value)
        for key, choices in self._choices().items():
            if key in changes and changes[key] not in choices:
                raise refuse(RoptimValueError, place, key, " or ".join(map(repr, choices)), told(changes[key]))
        return changes

    def _refuse_other_class(self, state_dict: dict[str, Any], place: str) -> None:
        """Refuses a state that has not what this class has, or what only others have."""
        cls = type(self)
        if cls.__module__ != __name__:
            return
        # What every version of the class has had; other attributes came with some version of torch.
        own = (*cls._fields, *_LISTS)
        lacking = [key for key in own if key in vars(self) and key not in state_dict]
        foreign = [key for key in state_dict if key in _ALL_FIELDS and key not in vars(self)]
        if lacking or foreign:
            got = f"a state without {lacking[0]!r}" if lacking else f"a state with {foreign[0]!r}"
            raise refuse(RoptimValueError, place, "state_dict", f"of {cls.__name__}", got)

    def _take(self, changes: dict[str, Any]) -> None:
        """Takes up what was checked."""
        vars(self).pop("_pending", None)
        for key, value in changes.items():
            if key not in self._functions:
                setattr(self, key, value)
                continue
            mine = getattr(self, key)
            pairs = zip(mine, value, strict=True) if isinstance(mine, list) else [(mine, value)]
            for function, attributes in pairs:
                if attributes is not None:
                    vars(function).update(attributes)


#: The name in code older than torch 2.0.
_LRScheduler = LRScheduler


def _checked_functions(place: str, key: str, mine: Any, saved: Any) -> Any:
    """What callable objects remembered, if these functions are of the kind that can."""
    many = isinstance(mine, list)
    functions, entries = (mine, saved) if many else ([mine], [saved])
    if not isinstance(entries, (list, tuple)) or len(entries) != len(functions):
        raise refuse(RoptimValueError, place, key, f"a list of {len(functions)}", told(saved))
    for function, entry in zip(functions, entries, strict=True):
        if entry is not None and not isinstance(entry, Mapping):
            got = f"an object of type {type(entry).__name__}"
            raise refuse(RoptimTypeError, place, key, "None or a dict per function", got)
        if entry and _attributes(function) is None:
            got = "what a callable object remembered"
            raise refuse(RoptimValueError, place, key, "None for a function without attributes", got)
    copies = [_copied(entry) or None for entry in entries]
    return copies if many else copies[0]


def _alike(place: str, key: str, mine: Any, value: Any) -> Any:
    """A copy of a saved value, if it is of the type of the present one."""
    if not isinstance(mine, np.ndarray):
        value = settled(value)
    if isinstance(mine, list) and isinstance(value, (list, tuple)):
        return [_alike(place, key, mine[0] if mine else None, item) for item in value]
    if isinstance(mine, Counter) and isinstance(value, Mapping):
        return Counter(value)
    numbers = (int, float)
    alike = type(value) is type(mine) or (isinstance(value, numbers) and isinstance(mine, numbers))
    either_absent = mine is None or (value is None and isinstance(mine, numbers))
    if not alike and not either_absent:
        want, got = type(mine).__name__, f"an object of type {type(value).__name__}"
        raise refuse(RoptimTypeError, place, key, f"of type {want}", got)
    return _copied(value)


# ---- functions of the epoch ---------------------------------------------------------------------------------


def _one_function_per_group(place: str, functions: Any, optimizer: Any) -> list[Callable[[int], float]]:
    count = len(getattr(optimizer, "param_groups", ()))
    if not isinstance(functions, (list, tuple)):
        functions = [functions] * count
    elif len(functions) != count and isinstance(optimizer, Optimizer):
        raise refuse(RoptimValueError, place, "lr_lambda", f"{count} functions", str(len(functions)))
    for function in functions:
        if not callable(function):
            got = f"an object of type {type(function).__name__}"
            raise refuse(RoptimTypeError, place, "lr_lambda", "a function or one per group", got)
    return list(functions)


class _FunctionPerGroup(LRScheduler):
    """A function of the epoch for each group."""

    _functions = ("lr_lambdas",)

    def __init__(
        self,
        optimizer: Optimizer,
        lr_lambda: Callable[[int], float] | Sequence[Callable[[int], float]],
        last_epoch: int = -1,
    ) -> None:
        self.lr_lambdas = _one_function_per_group(type(self).__name__, lr_lambda, optimizer)
        super().__init__(optimizer, last_epoch)


class LambdaLR(_FunctionPerGroup):
    r"""The initial learning rate times a function of the epoch.

    .. math:: lr_e = lr_0 \cdot f(e)

    lr at epochs 0, 1, 2 from 0.1 with ``lambda e: 0.5**e``: 0.1, 0.05, 0.025.

    Parameters
    ----------
    optimizer : Optimizer
    lr_lambda : callable or list of callable
        ``f(epoch) -> factor``, for all groups or one per group. Of a callable object what it remembers (its
        ``__dict__``) is saved with the scheduler; functions are not saved.
    last_epoch : int
        The last epoch done; -1 to begin.

    A group that is added later has no initial rate: the next step is a ValueError.
    """

    def get_lr(self) -> list[float]:
        self._warn_outside_step()
        self._one_per_group("base_lrs", len(self.base_lrs))
        return [base * f(self.last_epoch) for f, base in zip(self.lr_lambdas, self.base_lrs, strict=True)]


class MultiplicativeLR(_FunctionPerGroup):
    r"""The learning rate of the epoch before times a function of the epoch.

    .. math:: lr_e = lr_{e-1} \cdot f(e), \quad e \ge 1

    lr at epochs 0, 1, 2 from 0.1 with ``lambda e: 0.5``: 0.1, 0.05, 0.025.

    Parameters
    ----------
    optimizer : Optimizer
    lr_lambda : callable or list of callable
        ``f(epoch) -> factor``, for all groups or one per group; saved as those of :class:`LambdaLR`.
    last_epoch : int
        The last epoch done; -1 to begin.

    As in torch, where :class:`SequentialLR` begins it at a milestone, it goes on from the rate that the
    scheduler before left, times ``f(0)``. A group that is added later has no function: the next step is a
    ValueError.
    """

    def get_lr(self) -> list[float]:
        self._warn_outside_step()
        groups = self.optimizer.param_groups
        if self._is_initial:
            return [float(group["lr"]) for group in groups]
        self._one_per_group("lr_lambdas", len(self.lr_lambdas))
        return [float(group["lr"]) * f(self.last_epoch) for f, group in zip(self.lr_lambdas, groups, strict=True)]


# ---- recursions of the engine -------------------------------------------------------------------------------


class _Chain(LRScheduler):
    """A schedule with a recursion and a closed form in the engine, of the name of the class."""

    _chain: ClassVar[str]

    def _chain_numbers(self) -> list[float]:
        return self._numbers()

    def _check_bases(self) -> None:
        """Refuses groups without an initial rate where the next transition needs it."""

    def get_lr(self) -> list[float]:
        self._warn_outside_step()
        self._check_bases()
        currents = [float(group["lr"]) for group in self.optimizer.param_groups]
        # Groups that were added later have none; where a class looks at them, it has checked.
        bases = self.base_lrs if len(self.base_lrs) == len(currents) else currents
        values = list(zip(currents, bases, strict=True))
        return _roptim.chain_next(self._chain, self._chain_numbers(), values, self.last_epoch, self._is_initial)

    def _get_closed_form_lr(self) -> list[float]:
        return _roptim.chain_closed(self._chain, self._chain_numbers(), self.base_lrs, self.last_epoch)


class StepLR(_Chain):
    r"""Decays the learning rate by a factor every few epochs.

    .. math:: lr_e = lr_0 \cdot gamma^{\lfloor e / step\_size \rfloor}

    lr at epochs 0, 1, 2 from 0.1 with ``step_size=2``: 0.1, 0.1, 0.01.

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
    _fields = {"step_size": LENGTH, "gamma": NUMBER}
    step_size: int
    gamma: float

    def __init__(self, optimizer: Optimizer, step_size: int, gamma: float = 0.1, last_epoch: int = -1) -> None:
        self._set(step_size=step_size, gamma=gamma)
        super().__init__(optimizer, last_epoch)


class MultiStepLR(_Chain):
    r"""Decays the learning rate by a factor at given epochs.

    .. math:: lr_e = lr_0 \cdot gamma^{|\{m \in milestones: m \le e\}|}

    lr at epochs 0, 1, 2 from 0.1 with ``milestones=[1, 2]``: 0.1, 0.01, 0.001.

    Parameters
    ----------
    optimizer : Optimizer
    milestones : iterable of int
        Epochs of the decays, >= 0, in any order; one that is given twice decays twice.
    gamma : float
        Factor of each decay.
    last_epoch : int
        The last epoch done; -1 to begin.
    """

    _chain = "MultiStepLR"
    _fields = {"gamma": NUMBER}
    gamma: float

    def __init__(
        self, optimizer: Optimizer, milestones: Iterable[int], gamma: float = 0.1, last_epoch: int = -1
    ) -> None:
        place = type(self).__name__
        is_number = isinstance(milestones, np.ndarray) and milestones.ndim == 0
        if is_number or not isinstance(milestones, Iterable) or isinstance(milestones, (*_NO_NUMBERS, Mapping)):
            raise refuse(RoptimTypeError, place, "milestones", "a list of whole numbers", told(milestones))
        self.milestones: Counter[int] = Counter(COUNT.check(place, "milestones", m) for m in milestones)
        self._set(gamma=gamma)
        super().__init__(optimizer, last_epoch)

    def _chain_numbers(self) -> list[float]:
        passed = bisect_right(sorted(self.milestones.elements()), self.last_epoch)
        return [*self._numbers(), self.milestones[self.last_epoch], passed]

    def _checked(self, state_dict: Any, place: str) -> dict[str, Any]:
        changes = super()._checked(state_dict, place)
        if "milestones" in changes:
            # Keys are text in JSON.
            counts = {int(m) if str(m).isdigit() else m: n for m, n in changes["milestones"].items()}
            checked = {COUNT.check(place, "milestones", m): COUNT.check(place, "milestones", counts[m]) for m in counts}
            changes["milestones"] = Counter(checked)
        return changes


class ConstantLR(_Chain):
    r"""The learning rate times a factor until an epoch, then the learning rate itself.

    .. math:: lr_e = lr_0 \cdot factor \ \text{for}\ e < total\_iters, \quad lr_0 \ \text{from there on}

    lr at epochs 0, 1, 2 from 0.1 with ``factor=0.5, total_iters=2``: 0.05, 0.05, 0.1.

    Parameters
    ----------
    optimizer : Optimizer
    factor : float
        In (0, 1]. By recursion the end divides by it, so it cannot be 0.
    total_iters : int
        Epochs of the factor, >= 0. As in torch, 0 epochs never end.
    last_epoch : int
        The last epoch done; -1 to begin.
    """

    _chain = "ConstantLR"
    _fields = {"factor": _SHARE_ABOVE_0, "total_iters": COUNT}
    factor: float
    total_iters: int

    def __init__(
        self, optimizer: Optimizer, factor: float = 1.0 / 3, total_iters: int = 5, last_epoch: int = -1
    ) -> None:
        self._set(factor=factor, total_iters=total_iters)
        super().__init__(optimizer, last_epoch)


class _Finite(_Chain):
    """A schedule whose closed form divides by its length."""

    total_iters: int

    def _check_milestone(self, place: str) -> None:
        if self.total_iters == 0:
            allowed = f"a whole number >= 1 where {type(self).__name__} begins by its closed form"
            raise refuse(RoptimValueError, place, "total_iters", allowed, "0")

    def _get_closed_form_lr(self) -> list[float]:
        self._check_milestone(f"{type(self).__name__}.step")
        return super()._get_closed_form_lr()


class LinearLR(_Finite):
    r"""The learning rate times a factor that goes along a line: a warmup.

    .. math:: lr_e = lr_0 \left(start + (end - start) \frac{\min(e, total\_iters)}{total\_iters}\right)

    lr at epochs 0, 1, 2 from 0.1 with ``start_factor=0.5, total_iters=2``: 0.05, 0.075, 0.1.

    Parameters
    ----------
    optimizer : Optimizer
    start_factor : float
        Factor of epoch 0, in (0, 1].
    end_factor : float
        Factor from epoch ``total_iters`` on, in [0, 1].
    total_iters : int
        Epochs from one to the other, >= 0. As in torch, with 0 epochs the factor stays ``start_factor``, and
        such a schedule has no closed form.
    last_epoch : int
        The last epoch done; -1 to begin.
    """

    _chain = "LinearLR"
    _fields = {"start_factor": _SHARE_ABOVE_0, "end_factor": _SHARE, "total_iters": COUNT}
    start_factor: float
    end_factor: float

    def __init__(
        self,
        optimizer: Optimizer,
        start_factor: float = 1.0 / 3,
        end_factor: float = 1.0,
        total_iters: int = 5,
        last_epoch: int = -1,
    ) -> None:
        self._set(start_factor=start_factor, end_factor=end_factor, total_iters=total_iters)
        super().__init__(optimizer, last_epoch)


class ExponentialLR(_Chain):
    r"""Decays the learning rate by a factor every epoch.

    .. math:: lr_e = lr_0 \cdot gamma^e

    lr at epochs 0, 1, 2 from 0.1 with ``gamma=0.5``: 0.1, 0.05, 0.025.

    Parameters
    ----------
    optimizer : Optimizer
    gamma : float
        Factor of each decay.
    last_epoch : int
        The last epoch done; -1 to begin.
    """

    _chain = "ExponentialLR"
    _fields = {"gamma": NUMBER}
    gamma: float

    def __init__(self, optimizer: Optimizer, gamma: float, last_epoch: int = -1) -> None:
        self._set(gamma=gamma)
        super().__init__(optimizer, last_epoch)


class PolynomialLR(_Finite):
    r"""Decays the learning rate to 0 along a power of what is left.

    .. math:: lr_e = lr_0 \left(1 - \frac{\min(e, total\_iters)}{total\_iters}\right)^{power}

    lr at epochs 0, 1, 2 from 0.1 with ``total_iters=2``: 0.1, 0.05, 0.0.

    Parameters
    ----------
    optimizer : Optimizer
    total_iters : int
        Epochs of the decay, >= 0. With 0 epochs nothing changes, and there is no closed form.
    power : float
        >= 0.
    last_epoch : int
        The last epoch done; -1 to begin.
    """

    _chain = "PolynomialLR"
    _fields = {"total_iters": COUNT, "power": AT_LEAST_0}
    power: float

    def __init__(self, optimizer: Optimizer, total_iters: int = 5, power: float = 1.0, last_epoch: int = -1) -> None:
        self._set(total_iters=total_iters, power=power)
        super().__init__(optimizer, last_epoch)


class CosineAnnealingLR(_Chain):
    r"""Anneals the learning rate along half a cosine; past ``T_max`` it rises again, as torch's does.

    .. math:: lr_e = \eta_{min} + (lr_0 - \eta_{min}) \frac{1 + \cos(\pi e / T_{max})}{2}

    lr at epochs 0, 1, 2 from 0.1 with ``T_max=2``: 0.1, 0.05, 0.0.

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

    As in torch, a group that is added later is annealed too, until the epoch after the bottom, which needs its
    initial rate: that step is a ValueError.
    """

    _chain = "CosineAnnealingLR"
    _fields = {"T_max": LENGTH, "eta_min": NUMBER}
    T_max: int
    eta_min: float

    def __init__(self, optimizer: Optimizer, T_max: int, eta_min: float = 0.0, last_epoch: int = -1) -> None:
        self._set(T_max=T_max, eta_min=eta_min)
        super().__init__(optimizer, last_epoch)

    def _check_bases(self) -> None:
        T_max, _ = self._numbers()
        if not self._is_initial and (self.last_epoch - 1 - T_max) % (2 * T_max) == 0:
            self._one_per_group("base_lrs", len(self.base_lrs))


class CosineAnnealingWarmRestarts(LRScheduler):
    r"""Anneals the learning rate along half a cosine, again and again, each time ``T_mult`` times as long.

    .. math:: lr = \eta_{min} + (lr_0 - \eta_{min}) \frac{1 + \cos(\pi T_{cur} / T_i)}{2}

    :math:`T_{cur}` epochs since the last restart, :math:`T_i` of this run, at first ``T_0``.

    lr at epochs 0, 1, 2 from 0.1 with ``T_0=2``: 0.1, 0.05, 0.1.

    Source: Loshchilov, Hutter, *SGDR: stochastic gradient descent with warm restarts*, ICLR 2017.

    Parameters
    ----------
    optimizer : Optimizer
    T_0 : int
        Epochs of the first run, >= 1.
    T_mult : int
        Factor of the length from run to run, >= 1.
    eta_min : float
        The lowest value, which is approached, and left out at a restart.
    last_epoch : int
        The last epoch done; -1 to begin.

    As in torch it does not count its steps: ``_step_count`` stays 0, and nothing warns if the first step comes
    before the optimizer's. A group that is added later has no initial rate: the next step is a ValueError.
    """

    _fields = {"T_0": LENGTH, "T_i": LENGTH, "T_mult": LENGTH, "eta_min": NUMBER, "T_cur": _Range(-1)}
    T_0: int
    T_i: int
    T_mult: int
    eta_min: float
    T_cur: float

    def __init__(
        self, optimizer: Optimizer, T_0: int, T_mult: int = 1, eta_min: float = 0.0, last_epoch: int = -1
    ) -> None:
        self._set(T_0=T_0, T_i=T_0, T_mult=T_mult, eta_min=eta_min)
        self.T_cur = last_epoch
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float]:
        self._warn_outside_step()
        self._one_per_group("base_lrs", len(self.base_lrs))
        _, T_i, _, eta_min, T_cur = self._numbers()
        return [_roptim.half_cosine(base, eta_min, T_cur, T_i) for base in self.base_lrs]

    def step(self, epoch: float | None = None) -> None:
        """Goes to the next epoch and writes each group's ``"lr"``.

        Parameters
        ----------
        epoch : float, optional
            Go to this epoch instead, >= 0, between whole ones too; the next call without an argument goes one
            epoch further.
        """
        with self._all_or_nothing():
            if not self._is_initial:
                self._go_on()
            self._move(0 if epoch is None and self.last_epoch < 0 else epoch)
            self._get_lr_called_within_step = True
            try:
                self._write(self.get_lr())
            finally:
                self._get_lr_called_within_step = False

    def _move(self, epoch: float | None) -> None:
        if epoch is None:
            epoch = self.last_epoch + 1
            self.T_cur += 1
            if self.T_cur >= self.T_i:
                self.T_cur %= self.T_i
                self.T_i *= self.T_mult
        else:
            epoch = self._epoch(epoch)
            if epoch < 0:
                raise refuse(RoptimValueError, f"{type(self).__name__}.step", "epoch", "a number >= 0", told(epoch))
            self.T_i, self.T_cur = self.T_0, epoch
            if epoch >= self.T_0 and self.T_mult == 1:
                self.T_cur = epoch % self.T_0
            elif epoch >= self.T_0:
                runs = int(math.log(epoch / self.T_0 * (self.T_mult - 1) + 1, self.T_mult))
                self.T_cur = epoch - self.T_0 * (self.T_mult**runs - 1) / (self.T_mult - 1)
                self.T_i = self.T_0 * self.T_mult**runs
        self.last_epoch = math.floor(epoch)


# ---- cycles -------------------------------------------------------------------------------------------------


class _Cycle(LRScheduler):
    """A schedule that may move momentum, or the first beta, against the learning rate."""

    cycle_momentum: bool
    use_beta1: bool
    #: Attributes that a schedule with cycle_momentum has.
    _of_momentum: ClassVar[tuple[str, ...]] = ("use_beta1",)

    def _find_momentum(self, optimizer: Optimizer) -> None:
        if "momentum" not in optimizer.defaults and "betas" not in optimizer.defaults:
            allowed = "False for an optimizer without momentum or betas"
            raise refuse(RoptimValueError, type(self).__name__, "cycle_momentum", allowed, "True")
        self.use_beta1 = "betas" in optimizer.defaults
        self._refuse_scheduled("betas" if self.use_beta1 else "momentum")

    def _writes(self) -> tuple[str, ...]:
        return ("lr", "betas" if self.use_beta1 else "momentum") if self.cycle_momentum else ("lr",)

    def _momentum(self, group: Mapping[str, Any], value: float) -> dict[str, Any]:
        return {"betas": (value, *group["betas"][1:])} if self.use_beta1 else {"momentum": value}

    def _enter_momentum(self, base: Sequence[float], highest: Sequence[float]) -> None:
        for group, low, high in zip(self.optimizer.param_groups, base, highest, strict=True):
            group.update({**self._momentum(group, high), "max_momentum": high, "base_momentum": low})

    def _choices(self) -> dict[str, tuple[Any, ...]]:
        return {"cycle_momentum": (False, True), "use_beta1": ("betas" in self.optimizer.defaults,)}

    def _checked(self, state_dict: Any, place: str) -> dict[str, Any]:
        changes = super()._checked(state_dict, place)
        if changes.get("cycle_momentum", self.cycle_momentum):
            for name in self._of_momentum:
                if name not in changes and name not in vars(self):
                    got = str(sorted(changes))
                    raise refuse(RoptimKeyError, place, "state_dict", f"a dict with {name!r} for cycle_momentum", got)
        return changes


class CyclicLR(_Cycle):
    r"""Moves the learning rate along triangles between two bounds, and momentum against it.

    .. math:: lr_e = base + (max - base) \cdot h_e \cdot s

    :math:`h` rises from 0 to 1 in ``step_size_up`` steps and falls to 0 in ``step_size_down``. The scale :math:`s`
    is 1 (``"triangular"``), :math:`2^{1-c}` in cycle :math:`c = 1, 2, ...` (``"triangular2"``), :math:`gamma^e`
    (``"exp_range"``), or ``scale_fn``. Momentum is :math:`max_m - (max_m - base_m) \cdot h_e \cdot s`.

    lr at steps 0, 1, 2 with ``base_lr=0.1, max_lr=0.5, step_size_up=2``: 0.1, 0.3, 0.5.

    Source: Smith, *Cyclical learning rates for training neural networks*, WACV 2017.

    Parameters
    ----------
    optimizer : Optimizer
    base_lr, max_lr : float or list of float
        The bounds, for all groups or one per group. The optimizer's own rate is not used.
    step_size_up : int
        Steps (usually batches) of the rising half, > 0.
    step_size_down : int, optional
        Steps of the falling half, >= 0; as many as of the rising one if not given.
    mode : {"triangular", "triangular2", "exp_range"}
        The scale, if ``scale_fn`` is not given.
    gamma : float
        Of mode ``"exp_range"``.
    scale_fn : callable, optional
        The scale as a function of what ``scale_mode`` says; saved as those of :class:`LambdaLR`.
    scale_mode : {"cycle", "iterations"}
        Whether ``scale_fn`` takes the number of the cycle, from 1, or that of the step, from 0.
    cycle_momentum : bool
        Whether momentum, or the first of ``betas``, is moved. As in torch this turns on the momentum of an SGD
        built without.
    base_momentum, max_momentum : float or list of float
        The bounds of momentum.
    last_epoch : int
        The last step done; -1 to begin.

    A group that is added later has no bounds: the next step is a ValueError.
    """

    _MODES = ("triangular", "triangular2", "exp_range")
    _fields = {"total_size": POSITIVE, "step_ratio": _SHARE_ABOVE_0, "gamma": NUMBER}
    _functions = ("_scale_fn_custom",)
    _of_momentum = ("use_beta1", "base_momentums", "max_momentums")
    total_size: float
    step_ratio: float
    gamma: float

    def __init__(
        self,
        optimizer: Optimizer,
        base_lr: float | Sequence[float],
        max_lr: float | Sequence[float],
        step_size_up: int = 2000,
        step_size_down: int | None = None,
        mode: str = "triangular",
        gamma: float = 1.0,
        scale_fn: Callable[[float], float] | None = None,
        scale_mode: str = "cycle",
        cycle_momentum: bool = True,
        base_momentum: float | Sequence[float] = 0.8,
        max_momentum: float | Sequence[float] = 0.9,
        last_epoch: int = -1,
    ) -> None:
        place = type(self).__name__
        self._attach(optimizer)
        base_lrs = per_group(place, "base_lr", base_lr, optimizer)
        self.max_lrs = per_group(place, "max_lr", max_lr, optimizer)
        up = POSITIVE.check(place, "step_size_up", step_size_up)
        down = up if step_size_down is None else AT_LEAST_0.check(place, "step_size_down", step_size_down)
        self._set(total_size=up + down, step_ratio=up / (up + down))
        one_of(place, "scale_mode", scale_mode, ("cycle", "iterations"))
        if scale_fn is None:
            one_of(place, "mode", mode, self._MODES)
            scale_mode = "iterations" if mode == "exp_range" else "cycle"
        elif not callable(scale_fn):
            raise refuse(RoptimTypeError, place, "scale_fn", "a function", told(scale_fn))
        self.mode = mode
        self._set(gamma=gamma)
        self.scale_mode = one_of(place, "scale_mode", scale_mode, ("cycle", "iterations"))
        self.cycle_momentum = flag(place, "cycle_momentum", cycle_momentum)
        if self.cycle_momentum:
            self._find_momentum(optimizer)
            self.base_momentums = per_group(place, "base_momentum", base_momentum, optimizer)
            self.max_momentums = per_group(place, "max_momentum", max_momentum, optimizer)
        self._scale_fn_custom = scale_fn
        self._first = base_lrs
        super().__init__(optimizer, last_epoch)
        # As in torch, the first transition starts from "initial_lr", which another scheduler may have set.
        self.base_lrs = vars(self).pop("_first")

    def _enter(self, last_epoch: int) -> None:
        if last_epoch == -1:
            for group, base in zip(self.optimizer.param_groups, self._first, strict=True):
                group["lr"] = base
            if self.cycle_momentum:
                self._enter_momentum(self.base_momentums, self.max_momentums)
        super()._enter(last_epoch)

    def _choices(self) -> dict[str, tuple[Any, ...]]:
        choices = {**super()._choices(), "scale_mode": ("cycle", "iterations")}
        return choices if self._scale_fn_custom is not None else {**choices, "mode": self._MODES}

    def get_lr(self) -> list[float]:
        self._warn_outside_step()
        self._one_per_group("base_lrs", len(self.base_lrs))
        total, ratio, gamma = self._numbers()
        # With time in cycles the engine's triangle has torch's bits, whose state holds no more than the ratio.
        cycle, height = _roptim.triangle(self.last_epoch / total, ratio, 1.0 - ratio)
        if self._scale_fn_custom is None:
            scale = _roptim.cycle_scale(self.mode, self.last_epoch, cycle, gamma)
        else:
            scale = self._scale_fn_custom(int(cycle) if self.scale_mode == "cycle" else self.last_epoch)
        if self.cycle_momentum:
            bounds = zip(self.optimizer.param_groups, self.base_momentums, self.max_momentums, strict=True)
            self._with_lr = [self._momentum(group, m - (m - base) * height * scale) for group, base, m in bounds]
        return [base + (m - base) * height * scale for base, m in zip(self.base_lrs, self.max_lrs, strict=True)]


def _annealed(strategy: str, start: float, end: float, part: float) -> float:
    """The value at a part of the way: of a cycle whose first phase is one step long."""
    return _roptim.one_cycle(part, 2.0, 1.0, strategy, [start, end, end])


class OneCycleLR(_Cycle):
    r"""One rise to a high learning rate and a long way down, and momentum against it.

    With :math:`T` steps in all: from ``max_lr / div_factor`` up to ``max_lr`` at step ``pct_start * T - 1``, then
    down to ``max_lr / div_factor / final_div_factor`` at step ``T - 1``, along half cosines or lines; momentum from
    ``max_momentum`` down to ``base_momentum`` and back. With three phases the way down first takes as long as the
    way up and ends where that began, at step ``2 * pct_start * T - 2``; from there on momentum stays.

    lr at steps 0, 1, 2 with ``max_lr=0.5, total_steps=6, pct_start=0.5, div_factor=5, anneal_strategy="linear"``:
    0.1, 0.3, 0.5.

    Source: Smith, Topin, *Super-convergence: very fast training of neural networks using large learning rates*, 2018.

    Parameters
    ----------
    optimizer : Optimizer
    max_lr : float or list of float
        The highest rate, for all groups or one per group. The optimizer's own rate is not used.
    total_steps : int, optional
        Steps (usually batches) of the schedule, >= 1; or else both of
    epochs, steps_per_epoch : int, optional
        whose product it is.
    pct_start : float
        Part of the steps that rise, in [0, 1].
    anneal_strategy : {"cos", "linear"}
        Along half a cosine or a line.
    cycle_momentum : bool
        Whether momentum, or the first of ``betas``, is moved. As in torch this turns on the momentum of an SGD
        built without.
    base_momentum, max_momentum : float or list of float
        The bounds of momentum.
    div_factor, final_div_factor : float
        By which the first rate is below the highest, and the last below the first; not 0.
    three_phase : bool
        Whether the way down has two parts.
    last_epoch : int
        The last step done; -1 to begin.

    Past the last step the values of step ``T - 1`` hold, with a warning at the second step too many: the first is the
    ``step()`` after the last batch. (torch goes up again at the first and raises at the second.) A group that is
    added later has no bounds: the next step is a KeyError.
    """

    _fields = {"total_steps": LENGTH}
    _unsaved = LRScheduler._unsaved | {"_past_end_told"}
    #: The group entries that a phase may go from and to.
    _NAMES = ("initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum")
    _past_end_told = False
    total_steps: int

    def __init__(
        self,
        optimizer: Optimizer,
        max_lr: float | Sequence[float],
        total_steps: int | None = None,
        epochs: int | None = None,
        steps_per_epoch: int | None = None,
        pct_start: float = 0.3,
        anneal_strategy: str = "cos",
        cycle_momentum: bool = True,
        base_momentum: float | Sequence[float] = 0.85,
        max_momentum: float | Sequence[float] = 0.95,
        div_factor: float = 25.0,
        final_div_factor: float = 1e4,
        three_phase: bool = False,
        last_epoch: int = -1,
    ) -> None:
        place = type(self).__name__
        self._attach(optimizer)
        for name, count in (("epochs", epochs), ("steps_per_epoch", steps_per_epoch)):
            if count is not None:
                LENGTH.check(place, name, count)
        if total_steps is not None:
            self._set(total_steps=total_steps)
        elif epochs is not None and steps_per_epoch is not None:
            batches = LENGTH.check(place, "steps_per_epoch", steps_per_epoch)
            self.total_steps = LENGTH.check(place, "epochs", epochs) * batches
        else:
            raise refuse(
                RoptimValueError, place, "total_steps", "given, or both epochs and steps_per_epoch", told(total_steps)
            )
        share = _SHARE.check(place, "pct_start", pct_start)
        top = share * self.total_steps - 1
        if top == 0:
            allowed = "a part of total_steps other than 1 step"
            raise refuse(RoptimValueError, place, "pct_start", allowed, f"{pct_start!r} of {self.total_steps}")
        end = self.total_steps - 1
        if flag(place, "three_phase", three_phase):
            self._schedule_phases = [
                _phase(top, "initial_lr", "max_lr", "max_momentum", "base_momentum"),
                _phase(2 * share * self.total_steps - 2, "max_lr", "initial_lr", "base_momentum", "max_momentum"),
                _phase(end, "initial_lr", "min_lr", "max_momentum", "max_momentum"),
            ]
        else:
            self._schedule_phases = [
                _phase(top, "initial_lr", "max_lr", "max_momentum", "base_momentum"),
                _phase(end, "max_lr", "min_lr", "base_momentum", "max_momentum"),
            ]
        self._anneal_func_type = one_of(place, "anneal_strategy", anneal_strategy, ("cos", "linear"))
        first_factor = POSITIVE.check(place, "div_factor", div_factor)
        last_factor = POSITIVE.check(place, "final_div_factor", final_div_factor)
        self.cycle_momentum = flag(place, "cycle_momentum", cycle_momentum)
        if self.cycle_momentum:
            self._find_momentum(optimizer)
            lowest = per_group(place, "base_momentum", base_momentum, optimizer)
            highest = per_group(place, "max_momentum", max_momentum, optimizer)
            self._momenta = (lowest, highest)
        self._first = [
            {"initial_lr": top_lr / first_factor, "max_lr": top_lr, "min_lr": top_lr / first_factor / last_factor}
            for top_lr in per_group(place, "max_lr", max_lr, optimizer)
        ]
        super().__init__(optimizer, last_epoch)
        # From here on the groups hold them.
        for name in ("_first", "_momenta"):
            vars(self).pop(name, None)

    def _enter(self, last_epoch: int) -> None:
        if last_epoch == -1:
            for group, rates in zip(self.optimizer.param_groups, self._first, strict=True):
                group.update(rates)
            if self.cycle_momentum:
                self._enter_momentum(*self._momenta)
        super()._enter(last_epoch)

    def _choices(self) -> dict[str, tuple[Any, ...]]:
        return {**super()._choices(), "_anneal_func_type": ("cos", "linear")}

    def _checked(self, state_dict: Any, place: str) -> dict[str, Any]:
        changes = super()._checked(state_dict, place)
        phases = changes.get("_schedule_phases", self._schedule_phases)
        if len(phases) not in (2, 3):
            raise refuse(RoptimValueError, place, "_schedule_phases", "2 or 3 phases", str(len(phases)))
        for phase in phases:
            for key in _phase(0, "", "", "", ""):
                if key not in phase:
                    raise refuse(RoptimKeyError, place, "_schedule_phases", f"dicts with {key!r}", told(phase))
                if key == "end_step":
                    NUMBER.check(place, key, phase[key])
                else:
                    one_of(place, key, phase[key], self._NAMES)
        return changes

    def get_lr(self) -> list[float]:
        self._warn_outside_step()
        (total,) = self._numbers()
        at = self.last_epoch
        if at >= total:
            if at > total and not self._past_end_told:
                self._past_end_told = True
                warnings.warn(
                    f"{type(self).__name__}: step {at} is past the total_steps of {self.total_steps}; "
                    "the last values hold from here on",
                    UserWarning,
                    stacklevel=4,
                )
            at = self.total_steps - 1
        phases = self._schedule_phases
        index = next((i for i, phase in enumerate(phases) if at <= phase["end_step"]), len(phases) - 1)
        phase, start = phases[index], phases[index - 1]["end_step"] if index else 0
        part = (at - start) / (phase["end_step"] - start)

        def value(i: int, group: Mapping[str, Any], of: str) -> float:
            ends = [phase[f"start_{of}"], phase[f"end_{of}"]]
            for name in ends:
                if name not in group:
                    allowed = f"one with {name!r}"
                    remedy = "add groups before the scheduler"
                    raise refuse(RoptimKeyError, f"{type(self).__name__}.step", f"group {i}", allowed, "none", remedy)
            return _annealed(self._anneal_func_type, group[ends[0]], group[ends[1]], part)

        groups = self.optimizer.param_groups
        rates = [value(i, group, "lr") for i, group in enumerate(groups)]
        if self.cycle_momentum:
            self._with_lr = [self._momentum(group, value(i, group, "momentum")) for i, group in enumerate(groups)]
        return rates


def _phase(end_step: float, start_lr: str, end_lr: str, start_momentum: str, end_momentum: str) -> dict[str, Any]:
    """A phase in torch's layout: its last step, and the group entries it goes from and to."""
    return {
        "end_step": end_step,
        "start_lr": start_lr,
        "end_lr": end_lr,
        "start_momentum": start_momentum,
        "end_momentum": end_momentum,
    }


# ---- schedulers of schedulers -------------------------------------------------------------------------------


class _Composite(LRScheduler):
    """A scheduler that consists of others."""

    _unsaved = LRScheduler._unsaved | {"_schedulers"}
    _required: ClassVar[tuple[str, ...]] = ("_schedulers",)
    _schedulers: list[LRScheduler]

    def _tree(self) -> Iterator[LRScheduler]:
        yield self
        for scheduler in vars(self).get("_schedulers", ()):
            yield from scheduler._tree()

    def _parts(self, schedulers: Any, optimizer: Any) -> list[LRScheduler]:
        """The given schedulers, if they can be parts of one of this optimizer."""
        place = type(self).__name__
        if not isinstance(schedulers, (list, tuple)) or not schedulers:
            raise refuse(RoptimValueError, place, "schedulers", "a list of at least one scheduler", told(schedulers))
        for i, scheduler in enumerate(schedulers):
            if not isinstance(scheduler, LRScheduler):
                got = f"an object of type {type(scheduler).__name__}"
                raise refuse(RoptimTypeError, place, f"scheduler {i}", "an LRScheduler", got)
            if isinstance(scheduler, ReduceLROnPlateau):
                remedy = "step it by itself, it needs the metric"
                raise refuse(RoptimValueError, place, f"scheduler {i}", "one of epochs", "ReduceLROnPlateau", remedy)
            if scheduler.optimizer is not (schedulers[0].optimizer if optimizer is None else optimizer):
                raise refuse(RoptimValueError, place, f"scheduler {i}", "of the same optimizer", "one of another")
        return list(schedulers)

    def _replay(self) -> None:
        for scheduler in self._schedulers:
            scheduler._replay()
        super()._replay()

    def state_dict(self) -> dict[str, Any]:
        """A copy of everything but the optimizer, in torch's layout, with the states of the parts."""
        return {**super().state_dict(), "_schedulers": [scheduler.state_dict() for scheduler in self._schedulers]}

    def _checked(self, state_dict: Any, place: str) -> dict[str, Any]:
        changes = super()._checked(state_dict, place)
        saved, parts = state_dict["_schedulers"], self._schedulers
        if not isinstance(saved, (list, tuple)) or len(saved) != len(parts):
            got = str(len(saved)) if isinstance(saved, (list, tuple)) else f"an object of type {type(saved).__name__}"
            raise refuse(RoptimValueError, place, "_schedulers", f"a list of {len(parts)} states", got)
        changes["_schedulers"] = [
            part._checked(state, f"{place}: scheduler {i}")
            if type(part).load_state_dict is LRScheduler.load_state_dict
            else state
            for i, (part, state) in enumerate(zip(parts, saved, strict=True))
        ]
        return changes

    def _take(self, changes: dict[str, Any]) -> None:
        for part, state in zip(self._schedulers, changes.pop("_schedulers"), strict=True):
            if type(part).load_state_dict is LRScheduler.load_state_dict:
                part._take(state)
            else:
                part.load_state_dict(state)
        super()._take(changes)


class SequentialLR(_Composite):
    """One scheduler after the other.

    Constructing it sets the rates back to the initial ones and begins the first scheduler. At each milestone the
    next one begins, at its epoch 0: from the initial rates where the class has a closed form or is a function of
    the epoch, whatever was before.

    lr at epochs 0, 1, 2 from 0.1 with ``[ConstantLR(opt, 0.5), ExponentialLR(opt, 0.9)]`` and milestone 1:
    0.05, 0.1, 0.09.

    Parameters
    ----------
    optimizer : Optimizer
    schedulers : list of LRScheduler
        All of this optimizer, and no ReduceLROnPlateau. SequentialLR and ChainedScheduler may be among them, at any
        place and depth: a nested SequentialLR gives the values of the flat one.
    milestones : list of int
        The epoch at which each scheduler but the first begins, >= 0, ascending.
    last_epoch : int
        The last epoch done; -1 to begin.

    As in torch the constructors of the parts have run before: one that writes more than the rate (OneCycleLR writes
    the initial rates, and momentum) has done so for all.
    """

    _required = ("last_epoch", "_schedulers")
    _unsaved = _Composite._unsaved | {"_opened"}
    #: Momentum of the groups before and after the construction's transition.
    _opened: tuple[list[dict[str, Any]], list[dict[str, Any]]] | None = None

    def __init__(
        self, optimizer: Optimizer, schedulers: Sequence[LRScheduler], milestones: Sequence[int], last_epoch: int = -1
    ) -> None:
        place = type(self).__name__
        self._attach(optimizer)
        parts = self._parts(schedulers, optimizer)
        at = self._ascending(place, "milestones", milestones, parts)
        for i, scheduler in enumerate(parts[1:], 1):
            if at[i - 1] > 0:
                scheduler._check_milestone(f"{place}: scheduler {i}")
        with self._all_or_nothing(parts):
            before = [dict(group) for group in optimizer.param_groups]
            self._milestones = at
            self.last_epoch = last_epoch
            self._schedulers = parts
            for scheduler in parts:
                scheduler._replay()
            self._reset()
            # Backwards, because each takes back what it wrote last.
            for scheduler in reversed(parts):
                scheduler._undo()
            found = self._momenta()
            self._initial_step()
            self._opened = found, self._momenta()
            self._leave_as_loaded(before, last_epoch, 3)

    def _momenta(self) -> list[dict[str, Any]]:
        return [
            {key: group[key] for key in ("momentum", "betas") if key in group} for group in self.optimizer.param_groups
        ]

    def _checked(self, state_dict: Any, place: str) -> dict[str, Any]:
        changes = super()._checked(state_dict, place)
        if "_milestones" in changes:
            changes["_milestones"] = self._ascending(place, "_milestones", changes["_milestones"], self._schedulers)
        return changes

    @staticmethod
    def _ascending(place: str, name: str, milestones: Any, parts: Sequence[LRScheduler]) -> list[int]:
        """The milestones, if they are what divides these parts."""
        if not isinstance(milestones, (list, tuple)):
            got = f"an object of type {type(milestones).__name__}"
            raise refuse(RoptimTypeError, place, name, "a list of whole numbers", got)
        if len(milestones) != len(parts) - 1:
            allowed = f"one fewer than the {len(parts)} schedulers"
            raise refuse(RoptimValueError, place, name, allowed, str(len(milestones)))
        at: list[int] = [COUNT.check(place, name, milestone) for milestone in milestones]
        if at != sorted(at):
            raise refuse(RoptimValueError, place, name, "ascending", told(milestones))
        return at

    def _reset(self) -> None:
        for i, group in enumerate(self.optimizer.param_groups):
            if "initial_lr" not in group:
                place, remedy = type(self).__name__, "add groups before the schedulers"
                raise refuse(RoptimKeyError, place, f"group {i}", "one with 'initial_lr'", "none", remedy)
            group["lr"] = group["initial_lr"]

    @property
    def _opening(self) -> LRScheduler:
        """The scheduler of epoch 0: the first one whose turn is not over by then."""
        return self._schedulers[bisect_right(self._milestones, 0)]

    def _initial_step(self) -> None:
        self.last_epoch += 1
        self._opening._initial_step()
        self._last_lr = self._opening.get_last_lr()

    def _undo(self) -> None:
        # The others have not begun.
        self.last_epoch -= 1
        self._opening._undo()
        # Within another sequence the opening of this one has not happened, to momentum neither.
        for group, found, left in zip(self.optimizer.param_groups, *(self._opened or ((), ())), strict=False):
            group.update({key: found[key] for key in found if group.get(key) is left[key]})

    def _begin(self) -> None:
        self._replay()
        self._reset()
        self._undo()
        self._initial_step()

    def _update_lr(self, epoch: int | None = None) -> None:
        self.last_epoch = 0
        self._opening._update_lr(0)
        self._last_lr = self._opening.get_last_lr()

    def _check_milestone(self, place: str) -> None:
        self._opening._check_milestone(place)

    def step(self) -> None:  # type: ignore[override]  # torch's composites take no epoch
        """Goes to the next epoch: a step of the scheduler whose turn it is, or the beginning of the next one."""
        with self._all_or_nothing():
            self._go_on()
            self.last_epoch += 1
            index = bisect_right(self._milestones, self.last_epoch)
            scheduler = self._schedulers[index]
            if index > 0 and self._milestones[index - 1] == self.last_epoch:
                scheduler._update_lr(0)
            else:
                scheduler.step()
            self._last_lr = scheduler.get_last_lr()


class ChainedScheduler(_Composite):
    """Several schedulers stepped by one call, so that recursive ones multiply.

    Constructing it changes nothing: the constructors of its parts have done their transitions.

    lr at epochs 0, 1, 2 from 0.1 with ``[ConstantLR(opt, 0.5, total_iters=2), ExponentialLR(opt, 0.9)]``: 0.05, 0.045,
    0.081.

    Parameters
    ----------
    schedulers : list of LRScheduler
        All of one optimizer, and no ReduceLROnPlateau. SequentialLR and ChainedScheduler may be among them.
    optimizer : Optimizer, optional
        Theirs.

    Schedulers that are functions of the epoch (LambdaLR, CyclicLR, OneCycleLR, CosineAnnealingWarmRestarts) replace
    what those before them wrote, and so does a SequentialLR at its milestones: put such a part first. Where
    SequentialLR begins a ChainedScheduler at a milestone, the first part begins as it would alone, and the others act
    on it as their constructors do.
    """

    def __init__(self, schedulers: Sequence[LRScheduler], optimizer: Optimizer | None = None) -> None:
        parts = self._parts(schedulers, optimizer)
        self._attach(parts[0].optimizer if optimizer is None else optimizer)
        self._schedulers = parts
        self._read()

    def _read(self) -> None:
        self._last_lr = [float(group["lr"]) for group in self.optimizer.param_groups]

    def _initial_step(self) -> None:
        for scheduler in self._schedulers:
            scheduler._initial_step()
        self._read()

    def _undo(self) -> None:
        for scheduler in self._schedulers:
            scheduler._undo()

    def _update_lr(self, epoch: int | None = None) -> None:
        first, *others = self._schedulers
        first._update_lr(0)
        for scheduler in others:
            scheduler._initial_step()
        self._read()

    def _check_milestone(self, place: str) -> None:
        self._schedulers[0]._check_milestone(place)

    def step(self) -> None:  # type: ignore[override]  # torch's composites take no epoch
        """A step of each scheduler, in order."""
        with self._all_or_nothing():
            self._go_on()
            for scheduler in self._schedulers:
                scheduler.step()
            self._read()


# ---- the metric decides -------------------------------------------------------------------------------------


class ReduceLROnPlateau(LRScheduler):
    """Reduces the learning rate when a metric stops improving.

    lr after steps 0, 1, 2 from 0.1 with ``patience=0`` and metrics 1.0, 1.0, 1.0: 0.1, 0.01, 0.001; before the first
    one it is the optimizer's.

    Parameters
    ----------
    optimizer : Optimizer
    mode : {"min", "max"}
        Whether a smaller or a larger metric is better.
    factor : float
        New rate = old rate times this, in [0, 1).
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
    verbose : bool
        Whether a line is printed for each reduction of a group.

    ``step(metric)`` takes the metric of the epoch. A NaN metric counts as no improvement. As in torch, in
    mode "rel" a negative best metric makes slightly worse metrics count as better: use ``threshold_mode="abs"`` for
    metrics below 0.
    """

    _fields = {
        "factor": _SHARE_BELOW_1,
        "patience": COUNT,
        "cooldown": COUNT,
        "eps": NUMBER,
        "threshold": NUMBER,
        "cooldown_counter": COUNT,
        "num_bad_epochs": COUNT,
    }
    _unsaved = LRScheduler._unsaved | {"verbose"}
    _MODES = ("min", "max")
    _THRESHOLD_MODES = ("rel", "abs")
    factor: float
    patience: int
    cooldown: int
    eps: float
    threshold: float
    cooldown_counter: int
    num_bad_epochs: int

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
        *,
        verbose: bool = False,
    ) -> None:
        place = type(self).__name__
        self._set(factor=factor)
        one_of(place, "mode", mode, self._MODES)
        one_of(place, "threshold_mode", threshold_mode, self._THRESHOLD_MODES)
        self._attach(optimizer)
        each = isinstance(min_lr, (list, tuple))
        self.default_min_lr: float | None = None if each else NUMBER.check(place, "min_lr", min_lr)
        self.min_lrs = per_group(place, "min_lr", min_lr, optimizer)
        self._set(patience=patience, cooldown=cooldown, eps=eps)
        self.last_epoch = 0
        self._last_lr = [float(group["lr"]) for group in optimizer.param_groups]
        self.mode_worse = math.inf if mode == "min" else -math.inf
        self.mode = mode
        self._set(threshold=threshold)
        self.threshold_mode = threshold_mode
        self.best = self.mode_worse
        self._set(cooldown_counter=0, num_bad_epochs=0)
        self.verbose = flag(type(self).__name__, "verbose", verbose)

    @property
    def in_cooldown(self) -> bool:
        """Whether nothing is counted now."""
        return self.cooldown_counter > 0

    def _choices(self) -> dict[str, tuple[Any, ...]]:
        return {"mode": self._MODES, "threshold_mode": self._THRESHOLD_MODES}

    def step(self, metrics: Any, epoch: int | None = None) -> None:  # type: ignore[override]  # torch asks for a metric
        """Counts one epoch with its metric and reduces where it is due."""
        try:
            metric = None if isinstance(metrics, (str, bytes)) else float(number_of(metrics))
        except (TypeError, ValueError):
            metric = None
        if metric is None:
            raise refuse(RoptimTypeError, f"{type(self).__name__}.step", "metrics", "a number", told(metrics))
        with self._all_or_nothing():
            self._go_on()
            if epoch is not None:
                warnings.warn("the epoch argument of step is deprecated", UserWarning, stacklevel=2)
            self.last_epoch = self.last_epoch + 1 if epoch is None else self._epoch(epoch)
            self._numbers()
            rule = (self.mode, self.threshold_mode, self.threshold, self.patience, self.cooldown)
            memory = (self.best, self.num_bad_epochs, self.cooldown_counter)
            memory, reduce = _roptim.plateau_observe(rule, memory, metric)
            self.best, self.num_bad_epochs, self.cooldown_counter = memory
            if reduce:
                self._reduce()
            self._last_lr = [float(group["lr"]) for group in self.optimizer.param_groups]

    def _reduce(self) -> None:
        groups = self.optimizer.param_groups
        if len(groups) != len(self.min_lrs):
            if self.default_min_lr is None:
                got = f"{len(self.min_lrs)} for {len(groups)} groups"
                raise refuse(RoptimRuntimeError, f"{type(self).__name__}.step", "min_lr", "one number per group", got)
            self.min_lrs = [self.default_min_lr] * len(groups)
        for i, (group, floor) in enumerate(zip(groups, self.min_lrs, strict=True)):
            before = float(group["lr"])
            after = _roptim.plateau_reduced(before, self.factor, floor, self.eps)
            if after != before:
                group["lr"] = after
                if self.verbose:
                    print(f"{type(self).__name__}: epoch {self.last_epoch}, lr of group {i} reduced to {after:.4e}")


#: What one class or another of this module saves besides what all do.
_ALL_FIELDS = frozenset(_LISTS) | frozenset(
    key
    for cls in list(vars().values())
    if isinstance(cls, type) and issubclass(cls, LRScheduler)
    for key in (*cls._fields, *cls._functions)
)
