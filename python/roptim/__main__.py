"""``python -m roptim``: what is here, and what it can run on."""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import sys
from typing import Any

import numpy as np

import roptim
from roptim import schedules
from roptim._gallery import UPDATES, examples, printable, text_plot
from roptim._inspect import convert_file, inspect
from roptim.optimizer import REGISTRY
from roptim.schedules import Schedule


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


def _list(options: argparse.Namespace) -> None:
    rows = [("optimizer", "backends", "bytes", "state", "paper")]
    for name, entry in REGISTRY.items():
        bytes_ = f"{state_bytes(name):.3g}"
        rows.append((name, ", ".join(entry["backends"]), bytes_, state_names(entry), entry["paper"]))
    names, backends = (max(len(row[k]) for row in rows) for k in (0, 1))
    for name, where, bytes_, state, paper in rows:
        print(f"{name:<{names}} {where:<{backends}} {bytes_:>6}  {state:<42} {paper}")
    print("bytes: of state per float32 element with the default options, on a 64 x 64 matrix; LBFGS: 8 more for")
    print("each pair it remembers, at most history_size")


def _devices(options: argparse.Namespace) -> None:
    for device in roptim.devices():
        note = " (only with allow_software=True)" if device.software else ""
        print(f"{device.backend:<8} {device.kind:<11} {device.name}  {device.driver}{note}")
        if device.api:
            sizes = (device.max_buffer_bytes, device.max_binding_bytes)
            buffer, window = (f"{size / 2**20:,.0f} MiB" for size in sizes)
            print(f"{'':<20} {device.api}; buffers up to {buffer}, windows up to {window}")


def _end(schedule: Schedule) -> int:
    """The update to show a schedule to: its length, or what the examples are made for."""
    return UPDATES if schedule.length is None else schedule.length


def _describe(call: str, schedule: Schedule, updates: int | None) -> None:
    last = _end(schedule) if updates is None else updates - 1
    length = "without end" if schedule.length is None else f"length {schedule.length}"
    print(call)
    print(f"{length}; {schedule(0):.4g} at update 0, {schedule(last):.4g} at update {last}")
    print(printable(text_plot(schedule, last + 1), sys.stdout.encoding))


def _schedules(options: argparse.Namespace) -> None:
    if options.json is not None:
        schedule = Schedule.from_json(options.json)
        _describe(schedules._text(json.loads(schedule.to_json())), schedule, options.updates)
        return
    if options.name is not None:
        shown = [example for example in examples() if re.search(rf"\b{options.name}\(", example.call)]
        for i, (call, schedule) in enumerate(shown):
            print(end="\n" * (i > 0))
            _describe(call, schedule, options.updates)
        return
    for call, schedule in examples():
        ends = f"{schedule(0):.3g} to {schedule(_end(schedule)):.3g}"
        print(f"{printable(schedule.sparkline(), sys.stdout.encoding)}  {ends:<15} {call}")
    print(f"values: of update 0 and at the end, or of update {UPDATES} where there is none")


def _inspect(options: argparse.Namespace) -> int:
    lines, whole = inspect(options.path, options.all)
    print("\n".join(printable(line, sys.stdout.encoding) for line in lines))
    return 0 if whole else 1


def _convert(options: argparse.Namespace) -> None:
    names = None if options.names is None else options.names.split(",")
    convert_file(options.source, options.target, names)
    print(f"{options.target}: {os.path.getsize(options.target):,} bytes")


def _whole_number(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if not 1 <= number < 2**64:
        raise argparse.ArgumentTypeError(f"must be a whole number >= 1, got {text}")
    return number


def main(arguments: list[str] | None = None) -> int:
    """Runs one command."""
    parser = argparse.ArgumentParser(prog="python -m roptim", description=__doc__)
    parser.add_argument("--version", action="version", version=f"roptim {roptim.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="every optimizer with its state and paper").set_defaults(run=_list)
    commands.add_parser("devices", help="every device that steps can run on").set_defaults(run=_devices)
    about = "every schedule with its curve; of one function, or of a schedule's text, a larger one"
    drawn = commands.add_parser("schedules", help=about, description=about)
    which = drawn.add_mutually_exclusive_group()
    names = [name for name in schedules.__all__ if name != "Schedule"]
    which.add_argument("name", nargs="?", choices=names, metavar="NAME", help="a function of roptim.schedules")
    which.add_argument("--json", metavar="TEXT", help="the text form of a schedule, as Schedule.to_json returns it")
    drawn.add_argument("--updates", type=_whole_number, metavar="N", help="how many updates the larger curves show")
    drawn.set_defaults(run=_schedules)
    about = "what is in a checkpoint, or a directory of them: tree, shapes, bytes, hyperparameters, checksum"
    seen = commands.add_parser("inspect", help=about, description=f"{about}. Exit code 1 if something is damaged.")
    seen.add_argument("path", metavar="FILE", help="a checkpoint, or the directory of a Checkpointer")
    seen.add_argument("--all", action="store_true", help="each array of each parameter's state, too")
    seen.set_defaults(run=_inspect)
    about = "a checkpoint in another format, each known by its suffix"
    text = f"{about}: .json, .npz (arrays alone), .pt and .pth of torch; any other is a checkpoint of roptim."
    other = commands.add_parser("convert", help=about, description=text)
    other.add_argument("source", metavar="FROM", help="the file to read")
    other.add_argument("target", metavar="TO", help="the file to write")
    other.add_argument("--names", metavar="A,B,…", help="names of the parameters in a file of torch, in its order")
    other.set_defaults(run=_convert)
    options = parser.parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Papers have names that not every terminal has letters for.
        sys.stdout.reconfigure(errors="replace")
    try:
        code = options.run(options)
        sys.stdout.flush()
    except roptim.RoptimError as error:
        parser.error(str(error))
    except BrokenPipeError:
        # The reader has seen enough (| head). What is left goes nowhere, or Python would complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code or 0


if __name__ == "__main__":
    sys.exit(main())
