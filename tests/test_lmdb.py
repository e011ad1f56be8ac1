"""The reader of UNITER's databases against the packages lmdb, msgpack and msgpack-numpy, whose results
golden/make_lmdb.py keeps as checksums; and on damaged files, thousands of them by

    python tests/test_lmdb.py 3000
"""

import hashlib
import json
import resource
import struct
import sys
import time
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data import InputError, load_data, read_lmdb, read_uniter, unpack_msgpack

GOLDEN = np.load(Path(__file__).parent / "golden" / "lmdb.npz", allow_pickle=False)
FILES = [name for name in GOLDEN.files if not name.endswith(" sums")]
SHARED = Path(__file__).resolve().parents[2] / "shared" / "real" / "uniter_db"
SHARED_SUMS = {
    "coco_train2014/feat_th0.2_max100_min10": (8, "81a16d6673b9df32", "c9b101eed5f44c7e"),
    "coco_train2014_compressed/all_compressed": (8, "5805fa478fad11cc", "b233a18bb8fcb249"),
    "many_small/feat_th0.2_max100_min10": (601, "29eea8b621c50b58", "2a27bbb1ab7be952"),
}


def write(folder, content):
    """A file data.mdb of these bytes, or of the kept file of that name -> its path."""
    if isinstance(content, str):
        content = GOLDEN[content].tobytes()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "data.mdb"
    path.write_bytes(content)
    return path


def read_images(path):
    """{name: what is read} of all images, in order; keys that are no image's raise."""
    return {name: read() for name, _, read in read_uniter({"data.mdb": path}, {})}


def sums(path):
    """As make_lmdb.py computes them."""
    raw, arrays = hashlib.sha256(), hashlib.sha256()
    entries = 0
    for key, value in read_lmdb(path):
        entries += 1
        raw.update(b"%d %s %d " % (len(key), key, len(value)) + value)
    for name, _, read in read_uniter({"data.mdb": path}, {}):
        if not name.endswith(".npz"):
            continue
        image = read()
        regions = image["features"].shape[0]
        if "count" in image and image["count"] is not None:
            assert image["count"] == regions
        for field, key in (("features", "features"), ("norm_bb", "boxes"), ("conf", "conf")):
            array = image[key][:, :4] if key == "boxes" else image[key]  # the corners
            array = np.ascontiguousarray(array)
            arrays.update(f"{name} {field} {array.dtype.str} {array.shape} ".encode())
            arrays.update(array.tobytes())
    return entries, raw.hexdigest()[:16], arrays.hexdigest()[:16]


@pytest.mark.parametrize("name", FILES)
def test_reads_what_the_package_reads(tmp_path, name):
    entries, raw, arrays = GOLDEN[f"{name} sums"].tolist()
    assert sums(write(tmp_path, name)) == (int(entries), raw, arrays)


@pytest.mark.parametrize("name", SHARED_SUMS)
def test_reads_published_layout(tmp_path, name):
    if not SHARED.exists():
        pytest.skip("the shared databases are not here")
    # The copy is without nbb_*.json, so that all regions and scores are compared.
    path = write(tmp_path, (SHARED / name / "data.mdb").read_bytes())
    assert sums(path) == SHARED_SUMS[name]


def test_both_kinds_of_values_give_the_same_regions():
    if not SHARED.exists():
        pytest.skip("the shared databases are not here")
    packed, zipped = list(SHARED_SUMS)[:2]
    packed = read_images(SHARED / packed / "data.mdb")
    zipped = read_images(SHARED / zipped / "data.mdb")
    assert list(packed) == list(zipped) and len(packed) == 7
    for name, image in packed.items():
        count = image["count"]
        kept = (zipped[name]["conf"] > 0.2).sum()
        assert count == kept == len(image["features"]) == len(image["boxes"])
        assert np.array_equal(image["features"], zipped[name]["features"][:count])
        assert np.array_equal(image["boxes"], zipped[name]["boxes"][:count])


def test_the_newer_valid_meta_page_counts(tmp_path):
    content = bytearray(GOLDEN["long_keys"].tobytes())
    assert len([*read_lmdb(write(tmp_path, content))]) == 150
    transactions = [struct.unpack_from("<Q", content, start + 144)[0] for start in (0, 4096)]
    newer = 4096 * int(np.argmax(transactions))
    for damage in (b"\0" * 4096, b"\0" * 24):
        content[newer : newer + len(damage)] = damage
        # The transaction before had written two thirds of the entries.
        assert len([*read_lmdb(write(tmp_path, content))]) == 100
    content[:152] = content[4096 : 4096 + 152] = b"\0" * 152
    with pytest.raises(InputError, match="no LMDB file"):
        [*read_lmdb(write(tmp_path, content))]


