"""What is installed: its size, and what importing it loads. How long that takes is for ``benches/imports.py``."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import roptim
from roptim import _roptim

MEGABYTE = 1_000_000
ROOT = Path(__file__).parents[2]
#: Modules that are loaded when they are first asked for.
LATER = {
    "roptim.__main__",
    "roptim._averaging",
    "roptim._checkpointer",
    "roptim._gallery",
    "roptim._inspect",
    "roptim._restore",
    "roptim.convert",
    "roptim.gpu",
    "roptim.lr_finder",
    "roptim.lr_scheduler",
    "roptim.swa_utils",
}
#: Packages that importing roptim does not import; some of them are used where they are installed.
OTHERS = {"matplotlib", "ml_dtypes", "pickle", "safetensors", "scipy", "sklearn", "torch", "tqdm"}
#: Parts of the names of drivers and of the libraries that find them.
DRIVERS = ("vulkan", "lvp", "llvm", "gallium", "mesa", "libdrm", "_dri.", "libgl", "libegl", "nvidia", "libcuda")

ON_LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's /proc")
ON_LINUX_X86 = pytest.mark.skipif(
    not (sys.platform.startswith("linux") and platform.machine() == "x86_64"),
    reason="the bounds are those of Linux on x86-64",
)

#: Prints what importing roptim added to a process that has NumPy.
IMPORT = """
import json, os, sys, dataclasses, numpy

def seen():
    names = {line.split(maxsplit=5)[5].strip() for line in open("/proc/self/maps") if "/" in line}
    return set(sys.modules), names, set(os.listdir("/proc/self/task"))

before = seen()
import roptim
print(json.dumps([sorted(after - old) for old, after in zip(before, seen())]))
"""


@pytest.fixture(scope="module")
def imported() -> dict[str, Any]:
    """Modules, mapped files and threads that importing roptim adds in an interpreter of its own."""
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True)
    return dict(zip(("modules", "files", "threads"), json.loads(done.stdout), strict=True))


@ON_LINUX
def test_import_starts_no_thread(imported: dict[str, Any]) -> None:
    assert imported["threads"] == []


@ON_LINUX
def test_import_maps_the_extension_and_no_graphics_driver(imported: dict[str, Any]) -> None:
    assert any(Path(name).name == Path(_roptim.__file__).name for name in imported["files"])
    assert [name for name in imported["files"] if any(part in Path(name).name.lower() for part in DRIVERS)] == []


@ON_LINUX
def test_import_loads_what_every_step_needs_and_nothing_else(imported: dict[str, Any]) -> None:
    files = Path(roptim.__file__).parent.glob("*.py")
    every = {"roptim" if path.stem == "__init__" else f"roptim.{path.stem}" for path in files} | {_roptim.__name__}
    mine = {name for name in imported["modules"] if name.split(".")[0] == "roptim"}
    assert mine == every - LATER
    assert not OTHERS & set(imported["modules"])


def test_what_is_loaded_later_is_there() -> None:
    later = (roptim.convert, roptim.gpu, roptim.lr_finder, roptim.lr_scheduler, roptim.swa_utils)
    assert {module.__name__ for module in later} <= LATER
    assert {roptim.Checkpointer.__module__, roptim.restore.__module__} <= LATER


@ON_LINUX_X86
def test_the_extension_is_small() -> None:
    size = Path(_roptim.__file__).stat().st_size / MEGABYTE
    assert size < 14, f"{_roptim.__file__} has {size:.1f} MB; builds without --release are larger"


@ON_LINUX_X86
def test_the_wheel_is_small() -> None:
    wheels = list((ROOT / "dist").glob("roptim-*linux*_x86_64.whl"))
    if not wheels:
        pytest.skip("dist/ holds no wheel; `make wheel` builds one")
    for wheel in wheels:
        size = wheel.stat().st_size / MEGABYTE
        assert size < 6, f"{wheel.name} has {size:.1f} MB"
