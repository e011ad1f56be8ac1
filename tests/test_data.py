"""Tests of data.py on the real files beside the repository (skipped without them), on small made
ones and on damaged ones. `python tests/test_data.py 1000` damages 1,000 files of each kind."""

import base64
import copy
import dataclasses
import gc
import gzip
import io
import json
import os
import pickle
import random
import shutil
import signal
import sys
import time
import unicodedata
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data as data_module
from data import (
    Data,
    InputError,
    ProgressLine,
    Regions,
    Split,
    WordPiece,
    build_vocabulary,
    check_regions,
    image_key,
    load_data,
    open_regions,
    read_phrases,
    split_words,
    write_atomically,
    write_regions,
)

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
        assert [i for word in split_words(line["text"]) for i in tokenizer.pieces(word)] == line[
            "ids"
        ]
    assert tokenizer.tokens[tokenizer.word_range[0]] == "!" and tokenizer.word_range[1] == len(
        tokenizer.tokens
    )
    assert [
        tokenizer.pad_id,
        tokenizer.unk_id,
        tokenizer.cls_id,
        tokenizer.sep_id,
        tokenizer.mask_id,
    ] == [0, 100, 101, 102, 103]


TOKENS = "[PAD] [UNK] [CLS] [SEP] [MASK] a fri ##sb ##ee dog , -".split()


def test_wordpiece_takes_the_longest_piece():
    tokenizer = WordPiece(TOKENS, lowercase=True)
    assert tokenizer.encode("A frisbee,dog") == [5, 6, 7, 8, 10, 9]
    assert tokenizer.encode("frisk") == [1]  # no piece for the rest: the whole word is unknown
    assert tokenizer.encode("dóg") == [9]
    assert tokenizer.decode([2, 5, 6, 7, 8, 3, 0]) == "a frisbee"


def test_wordpiece_length_limit_and_vocabulary_errors(tmp_path):
    tokenizer = WordPiece([*TOKENS, "##a"], lowercase=False)
    assert len(tokenizer.encode("a" * 100)) == 100 and tokenizer.encode("a" * 101) == [1]
    (tmp_path / "vocab.txt").write_text("[PAD]\na\n")
    for bad in (tmp_path / "vocab.txt", tmp_path / "none.txt"):
        with pytest.raises(InputError, match="vocab.txt|none.txt"):
            WordPiece(bad, False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_tokenizer_and_data_can_be_copied(tmp_path, copied):
    data = tiny_data(tmp_path)
    text, phrases = data.text("train", [2]), data.phrases("train", [2])  # fills what is remembered
    for other in (copied(data), copied(copied(data))):
        assert other.tokenizer is not data.tokenizer
        assert torch.equal(other.text("train", [2]), text)
        assert torch.equal(other.phrases("train", [2]), phrases)
        assert other.tokenizer.encode("a frisbee") == data.tokenizer.encode("a frisbee")
        assert torch.equal(other.image("train", [1])[0], data.image("train", [1])[0])


def test_a_copy_of_the_regions_is_their_path(tmp_path):
    write_regions(
        tmp_path, ((f"{i}.jpg", np.ones((50, 90)), np.zeros((50, 4))) for i in range(9)), {}
    )
    regions = Regions(tmp_path)
    assert len(pickle.dumps(regions)) < 300 < 9 * 50 * 90
    assert pickle.loads(pickle.dumps(regions)).names == regions.names


def test_special_tokens_stand_before_all_words():
    tokenizer = WordPiece(["[PAD]", "[unused1]", *TOKENS[1:], "[unused2]"], True)
    assert tokenizer.word_range == (6, len(TOKENS) + 2)
    whole = [token for token, is_whole in zip(tokenizer.tokens, tokenizer.whole_words) if is_whole]
    assert set(tokenizer.tokens) - set(whole) == {"##sb", "##ee"}
    with pytest.raises(InputError, match=r"\[MASK\] stands behind the word 'a'"):
        WordPiece("[PAD] [UNK] [CLS] [SEP] a [MASK] dog".split(), True)


def test_a_word_of_100000_letters_is_unknown_at_once():
    tokenizer = WordPiece([*TOKENS, "##a"], lowercase=True)
    start = time.monotonic()
    assert tokenizer.encode("a" * 10**5) == [tokenizer.unk_id]
    assert time.monotonic() - start < 5


def test_built_vocabulary_counts_and_orders():
    tokens = build_vocabulary(["A dog, a cat.", "a Dog"], 2)
    assert tokens == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog"]


# ---------------------------------------------------------------- phrases


def test_phrases_file_is_matched_by_letters(tmp_path):
    entry = {
        "caption": "A  man can't sit",
        "tokens": ["A", "man", "ca", "n't", "sit"],
        "phrases": [{"type": "object", "tokens": [1]}, {"type": "relation", "tokens": [2, 3]}],
    }
    (tmp_path / "p.json").write_text(json.dumps([entry]))
    positions = read_phrases(tmp_path / "p.json")["A man can't sit"]
    assert split_words("A man can't sit") == ["A", "man", "can", "'", "t", "sit"]
    assert positions == [[1], [2, 3, 4]]
    for broken in (
        {**entry, "tokens": ["A"]},
        {**entry, "tokens": ["A", "dog", "ca", "n't", "sit"]},  # as long, but another word
        {**entry, "phrases": [{"tokens": [9]}]},
        {**entry, "phrases": [{"tokens": [5]}]},  # one behind the last
        {**entry, "phrases": [{"tokens": [-1]}]},
        {"caption": "a"},
        3,
    ):
        (tmp_path / "p.json").write_text(json.dumps([broken]))
        with pytest.raises(InputError, match="p.json entry 0"):
            read_phrases(tmp_path / "p.json")


# ---------------------------------------------------------------- the store


def made(n, size=6, seed=0):
    random = np.random.default_rng(seed)
    for i in range(n):
        regions = int(random.integers(1, 5))
        boxes = np.sort(random.random((regions, 2, 2)), 1).reshape(regions, 4)
        yield (
            f"{i}.jpg",
            random.random((regions, size)).astype(np.float32),
            boxes.astype(np.float32),
        )


def test_store_round_trip_ragged(tmp_path):
    items = list(made(7))
    write_regions(tmp_path / "r", iter(items), {"from": "test"})
    regions = Regions(tmp_path / "r")
    assert len(regions.names) == 7 and regions.feature_size == 6
    assert regions.source == {"from": "test"} and regions.left_out == []
    assert [path.name for path in (tmp_path / "r").iterdir()] == ["regions.bin"]
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
    assert torch.equal(alone[0][0], features[3, : alone[0].shape[1]])


def test_an_interrupted_conversion_leaves_nothing_or_what_was_there(tmp_path):
    def killed(count):
        yield from made(count)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_regions(tmp_path / "r", killed(5), "first")
    assert list((tmp_path / "r").iterdir()) == []
    regions = open_regions(tmp_path / "r", "first", lambda: made(4))
    with pytest.raises(KeyboardInterrupt):
        write_regions(tmp_path / "r", killed(5), "second")
    again = open_regions(tmp_path / "r", "first", lambda: 1 / 0)
    assert again.names == regions.names and torch.equal(
        again.gather([3])[0], regions.gather([3])[0]
    )


def write_forever(folder, number):
    while True:
        images = ((f"{i}", np.full((2, 500), number), np.zeros((2, 4))) for i in range(number))
        write_regions(folder, images, number)
        number = number % 9 + 1


def check_store(folder):
    if (folder / "regions.bin").exists():
        regions = Regions(folder)
        assert len(regions.names) == regions.source
        assert (regions.features == np.float16(regions.source)).all()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of fork in a process with threads
def test_a_store_is_right_or_absent_whenever_two_writers_are_killed(tmp_path):
    """SIGKILL at 20 random moments, while two processes write the same store at once."""
    chance = random.Random(0)
    for _ in range(20):
        children = []
        for number in (1, 5):
            pid = os.fork()
            if pid == 0:
                write_forever(tmp_path / "s", number)
            children.append(pid)
        time.sleep(chance.random() / 30)
        try:
            for _ in range(2):  # whoever looks meanwhile finds a whole one
                check_store(tmp_path / "s")
        finally:
            for pid in children:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        check_store(tmp_path / "s")
    for path in (tmp_path / "s").iterdir():  # ten minutes later the leftovers go
        os.utime(path, (1, 1))
    write_regions(tmp_path / "s", made(2), "last")
    assert len(list((tmp_path / "s").iterdir())) == 1
    assert Regions(tmp_path / "s").source == "last"


def test_a_store_of_another_source_is_made_anew(tmp_path):
    open_regions(tmp_path, ("a", 1), lambda: made(3))
    assert open_regions(tmp_path, ("a", 1), lambda: 1 / 0).names == ["0.jpg", "1.jpg", "2.jpg"]
    assert open_regions(tmp_path, ("a", 2), lambda: made(4, 5, seed=1)).feature_size == 5


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs Linux")
def test_the_old_store_is_closed_before_a_new_one_takes_its_place(tmp_path):
    """Windows cannot replace a file that is mapped into memory."""
    for source in ("first", "second"):

        def images():
            assert str(tmp_path) not in Path("/proc/self/maps").read_text()
            yield from made(3)

        open_regions(tmp_path, source, images)
        assert str(tmp_path) not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize(
    "features, boxes",
    [((2, 6), (2, 5)), ((2, 6), (3, 4)), ((2, 7), (2, 4)), ((6,), (2, 4)), ((2, 3, 6), (2, 4))],
)
def test_features_and_boxes_of_other_shapes_are_named(tmp_path, features, boxes):
    images = [("1.jpg", np.ones((2, 6)), np.zeros((2, 4)))]
    images.append(("2.jpg", np.ones(features), np.zeros(boxes)))
    with pytest.raises(InputError, match=r"2.jpg: features .*, boxes .*; \(R, 6\) and \(R, 4\)"):
        write_regions(tmp_path / "r", iter(images), {})
    assert not list((tmp_path / "r").iterdir())
    with pytest.raises(InputError, match="no image"):
        write_regions(tmp_path / "r", iter([]), {})


def test_errors_keep_their_cause_and_faults_of_the_program_their_traceback(tmp_path):
    with pytest.raises(InputError, match="a.json: .*; mend it") as caught:
        with data_module.one_line_errors("a.json", "mend it"):
            json.loads("[")
    assert isinstance(caught.value.__cause__, json.JSONDecodeError)
    for fault in (NameError, AssertionError, ImportError, KeyboardInterrupt):
        with pytest.raises(fault), data_module.one_line_errors("a.json", "mend it"):
            raise fault


HARMS = {
    "cut": lambda whole: whole[:-2],
    "cut short": lambda whole: whole[:100],
    "longer": lambda whole: whole + bytes(16),
    "much longer": lambda whole: whole + b"\xff" * 16,
    "without features": lambda whole: whole[-300:],
    "text": lambda whole: b"hello",
    "empty": lambda whole: b"",
    "list": lambda whole: b"[3]" + (3).to_bytes(8, "little"),
}


@pytest.mark.parametrize("harm", HARMS)
def test_harmed_store_is_refused_and_made_anew(tmp_path, harm):
    write_regions(tmp_path / "r", made(5), "x")
    path = tmp_path / "r" / "regions.bin"
    path.write_bytes(HARMS[harm](path.read_bytes()))
    with pytest.raises(InputError, match="r: .*delete it"):
        Regions(tmp_path / "r")
    assert len(open_regions(tmp_path / "r", "x", lambda: made(5)).names) == 5


def test_a_full_disk_or_a_read_only_folder_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file.*is the disk full"):
        write_regions(tmp_path / "file", made(2), {})
    if os.path.exists("/dev/full"):
        real = open
        monkeypatch.setattr(
            data_module,
            "open",
            lambda path, mode="r": real("/dev/full" if str(path).endswith(".part") else path, mode),
            raising=False,
        )
        with pytest.raises(InputError, match="No space left.*is the disk full"):
            write_regions(tmp_path / "r", made(2), {})
        assert list((tmp_path / "r").iterdir()) == []


def test_write_atomically_keeps_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "x.json"
    write_atomically(path, lambda part: part.write_text("old"))

    def fails(part):
        part.write_text("ne")
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        write_atomically(path, fails)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "name",
    [
        "COCO_val2014_000000391895.jpg",
        "val2014/COCO_val2014_000000391895.jpg",
        391895,
        "391895",
        "coco_val2014_000000391895.npz",
        "000000391895.jpg",
        "COCO_val2014_000000391895",
    ],
)
def test_names_of_one_picture(name):
    assert image_key(name) == "391895"


