"""What a model is worth: recall, the paper's analyses, altered captions, probes, pictures.

Letters: C captions, I images, N sentences or pairs, H negatives of a caption, T text positions.
Every mask: True = real. All shares are in percent, and a tie counts against the model. `options`
are device, dtype (float32, or bfloat16 by autocast) and score_batch (pairs in one pass).
"""

import contextlib
import dataclasses
import itertools
import math
import random
import re
from collections import Counter, namedtuple
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

import data as datasets
from data import InputError, Split, describes, image_key
from model import autocast

# ---- recall ------------------------------------------------------------------------------------


def retrieval_metrics(scores, image_of_caption):
    """Recall of text retrieval (tr: the image asks) and image retrieval (ir: the caption asks).

    scores: (C, I) float. image_of_caption: (C,) long, in any order, any number of captions an
    image (0: it asks nothing); -1 = a caption of no image, which is only in the way.
    Returns {"tr_r1", "tr_r5", "tr_r10", "ir_r1", "ir_r5", "ir_r10", "rsum"}.
    """
    scores, owner = torch.as_tensor(scores).float(), torch.as_tensor(image_of_caption)
    fits = scores.dim() == 2 and scores.numel() > 0 and owner.shape == scores.shape[:1]
    if not fits or owner.max() >= scores.size(1):
        shapes = f"{tuple(scores.shape)}, {tuple(owner.shape)}"
        raise ValueError(f"scores (C, I) and image_of_caption (C,) below I wanted, got {shapes}")
    own = owner[:, None] == torch.arange(scores.size(1), device=owner.device)  # (C, I)
    result = {}
    for way, rank in (("tr", ranks(scores.T, own.T)), ("ir", ranks(scores, own))):
        for k in (1, 5, 10):
            result[f"{way}_r{k}"] = 100 * (rank < k).double().mean().item()
    return result | {"rsum": sum(result.values())}


def ranks(scores, own):
    """Rank of the best right item of each query that has one: scores, own (queries, items) -> (n,).
    Counted are the wrong items not below it: a tie, or a score that is nan, counts against it."""
    found = []
    for block, right in zip(scores.split(1024), own.split(1024)):  # bounds the memory
        best = block.where(right, -math.inf).amax(1, keepdim=True)
        ahead = ~(block < best) & ~right
        found.append(ahead.sum(1)[right.any(1)])
    return torch.cat(found)


def fold_metrics(scores, image_of_caption, folds=5):
    """retrieval_metrics of successive fifths of the images with their captions, averaged."""
    results = []
    for images in torch.arange(scores.size(1)).tensor_split(folds):
        rows = torch.isin(image_of_caption, images)
        owner = image_of_caption[rows] - images[0]
        results.append(retrieval_metrics(scores[rows][:, images], owner))
    return {name: sum(result[name] for result in results) / folds for name in results[0]}


def precision_at_r(scores, right, count):
    """mAP@R, R-Precision and R@1 of one query -> (3,). scores: (items,). right: (n,) long, those
    positives that are among the items. R = count, all positives."""
    own = scores[right].sort(descending=True).values
    nth = torch.arange(1, len(right) + 1)
    ahead = (~(scores < own[:, None])).sum(1) - (~(own < own[:, None])).sum(1)  # wrong ones
    hit = (ahead + nth <= count).double()
    precision = hit * nth / (ahead + nth)
    return torch.stack([precision.sum() / count, hit.sum() / count, (ahead[0] == 0).double()])


def eccv_metrics(scores, data, split, root):
    """precision_at_r on the positives of ECCV Caption and CxC; {} where the files are missing.

    scores: (C, I) of COCO's test split. root: a folder, somewhere below which they lie.
    Returns {"eccv_tr_map_at_r", "eccv_tr_rprecision", "eccv_tr_r1", "eccv_tr_queries", ...}.
    """
    listings = Path(root).glob("**/original_caption_to_image.json")
    listings = [path for path in listings if path.with_name("coco_test_ids.npy").is_file()]
    result = {}
    for listing in listings[:1]:
        images = {image_key(name): i for i, name in enumerate(data.splits[split].images)}
        captions = caption_rows(listing, data.splits[split].image_of_caption, images)
        for name in ("eccv", "cxc"):
            file = listing.with_name(f"{name}_image_to_caption.json")
            result |= positives_metrics(f"{name}_tr", file, scores.T, images, captions)
            file = listing.with_name(f"{name}_caption_to_image.json")
            result |= positives_metrics(f"{name}_ir", file, scores, captions, images)
    return result


