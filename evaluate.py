"""What a model is worth: scores of all pairs, recall, the paper's analyses, probes on real text, and the pictures.

Letters: C captions, I images, N sentences or pairs, T text positions, V vocabulary. Every mask: True = real. All shares
are in percent. `device, dtype, score_batch`: where the model lies, float32 or bfloat16 (autocast), pairs in one pass.
"""
import contextlib
import dataclasses
import itertools
import json
import math
import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from data import ATTRIBUTES, BACKGROUNDS, PLURALS, InputError, Split, describes, draw, image_key

# ---- recall ----------------------------------------------------------------------------------------------------------

def retrieval_metrics(scores, image_of_caption):
    """Recall of text retrieval (tr: the image asks) and image retrieval (ir: the caption asks), in percent.

    scores: (C, I) float, the larger the better.  image_of_caption: (C,) long, in any order, any number of captions an image; -1 = a
    caption of no image, which is only in the way.  Returns {"tr_r1", "tr_r5", "tr_r10", "ir_r1", "ir_r5", "ir_r10", "rsum"}.
    Ranks are exact: the number of wrong items that score as high as the best right one, or higher; so a tie counts against the query,
    and so does a score that is not a number. An image without a caption asks nothing.
    """
    scores, owner = torch.as_tensor(scores).float(), torch.as_tensor(image_of_caption)
    if scores.dim() != 2 or owner.shape != scores.shape[:1] or not scores.numel() or owner.max() >= scores.size(1):
        raise ValueError(f"scores (C, I) and image_of_caption (C,) below I wanted, got {(*scores.shape,)}, {(*owner.shape,)}")
    own, result = owner[:, None] == torch.arange(scores.size(1), device=owner.device), {}     # (C, I)
    for way, queries, right in (("tr", scores.T, own.T), ("ir", scores, own)):
        rank = torch.cat([_wrong_ahead(line, mine, line.where(mine, -math.inf).amax(1, keepdim=True))
                          for line, mine in zip(queries.split(1024), right.split(1024))])    # bounds the memory
        result.update({f"{way}_r{k}": 100 * (rank[right.any(1)] < k).double().mean().item() for k in (1, 5, 10)})
    return {**result, "rsum": sum(result.values())}

def _wrong_ahead(scores, right, bar):
    """How many wrong items (..., G) reach a bar (..., 1), also by a tie or by a score that is not a number -> (...) long."""
    return (~(scores < bar) & ~right).sum(-1)

def fold_metrics(scores, image_of_caption, folds=5):
    """retrieval_metrics of each run of I / folds successive images with their own captions, averaged (COCO 1K)."""
    results = []
    for images in torch.arange(scores.size(1)).tensor_split(folds):
        rows = torch.isin(image_of_caption, images).nonzero()[:, 0]
        results.append(retrieval_metrics(scores[rows][:, images], image_of_caption[rows] - images[0]))
    return {key: sum(result[key] for result in results) / folds for key in results[0]}

