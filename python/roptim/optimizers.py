"""The optimizers: torch's names, arguments, order and defaults."""

from __future__ import annotations

from typing import Any

from roptim._devices import Device
from roptim.optimizer import ClosureOptimizer, Optimizer

_COMMON = """
    backend : str or Device
        ``"cpu"``; ``"gpu"`` for the best GPU, ``"gpu:1"`` or ``"gpu:<part of its name>"`` or one of
        :func:`roptim.devices` for another; ``"auto"`` for the faster of both, measured once on this machine for
        steps of this size (docs/gpu.md).
    allow_software : bool
        Whether ``backend="gpu"`` may use a software adapter; ``ROPTIM_ALLOW_SOFTWARE=1`` says yes too.
    threads : int, optional
        Threads of large steps on the CPU; by default ``ROPTIM_NUM_THREADS`` or as many as the process may
        use. The result is the same to the last bit.
    flush_denormals : bool
        Store state values below the smallest normal number as zero, so that steps stay fast when moments
        decay. Parameters and gradients are never flushed.{clipping}
    foreach, fused, capturable, differentiable
        torch's choices between its kernels, accepted where they ask for nothing.

    Raises
    ------
    RoptimValueError, RoptimTypeError
        If a hyperparameter is out of its range or an array cannot be updated in place.
"""


_CLIPPING = """
    clip_norm : float, optional
        Scale all gradients, over all groups, so that their common 2-norm is at most this, >= 0; the gradients
        themselves are left alone. ``opt.gradient_norm`` is the norm before.
    clip_value : float, optional
        Bring each element of the gradients into [-clip_value, clip_value] first, >= 0.
    nonfinite : str
        Where a gradient is NaN or infinite: ``"propagate"`` uses it, ``"raise"`` raises NonfiniteError and names
        the parameter, the place in its gradient and what is there, ``"skip"`` leaves the update out and counts it in
        ``opt.skip_count``; before anything is written. Clipping, and this, act before decay and ``maximize``.
    nonfinite_sync : bool
        On a GPU the device decides, and Parameters need not wait for it: ``"raise"`` leaves the update out and
        raises at the next call that steps or asks. True waits in each step."""


def _document(cls: type[Optimizer]) -> type[Optimizer]:
    common = _COMMON.replace("{clipping}", "" if issubclass(cls, ClosureOptimizer) else _CLIPPING)
    cls.__doc__ = (cls.__doc__ or "").replace("{common}", common.strip("\n").removeprefix("    "))
    return cls


class SGD(Optimizer):
    r"""Stochastic gradient descent with momentum.

    .. math::
        b_1 = g_1, \quad b_t = \mu b_{t-1} + (1 - \tau) g_t, \quad
        \theta_t = \theta_{t-1} - lr \cdot b_t

    With ``nesterov`` the step is along :math:`g_t + \mu b_t`. State: ``momentum_buffer`` (like the
    parameter), only with momentum. Source: Sutskever, Martens, Dahl, Hinton, *On the importance of
    initialization and momentum in deep learning*, ICML 2013, in the form torch runs.

    Parameters
    ----------
    params
        Arrays or Parameters in a list, dict, nested containers, (name, array) pairs, groups, or one array.
    lr : float
        Learning rate, >= 0.
    momentum : float
        :math:`\mu`, >= 0.
    dampening : float
        :math:`\tau`; does not apply to the first gradient.
    weight_decay : float
        L2 penalty :math:`\lambda`, >= 0: :math:`g \leftarrow g + \lambda\theta`.
    nesterov : bool
        Nesterov momentum; needs momentum > 0 and dampening = 0.
    maximize : bool
        Ascend instead of descend.
    {common}
    """

    _engine_name = "SGD"

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        backend: str | Device = "cpu",
        allow_software: bool = False,
        threads: int | None = None,
        flush_denormals: bool = True,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        nonfinite: str = "propagate",
        nonfinite_sync: bool = False,
    ) -> None:
        self._construct(locals())