def caption_rows(listing, owner, images):
    """COCO's caption ids -> our numbers. An image's ids come in the order of its captions."""
    image_of = datasets.read_json(listing)  # {caption: [image]}
    waiting = {image: (owner == i).nonzero()[:, 0].tolist() for image, i in images.items()}
    rows = {}
    for caption in np.load(listing.with_name("coco_test_ids.npy"), allow_pickle=False).tolist():
        captions = waiting.get(str(image_of[str(caption)][0]))
        if captions:
            rows[str(caption)] = captions.pop(0)
    return rows


def positives_metrics(prefix, file, scores, queries, items):
    """The means of precision_at_r over the queries of a file, {query: [positives]}."""
    found = []
    for query, positives in (datasets.read_json(file) if file.is_file() else {}).items():
        positives = {str(positive) for positive in positives}
        right = [items[positive] for positive in positives if positive in items]
        if query in queries and right:  # R counts all positives, as in the official code
            line, right = scores[queries[query]], torch.tensor(right)
            found.append(precision_at_r(line, right, len(positives)))
    if not found:
        return {}
    values = [*(100 * torch.stack(found).mean(0)).tolist(), len(found)]
    measures = ("map_at_r", "rprecision", "r1", "queries")
    return {f"{prefix}_{measure}": value for measure, value in zip(measures, values)}


def truth_table(scenes, captions):
    """The oracle's word on every pair: (C, I) bool."""
    return torch.tensor([[describes(text, scene) is True for scene in scenes] for text in captions])


def identification_ceiling(split):
    """R@1 of one who knows all and guesses among ties: {"ceiling_tr_r1", "ceiling_ir_r1"}."""
    true = truth_table(split.scenes, split.captions)
    own = true & (split.image_of_caption[:, None] == torch.arange(len(split.scenes)))
    shares = [100 * (own.sum(axis) / true.sum(axis).clamp(min=1)).mean().item() for axis in (0, 1)]
    return dict(zip(("ceiling_tr_r1", "ceiling_ir_r1"), shares))


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
    model,
    data,
    split,
    device="cpu",
    dtype=torch.float32,
    score_batch=128,
    progress=None,
    captions=None,
    images=None,
):
    """Matching logits of every caption of a split with every image of it -> (C, I) on the CPU.

    progress: called with the pairs done and all, after each block of pairs.
    captions, images: (C,), (I,) long, those wanted, in that order; None = all.
    An image is prepared once, a caption once for every 256 images.
    """
    content = data.splits[split]
    captions = torch.as_tensor(range(len(content.captions)) if captions is None else captions)
    images = torch.as_tensor(range(len(content.images)) if images is None else images)
    lengths = (data.text(split, captions) != data.tokenizer.pad_id).sum(1)
    counts = torch.as_tensor(data.regions.counts[content.rows[images.numpy()]])
    # A GPU gets pairs of one length, unmasked; on a CPU score_pairs packs those of any length.
    packed = torch.device(device).type == "cpu"
    row_groups, column_groups = (equal_groups(0 * n if packed else n) for n in (lengths, counts))
    scores = torch.empty(len(captions), len(images))
    done = 0
    with inference(model, device, dtype):
        for columns in column_groups:
            features, boxes, mask = (x.to(device) for x in data.image(split, images[columns]))
            pictures = model.prepare_regions(features, boxes, mask if packed else None)
            for rows in row_groups:
                ids = data.text(split, captions[rows]).to(device)
                texts = model.prepare_text(ids, ids != data.tokenizer.pad_id if packed else None)
                pairs = torch.arange(len(rows) * len(columns), device=device)
                row, column = pairs // len(columns), pairs % len(columns)
                logits = model.score_pairs(texts, row, pictures, column, score_batch)
                # The only place where a GPU is waited for.
                scores[rows[:, None], columns] = logits.float().view(len(rows), -1).cpu()
                done += len(pairs)
                if progress is not None:
                    progress(done, scores.numel())
    return scores


