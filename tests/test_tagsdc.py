"""The command, end to end, in miniature: what it writes, that it learns, resumes, repeats itself and refuses bad input."""
import csv
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tagsdc

ROOT = Path(__file__).parents[1]
SMALL = ("--scenes 60 10 10 --steps 12 --batch-size 4 --warmup-batch-size 8 --pool 8 --hard 3 --maskings 2 --refills 3 --val-images 5 "
         "--analyse-images 4 --log-every 2 --validations 3 --dtype float32 --device cpu --phases warmup=4 tags=4 dc=4").split()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A run directory that holds a finished small run."""
    out = tmp_path_factory.mktemp("run")
    assert tagsdc.main([*SMALL, "--out", str(out), "--save-scores"]) == 0
    return out


def rerun(out, world, *options):
    """The small run again elsewhere, on the same drawn scenes."""
    (out / "data").parent.mkdir(exist_ok=True)
    (out / "data").symlink_to(world / "data")
    return tagsdc.main([*SMALL, "--out", str(out), *options])


def metrics(out):
    return json.loads((out / "metrics.json").read_text())


def rows(out):
    with open(out / "log.csv") as file:
        return list(csv.DictReader(file))


def test_a_run_leaves_everything_it_promises(world):
    assert {"log.csv", "metrics.json", "last.pt", "best.pt", "negatives.png", "curves.png", "scores.npy"} <= {p.name for p in world.iterdir()}
    assert {"tr_r1", "tr_r5", "tr_r10", "ir_r1", "ir_r5", "ir_r10", "rsum"} <= metrics(world)["test"].keys()
    assert metrics(world)["warmup"]["rsum"] > 0 and metrics(world)["arguments"]["hard"] == 3
    phases = [row["phase"] for row in rows(world)]
    assert sorted(set(phases), key=phases.index) == ["warmup", "tags", "dc"]
    assert not list(world.glob("*.part"))


def test_the_same_seed_gives_the_same_result(world, tmp_path):
    rerun(tmp_path / "same", world)
    assert metrics(tmp_path / "same")["test"] == metrics(world)["test"]
    assert [r["loss"] for r in rows(tmp_path / "same")] == [r["loss"] for r in rows(world)]


def test_a_killed_run_resumes_to_the_same_result(world, tmp_path):
    def kill(self, *_, original=tagsdc.Run.report):
        original(self, *_)
        if self.at["phase"] == 1:
            self.signal = signal.SIGTERM
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tagsdc.Run, "report", kill)
        assert rerun(tmp_path / "cut", world) == 143
    assert tagsdc.main([*SMALL, "--out", str(tmp_path / "cut"), "--resume"]) == 0
    assert metrics(tmp_path / "cut")["test"] == metrics(world)["test"]


def test_a_signal_in_the_last_step_costs_nothing(world, tmp_path):
    def kill(self, *arguments, original=tagsdc.Run.report):
        self.asked = signal.SIGTERM if self.at["phase"] == 2 and arguments[-1] else 0
        original(self, *arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tagsdc.Run, "report", kill)
        assert rerun(tmp_path / "cut", world) == 143
    assert tagsdc.main([*SMALL, "--out", str(tmp_path / "cut"), "--resume"]) == 0
    assert metrics(tmp_path / "cut")["test"] == metrics(world)["test"]


def test_a_term_is_logged_as_the_mean_over_the_steps_that_had_it(world, tmp_path):
    for every in ("1", "2"):
        rerun(tmp_path / every, world, "--phases", "warmup=1", "--steps", "4", "--words-first", "0.75", "--log-every", every)
    assert rows(tmp_path / "2")[-1]["itm"] == rows(tmp_path / "1")[-1]["itm"], "only the last of the four steps learns matching"


def test_a_checkpoint_brings_its_vocabulary_to_another_world(world, tmp_path):
    assert tagsdc.main([*SMALL, "--seed", "1", "--init", str(world / "best.pt"), "--out", str(tmp_path)]) == 0
    own, other = (torch.load(out / "best.pt", weights_only=True)["tokens"] for out in (world, tmp_path))
    assert own == other


def test_eval_reproduces_the_final_figures(world, capsys):
    assert tagsdc.main(["--eval", str(world / "best.pt"), "--device", "cpu"]) == 0  # in float32, as it was trained
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("RSum")]
    assert [row[-1] for row in rows] == [f"{metrics(world)['test']['rsum']:.2f}"]


@pytest.mark.parametrize("option, lost", [("--lambda-tags", "tags"), ("--lambda-mlm", "mlm"), ("--lambda-wod", "wod"), ("--lambda-woc", "woc")])
def test_a_weight_of_zero_takes_the_term_out_of_the_plan(option, lost):
    plan = tagsdc.phase_plan(tagsdc.parse_arguments([option, "0"]))
    assert all(lost not in weights for phase, _, weights, _ in plan if phase != "warmup")
    assert sum(steps for _, steps, _, _ in plan) == 7000


def test_without_synthetic_terms_nothing_is_generated(world, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(tagsdc.generate, "refill_masks", lambda *_, original=tagsdc.generate.refill_masks, **__: made.append(1) or original(*_, **__))
    monkeypatch.setattr(tagsdc, "test_report", lambda *_: ({"rsum": 0.0}, None, None))
    monkeypatch.setattr(tagsdc, "finish", lambda *_: None)
    rerun(tmp_path / "base", world, "--lambda-tags", "0", "--lambda-wod", "0", "--lambda-woc", "0")
    assert not made


def test_negatives_are_drawn_and_scored_in_eval_mode_and_learned_from_in_train_mode(world, tmp_path, monkeypatch):
    modes = []
    encode = tagsdc.TagsDC._encode
    monkeypatch.setattr(tagsdc.TagsDC, "_encode", lambda self, *a, **k: modes.append((torch.is_grad_enabled(), self.training)) or encode(self, *a, **k))
    rerun(tmp_path / "run", world, "--dropout", "0.1", "--phases", "dc=1", "--steps", "2")
    assert set(modes) == {(False, False), (True, True)}


def test_the_best_validation_of_the_last_phase_is_what_is_reported(world):
    best = torch.load(world / "best.pt", weights_only=True)
    highest = max(float(row["val_rsum"] or 0) for row in rows(world) if row["phase"] == "dc")
    assert metrics(world)["val"]["rsum"] == best["val"]["rsum"] == pytest.approx(highest, abs=0.01)


def test_a_phase_s_own_heads_are_trained_however_good_the_phase_before_was(world, tmp_path, monkeypatch):
    falling = iter(range(99, 0, -1))
    monkeypatch.setattr(tagsdc.evaluate, "retrieval_metrics", lambda *_: dict.fromkeys(("rsum", "tr_r1", "ir_r1"), float(next(falling))))
    rerun(tmp_path / "run", world, "--log-every", "1")
    best, done = torch.load(tmp_path / "run" / "best.pt", weights_only=True), [row for row in rows(tmp_path / "run") if row["val_rsum"]]
    phases = [row["phase"] for row in done]
    assert best["phase"] == 2 and best["val"]["rsum"] == 98.0 - phases.index("dc"), "the warm-up's report takes one"
    assert [row["step"] for row in done if row["phase"] == "dc"] == ["10", "11", "12"], "not before half of it: the heads are new"


def test_each_direction_of_the_retrieval_loss_goes_under_its_own_name():
    model = tagsdc.TagsDC(tagsdc.Config(20, 6, 16, 1, 2, 16, 16, 0.0))
    ids, none, every = torch.randint(5, 20, (2, 4)), torch.zeros(2, 1, dtype=torch.bool), torch.ones(2, 1, dtype=torch.bool)
    batch = dict(input_ids=ids, masked=ids[:, None], features=torch.randn(2, 3, 6), boxes=torch.rand(2, 3, 7), region_mask=torch.ones(2, 3, dtype=torch.bool))
    tokenizer, other = type("Tokenizer", (), {"pad_id": 0}), torch.tensor([[1], [0]])
    _, seen = tagsdc.Objective(model, tokenizer, tagsdc.parse_arguments([]))(batch, {"hard": 1.0}, ((other, none), (other, every)), None)
    assert seen["hard_image"] == 0 < seen["hard_text"], "only captions were retrieved"


def test_query_and_image_search(world, capsys):
    assert tagsdc.main(["--checkpoint", str(world / "best.pt"), "--query", "a small red star above a blue ring"]) == 0
    lines = capsys.readouterr().out.splitlines()
    scores = [float(line.split()[0]) for line in lines if line[:2] in ("0.", "1.")]
    assert len(scores) == 6 and scores == sorted(scores, reverse=True) and (world / "search.png").exists()
    assert tagsdc.main(["--checkpoint", str(world / "best.pt"), "--image", "scene_test_0003"]) == 0
    assert len([line for line in capsys.readouterr().out.splitlines() if line[:2] in ("0.", "1.")]) == 6


@pytest.mark.parametrize("options, words", [
    ("--hard 50 --maskings 2 --refills 3", "--hard 50"), ("--pool 3", "--pool 3"), ("--steps 0", "--steps"), ("--lr nan", "--lr"),
    ("--dropout 1", "--dropout"), ("--phases warmup", "--phases"), ("--phases tags=0.0", "above 0"), ("--query x", "--checkpoint"), ("--checkpoint {best}", "--query"), ("--size huge", "huge"),
    ("--eval nothing.pt", "nothing.pt"), ("--init nothing.pt", "nothing.pt"), ("--init {readme} --phases warmup=1", "no other phase"), ("--data coco --root nowhere", "dataset_coco.json"), ("--init {readme}", "README.md"),
    ("--device mps", "mps"), ("--resume --out {out}", "last.pt")])
def test_bad_input_gets_one_line_and_exit_code_2(options, words, world, tmp_path, capsys):
    options = options.format(readme=ROOT / "README.md", out=tmp_path / "empty", best=world / "best.pt").split()
    try:
        code = tagsdc.main([*([] if "--data" in options or "--eval" in options else ["--scenes", "60", "10", "10"]), "--out", str(tmp_path), *options]
                           if "--out" not in options else options)
    except SystemExit as stop:  # argparse
        code = stop.code
    error = capsys.readouterr().err.strip()
    assert code == 2 and words in error.splitlines()[-1] and "Traceback" not in error


def test_official_weights_start_a_run(world, tmp_path):
    model = torch.load(world / "best.pt", weights_only=True)
    network = tagsdc.TagsDC(tagsdc.Config(**model["config"]))
    torch.save({k: v for k, v in network.export_uniter().items() if not k.startswith(("rank", "disc"))}, tmp_path / "uniter.pt")
    assert rerun(tmp_path / "run", world, "--init", str(tmp_path / "uniter.pt"), "--heads", "4") == 0
    assert [row["phase"] for row in rows(tmp_path / "run")][0] == "tags" and metrics(tmp_path / "run")["warmup"] is None
    (tmp_path / "uniter.pt").unlink()  # what a run began with is not needed to evaluate or search it
    assert tagsdc.main(["--eval", str(tmp_path / "run" / "best.pt")]) == 0


def test_training_learns(world, tmp_path):
    """The masked-LM loss of a longer warm-up falls well below where it began."""
    tagsdc.main([*SMALL, "--out", str(world), "--phases", "warmup=1", "--steps", "150", "--log-every", "25", "--val-images", "2",
                 "--warmup-batch-size", "16", "--out", str(tmp_path)])
    losses = [float(row["mlm"]) for row in rows(tmp_path)]
    assert losses[-1] < 0.8 * losses[0]


def test_ctrl_c_saves_and_exits_with_130(world, tmp_path):
    (tmp_path / "data").symlink_to(world / "data")
    command = subprocess.Popen([sys.executable, "tagsdc.py", *SMALL, "--steps", "100000", "--out", str(tmp_path)], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    for line in command.stdout:
        if line.startswith("warmup"):
            break
    command.send_signal(signal.SIGINT)
    assert command.wait(60) == 130 and (tmp_path / "last.pt").exists()


@pytest.mark.parametrize("recipe, lr, steps, tags, mlm, more", [
    ("coco-base-1", 5e-5, 5000, 5e-5, 0.01, {}), ("coco-base-2", 1e-5, 1500, 1e-4, 0.05, dict(lambda_wod=5e-4, lambda_woc=5e-4)),
    ("flickr-base-1", 5e-5, 5000, 5e-4, 0.05, dict(temperature=2.0, batch_size=16)), ("flickr-base-2", 1e-5, 5000, 5e-4, 0.1, {}),
    ("coco-large-1", 4e-5, 5000, 1e-3, 0.05, dict(size="large", hard=23)), ("flickr-large-2", 1e-5, 1500, 1e-3, 0.05, dict(hard=23))])
def test_recipes_are_the_release_s_schedules(recipe, lr, steps, tags, mlm, more):
    args = tagsdc.parse_arguments(["--recipe", recipe])
    ((phase, planned, weights, peak),) = tagsdc.phase_plan(args)
    assert (phase, planned, peak, weights["tags"], weights["mlm"]) == ("tags" if recipe[-1] == "1" else "dc", steps, lr, tags, mlm)
    assert ("wod" in weights) == (phase == "dc") and (args.pool, args.maskings, args.refills, args.dropout) == (399, 20, 20, 0.1)
    assert vars(args).items() >= more.items()
    assert tagsdc.parse_arguments(["--recipe", recipe, "--lr", "0.5"]).lr == 0.5, "what is said on the command line goes before a recipe"
