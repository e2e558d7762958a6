"""Train a neural network written in plain NumPy on handwritten digits, with roptim doing the updates.

What you can learn here, top to bottom:

- backpropagation by hand: a forward pass, a loss, and a backward pass that fills each parameter's ``.grad``;
- the training loop of roptim: ``zero_grad``, gradients, ``clip_grad_norm_``, ``step``, and a learning-rate
  schedule that is stepped once per epoch;
- checkpoints: everything a run consists of goes into one file, and a fresh process that resumes from that
  file ends on the same bits as the run that was never interrupted. The script does this and compares;
- the GPU: ``--backend gpu`` is the whole difference.

Run ``python examples/digits.py``, or with ``--help`` for its options. The images are the 1797 scans of 8 x 8
pixels from the UCI repository that scikit-learn ships, so nothing is downloaded.

Exit code: 0 if all went well; 1 if the accuracy is too low or the bits differ; 2 if there is no GPU to use.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, PercentFormatter
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import roptim

SIZES = (64, 128, 64, 10)  # pixels, two hidden layers, classes
LAYERS = range(1, len(SIZES))
BATCH_SIZE = 32
PEAK_LR = 3e-3
MAX_GRADIENT_NORM = 1.0
PIXEL_NOISE = 0.2  # standard deviation of the noise on training images; pixels lie in [0, 1]

# Files in the output folder.
HALFWAY = "digits-halfway.safetensors"
RESUMED = "digits-resumed.safetensors"
PICTURE = "digits.png"

Array = np.ndarray
Model = dict[str, roptim.Parameter]


# ---- the data -----------------------------------------------------------------------------------------------


class Digits(NamedTuple):
    """Images as float32 rows of 64 pixels in [0, 1], labels as integers 0 to 9."""

    train_images: Array
    test_images: Array
    train_labels: Array
    test_labels: Array


def load_data() -> Digits:
    """Three quarters of the images for training, the rest for testing: the same split in every run."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    return Digits(*train_test_split(images, labels, test_size=0.25, stratify=labels, random_state=0))


def batches(data: Digits, seed: int, epoch: int) -> Iterator[tuple[Array, Array]]:
    """The training data of one epoch, shuffled and with a little noise on the pixels against overfitting.

    The random numbers depend on seed and epoch only. A run that resumes at some epoch therefore sees the
    same batches, and no state of a random generator has to be saved.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(data.train_labels))
    for start in range(0, len(order), BATCH_SIZE):
        rows = order[start : start + BATCH_SIZE]
        images = data.train_images[rows]
        yield images + PIXEL_NOISE * rng.standard_normal(images.shape, np.float32), data.train_labels[rows]


# ---- the network --------------------------------------------------------------------------------------------


def new_model(seed: int) -> Model:
    """Weights W1, W2, W3 of shape (inputs, outputs) by He's rule, which suits ReLU, and biases b1, b2, b3 of 0."""
    rng = np.random.default_rng(seed)
    model = {}
    for i in LAYERS:
        inputs, outputs = SIZES[i - 1], SIZES[i]
        weights = np.sqrt(2 / inputs) * rng.standard_normal((inputs, outputs))
        model[f"W{i}"] = roptim.Parameter(weights.astype(np.float32))
        model[f"b{i}"] = roptim.Parameter(np.zeros(outputs, np.float32))
    return model


def forward(model: Model, images: Array) -> list[Array]:
    """The output of every layer, one row per image: first the images themselves, last the scores of the classes."""
    outputs = [images]
    for i in LAYERS:
        sums = outputs[-1] @ model[f"W{i}"].data + model[f"b{i}"].data
        outputs.append(sums if i == LAYERS[-1] else np.maximum(sums, 0))  # ReLU between layers, none at the end
    return outputs


def cross_entropy(scores: Array, labels: Array) -> tuple[float, Array]:
    """The mean of -log(softmax(scores)[label]), and its gradient with respect to the scores."""
    scores = scores - scores.max(axis=1, keepdims=True)  # changes no probability, and exp cannot overflow
    log_probabilities = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
    rows = np.arange(len(labels))
    loss = -log_probabilities[rows, labels].mean()
    gradient = np.exp(log_probabilities)
    gradient[rows, labels] -= 1
    return float(loss), gradient / len(labels)


