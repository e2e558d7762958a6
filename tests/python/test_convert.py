"""States from torch and optax, and to torch, without either: recorded states, and stand-ins for their classes."""

from __future__ import annotations

import json
import re
import sys
from types import SimpleNamespace
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
from helpers import VECTORS, relative_error

import roptim
from roptim import convert
from roptim.optimizer import REGISTRY

CASES: list[dict[str, Any]] = json.loads((VECTORS / "state_dicts.json").read_text())["cases"]
SWITCHES = {"foreach", "fused", "capturable", "differentiable"}
# After three more steps. torch fuses additions of products and its square root is an ulp off in places; its
# Newton-Schulz is in bfloat16, so for Muon the distance travelled is the measure, as in test_numbers.py.
FLOAT32, FLOAT64, MUON = 2e-7, 1e-12, 0.08
# torch rounds to bfloat16 after each of an optimizer's operations and keeps state in it, roptim does neither.
BFLOAT16 = 2**-7


class Tensor:
    """As much of torch's tensor as is looked at. It shares memory with what `numpy` returns, as torch's does."""

    def __init__(self, array: Any, dtype: str | None = None) -> None:
        self.array = np.asarray(array)
        self.dtype = dtype or f"torch.{self.array.dtype.name}"
        self.shape = self.array.shape

    is_sparse = False

    def detach(self) -> Tensor:
        return self

    def cpu(self) -> Tensor:
        return self

    def numpy(self) -> np.ndarray:
        if self.dtype == "torch.bfloat16":
            raise TypeError("Got unsupported ScalarType BFloat16")
        return self.array

    def view(self, dtype: str) -> Tensor:
        assert (self.dtype, dtype) == ("torch.bfloat16", "torch.int16")
        return Tensor(self.array.view(np.int16))


class Sparse(Tensor):
    is_sparse = True

    def to_dense(self) -> Tensor:
        return Tensor(self.array)


Tensor.__module__ = "torch"


@pytest.fixture(autouse=True)
def torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(int16="torch.int16"))


def numpys(form: dict[str, Any]) -> np.ndarray:
    kind = form["dtype"].removeprefix("torch.")
    numbers = np.array(form["tensor"], np.float64)
    if kind.startswith("complex"):
        numbers = numbers[..., 0] + 1j * numbers[..., 1]
    return numbers.reshape(form["shape"]).astype(ml_dtypes.bfloat16 if kind == "bfloat16" else kind)


def read(form: Any, tensor: Any = lambda form: Tensor(numpys(form), form["dtype"])) -> Any:
    """What the recording script made a form of, with `tensor` of each tensor."""
    if isinstance(form, list):
        return [read(item, tensor) for item in form]
    if not isinstance(form, dict):
        return form
    if "tensor" in form:
        return tensor(form)
    if "tuple" in form:
        return tuple(read(form["tuple"], tensor))
    return {key: read(item, tensor) for key, item in form["dict"]}


def named(name: str) -> dict[str, Any]:
    return next(case for case in CASES if case["name"] == name)


def made(case: dict[str, Any], params: list[np.ndarray], **kwargs: Any) -> Any:
    """An optimizer of the case's class and number of groups, with its own hyperparameters."""
    kwargs = {"initial_accumulator_value": 0.5} if case["optimizer"] == "Adagrad" else kwargs
    count = len(read(case["state_dict"])["param_groups"])
    groups = [{"params": [p]} for p in params] if count > 1 else [{"params": params}]
    return getattr(roptim, case["optimizer"])(groups, **kwargs)


def goes(case: dict[str, Any], opt: Any, params: list[np.ndarray], *steps: int) -> None:
    """Steps of the recording; by default those after the state was saved."""
    gradients = [[numpys(g) for g in each] for each in case["gradients"]]
    for step in steps or range(case["saved_after"], len(gradients)):
        given: list[Any] = gradients[step]
        if case["sparse"]:
            rows = [(step + i) % len(g) for i, g in enumerate(given)]
            given = [roptim.SparseGrad([row], g[row : row + 1], g.shape) for row, g in zip(rows, given, strict=True)]
        if case["optimizer"] == "LBFGS":
            opt.step(lambda: log_cosh(params, gradients[0]))
        else:
            opt.step(given)


