"""What a model is worth: recall, the paper's analyses, altered captions, probes, pictures.

Letters: C captions, I images, N sentences or pairs, H negatives of a caption, T text positions.
Every mask: True = real. All shares are in percent, and a tie counts against the model (in wod_auc,
half). MEASURES says in a phrase what each measure counts. `options` are device, dtype (float32, or
bfloat16 by autocast) and score_batch (pairs in one pass), with the defaults of score_matrix."""

import contextlib
import dataclasses
import hashlib
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

MEASURES = {  # what is counted, in percent where nothing else is said
    "tr_r1": "text R@1: images that find one of their captions first",
    "tr_r5": "text R@5: images that find one among the first 5",
    "tr_r10": "text R@10",
    "ir_r1": "image R@1: captions that find their image first",
    "ir_r5": "image R@5: captions that find it among the first 5",
    "ir_r10": "image R@10",
    "rsum": "RSum: the sum of text and image R@1, R@5 and R@10",
    "synthetic_score": "mean score of the written negatives, 0 to 1",
    "wod_auc": "WoD AUC: how often a replaced word is more suspicious",
    "wod_most_suspicious": "WoD: negatives whose most suspicious word was replaced",
    "woc_accuracy": "WoC: replaced words whose original is named",
    "sentences_repaired": "negatives mended by correcting the most suspicious word",
    "fair_negatives": "negatives that are false, by the oracle",
    "true_negatives": "negatives that are true after all, by the oracle",
    "ungrammatical_negatives": "negatives that are no sentence, by the oracle",
    "one_word_wrong": "captions that outscore their one-word corruption",
    "oversensitivity": "paraphrases that do not outscore the corruption",
    "altered_tr_r1": "text R@1 with corruptions among the candidates",
    "altered_tr_r5": "text R@5 with corruptions among the candidates",
    "altered_tr_r10": "text R@10 with corruptions among the candidates",
    "pairwise": "true captions that outscore their false ones",
    "same_length": "items of equal length, for wod_ and woc_, a number",
    "alike": "items whose two texts are the same tokens, a number",
    "items": "items used, i.e. whose image has features, a number",
    "total": "items in the file, a number",
    "held_out": "items with an image of this split, a number",
    "map_at_r": "mean average precision at R, the number of positives",
    "rprecision": "positives among the first R",
    "queries": "queries, a number",
}
MEASURES |= {
    f"one_word_wrong_{kind}": f"the same, the word being a {kind}" for kind in datasets.KINDS
}

# ---- recall ------------------------------------------------------------------------------------


def retrieval_metrics(scores, image_of_caption):
    """Recall of text retrieval (tr: the image is the query) and image retrieval (ir).

    scores: (C, I) float; nan counts against the query, as a tie does.
    image_of_caption: (C,) long, in any order; -1 = a caption of no image, a distractor.
    Returns {"tr_r1", "tr_r5", "tr_r10", "ir_r1", "ir_r5", "ir_r10", "rsum"}, see MEASURES.
    Raises ValueError if the shapes do not fit."""
    scores = torch.as_tensor(scores).float()
    owner = torch.as_tensor(image_of_caption)
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


def is_coco_test(split):
    """Whether a Split is COCO's test split of 5,000 images, by their names: these are COCO's ids,
    which end at 581,929, and name no other data set."""
    keys = [image_key(name) for name in split.images]
    if len(keys) != 5000 or not all(key.isdecimal() for key in keys):
        return False
    ours = all(datasets.data_set_of(name) in ("", "coco") for name in split.images)
    return ours and 500_000 < max(int(key) for key in keys) < 600_000


def has_coco_folds(split):
    """Whether a Split is COCO's test split, of which recall on five folds of 1,000 images is
    published, too; also that of SCAN's arrays, which number the images."""
    numbered = all(name.startswith("testall_ims_") for name in split.images)
    return is_coco_test(split) or (numbered and len(split.images) == 5000)


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


def first_images(data, split, count):
    """The data with a split cut to its first `count` images and their captions, to report on a
    part. Scores of a part are higher than those of the whole, as there is less to confuse."""
    content = data.splits[split]
    captions = int((content.image_of_caption < count).sum())
    part = dataclasses.replace(
        content,
        images=content.images[:count],
        rows=content.rows[:count],
        captions=content.captions[:captions],
        image_of_caption=content.image_of_caption[:captions],
        phrases=content.phrases[:captions] if content.phrases else None,
        scenes=content.scenes[:count] if content.scenes else None,
    )
    return dataclasses.replace(data, splits=data.splits | {split: part})


def groups_of_one_size(sizes):
    """Numbers 0 .. N-1 grouped by size (N,): each group holds at most 256 of one size."""
    return [group for n in sizes.unique() for group in (sizes == n).nonzero()[:, 0].split(256)]