def test_names_of_other_collections():
    assert image_key("flickr30k_000000001000092795.npz") == image_key("1000092795.jpg")
    assert image_key("1001773457_577c3a7d70.npz") == image_key("1001773457_577c3a7d70.jpg")
    assert image_key("1001773457_577c3a7d70.npz") != image_key("1001773457.jpg")


# ---------------------------------------------------------------- batches


def tiny_data(tmp_path, max_text=64):
    write_regions(tmp_path / "r", made(3), {})
    captions = ["a black dog", "frisbee", "a dog jumps on a frisbee", "it is there", "dog"]
    tokens = build_vocabulary(captions, 1) + ["fris", "##bee"]
    tokens.remove("frisbee")
    split = Split(
        ["0.jpg", "1.jpg", "2.jpg"], np.arange(3), captions, torch.tensor([0, 0, 1, 1, 2])
    )
    return Data(
        "tiny", WordPiece(tokens, True), Regions(tmp_path / "r"), {"train": split}, max_text
    )


def test_text_and_phrases_are_aligned(tmp_path):
    data = tiny_data(tmp_path)
    ids = data.text("train", torch.tensor([2, 0]))
    assert ids.dtype == torch.long and ids.shape == (2, 9)
    words = [data.tokenizer.tokens[i] for i in ids[0]]
    assert words == "[CLS] a dog jumps on a fris ##bee [SEP]".split()
    assert ids[1, 5:].eq(data.tokenizer.pad_id).all()
    member = data.phrases("train", torch.tensor([2, 0]))
    assert member.dtype == torch.bool and member.shape == (2, 3, 9)
    assert [[w for w, m in zip(words, row) if m] for row in member[0]] == [
        ["dog"],
        ["jumps", "on"],
        ["fris", "##bee"],
    ]
    assert not member[:, :, 0].any() and not member[1, 2].any() and not member[1, :, 4:].any()
    assert torch.equal(data.text("train", [2]), ids[:1])


def test_caption_without_phrases_masks_word_by_word(tmp_path):
    member = tiny_data(tmp_path).phrases("train", torch.tensor([3]))
    assert member.shape == (1, 3, 5) and torch.equal(
        member[0, :, 1:4], torch.eye(3, dtype=torch.bool)
    )


def test_long_text_is_cut_with_its_phrases(tmp_path):
    data = tiny_data(tmp_path, max_text=5)
    ids = data.text("train", [2])
    assert (
        ids.shape == (1, 5)
        and ids[0, -1] == data.tokenizer.sep_id
        and data.phrases("train", [2]).shape[2] == 5
    )


def test_true_captions_and_images(tmp_path):
    data = tiny_data(tmp_path)
    own = data.true_captions("train", torch.tensor([2, 0]))
    assert own.shape[:2] == (2, 2) and own[0, 1].eq(data.tokenizer.pad_id).all()
    both = data.text("train", torch.tensor([0, 1]))
    assert torch.equal(own[1, :, : both.shape[1]], both)
    features, boxes, mask = data.image("train", torch.tensor([1]))
    assert (
        features.shape == (1, int(data.regions.counts[1]), 6) and boxes.shape[2] == 7 and mask.all()
    )


# ---------------------------------------------------------------- the published forms


@pytest.fixture(scope="module")
def flickr8k_store(tmp_path_factory):
    """A folder for the features of flickr8k_subset, which take two seconds to convert."""
    return tmp_path_factory.mktemp("flickr8k")


BUTD = "butd/dataset_butd_sample.json"


@needs_real
@pytest.mark.parametrize(
    "name, root, features, counts, size",
    [
        ("flickr8k_subset/dataset_flickr8k_subset.json", None, None, (600, 100, 200), 1280),
        ("flickr30k", "flickr8k_precomp", None, (120, 40, 40), 1280),
        (BUTD, None, None, (0, 0, 7), 2048),
        (BUTD, None, "butd/train2014_obj36.sample.tsv", (0, 0, 7), 2048),
        (BUTD, None, "butd/images", (0, 0, 7), None),
    ],
)
def test_every_form_is_read(tmp_path, flickr8k_store, name, root, features, counts, size):
    store = tmp_path if root or name == BUTD else flickr8k_store
    name = REAL / name if root is None else name
    tokens = (
        (REAL / "vocab/bert-base-cased-vocab.txt")
        .read_text(encoding="utf-8")
        .rstrip("\n")
        .split("\n")
    )
    arguments = dict(
        root=root and REAL / root,
        features=features and REAL / features,
        tokens=tokens,
        store=store,
    )
    data = load_data(name, **arguments)
    assert (
        tuple(
            len(data.splits[s].images) if s in data.splits else 0 for s in ("train", "val", "test")
        )
        == counts
    )
    assert all(len(split.captions) == 5 * len(split.images) for split in data.splits.values())
    assert size in (None, data.regions.feature_size) and not data.tokenizer.lowercase
    features, boxes, mask = data.image("test", torch.arange(5))
    assert (
        features.isfinite().all() and boxes.min() >= 0 and boxes.max() <= 1 and features.std() > 0
    )
    before = (store / "regions.bin").stat().st_mtime_ns
    load_data(name, **arguments)
    assert (store / "regions.bin").stat().st_mtime_ns == before  # nothing is converted twice


@needs_real
def test_both_tsv_layouts_hold_the_same_regions(tmp_path):
    vocab = REAL / "vocab/bert-base-cased-vocab.txt"
    original, lxmert = (
        load_data(REAL / BUTD, features=REAL / "butd" / f, vocab=vocab, store=tmp_path / f)
        for f in ("train2014_36.original_layout.tsv", "train2014_obj36.sample.tsv")
    )
    rows = {image_key(name): row for row, name in enumerate(original.regions.names)}
    for row, name in enumerate(lxmert.regions.names):
        a, b = (
            original.regions.gather(np.array([rows[image_key(name)]])),
            lxmert.regions.gather(np.array([row])),
        )
        assert a[0].shape[1] == 36 and 10 <= b[0].shape[1] <= 36  # LXMERT's rows have scores
        for k in range(b[0].shape[1]):
            assert ((a[0][0] == b[0][0, k]).all(1) & (a[1][0] == b[1][0, k]).all(1)).any()


@needs_real
def test_npz_and_precomp_agree_and_keep_order(tmp_path, flickr8k_store):
    npz = load_data(REAL / "flickr8k_subset/dataset_flickr8k_subset.json", store=flickr8k_store)
    scan = load_data("flickr30k", REAL / "flickr8k_precomp", store=tmp_path / "b")
    for i in (0, 17, 39):
        name, images = scan.splits["test"].images[i], npz.splits["test"].images
        a, b = npz.image("test", [images.index(name)])[0], scan.image("test", [i])[0]
        n = min(a.shape[1], b.shape[1], 6)
        assert (a[:, :n] - b[:, :n]).abs().max() < 2e-3
        assert scan.splits["test"].captions[5 * i] == " ".join(
            npz.splits["test"].captions[5 * images.index(name)].split()
        )


def test_confidence_keeps_10_to_100():
    features, boxes = (
        np.arange(150, dtype=np.float32)[:, None],
        np.tile(np.float32([[0, 0, 1, 1]]), (150, 1)),
    )
    for scores, kept in (
        (np.linspace(0.9, 0.3, 150), 100),
        (np.linspace(0.1, 0.01, 150), 10),
        (np.where(np.arange(150) < 42, 0.25, 0.2), 42),
    ):
        scores = np.random.default_rng(0).permutation(scores)
        got = check_regions(features, boxes, conf=scores)[0][:, 0].astype(int)
        assert (
            len(got) == kept
            and (np.diff(got) > 0).all()
            and scores[got].min() >= np.sort(scores)[::-1][kept - 1]
        )
    assert len(check_regions(features, boxes)[0]) == 150
    assert len(check_regions(features[:4], boxes[:4], conf=np.full(4, 0.1))[0]) == 4


# ---------------------------------------------------------------- made data sets, their splits and their faults


def karpathy(path, images):
    path.write_text(
        json.dumps(
            {
                "images": [
                    {"filename": n, "split": s, "sentences": [{"raw": c} for c in captions]}
                    for n, s, captions in images
                ]
            }
        )
    )
    return path


def save_npz(path, **change):
    row = (
        dict(
            features=np.ones((3, 4), np.float16),
            norm_bb=np.float32([[0, 0, 0.5, 0.5, 0.5, 0.5]] * 3),
            conf=np.full(3, 0.5, np.float32),
            num_bb=3,
        )
        | change
    )
    np.savez(path, **{name: array for name, array in row.items() if array is not None})