def log_cosh(params: list[np.ndarray], centres: list[np.ndarray]) -> tuple[float, list[np.ndarray]]:
    apart = [p - c for p, c in zip(params, centres, strict=True)]
    return sum(float(np.log(np.cosh(x)).sum()) for x in apart), [np.tanh(x) for x in apart]


def reaches(case: dict[str, Any], params: list[np.ndarray]) -> None:
    """Whether the parameters are where torch's were at the end."""
    for p, form, saved in zip(params, case["end"], case["saved"], strict=True):
        want, start = numpys(form), numpys(saved)
        if case["optimizer"] == "Muon":
            assert np.abs(p - want).max() <= MUON * np.abs(want - start).max()
        else:
            bits = {2: BFLOAT16, 4: FLOAT32, 8: FLOAT64}[p.real.dtype.itemsize]
            pairs = [(p.real, want.real), (p.imag, want.imag)] if p.dtype.kind == "c" else [(p, want)]
            for got, part in pairs:
                assert relative_error(got, part, np.abs(start)) <= bits


def same(a: Any, b: Any) -> None:
    """The same values of the same types, and no memory in common."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            same(x, y)
    elif isinstance(a, np.ndarray):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert np.array_equal(a, b)
        assert not np.shares_memory(a, b)
    else:
        assert a == b


def test_every_optimizer_of_torch_is_recorded() -> None:
    assert {case["optimizer"] for case in CASES} == REGISTRY.keys() - {"ConjugateGradient"} == convert._TORCHS


# ---- from torch ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_a_run_of_torch_goes_on(case: dict[str, Any]) -> None:
    params = [numpys(form) for form in case["saved"]]
    opt = made(case, params)
    opt.load_state_dict(convert.from_torch(read(case["state_dict"])))
    goes(case, opt, params)
    reaches(case, params)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_the_loaded_state_is_torchs(case: dict[str, Any]) -> None:
    """Also what the next steps do not show: averages, the largest moment so far, what is computed anew."""
    opt = made(case, [numpys(form) for form in case["saved"]])
    converted = convert.from_torch(read(case["state_dict"]))
    opt.load_state_dict(converted)
    want = convert.to_torch(converted)["state"]
    if case["name"] == "adam_bfloat16":
        want = {
            index: {key: np.asarray(value, np.float32) for key, value in entry.items()} for index, entry in want.items()
        }
    if case["optimizer"] == "LBFGS":
        # The length of the last step is an int in torch where lr is.
        want[0]["t"] = float(want[0]["t"])
    same(convert.to_torch(opt.state_dict())["state"], want)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_what_came_from_torch_is_a_file_and_plain(case: dict[str, Any], tmp_path: Any) -> None:
    converted = convert.from_torch(read(case["state_dict"]), names=["a", "b"])
    roptim.save(converted, tmp_path / "state")
    same(roptim.load(tmp_path / "state"), converted)
    for entry in converted["state"].values():
        assert type(entry.get("step", 0)) is int
    for group in converted["param_groups"]:
        assert not SWITCHES & group.keys()
        assert group["param_names"] == [["a", "b"][index] for index in group["params"]]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_there_and_back(case: dict[str, Any]) -> None:
    """torch's state with arrays for tensors, but for a tensor lr and steps at 0, which are nothing in roptim."""
    want = read(case["state_dict"], numpys)
    for group in want["param_groups"]:
        for key in SWITCHES & group.keys():
            del group[key]
        if isinstance(group["lr"], np.ndarray):
            group["lr"] = group["lr"].item()
        if case["optimizer"] == "LBFGS":
            assert group.pop("maximize") is False
    want["state"] = {index: entry for index, entry in want["state"].items() if entry.get("step") != 0}
    for entry in want["state"].values():
        # torch multiplies by these, which it has in either form: after one iteration H_diag is an int, t a tensor.
        if "H_diag" in entry:
            entry["H_diag"] = np.asarray(entry["H_diag"], np.float64)
            entry["t"] = np.asarray(entry["t"]).item()
    converted = convert.from_torch(read(case["state_dict"]))
    same(convert.to_torch(converted), want)


def test_tensors_are_copied() -> None:
    case = named("adam")
    saved = read(case["state_dict"])
    converted = convert.from_torch(saved)
    for index, entry in saved["state"].items():
        for key in ("exp_avg", "exp_avg_sq"):
            assert not np.shares_memory(entry[key].array, converted["state"][index][key])
            assert converted["state"][index][key].flags.c_contiguous


