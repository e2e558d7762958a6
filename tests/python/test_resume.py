"""A run that is saved, left and resumed in new objects is the run that was never interrupted, bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import fingerprint
from twins import DTYPES, FULL, GPU_NAMES, ON_GPU, accepted, draw

import roptim
from roptim import Parameter, SparseGrad, schedules
from roptim import lr_scheduler as lrs
from roptim.optimizer import REGISTRY
from roptim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn, get_swa_multi_avg_fn

#: Hyperparameters of the kinds that have states of their own, and of other kinds.
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "SGD": [{}, {"momentum": 0.9, "nesterov": True}, {"momentum": 0.5, "dampening": 0.25, "weight_decay": 0.125}],
    "Adam": [{}, {"amsgrad": True, "weight_decay": 0.125}, {"betas": (0.5, 0.75), "maximize": True}],
    "AdamW": [{}, {"amsgrad": True}, {"betas": (0.0, 0.5), "eps": 1e-3}],
    "Adadelta": [{}, {"rho": 0.5, "weight_decay": 0.125}],
    "Adagrad": [{}, {"initial_accumulator_value": 0.5, "lr_decay": 0.125}],
    "Adamax": [{}, {"weight_decay": 0.125}],
    "ASGD": [{}, {"t0": 2.0, "lambd": 0.125}],
    "NAdam": [{}, {"decoupled_weight_decay": True, "weight_decay": 0.125}],
    "RAdam": [{}, {"decoupled_weight_decay": True, "weight_decay": 0.125, "betas": (0.5, 0.75)}],
    "RMSprop": [{}, {"centered": True, "momentum": 0.5}],
    "Rprop": [{}, {"etas": (0.25, 1.5), "step_sizes": (1e-4, 0.5)}],
    "SparseAdam": [{}, {"betas": (0.5, 0.75)}],
    "Adafactor": [{}, {"d": 2.0, "weight_decay": 0.125}],
    "Muon": [{}, {"nesterov": False, "adjust_lr_fn": "match_rms_adamw"}],
    "LBFGS": [{"max_iter": 2}, {"max_iter": 3, "line_search_fn": "strong_wolfe", "history_size": 2}],
    "ConjugateGradient": [{"max_iter": 2}, {"max_iter": 3, "restart": 2}],
}


def halved(epoch: int) -> float:
    return 1.0 / (1 + epoch)


#: Schedulers by name; those with True cycle momentum too, and need one.
SCHEDULERS: dict[str, Any] = {
    "StepLR": lambda o: lrs.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: lrs.MultiStepLR(o, [2, 2, 5]),
    "LinearLR": lambda o: lrs.LinearLR(o, 0.25, total_iters=4),
    "ExponentialLR": lambda o: lrs.ExponentialLR(o, 0.75),
    "CosineAnnealingLR": lambda o: lrs.CosineAnnealingLR(o, 4),
    "CosineAnnealingWarmRestarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, 2, 2),
    "PolynomialLR": lambda o: lrs.PolynomialLR(o, 6, 2.0),
    "LambdaLR": lambda o: lrs.LambdaLR(o, halved),
    "MultiplicativeLR": lambda o: lrs.MultiplicativeLR(o, halved),
    "CyclicLR": lambda o: lrs.CyclicLR(o, 0.01, 0.1, 2, cycle_momentum=False),
    "CyclicLR of momentum": lambda o: lrs.CyclicLR(o, 0.01, 0.1, 2),
    "OneCycleLR": lambda o: lrs.OneCycleLR(o, 0.1, 20, cycle_momentum=False),
    "OneCycleLR of momentum": lambda o: lrs.OneCycleLR(o, 0.1, 20),
    "ReduceLROnPlateau": lambda o: lrs.ReduceLROnPlateau(o, factor=0.5, patience=1),
    "SequentialLR": lambda o: lrs.SequentialLR(
        o, [lrs.ConstantLR(o, 0.5, 2), lrs.CosineAnnealingLR(o, 3), lrs.ExponentialLR(o, 0.5)], [2, 5]
    ),
    "ChainedScheduler": lambda o: lrs.ChainedScheduler([lrs.LinearLR(o, 0.5, total_iters=3), lrs.StepLR(o, 2, 0.5)]),
    "two": lambda o: [lrs.StepLR(o, 3, 0.5), lrs.ExponentialLR(o, 0.875)],
}
#: Hyperparameters that are functions of the count of updates, where they are known.
SCHEDULED: list[dict[str, Any]] = [
    {"lr": schedules.warmup_stable_decay(2, 3, 4, peak=0.05)},
    {"lr": schedules.sequence(schedules.linear(0.01, 0.1, 3), schedules.step(2, 0.5, 0.1))},
    {"lr": schedules.cosine(7, peak=0.1), "weight_decay": schedules.linear(0.25, 0.0, 6)},
    {"lr": schedules.constant(0.05), "betas": (schedules.linear(0.5, 0.75, 5), 0.875)},
    {"lr": schedules.constant(0.05), "momentum": schedules.linear(0.5, 0.875, 5)},
    {"lr": lambda t: 0.1 / (t + 1)},
]
AVERAGES: dict[str, Any] = {
    "swa": {},
    "ema": {"avg_fn": get_ema_avg_fn(0.75)},
    "ema of lists": {"multi_avg_fn": get_ema_multi_avg_fn(0.75)},
    "swa of lists": {"multi_avg_fn": get_swa_multi_avg_fn()},
    "own": {"avg_fn": lambda average, value, count: (average + value) / 2},
}


@dataclass
class Recipe:
    """All choices of one run. A process that knows the number can build the run."""

    number: int
    optimizer: str
    settings: dict[str, Any]
    scheduler: str | None
    average: str | None
    every: int  # updates between those of the average
    on_gpu: bool
    named: bool
    wrapped: bool  # in Parameters
    dtype: Any
    steps: int
    k: int
    nan: float  # how often a gradient is not finite

    def __str__(self) -> str:
        place = "gpu" if self.on_gpu else "cpu"
        names = "named" if self.named else "unnamed"
        return (
            f"{self.number}: {self.optimizer}({self.settings}), {self.scheduler}, {self.average}, {place}, {names}, "
            f"{np.dtype(self.dtype).name}, {self.k} of {self.steps}"
        )


def recipe(number: int, on_gpu: bool | None = None) -> Recipe:
    rng = np.random.default_rng([77, number])
    name = str(rng.choice(list(REGISTRY)))
    gpu = bool(rng.random() < 0.25) if on_gpu is None else on_gpu
    if gpu and name not in GPU_NAMES:
        name = str(rng.choice(GPU_NAMES))
    known = REGISTRY[name]["defaults"]
    closure = REGISTRY[name]["needs_closure"]
    settings = dict(SETTINGS[name][int(rng.integers(len(SETTINGS[name])))])
    kind = rng.random()
    scheduler = None
    if kind < 0.5:
        momentum = "momentum" in settings or "betas" in known
        allowed = [key for key in SCHEDULERS if momentum or not key.endswith("momentum")]
        # CyclicLR writes momentum and OneCycleLR betas as well; a schedule of both is for another choice.
        scheduler = str(rng.choice(allowed))
    elif kind < 0.8:
        allowed_values = [each for each in SCHEDULED if each.keys() <= known.keys()]
        settings |= allowed_values[int(rng.integers(len(allowed_values)))]
    settings.setdefault("lr", 0.05)
    nan = 0.0
    if not closure and rng.random() < 0.5:
        settings |= {"clip_norm": 1.0} if rng.random() < 0.5 else {"clip_value": 0.5}
    if not closure and rng.random() < 0.5:
        settings["nonfinite"], nan = "skip", 0.3
    dtypes = [np.float32, *DTYPES] if gpu else [np.float32, np.float64, *DTYPES]
    dtype = dtypes[int(rng.integers(len(dtypes)))]
    is_refused = not accepted(name, [np.zeros((1, 1), dtype)]) or (name == "SparseAdam" and np.dtype(dtype).kind == "c")
    if is_refused or (closure and np.dtype(dtype).itemsize == 2):
        dtype = np.float32
    steps = int(rng.integers(4, 11))
    return Recipe(
        number,
        name,
        settings,
        scheduler,
        str(rng.choice(list(AVERAGES))) if rng.random() < 0.5 else None,
        int(rng.integers(1, 3)),
        gpu,
        bool(rng.random() < 0.5),
        bool(rng.random() < 0.5),
        dtype,
        steps,
        int(rng.integers(0, steps + 1)),
        nan,
    )


def built(of: Recipe, start: int) -> dict[str, Any]:
    """New objects, with values of their own to begin with."""
    rng = np.random.default_rng([start, of.number])
    shapes = [(2, 3), (3, 1), (1, 1)] if of.optimizer == "Muon" else [(2, 3), (4,), ()]
    if of.optimizer == "SparseAdam":
        shapes = [(2, 3), (4,), (3, 1)]
    arrays = [draw(rng, shape, of.dtype) for shape in shapes]
    params = [Parameter(a) if of.wrapped and i != 1 else a for i, a in enumerate(arrays)]
    groups: list[dict[str, Any]] = [{"params": params[:2]}, {"params": params[2:], "note": of.number}]
    if of.named:
        groups = [
            {**group, "params": {f"p{id_}": p for id_, p in zip(ids, group["params"], strict=True)}}
            for ids, group in zip(("ab", "c"), groups, strict=True)
        ]
    if not REGISTRY[of.optimizer]["needs_closure"] and of.scheduler is None:
        # A number for one group also where the other has a schedule.
        groups[1]["lr"] = 0.025
    backend = ON_GPU if of.on_gpu else {}
    opt = getattr(roptim, of.optimizer)(groups, **of.settings, **backend)
    run: dict[str, Any] = {"params": params, "optimizer": opt, "rng": rng, "lrs": [], "epoch": 0}
    if of.scheduler is not None:
        made = SCHEDULERS[of.scheduler](opt)
        run["schedulers"] = made if isinstance(made, list) else [made]
    if of.average is not None:
        known = backend if of.average != "own" else {}
        run["average"] = AveragedModel(params, **AVERAGES[of.average], **known)
    # The order of the parts does not matter.
    return dict(sorted(run.items(), key=lambda part: hash((of.number, len(part[0])))))


def gradients(of: Recipe, run: dict[str, Any]) -> list[Any]:
    """What depends on the generator and on the parameters, with some missing and some not finite."""
    rng = run["rng"]
    found: list[Any] = []
    for p in run["params"]:
        noise, chance = draw(rng, p.shape, of.dtype), rng.random(2)
        gradient = np.asarray(noise + np.asarray(p) / 8).astype(of.dtype)
        if chance[0] < of.nan / len(run["params"]) and gradient.size:
            gradient[...] = [np.nan, np.inf][int(chance[1] < 0.5)]
        found.append(None if chance[1] > 0.875 else gradient)
    return found


def one_step(of: Recipe, run: dict[str, Any]) -> None:
    opt, params = run["optimizer"], run["params"]
    entry = REGISTRY[of.optimizer]
    values = gradients(of, run)
    loss = float(run["rng"].random())
    if entry["needs_closure"]:
        centres = [np.zeros(p.shape, of.dtype) if g is None else g for p, g in zip(params, values, strict=True)]

        def closure() -> Any:
            offsets = [np.asarray(p) - c for p, c in zip(params, centres, strict=True)]
            return sum(float(np.sum(np.abs(d) ** 2)) for d in offsets), as_given(of, [2 * d for d in offsets])

        opt.step(closure)
    elif entry["needs_sparse"]:
        rows = [None if g is None else SparseGrad(np.arange(len(g))[::2], g[::2], g.shape) for g in values]
        opt.step(as_given(of, rows))
    else:
        opt.step(as_given(of, values))
    for scheduler in run.get("schedulers", []):
        scheduler.step(*([loss] if isinstance(scheduler, lrs.ReduceLROnPlateau) else []))
    run["epoch"] += 1
    if "average" in run and run["epoch"] % of.every == 0:
        run["average"].update_parameters(params)
    run["lrs"].append([group["lr"] for group in opt.param_groups])


def as_given(of: Recipe, values: list[Any]) -> Any:
    return dict(zip(("pa", "pb", "pc"), values, strict=True)) if of.named else [values[:2], values[2:]]


def state(run: dict[str, Any]) -> bytes:
    """All that can be seen of a run."""
    opt = run["optimizer"]
    average = run["average"].module if "average" in run else None
    last = [scheduler.get_last_lr() for scheduler in run.get("schedulers", [])]
    return fingerprint([run, opt.skip_count, opt.update_count, average, last])


def resumes(of: Recipe, folder: Path) -> bytes:
    """Runs it whole, and in two parts; the first part goes on as well after it was saved."""
    whole, first, second = built(of, 1), built(of, 1), built(of, 2)
    for _ in range(of.steps):
        one_step(of, whole)
    for _ in range(of.k):
        one_step(of, first)
    roptim.save(first, folder / "run.ckpt")
    report = roptim.restore(folder / "run.ckpt", second)
    assert (report.initialised, report.dropped, report.converted_from) == ((), (), None), of
    assert state(second) == state(first), of
    for run in (first, second):
        for _ in range(of.k, of.steps):
            one_step(of, run)
        assert state(run) == state(whole), of
    return state(whole)


@pytest.mark.parametrize("block", range(100 if FULL else 10))
def test_resumed_runs_are_the_uninterrupted_ones(gpu: str, tmp_path: Path, block: int) -> None:
    for number in range(5 * block, 5 * block + 5):
        resumes(recipe(number), tmp_path)


def test_the_recipes_are_of_all_kinds() -> None:
    recipes = [recipe(number) for number in range(500)]
    assert {of.optimizer for of in recipes} == set(REGISTRY)
    assert {of.scheduler for of in recipes} == {None, *SCHEDULERS}
    assert {of.average for of in recipes} == {None, *AVERAGES}
    assert {of.optimizer for of in recipes if of.on_gpu} == set(GPU_NAMES)
    first = recipes[:50]
    assert sum(of.on_gpu for of in first) >= 5
    assert sum(of.nan > 0 for of in first) >= 10
    assert sum(0 < of.k < of.steps for of in first) >= 30
    assert any(of.k == 0 for of in recipes)
    assert any(of.k == of.steps for of in recipes)


@pytest.mark.parametrize("name", list(REGISTRY))
def test_every_optimizer_resumes(name: str, tmp_path: Path) -> None:
    number = next(n for n in range(10_000) if recipe(n, on_gpu=False).optimizer == name and recipe(n).k > 1)
    resumes(recipe(number, on_gpu=False), tmp_path)


@pytest.mark.parametrize("name", list(SCHEDULERS))
def test_every_scheduler_resumes(name: str, tmp_path: Path) -> None:
    wanted = (n for n in range(10_000) if (of := recipe(n, on_gpu=False)).scheduler == name and 0 < of.k < of.steps)
    resumes(recipe(next(wanted), on_gpu=False), tmp_path)


def test_skips_are_among_what_is_resumed(tmp_path: Path) -> None:
    """A run in which updates were left out before and after it was saved."""
    of = next(of for n in range(1000) if (of := recipe(n, on_gpu=False)).nan and of.optimizer == "Adam" and of.k > 3)
    run = built(of, 1)
    for _ in range(of.steps):
        one_step(of, run)
    assert run["optimizer"].skip_count > 0
    assert run["optimizer"].update_count + run["optimizer"].skip_count == of.steps
    resumes(of, tmp_path)


def second_half(number: int, source: str, target: str) -> None:
    """What another process does."""
    of = recipe(number, on_gpu=False)
    run = built(of, 3)
    roptim.restore(source, run)
    for _ in range(of.k, of.steps):
        one_step(of, run)
    Path(target).write_bytes(state(run))


@pytest.mark.parametrize("number", [2, 5, 11])
def test_another_process_goes_on(number: int, tmp_path: Path) -> None:
    of = recipe(number, on_gpu=False)
    whole, first = built(of, 1), built(of, 1)
    for _ in range(of.steps):
        one_step(of, whole)
    for _ in range(of.k):
        one_step(of, first)
    source, target = tmp_path / "run.ckpt", tmp_path / "state"
    roptim.save(first, source)
    code = f"import test_resume; test_resume.second_half({number}, {str(source)!r}, {str(target)!r})"
    paths = [str(Path(__file__).parent), *(path for path in sys.path if path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONHASHSEED": str(number)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert target.read_bytes() == state(whole)
