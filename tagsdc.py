"""TAGS-DC from one command: train, evaluate, search (see README.md).

Reading order: warmup_step and tailored_step, Trainer.train, run; the options come first.
Letters: B anchor pairs of a step, P pairs in its retrieval pool (the anchors first), T text
positions, R regions, F feature size, M maskings, K refills, H hard negatives, C captions of an
image, q masked words of all anchors. Every mask: True = real / usable."""

import argparse
import contextlib
import copy
import functools
import json
import os
import re
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

import data as datasets
import evaluate
import generate
from data import InputError
from losses import (
    masked_lm_loss,
    masked_mean,
    matching_loss,
    triplet_loss,
    word_correction_loss,
    word_discrimination_loss,
)
from model import PRESETS, Config, TagsDC, autocast, fast_dtype

# ---- options -----------------------------------------------------------------------------------


def number(kind, most, zero=False):
    """A type for argparse: an int or a float above 0, or also 0, and at most `most`."""

    def read(text):
        value = kind(text)
        if not (0 < value <= most or (zero and value == 0)):
            least = "at least" if zero else "above"
            raise argparse.ArgumentTypeError(f"{text}: must be {least} 0 and at most {most:g}")
        return value

    read.__name__ = kind.__name__  # which argparse names where the text is no number at all
    return read


def phase_share(text):
    """A type for argparse: NAME=SHARE, a phase of the run and its share of the steps."""
    if not re.fullmatch(r"(warmup|tags|dc)=(?=.*[1-9])\d*\.?\d+", text):
        raise argparse.ArgumentTypeError(f"{text}: NAME=SHARE of warmup, tags, dc, SHARE above 0")
    return text


COUNT = number(int, 10**9)
POSITIVE = number(float, 1e12)
WEIGHT = number(float, 1e12, zero=True)
SHARE = number(float, 1)
SWITCH = argparse.BooleanOptionalAction  # --name and --no-name


