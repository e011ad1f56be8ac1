"""Tests of data.py on the real files beside the repository (skipped without them) and on small made ones."""
import base64
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data as data_module
from data import (Data, InputError, Regions, Split, WordPiece, build_vocabulary, check_regions, describe_crops, image_key,
                  load_data, parse_phrases, read_phrases, split_words, write_regions)

REAL = Path(__file__).resolve().parents[2] / "shared" / "real"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="the real files are not here")


# ---------------------------------------------------------------- tokens

@needs_real
@pytest.mark.parametrize("kind", ["cased", "uncased"])
def test_wordpiece_agrees_with_the_reference(kind):
    tokenizer = WordPiece(REAL / f"vocab/bert-base-{kind}-vocab.txt", kind == "uncased")
    lines = json.loads((REAL / f"tokenizer/wordpiece_{kind}.json").read_text(encoding="utf-8"))
    assert len(lines) == 530
    for line in lines:
        assert tokenizer.encode(line["text"]) == line["ids"], line["text"]
        assert [i for word in split_words(line["text"]) for i in tokenizer.pieces(word)] == line["ids"]
    assert tokenizer.tokens[tokenizer.word_range[0]] == "!" and tokenizer.word_range[1] == len(tokenizer.tokens)
    assert [tokenizer.pad_id, tokenizer.unk_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id] == [
        0, 100, 101, 102, 103]


TOKENS = "[PAD] [UNK] [CLS] [SEP] [MASK] a fri ##sb ##ee dog , -".split()


def test_wordpiece_takes_the_longest_piece():
    tokenizer = WordPiece(TOKENS, lowercase=True)
    assert tokenizer.encode("A frisbee,dog") == [5, 6, 7, 8, 10, 9]
    assert tokenizer.encode("frisk") == [1]                     # no piece for the rest: the whole word is unknown
    assert tokenizer.encode("dóg") == [9]
    assert tokenizer.decode([2, 5, 6, 7, 8, 3, 0]) == "a frisbee"


def test_wordpiece_length_limit_and_vocabulary_errors(tmp_path):
    tokenizer = WordPiece([*TOKENS, "##a"], lowercase=False)
    assert len(tokenizer.encode("a" * 100)) == 100 and tokenizer.encode("a" * 101) == [1]
    (tmp_path / "vocab.txt").write_text("[PAD]\na\n")
    for bad in (tmp_path / "vocab.txt", tmp_path / "none.txt"):
        with pytest.raises(InputError, match="vocab.txt|none.txt"):
            WordPiece(bad, False)


def test_built_vocabulary_counts_and_orders():
    tokens = build_vocabulary(["A dog, a cat.", "a Dog"], 2)
    assert tokens == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog"]


# ---------------------------------------------------------------- phrases

@needs_real
def test_phrases_against_the_reference():
    hit, ours, theirs = ({kind: 0 for kind in ("any", "object", "attribute", "relation")} for _ in range(3))
    for entry in json.loads((REAL / "phrases/phrases_reference.json").read_text()):
        got = {i: kind for kind, at in parse_phrases(entry["tokens"]) for i in at}
        want = {i: phrase["type"] for phrase in entry["phrases"] for i in phrase["tokens"]}
        for kind in hit:
            a = {i for i in got if kind in ("any", got[i])}
            b = {i for i in want if kind in ("any", want[i])}
            hit[kind], ours[kind], theirs[kind] = hit[kind] + len(a & b), ours[kind] + len(a), theirs[kind] + len(b)
    for kind in hit:
        least = 0.95 if kind == "any" else 0.85
        assert hit[kind] / ours[kind] >= least and hit[kind] / theirs[kind] >= least, kind


@pytest.mark.parametrize("caption, phrases", [
    ("A fire hydrant on a red curb", [("object", "fire hydrant"), ("relation", "on"), ("attribute", "red"),
                                      ("object", "curb")]),
    ("two dogs are standing in front of a t-shirt", [("attribute", "two"), ("object", "dogs"),
                                                     ("relation", "standing in front of"), ("object", "t - shirt")]),
    ("She is there.", []), ("", []), ("-", []), ("- - -", [])])
def test_phrases_of(caption, phrases):
    words = split_words(caption)
    assert [(kind, " ".join(words[i] for i in at)) for kind, at in parse_phrases(words)] == phrases