IMAGES = [
    ("1.jpg", "train", ["a red dog"] * 3),
    ("2.jpg", "restval", ["a red cat"]),
    ("3.jpg", "test", ["a zebra"] * 7),
]


@pytest.fixture
def root(tmp_path):
    (tmp_path / "r/regions").mkdir(parents=True)
    karpathy(tmp_path / "r/dataset_coco.json", IMAGES)
    for name in "123":
        save_npz(tmp_path / f"r/regions/coco_train2014_00000000000{name}.npz")
    return tmp_path / "r"


def test_restval_five_captions_and_training_vocabulary(root, tmp_path):
    data = load_data("coco", root, store=tmp_path)
    assert data.splits["train"].images == ["1.jpg", "2.jpg"] and "val" not in data.splits
    assert data.splits["train"].image_of_caption.tolist() == [0, 0, 0, 1]
    assert len(data.splits["test"].captions) == 5
    assert (
        "cat" in data.tokenizer.tokens and "zebra" not in data.tokenizer.tokens
    )  # no word of the test captions
    assert any("few captions" in note for note in data.notes)
    many = [f"a dog {' '.join(f'word{i}' for i in range(100))} rare{k % 2}" for k in range(5)]
    karpathy(root / "dataset_coco.json", [("1.jpg", "train", many)])
    data = load_data("coco", root, store=tmp_path)  # enough words: those seen three times
    tokens = data.tokenizer.tokens
    assert {"dog", "word99", "rare0"} < set(tokens)
    assert "rare1" not in data.tokenizer.tokens
    assert not any("few captions" in note for note in data.notes)
    (root / "vocab.txt").write_text("\n".join([*tokens, "Dog"]))
    assert load_data("coco", root, store=tmp_path).tokenizer.lowercase is False
    assert load_data("coco", root, store=tmp_path, lowercase=True).tokenizer.lowercase is True


def test_changed_features_are_converted_again(root, tmp_path):
    load_data("coco", root, store=tmp_path)
    save_npz(
        root / "regions/coco_train2014_000000000001.npz", features=np.full((3, 4), 7, np.float16)
    )
    data = load_data("coco", root, store=tmp_path)
    assert data.image("train", [0])[0].max() == 7


def test_bbox_in_pixels_and_seven_columns(root, tmp_path):
    save_npz(
        root / "regions/coco_train2014_000000000001.npz",
        norm_bb=None,
        image_w=200,
        image_h=100,
        bbox=np.float32([[20, 10, 100, 90]] * 3),
    )
    save_npz(
        root / "regions/coco_train2014_000000000002.npz",
        norm_bb=np.float32([[0.1, 0.2, 0.3, 0.4, 0.2, 0.2, 0.04]] * 3),
    )
    data = load_data("coco", root, store=tmp_path)
    assert torch.allclose(
        data.image("train", [0])[1][0, 0], torch.tensor([0.1, 0.1, 0.5, 0.9, 0.4, 0.8, 0.32])
    )
    assert torch.allclose(
        data.image("train", [1])[1][0, 0], torch.tensor([0.1, 0.2, 0.3, 0.4, 0.2, 0.2, 0.04])
    )


def bad_npz(**change):
    return lambda root: save_npz(root / "regions/coco_train2014_000000000002.npz", **change)


def bad_json(index, image):
    return lambda root: karpathy(
        root / "dataset_coco.json", [*IMAGES[:index], image, *IMAGES[index + 1 :]]
    )


def cut_npz(root):
    path = root / "regions/coco_train2014_000000000002.npz"
    path.write_bytes(path.read_bytes()[:200])


FAULTS = {
    "nan": (bad_npz(features=np.full((3, 4), np.nan, np.float32)), "0002.npz.*features.*finite"),
    "too large": (bad_npz(features=np.full((3, 4), 1e6, np.float32)), "0002.npz.*features.*finite"),
    "columns": (bad_npz(norm_bb=np.zeros((3, 3), np.float32)), "0002.npz.*boxes has shape"),
    "num_bb": (bad_npz(num_bb=4), "0002.npz.*num_bb"),
    "conf": (bad_npz(conf=np.ones(2, np.float32)), "0002.npz.*conf"),
    "outside": (
        bad_npz(norm_bb=np.float32([[0, 0, 1.5, 1, 1.5, 1]] * 3)),
        "0002.npz.*box 0.*outside",
    ),
    "inside out": (bad_npz(norm_bb=np.float32([[0.5, 0, 0.2, 1, 0.3, 1]] * 3)), "0002.npz.*box 0"),
    "width": (bad_npz(features=np.ones((3, 5), np.float32)), "0002.npz.*features.*5 wide"),
    "no boxes": (bad_npz(norm_bb=None), "0002.npz.*bbox"),
    "no size": (
        bad_npz(norm_bb=None, bbox=np.float32([[0, 0, 9, 9]] * 3)),
        "0002.npz.*bbox.*pixels",
    ),
    "pickled": (bad_npz(features=np.array([[object()]], object)), "0002.npz.*pickle"),
    "cut": (cut_npz, "0002.npz"),
    "missing": (
        lambda root: (root / "regions/coco_train2014_000000000002.npz").unlink(),
        "image 1: captions without features: no 2.jpg",
    ),
    "no caption": (
        bad_json(1, ("2.jpg", "train", [])),
        "dataset_coco.json image 1.*2.jpg.*no caption",
    ),
    "empty caption": (
        bad_json(1, ("2.jpg", "train", [" "])),
        "dataset_coco.json image 1.*sentences",
    ),
    "split": (bad_json(1, ("2.jpg", "holdout", ["a"])), "image 1.*split 'holdout'"),
    "twice": (bad_json(1, ("COCO_val2014_000000000001.jpg", "val", ["a"])), "image 1.*twice"),
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


def read_error(*arguments):
    raise OSError(5, "Input/output error")


def no_memory(*arguments):
    raise MemoryError


@pytest.mark.parametrize("fault", [read_error, no_memory])
def test_what_the_machine_fails_to_read_is_never_left_out(root, tmp_path, monkeypatch, fault):
    with monkeypatch.context() as patch:
        patch.setattr(np, "load", fault)
        with pytest.raises(InputError, match="0001.npz.*not left out.*try again"):
            load_data("coco", root, store=tmp_path, skip_bad=True)
    data = load_data("coco", root, store=tmp_path, skip_bad=True)
    assert len(data.regions.names) == 3 and data.regions.left_out == []


def test_a_split_without_any_features_is_missed_after_the_conversion(root, tmp_path):
    (root / "regions/coco_train2014_000000000003.npz").unlink()
    with pytest.raises(InputError, match="with .*: no image of the test split, but train 2 images"):
        load_data("coco", root, store=tmp_path, skip_bad=True, needed=("train", "test"))


def test_the_garbage_collector_stays_off_if_it_was(root, tmp_path):
    for was_enabled in (False, True):
        (gc.enable if was_enabled else gc.disable)()
        try:
            load_data("coco", root, store=tmp_path)
            assert gc.isenabled() == was_enabled
        finally:
            gc.enable()


def tsv_row(
    name, w=40, h=20, n=2, boxes=((0, 0, 10, 10), (5, 5, 40, 20)), size=3, conf=None, cut=None
):
    fields = [
        name,
        w,
        h,
        n,
        base64.b64encode(np.float32(boxes).tobytes()).decode(),
        base64.b64encode(np.ones((2, size), np.float32).tobytes()).decode(),
    ]
    if conf is not None:
        ids = base64.b64encode(np.zeros(2, np.int64).tobytes()).decode()
        fields = [
            name,
            h,
            w,
            ids,
            base64.b64encode(np.float32(conf).tobytes()).decode(),
            ids,
            ids,
            *fields[3:],
        ]
    return "\t".join(map(str, fields))[:cut] + "\n"


@pytest.mark.parametrize(
    "row, message",
    [
        (tsv_row(2, n=3), "row 2 .image 2.*shape .3"),
        (tsv_row(2, n=0), "row 2.*shape .0"),
        (tsv_row(2, cut=-9), "row 2.*buffer size"),
        (tsv_row(2, cut=20), "row 2.*5 columns"),
        (tsv_row(2, w=20, h=40), "row 2.*box 1.*outside"),
        ("2\tx\n", "row 2.*2 columns"),
        (tsv_row(2, size=4), "row 2.*4 wide"),
        (tsv_row(2, n="two"), "row 2"),
    ],
)
def test_faulty_tsv_rows(tmp_path, row, message):
    (tmp_path / "r").mkdir()
    karpathy(tmp_path / "r/dataset_coco.json", IMAGES)
    (tmp_path / "r/x.tsv").write_text(
        tsv_row(1) + row + tsv_row("COCO_val2014_000000000003", conf=[0.9, 0.8])
    )
    with pytest.raises(InputError, match="x.tsv " + message) as caught:
        load_data("coco", tmp_path / "r", store=tmp_path)
    assert "\n" not in str(caught.value)
    data = load_data("coco", tmp_path / "r", store=tmp_path, skip_bad=True)
    assert len(data.regions.names) == 2 and data.splits["test"].images == ["3.jpg"]
    assert torch.allclose(
        data.image("test", [0])[1][0, 1, :4], torch.tensor([0.125, 0.25, 1.0, 1.0])
    )


@pytest.mark.parametrize(
    "harm, message",
    [
        (
            lambda r: np.save(r / "train_ims.npy", np.array([[[{}]]], object)),
            "train_ims.npy.*objects",
        ),
        (
            lambda r: np.save(r / "train_ims.npy", np.ones((2, 3), np.float32)),
            "train_ims.npy image 0: features has shape .3,",
        ),
        (
            lambda r: (r / "train_ims.npy").write_bytes((r / "train_ims.npy").read_bytes()[:150]),
            "train_ims.npy",
        ),
        (
            lambda r: (r / "train_caps.txt").write_text("a\n" * 9),
            "train_caps.txt: 9 lines.*2 images",
        ),
        (
            lambda r: (r / "train_caps.txt").write_text("a\n\n" * 5),
            "train_caps.txt: 9 lines.*2 images",
        ),
        (lambda r: (r / "train_caps.txt").write_bytes(b"\xff\n" * 10), "train_caps.txt"),
        (lambda r: (r / "train_names.txt").write_text("x\n"), "train_ims.npy.*1 names"),
    ],
)
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


def test_precomp_with_each_image_five_times(tmp_path):
    """VSE++'s arrays have a row for each caption."""
    array = np.arange(12, dtype=np.float32).reshape(2, 2, 3)
    np.save(tmp_path / "train_ims.npy", array.repeat(5, 0))
    (tmp_path / "train_caps.txt").write_text("a dog\n" * 10)
    for names in (None, "ab", "aaaaabbbbb"):
        if names:
            (tmp_path / "train_names.txt").write_text("\n".join(names))
        data = load_data("coco", tmp_path, store=tmp_path / "s")
        assert len(data.splits["train"].images) == len(data.regions.names) == 2
        assert data.splits["train"].captions == ["a dog"] * 10
        assert torch.equal(data.image("train", [0, 1])[0], torch.from_numpy(array))
    np.save(tmp_path / "train_ims.npy", np.arange(60, dtype=np.float32).reshape(10, 2, 3))
    with pytest.raises(InputError, match="train_ims.npy: 10 images for 10 captions.*have five"):
        load_data("coco", tmp_path, store=tmp_path / "s")


def test_precomp_in_fortran_order(tmp_path):
    np.save(tmp_path / "train_ims.npy", np.asfortranarray(np.ones((2, 3, 4), np.float32)))
    (tmp_path / "train_caps.txt").write_text("a dog\n" * 10)
    with pytest.raises(InputError, match="train_ims.npy.*Fortran.*save it again as a plain array"):
        load_data("coco", tmp_path, store=tmp_path / "s")


def test_precomp_of_two_data_sets_side_by_side(tmp_path):
    for k, folder in enumerate(("coco_precomp", "f30k_precomp")):
        (tmp_path / folder).mkdir()
        np.save(tmp_path / folder / "train_ims.npy", np.full((1, 2, 3), k, np.float32))
        (tmp_path / folder / "train_caps.txt").write_text(f"{folder}\n" * 5)
    for k, name in enumerate(("coco", "flickr30k")):
        data = load_data(name, tmp_path, store=tmp_path / name)
        assert len(data.regions.names) == 1 and data.image("train", [0])[0].max() == k


def test_precomp_of_another_data_set_alone_is_not_taken(tmp_path):
    (tmp_path / "coco_precomp").mkdir()
    np.save(tmp_path / "coco_precomp/train_ims.npy", np.ones((1, 2, 3), np.float32))
    (tmp_path / "coco_precomp/train_caps.txt").write_text("a dog\n" * 5)
    with pytest.raises(InputError, match="dataset_flickr30k.json: no such file"):
        load_data("flickr30k", tmp_path, store=tmp_path / "s")
    assert load_data("coco", tmp_path, store=tmp_path / "s").regions.names == ["train_ims_000000"]


def test_precomp_without_captions_takes_those_of_the_json(tmp_path):
    karpathy(tmp_path / "dataset_coco.json", IMAGES)
    np.save(tmp_path / "train_ims.npy", np.ones((3, 2, 4), np.float32))
    (tmp_path / "train_names.txt").write_text("1.jpg\n2.jpg\n3.jpg\n")
    data = load_data("coco", tmp_path, store=tmp_path / "s")
    assert data.splits["train"].images == ["1.jpg", "2.jpg"]
    (tmp_path / "dataset_coco.json").unlink()
    with pytest.raises(InputError, match="train_caps.txt.*No such file"):
        load_data("coco", tmp_path, store=tmp_path / "s")


def test_precomp_takes_names_and_testall(tmp_path):
    (tmp_path / "r").mkdir()
    for k, split in enumerate(("train", "test", "testall")):
        np.save(tmp_path / f"r/{split}_ims.npy", np.full((1, 2, 4), k, np.float32))
        (tmp_path / f"r/{split}_caps.txt").write_text(f"a train of {split}\n" * 5)
    data = load_data("coco", tmp_path / "r", store=tmp_path)
    assert data.splits["test"].captions == ["a train of testall"] * 5 and data.image("test", [0])[
        0
    ].unique().tolist() == [2]
    for names in ("13", "31"):
        for split, name in zip(("train", "testall"), names):
            (tmp_path / f"r/{split}_names.txt").write_text(f"{name}.jpg\n")
        data = load_data("coco", tmp_path / "r", store=tmp_path)
        assert data.splits["test"].images == [f"{names[1]}.jpg"]
        assert data.splits["test"].captions == ["a train of testall"] * 5
        assert data.image("test", [0])[0].unique().tolist() == [2]
    (tmp_path / "r/testall_caps.txt").unlink()
    with pytest.raises(InputError, match="testall_caps.txt"):
        load_data("coco", tmp_path / "r", store=tmp_path)


def test_nothing_there_says_what_would_do(tmp_path):
    for place in (tmp_path, tmp_path / "none"):
        with pytest.raises(InputError) as caught:
            load_data("coco", place, store=tmp_path / "s")
        for name in (
            str(place),
            "dataset_coco.json",
            ".tsv",
            ".npz",
            "_precomp",
            "images/",
            "smallest",
        ):
            assert name in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="my.json: no such file"):
        load_data(tmp_path / "my.json", store=tmp_path / "s")


