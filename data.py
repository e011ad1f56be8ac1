"""The data of TAGS-DC: captions become token ids and phrases, pictures become region features.

    words and word pieces     split_words, WordPiece, build_vocabulary
    region features on disk   write_regions, Regions, open_regions
    data sets and batches     Split, Data
    published features        a generator for each form, a line each in FORMS
    a published data set      load_data
    the embedded world        load_scenes

Letters: B batch, T tokens, P phrases, R regions, F feature size, C captions, I images.
Every mask: True = real. Boxes are x1 y1 x2 y2 as shares of the picture, y down.
"""

import binascii
import contextlib
import functools
import gc
import hashlib
import io
import itertools
import json
import math
import os
import random
import re
import struct
import sys
import time
import unicodedata
import warnings
import zipfile
from collections import Counter, namedtuple
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from torch.nn.utils.rnn import pad_sequence

from generate import parse_phrases


class InputError(ValueError):
    """Bad input. Its text is one line: what is wrong, where, how to mend it."""


def one_line(where, fault, advice):
    """An exception as InputError. The readers of numpy, Pillow, zipfile and base64 raise a dozen
    kinds on damaged files."""
    if isinstance(fault, InputError):
        return fault
    kind = "lacks" if isinstance(fault, KeyError) else type(fault).__name__
    what = str(fault) if type(fault) is ValueError else f"{kind} {fault}"
    text = " ".join(f"{where}: {what[:400]}; {advice}".split())
    return InputError(text.encode("utf-8", "backslashreplace").decode())


@contextlib.contextmanager
def one_line_errors(where, advice):
    """Whatever goes wrong inside becomes an InputError that names the place."""
    try:
        yield
    except Exception as fault:
        raise one_line(where, fault, advice) from None