@needs_real
def test_phrases_are_disjoint_and_never_crash():
    captions = [e["text"] for e in json.loads((REAL / "tokenizer/wordpiece_cased.json").read_text(encoding="utf-8"))]
    for caption in captions + ["to", "next to", "a red and", "hot dog -", "in the middle of"]:
        words = split_words(caption)
        positions = [i for _, at in parse_phrases(words) for i in at]
        assert len(positions) == len(set(positions)) and set(positions) <= set(range(len(words)))


def test_phrases_file_is_matched_by_letters(tmp_path):
    entry = {"caption": "A  man can't sit", "tokens": ["A", "man", "ca", "n't", "sit"],
             "phrases": [{"type": "object", "tokens": [1]}, {"type": "relation", "tokens": [2, 3]}]}
    (tmp_path / "p.json").write_text(json.dumps([entry]))
    words, positions = read_phrases(tmp_path / "p.json")["A man can't sit"]
    assert words == ["A", "man", "can", "'", "t", "sit"] and positions == [[1], [2, 3, 4]]
    for broken in ({**entry, "tokens": ["A"]}, {**entry, "phrases": [{"tokens": [9]}]}, {"caption": "a"}, 3):
        (tmp_path / "p.json").write_text(json.dumps([broken]))
        with pytest.raises(InputError, match="p.json entry 0"):
            read_phrases(tmp_path / "p.json")


# ---------------------------------------------------------------- the store

def made(n, size=6, seed=0):
    random = np.random.default_rng(seed)
    for i in range(n):
        regions = int(random.integers(1, 5))
        boxes = np.sort(random.random((regions, 2, 2)), 1).reshape(regions, 4)
        yield f"{i}.jpg", random.random((regions, size)).astype(np.float32), boxes.astype(np.float32)


def test_store_round_trip_ragged(tmp_path):
    items = list(made(7))
    write_regions(tmp_path / "r.bin", iter(items), {"from": "test"})
    regions = Regions(tmp_path / "r.bin")
    assert len(regions.names) == 7 and regions.feature_size == 6 and regions.source == {"from": "test"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.bin"]
    rows = np.array([5, 0, 0, 3])
    features, boxes, mask = regions.gather(rows)
    assert features.dtype == boxes.dtype == torch.float32 and mask.dtype == torch.bool
    assert mask.shape[1] == max(len(items[r][1]) for r in rows)
    for b, row in enumerate(rows):
        _, want, corners = items[row]
        n = len(want)
        assert mask[b].tolist() == [True] * n + [False] * (mask.shape[1] - n)
        assert np.array_equal(features[b, :n], want.astype(np.float16).astype(np.float32))
        x1, y1, x2, y2 = corners.T
        w, h = x2 - x1, y2 - y1
        assert np.allclose(boxes[b, :n], np.stack([x1, y1, x2, y2, w, h, w * h], 1), atol=1e-6)
        assert features[b, n:].abs().sum() == 0 == boxes[b, n:].abs().sum()
    alone = regions.gather(np.array([3]))
    assert torch.equal(alone[0][0], features[3, :alone[0].shape[1]])


def test_store_resumes_after_a_kill(tmp_path):
    def killed(done):
        for i, item in enumerate(made(9)):
            if i == 6:
                raise KeyboardInterrupt
            yield item

    path = tmp_path / "r.bin"
    with pytest.raises(KeyboardInterrupt):
        write_regions(path, killed, {"v": 1})
    assert not path.exists()
    with open(tmp_path / "r.bin.part", "r+b") as part:          # the last image was half on disk
        part.truncate(part.seek(0, 2) - 3)
    with open(tmp_path / "r.bin.log", "a") as log:
        log.write('["6.jpg", 2')
    asked = []
    write_regions(path, lambda done: asked.append(set(done)) or made(9), {"v": 1})
    assert asked[0] == {f"{i}.jpg" for i in range(5)}
    write_regions(tmp_path / "whole.bin", made(9), {"v": 1})
    assert path.read_bytes() == (tmp_path / "whole.bin").read_bytes()


def test_store_of_another_source_is_not_resumed(tmp_path):
    def killed(done):
        yield from made(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_regions(tmp_path / "r.bin", killed, {"v": 1})
    write_regions(tmp_path / "r.bin", lambda done: made(4, 5, seed=1) if not done else 1 / 0, {"v": 2})
    assert Regions(tmp_path / "r.bin").feature_size == 5


@pytest.mark.parametrize("harm", ["cut", "flip", "text", "empty"])
def test_harmed_store_is_refused(tmp_path, harm):
    path = tmp_path / "r.bin"
    write_regions(path, made(5), {})
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[:-9], "flip": bytes([whole[0] ^ 1]) + whole[1:], "text": b"hello " * 20,
                      "empty": b""}[harm])
    with pytest.raises(InputError, match="r.bin.*delete it"):
        Regions(path)


