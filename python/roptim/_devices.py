"""The devices of this machine, and the choice between them."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from roptim import _roptim
from roptim._errors import DeviceError, DeviceLostError, ForkedGpuError, NoAdapterError, OutOfMemoryError
from roptim._values import word


class Device(NamedTuple):
    """One device that steps can run on."""

    #: What ``backend=`` takes to choose it; the device itself does, too.
    backend: str
    #: Its name.
    name: str
    #: ``"cpu"``, ``"discrete"``, ``"integrated"``, ``"virtual"``, ``"software"`` or ``"other"``.
    kind: str
    #: Its driver; threads and instruction set of the CPU.
    driver: str
    #: Whether it is used only with ``allow_software=True``.
    software: bool
    #: ``"vulkan"``, ``"metal"`` or ``"dx12"``; empty for the CPU.
    api: str
    #: Bytes of the largest buffer; 0 for the CPU, as the next.
    max_buffer_bytes: int
    #: Bytes that one binding may span. Parameters longer than this are updated in several windows.
    max_binding_bytes: int


def devices() -> list[Device]:
    """Every device that steps can run on, the CPU first, then adapters from best to worst.

    Asking starts the graphics driver; importing roptim does not.
    """
    return [Device(*fields) for fields in _roptim.devices()]


def selected(place: str, backend: Any) -> str:
    """The text that chooses a backend."""
    if isinstance(backend, Device):
        return backend.backend
    return word(place, "backend", '"cpu", "gpu", "auto" or a Device', backend)


#: What was measured: seconds of a step on the CPU and on the GPU, and its name; by what chooses the GPU, elements, and
#: whether they are Parameters.
_measured: dict[tuple[tuple[str, ...], bool, int, bool], tuple[float, float, str]] = {}
#: The largest size that is measured; times grow in proportion beyond it.
_MOST_MEASURED = 1 << 22


def fastest(place: str, elements: int, parameters: bool, allow_software: bool) -> str:
    """``"cpu"`` or ``"gpu"``, whichever does AdamW's step on so many float32 elements in less time.

    Measured once in a process for each power of two, with gradients from the host each time and, as a loop in NumPy
    needs them, the parameters back at the host. What was chosen is logged, once for each choice.
    """
    size = min(1 << max(10, math.ceil(math.log2(max(1, elements)))), _MOST_MEASURED)
    chosen_by = tuple(os.environ.get(name, "") for name in ("ROPTIM_ADAPTER", "ROPTIM_ALLOW_SOFTWARE"))
    key = (chosen_by, allow_software, size, parameters)
    if key not in _measured:
        try:
            name = _engine("gpu", allow_software).device
            on_gpu = _step_time("gpu", size, parameters, allow_software)
        except (NoAdapterError, ForkedGpuError, DeviceError, DeviceLostError, OutOfMemoryError) as error:
            return _said("cpu", f'{place}: backend="auto" chose the CPU: no GPU can be used here ({error})')
        on_cpu = _step_time("cpu", size, parameters, allow_software)
        _measured[key] = (on_cpu, on_gpu, name)
    on_cpu, on_gpu, name = _measured[key]
    chosen, winner = ("cpu", "the CPU") if on_cpu <= on_gpu else ("gpu", name)
    took = f"takes {1e3 * on_cpu:.3g} ms on the CPU, {1e3 * on_gpu:.3g} ms on {name}"
    return _said(chosen, f'{place}: backend="auto" chose {winner}: a step on {size} elements {took}')


_said_before: set[str] = set()


def _said(choice: str, sentence: str) -> str:
    if choice not in _said_before:
        _said_before.add(choice)
        # Loaded where it is needed: importing roptim stays fast.
        import logging

        logging.getLogger("roptim").warning(sentence)
    return choice


def _engine(backend: str, allow_software: bool) -> _roptim.Engine:
    """AdamW, around which nobody's hooks are called."""
    from roptim._groups import OPTIONS

    return _roptim.Engine("AdamW", **{**OPTIONS, "backend": backend, "allow_software": allow_software})


def _step_time(backend: str, elements: int, parameters: bool, allow_software: bool) -> float:
    """Seconds of a step, the median of a few."""
    from roptim._parameter import Parameter

    values, gradient = np.ones(elements, np.float32), np.full(elements, 1e-3, np.float32)
    engine = _engine(backend, allow_software)
    engine.add_group({}, [Parameter(values) if parameters else values], None)

    def step() -> None:
        engine.step([gradient])
        engine.sync()

    return _median_time(step)


def _median_time(run: Callable[[], object], rounds: int = 5) -> float:
    run()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return sorted(times)[rounds // 2]
