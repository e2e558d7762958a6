"""Savers that are killed, whose disk is full, or whose system calls fail leave the old checkpoint or the new one."""

from __future__ import annotations

import hashlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
from processes import leftovers, run, start
from twins import FULL

import roptim
from roptim import Checkpointer

MODES = ["series", "background", "one file"]
#: Kills at random moments, for each mode.
KILLS = 250 if FULL else 10

#: A run, by whoever executes this text: the children, and the test as their judge.
TRAINING = """
import numpy as np, roptim

def made():
    params = {"W": np.zeros((200, 300), np.float32), "b": np.zeros(300, np.float32)}
    opt = roptim.Adam(params, lr=0.01)
    sched = roptim.lr_scheduler.ExponentialLR(opt, 0.999)
    return {"params": params, "optimizer": opt, "scheduler": sched, "rng": np.random.default_rng(7), "step": 0}

def one_step(run):
    rng = run["rng"]
    run["optimizer"].step({name: rng.standard_normal(p.shape, np.float32) for name, p in run["params"].items()})
    run["scheduler"].step()
    run["step"] += 1
"""

#: Reads lines "first last", and forks a child for each, which goes on with the run up to a last step. Children say
#: "saving 5", and "saved 5" once 5 is certain to be there.
NURSERY = (
    TRAINING
    + """
import os, sys, warnings
warnings.simplefilter("ignore", DeprecationWarning)
directory, mode = sys.argv[1:3]

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

def child(last):
    run, path = made(), directory + "/one"
    checkpoints = roptim.Checkpointer(directory, keep=2, background=mode == "background")
    if mode == "one file":
        if os.path.exists(path):
            roptim.restore(path, run)
    else:
        checkpoints.restore(run)
    say("resumed", run["step"])
    first = True
    while run["step"] < last:
        one_step(run)
        step = run["step"]
        if mode == "background":
            # Which waits for the one before.
            checkpoints.wait()
            if not first:
                say("saved", step - 1)
        say("saving", step)
        if mode == "one file":
            roptim.save(run, path)
        else:
            checkpoints.save(step, run)
        if mode != "background":
            say("saved", step)
        if first:
            checkpoints.wait()
            say("left", sum(name.startswith(".roptim") for name in os.listdir(directory)))
        first = False
    checkpoints.wait()
    say("saved", last)

for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        # Not by the parent, who may be late.
        say("pid", os.getpid())
        child(int(line))
        os._exit(0)
    say("end", os.waitpid(pid, 0)[1])
"""
)