def judge_words(
    model, data, split, sentences, images, device="cpu", dtype=torch.float32, score_batch=128
):
    """What the heads say of sentences (N, T) long, padded, with images (N,) long of a split.

    Returns, on the CPU, matching logits (N,), and of each word discrimination logits (N, T, 2),
    class 0 = replaced, and the likeliest original (N, T) long.
    """
    found = []
    with inference(model, device, dtype):
        for ids, columns in zip(sentences.to(device).split(score_batch), images.split(score_batch)):
            features, boxes, region_mask = (x.to(device) for x in data.image(split, columns))
            hidden = model(ids, features, boxes, ids != data.tokenizer.pad_id, region_mask)
            words = hidden[:, : ids.size(1)]
            # All words at once times a large vocabulary would fill the memory.
            corrections = [model.correct(part).argmax(-1) for part in words.split(16)]
            judged = (model.match(hidden), model.discriminate(words), torch.cat(corrections))
            found.append([part.cpu() for part in judged])
    logits, discrimination, corrections = map(torch.cat, zip(*found))
    return logits.float(), discrimination.float(), corrections


def score_sentences(model, data, split, sentences, images, **options):
    """Matching logits (N,) of sentences (N, T) long, padded, with images (N,) long of a split."""
    return judge_words(model, data, split, sentences, images, **options)[0]


def own_words(data, texts, images=(), rows=(), owner=()):
    """The data set with one split, "own", of these captions and of images of the region store by
    name and row. owner: for each caption the number of its image in `images`."""
    split = Split(list(images), np.array(rows, np.int64), list(texts), torch.tensor(owner))
    return dataclasses.replace(data, splits={"own": split})


def encode_texts(data, texts):
    """Sentences -> input_ids (N, T) long, padded."""
    return own_words(data, texts).text("own", torch.arange(len(texts)))


# ---- generated negatives: do the heads find and mend the wrong word? ---------------------------


def share(part, whole=None):
    """How much of `whole`, or of all, is `part` (bool both), in percent; 0 of 0 is 0."""
    whole = torch.ones_like(part) if whole is None else whole
    return 100 * (part & whole).sum().item() / max(whole.sum().item(), 1)


def auc(high, low):
    """Probability that one of `high` (n,) exceeds one of `low` (m,), ties half, in percent.
    Exact, by the sum of ranks; 50 if there is nothing to compare."""
    if len(high) == 0 or len(low) == 0:
        return 50.0
    _, place, counts = torch.cat((high, low)).unique(return_inverse=True, return_counts=True)
    rank = counts.double().cumsum(0) - (counts.double() - 1) / 2  # equal values share their mean
    won = rank[place[: len(high)]].sum().item() - len(high) * (len(high) + 1) / 2
    return 100 * won / (len(high) * len(low))


def suspicion_of(discrimination, words):
    """How sure discrimination (N, T, 2) is that a word was replaced: (N, T), -inf at no word."""
    suspicion = discrimination[..., 0] - discrimination[..., 1]
    return suspicion.nan_to_num().masked_fill(~words, -math.inf)


def real_words(data, ids):
    """True at words, False at [CLS], [SEP] and padding: ids (...) -> (...) bool."""
    tokenizer = data.tokenizer
    return (ids != tokenizer.pad_id) & (ids != tokenizer.cls_id) & (ids != tokenizer.sep_id)


def word_metrics(discrimination, corrections, sentences, originals, words):
    """Word discrimination and correction (3.4) over all words at once.

    discrimination: logits (N, T, 2), class 0 = replaced. corrections, sentences, originals:
    (N, T) long. words: (N, T) bool. Replaced is a word that differs from the original.
    wod_auc: the probability that a replaced word is more suspicious than an original one.
    wod_most_suspicious: altered sentences whose most suspicious word is a replaced one.
    wod_precision, wod_recall: of words whose class 0 is the likelier. woc_accuracy: of corrections.
    """
    suspicion = suspicion_of(discrimination, words)
    replaced = (sentences != originals) & words
    original = words & ~replaced
    most_replaced = suspicion.masked_fill(~replaced, -math.inf).amax(1)
    most_original = suspicion.masked_fill(~original, -math.inf).amax(1)
    return {
        "wod_auc": auc(suspicion[replaced], suspicion[original]),
        "wod_most_suspicious": share(most_replaced > most_original, replaced.any(1)),
        "wod_precision": share(replaced, suspicion > 0),
        "wod_recall": share(suspicion > 0, replaced),
        "woc_accuracy": share(corrections == originals, replaced),
    }