def test_no_training_captions(root, tmp_path):
    karpathy(root / "dataset_coco.json", IMAGES[2:])
    with pytest.raises(InputError, match="vocab.txt"):
        load_data("coco", root, store=tmp_path)
    assert load_data("coco", root, store=tmp_path, tokens=TOKENS).tokenizer.tokens == TOKENS


def test_phrases_file_is_used(root, tmp_path):
    (tmp_path / "p.json").write_text(
        json.dumps(
            [
                {
                    "caption": "a red  dog",
                    "tokens": ["a", "red", "dog"],
                    "phrases": [{"type": "object", "tokens": [0, 2]}],
                }
            ]
        )
    )
    data = load_data("coco", root, phrases=tmp_path / "p.json", store=tmp_path)
    assert data.phrases("train", [0])[0].tolist() == [[False, True, False, True, False]]
    assert data.phrases("train", [3]).shape[1] == 2 and any(
        "3 of 9 captions" in note for note in data.notes
    )


def test_pictures_become_grid_cells_and_bad_ones_are_named(tmp_path):
    (tmp_path / "r/images").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "r/plot.png")  # not below images/: not a data picture
    for name, colour in (("1.jpg", "red"), ("2.jpg", "blue"), ("3.jpg", "white")):
        Image.new("RGB", (60, 40), colour).save(tmp_path / "r/images" / name)
    karpathy(tmp_path / "r/dataset_coco.json", IMAGES)
    data = load_data("coco", tmp_path / "r", store=tmp_path)
    features, boxes, mask = data.image("train", [0, 1])
    assert (
        len(data.regions.names) == 3
        and mask.all()
        and features.shape == (2, 17, data.regions.feature_size)
    )
    assert boxes[0, 0, :4].tolist() == [0, 0, 1, 1] and torch.allclose(
        boxes[0, 1:, 6].sum(), torch.tensor(1.0)
    )
    assert (features[0] - features[1]).abs().max() > 0.5
    (tmp_path / "r/images/2.jpg").write_bytes(b"no picture")
    with pytest.raises(InputError, match="2.jpg"):
        load_data("coco", tmp_path / "r", store=tmp_path)


def test_crops_are_described_from_their_own_pixels():
    pixels = np.full((40, 80, 3), 255, np.uint8)
    pixels[:, 40:] = (255, 0, 0)  # white on the left, red on the right
    boxes = np.array([[0, 0, 1, 1], [0, 0, 0.5, 1], [0.5, 0, 1, 1]])
    features = data_module.describe_crops(Image.fromarray(pixels), boxes)
    assert abs(features[1] - features[2]).max() > 0.1
    white = data_module.describe_crops(Image.fromarray(pixels), boxes[1:])[0]
    assert np.allclose(white, features[1], atol=1e-6)  # a box does not depend on the others


class Clock:
    """Stands for `time`: a second passes whenever it is looked at."""

    def __init__(self):
        self.now = 0

    def monotonic(self):
        self.now += 1
        return self.now


def test_progress_of_short_work_is_silent(tmp_path, capsys):
    write_regions(tmp_path / "a", made(3), {}, total=3)
    assert capsys.readouterr() == ("", "")


def test_progress_in_a_file_is_a_line_a_minute_with_the_time_left(monkeypatch, capsys):
    monkeypatch.setattr(data_module, "time", Clock())
    progress = ProgressLine("pairs", 300)
    for _ in range(100):
        progress.advance(2)
    progress.close()
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines() == [
        "10 of 300 pairs (3%), 0:02:25 left",  # 5 s after the start
        "130 of 300 pairs (43%), 0:01:25 left",
    ]


def test_progress_on_a_terminal_rewrites_one_line(monkeypatch, capsys):
    monkeypatch.setattr(data_module, "time", Clock())
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    progress = ProgressLine("pairs", None)
    for _ in range(7):
        progress.advance(1000)
    progress.close()
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.endswith("\n")
    assert err.strip().split("\r")[0] == "5,000 pairs in 0:00:05"
    assert err.strip().split("\r")[-1] == "7,000 pairs in 0:00:08"


def test_progress_ends_its_line_before_an_error(tmp_path, monkeypatch):
    closed = []
    monkeypatch.setattr(ProgressLine, "close", lambda line: closed.append(line.done))

    def images():
        yield from made(2)
        raise InputError("damaged")

    with pytest.raises(InputError, match="damaged"):
        write_regions(tmp_path / "r", images(), {})
    assert closed == [2]


