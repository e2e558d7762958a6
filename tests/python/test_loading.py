"""Loading into optimizers: the right state in the right place and a report, or an error that changes nothing."""

from __future__ import annotations

import copy
import re
import warnings
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from helpers import Sign, fingerprint, step
from twins import ON_GPU, draw, f32

import roptim
from roptim import SGD, Adam, AdamW, Optimizer, Parameter, schedules
from roptim.optimizer import REGISTRY

TAKES = {"Adam": ("AdamW",), "AdamW": ("Adam",)}
OWN = ("weight_decay", "decoupled_weight_decay")


def trained(name: str, steps: int = 3, seed: int = 0, dtype: Any = np.float32, **kwargs: Any) -> tuple[Any, list[Any]]:
    """An optimizer of two groups of matrices after some steps."""
    rng = np.random.default_rng(seed)
    params = [draw(rng, shape, dtype) for shape in ((3, 2), (2, 2), (4, 3))]
    known = REGISTRY[name]["defaults"]
    usual = {"momentum": 0.9, "amsgrad": True, "weight_decay": 0.125, "centered": True}
    settings = {key: value for key, value in usual.items() if key in known} | kwargs
    # Those that take a closure have one vector, and so one learning rate.
    lr = {} if REGISTRY[name]["needs_closure"] else {"lr": 0.25}
    opt = getattr(roptim, name)([{"params": params[:2], "mine": [seed]}, {"params": params[2], **lr}], **settings)
    advance(opt, params, steps, seed)
    return opt, params


def advance(opt: Any, params: list[Any], steps: int = 1, seed: int = 0) -> None:
    rng = np.random.default_rng(seed + 100)
    for _ in range(steps):
        step(opt, [draw(rng, p.shape, p.dtype) for p in params])


def state_bytes(opt: Any) -> bytes:
    return fingerprint(opt.state_dict()["state"])


# ---- between classes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", list(REGISTRY))
def test_only_the_class_itself_and_declared_conversions_are_taken(source: str) -> None:
    theirs, values = trained(source)
    saved = theirs.state_dict()
    for name in REGISTRY:
        mine, params = trained(name, 2, seed=1, lr=0.5)
        before = fingerprint([mine, params])
        if name == source:
            report = mine.load_state_dict(saved)
            assert report.converted_from is None
            assert fingerprint(mine.state_dict()) == fingerprint(saved)
            for p, value in zip(params, values, strict=True):
                p[...] = value
            advance(mine, params, 2, seed=7)
            # The source goes on below, with each class anew.
            twin = copy.deepcopy((theirs, values))
            advance(*twin, 2, seed=7)
            assert fingerprint([mine.state_dict(), params]) == fingerprint([twin[0].state_dict(), twin[1]])
        elif source in TAKES.get(name, ()):
            report = mine.load_state_dict(saved)
            assert report.converted_from == source
            assert f"converted from {source}" in str(report)
            assert state_bytes(mine) == fingerprint(saved["state"])
        else:
            allowed = " or ".join((name, *TAKES.get(name, ())))
            message = f"{name}.load_state_dict: state must be of {allowed}, got of {source}"
            for options in ({}, {"strict": False}, {"hparams": "keep"}, {"hparams": {"lr": 0.5}, "strict": False}):
                with pytest.raises(roptim.RoptimValueError) as raised:
                    mine.load_state_dict(saved, **options)
                assert str(raised.value) == message
                assert fingerprint([mine, params]) == before
    assert fingerprint(saved) == fingerprint(theirs.state_dict()), "what is loaded is only read"


@pytest.mark.parametrize(("source", "name"), [("Adam", "AdamW"), ("AdamW", "Adam")])
def test_a_conversion_takes_the_moments_and_leaves_weight_decay(source: str, name: str) -> None:
    theirs, values = trained(source, weight_decay=0.5)
    theirs.param_groups[1]["weight_decay"] = 0.75
    saved = theirs.state_dict()
    mine, _ = trained(name, 2, seed=1, weight_decay=0.0625, eps=1e-3)
    mine.param_groups[1]["weight_decay"] = 0.03125
    report = mine.load_state_dict(saved)
    assert report.loaded == ("parameter 0", "parameter 1", "parameter 2")
    assert report.hparams == {f"group {g}: eps": (1e-3, 1e-8) for g in (0, 1)}
    assert [group["weight_decay"] for group in mine.param_groups] == [0.0625, 0.03125]
    assert all(group["decoupled_weight_decay"] is (name == "AdamW") for group in mine.param_groups)
    assert mine.update_count == 3
    # An optimizer of this class that always was one, with that state.
    native, params = trained(name, 0)
    own = copy.deepcopy(saved)
    own["roptim"]["optimizer"] = name
    for group, decay in zip(own["param_groups"], (0.0625, 0.03125), strict=True):
        group |= {"weight_decay": decay, "decoupled_weight_decay": name == "AdamW"}
    native.load_state_dict(own)
    others = [p.copy() for p in values]
    again = getattr(roptim, name)([{"params": others[:2]}, {"params": others[2]}], amsgrad=True)
    again.load_state_dict(mine.state_dict())
    for p, value in zip(params, values, strict=True):
        p[...] = value
    advance(native, params, 2, seed=7)
    advance(again, others, 2, seed=7)
    assert state_bytes(native) == state_bytes(again)
    assert fingerprint(params) == fingerprint(others)


@pytest.mark.parametrize(("source", "name"), [("Adam", "AdamW"), ("AdamW", "Adam")])
@pytest.mark.parametrize(
    ("given", "own"),
    [
        (schedules.cosine(7), 0.0625),
        (0.5, schedules.cosine(10, peak=0.5)),
        (schedules.cosine(7), schedules.cosine(10, peak=0.5)),
    ],
    ids=["theirs", "mine", "both"],
)
def test_a_conversion_leaves_a_schedule_of_weight_decay(source: str, name: str, given: Any, own: Any) -> None:
    theirs, _ = trained(source, weight_decay=given)
    mine, _ = trained(name, 0, weight_decay=own)
    report = mine.load_state_dict(theirs.state_dict())
    assert report.hparams == {}
    wanted = own if isinstance(own, float) else own(3)
    assert [group["weight_decay"] for group in mine.param_groups] == [wanted, wanted]
    about = mine.state_dict()["roptim"].get("schedules", {})
    assert about == ({} if isinstance(own, float) else {g: {"weight_decay": own.to_json()} for g in (0, 1)})


