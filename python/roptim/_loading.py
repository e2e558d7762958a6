"""Loading that explains itself: every check first, then a report of what was loaded, initialised, dropped, changed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from roptim import _roptim
from roptim._errors import RoptimKeyError, RoptimTypeError, RoptimValueError, printable, refuse, told, warn
from roptim._groups import SCHEDULER_KEYS, SWITCHES, check_switches, refuse_misspelling, settled, shown
from roptim._registry import classes_with
from roptim._scheduled import decoded, is_scheduled, refuse_schedules, value_at, values_at
from roptim._values import is_encodable

if TYPE_CHECKING:
    from roptim.optimizer import Optimizer

Missing = Literal["error", "init"]
Unexpected = Literal["error", "drop"]


@dataclass(frozen=True)
class LoadReport:
    """What a load did; ``print`` shows it.

    Attributes
    ----------
    loaded, initialised, dropped : tuple of str
        Parameters, arrays and objects that have what was saved, that the saved state lacks, and that only the saved
        state has: names, or ``"parameter 0"`` where there are none.
    hparams : dict
        Hyperparameters that are different now, as ``{"group 0: lr": (old, new)}``.
    converted_from : str or None
        The class whose state was converted, where it is another one.
    kept : tuple of str
        Hyperparameters that a conversion leaves as they are, since they mean something else in that class.
    step : int or None
        Of the checkpoint, where a :class:`~roptim.Checkpointer` found one.
    """

    loaded: tuple[str, ...] = ()
    initialised: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    hparams: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    converted_from: str | None = None
    step: int | None = None
    kept: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [] if self.step is None else [f"step {self.step}"]
        for title, names in (
            ("loaded", self.loaded),
            ("initialised (not in the saved state)", self.initialised),
            ("dropped (only in the saved state)", self.dropped),
        ):
            if names:
                lines.append(f"{title}: {', '.join(names)}")
        if self.converted_from is not None:
            lines.append(f"converted from {self.converted_from}")
        if self.kept:
            lines.append(f"kept (something else there): {', '.join(self.kept)}")
        lines += [f"{name}: {old!r} -> {new!r}" for name, (old, new) in self.hparams.items()]
        return printable("\n".join(lines)) or "nothing to load"


@dataclass(frozen=True)
class Rules:
    """What is done where a saved state differs: the arguments of a load, checked."""

    init_missing: bool
    drop_unexpected: bool
    rename: dict[str, str]
    keep_hparams: bool
    hparams: dict[str, Any]

    @property
    def matching(self) -> tuple[bool, bool, dict[str, str], bool]:
        """What the engine's matching of parameters goes by."""
        return self.init_missing, self.drop_unexpected, self.rename, self.keep_hparams

    @staticmethod
    def of(
        place: str,
        strict: bool,
        missing: str | None,
        unexpected: str | None,
        rename: Mapping[str, str] | None,
        hparams: str | Mapping[str, Any],
    ) -> Rules:
        """The rules that arguments ask for; an explicit one overrides ``strict``."""

        def chosen(name: str, given: str | None, gentle: str) -> bool:
            if given is not None and not (isinstance(given, str) and given in ("error", gentle)):
                raise refuse(RoptimValueError, place, name, f'"error" or "{gentle}"', told(given))
            return not strict if given is None else given == gentle

        rename = {} if rename is None else rename
        if not isinstance(rename, Mapping) or not all(isinstance(n, str) for pair in rename.items() for n in pair):
            raise refuse(RoptimTypeError, place, "rename", "a dict of names", told(rename))
        if not all(is_encodable(name) for pair in rename.items() for name in pair):
            raise refuse(RoptimValueError, place, "rename", "of text that UTF-8 can hold", told(rename))
        if not isinstance(hparams, Mapping) and not (isinstance(hparams, str) and hparams in ("file", "keep")):
            raise refuse(RoptimValueError, place, "hparams", '"file", "keep" or a dict of values', told(hparams))
        return Rules(
            init_missing=chosen("missing", missing, "init"),
            drop_unexpected=chosen("unexpected", unexpected, "drop"),
            rename=dict(rename),
            keep_hparams=isinstance(hparams, str) and hparams == "keep",
            hparams=dict(hparams) if isinstance(hparams, Mapping) else {},
        )


@dataclass(frozen=True)
class Prepared:
    """A load that passed every check and has changed nothing yet."""

    report: LoadReport
    commit: Callable[[], None]


