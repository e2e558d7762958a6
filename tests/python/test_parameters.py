"""What an optimizer takes as parameters and gradients, and what it refuses."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import roptim
from roptim import SGD, Adam, Parameter


def f32(*shape: int, value: float = 1.0) -> Any:
    return np.full(shape, value, np.float32)


def refused(kind: type[Exception], message: str) -> Any:
    """The exception class and the whole sentence."""
    return pytest.raises(kind, match=f"^{re.escape(message)}$")


# ---- containers ---------------------------------------------------------------------------------------------


def test_list_dict_nested_pairs_groups_and_one_array() -> None:
    a, b, c = f32(2), f32(3), f32()
    cases: list[tuple[Any, Any]] = [
        ([a, b, c], [a + 1, b + 1, c + 1]),
        ((a, b, c), (a + 1, b + 1, c + 1)),
        ({"a": a, "b": b, "c": c}, {"c": c + 1, "a": a + 1, "b": b + 1}),
        ({"x": [a, {"y": b}], "c": c}, {"x": [a + 1, {"y": b + 1}], "c": c + 1}),
        ([{"W": a, "b": b}, {"W": c}], [{"W": a + 1, "b": b + 1}, {"W": c + 1}]),
        ([("a", a), ("b", b), ("c", c)], {"a": a + 1, "b": b + 1, "c": c + 1}),
        ([("a", a), ("b", b), ("c", c)], [("a", a + 1), ("b", b + 1), ("c", c + 1)]),
        ([("a", a), ("b", b), ("c", c)], [a + 1, b + 1, c + 1]),
        ([{"params": [a, b]}, {"params": c}], [[a + 1, b + 1], c + 1]),
        ([{"params": [a, b]}, {"params": c}], [a + 1, b + 1, c + 1]),
        ([{"params": {"a": a, "b": b}}, {"params": {"c": c}}], {"a": a + 1, "b": b + 1, "c": c + 1}),
        ((x for x in (a, b, c)), [a + 1, b + 1, c + 1]),
    ]
    for params, gradients in cases:
        for x in (a, b, c):
            x[...] = 1
        SGD(params, lr=0.5).step(gradients)
        for x in (a, b, c):
            assert np.all(x == 0.0), (params, gradients)
    SGD(a, lr=1.0).step(f32(2, value=3.0))
    assert np.all(a == -3.0)


def test_names_come_from_dicts_and_pairs() -> None:
    opt = Adam({"layers": [{"W": f32(2)}, {"W": f32(3)}], "scale": f32(1)})
    assert opt.param_groups[0]["param_names"] == ["layers.0.W", "layers.1.W", "scale"]
    assert "param_names" not in Adam([f32(2)]).param_groups[0]
    with refused(ValueError, "Adam: names must be different, got 'a.b' twice"):
        Adam({"a": {"b": f32(2)}, "a.b": f32(2)})


def test_none_skips_a_parameter() -> None:
    a, b = f32(2), f32(3)
    opt = Adam({"a": a, "b": b})
    opt.step({"a": f32(2), "b": None})
    assert np.all(b == 1.0)
    assert list(opt.state_dict()["state"]) == [0]
    assert "b" not in opt.state


def test_wrong_gradients_are_named_and_change_nothing() -> None:
    a, b = f32(2), f32(3)
    opt = Adam({"a": a, "b": b})
    remedy = "; give None to skip a parameter"
    for gradients, kind, message in [
        ({"a": f32(2)}, KeyError, f"Adam.step: gradients must be given for a, b, got none for b{remedy}"),
        (
            {"a": f32(2), "b": f32(3), "c": f32(1)},
            KeyError,
            f"Adam.step: gradients must be given for a, b, got a surplus c{remedy}",
        ),
        (
            [f32(2), f32(3)],
            TypeError,
            "Adam.step: gradients must be a dict like the parameters, got an object of type list",
        ),
        (
            {"a": f32(3), "b": f32(3)},
            ValueError,
            'Adam.step: gradient of parameter "a" must be of shape (2,), got (3,)',
        ),
        (
            {"a": np.ones(2), "b": f32(3)},
            TypeError,
            'Adam.step: gradient of parameter "a" must be float32, got float64; cast it with .astype(numpy.float32)',
        ),
        (
            {"a": [1.0, 2.0], "b": f32(3)},
            TypeError,
            'Adam.step: gradient of parameter "a" must be a numpy.ndarray, got an object of type list; '
            "convert it with numpy.asarray",
        ),
        (
            {"a": a, "b": f32(3)},
            ValueError,
            'Adam.step: gradient of parameter "a" must be memory of its own, got memory of parameter "a"; '
            "copy it with .copy()",
        ),
        (
            {"a": b[:2], "b": f32(3)},
            ValueError,
            'Adam.step: gradient of parameter "a" must be memory of its own, got memory of parameter "b"; '
            "copy it with .copy()",
        ),
        ({"a": f32(2).astype(">f4"), "b": None}, ValueError, None),
        ({"a": np.frombuffer(b"\0" * 9, np.uint8)[1:].view(np.float32), "b": None}, ValueError, None),
        ({"a": np.ma.ones(2, np.float32), "b": None}, TypeError, None),
        ({"a": "x", "b": None}, TypeError, None),
    ]:
        context = pytest.raises(kind) if message is None else refused(kind, message)
        with context as raised:
            opt.step(gradients)
        assert isinstance(raised.value, roptim.RoptimError)
        assert np.all(a == 1.0)
        assert np.all(b == 1.0)
        assert opt.state_dict()["state"] == {}
        assert opt.update_count == 0


def test_a_gradient_must_not_be_state() -> None:
    a = f32(4)
    opt = SGD([a], momentum=0.9)
    opt.step([f32(4)])
    with pytest.raises(ValueError, match="memory of state of parameter 0"):
        opt.step([opt.state[a]["momentum_buffer"]])


def test_plain_arrays_need_gradients() -> None:
    with refused(
        TypeError,
        "SGD.step: gradients must be given for plain arrays, got none; "
        "call step(gradients), or wrap the arrays in roptim.Parameter and set .grad",
    ):
        SGD([f32(2)]).step()


# ---- the gate -----------------------------------------------------------------------------------------------


def read_only() -> Any:
    x = f32(3)
    x.flags.writeable = False
    return x


DTYPES = "float32, float64, complex64, complex128, float16 or bfloat16"


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: [[1.0, 2.0]], TypeError, "SGD: parameter 0 must be a numpy.ndarray, got an object of type float"),
        (lambda: ["abc"], TypeError, "SGD: parameter 0 must be a numpy.ndarray, got an object of type str"),
        (
            lambda: [np.float32(1)],
            TypeError,
            "SGD: parameter 0 must be a numpy.ndarray, got an object of type numpy.float32",
        ),
        (lambda: [np.ones(2, np.int64)], TypeError, f"SGD: parameter 0 must be {DTYPES}, got int64"),
        (lambda: [np.array([object()])], TypeError, f"SGD: parameter 0 must be {DTYPES}, got object"),
        (lambda: [np.ones(2, np.uint16)], TypeError, f"SGD: parameter 0 must be {DTYPES}, got uint16"),
        (lambda: [np.ma.ones(2, np.float32)], TypeError, "SGD: parameter 0 must be a numpy.ndarray"),
        (lambda: [read_only()], ValueError, "SGD: parameter 0 must be writeable, got a read-only array"),
        (lambda: [np.broadcast_to(np.float32(1), (3,))], ValueError, "SGD: parameter 0 must be writeable"),
        (lambda: [f32(3).astype(">f4")], ValueError, "SGD: parameter 0 must be in native byte order, got dtype >f4"),
        (
            lambda: [np.zeros(13, np.uint8)[1:].view(np.float32)],
            ValueError,
            "SGD: parameter 0 must be aligned, got a misaligned array",
        ),
        (
            lambda: [np.lib.stride_tricks.as_strided(f32(4), (3,), (0,))],
            ValueError,
            "SGD: parameter 0 must be without elements that share memory",
        ),
        (
            lambda: [np.lib.stride_tricks.as_strided(f32(9), (3, 3), (4, 8))],
            ValueError,
            "SGD: parameter 0 must be without elements that share memory",
        ),
        (list, ValueError, "SGD: params must be at least one array, got an empty container"),
        (dict, ValueError, "SGD: params must be at least one array, got an empty container"),
        (lambda: {"a", "b"}, TypeError, "SGD: params must be ordered, got a set; use a list"),
        (lambda: "abc", TypeError, "SGD: params must be arrays or Parameters in a container, got 'abc'"),
        (lambda: None, TypeError, "SGD: params must be arrays or Parameters in a container, got None"),
    ],
)
def test_refused_parameters(make: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match="^" + re.escape(message)) as raised:
        SGD(make())
    assert isinstance(raised.value, roptim.RoptimError)


def test_repeated_and_overlapping_parameters() -> None:
    a = f32(10)
    with pytest.raises(ValueError, match="parameter 1 must be memory of its own, got the array of parameter 0 again"):
        SGD([a, a])
    with pytest.raises(ValueError, match="parameter 1 must be memory of its own, got memory of parameter 0"):
        SGD([a[:6], a[5:]])
    opt = SGD([a[:5]])
    with pytest.raises(ValueError, match="got memory of parameter 0"):
        opt.add_param_group({"params": [a]})
    assert len(opt.param_groups) == 1
    p = Parameter(a)
    with pytest.raises(ValueError, match="got the array of parameter 0 again"):
        SGD([p, p])


def test_interleaved_views_are_disjoint() -> None:
    x = np.zeros((4, 6), np.float32)
    SGD([x[:, ::2], x[:, 1::2]], lr=1.0).step([f32(4, 3), f32(4, 3, value=2.0)])
    assert np.all(x[:, ::2] == -1.0)
    assert np.all(x[:, 1::2] == -2.0)


@given(st.data())
def test_overlap_is_found_exactly(data: st.DataObject) -> None:
    base = np.zeros(24, np.float32)

    def view() -> Any:
        start, stop = sorted(data.draw(st.tuples(st.integers(0, 24), st.integers(0, 24))))
        return base[start : stop : data.draw(st.integers(1, 4))][:: data.draw(st.sampled_from([1, -1]))]

    a, b = view(), view()
    if np.shares_memory(a, b):
        with pytest.raises(ValueError, match="memory"):
            SGD([a, b])
    else:
        SGD([a, b])


def test_what_changes_after_registration_is_seen() -> None:
    a = f32(3)
    opt = SGD([a], lr=1.0)
    a.flags.writeable = False
    with pytest.raises(ValueError, match=r"^SGD.step: parameter 0 must be writeable"):
        opt.step([f32(3)])
    a.flags.writeable = True
    opt.step([f32(3)])
    assert np.all(a == 0.0)
    a.resize((5,), refcheck=False)
    with pytest.raises(ValueError, match=r"must be of shape \(3,\) as registered, got \(5,\)"):
        opt.step([f32(3)])


@given(
    shape=hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5),
    dtype=st.sampled_from([np.float32, np.float64]),
    order=st.permutations(range(4)),
    steps=st.lists(st.sampled_from([1, 2, -1, -3]), min_size=4, max_size=4),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_layout_gives_the_bits_of_the_contiguous_case(
    shape: tuple[int, ...], dtype: Any, order: list[int], steps: list[int], seed: int
) -> None:
    rng = np.random.default_rng(seed)

    def laid_out(values: Any) -> Any:
        axes = [axis for axis in order if axis < values.ndim]
        big = np.full([values.shape[axis] * abs(steps[axis]) for axis in axes], np.nan, dtype)
        view = big[tuple(slice(None, None, steps[axis]) for axis in axes)] if axes else big
        view = view.transpose(np.argsort(axes)) if axes else view
        view[...] = values
        return view

    start = rng.standard_normal(shape).astype(dtype)
    plain, strided = start.copy(), laid_out(start)
    first, second = Adam([plain], weight_decay=0.1), Adam([strided], weight_decay=0.1)
    for _ in range(3):
        g = np.asarray(rng.standard_normal(shape), dtype)
        first.step([g])
        second.step([laid_out(g)])
    assert plain.tobytes() == np.ascontiguousarray(strided).tobytes()
    assert first.state[0]["exp_avg"].tobytes() == second.state[0]["exp_avg"].tobytes()
    assert second.state[0]["exp_avg"].shape == shape


def test_memory_maps_are_arrays(tmp_path: Any) -> None:
    m = np.memmap(tmp_path / "w", np.float32, "w+", shape=(4,))
    SGD([m], lr=1.0).step([f32(4)])
    assert np.all(m == -1.0)


# ---- Parameter ----------------------------------------------------------------------------------------------


def test_parameter_wraps_without_copying() -> None:
    a = np.arange(6, dtype=np.float32).reshape(2, 3)
    p = Parameter(a, name="W")
    assert p.data is a
    assert (p.shape, p.dtype, p.size, p.ndim, p.name, p.requires_grad) == ((2, 3), np.float32, 6, 2, "W", True)
    assert p.grad is None
    x = np.ones((4, 2), np.float32)
    assert type(x @ p + p[0]) is np.ndarray
    assert np.array_equal(x @ p, x @ a)
    assert np.array_equal(np.exp(-p), np.exp(-a))
    assert np.sum(p) == a.sum()
    assert len({p, p}) == 1
    assert np.array_equal(p.T, a.T)
    p *= 2
    assert isinstance(p, Parameter)
    assert np.shares_memory(p.data, a)
    assert a[1, 2] == 10
    p[0] = 7
    p.data = a * 0 + p.data
    assert np.all(a[0] == 7)
    with pytest.raises(ValueError, match=r"Parameter.data: value must be of shape \(2, 3\) or a number, got \(3,\)"):
        p.data = np.ones(3)


def test_torch_shaped_loop_with_accumulation_and_freezing(backend: dict[str, Any]) -> None:
    w, b = Parameter(f32(3)), Parameter(f32(2), requires_grad=False)
    opt = SGD([w, b], lr=0.5, **backend)
    w.grad = f32(3)
    w.grad += f32(3)
    b.grad = f32(2)
    opt.step()
    assert np.all(w.data == 0.0)
    assert np.all(b.data == 1.0)
    opt.zero_grad()
    assert w.grad is None
    opt.step()
    assert np.all(w.data == 0.0)
    b.requires_grad = True
    b.grad = f32(2)
    opt.step()
    assert np.all(b.data == 0.5)
    b.grad = g = f32(2)
    opt.zero_grad(set_to_none=False)
    assert b.grad is g
    assert np.all(g == 0.0)


def test_a_scalar_gradient_for_a_0d_parameter() -> None:
    p = Parameter(np.array(2.0))
    opt = SGD([p], lr=0.25)
    p.grad = 2 * p.data  # NumPy gives a scalar, not an array
    opt.step()
    assert p.item() == 1.0


def test_closure() -> None:
    p = Parameter(f32(2))
    opt = SGD([p], lr=0.5)

    def closure() -> float:
        p.grad = f32(2)
        return 3.5

    assert opt.step(closure) == 3.5
    assert np.all(p.data == 0.5)
    a = f32(2)
    assert SGD([a], lr=0.5).step(lambda: (1.25, [f32(2)])) == 1.25
    assert np.all(a == 0.5)
    assert opt.step(closure=closure) == 3.5
