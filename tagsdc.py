"""TAGS-DC from one command: train, evaluate, search, study (see README.md).

Reading order: training_step, Trainer.train_phase, run; the options come first because every
default stands there, and only there.

Letters: B anchor pairs of a step, P pairs in its retrieval pool (the anchors first), T text
positions, R regions, M maskings, K refills, H kept negatives, C captions of an image, q masked
words of all anchors. Every mask: True = real / usable.
"""

import argparse
import contextlib
import copy
import csv
import json
import math
import os
import platform
import re
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
from model import PRESETS, Config, TagsDC, autocast, fast_dtype

# ---- options -----------------------------------------------------------------------------------

OPTIONS = {  # group: (name, default, help); the defaults fit the embedded scenes on a CPU
    "what to do": [
        ("eval", None, "evaluate this checkpoint instead of training"),
        ("checkpoint", None, "checkpoint for --query and --image"),
        ("query", None, "find the test images that a sentence describes best"),
        ("image", None, "find the test captions that describe an image best"),
        ("probe", [], "fine-grained tests: SugarCrepe, RoCOCO or VALSE FOIL files"),
        ("resume", False, "go on with the interrupted run in --out"),
        ("quick", False, "everything in miniature, to see that it works"),
    ],
    "data": [
        ("data", "scenes", "scenes, coco, flickr30k, flickr8k, or a JSON of Karpathy's form"),
        ("root", None, "folder of the captions and region features"),
        ("features", None, "file or folder of the region features, if not under --root"),
        ("phrases", None, "JSON with the phrases of the captions, instead of the parser"),
        ("skip-bad", False, "leave out unusable images and captions, and count them"),
        ("scenes", [5000, 500, 500], "images in train, val and test of the embedded world"),
    ],
    "model": [
        ("size", "tiny", "of the network (paper: base, large)"),
        ("init", None, "start from our checkpoint or official UNITER weights, without warm-up"),
        ("heads", 0, "attention heads of --init weights; 0: they are 64 wide"),
        ("dropout", 0.0, "paper: 0.1"),
    ],
    "training": [
        ("recipe", None, "a schedule of the official release, in place of these defaults"),
        ("steps", 3500, "optimiser steps in all; the phases share them"),
        ("phases", ["warmup=5", "tags=1.5", "dc=0.5"], "phases and their shares of --steps"),
        ("batch-size", 16, "anchor pairs a step (paper: 32 on each of 8 GPUs)"),
        ("warmup-batch-size", 32, "pairs a step of the warm-up"),
        ("wrong-partners", 7, "pairs among which the warm-up draws a hard wrong one"),
        ("words-first", 0.8, "share of the warm-up that learns words (MLM) alone"),
        ("mask-probability", 0.15, "of a phrase, for the negatives"),
        ("warmup-mask-probability", 0.3, "of a phrase, in the warm-up"),
        ("accumulate", 1, "batches whose gradients make one optimiser step"),
        ("recompute", False, "recompute activations: less memory, a third more work"),
        ("warmup-lr", 1e-3, "peak learning rate of the warm-up"),
        ("lr", 6e-4, "peak learning rate of the tags phase (paper: 5e-5)"),
        ("dc-lr", 2e-4, "peak learning rate of the dc phase (paper: 1e-5)"),
    ],
    "negatives": [
        ("pool", 32, "pairs among which hard negatives are retrieved (paper: 399)"),
        ("hard", 4, "negatives kept of each kind (paper: 31)"),
        ("maskings", 4, "maskings of each caption (paper: 20)"),
        ("refills", 4, "refills of each masking (paper: 20)"),
        ("temperature", 1.0, "of the refilling (paper: 1.5)"),
        ("writer-sees", "other", "own picture (the paper) or another one of the batch"),
        ("truth-threshold", 0.1, "likelier words are taken for true, not refilled (paper: 1, off)"),
        ("frozen-writer", False, "the writer keeps the weights that the tags phase begins with"),
    ],
    "objective": [
        ("margin", 0.2, "of the triplet losses"),
        ("lambda-tags", 0.3, "weight of the synthetic triplet loss (paper: 5e-5 to 1e-3)"),
        ("lambda-mlm", 0.2, "weight of masked LM (paper: 0.01 to 0.1)"),
        ("lambda-wod", 0.2, "weight of word discrimination (paper: 5e-4)"),
        ("lambda-woc", 0.05, "weight of word correction (paper: 5e-4)"),
        ("original-weight", 0.11, "of original words in word discrimination"),
    ],
    "run": [
        ("out", None, "run directory (default: runs/ and the name of the data)"),
        ("seed", 0, "of everything random"),
        ("device", "auto", "where to compute"),
        ("dtype", "auto", "float32, bfloat16 (autocast) or auto: what the hardware does fast"),
        ("log-every", 50, "steps between two lines of the log; --resume goes on from the last"),
        ("validations", 4, "validations in a phase"),
        ("val-images", 100, "images of val that a validation looks at"),
        ("analyse-images", 200, "test images whose generated negatives are analysed"),
        ("score-batch", 128, "pairs in one pass without gradient (a GPU likes 2048)"),
        ("save-scores", False, "keep the test score matrix as scores.npy"),
    ],
}
DEFAULTS = {
    name.replace("-", "_"): default for group in OPTIONS.values() for name, default, _ in group
}

# The schedules of the official release: one stage each, over what all of them share.
RELEASE = dict(
    batch_size=32,
    pool=399,
    hard=31,
    maskings=20,
    refills=20,
    temperature=1.5,
    writer_sees="own",
    truth_threshold=1.0,
    dropout=0.1,
    lambda_wod=5e-4,
    lambda_woc=5e-4,
    score_batch=2048,
    recompute=True,
)
STAGE_1 = dict(RELEASE, phases=["tags=1"], steps=5000, lr=5e-5)
STAGE_2 = dict(RELEASE, phases=["dc=1"], steps=5000, dc_lr=1e-5)
BASE_1 = dict(STAGE_1, size="base")
BASE_2 = dict(STAGE_2, size="base")
LARGE_1 = dict(STAGE_1, size="large", lambda_tags=1e-3, lambda_mlm=0.05, hard=23)
LARGE_2 = dict(STAGE_2, size="large", lambda_tags=1e-3, lambda_mlm=0.05)
RECIPES = {
    "coco-base-1": dict(BASE_1, lambda_tags=5e-5, lambda_mlm=0.01),
    "coco-base-2": dict(BASE_2, lambda_tags=1e-4, lambda_mlm=0.05, steps=1500),
    "coco-large-1": dict(LARGE_1, lr=4e-5),
    "coco-large-2": LARGE_2,
    "flickr-base-1": dict(
        BASE_1, lambda_tags=5e-4, lambda_mlm=0.05, temperature=2.0, batch_size=16
    ),
    "flickr-base-2": dict(BASE_2, lambda_tags=5e-4, lambda_mlm=0.1),
    "flickr-large-1": LARGE_1,
    "flickr-large-2": dict(LARGE_2, hard=23, steps=1500),
}
QUICK = dict(
    scenes=[400, 50, 50],
    steps=120,
    phases=["warmup=2", "tags=1", "dc=1"],
    warmup_batch_size=16,
    analyse_images=30,
    log_every=20,
)
CHOICES = {
    "size": PRESETS,
    "recipe": RECIPES,
    "writer-sees": ("own", "other"),
    "device": ("auto", "cpu", "cuda", "mps"),
    "dtype": ("auto", "float32", "bfloat16"),
}

