"""Times ``import roptim`` in an interpreter that has NumPy, and shows the sizes of extension module and wheels.

    python benches/imports.py
    python benches/imports.py --rounds 50

Each round starts two fresh interpreters in turn, one that imports NumPy alone and one that imports roptim after it.
Two figures come of it: the time that the statement takes, by the interpreter's own clock, and what whole processes
differ by, which has loading and leaving in it. A first round, not counted, leaves compiled modules and a warm file
cache.
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

#: What the statement should take at most, in milliseconds.
GOAL = 60
NUMPY = "import numpy"
ROPTIM = """
import time, numpy
start = time.perf_counter()
import roptim
print(time.perf_counter() - start)
"""


def process(code: str) -> tuple[float, str]:
    """Seconds of an interpreter that runs this, and what it printed."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return time.perf_counter() - start, done.stdout


def shown(label: str, seconds: Sequence[float]) -> str:
    """A line with the median and the extremes in milliseconds."""
    low, middle, high = (1e3 * x for x in (min(seconds), statistics.median(seconds), max(seconds)))
    return f"{label:<44}{middle:>8.1f} ms   ({low:.1f} to {high:.1f})"


def sizes() -> list[str]:
    """Lines about the installed extension module and the wheels in ``dist/``."""
    found = importlib.util.find_spec("roptim._roptim")
    extension = [Path(found.origin)] if found is not None and found.origin is not None else []
    wheels = sorted((Path(__file__).resolve().parent.parent / "dist").glob("*.whl"))
    return [f"{path.name:<60}{path.stat().st_size / 1e6:>7.1f} MB" for path in [*extension, *wheels]]


def main() -> None:
    """Measures and shows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="(default 15)")
    options = parser.parse_args()
    statement, alone, together = [], [], []
    for each in range(options.rounds + 1):
        without, _ = process(NUMPY)
        with_roptim, printed = process(ROPTIM)
        if each:
            statement.append(float(printed))
            alone.append(without)
            together.append(with_roptim)
    print(f"Python {platform.python_version()}, {platform.system()} {platform.machine()}, {options.rounds} rounds")
    print(shown("import roptim, after numpy", statement))
    print(shown("processes: numpy alone", alone))
    print(shown("processes: what roptim adds", [b - a for a, b in zip(alone, together, strict=True)]))
    verdict = "within" if 1e3 * statistics.median(statement) < GOAL else "above"
    print(f"The median of the statement is {verdict} the goal of {GOAL} ms.")
    print("\n".join(sizes()))


if __name__ == "__main__":
    main()