class Adam(Optimizer):
    r"""Adam: steps scaled by running estimates of the gradient's first two moments.

    .. math::
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t, \quad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2, \quad
        \theta_t = \theta_{t-1} - lr \cdot
        \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}

    State: ``step`` (int), ``exp_avg``, ``exp_avg_sq`` and with amsgrad ``max_exp_avg_sq`` (like the
    parameter). Source: Kingma, Ba, *Adam: a method for stochastic optimization*, ICLR 2015; amsgrad:
    Reddi, Kale, Kumar, *On the convergence of Adam and beyond*, ICLR 2018.

    Parameters
    ----------
    params
        Arrays or Parameters in a list, dict, nested containers, (name, array) pairs, groups, or one array.
    lr : float
        Learning rate, >= 0.
    betas : (float, float)
        Decay rates of the two moments, each in [0, 1).
    eps : float
        Term added to the denominator, >= 0.
    weight_decay : float
        L2 penalty :math:`\lambda`, >= 0: :math:`g \leftarrow g + \lambda\theta`.
    amsgrad : bool
        Divide by the largest second moment so far.
    maximize : bool
        Ascend instead of descend.
    decoupled_weight_decay : bool
        Decay the parameter itself, as :class:`AdamW` does.
    {common}
    """

    _engine_name = "Adam"

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        backend: str | Device = "cpu",
        allow_software: bool = False,
        threads: int | None = None,
        flush_denormals: bool = True,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        nonfinite: str = "propagate",
        nonfinite_sync: bool = False,
    ) -> None:
        self._construct(locals())


class AdamW(Adam):
    r"""Adam with decoupled weight decay.

    .. math::
        \theta_t = (1 - lr \cdot \lambda)\,\theta_{t-1} - lr \cdot
        \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}

    with the moments of :class:`Adam`. State: ``step`` (int), ``exp_avg``, ``exp_avg_sq`` and with amsgrad
    ``max_exp_avg_sq`` (like the parameter). Source: Loshchilov, Hutter, *Decoupled weight decay
    regularization*, ICLR 2019.

    Parameters
    ----------
    params
        Arrays or Parameters in a list, dict, nested containers, (name, array) pairs, groups, or one array.
    lr : float
        Learning rate, >= 0.
    betas : (float, float)
        Decay rates of the two moments, each in [0, 1).
    eps : float
        Term added to the denominator, >= 0.
    weight_decay : float
        Decay :math:`\lambda` of the parameter itself, >= 0.
    amsgrad : bool
        Divide by the largest second moment so far.
    maximize : bool
        Ascend instead of descend.
    {common}
    """

    _engine_name = "AdamW"

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        backend: str | Device = "cpu",
        allow_software: bool = False,
        threads: int | None = None,
        flush_denormals: bool = True,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        nonfinite: str = "propagate",
        nonfinite_sync: bool = False,
    ) -> None:
        self._construct(locals())


class Adadelta(Optimizer):
    r"""Adadelta: steps scaled by the ratio of running sizes of past steps and gradients.

    .. math::
        v_t = \rho v_{t-1} + (1 - \rho) g_t^2, \quad
        \delta_t = \sqrt{\frac{a_{t-1} + \epsilon}{v_t + \epsilon}}\, g_t, \quad
        a_t = \rho a_{t-1} + (1 - \rho) \delta_t^2, \quad
        \theta_t = \theta_{t-1} - lr \cdot \delta_t

    State: ``step`` (int), ``square_avg``, ``acc_delta`` (like the parameter). Source: Zeiler, *ADADELTA: an
    adaptive learning rate method*, 2012; the learning rate is torch's addition.

    Parameters
    ----------
    params
        Arrays or Parameters in a list, dict, nested containers, (name, array) pairs, groups, or one array.
    lr : float
        Factor on the step, >= 0.
    rho : float
        Decay rate of both averages, in [0, 1].
    eps : float
        Term added inside both square roots, >= 0.
    weight_decay : float
        L2 penalty :math:`\lambda`, >= 0: :math:`g \leftarrow g + \lambda\theta`.
    maximize : bool
        Ascend instead of descend.
    {common}
    """

    _engine_name = "Adadelta"

    def __init__(
        self,
        params: Any,
        lr: float = 1.0,
        rho: float = 0.9,
        eps: float = 1e-6,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        capturable: bool = False,
        maximize: bool = False,
        differentiable: bool = False,
        backend: str | Device = "cpu",
        allow_software: bool = False,
        threads: int | None = None,
        flush_denormals: bool = True,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        nonfinite: str = "propagate",
        nonfinite_sync: bool = False,
    ) -> None:
        self._construct(locals())


