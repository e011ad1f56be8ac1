"""`python tests/study_photographs.py dataset_flickr8k.json regions --seeds 3`: the paper's comparison
on photographs, trained from scratch with `--recipe scratch-photos`.

All arms of a seed go on from one warm-up, for equally many steps. Every run is a process of its
own; a finished one is not run again and an interrupted one goes on. As a one-stream matcher scores
every caption with every image, arms are compared on the first --test-images of the test split.
Writes study.csv and study.md.
"""

import argparse
import functools
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import study
import tagsdc
from data import split_words

ARMS = {name: study.ARMS[name] for name in ("retrieved", "TAGS-DC", "TAGS, own picture", "TAGS")}
study.MEASURES += """one_word_wrong_object one_word_wrong_attribute one_word_wrong_number
    one_word_wrong_relation repeats_captions""".split()


def with_fewer_test_images(path, count, out):
    """The captions with `count` test images, as a file in `out`."""
    content = json.loads(Path(path).read_text())
    test = [image for image in content["images"] if image["split"] == "test"]
    left_out = {image["filename"] for image in test[count:]}
    kept = [image for image in content["images"] if image["filename"] not in left_out]
    fewer = Path(out) / Path(path).name
    tagsdc.write_text(fewer, json.dumps({"images": kept}))
    return fewer


def repeats_captions(place):
    """How many generated negatives of test put back only words that the image's other captions
    have, in percent: a stand-in for what is true after all, where no oracle tells."""
    args = tagsdc.parse_arguments(["--eval", str(place / "best.pt"), "--device", "cpu"])
    device, args.dtype = tagsdc.choose_hardware(args)
    state = tagsdc.load_checkpoint(args.eval)
    data, model = tagsdc.load_all(args, args.eval, state, device)
    split = tagsdc.final_split(data)
    content = data.splits[split]
    made = tagsdc.tailored_examples(model, data, split, args, device, args.analyse_images)
    hits = []
    for n, c in enumerate(made["captions"].tolist()):
        image = content.image_of_caption[c]
        others = [
            text
            for other, text in enumerate(content.captions)
            if content.image_of_caption[other] == image and other != c
        ]
        known = set(split_words(" ".join(others).lower()))
        for sentence in made["sentences"][n][made["valid"][n]]:
            new = sentence[sentence != made["originals"][n]]
            hits.append({data.tokenizer.tokens[i] for i in new.tolist()} <= known)
    return 100 * sum(hits) / max(len(hits), 1)


def run_warmup(options, seed, out):
    study.run_once(out / f"seed{seed}" / "warmup", [*options, "--seed", str(seed)])


def run_arm(options, arm, seed, out, warmup):
    """One arm from the warm-up of its seed, a Future to wait for -> its row for study.csv."""
    warmup.result()
    folder = out / f"seed{seed}"
    place = study.place_of(folder, arm)
    start = ["--seed", str(seed), "--init", str(folder / "warmup" / "best.pt")]
    study.run_once(place, [*options, *start, *ARMS[arm].split()])
    row = {"seed": seed, "arm": arm, "images": "photographs"} | study.measures_of(
        place, blind=False
    )
    if arm != "retrieved":
        row["repeats_captions"] = study.remembered(
            place / "repeats.txt", functools.partial(repeats_captions, place)
        )
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("captions")
    parser.add_argument("features")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--test-images", type=int, default=200)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", help="another one than the recipe's")
    parser.add_argument("--out", default="runs/study-photographs")
    given = parser.parse_args()
    out = Path(given.out)
    out.mkdir(parents=True, exist_ok=True)
    fewer = with_fewer_test_images(given.captions, given.test_images, out)
    command = ["--data", str(fewer), "--features", given.features, "--recipe", "scratch-photos"]
    command += ["--device", given.device] + (["--size", given.size] if given.size else [])
    args = tagsdc.parse_arguments(command)
    steps = {phase: count for phase, count, _, _ in tagsdc.phase_plan(args)}
    first = [*command, "--phases", "warmup=1", "--steps", str(steps["warmup"])]
    then = [*command, "--phases", "dc=1", "--steps", str(steps["dc"])]
    seeds = range(given.seeds)
    # Arm by arm, so that the first ones are soon complete; as many runs at once as there are cores.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        warmups = [pool.submit(run_warmup, first, seed, out) for seed in seeds]
        jobs = [(arm, seed) for arm in ARMS for seed in seeds]
        rows = []
        for row in pool.map(lambda job: run_arm(then, *job, out, warmups[job[1]]), jobs):
            rows.append(row)
            study.write_results(argparse.Namespace(out=given.out, study=given.seeds), rows)
    print((out / "study.md").read_text())


if __name__ == "__main__":
    main()
