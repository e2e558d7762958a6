"""ReduceLROnPlateau: the learning rate drops when the validation loss stops getting better.

Logistic regression on small batches: with a large learning rate SGD gets near the minimum fast, but then jumps
around it, because each batch points elsewhere. The scheduler watches the loss on validation data, waits for 5 epochs
without a better one, and cuts the learning rate to a third. A run with a constant learning rate is the comparison.

Run ``python examples/plateau.py``. Exit code: 0 if the scheduled run ends with the smaller validation loss, else 1.
"""

from __future__ import annotations

import argparse

import numpy as np

import roptim

INPUTS, BATCH_SIZE, LR = 30, 8, 0.3

Array = np.ndarray
Params = dict[str, Array]
Data = tuple[Array, Array]


def make_data(rng: np.random.Generator) -> tuple[Data, Data]:
    """Training and validation data. The labels, 0 and 1, are drawn with a probability, so no model is sure of them."""
    weights = rng.standard_normal(INPUTS) / np.sqrt(INPUTS)

    def rows(count: int) -> Data:
        x = rng.standard_normal((count, INPUTS))
        return x, (rng.random(count) < probability(2 * x @ weights)).astype(float)

    return rows(2000), rows(2000)


def probability(score: Array) -> Array:
    """The logistic function."""
    return 1 / (1 + np.exp(-score))


def loss_and_gradients(params: Params, x: Array, y: Array) -> tuple[float, Params]:
    """The mean of -log(probability of the right label), and its gradients in the shape of the parameters."""
    score = x @ params["w"] + params["b"]
    loss = np.mean(np.logaddexp(0, score) - y * score)
    error = (probability(score) - y) / len(y)
    return float(loss), {"w": x.T @ error, "b": error.sum(keepdims=True)}


def train(epochs: int, schedule: bool) -> list[float]:
    """Trains, tells about each drop of the learning rate, and returns the validation loss after every epoch."""
    rng = np.random.default_rng(0)
    (x, y), validation = make_data(rng)
    params = {"w": np.zeros(INPUTS), "b": np.zeros(1)}
    optimizer = roptim.SGD(params, lr=LR)
    scheduler = roptim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=1 / 3, patience=5, min_lr=1e-3)
    losses = []
    for epoch in range(1, epochs + 1):
        for rows in np.split(rng.permutation(len(x)), len(x) // BATCH_SIZE):
            optimizer.step(loss_and_gradients(params, x[rows], y[rows])[1])
        losses.append(loss_and_gradients(params, *validation)[0])
        before = scheduler.get_last_lr()[0]
        if schedule:
            scheduler.step(losses[-1])
        lr = scheduler.get_last_lr()[0]
        if lr < before:
            print(f"epoch {epoch:>3}: best validation loss {min(losses):.4f}, lr {before:.4f} -> {lr:.4f}")
    return losses


def main(arguments: list[str] | None = None) -> int:
    """Trains with and without the scheduler and prints the last validation losses."""
    parser = argparse.ArgumentParser(description="ReduceLROnPlateau on a validation loss.")
    parser.add_argument("--epochs", type=int, default=45)
    options = parser.parse_args(arguments)
    scheduled = train(options.epochs, schedule=True)
    constant = train(options.epochs, schedule=False)
    print(f"validation loss after {options.epochs} epochs: {scheduled[-1]:.4f}, with a constant lr {constant[-1]:.4f}")
    return 0 if scheduled[-1] < constant[-1] else 1


if __name__ == "__main__":
    raise SystemExit(main())
