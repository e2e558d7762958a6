"""States of other libraries' optimizers: from torch and optax, and to torch; and trees of values as JSON.

Neither library is imported to read its states: tensors and states are known by the names of their classes, fields
and keys. The values of the parameters are no part of it.

That a state is of the formula it is loaded for is checked as far as the state says so; each function names where it
does not.
"""

from __future__ import annotations

import copy
import importlib
import operator
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from roptim import _roptim, _tree
from roptim._errors import RoptimKeyError, RoptimRuntimeError, RoptimTypeError, RoptimValueError, refuse, told
from roptim._groups import SWITCHES, settled
from roptim.optimizer import REGISTRY

__all__ = ["from_json", "from_optax", "from_torch", "to_json", "to_torch"]

#: Classes of torch.optim that keep the state of the registry's class of that name.
_TORCHS = frozenset(REGISTRY) - {"ConjugateGradient"}
#: Numbers of each parameter that torch keeps as 0-d float32 tensors, of parameters in float64 too.
_SCALARS = frozenset(name for entry in REGISTRY.values() for name in entry["scalars"])
#: Values of all parameters at once.
_JOINT = frozenset(name for entry in REGISTRY.values() for name in entry["joint"])
#: Of these, what torch keeps as 0-d tensors in the parameters' dtype.
_JOINT_TENSORS = frozenset({"H_diag", "ro", "al"})
#: State with the shape of its parameter.
_LIKE_PARAMETER = frozenset(name for entry in REGISTRY.values() for name in entry["slots"]) - {"row_var", "col_var"}
#: Every hyperparameter of every class.
_HYPERS = frozenset(name for entry in REGISTRY.values() for name in entry["defaults"])
#: What optimizers are commonly called in checkpoints.
_IN_CHECKPOINTS = ("optimizer", "optimizer_state_dict", "optimizer_state", "optim", "opt")

#: Where optax's two moments are kept, by class.
_MOMENTS = {
    "Adam": ("exp_avg", "exp_avg_sq"),
    "AdamW": ("exp_avg", "exp_avg_sq"),
    "Adamax": ("exp_avg", "exp_inf"),
    "RAdam": ("exp_avg", "exp_avg_sq"),
}
#: States of optax with the fields of Adam's and another meaning.
_OTHERS = {"ScaleByBeliefState": "adabelief", "ScaleByNovogradState": "novograd"}


def from_torch(
    state_dict: Mapping[str, Any],
    names: Iterable[str] | Iterable[tuple[str, Any]] | Mapping[int, str] | None = None,
) -> dict[str, Any]:
    """The state dict of a torch optimizer as one for roptim's optimizer of the same class.

    Tensors become NumPy arrays that share no memory with them, steps and tensors of one number (a tensor ``lr``, say)
    become numbers, and torch's kernel switches (``foreach``, ``fused``, ``capturable``, ``differentiable``) go. Which
    class it is of, a state dict of torch does not say: ``load_state_dict`` refuses one whose state does not fit, but
    Adam's and RAdam's state, for one, have the same keys.

    Parameters
    ----------
    state_dict : dict
        What ``state_dict()`` of an optimizer of torch returned, or the part of a checkpoint that holds it.
    names : optional
        Names of the parameters, so that they are matched by name:

        - strings in the order of the optimizer's parameters, over all groups;
        - a dict of index and name;
        - (name, tensor) pairs in that order, as ``model.named_parameters()`` gives them. Shapes are compared.

        By default the names that the dict has, if it has some (torch 2.6 and later, of named parameters).

    Returns
    -------
    dict
        For ``load_state_dict``; also for :func:`roptim.save`.

    Raises
    ------
    RoptimError
        If this is no optimizer's state dict, if names are too many, too few, the same or no strings, or if a tensor
        is of a dtype that NumPy does not have. bfloat16 needs ``ml_dtypes`` installed.

    Examples
    --------
    ::

        checkpoint = torch.load("model.pt", map_location="cpu")
        opt = roptim.AdamW({name: checkpoint["model"][name].numpy().copy() for name in names})
        opt.load_state_dict(roptim.convert.from_torch(checkpoint["optimizer"], names=names))
    """
    place = "convert.from_torch"
    _check_layout(place, state_dict)
    state: dict[Any, Any] = {}
    for index, entry in state_dict["state"].items():
        where = f"of parameter {index}"
        if not isinstance(entry, Mapping):
            raise refuse(RoptimTypeError, place, f"state {where}", "a dict", f"an object of type {_type(entry)}")
        read = {key: _from_torch(place, f"{key} {where}", key, value) for key, value in entry.items()}
        # Adagrad's state is there from construction on. At step 0 there is nothing in it that roptim would keep.
        if read.get("step") != 0:
            state[index] = read
    groups = [_group_from_torch(place, i, group) for i, group in enumerate(state_dict["param_groups"])]
    if names is not None:
        _name(place, groups, names, state)
    return {"state": state, "param_groups": groups}


