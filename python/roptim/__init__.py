"""roptim: torch.optim's optimizers for NumPy training loops, with a Rust engine underneath.

>>> import numpy as np, roptim
>>> W = np.ones((3, 2), np.float32)
>>> opt = roptim.AdamW({"W": W}, lr=0.1)
>>> opt.step({"W": np.ones_like(W)})    # in place
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from roptim import _interpreter, schedules, utils  # noqa: F401  # the first may refuse to go on
from roptim._devices import Device, devices
from roptim._errors import (
    CheckpointError,
    CheckpointIOError,
    ConcurrentStepError,
    DeviceError,
    DeviceLostError,
    ForkedGpuError,
    InternalError,
    NoAdapterError,
    NonfiniteError,
    OutOfMemoryError,
    RoptimError,
    RoptimKeyError,
    RoptimRuntimeError,
    RoptimTypeError,
    RoptimValueError,
    TornError,
)
from roptim._files import load, save
from roptim._groups import ParamGroup
from roptim._hooks import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from roptim._loading import LoadReport
from roptim._parameter import Parameter
from roptim._roptim import __version__
from roptim._sparse import SparseGrad
from roptim._statistics import Norms, Statistics
from roptim._threads import threads
from roptim.optimizer import Optimizer
from roptim.optimizers import (
    ASGD,
    LBFGS,
    SGD,
    Adadelta,
    Adafactor,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    ConjugateGradient,
    Muon,
    NAdam,
    RAdam,
    RMSprop,
    Rprop,
    SparseAdam,
)
from roptim.utils import clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_, get_total_norm

if TYPE_CHECKING:
    from roptim import convert, gpu, lr_finder, lr_scheduler, swa_utils
    from roptim._checkpointer import Checkpoint, Checkpointer
    from roptim._restore import restore

__all__ = [
    "ASGD",
    "LBFGS",
    "SGD",
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "Checkpoint",
    "CheckpointError",
    "CheckpointIOError",
    "Checkpointer",
    "ConcurrentStepError",
    "ConjugateGradient",
    "Device",
    "DeviceError",
    "DeviceLostError",
    "ForkedGpuError",
    "InternalError",
    "LoadReport",
    "Muon",
    "NAdam",
    "NoAdapterError",
    "NonfiniteError",
    "Norms",
    "Optimizer",
    "OutOfMemoryError",
    "ParamGroup",
    "Parameter",
    "RAdam",
    "RMSprop",
    "RoptimError",
    "RoptimKeyError",
    "RoptimRuntimeError",
    "RoptimTypeError",
    "RoptimValueError",
    "Rprop",
    "SparseAdam",
    "SparseGrad",
    "Statistics",
    "TornError",
    "__version__",
    "clip_grad_norm_",
    "clip_grad_value_",
    "clip_grads_with_norm_",
    "convert",
    "devices",
    "get_total_norm",
    "gpu",
    "load",
    "lr_finder",
    "lr_scheduler",
    "register_optimizer_step_post_hook",
    "register_optimizer_step_pre_hook",
    "restore",
    "save",
    "schedules",
    "swa_utils",
    "threads",
    "utils",
]

#: Modules that are loaded when they are first asked for, so that importing the package stays fast.
_LATER = ("convert", "gpu", "lr_finder", "lr_scheduler", "swa_utils")
#: Names that are in such modules.
_IN_LATER = {"Checkpoint": "_checkpointer", "Checkpointer": "_checkpointer", "restore": "_restore"}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return importlib.import_module(f"roptim.{name}")
    if name in _IN_LATER:
        value = getattr(importlib.import_module(f"roptim.{_IN_LATER[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'roptim' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER, *_IN_LATER})