def test_regions_are_counted_by_the_list_or_by_score(tmp_path):
    place = tmp_path / "img" / "feat_th0.2_max100_min10"
    path = write(place, "one_transaction")
    images = read_images_of_npz(path)
    names = list(images)
    assert all("count" not in image and len(image["conf"]) >= 10 for image in images.values())
    counts = {name: n + 1 for n, name in enumerate(names)}
    # Of several lists that with the name of the database counts; it lies beside it, or in it.
    (tmp_path / "img" / "nbb_th0.0_max100_min10.json").write_text(json.dumps({names[0]: 7}))
    for listing in (place.parent, place):
        (listing / "nbb_th0.2_max100_min10.json").write_text(json.dumps(counts))
        images = read_images_of_npz(path)
        assert [len(image["boxes"]) for image in images.values()] == [*counts.values()]
        assert all("conf" not in image for image in images.values())
        (listing / "nbb_th0.2_max100_min10.json").unlink()


def test_counts_of_another_database_are_not_taken(tmp_path):
    path = write(tmp_path / "img" / "all_compressed", "one_transaction")
    expected = [len(image["boxes"]) for image in read_images_of_npz(path).values()]
    counts = dict.fromkeys(read_images_of_npz(path), 1)
    (tmp_path / "img" / "nbb_th0.2_max100_min10.json").write_text(json.dumps(counts))
    assert [len(image["boxes"]) for image in read_images_of_npz(path).values()] == expected


def test_a_changed_list_of_counts_makes_the_store_anew(tmp_path):
    folder = "img/feat_th0.2_max100_min10"
    root_with(tmp_path, {folder: "one_transaction"})
    names = read_images_of_npz(tmp_path / folder / "data.mdb")
    for count in (1, 2):
        listing = tmp_path / "img" / "nbb_th0.2_max100_min10.json"
        listing.write_text(json.dumps(dict.fromkeys(names, count)) + " " * count)
        loaded = load_data("coco", root=tmp_path, store=tmp_path / "store")
        assert (loaded.regions.counts == count).all()


def read_images_of_npz(path):
    """As read_images, without the list of keys that is kept beside the images."""
    found = read_uniter({"data.mdb": path}, {})
    return {name: read() for name, _, read in found if name.endswith(".npz")}


def root_with(tmp_path, folders):
    """A root with databases and a JSON of captions for all their images."""
    images = []
    for folder, content in folders.items():
        path = write(tmp_path / folder, content)
        for key, _ in read_lmdb(path):
            if key.endswith(b".npz"):
                number = key.decode()[-16:-4]
                split = ("train", "val", "test")[len(images) % 3]
                sentences = [{"raw": f"a dog {n} of {number}"} for n in range(5)]
                images.append({"filename": f"{number}.jpg", "split": split, "sentences": sentences})
    listing = tmp_path / "dataset_coco.json"
    listing.write_text(json.dumps({"images": images}))
    return len(images)


def test_a_root_with_several_databases_and_texts(tmp_path):
    two = {
        "coco_train2014/feat_th0.2_max100_min10": "one_transaction",
        "coco_val2014/all_compressed": GOLDEN["compressed"]
        .tobytes()
        .replace(b"coco_train2014_0", b"coco_train2014_9"),
    }
    count = root_with(tmp_path, two)
    write(tmp_path / "txt_db" / "itm_coco_train.db", "long_keys")
    (tmp_path / "txt_db" / "itm_coco_train.db" / "id2len.json").write_text("{}")
    loaded = load_data("coco", root=tmp_path, store=tmp_path / "store")
    assert count == len(loaded.regions.names) == 26
    features, boxes, mask = loaded.image("train", [0, 1])
    assert features.shape[2] == 8 and boxes.shape[2] == 7 and mask.any(1).all()


