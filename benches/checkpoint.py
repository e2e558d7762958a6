"""Times saving and loading a checkpoint of optimizer state, beside torch and safetensors where they are installed.

    python benches/checkpoint.py                     # 1 GiB
    python benches/checkpoint.py --mib 64 --rounds 3

The state is that of Adam for matrices of 16 MiB. roptim writes a checksum and flushes file and directory to the disk
before it returns, and checks the checksum when it loads. torch.save and safetensors do neither; so each of them is also
timed with the flush that a user would have to add (``+ fsync``). Entrants take turns; what is shown are medians and
ratios to roptim in the same round. ``checkpoint.json`` holds every round.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import roptim

PART = 16 << 20


def made(mib: int) -> dict[str, Any]:
    """The state dict of Adam with so many MiB of moments, which are not all the same."""
    rng = np.random.default_rng(0)
    count = max(1, (mib << 20) // (2 * PART))
    state = {
        i: {"step": 5, **{key: rng.standard_normal(PART // 4, np.float32) for key in ("exp_avg", "exp_avg_sq")}}
        for i in range(count)
    }
    groups = [{"lr": 1e-3, "betas": (0.9, 0.999), "params": list(range(count))}]
    return {"state": state, "param_groups": groups}


def synced(path: Path) -> None:
    """What a user adds to a writer that leaves the file to the operating system."""
    for target in (path, path.parent):
        handle = os.open(target, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def imported(name: str) -> Any:
    """A module, or None where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def entrants(state: dict[str, Any], folder: Path) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """How each saves and loads."""
    found: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {}
    ours = folder / "roptim"
    found["roptim"] = (lambda: roptim.save(state, ours), lambda: roptim.load(ours))
    tensors = imported("safetensors.numpy")
    if tensors is not None:
        flat = {f"{i}.{k}": v for i, entry in state["state"].items() for k, v in entry.items() if k != "step"}
        theirs, durable = folder / "safetensors", folder / "safetensors-fsync"
        found["safetensors"] = (lambda: tensors.save_file(flat, theirs), lambda: tensors.load_file(theirs))
        found["safetensors + fsync"] = (
            lambda: (tensors.save_file(flat, durable), synced(durable)),
            lambda: tensors.load_file(durable),
        )
    torch = imported("torch")
    if torch is not None:
        moments = {
            i: {k: torch.from_numpy(v) if k != "step" else torch.tensor(5.0) for k, v in entry.items()}
            for i, entry in state["state"].items()
        }
        kept = {**state, "state": moments}
        torchs, flushed = folder / "torch", folder / "torch-fsync"
        found["torch"] = (lambda: torch.save(kept, torchs), lambda: torch.load(torchs))
        found["torch + fsync"] = (lambda: (torch.save(kept, flushed), synced(flushed)), lambda: torch.load(flushed))
    return found


def timed(call: Callable[[], object]) -> float:
    """Seconds of one call; what it returns is dropped within them, as a run does with the old state."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def write_speed(folder: Path, mib: int) -> float:
    """Seconds to write as many bytes in one file and flush it: what the disk allows."""
    block = np.random.default_rng(1).bytes(8 << 20)
    start = time.perf_counter()
    with open(folder / "limit", "wb", buffering=0) as file:
        for _ in range(max(1, mib // 8)):
            file.write(block)
        os.fsync(file.fileno())
    return time.perf_counter() - start


def main() -> None:
    """Measures, shows, records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=1024, help="MiB of state (default 1024)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write; by default a temporary folder")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "output")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        state = made(options.mib)
        all_entrants = entrants(state, folder)
        rounds: dict[str, dict[str, list[float]]] = {name: {"save": [], "load": []} for name in all_entrants}
        limit = []
        turns: list[tuple[str, Any]] = list(all_entrants.items())
        for each in range(options.rounds + 1):
            # The first round makes the files and warms up. Each round begins with another entrant: a disk that was just
            # written to is slower.
            limit.append(write_speed(folder, options.mib))
            turns = [*turns[1:], turns[0]]
            for name, (save, load) in turns:
                # What others left to the operating system is not written in this one's time.
                os.sync()
                taken = {"save": timed(save), "load": timed(load)}
                if each:
                    for what, seconds in taken.items():
                        rounds[name][what].append(seconds)
    finally:
        shutil.rmtree(folder)
    print(f"{options.mib} MiB, {options.rounds} rounds; a bare write and flush: {statistics.median(limit[1:]):.2f} s")
    print(f"{'':<22}{'save, s':>9}{'of roptim':>11}{'load, s':>9}{'of roptim':>11}")
    for name, both in rounds.items():
        row = f"{name:<22}"
        for what in ("save", "load"):
            ratio = statistics.median(a / b for a, b in zip(both[what], rounds["roptim"][what], strict=True))
            row += f"{statistics.median(both[what]):>9.2f}{ratio:>10.2f}x"
        print(row)
    options.out.mkdir(parents=True, exist_ok=True)
    versions = {name: getattr(sys.modules.get(name), "__version__", None) for name in ("torch", "safetensors")}
    record = {
        "date": datetime.date.today().isoformat(),
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "system": platform.system()},
        "versions": {
            "roptim": roptim.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
            **versions,
        },
        "mib": options.mib,
        "bare_write_and_flush_seconds": limit[1:],
        "seconds": rounds,
    }
    (options.out / "checkpoint.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