@pytest.mark.parametrize(
    "name",
    [
        "Adam",
        "AdamW",
    ],
)
def test_a_conversion_takes_schedules_of_the_rest(name: str) -> None:
    cosine = schedules.cosine(10)
    theirs, _ = trained("AdamW" if name == "Adam" else "Adam", lr=cosine, eps=0.5)
    theirs.param_groups[1]["lr"] = cosine
    mine, _ = trained(name, 0)
    mine.load_state_dict(theirs.state_dict())
    assert mine.state_dict()["roptim"]["schedules"] == {g: {"lr": cosine.to_json()} for g in (0, 1)}
    assert [group["lr"] for group in mine.param_groups] == [cosine(3)] * 2


def test_a_conversion_and_all_the_other_rules() -> None:
    a, b = f32(2), f32(3)
    source = AdamW({"old": a, "b": b}, weight_decay=0.5, lr=0.25)
    source.step({"old": f32(2), "b": f32(3)})
    mine = Adam({"new": f32(2), "c": f32(4)}, weight_decay=0.125)
    report = mine.load_state_dict(source.state_dict(), strict=False, rename={"old": "new"}, hparams={"eps": 0.5})
    assert report == roptim.LoadReport(
        loaded=("new",),
        initialised=("c",),
        dropped=("b",),
        hparams={"group 0: lr": (0.001, 0.25), "group 0: eps": (1e-08, 0.5)},
        converted_from="AdamW",
        kept=("weight_decay", "decoupled_weight_decay"),
    )
    assert str(report).splitlines() == [
        "loaded: new",
        "initialised (not in the saved state): c",
        "dropped (only in the saved state): b",
        "converted from AdamW",
        "kept (something else there): weight_decay, decoupled_weight_decay",
        "group 0: lr: 0.001 -> 0.25",
        "group 0: eps: 1e-08 -> 0.5",
    ]
    assert mine.param_groups[0]["weight_decay"] == 0.125
    # Asked for by name, it is given.
    mine.load_state_dict(source.state_dict(), strict=False, rename={"old": "new"}, hparams={"weight_decay": 0.75})
    assert mine.param_groups[0]["weight_decay"] == 0.75
    with pytest.raises(ValueError, match=r"AdamW.load_state_dict: group 0: decoupled_weight_decay must be True, got"):
        source.load_state_dict(source.state_dict(), hparams={"decoupled_weight_decay": False})


# ---- random differences against a model ---------------------------------------------------------------------


@dataclass(frozen=True)
class Param:
    name: str
    shape: tuple[int, ...]
    dtype: str
    origin: str | None = None  # what it is called in the saved run


@dataclass
class Group:
    params: list[Param]
    lr: float
    note: int | None = None


DTYPES = ["float32", "float64", "float16", "complex64"]
SETTINGS: dict[Any, dict[str, Any]] = {
    SGD: {"momentum": 0.5},
    Adam: {},
    roptim.RMSprop: {"momentum": 0.5},
    roptim.NAdam: {},
    roptim.ASGD: {},
    Sign: {},
}


def random_groups(rng: np.random.Generator) -> list[Group]:
    names = iter(rng.permutation(list("abcdefgh")))
    groups = []
    for _ in range(int(rng.integers(1, 4))):
        params = []
        for _ in range(int(rng.integers(1, 3))):
            name = str(next(names))
            shape = tuple(int(n) for n in rng.integers(0, 4, int(rng.integers(0, 3))))
            params.append(Param(name, shape, str(rng.choice(DTYPES, p=[0.7, 0.1, 0.1, 0.1])), name))
        note = int(rng.integers(9)) if rng.random() < 0.5 else None
        groups.append(Group(params, float(rng.integers(1, 99)) / 128, note))
    return groups


MUTATIONS = ["rename", "reorder", "reshape", "retype", "add", "drop", "move", "new group", "groups", "split", "merge"]


def mutated(groups: list[Group], kind: str, rng: np.random.Generator) -> list[Group]:
    """The groups with one difference; without parameters left in a group it goes, too."""
    groups = [replace(group, params=list(group.params)) for group in groups]
    g = int(rng.integers(len(groups)))
    params = groups[g].params
    i = int(rng.integers(len(params)))
    fresh = f"n{rng.integers(10**6)}"
    if kind == "rename":
        params[i] = replace(params[i], name=fresh)
    elif kind == "reorder":
        groups[g].params = [params[k] for k in rng.permutation(len(params))]
    elif kind == "reshape":
        params[i] = replace(params[i], shape=(*params[i].shape, 2))
    elif kind == "retype":
        params[i] = replace(params[i], dtype=DTYPES[DTYPES.index(params[i].dtype) - 1])
    elif kind == "add":
        params.insert(i, Param(fresh, (2,), "float32"))
    elif kind == "drop":
        del params[i]
    elif kind == "move":
        groups[int(rng.integers(len(groups)))].params.append(params.pop(i))
    elif kind == "new group":
        groups.insert(g, Group([Param(fresh, (2,), "float32")], 0.375, 5))
    elif kind == "groups":
        groups = [groups[k] for k in rng.permutation(len(groups))]
    elif kind == "split":
        groups.append(Group(params[i:], 0.0625))
        del params[i:]
    else:
        params += groups.pop(g - 1).params if len(groups) > 1 else []
    kept = [group for group in groups if group.params]
    return kept or [Group([Param(fresh, (2,), "float32")], 0.375)]


