"""``python -m roptim``: what is here, and what it can run on."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import numpy as np

import roptim
from roptim.optimizer import REGISTRY


def state_bytes(name: str) -> float:
    """Bytes of optimizer state per float32 element, measured on a square matrix after one step."""
    side = 64
    p, g = np.zeros((side, side), np.float32), np.ones((side, side), np.float32)
    rows = roptim.SparseGrad(np.arange(side), g, g.shape)
    opt = getattr(roptim, name)([p])
    if REGISTRY[name]["needs_closure"]:
        opt.step(lambda: (float(np.sum(p)), [g]))
    else:
        opt.step([rows if REGISTRY[name]["needs_sparse"] else g])
    return sum(map(_bytes, opt.state[0].values())) / p.size


def _bytes(value: Any) -> int:
    if isinstance(value, list):
        return sum(map(_bytes, value))
    return value.nbytes if isinstance(value, np.ndarray) else 0


def state_names(entry: dict[str, Any]) -> str:
    """Keys of the state of an optimizer of the registry."""
    return ", ".join(["step"] * entry["shows_step"] + entry["scalars"] + entry["slots"] + entry["joint"])


def _list() -> None:
    rows = [("optimizer", "backends", "bytes", "state", "paper")]
    for name, entry in REGISTRY.items():
        bytes_ = f"{state_bytes(name):.3g}"
        rows.append((name, ", ".join(entry["backends"]), bytes_, state_names(entry), entry["paper"]))
    names, backends = (max(len(row[k]) for row in rows) for k in (0, 1))
    for name, where, bytes_, state, paper in rows:
        print(f"{name:<{names}} {where:<{backends}} {bytes_:>6}  {state:<42} {paper}")
    print("bytes: of state per float32 element with the default options, on a 64 x 64 matrix; LBFGS: 8 more for")
    print("each pair it remembers, at most history_size")


def _devices() -> None:
    for device in roptim.devices():
        note = " (only with allow_software=True)" if device.software else ""
        print(f"{device.backend:<8} {device.kind:<11} {device.name}  {device.driver}{note}")


def main(arguments: list[str] | None = None) -> int:
    """Runs one command."""
    parser = argparse.ArgumentParser(prog="python -m roptim", description=__doc__)
    parser.add_argument("--version", action="version", version=f"roptim {roptim.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="every optimizer with its state and paper").set_defaults(run=_list)
    commands.add_parser("devices", help="every device that steps can run on").set_defaults(run=_devices)
    parser.parse_args(arguments).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
