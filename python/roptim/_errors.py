"""Exception classes: each is a :class:`RoptimError` and the built-in class that fits."""

from __future__ import annotations

import builtins
import sys
import warnings


class RoptimError(Exception):
    """Base of every error that roptim raises on purpose."""


class RoptimValueError(RoptimError, ValueError):
    """A value out of range, or an array of the wrong shape, layout, overlap or access."""


class RoptimTypeError(RoptimError, TypeError):
    """A value or array of the wrong type or dtype."""


class RoptimKeyError(RoptimError, KeyError):
    """A name nobody knows."""

    def __str__(self) -> str:
        # KeyError would show the repr of the sentence.
        return Exception.__str__(self)


class RoptimRuntimeError(RoptimError, RuntimeError):
    """An operation that cannot go on."""


class NonfiniteError(RoptimRuntimeError):
    """A gradient or norm that is not finite where an error was asked for."""


class ConcurrentStepError(RoptimRuntimeError):
    """Two threads used one optimizer at once."""


class TornError(RoptimRuntimeError):
    """An interrupted step left work half done: restore parameters and state first."""


class DeviceError(RoptimRuntimeError):
    """The device refused or failed an operation."""


class NoAdapterError(DeviceError):
    """No device fits the request."""


class DeviceLostError(DeviceError):
    """The device is gone."""


class ForkedGpuError(DeviceError):
    """A GPU optimizer was used in a forked process."""


class OutOfMemoryError(RoptimError, builtins.MemoryError):
    """An allocation failed."""


class CheckpointError(RoptimValueError):
    """A file that is damaged, hostile, or of another format."""


class CheckpointIOError(RoptimError, OSError):
    """The operating system refused a file operation."""


class InternalError(RoptimRuntimeError):
    """A defect of roptim."""


def printable(text: str) -> str:
    """A text of any origin without what a terminal would obey."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def told(value: object) -> str:
    """A value as messages show it: on one line and cut where it is long, whatever its own ``__repr__`` does."""
    longest = 100
    try:
        text = repr(value)
    except Exception:
        return f"an object of type {type(value).__name__}"
    if "\n" in text:
        text = " ".join(text.split())
    return text if len(text) <= longest else text[: longest - 3] + "..."


def warn(sentence: str) -> None:
    """Warns at the line of the code that called this package."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "roptim":
        level, frame = level + 1, frame.f_back
    warnings.warn(printable(sentence), stacklevel=level)


def refuse(
    kind: type[RoptimError], place: str, name: str, allowed: str, got: str, remedy: str | None = None
) -> RoptimError:
    """The exception in the one sentence form: ``place: name must be allowed, got value; remedy``."""
    return kind(printable(f"{place}: {name} must be {allowed}, got {got}" + (f"; {remedy}" if remedy else "")))