def built(cls: Any, groups: list[Group], named: bool, steps: int, rng: np.random.Generator) -> tuple[Any, list[Any]]:
    """An optimizer of these groups after steps in which some parameters have no gradient."""
    everything, given = [], []
    for group in groups:
        mine = {p.name: Parameter(draw(rng, p.shape, p.dtype)) for p in group.params}
        everything += mine.values()
        note = {} if group.note is None else {"note": group.note}
        given.append({"params": mine if named else list(mine.values()), "lr": group.lr, **note})
    opt = cls(given, **SETTINGS[cls])
    for _ in range(steps):
        for p in everything:
            p.grad = draw(rng, p.shape, p.dtype) if rng.random() < 0.7 else None
        opt.step()
    return opt, everything


@dataclass
class Case:
    cls: Any
    saved: list[Group]
    here: list[Group]
    saved_named: bool
    here_named: bool
    is_torchs: bool  # without what roptim says about itself
    options: dict[str, Any]


def random_case(rng: np.random.Generator) -> Case:
    saved = random_groups(rng)
    here = [replace(group, lr=group.lr / 2, note=None if rng.random() < 0.5 else 7) for group in saved]
    for kind in rng.choice(MUTATIONS, int(rng.integers(0, 4)), p=np.array([4, 4, 1, 1, 5, 5, 3, 3, 3, 2, 2]) / 33):
        here = mutated(here, str(kind), rng)
    cls = list(SETTINGS)[int(rng.integers(len(SETTINGS)))]
    named = rng.random() < 0.7
    options: dict[str, Any] = {}
    if rng.random() < 0.7:
        options["strict"] = bool(rng.random() < 0.2)
    if rng.random() < 0.3:
        options["missing"] = str(rng.choice(["error", "init"]))
    if rng.random() < 0.3:
        options["unexpected"] = str(rng.choice(["error", "drop"]))
    renamed = {p.origin: p.name for group in here for p in group.params if p.origin not in (None, p.name)}
    if renamed and rng.random() < 0.7:
        options["rename"] = renamed
    elif rng.random() < 0.1:
        names = [p.name for groups in (saved, here) for group in groups for p in group.params] + ["z"]
        options["rename"] = {str(rng.choice(names)): str(rng.choice(names))}
    if rng.random() < 0.6:
        wrong: list[Any] = [{"lr": -1.0}, {"lrs": 0.5}]
        hparams: list[Any] = ["file", *["keep"] * 8, {"lr": 0.625}, {}, *(wrong if cls is not Sign else wrong[1:])]
        options["hparams"] = hparams[int(rng.integers(len(hparams)))]
    # Where one side alone has names they go by position.
    return Case(cls, saved, here, named, named ^ (rng.random() < 0.1), cls is Adam and rng.random() < 0.3, options)


Problem = tuple[type[Exception], str]


def predicted(case: Case, state: dict[int, Any]) -> tuple[list[Problem], dict[int, int], list[int | None]]:
    """Every reason to refuse, what goes where (index here → saved), and the saved group of each here."""
    options = case.options
    strict = options.get("strict", True)
    init = options.get("missing", "error" if strict else "init") == "init"
    drop = options.get("unexpected", "error" if strict else "drop") == "drop"
    rename, hparams = options.get("rename", {}), options.get("hparams", "file")
    ours = [(g, p) for g, group in enumerate(case.here) for p in group.params]
    theirs = [(g, p) for g, group in enumerate(case.saved) for p in group.params]
    value, problems = roptim.RoptimValueError, list[Problem]()
    pairs: dict[int, int] = {}
    if case.saved_named and case.here_named:
        called = [rename.get(p.name, p.name) for _, p in theirs]
        here = [p.name for _, p in ours]
        for name in {name for name in called if called.count(name) > 1}:
            problems.append((value, f'names of the saved state must be different, got "{name}" twice'))
        for old, new in rename.items():
            if old not in [p.name for _, p in theirs]:
                problems.append((value, f'rename must be of names that the saved state has .*, got "{old}"'))
            if new not in here:
                problems.append((value, f'rename must be to names of parameters .*, got "{new}"'))
        missing = sorted(set(here) - set(called))
        surplus = sorted(set(called) - set(here))
        for names, allowed, what in ((missing, init, "none for "), (surplus, drop, "a surplus ")):
            if names and not allowed:
                shown = ", ".join(f'"{name}"' for name in names)
                problems.append((value, f"parameters of the saved state must be named .*{what}{shown}"))
        pairs = {i: called.index(name) for i, name in enumerate(here) if name in called}
    else:
        if rename:
            problems.append((value, "rename must be empty unless both sides have names, got one for "))

        def fits(want: int, got: int) -> bool:
            return got == want or (init if got < want else drop)

        if not fits(len(case.here), len(case.saved)):
            problems.append((value, f"number of parameter groups must be {len(case.here)}, got {len(case.saved)}"))
        for g, (mine, other) in enumerate(zip(case.here, case.saved, strict=False)):
            if not fits(len(mine.params), len(other.params)):
                counts = f"must be {len(mine.params)}, got {len(other.params)}"
                problems.append((value, f"number of parameters in group {g} {counts}"))
        numbers = [[i for i, (of, _) in enumerate(side) if of == g] for side in (ours, theirs) for g in range(9)]
        for mine_at, theirs_at in zip(numbers[:9], numbers[9:], strict=True):
            pairs |= dict(zip(mine_at, theirs_at, strict=False))
    origins: list[int | None] = []
    for g in range(len(case.here)):
        of = {theirs[j][0] for i, j in pairs.items() if ours[i][0] == g}
        origin = next(iter(of)) if len(of) == 1 and not of & set(origins) else None
        if of and origin is None and hparams != "keep":
            problems.append((value, "groups must be divided as in the saved state, got parameters of its group"))
        origins.append(origin)
    if hparams == {"lr": -1.0}:
        problems.append((value, "lr must be a finite number >= 0, got -1.0"))
    if hparams == {"lrs": 0.5}:
        problems.append((roptim.RoptimKeyError, "hparams must be of hyperparameters .*, got 'lrs'"))
    for i, j in pairs.items():
        mine_p, other_p = ours[i][1], theirs[j][1]
        label = f'parameter "{mine_p.name}"' if case.here_named else f"parameter {i}"
        shapes = f"{re.escape(str(mine_p.shape))}, got {re.escape(str(other_p.shape))}"
        if not case.is_torchs:
            if mine_p.shape != other_p.shape:
                problems.append((value, f"shape of {label} in the saved state must be {shapes}"))
            if mine_p.dtype != other_p.dtype:
                message = f"dtype of {label} in the saved state must be {mine_p.dtype}, got {other_p.dtype}"
                problems.append((roptim.RoptimTypeError, message))
        elif j in state:
            if mine_p.shape != other_p.shape:
                problems.append((value, f"exp_avg(_sq)? of {label} must be of shape {shapes}"))
            want, got = (p.dtype.replace("16", "32") for p in (mine_p, other_p))
            if want != got:
                problems.append((roptim.RoptimTypeError, f"exp_avg(_sq)? of {label} must be {want}, got {got}"))
    return problems, pairs, origins


