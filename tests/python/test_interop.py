"""Arrays of other libraries as parameters and gradients. Tests of torch and JAX run where these are installed."""

from __future__ import annotations

import array
import copy
import ctypes
import mmap
import re
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from helpers import fingerprint
from twins import f32, same

import roptim
from roptim import SGD, Adam, Parameter
from roptim.lr_finder import LRFinder
from roptim.swa_utils import AveragedModel


@pytest.fixture
def torch() -> Any:
    """The library, with a fixed seed."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    return torch


@pytest.fixture
def jax() -> Any:
    """The library."""
    return pytest.importorskip("jax")


def refused(kind: type[Exception], message: str) -> Any:
    """The exception class, roptim's, and how the sentence begins."""
    assert issubclass(kind, roptim.RoptimError)
    return pytest.raises(kind, match=f"^{re.escape(message)}")


TYPE, VALUE = roptim.RoptimTypeError, roptim.RoptimValueError


# ---- the buffer protocol ------------------------------------------------------------------------------------


def of_ctypes(n: int) -> Any:
    return (ctypes.c_float * n)(*[1.0] * n)


def of_a_map(n: int) -> Any:
    memory = mmap.mmap(-1, 4 * n)
    memory[:] = f32(n).tobytes()
    return memoryview(memory).cast("f")


def a_memoryview(n: int) -> Any:
    return memoryview(bytearray(f32(n).tobytes())).cast("f")


def an_array(n: int) -> Any:
    return array.array("f", [1.0] * n)


@pytest.mark.parametrize("make", [an_array, a_memoryview, of_ctypes, of_a_map])
def test_buffers_are_stepped_in_place(make: Any) -> None:
    p, g = make(4), make(4)
    for container, gradients in ((p, g), ([p], [g]), ({"p": p}, {"p": g}), ([{"params": p}], g)):
        opt = SGD(container, lr=0.25)
        opt.step(gradients)
        assert opt.param_groups[0]["params"][0] is p
    assert list(p) == [0.0] * 4
    assert list(g) == [1.0] * 4
    opt.step(g, zero_grad=True)
    assert list(p) == [-0.25] * 4
    assert list(g) == [0.0] * 4


def test_a_buffer_of_two_axes_and_one_with_gaps() -> None:
    rows = ((ctypes.c_double * 3) * 2)()
    every_second = memoryview(array.array("d", range(12)))[::2]
    SGD([rows, every_second], lr=1.0).step([np.ones((2, 3)), np.ones(6)])
    assert [list(row) for row in rows] == [[-1.0] * 3] * 2
    assert every_second.tolist() == [-1.0, 1.0, 3.0, 5.0, 7.0, 9.0]


def test_buffers_are_looked_at_like_arrays() -> None:
    read_only = memoryview(f32(2)).toreadonly()
    with refused(VALUE, "SGD: parameter 0 must be writeable, got a read-only array"):
        SGD([read_only])
    a = f32(2)
    opt = SGD([a], lr=0.5)
    opt.step([read_only])
    assert np.all(a == 0.5)
    with refused(VALUE, "SGD.step: gradient of parameter 0 must be writeable"):
        opt.step([read_only], zero_grad=True)
    for wrong in (array.array("i", [1, 2]), b"12", bytearray(2)):
        with refused(TYPE, "SGD: parameter 0 must be float32, float64, "):
            SGD([wrong])
        with pytest.raises(TYPE, match="gradient of parameter 0 must be float32, got "):
            opt.step([wrong])
    with refused(VALUE, "SGD.step: gradient of parameter 0 must be of shape (2,), got (3,)"):
        opt.step([an_array(3)])
    with refused(VALUE, "SGD: parameter 0 must be in native byte order"):
        SGD([(ctypes.c_float.__ctype_be__ * 2)()])
    with refused(VALUE, "SGD: parameter 0 must be aligned"):
        SGD([memoryview(bytearray(9))[1:].cast("f")])
    p = an_array(2)
    with refused(VALUE, "SGD: parameter 1 must be memory of its own, got memory of parameter 0"):
        SGD([p, memoryview(p)])
    with refused(VALUE, "SGD.step: gradient of parameter 0 must be memory of its own"):
        SGD([p]).step([np.frombuffer(p, np.float32)])
    assert list(p) == [1.0, 1.0]