@pytest.mark.parametrize("name", [
    "COCO_val2014_000000391895.jpg", "val2014/COCO_val2014_000000391895.jpg", 391895, "391895",
    "coco_val2014_000000391895.npz", "000000391895.jpg", "COCO_val2014_000000391895"])
def test_names_of_one_picture(name):
    assert image_key(name) == "391895"


def test_names_of_other_collections():
    assert image_key("flickr30k_000000001000092795.npz") == image_key("1000092795.jpg")
    assert image_key("1001773457_577c3a7d70.npz") == image_key("1001773457_577c3a7d70.jpg")
    assert image_key("1001773457_577c3a7d70.npz") != image_key("1001773457.jpg")


# ---------------------------------------------------------------- batches

def tiny_data(tmp_path, max_text=64):
    write_regions(tmp_path / "r.bin", made(3), {})
    captions = ["a black dog", "frisbee", "a dog jumps on a frisbee", "it is there", "dog"]
    tokens = build_vocabulary(captions, 1) + ["fris", "##bee"]
    tokens.remove("frisbee")
    split = Split(["0.jpg", "1.jpg", "2.jpg"], np.arange(3), captions, torch.tensor([0, 0, 1, 1, 2]))
    return Data("tiny", WordPiece(tokens, True), Regions(tmp_path / "r.bin"), {"train": split}, max_text)


def test_text_and_phrases_are_aligned(tmp_path):
    data = tiny_data(tmp_path)
    ids = data.text("train", torch.tensor([2, 0]))
    assert ids.dtype == torch.long and ids.shape == (2, 9)
    words = [data.tokenizer.tokens[i] for i in ids[0]]
    assert words == "[CLS] a dog jumps on a fris ##bee [SEP]".split()
    assert ids[1, 5:].eq(data.tokenizer.pad_id).all()
    member = data.phrases("train", torch.tensor([2, 0]))
    assert member.dtype == torch.bool and member.shape == (2, 3, 9)
    assert [[w for w, m in zip(words, row) if m] for row in member[0]] == [["dog"], ["jumps", "on"], ["fris", "##bee"]]
    assert not member[:, :, 0].any() and not member[1, 2].any() and not member[1, :, 4:].any()
    assert torch.equal(data.text("train", [2]), ids[:1])


def test_caption_without_phrases_masks_word_by_word(tmp_path):
    member = tiny_data(tmp_path).phrases("train", torch.tensor([3]))
    assert member.shape == (1, 3, 5) and torch.equal(member[0, :, 1:4], torch.eye(3, dtype=torch.bool))


def test_long_text_is_cut_with_its_phrases(tmp_path):
    data = tiny_data(tmp_path, max_text=5)
    ids = data.text("train", [2])
    assert ids.shape == (1, 5) and ids[0, -1] == data.tokenizer.sep_id and data.phrases("train", [2]).shape[2] == 5


def test_own_captions_and_images(tmp_path):
    data = tiny_data(tmp_path)
    own = data.own_captions("train", torch.tensor([2, 0]))
    assert own.shape[:2] == (2, 2) and own[0, 1].eq(data.tokenizer.pad_id).all()
    both = data.text("train", torch.tensor([0, 1]))
    assert torch.equal(own[1, :, :both.shape[1]], both)
    features, boxes, mask = data.image("train", torch.tensor([1]))
    assert features.shape == (1, int(data.regions.counts[1]), 6) and boxes.shape[2] == 7 and mask.all()


# ---------------------------------------------------------------- the published forms

@needs_real
@pytest.mark.parametrize("name, root, features, counts, size", [
    ("flickr8k_subset/dataset_flickr8k_subset.json", None, None, (600, 100, 200), 1280),
    ("flickr30k", "flickr8k_precomp", None, (120, 40, 40), 1280),
    ("coco", "butd", None, (0, 0, 7), 2048),
    ("coco", "butd", "butd/train2014_obj36.sample.tsv", (0, 0, 7), 2048),
    ("coco", "butd", "butd/images", (0, 0, 7), 256)])
