"""optax on jax's CPU backend: the update jitted, parameters and state donated, waited for after each step."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from typing import Any

from peers.cases import CASES, OPTIMIZERS, Contest, gradients_for, parameters
from peers.side import Side

#: What optax's optimizers are called, with arguments that make them roptim's where the formulas are the same.
CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "SGD": ("sgd", {"learning_rate": 1e-3}),
    "Adam": ("adam", {"learning_rate": 1e-3}),
    "AdamW": ("adamw", {"learning_rate": 1e-3, "weight_decay": 1e-2}),
    "Adadelta": ("adadelta", {"learning_rate": 1.0}),
    "Adagrad": ("adagrad", {"learning_rate": 1e-2, "initial_accumulator_value": 0.0, "eps": 1e-10}),
    "Adamax": ("adamax", {"learning_rate": 2e-3}),
    "NAdam": ("nadam", {"learning_rate": 2e-3}),
    "RAdam": ("radam", {"learning_rate": 1e-3}),
    "RMSprop": ("rmsprop", {"learning_rate": 1e-2, "decay": 0.99, "eps_in_sqrt": False}),
    "Rprop": ("rprop", {"learning_rate": 1e-2}),
    "Adafactor": ("adafactor", {"learning_rate": 1e-2}),
    "Muon": ("contrib.muon", {"learning_rate": 1e-3, "weight_decay": 0.1}),
}

#: Where optax computes something else, so that its values are not compared; why: benches/README.md.
OTHER_FORMULAS = ("Adagrad", "NAdam", "RAdam", "Rprop", "Adafactor", "Muon")


def transformation(contest: Contest) -> Any:
    """optax's counterpart."""
    import optax
    import optax.contrib

    name, arguments = CALLS[contest.name]
    made: Any = optax
    for part in name.split("."):
        made = getattr(made, part)
    made = made(**arguments, **contest.hypers)
    if contest.clip_norm is not None:
        made = optax.chain(optax.clip_by_global_norm(contest.clip_norm), made)
    return made


class OptaxSide(Side):
    """optax."""

    def start(self, threads: int) -> dict[str, str]:
        """Imports jax. XLA takes all processors that the process may use, so these are as many as there are threads."""
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
        os.environ["JAX_PLATFORMS"] = "cpu"
        import jax
        import optax

        super().start(threads)
        return {"optax": optax.__version__, "jax": jax.__version__, "python of optax": platform.python_version()}

    def setup(self, case: str, optimizer: str) -> list[str]:
        """See Side."""
        self._case, self._contest = case, OPTIMIZERS[optimizer]
        return [""] if self._contest.name in CALLS else []

    def make(self, mode: str) -> tuple[Callable[[], object], Callable[[], Sequence[Any]]]:
        """See Side."""
        import jax
        import jax.numpy as jnp
        import optax

        dtype = self._contest.dtype
        jax.config.update("jax_enable_x64", dtype == "float64")
        made = transformation(self._contest)
        params = [jnp.array(p) for p in parameters(CASES[self._case], dtype)]
        gradients = [jnp.array(g) for g in gradients_for(self._case, dtype)]
        gradients_for.cache_clear()
        state = made.init(params)

        def updated(params: Any, state: Any, gradients: Any) -> Any:
            updates, state = made.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        jitted = jax.jit(updated, donate_argnums=(0, 1))

        def step() -> None:
            nonlocal params, state
            params, state = jax.block_until_ready(jitted(params, state, gradients))

        return step, lambda: params

    def free(self) -> None:
        """Forgets the case and what was compiled for it."""
        import jax

        super().free()
        jax.clear_caches()
