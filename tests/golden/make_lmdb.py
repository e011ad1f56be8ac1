"""Makes lmdb.npz beside it: the bytes of small LMDB files, and checksums of what the packages lmdb,
msgpack and msgpack-numpy read of them. Run by hand only, the tests need none of the three:

    pip install lmdb msgpack msgpack-numpy numpy; python tests/golden/make_lmdb.py
    python tests/golden/make_lmdb.py FOLDER ...      prints the checksums of other databases
"""

import hashlib
import io
import json
import struct
import sys
import tempfile
from pathlib import Path

import lmdb
import msgpack
import msgpack_numpy
import numpy as np

rng = np.random.default_rng(15)


def image(count, width=8):
    """An image's arrays as UNITER keeps them, regions by falling score."""
    corners = np.sort(rng.integers(0, 9, (count, 2, 2)) / 8, 1).reshape(count, 4)
    boxes = np.concatenate([corners, corners[:, 2:] - corners[:, :2]], 1)
    features = rng.integers(0, 9, (count, width))
    conf = np.sort(rng.integers(0, 33, count))[::-1] / 32
    arrays = {"norm_bb": boxes, "features": features, "conf": conf, "soft_labels": features[:, :2]}
    return {name: array.astype(np.float16) for name, array in arrays.items()}


def packed(arrays):
    return msgpack.packb(arrays, default=msgpack_numpy.encode, use_bin_type=True)


def zipped(arrays):
    file = io.BytesIO()
    np.savez_compressed(file, **arrays, allow_pickle=True)  # UNITER has such an array by mistake
    return file.getvalue()


def name(i):
    return b"coco_train2014_%012d.npz" % (7 * i + 1)


def one_transaction(env):
    with env.begin(write=True) as writer:
        for i in range(20):
            writer.put(name(i), packed(image(10 + i)))
        writer.put(b"__keys__", json.dumps([name(i).decode() for i in range(20)]).encode())


def in_pieces(env):
    """Deleted and rewritten entries, so that pages are used again and stand in no order."""
    for part in range(8):
        with env.begin(write=True) as writer:
            for i in rng.integers(0, 40, 8).tolist():
                writer.put(name(i), packed(image(10 + i + part)))
            for i in rng.integers(0, 40, 3).tolist():
                writer.delete(name(i))


def compressed(env):
    with env.begin(write=True) as writer:
        for i in range(6):
            writer.put(name(i), zipped(image(36)))


def long_keys(env):
    """A tree of three levels, for a page holds seven keys of that length."""
    for part in range(3):
        with env.begin(write=True) as writer:
            for i in range(part, 150, 3):
                writer.put(b"%04d" % i * 120, b"ab" * (i % 7 * i % 13))


def emptied(env):
    with env.begin(write=True) as writer:
        writer.put(b"key", b"value")
    with env.begin(write=True) as writer:
        writer.delete(b"key")


