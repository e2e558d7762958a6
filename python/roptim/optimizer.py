"""The base class of all optimizers."""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from roptim import _forks, _roptim, _tree  # noqa: F401  # the first is there once it is imported
from roptim._devices import Device, fastest, selected
from roptim._errors import (
    ConcurrentStepError,
    RoptimKeyError,
    RoptimTypeError,
    RoptimValueError,
    refuse,
    told,
    warn,
)
from roptim._foreign import clear, has_gradient, number_of
from roptim._groups import (
    OPTIONS,
    SWITCHES,
    FixedList,
    ParamGroup,
    check_switches,
    lasting,
    refuse_misspelling,
    settled,
    shown,
)
from roptim._hooks import (
    EVERYWHERE,
    Hook,
    Hooks,
    RemovableHandle,
    register,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
    stepped,
)
from roptim._loading import LoadReport, Missing, Rules, Unexpected, plain, prepare
from roptim._parameter import Parameter
from roptim._registry import REGISTRY
from roptim._roptim import Engine
from roptim._scheduled import encoded, is_scheduled, refuse_schedules, value_at, values_at
from roptim._signals import deferred
from roptim._state import State
from roptim._statistics import Statistics, statistics_of
from roptim._values import flag, is_whole, word

if TYPE_CHECKING:
    from roptim._averaging import AveragedModel

__all__ = ["REGISTRY", "Optimizer", "register_optimizer_step_post_hook", "register_optimizer_step_pre_hook"]

_FORMAT = 1
_PRE, _POST = EVERYWHERE.step_pre, EVERYWHERE.step_post


def checked_options(place: str, options: dict[str, Any]) -> dict[str, Any]:
    """Options of the whole optimizer in the types the engine takes; ranges are the engine's business."""
    threads = options["threads"]
    if threads is not None and not (is_whole(threads) and 1 <= threads < 65536):
        raise refuse(RoptimValueError, place, "threads", "None or a whole number from 1 to 65535", told(threads))
    bounds: dict[str, float | None] = {}
    for name in ("clip_norm", "clip_value"):
        bound = settled(options[name])
        if bound is not None and (isinstance(bound, bool) or not isinstance(bound, (int, float))):
            raise refuse(RoptimTypeError, place, name, "None or a number >= 0", told(options[name]))
        try:
            bounds[name] = None if bound is None else float(bound)
        except OverflowError:
            raise refuse(RoptimValueError, place, name, "None or a number >= 0", "one beyond all floats") from None
    switches = {
        name: flag(place, name, options[name]) for name in ("allow_software", "flush_denormals", "nonfinite_sync")
    }
    return {
        "backend": selected(place, options["backend"]),
        "threads": None if threads is None else int(threads),
        "nonfinite": word(place, "nonfinite", '"propagate", "raise" or "skip"', options["nonfinite"]),
        **switches,
        **bounds,
    }


class _OfGroups:
    """Stands on an optimizer of the engine where an option might be looked for that lies elsewhere: an attribute of
    this name would be read by nobody."""

    def __init__(self, name: str) -> None:
        self._name = name
        if name in OPTIONS:
            self._allowed, self._remedy = "given to the constructor", "it holds for the life of an optimizer"
        else:
            self._allowed, self._remedy = "set in a group", f'use opt.param_groups[0]["{name}"]'
        self.__doc__ = f"No attribute: ``{name}`` is {self._allowed}."

    def __get__(self, optimizer: Any, owner: type) -> Any:
        if optimizer is None:
            return self
        # A class that somebody derived may well have an attribute of its own.
        if self._name in vars(optimizer):
            return vars(optimizer)[self._name]
        raise AttributeError(f"{type(optimizer).__name__}: {self._name} is {self._allowed}; {self._remedy}")

    def __set__(self, optimizer: Any, value: Any) -> None:
        if "_engine_name" not in vars(type(optimizer)):
            vars(optimizer)[self._name] = value
            return
        got = "an assignment to the optimizer"
        raise refuse(RoptimTypeError, type(optimizer).__name__, self._name, self._allowed, got, self._remedy)

    def __delete__(self, optimizer: Any) -> None:
        try:
            del vars(optimizer)[self._name]
        except KeyError:
            raise AttributeError(self._name) from None


class _Current:
    """The engine that an optimizer has now: what is assigned to its groups goes there."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine


def _assigner(
    current: _Current, index: int, scheduled: dict[int, dict[str, Any]]
) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Takes what is assigned to a group: a number ends a schedule, a schedule or function begins one."""

    def assign(changes: dict[str, Any]) -> dict[str, Any]:
        given = {key: value for key, value in changes.items() if is_scheduled(value)}
        engine = current.engine
        values = engine.set_hypers(index, {**changes, **values_at(given, engine.update_count)})
        kept = {key: value for key, value in scheduled.pop(index, {}).items() if key not in changes}
        if kept or given:
            scheduled[index] = {**kept, **given}
        return values

    return assign