def write_atomically(path, write):
    """write(path of a part file), which then takes the name: a killed run leaves the old file or
    the new one, never half of one."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def read_lines(path):
    """The lines of a text file; empty ones at its end do not count."""
    with one_line_errors(path, "a text file in UTF-8 is expected"):
        return Path(path).read_text(encoding="utf-8-sig").rstrip("\n").split("\n")


def read_json(path, expected="a whole JSON file is expected"):
    """The content of a JSON file, or InputError."""
    with one_line_errors(path, expected):
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))


# ---- words and word pieces ---------------------------------------------------------------------

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
CJK = re.compile(
    "[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0002a6df\U0002a700-\U0002ceaf\U0002f800-\U0002fa1f]"
)


def is_mark(char):
    """True for what stands as a word by itself: punctuation, symbols, CJK characters."""
    if char.isascii():
        return not char.isalnum()
    return unicodedata.category(char).startswith("P") or bool(CJK.match(char))


def clean(text):
    """Every kind of space becomes a plain one; control characters go, as BERT has it."""
    if text.isascii() and text.isprintable():  # nearly always, and much faster
        return text
    kept = []
    for char in text:
        kind = unicodedata.category(char)
        if char in "\t\n\r" or kind == "Zs":
            kept.append(" ")
        elif not kind.startswith("C") and char != "\ufffd":
            kept.append(char)
    return "".join(kept)


@functools.lru_cache(1 << 18)  # captions repeat their words
def split_chunk(chunk):
    """Text without spaces -> its words and punctuation marks."""
    spaced = [f" {char} " if is_mark(char) else char for char in chunk]
    return tuple("".join(spaced).split())


def split_words(text):
    """Caption -> words and punctuation marks, case kept."""
    return [word for chunk in clean(text).split() for word in split_chunk(chunk)]


@functools.lru_cache(1 << 18)
def uncased(word):
    """A word in lower case without accents, letter by letter as BERT does. It may fall into
    several words, or into none if nothing visible is left of it."""
    letters = unicodedata.normalize("NFD", "".join(char.lower() for char in word))
    return split_chunk("".join(char for char in letters if unicodedata.category(char) != "Mn"))


class WordPiece:
    """BERT's tokenizer: words are cut greedily into the longest known pieces; later pieces of a
    word start with ##.

    vocab: path of a BERT vocab.txt (one token a line, id = line number) or a list of tokens.
    word_range: (first, end) of the ordinary ids; those below are special or [unused].
    """

    def __init__(self, vocab, lowercase):
        self.tokens = vocab if isinstance(vocab, list) else read_lines(vocab)
        self.lowercase = lowercase
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        self.known_words = {}  # word -> ids, filled as words are met
        for token in SPECIALS:
            if token not in self.ids:
                raise InputError(f"{str(vocab)[:99]!r}: lacks {token}; give BERT's vocab.txt")
        self.pad_id = self.ids["[PAD]"]
        self.unk_id = self.ids["[UNK]"]
        self.cls_id = self.ids["[CLS]"]
        self.sep_id = self.ids["[SEP]"]
        self.mask_id = self.ids["[MASK]"]
        special = [token in SPECIALS or token.startswith("[unused") for token in self.tokens]
        self.word_range = ([*special, False].index(False), len(self.tokens))

    def pieces(self, word):
        """One word of split_words -> the ids of its pieces."""
        if word not in self.known_words:
            parts = uncased(word) if self.lowercase else [word]
            self.known_words[word] = [i for part in parts for i in self.longest_match(part)]
        return self.known_words[word]

    def longest_match(self, word):
        """The longest known piece from the left, then the longest of the rest, and so on."""
        ids = []
        start = 0
        while start < len(word):
            prefix = "##" if start else ""
            end = len(word)
            while end > start and prefix + word[start:end] not in self.ids:
                end -= 1
            if end == start or len(word) > 100:
                return [self.unk_id]
            ids.append(self.ids[prefix + word[start:end]])
            start = end
        return ids

    def encode(self, text):
        """Text -> list of ids, without [CLS] and [SEP]."""
        return [i for word in split_words(text) for i in self.pieces(word)]

    def decode(self, ids):
        """Ids -> readable text: pieces joined, [PAD] [CLS] [SEP] dropped."""
        hidden = (self.pad_id, self.cls_id, self.sep_id)
        return " ".join(self.tokens[int(i)] for i in ids if i not in hidden).replace(" ##", "")


def count_words(captions):
    """How often each word occurs, in lower case -> Counter."""
    counts = Counter()
    for chunk, times in Counter(chunk for text in captions for chunk in text.split()).items():
        for word in split_words(chunk):
            for part in uncased(word):
                counts[part] += times
    return counts


def build_vocabulary(captions, min_count):
    """The special tokens, then every word seen min_count times, the frequent first. captions may
    also be what count_words made of them."""
    counts = captions if isinstance(captions, Counter) else count_words(captions)
    frequent = [word for word in counts if counts[word] >= min_count]
    return SPECIALS + sorted(frequent, key=lambda word: (-counts[word], word))


# ---- region features on disk -------------------------------------------------------------------
# Images have different numbers of regions, so their regions lie end to end in two flat files that
# are mapped into memory: COCO's 123,287 images of 36 regions take 18 GB of disk, and no more
# memory than the batch in hand. regions.json, written last, tells which two files count: so a store
# is whole or absent, whether a conversion is killed or two of them run at the same time.


def write_regions(folder, images, source, left_out=()):
    """Streams region features into a folder that `Regions` opens.

    images: iterator of (name, features (R, F), boxes (R, 4)). source: JSON-able, what they came
    from. left_out: list of str, filled while `images` runs: what it left out, kept in the store.
    """
    folder = Path(folder)
    files = f"regions-{os.getpid()}-{random.SystemRandom().getrandbits(32):08x}"
    paths = [folder / f"{files}.f16", folder / f"{files}.f32"]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        with open(paths[0], "wb") as features_file, open(paths[1], "wb") as boxes_file:
            header = stream_regions(images, features_file, boxes_file)
        text = json.dumps(header | {"source": source, "files": files, "left_out": list(left_out)})
        write_atomically(folder / "regions.json", lambda part: part.write_text(text))
        remove_leftovers(folder)
    except BaseException as fault:
        for path in paths:
            with contextlib.suppress(OSError):
                path.unlink()
        if isinstance(fault, OSError):
            raise one_line(folder, fault, "is the disk full or read-only?") from None
        raise


def stream_regions(images, features_file, boxes_file):
    """Writes the two flat files -> the rest of regions.json. Tells how fast it goes."""
    names = []
    counts = []
    start = shown = time.monotonic()
    for name, features, boxes in images:
        features_file.write(features.astype(np.float16).tobytes())
        boxes_file.write(boxes.astype(np.float32).tobytes())
        names.append(name)
        counts.append(len(features))
        now = time.monotonic()
        if now - shown > 5:
            shown = now
            speed = len(names) / (now - start)
            print(f"regions of {len(names):,} images, {speed:.0f} a second", file=sys.stderr)
    if not names:
        raise InputError("not one usable image; the README names the forms that can be read")
    return {"names": names, "counts": counts, "feature_size": features.shape[1]}


def remove_leftovers(folder):
    """Removes what killed or older conversions left: files that regions.json does not name and
    that nobody has written to for ten minutes."""
    named = ""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # none yet, or harmed
        named = json.loads((folder / "regions.json").read_text())["files"]
    for path in [*folder.glob("regions-*-????????.f??"), *folder.glob("regions.json.*.part")]:
        with contextlib.suppress(OSError):  # another run was faster
            if path.stem != named and time.time() - path.stat().st_mtime > 600:
                path.unlink()


class Regions:
    """The memory-mapped features that write_regions made. Raises InputError if they are harmed.

    names: of the images, in the order of the store.
    counts, starts: (I,) how many regions an image has, and which is its first.
    features: (all regions, F) float16. boxes: (all regions, 4) float32.
    """

    def __init__(self, folder):
        with one_line_errors(folder, "delete it, and it is made again"):
            header = json.loads((Path(folder) / "regions.json").read_text())
            self.source = header["source"]
            self.left_out = header["left_out"]
            self.names = header["names"]
            self.feature_size = header["feature_size"]
            self.counts = np.array(header["counts"], np.int64)
            self.starts = np.cumsum(self.counts) - self.counts
            files = str(Path(folder) / header["files"])
            features = np.memmap(f"{files}.f16", np.float16, "r")
            self.features = np.asarray(features).reshape(self.counts.sum(), self.feature_size)
            boxes = np.memmap(f"{files}.f32", np.float32, "r")
            self.boxes = np.asarray(boxes).reshape(len(self.features), 4)
            if len(self.names) != len(self.counts) or self.counts.min() < 1:
                raise ValueError("names and counts do not go together")

    def gather(self, rows):
        """Images by number (B,) -> features (B, R, F), boxes (B, R, 7), mask (B, R).

        R is the most regions of an image in this batch; what is beyond an image's own is 0.
        The seven numbers of a box are x1 y1 x2 y2, width, height and area.
        """
        counts = self.counts[rows]  # (B,)
        steps = np.arange(counts.max(initial=1))  # (R,)
        mask = torch.from_numpy(steps < counts[:, None])  # (B, R)
        # Only the pages of these regions are read. Padding repeats an image's last region.
        index = self.starts[rows][:, None] + np.minimum(steps, counts[:, None] - 1)  # (B, R)
        features = torch.from_numpy(self.features[index]).float()  # (B, R, F)
        corners = torch.from_numpy(self.boxes[index])  # (B, R, 4)
        sides = corners[..., 2:] - corners[..., :2]
        boxes = torch.cat([corners, sides, sides.prod(-1, keepdim=True)], -1)
        features[~mask] = 0
        boxes[~mask] = 0
        return features, boxes, mask


def open_regions(folder, source, make_images, left_out=(), elsewhere=()):
    """The region store in a folder, or elsewhere, in other folders that are only read. Unless one
    has this source, it is made in `folder` of the iterator make_images(), see write_regions."""
    source = json.loads(json.dumps(source))  # tuples become lists, as in the file
    for place in (folder, *elsewhere):
        with contextlib.suppress(InputError):  # none yet, or a harmed one
            regions = Regions(place)
            if regions.source == source:
                return regions
    write_regions(folder, make_images(), source, left_out)
    return Regions(folder)


# ---- data sets and batches ---------------------------------------------------------------------


@dataclass
class Split:
    """Images and captions of train, val or test. Captions of one image stand together."""

    images: list  # names
    rows: np.ndarray  # (I,) number of each image in the region store
    captions: list
    image_of_caption: torch.Tensor  # (C,) long, ascending
    phrases: list = None  # of each caption [[word positions]], or None: parse_phrases finds them
    scenes: list = None  # only in the embedded world: of each image

    def __post_init__(self):
        self.rows = np.asarray(self.rows, np.int64)


@dataclass
class Data:
    """A data set. The methods make batches of CPU tensors; what they find out about a caption is
    kept, since training asks for it again and again."""

    name: str
    tokenizer: WordPiece
    regions: Regions
    splits: dict  # "train", "val", "test"; a data set may lack some
    max_text: int = 64  # longest text in tokens with [CLS] and [SEP]; the rest is cut off
    notes: list = field(default_factory=list)  # what was found, left out or guessed, a line each

    def __post_init__(self):
        self.feature_size = self.regions.feature_size
        self.known_ids = {}  # (split, caption) -> (T,)
        self.known_phrases = {}  # (split, caption) -> (P, T)

    def text(self, split, captions):
        """Captions by number (B,) -> input_ids (B, T) long: [CLS] words [SEP], padded."""
        rows = [self.caption_ids(split, c) for c in np.asarray(captions).tolist()]
        lengths = np.array([len(row) for row in rows])[:, None]  # (B, 1)
        real = np.arange(lengths.max()) < lengths  # (B, T)
        batch = np.full(real.shape, self.tokenizer.pad_id)
        batch[real] = np.concatenate(rows)
        return torch.from_numpy(batch)

    def phrases(self, split, captions):
        """Captions by number (B,) -> (B, P, T) bool: True = the token belongs to the phrase.
        A caption without a single phrase has one of each word (section 3.3)."""
        rows = [self.caption_phrases(split, c) for c in np.asarray(captions).tolist()]
        most, longest = np.max([row.shape for row in rows], 0)
        batch = np.zeros((len(rows), most, longest), bool)
        for b, row in enumerate(rows):
            batch[b, : row.shape[0], : row.shape[1]] = row
        return torch.from_numpy(batch)

    def caption_ids(self, split, c):
        """One caption -> (T,) ids."""
        if (split, c) not in self.known_ids:
            ids = self.tokenizer.encode(self.splits[split].captions[c])[: self.max_text - 2]
            ids = [self.tokenizer.cls_id, *ids, self.tokenizer.sep_id]
            self.known_ids[split, c] = np.array(ids)
        return self.known_ids[split, c]

    def caption_phrases(self, split, c):
        """One caption -> (P, T) bool, which tokens belong to its phrases."""
        if (split, c) not in self.known_phrases:
            content = self.splits[split]
            words = split_words(content.captions[c])
            phrases = content.phrases[c] if content.phrases else None
            if phrases is None:
                phrases = [positions for _, positions in parse_phrases(words)]
            tokens = self.words_to_tokens(words, phrases)
            if not len(tokens):
                tokens = self.words_to_tokens(words, [[n] for n in range(len(words))])
            self.known_phrases[split, c] = tokens
        return self.known_phrases[split, c]

    def words_to_tokens(self, words, phrases):
        """Phrases as word positions -> (P, T) bool; those that are cut off are left out."""
        counts = [len(self.tokenizer.pieces(word)) for word in words]
        word_of_token = np.repeat(np.arange(len(words)), counts)[: self.max_text - 2]
        # [CLS] and [SEP] stand for one more word, which is in no phrase.
        word_of_token = np.concatenate([[len(words)], word_of_token, [len(words)]]).astype(int)
        member = np.zeros((len(phrases), len(words) + 1), bool)  # (P, words + 1)
        for p, positions in enumerate(phrases):
            member[p, positions] = True
        tokens = member[:, word_of_token]  # (P, T)
        return tokens[tokens.any(1)]

    def image(self, split, images):
        """Images by number (B,) -> features (B, R, F), boxes (B, R, 7), region_mask (B, R)."""
        return self.regions.gather(self.splits[split].rows[np.asarray(images)])

    def own_captions(self, split, images):
        """Images by number (B,) -> (B, C, T) ids of all captions of each; rows beyond those of an
        image are padding alone."""
        owner = self.splits[split].image_of_caption.numpy()
        images = np.asarray(images)
        first = np.searchsorted(owner, images, "left")  # (B,)
        counts = np.searchsorted(owner, images, "right") - first  # (B,)
        captions = np.concatenate([np.arange(f, f + n) for f, n in zip(first, counts)])
        own = self.text(split, captions).split(counts.tolist())  # B times (C, T)
        return pad_sequence(own, batch_first=True, padding_value=self.tokenizer.pad_id)


# ---- published features ------------------------------------------------------------------------
# One generator for each form. It takes files {name: path} (name: the path from the folder that was
# searched) and sizes {image_key: (width, height)} from the captions' JSON, and yields for each
# image (name, where, read): where is for error messages, read() gives the arguments of
# check_regions, or raises. A new form needs such a generator and a line in FORMS.

WHOLE = np.array([[0.0, 0.0, 1.0, 1.0]])  # the box of the whole picture
CELLS = [[x / 4, y / 4, (x + 1) / 4, (y + 1) / 4] for y in range(4) for x in range(4)]
LARGEST = 1 << 26  # bytes that the arrays of one image, or a row of a TSV, may take

TSV_COLUMNS = {  # of files without a header, by the number of columns
    6: "id w h num_boxes boxes features".split(),  # bottom-up-attention
    10: "id h w objects_id objects_conf attrs_id attrs_conf num_boxes boxes features".split(),
}  # 10: LXMERT
NPZ_FEATURES = ("features", "x", "feat", "image_features")  # UNITER's name, then others'
NPZ_BOXES = ("norm_bb", "bbox", "boxes")
NPZ_COUNTS = ("num_bb", "num_bbox", "num_boxes")


def check_regions(features, boxes, size=None, conf=None, count=None):
    """What every image must pass -> features (R, F), boxes (R, 4) in 0..1, or ValueError.

    size: (width, height) where boxes are in pixels. conf: (R,) scores, by which the 10 to 100 best
    regions are kept (section 3.1, as UNITER). count: how many regions there should be.
    """
    regions = len(features) if features.ndim == 2 and features.size else 0
    if not regions or (count is not None and count != regions):
        raise ValueError(f"features has shape {features.shape}, num_bb says {count}")
    check_array("features", features, features.shape)
    check_array("boxes", boxes, (regions, 4))
    boxes = boxes.astype(np.float32)
    if size is not None:
        width, height = (float(side) for side in size)
        if not (0 < width < 1e6 and 0 < height < 1e6):
            raise ValueError(f"width {width:g} and height {height:g} are no picture's")
        boxes = boxes / np.float32([width, height, width, height])
    # Up to a per cent outside is rounding, and is clipped.
    wrong = (boxes < -0.01) | (boxes > 1.01) | (boxes < boxes[:, [0, 1, 0, 1]])
    if wrong.any():
        n = wrong.any(1).argmax()
        text = f"x1 y1 x2 y2 = {np.round(boxes[n], 3).tolist()} of width and height"
        raise ValueError(f"box {n} is outside its image or inside out: {text}")
    if conf is not None:
        # UNITER keeps what its detector is sure of: a score above 0.2, but 10 to 100 regions.
        check_array("conf", conf, (regions,))
        kept = min(max(int((conf > 0.2).sum()), 10), 100)
        best = np.sort(np.argsort(-conf, kind="stable")[:kept])
        features, boxes = features[best], boxes[best]
    return features, boxes.clip(0, 1)


def check_array(name, array, shape):
    """Raises ValueError unless it has numbers that float16 can hold, and that shape."""
    if array.shape != shape or array.dtype.kind not in "fiu":
        raise ValueError(f"{name} has shape {array.shape} of {array.dtype}; {shape} is expected")
    if not np.isfinite(array).all() or abs(array).max() > 65504:
        raise ValueError(f"{name} is not finite in float16")


def read_tsv(files, sizes):
    """Bottom-up-attention's files, original or LXMERT's: a row an image, boxes in pixels. A
    header, where there is one, tells the order of the columns."""
    for path in files.values():
        header = None
        with open(path, "rb") as file:
            lines = iter(functools.partial(file.readline, LARGEST), b"")
            for number, line in enumerate(lines, 1):
                fields = line.decode("utf-8-sig", "replace").rstrip("\r\n").split("\t")
                if "features" in fields:
                    header = [re.sub("^(image|img)_", "", field.strip()) for field in fields]
                elif fields != [""]:
                    columns = header or TSV_COLUMNS.get(len(fields), ["id"])
                    name = dict(zip(columns, fields)).get("id", "?")
                    where = f"{path} row {number} (image {name[:60]})"
                    yield image_key(name), where, functools.partial(read_tsv_row, columns, fields)


def read_tsv_row(columns, fields):
    """One image: fields of text, arrays in base64."""
    if len(columns) != len(fields):
        raise ValueError(f"{len(fields)} columns; as many as a header has, or 6 or 10 are expected")
    row = dict(zip(columns, fields))
    count = int(row["num_boxes"])
    arrays = {"size": (row["w"], row["h"])}
    for name, width in (("boxes", 4), ("features", None), ("objects_conf", 1)):
        if name in row:
            data = binascii.a2b_base64(row[name] + "==")  # a field that is cut off is too short
            whole = count > 0 and len(data) > 0 and len(data) % (4 * count) == 0
            if not whole or width not in (None, len(data) // (4 * count)):
                text = f"{len(data):,} bytes, not as many as num_boxes {count} needs"
                raise ValueError(f"{name} has {text}")
            arrays[name.split("_")[-1]] = np.frombuffer(data, "<f4").reshape(count, -1)
    if "conf" in arrays:
        arrays["conf"] = arrays["conf"][:, 0]
    return arrays


def read_npz(files, sizes):
    """A file an image, as UNITER's extractor and others write it."""
    for name, path in files.items():
        yield name, path, functools.partial(read_npz_image, path, sizes.get(image_key(name)))