def test_second_start_converts_nothing_and_still_sees_changes(root, tmp_path, monkeypatch):
    first = load_data("coco", root, store=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(data_module, "write_regions", None)  # a call would fail
        again = load_data("coco", root, store=tmp_path)
        karpathy(root / "dataset_coco.json", [("1.jpg", "train", ["a blue dog"])])
        changed = load_data("coco", root, store=tmp_path)
    for split, own in first.splits.items():
        other = again.splits[split]
        assert (own.images, own.captions) == (other.images, other.captions)
        assert torch.equal(own.image_of_caption, other.image_of_caption)
        assert (own.rows == other.rows).all()
    assert again.tokenizer.tokens == first.tokenizer.tokens and again.notes == first.notes
    assert changed.splits["train"].captions == ["a blue dog"]


def test_what_was_left_out_is_counted_at_each_start(root, tmp_path):
    karpathy(
        root / "dataset_coco.json", [*IMAGES, ("4.jpg", "train", ["a dog"]), ("5.jpg", "train", [])]
    )
    first, again = (load_data("coco", root, store=tmp_path, skip_bad=True) for _ in range(2))
    assert first.notes == again.notes
    assert any("left out 2" in note for note in first.notes)
    with pytest.raises(InputError, match="image 4.*no caption"):
        load_data("coco", root, store=tmp_path)


def test_text_parses_no_phrases(tmp_path, monkeypatch):
    data = tiny_data(tmp_path)
    monkeypatch.setattr(data_module, "parse_phrases", None)
    assert data.text("train", range(5)).shape == (5, 9)


def test_module_needs_the_parser_alone():
    source = Path(data_module.__file__).read_text()
    for name in ("model", "losses", "evaluate", "tagsdc"):
        assert f"import {name}" not in source and f"from {name}" not in source


# ---------------------------------------------------------------- faults of public reports


def picture(path, colour="red", size=(48, 32), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)


def colour_of(data, split, i):
    """Mean pixels of the picture whose features an image got, told from three known ones."""
    got = data.image(split, [i])[0][0]
    known = {}
    for colour in ("red", "lime", "blue"):
        boxes = np.array([[0.0, 0.0, 1.0, 1.0]])
        known[colour] = data_module.describe_crops(Image.new("RGB", (48, 32), colour), boxes)[0]
    return min(known, key=lambda colour: abs(got[0].numpy() - known[colour]).sum())


def test_pictures_of_one_name_in_two_folders(tmp_path):
    for name, colour in (("dogs/1.jpg", "red"), ("cats/1.jpg", "lime"), ("cats/2.png", "blue")):
        picture(tmp_path / "images" / name, colour)
    listing = tmp_path / "my.json"
    names = ("cats/1.jpg", "dogs/1.jpg", "2.png")
    karpathy(listing, [(name, "train", ["a dog"]) for name in names])
    data = load_data(listing, store=tmp_path / "s")
    assert [colour_of(data, "train", i) for i in range(3)] == ["lime", "red", "blue"]
    karpathy(listing, [("1.jpg", "train", ["a dog"])])
    with pytest.raises(InputError, match="images/cats/1.jpg and images/dogs/1.jpg") as caught:
        load_data(listing, store=tmp_path / "s")
    assert "\n" not in str(caught.value)
    (tmp_path / "images/dogs/1.jpg").unlink()  # the cat must not stand for the dog
    karpathy(listing, [(name, "train", ["a dog"]) for name in names])
    with pytest.raises(InputError, match="without features: no dogs/1.jpg"):
        load_data(listing, store=tmp_path / "s")


def test_jpg_beside_png_and_folders_in_filepath(tmp_path):
    for name, colour in (("a/1.jpg", "red"), ("a/1.png", "lime"), ("b/1.png", "blue")):
        picture(tmp_path / "images" / name, colour)
    images = [("a", "1.png"), ("b", "1.png"), ("a", "1.jpg")]
    entries = [
        {"filepath": folder, "filename": name, "split": "train", "sentences": [{"raw": "a dog"}]}
        for folder, name in images
    ]
    (tmp_path / "my.json").write_text(json.dumps({"images": entries}))
    data = load_data(tmp_path / "my.json", store=tmp_path / "s")
    assert [colour_of(data, "train", i) for i in range(3)] == ["lime", "blue", "red"]


def test_sizes_of_pictures_that_share_a_name_are_not_mixed_up(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / "f" / folder).mkdir(parents=True)
        boxes = np.float32([[10, 10, 20, 20]] * 3)
        save_npz(tmp_path / "f" / folder / "1.npz", norm_bb=None, bbox=boxes)
    entries = [
        {"filename": f"{f}/1.jpg", "split": "train", "sentences": [{"raw": "a dog"}]} | size
        for f, size in (
            ("a", {"width": 640.0, "height": "100"}),
            ("b", {"width": 50, "height": 50}),
        )
    ]
    (tmp_path / "my.json").write_text(json.dumps({"images": entries}))
    with pytest.raises(InputError, match="1.npz.*pixels"):
        load_data(tmp_path / "my.json", store=tmp_path / "s")
    (tmp_path / "f/b/1.npz").rename(tmp_path / "f/2.npz")
    entries[1]["filename"] = "2.jpg"
    (tmp_path / "my.json").write_text(json.dumps({"images": entries}))
    boxes = load_data(tmp_path / "my.json", store=tmp_path / "s").image("train", [0, 1])[1]
    assert torch.allclose(boxes[0, 0, :4], torch.tensor([10 / 640, 0.1, 20 / 640, 0.2]))
    assert torch.allclose(boxes[1, 0, :4], torch.tensor([0.2, 0.2, 0.4, 0.4]))


@pytest.mark.parametrize(
    "order", ["id h w num_boxes boxes features", "boxes w features h id num_boxes"]
)
def test_a_tsv_header_tells_the_order(tmp_path, order):
    values = dict(
        zip("id w h num_boxes boxes features".split(), tsv_row(7).rstrip("\n").split("\t"))
    )
    names = {"id": "image_id", "h": "image_h", "w": "img_w"}
    header = "\t".join(names.get(name, name) for name in order.split())
    row = "\t".join(values[name] for name in order.split())
    (tmp_path / "x.tsv").write_text(f"\ufeff{header}\r\n{row}\r\n", encoding="utf-8", newline="")
    karpathy(tmp_path / "dataset_coco.json", [("7.jpg", "train", ["a dog"])])
    data = load_data("coco", tmp_path, store=tmp_path / "s")
    boxes = data.image("train", [0])[1]
    assert torch.allclose(boxes[0, 1, :4], torch.tensor([0.125, 0.25, 1.0, 1.0]))
    (tmp_path / "x.tsv").write_text(header.replace("img_w", "other") + "\n" + row + "\n")
    with pytest.raises(InputError, match="row 2.*lacks 'w'"):
        load_data("coco", tmp_path, store=tmp_path / "s")


def rgb_like(picture, mode):
    """Ways to say the same picture."""
    if mode == "turned":
        exif = Image.Exif()
        exif[274] = 6  # shown turned a quarter to the right
        return picture.rotate(90, expand=True), {"exif": exif}
    if mode == "16 bits":
        grey = np.asarray(picture.convert("L")).astype(np.uint16) * 257
        return Image.fromarray(grey), {}
    if mode == "transparent":
        paper = Image.new(
            "RGBA", picture.size, (9, 9, 9, 0)
        )  # what is hidden under it is no matter
        paper.paste(picture.crop((0, 0, 20, 20)).convert("RGBA"), (0, 0))
        return paper, {}
    if mode == "P":
        return picture.quantize(8), {}
    return picture.convert(mode), {}


@pytest.mark.parametrize(
    "mode, ending",
    [
        *[("turned", ".jpg"), ("16 bits", ".png"), ("CMYK", ".jpg"), ("P", ".png")],
        *[("L", ".png"), ("1", ".png"), ("RGBA", ".png"), ("LA", ".png"), ("RGB", ".webp")],
        *[("transparent", ".png"), ("RGB", ".JPEG"), ("P", ".gif"), ("RGB", ".bmp")],
        *[("RGB", ".tif"), ("16 bits", ".tiff"), ("CMYK", ".TIFF")],
    ],
)
def test_pictures_of_every_kind_are_seen_right(tmp_path, monkeypatch, mode, ending):
    pixels = np.zeros((32, 48, 3), np.uint8)
    pixels[:, :24] = 250
    pixels[:16, 24:] = 90
    if mode in ("turned", "CMYK", "P", "RGBA", "RGB"):
        pixels[16:, 24:] = (250, 0, 0)
    plain = Image.fromarray(pixels)
    other, options = rgb_like(plain, mode)
    other.save(tmp_path / f"1{ending}", **options)
    if mode == "1":
        plain = plain.convert("1")
    if mode == "transparent":
        pixels[20:] = 255
        pixels[:, 20:] = 255
        plain = Image.fromarray(pixels)
    pictures = []
    describe_crops = data_module.describe_crops

    def watched(picture, boxes):
        pictures.append(picture)
        return describe_crops(picture, boxes)

    monkeypatch.setattr(data_module, "describe_crops", watched)
    features = read_one_picture(tmp_path / f"1{ending}")
    seen = pictures[0]
    assert seen.mode == "RGB" and seen.size == plain.size
    error = np.asarray(seen, float) - np.asarray(plain.convert("RGB"), float)
    assert abs(error).mean() < 8
    boxes = np.array([[0.0, 0.0, 1.0, 1.0]])
    assert abs(features[0] - describe_crops(seen, boxes)[0]).max() < 0.01


def read_one_picture(path):
    """Its features, (R, F), by way of load_data."""
    karpathy(path.parent / "my.json", [(path.name, "train", ["a dog"])])
    data = load_data(path.parent / "my.json", features=path, store=path.parent / "s")
    return data.image("train", [0])[0][0].numpy()


def test_what_is_no_data_of_the_user_is_left_aside(tmp_path):
    picture(tmp_path / "images/1.jpg")
    (tmp_path / "images/._1.jpg").write_bytes(b"\0\5\26\7 of another system")
    for name in ("negatives", "search", "curves"):
        picture(tmp_path / f"images/{name}.png")
    for folder in ("runs/a", ".cache", "venv/lib/site-packages/x"):
        picture(tmp_path / folder / "1.png")
    for folder in (".venv/x", "tests/golden"):
        (tmp_path / folder).mkdir(parents=True)
        np.savez(tmp_path / folder / "a.npz", weights=np.ones(3))
    karpathy(tmp_path / "my.json", [("1.jpg", "train", ["a dog"])])
    for features in (None, tmp_path):
        data = load_data(tmp_path / "my.json", features=features, store=tmp_path / "runs/s")
        assert data.regions.names == ["images/1.jpg"]


NAMES = {  # of arrays that others write
    "OpenVQA": ("000000000001.jpg.npz", "x", "bbox", "num_bbox", "image_w", "image_h"),
    "image_features": ("1.npz", "image_features", "boxes", "num_boxes", "img_w", "img_h"),
    "bottom-up": ("COCO_train2014_000000000001.jpg.npz", "feat", "bbox", "num_bb", "w", "h"),
}


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("turned", [False, True])
def test_npz_with_the_names_of_others(tmp_path, kind, turned):
    file, *names = NAMES[kind]
    features = np.random.default_rng(0).random((3, 5)).astype(np.float32)
    boxes = np.float32([[0, 0, 20, 5]] * 3)
    if turned and kind == "OpenVQA":
        features = features.T
    arrays = dict(zip(names, (features, boxes, np.array(3), np.array(40), np.array(10))))
    (tmp_path / "f").mkdir()
    np.savez(tmp_path / "f" / file, **arrays, info=np.array({"pickled": 1}, object))
    image = {"filename": "1.jpg", "split": "train", "sentences": [{"raw": "a"}]}
    size = {"width": 40, "height": 10}
    (tmp_path / "my.json").write_text(json.dumps({"images": [image | size]}))
    data = load_data(tmp_path / "my.json", store=tmp_path / "s")
    got, corners, _ = data.image("train", [0])
    want = features.T if features.shape == (5, 3) else features
    assert (got[0] - torch.from_numpy(want)).abs().max() < 1e-3
    assert torch.allclose(corners[0, 0, :4], torch.tensor([0, 0, 0.5, 0.5]))


def test_of_two_names_of_one_field_the_documented_one_counts(root, tmp_path):
    for name in "123":
        path = root / f"regions/coco_train2014_00000000000{name}.npz"
        save_npz(path, x=np.full((3, 4), 7, np.float32), boxes=np.ones((3, 4), np.float32))
    data = load_data("coco", root, store=tmp_path)
    assert data.image("train", [0])[0].max() != 7


def test_npz_without_boxes_or_with_unknown_names(tmp_path):
    karpathy(tmp_path / "my.json", [("1.jpg", "train", ["a dog"])])
    np.savez(tmp_path / "1.npz", feat=np.ones((3, 4)))
    with pytest.raises(InputError, match="1.npz.*has feat; wanted.*bbox"):
        load_data(tmp_path / "my.json", store=tmp_path / "s")
    np.savez(tmp_path / "1.npz", weight=np.ones((3, 4)), bias=np.ones(3))
    with pytest.raises(InputError, match="1.npz.*weight, bias; wanted.*features.*norm_bb"):
        load_data(tmp_path / "my.json", store=tmp_path / "s")


def test_nothing_is_unpickled_and_bombs_are_refused(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    path = tmp_path / "1.npz"
    karpathy(tmp_path / "my.json", [("1.jpg", "train", ["a dog"])])
    save_npz(path, features=np.array([Bomb()], object))
    with pytest.raises(InputError, match="1.npz.*allow_pickle"):
        load_data(tmp_path / "my.json", store=tmp_path / "s")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("features.npy", bytes(data_module.LARGEST + 1))
    with pytest.raises(InputError, match="1.npz.*unpacks to more"):
        load_data(tmp_path / "my.json", store=tmp_path / "s")
    header = io.BytesIO()
    shape = {"descr": "<f4", "fortran_order": False, "shape": (10**6, 10**6)}
    np.lib.format.write_array_header_1_0(header, shape)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("features.npy", header.getvalue() + bytes(400))
    with pytest.raises(InputError, match="1.npz.*"):
        load_data(tmp_path / "my.json", store=tmp_path / "s")
    path.unlink()
    (tmp_path / "images").mkdir()
    for side in (10000, 15000):
        Image.new("1", (side, side)).save(tmp_path / "images/1.png", compress_level=1)
        with pytest.raises(InputError, match="1.png.*pixels"):
            load_data(tmp_path / "my.json", store=tmp_path / "s")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    "content, message",
    [
        ({"images": [], "annotations": [], "info": {}}, "COCO's own annotation file.*Karpathy"),
        ([1, 2], "Karpathy's form"),
        ({"images": {"a": 1}}, "Karpathy's form"),
        ({"images": [3]}, "image 0"),
        ({"images": [None]}, "image 0"),
        ("[" * 100000, "Karpathy's form"),
        ('{"images": [', "Karpathy's form"),
        ('{"images": NaN}', "Karpathy's form"),
        (b"\xff\xfe\x00", "Karpathy's form"),
        ({"images": [{"filename": "1.jpg", "sentences": [{"raw": "a"}]}]}, "lacks 'split'"),
        ({"images": [{"split": "train", "sentences": [{"raw": "a"}]}]}, "lacks 'filename'"),
    ],
)
def test_json_that_is_something_else(root, tmp_path, content, message):
    if not isinstance(content, (str, bytes)):
        content = json.dumps(content)
    content = content if isinstance(content, bytes) else content.encode()
    (root / "dataset_coco.json").write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        load_data("coco", root, store=tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["validation", "valid", "dev", "Val"])
def test_names_of_the_validation_split(root, tmp_path, name):
    karpathy(root / "dataset_coco.json", [IMAGES[0], ("2.jpg", name, ["a cat"])])
    assert load_data("coco", root, store=tmp_path).splits["val"].images == ["2.jpg"]


def test_few_captions_make_a_vocabulary_and_a_note(root, tmp_path):
    karpathy(root / "dataset_coco.json", [("1.jpg", "train", ["a cat on a mat"])])
    data = load_data("coco", root, store=tmp_path)
    assert set(data.tokenizer.tokens[5:]) == {"a", "cat", "on", "mat"}
    assert any("few captions" in note for note in data.notes)
    first, end = data.tokenizer.word_range
    assert (first, end) == (5, 9)


def test_byte_order_marks_line_ends_and_names_of_all_letters(tmp_path):
    folder = tmp_path / "Bilder für übermorgen 图"
    folder.mkdir()
    save_npz(folder / "hündchen 图.npz")
    image = {
        "filename": "hündchen 图.jpg",
        "split": "train",
        "sentences": [{"raw": "a \r\n dög 图"}],
    }
    text = json.dumps({"images": [image]}, ensure_ascii=False, indent=1)
    (folder / "my.json").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    vocabulary = "\r\n".join([*TOKENS, "图"])
    (folder / "vocab.txt").write_bytes(b"\xef\xbb\xbf" + vocabulary.encode())
    data = load_data(folder / "my.json", store=tmp_path / "s")
    assert data.splits["train"].captions == ["a dög 图"]
    tokenizer = data.tokenizer
    assert data.text("train", [0])[0].tolist() == [2, *tokenizer.encode("a dog 图"), 3]
    assert tokenizer.unk_id not in tokenizer.encode("a dog 图")


def test_captions_of_unknown_words_and_of_512_tokens(root, tmp_path):
    long = " ".join(["a", "dog"] * 256)
    karpathy(root / "dataset_coco.json", [("1.jpg", "train", [long, "qqq zzz", "\u200b"])])
    with pytest.raises(InputError, match="image 0.*empty"):  # nothing visible
        load_data("coco", root, store=tmp_path, tokens=TOKENS)
    karpathy(root / "dataset_coco.json", [("1.jpg", "train", [long, "qqq zzz"])])
    data = load_data("coco", root, store=tmp_path, tokens=TOKENS)
    ids = data.text("train", [0, 1])
    assert ids.shape == (2, 64) and ids[0, -1] == data.tokenizer.sep_id
    assert ids[1, :4].tolist() == [2, 1, 1, 3] and data.phrases("train", [0, 1]).shape[2] == 64
    longer = dataclasses.replace(data, max_text=600)
    assert longer.text("train", [0]).shape == (1, 514)


def test_splits_of_one_image_and_images_of_1_and_100_regions(root, tmp_path):
    for name, n in (("1", 1), ("2", 100), ("3", 3)):
        save_npz(
            root / f"regions/coco_train2014_00000000000{name}.npz",
            features=np.ones((n, 4)),
            norm_bb=np.tile([[0, 0, 0.5, 0.5, 0.5, 0.5]], (n, 1)),
            conf=np.full(n, 0.9),
            num_bb=n,
        )
    images = [("1.jpg", "train", ["a dog"]), ("2.jpg", "val", ["a dog"]), ("3.jpg", "test", ["a"])]
    karpathy(root / "dataset_coco.json", images)
    data = load_data("coco", root, store=tmp_path)
    assert [data.image(split, [0])[2].sum() for split in ("train", "val", "test")] == [1, 100, 3]
    assert data.true_captions("val", [0]).shape == (1, 1, 4)


def test_an_enormous_num_boxes_and_a_file_without_line_ends(tmp_path):
    karpathy(tmp_path / "dataset_coco.json", [("1.jpg", "train", ["a dog"])])
    for content in (tsv_row(1, n=10**15), tsv_row(1, n="9" * 5000), tsv_row(1, n=-2), "x" * 10**6):
        (tmp_path / "x.tsv").write_text(content)
        with pytest.raises(InputError, match="x.tsv row 1"):
            load_data("coco", tmp_path, store=tmp_path / "s")
    (tmp_path / "x.tsv").write_text("")
    with pytest.raises(InputError, match="not one usable image"):
        load_data("coco", tmp_path, store=tmp_path / "s")


def test_bad_pictures_that_no_caption_names_can_be_skipped_for_good(root, tmp_path):
    cut_npz(root)
    skipping = load_data("coco", root, store=tmp_path, skip_bad=True)
    again = load_data("coco", root, store=tmp_path, skip_bad=True)
    assert skipping.notes == again.notes and any("0002.npz" in note for note in again.notes)
    with pytest.raises(InputError, match="0002.npz.*--skip-bad"):  # not "without features"
        load_data("coco", root, store=tmp_path)


# ---------------------------------------------------------------- which files are taken


def save_pictures(folder, names):
    for name in names:
        picture(folder / name, "red")


def test_a_mistyped_json_is_named_before_any_folder_is_walked(tmp_path, monkeypatch):
    monkeypatch.setattr(data_module, "list_files", None)  # a call would fail
    for name in ("none.json", "other/none.json"):
        with pytest.raises(InputError, match=f"{name}: no such file; Karpathy's form"):
            load_data(tmp_path / name, root=tmp_path, store=tmp_path / "s")
    for name in ("captions.txt", "folder/coco"):
        with pytest.raises(InputError, match=f"{name}: coco, flickr30k or the path of a JSON"):
            load_data(name, root=tmp_path, store=tmp_path / "s")


def test_links_to_folders_are_followed_once(tmp_path):
    save_pictures(tmp_path / "images/z", ["1.jpg", "2.jpg"])
    for link, target in (("a", "z"), ("b", ".."), ("z/c", "../.."), ("z/d", "../../other")):
        (tmp_path / "images" / link).symlink_to(target)
    save_pictures(tmp_path / "other/images", ["3.jpg"])
    (tmp_path / "other/images/e").symlink_to(tmp_path)
    names = list(data_module.list_files(tmp_path / "images"))
    assert {"z/1.jpg", "z/2.jpg"} < set(names)  # by their real folder
    assert sorted(Path(name).name for name in names) == ["1.jpg", "2.jpg", "3.jpg"]
    (tmp_path / "link").symlink_to("images")
    assert len(data_module.list_files(tmp_path / "link")) == 3


def test_only_the_named_data_set_is_taken(tmp_path):
    karpathy(tmp_path / "dataset_coco.json", IMAGES)
    karpathy(tmp_path / "dataset_flickr30k.json", IMAGES)
    save_pictures(tmp_path / "images", ["1.jpg", "2.jpg", "3.jpg"])
    with pytest.raises(InputError, match="dataset_f30k.json: no such.*--data coco or flickr30k"):
        load_data("f30k", tmp_path, store=tmp_path / "s")
    assert load_data("coco", tmp_path, store=tmp_path / "s").name == "coco"


@pytest.mark.parametrize(
    "endings", [(".tsv.0", ".tsv.1"), (".TSV.10", ".tsv"), (".tsv.gz", ".tsv")]
)
def test_parts_of_tsvs_and_packed_ones(tmp_path, endings):
    karpathy(tmp_path / "dataset_coco.json", IMAGES)
    for number, ending in enumerate(endings, 1):
        content = tsv_row(number) + (tsv_row(3) if number == 2 else "")
        content = gzip.compress(content.encode()) if ending == ".tsv.gz" else content.encode()
        (tmp_path / f"train{ending}").write_bytes(content)
    data = load_data("coco", tmp_path, store=tmp_path / "s")
    assert sorted(data.regions.names) == ["1", "2", "3"]


def test_a_packed_tsv_that_is_cut_off(tmp_path):
    karpathy(tmp_path / "dataset_coco.json", IMAGES)
    packed = gzip.compress(tsv_row(1).encode())
    for content in (packed[:-9], packed[:20], b"text", b""):
        (tmp_path / "x.tsv.gz").write_bytes(content)
        with pytest.raises(InputError, match="x.tsv.gz|not one usable"):
            load_data("coco", tmp_path, store=tmp_path / "s")


def test_the_form_that_has_the_captioned_images_is_taken(tmp_path):
    listing = karpathy(tmp_path / "my.json", IMAGES)
    save_pictures(tmp_path / "images", ["1.jpg", "2.jpg", "3.jpg"])
    (tmp_path / "neg.tsv").write_text("title\tfilepath\ncat\timages/1.jpg\n")
    np.savez(tmp_path / "mean.npz", mean=np.ones(3))
    np.save(tmp_path / "x_ims.npy", np.ones((3, 2, 4)))
    data = load_data(listing, store=tmp_path / "s")
    assert data.notes[0].endswith("(pictures)")
    np.savez(tmp_path / "2.npz", scores=np.ones(3))
    assert load_data(listing, store=tmp_path / "s").notes == data.notes
    np.savez(tmp_path / "1.npz", scores=np.ones(3))  # two of three are meant
    with pytest.raises(InputError, match="no 3.jpg in"):
        load_data(listing, store=tmp_path / "s")


def test_a_tsv_of_something_else_beside_those_of_features(tmp_path):
    listing = karpathy(tmp_path / "my.json", IMAGES)
    (tmp_path / "a.tsv").write_text("title\tfilepath\ncat\timages/1.jpg\n")
    (tmp_path / "b.tsv").write_text(tsv_row(1) + tsv_row(2) + tsv_row(3))
    data = load_data(listing, store=tmp_path / "s")
    note = "not read, since none of their images has captions: a.tsv (1 in all)"
    assert note in data.notes


def test_a_folder_with_the_name_of_another_data_set_is_searched_if_it_is_the_only_one(tmp_path):
    karpathy(tmp_path / "dataset_coco.json", IMAGES)
    (tmp_path / "flickr30k").mkdir()
    (tmp_path / "flickr30k/a.tsv").write_text(tsv_row(1) + tsv_row(2) + tsv_row(3))
    assert len(load_data("coco", tmp_path, store=tmp_path / "s").regions.names) == 3


def test_features_of_another_data_set_with_the_same_numbers_are_no_fault_without_a_name(tmp_path):
    karpathy(tmp_path / "dataset_coco.json", IMAGES)
    (tmp_path / "f").mkdir()
    for name in "123":
        save_npz(tmp_path / f"f/flickr30k_00000000000{name}.npz")
    with pytest.raises(InputError, match="f: no region features for 1.jpg .*3 .npz"):
        load_data("coco", tmp_path, features=tmp_path / "f", store=tmp_path / "s")


def test_folders_of_pictures_may_be_written_in_capitals(tmp_path):
    listing = karpathy(tmp_path / "my.json", IMAGES)
    save_pictures(tmp_path / "Images", ["1.jpg", "2.jpg", "3.jpg"])
    assert load_data(listing, store=tmp_path / "s").notes[0].endswith("(pictures)")


def test_other_files_are_counted_by_their_endings(tmp_path):
    listing = karpathy(tmp_path / "my.json", IMAGES)
    (tmp_path / "images").mkdir()
    for number in range(12):
        (tmp_path / f"images/{number}.heic").write_bytes(b"")
    message = "no region features for 1.jpg and the others here .*12 .heic.*--features at them"
    with pytest.raises(InputError, match=message):
        load_data(listing, store=tmp_path / "s")


def test_names_match_whatever_unicode_form_they_have(tmp_path):
    save_pictures(tmp_path / "images", [unicodedata.normalize("NFD", "caf\u00e9.jpg")])
    for form in ("NFC", "NFD"):
        name = unicodedata.normalize(form, "caf\u00e9.jpg")
        listing = karpathy(tmp_path / "my.json", [(name, "train", ["a dog"])])
        assert load_data(listing, store=tmp_path / "s").splits["train"].images == [name]


def test_an_image_that_is_listed_twice(tmp_path):
    save_pictures(tmp_path / "images", ["1.jpg", "2.jpg"])
    listing = karpathy(tmp_path / "my.json", [*IMAGES[:2], ("1.jpg", "test", ["a dog"])])
    with pytest.raises(InputError, match="image 2: 1.jpg is listed twice, first as image 0; mend"):
        load_data(listing, store=tmp_path / "s")
    data = load_data(listing, store=tmp_path / "s", skip_bad=True)
    assert "test" not in data.splits and any("listed twice" in note for note in data.notes)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"split": None}, "image 0: 'split' is null; a text is expected"),
        ({"sentences": "a dog"}, "image 0: 'sentences' is \"a dog\"; a list is expected"),
        ({"sentences": ["a dog"]}, "image 0: \"a dog\" is no object with a field 'raw'"),
        ({"sentences": [{"raw": None}]}, "image 0: 'raw' is null; a text"),
        ({"sentences": [{"raw": float("nan")}]}, "image 0: 'raw' is NaN; a text"),
        ({"sentences": [{"tokens": ["a"]}]}, "image 0: lacks 'raw'"),
        ({"filename": None}, "image 0: lacks 'filename'"),
    ],
)
def test_fields_of_another_kind_are_named(tmp_path, change, message):
    entry = {"filename": "1.jpg", "split": "train", "sentences": [{"raw": "a dog"}]} | change
    (tmp_path / "my.json").write_text(json.dumps({"images": [entry]}))
    with pytest.raises(InputError, match=message):
        load_data(tmp_path / "my.json", store=tmp_path / "s")
    with pytest.raises(InputError, match=f"no usable image; left out: .*{message.split(';')[0]}"):
        load_data(tmp_path / "my.json", store=tmp_path / "s", skip_bad=True)