def test_a_buffer_stays_where_it_is_while_it_is_a_parameter() -> None:
    p = an_array(3)
    opt = SGD([p])
    with pytest.raises(BufferError):
        p.append(1.0)
    del opt
    p.append(1.0)


def test_bfloat16_as_integers() -> None:
    """What a library without the dtype holds it in is viewed by whoever knows that it is."""
    bits = np.full(4, 0x3F80, np.uint16)
    with refused(TYPE, "SGD: parameter 0 must be float32, float64, "):
        SGD([bits])
    opt = SGD([bits.view(ml_dtypes.bfloat16)], lr=0.5)
    opt.step([np.full(4, 0x3F80, np.uint16).view(ml_dtypes.bfloat16)])
    assert np.all(bits == 0x3F00)


def test_parameters_wrap_buffers() -> None:
    memory, gradient = an_array(3), an_array(3)
    p = Parameter(memory)
    p.grad = gradient
    opt = SGD([p], lr=0.5)
    roptim.clip_grad_value_([p], 0.5)
    opt.step()
    assert list(memory) == [0.75] * 3
    assert list(gradient) == [0.5] * 3


# ---- DLPack -------------------------------------------------------------------------------------------------


class Exchange:
    """An array of a library that only knows DLPack."""

    def __init__(self, values: Any, device: tuple[int, int] = (1, 0), error: BaseException | None = None) -> None:
        self.values, self.device, self.error = values, device, error

    def __dlpack__(self, **options: Any) -> Any:
        if self.error is not None:
            raise self.error
        options.pop("dl_device", None)
        return self.values.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device


def test_dlpack_is_viewed() -> None:
    a, g = Exchange(f32(2, 3)[:, ::-1]), Exchange(f32(2, 3))
    if not np.from_dlpack(a).flags.writeable:
        pytest.skip("this NumPy gives no writeable views")
    opt = SGD([a], lr=0.25)
    opt.step([g])
    SGD(a, lr=0.25).step(g)
    assert np.all(a.values == 0.5)
    assert opt.param_groups[0]["params"][0] is a


def test_what_dlpack_cannot_show() -> None:
    opt = SGD([f32(2)])
    shut = f32(2)
    shut.flags.writeable = False
    viewed = "in memory that NumPy can view without a copy, got an object of type "
    for given in (
        Exchange(f32(2), error=RuntimeError("lost")),
        Exchange(f32(2), error=BufferError()),
        Exchange(f32(2).astype(">f4")),
        Exchange("no array"),
    ):
        with refused(TYPE, f"SGD: parameter 0 must be {viewed}"):
            SGD([given])
        with refused(TYPE, f"SGD.step: gradient of parameter 0 must be {viewed}"):
            opt.step([given])
    with refused(TYPE, f"SGD.step: gradient of parameter 0 must be {viewed}test_interop.Exchange (lost); "):
        opt.step([Exchange(f32(2), error=RuntimeError("lost.\nmore"))])
    cuda = Exchange(f32(2), (2, 0))
    message = "must be in the host's memory, got an object of type test_interop.Exchange on a device"
    with refused(TYPE, f"SGD.step: gradient of parameter 0 {message}"):
        opt.step([cuda])
    with refused(TYPE, f"SGD: parameter 0 {message}"):
        SGD(cuda)
    opt.step([Exchange(f32(2))])
    with pytest.raises(KeyboardInterrupt):
        opt.step([Exchange(f32(2), error=KeyboardInterrupt())])
    assert opt.update_count == 1