def read_npz_image(file, size):
    """file: path or open file. size: (width, height) by the captions' JSON, or None."""
    row = read_npz_arrays(file)
    features = first_of(row, NPZ_FEATURES)
    boxes = first_of(row, NPZ_BOXES)
    if features is None or (boxes is None and "features" in row):
        wanted = f"wanted is one of {', '.join(NPZ_FEATURES)} and one of {', '.join(NPZ_BOXES)}"
        raise ValueError(f"has the arrays {', '.join(row)[:200]}; {wanted}")
    if boxes is None:
        boxes = WHOLE.repeat(len(features), 0)  # of other people's, as of SCAN's arrays
    if boxes.ndim != 2 or boxes.shape[1] not in (4, 6, 7):
        raise ValueError(f"norm_bb or bbox has shape {boxes.shape}; 4, 6 or 7 columns are expected")
    if "x" in row and len(features) != len(boxes):
        features = features.T  # OpenVQA's files have a column a region
    count = first_of(row, NPZ_COUNTS)
    return {
        "features": features,
        "boxes": boxes[:, :4],
        "size": pixel_size(row, boxes, size),
        "conf": row.get("conf"),
        "count": len(features) if count is None else count.item(),
    }


def pixel_size(row, boxes, size):
    """(width, height) of the picture if its boxes are in pixels, else None."""
    if row.get("norm_bb") is not None or not boxes.max(initial=0) > 1.01:
        return None
    if row.get("image_w") is not None and row.get("image_h") is not None:
        return row["image_w"].item(), row["image_h"].item()
    if size is None:
        raise ValueError("bbox is in pixels; image_w, image_h or the size in the JSON are missing")
    return size


def first_of(row, names):
    """The array of the first of these names that there is, or None."""
    return next((row[name] for name in names if row.get(name) is not None), None)


def read_npz_arrays(file):
    """{name: array} of an npz; None for those that are of no use here. Headers are checked before
    memory is taken, and nothing is unpickled."""
    useful = (*NPZ_FEATURES, *NPZ_BOXES, *NPZ_COUNTS, "conf", "image_w", "image_h")
    row = {}
    with zipfile.ZipFile(file) as archive:
        if sum(member.file_size for member in archive.infolist()) > LARGEST:
            raise ValueError(f"unpacks to more than {LARGEST:,} bytes")
        for member in archive.infolist():
            name = member.filename.removesuffix(".npy")
            row[name] = None
            if name in useful:
                with archive.open(member) as array:
                    row[name] = read_npy(array, name, member.file_size)
    return row


def read_npy(file, name, file_size):
    """The array of an open npy of that size."""
    if np.lib.format.read_magic(file) == (1, 0):
        shape, by_column, dtype = np.lib.format.read_array_header_1_0(file)
    else:
        shape, by_column, dtype = np.lib.format.read_array_header_2_0(file)
    size = math.prod(shape) * dtype.itemsize
    if dtype.hasobject:
        raise ValueError(f"{name} is pickled, which may run any program; save plain arrays")
    if not 0 <= size <= file_size:
        raise ValueError(f"{name} is cut off, or no array of shape {shape}")
    return np.frombuffer(file.read(size), dtype).reshape(shape, order="F" if by_column else "C")


def read_arrays(files, sizes):
    """SCAN's *_ims.npy (images, regions, features). They have no boxes: every region gets the
    whole picture's."""
    for path in files.values():
        names, array = open_array(path)
        boxes = WHOLE.repeat(array.shape[1], 0)
        for i, name in enumerate(names):
            yield name, f"{path} image {i}", functools.partial(dict, features=array[i], boxes=boxes)


