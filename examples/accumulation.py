"""Gradient accumulation: the update of a large batch, from batches that fit into memory.

The loss of a batch is a mean over its rows, so its gradient is the mean of the gradients of its parts, each weighted
by its share of the rows. Every micro-batch adds its part to ``.grad``, and one step follows. Three runs of the same
network are compared: whole batches, weighted micro-batches, and micro-batches that all count alike, which is
a mistake where they differ in size.

Run ``python examples/accumulation.py``. Exit code: 0 if the first two end on the same parameters up to rounding and
the third does not, else 1.
"""

from __future__ import annotations

import argparse

import numpy as np

import roptim

INPUTS, HIDDEN = 10, 20
BATCH_SIZE, MICRO_BATCHES = 100, 8  # 8 parts of 100 rows have 13 or 12
TOLERANCE = 1e-9  # float64 keeps 16 digits, some of which the steps may lose

Array = np.ndarray
Model = dict[str, roptim.Parameter]


def new_model(seed: int) -> Model:
    """One hidden layer, in float64."""
    rng = np.random.default_rng(seed)
    return {
        "W1": roptim.Parameter(rng.standard_normal((INPUTS, HIDDEN)) / np.sqrt(INPUTS)),
        "b1": roptim.Parameter(np.zeros(HIDDEN)),
        "W2": roptim.Parameter(rng.standard_normal((HIDDEN, 1)) / np.sqrt(HIDDEN)),
        "b2": roptim.Parameter(np.zeros(1)),
    }


def new_batch(rng: np.random.Generator) -> tuple[Array, Array]:
    """Inputs, and a product of two of them to be learned."""
    x = rng.standard_normal((BATCH_SIZE, INPUTS))
    return x, x[:, :1] * x[:, 1:2]


def loss_and_gradients(model: Model, x: Array, y: Array) -> tuple[float, dict[str, Array]]:
    """Half the mean squared error of ``tanh(x @ W1 + b1) @ W2 + b2`` over the rows given, and its gradients."""
    hidden = np.tanh(x @ model["W1"] + model["b1"])
    error = hidden @ model["W2"] + model["b2"] - y
    at_output = error / len(x)
    at_hidden = (at_output @ model["W2"].T) * (1 - hidden**2)  # tanh' = 1 - tanh²
    gradients = {
        "W1": x.T @ at_hidden,
        "b1": at_hidden.sum(axis=0),
        "W2": hidden.T @ at_output,
        "b2": at_output.sum(axis=0),
    }
    return 0.5 * float(np.mean(error**2)), gradients


def train(steps: int, micro_batches: int, weighted: bool = True) -> tuple[Model, float]:
    """Trains on batches cut into micro-batches; returns the model and the loss of the last batch."""
    model, rng = new_model(seed=0), np.random.default_rng(1)
    optimizer = roptim.AdamW(model, lr=1e-2)
    for p in model.values():
        p.grad = np.zeros(p.shape)  # what the micro-batches add to
    for _ in range(steps):
        x, y = new_batch(rng)
        batch_loss = 0.0
        optimizer.zero_grad(set_to_none=False)
        for part_x, part_y in zip(np.array_split(x, micro_batches), np.array_split(y, micro_batches), strict=True):
            weight = len(part_x) / len(x) if weighted else 1 / micro_batches
            loss, gradients = loss_and_gradients(model, part_x, part_y)
            batch_loss += weight * loss
            for name, p in model.items():
                p.grad += weight * gradients[name]
        optimizer.step()
    return model, batch_loss


def main(arguments: list[str] | None = None) -> int:
    """Trains in three ways and prints how far the parameters are from each other."""
    parser = argparse.ArgumentParser(description="Gradient accumulation over micro-batches.")
    parser.add_argument("--steps", type=int, default=300)
    steps = parser.parse_args(arguments).steps

    whole, loss = train(steps, 1)
    print(f"{f'{steps} steps':<32}{'loss':>12}{'largest difference':>22}")
    print(f"{'whole batches':<32}{loss:>12.6f}")
    distances = {}
    for weighted in (True, False):
        model, loss = train(steps, MICRO_BATCHES, weighted)
        distances[weighted] = max(float(np.abs(model[name].data - whole[name].data).max()) for name in whole)
        text = "micro-batches, " + ("weighted" if weighted else "all alike")
        print(f"{text:<32}{loss:>12.6f}{distances[weighted]:>22.1e}")
    return 0 if distances[True] <= TOLERANCE < distances[False] else 1


if __name__ == "__main__":
    raise SystemExit(main())
