"""The study's command line and tables. Its runs are those of tagsdc.py."""

import json
import types

import pytest
import study

import tagsdc
from data import InputError


def parse(tmp_path, *options):
    return study.parse_arguments([*options, "--out", str(tmp_path / "out")])


def test_options_of_a_run_are_passed_on(tmp_path):
    given = parse(tmp_path, "--seeds", "2", "--steps", "130", "--val-images", "7", "--no-recompute")
    assert given.passed_on == ["--steps", "130", "--val-images", "7", "--no-recompute"]
    assert (given.seeds, given.images, given.arms) == (2, [1000], list(study.ARMS))
    assert given.out.is_absolute() and given.args.val_images == 7
    given = parse(tmp_path, "--scenes", "50", "6", "7", "--images", "30", "40", "--arms", "TAGS")
    assert (given.images, given.arms) == ([30, 40], ["TAGS"])
    options = study.shared_options(given, 30, 4)
    run = tagsdc.parse_arguments([*options, "--out", "x"])
    assert (run.seed, run.scenes) == (4, [30, 6, 7])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--seed", "3"], "--seeds N"),
        (["--see=3"], "--seeds N"),
        (["--resume"], "same command again"),
        (["--eval", "x"], "only trains"),
        (["--phases", "dc=1"], "--phases: a warm-up"),
        (["--phases", "warmup=1"], "--phases: a warm-up"),
        (["--arms", "retrieved, as long", "retrieved"], "timed by 'TAGS-DC'"),
        (["--data", "coco", "--images", "3"], "--images: coco has"),
    ],
)
def test_other_options_are_refused_in_one_line(tmp_path, options, text):
    with pytest.raises(InputError, match=text) as fault:
        parse(tmp_path, *options)
    assert "\n" not in str(fault.value)


def test_unknown_options_are_refused(tmp_path, capsys):
    for options in (["--nonsense", "3"], ["--arms", "TAGS", "other"], ["--steps", "x"]):
        with pytest.raises(SystemExit):
            parse(tmp_path, *options)
        assert "error" in capsys.readouterr().err


def test_runs_of_other_options_are_not_mixed(tmp_path):
    study.check_folder(parse(tmp_path, "--steps", "130"))
    study.check_folder(parse(tmp_path, "--steps", "130", "--arms", "TAGS"))
    with pytest.raises(InputError, match=r"other options \(--steps 130\)"):
        study.check_folder(parse(tmp_path))


def test_an_arm_goes_on_from_its_warm_up(tmp_path, monkeypatch):
    given = parse(tmp_path, "--steps", "130", "--lambda-wod", "0.7", "--seeds", "2")
    runs = {}

    def run_once(folder, options):
        runs[folder.relative_to(given.out).as_posix()] = tagsdc.parse_arguments(options)
        folder.mkdir(parents=True, exist_ok=True)
        seconds = 9 if "DC" in folder.name else 2 + runs[f"{folder.parent.name}/warmup"].seed
        (folder / "metrics.json").write_text(json.dumps({"seconds": seconds}))

    monkeypatch.setattr(study, "run_once", run_once)
    monkeypatch.setattr(study, "measures_of", lambda folder: {"rsum": 1.0})
    for seed in range(2):
        study.run_warmup(given, 1000, seed)
        for arm in ("retrieved", "TAGS", "TAGS-DC"):
            row = study.run_arm(given, arm, 1000, seed)
            assert row == {"seed": seed, "arm": arm, "images": 1000, "rsum": 1.0}
    study.run_arm(given, "retrieved, as long", 1000, 1)
    plans = {name: tagsdc.plan_phases(args) for name, args in runs.items()}
    steps = {name: [(phase.name, phase.steps) for phase in plan] for name, plan in plans.items()}
    assert steps["seed0-1000/warmup"] == [("warmup", 80), ("warmup", 20)]
    assert steps["seed1-1000/TAGS-DC"] == [("dc", 30)]
    assert steps["seed1-1000/retrieved-as-long"] == [("dc", 135)]  # 9 seconds against 2
    assert runs["seed1-1000/TAGS"].init == str(given.out / "seed1-1000/warmup/best.pt")
    terms = [plans[f"seed1-1000/{name}"][0].weights for name in ("retrieved", "TAGS", "TAGS-DC")]
    assert [weights.get("wod") for weights in terms] == [None, None, 0.7]
    assert ["tags" in weights for weights in terms] == [False, True, True]


