"""What the README says runs."""
import re
from pathlib import Path

import pytest

import tagsdc

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_generator_example_runs_in_an_empty_namespace():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    space = {}
    exec(code, space)
    made = space["made"]
    assert made.sentences.shape == (2, 3, 8) and made.valid.all() and space["scores"].grad is not None
    assert not (made.sentences == space["captions"][:, None]).all(2).any(), "the caption is none of its negatives"


def commands():
    return re.findall(r"^    (?:\S*python|torchrun --nproc-per-node 8) tagsdc\.py(.*?)(?:#.*)?$", README, re.MULTILINE)


@pytest.mark.parametrize("command", commands())
def test_every_option_of_its_commands_exists(command, monkeypatch):
    monkeypatch.setattr(tagsdc, "load_checkpoint", lambda *_, **__: {"arguments": {}})
    monkeypatch.setattr(Path, "is_file", lambda path: True)
    import shlex
    assert tagsdc.parse_arguments(shlex.split(command)).steps > 0


def test_there_are_commands_and_every_function_it_points_to_exists():
    import data, evaluate, generate, losses, model
    modules = dict(tagsdc=tagsdc, data=data, evaluate=evaluate, generate=generate, losses=losses, model=model)
    named = re.findall(r"`(tagsdc|data|evaluate|generate|losses|model)\.(\w+)", README)
    assert len(commands()) >= 7 and len(named) > 10
    assert [name for name in named if name[1] != "py" and not hasattr(modules[name[0]], name[1])] == []


def test_the_six_modules_stay_small():
    lines = sum(len((ROOT / f"{name}.py").read_text().splitlines()) for name in ("tagsdc", "model", "data", "losses", "generate", "evaluate"))
    assert lines <= 2200, "an evening's reading"


def test_only_the_promised_packages_are_imported():
    ours = {"tagsdc", "model", "data", "losses", "generate", "evaluate"}
    import sys
    for name in ours:
        found = set(re.findall(r"^(?:import|from) (\w+)", (ROOT / f"{name}.py").read_text(), re.MULTILINE))
        assert found - ours - set(sys.stdlib_module_names) <= {"torch", "numpy", "PIL"}, name
        allowed = {"evaluate": {"data", "model"}, "tagsdc": ours}.get(name, set())
        assert found & ours <= allowed, f"{name} imports another module of ours"
