"""Recall, pair scores, analyses and probes, each against a slow or hand-made reference."""
import dataclasses
import json
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
    model = TagsDC(Config.preset("tiny", vocab_size=len(world.tokenizer.tokens), feature_size=world.feature_size))
    for parameter in model.parameters():  # scores that differ clearly
        parameter.data += 0.05 * torch.randn(parameter.shape)
    return model


# ---- recall


def agrees(metrics, golden, prefix, take=lambda value: value):
    return all(metrics[f"{way}_r{k}"] == pytest.approx(100 * float(take(golden[f"{prefix}{name}_r{k}"])), abs=1e-4)
               for way, name in (("tr", "txt"), ("ir", "exact_img")) for k in (1, 5, 10))


@pytest.mark.parametrize("case", ["A", "B", "C", "R", "F"])
def test_recall_of_the_official_function(case):
    golden = np.load(GOLDEN, allow_pickle=False)
    scores, owner = torch.tensor(golden[f"{case}/scores"]), torch.tensor(golden[f"{case}/txt2img"])
    metrics = evaluate.retrieval_metrics(scores, owner)
    assert agrees(metrics, golden, f"{case}/full/" if case == "F" else f"{case}/")
    assert metrics["rsum"] == pytest.approx(sum(value for key, value in metrics.items() if key != "rsum"))


def test_official_image_recall_above_one_is_not_reproduced():
    golden = np.load(GOLDEN, allow_pickle=False)
    metrics = evaluate.retrieval_metrics(torch.tensor(golden["B/scores"]), torch.tensor(golden["B/txt2img"]))
    assert golden["B/img_r10"] > 1 and metrics["ir_r10"] == pytest.approx(94.4, abs=1e-4)
    assert all(metrics[f"ir_r{k}"] < 100 * golden[f"B/img_r{k}"] - 0.5 for k in (1, 5, 10))


def test_folds_are_successive_images_and_averaged():
    golden = np.load(GOLDEN, allow_pickle=False)
    scores, owner = torch.tensor(golden["F/scores"]), torch.tensor(golden["F/txt2img"])
    assert agrees(evaluate.fold_metrics(scores, owner), golden, "F/mean/")
    first = evaluate.fold_metrics(scores[:, :20][owner < 20], owner[owner < 20], 1)
    assert agrees(first, golden, "F/fold/", lambda folds: folds[0])
    shuffle = torch.randperm(len(owner))
    assert evaluate.fold_metrics(scores[shuffle], owner[shuffle]) == pytest.approx(evaluate.fold_metrics(scores, owner))


