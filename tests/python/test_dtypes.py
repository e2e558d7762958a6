"""Sparse gradients, complex and half-precision parameters."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from helpers import step

import roptim
from roptim import SparseGrad
from roptim.optimizer import REGISTRY


def test_a_sparse_gradient_adds_up_what_is_named_twice() -> None:
    values = np.arange(9, dtype=np.float32).reshape(3, 3)
    g = SparseGrad([4, 1, 4], values, (6, 3))
    dense = np.zeros((6, 3), np.float32)
    np.add.at(dense, [4, 1, 4], values)
    assert np.array_equal(g.toarray(), dense)
    once = g.coalesced()
    assert once.indices.tolist() == [1, 4]
    assert np.array_equal(once.toarray(), dense)
    entries = SparseGrad([[4, 1], [0, 2]], [1.0, 2.0], (6, 3))
    assert entries.coalesced().toarray()[1, 2] == 2.0


@pytest.mark.parametrize("name", [name for name, entry in REGISTRY.items() if entry["takes_sparse"]])
@pytest.mark.parametrize("order", ["C", "F"])
def test_sparse_gradients_in_every_form(name: str, order: Any) -> None:
    rng = np.random.default_rng(0)
    start = np.asarray(rng.standard_normal((8, 3)), np.float64, order=order)
    tables = [start.copy(order=order) for _ in range(3)]
    rows, entries = (getattr(roptim, name)([table], lr=0.1) for table in tables[:2])
    parameter = roptim.Parameter(tables[2])
    by_grad = getattr(roptim, name)([parameter], lr=0.1)
    for index in ([2, 5, 2], [], [0]):
        values = rng.standard_normal((len(index), 3))
        g = SparseGrad(np.array(index, np.int64), values, start.shape)
        step(rows, [g])
        once = g.coalesced()
        axes = np.stack([np.repeat(once.indices, 3), np.tile(np.arange(3), len(once.indices))])
        step(entries, [SparseGrad(axes, once.values.reshape(-1), start.shape)])
        parameter.grad = g
        step(by_grad)
    assert np.array_equal(tables[0], tables[1])
    assert np.array_equal(tables[0], tables[2])
    assert not np.array_equal(tables[0], start)
    assert np.array_equal(tables[0][[1, 3, 4, 6, 7]], start[[1, 3, 4, 6, 7]])


def test_a_scipy_array_is_a_sparse_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    class Coo:
        """What scipy.sparse's arrays have."""

        def __init__(self, row: Any, col: Any, data: Any, shape: Any) -> None:
            self.row, self.col, self.data, self.shape = np.array(row), np.array(col), np.array(data), shape

        def tocoo(self) -> Coo:
            return self

    sparse = sys.modules.get("scipy.sparse")
    if sparse is None:
        sparse = SimpleNamespace(issparse=lambda x: isinstance(x, Coo))  # type: ignore[assignment]  # stands in for a module
        monkeypatch.setitem(sys.modules, "scipy.sparse", sparse)
        g: Any = Coo([1, 1], [0, 0], [1.0, 2.0], (2, 2))
    else:
        g = sparse.coo_array(([1.0, 2.0], ([1, 1], [0, 0])), shape=(2, 2))
    p = np.zeros((2, 2))
    roptim.SGD([p], lr=1.0).step([g])
    assert p.tolist() == [[0, 0], [-3, 0]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0.5], np.ones((1, 3)), (6, 3)), "indices must be integers, got float64"),
        (([6], np.ones((1, 3)), (6, 3)), r"indices must be in \[0, 6\), got 6"),
        (([-1], np.ones((1, 3)), (6, 3)), r"indices must be in \[0, 6\), got -1"),
        (([[0], [3]], [1.0], (6, 3)), r"indices\[1\] must be in \[0, 3\), got 3"),
        (([0, 1], np.ones((1, 3)), (6, 3)), r"values must be of shape \(2, 3\), got \(1, 3\)"),
        (([[0], [0], [0]], [1.0], (6, 3)), "indices must be of shape"),
        (([0], [1.0], 6), "shape must be a tuple of integers, got 6"),
        (([0], np.ones((1, 3)), (2.7, 3)), r"shape must be a tuple of integers, got \(2\.7, 3\)"),
        (([0], np.ones((1, 3)), "ab"), "shape must be a tuple of integers, got 'ab'"),
        (([0], np.ones((1, 3)), (-2, 3)), r"shape must be one that an array can have, of axes, got \(-2, 3\)"),
        (([0], np.ones((1, 3)), (2**62, 2**62)), "shape must be one that an array can have"),
        (([[0], [1, 2]], np.ones((1, 3)), (6, 3)), "indices and values must be arrays, got ragged ones"),
    ],
)
def test_refused_sparse_gradients(arguments: Any, message: str) -> None:
    with pytest.raises(roptim.RoptimError, match=f"^SparseGrad: {message}"):
        SparseGrad(*arguments)


