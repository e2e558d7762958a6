"""Times steps whose gradients have become zero, while the moments of the optimizer decay through subnormal numbers.

    python benches/denormals.py
    python benches/denormals.py --torch-python PATH      # torch from another environment, as in compare.py

After a few steps with real gradients come 200,000 with zeros. Moments shrink by a constant factor per step, until
they lie below the smallest normal number; there many processors take many times as long for an operation, and
rounding keeps moments from ever reaching zero. How much longer depends on the processor; on some the curves are flat
for all. roptim stores such values as zero unless ``flush_denormals=False``.

Prints one table per optimizer and writes ``denormals.json`` and, where matplotlib is installed, ``denormals.png``.
All entrants have one thread and take turns, one window of steps each. torch and NumPy run as they are by default;
torch's process-wide ``set_flush_denormal`` is not among them.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import report
from compare import cpu_model
from peers import numpy_loops
from peers.side import RemoteSide, timed

GRADIENT = 1e-3
REAL_STEPS = 10
#: Windows of which the table takes medians.
NEIGHBOURS = 5
CONTESTS: dict[str, tuple[dict[str, Any], Callable[..., numpy_loops.Step]]] = {
    "Adam": ({}, numpy_loops.adam),
    "SGD": ({"momentum": 0.9}, numpy_loops.sgd_momentum),
}

#: Seconds of a step over the next so many steps.
Window = Callable[[int], float]


def local(step: Callable[[Any], object], size: int) -> Window:
    """An optimizer in this process, after its real steps."""
    for _ in range(REAL_STEPS):
        step([np.full(size, GRADIENT, np.float32)])
    zeros = functools.partial(step, [np.zeros(size, np.float32)])
    return lambda steps: timed(zeros, 1, steps)[0]


def entrants(name: str, options: argparse.Namespace, torch: RemoteSide | None) -> dict[str, Window]:
    """All who take part."""
    import roptim

    hypers, loop = CONTESTS[name]

    def ours(flush: bool) -> Window:
        p = [np.ones(options.elements, np.float32)]
        opt = getattr(roptim, name)(p, **hypers, threads=1, flush_denormals=flush)
        return local(opt.step, options.elements)

    found = {"roptim": ours(True), "roptim, flush_denormals=False": ours(False)}
    found["numpy"] = local(loop([np.ones(options.elements, np.float32)], **hypers), options.elements)
    if torch is not None:
        for mode in ("default", "fused"):
            switch = {} if mode == "default" else {mode: True}
            numbers = {"size": options.elements, "gradient": GRADIENT, "steps": REAL_STEPS}
            torch.ask("setup_numbers", mode=mode, optimizer=name, hypers=hypers | switch, **numbers)
            found[f"torch {mode}"] = functools.partial(lambda mode, steps: torch.run(mode, 1, steps)[0], mode)
    return found


def measure(name: str, options: argparse.Namespace, torch: RemoteSide | None) -> dict[str, list[float]]:
    """Seconds per step of each entrant, by window."""
    steps = options.steps // options.windows
    found = entrants(name, options, torch)
    times: dict[str, list[float]] = {key: [] for key in found}
    for _ in range(options.windows):
        for key, window in found.items():
            times[key].append(window(steps))
    return times


def table(name: str, times: dict[str, list[float]], steps: int) -> None:
    """Some windows, and the slowest as a multiple of the fastest, among medians of neighbours: a lone slow window is
    the machine's."""
    count = len(next(iter(times.values())))
    shown = sorted({0, 1, count // 10, count // 4, count // 2, 3 * count // 4, count - 1})
    rows = [[name, *(f"from {k * steps:,}" for k in shown), "slowest / fastest"]]
    for key, values in times.items():
        cells = [report.duration(values[k]) for k in shown]
        smooth = [statistics.median(values[k : k + NEIGHBOURS]) for k in range(max(1, count - NEIGHBOURS + 1))]
        rows.append([f"  {key}", *cells, report.figures(max(smooth) / min(smooth))])
    print("\n".join(report.aligned(rows)), end="\n\n")


def draw(record: dict[str, Any], path: Path) -> None:
    """One panel per optimizer."""
    from matplotlib.figure import Figure

    panels_wanted = record["seconds"]
    figure = Figure(figsize=(6.4 * len(panels_wanted), 4.6), layout="constrained")
    panels = figure.subplots(1, len(panels_wanted), squeeze=False, sharey=True)[0]
    styles = {"roptim": ("#1a6f3c", 2.4), "roptim, flush_denormals=False": ("#7fc29b", 1.4), "numpy": ("#8c8c8c", 1.4)}
    styles |= {"torch default": ("#f2a65a", 1.4), "torch fused": ("#9c3d1f", 1.4)}
    for panel, (name, times) in zip(panels, panels_wanted.items(), strict=True):
        for key, values in times.items():
            color, width = styles[key]
            places = [k * record["steps_per_window"] for k in range(len(values))]
            panel.plot(places, [1e6 * value for value in values], color=color, linewidth=width, label=key)
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter("{x:g}")
        panel.set_title(name, loc="left", fontweight="bold")
        panel.set_xlabel("step, all gradients zero")
        panel.xaxis.set_major_formatter("{x:,.0f}")
        panel.grid(color="#dddddd", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("microseconds of a step")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(
        f"Steps while moments decay ({record['elements']:,} elements, float32, one thread; {record['cpu']})"
    )
    figure.savefig(path, dpi=130)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--elements", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=200_000)
    parser.add_argument("--windows", type=int, default=100)
    lent = os.environ.get("ROPTIM_BENCH_TORCH_PYTHON") or None
    text = "interpreter with torch and NumPy (default: $ROPTIM_BENCH_TORCH_PYTHON, else this one)"
    parser.add_argument("--torch-python", default=lent, metavar="PATH", help=text)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output", help="folder for the results")
    options = parser.parse_args()
    torch = None
    if options.torch_python is not None or importlib.util.find_spec("torch") is not None:
        torch = RemoteSide("torch", options.torch_python or sys.executable, 1)
    start = time.perf_counter()
    record: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu_model(),
        "versions": {"numpy": np.__version__} | (torch.versions if torch is not None else {}),
        "elements": options.elements,
        "steps_per_window": options.steps // options.windows,
        "seconds": {},
    }
    try:
        for name in CONTESTS:
            record["seconds"][name] = measure(name, options, torch)
            table(name, record["seconds"][name], record["steps_per_window"])
    finally:
        if torch is not None:
            torch.close()
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "denormals.json").write_text(json.dumps(record, indent=1) + "\n")
    if importlib.util.find_spec("matplotlib") is not None:
        draw(record, options.output / "denormals.png")
    print(f"Written to {options.output}. Measuring took {time.perf_counter() - start:.0f} s.")


if __name__ == "__main__":
    main()
