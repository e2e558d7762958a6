"""A gallery of mistakes: what people get wrong with optimizers, and what roptim says to each.

Every function below is one mistake. Its docstring says what the same lines do in many training loops; its body is run,
and the page shows it with what was raised, warned or printed, word for word.

Run ``python examples/mistakes.py``; it writes ``docs/mistakes.md``, or the file that ``--output`` names.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import inspect
import io
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

import roptim
from roptim import Parameter
from roptim.lr_scheduler import CosineAnnealingLR, OneCycleLR

PAGE = Path("docs/mistakes.md")


class Mistake(NamedTuple):
    """A heading and the function that makes the mistake."""

    heading: str
    make: Callable[[], Any]


class Part(NamedTuple):
    """Some of the mistakes under a heading of their own."""

    heading: str
    mistakes: list[Mistake]


PARTS: list[Part] = []


def part(heading: str) -> None:
    """Begins a part of the page."""
    PARTS.append(Part(heading, []))


def mistake(heading: str) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Adds a function to the part."""

    def add(make: Callable[[], Any]) -> Callable[[], Any]:
        PARTS[-1].mistakes.append(Mistake(heading, make))
        return make

    return add


def float32(*shape: int) -> np.ndarray:
    """Something to learn, or its gradient."""
    return np.ones(shape, np.float32)


part("Hyperparameters")


@mistake("A learning rate from a configuration file that is text")
def text_as_learning_rate() -> None:
    """YAML reads `1e-3` as text. It is found at the first multiplication, in the middle of a step, or not at all where
    text is converted silently."""
    config = {"lr": "1e-3"}
    roptim.AdamW([float32(3)], lr=config["lr"])


@mistake("A misspelled option in a group")
def misspelled_option() -> None:
    """Groups are dicts, and a dict takes any key: the group trains with the default, and nobody hears of it."""
    W, b = float32(4, 3), float32(3)
    roptim.AdamW([{"params": [W]}, {"params": [b], "weigth_decay": 0.0}])


@mistake("A learning rate that became NaN")
def learning_rate_of_nan() -> None:
    """NaN is neither above nor below any bound, so checks such as `lr < 0` let it pass, and every weight is NaN after
    one step."""
    opt = roptim.SGD([float32(3)], lr=0.1)
    loss = float("nan")
    opt.param_groups[0]["lr"] *= loss


@mistake("A decay rate of 1")
def decay_rate_of_one() -> None:
    """The bias correction divides by 1 - β: by zero, and only once training runs."""
    roptim.Adam([float32(3)], betas=(0.9, 1.0))


@mistake("The learning rate set as an attribute")
def rate_as_attribute() -> None:
    """Python lets an object have any attribute. Where the optimizer looks elsewhere for its rate, the assignment does
    nothing."""
    opt = roptim.SGD([float32(3)], lr=0.1)
    opt.lr = 0.01  # type: ignore[attr-defined]  # the mistake


@mistake("One bound of the gradients for each group")
def bound_in_a_group() -> None:
    """An option of the whole optimizer in a group is a key that nobody reads."""
    roptim.AdamW([{"params": [float32(3)], "clip_norm": 1.0}])


@mistake("Nesterov momentum without momentum")
def nesterov_without_momentum() -> None:
    """The formula has nothing to look ahead with, and is plain gradient descent."""
    roptim.SGD([float32(3)], lr=0.1, nesterov=True)


part("Parameters")


@mistake("Parameters of integers")
def integer_parameters() -> None:
    """`np.arange` and lists of whole numbers are integers; updates smaller than 1 are rounded away when they are
    written back, or the array is replaced by one of floats that the model does not see."""
    roptim.SGD([np.arange(3)], lr=0.1)


@mistake("A generator that was used up")
def exhausted_generator() -> None:
    """The first to go through it gets everything, the second an empty list: an optimizer that moves nothing."""
    layers = [float32(4, 3), float32(3)]
    params = (p for p in layers)
    print(sum(p.size for p in params), "weights")
    roptim.AdamW(params)


@mistake("A generator for the optimizer and for clipping")
def generator_for_clipping() -> None:
    """The norm of nothing is zero, so nothing is ever clipped."""
    params = iter([Parameter(float32(3))])
    opt = roptim.SGD(params, lr=0.1)
    opt.param_groups[0]["params"][0].grad = 1e6 * float32(3)
    roptim.clip_grad_norm_(params, 1.0)


@mistake("A set of parameters")
def set_of_parameters() -> None:
    """The order of a set changes from run to run, so a saved state comes back at other parameters: of the same shape,
    and without an error."""
    W, b = Parameter(float32(4, 3)), Parameter(float32(3))
    roptim.Adam({W, b})  # type: ignore[arg-type]  # the mistake


@mistake("The same weights twice")
def tied_weights() -> None:
    """Tied weights that are listed twice get two updates a step, with two states."""
    embedding = float32(5, 2)
    roptim.SGD({"encoder": embedding, "decoder": embedding}, lr=0.1)


@mistake("A view of another parameter")
def overlapping_views() -> None:
    """A part of a flat vector that is a parameter, too: it is moved twice, and in parallel code by two threads at
    once."""
    flat = float32(10)
    roptim.SGD([flat, flat[:4]], lr=0.1)