def to_torch(state_dict: Mapping[str, Any], *, tensors: bool = False) -> dict[str, Any]:
    """A state dict of roptim as one of torch's optimizer of the same class.

    torch has no place for all that roptim saves. Left out are the counts of updates and of skipped ones, steps where
    torch counts none (SGD, Muon), and schedules: the groups hold the values of the coming update.

    Parameters
    ----------
    state_dict : dict
        What ``state_dict()`` of an optimizer of roptim returned.
    tensors : bool
        True for tensors, as ``load_state_dict`` of torch wants them: this alone needs torch. False for arrays in the
        shapes and dtypes of the tensors.

    Returns
    -------
    dict
        ``"state"`` and ``"param_groups"``, sharing no memory with ``state_dict``. ``step`` is a 0-d float32 array,
        as torch keeps it (of SparseAdam an int), and so are ``mu_product``, ``eta`` and ``mu``, which are float64
        here.

    Raises
    ------
    RoptimError
        If torch has no such optimizer, if this is no optimizer's state dict, or if ``tensors=True`` and torch is not
        installed.

    Examples
    --------
    ::

        opt = torch.optim.AdamW(model.parameters())
        opt.load_state_dict(roptim.convert.to_torch(saved["opt"], tensors=True))

    >>> W = np.ones((3, 2), np.float32)
    >>> opt = roptim.Adam([W], lr=0.1)
    >>> opt.step([np.ones_like(W)])
    >>> roptim.convert.to_torch(opt.state_dict())["state"][0]["step"]
    array(1., dtype=float32)
    """
    place = "convert.to_torch"
    _check_layout(place, state_dict)
    kind = _class(place, state_dict)
    state: dict[Any, Any] = {}
    for index, entry in state_dict["state"].items():
        if not isinstance(entry, Mapping):
            raise refuse(
                RoptimTypeError, place, f"state of parameter {index}", "a dict", f"an object of type {_type(entry)}"
            )
        # torch has the step first.
        ordered = sorted(entry, key=lambda key: key != "step")
        state[index] = {key: _to_torch(place, kind, index, key, entry) for key in ordered}
    groups = [{key: copy.deepcopy(value) for key, value in group.items()} for group in state_dict["param_groups"]]
    out: dict[str, Any] = {"state": state, "param_groups": groups}
    if tensors:
        out = _tensors(place, out)
    return out


