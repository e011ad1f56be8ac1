"""What the README and the pages in docs/ say runs, and what they point to exists."""

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import study
import torch

import data
import evaluate
import generate
import losses
import model
import tagsdc

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
MODULES = {
    "tagsdc": tagsdc,
    "data": data,
    "evaluate": evaluate,
    "generate": generate,
    "losses": losses,
    "model": model,
}
RUN = r"^    (?:\S*python|torchrun --nproc-per-node \d+) (\S+\.py)(.*?)(?:  +#.*)?$"
COMMANDS = [
    pytest.param(script, arguments, id=f"{script}{arguments}")
    for page in PAGES
    for script, arguments in re.findall(RUN, page.read_text(), re.MULTILINE)
]


def snippets(page):
    """The Python code of a page."""
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


def heading_anchors(page):
    """What a link to a heading of the page may name."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


# ---- code --------------------------------------------------------------------------------------


def test_the_code_for_other_projects_runs_from_top_to_bottom(tmp_path):
    one_network, two_networks = snippets(README)
    (tmp_path / "one.py").write_text(one_network)
    (tmp_path / "two.py").write_text(two_networks)
    torch.manual_seed(0)
    space = runpy.run_path(str(tmp_path / "one.py"))
    made = space["made"]
    assert made.sentences.shape == (2, 3, 8) and made.valid.all()
    equal = (made.sentences == space["input_ids"][:, None]).all(2)
    assert not equal.any(), "the caption is none of its negatives"
    without = [name for name, p in space["model"].named_parameters() if p.grad is None]
    assert not without, "every head learns"
    space = runpy.run_path(str(tmp_path / "two.py"), space)  # goes on from the first one
    assert space["made"].valid.any()
    assert space["judge"].weight.grad.abs().sum() > 0


def test_code_that_cannot_run_here_is_python():
    (features,) = snippets(ROOT / "docs/OWN_PICTURES.md")
    compile(features, "OWN_PICTURES.md", "exec")
    saved = set(re.findall(r"^ +(\w+)=", features, re.MULTILINE))
    assert {"features", "bbox", "conf", "image_w", "image_h"} <= saved <= {*data.NPZ_NAMES}


def test_no_other_page_has_code():
    others = [page for page in PAGES if page.name not in ("README.md", "OWN_PICTURES.md")]
    assert others and not any(snippets(page) for page in others), "test the new code, too"


# ---- commands ----------------------------------------------------------------------------------


@pytest.mark.parametrize("script, arguments", COMMANDS)
def test_every_option_of_a_command_exists(script, arguments, monkeypatch):
    saved = {"arguments": {"steps": 1}}
    monkeypatch.setattr(tagsdc, "load_checkpoint", lambda *_, **__: saved)
    monkeypatch.setattr(tagsdc.datasets, "read_json", lambda *_: saved)
    monkeypatch.setattr(Path, "is_file", lambda path: True)
    monkeypatch.setattr(tagsdc.os.path, "isdir", lambda path: "bert" in Path(path).name)
    arguments = shlex.split(arguments)
    if script == "tagsdc.py":
        if arguments != ["--help"]:
            assert tagsdc.parse_arguments(arguments).steps > 0
    elif script == "tests/study.py":
        assert study.parse_arguments(arguments).seeds > 0
    else:
        text = (ROOT / script).read_text()
        for option in re.findall(r"--[\w-]+", " ".join(arguments)):
            assert f'"{option}"' in text, f"{script} has no {option}"


def test_there_are_commands():
    scripts = [command.values[0] for command in COMMANDS]
    assert scripts.count("tagsdc.py") >= 12 and "tests/study.py" in scripts


def test_every_option_in_the_text_exists():
    known = set(re.findall(r"--[a-z][\w-]*", tagsdc.make_parser().format_help()))
    of_study = {"--seeds", "--arms", "--images"}
    of_others = {"--nproc-per-node", "--what", "--rounds", "--anchors", "--pairs", *of_study}
    for page in PAGES:
        prose = re.sub(RUN, "", page.read_text(), flags=re.MULTILINE)
        for code in re.findall(r"`([^`\n]+)`", prose):
            unknown = set(re.findall(r"(?<!\S)--[a-z][\w-]*", code)) - known - of_others
            assert not unknown, f"{page.name}: {unknown}"


def test_every_recipe_in_the_text_exists():
    for page in PAGES:
        named = re.findall(r"`((?:bert|coco|flickr)-[\w-]+)`", page.read_text())
        assert set(named) - {"bert-base-uncased"} <= {*tagsdc.RECIPES}, page.name


# ---- what it points to -------------------------------------------------------------------------


def test_every_function_it_points_to_exists():
    named = []
    for page in PAGES:
        named += re.findall(rf"`({'|'.join(MODULES)})\.(\w+)", page.read_text())
    assert len(named) > 10
    for module, name in named:
        assert name in ("py", "safetensors") or hasattr(MODULES[module], name), f"{module}.{name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_or_heading_leads_there(page):
    for link in re.findall(r"\]\((?!https?:)([^)]*)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        assert target.is_file(), f"{page.name}: {link}"
        assert not anchor or anchor in heading_anchors(target), f"{page.name}: {link}"


def test_the_measures_are_those_of_the_report():
    table = (ROOT / "docs/RESULTS.md").read_text().split("## What is measured")[1]
    named = re.findall(r"`([a-z_0-9]+)`", table.split("\n## ")[0])
    known = {*evaluate.MEASURES, *study.MEANINGS}
    assert len(named) > 15
    for name in named:
        assert name in known or name.removeprefix("one_word_wrong_") in data.KINDS, name


def test_the_sizes_of_the_files_are_about_right():
    rows = re.findall(r"^\| `(\w+\.py)` \| ([\d,]+) \|", README.read_text(), re.MULTILINE)
    assert [name for name, _ in rows] == [*dict.fromkeys(name for name, _ in rows)]
    assert {name for name, _ in rows} == {f"{name}.py" for name in MODULES}
    for name, lines in rows:
        now = len((ROOT / name).read_text().splitlines())
        assert abs(now - int(lines.replace(",", ""))) < 0.1 * now, f"{name} has {now} lines"


# ---- the program -------------------------------------------------------------------------------


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
