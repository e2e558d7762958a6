"""L-BFGS, with or without a strong Wolfe search.

D. C. Liu, J. Nocedal, "On the limited memory BFGS method for large scale optimization", Mathematical
Programming 45, 1989, method 2.1: from the last k pairs s_i = x_{i+1} - x_i, y_i = g_{i+1} - g_i

    H ← γ I                                             γ = (y·s)/(y·y) of the newest pair
    H ← V_iᵀ H V_i + ρ_i s_i s_iᵀ                       oldest to newest
    V_i = I - ρ_i y_i s_iᵀ,   ρ_i = 1/(y_i·s_i)
    d   = -H g

H is formed here, as a matrix. Without pairs and γ, at the first iteration of all, d = -g.

J. Nocedal, S. J. Wright, "Numerical Optimization", 2nd edition, 2006, algorithms 3.5 (bracketing) and 3.6
(zoom): a step length t is accepted where, with φ(t) = f(x + t d),

    φ(t)    ≤ φ(0) + c₁ t φ'(0)                         c₁ = 1e-4
    |φ'(t)| ≤ -c₂ φ'(0)                                 c₂ = 0.9

=========  ================
symbol     argument
=========  ================
first t    lr
k          history_size
=========  ================

What the algorithms leave open is as torch has it:

- The first iteration of all tries t = lr min(1, 1/Σ|g|), the others lr. Without line_search_fn these are the steps.
- A step of the optimizer begins with an evaluation, ends there if max|g| ≤ tolerance_grad, and makes at most max_iter
  iterations. It ends before a move where g·d > -tolerance_change, and after one where max_eval evaluations were made,
  where max|g| ≤ tolerance_grad, where no element moved by more than tolerance_change, or where the loss changed by
  less. Without line_search_fn, the last iteration moves without evaluating.
- A pair counts where y·s > 1e-10; γ stays where it does not.
- The next t is the minimum of the cubic through two trials: while bracketing within [t + 0.01 (t - t₋₁), 10 t],
  later within the bracket. A trial nearer to a bracket's end than a tenth of its width goes to the tenth where it
  would be the second such trial in a row, or lay outside. Where the cubic has no minimum, the middle is tried.
- A search makes at most max_eval - (evaluations of this step) trials after its first. Where these were spent it takes
  the trial with the lower loss; so does a bracket in which no element can move by min_change.

Deviations from torch: min_change is 1e-9 or tolerance_change, whichever is larger, and a first trial of 0 is none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

Array = np.ndarray
Function = Callable[[Array], tuple[float, Array]]


class Path(NamedTuple):
    """What one step did."""

    points: list[Array]  # every point that was evaluated, in order
    end: Array


class Trial(NamedTuple):
    t: float
    loss: float
    slope: float  # φ'(t)
    gradient: Array


class Method(Protocol):
    """What turns gradients into directions."""

    c2: float
    searches: bool

    def direction(self, g: Array) -> Array: ...

    def first_trial(self, g: Array, d: Array) -> float | None: ...

    def moved(self, g: Array, d: Array, t: float) -> None: ...

    def state(self) -> dict[str, Any]: ...


def trajectory(
    p0: Array,
    functions: Sequence[Function],
    *,
    lr: float = 1.0,
    max_iter: int = 20,
    max_eval: int | None = None,
    tolerance_grad: float = 1e-7,
    tolerance_change: float = 1e-9,
    history_size: int = 100,
    line_search_fn: str | None = None,
) -> tuple[list[Path], dict[str, Any]]:
    """The path of each step, and the state after the last one under torch's keys.

    ``functions`` has one entry per step: what gives loss and gradient at a point, both finite.
    """
    method = _LimitedMemory(lr, history_size, line_search_fn is not None)
    return descend(method, p0, functions, lr, max_iter, max_eval, tolerance_grad, tolerance_change)


class _LimitedMemory:
    c2 = 0.9

    def __init__(self, lr: float, history_size: int, searches: bool) -> None:
        self.lr, self.size, self.searches = lr, history_size, searches
        self.pairs: list[tuple[Array, Array]] = []
        self.gamma = 1.0
        self.last: tuple[Array, Array] | None = None  # gradient where the last move began, and that move

    def direction(self, g: Array) -> Array:
        if self.last is not None:
            y, s = g - self.last[0], self.last[1]
            if y @ s > 1e-10:
                self.pairs = [*self.pairs, (s, y)][-self.size :]
                self.gamma = (y @ s) / (y @ y)
        h = self.gamma * np.eye(len(g))
        for s, y in self.pairs:
            v = np.eye(len(g)) - np.outer(y, s) / (y @ s)
            h = v.T @ h @ v + np.outer(s, s) / (y @ s)
        return -h @ g

    def first_trial(self, g: Array, d: Array) -> float | None:
        return None if self.last is None else self.lr

    def moved(self, g: Array, d: Array, t: float) -> None:
        self.last = (g, t * d)

    def state(self) -> dict[str, Any]:
        return {
            "old_dirs": [y for _, y in self.pairs],
            "old_stps": [s for s, _ in self.pairs],
            "ro": [1.0 / (y @ s) for s, y in self.pairs],
            "H_diag": self.gamma,
        }


def descend(
    method: Method,
    p0: Array,
    functions: Sequence[Function],
    lr: float,
    max_iter: int,
    max_eval: int | None,
    tolerance_grad: float,
    tolerance_change: float,
) -> tuple[list[Path], dict[str, Any]]:
    """One step after another along the directions of ``method``."""
    max_eval = max_iter * 5 // 4 if max_eval is None else max_eval
    x = np.array(p0, np.float64).reshape(-1)
    paths: list[Path] = []
    counters = {"func_evals": 0, "n_iter": 0}
    last: dict[str, Any] = {}
    for function in functions:
        points: list[Array] = []

        def evaluate(x: Array, function: Function = function, points: list[Array] = points) -> tuple[float, Array]:
            points.append(x.reshape(np.shape(p0)))
            loss, g = function(points[-1])
            return float(loss), np.asarray(g, np.float64).reshape(-1)

        loss, g = evaluate(x)
        iteration = 0
        going = bool(np.any(np.abs(g) > tolerance_grad))
        while going and iteration < max_iter:
            iteration += 1
            d = method.direction(g)
            slope, reach = float(g @ d), np.max(np.abs(d))
            t = method.first_trial(g, d)
            if t is None:
                t = lr * min(1.0, 1.0 / np.sum(np.abs(g)))
            found = Trial(0.0, loss, slope, g)
            if slope > -tolerance_change:
                going = False
            elif method.searches and t > 0.0:

                def phi(t: float, x: Array = x, d: Array = d) -> Trial:
                    loss, g = evaluate(x + t * d)
                    return Trial(t, loss, float(g @ d), g)

                most = max(0, max_eval - len(points))
                found = line_search(phi, found, t, reach, method.c2, most, max(1e-9, tolerance_change))
                t = found.t
            elif not method.searches:
                here = x + t * d
                found = Trial(t, *((np.nan, np.nan, g) if iteration == max_iter else _evaluated(evaluate, here, d)))
            last = {"d": d, "t": t, "prev_flat_grad": g, "prev_loss": loss}
            method.moved(g, d, t)
            change = abs(found.loss - loss)
            x, loss, g = x + found.t * d, found.loss, found.gradient
            going = (
                going
                and len(points) < max_eval
                and bool(np.any(np.abs(g) > tolerance_grad))
                and found.t * reach > tolerance_change
                and change >= tolerance_change
            )
        counters["func_evals"] += len(points)
        counters["n_iter"] += iteration
        paths.append(Path(points, x.reshape(np.shape(p0))))
    return paths, {**counters, **({**last, **method.state()} if last else {})}


def _evaluated(evaluate: Callable[[Array], tuple[float, Array]], x: Array, d: Array) -> tuple[float, float, Array]:
    loss, g = evaluate(x)
    return loss, float(g @ d), g


def line_search(
    phi: Callable[[float], Trial],
    start: Trial,
    t: float,
    reach: float,
    c2: float,
    max_ls: int,
    min_change: float,
) -> Trial:
    """A trial that satisfies the strong Wolfe conditions, or the best one that could be had.

    ``start`` is the trial at 0, ``t`` the first step length, ``reach`` the largest element of the direction.
    """

    def decreases(trial: Trial) -> bool:
        return trial.loss <= start.loss + 1e-4 * trial.t * start.slope

    def is_flat(trial: Trial) -> bool:
        return abs(trial.slope) <= c2 * abs(start.slope)

    # Algorithm 3.5
    before, now = start, phi(t)
    for k in range(max_ls + 1):
        if k == max_ls:
            return min(start, now, key=lambda trial: trial.loss)
        if not decreases(now) or (k > 1 and now.loss >= before.loss):
            break
        if is_flat(now):
            return now
        if now.slope >= 0.0:
            break
        before, now = now, phi(_cubic_minimum(before, now, now.t + 0.01 * (now.t - before.t), 10.0 * now.t))

    # Algorithm 3.6
    ends = [before, now]  # in no order; the lower is the one that is better
    was_close = False
    for _ in range(k, max_ls):
        left, right = sorted(end.t for end in ends)
        if (right - left) * reach < min_change:
            break
        t, tenth = _cubic_minimum(*ends, left, right), 0.1 * (right - left)
        close = min(t - left, right - t) < tenth
        if close and (was_close or not left < t < right):
            t = right - tenth if right - t < t - left else left + tenth
            close = False
        was_close = close
        now = phi(t)
        low = min(ends, key=lambda end: end.loss)
        i = 0 if ends[0] is low else 1  # the place of the lower end
        if not decreases(now) or now.loss >= low.loss:
            ends[1 - i] = now
        elif is_flat(now):
            return now
        else:
            if now.slope * (ends[1 - i].t - low.t) >= 0.0:
                ends[1 - i] = low
            ends[i] = now
    return min(ends, key=lambda end: end.loss)


def _cubic_minimum(a: Trial, b: Trial, least: float, most: float) -> float:
    """Where the cubic with the losses and slopes of both trials has its minimum, within the bounds.

    With τ measured from the left trial the cubic is f + c₁ τ + c₂ τ² + c₃ τ³. Its derivative is zero at
    two places; the minimum is where the second derivative 2 c₂ + 6 c₃ τ is positive, and equals 2√D.
    """
    a, b = sorted((a, b), key=lambda trial: trial.t)
    width = b.t - a.t
    mean = (b.loss - a.loss) / width
    c1, c2, c3 = a.slope, (3 * mean - 2 * a.slope - b.slope) / width, (a.slope + b.slope - 2 * mean) / width**2
    discriminant = c2**2 - 3 * c1 * c3
    if discriminant >= 0.0:
        root = np.sqrt(discriminant)
        with np.errstate(divide="ignore", invalid="ignore"):
            # The same number twice; the second is exact where c₃ vanishes, the first where c₂ < 0.
            tau = np.divide(root - c2, 3 * c3) if c2 < 0 else np.divide(-c1, c2 + root)
        if not np.isnan(tau):
            return float(np.clip(a.t + tau, least, most))
    return 0.5 * (least + most)
