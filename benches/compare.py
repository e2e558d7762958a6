"""Times roptim's steps against hand-written NumPy and torch.optim, in turns, in one run.

Prints one table per case and optimizer, and writes ``compare.json`` and ``compare.png``. How to read them,
and how to lend the benchmark a torch from another environment: ``README.md`` beside this file.

One file, two processes. This process runs roptim and NumPy. A worker, the same file started with
``--worker`` by an interpreter that has torch, runs torch; the two exchange one JSON object per line over
pipes, and whoever waits for an answer does nothing else. Only the standard library and NumPy are imported
at the top, so that neither environment needs the other's packages.

Not measured: GPUs, dtypes other than float32, ``torch.compile``, anything but ``step``.
"""

from __future__ import annotations

import argparse
import base64
import datetime
import gc
import importlib.util
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Shapes = list[tuple[int, ...]]

#: Untimed steps before the first round: they allocate the state and give the values that are compared.
WARM_UP_STEPS = 3
#: Pause before each turn, in which the threads of the one before fall asleep.
PAUSE_SECS = 0.01
#: Steps that a turn may have at most, however short they are.
MOST_STEPS = 2000
#: Values per entrant that are compared, spread over all tensors.
SAMPLE_SIZE = 65536

#: An entrant whose slowest round takes this many times its fastest is called unsteady.
UNSTEADY = 2.0


# ---- what is measured -----------------------------------------------------------------------------------