class Liar:
    """Says that it is something else."""

    __class__ = property(lambda self: np.ndarray)  # type: ignore[assignment]


@pytest.mark.parametrize("make", [lambda: [1.0, 2.0], lambda: 1.0, lambda: "ab", object, Liar, lambda: f32, lambda: {}])
def test_no_array_of_any_library(make: Any) -> None:
    opt = SGD([a := f32(2)])
    with pytest.raises(TYPE, match=r"must be (a numpy\.ndarray|an array), got an object of type "):
        opt._engine.step([make()])  # type: ignore[union-attr]  # containers would be read as such before
    assert np.all(a == 1)


# ---- objects that carry their gradient ----------------------------------------------------------------------


class Tensor(array.array):  # type: ignore[type-arg]
    """As torch's, as far as optimizers see them."""

    grad: Any = None


class Moving(Exchange):
    """One whose memory may be exchanged, as by `t.data = x`."""

    grad: Any = None


def tensor(n: int, value: float = 1.0) -> Any:
    return Tensor("f", [value] * n)


def test_a_loop_as_in_torch(backend: dict[str, Any]) -> None:
    w, b, frozen = tensor(3), tensor(2), tensor(1)
    opt = Adam([{"params": iter([w, frozen])}, {"params": [b], "lr": 0.1}], **backend)
    wa, ba = f32(3), f32(2)
    twin = Adam([{"params": [wa]}, {"params": [ba], "lr": 0.1}], **backend)
    for _ in range(3):
        opt.zero_grad()
        assert w.grad is None
        w.grad, b.grad = tensor(3, 0.5), f32(2)
        opt.step()
        twin.step([f32(3, value=0.5), f32(2)])
    assert w.tobytes() == wa.tobytes()
    assert b.tobytes() == ba.tobytes()
    assert frozen[0] == 1.0
    assert opt.param_groups[0]["params"][0] is w
    assert list(opt.state) == [w, b]
    assert frozen not in opt.state
    assert same(dict(opt.state[w]), dict(twin.state[0]))
    # Clearing keeps the gradients where it is asked to.
    g, h = w.grad, b.grad
    opt.zero_grad(set_to_none=False)
    assert w.grad is g
    assert list(g) == [0.0] * 3
    assert b.grad is h
    assert not h.any()
    h[:] = 1
    opt.step(zero_grad=True)
    assert not h.any()


def test_names_accumulation_and_clipping(backend: dict[str, Any]) -> None:
    p = tensor(4)
    opt = SGD([("layer.weight", p)], lr=1.0, **backend)
    p.grad = tensor(4, 0.25)
    opt.accumulate()
    opt.accumulate()
    opt.step()
    assert list(p) == [0.5] * 4
    with refused(VALUE, 'SGD.step: gradient of parameter "layer.weight" must be of shape (4,), got (3,)'):
        opt.step({"layer.weight": tensor(3)})
    p.grad = tensor(4, 2.0)
    frozen = tensor(2)
    assert roptim.clip_grad_norm_([p, frozen], 1.0) == 4.0
    assert list(p.grad) == pytest.approx([0.5] * 4)
    assert list(frozen) == [1.0, 1.0]
    assert roptim.get_total_norm([p.grad, f32(3, value=4.0)]) == pytest.approx(7.0)


def test_closures() -> None:
    p = tensor(2, 3.0)

    def closure() -> float:
        opt.zero_grad()
        p.grad = tensor(2)
        p.grad[0], p.grad[1] = 2 * p[0], 2 * p[1]
        return p[0] ** 2 + p[1] ** 2

    opt: Any = SGD([p], lr=0.25)
    assert opt.step(closure) == 18.0
    assert list(p) == [1.5, 1.5]
    opt = roptim.LBFGS([p], line_search_fn="strong_wolfe")
    assert opt.step(closure) == 4.5
    assert list(p) == pytest.approx([0.0, 0.0], abs=1e-6)


