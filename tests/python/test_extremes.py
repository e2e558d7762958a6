"""Numbers at the ends: gradients that are not finite at every place, counts up to the largest, and threads whose
arithmetic flushes subnormal numbers."""

from __future__ import annotations

import copy
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from helpers import fingerprint, relative_error, step

import roptim
from roptim import NonfiniteError, _roptim
from roptim.optimizer import REGISTRY

mpmath = pytest.importorskip("mpmath")
mpf = mpmath.mpf

#: Whether the long forms run.
FULL = os.environ.get("ROPTIM_FULL_TESTS") == "1"
NAMES = [name for name, entry in REGISTRY.items() if not entry["needs_closure"]]
CLOSURES = [name for name, entry in REGISTRY.items() if entry["needs_closure"]]
DTYPES: list[Any] = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64, np.complex64, np.complex128]
BAD = [math.nan, math.inf, -math.inf]
#: Of parameters after two steps, against float64: what the dtype of parameters leaves.
TOLERANCES = {2: 2e-2, 4: 2e-5, 8: 1e-12}


def accepts(name: str, dtype: Any) -> bool:
    try:
        getattr(roptim, name)([np.ones((2, 2), dtype)])
    except roptim.RoptimTypeError:
        assert np.dtype(dtype).kind == "c"
        return False
    return True


CASES = [pytest.param(name, dtype, id=f"{name}-{dtype.__name__}") for name in NAMES for dtype in DTYPES]