def from_optax(opt_state: Any, params: Any, *, optimizer: str = "Adam", lr: float | None = None) -> dict[str, Any]:
    """The state of an optax optimizer of the Adam family as a state dict of roptim.

    optax keeps hyperparameters and schedules in functions, so they are roptim's optimizer's own afterwards: give them
    to its constructor. optax's schedules are functions of the same count of updates, which is taken over. Its
    ``adamw`` decays by ``weight_decay=1e-4`` by default, roptim's by ``1e-2``. What optax keeps besides (gradients
    that ``MultiSteps`` has gathered, traces of other transformations) is left out.

    optax has one class of state for ``adam``, ``adamw``, ``adamax``, ``radam`` and others; which of them it was is
    for you to know. ``nadam`` and ``amsgrad`` are other formulas than torch's and roptim's: nadam has no schedule of
    momenta, and amsgrad keeps the largest second moment after its bias correction, torch before. So is anything with
    ``eps_root`` or ``nesterov``, which the state does not show. radam adds ``eps`` after a bias correction, roptim
    before it, which changes an update by a part of about 1e-7 over the size of the gradients at most.

    Parameters
    ----------
    opt_state
        The state: optax's tuples in one another, of ``chain``, ``inject_hyperparams``, ``MultiSteps`` and so on.
        It must contain one state of the family.
    params
        The parameters as roptim's optimizer was given them, in one group. Their names are compared with those of
        the state's trees, ``"layer.W"`` being that of ``{"layer": {"W": array}}``.
    optimizer : {"Adam", "AdamW", "Adamax", "RAdam"}
        The class.
    lr : float, optional
        A learning rate to put into the group; by default the optimizer's own stays.

    Returns
    -------
    dict
        For ``load_state_dict``. A parameter that optax had masked out has no state.

    Raises
    ------
    RoptimError
        If there is no such state in it or several, if it is one of a formula that roptim does not have, or if names
        or shapes differ from the parameters'.

    Examples
    --------
    ::

        params = {name: np.array(p) for name, p in jax_params.items()}
        opt = roptim.AdamW(params, lr=1e-3, weight_decay=1e-4)
        opt.load_state_dict(roptim.convert.from_optax(opt_state, params, optimizer="AdamW"))
    """
    place = "convert.from_optax"
    if optimizer in ("NAdam", "nadam"):
        remedy = "optax's nadam has no schedule of momenta, torch's and roptim's NAdam has: another formula"
        raise refuse(RoptimValueError, place, "optimizer", f"one of {', '.join(_MOMENTS)}", told(optimizer), remedy)
    if not isinstance(optimizer, str) or optimizer not in _MOMENTS:
        raise refuse(RoptimValueError, place, "optimizer", f"one of {', '.join(_MOMENTS)}", told(optimizer))
    if lr is not None and (isinstance(lr, bool) or not isinstance(settled(lr), (int, float))):
        raise refuse(RoptimTypeError, place, "lr", "None or a number", told(lr))
    params = _tree.listed(params, place)
    if isinstance(params, (list, tuple)) and any(isinstance(p, Mapping) and "params" in p for p in params):
        raise refuse(RoptimValueError, place, "params", "one container of arrays", "groups")
    spec, leaves, names = _tree.flatten(params, place)
    paths = list(_paths(spec))

    found = list(_adams(opt_state))
    if len(found) != 1:
        allowed = "one that contains one state with count, mu and nu, of optax's Adam family"
        which = "give the one that belongs to these parameters" if found else None
        raise refuse(RoptimValueError, place, "opt_state", allowed, str(len(found) or "none"), which)
    fields = found[0]
    if "nu_max" in fields:
        remedy = "its maximum is of moments after bias correction, torch's and roptim's of those before"
        raise refuse(RoptimValueError, place, "opt_state", "of a formula that roptim has", "optax's amsgrad", remedy)
    if fields["type"] in _OTHERS:
        got = f"optax's {_OTHERS[fields['type']]}"
        raise refuse(RoptimValueError, place, "opt_state", "of a formula that roptim has", got)
    count = _count(place, fields["count"])

    moments = [_matched(place, what, fields[what], paths) for what in ("mu", "nu")]
    state: dict[int, dict[str, Any]] = {}
    for index, (path, leaf, *both) in enumerate(zip(paths, leaves, *moments, strict=True)):
        # A parameter that was never updated has no state, as it has none after construction.
        if count == 0 or any(moment is None for moment in both):
            continue
        entry: dict[str, Any] = {"step": count}
        for what, slot, moment in zip(("mu", "nu"), _MOMENTS[optimizer], both, strict=True):
            entry[slot] = _moment(place, f"{what} of {path or 'the parameter'}", moment, leaf)
        state[index] = entry
    group: dict[str, Any] = {"params": list(range(len(leaves)))}
    if names is not None:
        group["param_names"] = names
    if lr is not None:
        group["lr"] = settled(lr)
    about = {"optimizer": optimizer, "format": 1, "update_count": count, "skip_count": 0}
    return {"state": state, "param_groups": [group], "roptim": about}


