"""Checkpoints: a run is killed, resumes in a fresh process, and ends on the same bits as if nothing had happened.

What makes the run is one dict: the parameters, the optimizer, the scheduler, the random generator, the losses so far.
``Checkpointer.save`` writes all of it to one file, ``restore`` brings all of it back into the same objects of a fresh
process. The files are safetensors with a checksum; the newest three stay.

Three runs: one without interruption; one that is killed (``kill -9``, at no particular moment) again and again until it
gets to the end; both end with the same checkpoint, byte for byte. At last the newest checkpoint of the killed run is
damaged, and the run is taken up from the one before.

Run ``python examples/checkpoint.py``. Exit code: 0 if the files are the same, else 1.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np

import roptim

STEPS, SAVE_EVERY = 1000, 20


def new_run() -> dict[str, Any]:
    """A regression on random batches, from the beginning."""
    params = {"W": np.zeros((20, 3), np.float32), "b": np.zeros(3, np.float32)}
    optimizer = roptim.Adam(params, lr=0.05)
    return {
        "params": params,
        "optimizer": optimizer,
        "scheduler": roptim.lr_scheduler.StepLR(optimizer, step_size=250, gamma=0.5),
        "rng": np.random.default_rng(0),
        "losses": [],
    }


def train(folder: Path, pause: float = 0.0) -> dict[str, Any]:
    """Trains to the end, from the newest checkpoint in the folder if there is one."""
    run = new_run()
    checkpoints = roptim.Checkpointer(folder, keep=3, every=SAVE_EVERY)
    found = checkpoints.restore(run)
    target = np.arange(60, dtype=np.float32).reshape(20, 3) / 60
    params, rng = run["params"], run["rng"]
    for step in range(found.step + 1 if found else 1, STEPS + 1):
        x = rng.standard_normal((16, 20), np.float32)
        error = x @ (params["W"] - target) + params["b"] - 0.1 * rng.standard_normal((16, 3), np.float32)
        run["optimizer"].step({"W": x.T @ error / 16, "b": error.mean(axis=0)})
        run["scheduler"].step()
        run["losses"].append(0.5 * float(np.mean(error**2)))
        checkpoints.save(step, run)
        time.sleep(pause)
    return run


def train_and_be_killed(folder: Path, moments: random.Random) -> int:
    """Starts a process that trains, kills it, and starts it again, until it gets to the end; returns the kills."""
    for kills in range(100):
        child = subprocess.Popen([sys.executable, __file__, "--folder", str(folder)], stdout=subprocess.PIPE)
        with child:
            assert child.stdout is not None
            child.stdout.readline()  # it has begun
            try:
                if child.wait(timeout=moments.uniform(0.2, 1.2)) != 0:
                    raise SystemExit("the process did not end as it should")
                return kills
            except subprocess.TimeoutExpired:
                child.kill()
            steps = roptim.Checkpointer(folder).steps()
            print(f"killed; checkpoints of steps {steps}", flush=True)
    raise SystemExit("killed 100 times and still not at the end")


def damage(path: Path) -> None:
    """Flips one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def compare(folder: Path) -> int:
    """The runs."""
    uninterrupted, interrupted = folder / "uninterrupted", folder / "interrupted"
    losses = train(uninterrupted)["losses"]
    print(f"uninterrupted: {STEPS} steps, loss {losses[0]:.4f} -> {losses[-1]:.4f}", flush=True)

    kills = train_and_be_killed(interrupted, random.Random(1))
    ends = [roptim.Checkpointer(each).path(STEPS) for each in (uninterrupted, interrupted)]
    same = ends[0].read_bytes() == ends[1].read_bytes()
    print(f"killed {kills} times: {'same bits' if same else 'DIFFERENT BITS'} at the end")

    damage(ends[1])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        report = roptim.Checkpointer(interrupted).restore(new_run())
    print(f"one bit of the newest checkpoint flipped: resumed from step {report.step if report else None}")
    print(f"  {said[0].message}" if said else "  without a warning")
    return 0 if same and report is not None and report.step == STEPS - SAVE_EVERY else 1


def main(arguments: list[str] | None = None) -> int:
    """Compares the runs; with ``--folder`` it is the one that is killed."""
    parser = argparse.ArgumentParser(description="Kill a run, resume it in a fresh process, compare the bits.")
    parser.add_argument("--folder", type=Path, help="train once, slowly, with checkpoints in this folder")
    options = parser.parse_args(arguments)
    if options.folder is not None:
        print("training", flush=True)
        train(options.folder, pause=0.002)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        return compare(Path(folder))


if __name__ == "__main__":
    raise SystemExit(main())
