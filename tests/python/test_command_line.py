"""``python -m roptim``: what it prints, and what it refuses."""

from __future__ import annotations

import ast
import inspect
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import roptim
from roptim import schedules
from roptim.__main__ import main
from roptim._gallery import UPDATES, examples, printable, text_plot
from roptim.optimizer import REGISTRY
from roptim.schedules import Schedule

Output = pytest.CaptureFixture[str]

FUNCTIONS = [name for name in schedules.__all__ if name != "Schedule"]
NAMESPACE = {name: getattr(schedules, name) for name in schedules.__all__}
BARS = "▁▂▃▄▅▆▇█"


def run(capsys: Output, *arguments: str) -> str:
    assert main(list(arguments)) == 0
    return capsys.readouterr().out


def refused(capsys: Output, *arguments: str) -> str:
    with pytest.raises(SystemExit) as exit_:
        main(list(arguments))
    assert exit_.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    return said.err


def process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "roptim", *arguments]
    return subprocess.run(command, capture_output=True, env={**os.environ, **environment}, timeout=60)


# ---- the examples -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_has_an_example(name: str) -> None:
    assert any(call.startswith(f"{name}(") for call, _ in examples())


def test_what_is_public_is_in_all() -> None:
    functions = {
        name
        for name, value in vars(schedules).items()
        if inspect.isfunction(value) and value.__module__ == "roptim.schedules" and not name.startswith("_")
    }
    assert functions == set(FUNCTIONS)


@pytest.mark.parametrize("way", [r"\.then\(", r"\.clip\(", r"\.shift\(", r" \* ", r"^sequence\("])
def test_every_way_to_join_schedules_has_an_example(way: str) -> None:
    assert any(re.search(way, call) for call, _ in examples())


def test_examples_are_different_and_end_with_what_is_drawn() -> None:
    shown = examples()
    assert len({schedule for _, schedule in shown}) == len(shown)
    for call, schedule in shown:
        assert schedule.length is None or schedule.length <= UPDATES, call
        assert np.isfinite(schedule.values(2 * UPDATES)).all(), call


# ---- schedules ----------------------------------------------------------------------------------------------


def test_schedules_lists_each_with_its_curve_and_ends(capsys: Output) -> None:
    *lines, explanation = run(capsys, "schedules").splitlines()
    assert len(lines) == len(examples())
    for line, (call, schedule) in zip(lines, examples(), strict=True):
        curve, first, last, shown_call = re.fullmatch(r"(\S+)  (\S+) to (\S+) +(.*)", line).groups()
        assert curve == schedule.sparkline()
        assert float(first) == pytest.approx(schedule(0), rel=5e-3)
        assert float(last) == pytest.approx(schedule(schedule.length or UPDATES), rel=5e-3)
        assert shown_call == call
    assert str(UPDATES) in explanation


def called(call: str) -> set[str]:
    """The functions that an expression calls."""
    calls = [node.func for node in ast.walk(ast.parse(call, mode="eval")) if isinstance(node, ast.Call)]
    return {function.id for function in calls if isinstance(function, ast.Name)}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_schedules_of_a_name_shows_what_has_it(name: str, capsys: Output) -> None:
    blocks = run(capsys, "schedules", name).strip("\n").split("\n\n")
    shown = [block.splitlines()[0] for block in blocks]
    assert shown == [call for call, _ in examples() if name in called(call)]
    for block in blocks:
        call, about, *plot = block.splitlines()
        schedule = eval(call, dict(NAMESPACE))
        end = UPDATES if schedule.length is None else schedule.length
        length = "without end" if schedule.length is None else f"length {end}"
        assert about == f"{length}; {schedule(0):.4g} at update 0, {schedule(end):.4g} at update {end}"
        assert "\n".join(plot) == text_plot(schedule, end + 1)


def heights(plot: str) -> tuple[float, float, list[int], int]:
    """What a reader sees: the largest and smallest value, each column in eighths, the last update."""
    *rows, axis = plot.splitlines()
    margin = axis.index("0") - 1
    columns = [row[margin + 1 :].ljust(64) for row in rows]
    assert {row[margin] for row in rows} == {"|"}
    eighths = [sum(BARS.find(bar) + 1 for bar in column) for column in zip(*columns, strict=True)]
    return float(rows[0][: margin - 1]), float(rows[-1][: margin - 1]), eighths, int(axis.split()[-1])


