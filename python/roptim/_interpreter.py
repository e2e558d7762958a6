"""Which interpreter this is: imported first of all, before NumPy, which would not load in the main one afterwards."""

from __future__ import annotations

import importlib


def _is_main() -> bool:
    # By the name of 3.13 and that of versions before.
    for name in ("_interpreters", "_xxsubinterpreters"):
        try:
            interpreters = importlib.import_module(name)
            return bool(interpreters.get_current() == interpreters.get_main())
        except (ImportError, AttributeError):
            continue
    return True


if not _is_main():
    raise ImportError(
        "roptim: the interpreter must be the main one of its process, got a subinterpreter; use threads or processes"
    )
