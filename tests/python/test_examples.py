"""The examples run, and do what they say."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import roptim
from roptim import lr_scheduler, schedules, swa_utils
from roptim.optimizer import REGISTRY

EXAMPLES = Path(__file__).parents[2] / "examples"
SCHEDULES_PAGE = Path(__file__).parents[2] / "docs" / "schedules.md"

Load = Callable[[str], Any]
Output = pytest.CaptureFixture[str]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Load:
    """Imports an example by its name."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


@pytest.fixture
def demo_libraries() -> None:
    """Skips where what digits.py reads, draws or shows with is not installed."""
    for name in ("sklearn", "matplotlib", "tqdm"):
        pytest.importorskip(name)


@pytest.fixture
def digits(demo_libraries: None, load: Load) -> Any:
    """The example as a module."""
    return load("digits")


def check_gradients(loss: Callable[[], float], params: Mapping[str, Any], gradients: Mapping[str, Any]) -> None:
    """Compares with difference quotients of the loss, in a random direction per parameter.

    The parameters are float64, where a quotient over a small step is good to many digits.
    """
    assert params.keys() == gradients.keys()
    rng = np.random.default_rng(2)
    for name, p in params.items():
        assert p.dtype == np.float64
        assert gradients[name].shape == p.shape
        start, direction, h = np.array(p), rng.standard_normal(p.shape), 1e-6
        p[...] = start + h * direction
        above = loss()
        p[...] = start - h * direction
        below = loss()
        p[...] = start
        want = (above - below) / (2 * h)
        assert np.sum(gradients[name] * direction) == pytest.approx(want, rel=1e-5, abs=1e-8), name


def scatter(params: Mapping[str, Any]) -> None:
    """Random values, because at the examples' first ones some gradients are zero."""
    rng = np.random.default_rng(3)
    for p in params.values():
        p[...] = 0.5 * rng.standard_normal(p.shape)


def test_the_readme_names_every_example() -> None:
    readme = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for path in EXAMPLES.glob("*.py"):
        assert path.name in readme


# ---- digits.py ----------------------------------------------------------------------------------------------


def run_digits(output: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / "digits.py"), "--epochs", "3", "--output", str(output), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.usefixtures("demo_libraries")
def test_digits_trains_resumes_on_the_same_bits_and_plots(tmp_path: Path) -> None:
    done = run_digits(tmp_path, "--min-accuracy", "85")
    assert done.returncode == 0, done.stderr
    assert "same bits" in done.stdout
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")


