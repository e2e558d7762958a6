"""What counts as a number or a switch in arguments, wherever they are given."""

from __future__ import annotations

from typing import Any, TypeGuard

import numpy as np

from roptim._errors import RoptimTypeError, RoptimValueError, refuse, told


def is_whole(x: object) -> TypeGuard[int]:
    """Whether it is an integer of Python or NumPy; a bool is none, nor is a time, which NumPy calls one."""
    return isinstance(x, (int, np.integer)) and not isinstance(x, (bool, np.timedelta64))


def is_real(x: object) -> TypeGuard[float]:
    """Whether it is a real number of Python or NumPy."""
    return is_whole(x) or isinstance(x, (float, np.floating))


def flag(place: str, name: str, value: Any) -> bool:
    """A switch: of anything else the truth is seldom what was meant, as of the text "False"."""
    if not isinstance(value, (bool, np.bool_)):
        raise refuse(RoptimTypeError, place, name, "True or False", told(value))
    return bool(value)


def is_encodable(text: str) -> bool:
    """Whether UTF-8 can hold it, which it cannot with half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def callback(place: str, name: str, value: Any) -> Any:
    """None, or what can be called."""
    if value is not None and not callable(value):
        raise refuse(RoptimTypeError, place, name, "None or callable", told(value))
    return value


def word(place: str, name: str, allowed: str, value: Any) -> str:
    """A text that chooses something: the engine knows which there are."""
    if not isinstance(value, str):
        raise refuse(RoptimTypeError, place, name, allowed, told(value))
    if not is_encodable(value):
        raise refuse(RoptimValueError, place, name, allowed, told(value))
    return value