# ---- scores ----------------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def inference(model, device, dtype=torch.float32):
    """Eval mode, autocast for bfloat16, no gradient; not torch.inference_mode: training goes on with what is mined."""
    training, device_type = model.training, torch.device(device).type
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(device_type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            yield
    finally:
        model.train(training)

def equal_groups(sizes, most):
    """Splits 0 .. N-1 into groups of equal sizes (N,) long, at most `most` in each: yields (size, (n,) indices)."""
    values, counts = torch.unique(sizes, return_counts=True)
    for size, group in zip(values.tolist(), torch.argsort(sizes, stable=True).split(counts.tolist())):
        for block in group.split(most):
            yield size, block

def score_matrix(model, data, split, device="cpu", dtype=torch.float32, score_batch=128, progress=None, captions=None, images=None):
    """Matching logits of every caption of a split with every image of it -> (C, I) float32 on the CPU.

    captions: (C,) long, the captions wanted, in that order; None = all.  images: (I,) likewise.  progress: called as progress(pairs
    done, all). An image is prepared once, a caption once for every thousand images; beside the result itself, memory does not grow.
    """
    content, pad = data.splits[split], data.tokenizer.pad_id
    captions = torch.arange(len(content.captions)) if captions is None else torch.as_tensor(captions)
    images = torch.arange(len(content.images)) if images is None else images
    lengths = torch.cat([(data.text(split, block) != pad).sum(1) for block in captions.split(4096)])
    counts = torch.as_tensor(data.regions.counts[content.rows[images]])
    scores, done = torch.empty(len(captions), len(images)), 0
    with inference(model, device, dtype):
        for _, columns in equal_groups(counts, 1024):
            features, boxes, _ = data.image(split, images[columns])
            pictures = model.prepare_regions(features.to(device), boxes.to(device))
            for _, rows in equal_groups(lengths, 256):
                texts = model.prepare_text(data.text(split, captions[rows]).to(device))
                pairs = torch.arange(len(rows) * len(columns), device=device)
                logits = model.score_pairs(texts, pairs // len(columns), pictures, pairs % len(columns), score_batch)
                scores[rows[:, None], columns] = logits.float().view(len(rows), -1).cpu()  # the only wait for a GPU
                done += len(pairs)
                if progress:
                    progress(done, scores.numel())
    return scores

def score_sentences(model, data, split, sentences, images, device="cpu", dtype=torch.float32, score_batch=128):
    """Matching logits (N,) of single pairs: sentences (N, T) long, padded, each with its image (N,) long of a split."""
    scores = []
    with inference(model, device, dtype):
        for ids, chosen in zip(sentences.to(device).split(score_batch), images.split(score_batch)):
            regions = model.prepare_regions(*(x.to(device) for x in data.image(split, chosen)))
            texts, each = model.prepare_text(ids, ids != data.tokenizer.pad_id), torch.arange(len(ids), device=device)
            scores.append(model.score_pairs(texts, each, regions, each).float())
    return torch.cat(scores).cpu()

# ---- the paper's analyses --------------------------------------------------------------------------------------------

def judge_words(model, data, split, sentences, images, device="cpu", dtype=torch.float32, score_batch=128):
    """What the heads say of each word of sentences (N, T) long, padded, with images (N,) of a split: discrimination
    logits (N, T, 2), class 0 = replaced, and the likeliest original words (N, T) long."""
    said = []
    with inference(model, device, dtype):
        for ids, chosen in zip(sentences.to(device).split(score_batch), images.split(score_batch)):
            features, boxes, region_mask = (x.to(device) for x in data.image(split, chosen))
            words = model(ids, features, boxes, ids != data.tokenizer.pad_id, region_mask)[:, :ids.size(1)]
            corrections = [model.correct(part).argmax(-1) for part in words.split(16)]       # V may be large
            said.append((model.discriminate(words).float(), torch.cat(corrections)))
    return tuple(torch.cat(part).cpu() for part in zip(*said))

def word_metrics(discrimination_logits, corrections, sentences, originals, text_mask):
    """Precision and recall of word discrimination, accuracy of word correction, over all words at once, in percent.

    corrections: logits (N, T, V) or their best words (N, T).  sentences, originals: (N, T).  text_mask: (N, T) bool.
    Replaced is a word that differs from the original, flagged one whose class 0 is the likelier. Correction is judged
    at replaced words only. A share of nothing is 0.
    """
    replaced = (sentences != originals) & text_mask
    flagged = (discrimination_logits[..., 0] > discrimination_logits[..., 1]) & text_mask
    mended = replaced & ((corrections.argmax(-1) if corrections.dim() == 3 else corrections) == originals)
    return {name: 100 * part.sum().item() / max(whole.sum().item(), 1) for name, part, whole in (
        ("wod_precision", replaced & flagged, flagged), ("wod_recall", replaced & flagged, replaced), ("woc_accuracy", mended, replaced))}

def own_words(data, texts, images=(), rows=()):
    """The data set with one split, "own", of these captions and of images of the store by name and row, to which the captions
    belong in turn: the first to the first, and round again after the last."""
    owner = torch.arange(len(texts)) % max(len(images), 1)
    return dataclasses.replace(data, splits={"own": Split(list(images), np.array(rows, np.int64), texts, owner)})

KINDS = [*ATTRIBUTES.values(), PLURALS.values(), BACKGROUNDS, ("two", "three", "four"), ("left", "right"),
         ("above", "below", "inside", "touching"), ATTRIBUTES]

def one_word_wrong(data, split, seed=0):
    """Captions of the scenes, one word changed for another of its kind, so that they parse and the oracle denies them.

    Returns (captions (N,) long, input_ids (N, T) long, padded); a caption that no change makes false is left out.
    """
    content, captions, texts = data.splits[split], [], []
    for c, (caption, owner) in enumerate(zip(content.captions, content.image_of_caption.tolist())):
        words = caption.split()
        options = [(i, other) for i, word in enumerate(words) for kind in KINDS if word in kind
                   for other in kind if other != word and data.tokenizer.unk_id not in data.tokenizer.encode(other)]
        random.Random(f"{seed} {c}").shuffle(options)
        for i, other in options:
            changed = " ".join([*words[:i], other, *words[i + 1:]])
            if describes(changed, content.scenes[owner]) is False:
                captions.append(c), texts.append(changed)
                break
    return torch.tensor(captions), own_words(data, texts).text("own", torch.arange(len(texts)))

def pairwise_accuracy(model, data, split, captions, wrong_ids, **options):
    """Share of captions (N,) that score above their wrong versions (N, T) with their own image; a tie is a failure."""
    images, own = data.splits[split].image_of_caption[captions], data.text(split, captions)
    right, wrong = (score_sentences(model, data, split, ids, images, **options) for ids in (own, wrong_ids))
    return 100 * (right > wrong).double().mean().item()

def false_negative_share(data, split, images, sentences, valid):
    """What the oracle says of generated sentences (N, T) long with images (N,) long, where valid (N,) bool, in percent.

    Returns {"false_negatives": those that are true of their image after all, "parse": those that say anything at all}.
    """
    scenes, kept = data.splits[split].scenes, valid.nonzero()[:, 0].tolist()
    truth = [describes(data.tokenizer.decode(sentences[n].tolist()), scenes[images[n]]) for n in kept]
    return {"false_negatives": 100 * truth.count(True) / max(len(truth), 1),
            "parse": 100 * (len(truth) - truth.count(None)) / max(len(truth), 1)}

# ---- probes on real text ---------------------------------------------------------------------------------------------

PROBES = {"sugarcrepe": {"filename": str, "caption": str, "negative_caption": str},
          "foil": {"image_file": str, "caption": str, "foil": str}, "rococo": {"image": str, "caption": list}}

def run_probe(path, model, data, split, **options):
    """One fine-grained test on real text, recognised by the form of its JSON, on those images that have features.

    SugarCrepe {id: {filename, caption, negative_caption}} and FOIL as VALSE has it {id: {image_file, caption, foil}}: "pairwise", the
    share of true captions that score above their false ones. FOIL also: word_metrics on the false ones that have as many word pieces
    as the true, "same_length" of them. RoCOCO [{image, caption: [true .., 5 altered]}]: text recall "tr_r1" .., and "altered_tr_r1" ..
    with the altered captions in the gallery. All in percent. Also "items" used, "total", "held_out" (with an image of this split).
    The file's name precedes every key. options: device, dtype, score_batch.  Raises InputError for any other file.
    """
    try:
        items = json.loads(Path(path).read_bytes())
        items = list(items.values()) if isinstance(items, dict) else items
        probe = next(name for name, fields in PROBES.items() if items and all(
            isinstance(item.get(field), kind) and (kind is str or len(item[field]) > 5)
            for item in items for field, kind in fields.items()))
    except (OSError, ValueError, TypeError, AttributeError, StopIteration) as error:
        raise InputError(f"{path}: no file of SugarCrepe, VALSE's FOIL or RoCOCO ({str(error) or 'unlike'})") from None
    where, *fields = PROBES[probe]
    found = [(item, row) for item in items if (row := data.regions.row(item[where])) is not None]
    names, rows = [item[where] for item, _ in found], [row for _, row in found]
    result = {"items": len(found), "total": len(items), "held_out": int(np.isin(rows, data.splits[split].rows).sum())}
    if probe == "rococo" and found:
        owner = torch.tensor([i for n, (item, _) in enumerate(found) for i in [n] * (len(item["caption"]) - 5) + [-1] * 5])
        own = own_words(data, [text for item, _ in found for text in item["caption"]], names, rows)
        scores = score_matrix(model, own, "own", **options)
        for prefix, use in (("", owner >= 0), ("altered_", owner >= -1)):
            metrics = retrieval_metrics(scores[use], owner[use])
            result.update({f"{prefix}tr_r{k}": metrics[f"tr_r{k}"] for k in (1, 5, 10)})
    elif found:
        own, images = own_words(data, [item[field] for field in fields for item, _ in found], names, rows), torch.arange(len(found))
        right, wrong = own.text("own", images), own.text("own", images + len(found))
        result["pairwise"] = pairwise_accuracy(model, own, "own", images, wrong, **options)
        if probe == "foil":
            mask, width = wrong != data.tokenizer.pad_id, min(right.size(1), wrong.size(1))
            same = (right != data.tokenizer.pad_id).sum(1) == mask.sum(1)
            words = (*judge_words(model, own, "own", wrong, images, **options), wrong, right, mask)
            result.update(word_metrics(*(part[same, :width] for part in words)), same_length=int(same.sum()))
    return {f"{Path(path).stem}_{name}": value for name, value in result.items()}

def _precision(line, right, r):
    """mAP@R (mean over ranks up to r of the precision where they hold a positive, else 0), R-Precision and R@1 of one
    query with scores `line` (G,) and r positives, those in the gallery at `right`, -> (3,). Ties count against it."""
    own, mine = line[right].sort(descending=True).values, torch.zeros_like(line, dtype=torch.bool).index_fill(0, right, True)
    wrong, nth = _wrong_ahead(line, mine, own[:, None]), torch.arange(1, len(right) + 1)     # ahead of each positive
    hit = (wrong + nth <= r).double()
    return torch.stack(((hit * nth / (wrong + nth)).sum() / r, hit.sum() / r, (wrong[0] == 0).double()))

def eccv_metrics(scores, data, split, folder):
    """mAP@R, R-Precision and R@1 on the positives of ECCV Caption and CxC, in percent; {} where the files are missing.

    scores: (C, I) of a COCO test split.  folder: where {eccv,cxc}_{image_to_caption,caption_to_image}.json are, with
    coco_test_ids.npy and original_caption_to_image.json, which tell which caption is which.
    Returns {"eccv_tr_map_at_r", "eccv_tr_rprecision", "eccv_tr_r1", "eccv_tr_queries", "eccv_ir_...", "cxc_..."}.
    """
    folder, content, result, waiting, row = Path(folder), data.splits[split], {}, {}, {}
    if not (folder / "coco_test_ids.npy").is_file():
        return result
    image_of = json.loads((folder / "original_caption_to_image.json").read_bytes())
    for caption in np.load(folder / "coco_test_ids.npy", allow_pickle=False).tolist():
        waiting.setdefault(str(image_of[str(caption)][0]), []).append(str(caption))
    column = {image_key(name): i for i, name in enumerate(content.images)}
    for c, i in enumerate(content.image_of_caption.tolist()):
        if captions := waiting.get(image_key(content.images[i])):                            # its captions in our order
            row[captions.pop(0)] = c
    ways = {"tr": ("image_to_caption", column, row, scores.T), "ir": ("caption_to_image", row, column, scores)}
    for name, (way, (asked, queries, gallery, table)) in itertools.product(("eccv", "cxc"), ways.items()):
        file, found = folder / f"{name}_{asked}.json", []
        for query, positives in (json.loads(file.read_bytes()) if file.is_file() else {}).items():
            right = torch.tensor([gallery[str(p)] for p in set(positives) if str(p) in gallery])
            if query in queries and len(right):  # as in the official code, R counts all positives of the file
                found.append(_precision(table[queries[query]], right, len(set(positives))))
        if found:
            result |= zip((f"{name}_{way}_{key}" for key in ("map_at_r", "rprecision", "r1", "queries")),
                          [*(100 * torch.stack(found).mean(0)).tolist(), len(found)])
    return result

# ---- pictures --------------------------------------------------------------------------------------------------------

WIDTH, INK, GREY, ORANGE, BLUE, GREEN, RULE = 1120, (35, 38, 45), (125, 128, 135), (204, 80, 0), (0, 105, 190), (0, 130, 80), (222, 224, 228)
LINES, SHADES = [BLUE, ORANGE, (0, 150, 95), (160, 70, 160), (210, 160, 0), GREY], [(240, 244, 250), (250, 246, 238)]

def _write(pen, x, y, text, colour=INK, size=18, anchor="la"):
    pen.text((x, y), text, colour, anchor=anchor, font_size=size)
    return pen.textlength(text, font_size=size)

def _flow(pen, left, top, words, styles):
    """Sets words (list or text) in lines, returns the y below. styles: {position: (colour, underlined, note)}."""
    x, y = left, top
    for i, word in enumerate(words.split() if isinstance(words, str) else words):
        colour, underlined, note = styles.get(i, (INK, False, ""))
        if x > left and x + pen.textlength(word, font_size=18) > WIDTH - 16:
            x, y = left, y + (42 if styles else 26)
        width = _write(pen, x, y, word, colour)
        if underlined:
            pen.line((x, y + 23, x + width, y + 23), BLUE, 2)
        x += max(width, _write(pen, x, y + 25, note, GREEN, 13)) + 6
    return y + (44 if styles else 28)

def _draw_rows(path, rows):
    """rows: [(PIL picture or None, [(label, score or None, words or text, styles)])], one below the other, a rule between."""
    sheet, top = Image.new("RGB", (WIDTH, 900 * len(rows)), "white"), 0
    pen = ImageDraw.Draw(sheet)
    for picture, lines in rows:
        y = top + 12
        if picture:
            sheet.paste(picture.convert("RGB").resize((168, 168)), (16, y))
        for label, score, words, styles in lines:
            _write(pen, 204, y + 3, label, GREY, 15)
            _write(pen, 284, y, "" if score is None else f"{score:.2f}")
            y = _flow(pen, 334, y, words, styles)
        top = max(y, top + 184 if picture else 0) + 9
        pen.line((0, top - 1, WIDTH, top - 1), RULE)
    sheet.crop((0, 0, WIDTH, top)).save(path)

def draw_negatives(path, rows):
    """For some images: the caption, the hardest retrieved negative, and generated ones with what the heads say of them.

    rows: list of {"picture": PIL image, "caption": words or text, "score": s(I, T) in 0..1, "retrieved": (words or
    text, score), "generated": [(words, score, replaced, flagged, corrected)]}, the last three with an entry a word: was
    it replaced (bool), does WoD flag it (bool), what does WoC put back (str, or None for nothing to show).
    """
    drawn = [(None, [("legend", None, ["replaced word ", "flagged by word discrimination", " word"], {
        0: (ORANGE, False, ""), 1: (INK, True, ""), 2: (INK, False, " -> what word correction puts back")})])]
    for row in rows:
        drawn.append((row["picture"], [("caption", row["score"], row["caption"], {}), ("retrieved", *row["retrieved"][::-1], {})]))
        for words, score, *marks in row["generated"]:
            drawn[-1][1].append(("generated", score, words, {i: (ORANGE if replaced else INK, flagged, f"-> {word}" if word else "")
                                                             for i, (replaced, flagged, word) in enumerate(zip(*marks))}))
    _draw_rows(path, drawn)

def draw_search(path, query, picture, results):
    """The query, its PIL picture (or None), and what was found: [(PIL picture or None, text, score)], best first."""
    _draw_rows(path, [(picture, [("query", None, query, {})]), *(
        (image, [(f"{place}.", score, text, {})]) for place, (image, text, score) in enumerate(results, 1))])

def picture_of(data, split, image):
    """What stands for an image in our pictures: the drawn scene, or the boxes of its regions where it is a photograph."""
    scenes = data.splits[split].scenes
    return draw(scenes[image]) if scenes else draw_regions(data.image(split, [image])[1][0])

def draw_regions(boxes, size=168):
    """A stand-in where there is no picture to show: the regions' boxes (R, 4 or more) as fractions -> PIL image."""
    image = Image.new("RGB", (size, size), SHADES[0])
    for i, box in enumerate((boxes[:, :4] * (size - 1)).tolist()):
        ImageDraw.Draw(image).rectangle(box, outline=LINES[i % len(LINES)])
    return image

PANELS = {"losses (log)": ("itm", "hard", "mlm", "tags", "wod", "woc"),
          "matching scores": ("positive", "retrieved", "synthetic"), "validation R@1, %": ("val_tr_r1", "val_ir_r1")}

def draw_curves(path, rows):
    """The PANELS over the steps of a log, the phases shaded. rows: dicts, as csv.DictReader reads them from log.csv."""
    steps, sheet, top, (left, right) = [float(row["step"]) for row in rows], Image.new("RGB", (WIDTH, 271 * len(PANELS))), 0, (70, WIDTH - 170)
    pen, last, phase_ends = ImageDraw.Draw(sheet), max(steps + [1]), {row["phase"]: step for step, row in zip(steps, rows)}
    def across(step):
        return np.interp(step, (0, last), (left, right))
    def down(value):  # low, high and top: of the panel in hand
        return np.interp(value, (low, high), (top + 236, top + 34))
    for title, columns in PANELS.items():
        log = title.endswith("(log)")
        curves = {column: [(step, math.log10(max(value, 1e-4)) if log else value) for step, row in zip(steps, rows)
                           if row.get(column) not in (None, "") and math.isfinite(value := float(row[column]))] for column in columns}
        values = [value for points in curves.values() for _, value in points]
        if not values:
            continue
        unit = 1 if log else 10 ** math.floor(math.log10(max(*values, 1e-3)))
        low, high = math.floor(min(values)) if log else 0, math.ceil(max(values) / unit + 1e-9) * unit
        pen.rectangle((0, top, WIDTH, top + 269), "white")
        for shade, begin, (phase, end) in zip(itertools.cycle(SHADES), [0, *phase_ends.values()], phase_ends.items()):
            pen.rectangle((across(begin), top + 34, across(end), top + 236), shade)
            _write(pen, across(begin) + 4, top + 36, phase, GREY, 13)
        for tick in range(low, high + 1) if log else np.linspace(low, high, 5):
            pen.line((left, down(tick), right, down(tick)), (218, 220, 224))
            _write(pen, left - 8, down(tick), f"{10.0 ** tick if log else tick:.4g}", GREY, 13, "rm")
        for tick in np.linspace(0, last, 5):
            _write(pen, across(tick), top + 242, f"{tick:.0f}", GREY, 13, "ma")
        _write(pen, left, top + 8, title, size=16)
        for k, column in enumerate(filter(curves.get, curves)):
            pen.line([(across(step), down(value)) for step, value in curves[column]], LINES[k], 2, joint="curve")
            _write(pen, right + 14, top + 34 + 18 * k, column, LINES[k], 15)
        top += 271
    sheet.crop((0, 0, WIDTH, top)).save(path)
