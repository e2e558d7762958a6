"""The optimizers: torch's names, arguments, order and defaults."""

from __future__ import annotations

from typing import Any

from roptim.optimizer import Optimizer

_COMMON = """
    backend : str
        ``"cpu"``, or ``"gpu"`` for the best GPU (``"gpu:1"`` or ``"gpu:<part of its name>"`` for another).
    allow_software : bool
        Whether ``backend="gpu"`` may use a software adapter.
    threads : int, optional
        Threads of large steps on the CPU; by default ``ROPTIM_NUM_THREADS`` or as many as the process may
        use. The result is the same to the last bit.
    flush_denormals : bool
        Store state values below the smallest normal number as zero, so that steps stay fast when moments
        decay. Parameters and gradients are never flushed.
    foreach, fused, capturable, differentiable
        torch's choices between its kernels, accepted where they ask for nothing.

    Raises
    ------
    RoptimValueError, RoptimTypeError
        If a hyperparameter is out of its range or an array cannot be updated in place.
"""


def _document(cls: type[Optimizer]) -> type[Optimizer]:
    cls.__doc__ = (cls.__doc__ or "").replace("{common}", _COMMON.strip("\n").removeprefix("    "))
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
        backend: str = "cpu",
        allow_software: bool = False,
        threads: int | None = None,
        flush_denormals: bool = True,
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
        backend: str = "cpu",
        allow_software: bool = False,
        threads: int | None = None,
        flush_denormals: bool = True,
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
        backend: str = "cpu",
        allow_software: bool = False,
        threads: int | None = None,
        flush_denormals: bool = True,
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
        backend: str = "cpu",
        allow_software: bool = False,
        threads: int | None = None,
        flush_denormals: bool = True,
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
        backend: str = "cpu",
        allow_software: bool = False,
        threads: int | None = None,
        flush_denormals: bool = True,
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
        backend: str = "cpu",
        allow_software: bool = False,
        threads: int | None = None,
        flush_denormals: bool = True,
    ) -> None:
        self._construct(locals())


for _cls in (SGD, Adam, AdamW, Adadelta, Adamax, RAdam):
    _document(_cls)
