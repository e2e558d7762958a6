"""One cycle of the learning rate, on the digits and the network of digits.py.

What you can learn here, top to bottom:

- the range test: ``LRFinder`` tries a hundred learning rates in a hundred steps, suggests one, and puts the model
  back as it was;
- schedules as values: ``lr=one_cycle(...)`` goes from a twenty-fifth of that rate up to it and then down to almost
  nothing, and a second schedule moves the momentum the other way. There is nothing to step and nothing to save;
- stochastic weight averaging: ``AveragedModel`` holds the mean of the parameters over the last quarter of the epochs.

The same is trained at constant rates, the suggested one and a third of it, and everything with several seeds, because
the differences are a few images and one run could show anything. What to expect: at a constant rate the parameters
keep jumping around a good place, and both coming down with the rate and averaging help against that. Whoever does one
of them gains little by doing the other, too.

Run ``python examples/one_cycle.py``, or with ``--help`` for its options; it takes some seconds.

Exit code: 0 if, in the mean over the seeds, the cycle ends on a lower test loss than both constant rates, and
the average of the run at the suggested rate has a lower one than its last epoch; else 1.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from digits import Digits, Model, backward, batches, cross_entropy, evaluate, forward, load_data, new_model
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, PercentFormatter

import roptim
from roptim.lr_finder import LRFinder
from roptim.schedules import Schedule, one_cycle
from roptim.swa_utils import AveragedModel

MOMENTUM, LOW_MOMENTUM = 0.95, 0.85  # at the ends of the cycle, and where the learning rate is at its peak
CONSTANT_MOMENTUM = 0.9
WEIGHT_DECAY = 1e-4
AVERAGED = 0.25  # the last part of the epochs, whose ends are averaged

CYCLE, SUGGESTED, THIRD = "one cycle", "constant", "constant, a third"
COLORS = {CYCLE: "#0b5fa5", SUGGESTED: "#d55e00", THIRD: "#7a7a7a"}
PICTURE = "one-cycle.png"


class Result(NamedTuple):
    """On the test images."""

    loss: float
    accuracy: float


class Run(NamedTuple):
    """What is recorded of one training run."""

    lr: list[float]  # of each update
    momentum: list[float]
    training_losses: list[float]  # of each epoch, the mean over its batches
    results: list[Result]  # after each epoch
    averaged: Result


def loss_of(model: Model) -> Callable[[tuple[np.ndarray, np.ndarray]], float]:
    """A function of a batch that sets the gradients and returns the loss."""

    def loss_and_gradients(batch: tuple[np.ndarray, np.ndarray]) -> float:
        images, labels = batch
        outputs = forward(model, images)
        loss, gradient = cross_entropy(outputs[-1], labels)
        backward(model, outputs, gradient)
        return loss

    return loss_and_gradients


def find_rate(data: Digits) -> LRFinder:
    """The range test: from a learning rate with which nothing happens to one with which everything breaks."""
    model = new_model(seed=0)
    opt = roptim.SGD(model, lr=1e-4, momentum=CONSTANT_MOMENTUM, weight_decay=WEIGHT_DECAY)
    finder = LRFinder(opt, loss_and_gradients=loss_of(model))
    return finder.range_test(lambda: batches(data, seed=0, epoch=0), end_lr=10, num_iter=100, progress=False)


def train(data: Digits, seed: int, epochs: int, lr: Schedule | float, momentum: Schedule | float) -> Run:
    """Trains with these two hyperparameters, numbers or schedules: for the loop it is the same."""
    model = new_model(seed)
    opt = roptim.SGD(model, lr=lr, momentum=momentum, weight_decay=WEIGHT_DECAY)
    average = AveragedModel(model)
    loss_and_gradients = loss_of(model)
    run = Run([], [], [], [], Result(np.nan, np.nan))
    for epoch in range(epochs):
        losses = []
        for batch in batches(data, seed, epoch):
            group = opt.param_groups[0]  # shows the values that the coming update uses
            run.lr.append(group["lr"])
            run.momentum.append(group["momentum"])
            opt.zero_grad()
            losses.append(loss_and_gradients(batch))
            opt.step()
        if epoch >= round(epochs * (1 - AVERAGED)):
            average.update_parameters(model)
        run.training_losses.append(sum(losses) / len(losses))
        run.results.append(Result(*evaluate(model, data.test_images, data.test_labels)))
    with average.applied_to(model):
        return run._replace(averaged=Result(*evaluate(model, data.test_images, data.test_labels)))


def train_all(data: Digits, seeds: int, epochs: int, peak: float) -> dict[str, list[Run]]:
    """The cycle and the constant rates, each once per seed."""
    updates = epochs * sum(1 for _ in batches(data, 0, 0))
    # From MOMENTUM, which is the lowest divided by div_factor, to the lowest and back, at the same updates as the rate.
    falling = one_cycle(updates, LOW_MOMENTUM, div_factor=LOW_MOMENTUM / MOMENTUM, final_div_factor=1)
    ways: dict[str, tuple[Schedule | float, Schedule | float]] = {
        CYCLE: (one_cycle(updates, peak), falling),
        SUGGESTED: (peak, CONSTANT_MOMENTUM),
        THIRD: (peak / 3, CONSTANT_MOMENTUM),
    }
    return {way: [train(data, seed, epochs, *given) for seed in range(seeds)] for way, given in ways.items()}


def mean(results: list[Result]) -> Result:
    """Over the seeds."""
    return Result(*np.mean(results, axis=0).tolist())


def summarize(runs: dict[str, list[Run]], peak: float) -> bool:
    """Prints what came out, and returns whether it is what this example claims."""
    seeds = len(runs[CYCLE])
    last = {way: mean([run.results[-1] for run in each]) for way, each in runs.items()}
    averaged = {way: mean([run.averaged for run in each]) for way, each in runs.items()}
    names = {
        CYCLE: f"one cycle, peak {peak:.3g}",
        SUGGESTED: f"constant, {peak:.3g}",
        THIRD: f"constant, {peak / 3:.3g}",
    }
    print(f"test loss and accuracy, means over {seeds} seed{'s' * (seeds > 1)}")
    print(f"{'':<22}{'last epoch':>16}{'averaged':>20}")
    for way, name in names.items():
        cells = [f"{result.loss:8.4f}{result.accuracy:8.1%}" for result in (last[way], averaged[way])]
        print(f"{name:<22}{cells[0]}    {cells[1]}")

    better = {way: last[CYCLE].loss < last[way].loss for way in (SUGGESTED, THIRD)}
    for way, is_better in better.items():
        wins = sum(a.results[-1].loss < b.results[-1].loss for a, b in zip(runs[CYCLE], runs[way], strict=True))
        verdict = "lower" if is_better else "NOT LOWER"
        print(f"the cycle's last test loss is {verdict} than that of {names[way]}: with {wins} of {seeds} seeds")
    for way in (SUGGESTED, CYCLE):
        print(f"averaging leaves {averaged[way].loss / last[way].loss:.0%} of the test loss of {names[way]}")
    ends = [(last[way].loss, f"{name}, last epoch") for way, name in names.items()]
    ends += [(averaged[way].loss, f"{name}, averaged") for way, name in names.items()]
    print(f"lowest of all: {min(ends)[1]}")
    return all(better.values()) and averaged[SUGGESTED].loss < last[SUGGESTED].loss


# ---- the picture --------------------------------------------------------------------------------------------


def draw_tests(axes: Axes, runs: dict[str, list[Run]], field: str) -> None:
    """After each epoch a thick line for the mean over the seeds, among a thin one for each; behind the last one
    diamonds for the averaged parameters."""
    for i, (way, each) in enumerate(runs.items()):
        curves = np.array([[getattr(result, field) for result in run.results] for run in each])
        epochs = np.arange(1, curves.shape[1] + 1)
        axes.plot(epochs, curves.T, color=COLORS[way], linewidth=0.5, alpha=0.4)
        axes.plot(epochs, curves.mean(axis=0), color=COLORS[way], linewidth=2, label=way)
        averaged = getattr(mean([run.averaged for run in each]), field)
        axes.plot(len(epochs) * (1.03 + 0.03 * i), averaged, "D", color=COLORS[way], markersize=6)


def plot(finder: LRFinder, runs: dict[str, list[Run]], path: Path) -> None:
    """Draws range test, schedules, losses and accuracies."""
    figure = Figure(figsize=(12, 8), dpi=100, layout="constrained")
    seeds, epochs = len(runs[CYCLE]), len(runs[CYCLE][0].results)
    title = f"One cycle: {epochs} epochs on handwritten digits"
    figure.suptitle(title, fontsize="x-large", fontweight="bold")
    (test, hypers), (losses, accuracy) = figure.subplots(2, 2)

    finder.plot(ax=test)
    test.set(title="1. The range test suggests a learning rate", ylim=(0, 1.6 * max(finder.history["loss"][:20])))
    test.legend(loc="upper left", fontsize="small", framealpha=1, edgecolor="none")

    run = runs[CYCLE][0]
    momentum = hypers.twinx()
    hypers.plot(run.lr, color=COLORS[CYCLE], linewidth=2)
    hypers.axhline(runs[SUGGESTED][0].lr[0], color=COLORS[SUGGESTED], linewidth=1.5)
    hypers.axhline(runs[THIRD][0].lr[0], color=COLORS[THIRD], linewidth=1.5)
    momentum.plot(run.momentum, color=COLORS[CYCLE], linewidth=1.5, linestyle="--")
    hypers.set(title="2. Learning rate (left) and momentum (right, dashed)", xlabel="update", ylabel="learning rate")
    hypers.set_ylim(0, 1.15 * max(run.lr))
    momentum.set(ylabel="momentum", ylim=(0.6, 0.96))

    draw_tests(losses, runs, "loss")
    for way, each in runs.items():
        curve = np.mean([run.training_losses for run in each], axis=0)
        losses.plot(np.arange(1, epochs + 1), curve, color=COLORS[way], linewidth=1.5, linestyle=":")
    losses.set(title="3. Test loss (dotted: training loss, on images with noise)", ylabel="cross-entropy (log scale)")
    draw_tests(accuracy, runs, "accuracy")
    accuracy.set(title="4. Test images recognized", ylim=(0.85, 1))
    accuracy.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))

    losses.set_yscale("log")
    losses.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    losses.yaxis.set_major_formatter("{x:g}")
    losses.yaxis.set_minor_formatter(NullFormatter())
    for axes in (losses, accuracy):
        axes.set_xlabel(f"epoch (thick: mean over {seeds} seeds; diamonds: averaged parameters)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (test, hypers, losses, accuracy):
        axes.grid(color="#e8e8e8", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines["top"].set_visible(False)
    accuracy.legend(loc="lower right", fontsize="small", framealpha=1, edgecolor="none")
    figure.savefig(path, metadata={"Software": None})


# ---- the program --------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    """Finds a rate, trains, compares, plots."""
    parser = argparse.ArgumentParser(description="Train with one cycle of the learning rate, compare, plot.")
    parser.add_argument("--epochs", type=int, default=20, help="passes over the training images, at least 4")
    parser.add_argument("--seeds", type=int, default=5, help="how many runs of each kind")
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for the picture")
    options = parser.parse_args(arguments)
    if options.epochs < 4 or options.seeds < 1:
        parser.error("at least 4 epochs, so that some can be averaged, and at least 1 seed")
    options.output.mkdir(parents=True, exist_ok=True)

    data = load_data()
    finder = find_rate(data)
    peak = finder.suggestion()
    print(f"range test: {len(finder.history['lr'])} steps, lr {finder.history['lr'][0]:g} to", end=" ")
    print(f"{finder.history['lr'][-1]:.3g}; the loss falls fastest at {peak:.3g}", flush=True)
    runs = train_all(data, options.seeds, options.epochs, peak)
    kept = summarize(runs, peak)
    plot(finder, runs, options.output / PICTURE)
    print(f"picture: {options.output / PICTURE}")
    return 0 if kept else 1


if __name__ == "__main__":
    raise SystemExit(main())