def make_parser():
    """All options; the defaults fit the embedded scenes on a CPU."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_tasks(parser.add_argument_group("what to do"))
    add_data_options(parser.add_argument_group("data and network"))
    add_training_options(parser.add_argument_group("training"))
    add_negatives_options(parser.add_argument_group("negatives"))
    add_objective_options(parser.add_argument_group("objective"))
    add_run_options(parser.add_argument_group("run"))
    return parser


def add_tasks(group):
    group.add_argument("--eval", help="evaluate this checkpoint instead of training")
    group.add_argument("--checkpoint", help="checkpoint for --query and --image")
    group.add_argument("--query", help="find the test images that a sentence describes best")
    group.add_argument("--image", help="find the test captions that describe an image best")
    group.add_argument(
        "--probe",
        nargs="+",
        default=[],
        help="files of SugarCrepe, RoCOCO or VALSE's FOIL to run, too",
    )
    group.add_argument("--resume", action="store_true", help="go on with the run in --out")
    group.add_argument("--quick", action="store_true", help="everything in miniature")


def add_data_options(group):
    group.add_argument(
        "--data",
        default="scenes",
        help="scenes, coco, flickr30k, flickr8k, or a JSON of Karpathy's form",
    )
    group.add_argument("--root", help="folder of the captions and region features")
    group.add_argument("--features", help="the region features, if they are not under --root")
    group.add_argument("--phrases", help="JSON with the captions' phrases, instead of the parser")
    group.add_argument("--skip-bad", action=SWITCH, default=False, help="leave out unusable images")
    group.add_argument(
        "--scenes",
        type=COUNT,
        nargs=3,
        default=[1000, 100, 250],
        help="images in train, val and test of the embedded world",
    )
    group.add_argument("--size", choices=PRESETS, default="tiny", help="paper: base, large")
    group.add_argument(
        "--init", help="start from our checkpoint or official UNITER weights, without warm-up"
    )
    group.add_argument(
        "--dropout", type=number(float, 0.99, zero=True), default=0.0, help="paper: 0.1"
    )


def add_training_options(group):
    group.add_argument("--recipe", choices=RECIPES, help="a schedule of the official release")
    group.add_argument("--steps", type=COUNT, default=3250, help="of the optimiser, in all phases")
    group.add_argument(
        "--phases",
        type=phase_share,
        nargs="+",
        default=["warmup=10", "dc=3"],
        help="phases (warmup, tags, dc) and their shares of --steps",
    )
    group.add_argument("--batch-size", type=COUNT, default=16, help="anchor pairs a step")
    group.add_argument("--warmup-batch-size", type=COUNT, default=32, help="pairs a step")
    group.add_argument(
        "--wrong-partners",
        type=COUNT,
        default=7,
        help="pairs among which the warm-up draws a hard wrong partner",
    )
    group.add_argument(
        "--words-first",
        type=number(float, 1, zero=True),
        default=0.8,
        help="share of the warm-up with masked words alone, before matching",
    )
    group.add_argument("--mask-probability", type=SHARE, default=0.15, help="of a phrase")
    group.add_argument("--warmup-mask-probability", type=SHARE, default=0.3, help="of a phrase")
    group.add_argument("--accumulate", type=COUNT, default=1, help="batches of an optimiser step")
    group.add_argument(
        "--recompute",
        action=SWITCH,
        default=False,
        help="recompute activations: less memory, a third more work",
    )
    group.add_argument("--warmup-lr", type=POSITIVE, default=1e-3, help="peak rate of warmup")
    group.add_argument("--lr", type=POSITIVE, default=1e-3, help="of tags (paper: 5e-5)")
    group.add_argument("--dc-lr", type=POSITIVE, default=1e-3, help="of dc (paper: 1e-5)")


def add_negatives_options(group):
    group.add_argument(
        "--pool",
        type=COUNT,
        default=16,
        help="pairs among which hard negatives are retrieved (paper: 399)",
    )
    group.add_argument(
        "--retrieved", type=COUNT, default=2, help="hard negatives retrieved each way (paper: 31)"
    )
    group.add_argument("--hard", type=COUNT, default=4, help="negatives written (paper: 31)")
    group.add_argument("--maskings", type=COUNT, default=4, help="of a caption (paper: 20)")
    group.add_argument("--refills", type=COUNT, default=4, help="of a masking (paper: 20)")
    group.add_argument(
        "--temperature", type=POSITIVE, default=1.0, help="of the refilling (paper: 1.5)"
    )
    group.add_argument(
        "--writer-sees",
        choices=("own", "other"),
        default="other",
        help="the caption's own picture (paper) or another one of the batch",
    )
    group.add_argument(
        "--truth-threshold",
        type=SHARE,
        default=0.1,
        help="likelier words are taken for true and not written (paper: 1, off)",
    )
    group.add_argument(
        "--frozen-writer",
        action=SWITCH,
        default=False,
        help="the writer keeps the weights with which the phase after the warm-up begins",
    )


def add_objective_options(group):
    group.add_argument("--margin", type=POSITIVE, default=0.2, help="of the triplet losses")
    group.add_argument(
        "--lambda-itm", type=WEIGHT, default=1.0, help="weight of matching, in the warm-up"
    )
    group.add_argument(
        "--lambda-hard", type=POSITIVE, default=1.0, help="weight of L_hard (paper: 1)"
    )
    group.add_argument(
        "--lambda-tags", type=WEIGHT, default=1.0, help="weight of L_tags (paper: 5e-5 to 1e-3)"
    )
    group.add_argument(
        "--lambda-mlm",
        type=WEIGHT,
        default=0.2,
        help="weight of L_mlm (paper: 0.01 to 0.1); it is 1 in the warm-up",
    )
    group.add_argument(
        "--lambda-wod", type=WEIGHT, default=1.0, help="weight of L_wod (paper: 5e-4)"
    )
    group.add_argument(
        "--lambda-woc", type=WEIGHT, default=0.5, help="weight of L_woc (paper: 5e-4)"
    )
    group.add_argument(
        "--original-weight",
        type=WEIGHT,
        default=0.11,
        help="of original words in word discrimination",
    )


def add_run_options(group):
    group.add_argument("--out", help="run directory; without it runs/ and the name of the data")
    group.add_argument(
        "--seed", type=number(int, 2**32, zero=True), default=0, help="of all randomness"
    )
    group.add_argument(
        "--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to compute"
    )
    group.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="auto: what the hardware does fast",
    )
    group.add_argument(
        "--log-every",
        type=COUNT,
        default=50,
        help="steps between two lines of the log, from the last of which --resume goes on",
    )
    group.add_argument("--validations", type=COUNT, default=2, help="in a phase")
    group.add_argument("--val-images", type=COUNT, default=100, help="that a validation looks at")
    group.add_argument(
        "--analyse-images",
        type=COUNT,
        default=200,
        help="test images whose generated negatives are analysed",
    )
    group.add_argument(
        "--score-batch",
        type=COUNT,
        default=128,
        help="pairs in one pass without gradient (a GPU likes 2048)",
    )
    group.add_argument(
        "--save-scores",
        action=SWITCH,
        default=False,
        help="keep the test score matrix as scores.npy",
    )


# The schedules of the official release, one stage each; stage 2 starts from stage 1's best.pt.
RECIPES = {
    "coco-base-1": {
        "size": "base",
        "phases": ["tags=1"],
        "steps": 5000,
        "batch_size": 32,
        "lr": 5e-5,
        "dropout": 0.1,
        "recompute": True,
        "score_batch": 2048,
        "pool": 399,
        "retrieved": 31,
        "hard": 31,
        "maskings": 20,
        "refills": 20,
        "temperature": 1.5,
        "writer_sees": "own",
        "truth_threshold": 1.0,
        "lambda_tags": 5e-5,
        "lambda_mlm": 0.01,
    },
    "coco-base-2": {
        "size": "base",
        "phases": ["dc=1"],
        "steps": 1500,
        "batch_size": 32,
        "dc_lr": 1e-5,
        "dropout": 0.1,
        "recompute": True,
        "score_batch": 2048,
        "pool": 399,
        "retrieved": 31,
        "hard": 31,
        "maskings": 20,
        "refills": 20,
        "temperature": 1.5,
        "writer_sees": "own",
        "truth_threshold": 1.0,
        "lambda_tags": 1e-4,
        "lambda_mlm": 0.05,
        "lambda_wod": 5e-4,
        "lambda_woc": 5e-4,
    },
    "coco-large-1": {
        "size": "large",
        "phases": ["tags=1"],
        "steps": 5000,
        "batch_size": 32,
        "lr": 4e-5,
        "dropout": 0.1,
        "recompute": True,
        "score_batch": 2048,
        "pool": 399,
        "retrieved": 23,
        "hard": 23,
        "maskings": 20,
        "refills": 20,
        "temperature": 1.5,
        "writer_sees": "own",
        "truth_threshold": 1.0,
        "lambda_tags": 1e-3,
        "lambda_mlm": 0.05,
    },
    "coco-large-2": {
        "size": "large",
        "phases": ["dc=1"],
        "steps": 5000,
        "batch_size": 32,
        "dc_lr": 1e-5,
        "dropout": 0.1,
        "recompute": True,
        "score_batch": 2048,
        "pool": 399,
        "retrieved": 31,
        "hard": 31,
        "maskings": 20,
        "refills": 20,
        "temperature": 1.5,
        "writer_sees": "own",
        "truth_threshold": 1.0,
        "lambda_tags": 1e-4,
        "lambda_mlm": 0.05,
        "lambda_wod": 5e-4,
        "lambda_woc": 5e-4,
    },
    "flickr-base-1": {
        "size": "base",
        "phases": ["tags=1"],
        "steps": 5000,
        "batch_size": 16,
        "lr": 5e-5,
        "dropout": 0.1,
        "recompute": True,
        "score_batch": 2048,
        "pool": 399,
        "retrieved": 31,
        "hard": 31,
        "maskings": 20,
        "refills": 20,
        "temperature": 2.0,
        "writer_sees": "own",
        "truth_threshold": 1.0,
        "lambda_tags": 5e-4,
        "lambda_mlm": 0.05,
    },
    "flickr-base-2": {
        "size": "base",
        "phases": ["dc=1"],
        "steps": 5000,
        "batch_size": 32,
        "dc_lr": 1e-5,
        "dropout": 0.1,
        "recompute": True,
        "score_batch": 2048,
        "pool": 399,
        "retrieved": 31,
        "hard": 31,
        "maskings": 20,
        "refills": 20,
        "temperature": 1.5,
        "writer_sees": "own",
        "truth_threshold": 1.0,
        "lambda_tags": 5e-4,
        "lambda_mlm": 0.1,
        "lambda_wod": 5e-4,
        "lambda_woc": 5e-4,
    },
    "flickr-large-1": {
        "size": "large",
        "phases": ["tags=1"],
        "steps": 5000,
        "batch_size": 32,
        "lr": 5e-5,
        "dropout": 0.1,
        "recompute": True,
        "score_batch": 2048,
        "pool": 399,
        "retrieved": 23,
        "hard": 23,
        "maskings": 20,
        "refills": 20,
        "temperature": 2.0,
        "writer_sees": "own",
        "truth_threshold": 1.0,
        "lambda_tags": 1e-3,
        "lambda_mlm": 0.05,
    },
    "flickr-large-2": {
        "size": "large",
        "phases": ["dc=1"],
        "steps": 1500,
        "batch_size": 32,
        "dc_lr": 1e-5,
        "dropout": 0.1,
        "recompute": True,
        "score_batch": 2048,
        "pool": 399,
        "retrieved": 23,
        "hard": 23,
        "maskings": 20,
        "refills": 20,
        "temperature": 1.5,
        "writer_sees": "own",
        "truth_threshold": 1.0,
        "lambda_tags": 5e-4,
        "lambda_mlm": 0.05,
        "lambda_wod": 5e-4,
        "lambda_woc": 5e-4,
    },
}
QUICK = {
    "scenes": [400, 50, 50],
    "steps": 120,
    "phases": ["warmup=2", "tags=1", "dc=1"],
    "warmup_batch_size": 16,
    "analyse_images": 30,
    "log_every": 20,
}


# These say what a call is to do; the other options belong to a run and come back with it.
OF_THIS_CALL = {"eval", "checkpoint", "query", "image", "resume", "out"}
# Those of a run that do not change what it learns.
MAY_CHANGE = {"device", "score_batch", "probe", "save_scores"}


def parse_arguments(argv=None):
    """The command line, read twice: what it names, be it a recipe, a run to resume or a checkpoint,
    is laid under it as defaults."""
    parser = make_parser()
    given = parser.parse_args(argv)
    parser.set_defaults(**RECIPES.get(given.recipe, {}))
    if given.quick:
        parser.set_defaults(**QUICK)
    if given.resume:
        parser.set_defaults(**arguments_of_run(given))
    elif given.eval or given.checkpoint:
        parser.set_defaults(**arguments_of_checkpoint(given))
    parser.set_defaults(out=default_out(given))
    args = parser.parse_args(argv)
    check(parser, args)
    return args


def arguments_of_run(given):
    """With which the run in --out began."""
    file = Path(given.out or default_out(given)) / "run.json"
    with datasets.one_line_errors(file, "begin the run anew, without --resume"):
        return known_arguments({**datasets.read_json(file)["arguments"]}, given)


def arguments_of_checkpoint(given):
    """With which the run of a checkpoint began, as far as they are of use to look at it."""
    arguments = load_checkpoint(given.eval or given.checkpoint)["arguments"]
    dropped = {"init", "device", "probe", "save_scores"}
    if given.data not in ("scenes", arguments.get("data")):
        dropped |= {"root", "features", "phrases", "skip_bad"}  # where the old data lay
    kept = {name: value for name, value in arguments.items() if name not in dropped}
    return known_arguments(kept, given)


def known_arguments(arguments, given):
    """Those that belong to a run; an option of another version is left out."""
    known = vars(given).keys() - OF_THIS_CALL
    return {name: value for name, value in arguments.items() if name in known}


def default_out(given):
    """A run directory by the name of the data; a checkpoint's own folder for pictures of it."""
    checkpoint = given.eval or given.checkpoint
    if checkpoint and os.access(Path(checkpoint).parent, os.W_OK):
        return str(Path(checkpoint).parent)
    return f"runs/{Path(given.data).stem.removeprefix('dataset_')}"