class Adamax(Optimizer):
    r"""Adamax: Adam with the infinity norm in place of the second moment.

    .. math::
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t, \quad u_t = \max(\beta_2 u_{t-1}, |g_t| + \epsilon), \quad
        \theta_t = \theta_{t-1} - \frac{lr}{1 - \beta_1^t} \cdot \frac{m_t}{u_t}

    State: ``step`` (int), ``exp_avg``, ``exp_inf`` (like the parameter). Source: Kingma, Ba, *Adam: a
    method for stochastic optimization*, ICLR 2015, Algorithm 2.

    Parameters
    ----------
    params
        Arrays or Parameters in a list, dict, nested containers, (name, array) pairs, groups, or one array.
    lr : float
        Learning rate, >= 0.
    betas : (float, float)
        Decay rates, each in [0, 1).
    eps : float
        Term added to the gradient's magnitude, >= 0.
    weight_decay : float
        L2 penalty :math:`\lambda`, >= 0: :math:`g \leftarrow g + \lambda\theta`.
    maximize : bool
        Ascend instead of descend.
    {common}
    """

    _engine_name = "Adamax"

    def __init__(
        self,
        params: Any,
        lr: float = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
        backend: str | Device = "cpu",
        allow_software: bool = False,
        threads: int | None = None,
        flush_denormals: bool = True,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        nonfinite: str = "propagate",
        nonfinite_sync: bool = False,
    ) -> None:
        self._construct(locals())


class RAdam(Optimizer):
    r"""RAdam: Adam that waits until the variance of its step can be trusted, and corrects for it.

    .. math::
        \rho_t = \rho_\infty - \frac{2 t \beta_2^t}{1 - \beta_2^t}, \quad \rho_\infty = \frac{2}{1 - \beta_2} - 1, \quad
        r_t = \sqrt{\frac{(\rho_t - 4)(\rho_t - 2)\rho_\infty}{(\rho_\infty - 4)(\rho_\infty - 2)\rho_t}}

    .. math::
        \theta_t = \theta_{t-1} - lr \cdot \frac{m_t}{1 - \beta_1^t} \cdot
        \frac{r_t \sqrt{1 - \beta_2^t}}{\sqrt{v_t} + \epsilon} \text{ where } \rho_t > 5, \text{ else }
        \theta_{t-1} - lr \cdot \frac{m_t}{1 - \beta_1^t}

    with the moments of :class:`Adam`.

    State: ``step`` (int), ``exp_avg``, ``exp_avg_sq`` (like the parameter). Source: Liu, Jiang, He, Chen, Liu,
    Gao, Han, *On the variance of the adaptive learning rate and beyond*, ICLR 2020.

    Parameters
    ----------
    params
        Arrays or Parameters in a list, dict, nested containers, (name, array) pairs, groups, or one array.
    lr : float
        Learning rate, >= 0.
    betas : (float, float)
        Decay rates, each in [0, 1).
    eps : float
        Term added to the denominator, >= 0.
    weight_decay : float
        L2 penalty or, decoupled, decay of the parameter itself, >= 0.
    decoupled_weight_decay : bool
        Decay the parameter itself, as :class:`AdamW` does.
    maximize : bool
        Ascend instead of descend.
    {common}
    """

    _engine_name = "RAdam"

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        backend: str | Device = "cpu",
        allow_software: bool = False,
        threads: int | None = None,
        flush_denormals: bool = True,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        nonfinite: str = "propagate",
        nonfinite_sync: bool = False,
    ) -> None:
        self._construct(locals())