@pytest.mark.parametrize("example", examples(), ids=lambda example: example.call)
def test_the_plot_has_the_values(example: tuple[str, Schedule]) -> None:
    schedule = example[1]
    high, low, eighths, last = heights(text_plot(schedule, UPDATES + 1))
    values = schedule.values(UPDATES + 1)
    assert (high, low) == pytest.approx((values.max(), values.min()), rel=1e-3)
    assert last == UPDATES
    assert len(eighths) == 64
    spread = values.max() - values.min()
    for column, height in enumerate(eighths):
        value = schedule(column * UPDATES // 63)
        want = 1 + 47 * (value - values.min()) / spread if spread else 1
        assert abs(height - want) <= 0.5 + 1e-9


def test_the_plot_has_no_gaps_below_a_bar() -> None:
    rows = [row[8:].ljust(64) for row in text_plot(schedules.cosine(1000, peak=0.1234, floor=0.1), 1001).splitlines()]
    for column in zip(*rows[:-1], strict=True):
        assert re.fullmatch(r" *[▁▂▃▄▅▆▇█]?█*", "".join(column))


@pytest.mark.parametrize(
    "schedule",
    [
        schedules.exponential(2.0, steps=3000),  # infinite from update 1024 on
        schedules.cosine(2**64 - 1),
        schedules.linear(-1.7e308, 1.7e308, 10),
        schedules.constant(0.0, 1),
        schedules.constant(-1e-320),
    ],
    ids=lambda schedule: schedule.to_json(),
)
def test_no_schedule_is_too_much_for_the_plot(schedule: Schedule, capsys: Output) -> None:
    call, about, *plot = run(capsys, "schedules", "--json", schedule.to_json()).splitlines()
    assert eval(call, dict(NAMESPACE)) == schedule
    assert about
    assert len(plot) == 7
    assert "nan" not in "".join(plot)


def test_values_that_are_not_finite_are_left_out() -> None:
    high, low, eighths, _ = heights(text_plot(schedules.exponential(2.0, steps=3000), 3001))
    assert low == 1
    assert math.isfinite(high)
    assert min(eighths[:21]) > 0
    assert set(eighths[23:]) == {0}


@pytest.mark.parametrize("example", examples(), ids=lambda example: example.call)
def test_json_is_what_a_state_holds(example: tuple[str, Schedule], capsys: Output) -> None:
    schedule = example[1]
    opt = roptim.SGD([np.zeros(1)], lr=schedule)
    text = opt.state_dict()["roptim"]["schedules"][0]["lr"]
    call, *_ = run(capsys, "schedules", "--json", text).splitlines()
    assert eval(call, dict(NAMESPACE)) == schedule


def test_updates_says_how_far(capsys: Output) -> None:
    text = schedules.step(5000, 0.5).to_json()
    _, about, *plot = run(capsys, "schedules", "--json", text, "--updates", "10001").splitlines()
    assert about == "without end; 1 at update 0, 0.25 at update 10000"
    assert plot[-1].split() == ["0", "10000"]
    assert run(capsys, "schedules", "cosine", "--updates", "1").count("at update 0, ") == 4


def test_what_is_no_schedule_is_refused(capsys: Output) -> None:
    for text in ("", "x", "__import__('os')", "cosine(3)", "[]", '{"cosine": {"steps": 0, "peak": 1, "floor": 0}}'):
        assert "schedules." in refused(capsys, "schedules", "--json", text).splitlines()[-1]
    assert "invalid choice: 'Schedule'" in refused(capsys, "schedules", "Schedule")
    assert "invalid choice: 'cosine(3)'" in refused(capsys, "schedules", "cosine(3)")
    assert "not allowed with" in refused(capsys, "schedules", "cosine", "--json", "{}")
    for number in ("0", "-1", "x", "1.5", "", str(2**64)):
        assert "--updates: must be a whole number >= 1" in refused(capsys, "schedules", "cosine", f"--updates={number}")


# ---- checkpoints --------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A directory with checkpoints of a run that has every kind of thing in it."""
    params = {"layer": {"W": np.ones((3, 2), np.float32)}, "b": np.zeros(2, np.float32)}
    groups = [{"params": {"W": params["layer"]["W"]}}, {"params": {"b": params["b"]}, "weight_decay": 0.0}]
    opt = roptim.AdamW(groups, lr=schedules.cosine(100))
    opt.step([{"W": np.ones((3, 2), np.float32)}, {"b": None}])
    run = {"params": params, "optimizer": opt, "epoch": 7, "note": "a\x1b[31m", "nested": [(1, np.float64(2.5))]}
    checkpoints = roptim.Checkpointer(tmp_path / "run", keep=2)
    for step in (1, 2, 3):
        checkpoints.save(step, run)
    return tmp_path / "run"


def test_inspect_shows_a_checkpoint(saved: Path, capsys: Output) -> None:
    path = saved / "step-00000003.safetensors"
    name, about, checksum, *tree = run(capsys, "inspect", str(path)).splitlines()
    assert name == str(path)
    assert about == f"{path.stat().st_size:,} bytes, 88 of them in arrays"
    digits = path.read_bytes()[64:96].decode()
    assert checksum == f"checksum {digits}, as the file states"
    options = "betas=(0.9, 0.999), eps=1e-08, {}amsgrad=False, maximize=False, decoupled_weight_decay=True"
    assert tree == [
        "params:",
        "  layer:",
        "    W: float32 array (3, 2), 24 bytes",
        "  b: float32 array (2,), 8 bytes",
        "optimizer: AdamW, 1 updates, 0 left out",
        f"  group 0: lr=0.9997532801828658, {options.format('weight_decay=0.01, ')}",
        '    lr is a schedule: \'{"cosine":{"peak":1.0,"floor":0.0,"steps":100}}\'',
        "    W float32 (3, 2): step 1, exp_avg, exp_avg_sq; 48 bytes",
        f"  group 1: weight_decay=0.0, lr=0.9997532801828658, {options.format('')}",
        '    lr is a schedule: \'{"cosine":{"peak":1.0,"floor":0.0,"steps":100}}\'',
        "    b float32 (2,): no state",
        "epoch: 7",
        r"note: 'a\x1b[31m'",
        "nested:",
        "  [0]:",
        "    [0]: 1",
        "    [1]: float64 scalar (), 8 bytes",
    ]
    more = run(capsys, "inspect", str(path), "--all").splitlines()
    assert "      exp_avg_sq: float32 array (3, 2), 24 bytes" in more
    assert len(more) == 3 + len(tree) + 2


def test_inspect_shows_damage_and_says_so_in_its_exit_code(saved: Path, capsys: Output) -> None:
    path = saved / "step-00000003.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert main(["inspect", str(path)]) == 1
    said = capsys.readouterr().out
    assert "DAMAGED: the file states the checksum " in said
    assert "    W float32 (3, 2): step 1" in said, "what can be read is shown"
    (saved / "step-00000002.safetensors").write_bytes(b"PK\x03\x04 and more")
    roptim.save(1, saved / "step-00000001.safetensors")
    assert main(["inspect", str(saved)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(saved)
    assert lines[1].startswith("step-00000001.safetensors ")
    assert lines[1].endswith(" bytes  whole")
    assert "the file must be one that roptim wrote, got a zip archive" in lines[2]
    assert lines[3].endswith("DAMAGED: its checksum is wrong")


def test_inspect_of_what_is_no_checkpoint(tmp_path: Path, capsys: Output) -> None:
    assert "no checkpoints" in run(capsys, "inspect", str(tmp_path))
    assert "No such file" in refused(capsys, "inspect", str(tmp_path / "missing"))
    (tmp_path / "text").write_text("hello")
    assert "the file must be" in refused(capsys, "inspect", str(tmp_path / "text"))


def test_convert_goes_there_and_back(saved: Path, tmp_path: Path, capsys: Output) -> None:
    path = saved / "step-00000003.safetensors"
    text, back, arrays = tmp_path / "x.json", tmp_path / "back.ckpt", tmp_path / "x.npz"
    said = run(capsys, "convert", str(path), str(text))
    assert said == f"{text}: {text.stat().st_size:,} bytes\n"
    run(capsys, "convert", str(text), str(back))
    assert back.read_bytes() == path.read_bytes()
    run(capsys, "convert", str(path), str(arrays))
    with np.load(arrays) as found:
        assert set(found.files) == {
            *("params.layer.W", "params.b", "nested.0.1"),
            *("optimizer.state.0.exp_avg", "optimizer.state.0.exp_avg_sq"),
        }
    run(capsys, "convert", str(arrays), str(back))
    assert roptim.load(back)["params.b"].tolist() == [0, 0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back.ckpt", "run", "x.json", "x.npz"]


def test_convert_refuses_and_leaves_the_target(saved: Path, tmp_path: Path, capsys: Output) -> None:
    target = tmp_path / "target.json"
    target.write_text("old")
    broken = tmp_path / "broken.json"
    broken.write_text('{"a": 1, "a": 2}')
    assert 'the key "a" twice' in refused(capsys, "convert", str(broken), str(target))
    assert "No such file" in refused(capsys, "convert", str(tmp_path / "none.json"), str(target))
    assert "--names must be given with a file of torch" in refused(
        capsys, "convert", str(saved / "step-00000003.safetensors"), str(target), "--names", "a,b"
    )
    (tmp_path / "x.npz").write_bytes(b"nonsense")
    assert "could not be read as its suffix says" in refused(capsys, "convert", str(tmp_path / "x.npz"), str(target))
    assert target.read_text() == "old"
    assert not list(tmp_path.glob("*.tmp"))


HOSTILE = "\x1b[2J\x9b\u202e\n"
GROUP = {"lr": 0.1, "params": [0]}


@pytest.mark.parametrize(
    "about",
    [
        {"optimizer": HOSTILE, "update_count": HOSTILE, "skip_count": HOSTILE},
        {"parameters": {0: {"shape": HOSTILE, "dtype": HOSTILE}}},
        {"parameters": [1], "schedules": [1]},
        {"parameters": {0: 3}, "schedules": {0: {HOSTILE: HOSTILE}}},
        3,
    ],
)
@pytest.mark.parametrize(
    "group",
    [GROUP, {**GROUP, "params": [[0], HOSTILE]}, {**GROUP, "param_names": 3}, {**GROUP, "param_names": [[HOSTILE]]}],
)
def test_inspect_of_hostile_states_is_harmless(tmp_path: Path, capsys: Output, about: Any, group: Any) -> None:
    state = {0: {"step": HOSTILE, HOSTILE: np.ones(2)}}
    run_ = {"optimizer": {"state": state, "param_groups": [group], "roptim": about}, HOSTILE: {HOSTILE: np.ones(1)}}
    roptim.save(run_, tmp_path / "hostile")
    said = run(capsys, "inspect", str(tmp_path / "hostile"), "--all")
    assert said.replace("\n", "").isprintable()
    assert r"\x1b[2J\x9b\u202e\n" in said


def test_errors_and_reports_are_harmless(tmp_path: Path) -> None:
    state = roptim.SGD({HOSTILE: np.ones(2)}).state_dict()
    opt = roptim.SGD({"a": np.ones(2)})
    with pytest.raises(ValueError, match="a surplus") as raised:
        opt.load_state_dict(state)
    assert str(raised.value).isprintable()
    report = opt.load_state_dict(state, strict=False)
    assert "\x1b" not in str(report)
    state["roptim"]["optimizer"] = HOSTILE
    with pytest.raises(ValueError, match="state must be of SGD, got of") as raised:
        opt.load_state_dict(state)
    assert "\x1b" not in str(raised.value)


def test_convert_leaves_other_files_alone(saved: Path, tmp_path: Path, capsys: Output) -> None:
    path, target, other = saved / "step-00000003.safetensors", tmp_path / "o.json", tmp_path / "o.json.tmp"
    other.write_text("precious")
    target.write_text("old")
    target.chmod(0o600)
    run(capsys, "convert", str(path), str(target))
    assert other.read_text() == "precious"
    assert target.stat().st_mode & 0o777 == 0o600
    (tmp_path / "link.json").symlink_to(target)
    run(capsys, "convert", str(path), str(tmp_path / "link.json"))
    assert (tmp_path / "link.json").is_symlink()


def test_arrays_of_any_name_go_into_npz(tmp_path: Path, capsys: Output) -> None:
    source, target = tmp_path / "x.ckpt", tmp_path / "x.npz"
    roptim.save({"file": np.ones(2), "self": np.zeros((0, 3)), "a": {"b": np.float32(2)}}, source)
    run(capsys, "convert", str(source), str(target))
    with np.load(target) as found:
        assert set(found.files) == {"file", "self", "a.b"}
        assert found["file"].tolist() == [1, 1]
        assert found["self"].shape == (0, 3)
    roptim.save({"a.b": np.ones(1), "a": {"b": np.zeros(1)}}, source)
    assert "arrays called 'a.b' must be one" in refused(capsys, "convert", str(source), str(target))
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    roptim.save({"x": np.ones(2, bfloat16)}, source)
    assert "x must be of a dtype of NumPy's own for .npz, got bfloat16" in refused(
        capsys, "convert", str(source), str(target)
    )


def test_convert_reads_and_writes_torch(
    saved: Path, tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch is replaced by what stands for it: the tests do without."""
    kept: dict[str, Any] = {}

    class Torch(ModuleType):
        @staticmethod
        def load(path: str, map_location: str, weights_only: bool) -> Any:
            assert weights_only, "nothing in the file is run"
            assert map_location == "cpu"
            return kept[Path(path).read_text()]

    monkeypatch.setitem(sys.modules, "torch", Torch("torch"))
    kept["one"] = {
        "optimizer": {
            "state": {0: {"step": 3.0, "exp_avg": np.ones(2), "exp_avg_sq": np.ones(2)}},
            "param_groups": [{"lr": 0.1, "fused": None, "params": [0]}],
        },
        "epoch": 3,
    }
    (tmp_path / "one.pt").write_text("one")
    run(capsys, "convert", str(tmp_path / "one.pt"), str(tmp_path / "one.ckpt"), "--names", "W")
    found = roptim.load(tmp_path / "one.ckpt")
    assert found["epoch"] == 3
    assert found["optimizer"]["param_groups"] == [{"lr": 0.1, "params": [0], "param_names": ["W"]}]
    roptim.Adam({"W": np.zeros(2)}).load_state_dict(found["optimizer"])


# ---- outputs of other kinds ---------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["ascii", "cp437", "cp1252", "latin-1"])
def test_bars_are_replaced_where_the_output_has_none(encoding: str) -> None:
    assert printable(f"{BARS} x", encoding) == "_.:-=+*# x"
    assert printable(BARS, "utf-8") == printable(BARS, "utf-16") == BARS


@pytest.mark.parametrize("arguments", [["schedules"], ["schedules", "cosine"], ["list"]])
def test_a_terminal_without_utf_8_is_enough(arguments: list[str]) -> None:
    done = process(*arguments, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert done.stderr == b""
    text = done.stdout.decode("ascii")
    if arguments == ["list"]:
        assert "Polak, Ribi?re" in text
    else:
        assert "?" not in text
        assert "#" in text


@pytest.mark.skipif(sys.platform == "win32", reason="a closed pipe is another error there")
def test_a_reader_that_leaves_is_no_error() -> None:
    command = [sys.executable, "-m", "roptim", "schedules"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        child.stdout.close()
        assert child.stderr.read() == b""
        assert child.wait(timeout=60) == 1


# ---- the other commands -------------------------------------------------------------------------------------


def test_list_has_every_optimizer(capsys: Output) -> None:
    names = [line.split()[0] for line in run(capsys, "list").splitlines()]
    assert names[1 : 1 + len(REGISTRY)] == list(REGISTRY)


def test_devices_begin_with_the_cpu(capsys: Output) -> None:
    lines = run(capsys, "devices").splitlines()
    found = roptim.devices()
    # Each device has a line, an adapter another one with its limits.
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == [device.backend for device in found]
    assert sum("buffers up to" in line for line in lines) == len(found) - 1


def test_a_command_is_required_and_known(capsys: Output) -> None:
    assert "required: command" in refused(capsys)
    assert "invalid choice" in refused(capsys, "draw")
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"roptim {roptim.__version__}\n"
