"""The optimizers as people write them in NumPy: in place where that is natural, with temporaries elsewhere.

Each function takes the parameters, which are updated in place, and returns the step. They share nothing on purpose:
that is how such loops stand in the programs that have them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

Arrays = list[np.ndarray]
Step = Callable[[Any], None]


def sgd(params: Arrays, lr: float = 1e-3) -> Step:
    """Plain gradient descent."""

    def step(gradients: Arrays) -> None:
        for p, g in zip(params, gradients, strict=True):
            p -= lr * g

    return step


def sgd_momentum(params: Arrays, lr: float = 1e-3, momentum: float = 0.9) -> Step:
    """Gradient descent with momentum."""
    velocity = [np.zeros_like(p) for p in params]

    def step(gradients: Arrays) -> None:
        for p, g, v in zip(params, gradients, velocity, strict=True):
            v *= momentum
            v += g
            p -= lr * v

    return step


def adam(params: Arrays, lr: float = 1e-3, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8) -> Step:
    """Adam."""
    ms, vs, t = [np.zeros_like(p) for p in params], [np.zeros_like(p) for p in params], 0

    def step(gradients: Arrays) -> None:
        nonlocal t
        t += 1
        for p, g, m, v in zip(params, gradients, ms, vs, strict=True):
            m *= beta1
            m += (1 - beta1) * g
            v *= beta2
            v += (1 - beta2) * g * g
            m_hat = m / (1 - beta1**t)
            v_hat = v / (1 - beta2**t)
            p -= lr * m_hat / (np.sqrt(v_hat) + eps)

    return step


def adamw(
    params: Arrays,
    lr: float = 1e-3,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
) -> Step:
    """Adam with decoupled weight decay."""
    ms, vs, t = [np.zeros_like(p) for p in params], [np.zeros_like(p) for p in params], 0

    def step(gradients: Arrays) -> None:
        nonlocal t
        t += 1
        for p, g, m, v in zip(params, gradients, ms, vs, strict=True):
            p *= 1 - lr * weight_decay
            m *= beta1
            m += (1 - beta1) * g
            v *= beta2
            v += (1 - beta2) * g * g
            m_hat = m / (1 - beta1**t)
            v_hat = v / (1 - beta2**t)
            p -= lr * m_hat / (np.sqrt(v_hat) + eps)

    return step


def adadelta(params: Arrays, lr: float = 1.0, rho: float = 0.9, eps: float = 1e-6) -> Step:
    """Adadelta."""
    squares, moves = [np.zeros_like(p) for p in params], [np.zeros_like(p) for p in params]

    def step(gradients: Arrays) -> None:
        for p, g, v, a in zip(params, gradients, squares, moves, strict=True):
            v *= rho
            v += (1 - rho) * g * g
            move = np.sqrt(a + eps) / np.sqrt(v + eps) * g
            a *= rho
            a += (1 - rho) * move * move
            p -= lr * move

    return step


def adagrad(params: Arrays, lr: float = 1e-2, eps: float = 1e-10) -> Step:
    """Adagrad."""
    sums = [np.zeros_like(p) for p in params]

    def step(gradients: Arrays) -> None:
        for p, g, s in zip(params, gradients, sums, strict=True):
            s += g * g
            p -= lr * g / (np.sqrt(s) + eps)

    return step


def adamax(params: Arrays, lr: float = 2e-3, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8) -> Step:
    """Adamax."""
    ms, us, t = [np.zeros_like(p) for p in params], [np.zeros_like(p) for p in params], 0

    def step(gradients: Arrays) -> None:
        nonlocal t
        t += 1
        for p, g, m, u in zip(params, gradients, ms, us, strict=True):
            m *= beta1
            m += (1 - beta1) * g
            np.maximum(beta2 * u, np.abs(g) + eps, out=u)
            p -= lr / (1 - beta1**t) * m / u

    return step


def asgd(params: Arrays, lr: float = 1e-2, lambd: float = 1e-4, alpha: float = 0.75, t0: float = 1e6) -> Step:
    """Averaged gradient descent."""
    averages, t, eta, mu = [np.zeros_like(p) for p in params], 0, lr, 1.0

    def step(gradients: Arrays) -> None:
        nonlocal t, eta, mu
        t += 1
        for p, g, ax in zip(params, gradients, averages, strict=True):
            p *= 1 - lambd * eta
            p -= eta * g
            if mu == 1:
                ax[...] = p
            else:
                ax += mu * (p - ax)
        eta, mu = lr / (1 + lambd * lr * t) ** alpha, 1 / max(1, t - t0)

    return step


def nadam(
    params: Arrays, lr: float = 2e-3, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8, psi: float = 4e-3
) -> Step:
    """Adam with Nesterov momentum."""
    ms, vs, t, product = [np.zeros_like(p) for p in params], [np.zeros_like(p) for p in params], 0, 1.0

    def step(gradients: Arrays) -> None:
        nonlocal t, product
        t += 1
        mu = beta1 * (1 - 0.5 * 0.96 ** (t * psi))
        mu_next = beta1 * (1 - 0.5 * 0.96 ** ((t + 1) * psi))
        product *= mu
        for p, g, m, v in zip(params, gradients, ms, vs, strict=True):
            m *= beta1
            m += (1 - beta1) * g
            v *= beta2
            v += (1 - beta2) * g * g
            m_hat = mu_next / (1 - product * mu_next) * m + (1 - mu) / (1 - product) * g
            p -= lr * m_hat / (np.sqrt(v / (1 - beta2**t)) + eps)

    return step


def radam(params: Arrays, lr: float = 1e-3, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8) -> Step:
    """Rectified Adam."""
    ms, vs, t, rho_end = [np.zeros_like(p) for p in params], [np.zeros_like(p) for p in params], 0, 2 / (1 - beta2) - 1

    def step(gradients: Arrays) -> None:
        nonlocal t
        t += 1
        rho = rho_end - 2 * t * beta2**t / (1 - beta2**t)
        for p, g, m, v in zip(params, gradients, ms, vs, strict=True):
            m *= beta1
            m += (1 - beta1) * g
            v *= beta2
            v += (1 - beta2) * g * g
            move = lr * m / (1 - beta1**t)
            if rho > 5:
                r = math.sqrt((rho - 4) * (rho - 2) * rho_end / ((rho_end - 4) * (rho_end - 2) * rho))
                move *= r * math.sqrt(1 - beta2**t) / (np.sqrt(v) + eps)
            p -= move

    return step


def rmsprop(params: Arrays, lr: float = 1e-2, alpha: float = 0.99, eps: float = 1e-8) -> Step:
    """RMSprop."""
    squares = [np.zeros_like(p) for p in params]

    def step(gradients: Arrays) -> None:
        for p, g, v in zip(params, gradients, squares, strict=True):
            v *= alpha
            v += (1 - alpha) * g * g
            p -= lr * g / (np.sqrt(v) + eps)

    return step


def rprop(
    params: Arrays, lr: float = 1e-2, down: float = 0.5, up: float = 1.2, least: float = 1e-6, most: float = 50
) -> Step:
    """Resilient propagation."""
    before, sizes = [np.zeros_like(p) for p in params], [np.full_like(p, lr) for p in params]

    def step(gradients: Arrays) -> None:
        for p, g, prev, size in zip(params, gradients, before, sizes, strict=True):
            agreement = g * prev
            np.multiply(size, up, out=size, where=agreement > 0)
            np.multiply(size, down, out=size, where=agreement < 0)
            np.clip(size, least, most, out=size)
            prev[...] = np.where(agreement < 0, 0, g)
            p -= np.sign(prev) * size

    return step


def sparse_adam(params: Arrays, lr: float = 1e-3, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8) -> Step:
    """Adam on the rows that (rows, values) name; each row once."""
    (p,), t = params, 0
    m, v = np.zeros_like(p), np.zeros_like(p)

    def step(gradient: tuple[np.ndarray, np.ndarray]) -> None:
        nonlocal t
        t += 1
        rows, g = gradient
        m[rows] = new_m = beta1 * m[rows] + (1 - beta1) * g
        v[rows] = new_v = beta2 * v[rows] + (1 - beta2) * g * g
        p[rows] -= lr * math.sqrt(1 - beta2**t) / (1 - beta1**t) * new_m / (np.sqrt(new_v) + eps)

    return step


def adafactor(params: Arrays, lr: float = 1e-2, decay: float = -0.8, eps: float = 1e-3, d: float = 1.0) -> Step:
    """Adafactor on matrices."""
    rows, cols, t = [np.zeros_like(p[:, :1]) for p in params], [np.zeros_like(p[:1]) for p in params], 0

    def step(gradients: Arrays) -> None:
        nonlocal t
        t += 1
        w = t**decay
        for p, g, row, col in zip(params, gradients, rows, cols, strict=True):
            alpha = max(eps, float(np.linalg.norm(p)) / math.sqrt(p.size)) * min(lr, 1 / math.sqrt(t))
            square = g * g
            row += w * (square.mean(axis=1, keepdims=True) - row)
            col += w * (square.mean(axis=0, keepdims=True) - col)
            v = row @ col / max(float(row.mean()), float(np.finfo(p.dtype).eps))
            u = g / np.sqrt(np.maximum(v, np.finfo(p.dtype).eps ** 2))
            p -= alpha / max(1, float(np.linalg.norm(u)) / (math.sqrt(u.size) * d)) * u

    return step


def muon(params: Arrays, lr: float = 1e-3, decay: float = 0.1, momentum: float = 0.95, eps: float = 1e-7) -> Step:
    """Muon on matrices, with Newton-Schulz iterations in the parameters' own precision."""
    buffers = [np.zeros_like(p) for p in params]
    a, b, c = 3.4445, -4.7750, 2.0315

    def step(gradients: Arrays) -> None:
        for p, g, buffer in zip(params, gradients, buffers, strict=True):
            buffer += (1 - momentum) * (g - buffer)
            u = g + momentum * (buffer - g)
            x = u.T if u.shape[0] > u.shape[1] else u
            x = x / max(float(np.linalg.norm(x)), eps)
            for _ in range(5):
                square = x @ x.T
                x = a * x + (b * square + c * square @ square) @ x
            p *= 1 - lr * decay
            p -= lr * math.sqrt(max(1, p.shape[0] / p.shape[1])) * (x.T if u.shape[0] > u.shape[1] else x)

    return step


def clipped(step: Step, max_norm: float) -> Step:
    """The step with gradients scaled to a common norm first; they themselves are left alone."""

    def clipped_step(gradients: Arrays) -> None:
        norm = math.sqrt(sum(float(np.vdot(g, g)) for g in gradients))
        scale = min(1.0, max_norm / (norm + 1e-6))
        step([scale * g for g in gradients])

    return clipped_step
