"""TAGS-DC from one command: train, evaluate, search, study (see README.md).

Reading order: training_step, Trainer.train, run; every default stands in TERMS and OPTIONS.
Letters: B anchor pairs of a step, P pairs in its retrieval pool (the anchors first), T text
positions, R regions, M maskings, K refills, H kept negatives, C captions of an image, q masked
words of all anchors. Every mask: True = real / usable."""

import argparse
import contextlib
import copy
import functools
import json
import os
import re
import runpy
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import data as datasets
import evaluate
import generate
import losses
from data import InputError
from model import PRESETS, Config, TagsDC, autocast, fast_dtype

# ---- options -----------------------------------------------------------------------------------

# warmup replaces the pre-trained UNITER of the paper, and is left out with --init. tags adds the
# negatives, retrieved and written; dc the two tasks on written sentences, at a smaller rate.
PHASES = {"warmup": "warmup_lr", "tags": "lr", "dc": "dc_lr"}  # and the options of their rates
TERMS = {  # of the objective: (phases, default weight, help of its --lambda); see losses.Objective
    "itc": ("warmup", 0.0, "weight of contrasting embeddings; above 0 it joins the score"),
    "itm": ("warmup", 1.0, "weight of matching in the warm-up"),
    "hard": ("tags dc", 1.0, "weight of the triplet loss of retrieved negatives (paper: 1)"),
    "mlm": ("warmup tags dc", 0.2, "weight of masked LM (paper: 0.01 to 0.1); warm-up: 1"),
    "tags": ("tags dc", 1.0, "weight of the synthetic triplet loss (paper: 5e-5 to 1e-3)"),
    "wod": ("dc", 1.0, "weight of word discrimination (paper: 5e-4)"),
    "woc": ("dc", 0.5, "weight of word correction (paper: 5e-4)"),
}
OPTIONS = {  # group: (name, default, help); the defaults fit the embedded scenes on a CPU
    "what to do": [
        ("eval", None, "evaluate this checkpoint instead of training"),
        ("checkpoint", None, "checkpoint for --query and --image"),
        ("query", None, "find the test images that a sentence describes best"),
        ("image", None, "find the test captions that describe an image best"),
        ("probe", [], "fine-grained tests: SugarCrepe, RoCOCO or VALSE FOIL files"),
        ("resume", False, "go on with the interrupted run in --out"),
        ("study", 0, "compare TAGS-DC with its parts, with so many seeds (tests/study.py)"),
        ("quick", False, "everything in miniature, to see that it works"),
    ],
    "data and network": [
        ("data", "scenes", "scenes, coco, flickr30k, flickr8k, or a JSON of Karpathy's form"),
        ("root", None, "folder of the captions and region features"),
        ("features", None, "file or folder of the region features, if not under --root"),
        ("phrases", None, "JSON with the phrases of the captions, instead of the parser"),
        ("skip-bad", False, "leave out unusable images and captions, and count them"),
        ("scenes", [1000, 100, 250], "images in train, val and test of the embedded world"),
        ("size", "tiny", "of the network (paper: base, large)"),
        ("init", None, "start from our checkpoint or official UNITER weights, without warm-up"),
        ("dropout", 0.0, "paper: 0.1"),
    ],
    "training": [
        ("recipe", None, "schedule in place of defaults: the release's, or for photographs"),
        ("steps", 3250, "optimiser steps in all; the phases share them"),
        ("phases", ["warmup=10", "dc=3"], "phases (warmup, tags, dc) and their shares of --steps"),
        ("batch-size", 16, "anchor pairs a step (paper: 32 on each of 8 GPUs)"),
        ("warmup-batch-size", 32, "pairs a step of the warm-up"),
        ("contrast-pool", 256, "pairs whose embeddings the warm-up contrasts, if --lambda-itc"),
        ("wrong-partners", 7, "pairs among which the warm-up draws a hard wrong one"),
        ("words-first", 0.8, "share of the warm-up before matching: words (and contrast) alone"),
        ("mask-probability", 0.15, "of a phrase, for the negatives"),
        ("warmup-mask-probability", 0.3, "of a phrase, in the warm-up"),
        ("accumulate", 1, "batches whose gradients make one optimiser step"),
        ("recompute", False, "recompute activations: less memory, a third more work"),
        ("warmup-lr", 1e-3, "peak learning rate of the warm-up"),
        ("lr", 1e-3, "peak learning rate of the tags phase (paper: 5e-5)"),
        ("dc-lr", 1e-3, "peak learning rate of the dc phase (paper: 1e-5)"),
    ],
    "negatives and objective": [
        ("pool", 16, "pairs among which hard negatives are retrieved (paper: 399)"),
        ("retrieved", 2, "hard negatives retrieved each way (paper: 31)"),
        ("hard", 4, "hard negatives written (paper: 31)"),
        ("maskings", 4, "maskings of each caption (paper: 20)"),
        ("refills", 4, "refills of each masking (paper: 20)"),
        ("temperature", 1.0, "of the refilling (paper: 1.5)"),
        ("writer-sees", "other", "own picture (the paper) or another one of the batch"),
        ("truth-threshold", 0.1, "likelier words are taken for true, not refilled (paper: 1, off)"),
        ("frozen-writer", False, "the writer keeps the weights that the tags phase begins with"),
        ("margin", 0.2, "of the triplet losses"),
        *((f"lambda-{term}", weight, text) for term, (_, weight, text) in TERMS.items()),
        ("original-weight", 0.11, "of original words in word discrimination"),
    ],
    "run": [
        ("out", None, "run directory (default: runs/ and the name of the data)"),
        ("seed", 0, "of everything random"),
        ("device", "auto", "where to compute"),
        ("dtype", "auto", "float32, bfloat16 (autocast) or auto: what the hardware does fast"),
        ("log-every", 50, "steps between two lines of the log; --resume goes on from the last"),
        ("validations", 2, "validations in a phase"),
        ("val-images", 100, "images of val that a validation looks at"),
        ("analyse-images", 200, "test images whose generated negatives are analysed"),
        ("score-batch", 128, "pairs in one pass without gradient (a GPU likes 2048)"),
        ("save-scores", False, "keep the test score matrix as scores.npy"),
    ],
}
DEFAULTS = {name.replace("-", "_"): value for rows in OPTIONS.values() for name, value, _ in rows}