def score_matrix(
    model,
    data,
    split,
    device="cpu",
    dtype=torch.float32,
    score_batch=128,
    captions=None,
    images=None,
    scores=None,
):
    """Matching logits of every caption of a split with every image of it -> (C, I) on the CPU.

    captions, images: (C,), (I,) long, those wanted, in that order; None = all.
    scores: (C, I) float32 to be filled, with nan where a pair is not scored yet, such as those of
    open_scores, with which an interrupted report goes on; None = a fresh one."""
    content = data.splits[split]
    captions = torch.as_tensor(range(len(content.captions)) if captions is None else captions)
    images = torch.as_tensor(range(len(content.images)) if images is None else images)
    if scores is None:
        scores = torch.full((len(captions), len(images)), math.nan)
    # On a CPU score_pairs packs pairs of any length; a GPU gets those of one length, unmasked.
    packed = torch.device(device).type == "cpu"
    if packed:
        row_groups = torch.arange(len(captions)).split(256)
        column_groups = torch.arange(len(images)).split(256)
    else:
        lengths = (data.text(split, captions) != data.tokenizer.pad_id).sum(1)
        counts = torch.as_tensor(data.regions.counts[content.rows[images.numpy()]])
        row_groups = groups_of_one_size(lengths)
        column_groups = groups_of_one_size(counts)
    progress = datasets.ProgressLine("pairs scored", scores.numel())
    with inference(model, device, dtype), contextlib.closing(progress):
        for columns in column_groups:
            features, boxes, region_mask = (
                x.to(device) for x in data.image(split, images[columns])
            )
            pictures = model.prepare_regions(features, boxes, region_mask if packed else None)
            for rows in row_groups:
                block = (rows[:, None], columns)
                if scores[block].isnan().any():
                    ids = data.text(split, captions[rows]).to(device)
                    text_mask = ids != data.tokenizer.pad_id if packed else None
                    texts = model.prepare_text(ids, text_mask)
                    pairs = torch.arange(len(rows) * len(columns), device=device)
                    row = pairs // len(columns)
                    column = pairs % len(columns)
                    logits = model.score_pairs(texts, row, pictures, column, score_batch)
                    # The only place where the result of a GPU is waited for.
                    scores[block] = logits.float().view(len(rows), -1).cpu()
                progress.advance(len(rows) * len(columns))
    return scores


def open_scores(path, model, data, split, dtype):
    """The score matrix (C, I) of a split as a memory-mapped .npy file, for score_matrix to fill:
    nan where nothing is scored yet. A file that is there is used if the note beside it says that
    it is of the same weights, data and dtype; else it is begun anew."""
    content = data.splits[split]
    digest = hashlib.sha256()
    for value in model.state_dict().values():
        digest.update(value.detach().cpu().float().numpy().tobytes())
    parts = (content.captions, content.images, content.rows.tolist(), data.regions.source)
    for part in (*parts, data.tokenizer.tokens, data.max_text):
        digest.update(repr(part).encode())
    made_of = f"{digest.hexdigest()} {dtype}\n"
    path = Path(path)
    note = path.with_name(f"{path.name}.of")
    shape = (len(content.captions), len(content.images))
    if note.exists() and note.read_text() == made_of:
        with contextlib.suppress(ValueError, OSError):  # of a file that is cut off
            scores = np.lib.format.open_memmap(path, "r+")
            if scores.shape == shape and scores.dtype == np.float32:
                return torch.from_numpy(scores)
    write_scores(path, np.full(shape, math.nan, np.float32))
    note.write_text(made_of)
    return torch.from_numpy(np.lib.format.open_memmap(path, "r+"))


def write_scores(path, scores):
    """A whole score matrix (C, I) as a file, without a note of what it is of."""
    path = Path(path)
    path.with_name(f"{path.name}.of").unlink(missing_ok=True)

    def write(part):
        with open(part, "wb") as file:
            np.save(file, scores)

    datasets.write_atomically(path, write)


def score_sentences(
    model, data, split, texts, images, device="cpu", dtype=torch.float32, score_batch=128
):
    """Matching logits (N,) on the CPU of sentences, N strings, with images (N,) long of a split."""
    content = dataclasses.replace(data.splits[split], captions=texts)
    sentences = dataclasses.replace(data, splits={split: content})
    scores = torch.empty(len(texts))
    progress = datasets.ProgressLine("sentences scored", len(texts))
    with inference(model, device, dtype), contextlib.closing(progress):
        # Sentences of one image stand together, so that its regions are embedded once.
        for rows in images.argsort(stable=True).split(score_batch):
            columns, column = images[rows].unique(return_inverse=True)
            features, boxes, region_mask = (x.to(device) for x in data.image(split, columns))
            pictures = model.prepare_regions(features, boxes, region_mask)
            ids = sentences.text(split, rows).to(device)
            prepared = model.prepare_text(ids, ids != data.tokenizer.pad_id)
            row = torch.arange(len(rows), device=device)
            logits = model.score_pairs(prepared, row, pictures, column.to(device), score_batch)
            scores[rows] = logits.float().cpu()
            progress.advance(len(rows))
    return scores


