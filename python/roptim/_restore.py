"""Bringing what was saved back into the objects of a run: all of it, or nothing."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any, Literal

import numpy as np

try:
    from numpy.lib.array_utils import byte_bounds
except ImportError:  # before NumPy 2
    from numpy import byte_bounds  # type: ignore[attr-defined,no-redef]  # of another version

from roptim import _roptim
from roptim._errors import (
    DeviceLostError,
    RoptimError,
    RoptimKeyError,
    RoptimTypeError,
    RoptimValueError,
    TornError,
    refuse,
    told,
)
from roptim._files import Progress, load, state_of
from roptim._loading import LoadReport, Missing, Rules, Unexpected, prepare
from roptim._parameter import Parameter
from roptim._signals import deferred
from roptim.optimizer import Optimizer

_PLACE = "roptim.restore"
_ARRAYS = (np.ndarray, Parameter, _roptim.DeviceArray)
_GENERATORS = (np.random.Generator, np.random.BitGenerator, np.random.RandomState)


def restore(
    source: Any,
    into: Any,
    *,
    strict: bool = True,
    missing: Missing | None = None,
    unexpected: Unexpected | None = None,
    rename: Mapping[str, str] | None = None,
    hparams: Literal["file", "keep"] | Mapping[str, Any] = "file",
    progress: Progress | None = None,
) -> LoadReport:
    """Brings a saved tree back into the objects it was saved from, or others like them.

    ``into`` is what was given to :func:`save`: arrays and Parameters are written in place, optimizers, schedulers,
    averages and whatever has a ``load_state_dict()`` load their states, NumPy random generators go on where they
    were, and plain values (numbers, strings, None, and containers of these) are replaced in the dict or list they
    are in::

        run = {"params": params, "optimizer": opt, "scheduler": sched, "rng": rng, "epoch": 0}
        roptim.restore("run.ckpt", run)      # after: roptim.save(run, "run.ckpt")
        run["epoch"]                         # the saved one

    Names, shapes, dtypes and the classes of optimizers are checked, all of them before anything is written. Objects of
    your own check their states themselves; what went before is put back if one refuses.

    Parameters
    ----------
    source
        A path, or what :func:`load` returned.
    into
        Where to.
    strict, missing, unexpected, hparams
        As in :meth:`Optimizer.load_state_dict`. They hold for the keys of dicts and the items of lists in ``into``,
        too: with ``missing="init"`` what the file lacks stays as it is.
    rename : dict, optional
        ``{saved name: name here}``, of parameters as optimizers name them, and of the arrays in each part of ``into``:
        ``{"head.W": "head.V"}`` renames ``params["head"]["W"]`` and the optimizer's parameter together,
        ``{"head": "top"}`` all that is in ``params["head"]``.
    progress : callable, optional
        As in :func:`load`.

    Returns
    -------
    LoadReport
        What was loaded, initialised and dropped by its place, and each hyperparameter that changed.

    Raises
    ------
    RoptimError
        If something does not fit; nothing has changed then.
    """
    rules = Rules.of(_PLACE, strict, missing, unexpected, rename, hparams)
    saved = load(os.fsdecode(source), progress=progress) if isinstance(source, (str, bytes, os.PathLike)) else source
    return restore_tree(saved, into, rules)


def restore_tree(saved: Any, into: Any, rules: Rules, step: int | None = None) -> LoadReport:
    """The same, of values, by checked rules."""
    plan = _Plan(rules)
    plan.through(saved, into, "", None, None)
    plan.check_renames()
    plan.check_overlap()
    plan.commit()
    hparams = plan.hparams
    converted = ", ".join(dict.fromkeys(plan.converted)) or None
    return LoadReport(
        tuple(plan.loaded), tuple(plan.initialised), tuple(plan.dropped), hparams, converted, step, tuple(plan.kept)
    )


class _Plan:
    """What is to be written where, once all of it is checked."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.loaded: list[str] = []
        self.initialised: list[str] = []
        self.dropped: list[str] = []
        self.hparams: dict[str, tuple[Any, Any]] = {}
        self.converted: list[str] = []
        self.kept: list[str] = []
        #: Old names of ``rename`` that something was found under.
        self.used: set[str] = set()
        #: Arrays and objects by identity: where they are in the whole, and what they are to become.
        self.seen: dict[int, tuple[str, Any]] = {}
        # In the order of writing: what may fail first, with what undoes it.
        self.objects: list[tuple[str, Any, Any]] = []
        self.values: list[tuple[Callable[[Any], None], Any, Any]] = []
        self.optimizers: list[tuple[Optimizer, Callable[[], None]]] = []
        self.writes: list[Callable[[], None]] = []
        #: Arrays that are written to, each by its name and with what it becomes.
        self.arrays: list[tuple[str, np.ndarray[Any, Any], Any]] = []

    def through(
        self, saved: Any, target: Any, place: str, within: str | None, assign: Callable[[Any], None] | None
    ) -> None:
        """Plans one target. ``within`` is its name as optimizers name parameters, ``""`` for a part of the whole
        and None for that; ``assign`` replaces it in its container, if it can be."""
        name = place or "the whole"
        if _is_written_to(target):
            self.refuse_two_states(saved, target, name)
        if isinstance(target, Optimizer) and type(target).load_state_dict is Optimizer.load_state_dict:
            self.optimizer(self.hooked(target, saved), target, name)
        elif saved is None and assign is not None and _holds(target, _is_array) and not _holds(target, _is_object):
            # There was none yet.
            self.values.append((assign, target, None))
            self.loaded.append(name)
        elif _is_array(target):
            self.array(saved, target, name)
        elif isinstance(target, _GENERATORS):
            self.generator(saved, target, name)
        elif _is_average(target):
            self.objects.append((name, target, self.average(saved, target, name)))
            self.loaded.append(name)
        elif _loads(target):
            # A copy: what keeps it must not share memory with the source.
            self.objects.append((name, target, copy.deepcopy(saved)))
            self.loaded.append(name)
        elif isinstance(target, Mapping) and (not place or _holds(target, _is_written_to)):
            self.mapping(saved, target, place, within)
        elif isinstance(target, (list, tuple)) and (not place or _holds(target, _is_written_to)):
            self.sequence(saved, target, place, within)
        elif assign is not None and _kind(target) is not None:
            if saved is not None and target is not None and _kind(saved) != _kind(target):
                got = f"{_kind(saved)} in the saved state"
                raise refuse(RoptimTypeError, _PLACE, name, f"{_kind(target)} as it is here", got)
            self.values.append((assign, target, copy.deepcopy(saved)))
            self.loaded.append(name)
        else:
            allowed = "an array, an object with load_state_dict, or a value in a list or dict"
            raise refuse(RoptimTypeError, _PLACE, name, allowed, f"an object of type {type(target).__name__}")

    def refuse_two_states(self, saved: Any, target: Any, name: str) -> None:
        """One object may be in several places (tied weights), if it was saved with one state."""
        other, state = self.seen.setdefault(id(target), (name, saved))
        if other != name and not _same(state, saved):
            got = f"other values than in {other}, which is the same object"
            raise refuse(RoptimValueError, _PLACE, name, "saved with one state", got)

    def average(self, saved: Any, target: Any, name: str) -> Any:
        """The state of an AveragedModel with the names that it has here."""
        module = saved.get("module") if isinstance(saved, Mapping) else None
        if not target._names or not isinstance(module, Mapping) or not all(isinstance(k, str) for k in module):
            return copy.deepcopy(saved)
        here: dict[Any, Any] = dict(zip(target._names, target._averages, strict=True))
        rename = self.renamed(module)
        found: dict[Any, Any] = {rename.get(key, key): value for key, value in module.items()}
        if len(found) != len(module):
            raise refuse(RoptimValueError, _PLACE, "rename", "to different names", f"one name twice in {name}")
        surplus, new = [key for key in found if key not in here], [key for key in here if key not in found]
        self.differences(new, surplus, "module" if name == "the whole" else f"{name}.module")
        self.initialised += [f"{name}: {key}" for key in new]
        self.dropped += [f"{name}: {key}" for key in surplus]
        return {**copy.deepcopy(dict(saved)), "module": {key: found.get(key, here[key]) for key in here}}

    def hooked(self, target: Optimizer, saved: Any) -> Any:
        """What the optimizer's hooks make of its state; a copy, of which nothing of the source is changed."""
        return target._before_load(copy.deepcopy(saved) if target._hooks is not None else saved)

    def optimizer(self, saved: Any, target: Optimizer, name: str) -> None:
        groups = saved.get("param_groups") if isinstance(saved, Mapping) else None
        listed = [group for group in groups if isinstance(group, Mapping)] if isinstance(groups, (list, tuple)) else []
        # What is no list of names is refused with all else that is wrong in it.
        lists = [names for group in listed if isinstance(names := group.get("param_names"), (list, tuple))]
        names = {name for each in lists for name in each if isinstance(name, str)}
        rules = replace(self.rules, rename=self.renamed(names))
        with _placed(name):
            prepared = prepare(target, saved, rules, f"{type(target).__name__}.load_state_dict")
        report = prepared.report
        self.optimizers.append((target, prepared.commit))
        self.loaded += [f"{name}: {each}" for each in report.loaded]
        self.initialised += [f"{name}: {each}" for each in report.initialised]
        self.dropped += [f"{name}: {each}" for each in report.dropped]
        self.hparams |= {f"{name}: {key}": change for key, change in report.hparams.items()}
        self.converted += [report.converted_from] if report.converted_from else []
        self.kept += [f"{name}: {each}" for each in report.kept]

    def array(self, saved: Any, target: Any, name: str) -> None:
        own = target._array if isinstance(target, Parameter) else target
        shape = own.shape
        dtype = target.dtype_name if isinstance(target, _roptim.DeviceArray) else own.dtype.name
        wanted = f"a {dtype} array of shape {shape}"
        if not isinstance(saved, (np.ndarray, np.generic)):
            raise refuse(RoptimTypeError, _PLACE, name, wanted, f"an object of type {type(saved).__name__}")
        if saved.shape != shape:
            got = f"one of shape {saved.shape} in the saved state"
            raise refuse(RoptimValueError, _PLACE, name, wanted, got)
        if saved.dtype.name != dtype:
            got = f"{saved.dtype.name} in the saved state"
            remedy = "cast one of them: nothing is converted silently"
            raise refuse(RoptimTypeError, _PLACE, name, wanted, got, remedy)
        held = isinstance(target, Parameter) and target._on_device
        if isinstance(own, np.ndarray) and not own.flags.writeable and not held:
            raise refuse(RoptimValueError, _PLACE, name, "writeable", "a read-only array")
        if isinstance(target, Parameter):
            self.writes.append(lambda: setattr(target, "data", saved))
        elif isinstance(target, np.ndarray):
            if target.size and not target.dtype.hasobject:
                self.arrays.append((name, target, saved))
            self.writes.append(lambda: target.__setitem__(..., saved))
        else:
            self.writes.append(lambda: target.write(np.ascontiguousarray(saved)))
        self.loaded.append(name)

    def generator(self, saved: Any, target: Any, name: str) -> None:
        kept = state_of(target)
        assert kept is not None  # it is a generator
        kind = kept[0]["bit_generator"]
        if not isinstance(saved, Mapping) or saved.get("bit_generator") != kind:
            got = saved.get("bit_generator") if isinstance(saved, Mapping) else None
            raise refuse(RoptimTypeError, _PLACE, name, f"the state of a {kind} generator", told(got))
        # On a copy first: NumPy checks while it writes.
        twin = copy.deepcopy(target)
        try:
            _set_generator(twin, saved)
        except (TypeError, ValueError, KeyError, OverflowError) as error:
            allowed = f"the state of a {kind} generator"
            raise refuse(RoptimValueError, _PLACE, name, allowed, f"one that NumPy refuses ({error})") from error
        self.writes.append(lambda: _set_generator(target, saved))
        self.loaded.append(name)

    def mapping(self, saved: Any, target: Mapping[Any, Any], place: str, within: str | None) -> None:
        if not isinstance(saved, Mapping):
            got = f"an object of type {type(saved).__name__} in the saved state"
            raise refuse(RoptimTypeError, _PLACE, place or "the whole", "a dict", got)
        found = {self.renamed_key(key, target, place, within): value for key, value in saved.items()}
        if len(found) != len(saved):
            got = f"one name twice in {place or 'the whole'}"
            raise refuse(RoptimValueError, _PLACE, "rename", "to different names", got)
        surplus = [str(key) for key in found if key not in target]
        self.differences([str(key) for key in target if key not in found], surplus, place)
        for key, value in target.items():
            inner = f"{place}.{key}" if place else str(key)
            if key in found:
                assign = _setter(target, key) if hasattr(target, "__setitem__") else None
                self.through(found[key], value, inner, _below(within, key), assign)
            else:
                self.initialised.append(inner)
        self.dropped += [f"{place}.{key}" if place else key for key in surplus]

    def renamed_key(self, key: Any, target: Mapping[Any, Any], place: str, within: str | None) -> Any:
        """The key here of a saved one. Names in ``rename`` begin below the part of the tree they are in."""
        if not isinstance(key, str):
            return key
        prefix = f"{within}." if within else ""
        old = f"{prefix}{key}"
        new = self.rules.rename.get(old)
        if new is None:
            return key
        if not new.startswith(prefix) or not new[len(prefix) :]:
            remedy = "name the containers, or load the file and move the entry"
            raise refuse(RoptimValueError, _PLACE, f"rename of {old!r}", f"to a name in {place!r}", told(new), remedy)
        if new[len(prefix) :] not in target:
            # Another container with such a key.
            return key
        self.used.add(old)
        return new[len(prefix) :]

    def renamed(self, names: Iterable[Any]) -> dict[str, str]:
        """The new names of parameters: of each by itself, or by the container it is in."""
        found = {}
        for name in names:
            parts = name.split(".") if isinstance(name, str) else []
            stems = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
            stem = next((stem for stem in stems if stem in self.rules.rename), None)
            if stem is not None:
                found[name] = self.rules.rename[stem] + name[len(stem) :]
                self.used.add(stem)
        return found

    def sequence(self, saved: Any, target: list[Any] | tuple[Any, ...], place: str, within: str | None) -> None:
        if not isinstance(saved, (list, tuple)):
            got = f"an object of type {type(saved).__name__} in the saved state"
            raise refuse(RoptimTypeError, _PLACE, place or "the whole", "a list", got)
        both = min(len(saved), len(target))
        new = [f"[{i}]" for i in range(both, len(target))]
        surplus = [f"[{i}]" for i in range(both, len(saved))]
        self.differences(new, surplus, place)
        self.initialised += [f"{place}{item}" for item in new]
        self.dropped += [f"{place}{item}" for item in surplus]
        for i in range(both):
            assign = _setter(target, i) if isinstance(target, list) else None
            self.through(saved[i], target[i], f"{place}[{i}]", _below(within, i), assign)

    def differences(self, new: list[str], surplus: list[str], place: str) -> None:
        """Refuses what the rules do not allow."""
        problems, remedies = [], []
        if new and not self.rules.init_missing:
            problems.append(f"none for {', '.join(new)}")
            remedies.append('missing="init" leaves it as it is')
        if surplus and not self.rules.drop_unexpected:
            problems.append(f"a surplus {', '.join(surplus)}")
            remedies.append('unexpected="drop" leaves it out')
        if len(problems) == 2:
            remedies.append('rename={"old": "new"} matches arrays and containers')
        if problems:
            where = f"the saved {place or 'tree'}"
            raise refuse(
                RoptimKeyError, _PLACE, where, "like the one to restore", " and ".join(problems), ", ".join(remedies)
            )

    def check_renames(self) -> None:
        unused = self.rules.rename.keys() - self.used
        if unused:
            got = ", ".join(map(repr, sorted(unused)))
            raise refuse(RoptimKeyError, _PLACE, "rename", "of names that the saved state has", got)

    def check_overlap(self) -> None:
        """Refuses arrays that share memory but were saved with different values there."""
        found = [(low, high, i) for i, (_, array, _) in enumerate(self.arrays) for low, high in [byte_bounds(array)]]
        before: list[tuple[int, int]] = []
        for low, high, i in sorted(found):
            before = [(end, j) for end, j in before if end > low]
            name, array, saved = self.arrays[i]
            if array.nbytes > high - low and not _holds_both((array, saved), (array, saved)):
                allowed = "without elements that share memory"
                raise refuse(RoptimValueError, _PLACE, name, allowed, "different values there")
            for _, j in before:
                other, earlier, value = self.arrays[j]
                if _share_memory(earlier, array) and not _holds_both((earlier, value), (array, saved)):
                    got = f"memory of {other}, with other values"
                    raise refuse(RoptimValueError, _PLACE, name, "memory of its own", got)
            before.append((high, i))

    def commit(self) -> None:
        with deferred(), ExitStack() as undo:
            # What cannot give its state back comes last.
            for name, target, saved in sorted(self.objects, key=lambda each: not hasattr(each[1], "state_dict")):
                if hasattr(target, "state_dict"):
                    _keep(undo, name, target)
                with _placed(name):
                    target.load_state_dict(saved)
            for assign, old, new in self.values:
                assign(new)
                undo.callback(_put_back, "a value", assign, old)
            for target, load_prepared in self.optimizers:
                # What was checked fails only with its device or memory; a copy is kept where another one went before.
                if len(self.optimizers) > 1:
                    _keep(undo, type(target).__name__, target)
                load_prepared()
            for write in self.writes:
                write()
            undo.pop_all()
        for target, _ in self.optimizers:
            target._after_load()


