"""Containers of arrays: their shape, and reading another container in that shape."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from roptim._errors import RoptimKeyError, RoptimTypeError, RoptimValueError, refuse, told
from roptim._foreign import is_array
from roptim._values import is_encodable


@dataclass(frozen=True)
class Spec:
    """Shape of a container: a leaf, a sequence, or a mapping of specs by key."""

    kind: str
    keys: tuple[Any, ...] = ()
    children: tuple[Spec, ...] = ()

    @cached_property
    def is_flat(self) -> bool:
        """Whether every child is a leaf."""
        return all(child.kind == "leaf" for child in self.children)


LEAF = Spec("leaf")
_DEEPEST = 100


def is_leaf(x: object) -> bool:
    """Whether this is one array (or something given in place of one)."""
    return not isinstance(x, (Mapping, list, tuple))


def is_pair(x: object) -> bool:
    """Whether this is a (name, array) pair."""
    return isinstance(x, tuple) and len(x) == 2 and isinstance(x[0], str) and is_leaf(x[1])


def listed(params: object, place: str) -> object:
    """``params`` with iterators turned into lists; refuses what has no order."""
    if isinstance(params, (set, frozenset)):
        raise refuse(RoptimTypeError, place, "params", "ordered", f"a {type(params).__name__}", "use a list")
    if isinstance(params, (str, bytes)) or params is None:
        raise refuse(RoptimTypeError, place, "params", "arrays or Parameters in a container", told(params))
    is_container = isinstance(params, Iterable) and not is_array(params)
    if is_container and is_leaf(params):
        items = list(params)  # type: ignore[call-overload]  # a generator, say
        if not items and isinstance(params, Iterator):
            remedy = "a generator can be gone through once: make a list of it and give that to each"
            raise refuse(RoptimValueError, place, "params", "at least one array", "a generator at its end", remedy)
        return items
    if is_leaf(params) and callable(getattr(params, "parameters", None)):
        got, remedy = f"an object of type {type(params).__name__}", "give what its parameters() returns"
        raise refuse(RoptimTypeError, place, "params", "arrays or Parameters in a container", got, remedy)
    return params


class _Walk:
    """What is found on the way through a container. No closure: one that calls itself would keep all of it in memory
    until cycles are collected."""

    def __init__(self, place: str) -> None:
        self.place = place
        self.leaves: list[Any] = []
        self.names: list[str] = []
        self.named = False

    def through(self, node: object, path: str, depth: int = 0) -> Spec:
        if depth > _DEEPEST:
            raise refuse(RoptimValueError, self.place, "params", f"within {_DEEPEST} containers", "one more")
        if isinstance(node, Mapping):
            self.named = True
            items = list(node.items())
        elif isinstance(node, (list, tuple)):
            if node and all(is_pair(item) for item in node):
                self.named = True
                self.leaves.extend(array for _, array in node)
                self.names.extend(path + name for name, _ in node)
                return Spec("pairs", tuple(name for name, _ in node), (LEAF,) * len(node))
            if any(is_pair(item) for item in node):
                got = f"item {next(i for i, item in enumerate(node) if not is_pair(item))} without a name"
                raise refuse(RoptimValueError, self.place, "params", "all named or all without names", got)
            items = list(enumerate(node))
        else:
            self.leaves.append(node)
            self.names.append(path.removesuffix("."))
            return LEAF
        kind = "mapping" if isinstance(node, Mapping) else "sequence"
        children = tuple(self.through(child, f"{path}{key}.", depth + 1) for key, child in items)
        return Spec(kind, tuple(key for key, _ in items), children)


def flatten(tree: object, place: str) -> tuple[Spec, list[Any], list[str] | None]:
    """Spec, arrays and names of a container; names are None where nothing in it names anything."""
    walk = _Walk(place)
    spec = walk.through(tree, "")
    if not walk.named or not walk.leaves:
        return spec, walk.leaves, None
    check_names(walk.names, place)
    return spec, walk.leaves, walk.names


def check_names(names: list[str], place: str) -> None:
    """Refuses names that repeat, or that no file could hold."""
    seen: set[str] = set()
    for name in names:
        if not isinstance(name, str):
            raise refuse(RoptimTypeError, place, "names", "strings", told(name))
        if name in seen:
            raise refuse(RoptimValueError, place, "names", "different", f"{name!r} twice")
        if not is_encodable(name):
            raise refuse(RoptimValueError, place, "names", "text that UTF-8 can hold", ascii(name))
        seen.add(name)


def _usual(spec: Spec, tree: Any) -> list[Any] | None:
    """The leaves of what steps are mostly given; None for anything else. Asking whether an object is a mapping takes as
    long as a small step."""
    kind = type(tree)
    if kind is np.ndarray:
        return [tree] if spec.kind == "leaf" else None
    if (kind is not list and kind is not dict) or not spec.is_flat or len(tree) != len(spec.keys):
        return None
    if kind is list:
        # What is no array among them is refused where arrays are looked at.
        return tree if spec.kind == "sequence" else None
    if spec.kind == "sequence":
        return None
    leaves = [tree[key] for key in spec.keys if key in tree]
    return leaves if len(leaves) == len(tree) else None


def read(spec: Spec, tree: Any, place: str, path: str = "", what: str = "gradient") -> list[Any]:
    """The leaves of ``tree`` in the order of ``spec``; a missing or surplus name is an error.

    ``what`` is what messages call a leaf.
    """
    usual = _usual(spec, tree)
    if usual is not None:
        return usual
    if spec.kind == "leaf":
        if isinstance(tree, (Mapping, list, tuple)):
            raise refuse(
                RoptimTypeError,
                place,
                f"{what} {path or 'given'}",
                "an array",
                f"an object of type {type(tree).__name__}",
            )
        return [tree]
    where = f"{what}s of {path}" if path else f"{what}s"
    if isinstance(tree, Mapping) and spec.kind in ("mapping", "pairs"):
        if tree.keys() != set(spec.keys):
            missing = [str(key) for key in spec.keys if key not in tree]
            surplus = [str(key) for key in tree if key not in spec.keys]
            got = " and ".join(
                text
                for text, some in (
                    (f"none for {', '.join(missing)}", missing),
                    (f"a surplus {', '.join(surplus)}", surplus),
                )
                if some
            )
            allowed = f"given for {', '.join(map(str, spec.keys))}"
            remedy = "give None to skip a parameter" if what == "gradient" else None
            raise refuse(RoptimKeyError, place, where, allowed, got, remedy)
        children = [tree[key] for key in spec.keys]
    elif isinstance(tree, (list, tuple)) and spec.kind in ("sequence", "pairs"):
        if spec.kind == "pairs" and tree and all(is_pair(item) for item in tree):
            return read(spec, dict(tree), place, path, what)
        if len(tree) != len(spec.keys):
            raise refuse(RoptimValueError, place, where, f"{len(spec.keys)} in number", str(len(tree)))
        children = list(tree)
    else:
        kind = "a dict" if spec.kind == "mapping" else "a list"
        raise refuse(
            RoptimTypeError, place, where, f"{kind} like the parameters", f"an object of type {type(tree).__name__}"
        )
    if spec.is_flat:
        # What is no array among them is refused where arrays are looked at.
        return children
    out: list[Any] = []
    for key, child_spec, child in zip(spec.keys, spec.children, children, strict=True):
        out.extend(read(child_spec, child, place, f"{path}.{key}" if path else str(key), what))
    return out