def judge_words(
    model, data, split, ids, images, device="cpu", dtype=torch.float32, score_batch=128
):
    """What matching, discrimination and correction (3.4) make of sentences with their images.

    ids: (N, T) long, padded. images: (N,) long, of the split.
    Returns, on the CPU, matching logits (N,), the suspicion of each word (N, T): the logit of
    "replaced" minus that of "original", -inf where no word stands; and the likeliest original word
    (N, T) long."""
    tokenizer = data.tokenizer
    no_words = torch.tensor([tokenizer.cls_id, tokenizer.sep_id, tokenizer.pad_id], device=device)
    parts = []
    progress = datasets.ProgressLine("sentences judged", len(ids))
    with inference(model, device, dtype), contextlib.closing(progress):
        for text, columns in zip(ids.to(device).split(score_batch), images.split(score_batch)):
            features, boxes, region_mask = (x.to(device) for x in data.image(split, columns))
            hidden = model(text, features, boxes, text != tokenizer.pad_id, region_mask)
            words = hidden[:, : ids.size(1)]
            logits = model.match(hidden)
            replaced, original = model.discriminate(words).float().unbind(-1)
            # Of a broken head all are equal; and only where no word stands is it -inf.
            suspicion = (replaced - original).nan_to_num()
            suspicion = suspicion.masked_fill(torch.isin(text, no_words), -math.inf)
            # All words at once times a large vocabulary would fill the memory.
            corrections = [model.correct(some).argmax(-1) for some in words.split(16)]
            parts.append((logits.float().cpu(), suspicion.cpu(), torch.cat(corrections).cpu()))
            progress.advance(len(text))
    return tuple(torch.cat(results) for results in zip(*parts))


# ---- written negatives: do the heads find and mend the wrong word? -----------------------------


def share(hits):
    """How many of bools are True, in percent; 0 of none."""
    return 100 * hits.sum().item() / max(hits.numel(), 1)


def word_metrics(suspicion, corrections, sentences, originals):
    """Word discrimination and correction (3.4) over all words at once.

    suspicion, corrections: (N, T), of judge_words. sentences, originals: (N, T) long; a word that
    differs is replaced.
    wod_auc: the probability that a replaced word is more suspicious than an original one; a tie is
    half. wod_most_suspicious: altered sentences whose most suspicious word is a replaced one.
    woc_accuracy: replaced words whose original is the likeliest correction."""
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
    """Measures of the written negatives; {} if there are none.

    examples: {"images": (N,), "originals": (N, T), "sentences": (N, H, T), "valid": (N, H)}.
    synthetic_score: their mean score. word_metrics of them. sentences_repaired: of the wrong ones
    those that are true once the most suspicious word is corrected; where there is no oracle, those
    that are the original again. Of the scenes, whose oracle knows: fair_negatives are false, as
    they should be, true_negatives are true, and ungrammatical_negatives are no sentences."""
    row = examples["valid"].nonzero()[:, 0]
    if not len(row):
        return {}
    sentences = examples["sentences"][examples["valid"]]  # (n, T)
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
    """Captions of the embedded world with one word exchanged for another of its kind, so that the
    oracle says they are false; each caption once for every kind of word in it, where that can be.
    Returns captions (N,) long, ascending, texts [N] and the kinds [N] of the exchanged words."""
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
    """All false sentences that a caption becomes when one word of a kind is exchanged."""
    words = caption.split()
    false = []
    for n, word in enumerate(words):
        for other in words_of_kind if word in words_of_kind else ():
            text = " ".join([*words[:n], other, *words[n + 1 :]])
            if describes(text, scene) is False:
                false.append(text)
    return false


def altered_metrics(model, data, split, scores, seed=0, **options):
    """How altered_captions score; {} where there is no oracle. scores: (C, I) of the split.

    one_word_wrong, and by kind one_word_wrong_colour, ...: captions that score above their altered
    version. oversensitivity: true paraphrases ("B right of A" for "A left of B") that do not.
    altered_tr_r1: text R@1 with the altered captions of an image among its candidates (RoCOCO)."""
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

    matches = content.image_of_caption[:, None] == torch.arange(scores.size(1))  # (C, I)
    best = scores.where(matches, -math.inf).amax(0)  # (I,)
    rival = scores.where(~matches, -math.inf).amax(0).scatter_reduce(0, images, wrong, "amax")
    return metrics | {"altered_tr_r1": share((best > rival)[matches.any(0)])}


# ---- probes: published fine-grained tests ------------------------------------------------------

PROBE_FORMS = "a JSON file of SugarCrepe, VALSE's FOIL or RoCOCO is expected"


class Probe(NamedTuple):
    """A file of SugarCrepe, VALSE's FOIL or RoCOCO."""

    name: str  # stands before its metrics
    items: list  # [(image's name, true captions, false captions)]
    is_gallery: bool  # RoCOCO: several captions an item; else pairs of a true and a false one


def read_probes(paths):
    """Probe files -> [Probe]. Of two files with one name, each takes its folder's name before its
    own. Raises InputError."""
    probes = [read_probe(path) for path in paths]
    stems = [probe.name for probe in probes]
    names = []
    for path, stem in zip(paths, stems):
        folder = Path(path).resolve().parent.name
        names.append(f"{folder}_{stem}" if stems.count(stem) > 1 else stem)
    for path, name in zip(paths, names):
        if names.count(name) > 1:
            raise InputError(f"--probe {path}: two files would be called {name}; rename one")
    return [probe._replace(name=name) for probe, name in zip(probes, names)]