def test_recall_by_counting_one_by_one_with_ties_shuffles_and_distractors():
    generator = torch.Generator().manual_seed(0)
    owner = torch.cat((torch.arange(9), torch.randint(-1, 9, (30,), generator=generator)))
    owner = owner[torch.randperm(39, generator=generator)]
    scores = torch.randint(0, 12, (39, 9), generator=generator).float()
    rank = {"tr": [], "ir": []}
    for image in range(9):
        best = max(scores[c, image] for c in range(39) if owner[c] == image)
        rank["tr"].append(sum(bool(scores[c, image] >= best) for c in range(39) if owner[c] != image))
    for c in range(39):
        if owner[c] >= 0:
            rank["ir"].append(sum(bool(scores[c, i] >= scores[c, owner[c]]) for i in range(9) if i != owner[c]))
    metrics = evaluate.retrieval_metrics(scores, owner)
    for way, ranks in rank.items():
        for k in (1, 5, 10):
            assert metrics[f"{way}_r{k}"] == pytest.approx(100 * np.mean([r < k for r in ranks]))


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_equal_or_broken_scores_find_nothing(value):
    metrics = evaluate.retrieval_metrics(torch.full((60, 12), value), torch.arange(60) // 5)
    assert not any(metrics.values())


def test_one_broken_score_helps_nobody():
    scores, owner = torch.eye(12).repeat_interleave(2, 0), torch.arange(24) // 2
    assert evaluate.retrieval_metrics(scores, owner)["rsum"] == 600
    scores[0, 0] = scores[5, 7] = float("nan")  # a right one; a wrong one of caption 5 and image 7
    metrics = evaluate.retrieval_metrics(scores, owner)
    assert metrics["ir_r1"] == pytest.approx(100 * 22 / 24) and metrics["tr_r1"] == pytest.approx(100 * 10 / 12)


def test_recall_refuses_other_shapes():
    for scores, owner in ((torch.zeros(4, 2), torch.zeros(3).long()), (torch.zeros(4), torch.zeros(4).long()),
                          (torch.zeros(0, 3), torch.zeros(0).long())):
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
    for row, caption in enumerate(captions):
        for image in range(10):
            assert scores[row, image].item() == pytest.approx(one_pair(model, world, caption, image), abs=1e-5)


def test_scores_depend_on_neither_order_nor_batch(model, world):
    everything, told = evaluate.score_matrix(model, world, "test"), []
    order = torch.randperm(50)
    some = evaluate.score_matrix(model, world, "test", captions=order, score_batch=7,
                                 progress=lambda *at: told.append(at))
    assert torch.allclose(some, everything[order], atol=1e-5)
    assert told[-1] == (500, 500) and [done for done, _ in told] == sorted(done for done, _ in told)
    half = evaluate.score_matrix(model, world, "test", dtype=torch.bfloat16)
    assert half.dtype == torch.float32 and 1e-5 < (half - everything).abs().max() < 0.1 * everything.std() + 0.05


def test_single_pairs_agree_with_the_matrix(model, world):
    matrix = evaluate.score_matrix(model, world, "test")
    captions, images = torch.arange(50), torch.randint(0, 10, (50,))
    scores = evaluate.score_sentences(model, world, "test", world.text("test", captions), images, score_batch=11)
    assert torch.allclose(scores, matrix[captions, images], atol=1e-5)


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


# ---- analyses


def test_word_metrics_by_hand():
    originals = torch.tensor([[2, 10, 11, 12, 3], [2, 10, 13, 3, 9]])  # the last position is no word
    sentences = torch.tensor([[2, 20, 11, 21, 3], [2, 22, 13, 3, 0]])  # three words replaced
    discrimination = torch.zeros(2, 5, 2)                              # a tie is no flag
    discrimination[0, 1, 0] = discrimination[0, 2, 0] = discrimination[1, 1, 0] = 1.0  # two right, one wrong
    discrimination[1, 4, 0] = 5.0                                      # padding does not count
    corrections = torch.nn.functional.one_hot(torch.tensor([[0, 10, 0, 9, 0], [0, 22, 0, 0, 0]]), 30).float()
    mask = torch.tensor([[True] * 5, [True] * 4 + [False]])
    expected = {"wod_precision": 200 / 3, "wod_recall": 200 / 3, "woc_accuracy": 100 / 3}
    for words in (corrections, corrections.argmax(-1)):
        assert evaluate.word_metrics(discrimination, words, sentences, originals, mask) == pytest.approx(expected)
    nothing = evaluate.word_metrics(discrimination, corrections, originals, originals, mask)
    assert nothing == {"wod_precision": 0, "wod_recall": 0, "woc_accuracy": 0}


def test_words_are_judged_as_alone(model, world):
    ids, images = world.text("test", torch.arange(24)), torch.arange(24) % 10
    logits, discrimination, corrections = evaluate.judge_words(model, world, "test", ids, images, score_batch=20)
    assert torch.equal(logits, evaluate.score_sentences(model, world, "test", ids, images, score_batch=20))
    model.eval()
    for n in (0, 7, 18, 23):
        own, parts = world.text("test", [n]), world.image("test", [images[n]])
        with torch.no_grad():
            words = model(own, parts[0], parts[1], None, None)[:, :own.size(1)]
            assert torch.allclose(model.discriminate(words)[0], discrimination[n, :own.size(1)], atol=1e-5)
            assert torch.equal(model.correct(words).argmax(-1)[0], corrections[n, :own.size(1)])


def test_one_word_wrong_is_one_word_and_wrong(world):
    captions, ids = evaluate.one_word_wrong(world, "test", seed=1)
    content = world.splits["test"]
    assert len(captions) > 45 and captions.tolist() == sorted(set(captions.tolist()))
    for caption, wrong in zip(captions.tolist(), ids):
        text, truth = world.tokenizer.decode(wrong.tolist()), content.captions[caption]
        assert sum(a != b for a, b in zip(text.split(), truth.split())) == 1 and len(text.split()) == len(truth.split())
        assert datasets.describes(text, content.scenes[content.image_of_caption[caption]]) is False
    again = evaluate.one_word_wrong(world, "test", seed=1)
    assert torch.equal(ids, again[1]) and not torch.equal(ids, evaluate.one_word_wrong(world, "test", seed=2)[1])


def test_pairwise_accuracy_counts_ties_as_failures(model, world):
    captions, wrong = evaluate.one_word_wrong(world, "test")
    assert evaluate.pairwise_accuracy(model, world, "test", captions, world.text("test", captions)) == 0
    images = world.splits["test"].image_of_caption[captions]
    good, bad = (evaluate.score_sentences(model, world, "test", ids, images)
                 for ids in (world.text("test", captions), wrong))
    share = 100 * sum(bool(a > b) for a, b in zip(good, bad)) / len(captions)
    assert 20 < share < 80  # an untrained model
    found = evaluate.pairwise_accuracy(model, world, "test", captions, wrong, score_batch=9)
    assert found == pytest.approx(share, abs=2.1)  # a pair that is all but equal may fall either way


def test_false_negatives_are_what_the_oracle_says(world):
    captions, wrong = evaluate.one_word_wrong(world, "test")
    images = world.splits["test"].image_of_caption[captions]
    true, nonsense = world.text("test", captions), wrong.clone()
    nonsense[:, 1:3] = world.tokenizer.encode("and and")[0]
    width = max(true.size(1), wrong.size(1))
    sentences = torch.cat([torch.nn.functional.pad(ids, (0, width - ids.size(1))) for ids in (true, wrong, nonsense)])
    every, n = images.repeat(3), len(captions)
    share = evaluate.false_negative_share(world, "test", every, sentences, torch.ones(3 * n, dtype=torch.bool))
    assert share == pytest.approx({"false_negatives": 100 / 3, "parse": 200 / 3})
    share = evaluate.false_negative_share(world, "test", every, sentences, torch.arange(3 * n) < n + 10)
    assert share == pytest.approx({"false_negatives": 100 * n / (n + 10), "parse": 100})
    none = evaluate.false_negative_share(world, "test", every, sentences, torch.zeros(3 * n, dtype=torch.bool))
    assert none == {"false_negatives": 0, "parse": 0}


# ---- probes


def probe(tmp_path, world, model, content, name="some_probe"):
    (tmp_path / f"{name}.json").write_text(json.dumps(content))
    result = evaluate.run_probe(tmp_path / f"{name}.json", model, world, "test")
    assert all(key.startswith(f"{name}_") for key in result)
    return {key.removeprefix(f"{name}_"): value for key, value in result.items()}


def test_sugarcrepe(tmp_path, world, model):
    content, (captions, ids) = world.splits["test"], evaluate.one_word_wrong(world, "test")
    texts = [world.tokenizer.decode(line.tolist()) for line in ids]
    items = {str(n): {"filename": content.images[content.image_of_caption[c]], "caption": content.captions[c],
                      "negative_caption": text} for n, (c, text) in enumerate(zip(captions.tolist(), texts))}
    items |= {"x": {"filename": "nowhere.jpg", "caption": "a", "negative_caption": "b"},
              "y": {"filename": world.splits["train"].images[0], "caption": "a star", "negative_caption": "a star"}}
    result = probe(tmp_path, world, model, items)
    n = len(captions)
    assert (result["items"], result["total"], result["held_out"]) == (n + 1, n + 2, n)
    expected = evaluate.pairwise_accuracy(model, world, "test", captions, ids) * n / (n + 1)
    assert result["pairwise"] == pytest.approx(expected, abs=2.1) and "wod_recall" not in result


def test_foil_word_by_word(tmp_path, world, model):
    name = world.splits["test"].images[0]
    items = {"1": {"image_file": name, "caption": "a red star above a circle", "foil": "a blue star above a circle"},
             "2": {"image_file": name, "caption": "a red star", "foil": "a red star above a circle"}}
    result = probe(tmp_path, world, model, items)
    assert (result["items"], result["total"], result["same_length"]) == (2, 2, 1)
    own = evaluate.own_words(world, [items["1"]["caption"], items["1"]["foil"]], [name], [world.regions.names.index(name)])
    right, wrong = own.text("own", [0]), own.text("own", [1])
    _, *said = evaluate.judge_words(model, own, "own", wrong, torch.tensor([0]))
    by_hand = evaluate.word_metrics(*said, wrong, right, wrong >= 0)
    assert {key: result[key] for key in by_hand} == pytest.approx(by_hand)


def test_rococo_altered_captions_are_only_in_the_way(tmp_path, world, model):
    content = world.splits["test"]
    altered = ["a red star above a circle"] * 5
    items = [{"image": f"somewhere/{name}.jpg", "caption": content.captions[5 * i:5 * i + 5] + altered}
             for i, name in enumerate(content.images)]
    result = probe(tmp_path, world, model, items + [{"image": "nowhere.jpg", "caption": ["a"] * 10}])
    plain = evaluate.retrieval_metrics(evaluate.score_matrix(model, world, "test"), content.image_of_caption)
    assert (result["items"], result["total"]) == (10, 11)
    for k in (1, 5, 10):
        assert result[f"tr_r{k}"] == pytest.approx(plain[f"tr_r{k}"])
        assert result[f"altered_tr_r{k}"] <= result[f"tr_r{k}"]
    same = [{**item, "caption": item["caption"][:5] * 2} for item in items]  # every true caption has an equal rival
    assert probe(tmp_path, world, model, same)["altered_tr_r1"] == 0


@pytest.mark.parametrize("content", ["{", "[]", "3", '[{"a": 1}]', '["a"]', '{"0": {"filename": "a", "caption": "b"}}',
                                     '[{"image": "a", "caption": ["one", "two"]}]'])
def test_other_files_are_refused_in_one_line(tmp_path, world, model, content):
    (tmp_path / "odd.json").write_text(content)
    with pytest.raises(datasets.InputError, match="odd.json") as fault:
        evaluate.run_probe(tmp_path / "odd.json", model, world, "test")
    assert "\n" not in str(fault.value)
    with pytest.raises(datasets.InputError, match="missing.json"):
        evaluate.run_probe(tmp_path / "missing.json", model, world, "test")


# ---- more positives


def brute_force_precision(line, right, r):
    """As the definition reads: sort, wrong before right among equals, walk down the first r ranks."""
    order = sorted(range(len(line)), key=lambda i: (-line[i], i in right))
    hits = [i in right for i in order[:r]]
    return sum(hit * sum(hits[:k + 1]) / (k + 1) for k, hit in enumerate(hits)) / r, sum(hits) / r, order[0] in right


def test_eccv_metrics_on_a_made_gallery(tmp_path):
    generator = torch.Generator().manual_seed(0)
    names = [f"COCO_val2014_{number:012d}.jpg" for number in (391895, 7, 42, 180)]
    split = datasets.Split(names, np.arange(4), ["a"] * 8, torch.arange(8) // 2)
    world = datasets.Data("coco", None, type("Regions", (), {"feature_size": 1}), {"test": split})
    scores = torch.randint(0, 6, (8, 4), generator=generator).float()
    assert evaluate.eccv_metrics(scores, world, "test", tmp_path) == {}
    caption_ids, image_ids = [11, 5, 17, 99, 20, 21, 30, 31], [391895, 7, 42, 180]
    left_out = [1000, 1001]  # of an image that is not in this split, in the middle
    np.save(tmp_path / "coco_test_ids.npy", np.array(caption_ids[:4] + left_out + caption_ids[4:]))
    assert evaluate.eccv_metrics(scores, world, "test", tmp_path) == {}, "half of the files"
    owners = {**{c: [image_ids[n // 2]] for n, c in enumerate(caption_ids)}, **{c: [5] for c in left_out}}
    tables = {"original_caption_to_image": owners,
              "eccv_image_to_caption": {391895: [5, 11, 17, 1000, 5], 42: [20, 21, 31], 5: [1000]},
              "eccv_caption_to_image": {11: [391895, 7], 31: [180, 42, 7], 1000: [5, 7]},
              "cxc_image_to_caption": {180: [30]}}
    for name, table in tables.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(table))
    result = evaluate.eccv_metrics(scores, world, "test", tmp_path)
    expected = {"eccv_tr": [(scores[:, 0], {0, 1, 2}, 4), (scores[:, 2], {4, 5, 7}, 3)],
                "eccv_ir": [(scores[0], {0, 1}, 2), (scores[7], {1, 2, 3}, 3)], "cxc_tr": [(scores[:, 3], {6}, 1)]}
    assert len(result) == 12
    for way, queries in expected.items():
        rows = [brute_force_precision(line.tolist(), *rest) for line, *rest in queries]
        for key, values in zip(("map_at_r", "rprecision", "r1"), zip(*rows)):
            assert result[f"{way}_{key}"] == pytest.approx(100 * np.mean(values)), (way, key)
        assert result[f"{way}_queries"] == len(queries)


def test_precision_by_hand():
    line, right = torch.tensor([9.0, 8.0, 7.0, 6.0, 5.0]), torch.tensor([0, 2, 4])
    assert evaluate.precision_at_r(line, right, 3).tolist() == pytest.approx([(1 + 2 / 3) / 3, 2 / 3, 1.0])
    assert evaluate.precision_at_r(torch.zeros(5), right, 3).tolist() == pytest.approx([1 / 9, 1 / 3, 0.0])  # wrong first
    assert evaluate.precision_at_r(line, right[:2], 4).tolist() == pytest.approx([(1 + 2 / 3) / 4, 2 / 4, 1.0])


# ---- pictures


def test_pictures_are_drawn(tmp_path, world):
    scene, words = world.splits["test"].scenes[0], "a small red star above a blue ring".split()
    picture = datasets.draw(scene)
    row = dict(picture=picture, caption=words, score=0.9, retrieved=(" ".join(words), 0.5), generated=[
        (words * 4, 0.4, [True, False] * 16, [True] * 32, ["blue"] + [None] * 31)])
    evaluate.draw_negatives(tmp_path / "negatives.png", [row, {**row, "generated": []}])
    log = [{"phase": "warmup" if step < 40 else "dc", "step": str(step), "mlm": 4 / step,
            "tags": "" if step < 40 else 0.0, "val_tr_r1": float("nan") if step == 20 else step}
           for step in range(10, 60, 10)]
    evaluate.draw_curves(tmp_path / "curves.png", log)
    evaluate.draw_curves(tmp_path / "one.png", log[:1])
    evaluate.draw_search(tmp_path / "query.png", "a star", None, [(picture, "one", 0.9), (picture, "two", 0.8)])
    photographs = dataclasses.replace(world, splits={"test": dataclasses.replace(world.splits["test"], scenes=None)})
    boxes = evaluate.picture_of(photographs, "test", 0)
    evaluate.draw_search(tmp_path / "image.png", "one", boxes, [(None, "a star", 0.9)])
    sizes = {path.stem: Image.open(path).size for path in tmp_path.glob("*.png")}
    assert len(sizes) == 5 and {width for width, _ in sizes.values()} == {evaluate.WIDTH}
    assert sizes["query"][1] > 2 * 168 and sizes["negatives"][1] > 400
    colours = {colour for _, colour in Image.open(tmp_path / "negatives.png").getcolors(100000)}
    assert {evaluate.BLUE, evaluate.ORANGE, evaluate.GREEN} <= colours  # underline, replaced word, correction
