"""The compiled half of the package."""

from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any, Self, final

import numpy as np
from typing_extensions import disjoint_base

__all__ = [
    "DeviceArray",
    "DeviceNorm",
    "Engine",
    "Loading",
    "ParameterBase",
    "Schedule",
    "Series",
    "Snapshot",
    "__version__",
    "_drill",
    "after_fork",
    "anneal_share",
    "before_fork",
    "chain_closed",
    "chain_next",
    "clip_factor",
    "clip_norm_on_device",
    "cycle_scale",
    "devices",
    "dumps",
    "examine",
    "from_json",
    "half_cosine",
    "limit_threads",
    "load",
    "loads",
    "match_parameters",
    "norm",
    "one_cycle",
    "plateau_observe",
    "plateau_reduced",
    "registry",
    "save",
    "synchronize",
    "to_json",
    "triangle",
    "write_file",
]

__version__: str

def registry() -> list[dict[str, Any]]:
    """Every optimizer: name, hyperparameters with defaults and ranges, slots, paper."""

def limit_threads(limit: int | None) -> int | None:
    """Bounds the threads of whatever the calling thread asks for from now on, None for no bound; returns the bound
    before."""

def before_fork() -> None:
    """Waits until no other thread is in an optimizer, and holds those that come up."""

def after_fork(in_child: bool) -> None:
    """Ends what :func:`before_fork` began."""

def _drill(n: int, on_pool: bool) -> int:
    """For tests: the n-th part of work from now on panics, in whichever optimizer; none with 0. With ``on_pool`` only
    parts that the engine's own threads do are counted. Returns how many were left of the drill before."""

def devices() -> list[tuple[str, str, str, str, bool, str, int, int]]:
    """Every device: what chooses it, name, kind, driver, whether it is a software adapter, its interface, and the
    bytes of its largest buffer and binding."""

def norm(arrays: list[Any], p: float, written: bool, place: str) -> float:
    """The p-norm of all arrays together in float64."""

def clip_factor(max_norm: float, norm: float) -> float:
    """What gradients of this norm are multiplied by so that it is at most ``max_norm``."""

def save(object: Any, path: str | PathLike[str], progress: Callable[[int, int], Any] | None) -> None:
    """Writes a tree of values to a file, completely or not at all."""

def load(path: str | PathLike[str], progress: Callable[[int, int], Any] | None) -> Any:
    """Reads what save wrote."""

def examine(path: str | PathLike[str]) -> tuple[Any, str, str, int]:
    """What is in a file, the checksum it states, the one its contents give, and its bytes."""

def to_json(object: Any, place: str) -> str:
    """A tree of values as JSON text, with its exact types."""

def from_json(text: str, place: str) -> Any:
    """The tree of such a text."""

def write_file(path: str | PathLike[str], bytes: bytes) -> None:
    """Writes bytes of another format to a file, completely or not at all."""

@final
class Snapshot:
    """A tree of values; copied, what happens to the arrays later does not change it."""

    def __new__(cls, object: Any, place: str, copied: bool) -> Snapshot: ...

@final
class Series:
    """A directory of checkpoints by step."""

    def __new__(cls, directory: str | PathLike[str], keep: int | None) -> Series: ...
    def steps(self) -> list[int]: ...
    def path(self, step: int) -> Path: ...
    def save(
        self, step: int, snapshot: Snapshot, progress: Callable[[int, int], Any] | None
    ) -> tuple[list[Path], list[str]]: ...
    def load(self, step: int, progress: Callable[[int, int], Any] | None) -> Any: ...
    def latest(self, progress: Callable[[int, int], Any] | None) -> tuple[tuple[int, Any] | None, list[str]]: ...
    def discard_after(self, step: int) -> list[int]: ...

@final
class Loading:
    """A saved state that passed every check of one engine."""

    @property
    def loaded(self) -> tuple[list[int], list[int]]: ...
    @property
    def dropped(self) -> list[str]: ...
    @property
    def groups(self) -> list[int | None]: ...
    @property
    def converted_from(self) -> str | None: ...
    @property
    def kept(self) -> list[str]: ...
    def changed(self) -> list[tuple[int, dict[str, Any], dict[str, Any]]]: ...

def match_parameters(
    place: str,
    ours: list[tuple[list[int], list[str] | None]],
    theirs: list[tuple[list[int], list[str] | None]],
    rules: tuple[bool, bool, dict[str, str], bool],
) -> tuple[dict[int, int], list[int], list[str], list[int | None]]:
    """Which parameter of a saved state goes to which here; what begins anew; what is left out; groups."""

def dumps(object: Any) -> bytes:
    """The bytes of the file that save would write."""

def loads(bytes: bytes) -> Any:
    """The tree in such bytes."""

def chain_next(
    class_name: str, numbers: list[float], values: list[tuple[float, float]], epoch: float, initial: bool
) -> list[float]:
    """The next values of a chainable schedule from each group's (current, base) value."""

def chain_closed(class_name: str, numbers: list[float], bases: list[float], epoch: float) -> list[float]:
    """Its values at an epoch."""