def open_array(path):
    """A *_ims.npy -> the names of its images, by *_names.txt or by number, and the array."""
    with one_line_errors(path, "save it again as a plain array (images, regions, features)"):
        array = np.lib.format.open_memmap(path, mode="r")
        if array.ndim != 3 or array.size == 0:
            raise ValueError(f"shape {array.shape}; 3 dimensions, none of them 0, are expected")
        listed = beside(path, "_names.txt")
        split = listed.name.removesuffix("_names.txt")
        names = [f"{split}_{i:06d}" for i in range(len(array))]
        if listed.exists():
            names = read_lines(listed)
        if len(names) != len(array):
            raise ValueError(f"{len(array)} images, but {len(names)} names in {listed.name}")
    return names, array


def beside(path, ending):
    """train_ims.npy -> train_caps.txt, train_names.txt."""
    return Path(str(path).removesuffix("_ims.npy") + ending)


def read_pictures(files, sizes):
    """Plain pictures: cells of a grid instead of a detector. Weak, but it runs from nothing but
    the pictures."""
    for name, path in files.items():
        yield name, path, functools.partial(read_picture, path)


def read_picture(path):
    """A picture file of any kind -> features and boxes of the whole and of 4 x 4 cells."""
    boxes = np.concatenate([WHOLE, CELLS])
    with Image.open(path, formats=("JPEG", "PNG", "WEBP", "GIF", "BMP")) as picture:
        width, height = picture.size
        if width * height > Image.MAX_IMAGE_PIXELS:
            raise ValueError(f"{width} x {height} pixels are too many; make it smaller")
        return {"features": describe_crops(upright_rgb(picture), boxes), "boxes": boxes}


def upright_rgb(picture):
    """Turned as its camera says, 16 bits of grey brought to 8, what is transparent white."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):
        grey = np.asarray(picture).astype(np.float32) / 257
        picture = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


# ---- UNITER's image databases ------------------------------------------------------------------
# An LMDB file is a sorted tree of pages of one size; page n begins at byte n * size. Fields with
# their bytes, little-endian, - for what no reader needs:
#     each page     number 8, - 2, flags 2 (1 branch, 2 leaf), lower 2, - 2
#     meta page     header 16, magic 4, version 4, - 16, page size 4, - 50, depth 2, - 24,
#                   entries 8, root 8, - 8, transaction 8. Pages 0 and 1; the later one counts
#     branch, leaf  header 16, place of each node in the page 2 ... up to lower, free bytes, nodes
#     node          value's size 4, flags 2, key's size 2, key, value (if flags are 1 the number 8
#                   of its overflow page). A branch has the child's number 6, key's size 2, key
#     overflow      header 16, then the value, on through the next pages, which have no header
# Only the main tree is read: no named sub-databases, no several values of one key.
META_PAGE = struct.Struct("<16xII16xI50xH24xQQ8xQ")


def read_lmdb(path):
    """Yields (key bytes, value as a view of the file) in the order of the keys. A value that lies
    outside of the file is short. Raises InputError if the tree is damaged; it never runs round."""
    with one_line_errors(path, "unpack or copy it again"):
        file = memoryview(np.memmap(path, np.uint8, "r"))
        head = file[: 1 << 16].tobytes().ljust(1 << 16)
        sizes = [1 << n for n in range(8, 16) if 2 << n <= len(file)]
        metas = [META_PAGE.unpack_from(head, start) for start in (0, *sizes)]  # page 1 is a size on
        metas = [meta for meta in metas if meta[:2] == (0xBEEFC0DE, 1) and meta[2] in sizes]
        if not metas:
            raise ValueError("no LMDB file of version 1, or cut off")
        *_, size, depth, entries, root, _ = max(metas, key=lambda meta: meta[-1])
        last = b""
        tree = walk(file, size, root, min(depth, 32)) if depth else []
        for key, value in tree:
            if key <= last:
                raise ValueError(f"key {key} after {last}: its page is damaged, or in a loop")
            yield key, value
            last = key
            entries -= 1
        if entries:
            raise ValueError(f"its meta page tells of {entries} entries more than there are")


def walk(file, size, number, depth):
    """Yields (key, value) below a page. depth: levels of pages from here, 1 is a leaf."""
    page = file[number * size : (number + 1) * size]
    if len(page) < size:
        raise ValueError(f"page {number} is outside the file's {len(file) // size}; is it cut off?")
    own_number, kind, lower = struct.unpack_from("<Q2xHH", page)
    if own_number != number or not kind & (2 if depth == 1 else 1) or lower < 18:
        raise ValueError(f"page {number} is none of level {depth}: it is damaged, or in a loop")
    for place in struct.unpack_from(f"<{lower // 2 - 8}H", page, 16):
        length, flags, key_size = struct.unpack_from("<IHH", page, place)
        start = place + 8 + key_size
        if depth > 1:
            yield from walk(file, size, length + (flags << 32), depth - 1)
        elif flags > 1:
            raise ValueError("named sub-databases and several values of one key are not read")
        else:
            value = page[start : start + length]
            if flags == 1:
                first = int.from_bytes(page[start : start + 8], "little") * size + 16
                value = file[first : first + length]
            yield bytes(page[place + 8 : start]), value


# msgpack by its first byte: number, bytes or text, array, map or what is not read here; the number
# or length that the byte holds itself; else how struct calls the number or length that follows.
TYPES = "n" * 128 + "m" * 16 + "a" * 16 + "b" * 32 + "n?nnbbb???nnnnnnnnnn?????bbbaamm" + "n" * 32
HELD = [*range(128), *range(16), *range(16), *range(32), None, None, False, True]
HELD += [None] * 28 + [*range(-32, 0)]
LETTERS = " " * 192 + "    BHI   fdBHIQbhiq     BHIHIHI" + " " * 32


def unpack_msgpack(data, start=0, depth=0):
    """The item at a byte of data, inside of `depth` others -> the item, the byte after it. Bytes
    and text stay views of data, and so are the arrays, which msgpack-numpy writes as maps."""
    if start == len(data) or depth > 8:
        raise ValueError(f"ends at byte {start}, {depth} levels deep; is it cut off?")
    kind, number, letter = (table[data[start]] for table in (TYPES, HELD, LETTERS))
    start += 1
    if letter != " ":
        (number,) = struct.unpack_from(f">{letter}", data, start)
        start += struct.calcsize(letter)
    if kind == "n":
        return number, start
    if kind == "?" or number > len(data) - start:
        raise ValueError(f"length {number} at byte {start} of {len(data)}; cut off, or no numbers?")
    if kind == "b":
        return data[start : start + number], start + number
    items = []
    for _ in range(2 * number if kind == "m" else number):
        item, start = unpack_msgpack(data, start, depth + 1)
        items.append(item)
    return unpack_map(items) if kind == "m" else items, start


def unpack_map(items):
    """[key, value, key, value ...] -> the array for which msgpack-numpy wrote them, or a dict."""
    fields = {key.tobytes(): value for key, value in zip(items[::2], items[1::2])}
    if b"nd" not in fields:
        return fields
    dtype = fields[b"type"].tobytes().decode()
    if not re.fullmatch("[<>|][fiub][1248]", dtype):
        raise ValueError(f"an array of type {dtype}; numbers are expected, nothing is unpickled")
    return np.frombuffer(fields[b"data"], dtype).reshape(fields.get(b"shape", []))


def read_uniter(files, sizes):
    """UNITER's image databases: folders feat_th0.2_max100_min10, all_compressed and the like."""
    paths = [Path(path) for path in files.values()]
    image_paths = [path for path in paths if not path.with_name("id2len.json").exists()]
    if not image_paths:
        raise InputError(f"{paths[0]} has texts: captions are read from Karpathy's JSON instead")
    for path in image_paths:
        folder = path.parent
        listed = [*folder.glob("nbb_*.json"), *folder.parent.glob("nbb_*.json")]
        listed.sort(key=lambda path: path.stem[4:] not in folder.name)
        counts = read_json(listed[0]) if listed else {}
        for key, value in read_lmdb(path):
            name = key.decode(errors="replace")
            if name != "__keys__":
                read = functools.partial(read_uniter_image, value, counts.get(name))
                yield name, f"{path} key {name[:60]}", read


def read_uniter_image(value, count):
    """The npz or msgpack of one image. count: of its regions; None: as check_regions finds it."""
    if value[:2] == b"PK":
        image = read_npz_image(io.BytesIO(value), None)
    else:
        arrays, end = unpack_msgpack(value)
        if end < len(value) or not {b"features", b"norm_bb"} <= arrays.keys():
            raise ValueError("no msgpack of features and norm_bb; texts come from Karpathy's JSON")
        image = {"features": arrays[b"features"], "boxes": arrays[b"norm_bb"][:, :4]}
        image["conf"] = arrays.get(b"conf")
    if count is not None:
        image = {name: image[name][:count] for name in ("features", "boxes")}
        image["count"] = count
    return image


