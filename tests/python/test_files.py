"""Saving and loading trees."""

from __future__ import annotations

import math
import os
import stat
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import roptim
from roptim import Adam, Parameter, load, save


def same(a: Any, b: Any) -> bool:
    """Equality of types and bits, NaN included."""
    if type(a) is not type(b):
        return False
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return (
            list(a) == list(b)
            and all(type(k) is type(q) for k, q in zip(a, b, strict=True))
            and all(same(a[k], b[k]) for k in a)
        )
    if isinstance(a, float) and not isinstance(a, np.generic):
        return struct.pack("d", a) == struct.pack("d", b)
    if isinstance(a, (np.ndarray, np.generic)):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    return bool(a == b)


DTYPES = ["bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32"]
DTYPES += ["float64", "complex64", "complex128"]
arrays = st.sampled_from(DTYPES).flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
)
integers = st.integers(-(2**63), 2**64 - 1) | st.integers(-(2**4096) + 1, 2**4096 - 1)
numbers = integers | st.floats() | st.booleans() | st.none() | st.text(max_size=8)
scalars = arrays.filter(lambda a: a.size).map(lambda a: a.reshape(-1)[0])
keys = st.text(max_size=6) | st.integers(-(2**63), 2**63 - 1)
trees = st.recursive(
    numbers | arrays | scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple) | st.dictionaries(keys, inner, max_size=3)
    ),
    max_leaves=12,
)


@given(trees)
def test_types_and_bits_survive(tmp_path: Path, tree: Any) -> None:
    path = tmp_path / "tree"
    save(tree, path)
    assert same(load(path), tree)
    first = path.read_bytes()
    save(tree, path)
    assert path.read_bytes() == first, "a tree has one file"


@given(arrays, st.permutations(range(4)), st.booleans())
def test_every_layout_is_saved_right(tmp_path: Path, array: Any, order: list[int], reverse: bool) -> None:
    view = array.transpose([axis for axis in order if axis < array.ndim])
    view = view[::-1] if reverse and view.ndim else view
    save(view, tmp_path / "x")
    back = load(tmp_path / "x")
    assert back.flags.c_contiguous
    assert back.flags.writeable
    assert same(back, np.ascontiguousarray(view).reshape(view.shape))
    if array.dtype.itemsize > 1:
        save(array.astype(array.dtype.newbyteorder(">")), tmp_path / "x")
        assert same(load(tmp_path / "x"), array)


def test_a_run_goes_into_one_file(tmp_path: Path) -> None:
    p = Parameter(np.arange(5, dtype=np.float32))
    opt = Adam([p])
    sched = roptim.lr_scheduler.CosineAnnealingLR(opt, 10)
    for _ in range(3):
        p.grad = np.ones(5, np.float32)
        opt.step()
        sched.step()
    run = {"model": {"p": p}, "optimizer": opt.state_dict(), "scheduler": sched.state_dict(), "epoch": 3}
    save(run, tmp_path / "run.safetensors")
    back = load(str(tmp_path / "run.safetensors"))
    q = Parameter(back["model"]["p"])
    again = Adam([q])
    resumed = roptim.lr_scheduler.CosineAnnealingLR(again, 10)
    resumed.load_state_dict(back["scheduler"])
    again.load_state_dict(back["optimizer"])
    for one, o, s in ((p, opt, sched), (q, again, resumed)):
        for _ in range(4):
            one.grad = np.ones(5, np.float32)
            o.step()
            s.step()
    assert p.data.tobytes() == q.data.tobytes()
    assert sched.get_last_lr() == resumed.get_last_lr()


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({1, 2}, "roptim.save: obj must be None, bool, int, float, str"),
        ({"a": [1, (2, object())]}, "roptim.save: obj['a'][1][1] must be None, bool"),
        ({"a": lambda: 0}, "roptim.save: obj['a'] must be None"),
        (
            {(1, 2): 3},
            "roptim.save: the key of obj[(1, 2)] must be a str or an int of 64 bits, got an object of type tuple",
        ),
        ({True: 3}, "roptim.save: the key of obj[True] must be a str or an int of 64 bits, got an object of type bool"),
        (2**4096, "roptim.save: obj must be an int of at most 4096 bits, got a larger one"),
        (np.array(["x"]), "roptim.save: obj must be of a numeric dtype, got dtype str32"),
        (np.array([object()]), "roptim.save: obj must be of a numeric dtype, got dtype object"),
        (np.ma.ones(3), "roptim.save: obj must be None"),
        (b"bytes", "roptim.save: obj must be None"),
        (1j, "roptim.save: obj must be None"),
    ],
)
def test_what_is_not_saved_names_its_place(tmp_path: Path, tree: Any, message: str) -> None:
    path = tmp_path / "x"
    save("old", path)
    with pytest.raises((TypeError, ValueError)) as raised:
        save(tree, path)
    assert str(raised.value).startswith(message)
    assert isinstance(raised.value, roptim.RoptimError)
    assert load(path) == "old"
    assert os.listdir(tmp_path) == ["x"]


