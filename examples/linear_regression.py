"""Linear regression with every optimizer that roptim has, one after the other.

The targets are ``x @ W + b`` with noise, and the gradients are two lines by hand. Least squares has an exact
solution to compare with, so the table tells how near each optimizer came.

Run ``python examples/linear_regression.py``. Exit code: 0 if all came near enough, else 1.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

import roptim
from roptim.optimizer import REGISTRY

# Learning rates for this problem; an optimizer that is not listed gets DEFAULT_LR.
DEFAULT_LR = 0.1
LR = {
    "SGD": 0.2,
    "Adadelta": 20,
    "Adagrad": 0.5,
    "ASGD": 0.2,
    "RAdam": 0.3,
    "RMSprop": 0.02,
    "LBFGS": 1,
    "ConjugateGradient": 1,
}
CLOSURE_STEPS = 5  # of an optimizer that evaluates the loss several times in each
GOAL = 1e-3  # largest difference to the least-squares solution

Array = np.ndarray
Params = dict[str, Array]


def make_data(seed: int = 0) -> tuple[Array, Array]:
    """200 rows of 5 inputs of different scale and 3 outputs."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((200, 5)) * [0.5, 0.7, 1, 1.2, 1.5]
    y = x @ rng.standard_normal((5, 3)) + rng.standard_normal(3)
    return x, y + 0.1 * rng.standard_normal(y.shape)


def loss_and_gradients(params: Params, x: Array, y: Array) -> tuple[float, Params]:
    """Half the squared error per row, and its gradients in the shape of the parameters."""
    error = x @ params["W"] + params["b"] - y
    loss = 0.5 * np.sum(error**2) / len(x)
    return float(loss), {"W": x.T @ error / len(x), "b": error.mean(axis=0)}


def least_squares(x: Array, y: Array) -> Params:
    """The exact minimum: the bias is the weight of an input that is always 1."""
    solution = np.linalg.lstsq(np.column_stack([x, np.ones(len(x))]), y, rcond=None)[0]
    return {"W": solution[:-1], "b": solution[-1]}


def make_optimizers(name: str, params: Params) -> list[tuple[roptim.Optimizer, list[str]]]:
    """The optimizer, with the names of its parameters. Muon takes matrices only, so AdamW gets the bias."""
    shares = {"Muon": ["W"], "AdamW": ["b"]} if name == "Muon" else {name: ["W", "b"]}
    optimizers = []
    for part, keys in shares.items():
        # Decay, which ASGD calls lambd, would pull the weights away from the least-squares solution.
        options = {key: 0.0 for key in ("weight_decay", "lambd") if key in REGISTRY[part]["defaults"]}
        options["lr"] = LR.get(part, DEFAULT_LR)
        optimizers.append((getattr(roptim, part)({key: params[key] for key in keys}, **options), keys))
    return optimizers


def fit(name: str, x: Array, y: Array, steps: int) -> tuple[Params, int, int]:
    """Trains from zero; returns the parameters and how many steps and evaluations of the loss that took."""
    params = {"W": np.zeros((x.shape[1], y.shape[1])), "b": np.zeros(y.shape[1])}
    optimizers = make_optimizers(name, params)
    evaluations = 0

    def closure() -> tuple[float, Params]:
        nonlocal evaluations
        evaluations += 1
        return loss_and_gradients(params, x, y)

    if REGISTRY[name]["needs_closure"]:
        steps = min(steps, CLOSURE_STEPS)
        for _ in range(steps):
            optimizers[0][0].step(closure)
        return params, steps, evaluations

    # Muon and others take steps of a size that does not shrink by itself: the learning rate must.
    schedules = [roptim.lr_scheduler.CosineAnnealingLR(opt, T_max=steps, eta_min=1e-5) for opt, _ in optimizers]
    for _ in range(steps):
        gradients: dict[str, Any] = closure()[1]
        if REGISTRY[name]["needs_sparse"]:  # every row has a gradient here, so all are named
            gradients = {key: roptim.SparseGrad(np.arange(len(g)), g, g.shape) for key, g in gradients.items()}
        for opt, keys in optimizers:
            opt.step({key: gradients[key] for key in keys})
        for schedule in schedules:
            schedule.step()
    return params, steps, evaluations


def main(arguments: list[str] | None = None) -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description="Linear regression with every optimizer.")
    parser.add_argument("--steps", type=int, default=500, help="of each optimizer that needs no closure")
    options = parser.parse_args(arguments)

    x, y = make_data()
    best = least_squares(x, y)
    print(f"smallest loss possible: {loss_and_gradients(best, x, y)[0]:.8f}\n")
    print(f"{'optimizer':<18}{'lr':>5}{'steps':>7}{'evaluations':>13}{'final loss':>13}{'distance':>10}")
    failed = []
    for name in REGISTRY:
        params, steps, evaluations = fit(name, x, y, options.steps)
        loss = loss_and_gradients(params, x, y)[0]
        distance = max(float(np.abs(params[key] - best[key]).max()) for key in best)
        lr = LR.get(name, DEFAULT_LR)
        print(f"{name:<18}{lr:>5g}{steps:>7}{evaluations:>13}{loss:>13.8f}{distance:>10.1e}")
        if not distance <= GOAL:
            failed.append(name)
    print(f"\nfarther than {GOAL:g} from the least-squares solution: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