# What a call says of itself; everything else belongs to the run and comes back with it.
OF_THIS_CALL = ("eval", "checkpoint", "query", "image", "resume", "out")
# What may be another in an evaluation, or when an interrupted run goes on.
MAY_CHANGE = ("device", "probe", "save_scores", "score_batch", "analyse_images", "steps")


def make_parser():
    """The table of options as an argparse parser that returns only what was given.

    The type of an option is that of its default: a bool is a switch, a list takes several values,
    None is a text that may be missing.
    """
    parser = argparse.ArgumentParser(
        prog="tagsdc.py",
        description="TAGS-DC: image-text retrieval with tailored synthetic negatives.",
        argument_default=argparse.SUPPRESS,
    )
    for title, options in OPTIONS.items():
        group = parser.add_argument_group(title)
        for name, default, text in options:
            if default is None or default == []:
                help_text = text
            else:
                help_text = f"{text} (default: {default})"
            if isinstance(default, bool):
                switch = argparse.BooleanOptionalAction
                group.add_argument(f"--{name}", action=switch, help=help_text)
            elif isinstance(default, list):
                kind = type(default[0]) if default else str
                group.add_argument(f"--{name}", nargs="+", type=kind, help=help_text)
            else:
                kind = str if default is None else type(default)
                choices = CHOICES.get(name)
                group.add_argument(f"--{name}", type=kind, choices=choices, help=help_text)
    return parser


def parse_arguments(argv=None):
    """The command line, laid over the recipe, --quick, or what a checkpoint was trained with."""
    parser = make_parser()
    given = vars(parser.parse_args(argv))
    values = DEFAULTS | RECIPES.get(given.get("recipe"), {})
    if given.get("quick"):
        values |= QUICK
    name = Path(given.get("data", "scenes")).stem.removeprefix("dataset_")
    values["out"] = f"runs/{name}"
    source = given.get("eval") or given.get("checkpoint")
    if given.get("resume"):
        values |= resumed_arguments(parser, given, Path(given.get("out", values["out"])))
    elif source:
        values |= checkpoint_arguments(given, Path(source))
    args = argparse.Namespace(**values | given)
    check_arguments(parser, args)
    return args


def checkpoint_arguments(given, path):
    """The arguments that a checkpoint was trained with, as far as they are not of one call.

    Another data set leaves behind where the old one lay. Pictures go beside the checkpoint,
    unless nothing can be written there.
    """
    values = own_arguments(load_checkpoint(path, own=True)["arguments"])
    forgotten = ["device", "probe", "save_scores"]
    if "data" in given:
        forgotten += ["root", "features", "phrases", "skip_bad"]
    for name in forgotten:
        values.pop(name, None)
    if os.access(path.parent, os.W_OK):
        values["out"] = str(path.parent)
    return values


def resumed_arguments(parser, given, out):
    """The arguments that the run in `out` began with; an option that would change it is refused."""
    saved = own_arguments(datasets.read_json(out / "run.json")["arguments"])
    for name, value in given.items():
        if value != saved.get(name, value) and name not in MAY_CHANGE:
            option = name.replace("_", "-")
            parser.error(
                f"--resume: the run in {out} has --{option} {saved[name]}, not {value}; leave the"
                " option out, or begin a new run in another --out"
            )
    if given.get("steps", math.inf) < saved["steps"]:
        parser.error(f"--resume --steps {given['steps']}: it had {saved['steps']}; give as many")
    return saved


def own_arguments(saved):
    """Saved arguments that this program knows and that are not of one call."""
    return {name: saved[name] for name in saved if name in DEFAULTS and name not in OF_THIS_CALL}


def check_arguments(parser, args):
    """Refuses what cannot work, in one line."""
    check_numbers(parser, args)
    check_files(parser, args)
    for phase in args.phases:
        if not re.fullmatch(rf"({'|'.join(PHASES)})=(?=.*[1-9])\d*\.?\d+", phase):
            names = ", ".join(PHASES)
            parser.error(f"--phases {phase}: NAME=SHARE wanted, a share above 0, of {names}")
    if args.hard > args.maskings * args.refills:
        parser.error(f"--hard {args.hard} exceeds --maskings times --refills, the candidates")
    if args.pool < args.batch_size:
        parser.error(f"--pool {args.pool} is smaller than --batch-size: it holds the anchors")
    if bool(args.query or args.image) != bool(args.checkpoint):
        parser.error("--query or --image and --checkpoint (runs/scenes/best.pt) go together")
    if args.init and not args.resume and not planned_steps(args):
        parser.error("--init goes without a warm-up, and --phases names no other phase")
    if args.heads and not args.init:
        parser.error("--heads goes with --init: the sizes of a new network come from --size")


def check_numbers(parser, args):
    """Every number is finite and in its range."""
    may_be_zero = ("dropout", "heads", "seed", "words_first", "original_weight")
    shares = ("words_first", "mask_probability", "warmup_mask_probability", "truth_threshold")
    for name, value in vars(args).items():
        option = f"--{name.replace('_', '-')} {value}"
        if type(value) not in (int, float):
            continue
        if not math.isfinite(value) or value < 0:
            parser.error(f"{option}: a number of at least 0 is wanted")
        if value == 0 and name not in may_be_zero and not name.startswith("lambda_"):
            parser.error(f"{option}: must be above 0")
        if value > 1 and name in shares:
            parser.error(f"{option}: a share, at most 1, is wanted")
    if args.dropout >= 1:
        parser.error(f"--dropout {args.dropout}: must be below 1")
    if args.seed >= 2**32:
        parser.error(f"--seed {args.seed}: must be below 2 to the power of 32")
    if len(args.scenes) != 3 or min(args.scenes) < 1:
        parser.error(f"--scenes {args.scenes}: images of train, val and test, one each at least")


