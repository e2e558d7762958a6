"""Every optimizer of the engine, as data."""

from __future__ import annotations

from typing import Any

from roptim import _roptim

#: By class name.
REGISTRY: dict[str, dict[str, Any]] = {entry["name"]: entry for entry in _roptim.registry()}


def classes_with(key: str) -> list[str]:
    """The optimizers that have a hyperparameter."""
    return [name for name, entry in REGISTRY.items() if key in entry["defaults"]]