def read_probe(path):
    """A probe's file, known by its fields -> Probe. Raises InputError."""
    content = datasets.read_json(path)
    if isinstance(content, dict):
        entries = list(content.items())
    else:
        entries = list(enumerate(content)) if isinstance(content, list) else []
    items = []
    is_gallery = False
    for key, entry in entries:
        if not isinstance(entry, dict):
            raise InputError(f"{path} item {key}: not a JSON object; {PROBE_FORMS}")
        if is_confirmed(entry):
            items.append(read_item(f"{path} item {key}", entry))
            is_gallery = is_gallery or isinstance(entry["caption"], list)
    if not items:
        raise InputError(f"{path}: no items; {PROBE_FORMS}")
    return Probe(Path(path).stem, items, is_gallery)


def is_confirmed(entry):
    """VALSE counts the items whose caption two of three annotators found right; the other files
    have no such votes, and all their items count."""
    votes = entry.get("mturk")
    return votes is None or (isinstance(votes, dict) and votes.get("caption") in (2, 3))


def read_item(where, entry):
    """An entry of a probe's file -> (image's name, true captions, false captions)."""
    name = entry.get("image") or entry.get("filename") or entry.get("image_file")
    captions = entry.get("caption")
    if isinstance(captions, list):  # RoCOCO: the five altered ones stand last
        true = captions[:-5]
        false = captions[-5:]
    else:
        true = [captions]
        false = [entry.get("foil") or entry.get("negative_caption")]
    texts = [name, *true, *false]
    if not true or not all(isinstance(text, str) and text.strip() for text in texts):
        missing = "lacks the name of an image, a true caption or a false one"
        raise InputError(f"{where} {missing}; {PROBE_FORMS}")
    return name, [" ".join(text.split()) for text in true], [" ".join(t.split()) for t in false]


def probe_metrics(probe, model, data, split, scores=None, **options):
    """A probe on those of its images that have features; {} if none has.

    SugarCrepe and VALSE's FOIL: "pairwise", the share of true captions that score above their false
    ones, and word_metrics of the "same_length" items whose texts have as many word pieces.
    RoCOCO: text recall "tr_r1" .., and "altered_tr_r1" .. with the altered captions in the gallery.
    All: "items" used, "total", "held_out" (with an image of this split), after the probe's name.
    scores: (C, I) of the split; RoCOCO then takes from it what it holds."""
    row_of = {image_key(name): row for row, name in enumerate(data.regions.names)}
    names = []
    rows = []
    texts = []
    owner = []  # of each text its number in rows; a false caption has none
    for name, true, false in probe.items:
        if image_key(name) in row_of:
            owner += [len(rows)] * len(true) + [-1] * len(false)
            texts += true + false
            rows.append(row_of[image_key(name)])
            names.append(name)
    if not rows:
        return {}
    held_out = np.isin(rows, data.splits[split].rows).sum()
    result = {"items": len(rows), "total": len(probe.items), "held_out": int(held_out)}
    content = Split(names, np.array(rows), texts, torch.tensor(owner))
    probe_data = dataclasses.replace(data, splits=data.splits | {"probe": content})
    if probe.is_gallery:
        probe_scores = known_scores(content, data.splits[split], scores)
        result |= gallery_metrics(model, probe_data, probe_scores, **options)
    else:
        result |= pair_metrics(model, probe_data, **options)
    return {f"{probe.name}_{name}": round(value, 4) for name, value in result.items()}


def known_scores(probe, split, scores):
    """The score matrix of a probe's Split, with nan where it must be scored: what the (C, I) scores
    of another Split do not hold. None = no scores."""
    result = torch.full((len(probe.captions), len(probe.images)), math.nan)
    column_of = {row: i for i, row in enumerate(split.rows.tolist())}
    columns = [column_of.get(row) for row in probe.rows.tolist()]
    if scores is None or None in columns:
        return result
    caption_of = {text: c for c, text in enumerate(split.captions)}  # equal texts score alike
    for n, text in enumerate(probe.captions):
        if text in caption_of:
            result[n] = scores[caption_of[text], columns]
    return result


def gallery_metrics(model, probe_data, scores, **options):
    """RoCOCO: text recall without the altered captions, which have no owner, and with them.
    scores: of known_scores."""
    owner = probe_data.splits["probe"].image_of_caption
    missing = scores.isnan().any(1).nonzero()[:, 0]
    scores[missing] = score_matrix(model, probe_data, "probe", captions=missing, **options)
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
    # Texts that are cut off or have unknown words may be the same to the network: a tie, a loss.
    result["alike"] = (ids[::2] == ids[1::2]).all(1).sum().item()
    wrong = 2 * same_length + 1
    right = 2 * same_length
    if len(wrong):
        result |= word_metrics(suspicion[wrong], corrections[wrong], ids[wrong], ids[right])
    return result


