"""What the README says runs."""

import re
import shlex
import sys
from pathlib import Path

import pytest

import data
import evaluate
import generate
import losses
import model
import tagsdc

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
MODULES = {
    "tagsdc": tagsdc,
    "data": data,
    "evaluate": evaluate,
    "generate": generate,
    "losses": losses,
    "model": model,
}


def test_the_generator_example_runs_in_an_empty_namespace():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    space = {}
    exec(code, space)
    made = space["made"]
    assert made.sentences.shape == (2, 3, 8) and made.valid.all()
    assert space["scores"].grad is not None
    equal = (made.sentences == space["captions"][:, None]).all(2)
    assert not equal.any(), "the caption is none of its negatives"


def commands():
    program = r"^    (?:\S*python|torchrun --nproc-per-node 8) tagsdc\.py(.*?)(?:#.*)?$"
    return re.findall(program, README, re.MULTILINE)


@pytest.mark.parametrize("command", commands())
def test_every_option_of_its_commands_exists(command, monkeypatch):
    saved = {"arguments": {"steps": 1}}
    monkeypatch.setattr(tagsdc, "load_checkpoint", lambda *_, **__: saved)
    monkeypatch.setattr(tagsdc.datasets, "read_json", lambda *_: saved)
    monkeypatch.setattr(Path, "is_file", lambda path: True)
    assert tagsdc.parse_arguments(shlex.split(command)).steps > 0


def test_there_are_commands_and_every_function_it_points_to_exists():
    named = re.findall(r"`(tagsdc|data|evaluate|generate|losses|model)\.(\w+)", README)
    assert len(commands()) >= 7 and len(named) > 10
    for module, name in named:
        assert name == "py" or hasattr(MODULES[module], name), f"{module}.{name}"


def test_only_the_promised_packages_are_imported():
    allowed = {"evaluate": {"data", "model"}, "data": {"generate"}, "tagsdc": set(MODULES)}
    for name in MODULES:
        text = (ROOT / f"{name}.py").read_text()
        found = set(re.findall(r"^(?:import|from) (\w+)", text, re.MULTILINE))
        packages = found - set(MODULES) - set(sys.stdlib_module_names)
        assert packages <= {"torch", "numpy", "PIL"}, name
        assert found & set(MODULES) <= allowed.get(name, set()), f"{name} imports another module"


def test_no_docstring_points_to_a_file_that_is_not_here():
    for name in MODULES:
        assert "METHOD" not in (ROOT / f"{name}.py").read_text(), name