# The schedules of the official release: one stage each, over what all of them share.
RELEASE = dict(size="base", batch_size=32, dropout=0.1, score_batch=2048, recompute=True)
RELEASE |= dict(pool=399, retrieved=31, hard=31, maskings=20, refills=20, temperature=1.5)
RELEASE |= dict(writer_sees="own", truth_threshold=1.0, lambda_wod=5e-4, lambda_woc=5e-4)
RELEASE |= dict(steps=5000, lambda_mlm=0.05, lr=5e-5, dc_lr=1e-5)
STAGE_1 = RELEASE | dict(phases=["tags=1"])
STAGE_2 = RELEASE | dict(phases=["dc=1"])
LARGE = dict(size="large", lambda_tags=1e-3, retrieved=23, hard=23)
RECIPES = {
    "coco-base-1": STAGE_1 | dict(lambda_tags=5e-5, lambda_mlm=0.01),
    "coco-base-2": STAGE_2 | dict(lambda_tags=1e-4, steps=1500),
    "coco-large-1": STAGE_1 | LARGE | dict(lr=4e-5),
    "coco-large-2": STAGE_2 | dict(size="large", lambda_tags=1e-3),
    "flickr-base-1": STAGE_1 | dict(lambda_tags=5e-4, temperature=2.0, batch_size=16),
    "flickr-base-2": STAGE_2 | dict(lambda_tags=5e-4, lambda_mlm=0.1),
    "flickr-large-1": STAGE_1 | LARGE,
    "flickr-large-2": STAGE_2 | LARGE | dict(steps=1500),
}
# From nothing on some thousand photographs, see "Photographs from scratch" in the README.
PHOTOS = dict(size="flat", dropout=0.25, lambda_itc=1.0, warmup_lr=2e-3, warmup_batch_size=64)
PHOTOS |= dict(steps=2300, phases=["warmup=1900", "dc=400"], words_first=0.79, validations=1)
RECIPES["scratch-photos"] = PHOTOS | dict(pool=32, dc_lr=3e-4)
QUICK = dict(scenes=[400, 50, 50], steps=120, phases=["warmup=2", "tags=1", "dc=1"])
QUICK |= dict(warmup_batch_size=16, analyse_images=30, log_every=20)
CHOICES = {"size": PRESETS, "recipe": RECIPES, "writer-sees": ("own", "other")}
CHOICES |= {"device": ("auto", "cpu", "cuda", "mps"), "dtype": ("auto", "float32", "bfloat16")}

# What a call says of itself; everything else belongs to the run and comes back with it.
OF_THIS_CALL = ("eval", "checkpoint", "query", "image", "resume", "out", "study")
# Numbers are above 0; these may be 0.
MAY_BE_ZERO = [f"lambda_{term}" for term in TERMS if term != "hard"]
MAY_BE_ZERO += ["words_first", "original_weight", "study", "dropout", "seed"]
AT_MOST = {"dropout": 0.99, "words_first": 1, "mask_probability": 1, "seed": 2**32}
AT_MOST |= {"warmup_mask_probability": 1, "truth_threshold": 1}


def make_parser():
    """The table of options as a parser that returns only what was given. The type of an option is
    that of its default: a bool is a switch, a list takes several values, None stands for a text."""
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS)
    for title, options in OPTIONS.items():
        group = parser.add_argument_group(title)
        for name, default, text in options:
            form = {"type": str if default is None else type(default)}
            if isinstance(default, bool):
                form = {"action": argparse.BooleanOptionalAction}
            elif isinstance(default, list):
                form = {"nargs": "+", "type": type(default[0]) if default else str}
            elif name in CHOICES:
                form["choices"] = CHOICES[name]
            group.add_argument(f"--{name}", help=f"{text} (default: {default})", **form)
    return parser