def backward(model: Model, outputs: list[Array], gradient: Array) -> None:
    """The chain rule from the last layer to the first: sets ``.grad`` of every parameter.

    ``gradient`` is that of the loss with respect to what the layer at hand adds up, ``below @ W + b``.
    """
    for i in reversed(LAYERS):
        below = outputs[i - 1]
        model[f"W{i}"].grad = below.T @ gradient
        model[f"b{i}"].grad = gradient.sum(axis=0)
        if i > 1:
            # ReLU lets the gradient through where its output is positive.
            gradient = (gradient @ model[f"W{i}"].data.T) * (below > 0)


def evaluate(model: Model, images: Array, labels: Array) -> tuple[float, float]:
    """Loss, and the share of images whose best score is that of the right class."""
    scores = forward(model, images)[-1]
    return cross_entropy(scores, labels)[0], float(np.mean(scores.argmax(axis=1) == labels))


# ---- training -----------------------------------------------------------------------------------------------


@dataclass
class Training:
    """Everything that a run consists of."""

    seed: int
    epochs: int
    epoch: int  # epochs done so far
    model: Model
    optimizer: roptim.Optimizer
    scheduler: roptim.lr_scheduler.LRScheduler
    history: dict[str, list[float]]  # one value per epoch done


def new_training(model: Model, seed: int, epochs: int, device: dict[str, Any]) -> Training:
    """A run at its beginning. ``device`` says where the updates are computed."""
    optimizer = roptim.AdamW(model, lr=PEAK_LR, **device)
    scheduler = roptim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
    names = ("training loss", "test loss", "training accuracy", "test accuracy", "learning rate")
    return Training(seed, epochs, 0, model, optimizer, scheduler, {name: [] for name in names})


def train_epoch(run: Training, data: Digits) -> None:
    """One pass over the training images, then one step of the schedule and one entry in the history."""
    losses = []
    for images, labels in batches(data, run.seed, run.epoch):
        outputs = forward(run.model, images)
        loss, gradient = cross_entropy(outputs[-1], labels)
        run.optimizer.zero_grad()
        backward(run.model, outputs, gradient)
        roptim.clip_grad_norm_(run.model.values(), MAX_GRADIENT_NORM)
        run.optimizer.step()
        losses.append(loss)

    test_loss, test_accuracy = evaluate(run.model, data.test_images, data.test_labels)
    _, train_accuracy = evaluate(run.model, data.train_images, data.train_labels)
    lr = run.scheduler.get_last_lr()[0]
    entry = (sum(losses) / len(losses), test_loss, train_accuracy, test_accuracy, lr)
    for values, value in zip(run.history.values(), entry, strict=True):
        values.append(value)
    run.scheduler.step()
    run.epoch += 1


def train(run: Training, data: Digits, label: str, halfway_path: Path | None = None) -> None:
    """Trains to the end, with a progress bar, and on the way saves a checkpoint if it is told where."""
    with tqdm(total=run.epochs, initial=run.epoch, desc=f"{label:<13}", unit="epoch") as bar:
        while run.epoch < run.epochs:
            train_epoch(run, data)
            if halfway_path is not None and run.epoch == run.epochs // 2:
                roptim.save(checkpoint(run), halfway_path)
            loss, accuracy = run.history["training loss"][-1], run.history["test accuracy"][-1]
            bar.set_postfix_str(f"loss {loss:.3f}, test accuracy {accuracy:.1%}", refresh=False)
            bar.update()


# ---- checkpoints --------------------------------------------------------------------------------------------


def checkpoint(run: Training) -> dict[str, Any]:
    """The run as a tree of dicts, lists, numbers and arrays, which is what ``roptim.save`` takes."""
    return {
        "seed": run.seed,
        "epochs": run.epochs,
        "epoch": run.epoch,
        "model": run.model,  # a Parameter is saved as its array
        "optimizer": run.optimizer.state_dict(),
        "scheduler": run.scheduler.state_dict(),
        "history": run.history,
    }