class Adagrad(Optimizer):
    r"""Adagrad: steps scaled by the root of the sum of all squared gradients.

    .. math::
        s_0 = \tau, \quad s_t = s_{t-1} + g_t^2, \quad
        \theta_t = \theta_{t-1} - \frac{lr}{1 + (t - 1) \eta} \cdot \frac{g_t}{\sqrt{s_t} + \epsilon}

    State: ``step`` (int), ``sum`` (like the parameter), from the first update on. It takes a
    :class:`~roptim.SparseGrad`. Source: Duchi, Hazan, Singer, *Adaptive subgradient methods for online learning
    and stochastic optimization*, JMLR 12, 2011; the decaying rate is torch's.

    Parameters
    ----------
    params
        Arrays or Parameters in a list, dict, nested containers, (name, array) pairs, groups, or one array.
    lr : float
        Learning rate, >= 0.
    lr_decay : float
        Decay :math:`\eta` of the learning rate, >= 0.
    weight_decay : float
        L2 penalty :math:`\lambda`, >= 0: :math:`g \leftarrow g + \lambda\theta`.
    initial_accumulator_value : float
        What the sum begins with, :math:`\tau` >= 0.
    eps : float
        Term added to the denominator, >= 0.
    maximize : bool
        Ascend instead of descend.
    {common}
    """

    _engine_name = "Adagrad"

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        backend: str | Device = "cpu",
        allow_software: bool = False,
        threads: int | None = None,
        flush_denormals: bool = True,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        nonfinite: str = "propagate",
        nonfinite_sync: bool = False,
    ) -> None:
        self._construct(locals())


class ASGD(Optimizer):
    r"""Averaged stochastic gradient descent.

    .. math::
        \eta_t = \frac{lr}{(1 + \lambda\, lr\, (t - 1))^\alpha}, \quad \mu_t = \frac{1}{\max(1, t - 1 - t_0)}, \quad
        \theta_t = (1 - \lambda \eta_t) \theta_{t-1} - \eta_t g_t, \quad
        x_t = x_{t-1} + \mu_t (\theta_t - x_{t-1})

    State: ``step`` (int), ``eta`` and ``mu`` (float, of the next update), ``ax`` (the average :math:`x`, like the
    parameter): ``opt.state[p]["ax"]`` is what to evaluate with. A changed learning rate counts at once. Source:
    Polyak, Juditsky, *Acceleration of stochastic approximation by averaging*, SIAM J. Control Optim. 30, 1992.

    Parameters
    ----------
    params
        Arrays or Parameters in a list, dict, nested containers, (name, array) pairs, groups, or one array.
    lr : float
        Learning rate, >= 0.
    lambd : float
        Decay :math:`\lambda`, finite.
    alpha : float
        Power :math:`\alpha` of the decaying rate, finite.
    t0 : float
        Update :math:`t_0` after which the average begins, >= 0; may be infinite.
    weight_decay : float
        L2 penalty :math:`\lambda`, >= 0: :math:`g \leftarrow g + \lambda\theta`.
    maximize : bool
        Ascend instead of descend.
    {common}
    """

    _engine_name = "ASGD"

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        lambd: float = 1e-4,
        alpha: float = 0.75,
        t0: float = 1e6,
        weight_decay: float = 0,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
        *,
        backend: str | Device = "cpu",
        allow_software: bool = False,
        threads: int | None = None,
        flush_denormals: bool = True,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        nonfinite: str = "propagate",
        nonfinite_sync: bool = False,
    ) -> None:
        self._construct(locals())


