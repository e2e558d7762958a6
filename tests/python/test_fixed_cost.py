"""What ``benches/fixed_cost.py`` says about counts; nothing is counted here."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHES = Path(__file__).parents[2] / "benches"


@pytest.fixture(scope="module")
def fixed_cost() -> Any:
    """The benchmark as a module."""
    spec = importlib.util.spec_from_file_location("fixed_cost", BENCHES / "fixed_cost.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fixed_cost"] = module
    spec.loader.exec_module(module)
    return module


def record(**changes: str) -> dict[str, Any]:
    """A record of two scenarios, with other facts where they are given."""
    engine = {"target": "t", "instruction_set": "avx2", "rustc": "1.90.0", "libc": "glibc 2.36", "valgrind": "3.19"}
    python = {"python": "3.11.7 (main)", "numpy": "2.4.6"}
    return {
        "engine": {name: changes.get(name, value) for name, value in engine.items()},
        "python": {name: changes.get(name, value) for name, value in python.items()},
        "instructions": {"step": 1000.0, "from Python": 2000.0},
    }


def said(module: Any, capsys: Any, old: dict[str, Any], new: dict[str, Any]) -> tuple[int, list[str]]:
    """How many failed, and the sentences."""
    scenarios = [module.Scenario("step", "engine", ()), module.Scenario("from Python", "python", ())]
    wrong = module.failures(scenarios, old, new, all_counted=True)
    return wrong, capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("step", "from_python", "wrong", "sentences"),
    [
        (1029, 2099, 0, []),
        (971, 1901, 0, []),
        (
            1031,
            2101,
            2,
            [
                "step: 1,031 instructions per step, 3.1 % above the recorded 1,000; at most 3 % is allowed.",
                "from Python: 2,101 instructions per step, 5.0 % above the recorded 2,000; at most 5 % is allowed.",
            ],
        ),
        (
            900,
            2000,
            0,
            [
                "step: 900 instructions per step, 10.0 % below the recorded 1,000; "
                "run `make bench-record-counts` to keep the gain."
            ],
        ),
    ],
)
def test_counts_above_fail_and_counts_below_are_told(
    fixed_cost: Any, capsys: Any, step: int, from_python: int, wrong: int, sentences: list[str]
) -> None:
    new = record() | {"instructions": {"step": step, "from Python": from_python}}
    assert said(fixed_cost, capsys, record(), new) == (wrong, sentences)


def test_scenarios_without_a_record_and_records_without_a_scenario_fail(fixed_cost: Any, capsys: Any) -> None:
    old = record() | {"instructions": {"from Python": 2000.0, "gone": 1.0}}
    assert said(fixed_cost, capsys, old, record()) == (
        2,
        [
            "step: not in the record; run `make bench-record-counts`.",
            "gone: in the record, but no scenario; run `make bench-record-counts`.",
        ],
    )


@pytest.mark.parametrize(
    ("changes", "wrong", "sentence"),
    [
        ({"numpy": "3.0"}, 1, "Not compared (from Python): the record was taken with NumPy 2.4.6"),
        ({"python": "3.12"}, 1, "Not compared (from Python): the record was taken with CPython 3.11.7"),
        ({"target": "u"}, 0, "Not compared (step): the record was taken with the target t, this is u."),
        ({"rustc": "1.91.0"}, 2, "The record was taken with rustc 1.90.0, this is 1.91.0."),
    ],
)
def test_what_cannot_be_compared_is_left_out_and_said(
    fixed_cost: Any, capsys: Any, changes: dict[str, str], wrong: int, sentence: str
) -> None:
    new = record(**changes) | {"instructions": {"step": 5000.0, "from Python": 9000.0}}
    failed, sentences = said(fixed_cost, capsys, record(), new)
    assert failed == wrong
    assert any(line.startswith(sentence) for line in sentences)


def test_the_kept_record_has_what_a_check_compares(fixed_cost: Any) -> None:
    kept = json.loads((BENCHES / "record" / "fixed-cost.json").read_text(encoding="utf-8"))
    assert kept["steps"] == fixed_cost.STEPS
    assert set(kept["engine"]) == set(record()["engine"])
    assert set(kept["python"]) == set(record()["python"])
    assert kept["engine"]["instruction_set"] == fixed_cost.ISA
    assert all(count > 0 for count in kept["instructions"].values())


def test_without_valgrind_it_says_where_to_get_it(
    fixed_cost: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("PATH", "")
    assert fixed_cost.main(["--check"]) == 2
    assert capsys.readouterr().err == (
        "fixed_cost.py needs valgrind, which is not on the PATH; Debian's package is `valgrind`.\n"
    )