def test_every_form_is_read(tmp_path, name, root, features, counts, size):
    name = REAL / name if root is None else name
    tokens = (REAL / "vocab/bert-base-cased-vocab.txt").read_text(encoding="utf-8").rstrip("\n").split("\n")
    arguments = dict(root=root and REAL / root, features=features and REAL / features, tokens=tokens, store=tmp_path)
    data = load_data(name, **arguments)
    assert tuple(len(data.splits[s].images) if s in data.splits else 0 for s in ("train", "val", "test")) == counts
    assert all(len(split.captions) == 5 * len(split.images) for split in data.splits.values())
    assert data.feature_size == size and not data.tokenizer.lowercase
    features, boxes, mask = data.image("test", torch.arange(5))
    assert features.isfinite().all() and boxes.min() >= 0 and boxes.max() <= 1 and features.std() > 0
    before = (tmp_path / "regions.bin").stat().st_mtime_ns
    load_data(name, **arguments)
    assert (tmp_path / "regions.bin").stat().st_mtime_ns == before              # the second start converts nothing


@needs_real
def test_both_tsv_layouts_hold_the_same_regions(tmp_path):
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"]
    original, lxmert = (load_data("coco", REAL / "butd", REAL / "butd" / f, tokens=tokens, store=tmp_path / f)
                        for f in ("train2014_36.original_layout.tsv", "train2014_obj36.sample.tsv"))
    rows = {image_key(name): row for row, name in enumerate(original.regions.names)}
    for row, name in enumerate(lxmert.regions.names):
        a, b = original.regions.gather(np.array([rows[image_key(name)]])), lxmert.regions.gather(np.array([row]))
        assert a[0].shape[1] == 36 and 10 <= b[0].shape[1] <= 36                # LXMERT's rows have scores
        for k in range(b[0].shape[1]):
            assert ((a[0][0] == b[0][0, k]).all(1) & (a[1][0] == b[1][0, k]).all(1)).any()


@needs_real
def test_npz_and_precomp_agree_and_keep_order(tmp_path):
    npz = load_data(REAL / "flickr8k_subset/dataset_flickr8k_subset.json", store=tmp_path / "a")
    scan = load_data("flickr30k", REAL / "flickr8k_precomp", store=tmp_path / "b")
    for i in (0, 17, 39):
        name, images = scan.splits["test"].images[i], npz.splits["test"].images
        a, b = npz.image("test", [images.index(name)])[0], scan.image("test", [i])[0]
        n = min(a.shape[1], b.shape[1], 6)
        assert (a[:, :n] - b[:, :n]).abs().max() < 2e-3
        assert scan.splits["test"].captions[5 * i] == " ".join(
            npz.splits["test"].captions[5 * images.index(name)].split())


def test_confidence_keeps_10_to_100():
    features, boxes = np.arange(150, dtype=np.float32)[:, None], np.tile(np.float32([[0, 0, 1, 1]]), (150, 1))
    for scores, kept in ((np.linspace(0.9, 0.3, 150), 100), (np.linspace(0.1, 0.01, 150), 10),
                         (np.where(np.arange(150) < 42, 0.25, 0.2), 42)):
        scores = np.random.default_rng(0).permutation(scores)
        got = check_regions(features, boxes, conf=scores)[0][:, 0].astype(int)
        assert len(got) == kept and (np.diff(got) > 0).all() and scores[got].min() >= np.sort(scores)[::-1][kept - 1]
    assert len(check_regions(features, boxes)[0]) == 150
    assert len(check_regions(features[:4], boxes[:4], conf=np.full(4, 0.1))[0]) == 4


# ---------------------------------------------------------------- made data sets, their splits and their faults

def karpathy(path, images):
    path.write_text(json.dumps({"images": [{"filename": n, "split": s, "sentences": [{"raw": c} for c in captions]}
                                           for n, s, captions in images]}))
    return path


def save_npz(path, **change):
    row = dict(features=np.ones((3, 4), np.float16), norm_bb=np.float32([[0, 0, .5, .5, .5, .5]] * 3),
               conf=np.full(3, .5, np.float32), num_bb=3) | change
    np.savez(path, **{name: array for name, array in row.items() if array is not None})


IMAGES = [("1.jpg", "train", ["a red dog"] * 3), ("2.jpg", "restval", ["a red cat"]),
          ("3.jpg", "test", ["a zebra"] * 7)]


@pytest.fixture
def root(tmp_path):
    (tmp_path / "r/regions").mkdir(parents=True)
    karpathy(tmp_path / "r/dataset_coco.json", IMAGES)
    for name in "123":
        save_npz(tmp_path / f"r/regions/coco_train2014_00000000000{name}.npz")
    return tmp_path / "r"


