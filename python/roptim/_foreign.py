"""Arrays of other libraries: the one place where they become views that NumPy has of their memory.

Nothing is copied and no library is imported: an object of one that was not imported cannot be here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from roptim._errors import RoptimError, RoptimTypeError, RoptimValueError, refuse

_COPY = "convert it with numpy.asarray"
_HOST = "in the host's memory"
#: DLPack's numbers of devices whose memory the host can read: its own, or what CUDA or ROCm keep there.
_ON_HOST = (1, 3, 11, 13)
_VIEWED = "in memory that NumPy can view without a copy"


def _name(kind: type) -> str:
    """As users write it."""
    if kind.__module__ == "builtins":
        return kind.__qualname__
    return f"{kind.__module__}.{kind.__qualname__}"


def _attribute(library: str, name: str) -> Any:
    """What a library that was imported has under a name; None of others."""
    return getattr(sys.modules.get(library), name, None)


# The class of an object is asked for, here and below, and not the object, which could answer with code of its own.
def _is_tensor(x: object) -> bool:
    tensor = getattr(sys.modules.get("torch"), "Tensor", None)
    return tensor is not None and issubclass(type(x), tensor)


def _has_buffer(x: object) -> bool:
    try:
        memoryview(x).release()  # type: ignore[arg-type]  # what has no buffer is an error
    except Exception:
        return False
    return True


def is_array(x: object) -> bool:
    """Whether this is one array of any library, where it could be taken for a container."""
    return hasattr(x, "__array__") or hasattr(x, "__dlpack__") or _has_buffer(x)


def has_gradient(x: object) -> bool:
    """Whether this carries its own gradient as torch's tensors do, and is no array of NumPy's."""
    return not issubclass(type(x), (np.ndarray, np.generic)) and hasattr(x, "grad")


def view(x: Any, place: str, label: str, writes: bool) -> np.ndarray[Any, Any]:
    """The array over an object's own memory.

    Parameters
    ----------
    x
        Anything that is no ``numpy.ndarray``.
    place, label
        How errors begin, and what they call it.
    writes : bool
        Whether it is about to be written to. Whether the array is writeable is looked at elsewhere, with dtype
        and layout.

    Raises
    ------
    RoptimTypeError, RoptimValueError
        If there is no such array.
    """
    kind = type(x)
    if _is_tensor(x):
        return _of_tensor(x, place, label, writes)
    array = _attribute("jax", "Array")
    if array is not None and isinstance(x, array):
        return _of_jax(x, place, label, writes)
    if not issubclass(kind, (np.ndarray, np.generic)):
        if _has_buffer(x):
            return _viewed(x, lambda: np.asarray(memoryview(x)), place, label)
        if hasattr(kind, "__dlpack__"):
            return _of_exchange(x, place, label)
    raise refuse(RoptimTypeError, place, label, "a numpy.ndarray", f"an object of type {_name(kind)}", _COPY)


def _viewed(x: object, make: Callable[[], Any], place: str, label: str, remedy: str = _COPY) -> np.ndarray[Any, Any]:
    """What ``make`` returns; whatever it raises is an error with a name."""
    try:
        array: np.ndarray[Any, Any] = make()
        if type(array) is not np.ndarray:
            raise TypeError(f"{_name(type(array))} is what it shows")
    except RoptimError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        got = f"an object of type {_name(type(x))} ({reason})"
        raise refuse(RoptimTypeError, place, label, _VIEWED, got, remedy) from error
    return array


def _of_exchange(x: Any, place: str, label: str) -> np.ndarray[Any, Any]:
    """The memory of an object that knows DLPack."""
    try:
        is_on_device = x.__dlpack_device__()[0] not in _ON_HOST
    except Exception:
        # Where it does not say, NumPy finds out.
        is_on_device = False
    if is_on_device:
        raise refuse(RoptimTypeError, place, label, _HOST, f"an object of type {_name(type(x))} on a device", _COPY)
    return _viewed(x, lambda: np.from_dlpack(x), place, label)


def _of_tensor(x: Any, place: str, label: str, writes: bool) -> np.ndarray[Any, Any]:
    """The memory of a torch tensor. Each step asks for it, so what is usual comes first."""
    if writes and x.requires_grad and not x.is_leaf:
        remedy = "give the tensor that it was computed from"
        raise refuse(RoptimValueError, place, label, "a leaf tensor", "a result of differentiable operations", remedy)
    try:
        array: np.ndarray[Any, Any] = x.detach().numpy()
        if type(array) is np.ndarray:
            return array
    except Exception:
        # Why not is found out below. `contextlib.suppress` takes as long as the view.
        pass
    if not x.is_cpu:
        got = f"a torch tensor on {x.device}"
        raise refuse(RoptimTypeError, place, label, _HOST, got, "move it with .cpu()")
    if x.dtype is _attribute("torch", "bfloat16"):
        # NumPy has no such dtype by itself, so torch refuses to show one.
        as_integers = _attribute("torch", "uint16")
        return _viewed(x, lambda: x.detach().view(as_integers).numpy().view(_bfloat16()), place, label)
    return _viewed(x, lambda: x.detach().numpy(), place, label, "make it a dense tensor without lazy operations")


def _bfloat16() -> Any:
    try:
        import ml_dtypes
    except ImportError:
        raise ImportError("bfloat16 needs the package ml_dtypes") from None
    return ml_dtypes.bfloat16


def _of_jax(x: Any, place: str, label: str, writes: bool) -> np.ndarray[Any, Any]:
    """The memory of a JAX array."""
    if writes:
        got = "a JAX array, which nothing may write to"
        raise refuse(RoptimValueError, place, label, "writeable", got, "copy it with numpy.array")

    tracer = getattr(_attribute("jax", "core"), "Tracer", None)
    if tracer is not None and isinstance(x, tracer):
        remedy = "step outside of functions that JAX transforms"
        raise refuse(RoptimTypeError, place, label, "an array with values", "a JAX array that is traced", remedy)

    def on_host() -> Any:
        devices = x.devices()
        if len(devices) > 1 or any(device.platform != "cpu" for device in devices):
            raise TypeError(f"it lies on {', '.join(sorted(map(str, devices)))}")
        return np.asarray(x)

    return _viewed(x, on_host, place, label)


def will_write(owners: list[Any]) -> None:
    """Tells those who want to know that their memory is about to be written to.

    torch counts writes, so that a backward pass through values that are gone is an error and not a wrong gradient.
    """
    # Nothing can be differentiated through what inference mode made.
    tensors = [x for x in owners if _is_tensor(x) and not x.is_inference()]
    graph = sys.modules.get("torch.autograd.graph")
    if tensors and graph is not None:
        graph.increment_version(tensors)


def clear(x: Any, set_to_none: bool) -> None:
    """Forgets the gradient that an object carries, or fills it with zeros, as torch does."""
    if x.grad is None:
        return
    if set_to_none:
        x.grad = None
    elif _is_tensor(x):
        if x.grad.grad_fn is not None:
            x.grad.detach_()
        else:
            x.grad.requires_grad_(False)
        x.grad.zero_()
    else:
        array = x.grad if isinstance(x.grad, np.ndarray) else view(x.grad, "zero_grad", "gradient", True)
        array[...] = 0


def number_of(x: Any) -> Any:
    """A loss, without what torch would need to differentiate it: it warns where that is lost unsaid."""
    return x.detach() if _is_tensor(x) else x


def coordinates(x: Any) -> tuple[Any, Any, tuple[int, ...]] | None:
    """Indices, values and shape of a sparse gradient of torch; None of anything else."""
    if not _is_tensor(x) or x.layout is not _attribute("torch", "sparse_coo"):
        return None
    x = x.detach()
    return x._indices().numpy(), x._values(), tuple(x.shape)
