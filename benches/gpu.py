"""Times steps on a GPU: against a copy on the same device, the CPU backend, and torch's CUDA optimizers.

    python benches/gpu.py                                   # the best GPU
    python benches/gpu.py --allow-software --quick          # a software adapter: that it works, no speed
    python benches/gpu.py --elements 1073741824             # one tensor of 1 Gi elements

Four tables: every optimizer on one tensor, with the bytes it moves set against a copy measured in the same run; a
fixed number of elements in 1, 100 and 10,000 tensors; where parameters and gradients live; and from which size on
a GPU is faster than the CPU backend. ``gpu.json`` holds every round. Where the interpreter has torch with CUDA, its
fused and foreach forms stand beside. How to read them: ``README.md`` beside this file.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import roptim
from roptim.optimizer import REGISTRY

#: Sizes of the search for the crossover.
SIZES = [2**k for k in range(8, 27, 2)]


class Bench:
    """One device and how long a measurement may take."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.backend = options.device
        self.allow_software = options.allow_software
        self.rounds, self.seconds = options.rounds, options.seconds
        self.where = {"backend": self.backend, "allow_software": self.allow_software}
        self.torch = _torch()
        name = roptim.SGD([np.ones(1, np.float32)], **self.where).device
        self.device = next(device for device in roptim.devices() if device.name == name)
        self.is_software = self.device.software

    def wait(self) -> None:
        """Until the device has done all it was given."""
        roptim.gpu.synchronize(self.backend, allow_software=self.allow_software)

    def array(self, n: int, value: float = 1e-3) -> Any:
        """Numbers on the device."""
        return roptim.gpu.array(np.full(n, value, np.float32), self.backend, allow_software=self.allow_software)

    def times(self, entrants: dict[str, tuple[Callable[[], object], Callable[[], object]]]) -> dict[str, list[float]]:
        """Seconds of one call of each entrant, by round: in turns, each as often as fills its time, then waited for."""
        counts = {}
        for name, (call, wait) in entrants.items():
            call()
            wait()
            start = time.perf_counter()
            call()
            wait()
            counts[name] = max(1, min(200, int(self.seconds / max(time.perf_counter() - start, 1e-6))))
        rounds: dict[str, list[float]] = {name: [] for name in entrants}
        for _ in range(self.rounds):
            for name, (call, wait) in entrants.items():
                start = time.perf_counter()
                for _ in range(counts[name]):
                    call()
                wait()
                rounds[name].append((time.perf_counter() - start) / counts[name])
        return rounds


def _torch() -> Any:
    try:
        import torch
    except ImportError:
        return None
    return torch if torch.cuda.is_available() else None


def median_ratio(a: list[float], b: list[float]) -> float:
    """a/b, round by round."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def table(title: str, head: list[str], rows: list[list[str]]) -> None:
    """Prints columns."""
    widths = [max(len(row[k]) for row in [head, *rows]) for k in range(len(head))]
    print(f"\n{title}\n")
    for row in [head, *rows]:
        print(
            "  ".join(
                f"{cell:<{width}}" if k == 0 else f"{cell:>{width}}"
                for k, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
        )


def shape_of(name: str, n: int) -> tuple[int, ...]:
    """One tensor's shape; matrices where the optimizer asks for them."""
    side = math.isqrt(n)
    return (side, side) if name in ("Muon", "Adafactor") else (n,)


def resident(bench: Bench, name: str, n: int, **hypers: Any) -> tuple[Any, Any]:
    """An optimizer whose parameter and gradient lie on the device."""
    shape = shape_of(name, n)
    p = roptim.Parameter(np.ones(shape, np.float32))
    g = roptim.gpu.array(np.full(shape, 1e-3, np.float32), bench.backend, allow_software=bench.allow_software)
    opt = getattr(roptim, name)([p], **bench.where, **hypers)
    p.grad = g
    opt.step()
    return opt, p


def moved_bytes(opt: Any, p: Any) -> float:
    """Bytes per element of a step that touches everything once: gradient read, parameter and state read and written."""
    state = sum(value.nbytes for value in opt.state[p].values() if isinstance(value, np.ndarray))
    return 12 + 2 * state / p.size