def test_restval_five_captions_and_training_vocabulary(root, tmp_path):
    data = load_data("coco", root, store=tmp_path, min_count=1)
    assert data.splits["train"].images == ["1.jpg", "2.jpg"] and "val" not in data.splits
    assert data.splits["train"].image_of_caption.tolist() == [0, 0, 0, 1]
    assert len(data.splits["test"].captions) == 5
    assert "cat" in data.tokenizer.tokens and "zebra" not in data.tokenizer.tokens      # no word of the test captions
    assert set(load_data("coco", root, store=tmp_path, min_count=4).tokenizer.tokens[5:]) == {"a", "red"}
    (root / "vocab.txt").write_text("\n".join([*TOKENS, "Dog"]))
    assert load_data("coco", root, store=tmp_path).tokenizer.lowercase is False


def test_changed_features_are_converted_again(root, tmp_path):
    load_data("coco", root, store=tmp_path)
    save_npz(root / "regions/coco_train2014_000000000001.npz", features=np.full((3, 4), 7, np.float16))
    data = load_data("coco", root, store=tmp_path)
    assert data.image("train", [0])[0].max() == 7


def test_bbox_in_pixels_and_seven_columns(root, tmp_path):
    save_npz(root / "regions/coco_train2014_000000000001.npz", norm_bb=None, image_w=200, image_h=100,
             bbox=np.float32([[20, 10, 100, 90]] * 3))
    save_npz(root / "regions/coco_train2014_000000000002.npz", norm_bb=np.float32([[.1, .2, .3, .4, .2, .2, .04]] * 3))
    data = load_data("coco", root, store=tmp_path)
    assert torch.allclose(data.image("train", [0])[1][0, 0], torch.tensor([.1, .1, .5, .9, .4, .8, .32]))
    assert torch.allclose(data.image("train", [1])[1][0, 0], torch.tensor([.1, .2, .3, .4, .2, .2, .04]))


def bad_npz(**change):
    return lambda root: save_npz(root / "regions/coco_train2014_000000000002.npz", **change)


def bad_json(index, image):
    return lambda root: karpathy(root / "dataset_coco.json", [*IMAGES[:index], image, *IMAGES[index + 1:]])


def cut_npz(root):
    path = root / "regions/coco_train2014_000000000002.npz"
    path.write_bytes(path.read_bytes()[:200])