def test_digits_fails_below_the_accuracy_bar_and_on_different_bits(
    digits: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    def tampered(path: Path, options: Any) -> Any:
        saved = roptim.load(path)
        run = digits.restore(saved, {})
        digits.train(run, digits.load_data(), "resumed")
        np.nextafter(run.model["b1"].data, np.float32(1), out=run.model["b1"].data)
        return digits.checkpoint(run)

    monkeypatch.setattr(digits, "resume_in_fresh_process", tampered)
    options = ["--epochs", "2", "--output", str(tmp_path), "--min-accuracy"]
    assert digits.main([*options, "0"]) == 1
    assert "DIFFERENT BITS" in capsys.readouterr().out

    monkeypatch.setattr(digits, "fingerprint", lambda tree: "")
    assert digits.main([*options, "0"]) == 0
    assert digits.main([*options, "100"]) == 1


def test_digits_says_what_is_missing_where_there_is_no_gpu(
    digits: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise roptim.NoAdapterError("AdamW: no adapter")

    monkeypatch.setattr(roptim, "AdamW", refuse)
    assert digits.main(["--backend", "gpu", "--output", str(tmp_path)]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "AdamW: no adapter"
    assert "--backend cpu" in said[1]
    assert len(said) == 2


def test_digits_backpropagation_agrees_with_difference_quotients(digits: Any) -> None:
    model = {name: roptim.Parameter(p.data.astype(np.float64)) for name, p in digits.new_model(seed=1).items()}
    rng = np.random.default_rng(2)
    images, labels = rng.random((20, digits.SIZES[0])), rng.integers(0, digits.SIZES[-1], 20)

    def loss() -> float:
        return digits.cross_entropy(digits.forward(model, images)[-1], labels)[0]

    outputs = digits.forward(model, images)
    digits.backward(model, outputs, digits.cross_entropy(outputs[-1], labels)[1])
    check_gradients(loss, model, {name: p.grad for name, p in model.items()})


# ---- linear_regression.py -----------------------------------------------------------------------------------


def test_linear_regression_reaches_the_least_squares_solution_with_every_optimizer(load: Load, capsys: Output) -> None:
    example = load("linear_regression")
    assert example.main([]) == 0
    said = capsys.readouterr().out
    for name in REGISTRY:
        row = re.search(rf"^{name} +\S+ +\d+ +\d+ +\S+ +(\S+)$", said, re.MULTILINE)
        assert row is not None, name
        assert float(row[1]) <= example.GOAL, name
    # Solves the normal equations: the gradient is zero there.
    x, y = example.make_data()
    gradients = example.loss_and_gradients(example.least_squares(x, y), x, y)[1]
    assert max(np.abs(g).max() for g in gradients.values()) < 1e-12


def test_linear_regression_fails_after_too_few_steps(load: Load, capsys: Output) -> None:
    assert load("linear_regression").main(["--steps", "2"]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert "farther than" in last
    assert "SGD" in last


def test_linear_regression_gradients_agree_with_difference_quotients(load: Load) -> None:
    example = load("linear_regression")
    x, y = example.make_data()
    params = {"W": np.zeros((5, 3)), "b": np.zeros(3)}
    scatter(params)
    loss, gradients = example.loss_and_gradients(params, x, y)
    assert loss > 0.1
    check_gradients(lambda: example.loss_and_gradients(params, x, y)[0], params, gradients)


# ---- lbfgs_closure.py ---------------------------------------------------------------------------------------


def test_lbfgs_closure_needs_fewest_evaluations(load: Load, capsys: Output) -> None:
    assert load("lbfgs_closure").main([]) == 0
    rows = (line.split() for line in capsys.readouterr().out.splitlines()[1:])
    steps, evaluations = {}, {}
    for name, count, needed, smallest in rows:
        steps[name], evaluations[name] = int(count), int(needed)
        assert float(smallest) <= 1e-4
    assert evaluations["LBFGS"] < evaluations["AdamW"] / 2
    assert evaluations["ConjugateGradient"] < evaluations["AdamW"]
    assert evaluations["AdamW"] == steps["AdamW"]
    assert evaluations["LBFGS"] > steps["LBFGS"]


def test_lbfgs_closure_fails_where_the_goal_is_not_reached(load: Load, capsys: Output) -> None:
    assert load("lbfgs_closure").main(["--evaluations", "50"]) == 1
    assert capsys.readouterr().out.count("not reached") == 3


def test_lbfgs_closure_gradients_agree_with_difference_quotients(load: Load) -> None:
    example = load("lbfgs_closure")
    model, (x, y) = example.new_model(), example.make_data()
    scatter(model)
    example.loss_and_gradients(model, x, y)
    gradients = {name: p.grad for name, p in model.items()}
    check_gradients(lambda: example.loss_and_gradients(model, x, y), model, gradients)


# ---- transfer_learning.py -----------------------------------------------------------------------------------


def test_transfer_learning_gets_better_from_stage_to_stage(
    load: Load, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    example = load("transfer_learning")
    train, stages = example.train, []

    def spy(optimizer: roptim.Optimizer, body: Any, *rest: Any) -> None:
        stages.append((body["W"].requires_grad, [group["lr"] for group in optimizer.param_groups]))
        train(optimizer, body, *rest)

    monkeypatch.setattr(example, "train", spy)
    assert example.main([]) == 0
    frozen_stage, fine_stage = (False, [example.LR]), (True, [example.LR, example.BODY_LR])
    assert stages == [(True, [example.LR]), (True, [example.LR]), frozen_stage, fine_stage]
    scratch, frozen, tuned = (float(text) for text in re.findall(r" ([\d.]+)%$", capsys.readouterr().out, re.M)[1:])
    assert 0 < tuned < frozen / 2 < scratch / 4


def test_transfer_learning_leaves_a_frozen_body_alone(load: Load) -> None:
    example = load("transfer_learning")
    rng = np.random.default_rng(0)
    data = example.make_tasks(rng)[1]
    body, head = example.new_body(rng), example.new_head(2)
    before = {name: np.array(p) for name, p in body.items()}
    optimizer = roptim.Adam([*body.values(), *head.values()])

    def unchanged() -> list[bool]:
        return [np.array_equal(p, before[name]) for name, p in body.items()]

    for p in body.values():
        p.requires_grad = False
    example.train(optimizer, body, head, data, 3, rng)
    assert all(unchanged())
    assert all(p.grad is None for p in body.values())
    assert all(np.any(p) for p in head.values())
    for p in body.values():
        p.requires_grad = True
    example.train(optimizer, body, head, data, 1, rng)
    assert not any(unchanged())


def test_transfer_learning_gradients_agree_with_difference_quotients(load: Load) -> None:
    example = load("transfer_learning")
    rng = np.random.default_rng(0)
    x, y = example.make_tasks(rng)[1]
    body, head = example.new_body(rng), example.new_head(2)
    for layer in (body, head):
        scatter(layer)
    example.loss_and_gradients(body, head, x, y)
    for layer in (body, head):
        gradients = {name: p.grad for name, p in layer.items()}
        check_gradients(lambda: example.loss_and_gradients(body, head, x, y), layer, gradients)


# ---- clipping.py --------------------------------------------------------------------------------------------


def test_clipping_is_what_lets_the_recurrent_network_learn(load: Load, capsys: Output) -> None:
    example = load("clipping")
    assert example.main([]) == 0
    *_, last_losses, usual, largest = capsys.readouterr().out.splitlines()
    without, clipped = map(float, last_losses.split()[-2:])
    assert clipped < example.GUESSING / 10
    assert without > 10 * clipped
    for norm, many_times in zip(usual.split()[-2:], largest.split()[-2:], strict=True):
        assert float(many_times) > 3 * float(norm)


def test_clipping_fails_where_nothing_was_learned_yet(load: Load) -> None:
    assert load("clipping").main(["--steps", "10"]) == 1


def test_clipping_backpropagation_through_time_agrees_with_difference_quotients(load: Load) -> None:
    example = load("clipping")
    rng = np.random.default_rng(0)
    model = example.new_model(rng)
    scatter(model)
    x, y = example.new_batch(rng)
    x[...] = rng.standard_normal(x.shape)  # zeros after the first step would leave most of U's gradient untested

    def loss() -> float:
        return float(np.mean((example.forward(model, x)[1] - y) ** 2))

    hidden, answer = example.forward(model, x)
    example.backward(model, x, hidden, 2 * (answer - y) / len(y))
    check_gradients(loss, model, {name: p.grad for name, p in model.items()})


# ---- accumulation.py ----------------------------------------------------------------------------------------


def test_accumulation_is_the_large_batch(load: Load, capsys: Output) -> None:
    example = load("accumulation")
    assert example.main([]) == 0
    assert "weighted" in capsys.readouterr().out

    # Against a loop that gives each large batch's gradient to the step as it is.
    plain, rng = example.new_model(seed=0), np.random.default_rng(1)
    optimizer = roptim.AdamW(plain, lr=1e-2)
    for _ in range(50):
        optimizer.step(example.loss_and_gradients(plain, *example.new_batch(rng))[1])
    whole, parts, alike = (example.train(50, *how)[0] for how in ((1,), (7,), (7, False)))
    for name, p in plain.items():
        for same in (whole, parts):
            np.testing.assert_allclose(same[name].data, p.data, rtol=0, atol=1e-12)
        assert np.abs(alike[name].data - p.data).max() > 1e-6


def test_accumulation_gradients_agree_with_difference_quotients(load: Load) -> None:
    example = load("accumulation")
    model, (x, y) = example.new_model(seed=1), example.new_batch(np.random.default_rng(0))
    scatter(model)
    gradients = example.loss_and_gradients(model, x, y)[1]
    check_gradients(lambda: example.loss_and_gradients(model, x, y)[0], model, gradients)


# ---- plateau.py ---------------------------------------------------------------------------------------------


def test_plateau_drops_the_rate_where_the_loss_stalls_and_ends_lower(load: Load, capsys: Output) -> None:
    example = load("plateau")
    assert example.main([]) == 0
    drops = [int(epoch) for epoch in re.findall(r"^epoch +(\d+):", capsys.readouterr().out, re.M)]
    assert len(drops) >= 3

    # When six epochs in a row were not better than the best by a ten-thousandth.
    want, best, bad = [], np.inf, 0
    for epoch, loss in enumerate(example.train(drops[-1], schedule=True), start=1):
        best, bad = (loss, 0) if loss < best * (1 - 1e-4) else (best, bad + 1)
        if bad == 6:
            want, bad = [*want, epoch], 0
    assert drops == want


def test_plateau_fails_where_the_rate_never_dropped(load: Load) -> None:
    assert load("plateau").main(["--epochs", "2"]) == 1


def test_plateau_gradients_agree_with_difference_quotients(load: Load) -> None:
    example = load("plateau")
    x, y = example.make_data(np.random.default_rng(0))[0]
    params = {"w": np.zeros(example.INPUTS), "b": np.zeros(1)}
    scatter(params)
    gradients = example.loss_and_gradients(params, x, y)[1]
    check_gradients(lambda: example.loss_and_gradients(params, x, y)[0], params, gradients)


# ---- checkpoint.py ------------------------------------------------------------------------------------------


def test_checkpoint_resumes_a_killed_run_on_the_same_bits(load: Load, capsys: Output) -> None:
    assert load("checkpoint").main([]) == 0
    said = capsys.readouterr().out
    assert "killed; checkpoints of steps [" in said
    assert "times: same bits at the end" in said
    assert "resumed from step 980" in said
    assert "the file is damaged" in said


def test_checkpoint_fails_on_different_bits(load: Load, monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    example = load("checkpoint")

    def other(folder: Path, moments: Any) -> int:
        with monkeypatch.context() as patch:
            patch.setattr(example.np.random, "default_rng", lambda seed: np.random.Generator(np.random.PCG64(1)))
            example.train(folder)
        return 0

    monkeypatch.setattr(example, "train_and_be_killed", other)
    assert example.main([]) == 1
    assert "DIFFERENT BITS" in capsys.readouterr().out


@pytest.mark.parametrize("part", ["rng", "params", "optimizer", "scheduler", None])
def test_checkpoint_needs_all_that_it_saves(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str | None
) -> None:
    example = load("checkpoint")
    example.train(tmp_path / "end")
    with monkeypatch.context() as patch:
        patch.setattr(example, "STEPS", example.STEPS // 2)
        example.train(tmp_path / "halfway")
    series = roptim.Checkpointer(tmp_path / "halfway", keep=None)
    step, _, saved = series.latest()
    if part is not None:
        roptim.save({part: example.new_run()[part]}, tmp_path / "fresh")
        series.save(step, {**saved, **roptim.load(tmp_path / "fresh")})
    example.train(tmp_path / "halfway")
    ends = [(tmp_path / name / series.path(example.STEPS).name).read_bytes() for name in ("halfway", "end")]
    assert (ends[0] == ends[1]) == (part is None)


# ---- trajectories.py ----------------------------------------------------------------------------------------


def test_trajectories_draws_the_same_picture_each_time(load: Load, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    example = load("trajectories")
    pictures = [tmp_path / "first.png", tmp_path / "second.png"]
    for picture in pictures:
        assert example.main(["--output", str(picture)]) == 0
    first, second = (picture.read_bytes() for picture in pictures)
    assert first == second
    assert first.startswith(b"\x89PNG")
    assert len(first) < 300_000


def test_trajectories_shows_every_optimizer_that_a_point_can_have(load: Load) -> None:
    pytest.importorskip("matplotlib")
    example = load("trajectories")
    shown = example.drawn()
    assert len(shown) >= 12
    for name in REGISTRY:
        point = example.START.copy()
        try:
            getattr(roptim, name)([point]).step([example.gradient(point)])
        except roptim.RoptimError:
            assert name not in shown
        else:
            assert name in shown
            assert example.best_run(name, {}).distance < 0.5


def test_trajectories_gradient_agrees_with_difference_quotients(load: Load) -> None:
    pytest.importorskip("matplotlib")
    example = load("trajectories")
    point = example.START.copy()
    check_gradients(lambda: float(example.loss(*point)), {"point": point}, {"point": example.gradient(point)})
    np.testing.assert_allclose(example.gradient(example.MINIMUM), 0, atol=1e-15)


# ---- one_cycle.py -------------------------------------------------------------------------------------------


@pytest.fixture
def one_cycle(demo_libraries: None, load: Load) -> Any:
    """The example as a module."""
    return load("one_cycle")


def test_one_cycle_ends_lower_than_constant_rates_and_plots(one_cycle: Any, tmp_path: Path, capsys: Output) -> None:
    assert one_cycle.main(["--seeds", "2", "--epochs", "10", "--output", str(tmp_path)]) == 0
    assert (tmp_path / one_cycle.PICTURE).read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    peak = float(re.search(r"falls fastest at (\S+)", said).group(1))
    assert 0.01 < peak < 1
    # Means of the test loss after the last epoch, and of the averaged parameters.
    cycle, suggested, third = re.findall(r"^(?:one cycle, peak|constant,) \S+ +(\S+) +\S+ +(\S+) +\S+$", said, re.M)
    assert float(cycle[0]) < min(float(suggested[0]), float(third[0]))
    assert float(suggested[1]) < float(suggested[0])
    assert said.count("is lower than") == 2


def test_one_cycle_fails_where_the_cycle_is_no_better(
    one_cycle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    # Instead of the cycle a rate with which little is learned.
    monkeypatch.setattr(one_cycle, "one_cycle", lambda steps, peak, **others: schedules.constant(1e-3 * peak))
    assert one_cycle.main(["--seeds", "1", "--epochs", "4", "--output", str(tmp_path)]) == 1
    assert capsys.readouterr().out.count("NOT LOWER") == 2


def test_one_cycle_trains_with_the_schedules_values(one_cycle: Any) -> None:
    data = one_cycle.load_data()
    runs = one_cycle.train_all(data, seeds=1, epochs=4, peak=0.05)
    run = runs[one_cycle.CYCLE][0]
    updates = len(run.lr)
    assert updates == 4 * -(-len(data.train_labels) // 32)
    assert run.lr == schedules.one_cycle(updates, 0.05).values(updates).tolist()
    assert max(run.lr) == pytest.approx(0.05, rel=1e-3)
    momenta = [max(run.momentum), run.momentum[np.argmax(run.lr)], run.momentum[-1]]
    assert momenta == pytest.approx([0.95, min(run.momentum), 0.95], abs=1e-12)
    assert min(run.momentum) == pytest.approx(0.85, abs=1e-4)
    # Of four epochs the last one is averaged: the average is what it ended with.
    for each in runs.values():
        assert each[0].averaged == each[0].results[-1]
        assert len(each[0].results) == 4
    assert runs[one_cycle.THIRD][0].lr == [0.05 / 3] * updates


def test_one_cycle_averages_the_last_quarter(one_cycle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Watched(one_cycle.AveragedModel):
        def update_parameters(self, model: Any) -> None:
            super().update_parameters(model)
            seen.append({name: p.data.copy() for name, p in model.items()})
            for name, average in self.module.items():
                want = np.mean([each[name] for each in seen], axis=0)
                np.testing.assert_allclose(average.data, want, rtol=0, atol=1e-6)

    monkeypatch.setattr(one_cycle, "AveragedModel", Watched)
    one_cycle.train(one_cycle.load_data(), 0, 8, 0.05, 0.9)
    assert len(seen) == 2


# ---- schedules.py -------------------------------------------------------------------------------------------


def test_schedules_draws_the_same_pictures_each_time(load: Load, tmp_path: Path, capsys: Output) -> None:
    pytest.importorskip("matplotlib")
    example = load("schedules")
    for folder in ("first", "second"):
        assert example.main(["--output", str(tmp_path / folder)]) == 0
    for name in (example.SCHEDULES_PICTURE, example.SCHEDULERS_PICTURE):
        first, second = ((tmp_path / folder / name).read_bytes() for folder in ("first", "second"))
        assert first == second
        assert first.startswith(b"\x89PNG")
        assert len(first) < 300_000
        assert name in SCHEDULES_PAGE.read_text(encoding="utf-8")
        assert (SCHEDULES_PAGE.parent / name).is_file()


def test_schedules_shows_every_scheduler(load: Load) -> None:
    pytest.importorskip("matplotlib")
    shown = [re.match(r"[\w.]+", panel.call).group() for panel in load("schedules").PANELS]
    assert len(shown) == len(set(shown))
    assert set(shown) == set(lr_scheduler.__all__) - {"LRScheduler"} | {"swa_utils.SWALR"}


def test_schedules_notes_are_true(load: Load) -> None:
    pytest.importorskip("matplotlib")
    example = load("schedules")
    calls = {panel.call.split("(")[0]: panel.call for panel in example.PANELS}
    rates = {name: example.learning_rates(call) for name, call in calls.items()}
    for name, values in rates.items():
        assert len(values) == example.EPOCHS, name
        assert np.all((values >= 0) & (values <= 1 + 1e-12)), name
        assert np.ptp(values) > 0.4, name
    cosine = rates["CosineAnnealingLR"]
    assert (np.diff(cosine[:51]) < 0).all()
    assert (np.diff(cosine[50:]) > 0).all()
    assert np.flatnonzero(np.diff(rates["ReduceLROnPlateau"]))[0] == example.STALL + 8
    for name in ("CyclicLR", "OneCycleLR"):
        momenta = np.array(in_epochs(calls[name], "momentum", example.EPOCHS))
        assert np.corrcoef(momenta, rates[name])[0, 1] < -0.999
    assert {panel.note for panel in example.PANELS} == {
        "",
        "rises again after T_max",
        "momentum goes the other way",
        f"the loss falls until epoch {example.STALL}",
    }


# ---- docs/schedules.md --------------------------------------------------------------------------------------


def test_the_code_of_the_page_on_schedules_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", SCHEDULES_PAGE.read_text(encoding="utf-8"), re.S)
    assert len(blocks) >= 4
    namespace: dict[str, Any] = {}
    for block in blocks:
        exec(block, namespace)


def conversions(table: str) -> list[tuple[str, str]]:
    """Scheduler and value of each row of a table of the page."""
    page = SCHEDULES_PAGE.read_text(encoding="utf-8")
    body = re.search(rf"<!-- {table}:.*?-->\n(.*?)\n<!-- end of {table} -->", page, re.S).group(1)
    return [re.findall(r"`([^`]+)`", row)[:2] for row in body.splitlines()[2:]]


def in_epochs(call: str, key: str, epochs: int) -> list[float]:
    """What a scheduler of torch's makes of lr 0.1 or of the momentum."""
    opt = roptim.SGD([np.zeros(1)], lr=0.1, momentum=0.9)
    opt.step([np.zeros(1)])
    known = {**vars(lr_scheduler), "swa_utils": swa_utils, "opt": opt, "f": lambda t: 1 / (1 + t / 20)}
    scheduler = eval(call, known)
    values = [opt.param_groups[0][key]]
    for _ in range(epochs - 1):
        scheduler.step()
        values.append(opt.param_groups[0][key])
    return values


@pytest.mark.parametrize(("call", "value"), conversions("conversions"))
def test_a_scheduler_has_a_value_with_the_same_values(call: str, value: str) -> None:
    # The cosine is the same to T_max, where the curve of torch's turns up.
    epochs = 51 if call.startswith("CosineAnnealingLR") else 100
    schedule = eval(value, {**vars(schedules), "lr": 0.1, "f": lambda t: 1 / (1 + t / 20)})
    assert in_epochs(call, "lr", epochs) == pytest.approx([schedule(t) for t in range(epochs)], rel=1e-12)
    if epochs < 100:
        later = in_epochs(call, "lr", 100)
        assert later[75] > 2 * schedule(75) == 2 * schedule(50)


@pytest.mark.parametrize(("call", "value"), conversions("momenta"))
def test_a_cycled_momentum_has_a_value_with_the_same_values(call: str, value: str) -> None:
    momentum = eval(value, vars(schedules))
    got = in_epochs(call, "momentum", 100)
    assert got == pytest.approx([momentum(t) for t in range(100)], rel=1e-12)
    assert max(got) - min(got) > 0.09


def test_every_scheduler_has_a_row_or_a_reason() -> None:
    rows = {re.match(r"[\w.]+", call).group() for call, _ in conversions("conversions")}
    assert rows == set(lr_scheduler.__all__) - {"LRScheduler", "ReduceLROnPlateau"} | {"swa_utils.SWALR"}
    assert "`ReduceLROnPlateau` has no counterpart" in SCHEDULES_PAGE.read_text(encoding="utf-8")