def test_two_data_sets_side_by_side(tmp_path):
    """As UNITER's script unpacks them; Flickr30K has numbers that COCO has, too."""
    coco = GOLDEN["one_transaction"].tobytes()
    flickr = coco.replace(b"coco_train2014_", b"flickr30k_00000")
    other = coco.replace(b"coco_train2014_", b"nlvr2_train_999")
    write(tmp_path / "img_db/coco_train2014/feat_th0.2_max100_min10", coco)
    write(tmp_path / "img_db/flickr30k/feat_th0.2_max100_min10", flickr)
    write(tmp_path / "img_db/nlvr2_train/feat_th0.2_max100_min10", other)
    write(tmp_path / "img_db/unnamed/a", flickr)  # told by its keys alone
    write(tmp_path / "txt_db/itm_coco_train.db", "long_keys")
    (tmp_path / "txt_db/itm_coco_train.db/id2len.json").write_text("{}")
    images = []
    keys = [key for key, _ in read_lmdb(write(tmp_path / "runs", coco)) if key != b"__keys__"]
    for number in [int(key[-16:-4]) for key in keys]:
        sentences = [{"raw": f"a dog {n} of {number}"} for n in range(5)]
        images.append({"filename": f"{number}.jpg", "split": "train", "sentences": sentences})
    for name, prefix in (("coco", "coco_train2014_"), ("flickr30k", "flickr30k_")):
        (tmp_path / f"dataset_{name}.json").write_text(json.dumps({"images": images}))
        if name == "flickr30k":
            (tmp_path / "img_db/unnamed/a/data.mdb").unlink()
        loaded = load_data(name, tmp_path, store=tmp_path / "store" / name)
        assert len(loaded.splits["train"].images) == len(loaded.regions.names) == 20
        assert all(key.startswith(prefix) for key in loaded.regions.names)
        assert any("nlvr2_train/feat_th0.2_max100_min10/data.mdb" in note for note in loaded.notes)


def test_given_texts_alone_says_so(tmp_path):
    path = write(tmp_path, "long_keys")
    _, text = [read for _, _, read in read_uniter({"data.mdb": path}, {})][:2]
    with pytest.raises(ValueError, match="Karpathy's JSON"):
        text()
    path.with_name("id2len.json").write_text("{}")
    with pytest.raises(InputError, match="has texts: captions are read from Karpathy's JSON"):
        read_images(path)


def test_a_damaged_image_ends_the_run_or_is_left_out(tmp_path):
    content = bytearray(GOLDEN["one_transaction"].tobytes())
    # The value of this image is announced as a map of 15, not of 4.
    place = content.index(b"coco_train2014_000000000008.npz\x84") + 31
    content[place] = 0x8F
    root_with(tmp_path, {"img": bytes(content)})
    with pytest.raises(InputError) as fault:
        load_data("coco", root=tmp_path, store=tmp_path / "store")
    text = str(fault.value)
    assert "\n" not in text and "--skip-bad" in text
    assert f"{tmp_path / 'img' / 'data.mdb'} key coco_train2014_000000000008.npz" in text
    loaded = load_data("coco", root=tmp_path, store=tmp_path / "store", skip_bad=True)
    assert len(loaded.regions.names) == 19
    assert any("left out 1 images" in note and "0000008.npz" in note for note in loaded.notes)


def test_a_file_that_is_cut_off(tmp_path):
    content = GOLDEN["pages_of_512"].tobytes()
    # The tree's root was written last, so without it nothing can be found.
    with pytest.raises(InputError, match=r"page \d+ is outside the file's \d+; is it cut off\?"):
        read_images_of_npz(write(tmp_path / "tree", content[: len(content) - 512]))
    for size in (0, 1, 100, 151, 500, 1000):
        with pytest.raises(InputError):
            read_images_of_npz(write(tmp_path / "start", content[:size]))
    # An image whose own pages are missing does not keep the others from being read: the node of the
    # first says that its value lies in page 2^40.
    content = bytearray(content)
    node = content.index(b"coco_train2014_000000000001.npz")
    assert content[node - 4] == 1
    content[node + 31 : node + 39] = struct.pack("<Q", 2**40)
    images = [
        read
        for name, _, read in read_uniter({"": write(tmp_path, content)}, {})
        if name.endswith(".npz")
    ]
    with pytest.raises(ValueError, match="cut off"):
        images[0]()
    assert [len(read()["boxes"]) for read in images[1:]] == [*range(13, 37, 3)]