def check(parser, args):
    """Refuses options that do not go together, or would change a run that is resumed."""
    if bool(args.query or args.image) != bool(args.checkpoint):
        parser.error("--query or --image and --checkpoint go together")
    if args.hard > args.maskings * args.refills:
        parser.error(f"--hard {args.hard} exceeds --maskings x --refills")
    if args.pool < args.batch_size:
        parser.error(f"--pool {args.pool} is smaller than --batch-size")
    if not plan_phases(args):
        parser.error("--steps too few, or --init, so no warm-up, and no other phase")
    if args.resume:
        for name in sorted(vars(args).keys() - OF_THIS_CALL - MAY_CHANGE):
            before = parser.get_default(name)
            if getattr(args, name) != before:
                parser.error(f"--resume keeps --{name.replace('_', '-')} {before}; leave it out")


class Phase(NamedTuple):
    """A part of a training run. Each begins with a fresh optimiser and the best weights of the one
    before. warmup replaces the pre-trained UNITER of the paper, and is left out with --init. tags
    adds the negatives, retrieved and written; dc the two tasks on the written sentences."""

    name: str
    steps: int
    words_alone: int  # the first steps of the warm-up, without matching; else 0
    weights: dict  # {term of the objective: its weight, above 0}
    peak_lr: float


def plan_phases(args):
    """The phases of a run. Which terms of the objective are on is decided here, and for the two
    parts of the warm-up in `terms_and_rate`."""
    warmup = {"mlm": 1.0, "itm": args.lambda_itm}
    tags = {"hard": args.lambda_hard, "tags": args.lambda_tags, "mlm": args.lambda_mlm}
    dc = {**tags, "wod": args.lambda_wod, "woc": args.lambda_woc}
    rates = {"warmup": args.warmup_lr, "tags": args.lr, "dc": args.dc_lr}
    shares = {}
    for phase in args.phases:
        name, share = phase.split("=")
        shares[name] = float(share)
    if args.init:
        shares.pop("warmup", None)
    plan = []
    for name, lambdas in (("warmup", warmup), ("tags", tags), ("dc", dc)):
        if name not in shares:
            continue
        steps = round(args.steps * shares[name] / sum(shares.values()))
        words_alone = round(args.words_first * steps) if name == "warmup" else 0
        weights = {term: weight for term, weight in lambdas.items() if weight > 0}
        if steps > 0:
            plan.append(Phase(name, steps, words_alone, weights, rates[name]))
    return plan


def terms_and_rate(phase, step):
    """What a step of a phase learns, {term: weight}, and its learning rate. The two parts of the
    warm-up have each their own rise, a tenth of the steps, and fall of the rate."""
    weights = phase.weights
    done = step - phase.words_alone
    length = phase.steps - phase.words_alone
    if step < phase.words_alone:
        weights = {"mlm": phase.weights["mlm"]}
        done = step
        length = phase.words_alone
    rise = (done + 1) / max(0.1 * length, 1)
    fall = (length - done) / max(0.9 * length, 1)
    return weights, phase.peak_lr * min(rise, fall)


# ---- batches -----------------------------------------------------------------------------------


class Batch(NamedTuple):
    """P pairs, the first B of which are the anchors that a step learns from. On the device, but for
    the labels."""

    input_ids: torch.Tensor  # (P, T)
    true_captions: torch.Tensor  # (P, C, T') of each image
    features: torch.Tensor  # (P, R, F)
    boxes: torch.Tensor  # (P, R, 7)
    region_mask: torch.Tensor  # (P, R)
    masked: torch.Tensor  # (B, M, T) the anchors' captions, with masked words
    labels: torch.Tensor  # (B, M, T) the words there, -1 elsewhere; on the CPU
    places: torch.Tensor  # (q,) of the masked words, flat in `masked`
    targets: torch.Tensor  # (q,) the words there; -1 where the list is padded


def draw_pairs(split, count, rng):
    """`count` different images of a split, and one caption of each: (P,) indices of captions."""
    images = torch.randperm(len(split.images), generator=rng)[:count]
    first = torch.searchsorted(split.image_of_caption, images)
    end = torch.searchsorted(split.image_of_caption, images, right=True)
    return first + (torch.rand(len(images), generator=rng) * (end - first)).long()