# ---- JSON -----------------------------------------------------------------------------------------------------------


def to_json(obj: Any) -> str:
    """A tree of values as JSON text: the same types and bits as in a file of :func:`roptim.save`, to be read by people.

    An array is ``{"$tensor": {"dtype": "float32", "shape": [2], "data": [0.5, 1.0]}}``; the other forms are those of
    the checkpoint format.

    Parameters
    ----------
    obj
        What :func:`roptim.save` takes.

    Raises
    ------
    RoptimTypeError
        If something in the tree is of another type; the message names its place.
    """
    return _roptim.to_json(obj, "convert.to_json")


def from_json(text: str) -> Any:
    """The tree of a text of :func:`to_json`.

    Raises
    ------
    CheckpointError
        If the text is something else.
    """
    if not isinstance(text, str):
        raise refuse(RoptimTypeError, "convert.from_json", "text", "a str", f"an object of type {_type(text)}")
    return _roptim.from_json(text, "convert.from_json")


# ---- whole files of torch -------------------------------------------------------------------------------------------


def _from_torch_tree(place: str, value: Any, names: Any = None) -> Any:
    """What torch.load returned: tensors as arrays, states of optimizers as :func:`from_torch` has them."""
    if _is_state_dict(value):
        return from_torch(value, names)
    if isinstance(value, Mapping):
        return {key: _from_torch_tree(place, item, names) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_from_torch_tree(place, item, names) for item in value]
        return items if isinstance(value, list) else tuple(items)
    return _array(place, "a tensor", value) if _is_tensor(value) else value