class Optimizer:
    """Base class of all optimizers, and of those written in Python.

    A subclass written in Python calls ``super().__init__(params, defaults)`` and defines ``step``, as in
    torch: ``self.param_groups`` holds the groups with the defaults filled in, ``self.state[p]`` is a dict
    per parameter.

    Parameters
    ----------
    params
        Arrays or :class:`~roptim.Parameter` objects: a list, a dict of names, nested containers of both,
        (name, array) pairs, one array, or a list of group dicts with a ``"params"`` entry each. Arrays of other
        libraries are taken where NumPy can view them without a copy: torch's tensors on the CPU, say.
    defaults : dict
        Options of every group that does not set its own.
    **options
        Of the whole optimizer, for optimizers of the engine: see any of them.

    Attributes
    ----------
    param_groups : list of ParamGroup
        Live dicts: assigning ``opt.param_groups[0]["lr"] = 0.1`` takes effect at the next step.
    state : State
        State by parameter, name or index. ``opt.state = {}`` returns every parameter to step 0.
    defaults : dict
        Options as given to the constructor.
    """

    #: Name in the engine's registry; None for optimizers written in Python.
    _engine_name: ClassVar[str | None] = None
    #: Whether step was ever called: schedulers warn if they are stepped first.
    _step_called = False
    #: Whether a step without gradients was looked at once.
    _looked_for_gradients = False
    #: Whether groups were loaded that a scheduler had written to: a new one then leaves them as they are.
    _resumed = False
    _hooks: Hooks | None = None
    _in_step = False
    #: The count of updates that the groups show scheduled values for; None to ask again.
    _shown_at: int | None = None

    _param_groups: FixedList
    defaults: dict[str, Any]

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        **options: Any,
    ) -> None:
        backend = options.get("backend")
        if isinstance(backend, str) and backend == "auto" and self._engine_name is not None:
            place = type(self).__name__
            params = _tree.listed(params, place)
            if any(_is_group(group) for group in _grouped(params)):
                # What may be gone through once is looked at twice here.
                params = [
                    {**group, "params": _tree.listed(group["params"], place)} if _is_group(group) else group
                    for group in _grouped(params)
                ]
            options = {**options, "backend": self._automatic(params, bool(options.get("allow_software")))}
        self._setup(defaults, options)
        self._reserves = False
        try:
            for group in _grouped(_tree.listed(params, self._place)):
                self.add_param_group(group)
            if self._engine is not None:
                self._engine.reserve()
        except BaseException:
            if self._engine is not None:
                self._engine.release()
            raise
        self._reserves = True
        if not self._state._objects:
            raise refuse(RoptimValueError, self._place, "params", "at least one array", "an empty container")

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        name = cls.__dict__.get("_engine_name")
        if name is not None:
            taken = cls.__init__.__code__.co_varnames
            for option in (*REGISTRY[name]["defaults"], *(option for option in OPTIONS if option in taken)):
                setattr(cls, option, _OfGroups(option))
        own = cls.__dict__.get("step")
        # The steps of this module look for hooks themselves: a wrapper is a third of a small step's time.
        if own is not None and cls.__module__ != __name__:
            cls.step = _hooked(own)  # type: ignore[method-assign]  # the same signature, by functools.wraps

    def _has_hooks(self) -> bool:
        """Whether hooks are to be called around a step: not within another one, as of a base class."""
        return bool(self._hooks is not None or _PRE or _POST) and not self._in_step

    def _step_with_hooks(self, own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._in_step = True
        try:
            return stepped(own, self, self._hooks or Hooks(), (self, *args), kwargs)
        finally:
            self._in_step = False

    def _construct(self, arguments: dict[str, Any]) -> None:
        """The constructor of an optimizer of the engine: ``arguments`` is its ``locals()``.

        Its signature is for readers and editors; what each argument is, the registry knows:
        hyperparameters, torch's switches, or options of the whole optimizer.
        """
        assert self._engine_name is not None
        check_switches(type(self).__name__, **{name: arguments[name] for name in arguments if name in SWITCHES})
        known = REGISTRY[self._engine_name]["defaults"]
        defaults = {name: arguments.get(name, default) for name, default in known.items()}
        options = {name: arguments[name] for name in OPTIONS if name in arguments}
        Optimizer.__init__(self, arguments["params"], defaults, **options)

    def _automatic(self, params: Any, allow_software: bool) -> str:
        """What ``backend="auto"`` stands for with these parameters."""
        assert self._engine_name is not None
        place = type(self).__name__
        objects: list[Any] = []
        for group in _grouped(params):
            if _is_group(group):
                objects += _tree.flatten(_tree.listed(group["params"], place), place)[1]
        arrays = [p._array if isinstance(p, Parameter) else p for p in objects]
        on_gpu = {"float32", "float16", "bfloat16", "complex64"}
        entry = REGISTRY[self._engine_name]
        # A closure computes in NumPy: there is nothing to gain.
        if (
            "gpu" not in entry["backends"]
            or entry["needs_closure"]
            or not all(isinstance(a, np.ndarray) and a.dtype.name in on_gpu for a in arrays)
        ):
            return "cpu"
        parameters = any(isinstance(p, Parameter) for p in objects)
        return fastest(place, sum(a.size for a in arrays), parameters, allow_software)

    def _setup(self, defaults: dict[str, Any], options: dict[str, Any]) -> None:
        self._place = type(self).__name__
        self.defaults = dict(defaults)
        for name in options:
            if name not in OPTIONS:
                allowed = f"one of {', '.join(OPTIONS)}"
                raise refuse(RoptimTypeError, self._place, "option", allowed, told(name))
        self._options = {**OPTIONS, **options}
        self._specs: list[_tree.Spec] = []
        # Several groups taken as one list, or by name; made when first needed.
        self._all: _tree.Spec | None = None
        self._order_known: tuple[weakref.ref[AveragedModel], int, list[Any]] | None = None
        self._engine: Engine | None = None
        self._current: _Current | None = None
        #: Whether the memory on a device is made with each group.
        self._reserves = True
        #: Who is adding a group.
        self._adding: dict[str, tuple[int, object]] = {}
        hypers: frozenset[str] = frozenset()
        if self._engine_name is not None:
            self._options = checked_options(self._place, self._options)
            self._engine = Engine(self._engine_name, **self._options)
            self._current = _Current(self._engine)
            hypers = frozenset(REGISTRY[self._engine_name]["defaults"])
            self._engine.check_hypers({key: value_at(value, 0) for key, value in defaults.items() if key in hypers})
            # Groups may be added later, and begin with what was given now.
            self.defaults = {key: lasting(value) if key in hypers else value for key, value in defaults.items()}
        else:
            for name, value in self._options.items():
                default = OPTIONS[name]
                if type(value) is not type(default) or value != default:
                    shown_default = f'"{default}"' if isinstance(default, str) else repr(default)
                    allowed = f"{shown_default} for an optimizer written in Python"
                    raise refuse(RoptimValueError, self._place, name, allowed, told(value))
        self._hypers = hypers
        self._param_groups = FixedList()
        #: Hyperparameters that are functions of the count of updates, by index of the groups that have some.
        self._scheduled: dict[int, dict[str, Any]] = {}
        self._state = State(self._engine)

    # ---- parameters -------------------------------------------------------------------------------------

    def add_param_group(self, param_group: Mapping[str, Any]) -> None:
        """Adds a group of parameters.

        Parameters
        ----------
        param_group : dict
            ``"params"`` (anything the constructor takes, but groups) and the options that differ from the
            defaults. The dict itself is not kept.

        Raises
        ------
        RoptimError
            If an array, a name or an option is refused; nothing has changed then.
        """
        place = self._place
        if not isinstance(param_group, Mapping):
            got = f"an object of type {type(param_group).__name__}"
            raise refuse(RoptimTypeError, place, "param_group", "a dict", got)
        if "params" not in param_group:
            raise refuse(
                RoptimKeyError, place, "param_group", "a dict with a 'params' entry", str(sorted(map(str, param_group)))
            )
        spec, objects, names = _tree.flatten(_tree.listed(param_group["params"], place), place)
        given = {key: value for key, value in param_group.items() if key not in ("params", "param_names")}
        for key in given:
            refuse_misspelling(place, key, self._hypers or self.defaults)
        if self._hypers:
            check_switches(place, **{key: value for key, value in given.items() if key in SWITCHES})
        if names is None and param_group.get("param_names") is not None:
            given_names = param_group["param_names"]
            if not isinstance(given_names, (list, tuple)):
                raise refuse(RoptimTypeError, place, "param_names", "a list of strings", told(given_names))
            names = list(given_names)
            if len(names) != len(objects):
                raise refuse(RoptimValueError, place, "param_names", f"{len(objects)} names", str(len(names)))
            _tree.check_names(names, place)
        options = {**given, **{key: value for key, value in self.defaults.items() if key not in given}}
        options = {key: settled(value) if key in self._hypers else value for key, value in options.items()}
        scheduled = {key: value for key, value in options.items() if key in self._hypers and is_scheduled(value)}
        options.update(values_at(scheduled, self.update_count))
        if self._engine is None:
            refuse_schedules(place, options)
        group: dict[str, Any] = {"params": FixedList(objects)}
        if names is not None:
            group["param_names"] = names
        look = functools.partial(refuse_schedules, place) if self._engine is None else None
        with deferred(), self._adding_alone():
            index = len(self.param_groups)
            apply = None if self._current is None else _assigner(self._current, index, self._scheduled)
            if objects:
                self._check_names(names)
            if self._engine is not None:
                hypers = {key: options[key] for key in self._hypers if key in options}
                engine_values = self._engine.add_group(hypers, objects, names, self._reserves)
                options = {**options, **engine_values, **shown(hypers, engine_values)}
            else:
                self._check_objects(objects)
            self._specs.append(spec)
            if scheduled:
                self._scheduled[index] = scheduled
            self.param_groups._add(
                ParamGroup({**group, **options}, place=place, hypers=self._hypers, apply=apply, look=look)
            )
            self._state._register(objects, names)

    @contextlib.contextmanager
    def _adding_alone(self) -> Iterator[None]:
        """Groups have one order, here and in the engine."""
        own = (os.getpid(), object())
        holder = self._adding.setdefault("call", own)
        # In a child, the thread that a fork found in here is gone.
        if holder is not own and holder[0] == own[0]:
            sentence = f"{self._place}.add_param_group: another group is being added to this optimizer"
            raise ConcurrentStepError(f"{sentence}; call it from one thread at a time")
        self._adding["call"] = own
        try:
            yield
        finally:
            del self._adding["call"]

    def _check_names(self, names: list[str] | None) -> None:
        if self._state._objects and (names is None) != (not self._state._by_name):
            allowed, got = ("named", "without names") if names is None else ("without names", "named")
            raise refuse(
                RoptimValueError, self._place, "parameters of all groups", f"{allowed} like the first group's", got
            )
        for name in names or ():
            if name in self._state._by_name:
                raise refuse(RoptimValueError, self._place, "names", "different", f"{name!r} twice")

    def _check_objects(self, objects: list[Any]) -> None:
        """The gate for optimizers written in Python, which own no engine."""
        seen = set(self._state._index)
        for i, obj in enumerate(objects):
            if not isinstance(obj, (np.ndarray, Parameter)):
                got = f"an object of type {type(obj).__name__}"
                raise refuse(RoptimTypeError, self._place, f"parameter {i}", "a numpy.ndarray or Parameter", got)
            if id(obj) in seen:
                raise refuse(RoptimValueError, self._place, f"parameter {i}", "given once", "one given before")
            seen.add(id(obj))

    def _parameters(self) -> Iterable[Any]:
        return (p for group in self.param_groups for p in group["params"])

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets the gradients of all Parameters and tensors, and those that were accumulated.

        Parameters
        ----------
        set_to_none : bool
            With False the gradient arrays stay and are filled with zeros; where there is none, there is none.
        """
        set_to_none = flag(f"{self._place}.zero_grad", "set_to_none", set_to_none)
        if self._engine is not None:
            self._engine.clear_sums()
        for p in self._parameters():
            if has_gradient(p) and not isinstance(p, Parameter):
                clear(p, set_to_none)
            elif isinstance(p, Parameter) and p.grad is not None:
                if set_to_none:
                    p.grad = None
                elif isinstance(p.grad, np.ndarray) and p.grad.flags.writeable:
                    p.grad[...] = 0
                elif isinstance(p.grad, (np.ndarray, np.generic)):
                    p.grad = np.zeros_like(p.grad)
                else:
                    # A sparse gradient, which has no rows of zeros, or one on a device.
                    p.grad = np.zeros(p.shape, p.dtype)

    # ---- steps ------------------------------------------------------------------------------------------

    def step(
        self,
        gradients: Any = None,
        *,
        closure: Callable[[], Any] | None = None,
        zero_grad: bool = False,
        average: AveragedModel | None = None,
        statistics: bool = False,
    ) -> Any:
        """One update of every parameter that has a gradient, in place.

        Parameters
        ----------
        gradients : optional
            - Nothing: what was accumulated, or the ``.grad`` of each Parameter or tensor is used; one without is
              left untouched. The first step that finds none at all warns.
            - Gradients in the shape of the parameters as they were given: a dict for a dict, a list for a
              list, an array for an array. ``None`` skips a parameter; a missing or surplus name is an
              error. With several groups: a list over all parameters, or a list with one container per
              group.
            - A callable: see ``closure``.
        closure : callable, optional
            Called once before the update. It returns the loss, with the gradients in ``.grad``, or
            ``(loss, gradients)``.
        zero_grad : bool
            Whether the gradient arrays are filled with zeros as well, while the update has them at hand, for loops
            that add to them. They must be writeable arrays that share no memory with each other. An update that
            ``nonfinite="skip"`` leaves out clears them, too; a step that raises does not. (A ``NonfiniteError`` on a
            GPU comes after the step, unless ``nonfinite_sync`` is on: they are cleared by then, as they are when post
            hooks run.) Gradients of Parameters with ``requires_grad=False`` stay; after :meth:`accumulate` it is every
            ``.grad``, as in :meth:`zero_grad` without ``set_to_none``.
        average : AveragedModel, optional
            An average of all parameters, which joins them after the update as its ``update_parameters`` would, to the
            bit, also where the update is left out. It knows the parameters it was made from, else they are told apart
            by name where both sides have names, and else by their order. An average that the engine computes does so
            on the CPU while the update has the parameters at hand, which spares reading them again, unless the
            optimizer has them in another order. Otherwise it does so afterwards: if a function of your own raises
            then, the step was made.
        statistics : bool
            Whether :attr:`statistics` are taken while the update has the numbers at hand. Of steps on the CPU.

        Returns
        -------
        The loss that the closure returned; None without closure.

        Raises
        ------
        RoptimError
            If a gradient is refused; parameters and state are as before then.
        """
        self._step_called = True
        if (self._hooks is not None or _PRE or _POST) and self._has_hooks():
            return self._step_with_hooks(Optimizer.step, *_given(gradients, closure, zero_grad, average, statistics))
        if self._engine is None:
            raise NotImplementedError(f"{type(self).__name__} must define step")
        loss = None
        if closure is not None or callable(gradients):
            gradients, closure = self._told_apart(gradients, closure)
            if closure is not None:
                loss, gradients = _evaluated(closure)
        if gradients is None and not self._looked_for_gradients:
            self._look_for_gradients()
        if self._scheduled:
            self._follow_schedules()
        try:
            if zero_grad is not False or average is not None or statistics is not False:
                self._step_and_more(gradients, zero_grad, average, statistics)
            else:
                self._engine.step(None if gradients is None else self._read(gradients))
        except KeyboardInterrupt:
            self._show_interrupted()
            raise
        if self._scheduled:
            self._show_schedules()
        return loss

    def _look_for_gradients(self) -> None:
        """Warns where the first step finds no gradient at all: the backward pass is missing, or other arrays got it."""
        assert self._engine is not None
        self._looked_for_gradients = True
        objects = self._state._objects
        # Plain arrays without gradients are refused.
        if not all(isinstance(p, Parameter) or has_gradient(p) for p in objects):
            return
        learn = [p for p in objects if getattr(p, "requires_grad", True)]
        if learn and not self._engine.has_sums and all(p.grad is None for p in learn):
            warn(
                f"{self._place}.step: no Parameter has a gradient, so nothing is updated; set .grad of these "
                "Parameters first, or call step(gradients)"
            )

    def _step_and_more(self, gradients: Any, zero_grad: Any, average: Any, statistics: Any) -> None:
        engine = self._engine
        assert engine is not None
        place = f"{self._place}.step"
        clears = flag(place, "zero_grad", zero_grad)
        measures = flag(place, "statistics", statistics)
        accumulated = gradients is None and engine.has_sums
        given = None if gradients is None else self._read(gradients)
        # Sums of gradients are the engine's own: nothing of them is cleared in the pass.
        clears_given = clears and not accumulated
        if average is None and clears and accumulated:
            # An interrupt comes when the gradients are cleared as well.
            with deferred():
                engine.step(None, False, None, measures)
                self.zero_grad(set_to_none=False)
            return
        if average is None:
            engine.step(given, clears_given, None, measures)
        else:
            objects = self._in_order_of(_average(average, place))
            follower = average._follower
            if objects is self._state._objects and follower is not None and self._options["backend"] == "cpu":
                engine.step(given, clears_given, follower, measures)
            else:
                average._check_fit(place, objects)
                # An interrupt comes when both have counted the step.
                with deferred():
                    engine.step(given, clears_given, None, measures)
                    average._join(objects)
        if clears and accumulated:
            self.zero_grad(set_to_none=False)

    def _in_order_of(self, average: AveragedModel) -> list[Any]:
        """The parameters in the order of their averages; the list of the state itself where it is that."""
        objects = self._state._objects
        known = self._order_known
        if known is None or known[0]() is not average or known[1] != len(objects):
            order = average._order(objects, self._state._by_name)
            ordered = objects if order == list(range(len(objects))) else [objects[i] for i in order]
            self._order_known = known = (weakref.ref(average), len(objects), ordered)
        return known[2]

    @property
    def statistics(self) -> Statistics | None:
        """Norms of gradients, updates and parameters in the last step, if it was ``step(..., statistics=True)``.

        None after another step, and where no parameter was updated.
        """
        if self._engine is None:
            return None
        squares = self._engine.squares()
        names: list[str | int] = list(self._state._by_name)
        return statistics_of(squares, names or list(range(len(squares))))

    def accumulate(self, gradients: Any = None) -> None:
        """Adds gradients to sums that the next ``step()`` without gradients takes; they begin anew then.

        The sums are no part of the state: they are not saved, an optimizer that has some is not copied, and
        :meth:`load_state_dict` and :meth:`zero_grad` forget them. They are float32 for parameters of fewer bits; on a
        GPU they stay there. A loop over micro-batches::

            for x, y in micro_batches:
                opt.accumulate(gradients_of(x, y))
            opt.step()

        Parameters
        ----------
        gradients
            As :meth:`step` takes them; nothing for the ``.grad`` of each Parameter or tensor.

        Raises
        ------
        RoptimError
            If a gradient is refused; the sums are as before then.
        """
        if self._engine is None:
            allowed, got = "one of the engine's", f"{type(self).__name__}, written in Python"
            raise refuse(RoptimTypeError, f"{self._place}.accumulate", "the optimizer", allowed, got)
        if gradients is None:
            objects = self._state._objects
            if not all(has_gradient(p) for p in objects):
                remedy = "call accumulate(gradients), or wrap the arrays in roptim.Parameter and set .grad"
                raise refuse(
                    RoptimTypeError, f"{self._place}.accumulate", "gradients", "given for plain arrays", "none", remedy
                )
            self._engine.accumulate([p.grad for p in objects])
        else:
            self._engine.accumulate(self._read(gradients))

    def sync(self) -> None:
        """Waits for the device and brings every Parameter's values home; on the CPU it does nothing.

        Reading ``p.data`` does it for one Parameter, and is where they are then.

        Raises
        ------
        NonfiniteError
            Of the last step, with ``nonfinite="raise"`` on a GPU.
        DeviceLostError
            If the device is gone: load parameters and state from one checkpoint.
        """
        if self._engine is not None:
            self._engine.sync()

    def to(self, backend: str | Device, *, allow_software: bool | None = None) -> Optimizer:
        """Moves parameters and state to another backend and returns the optimizer.

        Parameters
        ----------
        backend : str or Device
            As in the constructor, without ``"auto"``.
        allow_software : bool, optional
            As in the constructor; by default as it is now.

        Raises
        ------
        RoptimError
            If the backend is refused; the optimizer is as before then.
        """
        place = f"{self._place}.to"
        if self._engine is None or self._engine_name is None or self._current is None:
            allowed, got = "one of the engine's", f"{type(self).__name__}, written in Python"
            raise refuse(RoptimTypeError, place, "the optimizer", allowed, got)
        self._refuse_sums(place)
        if backend == "auto":
            remedy = "make an optimizer with it: it is measured once, before there is anything to move"
            raise refuse(RoptimValueError, place, "backend", '"cpu", "gpu" or a Device', "'auto'", remedy)
        software = self._options["allow_software"] if allow_software is None else allow_software
        options = checked_options(self._place, {**self._options, "backend": backend, "allow_software": software})
        engine = Engine(self._engine_name, **options)
        self._engine.sync()
        saved = self._engine.state_dict()
        try:
            for index, group in enumerate(self.param_groups):
                engine.add_group(self._engine.hypers(index), list(group["params"]), group.get("param_names"), False)
            engine.reserve()
            engine.load(engine.prepare_load(saved))
            engine.take_over(self._engine)
        except BaseException:
            engine.release()
            raise
        self._options, self._engine, self._current.engine = options, engine, engine
        self._state._engine = engine
        return self

    def _refuse_sums(self, place: str) -> None:
        if self._engine is not None and self._engine.has_sums:
            remedy = "step or zero_grad first"
            raise refuse(RoptimValueError, place, "sums of gradients", "none", "accumulated ones", remedy)

    def _follow_schedules(self) -> None:
        """Brings scheduled hyperparameters to their values for the coming update."""
        assert self._engine is not None
        count = self._engine.update_count
        if self._shown_at == count:
            return
        for index, scheduled in self._scheduled.items():
            values = values_at(scheduled, count)
            dict.update(self.param_groups[index], shown(values, self._engine.set_hypers(index, values)))
        self._shown_at = count

    def _show_schedules(self) -> None:
        """The same after an update, for readers of the groups. What is refused here is refused again, and raised,
        before the next update."""
        assert self._engine is not None
        # Waits for a device that may leave the update out: what it reports must not get lost below.
        _ = self._engine.update_count
        with contextlib.suppress(Exception):
            self._follow_schedules()

    def _show_interrupted(self) -> None:
        """The same where Ctrl-C came, which may be right after the update. A device is not waited for then, as it may
        have an error to tell: the next step brings the groups up to date."""
        if self._scheduled and self._options["backend"] == "cpu":
            self._show_schedules()

    def _told_apart(self, gradients: Any, closure: Any) -> tuple[Any, Callable[[], Any] | None]:
        """Gradients and closure, of which the first argument of step may be either."""
        if callable(gradients) and closure is None and not hasattr(gradients, "__array__"):
            gradients, closure = None, gradients
        if closure is not None and not callable(closure):
            got = f"an object of type {type(closure).__name__}"
            raise refuse(RoptimTypeError, f"{self._place}.step", "closure", "callable", got)
        return gradients, closure

    def _read(self, gradients: Any) -> list[Any]:
        place = f"{self._place}.step"
        if len(self._specs) == 1:
            return _tree.read(self._specs[0], gradients, place)
        total = len(self._state._objects)
        if self._all is None or len(self._all.keys) != total:
            names = tuple(self._state._by_name)
            kind = "pairs" if names else "sequence"
            self._all = _tree.Spec(kind, names or tuple(range(total)), (_tree.LEAF,) * total)
        if isinstance(gradients, Mapping):
            return _tree.read(self._all, gradients, place)
        if not isinstance(gradients, (list, tuple)):
            got = f"an object of type {type(gradients).__name__}"
            raise refuse(RoptimTypeError, place, "gradients", "a list over all parameters or groups", got)
        by_group = len(gradients) == len(self._specs) and not (total == len(gradients) and _tree.is_leaf(gradients[0]))
        if by_group:
            read = zip(self._specs, gradients, strict=True)
            return [leaf for i, (spec, tree) in enumerate(read) for leaf in _tree.read(spec, tree, place, f"group {i}")]
        return _tree.read(self._all, gradients, place)

    # ---- hooks ------------------------------------------------------------------------------------------

    def _register(self, kind: str, hook: Hook, prepend: bool = False) -> RemovableHandle:
        if self._hooks is None:
            self._hooks = Hooks()
        return register(getattr(self._hooks, kind), f"{self._place}.register_{kind}_hook", hook, prepend)

    def register_step_pre_hook(self, hook: Hook) -> RemovableHandle:
        """Calls ``hook(optimizer, args, kwargs)`` before each step; ``args`` begin with the optimizer, and have
        the step's first argument, ``kwargs`` a ``closure`` that was given by name.

        It returns None, or ``(args, kwargs)`` that take the place of the step's. Returns a handle whose
        ``remove()`` takes the hook away. Hooks run in the order they were registered in.
        """
        return self._register("step_pre", hook)

    def register_step_post_hook(self, hook: Hook) -> RemovableHandle:
        """Calls ``hook(optimizer, args, kwargs)`` after each step that did not raise."""
        return self._register("step_post", hook)

    def register_state_dict_pre_hook(self, hook: Hook, prepend: bool = False) -> RemovableHandle:
        """Calls ``hook(optimizer)`` before :meth:`state_dict` begins; with ``prepend`` before other such hooks."""
        return self._register("state_dict_pre", hook, prepend)

    def register_state_dict_post_hook(self, hook: Hook, prepend: bool = False) -> RemovableHandle:
        """Calls ``hook(optimizer, state_dict)`` at the end of :meth:`state_dict`; what it returns, if not None, is
        returned in its place."""
        return self._register("state_dict_post", hook, prepend)

    def register_load_state_dict_pre_hook(self, hook: Hook, prepend: bool = False) -> RemovableHandle:
        """Calls ``hook(optimizer, state_dict)`` before :meth:`load_state_dict`, with a shallow copy; what it
        returns, if not None, is loaded in its place."""
        return self._register("load_state_dict_pre", hook, prepend)

    def register_load_state_dict_post_hook(self, hook: Hook, prepend: bool = False) -> RemovableHandle:
        """Calls ``hook(optimizer)`` after :meth:`load_state_dict`."""
        return self._register("load_state_dict_post", hook, prepend)

    # ---- state ------------------------------------------------------------------------------------------

    @property
    def param_groups(self) -> FixedList:
        """The groups: live dicts, as many as were given or added."""
        return self._param_groups

    @param_groups.setter
    def param_groups(self, value: Any) -> None:
        if value is not self._param_groups:
            remedy = 'set values in the groups, as param_groups[0]["lr"] = 0.1, or call add_param_group'
            raise refuse(RoptimTypeError, self._place, "param_groups", "the list that it is", told(value), remedy)

    @property
    def state(self) -> State:
        """State by parameter."""
        return self._state

    @state.setter
    def state(self, value: Mapping[Any, Any]) -> None:
        if value is self._state:
            return
        if not isinstance(value, Mapping) or len(value):
            raise refuse(
                RoptimValueError,
                self._place,
                "state",
                "{} when assigned",
                "a mapping with entries",
                "use load_state_dict",
            )
        self._state.clear()

    @property
    def update_count(self) -> int:
        """Applied updates, the clock of schedules."""
        return self._engine.update_count if self._engine is not None else 0

    @property
    def skip_count(self) -> int:
        """Updates left out because a gradient was not finite (``nonfinite="skip"``)."""
        return self._engine.skip_count if self._engine is not None else 0

    @property
    def gradient_norm(self) -> float | None:
        """The 2-norm of all gradients of the last step, bounded by ``clip_value`` but not yet scaled; None without
        ``clip_norm``."""
        return self._engine.gradient_norm if self._engine is not None else None

    @property
    def grad_scale(self) -> float:
        """What the gradients of the coming steps were multiplied by, a power of two; 1.0 unless it was set.

        Loss scaling: small float16 gradients vanish unless the loss is multiplied first. Steps divide it out before
        clipping, exactly, and ``gradient_norm`` is that of the gradients without it. With ``nonfinite="skip"`` an
        overflow leaves the update out::

            opt = roptim.AdamW(params, nonfinite="skip")
            opt.grad_scale = 2.0**12
            opt.step(gradients_of(2.0**12 * loss))

        It is not saved, and a copied optimizer begins with 1.
        """
        return self._engine.grad_scale if self._engine is not None else 1.0

    @grad_scale.setter
    def grad_scale(self, value: float) -> None:
        if self._engine is None:
            raise refuse(
                RoptimTypeError, self._place, "grad_scale", "1 for an optimizer written in Python", told(value)
            )
        number = settled(value)
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise refuse(RoptimTypeError, self._place, "grad_scale", "a power of two", told(value))
        try:
            self._engine.grad_scale = float(number)
        except OverflowError:
            raise refuse(RoptimValueError, self._place, "grad_scale", "a power of two", told(value)) from None

    @property
    def device(self) -> str:
        """What the steps run on."""
        return self._engine.device if self._engine is not None else "python"

    def reset(self, p: Any) -> None:
        """Returns one parameter (object, name or index) to step 0 without state."""
        del self._state[p]

    def state_dict(self) -> dict[str, Any]:
        """A copy of everything but the parameters' values, in torch's layout.

        Returns
        -------
        dict
            ``"state"``: ``{index: {"step": int, slot: array}}``, without parameters never updated;
            ``"param_groups"``: options of each group with ``"params"`` as indices and, where names were
            given, ``"param_names"``; ``"roptim"``: class, format version, counts of updates, schedules.
        """
        hooks = self._hooks or Hooks()
        for hook in list(hooks.state_dict_pre.values()):
            hook(self)
        if self._engine is not None and self._engine.has_sums:
            warn(
                f"{self._place}.state_dict: gradients that were accumulated are not part of it; call it after the step"
            )
        state_dict = self._state_dict()
        for hook in list(hooks.state_dict_post.values()):
            changed = hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        return state_dict

    def _state_dict(self) -> dict[str, Any]:
        groups = [
            {key: value if key == "params" else copy.deepcopy(value) for key, value in group.items()}
            for group in self._numbered_groups()
        ]
        if self._engine is not None:
            saved = self._engine.state_dict()
            about = saved["roptim"]
            if self._scheduled:
                about["schedules"] = {
                    index: {name: encoded(value) for name, value in scheduled.items()}
                    for index, scheduled in self._scheduled.items()
                }
            return {"state": saved["state"], "param_groups": groups, "roptim": about}
        state = {i: copy.deepcopy(entry) for i, entry in self._state._own.items() if entry}
        about = {"optimizer": type(self).__name__, "format": _FORMAT, "update_count": 0, "parameters": self._facts()}
        return {"state": state, "param_groups": groups, "roptim": about}

    def load_state_dict(
        self,
        state_dict: Mapping[str, Any],
        *,
        strict: bool = True,
        missing: Missing | None = None,
        unexpected: Unexpected | None = None,
        rename: Mapping[str, str] | None = None,
        hparams: Literal["file", "keep"] | Mapping[str, Any] = "file",
    ) -> LoadReport:
        """Replaces options and state by those of ``state_dict``, which is not kept.

        Parameters are matched by name where both sides have names, else by position; groups by the parameters in
        them. Class, shapes and dtypes must fit, whatever the arguments say; everything is checked before anything
        is written. A dict without the ``"roptim"`` entry, from torch, is accepted when its state fits this class.
        Schedules go on where they were; functions as hyperparameters must be given again at construction.
        Hyperparameters that a saved group does not give stay as they are. :mod:`roptim.convert` reads states of
        torch and optax.

        Parameters
        ----------
        state_dict : dict
            What :meth:`state_dict` returned, here or in torch.
        strict : bool
            With False, ``missing`` is ``"init"`` and ``unexpected`` is ``"drop"`` unless they are given.
        missing : {"error", "init"}, optional
            What happens to parameters that the saved state lacks: an error, or they begin anew.
        unexpected : {"error", "drop"}, optional
            What happens to parameters that only the saved state has: an error, or they are left out.
        rename : dict, optional
            ``{saved name: name here}`` for parameters that were renamed.
        hparams : {"file", "keep"} or dict
            Hyperparameters and the other keys of groups: the saved ones, or they stay as they are here. A dict
            takes the saved ones but for those it has, which every group gets.

        Returns
        -------
        LoadReport
            What was loaded, initialised and dropped, and each hyperparameter that changed.

        Raises
        ------
        RoptimError
            If class, groups, names, shapes, dtypes or options do not fit; nothing has changed then.
        """
        place = f"{self._place}.load_state_dict"
        rules = Rules.of(place, strict, missing, unexpected, rename, hparams)
        prepared = prepare(self, self._before_load(state_dict), rules, place)
        with deferred():
            prepared.commit()
        self._after_load()
        return prepared.report

    def _before_load(self, state_dict: Any) -> Any:
        """What is loaded after the hooks."""
        hooks = self._hooks or Hooks()
        if hooks.load_state_dict_pre and isinstance(state_dict, Mapping):
            state_dict = dict(state_dict)
            for hook in list(hooks.load_state_dict_pre.values()):
                changed = hook(self, state_dict)
                state_dict = state_dict if changed is None else changed
        return state_dict

    def _after_load(self) -> None:
        hooks = self._hooks or Hooks()
        for hook in list(hooks.load_state_dict_post.values()):
            hook(self)

    def _facts(self) -> dict[int, dict[str, Any]]:
        """What a saved state has to fit, by parameter; the engine writes the same."""
        return {i: {"shape": p.shape, "dtype": p.dtype.name} for i, p in enumerate(self._state._objects)}

    def _numbered_groups(self) -> list[dict[str, Any]]:
        """The groups with indices in place of the parameters."""
        groups, start = [], 0
        for group in self.param_groups:
            count = len(group["params"])
            groups.append({**group, "params": list(range(start, start + count))})
            start += count
        return groups

    def _check_group(self, hypers: dict[str, Any]) -> None:
        assert self._engine is not None
        self._engine.check_hypers({key: plain(settled(value)) for key, value in hypers.items()})

    # ---- copies and text --------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_sums(f"copy of {self._place}")
        internal = {
            "_engine",
            "_current",
            "_reserves",
            "_state",
            "_param_groups",
            "_specs",
            "_all",
            "_order_known",
            "_options",
            "defaults",
            "_place",
            "_hypers",
        }
        # Hooks are not copied, as in torch: what they do belongs to the original.
        internal |= {"_hooks", "_in_step", "_scheduled", "_shown_at", "_adding"}
        return {
            "defaults": self.defaults,
            "options": self._options,
            "specs": self._specs,
            "groups": [dict(group) for group in self.param_groups],
            "scheduled": self._scheduled,
            "state": self._state._own if self._engine is None else _roptim.dumps(self._engine.state_dict()),
            "attributes": {key: value for key, value in vars(self).items() if key not in internal},
        }

    def __setstate__(self, saved: dict[str, Any]) -> None:
        self._setup(saved["defaults"], saved["options"])
        for group in saved["groups"]:
            self.add_param_group(group)
        self._specs = saved["specs"]
        self.__dict__.update(saved["attributes"])
        self._scheduled.clear()
        self._scheduled.update(saved["scheduled"])
        if self._engine is None:
            self._state._own = saved["state"]
        else:
            self._engine.load(self._engine.prepare_load(_roptim.loads(saved["state"])))
        self._resumed = any("initial_lr" in group for group in self.param_groups)

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__} ("]
        for i, group in enumerate(self.param_groups):
            lines += [""] * (i > 0) + [f"Parameter Group {i}"]
            lines += [
                f"    {key}: {group[key]}" for key in sorted(group, key=str) if key not in ("params", "param_names")
            ]
        return "\n".join([*lines, ")"])


def _hooked(own: Callable[..., Any]) -> Callable[..., Any]:
    """A step with the hooks around it, once also where it calls the step of a base class."""

    @functools.wraps(own)
    def step(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        self._step_called = True
        if not self._has_hooks():
            return own(self, *args, **kwargs)
        return self._step_with_hooks(own, args, kwargs)

    return step


class ClosureOptimizer(Optimizer):
    """Base class of the engine's optimizers whose step evaluates the loss several times."""

    def step(
        self,
        gradients: Any = None,
        *,
        closure: Callable[[], Any] | None = None,
        zero_grad: bool = False,
        average: AveragedModel | None = None,
        statistics: bool = False,
    ) -> Any:
        """One step: up to ``max_iter`` iterations along directions downhill.

        Parameters
        ----------
        closure : callable, required
            Called several times, each time with the parameters at another point. It returns the loss, with
            the gradients in ``.grad``, or ``(loss, gradients)``. It must be deterministic. May also be given
            as the first argument.
        gradients
            Only the place of the first argument; gradients alone are refused.
        zero_grad : bool
            Must be False: the closure decides what becomes of its gradients.
        average : AveragedModel, optional
            An average of all parameters, which joins them after the step as its ``update_parameters`` would. An
            interrupt waits for the end of both.
        statistics : bool
            Must be False: a step is no single update.

        Returns
        -------
        The loss that the closure returned first, as it returned it.

        Raises
        ------
        RoptimError
            If what the closure returned is refused. After this and any error of the closure itself,
            parameters and state are as before the step.
        """
        assert self._engine is not None
        self._step_called = True
        if self._has_hooks():
            given = _given(gradients, closure, zero_grad, average, statistics)
            return self._step_with_hooks(ClosureOptimizer.step, *given)
        gradients, closure = self._told_apart(gradients, closure)
        place = f"{self._place}.step"
        if closure is None or gradients is not None:
            allowed, got = ("given", "none") if gradients is None else ("given without gradients", "gradients")
            remedy = "a step evaluates loss and gradients several times"
            raise refuse(RoptimTypeError, place, "closure", allowed, got, remedy)
        if flag(place, "zero_grad", zero_grad):
            remedy = "clear the gradients in the closure"
            raise refuse(RoptimValueError, place, "zero_grad", "False", told(zero_grad), remedy)
        if flag(place, "statistics", statistics):
            raise refuse(RoptimValueError, place, "statistics", "False", told(statistics))
        if average is not None:
            _average(average, place)._check_fit(place, self._in_order_of(average))
        losses: list[Any] = []

        def evaluate() -> tuple[float, list[Any] | None]:
            loss, given = _evaluated(closure)
            try:
                number = None if isinstance(loss, (str, bytes)) else float(number_of(loss))
            except (TypeError, ValueError, OverflowError):
                number = None
            if number is None:
                got = f"an object of type {type(loss).__name__}"
                raise refuse(RoptimTypeError, place, "the closure's loss", "a number", got)
            if not losses:
                losses.append(loss)
            return number, None if given is None else self._read(given)

        if self._scheduled:
            self._follow_schedules()
        try:
            if average is None:
                self._engine.minimize(evaluate)
            else:
                # An interrupt comes when both have counted the step.
                with deferred():
                    self._engine.minimize(evaluate)
                    average._join(self._in_order_of(average))
        except KeyboardInterrupt:
            self._show_interrupted()
            raise
        if self._scheduled:
            self._show_schedules()
        return losses[0]


def _evaluated(closure: Callable[[], Any]) -> tuple[Any, Any]:
    """Loss and gradients of a closure that returns both or the loss alone."""
    loss = closure()
    return loss if isinstance(loss, tuple) and len(loss) == 2 else (loss, None)


def _average(average: Any, place: str) -> AveragedModel:
    """An average that a step can bring up to date."""
    from roptim._averaging import AveragedModel

    if not isinstance(average, AveragedModel):
        got = f"an object of type {type(average).__name__}"
        raise refuse(RoptimTypeError, place, "average", "an AveragedModel", got)
    if average.buffers is not None:
        remedy = "call its update_parameters after the step"
        raise refuse(RoptimValueError, place, "average", "one without buffers", "one with buffers", remedy)
    return average


def _given(
    gradients: Any, closure: Any, zero_grad: bool, average: Any, statistics: bool
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a step as hooks see them."""
    by_name = {"closure": closure} if closure is not None else {}
    for name, value, unless in (
        ("zero_grad", zero_grad, False),
        ("average", average, None),
        ("statistics", statistics, False),
    ):
        if value is not unless:
            by_name[name] = value
    return () if gradients is None else (gradients,), by_name


def _grouped(params: Any) -> list[Any]:
    """The groups that a constructor was given."""
    if isinstance(params, (list, tuple)) and any(_is_group(item) for item in params):
        return list(params)
    return [{"params": params}]


def _is_group(item: object) -> bool:
    return isinstance(item, Mapping) and "params" in item