def example_metrics(model, data, split, examples, **options):
    """word_metrics of generated negatives, their mean matching score (synthetic_score), and
    fair_negatives: by the oracle false and grammatical. true_negatives teach something wrong,
    ungrammatical_negatives can be told without a look at the image.
    sentences_repaired: wrong sentences that word correction makes right in place of the most
    suspicious word: true by the oracle; without one, the original again.

    examples: {"images": (N,), "originals": (N, T), "sentences": (N, H, T), "valid": (N, H)}.
    """
    row = examples["valid"].nonzero()[:, 0]
    if not len(row):
        return {}
    sentences, originals = examples["sentences"][examples["valid"]], examples["originals"][row]
    images, words = examples["images"][row], real_words(data, sentences)
    logits, *judged = judge_words(model, data, split, sentences, images, **options)
    metrics = {"synthetic_score": logits.sigmoid().mean().item()}
    metrics |= word_metrics(*judged, sentences, originals, words)
    most = suspicion_of(judged[0], words).argmax(1, keepdim=True)
    repaired = sentences.scatter(1, most, judged[1].gather(1, most))
    scenes = data.splits[split].scenes
    if not scenes:
        right = (repaired == originals).all(1)
        return metrics | {"sentences_repaired": share(right)}

    def ask_oracle(sentences):
        texts = [data.tokenizer.decode(ids) for ids in sentences.tolist()]
        return [describes(text, scenes[image]) for text, image in zip(texts, images)]

    verdicts = ask_oracle(sentences)
    for name, verdict in {"fair": False, "true": True, "ungrammatical": None}.items():
        metrics[f"{name}_negatives"] = 100 * verdicts.count(verdict) / len(verdicts)
    wrong = torch.tensor([verdict is not True for verdict in verdicts])
    right = torch.tensor([verdict is True for verdict in ask_oracle(repaired)])
    return metrics | {"sentences_repaired": share(right, wrong)}


# ---- altered captions: is every word read? -----------------------------------------------------
# One word of a caption is changed for another of its kind, so that the caption is false. In the
# embedded world grammar and oracle tell kinds and truth; of photographs the phrase parser tells
# kinds, and a word is taken for false that none of the image's captions mentions.

NUMBERS = "one two three four five six seven eight nine ten".split()


def changeable(words, scenes):
    """[(position, kind, form)] of the words of a caption that others of their form may replace."""
    if scenes:
        kinds = {word: kind for kind, own in datasets.KINDS.items() for word in own}
        return [(n, kinds[word], kinds[word]) for n, word in enumerate(words) if word in kinds]
    found = []
    for kind, positions in datasets.parse_phrases(words):
        word = words[positions[0]].lower()
        if kind == "attribute" and (word in NUMBERS or word.isdigit()):
            kind = "number"
        # A sentence stays one: dog for cat, dogs for cats, an apple for an owl.
        form = (kind, re.search("((?<=...)(ing|ed)|s|)$", word)[0], word[0] in "aeiou")
        if len(positions) == 1:
            found.append((positions[0], kind, form))
    return found


def common_words(data, split):
    """{form: {word: count}} of the words that the model knows and training captions use five times
    or more."""
    counts = {}
    for caption in data.splits.get("train", data.splits[split]).captions[:50_000]:
        words = datasets.split_words(caption)
        for n, _, form in changeable(words, data.splits[split].scenes):
            if data.tokenizer.unk_id not in data.tokenizer.encode(words[n]):
                counts.setdefault(form, Counter())[words[n].lower()] += 1
    return {form: {w: n for w, n in own.items() if n >= 5} for form, own in counts.items()}


def altered_captions(data, split, seed=0):
    """Captions of a split, each altered once for every kind of word in it, kinds in random order;
    a word stands in as often as it is used. What cannot be made false is left out.
    Returns captions (N,) long, ascending, texts [N] and the kinds [N] of the changed words."""
    content = data.splits[split]
    lexicon = common_words(data, split)
    mentioned = [set() for _ in content.images]
    for image, caption in zip(content.image_of_caption, content.captions):
        mentioned[image] |= {word.rstrip("s") for word in datasets.split_words(caption.lower())}
    altered = []
    for c, caption in enumerate(content.captions):
        rng = random.Random(f"{seed} {c}")
        words, image = datasets.split_words(caption), content.image_of_caption[c]
        changed = {}  # kind: text
        places = changeable(words, content.scenes)
        for n, kind, form in rng.sample(places, len(places)):
            common = lexicon.get(form) or {words[n].lower(): 1}
            for other in rng.choices([*common], [*common.values()], k=20):
                text = " ".join([*words[:n], other, *words[n + 1 :]])
                false = other.rstrip("s") not in mentioned[image]
                if content.scenes:
                    false = describes(text, content.scenes[image]) is False
                if false:
                    changed.setdefault(kind, text)
        altered += [(c, text, kind) for kind, text in changed.items()]
    captions, texts, kinds = zip(*altered) if altered else ((), (), ())
    return torch.tensor(captions, dtype=torch.long), texts, kinds


