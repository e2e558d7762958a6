"""Times roptim's steps against torch.optim, NumPy, optax and the machine's limit, in turns, in one run.

    python benches/compare.py                                    # everything; see --help for less
    python benches/compare.py --quick                            # without the large cases
    python benches/compare.py --render benches/output/compare.json --markdown tables.md

Prints one table per case and optimizer, at the end the goals, and writes ``compare.json`` and ``compare.png``. How to
read them, and how to lend the benchmark a torch and an optax from other environments: ``README.md`` beside this file.

This process runs roptim, the NumPy loops and the C loop. torch and optax each have a worker: this file started with
``--worker`` by an interpreter that has them. They exchange one JSON object per line over pipes, and whoever waits for
an answer does nothing else. Only the standard library and NumPy are imported at the top, so that no environment needs
another's packages. What is measured, and against whom, lies in ``peers/``.

Not measured here: GPUs (``gpu.py``), ``torch.compile``, anything but ``step``.
"""

from __future__ import annotations

import argparse
import base64
import datetime
import gc
import importlib.util
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import report
from peers.cases import CASES, OPTIMIZERS, check_registry
from peers.side import WARM_UP_STEPS, RemoteSide, Side, serve

#: A batch, between two looks at the clock, lasts at least this long: a look costs nearly a microsecond.
BATCH_SECS = 2e-4
#: Batches that a turn may have at most.
MOST_BATCHES = 500

#: A mode of torch whose first steps take less than this many times those of its fastest may turn out faster.
NEARLY_BEST = 1.15
#: An entrant whose slowest round takes this many times its fastest is called unsteady.
UNSTEADY = 2.0


# ---- entrants -------------------------------------------------------------------------------------------


class Entrant:
    """One mode of one side."""

    def __init__(self, side: Side | RemoteSide, mode: str) -> None:
        self._side, self._mode = side, mode
        self.batches = self.steps = 1

    def begin(self) -> np.ndarray:
        """Takes the first steps; returns some values of every parameter, float64, one row."""
        begun = self._side.begin(self._mode)
        self.step_secs: float = min(begun["seconds"][1:])
        return np.frombuffer(base64.b64decode(begun["sample"]), np.float64)

    def settle(self, turn_secs: float) -> None:
        """Decides how many batches of how many steps a turn has."""
        if self.step_secs < 10 * BATCH_SECS:
            self.step_secs = min(self._side.run(self._mode, 5, math.ceil(BATCH_SECS / self.step_secs)))
        self.steps = math.ceil(BATCH_SECS / self.step_secs)
        self.batches = max(1, min(MOST_BATCHES, round(turn_secs / (self.steps * self.step_secs))))

    def turn(self) -> float:
        """Seconds of a step: the median of the batches of a turn."""
        return statistics.median(self._side.run(self._mode, self.batches, self.steps))


def sides_for(options: argparse.Namespace) -> dict[str, Side | RemoteSide]:
    """All peers that this machine has, by name, in the order of their turns."""
    from peers.local import NumpySide, RoptimSide

    local: dict[str, Side] = {"roptim": RoptimSide()}
    if "limit" not in options.without and (limit := limit_side()) is not None:
        local["limit"] = limit
    local["numpy"] = NumpySide()
    for side in local.values():
        side.start(options.threads)
    sides: dict[str, Side | RemoteSide] = {**local}
    for name in ("torch", "optax"):
        python = getattr(options, f"{name}_python")
        if name in options.without:
            continue
        if python is None and importlib.util.find_spec(name) is None:
            print(f"{name} is left out: this Python has none, and --{name}-python names no other.\n")
        else:
            sides[name] = RemoteSide(name, python or sys.executable, options.threads)
    return {name: side for name, side in sides.items() if name not in options.without}


def limit_side() -> Side | None:
    """The C loop, if it compiles."""
    from peers.limit import LimitSide, compiled

    try:
        return LimitSide(compiled())
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"The machine's limit is left out: it needs a C compiler with OpenMP, cc ({error}).\n")
        return None


# ---- measuring ------------------------------------------------------------------------------------------