def half_cosine(high: float, low: float, t: float, whole: float) -> float:
    """From ``high`` at 0 to ``low`` at ``whole``, along half a cosine."""

def triangle(t: float, up: float, down: float) -> tuple[float, float]:
    """Number of the cycle, from 1, and height between 0 and 1 of a triangle wave."""

def cycle_scale(mode: str, t: float, cycle: float, gamma: float) -> float:
    """The factor of such a height in a mode of CyclicLR."""

def anneal_share(strategy: str, part: float) -> float:
    """How much of an annealing is done at a part of its way."""

def one_cycle(t: float, total: float, pct_start: float, strategy: str, knots: list[float]) -> float:
    """A one-cycle schedule between the values at its three or four knots."""

def plateau_observe(
    rule: tuple[str, str, float, int, int], memory: tuple[float, int, int], metric: float
) -> tuple[tuple[float, int, int], bool]:
    """What a plateau remembers after a metric, and whether to reduce."""

def plateau_reduced(current: float, factor: float, floor: float, eps: float) -> float:
    """The reduced value of a plateau."""

@final
class Schedule:
    """A schedule as a value."""

    def __new__(cls, json: str) -> Schedule: ...
    def json(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def length(self) -> int | None: ...
    def at(self, t: int) -> float: ...
    def values(self, start: int, n: int) -> np.ndarray[Any, Any]: ...
    def then(self, next: Schedule) -> Schedule: ...
    def times(self, other: Schedule) -> Schedule: ...
    def clip(self, low: float | None, high: float | None) -> Schedule: ...
    def shift(self, by: int) -> Schedule: ...
    def __eq__(self, value: object, /) -> bool: ...
    def __ne__(self, value: object, /) -> bool: ...

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
    def _lend(self, begins: bool) -> None: ...

@disjoint_base
class DeviceArray:
    """Numbers on a device, with a shape."""

    def __new__(cls, data: np.ndarray[Any, Any], selector: str, allow_software: bool) -> Self: ...
    def write(self, data: np.ndarray[Any, Any] | DeviceArray) -> None: ...
    def numpy(self) -> np.ndarray[Any, Any]: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype_name(self) -> str: ...
    @property
    def device(self) -> str: ...

@final
class DeviceNorm:
    """A norm on a device."""

    def value(self) -> float: ...

def synchronize(selector: str, allow_software: bool) -> None:
    """Waits until a device has done all it was given."""

def clip_norm_on_device(arrays: list[DeviceArray], max_norm: float | None, place: str) -> DeviceNorm:
    """Scales arrays on one device so that their common 2-norm is at most ``max_norm``; the norm they had."""

@final
class Engine:
    """An optimizer of the engine with its registered parameters."""

    def __new__(
        cls,
        name: str,
        *,
        backend: str,
        threads: int | None,
        flush_denormals: bool,
        allow_software: bool,
        clip_norm: float | None,
        clip_value: float | None,
        nonfinite: str,
        nonfinite_sync: bool,
    ) -> Engine: ...
    def add_group(
        self, hypers: dict[str, Any], params: list[Any], names: list[str] | None, reserve: bool = True
    ) -> dict[str, Any]: ...
    def reserve(self) -> None: ...
    def release(self) -> None: ...
    def take_over(self, other: Engine) -> None: ...
    def accumulate(self, gradients: list[Any]) -> None: ...
    def clear_sums(self) -> None: ...
    def sync(self) -> None: ...
    def _lose_device(self) -> None: ...
    def check_hypers(self, given: dict[str, Any]) -> None: ...
    def set_hypers(self, group: int, changes: dict[str, Any]) -> dict[str, Any]: ...
    def hypers(self, group: int) -> dict[str, Any]: ...
    def step(
        self,
        gradients: list[Any] | None = None,
        clear: bool = False,
        average: Engine | None = None,
        measures: bool = False,
    ) -> None: ...
    def squares(self) -> list[tuple[float, float, float] | None]: ...
    def minimize(self, evaluate: Callable[[], tuple[float, list[Any] | None]]) -> None: ...
    def state_keys(self, index: int) -> list[str]: ...
    def step_of(self, index: int) -> int: ...
    def set_step_of(self, index: int, step: int) -> None: ...
    def slot(self, index: int, key: str) -> Any: ...
    def set_scalar(self, index: int, key: str, value: float) -> None: ...
    def reset(self, index: int) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def prepare_load(
        self,
        saved: dict[str, Any],
        rules: tuple[bool, bool, dict[str, str], bool] = ...,
        hypers: dict[str, Any] | None = None,
    ) -> Loading: ...
    def load(self, loading: Loading) -> None: ...
    grad_scale: float
    @property
    def has_sums(self) -> bool: ...
    @property
    def dispatches(self) -> int: ...
    @property
    def device_bytes(self) -> int: ...
    @property
    def joint_keys(self) -> list[str]: ...
    @property
    def update_count(self) -> int: ...
    @property
    def skip_count(self) -> int: ...
    @property
    def gradient_norm(self) -> float | None: ...
    @property
    def torn(self) -> bool: ...
    @property
    def device(self) -> str: ...