def gpt2_small() -> Shapes:
    """The shapes of GPT-2 small's parameters."""
    width, vocabulary, context, blocks = 768, 50257, 1024, 12
    norm: Shapes = [(width,), (width,)]
    attention: Shapes = [(width, 3 * width), (3 * width,), (width, width), (width,)]
    feed_forward: Shapes = [(width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    return [(vocabulary, width), (context, width)] + (norm + attention + norm + feed_forward) * blocks + norm


@dataclass(frozen=True)
class Case:
    """Parameters of these shapes, stepped together."""

    title: str
    shapes: Shapes
    #: Whether ``--quick`` leaves it out.
    large: bool = False

    @property
    def elements(self) -> int:
        """Numbers in all parameters together."""
        return sum(math.prod(shape) for shape in self.shapes)


CASES = {
    "single": Case("1 tensor of 64 Mi", [(2**26,)], large=True),
    "gpt2": Case("GPT-2 small", gpt2_small(), large=True),
    "many": Case("1000 tensors of 1000", [(1000,)] * 1000),
    "mlp": Case("MLP 784-128-10", [(784, 128), (128,), (128, 10), (10,)]),
}


class NumpyAdamW:
    """AdamW as people write it in NumPy: in place where that is natural, temporaries elsewhere."""

    def __init__(
        self, params: list[np.ndarray], lr: float, betas: tuple[float, float], eps: float, weight_decay: float
    ) -> None:
        self.params, self.lr, self.betas, self.eps, self.weight_decay = params, lr, betas, eps, weight_decay
        self.m = [np.zeros_like(p) for p in params]
        self.v = [np.zeros_like(p) for p in params]
        self.t = 0

    def step(self, gradients: list[np.ndarray]) -> None:
        """One update of every parameter, in place."""
        self.t += 1
        beta1, beta2 = self.betas
        for p, g, m, v in zip(self.params, gradients, self.m, self.v, strict=True):
            p *= 1 - self.lr * self.weight_decay
            m *= beta1
            m += (1 - beta1) * g
            v *= beta2
            v += (1 - beta2) * g * g
            m_hat = m / (1 - beta1**self.t)
            v_hat = v / (1 - beta2**self.t)
            p -= self.lr * m_hat / (np.sqrt(v_hat) + self.eps)


class NumpySGD:
    """SGD with momentum as people write it in NumPy."""

    def __init__(self, params: list[np.ndarray], lr: float, momentum: float) -> None:
        self.params, self.lr, self.momentum = params, lr, momentum
        self.velocity = [np.zeros_like(p) for p in params]

    def step(self, gradients: list[np.ndarray]) -> None:
        """One update of every parameter, in place."""
        for p, g, v in zip(self.params, gradients, self.velocity, strict=True):
            v *= self.momentum
            v += g
            p -= self.lr * v


@dataclass(frozen=True)
class Contest:
    """One optimizer of roptim and torch (both call it by the key of the table) and its NumPy twin."""

    title: str
    hypers: dict[str, Any]
    numpy: type
    torch_modes: tuple[str, ...] = ("default", "foreach", "fused")


OPTIMIZERS = {
    "AdamW": Contest("AdamW", {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}, NumpyAdamW),
    "SGD": Contest("SGD, momentum 0.9", {"lr": 1e-3, "momentum": 0.9}, NumpySGD),
}


def parameters(shapes: Shapes) -> list[np.ndarray]:
    """float32 values in [0.5, 1.5), the same in every process; none near zero, for relative differences."""
    return uniform(shapes, seed=1, low=0.5, width=1.0)


def gradients_for(shapes: Shapes) -> list[np.ndarray]:
    """float32 values in [-0.01, 0.01), the same in every process."""
    return uniform(shapes, seed=2, low=-0.01, width=0.02)


def uniform(shapes: Shapes, seed: int, low: float, width: float) -> list[np.ndarray]:
    """float32 arrays of these shapes with values in [low, low + width)."""
    generator = np.random.default_rng(seed)
    arrays = [generator.random(shape, dtype=np.float32) for shape in shapes]
    for array in arrays:
        array *= width
        array += low
    return arrays


# ---- entrants -------------------------------------------------------------------------------------------


class LocalEntrant:
    """An optimizer in this process."""

    def __init__(self, params: Sequence[Any], step: Callable[[], object]) -> None:
        self._params = params
        self._step = step

    def run(self, steps: int) -> list[float]:
        """Seconds of each of that many steps."""
        time.sleep(PAUSE_SECS)
        seconds = []
        for _ in range(steps):
            start = time.perf_counter()
            self._step()
            seconds.append(time.perf_counter() - start)
        return seconds

    def sample(self) -> np.ndarray:
        """Some values of every parameter, float32, one row."""
        quota = max(1, SAMPLE_SIZE // len(self._params))
        flat = [np.asarray(p).reshape(-1) for p in self._params]
        return np.concatenate([values[:: math.ceil(values.size / quota)] for values in flat])


class TorchEntrant:
    """An optimizer in the worker, with the same methods."""

    def __init__(self, worker: Worker, mode: str) -> None:
        self._worker = worker
        self._mode = mode

    def run(self, steps: int) -> list[float]:
        """Seconds of each of that many steps."""
        return self._worker.ask("run", mode=self._mode, steps=steps)

    def sample(self) -> np.ndarray:
        """Some values of every parameter, float32, one row."""
        return np.frombuffer(base64.b64decode(self._worker.ask("sample", mode=self._mode)), np.float32)


Entrant = LocalEntrant | TorchEntrant


def line_up(case: Case, optimizer: str, threads: int, worker: Worker | None) -> dict[str, Entrant]:
    """All entrants by name, in the order of their turns; roptim and NumPy share gradients."""
    import roptim

    contest = OPTIMIZERS[optimizer]
    gradients = gradients_for(case.shapes)
    ours, theirs = parameters(case.shapes), parameters(case.shapes)
    fast = getattr(roptim, optimizer)(ours, **contest.hypers, threads=threads)
    plain = contest.numpy(theirs, **contest.hypers)
    entrants: dict[str, Entrant] = {
        "roptim": LocalEntrant(ours, lambda: fast.step(gradients)),
        "numpy": LocalEntrant(theirs, lambda: plain.step(gradients)),
    }
    if worker is not None:
        modes = contest.torch_modes
        worker.ask("setup", shapes=case.shapes, optimizer=optimizer, hypers=contest.hypers, modes=modes)
        entrants |= {f"torch {mode}": TorchEntrant(worker, mode) for mode in modes}
    return entrants


# ---- the worker -----------------------------------------------------------------------------------------


class Worker:
    """The process that runs torch, seen from here."""

    def __init__(self, python: str, threads: int) -> None:
        command = [python, str(Path(__file__).resolve()), "--worker"]
        try:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        except OSError as error:
            raise SystemExit(f"compare.py: --torch-python must be an interpreter, got {python!r}: {error}") from error
        self.versions: dict[str, str] = self.ask("start", threads=threads)

    def ask(self, do: str, **arguments: Any) -> Any:
        """Sends one request and waits for its answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps({"do": do, **arguments}), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise SystemExit(f"compare.py: the torch worker ended during {do!r} (exit code {self._process.wait()})")
        answer = json.loads(line)
        if "error" in answer:
            raise SystemExit(f"compare.py: the torch worker failed during {do!r}: {answer['error']}")
        return answer["value"]

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()


class TorchSide:
    """What the worker does: each method answers the request of its name."""

    def __init__(self) -> None:
        self._entrants: dict[str, LocalEntrant] = {}

    def start(self, threads: int) -> dict[str, str]:
        """Imports torch."""
        import torch

        torch.set_num_threads(threads)
        return {"torch": torch.__version__, "python of torch": platform.python_version()}

    def setup(self, shapes: Shapes, optimizer: str, hypers: dict[str, Any], modes: list[str]) -> None:
        """One optimizer per mode over parameters of its own; the gradients are shared."""
        import torch

        gradients = [torch.from_numpy(g).clone() for g in gradients_for(shapes)]
        for mode in modes:
            params = [torch.nn.Parameter(torch.from_numpy(p).clone()) for p in parameters(shapes)]
            for p, g in zip(params, gradients, strict=True):
                p.grad = g
            switch = {} if mode == "default" else {mode: True}
            made = getattr(torch.optim, optimizer)(params, **hypers, **switch)
            self._entrants[mode] = LocalEntrant([p.detach() for p in params], made.step)

    def run(self, mode: str, steps: int) -> list[float]:
        """Seconds of each of that many steps."""
        return self._entrants[mode].run(steps)

    def sample(self, mode: str) -> str:
        """Some values of every parameter, float32 in base64."""
        return base64.b64encode(self._entrants[mode].sample().tobytes()).decode()

    def free(self) -> None:
        """Forgets the case."""
        self._entrants.clear()
        gc.collect()


def serve() -> None:
    """Answers requests until the input ends. What libraries print goes to stderr, not into the answers."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    gc.disable()
    side = TorchSide()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"value": getattr(side, request.pop("do"))(**request)}
        except Exception as error:  # whatever it is, the other process reports it
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def torch_worker(python: str | None, threads: int) -> Worker | None:
    """The worker, if an interpreter was named or this one has torch."""
    if python is None and importlib.util.find_spec("torch") is None:
        print("torch is left out: this Python has none, and --torch-python names no other.\n")
        return None
    return Worker(python or sys.executable, threads)


# ---- measuring ------------------------------------------------------------------------------------------


def measure(case: Case, optimizer: str, options: argparse.Namespace, worker: Worker | None) -> dict[str, Any]:
    """The result of one case and optimizer, as written to the JSON file."""
    entrants = line_up(case, optimizer, options.threads, worker)
    differences = warm_up(entrants)
    steps = {name: steps_per_turn(entrant, options.turn_secs) for name, entrant in entrants.items()}
    rounds = [
        {name: statistics.median(entrant.run(steps[name])) for name, entrant in entrants.items()}
        for _ in range(options.rounds)
    ]
    if worker is not None:
        worker.ask("free")
    return {
        "elements": case.elements,
        "tensors": len(case.shapes),
        "steps_per_turn": steps,
        "difference": differences,
        **summary(rounds),
    }


def warm_up(entrants: dict[str, Entrant]) -> dict[str, float]:
    """Takes the untimed steps; returns each peer's largest relative difference from roptim after them."""
    for entrant in entrants.values():
        entrant.run(WARM_UP_STEPS)
    ours = entrants["roptim"].sample()
    peers = {name: entrant.sample() for name, entrant in entrants.items() if name != "roptim"}
    return {name: float(np.max(np.abs(theirs - ours) / np.abs(theirs))) for name, theirs in peers.items()}


def steps_per_turn(entrant: Entrant, turn_secs: float) -> int:
    """How many steps fill a turn."""
    return max(1, min(MOST_STEPS, round(turn_secs / min(entrant.run(2)))))


def summary(rounds: list[dict[str, float]]) -> dict[str, Any]:
    """Seconds per step, and how many times as long as roptim's, by entrant."""
    seconds = {name: [turn[name] for turn in rounds] for name in rounds[0]}
    ratios = {name: [turn[name] / turn["roptim"] for turn in rounds] for name in rounds[0] if name != "roptim"}
    torch = [name for name in seconds if name.startswith("torch ")]
    return {
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "ratio": {name: spread(values) for name, values in ratios.items()},
        "ratio_of_fastest": {name: min(seconds[name]) / min(seconds["roptim"]) for name in ratios},
        "unsteady": [name for name, values in seconds.items() if max(values) > UNSTEADY * min(values)],
        "best_torch": min(torch, key=lambda name: statistics.median(seconds[name]), default=None),
    }


def spread(values: list[float]) -> dict[str, Any]:
    """Median, extremes and every round."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "rounds": values}


def machine(worker: Worker | None) -> dict[str, Any]:
    """What the figures were measured on and with."""
    import roptim

    versions = {"python": platform.python_version(), "numpy": np.__version__, "roptim": roptim.__version__}
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "versions": versions | (worker.versions if worker is not None else {}),
    }


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


# ---- showing --------------------------------------------------------------------------------------------


def heading(record: dict[str, Any]) -> str:
    """What was measured on and with, in two lines."""
    where, threads = record["machine"], record["settings"]["threads"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    return (
        f"{where['cpu']}, {where['cores']} cores, {where['system']}, {record['date']}\n{versions}; threads: {threads}"
    )


def figures(value: float, digits: int = 3) -> str:
    """The number with that many significant digits, without an exponent."""
    decimals = max(0, digits - 1 - math.floor(math.log10(value)))
    return f"{value:.{decimals}f}"


def bounds(values: dict[str, Any], unit: float = 1.0) -> str:
    """From the least to the greatest."""
    return f"{figures(unit * values['min'])} to {figures(unit * values['max'])}"


def table(result: dict[str, Any]) -> Iterator[str]:
    """The lines of one result."""
    tensors = f"{result['tensors']} tensor{'s' * (result['tensors'] > 1)}"
    yield f"{result['optimizer_title']}: {result['case_title']} ({tensors}, {result['elements']:,} elements)"
    titles = f"{'roptim faster by':>16}   {'min to max':<16} {'fastest rounds':>14}   differ by"
    yield f"  {'':<15} {'ms per step':>11}   {'min to max':<18} {titles}"
    for name, seconds in result["seconds"].items():
        mark = " *" if name == result["best_torch"] else ""
        line = f"  {name + mark:<15} {figures(1e3 * seconds['median']):>11}   {bounds(seconds, 1e3):<18}"
        if name in result["ratio"]:
            ratio, fastest = result["ratio"][name], result["ratio_of_fastest"][name]
            line += f" {figures(ratio['median']):>15}x   {bounds(ratio):<16} {figures(fastest):>13}x"
            line += f"   {result['difference'][name]:.1e}"
        yield line.rstrip()
    if result["unsteady"]:
        yield f"  unsteady, repeat on a quieter machine: {', '.join(result['unsteady'])}"
    yield ""


def chart(record: dict[str, Any], path: Path) -> None:
    """Bars of the ratios, one panel per optimizer; the line at 1 is roptim."""
    from matplotlib.figure import Figure

    titles = {result["optimizer"]: result["optimizer_title"] for result in record["results"]}
    figure = Figure(figsize=(10, 3.6 * len(titles) + 0.9), layout="constrained")
    panels = figure.subplots(len(titles), 1, squeeze=False, sharey=True)[:, 0]
    for panel, (optimizer, title) in zip(panels, titles.items(), strict=True):
        draw(panel, [result for result in record["results"] if result["optimizer"] == optimizer])
        panel.set_title(title, loc="left", fontsize=11, fontweight="bold")
    title = f"Time of one step in float32, as a multiple of roptim's (below 1{TIMES} the peer is faster)"
    figure.suptitle(title, fontsize=13)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    medians = [ratio["median"] for result in record["results"] for ratio in result["ratio"].values()]
    panels[0].set_ylim(0.7 * min(1, *medians), 2.2 * max(1, *medians))
    note = "*: the fastest of torch's modes; whiskers: extremes of the rounds; hatched: unsteady, not to be quoted"
    panels[-1].set_xlabel(f"{note}\n{heading(record)}", fontsize=8, color="#555555", labelpad=10)
    figure.savefig(path, dpi=150)


TIMES = "\N{MULTIPLICATION SIGN}"
COLORS = {"numpy": "#8c8c8c", "torch default": "#f2a65a", "torch foreach": "#d9703a", "torch fused": "#9c3d1f"}
#: Keeps labels legible over whiskers.
LABEL_BOX = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}


def draw(panel: Any, results: list[dict[str, Any]]) -> None:
    """One group of bars per case, on a log scale, growing from 1. Whiskers may leave the panel."""
    from matplotlib.ticker import LogLocator, NullLocator

    names = list(results[0]["ratio"])
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        ratios = [result["ratio"][name] for result in results]
        heights = np.array([ratio["median"] for ratio in ratios])
        reach = [heights - [ratio["min"] for ratio in ratios], [ratio["max"] for ratio in ratios] - heights]
        places = np.arange(len(results)) + (i - (len(names) - 1) / 2) * width
        hatches = ["////" if {name, "roptim"} & set(result["unsteady"]) else "" for result in results]
        color = COLORS.get(name)
        panel.bar(
            places, heights - 1, width * 0.92, bottom=1, color=color, hatch=hatches, edgecolor="white", linewidth=0
        )
        panel.bar(0, 0, bottom=1, color=color, label=name)
        panel.errorbar(places, heights, reach, fmt="none", ecolor="#333333", elinewidth=0.8, capsize=2)
        for x, result in zip(places, results, strict=True):
            ratio, best = result["ratio"][name], name == result["best_torch"]
            text = f"{figures(ratio['median'], 2)}{TIMES}" + "*" * best
            weight = "bold" if best else "normal"
            style = {"ha": "center", "fontsize": 9, "fontweight": weight, "bbox": LABEL_BOX}
            panel.annotate(text, (x, max(ratio["median"], 1)), (0, 5), textcoords="offset points", **style)
    panel.axhline(1, color="black", linewidth=1)
    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter("{x:g}" + TIMES)
    panel.yaxis.set_minor_locator(NullLocator())
    panel.set_xticks(range(len(results)), [result["case_title"] for result in results])
    panel.grid(axis="y", color="#dddddd", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def save(record: dict[str, Any], folder: Path) -> None:
    """Writes the figures, and the chart where matplotlib is installed."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "compare.json").write_text(json.dumps(record, indent=1) + "\n")
    if importlib.util.find_spec("matplotlib") is None:
        print("The chart is left out: this Python has no matplotlib.")
    else:
        chart(record, folder / "compare.png")
    print(f"Written to {folder}.")


# ---- command line ---------------------------------------------------------------------------------------


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options, with defaults that depend on others filled in."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer, shorter rounds, without the large cases")
    parser.add_argument("--cases", nargs="+", choices=CASES, metavar="CASE", help=", ".join(CASES))
    names = list(OPTIMIZERS)
    parser.add_argument("--optimizers", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--rounds", type=int, help="turns of each entrant (default 9, quick 3)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of roptim and torch (default: all cores)")
    lent = os.environ.get("ROPTIM_BENCH_TORCH_PYTHON") or None
    text = "interpreter with torch and NumPy (default: $ROPTIM_BENCH_TORCH_PYTHON, else this one)"
    parser.add_argument("--torch-python", default=lent, metavar="PATH", help=text)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output", help="folder for the results")
    options = parser.parse_args(arguments)
    options.cases = options.cases or [name for name, case in CASES.items() if not (options.quick and case.large)]
    options.rounds = options.rounds or (3 if options.quick else 9)
    options.turn_secs = 0.05 if options.quick else 0.3
    return options


def compare(options: argparse.Namespace, worker: Worker | None) -> dict[str, Any]:
    """Measures every case with every optimizer, printing each result when it is there."""
    settings = {name: getattr(options, name) for name in ("threads", "rounds", "turn_secs", "quick")}
    record: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "machine": machine(worker),
        "settings": settings,
        "results": [],
    }
    print(heading(record), end="\n\n")
    for optimizer in options.optimizers:
        for name in options.cases:
            labels = {"case": name, "case_title": CASES[name].title}
            labels |= {"optimizer": optimizer, "optimizer_title": OPTIMIZERS[optimizer].title}
            result = labels | measure(CASES[name], optimizer, options, worker)
            gc.collect()
            print("\n".join(table(result)), flush=True)
            record["results"].append(result)
    print("*: the fastest of torch's modes. differ by: the largest relative difference between a peer's parameters and")
    print(f"roptim's after {WARM_UP_STEPS} steps, on a sample. NumPy's arithmetic runs on one thread.")
    return record


def main(arguments: list[str] | None = None) -> None:
    """Runs the benchmark."""
    options = parse(arguments)
    worker = torch_worker(options.torch_python, options.threads)
    gc.disable()
    try:
        save(compare(options, worker), options.output)
    finally:
        if worker is not None:
            worker.close()


if __name__ == "__main__":
    if sys.argv[1:] == ["--worker"]:
        serve()
    else:
        main()