def restore(saved: dict[str, Any], device: dict[str, Any]) -> Training:
    """The run that ``checkpoint`` described, ready to go on."""
    model = {name: roptim.Parameter(array) for name, array in saved["model"].items()}
    run = new_training(model, saved["seed"], saved["epochs"], device)
    run.optimizer.load_state_dict(saved["optimizer"])
    run.scheduler.load_state_dict(saved["scheduler"])
    run.history = saved["history"]
    run.epoch = saved["epoch"]
    return run


def fingerprint(tree: Any) -> str:
    """A hash of every name, number and array in a tree: the same only where all bits are the same."""
    digest = hashlib.sha256()

    def add(place: str, value: Any) -> None:
        if isinstance(value, dict):
            for key in sorted(value, key=str):
                add(f"{place}/{key}", value[key])
        elif isinstance(value, (list, tuple)):
            for i, item in enumerate(value):
                add(f"{place}/{i}", item)
        elif isinstance(value, (np.ndarray, roptim.Parameter)):
            array = np.asarray(value)
            digest.update(f"{place}: {array.dtype} {array.shape}\n".encode() + array.tobytes())
        else:
            digest.update(f"{place}: {value!r}\n".encode())  # repr of a float tells all its bits

    add("", tree)
    return digest.hexdigest()


