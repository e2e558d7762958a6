"""Averages of parameters over training, and of statistics over batches."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from roptim import _tree
from roptim._errors import RoptimError, RoptimKeyError, RoptimTypeError, RoptimValueError, TornError, refuse, told
from roptim._foreign import has_gradient, view, will_write
from roptim._groups import OPTIONS
from roptim._parameter import Parameter
from roptim._roptim import Engine
from roptim._signals import deferred
from roptim._values import flag, is_real, is_whole
from roptim.optimizer import checked_options

AvgFn = Callable[[Any, Any, int], Any]
MultiAvgFn = Callable[[list[Any], list[Any], int], None]

_PLACE = "AveragedModel"


class _Known:
    """An average that the engine knows; as a function it does the same in NumPy."""

    def __init__(self, decay: float | None, lerp: bool) -> None:
        self.decay = decay
        self.lerp = lerp

    def joined(self, average: Any, value: Any, count: int) -> Any:
        """The new average of one array."""
        if average.dtype.kind in "iu" and self.decay is None:
            # Exact, and cut towards zero.
            total = average.astype(object) * count + value.astype(object)
            return np.asarray(np.sign(total) * (abs(total) // (count + 1)), object)
        if average.dtype.kind in "iu":
            average, value = average.astype(np.float64), value.astype(np.float64)
        weight = 1.0 / (count + 1) if self.decay is None else 1.0 - self.decay
        if self.lerp:
            return average + weight * (value - average)
        if self.decay is None:
            return average + (value - average) / (count + 1)
        return self.decay * average + (1.0 - self.decay) * value

    def __call__(self, average: Any, value: Any, count: int) -> Any:
        if not self.lerp:
            return self.joined(np.asarray(average), np.asarray(value), count)
        for a, x in zip(average, value, strict=True):
            a[...] = self.joined(a, np.asarray(x), count)
        return None

    def __repr__(self) -> str:
        kind = "swa" if self.decay is None else "ema"
        decay = "" if self.decay is None else repr(self.decay)
        return f"get_{kind}{'_multi' if self.lerp else ''}_avg_fn({decay})"


def _decay(place: str, decay: Any) -> float:
    if not is_real(decay):
        raise refuse(RoptimTypeError, place, "decay", "a number in [0, 1]", told(decay))
    if not 0 <= decay <= 1:
        raise refuse(RoptimValueError, place, "decay", "a number in [0, 1]", told(decay))
    return float(decay)


def get_ema_avg_fn(decay: float = 0.999) -> AvgFn:
    r"""Exponential average of one array: ``f(average, value, count)`` is :math:`decay \cdot average + (1 - decay)
    \cdot value`."""
    return _Known(_decay("get_ema_avg_fn", decay), lerp=False)


def get_swa_avg_fn() -> AvgFn:
    """Equal average of one array: ``f(average, value, count)`` is ``average + (value - average) / (count + 1)``."""
    return _Known(None, lerp=False)


def get_ema_multi_avg_fn(decay: float = 0.999) -> MultiAvgFn:
    """The same as :func:`get_ema_avg_fn` for lists of arrays, in place, as ``average + (1 - decay) * (value -
    average)``; the engine computes weights of 1/2 and more from the other end, so that 1 gives the value exactly."""
    return _Known(_decay("get_ema_multi_avg_fn", decay), lerp=True)


def get_swa_multi_avg_fn() -> MultiAvgFn:
    """The same as :func:`get_swa_avg_fn` for lists of arrays, in place, as ``average + 1 / (count + 1) * (value -
    average)``."""
    return _Known(None, lerp=True)


class AveragedModel:
    r"""An average of parameters over training: stochastic weight averaging, exponential moving averages, or one of
    your own.

    .. math::
        a_1 = x_1, \quad a_n = a_{n-1} + (x_n - a_{n-1}) / n
        \quad \text{(default)}, \quad a_n = \beta a_{n-1} + (1 - \beta) x_n \quad \text{(get\_ema\_avg\_fn)}

    ::

        average = roptim.swa_utils.AveragedModel(params, avg_fn=roptim.swa_utils.get_ema_avg_fn(0.999))
        for x, y in batches:
            opt.step(gradients(params, x, y))
            average.update_parameters(params)
        with average.applied_to(params):
            evaluate(params)

    Source: Izmailov, Podoprikhin, Garipov, Vetrov, Wilson, *Averaging weights leads to wider optima and better
    generalization*, UAI 2018.

    Parameters
    ----------
    model
        The parameters: arrays, Parameters or tensors as optimizers take them, in a list, dict, nested containers,
        (name, array) pairs, or one array. They are copied; until the first update the average is this copy.
    device : str, optional
        Where the averages live and are updated: ``backend`` by torch's name.
    avg_fn : callable, optional
        ``avg_fn(average, value, count)`` returns the new average of one array; ``count`` is how many are in it.
    multi_avg_fn : callable, optional
        ``multi_avg_fn(averages, values, count)`` changes a list of arrays in place.
    use_buffers : bool
        Average the buffers too. By default they are copied at each update.
    buffers
        What goes with the parameters without being trained, running statistics say, in any container.
    backend, allow_software, threads
        As in the optimizers. The averages of this module run in the engine, others where they are called.

    Attributes
    ----------
    module
        The averages, in the container's shape: arrays, where the parameters were Parameters Parameters.
    buffers
        The averaged or copied buffers.
    n_averaged : int
        Updates so far.
    """

    def __init__(
        self,
        model: Any,
        device: str | None = None,
        avg_fn: AvgFn | None = None,
        multi_avg_fn: MultiAvgFn | None = None,
        use_buffers: bool = False,
        *,
        buffers: Any = None,
        backend: str = "cpu",
        allow_software: bool = False,
        threads: int | None = None,
    ) -> None:
        if avg_fn is not None and multi_avg_fn is not None:
            raise refuse(RoptimValueError, _PLACE, "multi_avg_fn", "None beside avg_fn", told(multi_avg_fn))
        for name, function in (("avg_fn", avg_fn), ("multi_avg_fn", multi_avg_fn)):
            if function is not None and not callable(function):
                raise refuse(RoptimTypeError, _PLACE, name, "callable", told(function))
        self._spec, objects, self._names = _tree.flatten(_tree.listed(model, _PLACE), _PLACE)
        self._averages = [_copied(f"parameter {i}", p) for i, p in enumerate(objects)]
        self._origins = _origins(objects)
        self._use_buffers = flag(_PLACE, "use_buffers", use_buffers)
        self._buffer_spec: _tree.Spec | None = None
        self._buffers: list[Any] = []
        if buffers is not None:
            self._buffer_spec, objects, _ = _tree.flatten(_tree.listed(buffers, _PLACE), _PLACE)
            self._buffers = [np.array(_numbers(_PLACE, f"buffer {i}", b)) for i, b in enumerate(objects)]
        self._count = 0
        self._function = avg_fn or multi_avg_fn or get_swa_avg_fn()
        self._is_multi = multi_avg_fn is not None
        self._options: dict[str, Any] = {"backend": backend if device is None else device}
        self._options.update(allow_software=allow_software, threads=threads)
        self._attach()

    def _attach(self) -> None:
        """The container of the averages, and the engine that updates them."""
        self.module = _built(self._spec, iter(self._averages))
        self._engine: Engine | None = None
        options = checked_options(_PLACE, {**OPTIONS, "flush_denormals": False, **self._options})
        self._on_cpu = options["backend"] == "cpu"
        if isinstance(self._function, _Known):
            self._engine = Engine("AveragedModel", **options)
            known = {"decay": self._function.decay, "lerp": self._function.lerp}
            self._engine.add_group(known, self._averages, None)
            self.n_averaged = self._count
        elif not self._on_cpu:
            allowed = '"cpu" for a function of your own'
            raise refuse(RoptimValueError, _PLACE, "backend", allowed, told(options["backend"]))

    @property
    def n_averaged(self) -> int:
        """How many updates are in the average; 0 begins a new one."""
        if self._engine is not None and self._averages:
            # It counts the steps that an average follows.
            self._count = self._engine.step_of(0)
        return self._count

    @n_averaged.setter
    def n_averaged(self, count: int) -> None:
        if not is_whole(count) or not 0 <= count < 2**63:
            raise refuse(RoptimValueError, _PLACE, "n_averaged", "a whole number >= 0", told(count))
        if self._engine is not None:
            for i in range(len(self._averages)):
                self._engine.set_step_of(i, int(count))
        self._count = int(count)

    @property
    def buffers(self) -> Any:
        """The averaged or copied buffers, in their container's shape; None without."""
        return None if self._buffer_spec is None else _built(self._buffer_spec, iter(self._buffers))

    def update_parameters(self, model: Any, buffers: Any = None) -> None:
        """Joins parameters, in the shape in which they were given, to the average; the first time it becomes them.

        Raises
        ------
        RoptimError
            If something does not fit; nothing has changed then, nor after an error of a function of your own.
        """
        place = f"{_PLACE}.update_parameters"
        self._update(place, self._read(place, model), buffers)

    def _update(self, place: str, params: list[Any], buffers: Any = None) -> None:
        values = [
            _numbers(place, f"parameter {i}", p, average)
            for i, (p, average) in enumerate(zip(params, self._averages, strict=True))
        ]
        # The average of a model may be joined to itself, and to others.
        own = {id(_owner(a._array if isinstance(a, Parameter) else a)) for a in self._averages}
        values = [x.copy() if id(_owner(x)) in own else x for x in values]
        new_buffers = self._read_buffers(place, buffers)
        if self._use_buffers and self.n_averaged > 0:
            joined = self._joined("buffer", self._buffers, new_buffers)
            # Truth values have no average.
            new_buffers = [n if n.dtype == bool else j for n, j in zip(new_buffers, joined, strict=True)]
        if self._engine is None:
            values = values if self.n_averaged == 0 else self._joined("average", self._averages, values)
        with deferred():
            if self._engine is not None:
                self._engine.step(values)
            else:
                for average, value in zip(self._averages, values, strict=True):
                    average[...] = value
            for mine, theirs in zip(self._buffers, new_buffers, strict=True):
                mine[...] = theirs
            self._count = self.n_averaged + 1 if self._engine is None else self.n_averaged

    def _order(self, objects: list[Any], by_name: Mapping[str, int]) -> list[int]:
        """Where each average's parameter is among an optimizer's: it is the object that was averaged, or has its name.

        Else averages and parameters are in the same order.
        """
        place = {id(p): i for i, p in enumerate(objects)}
        found = [place.get(id(origin())) for origin in self._origins]
        if len(found) < len(self._averages) or None in found:
            found = [by_name.get(name) for name in self._names or ()]
        if len(found) == len(self._averages) == len(objects) and None not in found:
            return [i for i in found if i is not None]
        return list(range(len(objects)))

    def _check_fit(self, place: str, params: list[Any]) -> None:
        """Refuses to be the average of these parameters, which a step is about to change."""
        self._check_whole("update_parameters")
        for i, average in enumerate(self._averages):
            if isinstance(average, np.ndarray) and not average.flags.writeable:
                raise refuse(RoptimValueError, place, f"average of parameter {i}", "writeable", "a read-only array")
        if len(params) != len(self._averages):
            got = str(len(self._averages))
            raise refuse(RoptimValueError, place, "average", f"of {len(params)} parameters", got)
        for i, (p, average) in enumerate(zip(params, self._averages, strict=True)):
            like = _viewed(place, f"parameter {i}", p)
            if (like.shape, like.dtype) != (average.shape, average.dtype):
                want, got = f"{like.dtype} of shape {like.shape}", f"{average.dtype} of shape {average.shape}"
                raise refuse(RoptimValueError, place, f"average of parameter {i}", want, got)

    @property
    def _follower(self) -> Engine | None:
        """The engine that joins parameters in the pass of their update, where one can."""
        return self._engine if self._on_cpu else None

    def _join(self, params: list[Any]) -> None:
        """Joins parameters that were stepped."""
        self._update(f"{_PLACE}.update_parameters", params)

    def _joined(self, what: str, averages: list[Any], values: list[Any]) -> list[Any]:
        """The new averages, apart from the old ones, in their dtypes."""
        function: Any = self._function
        results: list[Any]
        if isinstance(function, _Known):
            results = [
                x if x.dtype == bool else function.joined(np.asarray(a), x, self.n_averaged)
                for a, x in zip(averages, values, strict=True)
            ]
        elif self._is_multi:
            # Whole numbers are averaged as floats, and cut afterwards.
            results = [np.array(a, np.float64 if a.dtype.kind in "iu" else a.dtype) for a in averages]
            function(results, [np.array(x) for x in values], self.n_averaged)
            if len(results) != len(averages):
                got = str(len(results))
                raise refuse(RoptimValueError, _PLACE, f"number of {what}s", f"{len(averages)} after multi_avg_fn", got)
        else:
            results = [
                function(np.array(a), np.array(x), self.n_averaged) for a, x in zip(averages, values, strict=True)
            ]
        checked = []
        for i, (average, result) in enumerate(zip(averages, results, strict=True)):
            array = np.asarray(result)
            if array.shape != average.shape:
                allowed, got = f"of shape {average.shape}", str(array.shape)
                raise refuse(RoptimValueError, _PLACE, f"{what} {i}", allowed, got)
            _numbers(_PLACE, f"{what} {i}", array.astype(np.float64) if array.dtype == object else array)
            if array.dtype.kind == "c" and average.dtype.kind != "c":
                raise refuse(RoptimTypeError, _PLACE, f"{what} {i}", "of real numbers", str(array.dtype))
            checked.append(array.astype(average.dtype))
        return checked

    def _read(self, place: str, model: Any) -> list[Any]:
        return _tree.read(self._spec, _tree.listed(model, place), place, what="parameter")

    def _read_buffers(self, place: str, buffers: Any) -> list[Any]:
        if self._buffer_spec is None:
            if buffers is not None:
                raise refuse(RoptimTypeError, place, "buffers", "given at construction too", "none there")
            return []
        if buffers is None:
            raise refuse(RoptimTypeError, place, "buffers", "given as at construction", "none")
        found = _tree.read(self._buffer_spec, buffers, place, what="buffer")
        return [
            _numbers(place, f"buffer {i}", theirs, mine, "same_kind")
            for i, (theirs, mine) in enumerate(zip(found, self._buffers, strict=True))
        ]

    def copy_to(self, model: Any) -> None:
        """Writes the averages into parameters of the same shape, in place."""
        self._check_whole("copy_to")
        place = f"{_PLACE}.copy_to"
        targets, values = self._targets(place, model), [np.array(a) for a in self._averages]
        with deferred():
            self._write(place, targets, values)

    @contextmanager
    def applied_to(self, model: Any) -> Iterator[None]:
        """Within the block the parameters have the averages' values; afterwards their own again, bit for bit."""
        self._check_whole("applied_to")
        place = f"{_PLACE}.applied_to"
        targets = self._targets(place, model)
        before, values = [np.array(p) for p in targets], [np.array(a) for a in self._averages]
        try:
            try:
                with deferred():
                    self._write(place, targets, values)
                yield
            finally:
                with deferred():
                    self._write(place, targets, before)
        except KeyboardInterrupt:
            # It may have come before they were.
            with deferred():
                self._write(place, targets, before)
            raise

    def _targets(self, place: str, model: Any) -> list[Any]:
        """The parameters of a model, all of which can take the averages."""
        objects = self._read(place, model)
        params = [_viewed(place, f"parameter {i}", p, writes=True) for i, p in enumerate(objects)]
        for i, (p, average) in enumerate(zip(params, self._averages, strict=True)):
            name = f"parameter {i}"
            if p.shape != average.shape:
                raise refuse(RoptimValueError, place, name, f"of shape {average.shape}", str(p.shape))
            if not np.can_cast(average.dtype, p.dtype, "same_kind"):
                raise refuse(RoptimTypeError, place, name, f"of a dtype that can hold {average.dtype}", str(p.dtype))
            if isinstance(p, np.ndarray) and not p.flags.writeable:
                raise refuse(RoptimValueError, place, name, "writeable", "a read-only array")
        will_write([p for p in objects if not isinstance(p, (np.ndarray, Parameter))])
        return params

    @staticmethod
    def _write(place: str, params: list[Any], values: list[Any]) -> None:
        """Writes all that can be written, and then says what could not."""
        refused: dict[int, Exception] = {}
        for i, (p, value) in enumerate(zip(params, values, strict=True)):
            try:
                p[...] = value
            except Exception as error:
                refused[i] = error
        if refused:
            first = next(iter(refused.values()))
            if isinstance(first, RoptimError):
                raise first
            names = ", ".join(f"parameter {i}" for i in refused)
            raise refuse(RoptimValueError, place, names, "writeable", f"one that refuses ({first})") from first

    def state_dict(self) -> dict[str, Any]:
        """A copy: ``n_averaged``, ``module`` (a list of arrays, by name in a dict where there are names), and
        ``buffers`` where there are some."""
        self._check_whole("state_dict")
        arrays = [np.array(a) for a in self._averages]
        module: Any = dict(zip(self._names, arrays, strict=True)) if self._names else arrays
        state = {"n_averaged": self.n_averaged, "module": module}
        if self._buffers:
            state["buffers"] = [b.copy() for b in self._buffers]
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Replaces averages and count by those of :meth:`state_dict`, checked before anything is written."""
        place = f"{_PLACE}.load_state_dict"
        if not isinstance(state_dict, Mapping):
            got = f"an object of type {type(state_dict).__name__}"
            raise refuse(RoptimTypeError, place, "state_dict", "a dict", got)
        for key in ("n_averaged", "module"):
            if key not in state_dict:
                raise refuse(RoptimKeyError, place, "state_dict", f"a dict with {key!r}", told(sorted(state_dict)))
        count, module = state_dict["n_averaged"], state_dict["module"]
        if isinstance(count, np.ndarray) and count.size == 1:
            count = count.item()
        if not is_whole(count) or not 0 <= count < 2**63:
            raise refuse(RoptimValueError, place, "n_averaged", "a whole number >= 0", told(count))
        if isinstance(module, Mapping) and self._names:
            if module.keys() != set(self._names):
                raise refuse(RoptimKeyError, place, "module", f"one with {self._names}", told(sorted(module)))
            module = [module[name] for name in self._names]
        elif isinstance(module, Mapping):
            module = list(module.values())
        checked = []
        for what, mine, theirs in (
            ("average", self._averages, module),
            ("buffer", self._buffers, state_dict.get("buffers", [])),
        ):
            if not isinstance(theirs, (list, tuple)):
                got = f"an object of type {type(theirs).__name__}"
                raise refuse(RoptimTypeError, place, f"{what}s", "a list of arrays", got)
            if len(theirs) != len(mine):
                raise refuse(RoptimValueError, place, f"number of {what}s", str(len(mine)), str(len(theirs)))
            for i, (own, given) in enumerate(zip(mine, theirs, strict=True)):
                array = np.asarray(given)
                if array.shape != own.shape or array.dtype != own.dtype:
                    got = f"{array.dtype} of shape {array.shape}"
                    raise refuse(RoptimValueError, place, f"{what} {i}", f"{own.dtype} of shape {own.shape}", got)
                checked.append((own, array))
        with deferred():
            if self._engine is not None and self._engine.torn:
                nothing = {"state": {}, "param_groups": [{"params": list(range(len(self._averages)))}]}
                self._engine.load(self._engine.prepare_load(nothing))
            for own, array in checked:
                own[...] = array
            self.n_averaged = int(count)

    def _check_whole(self, call: str) -> None:
        """Refuses where an update left averages that nobody knows."""
        if self._engine is not None and self._engine.torn:
            raise TornError(f"{_PLACE}.{call}: an earlier update was interrupted half-way; call load_state_dict")

    def __getstate__(self) -> dict[str, Any]:
        self._check_whole("copy")
        self._count = self.n_averaged
        state = {key: value for key, value in vars(self).items() if key not in ("_engine", "module", "_origins")}
        state["_averages"] = [_copied("a parameter", a) for a in self._averages]
        state["_buffers"] = [b.copy() for b in self._buffers]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._origins = []
        self._attach()

    def __repr__(self) -> str:
        return f"AveragedModel({self._function!r}, n_averaged={self.n_averaged})"


def _origins(objects: list[Any]) -> list[Callable[[], Any]]:
    """What was averaged, as long as it lives; nothing where it cannot be told."""
    try:
        return [weakref.ref(p) for p in objects]
    except TypeError:
        return []


def _owner(array: Any) -> Any:
    """The array whose memory another one is a view of."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def _viewed(place: str, label: str, p: Any, writes: bool = False) -> Any:
    """An array or Parameter as it is, the memory of another library's as an array."""
    return p if isinstance(p, (np.ndarray, Parameter)) else view(p, place, label, writes)