FAULTS = {
    "nan": (bad_npz(features=np.full((3, 4), np.nan, np.float32)), "0002.npz.*features.*finite"),
    "too large": (bad_npz(features=np.full((3, 4), 1e6, np.float32)), "0002.npz.*features.*finite"),
    "columns": (bad_npz(norm_bb=np.zeros((3, 5), np.float32)), "0002.npz.*norm_bb.*columns"),
    "num_bb": (bad_npz(num_bb=4), "0002.npz.*num_bb"),
    "conf": (bad_npz(conf=np.ones(2, np.float32)), "0002.npz.*conf"),
    "outside": (bad_npz(norm_bb=np.float32([[0, 0, 1.5, 1, 1.5, 1]] * 3)), "0002.npz.*box 0.*outside"),
    "inside out": (bad_npz(norm_bb=np.float32([[.5, 0, .2, 1, .3, 1]] * 3)), "0002.npz.*box 0"),
    "width": (bad_npz(features=np.ones((3, 5), np.float32)), "0002.npz.*features.*5 wide"),
    "no boxes": (bad_npz(norm_bb=None), "0002.npz.*bbox"),
    "no size": (bad_npz(norm_bb=None, bbox=np.float32([[0, 0, 9, 9]] * 3)), "0002.npz.*bbox.*pixels"),
    "pickled": (bad_npz(features=np.array([[object()]], object)), "0002.npz.*pickle"),
    "cut": (cut_npz, "0002.npz"),
    "missing": (lambda root: (root / "regions/coco_train2014_000000000002.npz").unlink(), "2.jpg.*without features"),
    "no caption": (bad_json(1, ("2.jpg", "train", [])), "dataset_coco.json image 1.*2.jpg.*no caption"),
    "empty caption": (bad_json(1, ("2.jpg", "train", [" "])), "dataset_coco.json image 1.*sentences"),
    "split": (bad_json(1, ("2.jpg", "holdout", ["a"])), "image 1.*split 'holdout'"),
    "twice": (bad_json(1, ("COCO_val2014_000000000001.jpg", "val", ["a"])), "image 1.*twice"),
    "leaves": (bad_json(1, ("../2.jpg", "train", ["a"])), "image 1.*leaves the root"),
    "absolute": (bad_json(1, ("/etc/2.jpg", "train", ["a"])), "image 1.*leaves the root"),
    "text": (bad_json(1, ("2.jpg", "train", [3])), "image 1"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_one_line_and_can_be_left_out(root, tmp_path, fault):
    harm, message = FAULTS[fault]
    harm(root)
    with pytest.raises(InputError, match=message) as caught:
        load_data("coco", root, store=tmp_path)
    assert "\n" not in str(caught.value)
    data = load_data("coco", root, store=tmp_path, skip_bad=True)
    assert data.splits["train"].images == ["1.jpg"] and data.splits["test"].images == ["3.jpg"]
    assert any("left out" in note for note in data.notes)


def tsv_row(name, w=40, h=20, n=2, boxes=((0, 0, 10, 10), (5, 5, 40, 20)), size=3, conf=None, cut=None):
    fields = [name, w, h, n, base64.b64encode(np.float32(boxes).tobytes()).decode(),
              base64.b64encode(np.ones((2, size), np.float32).tobytes()).decode()]
    if conf is not None:
        ids = base64.b64encode(np.zeros(2, np.int64).tobytes()).decode()
        fields = [name, h, w, ids, base64.b64encode(np.float32(conf).tobytes()).decode(), ids, ids, *fields[3:]]
    return "\t".join(map(str, fields))[:cut] + "\n"


@pytest.mark.parametrize("row, message", [
    (tsv_row(2, n=3), "row 2 .image 2.*num_boxes 3"), (tsv_row(2, n=0), "row 2.*num_boxes 0"),
    (tsv_row(2, cut=-9), "row 2.*features.*bytes"), (tsv_row(2, cut=20), "row 2.*5 columns"),
    (tsv_row(2, w=20, h=40), "row 2.*box 1.*outside"), ("2\tx\n", "row 2.*2 columns"),
    (tsv_row(2, size=4), "row 2.*4 wide"), (tsv_row(2, n="two"), "row 2")])
def test_faulty_tsv_rows(tmp_path, row, message):
    (tmp_path / "r").mkdir()
    karpathy(tmp_path / "r/dataset_coco.json", IMAGES)
    (tmp_path / "r/x.tsv").write_text(tsv_row(1) + row + tsv_row("COCO_val2014_000000000003", conf=[.9, .8]))
    with pytest.raises(InputError, match="x.tsv " + message) as caught:
        load_data("coco", tmp_path / "r", store=tmp_path)
    assert "\n" not in str(caught.value)
    data = load_data("coco", tmp_path / "r", store=tmp_path, skip_bad=True)
    assert len(data.regions.names) == 2 and data.splits["test"].images == ["3.jpg"]
    assert torch.allclose(data.image("test", [0])[1][0, 1, :4], torch.tensor([.125, .25, 1., 1.]))


@pytest.mark.parametrize("harm, message", [
    (lambda r: np.save(r / "train_ims.npy", np.array([[[{}]]], object)), "train_ims.npy.*objects"),
    (lambda r: np.save(r / "train_ims.npy", np.ones((2, 3), np.float32)), "train_ims.npy.*3 dimensions"),
    (lambda r: (r / "train_ims.npy").write_bytes((r / "train_ims.npy").read_bytes()[:150]), "train_ims.npy"),
    (lambda r: (r / "train_caps.txt").write_text("a\n" * 9), "train_caps.txt: 9 lines.*2 images"),
    (lambda r: (r / "train_caps.txt").write_text("a\n\n" * 5), "train_caps.txt.*4 of them empty"),
    (lambda r: (r / "train_caps.txt").write_bytes(b"\xff\n" * 10), "train_caps.txt"),
    (lambda r: (r / "train_names.txt").write_text("x\n"), "train_ims.npy.*1 names")])
def test_faulty_precomp(tmp_path, harm, message):
    folder = tmp_path / "f30k_precomp"
    folder.mkdir()
    np.save(folder / "train_ims.npy", np.ones((2, 3, 4), np.float32))
    (folder / "train_caps.txt").write_text("a dog\n" * 10)
    data = load_data("flickr30k", tmp_path, store=tmp_path / "s")
    assert data.image("train", [1])[1][0].tolist() == [[0, 0, 1, 1, 1, 1, 1]] * 3
    harm(folder)
    with pytest.raises(InputError, match=message) as caught:
        load_data("flickr30k", tmp_path, store=tmp_path / "s")
    assert "\n" not in str(caught.value)


def test_precomp_beside_karpathy_takes_names_and_testall(tmp_path):
    (tmp_path / "r").mkdir()
    for k, split in enumerate(("train", "test", "testall")):
        np.save(tmp_path / f"r/{split}_ims.npy", np.full((1, 2, 4), k, np.float32))
        (tmp_path / f"r/{split}_caps.txt").write_text(f"{split}\n" * 5)
    data = load_data("coco", tmp_path / "r", store=tmp_path)
    assert data.splits["test"].captions == ["testall"] * 5 and data.image("test", [0])[0].unique().tolist() == [2]
    karpathy(tmp_path / "r/dataset_coco.json", [IMAGES[0], IMAGES[2]])          # of no use until the rows have names
    assert load_data("coco", tmp_path / "r", store=tmp_path).splits["test"].captions == ["testall"] * 5
    for names in ("13", "31"):
        for split, name in zip(("train", "testall"), names):
            (tmp_path / f"r/{split}_names.txt").write_text(f"COCO_train2014_00000000000{name}.jpg\n")
        data = load_data("coco", tmp_path / "r", store=tmp_path, min_count=1)
        assert data.splits["train"].images == ["1.jpg"] and data.splits["test"].captions == ["a zebra"] * 5
        assert data.image("test", [0])[0].unique().tolist() == [2 if names == "13" else 0]
    (tmp_path / "r/dataset_coco.json").unlink()
    (tmp_path / "r/testall_caps.txt").unlink()
    with pytest.raises(InputError, match="testall_caps.txt"):
        load_data("coco", tmp_path / "r", store=tmp_path)


def test_nothing_there_says_what_would_do(tmp_path):
    for place in (tmp_path, tmp_path / "none"):
        with pytest.raises(InputError) as caught:
            load_data("coco", place, store=tmp_path / "s")
        for name in (str(place), "dataset_coco.json", ".tsv", ".npz", "_precomp", "images/", "smallest"):
            assert name in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="my.json"):
        load_data(tmp_path / "my.json", store=tmp_path / "s")


def test_feature_size_of_the_checkpoint(root, tmp_path):
    with pytest.raises(InputError, match="4 wide, the checkpoint's are 2048"):
        load_data("coco", root, store=tmp_path, feature_size=2048)


def test_no_training_captions(root, tmp_path):
    karpathy(root / "dataset_coco.json", IMAGES[2:])
    with pytest.raises(InputError, match="vocab.txt"):
        load_data("coco", root, store=tmp_path)
    assert load_data("coco", root, store=tmp_path, tokens=TOKENS).tokenizer.tokens == TOKENS


def test_phrases_file_is_used(root, tmp_path):
    (tmp_path / "p.json").write_text(json.dumps([
        {"caption": "a red  dog", "tokens": ["a", "red", "dog"], "phrases": [{"type": "object", "tokens": [0, 2]}]}]))
    data = load_data("coco", root, phrases=tmp_path / "p.json", store=tmp_path, min_count=1)
    assert data.phrases("train", [0])[0].tolist() == [[False, True, False, True, False]]
    assert data.phrases("train", [3]).shape[1] == 2 and any("3 of 9 captions" in note for note in data.notes)


def test_pictures_become_grid_cells_and_bad_ones_are_named(tmp_path):
    (tmp_path / "r/images").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "r/plot.png")                      # not below images/: not a data picture
    for name, colour in (("1.jpg", "red"), ("2.jpg", "blue"), ("3.jpg", "white")):
        Image.new("RGB", (60, 40), colour).save(tmp_path / "r/images" / name)
    karpathy(tmp_path / "r/dataset_coco.json", IMAGES)
    data = load_data("coco", tmp_path / "r", store=tmp_path)
    features, boxes, mask = data.image("train", [0, 1])
    assert len(data.regions.names) == 3 and mask.all() and features.shape == (2, 17, data.feature_size)
    assert boxes[0, 0, :4].tolist() == [0, 0, 1, 1] and torch.allclose(boxes[0, 1:, 6].sum(), torch.tensor(1.))
    assert (features[0] - features[1]).abs().max() > 0.5
    (tmp_path / "r/images/2.jpg").write_bytes(b"no picture")
    with pytest.raises(InputError, match="2.jpg"):
        load_data("coco", tmp_path / "r", store=tmp_path)


