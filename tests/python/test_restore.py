"""Whole runs brought back: everything or nothing, with the place in every message, and no code from a file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import Sign, fingerprint
from twins import ON_GPU, draw, f32

import roptim
from roptim import SGD, Adam, AdamW, Parameter, _restore, lr_scheduler, schedules
from roptim.swa_utils import AveragedModel, get_ema_avg_fn

BIT_GENERATORS = ["MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64"]


class Meter:
    """A user's own object, which keeps what it is given."""

    def __init__(self, seed: int) -> None:
        self.history: Any = [float(seed)]
        self.best: Any = f32(2, value=seed)
        self.loads = 0

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history, "best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loads += 1
        self.history = state["history"]
        self.best = state["best"]


def made(seed: int, names: str = "wb") -> dict[str, Any]:
    """A run with a part of every kind, not yet advanced."""
    rng = np.random.default_rng(seed)
    first, second = names
    model = {
        "encoder": {first: draw(rng, (3, 2)), second: Parameter(draw(rng, (2,)))},
        "layers": [draw(rng, (2, 2)), {"scale": draw(rng, (), np.float64)}],
    }
    rest = [draw(rng, (4,), np.float16), (Parameter(draw(rng, (1, 3), np.complex64)), draw(rng, (0, 2)))]
    opt = AdamW(model, lr=0.25, clip_norm=1.0, nonfinite="skip")
    sgd = SGD(rest, lr=schedules.cosine(20, peak=0.5), momentum=0.5)
    sign = Sign([Parameter(draw(rng, (2,)))], lr=0.5)
    return {
        "model": model,
        "rest": rest,
        "optimizers": {"main": opt, "others": [sgd, sign]},
        "signed": list(sign.param_groups[0]["params"]),
        "scheduler": lr_scheduler.CosineAnnealingLR(opt, 20),
        "average": AveragedModel(model, avg_fn=get_ema_avg_fn(0.5)),
        "rng": np.random.default_rng(seed),
        "old rng": np.random.RandomState(seed),
        "bits": [getattr(np.random, name)(seed) for name in BIT_GENERATORS],
        "meter": Meter(seed),
        "epoch": seed,
        "settings": {"name": f"run {seed}", "sizes": (seed, 2.5), "none": None, "huge": 2**70 + seed},
        "empty": [{}, [], ()],
        "mixed": [seed, f32(2, value=seed), "text"],
    }


def advance(run: dict[str, Any], steps: int) -> None:
    rng = run["rng"]
    main, (sgd, sign) = run["optimizers"]["main"], run["optimizers"]["others"]
    for _ in range(steps):
        for opt in (main, sgd):
            gradients = [draw(rng, p.shape, p.dtype) for p in opt.param_groups[0]["params"]]
            if rng.random() < 0.3:
                gradients[0][...] = np.nan
            if opt is main:
                (encoder, layers), (w, b, l0, scale) = run["model"].values(), gradients
                opt.step({"encoder": dict(zip(encoder, (w, b), strict=True)), "layers": [l0, {"scale": scale}]})
                assert len(layers) == 2
            else:
                opt.step([gradients[0], (gradients[1], gradients[2])])
        for p in run["signed"]:
            p.grad = draw(rng, p.shape)
        sign.step()
        run["scheduler"].step()
        run["average"].update_parameters(run["model"])
        run["old rng"].standard_normal()
        for bits in run["bits"]:
            bits.random_raw()
        run["meter"].history.append(rng.random())
        run["meter"].best = run["meter"].best + 1
        run["epoch"] += 1
        run["settings"]["sizes"] = (run["epoch"], rng.random())
        run["empty"][1].append(run["epoch"])
        run["mixed"][0] += 1


def file_of(tmp_path: Path, run: Any, name: str = "run.ckpt") -> Path:
    roptim.save(run, tmp_path / name)
    return tmp_path / name


# ---- whole runs ---------------------------------------------------------------------------------------------


def test_a_whole_run_goes_on_in_new_objects(tmp_path: Path) -> None:
    run = made(1)
    advance(run, 4)
    path = file_of(tmp_path, run)
    again, other = made(2), made(3)
    advance(other, 3)
    for target, source in ((again, path), (other, roptim.load(path))):
        report = roptim.restore(source, target)
        assert (report.initialised, report.dropped) == ((), ())
        assert {"model.encoder.w", "rest[1][0]", "optimizers.others[0]: parameter 0", "epoch", "bits[4]"} <= {
            *report.loaded
        }
        assert fingerprint(target) == fingerprint(run)
    for each in (run, again, other):
        advance(each, 4)
    assert fingerprint(again) == fingerprint(run)
    assert fingerprint(other) == fingerprint(run)
    assert run["epoch"] == 9


def test_arrays_and_objects_stay_the_same_ones(tmp_path: Path) -> None:
    run = made(1)
    path = file_of(tmp_path, run)
    target = made(2)
    w, b, opt, rng = (*target["model"]["encoder"].values(), target["optimizers"]["main"], target["rng"])
    roptim.restore(path, target)
    assert target["model"]["encoder"]["w"] is w
    assert target["model"]["encoder"]["b"] is b
    assert target["optimizers"]["main"] is opt
    assert target["rng"] is rng
    assert opt.param_groups[0]["params"][0] is w