Form = namedtuple("Form", "name endings reader")
FORMS = [  # of all that lies in a folder, the first form of this list is taken
    Form("tsv", (".tsv",), read_tsv),
    Form("npz", (".npz",), read_npz),
    Form("uniter", ("data.mdb",), read_uniter),
    Form("arrays", ("_ims.npy",), read_arrays),
    Form("pictures", (".jpg", ".jpeg", ".png", ".webp"), read_pictures),
]


# ---- a published data set ----------------------------------------------------------------------
# What lies under --root is recognised by its file names: first the region features, then the
# captions that go with them. Whatever is wrong ends the run with one line that says where.

NOTHING = (
    "expected are dataset_coco.json or dataset_flickr30k.json (Karpathy's caption_datasets.zip), "
    "and one of: *.tsv (bottom-up-attention, LXMERT), a folder of *.npz (UNITER's extractor), "
    "data.mdb (UNITER's image databases), "
    "*_precomp/ (SCAN's *_ims.npy and *_caps.txt; needs no JSON), images/ (pictures). The smallest "
    "that does: the JSON and images/. Hidden folders, tests and runs are not searched"
)
KARPATHY = (
    'Karpathy\'s form {"images": [{"filename", "split", "sentences": [{"raw"}]}]} is expected'
)
PHRASES = 'a list of {"caption", "tokens", "phrases": [{"tokens": [indices]}]} is expected'
SKIP = "mend it, or pass --skip-bad to leave it out"
SPLITS = {"restval": "train", "dev": "val", "valid": "val", "validation": "val", "testall": "test"}

PREFIX = re.compile(r"((coco_)?(train|val|test)20\d\d_|coco_|flickr(8|30)k_)?")
ENDING = re.compile(r"(\.(jpe?g|png|webp|np[yz]))*$")
# Files and folders that are no data of the user's: programs, tests, our own runs and pictures.
ASIDE = re.compile(r"\..*|site-packages|node_modules|tests|runs|(negatives|search|curves)\.png")
RUN_OR_PROGRAM = ("log.csv", "last.pt", "pyvenv.cfg")

# An image with captions. path: with its folder. key: its image_key.
Listed = namedtuple("Listed", "where split name path key cocoid size captions")


class Faults:
    """What is wrong with single images: the first fault ends the run, unless they are skipped."""

    def __init__(self, skip_bad):
        self.skip_bad = skip_bad
        self.left_out = []  # a line each

    @contextlib.contextmanager
    def of(self, where):
        """For what is done with one image."""
        try:
            yield
        except Exception as fault:
            error = one_line(where, fault, SKIP)
            if not self.skip_bad:
                raise error from None
            self.left_out.append(str(error).removesuffix(f"; {SKIP}"))


def image_key(name):
    """What the names of one picture share: COCO_val2014_000000391895.jpg, 391895.npz -> 391895."""
    stem = str(name)[-300:].lower().replace("\\", "/").rpartition("/")[2]
    stem = stem[PREFIX.match(stem).end() : ENDING.search(stem).start()]
    return (stem.lstrip("0") or "0") if stem.isdecimal() else stem


def find_features(place, anywhere):
    """The first of FORMS that lies in a folder (or is the file `place`) -> (form, {name: path}).
    Pictures count in a folder *images or *train2014 and the like only, unless anywhere is set."""
    files = list_files(place)
    for form in FORMS:
        found = {name: path for name, path in files.items() if name.lower().endswith(form.endings)}
        for name in list(found):
            stray = form.reader is read_pictures and not re.search(r"(images|\w20\d\d)/", name)
            if stray and not anywhere:
                del found[name]
            if name.endswith("testall_ims.npy"):  # of which test is a part
                found.pop(name.replace("testall", "test"), None)
        if found:
            return form, found
    return None, {}


def list_files(place):
    """The files below a folder that may be data -> {path from there: path}, sorted."""
    if os.path.isfile(place):
        return {os.path.basename(place): str(place)}
    files = {}
    visited = set()
    for folder, inner, names in os.walk(place, followlinks=True):
        again = os.path.realpath(folder) in visited  # by a link
        visited.add(os.path.realpath(folder))
        if again or (folder != str(place) and not set(names).isdisjoint(RUN_OR_PROGRAM)):
            inner.clear()
            continue
        inner[:] = [name for name in inner if not ASIDE.fullmatch(name)]
        start = os.path.relpath(os.path.join(folder, "_"), place)[:-1].replace(os.sep, "/")
        for name in names:
            path = os.path.join(folder, name)
            if not ASIDE.fullmatch(name) and os.path.isfile(path):
                files[start + name] = path
    return dict(sorted(files.items()))


def find_listings(name, root, form, files):
    """The files with the captions of these features: Karpathy's JSON, which is `name` itself or
    lies in root, or SCAN's *_caps.txt. Raises InputError if there are none."""
    listing = Path(name)
    if listing.suffix.lower() != ".json":
        wanted = f"dataset_{name}"  # the name itself, else one that begins so, else any
        found = sorted(root.glob("dataset_*.json"))
        found.sort(key=lambda path: (path.stem != wanted, not path.stem.startswith(wanted)))
        listing = found[0] if found else root / f"{wanted}.json"
    if form.reader is read_arrays:
        if len({os.path.dirname(path) for path in files.values()}) > 1:
            raise InputError(f"{root}: several folders of *_ims.npy; name one with --features")
        # SCAN's own captions go with its arrays, unless the images of these have names.
        named = all(beside(path, "_names.txt").exists() for path in files.values())
        if not (named and listing.is_file()):
            return [beside(path, "_caps.txt") for path in files.values()]
    if not listing.is_file():
        raise InputError(f"{listing}: no such file; {NOTHING}")
    return [listing]


def read_captions(paths, faults):
    """The images of Karpathy's JSON, or of several *_caps.txt -> [Listed]."""
    listed = []
    for path in paths:
        images = read_karpathy(path) if path.suffix.lower() == ".json" else read_scan_captions(path)
        for i, image in enumerate(images):
            name = image.get("filename") if isinstance(image, dict) else image
            where = f"{path} image {i} ({str(name)[:60]})"
            with faults.of(where):
                listed.append(parse_image(where, image))
    return listed


def read_karpathy(path):
    """Karpathy's JSON -> its list of images, as they stand there."""
    content = read_json(path, KARPATHY)
    if isinstance(content, dict) and "annotations" in content:
        own = "this is COCO's own annotation file, which has no splits"
        raise InputError(f"{path}: {own}; give Karpathy's dataset_coco.json (caption_datasets.zip)")
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise InputError(f"{path}: {KARPATHY}")
    return content["images"]


def read_scan_captions(path):
    """SCAN's *_caps.txt, five lines for each image of *_ims.npy -> images in Karpathy's form."""
    lines = read_lines(path)
    split = path.name.removesuffix("_caps.txt")
    names, _ = open_array(path.with_name(f"{split}_ims.npy"))
    if len(lines) != 5 * len(names):
        found = f"{len(lines)} lines, {lines.count('')} of them empty, for {len(names)} images"
        raise InputError(f"{path}: {found}; five each are expected")
    images = []
    for i, name in enumerate(names):
        sentences = [{"raw": line} for line in lines[5 * i : 5 * i + 5]]
        images.append({"filename": name, "split": split, "sentences": sentences})
    return images


def parse_image(where, image):
    """One image of Karpathy's form -> Listed with its first five captions, or some error."""
    name = str(image["filename"] if "filename" in image else image["cocoid"])
    path = "/".join([str(image["filepath"]), name] if image.get("filepath") else [name])
    path = path.replace("\\", "/")
    if re.match(r"/|\w:", path) or ".." in path.split("/"):
        raise ValueError(f"filename {path!r} leaves the root; give a name below it")
    split = image["split"].lower()
    split = SPLITS.get(split, split)
    if split not in ("train", "val", "test"):
        raise ValueError(f"split {split!r}; known are train, val, test, {', '.join(SPLITS)}")
    captions = [caption_text(sentence) for sentence in image["sentences"][:5]]
    if "" in captions or not captions:
        raise ValueError("sentences: no caption, or an empty one")
    size = (image.get("width"), image.get("height"))
    cocoid = image.get("cocoid", name)
    return Listed(where, split, name, path, image_key(name), cocoid, size, captions)


def caption_text(sentence):
    """A sentence of Karpathy's form -> its text with plain spaces; "" if nothing is visible."""
    text = " ".join((sentence.get("raw") or " ".join(sentence.get("tokens", ()))).split())
    return text if text.isprintable() or split_words(text) else ""