class NAdam(Optimizer):
    r"""NAdam: Adam with Nesterov momentum.

    .. math::
        \mu_t = \beta_1 (1 - \tfrac12\, 0.96^{t \psi}), \quad P_t = \mu_1 \cdots \mu_t, \quad
        a_t = \sqrt{v_t / (1 - \beta_2^t)} + \epsilon

    .. math::
        \theta_t = \theta_{t-1} - lr \frac{1 - \mu_t}{1 - P_t} \cdot \frac{g_t}{a_t}
        - lr \frac{\mu_{t+1}}{1 - P_t \mu_{t+1}} \cdot \frac{m_t}{a_t}

    with the moments of :class:`Adam`. State: ``step`` (int), ``mu_product`` (float), ``exp_avg``, ``exp_avg_sq``
    (like the parameter). Source: Dozat, *Incorporating Nesterov momentum into Adam*, ICLR 2016 workshop.

    Parameters
    ----------
    params
        Arrays or Parameters in a list, dict, nested containers, (name, array) pairs, groups, or one array.
    lr : float
        Learning rate, >= 0.
    betas : (float, float)
        Decay rates of the two moments, each in [0, 1).
    eps : float
        Term added to the denominator, >= 0.
    weight_decay : float
        L2 penalty or, decoupled, decay of the parameter itself, >= 0.
    momentum_decay : float
        How fast the momentum grows to :math:`\beta_1`, :math:`\psi` >= 0.
    decoupled_weight_decay : bool
        Decay the parameter itself, as :class:`AdamW` does.
    maximize : bool
        Ascend instead of descend.
    {common}
    """

    _engine_name = "NAdam"

    def __init__(
        self,
        params: Any,
        lr: float = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum_decay: float = 4e-3,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        backend: str | Device = "cpu",
        allow_software: bool = False,
        threads: int | None = None,
        flush_denormals: bool = True,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        nonfinite: str = "propagate",
        nonfinite_sync: bool = False,
    ) -> None:
        self._construct(locals())


class RMSprop(Optimizer):
    r"""RMSprop: steps scaled by a running root mean square of the gradients.

    .. math::
        v_t = \alpha v_{t-1} + (1 - \alpha) g_t^2, \quad a_t = \sqrt{v_t} + \epsilon, \quad
        b_t = \mu b_{t-1} + g_t / a_t, \quad \theta_t = \theta_{t-1} - lr \cdot b_t

    With ``centered`` :math:`a_t = \sqrt{v_t - \bar g_t^2} + \epsilon` with the running average :math:`\bar g` of
    gradients. State: ``step`` (int), ``square_avg``, with momentum ``momentum_buffer``, if centered ``grad_avg``
    (like the parameter). Source: Tieleman, Hinton, *Lecture 6.5: rmsprop*, 2012; centered: Graves, *Generating
    sequences with recurrent neural networks*, 2013.

    Parameters
    ----------
    params
        Arrays or Parameters in a list, dict, nested containers, (name, array) pairs, groups, or one array.
    lr : float
        Learning rate, >= 0.
    alpha : float
        Decay rate :math:`\alpha` of the averages, >= 0.
    eps : float
        Term added to the denominator, >= 0.
    weight_decay : float
        L2 penalty :math:`\lambda`, >= 0: :math:`g \leftarrow g + \lambda\theta`.
    momentum : float
        :math:`\mu`, >= 0.
    centered : bool
        Divide by the standard deviation of the gradient.
    maximize : bool
        Ascend instead of descend.
    {common}
    """

    _engine_name = "RMSprop"

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        *,
        backend: str | Device = "cpu",
        allow_software: bool = False,
        threads: int | None = None,
        flush_denormals: bool = True,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        nonfinite: str = "propagate",
        nonfinite_sync: bool = False,
    ) -> None:
        self._construct(locals())


class Rprop(Optimizer):
    r"""Rprop: steps whose size depends on the signs of the gradient alone.

    .. math::
        \Delta_t = \mathrm{clamp}(\Delta_{t-1} f_t), \quad
        \theta_t = \theta_{t-1} - \mathrm{sign}(g_t) \Delta_t

    :math:`f_t` is :math:`\eta^+` where the gradient kept its sign, :math:`\eta^-` where it turned (there the
    gradient then counts as zero), else 1. For full batches. State: ``step`` (int), ``prev``, ``step_size`` (like
    the parameter). Source: Riedmiller, Braun, *A direct adaptive method for faster backpropagation learning: the
    RPROP algorithm*, ICNN 1993, without weight-backtracking.

    Parameters
    ----------
    params
        Arrays or Parameters in a list, dict, nested containers, (name, array) pairs, groups, or one array.
    lr : float
        What the step sizes begin with, :math:`\Delta_0` >= 0. Changing it later changes only parameters
        without state.
    etas : (float, float)
        Factors :math:`0 < \eta^- < 1 < \eta^+`.
    step_sizes : (float, float)
        Smallest and largest step size.
    maximize : bool
        Ascend instead of descend.
    {common}
    """

    _engine_name = "Rprop"

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        etas: tuple[float, float] = (0.5, 1.2),
        step_sizes: tuple[float, float] = (1e-6, 50),
        *,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        backend: str | Device = "cpu",
        allow_software: bool = False,
        threads: int | None = None,
        flush_denormals: bool = True,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        nonfinite: str = "propagate",
        nonfinite_sync: bool = False,
    ) -> None:
        self._construct(locals())