def changed_groups(case: Case, before: Any, saved: Any, origins: list[int | None]) -> tuple[list[Any], dict[str, Any]]:
    """The options of the groups after a load, and the differences to report."""
    groups, changes = copy.deepcopy(before["param_groups"]), {}
    hparams = case.options.get("hparams", "file")
    for g, (group, origin) in enumerate(zip(groups, origins, strict=True)):
        old = dict(group)
        if hparams != "keep" and origin is not None:
            theirs = saved["param_groups"][origin]
            group |= {key: value for key, value in theirs.items() if key not in ("params", "param_names")}
            if "note" not in theirs:
                group.pop("note", None)
        if isinstance(hparams, dict):
            group |= hparams
        for key, value in group.items():
            # To optimizers written in Python any key may be a hyperparameter.
            if (key != "note" or case.cls is Sign) and old.get(key) != value:
                changes[f"group {g}: {key}"] = (old.get(key), value)
    return groups, changes


@pytest.mark.filterwarnings("ignore:.*no Parameter has a gradient")
@pytest.mark.parametrize("block", range(15))
def test_random_differences_do_what_a_model_says(block: int) -> None:
    outcomes = {"loaded": 0, "partly": 0, "refused": 0}
    for number in range(100):
        rng = np.random.default_rng([block, number])
        case = random_case(rng)
        source, _ = built(case.cls, case.saved, case.saved_named, int(rng.integers(4)), rng)
        target, params = built(case.cls, case.here, case.here_named, int(rng.integers(4)), rng)
        saved = source.state_dict()
        if case.is_torchs:
            del saved["roptim"]
        untouched, mine, before = fingerprint(saved), fingerprint([target, params]), target.state_dict()
        values = fingerprint(params)
        problems, pairs, origins = predicted(case, saved["state"])
        if problems:
            with pytest.raises(roptim.RoptimError, match=f"^{case.cls.__name__}.load_state_dict: ") as raised:
                target.load_state_dict(saved, **case.options)
            error = raised.value
            known = [isinstance(error, kind) and re.search(f": .*{text}", str(error)) for kind, text in problems]
            assert any(known), (case, problems, error)
            assert fingerprint([target, params]) == mine, (case, error)
            assert fingerprint(saved) == untouched
            outcomes["refused"] += 1
            continue
        report = target.load_state_dict(saved, **case.options)
        assert fingerprint(saved) == untouched
        assert fingerprint(params) == values, "a load writes no parameters"
        after = target.state_dict()
        groups, changes = changed_groups(case, before, saved, origins)
        assert after["param_groups"] == groups, case
        state = {i: saved["state"][j] for i, j in sorted(pairs.items()) if j in saved["state"]}
        assert fingerprint(after["state"]) == fingerprint(state), case
        if case.is_torchs:
            assert target.update_count == max((entry["step"] for entry in saved["state"].values()), default=0)
        else:
            steps = saved["roptim"].get("steps", {})
            want = before["roptim"] | {key: saved["roptim"].get(key) for key in ("update_count", "skip_count")}
            if "steps" in want:
                want["steps"] = {i: steps[j] for i, j in pairs.items() if j in steps}
            assert after["roptim"] == {key: value for key, value in want.items() if value is not None}, case
        ours = [p for group in case.here for p in group.params]
        theirs = [p for group in case.saved for p in group.params]
        labels = [p.name if case.here_named else f"parameter {i}" for i, p in enumerate(ours)]
        lost = [p.name if case.saved_named else f"parameter {j}" for j, p in enumerate(theirs)]
        assert report == roptim.LoadReport(
            loaded=tuple(labels[i] for i in sorted(pairs)),
            initialised=tuple(labels[i] for i in range(len(ours)) if i not in pairs),
            dropped=tuple(lost[j] for j in range(len(theirs)) if j not in pairs.values()),
            hparams=changes,
        ), case
        outcomes["partly" if report.initialised or report.dropped else "loaded"] += 1
        # And it can be stepped.
        for p in params:
            p.grad = np.zeros(p.shape, p.dtype)
        target.step()
    assert min(outcomes.values()) >= 8, outcomes


def test_many_names_are_cut_short() -> None:
    opt = SGD({f"p{i:02}": f32(1) for i in range(14)})
    with pytest.raises(ValueError, match=r'"p09" and 4 more, got none for "p00", .*"p09" and 4 more; missing="init"'):
        opt.load_state_dict({"state": {}, "param_groups": [{"params": [], "param_names": []}]})


def test_every_slot_must_fit(optimizer_class: Any) -> None:
    """A state that lies about itself: right facts, another array."""
    name = optimizer_class.__name__
    opt, params = trained(name)
    good = opt.state_dict()
    before = fingerprint([opt, params])
    checked = 0
    for i, entry in good["state"].items():
        for key, value in entry.items():
            if not isinstance(value, np.ndarray):
                continue
            wrong = [
                np.zeros((*value.shape, 2), value.dtype),
                value.astype(np.float64),
                value.astype(np.int32),
                value.astype(np.complex64),
                "text",
                3.5,
            ]
            for other in wrong:
                saved = copy.deepcopy(good)
                saved["state"][i][key] = other
                with pytest.raises(roptim.RoptimError) as raised:
                    opt.load_state_dict(saved)
                assert key in str(raised.value), (other, raised.value)
                # What all parameters share is of none of them.
                where = rf"of parameter {i} must be|state\[{i}\]\.{key} must be"
                assert re.search(where, str(raised.value)) or REGISTRY[name]["needs_closure"]
                assert fingerprint([opt, params]) == before
                checked += 1
    assert checked
    saved = copy.deepcopy(good)
    saved["state"][7] = saved["state"][0]
    with pytest.raises(roptim.RoptimError, match="state"):
        opt.load_state_dict(saved)
    assert fingerprint([opt, params]) == before


