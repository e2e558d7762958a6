"""Mutants of the rules against the recorded runs: `python tests/mutate_rules.py --rounds 10`.

cargo-mutants tries one mutant at a time with Rust's tests, and what tells a wrong rule from a right one is
`tests/python/test_numbers.py`. Rules do not know each other, so a round changes each of them once, builds the
extension, runs those tests and asks each optimizer's for its mutant. Works on a copy; needs cargo-mutants for the list
of mutants, and the packages of the tests.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RULES = Path("src/rules")
#: Rules in files of another name than the optimizers that use them. What takes a closure has tests of its own.
PRESETS = {"adam": ["adam", "adamw"], "sparse_adam": ["sparseadam"]}
ELSEWHERE = {"average", "common", "conjugate_gradient", "lbfgs", "mod"}
#: One engine for tests of small arrays: optimized, it would take longer to build than to test.
BUILD = ["cargo", "build", "--quiet", "--manifest-path", "python/Cargo.toml", "--features", "pyo3/extension-module"]
#: Hypothesis takes minutes to shrink what fails, so recorded runs decide; SparseAdam has none.
TESTS = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=no", "-rfE", "tests/python/test_numbers.py"]
TESTS += ["-k", "not random_trees or SparseAdam"]


def mutants(seed: int) -> dict[str, list[dict[str, Any]]]:
    """Those of each rule, in an order that the seed decides."""
    command = ["cargo", "mutants", "--no-config", "--list", "--json", "-f", str(RULES / "*.rs")]
    listed = json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)
    by_rule = collections.defaultdict(list)
    for mutant in listed:
        by_rule[Path(mutant["file"]).stem].append(mutant)
    chosen = {rule: by_rule[rule] for rule in sorted(by_rule) if rule not in ELSEWHERE}
    order = random.Random(seed)
    for each in chosen.values():
        order.shuffle(each)
    return chosen


def write(copy: Path, rule: str, mutant: dict[str, Any] | None) -> None:
    """The rule's file with this change, or as it is."""
    path = RULES / f"{rule}.rs"
    text = (ROOT / path).read_text()
    if mutant is not None:
        lines = text.splitlines(keepends=True)
        first, last = mutant["span"]["start"], mutant["span"]["end"]
        # Lines and columns count from 1.
        before = "".join(lines[: first["line"] - 1]) + lines[first["line"] - 1][: first["column"] - 1]
        after = lines[last["line"] - 1][last["column"] - 1 :] + "".join(lines[last["line"] :])
        text = before + mutant["replacement"] + after
    (copy / path).write_text(text)


def build(copy: Path, target: Path, active: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Builds the extension; takes out, and returns, the mutants that the compiler refuses."""
    refused = []
    while True:
        done = subprocess.run(
            BUILD,
            cwd=copy,
            env={**os.environ, "CARGO_TARGET_DIR": str(target)},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode == 0:
            shutil.copy(target / "debug" / "lib_roptim.so", copy / "python" / "roptim" / "_roptim.abi3.so")
            return refused
        named = re.findall(r"^error[^\n]*\n\s*--> src/rules/(\w+)\.rs", done.stderr, re.M)
        guilty = set(named) & set(active)
        if not guilty:
            sys.exit(f"the build failed elsewhere:\n{done.stderr[-3000:]}")
        for rule in guilty:
            refused.append(active.pop(rule))
            write(copy, rule, None)


def failures(copy: Path, seconds: int) -> set[str] | None:
    """Optimizers, in small letters, with a test that failed; None where the tests did not end."""
    environment = {**os.environ, "PYTHONPATH": str(copy / "python")}
    try:
        done = subprocess.run(
            [sys.executable, *TESTS],
            cwd=copy,
            env=environment,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None
    if done.returncode not in (0, 1):
        return None
    return {name.lower() for name in re.findall(r"^(?:FAILED|ERROR) \S+?\[([A-Za-z]+)", done.stdout, re.M)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="changes of each rule")
    parser.add_argument("--seed", type=int, default=1, help="decides which")
    parser.add_argument("--timeout", type=int, default=900, help="seconds for the tests of a round")
    parser.add_argument("--target", type=Path, default=ROOT / "target", help="cargo's folder of built files")
    options = parser.parse_args()
    left = mutants(options.seed)
    counts: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "roptim"
        shutil.copytree(
            ROOT, copy, ignore=shutil.ignore_patterns("target", ".git", ".venv*", "build", "dist", "_roptim*")
        )
        for _ in range(options.rounds):
            active = {rule: each.pop() for rule, each in left.items() if each}
            for rule, mutant in active.items():
                write(copy, rule, mutant)
            found = [("refused by the compiler", mutant) for mutant in build(copy, options.target, active)]
            failed = failures(copy, options.timeout)
            for rule, mutant in active.items():
                is_caught = failed is not None and not failed.isdisjoint(PRESETS.get(rule, [rule]))
                found.append(("not decided" if failed is None else "caught" if is_caught else "missed", mutant))
                write(copy, rule, None)
            for outcome, mutant in found:
                counts[outcome] += 1
                print(f"{outcome}: {mutant['name']}", flush=True)
    print(", ".join(f"{count} {outcome}" for outcome, count in counts.most_common()))


if __name__ == "__main__":
    main()