def _copied(label: str, p: Any) -> Any:
    if isinstance(p, Parameter):
        return Parameter(np.array(p.data), name=p.name)
    return np.array(_numbers(_PLACE, label, _viewed(_PLACE, label, p)))


def _numbers(place: str, label: str, given: Any, like: Any = None, casting: Any = None) -> Any:
    """An array of numbers, of the shape and dtype of another: the same, or one that can be cast."""
    array = np.asarray(_viewed(place, label, given) if has_gradient(given) else given)
    if array.dtype.kind not in "biufc" and array.dtype.name != "bfloat16":
        raise refuse(RoptimTypeError, place, label, "an array of numbers", f"one of {array.dtype}")
    if like is None:
        return array
    if array.shape != like.shape:
        raise refuse(RoptimValueError, place, label, f"of shape {like.shape}", str(array.shape))
    fits = array.dtype == like.dtype if casting is None else np.can_cast(array.dtype, like.dtype, casting)
    if not fits:
        raise refuse(RoptimTypeError, place, label, str(like.dtype), str(array.dtype))
    return array


def _built(spec: _tree.Spec, leaves: Iterator[Any]) -> Any:
    """The container of a shape with these leaves."""
    if spec.kind == "leaf":
        return next(leaves)
    children = [_built(child, leaves) for child in spec.children]
    if spec.kind in ("mapping", "pairs"):
        return dict(zip(spec.keys, children, strict=True))
    return children