# ---------------------------------------------------------------- what is missing


def refuse_to_convert(monkeypatch):
    monkeypatch.setattr(data_module, "write_regions", None)  # a call would fail


def test_json_alone(tmp_path, monkeypatch, capsys):
    refuse_to_convert(monkeypatch)
    karpathy(tmp_path / "dataset_coco.json", IMAGES)
    with pytest.raises(InputError, match="no region features for 1.jpg"):
        load_data("coco", tmp_path, store=tmp_path / "s")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("found    captions") and "train 2, test 1 images" in lines[0]
    assert lines[1].startswith("missing  regions: of train 2, test 1 images")
    assert lines[-1].startswith("missing  vocabulary")


def test_features_alone(root, tmp_path, monkeypatch, capsys):
    refuse_to_convert(monkeypatch)
    (root / "dataset_coco.json").unlink()
    (root / "vocab.txt").write_text("\n".join(TOKENS))
    with pytest.raises(InputError, match="dataset_coco.json: no such file"):
        load_data("coco", root, store=tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("missing  captions") and "caption_datasets.zip" in lines[0]
    assert lines[1] == f"found    regions: {root / 'regions'} (npz), 3 images"
    assert lines[-1].startswith("found    vocabulary") and len(lines) == 3


def test_pictures_of_this_repository_are_none_of_coco(tmp_path, monkeypatch, capsys):
    refuse_to_convert(monkeypatch)
    save_pictures(tmp_path / "images", ["negatives-photos.png"])
    with pytest.raises(InputError, match="no region features here"):
        load_data("coco", tmp_path, store=tmp_path / "s")
    assert "found    regions" not in capsys.readouterr().out
    karpathy(tmp_path / "dataset_coco.json", IMAGES)
    with pytest.raises(InputError, match="no region features for 1.jpg"):
        load_data("coco", tmp_path, store=tmp_path / "s")
    assert "found    regions" not in capsys.readouterr().out


def test_half_of_the_features_is_found_out_before_the_conversion(
    root, tmp_path, monkeypatch, capsys
):
    entries = []
    for number, split in enumerate(("train", "train", "val", "test", "test", "test"), 1):
        year = "train2014" if number < 3 else "val2014"
        name = f"COCO_{year}_{number:012}.jpg"
        entry = {"filepath": year, "filename": name, "split": split}
        entries.append(entry | {"sentences": [{"raw": "a dog"}]})
    (root / "dataset_coco.json").write_text(json.dumps({"images": entries}))
    (root / "regions/coco_train2014_000000000003.npz").unlink()
    with monkeypatch.context() as patch:
        refuse_to_convert(patch)
        message = "no val2014/COCO_val2014_000000000003.jpg .*; val 1, test 3 images have none"
        with pytest.raises(InputError, match=message):
            load_data("coco", root, store=tmp_path)
    out = capsys.readouterr().out
    assert "(npz), 2 images" in out and "4 of them have the folder val2014" in out
    data = load_data("coco", root, store=tmp_path, skip_bad=True)
    assert list(data.splits) == ["train"] and any("left out 4" in note for note in data.notes)


def test_a_missing_split_or_vocabulary_is_found_out_before_the_conversion(
    root, tmp_path, monkeypatch
):
    refuse_to_convert(monkeypatch)
    with pytest.raises(InputError, match="no image of the val split, but train 2, test 1 images"):
        load_data("coco", root, store=tmp_path, needed=("train", "val"))
    with pytest.raises(InputError, match="know 28,996 tokens, but there is no .*vocab.txt"):
        load_data("coco", root, store=tmp_path, vocab_size=28996)
    (root / "vocab.txt").write_text("\n".join(TOKENS))
    with pytest.raises(InputError, match="know 28,996 tokens, but .*vocab.txt has 12"):
        load_data("coco", root, store=tmp_path, vocab_size=28996)
    with pytest.raises(InputError, match="none.txt"):
        load_data("coco", root, store=tmp_path, vocab=tmp_path / "none.txt", vocab_size=28996)


def test_the_vocabulary_of_the_root_comes_first_if_it_fits(root, tmp_path):
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] a red dog cat zebra"
    (tmp_path / "other.txt").write_text(f"{words} Tree".replace(" ", "\n"))
    arguments = {"store": tmp_path, "vocab": tmp_path / "other.txt"}
    data = load_data("coco", root, **arguments)
    assert data.tokenizer.tokens[-1] == "Tree" and not data.tokenizer.lowercase
    (root / "vocab.txt").write_text(words.replace(" ", "\n"))
    assert load_data("coco", root, **arguments).tokenizer.tokens[-1] == "zebra"
    assert load_data("coco", root, **arguments, vocab_size=11).tokenizer.tokens[-1] == "Tree"