def drawn(shape: tuple[int, ...], dtype: Any, seed: int) -> Any:
    """Numbers of magnitude 0.5 to 1.5 of either sign."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(0.5, 1.5, (2, *shape)) * rng.choice([-1, 1], (2, *shape))
    return (x[0] + 1j * x[1]).astype(dtype) if np.dtype(dtype).kind == "c" else x[0].astype(dtype)


def spoiled(g: Any, at: int, bad: float, part: str) -> Any:
    """A copy with one number of another value, in the real or the imaginary part."""
    g = g.copy()
    target = g.reshape(-1)
    if g.dtype.kind == "c":
        getattr(target, part)[at] = bad
    else:
        target[at] = bad
    return g


# ---- what the formulas make of it ---------------------------------------------------------------------------

# One plain recurrence each, in NumPy's float64, at the registry's defaults. The references of tests/reference are
# explicit sums over all steps, in which a weight of zero would spread NaN.


def sgd(p: Any, g: Any, s: dict[str, Any], t: int) -> Any:
    return p - 1e-3 * g


def moments(g: Any, s: dict[str, Any], t: int) -> tuple[Any, Any]:
    s["m"] = s.get("m", p_like(g)) * 0.9 + 0.1 * g
    s["v"] = s.get("v", p_like(g)) * 0.999 + 0.001 * g * g
    return s["m"], s["v"]


def p_like(g: Any) -> Any:
    return np.zeros_like(g)


def adam(p: Any, g: Any, s: dict[str, Any], t: int) -> Any:
    m, v = moments(g, s, t)
    return p - 1e-3 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)


def adamw(p: Any, g: Any, s: dict[str, Any], t: int) -> Any:
    return adam(p * (1 - 1e-3 * 1e-2), g, s, t)


def sparse_adam(p: Any, g: Any, s: dict[str, Any], t: int) -> Any:
    m, v = moments(g, s, t)
    return p - 1e-3 * math.sqrt(1 - 0.999**t) / (1 - 0.9**t) * m / (np.sqrt(v) + 1e-8)


def adadelta(p: Any, g: Any, s: dict[str, Any], t: int) -> Any:
    s["v"] = s.get("v", p_like(g)) * 0.9 + 0.1 * g * g
    u = np.sqrt(s.get("u", p_like(g)) + 1e-6) / np.sqrt(s["v"] + 1e-6) * g
    s["u"] = s.get("u", p_like(g)) * 0.9 + 0.1 * u * u
    return p - u


def adagrad(p: Any, g: Any, s: dict[str, Any], t: int) -> Any:
    s["v"] = s.get("v", p_like(g)) + g * g
    return p - 1e-2 * g / (np.sqrt(s["v"]) + 1e-10)


def adamax(p: Any, g: Any, s: dict[str, Any], t: int) -> Any:
    s["m"] = s.get("m", p_like(g)) * 0.9 + 0.1 * g
    s["u"] = np.maximum(s.get("u", p_like(g)) * 0.999, np.abs(g) + 1e-8)
    return p - 2e-3 / (1 - 0.9**t) * s["m"] / s["u"]


def asgd(p: Any, g: Any, s: dict[str, Any], t: int) -> Any:
    eta = 1e-2 / (1 + 1e-4 * 1e-2 * (t - 1)) ** 0.75
    return p * (1 - 1e-4 * eta) - eta * g


def nadam(p: Any, g: Any, s: dict[str, Any], t: int) -> Any:
    m, v = moments(g, s, t)
    now, following = (0.9 * (1 - 0.5 * 0.96 ** (k * 4e-3)) for k in (t, t + 1))
    s["product"] = s.get("product", 1.0) * now
    a = np.sqrt(v / (1 - 0.999**t)) + 1e-8
    p = p - 2e-3 * (1 - now) / (1 - s["product"]) * g / a
    return p - 2e-3 * following / (1 - s["product"] * following) * m / a


def radam(p: Any, g: Any, s: dict[str, Any], t: int) -> Any:
    m, _ = moments(g, s, t)
    assert t <= 5, "not rectified yet"
    return p - 1e-3 * m / (1 - 0.9**t)


def rmsprop(p: Any, g: Any, s: dict[str, Any], t: int) -> Any:
    s["v"] = s.get("v", p_like(g)) * 0.99 + 0.01 * g * g
    return p - 1e-2 * g / (np.sqrt(s["v"]) + 1e-8)


def rprop(p: Any, g: Any, s: dict[str, Any], t: int) -> Any:
    agreement = g * s.get("g", p_like(g))
    factor = np.where(agreement > 0, 1.2, np.where(agreement < 0, 0.5, 1.0))
    s["step"] = np.clip(s.get("step", np.full_like(g, 1e-2)) * factor, 1e-6, 50)
    s["g"] = np.where(agreement < 0, 0.0, g)
    # As torch's sign, which is 0 of what is neither above nor below zero.
    return p - ((s["g"] > 0) * 1.0 - (s["g"] < 0) * 1.0) * s["step"]


def adafactor(p: Any, g: Any, s: dict[str, Any], t: int) -> Any:
    weight, eps = t**-0.8, s["eps"]
    rate = max(1e-3, math.sqrt((p * p).mean())) * min(1e-2, 1 / math.sqrt(t))
    for key, axis in (("row", -1), ("column", -2)):
        mean = (g * g).mean(axis=axis, keepdims=True)
        s[key] = s.get(key, np.zeros_like(mean)) * (1 - weight) + weight * mean
    # `np.maximum` keeps NaN.
    v = s["row"] @ s["column"] / np.maximum(s["row"].mean(), eps)
    u = g / np.sqrt(np.maximum(v, eps * eps))
    return p - rate * u / max(1.0, math.sqrt((u * u).mean())) if np.isfinite(u).all() else p * math.nan


def muon(p: Any, g: Any, s: dict[str, Any], t: int) -> Any:
    s["m"] = 0.95 * s.get("m", p_like(g)) + 0.05 * g
    x = 0.05 * g + 0.95 * s["m"]
    transposed = x.shape[0] > x.shape[1]
    x = x.T if transposed else x
    x = x / max(math.sqrt((x * x).sum()), 1e-7) if np.isfinite(x).all() else x * math.nan
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
    x = x.T if transposed else x
    return p * (1 - 1e-3 * 0.1) - 1e-3 * math.sqrt(max(1, p.shape[0] / p.shape[1])) * x


RECURRENCES: dict[str, Callable[..., Any]] = {
    "SGD": sgd,
    "Adam": adam,
    "AdamW": adamw,
    "Adadelta": adadelta,
    "Adagrad": adagrad,
    "Adamax": adamax,
    "ASGD": asgd,
    "NAdam": nadam,
    "RAdam": radam,
    "RMSprop": rmsprop,
    "Rprop": rprop,
    "SparseAdam": sparse_adam,
    "Adafactor": adafactor,
    "Muon": muon,
}


def followed(name: str, p: Any, gradients: list[Any]) -> Any:
    """The recurrence in float64; complex numbers as pairs of reals."""
    is_complex = p.dtype.kind == "c"

    def wide(a: Any) -> Any:
        return a.astype(np.complex128).view(np.float64) if is_complex else a.astype(np.float64)

    eps = float(ml_dtypes.finfo(p.real.dtype).eps)
    state: dict[str, Any] = {"eps": eps} if name == "Adafactor" else {}
    x = wide(p)
    with np.errstate(all="ignore"):
        for t, g in enumerate(gradients, 1):
            x = RECURRENCES[name](x, wide(g), state, t)
    return x


def as_reals(p: Any) -> Any:
    return p.astype(np.complex128).view(np.float64) if p.dtype.kind == "c" else p.astype(np.float64)


# ---- gradients that are not finite --------------------------------------------------------------------------


def test_every_optimizer_that_takes_gradients_has_a_recurrence() -> None:
    assert list(RECURRENCES) == NAMES


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_not_finite_at_every_place(name: str, dtype: Any) -> None:
    """Every place of a small tensor, and the ends, the middle and the vector tail of a larger one; before the first
    step and between steps."""
    if not accepts(name, dtype):
        return
    parts = ("real", "imag") if np.dtype(dtype).kind == "c" else ("real",)
    larger = (37, 11)
    n = math.prod(larger)
    places = {(3, 4): range(12), larger: [0, n // 2, n - n % 16, n - 1]}
    for shape, at_places in places.items():
        start, good = drawn(shape, dtype, 1), drawn(shape, dtype, 2)

        def made(how: str, start: Any = start, good: Any = good) -> tuple[Any, Any]:
            q = start.copy()
            opt = getattr(roptim, name)({"other": np.ones((2, 2), dtype), "w": q}, nonfinite=how)
            step_named(opt, good)
            return opt, q

        raising, refused = made("raise")
        skipping, skipped = made("skip")
        before = fingerprint([raising, refused]), fingerprint([skipping.state_dict()["state"], skipped])
        for at in at_places:
            for bad in BAD if shape != larger or FULL else BAD[:2]:
                for part in parts:
                    g = spoiled(good, at, bad, part)
                    where = {"real": " in the real part", "imag": " in the imaginary part"}[part]
                    told = f"{'NaN' if math.isnan(bad) else bad}{where if len(parts) == 2 else ''} at flat index {at}"
                    with pytest.raises(NonfiniteError) as raised:
                        step_named(raising, g)
                    assert str(raised.value) == (
                        f'{name}.step: gradient of parameter "w" must be finite, got {told}; '
                        'nonfinite="skip" leaves such updates out'
                    )
                    step_named(skipping, g)
                    assert propagated(name, start, good, g)
        assert before == (fingerprint([raising, refused]), fingerprint([skipping.state_dict()["state"], skipped]))
        assert (raising.update_count, raising.skip_count, skipping.update_count) == (1, 0, 1)
        assert skipping.skip_count > 0
        for opt in (raising, skipping):
            step_named(opt, good)
        assert refused.tobytes() == skipped.tobytes()
        # A number of 16 bits may be too coarse for the step.
        assert np.dtype(dtype).itemsize == 2 or refused.tobytes() != start.tobytes()


def step_named(opt: Any, g: Any) -> None:
    """A step of "w" alone."""
    if REGISTRY[type(opt).__name__]["needs_sparse"]:
        g = roptim.SparseGrad(np.arange(len(g)), g, g.shape)
    opt.step({"other": None, "w": g})


def propagated(name: str, start: Any, good: Any, g: Any) -> bool:
    """Whether a step that lets it pass gives what the formula gives."""
    p = start.copy()
    opt = getattr(roptim, name)([p])
    step(opt, [good])
    step(opt, [g])
    assert (opt.update_count, opt.skip_count) == (2, 0)
    got, want = as_reals(p), followed(name, start, [good, g])
    tolerance = TOLERANCES[min(8, p.real.dtype.itemsize)]
    assert relative_error(got, want, as_reals(start)) <= (0.05 if name == "Muon" else tolerance)
    assert not np.isfinite(got).all() or name == "Rprop"  # which looks at signs
    return True


@pytest.mark.parametrize("name", CLOSURES)
@pytest.mark.parametrize("bad", BAD)
def test_a_first_evaluation_that_is_not_finite_moves_nothing(name: str, bad: float) -> None:
    for at in range(5):
        for loss in (1.0, bad):
            p = np.ones(5)
            opt = getattr(roptim, name)([p])
            g = spoiled(np.ones(5), at, bad, "real")
            opt.step(lambda loss=loss, g=g: (loss, [g]))
            assert (p == 1).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32, np.float64, np.complex64, np.complex128])
def test_squares_that_overflow_are_clipped(name: str, dtype: Any) -> None:
    """128 elements of 1e19: in float32 their squares are infinite."""
    if not accepts(name, dtype):
        return
    g = np.full((16, 8), 1e19).astype(dtype)
    norm = float(np.abs(g.reshape(-1)[0])) * math.sqrt(128)
    p = np.ones((16, 8), dtype)
    opt = getattr(roptim, name)([p], clip_norm=1.0, nonfinite="raise")
    step(opt, [g])
    assert opt.gradient_norm == pytest.approx(norm, rel=1e-14)
    assert np.isfinite(as_reals(p)).all()
    for key, value in opt.state[0].items():
        assert np.isfinite(as_reals(np.asarray(value))).all(), key
    by_hand = g.copy()
    assert roptim.clip_grad_norm_([by_hand], 1.0) == pytest.approx(norm, rel=1e-14)
    assert np.linalg.norm(as_reals(by_hand)) == pytest.approx(1.0, rel=1e-2)


# ---- counts -------------------------------------------------------------------------------------------------

LARGEST = 2**64 - 1
EDGES = [2, 255, 256, 257]
EDGES += [2**k + d for k in (24, 31, 32, 53) for d in (-1, 0, 1)] + [2**63 - 1, 2**63, 2**63 + 1, LARGEST]


def ulps(got: float, want: Any) -> float:
    """The distance in units of the last place of the larger number."""
    return float(abs(mpf(got) - want) / mpf(math.ulp(float(want))))


def correction(beta: float, t: int) -> Any:
    return 1 - mpf(beta) ** t


def at_count(name: str, t: int, state: dict[str, float], g: float, **kwargs: Any) -> tuple[float, Any]:
    """A parameter of 0 after update number t from this state before, by ``load_state_dict``; and the optimizer."""
    p = np.zeros((1, 1) if name == "Muon" else 1)
    opt = getattr(roptim, name)([p], **kwargs)
    gradient = np.full(p.shape, g)
    if t > 1:
        step(opt, [gradient])
        saved = opt.state_dict()
        entry = saved["state"][0]
        assert entry.keys() - {"step"} == state.keys()
        for key, value in state.items():
            entry[key] = value if isinstance(entry[key], float) else np.full(p.shape, value)
        entry["step"] = t - 1
        opt.load_state_dict(saved)
        p[...] = 0
    assert opt.state_dict()["state"].get(0, {"step": 0})["step"] == t - 1
    step(opt, [gradient])
    assert opt.state[0]["step"] == t
    return float(p.reshape(-1)[0]), opt


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.999, 0.9999, 1 - 2.0**-24, 1 - 2.0**-53, 1e-300, 5e-324])
def test_bias_corrections_at_the_edges_of_counts(beta: float) -> None:
    """To three units of the last place, reading them off included, which rounds once or twice.

    The moments are made to stay as they are, so that the parameter shows the corrections alone.
    """
    worst = 0.0
    still: dict[str, Any] = {"g": 1.0, "lr": 1.0}
    with mpmath.workprec(2000):
        for t in EDGES:
            first, _ = at_count(
                "Adamax",
                t,
                {"exp_avg": 1.0, "exp_inf": 1.0},
                eps=0.0,
                betas=(beta, 0.0),
                flush_denormals=False,
                **still,
            )
            worst = max(worst, ulps(-first, 1 / correction(beta, t)))
            second, _ = at_count(
                "SparseAdam", t, {"exp_avg": 1.0, "exp_avg_sq": 1.0}, eps=1e-300, betas=(0.0, beta), **still
            )
            worst = max(worst, ulps(-second, mpmath.sqrt(correction(beta, t))))
    assert worst <= 3.0


M, V, G, EPS = 0.2, 0.05, 0.3, 1e-8
BETA1, BETA2 = 0.9, 0.999


def averaged(m: float, v: float) -> tuple[Any, Any]:
    """Both moments after the update."""
    b1, b2 = mpf(BETA1), mpf(BETA2)
    return b1 * mpf(m) + (1 - b1) * mpf(G), b2 * mpf(v) + (1 - b2) * mpf(G) ** 2


def mp_adam(t: int, lr: float, m: float = M, v: float = V) -> Any:
    m, v = averaged(m, v)
    return -mpf(lr) * (m / correction(BETA1, t)) / (mpmath.sqrt(v / correction(BETA2, t)) + mpf(EPS))


def mp_sparse_adam(t: int, lr: float, m: float = M, v: float = V) -> Any:
    m, v = averaged(m, v)
    factor = mpmath.sqrt(correction(BETA2, t)) / correction(BETA1, t)
    return -mpf(lr) * factor * m / (mpmath.sqrt(v) + mpf(EPS))


def mp_adamax(t: int, lr: float, m: float = M, u: float = V) -> Any:
    m, _ = averaged(m, 0.0)
    return -mpf(lr) / correction(BETA1, t) * m / max(mpf(BETA2) * mpf(u), mpf(G) + mpf(EPS))


def mp_nadam(t: int, lr: float, m: float = M, v: float = V, product: float = 0.4) -> Any:
    m, v = averaged(m, v)
    now, following = (mpf(BETA1) * (1 - mpf("0.5") * mpf(0.96) ** (k * mpf(4e-3))) for k in (t, t + 1))
    product = mpf(product) * now
    a = mpmath.sqrt(v / correction(BETA2, t)) + mpf(EPS)
    return -mpf(lr) * ((1 - now) / (1 - product) * mpf(G) + following / (1 - product * following) * m) / a


def mp_radam(t: int, lr: float, m: float = M, v: float = V) -> Any:
    m, v = averaged(m, v)
    most = 2 / (1 - mpf(BETA2)) - 1
    rho = most - 2 * t * mpf(BETA2) ** t / correction(BETA2, t)
    step_size = mpf(lr) * m / correction(BETA1, t)
    if rho <= 5:
        return -step_size
    rectified = mpmath.sqrt((rho - 4) * (rho - 2) * most / ((most - 4) * (most - 2) * rho))
    return -step_size * rectified * mpmath.sqrt(correction(BETA2, t)) / (mpmath.sqrt(v) + mpf(EPS))


def mp_adagrad(t: int, lr: float, v: float = V) -> Any:
    return -mpf(lr) / (1 + (t - 1) * mpf(1e-3)) * mpf(G) / (mpmath.sqrt(mpf(v) + mpf(G) ** 2) + mpf(1e-10))


def mp_asgd(t: int, lr: float, v: float = 0.0) -> Any:
    return -mpf(lr) / (1 + mpf(1e-4) * mpf(lr) * (t - 1)) ** mpf(0.75) * mpf(G)


def mp_adafactor(t: int, lr: float, v: float = V) -> Any:
    weight = mpf(t) ** mpf(-0.8)
    v = (1 - weight) * mpf(v) + weight * mpf(G) ** 2
    u = mpf(G) / mpmath.sqrt(v)
    return -mpf(1e-3) * min(mpf(lr), 1 / mpmath.sqrt(t)) * u / max(1, u)


MOMENTS = {"exp_avg": M, "exp_avg_sq": V}
NONE = {"exp_avg": 0.0, "exp_avg_sq": 0.0}
#: For each optimizer whose update depends on the count: its state before, what it computes, the same without a state
#: before the first update, arguments, and the units of the last place that the whole update may be off by.
COUNTED: dict[str, tuple[dict[str, float], Callable[..., Any], tuple[float, ...], dict[str, Any], float]] = {
    "Adam": (MOMENTS, mp_adam, (0.0, 0.0), {}, 6),
    "AdamW": (MOMENTS, mp_adam, (0.0, 0.0), {}, 6),
    "Adagrad": ({"sum": V}, mp_adagrad, (0.0,), {"lr_decay": 1e-3}, 6),
    "Adamax": ({"exp_avg": M, "exp_inf": V}, mp_adamax, (0.0, 0.0), {}, 6),
    "ASGD": ({"ax": 0.0, "eta": 0.1, "mu": 1.0}, mp_asgd, (), {}, 6),
    "NAdam": ({**MOMENTS, "mu_product": 0.4}, mp_nadam, (0.0, 0.0, 1.0), {}, 8),
    # rho is the small difference of large numbers for some time after the first steps.
    "RAdam": (MOMENTS, mp_radam, (0.0, 0.0), {}, 60),
    "SparseAdam": (MOMENTS, mp_sparse_adam, (0.0, 0.0), {}, 6),
    "Adafactor": ({"variance": V}, mp_adafactor, (0.0,), {}, 6),
}


@pytest.mark.parametrize("name", COUNTED)
def test_updates_at_the_edges_of_counts(name: str) -> None:
    state, formula, empty, kwargs, allowed = COUNTED[name]
    lr = REGISTRY[name]["defaults"]["lr"]
    worst = 0.0
    with mpmath.workprec(2000):
        for t in [1, *EDGES]:
            got, opt = at_count(name, t, state, G, **kwargs)
            want = formula(t, lr, *(empty if t == 1 else ()))
            worst = max(worst, ulps(got, want))
            if t == LARGEST:
                continue
            # One more is one more, whatever the size.
            step(opt, [np.full(1, G)])
            assert opt.state[0]["step"] == t + 1
    assert worst <= allowed


def test_the_optimizers_whose_updates_depend_on_the_count_are_these() -> None:
    for name in NAMES:
        if not REGISTRY[name]["shows_step"]:
            assert name not in COUNTED
            continue
        kwargs = COUNTED[name][3] if name in COUNTED else {}
        outcomes = []
        for t in (3, 10**6):
            p = np.full((2, 2), 0.5)
            opt = getattr(roptim, name)([p], **kwargs)
            step(opt, [np.full((2, 2), G)])
            saved = opt.state_dict()
            saved["state"][0]["step"] = t
            opt.load_state_dict(saved)
            step(opt, [np.full((2, 2), 0.7)])
            outcomes.append(p.tobytes())
        assert (outcomes[0] != outcomes[1]) == (name in COUNTED), name


@pytest.mark.parametrize("name", NAMES)
def test_counts_survive_a_file_and_end_with_an_error(name: str, tmp_path: Any) -> None:
    p = np.ones((2, 2), np.float32)
    opt = getattr(roptim, name)({"w": p})
    g = np.full((2, 2), G, np.float32)

    def advance(opt: Any) -> None:
        sparse = REGISTRY[name]["needs_sparse"]
        opt.step({"w": roptim.SparseGrad(np.arange(2), g, g.shape) if sparse else g})

    advance(opt)
    for t in [1, *EDGES, LARGEST - 1]:
        saved = opt.state_dict()
        if "step" not in saved["state"].get(0, {}):
            return  # its state has no count
        saved["state"][0]["step"] = t
        saved["roptim"]["update_count"] = t
        opt.load_state_dict(saved)
        again = getattr(roptim, name)({"w": p.copy()})
        if t in (2**24 + 1, 2**53 + 1, LARGEST):
            roptim.save(opt.state_dict(), tmp_path / "state")
            again.load_state_dict(roptim.load(tmp_path / "state"))
        else:
            # The bytes of such a file, without waiting for the disk.
            again.load_state_dict(_roptim.loads(_roptim.dumps(opt.state_dict())))
        for one in (opt, again, copy.deepcopy(opt)):
            assert (one.state[0]["step"], one.update_count) == (t, t)
            assert type(one.state[0]["step"]) is int
        if t < LARGEST:
            advance(again)
            assert (again.state[0]["step"], again.update_count) == (t + 1, t + 1)
            continue
        before = fingerprint([again, *again.param_groups[0]["params"]])
        for _ in range(2):
            with pytest.raises(roptim.RoptimError) as raised:
                advance(again)
            assert str(raised.value) == (
                f'{name}.step: step of parameter "w" must be below 2^64 - 1, got 18446744073709551615'
            )
            assert fingerprint([again, *again.param_groups[0]["params"]]) == before


@pytest.mark.parametrize("count", [-1, 2**64, 1.5, math.nan, math.inf, "3", None, True, [1], 1j, 10**400])
def test_what_is_no_count(count: Any) -> None:
    p = np.ones(2)
    opt = roptim.Adam([p])
    step(opt, [np.ones(2)])
    before = fingerprint([opt, p])
    saved = opt.state_dict()
    saved["state"][0]["step"] = count
    with pytest.raises(roptim.RoptimError, match="step"):
        opt.load_state_dict(saved)
    with pytest.raises(roptim.RoptimValueError, match=r"^state: step must be a whole number from 1 to 2\^64 - 2, got "):
        opt.state[0]["step"] = count
    saved["state"][0]["step"] = 1
    saved["roptim"]["update_count"] = count
    with pytest.raises(roptim.RoptimError, match="update_count"):
        opt.load_state_dict(saved)
    assert fingerprint([opt, p]) == before


# ---- threads that flush subnormal numbers -------------------------------------------------------------------

FLUSHING = """
import ctypes, ctypes.util, hashlib, itertools, json, sys, threading
import numpy as np
import roptim
from roptim.optimizer import REGISTRY

