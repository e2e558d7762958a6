"""What roptim wants to reach, as data. The report says what a run reached; no test depends on it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

#: Optimizers that torch has a fused form of on the CPU.
FUSED = ("SGD", "SGD-momentum", "Adam", "AdamW", "Adagrad")
LARGE = 16_000_000


@dataclass(frozen=True)
class Goal:
    """A bound on one figure of the results that it is about."""

    title: str
    #: "torch": times as fast as torch's best mode. "limit": part of the C loop's speed. "step": microseconds.
    figure: str
    bound: float
    kind: str = "elementwise"
    case: str | None = None
    least_elements: int = 0
    optimizers: tuple[str, ...] = ()
    others_than: tuple[str, ...] = ()

    @property
    def sign(self) -> str:
        """Which side of the bound is wanted."""
        return "at most" if self.figure == "step" else "at least"

    def concerns(self, result: dict[str, Any]) -> bool:
        """Whether a result is one that it is about."""
        return (
            result["kind"] == self.kind
            and self.case in (None, result["case"])
            and result["elements"] >= self.least_elements
            and (not self.optimizers or result["optimizer"] in self.optimizers)
            and result["optimizer"] not in self.others_than
        )

    def reached(self, value: float) -> bool:
        """Whether a figure is on the wanted side."""
        return value <= self.bound if self.figure == "step" else value >= self.bound


_LARGE = "of 16 M elements and more"

GOALS = [
    Goal(f"torch has a fused form, {_LARGE}", "torch", 1.0, least_elements=LARGE, optimizers=FUSED),
    Goal(f"ASGD, {_LARGE}", "torch", 1.2, least_elements=LARGE, optimizers=("ASGD",)),
    Goal(f"the others, {_LARGE}", "torch", 2.5, least_elements=LARGE, others_than=(*FUSED, "ASGD")),
    Goal(f"the machine's limit, {_LARGE}", "limit", 0.95, least_elements=LARGE),
    Goal("1000 tensors of 1000", "torch", 20, case="many"),
    Goal("5868 tensors of 3, a group each", "torch", 20, case="groups"),
    Goal("MLP 784-128-10", "torch", 5, case="mlp"),
    Goal("1 tensor of 16, microseconds of a step", "step", 2.0, case="tiny"),
    Goal(f"AdamW with clip_norm, {_LARGE}", "torch", 1.25, "clipped", least_elements=LARGE, optimizers=("AdamW-clip",)),
]


def figure(goal: Goal, result: dict[str, Any]) -> tuple[float, bool] | None:
    """The median that a goal looks at and whether it is unsteady; None where it was not measured."""
    if goal.figure == "step":
        return 1e6 * result["seconds"]["roptim"]["median"], "roptim" in result["unsteady"]
    name = result["best_torch"] if goal.figure == "torch" else "limit"
    if name not in result["ratio"]:
        return None
    return result["ratio"][name]["median"], bool({name, "roptim"} & set(result["unsteady"]))


def outcomes(results: list[dict[str, Any]]) -> Iterator[tuple[Goal, dict[str, Any], float, bool]]:
    """Every goal with every result that it is about and that was measured: the figure, and whether it is unsteady."""
    for goal in GOALS:
        for result in filter(goal.concerns, results):
            found = figure(goal, result)
            if found is not None:
                yield goal, result, *found