@mistake("A read-only array")
def read_only_array() -> None:
    """Arrays from `np.frombuffer`, memory maps and other libraries are often read-only. An update that makes a new
    array instead does not reach the model."""
    W = np.frombuffer(bytes(16), np.float32)
    roptim.SGD([W], lr=0.1)


@mistake("The model in place of its parameters")
def model_in_place_of_parameters() -> None:
    """An object that is no container fails somewhere inside, far from the line that is wrong."""
    model = SimpleNamespace(parameters=lambda: [float32(3)])
    roptim.Adam(model)


@mistake("Vectors in Muon")
def vectors_in_muon() -> None:
    """Muon is defined for matrices. Biases need another optimizer beside it, which is easy to forget."""
    roptim.Muon([float32(4, 3), float32(3)])


part("Gradients")


@mistake("A gradient of another shape")
def gradient_of_another_shape() -> None:
    """`b = b - lr * g` broadcasts: with a bias of shape (3,) a gradient of shape (3, 1) makes a matrix of it, and what
    follows broadcasts, too."""
    b = float32(3)
    opt = roptim.SGD({"b": b}, lr=0.1)
    opt.step({"b": float32(3, 1)})


@mistake("Gradients of float64 for parameters of float32")
def wide_gradient() -> None:
    """One array of float64 in the backward pass makes float64 of the gradients, and then of whatever is computed with
    them: parameters and state of twice the size, or a copy in each step."""
    W = float32(4, 3)
    opt = roptim.Adam([W])
    opt.step([np.ones((4, 3))])


@mistake("A layer without a gradient")
def layer_left_out() -> None:
    """A loop over the gradients there are skips the layer that was forgotten: it never learns."""
    opt = roptim.SGD({"W": float32(4, 3), "b": float32(3)}, lr=0.1)
    opt.step({"W": float32(4, 3)})


@mistake("A step before the backward pass")
def step_without_gradients() -> None:
    """Without gradients there is nothing to do, and the loop goes on doing it."""
    W = Parameter(float32(3))
    opt = roptim.SGD([W], lr=0.1)
    opt.step()


@mistake("The loss given to the step")
def loss_given_to_the_step() -> None:
    """Habits differ between libraries: some steps take the loss, some take gradients."""
    opt = roptim.SGD([float32(3)], lr=0.1)
    loss = 0.25
    opt.step(loss)


@mistake("A gradient that is the parameter")
def parameter_as_gradient() -> None:
    """Written in place while it is read: what comes out depends on the order of the loop."""
    W = float32(3)
    roptim.SGD([W], lr=0.1).step([W])


@mistake("NaN in a gradient")
def nan_in_a_gradient() -> None:
    """One NaN makes the parameter NaN, a step later the whole model, and moving averages keep it for good. By default
    roptim lets it pass, as the formulas do; `nonfinite="raise"` names the place, and nothing has changed
    then."""
    opt = roptim.Adam({"W": float32(4, 3)}, nonfinite="raise")
    gradient = float32(4, 3)
    gradient[2, 1] = np.nan
    opt.step({"W": gradient})


@mistake("Sparse gradients in AdamW")
def sparse_in_adamw() -> None:
    """Moments decay in every row, touched or not, so a step would have to be dense: slow if it is made so unsaid,
    wrong if the other rows are left alone."""
    table = float32(1000, 2)
    rows = roptim.SparseGrad([3, 7], float32(2, 2), table.shape)
    roptim.AdamW([table]).step([rows])


@mistake("Gradients alone for L-BFGS")
def gradients_for_lbfgs() -> None:
    """A line search needs the loss at points it chooses; with gradients alone it cannot take a step of its own."""
    W = float32(3)
    roptim.LBFGS([W]).step([float32(3)])


part("Schedules")


@mistake("The scheduler before the optimizer")
def scheduler_first() -> None:
    """The first value of the schedule is skipped, and everything after it comes one step early."""
    opt = roptim.SGD([float32(3)], lr=0.1)
    sched = CosineAnnealingLR(opt, T_max=10)
    sched.step()
    opt.step([float32(3)])


@mistake("A one-cycle schedule that is stepped too often")
def past_the_cycle() -> None:
    """`total_steps` counted in epochs and stepped in batches: the cycle is over after a fraction of the first
    epoch."""
    opt = roptim.SGD([float32(3)], lr=0.1, momentum=0.9)
    sched = OneCycleLR(opt, max_lr=0.1, total_steps=2)
    for _ in range(4):
        opt.step([float32(3)])
        sched.step()


part("Saved states")


@mistake("The state of Adam in SGD")
def adam_in_sgd() -> None:
    """Keys that are not looked for do no harm at first: training goes on without any momentum."""
    W = float32(3)
    adam = roptim.Adam([W])
    adam.step([float32(3)])
    roptim.SGD([W], momentum=0.9).load_state_dict(adam.state_dict())