def check_files(parser, args):
    """Every file that is named is there."""
    init = None if args.resume or args.eval or args.checkpoint else args.init
    for path in (args.phrases, init, *args.probe):
        if path and not Path(path).is_file():
            parser.error(f"{path}: no such file")


# ---- one training step -------------------------------------------------------------------------

# warmup replaces the pre-trained UNITER of the paper, and is left out with --init. tags adds the
# negatives, retrieved and written; dc the two tasks on written sentences, at a smaller rate.
PHASES = {  # the terms of the objective in each phase
    "warmup": ("itm", "mlm"),
    "tags": ("hard", "mlm", "tags"),
    "dc": ("hard", "mlm", "tags", "wod", "woc"),
}
SYNTHETIC = {"tags", "wod", "woc"}  # the terms that need generated negatives


def draw_pairs(split, count, rng):
    """`count` different images of a split, and one caption of each: (P,) indices of captions."""
    images = torch.randperm(len(split.images), generator=rng)[:count]
    first = torch.searchsorted(split.image_of_caption, images)
    end = torch.searchsorted(split.image_of_caption, images, right=True)
    return first + (torch.rand(len(images), generator=rng) * (end - first)).long()


def make_batch(data, split, captions, anchors, device, rng, maskings, probability):
    """Tensors of P pairs, their captions given by index; the first B of them are the anchors.

    All that is random is drawn on the CPU, so that no size need be asked of a GPU.
    Returns a dict of tensors on the device: input_ids (P, T), own (P, C, T') all true captions of
    each image, features (P, R, F), boxes (P, R, 7), region_mask (P, R); of the anchors masked
    (B, M, T), and of their masked words places (q,), flat positions in it, and targets (q,), the
    original words. And labels (B, M, T), which stays on the CPU.
    """
    images = data.splits[split].image_of_caption[captions]
    input_ids = data.text(split, captions)
    phrases = data.phrases(split, captions[:anchors])
    masked, labels = generate.mask_phrases(
        input_ids[:anchors, : phrases.size(2)],
        phrases,
        data.tokenizer.mask_id,
        data.tokenizer.word_range,
        maskings,
        probability,
        rng,
    )
    places = (labels.flatten() >= 0).nonzero()[:, 0]  # (q,)
    targets = labels.flatten()[places]
    # In hundreds, since a CPU makes a bfloat16 kernel anew for each number of words.
    padding = -len(places) % 128
    features, boxes, region_mask = data.image(split, images)
    batch = {
        "input_ids": input_ids,
        "own": data.own_captions(split, images),
        "features": features,
        "boxes": boxes,
        "region_mask": region_mask,
        "masked": masked,
        "places": F.pad(places, (0, padding)),
        "targets": F.pad(targets, (0, padding), value=-1),
    }
    batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
    return batch | {"labels": labels}


def draw_wrong_partners(model, texts, images, batch, count, rng):
    """For each pair of a batch the image and the caption of another pair, for matching.

    They are drawn among the `count` pairs behind (images) and before (captions) it, the likelier
    the higher they score, as ALBEF draws them: random ones teach little but the last noun.
    Returns wrong_images, wrong_texts (B,) and wrong_valid (B,), False where they are true.
    """
    ids = batch["input_ids"]  # (B, T)
    own = batch["own"]  # (B, C, T')
    B = len(ids)
    row = torch.arange(B, device=ids.device)
    step = torch.arange(1, max(min(count, B - 1), 1) + 1, device=ids.device)  # (K,)
    behind = (row[:, None] + step) % B  # (B, K)
    before = (row[:, None] - step) % B
    K = len(step)

    # Caption b with the image k steps behind it; so image b with the caption k steps before it.
    scores = model.score_pairs(texts, row.repeat_interleave(K), images, behind.flatten())
    image_scores = scores.view(B, K)
    text_scores = image_scores[before, step - 1]
    sentences = ids.repeat_interleave(K, 0)[:, None]  # (B * K, 1, T)
    false_images = ~generate.is_true(sentences, own[behind.flatten()]).view(B, K)
    false_texts = ~generate.is_true(ids[before], own)  # (B, K)
    image = draw_by_score(image_scores, false_images, rng)
    text = draw_by_score(text_scores, false_texts, rng)
    return {
        "wrong_images": behind.gather(1, image)[:, 0],
        "wrong_texts": before.gather(1, text)[:, 0],
        "wrong_valid": false_images.any(1) & false_texts.any(1),
    }


def draw_by_score(scores, valid, rng):
    """One column of each row, drawn from the softmax of the valid scores: (B, K) -> (B, 1).

    The largest score plus Gumbel noise is such a draw, and a GPU makes it without a halt."""
    noise = torch.empty_like(scores, dtype=torch.float32).exponential_(generator=rng).log()
    return (scores - noise).masked_fill(~valid, -math.inf).argmax(1, keepdim=True)


def retrieve_negatives(model, texts, images, batch, hard, score_batch):
    """The H hardest images of the pool for each anchor caption, and captions for each anchor
    image (section 3.2): (index, valid) twice, (B, H) each.

    A caption that equals one of an image's own is never its negative, nor the image the caption's.
    """
    ids = batch["input_ids"]
    own = batch["own"]
    P = len(ids)
    B = len(batch["masked"])
    anchors = torch.arange(B, device=ids.device)
    pool = torch.arange(P, device=ids.device)
    rest = pool[B:]

    # Every anchor caption with every image, then the other captions with the anchor images; the
    # anchors meet each other once.
    text_index = torch.cat((anchors.repeat_interleave(P), rest.repeat_interleave(B)))
    image_index = torch.cat((pool.repeat(B), anchors.repeat(P - B)))
    scores = model.score_pairs(texts, text_index, images, image_index, score_batch)
    image_scores = scores[: B * P].view(B, P)
    text_scores = torch.cat((image_scores[:, :B], scores[B * P :].view(P - B, B))).T  # (B, P)

    false_images = ~generate.is_true(ids[:B].expand(P, B, -1), own).T  # (B, P)
    false_texts = ~generate.is_true(ids.expand(B, P, -1), own[:B])  # (B, P)
    hard_images = generate.select_hardest(image_scores, false_images, min(hard, P))
    hard_texts = generate.select_hardest(text_scores, false_texts, min(hard, P))
    return hard_images, hard_texts


