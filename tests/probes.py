"""Published fine-grained tests, which `tagsdc.py --probe FILE ...` runs: SugarCrepe, VALSE's FOIL,
RoCOCO, and the positives of ECCV Caption and CxC.

Letters: C captions, I images. All shares are in percent, and a tie counts against the model."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data as datasets
import evaluate
from data import Split, image_key


def published_metrics(paths, root, model, data, split, scores, **options):
    """{metric: value} of probe files, and of ECCV Caption where its files lie below root, or None.
    scores: (C, I) of the split."""
    metrics = {}
    for path in paths:
        metrics |= run_probe(path, model, data, split, **options)
    if root:
        with datasets.one_line_errors(root, "its files of ECCV Caption must be whole"):
            metrics |= eccv_metrics(scores, data, split, root)
    return {name: round(value, 4) for name, value in metrics.items()}


def run_probe(path, model, data, split, **options):
    """One fine-grained test on those of its images that have features.
    SugarCrepe and VALSE's FOIL: "pairwise", the share of true captions that score above their false
    ones, and word_metrics of the "same_length" items whose texts have as many word pieces.
    RoCOCO: text recall "tr_r1" .., and "altered_tr_r1" .. with the altered captions in the gallery.
    All: "items" used, "total", "held_out" (with an image of this split), after the file's name."""
    items = read_probe(path)
    row_of = {image_key(name): row for row, name in enumerate(data.regions.names)}
    rows = []
    texts = []
    owner = []  # of each text its number in rows; a false caption has none
    for name, true, false in items:
        if image_key(name) in row_of:
            owner += [len(rows)] * len(true) + [-1] * len(false)
            texts += true + false
            rows.append(row_of[image_key(name)])
    held_out = np.isin(rows, data.splits[split].rows).sum()
    result = {"items": len(rows), "total": len(items), "held_out": int(held_out)}
    owner = torch.tensor(owner)
    own = dataclasses.replace(data, splits={"probe": Split(rows, np.array(rows), texts, owner)})
    if len(texts) > 2 * len(rows):  # not pairs: RoCOCO
        scores = evaluate.score_matrix(model, own, "probe", **options)
        for prefix, used in (("", owner >= 0), ("altered_", owner >= -1)):
            metrics = evaluate.retrieval_metrics(scores[used], owner[used])
            result |= {f"{prefix}{name}": metrics[name] for name in ("tr_r1", "tr_r5", "tr_r10")}
    elif rows:
        ids = own.text("probe", torch.arange(len(texts)))  # true and false in turn
        images = torch.arange(len(texts)) // 2
        logits, suspicion, corrections = evaluate.judge_words(
            model, own, "probe", ids, images, **options
        )
        result["pairwise"] = evaluate.share(logits[::2] > logits[1::2])
        real = ids != data.tokenizer.pad_id
        same = (real[::2] == real[1::2]).all(1).nonzero()[:, 0]
        result["same_length"] = len(same)
        wrong = 2 * same + 1
        if len(wrong):
            result |= evaluate.word_metrics(
                suspicion[wrong], corrections[wrong], ids[wrong], ids[wrong - 1]
            )
    return {f"{Path(path).stem}_{name}": value for name, value in result.items()}


def read_probe(path):
    """A probe's file, known by its fields -> [(image's name, true captions, false captions)]."""
    items = datasets.read_json(path)
    found = []
    with datasets.one_line_errors(path, "a file of SugarCrepe, VALSE's FOIL or RoCOCO is expected"):
        for item in items.values() if isinstance(items, dict) else items:
            name = item.get("image") or item.get("filename") or item["image_file"]
            true = item["caption"]
            if isinstance(true, list):
                true, false = true[:-5], true[-5:]
            else:
                true, false = [true], [item.get("foil") or item["negative_caption"]]
            if not true or not all(isinstance(t, str) and t for t in (name, *true, *false)):
                raise ValueError(f"the item of {name} lacks a text")
            found.append((name, true, false))
        if not found:
            raise ValueError("it is empty")
    return found


# ---- more positives than COCO's own -------------------------------------------------------------


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
    Returns {"eccv_tr_map_at_r", "eccv_tr_rprecision", "eccv_tr_r1", "eccv_tr_queries", ...}."""
    ids = [*Path(root).glob("**/coco_test_ids.npy")]
    if not ids or not ids[0].with_name("original_caption_to_image.json").is_file():
        return {}
    folder = ids[0].parent
    owner = data.splits[split].image_of_caption
    images = {image_key(name): i for i, name in enumerate(data.splits[split].images)}
    # COCO's caption ids -> our numbers: an image's ids come in the order of its captions.
    waiting = {image: (owner == i).nonzero()[:, 0].tolist() for image, i in images.items()}
    image_of = datasets.read_json(folder / "original_caption_to_image.json")  # {caption: [image]}
    captions = {}
    for caption in np.load(ids[0], allow_pickle=False).tolist():
        own = waiting.get(str(image_of[str(caption)][0]))
        if own:
            captions[str(caption)] = own.pop(0)
    result = {}
    for name in ("eccv", "cxc"):
        file = folder / f"{name}_image_to_caption.json"
        result |= positives_metrics(f"{name}_tr", file, scores.T, images, captions)
        file = folder / f"{name}_caption_to_image.json"
        result |= positives_metrics(f"{name}_ir", file, scores, captions, images)
    return result


def positives_metrics(prefix, file, scores, queries, items):
    """The means of precision_at_r over the queries of a file, {query: [positives]}."""
    found = []
    for query, positives in (datasets.read_json(file) if file.is_file() else {}).items():
        positives = {str(positive) for positive in positives}
        right = [items[positive] for positive in positives if positive in items]
        if query in queries and right:  # R counts all positives, as in the official code
            right = torch.tensor(right)
            found.append(precision_at_r(scores[queries[query]], right, len(positives)))
    if not found:
        return {}
    values = [*(100 * torch.stack(found).mean(0)).tolist(), len(found)]
    measures = ("map_at_r", "rprecision", "r1", "queries")
    return {f"{prefix}_{measure}": value for measure, value in zip(measures, values)}
