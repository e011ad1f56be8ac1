"""What a model is worth: recall, the paper's analyses, altered captions, pictures.

Letters: C captions, I images, N sentences or pairs, H negatives of a caption, T text positions.
Every mask: True = real. All shares are in percent, and a tie counts against the model. `options`
are device, dtype (float32, or bfloat16 by autocast) and score_batch (pairs in one pass)."""

import contextlib
import dataclasses
import math
import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

import data as datasets
from data import InputError, describes
from model import autocast

# ---- recall ------------------------------------------------------------------------------------


def retrieval_metrics(scores, image_of_caption):
    """Recall of text retrieval (tr: the image asks) and image retrieval (ir: the caption asks).
    scores: (C, I) float; nan counts against the query, as a tie does. image_of_caption: (C,) long,
    in any order; -1 = a caption of no image, which is only in the way of others.
    Returns {"tr_r1", "tr_r5", "tr_r10", "ir_r1", "ir_r5", "ir_r10", "rsum"}."""
    scores, owner = torch.as_tensor(scores).float(), torch.as_tensor(image_of_caption)
    if scores.dim() != 2 or owner.shape != scores.shape[:1] or owner.max() >= scores.size(1):
        raise ValueError(f"scores (C, I), owners (C,) < I wanted: {scores.shape}, {owner.shape}")
    own = owner[:, None] == torch.arange(scores.size(1), device=owner.device)  # (C, I)
    result = {}
    for way, lines, right in (("tr", scores.T, own.T), ("ir", scores, own)):
        best = lines.where(right, -math.inf).amax(1, keepdim=True)
        ahead = ~(lines < best) & ~right  # the wrong items not below the best right one
        rank = ahead.sum(1)[right.any(1)]
        for k in (1, 5, 10):
            result[f"{way}_r{k}"] = 100 * (rank < k).double().mean().item()
    return result | {"rsum": sum(result.values())}


def fold_metrics(scores, image_of_caption, folds=5):
    """retrieval_metrics of successive fifths of the images with their captions, averaged."""
    results = []
    for images in torch.arange(scores.size(1)).tensor_split(folds):
        rows = torch.isin(image_of_caption, images)
        owner = image_of_caption[rows] - images[0]
        results.append(retrieval_metrics(scores[rows][:, images], owner))
    return {name: sum(result[name] for result in results) / folds for name in results[0]}


# ---- scores ------------------------------------------------------------------------------------