def heads_over(model, images, pad_id):
    """The model's masked-LM and matching heads over prepared images: the fill and match that
    generate.py asks for."""

    def fill(ids, image_index, places):  # (n, T), (n,), (q,) -> (q, V)
        texts = model.prepare_text(ids, ids != pad_id)
        row = torch.arange(len(ids), device=ids.device)
        return model.fill(model.encode_places(texts, row, images, image_index, places))

    def match(ids, image_index):  # (n, T), (n,) -> (n,)
        texts = model.prepare_text(ids, ids != pad_id)
        row = torch.arange(len(ids), device=ids.device)
        return model.score_pairs(texts, row, images, image_index)

    return fill, match


def write_negatives(fill, match, batch, tokenizer, args, rng, device_rng):
    """`generate.tailor_negatives` for the anchors of a batch (section 3.3)."""
    B, M, T = batch["masked"].shape
    writer_images = None  # each writer looks at its own picture, as in the paper
    if args.writer_sees == "other":
        writer_images = generate.other_images(B, M, rng).to(batch["masked"].device)
    return generate.tailor_negatives(
        fill,
        match,
        batch["input_ids"][:B, :T],
        None,
        batch["own"][:B],
        mask_id=tokenizer.mask_id,
        vocabulary_range=tokenizer.word_range,
        pad_id=tokenizer.pad_id,
        refills=args.refills,
        hard=args.hard,
        temperature=args.temperature,
        truth_threshold=args.truth_threshold,
        masks=(batch["masked"], batch["labels"]),
        writer_images=writer_images,
        chunk_size=args.score_batch,
        generator=device_rng,
    )


def training_step(objective, data, args, weights, rng, device_rng, device, writer=None):
    """One TAGS-DC step without the optimiser: draw, retrieve, tailor, and the weighted losses.

    weights: {term: weight}. A phase without hard negatives (the warm-up) draws a plain batch.
    rng draws pairs and masks on the CPU, device_rng refills words on the device. writer: the
    network that refills, if it is not the one that learns.
    Returns the loss, a scalar with gradient, and {name: scalar} of terms and diagnostics without.
    """
    model = getattr(objective, "module", objective).model
    if "hard" in weights:
        shape = (args.pool, args.batch_size, args.maskings, args.mask_probability)
    else:
        B = args.warmup_batch_size
        shape = (B, B, 1, args.warmup_mask_probability)
    pool, anchors, maskings, probability = shape
    # A pool of pairs, the first of which are the anchors that the step learns from.
    captions = draw_pairs(data.splits["train"], pool, rng)
    anchors = min(anchors, len(captions))
    batch = make_batch(data, "train", captions, anchors, device, rng, maskings, probability)

    # Without gradient and without dropout: which images, captions and written sentences are hard.
    retrieved = None
    negatives = None
    pad_id = data.tokenizer.pad_id
    with evaluate.inference(model, device, args.dtype):
        if weights.keys() & {"itm", "hard"}:
            texts = model.prepare_text(batch["input_ids"], batch["input_ids"] != pad_id)
            images = prepare_images(model, batch)
        if "itm" in weights:
            count = args.wrong_partners
            batch |= draw_wrong_partners(model, texts, images, batch, count, device_rng)
        if "hard" in weights:
            retrieved = retrieve_negatives(model, texts, images, batch, args.hard, args.score_batch)
        if SYNTHETIC & weights.keys():
            fill, match = heads_over(model, images, pad_id)
            if writer is not None:
                fill, _ = heads_over(writer, prepare_images(writer, batch), pad_id)
            negatives = write_negatives(fill, match, batch, data.tokenizer, args, rng, device_rng)

    # With gradient: only the true pairs and what was found hard is encoded again.
    with autocast(device, args.dtype):
        terms, seen = objective(batch, weights, retrieved, negatives)
    loss = sum(weights[name] * term for name, term in terms.items())
    values = {"loss": loss} | terms | seen
    return loss, {name: value.detach() for name, value in values.items()}


def prepare_images(model, batch):
    """The regions of a batch, embedded once for all the pairs that they will be part of."""
    return model.prepare_regions(batch["features"], batch["boxes"], batch["region_mask"])


# ---- interruption and processes ----------------------------------------------------------------


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM came; `number` says which."""

    def __init__(self, number):
        super().__init__(number)
        self.number = number


class Signals:
    """SIGINT and SIGTERM raise Interrupted where they come, except inside `held`, where the first
    one is only noted, so that a step and its checkpoint are finished."""

    def __init__(self):
        self.noted = 0  # number of the signal that came while held
        self.holding = False

    @contextlib.contextmanager
    def installed(self):
        """While the block runs; also where a shell started us with SIGINT ignored."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(number, self.handle) for number in numbers]
        try:
            yield self
        finally:
            for number, handler in zip(numbers, before):
                signal.signal(number, handler)

    def handle(self, number, _):
        if self.holding and not self.noted:
            self.noted = number
        else:
            raise Interrupted(number)

    @contextlib.contextmanager
    def held(self):
        """What must not be left half done; check `noted` behind it."""
        self.holding = True
        try:
            yield
        finally:
            self.holding = False

    def check(self):
        """Raises Interrupted if a signal was noted."""
        if self.noted:
            raise Interrupted(self.noted)