def parse_arguments(argv=None):
    """The command line, laid over the recipe, --quick, or what a run or checkpoint began with."""
    parser = make_parser()
    given = vars(parser.parse_args(argv))
    values = DEFAULTS | RECIPES.get(given.get("recipe"), {})
    values |= QUICK if given.get("quick") else {}
    name = Path(given.get("data", "scenes")).stem.removeprefix("dataset_")
    values["out"] = given.get("out", f"runs/{'study' if given.get('study') else name}")
    source = given.get("eval") or given.get("checkpoint")
    kept = DEFAULTS.keys() - OF_THIS_CALL
    saved = {}
    if given.get("resume"):
        file = Path(values["out"]) / "run.json"
        with datasets.one_line_errors(file, "begin the run anew, without --resume"):
            saved = {**datasets.read_json(file)["arguments"]}
        for name in given.keys() & kept - {"device", "score_batch", "probe", "save_scores"}:
            before = saved.get(name, DEFAULTS[name])  # an option may be younger than the run
            if given[name] != before:
                parser.error(f"--resume keeps --{name.replace('_', '-')} {before}; leave it out")
    elif source:
        saved = load_checkpoint(source)["arguments"]
        kept -= {"init", "device", "probe", "save_scores"}
        if "data" in given:  # leaves behind where the old data lay
            kept -= {"root", "features", "phrases", "skip_bad"}
        if os.access(Path(source).parent, os.W_OK):  # pictures go beside the checkpoint
            values["out"] = str(Path(source).parent)
    values |= {name: saved[name] for name in kept & saved.keys()}
    args = argparse.Namespace(**values | given)
    check(parser, args)
    return args


def check(parser, args):
    """Refuses numbers out of range, options that do not go together, probes that are not there."""
    for name, value in vars(args).items():
        least = 0 if name in MAY_BE_ZERO else 1e-300
        most = AT_MOST.get(name, 1e12)
        if type(value) in (int, float) and not least <= value <= most:
            bound = "at least" if least == 0 else "above"
            option = f"--{name.replace('_', '-')} {value}"
            parser.error(f"{option}: must be {bound} 0 and at most {most:g}")
    for phase in args.phases:
        if not re.fullmatch(rf"({'|'.join(PHASES)})=(?=.*[1-9])\d*\.?\d+", phase):
            parser.error(f"--phases {phase}: NAME=SHARE of {', '.join(PHASES)}, SHARE above 0")
    asked = bool(args.query or args.image)
    candidates = args.maskings * args.refills
    sizes = (len(args.scenes), min(args.scenes) > 0)
    faults = {
        "--scenes: images of train, val and test, one each at least": sizes != (3, True),
        f"--hard {args.hard} exceeds --maskings x --refills": args.hard > candidates,
        f"--pool {args.pool} is smaller than --batch-size": args.pool < args.batch_size,
        "--query or --image and --checkpoint go together": asked != bool(args.checkpoint),
        "--steps too few, or --init, so no warm-up, and no other phase": not phase_plan(args),
    }
    faults |= {f"{path}: no such file": not Path(path).is_file() for path in args.probe}
    for fault, found in faults.items():
        if found:
            parser.error(fault)


# ---- one training step -------------------------------------------------------------------------


def draw_pairs(split, count, rng):
    """`count` different images of a split, and one caption of each: (P,) indices of captions."""
    images = torch.randperm(len(split.images), generator=rng)[:count]
    first = torch.searchsorted(split.image_of_caption, images)
    end = torch.searchsorted(split.image_of_caption, images, right=True)
    return first + (torch.rand(len(images), generator=rng) * (end - first)).long()


def make_batch(data, split, captions, B, device, rng, maskings, probability):
    """Tensors of P pairs, their captions given by index; the first B of them are the anchors. All
    is drawn on the CPU, so that no size need be asked of a GPU. Returns a dict of tensors on the
    device: input_ids (P, T), true_captions (P, C, T') of each image, features (P, R, F),
    boxes (P, R, 7), region_mask (P, R); of the anchors masked (B, M, T), places (q,) of the masked
    words in it, flat, targets (q,), the words there; and labels (B, M, T), on the CPU, the same."""
    images = data.splits[split].image_of_caption[captions]
    input_ids = data.text(split, captions)
    phrases = data.phrases(split, captions[:B])
    originals = input_ids[:B, : phrases.size(2)]
    tokenizer = data.tokenizer
    masked, labels = generate.mask_phrases(
        originals, phrases, tokenizer.mask_id, tokenizer.word_range, maskings, probability, rng
    )
    places = (labels.flatten() >= 0).nonzero()[:, 0]  # (q,)
    targets = labels.flatten()[places]
    padding = -len(places) % 128  # since a CPU makes a bfloat16 kernel for each number of words
    features, boxes, region_mask = data.image(split, images)
    batch = {"input_ids": input_ids, "true_captions": data.own_captions(split, images)}
    batch |= {"features": features, "boxes": boxes, "region_mask": region_mask, "masked": masked}
    batch["places"] = F.pad(places, (0, padding))
    batch["targets"] = F.pad(targets, (0, padding), value=-1)
    batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
    return batch | {"labels": labels}


