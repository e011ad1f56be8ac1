"""`python tests/study.py --seeds 5`: what the paper claims, and what later work objects to.

For each seed there is one warm-up, and all arms go on from it for equally many steps; they differ
in the options of ARMS alone. Every run is a process of its own with one thread, and as many run at
once as there are cores. A finished run is not run again, and an interrupted one goes on. In --out:

    study.csv, study.md               a row a run; tables of means and of differences, seed by seed
    seed0-1000/warmup, /TAGS-DC, ...  the runs of seed 0 on 1,000 training images

    python tests/study.py --arms retrieved TAGS-DC --images 300 5000      # how much data there is

The options of tagsdc.py are passed on to every run: --steps and --phases (first the warm-up, then
what the arms do), --scenes (for whose first number --images stands), --device, --recipe ..."""

import argparse
import csv
import json
import math
import multiprocessing
import os
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import evaluate
import losses
import tagsdc
from data import InputError

RETRIEVED_ONLY = "--lambda-tags 0 --lambda-wod 0 --lambda-woc 0"
ARMS = {
    "retrieved": RETRIEVED_ONLY,
    "TAGS": "--lambda-wod 0 --lambda-woc 0",
    "TAGS-DC": "",
    "TAGS + WoD": "--lambda-woc 0",
    "TAGS, own picture": "--lambda-wod 0 --lambda-woc 0 --writer-sees own --truth-threshold 1",
    "TAGS-DC, frozen writer": "--frozen-writer",
    "retrieved, twice as many": f"{RETRIEVED_ONLY} --retrieved 4",
    "retrieved, as long": RETRIEVED_ONLY,  # as many steps as TAGS-DC's time allows
}
REFUSED = {  # what the study sets itself, or what is no training
    "--seed": "--seeds N runs the seeds 0 to N - 1",
    "--resume": "the same command again goes on where it stopped",
    "--eval": "the study only trains",
    "--checkpoint": "the study only trains",
    "--query": "the study only trains",
    "--image": "the study only trains",
}
MEASURES = [
    "rsum",
    "tr_r1",
    "ir_r1",
    "one_word_wrong",
    "altered_tr_r1",
    "oversensitivity",
    "wod_auc",
    "wod_most_suspicious",
    "woc_accuracy",
    "sentences_repaired",
    "fair_negatives",
    "true_negatives",
    "ungrammatical_negatives",
    "blind_accuracy",
    "retrieved_early",
    "retrieved_late",
    "synthetic_early",
    "synthetic_late",
    "seconds",
]
MEANINGS = evaluate.MEASURES | {
    "blind_accuracy": "negatives and captions told apart without a picture (50: by chance)",
    "retrieved_early": "mean score of retrieved captions at the first line of the log, 0 to 1",
    "retrieved_late": "mean score of retrieved captions at the last line, 0 to 1",
    "synthetic_early": "mean score of written sentences at the first line of the log, 0 to 1",
    "synthetic_late": "mean score of written sentences at the last line, 0 to 1",
    "seconds": "seconds of the run, without the warm-up",
}
QUANTILES = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # Student's t, 97.5%


# ---- the command -------------------------------------------------------------------------------


