"""L-BFGS with a closure: a small network fits a curve.

L-BFGS and conjugate gradients evaluate the loss at several points in one step, so one gradient is not enough for
them: ``step`` gets a closure, which clears the gradients, computes the loss, sets each ``.grad`` and returns the
loss. AdamW takes the same closure and calls it once per step, so one loop compares all three. All data are in every
evaluation here. On mini-batches, where the loss changes from call to call, a line search has little to hold on to.

Run ``python examples/lbfgs_closure.py``. Exit code: 0 if each optimizer reaches the goal, L-BFGS with the fewest
evaluations, else 1.
"""

from __future__ import annotations

import argparse
import math

import numpy as np

import roptim

HIDDEN = 16
GOAL = 1e-4  # of the loss; always answering with the mean gives about 0.2

Array = np.ndarray
Model = dict[str, roptim.Parameter]


def make_data() -> tuple[Array, Array]:
    """100 points of a wave that gets faster, as columns."""
    x = np.linspace(-1, 1, 100)[:, None]
    return x, np.sin(3 * (x + 1) ** 2)


def new_model(seed: int = 0) -> Model:
    """One hidden layer. Its numbers are float64, because a line search compares losses that are almost equal."""
    rng = np.random.default_rng(seed)
    return {
        "W1": roptim.Parameter(2 * rng.standard_normal((1, HIDDEN))),
        "b1": roptim.Parameter(2 * rng.standard_normal(HIDDEN)),
        "W2": roptim.Parameter(rng.standard_normal((HIDDEN, 1)) / np.sqrt(HIDDEN)),
        "b2": roptim.Parameter(np.zeros(1)),
    }


def loss_and_gradients(model: Model, x: Array, y: Array) -> float:
    """Half the mean squared error of ``tanh(x @ W1 + b1) @ W2 + b2``; sets ``.grad`` of every parameter."""
    hidden = np.tanh(x @ model["W1"] + model["b1"])
    error = hidden @ model["W2"] + model["b2"] - y
    at_output = error / len(x)
    at_hidden = (at_output @ model["W2"].T) * (1 - hidden**2)  # tanh' = 1 - tanh²
    model["W2"].grad, model["b2"].grad = hidden.T @ at_output, at_output.sum(axis=0)
    model["W1"].grad, model["b1"].grad = x.T @ at_hidden, at_hidden.sum(axis=0)
    return 0.5 * float(np.mean(error**2))


def train(optimizer: roptim.Optimizer, model: Model, most_evaluations: int) -> tuple[int, list[float]]:
    """Steps until the goal is reached or the evaluations are used up; returns their number and every loss."""
    x, y = make_data()
    losses: list[float] = []

    def closure() -> float:
        optimizer.zero_grad()
        losses.append(loss_and_gradients(model, x, y))
        return losses[-1]

    steps, best = 0, math.inf
    while best > GOAL and len(losses) < most_evaluations:
        before = len(losses)
        optimizer.step(closure)
        steps += 1
        best = min(best, *losses[before:])
    return steps, losses


def main(arguments: list[str] | None = None) -> int:
    """Trains the same network with three optimizers and prints what each needed."""
    parser = argparse.ArgumentParser(description="L-BFGS with a closure, beside conjugate gradients and AdamW.")
    parser.add_argument("--evaluations", type=int, default=20_000, help="after which an optimizer is stopped")
    options = parser.parse_args(arguments)

    models = {name: new_model() for name in ("LBFGS", "ConjugateGradient", "AdamW")}
    optimizers = {
        "LBFGS": roptim.LBFGS(models["LBFGS"], lr=1, line_search_fn="strong_wolfe"),
        "ConjugateGradient": roptim.ConjugateGradient(models["ConjugateGradient"]),
        "AdamW": roptim.AdamW(models["AdamW"], lr=0.02, weight_decay=0),
    }
    print(f"to a loss of {GOAL:g}{'steps':>14}{'evaluations':>14}{'smallest loss':>16}")
    needed: dict[str, float] = {}
    for name, optimizer in optimizers.items():
        steps, losses = train(optimizer, models[name], options.evaluations)
        needed[name] = next((i for i, loss in enumerate(losses, start=1) if loss <= GOAL), math.inf)
        shown = "not reached" if needed[name] == math.inf else needed[name]
        print(f"{name:<20}{steps:>14}{shown:>14}{min(losses):>16.1e}")
    all_arrived = max(needed.values()) < math.inf
    return 0 if all_arrived and needed["LBFGS"] == min(needed.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
