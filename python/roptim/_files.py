"""Saving and loading trees of values."""

from __future__ import annotations

import os
from typing import Any

from roptim import _roptim


def save(obj: Any, path: str | os.PathLike[str]) -> None:
    """Writes a tree of values to a file, completely or not at all.

    The file is a safetensors container with a checksum; any safetensors tool can read its arrays. It is
    written beside the target, synced to the disk and renamed over it: a crash leaves the old file or the
    new one. No pickle is involved.

    Parameters
    ----------
    obj
        None, bool, int (64 bit), float (nan and inf included), str, NumPy scalars, arrays of any numeric
        dtype and layout, and lists, tuples and dicts (keys str or int) of these: for instance
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
    _roptim.save(obj, os.fspath(path))


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
    return _roptim.load(os.fspath(path))