# ---- more positives than COCO's own: ECCV Caption and CxC --------------------------------------


ECCV_ADVICE = "get the file of ECCV Caption again"


class Positives(NamedTuple):
    """The files of ECCV Caption and CxC. Ids are COCO's, as texts."""

    caption_ids: list  # of the test split; those of an image in the order of its captions
    image_of_caption: dict  # {caption: image}
    tables: dict  # {"eccv_tr": {image: {captions}}, "eccv_ir": {caption: {images}}, "cxc_tr" ..}


def read_positives(root):
    """The files of ECCV Caption, which lie somewhere below a folder -> Positives; None where there
    are none. Raises InputError."""
    for path in sorted(Path(root).glob("**/coco_test_ids.npy")):
        owners = path.with_name("original_caption_to_image.json")
        if owners.is_file():
            return read_eccv(path, owners)
    return None


def read_eccv(ids_file, owners_file):
    """Positives of two files of ECCV Caption, and of the tables that lie beside them."""
    with datasets.one_line_errors(ids_file, ECCV_ADVICE):
        array = np.load(ids_file, allow_pickle=False)
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise ValueError(f"{array.dtype} {array.shape}, not a row of ids")
    caption_ids = [str(i) for i in array.tolist()]
    owners = read_id_lists(owners_file)
    owner_of = {}
    for caption in caption_ids:
        if not owners.get(caption):
            raise InputError(f"{owners_file}: no image of caption {caption}; {ECCV_ADVICE}")
        owner_of[caption] = owners[caption][0]
    tables = {}
    for name in ("eccv", "cxc"):
        for way, kind in (("tr", "image_to_caption"), ("ir", "caption_to_image")):
            file = ids_file.with_name(f"{name}_{kind}.json")
            lists = read_id_lists(file) if file.is_file() else {}
            tables[f"{name}_{way}"] = {query: set(right) for query, right in lists.items()}
    return Positives(caption_ids, owner_of, tables)


def read_id_lists(path):
    """A JSON of ECCV Caption, {id: [ids]} -> the same with all ids as texts. Raises InputError."""
    content = datasets.read_json(path)
    if not isinstance(content, dict) or not all(isinstance(ids, list) for ids in content.values()):
        raise InputError(f"{path}: {{id: [ids]}} is expected; {ECCV_ADVICE}")
    return {query: [str(i) for i in ids] for query, ids in content.items()}


def positives_metrics(positives, scores, data, split):
    """precision_at_r on the positives of ECCV Caption and CxC; {} unless the split is COCO's test,
    with COCO's ids as names.
    scores: (C, I) of the split.
    Returns {"eccv_tr_map_at_r", "eccv_tr_rprecision", "eccv_tr_r1", "eccv_tr_queries", ...}."""
    if not is_coco_test(data.splits[split]):
        return {}
    content = data.splits[split]
    images = {image_key(name): i for i, name in enumerate(content.images)}
    # COCO's caption ids -> our numbers: an image's ids come in the order of its captions.
    ranges = torch.stack(content.caption_ranges(torch.arange(len(images))), 1).tolist()
    remaining = {image: list(range(*ranges[i])) for image, i in images.items()}
    captions = {}
    for caption in positives.caption_ids:
        of_image = remaining.get(positives.image_of_caption[caption])
        if of_image:
            captions[caption] = of_image.pop(0)
    result = {}
    for name, table in positives.tables.items():
        if name.endswith("tr"):
            result |= positives_table(name, table, scores.T, images, captions)
        else:
            result |= positives_table(name, table, scores, captions, images)
    return result


def positives_table(name, table, scores, queries, items):
    """The means of precision_at_r over the queries of a table, {query: {positives}}.
    queries, items: {COCO's id: row or column of scores}."""
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
    positives that are among the items. count = R, the number of all positives."""
    hits = scores[right].sort(descending=True).values
    nth = torch.arange(1, len(right) + 1)
    ahead = (~(scores < hits[:, None])).sum(1) - (~(hits < hits[:, None])).sum(1)  # wrong ones
    hit = (ahead + nth <= count).double()
    precision = hit * nth / (ahead + nth)
    return torch.stack([precision.sum() / count, hit.sum() / count, (ahead[0] == 0).double()])


# ---- pictures: negatives.png and search.png -----------------------------------------------------

WIDTH = 1080  # of every picture, in pixels
PICTURE = 168  # width and height of an image
COLUMNS = {"label": 204, "bar": 312, "number": 386, "words": 436}  # where they begin
INK = (35, 38, 45)
GREY = (125, 128, 135)
RULE = (220, 222, 226)
ORANGE = (200, 62, 0)
GREEN = (0, 130, 80)
BLUE = (40, 95, 190)
PURPLE = (150, 60, 160)
OCHRE = (185, 145, 0)
MARKER = (255, 222, 110)  # behind a word that is surely suspected


class Word(NamedTuple):
    """A word of a picture, with another word below it."""

    text: str
    colour: tuple = INK
    suspicion: float = 0.0  # 0 to 1, the strength of the shade behind it
    below: str = ""
    below_colour: tuple = GREEN
    continues: bool = False  # stands close to the word before it


class Line(NamedTuple):
    """A sentence of a picture, with its label and score."""

    label: str
    score: float | None  # 0 to 1; None = no bar
    colour: tuple  # of the bar
    words: list  # of Word


KEY_WORDS = [
    Word("replaced word", ORANGE),
    Word(" "),
    Word("suspected rightly", INK, 1.0, "its correction"),
    Word(" "),
    Word("suspected wrongly", INK, 1.0, "its correction", GREY),
]


def plain_words(text):
    return [Word(word) for word in text.split()]


def draw_image(data, split, number):
    """A scene, or the boxes of an image's regions, PICTURE x PICTURE."""
    content = data.splits[split]
    if content.scenes:
        return datasets.draw(content.scenes[number]).resize((PICTURE, PICTURE))
    sheet = Image.new("RGB", (PICTURE, PICTURE), RULE)
    _, boxes, _ = data.image(split, [number])
    for n, box in enumerate((PICTURE - 1) * boxes[0, :, :4]):
        ImageDraw.Draw(sheet).rectangle(box.tolist(), outline=(INK, ORANGE, GREEN, GREY)[n % 4])
    return sheet


