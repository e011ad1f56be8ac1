"""TAGS-DC from one command: train, evaluate, search (see README.md).

Reading order: `tailored_step`, a step of TAGS-DC, and what it calls; `warmup_step`, and for a BERT
`align_step` and `contrast_step`; then the options, `Trainer.train` and `run`.

Letters: B anchor pairs of a step, P pairs of its retrieval pool (the anchors first), T text
positions (of the anchors alone, where there are no others), R regions, F feature size, M maskings,
K refills, H hard negatives, C captions of an image, D hidden size, V vocabulary, q masked words of
all anchors. Every mask: True = real / usable."""

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
from concurrent.futures import ThreadPoolExecutor
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
    alignment_loss,
    contrastive_loss,
    masked_lm_loss,
    masked_mean,
    matching_loss,
    triplet_loss,
    word_correction_loss,
    word_discrimination_loss,
)
from model import (
    BERT_FILES,
    PRESETS,
    Config,
    TagsDC,
    autocast,
    fast_dtype,
    read_bert,
    read_weights,
)

# ---- what a step works on ----------------------------------------------------------------------

MASK_PROBABILITY = 0.15  # of a phrase, as in the paper
WARMUP_MASK_PROBABILITY = 0.3  # more, since nothing but masked words is learnt at first


@dataclass(frozen=True)
class Settings:
    """What a step must know besides its model, batch and weights."""

    tokenizer: datasets.WordPiece
    device: str
    dtype: torch.dtype  # of matrix products: float32 or bfloat16
    margin: float  # of the triplet losses
    retrieved: int  # hard negatives retrieved each way
    hard: int  # negatives written for a caption
    refills: int  # of each masked caption
    temperature: float
    truth_threshold: float
    score_batch: int  # pairs in one pass without gradient


class Batch(NamedTuple):
    """P pairs, the first B of which are the anchors that a step learns from. The labels stay on the
    CPU, so that a step need not wait for the device to know how many words are masked."""

    input_ids: torch.Tensor  # (P, T)
    true_captions: torch.Tensor  # (P, C, T') of each image
    features: torch.Tensor  # (P, R, F)
    boxes: torch.Tensor  # (P, R, 7)
    region_mask: torch.Tensor  # (P, R)
    masked: torch.Tensor  # (B, M, T) the anchors' captions, with masked words
    labels: torch.Tensor  # (B, M, T) the words there, -1 elsewhere; on the CPU
    places: torch.Tensor  # (q,) of the masked words, flat in `masked`; padded, see make_batch
    targets: torch.Tensor  # (q,) the words there; -1 where the list is padded
    writer_images: torch.Tensor  # (B, M) the image that the writer looks at

    def to(self, device):
        moved = {
            name: tensor.to(device, non_blocking=True)
            for name, tensor in self._asdict().items()
            if name != "labels"
        }
        return self._replace(**moved)


def draw_pairs(split, count, rng):
    """`count` different images of a split, and one caption of each: (P,) indices of captions."""
    images = torch.randperm(len(split.images), generator=rng)[:count]
    first, end = split.caption_ranges(images)
    return first + (torch.rand(len(images), generator=rng) * (end - first)).long()


def make_batch(data, split, captions, B, maskings, probability, writer_sees, rng):
    """The Batch of P captions, given by index, and their images, on the CPU. Whatever is random in
    it comes from rng. writer_sees: "own" or "other"."""
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
    padding = -len(places) % 128  # a CPU prepares a bfloat16 product anew for each number of rows
    writer_images = torch.arange(B)[:, None].expand(B, maskings)
    if writer_sees == "other":
        writer_images = generate.other_images(B, maskings, rng)
    return Batch(
        input_ids=input_ids,
        true_captions=data.true_captions(split, images),
        features=features,
        boxes=boxes,
        region_mask=region_mask,
        masked=masked,
        labels=labels,
        places=F.pad(places, (0, padding)),
        targets=F.pad(targets, (0, padding), value=-1),
        writer_images=writer_images,
    )


def prepare(model, batch, pad_id):
    """All captions and all images of a batch, embedded -> (Prepared texts, Prepared images)."""
    texts = model.prepare_text(batch.input_ids, batch.input_ids != pad_id)
    images = model.prepare_regions(batch.features, batch.boxes, batch.region_mask)
    return texts, images