# ---------------------------------------------------------------- texts


def test_all_captions_train_and_none_beyond_the_fifth_counts_as_false(root, tmp_path):
    many = [f"a dog {word}" for word in "one two three four five six seven".split()]
    karpathy(root / "dataset_coco.json", [("1.jpg", "train", many), ("3.jpg", "val", many)])
    data = load_data("coco", root, store=tmp_path)
    assert data.splits["train"].captions == many and data.splits["val"].captions == many[:5]
    assert any(note.startswith("2 captions of val and test left out") for note in data.notes)
    for split in ("train", "val"):
        ids = data.true_captions(split, [0])[0].tolist()
        assert [data.tokenizer.decode(row) for row in ids] == many


def test_a_dash_between_spaces_joins_no_words(tmp_path):
    data = tiny_data(tmp_path)
    captions = ["a dog - dog jumps", "a dog-dog jumps"]
    data.splits["train"].captions[:2] = captions
    rows = [data.caption_phrases("train", c).int().tolist() for c in (0, 1)]
    assert rows[0] == [[0, 0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 1, 0]]
    assert rows[1] == [[0, 0, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 1, 0]]


def test_what_is_cut_off_is_counted(root, tmp_path):
    texts = ["a dog and a cat", "a dog and a red cat", "a dog and a", "a dog and the", "a dog"]
    karpathy(root / "dataset_coco.json", [("1.jpg", "train", texts)])
    data = load_data("coco", root, store=tmp_path, max_text=6)
    assert data.text("train", range(5)).shape == (5, 6)
    message = "2 captions are longer than 6 tokens and cut off; 3 captions are equal"
    assert any(note.startswith(message) for note in data.notes)
    assert not any("cut off" in note for note in load_data("coco", root, store=tmp_path).notes)
    with pytest.raises(InputError, match="a text of 2 tokens has no room"):
        load_data("coco", root, store=tmp_path, max_text=2)