def prepare(optimizer: Optimizer, state_dict: Any, rules: Rules, place: str) -> Prepared:
    """Checks a saved state against an optimizer."""
    if not isinstance(state_dict, Mapping):
        got = f"an object of type {type(state_dict).__name__}"
        raise refuse(RoptimTypeError, place, "state_dict", "a dict", got)
    for key in ("state", "param_groups"):
        if key not in state_dict:
            got = str(sorted(map(str, state_dict)))
            raise refuse(RoptimKeyError, place, "state_dict", f"a dict with {key!r}", got)
    groups = state_dict["param_groups"]
    if not isinstance(groups, (list, tuple)) or not all(isinstance(group, Mapping) for group in groups):
        raise refuse(RoptimTypeError, place, "param_groups", "a list of dicts", told(groups))
    if not isinstance(state_dict["state"], Mapping):
        got = f"an object of type {type(state_dict['state']).__name__}"
        raise refuse(RoptimTypeError, place, "state", "a dict", got)
    kind = _OfPython if optimizer._engine is None else _OfEngine
    return kind(optimizer, state_dict, rules, place).prepared()


class _Load:
    """What loads of both kinds of optimizers have in common: groups and their keys."""

    def __init__(self, optimizer: Optimizer, saved: Mapping[str, Any], rules: Rules, place: str) -> None:
        self.optimizer, self.saved, self.rules, self.place = optimizer, saved, rules, place
        self.fixed = optimizer._hypers | {"params", "param_names"}

    def labels(self, indices: Iterable[int]) -> tuple[str, ...]:
        names = self.optimizer._state._names
        return tuple(names[i] or f"parameter {i}" for i in indices)

    def dropped(self, found: Iterable[str]) -> tuple[str, ...]:
        named = any("param_names" in group for group in self.saved["param_groups"])
        return tuple(text if named else f"parameter {text}" for text in found)

    def keys_of_groups(self, origins: list[int | None]) -> list[dict[str, Any] | None]:
        """The user's own keys for each group, copied before anything changes; None where they stay.

        They are the file's, as in torch: those it lacks go.
        """
        keys: list[dict[str, Any] | None] = []
        for origin in origins:
            if origin is None or self.rules.keep_hparams:
                keys.append(None)
            else:
                group = self.saved["param_groups"][origin]
                keys.append({key: copy.deepcopy(value) for key, value in group.items() if key not in self.fixed})
        return keys

    def take_keys(self, all_keys: list[dict[str, Any] | None]) -> None:
        for group, keys in zip(self.optimizer.param_groups, all_keys, strict=True):
            if keys is not None:
                for key in [key for key in group if key not in self.fixed and key not in keys]:
                    dict.__delitem__(group, key)
                dict.update(group, keys)


