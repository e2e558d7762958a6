"""A picture of every first-order optimizer on the same surface, one panel each.

The surface is a curved valley with steep walls and a floor that falls gently. On the walls the gradient points across
the valley, on the floor it is small: the way along is what takes time. All begin at the same point and take the
same number of steps, with torch's defaults but for the learning rate: of 0.001, 0.002, 0.005, 0.01 and so on each has
the one that gets it to the minimum soonest. So the panels show how an optimizer moves; which is best on a real
problem they cannot tell. (AdamW stays beside the minimum because its default is to decay the parameters.)

Left out are optimizers of which a point in the plane shows nothing: those that evaluate the loss several times in
a step, those for sparse gradients, and Muon, whose parameters are matrices.

Run ``python examples/trajectories.py``; it draws ``docs/trajectories.png``, or what ``--output`` names.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

import roptim
from roptim.optimizer import REGISTRY

START, MINIMUM = np.array([-1.2, 3.2]), np.array([2.0, 1.6])
X_RANGE, Y_RANGE = (-3.5, 3.3), (-1.4, 3.9)
STEPS = 200
NEAR = 0.1  # a path has arrived when it stays this near to the minimum
LEARNING_RATES = [float(f"{digit}e{power}") for power in range(-3, 3) for digit in (1, 2, 5)]
# What is drawn besides an optimizer with its defaults, in the same panel.
VARIANTS: dict[str, dict[str, Any]] = {"SGD": {"momentum": 0.9}}
BLUE, ORANGE = "#0b5fa5", "#d55e00"  # different to colour-blind eyes, too

Array = np.ndarray


def loss(x: Array, y: Array) -> Array:
    """Walls that rise from the floor y = 0.4 x², which falls towards x = 2."""
    return 0.25 * (y - 0.4 * x**2) ** 2 + 0.04 * (x - 2) ** 2


def gradient(point: Array) -> Array:
    """The two partial derivatives of the loss."""
    x, y = point
    across = 0.5 * (y - 0.4 * x**2)
    return np.array([-0.8 * x * across + 0.08 * (x - 2), across])


class Run(NamedTuple):
    """A path and where it got."""

    lr: float
    points: Array  # shape (STEPS + 1, 2)
    arrival: int | None  # the first step after which it stays near the minimum
    distance: float  # from its end to the minimum


def descend(name: str, options: dict[str, Any], lr: float) -> Run | None:
    """One run; None if it leaves the picture."""
    point = START.copy()
    optimizer = getattr(roptim, name)([point], lr=lr, **options)
    points = [START]
    for _ in range(STEPS):
        optimizer.step([gradient(point)])
        if not (X_RANGE[0] < point[0] < X_RANGE[1] and Y_RANGE[0] < point[1] < Y_RANGE[1]):
            return None
        points.append(point.copy())
    distances = np.linalg.norm(np.array(points) - MINIMUM, axis=1)
    last_far = int(np.flatnonzero(distances > NEAR)[-1])
    return Run(lr, np.array(points), None if last_far == STEPS else last_far + 1, float(distances[-1]))


def best_run(name: str, options: dict[str, Any]) -> Run:
    """The run that arrives first, or, if none does, ends nearest to the minimum."""
    runs = [run for lr in LEARNING_RATES if (run := descend(name, options, lr)) is not None]
    return min(runs, key=lambda run: (run.arrival or STEPS + 1, run.distance))


def drawn() -> list[str]:
    """The optimizers that the picture shows."""
    return [
        name
        for name, entry in REGISTRY.items()
        if not entry["needs_closure"] and not entry["needs_sparse"] and name != "Muon"
    ]


def draw_surface(panel: Axes) -> None:
    """Contours, at levels that grow as squares do: lines at equal distances where the walls are parabolas."""
    x, y = np.meshgrid(np.linspace(*X_RANGE, 200), np.linspace(*Y_RANGE, 200))
    levels = np.linspace(0, 2.4, 13) ** 2
    grays = [str(gray) for gray in np.linspace(1, 0.7, len(levels))]  # the last one beyond the highest level
    panel.contourf(x, y, loss(x, y), levels, colors=grays, extend="max")
    panel.contour(x, y, loss(x, y), levels, colors="#a8a8a8", linewidths=0.5)
    panel.plot(*MINIMUM, "+", color="black", markersize=14)
    panel.plot(*START, "o", color="black", markerfacecolor="white", markersize=7, zorder=3)


def draw_run(panel: Axes, run: Run, color: str, label: str, row: int) -> None:
    """The path, a dot per step, and in a corner what it took."""
    panel.plot(*run.points.T, color=color, linewidth=1, marker=".", markersize=3.5)
    panel.plot(*run.points[-1], color=color, marker="D", markersize=5)
    result = f"{run.arrival} steps" if run.arrival else f"{run.distance:.2f} away after {STEPS}"
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5}
    text = f"{label}lr {run.lr:g}: {result}"
    panel.text(0.03, 0.04 + 0.1 * row, text, color=color, bbox=box, transform=panel.transAxes)


def draw_key(figure: Figure) -> None:
    """Title, and what the marks mean."""
    figure.suptitle(f"One valley, {STEPS} steps: how each optimizer goes down", fontsize="x-large", fontweight="bold")
    marks: dict[str, dict[str, Any]] = {
        "start": {"marker": "o", "color": "black", "markerfacecolor": "white", "markersize": 7},
        "minimum": {"marker": "+", "color": "black", "markersize": 12},
        "a dot per step": {"marker": ".", "color": BLUE, "linestyle": "-", "markersize": 5},
        "end": {"marker": "D", "color": BLUE, "markersize": 5},
        f'"n steps": from then on within {NEAR:g} of the minimum': {},
        f"lr: the best of {', '.join(f'{lr:g}' for lr in LEARNING_RATES[:3])}, ..., {LEARNING_RATES[-1]:g}": {},
    }
    handles = [Line2D([], [], label=text, **{"linestyle": "none", **mark}) for text, mark in marks.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, columnspacing=1.2)


def draw(path: Path) -> dict[str, Run]:
    """Draws the picture; returns the run of each optimizer with its defaults."""
    names = drawn()
    columns = 4
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(12, 0.9 + 2.7 * rows), dpi=100, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    runs = {}
    for panel, name in zip(panels, names, strict=False):
        draw_surface(panel)
        if name in VARIANTS:
            label = ", ".join(f"{key} {value}" for key, value in VARIANTS[name].items())
            draw_run(panel, best_run(name, VARIANTS[name]), ORANGE, f"{label}, ", row=1)
        runs[name] = best_run(name, {})
        draw_run(panel, runs[name], BLUE, "", row=0)
        panel.set_title(name, loc="left", fontweight="bold")
        panel.set(xlim=X_RANGE, ylim=Y_RANGE, xticks=[], yticks=[])
    for panel in panels[len(names) :]:
        panel.remove()
    draw_key(figure)
    figure.savefig(path, metadata={"Software": None})  # without the version of matplotlib: the same bytes each time
    return runs


def main(arguments: list[str] | None = None) -> int:
    """Draws the picture and prints what its panels say."""
    parser = argparse.ArgumentParser(description="Draw the paths of the first-order optimizers on one surface.")
    parser.add_argument("--output", type=Path, default=Path("docs/trajectories.png"))
    options = parser.parse_args(arguments)
    for name, run in draw(options.output).items():
        print(f"{name:<12}lr {run.lr:<8g}{run.arrival or 'not there':>10}{run.distance:>10.4f}")
    print(f"picture: {options.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