def picture_sizes(listed):
    """{image_key: (width, height)} where the JSON has them, and no two pictures share a key."""
    sizes = {}
    for image in listed:
        same = sizes.get(image.key, image.size) == image.size
        sizes[image.key] = image.size if same else (None, None)
    return {key: size for key, size in sizes.items() if None not in size}


def load_regions(form, files, sizes, place, skip_bad, store, elsewhere):
    """The region store of these files, made first unless one of the same files is there."""
    faults = Faults(skip_bad)
    paths = list(files.items())
    if form.reader is read_arrays:
        listed = [(name, beside(path, "_names.txt")) for name, path in paths]
        paths += [(name, path) for name, path in listed if path.exists()]
    with one_line_errors(place, "files that can be read are expected"):
        stats = [(name, os.stat(path)) for name, path in paths]
    stats = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    digest = hashlib.sha256(json.dumps([stats, sizes]).encode()).hexdigest()
    source = {"form": form.name, "place": os.path.abspath(place), "digest": digest}

    def make_images():
        return checked_images(form.reader(files, sizes), place, faults)

    regions = open_regions(store, source, make_images, faults.left_out, elsewhere)
    if regions.left_out and not skip_bad:
        raise InputError(f"{regions.left_out[0]}; {SKIP}")
    return regions


def checked_images(entries, place, faults):
    """What a reader yields -> (name, features, boxes) for write_regions; of one name the first."""
    names = set()
    width = None
    with one_line_errors(place, "files that can be read are expected"):
        for name, where, read in entries:
            with faults.of(where):
                if name not in names:
                    features, boxes = check_regions(**read())
                    width = width or features.shape[1]
                    if features.shape[1] != width:
                        raise ValueError(f"features are {features.shape[1]} wide, not {width}")
                    yield name, features, boxes
                    names.add(name)
    if not names:
        first = "".join(faults.left_out[:1])
        raise InputError(
            f"{place}: not one usable image; left out {len(faults.left_out):,}: {first}"
        )


def match_images(listed, names, place, faults):
    """Finds for each image with captions its regions -> [(Listed, row in the store)].

    names: of the images in the store. Base names will do (image_key) where they are unique, among
    the captions and in the store; otherwise the folders must agree, too.
    """
    rows_of = {}  # image_key -> rows in the store
    for row, name in enumerate(names):
        rows_of.setdefault(image_key(name), []).append(row)
    folders_of = {}  # image_key -> folders in the captions' JSON
    for image in listed:
        folders_of.setdefault(image.key, set()).add(image.path.rpartition("/")[0])
    matched = []
    taken = {}  # row -> name
    for image in listed:
        with faults.of(image.where):
            rows = rows_of.get(image.key) or rows_of.get(image_key(image.cocoid), [])
            if len(rows) > 1 or len(folders_of[image.key]) > 1:
                rows = same_path(image.path, rows, names)
            if not rows:
                raise ValueError(f"captions without features: no {image.path} in {place}")
            if len(rows) > 1:
                both = f"{names[rows[0]]} and {names[rows[1]]}"
                raise ValueError(f"{both} both fit; tell which by the folder in filename")
            if rows[0] in taken:
                raise ValueError(f"{image.path} occurs twice, before as {taken[rows[0]]}")
            taken[rows[0]] = image.path
            matched.append((image, rows[0]))
    return matched


def same_path(path, rows, names):
    """The rows whose name ends in that path; if there are none, in its folder and image_key."""

    def by_key(name):
        return f"{os.path.dirname(name)}/{image_key(name)}"

    exact = [row for row in rows if f"/{names[row].removesuffix('.npz')}".endswith(f"/{path}")]
    return exact or [row for row in rows if f"/{by_key(names[row])}".endswith(by_key(f"/{path}"))]


def make_splits(matched, phrases):
    """[(Listed, row in the store)] -> {split: Split}. phrases: {caption: [[word positions]]}."""
    splits = {}
    for name in ("train", "val", "test"):
        own = [(image, row) for image, row in matched if image.split == name]
        if own:
            captions = [caption for image, _ in own for caption in image.captions]
            counts = torch.tensor([len(image.captions) for image, _ in own])
            splits[name] = Split(
                images=[image.name for image, _ in own],
                rows=[row for _, row in own],
                captions=captions,
                image_of_caption=torch.arange(len(own)).repeat_interleave(counts),
                phrases=[phrases.get(caption) for caption in captions],
            )
    return splits


def read_phrases(path):
    """--phrases FILE: [{"caption", "tokens", "phrases": [{"tokens": [indices]}]}] -> {caption:
    [[positions in split_words(caption)]]}."""
    table = {}
    entries = read_json(path, PHRASES)
    with one_line_errors(path, PHRASES):
        for i, entry in enumerate(list(entries)):
            with one_line_errors(f"{path} entry {i}", PHRASES):
                caption = " ".join(entry["caption"].split())
                groups = [set(phrase["tokens"]) for phrase in entry["phrases"]]
                table[caption] = match_tokens(split_words(caption), entry["tokens"], groups)
    return table


def match_tokens(words, tokens, groups):
    """Groups of tokens -> of words. The file may cut words otherwise than split_words (can't: ca
    n't, or can ' t), so tokens and words are matched by their letters."""
    token_of_letter = [t for t, token in enumerate(tokens) for _ in "".join(split_words(token))]
    word_of_letter = [w for w, word in enumerate(words) for _ in word]
    if len(token_of_letter) != len(word_of_letter):
        raise ValueError("tokens do not spell the caption")
    if not set().union(*groups) <= set(range(len(tokens))):
        raise ValueError("phrases point beyond the tokens")
    phrases = []
    for group in groups:
        found = {w for w, t in zip(word_of_letter, token_of_letter) if t in group}
        phrases.append(sorted(found))
    return [positions for positions in phrases if positions]


def find_tokens(root, splits, min_count, notes):
    """The vocabulary: vocab.txt in root, else words of the training captions seen min_count times,
    or less where that leaves fewer than half of what is written. Notes what it took."""
    if (root / "vocab.txt").exists():
        return read_lines(root / "vocab.txt")
    if "train" not in splits:
        found = f"{root}: no training captions to find words in"
        raise InputError(f"{found}; put BERT's vocab.txt there, or give a checkpoint")
    counts = count_words(splits["train"].captions)
    count = min_count
    while count > 1 and 2 * sum(n for n in counts.values() if n >= count) < counts.total():
        count -= 1
    if count < min_count:
        notes.append(f"few captions: words seen {count} times or more are known, not {min_count}")
    return build_vocabulary(counts, count)


@contextlib.contextmanager
def quiet_reading():
    """No warnings: numpy and Pillow warn of what check_regions refuses. And no garbage collector,
    whose walks over millions of captions took three quarters of the time."""
    gc.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        gc.enable()


def load_data(
    name,
    root=None,
    features=None,
    phrases=None,
    skip_bad=False,
    tokens=None,
    feature_size=None,
    store="data",
    elsewhere=(),
    min_count=3,
    max_text=64,
):
    """A published data set in whatever form lies under root -> Data. Raises InputError.

    name: "coco", "flickr30k", or the path of a JSON of Karpathy's form (root: its folder).
    features: file or folder of the region features, if not below root.
    phrases: JSON file instead of parse_phrases.
    skip_bad: leave out what cannot be used, counted in Data.notes.
    tokens, feature_size: of a checkpoint; without tokens see find_tokens.
    store: folder for the converted features, used again while their source is the same.
    elsewhere: other folders where they may lie, which are only read.
    """
    root = Path(root or (Path(name).parent if str(name).lower().endswith(".json") else "."))
    place = Path(features or root)
    faults = Faults(skip_bad)
    with quiet_reading():
        form, files = find_features(place, anywhere=bool(features))
        if not files:
            raise InputError(f"{place}: no region features for {name} here; {NOTHING}")
        listings = find_listings(str(name), root, form, files)
        listed = read_captions(listings, faults)
        regions = load_regions(
            form, files, picture_sizes(listed), place, skip_bad, store, elsewhere
        )
    if feature_size not in (None, regions.feature_size):
        found = f"{place}: features are {regions.feature_size} wide"
        raise InputError(f"{found}, the checkpoint's are {feature_size}; give its --features")

    matched = match_images(listed, regions.names, place, faults)
    if not matched:
        raise InputError(f"{listings[0]}: no image has both captions and features in {place}")
    splits = make_splits(matched, read_phrases(phrases) if phrases else {})
    notes = [f"captions from {listings[0]}, regions from {place} ({form.name})"]
    notes += notes_of(splits, regions, phrases, faults.left_out)
    tokens = tokens or find_tokens(root, splits, min_count, notes)
    cased = any(re.match("(##)?[A-Z]", token) for token in tokens)
    return Data(str(name), WordPiece(tokens, not cased), regions, splits, max_text, notes)


