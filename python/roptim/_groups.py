"""Parameter groups: live dicts that check what is assigned."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn, SupportsIndex

import numpy as np

from roptim._errors import RoptimKeyError, RoptimTypeError, RoptimValueError, refuse, told

#: Keys that schedulers keep in groups.
SCHEDULER_KEYS = frozenset({"initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr"})
#: torch's choices between kernels, which ask for nothing here.
SWITCHES = frozenset({"foreach", "fused", "capturable", "differentiable"})

#: What the constructors take besides hyperparameters and torch's switches, with defaults: options of the whole
#: optimizer, no keys of groups.
OPTIONS: dict[str, Any] = {
    "backend": "cpu",
    "allow_software": False,
    "threads": None,
    "flush_denormals": True,
    "clip_norm": None,
    "clip_value": None,
    "nonfinite": "propagate",
    "nonfinite_sync": False,
}


def edit_distance(a: str, b: str) -> int:
    """Insertions, deletions and substitutions that turn one word into the other."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]


def refuse_misspelling(place: str, key: object, known: Iterable[str]) -> None:
    """Raises if ``key`` looks like a misspelled name of a hyperparameter, or is an option of the whole optimizer."""
    if key in OPTIONS and key not in known:
        remedy = "give it to the constructor: it holds for all groups"
        raise refuse(RoptimKeyError, place, "group key", "no option of the whole optimizer", told(key), remedy)
    if not isinstance(key, str) or len(key) < 4 or key in SCHEDULER_KEYS or key in SWITCHES:
        return
    names = set(known)
    if key in names:
        return
    for name in sorted(names):
        if len(name) >= 4 and edit_distance(key, name) <= 2:
            raise refuse(
                RoptimKeyError,
                place,
                "group key",
                "a hyperparameter or a name of your own",
                told(key),
                f"did you mean {name!r}?",
            )


def check_switches(place: str, **switches: Any) -> None:
    """Accepts torch's kernel switches where they ask for nothing, refuses them by name where they do."""
    for name, value in switches.items():
        harmless = (None, False, True) if name in ("foreach", "fused") else (None, False)
        if not any(value is allowed for allowed in harmless):
            allowed = " or ".join(map(repr, harmless[1:])) + " or None"
            raise refuse(RoptimValueError, place, name, allowed, told(value), "roptim has no such mode")


def settled(value: Any) -> Any:
    """A NumPy number or one-element array as a Python number, so that it cannot change later.

    Times and what is masked stay as they are: both would become numbers. So does what holds any object.
    """
    if not isinstance(value, (np.generic, np.ndarray)) or isinstance(value, np.ma.MaskedArray):
        return value
    return value.item() if value.size == 1 and value.dtype.kind not in "mMO" else value


def lasting(value: Any) -> Any:
    """A hyperparameter's value that was checked, in a form that cannot change later."""
    value = settled(value)
    if isinstance(value, np.ndarray):
        return tuple(value.tolist())
    return tuple(map(lasting, value)) if isinstance(value, (list, tuple)) else value


def shown(given: Mapping[str, Any], engine: Mapping[str, Any]) -> dict[str, Any]:
    """What a group shows of hyperparameters: a number as it was given (an int stays an int), anything that
    could change later or mean something else elsewhere as the engine has it."""

    def lasts(value: Any) -> bool:
        return type(value) in (bool, int, float) or (type(value) is tuple and all(map(lasts, value)))

    return {key: value if lasts(value) else engine[key] for key, value in given.items()}


class ParamGroup(dict[str, Any]):
    """One parameter group: a dict whose hyperparameters are checked when they are assigned.

    ``group["lr"] = 0.1`` takes effect at the next step. A value out of range raises at the assignment and
    leaves the old one; a key that looks like a misspelled hyperparameter is an error; any other key is
    yours. A NumPy scalar or 0-d array is read at the assignment.
    """

    def __init__(
        self,
        options: Mapping[str, Any],
        *,
        place: str,
        hypers: frozenset[str] = frozenset(),
        apply: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
        look: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        super().__init__(options)
        self._place = place
        self._hypers = hypers
        self._apply = apply
        self._look = look

    def _change(self, changes: dict[str, Any]) -> None:
        for key in ("params", "param_names"):
            if key in changes and changes[key] is not self.get(key):
                raise refuse(RoptimKeyError, self._place, key, "left as it is", "an assignment", "use add_param_group")
        for key in changes:
            refuse_misspelling(self._place, key, self._hypers)
        if self._hypers:
            check_switches(self._place, **{key: value for key, value in changes.items() if key in SWITCHES})
        changes = {key: settled(value) if key in self._hypers else value for key, value in changes.items()}
        if self._look is not None:
            self._look(changes)
        checked = {key: value for key, value in changes.items() if key in self._hypers}
        if checked and self._apply is not None:
            changes = {**changes, **shown(checked, self._apply(checked))}
        super().update(changes)

    def __setitem__(self, key: str, value: Any) -> None:
        self._change({key: value})

    def update(self, *args: Any, **kwargs: Any) -> None:
        self._change(dict(*args, **kwargs))

    def __ior__(self, other: Any) -> ParamGroup:  # type: ignore[override,misc]  # dict's own overloads
        self._change(dict(other))
        return self

    def setdefault(self, key: str, default: Any = None) -> Any:
        if key not in self:
            self._change({key: default})
        return self[key]

    def _refuse_removal(self, key: object) -> None:
        if key in ("params", "param_names") or key in self._hypers:
            raise refuse(RoptimKeyError, self._place, str(key), "kept", "a removal")

    def __delitem__(self, key: str) -> None:
        self._refuse_removal(key)
        super().__delitem__(key)

    def pop(self, key: str, *default: Any) -> Any:
        if key in self:
            self._refuse_removal(key)
        return super().pop(key, *default)

    def popitem(self) -> tuple[str, Any]:
        self._refuse_removal(next(reversed(self)))
        return super().popitem()

    def clear(self) -> NoReturn:
        raise refuse(RoptimKeyError, self._place, "hyperparameters", "kept", "a removal of all")

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        from copy import deepcopy

        return {key: deepcopy(value, memo) for key, value in self.items()}


class FixedList(list[Any]):
    """A list that refuses to be changed: the groups of an optimizer, the parameters of a group."""

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise refuse(RoptimTypeError, "param_groups", "the list", "left as it is", "a change", "use add_param_group")

    append = extend = insert = remove = pop = clear = reverse = sort = _refuse
    __delitem__ = __iadd__ = __imul__ = _refuse

    def __setitem__(self, index: Any, value: Any) -> None:
        # ``groups[0] |= {...}`` assigns the same object again.
        if isinstance(index, slice) or value is not self[index]:
            self._refuse()

    def _add(self, item: Any) -> None:
        super().append(item)

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        return list, (list(self),)

    def __deepcopy__(self, memo: dict[int, Any]) -> list[Any]:
        from copy import deepcopy

        return [deepcopy(item, memo) for item in self]
