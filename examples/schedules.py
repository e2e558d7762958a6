"""Two pictures: every schedule of roptim.schedules, and every scheduler of roptim.lr_scheduler.

The first are functions of the count of updates, given to a hyperparameter; ``python -m roptim schedules`` shows the
same ones in the terminal. The second are torch's classes, stepped once per epoch, as they behave: the cosine rises
again after its end, and ReduceLROnPlateau follows a loss.

Run ``python examples/schedules.py``; it draws ``docs/schedules.png`` and ``docs/schedulers.png``, or into the folder
that ``--output`` names.
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
from roptim import lr_scheduler, swa_utils
from roptim._gallery import UPDATES, examples

EPOCHS = 100
STALL = 30  # the epoch from which on the loss of the plateau's panel no longer falls
BLUE, ORANGE, GRAY = "#0b5fa5", "#d55e00", "#8a8a8a"  # different to colour-blind eyes, too

SCHEDULES_PICTURE, SCHEDULERS_PICTURE = "schedules.png", "schedulers.png"


class Panel(NamedTuple):
    """The call that makes a scheduler of ``opt``, and what to see in it."""

    call: str
    note: str = ""


PANELS = (
    Panel("LambdaLR(opt, lambda epoch: 1 / (1 + epoch / 20))"),
    Panel("MultiplicativeLR(opt, lambda epoch: 0.95 if epoch < 30 else 0.99)"),
    Panel("StepLR(opt, step_size=25, gamma=0.5)"),
    Panel("MultiStepLR(opt, [20, 70], gamma=0.3)"),
    Panel("ConstantLR(opt, factor=0.3, total_iters=30)"),
    Panel("LinearLR(opt, start_factor=0.1, total_iters=40)"),
    Panel("ExponentialLR(opt, gamma=0.96)"),
    Panel("PolynomialLR(opt, total_iters=80, power=2)"),
    Panel("CosineAnnealingLR(opt, T_max=50)", "rises again after T_max"),
    Panel("CosineAnnealingWarmRestarts(opt, T_0=15, T_mult=2)"),
    Panel('CyclicLR(opt, 0.1, 1, step_size_up=12, mode="triangular2")', "momentum goes the other way"),
    Panel(f"OneCycleLR(opt, max_lr=1, total_steps={EPOCHS})", "momentum goes the other way"),
    Panel("SequentialLR(opt, [LinearLR(opt, 0.1, total_iters=20), ExponentialLR(opt, 0.96)], milestones=[20])"),
    Panel("ChainedScheduler([ConstantLR(opt, 0.3, 20), ExponentialLR(opt, 0.98)])"),
    Panel("ReduceLROnPlateau(opt, factor=0.5, patience=8)", f"the loss falls until epoch {STALL}"),
    Panel("swa_utils.SWALR(opt, swa_lr=0.2, anneal_epochs=40)"),
)


def learning_rates(call: str) -> np.ndarray:
    """What the scheduler makes of a learning rate of 1 in epochs 0 to EPOCHS - 1."""
    opt = roptim.SGD([np.zeros(1)], lr=1.0, momentum=0.9)
    opt.step([np.zeros(1)])  # as the schedulers expect, which warn otherwise
    # The text of a panel, nobody's input: what is drawn and what is written over it cannot come apart.
    scheduler: Any = eval(call, {**vars(lr_scheduler), "swa_utils": swa_utils, "opt": opt})
    rates = [opt.param_groups[0]["lr"]]
    for epoch in range(1, EPOCHS):
        follows_loss = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
        scheduler.step(*([1 / min(epoch, STALL)] if follows_loss else []))
        rates.append(opt.param_groups[0]["lr"])
    return np.array(rates)


def new_panels(count: int, title: str, unit: str, top: float) -> tuple[Figure, list[Axes]]:
    """A figure with so many panels, four in a row, on one scale up to ``top``."""
    columns = 4
    rows = -(-count // columns)
    figure = Figure(figsize=(12, 0.9 + 1.62 * rows), dpi=100, layout="constrained")
    figure.suptitle(title, fontsize="x-large", fontweight="bold")
    panels = list(figure.subplots(rows, columns, squeeze=False).ravel())
    for panel in panels[count:]:
        panel.remove()
    for i, panel in enumerate(panels[:count]):
        panel.set(ylim=(-0.05, top), yticks=[0, 0.5, 1], yticklabels=["0", "0.5", "1"])
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(color="#e8e8e8", linewidth=0.8)
        panel.set_axisbelow(True)
        lowest = i + columns >= count
        panel.tick_params(labelsize="small", labelbottom=lowest)
        panel.set_xlabel(unit if lowest else "", fontsize="small")
    return figure, panels[:count]


def set_call(panel: Axes, call: str) -> None:
    """The call as the panel's title, in as many lines as it needs, which end at commas."""
    first, *others = call.split(", ")
    lines = [first]
    for part in others:
        if len(lines[-1]) + len(part) < 43:
            lines[-1] += f", {part}"
        else:
            lines[-1] += ","
            lines.append(f"  {part}")
    panel.set_title("\n".join(lines), loc="left", fontfamily="monospace", fontsize=7.5)