class SparseAdam(Optimizer):
    r"""Adam for gradients that touch some rows only: the moments of the other rows rest.

    .. math::
        m_t = m_{t-1} + (1 - \beta_1)(g_t - m_{t-1}), \quad v_t = v_{t-1} + (1 - \beta_2)(g_t^2 - v_{t-1}), \quad
        \theta_t = \theta_{t-1} - lr \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t} \cdot \frac{m_t}{\sqrt{v_t} + \epsilon}

    in the rows of a :class:`~roptim.SparseGrad` or a scipy.sparse array; every update of the parameter counts in
    :math:`t`. Dense gradients are refused. On the CPU only. State: ``step`` (int), ``exp_avg``, ``exp_avg_sq``
    (dense, like the parameter). Source: Kingma, Ba, *Adam: a method for stochastic optimization*, ICLR 2015, in
    the lazy form torch runs.

    Parameters
    ----------
    params
        Arrays or Parameters in a list, dict, nested containers, (name, array) pairs, groups, or one array.
    lr : float
        Learning rate, >= 0.
    betas : (float, float)
        Decay rates of the two moments, each in [0, 1).
    eps : float
        Term added to the root of the uncorrected second moment, > 0.
    maximize : bool
        Ascend instead of descend.
    {common}
    """

    _engine_name = "SparseAdam"

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        maximize: bool = False,
        *,
        backend: str | Device = "cpu",
        allow_software: bool = False,
        threads: int | None = None,
        flush_denormals: bool = True,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        nonfinite: str = "propagate",
        nonfinite_sync: bool = False,
    ) -> None:
        self._construct(locals())


class Adafactor(Optimizer):
    r"""Adafactor: second moments from their row and column means; little state.

    .. math::
        \rho_t = \min(lr, 1/\sqrt t), \quad \alpha_t = \max(\epsilon_2, \mathrm{RMS}(\theta_{t-1}))\, \rho_t, \quad
        U_t = g_t / \sqrt{\max(\hat V_t, \epsilon_1^2)}, \quad
        \theta_t = (1 - lr \lambda) \theta_{t-1} - \alpha_t \frac{U_t}{\max(1, \mathrm{RMS}(U_t)/d)}

    :math:`\hat V` is the product of the averaged row and column means of :math:`g^2` over the last two axes, the
    averaged :math:`g^2` itself where there are fewer; the averages decay with :math:`1 - t^c`. On the CPU only, real
    numbers only. State: ``step`` (int), ``row_var`` and ``col_var`` (the parameter's shape with its last, its last
    but one axis of length 1) or ``variance``. Source: Shazeer, Stern, *Adafactor: adaptive learning rates with
    sublinear memory cost*, ICML 2018.

    Parameters
    ----------
    params
        Arrays or Parameters in a list, dict, nested containers, (name, array) pairs, groups, or one array.
    lr : float
        Learning rate, >= 0.
    beta2_decay : float
        Power :math:`c` <= 0.
    eps : (float or None, float)
        :math:`\epsilon_1, \epsilon_2` >= 0; None is the machine epsilon of the parameter.
    d : float
        Clipping threshold :math:`d` >= 1.
    weight_decay : float
        Decay :math:`\lambda` of the parameter itself, >= 0; with the unadjusted learning rate.
    maximize : bool
        Ascend instead of descend.
    {common}
    """

    _engine_name = "Adafactor"

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 1e-3),
        d: float = 1.0,
        weight_decay: float = 0.0,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        backend: str | Device = "cpu",
        allow_software: bool = False,
        threads: int | None = None,
        flush_denormals: bool = True,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        nonfinite: str = "propagate",
        nonfinite_sync: bool = False,
    ) -> None:
        self._construct(locals())