def test_without_a_gradient_of_its_own_it_is_a_plain_array() -> None:
    with refused(TYPE, "SGD.step: gradients must be given for plain arrays, got none"):
        SGD([an_array(2)]).step()
    with refused(TYPE, "SGD.accumulate: gradients must be given for plain arrays, got none"):
        SGD([an_array(2)]).accumulate()


def test_memory_that_moves_is_followed() -> None:
    old, new = f32(3), f32(3)
    p, q = Moving(old), Moving(f32(3))
    opt = Adam([p, q])
    p.grad = q.grad = f32(3)
    opt.step()
    kept = old.copy()
    p.values = new
    opt.step()
    assert np.array_equal(old, kept)
    assert np.all(new != 1)
    before = fingerprint(opt)
    for values, message in (
        (f32(4), "parameter 0 must be of shape (3,) as registered, got (4,)"),
        (np.ones(3), "parameter 0 must be float32 as registered, got float64"),
        (q.values, "parameter 1 must be memory of its own, got memory of parameter 0"),
        (opt.state[q]["exp_avg"], "parameter 0 must be memory of its own, got memory of state of parameter 1"),
    ):
        p.values = values
        for _ in range(2):
            with pytest.raises(roptim.RoptimError, match=rf"^Adam(.step)?: {re.escape(message)}"):
                opt.step()
        assert fingerprint(opt) == before
    p.values = new
    opt.step()
    assert opt.update_count == 3


def test_copies_of_the_optimizer_own_copies() -> None:
    p = Moving(f32(2))
    opt = Adam([p])
    p.grad = f32(2)
    opt.step()
    other = copy.deepcopy(opt)
    (q,) = other.param_groups[0]["params"]
    assert q is not p
    before = p.values.tobytes()
    other.step()
    assert p.values.tobytes() == before
    opt.step()
    assert p.values.tobytes() == q.values.tobytes()
    assert fingerprint(opt) == fingerprint(other)


def test_an_object_that_steps_the_optimizer_while_it_is_viewed() -> None:
    class Reentrant(Moving):
        def __dlpack__(self, **options: Any) -> Any:
            if self.grad is not None:
                opt.step()
            return super().__dlpack__(**options)

    p = Reentrant(f32(2))
    opt = SGD([p])
    p.grad = f32(2)
    with pytest.raises(roptim.RoptimError):
        opt.step()
    assert np.all(p.values == 1)


def test_an_optimizer_written_in_python_takes_arrays_and_parameters() -> None:
    class Mine(roptim.Optimizer):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            """Nothing."""

    with refused(TYPE, "Mine: parameter 0 must be a numpy.ndarray or Parameter, got an object of type Tensor"):
        Mine([tensor(2)], {})


def test_the_range_test_puts_everything_back() -> None:
    p = tensor(3)
    opt = Adam([p], lr=0.1)
    p.grad = kept = tensor(3, 0.5)

    def work(batch: float) -> float:
        p.grad = tensor(3, batch)
        opt.step()
        kept[0] = 7.0
        return float(p[0])

    before = p.tobytes()
    LRFinder(opt, work).range_test([0.25] * 20, num_iter=20)
    assert p.tobytes() == before
    assert p.grad is kept
    assert list(kept) == [0.5] * 3
    assert opt.update_count == 0
    finder = LRFinder(opt, loss_and_gradients=lambda batch: batch)
    with refused(VALUE, "LRFinder.range_test: accumulation_steps must be 1 where tensors carry their gradients, got 2"):
        finder.range_test([0.25] * 20, num_iter=10, accumulation_steps=2)
    assert p.tobytes() == before


# ---- torch --------------------------------------------------------------------------------------------------


def small_model(torch: Any) -> Any:
    nn = torch.nn
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.GroupNorm(1, 3), nn.Flatten(), nn.Linear(27, 4), nn.PReLU())