def test_nothing_is_shared_with_a_tree(tmp_path: Path) -> None:
    run = made(1)
    advance(run, 2)
    tree = roptim.load(file_of(tmp_path, run))
    before = fingerprint(tree)
    target = made(2)
    roptim.restore(tree, target)
    assert fingerprint(tree) == before
    target["meter"].best[...] = 77
    target["meter"].history.append(77)
    target["mixed"][1][...] = 77
    target["empty"][1].append(77)
    target["settings"]["name"] = 77
    target["average"].module["encoder"]["w"][...] = 77
    target["optimizers"]["others"][1].state[0]["sum"][...] = 77
    target["optimizers"]["main"].state[0]["exp_avg"][...] = 77
    advance(target, 3)
    assert fingerprint(tree) == before


@pytest.mark.parametrize(
    ("saved", "into"),
    [
        ({"epoch": 3, "more": {"a": [1, 2]}}, {"epoch": 0, "more": {"a": []}}),
        ([3, "x", None], [0, "", 5]),
        ({}, {}),
        ([], []),
        ({1: f32(2), "1": 7}, {1: f32(2, value=0), "1": 0}),
        ({"a": {"deep": (1, [2, {}])}}, {"a": None}),
        ({"a": np.float32(3)}, {"a": np.zeros((), np.float32)}),
        ([(f32(1), f32(2))], [(f32(1, value=0), f32(2, value=0))]),
        ({"a": np.zeros((0, 3)), "b": []}, {"a": np.ones((0, 3)), "b": [1]}),
    ],
    ids=str,
)
def test_small_trees(tmp_path: Path, saved: Any, into: Any) -> None:
    tree = roptim.load(file_of(tmp_path, saved))
    report = roptim.restore(tree, into)
    want = np.asarray(saved["a"]) if isinstance(saved, dict) and isinstance(saved.get("a"), np.float32) else None
    assert fingerprint(into) == fingerprint({"a": want} if want is not None else saved)
    assert not report.initialised


def test_one_array_or_object_alone(tmp_path: Path) -> None:
    a = f32(3, value=0)
    assert roptim.restore(file_of(tmp_path, f32(3)), a).loaded == ("the whole",)
    assert a.tolist() == [1, 1, 1]
    rng, twin = np.random.default_rng(1), np.random.default_rng(2)
    roptim.restore(file_of(tmp_path, rng), twin)
    assert rng.random() == twin.random()
    opt = SGD([f32(1)], lr=0.5)
    report = roptim.restore(file_of(tmp_path, SGD([f32(1)], lr=0.25)), opt)
    assert report.hparams == {"the whole: group 0: lr": (0.5, 0.25)}
    with pytest.raises(TypeError, match=r"^roptim.restore: the whole must be an array, an object with load_state_dict"):
        roptim.restore(3, 4)
    with pytest.raises(roptim.CheckpointIOError, match="No such file"):
        roptim.restore(tmp_path / "none", {})


@pytest.mark.parametrize("name", BIT_GENERATORS)
def test_generators(tmp_path: Path, name: str) -> None:
    bits = getattr(np.random, name)
    run = {"a": np.random.Generator(bits(1)), "b": bits(2)}
    run["a"].integers(9, dtype=np.uint8, size=3)  # leaves half a word over
    again = {"a": np.random.Generator(bits(3)), "b": bits(4)}
    path = file_of(tmp_path, run)
    roptim.restore(path, again)
    assert fingerprint(again) == fingerprint(run)
    assert np.array_equal(run["a"].integers(9, size=50), again["a"].integers(9, size=50))
    other = "SFC64" if name != "SFC64" else "PCG64"
    into = {"a": np.random.Generator(getattr(np.random, other)(3)), "b": bits(4)}
    before = fingerprint(into)
    message = f"^roptim.restore: a must be the state of a {other} generator, got '{name}'$"
    with pytest.raises(TypeError, match=message):
        roptim.restore(path, into)
    assert fingerprint(into) == before


# ---- everything or nothing ----------------------------------------------------------------------------------


class Frozen(dict[str, Any]):
    def __setitem__(self, key: str, value: Any) -> None:
        raise RuntimeError("frozen")