class Muon(Optimizer):
    r"""Muon: momentum whose direction is made nearly orthogonal. Matrices only.

    .. math::
        B_t = B_{t-1} + (1 - \mu)(G_t - B_{t-1}), \quad
        \theta_t = (1 - lr \lambda) \theta_{t-1} - lr \cdot s \cdot \mathrm{NewtonSchulz}(U_t)

    with :math:`U_t = G_t + \mu (B_t - G_t)` (nesterov) or :math:`B_t`, and :math:`s = \sqrt{\max(1, rows/columns)}`,
    or :math:`0.2 \sqrt{\max(rows, columns)}` with ``adjust_lr_fn="match_rms_adamw"``. Give it the hidden layers'
    matrices and the rest of the model to :class:`AdamW`::

        muon, rest = roptim.Muon([W1, W2], lr=0.02), roptim.AdamW([b1, b2, embedding])

    On the CPU only, real numbers only. The iteration runs in float32, or float64 for such parameters (torch's
    in bfloat16). State: ``momentum_buffer`` (like the parameter).
    Source: Jordan et al., *Muon: an optimizer for hidden layers in neural networks*, 2024;
    ``match_rms_adamw``: Liu et al., *Muon is scalable for LLM training*, 2025.

    Parameters
    ----------
    params
        Arrays or Parameters in a list, dict, nested containers, (name, array) pairs, groups, or one array.
    lr : float
        Learning rate, >= 0.
    weight_decay : float
        Decay :math:`\lambda` of the parameter itself, >= 0; with the unadjusted learning rate.
    momentum : float
        :math:`\mu`, >= 0.
    nesterov : bool
        Look ahead along the momentum.
    ns_coefficients : (float, float, float)
        Coefficients of the iteration.
    eps : float
        Lower bound of the norm that the matrix is divided by, >= 0.
    ns_steps : int
        How often the iteration runs, 0 to 99.
    adjust_lr_fn : str, optional
        ``"original"`` (also None) or ``"match_rms_adamw"``.
    {common}
    """

    _engine_name = "Muon"

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        backend: str | Device = "cpu",
        allow_software: bool = False,
        threads: int | None = None,
        flush_denormals: bool = True,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        nonfinite: str = "propagate",
        nonfinite_sync: bool = False,
    ) -> None:
        self._construct(locals())


class LBFGS(ClosureOptimizer):
    r"""L-BFGS: steps along directions from the last differences of points and gradients.

    .. math::
        \theta_k = \theta_{k-1} + t_k d_k, \quad d_k = -H_k g_k, \quad
        H_k \approx (\nabla^2 f)^{-1} \text{ from } s_i = \theta_{i+1} - \theta_i, \; y_i = g_{i+1} - g_i

    ``step(closure)`` evaluates the loss several times::

        def closure():
            opt.zero_grad()
            loss, W.grad, b.grad = loss_and_gradients(W, b)
            return loss

        loss = opt.step(closure)

    With plain arrays the closure returns ``(loss, gradients)``. All parameters are one vector: the hyperparameters
    must be the same in every group, and the vector's precision is float64 if one of the parameters' is, else float32.
    A parameter without a gradient is left alone for the step; if it moved before, the memory is emptied.
    With ``line_search_fn`` None the steps have length ``lr`` and the loss may grow; with ``"strong_wolfe"`` the first
    trial is ``lr`` and the loss never grows. A trial that is not finite is taken back. On a GPU the vectors of the
    method live on the device, of float32; the parameters stay with the host, whose closure reads them.

    State, one for all at the first parameter, read-only: ``func_evals``, ``n_iter`` (int), ``d`` (direction), ``t``
    (step length), ``old_dirs`` (:math:`y_i`), ``old_stps`` (:math:`s_i`), ``ro`` (:math:`1/(y_i \cdot s_i)`),
    ``H_diag``, ``al``, ``prev_flat_grad``, ``prev_loss``; the vectors are flat. Adding a group empties it but for the
    two counts. Source: Liu, Nocedal, *On the limited memory BFGS method for large scale optimization*, Math.
    Programming 45, 1989; line search: Nocedal, Wright, *Numerical optimization*, 2nd ed., Algorithms 3.5 and 3.6.

    Parameters
    ----------
    params
        Arrays or Parameters in a list, dict, nested containers, (name, array) pairs, groups, or one array.
    lr : float
        Step length, or the first one tried, >= 0.
    max_iter : int
        Iterations in one step, >= 1.
    max_eval : int, optional
        Evaluations after which no further iteration begins; by default ``max_iter * 5 // 4``. A line search may
        make one more.
    tolerance_grad : float
        The step ends where no element of the gradient is larger, >= 0.
    tolerance_change : float
        The step ends where the loss and no element change by more, >= 0.
    history_size : int
        Pairs of differences to remember, >= 1: each is as large as two times the parameters.
    line_search_fn : str, optional
        ``"strong_wolfe"``.
    {common}
    """

    _engine_name = "LBFGS"

    def __init__(
        self,
        params: Any,
        lr: float = 1,
        max_iter: int = 20,
        max_eval: int | None = None,
        tolerance_grad: float = 1e-7,
        tolerance_change: float = 1e-9,
        history_size: int = 100,
        line_search_fn: str | None = None,
        *,
        backend: str | Device = "cpu",
        allow_software: bool = False,
        threads: int | None = None,
        flush_denormals: bool = True,
    ) -> None:
        self._construct(locals())