def make_batch(data, split, captions, B, device, rng, maskings, probability):
    """The Batch of P captions, given by index, and their images. All is drawn on the CPU, so that
    no size need be asked of a GPU."""
    tokenizer = data.tokenizer
    images = data.splits[split].image_of_caption[captions]
    input_ids = data.text(split, captions)
    features, boxes, region_mask = data.image(split, images)
    phrases = data.phrases(split, captions[:B])
    masked, labels = generate.mask_phrases(
        input_ids[:B, : phrases.size(2)],
        phrases,
        tokenizer.mask_id,
        tokenizer.word_range,
        maskings,
        probability,
        rng,
    )
    places = (labels.flatten() >= 0).nonzero()[:, 0]  # (q,)
    targets = labels.flatten()[places]
    padding = -len(places) % 128  # since a CPU makes a bfloat16 kernel for each number of words
    batch = Batch(
        input_ids=input_ids,
        true_captions=data.true_captions(split, images),
        features=features,
        boxes=boxes,
        region_mask=region_mask,
        masked=masked,
        labels=labels,
        places=F.pad(places, (0, padding)),
        targets=F.pad(targets, (0, padding), value=-1),
    )
    moved = Batch(*(tensor.to(device, non_blocking=True) for tensor in batch))
    return moved._replace(labels=labels)


def prepare(model, batch, pad_id):
    """All captions and all images of a batch -> (Prepared texts, Prepared images)."""
    texts = model.prepare_text(batch.input_ids, batch.input_ids != pad_id)
    images = model.prepare_regions(batch.features, batch.boxes, batch.region_mask)
    return texts, images