def altered_metrics(model, data, split, seed=0, **options):
    """one_word_wrong: captions that score above themselves with one word wrong, and the same by
    kind of word, one_word_wrong_colour, .... In the embedded world also
    oversensitivity: true paraphrases ("A left of B" told as "B right of A") that do not score above
    a one-word-wrong version of their caption. {} if no word can be changed."""
    content = data.splits[split]
    captions, texts, kinds = altered_captions(data, split, seed)
    if not texts:
        return {}
    images = content.image_of_caption[captions]

    def scores_of(texts, images):
        ids = encode_texts(data, texts)
        return score_sentences(model, data, split, ids, images, **options)

    wrong = scores_of(texts, images)
    won = scores_of([content.captions[c] for c in captions], images) > wrong
    metrics = {"one_word_wrong": share(won)}
    for kind in sorted(set(kinds)):
        own = torch.tensor([other == kind for other in kinds])
        metrics[f"one_word_wrong_{kind}"] = share(won, own)
    if content.scenes:
        told = [datasets.paraphrase(content.captions[c]) for c in captions]
        kept = [n for n, text in enumerate(told) if text is not None]
        won = scores_of([told[n] for n in kept], images[kept]) > wrong[kept]
        metrics["oversensitivity"] = share(~won)
    return metrics


def altered_gallery(model, data, split, scores, seed=0, **options):
    """Text recall with one altered caption beside every true one, as RoCOCO has it:
    {"altered_tr_r1", "altered_tr_r5", "altered_tr_r10"}. scores: (C, I) of the true ones.

    Costs as much as the score matrix. In the embedded world an altered caption is not in the way
    of an image that it is true of.
    """
    content = data.splits[split]
    captions, texts, _ = altered_captions(data, split, seed)
    texts = [text for n, text in enumerate(texts) if n == 0 or captions[n] != captions[n - 1]]
    none = torch.full((len(texts),), -1)
    own = own_words(data, texts, content.images, content.rows, none.tolist())
    wrong = score_matrix(model, own, "own", **options)
    if content.scenes:
        wrong = wrong.masked_fill(truth_table(content.scenes, texts), -math.inf)
    owner = torch.cat((content.image_of_caption, none))
    metrics = retrieval_metrics(torch.cat((scores, wrong)), owner)
    return {f"altered_{name}": value for name, value in metrics.items() if name.startswith("tr")}


# ---- published probes --------------------------------------------------------------------------

PROBES = {  # fields of an item: the image's, then those of texts; of a list the last five are false
    "sugarcrepe": {"filename": str, "caption": str, "negative_caption": str},
    "foil": {"image_file": str, "caption": str, "foil": str},
    "rococo": {"image": str, "caption": list},
}


def run_probe(path, model, data, split, **options):
    """One fine-grained test, known by the fields of its JSON, on the images that have features.

    SugarCrepe and VALSE's FOIL: "pairwise", the share of true captions that score above their false
    ones. FOIL also: word_metrics on the "same_length" items whose texts have as many word pieces.
    RoCOCO: text recall "tr_r1" .., and "altered_tr_r1" .. with the altered captions in the gallery.
    All: "items" used, "total", "held_out" (with an image of this split). The file's name precedes
    every key. Raises InputError for any other file.
    """
    probe, items = read_probe(path)
    where, *fields = PROBES[probe]
    row_of = {image_key(name): row for row, name in enumerate(data.regions.names)}
    found = [item for item in items if image_key(item[where]) in row_of]
    rows = [row_of[image_key(item[where])] for item in found]
    held_out = int(np.isin(rows, data.splits[split].rows).sum())
    result = {"items": len(found), "total": len(items), "held_out": held_out}
    texts, owner = [], []
    for i, item in enumerate(found):
        if probe == "rococo":
            texts += item["caption"]
            owner += [i] * (len(item["caption"]) - 5) + [-1] * 5
        else:
            texts += [item[field] for field in fields]
            owner += [i, i]
    if found:
        own = own_words(data, texts, [data.regions.names[row] for row in rows], rows, owner)
        measure = probe_gallery if probe == "rococo" else probe_pairs
        result |= measure(model, own, probe, **options)
    return {f"{Path(path).stem}_{name}": value for name, value in result.items()}