def digest(tree: Any) -> str:
    """Of all bits of a saved run, in order."""
    total = hashlib.sha256()

    def through(value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                total.update(repr(key).encode())
                through(inner)
        elif isinstance(value, (list, tuple)):
            for inner in value:
                through(inner)
        elif isinstance(value, (np.ndarray, np.generic)):
            total.update(f"{value.dtype} {value.shape}".encode() + value.tobytes())
        else:
            total.update(repr(value).encode())

    through(tree)
    return total.hexdigest()


class Uninterrupted:
    """The digests of a run that nobody kills, by step."""

    def __init__(self, scratch: Path) -> None:
        self.names: dict[str, Any] = {}
        exec(TRAINING, self.names)
        self.run = self.names["made"]()
        self.scratch, self.digests = scratch, [""]

    def digest(self, step: int) -> str:
        while len(self.digests) <= step:
            self.names["one_step"](self.run)
            roptim.save(self.run, self.scratch)
            self.digests.append(digest(roptim.load(self.scratch)))
        return self.digests[step]


def there(directory: Path, mode: str) -> tuple[int, Any]:
    """Step and state of what a run would resume from."""
    if mode == "one file":
        path = directory / "one"
        state = roptim.load(path) if path.exists() else None
        return (state["step"], state) if state else (0, None)
    found = Checkpointer(directory).latest()
    return (found.step, found.state) if found else (0, None)


def line(stream: IO[str] | None) -> list[str]:
    assert stream is not None
    words = stream.readline().split()
    assert words, "the nursery has died"
    return words


@pytest.mark.parametrize("mode", MODES)
def test_kills_at_random_moments(tmp_path: Path, mode: str) -> None:
    """The directory is never tidied: what one kill leaves the next child finds."""
    uninterrupted = Uninterrupted(tmp_path / "scratch")
    directory = tmp_path / "run"
    directory.mkdir()
    rng = random.Random(MODES.index(mode))
    acknowledged = 0
    inside = new = old = 0
    #: Seconds that the moments are spread over: a few saves.
    spread = 0.02
    with start(NURSERY, directory, mode) as nursery:
        assert nursery.stdin is not None
        for kill in range(KILLS):
            nursery.stdin.write("1000000000\n")
            word, pid = line(nursery.stdout)
            assert word == "pid"
            resumed = line(nursery.stdout)
            assert resumed == ["resumed", str(acknowledged)]
            time.sleep(rng.random() * spread)
            os.kill(int(pid), signal.SIGKILL)
            saving = acknowledged
            while (words := line(nursery.stdout))[0] != "end":
                if words[0] == "saved":
                    acknowledged = int(words[1])
                elif words[0] == "saving":
                    saving = int(words[1])
                else:
                    assert words == ["left", "0"], "leftovers go with the next save"
            assert int(words[1]) == signal.SIGKILL
            inside += bool(leftovers(directory))
            step, state = there(directory, mode)
            assert step in (acknowledged, saving), f"kill {kill}"
            new, old = new + (step == saving > acknowledged), old + (step == acknowledged < saving)
            if state is not None:
                assert digest(state) == uninterrupted.digest(step)
            acknowledged = step
        # To the end, with nobody in the way.
        nursery.stdin.write(f"{acknowledged + 3}\n")
        while (words := line(nursery.stdout))[0] != "end":
            pass
        assert words == ["end", "0"]
        nursery.stdin.close()
        assert nursery.wait(60) == 0
    step, state = there(directory, mode)
    assert step == acknowledged + 3
    assert digest(state) == uninterrupted.digest(step)
    assert not leftovers(directory)
    if mode != "one file":
        assert Checkpointer(directory).steps() == [step - 1, step]
    print(f"{mode}: {KILLS} kills, {inside} left a temporary file, {new} the new state, {old} the old one; step {step}")
    assert inside >= KILLS // 10, "too few kills were inside of a save"
    assert new + old >= KILLS // 4


# ---- one system call ----------------------------------------------------------------------------------------

#: Saves step 1, waits for a line, saves step 2 and says how that went.
ONE_SAVE = """
import os, sys, numpy as np, roptim
directory, background = sys.argv[1], sys.argv[2] == "True"
checkpoints = roptim.Checkpointer(directory, keep=1, background=background)
state = {"a": np.arange(5000.0), "b": [np.ones(3000, np.int8)] * 3}
checkpoints.save(1, state)
checkpoints.wait()
print("ready", flush=True)
# By another system call than the saves': it may be under way when the tracer comes.
os.readv(0, [bytearray(1)])
try:
    checkpoints.save(2, state)
    checkpoints.wait()
    outcome = "saved"
except roptim.CheckpointIOError as error:
    outcome = f"refused {error}"
except BaseException as error:
    outcome = f"{type(error).__name__} {error}"
# By another system call than the saves'.
os.writev(1, [outcome.encode()])
os._exit(0)
"""


def traced(directory: Path, *options: str, background: bool = False) -> tuple[int, str]:
    """Exit status and last words of one save under strace."""
    if directory.exists():
        shutil.rmtree(directory)
    with start(ONE_SAVE, directory, background) as saver:
        assert saver.stdout is not None
        assert saver.stdout.readline() == "ready\n"
        command = ["strace", "-f", "-p", str(saver.pid), *options]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as tracer:
            assert tracer.stderr is not None
            attached = tracer.stderr.readline()
            assert "attached" in attached, attached
            assert saver.stdin is not None
            saver.stdin.write("\n")
            outcome = saver.stdout.read()
            status = saver.wait(60)
            tracer.communicate(timeout=60)
    return status, outcome.strip()


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> Counter[str]:
    """How often one save makes each system call; skips where no process can be traced."""
    if shutil.which("strace") is None:
        pytest.skip("there is no strace")
    directory = tmp_path_factory.mktemp("traced")
    log = directory / "log"
    try:
        status, outcome = traced(directory / "run", "-o", str(log))
    except (AssertionError, OSError) as error:
        pytest.skip(f"strace cannot attach: {error}")
    assert (status, outcome) == (0, "saved")
    text = log.read_text()
    counted = Counter(re.findall(r"^\d+ +(\w+)\(", text, re.MULTILINE))
    assert counted["fsync"] == 2, "the file and its directory"
    assert sum(counted[name] for name in ("rename", "renameat", "renameat2")) == 1
    assert text.index("fsync(") < text.index("rename") < text.rindex("fsync(")
    return counted


def whole(directory: Path) -> int:
    """The newest step, of which nothing may be missing."""
    found = Checkpointer(directory).latest()
    assert found is not None
    assert np.array_equal(found.state["a"], np.arange(5000.0))
    assert [b.tobytes() for b in found.state["b"]] == [b"\1" * 3000] * 3
    return found.step


def each(calls: Counter[str], names: list[str]) -> list[tuple[str, int]]:
    """Every one of these calls, or the first and the last of each kind."""
    picked = []
    for name in names:
        times = range(1, calls[name] + 1)
        picked += [(name, k) for k in (times if FULL else sorted({*times[:1], *times[-1:]}))]
    return picked


def test_a_kill_at_every_system_call(tmp_path: Path, calls: Counter[str]) -> None:
    names = sorted(calls) if FULL else ["fsync", "write", "rename", "unlink", "openat", "flock"]
    seen: Counter[int] = Counter()
    left = 0
    for name, k in each(calls, names):
        if name in ("exit_group", "restart_syscall", "readv"):
            continue
        directory = tmp_path / "run"
        status, _ = traced(directory, "-o", "/dev/null", "-e", f"inject={name}:signal=SIGKILL:when={k}")
        assert status == -signal.SIGKILL, (name, k)
        step = whole(directory)
        seen[step] += 1
        assert step in (1, 2), (name, k)
        if name == "fsync":
            assert step == k
        left += bool(leftovers(directory))
        Checkpointer(directory).save(3, 3)
        assert not leftovers(directory), (name, k)
    print(f"{seen.total()} kills at calls: {seen[1]} left the old state, {seen[2]} the new one; {left} leftovers")
    assert min(seen[1], seen[2], left) >= 2


@pytest.mark.parametrize("background", [False, True])
def test_errors_of_every_system_call(tmp_path: Path, calls: Counter[str], background: bool) -> None:
    rename = next(name for name in ("rename", "renameat", "renameat2") if calls[name])
    cases = each(calls, ["write", "fsync", rename])
    for name, k in cases:
        errors = [("EIO", "Input/output error"), ("ENOSPC", "No space left on device"), ("EDQUOT", "quota")]
        for error, text in errors if FULL else errors[background : 1 + background]:
            directory = tmp_path / "run"
            inject = f"inject={name}:error={error}:when={k}"
            status, outcome = traced(directory, "-o", "/dev/null", "-e", inject, background=background)
            assert status == 0
            assert outcome.startswith(f"refused {directory}/step-00000002.safetensors: "), (inject, outcome)
            assert text in outcome
            # Only the flush of the directory comes after the rename.
            after = name == "fsync" and k == 2
            assert whole(directory) == (2 if after else 1), inject
            assert ("the file is in place" in outcome) == after
            assert not leftovers(directory), inject
            Checkpointer(directory, keep=1).save(3, 3)
            assert [path.name for path in directory.iterdir()] == ["step-00000003.safetensors"]


def test_calls_cut_short_or_interrupted_are_made_again(tmp_path: Path, calls: Counter[str]) -> None:
    for inject in (
        "inject=write:error=EINTR:when=1+2",
        "inject=fsync:error=EINTR:when=1",
        "inject=rename,renameat,renameat2:error=EINTR:when=1",
    ):
        status, outcome = traced(tmp_path / "run", "-o", "/dev/null", "-e", inject)
        assert (status, outcome) == (0, "saved"), inject
        assert whole(tmp_path / "run") == 2


def test_a_sweep_between_making_and_lock(tmp_path: Path, calls: Counter[str]) -> None:
    """A file without its lock is taken for abandoned: its maker sees that, and makes another."""
    if not calls["flock"]:
        pytest.skip("locks are made in another way here")
    directory = tmp_path / "run"
    with start(ONE_SAVE, directory, False) as saver:
        assert saver.stdout is not None
        assert saver.stdout.readline() == "ready\n"
        command = ["strace", "-f", "-p", str(saver.pid), "-o", "/dev/null"]
        command += ["-e", "inject=flock:delay_enter=1500000:when=1"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as tracer:
            assert tracer.stderr is not None
            assert "attached" in tracer.stderr.readline()
            assert saver.stdin is not None
            saver.stdin.write("\n")
            end = time.monotonic() + 60
            while not leftovers(directory):
                assert time.monotonic() < end
                time.sleep(0.001)
            roptim.save("beside", directory / "one")
            assert not leftovers(directory), "it was swept before its lock"
            assert saver.stdout.read() == "saved"
            tracer.communicate(timeout=60)
    assert whole(directory) == 2
    assert not leftovers(directory)


# ---- a full disk --------------------------------------------------------------------------------------------

FULL_DISK = """
import os, subprocess, sys, numpy as np, roptim
mount, sizes = sys.argv[1], int(sys.argv[2])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "roptim", mount], check=True)
big = np.random.default_rng(0).integers(0, 256, 600_000, np.uint8)
outcomes = []
for i in range(sizes):
    for background in (False, True):
        size = 24_576 + i * 1_400_000 // sizes // 4096 * 4096
        subprocess.run(["mount", "-o", f"remount,size={size}", mount], check=True)
        directory = f"{mount}/{i}-{background}"
        checkpoints = roptim.Checkpointer(directory, keep=1, background=background)
        checkpoints.save(1, "old")
        checkpoints.wait()
        for step in (2, 3):
            try:
                checkpoints.save(step, big)
                checkpoints.wait()
                outcomes.append("saved")
                assert (checkpoints.latest().state == big).all()
                assert checkpoints.steps() == [step]
            except roptim.CheckpointIOError as error:
                assert "No space left on device" in str(error), error
                outcomes.append("refused")
                newest = checkpoints.latest()
                assert newest.step == step - 1 or newest.step == 1
            assert not [name for name in os.listdir(directory) if not name.startswith("step-")]
        subprocess.run(["mount", "-o", "remount,size=8m", mount], check=True)
        checkpoints.save(4, big)
        checkpoints.wait()
        assert (checkpoints.latest().state == big).all() and checkpoints.steps() == [4]
        checkpoints.discard_after(0)
print(outcomes.count("saved"), outcomes.count("refused"))
"""


def test_a_full_disk(tmp_path: Path) -> None:
    """Of 20 sizes, from one with no room for the new file to one for both; mounted where nobody else sees it."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("only root may mount a small disk")
    if shutil.which("unshare") is None or shutil.which("mount") is None:
        pytest.skip("there is no unshare or mount")
    apart = ["unshare", "--mount", "--propagation", "private"]
    tried = subprocess.run([*apart, "mount", "-t", "tmpfs", "x", str(tmp_path)], capture_output=True, check=False)
    if tried.returncode:
        pytest.skip(f"mounting is refused: {tried.stderr.decode().strip()}")
    command = [*apart, sys.executable, "-c", FULL_DISK, str(tmp_path), str(20 if FULL else 5)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    saved, refused = map(int, done.stdout.split())
    print(f"full disk: {saved} saves had room, {refused} had none")
    assert min(saved, refused) >= 4


def test_the_nursery_is_this_version() -> None:
    """What is killed is what is tested."""
    assert run("import roptim; print(roptim.__file__)").strip() == roptim.__file__
