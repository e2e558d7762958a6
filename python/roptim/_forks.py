"""A fork comes between whole steps of other threads, so that the child finds optimizers that it can use."""

from __future__ import annotations

import functools
import os

from roptim import _roptim

if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_roptim.before_fork,
        after_in_parent=functools.partial(_roptim.after_fork, False),
        after_in_child=functools.partial(_roptim.after_fork, True),
    )
