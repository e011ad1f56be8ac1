"""What a model is worth: recall, scores of all pairs, the paper's analyses, probes on real text, and the pictures.
Letters: C captions, I images, N sentences or pairs, T text positions, V vocabulary. Every mask: True = real. All shares are in percent.
`device, dtype, score_batch`: where the model lies, float32 or bfloat16 (autocast), pairs in one pass."""
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
    scores: (C, I) float, the larger the better.  image_of_caption: (C,) long, in any order, any number of captions an image (0: it asks
    nothing); -1 = a caption of no image, which is only in the way.  Returns {"tr_r1", "tr_r5", "tr_r10", "ir_r1", "ir_r5", "ir_r10", "rsum"}.
    A rank is the number of wrong items not below the best right one: a tie, or a score that is no number, counts against the query."""
    scores, owner = torch.as_tensor(scores).float(), torch.as_tensor(image_of_caption)
    if scores.dim() != 2 or owner.shape != scores.shape[:1] or not scores.numel() or owner.max() >= scores.size(1):
        raise ValueError(f"scores (C, I) and image_of_caption (C,) below I wanted, got {(*scores.shape,)}, {(*owner.shape,)}")
    own, result = owner[:, None] == torch.arange(scores.size(1), device=owner.device), {}     # (C, I)
    for way, queries, rights in (("tr", scores.T, own.T), ("ir", scores, own)):
        rank = []
        for block, right in zip(queries.split(1024), rights.split(1024)):                   # bounds the comparisons' memory
            best = block.where(right, -math.inf).amax(1, keepdim=True)
            rank.append((~(block < best) & ~right).sum(1)[right.any(1)])
        result.update({f"{way}_r{k}": 100 * (torch.cat(rank) < k).double().mean().item() for k in (1, 5, 10)})
    return {**result, "rsum": sum(result.values())}

def fold_metrics(scores, image_of_caption, folds=5):
    """retrieval_metrics of each run of I / folds successive images with their own captions, averaged (COCO 1K)."""
    runs = [(images, torch.isin(image_of_caption, images)) for images in torch.arange(scores.size(1)).tensor_split(folds)]
    results = [retrieval_metrics(scores[rows][:, images], image_of_caption[rows] - images[0]) for images, rows in runs]
    return {key: sum(result[key] for result in results) / folds for key in results[0]}

def precision_at_r(line, right, r):
    """mAP@R (mean over ranks up to r of the precision where they hold a positive, else 0), R-Precision and R@1 of one
    query with scores `line` (G,) and r positives, those in the gallery at `right`, -> (3,). Ties count against it."""
    own, nth = line[right].sort(descending=True).values, torch.arange(1, len(right) + 1)
    wrong = (~(line < own[:, None])).sum(1) - (~(own < own[:, None])).sum(1)                 # ahead of each positive
    hit = (wrong + nth <= r).double()
    return torch.stack(((hit * nth / (wrong + nth)).sum() / r, hit.sum() / r, (wrong[0] == 0).double()))

def eccv_metrics(scores, data, split, folder):
    """mAP@R, R-Precision and R@1 on the positives of ECCV Caption and CxC, in percent; {} where the files are missing.
    scores: (C, I) of a COCO test split.  folder: below it {eccv,cxc}_{image_to_caption,caption_to_image}.json, coco_test_ids.npy,
    original_caption_to_image.json.  Returns {"eccv_tr_map_at_r", "eccv_tr_rprecision", "eccv_tr_r1", "eccv_tr_queries", .. "cxc_ir_.."}."""
    content, result, places = data.splits[split], {}, [path.parent for path in Path(folder).glob("**/coco_test_ids.npy")]
    if not (folder := next((place for place in places if (place / "original_caption_to_image.json").is_file()), None)):
        return result
    column, image_of = {image_key(name): i for i, name in enumerate(content.images)}, json.loads((folder / "original_caption_to_image.json").read_bytes())
    rows_of = {image: iter((content.image_of_caption == i).nonzero()[:, 0].tolist()) for image, i in column.items()}
    row = {str(caption): at for caption in np.load(folder / "coco_test_ids.npy", allow_pickle=False).tolist()     # an image's captions come in our order
           if (at := next(rows_of.get(str(image_of[str(caption)][0]), iter(())), None)) is not None}
    ways = ("tr", "image_to_caption", column, row, scores.T), ("ir", "caption_to_image", row, column, scores)
    for name, (way, asked, queries, gallery, table) in itertools.product(("eccv", "cxc"), ways):
        file = folder / f"{name}_{asked}.json"
        told = json.loads(file.read_bytes()) if file.is_file() else {}                       # {query: positives}
        found = [precision_at_r(table[queries[query]], torch.tensor(right), len(set(positives)))  # as in the official code, R counts all
                 for query, positives in told.items() if query in queries
                 and (right := [gallery[str(p)] for p in set(positives) if str(p) in gallery])]
        if found:
            result |= zip((f"{name}_{way}_{key}" for key in ("map_at_r", "rprecision", "r1", "queries")),
                          [*(100 * torch.stack(found).mean(0)).tolist(), len(found)])
    return result

# ---- scores ----------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def inference(model, device, dtype=torch.float32):
    """Eval mode, autocast for bfloat16, no gradient; not torch.inference_mode: training goes on with what is mined."""
    with contextlib.ExitStack() as end, torch.no_grad(), torch.autocast(torch.device(device).type, torch.bfloat16, dtype == torch.bfloat16):
        end.callback(model.train, model.training)
        model.eval()
        yield

def equal_groups(sizes, most):
    """Splits 0 .. N-1 into groups of equal sizes (N,) long, at most `most` in each: an iterator of (n,) long."""
    return itertools.chain.from_iterable((sizes == size).nonzero()[:, 0].split(most) for size in sizes.unique())

def score_matrix(model, data, split, device="cpu", dtype=torch.float32, score_batch=128, progress=lambda *_: None, captions=None, images=None):
    """Matching logits of every caption of a split with every image of it -> (C, I) float32 on the CPU.
    captions: (C,) long, those wanted, in that order; None = all.  images: (I,) likewise.  progress: called with the pairs done and all.
    An image is prepared once, a caption once for every 256 images; beside the result, memory does not grow."""
    content, packed = data.splits[split], torch.device(device).type == "cpu"
    captions = torch.arange(len(content.captions)) if captions is None else torch.as_tensor(captions)
    images = torch.arange(len(content.images)) if images is None else images
    lengths, counts = (data.text(split, captions) != data.tokenizer.pad_id).sum(1), torch.as_tensor(data.regions.counts[content.rows[images]])
    scores, done = torch.empty(len(captions), len(images)), 0
    groups = (lambda sizes, most: torch.arange(len(sizes)).split(most)) if packed else equal_groups  # score_pairs packs on a CPU; else no masks
    with inference(model, device, dtype):
        for columns in groups(counts, 256):
            pictures = model.prepare_regions(*(x.to(device) for x in data.image(split, images[columns])[:2 + packed]))
            for rows in groups(lengths, 256):
                texts = model.prepare_text(ids := data.text(split, captions[rows]).to(device), ids != data.tokenizer.pad_id if packed else None)
                pairs = torch.arange(len(rows) * len(columns), device=device)
                logits = model.score_pairs(texts, pairs // len(columns), pictures, pairs % len(columns), score_batch)
                scores[rows[:, None], columns] = logits.float().view(len(rows), -1).cpu()  # the only wait for a GPU
                progress(done := done + len(pairs), scores.numel())
    return scores

def read_sentences(read, model, data, split, sentences, images, device="cpu", dtype=torch.float32, score_batch=128):
    """read(hidden (n, T + R, D)), a tuple of tensors (n, ...), for sentences (N, T) long, padded, each with its image (N,) long of a
    split -> a tuple of tensors (N, ...) on the CPU."""
    said = []
    with inference(model, device, dtype):
        for ids, chosen in zip(sentences.to(device).split(score_batch), images.split(score_batch)):
            features, boxes, region_mask = (x.to(device) for x in data.image(split, chosen))
            said.append(read(model(ids, features, boxes, ids != data.tokenizer.pad_id, region_mask)))
    return tuple(torch.cat(part).cpu() for part in zip(*said))

def score_sentences(model, data, split, sentences, images, **options):
    """Matching logits (N,) of single pairs: sentences (N, T) long, padded, each with its image (N,) long of a split."""
    return read_sentences(lambda hidden: (model.match(hidden).float(),), model, data, split, sentences, images, **options)[0]

def judge_words(model, data, split, sentences, images, **options):
    """What the heads say of sentences (N, T) long, padded, with images (N,) of a split: matching logits (N,), and of each
    word discrimination logits (N, T, 2), class 0 = replaced, and the likeliest original (N, T) long."""
    def read(hidden):
        words = hidden[:, :sentences.size(1)]
        corrections = torch.cat([model.correct(part).argmax(-1) for part in words.split(16)])  # V may be large
        return model.match(hidden).float(), model.discriminate(words).float(), corrections
    return read_sentences(read, model, data, split, sentences, images, **options)

# ---- the paper's analyses, probes on real text -------------------------------------------------------------------------
KINDS = [*ATTRIBUTES.values(), PLURALS.values(), BACKGROUNDS, ("two", "three", "four"), ("left", "right"),
         ("above", "below", "inside", "touching"), ATTRIBUTES]
PROBES = {"sugarcrepe": {"filename": str, "caption": str, "negative_caption": str}, "foil": {"image_file": str, "caption": str, "foil": str},
          "rococo": {"image": str, "caption": list}}         # fields in {id: entry} or [entry]; a list ends with five altered captions

def word_metrics(discrimination_logits, corrections, sentences, originals, text_mask):
    """Precision and recall of word discrimination, accuracy of word correction, over all words at once, in percent.
    corrections: logits (N, T, V) or their best words (N, T), judged at replaced words only.  sentences, originals: (N, T).
    text_mask: (N, T) bool. Replaced is a word that differs from the original, flagged one whose class 0 is the likelier. 0 / 0 is 0."""
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

def one_word_wrong(data, split, seed=0):
    """Captions of the scenes, one word changed for another of its kind, so that they parse and the oracle denies them.
    Returns (captions (N,) long, input_ids (N, T) long, padded); a caption that no change makes false is left out."""
    content, captions, texts = data.splits[split], [], []
    for c, (caption, owner) in enumerate(zip(content.captions, content.image_of_caption.tolist())):
        words = caption.split()
        options = [" ".join([*words[:i], other, *words[i + 1:]]) for i, word in enumerate(words) for kind in KINDS if word in kind
                   for other in kind if other != word and data.tokenizer.unk_id not in data.tokenizer.encode(other)]
        random.Random(f"{seed} {c}").shuffle(options)
        if wrong := next((text for text in options if describes(text, content.scenes[owner]) is False), None):
            captions.append(c), texts.append(wrong)
    return torch.tensor(captions), own_words(data, texts).text("own", torch.arange(len(texts)))

def pairwise_accuracy(model, data, split, captions, wrong_ids, **options):
    """Share of captions (N,) that score above their wrong versions (N, T) with their own image; a tie is a failure."""
    images, own = data.splits[split].image_of_caption[captions], data.text(split, captions)
    right, wrong = (score_sentences(model, data, split, ids, images, **options) for ids in (own, wrong_ids))
    return 100 * (right > wrong).double().mean().item()

def false_negative_share(data, split, images, sentences, valid):
    """What the oracle says of generated sentences (N, T) long with images (N,) long, where valid (N,) bool, in percent.
    Returns {"false_negatives": those that are true of their image after all, "parse": those that say anything at all}."""
    scenes, kept = data.splits[split].scenes, valid.nonzero()[:, 0].tolist()
    truth = [describes(data.tokenizer.decode(sentences[n].tolist()), scenes[images[n]]) for n in kept] or [None]
    return {"false_negatives": 100 * truth.count(True) / len(truth), "parse": 100 - 100 * truth.count(None) / len(truth)}

def run_probe(path, model, data, split, **options):
    """One fine-grained test on real text, recognised by the form of its JSON (PROBES), on those images that have features.
    SugarCrepe and VALSE's FOIL: "pairwise", the share of true captions that score above their false ones. FOIL also: word_metrics on the
    false ones that have as many word pieces as the true, "same_length" of them. RoCOCO: text recall "tr_r1" .., and "altered_tr_r1" ..
    with the altered captions in the gallery. Also "items" used, "total", "held_out" (with an image of this split).
    The file's name precedes every key. options: device, dtype, score_batch.  Raises InputError for any other file."""
    try:
        items = json.loads(Path(path).read_bytes())
        items = list(items.values()) if isinstance(items, dict) else items
        probe = next(name for name, fields in PROBES.items() if items and all(
            isinstance(item.get(field), kind) and len(item[field]) > 5 * (kind is list) for item in items for field, kind in fields.items()))
    except (OSError, ValueError, TypeError, AttributeError, StopIteration) as error:
        raise InputError(f"{path}: no file of SugarCrepe, VALSE's FOIL or RoCOCO ({str(error) or 'unlike'})") from None
    (where, *fields), row_of = PROBES[probe], {image_key(name): row for row, name in enumerate(data.regions.names)}
    found = [(item, row_of[key]) for item in items if (key := image_key(item[where])) in row_of]
    names, rows = [item[where] for item, _ in found], [row for _, row in found]
    result = {"items": len(found), "total": len(items), "held_out": int(np.isin(rows, data.splits[split].rows).sum())}
    if probe == "rococo" and found:
        owner = torch.tensor([i for n, (item, _) in enumerate(found) for i in [n] * (len(item["caption"]) - 5) + [-1] * 5])
        own = own_words(data, [text for item, _ in found for text in item["caption"]], names, rows)
        scores = score_matrix(model, own, "own", **options)
        for prefix, use in (("", owner >= 0), ("altered_", owner >= -1)):
            result |= {prefix + key: share for key, share in retrieval_metrics(scores[use], owner[use]).items() if key.startswith("tr")}
    elif found:
        own, images = own_words(data, [item[field] for field in fields for item, _ in found], names, rows), torch.arange(len(found))
        right, wrong = own.text("own", torch.arange(2 * len(found))).chunk(2)
        result["pairwise"] = pairwise_accuracy(model, own, "own", images, wrong, **options)
        if probe == "foil":
            mask = wrong != data.tokenizer.pad_id
            same = (right != data.tokenizer.pad_id).sum(1) == mask.sum(1)
            words = (*judge_words(model, own, "own", wrong, images, **options)[1:], wrong, right, mask)
            result.update(word_metrics(*(part[same] for part in words)), same_length=int(same.sum()))
    return {f"{Path(path).stem}_{name}": value for name, value in result.items()}

