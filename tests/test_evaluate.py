"""Recall, pair scores, analyses and probes, each against a slow or hand-made reference."""

import copy
import dataclasses
import json
import math
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data as datasets
import evaluate
from model import Config, TagsDC

GOLDEN = Path(__file__).parent / "golden" / "public_metrics.npz"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return datasets.load_scenes(0, (150, 5, 10), tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="module")
def model(world):
    torch.manual_seed(0)
    sizes = dict(vocab_size=len(world.tokenizer.tokens), feature_size=world.regions.feature_size)
    model = TagsDC(Config.preset("tiny", **sizes))
    for parameter in model.parameters():  # scores that differ clearly
        parameter.data += 0.05 * torch.randn(parameter.shape)
    return model


@pytest.fixture(scope="module")
def scores(model, world):
    return evaluate.score_matrix(model, world, "test")


@pytest.fixture(scope="module")
def altered(world):
    return evaluate.altered_captions(world, "test")


def encode(data, texts):
    """Sentences -> input_ids (N, T) long, padded."""
    split = datasets.Split([], [], list(texts), None)
    sentences = dataclasses.replace(data, splits={"some": split})
    return sentences.text("some", torch.arange(len(texts)))


def close(values, expected):
    """Equal up to rounding, compared with the size of what is compared."""
    return (values - expected).abs().max() <= 1e-4 * expected.abs().max()


# ---- recall


def agrees(metrics, golden, prefix, take=lambda value: value):
    return all(
        metrics[f"{way}_r{k}"]
        == pytest.approx(100 * float(take(golden[f"{prefix}{name}_r{k}"])), abs=1e-4)
        for way, name in (("tr", "txt"), ("ir", "exact_img"))
        for k in (1, 5, 10)
    )


@pytest.mark.parametrize("case", ["A", "B", "C", "R", "F"])
def test_recall_of_the_official_function(case):
    golden = np.load(GOLDEN, allow_pickle=False)
    scores, owner = torch.tensor(golden[f"{case}/scores"]), torch.tensor(golden[f"{case}/txt2img"])
    metrics = evaluate.retrieval_metrics(scores, owner)
    assert agrees(metrics, golden, f"{case}/full/" if case == "F" else f"{case}/")
    total = sum(value for key, value in metrics.items() if key != "rsum")
    assert metrics["rsum"] == pytest.approx(total)


def test_official_image_recall_above_one_is_not_reproduced():
    golden = np.load(GOLDEN, allow_pickle=False)
    scores, owner = torch.tensor(golden["B/scores"]), torch.tensor(golden["B/txt2img"])
    metrics = evaluate.retrieval_metrics(scores, owner)
    assert golden["B/img_r10"] > 1 and metrics["ir_r10"] == pytest.approx(94.4, abs=1e-4)
    for k in (1, 5, 10):
        assert metrics[f"ir_r{k}"] < 100 * golden[f"B/img_r{k}"] - 0.5


def test_folds_are_successive_images_and_averaged():
    golden = np.load(GOLDEN, allow_pickle=False)
    scores, owner = torch.tensor(golden["F/scores"]), torch.tensor(golden["F/txt2img"])
    folds = evaluate.fold_metrics(scores, owner)
    assert agrees(folds, golden, "F/mean/")
    first = evaluate.fold_metrics(scores[:, :20][owner < 20], owner[owner < 20], 1)
    assert agrees(first, golden, "F/fold/", lambda folds: folds[0])
    shuffle = torch.randperm(len(owner))
    assert evaluate.fold_metrics(scores[shuffle], owner[shuffle]) == pytest.approx(folds)


def test_recall_by_counting_one_by_one_with_ties_shuffles_and_distractors():
    generator = torch.Generator().manual_seed(0)
    owner = torch.cat((torch.arange(9), torch.randint(-1, 9, (30,), generator=generator)))
    owner = owner[torch.randperm(39, generator=generator)]
    scores = torch.randint(0, 12, (39, 9), generator=generator).float()
    rank = {"tr": [], "ir": []}
    for image in range(9):
        best = max(scores[c, image] for c in range(39) if owner[c] == image)
        wrong = [c for c in range(39) if owner[c] != image]
        rank["tr"].append(sum(bool(scores[c, image] >= best) for c in wrong))
    for c in range(39):
        if owner[c] >= 0:
            wrong = [i for i in range(9) if i != owner[c]]
            rank["ir"].append(sum(bool(scores[c, i] >= scores[c, owner[c]]) for i in wrong))
    metrics = evaluate.retrieval_metrics(scores, owner)
    for way, ranks in rank.items():
        for k in (1, 5, 10):
            assert metrics[f"{way}_r{k}"] == pytest.approx(100 * np.mean([r < k for r in ranks]))


