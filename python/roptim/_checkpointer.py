"""The checkpoints of a run: a directory with a file for each saved step."""

from __future__ import annotations

import datetime
import os
import threading
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple

from roptim import _roptim
from roptim._errors import RoptimRuntimeError, RoptimTypeError, RoptimValueError, refuse, told, warn
from roptim._files import Progress, path_text
from roptim._loading import LoadReport, Missing, Rules, Unexpected
from roptim._restore import restore_tree
from roptim._signals import deferred
from roptim._values import is_whole

_PLACE = "roptim.Checkpointer"
#: Of a thread that saves in the background, what it saves to.
_THIS_THREAD = threading.local()


class Checkpoint(NamedTuple):
    """What was saved at a step."""

    step: int
    path: Path
    #: The saved tree, as :func:`roptim.load` returns it.
    state: Any


def _whole(place: str, name: str, value: Any, least: int, alternative: str = "") -> int:
    is_int = is_whole(value)
    if not is_int or not least <= value < 2**63:
        allowed = f"a whole number from {least} to 2^63 - 1{alternative}"
        raise refuse(RoptimValueError, place, name, allowed, told(value))
    return int(value)


class Checkpointer:
    """Saves a run every so often, keeps the newest checkpoints, and finds the newest that is whole::

        run = {"params": params, "optimizer": opt, "scheduler": sched, "rng": rng}
        checkpoints = roptim.Checkpointer("run", keep=3, every=100)
        found = checkpoints.restore(run)
        for step in range(found.step + 1 if found else 1, 10_001):
            ...                                  # one step of training
            checkpoints.save(step, run)          # every hundredth is saved

    A kill or a power cut at any moment leaves the checkpoints that were there, or these and the new one: each is a
    file of its own, ``step-00000100.safetensors``, written by :func:`save`, and never written to again. One object is
    for one thread at a time that trains; several processes may have one directory.

    Parameters
    ----------
    directory
        Where; made if it is absent.
    keep : int or None
        How many of the newest stay; None keeps all. Those found damaged, or of a wrong length, do not count.
    every : int or datetime.timedelta
        Which calls of :meth:`save` save: those whose step is a multiple, or those this long after the last save.
    background : bool
        Write in a thread of its own. Everything is copied before ``save`` returns, so that the next step changes
        nothing in it; the next save waits for the one before, so there is one such copy at a time. What went wrong is
        raised by the next call, :meth:`wait` or the end of a ``with`` block. The interpreter waits for the thread
        before it exits.
    progress : callable, optional
        Called as ``progress(bytes_done, bytes_in_all)``, of a save in the background from its thread.

    Raises
    ------
    RoptimError
        If an argument is refused or the directory cannot be made.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        keep: int | None = 3,
        every: int | datetime.timedelta = 1,
        *,
        background: bool = False,
        progress: Progress | None = None,
    ) -> None:
        keep = None if keep is None else _whole(_PLACE, "keep", keep, 1)
        if isinstance(every, datetime.timedelta):
            if every < datetime.timedelta(0):
                raise refuse(RoptimValueError, _PLACE, "every", ">= 0", told(every))
        else:
            every = _whole(_PLACE, "every", every, 1, " or a datetime.timedelta")
        if progress is not None and not callable(progress):
            got = f"an object of type {type(progress).__name__}"
            raise refuse(RoptimTypeError, _PLACE, "progress", "callable or None", got)
        # The working directory may change.
        self.directory = Path(os.path.abspath(path_text(directory, _PLACE)))
        self._every = every
        self._background = bool(background)
        self._progress = progress
        self._series = _roptim.Series(self.directory, keep)
        self._last_save = -float("inf")
        self._writing: _Writing | None = None
        self._lock, self._process = threading.RLock(), os.getpid()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.directory)!r})"

    def save(self, step: int, state: Any, *, force: bool = False) -> bool:
        """Saves the run at a step, if it is due, and removes the oldest checkpoints beyond ``keep``.

        Parameters
        ----------
        step : int
            Of the run, from 0. A step may be saved again; one before the newest checkpoint is refused, since
            :meth:`latest` would not find it: see :meth:`discard_after`.
        state
            Whatever :func:`save` takes: usually a dict of all that makes the run.
        force : bool
            Save whether it is due or not.

        Returns
        -------
        Whether it was saved; with ``background``, whether it is being saved.

        Raises
        ------
        CheckpointIOError
            If the system refuses the write; the older checkpoints are untouched.
        """
        place = f"{_PLACE}.save"
        step = _whole(place, "step", step, 0)
        self._refuse_own_thread()
        if self._background:
            self._raise_finished()
        if not (force or self._is_due(step)):
            return False
        with self._alone():
            self.wait()
            snapshot = _roptim.Snapshot(state, place, self._background)
            writing = _Writing(self._series, step, snapshot, self._progress)
            if self._background:
                # A signal handler may have begun a save meanwhile.
                self.wait()
            self._last_save = time.monotonic()
            if self._background:
                # Known from when it runs, so that nobody waits for one that never began.
                with deferred():
                    writing.start()
                    self._writing = writing
            else:
                writing.run()
                self._conclude(writing)
        return True

    def _conclude(self, writing: _Writing) -> None:
        try:
            writing.conclude()
        except BaseException:
            # What was not saved is due again.
            self._last_save = -float("inf")
            raise

    def _alone(self) -> threading.RLock:
        """Held by the thread that begins a save or waits for one; a signal handler may save in between."""
        if self._process != os.getpid():
            # In a forked child the thread that held it may be gone.
            self._lock, self._process = threading.RLock(), os.getpid()
        return self._lock

    def _refuse_own_thread(self) -> None:
        if getattr(_THIS_THREAD, "saves_to", None) is self._series:
            raise RoptimRuntimeError(f"{_PLACE}: progress must not ask for the end of the save it reports, got a wait")

    def _is_due(self, step: int) -> bool:
        if isinstance(self._every, datetime.timedelta):
            return time.monotonic() - self._last_save >= self._every.total_seconds()
        return step % self._every == 0

    def _raise_finished(self) -> None:
        if self._writing is not None and not self._writing.under_way:
            self.wait()

    def wait(self) -> None:
        """Waits for a save in the background, and raises what went wrong in it."""
        self._refuse_own_thread()
        with self._alone():
            writing = self._writing
            if writing is not None:
                writing.join()
                # Only now: what interrupts the wait leaves it to the next call.
                self._writing = None
                self._conclude(writing)

    def steps(self) -> list[int]:
        """Steps that have a file, in ascending order; whether it can be read is seen when it is."""
        self.wait()
        return self._series.steps()

    def path(self, step: int) -> Path:
        """The file of a step."""
        return Path(self._series.path(_whole(f"{_PLACE}.path", "step", step, 0)))

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole; None where none was ever saved.

        Past a damaged one it goes to the one before, with a warning that names it.

        Raises
        ------
        CheckpointError
            If there are checkpoints and none can be read: to begin anew would lose the run.
        """
        self.wait()
        found, damaged = self._series.latest(self._progress)
        for sentence in damaged:
            warn(f"{_PLACE}: {sentence}; an older checkpoint is taken")
        return None if found is None else Checkpoint(found[0], self.path(found[0]), found[1])

    def load(self, step: int) -> Checkpoint:
        """The checkpoint of a step."""
        self.wait()
        step = _whole(f"{_PLACE}.load", "step", step, 0)
        return Checkpoint(step, self.path(step), self._series.load(step, self._progress))

    def restore(
        self,
        into: Any,
        *,
        step: int | None = None,
        strict: bool = True,
        missing: Missing | None = None,
        unexpected: Unexpected | None = None,
        rename: Mapping[str, str] | None = None,
        hparams: Literal["file", "keep"] | Mapping[str, Any] = "file",
    ) -> LoadReport | None:
        """Brings the newest whole checkpoint, or that of ``step``, back into a run.

        The arguments are those of :func:`roptim.restore`.

        Returns
        -------
        LoadReport or None
            Its ``step`` is the checkpoint's. None where none was ever saved; ``into`` is untouched then.

        Raises
        ------
        RoptimError
            If something does not fit; nothing has changed then.
        """
        rules = Rules.of(f"{_PLACE}.restore", strict, missing, unexpected, rename, hparams)
        found = self.latest() if step is None else self.load(step)
        return None if found is None else restore_tree(found.state, into, rules, found.step)

    def discard_after(self, step: int) -> list[int]:
        """Removes the checkpoints of all later steps, to go on from an earlier one; returns their steps."""
        self.wait()
        return self._series.discard_after(_whole(f"{_PLACE}.discard_after", "step", step, 0))

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.wait()


