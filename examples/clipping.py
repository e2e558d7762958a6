"""Gradient clipping in a recurrent network whose gradients explode.

The network sees a number, then 19 zeros, and has to say the number at the end. On the way back through time the
gradient is multiplied by the same matrix at each of the 20 steps, and the matrix is large at first. So now and
then the gradient is many times as long as usual, and one such update throws away what was learned.
``clip_grad_norm_`` keeps its direction and bounds its length. Both runs begin with the same network and see the
same batches.

Run ``python examples/clipping.py``. Exit code: 0 if the clipped run learns the task and the other ends with a loss
more than ten times as large, else 1.
"""

from __future__ import annotations

import argparse
import math

import numpy as np

import roptim

LENGTH, HIDDEN, BATCH_SIZE = 20, 16, 32
LR, MAX_NORM = 0.07, 0.5
GUESSING = 1 / 3  # the loss of always answering 0: the variance of a number drawn evenly from [-1, 1]

Array = np.ndarray
Model = dict[str, roptim.Parameter]


def new_model(rng: np.random.Generator) -> Model:
    """Hidden state from itself (W), from the input (U, b), and the answer from it (V, c)."""
    return {
        "W": roptim.Parameter(1.5 * rng.standard_normal((HIDDEN, HIDDEN)) / np.sqrt(HIDDEN)),
        "U": roptim.Parameter(rng.standard_normal((1, HIDDEN))),
        "b": roptim.Parameter(np.zeros(HIDDEN)),
        "V": roptim.Parameter(rng.standard_normal((HIDDEN, 1)) / np.sqrt(HIDDEN)),
        "c": roptim.Parameter(np.zeros(1)),
    }


def new_batch(rng: np.random.Generator) -> tuple[Array, Array]:
    """Inputs of shape (steps, rows, 1), and the number that was the first."""
    x = np.zeros((LENGTH, BATCH_SIZE, 1))
    x[0] = rng.uniform(-1, 1, (BATCH_SIZE, 1))
    return x, x[0]


def forward(model: Model, x: Array) -> tuple[list[Array], Array]:
    """The hidden states, from the one before the first input, and the answers."""
    hidden = [np.zeros((x.shape[1], HIDDEN))]
    for step in x:
        hidden.append(np.tanh(step @ model["U"] + hidden[-1] @ model["W"] + model["b"]))
    return hidden, hidden[-1] @ model["V"] + model["c"]


def backward(model: Model, x: Array, hidden: list[Array], at_answer: Array) -> None:
    """Backpropagation through time, from the gradient at the answers; sets ``.grad`` of every parameter."""
    model["V"].grad, model["c"].grad = hidden[-1].T @ at_answer, at_answer.sum(axis=0)
    for name in ("W", "U", "b"):
        model[name].grad = np.zeros(model[name].shape)
    at_hidden = at_answer @ model["V"].T
    for step, before, after in reversed(list(zip(x, hidden[:-1], hidden[1:], strict=True))):
        at_sum = at_hidden * (1 - after**2)  # tanh' = 1 - tanh²
        model["W"].grad += before.T @ at_sum
        model["U"].grad += step.T @ at_sum
        model["b"].grad += at_sum.sum(axis=0)
        at_hidden = at_sum @ model["W"].T


def train(seed: int, steps: int, max_norm: float) -> tuple[list[float], list[float]]:
    """Loss and norm of the gradient before clipping, of every step."""
    rng = np.random.default_rng(seed)
    model = new_model(rng)
    optimizer = roptim.SGD(model, lr=LR, momentum=0.9)
    losses, norms = [], []
    for _ in range(steps):
        x, y = new_batch(rng)
        optimizer.zero_grad()
        hidden, answer = forward(model, x)
        backward(model, x, hidden, 2 * (answer - y) / len(y))
        norms.append(roptim.clip_grad_norm_(model.values(), max_norm))
        optimizer.step()
        losses.append(float(np.mean((answer - y) ** 2)))
    return losses, norms


def main(arguments: list[str] | None = None) -> int:
    """Trains with and without clipping and prints the losses."""
    parser = argparse.ArgumentParser(description="Gradient clipping in a recurrent network.")
    parser.add_argument("--seed", type=int, default=0, help="of the first weights and the batches")
    parser.add_argument("--steps", type=int, default=500)
    options = parser.parse_args(arguments)

    runs = {
        "not clipped": train(options.seed, options.steps, math.inf),  # an infinite bound clips nothing
        f"clipped to {MAX_NORM:g}": train(options.seed, options.steps, MAX_NORM),
    }
    print(f"mean squared error; always answering 0 gives {GUESSING:.3f}")
    print("".join(f"{text:>18}" for text in ("steps", *runs)))
    tenth = max(1, options.steps // 10)
    for start in range(0, options.steps, tenth):
        means = [np.mean(losses[start : start + tenth]) for losses, _ in runs.values()]
        print(f"{f'{start + 1} to {start + tenth}':>18}" + "".join(f"{mean:>18.4f}" for mean in means))
    for name, statistic in (("usual norm", np.median), ("largest norm", np.max)):
        print(f"{name:>18}" + "".join(f"{statistic(norms):>18.1f}" for _, norms in runs.values()))
    without, clipped = means
    return 0 if clipped < GUESSING / 10 and without > 10 * clipped else 1


if __name__ == "__main__":
    raise SystemExit(main())
