"""What a model is worth: scores of all pairs, recall, the paper's analyses, probes on real text, and the pictures.

Letters: C captions, I images, N sentences or pairs, T text positions, V vocabulary. Every mask: True = real.
Recalls and shares are in percent. Nothing here draws a random number, save `one_word_wrong`, which takes a seed.
"""
import contextlib
import dataclasses
import json
import math
import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from data import BACKGROUNDS, COLOURS, PATTERNS, PLURALS, SHAPES, SIZES, InputError, Split, describes, image_key

# ---- recall -------------------------------------------------------------------------------------------------------------


def retrieval_metrics(scores, image_of_caption):
    """Recall of text retrieval (tr: the image asks) and image retrieval (ir: the caption asks), in percent.

    scores: (C, I) float, the larger the better.  image_of_caption: (C,) long, any order, any number of captions an image; -1 = a
    caption of no image, which is only in the way.
    Returns {"tr_r1", "tr_r5", "tr_r10", "ir_r1", "ir_r5", "ir_r10", "rsum"}.
    Ranks are exact: the number of wrong items that score as high as the best right one, or higher; so a tie counts against
    the query, and so does a score that is not a number. An image without a caption asks nothing, but may be found wrongly.
    """
    scores, owner = torch.as_tensor(scores).float(), torch.as_tensor(image_of_caption)
    if scores.dim() != 2 or owner.shape != scores.shape[:1] or scores.numel() == 0:
        raise ValueError(f"scores must be (C, I) and image_of_caption (C,), got {tuple(scores.shape)} and {tuple(owner.shape)}")
    asks, owner = owner >= 0, owner.clamp(min=0)                                         # (C,)
    own = scores.gather(1, owner[:, None])                                               # (C, 1)
    best = own.new_full(scores.shape[1:], float("-inf")).scatter_reduce(0, owner[asks], own[asks, 0], "amax")  # (I,)
    image_rank, text_rank = [], torch.zeros_like(best, dtype=torch.long)
    for block, target in zip(scores.split(1024), own.split(1024)):                       # comparisons of 1024 rows at a time
        image_rank.append((~(block < target)).sum(1) - 1)                                # itself is no wrong item
        text_rank += (~(block < best)).sum(0)
    text_rank -= torch.bincount(owner[asks & ~(own[:, 0] < best[owner])], minlength=len(best))  # nor are its own captions
    text_rank = text_rank[torch.bincount(owner[asks], minlength=len(best)) > 0]
    result = {f"{way}_r{k}": 100 * (rank < k).double().mean().item()
              for way, rank in (("tr", text_rank), ("ir", torch.cat(image_rank)[asks])) for k in (1, 5, 10)}
    return {**result, "rsum": sum(result.values())}


def fold_metrics(scores, image_of_caption, folds=5):
    """retrieval_metrics of each run of I / folds successive images with their own captions, averaged (COCO 1K)."""
    results = []
    for images in torch.arange(scores.size(1)).tensor_split(folds):
        first, end = int(images[0]), int(images[-1]) + 1
        rows = ((image_of_caption >= first) & (image_of_caption < end)).nonzero()[:, 0]
        results.append(retrieval_metrics(scores[rows, first:end], image_of_caption[rows] - first))
    return {key: sum(result[key] for result in results) / folds for key in results[0]}


