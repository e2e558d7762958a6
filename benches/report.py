"""The tables of ``compare.py``, for the terminal and in Markdown, from its record."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from peers.goals import GOALS, Goal, outcomes


def heading(record: dict[str, Any]) -> str:
    """What was measured on and with, in two lines."""
    where, threads = record["machine"], record["settings"]["threads"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    return (
        f"{where['cpu']}, {where['cores']} cores, {where['system']}, {record['date']}\n{versions}; threads: {threads}"
    )


def figures(value: float, digits: int = 3) -> str:
    """The number with that many significant digits, without an exponent."""
    decimals = max(0, digits - 1 - math.floor(math.log10(value)))
    return f"{value:.{decimals}f}"


def duration(seconds: float) -> str:
    """With a unit that suits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("\N{MICRO SIGN}s", 1e-6)):
        if seconds >= size:
            return f"{figures(seconds / size, 3)} {unit}"
    return f"{figures(seconds / 1e-6, 3)} \N{MICRO SIGN}s"


def aligned(rows: list[list[str]]) -> Iterator[str]:
    """Rows with columns of equal width; the first is text."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    for row in rows:
        cells = [f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True)]
        yield "  ".join([f"{row[0]:<{widths[0]}}", *cells]).rstrip()


def table(result: dict[str, Any]) -> Iterator[str]:
    """One case and optimizer on the terminal."""
    tensors = f"{result['tensors']} tensor{'s' * (result['tensors'] > 1)}"
    yield f"{result['optimizer']} | {result['case_title']} ({tensors}, {result['elements']:,} elements)"
    rows = [["", "a step", "roptim faster by", "min to max", "fastest rounds", "rounds", "differ by"]]
    for name, seconds in result["seconds"].items():
        row = [f"  {name}{'*' * (name == result['best_torch'])}", duration(seconds["median"])]
        if name != "roptim":
            ratio, differ = result["ratio"][name], result["difference"][name]
            row += [figures(ratio["median"], 3), f"{figures(ratio['min'], 2)} to {figures(ratio['max'], 2)}"]
            row += [figures(result["ratio_of_fastest"][name], 3), str(sum(x is not None for x in seconds["rounds"]))]
            row += ["-" if differ is None else f"{differ:.0e}"]
        rows.append(row + [""] * (len(rows[0]) - len(row)))
    yield from aligned(rows)
    if result["unsteady"]:
        yield f"  unsteady, repeat on a quieter machine: {', '.join(result['unsteady'])}"
    yield ""


def goals(results: list[dict[str, Any]]) -> Iterator[list[str]]:
    """One row per goal and case: how many optimizers reached it, the lowest figure, and those who missed it."""
    yield ["goal", "bound", "case", "reached", "furthest from it", "missed"]
    for goal in GOALS:
        found = [(result, value, rough) for g, result, value, rough in outcomes(results) if g is goal]
        for title in dict.fromkeys(result["case_title"] for result, *_ in found):
            here = [entry for entry in found if entry[0]["case_title"] == title]
            furthest = (max if goal.figure == "step" else min)(here, key=lambda entry: entry[1])
            missed = [told(goal, *entry) for entry in here if not goal.reached(entry[1])]
            count = f"{len(here) - len(missed)} of {len(here)}"
            yield [goal.title, bound(goal), title, count, told(goal, *furthest), ", ".join(missed) or "none"]


def bound(goal: Goal) -> str:
    """With what it bounds."""
    what = {"torch": "times torch's best", "limit": "of the limit", "step": "\N{MICRO SIGN}s"}[goal.figure]
    return f"{goal.sign} {goal.bound:g} {what}"


def told(goal: Goal, result: dict[str, Any], value: float, rough: bool) -> str:
    """An optimizer with its figure; ~ where that is unsteady."""
    return f"{result['optimizer']} {'~' * rough}{figures(value, 3)}"


def ratio_cell(result: dict[str, Any], name: str | None, label: str = "") -> str:
    """Median and extremes of a peer's ratio; a dash where it has none."""
    if name is None or name not in result["ratio"]:
        return "-"
    ratio = result["ratio"][name]
    rough = "~" * bool({name, "roptim"} & set(result["unsteady"]))
    text = f"{rough}{figures(ratio['median'], 3)} ({figures(ratio['min'], 2)} to {figures(ratio['max'], 2)})"
    return f"{text} {label}".rstrip()


def markdown(record: dict[str, Any]) -> str:
    """One table per case, and that of the goals."""
    results = record["results"]
    text = ["\n\n".join(heading(record).splitlines())]
    for title in dict.fromkeys(result["case_title"] for result in results):
        here = [result for result in results if result["case_title"] == title]
        rows = [["optimizer", "roptim", "torch, best mode", "NumPy", "optax", "of limit"]]
        for result in here:
            best = result["best_torch"]
            row = [result["optimizer"], duration(result["seconds"]["roptim"]["median"])]
            row += [ratio_cell(result, best, (best or "").removeprefix("torch "))]
            row += [ratio_cell(result, name) for name in ("numpy", "optax", "limit")]
            rows.append(row)
        tensors = f"{here[0]['tensors']:,} tensor{'s' * (here[0]['tensors'] > 1)}, {here[0]['elements']:,} elements"
        text.append(f"### {title}\n\n{tensors}.\n\n" + piped(rows))
    rows = list(goals(results))
    if len(rows) > 1:
        text.append("### Goals\n\n" + piped(rows))
    return "\n\n".join(text) + "\n"


def piped(rows: list[list[str]]) -> str:
    """A Markdown table; all columns but the first to the right."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    rule = "|---|" + "--:|" * (len(rows[0]) - 1)
    return "\n".join([lines[0], rule, *lines[1:]])
