"""docs/performance.md shows the committed record, not what somebody typed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "benches" / "record" / "2026-11-cpu-compare.json"


def test_the_tables_of_the_document_are_made_from_the_record(tmp_path: Path) -> None:
    made = tmp_path / "tables.md"
    command = [sys.executable, str(ROOT / "benches" / "compare.py"), "--render", str(RECORD), "--markdown", str(made)]
    subprocess.run([*command, "--output", str(tmp_path)], check=True, capture_output=True)
    document = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert made.read_text(encoding="utf-8").strip() in document