def test_a_cycle_is_refused(tmp_path: Path) -> None:
    cycle: list[Any] = []
    cycle.append(cycle)
    with pytest.raises(ValueError, match="must be within 60 containers"):
        save(cycle, tmp_path / "x")


def test_a_dict_that_changes_while_it_is_saved(tmp_path: Path) -> None:
    class Restless:
        def state_dict(self) -> dict[str, int]:
            run["new"] = 1
            return {"n": 1}

    run: dict[str, Any] = {"restless": Restless(), "other": 2}
    save(run, tmp_path / "x")
    assert load(tmp_path / "x") == {"restless": {"n": 1}, "other": 2}


def test_damage_is_found(tmp_path: Path) -> None:
    path = tmp_path / "x"
    save({"a": np.arange(10.0), "b": [1, "two"]}, path)
    good = path.read_bytes()
    rng = np.random.default_rng(0)
    for position in {*range(0, len(good), 7), len(good) - 1}:
        damaged = bytearray(good)
        damaged[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(roptim.CheckpointError, match=str(path)):
            load(path)
    for cut in (0, 7, 8, 100, len(good) - 1):
        path.write_bytes(good[:cut])
        with pytest.raises(roptim.CheckpointError):
            load(path)
    path.write_bytes(good + b"\0")
    with pytest.raises(roptim.CheckpointError):
        load(path)


def test_foreign_files_are_refused_and_run_no_code(tmp_path: Path) -> None:
    import pickle

    class Evil:
        def __reduce__(self) -> Any:
            return (os.system, ("touch owned",))

    events: list[str] = []
    armed = True
    sys.addaudithook(lambda name, args: events.append(name) if armed else None)
    for payload in (pickle.dumps(Evil()), b"PK\x03\x04", b"\x93NUMPY\x01\0", struct.pack("<Q", 2**63) + b"{}", b""):
        (tmp_path / "evil").write_bytes(payload)
        events.clear()
        with pytest.raises(roptim.CheckpointError):
            load(tmp_path / "evil")
        assert not {"exec", "compile", "os.system", "subprocess.Popen", "pickle.find_class"} & set(events)
    armed = False


def test_files_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file") as raised:
        save(1, tmp_path / "missing" / "x")
    assert isinstance(raised.value, roptim.CheckpointIOError)
    with pytest.raises(roptim.CheckpointIOError, match="No such file"):
        load(tmp_path / "x")
    with pytest.raises(roptim.RoptimError):
        save(1, tmp_path)
    save(1, tmp_path / "x")
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o666 & ~mask
    assert os.listdir(tmp_path) == ["x"]


def test_bfloat16(tmp_path: Path) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x = np.array([1.5, math.pi, -math.inf], ml_dtypes.bfloat16)
    save(x, tmp_path / "x")
    assert same(load(tmp_path / "x"), x)


def test_a_safetensors_tool_opens_the_file(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    save({"w": np.arange(6, dtype=np.float32).reshape(2, 3)}, tmp_path / "x.safetensors")
    tensors = safetensors.load_file(tmp_path / "x.safetensors")
    assert [t.tolist() for t in tensors.values()] == [[[0, 1, 2], [3, 4, 5]]]