def masked_words_loss(model, images, batch, pad_id):
    """L_mlm of the anchors' masked captions, each beside its own image."""
    M = batch.masked.size(1)
    ids = batch.masked.flatten(0, 1)  # (B * M, T)
    texts = model.prepare_text(ids, ids != pad_id)
    row = torch.arange(len(ids), device=ids.device)
    hidden = model.encode_pairs(texts, row, images, row // M, ids.size(1))  # (B * M, T, D)
    hidden = hidden.flatten(0, 1).index_select(0, batch.places)  # (q, D)
    return masked_lm_loss(model.fill(hidden), batch.targets)


def weighted_sum(terms, weights, diagnostics):
    """The objective, a scalar with gradient, and what the log shows, {name: scalar} without."""
    loss = sum(weight * terms[name] for name, weight in weights.items())
    values = {"loss": loss, **terms, **diagnostics}
    return loss, {name: value.detach() for name, value in values.items()}


# ---- the warm-up -------------------------------------------------------------------------------


def warmup_step(model, data, args, weights, device, rng, device_rng):
    """One step of the warm-up, without the optimiser:
        L = L_mlm + e L_itm
    masked words and, once "itm" is among the weights, matching against hard partners. rng draws on
    the CPU, device_rng on the device. Returns what `weighted_sum` does."""
    pad_id = data.tokenizer.pad_id
    dtype = getattr(torch, args.dtype)
    captions = draw_pairs(data.splits["train"], args.warmup_batch_size, rng)
    B = len(captions)
    probability = args.warmup_mask_probability
    batch = make_batch(data, "train", captions, B, device, rng, 1, probability)

    # Without gradient and without dropout: which wrong partners look true?
    if "itm" in weights:
        with evaluate.inference(model, device, dtype):
            texts, images = prepare(model, batch, pad_id)
            wrong_images, wrong_texts, false = draw_wrong_partners(
                model, texts, images, batch, args.wrong_partners, pad_id, device_rng
            )

    # With gradient.
    terms = {}
    with autocast(device, dtype):
        texts, images = prepare(model, batch, pad_id)
        terms["mlm"] = masked_words_loss(model, images, batch, pad_id)
        if "itm" in weights:
            # The true pairs, each image with a wrong caption, each caption with a wrong image.
            pair = torch.arange(B, device=device)
            true = torch.ones_like(false)
            text_index = torch.cat((pair, wrong_texts, pair))
            image_index = torch.cat((pair, pair, wrong_images))
            logits = model.score_pairs(texts, text_index, images, image_index)  # (3B,)
            matches = torch.cat((true, ~true, ~true))
            terms["itm"] = matching_loss(logits, matches, valid=torch.cat((true, false, false)))
    return weighted_sum(terms, weights, {})


def draw_wrong_partners(model, texts, images, batch, count, pad_id, rng):
    """For each pair another one's image and caption, to tell from its own: among the `count` pairs
    behind (images) or before (captions) it, the likelier the higher they score, as in ALBEF.
    Returns wrong_images, wrong_texts and false (B,); not false = they are true after all."""
    ids = batch.input_ids  # (B, T)
    B = len(ids)
    row = torch.arange(B, device=ids.device)
    step = torch.arange(1, max(min(count, B - 1), 1) + 1, device=ids.device)  # (K,)
    behind = (row[:, None] + step) % B  # (B, K)
    before = (row[:, None] - step) % B
    K = len(step)
    # Caption b with the image k steps behind it; so image b with the caption k steps before it.
    scores = model.score_pairs(texts, row.repeat_interleave(K), images, behind.flatten()).view(B, K)
    false_texts = ~generate.equals_a_caption(ids[before], batch.true_captions, pad_id)  # (B, K)
    false_images = false_texts[behind, step - 1]
    image = draw_by_score(scores, false_images, rng)
    text = draw_by_score(scores[before, step - 1], false_texts, rng)
    wrong_images = behind.gather(1, image)[:, 0]
    wrong_texts = before.gather(1, text)[:, 0]
    return wrong_images, wrong_texts, false_images.any(1) & false_texts.any(1)


def draw_by_score(scores, valid, rng):
    """One column of each row, drawn from the softmax of the valid scores: (B, K) -> (B, 1)."""
    # The largest score plus Gumbel noise is such a draw, and a GPU makes it without a halt.
    noise = torch.empty_like(scores, dtype=torch.float32).exponential_(generator=rng).log()
    return (scores - noise).masked_fill(~valid, float("-inf")).argmax(1, keepdim=True)


# ---- TAGS-DC -----------------------------------------------------------------------------------


def tailored_step(model, writer, data, args, weights, device, rng, device_rng):
    """One step of TAGS-DC (3.5), without the optimiser:
        L = L_hard + a L_tags + b L_mlm + c L_wod + d L_woc
    with those terms that are among the weights. writer: writes the negatives; the model, or a
    frozen one. rng draws on the CPU, device_rng on the device. Returns what `weighted_sum` does."""
    pad_id = data.tokenizer.pad_id
    dtype = getattr(torch, args.dtype)
    margin = args.margin
    captions = draw_pairs(data.splits["train"], args.pool, rng)
    B = min(args.batch_size, len(captions))
    probability = args.mask_probability
    batch = make_batch(data, "train", captions, B, device, rng, args.maskings, probability)

    # Without gradient and without dropout: which images, captions and sentences are hard?
    written = None
    with evaluate.inference(model, device, dtype):
        texts, images = prepare(model, batch, pad_id)
        hard_images, hard_texts = retrieve_negatives(  # 3.2
            model, texts, images, batch, args.retrieved, args.score_batch, pad_id
        )
        if weights.keys() & {"tags", "wod", "woc"}:
            written = write_negatives(  # 3.3
                model, writer, images, batch, data.tokenizer, args, rng, device_rng
            )

    # With gradient: only the true pairs and what was found hard is encoded again.
    terms = {}
    diagnostics = {}
    with autocast(device, dtype):
        texts, images = prepare(model, batch, pad_id)
        positive, to_images, to_texts = score_retrieved(
            model, texts, images, hard_images.index, hard_texts.index
        )
        hard_image = triplet_loss(positive, to_images, margin=margin, valid=hard_images.valid)
        hard_text = triplet_loss(positive, to_texts, margin=margin, valid=hard_texts.valid)
        terms["hard"] = hard_image + hard_text
        diagnostics["hard_image"] = hard_image
        diagnostics["hard_text"] = hard_text
        diagnostics["positive"] = positive.mean()
        diagnostics["retrieved"] = masked_mean(to_texts, hard_texts.valid)
        if written is not None:
            scores, words = encode_written(model, images, written.sentences, pad_id)
            diagnostics["synthetic"] = masked_mean(scores, written.valid)
            diagnostics["kept"] = written.valid.float().mean()
        if "tags" in weights:
            terms["tags"] = triplet_loss(positive, scores, margin=margin, valid=written.valid)
        if "wod" in weights:  # which words were replaced?
            real = (written.sentences != pad_id) & written.valid[..., None]  # (B, H, T)
            terms["wod"] = word_discrimination_loss(
                model.discriminate(words),
                written.labels >= 0,
                real,
                original_weight=args.original_weight,
            )
        if "woc" in weights:  # which words stood there?
            terms["woc"] = word_correction_loss(model.correct(words), written.labels)
        if "mlm" in weights:  # the writer learns from the same masked captions
            terms["mlm"] = masked_words_loss(model, images, batch, pad_id)
    return weighted_sum(terms, weights, diagnostics)


class Retrieved(NamedTuple):
    """Hard negatives of the anchors, hardest first."""

    index: torch.Tensor  # (B, H) in the pool
    valid: torch.Tensor  # (B, H) bool; False = the pool has no more that are false


def retrieve_negatives(model, texts, images, batch, count, score_batch, pad_id):
    """The H = count hardest images of the pool for each anchor caption, and captions for each
    anchor image (section 3.2), none of which is true -> Retrieved images, Retrieved captions."""
    ids = batch.input_ids
    P = len(ids)
    B = len(batch.masked)
    anchors = torch.arange(B, device=ids.device)
    pool = torch.arange(P, device=ids.device)
    # Every anchor caption with every image, then the other captions with the anchor images.
    text_index = torch.cat((anchors.repeat_interleave(P), pool[B:].repeat_interleave(B)))
    image_index = torch.cat((pool.repeat(B), anchors.repeat(P - B)))
    scores = model.score_pairs(texts, text_index, images, image_index, score_batch)
    image_scores = scores[: B * P].view(B, P)
    text_scores = torch.cat((image_scores[:, :B], scores[B * P :].view(P - B, B))).T  # (B, P)

    true = batch.true_captions
    false_images = ~generate.equals_a_caption(ids[:B].expand(P, B, -1), true, pad_id).T  # (B, P)
    false_texts = ~generate.equals_a_caption(ids.expand(B, P, -1), true[:B], pad_id)  # (B, P)
    hard_images = generate.select_hardest(image_scores, false_images, min(count, P))
    hard_texts = generate.select_hardest(text_scores, false_texts, min(count, P))
    return Retrieved(*hard_images), Retrieved(*hard_texts)


def score_retrieved(model, texts, images, hard_images, hard_texts):
    """Scores of the true pairs (B,), of each anchor caption with its hard images (B, H), and of
    each anchor image with its hard captions (B, H). hard_images, hard_texts: (B, H) indices."""
    B, H = hard_images.shape
    pair = torch.arange(B, device=hard_images.device)
    anchor = pair.repeat_interleave(H)  # (B * H,)
    text_index = torch.cat((pair, anchor, hard_texts.flatten()))
    image_index = torch.cat((pair, hard_images.flatten(), anchor))
    scores = model.score_pairs(texts, text_index, images, image_index).sigmoid()
    positive, to_images, to_texts = scores.split((B, B * H, B * H))
    return positive, to_images.view(B, H), to_texts.view(B, H)


def encode_written(model, images, sentences, pad_id):
    """Sentences (B, H, T), each with its own image: scores (B, H) and words (B, H, T, D)."""
    B, H, T = sentences.shape
    ids = sentences.flatten(0, 1)  # (B * H, T)
    texts = model.prepare_text(ids, ids != pad_id)
    row = torch.arange(B * H, device=ids.device)
    hidden = model.encode_pairs(texts, row, images, row // H, first=T)  # (B * H, T, D)
    return model.match(hidden).sigmoid().view(B, H), hidden.unflatten(0, (B, H))


def write_negatives(model, writer, images, batch, tokenizer, args, rng, device_rng):
    """`generate.tailor_negatives` for the anchors (section 3.3): the writer refills, the model
    judges. images: Prepared by the model."""
    B, M, T = batch.masked.shape
    writer_sees = images  # as the writer prepares them
    if writer is not model:
        writer_sees = writer.prepare_regions(batch.features, batch.boxes, batch.region_mask)

    def fill(ids, image_index, places):  # (n, T), (n,), (q,) -> (q, V)
        texts = writer.prepare_text(ids, ids != tokenizer.pad_id)
        row = torch.arange(len(ids), device=ids.device)
        hidden = writer.encode_pairs(texts, row, writer_sees, image_index, first=T)  # (n, T, D)
        return writer.fill(hidden.flatten(0, 1)[places])

    def match(ids, image_index):  # (n, T), (n,) -> (n,)
        texts = model.prepare_text(ids, ids != tokenizer.pad_id)
        row = torch.arange(len(ids), device=ids.device)
        return model.score_pairs(texts, row, images, image_index)

    writer_images = None  # each masked caption with its own picture, as in the paper
    if args.writer_sees == "other":
        writer_images = generate.other_images(B, M, rng)
    return generate.tailor_negatives(
        fill,
        match,
        batch.input_ids[:B, :T],
        batch.true_captions[:B],
        pad_id=tokenizer.pad_id,
        mask_id=tokenizer.mask_id,
        vocabulary_range=tokenizer.word_range,
        masks=(batch.masked, batch.labels),
        refills=args.refills,
        temperature=args.temperature,
        truth_threshold=args.truth_threshold,
        writer_images=writer_images,
        hard=args.hard,
        chunk_size=args.score_batch,
        generator=device_rng,
    )


# ---- the run -----------------------------------------------------------------------------------

FORMAT = 3  # of our checkpoints
# Of this process, and how many there are: torchrun says so. The first one alone writes.
RANK = int(os.environ.get("RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))


def say(text):
    """Prints a line, once for all processes."""
    if RANK == 0:
        print(text, flush=True)


def write_text(path, text):
    """A text file, whole or not at all, once for all processes."""
    if RANK == 0:
        datasets.write_atomically(path, lambda part: part.write_text(text, encoding="utf-8"))


@contextlib.contextmanager
def only_run_in(folder):
    """Holds a lock on a run directory, so that two runs cannot write into it at once."""
    with open(folder / "lock", "w") as file:
        with contextlib.suppress(ImportError):  # Windows has none: there nothing is locked
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                text = f"{folder}: another run is writing here; wait for it, or give another --out"
                raise InputError(text) from None
        yield  # the lock ends with the file, however the program ends


def load_checkpoint(path, official=False):
    """The dictionary in a file: a checkpoint of ours or, where `official`, any other weights."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, PermissionError):
        raise
    except Exception:  # torch.load raises half a dozen kinds, with advice that would be unsafe
        state = None
    ours = isinstance(state, dict) and "arguments" in state
    fits = state.get("format") == FORMAT if ours else official and isinstance(state, dict)
    if not fits:
        text = f"no checkpoint of format {FORMAT}; official weights start a run with --init"
        raise InputError(f"{path}: {text}")
    return state


def broadcast_parameters(model):
    """All processes begin with the weights of the first one."""
    if WORLD_SIZE > 1:
        for parameter in model.parameters():
            dist.broadcast(parameter.data, src=0)


def average_gradients(model):
    """Each process has drawn a batch of its own, with its own mean of each term; all go on with the
    mean of their gradients. A head that no term asked has none, in every process."""
    if WORLD_SIZE == 1:
        return
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    joint = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(joint)
    joint /= WORLD_SIZE
    parts = joint.split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts):
        gradient.copy_(part.view_as(gradient))


def mean_values(history):
    """[{name: scalar}] -> {name: mean over those that have it and are finite, nan if none is}."""
    names = dict.fromkeys(name for values in history for name in values)
    means = {}
    for name in names:
        scalars = torch.stack([values[name] for values in history if name in values]).float()
        means[name] = scalars[scalars.isfinite()].mean().item()
    return means


@dataclass
class Progress:
    """Where a run stands, as its checkpoints say."""

    phase: int = 0  # number in the plan
    step: int = 0  # done in this phase
    best: dict = field(default_factory=dict)  # metrics of the phase's best validation
    warmup: dict | None = None  # what the test report after the warm-up said
    log: list = field(default_factory=list)  # rows of log.csv
    skipped_in_a_row: int = 0  # steps whose gradient was not finite, up to this one
    seconds: float = 0.0  # of training, validations and reports


class Trainer:
    """A training run: the model, where it stands, and all that its checkpoints hold. last.pt is
    written at every line of the log, and --resume goes on from there; best.pt holds the best
    weights of the phase. Of several processes (torchrun) each draws its own batches and pools."""

    def __init__(self, args, data, model, device):
        self.args = args
        self.data = data
        self.model = model
        self.device = device
        self.out = Path(args.out)
        self.plan = plan_phases(args)
        self.progress = Progress()
        # What draws batches, what draws words on the device, what draws dropout.
        self.rng = torch.Generator().manual_seed(args.seed + RANK)
        self.device_rng = torch.Generator(device).manual_seed(args.seed + RANK)
        self.generators = [self.rng, self.device_rng, torch.default_generator]
        if device.startswith("cuda"):
            self.generators.append(torch.cuda.default_generators[torch.cuda.current_device()])
        self.history = []  # {name: scalar} of each batch since the last line of the log
        self.skipped = 0  # steps since then
        self.saved = time.time()  # the last checkpoint
        self.warn = functools.cache(lambda text: say(f"warning: {text}"))  # once
        self.writer = None  # another network than the model, if it is frozen
        broadcast_parameters(model)
        self.begin_phase()

    def begin_phase(self):
        """AdamW anew, fused where torch can; no weight decay on biases and LayerNorm."""
        parameters = list(self.model.parameters())
        decayed = {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.01}
        others = {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0}
        fused = self.device != "mps"
        self.optimizer = torch.optim.AdamW([decayed, others], betas=(0.9, 0.98), fused=fused)
        phase = self.plan[self.progress.phase]
        if self.args.frozen_writer and self.writer is None and phase.name != "warmup":
            self.writer = copy.deepcopy(self.model).eval()

    def train(self):
        """What is left of the plan. An interrupt loses the steps since the last line of the log."""
        self.model.train()
        progress = self.progress
        while progress.phase < len(self.plan):
            phase = self.plan[progress.phase]
            line_began = time.time()
            while progress.step < phase.steps:
                weights, lr = terms_and_rate(phase, progress.step)
                self.optimise(phase, weights, lr)
                progress.step += 1
                if progress.step % self.args.log_every == 0 or progress.step == phase.steps:
                    self.report(phase, lr, time.time() - line_began)
                    if self.validates(phase):
                        self.validate(phase)
                    self.save("last.pt")
                    line_began = time.time()
            self.end_phase(phase)
            self.save("last.pt")

    def optimise(self, phase, weights, lr):
        """One step of the optimiser."""
        args = self.args
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        draws = (self.device, self.rng, self.device_rng)
        for _ in range(args.accumulate):
            if phase.name == "warmup":
                loss, values = warmup_step(self.model, self.data, args, weights, *draws)
            else:
                writer = self.writer or self.model
                loss, values = tailored_step(self.model, writer, self.data, args, weights, *draws)
            (loss / args.accumulate).backward()
            self.history.append(values)
        average_gradients(self.model)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 2.0)
        if norm.isfinite():
            self.optimizer.step()
            self.progress.skipped_in_a_row = 0
            return
        self.skipped += 1
        self.progress.skipped_in_a_row += 1
        if self.progress.skipped_in_a_row == 20:
            faulty = [name for name, value in values.items() if not value.isfinite()]
            raise InputError(
                f"no finite gradient in 20 steps up to step {self.progress.step + 1} of"
                f" {phase.name} (not finite: {', '.join(faulty)}): lower the learning rate;"
                " last.pt is from before"
            )

    def report(self, phase, lr, seconds):
        """A row of the log and a line on the screen: means over the steps since the last one, which
        took so many seconds. Of several processes the first one speaks, of its own batches."""
        args = self.args
        steps = len(self.history) // args.accumulate
        means = mean_values(self.history)
        means["skipped"] = self.skipped
        self.history = []
        self.skipped = 0
        if abs(means.get("positive", 1.0) - means.get("retrieved", 0.0)) < 1e-3:
            self.warn("true pairs and negatives score alike: lower --lr or lengthen the warm-up")
        if means.get("kept", 1.0) < 0.01:
            self.warn("hardly any text is usable as a negative: raise --maskings or --temperature")
        steps_of_phases = [planned.steps for planned in self.plan]
        done = sum(steps_of_phases[: self.progress.phase]) + self.progress.step
        row = {"phase": phase.name, "step": done, "lr": lr}
        self.progress.log.append(row | {name: round(mean, 5) for name, mean in means.items()})
        shown = [f"{phase.name} {done}/{sum(steps_of_phases)}"]
        shown += [f"{name} {mean:.4g}" for name, mean in means.items()]
        pace = seconds / steps  # of this phase: a step of another takes another time
        if "hard" in means:
            written = args.maskings * args.refills if "kept" in means else 0
            anchors = args.batch_size * args.accumulate * WORLD_SIZE
            shown.append(f"negatives/s {anchors * (2 * args.pool + written) / pace:.4g}")
        shown.append(f"phase ends in {pace * (phase.steps - self.progress.step) / 60:.1f} min")
        say("  ".join(shown))

    def validates(self, phase):
        """Whether a line of the log comes with a validation: --validations times a phase and at its
        end, but not before its new heads have learnt."""
        step = self.progress.step
        learnt = {"warmup": phase.words_alone, "tags": 0, "dc": 0.5 * phase.steps}[phase.name]
        lines = max(1, phase.steps // self.args.log_every // self.args.validations)
        due = step > learnt and step % (lines * self.args.log_every) == 0
        return due or step == phase.steps

    def validate(self, phase):
        """Recall on val; the best weights of the phase are kept."""
        args = self.args
        split = "val" if "val" in self.data.splits else "train"
        scores, owner = scores_of(self.model, self.data, split, args, self.device, args.val_images)
        metrics = evaluate.retrieval_metrics(scores, owner)
        say(f"  validation: RSum {metrics['rsum']:.1f}")
        if phase.name == "warmup":  # as in the release, correction begins as the masked LM
            self.model.correction.load_state_dict(self.model.mlm.state_dict())
        for name in ("rsum", "tr_r1", "ir_r1"):
            self.progress.log[-1][f"val_{name}"] = round(metrics[name], 2)
        if metrics["rsum"] > self.progress.best.get("rsum", -1):
            self.progress.best = metrics
            self.save("best.pt")

    def end_phase(self, phase):
        """The phase's best weights go on, not its last."""
        self.model.load_state_dict(load_checkpoint(self.out / "best.pt")["model"])
        if phase.name == "warmup":
            self.progress.warmup, _, _ = test_report(self.model, self.data, self.args, self.device)
        self.progress.phase += 1
        self.progress.step = 0
        if self.progress.phase < len(self.plan):
            self.progress.best = {}
            self.begin_phase()

    def save(self, name):
        """Writes everything that --resume, --eval and --init need, and the log beside it."""
        self.progress.seconds += time.time() - self.saved
        self.saved = time.time()
        rng = [generator.get_state() for generator in self.generators]
        rng_of_all = [rng] * WORLD_SIZE
        if WORLD_SIZE > 1:  # all come by here, so best.pt is whole before anyone reads it
            dist.all_gather_object(rng_of_all, rng)
        rows = self.progress.log
        names = list(dict.fromkeys(key for row in rows for key in row))
        lines = [",".join(str(row.get(key, "")) for key in names) for row in rows]
        write_text(self.out / "log.csv", "\n".join([",".join(names), *lines]) + "\n")
        if RANK > 0:
            return
        state = {
            "format": FORMAT,
            "arguments": vars(self.args),
            "config": vars(self.model.config),
            "tokens": self.data.tokenizer.tokens,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "writer": self.writer.state_dict() if self.writer else None,
            "progress": vars(self.progress),
            "rng": rng_of_all,
        }
        with datasets.one_line_errors(self.out / name, "is there space on the disk?"):
            datasets.write_atomically(self.out / name, lambda part: torch.save(state, part))

    def resume(self, state):
        """Takes up where a checkpoint stands, to the same result as without the break."""
        self.progress = Progress(**state["progress"])
        self.model.load_state_dict(state["model"])
        if self.progress.phase == len(self.plan):
            return  # only the report is left
        self.begin_phase()
        self.optimizer.load_state_dict(state["optimizer"])
        if self.writer:
            self.writer.load_state_dict(state["writer"])
        saved = state["rng"][RANK] if RANK < len(state["rng"]) else []
        sizes = [len(generator.get_state()) for generator in self.generators]
        if sizes == [len(values) for values in saved]:  # else they begin afresh, on other devices
            for generator, values in zip(self.generators, saved):
                generator.set_state(values)


# ---- evaluation, search: see evaluate.py for what they call -------------------------------------


def scoring(args, device):
    """What every function of evaluate.py that runs the network is told."""
    dtype = getattr(torch, args.dtype)
    return {"device": device, "dtype": dtype, "score_batch": args.score_batch}


def scores_of(model, data, split, args, device, count=None):
    """Score matrix (C, I) of a split, or of its first `count` images, and each caption's image."""
    images = torch.arange(len(data.splits[split].images))[:count]
    owner = data.splits[split].image_of_caption
    owner = owner[owner < len(images)]
    part = torch.arange(len(owner)).tensor_split(WORLD_SIZE)[RANK]
    options = scoring(args, device)
    scores = evaluate.score_matrix(model, data, split, captions=part, images=images, **options)
    if WORLD_SIZE > 1:
        parts = [scores] * WORLD_SIZE
        dist.all_gather_object(parts, scores)
        scores = torch.cat(parts)
    return scores, owner


def final_split(data):
    """The split that is reported and searched: test, or the nearest there is."""
    return next(name for name in ("test", "val", "train") if name in data.splits)


def tailored_examples(model, data, split, args, device, count):
    """Generated negatives of the first caption of some images, by the seed: a dict on the CPU of
    captions and images (N,), originals (N, T), sentences (N, H, T), valid (N, H)."""
    # One image of each family of the scenes, so that a writer's other picture is no near-twin.
    last = len(data.splits[split].images) - 1
    images = torch.linspace(0, last, min(last + 1, count)).long()
    captions = torch.searchsorted(data.splits[split].image_of_caption, images)
    rng = torch.Generator().manual_seed(args.seed)
    device_rng = torch.Generator(device).manual_seed(args.seed)
    batch = make_batch(
        data, split, captions, len(captions), device, rng, args.maskings, args.mask_probability
    )
    with evaluate.inference(model, device, getattr(torch, args.dtype)):
        prepared = model.prepare_regions(batch.features, batch.boxes, batch.region_mask)
        draws = (rng, device_rng)
        made = write_negatives(model, model, prepared, batch, data.tokenizer, args, *draws)
    return {
        "captions": captions,
        "images": images,
        "originals": batch.input_ids[:, : made.sentences.size(2)].cpu(),
        "sentences": made.sentences.cpu(),
        "valid": made.valid.cpu(),
    }


def test_report(model, data, args, device):
    """Everything measured on the test split -> metrics, scores (C, I), generated examples."""
    split = final_split(data)
    scores, _ = scores_of(model, data, split, args, device)
    examples = tailored_examples(model, data, split, args, device, args.analyse_images)
    options = scoring(args, device)
    metrics = evaluate.report(model, data, split, scores, examples, args.seed, **options)
    return metrics, scores, examples


class Published(NamedTuple):
    """Files of published tests, read before a run begins."""

    probes: list  # of evaluate.Probe
    positives: evaluate.Positives | None


def read_published(args):
    probes = [evaluate.read_probe(path) for path in args.probe]
    return Published(probes, evaluate.read_positives(args.root) if args.root else None)


def finish(args, data, model, device, progress, published):
    """Evaluates on the test split: a table, metrics.json, then what may fail yet: probes, pictures.
    progress: a Progress."""
    out = Path(args.out)
    split = final_split(data)
    content = data.splits[split]
    options = scoring(args, device)
    metrics, scores, examples = test_report(model, data, args, device)
    if RANK > 0:
        return
    say(f"{split} split: {len(content.images):,} images, {len(content.captions):,} captions")
    say("\n".join(evaluate.table(metrics, progress.warmup or {})))
    write_metrics(args, metrics, progress)
    if args.save_scores:
        np.save(out / "scores.npy", scores.numpy())
    found = {}
    for probe in published.probes:
        found |= evaluate.probe_metrics(probe, model, data, split, **options)
    if published.positives:
        found |= evaluate.positives_metrics(published.positives, scores, data, split)
    if found:
        say("\n".join(evaluate.table(found, {})))
        write_metrics(args, metrics | found, progress)
    evaluate.draw_negatives(out / "negatives.png", model, data, split, scores, examples, **options)
    say(f"in {out}: " + ", ".join(sorted(path.name for path in out.iterdir() if path.is_file())))


def write_metrics(args, metrics, progress):
    """metrics.json of a training run."""
    if args.eval:
        return
    record = {
        "test": metrics,
        "val": progress.best,
        "warmup": progress.warmup,
        "arguments": vars(args),
        "seconds": round(progress.seconds, 1),
        "seed": args.seed,
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__},
    }
    write_text(Path(args.out) / "metrics.json", json.dumps(record, indent=1))


def choose_hardware(args):
    """(device, name of the dtype) that --device and --dtype come to on this machine."""
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    device = next(name for name in has if has[name]) if args.device == "auto" else args.device
    if not has[device]:
        raise InputError(f"--device {device}: no such device here; use --device cpu")
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
    if args.dtype != "auto":
        return device, args.dtype
    return device, str(fast_dtype(device)).removeprefix("torch.")


def make_model(args, data, source, state):
    """The network: as the file `source` holds it, ours or official weights; None: a fresh one."""
    sizes = {"vocab_size": len(data.tokenizer.tokens), "feature_size": data.regions.feature_size}
    if source is None:
        return TagsDC(Config.preset(args.size, dropout=args.dropout, **sizes))
    with datasets.one_line_errors(source, "weights, vocab.txt and features must belong together"):
        if "config" in state:
            config = Config(**state["config"] | {"dropout": args.dropout})
        else:
            config = Config.from_uniter(state, None, args.dropout, sizes["vocab_size"])
        for name, size in sizes.items():
            if getattr(config, name) != size:
                raise ValueError(f"its {name} is {getattr(config, name)}, the data's {size}")
        model = TagsDC(config)
        if "config" in state:
            if not all(values.isfinite().all() for values in state["model"].values()):
                raise ValueError("holds numbers that are not finite")
            model.load_state_dict(state["model"])
        else:
            for what, names in model.load_uniter(state).items():
                say(f"{source}: {what} {len(names)} entries{', '.join(['', *names[:4]])}")
    return model


def load_all(args, source, state, device):
    """What a run works on -> data, model. state: what the file `source` holds, or {} for None. The
    first process converts the region features, for hours if need be, and the others wait."""
    inner = Path("data") / Path(args.data).stem
    elsewhere = [Path(path).parent / inner for path in (source, args.init) if path]
    tokens = state.get("tokens")
    shared = {"store": Path(args.out) / inner, "elsewhere": elsewhere, "tokens": tokens}
    if RANK > 0:
        dist.barrier()
    if args.data == "scenes":
        data = datasets.load_scenes(args.seed, args.scenes, **shared)
    else:
        places = (args.root, args.features, args.phrases)
        data = datasets.load_data(args.data, *places, args.skip_bad, **shared)
    if RANK == 0 and WORLD_SIZE > 1:
        dist.barrier()
    for note in data.notes:
        say(note)
    return data, make_model(args, data, source, state).to(device)


def train(args, device, published):
    """A training run from its first step or, with --resume, from its last checkpoint."""
    out = Path(args.out)
    last = out / "last.pt"
    goes_on = args.resume and last.exists()
    source = last if goes_on else args.init
    state = load_checkpoint(source, official=not goes_on) if source else {}
    data, model = load_all(args, source, state, device)
    if "train" not in data.splits:
        raise InputError(f"{args.data}: no captions of the train split to learn from")
    model.recompute = args.recompute
    if RANK == 0 and not goes_on:  # of an earlier run, now that this one has all it needs
        for name in ("last.pt", "best.pt", "metrics.json"):
            (out / name).unlink(missing_ok=True)
        write_text(out / "run.json", json.dumps({"arguments": vars(args)}))
    trainer = Trainer(args, data, model, device)
    if goes_on:
        trainer.resume(state)
    else:
        trainer.save("last.pt")
    trainer.train()
    finish(args, data, model, device, trainer.progress, published)


def run(args):
    """Trains, evaluates or searches."""
    device, args.dtype = choose_hardware(args)
    published = read_published(args)
    if WORLD_SIZE > 1:
        waiting = 8 * dist.constants.default_pg_timeout
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=waiting)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed + RANK)
    if not (args.eval or args.checkpoint):
        with only_run_in(out) if RANK == 0 else contextlib.nullcontext():
            return train(args, device, published)
    source = args.eval or args.checkpoint
    state = load_checkpoint(source)
    data, model = load_all(args, source, state, device)
    if args.eval:
        return finish(args, data, model, device, Progress(**state["progress"]), published)
    asked = (final_split(data), args.query, args.image, out / "search.png")
    for score, text in evaluate.search(model, data, *asked, **scoring(args, device)):
        say(f"{score:.4f}  {text}")
    say(f"drawn as {out}/search.png")


def interrupt(number, _):
    """SIGINT and SIGTERM, also where a shell had SIGINT ignored."""
    raise KeyboardInterrupt(number)


def main(argv=None):
    """The command; returns its exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    try:
        run(parse_arguments(argv))
        return 0
    except KeyboardInterrupt as stop:
        print("interrupted; --resume goes on from the last line of the log", file=sys.stderr)
        return 128 + stop.args[0]
    except torch.cuda.OutOfMemoryError:
        fault = "out of memory: --recompute, or lower --score-batch, --batch-size, --maskings"
    except (InputError, OSError) as error:
        fault = " ".join(str(error).split())
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    print(f"tagsdc.py: error: {fault}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
