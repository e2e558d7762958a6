"""The compiled half of the package."""

from collections.abc import Callable
from typing import Any, Self, final

import numpy as np
from typing_extensions import disjoint_base

__all__ = [
    "Engine",
    "ParameterBase",
    "__version__",
    "cosine_closed",
    "cosine_next",
    "devices",
    "dumps",
    "load",
    "loads",
    "norm",
    "plateau_observe",
    "plateau_reduced",
    "registry",
    "save",
    "step_closed",
    "step_next",
]

__version__: str

def registry() -> list[dict[str, Any]]:
    """Every optimizer: name, hyperparameters with defaults and ranges, slots, paper."""

def devices() -> list[tuple[str, str, str, str, bool]]:
    """Every device: what chooses it, name, kind, driver, and whether it is a software adapter."""

def norm(arrays: list[Any], largest: bool) -> float:
    """The 2-norm of all arrays together in float64, or their largest magnitude."""

def save(object: Any, path: str) -> None:
    """Writes a tree of values to a file, completely or not at all."""

def load(path: str) -> Any:
    """Reads what save wrote."""

def dumps(object: Any) -> bytes:
    """The bytes of the file that save would write."""

def loads(bytes: bytes) -> Any:
    """The tree in such bytes."""

def step_next(current: float, epoch: int, size: int, gamma: float) -> float:
    """The next value of a decay every ``size`` epochs."""

def step_closed(base: float, epoch: int, size: int, gamma: float) -> float:
    """Its value at an epoch."""

def cosine_next(current: float, base: float, epoch: int, initial: bool, t_max: float, eta_min: float) -> float:
    """The next value of a cosine."""

def cosine_closed(base: float, epoch: int, t_max: float, eta_min: float) -> float:
    """Its value at an epoch."""

def plateau_observe(
    rule: tuple[str, str, float, int, int], memory: tuple[float, int, int], metric: float
) -> tuple[tuple[float, int, int], bool]:
    """What a plateau remembers after a metric, and whether to reduce."""

def plateau_reduced(current: float, factor: float, floor: float, eps: float) -> float:
    """The reduced value of a plateau."""

@disjoint_base
class ParameterBase:
    """Array, gradient and flags of a parameter."""

    def __new__(cls, data: np.ndarray[Any, Any], requires_grad: bool = True, name: str | None = None) -> Self: ...
    grad: Any
    requires_grad: bool
    name: str | None
    @property
    def _array(self) -> np.ndarray[Any, Any]: ...
    @property
    def _on_device(self) -> bool: ...
    def _host(self) -> np.ndarray[Any, Any]: ...
    def _host_written(self) -> None: ...

@final
class Engine:
    """An optimizer of the engine with its registered parameters."""

    def __new__(
        cls, name: str, backend: str, threads: int | None, flush_denormals: bool, allow_software: bool
    ) -> Engine: ...
    def add_group(self, hypers: dict[str, Any], params: list[Any], names: list[str] | None) -> dict[str, Any]: ...
    def check_hypers(self, given: dict[str, Any]) -> None: ...
    def set_hypers(self, group: int, changes: dict[str, Any]) -> dict[str, Any]: ...
    def hypers(self, group: int) -> dict[str, Any]: ...
    def step(self, gradients: list[Any] | None = None) -> None: ...
    def minimize(self, evaluate: Callable[[], tuple[float, list[Any] | None]]) -> None: ...
    def state_keys(self, index: int) -> list[str]: ...
    def step_of(self, index: int) -> int: ...
    def set_step_of(self, index: int, step: int) -> None: ...
    def slot(self, index: int, key: str) -> Any: ...
    def set_scalar(self, index: int, key: str, value: float) -> None: ...
    def reset(self, index: int) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, saved: dict[str, Any]) -> None: ...
    @property
    def joint_keys(self) -> list[str]: ...
    @property
    def update_count(self) -> int: ...
    @property
    def torn(self) -> bool: ...
    @property
    def device(self) -> str: ...