class _Writing:
    """One save, in this thread or in one of its own."""

    def __init__(
        self, series: _roptim.Series, step: int, snapshot: _roptim.Snapshot, progress: Progress | None
    ) -> None:
        self._series, self._step, self._progress = series, step, progress
        self._snapshot: _roptim.Snapshot | None = snapshot
        self._saved: tuple[list[Path], list[str]] = ([], [])
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._done = threading.Event()
        self._process = os.getpid()

    def start(self) -> None:
        # No daemon: the interpreter waits for it at exit.
        self._thread = threading.Thread(target=self.run, name=f"roptim checkpoint {self._step}")
        self._thread.start()

    def run(self) -> None:
        assert self._snapshot is not None
        if self._thread is not None:
            _THIS_THREAD.saves_to = self._series
        try:
            self._saved = self._series.save(self._step, self._snapshot, self._progress)
        except BaseException as error:  # whoever asks next gets it, whatever it is
            self._error = error
        finally:
            self._snapshot = None
            self._done.set()

    @property
    def under_way(self) -> bool:
        # A forked child has the parent's object but not its thread, and nothing to wait for.
        return self._process == os.getpid() and not self._done.is_set()

    def join(self) -> None:
        # Not Thread.join: interrupted, before Python 3.13 it takes the thread for ended, and the interpreter does not
        # wait for it at exit.
        if self.under_way:
            self._done.wait()

    def conclude(self) -> None:
        """Raises what went wrong, and warns of what went otherwise than it should."""
        error, self._error = self._error, None
        if error is not None:
            raise error
        set_aside, kept = self._saved
        for path in set_aside:
            warn(f"{_PLACE}: a damaged checkpoint was in the way and is now called {path}")
        for sentence in kept:
            warn(f"{_PLACE}: {sentence}")

    def __del__(self) -> None:
        if self._error is not None and self._process == os.getpid():
            warnings.warn(f"{_PLACE}: step {self._step} was not saved: {self._error}", stacklevel=1)
