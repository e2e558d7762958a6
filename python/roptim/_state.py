"""Optimizer state as mappings, by parameter."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

import numpy as np

from roptim._errors import RoptimKeyError, RoptimTypeError, RoptimValueError, refuse, told
from roptim._signals import deferred
from roptim._values import is_real, is_whole

if TYPE_CHECKING:
    from roptim._roptim import Engine


class ParamState(MutableMapping[str, Any]):
    """State of one parameter: ``step`` as an int, slots as arrays or floats under torch's keys.

    On the CPU the arrays are the optimizer's own memory, writeable, and never move until the state is
    reset or loaded; on a GPU, and where all parameters share one state (LBFGS), everything is a read-only
    copy. Empty before the first update.
    """

    def __init__(self, of: State, index: int) -> None:
        self._of = of
        self._index = index

    @property
    def _engine(self) -> Engine:
        """The optimizer's engine, which another takes the place of when it moves to another backend."""
        engine = self._of._engine
        assert engine is not None
        return engine

    def __getitem__(self, key: str) -> Any:
        if key in self._engine.state_keys(self._index):
            return self._engine.step_of(self._index) if key == "step" else self._engine.slot(self._index, key)
        raise KeyError(key)

    def __setitem__(self, key: str, value: Any) -> None:
        self._write({key: value})

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Sets several entries, all or none."""
        self._write(dict(*args, **kwargs))

    def _write(self, changes: dict[str, Any]) -> None:
        checked = []
        numbers = {}
        keys = self._engine.state_keys(self._index)
        for key, value in changes.items():
            if key not in keys:
                allowed = f"one of {', '.join(keys)}" if keys else "absent before the first update"
                raise refuse(RoptimKeyError, "state", "key", allowed, told(key))
            if key == "step":
                if not is_whole(value) or not 1 <= value < 2**64 - 1:
                    raise refuse(RoptimValueError, "state", "step", "a whole number from 1 to 2^64 - 2", told(value))
                continue
            slot = self._engine.slot(self._index, key)
            assert slot is not None  # state_keys named it
            if isinstance(slot, float) and key not in self._engine.joint_keys:
                if not is_real(value) or not abs(value) <= sys.float_info.max:
                    raise refuse(RoptimValueError, "state", key, "a finite number", told(value))
                numbers[key] = float(value)
                continue
            if not isinstance(slot, np.ndarray) or not slot.flags.writeable:
                remedy = "change it through load_state_dict"
                raise refuse(RoptimTypeError, "state", key, "read only here", "an assignment", remedy)
            try:
                new = np.asarray(value, slot.dtype)
            except (TypeError, ValueError):
                raise refuse(RoptimTypeError, "state", key, f"an array of {slot.dtype}", told(value)) from None
            if new.shape != slot.shape:
                raise refuse(RoptimValueError, "state", key, f"of shape {slot.shape}", str(new.shape))
            checked.append((slot, new))
        for slot, new in checked:
            slot[...] = new
        for key, number in numbers.items():
            self._engine.set_scalar(self._index, key, number)
        if "step" in changes:
            self._engine.set_step_of(self._index, int(changes["step"]))

    def __delitem__(self, key: str) -> None:
        raise refuse(RoptimKeyError, "state", "key", "kept", f"a removal of {key!r}", "use reset")

    def __iter__(self) -> Iterator[str]:
        return iter(self._engine.state_keys(self._index))

    def __len__(self) -> int:
        return len(self._engine.state_keys(self._index))

    def __repr__(self) -> str:
        return repr(dict(self))


class State(MutableMapping[Any, Any]):
    """State by parameter: a Parameter, the registered array itself, its name or its index."""

    def __init__(self, engine: Engine | None) -> None:
        self._engine = engine
        self._objects: list[Any] = []
        self._names: list[str | None] = []
        self._index: dict[int, int] = {}
        self._by_name: dict[str, int] = {}
        # Optimizers written in Python keep whatever they like, by index.
        self._own: dict[int, Any] = {}

    def _register(self, objects: list[Any], names: list[str] | None) -> None:
        for i, obj in enumerate(objects):
            index = len(self._objects)
            self._objects.append(obj)
            self._names.append(names[i] if names else None)
            self._index[id(obj)] = index
            if names:
                self._by_name[names[i]] = index

    def _find(self, key: Any) -> int:
        if isinstance(key, str):
            if key in self._by_name:
                return self._by_name[key]
        elif isinstance(key, (int, np.integer)) and not isinstance(key, bool):
            if 0 <= key < len(self._objects):
                return int(key)
        elif id(key) in self._index:
            return self._index[id(key)]
        shown = repr(key) if isinstance(key, (str, int, np.integer)) else f"an object of type {type(key).__name__}"
        raise refuse(RoptimKeyError, "state", "key", "a parameter of this optimizer, its name or its index", shown)

    def __getitem__(self, key: Any) -> Any:
        index = self._find(key)
        return ParamState(self, index) if self._engine else self._own.setdefault(index, {})

    def __setitem__(self, key: Any, value: Any) -> None:
        index = self._find(key)
        if self._engine is None:
            self._own[index] = value
        elif not isinstance(value, Mapping):
            got = f"an object of type {type(value).__name__}"
            raise refuse(RoptimTypeError, "state", "the state of a parameter", "a dict", got)
        elif value:
            self[index].update(value)
        else:
            self._engine.reset(index)

    def __delitem__(self, key: Any) -> None:
        index = self._find(key)
        if self._engine is None:
            self._own.pop(index, None)
        else:
            self._engine.reset(index)

    def __contains__(self, key: object) -> bool:
        try:
            index = self._find(key)
        except RoptimKeyError:
            return False
        return self._has(index)

    def _has(self, index: int) -> bool:
        return bool(self._engine.state_keys(index) if self._engine else self._own.get(index))

    def __iter__(self) -> Iterator[Any]:
        return (obj for i, obj in enumerate(self._objects) if self._has(i))

    def __len__(self) -> int:
        return sum(self._has(i) for i in range(len(self._objects)))

    def clear(self) -> None:
        """Returns every parameter to step 0 without state."""
        with deferred():
            for index in range(len(self._objects)):
                if self._engine is None:
                    self._own.pop(index, None)
                else:
                    self._engine.reset(index)

    # The keys may be arrays, which are not hashable and do not compare to one truth value.
    def items(self) -> Any:
        """(parameter, state) of every parameter that has state."""
        return [(obj, self[i]) for i, obj in enumerate(self._objects) if self._has(i)]

    def values(self) -> Any:
        """State of every parameter that has some."""
        return [self[i] for i in range(len(self._objects)) if self._has(i)]

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = None  # type: ignore[assignment]  # what compares by identity alone and changes is no key

    def __repr__(self) -> str:
        names = {i: self._names[i] or i for i in range(len(self._objects)) if self._has(i)}
        return repr({name: dict(self[i]) for i, name in names.items()})
