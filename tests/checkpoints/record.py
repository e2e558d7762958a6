"""Records the checkpoints of a format version, which every later version must load: see README.md.

Run once for each version, by hand: ``python tests/checkpoints/record.py FOLDER``. It never replaces a file.
"""

from __future__ import annotations

import math
import struct
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

import roptim
from roptim.optimizer import REGISTRY
from roptim.schedules import cosine, warmup

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "python"))

from helpers import step  # found through the path above

#: Updates before the checkpoint, and after it.
BEFORE, AFTER = 3, 2


def parameters(dtype: str) -> dict[str, Any]:
    """A matrix, a vector and a number where the optimizer takes them."""
    rng = np.random.default_rng(7)
    return {"layer.W": rng.standard_normal((4, 3)).astype(dtype), "b": rng.standard_normal(5).astype(dtype)}


def gradients(params: dict[str, Any], t: int) -> list[Any]:
    """Of update ``t``, whatever the parameters are."""
    rng = np.random.default_rng(100 + t)
    return [rng.standard_normal(p.shape).astype(p.dtype) for p in params.values()]


def made(name: str, dtype: str, **options: Any) -> dict[str, Any]:
    """A run with one optimizer, from its beginning."""
    params = parameters(dtype)
    if name == "Muon":
        params["b"] = params["b"].reshape(1, 5)
    opt = getattr(roptim, name)(list(params.items()), **options)
    run = {"params": params, "optimizer": opt, "epoch": 0}
    if not REGISTRY[name]["needs_closure"] and not opt._scheduled:
        run["scheduler"] = roptim.lr_scheduler.StepLR(opt, step_size=2, gamma=0.5)
        run["average"] = roptim.swa_utils.AveragedModel(params)
        run["rng"] = np.random.default_rng(5)
    return run


def go_on(run: dict[str, Any], first: int, count: int) -> None:
    """Updates ``first``, ``first + 1`` …"""
    for t in range(first, first + count):
        step(run["optimizer"], gradients(run["params"], t))
        if "scheduler" in run:
            run["scheduler"].step()
            run["average"].update_parameters(run["params"])
            run["rng"].random()
        run["epoch"] = t


def everything() -> dict[str, Any]:
    """One of each type of value."""
    numbers = {
        name: np.arange(-2, 4).astype(name).reshape(2, 3)
        for name in (
            *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
            *("float16", "float32", "float64", "complex64", "complex128"),
        )
    }
    return {
        "none": None,
        "flags": [True, False],
        "ints": (0, -1, 2**63 - 1, -(2**63), 2**64 - 1, 2**64, -(2**127), 10**1200),
        "floats": [0.0, -0.0, 0.1, 1e300, 5e-324, math.inf, -math.inf, math.nan],
        "a nan": struct.unpack("d", struct.pack("Q", 0xFFF8_0000_0000_1234))[0],
        "text": 'ä\n"\\\u0000\U0001f600',
        "": {"#1": 1, "$x": 2, 5: 3, "5": 4, -7: 5, "a/b:c[d]%": np.float32(1.5)},
        "empty": [[], (), {}, np.zeros((0, 3), np.float32), np.float64(2.5).reshape(())],
        "bool": np.array([True, False]),
        "bfloat16": np.array([1.5, -2, math.inf], ml_dtypes.bfloat16),
        "scalars": [np.bool_(True), np.int8(-3), np.complex128(1 + 2j)],
        **numbers,
    }


#: What is recorded besides each optimizer with its defaults in float32.
SPECIAL: dict[str, tuple[str, str, dict[str, Any]]] = {
    "adam_amsgrad_float64": ("Adam", "float64", {"amsgrad": True}),
    "sgd_momentum_complex64": ("SGD", "complex64", {"momentum": 0.9}),
    "adamw_float16": ("AdamW", "float16", {}),
    "adamw_schedule": ("AdamW", "float32", {"lr": 1e-3 * warmup(2).then(cosine(20))}),
}


def cases() -> dict[str, tuple[str, str, dict[str, Any]]]:
    """Every recorded run: the optimizer, the dtype, the options."""
    return {**{name.lower(): (name, "float32", {}) for name in REGISTRY}, **SPECIAL}


def main() -> None:
    """Records what is missing."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    trees = {"everything": everything()}
    for file, (name, dtype, options) in cases().items():
        run = made(name, dtype, **options)
        go_on(run, 1, BEFORE)
        saved = roptim.convert.from_json(roptim.convert.to_json(run))
        go_on(run, 1 + BEFORE, AFTER)
        trees[file] = {"run": saved, "after": run["params"]}
    for file, tree in trees.items():
        path = folder / f"{file}.safetensors"
        if not path.exists():
            roptim.save(tree, path)
            if file == "everything":
                path.with_suffix(".json").write_text(roptim.convert.to_json(tree) + "\n")


if __name__ == "__main__":
    main()
