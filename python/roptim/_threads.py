"""How many threads roptim may use, for the time of a block."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator

from roptim import _roptim
from roptim._errors import RoptimTypeError, RoptimValueError, refuse, told
from roptim._values import is_whole

#: The bounds of the blocks that a thread is in.
_ACTIVE = threading.local()


@contextlib.contextmanager
def threads(n: int) -> Iterator[None]:
    """Bounds the threads of whatever roptim does on the CPU within the block, to leave cores to others::

        with roptim.threads(1):
            opt.step(gradients)

    It holds for the Python thread that enters the block; blocks nest, and an inner one may only lower the bound. The
    bits of a step do not depend on it. An optimizer's own ``threads=`` and ``ROPTIM_NUM_THREADS`` hold for its life.

    Parameters
    ----------
    n : int
        At least 1.

    Raises
    ------
    RoptimError
        If ``n`` is no whole number from 1 on.
    """
    if not is_whole(n):
        raise refuse(RoptimTypeError, "threads", "n", "a whole number >= 1", told(n))
    if n < 1:
        raise refuse(RoptimValueError, "threads", "n", "a whole number >= 1", told(n))
    bounds = _ACTIVE.__dict__.setdefault("bounds", [])
    bounds.append(min(int(n), sys.maxsize))
    _apply(bounds)
    try:
        yield
    finally:
        # Blocks of one thread that do not nest, as in coroutines, may end in any order.
        bounds.remove(min(int(n), sys.maxsize))
        _apply(bounds)


def _apply(bounds: list[int]) -> None:
    _roptim.limit_threads(min(bounds, default=None))
