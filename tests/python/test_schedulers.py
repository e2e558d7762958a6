"""Schedulers against recorded values of torch, and their own rules."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import roptim
from roptim import SGD
from roptim.lr_scheduler import CosineAnnealingLR, LRScheduler, ReduceLROnPlateau, StepLR

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "schedules.json").read_text())


def two_groups(a: float = 0.1, b: float = 0.5) -> SGD:
    one = np.zeros(1, np.float32)
    return SGD([{"params": [one]}, {"params": [one.copy()], "lr": b}], lr=a, momentum=0.9)


def stepped(opt: SGD) -> SGD:
    opt.step([None, None])
    return opt


@pytest.mark.parametrize("case", VECTORS["cases"], ids=lambda c: json.dumps(c["spec"]))
def test_values_are_torchs(case: dict[str, Any]) -> None:
    name, kwargs = case["spec"]
    opt = stepped(two_groups())
    sched = getattr(roptim.lr_scheduler, name)(opt, **kwargs)
    for i, want in enumerate(case["trace"]):
        if i:
            sched.step(*([case["metrics"][i - 1]] if case["metrics"] else []))
        got = [group["lr"] for group in opt.param_groups]
        assert got == pytest.approx([lr for lr, _ in want], rel=1e-13, abs=1e-15), f"step {i}"
        assert sched.get_last_lr() == got


@pytest.mark.parametrize(("cls", "args"), [(StepLR, (3, 0.5)), (CosineAnnealingLR, (7, 0.01))])
def test_recursion_and_closed_form_agree(cls: Any, args: Any) -> None:
    opt = stepped(two_groups())
    sched, other = cls(opt, *args), two_groups()
    closed = cls(stepped(other), *args)
    for epoch in range(1, 40):
        sched.step()
        with pytest.warns(UserWarning, match="epoch argument"):
            closed.step(epoch)
        assert sched.get_last_lr() == pytest.approx(closed.get_last_lr(), abs=1e-12)


@pytest.mark.parametrize(
    ("cls", "args"), [(StepLR, (3, 0.5)), (CosineAnnealingLR, (7, 0.01)), (ReduceLROnPlateau, ("min", 0.5, 1))]
)
@pytest.mark.parametrize("split", range(0, 12, 3))
def test_resume_at_every_split(cls: Any, args: Any, split: int) -> None:
    metric = [[1.0 + (i % 5)] if cls is ReduceLROnPlateau else [] for i in range(15)]
    opt = stepped(two_groups())
    sched = cls(opt, *args)
    for i in range(split):
        sched.step(*metric[i])
    again = stepped(two_groups())
    resumed = cls(again, *args)
    resumed.load_state_dict(json.loads(json.dumps(sched.state_dict())))
    again.load_state_dict(opt.state_dict())
    for i in range(split, 15):
        sched.step(*metric[i])
        resumed.step(*metric[i])
        assert resumed.get_last_lr() == sched.get_last_lr()


def test_a_scheduler_of_ones_own_and_chaining() -> None:
    class Halving(LRScheduler):
        def get_lr(self) -> list[float]:
            return [base * 0.5**self.last_epoch for base in self.base_lrs]

    opt = stepped(two_groups(0.8, 0.4))
    sched = Halving(opt)
    sched.step()
    assert [group["lr"] for group in opt.param_groups] == [0.4, 0.2]
    first, second = StepLR(o := stepped(two_groups(0.8)), 1, 0.5), StepLR(o, 2, 0.5)
    for _ in range(2):
        first.step()
        second.step()
    assert o.param_groups[0]["lr"] == pytest.approx(0.8 * 0.5**3)


def test_the_step_takes_the_scheduled_rate() -> None:
    p = np.zeros(1)
    opt = SGD([p], lr=1.0)
    sched = StepLR(opt, 1, 0.5)
    for _ in range(3):
        opt.step([np.ones(1)])
        sched.step()
    assert p[0] == -1.75


def test_warnings_and_errors() -> None:
    opt = two_groups()
    sched = StepLR(opt, 3)
    with pytest.warns(UserWarning, match="before optimizer.step"):
        sched.step()
    with pytest.warns(UserWarning, match="use get_last_lr"):
        sched.get_lr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sched = StepLR(stepped(two_groups()), 3)
        sched.step()
    for build, message in [
        (lambda: StepLR(None, 3), "StepLR: optimizer must be an Optimizer, got an object of type NoneType"),
        (lambda: StepLR(opt, 0), "StepLR: step_size must be a whole number >= 1, got 0"),
        (lambda: StepLR(opt, 1.5), "StepLR: step_size must be a whole number >= 1, got 1.5"),
        (lambda: StepLR(opt, 3, float("nan")), "StepLR: gamma must be a finite number, got nan"),
        (lambda: StepLR(two_groups(), 3, last_epoch=4), "StepLR: group 0 must be one with 'initial_lr' to resume"),
        (lambda: CosineAnnealingLR(opt, 0), "CosineAnnealingLR: T_max must be a whole number >= 1, got 0"),
        (lambda: ReduceLROnPlateau(opt, "up"), "ReduceLROnPlateau: mode must be 'min' or 'max', got 'up'"),
        (
            lambda: ReduceLROnPlateau(opt, factor=1.0),
            r"ReduceLROnPlateau: factor must be a number in \[0, 1\), got 1.0",
        ),
        (lambda: ReduceLROnPlateau(opt, threshold_mode="x"), "ReduceLROnPlateau: threshold_mode must be"),
        (lambda: ReduceLROnPlateau(opt, min_lr=[0.1]), "ReduceLROnPlateau: min_lr must be 2 numbers, got 1"),
        (lambda: StepLR(opt, 2).load_state_dict({}), "StepLR.load_state_dict: state_dict must be"),
    ]:
        with pytest.raises(roptim.RoptimError, match="^" + message):
            build()
    with pytest.raises(NotImplementedError):
        LRScheduler(opt)


def test_plateau_with_a_floor_per_group_and_a_group_added_later() -> None:
    opt = two_groups(1.0, 1.0)
    sched = ReduceLROnPlateau(opt, factor=0.1, patience=0, min_lr=[0.0, 0.5])
    for _ in range(3):
        sched.step(1.0)
    assert [group["lr"] for group in opt.param_groups] == pytest.approx([0.01, 0.5])
    opt = two_groups(1.0, 1.0)
    sched = ReduceLROnPlateau(opt, factor=0.1, patience=0)
    opt.add_param_group({"params": [np.zeros(2, np.float32)], "lr": 1.0})
    sched.step(1.0)
    sched.step(float("nan"))
    assert [group["lr"] for group in opt.param_groups] == pytest.approx([0.1] * 3)
