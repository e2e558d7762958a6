"""Checkpointer: which files there are after which calls, and what other threads, processes and signals do to them."""

from __future__ import annotations

import datetime
import gc
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import leftovers, run, start
from twins import FULL, f32, same

import roptim
from roptim import Adam, Checkpointer, CheckpointError, CheckpointIOError

MIB = 1 << 20


def names(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


def files(*steps: int) -> list[str]:
    return [f"step-{step:08}.safetensors" for step in steps]


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def wait_until(happened: Callable[[], Any]) -> None:
    end = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < end, "it did not happen within a minute"
        time.sleep(0.0005)


# ---- which files there are ----------------------------------------------------------------------------------


def test_names_and_steps(tmp_path: Path) -> None:
    checkpoints = Checkpointer(tmp_path / "run", keep=None)
    steps = [0, 7, 99_999_999, 100_000_000, 2**63 - 1]
    for step in steps:
        assert checkpoints.save(step, {"step": step})
        assert checkpoints.path(step) == tmp_path / "run" / f"step-{step:08}.safetensors"
    assert names(tmp_path / "run") == sorted(checkpoints.path(step).name for step in steps)
    assert checkpoints.steps() == steps
    for step in steps:
        found = checkpoints.load(step)
        assert (found.step, found.path, found.state) == (step, checkpoints.path(step), {"step": step})
        assert roptim.load(found.path) == {"step": step}
    assert checkpoints.latest() == checkpoints.load(2**63 - 1)
    assert checkpoints.directory == tmp_path / "run"


def test_none_where_none_was_saved(tmp_path: Path) -> None:
    checkpoints = Checkpointer(tmp_path)
    run = {"x": f32(2)}
    assert checkpoints.latest() is None
    assert checkpoints.restore(run) is None
    assert checkpoints.steps() == []
    assert checkpoints.discard_after(0) == []
    with pytest.raises(CheckpointIOError, match=r"step-00000003.safetensors.*No such file"):
        checkpoints.load(3)
    with pytest.raises(CheckpointIOError, match=r"step-00000003.safetensors.*No such file"):
        checkpoints.restore(run, step=3)
    assert np.all(run["x"] == 1)
    assert names(tmp_path) == []


@pytest.mark.parametrize(("keep", "left"), [(1, [9]), (2, [8, 9]), (3, [7, 8, 9]), (None, list(range(10)))])
def test_keep(tmp_path: Path, keep: int | None, left: list[int]) -> None:
    checkpoints = Checkpointer(tmp_path, keep=keep)
    for step in range(10):
        checkpoints.save(step, step)
        assert names(tmp_path) == files(*range(0 if keep is None else max(0, step + 1 - keep), step + 1))
    assert checkpoints.steps() == left
    checkpoints.save(9, "again")
    assert checkpoints.steps() == left
    assert [checkpoints.load(step).state for step in left] == [*left[:-1], "again"]


def test_a_smaller_keep_removes_at_the_next_save_only(tmp_path: Path) -> None:
    for step in range(5):
        Checkpointer(tmp_path, keep=None).save(step, step)
    later = Checkpointer(tmp_path, keep=2)
    assert later.steps() == [0, 1, 2, 3, 4]
    later.save(5, 5)
    assert later.steps() == [4, 5]


def test_every_so_many_steps(tmp_path: Path) -> None:
    checkpoints = Checkpointer(tmp_path, keep=None, every=3)
    assert [step for step in range(10) if checkpoints.save(step, step)] == [0, 3, 6, 9]
    assert not checkpoints.save(10, object()), "what is not due is not looked at"
    assert checkpoints.save(10, 10, force=True)
    assert checkpoints.steps() == [0, 3, 6, 9, 10]
    every: Any = np.int32(11)
    assert Checkpointer(tmp_path, keep=None, every=every).save(11, 0)


def test_every_so_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = types.SimpleNamespace(now=5.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr("roptim._checkpointer.time", clock)
    checkpoints = Checkpointer(tmp_path, keep=None, every=datetime.timedelta(seconds=10))
    saved = []
    for step in range(30):
        clock.now = 5.0 + step
        if checkpoints.save(step, step, force=step == 4):
            saved.append(step)
    assert saved == [0, 4, 14, 24]
    always = Checkpointer(tmp_path, keep=None, every=datetime.timedelta(0))
    assert always.save(30, 0)
    assert always.save(31, 0)


def test_an_older_step_is_refused(tmp_path: Path) -> None:
    checkpoints = Checkpointer(tmp_path)
    checkpoints.save(5, "five")
    checkpoints.save(8, "eight")
    before = contents(tmp_path)
    message = (
        f"{tmp_path}: step must be at least 8, the newest checkpoint's, got 6; discard_after(6) removes what is newer"
    )
    # What is before two is refused for one of them.
    with pytest.raises(roptim.RoptimValueError, match=f"^{re.escape(message)}$"):
        checkpoints.save(6, "six")
    with pytest.raises(roptim.RoptimValueError, match="discard_after"):
        checkpoints.save(3, "three", force=True)
    assert contents(tmp_path) == before
    assert checkpoints.discard_after(8) == []
    assert checkpoints.discard_after(5) == [8]
    assert checkpoints.save(6, "six")
    latest = checkpoints.latest()
    assert latest is not None
    assert (latest.step, latest.state) == (6, "six")
    assert sorted(checkpoints.discard_after(0)) == [5, 6]
    assert names(tmp_path) == []


# ---- past damaged files -------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def replace_by_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "something").write_text("in it")


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def replace_by_loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def replace_by_foreign(path: Path) -> None:
    path.write_bytes(b"\x93NUMPY\x01\0" + bytes(200))


DAMAGE: list[Callable[[Path], Any]] = [
    flip,
    truncate,
    lambda path: path.write_bytes(b""),
    replace_by_foreign,
    replace_by_directory,
    replace_by_pipe,
    replace_by_loop,
]


@pytest.fixture(params=DAMAGE, ids=["flip", "truncation", "empty", "foreign", "directory", "pipe", "loop"])
def damage(request: pytest.FixtureRequest) -> Any:
    return request.param


def test_latest_goes_past_damaged_files(tmp_path: Path, damage: Any) -> None:
    checkpoints = Checkpointer(tmp_path, keep=None)
    for step in range(1, 5):
        checkpoints.save(step, {"x": np.arange(100.0), "step": step})
    damage(checkpoints.path(4))
    damage(checkpoints.path(3))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = checkpoints.latest()
    assert found is not None
    assert (found.step, found.path, found.state["step"]) == (2, checkpoints.path(2), 2)
    assert len(caught) == 2
    for warning, step in zip(caught, (4, 3), strict=True):
        assert str(warning.message).startswith(f"roptim.Checkpointer: {checkpoints.path(step)}: ")
        assert str(warning.message).endswith("; an older checkpoint is taken")
        assert warning.filename == __file__
    run = {"x": np.zeros(100), "step": 0}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = checkpoints.restore(run)
    assert report is not None
    assert (report.step, run["step"]) == (2, 2)
    assert [warning.filename for warning in caught] == [__file__] * 2
    assert checkpoints.steps() == [1, 2, 3, 4], "nothing is removed by looking"
    with pytest.raises((CheckpointError, CheckpointIOError), match=re.escape(str(checkpoints.path(4)))):
        checkpoints.load(4)


def test_only_damaged_files_are_an_error(tmp_path: Path, damage: Any) -> None:
    checkpoints = Checkpointer(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, step)
        damage(checkpoints.path(step))
    run = {"x": f32(2)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for ask in (checkpoints.latest, lambda: checkpoints.restore(run)):
            with pytest.raises(CheckpointError, match="a checkpoint must be readable, got none that is") as raised:
                ask()
            assert str(tmp_path) in str(raised.value)
    assert checkpoints.steps() == [1, 2]


def test_a_damaged_later_file_is_set_aside(tmp_path: Path, damage: Any) -> None:
    checkpoints = Checkpointer(tmp_path, keep=2)
    for step in (1, 2, 4):
        checkpoints.save(step, step)
    damage(checkpoints.path(4))
    was_file = checkpoints.path(4).is_file()
    before = checkpoints.path(4).read_bytes() if was_file else None
    aside = tmp_path / "step-00000004.safetensors.damaged"
    with pytest.warns(UserWarning, match="damaged") as caught:
        checkpoints.save(3, 3)
    expected = f"roptim.Checkpointer: a damaged checkpoint was in the way and is now called {aside}"
    assert [str(warning.message) for warning in caught] == [expected]
    assert caught[0].filename == __file__
    assert names(tmp_path) == [*files(2, 3), aside.name]
    if was_file:
        assert aside.read_bytes() == before
    latest = checkpoints.latest()
    assert latest is not None
    assert latest.step == 3
    for step in (4, 5, 6):
        checkpoints.save(step, step)
    assert names(tmp_path) == [aside.name, *files(5, 6)]


def test_an_older_step_is_refused_behind_a_damaged_one(tmp_path: Path) -> None:
    checkpoints = Checkpointer(tmp_path, keep=None)
    for step in (1, 2, 3):
        checkpoints.save(step, step)
    flip(checkpoints.path(3))
    with pytest.raises(roptim.RoptimValueError, match="step must be at least 2"):
        checkpoints.save(1, 1)
    assert checkpoints.steps() == [1, 2, 3]


def test_links_to_nowhere(tmp_path: Path) -> None:
    """Where nothing else is there; past them, it goes to what is whole."""
    code = """
import signal, sys, roptim
signal.alarm(2)
try:
    print(roptim.Checkpointer(sys.argv[1]).latest())
except roptim.CheckpointError as error:
    print(type(error).__name__)
"""
    Checkpointer(tmp_path).path(1).symlink_to(tmp_path / "nowhere")
    assert run(code, tmp_path) in ("None\n", "CheckpointError\n")


def test_foreign_files_stay(tmp_path: Path) -> None:
    foreign = {
        name: os.urandom(20)
        for name in (
            "notes.txt",
            "step-1.safetensors",
            "step-000000001.safetensors",
            "step-+0000001.safetensors",
            "step-00000001.safetensors.damaged",
            "step-00000001.safetensors~",
            "step-.safetensors",
            "Step-00000001.safetensors",
            "model.safetensors",
            ".roptim-",
            ".roptim-mine",
            "roptim-x.tmp",
            ".hidden.tmp",
            "step-18446744073709551616.safetensors",
        )
    }
    for name, data in foreign.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / ".roptim-directory.tmp").mkdir()
    (tmp_path / ".roptim-link.tmp").symlink_to("notes.txt")
    (tmp_path / "sub").mkdir()
    Checkpointer(tmp_path / "sub").save(1, 1)
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff")).write_text("not UTF-8")
    checkpoints = Checkpointer(tmp_path, keep=1)
    assert checkpoints.latest() is None
    for step in range(5):
        checkpoints.save(step, step)
    assert checkpoints.steps() == [4]
    checkpoints.discard_after(0)
    assert checkpoints.latest() is None
    assert {name: (tmp_path / name).read_bytes() for name in foreign} == foreign
    assert (tmp_path / ".roptim-directory.tmp").is_dir()
    assert (tmp_path / ".roptim-link.tmp").is_symlink()
    assert (tmp_path / "sub" / "step-00000001.safetensors").exists()
    assert len(names(tmp_path)) == len(foreign) + 4


def test_an_old_checkpoint_that_cannot_be_removed_is_named(tmp_path: Path) -> None:
    checkpoints = Checkpointer(tmp_path, keep=1)
    checkpoints.save(1, 1)
    replace_by_directory(checkpoints.path(1))
    with pytest.warns(UserWarning, match="the old checkpoint could not be removed") as caught:
        assert checkpoints.save(2, 2)
    assert str(checkpoints.path(1)) in str(caught[0].message)
    assert caught[0].filename == __file__
    assert checkpoints.load(2).state == 2


# ---- arguments ----------------------------------------------------------------------------------------------


def test_the_directory_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Checkpointer(tmp_path / "a" / "b" / "c").save(1, 1)
    assert names(tmp_path / "a" / "b" / "c") == files(1)
    monkeypatch.chdir(tmp_path)
    directories: list[Any] = ["d/e", b"f", Path("g"), "."]
    for directory in directories:
        Checkpointer(directory).save(1, 1)
    assert names(tmp_path) == ["a", "d", "f", "g", *files(1)]
    (tmp_path / "link").symlink_to("a")
    Checkpointer("link/new").save(1, 1)
    assert names(tmp_path / "a" / "new") == files(1)
    (tmp_path / "dangling").symlink_to("nowhere")
    for taken in ("a/b/c/step-00000001.safetensors", "a/b/c/step-00000001.safetensors/x", "dangling"):
        with pytest.raises(CheckpointIOError, match=f"/{taken}.*the directory could not be made"):
            Checkpointer(taken)


A_STEP = "a whole number from 0 to 2^63 - 1, got"
SAVE_STEP = f"roptim.Checkpointer.save: step must be {A_STEP}"
KEEP = "roptim.Checkpointer: keep must be a whole number from 1 to 2^63 - 1, got"
EVERY = "roptim.Checkpointer: every must be a whole number from 1 to 2^63 - 1 or a datetime.timedelta, got"
BAD: list[tuple[str, Callable[[Any, Any], Any], str]] = [
    *(
        (f"keep {keep!r}", lambda c, d, keep=keep: Checkpointer(d, keep), f"{KEEP} {keep!r}")
        for keep in (0, -1, True, 2.0, "3", 2**63, float("nan"), (1,))
    ),
    *(
        (f"every {every!r}", lambda c, d, every=every: Checkpointer(d, 3, every), f"{EVERY} {every!r}")
        for every in (0, -5, False, 1.5, None, "1", 2**64)
    ),
    (
        "negative time",
        lambda c, d: Checkpointer(d, every=datetime.timedelta(seconds=-1)),
        "roptim.Checkpointer: every must be >= 0, got datetime.timedelta(days=-1, seconds=86399)",
    ),
    (
        "progress",
        lambda c, d: Checkpointer(d, progress=3),  # type: ignore[arg-type]  # a wrong type is what is refused
        "roptim.Checkpointer: progress must be callable or None, got an object of type int",
    ),
    (
        "no path",
        lambda c, d: Checkpointer(3),  # type: ignore[arg-type]  # a wrong type is what is refused
        "roptim.Checkpointer: path must be a path, got an object of type int",
    ),
    ("empty path", lambda c, d: Checkpointer(""), "roptim.Checkpointer: path must be the name of a file, got ''"),
    (
        "NUL in path",
        lambda c, d: Checkpointer("a\0b"),
        "roptim.Checkpointer: path must be the name of a file, got 'a\\x00b'",
    ),
    *(
        (
            f"step {step!r}",
            lambda c, d, step=step: c.save(step, 1),
            f"{SAVE_STEP} {step!r}",
        )
        for step in (-1, 2**63, 1.0, True, None, "7", np.float64(3))
    ),
    ("path", lambda c, d: c.path(-1), f"roptim.Checkpointer.path: step must be {A_STEP} -1"),
    ("load", lambda c, d: c.load("x"), f"roptim.Checkpointer.load: step must be {A_STEP} 'x'"),
    ("restore", lambda c, d: c.restore({}, step=-2), f"roptim.Checkpointer.load: step must be {A_STEP} -2"),
    ("discard", lambda c, d: c.discard_after(-1), f"roptim.Checkpointer.discard_after: step must be {A_STEP} -1"),
    (
        "state",
        lambda c, d: c.save(9, {"a": [object()]}),
        "roptim.Checkpointer.save: obj['a'][0] must be None, bool, int",
    ),
    ("rename", lambda c, d: c.restore({"x": f32(1)}, rename=3), "roptim.Checkpointer.restore: rename must be"),
    ("missing", lambda c, d: c.restore({"x": f32(1)}, missing="maybe"), "roptim.Checkpointer.restore: missing must be"),
    ("hparams", lambda c, d: c.restore({"x": f32(1)}, hparams=1), "roptim.Checkpointer.restore: hparams must be"),
]


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize(("call", "message"), [bad[1:] for bad in BAD], ids=[bad[0] for bad in BAD])
def test_bad_arguments(tmp_path: Path, background: bool, call: Callable[[Any, Any], Any], message: str) -> None:
    checkpoints = Checkpointer(tmp_path / "good", background=background)
    checkpoints.save(3, {"x": f32(1)})
    checkpoints.wait()
    with pytest.raises(roptim.RoptimError) as raised:
        call(checkpoints, tmp_path / "bad")
    assert str(raised.value).startswith(message)
    assert isinstance(raised.value, (ValueError, TypeError))
    assert names(tmp_path) == ["good"]
    assert names(tmp_path / "good") == files(3)
    assert checkpoints.save(4, {"x": f32(1)})
    checkpoints.wait()


def test_repr_and_with(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as checkpoints:
        assert repr(checkpoints) == f"Checkpointer({str(tmp_path)!r})"
        checkpoints.save(1, 1)
    assert checkpoints.steps() == [1]

    def fail() -> None:
        with Checkpointer(tmp_path, background=True) as checkpoints:
            checkpoints.save(2, 2)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert names(tmp_path) == files(1, 2)


# ---- restore ------------------------------------------------------------------------------------------------


def a_run(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    params = {"W": rng.standard_normal((30, 40)).astype(np.float32), "b": rng.standard_normal(40).astype(np.float32)}
    opt = Adam(params, lr=0.1)
    return {
        "params": params,
        "optimizer": opt,
        "scheduler": roptim.lr_scheduler.CosineAnnealingLR(opt, 50),
        "rng": rng,
        "step": 0,
    }


def train(run: dict[str, Any], steps: int) -> None:
    for _ in range(steps):
        gradients = {k: run["rng"].standard_normal(p.shape).astype(np.float32) for k, p in run["params"].items()}
        run["optimizer"].step(gradients)
        run["scheduler"].step()
        run["step"] += 1


@pytest.mark.parametrize("background", [False, True])
def test_a_restored_run_goes_on_with_the_same_bits(tmp_path: Path, background: bool) -> None:
    reference = a_run()
    seen = {}
    with Checkpointer(tmp_path, keep=None, every=4, background=background) as checkpoints:
        for step in range(1, 21):
            train(reference, 1)
            seen[step] = roptim.load(save_to(tmp_path / "now", reference))
            checkpoints.save(step, reference)
    assert checkpoints.steps() == [4, 8, 12, 16, 20]
    for wanted in (None, 4, 12):
        resumed = a_run(seed=1)
        report = checkpoints.restore(resumed, step=wanted)
        assert report is not None
        assert report.step == resumed["step"] == (20 if wanted is None else wanted)
        assert "params.W" in report.loaded
        assert same(checkpoints.load(report.step).state, seen[report.step])
        train(resumed, 24 - resumed["step"])
        ahead = a_run()
        train(ahead, 24)
        assert same(ahead["params"], resumed["params"])
        assert same(ahead["optimizer"].state_dict(), resumed["optimizer"].state_dict())


def save_to(path: Path, tree: Any) -> Path:
    roptim.save(tree, path)
    return path


def test_restore_passes_its_arguments_on(tmp_path: Path) -> None:
    checkpoints = Checkpointer(tmp_path)
    checkpoints.save(1, {"part": {"old": f32(2, value=5.0), "more": f32(1)}})
    run = {"part": {"new": f32(2), "mine": f32(1)}}
    with pytest.raises(KeyError):
        checkpoints.restore(run)
    assert np.all(run["part"]["new"] == 1)
    report = checkpoints.restore(run, rename={"old": "new"}, missing="init", unexpected="drop")
    assert report is not None
    assert (report.step, report.initialised, report.dropped) == (1, ("part.mine",), ("part.more",))
    assert np.all(run["part"]["new"] == 5)


# ---- progress -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("background", [False, True])
def test_progress(tmp_path: Path, background: bool) -> None:
    calls: list[tuple[int, int]] = []
    threads = set()

    def progress(done: int, total: int) -> None:
        calls.append((done, total))
        threads.add(threading.current_thread())

    checkpoints = Checkpointer(tmp_path, background=background, progress=progress)
    state = {"x": np.zeros(20 * MIB, np.uint8), "y": np.ones(5 * MIB, np.uint8)}
    for act in (lambda: checkpoints.save(1, state), lambda: checkpoints.load(1), lambda: checkpoints.latest()):
        calls.clear()
        threads.clear()
        act()
        checkpoints.wait()
        done = [call[0] for call in calls]
        assert {call[1] for call in calls} == {checkpoints.path(1).stat().st_size}
        assert done == sorted(done)
        assert done[-1] == calls[-1][1]
        assert max(np.diff([0, *done])) <= 9 * MIB
        main = threading.current_thread()
        assert (threads == {main}) == (not background or act.__code__.co_names[-1] != "save")


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, roptim.CheckpointError])
def test_progress_that_raises_ends_the_save(tmp_path: Path, background: bool, error: type[BaseException]) -> None:
    armed = ""

    def progress(done: int, total: int) -> None:
        if armed == "start" or (armed == "end" and done == total):
            raise error("enough")

    def big_save(step: int) -> None:
        checkpoints.save(step, np.zeros(20 * MIB, np.uint8))
        checkpoints.wait()

    checkpoints = Checkpointer(tmp_path, keep=1, background=background, progress=progress)
    checkpoints.save(1, 1)
    checkpoints.wait()
    before = contents(tmp_path)
    for when in ("start", "end"):
        armed = when
        for step in (1, 2):
            with pytest.raises(error, match=r"^enough$"):
                big_save(step)
            assert contents(tmp_path) == before
    armed = ""
    checkpoints.save(2, 2)
    checkpoints.wait()
    assert names(tmp_path) == files(2)


# ---- in the background --------------------------------------------------------------------------------------


class Gate:
    """A report of progress that holds a save in the background until it is opened."""

    def __init__(self) -> None:
        self.opened, self.reached = threading.Event(), threading.Event()
        self.inside = self.most = 0
        self.lock = threading.Lock()
        self.threads: set[int] = set()

    def __call__(self, done: int, total: int) -> None:
        with self.lock:
            self.inside += 1
            self.most = max(self.most, self.inside)
        self.reached.set()
        assert self.opened.wait(60)
        with self.lock:
            self.inside -= 1


@pytest.fixture
def gate() -> Iterator[Gate]:
    made = Gate()
    yield made
    made.opened.set()


def test_a_save_in_the_background_holds_what_was_there(tmp_path: Path, gate: Gate) -> None:
    run = a_run()
    train(run, 2)
    expected = roptim.load(save_to(tmp_path / "expected", run))
    checkpoints = Checkpointer(tmp_path / "run", background=True, progress=gate)
    assert checkpoints.save(2, run)
    assert gate.reached.wait(60)
    assert names(tmp_path / "run") == [path.name for path in leftovers(tmp_path / "run")]
    train(run, 3)
    run["params"]["W"][...] = np.nan
    run["step"] = "changed"
    gate.opened.set()
    assert checkpoints.steps() == [2]
    assert same(checkpoints.load(2).state, expected)


def test_two_hundred_steps_never_tear(tmp_path: Path) -> None:
    """All numbers of a state are its step: one of another step in it would be a tear."""
    size = 1 << 18
    p, q = f32(size, value=0.0), roptim.Parameter(f32(size, value=0.0))
    opt = roptim.SGD([p, q], lr=1.0)
    gradient = f32(size, value=-1.0)
    run = {"p": p, "opt": opt, "q": q, "counter": np.zeros(size, np.int64), "step": 0}
    checkpoints = Checkpointer(tmp_path, keep=None, background=True)
    seen: set[int] = set()
    for step in range(1, 201):
        opt.step([gradient, gradient])
        run["counter"] += 1
        run["step"] = step
        checkpoints.save(step, run)
        for path in tmp_path.glob("step-*"):
            whole = roptim.load(path)
            assert path.name == files(whole["step"])[0]
            for array in (whole["p"], whole["q"], whole["counter"]):
                assert np.all(array == whole["step"])
            seen.add(whole["step"])
            if whole["step"] != step:
                path.unlink()
    checkpoints.wait()
    seen |= set(checkpoints.steps())
    assert seen == set(range(1, 201))
    assert not leftovers(tmp_path)


def test_at_most_one_write_is_under_way(tmp_path: Path, gate: Gate) -> None:
    checkpoints = Checkpointer(tmp_path, keep=None, background=True, progress=gate)
    begun = time.monotonic()
    checkpoints.save(1, f32(10))
    returned = []

    def next_save() -> None:
        checkpoints.save(2, f32(10))
        returned.append(time.monotonic())

    other = threading.Thread(target=next_save)
    assert gate.reached.wait(60)
    other.start()
    time.sleep(0.1)
    assert not returned, "the second save waits for the first"
    opened = time.monotonic()
    gate.opened.set()
    other.join()
    assert begun < opened < returned[0]
    for step in range(3, 30):
        checkpoints.save(step, f32(10))
    checkpoints.wait()
    assert gate.most == 1
    assert checkpoints.steps() == list(range(1, 30))


def test_saves_from_many_threads_through_one_checkpointer(tmp_path: Path) -> None:
    gate = Gate()
    gate.opened.set()
    checkpoints = Checkpointer(tmp_path, keep=3, background=True, progress=gate)
    errors: list[BaseException] = []

    def work(first: int) -> None:
        for step in range(first, first + 100, 8):
            try:
                checkpoints.save(step, {"x": np.full(1000, step), "step": step})
            except roptim.RoptimValueError as error:
                errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    try:
        checkpoints.wait()
    except roptim.RoptimValueError as error:
        errors.append(error)
    gc.collect()
    assert all("discard_after" in str(error) for error in errors)
    assert gate.most == 1
    for step in checkpoints.steps():
        assert np.all(checkpoints.load(step).state["x"] == step)
    assert checkpoints.steps()[-1] >= 96
    assert not leftovers(tmp_path)


class Slow:
    """A part of a run that takes as long to copy as it is told to."""

    def __init__(self) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()

    def state_dict(self) -> int:
        self.reached.set()
        assert self.opened.wait(60)
        return 1


@pytest.mark.parametrize("background", [False, True])
def test_a_thread_waits_while_another_begins_a_save(tmp_path: Path, background: bool) -> None:
    checkpoints = Checkpointer(tmp_path, background=background)
    slow = Slow()
    first = threading.Thread(target=checkpoints.save, args=(1, slow))
    first.start()
    assert slow.reached.wait(60)
    second = threading.Thread(target=checkpoints.save, args=(2, 2))
    second.start()
    second.join(0.1)
    assert second.is_alive()
    assert names(tmp_path) == []
    slow.opened.set()
    first.join()
    second.join()
    assert checkpoints.steps() == [1, 2]


def test_a_fork_while_another_thread_begins_a_save(tmp_path: Path) -> None:
    code = """
import os, signal, sys, threading, warnings, roptim
warnings.simplefilter("ignore", DeprecationWarning)
reached, opened = threading.Event(), threading.Event()
class Slow:
    def state_dict(self):
        reached.set()
        assert opened.wait(60)
        return 1
checkpoints = roptim.Checkpointer(sys.argv[1], background=True)
thread = threading.Thread(target=checkpoints.save, args=(1, Slow()))
thread.start()
assert reached.wait(60)
child = os.fork()
if child == 0:
    signal.alarm(20)
    checkpoints.save(0, "the child's")
    checkpoints.wait()
    assert checkpoints.steps() == [0]
    sys.exit()
assert os.waitpid(child, 0)[1] == 0
opened.set()
thread.join()
print(checkpoints.steps())
"""
    assert run(code, tmp_path) == "[0, 1]\n"


@pytest.mark.parametrize("ask", ["steps", "wait", "save", "latest"])
def test_a_report_of_progress_cannot_wait_for_its_own_save(tmp_path: Path, ask: str) -> None:
    def progress(done: int, total: int) -> None:
        if steps:
            steps.pop()
            getattr(checkpoints, ask)(*((2, 2) if ask == "save" else ()))

    steps = [1]
    checkpoints = Checkpointer(tmp_path, background=True, progress=progress)
    checkpoints.save(1, 1)
    with pytest.raises(roptim.RoptimError, match="must not ask for the end of the save it reports"):
        checkpoints.wait()
    assert names(tmp_path) == []
    checkpoints.save(1, 1)
    assert checkpoints.steps() == [1]


def test_a_signal_handler_saves_while_a_save_is_under_way(tmp_path: Path) -> None:
    """The usual way to go when the machine is about to be taken away."""
    code = """
import os, signal, sys, numpy as np, roptim
def progress(done, total):
    if saved == 0 and total > 1000:
        os.kill(os.getpid(), signal.SIGTERM)
def last_words(number, frame):
    global saved
    saved += 1
    checkpoints.save(2, "last", force=True)
    checkpoints.wait()
saved = 0
signal.signal(signal.SIGTERM, last_words)
background = sys.argv[2] == "True"
checkpoints = roptim.Checkpointer(sys.argv[1], keep=None, every=100, background=background, progress=progress)
checkpoints.save(1, np.ones(20 << 20, np.uint8), force=True)
signal.alarm(30)
while saved == 0:
    pass
print(saved, checkpoints.steps(), checkpoints.load(2).state)
"""
    for background in (False, True):
        # What is under way goes on; the later step is there in the end.
        assert run(code, tmp_path / str(background), background) == "1 [1, 2] last\n"


@pytest.mark.parametrize("collect", ["save", "not due", "wait", "steps", "latest", "with"])
def test_an_error_in_the_background_is_raised_once(tmp_path: Path, collect: str) -> None:
    directory, away = tmp_path / "run", tmp_path / "away"
    checkpoints = Checkpointer(directory, every=2, background=True)
    checkpoints.save(0, "good")
    checkpoints.wait()
    before = contents(directory)
    directory.rename(away)
    checkpoints.save(2, "lost")
    writing = checkpoints._writing
    assert writing is not None
    wait_until(lambda: not writing.under_way)
    away.rename(directory)
    ask: dict[str, Callable[[], Any]] = {
        "save": lambda: checkpoints.save(4, "not yet"),
        "not due": lambda: checkpoints.save(3, "not due"),
        "wait": checkpoints.wait,
        "steps": checkpoints.steps,
        "latest": checkpoints.latest,
        "with": lambda: checkpoints.__exit__(None, None, None),
    }
    with pytest.raises(CheckpointIOError, match="No such file"):
        ask[collect]()
    assert contents(directory) == before
    ask[collect]()
    checkpoints.wait()
    assert checkpoints.steps() == ([0, 4] if collect == "save" else [0])
    checkpoints.save(4, "good")
    checkpoints.wait()
    assert checkpoints.load(4).state == "good"


def test_an_error_nobody_asks_for_is_a_warning(tmp_path: Path) -> None:
    def forget() -> None:
        held.clear()
        gc.collect()

    held = [Checkpointer(tmp_path / "run", background=True)]
    held[0].save(5, 5)
    held[0].wait()
    shutil.rmtree(tmp_path / "run")
    held[0].save(6, 6)
    wait_until(lambda: not any(thread.name.startswith("roptim") for thread in threading.enumerate()))
    with pytest.warns(UserWarning, match=r"^roptim.Checkpointer: step 6 was not saved: .*No such file"):
        forget()
    held = [Checkpointer(tmp_path / "run", background=True)]
    held[0].save(6, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        forget()
    wait_until(lambda: Checkpointer(tmp_path / "run").steps() == [6])


def test_neither_error_of_a_with_block_is_lost(tmp_path: Path) -> None:
    def fail() -> None:
        with Checkpointer(tmp_path / "run", background=True) as checkpoints:
            shutil.rmtree(tmp_path / "run")
            checkpoints.save(1, 1)
            raise ZeroDivisionError("the block's")

    with pytest.raises((ZeroDivisionError, CheckpointIOError)) as raised:
        fail()
    chain: list[BaseException] = [raised.value]
    while chain[-1].__context__ is not None:
        chain.append(chain[-1].__context__)
    text = " ".join(f"{type(e).__name__} {e} {getattr(e, '__notes__', '')}" for e in chain)
    assert "the block's" in text
    assert "No such file" in text


def test_a_thread_that_cannot_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    checkpoints = Checkpointer(tmp_path, background=True)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            checkpoints.save(1, 1)
    assert checkpoints.steps() == []
    checkpoints.save(1, 1)
    assert checkpoints.steps() == [1]


LIMITED = """
import resource, sys, numpy as np, roptim
directory, background = sys.argv[1], sys.argv[2] == "True"
big = np.random.default_rng(0).integers(0, 256, 1 << 20, np.uint8)
checkpoints = roptim.Checkpointer(directory, keep=2, background=background)
checkpoints.save(1, big[:1000])
checkpoints.wait()
roptim.save(big[:500], directory + "/one")
import os
before = {name: open(directory + "/" + name, "rb").read() for name in os.listdir(directory)}
sizes = sorted({0, 1, 7, 8, 9, 4095, 4096, 4097, (1 << 20) - 1, 1 << 20, *range(10_000, 1 << 20, int(sys.argv[3]))})
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
for size in sizes:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    failed = 0
    for save in (lambda: checkpoints.save(2, big), lambda: roptim.save(big, directory + "/one")):
        try:
            save()
            checkpoints.wait()
        except roptim.CheckpointIOError as error:
            assert isinstance(error, OSError) and "writing failed: File too large" in str(error), error
            failed += 1
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert failed == 2, (size, failed)
    assert {name: open(directory + "/" + name, "rb").read() for name in os.listdir(directory)} == before, size
checkpoints.save(2, big)
roptim.save(big, directory + "/one")
assert checkpoints.steps() == [1, 2]
assert (roptim.load(directory + "/one") == checkpoints.latest().state).all()
print(len(sizes))
"""


@pytest.mark.parametrize("background", [False, True])
def test_no_room_at_any_size(tmp_path: Path, background: bool) -> None:
    assert int(run(LIMITED, tmp_path, background, 5_000 if FULL else 100_000)) >= 20


def test_the_interpreter_waits_at_exit(tmp_path: Path) -> None:
    code = """
import sys, numpy as np, roptim
checkpoints = roptim.Checkpointer(sys.argv[1], background=True)
checkpoints.save(1, {"x": np.ones(48 << 20, np.uint8)})
checkpoints.save(2, {"x": np.ones(48 << 20, np.uint8)})
"""
    run(code, tmp_path)
    assert names(tmp_path) == files(1, 2)
    shutil.rmtree(tmp_path)
    with start(code + "sys.exit(3)", tmp_path) as process:
        assert process.wait(60) == 3
    assert names(tmp_path) == files(1, 2)
    for step in (1, 2):
        assert np.all(Checkpointer(tmp_path).load(step).state["x"] == 1)
    failing = """
import shutil, sys, roptim
checkpoints = roptim.Checkpointer(sys.argv[1], background=True)
shutil.rmtree(sys.argv[1])
checkpoints.save(7, 7)
"""
    command = [sys.executable, "-c", failing, str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert "step 7 was not saved: " in done.stderr
    assert "No such file" in done.stderr


FORKING = """
import os, sys, threading, warnings, numpy as np, roptim
warnings.simplefilter("ignore", DeprecationWarning)
directory, reached, opened = sys.argv[1], threading.Event(), threading.Event()
parent = os.getpid()
def progress(done, total):
    if os.getpid() == parent:
        reached.set()
        assert opened.wait(60)
checkpoints = roptim.Checkpointer(directory, keep=None, background=True, progress=progress)
checkpoints.save(1, np.ones(10))
assert reached.wait(60)
child = os.fork()
if child == 0:
    # The parent's save, whose thread is not here, is neither waited for nor disturbed.
    assert checkpoints.steps() == []
    checkpoints.save(2, np.ones(20))
    checkpoints.wait()
    assert checkpoints.steps() == [2]
    checkpoints.save(3, np.ones(30))
    assert checkpoints.latest().step == 3
    foreground = roptim.Checkpointer(directory, keep=None)
    foreground.save(4, np.ones(40))
    roptim.save(np.ones(50), directory + "/one")
    del checkpoints
    os.write(1, b"child ")
    sys.exit()
assert os.waitpid(child, 0)[1] == 0
opened.set()
try:
    checkpoints.wait()
except roptim.RoptimValueError as error:
    print(error)
print("steps", roptim.Checkpointer(directory).steps())
"""


def test_a_fork_while_writing(tmp_path: Path) -> None:
    out = run(FORKING, tmp_path)
    # Step 1 was begun before the others were there.
    assert out == "child steps [1, 2, 3, 4]\n"
    assert [len(Checkpointer(tmp_path).load(step).state) for step in (1, 2, 3, 4)] == [10, 20, 30, 40]
    assert not leftovers(tmp_path)


def test_an_interrupt_while_waiting_loses_nothing(tmp_path: Path) -> None:
    """The save goes on, the next one waits for it, and its error is still raised."""
    code = """
import os, shutil, signal, sys, threading, roptim
reached, opened, inside, most = threading.Event(), threading.Event(), 0, 0
def progress(done, total):
    global inside, most
    inside += 1
    most = max(most, inside)
    reached.set()
    assert opened.wait(60)
    inside -= 1
def interrupted_wait():
    assert reached.wait(60)
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        checkpoints.wait()
    except KeyboardInterrupt:
        print("interrupted")
checkpoints = roptim.Checkpointer(sys.argv[1], background=True, progress=progress)
checkpoints.save(1, 1)
interrupted_wait()
threading.Timer(0.2, opened.set).start()
checkpoints.save(2, 2)
print("steps", checkpoints.steps(), most)
opened.clear()
reached.clear()
checkpoints.save(3, 3)
interrupted_wait()
shutil.rmtree(sys.argv[1])
opened.set()
try:
    checkpoints.wait()
except roptim.CheckpointIOError:
    print("raised")
checkpoints.wait()
"""
    assert run(code, tmp_path / "run") == "interrupted\nsteps [1, 2] 1\ninterrupted\nraised\n"


def test_an_interrupt_ends_a_long_save(tmp_path: Path) -> None:
    """Ctrl-C: the old file stays, and no other."""
    code = """
import os, signal, sys, threading, time, numpy as np, roptim
checkpoints = roptim.Checkpointer(sys.argv[1], keep=1)
big = np.ones(160 << 20, np.uint8)
def interrupt():
    while not any(name.startswith(".roptim") for name in os.listdir(sys.argv[1])):
        time.sleep(0.0002)
    os.kill(os.getpid(), signal.SIGINT)
def interrupted(step):
    checkpoints.discard_after(0)
    checkpoints.save(1, "old")
    threading.Thread(target=interrupt).start()
    try:
        checkpoints.save(step, big)
        time.sleep(10)
    except KeyboardInterrupt:
        return checkpoints.latest().state == "old"
for step in (1, 2):
    # On a busy machine a save may end before the signal comes.
    print(any(interrupted(step) for _ in range(5)), os.listdir(sys.argv[1]))
"""
    assert run(code, tmp_path) == f"True {files(1)}\n" * 2


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_memory_of_saves_in_the_background(tmp_path: Path) -> None:
    """One copy beyond the state itself, however many saves follow each other."""
    code = """
import sys, numpy as np, roptim
peak = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
state = np.ones(64 << 20, np.uint8)
checkpoints = roptim.Checkpointer(sys.argv[1], keep=1, background=True)
before = peak()
for step in range(6):
    checkpoints.save(step, {"x": state})
checkpoints.wait()
print((peak() - before) >> 10)
"""
    mib = int(run(code, tmp_path))
    assert 32 <= mib <= 96


# ---- several savers -----------------------------------------------------------------------------------------


def test_many_threads_save_to_one_path(tmp_path: Path) -> None:
    path = tmp_path / "one"
    roptim.save(np.zeros(1000), path)
    stop = threading.Event()
    errors: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> Callable[[], None]:
        def inner() -> None:
            try:
                work()
            except BaseException as error:
                errors.append(error)

        return inner

    def saver(number: int) -> Callable[[], None]:
        def work() -> None:
            for i in range(30):
                roptim.save(np.full(1000 * (1 + number), 100 * number + i), path)

        return work

    def reader() -> None:
        while not stop.is_set():
            back = roptim.load(path)
            assert np.all(back == back[0])
            assert len(back) == 1000 * (1 + back[0] // 100)

    savers = [threading.Thread(target=guarded(saver(i))) for i in range(8)]
    readers = [threading.Thread(target=guarded(reader)) for _ in range(2)]
    for thread in savers + readers:
        thread.start()
    for thread in savers:
        thread.join()
    stop.set()
    for thread in readers:
        thread.join()
    assert not errors
    assert names(tmp_path) == ["one"]


SAVERS = """
import sys, numpy as np, roptim
directory, number, background = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "True"
checkpoints = roptim.Checkpointer(directory, keep=4, background=background)
sys.stdin.readline()
refused = 0
for step in range(number, 120, 4):
    try:
        checkpoints.save(step, {"x": np.full(20_000, step), "step": step})
        checkpoints.wait()
    except roptim.RoptimValueError as error:
        assert "discard_after" in str(error), error
        refused += 1
    roptim.save(np.full(20_000, step), directory + "/one")
    one = roptim.load(directory + "/one")
    assert (one == one[0]).all()
    found = checkpoints.latest()
    assert (found.state["x"] == found.step).all()
print("refused", refused)
"""


def test_many_processes_save_into_one_directory(tmp_path: Path) -> None:
    savers = [start(SAVERS, tmp_path, number, number % 2 == 1) for number in range(4)]
    for saver in savers:
        assert saver.stdin is not None
        saver.stdin.write("go\n")
    for saver in savers:
        out, _ = saver.communicate(timeout=120)
        assert saver.returncode == 0
        assert out.startswith("refused")
    checkpoints = Checkpointer(tmp_path)
    assert checkpoints.steps()[-1] >= 116
    for step in checkpoints.steps():
        assert np.all(checkpoints.load(step).state["x"] == step)
    assert not leftovers(tmp_path)


@pytest.mark.parametrize("background", [False, True])
def test_a_living_saver_keeps_its_temporary_file(tmp_path: Path, background: bool) -> None:
    """Though it is stopped while others save; a dead one's is removed."""
    code = """
import os, signal, sys, numpy as np, roptim
stops = [signal.SIGSTOP]
def progress(done, total):
    if done < total and stops:
        os.kill(os.getpid(), stops.pop())
checkpoints = roptim.Checkpointer(sys.argv[1], keep=None, background=sys.argv[2] == "True", progress=progress)
checkpoints.save(1, np.ones(20 << 20, np.uint8))
checkpoints.wait()
"""
    with start(code, tmp_path, background) as process:
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        try:
            (theirs,) = leftovers(tmp_path)
            (tmp_path / ".roptim-dead.tmp").write_bytes(b"left by a crash")
            other = Checkpointer(tmp_path, keep=None)
            for step in (1, 2, 3):
                other.save(step, step)
                roptim.save(step, tmp_path / "one")
                assert leftovers(tmp_path) == [theirs]
            other.discard_after(0)
        finally:
            process.send_signal(signal.SIGCONT)
        assert process.wait(60) == 0
    assert names(tmp_path) == ["one", *files(1)]
    assert other.load(1).state.nbytes == 20 * MIB


def test_a_signal_handler_saves_while_a_save_is_prepared(tmp_path: Path) -> None:
    code = """
import signal, sys, numpy as np, roptim
checkpoints = roptim.Checkpointer(sys.argv[1], keep=None, background=True)
class Busy:
    def state_dict(self):
        signal.raise_signal(signal.SIGUSR1)
        return {"n": 1}
signal.signal(signal.SIGUSR1, lambda *args: checkpoints.save(1, np.ones(8 << 20, np.uint8)))
checkpoints.save(2, Busy())
checkpoints.wait()
print(checkpoints.steps(), checkpoints.load(1).state.nbytes, checkpoints.load(2).state)
"""
    assert run(code, tmp_path) == "[1, 2] 8388608 {'n': 1}\n"
    assert leftovers(tmp_path) == []


def test_forked_savers_do_not_take_each_others_temporary_files(tmp_path: Path) -> None:
    """They have their parent's source of random names."""
    code = """
import os, sys, numpy as np, roptim
directory, savers, saves = sys.argv[1], 6, 150
roptim.save("first", directory + "/warm")
def work(k):
    path = f"{directory}/{k}"
    for i in range(saves):
        roptim.save({"k": k, "i": i, "a": np.full(5000, k)}, path)
        found = roptim.load(path)
        assert (found["k"], found["i"], set(found["a"].tolist())) == (k, i, {k}), found
children = []
for k in range(savers):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work(k)
            code = 0
        finally:
            os._exit(code)
    children.append(child)
print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
"""
    assert run(code, tmp_path) == "[0, 0, 0, 0, 0, 0]\n"
    assert leftovers(tmp_path) == []


def test_damaged_files_take_nobodys_place(tmp_path: Path) -> None:
    first = Checkpointer(tmp_path, keep=2)
    first.save(1, 1)
    first.save(2, 2)
    first.path(2).write_bytes(first.path(2).read_bytes()[:-1] or b"")
    again = Checkpointer(tmp_path, keep=2)
    again.save(3, 3)
    assert again.steps() == [1, 2, 3], "one of the two that stay is damaged, so the one before stays, too"
    again.save(4, 4)
    assert again.steps() == [3, 4]


def test_a_later_version_is_no_damage(tmp_path: Path) -> None:
    checkpoints = Checkpointer(tmp_path)
    checkpoints.save(1, 1)
    checkpoints.save(2, 2)
    data = checkpoints.path(2).read_bytes()
    checkpoints.path(2).write_bytes(data.replace(rb"\"format\":1", rb"\"format\":2", 1))
    with pytest.raises(CheckpointError, match="a later roptim wrote the file"):
        checkpoints.latest()
    with pytest.raises(CheckpointError, match="a later roptim wrote the file"):
        checkpoints.save(1, 1)
    assert names(tmp_path) == files(1, 2)


def test_what_was_not_saved_is_due_again(tmp_path: Path) -> None:
    checkpoints = Checkpointer(tmp_path / "run", every=datetime.timedelta(hours=1))
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(CheckpointIOError):
        checkpoints.save(1, 1)
    (tmp_path / "run").mkdir()
    assert checkpoints.save(2, 2)
    assert not checkpoints.save(3, 3)


# ---- permissions --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o027, 0o077])
def test_modes(tmp_path: Path, mask: int) -> None:
    def mode(path: Path) -> int:
        return stat.S_IMODE(path.stat().st_mode)

    before = os.umask(mask)
    try:
        checkpoints = Checkpointer(tmp_path / "run", keep=None)
        checkpoints.save(1, 1)
        roptim.save(1, tmp_path / "one")
        assert mode(checkpoints.path(1)) == mode(tmp_path / "one") == 0o666 & ~mask
        for kept in (0o600, 0o640, 0o664, 0o444, 0o777, 0o400):
            checkpoints.path(1).chmod(kept)
            (tmp_path / "one").chmod(kept)
            checkpoints.save(1, kept)
            roptim.save(kept, tmp_path / "one")
            assert mode(checkpoints.path(1)) == mode(tmp_path / "one") == kept
            assert checkpoints.load(1).state == roptim.load(tmp_path / "one") == kept
        checkpoints.save(2, 2)
        assert mode(checkpoints.path(2)) == 0o666 & ~mask
    finally:
        os.umask(before)


def test_the_temporary_file_is_never_open_to_more(tmp_path: Path) -> None:
    path = tmp_path / "one"
    roptim.save(1, path)
    path.chmod(0o600)
    seen: list[int] = []

    def progress(done: int, total: int) -> None:
        seen.extend(stat.S_IMODE(left.stat().st_mode) for left in leftovers(tmp_path))

    roptim.save(2, path, progress=progress)
    assert seen
    assert set(seen) == {0o600}


def test_a_linked_target_is_replaced_where_it_is(tmp_path: Path) -> None:
    real, links = tmp_path / "real", tmp_path / "links"
    real.mkdir()
    links.mkdir()
    roptim.save("old", real / "file")
    (links / "relative").symlink_to("../real/file")
    (links / "absolute").symlink_to(links / "relative")
    (links / "new").symlink_to("../real/made")
    (real / ".roptim-dead.tmp").write_text("left by a crash")
    for name, target in (("relative", "file"), ("absolute", "file"), ("new", "made")):
        roptim.save(name, links / name)
        assert (links / name).is_symlink()
        assert roptim.load(real / target) == name
    assert names(real) == ["file", "made"]
    assert names(links) == ["absolute", "new", "relative"]
    (links / "loop").symlink_to("loop")
    with pytest.raises(CheckpointIOError, match="symbolic link"):
        roptim.save(1, links / "loop")
    linked = Checkpointer(links / "run")
    linked.save(1, "one")
    linked.path(1).rename(real / "elsewhere")
    linked.path(1).symlink_to(real / "elsewhere")
    linked.save(1, "two")
    assert linked.load(1).state == roptim.load(real / "elsewhere") == "two"


UNPRIVILEGED = """
import os, stat, sys, numpy as np, roptim
directory = sys.argv[1]
# What is loaded later may lie where only root reads.
roptim.Checkpointer, roptim.load(directory + "/one")
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
"""


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """A directory that a process without privileges reaches and owns."""
    directory = Path(tempfile.mkdtemp(prefix="roptim-test-"))
    roptim.save("old", directory / "one")
    Checkpointer(directory).save(1, "old")
    if os.geteuid() == 0:
        for path in (directory, *directory.iterdir()):
            os.chown(path, 65534, 65534)
    yield directory
    directory.chmod(0o700)
    shutil.rmtree(directory)


def test_directories_closed_to_writing(open_directory: Path) -> None:
    code = """
os.chmod(directory, 0o555)
checkpoints = roptim.Checkpointer(directory, keep=1)
one = directory + "/one"
for save in (lambda: checkpoints.save(2, 2), lambda: checkpoints.save(1, 2), lambda: roptim.save(2, one)):
    try:
        save()
    except roptim.CheckpointIOError as error:
        assert "Permission denied" in str(error) and directory in str(error), error
    else:
        raise AssertionError
assert checkpoints.latest().state == roptim.load(directory + "/one") == "old"
try:
    roptim.Checkpointer(directory + "/new")
except roptim.CheckpointIOError as error:
    print(error)
os.chmod(directory, 0o755)
checkpoints.save(2, "new")
"""
    out = run(UNPRIVILEGED + code, open_directory)
    assert out.startswith(f"{open_directory}/new: the directory could not be made: Permission denied")
    assert names(open_directory) == ["one", *files(2)]


def test_a_checkpoint_closed_to_reading_is_passed_by(open_directory: Path) -> None:
    code = """
import warnings
checkpoints = roptim.Checkpointer(directory)
checkpoints.save(2, "closed")
os.chmod(checkpoints.path(2), 0)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    assert checkpoints.latest().step == 1
(warning,) = caught
assert "Permission denied" in str(warning.message) and str(checkpoints.path(2)) in str(warning.message)
print("passed")
"""
    assert run(UNPRIVILEGED + code, open_directory) == "passed\n"


def test_a_dead_saver_of_a_file_closed_to_writing(open_directory: Path) -> None:
    code = """
os.chmod(directory + "/one", 0o444)
child = os.fork()
if child == 0:
    roptim.save("killed", directory + "/one", progress=lambda done, total: os.kill(os.getpid(), 9))
os.waitpid(child, 0)
print(sum(name.startswith(".roptim") for name in os.listdir(directory)))
roptim.save("new", directory + "/one")
print(sum(name.startswith(".roptim") for name in os.listdir(directory)), roptim.load(directory + "/one"))
"""
    assert run(UNPRIVILEGED + code, open_directory) == "1\n0 new\n"
