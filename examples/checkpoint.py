"""Checkpoints: a run is killed, resumes in a fresh process, and ends on the same bits as if nothing had happened.

What a run consists of goes into one file: the parameters, the state of the optimizer and of the scheduler, the
state of the random generator, the history and the number of epochs done. ``roptim.save`` replaces the file in one
go, so a run that dies while it saves still has the checkpoint before.

Three runs: one without interruption; one that dies in the middle of an epoch; one that takes up the last checkpoint
of the dead one. The first and the last end with the same file, byte for byte.

Run ``python examples/checkpoint.py``. Exit code: 0 if the files are the same, else 1.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import roptim

EPOCHS, STEPS_PER_EPOCH, SAVE_EVERY = 40, 25, 8
KILLED = 9  # exit code of the run that dies

Array = np.ndarray


class Run:
    """A regression on random batches, from the beginning."""

    def __init__(self) -> None:
        # SFC64 keeps its state in an array of 64-bit integers. The state of NumPy's default, PCG64, has integers
        # of 128 bits, which a checkpoint does not hold.
        self.rng = np.random.Generator(np.random.SFC64(0))
        self.params = {"W": np.zeros((20, 3), np.float32), "b": np.zeros(3, np.float32)}
        self.optimizer = roptim.Adam(self.params, lr=0.05)
        self.scheduler = roptim.lr_scheduler.StepLR(self.optimizer, step_size=10, gamma=0.5)
        self.history: list[float] = []  # one loss per epoch done

    def state_dict(self) -> dict[str, Any]:
        """All of it as a tree of dicts, lists, numbers and arrays."""
        return {
            "rng": self.rng.bit_generator.state,
            "params": self.params,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "history": self.history,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Takes up a saved state. Parameters are copied into the arrays that the optimizer holds."""
        self.rng.bit_generator.state = saved["rng"]
        for name, array in self.params.items():
            array[...] = saved["params"][name]
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scheduler.load_state_dict(saved["scheduler"])
        self.history = saved["history"]

    def train(self, path: Path, die_in: int | None = None) -> None:
        """Trains to the end and saves every few epochs and at the end; ``die_in`` counts epochs from 1."""
        target = np.arange(60, dtype=np.float32).reshape(20, 3) / 60
        while len(self.history) < EPOCHS:
            losses = []
            for step in range(STEPS_PER_EPOCH):
                x = self.rng.standard_normal((16, 20), np.float32)
                noise = self.rng.standard_normal((16, 3), np.float32)
                error = x @ (self.params["W"] - target) + self.params["b"] - 0.1 * noise
                self.optimizer.step({"W": x.T @ error / 16, "b": error.mean(axis=0)})
                losses.append(0.5 * float(np.mean(error**2)))
                if len(self.history) + 1 == die_in and step == STEPS_PER_EPOCH // 2:
                    os._exit(KILLED)  # at once: nothing is cleaned up, nothing is saved
            self.scheduler.step()
            self.history.append(sum(losses) / len(losses))
            if len(self.history) % SAVE_EVERY == 0 or len(self.history) == EPOCHS:
                roptim.save(self.state_dict(), path)


def start_process(path: Path, *options: str) -> int:
    """Runs this script on one checkpoint; returns the exit code."""
    return subprocess.run([sys.executable, __file__, "--checkpoint", str(path), *options]).returncode


def compare(folder: Path) -> int:
    """The three runs."""
    uninterrupted, interrupted = folder / "uninterrupted.safetensors", folder / "interrupted.safetensors"
    run = Run()
    run.train(uninterrupted)
    print(f"uninterrupted: {EPOCHS} epochs, loss {run.history[0]:.4f} -> {run.history[-1]:.4f}", flush=True)

    code = start_process(interrupted, "--die-in", str(EPOCHS // 2 + 1))
    saved = len(roptim.load(interrupted)["history"])
    print(f"killed in the middle of epoch {EPOCHS // 2 + 1}: the last checkpoint holds {saved} epochs", flush=True)
    if code != KILLED or start_process(interrupted) != 0:
        print("one of the processes did not end as it should")
        return 1

    same = uninterrupted.read_bytes() == interrupted.read_bytes()
    print("same bits" if same else "DIFFERENT BITS", "in the resumed run and the uninterrupted one")
    return 0 if same else 1


def main(arguments: list[str] | None = None) -> int:
    """Compares the runs; with ``--checkpoint`` it is one of them."""
    parser = argparse.ArgumentParser(description="Kill a run, resume it in a fresh process, compare the bits.")
    parser.add_argument("--checkpoint", type=Path, help="run once, from this file if it exists")
    parser.add_argument("--die-in", type=int, metavar="EPOCH", help="die in the middle of this epoch")
    options = parser.parse_args(arguments)
    if options.checkpoint is None:
        with tempfile.TemporaryDirectory() as folder:
            return compare(Path(folder))

    run = Run()
    if options.checkpoint.exists():
        run.load_state_dict(roptim.load(options.checkpoint))
        print(f"resumed after {len(run.history)} epochs")
    run.train(options.checkpoint, options.die_in)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
