"""``step(average=..., statistics=...)``: the average of a separate update, bit for bit, and norms of what happened."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from helpers import LAYOUTS, fingerprint, laid_out

import roptim
from roptim import LBFGS, SGD, Adam, AdamW, ConcurrentStepError, NonfiniteError, Parameter, SparseAdam, SparseGrad
from roptim.optimizer import REGISTRY, Optimizer
from roptim.swa_utils import (
    AveragedModel,
    get_ema_avg_fn,
    get_ema_multi_avg_fn,
    get_swa_multi_avg_fn,
)

DENSE = [name for name, entry in REGISTRY.items() if not (entry["needs_closure"] or entry["needs_sparse"])]
DTYPES: list[Any] = [np.float32, np.float64, np.complex64, np.float16, ml_dtypes.bfloat16]


def own(average: Any, value: Any, count: int) -> Any:
    return (average * count + value) / (count + 1)


AVERAGES: dict[str, Callable[[], dict[str, Any]]] = {
    "equal": dict,
    "exponential": lambda: {"avg_fn": get_ema_avg_fn(0.9)},
    "equal multi": lambda: {"multi_avg_fn": get_swa_multi_avg_fn()},
    "exponential multi": lambda: {"multi_avg_fn": get_ema_multi_avg_fn(0.9)},
    "own": lambda: {"avg_fn": own},
}


def draw(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any = np.float32) -> Any:
    x = rng.standard_normal((2, *shape))
    return np.asarray(x[0] + 1j * x[1] if np.dtype(dtype).kind == "c" else x[0]).astype(dtype)


def shapes_for(name: str) -> list[tuple[int, ...]]:
    matrices: list[tuple[int, ...]] = [(6, 5), (4, 3), (1, 7), (90, 91)]
    return matrices if name == "Muon" else [*matrices, (), (0,), (3, 0), (4097,)]


def bits(x: Any) -> bytes:
    return bytes(np.ascontiguousarray(x).tobytes())


def wide(x: Any) -> Any:
    x = np.asarray(x)
    return x.astype(np.complex128 if x.dtype.kind == "c" else np.float64)


def norms_of(gradient: Any, before: Any, after: Any) -> tuple[float, float, float]:
    parts = (wide(gradient), wide(after) - wide(before), wide(after))
    first, update, last = (math.sqrt(math.fsum((abs(x.ravel()) ** 2).tolist())) for x in parts)
    return first, update, last


def skip_unless_accepted(name: str, dtype: Any) -> None:
    if name in ("Adafactor", "Muon") and np.dtype(dtype).kind == "c":
        pytest.skip("takes no complex numbers")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", DENSE)
def test_the_bits_of_a_separate_update(name: str, dtype: Any) -> None:
    skip_unless_accepted(name, dtype)
    for kind, options in AVERAGES.items():
        rng = np.random.default_rng(1)
        start = [draw(rng, shape, dtype) for shape in shapes_for(name)]
        one, two = [p.copy() for p in start], [p.copy() for p in start]
        opt, twin = getattr(roptim, name)(one), getattr(roptim, name)(two)
        average, other = AveragedModel(one, **options()), AveragedModel(two, **options())
        for at in range(5):
            gradients = [draw(rng, p.shape, dtype) for p in start]
            if at in (1, 3):
                gradients[at] = None
            before = [p.copy() for p in two]
            opt.step(gradients, average=average, statistics=True)
            twin.step(gradients)
            other.update_parameters(two)
            assert average.n_averaged == other.n_averaged == at + 1
            for a, b in zip([*one, *average.module], [*two, *other.module], strict=True):
                assert bits(a) == bits(b), (kind, at)
            assert fingerprint([opt]) == fingerprint([twin])
            assert opt.statistics is not None
            found = opt.statistics.by_parameter
            assert list(found) == [i for i, g in enumerate(gradients) if g is not None]
            for i, norms in found.items():
                assert isinstance(i, int)
                assert np.allclose(norms, norms_of(gradients[i], before[i], two[i]), rtol=1e-12, atol=0)
            total = [math.sqrt(sum(getattr(n, key) ** 2 for n in found.values())) for key in roptim.Norms._fields]
            assert np.allclose(opt.statistics.total, total, rtol=1e-12, atol=0)
        twin.step(gradients)
        assert twin.statistics is None


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["equal", "exponential"])
def test_layouts(layout: str, kind: str) -> None:
    rng = np.random.default_rng(2)
    start = [draw(rng, (7, 5)), draw(rng, (300, 4))]
    one, two = [laid_out(p, layout) for p in start], [p.copy() for p in start]
    opt, twin = AdamW(one), AdamW(two)
    average, other = AveragedModel(one, **AVERAGES[kind]()), AveragedModel(two, **AVERAGES[kind]())
    for _ in range(3):
        gradients = [draw(rng, p.shape) for p in start]
        opt.step([laid_out(g, layout) for g in gradients], average=average, statistics=True)
        twin.step(gradients, statistics=True)
        other.update_parameters(two)
        assert [bits(a) for a in average.module] == [bits(a) for a in other.module]
        assert opt.statistics == twin.statistics


@pytest.mark.parametrize("name", ["AdamW", "Adafactor"])
def test_threads_and_tasks_change_no_bit(name: str) -> None:
    rng = np.random.default_rng(3)
    start = [draw(rng, (n,)) for n in (5, 100_001, 4096, 8191, 4097, 1)]
    gradients = [draw(rng, p.shape) for p in start]
    found = []
    for threads in (1, 2, 5):
        params = [p.copy() for p in start]
        opt = getattr(roptim, name)(params, threads=threads)
        average = AveragedModel(params, threads=threads)
        for _ in range(2):
            opt.step(gradients, average=average, statistics=True)
        found.append((opt.statistics, [bits(p) for p in params], [bits(a) for a in average.module]))
    assert found[0] == found[1] == found[2]
    # One array's norms do not depend on what it is stepped with.
    alone = getattr(roptim, name)([start[1].copy()])
    alone.step([gradients[1]], statistics=True)
    alone.step([gradients[1]], statistics=True)
    assert alone.statistics is not None
    assert found[0][0] is not None
    assert alone.statistics.by_parameter[0] == found[0][0].by_parameter[1]


def test_what_the_norms_are_of() -> None:
    p = np.array([3.0, 4.0])
    opt = SGD({"w": p}, lr=0.5, clip_norm=1.0)
    assert opt.statistics is None
    opt.grad_scale = 4.0
    opt.step({"w": np.array([0.0, 40.0])}, statistics=True)
    assert opt.statistics is not None
    norms = opt.statistics.by_parameter["w"]
    assert norms == opt.statistics.total
    # Before clipping, without the scale; the update is of what was clipped.
    assert (norms.gradient, norms.parameter) == (10.0, math.sqrt(9 + p[1] ** 2))
    assert math.isclose(norms.update, 0.5, rel_tol=1e-6)
    assert norms.ratio == norms.update / norms.parameter
    assert roptim.Norms(1.0, 1.0, 0.0).ratio == math.inf
    assert math.isnan(roptim.Norms(0.0, 0.0, 0.0).ratio)
    opt.step({"w": None}, statistics=True)
    assert opt.statistics is None


def test_extreme_numbers() -> None:
    p, g = np.full(128, 1e19, np.float32), np.full(128, 1e19, np.float32)
    opt = SGD([p], lr=0.0)
    opt.step([g], statistics=True)
    assert opt.statistics is not None
    assert math.isclose(opt.statistics.total.gradient, 1e19 * math.sqrt(128), rel_tol=1e-6)
    big = SGD([np.full(2, 1e200)], lr=0.0)
    big.step([np.full(2, np.nan)], statistics=True)
    assert big.statistics is not None
    assert math.isnan(big.statistics.total.gradient)
    assert math.isnan(big.statistics.total.parameter)
    big = SGD([np.full(2, 1e200)], lr=0.0)
    big.step([np.zeros(2)], statistics=True)
    assert big.statistics is not None
    assert big.statistics.total == (0.0, 0.0, math.inf)


@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
def test_an_update_that_is_left_out(nonfinite: str) -> None:
    p = np.ones(3, np.float32)
    opt, average = SGD([p], lr=1.0, nonfinite=nonfinite), AveragedModel([p])
    bad = [np.array([np.nan, 0, 0], np.float32)]
    if nonfinite == "raise":
        before = fingerprint([p, opt, average.state_dict()])
        with pytest.raises(NonfiniteError):
            opt.step(bad, average=average, statistics=True)
        assert fingerprint([p, opt, average.state_dict()]) == before
        return
    opt.step([np.ones(3, np.float32)], average=average, statistics=True)
    assert opt.statistics is not None
    opt.step(bad, average=average, statistics=True)
    assert opt.statistics is None
    assert opt.skip_count == 1
    # As a separate update: the parameters as they are join.
    assert average.n_averaged == 2
    assert not average.module[0].any()


@pytest.mark.parametrize("name", ["SGD", "SparseAdam"])
def test_sparse_gradients(name: str) -> None:
    rng = np.random.default_rng(4)
    start = rng.standard_normal((50, 3)).astype(np.float32)
    one, two = start.copy(), start.copy()
    opt, twin = getattr(roptim, name)([one]), getattr(roptim, name)([two])
    average, other = AveragedModel([one]), AveragedModel([two])
    for _ in range(3):
        g = SparseGrad([3, 40, 7], rng.standard_normal((3, 3)).astype(np.float32), (50, 3))
        before = two.copy()
        opt.step([g], average=average, statistics=True)
        twin.step([g])
        other.update_parameters([two])
        assert bits(one) == bits(two)
        assert bits(average.module[0]) == bits(other.module[0])
        assert opt.statistics is not None
        assert np.allclose(opt.statistics.total, norms_of(g.values, before, two), rtol=1e-12)


@pytest.mark.parametrize("device", [{}, {"backend": "gpu", "allow_software": True}])
def test_parameters_gradients_and_sums(device: dict[str, Any], gpu: str) -> None:
    """Parameters with ``.grad``, sums of gradients, cleared gradients, groups, wherever the parameters live."""
    rng = np.random.default_rng(5)
    start = [draw(rng, (4, 5)), draw(rng, (70,)), draw(rng, (2,))]
    sides = []
    for fused in (True, False):
        params = [Parameter(p.copy()) for p in start]
        frozen = params[2]
        frozen.requires_grad = False
        opt = Adam([{"params": params[:1]}, {"params": params[1:], "lr": 0.1}], **device)
        average = AveragedModel(params, avg_fn=get_ema_avg_fn(0.5))
        sides.append((fused, params, opt, average))
    for at in range(4):
        gradients = [draw(rng, p.shape) for p in start[:2]]
        for fused, params, opt, average in sides:
            arguments: dict[str, Any] = {"average": average} if fused else {}
            if at == 1:
                opt.accumulate([*gradients, None])
                opt.accumulate([*gradients, None])
                opt.step(zero_grad=True, **arguments)
            else:
                for p, g in zip(params[:2], gradients, strict=True):
                    p.grad = g.copy()
                opt.step(zero_grad=not device, **arguments)
                assert bool(device) or not any(p.grad.any() for p in params[:2])
            if not fused:
                average.update_parameters(params)
        (_, one, _, average), (_, two, _, other) = sides
        for a, b in zip([*one, *average.module], [*two, *other.module], strict=True):
            assert bits(np.asarray(a)) == bits(np.asarray(b)), at


def test_a_gpu_takes_no_statistics(gpu: str) -> None:
    p = np.ones(3, np.float32)
    opt = SGD([p], backend=gpu, allow_software=True)
    with pytest.raises(ValueError, match=r"SGD\.step: statistics must be of steps on the CPU"):
        opt.step([p.copy()], statistics=True)
    assert opt.update_count == 0
    assert (p == 1).all()


def test_an_average_on_a_gpu_joins_after_the_step(gpu: str) -> None:
    p = np.ones(3, np.float32)
    average = AveragedModel([p], gpu, allow_software=True)
    SGD([p], lr=1.0).step([np.ones(3, np.float32)], average=average)
    assert average.n_averaged == 1
    assert not np.asarray(average.module[0]).any()


def test_closures_and_hooks() -> None:
    w = np.array([3.0])
    opt, average = LBFGS([w], max_iter=5), AveragedModel([w])
    seen: list[Any] = []
    opt.register_step_post_hook(lambda opt, args, kwargs: seen.append(sorted(kwargs)))
    opt.step(lambda: (float(w[0] ** 2), [2 * w]), average=average)
    assert average.n_averaged == 1
    assert average.module[0] == w[0] != 3.0
    assert seen == [["average"]]
    with pytest.raises(ValueError, match=r"LBFGS\.step: statistics must be False"):
        opt.step(lambda: (0.0, [w]), statistics=True)
    adam, seen = Adam([w]), []
    adam.register_step_pre_hook(lambda opt, args, kwargs: seen.append(kwargs["statistics"]))
    adam.step([w.copy()], statistics=True, average=AveragedModel([w]))
    assert seen == [True]
    assert adam.statistics is not None


def test_an_optimizer_written_in_python_has_none() -> None:
    class Own(Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {})

    assert Own([np.ones(1)]).statistics is None


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (lambda p: [p], TypeError, "average must be an AveragedModel, got an object of type list"),
        (lambda p: AveragedModel([p, p.copy()]), ValueError, "average must be of 1 parameters"),
        (lambda p: AveragedModel([np.ones(4, np.float32)]), ValueError, r"float32 of shape \(3,\)"),
        (lambda p: AveragedModel([np.ones(3)]), ValueError, "got float64"),
        (lambda p: AveragedModel([p], buffers=[np.ones(1)]), ValueError, "must be one without buffers"),
        (lambda p: SGD([p]), TypeError, "got an object of type SGD"),
    ],
)
@pytest.mark.parametrize("name", ["SGD", "Adafactor", "LBFGS"])
def test_refused_averages(name: str, wrong: Callable[[Any], Any], error: type[Exception], message: str) -> None:
    p = np.ones(3, np.float32)
    opt = getattr(roptim, name)([p])
    before = fingerprint([p, opt])
    given = (lambda: (0.0, [p.copy()])) if name == "LBFGS" else [p.copy()]
    with pytest.raises(error, match=message):
        opt.step(given, average=wrong(p))
    assert fingerprint([p, opt]) == before


@pytest.mark.parametrize("value", [1, "yes", np.ones(2), [True]])
def test_statistics_is_a_switch(value: Any) -> None:
    with pytest.raises(TypeError, match="statistics must be True or False"):
        SGD([np.ones(1)]).step([np.ones(1)], statistics=value)


def test_memory_of_the_average_is_its_own() -> None:
    p = np.ones(3, np.float32)
    average = AveragedModel([p])
    opt = SGD([p], lr=1.0)
    with pytest.raises(
        ValueError, match="gradient of parameter 0 must be memory of its own, got memory of the average"
    ):
        opt.step([average.module[0]], average=average)
    with pytest.raises(ValueError, match="parameter 0 must be memory of its own, got memory of the average"):
        SGD([average.module[0]]).step([p], average=average)
    assert average.n_averaged == 0
    assert (p == 1).all()
    # Without the average it is an array like others.
    opt.step([average.module[0]])
    assert not p.any()


def test_an_average_of_two_optimizers_and_one_that_changed_its_count() -> None:
    """An average may follow now this optimizer, now that, and begin anew; and copies go on."""
    rng = np.random.default_rng(6)
    start = rng.standard_normal(9)
    one, two = start.copy(), start.copy()
    averages = [AveragedModel([one]), AveragedModel([two])]
    pairs = [(SGD([one], lr=0.1), SGD([two], lr=0.1)), (Adam([one]), Adam([two]))]
    for at in range(8):
        g = rng.standard_normal(9)
        opt, twin = pairs[at % 2]
        opt.step([g], average=averages[0])
        twin.step([g])
        averages[1].update_parameters([two])
        if at == 3:
            averages[0].n_averaged = averages[1].n_averaged = 0
        if at == 5:
            averages = [copy.deepcopy(average) for average in averages]
        assert bits(averages[0].module[0]) == bits(averages[1].module[0])


def test_one_thread_at_a_time() -> None:
    p = np.ones(3)
    opt, average = SGD([p]), AveragedModel([p])

    class Meddling(list[float]):
        """A gradient whose conversion uses the average meanwhile."""

        def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
            with pytest.raises(ConcurrentStepError):
                average.update_parameters([np.ones(3)])
            raise RuntimeError("the average is in use")

    with pytest.raises((TypeError, RuntimeError)):
        opt.step([Meddling()], average=average)
    assert (p == 1).all()
    assert opt.update_count == 0
    opt.step([np.ones(3)], average=average)
    assert average.n_averaged == 1


def test_sparse_adam_has_averages_too() -> None:
    p = np.ones((4, 2))
    average = AveragedModel([p])
    SparseAdam([p]).step([SparseGrad([1], np.ones((1, 2)), (4, 2))], average=average, statistics=True)
    assert (average.module[0] == p).all()


@pytest.mark.parametrize("names", [True, False])
@pytest.mark.parametrize("name", ["AdamW", "LBFGS"])
def test_groups_in_another_order(name: str, names: bool) -> None:
    """Weights and biases in groups of their own: averages keep to what they are averages of."""
    rng = np.random.default_rng(7)
    keys = ["w1", "b1", "w2", "b2"]
    start = {key: rng.standard_normal(4) for key in keys}
    sides = []
    for _ in range(2):
        model = {key: value.copy() for key, value in start.items()}
        groups: list[Any] = [{key: model[key] for key in keys if key[0] == kind} for kind in "wb"]
        if not names:
            groups = [list(group.values()) for group in groups]
        params = [{"params": group} for group in groups] if name == "AdamW" else [model[k] for k in reversed(keys)]
        average = AveragedModel(model if names else list(model.values()))
        sides.append((model, getattr(roptim, name)(params), average))
    for _ in range(3):
        gradients = [rng.standard_normal(4) for _ in keys]
        for i, (model, opt, average) in enumerate(sides):
            given: Any = gradients if name == "AdamW" else functools.partial(lambda g: (0.0, g), gradients)
            opt.step(given, **({"average": average} if i == 0 else {}))
            if i:
                average.update_parameters(model if names else list(model.values()))
        (one, _, within), (two, _, after) = sides
        for key in keys:
            assert bits(one[key]) == bits(two[key])
            at: Any = key if names else keys.index(key)
            assert bits(within.module[at]) == bits(after.module[at])
    assert within.n_averaged == after.n_averaged == 3


def test_names_tell_apart_where_the_arrays_are_others() -> None:
    model = {"w": np.zeros(2), "b": np.ones(2)}
    average = AveragedModel({key: value.copy() for key, value in model.items()})
    opt = SGD([{"params": {"b": model["b"]}}, {"params": {"w": model["w"]}}], lr=0.0)
    opt.step([np.zeros(2), np.zeros(2)], average=average)
    assert average.module["w"].tolist() == [0, 0]
    assert average.module["b"].tolist() == [1, 1]
    # A copy of the average does not know the arrays, but the names.
    copied = copy.deepcopy(average)
    opt.step([np.zeros(2), np.zeros(2)], average=copied)
    assert (copied.n_averaged, average.n_averaged) == (2, 1)
    assert copied.module["b"].tolist() == [1, 1]


def test_frozen_averages_are_averaged() -> None:
    params = [Parameter(np.ones(2, np.float32)), Parameter(np.ones(2, np.float32))]
    averages = [AveragedModel(params) for _ in range(2)]
    for average in averages:
        for p in average.module:
            p.requires_grad = False
    opt = SGD(params, lr=1.0)
    for p in params:
        p.grad = np.ones(2, np.float32)
    opt.step(average=averages[0])
    averages[1].update_parameters(params)
    for average in averages:
        assert [np.asarray(a).tolist() for a in average.module] == [[0, 0], [0, 0]]


@pytest.mark.parametrize("name", ["SGD", "LBFGS"])
@pytest.mark.parametrize("way", ["gradients", "sums", "own function"])
def test_an_average_that_cannot_be_written_is_refused_before_the_step(name: str, way: str) -> None:
    p = np.ones(3)
    average = AveragedModel([p], **({"avg_fn": own} if way == "own function" else {}))
    average.module[0].flags.writeable = False
    opt = getattr(roptim, name)([p])
    given: Any = [np.ones(3)]
    if name == "LBFGS":
        given = lambda: (0.0, [np.ones(3)])  # noqa: E731  # one of two forms of the same argument
    elif way == "sums":
        opt.accumulate(given)
        given = None
    for _ in range(2):
        with pytest.raises(ValueError, match="writeable"):
            opt.step(given, average=average)
        assert (p == 1).all()
        assert (opt.update_count, average.n_averaged) == (0, 0)
    average.module[0].flags.writeable = True
    opt.step(given, average=average)
    assert average.n_averaged == 1


def test_a_large_table_of_which_few_rows_have_gradients() -> None:
    rng = np.random.default_rng(8)
    table, other = rng.standard_normal((3000, 20)), rng.standard_normal(5)
    before = table.copy()
    opt = SGD([table, other], lr=0.5)
    g = SparseGrad([2999, 5], rng.standard_normal((2, 20)), (3000, 20))
    opt.step([g, np.ones(5)], statistics=True)
    assert opt.statistics is not None
    assert np.allclose(opt.statistics.by_parameter[0], norms_of(g.values, before, table), rtol=1e-12)
    assert math.isclose(opt.statistics.by_parameter[1].update, 0.5 * math.sqrt(5))