def test_classes_derived_from_tensors_are_tensors() -> None:
    class Parameter(Tensor):
        pass

    momentum = {"momentum_buffer": Parameter(np.ones(2, np.float32))}
    converted = convert.from_torch({"state": {0: momentum}, "param_groups": [{"params": [0]}]})
    assert converted["state"][0]["momentum_buffer"].tolist() == [1, 1]


def test_numbers_of_groups_and_lists() -> None:
    group = {"params": [0], "lr": Tensor(np.array([0.5])), "betas": (Tensor(0.5), 0.75), "mine": [Tensor(np.ones(2))]}
    converted = convert.from_torch({"state": {}, "param_groups": [group]})
    (out,) = converted["param_groups"]
    assert (out["lr"], out["betas"]) == (0.5, (0.5, 0.75))
    assert type(out["lr"]) is type(out["betas"][0]) is float
    assert out["mine"][0].tolist() == [1, 1]


def test_a_sparse_momentum_becomes_dense() -> None:
    state = {0: {"momentum_buffer": Sparse(np.ones((3, 2), np.float32))}}
    converted = convert.from_torch({"state": state, "param_groups": [{"params": [0], "lr": 0.1, "momentum": 0.9}]})
    opt = roptim.SGD([np.zeros((3, 2), np.float32)], lr=0.1, momentum=0.9)
    opt.load_state_dict(converted)
    assert (opt.state[0]["momentum_buffer"] == 1).all()


def test_steps_of_older_torch() -> None:
    """A step was a number once."""
    for step in (5, 5.0, Tensor(np.array(5))):
        converted = convert.from_torch({"state": {0: {"step": step}}, "param_groups": [{"params": [0]}]})
        assert converted["state"][0]["step"] == 5
        assert type(converted["state"][0]["step"]) is int


def test_bfloat16_without_ml_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    refused(
        TypeError,
        "convert.from_torch: exp_avg of parameter 0 must be of a dtype that NumPy has, got bfloat16; install "
        "ml_dtypes, which adds it to NumPy",
        lambda: convert.from_torch(read(named("adam_bfloat16")["state_dict"])),
    )


def test_other_dtypes_are_refused() -> None:
    class Strange(Tensor):
        def numpy(self) -> np.ndarray:
            raise TypeError("Got unsupported ScalarType Float8_e4m3fn")

    group = {"params": [0]}
    tensor = Strange(np.zeros(2), "torch.float8_e4m3fn")
    refused(
        TypeError,
        "convert.from_torch: exp_avg of parameter 0 must be of a dtype that NumPy has, got torch.float8_e4m3fn",
        lambda: convert.from_torch({"state": {0: {"exp_avg": tensor}}, "param_groups": [group]}),
    )


def refused(kind: type[Exception], message: str, call: Any) -> None:
    with pytest.raises(kind, match=re.escape(message) + "$") as caught:
        call()
    assert isinstance(caught.value, roptim.RoptimError)


ADAM = {"state": {}, "param_groups": [{"params": [0, 1]}]}
LAYOUT = "must be an optimizer's, with 'state' and 'param_groups', got"


@pytest.mark.parametrize("function", [convert.from_torch, convert.to_torch])
@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        (TypeError, [1], f"state_dict {LAYOUT} an object of type list"),
        (KeyError, {}, f"state_dict {LAYOUT} an empty one"),
        (KeyError, {"w": 1}, f"state_dict {LAYOUT} one with 'w'"),
        (
            KeyError,
            {"model": {}, "optimizer": ADAM},
            f"state_dict {LAYOUT} one with 'model', 'optimizer'; give the checkpoint's entry 'optimizer'",
        ),
        (
            KeyError,
            {"a": 1, "b": 2, "c": 3, "d": 4, "e": 5, "optimizer_state_dict": ADAM},
            f"state_dict {LAYOUT} one with 'a', 'b', 'c', 'd', 'e', …; give the checkpoint's entry "
            "'optimizer_state_dict'",
        ),
        (KeyError, {"mine": ADAM}, f"state_dict {LAYOUT} one with 'mine'; give the checkpoint's entry 'mine'"),
        (TypeError, {"state": [], "param_groups": []}, "state must be a dict, got an object of type list"),
        (
            TypeError,
            {"state": {}, "param_groups": {}},
            "param_groups must be a list of dicts, got an object of type dict",
        ),
        (TypeError, {"state": {}, "param_groups": [{}]}, "params of group 0 must be a list of indices, got None"),
        (
            TypeError,
            {"state": {0: 1}, "param_groups": []},
            "state of parameter 0 must be a dict, got an object of type int",
        ),
    ],
)
def test_what_is_no_state_dict(function: Any, kind: type[Exception], given: Any, message: str) -> None:
    refused(kind, f"convert.{function.__name__}: {message}", lambda: function(given))


