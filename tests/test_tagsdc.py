"""The command, end to end, in miniature: what it writes, that it learns, resumes, repeats itself
and refuses bad input."""

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data
import evaluate
import tagsdc
from model import Config, TagsDC
from test_data import damage

ROOT = Path(__file__).parents[1]
SMALL = (
    "--scenes 30 5 8 --steps 12 --batch-size 4 --warmup-batch-size 8 --pool 8 --hard 3"
    " --maskings 2 --refills 3 --val-images 5 --analyse-images 4 --log-every 2 --validations 3"
    " --dtype float32 --device cpu --phases warmup=4 tags=4 dc=4"
).split()
COMMAND = [sys.executable, str(ROOT / "tagsdc.py"), *SMALL]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A run directory that holds a finished small run."""
    out = tmp_path_factory.mktemp("runs") / "world"
    assert tagsdc.main([*SMALL, "--out", str(out), "--save-scores"]) == 0
    return out


@pytest.fixture
def no_report(monkeypatch):
    """Spares the reports on the test split, where a test asks for none of their figures."""
    monkeypatch.setattr(tagsdc, "test_report", lambda *_: ({}, None, None))
    monkeypatch.setattr(tagsdc, "finish", lambda *_: None)


def share_data(out, world):
    """Another run directory, with the drawn scenes of `world` beside it."""
    out.mkdir(exist_ok=True)
    if not (out.parent / "data").exists():
        (out.parent / "data").symlink_to(world.parent / "data")
    return out


def scenes_of(world):
    """The data that `world` learnt from."""
    return data.load_scenes(0, (30, 5, 8), world.parent / "data" / "scenes-seed0-30-5-8")


def rerun(out, world, *options):
    """The small run again elsewhere, on the same drawn scenes."""
    return tagsdc.main([*SMALL, "--out", str(share_data(out, world)), *options])


def metrics(out):
    return json.loads((out / "metrics.json").read_text())


def rows(out):
    with open(out / "log.csv") as file:
        return list(csv.DictReader(file))


def weights(out, name="last.pt"):
    return torch.load(out / name, weights_only=True)["model"]


def assert_same_run(one, other):
    """The same weights to the last bit, the same log and the same metrics."""
    for name in ("last.pt", "best.pt"):
        mine, theirs = weights(one, name), weights(other, name)
        assert all(torch.equal(mine[key], theirs[key]) for key in mine), name
    assert (one / "log.csv").read_text() == (other / "log.csv").read_text()
    for part in ("test", "val", "warmup"):
        assert metrics(one)[part] == metrics(other)[part], part


# ---- a whole run -------------------------------------------------------------------------------


def test_a_run_leaves_everything_it_promises(world):
    promised = "log.csv metrics.json last.pt best.pt negatives.png curves.png scores.npy".split()
    assert set(promised) <= {path.name for path in world.iterdir()}
    recall = {"tr_r1", "tr_r5", "tr_r10", "ir_r1", "ir_r5", "ir_r10", "rsum"}
    assert recall <= metrics(world)["test"].keys()
    assert metrics(world)["warmup"]["rsum"] > 0
    assert metrics(world)["arguments"]["hard"] == 3
    phases = [row["phase"] for row in rows(world)]
    assert sorted(set(phases), key=phases.index) == ["warmup", "tags", "dc"]
    assert not list(world.glob("*.part"))


def test_a_line_of_the_log_is_the_mean_over_its_steps(world, tmp_path, no_report):
    shape = "--phases tags=1 --steps 4 --validations 1 --log-every".split()
    for every in ("1", "3"):
        rerun(tmp_path / every, world, *shape, every)
    single = rows(tmp_path / "1")
    joint = rows(tmp_path / "3")
    assert [row["step"] for row in joint] == ["1", "3", "4"], "also after the very first step"
    for name in ("loss", "hard", "tags", "positive", "kept"):
        mean = (float(single[1][name]) + float(single[2][name])) / 2
        assert float(joint[1][name]) == pytest.approx(mean, abs=2e-5), name


def test_training_learns(world, tmp_path, no_report):
    """The masked-LM loss of a longer warm-up falls well below where it began."""
    shape = "--phases warmup=1 --steps 110 --log-every 10 --val-images 1 --warmup-batch-size 12"
    rerun(tmp_path / "run", world, *shape.split())
    losses = [float(row["mlm"]) for row in rows(tmp_path / "run")]
    assert losses[-1] < 0.8 * losses[0]


def test_the_best_validation_of_the_last_phase_is_what_is_reported(world):
    best = torch.load(world / "best.pt", weights_only=True)["progress"]["best"]
    validated = [row for row in rows(world) if row["phase"] == "dc" and row["val_rsum"]]
    highest = max(float(row["val_rsum"]) for row in validated)
    assert metrics(world)["val"]["rsum"] == best["rsum"] == pytest.approx(highest, abs=0.01)


def test_a_phase_s_own_heads_are_trained_however_good_the_phase_before_was(
    world, tmp_path, monkeypatch, no_report
):
    falling = iter(range(99, 0, -1))
    names = ("rsum", "tr_r1", "ir_r1")
    monkeypatch.setattr(
        tagsdc.evaluate,
        "retrieval_metrics",
        lambda *_: dict.fromkeys(names, float(next(falling))),
    )
    rerun(tmp_path / "run", world, "--log-every", "1")
    best = torch.load(tmp_path / "run" / "best.pt", weights_only=True)["progress"]
    validated = [row for row in rows(tmp_path / "run") if row["val_rsum"]]
    first = [row["phase"] for row in validated].index("dc")
    assert best["phase"] == 3 and best["best"]["rsum"] == 99.0 - first
    steps = [row["step"] for row in validated if row["phase"] == "dc"]
    assert steps and int(steps[0]) > 10, "not before half of it: the heads are new"


def test_negatives_are_drawn_and_scored_in_eval_mode_and_learned_from_in_train_mode(
    world, tmp_path, monkeypatch, no_report
):
    modes = set()
    layer = tagsdc.TagsDC.prepare_text

    def record(self, *arguments):
        modes.add((torch.is_grad_enabled(), self.training))
        return layer(self, *arguments)

    monkeypatch.setattr(tagsdc.TagsDC, "prepare_text", record)
    rerun(tmp_path / "run", world, *"--dropout 0.1 --phases dc=1 --steps 2".split())
    assert modes == {(False, False), (True, True)}


def test_without_synthetic_terms_nothing_is_generated(world, tmp_path, monkeypatch, no_report):
    made = []
    monkeypatch.setattr(tagsdc.generate, "tailor_negatives", lambda *_, **__: made.append(1))
    rerun(tmp_path / "base", world, *"--lambda-tags 0 --lambda-wod 0 --lambda-woc 0".split())
    assert not made


@pytest.mark.parametrize("term", ["tags", "mlm", "wod", "woc"])
def test_a_weight_of_zero_takes_the_term_out_of_the_plan(term):
    plan = tagsdc.plan_phases(tagsdc.parse_arguments([f"--lambda-{term}", "0"]))
    assert all(term not in phase.weights for phase in plan if phase.name != "warmup")
    assert sum(phase.steps for phase in plan) == tagsdc.make_parser().get_default("steps")


def test_the_plan_and_the_rate_of_each_step():
    """In each part: up in a tenth of the steps, then down."""
    options = "--steps 260 --phases warmup=10 dc=3 --warmup-lr 0.5 --lr 2".split()
    words, matching, dc = plan = tagsdc.plan_phases(tagsdc.parse_arguments(options))
    assert [phase.name for phase in plan] == ["warmup", "warmup", "dc"]
    assert (words.part, words.weights, words.steps) == ("words", {"mlm": 1.0}, 160)
    assert (matching.part, matching.weights.keys()) == ("matching", {"mlm", "itm"})
    assert (matching.steps, dc.steps) == (40, 60)
    assert dc.weights.keys() == {"hard", "tags", "mlm", "wod", "woc"}
    for phase, peak in ((words, 0.5), (matching, 0.5), (dc, 2)):
        rates = [tagsdc.learning_rate(phase, step) for step in range(phase.steps)]
        top = round(0.1 * phase.steps) - 1
        assert rates[top] == max(rates) == pytest.approx(peak, rel=0.02)
        assert rates[: top + 1] == sorted(rates[: top + 1]) and rates[0] == peak / (top + 1)
        assert rates[top:] == sorted(rates[top:], reverse=True)
        assert rates[-1] == pytest.approx(peak / (0.9 * phase.steps))


def test_the_paper_s_recipe_is_its_way_of_writing_in_two_stages():
    args = tagsdc.parse_arguments(["--recipe", "paper"])
    assert (args.writer_sees, args.temperature, args.truth_threshold) == ("own", 1.5, 1.0)
    assert [phase.part for phase in tagsdc.plan_phases(args)] == "words matching tags dc".split()
    assert args.data == "scenes"


def test_a_frozen_writer_keeps_the_weights_of_the_warm_up(world, tmp_path, monkeypatch, no_report):
    end_phase = tagsdc.Trainer.end_phase
    best = {}

    def record(self, phase):
        if phase.part != "words":
            best[phase.name] = weights(self.out, "best.pt")
        end_phase(self, phase)

    monkeypatch.setattr(tagsdc.Trainer, "end_phase", record)
    rerun(tmp_path / "run", world, "--frozen-writer")
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    writer = state["writer"]
    assert all(torch.equal(best["warmup"][name], value) for name, value in writer.items())
    assert not torch.equal(state["model"]["text.word.weight"], writer["text.word.weight"])


# ---- interruption and resumption ---------------------------------------------------------------


# Method of Trainer, and the phase and the step in it at which SIGTERM comes: within both parts of
# the warm-up, before its validation and its report, between two lines of the log, at the end.
MOMENTS = [
    ("optimise", 0, 2),
    ("validate", 1, 1),
    ("end_phase", 1, 1),
    ("optimise", 2, 2),
    ("validate", 2, 2),
    ("optimise", 3, 3),
    ("end_phase", 3, 4),
]


def interrupt_at(moment, monkeypatch, options):
    """A run, or what is left of one, in which SIGTERM comes at a moment."""
    method, *place = moment
    original = getattr(tagsdc.Trainer, method)

    def kill(self, *arguments):
        if [self.progress.phase, self.progress.step] == place:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(tagsdc.Trainer, method, kill)
        return tagsdc.main(options)


@pytest.mark.parametrize("moments", [MOMENTS[::2], MOMENTS[1::2]], ids=["one", "two"])
def test_an_interrupted_run_resumes_to_the_same_result(moments, monkeypatch, world, tmp_path):
    out = str(share_data(tmp_path / "cut", world))
    options = SMALL
    for moment in moments:
        assert interrupt_at(moment, monkeypatch, [*options, "--out", out]) == 143, moment
        options = ["--resume", "--device", "cpu"]
    assert tagsdc.main([*options, "--out", out]) == 0
    assert_same_run(tmp_path / "cut", world)


def test_an_interrupt_loses_the_steps_since_the_last_line_of_the_log(world, tmp_path, monkeypatch):
    out = share_data(tmp_path / "cut", world)
    assert interrupt_at(("optimise", 2, 3), monkeypatch, [*SMALL, "--out", str(out)]) == 143
    progress = torch.load(out / "last.pt", weights_only=True)["progress"]
    assert (progress["phase"], progress["step"]) == (2, 2)
    assert progress["log"][-1]["step"] == 6 == int(rows(out)[-1]["step"])
    assert not list(out.glob("*.part"))


def start(out, *options):
    return subprocess.Popen(
        [*COMMAND, "--out", str(out), *options],
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # the same number gives the same bits
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def test_a_killed_run_resumes_to_the_same_result(world, tmp_path):
    out = share_data(tmp_path / "cut", world)
    process = start(out)
    for line in process.stdout:
        if line.startswith("tags"):
            break
    process.kill()
    process.wait()
    assert tagsdc.main(["--resume", "--out", str(out), "--device", "cpu"]) == 0
    assert_same_run(out, world)


def test_a_run_cut_before_its_first_checkpoint_begins_again_and_the_same_seed_gives_the_same_result(
    world, tmp_path, monkeypatch
):
    out = share_data(tmp_path / "cut", world)
    assert interrupt_at(("save", 0, 0), monkeypatch, [*SMALL, "--out", str(out)]) == 143
    assert (out / "run.json").exists() and not (out / "last.pt").exists()
    assert tagsdc.main(["--resume", "--out", str(out)]) == 0
    assert_same_run(out, world)


def test_ctrl_c_exits_with_130_even_where_the_shell_ignored_it(world, tmp_path):
    out = share_data(tmp_path / "cut", world)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which a child inherits
    process = start(out, "--steps", "100000")
    signal.signal(signal.SIGINT, before)
    for line in process.stdout:
        if line.startswith("warmup"):
            break
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert (out / "last.pt").exists() and not list(out.glob("*.part"))


def test_a_second_run_in_one_directory_is_refused(world, tmp_path, capsys):
    with tagsdc.only_run_in(tmp_path):
        assert tagsdc.main(["--eval", str(world / "best.pt"), "--out", str(tmp_path)]) == 2
        assert "another run" in capsys.readouterr().err
        assert tagsdc.main([*SMALL, "--out", str(tmp_path)]) == 2
    assert "another run" in capsys.readouterr().err


def test_a_full_disk_leaves_the_checkpoint_before_it(world, tmp_path, monkeypatch, capsys):
    out = share_data(tmp_path / "run", world)
    save = torch.save
    sizes = []

    def full(state, path):
        if state["progress"]["phase"] == 2 and state["progress"]["step"] == 2:
            Path(path).write_bytes(b"half of it")
            raise RuntimeError("PytorchStreamWriter failed writing file: no space left on device")
        save(state, path)
        sizes.append(os.path.getsize(path))

    monkeypatch.setattr(torch, "save", full)
    assert tagsdc.main([*SMALL, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert "last.pt" in error and "space" in error and "Traceback" not in error
    assert os.path.getsize(out / "last.pt") == sizes[-1] and not list(out.glob("*.part"))


@pytest.mark.parametrize(
    "options, words",
    [
        ("--size small", "--size tiny"),
        ("--data other.json", "--data scenes"),
        ("--lr 1", "--lr"),
        ("--steps 6", "--steps"),
    ],
)
def test_what_would_change_a_run_is_refused_when_it_goes_on(options, words, world, capsys):
    code = exit_code(["--resume", "--out", str(world), *options.split()])
    assert code == 2 and words in capsys.readouterr().err.splitlines()[-1]


def test_a_batch_is_drawn_by_its_number_alone(world, tmp_path, no_report, monkeypatch):
    """Whatever was drawn before it, as for a batch that was never learnt."""
    draw = tagsdc.Trainer.draw_batch

    def draw_others_too(self, phase, number):
        draw(self, phase, (*number[:4], 99))
        return draw(self, phase, number)

    shape = "--phases dc=1 --steps 4 --log-every 1 --dropout 0.1".split()
    rerun(tmp_path / "one", world, *shape)
    monkeypatch.setattr(tagsdc.Trainer, "draw_batch", draw_others_too)
    rerun(tmp_path / "two", world, *shape)
    one, two = ([row["loss"] for row in rows(tmp_path / name)] for name in ("one", "two"))
    assert one == two and len(set(one)) == 4


def test_the_best_weights_are_written_again_if_the_break_came_before_them(
    world, tmp_path, monkeypatch, no_report
):
    """last.pt comes first: it knows of the best validation, best.pt follows."""
    out = share_data(tmp_path / "cut", world)
    save = tagsdc.Trainer.save

    def cut(self, name):
        if name == "best.pt" and self.progress.phase == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        save(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(tagsdc.Trainer, "save", cut)
        assert tagsdc.main([*SMALL, "--out", str(out)]) == 143
    assert torch.load(out / "best.pt", weights_only=True)["progress"]["phase"] == 1
    assert tagsdc.main(["--resume", "--out", str(out), "--device", "cpu"]) == 0
    assert all(torch.equal(weights(out)[key], value) for key, value in weights(world).items())


# ---- numbers that go wrong ---------------------------------------------------------------------


def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(
    world, tmp_path, monkeypatch, capsys, no_report
):
    step = tagsdc.warmup_step
    calls = []

    def spoiled(*arguments):
        loss, values = step(*arguments)
        calls.append(1)
        if len(calls) == 2:
            loss = loss * float("nan")
        return loss, values

    monkeypatch.setattr(tagsdc, "warmup_step", spoiled)
    rerun(tmp_path / "run", world, "--phases", "warmup=1", "--steps", "4")
    assert [float(row["skipped"]) for row in rows(tmp_path / "run")] == [0, 1, 0, 0]
    assert all(value.isfinite().all() for value in weights(tmp_path / "run").values())
    assert "skipped 1" in capsys.readouterr().out


def test_twenty_such_steps_in_a_row_end_the_run(world, tmp_path, monkeypatch, capsys):
    step = tagsdc.warmup_step

    def spoiled(*arguments):
        loss, values = step(*arguments)
        return loss * float("nan"), values | {"mlm": values["mlm"] * float("nan")}

    monkeypatch.setattr(tagsdc, "warmup_step", spoiled)
    code = rerun(tmp_path / "run", world, "--phases", "warmup=1", "--steps", "40")
    error = capsys.readouterr().err
    assert code == 2 and "step 20" in error and "mlm" in error and "learning rate" in error


def test_a_network_that_writes_nothing_but_nan_has_diverged(world, tmp_path, monkeypatch, capsys):
    def diverged(*_, **__):
        raise tagsdc.generate.NotFiniteError("fill gave NaN")

    monkeypatch.setattr(tagsdc, "tailored_step", diverged)
    assert rerun(tmp_path / "run", world, "--phases", "tags=1") == 2
    error = capsys.readouterr().err
    assert "the network has diverged" in error and len(error.strip().splitlines()) == 1


def test_where_nothing_can_be_locked_a_run_goes_on(tmp_path, monkeypatch, capsys):
    import fcntl

    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with tagsdc.only_run_in(tmp_path):
        assert "cannot be locked" in capsys.readouterr().out


def test_correction_begins_as_the_masked_lm_that_was_tuned(world, tmp_path, monkeypatch, no_report):
    """At the first phase that has it, and not once more when a later run goes on from there."""
    begun = []
    begin_phase = tagsdc.Trainer.begin_phase

    def record(self):
        before = self.model.correction.bias.clone()
        begin_phase(self)
        copied = torch.equal(self.model.correction.bias, self.model.mlm.bias)
        begun.append(
            (self.plan[self.progress.phase].part, copied, before.equal(self.model.mlm.bias))
        )

    monkeypatch.setattr(tagsdc.Trainer, "begin_phase", record)
    rerun(tmp_path / "one", world)
    assert [part for part, copied, _ in begun if copied] == ["words", "dc"]  # words: both are 0
    assert begun[-1] == ("dc", True, False)
    del begun[:]
    rerun(tmp_path / "two", world, "--init", str(tmp_path / "one" / "best.pt"), "--phases", "dc=1")
    assert begun == [("dc", False, False)]


def test_collapse_and_empty_negatives_are_told_once(
    world, tmp_path, monkeypatch, capsys, no_report
):
    step = tagsdc.tailored_step

    def collapsed(*arguments):
        loss, values = step(*arguments)
        for name, value in (("positive", 0.5), ("retrieved", 0.5), ("kept", 0.0)):
            values[name] = torch.tensor(value)
        return loss, values

    monkeypatch.setattr(tagsdc, "tailored_step", collapsed)
    rerun(tmp_path / "run", world, *"--phases tags=1 --steps 6".split())
    out = capsys.readouterr().out
    assert out.count("score alike") == 1 and out.count("usable as a negative") == 1


def test_an_accumulated_step_is_that_of_the_mean_gradient(world, tmp_path, monkeypatch, no_report):
    gradients = []

    def record(model):
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])

    monkeypatch.setattr(tagsdc, "average_gradients", record)
    shape = "--phases tags=1 --steps 1 --accumulate".split()
    rerun(tmp_path / "two", world, *shape, "2")
    rerun(tmp_path / "first", world, *shape, "1")
    monkeypatch.setattr(tagsdc.Trainer, "number_of_batch", lambda self, n: (0, 0, 0, 0, 1))
    rerun(tmp_path / "second", world, *shape, "1")
    joint, first, second = gradients
    for a, b, c in zip(joint, first, second):
        torch.testing.assert_close(a, (b + c) / 2, atol=1e-6, rtol=1e-4)


EARLIER = ("last.pt", "best.pt", "metrics.json", "run.json", "log.csv")


@pytest.mark.parametrize(
    "options, words",
    [
        ("--init {tmp}/none.pt", "none.pt"),
        ("--init {tmp}/old.pt", "a checkpoint of format 1, not 4"),
        ("--init {tmp}/wide.pt", "feature_size"),
        ("--probe {tmp}/none.json", "none.json"),
        ("--data {tmp}/none.json", "no such file"),
    ],
)
def test_what_cannot_be_read_leaves_the_earlier_run(options, words, world, tmp_path, capsys):
    out = share_data(tmp_path / "run", world)
    for name in EARLIER:
        (out / name).write_text("an earlier run's")
    state = torch.load(world / "best.pt", weights_only=True)
    torch.save(state | {"format": 1}, tmp_path / "old.pt")
    state["config"]["feature_size"] += 1
    torch.save(state, tmp_path / "wide.pt")
    (tmp_path / "images").mkdir()
    options = options.format(tmp=tmp_path).split()
    assert tagsdc.main([*SMALL, "--out", str(out), *options]) == 2
    error = capsys.readouterr().err
    assert words in error and len(error.strip().splitlines()) == 1
    assert all((out / name).read_text() == "an earlier run's" for name in EARLIER)


def test_what_an_earlier_run_left_goes_when_another_begins(world, tmp_path, monkeypatch):
    out = share_data(tmp_path / "run", world)
    for name in EARLIER:
        (out / name).write_text("an earlier run's")
    assert interrupt_at(("optimise", 0, 0), monkeypatch, [*SMALL, "--out", str(out)]) == 143
    assert not (out / "best.pt").exists() and not (out / "metrics.json").exists()
    assert torch.load(out / "last.pt", weights_only=True)["progress"]["step"] == 0
    assert json.loads((out / "run.json").read_text())["arguments"]["steps"] == 12


def test_figures_are_written_before_pictures_and_probes_can_fail(
    world, tmp_path, monkeypatch, capsys
):
    (tmp_path / "probe.json").write_text(json.dumps(PROBE))
    options = "--phases tags=1 --steps 1 --probe".split()
    for function in ("draw_negatives", "probe_metrics"):

        def fail(*_, **__):
            raise OSError("no more space")

        monkeypatch.setattr(evaluate, function, fail)
        out = tmp_path / function
        assert rerun(out, world, *options, str(tmp_path / "probe.json")) == 2
        assert metrics(out)["test"]["rsum"] > 0
        printed = capsys.readouterr()
        assert "rsum" in printed.out and "no more space" in printed.err


def test_a_probe_is_run_and_kept_with_the_figures(world, tmp_path):
    split = scenes_of(world).splits["test"]
    item = {"filename": split.images[0], "caption": "a red star", "negative_caption": "a blue star"}
    (tmp_path / "probe.json").write_text(json.dumps({"0": item}))
    options = ["--phases", "tags=1", "--steps", "1", "--probe", str(tmp_path / "probe.json")]
    assert rerun(tmp_path / "run", world, *options) == 0
    found = metrics(tmp_path / "run")["test"]
    assert found["probe_items"] == 1 and found["probe_pairwise"] in (0, 100) and "rsum" in found


def test_a_harmed_run_json_is_told_in_one_line(tmp_path, capsys):
    for text in ("{}", "[]", '{"arguments": []}', "{"):
        (tmp_path / "run.json").write_text(text)
        assert tagsdc.main(["--resume", "--out", str(tmp_path)]) == 2
        assert "run.json" in capsys.readouterr().err


# ---- evaluation and search ---------------------------------------------------------------------


def test_eval_reproduces_the_final_figures(world, capsys):
    assert tagsdc.main(["--eval", str(world / "best.pt"), "--device", "cpu"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    rsum = [line[-1] for line in lines if line[:1] == ["rsum"]]
    assert rsum == [f"{metrics(world)['test']['rsum']:.2f}"]


def test_a_checkpoint_that_was_moved_is_evaluated_and_nothing_but_out_is_written(
    world, tmp_path, capsys
):
    moved = tmp_path / "moved"
    moved.mkdir()
    (moved / "mine.pt").write_bytes((world / "best.pt").read_bytes())
    out = tmp_path / "out"
    assert tagsdc.main(["--eval", str(moved / "mine.pt"), "--out", str(out)]) == 0
    assert [path.name for path in moved.iterdir()] == ["mine.pt"]
    assert (out / "negatives.png").exists() and not (out / "curves.png").exists()
    record = json.loads((out / "eval.json").read_text())
    assert record["test"]["rsum"] == metrics(world)["test"]["rsum"] and record["split"] == "test"
    search = ["--checkpoint", str(moved / "mine.pt"), "--query", "a red star above a blue ring"]
    assert tagsdc.main([*search, "--out", str(out)]) == 0
    assert [path.name for path in moved.iterdir()] == ["mine.pt"]


def test_a_checkpoint_brings_its_vocabulary_to_another_world(world, tmp_path, no_report):
    options = "--seed 1 --scenes 9 2 2 --phases tags=1 --steps 1".split()
    options += ["--init", str(world / "best.pt"), "--out", str(tmp_path)]
    assert tagsdc.main([*SMALL, *options]) == 0
    own, other = (torch.load(out / "best.pt", weights_only=True) for out in (world, tmp_path))
    assert own["tokens"] == other["tokens"]


def found_scores(capsys):
    lines = capsys.readouterr().out.splitlines()
    return [float(line.split()[0]) for line in lines if line[:2] in ("0.", "1.")]


def test_query_and_image_search(world, capsys):
    checkpoint = ["--checkpoint", str(world / "best.pt")]
    assert tagsdc.main([*checkpoint, "--query", "a small red star above a blue ring."]) == 0
    scores = found_scores(capsys)
    assert len(scores) == 6 and scores == sorted(scores, reverse=True)
    assert (world / "eval" / "search.png").exists()
    name = scenes_of(world).splits["test"].images[3]
    assert tagsdc.main([*checkpoint, "--image", name]) == 0
    assert len(found_scores(capsys)) == 6


def test_official_weights_start_a_run(world, tmp_path):
    state = torch.load(world / "best.pt", weights_only=True)
    network = tagsdc.TagsDC(tagsdc.Config(**state["config"]))
    network.load_state_dict(state["model"])
    official = network.export_uniter()
    official = {k: v for k, v in official.items() if not k.startswith(("rank", "disc"))}
    torch.save(official, tmp_path / "uniter.pt")
    options = "--phases warmup=1 tags=1 --steps 2".split()
    options += ["--init", str(tmp_path / "uniter.pt")]
    assert rerun(tmp_path / "run", world, *options) == 0
    assert rows(tmp_path / "run")[0]["phase"] == "tags"
    assert metrics(tmp_path / "run")["warmup"] is None
    (tmp_path / "uniter.pt").unlink()  # what a run began with is not needed to evaluate it
    assert tagsdc.main(["--eval", str(tmp_path / "run" / "best.pt")]) == 0


def test_official_weights_are_evaluated(world, tmp_path, capsys):
    """With the vocabulary beside the data; here that of the scenes, which are drawn anew."""
    state = torch.load(world / "best.pt", weights_only=True)
    network = tagsdc.TagsDC(tagsdc.Config(**state["config"] | {"heads": 2}))  # 64 wide, as UNITER
    network.load_state_dict(state["model"])
    official = network.export_uniter()
    torch.save({k: v for k, v in official.items() if not k.startswith("disc")}, tmp_path / "u.pt")
    share_data(tmp_path / "out", world)
    options = ["--eval", str(tmp_path / "u.pt"), "--scenes", "30", "5", "8", "--dtype", "float32"]
    assert tagsdc.main([*options, "--analyse-images", "4", "--out", str(tmp_path / "out")]) == 0
    assert "disc_output.weight at random" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "eval.json").read_text())["test"]["rsum"] > 0


def test_the_warm_up_is_compared_with_a_report_of_the_same_images_alone(world, tmp_path, capsys):
    for options in (["--test-images", "3"], ["--seed", "1"], ["--scenes", "30", "5", "7"], []):
        evaluation = ["--eval", str(world / "best.pt"), "--out", str(tmp_path / "out"), *options]
        assert tagsdc.main(evaluation) == 0
        assert ("warm-up" in capsys.readouterr().out) == (options == [])


def test_a_run_without_its_last_checkpoint_is_not_begun_anew(world, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(world, out)
    (out / "last.pt").unlink()
    assert tagsdc.main(["--resume", "--out", str(out)]) == 2
    assert "last.pt is missing" in capsys.readouterr().err
    assert (out / "best.pt").exists() and (out / "metrics.json").exists()


def test_a_part_of_the_test_split_is_reported_as_such_or_none(world, tmp_path, capsys):
    evaluation = ["--eval", str(world / "best.pt"), "--out", str(tmp_path / "part")]
    assert tagsdc.main([*evaluation, "--test-images", "3"]) == 0
    assert "only the first 3 of 8 images" in capsys.readouterr().out
    assert rerun(tmp_path / "none", world, "--test-images", "0", "--phases", "tags=1") == 0
    assert metrics(tmp_path / "none")["test"] == {}
    assert not (tmp_path / "none" / "negatives.png").exists()


def test_scores_that_are_kept_are_not_worked_out_again(world, tmp_path, monkeypatch, capsys):
    evaluation = ["--eval", str(world / "best.pt"), "--save-scores", "--out", str(tmp_path)]
    assert tagsdc.main(evaluation) == 0
    first = json.loads((tmp_path / "eval.json").read_text())["test"]
    scored = []
    score_pairs = tagsdc.TagsDC.score_pairs

    def record(self, texts, text_index, *rest):
        scored.append(len(text_index))
        return score_pairs(self, texts, text_index, *rest)

    monkeypatch.setattr(tagsdc.TagsDC, "score_pairs", record)
    assert tagsdc.main(evaluation) == 0
    assert json.loads((tmp_path / "eval.json").read_text())["test"] == first
    assert 40 * 8 not in scored, "all captions with all images"
    for harm in (lambda path: path.write_bytes(path.read_bytes()[:99]), Path.unlink):
        harm(tmp_path / "scores.npy")
        assert tagsdc.main(evaluation) == 0
        assert json.loads((tmp_path / "eval.json").read_text())["test"] == first
    del scored[:]
    assert tagsdc.main([*evaluation, "--max-text", "6"]) == 0
    assert 40 * 8 in scored, "texts are cut elsewhere"


def bert_folder(folder):
    """A random BERT as BERTs are published, whose vocabulary has the words of the scenes."""
    golden = np.load(ROOT / "tests" / "golden" / "bert_random.npz")
    state = {name[6:]: torch.from_numpy(golden[name]) for name in golden if name[:6] == "state/"}
    config = {"model_type": "bert", "vocab_size": 120, "hidden_size": 32, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": 40}
    words = " ".join(word for words in data.KINDS.values() for word in words).split()
    tokens = [
        *data.SPECIALS,
        *dict.fromkeys([*words, "a", "there", "is", "on", "of", "background"]),
    ]
    tokens += [f"##{n}" for n in range(120 - len(tokens))]
    folder.mkdir()
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "vocab.txt").write_text("\n".join(tokens))
    return folder


def test_a_bert_is_aligned_and_learns_to_match_before_it_is_tuned(
    world, tmp_path, monkeypatch, no_report
):
    state = {}
    end_phase = tagsdc.Trainer.end_phase

    def record(self, phase):
        state[phase.part] = weights(self.out)
        end_phase(self, phase)

    monkeypatch.setattr(tagsdc.Trainer, "end_phase", record)
    bert = bert_folder(tmp_path / "bert")
    options = f"--init {bert} --max-text 40 --phases warmup=10 dc=2".split()
    assert rerun(tmp_path / "run", world, *options) == 0
    log = rows(tmp_path / "run")
    assert [row["phase"] for row in log if row["align"]] == ["warmup"] * 2  # steps 1 and 2
    assert {row["phase"] for row in log if row["contrast"]} == {"warmup"} and log[-1]["woc"]
    golden = np.load(ROOT / "tests" / "golden" / "bert_random.npz")
    published = {
        "text.word.weight": "embeddings.word_embeddings.weight",
        "text.position.weight": "embeddings.position_embeddings.weight",
        "layers.0.query.weight": "encoder.layer.0.attention.self.query.weight",
    }
    published = {
        name: torch.from_numpy(golden[f"state/bert.{of}"]) for name, of in published.items()
    }
    for name, tensor in published.items():
        learnt = not torch.equal(state["align"][name], tensor)
        assert learnt == (name == "text.word.weight"), "the layers are not aligned"
        assert not torch.equal(state["matching"][name], tensor)
    # The folder is needed no more.
    shutil.rmtree(bert)
    assert tagsdc.main(["--eval", str(tmp_path / "run" / "best.pt")]) == 0


def test_an_interrupted_alignment_goes_on_exactly(world, tmp_path, monkeypatch, no_report):
    bert = bert_folder(tmp_path / "bert")
    options = [*SMALL, "--init", str(bert), "--max-text", "40", "--phases", "warmup=1"]
    options += ["--steps", "24", "--out"]
    whole = share_data(tmp_path / "whole", world)
    cut = share_data(tmp_path / "cut", world)
    assert tagsdc.main([*options, str(whole)]) == 0
    for moment in (("optimise", 0, 3), ("end_phase", 0, 6), ("optimise", 1, 0), ("optimise", 1, 3)):
        assert interrupt_at(moment, monkeypatch, [*options, str(cut)]) == 143, moment
        options = ["--resume", "--out"]
    assert tagsdc.main([*options, str(cut)]) == 0
    assert (cut / "log.csv").read_text() == (whole / "log.csv").read_text()
    expected = weights(whole, "best.pt")
    for name, tensor in weights(cut, "best.pt").items():
        assert torch.equal(tensor, expected[name]), name


def test_aligned_regions_find_their_captions(world, tmp_path, no_report, capsys):
    bert = bert_folder(tmp_path / "bert")
    options = f"--init {bert} --max-text 40 --phases warmup=1 --steps 160 --log-every 39".split()
    rerun(tmp_path / "run", world, *options, "--val-images", "1", "--warmup-batch-size", "2")
    losses = [float(row["align"]) for row in rows(tmp_path / "run") if row["align"]]
    assert losses[-1] < 0.8 * losses[0]
    assert "by the cosine: RSum 600.0" in capsys.readouterr().out, "of the only image of val"


def test_the_cosines_of_an_alignment_are_those_of_one_caption_and_one_image(world):
    content = scenes_of(world)
    sizes = {
        "vocab_size": len(content.tokenizer.tokens),
        "feature_size": content.regions.feature_size,
    }
    model = TagsDC(Config.preset("tiny", **sizes))
    settings = SimpleNamespace(tokenizer=content.tokenizer, device="cpu")
    part = evaluate.first_images(content, "test", 3)
    found, owner = tagsdc.alignment_scores(model, part, "test", settings)
    assert found.shape == (len(owner), 3) and owner.tolist() == sorted(owner.tolist())
    model.eval()
    for caption in range(len(owner)):
        words = content.text("test", torch.tensor([caption]))[0]
        words = words[words != content.tokenizer.pad_id][1:-1]  # without [CLS] and [SEP]
        text = model.text.word.weight[words].mean(0)
        for image in range(3):
            features, boxes, real = (x[0] for x in content.image("test", torch.tensor([image])))
            one = model.prepare_regions(features[None, real], boxes[None, real]).states[0]
            picture = one.mean(0) + one[boxes[real, 6].argmax()]
            expected = torch.cosine_similarity(text, picture, dim=0)
            assert found[caption, image].item() == pytest.approx(expected.item(), abs=1e-5)


# ---- bad input ---------------------------------------------------------------------------------


def exit_code(options):
    try:
        return tagsdc.main(options)
    except SystemExit as stop:  # argparse
        return stop.code


BAD = [
    ("--hard 50 --maskings 2 --refills 3", "--hard 50"),
    ("--pool 3", "--pool 3"),
    ("--steps 0", "--steps"),
    ("--lr nan", "--lr"),
    ("--dropout 1", "--dropout"),
    ("--truth-threshold 1.5", "--truth-threshold"),
    ("--temperature 0", "--temperature"),
    (f"--seed {10**30}", "--seed"),
    ("--phases warmup", "--phases"),
    ("--phases tags=0.0", "above 0"),
    ("--phases tags=1 tags=3", "name each phase once"),
    ("--resume --eval {best}", "--resume and --eval exclude each other"),
    ("--phrases x.json", "not for the scenes"),
    ("--eval {folder}", "the folder of a BERT is for --init"),
    ("--phases warmup=1 tags=1 dc=1 --steps 2", "leaves no step for"),
    ("--quick --recipe paper", "--quick and --recipe"),
    ("--checkpoint {best} --query x --image y", "exclude each other"),
    ("--init {best} --size small", "--size small"),
    ("--out {run} --init {best}", "lies in --out"),
    ("--init model.safetensors --warmup-batch-size 1", "no wrong pair"),
    ("--max-text 100", "--max-text"),
    ("--init {folder}", "config.json"),
    ("--query x", "--checkpoint"),
    ("--checkpoint {best}", "--query"),
    ("--size huge", "--size"),
    ("--scenes 10 10", "--scenes"),
    ("--eval nothing.pt", "nothing.pt"),
    ("--init nothing.pt", "nothing.pt"),
    ("--init {readme} --phases warmup=1", "no other phase"),
    ("--init {readme}", "README.md"),
    ("--data coco --root nowhere", "dataset_coco.json"),
    ("--device mps", "mps"),
    ("--resume --out {out}", "run.json"),
    ("--checkpoint {best} --query zebra", "zebra"),
    ("--checkpoint {best} --image nothing", "nothing"),
]


@pytest.mark.parametrize("options, words", BAD)
def test_bad_input_gets_one_line_and_exit_code_2(options, words, world, tmp_path, capsys):
    fill_in = dict(
        readme=ROOT / "README.md",
        out=tmp_path / "empty",
        best=world / "best.pt",
        run=world,
        folder=tmp_path,
    )
    options = options.format(**fill_in).split()
    if "--data" not in options and "--eval" not in options and "--scenes" not in options:
        options += ["--scenes", "30", "5", "8"] if "--checkpoint" not in options else []
    if "--out" not in options:
        options += ["--out", str(tmp_path)]
    code = exit_code(options)
    error = capsys.readouterr().err.strip()
    assert code == 2 and words in error.splitlines()[-1] and "Traceback" not in error


@pytest.mark.parametrize(
    "content",
    [b"", b"text", 3, None, [1, 2], {"epoch": 1}, {"arguments": {}}, {"text.word.weight": "x"}],
    ids=str,
)
def test_what_is_no_checkpoint_gets_one_line(content, world, tmp_path, capsys):
    path = tmp_path / "odd.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    share_data(tmp_path, world)
    for option in ("--eval", "--init"):
        code = exit_code([*SMALL, option, str(path), "--out", str(tmp_path)])
        error = capsys.readouterr().err.strip()
        assert code == 2 and "odd.pt" in error and len(error.splitlines()) == 1
        assert "weights_only" not in error


def test_a_checkpoint_of_other_features_or_words_says_which_field_differs(world, tmp_path, capsys):
    state = torch.load(world / "best.pt", weights_only=True)
    state["config"]["feature_size"] += 1
    torch.save(state, tmp_path / "other.pt")
    share_data(tmp_path, world)
    code = exit_code([*SMALL, "--init", str(tmp_path / "other.pt"), "--out", str(tmp_path)])
    assert code == 2 and "feature_size" in capsys.readouterr().err


# ---- recipes -----------------------------------------------------------------------------------


SHARED = {
    "dropout": 0.1,
    "accumulate": 8,
    "pool": 399,
    "maskings": 20,
    "refills": 20,
    "writer_sees": "own",
    "truth_threshold": 1.0,
    "margin": 0.2,
    "val_images": 1000,
    "validations": 10,
}


@pytest.mark.parametrize(
    "recipe, lr, steps, anchors, H, temperature, tags, mlm",
    [
        ("coco-base-1", 5e-5, 5000, 256, 31, 1.5, 5e-5, 0.01),
        ("coco-base-2", 1e-5, 1500, 256, 31, 1.5, 1e-4, 0.05),
        ("coco-large-1", 4e-5, 5000, 256, 23, 1.5, 1e-3, 0.05),
        ("coco-large-2", 1e-5, 5000, 256, 31, 1.5, 1e-4, 0.05),
        ("flickr-base-1", 5e-5, 5000, 128, 31, 2.0, 5e-4, 0.05),
        ("flickr-base-2", 1e-5, 5000, 256, 31, 1.5, 5e-4, 0.1),
        ("flickr-large-1", 5e-5, 5000, 256, 23, 2.0, 1e-3, 0.05),
        ("flickr-large-2", 1e-5, 1500, 256, 23, 1.5, 5e-4, 0.05),
    ],
)
def test_recipes_are_the_release_s_schedules(recipe, lr, steps, anchors, H, temperature, tags, mlm):
    _, size, stage = recipe.split("-")
    args = tagsdc.parse_arguments(["--recipe", recipe])
    (phase,) = tagsdc.plan_phases(args)
    assert (phase.steps, phase.peak_lr) == (steps, lr)
    weights = {"hard": 1.0, "tags": tags, "mlm": mlm}
    if stage == "2":
        weights |= {"wod": 5e-4, "woc": 5e-4}
    assert phase.weights == weights and phase.name == ("tags" if stage == "1" else "dc")
    assert (args.size, args.retrieved, args.hard, args.temperature) == (size, H, H, temperature)
    assert args.batch_size * args.accumulate == anchors
    assert vars(args).items() >= SHARED.items()
    assert args.test_images == (0 if stage == "1" else None)
    assert tagsdc.parse_arguments(["--recipe", recipe, "--lr", "0.5"]).lr == 0.5


def test_recipes_hold_no_unknown_option_and_every_value_in_which_two_stages_differ():
    known = vars(tagsdc.make_parser().parse_args([])).keys()
    for recipe in (*tagsdc.RECIPES.values(), tagsdc.QUICK):
        assert recipe.keys() <= known
    for stage in "12":
        recipes = [recipe for name, recipe in tagsdc.RECIPES.items() if name.endswith(stage)]
        assert all(recipe.keys() == recipes[0].keys() for recipe in recipes)


@pytest.mark.parametrize("start", [[], ["--init", "bert/model.safetensors"]])
def test_every_term_of_the_plan_is_in_the_curves(start):
    options = ["--phases", "warmup=1", "tags=1", "dc=1", *start]
    plan = tagsdc.plan_phases(tagsdc.parse_arguments(options))
    drawn = {column for _, _, columns in evaluate.PANELS for column in columns}
    assert {term for phase in plan for term in phase.weights} <= drawn


def test_a_schedule_of_the_release_needs_weights(world, tmp_path, capsys):
    assert tagsdc.main(["--recipe", "coco-base-1", "--out", str(tmp_path / "run")]) == 2
    assert "give its weights by --init" in capsys.readouterr().err


def test_given_options_lie_over_a_checkpoint_s(world):
    """Also where they are the default; its data folders go with its data."""
    state = torch.load(world / "best.pt", weights_only=True)
    assert state["arguments"]["hard"] == 3
    best = ["--eval", str(world / "best.pt")]
    assert tagsdc.parse_arguments(best).hard == 3
    assert tagsdc.parse_arguments(best).out == str(world / "eval")
    assert tagsdc.parse_arguments([*best, "--hard", "4"]).hard == 4
    assert tagsdc.parse_arguments([*best, "--hard", "2"]).hard == 2


def test_other_data_leave_the_folders_of_the_old_ones(world, tmp_path):
    state = torch.load(world / "best.pt", weights_only=True)
    state["arguments"] |= {"data": "coco", "root": "/coco", "features": "/coco/x"}
    torch.save(state, tmp_path / "coco.pt")
    best = ["--eval", str(tmp_path / "coco.pt")]
    args = tagsdc.parse_arguments(best)
    assert (args.data, args.root, args.features) == ("coco", "/coco", "/coco/x")
    args = tagsdc.parse_arguments([*best, "--data", "flickr30k", "--root", "/flickr"])
    assert (args.data, args.root, args.features) == ("flickr30k", "/flickr", None)


def test_a_checkpoint_with_an_option_of_another_version_is_evaluated(world, tmp_path):
    state = torch.load(world / "best.pt", weights_only=True)
    state["arguments"]["an_option_of_next_year"] = 3
    torch.save(state, tmp_path / "best.pt")
    args = tagsdc.parse_arguments(["--eval", str(tmp_path / "best.pt")])
    assert not hasattr(args, "an_option_of_next_year")


# ---- photographs -------------------------------------------------------------------------------

FLICKR8K = ROOT.parent / "shared" / "real" / "flickr8k"


@pytest.mark.skipif(not FLICKR8K.is_dir(), reason="the features of Flickr8k are not here")
def test_photographs_in_miniature(tmp_path, capsys):
    """60 photographs of the test split, shared out anew, with all their captions."""
    folder = tmp_path / "regions"
    options = ["--splits", "test", "--packs", str(FLICKR8K)]
    command = [sys.executable, str(FLICKR8K / "expand.py"), str(folder), *options]
    subprocess.run(command, check=True, capture_output=True)
    images = json.loads((FLICKR8K / "dataset_flickr8k.json").read_text())["images"]
    images = [image for image in images if image["split"] == "test"][:60]
    for n, image in enumerate(images):
        image["split"] = "train" if n < 40 else "val" if n < 50 else "test"
    (tmp_path / "dataset_flickr8k.json").write_text(json.dumps({"images": images}))
    run = ["--data", "flickr8k", "--root", str(tmp_path), "--log-every", "2"]
    run += "--steps 8 --phases warmup=1 dc=1 --size tiny --warmup-batch-size 8 --hard 2".split()
    run += "--batch-size 4 --pool 8 --maskings 2 --refills 2".split()
    run += ["--analyse-images", "5", "--device", "cpu", "--out", str(tmp_path / "run")]
    assert tagsdc.main(run) == 0
    found = metrics(tmp_path / "run")
    wanted = {"wod_auc", "sentences_repaired", "rsum"}
    assert wanted <= found["test"].keys() & found["warmup"].keys()
    assert {"itm", "tags", "woc"} <= rows(tmp_path / "run")[-1].keys()
    # Features of another width than the checkpoint's.
    narrow = {"features": np.ones((3, 20)), "norm_bb": np.tile([0, 0, 1, 1], (3, 1))}
    for path in folder.iterdir():
        np.savez(path, **narrow)
    capsys.readouterr()
    assert tagsdc.main(["--eval", str(tmp_path / "run" / "best.pt"), "--out", str(tmp_path)]) == 2
    assert "its feature_size is 512, the data's 20" in capsys.readouterr().err


# ---- damaged checkpoints and probe files -------------------------------------------------------

PROBE = {str(i): {"filename": f"{i}.jpg", "caption": "a", "negative_caption": "b"} for i in "123"}


def throw_damaged_files(folder, count, seed=0):
    """Reads `count` damaged checkpoints and probe files -> {kind: how many were read after all}."""
    network = tagsdc.TagsDC(tagsdc.Config(20, 6, 16, 1, 2, 16, 16, 0.0))
    state = {"format": tagsdc.FORMAT, "arguments": {}, "model": network.state_dict()}
    torch.save(state, folder / "checkpoint")
    (folder / "probe").write_text(json.dumps(PROBE))
    readers = {"checkpoint": tagsdc.load_checkpoint, "probe": evaluate.read_probe}
    read = dict.fromkeys(readers, 0)
    for kind, reader in readers.items():
        chance = random.Random(f"{kind} {seed}")
        whole = (folder / kind).read_bytes()
        for _ in range(count):
            (folder / kind).write_bytes(damage(whole, chance))
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                try:
                    reader(folder / kind)
                    read[kind] += 1
                except data.InputError as fault:
                    assert kind in str(fault) and "\n" not in str(fault)
    return read


def test_damaged_checkpoints_and_probe_files_are_read_or_named(tmp_path):
    read = throw_damaged_files(tmp_path, 60)
    assert all(count < 60 for count in read.values())


if __name__ == "__main__":  # python tests/test_tagsdc.py 1000
    with tempfile.TemporaryDirectory() as place:
        print(throw_damaged_files(Path(place), int(sys.argv[1]), seed=1))