# ---- pictures --------------------------------------------------------------------------------------------------------
WIDTH, INK, GREY, ORANGE, BLUE, GREEN = 1120, (35, 38, 45), (125, 128, 135), (204, 80, 0), (0, 105, 190), (0, 130, 80)
LINES, SHADES, RULE = [BLUE, ORANGE, (0, 150, 95), (160, 70, 160), (210, 160, 0), GREY], [(240, 244, 250), (250, 246, 238)], (220, 222, 226)
PANELS = {"losses (log)": ("itm", "hard", "mlm", "tags", "wod", "woc"),
          "matching scores": ("positive", "retrieved", "synthetic"), "validation R@1, %": ("val_tr_r1", "val_ir_r1")}

def _write(pen, x, y, text, colour=INK, size=18, anchor="la"):
    pen.text((x, y), text, colour, anchor=anchor, font_size=size)
    return pen.textlength(text, font_size=size)

def _draw_rows(path, rows):
    """rows: [(PIL picture or None, lines)], one below the other, a thin rule between them. A line: label, score or None, words (list or
    text), and either no more or a list each with an entry a word: is it orange, is it underlined, what is it corrected to (or None)."""
    top, pen = 0, ImageDraw.Draw(sheet := Image.new("RGB", (WIDTH, 900 * len(rows)), "white"))
    for picture, lines in rows:
        y = top + 12
        if picture:
            sheet.paste(picture.convert("RGB").resize((168, 168)), (16, y))
        for label, score, words, *marks in lines:
            _write(pen, 204, y + 3, label, GREY, 15)
            _write(pen, 284, y, "" if score is None else f"{score:.2f}")
            x, words = 334, words.split() if isinstance(words, str) else words
            for word, orange, underlined, corrected in zip(words, *(marks or [itertools.repeat(None)] * 3)):
                if x > 334 and x + pen.textlength(word, font_size=18) > WIDTH - 16:
                    x, y = 334, y + (42 if marks else 26)
                width = _write(pen, x, y, word, ORANGE if orange else INK)
                if underlined:
                    pen.line((x, y + 23, x + width, y + 23), BLUE, 2)
                x += max(width, _write(pen, x, y + 25, f"-> {corrected}" if corrected else "", GREEN, 13)) + 6
            y += 44 if marks else 28
        top = max(y, top + 184 if picture else 0) + 9
        pen.line((0, top - 1, WIDTH, top - 1), RULE)
    sheet.crop((0, 0, WIDTH, top)).save(path)