def measure(
    name: str, optimizer: str, options: argparse.Namespace, sides: dict[str, Side | RemoteSide]
) -> dict[str, Any]:
    """The result of one case and optimizer, as written to the JSON file."""
    case, contest, begun = CASES[name], OPTIMIZERS[optimizer], time.perf_counter()
    without = case.without | contest.without
    entrants: dict[str, Entrant] = {}
    for side_name, side in sides.items():
        if side_name not in without:
            for mode in side.setup(name, optimizer):
                entrants[f"{side_name} {mode}".rstrip()] = Entrant(side, mode)
    differences = warm_up(entrants, contest.name)
    for entrant in entrants.values():
        entrant.settle(options.turn_secs)
    rare = slow_ones(entrants, options)
    chosen = spaced(options.slow_rounds, options.rounds)
    rounds = [
        {key: entrant.turn() for key, entrant in entrants.items() if key not in rare or number in chosen}
        for number in range(options.rounds)
    ]
    for side in sides.values():
        side.free()
    return {
        "case": name,
        "case_title": case.title,
        "optimizer": optimizer,
        "kind": contest.kind,
        "dtype": contest.dtype,
        "elements": case.elements,
        "tensors": len(case.shapes),
        "elapsed_secs": round(time.perf_counter() - begun, 1),
        "steps_per_batch": {key: entrant.steps for key, entrant in entrants.items()},
        "batches_per_turn": {key: entrant.batches for key, entrant in entrants.items()},
        "fewer_rounds": rare,
        "without": without,
        "difference": differences,
        **summary(rounds, list(entrants)),
    }


def warm_up(entrants: dict[str, Entrant], optimizer: str) -> dict[str, float | None]:
    """Takes the untimed steps; returns each peer's largest relative difference from roptim after them, or None for
    one that computes something else."""
    from peers.optax_peer import OTHER_FORMULAS

    samples = {name: entrant.begin() for name, entrant in entrants.items()}
    ours = samples.pop("roptim")
    skipped = {"limit", "optax"} if optimizer in OTHER_FORMULAS else {"limit"}
    return {
        name: None if name in skipped else float(np.max(np.abs(theirs - ours) / np.abs(theirs)))
        for name, theirs in samples.items()
    }


def slow_ones(entrants: dict[str, Entrant], options: argparse.Namespace) -> list[str]:
    """Entrants that have a turn in some rounds only, so that a run ends: those with long steps, but for roptim, the
    limit and those of torch's modes that may turn out its best."""
    torch = {name: entrant.step_secs for name, entrant in entrants.items() if name.startswith("torch ")}
    best = min(torch.values(), default=0.0)
    always = {"roptim", "limit", *(name for name, secs in torch.items() if secs < NEARLY_BEST * best)}
    return [
        name for name, entrant in entrants.items() if name not in always and entrant.step_secs > options.slow_step_secs
    ]


def spaced(count: int, rounds: int) -> set[int]:
    """So many rounds of all, evenly spaced."""
    return {int(k) for k in np.linspace(0, rounds - 1, min(count, rounds)).round()}


def summary(rounds: list[dict[str, float]], names: list[str]) -> dict[str, Any]:
    """Seconds per step, and how many times as long as roptim's, by entrant; a round without it has None."""
    seconds = {name: [turn.get(name) for turn in rounds] for name in names}
    ratios = {
        name: [turn[name] / turn["roptim"] if name in turn else None for turn in rounds]
        for name in names
        if name != "roptim"
    }
    spreads = {name: spread(values) for name, values in seconds.items()}
    torch = [name for name in names if name.startswith("torch ")]
    return {
        "seconds": spreads,
        "ratio": {name: spread(values) for name, values in ratios.items()},
        "ratio_of_fastest": {name: spreads[name]["min"] / spreads["roptim"]["min"] for name in ratios},
        "unsteady": [name for name, values in spreads.items() if values["max"] > UNSTEADY * values["min"]],
        "best_torch": min(torch, key=lambda name: spreads[name]["median"], default=None),
    }


def spread(values: list[float | None]) -> dict[str, Any]:
    """Median, extremes and every round."""
    there = [value for value in values if value is not None]
    return {"median": statistics.median(there), "min": min(there), "max": max(there), "rounds": values}