class Stubborn(Meter):
    """Loads half of what it is given the first time, and then raises; what it had before it takes."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history = state["history"]
        if self.loads == 0:
            self.loads += 1
            raise RuntimeError("stubborn")
        self.best = state["best"]


class Own(SGD):
    def load_state_dict(self, state_dict: Any, **rules: Any) -> Any:
        if state_dict["param_groups"][0]["lr"] == 0.75:
            raise RuntimeError("own")
        return super().load_state_dict(state_dict, **rules)


def path_set(*path: Any, to: Any) -> Callable[[Any, Any], None]:
    """Changes a saved tree."""

    def change(saved: Any, run: Any) -> None:
        for key in path[:-1]:
            saved = saved[key]
        saved[path[-1]] = to

    return change


def in_run(key: str, value: Any) -> Callable[[Any, Any], None]:
    """Another target for what was saved."""

    def change(saved: Any, run: Any) -> None:
        run[key] = value()

    return change


def both(key: str, saved_value: Any, value: Callable[[], Any]) -> Callable[[Any, Any], None]:
    def change(saved: Any, run: Any) -> None:
        saved[key], run[key] = saved_value, value()

    return change


def read_only(saved: Any, run: Any) -> None:
    run["model"]["layers"][0].flags.writeable = False


def dropped(*path: Any) -> Callable[[Any, Any], None]:
    def change(saved: Any, run: Any) -> None:
        for key in path[:-1]:
            saved = saved[key]
        del saved[path[-1]]

    return change


GENERATOR = {"bit_generator": "PCG64", "state": {"state": -1, "inc": 1}, "has_uint32": 0, "uinteger": 0}
FAILURES: dict[str, tuple[Callable[[Any, Any], None], str]] = {
    "shape": (
        path_set("model", "layers", 1, "scale", to=np.zeros(2)),
        r"model.layers\[1\].scale must be a float64 array of shape \(\), got one of shape \(2,\) in the saved state",
    ),
    "dtype": (
        path_set("rest", 0, to=f32(4)),
        r"rest\[0\] must be a float16 array of shape \(4,\), got float32 in the saved state; cast one of them",
    ),
    "kind": (path_set("rest", 0, to="x"), r"rest\[0\] must be a float16 array of shape \(4,\), got an object of type"),
    "a Parameter": (
        path_set("model", "encoder", "b", to=f32(3)),
        r"model.encoder.b must be a float32 array of shape \(2,\), got one of shape \(3,\)",
    ),
    "read only": (read_only, r"model.layers\[0\] must be writeable, got a read-only array"),
    "no dict": (path_set("model", to=[1]), "model must be a dict, got an object of type list in the saved state"),
    "no list": (path_set("rest", to={}), "rest must be a list, got an object of type dict in the saved state"),
    "class": (
        path_set("optimizers", "main", "roptim", "optimizer", to="RAdam"),
        "optimizers.main: AdamW.load_state_dict: state must be of AdamW or Adam, got of RAdam",
    ),
    "Python's class": (
        path_set("optimizers", "others", 1, "roptim", "optimizer", to="SGD"),
        r"optimizers.others\[1\]: Sign.load_state_dict: state must be of Sign, got of SGD",
    ),
    "slot": (
        path_set("optimizers", "others", 0, "state", 0, "momentum_buffer", to=f32(5)),
        r"^roptim.restore: optimizers.others\[0\]: SGD.load_state_dict: momentum_buffer of parameter 0 must",
    ),
    "names": (
        path_set("optimizers", "main", "param_groups", 0, "param_names", to=[["x"]]),
        "^roptim.restore: optimizers.main: .*param_names",
    ),
    "no names": (
        path_set("optimizers", "main", "param_groups", 0, "param_names", to=3),
        "^roptim.restore: optimizers.main: .*param_names",
    ),
    "no state": (
        path_set("optimizers", "main", to=3),
        "optimizers.main: AdamW.load_state_dict: state_dict must be a dict, got",
    ),
    "lr": (path_set("optimizers", "main", "param_groups", 0, "lr", to=-1.0), "lr must be a finite number >= 0"),
    "scheduler": (
        path_set("scheduler", "last_epoch", to="x"),
        "^roptim.restore: scheduler: CosineAnnealingLR.load_state_dict: last_epoch must be",
    ),
    "average": (
        path_set("average", "module", to=[f32(2)]),
        "restore: average: AveragedModel.load_state_dict: number of averages must be 4, got 1",
    ),
    "generator": (path_set("rng", "bit_generator", to="MT19937"), "rng must be the state of a PCG64 generator, got"),
    "generator's state": (path_set("rng", to=GENERATOR), "rng must be the state of a PCG64 generator, got one that"),
    "old generator": (path_set("old rng", "state", to={}), "old rng must be the state of a MT19937 generator"),
    "bits": (path_set("bits", 2, to=None), r"bits\[2\] must be the state of a PCG64DXSM generator, got None"),
    "an object": (in_run("meter", lambda: Stubborn(9)), "^stubborn\nroptim.restore: of meter$"),
    "an object's state": (path_set("meter", to={}), "^'history'\nroptim.restore: of meter$"),
    "a frozen dict": (
        in_run("settings", lambda: Frozen(made(2)["settings"], a=f32(1))),
        "the saved settings must be like",
    ),
    "a setter": (both("more", {"a": f32(1), "b": 1}, lambda: Frozen(a=f32(1, value=0), b=0)), "^frozen$"),
    "a value in a tuple": (
        both("more", [f32(1), 1], lambda: (f32(1, value=0), 0)),
        r"more\[1\] must be an array, an object with load_state_dict, or a value in a list or dict, got an object of",
    ),
    "no value": (
        both("more", {"a": f32(1), "b": 1}, lambda: types.MappingProxyType({"a": f32(1), "b": 0})),
        "more.b must be an array, an object with load_state_dict, or a value in",
    ),
    "an optimizer's own load": (
        both("more", SGD([f32(1)], lr=0.75).state_dict(), lambda: Own([f32(1)], lr=0.5)),
        "^own\nroptim.restore: of more$",
    ),
    "missing": (dropped("epoch"), 'the saved tree must be like the one to restore, got none for epoch; missing="init"'),
    "missing below": (
        dropped("model", "encoder", "w"),
        "the saved model.encoder must be like the one to restore, got none for w; missing=",
    ),
    "missing item": (dropped("bits", 0), r"the saved bits must be like the one to restore, got none for \[4\]"),
    "surplus": (path_set("x", to=1), 'got a surplus x; unexpected="drop" leaves it out'),
    "surplus below": (path_set("model", "encoder", "x", to=1), "the saved model.encoder must be like .* surplus x"),
    "one name of an optimizer": (
        path_set("optimizers", "main", "param_groups", 0, "param_names", 0, to="x"),
        'got none for "encoder.w" and a surplus "x"',
    ),
}


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("order", ["as made", "reversed"])
def test_nothing_changes_where_a_part_fails(tmp_path: Path, failure: str, order: str) -> None:
    change, message = FAILURES[failure]
    run, source = made(2), made(1)
    advance(source, 3)
    advance(run, 2)
    saved = roptim.load(file_of(tmp_path, source))
    change(saved, run)
    if order == "reversed":
        run = dict(reversed(run.items()))
    before, tree = fingerprint(run), fingerprint(saved)
    with pytest.raises((roptim.RoptimError, RuntimeError, KeyError), match=message):
        roptim.restore(saved, run)
    assert fingerprint(run) == before
    assert fingerprint(saved) == tree


def test_a_part_that_fails_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, run = made(1), made(2)
    advance(source, 3)
    advance(run, 2)
    before = fingerprint(run)
    real = _restore.prepare

    def failing(optimizer: Any, *rest: Any) -> Any:
        prepared = real(optimizer, *rest)
        if optimizer is run["optimizers"]["others"][0]:

            def commit() -> None:
                raise roptim.DeviceLostError("lost")

            object.__setattr__(prepared, "commit", commit)
        return prepared

    monkeypatch.setattr(_restore, "prepare", failing)
    with pytest.raises(roptim.DeviceLostError):
        roptim.restore(file_of(tmp_path, source), run)
    assert fingerprint(run) == before


def test_what_cannot_give_back_its_state_is_loaded_last() -> None:
    class Sink:
        kept = None

        def load_state_dict(self, state: Any) -> None:
            self.kept = state

    sink, meter = Sink(), Stubborn(1)
    with pytest.raises(RuntimeError, match="stubborn"):
        roptim.restore({"sink": 3, "meter": Meter(2).state_dict()}, {"sink": sink, "meter": meter})
    assert sink.kept is None
    assert meter.history == [1.0]


def test_hooks_and_loads_of_ones_own_run() -> None:
    said: list[str] = []
    opt = SGD([f32(1)], lr=0.5)
    opt.register_load_state_dict_pre_hook(lambda opt, state: state["param_groups"][0].update(lr=0.125))
    opt.register_load_state_dict_post_hook(lambda opt: said.append(f"loaded {opt.param_groups[0]['lr']}"))
    saved = SGD([f32(1)], lr=0.25).state_dict()
    roptim.restore({"opt": saved}, {"opt": opt})
    assert said == ["loaded 0.125"]
    assert saved["param_groups"][0]["lr"] == 0.25

    class Counting(SGD):
        extra = 0

        def state_dict(self) -> dict[str, Any]:
            return {"inner": super().state_dict(), "extra": self.extra}

        def load_state_dict(self, state_dict: Any, **rules: Any) -> Any:
            self.extra = state_dict["extra"]
            return super().load_state_dict(state_dict["inner"], **rules)

    mine, theirs = Counting([f32(1)]), Counting([f32(1)], lr=0.25)
    theirs.extra = 5
    roptim.restore({"opt": theirs.state_dict()}, {"opt": mine})
    assert (mine.extra, mine.param_groups[0]["lr"]) == (5, 0.25)


# ---- differences --------------------------------------------------------------------------------------------


def test_a_renamed_parameter_is_found_in_arrays_and_optimizer(tmp_path: Path) -> None:
    source = made(1, "wb")
    advance(source, 3)
    run = made(2, "vb")
    del source["average"], run["average"]  # it has names of its own, and no rename
    path = file_of(tmp_path, source)
    before = fingerprint(run)
    with pytest.raises(KeyError, match=r"the saved model.encoder must be like .* got none for v and a surplus w"):
        roptim.restore(path, run)
    for rename in (
        {"w": "v"},
        {"encoder.w": "encoder.v", "z": "v"},
        {"encoder.w": "v"},
        {"encoder.w": "encoder.b"},
        {"encoder.w": "encoder."},
    ):
        with pytest.raises(roptim.RoptimError, match=r"rename|like the one"):
            roptim.restore(path, run, rename=rename)
        assert fingerprint(run) == before
    report = roptim.restore(path, run, rename={"encoder.w": "encoder.v"})
    assert {"model.encoder.v", "optimizers.main: encoder.v"} <= {*report.loaded}
    assert (report.initialised, report.dropped) == ((), ())
    assert fingerprint(run["model"]["encoder"]["v"]) == fingerprint(source["model"]["encoder"]["w"])
    assert fingerprint(run["optimizers"]["main"].state["encoder.v"]["exp_avg"]) == fingerprint(
        source["optimizers"]["main"].state["encoder.w"]["exp_avg"]
    )


@pytest.mark.parametrize("top", ["params", "net.1"])
def test_names_in_rename_are_those_of_optimizers(tmp_path: Path, top: str) -> None:
    def run(name: str, value: float) -> Any:
        params = {"list": [{name: f32(2, value=value)}], "other": {name: f32(1, value=value)}}
        return {top: params, "opt": Adam(params)}

    path = file_of(tmp_path, run("old", 3.0))
    target = run("new", 0.0)
    rename = {"list.0.old": "list.0.new", "other.old": "other.new"}
    assert roptim.restore(path, target, rename=rename).loaded == (
        f"{top}.list[0].new",
        f"{top}.other.new",
        "opt: list.0.new",
        "opt: other.new",
    )
    assert target[top]["list"][0]["new"].tolist() == [3, 3]
    two = run("new", 0.0)
    with pytest.raises(roptim.RoptimError, match="'nobody'"):
        roptim.restore(path, two, rename={**rename, "nobody": "new"})


def test_exchanged_names(tmp_path: Path) -> None:
    path = file_of(tmp_path, {"p": {"a": f32(1, value=1), "b": f32(1, value=2)}})
    target = {"p": {"a": f32(1), "b": f32(1)}}
    roptim.restore(path, target, rename={"a": "b", "b": "a"})
    assert (target["p"]["a"][0], target["p"]["b"][0]) == (2, 1)
    with pytest.raises(ValueError, match=r"rename must be to different names, got one name twice in p"):
        roptim.restore(path, target, rename={"a": "b"})


def test_new_and_surplus_parts_at_every_level(tmp_path: Path) -> None:
    path = file_of(
        tmp_path,
        {
            "p": {"a": f32(1, value=5), "gone": f32(2)},
            "list": [f32(1, value=5), f32(1)],
            "old": 1,
            "opt": SGD([f32(1)]),
        },
    )

    def target() -> Any:
        opt = SGD([f32(1), f32(2)], lr=0.5)
        return {"p": {"a": f32(1), "new": f32(3)}, "list": [f32(1)], "fresh": 7, "opt": opt}

    for options in ({}, {"missing": "init"}, {"unexpected": "drop"}, {"strict": False, "missing": "error"}):
        run = target()
        before = fingerprint(run)
        with pytest.raises(roptim.RoptimError, match=r"^roptim.restore: "):
            roptim.restore(path, run, **options)
        assert fingerprint(run) == before
    for options in ({"strict": False}, {"missing": "init", "unexpected": "drop"}):
        run = target()
        report = roptim.restore(path, run, hparams="keep", **options)
        assert report.loaded == ("p.a", "list[0]", "opt: parameter 0")
        assert sorted(report.initialised) == ["fresh", "opt: parameter 1", "p.new"]
        assert sorted(report.dropped) == ["list[1]", "old", "p.gone"]
        assert (run["p"]["a"][0], run["list"][0][0], run["fresh"]) == (5, 5, 7)
        assert run["opt"].param_groups[0]["lr"] == 0.5
        assert "old" not in run
        lines = str(report).splitlines()
        assert lines[0] == "loaded: p.a, list[0], opt: parameter 0"
        assert len(lines) == 3


def test_hyperparameters_of_all_optimizers(tmp_path: Path) -> None:
    def run(lr: float) -> Any:
        return {"a": SGD([f32(1)], lr=lr), "b": AdamW([f32(1)], lr=lr)}

    path = file_of(tmp_path, run(0.25))
    target = run(0.5)
    assert roptim.restore(path, target, hparams="keep").hparams == {}
    report = roptim.restore(path, target, hparams={"lr": 0.125})
    assert report.hparams == {"a: group 0: lr": (0.5, 0.125), "b: group 0: lr": (0.5, 0.125)}
    before = fingerprint(target)
    with pytest.raises(KeyError, match="hparams must be of hyperparameters"):
        roptim.restore(path, target, hparams={"momentum": 0.5})
    assert fingerprint(target) == before
    adam = {"a": SGD([f32(1)]), "b": Adam([f32(1)])}
    assert roptim.restore(path, adam).converted_from == "AdamW"


def test_warnings_name_the_line_that_called(tmp_path: Path) -> None:
    saved = {"opt": SGD([f32(1)], lr=0.25)}
    series = roptim.Checkpointer(tmp_path / "series")
    series.save(1, saved)
    path = file_of(tmp_path, saved)
    for call in (
        lambda into: roptim.restore(path, into),
        series.restore,
        lambda into: into["opt"].load_state_dict(saved["opt"].state_dict()),
    ):
        with pytest.warns(UserWarning, match="lr of group 0 was no schedule in the saved run") as said:
            call({"opt": SGD([f32(1)], lr=schedules.cosine(3))})
        assert [warning.filename for warning in said] == [__file__]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"missing": "x"}, '^roptim.restore: missing must be "error" or "init"'),
        ({"rename": 3}, "^roptim.restore: rename must be a dict of names"),
        ({"hparams": 3}, '^roptim.restore: hparams must be "file", "keep" or a dict'),
        ({"rename": {"z": "a"}}, "^roptim.restore: rename must be of names that the saved state has, got 'z'"),
    ],
)
def test_refused_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(roptim.RoptimError, match=message):
        roptim.restore({"a": 1}, {"a": 0}, **options)


# ---- on a GPU -----------------------------------------------------------------------------------------------


def test_a_container_is_renamed_with_all_in_it(tmp_path: Path) -> None:
    def run(name: str, value: float) -> dict[str, Any]:
        params = {name: {"W": f32(2, value=value), "b": f32(1, value=value)}, "rest": [f32(1, value=value)]}
        opt = Adam(params)
        # What has such names and is no parameter stays.
        config = {"old": {"W": 1}, "arrays": [f32(1)]}
        return {"params": params, "optimizer": opt, "average": AveragedModel(params), "config": config, "old": {"W": 2}}

    old, new = run("old", 1.0), run("new", 0.0)
    old["optimizer"].step({"old": {"W": f32(2), "b": f32(1)}, "rest": [f32(1)]})
    old["average"].update_parameters(old["params"])
    roptim.save(old, tmp_path / "run")
    roptim.restore(tmp_path / "run", new, rename={"old": "new"})
    assert fingerprint(new["params"]["new"]) == fingerprint(old["params"]["old"])
    assert fingerprint(dict(new["optimizer"].state["new.W"])) == fingerprint(dict(old["optimizer"].state["old.W"]))
    assert new["average"].module["new"]["W"].tolist() == old["params"]["old"]["W"].tolist()
    assert new["config"]["old"] == {"W": 1}
    with pytest.raises(
        roptim.RoptimKeyError, match=r"rename must be of names that the saved state has, got 'old.typo'"
    ):
        roptim.restore(tmp_path / "run", run("new", 0.0), rename={"old": "new", "old.typo": "new.typo"})
    with pytest.raises(roptim.RoptimKeyError, match=r'rename={"old": "new"} matches arrays and containers'):
        roptim.restore(tmp_path / "run", run("new", 0.0), rename={"old.W": "new.W"})


def test_averages_follow_the_rules_of_the_whole(tmp_path: Path) -> None:
    def run(names: str, value: float) -> dict[str, Any]:
        params = {name: f32(2, value=value) for name in names}
        return {"params": params, "average": AveragedModel(params)}

    old = run("ab", 1.0)
    old["average"].update_parameters(old["params"])
    roptim.save(old, tmp_path / "run")
    new = run("xc", 0.0)
    report = roptim.restore(tmp_path / "run", new, rename={"a": "x"}, strict=False)
    assert new["average"].n_averaged == 1
    assert new["average"].module["x"].tolist() == [1, 1]
    assert new["average"].module["c"].tolist() == [0, 0]
    assert "average: c" in report.initialised
    assert "average: b" in report.dropped
    with pytest.raises(roptim.RoptimKeyError, match=r"the saved average.module must be like"):
        roptim.restore({"average": old["average"].state_dict()}, {"average": new["average"]})


def test_one_object_in_two_places(tmp_path: Path) -> None:
    tied, rng = f32(2), np.random.default_rng(1)
    roptim.save({"in": tied, "out": tied, "rng": rng, "same": rng}, tmp_path / "tied")
    into = f32(2, value=0)
    fresh = np.random.default_rng(2)
    roptim.restore(tmp_path / "tied", {"in": into, "out": into, "rng": fresh, "same": fresh})
    assert into.tolist() == [1, 1]
    assert fresh.bit_generator.state == rng.bit_generator.state
    saved = {"in": f32(2), "out": f32(2, value=3)}
    with pytest.raises(ValueError, match="out must be saved with one state, got other values than in in, which is the"):
        roptim.restore(saved, {"in": into, "out": into})
    assert into.tolist() == [1, 1]


def test_arrays_that_share_memory_are_restored_with_values_that_fit() -> None:
    flat = np.arange(6, dtype=np.float32)
    saved = {"flat": flat.copy(), "head": flat[:4].copy(), "every": flat[::-2].copy()}
    x = np.zeros(6, np.float32)
    roptim.restore(saved, {"flat": x, "head": x[:4], "every": x[::-2]})
    assert np.array_equal(x, flat)
    x[:] = 7
    for change, places in (("every", ("every", "flat", "head")), ("head", ("head", "flat"))):
        wrong = {**saved, change: saved[change] + 1}
        into = {"flat": x, "head": x[:4], "every": x[::-2]}
        with pytest.raises(roptim.RoptimValueError, match="must be memory of its own, got memory of") as told:
            roptim.restore(wrong, into)
        assert str(told.value).split(": ")[1].split()[0] in places
        assert np.all(x == 7)
    apart = {"a": x[::2], "b": x[1::2]}
    roptim.restore({"a": flat[:3], "b": flat[3:]}, apart)
    assert x.tolist() == [0, 3, 1, 4, 2, 5]


def test_an_array_that_visits_memory_twice_is_restored_with_one_value() -> None:
    memory = np.zeros(1, np.float32)
    twice = np.lib.stride_tricks.as_strided(memory, (3,), (0,))
    with pytest.raises(roptim.RoptimValueError, match="a must be without elements that share memory"):
        roptim.restore({"a": np.arange(3, dtype=np.float32)}, {"a": twice})
    assert memory[0] == 0
    roptim.restore({"a": f32(3)}, {"a": twice})
    assert memory[0] == 1


@pytest.mark.parametrize(
    ("saved", "here", "message"),
    [
        ({"a": 1}, "text", "x must be a string as it is here, got a dict in the saved state"),
        ("text", 0.5, "x must be numbers as it is here, got a string in the saved state"),
        ([1], {"a": 1}, "x must be a dict as it is here, got numbers in the saved state"),
        (
            1,
            object(),
            "x must be an array, an object with load_state_dict, or a value in a list or dict, got an object of",
        ),
    ],
)
def test_values_of_another_kind_are_refused(saved: Any, here: Any, message: str) -> None:
    into = {"x": here}
    with pytest.raises(TypeError, match=message):
        roptim.restore({"x": saved}, into)
    assert into["x"] is here
    for value in (1, 2.5, np.float32(3), True, None):
        roptim.restore({"x": value}, into := {"x": 0})
        assert into["x"] is value or into["x"] == value
    roptim.restore({"x": [1, 2]}, into := {"x": None})
    assert into == {"x": [1, 2]}
    roptim.restore({"x": f32(2)}, into := {"x": []})
    assert into["x"].tolist() == [1, 1]
    roptim.restore({"x": None, "y": None}, into := {"x": f32(2), "y": {"best": f32(2)}})
    assert into == {"x": None, "y": None}, "there was none yet"
    opt = SGD([f32(1)])
    with pytest.raises(TypeError, match="x must be a dict, got an object of type NoneType in the saved state"):
        roptim.restore({"x": None}, into := {"x": {"optimizer": opt, "best": f32(2)}})
    assert into["x"]["optimizer"] is opt


def test_an_interrupt_comes_after_the_whole() -> None:
    """Real signals, at many moments within."""
    code = """
