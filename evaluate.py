"""What a model is worth: recall, the paper's analyses, altered captions, probes, pictures.

Letters: C captions, I images, N sentences or pairs, H negatives of a caption, T text positions.
Every mask: True = real. All shares are in percent, and a tie counts against the model. `options`
are device, dtype (float32, or bfloat16 by autocast) and score_batch (pairs in one pass)."""

import contextlib
import dataclasses
import math
import random
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw

import data as datasets
from data import InputError, Split, describes, image_key
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
    matches = owner[:, None] == torch.arange(scores.size(1), device=owner.device)  # (C, I)
    result = {}
    for way, lines, right in (("tr", scores.T, matches.T), ("ir", scores, matches)):
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
            features, boxes, region_mask = (x.to(device) for x in data.image(split, columns))
            hidden = model(text, features, boxes, text != tokenizer.pad_id, region_mask)
            words = hidden[:, : ids.size(1)]
            logits = model.match(hidden)
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
    content = dataclasses.replace(data.splits[split], captions=texts)
    sentences = dataclasses.replace(data, splits={split: content})
    scores = torch.empty(len(texts))
    for image in images.unique():
        rows = (images == image).nonzero()[:, 0]
        found = score_matrix(model, sentences, split, captions=rows, images=image[None], **options)
        scores[rows] = found[:, 0]
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
    """Captions of the embedded world with one word changed for another of its kind, so that the
    oracle says they are false; each once for every kind of word in it, where that can be done.
    Returns captions (N,) long, ascending, texts [N] and the kinds [N] of the changed words."""
    content = data.splits[split]
    captions = []
    texts = []
    kinds = []
    for c, caption in enumerate(content.captions):
        scene = content.scenes[content.image_of_caption[c]]
        rng = random.Random(f"{seed} {c}")
        for kind, words_of_kind in datasets.KINDS.items():
            false = false_sentences(caption, words_of_kind, scene)
            if false:
                captions.append(c)
                texts.append(rng.choice(false))
                kinds.append(kind)
    return torch.tensor(captions, dtype=torch.long), texts, kinds


def false_sentences(caption, words_of_kind, scene):
    """All false sentences that one word of a kind changed for another makes of a caption."""
    words = caption.split()
    false = []
    for n, word in enumerate(words):
        for other in words_of_kind if word in words_of_kind else ():
            text = " ".join([*words[:n], other, *words[n + 1 :]])
            if describes(text, scene) is False:
                false.append(text)
    return false


def altered_metrics(model, data, split, scores, seed=0, **options):
    """Of altered_captions; {} where there is no oracle. scores: (C, I) of the split.
    one_word_wrong, and by kind one_word_wrong_colour, ...: captions that score above their altered
    version. oversensitivity: true paraphrases ("B right of A" for "A left of B") that do not.
    altered_tr_r1: text R@1 with the altered captions of an image in its gallery (RoCOCO)."""
    content = data.splits[split]
    if not content.scenes:
        return {}
    captions, texts, kinds = altered_captions(data, split, seed)
    if not texts:
        return {}
    images = content.image_of_caption[captions]
    wrong = score_sentences(model, data, split, texts, images, **options)
    won = scores[captions, images] > wrong
    metrics = {"one_word_wrong": share(won)}
    for kind in sorted(set(kinds)):
        metrics[f"one_word_wrong_{kind}"] = share(won[[other == kind for other in kinds]])

    paraphrases = [datasets.paraphrase(content.captions[c]) for c in captions]
    kept = [n for n, text in enumerate(paraphrases) if text]
    paraphrases = [paraphrases[n] for n in kept]
    right = score_sentences(model, data, split, paraphrases, images[kept], **options)
    metrics["oversensitivity"] = share(~(right > wrong[kept]))

    is_own = content.image_of_caption[:, None] == torch.arange(scores.size(1))  # (C, I)
    best = scores.where(is_own, -math.inf).amax(0)  # (I,)
    rival = scores.where(~is_own, -math.inf).amax(0).scatter_reduce(0, images, wrong, "amax")
    return metrics | {"altered_tr_r1": share((best > rival)[is_own.any(0)])}