def test_sparse_gradients_where_they_do_not_fit() -> None:
    p = np.ones((4, 2), np.float32)
    g = SparseGrad([1], np.ones((1, 2), np.float32), p.shape)
    for name, entry in REGISTRY.items():
        opt = getattr(roptim, name)([p])
        if not entry["takes_sparse"]:
            with pytest.raises(TypeError, match=f"^{name}.step: gradient of parameter 0 must be dense, got a sparse"):
                opt.step([g])
    with pytest.raises(ValueError, match=r"weight_decay must be 0 with sparse gradients, got 0\.1"):
        roptim.SGD([p], weight_decay=0.1).step([g])
    with pytest.raises(ValueError, match=r"gradient of parameter 0 must be of shape \(4, 2\), got \(5, 2\)"):
        roptim.SGD([p]).step([SparseGrad([1], np.ones((1, 2), np.float32), (5, 2))])
    with pytest.raises(TypeError, match="gradient of parameter 0 must be float32, got float64"):
        roptim.SGD([p]).step([SparseGrad([1], np.ones((1, 2)), p.shape)])
    with pytest.raises(TypeError, match="must be sparse, got a dense one; use Adam"):
        roptim.SparseAdam([p]).step([np.ones_like(p)])
    assert (p == 1).all()


@pytest.mark.parametrize("dtype", [np.complex64, np.complex128])
def test_complex_parameters_are_pairs_of_reals(dtype: Any, optimizer_class: Any) -> None:
    if optimizer_class.__name__ in ("Adafactor", "Muon", "SparseAdam"):
        with pytest.raises(TypeError, match="parameter 0 must be of real numbers, got complex"):
            optimizer_class([np.ones((2, 2), dtype)])
        return
    rng = np.random.default_rng(1)
    part = np.dtype(dtype).type(0).real.dtype

    def draw() -> Any:
        return np.asarray(rng.standard_normal((5, 3)) + 1j * rng.standard_normal((5, 3)), dtype)

    start = draw()
    z, strided = start.copy(), np.asfortranarray(start)
    reals = np.stack([start.real, start.imag], -1).astype(part)
    one, two, three = (optimizer_class([p]) for p in (z, reals, strided))
    for _ in range(4):
        g = draw()
        step(one, [g])
        step(two, [np.stack([g.real, g.imag], -1)])
        step(three, [g.T.copy().T])
    assert np.array_equal(np.stack([z.real, z.imag], -1), reals)
    assert np.array_equal(z, strided)
    for key, value in one.state[0].items():
        if key in REGISTRY[optimizer_class.__name__]["joint"]:
            assert np.array_equal(value, two.state[0][key]), "one vector of reals"
        elif isinstance(value, np.ndarray):
            assert (value.dtype, value.shape) == (dtype, z.shape)
            assert np.array_equal(value.real, two.state[0][key][..., 0])
    copy = z.copy()
    again = optimizer_class([copy])
    again.load_state_dict(one.state_dict())
    g = draw()
    step(one, [g])
    step(again, [g])
    assert np.array_equal(z, copy)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_parameters_with_single_precision_state(dtype: Any) -> None:
    p, q = np.ones((3, 2), dtype), np.ones((3, 2), dtype)
    wide = np.ones((3, 2), np.float32)
    own, mixed, single = roptim.AdamW([p]), roptim.AdamW([q]), roptim.AdamW([wide])
    g = np.full((3, 2), 0.5, dtype)
    own.step([g])
    mixed.step([g.astype(np.float32)])
    single.step([g.astype(np.float32)])
    assert p.dtype == q.dtype == dtype
    assert p.tobytes() == q.tobytes() == wide.astype(dtype).tobytes()
    assert own.state[0]["exp_avg"].dtype == np.float32
    with pytest.raises(TypeError, match=r"gradient of parameter 0 must be .*float16 or float32, got float64"):
        own.step([np.ones((3, 2))])
    # torch keeps state in half precision: it is widened.
    saved = own.state_dict()
    del saved["roptim"]
    saved["state"][0] = {k: v if k == "step" else v.astype(dtype) for k, v in saved["state"][0].items()}
    own.load_state_dict(saved)
    assert own.state[0]["exp_avg"].dtype == np.float32


