"""Schedules as values: functions of the count of updates, for any hyperparameter.

>>> from roptim.schedules import cosine, warmup
>>> lr = 1e-3 * warmup(500).then(cosine(9500, floor=0.01))
>>> lr(0), lr(500), lr(10_000)
(0.0, 0.001, 1e-05)

``roptim.AdamW(params, lr=lr)`` needs no second object: update number t, from 0, uses ``lr(t)``. Updates that are left
out do not count. A schedule of length n goes from its first value at t = 0 to its last at t = n and holds it from there
on; in ``a.then(b)`` the second one begins at the first one's length, where it is the one that speaks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from roptim import _roptim
from roptim._errors import RoptimTypeError, RoptimValueError, refuse, told
from roptim._values import is_encodable, is_real, is_whole

__all__ = [
    "Schedule",
    "constant",
    "cosine",
    "cyclic",
    "exponential",
    "inverse_sqrt",
    "linear",
    "one_cycle",
    "piecewise",
    "polynomial",
    "sequence",
    "sqrt_decay",
    "step",
    "warm_restarts",
    "warmup",
    "warmup_stable_decay",
]

_BARS = "▁▂▃▄▅▆▇█"


def _count(place: str, name: str, value: Any, low: int = 0) -> int:
    if is_whole(value) and low <= value < 2**64:
        return int(value)
    kind = RoptimValueError if is_whole(value) else RoptimTypeError
    raise refuse(kind, place, name, f"a whole number >= {low}", told(value))


def _number(place: str, name: str, value: Any) -> float:
    if is_real(value):
        try:
            return float(value)
        except OverflowError:
            raise refuse(RoptimValueError, place, name, "a finite number", "one beyond all floats") from None
    raise refuse(RoptimTypeError, place, name, "a number", told(value))


def _word(place: str, name: str, value: Any, words: Iterable[str]) -> str:
    if isinstance(value, str) and value in words:
        return value
    *others, last = map(repr, words)
    raise refuse(RoptimValueError, place, name, f"{', '.join(others)} or {last}", told(value))


class Schedule:
    """A function of the count of updates; made by the functions of this module.

    Schedules are values: they compare equal, hash, pickle, and have a text form (:meth:`to_json`). ``a * b`` and
    ``2 * a`` multiply.

    Attributes
    ----------
    length : int or None
        The update from which on the last value holds; None where there is no end.
    """

    __slots__ = ("_engine",)
    # NumPy numbers leave multiplication to this class.
    __array_ufunc__ = None

    def __init__(self, engine: _roptim.Schedule) -> None:
        self._engine = engine

    def __call__(self, t: int) -> float:
        """The value of update ``t``, from 0."""
        return self._engine.at(_count("schedule", "t", t))

    def values(self, n: int, start: int = 0) -> np.ndarray[Any, Any]:
        """The values of ``n`` updates from number ``start`` on, float64 of shape (n,)."""
        return self._engine.values(_count("schedule", "start", start), _count("schedule", "n", n))

    @property
    def length(self) -> int | None:
        """The update from which on the last value holds; None where there is no end."""
        return self._engine.length

    def then(self, other: Schedule | float) -> Schedule:
        """This schedule and then another, or a number.

        Raises
        ------
        RoptimValueError
            If this one has no end.
        """
        return Schedule(self._engine.then(_schedule("then", other)._engine))

    def clip(self, low: float | None = None, high: float | None = None) -> Schedule:
        """The same, kept within bounds."""
        bounds = [None if x is None else _number("clip", name, x) for name, x in (("low", low), ("high", high))]
        return Schedule(self._engine.clip(*bounds))

    def shift(self, by: int) -> Schedule:
        """The same, ``by`` updates later, before which it has its first value; earlier where ``by`` is negative."""
        if not is_whole(by) or not -(2**63) <= by < 2**63:
            raise refuse(RoptimTypeError, "shift", "by", "a whole number", told(by))
        return Schedule(self._engine.shift(int(by)))

    def __mul__(self, other: Schedule | float) -> Schedule:
        if not isinstance(other, Schedule) and (isinstance(other, bool) or not _is_number(other)):
            return NotImplemented
        return Schedule(self._engine.times(_schedule("*", other)._engine))

    __rmul__ = __mul__

    def to_json(self) -> str:
        """The schedule as text, which :meth:`from_json` reads."""
        return self._engine.json()

    @classmethod
    def from_json(cls, text: str) -> Schedule:
        """The schedule of a text; raises RoptimValueError where it is none."""
        if not isinstance(text, str):
            raise refuse(RoptimTypeError, "schedules.from_json", "text", "a str", f"{type(text).__name__}")
        if not is_encodable(text):
            raise refuse(RoptimValueError, "schedules.from_json", "text", "text that UTF-8 can hold", ascii(text))
        return cls(_roptim.Schedule(text))

    def plot(self, ax: Any = None, n: int | None = None) -> Any:
        """Draws the schedule; needs matplotlib.

        Parameters
        ----------
        ax : matplotlib axes, optional
            Where; by default new ones.
        n : int, optional
            Updates to show; by default a tenth more than its length, 1000 without one.

        Returns
        -------
        The axes.
        """
        import matplotlib.pyplot as plt

        shown = self._span() if n is None else _count("plot", "n", n, 1)
        points = min(shown, 2000)
        t = sorted({(shown - 1) * i // max(points - 1, 1) for i in range(points)})
        ax = plt.subplots()[1] if ax is None else ax
        ax.plot(t, [self(each) for each in t])
        ax.set_xlabel("update")
        ax.set_ylabel("value")
        return ax

    def _span(self) -> int:
        return 1000 if self.length is None else min(self.length + self.length // 10 + 1, 2**64 - 1)

    def sparkline(self, width: int = 24) -> str:
        """The curve in one line of text."""
        width, last = _count("sparkline", "width", width, 1), self._span() - 1
        values = np.array([self(last * i // max(width - 1, 1)) for i in range(width)]) / 2
        finite = values[np.isfinite(values)]
        low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
        heights = np.nan_to_num((values - low) / (high - low) if high > low else np.zeros(width), posinf=1, neginf=0)
        return "".join(_BARS[round(height * (len(_BARS) - 1))] for height in heights.tolist())

    def __repr__(self) -> str:
        return f"{_text(json.loads(self.to_json()))}  {self.sparkline()}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Schedule) and self._engine == other._engine

    def __hash__(self) -> int:
        # Zeros of either sign are equal.
        return hash(re.sub(r"-(0\.0(?![0-9e]))", r"\1", self.to_json()))

    def __reduce__(self) -> tuple[Any, ...]:
        return Schedule.from_json, (self.to_json(),)


def _is_number(x: object) -> bool:
    return isinstance(x, (int, float, np.integer, np.floating))


def _schedule(place: str, x: Any) -> Schedule:
    if isinstance(x, Schedule):
        return x
    if not _is_number(x) or isinstance(x, bool):
        raise refuse(RoptimTypeError, place, "the other", "a schedule or a number", told(x))
    return constant(x)


def _text(tree: Any) -> str:
    """The expression that makes a schedule."""
    ((name, fields),) = tree.items()
    if name == "sequence":
        first, *others = map(_text, fields)
        return "".join([f"({first})" if " * " in first else first, *(f".then({other})" for other in others)])
    if name == "product":
        # A number stands for itself beside a schedule; two numbers would multiply.
        plain = [_is_factor(f) and (i > 0 or not _is_factor(fields[1])) for i, f in enumerate(fields)]
        factors = [f"{f['constant']['value']!r}" if p else _text(f) for f, p in zip(fields, plain, strict=True)]
        return " * ".join(factors)
    if name in ("clip", "shift"):
        inner = _text(fields.pop("of"))
        inner = f"({inner})" if " * " in inner else inner
        return f"{inner}.{name}({_arguments(fields)})"
    return f"{name}({_arguments(fields)})"


def _is_factor(tree: Any) -> bool:
    return list(tree) == ["constant"] and tree["constant"]["steps"] is None


def _arguments(fields: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in fields.items() if value is not None)


def _make(name: str, **fields: Any) -> Schedule:
    return Schedule(_roptim.Schedule(json.dumps({name: fields})))


def _fields(name: str, counts: Mapping[str, Any], numbers: Mapping[str, Any]) -> dict[str, Any]:
    """Checked arguments: whole numbers, and finite ones, which text can hold."""
    place = f"schedules.{name}"
    checked: dict[str, Any] = {key: _count(place, key, value, 1) for key, value in counts.items()}
    for key, value in numbers.items():
        checked[key] = _number(place, key, value)
        if not np.isfinite(checked[key]):
            raise refuse(RoptimValueError, place, key, "a finite number", told(value))
    return checked


def constant(value: float, steps: int | None = None) -> Schedule:
    """Always ``value``; ``steps`` is its length where something is to follow."""
    counts = {} if steps is None else {"steps": steps}
    return _make("constant", **{"steps": None, **_fields("constant", counts, {"value": value})})


def linear(start: float, end: float, steps: int) -> Schedule:
    r"""A line: :math:`start + (end - start) \cdot t / steps`."""
    return _make("linear", **_fields("linear", {"steps": steps}, {"start": start, "end": end}))


def warmup(steps: int, peak: float = 1.0, start: float = 0.0) -> Schedule:
    """A line from ``start`` at t = 0 to ``peak`` at t = ``steps``."""
    return linear(start, peak, steps)


def polynomial(steps: int, peak: float = 1.0, floor: float = 0.0, power: float = 1.0) -> Schedule:
    r""":math:`floor + (peak - floor) (1 - t / steps)^{power}`."""
    numbers = {"peak": peak, "floor": floor, "power": power}
    return _make("polynomial", **_fields("polynomial", {"steps": steps}, numbers))


def exponential(gamma: float, start: float = 1.0, steps: int | None = None) -> Schedule:
    r""":math:`start \cdot gamma^t`, until ``steps`` if given."""
    counts = {} if steps is None else {"steps": steps}
    fields = _fields("exponential", counts, {"start": start, "gamma": gamma})
    return _make("exponential", **{"steps": None, **fields})


def step(every: int, gamma: float = 0.1, start: float = 1.0) -> Schedule:
    r""":math:`start \cdot gamma^{\lfloor t / every \rfloor}`, without end."""
    return _make("step", **_fields("step", {"every": every}, {"start": start, "gamma": gamma}))


def cosine(steps: int, peak: float = 1.0, floor: float = 0.0) -> Schedule:
    r"""Half a cosine: :math:`floor + (peak - floor) (1 + \cos(\pi t / steps)) / 2`. It does not rise again.

    Source: Loshchilov, Hutter, *SGDR: stochastic gradient descent with warm restarts*, ICLR 2017.
    """
    return _make("cosine", **_fields("cosine", {"steps": steps}, {"peak": peak, "floor": floor}))


def sqrt_decay(steps: int, peak: float = 1.0, floor: float = 0.0) -> Schedule:
    r""":math:`floor + (peak - floor) (1 - \sqrt{t / steps})`.

    Source: Hägele et al., *Scaling laws and compute-optimal training beyond fixed training durations*, NeurIPS 2024.
    """
    return _make("sqrt_decay", **_fields("sqrt_decay", {"steps": steps}, {"peak": peak, "floor": floor}))


def inverse_sqrt(timescale: int, peak: float = 1.0) -> Schedule:
    r""":math:`peak \sqrt{timescale / (timescale + t)}`, without end.

    ``warmup(n).then(inverse_sqrt(n))`` is the schedule of Vaswani et al., *Attention is all you need*, NeurIPS 2017.
    """
    return _make("inverse_sqrt", **_fields("inverse_sqrt", {"timescale": timescale}, {"peak": peak}))


def warm_restarts(first: int, mult: int = 1, peak: float = 1.0, floor: float = 0.0) -> Schedule:
    """Half cosines one after another, without end: the first of ``first`` updates, each ``mult`` times as long as
    the one before.

    Source: Loshchilov, Hutter, *SGDR*, ICLR 2017.
    """
    counts, numbers = {"first": first, "mult": mult}, {"peak": peak, "floor": floor}
    return _make("warm_restarts", **_fields("warm_restarts", counts, numbers))


def one_cycle(
    steps: int,
    peak: float = 1.0,
    pct_start: float = 0.3,
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
    three_phase: bool = False,
    anneal: str = "cos",
) -> Schedule:
    """From ``peak / div_factor`` up to ``peak``, then down to ``peak / div_factor / final_div_factor``; its values are
    those of OneCycleLR, for updates 0 to ``steps - 1``.

    Parameters
    ----------
    steps : int
        Updates.
    peak : float
        Largest value.
    pct_start : float
        Part of the updates that goes up.
    div_factor, final_div_factor : float
        What the first and the last value are fractions of, > 0.
    three_phase : bool
        Come down to the first value, as fast as it went up, before the end.
    anneal : str
        ``"cos"`` or ``"linear"``.

    Source: Smith, Topin, *Super-convergence: very fast training of neural networks using large learning rates*, 2018.
    """
    place = "schedules.one_cycle"
    _word(place, "anneal", anneal, ("cos", "linear"))
    if not isinstance(three_phase, (bool, np.bool_)):
        raise refuse(RoptimTypeError, place, "three_phase", "True or False", told(three_phase))
    numbers = {
        "peak": peak,
        "pct_start": pct_start,
        "div_factor": div_factor,
        "final_div_factor": final_div_factor,
    }
    fields = _fields("one_cycle", {"steps": steps}, numbers)
    return _make("one_cycle", **fields, three_phase=bool(three_phase), anneal=anneal)


def cyclic(
    up: int,
    down: int | None = None,
    base: float = 0.1,
    peak: float = 1.0,
    mode: str = "triangular",
    gamma: float = 1.0,
) -> Schedule:
    """Triangles between ``base`` and ``peak``, without end: ``up`` updates up, ``down`` (the same) down.

    ``mode`` is ``"triangular"``, ``"triangular2"`` (half as high from cycle to cycle) or ``"exp_range"`` (times
    ``gamma**t``), as in CyclicLR. Source: Smith, *Cyclical learning rates for training neural networks*, WACV 2017.
    """
    _word("schedules.cyclic", "mode", mode, ("triangular", "triangular2", "exp_range"))
    counts = {"up": up, "down": up if down is None else down}
    return _make("cyclic", **_fields("cyclic", counts, {"base": base, "peak": peak, "gamma": gamma}), mode=mode)


def piecewise(points: Mapping[int, float] | Iterable[tuple[int, float]], lines: bool = True) -> Schedule:
    """Values at some updates, ``{t: value}`` from t = 0 on, with lines between them, or each held until the next."""
    place = "schedules.piecewise"
    try:
        pairs = [(t, value) for t, value in (points.items() if isinstance(points, Mapping) else points)]
    except (TypeError, ValueError):
        raise refuse(RoptimTypeError, place, "points", "a dict or pairs (t, value)", told(points)) from None
    checked = []
    for t, value in pairs:
        number = _number(place, "a value", value)
        if not np.isfinite(number):
            raise refuse(RoptimValueError, place, "a value", "a finite number", told(value))
        checked.append((_count(place, "t", t), number))
    return _make("piecewise", points=checked, lines=bool(lines))


def warmup_stable_decay(
    warmup_steps: int, stable_steps: int, decay_steps: int, tail: str = "linear", peak: float = 1.0, floor: float = 0.0
) -> Schedule:
    """Up along a line, along at ``peak``, down to ``floor``: ``tail`` is ``"linear"``, ``"sqrt"`` or ``"cosine"``.

    Source: Hu et al., *MiniCPM*, 2024; the square root is Hägele et al.'s.
    """
    tails = {"linear": lambda: linear(peak, floor, decay_steps), "sqrt": lambda: sqrt_decay(decay_steps, peak, floor)}
    tails["cosine"] = lambda: cosine(decay_steps, peak, floor)
    _word("schedules.warmup_stable_decay", "tail", tail, tails)
    return warmup(warmup_steps, peak).then(constant(peak, stable_steps)).then(tails[tail]())


def sequence(*schedules: Schedule | float) -> Schedule:
    """One after another; of one it is the same. All but the last must have an end."""
    if not schedules:
        raise refuse(RoptimValueError, "schedules.sequence", "schedules", "at least one", "none")
    first, *others = (_schedule("schedules.sequence", each) for each in schedules)
    for other in others:
        first = first.then(other)
    return first