def torch_steps(torch: Any, name: str, n: int) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """torch's forms of an optimizer on its device."""
    steps: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {}
    for mode in ("fused", "foreach", None):
        if mode is None and steps:
            continue
        p = torch.nn.Parameter(torch.ones(shape_of(name, n), device="cuda"))
        p.grad = torch.full_like(p, 1e-3)
        try:
            opt = getattr(torch.optim, name)([p], **({mode: True} if mode else {}))
            opt.step()
        except (AttributeError, TypeError, RuntimeError, ValueError):
            continue
        steps[f"torch {mode or 'default'}"] = (opt.step, torch.cuda.synchronize)
    return steps


def rules(bench: Bench, n: int, record: dict[str, Any]) -> None:
    """Every optimizer with a GPU form on one tensor that lies on the device."""
    source, target = bench.array(n), bench.array(n)

    def copy() -> None:
        target[...] = source

    copies = {"copy": (copy, bench.wait)}
    if bench.torch is not None:
        # The driver's Vulkan copies may be slower than CUDA's: the faster one is the yardstick.
        theirs, ours = (bench.torch.ones(n, device="cuda") for _ in range(2))
        copies["CUDA copy"] = (lambda: theirs.copy_(ours), bench.torch.cuda.synchronize)

    rows, found = [], {}
    for name, entry in REGISTRY.items():
        if "gpu" not in entry["backends"] or entry["needs_closure"]:
            continue
        for title, hypers in [(name, {}), *([("AdamW, clip_norm", {"clip_norm": 1.0})] if name == "AdamW" else [])]:
            # Muon computes far more than it moves: a smaller matrix is long enough.
            size = min(n, 2**14 if bench.is_software else 2**22) if name == "Muon" else n
            opt, p = resident(bench, name, size, **hypers)
            entrants = {**copies, "roptim": (opt.step, bench.wait)}
            if bench.torch is not None and not hypers:
                entrants |= torch_steps(bench.torch, name, size)
            times = bench.times(entrants)
            bytes_ = moved_bytes(opt, p) + (4 if hypers else 0)
            yardstick = min((times[key] for key in copies), key=statistics.median)
            of_copy = bytes_ * p.size / 8 / n * median_ratio(yardstick, times["roptim"])
            peers = [
                f"{key} {median_ratio(value, times['roptim']):.2f}x" for key, value in times.items() if "torch" in key
            ]
            seconds = statistics.median(times["roptim"])
            rate = f"{bytes_ * p.size / seconds / 1e9:.1f}"
            rows.append(
                [
                    title,
                    f"{bytes_:.3g}",
                    f"{1e3 * seconds:.3g}",
                    rate,
                    f"{of_copy:.2f}",
                    str(opt._engine.dispatches),
                    ", ".join(peers) or "-",
                ]
            )
            found[title] = {
                "elements": p.size,
                "bytes_per_element": bytes_,
                "of_copy": of_copy,
                "dispatches": opt._engine.dispatches,
                "seconds": times,
            }
    head = ["optimizer", "bytes/element", "ms", "GB/s", "of copy", "dispatches", "roptim faster by"]
    table(f"One tensor of {n:,} elements on the device, beside a copy of as many", head, rows)
    record["rules"] = {"elements": n, "optimizers": found}


