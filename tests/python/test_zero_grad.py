"""``step(zero_grad=True)``: the step without it, bit for bit, and gradients of +0 afterwards."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from helpers import LAYOUTS, fingerprint, laid_out

import roptim
from roptim import SGD, Adagrad, Adam, AdamW, NonfiniteError, Parameter, SparseAdam, SparseGrad
from roptim.lr_scheduler import StepLR
from roptim.optimizer import REGISTRY

DENSE = [name for name, entry in REGISTRY.items() if not (entry["needs_closure"] or entry["needs_sparse"])]
DTYPES: list[Any] = [np.float32, np.float64, np.complex64, np.complex128, np.float16, ml_dtypes.bfloat16]
#: What the GPU takes of these.
ON_GPU = [np.float32, np.complex64, np.float16, ml_dtypes.bfloat16]


def draw(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any = np.float32) -> Any:
    x = rng.standard_normal((2, *shape))
    return np.asarray(x[0] + 1j * x[1] if np.dtype(dtype).kind == "c" else x[0]).astype(dtype)


def is_clear(g: Any) -> bool:
    """Whether every element is zero, without a sign."""
    return not any(g.tobytes())


def skip_unless_accepted(name: str, dtype: Any) -> None:
    if name in ("Adafactor", "Muon") and np.dtype(dtype).kind == "c":
        pytest.skip("takes no complex numbers")


def shapes_for(name: str) -> list[tuple[int, ...]]:
    matrices: list[tuple[int, ...]] = [(6, 5), (4, 3), (1, 7)]
    return matrices if name == "Muon" else [*matrices, (), (0,), (3, 0), (11,)]


def both(name: str, arrays: list[Any], **options: Any) -> tuple[Any, list[Any], Any, list[Any]]:
    """Two optimizers alike, each over its own copies."""
    mine, theirs = [a.copy() for a in arrays], [a.copy() for a in arrays]
    cls = getattr(roptim, name)
    return cls(mine, **options), mine, cls(theirs, **options), theirs


def unchanged_by(opt: Any, params: list[Any], gradients: list[Any], kind: type[Exception], message: str) -> None:
    """The step is refused, and nothing is another than before."""
    before = fingerprint([params, [g for g in gradients if isinstance(g, np.ndarray)], opt])
    for _ in range(2):
        with pytest.raises(kind, match=message):
            opt.step(gradients, zero_grad=True)
    assert fingerprint([params, [g for g in gradients if isinstance(g, np.ndarray)], opt]) == before


# ---- every optimizer, dtype and layout ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", DENSE)
def test_the_same_step_and_clear_gradients(name: str, dtype: Any) -> None:
    skip_unless_accepted(name, dtype)
    rng = np.random.default_rng(1)
    opt, params, twin, others = both(name, [draw(rng, shape, dtype) for shape in shapes_for(name)])
    reused = [draw(rng, p.shape, dtype) for p in params]
    wide = np.float32 if np.dtype(dtype).itemsize == 2 else dtype
    for at in range(7):
        gradients = [draw(rng, p.shape, wide if at == 3 else dtype) for p in params]
        if at == 5:
            gradients[1] = None
        plain = [None if g is None else g.copy() for g in gradients]
        if at < 3:
            for own, g in zip(reused, gradients, strict=True):
                assert at == 0 or is_clear(own)
                own[...] = g
            gradients = reused
        else:
            gradients = [g if g is None else laid_out(g, LAYOUTS[(at + i) % 4]) for i, g in enumerate(gradients)]
        opt.step(gradients, zero_grad=True)
        twin.step(plain)
        assert fingerprint([params, opt]) == fingerprint([others, twin])
        assert all(g is None or is_clear(g) for g in gradients)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", DENSE)
def test_parameters_in_every_layout(name: str, layout: str) -> None:
    rng = np.random.default_rng(2)
    arrays = [draw(rng, shape) for shape in shapes_for(name)]
    opt = getattr(roptim, name)(params := [laid_out(a, layout) for a in arrays])
    twin = getattr(roptim, name)(others := [a.copy() for a in arrays])
    for other in LAYOUTS:
        gradients = [draw(rng, a.shape) for a in arrays]
        given = [laid_out(g, other) for g in gradients]
        opt.step(given, zero_grad=True)
        twin.step(gradients)
        assert fingerprint([params, opt]) == fingerprint([others, twin])
        assert all(map(is_clear, given))


def test_what_lies_between_strided_elements_stays() -> None:
    memory = np.arange(24, dtype=np.float32)
    p = np.zeros((4, 3), np.float32)
    SGD([p], lr=1.0).step([memory[::2].reshape(4, 3)[::-1]], zero_grad=True)
    assert not memory[::2].any()
    assert np.array_equal(memory[1::2], np.arange(1, 24, 2))


def test_negative_zeros_nan_and_infinity_become_zero() -> None:
    g = np.array([-0.0, np.nan, np.inf, -np.inf, 1e-45, -1.0], np.float32)
    SGD([np.zeros(6, np.float32)]).step([g], zero_grad=True)
    assert is_clear(g)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", DENSE)
def test_on_several_threads(name: str, layout: str) -> None:
    rng = np.random.default_rng(3)
    shape = (300, 250)
    opt, params, twin, others = both(name, [draw(rng, shape), draw(rng, (5, 3))], threads=3, clip_norm=2.0)
    for _ in range(2):
        gradients = [laid_out(draw(rng, shape), layout), draw(rng, (5, 3))]
        plain = [g.copy() for g in gradients]
        opt.step(gradients, zero_grad=True)
        twin.step(plain)
        assert all(map(is_clear, gradients))
        assert all(a.tobytes() == b.tobytes() for a, b in zip(params, others, strict=True))
    assert fingerprint(opt.state_dict()) == fingerprint(twin.state_dict())


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.complex128])
def test_other_dtypes_on_several_threads(dtype: Any) -> None:
    rng = np.random.default_rng(4)
    opt, params, twin, others = both("AdamW", [draw(rng, (90_001,), dtype)], threads=4)
    for _ in range(2):
        g = draw(rng, (90_001,), dtype)
        twin.step([g.copy()])
        opt.step([g], zero_grad=True)
        assert is_clear(g)
        assert params[0].tobytes() == others[0].tobytes()


# ---- how gradients are given ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DENSE)
def test_gradients_of_parameters(name: str) -> None:
    rng = np.random.default_rng(5)
    arrays = [draw(rng, (4, 3)), draw(rng, (2, 5)), draw(rng, (3, 3))]
    opt = getattr(roptim, name)(params := [Parameter(a.copy()) for a in arrays])
    twin = getattr(roptim, name)(others := [a.copy() for a in arrays])
    own = [np.zeros_like(a) for a in arrays]
    for p, g in zip(params, own, strict=True):
        p.grad = g
    params[2].grad = None
    for _ in range(4):
        gradients = [draw(rng, a.shape) for a in arrays]
        for g, numbers in zip(own, gradients, strict=True):
            g += numbers  # as loops do that add to them
        assert opt.step(zero_grad=True) is None
        twin.step([*gradients[:2], None])
        assert fingerprint([[p.data for p in params], opt]) == fingerprint([others, twin])
        assert all(map(is_clear, own[:2]))
        assert all(p.grad is g for p, g in zip(params[:2], own, strict=False))
        assert not is_clear(own[2])
        assert params[2].grad is None


def leaves_of(tree: Any) -> list[Any]:
    if isinstance(tree, np.ndarray):
        return [tree]
    children = tree.values() if isinstance(tree, dict) else [] if isinstance(tree, str) else tree
    return [leaf for child in children for leaf in leaves_of(child)]


def test_lists_dicts_groups_and_single_arrays() -> None:
    def g() -> Any:
        return np.ones(3, np.float32)

    for params, gradients in (
        (np.zeros(3, np.float32), g()),
        ([np.zeros(3, np.float32)] * 1, [g()]),
        ([np.zeros(3, np.float32)], (g(),)),
        ({"a": np.zeros(3, np.float32), "b": np.zeros(3, np.float32)}, {"b": g(), "a": g()}),
        ({"a": np.zeros(3, np.float32), "b": [np.zeros(3, np.float32)]}, {"a": g(), "b": [g()]}),
        ([("a", np.zeros(3, np.float32))], {"a": g()}),
        ([("a", np.zeros(3, np.float32))], [("a", g())]),
        ([{"params": [np.zeros(3, np.float32)]}, {"params": [np.zeros(3, np.float32)]}], [[g()], [g()]]),
        ([{"params": [np.zeros(3, np.float32)]}, {"params": [np.zeros(3, np.float32)]}], [g(), g()]),
    ):
        opt = SGD(params, lr=1.0)
        opt.step(gradients, zero_grad=True)
        leaves = leaves_of(gradients)
        assert leaves
        assert all(map(is_clear, leaves))
        assert all(np.all(np.asarray(p) == -1.0) for group in opt.param_groups for p in group["params"])


def test_a_mapped_file(tmp_path: Any) -> None:
    g = np.memmap(tmp_path / "g", np.float32, "w+", shape=(5, 2))
    g[...] = 1
    SGD([np.zeros((5, 2), np.float32)]).step([g], zero_grad=True)
    assert is_clear(g)
    g.flush()
    closed = np.memmap(tmp_path / "g", np.float32, "r", shape=(5, 2))
    opt = SGD([np.zeros((5, 2), np.float32)])
    opt.step([closed])
    with pytest.raises(ValueError, match="writeable"):
        opt.step([closed], zero_grad=True)


def test_steps_with_it_and_without_it_alternate() -> None:
    rng = np.random.default_rng(6)
    opt, params, twin, others = both("Adam", [draw(rng, (40,)), draw(rng, (3, 3))])
    gradients = [draw(rng, (40,)), draw(rng, (3, 3))]
    for at in range(8):
        for g in gradients:
            g[...] = draw(rng, g.shape)
        plain = [g.copy() for g in gradients]
        opt.step(gradients, zero_grad=bool(at % 3))
        twin.step(plain)
        assert fingerprint([params, opt]) == fingerprint([others, twin])
        for g, before in zip(gradients, plain, strict=True):
            assert is_clear(g) if at % 3 else np.array_equal(g, before)


# ---- refusals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DENSE)
def test_read_only_gradients(name: str) -> None:
    rng = np.random.default_rng(7)
    params = [draw(rng, (4, 3)), draw(rng, (4, 3))]
    opt = getattr(roptim, name)(params)
    gradients = [draw(rng, (4, 3)), draw(rng, (4, 3))]
    for _ in range(2):
        opt.step(gradients)
        for which in (0, 1):
            gradients[which].flags.writeable = False
            opt.step(gradients)  # is enough to read
            unchanged_by(opt, params, gradients, ValueError, f"gradient of parameter {which} must be writeable")
            gradients[which].flags.writeable = True
    unchanged_by(
        opt,
        params,
        [gradients[0], np.broadcast_to(np.float32(1), (4, 3))],
        ValueError,
        "must be writeable, got a read-",
    )
    opt.step(gradients, zero_grad=True)
    assert all(map(is_clear, gradients))


@pytest.mark.parametrize("name", DENSE)
def test_gradients_that_share_memory(name: str) -> None:
    rng = np.random.default_rng(8)
    params = [draw(rng, (4, 3)) for _ in range(3)]
    opt = getattr(roptim, name)(params)
    memory = draw(rng, (4, 24))
    a, b, c = memory[:, :3], memory[:, 3:6], draw(rng, (4, 3))
    whole = memory.reshape(-1)
    shifted = whole[1:13].reshape(4, 3)
    for gradients in (
        [c, c, None],
        [c, None, c],
        [c, b, c.view()],
        [c, c[::-1], None],
        [a, memory[:, 2:5], c],
        [c, whole[:12].reshape(4, 3), shifted],
        [whole[:24:2].reshape(4, 3), whole[1:25].reshape(8, 3)[::2], c],
    ):
        opt.step(gradients)  # they are only read
        unchanged_by(opt, params, gradients, ValueError, "must be memory of its own, got memory of the gradient of")
    folded = np.lib.stride_tricks.as_strided(memory, (4, 3), (4, 4))
    opt.step([folded, None, None])
    unchanged_by(opt, params, [folded, None, None], ValueError, "without elements that share memory")
    # Interleaved, with not an element in common.
    before = memory.copy()
    opt.step([a, b, memory[:, 6:9]], zero_grad=True)
    assert not memory[:, :9].any()
    assert np.array_equal(memory[:, 9:], before[:, 9:])


def test_interleaved_gradients_on_several_threads() -> None:
    rng = np.random.default_rng(9)
    opt, params, twin, others = both("AdamW", [draw(rng, (60_000,)) for _ in range(3)], threads=3)
    for _ in range(2):
        memory = draw(rng, (180_000,))
        plain = [memory[i::3].copy() for i in range(3)]
        opt.step([memory[i::3] for i in range(3)], zero_grad=True)
        twin.step(plain)
        assert is_clear(memory)
        assert all(a.tobytes() == b.tobytes() for a, b in zip(params, others, strict=True))


def test_gradients_that_share_memory_with_what_is_stepped() -> None:
    rng = np.random.default_rng(10)
    params = [draw(rng, (6,)), draw(rng, (6,))]
    opt = Adam(params)
    good = [draw(rng, (6,)), draw(rng, (6,))]
    for _ in range(3):
        opt.step(good, zero_grad=True)
        for bad in (params[0], params[1][::-1], opt.state[0]["exp_avg"], opt.state[1]["exp_avg_sq"]):
            unchanged_by(opt, params, [bad, good[1]], ValueError, "must be memory of its own")
            unchanged_by(opt, params, [good[0], bad], ValueError, "must be memory of its own")


def test_sparse_gradients() -> None:
    dense = np.ones((4, 3), np.float32)
    sparse = SparseGrad([0, 2], np.ones((2, 3), np.float32), (4, 3))
    for cls in (SGD, Adagrad, SparseAdam):
        params = [np.zeros((4, 3), np.float32), np.zeros((4, 3), np.float32)]
        opt = cls(params)
        if cls is not SparseAdam:
            opt.step([sparse, dense])
        else:
            opt.step([sparse, sparse])
        unchanged_by(
            opt, params, [None, sparse], TypeError, "gradient of parameter 1 must be an array, got a sparse one"
        )
        unchanged_by(opt, params, [dense, sparse], TypeError, "parameter 1 must be an array, got a sparse one")
        assert np.all(sparse.values == 1)
    opt = SparseAdam([np.zeros((4, 3), np.float32)])
    with pytest.raises(TypeError, match="must be sparse, got a dense one"):
        opt.step([dense], zero_grad=True)
    assert np.all(dense == 1)


def test_sparse_matrices() -> None:
    scipy_sparse = pytest.importorskip("scipy.sparse")
    matrix = scipy_sparse.coo_matrix(np.eye(4, dtype=np.float32))
    opt = SGD(params := [np.zeros((4, 4), np.float32)])
    opt.step([matrix])
    unchanged_by(opt, params, [matrix], TypeError, "gradient of parameter 0 must be an array, got a sparse one")


@pytest.mark.parametrize("name", DENSE)
def test_wrong_gradients_are_not_cleared(name: str) -> None:
    rng = np.random.default_rng(11)
    params = [draw(rng, (4, 3)), draw(rng, (4, 3))]
    opt = getattr(roptim, name)(params)
    good = draw(rng, (4, 3))
    for bad, kind in (
        (draw(rng, (3, 4)), ValueError),
        (draw(rng, (4, 3), np.float64), TypeError),
        (np.ones((4, 3), np.int32), TypeError),
        (draw(rng, (4, 3)).astype(np.dtype(np.float32).newbyteorder()), ValueError),
        ("text", TypeError),
        (1.0, TypeError),
    ):
        unchanged_by(opt, params, [good, bad], kind, "gradient of parameter 1")
        unchanged_by(opt, params, [good], ValueError, "2 in number")


@pytest.mark.parametrize("name", ["LBFGS", "ConjugateGradient"])
def test_optimizers_that_take_a_closure_refuse(name: str) -> None:
    p = Parameter(np.ones(3, np.float32))
    opt = getattr(roptim, name)([p])
    calls = []

    def closure() -> float:
        calls.append(1)
        p.grad = 2 * p.data
        return float(p.data @ p.data)

    with pytest.raises(ValueError, match=f"{name}.step: zero_grad must be False, got True"):
        opt.step(closure, zero_grad=True)
    with pytest.raises(ValueError, match="zero_grad must be False"):
        opt.step(closure=closure, zero_grad=True)
    assert not calls
    assert np.all(p.data == 1)
    opt.step(closure, zero_grad=False)
    assert calls


def test_it_is_given_by_name() -> None:
    opt: Any = SGD([np.zeros(2, np.float32)])
    with pytest.raises(TypeError):
        opt.step([np.ones(2, np.float32)], None, True)


# ---- with everything else -------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"nonfinite": "skip"}, {"nonfinite": "skip", "clip_norm": 1.0, "clip_value": 0.5}])
@pytest.mark.parametrize("name", DENSE)
def test_an_update_that_is_left_out_clears(name: str, options: dict[str, Any]) -> None:
    rng = np.random.default_rng(12)
    params = [draw(rng, (4, 3)), draw(rng, (4, 3))]
    opt = getattr(roptim, name)(params, **options)
    for at in range(4):
        gradients = [draw(rng, (4, 3)), laid_out(draw(rng, (4, 3)), LAYOUTS[at])]
        if at % 2:
            gradients[1][2, 1] = np.nan if at == 1 else np.inf
        before = [p.tobytes() for p in params]
        opt.step(gradients, zero_grad=True)
        assert all(map(is_clear, gradients))
        assert ([p.tobytes() for p in params] == before) == bool(at % 2)
    assert (opt.update_count, opt.skip_count) == (2, 2)


@pytest.mark.parametrize("name", DENSE)
def test_an_update_that_raises_does_not_clear(name: str) -> None:
    rng = np.random.default_rng(13)
    params = [draw(rng, (4, 3)), draw(rng, (4, 3))]
    opt = getattr(roptim, name)(params, nonfinite="raise")
    good = draw(rng, (4, 3))
    bad = draw(rng, (4, 3))
    bad[0, 0] = np.nan
    unchanged_by(opt, params, [good, bad], NonfiniteError, "gradient of parameter 1 must be finite, got NaN")
    plain = good.copy()
    opt.step([good, None])  # without: a refused step leaves no wish behind
    assert np.array_equal(good, plain)
    opt.step([good, None], zero_grad=True)
    assert is_clear(good)
    assert not is_clear(bad)


@pytest.mark.parametrize("options", [{"clip_norm": 0.5}, {"clip_value": 0.25}, {"clip_norm": 0.5, "clip_value": 0.25}])
@pytest.mark.parametrize("name", DENSE)
def test_clipping(name: str, options: dict[str, Any]) -> None:
    rng = np.random.default_rng(14)
    opt, params, twin, others = both(name, [draw(rng, (4, 3)), draw(rng, (2, 2))], **options)
    opt.grad_scale = twin.grad_scale = 4.0
    for _ in range(3):
        gradients = [draw(rng, p.shape) for p in params]
        twin.step([g.copy() for g in gradients])
        opt.step(gradients, zero_grad=True)
        assert opt.gradient_norm == twin.gradient_norm
        assert all(map(is_clear, gradients))
        assert fingerprint([params, opt]) == fingerprint([others, twin])


@pytest.mark.parametrize("name", DENSE)
def test_sums_of_gradients(name: str) -> None:
    """Accumulated ones are used, and those of the Parameters cleared."""
    rng = np.random.default_rng(15)
    arrays = [draw(rng, (4, 3)), draw(rng, (2, 5))]
    opt = getattr(roptim, name)(params := [Parameter(a.copy()) for a in arrays])
    twin = getattr(roptim, name)(others := [a.copy() for a in arrays])
    own = [np.zeros_like(a) for a in arrays]
    for p, g in zip(params, own, strict=True):
        p.grad = g
    for _ in range(3):
        sums = [np.zeros_like(a) for a in arrays]
        for _ in range(2):
            for p, total in zip(params, sums, strict=True):
                g = p.grad
                assert isinstance(g, np.ndarray)
                g[...] = draw(rng, g.shape)
                total += g
            opt.accumulate()
        opt.step(zero_grad=True)
        twin.step(sums)
        assert fingerprint([[p.data for p in params], opt]) == fingerprint([others, twin])
        assert all(map(is_clear, own))
        assert all(p.grad is g for p, g in zip(params, own, strict=True))
    before = fingerprint([p.data for p in params])
    opt.step([None, None], zero_grad=True)
    assert fingerprint([p.data for p in params]) == before


def test_gradients_are_accumulated_without_being_cleared() -> None:
    opt = SGD([p := np.zeros(3, np.float32)], lr=1.0)
    g = np.ones(3, np.float32)
    opt.accumulate([g])
    opt.accumulate([g])
    opt.step(zero_grad=True)
    assert np.all(p == -2)
    assert np.all(g == 1)


@pytest.mark.parametrize("by_name", [False, True])
def test_closures(by_name: bool) -> None:
    p = Parameter(np.zeros(3, np.float32))
    p.grad = own = np.zeros(3, np.float32)
    opt = SGD([p], lr=0.5)

    def closure() -> str:
        assert is_clear(own)
        own[...] += 2
        return "loss"

    for at in range(1, 4):
        loss = opt.step(closure=closure, zero_grad=True) if by_name else opt.step(closure, zero_grad=True)
        assert loss == "loss"
        assert is_clear(own)
        assert np.all(p.data == -at)
    given = [np.ones(3, np.float32)]
    assert opt.step(lambda: (7, given), zero_grad=True) == 7
    assert is_clear(given[0])

    def fails() -> float:
        own[...] = 3
        raise RuntimeError("no loss")

    with pytest.raises(RuntimeError, match="no loss"):
        opt.step(fails, zero_grad=True)
    assert np.all(own == 3)


def test_hooks_see_it() -> None:
    p, g = np.zeros(3, np.float32), np.ones(3, np.float32)
    opt = SGD(p, lr=1.0)
    seen: list[Any] = []
    opt.register_step_pre_hook(lambda _, args, kwargs: seen.append(("pre", len(args), dict(kwargs))))
    opt.register_step_post_hook(lambda _, args, kwargs: seen.append(("post", args[1].sum(), dict(kwargs))))
    opt.step(g, zero_grad=True)
    assert seen == [("pre", 2, {"zero_grad": True}), ("post", 0.0, {"zero_grad": True})]
    seen.clear()
    g[...] = 1
    opt.step(g)
    assert seen == [("pre", 2, {}), ("post", 3.0, {})]
    assert np.all(p == -2)


@pytest.mark.parametrize("switched", [True, False])
def test_hooks_may_switch_it(switched: bool) -> None:
    opt = SGD([np.zeros(3, np.float32)], lr=1.0)
    opt.register_step_pre_hook(lambda _, args, kwargs: (args, {**kwargs, "zero_grad": switched}))
    g = np.ones(3, np.float32)
    opt.step([g], zero_grad=not switched)
    assert is_clear(g) == switched


def test_a_subclass_that_calls_the_step_of_its_base() -> None:
    class Counting(AdamW):
        count = 0

        def step(self, *args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return super().step(*args, **kwargs)

    opt = Counting([np.zeros(3, np.float32)])
    g = np.ones(3, np.float32)
    opt.step([g], zero_grad=True)
    assert opt.count == 1
    assert is_clear(g)


@pytest.mark.parametrize("name", DENSE)
def test_with_a_scheduler_and_a_schedule(name: str) -> None:
    rng = np.random.default_rng(16)
    opt, params, twin, others = both(name, [draw(rng, (4, 3))])
    schedulers = [StepLR(opt, 2, 0.5), StepLR(twin, 2, 0.5)]
    for _ in range(5):
        g = draw(rng, (4, 3))
        twin.step([g.copy()])
        opt.step([g], zero_grad=True)
        for scheduler in schedulers:
            scheduler.step()
        assert is_clear(g)
        assert fingerprint([params, opt]) == fingerprint([others, twin])
    opt, params, twin, others = both(name, [draw(rng, (4, 3))], lr=lambda count: 0.1 / (1 + count))
    for at in range(3):
        g = draw(rng, (4, 3))
        twin.step([g.copy()])
        opt.step([g], zero_grad=True)
        assert is_clear(g)
        assert params[0].tobytes() == others[0].tobytes()
        assert opt.param_groups[0]["lr"] == 0.1 / (2 + at)


def test_no_gradient_at_all() -> None:
    opt = SGD([p := Parameter(np.ones(2, np.float32))])
    with pytest.warns(UserWarning, match="no Parameter has a gradient"):
        opt.step(zero_grad=True)
    opt.step([None], zero_grad=True)
    assert np.all(p.data == 1)
    assert opt.update_count == 0


def test_a_parameter_that_wants_no_gradient_keeps_it() -> None:
    """What is not used is not cleared either."""
    p, q = Parameter(np.ones(2, np.float32)), Parameter(np.ones(2, np.float32), requires_grad=False)
    opt = SGD([p, q], lr=1.0)
    p.grad, q.grad = np.ones(2, np.float32), np.ones(2, np.float32)
    opt.step(zero_grad=True)
    assert is_clear(p.grad)
    assert np.all(q.data == 1)
    assert np.all(q.grad == 1)


# ---- on a GPU -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("name", [name for name in DENSE if "gpu" in REGISTRY[name]["backends"]])
def test_on_a_gpu(name: str, wrap: bool, gpu: str) -> None:
    rng = np.random.default_rng(17)
    arrays = [draw(rng, (6, 5)), draw(rng, (4, 3)).astype(np.float16)]
    options: dict[str, Any] = {"backend": gpu, "allow_software": True}
    mine = [Parameter(a.copy()) if wrap else a.copy() for a in arrays]
    theirs = [Parameter(a.copy()) if wrap else a.copy() for a in arrays]
    opt, twin = getattr(roptim, name)(mine, **options), getattr(roptim, name)(theirs, **options)
    for at in range(3):
        plain = [draw(rng, a.shape, a.dtype) for a in arrays]
        given = [laid_out(g, LAYOUTS[at]) for g in plain]
        if wrap and at != 1:
            for p, g in zip(mine, given, strict=True):
                p.grad = g
            opt.step(zero_grad=True)
        else:
            opt.step(given, zero_grad=True)
        assert all(map(is_clear, given))
        twin.step(plain)
    assert fingerprint([[np.asarray(p) for p in mine], opt]) == fingerprint([[np.asarray(p) for p in theirs], twin])


@pytest.mark.parametrize("dtype", ON_GPU)
def test_every_dtype_of_a_gpu(dtype: Any, gpu: str) -> None:
    rng = np.random.default_rng(18)
    opt, params, twin, others = both(
        "AdamW", [draw(rng, (40, 3), dtype), draw(rng, (), dtype)], backend=gpu, allow_software=True
    )
    for layout in LAYOUTS:
        gradients = [laid_out(draw(rng, p.shape, dtype), layout) for p in params]
        twin.step([g.copy() for g in gradients])
        opt.step(gradients, zero_grad=True)
        assert all(map(is_clear, gradients))
    assert fingerprint([params, opt]) == fingerprint([others, twin])


def test_refusals_on_a_gpu(gpu: str) -> None:
    params = [np.zeros(4, np.float32), np.zeros(4, np.float32)]
    opt = SGD(params, backend=gpu, allow_software=True)
    g = np.ones(4, np.float32)
    opt.step([g, g.copy()])
    unchanged_by(opt, params, [g, g], ValueError, "memory of the gradient of")
    unchanged_by(opt, params, [g, params[1]], ValueError, "memory of parameter 1")
    g.flags.writeable = False
    unchanged_by(opt, params, [g, None], ValueError, "writeable")
    on_device = roptim.gpu.array(np.ones(4, np.float32), allow_software=True)
    unchanged_by(opt, params, [on_device, None], TypeError, "must be an array, got one on a device")


@pytest.mark.parametrize("sync", [False, True])
def test_updates_that_are_left_out_on_a_gpu(sync: bool, gpu: str) -> None:
    params = [np.zeros(4, np.float32)]
    options: dict[str, Any] = {"backend": gpu, "allow_software": True, "nonfinite_sync": sync}
    opt = SGD(params, nonfinite="skip", **options)
    g = np.array([1, np.nan, 2, 3], np.float32)
    opt.step([g], zero_grad=True)
    assert is_clear(g)
    assert (opt.update_count, opt.skip_count) == (0, 1)
    assert is_clear(params[0])


def test_an_update_that_raises_at_once_on_a_gpu_does_not_clear(gpu: str) -> None:
    opt = SGD([np.zeros(4, np.float32)], nonfinite="raise", nonfinite_sync=True, backend=gpu, allow_software=True)
    g = np.array([1, np.nan, 2, 3], np.float32)
    with pytest.raises(NonfiniteError):
        opt.step([g], zero_grad=True)
    assert np.isnan(g[1])
    assert g[0] == 1


def test_sums_of_gradients_on_a_gpu(gpu: str) -> None:
    p = Parameter(np.zeros(4, np.float32))
    p.grad = g = np.ones(4, np.float32)
    opt = SGD([p], lr=1.0, backend=gpu, allow_software=True)
    opt.accumulate()
    opt.accumulate()
    opt.step(zero_grad=True)
    assert np.all(p.data == -2)
    assert is_clear(g)
    assert p.grad is g


# ---- what was found -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [False, True])
def test_a_numpy_scalar_is_refused_or_cleared(own: bool) -> None:
    """It cannot be written to; its Parameter can be given another."""
    p = Parameter(np.array(1.0, np.float32))
    opt = SGD([p], lr=0.5)
    given: list[Any] = [np.float32(2.0)]
    p.grad = given[0] if own else None
    try:
        opt.step(None if own else given, zero_grad=True)
    except roptim.RoptimError:
        assert p.data == 1
    else:
        left: Any = p.grad if own else given[0]
        assert left == 0


@pytest.mark.parametrize("sync", [False, True])
def test_an_update_that_raises_on_a_gpu_clears_where_the_step_did_not_raise(gpu: str, sync: bool) -> None:
    """Of a Parameter on a device the error arrives when it is asked for, or with ``nonfinite_sync`` in the step."""
    p = Parameter(np.zeros(4, np.float32))
    p.grad = g = np.array([1, np.nan, 2, 3], np.float32)
    opt = SGD([p], nonfinite="raise", nonfinite_sync=sync, backend=gpu, allow_software=True)
    with pytest.raises(NonfiniteError):  # noqa: PT012  # whichever of the two raises
        opt.step(zero_grad=True)
        opt.sync()
    assert g[0] == (1 if sync else 0)


def test_a_gradient_on_a_device_is_refused(gpu: str) -> None:
    """The copy that the CPU works on would be cleared, and the gradient not."""
    p, g = np.ones(3, np.float32), roptim.gpu.array(np.ones(3, np.float32), device=gpu, allow_software=True)
    with pytest.raises(TypeError, match="must be an array, got one on a device"):
        SGD([p], lr=0.5).step([g], zero_grad=True)
    assert p.tolist() == [1, 1, 1]


@pytest.mark.parametrize("value", ["no", 1, None])
def test_zero_grad_is_true_or_false(value: Any) -> None:
    p, g = np.ones(3, np.float32), np.ones(3, np.float32)
    opt = SGD([p], lr=0.5)
    for hook in (None, lambda *_: None):
        if hook is not None:
            opt.register_step_pre_hook(hook)
        with pytest.raises(TypeError, match="zero_grad must be True or False"):
            opt.step([g], zero_grad=value)
    assert (p + g).tolist() == [2, 2, 2]