def parse_arguments(argv=None):
    """The study's options. Beside them .passed_on, a list of texts, are the options for every run,
    and .args what tagsdc.py makes of these. Raises InputError."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--seeds", type=int, default=5, help="how many, from 0 on")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=[*ARMS], help="all if left out")
    parser.add_argument("--images", type=int, nargs="+", help="numbers of training images")
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    study, study.passed_on = parser.parse_known_args(argv)
    for text in study.passed_on:
        name = text.partition("=")[0]
        for option, reason in REFUSED.items():
            # tagsdc.py takes the first letters of an option for all of it.
            if len(name) > 2 and option.startswith(name):
                raise InputError(f"{name}: {reason}")
    study.out = study.out.resolve()
    study.args = tagsdc.parse_arguments([*study.passed_on, "--out", str(study.out)])
    if study.images and study.args.data != "scenes":
        raise InputError(f"--images: {study.args.data} has the images that it has")
    study.images = study.images or [study.args.scenes[0]]
    if "retrieved, as long" in study.arms and not {"retrieved", "TAGS-DC"} <= {*study.arms}:
        raise InputError("--arms: 'retrieved, as long' is timed by 'TAGS-DC' and 'retrieved'")
    warmup, arm = planned_phases(study)
    if not warmup or not arm:
        raise InputError("--phases: a warm-up and something after it, and no --init without one")
    return study


def planned_phases(study):
    """The phases of the warm-up, and those of the arms that go on from it."""
    plan = tagsdc.plan_phases(study.args)
    warmup = [phase for phase in plan if phase.name == "warmup"]
    return warmup, plan[len(warmup) :]


def check_folder(study):
    """Runs in one folder must share the options that are passed on, else they do not compare."""
    study.out.mkdir(parents=True, exist_ok=True)
    file = study.out / "study.json"
    if file.exists():
        before = json.loads(file.read_text(encoding="utf-8"))
        if before != study.passed_on:
            before = " ".join(before) or "none"
            raise InputError(f"--out {study.out}: its runs have other options ({before})")
    tagsdc.write_text(file, json.dumps(study.passed_on))


# ---- the runs ----------------------------------------------------------------------------------


def run_study(study):
    """Runs every arm, arm by arm so that the first ones are soon complete, and writes the tables
    after each run. Networks this small use many cores badly, so each run has one."""
    seeds = [(images, seed) for images in study.images for seed in range(study.seeds)]
    timed = [arm for arm in study.arms if arm == "retrieved, as long"]  # when the others are done
    others = [arm for arm in study.arms if arm not in timed]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), context, torch.set_num_threads, (1,)) as pool:
        list(pool.map(run_warmup, *zip(*[(study, *seed) for seed in seeds])))
        for arms in (others, timed):
            jobs = [(study, arm, *seed) for arm in arms for seed in seeds]
            for row in pool.map(run_arm, *zip(*jobs)) if jobs else ():
                print(f"{row['arm']}, {row['images']} images, seed {row['seed']}", flush=True)
                write_results(study.out)


def folder_of(study, arm, images, seed):
    """The folder of a run."""
    return study.out / f"seed{seed}-{images}" / re.sub("[^a-zA-Z]+", "-", arm)


def run_warmup(study, images, seed):
    """The warm-up from which all arms of a seed go on."""
    phases, _ = planned_phases(study)
    steps = sum(phase.steps for phase in phases)
    schedule = ["--phases", "warmup=1", "--steps", str(steps)]
    folder = folder_of(study, "warmup", images, seed)
    run_once(folder, [*shared_options(study, images, seed), *schedule])


def run_arm(study, arm, images, seed):
    """One arm from the warm-up of its seed -> its row for study.csv, kept as measures.json."""
    _, phases = planned_phases(study)
    steps = sum(phase.steps for phase in phases)
    if arm == "retrieved, as long":
        # Of the seeds' fastest runs, which other programs on the machine disturbed least.
        whole = fastest(study, "TAGS-DC", images)
        steps = round(steps * max(1, whole / fastest(study, "retrieved", images)))
    shares = [f"{phase.name}={phase.steps}" for phase in phases]
    warmup = folder_of(study, "warmup", images, seed) / "best.pt"
    schedule = ["--init", str(warmup), "--phases", *shares, "--steps", str(steps)]
    folder = folder_of(study, arm, images, seed)
    run_once(folder, [*shared_options(study, images, seed), *schedule, *ARMS[arm].split()])
    file = folder / "measures.json"
    if not file.exists():
        row = {"seed": seed, "arm": arm, "images": images} | measures_of(folder)
        tagsdc.write_text(file, json.dumps(row))
    return json.loads(file.read_text(encoding="utf-8"))


def shared_options(study, images, seed):
    """What all runs of a seed and a number of images have in common."""
    options = [*study.passed_on, "--seed", str(seed)]
    if study.args.data == "scenes":
        options += ["--scenes", str(images), *map(str, study.args.scenes[1:])]
    return options


def fastest(study, arm, images):
    """Seconds of the fastest run of an arm."""
    folders = [folder_of(study, arm, images, seed) for seed in range(study.seeds)]
    return min(read_metrics(folder)["seconds"] for folder in folders)


def run_once(folder, options):
    """One run in a process of its own, unless it is done; an interrupted one goes on."""
    if (folder / "metrics.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    options = ["--resume"] if (folder / "run.json").exists() else options
    command = [sys.executable, tagsdc.__file__, *options, "--out", str(folder)]
    with open(folder / "output.txt", "a", encoding="utf-8") as output:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, stdout=output, stderr=output, env=environment, check=False)
    if done.returncode:
        text = f"{folder}: the run ended with {done.returncode}; see output.txt there"
        raise InputError(text)


# ---- what they say -----------------------------------------------------------------------------


def read_metrics(folder):
    """The metrics.json of a run."""
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


def measures_of(folder):
    """{measure: value} of a finished run; blind_accuracy takes minutes."""
    record = read_metrics(folder)
    found = {**record["test"], "seconds": record["seconds"]}
    with open(folder / "log.csv", encoding="utf-8") as file:
        log = list(csv.DictReader(file))
    for name in ("retrieved", "synthetic"):
        values = [float(row[name]) for row in log if row.get(name)]
        if values:
            found |= {f"{name}_early": values[0], f"{name}_late": values[-1]}
    # A head that was not trained says nothing.
    untrained = [term for term in ("wod", "woc") if term not in log[0]]
    if untrained:
        untrained.append("sentences_repaired")
    found = {name: value for name, value in found.items() if not name.startswith((*untrained,))}
    if "synthetic" in log[0]:
        found["blind_accuracy"] = blind_accuracy(folder)
    return found


def blind_accuracy(folder):
    """How well a network that sees no picture tells captions from what a run wrote against them.

    50% is ideal: more means that the negatives can be told by their language alone. A new network
    of the same size learns it on train, in 600 steps of 64 sentences, and is tried on test."""
    args = tagsdc.parse_arguments(["--eval", str(folder / "best.pt")])
    device, dtype = tagsdc.choose_hardware(args)
    data, model = tagsdc.load_all(args, args.eval, tagsdc.load_checkpoint(args.eval))
    settings = tagsdc.settings_of(args, data.tokenizer, device, dtype)
    model.to(device)
    torch.manual_seed(args.seed)
    blind = tagsdc.TagsDC(model.config).to(device)
    optimizer = torch.optim.AdamW(blind.parameters(), lr=1e-3)

    def judge(ids):  # (n, T) -> logits (n,)
        features = torch.zeros(len(ids), 1, model.config.feature_size, device=device)
        boxes = torch.zeros(len(ids), 1, 7, device=device)
        return blind.match(blind(ids, features, boxes, ids != data.tokenizer.pad_id, None))

    def sentences(split, count):  # ids (n, T), and which of them are captions (n,)
        made = tagsdc.tailored_examples(model, data, split, args, settings, count)
        wrong = made["sentences"][made["valid"]]
        right = made["originals"][:, None].expand_as(made["sentences"])[made["valid"]]
        ids = torch.cat((right, wrong)).to(device)
        return ids, torch.arange(len(ids), device=device) < len(right)

    ids, captions = sentences("train", 1000)
    rng = torch.Generator().manual_seed(args.seed)
    for step in range(600):
        optimizer.param_groups[0]["lr"] = 5e-4 * min((step + 1) / 60, (600 - step) / 540)
        some = torch.randint(len(ids), (64,), generator=rng)
        optimizer.zero_grad()
        losses.matching_loss(judge(ids[some]), captions[some]).backward()
        optimizer.step()
    ids, captions = sentences(tagsdc.final_split(data), args.analyse_images)
    with evaluate.inference(blind, device):
        right = (judge(ids) > 0) == captions
    return 100 * right.float().mean().item()


# ---- tables ------------------------------------------------------------------------------------


def write_results(out):
    """study.csv and study.md of all runs in the folder that are done, whichever call made them."""
    rows = [json.loads(file.read_text(encoding="utf-8")) for file in out.glob("*/*/measures.json")]
    rows.sort(key=lambda row: (row["images"], [*ARMS].index(row["arm"]), row["seed"]))
    names = ["seed", "arm", "images", *MEASURES]
    lines = [",".join(f'"{row.get(name, "")}"' for name in names) for row in rows]
    tagsdc.write_text(out / "study.csv", "\n".join([",".join(names), *lines]) + "\n")
    text = []
    for images in dict.fromkeys(row["images"] for row in rows):
        some = [row for row in rows if row["images"] == images]
        seeds = {row["seed"] for row in some}
        text += [f"{images:,} training images, seeds: {len(seeds)}", ""]
        text += [*table("mean ± 95% interval", some), ""]
        text += [*table("difference to retrieved", differences(some, "retrieved")), ""]
    tagsdc.write_text(out / "study.md", "\n".join(text))


def differences(rows, base):
    """The rows of the other arms, minus the row of the arm `base` with the same seed."""
    bases = {row["seed"]: row for row in rows if row["arm"] == base}
    result = []
    for row in rows:
        other = bases.get(row["seed"], {})
        shared = [measure for measure in MEASURES if measure in row and measure in other]
        if row["arm"] != base:
            values = {measure: row[measure] - other[measure] for measure in shared}
            result.append({"arm": row["arm"], "seed": row["seed"]} | values)
    return result


def table(title, rows):
    """Lines of a Markdown table: a row a measure, a column an arm."""
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    lines = ["| " + " | ".join([title, *arms]) + " |", "|---" * (len(arms) + 1) + "|"]
    for measure in MEASURES:
        cells = []
        for arm in arms:
            of_arm = [row for row in rows if row["arm"] == arm]
            values = [row[measure] for row in of_arm if measure in row]
            cells.append(interval(values) if values else "-")
        if set(cells) - {"-"}:
            lines.append("| " + " | ".join([MEANINGS[measure], *cells]) + " |")
    return lines


def interval(values):
    """Mean and half of the 95% interval, as text."""
    values = np.array(values)
    if len(values) < 2:
        return f"{values.mean():.2f}"
    quantile = QUANTILES[min(len(values) - 2, len(QUANTILES) - 1)]
    half = quantile * values.std(ddof=1) / math.sqrt(len(values))
    return f"{values.mean():.2f} ± {half:.2f}"


def main(argv=None):
    """The command."""
    study = parse_arguments(argv)
    check_folder(study)
    torch.set_num_threads(1)
    run_study(study)
    print((study.out / "study.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    try:
        main()
    except InputError as fault:
        print(f"study.py: error: {fault}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command again goes on", file=sys.stderr)
        sys.exit(130)