class _OfEngine(_Load):
    """An optimizer of the engine."""

    def prepared(self) -> Prepared:
        optimizer, rules = self.optimizer, self.rules
        engine = optimizer._engine
        assert engine is not None
        about = self.saved.get("roptim")
        count = about.get("update_count", 0) if isinstance(about, Mapping) else 0
        self.count = count if isinstance(count, int) and 0 <= count < 2**64 else 0
        for key in rules.hparams:
            if key not in optimizer._hypers:
                allowed = f"of hyperparameters ({', '.join(sorted(optimizer._hypers))})"
                raise refuse(RoptimKeyError, self.place, "hparams", allowed, told(key))
        given = {key: settled(value) for key, value in rules.hparams.items()}
        loading = engine.prepare_load(
            self.engine_dict(),
            rules.matching,
            {key: plain(value_at(value, self.count)) for key, value in given.items()},
        )
        self.kept = loading.kept
        schedules = self.schedules(loading.groups, given)
        keys = self.keys_of_groups(loading.groups)
        loaded, initialised = loading.loaded
        changed = {
            f"group {index}: {name}": (old[name], new[name]) for index, old, new in loading.changed() for name in old
        }
        for index in {*optimizer._scheduled, *schedules}:
            mine, theirs = optimizer._scheduled.get(index, {}), schedules.get(index, {})
            for name in {**mine, **theirs}:
                old = mine.get(name, optimizer.param_groups[index][name])
                if name not in theirs:
                    # What the engine calls no change is the value that the group has now.
                    _, new = changed.get(f"group {index}: {name}", (None, optimizer.param_groups[index][name]))
                    changed[f"group {index}: {name}"] = (old, new)
                elif repr(old) != repr(theirs[name]):
                    changed[f"group {index}: {name}"] = (old, theirs[name])
                else:
                    changed.pop(f"group {index}: {name}", None)
        report = LoadReport(
            self.labels(loaded),
            self.labels(initialised),
            self.dropped(loading.dropped),
            changed,
            loading.converted_from,
            kept=tuple(name for name in self.kept if name not in given),
        )

        def commit() -> None:
            engine.load(loading)
            optimizer._scheduled.clear()
            optimizer._scheduled.update(schedules)
            optimizer._shown_at = None
            self.take_keys(keys)
            for index, (group, origin) in enumerate(zip(optimizer.param_groups, loading.groups, strict=True)):
                hypers = engine.hypers(index)
                source = group if origin is None or rules.keep_hparams else self.saved["param_groups"][origin]
                wished = {key: settled(value) for key, value in source.items() if key in optimizer._hypers}
                wished |= {key: value for key, value in given.items() if not is_scheduled(value)}
                same = {key: value for key, value in wished.items() if plain(value) == hypers[key]}
                dict.update(group, {**hypers, **shown(same, hypers)})
            optimizer._resumed = any("initial_lr" in group for group in optimizer.param_groups)
            if schedules:
                optimizer._show_schedules()

        return Prepared(report, commit)

    def engine_dict(self) -> dict[str, Any]:
        """The saved state in the types that the engine reads, without what is no business of its."""
        optimizer, saved = self.optimizer, self.saved
        known = self.fixed
        about = saved.get("roptim")
        # Of another class they are not misspelled, and the engine names the class.
        is_own = not isinstance(about, Mapping) or about.get("optimizer") == optimizer._engine_name
        groups = []
        for group in saved["param_groups"]:
            check_switches(self.place, **{key: group[key] for key in group if key in SWITCHES - known})
            for key in group:
                if "roptim" not in saved and key not in known and key not in SCHEDULER_KEYS:
                    others = classes_with(key)
                    if others:
                        got = f"a state with {key!r}, of {' or '.join(others)}"
                        raise refuse(RoptimValueError, self.place, "state_dict", f"of {optimizer._engine_name}", got)
                if is_own:
                    refuse_misspelling(self.place, key, optimizer._hypers)
            groups.append({key: plain(settled(value)) for key, value in group.items() if key in known})
        state = {
            index: {key: plain(value) for key, value in entry.items()} if isinstance(entry, Mapping) else entry
            for index, entry in saved["state"].items()
        }
        own: dict[str, Any] = {"state": state, "param_groups": groups}
        if isinstance(about, Mapping):
            own["roptim"] = {key: value for key, value in about.items() if key != "schedules"}
        return {**saved, **own}

    def schedules(self, origins: list[int | None], given: dict[str, Any]) -> dict[int, dict[str, Any]]:
        """The schedules after a load: those of the saved run, or, of one that knows none, this optimizer's."""
        optimizer, place = self.optimizer, self.place
        about = self.saved.get("roptim")
        loaded: dict[int, dict[str, Any]] = {}
        if self.rules.keep_hparams or not isinstance(about, Mapping):
            loaded = {index: dict(each) for index, each in optimizer._scheduled.items()}
        else:
            saved = about.get("schedules", {})
            fits = isinstance(saved, Mapping) and all(
                index in range(len(self.saved["param_groups"]))
                and isinstance(each, Mapping)
                and optimizer._hypers.issuperset(each)
                for index, each in saved.items()
            )
            if not fits:
                raise refuse(RoptimTypeError, place, "schedules", "a dict of hyperparameters by group", told(saved))
            for index, origin in enumerate(origins):
                mine = optimizer._scheduled.get(index, {})
                forms = saved.get(origin, {})
                loaded[index] = dict(mine) if origin is None else self.decoded(index, origin, mine, forms, given)
        for index in range(len(optimizer.param_groups)):
            each = {key: value for key, value in loaded.pop(index, {}).items() if key not in given}
            each |= {key: value for key, value in given.items() if is_scheduled(value)}
            if each:
                loaded[index] = each
        return loaded

    def decoded(
        self, index: int, origin: int, mine: Mapping[str, Any], forms: Mapping[str, Any], given: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The schedules of one saved group."""
        optimizer, place = self.optimizer, self.place
        # What means something else in another class is not given.
        group = {key: value for key, value in self.saved["param_groups"][origin].items() if key not in self.kept}
        forms = {key: form for key, form in forms.items() if key not in self.kept}
        values = {}
        for name in (name for name in mine if name not in forms and name not in given):
            if name not in group:
                # What is not given is kept, here as for numbers.
                values[name] = mine[name]
                continue
            warn(
                f"{place}: {name} of group {index} was no schedule in the saved run, whose value it takes; "
                "assign the schedule again to go on with it"
            )
        for key in (key for key in forms if key not in given):
            name = f"{key} of group {index}"
            values[key] = decoded(place, name, forms[key], mine.get(key))
            if not is_scheduled(values[key]):
                raise refuse(RoptimTypeError, place, name, "a schedule", told(values[key]))
        if values:
            # What the loaded group will have, with every check of a group.
            own = optimizer.param_groups[index]
            numbers = {key: group.get(key, own[key]) for key in optimizer._hypers}
            optimizer._check_group({**numbers, **values_at(values, self.count)})
        return values


class _OfPython(_Load):
    """An optimizer written in Python."""

    def prepared(self) -> Prepared:
        optimizer, rules, place = self.optimizer, self.rules, self.place
        own, about = type(optimizer).__name__, self.saved.get("roptim")
        if about is not None and (not isinstance(about, Mapping) or about.get("optimizer") != own):
            got = f"of {about.get('optimizer')}" if isinstance(about, Mapping) else told(about)
            raise refuse(RoptimValueError, place, "state", f"of {own}", got)
        sources, initialised, dropped, origins = _roptim.match_parameters(
            place,
            self.members(optimizer._numbered_groups()),
            self.members(self.saved["param_groups"]),
            rules.matching,
        )
        if isinstance(about, Mapping):
            self.check_facts(sources, about.get("parameters", {}))
        known = {i for group in self.saved["param_groups"] for i in group["params"]}
        for key, entry in self.saved["state"].items():
            if key not in known or not isinstance(entry, Mapping):
                got = f"{key!r}: {entry!r}"
                raise refuse(RoptimValueError, place, "state", "dicts of parameters in the groups", got)
        state = {
            here: copy.deepcopy(dict(self.saved["state"][there]))
            for here, there in sources.items()
            if there in self.saved["state"]
        }
        keys = self.keys_of_groups(origins)
        for key in rules.hparams:
            if key not in optimizer.defaults or key in self.fixed:
                allowed = f"of hyperparameters ({', '.join(sorted(optimizer.defaults))})"
                raise refuse(RoptimKeyError, place, "hparams", allowed, told(key))
        refuse_schedules(place, rules.hparams)
        changed = {}
        for index, (group, new) in enumerate(zip(optimizer.param_groups, keys, strict=True)):
            for name, value in {**(new or {}), **rules.hparams}.items():
                old = group.get(name)
                if repr(old) != repr(value):
                    changed[f"group {index}: {name}"] = (old, value)
        report = LoadReport(self.labels(sources), self.labels(initialised), self.dropped(dropped), changed)

        def commit() -> None:
            self.take_keys(keys)
            for group in optimizer.param_groups:
                group.update(rules.hparams)
            optimizer._state._own = state
            optimizer._resumed = any("initial_lr" in group for group in optimizer.param_groups)

        return Prepared(report, commit)

    def check_facts(self, sources: Mapping[int, int], facts: Any) -> None:
        """Refuses parameters of other shapes and dtypes, as the engine does."""
        for here, there in sources.items():
            saved = facts.get(there) if isinstance(facts, Mapping) else None
            if not isinstance(saved, Mapping):
                continue
            name = self.optimizer._state._names[here]
            label = here if name is None else f'"{name}"'
            of = f"parameter {label} in the saved state"
            own = self.optimizer._facts()[here]
            shape, dtype = saved.get("shape"), saved.get("dtype")
            if not isinstance(shape, (list, tuple)) or tuple(shape) != own["shape"]:
                raise refuse(RoptimValueError, self.place, f"shape of {of}", str(own["shape"]), str(shape))
            if dtype != own["dtype"]:
                raise refuse(RoptimTypeError, self.place, f"dtype of {of}", own["dtype"], str(dtype))

    def members(self, groups: Iterable[Mapping[str, Any]]) -> list[tuple[list[int], list[str] | None]]:
        members: list[tuple[list[int], list[str] | None]] = []
        for i, group in enumerate(groups):
            params, names = group.get("params"), group.get("param_names")
            counted = isinstance(params, (list, tuple)) and all(isinstance(k, (int, np.integer)) for k in params)
            if not counted or min(params or [0]) < 0:
                raise refuse(RoptimTypeError, self.place, f"params of group {i}", "a list of indices", told(params))
            if names is not None and not (isinstance(names, (list, tuple)) and all(isinstance(n, str) for n in names)):
                raise refuse(RoptimTypeError, self.place, f"param_names of group {i}", "a list of strings", told(names))
            members.append(([int(k) for k in params or ()], None if names is None else list(names)))
        return members


def plain(value: Any) -> Any:
    """An array of another library as NumPy's, in lists too; anything else as it is."""
    if isinstance(value, list):
        return [plain(item) for item in value]
    foreign = hasattr(value, "__array__") and not isinstance(value, (np.ndarray, np.generic))
    return np.asarray(value) if foreign else value