def draw_rows(path, data, split, rows, remark=""):
    """Saves rows [(number of an image or None, [Line])], one below the other with thin rules
    between them, and a remark below all."""
    sheet = Image.new("RGB", (WIDTH, 1500 * (len(rows) + 1)), "white")
    pen = ImageDraw.Draw(sheet)
    top = 0
    for number, lines in rows:
        y = top + 16
        if number is not None:
            sheet.paste(draw_image(data, split, number), (16, y))
        for line in lines:
            y = draw_line(pen, y, line)
        top = max(y, top + PICTURE + 24 if number is not None else 0) + 8
        pen.line((0, top - 1, WIDTH, top - 1), RULE)
    if remark:
        pen.text((16, top + 12), remark, GREY, font_size=15)
        top += 44
    sheet.crop((0, 0, WIDTH, top)).save(path)


def draw_line(pen, y, line):
    """A Line at a height, in as many rows of text as it takes -> the height where the next goes."""
    pen.text((COLUMNS["label"], y + 3), line.label, GREY, font_size=15)
    if line.score is not None:
        left = COLUMNS["bar"]
        right = COLUMNS["number"] - 8
        middle = left + round(line.score * (right - left))
        pen.rectangle((left, y + 6, right, y + 18), RULE)
        pen.rectangle((left, y + 6, middle, y + 18), line.colour)
        pen.text((right + 8, y + 3), f"{line.score:.2f}", INK, font_size=15)
    x = COLUMNS["words"]
    height = 28
    for word in line.words:
        width = pen.textlength(word.text, font_size=18)
        column = max(width, pen.textlength(word.below, font_size=14))
        x -= 7 if word.continues else 0
        if x + column > WIDTH - 16:  # goes on in the next row
            x = COLUMNS["words"]
            y += height
            height = 28
        shade = [round(255 + word.suspicion * (value - 255)) for value in MARKER]
        left = x if word.continues else x - 3
        pen.rectangle((left, y, x + width + 2, y + 23), tuple(shade))
        pen.text((x, y + 1), word.text, word.colour, font_size=18)
        if word.below:
            pen.text((x, y + 23), word.below, word.below_colour, font_size=14)
            height = 46
        x += column + 7
    return y + height


def draw_negatives(path, model, data, split, scores, examples, count=5, seed=0, **options):
    """Some images, drawn by the seed, each with its caption, the hardest retrieved caption and the
    two hardest written ones, as mark_words shows them.

    scores: (C, I) of the split. examples: as for example_metrics, and "captions" (N,)."""
    content = data.splits[split]
    images = examples["images"]
    captions = examples["captions"]
    valid = examples["valid"]  # (N, H)
    row = valid.nonzero()[:, 0]  # (n,) of each written sentence the number of its example
    sentences = examples["sentences"][valid]  # (n, T)
    judged = judge_words(model, data, split, sentences, images[row], **options)
    logits, suspicion, corrections = judged

    rows = [(None, [Line("how to read", None, INK, KEY_WORDS)])]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    for n in order[:count].tolist():
        column = scores[:, images[n]]  # (C,)
        wrong = column.masked_fill(content.image_of_caption == images[n], -math.inf)
        lines = []
        for label, c, colour in (
            ("caption", captions[n], GREEN),
            ("retrieved", wrong.argmax(), GREY),
        ):
            words = plain_words(content.captions[c])
            lines.append(Line(label, column[c].sigmoid().item(), colour, words))
        of_example = (row == n).nonzero()[:, 0]
        hardest = of_example[logits[of_example].argsort(descending=True)[:2]]
        for s in hardest.tolist():
            original = examples["originals"][n]
            words = mark_words(
                data.tokenizer.tokens, sentences[s], original, suspicion[s], corrections[s]
            )
            lines.append(Line("written", logits[s].sigmoid().item(), ORANGE, words))
        rows.append((images[n].item(), lines))

    # In how many examples does the caption not score above all that was written?
    beaten = row[~(scores[captions, images][row] > logits)].unique()
    remark = (
        f"Bars: matching score. Images drawn by the seed ({seed}), not picked. In {len(beaten)} of"
        f" all {len(images)} examples a written sentence scores as high as the caption, or higher."
    )
    draw_rows(path, data, split, rows, remark)