def read_probe(path):
    """A probe's file -> its name in PROBES and its items, which have all its fields."""
    items = datasets.read_json(path)
    items = [*items.values()] if isinstance(items, dict) else items
    for probe, fields in PROBES.items():
        with contextlib.suppress(LookupError, TypeError):  # there is no such field, or no item
            values = [(item[field], kind) for item in items for field, kind in fields.items()]
            fits = [isinstance(v, kind) and len(v) > 5 * (kind is list) for v, kind in values]
            texts = [isinstance(text, str) for value, _ in values for text in value]
            if texts and all(fits + texts):
                return probe, items
    raise InputError(f"{path}: no file of SugarCrepe, VALSE's FOIL or RoCOCO")


def probe_gallery(model, own, probe, **options):
    """Text retrieval without and with the altered captions, which belong to no image."""
    owner = own.splits["own"].image_of_caption
    scores = score_matrix(model, own, "own", **options)
    plain = retrieval_metrics(scores[owner >= 0], owner[owner >= 0])
    altered = {f"altered_{k}": value for k, value in retrieval_metrics(scores, owner).items()}
    return {k: value for k, value in (plain | altered).items() if "tr_" in k}


def probe_pairs(model, own, probe, **options):
    """Captions that are true and false in turn."""
    ids = own.text("own", torch.arange(len(own.splits["own"].captions)))
    images = own.splits["own"].image_of_caption
    logits, *judged = judge_words(model, own, "own", ids, images, **options)
    result = {"pairwise": share(logits[::2] > logits[1::2])}
    if probe == "foil":
        lengths = (ids != own.tokenizer.pad_id).sum(1)
        same = lengths[::2] == lengths[1::2]
        result["same_length"] = int(same.sum())
        discrimination, corrections, wrong = (part[1::2][same] for part in (*judged, ids))
        words = real_words(own, wrong)
        result |= word_metrics(discrimination, corrections, wrong, ids[::2][same], words)
    return result


# ---- pictures ----------------------------------------------------------------------------------

WIDTH = 1120
INK, GREY = (35, 38, 45), (125, 128, 135)
RULE, BLUE = (220, 222, 226), (0, 105, 190)
ORANGE, GREEN = (204, 80, 0), (0, 130, 80)
LINES = (BLUE, ORANGE, (0, 150, 95), (160, 70, 160), (210, 160, 0), GREY)
SHADES = ((240, 244, 250), (250, 246, 238))
PANELS = {
    "losses (log)": ("itm", "hard", "mlm", "tags", "wod", "woc"),
    "matching scores": ("positive", "retrieved", "synthetic"),
    "validation R@1, %": ("val_tr_r1", "val_ir_r1"),
}
Word = namedtuple("Word", "text colour underlined below", defaults=(INK, False, ""))


def draw_rows(path, rows):
    """rows: [(PIL picture or None, [(label, score or None, text or [Word])])], one below the other,
    with a thin rule between them."""
    sheet = Image.new("RGB", (WIDTH, 1500 * len(rows)), "white")
    pen = ImageDraw.Draw(sheet)
    top = 0
    for picture, lines in rows:
        y = top + 16
        if picture:
            sheet.paste(picture.convert("RGB").resize((168, 168)), (16, y))
        for label, score, words in lines:
            pen.text((204, y + 3), label, GREY, font_size=15)
            pen.text((290, y), "" if score is None else f"{score:.2f}", INK, font_size=18)
            words = [*map(Word, words.split())] if isinstance(words, str) else words
            y = draw_words(pen, y, words)
        top = max(y, top + 192 if picture else 0) + 10
        pen.line((0, top - 1, WIDTH, top - 1), RULE)
    sheet.crop((0, 0, WIDTH, top)).save(path)


def draw_words(pen, y, words):
    """One sentence, in as many lines as it needs; returns where the next may begin."""
    x = 350
    height = 48 if any(word.below for word in words) else 28
    for word in words:
        width = pen.textlength(word.text, font_size=18)
        wide = max(width, pen.textlength(word.below, font_size=14))
        if x > 350 and x + wide > WIDTH - 16:
            x, y = 350, y + height
        pen.text((x, y), word.text, word.colour, font_size=18)
        if word.underlined:
            pen.rectangle((x, y + 22, x + width, y + 24), BLUE)
        pen.text((x, y + 27), word.below, GREEN, font_size=14)
        x += wide + 6
    return y + height


