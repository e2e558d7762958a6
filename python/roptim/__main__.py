"""``python -m roptim``: what is here, and what it can run on."""

from __future__ import annotations

import argparse
import sys

import roptim
from roptim.optimizer import REGISTRY


def _list() -> None:
    print(f"{'optimizer':<10} {'state':<48} paper")
    for name, entry in REGISTRY.items():
        state = ["step"] * entry["shows_step"] + entry["slots"]
        print(f"{name:<10} {', '.join(state):<48} {entry['paper']}")


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