def mark_words(tokens, sentence, original, suspicion, corrections):
    """A written sentence as [Word]: replaced words in colour, behind each word a shade, stronger
    the more discrimination suspects it, and below a suspected word its correction, unless that is
    the same word. tokens: of the vocabulary. The others: (T,), as in word_metrics."""
    words = []
    for t in (suspicion > -math.inf).nonzero()[:, 0].tolist():
        replaced = sentence[t] != original[t]
        corrected = suspicion[t] > 0 and corrections[t] != sentence[t]
        word = Word(
            text=tokens[sentence[t]].removeprefix("##"),
            colour=ORANGE if replaced else INK,
            suspicion=suspicion[t].sigmoid().item(),
            below=tokens[corrections[t]].removeprefix("##") if corrected else "",
            below_colour=GREEN if replaced else GREY,
            continues=tokens[sentence[t]].startswith("##"),
        )
        words.append(word)
    return words


# ---- pictures: curves.png ----------------------------------------------------------------------

# Title; ticks of the vertical axis, or None for a logarithmic one; columns of log.csv, each with
# its name and colour.
PANELS = (
    (
        "loss, before weighting (logarithmic)",
        None,
        {
            "mlm": ("masked words", BLUE),
            "align": ("alignment", INK),
            "contrast": ("matching, all pairs", GREEN),
            "itm": ("matching", GREEN),
            "hard": ("retrieved negatives", GREY),
            "tags": ("written negatives", ORANGE),
            "wod": ("word discrimination", OCHRE),
            "woc": ("word correction", PURPLE),
        },
    ),
    (
        "mean matching score, 0 to 1",
        (0, 0.25, 0.5, 0.75, 1),
        {
            "positive": ("true captions", GREEN),
            "retrieved": ("retrieved negatives", GREY),
            "synthetic": ("written negatives", ORANGE),
        },
    ),
    (
        "validation, in percent",
        (0, 25, 50, 75, 100),
        {
            "val_tr_r1": ("text R@1", BLUE),
            "val_ir_r1": ("image R@1", PURPLE),
        },
    ),
)
# In pixels of a sheet twice as large as the picture, so that its lines become smooth.
LEFT = 120  # of a panel's axes
RIGHT = 1640
HEIGHT = 400
PITCH = 540  # from one panel to the next


def draw_curves(path, rows):
    """Saves how a run went: the terms of its loss, mean scores and validations over the steps, with
    vertical lines between its phases. rows: of log.csv, dicts of numbers or of texts."""
    last = int(rows[-1]["step"])
    ends = {row["phase"]: int(row["step"]) for row in rows}  # {phase: its last step}
    panels = []
    for title, ticks, columns in PANELS:
        curves = {column: read_curve(rows, column) for column in columns}
        curves = {columns[column]: points for column, points in curves.items() if points}
        if curves:
            panels.append((title, ticks, curves))
    sheet = Image.new("RGB", (2 * WIDTH, PITCH * len(panels) + 80), "white")
    pen = ImageDraw.Draw(sheet)
    for n, (title, ticks, curves) in enumerate(panels):
        top = PITCH * n + 110
        draw_axes(pen, top, title, last, ends)
        draw_panel(pen, top, ticks, last, curves)
    sheet.reduce(2).save(path)


def read_curve(rows, column):
    """A column of log.csv -> [(step, value)], without lines that lack a finite value."""
    points = []
    for row in rows:
        value = row.get(column, "")
        if value != "" and math.isfinite(float(value)):
            points.append((int(row["step"]), float(value)))
    return points


def draw_axes(pen, top, title, last, ends):
    """The frame of a panel, its title, the steps below it and the phases in it."""
    bottom = top + HEIGHT
    pen.rectangle((LEFT, top, RIGHT, bottom), outline=GREY, width=2)
    pen.text((LEFT, top - 66), title, INK, font_size=32)
    distances = (digit * 10**power for power in range(12) for digit in (1, 2, 5))
    distance = next(distance for distance in distances if last / distance <= 8)
    for step in range(0, last + 1, distance):
        x = across(step, last)
        pen.line((x, bottom, x, bottom + 10), GREY, 2)
        pen.text((x, bottom + 14), f"{step:,}", GREY, anchor="ma", font_size=26)
    pen.text((RIGHT + 40, bottom + 14), "steps", GREY, font_size=26)
    began = 0
    for phase, end in ends.items():
        middle = (across(began, last) + across(end, last)) / 2
        pen.text((middle, top - 34), phase, GREY, anchor="ma", font_size=26)
        pen.line((across(end, last), top - 30, across(end, last), bottom), GREY, 2)
        began = end


