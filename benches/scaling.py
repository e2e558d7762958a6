"""Times roptim's AdamW with 1 to n threads, against one thread and against torch's fused form with as many.

    python benches/scaling.py
    python benches/scaling.py --torch-python PATH      # torch from another environment, as in compare.py

Prints a table per case and writes ``scaling.json``. Entrants take turns as in ``compare.py``, of which this uses the
parts; a number of threads is one entrant of roptim and one of torch.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import report
from compare import Entrant, machine, spread
from peers.cases import CASES
from peers.local import RoptimSide
from peers.side import RemoteSide, Side

#: Small enough that the arrays of all numbers of threads lie beside each other.
MEASURED = ("sixteen", "many")


def measure(name: str, options: argparse.Namespace, torch: dict[int, RemoteSide]) -> dict[str, Any]:
    """Seconds of a step by entrant, and ratios round by round."""
    entrants: dict[str, Entrant] = {}
    sides: list[Side | RemoteSide] = []
    for threads in options.counts:
        ours = RoptimSide()
        ours.start(threads)
        ours.setup(name, "AdamW")
        entrants[f"roptim {threads}"] = Entrant(ours, "")
        sides.append(ours)
        if threads in torch:
            torch[threads].setup(name, "AdamW")
            entrants[f"torch fused {threads}"] = Entrant(torch[threads], "fused")
            sides.append(torch[threads])
    for entrant in entrants.values():
        entrant.begin()
    for entrant in entrants.values():
        entrant.settle(options.turn_secs)
    rounds = [{key: entrant.turn() for key, entrant in entrants.items()} for _ in range(options.rounds)]
    for side in sides:
        side.free()
    first = f"roptim {options.counts[0]}"
    ours_first = {n: spread([turn[first] / turn[f"roptim {n}"] for turn in rounds]) for n in options.counts}
    against = {n: spread([turn[f"torch fused {n}"] / turn[f"roptim {n}"] for turn in rounds]) for n in torch}
    seconds = {key: spread([turn[key] for turn in rounds]) for key in entrants}
    return {"case": name, "seconds": seconds, "times_as_fast_as_one_thread": ours_first, "torch_over_roptim": against}


def table(result: dict[str, Any], counts: list[int]) -> None:
    """One case."""

    def cell(found: dict[int, Any], n: int) -> str:
        if n not in found:
            return "-"
        figures = [report.figures(found[n][key], 2) for key in ("min", "max")]
        return f"{report.figures(found[n]['median'])} ({' to '.join(figures)})"

    rows = [
        [f"AdamW | {CASES[result['case']].title}", "a step", "faster than one thread by", "faster than torch fused by"]
    ]
    for n in counts:
        row = [f"  {n} thread{'s' * (n > 1)}", report.duration(result["seconds"][f"roptim {n}"]["median"])]
        rows.append([*row, cell(result["times_as_fast_as_one_thread"], n), cell(result["torch_over_roptim"], n)])
    print("\n".join(report.aligned(rows)), end="\n\n")


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    cores = os.cpu_count() or 1
    powers = sorted({1, cores, *(2**k for k in range(cores.bit_length()) if 2**k <= cores)})
    text = "numbers of threads (default: 1, 2, 4 ... all cores)"
    parser.add_argument("--counts", nargs="+", type=int, default=powers, metavar="N", help=text)
    parser.add_argument("--rounds", type=int, default=7)
    lent = os.environ.get("ROPTIM_BENCH_TORCH_PYTHON") or None
    text = "interpreter with torch and NumPy (default: $ROPTIM_BENCH_TORCH_PYTHON, else this one)"
    parser.add_argument("--torch-python", default=lent, metavar="PATH", help=text)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output", help="folder for the results")
    options = parser.parse_args()
    options.turn_secs = 0.1
    torch: dict[int, RemoteSide] = {}
    if options.torch_python is not None or importlib.util.find_spec("torch") is not None:
        # A worker per number of threads: torch's pool is made for one.
        torch = {n: RemoteSide("torch", options.torch_python or sys.executable, n) for n in options.counts}
    start = time.perf_counter()
    record: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "machine": machine({f"torch {n}": side for n, side in torch.items()}),
        "settings": {"counts": options.counts, "rounds": options.rounds},
        "results": [],
    }
    try:
        for name in MEASURED:
            record["results"].append(measure(name, options, torch))
            table(record["results"][-1], options.counts)
    finally:
        for side in torch.values():
            side.close()
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "scaling.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"Written to {options.output}. Measuring took {time.perf_counter() - start:.0f} s.")


if __name__ == "__main__":
    main()