def train(torch: Any, model: Any, opt: Any, steps: int = 5) -> None:
    torch.manual_seed(1)
    for _ in range(steps):
        x, y = torch.randn(8, 2, 5, 5), torch.randint(4, (8,))
        opt.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        opt.step()


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "NAdam", "Adamax", "Rprop"])
def test_a_model_of_torch_trains_as_in_torch(torch: Any, name: str) -> None:
    ours = small_model(torch)
    theirs = copy.deepcopy(ours)
    start = copy.deepcopy(ours)
    opt = getattr(roptim, name)(ours.parameters(), lr=1e-2)
    peer = getattr(torch.optim, name)(theirs.parameters(), lr=1e-2)
    train(torch, ours, opt)
    train(torch, theirs, peer)
    for p, q, before in zip(ours.parameters(), theirs.parameters(), start.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-4, atol=1e-5)
        assert not torch.equal(p, before)
        state = {key: value for key, value in peer.state[q].items() if key != "step" and torch.is_tensor(value)}
        for key, value in state.items():
            assert np.allclose(opt.state[p][key], value.numpy(), rtol=1e-3, atol=1e-6), key


def test_groups_and_states_hold_what_was_passed(torch: Any) -> None:
    model = small_model(torch)
    opt = roptim.AdamW([{"params": model[0].parameters()}, {"params": model[3].parameters(), "lr": 1e-2}])
    opt.add_param_group({"params": model[1].parameters()})
    train(torch, model, opt, 1)
    assert opt.param_groups[0]["params"][0] is model[0].weight
    assert opt.state[model[3].bias]["step"] == 1
    assert model[4].weight not in opt.state
    assert [id(p) for p in opt.state] == [id(p) for i in (0, 3, 1) for p in model[i].parameters()]
    named = roptim.AdamW(model.named_parameters())
    assert named.param_groups[0]["param_names"] == [name for name, _ in model.named_parameters()]
    peer = torch.optim.AdamW(model.parameters())
    train(torch, model, peer, 1)
    named.load_state_dict(peer.state_dict())
    assert same(named.state[model[0].weight]["exp_avg"], peer.state[model[0].weight]["exp_avg"].numpy())


def test_frozen_unused_and_tied_parameters(torch: Any) -> None:
    nn = torch.nn
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3), "c": nn.Linear(3, 3), "unused": nn.Linear(1, 1)})
    model["b"].weight = model["a"].weight
    model["c"].requires_grad_(False)
    before = copy.deepcopy(model)
    opt = roptim.AdamW(model.parameters(), lr=0.1)
    model["c"](model["b"](model["a"](torch.ones(2, 3)))).sum().backward()
    opt.step()
    assert model["b"].weight is model["a"].weight
    for name in ("c", "unused"):
        for p, q in zip(model[name].parameters(), before[name].parameters(), strict=True):
            assert torch.equal(p, q)
    assert not torch.equal(model["a"].weight, before["a"].weight)
    with refused(VALUE, "AdamW: parameter 1 must be memory of its own"):
        roptim.AdamW([model["a"].weight, model["b"].weight])


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
def test_clearing_gradients(torch: Any) -> None:
    p = torch.nn.Parameter(torch.ones(3))
    opt = SGD([p], lr=0.5)
    opt.zero_grad()
    (p.sum() * 2).backward(create_graph=True)
    g = p.grad
    opt.step()
    assert p.tolist() == [0.0] * 3
    opt.zero_grad(set_to_none=False)
    assert p.grad is g
    assert g.tolist() == [0.0] * 3
    p.sum().backward()
    opt.step(zero_grad=True)
    assert p.tolist() == [-0.5] * 3
    assert p.grad.tolist() == [0.0] * 3
    opt.zero_grad()
    assert p.grad is None


