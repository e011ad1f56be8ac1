"""`python tests/study.py --seeds 5`: what the paper claims, and what later work objects to.

All arms of a seed go on from one warm-up, for equally many steps, and differ in the options of
ARMS alone. Every run is a process of its own under --out; a finished one is not run again and an
interrupted one goes on. Writes study.csv (a row a run) and study.md there, and curves.png into
each run's folder. Other options are passed on to tagsdc.py: `--scenes`, `--steps`, `--phases`
(warmup and dc), `--device`, `--dtype`, `--size`, `--val-images`, `--analyse-images`, `--log-every`.
"""

import argparse
import csv
import json
import math
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import evaluate
import losses
import tagsdc

NO_WRITER = "--lambda-tags 0 --lambda-wod 0 --lambda-woc 0"
ARMS = {
    "retrieved": NO_WRITER,
    "TAGS-DC": "",
    "TAGS": "--lambda-wod 0 --lambda-woc 0",
    "TAGS, own picture": "--lambda-wod 0 --lambda-woc 0 --writer-sees own --truth-threshold 1",
    "TAGS-DC, frozen writer": "--frozen-writer",
    "TAGS + WoD": "--lambda-woc 0",
    "retrieved, twice as many": f"{NO_WRITER} --retrieved 4",
    "retrieved, as long": NO_WRITER,  # as many steps as TAGS-DC's time allows
}
SCALES = {  # training images beside the full number, and which arms
    300: ("retrieved", "TAGS-DC"),
    5000: ("retrieved", "TAGS-DC"),
}
MEASURES = """rsum tr_r1 ir_r1 one_word_wrong altered_tr_r1 oversensitivity wod_auc
    wod_most_suspicious woc_accuracy sentences_repaired fair_negatives true_negatives
    ungrammatical_negatives blind_accuracy retrieved_early retrieved_late synthetic_early
    synthetic_late seconds""".split()
QUANTILES = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # Student's t, 97.5%


# ---- the runs ----------------------------------------------------------------------------------


def study(args):
    """Runs every arm, arm by arm so that the first ones are soon complete, and writes the tables.

    As many runs go side by side as there are cores: networks this small use many cores badly.
    """
    jobs = [(arm, args.scenes[0], seed) for arm in ARMS for seed in range(args.seeds)]
    for images, arms in SCALES.items():
        jobs += [(arm, images, seed) for arm in arms for seed in range(args.seeds)]
    warmups = dict.fromkeys((images, seed) for _, images, seed in jobs)
    if not {"warmup", "dc"} <= planned_steps(args).keys():
        raise tagsdc.InputError("--phases must have warmup and dc, and no --init")
    rows = []
    last = [job for job in jobs if job[0] == "retrieved, as long"]  # asks how long others took
    first = [job for job in dict.fromkeys(jobs) if job not in last]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda job: run_warmup(args, *job), warmups))
        for part in (first, last):
            for row in pool.map(lambda job: run_arm(args, *job), part):
                rows.append(row)
                write_results(args, rows)
    print((Path(args.out) / "study.md").read_text())


def folder_of(args, images, seed):
    return Path(args.out) / f"seed{seed}-{images}"


def shared_options(args, images, seed):
    options = ["--seed", str(seed), "--scenes", str(images), *map(str, args.scenes[1:])]
    for name in ("device", "dtype", "size", "val_images", "analyse_images", "log_every"):
        options += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    return options


def planned_steps(args):
    return {phase.name: phase.steps for phase in tagsdc.plan_phases(args)}


def run_warmup(args, images, seed):
    steps = planned_steps(args)["warmup"]
    options = [*shared_options(args, images, seed), "--phases", "warmup=1", "--steps", str(steps)]
    run_once(folder_of(args, images, seed) / "warmup", options)


def run_arm(args, arm, images, seed):
    """One arm from the warm-up of its seed -> its row for study.csv."""
    folder = folder_of(args, images, seed)
    steps = planned_steps(args)["dc"]
    if arm == "retrieved, as long":
        # Of the seeds' fastest runs, which other programs on the machine disturbed least.
        folders = [folder_of(args, images, other) for other in range(args.seeds)]
        whole = min(seconds_of(place_of(other, "TAGS-DC")) for other in folders)
        part = min(seconds_of(place_of(other, "retrieved")) for other in folders)
        steps = round(steps * max(1, whole / part))
    options = shared_options(args, images, seed)
    options += ["--init", str(folder / "warmup" / "best.pt"), "--phases", "dc=1"]
    place = place_of(folder, arm)
    run_once(place, [*options, "--steps", str(steps), *ARMS[arm].split()])
    draw_curves(place)
    return {"seed": seed, "arm": arm, "images": images} | measures_of(place)


def place_of(folder, arm):
    return folder / re.sub("[^a-zA-Z]+", "-", arm)


def run_once(place, options):
    """One run in a process of its own, unless it is done; an interrupted one goes on."""
    if (place / "metrics.json").exists():
        return
    place.mkdir(parents=True, exist_ok=True)
    options = ["--resume"] if (place / "run.json").exists() else options
    command = [sys.executable, tagsdc.__file__, *options, "--out", str(place)]
    with open(place / "output.txt", "a") as output:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, stdout=output, stderr=output, env=environment)
    if done.returncode:
        text = f"{place}: the run ended with {done.returncode}; see output.txt there"
        raise tagsdc.InputError(text)


# ---- what they say -----------------------------------------------------------------------------


def seconds_of(place):
    return json.loads((place / "metrics.json").read_text())["seconds"]