def test_lbfgs_that_maximizes() -> None:
    group = {"params": [0], "lr": 1, "history_size": 5, "maximize": True}
    message = "maximize of group 0 must be False for LBFGS, got True; minimize the negative loss"
    refused(
        ValueError,
        f"convert.from_torch: {message}",
        lambda: convert.from_torch({"state": {}, "param_groups": [group]}),
    )


# ---- names -----------------------------------------------------------------------------------------------------------


def two_groups() -> dict[str, Any]:
    return {
        "state": {0: {"step": 1, "exp_avg": Tensor(np.zeros((3, 2)))}, 2: {"step": 1, "exp_avg": Tensor(np.zeros(2))}},
        "param_groups": [{"params": [0, 1], "lr": 1e-3}, {"params": [2], "lr": 1e-2}],
    }


PAIRS = [("W", Tensor(np.zeros((3, 2)))), ("b", Tensor(np.zeros(5))), ("c", Tensor(np.zeros(2)))]


@pytest.mark.parametrize(
    "names",
    [
        ["W", "b", "c"],
        ("W", "b", "c"),
        iter(["W", "b", "c"]),
        {2: "c", 0: "W", np.int64(1): "b"},
        PAIRS,
        iter(PAIRS),
        dict(PAIRS),
        zip("Wbc", [None] * 3, strict=True),
    ],
    ids=["list", "tuple", "iterator", "dict", "pairs", "iterator of pairs", "dict of weights", "pairs with None"],
)
def test_names(names: Any) -> None:
    converted = convert.from_torch(two_groups(), names)
    assert [group["param_names"] for group in converted["param_groups"]] == [["W", "b"], ["c"]]
    assert [group["lr"] for group in converted["param_groups"]] == [1e-3, 1e-2]


def test_names_of_the_dict_are_kept_unless_others_are_given() -> None:
    saved = read(named("adamw_groups")["state_dict"])
    own = [["layer.weight"], ["layer.bias"]]
    assert [group["param_names"] for group in convert.from_torch(saved)["param_groups"]] == own
    given = convert.from_torch(saved, ["W", "b"])
    assert [group["param_names"] for group in given["param_groups"]] == [["W"], ["b"]]
    assert [group["param_names"] for group in saved["param_groups"]] == own


def test_names_match_parameters_in_another_order() -> None:
    case = named("adam")
    weight, bias = (numpys(form) for form in case["saved"])
    opt = roptim.Adam({"bias": bias, "weight": weight})
    opt.load_state_dict(convert.from_torch(read(case["state_dict"]), ["weight", "bias"]))
    for gradients in case["gradients"][3:]:
        opt.step(dict(zip(["weight", "bias"], map(numpys, gradients), strict=True)))
    reaches(case, [weight, bias])


IN_ORDER = "give those of the parameters that the optimizer was given, in its order"


@pytest.mark.parametrize(
    ("kind", "names", "message"),
    [
        (ValueError, ["W", "b"], f"names must be 3 in number, got 2; {IN_ORDER}"),
        (ValueError, [*PAIRS, ("d", None)], f"names must be 3 in number, got 4; {IN_ORDER}"),
        (ValueError, ["W", "b", "W"], "names must be different, got 'W' twice"),
        (TypeError, ["W", "b", 3], "names must be strings, got 3"),
        (TypeError, {0: "W", 1: "b", 2: 3}, "names must be strings, got 3"),
        (KeyError, {0: "W", 2: "c"}, "names must be given for the parameters 0 to 2, got none for 1"),
        (
            KeyError,
            {0: "W", 1: "b", 2: "c", 3: "d"},
            "names must be given for the parameters 0 to 2, got one for 3",
        ),
        (TypeError, {0.5: "W"}, "keys of names must be indices of parameters, got 0.5"),
        (
            TypeError,
            "Wbc",
            "names must be strings in order, (name, tensor) pairs, or a dict of index and name, got 'Wbc'",
        ),
        (TypeError, 3, "names must be strings in order, (name, tensor) pairs, or a dict of index and name, got 3"),
        (TypeError, [*PAIRS[:2], "c"], "names must be all or none (name, tensor) pairs, got item 2 that is none"),
        (
            ValueError,
            PAIRS[::-1],
            "shape of 'c' must be (3, 2), as exp_avg of parameter 0 is, got (2,); give the pairs in the order of the "
            "optimizer's parameters",
        ),
    ],
)
def test_names_that_do_not_fit(kind: type[Exception], names: Any, message: str) -> None:
    refused(kind, f"convert.from_torch: {message}", lambda: convert.from_torch(two_groups(), names))