import os, signal, sys, threading, time, numpy as np, roptim
from roptim._restore import _Plan
sys.setswitchinterval(1e-5)
n, attempts = 3000, 100
source = {f"p{i}": np.full(3, 1.0) for i in range(n)}
saved = {"params": source, "opt": roptim.SGD(source, lr=0.5).state_dict(), "epoch": 7}
def made():
    params = {f"p{i}": np.zeros(3) for i in range(n)}
    return {"params": params, "opt": roptim.SGD(params, lr=0.1), "epoch": 0}
commit, took = _Plan.commit, 0.0
def timed(self):
    global took
    start = time.perf_counter()
    commit(self)
    took = time.perf_counter() - start
_Plan.commit = timed
roptim.restore(saved, made())
def interrupted(self):
    timer.start()
    commit(self)
_Plan.commit = interrupted
came = mixed = 0
for attempt in range(attempts):
    run = made()
    timer = threading.Timer(took * attempt / attempts, os.kill, (os.getpid(), signal.SIGINT))
    try:
        roptim.restore(saved, run)
        timer.join()
        time.sleep(0.001)
    except KeyboardInterrupt:
        came += 1
    state = {float(p[0]) for p in run["params"].values()}, run["opt"].param_groups[0]["lr"], run["epoch"]
    mixed += state not in (({1.0}, 0.5, 7), ({0.0}, 0.1, 0))