# ---- probes: published fine-grained tests ------------------------------------------------------


class Probe(NamedTuple):
    """A file of SugarCrepe, VALSE's FOIL or RoCOCO."""

    name: str  # of the file, which goes before its metrics
    items: list  # [(image's name, true captions, false captions)]


def read_probe(path):
    """A probe's file, known by its fields -> Probe. Raises InputError."""
    content = datasets.read_json(path)
    items = []
    with datasets.one_line_errors(path, "a file of SugarCrepe, VALSE's FOIL or RoCOCO is expected"):
        for item in content.values() if isinstance(content, dict) else content:
            name = item.get("image") or item.get("filename") or item["image_file"]
            true = item["caption"]
            if isinstance(true, list):
                true, false = true[:-5], true[-5:]
            else:
                true, false = [true], [item.get("foil") or item["negative_caption"]]
            if not true or not all(isinstance(t, str) and t for t in (name, *true, *false)):
                raise ValueError(f"the item of {name} lacks a text")
            items.append((name, true, false))
        if not items:
            raise ValueError("it is empty")
    return Probe(Path(path).stem, items)


def probe_metrics(probe, model, data, split, **options):
    """A probe on those of its images that have features.
    SugarCrepe and VALSE's FOIL: "pairwise", the share of true captions that score above their false
    ones, and word_metrics of the "same_length" items whose texts have as many word pieces.
    RoCOCO: text recall "tr_r1" .., and "altered_tr_r1" .. with the altered captions in the gallery.
    All: "items" used, "total", "held_out" (with an image of this split), after the file's name."""
    row_of = {image_key(name): row for row, name in enumerate(data.regions.names)}
    rows = []
    texts = []
    owner = []  # of each text its number in rows; a false caption has none
    for name, true, false in probe.items:
        if image_key(name) in row_of:
            owner += [len(rows)] * len(true) + [-1] * len(false)
            texts += true + false
            rows.append(row_of[image_key(name)])
    held_out = np.isin(rows, data.splits[split].rows).sum()
    result = {"items": len(rows), "total": len(probe.items), "held_out": int(held_out)}
    content = Split(rows, np.array(rows), texts, torch.tensor(owner))
    probe_data = dataclasses.replace(data, splits={"probe": content})
    if len(texts) > 2 * len(rows):  # not pairs: RoCOCO
        result |= gallery_metrics(model, probe_data, **options)
    elif rows:
        result |= pair_metrics(model, probe_data, **options)
    return {f"{probe.name}_{name}": round(value, 4) for name, value in result.items()}


def gallery_metrics(model, probe_data, **options):
    """RoCOCO: text recall without the altered captions, which have no owner, and with them."""
    owner = probe_data.splits["probe"].image_of_caption
    scores = score_matrix(model, probe_data, "probe", **options)
    result = {}
    for prefix, used in (("", owner >= 0), ("altered_", owner >= -1)):
        metrics = retrieval_metrics(scores[used], owner[used])
        result |= {f"{prefix}{name}": metrics[name] for name in ("tr_r1", "tr_r5", "tr_r10")}
    return result


def pair_metrics(model, probe_data, **options):
    """SugarCrepe, FOIL: the texts are true and false in turn, two of each image."""
    count = len(probe_data.splits["probe"].captions)
    ids = probe_data.text("probe", torch.arange(count))
    images = torch.arange(count) // 2
    logits, suspicion, corrections = judge_words(model, probe_data, "probe", ids, images, **options)
    real = ids != probe_data.tokenizer.pad_id
    same_length = (real[::2] == real[1::2]).all(1).nonzero()[:, 0]
    result = {"pairwise": share(logits[::2] > logits[1::2]), "same_length": len(same_length)}
    wrong = 2 * same_length + 1
    right = 2 * same_length
    if len(wrong):
        result |= word_metrics(suspicion[wrong], corrections[wrong], ids[wrong], ids[right])
    return result


# ---- more positives than COCO's own: ECCV Caption and CxC --------------------------------------


