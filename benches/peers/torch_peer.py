"""torch.optim, in each mode that an optimizer has."""

from __future__ import annotations

import functools
import inspect
import platform
from collections.abc import Callable, Sequence
from typing import Any

from peers.cases import CASES, OPTIMIZERS, fill_parameters, gradients_for, touched_rows
from peers.side import Side

MODES = ("default", "foreach", "fused")


class TorchSide(Side):
    """One optimizer per mode, over the same parameters and, after their first steps, the same state: three sets of
    arrays would not fit beside each other in the large cases."""

    def start(self, threads: int) -> dict[str, str]:
        """Imports torch."""
        import torch

        super().start(threads)
        torch.set_num_threads(threads)
        return {"torch": torch.__version__, "python of torch": platform.python_version()}

    def setup(self, case: str, optimizer: str) -> list[str]:
        """See Side."""
        import torch

        self._case, self._contest = case, OPTIMIZERS[optimizer]
        dtype = self._contest.dtype
        empty = [torch.empty(shape, dtype=getattr(torch, dtype)) for shape in CASES[case].shapes]
        self._params = [torch.nn.Parameter(p) for p in empty]
        self._gradients = [torch.from_numpy(g).clone() for g in gradients_for(case, dtype)]
        gradients_for.cache_clear()
        self._opts: dict[str, Any] = {}
        self._state: Any = None
        signature = inspect.signature(getattr(torch.optim, self._contest.name)).parameters
        return [mode for mode in MODES if mode == "default" or mode in signature]

    def make(self, mode: str) -> tuple[Callable[[], object], Callable[[], Sequence[Any]]]:
        """See Side."""
        import torch

        case, contest, params = CASES[self._case], self._contest, self._params
        fill_parameters([p.detach().numpy() for p in params])
        if case.rows is None:
            for p, g in zip(params, self._gradients, strict=True):
                p.grad = g
        switch = {} if mode == "default" else {mode: True}
        make = functools.partial(getattr(torch.optim, contest.name), **contest.hypers, **switch)
        if case.own_groups:
            # As make([{"params": [p]} for p in params]) has it; that checks each group against all others, which
            # takes seconds.
            opt = make(params[:1])
            opt.param_groups = [{**opt.param_groups[0], "params": [p]} for p in params]
        else:
            opt = make(params)
        self._opts[mode] = opt
        return self._step(opt), lambda: [p.detach() for p in params]

    def _step(self, opt: Any) -> Callable[[], object]:
        import torch

        params, case, max_norm = self._params, CASES[self._case], self._contest.clip_norm
        if max_norm is not None:

            def clipped() -> None:
                torch.nn.utils.clip_grad_norm_(params, max_norm)
                opt.step()

            return clipped
        if case.rows is not None:
            (p,), (values,) = params, self._gradients
            rows = torch.from_numpy(touched_rows(case))[None]

            def sparse() -> None:
                p.grad = torch.sparse_coo_tensor(rows, values, p.shape, check_invariants=False)
                opt.step()

            return sparse
        return opt.step

    def settle(self, mode: str) -> None:
        """Lets the mode go on with the state of the first."""
        if self._state is None:
            self._state = self._opts[mode].state
        else:
            self._opts[mode].state = self._state

    def setup_numbers(
        self, mode: str, optimizer: str, hypers: dict[str, Any], size: int, gradient: float, steps: int
    ) -> None:
        """One parameter that takes some steps and is left with a gradient of zeros: for denormals.py."""
        import torch

        p = torch.nn.Parameter(torch.ones(size))
        opt = getattr(torch.optim, optimizer)([p], **hypers)
        p.grad = torch.full_like(p, gradient)
        for _ in range(steps):
            opt.step()
        p.grad.zero_()
        self._steps[mode] = opt.step

    def free(self) -> None:
        """See Side."""
        self._params, self._gradients, self._opts, self._state = [], [], {}, None
        super().free()