def test_recall_of_more_queries_than_a_block():
    scores = torch.rand(2500, 2500, generator=torch.Generator().manual_seed(0))
    rank = (scores > scores.diagonal()[:, None]).sum(1)
    metrics = evaluate.retrieval_metrics(scores, torch.arange(2500))
    assert metrics["ir_r10"] == pytest.approx(100 * (rank < 10).double().mean().item())


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_equal_or_broken_scores_find_nothing(value):
    metrics = evaluate.retrieval_metrics(torch.full((60, 12), value), torch.arange(60) // 5)
    assert not any(metrics.values())


def test_one_broken_score_helps_nobody():
    scores, owner = torch.eye(12).repeat_interleave(2, 0), torch.arange(24) // 2
    assert evaluate.retrieval_metrics(scores, owner)["rsum"] == 600
    scores[0, 0] = scores[5, 7] = float("nan")  # a right one; a wrong one of caption 5, image 7
    metrics = evaluate.retrieval_metrics(scores, owner)
    assert metrics["ir_r1"] == pytest.approx(100 * 22 / 24)
    assert metrics["tr_r1"] == pytest.approx(100 * 10 / 12)


def test_cocos_test_split_is_known_by_its_names_alone():
    def is_coco_test(names):
        return evaluate.is_coco_test(datasets.Split(names, None, None, None))

    numbers = range(9, 9 + 5000 * 116, 116)
    assert is_coco_test([f"COCO_val2014_{n:012d}.jpg" for n in numbers])
    assert is_coco_test([f"{n}.npz" for n in numbers])
    assert not is_coco_test([f"{n:06d}.jpg" for n in range(5000)])  # anybody's
    assert not is_coco_test([f"flickr30k_{n:012d}.npz" for n in numbers])
    assert not is_coco_test([f"COCO_val2014_{n:012d}.jpg" for n in numbers][:-1])
    assert not is_coco_test([f"{1000000 + n}.jpg" for n in range(5000)])  # Flickr30K's are such
    assert not is_coco_test([f"holiday {n}.jpg" for n in range(5000)])


def test_five_folds_are_of_cocos_test_split_and_of_scans_arrays_of_it():
    def has_coco_folds(names):
        return evaluate.has_coco_folds(datasets.Split(names, None, None, None))

    assert has_coco_folds([f"COCO_val2014_{9 + 116 * n:012d}.jpg" for n in range(5000)])
    testall = [f"testall_ims_{n:06d}" for n in range(5000)]
    assert has_coco_folds(testall)
    assert not evaluate.is_coco_test(datasets.Split(testall, None, None, None))  # no ids of COCO
    assert not has_coco_folds(testall[:1000])
    assert not has_coco_folds([f"{n:06d}.jpg" for n in range(5000)])


def test_recall_refuses_other_shapes():
    for scores, owner in (
        (torch.zeros(4, 2), torch.zeros(3).long()),
        (torch.zeros(4), torch.zeros(4).long()),
        (torch.zeros(4, 2), torch.arange(4)),
    ):
        with pytest.raises(ValueError, match="wanted"):
            evaluate.retrieval_metrics(scores, owner)


# ---- scores


def one_pair(model, world, caption, image):
    ids, parts = world.text("test", [caption]), world.image("test", [image])
    with torch.no_grad():
        return model.match(model(ids, parts[0], parts[1], ids >= 0, parts[2])).item()


def test_score_matrix_is_every_pair_alone(model, world):
    captions = [0, 7, 21, 33, 49]
    scores = evaluate.score_matrix(model, world, "test", captions=captions, score_batch=3)
    assert scores.shape == (5, 10) and scores.dtype == torch.float32 and scores.std() > 0.01
    model.eval()
    alone = [[one_pair(model, world, caption, i) for i in range(10)] for caption in captions]
    assert close(scores, torch.tensor(alone))


def test_scores_depend_on_neither_order_nor_batch(model, world, scores):
    order, images = torch.randperm(50), torch.randperm(10)[:7]
    some = evaluate.score_matrix(model, world, "test", captions=order, images=images, score_batch=7)
    assert close(some, scores[order][:, images])
    half = evaluate.score_matrix(model, world, "test", dtype=torch.bfloat16)
    difference = (half - scores).abs().max()
    assert half.dtype == torch.float32
    assert 1e-5 < difference < 0.1 * scores.std() + 0.01 * scores.abs().max()


def test_groups_of_one_length_give_the_same_scores(model, world, scores, monkeypatch):
    """What a GPU gets, tried on the CPU: groups without padding, and no masks."""
    masks = []

    class Torch:
        def __getattr__(self, name):
            return getattr(torch, name)

        def device(self, name):
            return types.SimpleNamespace(type="other")

    def prepare_text(ids, mask):
        masks.append(mask)
        assert (ids != world.tokenizer.pad_id).all()
        return TagsDC.prepare_text(model, ids, mask)

    monkeypatch.setattr(evaluate, "torch", Torch())
    monkeypatch.setattr(model, "prepare_text", prepare_text, raising=False)
    assert close(evaluate.score_matrix(model.eval(), world, "test"), scores)
    assert len(masks) > 2 and not any(mask is not None for mask in masks)


def test_single_pairs_agree_with_the_matrix(model, world, scores):
    images, texts = torch.randint(0, 10, (50,)), world.splits["test"].captions
    alone = evaluate.score_sentences(model, world, "test", texts, images, score_batch=11)
    assert close(alone, scores[torch.arange(50), images])


def test_sentences_of_many_images_share_a_pass(model, world, monkeypatch):
    sizes = []

    def score_pairs(texts, text_index, pictures, image_index, batch):
        sizes.append(len(text_index))
        return TagsDC.score_pairs(model, texts, text_index, pictures, image_index, batch)

    monkeypatch.setattr(model, "score_pairs", score_pairs, raising=False)
    texts, images = world.splits["test"].captions, torch.arange(50) % 10
    evaluate.score_sentences(model, world, "test", texts, images, score_batch=20)
    assert sizes == [20, 20, 10]


def test_only_what_is_missing_is_scored(model, world, scores, tmp_path):
    dtype = torch.float32
    matrix = evaluate.open_scores(tmp_path / "scores.npy", model, world, "test", dtype)
    assert matrix.shape == scores.shape and matrix.isnan().all()
    evaluate.score_matrix(model, world, "test", captions=range(30), scores=matrix[:30])
    assert close(matrix[:30], scores[:30]) and matrix[30:].isnan().all()
    # The next process finds what the one before it left.
    again = evaluate.open_scores(tmp_path / "scores.npy", model, world, "test", dtype)
    again[:30] = 7.0  # which is kept
    evaluate.score_matrix(model, world, "test", captions=range(30), scores=again[:30])
    evaluate.score_matrix(model, world, "test", captions=range(30, 50), scores=again[30:])
    assert (again[:30] == 7).all() and close(again[30:], scores[30:])
    assert (np.load(tmp_path / "scores.npy")[:30] == 7).all()
    # Scores of another dtype, of other weights or captions are not taken for these.
    half = evaluate.open_scores(tmp_path / "scores.npy", model, world, "test", torch.bfloat16)
    assert half.isnan().all()
    half[:] = 7.0
    other = copy.deepcopy(model)
    other.matching.bias.data += 1
    dtype = torch.bfloat16
    other = evaluate.open_scores(tmp_path / "scores.npy", other, world, "test", dtype)
    assert other.isnan().all()


def test_long_work_shows_how_far_it_is(model, world, monkeypatch):
    shown = []

    class ProgressLine:
        def __init__(self, what, total):
            self.counts = [what, total, 0]

        def advance(self, n=1):
            self.counts[2] += n

        def close(self):
            shown.append(tuple(self.counts))

    monkeypatch.setattr(datasets, "ProgressLine", ProgressLine)
    evaluate.score_matrix(model, world, "test", captions=range(7))
    ids, images = world.text("test", torch.arange(24)), torch.arange(24) % 10
    evaluate.judge_words(model, world, "test", ids, images, score_batch=7)
    texts = world.splits["test"].captions[:24]
    evaluate.score_sentences(model, world, "test", texts, images, score_batch=7)
    done = [("pairs scored", 70), ("sentences judged", 24), ("sentences scored", 24)]
    assert shown == [(what, total, total) for what, total in done]


def test_a_part_of_a_split_is_its_first_images(model, world, scores):
    part = evaluate.first_images(world, "test", 4)
    assert part.splits["test"].images == world.splits["test"].images[:4]
    assert len(part.splits["test"].phrases) == 20 and part.splits["train"] is world.splits["train"]
    assert close(evaluate.score_matrix(model, part, "test"), scores[:20, :4])
    whole = evaluate.headline(world, "test")
    assert whole == "test split: 10 images, 50 captions"
    line = evaluate.headline(world, "test", 4)
    assert "4 images, 20 captions" in line and "first 4 of 10 images" in line
    assert evaluate.headline(world, "test", 99) == whole
    assert evaluate.headline(world, "val").startswith("no test split; val split")


def test_the_mode_is_restored_even_after_a_fault(model, world):
    model.train()
    evaluate.score_matrix(model, world, "test", captions=[0])
    assert model.training and all(module.training for module in model.modules())
    with pytest.raises(RuntimeError), evaluate.inference(model, "cpu"):
        assert not model.training and not torch.is_grad_enabled()
        assert not torch.ones(2).is_inference()  # what is mined here goes on into a training step
        raise RuntimeError
    assert model.training and torch.is_grad_enabled()
    model.eval()
    evaluate.score_matrix(model, world, "test", captions=[0])
    assert not model.training


# ---- generated negatives


def test_word_metrics_by_hand():
    originals = torch.tensor([[2, 10, 11, 12, 3], [2, 10, 13, 3, 9]])  # the last is no word
    sentences = torch.tensor([[2, 20, 11, 21, 3], [2, 22, 13, 3, 0]])  # three words replaced
    suspicion = torch.zeros(2, 5)  # a tie is no flag
    suspicion[0, 1] = 2.0  # right
    suspicion[0, 2] = 1.0  # wrong
    suspicion[1, 1] = 1.0  # right
    suspicion[1, 4] = -torch.inf  # padding does not count
    corrections = torch.tensor([[0, 10, 0, 9, 0], [0, 22, 0, 0, 0]])
    pairs = [(high, low) for high in (2, 0, 1) for low in (0, 1, 0, 0, 0, 0)]
    auc = np.mean([(high > low) + 0.5 * (high == low) for high, low in pairs])
    metrics = evaluate.word_metrics(suspicion, corrections, sentences, originals)
    assert metrics == pytest.approx(
        {
            "wod_auc": 100 * auc,
            "wod_most_suspicious": 100,
            "woc_accuracy": 100 / 3,
        }
    )
    suspicion[1, 2] = 1.0  # as suspicious as the wrong one: a tie is a failure
    metrics = evaluate.word_metrics(suspicion, corrections, sentences, originals)
    assert metrics["wod_most_suspicious"] == 50
    nothing = evaluate.word_metrics(suspicion, corrections, originals, originals)
    assert nothing.pop("wod_auc") == 50 and not any(nothing.values())


def test_auc_is_the_share_of_all_pairs():
    def auc(high, low):
        replaced = torch.arange(len(high) + len(low))[None] < len(high)
        suspicion = torch.cat((high, low))[None]
        originals = torch.zeros_like(replaced).long()
        return evaluate.word_metrics(suspicion, originals, replaced.long(), originals)["wod_auc"]

    generator = torch.Generator().manual_seed(0)
    for levels in (4, 1000):  # many ties, few
        high = torch.randint(1, levels + 2, (170,), generator=generator).float()
        low = torch.randint(0, levels, (230,), generator=generator).float()
        won = (high[:, None] > low).double() + 0.5 * (high[:, None] == low).double()
        assert auc(high, low) == pytest.approx(100 * won.mean().item(), abs=1e-9)
    assert auc(torch.ones(3), torch.ones(5)) == 50
    assert auc(torch.ones(3), torch.zeros(5)) == 100
    assert auc(torch.zeros(0), torch.zeros(5)) == 50


def test_words_are_judged_as_alone(model, world):
    ids, images = world.text("test", torch.arange(24)), torch.arange(24) % 10
    judged = evaluate.judge_words(model, world, "test", ids, images, score_batch=20)
    logits, suspicion, corrections = judged
    texts = world.splits["test"].captions[:24]
    again = evaluate.score_sentences(model, world, "test", texts, images, score_batch=20)
    assert close(logits, again)
    special = (world.tokenizer.cls_id, world.tokenizer.sep_id, world.tokenizer.pad_id)
    words = torch.tensor([[i not in special for i in row] for row in ids.tolist()])
    assert torch.equal(suspicion > -torch.inf, words)
    model.eval()
    for n in (0, 7, 18, 23):
        own, parts = world.text("test", [n]), world.image("test", [images[n]])
        length = own.size(1)
        with torch.no_grad():
            words = model(own, parts[0], parts[1], None, None)[:, :length]
            replaced, original = model.discriminate(words)[0].unbind(-1)
            assert close(suspicion[n, 1 : length - 1], (replaced - original)[1:-1])
            assert torch.equal(model.correct(words).argmax(-1)[0], corrections[n, :length])


def pad(ids, width):
    return torch.nn.functional.pad(ids, (0, width - ids.size(1)))


def written(world, texts, count):
    """Sentences that were written for the first captions of `count` test images, as examples."""
    ids = encode(world, texts).unflatten(0, (count, -1))
    captions = torch.arange(0, 5 * count, 5)
    return {
        "captions": captions,
        "images": world.splits["test"].image_of_caption[captions],
        "originals": pad(world.text("test", captions), ids.size(2))[:, : ids.size(2)],
        "sentences": ids,
        "valid": torch.ones(ids.shape[:2], dtype=torch.bool),
    }


def test_negatives_are_judged_by_the_oracle_and_repaired(world, model, altered, monkeypatch):
    captions, wrong, _ = altered
    content = world.splits["test"]
    texts = []
    for c in (0, 5, 10, 15):
        caption = content.captions[c]
        texts += [content.captions[c + 1], wrong[captions.tolist().index(c)], caption + " and and"]
    examples = written(world, texts, 4)
    examples["valid"][3, 2] = False

    def judge_words(model, data, split, ids, images, **options):
        """Knows the wrong word and mends it, but not those of the first image."""
        originals = examples["originals"][[examples["images"].tolist().index(i) for i in images]]
        replaced = ids != originals
        suspicion = torch.where(replaced, 0.5, -0.5)
        corrections = originals.where(images[:, None] != examples["images"][0], ids)
        return torch.zeros(len(ids)), suspicion, corrections

    monkeypatch.setattr(evaluate, "judge_words", judge_words)
    metrics = evaluate.example_metrics(model, world, "test", examples)
    assert metrics["true_negatives"] == pytest.approx(100 * 4 / 11)
    assert metrics["fair_negatives"] == pytest.approx(100 * 4 / 11)
    assert metrics["ungrammatical_negatives"] == pytest.approx(100 * 3 / 11)
    assert metrics["sentences_repaired"] == pytest.approx(100 * 3 / 7)  # of 4 false and 3 others
    assert metrics["synthetic_score"] == 0.5
    assert metrics["wod_auc"] == metrics["wod_most_suspicious"] == 100

    # Without an oracle right is what is the original again; the other true caption is altered.
    photographs = without_scenes(world)
    metrics = evaluate.example_metrics(model, photographs, "test", examples)
    assert "fair_negatives" not in metrics
    repaired = 0
    for n, h in examples["valid"].nonzero().tolist():
        different = (examples["sentences"][n, h] != examples["originals"][n]).sum()
        repaired += int(n > 0 and different == 1)
    assert repaired >= 3 and metrics["sentences_repaired"] == pytest.approx(100 * repaired / 11)

    examples["valid"][:] = False
    assert evaluate.example_metrics(model, world, "test", examples) == {}


def without_scenes(world):
    splits = {name: dataclasses.replace(split, scenes=None) for name, split in world.splits.items()}
    return dataclasses.replace(world, splits=splits)


# ---- altered captions


def test_altered_captions_are_one_word_off_and_wrong(world):
    captions, texts, kinds = evaluate.altered_captions(world, "test", seed=1)
    content = world.splits["test"]
    assert len(set(captions.tolist())) > 45 and captions.tolist() == sorted(captions.tolist())
    assert len(set(zip(captions.tolist(), kinds))) == len(kinds) == len(texts)
    assert set(kinds) == set(datasets.KINDS)
    for c, text, kind in zip(captions.tolist(), texts, kinds):
        pairs = [*zip(text.split(), content.captions[c].split(), strict=True)]
        changed = [(new, old) for new, old in pairs if new != old]
        assert len(changed) == 1 and set(changed[0]) <= set(datasets.KINDS[kind])
        scene = content.scenes[content.image_of_caption[c]]
        assert datasets.describes(text, scene) is False
    again = evaluate.altered_captions(world, "test", seed=1)
    assert again[1] == texts and evaluate.altered_captions(world, "test", seed=2)[1] != texts


def alone(model, world, text, image):
    return evaluate.score_sentences(model, world, "test", [text], torch.tensor([image])).item()


def test_altered_metrics_are_counted_pair_by_pair(model, world, scores, altered, monkeypatch):
    captions, texts, kinds = altered
    some = (captions[::5], texts[::5], kinds[::5])
    monkeypatch.setattr(evaluate, "altered_captions", lambda *_: some)
    metrics = evaluate.altered_metrics(model, world, "test", scores, seed=3, score_batch=9)
    content = world.splits["test"]
    won, recognised = {}, []
    for c, text, kind in zip(some[0].tolist(), *some[1:]):
        image = content.image_of_caption[c].item()
        wrong = alone(model, world, text, image)
        won.setdefault(kind, []).append(scores[c, image].item() > wrong)
        paraphrase = datasets.paraphrase(content.captions[c])
        if paraphrase is not None:
            assert datasets.describes(paraphrase, content.scenes[image]) is True
            recognised.append(alone(model, world, paraphrase, image) > wrong)
    everything = sum(won.values(), [])
    assert 20 < metrics["one_word_wrong"] < 80  # an untrained model
    # A pair that is all but equal may fall either way.
    one = 101 / len(everything)
    assert metrics["one_word_wrong"] == pytest.approx(100 * np.mean(everything), abs=one)
    assert metrics["oversensitivity"] == pytest.approx(100 - 100 * np.mean(recognised), abs=2 * one)
    for kind, values in won.items():
        expected = 100 * np.mean(values)
        assert metrics[f"one_word_wrong_{kind}"] == pytest.approx(expected, abs=101 / len(values))
    assert len(metrics) == len(won) + 3


def test_equal_scores_are_failures(model, world, monkeypatch):
    def score_sentences(model, data, split, texts, images, **options):
        return torch.zeros(len(texts))

    monkeypatch.setattr(evaluate, "score_sentences", score_sentences)
    metrics = evaluate.altered_metrics(model, world, "test", torch.zeros(50, 10))
    assert metrics.pop("oversensitivity") == 100 and not any(metrics.values())


def test_nothing_to_alter(world, model, scores):
    split = dataclasses.replace(world.splits["test"], captions=["??"] * 50)
    data = dataclasses.replace(world, splits={"test": split})
    metrics = evaluate.altered_metrics(model, data, "test", scores)
    assert metrics == {}
    assert evaluate.altered_metrics(model, without_scenes(data), "test", scores) == {}


def test_altered_captions_are_only_in_the_way(world, model, scores, altered, monkeypatch):
    content = world.splits["test"]
    owner = content.image_of_caption
    plain = evaluate.retrieval_metrics(scores, owner)["tr_r1"]
    # By hand: an image's best caption is above the altered ones of its own, and those of others.
    generator = torch.Generator().manual_seed(0)
    captions, texts, _ = altered
    rivals = scores[captions, owner[captions]] - torch.rand(len(texts), generator=generator) + 0.2

    def score_sentences(model, data, split, asked, images, **options):
        return rivals if [*asked] == [*texts] else torch.zeros(len(asked))

    monkeypatch.setattr(evaluate, "score_sentences", score_sentences)
    right = scores.clone()
    for i in range(10):
        right[:, i] += 3 * (owner == i)  # most are found without altered captions
    found = 0
    for i in range(10):
        best = right[owner == i, i].max()
        others = [*right[owner != i, i], *(3 + rivals)[owner[captions] == i]]
        found += all(other < best for other in others)
    rivals += 3
    metrics = evaluate.altered_metrics(model, world, "test", right)
    assert metrics["altered_tr_r1"] == pytest.approx(100 * found / 10)
    assert 0 < found < 10 * evaluate.retrieval_metrics(right, owner)["tr_r1"] / 100
    rivals -= 100
    metrics = evaluate.altered_metrics(model, world, "test", scores)
    assert metrics["altered_tr_r1"] == pytest.approx(plain)


# ---- probes


def probe(tmp_path, world, model, content, name="some_probe"):
    (tmp_path / f"{name}.json").write_text(json.dumps(content))
    read = evaluate.read_probe(tmp_path / f"{name}.json")
    result = evaluate.probe_metrics(read, model, world, "test")
    assert all(key.startswith(f"{name}_") for key in result)
    return {key.removeprefix(f"{name}_"): value for key, value in result.items()}


def test_sugarcrepe(tmp_path, world, model, scores, altered):
    content = world.splits["test"]
    captions, texts = altered[0][::3], altered[1][::3]
    items = {}
    for n, (c, text) in enumerate(zip(captions.tolist(), texts)):
        name = content.images[content.image_of_caption[c]]
        items[str(n)] = dict(filename=name, caption=content.captions[c], negative_caption=text)
    items["x"] = dict(filename="nowhere.jpg", caption="a", negative_caption="b")
    name = world.splits["train"].images[0]
    items["y"] = dict(filename=name, caption="a star", negative_caption="a star")
    result = probe(tmp_path, world, model, items)
    n = len(captions)
    assert (result["items"], result["total"], result["held_out"]) == (n + 1, n + 2, n)
    images = content.image_of_caption[captions]
    wrong = evaluate.score_sentences(model, world, "test", texts, images)
    expected = 100 * (scores[captions, images] > wrong).sum().item() / (n + 1)
    assert result["pairwise"] == pytest.approx(expected, abs=2)
    ids, same = encode(world, [items["0"]["caption"], items["0"]["negative_caption"]]), n + 1
    assert result["same_length"] == same and (ids[0] != ids[1]).sum() == 1
    assert result["alike"] == 1, "the item of the train split has two equal texts"
    assert "wod_auc" in result
    longer = {"1": {**items["0"], "negative_caption": items["0"]["caption"] + " and a star"}}
    result = probe(tmp_path, world, model, longer)
    assert result["same_length"] == 0 and "wod_auc" not in result


def test_foil_word_by_word(tmp_path, world, model):
    name = world.splits["test"].images[0]
    right, wrong = "a red star above a circle", "a blue star above a circle"
    items = {
        "1": {"image_file": name, "caption": right, "foil": wrong},
        "2": {"image_file": name, "caption": "a red star", "foil": right},
    }
    result = probe(tmp_path, world, model, items)
    assert (result["items"], result["total"], result["same_length"]) == (2, 2, 1)
    right, wrong = encode(world, [right, wrong]).split(1)
    judged = evaluate.judge_words(model, world, "test", wrong, torch.tensor([0]))
    by_hand = evaluate.word_metrics(*judged[1:], wrong, right)
    assert {key: result[key] for key in by_hand} == pytest.approx(by_hand, abs=1e-3)


def test_rococo_altered_captions_are_only_in_the_way(tmp_path, world, model, scores):
    content = world.splits["test"]
    altered = ["a red star above a circle"] * 5
    items = [
        {"image": f"somewhere/{name}.jpg", "caption": content.captions[5 * i : 5 * i + 5] + altered}
        for i, name in enumerate(content.images)
    ]
    result = probe(tmp_path, world, model, items + [{"image": "no.jpg", "caption": ["a"] * 10}])
    plain = evaluate.retrieval_metrics(scores, content.image_of_caption)
    assert (result["items"], result["total"], result["held_out"]) == (10, 11, 10)
    for k in (1, 5, 10):
        assert result[f"tr_r{k}"] == pytest.approx(plain[f"tr_r{k}"])
        assert result[f"altered_tr_r{k}"] <= result[f"tr_r{k}"]
    assert len(result) == 9
    # Every true caption has an equal rival.
    same = [{**item, "caption": item["caption"][:5] * 2} for item in items]
    assert probe(tmp_path, world, model, same)["altered_tr_r1"] == 0


def test_rococo_takes_the_scores_that_there_are(tmp_path, world, model, scores, monkeypatch):
    content = world.splits["test"]
    items = []
    for i in (7, 2, 9):  # the second true caption is none of the split's
        true = [content.captions[5 * i], f"a red star {i}", f" {content.captions[5 * i + 1]}\n"]
        items.append({"image": content.images[i], "caption": true + ["a blue star"] * 5})
    (tmp_path / "p.json").write_text(json.dumps(items))
    rococo = evaluate.read_probe(tmp_path / "p.json")
    alone = evaluate.probe_metrics(rococo, model, world, "test")
    scored = []

    def score_matrix(model, data, split, captions, **options):
        scored.extend(data.splits[split].captions[c] for c in captions)
        return matrix_of(model, data, split, captions=captions, **options)

    matrix_of = evaluate.score_matrix
    monkeypatch.setattr(evaluate, "score_matrix", score_matrix)
    assert evaluate.probe_metrics(rococo, model, world, "test", scores) == alone
    assert len(scored) == 3 * 6 and not set(scored) & set(content.captions)


def test_of_foil_those_items_count_that_two_annotators_confirmed(tmp_path, world, model):
    name = world.splits["test"].images[0]
    item = {"image_file": name, "caption": "a star", "foil": "a ring"}
    votes = [{"caption": n, "foil": 3 - n, "other": 0} for n in range(4)]
    items = {str(n): {**item, "mturk": vote} for n, vote in enumerate(votes)}
    result = probe(tmp_path, world, model, items)
    assert result["items"] == result["total"] == 2
    file = tmp_path / "none.json"
    file.write_text(json.dumps([{**item, "mturk": votes[0]}]))
    with pytest.raises(datasets.InputError, match="none.json: no items"):
        evaluate.read_probe(file)


def test_probes_of_one_name_are_told_apart_by_their_folders(tmp_path):
    files = []
    for name in ("one/same.json", "two/same.json", "two/other.json", "three/two/same.json"):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True, parents=True)
        file.write_text('[{"filename": "a", "caption": "b", "negative_caption": "c"}]')
        files.append(file)
    probes = evaluate.read_probes(files[:3])
    assert [probe.name for probe in probes] == ["one_same", "two_same", "other"]
    with pytest.raises(datasets.InputError, match="two files would be called two_same"):
        evaluate.read_probes(files)
    assert evaluate.read_probes([]) == []