def cumulative_stats(batches: Iterable[Any], axis: int | tuple[int, ...] = 0) -> tuple[Any, Any]:
    """Mean and variance over batches, in place of torch's ``update_bn``: what a batch-norm layer would store.

    The mean of the batches' means and of their unbiased variances, each batch with the same weight, in float64:
    torch's cumulative moving average.

    Parameters
    ----------
    batches : iterable of array
        At least one, each of more than one row.
    axis : int or tuple of int
        The axes that a batch is averaged over.

    Returns
    -------
    (mean, variance) : arrays of float64
    """
    place = "cumulative_stats"
    if not isinstance(batches, Iterable) or isinstance(batches, (str, bytes)):
        raise refuse(RoptimTypeError, place, "batches", "arrays", f"an object of type {type(batches).__name__}")
    axes = axis if isinstance(axis, tuple) else (axis,)
    if not all(map(is_whole, axes)):
        raise refuse(RoptimTypeError, place, "axis", "an int or a tuple of int", told(axis))
    mean: Any = 0.0
    variance: Any = 0.0
    count = 0
    for batch in batches:
        label = f"batch {count}"
        x = _numbers(place, label, batch)
        if x.dtype.kind == "c":
            raise refuse(RoptimTypeError, place, label, "of real numbers", str(x.dtype))
        x = x.astype(np.float64)
        if not all(-x.ndim <= a < x.ndim for a in axes) or len({a % x.ndim for a in axes}) != len(axes):
            raise refuse(RoptimValueError, place, label, f"with the axes {axis}, each once", f"shape {x.shape}")
        rows = math.prod(x.shape[a] for a in axes)
        if rows < 2:
            raise refuse(RoptimValueError, place, label, "of at least 2 rows", str(rows))
        if count and x.mean(axis=axes).shape != mean.shape:
            allowed = f"of the first one's shape but for axis {axis}"
            raise refuse(RoptimValueError, place, label, allowed, f"shape {x.shape}")
        count += 1
        mean = mean + (x.mean(axis=axes) - mean) / count
        variance = variance + (x.var(axis=axes, ddof=1) - variance) / count
    if not count:
        raise refuse(RoptimValueError, place, "batches", "at least one", "none")
    return mean, variance