class ConjugateGradient(ClosureOptimizer):
    r"""Nonlinear conjugate gradients, Polak–Ribière+, with a strong Wolfe line search.

    .. math::
        \theta_k = \theta_{k-1} + t_k d_k, \quad d_k = -g_k + \beta_k d_{k-1}, \quad
        \beta_k = \max\left(0, \frac{g_k \cdot (g_k - g_{k-1})}{g_{k-1} \cdot g_{k-1}}\right)

    ``step(closure)`` and everything about it is as for :class:`LBFGS`; the memory is two vectors instead of two for
    each pair. It starts again from :math:`d = -g` after ``restart`` iterations, where successive gradients are far
    from orthogonal, and where :math:`d` does not go downhill.

    State, one for all at the first parameter, read-only: ``func_evals``, ``n_iter``, ``since_restart`` (int), ``d``
    (direction), ``t`` (step length), ``prev_flat_grad``, ``prev_loss``; the vectors are flat. Source: Polak, Ribière,
    *Note sur la convergence de méthodes de directions conjuguées*, RIRO 16, 1969; Nocedal, Wright, *Numerical
    optimization*, 2nd ed., Algorithm 5.4 with (5.44) and (5.45).

    Parameters
    ----------
    params
        Arrays or Parameters in a list, dict, nested containers, (name, array) pairs, groups, or one array.
    lr : float
        Scale of the first step of all and of one after a search that found nothing, >= 0; others are guessed from
        the step before.
    max_iter : int
        Iterations in one step, >= 1.
    max_eval : int, optional
        Evaluations after which no further iteration begins; by default ``max_iter * 5 // 4``. A line search may
        make one more.
    tolerance_grad : float
        The step ends where no element of the gradient is larger, >= 0.
    tolerance_change : float
        The step ends where the loss and no element change by more, >= 0.
    restart : int, optional
        Iterations from one steepest descent to the next, >= 1; by default the number of elements.
    {common}
    """

    _engine_name = "ConjugateGradient"

    def __init__(
        self,
        params: Any,
        lr: float = 1,
        max_iter: int = 20,
        max_eval: int | None = None,
        tolerance_grad: float = 1e-7,
        tolerance_change: float = 1e-9,
        restart: int | None = None,
        *,
        backend: str | Device = "cpu",
        allow_software: bool = False,
        threads: int | None = None,
        flush_denormals: bool = True,
    ) -> None:
        self._construct(locals())


for _cls in (
    SGD,
    Adam,
    AdamW,
    Adadelta,
    Adagrad,
    Adamax,
    ASGD,
    NAdam,
    RAdam,
    RMSprop,
    Rprop,
    SparseAdam,
    Adafactor,
    Muon,
    LBFGS,
    ConjugateGradient,
):
    _document(_cls)
