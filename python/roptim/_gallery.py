"""What is shown of :mod:`roptim.schedules`: the examples, for command line and documentation, and curves as text."""

from __future__ import annotations

import math
from typing import NamedTuple

from roptim import schedules
from roptim.schedules import Schedule

#: Updates that the examples are made for.
UPDATES = 1000

_BARS = "▁▂▃▄▅▆▇█"
_ASCII_BARS = "_.:-=+*#"


class Example(NamedTuple):
    """A schedule and the call that makes it."""

    call: str
    schedule: Schedule


# Every function with what its arguments change, then what joins schedules.
_CALLS = (
    "constant(0.5)",
    "linear(1, 0.2, 1000)",
    "warmup(1000)",
    "polynomial(1000, power=2)",
    "exponential(0.997)",
    "step(250, gamma=0.5)",
    "cosine(1000, floor=0.1)",
    "sqrt_decay(1000)",
    "inverse_sqrt(100)",
    "piecewise({0: 0.2, 300: 1, 1000: 0})",
    "piecewise({0: 1, 300: 0.5, 700: 0.1}, lines=False)",
    "warm_restarts(250)",
    "warm_restarts(150, mult=2)",
    "cyclic(125)",
    'cyclic(125, mode="triangular2")',
    'cyclic(100, 25, mode="exp_range", gamma=0.998)',
    "one_cycle(1000)",
    'one_cycle(1000, three_phase=True, anneal="linear")',
    "warmup_stable_decay(100, 700, 200)",
    'warmup_stable_decay(100, 700, 200, tail="sqrt")',
    'warmup_stable_decay(100, 700, 200, tail="cosine")',
    "sequence(warmup(200), constant(1, 300), 0.3)",
    "0.01 * warmup(200)",
    "warmup(200).then(cosine(800))",
    "warmup(100).then(inverse_sqrt(100))",
    "cosine(1000) * cyclic(100, base=0.5)",
    "exponential(0.996).clip(low=0.2)",
    "cosine(600).shift(400)",
)


def examples() -> list[Example]:
    """Schedules that show every function of the module and every way to join them."""
    known = {name: getattr(schedules, name) for name in schedules.__all__}
    # The texts are those above, nobody's input: so what is drawn and what is written over it cannot come apart.
    return [Example(call, eval(call, {"__builtins__": {}}, known)) for call in _CALLS]


def text_plot(schedule: Schedule, updates: int, width: int = 64, height: int = 6) -> str:
    """The values of the first ``updates`` updates as ``height`` rows of bars above an axis, the largest and the
    smallest at the side. A value that is not finite, of a schedule that grows too far, leaves its column empty."""
    # Between two columns are others, whose values only count for the largest and the smallest.
    finer = 16
    points = finer * (width - 1)
    shown = [i * (updates - 1) // points for i in range(points + 1)]
    values = [schedule(t) for t in shown]
    finite = [value for value in values if math.isfinite(value)] or [0.0]
    low, high = min(finite), max(finite)
    # Halves, as the difference of the largest and the smallest float64 is none.
    reach = high / 2 - low / 2
    # In eighths of a row; the smallest value is one.
    eighths = [
        0 if not math.isfinite(x) else 1 + round((8 * height - 1) * ((x / 2 - low / 2) / reach if reach > 0 else 0.0))
        for x in values[::finer]
    ]
    labels = [f"{high:.4g}", *[""] * (height - 2), f"{low:.4g}"]
    margin = max(map(len, labels))
    lines = []
    for row, label in enumerate(labels):
        below = 8 * (height - 1 - row)
        bars = "".join(" " if each <= below else _BARS[min(each - below, 8) - 1] for each in eighths)
        lines.append(f"{label:>{margin}} |{bars}".rstrip())
    lines.append(f"{'':{margin}}  0{shown[-1]:>{width - 1}}")
    return "\n".join(lines)


def printable(text: str, encoding: str | None) -> str:
    """The text with bars of ASCII characters where the encoding has no others."""
    try:
        _BARS.encode(encoding or "ascii")
    except UnicodeEncodeError:
        return text.translate(str.maketrans(_BARS, _ASCII_BARS))
    return text