print(came > 10, mixed)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "True 0\n"), done.stderr


def test_what_lives_on_a_gpu(gpu: str, tmp_path: Path) -> None:
    def run(value: float) -> Any:
        params = {"w": Parameter(f32(3, value=value)), "b": f32(2, value=value)}
        opt = Adam(params, lr=0.25, **ON_GPU)
        opt.step({"w": f32(3, value=value), "b": f32(2)})
        return {"p": params, "opt": opt, "data": roptim.gpu.array(f32(4, value=value), allow_software=True)}

    source, target = run(2.0), run(0.5)
    path = file_of(tmp_path, source)
    roptim.restore(path, target)
    for each in (source, target):
        each["opt"].step({"w": f32(3), "b": f32(2)})
    assert fingerprint(target) == fingerprint(source)
    assert target["data"].numpy().tolist() == [2, 2, 2, 2]
    for wrong in (f32(5), np.zeros(4)):
        before = fingerprint(target)
        with pytest.raises(roptim.RoptimError, match=r"data must be a float32 array of shape \(4,\), got"):
            roptim.restore({**roptim.load(path), "data": wrong}, target)
        assert fingerprint(target) == before


# ---- no code ------------------------------------------------------------------------------------------------

HOSTILE = r"""
import gzip, io, json, marshal, os, pickle, struct, sys, tempfile, warnings, zipfile
import numpy as np
import roptim

class Evil:
    def __reduce__(self):
        return os.system, ("touch owned",)

folder = tempfile.mkdtemp()
os.chdir(folder)
roptim.save({"a": np.ones(3), "note": "import os"}, "good")
good = open("good", "rb").read()

def container(header, data=b""):
    text = json.dumps(header).encode() if isinstance(header, dict) else header
    return struct.pack("<Q", len(text)) + text + data

def zipped(name, data):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr(name, data)
    return stream.getvalue()

objects = io.BytesIO()
np.save(objects, np.array([Evil()], object), allow_pickle=True)
tagged = good.replace(rb'\"note\":\"import os\"', rb'\"$eval\":\"import os\"')
assert tagged != good
payloads = {
    "pickle 0": pickle.dumps(Evil(), 0),
    "pickle 5": pickle.dumps(Evil(), 5),
    "npy of objects": objects.getvalue(),
    "npz": zipped("a.npy", objects.getvalue()),
    "torch's zip": zipped("archive/data.pkl", pickle.dumps(Evil(), 2)),
    "gzip": gzip.compress(pickle.dumps(Evil())),
    "bytecode": b"\xcb\r\r\n" + bytes(12) + marshal.dumps(compile("import os; os.system('touch owned')", "x", "exec")),
    "source": b"__import__('os').system('touch owned')\n",
    "yaml": b"!!python/object/apply:os.system ['touch owned']\n",
    "safetensors with code": container({"__metadata__": {"roptim": "__import__('os').system('touch owned')"}}),
    "a tree with code": container(
        {"__metadata__": {"roptim": json.dumps({"format": 1, "checksum": "0" * 32,
            "tree": {"$object": "os.system", "args": ["touch owned"]}})}}),
    "another tag": tagged,
    "deep": container(b"[" * 100_000),
    "huge": struct.pack("<Q", 2**63) + b"{}",
}
class Target:
    def __init__(self):
        self.loaded = []
    def state_dict(self):
        return {}
    def load_state_dict(self, state):
        self.loaded.append(state)

def entries(path):
    a = np.zeros(3)
    target = Target()
    into = {"a": a, "note": "", "opt": roptim.SGD([a]), "target": target}
    series = roptim.Checkpointer("series")
    yield "load", lambda: roptim.load(path)
    yield "restore", lambda: roptim.restore(path, into)
    yield "latest", series.latest
    yield "Checkpointer.load", lambda: series.load(1)
    yield "Checkpointer.restore", lambda: series.restore(into)
    yield "Checkpointer.restore of a step", lambda: series.restore(into, step=1)

WATCHED = ("exec", "compile", "import", "os.system", "os.exec", "os.spawn", "os.posix_spawn", "os.fork", "os.forkpty",
           "subprocess.Popen", "pickle.find_class", "socket.", "ctypes.", "marshal.", "code.__new__", "urllib.")
events, armed = [], False
sys.addaudithook(lambda name, args: events.append(name) if armed and name.startswith(WATCHED) else None)
warnings.simplefilter("ignore")
os.mkdir("series")
outcomes = []
for kind, payload in [("warm-up", b"nothing"), *payloads.items()]:
    for path in ("x", "series/step-00000001.safetensors"):
        with open(path, "wb") as file:
            file.write(payload)
    for entry, call in entries("x"):
        events.clear()
        armed = True
        try:
            call()
            outcome = "no error"
        except Exception as error:
            outcome = type(error).__name__
        armed = False
        outcomes.append((kind, entry, outcome, list(events) if kind != "warm-up" else []))
armed = True
pickle.loads(pickle.dumps(os.getcwd, 0))
exec("1")
armed = False
print(json.dumps({"outcomes": outcomes, "owned": os.path.exists("owned"), "seen": sorted(set(events))}))
"""


def test_no_code_of_a_file_runs() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, "-c", HOSTILE], capture_output=True, text=True, env=environment, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert {"pickle.find_class", "exec"} <= set(result["seen"]), "the hook sees what it is there for"
    assert not result["owned"]
    assert len(result["outcomes"]) == 15 * 6
    wrong = [each for each in result["outcomes"] if each[2:] != ["CheckpointError", []]]
    assert not wrong