@mistake("A layer that was renamed")
def renamed_layer() -> None:
    """State that is matched by position goes to whatever parameter stands there now."""
    old = roptim.Adam({"dense": float32(3)})
    old.step({"dense": float32(3)})
    roptim.Adam({"linear": float32(3)}).load_state_dict(old.state_dict())


@mistake("A layer that grew")
def grown_layer() -> None:
    """Moments of the old shape are found out at the next step, or broadcast where they happen to fit."""
    old = roptim.Adam({"W": float32(3, 1)})
    old.step({"W": float32(3, 1)})
    roptim.Adam({"W": float32(3, 4)}).load_state_dict(old.state_dict())


part("What no library can refuse")


@mistake("The array is replaced, not changed")
def rebound_array() -> None:
    """`W = W - …` makes a new array and gives it the name. The optimizer goes on with the old one, which the model no
    longer reads. No optimizer can see what a name means elsewhere; ask whether they are the same object, or
    write `W -= …` and `W[...] = …`."""
    W = float32(3)
    opt = roptim.SGD([W], lr=0.1)
    W = W - 0.5
    print("the optimizer has W:", opt.param_groups[0]["params"][0] is W)


@mistake("Weights are loaded into the dict")
def loaded_into_the_dict() -> None:
    """The same in a model that is a dict: the entry is another array afterwards. Copy into the arrays,
    `params[name][...] = loaded[name]`, or use `roptim.restore`, which does."""
    params = {"W": float32(3), "b": float32(1)}
    opt = roptim.SGD(params, lr=0.1)
    params.update({"W": np.zeros(3, np.float32)})
    (group,) = opt.param_groups
    stale = [name for name, p in zip(group["param_names"], group["params"], strict=True) if p is not params[name]]
    print("replaced since the optimizer was made:", stale)


@mistake("Two optimizers with one array")
def two_optimizers() -> None:
    """Each moves it once a step, with a state of its own. It may be meant, as for two losses in turn, so nothing is
    said; count the owners."""
    W, b = float32(4, 3), float32(3)
    optimizers = [roptim.SGD([W, b], lr=0.1), roptim.AdamW([W])]
    arrays = [p for opt in optimizers for group in opt.param_groups for p in group["params"]]
    print("optimizers of W:", sum(np.shares_memory(p, W) for p in arrays))


@mistake("Gradients are never cleared")
def gradients_not_cleared() -> None:
    """A backward pass that adds to `.grad` adds to the last batch's: the step grows from batch to batch. A step that
    is given its gradients has nothing to clear; otherwise `opt.zero_grad()`, or `opt.step(zero_grad=True)`."""
    W = Parameter(np.zeros(1, np.float32))
    opt = roptim.SGD([W], lr=1.0)
    W.grad = float32(1)
    for _ in range(3):
        opt.step()
        print("a step by", W.grad)
        W.grad += float32(1)


def source(made: Mistake) -> tuple[str, str]:
    """What the same lines do elsewhere, and the lines."""
    text = textwrap.dedent(inspect.getsource(made.make))
    (function,) = ast.parse(text).body
    assert isinstance(function, ast.FunctionDef)
    docstring, *body = function.body
    assert docstring.end_lineno is not None
    lines = text.splitlines()[docstring.end_lineno :]
    # What only a type checker reads is no part of the mistake.
    code = textwrap.dedent("\n".join(line.partition("  # type: ignore")[0] for line in lines)).strip()
    assert body
    return " ".join((ast.get_docstring(function) or "").split()), code


def said(made: Mistake) -> str:
    """What Python shows of the mistake: what was printed, the warnings, and the error."""
    shown = io.StringIO()
    with warnings.catch_warnings(record=True) as warned, contextlib.redirect_stdout(shown):
        warnings.simplefilter("always")
        try:
            made.make()
            error = None
        except roptim.RoptimError as raised:
            error = f"{type(raised).__name__}: {raised}"
    lines = [*shown.getvalue().splitlines(), *(f"{w.category.__name__}: {w.message}" for w in warned)]
    return "\n".join(lines if error is None else [*lines, error])


def page() -> str:
    """The page as Markdown."""
    count = sum(len(section.mistakes) for section in PARTS)
    blocks = [
        "# A gallery of mistakes",
        f"""<!-- Written by `python examples/mistakes.py`; a test compares. -->

{count} mistakes that are easy to make with an optimizer, what the same lines do in many training loops, and what roptim
says: each was run, and what it raised, warned or printed is shown word for word. In all of them `float32(3)` is
`numpy.ones(3, numpy.float32)`. After an error nothing has changed, neither a parameter nor any state.""",
    ]
    for section in PARTS:
        blocks.append(f"## {section.heading}")
        for made in section.mistakes:
            elsewhere, code = source(made)
            filled = textwrap.fill(elsewhere, 120, break_long_words=False, break_on_hyphens=False)
            blocks += [f"### {made.heading}", filled, f"```python\n{code}\n```", f"```text\n{said(made)}\n```"]
    return "\n\n".join(blocks) + "\n"


def main() -> None:
    """Writes the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=PAGE, help="the file that is written (%(default)s)")
    output = parser.parse_args().output
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page(), encoding="utf-8")
    print(output)


if __name__ == "__main__":
    main()