def test_a_probe_without_features_says_nothing(tmp_path, world, model):
    items = [{"filename": "nowhere", "caption": "b", "negative_caption": "c"}]
    assert probe(tmp_path, world, model, items) == {}


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "null",
        "{",
        "3",
        '[{"a": 1}]',
        '["a"]',
        '{"0": {"filename": "a", "caption": "b"}}',
        '[{"image": "a", "caption": ["one", "two"]}]',
        '[{"image": "a", "caption": ["one", "two", 3, 4, 5, 6]}]',
        '[{"image_file": "a", "caption": "b", "foil": ""}]',
        '[{"image_file": "a", "caption": "b", "foil": "c", "mturk": 3}]',
        '[{"image_file": "a", "caption": "b", "foil": "c", "mturk": {"caption": "3"}}]',
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path, content):
    (tmp_path / "odd.json").write_text(content)
    with pytest.raises(datasets.InputError, match="odd.json") as fault:
        evaluate.read_probe(tmp_path / "odd.json")
    assert "\n" not in str(fault.value)
    with pytest.raises(datasets.InputError, match="missing.json"):
        evaluate.read_probe(tmp_path / "missing.json")


# ---- more positives


def brute_force_precision(line, right, r):
    """As the definition reads: sort, wrong before right among equals, walk down r ranks."""
    order = sorted(range(len(line)), key=lambda i: (-line[i], i in right))
    hits = [i in right for i in order[:r]]
    precision = sum(hit * sum(hits[: k + 1]) / (k + 1) for k, hit in enumerate(hits)) / r
    return precision, sum(hits) / r, order[0] in right


