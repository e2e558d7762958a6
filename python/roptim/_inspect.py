"""``python -m roptim inspect`` and ``convert``: what is in a checkpoint, and the same in other formats."""

from __future__ import annotations

import importlib
import io
import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from roptim import _roptim, convert
from roptim._errors import (
    CheckpointError,
    CheckpointIOError,
    RoptimError,
    RoptimTypeError,
    RoptimValueError,
    printable,
    refuse,
)
from roptim._files import load, save

_WIDTH = 72


def inspect(path: str, leaves: bool) -> tuple[list[str], bool]:
    """Lines that show a checkpoint, or a directory of them, and whether all of it is whole."""
    if os.path.isdir(path):
        return _directory(path)
    state, stated, found, size = _roptim.examine(path)
    whole = stated == found
    lines = [path, f"{size:,} bytes, {_array_bytes(state):,} of them in arrays"]
    if whole:
        lines.append(f"checksum {found}, as the file states")
    else:
        lines.append(f"DAMAGED: the file states the checksum {stated}, its contents give {found}")
    view = _View(leaves)
    view.value(state, 0)
    return [printable(line).replace("\n", "\\n") for line in [*lines, *view.lines]], whole


def _directory(path: str) -> tuple[list[str], bool]:
    series = _roptim.Series(path, None)
    lines, whole = [path], True
    for step in series.steps():
        file = series.path(step)
        try:
            _, stated, found, size = _roptim.examine(str(file))
            sound = stated == found
            text = f"{size:>15,} bytes  {'whole' if sound else 'DAMAGED: its checksum is wrong'}"
        except RoptimError as error:
            sound, text = False, f"{'':>15}        {error}"
        whole = whole and sound
        lines.append(f"{file.name}  {text}")
    if len(lines) == 1:
        lines.append("no checkpoints")
    return [printable(line).replace("\n", "\\n") for line in lines], whole


def _array_bytes(value: Any) -> int:
    if isinstance(value, dict):
        return sum(map(_array_bytes, value.values()))
    if isinstance(value, (list, tuple)):
        return sum(map(_array_bytes, value))
    return value.nbytes if isinstance(value, (np.ndarray, np.generic)) else 0


def _short(value: Any) -> str:
    """A value in one line, as Python writes it."""
    text = repr(value)
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 1]}…"


def _described(array: Any) -> str:
    kind = "array" if isinstance(array, np.ndarray) else "scalar"
    return f"{array.dtype} {kind} {array.shape}, {array.nbytes:,} bytes"


def _is_array(value: Any) -> bool:
    return isinstance(value, (np.ndarray, np.generic))


class _View:
    """The lines that show a value. What it holds may come from anywhere, so nothing is taken for granted; whoever
    prints the lines makes them harmless."""

    def __init__(self, leaves: bool) -> None:
        self.leaves = leaves
        self.lines: list[str] = []

    def add(self, depth: int, text: str) -> None:
        self.lines.append("  " * depth + text)

    def value(self, value: Any, depth: int) -> None:
        """What is in a container, or a value by itself."""
        if not isinstance(value, (dict, list, tuple)):
            self.add(depth, _described(value) if _is_array(value) else _short(value))
        elif _is_optimizer(value):
            self.optimizer(value, depth)
        else:
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                self.item(key if isinstance(key, str) else f"[{key}]", item, depth)

    def item(self, name: str, value: Any, depth: int) -> None:
        if _is_array(value):
            self.add(depth, f"{name}: {_described(value)}")
        elif not isinstance(value, (dict, list, tuple)) or _fits_a_line(value):
            self.add(depth, f"{name}: {_short(value)}")
        else:
            self.add(depth, f"{name}:{_class_of(value)}")
            self.value(value, depth + 1)

    def optimizer(self, value: Any, depth: int) -> None:
        """Groups with their hyperparameters, and what is kept for each parameter."""
        about = _dict(value.get("roptim"))
        facts, schedules = _dict(about.get("parameters")), _dict(about.get("schedules"))
        for g, group in enumerate(value["param_groups"]):
            options = (f"{key}={_short(x)}" for key, x in group.items() if key not in ("params", "param_names"))
            self.add(depth, f"group {g}: {', '.join(options)}")
            for name, form in _dict(schedules.get(g)).items():
                self.add(depth + 1, f"{name} is a schedule: {_short(form)}")
            names = group.get("param_names")
            for k, i in enumerate(group["params"]):
                named = isinstance(names, list) and k < len(names)
                self.parameter(
                    names[k] if named else f"parameter {i}", _at(facts, i), _at(value["state"], i), depth + 1
                )

    def parameter(self, name: Any, fact: Any, state: Any, depth: int) -> None:
        of = f" {fact.get('dtype')} {fact.get('shape')}" if isinstance(fact, dict) else ""
        if not isinstance(state, dict):
            self.add(depth, f"{name}{of}: no state")
            return
        keys = (f"{key} {x}" if isinstance(x, (int, float)) else str(key) for key, x in state.items())
        self.add(depth, f"{name}{of}: {', '.join(keys)}; {_array_bytes(state):,} bytes")
        for key, item in state.items() if self.leaves else ():
            if _is_array(item):
                self.add(depth + 1, f"{key}: {_described(item)}")


