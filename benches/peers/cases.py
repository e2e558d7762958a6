"""The cases and the optimizers, as data, and the numbers that every entrant starts from."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from peers import numpy_loops

Shapes = list[tuple[int, ...]]


def gpt2_small() -> Shapes:
    """The shapes of GPT-2 small's parameters."""
    width, vocabulary, context, blocks = 768, 50257, 1024, 12
    norm: Shapes = [(width,), (width,)]
    attention: Shapes = [(width, 3 * width), (3 * width,), (width, width), (width,)]
    feed_forward: Shapes = [(width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    return [(vocabulary, width), (context, width)] + (norm + attention + norm + feed_forward) * blocks + norm


def gpt2_block() -> Shapes:
    """The matrices of one of GPT-2 small's blocks."""
    width = 768
    return [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]


def resnet50() -> Shapes:
    """The shapes of ResNet-50's parameters."""

    def convolution(outputs: int, inputs: int, side: int) -> Shapes:
        return [(outputs, inputs, side, side), (outputs,), (outputs,)]  # with the batch norm behind it

    shapes, inputs = convolution(64, 3, 7), 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += convolution(width, inputs, 1) + convolution(width, width, 3) + convolution(4 * width, width, 1)
            if block == 0:
                shapes += convolution(4 * width, inputs, 1)
            inputs = 4 * width
    return [*shapes, (1000, inputs), (1000,)]


@dataclass(frozen=True)
class Case:
    """Parameters of these shapes, stepped together."""

    title: str
    shapes: Shapes
    #: Whether ``--quick`` leaves it out.
    large: bool = False
    #: A parameter group for each tensor. optax has no groups and takes a list.
    own_groups: bool = False
    #: Rows that a gradient touches; None: dense gradients.
    rows: int | None = None
    #: Peers that have no turn here, and why.
    without: dict[str, str] = field(default_factory=dict)

    @property
    def elements(self) -> int:
        """Numbers in all parameters together."""
        return sum(math.prod(shape) for shape in self.shapes)


CASES = {
    "single": Case("1 tensor of 64 Mi", [(2**26,)], large=True),
    "gpt2": Case("GPT-2 small", gpt2_small(), large=True),
    "resnet50": Case("ResNet-50", resnet50(), large=True),
    "many": Case("1000 tensors of 1000", [(1000,)] * 1000),
    "groups": Case(
        "5868 tensors of 3, a group each",
        [(3,)] * 5868,
        own_groups=True,
        without={"optax": "jax compiles a step over so many arrays for minutes"},
    ),
    "mlp": Case("MLP 784-128-10", [(784, 128), (128,), (128, 10), (10,)]),
    "tiny": Case("1 tensor of 16", [(16,)], without={"limit": "calling C takes longer than its loop"}),
    "embedding": Case(
        "4096 rows of 50257 x 768",
        [(50257, 768)],
        rows=4096,
        without={"limit": "the loop goes over whole tensors", "optax": "it has no sparse gradients"},
    ),
    # For scaling.py; no optimizer of the table has it.
    "sixteen": Case("1 tensor of 16 Mi", [(2**24,)]),
    "block": Case(
        "matrices of a GPT-2 block", gpt2_block(), without={"limit": "these optimizers go over a tensor several times"}
    ),
}

#: Where optimizers that work element by element are compared.
ELEMENTWISE = ("single", "gpt2", "resnet50", "many", "groups", "mlp", "tiny")


@dataclass(frozen=True)
class Contest:
    """One optimizer, called by the same name in roptim and torch, and its NumPy twin.

    What ``hypers`` does not name has its default, which is the same in roptim, torch and the loop.
    """

    name: str
    numpy: Callable[..., numpy_loops.Step]
    hypers: dict[str, Any] = field(default_factory=dict)
    cases: tuple[str, ...] = ELEMENTWISE
    #: What the goals go by: elementwise, float64, clipped, sparse, tensor rule.
    kind: str = "elementwise"
    dtype: str = "float32"
    #: The common norm to which gradients are clipped before the step.
    clip_norm: float | None = None
    without: dict[str, str] = field(default_factory=dict)


MOMENTUM = {"momentum": 0.9}
#: What float64 and clipping are measured on: float64 in a size whose arrays fit into memory beside each other.
WIDE = ("resnet50", "many", "mlp", "tiny")
CLIPPED = ("gpt2", "resnet50", "many", "mlp")
TWO_PASSES = {"limit": "the norm is a pass of its own"}

OPTIMIZERS = {
    "SGD": Contest("SGD", numpy_loops.sgd),
    "SGD-momentum": Contest("SGD", numpy_loops.sgd_momentum, MOMENTUM),
    "Adam": Contest("Adam", numpy_loops.adam),
    "AdamW": Contest("AdamW", numpy_loops.adamw),
    "Adadelta": Contest("Adadelta", numpy_loops.adadelta),
    "Adagrad": Contest("Adagrad", numpy_loops.adagrad),
    "Adamax": Contest("Adamax", numpy_loops.adamax),
    "ASGD": Contest("ASGD", numpy_loops.asgd),
    "NAdam": Contest("NAdam", numpy_loops.nadam),
    "RAdam": Contest("RAdam", numpy_loops.radam),
    "RMSprop": Contest("RMSprop", numpy_loops.rmsprop),
    "Rprop": Contest("Rprop", numpy_loops.rprop),
    "AdamW-clip": Contest("AdamW", numpy_loops.adamw, cases=CLIPPED, kind="clipped", clip_norm=1.0, without=TWO_PASSES),
    "SGD-clip": Contest(
        "SGD", numpy_loops.sgd_momentum, MOMENTUM, cases=CLIPPED, kind="clipped", clip_norm=1.0, without=TWO_PASSES
    ),
    "AdamW-float64": Contest("AdamW", numpy_loops.adamw, cases=WIDE, kind="float64", dtype="float64"),
    "SGD-float64": Contest("SGD", numpy_loops.sgd_momentum, MOMENTUM, cases=WIDE, kind="float64", dtype="float64"),
    "SparseAdam": Contest("SparseAdam", numpy_loops.sparse_adam, cases=("embedding",), kind="sparse"),
    "Adafactor": Contest("Adafactor", numpy_loops.adafactor, cases=("block",), kind="tensor rule"),
    "Muon": Contest("Muon", numpy_loops.muon, cases=("block",), kind="tensor rule"),
}


def check_registry(registry: dict[str, dict[str, Any]]) -> None:
    """Raises unless the table has every optimizer of roptim but those whose steps evaluate the loss."""
    known = {contest.name for contest in OPTIMIZERS.values()}
    wanted = {name for name, entry in registry.items() if not entry["needs_closure"]}
    if known != wanted:
        raise SystemExit(
            f"compare.py: OPTIMIZERS in benches/peers/cases.py must have every optimizer of roptim.REGISTRY, "
            f"lacks {sorted(wanted - known)} and has {sorted(known - wanted)} too many"
        )


# ---- numbers --------------------------------------------------------------------------------------------

#: Random numbers that larger arrays repeat: drawing one for every element would take longer than measuring.
TILE = 2**20


def parameters(case: Case, dtype: str) -> list[np.ndarray]:
    """Values in [0.5, 1.5), the same in every process; none near zero, for relative differences."""
    arrays = [np.empty(shape, dtype) for shape in case.shapes]
    fill_parameters(arrays)
    return arrays


def fill_parameters(arrays: Sequence[np.ndarray]) -> None:
    """The same values, written into arrays that are there."""
    fill(arrays, seed=1, low=0.5, width=1.0)


@functools.lru_cache(maxsize=1)
def gradients_for(name: str, dtype: str) -> list[np.ndarray]:
    """Values in [-0.01, 0.01), the same in every process, shared by the entrants of one. Of a case with sparse
    gradients: of the rows that are touched."""
    case = CASES[name]
    shapes = case.shapes if case.rows is None else [(case.rows, *shape[1:]) for shape in case.shapes]
    arrays = [np.empty(shape, dtype) for shape in shapes]
    fill(arrays, seed=2, low=-0.01, width=0.02)
    return arrays


def touched_rows(case: Case) -> np.ndarray:
    """The rows that a sparse gradient has, each once, in no order."""
    return np.random.default_rng(3).permutation(case.shapes[0][0])[: case.rows]


def fill(arrays: Sequence[np.ndarray], seed: int, low: float, width: float) -> None:
    """Writes values in [low, low + width)."""
    tile = np.random.default_rng(seed).random(TILE, dtype=np.float32).astype(arrays[0].dtype)
    tile *= width
    tile += low
    position = 0
    for array in arrays:
        flat, start = array.reshape(-1), 0
        while start < flat.size:
            count = min(TILE - position, flat.size - start)
            flat[start : start + count] = tile[position : position + count]
            start, position = start + count, (position + count) % TILE