@contextlib.contextmanager
def inference(model, device, dtype=torch.float32):
    """Eval mode and no gradient; not torch.inference_mode: what is mined goes on into training."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), autocast(device, dtype):
            yield
    finally:
        model.train(training)


def equal_groups(sizes):
    """Splits 0 .. N-1 into groups of equal sizes (N,), 256 at most."""
    return [group for n in sizes.unique() for group in (sizes == n).nonzero()[:, 0].split(256)]


def score_matrix(
    model, data, split, device="cpu", dtype=torch.float, score_batch=128, captions=None, images=None
):
    """Matching logits of every caption of a split with every image of it -> (C, I) on the CPU.
    captions, images: (C,), (I,) long, those wanted, in that order; None = all."""
    content = data.splits[split]
    captions = torch.as_tensor(range(len(content.captions)) if captions is None else captions)
    images = torch.as_tensor(range(len(content.images)) if images is None else images)
    lengths = (data.text(split, captions) != data.tokenizer.pad_id).sum(1)
    counts = torch.as_tensor(data.regions.counts[content.rows[images.numpy()]])
    # A GPU gets pairs of one length, unmasked; on a CPU score_pairs packs those of any length.
    packed = torch.device(device).type == "cpu"
    row_groups, column_groups = (equal_groups(0 * n if packed else n) for n in (lengths, counts))
    scores = torch.empty(len(captions), len(images))
    with inference(model, device, dtype):
        for columns in column_groups:
            features, boxes, mask = (x.to(device) for x in data.image(split, images[columns]))
            pictures = model.prepare_regions(features, boxes, mask if packed else None)
            for rows in row_groups:
                ids = data.text(split, captions[rows]).to(device)
                texts = model.prepare_text(ids, ids != data.tokenizer.pad_id if packed else None)
                pairs = torch.arange(len(rows) * len(columns), device=device)
                row = pairs // len(columns)
                column = pairs % len(columns)
                logits = model.score_pairs(texts, row, pictures, column, score_batch)
                # The only place where the result of a GPU is waited for.
                scores[rows[:, None], columns] = logits.float().view(len(rows), -1).cpu()
    return scores


def judge_words(model, data, split, ids, images, device="cpu", dtype=torch.float, score_batch=128):
    """What the heads say of sentences (N, T) long, padded, with images (N,) long of a split.
    Returns, on the CPU, matching logits (N,), and of each word (N, T) how sure discrimination is
    that it was replaced (a difference of logits, -inf at no word) and the likeliest original."""
    tokenizer = data.tokenizer
    no_words = torch.tensor([tokenizer.cls_id, tokenizer.sep_id, tokenizer.pad_id], device=device)
    found = []
    with inference(model, device, dtype):
        for text, columns in zip(ids.to(device).split(score_batch), images.split(score_batch)):
            texts = model.prepare_text(text, text != tokenizer.pad_id)
            pictures = model.prepare_regions(*(x.to(device) for x in data.image(split, columns)))
            pairs = torch.arange(len(text), device=device)
            hidden = model.encode_pairs(texts, pairs, pictures, pairs)
            words = hidden[:, : ids.size(1)]
            logits = model.match(hidden) + model.similarity(texts, pairs, pictures, pairs)
            replaced, original = model.discriminate(words).float().unbind(-1)
            suspicion = (replaced - original).nan_to_num()
            suspicion = suspicion.masked_fill(torch.isin(text, no_words), -math.inf)
            # All words at once times a large vocabulary would fill the memory.
            corrections = [model.correct(part).argmax(-1) for part in words.split(16)]
            judged = (logits.float(), suspicion, torch.cat(corrections))
            found.append([part.cpu() for part in judged])
    return [torch.cat(parts) for parts in zip(*found)]


def score_sentences(model, data, split, texts, images, **options):
    """Matching logits (N,) of sentences, N strings, with images (N,) long of a split."""
    asked = dataclasses.replace(data.splits[split], captions=texts)
    asked = dataclasses.replace(data, splits={split: asked})
    scores = torch.empty(len(texts))
    for image in images.unique():
        own = (images == image).nonzero()[:, 0]
        found = score_matrix(model, asked, split, captions=own, images=image[None], **options)
        scores[own] = found[:, 0]
    return scores


# ---- generated negatives: do the heads find and mend the wrong word? ---------------------------


def share(hits):
    """How many of bools are True, in percent; 0 of none."""
    return 100 * hits.sum().item() / max(hits.numel(), 1)


def word_metrics(suspicion, corrections, sentences, originals):
    """Word discrimination and correction (3.4) over all words at once.
    suspicion, corrections: (N, T), of judge_words. sentences, originals: (N, T) long; a word that
    differs is replaced. wod_auc: the probability that a replaced word is more suspicious than an
    original one, a tie is half. wod_most_suspicious: altered sentences whose most suspicious word
    is a replaced one. woc_accuracy: replaced words whose original is the likeliest correction."""
    words = suspicion > -math.inf
    replaced = (sentences != originals) & words
    original = (sentences == originals) & words
    high = suspicion[replaced]
    low = suspicion[original].sort().values
    below = torch.searchsorted(low, high) + torch.searchsorted(low, high, right=True)
    pairs = len(high) * len(low)
    most_replaced = suspicion.masked_fill(~replaced, -math.inf).amax(1)
    most_original = suspicion.masked_fill(~original, -math.inf).amax(1)
    return {
        "wod_auc": 50 * below.sum().item() / pairs if pairs else 50.0,
        "wod_most_suspicious": share((most_replaced > most_original)[replaced.any(1)]),
        "woc_accuracy": share((corrections == originals)[replaced]),
    }


def example_metrics(model, data, split, examples, **options):
    """word_metrics of generated negatives, their mean score (synthetic_score), sentences_repaired,
    wrong ones that are true once the most suspicious word is corrected (the original, if there is
    no oracle), and by the oracle fair_negatives (false), true_ and ungrammatical_negatives.
    examples: {"images": (N,), "originals": (N, T), "sentences": (N, H, T), "valid": (N, H)}."""
    row = examples["valid"].nonzero()[:, 0]
    if not len(row):
        return {}
    sentences = examples["sentences"][examples["valid"]]
    originals = examples["originals"][row]
    images = examples["images"][row]
    logits, suspicion, corrections = judge_words(model, data, split, sentences, images, **options)
    metrics = {"synthetic_score": logits.sigmoid().mean().item()}
    metrics |= word_metrics(suspicion, corrections, sentences, originals)
    most = suspicion.argmax(1, keepdim=True)
    repaired = sentences.scatter(1, most, corrections.gather(1, most))
    scenes = data.splits[split].scenes
    if not scenes:
        return metrics | {"sentences_repaired": share((repaired == originals).all(1))}

    def ask_oracle(sentences):
        texts = [data.tokenizer.decode(ids) for ids in sentences.tolist()]
        return [describes(text, scenes[image]) for text, image in zip(texts, images)]

    verdicts = ask_oracle(sentences)
    for name, verdict in {"fair": False, "true": True, "ungrammatical": None}.items():
        metrics[f"{name}_negatives"] = 100 * verdicts.count(verdict) / len(verdicts)
    after = zip(verdicts, ask_oracle(repaired))
    right = [now is True for before, now in after if before is not True]
    return metrics | {"sentences_repaired": share(torch.tensor(right))}


# ---- altered captions: is every word read? -----------------------------------------------------


def altered_captions(data, split, seed=0):
    """Captions with one word changed for another of its kind, so that they are false (most likely,
    of photographs); each once for every kind of word in it, where that can be done.
    Returns captions (N,) long, ascending, texts [N] and the kinds [N] of the changed words."""
    content = data.splits[split]
    alter = alter_scene if content.scenes else alter_photograph
    forms = None if content.scenes else training_words(data, split)
    altered = {}  # {(caption, kind): text}
    for c in range(len(content.captions)):
        rng = random.Random(f"{seed} {c}")
        altered |= {(c, kind): text for kind, text in alter(content, c, rng, forms).items()}
    captions = torch.tensor([c for c, _ in altered], dtype=torch.long)
    return captions, [*altered.values()], [kind for _, kind in altered]


def alter_scene(content, c, rng, _):
    """One caption -> {kind: text that is false by the oracle}."""
    scene = content.scenes[content.image_of_caption[c]]
    words = content.captions[c].split()
    altered = {}
    for kind, own in datasets.KINDS.items():
        false = []
        for n, word in enumerate(words):
            for other in own if word in own else ():
                text = " ".join([*words[:n], other, *words[n + 1 :]])
                if describes(text, scene) is False:
                    false.append(text)
        if false:
            altered[kind] = rng.choice(false)
    return altered


def alter_photograph(content, c, rng, forms):
    """The same without an oracle: a word that stands in no caption of the image is taken for false.
    It is drawn from those of the same form, as often as training has it."""
    same = (content.image_of_caption == content.image_of_caption[c]).nonzero()[:, 0]
    own = datasets.split_words(" ".join(content.captions[n] for n in same).lower())
    words = datasets.split_words(content.captions[c])
    altered = {}
    found = datasets.content_words(content.captions[c])
    for n, word, form in rng.sample(found, len(found)):
        drawn = [rng.choice(forms.get(form, [word])) for _ in range(20)]
        false = [other for other in drawn if other not in own]
        if false:
            altered[form[0]] = " ".join([*words[:n], false[0], *words[n + 1 :]])
    return altered


def training_words(data, split):
    """The known content words of train, or else of this split -> {form: [every occurrence]}."""
    forms = {}
    for caption in data.splits.get("train", data.splits[split]).captions:
        for _, word, form in datasets.content_words(caption):
            if data.tokenizer.unk_id not in data.tokenizer.pieces(word):
                forms.setdefault(form, []).append(word)
    return forms


def altered_metrics(model, data, split, scores, seed=0, **options):
    """Of altered_captions. scores: (C, I) of the split.
    one_word_wrong, and by kind one_word_wrong_colour, ...: captions that score above their altered
    version. oversensitivity: true paraphrases ("B right of A" for "A left of B", scenes alone) that
    do not. altered_tr_r1: text R@1 with the altered captions of an image in its gallery (RoCOCO).
    """
    content = data.splits[split]
    captions, texts, kinds = altered_captions(data, split, seed)
    if not texts:
        return {}
    images = content.image_of_caption[captions]
    wrong = score_sentences(model, data, split, texts, images, **options)
    won = scores[captions, images] > wrong
    metrics = {"one_word_wrong": share(won)}
    for kind in sorted(set(kinds)):
        metrics[f"one_word_wrong_{kind}"] = share(won[[other == kind for other in kinds]])
    if content.scenes:
        told = [datasets.paraphrase(content.captions[c]) for c in captions]
        kept = [n for n, text in enumerate(told) if text]
        told = [told[n] for n in kept]
        right = score_sentences(model, data, split, told, images[kept], **options)
        metrics["oversensitivity"] = share(~(right > wrong[kept]))
    own = content.image_of_caption[:, None] == torch.arange(scores.size(1))  # (C, I)
    best = scores.where(own, -math.inf).amax(0)  # (I,)
    rival = scores.where(~own, -math.inf).amax(0).scatter_reduce(0, images, wrong, "amax")
    return metrics | {"altered_tr_r1": share((best > rival)[own.any(0)])}


# ---- pictures ----------------------------------------------------------------------------------

WIDTH = 1120
INK, GREY = (35, 38, 45), (125, 128, 135)
RULE = (220, 222, 226)
ORANGE, GREEN = (204, 80, 0), (0, 130, 80)


def draw_image(data, split, number):
    """A scene, or the boxes of an image's regions, 168 x 168."""
    content = data.splits[split]
    if content.scenes:
        return datasets.draw(content.scenes[number]).resize((168, 168))
    sheet = Image.new("RGB", (168, 168), RULE)
    _, boxes, _ = data.image(split, [number])
    for n, box in enumerate(167 * boxes[0, :, :4]):
        ImageDraw.Draw(sheet).rectangle(box.tolist(), outline=(INK, ORANGE, GREEN, GREY)[n % 4])
    return sheet


