"""``python -m roptim inspect`` and ``convert``: what is in a checkpoint, and the same in other formats."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from roptim import _roptim, convert
from roptim._errors import CheckpointError, CheckpointIOError, RoptimError, RoptimValueError, refuse
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
    return [*lines, *_tree(state, "", leaves)], whole


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
    return lines, whole


def _array_bytes(value: Any) -> int:
    if isinstance(value, dict):
        return sum(map(_array_bytes, value.values()))
    if isinstance(value, (list, tuple)):
        return sum(map(_array_bytes, value))
    return value.nbytes if isinstance(value, (np.ndarray, np.generic)) else 0


def _text(value: Any) -> str:
    """A key or name of unknown origin: as it is where that is harmless in a terminal."""
    text = str(value)
    return text if isinstance(value, int) or (text.isprintable() and text) else repr(text)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 1]}…"


def _described(array: Any) -> str:
    kind = "array" if isinstance(array, np.ndarray) else "scalar"
    return f"{array.dtype} {kind} {array.shape}, {array.nbytes:,} bytes"


def _is_optimizer(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("state"), dict)
        and isinstance(value.get("param_groups"), list)
        and all(isinstance(group, dict) and isinstance(group.get("params"), list) for group in value["param_groups"])
    )


def _tree(value: Any, indent: str, leaves: bool) -> Iterator[str]:
    """Lines of a value's contents."""
    if _is_optimizer(value):
        yield from _optimizer(value, indent, leaves)
        return
    if not isinstance(value, (dict, list, tuple)):
        yield f"{indent}{_described(value) if _is_array(value) else _short(value)}"
        return
    items: Any = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        name = f"[{key}]" if not isinstance(key, str) else _text(key)
        if _is_array(item):
            yield f"{indent}{name}: {_described(item)}"
        elif isinstance(item, (dict, list, tuple)) and (_array_bytes(item) or _is_optimizer(item) or _is_wide(item)):
            yield f"{indent}{name}:{_of_class(item)}"
            yield from _tree(item, indent + "  ", leaves)
        else:
            yield f"{indent}{name}: {_short(item)}"


def _is_wide(value: Any) -> bool:
    """Whether a dict needs more than a line; a list of numbers is cut."""
    return isinstance(value, dict) and len(repr(value)) > _WIDTH


def _is_array(value: Any) -> bool:
    return isinstance(value, (np.ndarray, np.generic))


def _of_class(value: Any) -> str:
    if not _is_optimizer(value):
        return ""
    about = value.get("roptim")
    if not isinstance(about, dict):
        return " state of an optimizer, without its class"
    counts = f"{about.get('update_count')} updates, {about.get('skip_count', 0)} left out"
    return f" {_text(about.get('optimizer'))}, {counts}"


def _optimizer(value: Mapping[str, Any], indent: str, leaves: bool) -> Iterator[str]:
    """Groups with their hyperparameters, and what is kept for each parameter."""
    about = value.get("roptim")
    about = about if isinstance(about, dict) else {}
    facts, schedules = about.get("parameters", {}), about.get("schedules", {})
    for g, group in enumerate(value["param_groups"]):
        options = ", ".join(
            f"{_text(key)}={_short(option)}" for key, option in group.items() if key not in ("params", "param_names")
        )
        yield f"{indent}group {g}: {options}"
        for name, form in schedules.get(g, {}).items():
            yield f"{indent}  {_text(name)} is a schedule: {_short(form)}"
        names = group.get("param_names") or [f"parameter {i}" for i in group["params"]]
        for i, name in zip(group["params"], names, strict=False):
            fact, state = facts.get(i, {}), value["state"].get(i)
            of = f" {fact.get('dtype')} {fact.get('shape')}" if fact else ""
            if not isinstance(state, dict):
                yield f"{indent}  {_text(name)}{of}: no state"
                continue
            keys = ", ".join(
                f"{_text(key)} {item}" if isinstance(item, (int, float)) else _text(key) for key, item in state.items()
            )
            yield f"{indent}  {_text(name)}{of}: {keys}; {_array_bytes(state):,} bytes"
            if leaves:
                yield from (
                    f"{indent}    {_text(key)}: {_described(item)}" for key, item in state.items() if _is_array(item)
                )


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
    elif kind_out == "JSON":
        _write(target, lambda file: file.write(convert.to_json(tree).encode()))
    elif kind_out == "torch":
        tensors = convert._to_torch_tree(place, tree)
        _write(target, lambda file: _torch(place).save(tensors, file))
    else:
        arrays = dict(_named_arrays(tree, ""))
        _write(target, lambda file: np.savez(file, **arrays))


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


def _write(path: str, fill: Callable[[Any], Any]) -> None:
    """A file of another format, in place once it is written."""
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "xb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise CheckpointIOError(f"{path}: the file could not be written: {error}") from error
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)