def draw_schedules(path: Path) -> int:
    """One panel for each example of the command line; returns how many."""
    shown = examples()
    figure, panels = new_panels(len(shown), "Schedules: the value of each update", "update", 1.1)
    beyond = UPDATES + UPDATES // 10
    for panel, (call, schedule) in zip(panels, shown, strict=True):
        values = schedule.values(beyond + 1)
        end = beyond if schedule.length is None else schedule.length
        panel.plot(np.arange(end + 1), values[: end + 1], color=BLUE, linewidth=1.6, solid_capstyle="butt")
        if schedule.length is not None:
            panel.plot(np.arange(end, beyond + 1), values[end:], color=ORANGE, linewidth=1.6, linestyle=(0, (2, 1)))
            panel.axvline(end, color=GRAY, linewidth=0.9, linestyle=":")
        set_call(panel, call)
        panel.set(xlim=(0, beyond), xticks=[0, UPDATES // 2, UPDATES])
        if values.max() < 0.1:
            top = float(values.max())
            panel.set(ylim=(-0.05 * top, 1.1 * top), yticks=[0, top], yticklabels=["0", f"{top:g}"])
    marks: dict[str, dict[str, Any]] = {
        "the schedule": {"color": BLUE, "linewidth": 1.6},
        "its length, where it has one": {"color": GRAY, "linewidth": 0.9, "linestyle": ":"},
        "the last value holds": {"color": ORANGE, "linewidth": 1.6, "linestyle": (0, (2, 1))},
    }
    handles = [Line2D([], [], label=text, **mark) for text, mark in marks.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.savefig(path, metadata={"Software": None})  # without the version of matplotlib: the same bytes each time
    return len(shown)


def draw_schedulers(path: Path) -> int:
    """One panel for each scheduler with torch's name; returns how many."""
    title = "Schedulers with torch's names: what becomes of a learning rate of 1"
    figure, panels = new_panels(len(PANELS), title, "epoch", 1.35)
    for panel, (call, note) in zip(panels, PANELS, strict=True):
        rates = learning_rates(call)
        panel.plot(np.arange(len(rates)), rates, color=BLUE, linewidth=1.4, drawstyle="steps-post")
        panel.text(0.99, 0.97, note, color=ORANGE, fontsize="small", ha="right", va="top", transform=panel.transAxes)
        set_call(panel, call)
        panel.set(xlim=(0, EPOCHS), xticks=[0, EPOCHS // 2, EPOCHS])
    figure.savefig(path, metadata={"Software": None})
    return len(PANELS)


def main(arguments: list[str] | None = None) -> int:
    """Draws both pictures."""
    parser = argparse.ArgumentParser(description="Draw every schedule and every scheduler.")
    parser.add_argument("--output", type=Path, default=Path("docs"), help="folder for the two pictures")
    folder = parser.parse_args(arguments).output
    folder.mkdir(parents=True, exist_ok=True)
    for draw, name in ((draw_schedules, SCHEDULES_PICTURE), (draw_schedulers, SCHEDULERS_PICTURE)):
        print(f"{draw(folder / name)} panels: {folder / name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