# ---- to torch --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_roptims_own_state_in_torchs_layout(case: dict[str, Any]) -> None:
    """A run of roptim's from the start, at the step that torch's state is of: keys, types, dtypes and shapes."""
    if case["name"] == "lbfgs_one_iteration":
        pytest.skip("torch's H_diag is an int there")
    want = read(case["state_dict"], numpys)
    params = [numpys(form) for form in case["start"]]
    opt = made(case, params)
    opt.load_state_dict({**convert.from_torch(read(case["state_dict"])), "state": {}})
    goes(case, opt, params, *range(case["saved_after"]))
    before = opt.state_dict()
    converted = convert.to_torch(before)
    same(opt.state_dict(), before)
    assert list(converted) == ["state", "param_groups"]
    for group, theirs in zip(converted["param_groups"], want["param_groups"], strict=True):
        surplus = {"maximize"} if case["optimizer"] == "LBFGS" else set()
        assert group.keys() == theirs.keys() - SWITCHES - surplus - {"param_names"}
        assert group["params"] == theirs["params"]
    if case["optimizer"] == "LBFGS" or case["name"] == "adagrad_unseen":
        return
    assert converted["state"].keys() == want["state"].keys()
    for index, entry in want["state"].items():
        assert next(iter(converted["state"][index])) == next(iter(entry))
        assert converted["state"][index].keys() == entry.keys()
        for key, value in entry.items():
            got = converted["state"][index][key]
            assert type(got) is type(value)
            if isinstance(value, np.ndarray):
                # State of parameters in 16 bits is float32, which torch rounds when it loads it.
                assert got.dtype == (np.float32 if value.dtype.itemsize == 2 else value.dtype)
                assert got.shape == value.shape


def test_decoupled_decay_is_in_the_groups() -> None:
    W = np.ones(2, np.float32)
    for opt, decoupled in [
        (roptim.AdamW([W]), True),
        (roptim.Adam([W]), False),
        (roptim.NAdam([W], decoupled_weight_decay=True), True),
        (roptim.RAdam([W]), False),
    ]:
        (group,) = convert.to_torch(opt.state_dict())["param_groups"]
        assert group["decoupled_weight_decay"] is decoupled


def test_schedules_become_values() -> None:
    W = np.ones(2, np.float32)
    opt = roptim.SGD({"W": W}, lr=lambda t: 1.0 / (1 + t), momentum=0.9)
    for _ in range(3):
        opt.step({"W": W.copy()})
    converted = convert.to_torch(opt.state_dict())
    assert converted["param_groups"][0]["lr"] == 0.25
    assert converted["param_groups"][0]["param_names"] == ["W"]
    assert list(converted["state"][0]) == ["momentum_buffer"]


def test_state_that_torch_has_no_class_for() -> None:
    message = "convert.to_torch: state_dict must be of an optimizer that torch has, got one of"
    W = np.ones(2)
    saved = roptim.ConjugateGradient([W]).state_dict()
    refused(ValueError, f"{message} ConjugateGradient", lambda: convert.to_torch(saved))
    del saved["roptim"]
    refused(ValueError, f"{message} ConjugateGradient", lambda: convert.to_torch(saved))

    class Mine(roptim.Optimizer):
        def step(self) -> None: ...

    refused(ValueError, f"{message} Mine", lambda: convert.to_torch(Mine([W], {"lr": 1}).state_dict()))
    saved = {**saved, "roptim": {"optimizer": None}}
    refused(ValueError, f"{message} unknown class", lambda: convert.to_torch(saved))


def test_tensors_need_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    refused(
        RuntimeError,
        "convert.to_torch: torch must be installed for tensors=True, got none; install it, or take arrays with "
        "tensors=False",
        lambda: convert.to_torch(ADAM, tensors=True),
    )