def _is_optimizer(value: Any) -> bool:
    groups = value.get("param_groups") if isinstance(value, dict) else None
    return (
        isinstance(groups, list)
        and isinstance(value.get("state"), dict)
        and all(isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups)
    )


def _fits_a_line(value: Any) -> bool:
    """Whether a container holds nothing that has lines of its own; a dict must be short, too, a list is cut."""
    is_dict = isinstance(value, dict)
    if is_dict and len(value) > _WIDTH:
        return False
    items = value.values() if is_dict else value
    if any(_is_array(item) or isinstance(item, (dict, list, tuple)) for item in items):
        return False
    return not is_dict or len(repr(value)) <= _WIDTH


def _class_of(value: Any) -> str:
    if not _is_optimizer(value):
        return ""
    about = value.get("roptim")
    if not isinstance(about, dict):
        return " state of an optimizer, without its class"
    return f" {about.get('optimizer')}, {about.get('update_count')} updates, {about.get('skip_count', 0)} left out"


def _dict(value: Any) -> dict[Any, Any]:
    return value if isinstance(value, dict) else {}


def _at(values: dict[Any, Any], key: Any) -> Any:
    return values.get(key) if isinstance(key, int) else None


#: What each suffix is read and written as; any other is a checkpoint.
FORMATS = {".json": "JSON", ".npz": "arrays of NumPy", ".pt": "torch", ".pth": "torch"}


def convert_file(source: str, target: str, names: list[str] | None) -> None:
    """Reads one format, writes another; each is known by its suffix."""
    place = "roptim convert"
    kind_in, kind_out = (FORMATS.get(Path(path).suffix.lower(), "checkpoint") for path in (source, target))
    if kind_in == "torch":
        # Weights alone: torch's own way to load without running what a file says.
        read = _read(source, lambda: _torch(place).load(source, map_location="cpu", weights_only=True))
        tree = convert._from_torch_tree(place, read, names)
    elif kind_in == "JSON":
        tree = convert.from_json(_read(source, lambda: Path(source).read_text(encoding="utf-8")))
    elif kind_in == "checkpoint":
        tree = load(source)
    else:
        tree = _read(source, lambda: dict(np.load(source, allow_pickle=False)))
    if names is not None and kind_in != "torch":
        raise refuse(RoptimValueError, place, "--names", "given with a file of torch", f"one of {kind_in}")
    if kind_out == "checkpoint":
        save(tree, target)
        return
    data = io.BytesIO()
    if kind_out == "JSON":
        data.write(convert.to_json(tree).encode())
    elif kind_out == "torch":
        _torch(place).save(convert._to_torch_tree(place, tree), data)
    else:
        _write_npz(place, tree, data)
    _roptim.write_file(target, data.getvalue())


def _write_npz(place: str, tree: Any, data: io.BytesIO) -> None:
    """The arrays alone. Not by numpy.savez, whose own arguments are names that no array can have."""
    seen: set[str] = set()
    with zipfile.ZipFile(data, "w") as archive:
        for name, array in _named_arrays(tree, ""):
            if name in seen:
                raise refuse(RoptimValueError, place, f"arrays called {name!r}", "one", "two places of that name")
            if array.dtype.isbuiltin != 1:
                raise refuse(RoptimTypeError, place, name, "of a dtype of NumPy's own for .npz", str(array.dtype))
            seen.add(name)
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.asarray(array), allow_pickle=False)


def _named_arrays(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    """The arrays of a tree by their place in it."""
    if _is_array(value):
        yield place or "tensor", value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _named_arrays(item, f"{place}.{key}" if place else str(key))
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from _named_arrays(item, f"{place}.{i}" if place else str(i))


def _torch(place: str) -> Any:
    try:
        return importlib.import_module("torch")
    except ImportError:
        allowed, remedy = "installed to read and write its files", "install it, or use another format"
        raise refuse(RoptimValueError, place, "torch", allowed, "none", remedy) from None


def _read(path: str, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except RoptimError:
        raise
    except OSError as error:
        raise CheckpointIOError(f"{path}: the file could not be read: {error}") from error
    except Exception as error:  # what readers of other libraries raise, of which each has its own
        first = str(error).partition("\n")[0]
        raise CheckpointError(f"{path}: the file could not be read as its suffix says: {first}") from error
