"""Checkpoints of every format version so far load, and their runs go on as they would have then."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from test_files import same

import roptim

FOLDER = Path(__file__).resolve().parent.parent / "checkpoints"
FILES = sorted(FOLDER.glob("format-*/*.safetensors"))
RUNS = [path for path in FILES if path.stem != "everything"]


def recorder() -> ModuleType:
    """The script that recorded them."""
    spec = importlib.util.spec_from_file_location("record", FOLDER / "record.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


record = recorder()


def test_there_is_one_of_every_optimizer() -> None:
    assert {path.stem for path in RUNS} >= {*record.cases()}
    assert len(FILES) >= 10


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_files_load_and_would_be_written_the_same(path: Path, tmp_path: Path) -> None:
    pytest.importorskip("ml_dtypes")
    tree = roptim.load(path)
    roptim.save(tree, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == path.read_bytes()
    twin = path.with_suffix(".json")
    if twin.exists():
        assert same(roptim.convert.from_json(twin.read_text()), tree)
        assert same(record.everything(), tree)


@pytest.mark.parametrize("path", RUNS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_runs_go_on(path: Path) -> None:
    name, dtype, options = record.cases()[path.stem]
    saved: Any = roptim.load(path)
    run = record.made(name, dtype, **options)
    report = roptim.restore(saved["run"], run)
    assert not report.initialised + report.dropped
    assert run["epoch"] == record.BEFORE
    record.go_on(run, 1 + record.BEFORE, record.AFTER)
    for key, p in run["params"].items():
        want = saved["after"][key]
        if name == "Muon":
            # Its products of matrices are those of the machine's library.
            np.testing.assert_allclose(p, want, rtol=1e-4)
        else:
            assert same(p, want), key