def notes_of(splits, regions, phrases, left_out):
    """What the user should know of the data, a line each."""
    notes = []
    if phrases:
        found = [own is not None for split in splits.values() for own in split.phrases]
        notes.append(f"phrases of {sum(found):,} of {len(found):,} captions from {phrases}")
    if (regions.boxes[:1000] == WHOLE).all():
        notes.append("the regions have no boxes: each gets that of the whole picture")
    for what, lines in (("regions", regions.left_out), ("captions", left_out)):
        if lines:
            notes.append(f"{what}: left out {len(lines):,} images, the first: {lines[0]}")
    return notes


# ---- the embedded world ------------------------------------------------------------------------
# Pictures of two to four drawn things, captions by a grammar of one sentence, and an exact oracle,
# which training never sees:
#     describes("a small red star above a blue ring", scene) -> True, False or None
# In val and test pictures come in families of near-twins, so that ranking turns on single words.

COLOURS = {
    "red": (222, 45, 45),
    "yellow": (248, 208, 40),
    "green": (45, 160, 75),
    "blue": (45, 85, 215),
    "purple": (140, 60, 190),
    "pink": (250, 140, 195),
    "cyan": (60, 200, 225),
    "brown": (150, 90, 45),
}
SIZES = {"small": 0.08, "large": 0.155}  # half the width, as a share of the picture
PATTERNS = ("plain", "striped", "dotted", "checked")
BACKGROUNDS = {
    "white": (247, 247, 244),
    "grey": (168, 171, 178),
    "black": (26, 27, 32),
    "beige": (228, 208, 172),
}
RELATIONS = ("left of", "right of", "above", "below", "and")
INVERSE = {"left": "right", "right": "left", "above": "below", "below": "above", "and": "and"}


def circle(radius, x=5, y=5):
    """48 corners of a circle."""
    angles = np.arange(48) * np.pi / 24
    return np.stack([x + radius * np.cos(angles), y + radius * np.sin(angles)], 1)


def heart():
    """48 corners of the well-known curve."""
    angles = np.arange(48) * np.pi / 24
    waves = [height * np.cos(n * angles) for n, height in enumerate((0, 13, -5, -2, -1))]
    return np.stack([5 + 5 * np.sin(angles) ** 3, 4.3 - 0.325 * sum(waves)], 1)


def polygon(corners):
    """x and y of each corner, written one after the other."""
    return np.array(corners.split(), float).reshape(-1, 2)


OUTLINES = {  # corners in 0..10, x to the right and y down
    "circle": circle(5),
    "ring": circle(5),
    "moon": circle(5),
    "heart": heart(),
    "square": polygon(".5 .5  9.5 .5  9.5 9.5  .5 9.5"),
    "diamond": polygon("5 0  10 5  5 10  0 5"),
    "triangle": polygon("5 0  10 10  0 10"),
    "house": polygon("5 0  10 5  8.5 5  8.5 10  1.5 10  1.5 5  0 5"),
    "tree": polygon("5 0  8 4  6.5 4  10 8  6 8  6 10  4 10  4 8  0 8  3.5 4  2 4"),
    "fish": polygon("0 5  2 2.6  4.4 2  7.2 4  10 1.5  10 8.5  7.2 6  4.4 8  2 7.4"),
    "cross": polygon("3 0  7 0  7 3  10 3  10 7  7 7  7 10  3 10  3 7  0 7  0 3  3 3"),
    "star": polygon("5 0  6.2 3.6  10 3.8  7 6.2  8 10  5 7.8  2 10  3 6.2  0 3.8  3.8 3.6"),
}
HOLES = {"ring": circle(2.6), "moon": circle(4.4, x=8, y=3.8)}
SHAPES = (*OUTLINES,)

# Words of one kind may stand for each other; a relation counts by its telling word.
KINDS = {
    "size": (*SIZES,),
    "pattern": PATTERNS,
    "colour": (*COLOURS,),
    "shape": SHAPES,
    "background": (*BACKGROUNDS,),
    "relation": (*INVERSE,),
}

# The grammar. What a picture shows is told by two nouns and a relation, or in one word more.
ADJECTIVES = "".join(f"(?: (?:{'|'.join(KINDS[kind])}))?" for kind in ("size", "pattern", "colour"))
NOUN = f"a{ADJECTIVES} (?:{'|'.join(SHAPES)})"
SENTENCE = re.compile(
    rf"(?P<start>there is )?(?P<first>{NOUN}) (?P<relation>{'|'.join(RELATIONS)}) "
    rf"(?P<second>{NOUN})(?P<end> on a (?P<background>{'|'.join(BACKGROUNDS)}) background)?"
)

WORLD = 2  # a store of another world is made anew
Thing = namedtuple("Thing", "size pattern colour shape x y")


@dataclass
class Scene:
    """What a picture shows: a list of Things on a background."""

    objects: list
    background: str


def related(a, relation, b):
    """Whether a relation of two things holds: its one definition, for writer and oracle."""
    across = b.x - a.x
    down = b.y - a.y
    if relation == "left of":
        return across > abs(down)
    if relation == "right of":
        return -across > abs(down)
    if relation == "above":
        return down > abs(across)
    if relation == "below":
        return -down > abs(across)
    return True  # "and" says nothing of the places


def describes(caption, scene):
    """The oracle: True or False, whether a sentence is true of a scene; None if it is none."""
    sentence = SENTENCE.fullmatch(caption)
    if sentence is None:
        return None
    if sentence["background"] not in (None, scene.background):
        return False
    first = set(sentence["first"].split()[1:])
    second = set(sentence["second"].split()[1:])
    return any(
        first <= set(a[:4]) and second <= set(b[:4]) and related(a, sentence["relation"], b)
        for a, b in itertools.permutations(scene.objects, 2)
    )


def paraphrase(caption):
    """The sentence told from the other thing: "A left of B" becomes "B right of A", which is true
    of the same scenes. None if the caption is no sentence, or is the same from both sides."""
    sentence = SENTENCE.fullmatch(caption)
    if sentence is None:
        return None
    telling, *rest = sentence["relation"].split()
    words = [sentence["second"], INVERSE[telling], *rest, sentence["first"]]
    turned = (sentence["start"] or "") + " ".join(words) + (sentence["end"] or "")
    return None if turned == caption else turned


def phrases_of(caption):
    """Word positions of what can be masked: each shape, adjective and background, alone, and the
    words of the relation together."""
    phrases = []
    for n, word in enumerate(caption.split()):
        if word == "of":
            phrases[-1].append(n)
        elif any(word in words for words in KINDS.values()):
            phrases.append([n])
    return phrases


# Scenes and sentences at random.


def well_placed(objects):
    """True if things lie in the picture, apart, and no direction is in doubt."""
    for thing in objects:
        room = 1.15 * SIZES[thing.size]
        if not (room < thing.x < 1 - room and room < thing.y < 1 - room):
            return False
    for a, b in itertools.combinations(objects, 2):
        across = abs(a.x - b.x)
        down = abs(a.y - b.y)
        apart = max(across, down) > 1.2 * (SIZES[a.size] + SIZES[b.size])
        if not apart or abs(across - down) < 0.08:
            return False
    return True


def random_thing(rng):
    """Any thing, anywhere in the picture."""
    words = [rng.choice(KINDS[kind]) for kind in ("size", "pattern", "colour", "shape")]
    room = 1.15 * SIZES[words[0]]
    return Thing(*words, rng.uniform(room, 1 - room), rng.uniform(room, 1 - room))


def random_scene(rng):
    """A scene of two to four things; often two share a colour or a shape, so that one word does
    not tell them apart."""
    count = rng.randint(2, 4)
    things = []
    while len(things) < count:
        new = random_thing(rng)
        if things and rng.random() < 0.3:
            alike = rng.choice(("shape", "colour"))
            new = new._replace(**{alike: getattr(rng.choice(things), alike)})
        if well_placed([*things, new]):
            things.append(new)
        elif rng.random() < 0.03:
            things = []  # there may be no room left
    return Scene(things, rng.choice(KINDS["background"]))


