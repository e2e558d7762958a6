"""``python -m roptim``: what is here, and what it can run on."""

from __future__ import annotations

import argparse
import sys

import roptim
from roptim.optimizer import REGISTRY


def state_bytes(name: str) -> float:
    """Bytes of optimizer state per float32 element, measured on a square matrix after one step."""
    import numpy as np

    side = 64
    p, g = np.zeros((side, side), np.float32), np.ones((side, side), np.float32)
    rows = roptim.SparseGrad(np.arange(side), g, g.shape)
    opt = getattr(roptim, name)([p])
    opt.step([rows if REGISTRY[name]["needs_sparse"] else g])
    arrays = [value for value in opt.state[0].values() if isinstance(value, np.ndarray)]
    return sum(array.nbytes for array in arrays) / p.size


def _list() -> None:
    print(f"{'optimizer':<11} {'backends':<9} {'bytes':>6}  {'state':<42} paper")
    for name, entry in REGISTRY.items():
        state = ["step"] * entry["shows_step"] + entry["scalars"] + entry["slots"]
        backends = ", ".join(entry["backends"])
        print(f"{name:<11} {backends:<9} {state_bytes(name):>6.3g}  {', '.join(state):<42} {entry['paper']}")
    print("bytes: of state per float32 element with the default options, on a 64 x 64 matrix")


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