# ---- scores -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def inference(model, device, dtype=torch.float32):
    """Eval mode without gradient, under autocast when dtype is bfloat16; afterwards every module is in the mode it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.inference_mode(), torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            yield
    finally:
        for module in training:
            module.training = True


def equal_groups(sizes, most):
    """Splits 0 .. N-1 into groups of equal sizes (N,) long, `most` at most in each: yields (size, (n,) long indices)."""
    values, counts = torch.unique(sizes, return_counts=True)
    for size, group in zip(values.tolist(), torch.argsort(sizes, stable=True).split(counts.tolist())):
        for block in group.split(most):
            yield size, block


def score_matrix(model, data, split, device="cpu", dtype=torch.float32, score_batch=128, progress=None, captions=None):
    """Matching logits of every caption of a split with every image of it -> (C, I) float32 on the CPU.

    split: name of the split.  captions: (C,) long, the captions wanted and their order; None = all.
    score_batch: pairs in one pass.  progress: called as progress(pairs done, pairs in all) now and then.
    Pairs of equal caption length and region count go together, so nothing is padded and no score depends on its batch.
    An image is prepared once, a caption once for every thousand images; beside the result itself, memory does not grow.
    """
    content, pad = data.splits[split], data.tokenizer.pad_id
    captions = torch.arange(len(content.captions)) if captions is None else torch.as_tensor(captions)
    images = torch.arange(len(content.images))
    lengths = torch.cat([(data.text(split, block) != pad).sum(1) for block in captions.split(4096)] or [captions])
    counts = torch.as_tensor(data.regions.counts[content.rows])
    scores, done = torch.empty(len(captions), len(images)), 0
    with inference(model, device, dtype):
        for _, columns in equal_groups(counts, 1024):
            features, boxes, _ = data.image(split, images[columns])
            pictures = model.prepare_regions(features.to(device), boxes.to(device))
            for length, rows in equal_groups(lengths, 256):
                texts = model.prepare_text(data.text(split, captions[rows])[:, :length].to(device))
                pairs = torch.arange(len(rows) * len(columns), device=device)
                logits = model.score_pairs(texts, pairs // len(columns), pictures, pairs % len(columns), score_batch)
                scores[rows[:, None], columns] = logits.float().view(len(rows), -1).cpu()
                done += len(pairs)
                if progress:
                    progress(done, scores.numel())
    return scores


def score_sentences(model, data, split, sentences, images, device="cpu", dtype=torch.float32, score_batch=128):
    """Matching logits (N,) of single pairs: sentences (N, T) long, padded, each with its image (N,) long of a split."""
    lengths = (sentences != data.tokenizer.pad_id).sum(1)
    counts = torch.as_tensor(data.regions.counts[data.splits[split].rows[images]])
    scores = torch.empty(len(images))
    with inference(model, device, dtype):
        for key, chosen in equal_groups(lengths * 1000 + counts, score_batch):
            features, boxes, _ = data.image(split, images[chosen])
            texts = model.prepare_text(sentences[chosen, :key // 1000].to(device))
            each = torch.arange(len(chosen), device=device)
            pictures = model.prepare_regions(features.to(device), boxes.to(device))
            scores[chosen] = model.score_pairs(texts, each, pictures, each).float().cpu()
    return scores


# ---- the paper's analyses -----------------------------------------------------------------------------------------------


def judge_words(model, data, split, sentences, images, device="cpu", dtype=torch.float32, batch=64):
    """What the heads say of every word of sentences (N, T) long, padded, each with its image (N,) long of a split.

    Returns word-discrimination logits (N, T, 2), class 0 = replaced, and the likeliest original words (N, T) long.
    """
    discrimination, corrections = [], []
    with inference(model, device, dtype):
        for ids, chosen in zip(sentences.split(batch), images.split(batch)):
            features, boxes, region_mask = (x.to(device) for x in data.image(split, chosen))
            ids = ids.to(device)
            words = model(ids, features, boxes, ids != data.tokenizer.pad_id, region_mask)[:, :ids.size(1)]
            discrimination.append(model.discriminate(words).float().cpu())
            corrections.append(model.correct(words).argmax(-1).cpu())
    return torch.cat(discrimination), torch.cat(corrections)


def word_metrics(discrimination_logits, corrections, sentences, originals, text_mask):
    """Precision and recall of word discrimination, accuracy of word correction, over all words at once, in percent.

    discrimination_logits: (N, T, 2), class 0 = replaced.  corrections: logits (N, T, V), or (N, T) long their best words.
    sentences, originals: (N, T) long.  text_mask: (N, T) bool.
    A word counts as replaced where the sentence differs from the original, as flagged where class 0 is the likelier one.
    Correction is judged at replaced words only. A share of nothing is 0.
    """
    replaced = (sentences != originals) & text_mask
    flagged = (discrimination_logits[..., 0] > discrimination_logits[..., 1]) & text_mask
    found = (replaced & flagged).sum().item()
    words = corrections.argmax(-1) if corrections.dim() == 3 else corrections
    return {"wod_precision": 100 * found / max(flagged.sum().item(), 1),
            "wod_recall": 100 * found / max(replaced.sum().item(), 1),
            "woc_accuracy": 100 * (words == originals)[replaced].sum().item() / max(replaced.sum().item(), 1)}


def own_words(data, texts, images=(), rows=()):
    """The data set with one split, "own", that holds these texts, and images of the store by name and row."""
    owner = torch.zeros(len(texts), dtype=torch.long)
    return dataclasses.replace(data, splits={"own": Split(list(images), np.array(rows, np.int64), texts, owner)})


KINDS = [SHAPES, tuple(PLURALS), tuple(COLOURS), tuple(SIZES), PATTERNS, tuple(BACKGROUNDS), ("two", "three", "four"),
         ("left", "right"), ("above", "below", "inside", "touching"), ("colour", "shape", "size", "pattern")]


def one_word_wrong(data, split, seed=0):
    """For captions of the scenes: the same with one word changed for another of its kind, so that it is false.

    The oracle says that each changed caption parses and is not so; captions for which no change does that are left out.
    Returns (captions (N,) long, input_ids (N, T) long, padded).
    """
    content, captions, texts = data.splits[split], [], []
    for c, (caption, owner) in enumerate(zip(content.captions, content.image_of_caption.tolist())):
        words = caption.split()
        options = [(i, other) for i, word in enumerate(words) for kind in KINDS if word in kind
                   for other in kind if other != word]
        random.Random(f"{seed} {c}").shuffle(options)
        for i, other in options:
            changed = " ".join([*words[:i], other, *words[i + 1:]])
            if describes(changed, content.scenes[owner]) is False:
                captions.append(c), texts.append(changed)
                break
    return torch.tensor(captions), own_words(data, texts).text("own", torch.arange(len(texts)))


def pairwise_accuracy(model, data, split, captions, wrong_ids, **options):
    """Share of captions (N,) that score above their wrong versions (N, T) with their own image; ties count as failures.

    options: device, dtype, score_batch as for score_sentences.
    """
    images = data.splits[split].image_of_caption[captions]
    right = score_sentences(model, data, split, data.text(split, captions), images, **options)
    wrong = score_sentences(model, data, split, wrong_ids, images, **options)
    return 100 * (right > wrong).double().mean().item()


def false_negative_share(data, split, images, sentences, valid):
    """What the oracle says of generated sentences (N, T) long with images (N,) long, where valid (N,) bool, in percent.

    Returns {"false_negatives": sentences that are true of their image after all, "parse": those that say anything at all}.
    """
    scenes, kept = data.splits[split].scenes, valid.nonzero()[:, 0].tolist()
    truth = [describes(data.tokenizer.decode(sentences[n].tolist()), scenes[images[n]]) for n in kept]
    return {"false_negatives": 100 * truth.count(True) / max(len(truth), 1),
            "parse": 100 * (len(truth) - truth.count(None)) / max(len(truth), 1)}


# ---- probes on real text ------------------------------------------------------------------------------------------------


def _read_json(path):
    try:
        return json.loads(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: no readable JSON ({error})".replace("\n", " ")) from None


def _changed(a, b):
    """The stretch (first, end) of list b that is not as in list a: what lies between a common start and a common end."""
    first, last = (next((k for k, (x, y) in enumerate(zip(*lists)) if x != y), 0) for lists in ((a, b), (a[::-1], b[::-1])))
    return first, max(len(b) - last, first + 1)


def run_probe(path, model, data, **options):
    """One fine-grained test on real text, recognised by the shape of its JSON, on those images that have features.

    SugarCrepe {id: {filename, caption, negative_caption}} and FOIL as VALSE has it {id: {image_file, caption, foil}}: "pairwise",
    the share of true captions that score above their false ones. FOIL also: "detection", how often the word that the WoD head
    finds most likely replaced belongs to the foil, and "correction", how often the WoC head puts the right words in its place
    (never, if they have another number of word pieces). RoCOCO [{image, caption: [true ..., five altered]}]: text recall
    "tr_r1" .., and "altered_tr_r1" .. with the altered captions in the gallery too. All in percent.
    Also "probe", "items" used, "total" in the file, "seen" = items whose image is one of the training split.
    options: device, dtype, score_batch as for score_matrix.  Raises InputError for any other file.
    """
    content = _read_json(path)
    entries = list(content.values()) if isinstance(content, dict) else content
    for probe, fields in (("sugarcrepe", ("filename", "caption", "negative_caption")), ("foil", ("image_file", "caption", "foil")),
                          ("rococo", ("image", "caption"))):
        if isinstance(entries, list) and entries and isinstance(entries[0], dict) and set(fields) <= entries[0].keys():
            break
    else:
        raise InputError(f"{path}: neither SugarCrepe, nor FOIL of VALSE, nor RoCOCO: see the forms in the README")
    kind = list if probe == "rococo" else str
    for i, entry in enumerate(entries):
        if not (isinstance(entry, dict) and all(isinstance(entry.get(field), kind) for field in fields[1:])) or (
                probe == "rococo" and len(entry["caption"]) < 6):
            raise InputError(f"{path} item {i}: {' and '.join(fields[1:])} of {probe} are missing or of the wrong kind")
    found = [(entry, row) for entry in entries if (row := data.regions.row(entry[fields[0]])) is not None]
    trained = set(data.splits["train"].rows.tolist()) if "train" in data.splits else ()
    result = {"probe": probe, "items": len(found), "total": len(entries), "seen": sum(row in trained for _, row in found)}
    if not found:
        return result
    names, rows = [entry[fields[0]] for entry, _ in found], [row for _, row in found]
    if probe == "rococo":
        own = own_words(data, [text for entry, _ in found for text in entry["caption"]], names, rows)
        owner = torch.tensor([i if k < len(entry["caption"]) - 5 else -1 for i, (entry, _) in enumerate(found)
                              for k in range(len(entry["caption"]))])
        scores = score_matrix(model, own, "own", **options)
        true, altered = retrieval_metrics(scores[owner >= 0], owner[owner >= 0]), retrieval_metrics(scores, owner)
        return {**result, **{f"{word}tr_r{k}": metrics[f"tr_r{k}"] for word, metrics in (("", true), ("altered_", altered))
                             for k in (1, 5, 10)}}
    own = own_words(data, [entry[field] for field in fields[1:] for entry, _ in found], names, rows)
    images = torch.arange(len(found))
    right, wrong = (own.text("own", images + start) for start in (0, len(found)))
    result["pairwise"] = 100 * (score_sentences(model, own, "own", right, images, **options)
                                > score_sentences(model, own, "own", wrong, images, **options)).double().mean().item()
    if probe == "foil":
        options.pop("score_batch", None)
        discrimination, corrections = judge_words(model, own, "own", wrong, images, **options)
        replaced, hits, mended = discrimination[..., 0] - discrimination[..., 1], 0, 0
        for i, (a, b) in enumerate(zip(right, wrong)):
            a, b = a[a != own.tokenizer.pad_id].tolist(), b[b != own.tokenizer.pad_id].tolist()
            first, end = _changed(a, b)
            hits += first <= int(replaced[i, 1:len(b) - 1].argmax()) + 1 < end
            mended += len(a) == len(b) and corrections[i, first:end].tolist() == a[first:end]
        result.update(detection=100 * hits / len(found), correction=100 * mended / len(found))
    return result


def eccv_metrics(scores, data, split, folder):
    """mAP@R, R-Precision and R@1 on the positives of ECCV Caption and CxC, in percent; {} where folder lacks their files.

    scores: (C, I) of a COCO test split.  folder: holds {eccv,cxc}_{image_to_caption,caption_to_image}.json, and to tell which
    caption is which, coco_test_ids.npy with original_caption_to_image.json.
    Returns {"eccv_tr_map_at_r", "eccv_tr_rprecision", "eccv_tr_r1", "eccv_ir_...", "cxc_...", "..._queries"}. For a query with R
    positives in the gallery, mAP@R = sum over ranks k <= R that hold a positive of (positives up to k) / k, over R.
    """
    folder, content = Path(folder), data.splits[split]
    if not (folder / "coco_test_ids.npy").is_file():
        return {}
    owner = {int(c): images[0] for c, images in _read_json(folder / "original_caption_to_image.json").items()}
    waiting = {}
    for caption in np.load(folder / "coco_test_ids.npy", allow_pickle=False).tolist():  # an image's captions in our order
        waiting.setdefault(owner.get(caption), []).append(caption)
    column = {int(key): i for i, name in enumerate(content.images) if (key := image_key(name)).isdecimal()}
    row, ids = {}, {i: iter(waiting.get(image, ())) for image, i in column.items()}
    for c, i in enumerate(content.image_of_caption.tolist()):
        if (caption := next(ids.get(i, iter(())), None)) is not None:
            row[caption] = c
    result = {}
    for name in ("eccv", "cxc"):
        for way, asked, queries, gallery, table in (("tr", "image_to_caption", column, row, scores.T),
                                                    ("ir", "caption_to_image", row, column, scores)):
            file, sums = folder / f"{name}_{asked}.json", []
            for query, positives in (_read_json(file) if file.is_file() else {}).items():
                right = torch.tensor(sorted({gallery[p] for p in positives if p in gallery}))
                if int(query) in queries and len(right):
                    line, r = table[queries[int(query)]], len(right)
                    own = line[right].sort(descending=True).values
                    nth = torch.arange(1, r + 1)
                    wrong = (~(line < own[:, None])).sum(1) - (~(own < own[:, None])).sum(1)   # ties count against the query
                    hit = (wrong + nth <= r).double()
                    sums.append(torch.stack(((hit * nth / (wrong + nth)).sum() / r, hit.sum() / r, (wrong[0] == 0).double())))
            if sums:
                means = (100 * torch.stack(sums).mean(0)).tolist()
                result.update({f"{name}_{way}_{key}": mean for key, mean in zip(("map_at_r", "rprecision", "r1"), means)})
                result[f"{name}_{way}_queries"] = len(sums)
    return result


# ---- pictures -----------------------------------------------------------------------------------------------------------

WIDTH, INK, GREY, ORANGE, BLUE, GREEN = 1000, (35, 38, 45), (125, 128, 135), (204, 80, 0), (0, 105, 190), (0, 130, 80)
LINES = [(0, 105, 190), (204, 80, 0), (0, 150, 95), (160, 70, 160), (210, 160, 0), (90, 90, 90)]


def _font(size):
    return ImageFont.load_default(size=size)


def _flow(pen, left, top, right, words, styles=None, size=18):
    """Sets words in lines between left and right and returns the y below. styles: {position: (colour, underlined, note)}."""
    x, y = left, top
    for i, word in enumerate(words):
        colour, underlined, note = (styles or {}).get(i, (INK, False, None))
        width = pen.textlength(word, _font(size))
        room = max(width, pen.textlength(note or "", _font(13)))
        if x > left and x + room > right:
            x, y = left, y + (42 if styles else 26)
        pen.text((x, y), word, colour, _font(size))
        if underlined:
            pen.line((x, y + size + 5, x + width, y + size + 5), BLUE, 2)
        pen.text((x, y + size + 7), note or "", GREEN, _font(13))
        x += room + 6
    return y + (44 if styles else 28)


def _stack(path, strips):
    """Saves strips of equal width one below the other, a thin rule between them."""
    whole = Image.new("RGB", (strips[0].width, sum(strip.height + 1 for strip in strips)), (222, 224, 228))
    y = 0
    for strip in strips:
        whole.paste(strip, (0, y))
        y += strip.height + 1
    whole.save(path)


def _strip(height=900):
    strip = Image.new("RGB", (WIDTH, height), "white")
    return strip, ImageDraw.Draw(strip)


def draw_negatives(path, rows):
    """For some images: the caption, the hardest retrieved negative, and generated ones with what the heads say of them.

    rows: list of {"picture": PIL image, "caption": words, "score": s(I, T) in 0..1, "retrieved": (words, score), "generated":
    [(words, score, replaced, flagged, corrected)]}, the last three a list each, one entry a word: was it replaced (bool), does
    WoD flag it (bool), which word does WoC put back (str, or None for nothing to show).
    """
    strip, pen = _strip(52)
    _flow(pen, 16, 6, WIDTH, ["generated", "sentences:", "replaced word ", "flagged by word discrimination ", "word"],
          {2: (ORANGE, False, None), 3: (INK, True, None), 4: (INK, False, "-> what word correction puts back")})
    strips = [strip]
    for row in rows:
        strip, pen = _strip()
        strip.paste(row["picture"].convert("RGB").resize((168, 168)), (16, 12))
        y, lines = 12, [("caption", row["caption"], row["score"], None), ("retrieved", *row["retrieved"], None)]
        for words, score, replaced, flagged, corrected in row["generated"]:
            lines.append(("generated", words, score, {
                i: (ORANGE if changed else INK, flag, f"-> {word}" if word else None)
                for i, (changed, flag, word) in enumerate(zip(replaced, flagged, corrected))}))
        for label, words, score, styles in lines:
            pen.text((204, y + 3), label, GREY, _font(15))
            pen.text((284, y), f"{score:.2f}", INK, _font(18))
            y = _flow(pen, 334, y, WIDTH - 16, words, styles)
        strips.append(strip.crop((0, 0, WIDTH, max(y, 184) + 8)))
    _stack(path, strips)


def draw_search(path, query, results):
    """query: text or PIL image.  results: best first, [(PIL image or None, text, score)]; saved as one picture."""
    strip, pen = _strip(190 if isinstance(query, Image.Image) else 44)
    if isinstance(query, Image.Image):
        strip.paste(query.convert("RGB").resize((168, 168)), (16, 12))
    else:
        _flow(pen, 16, 10, WIDTH, query.split(), size=20)
    strips = [strip]
    for place, (picture, text, score) in enumerate(results, 1):
        strip, pen = _strip()
        if picture:
            strip.paste(picture.convert("RGB").resize((120, 120)), (64, 8))
        pen.text((16, 10), f"{place}", GREY, _font(18))
        pen.text((204, 10), f"{score:.3f}", INK, _font(18))
        y = _flow(pen, 284, 10, WIDTH - 16, text.split())
        strips.append(strip.crop((0, 0, WIDTH, max(y, 136 if picture else 0))))
    _stack(path, strips)


def draw_regions(boxes, size=168):
    """A stand-in where there is no picture to show: the regions' boxes (R, 4 or more) as fractions -> PIL image."""
    image = Image.new("RGB", (size, size), (243, 244, 246))
    pen = ImageDraw.Draw(image)
    for i, (x1, y1, x2, y2) in enumerate((boxes[:, :4] * (size - 1)).tolist()):
        pen.rectangle((x1, y1, x2, y2), outline=LINES[i % len(LINES)])
    return image