class Positives(NamedTuple):
    """The files of ECCV Caption and CxC. Ids are COCO's, as texts."""

    caption_ids: list  # of the test split; those of an image in the order of its captions
    image_of_caption: dict  # {caption: image}
    tables: dict  # {"eccv_tr": {image: {captions}}, "eccv_ir": {caption: {images}}, "cxc_tr" ..}


def read_positives(root):
    """The files of ECCV Caption, which lie somewhere below a folder -> Positives; None where there
    are none. Raises InputError."""
    with datasets.one_line_errors(root, "the files of ECCV Caption must be whole"):
        for path in sorted(Path(root).glob("**/coco_test_ids.npy")):
            owners = path.with_name("original_caption_to_image.json")
            if not owners.is_file():
                continue
            owners = {key: str(images[0]) for key, images in datasets.read_json(owners).items()}
            caption_ids = [str(i) for i in np.load(path, allow_pickle=False).tolist()]
            owners = {key: owners[key] for key in caption_ids}
            tables = {}
            for name in ("eccv", "cxc"):
                for way, kind in (("tr", "image_to_caption"), ("ir", "caption_to_image")):
                    file = path.with_name(f"{name}_{kind}.json")
                    table = datasets.read_json(file) if file.is_file() else {}
                    table = {query: set(map(str, right)) for query, right in table.items()}
                    tables[f"{name}_{way}"] = table
            return Positives(caption_ids, owners, tables)
    return None


def positives_metrics(positives, scores, data, split):
    """precision_at_r on the positives of ECCV Caption and CxC. scores: (C, I) of COCO's test split.
    Returns {"eccv_tr_map_at_r", "eccv_tr_rprecision", "eccv_tr_r1", "eccv_tr_queries", ...}."""
    owner = data.splits[split].image_of_caption
    images = {image_key(name): i for i, name in enumerate(data.splits[split].images)}
    # COCO's caption ids -> our numbers: an image's ids come in the order of its captions.
    remaining = {image: (owner == i).nonzero()[:, 0].tolist() for image, i in images.items()}
    captions = {}
    for caption in positives.caption_ids:
        of_image = remaining.get(positives.image_of_caption[caption])
        if of_image:
            captions[caption] = of_image.pop(0)
    result = {}
    for name, table in positives.tables.items():
        if name.endswith("tr"):
            result |= table_metrics(name, table, scores.T, images, captions)
        else:
            result |= table_metrics(name, table, scores, captions, images)
    return result


def table_metrics(name, table, scores, queries, items):
    """The means of precision_at_r over the queries of a table, {query: {positives}}."""
    found = []
    for query, positives in table.items():
        right = [items[positive] for positive in positives if positive in items]
        if query in queries and right:  # R counts all positives, as in the official code
            right = torch.tensor(right)
            found.append(precision_at_r(scores[queries[query]], right, len(positives)))
    if not found:
        return {}
    values = [*(100 * torch.stack(found).mean(0)).tolist(), len(found)]
    measures = ("map_at_r", "rprecision", "r1", "queries")
    return {f"{name}_{measure}": round(value, 4) for measure, value in zip(measures, values)}


def precision_at_r(scores, right, count):
    """mAP@R, R-Precision and R@1 of one query -> (3,). scores: (items,). right: (n,) long, those
    positives that are among the items. R = count, all positives."""
    hits = scores[right].sort(descending=True).values
    nth = torch.arange(1, len(right) + 1)
    ahead = (~(scores < hits[:, None])).sum(1) - (~(hits < hits[:, None])).sum(1)  # wrong ones
    hit = (ahead + nth <= count).double()
    precision = hit * nth / (ahead + nth)
    return torch.stack([precision.sum() / count, hit.sum() / count, (ahead[0] == 0).double()])


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
        caption = examples["captions"][n]
        for label, c in (("caption", caption), ("retrieved", hardest)):
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
        query_split = dataclasses.replace(content, captions=[known_words(data.tokenizer, query)])
        query_data = dataclasses.replace(data, splits={split: query_split})
        scores = score_matrix(model, query_data, split, **options)[0]
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
