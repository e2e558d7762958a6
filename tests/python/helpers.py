"""Recorded torch traces, the error measure they are compared with, arrays laid out, and a step of any optimizer."""

from __future__ import annotations

import itertools
import json
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

import roptim
from roptim import _roptim
from roptim.optimizer import REGISTRY

#: What `laid_out` takes.
LAYOUTS = ["C", "F", "reversed", "with gaps"]
VECTORS = Path(__file__).resolve().parent.parent / "vectors"


@dataclass(frozen=True, eq=False)
class Case:
    """One recorded run: one optimizer with one setting in one dtype, over several parameters.

    Gradients do not depend on the parameters. Column 0 of parameter 0 has the gradient zero in
    every step (an array of zeros, not a missing gradient), so the moments there stay zero and
    0 / (√0 + ε) is met. A parameter may have no gradient in a step (parameter 2, in steps 4, 5 and
    10): it does not move then, and its own step count stays.

    Arrays are in the case's dtype and read-only: copy what an optimizer is to update.
    """

    name: str
    optimizer: str  # torch's class name
    kwargs: dict[str, Any]  # as given to torch's class; pairs such as betas are tuples
    dtype: np.dtype[Any]
    groups: None  # parameter groups; no recorded run has any: all parameters share kwargs
    steps: int
    checkpoints: tuple[int, ...]  # step counts (1 = after the first step) at which parameters and state are recorded
    p0: list[np.ndarray]
    _arrays: dict[str, np.ndarray] = field(repr=False)

    def __str__(self) -> str:
        return self.name

    def gradient(self, step: int, i: int) -> np.ndarray | None:
        """Gradient of parameter `i` in step `step` (1 … steps), None where it has none.

        The recording marks "no gradient" by a row that is all NaN.
        """
        if not 1 <= step <= self.steps:
            raise IndexError(f"{self.name}: step must be in [1, {self.steps}], got {step}")
        row = self._arrays[f"g/{i}"][step - 1, ...]  # the ellipsis keeps a 0-d row an array
        return None if row.size and np.isnan(row).all() else row

    def gradients(self, step: int) -> list[np.ndarray | None]:
        """Gradients of all parameters in step `step` (1 … steps)."""
        return [self.gradient(step, i) for i in range(len(self.p0))]

    def params(self, checkpoint: int) -> list[np.ndarray]:
        """All parameters after step `checkpoint`, one of `checkpoints`."""
        return [self._arrays[f"p/{checkpoint}/{i}"] for i in range(len(self.p0))]

    def state(self, checkpoint: int) -> list[dict[str, np.ndarray]]:
        """For each parameter its state after step `checkpoint`, torch's key → array, in torch's order.

        `step`, NAdam's `mu_product`, ASGD's `eta` and `mu` are 0-d float32 arrays whatever the dtype. A
        parameter without state has an empty dict.
        """
        if checkpoint not in self.checkpoints:
            raise KeyError(f"{self.name}: checkpoint must be one of {self.checkpoints}, got {checkpoint}")
        states: list[dict[str, np.ndarray]] = []
        for i in range(len(self.p0)):
            prefix = f"s/{checkpoint}/{i}/"
            states.append({k.removeprefix(prefix): a for k, a in self._arrays.items() if k.startswith(prefix)})
        return states


def load_cases(stem: str, exact: bool) -> Iterator[Case]:
    """The cases of `tests/vectors/<stem>.npz`, in recorded order.

    exact=False: plain torch, to be met within a tolerance. exact=True: `<stem>_exact.npz`, torch
    without FMA and with a correctly rounded square root, to be met bit for bit in float32.
    """
    yield from _read(f"{stem}_exact.npz" if exact else f"{stem}.npz")


@cache
def _read(file: str) -> tuple[Case, ...]:
    arrays: dict[str, dict[str, np.ndarray]] = {}
    with np.load(VECTORS / file, allow_pickle=False) as archive:
        index = json.loads(archive["index"].tobytes())
        for key in archive.files:
            if key != "index":
                name, rest = key.split("/", 1)
                arrays.setdefault(name, {})[rest] = archive[key]
                arrays[name][rest].flags.writeable = False
    return tuple(_case(entry, arrays[entry["name"]]) for entry in index)