def test_crops_are_described_by_colours_and_edges():
    pixels = np.full((40, 80, 3), 255, np.uint8)
    pixels[:, 40:] = (255, 0, 0)                                                # white on the left, red on the right
    picture, boxes = Image.fromarray(pixels), [[0, 0, 1, 1], [0, 0, .5, 1], [.5, 0, 1, 1]]
    whole, white, red = features = describe_crops(picture, boxes)
    assert features.shape == (3, 256) and abs(features).max() <= 1
    thumbnail, histogram, edges = whole[:48].reshape(4, 4, 3), whole[48:112], whole[112:].reshape(6, 6, 4)
    assert np.allclose(thumbnail[:, :2], 1, atol=.01) and np.allclose(thumbnail[:, 2:], [1, -1, -1], atol=.01)
    assert np.allclose(histogram[[63, 48]], .5 ** .5) and np.isclose((histogram ** 2).sum(), 1)
    assert (edges[:, 2:4, 0] > .3).all() and edges[:, [0, 1, 4, 5]].max() == edges[..., 1:].max() == 0      # one vertical edge
    assert white[48 + 63] == red[48 + 48] == 1 and white[112:].max() == red[112:].max() == 0
    assert np.allclose(describe_crops(picture.rotate(90, expand=True), boxes[:1])[0, 112:].reshape(6, 6, 4)[2:4, :, 2], edges[:, 2:4, 0].T)
    assert np.array_equal(describe_crops(picture, boxes[1:])[0], white)         # a box does not depend on the others