@pytest.mark.parametrize("here", ["float32", "float64", "float16", "complex64"])
@pytest.mark.parametrize("there", ["float32", "float64", "float16", "complex64"])
def test_the_dtype_of_state_follows_no_parameter(there: str, here: str) -> None:
    theirs, _ = trained("Adam", dtype=there)
    saved = theirs.state_dict()
    mine, params = trained("Adam", dtype=here)
    before = fingerprint([mine, params])
    if there == here:
        mine.load_state_dict(saved)
        assert state_bytes(mine) == fingerprint(saved["state"])
        return
    for options in ({}, {"strict": False}, {"hparams": "keep", "strict": False}):
        message = f"dtype of parameter 0 in the saved state must be {here}, got {there}"
        with pytest.raises(TypeError, match=message):
            mine.load_state_dict(saved, **options)
        assert fingerprint([mine, params]) == before


# ---- arguments ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: SGD({"a": f32(2)}), lambda: Sign({"a": f32(2)})], ids=["engine", "Python"])
@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"missing": "drop"}, ValueError, 'missing must be "error" or "init", got \'drop\''),
        ({"unexpected": "init"}, ValueError, 'unexpected must be "error" or "drop", got \'init\''),
        ({"missing": 3}, ValueError, 'missing must be "error" or "init", got 3'),
        ({"missing": np.zeros(2)}, ValueError, 'missing must be "error" or "init", got array([0., 0.])'),
        ({"hparams": np.zeros(2)}, ValueError, 'hparams must be "file", "keep" or a dict of values, got array('),
        ({"rename": ["a"]}, TypeError, "rename must be a dict of names, got"),
        ({"rename": {"a": 3}}, TypeError, "rename must be a dict of names, got"),
        ({"rename": {0: "a"}}, TypeError, "rename must be a dict of names, got"),
        ({"rename": {"z": "a"}}, ValueError, 'rename must be of names that the saved state has ("a"), got "z"'),
        ({"rename": {"a": "z"}}, ValueError, 'rename must be to names of parameters ("a"), got "z"'),
        ({"hparams": "mine"}, ValueError, 'hparams must be "file", "keep" or a dict of values, got \'mine\''),
        ({"hparams": None}, ValueError, 'hparams must be "file", "keep" or a dict of values, got None'),
        ({"hparams": {"lrr": 1}}, KeyError, "hparams must be of hyperparameters ("),
        ({"hparams": {"params": []}}, KeyError, "hparams must be of hyperparameters ("),
        ({"hparams": {"backend": "gpu"}}, KeyError, "hparams must be of hyperparameters ("),
        ({"hparams": {3: 1}}, KeyError, "hparams must be of hyperparameters ("),
    ],
)
def test_refused_arguments(make: Any, options: dict[str, Any], kind: type[Exception], message: str) -> None:
    opt = make()
    opt.param_groups[0]["mine"] = 1
    saved = opt.state_dict()
    saved["param_groups"][0] |= {"lr": 0.5, "mine": 2}
    before = fingerprint(opt)
    with pytest.raises(kind) as raised:
        opt.load_state_dict(saved, **options)
    assert isinstance(raised.value, roptim.RoptimError)
    assert str(raised.value).startswith(f"{type(opt).__name__}.load_state_dict: {message}")
    assert fingerprint(opt) == before


@pytest.mark.parametrize(
    ("hparams", "message"),
    [
        ({"lr": -1.0}, "lr must be a finite number >= 0, got -1.0"),
        ({"lr": float("nan")}, "lr must be a finite number >= 0, got NaN"),
        ({"lr": "fast"}, "lr must be a finite number >= 0, got"),
        ({"betas": (0.5, 1.0)}, "betas[1] must be a number in [0, 1), got 1.0"),
        ({"lr": 0.5, "eps": -1}, "eps must be a finite number >= 0, got -1"),
        ({"betas": (0.5, schedules.constant(3.0))}, "betas[1] must be a number in [0, 1), got 3.0"),
        ({"lr": schedules.constant(-1.0)}, "lr must be a finite number >= 0, got -1.0"),
        # At the count that is loaded; at 0 it is one.
        ({"lr": schedules.linear(0.5, -1.0, 3)}, "lr must be a finite number >= 0, got -1.0"),
        ({"amsgrad": lambda t: "yes"}, "amsgrad must be True or False, got"),
    ],
)
def test_refused_values_for_every_group(hparams: dict[str, Any], message: str) -> None:
    opt, params = trained("Adam")
    saved = opt.state_dict()
    saved["param_groups"][0] |= {"lr": 0.5, "mine": 2}
    saved["state"].clear()
    before = fingerprint([opt, params])
    with pytest.raises(roptim.RoptimError) as raised:
        opt.load_state_dict(saved, hparams=hparams)
    assert message in str(raised.value)
    assert str(raised.value).startswith("Adam.load_state_dict: ")
    assert fingerprint([opt, params]) == before


def test_values_for_every_group_are_read_at_once() -> None:
    opt, _ = trained("Adam")
    lr = np.array(0.5)
    report = opt.load_state_dict(opt.state_dict(), hparams={"lr": lr, "betas": [0.5, np.float32(0.75)], "eps": 1})
    lr[...] = 9
    assert [group["lr"] for group in opt.param_groups] == [0.5, 0.5]
    assert [group["betas"] for group in opt.param_groups] == [(0.5, 0.75)] * 2
    assert report.hparams["group 0: betas"] == ((0.9, 0.999), (0.5, 0.75))
    assert report.hparams["group 0: lr"] == (0.001, 0.5)
    assert report.hparams["group 1: lr"] == (0.25, 0.5)
    assert str(report).endswith("group 1: eps: 1e-08 -> 1.0")
    opt.param_groups[0]["lr"] = 0.125
    assert opt.load_state_dict(opt.state_dict()).hparams == {}