def machine(sides: dict[str, Side | RemoteSide]) -> dict[str, Any]:
    """What the figures were measured on and with."""
    import roptim

    versions = {"python": platform.python_version(), "numpy": np.__version__, "roptim": roptim.__version__}
    for side in sides.values():
        versions |= side.versions
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "versions": versions,
    }


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def compare(options: argparse.Namespace, sides: dict[str, Side | RemoteSide]) -> dict[str, Any]:
    """Measures every case with every optimizer, printing each result when it is there."""
    settings = {key: getattr(options, key) for key in ("threads", "rounds", "turn_secs", "quick")}
    settings |= {key: getattr(options, key) for key in ("slow_rounds", "slow_step_secs")}
    record: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "machine": machine(sides),
        "settings": settings,
        "results": [],
    }
    print(report.heading(record), end="\n\n")
    start = time.perf_counter()
    for name in options.cases:
        for optimizer in options.optimizers:
            if name in OPTIMIZERS[optimizer].cases:
                result = measure(name, optimizer, options, sides)
                gc.collect()
                print("\n".join(report.table(result)), flush=True)
                record["results"].append(result)
                record["elapsed_secs"] = round(time.perf_counter() - start, 1)
                save(record, options.output)  # a run that is broken off keeps what it has measured
    return record


def save(record: dict[str, Any], folder: Path) -> None:
    """Writes compare.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "compare.json").write_text(json.dumps(record, indent=1) + "\n")


# ---- showing --------------------------------------------------------------------------------------------


def show(record: dict[str, Any], options: argparse.Namespace) -> None:
    """Prints the goals; writes the chart where matplotlib is installed, and the tables where asked for."""
    rows = list(report.goals(record["results"]))
    if len(rows) > 1:
        print("\n".join(report.aligned(rows)), end="\n\n")
    print("*: the fastest of torch's modes. differ by: the largest relative difference between a peer's parameters and")
    print(f"roptim's after {WARM_UP_STEPS} steps, on a sample. ~: unsteady. NumPy's arithmetic runs on one thread.")
    options.output.mkdir(parents=True, exist_ok=True)
    if importlib.util.find_spec("matplotlib") is None:
        print("The chart is left out: this Python has no matplotlib.")
    else:
        import chart

        chart.draw(record, options.output / "compare.png")
    if options.markdown is not None:
        options.markdown.write_text(report.markdown(record), encoding="utf-8")
    print(f"Written to {options.output}. Measuring took {record['elapsed_secs']:.0f} s.")


# ---- command line ---------------------------------------------------------------------------------------


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options, with defaults that depend on others filled in."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer, shorter rounds, without the large cases")
    parser.add_argument("--cases", nargs="+", choices=CASES, metavar="CASE", help=", ".join(CASES))
    names = list(OPTIMIZERS)
    parser.add_argument("--optimizers", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--rounds", type=int, help="turns of each entrant (default 7, quick 3)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of all but NumPy (default: all cores)")
    for name in ("torch", "optax"):
        variable = f"ROPTIM_BENCH_{name.upper()}_PYTHON"
        lent = os.environ.get(variable) or None
        text = f"interpreter with {name} and NumPy (default: ${variable}, else this one)"
        parser.add_argument(f"--{name}-python", default=lent, metavar="PATH", help=text)
    peers = ("limit", "numpy", "torch", "optax")
    parser.add_argument("--without", nargs="+", choices=peers, default=[], metavar="PEER", help=", ".join(peers))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output", help="folder for the results")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the tables to this file")
    text = "show this compare.json again, without measuring"
    parser.add_argument("--render", type=Path, metavar="RECORD", help=text)
    options = parser.parse_args(arguments)
    options.cases = options.cases or [name for name, case in CASES.items() if not (options.quick and case.large)]
    options.rounds = options.rounds or (3 if options.quick else 7)
    options.turn_secs = 0.02 if options.quick else 0.1
    options.slow_rounds, options.slow_step_secs = (1, 0.1) if options.quick else (2, 0.15)
    return options


def main(arguments: list[str] | None = None) -> None:
    """Runs the benchmark."""
    options = parse(arguments)
    if options.render is not None:
        show(json.loads(options.render.read_text()), options)
        return
    import roptim

    check_registry(roptim.optimizer.REGISTRY)
    if not any(case in OPTIMIZERS[name].cases for case in options.cases for name in options.optimizers):
        raise SystemExit("compare.py: --cases must name a case that one of --optimizers has, see peers/cases.py")
    sides = sides_for(options)
    gc.disable()
    gc.freeze()
    try:
        record = compare(options, sides)
    finally:
        for side in sides.values():
            side.close()
    show(record, options)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        serve(sys.argv[2])
    else:
        main()