def test_progress_is_quiet_unless_it_takes_long(tmp_path, capsys, monkeypatch):
    write_regions(tmp_path / "a.bin", made(3), {})
    assert capsys.readouterr() == ("", "")
    for terminal in (False, True):
        clock = iter(range(0, 10 ** 6, 4))                                      # every look at the clock is 4 seconds later
        monkeypatch.setattr(data_module.time, "monotonic", lambda: next(clock))
        monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
        write_regions(tmp_path / "b.bin", made(7), {})
        out, err = capsys.readouterr()
        assert out == "" and err.count("images/s") == (7 if terminal else 2), err
        assert err.count("\n") == (1 if terminal else 2) and ("\r" in err) == terminal and err.endswith("\n")


def test_second_start_reads_no_captions_and_still_sees_changes(root, tmp_path, monkeypatch):
    first = load_data("coco", root, store=tmp_path, min_count=1)
    with monkeypatch.context() as patch:
        for name in ("read_captions", "build_vocabulary"):
            patch.setattr(data_module, name, None)                              # a call would fail
        again = load_data("coco", root, store=tmp_path, min_count=1)
    for split, own in first.splits.items():
        assert (own.images, own.captions) == (again.splits[split].images, again.splits[split].captions)
        assert torch.equal(own.image_of_caption, again.splits[split].image_of_caption) and (own.rows == again.splits[split].rows).all()
    assert again.tokenizer.tokens == first.tokenizer.tokens and again.notes == first.notes
    karpathy(root / "dataset_coco.json", [("1.jpg", "train", ["a blue dog"])])
    assert load_data("coco", root, store=tmp_path, min_count=1).splits["train"].captions == ["a blue dog"]
    (tmp_path / "captions.json").write_text("{")
    assert load_data("coco", root, store=tmp_path, min_count=1).splits["train"].captions == ["a blue dog"]


def test_what_was_left_out_is_counted_at_each_start(root, tmp_path):
    karpathy(root / "dataset_coco.json", [*IMAGES, ("4.jpg", "train", ["a dog"]), ("5.jpg", "train", [])])
    first, again = (load_data("coco", root, store=tmp_path, skip_bad=True) for _ in range(2))
    assert first.notes == again.notes and "left out 2" in first.notes[-1]
    with pytest.raises(InputError, match="image 4.*no caption"):
        load_data("coco", root, store=tmp_path)


def test_text_parses_no_phrases(tmp_path, monkeypatch):
    data = tiny_data(tmp_path)
    monkeypatch.setattr(data_module, "parse_phrases", None)
    assert data.text("train", range(5)).shape == (5, 9)


def test_module_stands_alone():
    source = Path(data_module.__file__).read_text()
    assert not any(f"import {name}" in source or f"from {name}" in source for name in ("model", "generate", "losses"))