def test_reports_as_text() -> None:
    assert str(roptim.LoadReport()) == "nothing to load"
    assert str(roptim.LoadReport(step=3)) == "step 3"
    report = roptim.LoadReport(("a", "b"), ("c",), ("d",), {"group 0: lr": (0.1, 0.2)}, "Adam", 7)
    assert str(report).splitlines() == [
        "step 7",
        "loaded: a, b",
        "initialised (not in the saved state): c",
        "dropped (only in the saved state): d",
        "converted from Adam",
        "group 0: lr: 0.1 -> 0.2",
    ]
    opt = SGD([f32(1)])
    assert str(opt.load_state_dict(opt.state_dict())) == "loaded: parameter 0"


def test_groups_without_parameters() -> None:
    def made(lr: float) -> Any:
        return SGD([{"params": {"a": f32(2)}}, {"params": [], "lr": lr}])

    opt = made(0.5)
    assert opt.load_state_dict(made(0.25).state_dict()).hparams == {"group 1: lr": (0.5, 0.25)}
    assert opt.load_state_dict(SGD({"a": f32(2)}).state_dict()).hparams == {}
    assert opt.param_groups[1]["lr"] == 0.25


def test_keys_of_ones_own() -> None:
    for cls in (SGD, Sign):
        theirs = cls([{"params": [f32(1)], "kept": [1], "both": 1}, {"params": [f32(1)]}])
        saved = theirs.state_dict()

        def mine(cls: Any = cls) -> Any:
            return cls([{"params": [f32(1)], "both": 2}, {"params": [f32(1)], "only": 3}])

        opt = mine()
        opt.load_state_dict(saved)
        first, second = opt.param_groups
        assert (first["kept"], first["both"], "only" in second) == ([1], 1, False)
        saved["param_groups"][0]["kept"].append(2)
        assert first["kept"] == [1], "a copy"
        opt = mine()
        opt.load_state_dict(saved, hparams="keep")
        first, second = opt.param_groups
        assert ("kept" in first, first["both"], second["only"]) == (False, 2, 3)
        saved["param_groups"][0]["backend"] = "gpu"
        before = fingerprint(opt)
        if cls is SGD:
            with pytest.raises(KeyError, match="group key must be no option of the whole optimizer, got 'backend'"):
                opt.load_state_dict(saved)
            assert fingerprint(opt) == before


# ---- schedules ----------------------------------------------------------------------------------------------

COSINE, STEPS = schedules.cosine(10), schedules.step(2, 0.5)


def scheduled(opt: Any) -> dict[int, dict[str, Any]]:
    return opt.state_dict()["roptim"].get("schedules", {})  # type: ignore[no-any-return]  # of a state dict


def shown(opt: Any) -> list[Any]:
    return [group["lr"] for group in opt.param_groups]


@pytest.mark.parametrize(
    ("theirs", "mine", "hparams", "want", "report"),
    [
        (COSINE, 0.5, "file", COSINE, (0.5, COSINE)),
        (COSINE, STEPS, "file", COSINE, (STEPS, COSINE)),
        (COSINE, COSINE, "file", COSINE, None),
        (COSINE, STEPS, "keep", STEPS, None),
        (COSINE, 0.5, "keep", 0.5, None),
        (0.25, STEPS, "keep", STEPS, None),
        (0.25, 0.5, {"lr": COSINE}, COSINE, (0.5, COSINE)),
        (COSINE, 0.5, {"lr": STEPS}, STEPS, (0.5, STEPS)),
        (COSINE, STEPS, {"lr": 0.125}, 0.125, (STEPS, 0.125)),
        (COSINE, STEPS, {"momentum": 0.125}, COSINE, (STEPS, COSINE)),
    ],
)
def test_schedules(theirs: Any, mine: Any, hparams: Any, want: Any, report: Any) -> None:
    source, params = SGD([f32(2)], lr=theirs, momentum=0.25), [f32(2)]
    for _ in range(3):
        source.step([f32(2)])
    opt = SGD(params, lr=mine, momentum=0.25)
    for _ in range(3):
        # The groups show values for this very count already.
        opt.step([f32(2, value=0)])
    got = opt.load_state_dict(source.state_dict(), hparams=hparams).hparams.get("group 0: lr")
    assert repr(got) == repr(report)
    is_schedule = isinstance(want, schedules.Schedule)
    assert shown(opt) == [want(3) if is_schedule else want]
    assert scheduled(opt) == ({0: {"lr": want.to_json()}} if is_schedule else {})
    # The step that follows has it, bit for bit as an optimizer that always had.
    others = [p.copy() for p in params]
    twin = SGD(others, lr=want, momentum=opt.param_groups[0]["momentum"])
    twin.load_state_dict(source.state_dict(), hparams="keep")
    opt.step([f32(2)])
    twin.step([f32(2)])
    assert fingerprint(params) == fingerprint(others)
    assert shown(opt) == [want(4) if is_schedule else want]


def test_a_report_tells_a_schedule_from_its_value() -> None:
    source, opt = SGD([f32(2)], lr=COSINE(0)), SGD([f32(2)], lr=COSINE)
    with pytest.warns(UserWarning, match="was no schedule"):
        report = opt.load_state_dict(source.state_dict())
    assert repr(report.hparams) == repr({"group 0: lr": (COSINE, COSINE(0))})


def test_a_schedule_that_was_none_in_the_saved_run_ends_with_a_warning() -> None:
    opt = SGD([f32(2)], lr=COSINE)
    with pytest.warns(
        UserWarning, match=r"^SGD.load_state_dict: lr of group 0 was no schedule in the saved run"
    ) as said:
        report = opt.load_state_dict(SGD([f32(2)], lr=0.25).state_dict())
    assert [w.filename for w in said] == [__file__]
    assert repr(report.hparams) == repr({"group 0: lr": (COSINE, 0.25)})
    assert (shown(opt), scheduled(opt)) == ([0.25], {})
    # As an error it comes before anything is written.
    opt = SGD([f32(2)], lr=COSINE)
    before = fingerprint(opt)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="lr of group 0"):
            opt.load_state_dict(SGD([f32(2)], lr=0.25).state_dict())
    assert fingerprint(opt) == before