def test_a_step_is_seen_by_backward(torch: Any) -> None:
    """A backward pass through values that a step replaced is torch's error, as after a step of its own."""
    p, q = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    loss = (p * p).sum()
    kept = (q * q).sum()
    loss.backward(retain_graph=True)
    opt = SGD([p, q])
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    # What had no gradient was not written to.
    kept.backward()
    with torch.inference_mode():
        r = torch.ones(2)
    SGD([r], lr=0.5).step([f32(2)])
    assert r.tolist() == [0.5] * 2


def test_layouts_and_dtypes_of_torch(torch: Any) -> None:
    wide = torch.arange(24.0).reshape(4, 6)
    cases = [
        (torch.ones(()), None),
        (torch.ones(0, 3), None),
        (wide.t()[::2], None),
        (torch.ones(2, 3, 4, 5).contiguous(memory_format=torch.channels_last), None),
        (torch.ones(3, dtype=torch.float64), None),
        (torch.ones(3, dtype=torch.complex64), None),
        (torch.ones(3, dtype=torch.float16), np.float16),
        (torch.ones(3, dtype=torch.bfloat16), ml_dtypes.bfloat16),
    ]
    for p, dtype in cases:
        values = p.float().numpy().astype(dtype) if dtype is not None else p.numpy().copy()
        opt, twin = Adam([p], lr=0.1), Adam([values], lr=0.1)
        for _ in range(2):
            p.grad = torch.full_like(p, 0.5)
            opt.step()
            twin.step([np.full(values.shape, 0.5, values.dtype)])
        assert same(p.float().numpy().astype(dtype) if dtype is not None else p.numpy(), values)
    assert wide[:, 1::2].flatten().tolist() == np.arange(24.0).reshape(4, 6)[:, 1::2].ravel().tolist()


def test_what_of_torch_is_refused(torch: Any) -> None:
    leaf = torch.ones(2, requires_grad=True)
    numpy_has = "float32, float64, complex64, complex128, float16 or bfloat16"
    for p, kind, message in [
        (torch.ones(2, device="meta"), TYPE, "in the host's memory, got a torch tensor on meta; move it with .cpu()"),
        (leaf * 2, VALUE, "a leaf tensor, got a result of differentiable operations; give the tensor that "),
        (torch.ones(2, dtype=torch.int64), TYPE, f"{numpy_has}, got int64"),
        (torch.ones(2, dtype=torch.complex64).conj(), TYPE, "in memory that NumPy can view without a copy, got "),
        (torch.ones(2).to_sparse(), TYPE, "in memory that NumPy can view without a copy, got "),
        (torch.ones(2, dtype=torch.float32).to(torch.float8_e5m2), TYPE, "in memory that NumPy can view without"),
        (torch.ones(1).expand(3), VALUE, "without elements that share memory, got strides [0]"),
        (torch.nn.UninitializedParameter(), TYPE, "in memory that NumPy can view without a copy, got "),
    ]:
        with refused(kind, f"SGD: parameter 0 must be {message}"):
            SGD([p])
    a = f32(2)
    opt = SGD([a], lr=0.5)
    with refused(TYPE, "SGD.step: gradient of parameter 0 must be in the host's memory, got a torch tensor on meta"):
        opt.step([torch.ones(2, device="meta")])
    opt.step([leaf * 2])
    assert np.all(a == 0)
    assert roptim.get_total_norm([leaf]) == pytest.approx(2**0.5)


def test_a_model_that_changes_under_the_optimizer(torch: Any) -> None:
    p = torch.nn.Parameter(torch.ones(3))
    opt = SGD([p], lr=0.5)
    old = p.data
    p.data = torch.zeros(3)
    p.grad = torch.ones(3)
    opt.step()
    assert p.tolist() == [-0.5] * 3
    assert old.tolist() == [1.0] * 3
    p.data = p.data.double()
    with refused(TYPE, "SGD.step: parameter 0 must be float32 as registered, got float64"):
        opt.step()
    with torch.no_grad():
        p.data = p.data.float().expand(3)
        p.set_(torch.ones(1).expand(3))
    with refused(VALUE, "SGD.step: parameter 0 must be without elements that share memory"):
        opt.step()


