"""Records `state_dicts.json`: states of torch's optimizers, and where each of them goes from there.

    python record_state_dicts.py state_dicts.json

Run by hand, with torch installed; the tests read the file alone. `README.md` says what it holds.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import torch

STEPS = 6
SAVED_AFTER = 3
SHAPES = [(3, 2), (2,)]
MATRICES = [(3, 2), (2, 4)]

#: (name, class, arguments, what differs from float32 parameters of `SHAPES` in one group)
CASES: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    ("sgd", "SGD", {"lr": 0.1}, {}),
    ("sgd_momentum", "SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}, {}),
    ("adam", "Adam", {"lr": 0.01}, {}),
    ("adam_amsgrad", "Adam", {"lr": 0.01, "amsgrad": True, "weight_decay": 0.01}, {}),
    ("adam_bfloat16", "Adam", {"lr": 0.01}, {"dtype": torch.bfloat16}),
    ("adam_complex", "Adam", {"lr": 0.01}, {"dtype": torch.complex64}),
    ("adam_float64", "Adam", {"lr": 0.01}, {"dtype": torch.float64}),
    ("adam_tensor_lr", "Adam", {"lr": torch.tensor(0.0625)}, {}),
    ("adamw", "AdamW", {"lr": 0.01}, {}),
    ("adamw_amsgrad", "AdamW", {"lr": 0.01, "amsgrad": True, "betas": (0.8, 0.95)}, {}),
    ("adamw_groups", "AdamW", {"lr": 0.01}, {"groups": [{}, {"lr": 0.02, "weight_decay": 0.0}], "named": True}),
    ("adadelta", "Adadelta", {"lr": 0.5}, {}),
    ("adagrad", "Adagrad", {"lr": 0.1, "lr_decay": 0.01, "initial_accumulator_value": 0.5}, {}),
    ("adagrad_unseen", "Adagrad", {"lr": 0.1, "initial_accumulator_value": 0.5}, {"unseen": 1}),
    ("adamax", "Adamax", {"lr": 0.01}, {}),
    ("asgd", "ASGD", {"lr": 0.1, "t0": 2}, {}),
    ("nadam", "NAdam", {"lr": 0.01}, {}),
    ("nadam_decoupled", "NAdam", {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True}, {}),
    ("radam", "RAdam", {"lr": 0.01}, {}),
    ("radam_decoupled", "RAdam", {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True}, {}),
    ("rmsprop", "RMSprop", {"lr": 0.01}, {}),
    ("rmsprop_centered", "RMSprop", {"lr": 0.01, "centered": True, "momentum": 0.9}, {}),
    ("rprop", "Rprop", {"lr": 0.01}, {}),
    ("sparse_adam", "SparseAdam", {"lr": 0.01}, {"sparse": True}),
    ("adafactor", "Adafactor", {"lr": 0.01, "weight_decay": 0.01}, {}),
    ("muon", "Muon", {"lr": 0.01}, {"shapes": MATRICES}),
    ("lbfgs", "LBFGS", {"lr": 0.5, "max_iter": 2, "history_size": 5}, {"dtype": torch.float64}),
    (
        "lbfgs_strong_wolfe",
        "LBFGS",
        {"max_iter": 2, "history_size": 5, "line_search_fn": "strong_wolfe"},
        {"dtype": torch.float64},
    ),
    # Small steps: larger ones run away, and rounding with them.
    ("lbfgs_one_iteration", "LBFGS", {"lr": 0.01, "max_iter": 1, "history_size": 5}, {"dtype": torch.float64, "at": 1}),
]


def numbers(tensor: torch.Tensor) -> Any:
    """Nested lists of the tensor's numbers; every bfloat16 and float32 is a float64."""
    if tensor.is_complex():
        return torch.view_as_real(tensor).double().tolist()
    if tensor.dtype == torch.float32:
        # The shortest text that reads back to the same float32, not that of the float64 it equals.
        return np.vectorize(lambda x: float(str(np.float32(x))), otypes=[float])(tensor.numpy()).tolist()
    return tensor.double().tolist() if tensor.is_floating_point() else tensor.tolist()


def plain(value: Any) -> Any:
    """A form of a state dict that JSON can hold."""
    if isinstance(value, torch.Tensor):
        value = value.detach()
        return {"tensor": numbers(value), "dtype": str(value.dtype), "shape": list(value.shape)}
    if isinstance(value, dict):
        return {"dict": [[key, plain(item)] for key, item in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [plain(item) for item in value]}
    return [plain(item) for item in value] if isinstance(value, list) else value


def record(seed: int, name: str, kind: str, kwargs: dict[str, Any], special: dict[str, Any]) -> dict[str, Any]:
    dtype = special.get("dtype", torch.float32)
    saved_after = special.get("at", SAVED_AFTER)
    generator = torch.Generator().manual_seed(seed)
    shapes = special.get("shapes", SHAPES)

    def drawn(shape: tuple[int, ...]) -> torch.Tensor:
        # In steps of 1/64: short as text, exact in every dtype here.
        parts = [torch.randint(-128, 128, shape, generator=generator).double() / 64 for _ in range(2)]
        return (torch.complex(*parts) if dtype.is_complex else parts[0]).to(dtype)

    params = [torch.nn.Parameter(drawn(shape)) for shape in shapes]
    gradients = [[drawn(shape) for shape in shapes] for _ in range(STEPS)]
    names = ["layer.weight", "layer.bias"]
    given: list[Any] = list(zip(names, params, strict=True)) if special.get("named") else params
    if "groups" in special:
        given = [{"params": [p], **options} for p, options in zip(given, special["groups"], strict=True)]
    optimizer = getattr(torch.optim, kind)(given, **kwargs)
    out: dict[str, Any] = {
        "name": name,
        "optimizer": kind,
        "saved_after": saved_after,
        "sparse": bool(special.get("sparse")),
    }
    out["start"] = [plain(p) for p in params]

    def closure() -> torch.Tensor:
        # Σ log cosh (p - c), c being what serves others as first gradient.
        optimizer.zero_grad()
        loss = sum(((p - c).cosh().log().sum() for p, c in zip(params, gradients[0], strict=True)), torch.tensor(0.0))
        loss.backward()
        return loss

    for step in range(STEPS):
        for i, (p, g) in enumerate(zip(params, gradients[step], strict=True)):
            p.grad = g
            if special.get("sparse"):
                # One row is touched in each step.
                rows = torch.tensor([(step + i) % p.shape[0]])
                p.grad = torch.sparse_coo_tensor(rows[None], g[rows], p.shape, check_invariants=False)
            if special.get("unseen") == i and step < saved_after:
                p.grad = None
        optimizer.step(closure if kind == "LBFGS" else None)
        if step + 1 == saved_after:
            out["state_dict"] = plain(optimizer.state_dict())
            out["saved"] = [plain(p) for p in params]
    out["end"] = [plain(p) for p in params]
    out["gradients"] = [[plain(g) for g in each] for each in gradients]
    return out


def main() -> None:
    cases = [record(seed, *case) for seed, case in enumerate(CASES)]
    text = ",\n".join(json.dumps(case, separators=(",", ":")) for case in cases)
    with open(sys.argv[1], "w", encoding="ascii") as file:
        file.write(f'{{"torch":"{torch.__version__.split("+")[0]}","cases":[\n{text}\n]}}\n')


if __name__ == "__main__":
    main()