def draw_wrong_partners(model, texts, images, batch, count, rng):
    """For each pair another one's image and caption, to tell from its own: among the `count` pairs
    behind (images) or before (captions) it, the likelier the higher they score, as in ALBEF.
    Returns wrong_images, wrong_texts and wrong_valid (B,), False where they are true."""
    B = len(batch["masked"])
    ids = batch["input_ids"][:B]  # (B, T)
    true = batch["true_captions"][:B]
    row = torch.arange(B, device=ids.device)
    step = torch.arange(1, max(min(count, B - 1), 1) + 1, device=ids.device)  # (K,)
    behind = (row[:, None] + step) % B  # (B, K)
    before = (row[:, None] - step) % B
    K = len(step)
    # Caption b with the image k steps behind it; so image b with the caption k steps before it.
    scores = model.score_pairs(texts, row.repeat_interleave(K), images, behind.flatten()).view(B, K)
    false_texts = ~generate.is_true(ids[before], true)  # (B, K)
    false_images = false_texts[behind, step - 1]
    image = draw_by_score(scores, false_images, rng)
    text = draw_by_score(scores[before, step - 1], false_texts, rng)
    return {
        "wrong_images": behind.gather(1, image)[:, 0],
        "wrong_texts": before.gather(1, text)[:, 0],
        "wrong_valid": false_images.any(1) & false_texts.any(1),
    }


def draw_by_score(scores, valid, rng):
    """One column of each row, drawn from the softmax of the valid scores: (B, K) -> (B, 1)."""
    # The largest score plus Gumbel noise is such a draw, and a GPU makes it without a halt.
    noise = torch.empty_like(scores, dtype=torch.float32).exponential_(generator=rng).log()
    return (scores - noise).masked_fill(~valid, float("-inf")).argmax(1, keepdim=True)


def retrieve_negatives(model, texts, images, batch, hard, score_batch):
    """The H hardest images of the pool for each anchor caption, and captions for each anchor image
    (section 3.2), none of which is true: (index, valid) twice, (B, H) each."""
    ids = batch["input_ids"]
    true = batch["true_captions"]
    P = len(ids)
    B = len(batch["masked"])
    anchors = torch.arange(B, device=ids.device)
    pool = torch.arange(P, device=ids.device)
    # Every anchor caption with every image, then the other captions with the anchor images.
    text_index = torch.cat((anchors.repeat_interleave(P), pool[B:].repeat_interleave(B)))
    image_index = torch.cat((pool.repeat(B), anchors.repeat(P - B)))
    scores = model.score_pairs(texts, text_index, images, image_index, score_batch)
    image_scores = scores[: B * P].view(B, P)
    text_scores = torch.cat((image_scores[:, :B], scores[B * P :].view(P - B, B))).T  # (B, P)

    false_images = ~generate.is_true(ids[:B].expand(P, B, -1), true).T  # (B, P)
    false_texts = ~generate.is_true(ids.expand(B, P, -1), true[:B])  # (B, P)
    hard_images = generate.select_hardest(image_scores, false_images, min(hard, P))
    hard_texts = generate.select_hardest(text_scores, false_texts, min(hard, P))
    return hard_images, hard_texts


def heads_over(model, images, pad_id):
    """The fill and match that generate.py asks for: heads of the model over prepared images."""

    def fill(ids, image_index, places):  # (n, T), (n,), (q,) -> (q, V)
        texts = model.prepare_text(ids, ids != pad_id)
        row = torch.arange(len(ids), device=ids.device)
        return model.fill(model.encode_places(texts, row, images, image_index, places))

    def match(ids, image_index):  # (n, T), (n,) -> (n,)
        texts = model.prepare_text(ids, ids != pad_id)
        row = torch.arange(len(ids), device=ids.device)
        return model.score_pairs(texts, row, images, image_index)

    return fill, match


def write_negatives(model, images, writer, batch, tokenizer, args, rng, device_rng):
    """`generate.tailor_negatives` for the anchors (section 3.3). writer: refills for the model."""
    B, M, T = batch["masked"].shape
    fill, match = heads_over(model, images, tokenizer.pad_id)
    if writer is not None:
        regions = writer.prepare_regions(batch["features"], batch["boxes"], batch["region_mask"])
        fill, _ = heads_over(writer, regions, tokenizer.pad_id)
    writer_images = None  # each masked caption with its own picture, as in the paper
    if args.writer_sees == "other":
        writer_images = generate.other_images(B, M, rng)
    settings = ("refills", "hard", "temperature", "truth_threshold")
    return generate.tailor_negatives(
        fill,
        match,
        batch["input_ids"][:B, :T],
        None,
        batch["true_captions"][:B],
        mask_id=tokenizer.mask_id,
        vocabulary_range=tokenizer.word_range,
        pad_id=tokenizer.pad_id,
        **{name: vars(args)[name] for name in settings},
        masks=(batch["masked"], batch["labels"]),
        writer_images=writer_images,
        chunk_size=args.score_batch,
        generator=device_rng,
    )


