"""Fixtures over the registry and over devices."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

import roptim
from roptim.optimizer import REGISTRY

settings.register_profile(
    "default", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("default")


def _adapter_problem() -> str | None:
    try:
        roptim.SGD([np.zeros(1, np.float32)], backend="gpu", allow_software=True)
    except roptim.DeviceError as error:
        return str(error)
    return None


@pytest.fixture(scope="session")
def gpu() -> str:
    """The backend string of a GPU; skips without one, unless ROPTIM_REQUIRE_GPU=1."""
    problem = _adapter_problem()
    if problem is not None:
        if os.environ.get("ROPTIM_REQUIRE_GPU") == "1":
            pytest.fail(problem)
        pytest.skip(problem)
    return "gpu"


@pytest.fixture(params=["cpu", "gpu"])
def backend(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Keyword arguments that choose each device in turn."""
    if request.param == "gpu":
        request.getfixturevalue("gpu")
        return {"backend": "gpu", "allow_software": True}
    return {"backend": "cpu"}


@pytest.fixture(params=list(REGISTRY))
def optimizer_class(request: pytest.FixtureRequest) -> Any:
    """Every optimizer of the registry."""
    return getattr(roptim, request.param)
