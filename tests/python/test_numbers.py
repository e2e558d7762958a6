"""Numbers against independent references and against recorded runs of torch."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from helpers import Case, load_cases, relative_error
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import roptim
from reference import reference
from roptim.optimizer import REGISTRY

# What takes a closure is compared in test_closure.py.
NAMES = [name for name, entry in REGISTRY.items() if not entry["needs_closure"]]
# torch's runs are recorded for all but SparseAdam, whose rows the reference follows.
STEMS = [name.lower() for name in NAMES if name != "SparseAdam"]
# Where roptim is deliberately more exact than torch, what torch's own rounding leaves of agreement: it keeps
# NAdam's mu_product and ASGD's eta and mu in float32 (relative error up to (2t - 1)·2⁻²⁴ and 2⁻²⁴), which
# enters float64 parameters through their coefficients.
SCALARS = {"mu_product": 5e-6, "eta": 1e-7, "mu": 1e-7}
FLOAT64 = {"NAdam": 5e-9, "ASGD": 2e-7}


def cases(exact: bool) -> list[Any]:
    return [pytest.param(case, id=case.name) for stem in STEMS for case in load_cases(stem, exact)]


def replay(case: Case, compare: Any, **kwargs: Any) -> None:
    """Runs a recorded case and hands parameters and state to ``compare`` at each checkpoint."""
    params = [p.copy() for p in case.p0]
    # torch makes Adagrad's state in its constructor, at step 0.
    eager = case.optimizer == "Adagrad"
    opt = getattr(roptim, case.optimizer)(params, **case.kwargs, **kwargs)
    for step in range(1, case.steps + 1):
        opt.step(case.gradients(step))
        if step in case.checkpoints:
            for i, want in enumerate(case.params(step)):
                compare(f"parameter {i} after step {step}", params[i], want, case.p0[i])
            for i, entry in enumerate(case.state(step)):
                if eager and i not in opt.state:
                    assert entry["step"] == 0
                    continue
                assert list(opt.state[i]) == list(entry), f"state keys of parameter {i}"
                for key, want in entry.items():
                    if key in SCALARS:
                        assert relative_error(opt.state[i][key], want, want) <= SCALARS[key], key
                        continue
                    # A moment of one number can be the small difference of large gradients: the parameter's
                    # own size is the scale, as for the parameter. The exact traces compare its bits.
                    scale = np.maximum(np.abs(want).mean(), np.abs(case.p0[i]).mean())
                    compare(f"{key} of parameter {i} after step {step}", np.asarray(opt.state[i][key]), want, scale)


def within(tolerance: float) -> Any:
    def compare(what: str, got: Any, want: Any, scale: Any) -> None:
        error = relative_error(got, want, scale)
        assert error <= tolerance, f"{what}: {error:.2e}"

    return compare


def identical(what: str, got: Any, want: Any, _: Any) -> None:
    assert np.array_equal(got, want), f"{what}: {np.sum(got != want)} of {got.size} differ"


def recorded_muon(case: Case) -> None:
    """torch iterates in bfloat16, so the distance travelled is the measure; the first steps, over which the
    rounding of single iterations has not averaged out, are allowed 8 % of it."""
    params = [p.copy() for p in case.p0]
    opt = roptim.Muon(params, **case.kwargs)
    for step in range(1, case.steps + 1):
        opt.step(case.gradients(step))
        if step in case.checkpoints:
            for p, want, p0 in zip(params, case.params(step), case.p0, strict=True):
                assert np.abs(p - want).max() <= (0.03 if step >= 8 else 0.08) * np.abs(want - p0).max()
            for i, entry in enumerate(case.state(step)):
                want = entry["momentum_buffer"]
                assert relative_error(opt.state[i]["momentum_buffer"], want, want) <= 1e-6


@pytest.mark.parametrize("case", cases(exact=True))
def test_exact_traces(case: Case) -> None:
    """torch without FMA and with a correctly rounded square root: float32 bit for bit, float64 to 1e-13.

    Sums of whole tensors (Adafactor) agree to rounding only.
    """
    if case.optimizer == "Muon":
        recorded_muon(case)
    elif case.dtype == np.float64:
        replay(case, within(FLOAT64.get(case.optimizer, 1e-13)))
    else:
        replay(case, within(1e-6) if case.optimizer == "Adafactor" else identical)


@pytest.mark.parametrize("case", cases(exact=False))
def test_plain_traces(case: Case) -> None:
    """torch as installed: its FMA and its square root put it a few ulp per step away."""
    if case.optimizer == "Muon":
        recorded_muon(case)
    else:
        replay(case, within(1e-5 if case.dtype == np.float32 else FLOAT64.get(case.optimizer, 1e-13)))


FLOAT64_CASES = [p for p in cases(exact=True) if p.values[0].dtype == np.float64]


@pytest.mark.parametrize("case", FLOAT64_CASES)
def test_recorded_runs_against_the_reference(case: Case) -> None:
    for i, p0 in enumerate(case.p0):
        gradients = [case.gradient(step, i) for step in range(1, case.steps + 1)]
        trajectory, _ = reference(case.optimizer)(p0, gradients, **case.kwargs)
        p = p0.copy()
        opt = getattr(roptim, case.optimizer)([p], **case.kwargs)
        for g, want in zip(gradients, trajectory, strict=True):
            opt.step([g])
            assert relative_error(p, want, p0) <= 1e-12


HYPERS = {
    "SGD": st.fixed_dictionaries(
        {
            "lr": st.floats(0, 1),
            "momentum": st.sampled_from([0.0, 0.5, 0.9]),
            "weight_decay": st.sampled_from([0.0, 0.1]),
            "maximize": st.booleans(),
        },
        optional={"dampening": st.sampled_from([0.0, 0.3])},
    ),
    "Adam": st.fixed_dictionaries(
        {
            "lr": st.floats(0, 1),
            "betas": st.tuples(st.sampled_from([0.0, 0.3, 0.9]), st.sampled_from([0.5, 0.99, 0.999])),
            "eps": st.sampled_from([1e-8, 1e-3]),
            "weight_decay": st.sampled_from([0.0, 0.1]),
            "amsgrad": st.booleans(),
            "maximize": st.booleans(),
        }
    ),
}
HYPERS["AdamW"] = HYPERS["Adam"]
MOMENTS = {
    "lr": st.floats(0, 1),
    "betas": st.tuples(st.sampled_from([0.0, 0.3, 0.9]), st.sampled_from([0.5, 0.9, 0.999])),
    "eps": st.sampled_from([1e-8, 1e-3]),
    "weight_decay": st.sampled_from([0.0, 0.1]),
    "maximize": st.booleans(),
}
HYPERS["Adamax"] = st.fixed_dictionaries(MOMENTS)
HYPERS["RAdam"] = st.fixed_dictionaries({**MOMENTS, "decoupled_weight_decay": st.booleans()})
HYPERS["Adadelta"] = st.fixed_dictionaries(
    {
        "lr": st.floats(0, 1),
        "rho": st.sampled_from([0.0, 0.5, 0.9]),
        "eps": st.sampled_from([1e-6, 1e-3]),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "maximize": st.booleans(),
    }
)


HYPERS["Adagrad"] = st.fixed_dictionaries(
    {
        "lr": st.floats(0, 1),
        "lr_decay": st.sampled_from([0.0, 0.1]),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "initial_accumulator_value": st.sampled_from([0.0, 0.5]),
        "eps": st.sampled_from([1e-10, 1e-3]),
        "maximize": st.booleans(),
    }
)
HYPERS["RMSprop"] = st.fixed_dictionaries(
    {
        "lr": st.floats(0, 1),
        "alpha": st.sampled_from([0.3, 0.9, 0.99]),
        "eps": st.sampled_from([1e-6, 1e-3]),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "momentum": st.sampled_from([0.0, 0.9]),
        "centered": st.booleans(),
        "maximize": st.booleans(),
    }
)
HYPERS["Rprop"] = st.fixed_dictionaries(
    {
        "lr": st.floats(1e-3, 1),
        "etas": st.tuples(st.sampled_from([0.2, 0.5]), st.sampled_from([1.1, 1.5])),
        "step_sizes": st.sampled_from([(1e-6, 50), (1e-2, 0.5)]),
        "maximize": st.booleans(),
    }
)
HYPERS["NAdam"] = st.fixed_dictionaries(
    {
        **MOMENTS,
        "momentum_decay": st.sampled_from([0.0, 4e-3, 0.1]),
        "decoupled_weight_decay": st.booleans(),
    }
)
HYPERS["ASGD"] = st.fixed_dictionaries(
    {
        "lr": st.floats(0, 1),
        "lambd": st.sampled_from([0.0, 1e-4, 0.1]),
        "alpha": st.sampled_from([0.5, 0.75]),
        "t0": st.sampled_from([0.0, 2.0, 1e6]),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "maximize": st.booleans(),
    }
)
HYPERS["Adafactor"] = st.fixed_dictionaries(
    {
        "lr": st.floats(0, 1),
        "beta2_decay": st.sampled_from([-0.8, -0.5]),
        "eps": st.sampled_from([(None, 1e-3), (1e-8, 1e-2)]),
        "d": st.sampled_from([1.0, 2.0]),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "maximize": st.booleans(),
    }
)
HYPERS["Muon"] = st.fixed_dictionaries(
    {
        "lr": st.floats(0, 1),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "momentum": st.sampled_from([0.5, 0.95]),
        "nesterov": st.booleans(),
        "ns_steps": st.integers(0, 5),
        "adjust_lr_fn": st.sampled_from([None, "original", "match_rms_adamw"]),
    }
)
HYPERS["SparseAdam"] = st.fixed_dictionaries(
    {
        "lr": st.floats(1e-3, 1),
        "betas": st.tuples(st.sampled_from([0.0, 0.9]), st.sampled_from([0.5, 0.999])),
        "eps": st.sampled_from([1e-8, 1e-3]),
        "maximize": st.booleans(),
    }
)


def contained(data: st.DataObject, items: list[Any]) -> Any:
    """A function that puts as many items into one random container, again and again."""

    def build(first: int, count: int, depth: int) -> Any:
        if count == 1 and depth > 0 and (depth > 2 or data.draw(st.booleans())):
            return lambda items: items[first]
        cuts = sorted(data.draw(st.sets(st.integers(1, count - 1), max_size=3))) if count > 1 else []
        ends = [0, *cuts, count]
        parts = [
            build(first + low, high - low, depth + 1)
            if depth < 3 or high - low == 1
            else (lambda items, low=low, high=high: items[first + low : first + high])
            for low, high in itertools.pairwise(ends)
        ]
        kind = data.draw(st.sampled_from(["list", "tuple", "dict"]))
        if kind == "dict":
            return lambda items: {f"k{i}": part(items) for i, part in enumerate(parts)}
        return lambda items: (list if kind == "list" else tuple)(part(items) for part in parts)

    return build(0, len(items), 0)


def laid_out(data: st.DataObject, values: Any) -> Any:
    """The same numbers in a random layout."""
    axes = data.draw(st.permutations(range(values.ndim)))
    steps = [data.draw(st.sampled_from([1, 2, -1])) for _ in axes]
    big = np.full([values.shape[axis] * abs(step) for axis, step in zip(axes, steps, strict=True)], np.nan)
    view = big[tuple(slice(None, None, step) for step in steps)].transpose(np.argsort(axes)) if axes else big
    view[...] = values
    return view


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
def test_random_trees_against_the_reference(name: str, data: st.DataObject) -> None:
    """Random shapes and layouts in a random container with random hyperparameters."""
    kwargs = data.draw(HYPERS[name])
    shapes = data.draw(
        st.lists(
            hnp.array_shapes(
                min_dims={"Muon": 2, "SparseAdam": 1}.get(name, 0),
                max_dims=2 if name == "Muon" else 3,
                min_side=0,
                max_side=4,
            ),
            min_size=1,
            max_size=4,
        )
    )
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    start = [np.asarray(rng.standard_normal(shape)) for shape in shapes]
    params = [laid_out(data, p) for p in start]
    container = contained(data, params)
    opt = getattr(roptim, name)(container(params), **kwargs)

    def gradient(shape: tuple[int, ...]) -> Any:
        if data.draw(st.integers(0, 5)) == 0:
            return None
        if name != "SparseAdam":
            return np.asarray(rng.standard_normal(shape))
        rows = data.draw(st.lists(st.integers(0, shape[0] - 1), max_size=5)) if shape[0] else []
        return np.array(rows, np.int64), rng.standard_normal((len(rows), *shape[1:]))

    def given_as(g: Any, p: Any) -> Any:
        if g is None:
            return None
        return roptim.SparseGrad(*g, p.shape) if isinstance(g, tuple) else laid_out(data, g)

    gradients: list[list[Any]] = [[gradient(p.shape) for p in start] for _ in range(6)]
    for row in gradients:
        opt.step(container([given_as(g, p) for g, p in zip(row, start, strict=True)]))
    for i, p0 in enumerate(start):
        trajectory, state = reference(name)(p0, [row[i] for row in gradients], **kwargs)
        assert relative_error(params[i], trajectory[-1], p0) <= 1e-11
        for key, want in state.items():
            if all(row[i] is None for row in gradients):
                continue
            assert relative_error(np.asarray(opt.state[i][key]), want, want) <= 1e-10, key


def test_the_references_cover_the_registry() -> None:
    for name in REGISTRY:
        assert callable(reference(name))
    assert sum(len(list(load_cases(stem, True))) for stem in STEMS) == 100
    assert all(any(load_cases(stem, False)) for stem in STEMS)
