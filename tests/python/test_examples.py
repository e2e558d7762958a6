"""The examples run, and do what they say."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import roptim

for _name in ("sklearn", "matplotlib", "tqdm"):
    pytest.importorskip(_name)

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def digits(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The example as a module."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("digits")


def run_digits(output: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / "digits.py"), "--epochs", "3", "--output", str(output), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_digits_trains_resumes_on_the_same_bits_and_plots(tmp_path: Path) -> None:
    done = run_digits(tmp_path, "--min-accuracy", "85")
    assert done.returncode == 0, done.stderr
    assert "same bits" in done.stdout
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")


def test_digits_fails_below_the_accuracy_bar_and_on_different_bits(
    digits: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def tampered(path: Path, options: Any) -> Any:
        saved = roptim.load(path)
        run = digits.restore(saved, {})
        digits.train(run, digits.load_data(), "resumed")
        np.nextafter(run.model["b1"].data, np.float32(1), out=run.model["b1"].data)
        return digits.checkpoint(run)

    monkeypatch.setattr(digits, "resume_in_fresh_process", tampered)
    options = ["--epochs", "2", "--output", str(tmp_path), "--min-accuracy"]
    assert digits.main([*options, "0"]) == 1
    assert "DIFFERENT BITS" in capsys.readouterr().out

    monkeypatch.setattr(digits, "fingerprint", lambda tree: "")
    assert digits.main([*options, "0"]) == 0
    assert digits.main([*options, "100"]) == 1


def test_digits_says_what_is_missing_where_there_is_no_gpu(
    digits: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise roptim.NoAdapterError("AdamW: no adapter")

    monkeypatch.setattr(roptim, "AdamW", refuse)
    assert digits.main(["--backend", "gpu", "--output", str(tmp_path)]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "AdamW: no adapter"
    assert "--backend cpu" in said[1]
    assert len(said) == 2


def test_digits_backpropagation_agrees_with_difference_quotients(digits: Any) -> None:
    # In float64, where a quotient over a small step is good to many digits.
    model = {name: roptim.Parameter(p.data.astype(np.float64)) for name, p in digits.new_model(seed=1).items()}
    rng = np.random.default_rng(2)
    images, labels = rng.random((20, digits.SIZES[0])), rng.integers(0, digits.SIZES[-1], 20)

    def loss() -> float:
        return digits.cross_entropy(digits.forward(model, images)[-1], labels)[0]

    outputs = digits.forward(model, images)
    digits.backward(model, outputs, digits.cross_entropy(outputs[-1], labels)[1])
    for name, p in model.items():
        start, direction, h = p.data.copy(), rng.standard_normal(p.shape), 1e-6
        p[...] = start + h * direction
        above = loss()
        p[...] = start - h * direction
        below = loss()
        p[...] = start
        want = (above - below) / (2 * h)
        assert np.sum(p.grad * direction) == pytest.approx(want, rel=1e-5, abs=1e-8), name