def training_step(objective, data, args, weights, rng, device_rng, device, writer=None):
    """One TAGS-DC step without the optimiser: draw, retrieve, tailor, and the weighted losses.
    weights: {term: weight}; without "hard" (in the warm-up) a batch is drawn. rng draws on
    the CPU, device_rng on the device. writer: refills, if it is not the network that learns.
    Returns the loss, a scalar with gradient, and {name: scalar}, terms and diagnostics, without."""
    model = getattr(objective, "module", objective).model
    shape = (args.pool, args.batch_size, args.maskings, args.mask_probability)
    if "hard" not in weights:
        shape = (args.warmup_batch_size, args.warmup_batch_size, 1, args.warmup_mask_probability)
    pool, B, maskings, probability = shape
    if "itc" in weights:
        pool = max(args.contrast_pool, B)
    # A pool of pairs, the first of which are the anchors that the step learns from.
    captions = draw_pairs(data.splits["train"], pool, rng)
    B = min(B, len(captions))
    batch = make_batch(data, "train", captions, B, device, rng, maskings, probability)
    # Without gradient and without dropout: which images, captions and written sentences are hard.
    retrieved = None
    written = None
    tokenizer = data.tokenizer
    with evaluate.inference(model, device, args.dtype):
        if weights.keys() & {"itm", "hard"}:
            ids = batch["input_ids"]
            texts = model.prepare_text(ids, ids != tokenizer.pad_id)
            images = model.prepare_regions(batch["features"], batch["boxes"], batch["region_mask"])
        if "itm" in weights:
            count = args.wrong_partners
            batch |= draw_wrong_partners(model, texts, images, batch, count, device_rng)
        if "hard" in weights:
            count = args.retrieved
            retrieved = retrieve_negatives(model, texts, images, batch, count, args.score_batch)
            if weights.keys() - {"hard", "mlm"}:  # terms that learn from written sentences
                draws = (rng, device_rng)
                written = write_negatives(model, images, writer, batch, tokenizer, args, *draws)
    # With gradient: only the true pairs and what was found hard is encoded again.
    with autocast(device, args.dtype):
        terms, seen = objective(batch, weights, retrieved, written)
    loss = sum(weight * terms[name] for name, weight in weights.items())
    values = {"loss": loss} | terms | seen
    return loss, {name: value.detach() for name, value in values.items()}


# ---- the run -----------------------------------------------------------------------------------


class Signals:
    """SIGINT and SIGTERM raise KeyboardInterrupt(number) where they come, also where a shell had
    SIGINT ignored. While `holding` the first one is only noted (see Trainer.held)."""

    def __init__(self):
        self.noted = 0  # number of the signal that came while held
        self.holding = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.handle)

    def handle(self, number, _):
        if not self.holding or self.noted:
            raise KeyboardInterrupt(number)
        self.noted = number


FORMAT = 2  # of our checkpoints
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


def phase_plan(args):
    """[(phase, steps, {term: weight above 0}, peak learning rate)]; in the warm-up mlm weighs 1."""
    shares = {name: float(share) for name, share in (phase.split("=") for phase in args.phases)}
    if args.init:
        shares.pop("warmup", None)
    plan = []
    for phase, rate in PHASES.items():
        lambdas = {term: vars(args)[f"lambda_{term}"] for term in TERMS if phase in TERMS[term][0]}
        if phase == "warmup":
            lambdas["mlm"] = 1.0
        weights = {term: weight for term, weight in lambdas.items() if weight > 0}
        steps = round(args.steps * shares.get(phase, 0) / max(sum(shares.values()), 1e-9))
        if steps > 0:
            plan.append((phase, steps, weights, vars(args)[rate]))
    return plan