def write_pages(entries, size):
    """LMDB's bytes for other page sizes than this machine's, which the package cannot write."""
    pages = [None, None]
    level = []  # (lowest key, page) of the level in the making

    def add_page(flags, keys, nodes):
        upper = size - sum(len(node) for node in nodes)
        places = np.cumsum([upper, *map(len, nodes)])[:-1].astype("<u2").tobytes()
        header = struct.pack("<Q2xHHH", len(pages), flags, 16 + len(places), upper)
        level.append((keys[0], len(pages)))
        pages.append((header + places).ljust(upper, b"\0") + b"".join(nodes))

    def add_level(flags, nodes):
        own = []
        for key, node in nodes:
            node += b"\0" * (len(node) % 2)
            if own and 16 + sum(len(other) + 2 for _, other in own) + len(node) + 2 > size:
                add_page(flags, *zip(*own))
                own = []
            own.append((key, node))
        add_page(flags, *zip(*own))

    leaves = []
    for key, value in sorted(entries.items()):
        content, flags = value, 0
        if 8 + len(key) + len(value) > (size - 16) // 2 - 2:
            content, flags = struct.pack("<Q", len(pages)), 1
            count = -(-(16 + len(value)) // size)
            whole = struct.pack("<Q2xHI", len(pages), 4, count) + value
            pages += [whole[n * size :][:size].ljust(size, b"\0") for n in range(count)]
        leaves.append((key, struct.pack("<IHH", len(value), flags, len(key)) + key + content))
    add_level(2, leaves)
    depth = 1
    while len(level) > 1:
        children = level.copy()
        level.clear()
        nodes = []
        for n, (key, page) in enumerate(children):
            inner = key if n else b""  # the first key of a branch page may be missing
            node = struct.pack("<IHH", page & 0xFFFFFFFF, page >> 32, len(inner)) + inner
            nodes.append((key, node))
        add_level(1, nodes)
        depth += 1
    for n in range(2):
        free = struct.pack("<I2xH32xQ", size, 0, 2**64 - 1)
        main = struct.pack("<IHHQQQQQ", 0, 0, depth, 0, 0, 0, len(entries), level[0][1])
        meta = struct.pack("<II8xQ", 0xBEEFC0DE, 1, size * len(pages)) + free + main
        meta = struct.pack("<Q2xH4x", n, 8) + meta + struct.pack("<QQ", len(pages) - 1, 1 + n)
        pages[n] = meta.ljust(size, b"\0")
    return b"".join(pages)


def checksums(folder):
    """Entries, sha256 of all keys and values, sha256 of the arrays of all images, as lmdb, msgpack
    and msgpack-numpy read them."""
    env = lmdb.open(str(folder), readonly=True, lock=False)
    with env.begin() as reader:
        entries = list(reader.cursor())
    env.close()
    raw, arrays = hashlib.sha256(), hashlib.sha256()
    for key, value in entries:
        raw.update(b"%d %s %d " % (len(key), key, len(value)) + value)
        if not key.endswith(b".npz"):
            continue
        if value[:2] == b"PK":
            fields = dict(np.load(io.BytesIO(value)))
        else:
            fields = msgpack.unpackb(value, object_hook=msgpack_numpy.decode)
        for field in ("features", "norm_bb", "conf"):
            array = np.ascontiguousarray(fields[field])
            array = array[:, :4] if field == "norm_bb" else array
            arrays.update(f"{key.decode()} {field} {array.dtype.str} {array.shape} ".encode())
            arrays.update(array.tobytes())
    return len(entries), raw.hexdigest()[:16], arrays.hexdigest()[:16]


def main():
    if sys.argv[1:]:
        for folder in sys.argv[1:]:
            print(folder, checksums(folder))
        return
    files = {}
    for make in (one_transaction, in_pieces, compressed, long_keys, emptied, lambda env: None):
        with tempfile.TemporaryDirectory() as folder:
            env = lmdb.open(folder, map_size=1 << 28)
            make(env)
            env.close()
            files[make.__name__.replace("<lambda>", "empty")] = folder_bytes(folder)
    entries = {name(i): packed(image(10 + 3 * i)) for i in range(9)}
    entries |= {b"%03d" % i * 20: b"x" * (i % 50) for i in range(0, 1000, 5)}
    for size in (512, 1024, 16384, 32768):
        files[f"pages_of_{size}"] = write_pages(entries, size)
    saved = {}
    for title, content in files.items():
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "data.mdb").write_bytes(content)
            sums = checksums(folder)
        print(title, f"{len(content):,} bytes", sums)
        saved[title] = np.frombuffer(content, np.uint8)
        saved[f"{title} sums"] = np.array([str(value) for value in sums])
    np.savez_compressed(Path(__file__).with_name("lmdb.npz"), **saved)


def folder_bytes(folder):
    return Path(folder, "data.mdb").read_bytes()


main()
