"""Reference optimizers, written from the papers in float64 NumPy.

They exist to be compared with, so they share nothing with the engine: no code, no order of
operations, and where possible no recurrence. A moment is the explicit weighted sum of all past
gradients, a parameter is its start plus the explicit sum of all past movements. An error in a
recurrence therefore cannot be made twice.

One module per optimizer, with one public function::

    trajectory(p0, grads, **hyper) -> (parameters, state)

``p0``
    the start, one array of any shape; taken as float64.
``grads``
    one entry per step: an array shaped like ``p0``, or None for "no gradient in this step":
    nothing moves and the step is not counted. `sparse_adam.py` takes pairs (rows, values).
``hyper``
    torch's names and defaults, keyword-only.
``parameters``
    a list with one float64 array per entry of ``grads``, the parameter after that step.
``state``
    torch's state keys, each with its float64 array after the last step; ``step`` is 0-d. Empty
    when there was never a gradient, or when the optimizer keeps no state.

What the references do not do: check hyperparameters, take complex arrays or schedules, reproduce
torch's rounding, or treat gradients that are not finite (a weight of zero times infinity would
spread NaN). The sums make them quadratic in the number of steps: meant for hundreds, not millions.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any


def reference(name: str) -> Callable[..., Any]:
    """The ``trajectory`` function of the optimizer class ``name``, for instance ``"AdamW"``.

    Raises LookupError, naming the file to write, when that optimizer has no reference.
    """
    stem = {"SparseAdam": "sparse_adam", "ConjugateGradient": "conjugate_gradient"}.get(name, name.lower())
    try:
        module = import_module(f"{__name__}.{stem}")
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{stem}":
            raise
        raise LookupError(f"{name} has no reference: write tests/reference/{stem}.py") from None
    return module.trajectory