class Trainer:
    """A training run: the model, where it stands, and all that its checkpoints hold. Each phase
    begins with a fresh optimiser and the best weights of the one before (best.pt); last.pt is where
    --resume goes on. Of several processes (torchrun) each draws its own batches and pools."""

    def __init__(self, args, data, model, device, signals):
        self.args = args
        self.data = data
        self.model = model
        self.device = device
        self.signals = signals
        self.out = Path(args.out)
        self.plan = phase_plan(args)
        pad_id = data.tokenizer.pad_id
        self.objective = losses.Objective(model, pad_id, args.margin, args.original_weight)
        if WORLD_SIZE > 1:  # a phase without a term leaves its head without gradient
            self.objective = DistributedDataParallel(self.objective, find_unused_parameters=True)
        # What draws batches, what draws words on the device, what draws dropout.
        self.rng = torch.Generator().manual_seed(args.seed + RANK)
        self.device_rng = torch.Generator(device).manual_seed(args.seed + RANK)
        self.generators = [self.rng, self.device_rng, torch.default_generator]
        if device.startswith("cuda"):
            self.generators.append(torch.cuda.default_generators[torch.cuda.current_device()])
        self.progress = argparse.Namespace(  # where the run stands, as its checkpoints say
            phase=0,  # number in the plan
            step=0,  # done in this phase
            validation_due=False,  # of the step just done
            best={},  # metrics of the phase's best validation
            warmup=None,  # what the test report after the warm-up said
            log=[],  # rows of log.csv
            seconds=0.0,  # of training, validations and reports
        )
        self.at_line = True  # a line of the log, and with it a checkpoint, is due
        self.history = {}  # {name: [scalars]} of the steps since the last row of the log
        self.skipped_in_a_row = torch.zeros((), device=device)
        self.warn = functools.cache(lambda text: say(f"warning: {text}"))  # once
        self.started = time.time()  # of the steps since the last checkpoint
        self.writer = None  # another network than the model, if it is frozen
        self.begin_phase()

    def begin_phase(self):
        """AdamW anew, fused where torch 2.4 can; no weight decay on biases and LayerNorm."""
        parameters = list(self.model.parameters())
        decayed = {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.01}
        others = {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0}
        fused = self.device != "mps"
        self.optimizer = torch.optim.AdamW([decayed, others], betas=(0.9, 0.98), fused=fused)
        phase = self.plan[self.progress.phase][0]
        if self.args.frozen_writer and self.writer is None and phase != "warmup":
            self.writer = copy.deepcopy(self.model).eval()

    def train(self):
        """What is left of the plan: steps, validations, and at the end of a phase the next one."""
        if not self.progress.log:
            self.save("last.pt")
        self.model.train()
        while self.progress.phase < len(self.plan):
            phase, steps, weights, peak = self.plan[self.progress.phase]
            if self.progress.validation_due:
                self.validate(phase)
            elif self.progress.step < steps:
                self.step(phase, steps, weights, peak)
            else:
                self.end_phase(phase)

    @contextlib.contextmanager
    def held(self):
        """What is done inside is not left half done: a signal waits until last.pt holds it. Several
        processes stop after the same step; so they ask each other, at lines of the log alone."""
        self.signals.holding = True
        yield
        if self.at_line and WORLD_SIZE > 1:
            noted = torch.tensor(self.signals.noted, device=self.device)
            dist.all_reduce(noted, dist.ReduceOp.MAX)
            self.signals.noted = noted.item()
        may_stop = self.at_line or WORLD_SIZE == 1
        if self.at_line or (may_stop and self.signals.noted):
            self.save("last.pt")
        self.signals.holding = False
        if may_stop and self.signals.noted:
            raise KeyboardInterrupt(self.signals.noted)

    def step(self, phase, steps, weights, peak):
        """The next step of a phase, with its line of the log."""
        progress = self.progress
        # The warm-up has two parts, without matching and with it, each with its own rise
        # (a tenth of the steps) and fall of the learning rate.
        words_alone = round(self.args.words_first * steps) if phase == "warmup" else 0
        step = progress.step
        length = words_alone
        if step < words_alone:
            weights = {term: weight for term, weight in weights.items() if term != "itm"}
        else:
            step -= words_alone
            length = steps - words_alone
        lr = peak * min((step + 1) / max(0.1 * length, 1), (length - step) / max(0.9 * length, 1))
        with self.held():
            self.optimise(weights, lr)
            progress.step += 1
            self.at_line = progress.step % self.args.log_every == 0 or progress.step == steps
            if self.at_line:
                self.report(phase, lr)
                # --validations times a phase, but not before its new heads have learnt.
                learnt = {"warmup": words_alone, "tags": 0, "dc": 0.5 * steps}[phase]
                lines = max(1, steps // self.args.log_every // self.args.validations)
                due = progress.step > learnt and progress.step % (lines * self.args.log_every) == 0
                progress.validation_due = due or progress.step == steps

    def optimise(self, weights, lr):
        """One step of the optimiser; what it saw goes into the history."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        draws = (self.rng, self.device_rng, self.device, self.writer)
        for _ in range(self.args.accumulate):
            loss, seen = training_step(self.objective, self.data, self.args, weights, *draws)
            (loss / self.args.accumulate).backward()
            for name, value in seen.items():
                self.history.setdefault(name, []).append(value)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 2.0)
        # Where found_inf is 1 the fused AdamW changes nothing: a skip without asking a GPU.
        skipped = (~norm.isfinite()).float()
        self.optimizer.found_inf = skipped
        if self.device != "mps" or not skipped:
            self.optimizer.step()
        self.history.setdefault("skipped", []).append(skipped)
        self.skipped_in_a_row = (self.skipped_in_a_row + 1) * skipped

    def validate(self, phase):
        """Recall on val; the best weights of the phase are kept."""
        args = self.args
        split = "val" if "val" in self.data.splits else "train"
        scores, owner = scores_of(self.model, self.data, split, args, self.device, args.val_images)
        metrics = evaluate.retrieval_metrics(scores, owner)
        say(f"  validation: RSum {metrics['rsum']:.1f}")
        with self.held():
            if phase == "warmup":  # as in the release, correction begins as the masked LM
                self.model.correction.load_state_dict(self.model.mlm.state_dict())
            for name in ("rsum", "tr_r1", "ir_r1"):
                self.progress.log[-1][f"val_{name}"] = round(metrics[name], 2)
            self.progress.validation_due = False
            if metrics["rsum"] > self.progress.best.get("rsum", -1):
                self.progress.best = metrics
                self.save("best.pt")

    def end_phase(self, phase):
        """The phase's best weights go on, not its last."""
        self.model.load_state_dict(load_checkpoint(self.out / "best.pt")["model"])
        if phase == "warmup":
            self.progress.warmup, _, _ = test_report(self.model, self.data, self.args, self.device)
        with self.held():
            self.progress.phase += 1
            self.progress.step = 0
            if self.progress.phase < len(self.plan):
                self.progress.best = {}
                self.begin_phase()

    def report(self, phase, lr):
        """A row of the log and a line on the screen: means over the steps since the last one."""
        if self.skipped_in_a_row.item() >= 20:
            faulty = [name for name, values in self.history.items() if not values[-1].isfinite()]
            raise InputError(
                f"no finite gradient in 20 steps up to step {self.progress.step} of {phase} (not"
                f" finite: {', '.join(faulty)}): lower the learning rate; last.pt is from before"
            )
        means = {}
        for name, values in self.history.items():
            values = torch.stack(values).float()
            means[name] = values[values.isfinite()].mean().item()  # nan where none is
        skipped = torch.stack(self.history["skipped"])
        means["skipped"] = int(skipped.sum())
        if abs(means.get("positive", 1.0) - means.get("retrieved", 0.0)) < 1e-3:
            self.warn("true pairs and negatives score alike: lower --lr or lengthen the warm-up")
        if means.get("kept", 1.0) < 0.01:
            self.warn("hardly any text is usable as a negative: raise --maskings or --temperature")
        self.history = {}
        planned = [steps for _, steps, _, _ in self.plan]
        done = sum(planned[: self.progress.phase]) + self.progress.step
        row = {name: round(mean, 5) for name, mean in means.items()}
        self.progress.log.append({"phase": phase, "step": done, "lr": lr} | row)
        # The first process alone speaks, of its own batches.
        pace = (time.time() - self.started) / len(skipped)  # seconds a step
        if "hard" in means:
            written = self.args.maskings * self.args.refills if "kept" in means else 0
            anchors = self.args.batch_size * self.args.accumulate * WORLD_SIZE
            means["negatives/s"] = anchors * (2 * self.args.pool + written) / pace
        shown = [f"{name} {mean:.4g}" for name, mean in means.items()]
        eta = f"ETA {pace * (sum(planned) - done) / 60:.1f} min"
        say("  ".join([f"{phase} {done}/{sum(planned)}", *shown, eta]))

    def save(self, name):
        """Writes everything that --resume, --eval and --init need, and the log beside it."""
        self.progress.seconds += time.time() - self.started
        self.started = time.time()
        state = {"format": FORMAT, "arguments": saved_arguments(self.args)}
        state |= {"config": vars(self.model.config), "tokens": self.data.tokenizer.tokens}
        state |= {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        state |= {"writer": self.writer.state_dict() if self.writer else None}
        state |= {"progress": vars(self.progress), "skipped_in_a_row": self.skipped_in_a_row}
        state["history"] = {name: torch.stack(values) for name, values in self.history.items()}
        state["rng"] = [[generator.get_state() for generator in self.generators]] * WORLD_SIZE
        if WORLD_SIZE > 1:  # all come by here, so best.pt is whole before anyone reads it
            dist.all_gather_object(state["rng"], state["rng"][RANK])
        rows = self.progress.log
        names = list(dict.fromkeys(key for row in rows for key in row))
        lines = [",".join(str(row.get(key, "")) for key in names) for row in rows]
        write_text(self.out / "log.csv", "\n".join([",".join(names), *lines]) + "\n")
        if RANK == 0:
            with datasets.one_line_errors(self.out / name, "is there space on the disk?"):
                datasets.write_atomically(self.out / name, lambda part: torch.save(state, part))

    def resume(self, state):
        """Takes up where a checkpoint stands, to the same result as without the break."""
        self.progress = argparse.Namespace(**state["progress"])
        self.model.load_state_dict(state["model"])
        if self.progress.phase == len(self.plan):
            return  # only the report is left
        self.begin_phase()
        self.optimizer.load_state_dict(state["optimizer"])
        if self.writer:
            self.writer.load_state_dict(state["writer"])
        for name, values in state["history"].items():
            self.history[name] = list(values.to(self.device).unbind())
        self.skipped_in_a_row = state["skipped_in_a_row"].to(self.device)
        saved = state["rng"][RANK] if RANK < len(state["rng"]) else []
        sizes = [len(generator.get_state()) for generator in self.generators]
        if sizes == [len(values) for values in saved]:  # else they begin afresh, on other devices
            for generator, values in zip(self.generators, saved):
                generator.set_state(values)


# ---- evaluation, search: see evaluate.py for what they call -------------------------------------


def scoring(args, device):
    """What every function of evaluate.py that runs the network is told."""
    return {"device": device, "dtype": args.dtype, "score_batch": args.score_batch}


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
    with evaluate.inference(model, device, args.dtype):
        prepared = model.prepare_regions(batch["features"], batch["boxes"], batch["region_mask"])
        made = write_negatives(model, prepared, None, batch, data.tokenizer, args, rng, device_rng)
    originals = batch["input_ids"][:, : made.sentences.size(2)]
    examples = {"captions": captions, "images": images, "originals": originals.cpu()}
    return examples | {"sentences": made.sentences.cpu(), "valid": made.valid.cpu()}


def test_report(model, data, args, device):
    """Everything measured on the test split -> metrics, scores (C, I), generated examples."""
    split = final_split(data)
    scores, _ = scores_of(model, data, split, args, device)
    examples = tailored_examples(model, data, split, args, device, args.analyse_images)
    options = scoring(args, device)
    metrics = evaluate.report(model, data, split, scores, examples, args.seed, **options)
    return metrics, scores, examples


def finish(args, data, model, device, progress):
    """Evaluates on the test split: a table, metrics.json, pictures. progress: a Trainer's."""
    out = Path(args.out)
    split = final_split(data)
    content = data.splits[split]
    options = scoring(args, device)
    metrics, scores, examples = test_report(model, data, args, device)
    if RANK > 0:
        return
    if args.probe or args.root:
        published = script("probes.py")["published_metrics"]
        metrics |= published(args.probe, args.root, model, data, split, scores, **options)
    say(f"{split} split: {len(content.images):,} images, {len(content.captions):,} captions")
    say("\n".join(evaluate.table(metrics, progress["warmup"] or {})))
    if args.save_scores:
        np.save(out / "scores.npy", scores.numpy())
    evaluate.draw_negatives(out / "negatives.png", model, data, split, scores, examples, **options)
    if not args.eval:
        record = {"test": metrics, "val": progress["best"], "warmup": progress["warmup"]}
        record |= {"arguments": saved_arguments(args), "seconds": round(progress["seconds"], 1)}
        record["seed"] = args.seed
        record["versions"] = {"python": sys.version.split()[0], "torch": torch.__version__}
        write_text(out / "metrics.json", json.dumps(record, indent=1))
    say(f"in {out}: " + ", ".join(sorted(path.name for path in out.iterdir() if path.is_file())))


def saved_arguments(args):
    """The arguments as JSON and checkpoints can hold them."""
    return vars(args) | {"dtype": str(args.dtype).removeprefix("torch.")}


def choose_hardware(args):
    """(device, dtype) that --device and --dtype come to on this machine."""
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    device = next(name for name in has if has[name]) if args.device == "auto" else args.device
    if not has[device]:
        raise InputError(f"--device {device}: no such device here; use --device cpu")
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
    return device, fast_dtype(device) if args.dtype == "auto" else getattr(torch, args.dtype)


def make_model(args, data, source, state):
    """The network: as the file `source` holds it, ours or official weights; None: a fresh one."""
    sizes = {"vocab_size": len(data.tokenizer.tokens), "feature_size": data.regions.feature_size}
    if source is None:
        sizes |= {"similarity": args.lambda_itc > 0, "dropout": args.dropout}
        return TagsDC(Config.preset(args.size, **sizes))
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


def train(args, device, signals):
    """A training run from its first step or, with --resume, from its last checkpoint."""
    last = Path(args.out) / "last.pt"
    goes_on = args.resume and last.exists()
    source = last if goes_on else args.init
    state = load_checkpoint(source, official=not goes_on) if source else {}
    if RANK == 0 and not goes_on:
        last.unlink(missing_ok=True)  # of an earlier run, which is not to be gone on with
        write_text(last.with_name("run.json"), json.dumps({"arguments": saved_arguments(args)}))
    data, model = load_all(args, source, state, device)
    if "train" not in data.splits:
        raise InputError(f"{args.data}: no captions of the train split to learn from")
    model.recompute = args.recompute
    trainer = Trainer(args, data, model, device, signals)
    if goes_on:
        trainer.resume(state)
    trainer.train()
    finish(args, data, model, device, vars(trainer.progress))


def script(name):
    """The functions of a file in tests/: {name: function}."""
    return runpy.run_path(str(Path(__file__).parent / "tests" / name))


def run(args, signals):
    """Trains, evaluates, searches or compares."""
    if args.study:  # which runs this command many times
        return script("study.py")["study"](args)
    device, args.dtype = choose_hardware(args)
    if WORLD_SIZE > 1:
        waiting = 8 * dist.constants.default_pg_timeout
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=waiting)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed + RANK)
    if not (args.eval or args.checkpoint):
        with only_run_in(out) if RANK == 0 else contextlib.nullcontext():
            return train(args, device, signals)
    source = args.eval or args.checkpoint
    state = load_checkpoint(source)
    data, model = load_all(args, source, state, device)
    if args.eval:
        return finish(args, data, model, device, state["progress"])
    asked = (final_split(data), args.query, args.image, out / "search.png")
    for score, text in evaluate.search(model, data, *asked, **scoring(args, device)):
        say(f"{score:.4f}  {text}")
    say(f"drawn as {out}/search.png")


def main(argv=None):
    """The command; returns its exit code."""
    signals = Signals()
    try:
        run(parse_arguments(argv), signals)
        return 0
    except KeyboardInterrupt as stop:
        print("interrupted; what is saved stays whole, --resume goes on", file=sys.stderr)
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