def near_twin(rng, scene):
    """The scene with one attribute or the place of one thing changed, or two places swapped.
    A model must read every word, and who is where, to tell the two apart."""
    while True:
        things = list(scene.objects)
        i, j = rng.sample(range(len(things)), 2)
        change = rng.choice(("size", "pattern", "colour", "shape", "place", "swap"))
        a, b, new = things[i], things[j], random_thing(rng)
        if change == "swap":
            things[i] = a._replace(x=b.x, y=b.y)
            things[j] = b._replace(x=a.x, y=a.y)
        elif change == "place":
            things[i] = a._replace(x=new.x, y=new.y)
        else:
            things[i] = a._replace(**{change: getattr(new, change)})
        if things != scene.objects and well_placed(things):
            return Scene(things, scene.background)


def write_caption(rng, scene):
    """A true sentence about two things of a scene; each adjective is mentioned or not."""
    a, b = rng.sample(scene.objects, 2)
    relation = next(relation for relation in RELATIONS if related(a, relation, b))
    if rng.random() < 0.15:
        relation = "and"
    nouns = []
    for thing in (a, b):
        adjectives = [word for word in thing[:3] if rng.random() < 0.65]
        nouns.append(" ".join(["a", *adjectives, thing.shape]))
    caption = f"{nouns[0]} {relation} {nouns[1]}"
    form = rng.random()
    if form < 0.15:
        return f"there is {caption}"
    if form < 0.3:
        return f"{caption} on a {scene.background} background"
    return caption


def five_captions(rng, scene, twins):
    """Five different captions, none of them true of a twin; None if they do not turn up."""
    captions = []
    for _ in range(200):
        caption = write_caption(rng, scene)
        if caption not in captions and not any(describes(caption, twin) for twin in twins):
            captions.append(caption)
        if len(captions) == 5:
            return captions
    return None


def make_family(rng, size):
    """[(scene, five captions)] of `size` scenes that are near-twins of the first."""
    while True:
        scenes = [random_scene(rng)]
        while len(scenes) < size:
            scenes.append(near_twin(rng, scenes[0]))
        family = []
        for scene in scenes:
            twins = [twin for twin in scenes if twin is not scene]
            family.append((scene, five_captions(rng, scene, twins)))
        # Scenes that cannot be told apart in five ways are given up.
        if all(captions for _, captions in family):
            return family


def make_scenes(seed, split, size):
    """[(scene, five captions)] of a split, a function of the arguments only. Val and test come
    in families of five near-twins, and no caption is true of another of its family."""
    rng = random.Random(f"{seed} {split}")
    made = []
    while len(made) < size:
        made += make_family(rng, 1 if split == "train" else 5)
    return made[:size]


# Pictures, and what is seen of them.


@functools.cache
def stencil(shape, width):
    """Where a thing is: a mask of width x width pixels."""
    mask = Image.new("L", (width, width))
    pen = ImageDraw.Draw(mask)
    pen.polygon((OUTLINES[shape] * width / 10).ravel().tolist(), fill=255)
    if shape in HOLES:
        pen.polygon((HOLES[shape] * width / 10).ravel().tolist(), fill=0)
    return mask


@functools.cache
def weave(pattern, width):
    """Where a pattern is dark: a mask of width x width pixels."""
    cell = np.arange(width) * 8 // width
    offset = (np.arange(width) * 4 / width) % 1 - 0.5  # from the middle of four columns
    dark = np.zeros((width, width), bool)
    if pattern == "striped":
        dark[cell % 2 == 1] = True
    if pattern == "checked":
        dark = (cell // 2 + cell[:, None] // 2) % 2 == 1
    if pattern == "dotted":
        dark = np.hypot(offset, offset[:, None]) < 0.3
    return Image.fromarray(dark.astype(np.uint8) * 255)


def draw(scene, size=112):
    """The picture of a scene, size x size pixels; drawn three times as large and reduced."""
    full = 3 * size
    sheet = Image.new("RGB", (full, full), BACKGROUNDS[scene.background])
    for thing in scene.objects:
        width = round(2 * SIZES[thing.size] * full)
        corner = (round(thing.x * full - width / 2), round(thing.y * full - width / 2))
        bright = COLOURS[thing.colour]
        dark = tuple(11 * value // 20 for value in bright)
        tile = Image.new("RGB", (width, width), bright)
        tile.paste(dark, mask=weave(thing.pattern, width))
        sheet.paste(tile, corner, stencil(thing.shape, width))
    return sheet.reduce(3)


def look(rng, scene):
    """Regions as a detector gives them, from pixels alone: the whole picture and a box a little
    off each thing, in random order -> features (R, F), boxes (R, 4)."""
    boxes = []
    for thing in scene.objects:
        reach = SIZES[thing.size] * rng.uniform(1.1, 1.2)
        x = thing.x + SIZES[thing.size] * rng.uniform(-0.06, 0.06)
        y = thing.y + SIZES[thing.size] * rng.uniform(-0.06, 0.06)
        boxes.append([x - reach, y - reach, x + reach, y + reach])
    rng.shuffle(boxes)
    boxes = np.concatenate([WHOLE, boxes]).clip(0, 1)
    return describe_crops(draw(scene), boxes), boxes


def load_scenes(seed, sizes, store, tokens=None, elsewhere=()):
    """The embedded world as Data.

    sizes: images in train, val and test. store, elsewhere: as for load_data. tokens: the vocabulary
    of a checkpoint.
    """
    splits = {}
    names, scenes = [], []
    for split, size in zip(("train", "val", "test"), sizes):
        made = make_scenes(seed, split, size)
        captions = [caption for _, own in made for caption in own]
        splits[split] = Split(
            images=[f"{split}_{i:04d}" for i in range(size)],
            rows=[len(scenes) + i for i in range(size)],
            captions=captions,
            image_of_caption=torch.arange(size).repeat_interleave(5),
            phrases=[phrases_of(caption) for caption in captions],
            scenes=[scene for scene, _ in made],
        )
        names += splits[split].images
        scenes += splits[split].scenes

    def make_images():
        rng = random.Random(f"{seed} boxes")
        for name, scene in zip(names, scenes):
            yield name, *look(rng, scene)

    source = ["scenes", WORLD, seed, *sizes]
    regions = open_regions(store, source, make_images, elsewhere=elsewhere)
    tokens = tokens or build_vocabulary(splits["train"].captions, min_count=1)
    return Data("scenes", WordPiece(tokens, lowercase=True), regions, splits)


def describe_crops(picture, boxes):
    """Appearance of boxes (R, 4) of an RGB picture as numbers (R, 321).

    Each crop is brought to 24 x 24 pixels, and what differs from its border is taken for the
    thing in it: 144 numbers tell its silhouette, 64 its colours, 64 those around it, 49 its
    pattern.
    """
    crops = []
    for box in boxes * [*picture.size, *picture.size]:
        crops.append(np.asarray(picture.resize((24, 24), Image.BOX, tuple(box)), np.float32))
    crops = np.stack(crops) / 255  # (R, 24, 24, 3)
    edge = np.ones((24, 24), bool)
    edge[1:-1, 1:-1] = False
    ground = np.median(crops[:, edge], 1)  # (R, 3)
    inside = (4 * np.abs(crops - ground[:, None, None]).max(-1)).clip(0, 1)  # (R, 24, 24)
    silhouette = inside.reshape(-1, 12, 2, 12, 2).mean((2, 4)).reshape(-1, 144)

    # Shares of four levels of red, green and blue, so that a colour is a point of 64.
    levels = (1 - np.abs(3 * crops[..., None] - np.arange(4))).clip(0).reshape(-1, 576, 3, 4)
    red, green, blue = levels.transpose(2, 0, 1, 3)  # (R, 576, 4) each
    pairs = (red[..., None] * green[..., None, :]).reshape(-1, 576, 16)
    share = inside.reshape(-1, 576, 1)
    own = (pairs * share).transpose(0, 2, 1) @ blue / share.sum(1, keepdims=True).clip(1)
    around = (pairs * (1 - share)).transpose(0, 2, 1) @ blue / 576

    # How much the light at two places in the thing is alike, for steps of 0 to 6 pixels between
    # them: it tells a pattern wherever it begins, and whatever it is painted on.
    light = crops.mean(-1)
    mean = (light * inside).sum((1, 2)) / inside.sum((1, 2)).clip(1)
    light = (light - mean[:, None, None]) * inside
    both = []
    for values in (light, inside):
        waves = np.abs(np.fft.rfft2(values, (32, 32))) ** 2
        both.append(np.fft.irfft2(waves)[:, :7, :7])
    alike = both[0] / (both[1] + 10)
    alike = (alike / (alike[:, :1, :1] + 5e-4)).reshape(-1, 49)

    # Roots and weights: each part spreads as widely as the silhouette does, so that none is louder.
    own, around = np.sqrt(own).reshape(-1, 64), np.sqrt(around).reshape(-1, 64)
    return np.concatenate([silhouette - 0.5, 5 * own, 4 * around, 2 * alike], 1)