def test_functions_as_hyperparameters() -> None:
    def half(t: int) -> float:
        return 0.5 / (t + 1)

    source = SGD([f32(2)], lr=half)
    source.step([f32(2)])
    opt = SGD([f32(2)], lr=lambda t: 0.25 / (t + 1))
    opt.load_state_dict(source.state_dict())
    assert shown(opt) == [0.125], "one's own function stands for the saved one"
    opt = SGD([f32(2)], lr=0.75)
    before = fingerprint(opt)
    with pytest.raises(ValueError, match="lr of group 0 must be the function that it was in the saved run, got none"):
        opt.load_state_dict(source.state_dict())
    assert fingerprint(opt) == before
    opt.load_state_dict(source.state_dict(), hparams={"lr": half})
    assert shown(opt) == [0.25]
    opt = SGD([f32(2)], lr=0.75)
    opt.load_state_dict(source.state_dict(), hparams="keep")
    assert (shown(opt), opt.update_count) == ([0.75], 1)


def test_schedules_go_with_their_parameters() -> None:
    source = SGD([{"params": {"a": f32(1)}, "lr": COSINE}, {"params": {"b": f32(1)}, "lr": STEPS}])
    opt = SGD([{"params": {"c": f32(1)}, "lr": 0.5}, {"params": {"b": f32(1)}}, {"params": {"a": f32(1)}}])
    report = opt.load_state_dict(source.state_dict(), missing="init")
    assert scheduled(opt) == {1: {"lr": STEPS.to_json()}, 2: {"lr": COSINE.to_json()}}
    assert report.initialised == ("c",)
    assert shown(opt) == [0.5, STEPS(0), COSINE(0)]
    opt.param_groups[1]["lr"] = 0.25
    assert scheduled(opt) == {2: {"lr": COSINE.to_json()}}


def test_a_schedule_stays_where_the_saved_group_says_nothing() -> None:
    saved = SGD([f32(2)], lr=0.25).state_dict()
    del saved["param_groups"][0]["lr"]
    for state_dict in (saved, {key: value for key, value in saved.items() if key != "roptim"}):
        opt = SGD([f32(2)], lr=COSINE)
        assert opt.load_state_dict(state_dict).hparams == {}
        assert scheduled(opt) == {0: {"lr": COSINE.to_json()}}


def test_optimizers_written_in_python_take_no_schedules() -> None:
    opt = Sign([f32(2)])
    opt.param_groups[0]["mine"] = 1
    saved = opt.state_dict()
    saved["param_groups"][0]["mine"] = 2
    before = fingerprint(opt)
    with pytest.raises(TypeError, match=r"^Sign.load_state_dict: lr must be a value, got a schedule"):
        opt.load_state_dict(saved, hparams={"lr": COSINE})
    assert fingerprint(opt) == before


def test_the_order_of_schedules_is_that_of_the_saved_run() -> None:
    many = {"weight_decay": COSINE, "lr": STEPS, "momentum": schedules.constant(0.5), "dampening": COSINE}
    source = SGD([f32(2)], **many)
    opt = SGD([f32(2)], **dict(reversed(many.items())))
    assert list(scheduled(source)[0]) == list(REGISTRY["SGD"]["defaults"])[:4]
    opt.load_state_dict(source.state_dict())
    assert list(scheduled(opt)[0]) == list(scheduled(source)[0])


def test_indices_may_be_any() -> None:
    opt, params = trained("Adam")
    saved = opt.state_dict()
    del saved["roptim"]
    other = {7: 0, 3: 1, 5: 2}
    saved["param_groups"][0]["params"], saved["param_groups"][1]["params"] = [7, 3], [5]
    saved["state"] = {index: saved["state"][own] for index, own in other.items()}
    again = Adam([{"params": [f32(3, 2), f32(2, 2)]}, {"params": f32(4, 3)}])
    assert again.load_state_dict(saved).loaded == ("parameter 0", "parameter 1", "parameter 2")
    assert state_bytes(again) == state_bytes(opt)
    assert len(params) == 3


@pytest.mark.parametrize(
    "damage",
    [
        3,
        {5: {"lr": COSINE.to_json()}},
        {0: 3},
        {0: {"lrs": COSINE.to_json()}},
        {0: {"lr": 3.5}},
        {0: {"lr": "nonsense"}},
        {0: {"lr": '{"a": 1}'}},
        {0: {"lr": [COSINE.to_json(), 1.0]}},
        {0: {"lr": schedules.constant(-1.0).to_json()}},
        {0: {"lr": f32(1)}},
    ],
    ids=str,
)
def test_damaged_schedules(damage: Any) -> None:
    opt, params = trained("SGD", lr=COSINE)
    saved = opt.state_dict()
    saved["param_groups"][0]["mine"] = "theirs"
    saved["state"].clear()
    saved["roptim"]["schedules"] = damage
    before = fingerprint([opt, params])
    with pytest.raises(roptim.RoptimError):
        opt.load_state_dict(saved)
    assert fingerprint([opt, params]) == before


# ---- optimizers with more to say -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["LBFGS", "ConjugateGradient"])
def test_a_state_that_all_parameters_share_is_not_divided(name: str) -> None:
    cls = getattr(roptim, name)

    def made(names: str) -> Any:
        params = {key: np.arange(1.0, 4.0) for key in names}
        opt = cls(params)
        for _ in range(2):
            opt.step(lambda: (sum(float(p @ p) for p in params.values()), {k: 2 * p for k, p in params.items()}))
        return opt

    source = made("ab").state_dict()
    for names, got in (("a", "0 new and 1 left out"), ("abc", "1 new and 0 left out"), ("ac", "1 new and 1 left out")):
        opt = made(names)
        before = fingerprint(opt)
        with pytest.raises(ValueError) as raised:  # noqa: PT011  # the whole message is compared
            opt.load_state_dict(source, strict=False)
        assert str(raised.value) == (
            f"{name}.load_state_dict: parameters must be all those of the saved state, which share it, got {got}"
        )
        assert fingerprint(opt) == before
    # In another order, each part of the vector goes with its parameter.
    opt = made("ba")
    opt.load_state_dict(source)
    again = made("ab")
    again.load_state_dict(opt.state_dict())
    assert state_bytes(again) == fingerprint(source["state"])
    renamed = made("ac")
    renamed.load_state_dict(source, rename={"b": "c"})
    assert state_bytes(renamed) == fingerprint(source["state"])