def draw_negatives(path, rows):
    """For some images: the caption, the hardest retrieved negative, and generated ones with what the heads say of them.
    rows: [{"picture": PIL image, "caption": words or text, "score": s(I, T) in 0..1, "retrieved": (words or text, score), "generated":
    [(words, score, replaced, flagged, corrected)]}], the last three an entry a word: two bools, and what WoC puts back (str or None)."""
    legend = ("legend", None, ["replaced word ", "flagged by word discrimination", " word"], [True, False, False], [False, True, False],
              [None, None, "what word correction puts back"])
    _draw_rows(path, [(None, [legend]), *((row["picture"], [
        ("caption", row["score"], row["caption"]), ("retrieved", *row["retrieved"][::-1]),
        *(("generated", score, words, *marks) for words, score, *marks in row["generated"])]) for row in rows)])

def draw_search(path, query, picture, results):
    """The query, its PIL picture (or None), and what was found: [(PIL picture or None, text, score)], best first."""
    _draw_rows(path, [(picture, [("query", None, query)]), *(
        (image, [(f"{place}.", score, text)]) for place, (image, text, score) in enumerate(results, 1))])

def picture_of(data, split, image):
    """What stands for an image in our pictures, a PIL image: the drawn scene, or the boxes of its regions where it is a photograph."""
    if data.splits[split].scenes:
        return draw(data.splits[split].scenes[image])
    sheet = Image.new("RGB", (168, 168), SHADES[0])
    for i, box in enumerate((data.image(split, [image])[1][0, :, :4] * 167).tolist()):
        ImageDraw.Draw(sheet).rectangle(box, outline=LINES[i % len(LINES)])
    return sheet