def _ticks(low, high):
    """About five round numbers between low and high."""
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (m * step) <= 6)
    return [step * k for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def draw_curves(path, rows, panels):
    """Columns of a log over its steps, one panel below the other, the phases shaded.

    rows: list of dicts with "phase", "step" and numbers, or their text, "" = none; as csv.DictReader reads log.csv.
    panels: {title: [columns]}; a title that ends in "(log)" has a logarithmic axis. Columns without a number are left out.
    """
    steps, strips = [float(row["step"]) for row in rows], []
    left, right, top, bottom, end = 70, 800, 34, 236, max(steps + [1.0])
    for title, columns in panels.items():
        strip, pen = _strip(270)
        lines = {c: [(s, float(row[c])) for s, row in zip(steps, rows) if row.get(c) not in (None, "")] for c in columns}
        lines = {c: [(s, v) for s, v in line if math.isfinite(v)] for c, line in lines.items() if line}
        values = [v for line in lines.values() for _, v in line] or [0.0, 1.0]
        scale = (lambda v: math.log10(max(v, 1e-4))) if title.endswith("(log)") else float
        low, high = min(map(scale, values)), max(map(scale, values))
        low, high = (math.floor(low), math.ceil(high + 1e-6)) if scale is not float else (min(low, 0.0), high + (high == low))

        def place(s, v):
            return left + (right - left) * s / end, bottom - (bottom - top) * (scale(v) - low) / (high - low)
        for k, phase in enumerate(dict.fromkeys(row["phase"] for row in rows)):
            own = [s for s, row in zip(steps, rows) if row["phase"] == phase]
            begin = max([s for s in steps if s < own[0]], default=0)
            pen.rectangle((place(begin, values[0])[0], top, place(own[-1], values[0])[0], bottom), ((240, 244, 250), (250, 246, 238))[k % 2])
            pen.text((place(begin, values[0])[0] + 4, top + 2), phase, GREY, _font(13))
        for tick in _ticks(low, high) if scale is float else range(low, high + 1):
            y = bottom - (bottom - top) * (tick - low) / (high - low)
            pen.line((left, y, right, y), (218, 220, 224))
            pen.text((left - 8, y), f"{tick if scale is float else 10.0 ** tick:.4g}", GREY, _font(13), anchor="rm")
        for tick in _ticks(0, end):
            pen.text((place(tick, values[0])[0], bottom + 6), f"{tick:.0f}", GREY, _font(13), anchor="ma")
        pen.text((left, 8), title, INK, _font(16))
        pen.text((right + 14, bottom + 6), "step", GREY, _font(13))
        for k, (column, line) in enumerate(lines.items()):
            pen.line([place(s, v) for s, v in line], LINES[k % len(LINES)], 2, joint="curve")
            pen.text((right + 14, top + 18 * k), column, LINES[k % len(LINES)], _font(15))
        strips.append(strip)
    _stack(path, strips)