def test_adagrad_takes_torchs_state_from_before_the_first_step() -> None:
    p = np.ones(2, np.float32)
    opt = roptim.Adagrad([p], initial_accumulator_value=0.5)
    state = {0: {"step": np.array(0.0, np.float32), "sum": np.full(2, 0.5, np.float32)}}
    opt.load_state_dict({"state": state, "param_groups": [{"lr": 0.1, "params": [0]}]})
    assert len(opt.state) == 0
    opt.step([np.ones(2, np.float32)])
    assert opt.state[0]["sum"].tolist() == [1.5, 1.5]


def test_each_group_of_adagrad_begins_with_its_own_value() -> None:
    a, b = np.ones(2), np.ones(2)
    opt = roptim.Adagrad([{"params": [a]}, {"params": [b], "initial_accumulator_value": 3.0}])
    opt.step([np.ones(2), np.ones(2)])
    assert (opt.state[a]["sum"][0], opt.state[b]["sum"][0]) == (1.0, 4.0)


def test_a_changed_rate_counts_at_once_in_asgd_and_later_state_in_rprop() -> None:
    p = np.zeros(1)
    opt = roptim.ASGD([p], lr=0.5, lambd=0.0)
    opt.param_groups[0]["lr"] = 0.25
    opt.step([np.ones(1)])
    assert p[0] == -0.25
    q, r = np.zeros(1), np.zeros(1)
    rprop = roptim.Rprop([q, r], lr=0.5)
    rprop.step([np.ones(1), None])
    rprop.param_groups[0]["lr"] = 0.125
    rprop.step([None, np.ones(1)])
    assert (q[0], r[0]) == (-0.5, -0.125)


def test_scalar_state_reads_and_writes_as_a_float() -> None:
    p = np.ones(2)
    opt = roptim.NAdam([p])
    opt.step([np.ones(2)])
    product = opt.state[0]["mu_product"]
    assert type(product) is float
    assert 0 < product < 1
    opt.state[0]["mu_product"] = 0.25
    assert opt.state_dict()["state"][0]["mu_product"] == 0.25
    with pytest.raises(ValueError, match="mu_product must be a finite number, got nan"):
        opt.state[0]["mu_product"] = np.nan
    opt.state = {}
    opt.step([np.ones(2)])
    assert opt.state[0]["mu_product"] == product


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_rows_named_twice_are_summed_in_single(dtype: Any) -> None:
    sparse, dense = np.zeros((2, 1), dtype), np.zeros((2, 1), dtype)
    g = SparseGrad(np.zeros(5000, np.int64), np.ones((5000, 1), dtype), (2, 1))
    roptim.SGD([sparse], lr=1e-3).step([g])
    roptim.SGD([dense], lr=1e-3).step([np.array([[5000], [0]], np.float32)])
    assert np.array_equal(sparse, dense)
    assert g.toarray()[0] == 5000
    assert SparseGrad([0], np.ones((1, 1), dtype), (2, 1)).coalesced().dtype == dtype


def test_what_a_sparse_gradient_is_made_of_stays() -> None:
    index = np.array([0, 1])
    g = SparseGrad(index, np.ones((2, 3)), (5, 3))
    index[:] = 10**9
    assert g.toarray()[:2].all()
    for name in ("indices", "values", "shape"):
        with pytest.raises(AttributeError):
            setattr(g, name, None)
    with pytest.raises(ValueError, match="read-only"):
        g.indices[0] = 7


def test_any_array_of_scipy_is_a_sparse_gradient() -> None:
    sparse = pytest.importorskip("scipy.sparse")
    for dense in (np.array([0.0, 2.0, 0.0]), np.arange(6.0).reshape(2, 3)):
        for form in (sparse.coo_array, sparse.csr_array):
            p = np.zeros_like(dense)
            roptim.SGD([p], lr=1.0).step([form(dense)])
            assert np.array_equal(p, -dense)


def test_zeroing_a_sparse_gradient_leaves_zeros() -> None:
    p = roptim.Parameter(np.ones((4, 2), np.float32))
    p.grad = SparseGrad([1], np.ones((1, 2), np.float32), p.shape)
    opt = roptim.SGD([p], lr=1.0)
    opt.zero_grad(set_to_none=False)
    assert p.grad.shape == p.shape
    assert not p.grad.any()
    opt.step()
    assert (p.data == 1).all()
