"""The devices of this machine."""

from __future__ import annotations

from typing import NamedTuple

from roptim import _roptim


class Device(NamedTuple):
    """One device that steps can run on."""

    #: What ``backend=`` takes to choose it.
    backend: str
    #: Its name.
    name: str
    #: ``"cpu"``, ``"discrete"``, ``"integrated"``, ``"virtual"``, ``"software"`` or ``"other"``.
    kind: str
    #: Its driver.
    driver: str
    #: Whether it is used only with ``allow_software=True``.
    software: bool


def devices() -> list[Device]:
    """Every device that steps can run on, the CPU first, then adapters from best to worst.

    Asking starts the graphics driver; importing roptim does not.
    """
    return [Device(*fields) for fields in _roptim.devices()]