def measures_of(place, blind=True):
    """{measure: value} of a finished run. blind: with blind_accuracy, which takes minutes."""
    found = json.loads((place / "metrics.json").read_text())["test"]
    found["seconds"] = seconds_of(place)
    with open(place / "log.csv") as file:
        log = list(csv.DictReader(file))
    for name in ("retrieved", "synthetic"):
        if name in log[0]:
            found |= {f"{name}_early": float(log[0][name]), f"{name}_late": float(log[-1][name])}
    if "wod" not in log[0]:  # heads that were not trained say nothing
        found = {name: value for name, value in found.items() if not name.startswith("wo")}
    if blind and "synthetic" in log[0]:
        found["blind_accuracy"] = remembered(place / "blind.txt", lambda: blind_accuracy(place))
    return found


def remembered(path, compute):
    """A number that is computed once."""
    if not path.exists():
        path.write_text(str(compute()))
    return float(path.read_text())


def blind_accuracy(place):
    """How well a network that sees no picture tells captions from what a run wrote against them.

    50% is ideal: more means that the negatives can be told by their language alone. It learns on
    train and is asked on test. A new network of the same size, 600 steps of 64 sentences.
    """
    args = tagsdc.parse_arguments(["--eval", str(place / "best.pt")])
    device, args.dtype = tagsdc.choose_hardware(args)
    state = tagsdc.load_checkpoint(args.eval)
    data, model = tagsdc.load_all(args, args.eval, state, device)
    torch.manual_seed(args.seed)
    blind = tagsdc.TagsDC(model.config).to(device)
    optimizer = torch.optim.AdamW(blind.parameters(), lr=1e-3)

    def judge(ids):  # (n, T) -> logits (n,)
        features = torch.zeros(len(ids), 1, model.config.feature_size, device=device)
        boxes = torch.zeros(len(ids), 1, 7, device=device)
        return blind.match(blind(ids, features, boxes, ids != data.tokenizer.pad_id, None))

    def sentences(split, count):  # ids (n, T), and which of them are captions (n,)
        made = tagsdc.tailored_examples(model, data, split, args, device, count)
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


def draw_curves(place):
    """curves.png of a run: every number of its log over the steps, from least to largest."""
    with open(place / "log.csv") as file:
        rows = list(csv.DictReader(file))
    curves = {}  # {column: [(step, value)]}
    for row in rows:
        for name, value in row.items():
            if name not in ("phase", "step") and value not in ("", "nan"):
                curves.setdefault(name, []).append((int(row["step"]), float(value)))
    sheet = Image.new("RGB", (evaluate.WIDTH, 60 * len(curves) + 16), "white")
    pen = ImageDraw.Draw(sheet)
    for top, (name, points) in zip(range(8, sheet.height, 60), curves.items()):
        steps, values = np.array(points).T
        across = np.interp(steps, (0, int(rows[-1]["step"])), (350, evaluate.WIDTH - 16))
        low = values.min()
        high = values.max()
        pen.text((16, top + 20), f"{name}: {low:.4g} to {high:.4g}", evaluate.INK, font_size=15)
        heights = np.interp(values, (low, high), (top + 50, top + 6))
        pen.line([*zip(across, heights)], evaluate.ORANGE, 2)
    sheet.save(place / "curves.png")


# ---- tables ------------------------------------------------------------------------------------


def write_results(args, rows):
    """study.csv and study.md of the runs that are done."""
    names = ["seed", "arm", "images", *MEASURES]
    lines = [",".join(f'"{row.get(name, "")}"' for name in names) for row in rows]
    tagsdc.write_text(Path(args.out) / "study.csv", "\n".join([",".join(names), *lines]) + "\n")
    text = []
    for images in dict.fromkeys(row["images"] for row in rows):
        part = [row for row in rows if row["images"] == images]
        text += [f"{images} training images, {args.seeds} seeds", "", *table(part), ""]
        text += [*table(part, "retrieved"), ""]
    tagsdc.write_text(Path(args.out) / "study.md", "\n".join(text))


def interval(values):
    """Mean and half of the 95% interval, as text."""
    values = np.array(values)
    if len(values) < 2:
        return f"{values.mean():.2f}"
    quantile = QUANTILES[min(len(values) - 2, len(QUANTILES) - 1)]
    half = quantile * values.std(ddof=1) / math.sqrt(len(values))
    return f"{values.mean():.2f} ± {half:.2f}"


def table(rows, against=None):
    """Lines of a Markdown table: a row a measure, a column an arm. against: an arm; then each cell
    is the difference to it, seed by seed."""
    by_arm = {}  # {arm: {seed: row}}
    for row in rows:
        by_arm.setdefault(row["arm"], {})[row["seed"]] = row
    arms = [arm for arm in by_arm if arm != against]
    title = f"difference to {against}" if against else "mean ± 95% interval"
    lines = ["| " + " | ".join([title, *arms]) + " |", "|---" * (len(arms) + 1) + "|"]
    for measure in MEASURES:
        cells = []
        for arm in arms:
            values = []
            for seed, row in by_arm[arm].items():
                other = by_arm[against].get(seed, {}) if against else {measure: 0.0}
                if measure in row and measure in other:
                    values.append(row[measure] - other[measure])
            cells.append(interval(values) if values else "-")
        if set(cells) - {"-"}:
            lines.append("| " + " | ".join([measure, *cells]) + " |")
    return lines


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", default="runs/study")
    given, passed_on = parser.parse_known_args()
    args = tagsdc.parse_arguments([*passed_on, "--out", given.out])
    args.seeds = given.seeds
    Path(args.out).mkdir(parents=True, exist_ok=True)
    study(args)


if __name__ == "__main__":
    try:
        main()
    except tagsdc.InputError as fault:
        sys.exit(f"study.py: error: {fault}")
