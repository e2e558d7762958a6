"""Counts the instructions of a step of small tensors, whose time is nearly all fixed cost.

    python benches/fixed_cost.py            # count, beside the record
    python benches/fixed_cost.py --check    # fail where a count is above the record's
    python benches/fixed_cost.py --write    # record the counts

A count repeats on a busy machine where a time does not. Each scenario runs twice under valgrind, with STEPS and with
twice as many steps; the difference has nothing of what happens once. The scenarios are in ``fixed_cost.rs`` (the
engine, built here with cargo) and ``fixed_cost_steps.py`` (from Python, with the roptim that ``--python`` has). What
the counts depend on and what they do not show: ``README.md`` beside this file.

Exit codes: 0, 1 where a check failed, 2 where nothing could be counted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RECORD = HERE / "record" / "fixed-cost.json"
#: Steps of the shorter run.
STEPS = 200
#: Most that a count may be above or below the recorded one, in percent.
TOLERANCE = {"engine": 3.0, "python": 5.0}
#: valgrind knows no AVX-512.
ISA = "avx2"
#: Threads of BLAS wait for each other by spinning, and hashes of strings are random: neither repeats.
SETTINGS = {
    "ROPTIM_ISA": ISA,
    "PYTHONHASHSEED": "0",
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}
#: What programs need to be found and to start; nothing else is taken over.
TAKEN_OVER = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "SYSTEMROOT")


class Unable(Exception):
    """Nothing can be counted, and why."""


@dataclass(frozen=True)
class Scenario:
    """A program that takes a number of steps as its last argument."""

    name: str
    #: Which of the record's tolerances and facts apply: ``engine`` or ``python``.
    kind: str
    command: tuple[str, ...]


# ---- counting -------------------------------------------------------------------------------------------


def output(command: Sequence[str], what: str) -> subprocess.CompletedProcess[str]:
    """What a program to be counted wrote; an error that says what it was for where it failed."""
    return ran(command, what, SETTINGS | {name: os.environ[name] for name in TAKEN_OVER if name in os.environ})


def ran(command: Sequence[str], what: str, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """What a command wrote."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=HERE.parent)
    except OSError as error:
        raise Unable(f"{what}: {error}") from error
    if done.returncode:
        raise Unable(f"{what}: `{' '.join(command)}` ended with {done.returncode}\n{done.stderr[-2000:]}")
    return done


def found_valgrind() -> str:
    """The program, or an error that says how to get it."""
    path = shutil.which("valgrind")
    if path is None:
        raise Unable("fixed_cost.py needs valgrind, which is not on the PATH; Debian's package is `valgrind`.")
    return path


def counted(valgrind: str, command: Sequence[str]) -> int:
    """Instructions of a whole run."""
    tool = ("--tool=cachegrind", "--cache-sim=no", f"--cachegrind-out-file={os.devnull}")
    report = output([valgrind, *tool, *command], "counting").stderr
    total = re.search(r"\bI\s+refs:\s+([\d,]+)", report)
    if total is None:
        raise Unable(f"valgrind reported no count of instructions:\n{report[-2000:]}")
    return int(total[1].replace(",", ""))


def per_step(valgrind: str, scenario: Scenario) -> float:
    """Instructions of one step."""
    once, twice = (counted(valgrind, [*scenario.command, str(steps)]) for steps in (STEPS, 2 * STEPS))
    return (twice - once) / STEPS


def built() -> str:
    """Compiles ``fixed_cost.rs`` in the release profile; its path."""
    command = ["cargo", "build", "--release", "--bench", "fixed_cost", "--message-format=json-render-diagnostics"]
    try:
        # With the user's environment, which may say where cargo builds and with what.
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=HERE.parent)
    except OSError as error:
        raise Unable(f"building fixed_cost.rs: {error}") from error
    messages = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    paths = [m["executable"] for m in messages if m.get("target", {}).get("name") == "fixed_cost" and m["executable"]]
    if done.returncode or not paths:
        raise Unable("fixed_cost.rs could not be built; cargo says why above.")
    return str(paths[-1])


def engine(valgrind: str) -> tuple[list[Scenario], dict[str, str]]:
    """The scenarios of the engine, and what their counts depend on."""
    program = built()
    compiler = ran([os.environ.get("RUSTC", "rustc"), "-vV"], "asking for rustc's version", os.environ).stdout
    facts = dict(line.split(": ", 1) for line in compiler.splitlines() if ": " in line)
    names = output([program], "asking for scenarios").stdout.splitlines()
    described = {
        "target": os.environ.get("CARGO_BUILD_TARGET", facts["host"]),
        "instruction_set": output([valgrind, program, "isa"], "asking for the instruction set").stdout.strip(),
        "rustc": facts["release"],
        "libc": " ".join(platform.libc_ver()).strip() or platform.system(),
        "valgrind": output([valgrind, "--version"], "asking for valgrind's version").stdout.strip(),
    }
    return [Scenario(name, "engine", (program, name)) for name in names], described


def from_python(python: str) -> tuple[list[Scenario], dict[str, str]]:
    """The scenarios that step from Python, and what their counts depend on."""
    script = str(HERE / "fixed_cost_steps.py")
    try:
        # This run also leaves compiled modules behind, so that no counted one compiles them.
        told = json.loads(output([python, script], "importing roptim from Python").stdout)
    except Unable as error:
        raise Unable(f"{error}\n`make build` installs roptim; --no-python leaves these scenarios out.") from error
    return [Scenario(name, "python", (python, script, name)) for name in told["scenarios"]], told["versions"]