def test_tensors_are_made_of_every_array(monkeypatch: pytest.MonkeyPatch) -> None:
    class Torchs(Tensor):
        def view(self, dtype: str) -> Tensor:
            return Torchs(self.array.view(ml_dtypes.bfloat16)) if dtype == "torch.bfloat16" else super().view(dtype)

    fake = SimpleNamespace(int16="torch.int16", bfloat16="torch.bfloat16", from_numpy=Torchs)
    monkeypatch.setitem(sys.modules, "torch", fake)
    for case in CASES:
        converted = convert.from_torch(read(case["state_dict"]))
        arrays, made = convert.to_torch(converted), convert.to_torch(converted, tensors=True)

        def unwrapped(node: Any) -> Any:
            if isinstance(node, dict):
                return {key: unwrapped(value) for key, value in node.items()}
            if isinstance(node, (list, tuple)):
                return type(node)(map(unwrapped, node))
            assert not isinstance(node, np.ndarray)
            return node.array if isinstance(node, Torchs) else node

        same(unwrapped(made), arrays)


# ---- from optax ------------------------------------------------------------------------------------------------------


class ScaleByAdamState(NamedTuple):
    count: Any
    mu: Any
    nu: Any


class ScaleByAmsgradState(NamedTuple):
    count: Any
    mu: Any
    nu: Any
    nu_max: Any


class ScaleByBeliefState(NamedTuple):
    count: Any
    mu: Any
    nu: Any


class EmptyState(NamedTuple):
    pass


class MaskedNode(NamedTuple):
    pass


class InjectStatefulHyperparamsState(NamedTuple):
    count: Any
    hyperparams: Any
    hyperparams_states: Any
    inner_state: Any


class MultiStepsState(NamedTuple):
    mini_step: Any
    gradient_step: Any
    inner_opt_state: Any
    acc_grads: Any
    skip_state: Any


class PartitionState(NamedTuple):
    inner_states: Any


def ones(dtype: Any = np.float32) -> dict[str, Any]:
    return {"layer": {"W": np.ones((3, 2), dtype), "b": np.ones(2, dtype)}, "scales": [np.ones((), dtype)]}


def moments(factor: float, dtype: Any = np.float32) -> dict[str, Any]:
    """In another order than the parameters, as JAX sorts keys."""
    W, b, s = np.full((3, 2), factor, dtype), np.full(2, 2 * factor, dtype), np.full((), 3 * factor, dtype)
    return {"scales": [s], "layer": {"b": b, "W": W}}


def adam(count: int = 2, dtype: Any = np.float32) -> ScaleByAdamState:
    return ScaleByAdamState(np.array(count, np.int32), moments(0.25, dtype), moments(0.5, dtype))


def injected(inner: Any) -> InjectStatefulHyperparamsState:
    return InjectStatefulHyperparamsState(np.array(2), {"learning_rate": np.array(0.5)}, {}, inner)


def loaded(saved: dict[str, Any], dtype: Any = np.float32) -> tuple[Any, Any]:
    params = ones(dtype)
    opt = getattr(roptim, saved["roptim"]["optimizer"])(params, lr=0.5, betas=(0.5, 0.75), eps=0.125)
    opt.load_state_dict(saved)
    return opt, params


NESTED = {
    "alone": adam(),
    "chain": (EmptyState(), (adam(), EmptyState())),
    "list": [adam(), EmptyState()],
    "injected": injected((adam(), EmptyState())),
    "several steps": MultiStepsState(0, 2, (EmptyState(), injected((adam(),))), moments(0.0), ()),
    "partition": PartitionState({"a": (adam(), EmptyState()), "b": EmptyState()}),
    "read from a file": {"0": {"count": 2, "mu": moments(0.25), "nu": moments(0.5)}, "1": {}},
}