@pytest.mark.parametrize(
    "start, field, text", [(16, b"\0", "no LMDB file"), (20, b"\2", "version")]
)
def test_another_magic_or_version(tmp_path, start, field, text):
    content = bytearray(GOLDEN["one_transaction"].tobytes())
    for meta in (0, 4096):
        content[meta + start : meta + start + 1] = field
    with pytest.raises(InputError, match=text):
        [*read_lmdb(write(tmp_path, content))]


def tree_pages(content, size, kind):
    """Where the branch (1) or leaf (2) pages begin."""
    starts = range(2 * size, len(content), size)
    return [
        n
        for n in starts
        if content[n : n + 8] == struct.pack("<Q", n // size) and content[n + 10] == kind
    ]


def test_loops_among_pages_end(tmp_path):
    original = GOLDEN["pages_of_512"].tobytes()
    branches, leaves = tree_pages(original, 512, 1), tree_pages(original, 512, 2)
    assert len(branches) > 2 and len(leaves) > 10
    for target in [*branches, leaves[0], leaves[-1]]:
        # All children of all branch pages become this one page.
        content = bytearray(original)
        for page in branches:
            (lower,) = struct.unpack_from("<H", content, page + 12)
            for node in struct.unpack_from(f"<{lower // 2 - 8}H", content, page + 16):
                content[page + node : page + node + 6] = (target // 512).to_bytes(6, "little")
        start = time.perf_counter()
        with pytest.raises(InputError, match="in a loop"):
            [*read_lmdb(write(tmp_path, content))]
        assert time.perf_counter() - start < 1


def test_sub_databases_are_refused(tmp_path):
    content = bytearray(GOLDEN["pages_of_512"].tobytes())
    leaf = tree_pages(content, 512, 2)[0]
    (node,) = struct.unpack_from("<H", content, leaf + 16)
    content[leaf + node + 4] = 2
    with pytest.raises(InputError, match="sub-databases"):
        [*read_lmdb(write(tmp_path, content))]


def array(dtype=b"<f2", shape=b"\x92\x02\x03", data=b"\0" * 12, kind=b""):
    """msgpack of an array (2, 3), all of whose parts can be replaced."""
    items = [b"nd", b"\xc3", b"type", bytes([0xA0 + len(dtype)]) + dtype]
    items += [b"kind", b"\xc4" + bytes([len(kind)]) + kind, b"shape", shape]
    items += [b"data", b"\xc4" + bytes([len(data)]) + data]
    for n in range(0, 10, 2):
        items[n] = b"\xc4" + bytes([len(items[n])]) + items[n]
    return b"\x85" + b"".join(items)


def unpack(content):
    return unpack_msgpack(memoryview(content))[0]


def test_msgpack_items():
    cases = {
        b"\x00": 0,
        b"\x7f": 127,
        b"\xe0": -32,
        b"\xff": -1,
        b"\xc0": None,
        b"\xc2": False,
        b"\xc3": True,
        b"\xcc\xff": 255,
        b"\xcd\x01\x00": 256,
        b"\xce\0\1\0\0": 65536,
        b"\xcf\0\0\0\1\0\0\0\0": 2**32,
        b"\xd0\x80": -128,
        b"\xd1\xff\x00": -256,
        b"\xd2\xff\xff\0\0": -65536,
        b"\xd3" + b"\xff" * 8: -1,
        b"\xca\x3f\x80\0\0": 1.0,
        b"\xcb\x3f\xf0\0\0\0\0\0\0": 1.0,
        b"\xa2ab": b"ab",
        b"\xbf" + b"a" * 31: b"a" * 31,
        b"\xd9\1a": b"a",
        b"\xda\0\1a": b"a",
        b"\xdb\0\0\0\1a": b"a",
        b"\xc4\1a": b"a",
        b"\xc5\0\1a": b"a",
        b"\xc6\0\0\0\1a": b"a",
        b"\x92\1\2": [1, 2],
        b"\xdc\0\2\1\2": [1, 2],
        b"\xdd\0\0\0\2\1\2": [1, 2],
        b"\x9f" + b"\1" * 15: [1] * 15,
        b"\x81\xa1a\1": {b"a": 1},
        b"\xde\0\1\xa1a\1": {b"a": 1},
        b"\xdf\0\0\0\1\xa1a\1": {b"a": 1},
    }
    for content, expected in cases.items():
        assert unpack_msgpack(memoryview(content)) == (expected, len(content)), content


def test_msgpack_arrays():
    values = np.arange(6).reshape(2, 3)
    for dtype in ("<f2", "<f4", "<f8", ">f4", "|u1", "|i1", "<i8"):
        own = values.astype(dtype)
        item = unpack(array(dtype.encode(), data=own.tobytes()))
        assert item.dtype == own.dtype and np.array_equal(item, own)
    assert unpack(array(shape=b"\x92\x00\x03", data=b"")).shape == (0, 3)


@pytest.mark.parametrize(
    "content, text",
    [
        (array(b"|O8"), "nothing is unpickled"),
        (array(b"|O"), "nothing is unpickled"),
        (array(b"|S4"), "numbers are expected"),
        (array(b"f4,f4"), "numbers are expected"),
        (array(shape=b"\x92\x02\x04"), "reshape"),
        (array(shape=b"\x92\x02\x02"), "reshape"),
        (array(data=b"\0" * 11), "multiple"),
        (array()[:-1], "cut off"),
        (b"", "cut off"),
        (b"\x92\1", "cut off"),
        (b"\xdf\xff\xff\xff\xff", "cut off"),
        (b"\xdd\xff\xff\xff\xff\0\0", "cut off"),
        (b"\xc6\xff\xff\xff\xff\0\0", "cut off"),
        (b"\x91" * 5000, "cut off"),
        (b"\x81\xce\x7f\xff\xff\xff\0", "tobytes"),  # a number as a key
        (b"\x81\x90\0", "tobytes"),
        (b"\xc7\1\1a", ""),  # types of others
        (b"\xd6\xff\0\0\0\0", ""),
        (b"\xc1", ""),
    ],
)
def test_msgpack_of_other_kinds_is_refused(content, text):
    with pytest.raises(Exception) as fault:
        unpack(content)
    assert text in str(fault.value)


def mutate(rng, content, size):
    """One to five faults, most of them where the headers and the nodes are."""
    content = bytearray(content)
    for _ in range(rng.integers(1, 6)):
        kind = rng.integers(6)
        page = int(rng.integers(len(content) // size)) * size
        if kind == 0:
            content[rng.integers(len(content))] ^= 1 << rng.integers(8)
        elif kind == 1:
            content[page + rng.integers(40)] = rng.integers(256)
        elif kind == 2:
            content[rng.integers(200)] = rng.integers(256)
        elif kind == 3:
            other = int(rng.integers(len(content) // size)) * size
            content[page : page + size] = content[other : other + size]
        elif kind == 4:
            start = rng.integers(len(content))
            content[start : start + 8] = rng.bytes(8)
        elif kind == 5:
            node = page + int.from_bytes(content[page + 16 : page + 18], "little") % size
            content[min(node + rng.integers(8), len(content) - 1)] = rng.integers(256)
    if rng.random() < 0.1:
        content = content[: rng.integers(len(content))]
    return bytes(content)


def read_damaged(folder, seed):
    """One damaged file is read to its end or to an InputError -> what came of it, seconds."""
    rng = np.random.default_rng(seed)
    name = FILES[seed % len(FILES)]
    size = int.from_bytes(GOLDEN[name][40:44].tobytes(), "little")
    path = write(folder, mutate(rng, GOLDEN[name].tobytes(), size))
    start = time.perf_counter()
    faults = 0
    try:
        for _, _, read in read_uniter({"data.mdb": path}, {}):
            try:
                image = read()
                assert image["features"].nbytes + image["boxes"].nbytes < 1 << 20
            except Exception as fault:  # checked_images makes one line of all of them
                assert not isinstance(fault, (AssertionError, MemoryError, RecursionError)), seed
                faults += 1
        outcome = "some images" if faults else "all images"
    except InputError as fault:
        assert "\n" not in str(fault) and str(path) in str(fault), seed
        outcome = "InputError"
    return outcome, time.perf_counter() - start


def read_many_damaged(folder, seeds):
    """{outcome: how many}, the longest time, how much more memory was taken in MiB."""
    outcomes = {}
    slowest = 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in seeds:
        outcome, seconds = read_damaged(folder, seed)
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
        slowest = max(slowest, seconds)
    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
    return outcomes, slowest, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / unit


def test_damaged_files_are_read_or_refused(tmp_path):
    outcomes, slowest, memory = read_many_damaged(tmp_path, range(60))
    assert outcomes["InputError"] > 5 and slowest < 1 and memory < 200, (outcomes, slowest, memory)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        print(read_many_damaged(Path(place), range(int(sys.argv[1]))))