def tensors(bench: Bench, n: int, record: dict[str, Any]) -> None:
    """The same elements in few and many tensors, gradients from the host."""
    rows, found = [], {}
    for count in (1, 100, 10_000):
        size = max(1, n // count)
        params = [roptim.Parameter(np.ones(size, np.float32)) for _ in range(count)]
        gradients = [np.full(size, 1e-3, np.float32) for _ in params]
        opt = roptim.AdamW(params, **bench.where)
        cpu = roptim.AdamW([np.ones(size, np.float32) for _ in params])
        entrants = {
            "gpu": (lambda opt=opt, g=gradients: opt.step(g), bench.wait),
            "cpu": (lambda opt=cpu, g=gradients: opt.step(g), lambda: None),
        }
        times = bench.times(entrants)
        found[count] = {"elements": size, "dispatches": opt._engine.dispatches, "seconds": times}
        milliseconds = [f"{1e3 * statistics.median(times[key]):.3g}" for key in ("gpu", "cpu")]
        rows.append([f"{count:,} x {size:,}", *milliseconds, str(opt._engine.dispatches)])
    table(
        "AdamW, Parameters on the device, gradients from the host", ["tensors", "GPU ms", "CPU ms", "dispatches"], rows
    )
    record["tensors"] = found


def ways(bench: Bench, n: int) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """AdamW on one tensor, wherever parameters and gradients live."""
    g = np.full(n, 1e-3, np.float32)
    cpu, plain = roptim.AdamW([np.ones(n, np.float32)]), roptim.AdamW([np.ones(n, np.float32)], **bench.where)
    loop = roptim.AdamW([roptim.Parameter(np.ones(n, np.float32))], **bench.where)
    sent = roptim.AdamW([roptim.Parameter(np.ones(n, np.float32))], **bench.where)
    stays, _ = resident(bench, "AdamW", n)

    def read_back() -> None:
        loop.step([g])
        loop.sync()

    return {
        "CPU backend": (lambda: cpu.step([g]), lambda: None),
        "plain arrays": (lambda: plain.step([g]), bench.wait),
        "Parameter, read back": (read_back, bench.wait),
        "Parameter": (lambda: sent.step([g]), bench.wait),
        "Parameter and gradient": (stays.step, bench.wait),
    }


def residence(bench: Bench, sizes: list[int], record: dict[str, Any]) -> None:
    """Where things live, over sizes; and from which on the GPU is faster."""
    rows, found = [], {}
    crossover: dict[str, int | None] = {}
    for n in sizes:
        times = bench.times(ways(bench, n))
        found[n] = times
        faster = {key: median_ratio(times["CPU backend"], value) for key, value in times.items()}
        for key, ratio in faster.items():
            # The size from which on it stays faster.
            crossover[key] = None if ratio <= 1 else crossover.get(key) or n
        rows.append(
            [
                f"{n:,}",
                f"{1e3 * statistics.median(times['CPU backend']):.3g}",
                *(f"{faster[key]:.2f}x" for key in list(faster)[1:]),
            ]
        )
    head = ["elements", "CPU ms", *(list(found[sizes[0]])[1:])]
    table("AdamW: how much faster than the CPU backend, by what lies on the device", head, rows)
    del crossover["CPU backend"]
    for key, n in crossover.items():
        print(f"{key}: " + ("never faster in this range" if n is None else f"faster from {n:,} elements on"))
    record["residence"], record["crossover"] = found, crossover


def main() -> None:
    """Runs what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="gpu", help="as backend= of an optimizer")
    parser.add_argument("--allow-software", action="store_true", help="whether a software adapter will do")
    parser.add_argument("--elements", type=int, help="elements of the first table; by default 2^28, 2^22 in software")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.2, help="time of each measurement in a round")
    parser.add_argument("--quick", action="store_true", help="small sizes, three rounds")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.seconds = 3, 0.05
    bench = Bench(options)
    device = bench.device
    n = options.elements or (2**22 if device.software else 2**28)
    n = min(n, 2**20) if options.quick else n
    sizes = [s for s in SIZES if s <= (2**16 if options.quick else 2**22 if device.software else 2**26)]
    record: dict[str, Any] = {
        "device": device._asdict(),
        "machine": {"processor": platform.processor(), "cores": os.cpu_count(), "load": os.getloadavg()},
        "versions": {
            "roptim": roptim.__version__,
            "numpy": np.__version__,
            "torch": getattr(bench.torch, "__version__", None),
        },
        "date": datetime.date.today().isoformat(),
    }
    print(f"{device.name} ({device.kind}, {device.driver}); {os.cpu_count()} cores")
    rules(bench, n, record)
    tensors(bench, min(n, 2**22), record)
    residence(bench, sizes, record)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "gpu.json"
    path.write_text(json.dumps(record, indent=1))
    print(f"\nwritten: {path}")


if __name__ == "__main__":
    main()