def test_tensors_without_ml_dtypes(torch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ml_dtypes", None)
    with pytest.raises(TYPE, match=r"got an object of type torch.Tensor \(bfloat16 needs the package ml_dtypes\)"):
        SGD([torch.ones(2, dtype=torch.bfloat16)])


def test_sparse_gradients_of_torch(torch: Any) -> None:
    table = torch.nn.Embedding(10, 3, sparse=True)
    peer = copy.deepcopy(table)
    opt, other = roptim.SparseAdam(table.parameters(), lr=0.1), torch.optim.SparseAdam(peer.parameters(), lr=0.1)
    for rows in ([1, 4, 1], [4, 9]):
        for module, optimizer in ((table, opt), (peer, other)):
            optimizer.zero_grad()
            module(torch.tensor(rows)).square().sum().backward()
            optimizer.step()
    assert torch.allclose(table.weight, peer.weight, rtol=1e-5)
    opt.zero_grad(set_to_none=False)
    assert table.weight.grad.to_dense().eq(0).all()


def test_clipping_gradients_of_torch(torch: Any) -> None:
    p = torch.nn.Parameter(torch.ones(4))
    frozen = torch.nn.Parameter(torch.full((3,), 9.0), requires_grad=False)
    p.grad = torch.full((4,), 2.0)
    assert roptim.clip_grad_norm_(iter([p, frozen]), 1.0) == 4.0
    assert p.grad.tolist() == pytest.approx([0.5] * 4)
    roptim.clip_grad_value_(p, 0.25)
    assert p.grad.tolist() == [0.25] * 4
    assert frozen.tolist() == [9.0] * 3
    assert p.tolist() == [1.0] * 4


def test_a_closure_of_torch(torch: Any) -> None:
    p = torch.nn.Parameter(torch.tensor([3.0, -2.0]))

    def closure() -> Any:
        opt.zero_grad()
        loss = (p**2).sum() + (p[0] - 1) ** 2
        loss.backward()
        return loss

    opt: Any = roptim.LBFGS([p], line_search_fn="strong_wolfe", max_iter=50)
    assert float(opt.step(closure).detach()) == 17.0
    assert p.tolist() == pytest.approx([0.5, 0.0], abs=1e-4)


def test_schedules_and_files(torch: Any, tmp_path: Any) -> None:
    model = small_model(torch)
    opt = roptim.AdamW(model.named_parameters(), lr=0.1)
    sched = roptim.lr_scheduler.StepLR(opt, 1, gamma=0.5)
    train(torch, model, opt, 2)
    sched.step()
    assert opt.param_groups[0]["lr"] == 0.05
    # A loss that could still be differentiated.
    roptim.lr_scheduler.ReduceLROnPlateau(opt).step(model[0].weight.sum())
    weights = {name: t.detach().numpy() for name, t in model.state_dict().items()}
    roptim.save({"model": weights, "opt": opt.state_dict()}, tmp_path / "x")
    resumed = small_model(torch)
    other = roptim.AdamW(resumed.named_parameters(), lr=0.1)
    saved = roptim.load(tmp_path / "x")
    resumed.load_state_dict({name: torch.from_numpy(np.asarray(a)) for name, a in saved["model"].items()})
    other.load_state_dict(saved["opt"])
    train(torch, model, opt, 2)
    train(torch, resumed, other, 2)
    for p, q in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)


# ---- JAX ----------------------------------------------------------------------------------------------------