def _share_memory(a: Any, b: Any) -> bool:
    """Taken as true where NumPy finds the question too hard: then values are compared."""
    try:
        return np.shares_memory(a, b, max_work=1_000_000)  # type: ignore[arg-type]  # NumPy's stub knows two bounds
    except np.exceptions.TooHardError:
        return True


def _holds_both(first: tuple[Any, Any], second: tuple[Any, Any]) -> bool:
    """Whether two arrays that share memory can have these values at once: tried on other memory."""
    bounds = [byte_bounds(array) for array, _ in (first, second)]
    low, high = min(low for low, _ in bounds), max(high for _, high in bounds)
    memory = np.zeros(high - low, np.uint8)
    twins = []
    for array, saved in (first, second):
        at = array.__array_interface__["data"][0] - low
        twins.append((np.ndarray(array.shape, array.dtype, memory.data, at, array.strides), saved))
        twins[-1][0][...] = saved
    return all(twin.tobytes() == np.asarray(saved, twin.dtype).tobytes() for twin, saved in twins)


def _keep(undo: ExitStack, name: str, target: Any) -> None:
    """Has what an object is now put back, unless an interrupted step or a lost device has left nothing worth it."""
    with suppress(TornError, DeviceLostError):
        undo.callback(_put_back, name, target.load_state_dict, copy.deepcopy(target.state_dict()))