# ---- comparing ------------------------------------------------------------------------------------------


def skipped(kind: str, old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """Why counts of this kind are not to be compared."""
    for name in ("target", "instruction_set"):
        if old["engine"][name] != new["engine"][name]:
            label = name.replace("_", " ")
            return f"the record was taken with the {label} {old['engine'][name]}, this is {new['engine'][name]}"
    if kind == "python":
        for name, label in (("python", "CPython"), ("numpy", "NumPy")):
            if old["python"][name] != new["python"][name]:
                return f"the record was taken with {label} {old['python'][name]}, this is {new['python'][name]}"
    return None


def doubts(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    """What is different and may, but need not, change counts."""
    for name in ("rustc", "libc", "valgrind"):
        if old["engine"][name] != new["engine"][name]:
            yield f"The record was taken with {name} {old['engine'][name]}, this is {new['engine'][name]}."


def judged(name: str, kind: str, count: float, recorded: float) -> tuple[str | None, bool]:
    """A sentence where the count is not the recorded one, and whether it is a failure."""
    percent, allowed = 100 * (count / recorded - 1), TOLERANCE[kind]
    sentence = f"{name}: {count:,.0f} instructions per step, {abs(percent):.1f} %"
    if percent > allowed:
        return f"{sentence} above the recorded {recorded:,.0f}; at most {allowed:g} % is allowed.", True
    if percent < -allowed:
        return f"{sentence} below the recorded {recorded:,.0f}; run `make bench-record-counts` to keep the gain.", False
    return None, False


def failures(scenarios: list[Scenario], old: dict[str, Any], new: dict[str, Any], all_counted: bool) -> int:
    """Compares and says what is to be said; how many counts are wrong."""
    wrong = 0
    for doubt in doubts(old, new):
        print(doubt)
    for kind in TOLERANCE:
        mine = [scenario.name for scenario in scenarios if scenario.kind == kind]
        why = skipped(kind, old, new) if mine else None
        if why is not None:
            print(f"Not compared ({'; '.join(mine)}): {why}.")
            continue
        for name in mine:
            if name not in old["instructions"]:
                print(f"{name}: not in the record; run `make bench-record-counts`.")
                wrong += 1
                continue
            sentence, failed = judged(name, kind, new["instructions"][name], old["instructions"][name])
            wrong += failed
            if sentence is not None:
                print(sentence)
    if all_counted:
        for name in old["instructions"].keys() - new["instructions"].keys():
            print(f"{name}: in the record, but no scenario; run `make bench-record-counts`.")
            wrong += 1
    return wrong


def table(new: dict[str, Any], old: dict[str, Any] | None) -> Iterator[str]:
    """The lines of the counts, beside the recorded ones."""
    recorded = old["instructions"] if old else {}
    yield f"{'instructions per step':<45}{'now':>12}{'recorded':>12}{'change':>9}"
    for name, count in new["instructions"].items():
        line = f"{name:<45}{count:>12,.0f}"
        if name in recorded:
            line += f"{recorded[name]:>12,.0f}{100 * (count / recorded[name] - 1):>+8.1f}%"
        yield line


# ---- command line ---------------------------------------------------------------------------------------


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help="compare with the record; exit code 1 where it is worse")
    action.add_argument("--write", action="store_true", help="write the record")
    parser.add_argument("--record", type=Path, default=RECORD, help=f"(default {RECORD.relative_to(HERE.parent)})")
    parser.add_argument("--only", default="", metavar="TEXT", help="scenarios with this in their names")
    parser.add_argument("--no-python", action="store_true", help="the engine alone")
    parser.add_argument("--python", default=sys.executable, help="interpreter that has roptim (default: this one)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="scenarios at a time (default: all cores)")
    options = parser.parse_args(arguments)
    if options.write and (options.only or options.no_python):
        parser.error("--write records all scenarios: leave --only and --no-python out")
    return options


def run(options: argparse.Namespace) -> int:
    """Counts, shows, compares or records; the exit code."""
    old = json.loads(options.record.read_text(encoding="utf-8")) if options.record.exists() else None
    if options.check and old is None:
        raise Unable(f"{options.record} does not exist; `make bench-record-counts` writes it.")
    valgrind = found_valgrind()
    scenarios, facts = engine(valgrind)
    new: dict[str, Any] = {"steps": STEPS, "engine": facts}
    if not options.no_python:
        more, new["python"] = from_python(options.python)
        scenarios += more
    chosen = [scenario for scenario in scenarios if options.only in scenario.name]
    if not chosen:
        raise Unable(f"No scenario has {options.only!r} in its name.")
    with ThreadPoolExecutor(max(1, options.jobs)) as pool:
        counts = pool.map(lambda scenario: round(per_step(valgrind, scenario), 1), chosen)
        new["instructions"] = {scenario.name: count for scenario, count in zip(chosen, counts, strict=True)}
    print("\n".join(table(new, old)))
    if options.write:
        options.record.write_text(json.dumps(new, indent=1) + "\n", encoding="utf-8")
        print(f"Written to {options.record}.")
    if options.check and old is not None:
        wrong = failures(chosen, old, new, all_counted=not (options.only or options.no_python))
        print(f"{wrong} failed." if wrong else "No compared count is above the record's.")
        return int(wrong > 0)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """The exit code."""
    try:
        return run(parse(arguments))
    except Unable as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