@pytest.mark.parametrize("opt_state", NESTED.values(), ids=NESTED.keys())
def test_adam_of_optax_goes_on(opt_state: Any) -> None:
    saved = convert.from_optax(opt_state, ones())
    assert saved["param_groups"] == [{"params": [0, 1, 2], "param_names": ["layer.W", "layer.b", "scales.0"]}]
    assert saved["roptim"] == {"optimizer": "Adam", "format": 1, "update_count": 2, "skip_count": 0}
    opt, params = loaded(saved)
    assert opt.update_count == 2
    assert (opt.param_groups[0]["lr"], opt.param_groups[0]["betas"]) == (0.5, (0.5, 0.75))
    opt.step({"layer": {"W": ones()["layer"]["W"], "b": None}, "scales": [None]})
    # m = 0.5·0.25 + 0.5 = 0.625, v = 0.75·0.5 + 0.25 = 0.625, at the third step.
    m_hat, v_hat = 0.625 / (1 - 0.5**3), 0.625 / (1 - 0.75**3)
    np.testing.assert_allclose(params["layer"]["W"], 1 - 0.5 * m_hat / (np.sqrt(v_hat) + 0.125), rtol=3e-7)
    assert opt.state["layer.b"]["exp_avg"].tolist() == [0.5, 0.5]
    assert opt.state["scales.0"]["exp_avg_sq"] == 1.5


def test_adamax_of_optax_goes_on() -> None:
    opt, params = loaded(convert.from_optax((adam(), EmptyState()), ones(), optimizer="Adamax"))
    opt.step({"layer": {"W": ones()["layer"]["W"], "b": None}, "scales": [None]})
    # u = max(0.75·0.5, 1 + 0.125)
    np.testing.assert_allclose(params["layer"]["W"], 1 - 0.5 * (0.625 / (1 - 0.5**3)) / 1.125, rtol=3e-7)


def test_other_classes_and_a_rate() -> None:
    for name in ("AdamW", "RAdam"):
        saved = convert.from_optax(adam(), ones(), optimizer=name, lr=np.float64(0.25))
        opt, _ = loaded(saved)
        assert type(opt).__name__ == name
        assert opt.param_groups[0]["lr"] == 0.25
        refused(
            ValueError,
            f"SGD.load_state_dict: state must be of SGD, got of {name}",
            lambda saved=saved: roptim.SGD(ones()).load_state_dict(saved),
        )


def test_a_schedule_of_the_optimizers_own_goes_on() -> None:
    params = ones()
    opt = roptim.Adam(params, lr=roptim.schedules.linear(1.0, 0.0, 4), weight_decay=lambda t: 0.5 * t)
    opt.load_state_dict(convert.from_optax(adam(), params))
    assert (opt.param_groups[0]["lr"], opt.param_groups[0]["weight_decay"]) == (0.5, 1.0)
    opt.step(ones())
    assert (opt.param_groups[0]["lr"], opt.param_groups[0]["weight_decay"]) == (0.25, 1.5)
    with pytest.warns(UserWarning, match="lr of group 0 was no schedule in the saved run"):
        opt.load_state_dict(convert.from_optax(adam(), params, lr=0.125))
    assert (opt.param_groups[0]["lr"], opt.param_groups[0]["weight_decay"]) == (0.125, 1.0)


def test_containers_without_names() -> None:
    params = [np.ones(2), (np.ones(3),)]
    state = ScaleByAdamState(1, [np.zeros(2), (np.zeros(3),)], [np.ones(2), (np.ones(3),)])
    saved = convert.from_optax(state, params)
    assert saved["param_groups"] == [{"params": [0, 1]}]
    roptim.Adam(params).load_state_dict(saved)
    array = np.ones(2)
    saved = convert.from_optax(ScaleByAdamState(1, array, array), array)
    roptim.Adam(array).load_state_dict(saved)
    pairs = [("a.b", array), ("c", array.copy())]
    saved = convert.from_optax(ScaleByAdamState(1, *[{"a": {"b": array}, "c": array}] * 2), iter(pairs))
    assert saved["param_groups"][0]["param_names"] == ["a.b", "c"]


def test_no_update_yet_is_no_state() -> None:
    saved = convert.from_optax(adam(0), ones())
    assert saved["state"] == {}
    loaded(saved)


def test_what_is_masked_has_no_state() -> None:
    for nothing in (MaskedNode(), {}, None):
        mu, nu = moments(0.25), moments(0.5)
        mu["layer"]["b"] = nu["layer"]["b"] = nothing
        if nothing is None:
            mu["layer"]["b"] = nu["layer"]["b"] = None
        opt, _ = loaded(convert.from_optax((ScaleByAdamState(2, mu, nu), EmptyState()), ones()))
        assert "step" in opt.state["layer.W"]
        assert list(opt.state_dict()["state"]) == [0, 2]