def draw_curves(path, rows):
    """The PANELS over the steps of a log, the phases shaded. rows: dicts, as csv.DictReader reads them from log.csv."""
    sheet, top, (left, right) = Image.new("RGB", (WIDTH, 271 * len(PANELS)), "white"), 0, (70, WIDTH - 170)
    pen, steps = ImageDraw.Draw(sheet), [float(row["step"]) for row in rows]
    last, phase_ends = max(steps + [1]), {row["phase"]: step for step, row in zip(steps, rows)}
    def place(step, value):  # x, y in the panel in hand, whose values go from low to high
        return np.interp(step, (0, last), (left, right)), np.interp(value, (low, high), (top + 236, top + 34))
    for title, columns in PANELS.items():
        log = title.endswith("(log)")
        curves = {column: [(step, math.log10(max(value, 1e-4)) if log else value) for step, row in zip(steps, rows)
                           if row.get(column) not in (None, "") and math.isfinite(value := float(row[column]))] for column in columns}
        if not (values := [value for points in curves.values() for _, value in points]):
            continue
        unit = 1 if log else 10 ** math.floor(math.log10(max(*values, 1e-3)))
        low, high = math.floor(min(values)) if log else 0, math.ceil(max(values) / unit + 1e-9) * unit
        for shade, begin, (phase, end) in zip(itertools.cycle(SHADES), [0, *phase_ends.values()], phase_ends.items()):
            pen.rectangle((*place(begin, high), *place(end, low)), shade)
            _write(pen, place(begin, high)[0] + 4, top + 36, phase, GREY, 13)
        for tick in range(low, high + 1) if log else np.linspace(low, high, 5):
            pen.line((*place(0, tick), *place(last, tick)), RULE)
            _write(pen, left - 8, place(0, tick)[1], f"{10.0 ** tick if log else tick:.4g}", GREY, 13, "rm")
        for tick in np.linspace(0, last, 5):
            _write(pen, place(tick, low)[0], top + 242, f"{tick:.0f}", GREY, 13, "ma")
        _write(pen, left, top + 8, title, size=16)
        for k, column in enumerate(column for column in columns if curves[column]):
            pen.line([place(*point) for point in curves[column]], LINES[k], 2, joint="curve")
            _write(pen, right + 14, top + 34 + 18 * k, column, LINES[k], 15)
        top += 271
        pen.line((0, top - 1, WIDTH, top - 1), RULE)
    sheet.crop((0, 0, WIDTH, top)).save(path)