def _to_torch_tree(place: str, value: Any) -> Any:
    """A tree with tensors in place of arrays, states of optimizers as :func:`to_torch` has them."""
    if _is_state_dict(value):
        return to_torch(value, tensors=True)
    if isinstance(value, dict):
        return {key: _to_torch_tree(place, item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_to_torch_tree(place, item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    return _tensors(place, value) if isinstance(value, np.ndarray) else settled(value)


# ---- what both directions of torch share ----------------------------------------------------------------------------


def _type(value: object) -> str:
    return type(value).__name__


def _is_state_dict(value: object) -> bool:
    return isinstance(value, Mapping) and "state" in value and "param_groups" in value


def _check_layout(place: str, state_dict: object) -> None:
    allowed = "an optimizer's, with 'state' and 'param_groups'"
    if not isinstance(state_dict, Mapping):
        raise refuse(RoptimTypeError, place, "state_dict", allowed, f"an object of type {_type(state_dict)}")
    if not _is_state_dict(state_dict):
        likely = [key for key in (*_IN_CHECKPOINTS, *state_dict) if _is_state_dict(state_dict.get(key))]
        remedy = f"give the checkpoint's entry {likely[0]!r}" if likely else None
        got = f"one with {', '.join(map(repr, list(state_dict)[:5]))}" if state_dict else "an empty one"
        got += ", …" if len(state_dict) > 5 else ""
        raise refuse(RoptimKeyError, place, "state_dict", allowed, got, remedy)
    groups = state_dict["param_groups"]
    if not isinstance(state_dict["state"], Mapping):
        raise refuse(RoptimTypeError, place, "state", "a dict", f"an object of type {_type(state_dict['state'])}")
    if not isinstance(groups, (list, tuple)) or not all(isinstance(group, Mapping) for group in groups):
        raise refuse(RoptimTypeError, place, "param_groups", "a list of dicts", f"an object of type {_type(groups)}")
    for i, group in enumerate(groups):
        if not isinstance(group.get("params"), (list, tuple)):
            raise refuse(RoptimTypeError, place, f"params of group {i}", "a list of indices", told(group.get("params")))


def _class(place: str, state_dict: Mapping[str, Any]) -> str | None:
    """The class that a state is of; None where that makes no difference to its layout."""
    kind: str | None
    about = state_dict.get("roptim")
    if isinstance(about, Mapping):
        named = about.get("optimizer")
        kind = named if isinstance(named, str) else "unknown class"
    else:
        # From torch: all classes that have exactly these hyperparameters have the same layout.
        given = {key for group in state_dict["param_groups"] for key in group} & _HYPERS
        kind = next((name for name, entry in REGISTRY.items() if entry["defaults"].keys() == given), None)
    if kind is not None and kind not in _TORCHS:
        raise refuse(RoptimValueError, place, "state_dict", "of an optimizer that torch has", f"one of {kind}")
    return kind


# ---- from torch -----------------------------------------------------------------------------------------------------


def _is_tensor(value: object) -> bool:
    """Whether this is a tensor of torch, which is not imported for it."""
    of_torch = any(str(cls.__module__).partition(".")[0] == "torch" for cls in type(value).__mro__)
    return of_torch and hasattr(value, "detach") and hasattr(value, "numpy")


def _bfloat16(place: str, name: str) -> np.dtype[Any]:
    try:
        bfloat16: np.dtype[Any] = np.dtype(importlib.import_module("ml_dtypes").bfloat16)
        return bfloat16
    except ImportError:
        remedy = "install ml_dtypes, which adds it to NumPy"
        raise refuse(RoptimTypeError, place, name, "of a dtype that NumPy has", "bfloat16", remedy) from None


def _array(place: str, name: str, tensor: Any) -> np.ndarray:
    """A copy of a tensor."""
    if getattr(tensor, "is_sparse", False):
        # The momentum that torch's SGD keeps of sparse gradients.
        tensor = tensor.to_dense()
    tensor = tensor.detach().cpu()
    if str(tensor.dtype) == "torch.bfloat16":
        bits = tensor.view(sys.modules["torch"].int16).numpy()
        return np.array(bits, order="C").view(_bfloat16(place, name))
    try:
        return np.array(tensor.numpy(), order="C")
    except (TypeError, RuntimeError):
        raise refuse(RoptimTypeError, place, name, "of a dtype that NumPy has", str(tensor.dtype)) from None


def _whole(number: Any) -> Any:
    """A step as an int. What is no whole number is left for those who check steps."""
    return int(number) if isinstance(number, float) and number.is_integer() else number


def _from_torch(place: str, name: str, key: object, value: Any) -> Any:
    """One value of a parameter's state."""
    if isinstance(value, (list, tuple)):
        return [_from_torch(place, name, key, item) for item in value]
    value = _array(place, name, value) if _is_tensor(value) else copy.deepcopy(value)
    is_number = key == "step" or key in _SCALARS or key in _JOINT
    if is_number and isinstance(value, (np.ndarray, np.generic)) and value.ndim == 0:
        value = value.item()
    return _whole(value) if key == "step" else value


def _option(place: str, name: str, value: Any) -> Any:
    """One value of a group."""
    if isinstance(value, (list, tuple)):
        items = [_option(place, name, item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    return settled(_array(place, name, value)) if _is_tensor(value) else copy.deepcopy(value)


def _group_from_torch(place: str, index: int, group: Mapping[str, Any]) -> dict[str, Any]:
    options = {
        key: _option(place, f"{key} of group {index}", value) for key, value in group.items() if key not in SWITCHES
    }
    # torch 2.15 can maximize with LBFGS.
    if "history_size" in options and options.pop("maximize", False):
        remedy = "minimize the negative loss"
        raise refuse(RoptimValueError, place, f"maximize of group {index}", "False for LBFGS", "True", remedy)
    return options


def _name(place: str, groups: list[dict[str, Any]], names: Any, state: Mapping[Any, Any]) -> None:
    """Writes names into the groups."""
    indices = [index for group in groups for index in group["params"]]
    if isinstance(names, Mapping) and any(isinstance(key, str) for key in names):
        # The weights of a model by name: the order is the model's, as that of named_parameters.
        names = list(names.items())
    if isinstance(names, Mapping):
        by_index = _by_index(place, names, indices)
    else:
        by_index = _in_order(place, names, indices, state)
    _tree.check_names([by_index[index] for index in indices], place)
    for group in groups:
        group["param_names"] = [by_index[index] for index in group["params"]]


def _by_index(place: str, names: Mapping[Any, Any], indices: Sequence[Any]) -> dict[Any, Any]:
    by_index = {}
    for key, name in names.items():
        try:
            by_index[operator.index(key)] = name
        except TypeError:
            raise refuse(RoptimTypeError, place, "keys of names", "indices of parameters", told(key)) from None
    if by_index.keys() != set(indices):
        missing = sorted(set(indices) - by_index.keys())
        surplus = sorted(by_index.keys() - set(indices))
        got = f"none for {missing[0]}" if missing else f"one for {surplus[0]}"
        raise refuse(RoptimKeyError, place, "names", f"given for the parameters {_span(indices)}", got)
    return by_index


def _in_order(place: str, names: Any, indices: Sequence[Any], state: Mapping[Any, Any]) -> dict[Any, Any]:
    if isinstance(names, (str, bytes)) or not isinstance(names, Iterable):
        allowed = "strings in order, (name, tensor) pairs, or a dict of index and name"
        raise refuse(RoptimTypeError, place, "names", allowed, told(names))
    given = list(names)
    if len(given) != len(indices):
        remedy = "give those of the parameters that the optimizer was given, in its order"
        raise refuse(RoptimValueError, place, "names", f"{len(indices)} in number", str(len(given)), remedy)
    pairs = [isinstance(item, tuple) and len(item) == 2 for item in given]
    if not any(pairs):
        return dict(zip(indices, given, strict=True))
    if not all(pairs):
        got = f"item {pairs.index(False)} that is none"
        raise refuse(RoptimTypeError, place, "names", "all or none (name, tensor) pairs", got)
    for index, (name, tensor) in zip(indices, given, strict=True):
        shape = getattr(tensor, "shape", None)
        for key, value in state.get(index, {}).items():
            like = key in _LIKE_PARAMETER and isinstance(value, np.ndarray)
            if like and shape is not None and value.shape != tuple(shape):
                allowed = f"{value.shape}, as {key} of parameter {index} is"
                remedy = "give the pairs in the order of the optimizer's parameters"
                raise refuse(RoptimValueError, place, f"shape of {name!r}", allowed, str(tuple(shape)), remedy)
    return {index: name for index, (name, _) in zip(indices, given, strict=True)}


def _span(indices: Sequence[Any]) -> str:
    return f"{min(indices)} to {max(indices)}" if indices else "of no group"


# ---- to torch -------------------------------------------------------------------------------------------------------


def _to_torch(place: str, kind: str | None, index: Any, key: Any, entry: Mapping[Any, Any]) -> Any:
    """One value of a parameter's state."""
    value = entry[key]
    if key == "step":
        return int(value) if kind == "SparseAdam" else np.array(value, np.float32)
    if key in _SCALARS:
        return np.array(value, np.float32)
    if key in _JOINT_TENSORS:
        dtype = np.asarray(entry["d"]).dtype if "d" in entry else np.dtype(np.float64)
        items = value if isinstance(value, (list, tuple)) else [value]
        out = [None if item is None else np.array(item, dtype) for item in items]
        return out if isinstance(value, (list, tuple)) else out[0]
    return copy.deepcopy(value)


def _tensors(place: str, value: Any) -> Any:
    """The same tree with tensors for arrays."""
    try:
        torch: Any = importlib.import_module("torch")
    except ImportError:
        remedy = "install it, or take arrays with tensors=False"
        raise refuse(RoptimRuntimeError, place, "torch", "installed for tensors=True", "none", remedy) from None

    def tensor(array: np.ndarray) -> Any:
        if array.dtype.name == "bfloat16":
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    def through(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: through(child) for key, child in node.items()}
        if type(node) in (list, tuple):
            return type(node)(map(through, node))
        return tensor(node) if isinstance(node, np.ndarray) else node

    return through(value)


# ---- from optax -----------------------------------------------------------------------------------------------------


def _fields(node: object) -> dict[str, Any] | None:
    """The fields of a named tuple, or of what a file made of one: a dict."""
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        return dict(zip(node._fields, node, strict=True))
    return {str(key): value for key, value in node.items()} if isinstance(node, Mapping) else None


def _adams(node: object) -> Iterator[dict[str, Any]]:
    """The states in it that have Adam's fields, with the name of their class as ``type``."""
    fields = _fields(node)
    if fields is not None and fields.keys() - {"nu_max"} == {"count", "mu", "nu"}:
        yield {**fields, "type": _type(node)}
        return
    children: Iterable[Any] = ()
    if fields is not None:
        children = fields.values()
    elif isinstance(node, (tuple, list)):
        children = node
    for child in children:
        yield from _adams(child)


def _count(place: str, count: object) -> int:
    number = settled(np.asarray(count))
    if isinstance(number, bool) or not isinstance(number, int) or number < 0:
        got = f"an array of shape {np.shape(number)}" if isinstance(number, np.ndarray) else told(number)
        remedy = "a state that is replicated over devices is taken from one of them"
        raise refuse(RoptimValueError, place, "count", "a whole number >= 0", got, remedy)
    return number


def _paths(spec: _tree.Spec, path: str = "") -> Iterator[str]:
    """The dotted names of the leaves, also where nothing in the container names anything."""
    if spec.kind == "leaf":
        yield path.removesuffix(".")
        return
    for key, child in zip(spec.keys, spec.children, strict=True):
        yield from _paths(child, f"{path}{key}.")


def _matched(place: str, what: str, tree: object, paths: Sequence[str]) -> list[Any]:
    """The leaves of a tree of moments in the order of the parameters; None where one is masked out."""
    wanted, surplus = set(paths), []
    found: dict[str, Any] = {}

    def through(node: object, path: str) -> None:
        name = path.removesuffix(".")
        is_container = isinstance(node, (Mapping, list, tuple))
        if name in wanted and is_container and not len(node):  # type: ignore[arg-type]  # all have a length
            # optax's MaskedNode is an empty tuple.
            found[name] = None
        elif name in wanted and not is_container:
            found[name] = node
        elif isinstance(node, Mapping):
            for key, child in node.items():
                through(child, f"{path}{key}.")
        elif isinstance(node, (list, tuple)):
            for index, child in enumerate(node):
                through(child, f"{path}{index}.")
        else:
            surplus.append(name)

    through(tree, "")
    missing = [path for path in paths if path not in found]
    if missing or surplus:
        got = " and ".join(
            f"{text} {', '.join(repr(name) for name in some[:3])}{', …' if len(some) > 3 else ''}"
            for text, some in (("none for", missing), ("a surplus", surplus))
            if some
        )
        raise refuse(RoptimKeyError, place, what, "a tree with the names of the parameters", got)
    return [found[path] for path in paths]


def _moment(place: str, name: str, moment: Any, parameter: Any) -> np.ndarray:
    """A copy of a moment, in the wider one of its dtype and that of the parameter's state, which loses nothing."""
    array = np.array(moment)
    shape = tuple(np.shape(parameter))
    if array.shape != shape:
        raise refuse(RoptimValueError, place, name, f"of shape {shape}", str(array.shape))
    dtype = np.dtype(getattr(parameter, "dtype", None) or np.asarray(parameter).dtype)
    if dtype.kind == "c":
        remedy = "optax has one second moment of a complex number, torch and roptim one of each part"
        raise refuse(RoptimTypeError, place, name, "of a real parameter", str(dtype), remedy)
    if dtype.itemsize <= 2 and dtype.kind not in "iub":
        # State of parameters in 16 bits is kept in float32.
        dtype = np.dtype(np.float32)
    try:
        return array.astype(np.promote_types(array.dtype, dtype))
    except TypeError as error:
        raise refuse(RoptimTypeError, place, name, f"of a dtype like {dtype}", str(array.dtype)) from error