def across(step, last):
    """The horizontal place of a step."""
    return LEFT + (RIGHT - LEFT) * step / last


def draw_panel(pen, top, ticks, last, curves):
    """The curves of a panel, {(name, colour): [(step, value)]}, the ticks of their values, and the
    names beside them. ticks: None for powers of ten, as many as the values need."""
    scale = float  # or the logarithm
    if ticks is None:
        scale = math.log10
        values = np.array([value for points in curves.values() for _, value in points])
        powers = np.log10(values.clip(min=1e-3))
        lowest = math.floor(powers.min())
        highest = max(math.ceil(powers.max()), lowest + 1)
        ticks = [10.0**power for power in range(lowest, highest + 1)]

    def height_of(value):
        value = min(max(value, ticks[0]), ticks[-1])
        part = (scale(value) - scale(ticks[0])) / (scale(ticks[-1]) - scale(ticks[0]))
        return top + HEIGHT * (1 - part)

    for tick in ticks:
        y = height_of(tick)
        pen.line((LEFT, y, RIGHT, y), RULE, 2)
        pen.text((LEFT - 12, y), f"{tick:g}", GREY, anchor="rm", font_size=26)
    for n, ((name, colour), points) in enumerate(curves.items()):
        places = [(across(step, last), height_of(value)) for step, value in points]
        pen.line(places, colour, 5, joint="curve")
        for x, y in places:
            pen.ellipse((x - 5, y - 5, x + 5, y + 5), colour)
        y = top + 24 + 48 * n
        pen.line((RIGHT + 40, y, RIGHT + 90, y), colour, 6)
        pen.text((RIGHT + 104, y), name, INK, anchor="lm", font_size=30)


# ---- all together ------------------------------------------------------------------------------


def report(model, data, split, scores, examples, seed=0, **options):
    """Everything measured on a split -> {metric: value}. scores: (C, I) of the whole split.
    examples: as for example_metrics."""
    owner = data.splits[split].image_of_caption
    metrics = retrieval_metrics(scores, owner)
    if has_coco_folds(data.splits[split]):
        metrics |= {f"1k_{name}": value for name, value in fold_metrics(scores, owner).items()}
    metrics |= example_metrics(model, data, split, examples, **options)
    metrics |= altered_metrics(model, data, split, scores, seed, **options)
    return {name: round(value, 4) for name, value in metrics.items()}


def headline(data, split, count=None):
    """What a report covers, as a line. count: only the first `count` images of the split; None =
    all."""
    content = data.splits[split]
    images = len(content.images)
    count = images if count is None else min(count, images)
    captions = int((content.image_of_caption < count).sum())
    line = f"{split} split: {count:,} images, {captions:,} captions"
    if split != "test":
        line = f"no test split; {line}"
    if count < images:
        line += f"; only the first {count:,} of {images:,} images, so recall is higher than on all"
    return line


def table(metrics, warmup):
    """Lines of a table: name, what it counts, value after the warm-up if there was one, value at
    the end."""
    lines = [f"{'':82}{'warm-up' if warmup else '':>9}{'final':>9}"]
    for name, value in metrics.items():
        before = f"{warmup[name]:.2f}" if name in warmup else ""
        lines.append(f"{name:26} {meaning_of(name):55}{before:>9}{value:9.2f}")
    return lines


def meaning_of(name):
    """What a measure counts, found by the end of its name, as probes and folds put theirs first."""
    fitting = [measure for measure in MEASURES if f"_{name}".endswith(f"_{measure}")]
    return MEASURES[max(fitting, key=len)] if fitting else ""


def search(model, data, split, query, image, path, **options):
    """Finds what fits a sentence or an image best, draws it, and returns [(score, image name or
    caption)], best first. One of query, a sentence, and image, a name, is None."""
    content = data.splits[split]
    if query:
        query_split = dataclasses.replace(content, captions=[known_words(data.tokenizer, query)])
        query_data = dataclasses.replace(data, splits={split: query_split})
        scores = score_matrix(model, query_data, split, **options)[0].sigmoid()
        best = scores.topk(min(6, len(scores))).indices.tolist()
        rows = [(None, [Line("query", None, INK, plain_words(query))])]
        for i in best:
            found = Line("image", scores[i].item(), GREEN, plain_words(content.images[i]))
            first, _ = content.caption_ranges(torch.tensor(i))
            caption = Line("its caption", None, INK, plain_words(content.captions[first]))
            rows.append((i, [found, caption]))
        names = content.images
    elif image in content.images:
        number = content.images.index(image)
        scores = score_matrix(model, data, split, images=[number], **options)[:, 0].sigmoid()
        best = scores.topk(min(6, len(scores))).indices.tolist()
        lines = [Line("query", None, INK, plain_words(image))]
        for c in best:
            words = plain_words(content.captions[c])
            lines.append(Line("caption", scores[c].item(), GREEN, words))
        rows = [(number, lines)]
        names = content.captions
    else:
        first = content.images[0]
        raise InputError(
            f"--image {image}: no such image in the {split} split; its first is {first}"
        )
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