def _put_back(name: str, put: Callable[[Any], Any], old: Any) -> None:
    """One part of the undoing, which the others do not depend on."""
    undone_for = sys.exception()
    try:
        put(old)
    except Exception as error:
        # The error that everything is undone for goes on, and says so.
        if undone_for is not None:
            undone_for.add_note(f"{_PLACE}: {name} could not be put back: {error}")


@contextmanager
def _placed(name: str) -> Iterator[None]:
    """Says in errors which part of the whole they are of."""
    try:
        yield
    except RoptimError as error:
        raise type(error)(f"{_PLACE}: {name}: {error}") from error
    except Exception as error:
        error.add_note(f"{_PLACE}: of {name}")
        raise


def _below(within: str | None, key: Any) -> str:
    """The name of what is in a container, as optimizers name parameters."""
    return "" if within is None else f"{within}.{key}" if within else str(key)


def _setter(container: Any, key: Any) -> Callable[[Any], None]:
    return lambda value: container.__setitem__(key, value)


def _same(a: Any, b: Any) -> bool:
    """Whether two saved states are the same, NaN included."""
    if isinstance(a, np.ndarray) != isinstance(b, np.ndarray):
        return False
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, (np.ndarray, np.generic)) and isinstance(b, (np.ndarray, np.generic)):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    return bool(a == b) or (a != a and b != b)


