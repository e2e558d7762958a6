"""Saving and loading trees of values."""

from __future__ import annotations

import os
from typing import Any

from roptim import _roptim
from roptim._errors import RoptimTypeError, RoptimValueError, refuse


def _text(path: object, place: str) -> str:
    try:
        text = os.fsdecode(path)  # type: ignore[arg-type]  # what it is not made for, it refuses
    except TypeError:
        raise refuse(RoptimTypeError, place, "path", "a path", f"an object of type {type(path).__name__}") from None
    if not text or "\0" in text:
        raise refuse(RoptimValueError, place, "path", "the name of a file", repr(text))
    return text


def save(obj: Any, path: str | os.PathLike[str]) -> None:
    """Writes a tree of values to a file, completely or not at all.

    The file is a safetensors container with a checksum; any safetensors tool can read its arrays. It is
    written beside the target, synced to the disk and renamed over it: a crash leaves the old file or the
    new one. No pickle is involved.

    Parameters
    ----------
    obj
        None, bool, int (64 bit), float (nan and inf included), str, NumPy scalars, arrays of any numeric
        dtype (but long double) and layout, and lists, tuples and dicts (keys str or int) of these: for instance
        ``{"model": params, "optimizer": opt.state_dict(), "epoch": 3}``. A Parameter is saved as its array.
    path
        The file.

    Raises
    ------
    RoptimTypeError
        If something in the tree is of another type; the message names its place.
    CheckpointIOError
        If the system refuses the write; the old file is untouched then.
    """
    _roptim.save(obj, _text(path, "roptim.save"))


def load(path: str | os.PathLike[str]) -> Any:
    """Reads what :func:`save` wrote: the same types and the same bits.

    Loading never runs code from the file; a damaged or altered file is refused.

    Raises
    ------
    CheckpointError
        If the file is not a roptim file, is damaged, or was written by a newer version.
    CheckpointIOError
        If the system refuses the read.
    """
    return _roptim.load(_text(path, "roptim.load"))