def test_a_run_is_begun_or_taken_up_or_done(tmp_path, monkeypatch):
    calls = []
    code = 0

    def run(command, env, **options):
        assert env["OMP_NUM_THREADS"] == "1"
        calls.append(command[2:])
        return types.SimpleNamespace(returncode=code)

    monkeypatch.setattr(study.subprocess, "run", run)
    folder = tmp_path / "run"
    study.run_once(folder, ["--steps", "3"])
    (folder / "run.json").write_text("{}")  # as tagsdc.py leaves it when it begins
    study.run_once(folder, ["--steps", "3"])
    assert calls == [["--steps", "3", "--out", str(folder)], ["--resume", "--out", str(folder)]]
    code = 2
    with pytest.raises(InputError, match="ended with 2; see output.txt"):
        study.run_once(folder, [])
    (folder / "metrics.json").write_text("{}")
    study.run_once(folder, [])
    assert len(calls) == 3


def test_measures_of_heads_that_were_not_trained_are_left_out(tmp_path, monkeypatch):
    test = {"rsum": 9.0, "wod_auc": 1.0, "woc_accuracy": 2.0, "sentences_repaired": 3.0}
    (tmp_path / "metrics.json").write_text(json.dumps({"test": test, "seconds": 5}))
    log = ["phase,step,retrieved,synthetic,wod,woc", "dc,1,0.5,0.7,1,1", "dc,2,0.25,nan,1,1"]
    monkeypatch.setattr(study, "blind_accuracy", lambda folder: 50.0)
    scores = {"retrieved_early": 0.5, "retrieved_late": 0.25}
    (tmp_path / "log.csv").write_text("\n".join(line.rsplit(",", 3)[0] for line in log))
    assert study.measures_of(tmp_path) == {"rsum": 9.0, "seconds": 5} | scores
    (tmp_path / "log.csv").write_text("\n".join(log))
    everything = study.measures_of(tmp_path)
    assert everything["synthetic_early"] == 0.7 and everything["blind_accuracy"] == 50
    assert test.items() <= everything.items() and scores.items() <= everything.items()


def test_tables_say_what_is_counted(tmp_path):
    rows = [
        {"seed": 0, "arm": "retrieved", "images": 1000, "rsum": 500.0, "seconds": 60},
        {"seed": 1, "arm": "retrieved", "images": 1000, "rsum": 510.0, "seconds": 60},
        {"seed": 0, "arm": "TAGS-DC", "images": 1000, "rsum": 520.0, "wod_auc": 90.0},
        {"seed": 1, "arm": "TAGS-DC", "images": 1000, "rsum": 532.0, "wod_auc": 90.0},
        {"seed": 1, "arm": "TAGS-DC", "images": 30, "rsum": 300.0},
    ]
    for row in rows:
        folder = tmp_path / f"seed{row['seed']}-{row['images']}" / row["arm"]
        folder.mkdir(parents=True)
        (folder / "measures.json").write_text(json.dumps(row))
    study.write_results(tmp_path)
    text = (tmp_path / "study.md").read_text(encoding="utf-8")
    assert "1,000 training images, seeds: 2" in text and "30 training images, seeds: 1" in text
    assert f"| {study.MEANINGS['rsum']} | 505.00 ± 63.55 | 526.00 ± 76.26 |" in text
    assert f"| {study.MEANINGS['rsum']} | 21.00 ± 12.71 |" in text  # 20 and 22, seed by seed
    assert f"| {study.MEANINGS['wod_auc']} | - | 90.00 ± 0.00 |" in text
    lines = (tmp_path / "study.csv").read_text().splitlines()
    assert len(lines) == 6 and lines[0].startswith("seed,arm,images,rsum,")
    assert set(study.MEASURES) <= study.MEANINGS.keys()