libm = ctypes.CDLL(ctypes.util.find_library("m"))
MXCSR = slice(28, 32)  # of the floating-point environment of glibc on x86-64


def flush(on):
    environment = ctypes.create_string_buffer(64)
    assert libm.fegetenv(environment) == 0
    word = int.from_bytes(environment.raw[MXCSR], "little")
    word = word | 0x8040 if on else word & ~0x8040
    environment[MXCSR] = word.to_bytes(4, "little")
    assert libm.fesetenv(environment) == 0


tiny = np.full(8, 1e-39, np.float32)


def is_flushing():
    return not (tiny * np.float32(0.5)).any()


# Just large enough for several threads.
angles = np.arange(34_000, dtype=np.float32).reshape(200, 170)
STARTS = {"tiny": np.sin(angles) * np.float32(1e-38), "mixed": np.cos(angles)}
GRADIENTS = {"tiny": np.cos(angles) * np.float32(1e-39), "mixed": np.sin(angles) * np.float32(1e-20)}
RUNS = [("tiny", {"threads": 2}), ("mixed", {"threads": 1})]


def digest(name):
    entry, found = REGISTRY[name], hashlib.sha256()
    for kind, options in RUNS:
        p, g = STARTS[kind].copy(), GRADIENTS[kind]
        if entry["needs_closure"]:
            opt = getattr(roptim, name)([p], max_iter=3, tolerance_grad=0.0, tolerance_change=0.0, **options)
            losses = itertools.count(0, -1)
            opt.step(lambda: (next(losses), [g]))
        else:
            opt = getattr(roptim, name)([p], flush_denormals=False, clip_norm=1e-36, **options)
            sparse = entry["needs_sparse"]
            for _ in range(2):
                opt.step([roptim.SparseGrad(np.arange(len(g)), g, g.shape) if sparse else g])
            if not sparse:
                opt.accumulate([g])
                opt.accumulate([g])
                opt.step()
            found.update(repr(opt.gradient_norm).encode())
        found.update(p.tobytes())
        found.update(roptim._roptim.dumps(opt.state_dict()))
    return found.hexdigest()


def work(on, results):
    flush(on)
    for name in REGISTRY:
        results[name] = digest(name)
        assert is_flushing() == on, "the thread's own setting is kept"
    flush(False)


main, other = json.loads(sys.argv[1])
mine, theirs = {}, {}
work(main, mine)
thread = threading.Thread(target=work, args=(other, theirs))
thread.start()
thread.join()
print(json.dumps([mine, theirs]))
"""


@pytest.mark.skipif(
    not (sys.platform == "linux" and platform.machine() == "x86_64" and platform.libc_ver()[0] == "glibc"),
    reason="sets the control word through glibc",
)
def test_threads_that_flush_subnormal_numbers_get_the_same_bits() -> None:
    """As one that loaded a library built with -ffast-math: in the main thread, in another, in both, in none."""
    outcomes = []
    for settings in ([False, False], [True, False], [False, True], [True, True]):
        done = subprocess.run(
            [sys.executable, "-c", FLUSHING, json.dumps(settings)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        outcomes += json.loads(done.stdout)
    assert all(outcome == outcomes[0] for outcome in outcomes)
    assert list(outcomes[0]) == list(REGISTRY)