def _is_average(target: Any) -> bool:
    module = sys.modules.get("roptim._averaging")
    return module is not None and isinstance(target, module.AveragedModel)


#: Kinds of plain values: one is not replaced by another.
_KINDS: dict[str, tuple[type, ...]] = {
    "numbers": (type(None), bool, int, float, np.generic, np.ndarray, list, tuple),
    "a string": (str,),
    "a dict": (Mapping,),
}


def _kind(value: Any) -> str | None:
    return next((kind for kind, types in _KINDS.items() if isinstance(value, types)), None)


def _set_generator(target: Any, state: Any) -> None:
    if isinstance(target, np.random.RandomState):
        target.set_state(state)
    else:
        (target.bit_generator if isinstance(target, np.random.Generator) else target).state = state


def _holds(target: Any, test: Callable[[Any], bool]) -> bool:
    """Whether this is such a thing, or a container with one in it."""
    if isinstance(target, Mapping):
        return any(_holds(item, test) for item in target.values())
    if isinstance(target, (list, tuple)):
        return any(_holds(item, test) for item in target)
    return test(target)


def _is_array(target: Any) -> bool:
    return isinstance(target, _ARRAYS)


def _is_object(target: Any) -> bool:
    """Whether it keeps a state of its own."""
    return _loads(target) or isinstance(target, _GENERATORS)


def _is_written_to(target: Any) -> bool:
    """Whether it is not replaced but written to."""
    return _is_array(target) or _is_object(target)


def _loads(target: Any) -> bool:
    """Whether an object takes a state."""
    return callable(getattr(target, "load_state_dict", None)) and not isinstance(target, type)
