"""Other processes that save, and what they leave."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def run(code: str, *arguments: object) -> str:
    """What a program prints; it must end well, and say nothing else."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    """A program to talk to: it reads what is written to its ``stdin``."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, bufsize=1)


def leftovers(directory: Path) -> list[Path]:
    """Temporary files of saves."""
    return sorted(directory.glob(".roptim-*"))
