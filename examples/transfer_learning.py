"""Transfer learning: a frozen body, a new head, and parameter groups with learning rates of their own.

A two-layer network learns task A from many examples. Task B has few, but its targets depend on almost the same
features of the input. So the first layer, the body, is kept, and only the second, the head, begins anew:

1. the body is frozen (``requires_grad = False``), and the optimizer gets the head alone;
2. the body is unfrozen and joins as a group with a lower learning rate (``add_param_group``).

A network that learns task B from nothing shows what the body is worth.

Run ``python examples/transfer_learning.py``. Exit code: 0 if the error on task B gets smaller from line to line of
the result, else 1.
"""

from __future__ import annotations

import argparse

import numpy as np

import roptim

INPUTS, HIDDEN, FEATURES = 16, 32, 6
BATCH_SIZE = 40
LR, BODY_LR = 1e-2, 1e-3
FROZEN_STEPS, FINE_STEPS = 200, 400

Array = np.ndarray
Layer = dict[str, roptim.Parameter]
Data = tuple[Array, Array]


def make_tasks(rng: np.random.Generator) -> tuple[Data, Data, Data]:
    """Examples of task A, of task B, and more of B for the test. The features differ a little from A to B."""
    features_a = rng.standard_normal((INPUTS, FEATURES)) / 2
    features_b = features_a + 0.1 * rng.standard_normal((INPUTS, FEATURES))
    mix_a, mix_b = rng.standard_normal((FEATURES, 8)), rng.standard_normal((FEATURES, 2))

    def examples(count: int, features: Array, mix: Array) -> Data:
        x = rng.standard_normal((count, INPUTS))
        return x, np.tanh(x @ features) @ mix

    return examples(2000, features_a, mix_a), examples(80, features_b, mix_b), examples(1000, features_b, mix_b)


def new_body(rng: np.random.Generator) -> Layer:
    """The first layer, at random."""
    weights = rng.standard_normal((INPUTS, HIDDEN)) / np.sqrt(INPUTS)
    return {"W": roptim.Parameter(weights), "b": roptim.Parameter(np.zeros(HIDDEN))}


def new_head(outputs: int) -> Layer:
    """The second layer, at zero: the hidden units differ from each other already."""
    return {"W": roptim.Parameter(np.zeros((HIDDEN, outputs))), "b": roptim.Parameter(np.zeros(outputs))}


def forward(body: Layer, head: Layer, x: Array) -> tuple[Array, Array]:
    """Hidden units and outputs."""
    hidden = np.tanh(x @ body["W"] + body["b"])
    return hidden, hidden @ head["W"] + head["b"]


def loss_and_gradients(body: Layer, head: Layer, x: Array, y: Array) -> float:
    """The mean squared error; sets ``.grad``, but not that of a frozen body, which saves its computation."""
    hidden, outputs = forward(body, head, x)
    at_output = 2 * (outputs - y) / y.size
    head["W"].grad, head["b"].grad = hidden.T @ at_output, at_output.sum(axis=0)
    if body["W"].requires_grad:
        at_hidden = (at_output @ head["W"].T) * (1 - hidden**2)  # tanh' = 1 - tanh²
        body["W"].grad, body["b"].grad = x.T @ at_hidden, at_hidden.sum(axis=0)
    return float(np.mean((outputs - y) ** 2))


def train(
    optimizer: roptim.Optimizer, body: Layer, head: Layer, data: Data, steps: int, rng: np.random.Generator
) -> None:
    """Steps on random batches."""
    x, y = data
    for _ in range(steps):
        rows = rng.choice(len(x), BATCH_SIZE, replace=False)
        optimizer.zero_grad()
        loss_and_gradients(body, head, x[rows], y[rows])
        optimizer.step()


def error(body: Layer, head: Layer, data: Data) -> float:
    """The mean squared error as a share of the targets' variance."""
    x, y = data
    return float(np.mean((forward(body, head, x)[1] - y) ** 2) / np.var(y))


def main(arguments: list[str] | None = None) -> int:
    """Trains on A, then on B in three ways, and prints the errors on B."""
    parser = argparse.ArgumentParser(description="Transfer learning with parameter groups.")
    parser.add_argument("--seed", type=int, default=0, help="of the tasks, the first weights and the batches")
    options = parser.parse_args(arguments)
    rng = np.random.default_rng(options.seed)
    task_a, task_b, test_b = make_tasks(rng)

    body, head_a = new_body(rng), new_head(outputs=8)
    train(roptim.Adam([*body.values(), *head_a.values()], lr=LR), body, head_a, task_a, 1000, rng)
    print(f"task A, {len(task_a[0])} examples: error {error(body, head_a, task_a):.2%}")
    print(f"task B, {len(task_b[0])} examples, error on {len(test_b[0])} others:")

    own_body, own_head = new_body(rng), new_head(outputs=2)
    optimizer = roptim.Adam([*own_body.values(), *own_head.values()], lr=LR)
    train(optimizer, own_body, own_head, task_b, FROZEN_STEPS + FINE_STEPS, rng)
    errors = {"from nothing": error(own_body, own_head, test_b)}

    head = new_head(outputs=2)
    for p in body.values():
        p.requires_grad = False
    optimizer = roptim.Adam(head.values(), lr=LR)
    train(optimizer, body, head, task_b, FROZEN_STEPS, rng)
    errors["body of task A, frozen"] = error(body, head, test_b)

    for p in body.values():
        p.requires_grad = True
    optimizer.add_param_group({"params": body.values(), "lr": BODY_LR})
    train(optimizer, body, head, task_b, FINE_STEPS, rng)
    errors["then unfrozen, at a tenth of the learning rate"] = error(body, head, test_b)

    for name, value in errors.items():
        print(f"  {name:<48}{value:>7.2%}")
    values = list(errors.values())
    return 0 if values == sorted(values, reverse=True) else 1


if __name__ == "__main__":
    raise SystemExit(main())