def _case(entry: dict[str, Any], arrays: dict[str, np.ndarray]) -> Case:
    if entry["groups"] is not None:
        raise NotImplementedError(f"{entry['name']}: groups must be null, got {entry['groups']}")
    return Case(
        name=entry["name"],
        optimizer=entry["optimizer"],
        kwargs={k: tuple(v) if isinstance(v, list) else v for k, v in entry["kwargs"].items()},
        dtype=np.dtype(entry["dtype"]),
        groups=entry["groups"],
        steps=entry["steps"],
        checkpoints=tuple(entry["checkpoints"]),
        p0=[arrays[f"p0/{i}"] for i in range(len(entry["shapes"]))],
        _arrays=arrays,
    )


def relative_error(got: Any, want: Any, p0: Any) -> float:
    """Largest |got - want| / max(|want|, mean|p0|) over all elements, in float64; 0 for empty arrays.

    `p0` sets the scale below which an element counts as small: for a parameter its start, so that
    an element near zero is judged by the size of its array. For a state slot give `want` itself:
    moments have another size than the parameter, and its scale would hide their errors.

    Equal elements, two NaN and two infinities of one sign included, have error 0; any other pair
    with a NaN or infinity has error inf. Raises ValueError if the shapes differ.
    """
    got, want, p0 = (np.asarray(x).astype(np.float64) for x in (got, want, p0))
    if got.shape != want.shape:
        raise ValueError(f"relative_error: got must have the shape of want, {want.shape}, got {got.shape}")
    if want.size == 0:
        return 0.0
    scale = np.abs(p0).mean() if p0.size else 0.0
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        error = np.abs(got - want) / np.maximum(np.abs(want), scale)
    same = (got == want) | (np.isnan(got) & np.isnan(want))
    comparable = np.isfinite(got) & np.isfinite(want) & np.isfinite(scale)
    return float(np.where(same, 0.0, np.where(comparable, error, np.inf)).max())


def laid_out(a: Any, layout: str) -> Any:
    """The same numbers elsewhere in memory."""
    if a.ndim == 0:
        return a.copy()
    if layout == "reversed":
        return a[::-1].copy()[::-1]
    if layout == "with gaps":
        view = np.full((2 * a.shape[0], *a.shape[1:]), 7, a.dtype)[::2]
        view[...] = a
        return view
    return a.copy(order=layout)


def step(opt: Any, gradients: list[Any] | None = None) -> None:
    """One step with these gradients, or the Parameters' own, given as the optimizer takes them.

    To one that takes a closure they are those of a loss that falls by 1 from evaluation to evaluation.
    """
    entry = REGISTRY[type(opt).__name__]
    if entry["needs_closure"]:
        losses = itertools.count(0, -1)
        opt.step(lambda: next(losses) if gradients is None else (next(losses), gradients))
    elif entry["needs_sparse"] and gradients is not None:
        rows = [roptim.SparseGrad(np.arange(len(g)), g, g.shape) if isinstance(g, np.ndarray) else g for g in gradients]
        opt.step(rows)
    else:
        opt.step(gradients)


def fingerprint(tree: Any) -> bytes:
    """Every byte that a file of this tree would have: types, dtypes, the order of keys and the sign of NaN included.

    Optimizers, schedulers and generators in it stand for their states, Parameters for their values.
    """
    return _roptim.dumps(_settled(tree))


def _settled(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {key: _settled(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)([_settled(item) for item in tree])
    if isinstance(tree, roptim.Optimizer):
        groups = [{k: v for k, v in group.items() if k != "params"} for group in tree.param_groups]
        return [_settled(tree.state_dict()), _settled(groups), _settled(tree.defaults), tree.update_count]
    if isinstance(tree, roptim.schedules.Schedule):
        return tree.to_json()
    return "function" if isinstance(tree, types.FunctionType) else tree


class Sign(roptim.Optimizer):
    """Steps along the sign of a running gradient: an optimizer as torch users write them."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]  # torch's signature, as users write it
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["count"] = 0
                    state["sum"] = np.zeros_like(p.data)
                state["count"] += 1
                state["sum"] += p.grad
                p.data -= group["lr"] * np.sign(state["sum"])
        return loss