def masked_words_loss(model, images, batch, pad_id):
    """L_mlm of the anchors' masked captions, each with its own image."""
    M, T = batch.masked.shape[1:]
    ids = batch.masked.flatten(0, 1)  # (B * M, T)
    texts = model.prepare_text(ids, ids != pad_id)
    row = torch.arange(len(ids), device=ids.device)
    hidden = model.encode_pairs(texts, row, images, row // M, first=T)  # (B * M, T, D)
    hidden = hidden.flatten(0, 1).index_select(0, batch.places)  # (q, D)
    return masked_lm_loss(model.fill(hidden), batch.targets)


def weighted_sum(terms, weights):
    """The objective: the terms {name: scalar}, times their weights."""
    return sum(weight * terms[name] for name, weight in weights.items())


# ---- TAGS-DC -----------------------------------------------------------------------------------

TERMS_OF_WRITTEN = {"tags", "wod", "woc"}  # which learn from written negatives


def tailored_step(model, writer, batch, weights, settings):
    """One step of TAGS-DC (section 3.5 of the paper), up to the loss:

        L = L_hard + a L_tags + b L_mlm + c L_wod + d L_woc

    with those terms that are among the weights, {name: weight}. writer: the network that writes
    the negatives, which is the model or a frozen copy of it.
    Returns the loss, a scalar with gradient, and {name: scalar} of what the log shows."""
    pad_id = settings.tokenizer.pad_id
    margin = settings.margin

    # Without gradient and in eval mode: which images, captions and written sentences are hard?
    written = None
    with evaluate.inference(model, settings.device, settings.dtype):
        texts, images = prepare(model, batch, pad_id)
        wrong_images, wrong_texts = retrieve_negatives(model, texts, images, batch, settings)  # 3.2
        if weights.keys() & TERMS_OF_WRITTEN:
            written = write_negatives(model, writer, images, batch, settings)  # 3.3

    # With gradient: the true pairs and what was found hard.
    with autocast(settings.device, settings.dtype):
        texts, images = prepare(model, batch, pad_id)
        positive, image_scores, text_scores = score_retrieved(  # (B,), (B, H), (B, H)
            model, texts, images, wrong_images.index, wrong_texts.index
        )
        by_image = triplet_loss(positive, image_scores, margin=margin, valid=wrong_images.valid)
        by_text = triplet_loss(positive, text_scores, margin=margin, valid=wrong_texts.valid)
        terms = {"hard": by_image + by_text}
        shown = {"hard_image": by_image, "hard_text": by_text, "positive": positive.mean()}
        shown["retrieved"] = masked_mean(text_scores, wrong_texts.valid)
        if written is not None:
            scores, hidden = encode_written(model, images, written.sentences, pad_id)
            shown["synthetic"] = masked_mean(scores, written.valid)
            shown["kept"] = written.valid.float().mean()
        if "tags" in weights:
            terms["tags"] = triplet_loss(positive, scores, margin=margin, valid=written.valid)
        if "wod" in weights:  # which words were replaced?
            real = (written.sentences != pad_id) & written.valid[..., None]  # (B, H, T)
            logits = model.discriminate(hidden)  # (B, H, T, 2)
            terms["wod"] = word_discrimination_loss(logits, written.labels >= 0, real)
        if "woc" in weights:  # which words stood there?
            replaced, labels = replaced_words(hidden, written.labels, batch.labels)
            terms["woc"] = word_correction_loss(model.correct(replaced), labels)
        if (
            "mlm" in weights
        ):  # the masked-LM head, which writes, learns from the same masked captions
            terms["mlm"] = masked_words_loss(model, images, batch, pad_id)
        loss = weighted_sum(terms, weights)
    return loss, detached({"loss": loss, **terms, **shown})


class Retrieved(NamedTuple):
    """Hard negatives of the anchors, hardest first."""

    index: torch.Tensor  # (B, H) in the pool
    valid: torch.Tensor  # (B, H) bool; False = the pool has no more that are false


def retrieve_negatives(model, texts, images, batch, settings):
    """The hardest images of the pool for each anchor caption, and the hardest captions for each
    anchor image (section 3.2), of those that are not known to belong together
    -> Retrieved images, Retrieved captions."""
    pad_id = settings.tokenizer.pad_id
    ids = batch.input_ids
    P = len(ids)
    B = len(batch.masked)
    anchors = torch.arange(B, device=ids.device)
    pool = torch.arange(P, device=ids.device)
    # Every anchor caption with every image, B * P pairs; then the other P - B captions with every
    # anchor image.
    text_index = torch.cat((anchors.repeat_interleave(P), pool[B:].repeat_interleave(B)))
    image_index = torch.cat((pool.repeat(B), anchors.repeat(P - B)))
    scores = model.score_pairs(texts, text_index, images, image_index, settings.score_batch)
    image_scores = scores[: B * P].view(B, P)
    text_scores = torch.cat((image_scores[:, :B], scores[B * P :].view(P - B, B))).T  # (B, P)

    true = batch.true_captions  # (P, C, T)
    false_images = ~generate.equals_a_caption(ids[:B].expand(P, B, -1), true, pad_id).T  # (B, P)
    false_texts = ~generate.equals_a_caption(ids.expand(B, P, -1), true[:B], pad_id)  # (B, P)
    H = min(settings.retrieved, P)
    hard_images = generate.select_hardest(image_scores, false_images, H)
    hard_texts = generate.select_hardest(text_scores, false_texts, H)
    return Retrieved(*hard_images), Retrieved(*hard_texts)


def score_retrieved(model, texts, images, wrong_images, wrong_texts):
    """Scores of the true pairs (B,), of each anchor caption with its wrong images (B, H), and of
    each anchor image with its wrong captions (B, H). wrong_images, wrong_texts: (B, H) indices."""
    B, H = wrong_images.shape
    pair = torch.arange(B, device=wrong_images.device)
    anchor = pair.repeat_interleave(H)  # (B * H,)
    text_index = torch.cat((pair, anchor, wrong_texts.flatten()))
    image_index = torch.cat((pair, wrong_images.flatten(), anchor))
    scores = model.score_pairs(texts, text_index, images, image_index).sigmoid()
    positive, image_scores, text_scores = scores.split((B, B * H, B * H))
    return positive, image_scores.view(B, H), text_scores.view(B, H)


def write_negatives(model, writer, images, batch, settings):
    """`generate.tailor_negatives` for the anchors (section 3.3): the writer refills, the model
    judges. images: Prepared by the model."""
    tokenizer = settings.tokenizer
    B, _, T = batch.masked.shape
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

    return generate.tailor_negatives(
        fill,
        match,
        batch.input_ids[:B, :T],
        batch.true_captions[:B],
        pad_id=tokenizer.pad_id,
        mask_id=tokenizer.mask_id,
        vocabulary_range=tokenizer.word_range,
        masks=(batch.masked, batch.labels),
        refills=settings.refills,
        temperature=settings.temperature,
        truth_threshold=settings.truth_threshold,
        writer_images=batch.writer_images,
        allowed=tokenizer.whole_words.to(batch.masked.device, non_blocking=True),
        hard=settings.hard,
        chunk_size=settings.score_batch,
    )


def encode_written(model, images, sentences, pad_id):
    """Sentences (B, H, T), each with the image of its row: scores (B, H), hidden (B, H, T, D)."""
    B, H, T = sentences.shape
    ids = sentences.flatten(0, 1)  # (B * H, T)
    texts = model.prepare_text(ids, ids != pad_id)
    row = torch.arange(B * H, device=ids.device)
    hidden = model.encode_pairs(texts, row, images, row // H, first=T)  # (B * H, T, D)
    return model.match(hidden).sigmoid().view(B, H), hidden.unflatten(0, (B, H))


def replaced_words(hidden, labels, masked_labels):
    """The hidden states (B, H, T, D) of the replaced words alone, since word logits at all places
    would take much memory: (B, H, Q, D), and their labels (B, H, Q), -1 where a sentence has fewer.
    masked_labels: (B, M, T) of the maskings, on the CPU; the most words that one of them hides are
    Q, which is so known without waiting for the device."""
    Q = int((masked_labels >= 0).sum(2).max())
    replaced = labels >= 0  # (B, H, T)
    places = replaced.byte().topk(Q, dim=2).indices  # (B, H, Q), the replaced ones first
    index = places[..., None].expand(-1, -1, -1, hidden.size(3))
    return hidden.gather(2, index), labels.gather(2, places)


def detached(values):
    return {name: value.detach() for name, value in values.items()}


# ---- the warm-up -------------------------------------------------------------------------------

WRONG_PARTNERS = 7  # pairs of the batch among which a hard wrong partner is drawn
ALIGN_BATCH = 256  # pairs of a step of the first part from BERT
ALIGN_LR = 1e-3


def warmup_step(model, batch, weights, settings):
    """One step of the warm-up, up to the loss:

        L = L_itm + e L_mlm

    masked words and, once "itm" is among the weights, image-text matching against wrong partners.
    Returns what `tailored_step` does."""
    pad_id = settings.tokenizer.pad_id

    # Without gradient and in eval mode: which wrong partners look true?
    if "itm" in weights:
        with evaluate.inference(model, settings.device, settings.dtype):
            texts, images = prepare(model, batch, pad_id)
            wrong_images, wrong_texts, false = draw_wrong_partners(
                model, texts, images, batch, pad_id
            )

    # With gradient.
    with autocast(settings.device, settings.dtype):
        texts, images = prepare(model, batch, pad_id)
        terms = {"mlm": masked_words_loss(model, images, batch, pad_id)}
        if "itm" in weights:
            # The true pairs, each image with a wrong caption, each caption with a wrong image.
            pair = torch.arange(len(batch.input_ids), device=batch.input_ids.device)
            text_index = torch.cat((pair, wrong_texts, pair))
            image_index = torch.cat((pair, pair, wrong_images))
            logits = model.score_pairs(texts, text_index, images, image_index)  # (3B,)
            true = torch.ones_like(false)
            matches = torch.cat((true, ~true, ~true))
            terms["itm"] = matching_loss(logits, matches, valid=torch.cat((true, false, false)))
        loss = weighted_sum(terms, weights)
    return loss, detached({"loss": loss, **terms})


def align_step(model, batch, settings):
    """One step of the first part of a warm-up from BERT, up to the loss: the embeddings of regions
    and of words learn to meet, before any layer sees them. Returns what `tailored_step` does."""
    words = mean_words(model, batch.input_ids, settings.tokenizer)
    with autocast(settings.device, settings.dtype):
        images = model.prepare_regions(batch.features, batch.boxes, batch.region_mask)
    valid = false_pairs(batch, settings.tokenizer.pad_id)
    loss = alignment_loss(words, mean_regions(images, batch.boxes), valid=valid)
    return loss, detached({"loss": loss, "align": loss})


def contrast_step(model, batch, weights, settings):
    """One step of the second part of a warm-up from BERT, up to the loss:

        L = L_contrast + e L_mlm

    masked words, and each caption of the batch is to find its image among all B of them, and each
    image its caption. All B * B pairs are encoded, so that each true pair meets 2 (B - 1) wrong
    ones: a BERT, which has never seen a picture, learns more from these than from single partners.
    Returns what `tailored_step` does."""
    pad_id = settings.tokenizer.pad_id
    B = len(batch.input_ids)
    row = torch.arange(B, device=batch.input_ids.device)
    with autocast(settings.device, settings.dtype):
        texts, images = prepare(model, batch, pad_id)
        # Every caption with every image.
        scores = model.score_pairs(texts, row.repeat_interleave(B), images, row.repeat(B))
        terms = {
            "mlm": masked_words_loss(model, images, batch, pad_id),
            "contrast": contrastive_loss(scores.view(B, B), valid=false_pairs(batch, pad_id)),
        }
        loss = weighted_sum(terms, weights)
    return loss, detached({"loss": loss, **terms})


def false_pairs(batch, pad_id):
    """Which captions of a batch are not known to be true of which images: (B, B) bool, caption a
    with image b."""
    ids = batch.input_ids
    every = ids.expand(len(ids), -1, -1)  # (B, B, T), for each image all captions
    return ~generate.equals_a_caption(every, batch.true_captions, pad_id).T


def mean_words(model, ids, tokenizer):
    """The mean word embedding of captions (B, T) -> (B, D)."""
    real = (ids != tokenizer.pad_id) & (ids != tokenizer.cls_id) & (ids != tokenizer.sep_id)
    real = real[..., None].float()  # (B, T, 1)
    return (model.text.word(ids) * real).sum(1) / real.sum(1).clamp(min=1)


def mean_regions(images, boxes):
    """The mean of each image's regions, Prepared (B, R, D), to which the largest one, often the
    whole image, adds as much as all together -> (B, D). boxes: (B, R, 7), the area last."""
    real = images.mask[..., None].float()  # (B, R, 1)
    mean = (images.states * real).sum(1) / real.sum(1)
    largest = boxes[..., 6].masked_fill(~images.mask, -1.0).argmax(1)  # (B,)
    row = torch.arange(len(largest), device=largest.device)
    return (mean + images.states[row, largest]) / 2


def draw_wrong_partners(model, texts, images, batch, pad_id):
    """For each pair another one's image and caption, to tell from its own: among the
    WRONG_PARTNERS behind (images) or before (captions) it, the likelier the higher they score, as
    in ALBEF.
    Returns wrong_images, wrong_texts and false (B,); not false = they are true after all."""
    device = batch.input_ids.device
    B = len(batch.input_ids)
    K = max(min(WRONG_PARTNERS, B - 1), 1)
    row = torch.arange(B, device=device)
    step = torch.arange(1, K + 1, device=device)
    behind = (row[:, None] + step) % B  # (B, K)
    before = (row[:, None] - step) % B
    # Caption b with the image k steps behind it; so image b with the caption k steps before it.
    scores = model.score_pairs(texts, row.repeat_interleave(K), images, behind.flatten()).view(B, K)
    false = false_pairs(batch, pad_id)
    false_texts = false[before, row[:, None]]  # (B, K)
    false_images = false[row[:, None], behind]
    image = draw_by_score(scores, false_images)
    text = draw_by_score(scores[before, step - 1], false_texts)
    wrong_images = behind.gather(1, image)[:, 0]
    wrong_texts = before.gather(1, text)[:, 0]
    return wrong_images, wrong_texts, false_images.any(1) & false_texts.any(1)


def draw_by_score(scores, valid):
    """One column of each row, drawn from the softmax of the valid scores: (B, K) -> (B, 1)."""
    # The largest score plus Gumbel noise is such a draw, and a GPU makes it without a halt.
    noise = torch.empty_like(scores, dtype=torch.float32).exponential_().log()
    return (scores - noise).masked_fill(~valid, float("-inf")).argmax(1, keepdim=True)


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
COUNT_OR_NONE = number(int, 10**9, zero=True)
POSITIVE = number(float, 1e12)
WEIGHT = number(float, 1e12, zero=True)
SHARE = number(float, 1)
SWITCH = argparse.BooleanOptionalAction  # --name and --no-name


def make_parser():
    """All options; the defaults fit the embedded scenes on a CPU."""
    parser = argparse.ArgumentParser(
        usage="python tagsdc.py [options]",
        description="TAGS-DC: an image-text matcher learns from negatives that it writes itself. "
        "Defaults are in [].",
        formatter_class=functools.partial(argparse.HelpFormatter, max_help_position=26, width=100),
    )
    add_tasks(parser.add_argument_group("what to do (without any of these: train)"))
    add_data_options(parser.add_argument_group("data and network"))
    add_training_options(parser.add_argument_group("training"))
    add_negatives_options(parser.add_argument_group("negatives"))
    add_objective_options(parser.add_argument_group("objective"))
    add_run_options(parser.add_argument_group("run"))
    return parser


def add_tasks(group):
    add = group.add_argument
    add("--quick", action="store_true", help="train in miniature: every part in under a minute")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--eval", metavar="FILE", help="evaluate a checkpoint, or UNITER's official weights")
    add("--checkpoint", metavar="FILE", help="for --query and --image")
    add("--query", metavar="TEXT", help="find the test images that fit a sentence best")
    add("--image", metavar="NAME", help="find the test captions that fit an image best")
    help = "also run published tests: SugarCrepe, VALSE's FOIL, RoCOCO"
    add("--probe", metavar="FILE", nargs="+", default=[], help=help)


def add_data_options(group):
    add = group.add_argument
    help = "scenes, coco, flickr30k, flickr8k, or a JSON in Karpathy's form [%(default)s]"
    add("--data", metavar="NAME", default="scenes", help=help)
    add("--root", metavar="DIR", help="where the captions, vocabulary and region features are")
    add("--features", metavar="DIR", help="where the region features are, if not under --root")
    add("--phrases", metavar="FILE", help="JSON with the captions' phrases, not parsed by rules")
    add("--skip-bad", action=SWITCH, default=False, help="leave out unusable images")
    help = "images of the scenes in train, val and test [1000 100 250]"
    add("--scenes", metavar="N", type=COUNT, nargs=3, default=[1000, 100, 250], help=help)
    help = "tokens of a text; longer ones are cut off [%(default)s]"
    add("--max-text", metavar="N", type=COUNT, default=64, help=help)
    help = "size of a new network: tiny, small, or base and large as in the paper [tiny]"
    add("--size", metavar="NAME", choices=PRESETS, help=help)
    help = "start from our checkpoint, UNITER's weights, or the folder of a BERT"
    add("--init", metavar="FILE", help=help)
    dropout = number(float, 0.99, zero=True)
    add(
        "--dropout",
        metavar="X",
        type=dropout,
        default=0.0,
        help="share of zeroed activations [%(default)s; paper: 0.1]",
    )


def add_training_options(group):
    add = group.add_argument
    help = "options in one word: paper, coco-base-1, coco-base-2, bert-coco, ..., see README.md"
    add("--recipe", metavar="NAME", choices=RECIPES, help=help)
    help = "steps of the optimiser over all phases [%(default)s]"
    add("--steps", metavar="N", type=COUNT, default=3250, help=help)
    phases = ["warmup=10", "dc=3"]
    help = "of warmup, tags and dc, with shares of the steps [warmup=10 dc=3]"
    add("--phases", metavar="NAME=X", type=phase_share, nargs="+", default=phases, help=help)
    help = "anchor pairs in a batch of tags and dc [%(default)s; paper: 32]"
    add("--batch-size", metavar="N", type=COUNT, default=16, help=help)
    help = "pairs in a batch of the warm-up; from BERT all N x N meet, so 8 or 16 [%(default)s]"
    add("--warmup-batch-size", metavar="N", type=COUNT, default=32, help=help)
    help = "batches of a step, all processes together [one each; paper: 8]"
    add("--accumulate", metavar="N", type=COUNT, help=help)
    help = "peak learning rate of tags and dc [%(default)s; paper: 5e-5, 1e-5]"
    add("--lr", metavar="X", type=POSITIVE, default=1e-3, help=help)
    help = "peak learning rate of the warm-up [%(default)s]"
    add("--warmup-lr", metavar="X", type=POSITIVE, default=1e-3, help=help)
    help = "keep fewer activations: less memory, a third more work"
    add("--recompute", action=SWITCH, default=False, help=help)


def add_negatives_options(group):
    add = group.add_argument
    help = "pairs from which hard negatives are retrieved [%(default)s; paper: 399]"
    add("--pool", metavar="N", type=COUNT, default=16, help=help)
    help = "hard negatives retrieved each way [%(default)s; paper: 31]"
    add("--retrieved", metavar="N", type=COUNT, default=2, help=help)
    help = "hardest of the written negatives that are kept [%(default)s; paper: 31]"
    add("--hard", metavar="N", type=COUNT, default=4, help=help)
    help = "maskings of a caption [%(default)s; paper: 20]"
    add("--maskings", metavar="N", type=COUNT, default=4, help=help)
    help = "refills of a masking [%(default)s; paper: 20]"
    add("--refills", metavar="N", type=COUNT, default=4, help=help)
    help = "sampling temperature of the refilling [%(default)s; paper: 1.5]"
    add("--temperature", metavar="X", type=POSITIVE, default=1.0, help=help)
    help = "whose picture the writer looks at: own, other [%(default)s; paper: own]"
    sees = ("own", "other")
    add("--writer-sees", metavar="WHOSE", choices=sees, default="other", help=help)
    help = "words more probable than this may be true: not written [%(default)s; paper: 1, off]"
    add("--truth-threshold", metavar="X", type=SHARE, default=0.1, help=help)
    help = "the writer does not learn any more after the warm-up"
    add("--frozen-writer", action=SWITCH, default=False, help=help)


def add_objective_options(group):
    add = group.add_argument
    help = "of the triplet losses L_hard and L_tags [%(default)s; paper: 0.2]"
    add("--margin", metavar="X", type=POSITIVE, default=0.2, help=help)
    help = "weight of L_tags [%(default)s; paper: 5e-5 to 1e-3]"
    add("--lambda-tags", metavar="X", type=WEIGHT, default=1.0, help=help)
    help = "weight of L_mlm [%(default)s; paper: 0.01 to 0.1]"
    add("--lambda-mlm", metavar="X", type=WEIGHT, default=0.2, help=help)
    help = "weight of L_wod [%(default)s; paper: 5e-4]"
    add("--lambda-wod", metavar="X", type=WEIGHT, default=1.0, help=help)
    help = "weight of L_woc [%(default)s; paper: 5e-4]"
    add("--lambda-woc", metavar="X", type=WEIGHT, default=0.5, help=help)


def add_run_options(group):
    add = group.add_argument
    add("--out", metavar="DIR", help="run directory [runs/ and the name of the data]")
    seed = number(int, 2**32, zero=True)
    add("--seed", metavar="N", type=seed, default=0, help="random seed [%(default)s]")
    devices = ("auto", "cpu", "cuda", "mps")
    help = "cpu, cuda, mps or auto [%(default)s]"
    add("--device", metavar="NAME", choices=devices, default="auto", help=help)
    dtypes = ("auto", "float32", "bfloat16")
    help = "float32, bfloat16 or auto, what the hardware is faster with [%(default)s]"
    add("--dtype", metavar="NAME", choices=dtypes, default="auto", help=help)
    help = "steps between two lines of the log, each with a checkpoint [%(default)s]"
    add("--log-every", metavar="N", type=COUNT, default=50, help=help)
    help = "validations per phase [%(default)s]"
    add("--validations", metavar="N", type=COUNT, default=2, help=help)
    help = "images that a validation looks at [%(default)s]"
    add("--val-images", metavar="N", type=COUNT, default=100, help=help)
    help = "images that the final report looks at; 0: no report [all]"
    add("--test-images", metavar="N", type=COUNT_OR_NONE, help=help)
    help = "images whose written negatives the report analyses [%(default)s]"
    add("--analyse-images", metavar="N", type=COUNT, default=200, help=help)
    help = "pairs in a pass without gradient [%(default)s; 2048 suits a GPU]"
    add("--score-batch", metavar="N", type=COUNT, default=128, help=help)
    help = "keep the report's scores as scores.npy; an interrupted report goes on from them"
    add("--save-scores", action=SWITCH, default=False, help=help)


# What all schedules of the official release share. Stage 1 begins with UNITER's weights, stage 2
# with stage 1's best.pt. An update learns from 256 anchors: 8 processes, or as many batches.
RELEASE = {
    "dropout": 0.1,
    "accumulate": 8,
    "recompute": True,
    "score_batch": 2048,
    "pool": 399,
    "maskings": 20,
    "refills": 20,
    "writer_sees": "own",
    "truth_threshold": 1.0,
    "val_images": 1000,
    "validations": 10,
}
# Where these differ from run to run. The shell scripts of the release, whose values these are, win
# over its JSON files; the number of steps stands in the JSON files alone.
RECIPES = {
    "coco-base-1": RELEASE
    | {
        "size": "base",
        "phases": ["tags=1"],
        "steps": 5000,
        "batch_size": 32,
        "lr": 5e-5,
        "retrieved": 31,
        "hard": 31,
        "temperature": 1.5,
        "lambda_tags": 5e-5,
        "lambda_mlm": 0.01,
        "test_images": 0,
    },
    "coco-base-2": RELEASE
    | {
        "size": "base",
        "phases": ["dc=1"],
        "steps": 1500,
        "batch_size": 32,
        "lr": 1e-5,
        "retrieved": 31,
        "hard": 31,
        "temperature": 1.5,
        "lambda_tags": 1e-4,
        "lambda_mlm": 0.05,
        "lambda_wod": 5e-4,
        "lambda_woc": 5e-4,
    },
    "coco-large-1": RELEASE
    | {
        "size": "large",
        "phases": ["tags=1"],
        "steps": 5000,
        "batch_size": 32,
        "lr": 4e-5,
        "retrieved": 23,
        "hard": 23,
        "temperature": 1.5,
        "lambda_tags": 1e-3,
        "lambda_mlm": 0.05,
        "test_images": 0,
    },
    "coco-large-2": RELEASE
    | {
        "size": "large",
        "phases": ["dc=1"],
        "steps": 5000,
        "batch_size": 32,
        "lr": 1e-5,
        "retrieved": 31,
        "hard": 31,
        "temperature": 1.5,
        "lambda_tags": 1e-4,
        "lambda_mlm": 0.05,
        "lambda_wod": 5e-4,
        "lambda_woc": 5e-4,
    },
    "flickr-base-1": RELEASE
    | {
        "size": "base",
        "phases": ["tags=1"],
        "steps": 5000,
        "batch_size": 16,
        "lr": 5e-5,
        "retrieved": 31,
        "hard": 31,
        "temperature": 2.0,
        "lambda_tags": 5e-4,
        "lambda_mlm": 0.05,
        "test_images": 0,
    },
    "flickr-base-2": RELEASE
    | {
        "size": "base",
        "phases": ["dc=1"],
        "steps": 5000,
        "batch_size": 32,
        "lr": 1e-5,
        "retrieved": 31,
        "hard": 31,
        "temperature": 1.5,
        "lambda_tags": 5e-4,
        "lambda_mlm": 0.1,
        "lambda_wod": 5e-4,
        "lambda_woc": 5e-4,
    },
    "flickr-large-1": RELEASE
    | {
        "size": "large",
        "phases": ["tags=1"],
        "steps": 5000,
        "batch_size": 32,
        "lr": 5e-5,
        "retrieved": 23,
        "hard": 23,
        "temperature": 2.0,
        "lambda_tags": 1e-3,
        "lambda_mlm": 0.05,
        "test_images": 0,
    },
    "flickr-large-2": RELEASE
    | {
        "size": "large",
        "phases": ["dc=1"],
        "steps": 1500,
        "batch_size": 32,
        "lr": 1e-5,
        "retrieved": 23,
        "hard": 23,
        "temperature": 1.5,
        "lambda_tags": 5e-4,
        "lambda_mlm": 0.05,
        "lambda_wod": 5e-4,
        "lambda_woc": 5e-4,
    },
    # Warm-ups from a published BERT, after which the schedules above go on from its best.pt.
    "bert-coco": {
        "phases": ["warmup=1"],
        "steps": 21_000,
        "warmup_batch_size": 16,
        "accumulate": 8,
        "warmup_lr": 1e-4,
        "dropout": 0.1,
        "score_batch": 2048,
        "val_images": 1000,
        "validations": 10,
        "test_images": 0,
    },
    "bert-flickr30k": {
        "phases": ["warmup=1"],
        "steps": 6000,
        "warmup_batch_size": 16,
        "accumulate": 8,
        "warmup_lr": 1e-4,
        "dropout": 0.1,
        "score_batch": 2048,
        "val_images": 1000,
        "validations": 10,
        "test_images": 0,
    },
    # From a small BERT to the end, within two hours of two cores.
    "bert-flickr8k": {
        "phases": ["warmup=40", "dc=1"],
        "steps": 4100,
        "warmup_batch_size": 8,
        "warmup_lr": 2e-4,
        "lr": 1e-4,
        "dropout": 0.1,
        "val_images": 50,
        "validations": 4,
        "test_images": 200,
    },
    # The paper's way of writing, on the scenes: both stages, the own picture, nothing barred.
    "paper": {
        "phases": ["warmup=10", "tags=2", "dc=1"],
        "writer_sees": "own",
        "temperature": 1.5,
        "truth_threshold": 1.0,
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
MAY_CHANGE = {"device", "dtype", "score_batch", "probe", "save_scores", "test_images"}


def parse_arguments(argv=None):
    """The command line, read twice: what it names, be it a recipe, a run to resume or a checkpoint,
    is laid under it as defaults."""
    parser = make_parser()
    given = parser.parse_args(argv)
    check_tasks(parser, given)
    make_paths_absolute(given)
    parser.set_defaults(**RECIPES.get(given.recipe, {}))
    if given.quick:
        parser.set_defaults(**QUICK)
    if given.resume:
        parser.set_defaults(**arguments_of_run(given))
    elif given.eval or given.checkpoint:
        parser.set_defaults(**arguments_of_checkpoint(given))
    parser.set_defaults(out=default_out(given))
    args = parser.parse_args(argv)
    make_paths_absolute(args)
    check_values(parser, args)
    if args.resume:
        check_resumed(parser, args)
    elif not (args.eval or args.checkpoint):
        check_phases(parser, args)
    return args


def make_paths_absolute(args):
    """So that a checkpoint can be used from another folder. For the folder of a BERT its weights
    stand, so that the name alone tells what --init is; see `is_bert`."""
    for name in ("root", "features", "phrases", "init"):
        if getattr(args, name) is not None:
            setattr(args, name, os.path.abspath(getattr(args, name)))
    if args.data.lower().endswith(".json"):
        args.data = os.path.abspath(args.data)
    if args.init and os.path.isdir(args.init):
        files = [os.path.join(args.init, name) for name in BERT_FILES]
        args.init = next(filter(os.path.isfile, files), files[0])


def arguments_of_run(given):
    """With which the run in --out began."""
    file = Path(given.out or default_out(given)) / "run.json"
    advice = "begin the run anew, without --resume"
    if not file.is_file():
        raise InputError(f"{file}: no such file, so there is no run to resume; {advice}")
    with datasets.one_line_errors(file, advice):
        return known_arguments({**datasets.read_json(file, advice)["arguments"]}, given)


def arguments_of_checkpoint(given):
    """With which the run of a checkpoint began, as far as they are of use to look at it; official
    weights have none."""
    arguments = load_checkpoint(given.eval or given.checkpoint).get("arguments", {})
    dropped = {"init", "device", "probe", "save_scores", "test_images"}
    if given.data not in ("scenes", arguments.get("data")):
        dropped |= {"root", "features", "phrases", "skip_bad"}  # where the old data lay
    kept = {name: value for name, value in arguments.items() if name not in dropped}
    return known_arguments(kept, given)


def known_arguments(arguments, given):
    """Those that belong to a run; an option of another version is left out."""
    known = vars(given).keys() - OF_THIS_CALL
    return {name: value for name, value in arguments.items() if name in known}


def default_out(given):
    """A run directory by the name of the data; what a checkpoint is asked for goes to eval/ beside
    it."""
    checkpoint = given.eval or given.checkpoint
    if checkpoint and os.access(Path(checkpoint).parent, os.W_OK):
        return str(Path(checkpoint).parent / "eval")
    return f"runs/{Path(given.data).stem.removeprefix('dataset_')}"


def check_tasks(parser, given):
    """Refuses a command line that asks for several things at once."""
    if bool(given.query or given.image) != bool(given.checkpoint):
        parser.error("--query or --image and --checkpoint go together")
    if given.query and given.image:
        parser.error("--query and --image exclude each other")
    if given.quick and given.recipe:
        parser.error("--quick and --recipe exclude each other: both set the schedule")
    tasks = [name for name in ("quick", "resume", "eval", "checkpoint") if getattr(given, name)]
    if len(tasks) > 1:
        parser.error(f"--{' and --'.join(tasks)} exclude each other")


def check_resumed(parser, args):
    """Refuses options that would change what a resumed run learns."""
    for name in sorted(vars(args).keys() - OF_THIS_CALL - MAY_CHANGE):
        before = parser.get_default(name)
        if getattr(args, name) != before:
            parser.error(f"--resume keeps --{name.replace('_', '-')} {before}; leave it out")


def check_values(parser, args):
    """Refuses values that do not fit each other."""
    if args.init in [os.path.join(os.path.abspath(args.out), name) for name in EARLIER]:
        parser.error("--init lies in --out, which a new run empties; give another --out")
    if args.hard > args.maskings * args.refills:
        parser.error(f"--hard {args.hard} exceeds --maskings x --refills")
    if args.pool < args.batch_size:
        parser.error(f"--pool {args.pool} is smaller than --batch-size")
    if args.data == "scenes" and (args.features or args.phrases or args.skip_bad):
        parser.error("--features, --phrases and --skip-bad are not for the scenes: name the --data")
    if args.accumulate and args.accumulate % WORLD_SIZE:
        parser.error(f"--accumulate {args.accumulate} cannot be shared by {WORLD_SIZE} processes")


def check_phases(parser, args):
    """Refuses a plan of which a part would silently be missing."""
    names = [phase.split("=")[0] for phase in args.phases]
    if len(set(names)) < len(names):
        parser.error(f"--phases {' '.join(args.phases)}: name each phase once")
    plan = plan_phases(args)
    if not plan:
        if not os.path.exists(args.init):
            parser.error(f"--init {args.init}: no such file or folder")
        parser.error("--init leaves out the warm-up, and --phases has no other phase")
    for phase in plan:
        if phase.steps == 0:
            parser.error(f"--steps {args.steps} leaves no step for {phase.name}; raise it")
        if "contrast" in phase.weights and args.warmup_batch_size == 1:
            parser.error("--warmup-batch-size 1 leaves a BERT no wrong pair to learn from; give 8")


# ---- the phases of a run -----------------------------------------------------------------------

WORDS_FIRST = 0.8  # share of a warm-up from scratch with masked words alone, before matching
ALIGN_STEPS = 1000  # of a warm-up from BERT in which regions are aligned with words
BEFORE_MATCHING = ("align", "words")  # parts of a warm-up after which recall says nothing yet


class Phase(NamedTuple):
    """A part of a training run: an optimiser and a rise and fall of the rate of its own. warmup
    replaces the pre-training of UNITER that the paper starts from, and has two parts: words alone
    (from BERT: the alignment of regions with words), then matching. tags has the negatives,
    retrieved and written; dc the two tasks on the written, too."""

    name: str  # warmup, tags or dc
    part: str  # align, words or matching in the warm-up, else as `name`
    steps: int
    weights: dict  # {term of the objective: its weight, above 0}
    peak_lr: float


def plan_phases(args):
    """The phases of a run, in order. Which terms of the objective are on is decided here."""
    shares = {}
    for phase in args.phases:
        name, share = phase.split("=")
        shares[name] = float(share)
    if args.init and not is_bert(args.init):
        shares.pop("warmup", None)  # these weights have it behind them
    steps = {}
    begin = end = 0
    for name, share in shares.items():
        end += share
        steps[name] = round(args.steps * end / sum(shares.values())) - begin
        begin += steps[name]

    tags = {"hard": 1.0, "tags": args.lambda_tags, "mlm": args.lambda_mlm}
    dc = {**tags, "wod": args.lambda_wod, "woc": args.lambda_woc}
    plan = plan_warmup(args, steps["warmup"]) if "warmup" in steps else []
    if "tags" in steps:
        plan.append(Phase("tags", "tags", steps["tags"], positive_weights(tags), args.lr))
    if "dc" in steps:
        plan.append(Phase("dc", "dc", steps["dc"], positive_weights(dc), args.lr))
    return plan


def plan_warmup(args, steps):
    """The two parts of a warm-up; of a single step the second one alone."""
    from_bert = is_bert(args.init)
    first = min(ALIGN_STEPS, steps // 4) if from_bert else round(WORDS_FIRST * steps)
    first = min(first, max(steps - 1, 0))
    if from_bert:
        plan = [Phase("warmup", "align", first, {"align": 1.0}, ALIGN_LR)]
        matching = {"mlm": 0.5, "contrast": 1.0}
    else:
        plan = [Phase("warmup", "words", first, {"mlm": 1.0}, args.warmup_lr)]
        matching = {"mlm": 1.0, "itm": 1.0}
    steps -= first
    plan.append(Phase("warmup", "matching", steps, matching, args.warmup_lr))
    return plan[1:] if first == 0 else plan


def positive_weights(weights):
    """Those above 0: a term that is off costs no work."""
    return {term: weight for term, weight in weights.items() if weight > 0}


def learning_rate(phase, step):
    """Up in the first tenth of a phase, then down to nearly 0."""
    rise = (step + 1) / max(0.1 * phase.steps, 1)
    fall = (phase.steps - step) / max(0.9 * phase.steps, 1)
    return phase.peak_lr * min(rise, fall)


def passes_of_step(phase, args):
    """How often a batch of a step encodes a pair, three times as much with gradient: by this the
    log foretells when a run ends."""
    if phase.part == "align":
        return 0  # it runs no layer
    if phase.name == "warmup":
        B = args.warmup_batch_size
        passes = {"mlm": 3 * B, "itm": 3 * 3 * B + B * WRONG_PARTNERS, "contrast": 3 * B * B}
        return sum(passes[term] for term in phase.weights)
    B = args.batch_size
    scored = 2 * B * args.pool
    learnt = B * (1 + 2 * args.retrieved) + B * args.maskings
    if phase.weights.keys() & TERMS_OF_WRITTEN:
        asked_twice = args.writer_sees == "other" and args.truth_threshold < 1
        scored += B * args.maskings * (args.refills + (2 if asked_twice else 1))
        learnt += B * args.hard
    return scored + 3 * learnt


# ---- the run -----------------------------------------------------------------------------------

FORMAT = 4  # of our checkpoints
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
        try:
            import fcntl  # Windows has none

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as fault:
            text = f"{folder}: another run is writing here; wait for it, or give another --out"
            raise InputError(text) from fault
        except (ImportError, OSError):
            say(f"{folder}: cannot be locked here; make sure that no other run writes into it")
        yield  # the lock ends with the file, however the program ends


def load_checkpoint(path):
    """The dictionary in a file: a checkpoint of ours, or official weights {name: tensor}."""
    if Path(path).is_dir():
        raise InputError(f"{path}: a folder, not a checkpoint; the folder of a BERT is for --init")
    try:
        state = read_weights(path)
    except ValueError as fault:
        raise InputError(f"{path}: neither a checkpoint nor official weights") from fault
    if not isinstance(state, dict):
        raise InputError(f"{path}: neither a checkpoint nor official weights")
    if "arguments" in state and state.get("format") != FORMAT:
        text = f"a checkpoint of format {state.get('format')}, not {FORMAT}"
        raise InputError(f"{path}: {text}; it belongs to another version of this program")
    if "arguments" in state:
        with datasets.one_line_errors(path, "damaged: take another checkpoint"):
            Progress(**state["progress"])
            if not isinstance(state["arguments"]["data"], str):
                raise ValueError("its arguments name no data")
    return state


def seed_of(*numbers):
    """One seed out of several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def broadcast_parameters(model):
    """All processes go on with the weights of the first one."""
    if WORLD_SIZE > 1:
        for parameter in model.parameters():
            dist.broadcast(parameter.data, src=0)


def average_gradients(model):
    """Each process has drawn a batch of its own, with its own mean of each term; all go on with the
    mean of their gradients. A head without a term has none, in every process."""
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
    best_step: int = 0  # at which that was
    corrects: bool = False  # whether word correction has begun to learn
    warmup: dict | None = None  # what the report after the warm-up said
    warmup_of: str = ""  # which data that report was of
    log: list = field(default_factory=list)  # rows of log.csv
    skipped_in_a_row: int = 0  # steps whose gradient was not finite, up to this one
    seconds: float = 0.0  # of training, validations and reports


class Trainer:
    """A training run: the model, where it stands, and all that its checkpoints hold. last.pt is
    written at every line of the log, and --resume goes on from there; best.pt holds the best
    weights of the phase. Of several processes (torchrun) each draws its own batches.

    Each batch and each step draws from a seed of its own, made of the run's seed and their number.
    So a resumed run goes on exactly without keeping the state of any generator, and the next batch
    can be made in the background while this one is learnt."""

    def __init__(self, args, data, model, settings):
        self.args = args
        self.data = data
        self.model = model
        self.settings = settings
        self.out = Path(args.out)
        self.plan = plan_phases(args)
        self.batches = (args.accumulate or WORLD_SIZE) // WORLD_SIZE  # of a step, in this process
        self.progress = Progress()
        self.history = []  # {name: scalar} of each batch since the last line of the log
        self.skipped = 0  # steps since then
        self.saved = time.time()  # the last checkpoint
        self.warn = functools.cache(lambda text: say(f"warning: {text}"))  # once
        self.writer = None  # another network than the model, if it is frozen
        self.background = ThreadPoolExecutor(1)
        self.next_batch = None  # what the background makes: its number, and its promise
        broadcast_parameters(model)
        self.val = evaluate.first_images(data, self.val_split(), args.val_images)
        self.score_val(evaluate.first_images(data, self.val_split(), 8))  # how long does it take?

    def begin(self, corrects):
        """The first phase. corrects: whether the weights have learnt word correction already."""
        self.progress.corrects = corrects
        self.begin_phase()
        self.save("last.pt")

    def begin_phase(self):
        """AdamW anew, fused where torch can; no weight decay on biases and LayerNorm."""
        phase = self.plan[self.progress.phase]
        if "woc" in phase.weights and not self.progress.corrects:
            # As in stage 2 of the release: the head begins as the masked LM that has been tuned.
            self.model.correction.load_state_dict(self.model.mlm.state_dict())
            self.progress.corrects = True
        parameters = list(self.model.parameters())
        decayed = {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.01}
        others = {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0}
        fused = self.settings.device != "mps"
        self.optimizer = torch.optim.AdamW([decayed, others], betas=(0.9, 0.98), fused=fused)
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
                lr = learning_rate(phase, progress.step)
                self.optimise(phase, lr)
                progress.step += 1
                if progress.step % self.args.log_every == 0 or progress.step in (1, phase.steps):
                    self.report(phase, lr, time.time() - line_began)
                    improved = self.validates(phase) and self.validate()
                    if progress.skipped_in_a_row == 0:
                        self.save("last.pt")
                    if improved:
                        self.save("best.pt")
                    line_began = time.time()
            self.end_phase(phase)
            self.save("last.pt")

    def optimise(self, phase, lr):
        """One step of the optimiser."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.model.zero_grad(set_to_none=True)  # also where a phase does not learn
        for n in range(self.batches):
            batch = self.take_batch(phase, n)
            torch.manual_seed(seed_of(1, *self.number_of_batch(n)))  # of dropout and drawn words
            loss, values = self.take_step(phase, batch)
            (loss / self.batches).backward()
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
                f" {phase.name} (not finite: {', '.join(faulty) or 'the gradient alone'}):"
                " lower the learning rate; last.pt is from before"
            )

    def take_step(self, phase, batch):
        """The step that belongs to a phase."""
        if "align" in phase.weights:
            return align_step(self.model, batch, self.settings)
        if "contrast" in phase.weights:
            return contrast_step(self.model, batch, phase.weights, self.settings)
        if phase.name == "warmup":
            return warmup_step(self.model, batch, phase.weights, self.settings)
        writer = self.writer or self.model
        return tailored_step(self.model, writer, batch, phase.weights, self.settings)

    def number_of_batch(self, n):
        """What tells the n-th batch of this step from all others of the run."""
        return self.args.seed, RANK, self.progress.phase, self.progress.step, n

    def take_batch(self, phase, n):
        """The n-th batch of this step, on the device, while the background begins the next one."""
        number = self.number_of_batch(n)
        if self.next_batch is None or self.next_batch[0] != number:
            self.next_batch = number, self.background.submit(self.draw_batch, phase, number)
        batch = self.next_batch[1].result().to(self.settings.device)
        following = (
            (*number[:4], n + 1) if n + 1 < self.batches else (*number[:3], number[3] + 1, 0)
        )
        self.next_batch = following, self.background.submit(self.draw_batch, phase, following)
        return batch

    def draw_batch(self, phase, number):
        """A batch by its number, on the CPU."""
        args = self.args
        rng = torch.Generator().manual_seed(seed_of(0, *number))
        if phase.part == "align":
            captions = draw_pairs(self.data.splits["train"], ALIGN_BATCH, rng)
            shape = (1, 1, WARMUP_MASK_PROBABILITY, "own")  # no masked words are needed
        elif phase.name == "warmup":
            captions = draw_pairs(self.data.splits["train"], args.warmup_batch_size, rng)
            shape = (len(captions), 1, WARMUP_MASK_PROBABILITY, "own")
        else:
            captions = draw_pairs(self.data.splits["train"], args.pool, rng)
            B = min(args.batch_size, len(captions))
            shape = (B, args.maskings, MASK_PROBABILITY, args.writer_sees)
        batch = make_batch(self.data, "train", captions, *shape, rng)
        if self.settings.device.startswith("cuda"):
            return Batch(*(tensor.pin_memory() for tensor in batch))
        return batch

    def report(self, phase, lr, seconds):
        """A row of the log and a line on the screen: means over the steps since the last one, which
        took so many seconds. Of several processes the first one speaks, of its own batches."""
        steps = len(self.history) // self.batches
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
        if phase.part != "align":  # whose steps run no layer, so that they foretell nothing
            minutes = self.seconds_left(seconds / steps) / 60
            shown.append(f"{minutes:.1f} min left")
        say("  ".join(shown))

    def seconds_left(self, seconds_of_step):
        """Until the run ends, with all its validations and reports, by the pace of this phase's
        steps and of the last validation."""
        args = self.args
        current = self.plan[self.progress.phase]
        seconds_of_pass = seconds_of_step / passes_of_step(current, args)
        passes = -self.progress.step * passes_of_step(current, args)
        pairs = self.pairs_of(final_split(self.data), args.test_images)
        for phase in self.plan[self.progress.phase :]:
            passes += phase.steps * passes_of_step(phase, args)
            if phase.part not in BEFORE_MATCHING:
                left = phase.steps - (self.progress.step if phase == current else 0)
                validations = args.validations * left / phase.steps
                pairs += validations * self.pairs_of(self.val_split(), args.val_images)
            if phase.part == "matching":
                pairs += self.pairs_of(final_split(self.data), args.test_images)
        return passes * seconds_of_pass + pairs * self.seconds_of_pair

    def pairs_of(self, split, count=None):
        """Pairs of captions and images that are scored of a split, or of its first images."""
        content = self.data.splits[split]
        images = len(content.images[:count])
        return images * images * len(content.captions) // len(content.images)

    def validates(self, phase):
        """Whether a line of the log comes with a validation: --validations times a phase and at its
        end, but not before matching is learnt, nor before new heads have learnt."""
        if phase.part in BEFORE_MATCHING:
            return False
        step = self.progress.step
        learnt = 0.5 * phase.steps if phase.part == "dc" else 0
        lines = max(1, phase.steps // self.args.log_every // self.args.validations)
        due = step > learnt and step % (lines * self.args.log_every) == 0
        return due or step == phase.steps

    def validate(self):
        """Recall on val; returns whether it is the best of the phase, whose weights are kept."""
        metrics = evaluate.retrieval_metrics(*self.score_val(self.val))
        say(f"  validation: RSum {metrics['rsum']:.1f}")
        for name in ("rsum", "tr_r1", "ir_r1"):
            self.progress.log[-1][f"val_{name}"] = round(metrics[name], 2)
        if metrics["rsum"] <= self.progress.best.get("rsum", -1):
            return False
        self.progress.best = metrics
        self.progress.best_step = self.progress.step
        return True

    def val_split(self):
        return "val" if "val" in self.data.splits else "train"

    def score_val(self, part):
        """Scores of val (of train, if there is none) in a part of the data, and each caption's
        image; tells the pace of it, too."""
        began = time.time()
        scores, owner = scores_of(self.model, part, self.val_split(), self.settings)
        self.seconds_of_pair = (time.time() - began) / scores.numel()
        return scores, owner

    def end_phase(self, phase):
        """The phase's best weights go on, not its last."""
        if phase.part == "align":
            scores = alignment_scores(self.model, self.val, self.val_split(), self.settings)
            say(f"  by the cosine: RSum {evaluate.retrieval_metrics(*scores)['rsum']:.1f}")
        if phase.part not in BEFORE_MATCHING:  # which are not validated
            if RANK == 0:
                self.model.load_state_dict(load_checkpoint(self.out / "best.pt")["model"])
            broadcast_parameters(self.model)
        if phase.part == "matching":
            part = reported(self.data, self.args)
            self.progress.warmup, _, _ = test_report(self.model, part, self.args, self.settings)
            self.progress.warmup_of = describe_data(self.args, part)
        self.progress.phase += 1
        self.progress.step = 0
        if self.progress.phase < len(self.plan):
            self.progress.best = {}
            self.begin_phase()

    def save(self, name):
        """best.pt holds what --eval and --init need; last.pt also what --resume needs, and the log
        lies beside it."""
        self.progress.seconds += time.time() - self.saved
        self.saved = time.time()
        if RANK > 0:
            return
        rows = self.progress.log
        names = list(dict.fromkeys(key for row in rows for key in row))
        lines = [",".join(str(row.get(key, "")) for key in names) for row in rows]
        write_text(self.out / "log.csv", "\n".join([",".join(names), *lines]) + "\n")
        state = {
            "format": FORMAT,
            "arguments": vars(self.args),
            "config": vars(self.model.config),
            "tokens": self.data.tokenizer.tokens,
            "model": self.model.state_dict(),
            "progress": vars(self.progress),
            "processes": WORLD_SIZE,
        }
        if name == "last.pt":
            state["optimizer"] = self.optimizer.state_dict()
            state["writer"] = self.writer.state_dict() if self.writer else None
        with datasets.one_line_errors(self.out / name, "is there space on the disk?"):
            datasets.write_atomically(self.out / name, lambda part: torch.save(state, part))

    def resume(self, state):
        """Takes up where last.pt stands, to the same result as without the break."""
        if state["processes"] != WORLD_SIZE:
            text = f"{state['processes']} processes before, {WORLD_SIZE} now"
            self.warn(f"{text}: the run goes on with other batches than it would have had")
        self.progress = Progress(**state["progress"])
        self.model.load_state_dict(state["model"])
        if self.progress.phase == len(self.plan):
            return  # only the report is left
        self.begin_phase()
        self.optimizer.load_state_dict(state["optimizer"])
        if self.writer:
            self.writer.load_state_dict(state["writer"])
        if self.progress.best and self.progress.best_step == self.progress.step:
            self.save("best.pt")  # the break may have come before it was written


# ---- evaluation, search: see evaluate.py for what they call -------------------------------------


def scoring(settings):
    """What every function of evaluate.py that runs the network takes."""
    return {
        "device": settings.device,
        "dtype": settings.dtype,
        "score_batch": settings.score_batch,
    }


def scores_of(model, data, split, settings, file=None):
    """Score matrix (C, I) of a split, and each caption's image. file: where the matrix is kept, so
    that an interrupted report goes on."""
    owner = data.splits[split].image_of_caption
    captions = torch.arange(len(owner))
    shared = WORLD_SIZE > 1 and len(owner) >= WORLD_SIZE
    part = captions.tensor_split(WORLD_SIZE)[RANK] if shared else captions
    kept = None
    if file is not None and not shared:
        kept = evaluate.open_scores(file, model, data, split, settings.dtype)
    scores = evaluate.score_matrix(
        model, data, split, captions=part, scores=kept, **scoring(settings)
    )
    if shared:
        parts = [scores] * WORLD_SIZE
        dist.all_gather_object(parts, scores)
        scores = torch.cat(parts)
        if file is not None and RANK == 0:
            evaluate.write_scores(file, scores.numpy())
    return scores, owner


def alignment_scores(model, data, split, settings):
    """How well captions and images of a split find each other by the alignment alone, before any
    layer is run: cosines (C, I) and each caption's image."""
    owner = data.splits[split].image_of_caption
    words = []
    regions = []
    with evaluate.inference(model, settings.device):
        for captions in torch.arange(len(owner)).split(500):
            ids = data.text(split, captions).to(settings.device)
            words.append(mean_words(model, ids, settings.tokenizer))
        for part in torch.arange(len(data.splits[split].images)).split(500):
            features, boxes, region_mask = (x.to(settings.device) for x in data.image(split, part))
            pictures = model.prepare_regions(features, boxes, region_mask)
            regions.append(mean_regions(pictures, boxes))
        cosines = F.normalize(torch.cat(words)) @ F.normalize(torch.cat(regions)).T
    return cosines.cpu(), owner


def final_split(data):
    """The split that is reported and searched: test, or the nearest there is."""
    return next(name for name in ("test", "val", "train") if name in data.splits)


def tailored_examples(model, data, split, args, settings, count):
    """Generated negatives of the first caption of some images, by the seed: a dict on the CPU of
    captions and images (N,), originals (N, T), sentences (N, H, T), valid (N, H)."""
    # One image of each family of the scenes, so that a writer's other picture is no near-twin.
    last = len(data.splits[split].images) - 1
    images = torch.linspace(0, last, min(last + 1, count)).long()
    captions, _ = data.splits[split].caption_ranges(images)  # the first of each
    rng = torch.Generator().manual_seed(args.seed)
    shape = (len(captions), args.maskings, MASK_PROBABILITY, args.writer_sees)
    batch = make_batch(data, split, captions, *shape, rng).to(settings.device)
    torch.manual_seed(args.seed)
    with evaluate.inference(model, settings.device, settings.dtype):
        prepared = model.prepare_regions(batch.features, batch.boxes, batch.region_mask)
        made = write_negatives(model, model, prepared, batch, settings)
    return {
        "captions": captions,
        "images": images,
        "originals": batch.input_ids[:, : made.sentences.size(2)].cpu(),
        "sentences": made.sentences.cpu(),
        "valid": made.valid.cpu(),
    }


def reported(data, args):
    """The data with no more of the final split than --test-images says."""
    if not args.test_images:
        return data
    return evaluate.first_images(data, final_split(data), args.test_images)


def describe_data(args, part):
    """What a report is of, as a text: reports of equal texts can be compared."""
    split = final_split(part)
    name = Path(args.data).name
    if args.data == "scenes":
        name += f" of seed {args.seed}, {args.scenes}"
    return f"{name}, {split}, {len(part.splits[split].images)} images"


def test_report(model, data, args, settings, file=None):
    """Everything measured on the final split -> metrics, scores (C, I), generated examples; without
    any images {}, None, None. file: see `scores_of`."""
    if args.test_images == 0:
        return {}, None, None
    split = final_split(data)
    scores, _ = scores_of(model, data, split, settings, file=file)
    examples = tailored_examples(model, data, split, args, settings, args.analyse_images)
    options = scoring(settings)
    metrics = evaluate.report(model, data, split, scores, examples, args.seed, **options)
    return metrics, scores, examples


class Published(NamedTuple):
    """Files of published tests, read before a run begins."""

    probes: list  # of evaluate.Probe
    positives: evaluate.Positives | None


def read_published(args):
    probes = evaluate.read_probes(args.probe)
    return Published(probes, evaluate.read_positives(args.root) if args.root else None)


def finish(args, data, model, settings, progress, published):
    """Evaluates on the test split: a table, metrics.json, then what may fail yet: published tests
    and pictures. progress: a Progress."""
    out = Path(args.out)
    split = final_split(data)
    file = out / "scores.npy" if args.save_scores else None
    part = reported(data, args)
    if progress.warmup_of != describe_data(args, part):
        progress.warmup = None  # it speaks of other images
    metrics, scores, examples = test_report(model, part, args, settings, file)
    if RANK > 0:
        return
    if metrics:
        say(evaluate.headline(data, split, args.test_images))
        say("\n".join(evaluate.table(metrics, progress.warmup or {})))
    write_metrics(args, settings, split, metrics, progress)
    found = probe_metrics(published.probes, model, data, scores if part is data else None, settings)
    if published.positives and metrics:
        found |= evaluate.positives_metrics(published.positives, scores, part, split)
    if found:
        say("\n".join(evaluate.table(found, {})))
        write_metrics(args, settings, split, metrics | found, progress)
    draw_pictures(args, part, model, settings, progress, scores, examples)
    say(f"in {out}: " + ", ".join(sorted(path.name for path in out.iterdir() if path.is_file())))


def probe_metrics(probes, model, data, scores, settings):
    """What the probes say. scores: (C, I) of the whole final split, or None."""
    found = {}
    for probe in probes:
        options = scoring(settings)
        metrics = evaluate.probe_metrics(probe, model, data, final_split(data), scores, **options)
        if not metrics:
            say(f"{probe.name}: none of its images has features here; left out")
        found |= metrics
    return found


def draw_pictures(args, part, model, settings, progress, scores, examples):
    """curves.png of a training run; negatives.png of a report, if there was one."""
    out = Path(args.out)
    if progress.log and not args.eval:
        evaluate.draw_curves(out / "curves.png", progress.log)
    if examples:
        options = scoring(settings) | {"seed": args.seed}
        path = out / "negatives.png"
        split = final_split(part)
        evaluate.draw_negatives(path, model, part, split, scores, examples, **options)


def write_metrics(args, settings, split, metrics, progress):
    """metrics.json of a training run, eval.json of a checkpoint."""
    record = {
        "test": metrics,
        "split": split,  # of which "test" and "warmup" speak: another one where there is no test
        "val": progress.best,
        "warmup": progress.warmup,
        "arguments": vars(args),
        "seconds": round(progress.seconds, 1),
        "seed": args.seed,
        "versions": {
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "device": settings.device,
            "dtype": str(settings.dtype),
        },
    }
    name = "eval.json" if args.eval else "metrics.json"
    write_text(Path(args.out) / name, json.dumps(record, indent=1))


def choose_hardware(args):
    """The device and the dtype that --device and --dtype come to on this machine."""
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    device = next(name for name in has if has[name]) if args.device == "auto" else args.device
    if not has[device]:
        raise InputError(f"--device {device}: no such device here; use --device cpu")
    if device == "cuda":
        number = int(os.environ.get("LOCAL_RANK", 0))
        if number >= torch.cuda.device_count():
            raise InputError(f"process {number} has no GPU: there are {torch.cuda.device_count()}")
        device = f"cuda:{number}"
        torch.cuda.set_device(device)
    dtype = fast_dtype(device) if args.dtype == "auto" else getattr(torch, args.dtype)
    return device, dtype


def settings_of(args, tokenizer, device, dtype):
    return Settings(
        tokenizer=tokenizer,
        device=device,
        dtype=dtype,
        margin=args.margin,
        retrieved=args.retrieved,
        hard=args.hard,
        refills=args.refills,
        temperature=args.temperature,
        truth_threshold=args.truth_threshold,
        score_batch=args.score_batch,
    )


def is_bert(path):
    """Whether a file of weights is a published BERT's, by the name that they all have."""
    return path is not None and Path(path).name in BERT_FILES


def load_start(path):
    """What --init names: a dictionary as of `load_checkpoint`; of a BERT {"bert": content of its
    config.json, "weights": {name: tensor}}."""
    if not is_bert(path):
        return load_checkpoint(path)
    with datasets.one_line_errors(path, "give the folder of a published BERT"):
        bert, weights, _ = read_bert(Path(path).parent)
    return {"bert": bert, "weights": weights}


def make_model(args, data, source, state):
    """The network: as `state` holds it, what the file `source` says; a new one if that is None."""
    vocab_size = len(data.tokenizer.tokens)
    feature_size = data.regions.feature_size
    if source is None:
        sizes = {"vocab_size": vocab_size, "feature_size": feature_size}
        config = Config.preset(args.size or "tiny", dropout=args.dropout, **sizes)
        if args.max_text > config.max_positions:
            raise InputError(f"--max-text {args.max_text}: this size has {config.max_positions}")
        return TagsDC(config)
    with datasets.one_line_errors(source, "weights, vocab.txt and features must belong together"):
        if "bert" in state:
            config = Config.from_bert(state["bert"], feature_size, args.dropout, vocab_size)
        elif "config" in state:
            config = Config(**state["config"] | {"dropout": args.dropout})
        else:
            config = Config.from_uniter(state, None, args.dropout, vocab_size)
        check_config(args, config, vocab_size, feature_size)
        model = TagsDC(config)
        if "config" in state:
            if not all(values.isfinite().all() for values in state["model"].values()):
                raise ValueError("holds numbers that are not finite")
            model.load_state_dict(state["model"])
            return model
        if "bert" in state:
            report = model.load_bert(state["weights"])
        else:
            report = model.load_uniter(state)
    for what, names in report.items():
        some = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
        say(f"{source}: {what} {len(names)} entries: {some}")
    return model


def check_config(args, config, vocab_size, feature_size):
    """ValueError unless the network of --init fits the data and the options."""
    if config.vocab_size != vocab_size:
        raise ValueError(f"its vocab_size is {config.vocab_size}, the data's {vocab_size}")
    if config.feature_size != feature_size:
        raise ValueError(f"its feature_size is {config.feature_size}, the data's {feature_size}")
    if args.size and config.hidden != PRESETS[args.size]["hidden"]:
        raise ValueError(f"its hidden size is {config.hidden}, not that of --size {args.size}")
    if args.max_text > config.max_positions:
        raise ValueError(f"it reads {config.max_positions} tokens, not --max-text {args.max_text}")


def load_all(args, source, state):
    """What a run works on -> data, model. state: what the file `source` holds, or {} for None. The
    first process converts the region features, for hours if need be, and the others wait."""
    if RANK > 0:
        wait_for_the_first()
    data = read_data(args, source, state)
    if RANK == 0 and WORLD_SIZE > 1:
        dist.barrier()
    for note in data.notes:
        say(note)
    return data, make_model(args, data, source, state)


def read_data(args, source, state):
    """What --data names, with the vocabulary that the weights in `state` know, if there are any."""
    store, *elsewhere = stores_of(args, source)
    tokens = state.get("tokens")
    vocab = Path(args.init).parent / "vocab.txt" if is_bert(args.init) else None
    if args.data == "scenes":
        if vocab and tokens is None:
            tokens = datasets.read_lines(vocab)
        scenes = (args.seed, args.scenes)
        return datasets.load_scenes(*scenes, store, tokens, elsewhere, args.max_text)
    trains = not (args.eval or args.checkpoint)
    return datasets.load_data(
        args.data,
        args.root,
        args.features,
        args.phrases,
        args.skip_bad,
        tokens,
        store,
        elsewhere,
        vocab=vocab,
        vocab_size=vocabulary_of(state),
        max_text=args.max_text,
        needed=("train",) if trains else (),
    )


def stores_of(args, source):
    """Where region features are kept: one place for all the runs that lie beside each other, and
    places where an earlier run may have left them."""
    name = Path(args.data).stem
    if args.data == "scenes":
        name = f"scenes-seed{args.seed}-{'-'.join(map(str, args.scenes))}"
    folders = [Path(args.out).absolute().parent]
    for path in filter(None, (source, args.init)):
        folders += [Path(path).absolute().parent, Path(path).absolute().parent.parent]
    return [folder / "data" / name for folder in folders]


def vocabulary_of(state):
    """How many tokens published weights know; None for our own, which bring their tokens."""
    if not state or "tokens" in state:
        return None
    config = Config.from_bert(state["bert"], 1) if "bert" in state else Config.from_uniter(state)
    return config.vocab_size


def wait_for_the_first():
    """Until the first process has the region features; if it ends, this one does, too, quietly."""
    try:
        dist.barrier()
    except RuntimeError:
        raise SystemExit(2) from None


EARLIER = "last.pt best.pt metrics.json scores.npy scores.npy.of negatives.png curves.png".split()


def source_of(args):
    """The file with which a training run begins or goes on, or None, and whether it goes on."""
    out = Path(args.out)
    if args.resume and (out / "last.pt").exists():
        return out / "last.pt", True
    if args.resume and (out / "best.pt").exists():
        raise InputError(f"{out}: last.pt is missing, so this run cannot go on; give another --out")
    if args.recipe not in (None, "paper") and not args.init:
        raise InputError(f"--recipe {args.recipe} tunes a network: give its weights by --init")
    return args.init, False


def train(args, device, dtype, published):
    """A training run from its first step or, with --resume, from its last checkpoint."""
    if not args.init:
        args.size = args.size or "tiny"
    source, goes_on = source_of(args)
    state = load_start(source) if source else {}
    data, model = load_all(args, source, state)
    model.recompute = args.recompute
    settings = settings_of(args, data.tokenizer, device, dtype)
    if not goes_on:
        replace_earlier_run(args)
    trainer = Trainer(args, data, model.to(device), settings)
    if goes_on:
        trainer.resume(state)
    else:
        trainer.begin(learnt_correction(state))
    del state  # with its optimiser three times as large as the model
    batches = trainer.batches * WORLD_SIZE
    say(f"tags and dc learn from {batches} x {args.batch_size} anchor pairs a step")
    try:
        trainer.train()
    except (InputError, generate.NotFiniteError, torch.cuda.OutOfMemoryError) as fault:
        if RANK > 0:  # the first process, which speaks for all otherwise, does not know of it
            print(f"process {RANK}: {fault}", file=sys.stderr)
        raise
    finish(args, data, model, settings, trainer.progress, published)


def replace_earlier_run(args):
    """Deletes what an earlier run left in --out, now that this one has all it needs, and notes with
    which arguments this one begins."""
    if RANK == 0:
        for name in EARLIER:
            (Path(args.out) / name).unlink(missing_ok=True)
    write_text(Path(args.out) / "run.json", json.dumps({"arguments": vars(args)}))


def learnt_correction(state):
    """Whether the weights of a file have learnt word correction already."""
    if "progress" in state:
        return state["progress"]["corrects"]
    return any("correction_output" in str(name) for name in state.get("model", state))


def run(args):
    """Trains, evaluates or searches."""
    device, dtype = choose_hardware(args)
    published = read_published(args)
    if WORLD_SIZE > 1:
        waiting = 8 * dist.constants.default_pg_timeout
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=waiting)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    with only_run_in(out) if RANK == 0 else contextlib.nullcontext():
        if args.eval or args.checkpoint:
            use_checkpoint(args, device, dtype, published)
        else:
            train(args, device, dtype, published)


def use_checkpoint(args, device, dtype, published):
    """Evaluates a checkpoint, or searches with it."""
    source = args.eval or args.checkpoint
    state = load_checkpoint(source)
    progress = Progress(**state.get("progress", {}))
    data, model = load_all(args, source, state)
    del state  # with an optimiser it is three times as large as the model
    settings = settings_of(args, data.tokenizer, device, dtype)
    model.to(device)
    if args.eval:
        finish(args, data, model, settings, progress, published)
        return
    out = Path(args.out)
    asked = (final_split(data), args.query, args.image, out / "search.png")
    for score, text in evaluate.search(model, data, *asked, **scoring(settings)):
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
        if RANK == 0:
            print("interrupted; a run goes on with --resume", file=sys.stderr)
        return 128 + stop.args[0]
    except torch.cuda.OutOfMemoryError:
        fault = (
            "out of memory: --recompute, or lower --score-batch, --batch-size or"
            " --warmup-batch-size, --maskings"
        )
    except generate.NotFiniteError as error:
        fault = (
            f"the network has diverged ({error}): lower the learning rate, or raise --temperature"
        )
    except (InputError, OSError) as error:
        fault = " ".join(str(error).split())
    except RuntimeError as error:
        if WORLD_SIZE == 1 or "onnection" not in str(error):
            raise
        fault = "another process has ended"  # and has said why
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if RANK == 0:
        print(f"tagsdc.py: error: {fault}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
