"""The examples of documents run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = [
    pytest.param(code, id=f"{name} {number}")
    for name in ("interop", "processes")
    for number, code in enumerate(
        re.findall("```python\n(.*?)```", (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8"), re.DOTALL)
    )
]


@pytest.mark.parametrize("code", EXAMPLES)
def test_an_example(code: str) -> None:
    for library in ("torch", "jax"):
        if f"import {library}\n" in code:
            pytest.importorskip(library)
    exec(code, {"__name__": "example"})


def test_each_document_is_read_from_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for document in (ROOT / "docs").glob("*.md"):
        assert f"(docs/{document.name}" in readme, document.name