def resume_in_fresh_process(path: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Runs this script again with ``--resume``, and returns the checkpoint that it ends with."""
    command = [sys.executable, __file__, "--resume", path, "--output", options.output, "--backend", options.backend]
    if options.allow_software:
        command.append("--allow-software")
    if subprocess.run(command).returncode != 0:
        sys.exit("the resumed run failed")
    return roptim.load(options.output / RESUMED)


# ---- the picture --------------------------------------------------------------------------------------------

BLUE, ORANGE, GRAY = "#2a6fbb", "#d9731a", "#666666"


def plot(history: dict[str, list[float]], resumed: dict[str, list[float]], halfway: int, path: Path) -> None:
    """Draws loss, accuracy and learning rate by epoch: lines are the uninterrupted run, circles the resumed one."""
    epochs = np.arange(1, len(history["test loss"]) + 1)
    figure = Figure(figsize=(12, 4.4), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
    loss, accuracy, lr = figure.subplots(1, 3)

    def curve(axes: Any, name: str, color: str, label: str, resumed_label: str | None = None) -> None:
        axes.plot(epochs, history[name], color=color, linewidth=1.8, label=label)
        every = max(1, (len(epochs) - halfway) // 8)
        shown = slice(len(epochs) - 1, halfway - 1, -every)  # counted from the end, so that the last epoch is shown
        dots = {"marker": "o", "markersize": 5, "markerfacecolor": "white", "linestyle": "none", "clip_on": False}
        axes.plot(epochs[shown], resumed[name][shown], color=color, label=resumed_label, **dots)

    curve(loss, "training loss", BLUE, "training (with noise)")
    curve(loss, "test loss", ORANGE, "test")
    loss.set(title="Loss", ylabel="cross-entropy (log scale)", yscale="log")
    loss.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    loss.yaxis.set_major_formatter("{x:g}")
    loss.yaxis.set_minor_locator(NullLocator())

    curve(accuracy, "training accuracy", BLUE, "training (without noise)")
    curve(accuracy, "test accuracy", ORANGE, "test")
    accuracy.set(title="Accuracy", ylabel="images recognized")
    accuracy.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))

    curve(lr, "learning rate", GRAY, "uninterrupted run", "resumed in a fresh process")
    lr.yaxis.set_major_formatter("{x:g}")
    lr.set(title="Learning rate", ylabel="AdamW's lr, cosine schedule", ylim=(0, 1.35 * max(history["learning rate"])))

    for axes, corner in ((loss, "upper right"), (accuracy, "lower right"), (lr, "upper right")):
        axes.axvline(
            halfway, color=GRAY, linewidth=1, linestyle=":", zorder=0, label="checkpoint" if axes is lr else None
        )
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e8e8e8", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.legend(loc=corner, facecolor="white", edgecolor="none", framealpha=1, fontsize="small")
    title = f"Handwritten digits: {history['test accuracy'][-1]:.1%} of the test images recognized"
    figure.suptitle(title, fontsize="x-large", fontweight="bold")
    figure.savefig(path, dpi=150)


# ---- the program --------------------------------------------------------------------------------------------


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""

    def at_least_two(text: str) -> int:
        if int(text) < 2:
            raise argparse.ArgumentTypeError("must be at least 2, so that there is a middle to resume from")
        return int(text)

    parser = argparse.ArgumentParser(
        description="Train a NumPy network on handwritten digits, resume it in a fresh process, compare, plot."
    )
    parser.add_argument("--epochs", type=at_least_two, default=60, help="passes over the training images")
    parser.add_argument("--seed", type=int, default=0, help="of the first weights and the shuffles")
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for picture and checkpoints")
    parser.add_argument("--backend", default="cpu", help='"cpu", "gpu", "gpu:<number>" or "gpu:<part of its name>"')
    parser.add_argument("--allow-software", action="store_true", help="let the gpu backend use a software adapter")
    parser.add_argument("--min-accuracy", type=float, default=97, help="in percent; below it the exit code is 1")
    parser.add_argument("--resume", type=Path, metavar="CHECKPOINT", help="finish the run that this file holds")
    return parser.parse_args(arguments)


def finish(options: argparse.Namespace, device: dict[str, Any], data: Digits) -> int:
    """What the fresh process does: takes up a checkpoint, trains to the end and saves the result."""
    run = restore(roptim.load(options.resume), device)
    train(run, data, "resumed")
    roptim.save(checkpoint(run), options.output / RESUMED)
    print(f"resumed run saved: {options.output / RESUMED}")
    return 0


def demonstrate(options: argparse.Namespace, device: dict[str, Any], data: Digits) -> int:
    """Trains without interruption, resumes from the middle in a fresh process, compares and plots."""
    run = new_training(new_model(options.seed), options.seed, options.epochs, device)
    shape = "-".join(map(str, SIZES))
    print(f"roptim {roptim.__version__}, AdamW on {run.optimizer.device}")
    print(f"{shape} network, {len(data.train_labels)} training and {len(data.test_labels)} test images", flush=True)

    halfway_path = options.output / HALFWAY
    train(run, data, "uninterrupted", halfway_path)
    resumed = resume_in_fresh_process(halfway_path, options)
    plot(run.history, resumed["history"], run.epochs // 2, options.output / PICTURE)

    accuracy = 100 * run.history["test accuracy"][-1]
    here, there = fingerprint(checkpoint(run)), fingerprint(resumed)
    print(f"test accuracy: {accuracy:.1f} %")
    if here == there:
        print(f"same bits: the resumed run ended exactly like the uninterrupted one (sha256 {here[:16]})")
    else:
        print(f"DIFFERENT BITS: uninterrupted {here[:16]}, resumed {there[:16]}")
    print(f"picture: {options.output / PICTURE}")
    if accuracy < options.min_accuracy:
        print(f"the accuracy is below {options.min_accuracy:g} %")
    return 0 if here == there and accuracy >= options.min_accuracy else 1


def main(arguments: list[str] | None = None) -> int:
    """Runs the demo, or with ``--resume`` its second half."""
    options = parse_options(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    device = {"backend": options.backend, "allow_software": options.allow_software}
    try:
        return (finish if options.resume else demonstrate)(options, device, load_data())
    except roptim.NoAdapterError as error:
        print(error, file=sys.stderr)
        print(
            "Install a GPU driver with Vulkan, Metal or DirectX 12 and see `python -m roptim devices`; or use "
            "--backend cpu, or --allow-software for a software adapter.",
            file=sys.stderr,
        )
        return 2


if __name__ == "__main__":
    sys.exit(main())
