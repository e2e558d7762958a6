"""How many threads roptim may use, for the time of a block."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import numpy as np

from roptim import _roptim
from roptim._errors import RoptimTypeError, RoptimValueError, refuse


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
    if not isinstance(n, (int, np.integer)) or isinstance(n, bool):
        raise refuse(RoptimTypeError, "threads", "n", "a whole number >= 1", repr(n))
    if n < 1:
        raise refuse(RoptimValueError, "threads", "n", "a whole number >= 1", repr(n))
    before = _roptim.limit_threads(None)
    _roptim.limit_threads(min(int(n), sys.maxsize if before is None else before))
    try:
        yield
    finally:
        _roptim.limit_threads(before)