def test_gradients_of_jax(jax: Any) -> None:
    params = {"layers": [{"W": f32(3, 2), "b": f32(2)}], "scale": np.ones((), np.float32)}
    plain = copy.deepcopy(params)

    def loss(params: Any) -> Any:
        layer = params["layers"][0]
        return ((jax.numpy.ones((4, 3)) @ layer["W"] + layer["b"]) ** 2).sum() * params["scale"]

    gradients = jax.grad(loss)(params)
    opt, twin = Adam(params), Adam(plain)
    opt.step(gradients)
    twin.step(jax.tree.map(np.array, gradients))
    assert same(params, plain)
    assert roptim.get_total_norm(jax.tree.leaves(gradients)) > 0
    a = np.ones(3, ml_dtypes.bfloat16)
    SGD([a], lr=0.5).step([jax.numpy.ones(3, jax.numpy.bfloat16)])
    assert np.all(a == 0.5)


def test_gradients_of_jax_are_not_copied(jax: Any) -> None:
    g = jax.numpy.ones(1000)
    from roptim import _foreign

    assert _foreign.view(g, "here", "this", False).ctypes.data == g.unsafe_buffer_pointer()


def test_what_of_jax_is_refused(jax: Any) -> None:
    x = jax.numpy.ones(2)
    never = "writeable, got a JAX array, which nothing may write to; copy it with numpy.array"
    a = f32(2)
    opt = SGD([a])
    with refused(VALUE, f"SGD: parameter 0 must be {never}"):
        SGD([x])
    with refused(VALUE, f"Parameter: data must be {never}"):
        Parameter(x)
    with refused(VALUE, f"SGD.step: gradient of parameter 0 must be {never}"):
        opt.step([x], zero_grad=True)
    with refused(VALUE, f"clip_grad_norm_: gradient 0 must be {never}"):
        roptim.clip_grad_norm_([x], 1.0)

    def traced(g: Any) -> Any:
        opt.step([g])
        return g

    viewed = "SGD.step: gradient of parameter 0 must be in memory that NumPy can view without a copy, got "
    with refused(
        TYPE, "SGD.step: gradient of parameter 0 must be an array with values, got a JAX array that is traced"
    ):
        jax.jit(traced)(x)
    with refused(TYPE, viewed):
        gone = jax.numpy.ones(2)
        gone.delete()
        opt.step([gone])
    with refused(VALUE, "SGD.step: gradient of parameter 0 must be of shape (2,), got (3,)"):
        opt.step([jax.numpy.ones(3)])
    assert np.all(a == 1)


@pytest.mark.parametrize("name", ["AdamW", "Muon", "LBFGS"])
def test_averages_of_a_model(torch: Any, name: str) -> None:
    """Within the step and after it, with an average of the engine's and one of one's own."""
    for options in ({}, {"avg_fn": lambda a, x, n: (a * n + x) / (n + 1)}):
        model = torch.nn.Linear(4, 3, bias=False)
        twin = copy.deepcopy(model)
        x = torch.randn(9, 4)
        sides = []
        for net in (model, twin):
            opt = getattr(roptim, name)(net.parameters())
            sides.append((net, opt, AveragedModel(list(net.parameters()), **options)))
        for _ in range(3):
            for net, opt, average in sides:

                def closure(net: Any = net, opt: Any = opt, x: Any = x) -> Any:
                    opt.zero_grad()
                    loss = (net(x) ** 2).mean() + net(x).mean()
                    loss.backward()
                    return loss

                opt.step(closure=closure, **({"average": average} if net is model else {}))
                if net is twin:
                    average.update_parameters(list(net.parameters()))
            (_, _, within), (_, _, after) = sides
            assert np.array_equal(within.module[0], after.module[0])
        before = model.weight.detach().clone()
        with within.applied_to(list(model.parameters())):
            assert np.array_equal(model.weight.detach().numpy(), within.module[0])
        assert torch.equal(before, model.weight)
        within.copy_to(list(model.parameters()))
        assert np.array_equal(model.weight.detach().numpy(), within.module[0])
