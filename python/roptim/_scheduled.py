"""Hyperparameters that are functions of the count of updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from roptim._errors import RoptimTypeError, RoptimValueError, refuse, told
from roptim._groups import settled
from roptim.schedules import Schedule


def is_scheduled(value: object) -> bool:
    """Whether a hyperparameter's value is a schedule, a function, or a tuple or list with one in it."""
    if isinstance(value, (tuple, list)):
        return any(is_scheduled(item) for item in value)
    return isinstance(value, Schedule) or (callable(value) and not isinstance(value, (type, np.generic, np.ndarray)))


def refuse_schedules(place: str, options: Mapping[str, Any]) -> None:
    """Refuses schedules in the groups of an optimizer that has no count of updates."""
    for name, value in options.items():
        if isinstance(value, Schedule):
            remedy = "an optimizer written in Python has no count of updates: assign schedule(t) before each step"
            raise refuse(RoptimTypeError, place, name, "a value", "a schedule", remedy)


def value_at(value: Any, t: int) -> Any:
    """The hyperparameter's value for update ``t``."""
    if not is_scheduled(value):
        return value
    return tuple(value_at(item, t) for item in value) if isinstance(value, (tuple, list)) else value(t)


def values_at(scheduled: Mapping[str, Any], t: int) -> dict[str, Any]:
    """The values of several for update ``t``."""
    return {name: value_at(value, t) for name, value in scheduled.items()}


#: What a function is in a file.
FUNCTION = "function"


def encoded(value: Any) -> Any:
    """A form that a file can hold: the text of a schedule, a word for a function, other values as they are."""
    if isinstance(value, (tuple, list)):
        return [encoded(item) for item in value]
    if isinstance(value, Schedule):
        return value.to_json()
    return FUNCTION if is_scheduled(value) else settled(value)


def decoded(place: str, name: str, form: Any, own: Any) -> Any:
    """The value of such a form; ``own`` is this optimizer's, whose functions stand for the saved ones."""
    if form == FUNCTION and isinstance(form, str):
        if is_scheduled(own) and not isinstance(own, (Schedule, tuple, list)):
            return own
        got = "none" if own is None else told(own)
        remedy = "no file holds a function: construct the optimizer with it"
        raise refuse(RoptimValueError, place, name, "the function that it was in the saved run", got, remedy)
    if isinstance(form, str):
        return Schedule.from_json(form)
    if isinstance(form, (list, tuple)):
        owns: Sequence[Any] = own if isinstance(own, (list, tuple)) and len(own) == len(form) else [None] * len(form)
        return tuple(decoded(place, name, item, each) for item, each in zip(form, owns, strict=True))
    if form is None or isinstance(form, (int, float)):
        return form
    raise refuse(RoptimTypeError, place, name, "a schedule", f"an object of type {type(form).__name__}")