def rank():
    """The number of this process; the first one alone writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def say(text):
    """Prints a line, once for all processes."""
    if rank() == 0:
        print(text, flush=True)


@contextlib.contextmanager
def only_run_in(folder):
    """Holds a lock on a run directory, so that two runs cannot write into it at once."""
    try:
        import fcntl
    except ImportError:  # Windows has none: there nothing is locked
        yield
        return
    with open(folder / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise datasets.InputError(
                f"{folder}: another run is writing here; wait for it, or give another --out"
            ) from None
        yield  # the lock ends with the file, however the program ends


# ---- the run -----------------------------------------------------------------------------------


def planned_steps(args):
    """{phase: steps}: the phases share --steps by their weights in --phases."""
    shares = {}
    for phase in args.phases:
        name, share = phase.split("=")
        if name != "warmup" or not args.init:
            shares[name] = float(share)
    total = sum(shares.values())
    return {name: round(args.steps * shares[name] / total) for name in PHASES if name in shares}


def phase_plan(args):
    """[(phase, steps, {term: weight}, peak learning rate)] of the run.

    A term of weight 0 drops out, and its work with it: that is how an ablation is made. In the
    warm-up the masked LM weighs 1, since it is what teaches the words.
    """
    lambdas = {
        "itm": 1.0,
        "hard": 1.0,
        "mlm": args.lambda_mlm,
        "tags": args.lambda_tags,
        "wod": args.lambda_wod,
        "woc": args.lambda_woc,
    }
    peaks = {"warmup": args.warmup_lr, "tags": args.lr, "dc": args.dc_lr}
    plan = []
    for phase, steps in planned_steps(args).items():
        if steps == 0:
            continue
        weights = {term: lambdas[term] for term in PHASES[phase] if lambdas[term] > 0}
        if phase == "warmup":
            weights["mlm"] = 1.0
        plan.append((phase, steps, weights, peaks[phase]))
    return plan


def triangle(step, steps):
    """Share of the peak learning rate: a rise over the first tenth of the steps, then a fall."""
    return min((step + 1) / max(0.1 * steps, 1), (steps - step) / max(0.9 * steps, 1))


class Trainer:
    """A training run: the model, where it stands, and all that its checkpoints hold.

    A run has up to three phases (phase_plan). Each begins with a fresh optimiser and with the
    best weights of the one before, and ends with its own best weights in best.pt. last.pt is
    where --resume goes on, to the same result as without a break. Of several processes (torchrun)
    each draws its own batches and pools; the first one alone writes files and lines.
    """

    PROGRESS = ("phase", "step", "validation_due", "best", "warmup", "log", "seconds")

    def __init__(self, args, data, model, device, signals):
        self.args = args
        self.data = data
        self.model = model
        self.device = device
        self.signals = signals
        self.out = Path(args.out)
        self.plan = phase_plan(args)
        self.objective = losses.Objective(
            model, data.tokenizer.pad_id, args.margin, args.original_weight
        )
        if dist.is_initialized():  # a phase without a term leaves its head without gradient
            self.objective = DistributedDataParallel(self.objective, find_unused_parameters=True)
        self.rng = torch.Generator().manual_seed(args.seed + rank())  # draws batches
        self.device_rng = torch.Generator(device).manual_seed(args.seed + rank())  # and words
        self.writer = None  # another network than the model, if it is frozen
        self.phase = 0  # number in the plan
        self.step = 0  # done in this phase
        self.validation_due = False  # of the step just done
        self.best = {}  # metrics of the phase's best validation
        self.warmup = None  # what the test report after the warm-up said
        self.log = []  # rows of log.csv
        self.history = {}  # {name: [scalars]} of the steps since its last row
        self.skipped_in_a_row = torch.zeros((), device=device)
        self.warned = set()
        self.seconds = 0.0  # of training, reports and validations, before `started`
        self.started = time.time()
        self.begin_phase()

    def begin_phase(self):
        """AdamW anew; weight decay 0.01, none on biases and LayerNorm (section 4.1)."""
        self.step = 0
        self.best = {}
        parameters = list(self.model.parameters())
        decayed = {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.01}
        others = {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0}
        fused = self.device != "mps"  # which torch 2.4 cannot
        self.optimizer = torch.optim.AdamW([decayed, others], betas=(0.9, 0.98), fused=fused)
        name = self.plan[self.phase][0] if self.phase < len(self.plan) else None
        if self.args.frozen_writer and self.writer is None and name in ("tags", "dc"):
            self.writer = copy.deepcopy(self.model)

    # ---- checkpoints ---------------------------------------------------------------------------

    def save(self, name):
        """Writes everything that --resume, --eval and --init need."""
        state = {
            "format": FORMAT,
            "config": vars(self.model.config),
            "tokens": self.data.tokenizer.tokens,
            "arguments": vars(self.args) | {"dtype": str(self.args.dtype).split(".")[-1]},
            "model": self.model.state_dict(),
            "writer": self.writer.state_dict() if self.writer else None,
            "optimizer": self.optimizer.state_dict(),
            "progress": {key: getattr(self, key) for key in self.PROGRESS},
            "history": {key: torch.stack(values) for key, values in self.history.items()},
            "skipped_in_a_row": self.skipped_in_a_row,
            "rng": self.random_states(),
        }
        state["progress"]["seconds"] += time.time() - self.started
        if rank() > 0:
            return
        try:
            datasets.write_atomically(self.out / name, lambda part: torch.save(state, part))
        except RuntimeError as fault:  # torch.save's own word for a full disk
            raise OSError(f"{self.out / name}: {first_line(fault)}") from None

    def generators(self):
        """All that draws at random here: batches, refills, dropout."""
        own = [self.rng, self.device_rng, torch.default_generator]
        if self.device.startswith("cuda"):
            own.append(torch.cuda.default_generators[torch.cuda.current_device()])
        return own

    def random_states(self):
        """[the states of `generators`] of each process."""
        states = [generator.get_state() for generator in self.generators()]
        every = [states] * world_size()
        if dist.is_initialized():
            dist.all_gather_object(every, states)
        return every

    def resume(self, state):
        """Takes up where a checkpoint stands, on another kind of device with other draws."""
        for key in self.PROGRESS:
            setattr(self, key, state["progress"][key])
        step, best = self.step, self.best
        self.model.load_state_dict(state["model"])
        self.begin_phase()
        self.step, self.best = step, best
        self.optimizer.load_state_dict(state["optimizer"])
        if self.writer:
            self.writer.load_state_dict(state["writer"])
        for name, values in state["history"].items():
            self.history[name] = list(values.to(self.device).unbind())
        self.skipped_in_a_row = state["skipped_in_a_row"].to(self.device)
        self.set_random_states(state["rng"])

    def set_random_states(self, every):
        """The generators go on as saved, or afresh where processes or devices are others now."""
        states = every[rank()] if rank() < len(every) else []
        for n, generator in enumerate(self.generators()):
            if n < len(states) and len(states[n]) == len(generator.get_state()):
                generator.set_state(states[n])
            else:
                generator.manual_seed(self.args.seed + rank() + 1000 * (self.step + 1))

    # ---- the loop ------------------------------------------------------------------------------

    def train(self):
        """What is left of the plan, each phase from the best weights of the one before."""
        if not (self.out / "last.pt").exists() or not self.log:
            self.save("last.pt")
        while self.phase < len(self.plan):
            self.train_phase(*self.plan[self.phase])
            self.end_phase(self.plan[self.phase][0])
        self.seconds += time.time() - self.started
        self.started = time.time()

    def train_phase(self, phase, steps, weights, peak):
        """One phase of the plan: steps, lines of the log, checkpoints, validations."""
        self.model.train()
        clock = time.time()
        done_before = self.step
        while self.step < steps or self.validation_due:
            if self.validation_due:
                self.validate()
                clock = time.time()
                done_before = self.step
                continue
            with self.signals.held():
                terms, lr = weights, peak * triangle(self.step, steps)
                if phase == "warmup":
                    terms, lr = self.words_then_matching(steps, weights, peak)
                self.optimise(terms, lr)
                self.step += 1
                due = self.step % self.args.log_every == 0 or self.step == steps
                if due:
                    pace = (time.time() - clock) / (self.step - done_before)
                    self.report(phase, terms, lr, pace)
                    self.validation_due = self.is_validation_due(phase, steps)
                    clock = time.time()
                    done_before = self.step
                interrupted = self.agree_on_interruption(due)
                if due or interrupted:
                    self.save("last.pt")
            if interrupted:
                raise Interrupted(interrupted)

    def words_then_matching(self, steps, weights, peak):
        """The warm-up has two parts, masked words alone and matching, too, and each its own rise
        and fall of the learning rate -> {term: weight}, rate."""
        words = round(self.args.words_first * steps)
        if self.step < words:
            return {"mlm": weights["mlm"]}, peak * triangle(self.step, words)
        return weights, peak * triangle(self.step - words, steps - words)

    def optimise(self, weights, lr):
        """One step of the optimiser; what it saw goes into the history."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        # Gradients of several batches add up to one step, for a GPU with little memory.
        for _ in range(self.args.accumulate):
            loss, seen = training_step(
                self.objective,
                self.data,
                self.args,
                weights,
                self.rng,
                self.device_rng,
                self.device,
                self.writer,
            )
            (loss / self.args.accumulate).backward()
            for name, value in seen.items():
                self.history.setdefault(name, []).append(value)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 2.0)
        self.update_if_finite(norm)

    def update_if_finite(self, norm):
        """Skips the update where the gradient is not finite, without asking a GPU."""
        skipped = (~norm.isfinite()).float()
        if self.device != "mps":  # the fused AdamW changes nothing where found_inf is 1
            self.optimizer.found_inf = skipped
            self.optimizer.step()
        elif not skipped:
            self.optimizer.step()
        self.history.setdefault("skipped", []).append(skipped)
        self.skipped_in_a_row = (self.skipped_in_a_row + 1) * skipped

    def agree_on_interruption(self, due):
        """The number of the signal that ends the run after this step, or 0. All processes stop
        after the same step, or none, and so they ask each other at lines of the log only."""
        if not dist.is_initialized():
            return self.signals.noted
        if not due:
            return 0
        noted = torch.tensor(self.signals.noted, device=self.device)
        dist.all_reduce(noted, dist.ReduceOp.MAX)
        return noted.item()

    # ---- what is told --------------------------------------------------------------------------

    def report(self, phase, terms, lr, pace):
        """A row of the log: means over the steps since the last one. pace: seconds a step."""
        means = {}
        for name, values in self.history.items():
            values = torch.stack(values).float()
            finite = values[values.isfinite()]
            means[name] = finite.mean().item() if len(finite) else math.nan
        skipped = sum(value.item() for value in self.history["skipped"])
        if self.skipped_in_a_row.item() >= 20:
            self.give_up(phase, lr)
        self.history = {}
        done = self.step + sum(steps for _, steps, _, _ in self.plan[: self.phase])
        total = sum(steps for _, steps, _, _ in self.plan)
        means["skipped"] = skipped
        row = {"phase": phase, "step": done, "lr": lr}
        row |= {name: round(mean, 5) for name, mean in means.items()}
        self.log.append(row)
        # The first process alone speaks, of its own batches; losses are means since the last line.
        if not skipped:
            means.pop("skipped")
        if "hard" in terms:
            candidates = 2 * self.args.pool
            if SYNTHETIC & terms.keys():
                candidates += self.args.maskings * self.args.refills
            each_step = self.args.batch_size * self.args.accumulate * world_size()
            means["negatives/s"] = each_step * candidates / pace
        values = "  ".join(f"{name} {mean:.4g}" for name, mean in means.items())
        say(f"{phase} {done}/{total}  {values}  ETA {pace * (total - done) / 60:.1f} min")
        self.watch(means)
        self.write_log()

    def give_up(self, phase, lr):
        """After 20 steps in a row whose gradient was not finite."""
        terms = [name for name, values in self.history.items() if not values[-1].isfinite()]
        raise datasets.InputError(
            f"20 steps in a row without a finite gradient at step {self.step} of {phase}"
            f" ({', '.join(terms) or 'all terms are finite themselves'}): lower the learning rate,"
            f" now {lr:.1e}; {self.out}/last.pt has the weights before them"
        )

    def watch(self, means):
        """Says once what silently makes a run worthless."""
        warnings = {}
        if abs(means.get("positive", 1.0) - means.get("retrieved", 0.0)) < 1e-3:
            warnings["collapsed"] = (
                "warning: true pairs and retrieved negatives score alike, so the hinge sits at its"
                " margin: lower --lr, or begin with a longer warm-up"
            )
        if means.get("kept", 1.0) < 0.01:
            warnings["empty"] = (
                "warning: hardly a written sentence is usable as a negative: raise --maskings,"
                " --refills or --temperature"
            )
        for name, text in warnings.items():
            if name not in self.warned:
                say(text)
                self.warned.add(name)

    def write_log(self):
        """log.csv; a column appears with the first row that has it."""
        if rank() > 0:
            return
        names = list(dict.fromkeys(name for row in self.log for name in row))

        def write(part):
            with open(part, "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, names)
                writer.writeheader()
                writer.writerows(self.log)

        datasets.write_atomically(self.out / "log.csv", write)

    # ---- validation ----------------------------------------------------------------------------

    def is_validation_due(self, phase, steps):
        """--validations times a phase at lines of the log, but not before its heads have learnt:
        matching in the warm-up, discrimination and correction in dc."""
        learnt = {"warmup": self.args.words_first * steps, "tags": 0, "dc": 0.5 * steps}
        lines = self.step // self.args.log_every
        apart = max(1, steps // self.args.log_every // self.args.validations)
        return self.step == steps or (self.step > learnt[phase] and lines % apart == 0)

    def validate(self):
        """Recall on val; the best weights of the phase are kept."""
        split = "val" if "val" in self.data.splits else "train"
        count = min(self.args.val_images, len(self.data.splits[split].images))
        scores, owner = scores_of(self.model, self.data, split, self.args, self.device, count)
        metrics = evaluate.retrieval_metrics(scores, owner)
        say(f"  validation: RSum {metrics['rsum']:.1f}")
        with self.signals.held():
            for name in ("rsum", "tr_r1", "ir_r1"):
                self.log[-1][f"val_{name}"] = round(metrics[name], 2)
            self.validation_due = False
            if metrics["rsum"] > self.best.get("rsum", -1):
                self.best = metrics
                self.save("best.pt")
            self.save("last.pt")
            self.write_log()
        self.signals.check()

    def end_phase(self, phase):
        """The phase's best weights go on, not its last."""
        if dist.is_initialized():
            dist.barrier()  # best.pt is whole before anyone reads it
        best = load_checkpoint(self.out / "best.pt", own=True)
        self.model.load_state_dict(best["model"])
        if phase == "warmup":
            self.warmup, _, _ = test_report(self.model, self.data, self.args, self.device)
        with self.signals.held():
            self.phase += 1
            if self.phase < len(self.plan):
                self.begin_phase()
            self.save("last.pt")
        self.signals.check()


FORMAT = 2  # of our checkpoints


def first_line(fault):
    """The first line of what an exception says."""
    return (str(fault).splitlines() or [type(fault).__name__])[0]


def load_checkpoint(path, own=False):
    """The dictionary in a file: a checkpoint of ours, or, unless `own`, official weights too."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception:  # torch.load raises half a dozen kinds, with advice that would be unsafe here
        raise datasets.InputError(
            f"{path}: not a checkpoint that can be read safely (weights and plain values alone)"
        ) from None
    if not isinstance(state, dict) or not state:
        raise datasets.InputError(f"{path}: no checkpoint, but a {type(state).__name__}")
    if own and "arguments" not in state:
        raise datasets.InputError(
            f"{path}: no checkpoint of this program; official weights start a run with --init"
        )
    if "arguments" in state and state.get("format") != FORMAT:
        raise datasets.InputError(
            f"{path}: a checkpoint of format {state.get('format', 1)}, this program writes and"
            f" reads {FORMAT}; train it again, or use the program that wrote it"
        )
    return state


# ---- evaluation, search: see evaluate.py for what they call -------------------------------------


def scoring(args, device):
    """What every function of evaluate.py that runs the network is told."""
    return {"device": device, "dtype": args.dtype, "score_batch": args.score_batch}


def scores_of(model, data, split, args, device, count=None):
    """Score matrix (C, I) of a split, or of its first `count` images and their captions, and the
    image of each caption. Several processes share the captions."""
    owner = data.splits[split].image_of_caption
    images = torch.arange(len(data.splits[split].images))[:count]
    owner = owner[owner < len(images)]
    own = torch.arange(len(owner)).tensor_split(world_size())[rank()]
    part = evaluate.score_matrix(
        model, data, split, captions=own, images=images, **scoring(args, device)
    )
    if world_size() == 1:
        return part, owner
    scores = torch.zeros(len(owner), len(images), device=device)
    scores[own.to(device)] = part.to(device)
    dist.all_reduce(scores)
    return scores.cpu(), owner


def final_split(data):
    """The split that is reported and searched: test, or the nearest there is."""
    return next(name for name in ("test", "val", "train") if name in data.splits)


def tailored_examples(model, data, split, args, device):
    """Generated negatives of the first caption of some images, the same for the same seed.

    Returns a dict of CPU tensors: captions and images (N,), originals (N, T), sentences (N, H, T),
    valid (N, H).
    """
    images = torch.arange(min(len(data.splits[split].images), args.analyse_images))
    captions = torch.searchsorted(data.splits[split].image_of_caption, images)
    rng = torch.Generator().manual_seed(args.seed)
    device_rng = torch.Generator(device).manual_seed(args.seed)
    batch = make_batch(
        data, split, captions, len(captions), device, rng, args.maskings, args.mask_probability
    )
    with evaluate.inference(model, device, args.dtype):
        fill, match = heads_over(model, prepare_images(model, batch), data.tokenizer.pad_id)
        made = write_negatives(fill, match, batch, data.tokenizer, args, rng, device_rng)
    return {
        "captions": captions,
        "images": data.splits[split].image_of_caption[captions],
        "originals": batch["input_ids"][:, : made.sentences.size(2)].cpu(),
        "sentences": made.sentences.cpu(),
        "valid": made.valid.cpu(),
    }


def test_report(model, data, args, device):
    """Everything measured on the test split -> metrics, scores (C, I), generated examples."""
    split = final_split(data)
    scores, _ = scores_of(model, data, split, args, device)
    examples = tailored_examples(model, data, split, args, device)
    metrics = evaluate.report(
        model,
        data,
        split,
        scores,
        examples,
        seed=args.seed,
        root=args.root,
        **scoring(args, device),
    )
    return metrics, scores, examples


def finish(args, data, model, device, progress):
    """Evaluates on the test split: a table, metrics.json, pictures.

    progress: of the run that has just ended (Trainer.PROGRESS), or that made the checkpoint.
    """
    out = Path(args.out)
    split = final_split(data)
    metrics, scores, examples = test_report(model, data, args, device)
    if rank() > 0:
        return
    for path in args.probe:
        metrics |= evaluate.run_probe(path, model, data, split, **scoring(args, device))
    content = data.splits[split]
    if content.scenes:
        metrics |= evaluate.identification_ceiling(content)
    say(f"{split} split: {len(content.images):,} images, {len(content.captions):,} captions")
    for line in evaluate.table(metrics, progress["warmup"] or {}):
        say(line)
    if args.save_scores:
        datasets.write_atomically(out / "scores.npy", lambda part: save_array(part, scores))
    options = scoring(args, device)
    picture = out / "negatives.png"
    evaluate.draw_negatives(picture, model, data, split, scores, examples, **options)
    if not args.eval:
        evaluate.draw_curves(out / "curves.png", progress["log"])
        record = {
            "test": metrics,
            "val": progress["best"],
            "warmup": progress["warmup"],
            "arguments": vars(args) | {"dtype": str(args.dtype)},
            "seed": args.seed,
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "seconds": round(progress["seconds"], 1),
        }
        text = json.dumps(record, indent=1)
        datasets.write_atomically(out / "metrics.json", lambda part: part.write_text(text))
    say(f"in {out}: " + ", ".join(sorted(path.name for path in out.iterdir() if path.is_file())))


def save_array(path, scores):
    """A tensor as .npy under a name that need not end so."""
    with open(path, "wb") as file:
        np.save(file, scores.numpy())


def search(args, data, model, device):
    """--query: the test images that a sentence describes best; --image: the captions of one."""
    split = final_split(data)
    path = Path(args.out) / "search.png"
    found = evaluate.search(
        model, data, split, args.query, args.image, path, **scoring(args, device)
    )
    for score, text in found:
        say(f"{score:.4f}  {text}")
    say(f"drawn as {path}")


# ---- main --------------------------------------------------------------------------------------


def choose_hardware(args):
    """(device, dtype) that --device and --dtype come to on this machine."""
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    device = args.device
    if device == "auto":
        device = next(name for name in there if there[name])
    if not there[device]:
        raise datasets.InputError(
            f"--device {device}: PyTorch finds no such device here; use --device cpu"
        )
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
    dtype = fast_dtype(device) if args.dtype == "auto" else getattr(torch, args.dtype)
    return device, dtype


def make_model(args, data, state):
    """The network: from our checkpoint or official weights if there are any, else fresh."""
    sizes = {"vocab_size": len(data.tokenizer.tokens), "feature_size": data.regions.feature_size}
    if state is None:
        return TagsDC(Config.preset(args.size, dropout=args.dropout, **sizes))
    source = args.eval or args.checkpoint or args.init
    try:
        if "config" in state:
            config = Config(**state["config"] | {"dropout": args.dropout})
        else:
            config = Config.from_uniter(
                state, args.heads, args.dropout, vocab_size=sizes["vocab_size"]
            )
        for field, size in sizes.items():
            if getattr(config, field) != size:
                raise ValueError(
                    f"its {field} is {getattr(config, field)}, the data's {size}: give the"
                    " vocab.txt and the features that these weights were made with"
                )
        model = TagsDC(config)
        if "config" in state:
            for name, values in state["model"].items():
                if not values.isfinite().all():
                    raise ValueError(f"{name} holds numbers that are not finite")
            model.load_state_dict(state["model"])
        else:
            for what, names in model.load_uniter(state).items():
                say(f"{source}: {what} {len(names)} entries{', '.join(['', *names[:4]])}")
    except (ValueError, RuntimeError, TypeError, KeyError) as fault:
        raise datasets.InputError(f"{source}: {first_line(fault)}") from None
    return model


def load_any(args, state):
    """The data of a run, its region features in the folder `data` of the run or, if those of a
    checkpoint are the same, of the checkpoint's.

    Of several processes the first one converts the region features, for hours if need be; the
    others wait, and then find the store in place.
    """
    tokens = state.get("tokens") if state else None
    feature_size = state["config"]["feature_size"] if state and "config" in state else None
    inner = Path("data") / Path(args.data).stem
    store = Path(args.out) / inner
    elsewhere = [Path(path).parent / inner for path in (args.eval, args.checkpoint) if path]
    if rank() > 0:
        dist.barrier()
    if args.data == "scenes":
        data = datasets.load_scenes(args.seed, args.scenes, store, tokens, elsewhere)
    else:
        data = datasets.load_data(
            args.data,
            args.root,
            args.features,
            args.phrases,
            args.skip_bad,
            tokens,
            feature_size,
            store,
            elsewhere,
        )
    if rank() == 0 and dist.is_initialized():
        dist.barrier()
    for note in data.notes:
        say(note)
    return data


def run(args, signals):
    """Loads data and model, then trains, evaluates or searches."""
    device, args.dtype = choose_hardware(args)
    if "LOCAL_RANK" in os.environ:  # started by torchrun
        waiting = 8 * dist.constants.default_pg_timeout
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=waiting)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed + rank())
    if args.query or args.image or args.eval:
        state = load_checkpoint(args.eval or args.checkpoint, own=True)
        data = load_any(args, state)
        model = make_model(args, data, state).to(device)
        if args.eval:
            finish(args, data, model, device, state["progress"])
        else:
            search(args, data, model, device)
        return
    with only_run_in(out) if rank() == 0 else contextlib.nullcontext():
        train(args, device, signals)


def train(args, device, signals):
    """A training run from its first step or, with --resume, from its last checkpoint."""
    out = Path(args.out)
    last = out / "last.pt"
    saved = load_checkpoint(last, own=True) if args.resume and last.exists() else None
    if saved is None and rank() == 0:
        arguments = vars(args) | {"dtype": str(args.dtype).split(".")[-1]}
        text = json.dumps({"arguments": arguments}, indent=1)
        datasets.write_atomically(out / "run.json", lambda part: part.write_text(text))
        last.unlink(missing_ok=True)  # of an earlier run, which is not to be gone on with
    # A checkpoint brings its vocabulary and sizes along, so it is read before data and model.
    start = saved or (load_checkpoint(args.init) if args.init else None)
    data = load_any(args, start)
    if "train" not in data.splits:
        raise datasets.InputError(
            f"{args.data}: no captions of the train split to learn from; --eval needs none"
        )
    model = make_model(args, data, start).to(device)
    model.recompute = args.recompute
    trainer = Trainer(args, data, model, device, signals)
    if saved:
        trainer.resume(saved)
    trainer.train()
    finish(args, data, model, device, {name: getattr(trainer, name) for name in trainer.PROGRESS})


def main(argv=None):
    """The command; returns its exit code."""
    signals = Signals()
    try:
        with signals.installed():
            run(parse_arguments(argv), signals)
        return 0
    except torch.cuda.OutOfMemoryError:
        text = "out of memory on the GPU: lower --score-batch, --batch-size, --maskings or --hard,"
        print(f"tagsdc.py: error: {text} or give --recompute", file=sys.stderr)
        return 2
    except (datasets.InputError, OSError) as fault:
        print(f"tagsdc.py: error: {' '.join(str(fault).split())}", file=sys.stderr)
        return 2
    except Interrupted as stop:
        print("interrupted; what is saved stays whole, --resume goes on", file=sys.stderr)
        return 128 + stop.number
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