def draw_rows(path, data, split, rows):
    """rows: [(number of an image or None, [(label, text or [(word, colour)])])], one below the
    other, with a thin rule between them."""
    sheet = Image.new("RGB", (WIDTH, 1500 * len(rows)), "white")
    pen = ImageDraw.Draw(sheet)
    top = 0
    for number, lines in rows:
        y = top + 16
        if number is not None:
            sheet.paste(draw_image(data, split, number), (16, y))
        for label, words in lines:
            pen.text((204, y + 3), label, GREY, font_size=15)
            words = [(word, INK) for word in words.split()] if isinstance(words, str) else words
            x = 350
            for word, colour in words:
                width = pen.textlength(word, font_size=18)
                if x + width > WIDTH - 16:  # goes on in the next line
                    x, y = 350, y + 28
                pen.text((x, y), word, colour, font_size=18)
                x += width + 6
            y += 28
        top = max(y, top + 192 if number is not None else 0) + 10
        pen.line((0, top - 1, WIDTH, top - 1), RULE)
    sheet.crop((0, 0, WIDTH, top)).save(path)


def draw_negatives(path, model, data, split, scores, examples, count=6, **options):
    """For some images the caption, the hardest retrieved one and three generated ones, corrected.
    scores: (C, I) of the split. examples: as for example_metrics, and "captions" (N,)."""
    content, tokens = data.splits[split], data.tokenizer.tokens
    legend = [("replaced word", ORANGE), ("    most suspicious word", INK), ("(correction)", GREEN)]
    rows = [(None, [("legend", legend)])]
    for n in torch.linspace(0, len(examples["images"]) - 1, count).long().unique():
        image = examples["images"][n]
        line = scores[:, image].sigmoid()
        hardest = line.masked_fill(content.image_of_caption == image, -1).argmax()
        lines = []
        own = examples["captions"][n]
        for label, c in (("caption", own), ("retrieved", hardest)):
            lines.append((f"{label}  {line[c]:.2f}", content.captions[c]))
        written = examples["sentences"][n][examples["valid"][n]]
        for sentence in written[:3]:
            judged = judge_words(model, data, split, sentence[None], image[None], **options)
            logit, suspicion, corrections = (part[0] for part in judged)
            words = []
            for t in (suspicion > -math.inf).nonzero()[:, 0]:
                colour = INK if sentence[t] == examples["originals"][n, t] else ORANGE
                words.append((tokens[sentence[t]], colour))
                if t == suspicion.argmax():
                    words.append((f"({tokens[corrections[t]]})", GREEN))
            lines.append((f"generated  {logit.sigmoid():.2f}", words))
        rows.append((image, lines))
    draw_rows(path, data, split, rows)