@pytest.mark.parametrize("dtype", [np.float64, np.float16, ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("of_state", [np.float32, ml_dtypes.bfloat16])
def test_moments_are_copied_into_the_dtype_of_the_state(dtype: Any, of_state: Any) -> None:
    state = adam(2, of_state)
    saved = convert.from_optax(state, ones(dtype))
    opt, _ = loaded(saved, dtype)
    assert opt.state["layer.W"]["exp_avg"].dtype == (np.float64 if dtype is np.float64 else np.float32)
    assert (opt.state["layer.W"]["exp_avg"] == 0.25).all()
    assert not np.shares_memory(saved["state"][0]["exp_avg"], state.mu["layer"]["W"])


FAMILY = "opt_state must be one that contains one state with count, mu and nu, of optax's Adam family, got"
CLASSES = "optimizer must be one of Adam, AdamW, Adamax, RAdam, got"


@pytest.mark.parametrize(
    ("kind", "opt_state", "kwargs", "message"),
    [
        (ValueError, (EmptyState(), EmptyState()), {}, f"{FAMILY} none"),
        (ValueError, (), {}, f"{FAMILY} none"),
        (
            ValueError,
            PartitionState({"a": adam(), "b": (adam(),)}),
            {},
            f"{FAMILY} 2; give the one that belongs to these parameters",
        ),
        (
            ValueError,
            (ScaleByAmsgradState(2, moments(1), moments(1), moments(1)), EmptyState()),
            {},
            "opt_state must be of a formula that roptim has, got optax's amsgrad; its maximum is of moments after "
            "bias correction, torch's and roptim's of those before",
        ),
        (
            ValueError,
            ScaleByBeliefState(*adam()),
            {},
            "opt_state must be of a formula that roptim has, got optax's adabelief",
        ),
        (
            ValueError,
            adam(),
            {"optimizer": "NAdam"},
            f"{CLASSES} 'NAdam'; optax's nadam has no schedule of momenta, torch's and roptim's NAdam has: another "
            "formula",
        ),
        (ValueError, adam(), {"optimizer": "SGD"}, f"{CLASSES} 'SGD'"),
        (ValueError, adam(), {"optimizer": roptim.Adam}, f"{CLASSES} <class 'roptim.optimizers.Adam'>"),
        (TypeError, adam(), {"lr": "1"}, "lr must be None or a number, got '1'"),
        (TypeError, adam(), {"lr": True}, "lr must be None or a number, got True"),
        (
            ValueError,
            adam()._replace(count=np.array([2, 2])),
            {},
            "count must be a whole number >= 0, got an array of shape (2,); a state that is replicated over devices "
            "is taken from one of them",
        ),
        (
            KeyError,
            adam()._replace(mu={"layer": moments(1)["layer"]}),
            {},
            "mu must be a tree with the names of the parameters, got none for 'scales.0'",
        ),
        (
            KeyError,
            adam()._replace(nu={**moments(1), "more": np.ones(2), "yet": {"more": np.ones(2)}}),
            {},
            "nu must be a tree with the names of the parameters, got a surplus 'more', 'yet.more'",
        ),
        (
            KeyError,
            adam()._replace(nu=[np.ones(1) for _ in range(4)]),
            {},
            "nu must be a tree with the names of the parameters, got none for 'layer.W', 'layer.b', 'scales.0' and a "
            "surplus '0', '1', '2', …",
        ),
        (
            ValueError,
            adam()._replace(nu={**moments(1), "scales": [np.ones(1, np.float32)]}),
            {},
            "nu of scales.0 must be of shape (), got (1,)",
        ),
    ],
)
def test_states_of_optax_that_do_not_fit(
    kind: type[Exception], opt_state: Any, kwargs: dict[str, Any], message: str
) -> None:
    refused(kind, f"convert.from_optax: {message}", lambda: convert.from_optax(opt_state, ones(), **kwargs))


def test_parameters_that_optax_states_are_not_taken_for() -> None:
    array = np.ones(2, np.complex64)
    refused(
        TypeError,
        "convert.from_optax: mu of the parameter must be of a real parameter, got complex64; optax has one second "
        "moment of a complex number, torch and roptim one of each part",
        lambda: convert.from_optax(ScaleByAdamState(1, array, array), array),
    )
    groups = [{"params": [np.ones(2)]}]
    refused(
        ValueError,
        "convert.from_optax: params must be one container of arrays, got groups",
        lambda: convert.from_optax(adam(), groups),
    )


def test_it_is_loaded_when_asked_for() -> None:
    assert roptim.convert is convert
    assert "convert" in roptim.__all__