def test_unknown_words_are_counted_and_a_foreign_language_is_refused(root, tmp_path):
    texts = ["a dog a dog a fox", "a dog a dog a dog"]
    karpathy(root / "dataset_coco.json", [("1.jpg", "train", texts), ("3.jpg", "test", texts[1:])])
    data = load_data("coco", root, store=tmp_path, tokens=TOKENS)
    assert "8% of the tokens in captions of train are unknown" in data.notes
    assert not any("captions of test" in note for note in data.notes)
    karpathy(
        root / "dataset_coco.json", [("1.jpg", "train", texts), ("3.jpg", "test", ["le chat"])]
    )
    with pytest.raises(InputError, match="100% of the tokens in captions of test are unknown"):
        load_data("coco", root, store=tmp_path, tokens=TOKENS)


# ---------------------------------------------------------------- damaged files of every kind


def make_tsv(folder):
    conf = [0.9, 0.8]
    (folder / "x.tsv").write_text(tsv_row(1, conf=conf) + tsv_row(2, conf=conf))
    return folder / "x.tsv"


def make_npz(folder):
    np.savez_compressed(
        folder / "1.npz",
        features=np.ones((3, 4)),
        bbox=np.ones((3, 4)) / 2,
        num_bb=3,
        conf=np.ones(3),
    )
    return folder / "1.npz"


def make_npz_inside(folder):
    """As make_npz, but what is damaged is an array inside, whose checksum is right again."""
    np.save(folder / "features", np.ones((3, 4), np.float32))
    return folder / "features.npy"


def pack_npz(folder, content):
    with zipfile.ZipFile(folder / "1.npz", "w") as archive:
        archive.writestr("features.npy", content)
        with archive.open("norm_bb.npy", "w") as file:
            np.save(file, np.ones((3, 6)) / 2)


def make_npy(folder):
    np.save(folder / "train_ims.npy", np.ones((2, 3, 4), np.float32))
    (folder / "train_caps.txt").write_text("a dog\n" * 10)
    return folder / "train_ims.npy"


def make_captions(folder):
    make_npy(folder)
    return folder / "train_caps.txt"


def make_json(folder):
    make_npz(folder)
    shutil.copy(folder / "1.npz", folder / "2.npz")
    image = {"filepath": "a", "filename": "1.jpg", "cocoid": 1, "split": "train", "width": 640}
    sentence = {"raw": "A dog .", "tokens": ["a", "dog"]}
    image |= {"height": 480, "sentences": [sentence] * 2}
    text = json.dumps({"images": [image, image | {"filename": "2.jpg", "cocoid": 2}]})
    (folder / "dataset_coco.json").write_text(text)
    return folder / "dataset_coco.json"


def make_vocabulary(folder):
    make_npz(folder)
    (folder / "vocab.txt").write_text("\n".join(TOKENS))
    return folder / "vocab.txt"


def make_phrases(folder):
    make_npz(folder)
    phrases = [{"type": "object", "tokens": [1]}, {"tokens": [0, 1]}]
    entry = {"caption": "a dog", "tokens": ["a", "dog"], "phrases": phrases}
    (folder / "phrases.json").write_text(json.dumps([entry, entry | {"caption": "A dog"}]))
    return folder / "phrases.json"


def maker_of_pictures(ending, mode):
    def make(folder):
        (folder / "images").mkdir(exist_ok=True)
        pixels = np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8)
        exif = Image.Exif()
        exif[274] = 6
        Image.fromarray(pixels).convert(mode).save(folder / f"images/1{ending}", exif=exif)
        return folder / f"images/1{ending}"

    return make


def make_packed_tsv(folder):
    content = make_tsv(folder).read_bytes()
    (folder / "x.tsv").unlink()
    (folder / "x.tsv.gz").write_bytes(gzip.compress(content))
    return folder / "x.tsv.gz"


KINDS = {
    "tsv": make_tsv,
    "tsv.gz": make_packed_tsv,
    "npz": make_npz,
    "npz inside": make_npz_inside,
    "npy": make_npy,
    "caps.txt": make_captions,
    "json": make_json,
    "vocab.txt": make_vocabulary,
    "phrases": make_phrases,
    "jpg": maker_of_pictures(".jpg", "RGB"),
    "png": maker_of_pictures(".png", "P"),
    "webp": maker_of_pictures(".webp", "RGB"),
    "gif": maker_of_pictures(".gif", "P"),
    "bmp": maker_of_pictures(".bmp", "RGB"),
    "tif": maker_of_pictures(".tif", "RGB"),
}


def damage(content, chance):
    """Some bytes changed, cut out, doubled, put in or cut off."""
    content = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 5, 20))):
        start = chance.randrange(len(content) + 1)
        end = min(len(content), start + chance.choice((1, 1, 4, 50)))
        way = chance.randrange(6)
        if way == 0:
            del content[start:]
        elif way == 1:
            del content[start:end]
        elif way == 2:
            content[start:start] = content[start:end] * chance.choice((1, 2, 100))
        elif way == 3:
            content[start:end] = bytes(chance.randrange(256) for _ in range(end - start))
        elif way == 4:
            content[start:end] = chance.choice((b"9999999999", b"-1", b"NaN", b"[", b'"', b"\n\t"))
        elif start < len(content):
            content[start] ^= 1 << chance.randrange(8)
    return bytes(content)


def throw_damaged_files(folder, kind, count, seed=0):
    """Reads `count` damaged files of a kind -> how many were read after all, the longest time."""
    chance = random.Random(f"{kind} {seed}")
    read = 0
    longest = 0
    path = KINDS[kind](folder)
    if kind != "json":
        images = [("1.jpg", "train", ["a dog"]), ("2.jpg", "test", ["a dog"])]
        images = images[: 2 if "tsv" in kind else 1]  # those that the file has
        karpathy(folder / "dataset_coco.json", images)
    whole = path.read_bytes()
    for number in range(count):
        damaged = damage(whole, chance)
        path.write_bytes(damaged)
        if kind == "npz inside":
            pack_npz(folder, damaged)
        start = time.monotonic()
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                read += read_all(folder, kind, skip_bad=number % 2 == 0)
            except InputError as fault:
                assert "\n" not in str(fault) and len(str(fault)) < 2000
                str(fault).encode()
        assert not warned, (number, [str(warning.message) for warning in warned])
        longest = max(longest, time.monotonic() - start)
    return read, longest


def read_all(folder, kind, skip_bad):
    phrases = folder / "phrases.json" if kind == "phrases" else None
    data = load_data("coco", folder, phrases=phrases, skip_bad=skip_bad, store=folder / "store")
    for split, content in data.splits.items():
        captions = range(len(content.captions))
        ids = data.text(split, captions)
        assert ids.min() >= 0 and ids.max() < len(data.tokenizer.tokens)
        assert data.phrases(split, captions).shape[::2] == ids.shape
        features, boxes, mask = data.image(split, range(len(content.images)))
        assert features.isfinite().all() and 0 <= boxes.min() and boxes.max() <= 1 and mask.any()
    return True


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_read_or_named(tmp_path, kind):
    _, longest = throw_damaged_files(tmp_path, kind, 40)
    assert longest < 5


if __name__ == "__main__":
    import resource
    import tempfile

    for name in KINDS:
        with tempfile.TemporaryDirectory() as place:
            amount = int(sys.argv[1])
            right, slowest = throw_damaged_files(Path(place), name, amount, seed=1)
            print(
                f"{name:11}{amount} files: {right} read, the others named; slowest {slowest:.2f} s"
            )
    print(f"most memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")
