"""Saving and loading trees of values."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np

from roptim import _roptim
from roptim._errors import RoptimTypeError, RoptimValueError, refuse, told
from roptim._values import callback

#: Called with the bytes done and the bytes in all.
Progress = Callable[[int, int], Any]


def path_text(path: object, place: str) -> str:
    """A path as text."""
    try:
        text = os.fsdecode(path)  # type: ignore[arg-type]  # what it is not made for, it refuses
    except TypeError:
        raise refuse(RoptimTypeError, place, "path", "a path", f"an object of type {type(path).__name__}") from None
    try:
        os.fsencode(text)
        is_name = bool(text) and "\0" not in text
    except UnicodeEncodeError:
        is_name = False
    if not is_name:
        raise refuse(RoptimValueError, place, "path", "the name of a file", told(text))
    return text


def state_of(value: object) -> tuple[Any, str] | None:
    """What an object that keeps a state is saved as, and how a place in it is written; None for any other object."""
    if isinstance(value, np.random.Generator):
        return value.bit_generator.state, ".bit_generator.state"
    if isinstance(value, np.random.BitGenerator):
        return value.state, ".state"
    if isinstance(value, np.random.RandomState):
        return value.get_state(legacy=False), ".get_state()"
    if isinstance(value, _roptim.DeviceArray):
        return value.numpy(), ".numpy()"
    if not isinstance(value, type) and callable(getattr(value, "state_dict", None)):
        return value.state_dict(), ".state_dict()"  # type: ignore[attr-defined]  # it has one
    return None


def save(obj: Any, path: str | os.PathLike[str], *, progress: Progress | None = None) -> None:
    """Writes a tree of values to a file, completely or not at all.

    The file is a safetensors container with a checksum; any safetensors tool can read its arrays. It is
    written beside the target, synced to the disk and renamed over it: a crash leaves the old file or the
    new one. No pickle is involved. What crashed saves left in the directory is removed.

    Parameters
    ----------
    obj
        None, bool, int (up to 4096 bits), float (nan and inf included), str, NumPy scalars, arrays of any numeric
        dtype (but long double) and layout, and lists, tuples and dicts (keys str or int) of these. A Parameter is
        saved as its array, a NumPy random generator as its state, and whatever has a ``state_dict()`` (optimizers,
        schedulers, averages, your own classes) as that: a run goes into one file in one call::

            roptim.save({"params": params, "optimizer": opt, "scheduler": sched, "rng": rng, "epoch": 3}, path)

    path
        The file.
    progress : callable, optional
        Called as ``progress(bytes_done, bytes_in_all)`` about every 8 MiB and at the end. If it raises, the save
        ends and the old file stays.

    Raises
    ------
    RoptimTypeError
        If something in the tree is of another type; the message names its place.
    CheckpointIOError
        If the system refuses the write; the old file is untouched then.
    """
    place = "roptim.save"
    _roptim.save(obj, path_text(path, place), callback(place, "progress", progress))


def load(path: str | os.PathLike[str], *, progress: Progress | None = None) -> Any:
    """Reads what :func:`save` wrote: the same types and the same bits.

    Loading never runs code from the file; a damaged or altered file is refused. See :func:`restore` to bring
    what was saved into optimizers, arrays and other objects.

    Parameters
    ----------
    path
        The file.
    progress : callable, optional
        Called as ``progress(bytes_done, bytes_in_all)``.

    Raises
    ------
    CheckpointError
        If the file is not a roptim file, is damaged, or was written by a newer version.
    CheckpointIOError
        If the system refuses the read.
    """
    place = "roptim.load"
    return _roptim.load(path_text(path, place), callback(place, "progress", progress))