def draw_negatives(path, model, data, split, scores, examples, count=6, **options):
    """For some images: the caption, the hardest retrieved one, and three generated ones with their
    most suspicious word and what word correction puts there. scores: (C, I). examples: as for
    example_metrics, and "captions" (N,)."""
    content, tokens = data.splits[split], data.tokenizer.tokens
    suspicious = Word("most suspicious word", INK, True, "what word correction puts there")
    rows = [(None, [("legend", None, [Word("replaced word   ", ORANGE), suspicious])])]
    for n in torch.linspace(0, len(examples["captions"]) - 1, count).long().unique().tolist():
        image = examples["images"][n].item()
        line = scores[:, image].sigmoid()
        hardest = line.masked_fill(content.image_of_caption == image, -1).argmax()
        lines = []
        for label, c in (("caption", examples["captions"][n]), ("retrieved", hardest)):
            lines.append((label, line[c], content.captions[c]))
        ids = examples["sentences"][n][examples["valid"][n]][:3]
        if len(ids):
            images = torch.full((len(ids),), image)
            judged = judge_words(model, data, split, ids, images, **options)
            for sentence, logit, flags, corrections in zip(ids, *judged):
                real = real_words(data, sentence)
                most = suspicion_of(flags, real).argmax()
                words = [Word(tokens[i]) for i in sentence]
                for t in (sentence != examples["originals"][n]).nonzero()[:, 0]:
                    words[t] = words[t]._replace(colour=ORANGE)
                words[most] = words[most]._replace(underlined=True, below=tokens[corrections[most]])
                words = [word for word, kept in zip(words, real) if kept]
                lines.append(("generated", logit.sigmoid(), words))
        rows.append((picture_of(data, split, image), lines))
    draw_rows(path, rows)


def picture_of(data, split, image):
    """What stands for an image, a PIL image: the drawn scene, or the boxes of its regions."""
    if data.splits[split].scenes:
        return datasets.draw(data.splits[split].scenes[image])
    sheet = Image.new("RGB", (168, 168), SHADES[0])
    boxes = data.image(split, torch.tensor([image]))[1][0, :, :4] * 167
    for box, colour in zip(boxes.tolist(), itertools.cycle(LINES)):
        ImageDraw.Draw(sheet).rectangle(box, outline=colour)
    return sheet


def draw_curves(path, rows):
    """The PANELS over the steps of a log, the phases shaded. rows: its lines as dicts."""
    sheet = Image.new("RGB", (WIDTH, 271 * len(PANELS)), "white")
    top = 0
    for title, columns in PANELS.items():
        curves = {}  # column: [(step, value)]
        for column, row in itertools.product(columns, rows):
            if row.get(column) not in (None, "") and math.isfinite(float(row[column])):
                point = (float(row["step"]), float(row[column]))
                curves.setdefault(column, []).append(point)
        if curves:
            draw_panel(ImageDraw.Draw(sheet), top, title, curves, rows)
            top += 271
    sheet.crop((0, 0, WIDTH, max(top, 1))).save(path)


def axis_ticks(values, log):
    """Ticks of the value axis: decades, or four even steps from 0 to a round number."""
    low, high = max(min(values), 1e-4), max(*values, 1e-4)
    if log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high) + 1e-9) + 1)
        return [10.0**n for n in decades]
    unit = 10 ** math.floor(math.log10(high))
    return np.linspace(0, math.ceil(high / unit + 1e-9) * unit, 5)


def draw_panel(pen, top, title, curves, rows):
    """One panel, 270 pixels high. curves: {column: [(step, value)]}."""
    log = title.endswith("(log)")
    ticks = axis_ticks([value for points in curves.values() for _, value in points], log)
    last = max(1, *(float(row["step"]) for row in rows))

    def place(step, value):
        x = np.interp(step, (0, last), (70, WIDTH - 170))
        scale = np.log10 if log else float
        limits = (scale(ticks[0]), scale(ticks[-1]))
        return x, np.interp(scale(max(value, ticks[0])), limits, (top + 236, top + 34))

    # The phases, then the two axes, then the curves on top.
    begin = 0
    for n, (phase, own) in enumerate(itertools.groupby(rows, lambda row: row["phase"])):
        end = float([*own][-1]["step"])
        pen.rectangle((*place(begin, ticks[-1]), *place(end, ticks[0])), SHADES[n % 2])
        pen.text((place(begin, 0)[0] + 4, top + 36), phase, GREY, font_size=13)
        begin = end
    for tick in ticks:
        pen.line((*place(0, tick), *place(last, tick)), RULE)
        pen.text((62, place(0, tick)[1]), f"{tick:.4g}", GREY, anchor="rm", font_size=13)
    for step in np.linspace(0, last, 5):
        pen.text((place(step, 0)[0], top + 242), f"{step:.0f}", GREY, anchor="ma", font_size=13)
    pen.text((70, top + 8), title, INK, font_size=16)
    for n, (column, points) in enumerate(curves.items()):
        pen.line([place(*point) for point in points], LINES[n], 2, joint="curve")
        pen.text((WIDTH - 156, top + 34 + 18 * n), column, LINES[n], font_size=15)
    pen.line((0, top + 270, WIDTH, top + 270), RULE)