@pytest.mark.parametrize("name", ["Adafactor", "Muon"])
def test_tensor_optimizers_load_in_part(name: str) -> None:
    cls = getattr(roptim, name)
    rng = np.random.default_rng(0)

    def made(**shapes: tuple[int, ...]) -> Any:
        params = {key: draw(rng, shape) for key, shape in shapes.items()}
        opt = cls(params)
        opt.step({key: draw(rng, p.shape) for key, p in params.items()})
        return opt

    source = made(a=(3, 2), b=(2, 5)).state_dict()
    opt = made(c=(4, 4), b=(2, 5))
    report = opt.load_state_dict(source, strict=False)
    assert (report.loaded, report.initialised, report.dropped) == (("b",), ("c",), ("a",))
    assert fingerprint(opt.state_dict()["state"]) == fingerprint({1: source["state"][1]})
    for turned in ((2, 3), (6, 1), (1, 6)):
        opt = made(a=turned, b=(2, 5))
        before = fingerprint(opt)
        message = re.escape(f'shape of parameter "a" in the saved state must be {turned}, got (3, 2)')
        with pytest.raises(ValueError, match=message):
            opt.load_state_dict(source, strict=False)
        assert fingerprint(opt) == before


def test_hooks_see_what_is_loaded() -> None:
    for cls in (SGD, Sign):
        opt = cls({"a": f32(2)})
        saved = opt.state_dict()
        said: list[Any] = []

        def swapped(opt: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
            return {**state, "param_groups": [{**group, "lr": 0.75} for group in state["param_groups"]]}

        opt.register_load_state_dict_pre_hook(swapped)
        opt.register_load_state_dict_post_hook(lambda opt, said=said: said.append(opt.param_groups[0]["lr"]))
        report = opt.load_state_dict(saved)
        assert said == [0.75]
        assert report.hparams["group 0: lr"][1] == 0.75
        with pytest.raises(roptim.RoptimError):
            opt.load_state_dict(saved, rename={"z": "a"})
        assert said == [0.75], "not after a refused load"


def test_what_python_optimizers_keep_is_copied_and_checked() -> None:
    a = Parameter(f32(2))
    opt = Sign({"a": a})
    a.grad = f32(2)
    opt.step()
    saved = opt.state_dict()
    mine = Sign({"a": Parameter(f32(2))})
    mine.load_state_dict(saved)
    saved["state"][0]["sum"][...] = 9
    assert mine.state["a"]["sum"].tolist() == [1, 1]
    old = opt.state_dict()
    del old["roptim"]["parameters"]
    mine.load_state_dict(old)
    for damage in (
        {**old, "roptim": 3},
        {**old, "roptim": {}},
        {**old, "state": {5: {}}},
        {**old, "state": {0: 3}},
        {**old, "param_groups": [{"params": ["a"]}]},
        {**old, "param_groups": [{"params": [0], "param_names": [3]}]},
        {**old, "param_groups": [{"params": [0], "param_names": ["a", "b"]}]},
        {**old, "param_groups": [{"params": [0, 0]}]},
        {**old, "roptim": {**old["roptim"], "parameters": {0: {"dtype": "float32"}}}},
        {**old, "roptim": {**old["roptim"], "parameters": {0: {"shape": (2,), "dtype": "int8"}}}},
    ):
        before = fingerprint(mine)
        with pytest.raises(roptim.RoptimError, match=r"^Sign.load_state_dict: "):
            mine.load_state_dict(damage)
        assert fingerprint(mine) == before


# ---- on a GPU -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adafactor", "Muon", "LBFGS"])
def test_the_same_on_a_gpu(gpu: str, name: str) -> None:
    cls = getattr(roptim, name)
    rng = np.random.default_rng(0)
    known = {key: 0.5 for key in ("momentum",) if key in REGISTRY[name]["defaults"]}

    def made(names: str, **options: Any) -> tuple[Any, Any]:
        params = {key: Parameter(draw(rng, (2, 3))) for key in names}
        opt = cls(params, **known, **options)
        gradients = {key: draw(rng, (2, 3)) for key in names}
        opt.step(lambda: (1.0, gradients)) if name == "LBFGS" else opt.step(gradients)
        return opt, params

    source = made("ab", **ON_GPU)[0].state_dict()
    opt, params = made("cb", **ON_GPU)
    before = fingerprint([opt, params])
    with pytest.raises(ValueError, match='got none for "c" and a surplus "a"'):
        opt.load_state_dict(source)
    assert fingerprint([opt, params]) == before
    if name != "LBFGS":
        report = opt.load_state_dict(source, strict=False, hparams={"lr": 0.5})
        assert (report.loaded, report.initialised, report.dropped) == (("b",), ("c",), ("a",))
        assert state_bytes(opt) == fingerprint({1: source["state"][1]})
    opt.load_state_dict(source, rename={"a": "c"})
    assert state_bytes(opt) == fingerprint(source["state"])
    here, _ = made("ab")
    here.load_state_dict(opt.state_dict(), rename={"c": "a"})
    assert state_bytes(here) == fingerprint(source["state"]), "and back on the CPU"
    if name in TAKES:
        other, _ = made("ab", **ON_GPU)
        twin = getattr(roptim, TAKES[name][0])({key: Parameter(f32(2, 3)) for key in "ab"}, **ON_GPU)
        assert twin.load_state_dict(other.state_dict()).converted_from == name
        assert state_bytes(twin) == state_bytes(other)