def test_eccv_metrics_on_a_made_gallery(tmp_path, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    names = [f"COCO_val2014_{number:012d}.jpg" for number in (391895, 7, 42, 180)]
    split = datasets.Split(names, np.arange(4), ["a"] * 8, torch.arange(8) // 2)
    regions = type("Regions", (), {"feature_size": 1})
    world = datasets.Data("coco", None, regions, {"test": split})
    scores = torch.randint(0, 6, (8, 4), generator=generator).float()
    assert evaluate.read_positives(tmp_path) is None
    caption_ids, image_ids = [11, 5, 17, 99, 20, 21, 30, 31], [391895, 7, 42, 180]
    left_out = [1000, 1001]  # of an image that is not in this split, in the middle
    folder = tmp_path / "somewhere"
    folder.mkdir()
    listed = np.array(caption_ids[:4] + left_out + caption_ids[4:])
    np.save(folder / "coco_test_ids.npy", listed)
    owners = {c: [image_ids[n // 2]] for n, c in enumerate(caption_ids)}
    owners |= {c: [5] for c in left_out}
    tables = {
        "original_caption_to_image": owners,
        "eccv_image_to_caption": {391895: [5, 11, 17, 1000, 5], 42: [20, 21, 31], 5: [1000]},
        "eccv_caption_to_image": {11: [391895, 7], 31: [180, 42, 7], 1000: [5, 7]},
        "cxc_image_to_caption": {180: [30]},
        "cxc_caption_to_image": {},
    }
    for name, table in tables.items():
        (folder / f"{name}.json").write_text(json.dumps(table))
    positives = evaluate.read_positives(tmp_path)
    assert evaluate.positives_metrics(positives, scores, world, "test") == {}  # 4, not 5,000
    monkeypatch.setattr(evaluate, "is_coco_test", lambda split: True)
    result = evaluate.positives_metrics(positives, scores, world, "test")
    expected = {
        "eccv_tr": [(scores[:, 0], {0, 1, 2}, 4), (scores[:, 2], {4, 5, 7}, 3)],
        "eccv_ir": [(scores[0], {0, 1}, 2), (scores[7], {1, 2, 3}, 3)],
        "cxc_tr": [(scores[:, 3], {6}, 1)],
    }
    assert len(result) == 12
    for way, queries in expected.items():
        rows = [brute_force_precision(line.tolist(), *rest) for line, *rest in queries]
        for key, values in zip(("map_at_r", "rprecision", "r1"), zip(*rows)):
            assert result[f"{way}_{key}"] == pytest.approx(100 * np.mean(values), abs=1e-4), (
                way,
                key,
            )
        assert result[f"{way}_queries"] == len(queries)


def test_damaged_files_of_more_positives_are_refused_in_one_line(tmp_path):
    np.save(tmp_path / "coco_test_ids.npy", np.array([11, 5]))
    file = tmp_path / "original_caption_to_image.json"
    for text in ("{", "[1]", '{"11": [3]}', '{"11": 3, "5": 3}'):
        file.write_text(text)
        with pytest.raises(datasets.InputError) as fault:
            evaluate.read_positives(tmp_path)
        assert "\n" not in str(fault.value) and str(tmp_path) in str(fault.value)
    file.write_text('{"11": [3], "5": [3]}')
    table = tmp_path / "eccv_image_to_caption.json"
    for text in ("{", "[1]", '{"11": 3}'):
        table.write_text(text)
        with pytest.raises(datasets.InputError, match="eccv_image_to_caption"):
            evaluate.read_positives(tmp_path)
    table.unlink()
    np.save(tmp_path / "coco_test_ids.npy", np.array([[1.5]]))
    with pytest.raises(datasets.InputError, match="not a row of ids"):
        evaluate.read_positives(tmp_path)
    np.save(tmp_path / "coco_test_ids.npy", np.array([11, 5]))
    assert evaluate.read_positives(tmp_path).image_of_caption == {"11": "3", "5": "3"}


def test_precision_by_hand():
    line, right = torch.tensor([9.0, 8.0, 7.0, 6.0, 5.0]), torch.tensor([0, 2, 4])
    values = evaluate.precision_at_r(line, right, 3).tolist()
    assert values == pytest.approx([(1 + 2 / 3) / 3, 2 / 3, 1.0])
    values = evaluate.precision_at_r(torch.zeros(5), right, 3).tolist()
    assert values == pytest.approx([1 / 9, 1 / 3, 0.0])  # wrong ones first
    values = evaluate.precision_at_r(line, right[:2], 4).tolist()
    assert values == pytest.approx([(1 + 2 / 3) / 4, 2 / 4, 1.0])


# ---- pictures, report, search


def colours_of(path):
    return {colour for _, colour in Image.open(path).getcolors(1 << 20)}


def test_negatives_are_drawn(tmp_path, world, model, scores, altered):
    captions, texts, _ = altered
    examples = written(world, [texts[captions.tolist().index(5 * n)] for n in range(10)], 10)
    path = tmp_path / "negatives.png"
    evaluate.draw_negatives(path, model, world, "test", scores, examples, 3)
    width, height = Image.open(path).size
    assert width == evaluate.WIDTH and 3 * 168 < height < 3 * 300
    assert {evaluate.ORANGE, evaluate.GREEN, evaluate.GREY} <= colours_of(path)
    # Long sentences go on in the next line; nothing written is no fault.
    examples["valid"][:] = False
    content = world.splits["test"]
    long = dataclasses.replace(content, captions=[" ".join([c] * 5) for c in content.captions])
    data = dataclasses.replace(world, splits={"test": long})
    evaluate.draw_negatives(path, model, data, "test", scores, examples)
    assert Image.open(path).size[1] > 5 * 192
    # Of photographs the boxes of their regions are shown.
    evaluate.draw_negatives(path, model, without_scenes(world), "test", scores, examples)
    sheet = Image.open(path)
    assert sheet.size[1] >= 5 * 192
    left = {colour for _, colour in sheet.crop((16, 0, 184, sheet.size[1])).getcolors(1 << 20)}
    assert {evaluate.RULE, evaluate.INK, evaluate.ORANGE} <= left


def test_the_remark_counts_examples_whose_caption_is_beaten(world, model, scores, monkeypatch):
    examples = written(world, world.splits["test"].captions[1:21:2], 5)  # two an image
    examples["valid"][4] = False
    kept = []
    monkeypatch.setattr(evaluate, "draw_rows", lambda *arguments: kept.extend(arguments))

    def judge_words(model, data, split, ids, images, **options):
        high = scores[examples["captions"], examples["images"]][:4]
        logits = torch.stack((high - 1, high - 1), 1)  # of four examples
        logits[1, 1] = high[1]  # a tie counts against the caption
        logits[2] += 2
        return logits.flatten(), torch.zeros(ids.shape), ids

    monkeypatch.setattr(evaluate, "judge_words", judge_words)
    evaluate.draw_negatives(None, model, world, "test", scores, examples, seed=3)
    assert "In 2 of all 5 examples" in kept[-1] and "(3)" in kept[-1]
    labels = [[line.label for line in lines] for _, lines in kept[3]]
    assert sorted(map(len, labels)) == [1, 2, 4, 4, 4, 4]
    order = [image for image, _ in kept[3][1:]]
    assert order != sorted(order) and sorted(order) == sorted(examples["images"].tolist())


def test_words_are_marked():
    tokens = ["[CLS]", "a", "read", "##ing", "cat", "dog", "blue"]
    suspicion = torch.tensor([-torch.inf, -9.0, 9.0, 1.0, 9.0, -1.0, -torch.inf])
    sentence = torch.tensor([0, 1, 2, 3, 4, 5, 0])
    original = torch.tensor([0, 1, 2, 3, 5, 4, 0])
    corrections = torch.tensor([0, 6, 6, 3, 5, 6, 0])
    words = evaluate.mark_words(tokens, sentence, original, suspicion, corrections)
    assert [word.text for word in words] == ["a", "read", "ing", "cat", "dog"]
    assert [word.continues for word in words] == [False, False, True, False, False]
    replaced = [word.colour == evaluate.ORANGE for word in words]
    assert replaced == [False, False, False, True, True]
    # Corrected is what is suspected; rightly, wrongly, to the same word, not at all.
    assert [word.below for word in words] == ["", "blue", "", "dog", ""]
    assert words[1].below_colour == evaluate.GREY and words[3].below_colour == evaluate.GREEN
    assert words[0].suspicion < 0.01 < words[4].suspicion < 0.5 < words[3].suspicion


def test_curves_are_drawn(tmp_path):
    rows = []
    for step in range(10, 60, 10):
        row = {"phase": "warmup" if step < 40 else "dc", "step": step, "mlm": 4 / step}
        rows.append(row | {"val_tr_r1": math.nan if step == 20 else step})
    rows[-1] |= {"hard": 0.0, "positive": 0.5}  # a logarithm of nothing, a single point
    evaluate.draw_curves(tmp_path / "curves.png", rows)
    panels = [colours_of(tmp_path / "curves.png")]
    width, height = Image.open(tmp_path / "curves.png").size
    assert width == evaluate.WIDTH and height > 3 * 200
    assert {evaluate.BLUE, evaluate.GREY, evaluate.GREEN} <= panels[0]
    assert evaluate.OCHRE not in panels[0]  # no word discrimination
    # The same from log.csv, where all are texts and some are missing.
    texts = [{name: str(value) for name, value in row.items()} for row in rows]
    for row in texts:
        row.setdefault("hard", "")
    evaluate.draw_curves(tmp_path / "again.png", texts)
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "curves.png").read_bytes()
    # Curves that there are not have no panel; nor does a log without a number.
    evaluate.draw_curves(tmp_path / "curves.png", [{"phase": "dc", "step": 1, "mlm": 1.0}])
    assert Image.open(tmp_path / "curves.png").size[1] < height / 2
    evaluate.draw_curves(tmp_path / "curves.png", [{"phase": "dc", "step": 1}])


def test_report_holds_what_was_asked_for(world, model, tmp_path, scores, altered, monkeypatch):
    captions, texts, _ = altered
    examples = written(world, [texts[captions.tolist().index(5 * n)] for n in range(10)], 10)
    some = [part[::3] for part in altered]
    monkeypatch.setattr(evaluate, "altered_captions", lambda *_: some)
    arguments = (model, world, "test", scores, examples)
    metrics = evaluate.report(*arguments, seed=0, score_batch=64)
    wanted = "tr_r1 rsum synthetic_score fair_negatives true_negatives ungrammatical_negatives"
    wanted += " wod_auc wod_most_suspicious woc_accuracy sentences_repaired one_word_wrong"
    wanted += " one_word_wrong_colour oversensitivity altered_tr_r1"
    assert set(wanted.split()) <= metrics.keys()
    assert metrics["fair_negatives"] == 100
    assert metrics == {name: round(value, 4) for name, value in metrics.items()}
    assert metrics == evaluate.report(*arguments, seed=0, score_batch=64)
    lines = evaluate.table(metrics, {"rsum": 12.345})
    assert len(lines) == 1 + len(metrics) and "warm-up" in lines[0]
    assert any("rsum" in line and "12.3" in line for line in lines)
    assert "warm-up" not in evaluate.table(metrics, {})[0]
    photographs = evaluate.report(model, without_scenes(world), "test", scores, examples)
    assert not {"fair_negatives", "oversensitivity", "one_word_wrong"} & photographs.keys()
    assert "sentences_repaired" in photographs
    # The table says of each what it counts.
    assert metrics.keys() <= evaluate.MEASURES.keys()
    assert "a colour" in evaluate.meaning_of("one_word_wrong_colour")
    assert evaluate.meaning_of("1k_rsum") == evaluate.MEASURES["rsum"]
    assert evaluate.meaning_of("danger_altered_tr_r5") == evaluate.MEASURES["altered_tr_r5"]
    assert any(line.startswith("tr_r1 ") and "images" in line for line in lines)


def test_search_finds_what_the_scores_say(tmp_path, world, model, scores):
    content, path = world.splits["test"], tmp_path / "search.png"
    scores = scores.sigmoid()
    found = evaluate.search(model, world, "test", content.captions[7], None, path, score_batch=4)
    best = scores[7].topk(6)
    assert [score for score, _ in found] == pytest.approx(best.values.tolist(), abs=1e-4)
    assert found[0][1] == content.images[best.indices[0]]
    assert Image.open(path).size[1] > 6 * 168
    found = evaluate.search(model, world, "test", None, content.images[3], path)
    best = scores[:, 3].topk(6)
    assert [score for score, _ in found] == pytest.approx(best.values.tolist(), abs=1e-4)
    assert Image.open(path).size[1] < 4 * 168  # captions below the one picture that was asked about
    for (_, text), c in zip(found, best.indices.tolist()):
        assert text == content.captions[c]
    with pytest.raises(datasets.InputError, match="nowhere.*test_0000"):
        evaluate.search(model, world, "test", None, "nowhere", path)


def test_queries_with_unknown_words_and_marks(tmp_path, world, model):
    def ask(query):
        return evaluate.search(model, world, "test", query, None, tmp_path / "search.png")

    plain = ask("a red star above a circle")
    for query in ("A red star above a circle.", "« a red star, above a circle »!"):
        assert ask(query) == plain
    with pytest.raises(datasets.InputError, match="does not know unicorn, zebra;"):
        ask("a unicorn above a zebra.")
    for query in (" ", "\u200b\u200b", "?!", "\t\n"):
        with pytest.raises(datasets.InputError, match="an empty sentence"):
            ask(query)
