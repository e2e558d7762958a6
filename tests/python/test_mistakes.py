"""The page of mistakes is what its script writes, and what roptim does about mistakes that had no message."""

from __future__ import annotations

import copy
import importlib
import inspect
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import roptim
from roptim import SGD, Adam, Parameter
from roptim._groups import OPTIONS
from roptim.optimizer import REGISTRY

ROOT = Path(__file__).parents[2]


@pytest.fixture
def gallery(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module("mistakes")


def f32(*shape: int) -> Any:
    return np.ones(shape, np.float32)


def test_the_page_is_what_the_script_writes(gallery: Any) -> None:
    assert (ROOT / "docs" / "mistakes.md").read_text(encoding="utf-8") == gallery.page()


def test_every_mistake_is_told(gallery: Any) -> None:
    made = [mistake for part in gallery.PARTS for mistake in part.mistakes]
    assert len(made) >= 20
    assert len({mistake.heading for mistake in made}) == len(made)
    refusable = [mistake for part in gallery.PARTS[:-1] for mistake in part.mistakes]
    for mistake in refusable:
        last = gallery.said(mistake).splitlines()[-1]
        kind, _, sentence = last.partition(": ")
        assert kind == "UserWarning" or issubclass(getattr(roptim, kind), roptim.RoptimError), mistake.heading
        assert sentence
    for mistake in made:
        elsewhere, code = gallery.source(mistake)
        assert elsewhere.endswith("."), mistake.heading
        assert code
        assert "Error" not in gallery.said(mistake) or mistake in refusable, "only what is refused"


def test_the_readme_links_the_page() -> None:
    assert "(docs/mistakes.md)" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_page_is_written_where_it_is_asked_for(
    gallery: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "deep" / "page.md"
    monkeypatch.setattr("sys.argv", ["mistakes.py", "--output", str(output)])
    gallery.main()
    assert output.read_text(encoding="utf-8").startswith("# A gallery of mistakes\n")
    assert capsys.readouterr().out.strip() == str(output)


# ---- options as attributes ----------------------------------------------------------------------------------


def test_options_are_no_attributes(optimizer_class: Any) -> None:
    opt = optimizer_class([f32(2, 2)])
    name = optimizer_class.__name__
    groups, state = [dict(group) for group in opt.param_groups], opt.state_dict()
    arguments = inspect.signature(optimizer_class).parameters
    for option in (*REGISTRY[name]["defaults"], *(option for option in OPTIONS if option in arguments)):
        is_hyper = option not in OPTIONS
        where = "set in a group" if is_hyper else "given to the constructor"
        remedy = f'use opt.param_groups[0]["{option}"]' if is_hyper else "it holds for the life of an optimizer"
        with pytest.raises(roptim.RoptimTypeError) as raised:
            setattr(opt, option, 0.5)
        assert str(raised.value) == f"{name}: {option} must be {where}, got an assignment to the optimizer; {remedy}"
        assert not hasattr(opt, option)
        with pytest.raises(AttributeError, match=f"^{name}: {option} is {where}; "):
            getattr(opt, option)
        with pytest.raises(AttributeError):
            delattr(opt, option)
    assert [dict(group) for group in opt.param_groups] == groups
    assert str(opt.state_dict()) == str(state)


def test_classes_that_somebody_derives_have_their_own_attributes() -> None:
    class Mine(SGD):
        def __init__(self, params: Any, lr: float) -> None:
            super().__init__(params, lr=lr)
            self.lr = lr

    opt = Mine([f32(2)], lr=0.5)
    for one in (opt, copy.deepcopy(opt)):
        assert one.lr == 0.5
    del opt.lr
    assert not hasattr(opt, "lr")


# ---- no gradient at all -------------------------------------------------------------------------------------


def test_the_first_step_without_any_gradient_warns() -> None:
    p, q = Parameter(f32(2)), Parameter(f32(2), requires_grad=False)
    opt = Adam([p, q])
    q.grad = f32(2)
    message = (
        r"^Adam\.step: no Parameter has a gradient, so nothing is updated; "
        r"set \.grad of these Parameters first, or call step\(gradients\)$"
    )
    with pytest.warns(UserWarning, match=message) as warned:
        opt.step()
    assert warned[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step()
    assert opt.update_count == 0
    assert (p.data == 1).all()


@pytest.mark.filterwarnings("error")
def test_steps_that_may_have_nothing_to_do_do_not_warn() -> None:
    p, q = Parameter(f32(2)), Parameter(f32(2))
    SGD([p, q]).step([None, None])
    p.grad = f32(2)
    SGD([p, q]).step()
    SGD([Parameter(f32(2), requires_grad=False)]).step()
    summed = SGD([q])
    summed.accumulate([f32(2)])
    summed.step()

    def closure() -> float:
        q.grad = f32(2)
        return 0.0

    q.grad = None
    SGD([q]).step(closure)
    with pytest.raises(roptim.RoptimTypeError, match="gradients must be given for plain arrays"):
        SGD([f32(2)]).step()


# ---- generators and models ----------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [lambda it: it, lambda it: [{"params": it}]])
def test_a_generator_at_its_end(wrap: Any) -> None:
    arrays = iter([f32(2)])
    list(arrays)
    with pytest.raises(roptim.RoptimValueError) as raised:
        SGD(wrap(arrays))
    assert str(raised.value) == (
        "SGD: params must be at least one array, got a generator at its end; "
        "a generator can be gone through once: make a list of it and give that to each"
    )


def test_a_model_is_no_container() -> None:
    class Model:
        def parameters(self) -> Any:
            return [f32(2)]

    with pytest.raises(roptim.RoptimTypeError, match=r"got an object of type Model; give what its parameters\(\) retu"):
        SGD(Model())
    SGD(Model().parameters())


# ---- values in messages -------------------------------------------------------------------------------------


def test_values_in_messages_are_short_and_on_one_line() -> None:
    class Silent:
        def __repr__(self) -> str:
            raise ValueError("nothing to say")

    for value in (np.ones(1000), np.ones((30, 30)), 10**400, 10**5000, "x" * 10_000, Silent(), list(range(1000))):
        with pytest.raises(roptim.RoptimError) as raised:
            Adam([f32(2)], lr=value)
        message = str(raised.value)
        assert message.startswith("Adam: lr must be a finite number >= 0, got ")
        assert len(message) < 160
        assert "\n" not in message
    assert pickle.loads(pickle.dumps(raised.value)).args == raised.value.args