# ---- all together ------------------------------------------------------------------------------

TITLES = {  # of the table; what is not named here is printed as its key
    "rsum": "RSum",
    "synthetic_score": "mean score of generated negatives",
    "fair_negatives": "generated: false and grammatical, %",
    "true_negatives": "generated: true after all, %",
    "ungrammatical_negatives": "generated: no sentence, %",
    "wod_auc": "replaced above original words, AUC %",
    "wod_most_suspicious": "most suspicious word is a wrong one, %",
    "woc_accuracy": "word correction, accuracy %",
    "one_word_wrong": "caption over one word wrong, %",
    "oversensitivity": "true paraphrase not over a false one, %",
}


def report(model, data, split, scores, examples, seed=0, root=None, **options):
    """Everything measured on a split -> {metric: value}. scores: (C, I) of the whole split.
    examples: as for example_metrics. root: a folder with the files of eccv_metrics, or None."""
    owner = data.splits[split].image_of_caption
    metrics = retrieval_metrics(scores, owner)
    if data.name == "coco" and scores.size(1) == 5000:
        folds = fold_metrics(scores, owner)
        metrics |= {f"1k_{name}": value for name, value in folds.items()}
    if root:
        metrics |= eccv_metrics(scores, data, split, root)
    metrics |= example_metrics(model, data, split, examples, **options)
    metrics |= altered_metrics(model, data, split, seed, **options)
    return {name: round(value, 4) for name, value in metrics.items()}


def table(metrics, warmup):
    """Lines of a table: name, value after the warm-up if there was one, value at the end."""
    lines = [f"{'':42}{'warm-up' if warmup else '':>10}{'final':>10}"]
    for name, value in metrics.items():
        before = f"{warmup[name]:.2f}" if name in warmup else ""
        lines.append(f"{TITLES.get(name, name):42}{before:>10}{value:10.2f}")
    return lines


def search(model, data, split, query, image, path, **options):
    """The images that a sentence describes best, or else the captions of an image: draws them and
    returns [(score, image name or caption)], best first."""
    content = data.splits[split]
    rows = [(None, [("query", None, query)])]
    if query:
        ids = encode_texts(data, [known_words(data.tokenizer, query)])
        ids, images = ids.expand(len(content.images), -1), torch.arange(len(content.images))
        texts = content.images
    elif image in content.images:
        number = content.images.index(image)
        rows = [(picture_of(data, split, number), [("query", None, image)])]
        ids = data.text(split, torch.arange(len(content.captions)))
        images = torch.full((len(ids),), number)
        owners = zip(content.captions, content.image_of_caption)
        texts = [text + ("  (its own)" if i == number else "") for text, i in owners]
    else:
        some = ", ".join(content.images[:3])
        raise InputError(f"--image {image}: no such image in the {split} split; it has {some}, ...")
    scores = score_sentences(model, data, split, ids, images, **options).sigmoid()
    best = scores.topk(min(6, len(scores))).indices.tolist()
    for place, i in enumerate(best, 1):
        picture = picture_of(data, split, i) if query else None
        rows.append((picture, [(f"{place}.", scores[i], texts[i])]))
    draw_rows(path, rows)
    return [(scores[i].item(), texts[i]) for i in best]


def known_words(tokenizer, query):
    """The query without marks that the model does not know; InputError for unknown words."""
    words = datasets.split_words(query)
    unknown = [word for word in words if tokenizer.unk_id in tokenizer.encode(word)]
    strange = [word for word in unknown if any(char.isalnum() for char in word)]
    if strange or len(unknown) == len(words):
        strange = ", ".join(strange) or "an empty sentence"
        raise InputError(f"--query: the model does not know {strange}; use words of its vocabulary")
    return " ".join(word for word in words if word not in unknown)
