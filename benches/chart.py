"""The picture of ``compare.py``: one panel per case, one row per optimizer, a mark per peer on a log scale."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from peers.goals import outcomes
from report import duration, figures, heading

TIMES = "\N{MULTIPLICATION SIGN}"
#: Name in the record, label, marker, color; torch's slower modes are small.
PEERS = {
    "numpy": ("NumPy", "s", "#8c8c8c"),
    "optax": ("optax", "D", "#3b75af"),
    "torch default": ("torch default", "v", "#f2a65a"),
    "torch foreach": ("torch foreach", "^", "#d9703a"),
    "torch fused": ("torch fused", "o", "#9c3d1f"),
    "limit": ("the machine's limit", "|", "#2e7d32"),
}


def draw(record: dict[str, Any], path: Path) -> None:
    """Writes the picture."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    results = record["results"]
    titles = list(dict.fromkeys(result["case_title"] for result in results))
    groups = [[result for result in results if result["case_title"] == title] for title in titles]
    # Panels of few rows stand beside each other, not beside tall ones.
    columns = 2 if len(groups) > 1 else 1
    lines = []
    for size in ([g for g in groups if len(g) > 3], [g for g in groups if len(g) <= 3]):
        lines += [size[k : k + columns] for k in range(0, len(size), columns)]
    heights = [max(len(group) for group in line) + 2.2 for line in lines]
    figure = Figure(figsize=(7.4 * columns, 0.29 * sum(heights) + 1.9), layout="constrained")
    panels = figure.subplots(len(lines), columns, squeeze=False, height_ratios=heights)
    goals = goal_marks(results)
    for line, places in zip(lines, panels, strict=True):
        for panel in places[len(line) :]:
            panel.set_visible(False)
        for group, panel in zip(line, places, strict=False):
            draw_case(panel, group, goals)
    figure.suptitle(f"Time of one step as a multiple of roptim's (left of 1{TIMES} the peer is faster)", fontsize=13)
    present = {name for result in results for name in result["ratio"]}
    handles = [
        Line2D([], [], linestyle="", marker=marker, color=color, label=label, markeredgewidth=1 + (name == "limit"))
        for name, (label, marker, color) in PEERS.items()
        if name in present
    ]
    handles += [Line2D([], [], color="black", linewidth=1.6, label="goal for torch's fastest")] * bool(goals)
    note = "Large and with a figure: the fastest of torch's modes. Lines: extremes of the rounds. Hollow: unsteady."
    legend = figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=len(handles),
        frameon=False,
        fontsize=9,
        title=f"{note}\n{heading(record)}",
        title_fontsize=8,
    )
    legend.get_title().set_horizontalalignment("center")
    figure.savefig(path, dpi=130)


def goal_marks(results: list[dict[str, Any]]) -> dict[tuple[str, str], float]:
    """Where goals against torch lie, by case and optimizer."""
    return {
        (result["case"], result["optimizer"]): goal.bound
        for goal, result, *_ in outcomes(results)
        if goal.figure == "torch"
    }


def draw_case(panel: Any, results: list[dict[str, Any]], goals: dict[tuple[str, str], float]) -> None:
    """One panel."""
    for row, result in enumerate(results):
        for name, (_, marker, color) in PEERS.items():
            if name in result["ratio"]:
                draw_mark(panel, row, result, name, {"marker": marker, "color": color})
        goal = goals.get((result["case"], result["optimizer"]))
        if goal is not None:
            panel.plot([goal, goal], [row - 0.42, row + 0.42], color="black", linewidth=1.6)
    reached = [1.0, *(ratio["median"] for result in results for ratio in result["ratio"].values())]
    reached += [goals[key] for result in results if (key := (result["case"], result["optimizer"])) in goals]
    panel.set_xscale("log")
    panel.set_xlim(0.75 * min(reached), 1.9 * max(reached))
    panel.set_xticks(*ticks(0.75 * min(reached), 1.9 * max(reached)))
    panel.minorticks_off()
    panel.axvline(1, color="black", linewidth=0.9, zorder=1)
    panel.set_ylim(len(results) - 0.4, -0.6)
    panel.set_yticks(range(len(results)), [f"{r['optimizer']}  {step_time(r)}" for r in results], fontsize=8.5)
    for row in range(0, len(results), 2):
        panel.axhspan(row - 0.5, row + 0.5, color="#f4f4f4", zorder=0)
    panel.grid(axis="x", color="#dddddd", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right", "left"]].set_visible(False)
    panel.tick_params(axis="y", length=0)
    panel.tick_params(axis="x", labelsize=8)
    panel.set_title(results[0]["case_title"], loc="left", fontsize=11, fontweight="bold")


def step_time(result: dict[str, Any]) -> str:
    """roptim's, in the unit that suits."""
    return duration(result["seconds"]["roptim"]["median"])


def ticks(low: float, high: float) -> tuple[list[float], list[str]]:
    """Round numbers of a log axis: 1, 2, 5 where there is room, else powers of ten."""
    steps = (1, 2, 5) if high / low < 300 else (1,)
    places = [s * 10.0**k for k in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1) for s in steps]
    places = [place for place in places if low <= place <= high]
    return places, [f"{place:g}{TIMES}" for place in places]


def draw_mark(panel: Any, row: int, result: dict[str, Any], name: str, style: dict[str, Any]) -> None:
    """One peer of one optimizer: its median, and a line over its extremes."""
    ratio, best = result["ratio"][name], name == result["best_torch"]
    rough = bool({name, "roptim"} & set(result["unsteady"]))
    color = style["color"]
    height = row + {"numpy": 0.12, "optax": -0.12}.get(name, 0.0)
    panel.plot([ratio["min"], ratio["max"]], [height, height], color=color, linewidth=1.6 if best else 0.8, alpha=0.6)
    size = 8 if best else 11 if name == "limit" else 4.5
    fill = "white" if rough and name != "limit" else color
    panel.plot(
        ratio["median"],
        height,
        style["marker"],
        color=color,
        markerfacecolor=fill,
        markersize=size,
        markeredgewidth=2 if name == "limit" else 1,
        zorder=4 if best else 3,
    )
    if best:
        place = (ratio["median"], height)
        text = f"{figures(ratio['median'], 2)}"
        panel.annotate(
            text, place, (0, 6), textcoords="offset points", ha="center", fontsize=6.5, fontweight="bold", zorder=5
        )