# ---- all together ------------------------------------------------------------------------------


def report(model, data, split, scores, examples, seed=0, **options):
    """Everything measured on a split -> {metric: value}. scores: (C, I) of the whole split.
    examples: as for example_metrics."""
    owner = data.splits[split].image_of_caption
    metrics = retrieval_metrics(scores, owner)
    if data.name == "coco" and scores.size(1) == 5000:
        metrics |= {f"1k_{name}": value for name, value in fold_metrics(scores, owner).items()}
    metrics |= example_metrics(model, data, split, examples, **options)
    metrics |= altered_metrics(model, data, split, scores, seed, **options)
    return {name: round(value, 4) for name, value in metrics.items()}


def table(metrics, warmup):
    """Lines of a table: name, value after the warm-up if there was one, value at the end."""
    lines = [f"{'':32}{'warm-up' if warmup else '':>10}{'final':>10}"]
    for name, value in metrics.items():
        before = f"{warmup[name]:.2f}" if name in warmup else ""
        lines.append(f"{name:32}{before:>10}{value:10.2f}")
    return lines


def search(model, data, split, query, image, path, **options):
    """Draws and returns what fits a sentence or an image best: [(score, image name or caption)]."""
    content = data.splits[split]
    if query:
        asked = dataclasses.replace(content, captions=[known_words(data.tokenizer, query)])
        asked = dataclasses.replace(data, splits={split: asked})
        scores = score_matrix(model, asked, split, **options)[0]
        names = content.images
        rows = [(None, [("query", query)])]
    elif image in content.images:
        number = content.images.index(image)
        scores = score_matrix(model, data, split, images=[number], **options)[:, 0]
        names = content.captions
        rows = [(number, [("query", image)])]
    else:
        raise InputError(f"--image {image}: none of {content.images[0]}, ... of the {split} split")
    scores = scores.sigmoid()
    best = scores.topk(min(6, len(scores))).indices.tolist()
    for i in best:
        rows.append((i if query else None, [(f"{scores[i]:.2f}", names[i])]))
    draw_rows(path, data, split, rows)
    return [(scores[i].item(), names[i]) for i in best]


def known_words(tokenizer, query):
    """The query without marks that the model does not know; InputError for unknown words."""
    words = datasets.split_words(query)
    known = [word for word in words if tokenizer.unk_id not in tokenizer.encode(word)]
    strange = [word for word in words if word not in known and any(map(str.isalnum, word))]
    if strange or not known:
        strange = ", ".join(strange) or "an empty sentence"
        raise InputError(f"--query: the model does not know {strange}; use words of its vocabulary")
    return " ".join(known)
