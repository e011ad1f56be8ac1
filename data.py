"""The data of TAGS-DC: captions become token ids and phrases, pictures become region features.

load_data reads a published data set, load_scenes makes the embedded world; both give a Data.

Letters: B batch, T tokens, P phrases, R regions, F feature size, C captions, I images.
Every mask: True = real. Boxes are x1 y1 x2 y2 as shares of the picture, y down."""

import base64
import contextlib
import errno
import gc
import gzip
import io
import itertools
import json
import os
import pickle
import random
import re
import struct
import sys
import time
import tokenize
import unicodedata
import warnings
import zipfile
import zlib
from collections import Counter, namedtuple
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from torch.nn.utils.rnn import pad_sequence

from generate import parse_phrases, phrase_masks


class InputError(ValueError):
    """Bad input. Its text is one line: what is wrong, where, how to mend it."""


# What the libraries raise on a damaged file, and our own code on a field of the wrong type.
# Anything else (NameError, AssertionError) is a bug.
DAMAGE = (
    *(ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, OSError, RuntimeError),
    *(SyntaxError, TypeError, ValueError, struct.error, zlib.error, zipfile.BadZipFile),
    *(pickle.UnpicklingError, tokenize.TokenError),
    *(Image.DecompressionBombError, Image.DecompressionBombWarning),
)


@contextlib.contextmanager
def one_line_errors(where, advice, left_out=None):
    """Turns what a damaged file raises inside into an InputError of one line, raised from it; or
    into a line of the list left_out, if there is one and the fault is the file's."""
    try:
        yield
    except DAMAGE as fault:
        kind = "lacks" if isinstance(fault, KeyError) else type(fault).__name__
        what = str(fault) if type(fault) is ValueError else f"{kind} {fault}"
        text = str(fault) if isinstance(fault, InputError) else f"{where}: {what[:400]}; {advice}"
        text = " ".join(text.split()).encode("utf-8", "backslashreplace").decode()
        if left_out is None:
            raise InputError(text) from fault
        text = text.removesuffix(f"; {advice}")
        if is_of_the_machine(fault):
            advice = (
                "not left out, as the disk, the network or the memory failed; try again or move it"
            )
            raise InputError(f"{text}; {advice}") from fault
        left_out.append(text)


def is_of_the_machine(fault):
    """Whether an exception tells nothing about the file that was read: there was no memory, or the
    file could not be read. A damaged file raises an OSError too: Pillow's have no errno, and a
    search for a place outside of the file has EINVAL."""
    if isinstance(fault, OSError):
        return fault.errno not in (None, errno.EINVAL)
    return isinstance(fault, MemoryError)


def write_atomically(path, write):
    """write(path of a part file), which then takes the name: whole or not at all."""
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


class ProgressLine:
    """How far long work has come, on stderr: what is done and how long the rest will take. On a
    terminal one line is rewritten; a file gets a line a minute. Work of under 5 seconds is silent.
    what: the things counted, such as "images". total: how many there will be; None = unknown.
    Of several processes (torchrun) the first one alone writes."""

    def __init__(self, what, total):
        self.what = what
        self.total = total
        self.done = 0
        self.on_terminal = sys.stderr.isatty()
        self.silent = os.environ.get("RANK", "0") != "0"
        self.start = time.monotonic()
        self.next_line = self.start + 5
        self.width = 0  # of the longest line so far; 0 = nothing was shown

    def advance(self, n=1):
        """n more are done."""
        self.done += n
        now = time.monotonic()
        if now >= self.next_line and not self.silent:
            self.show(now)
            self.next_line = now + (0.5 if self.on_terminal else 60)

    def close(self):
        """Ends the line on a terminal, if there is one."""
        if self.width and self.on_terminal:
            self.show(time.monotonic())
            print(file=sys.stderr)

    def show(self, now):
        """Writes the line."""
        seconds = now - self.start
        text = f"{self.done:,} {self.what} in {timedelta(seconds=round(seconds))}"
        if self.total and self.done:
            share = min(self.done / self.total, 1)
            left = timedelta(seconds=round(seconds / share - seconds))
            text = f"{self.done:,} of {self.total:,} {self.what} ({share:.0%}), {left} left"
        self.width = max(self.width, len(text))
        if self.on_terminal:
            print(f"\r{text.ljust(self.width)}", end="", file=sys.stderr, flush=True)
        else:
            print(text, file=sys.stderr, flush=True)


# ---- words and word pieces ---------------------------------------------------------------------

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
CJK = "[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002ceaf\U0002f800-\U0002fa1f]"


def split_words(text):
    """Caption -> words and punctuation marks, case kept. Punctuation, symbols of ASCII and CJK
    characters stand alone, control characters go, as BERT has it."""
    spaced = ""
    for char in text:
        kind = unicodedata.category(char)[0]
        alone = kind == "P" or (kind == "S" and char.isascii()) or re.match(CJK, char)
        if char in "\t\n\r" or (kind != "C" and char != "\ufffd"):
            spaced += f" {char} " if alone else char
    return spaced.split()


def split_touching(text):
    """The words of split_words, and of each whether no space stands before it."""
    words = []
    touching = []
    for chunk in text.split(" "):
        parts = split_words(chunk)
        words += parts
        touching += [n > 0 for n in range(len(parts))]
    return words, touching


def uncased(word):
    """A word in lower case without accents, as BERT does it -> one word, several or none."""
    letters = unicodedata.normalize("NFD", "".join(char.lower() for char in word))
    return split_words("".join(char for char in letters if unicodedata.category(char) != "Mn"))


class WordPiece:
    """BERT's tokenizer. vocab: path of a vocab.txt (one token a line, id = line number) or a list
    of tokens. lowercase: True for an uncased vocabulary. Raises InputError.
    word_range: (first, end) of the ids of ordinary words, behind all special tokens and [unused].
    whole_words: (V,) bool, False for the pieces that continue a word, "##s"."""

    def __init__(self, vocab, lowercase):
        self.tokens = vocab if isinstance(vocab, list) else read_lines(vocab)
        self.lowercase = lowercase
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        with one_line_errors(f"{str(vocab)[:99]!r}", "give BERT's vocab.txt"):
            special_ids = [self.ids[token] for token in SPECIALS]
            special = [token in SPECIALS or token.startswith("[unused") for token in self.tokens]
            first = [*special, False].index(False)
            if max(special_ids) >= first:
                late = self.tokens[max(special_ids)]
                raise ValueError(f"{late} stands behind the word {self.tokens[first]!r}")
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = special_ids
        self.word_range = (first, len(self.tokens))
        self.whole_words = torch.tensor([not token.startswith("##") for token in self.tokens])
        self.known_pieces = {}  # of each word so far, since captions repeat their words

    def pieces(self, word):
        """A word, or several with no space between them -> the ids of their pieces."""
        if word not in self.known_pieces:
            words = split_words(word)
            if self.lowercase:
                words = [part for cased in words for part in uncased(cased)]
            self.known_pieces[word] = [i for part in words for i in self.longest_match(part)]
        return self.known_pieces[word]

    def longest_match(self, word):
        """The longest known piece from the left, then, with ##, the longest of the rest ..."""
        if len(word) > 100:
            return [self.unk_id]
        ids = []
        start = 0
        while start < len(word):
            prefix = "##" if start else ""
            end = len(word)
            while end > start and prefix + word[start:end] not in self.ids:
                end -= 1
            if end == start:
                return [self.unk_id]
            ids.append(self.ids[prefix + word[start:end]])
            start = end
        return ids

    def encode(self, text):
        """Text -> list of ids, without [CLS] and [SEP]."""
        return [i for chunk in text.split(" ") for i in self.pieces(chunk)]

    def decode(self, ids):
        """Ids -> readable text: pieces joined, [PAD] [CLS] [SEP] dropped."""
        hidden = (self.pad_id, self.cls_id, self.sep_id)
        return " ".join(self.tokens[int(i)] for i in ids if i not in hidden).replace(" ##", "")


def build_vocabulary(captions, min_count):
    """The special tokens, then every word seen min_count times, the frequent first."""
    counts = Counter()
    for chunk, times in Counter(chunk for text in captions for chunk in text.split()).items():
        for word in uncased(chunk):
            counts[word] += times
    frequent = [word for word in counts if counts[word] >= min_count]
    return SPECIALS + sorted(frequent, key=lambda word: (-counts[word], word))


# ---- region features on disk -------------------------------------------------------------------
# The regions of all images lie end to end in one file that is mapped into memory, 18 GB for COCO.
# A header in JSON and its length are written last, and only then the file takes its name.


def write_regions(folder, images, source, left_out=None, total=None):
    """Streams images, (name, features (R, F), boxes (R, 4)) each, into a folder for `Regions`.
    source: what they came from. left_out: list that `images` fills with what it leaves out.
    total: how many images there will be about, for the progress line; None = unknown."""
    folder = Path(folder)

    def write(part):
        names = []
        counts = []
        width = None
        progress = ProgressLine("images converted", total)
        with open(part, "wb") as file, contextlib.closing(progress):
            for name, features, boxes in images:
                width = width or features.shape[-1]
                if features.shape[1:] != (width,) or boxes.shape != (len(features), 4):
                    found = f"features {features.shape}, boxes {boxes.shape}"
                    raise InputError(f"{name}: {found}; (R, {width}) and (R, 4) are expected")
                box_bits = np.ascontiguousarray(boxes, np.float32).view(np.float16)  # (R, 8)
                file.write(np.concatenate([features.astype(np.float16), box_bits], 1).tobytes())
                names.append(name)
                counts.append(len(features))
                progress.advance()
            if not names:
                raise InputError(f"{folder}: no image to write")
            header = {"source": source, "names": names, "counts": counts}
            header |= {"feature_size": width, "left_out": left_out or []}
            text = json.dumps(header).encode()
            file.write(text + len(text).to_bytes(8, "little"))

    try:
        folder.mkdir(parents=True, exist_ok=True)
        for part in folder.glob("*.part"):
            if time.time() - part.stat().st_mtime > 600:  # of a killed run
                part.unlink(missing_ok=True)
        write_atomically(folder / "regions.bin", write)
    except OSError as fault:
        text = f"{folder}: {fault}; is the disk full, or a file not to be read or written?"
        raise InputError(text) from fault


class Regions:
    """The memory-mapped features that write_regions made. Raises InputError if they are damaged.
    A copy, also one in another process, opens the file anew."""

    def __init__(self, folder):
        self.folder = os.path.abspath(folder)
        path = Path(folder) / "regions.bin"
        with one_line_errors(folder, "delete it, and it is made again"), open(path, "rb") as file:
            file.seek(-8, os.SEEK_END)
            length = int.from_bytes(file.read(), "little")
            file.seek(-8 - length, os.SEEK_END)
            header = json.loads(file.read(length))
            self.source = header["source"]
            self.left_out = header["left_out"]
            self.names = header["names"]  # of the images
            self.feature_size = header["feature_size"]
            self.counts = np.array(header["counts"], np.int64)  # (I,) regions of each image
            self.starts = np.cumsum(self.counts) - self.counts  # (I,) the first of them
            shape = (self.counts.sum(), self.feature_size + 8)
            regions = np.asarray(np.memmap(file, np.float16, "r", shape=shape))
            self.features = regions[:, :-8]  # (all regions, F)
            self.boxes = regions[:, -8:].view(np.float32)  # (all regions, 4)

    def __reduce__(self):
        return Regions, (self.folder,)

    def gather(self, rows):
        """Images by number (B,) -> features (B, R, F), boxes (B, R, 7), mask (B, R). What is beyond
        an image's own regions is 0. A box has x1 y1 x2 y2, width, height and area."""
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


def open_regions(folder, source, make_images, left_out=None, elsewhere=(), total=None):
    """The region store in a folder, or elsewhere, in other folders that are only read. Unless one
    has this source, it is made in `folder` from the iterator make_images(), see write_regions."""
    source = json.loads(json.dumps(source))  # tuples become lists, as in the file
    for place in (folder, *elsewhere):
        regions = None  # closes the last one: Windows replaces no file that is mapped
        with contextlib.suppress(InputError):  # none yet, or a damaged one
            regions = Regions(place)
            if regions.source == source:
                return regions
    regions = None
    write_regions(folder, make_images(), source, left_out, total)
    return Regions(folder)


# ---- data sets and batches ---------------------------------------------------------------------


@dataclass
class Split:
    """Images and captions of train, val or test. Captions of one image stand together, in the order
    of the images; only those of a probe (evaluate.py) have false captions, of image -1, between."""

    images: list  # names
    rows: np.ndarray  # (I,) number of each image in the region store
    captions: list
    image_of_caption: torch.Tensor  # (C,) long, ascending but for the -1 of a probe
    phrases: list = None  # of each caption [[word positions]], or None: parse_phrases finds them
    scenes: list = None  # only in the embedded world: of each image
    further: dict = field(default_factory=dict)  # image -> captions that only true_captions counts

    def caption_ranges(self, images):
        """The captions of images by number (N,) long, but of no probe: those from first (N,) up to
        end (N,), which is not one of them."""
        first = torch.searchsorted(self.image_of_caption, images)
        return first, torch.searchsorted(self.image_of_caption, images, right=True)


@dataclass
class Data:
    """A data set. The methods make batches of CPU tensors."""

    name: str
    tokenizer: WordPiece
    regions: Regions
    splits: dict  # "train", "val", "test"; a data set may lack some
    max_text: int = 64  # longest text in tokens with [CLS] and [SEP]; the rest is cut off
    notes: list = field(default_factory=list)  # what was found, left out or guessed, a line each

    def __post_init__(self):
        self.known_ids = {}  # (split, caption) -> ids: training asks again and again
        self.known_phrases = {}

    def text(self, split, captions):
        """Captions by number (B,) -> input_ids (B, T) long: [CLS] words [SEP], padded."""
        rows = [self.caption_ids(split, c) for c in np.asarray(captions).tolist()]
        return pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.pad_id)

    def phrases(self, split, captions):
        """Captions by number (B,) -> (B, P, T) bool: True = the token belongs to the phrase."""
        rows = [self.caption_phrases(split, c) for c in np.asarray(captions).tolist()]
        P = max(row.size(0) for row in rows)
        T = max(row.size(1) for row in rows)
        batch = torch.zeros(len(rows), P, T, dtype=torch.bool)
        for b, row in enumerate(rows):
            batch[b, : row.size(0), : row.size(1)] = row
        return batch

    def caption_ids(self, split, c):
        """One caption -> (T,) ids."""
        if (split, c) not in self.known_ids:
            self.known_ids[split, c] = self.token_ids(self.splits[split].captions[c])
        return self.known_ids[split, c]

    def token_ids(self, text):
        """A text -> (T,) ids: [CLS] words [SEP], of which the words are cut off to max_text."""
        ids = self.tokenizer.encode(text)[: self.max_text - 2]
        return torch.tensor([self.tokenizer.cls_id, *ids, self.tokenizer.sep_id])

    def caption_phrases(self, split, c):
        """One caption -> (P, T) bool, the tokens of each phrase that is not cut off. A caption
        without a single phrase has one of each word (section 3.3)."""
        if (split, c) not in self.known_phrases:
            content = self.splits[split]
            words, touching = split_touching(content.captions[c])
            phrases = content.phrases[c] if content.phrases else None
            if phrases is None:
                phrases = [positions for _, positions in parse_phrases(words, touching)]
            word_of_token = [-1]  # [CLS] and [SEP] are no word's
            for n, word in enumerate(words):
                word_of_token += [n] * len(self.tokenizer.pieces(word))
            word_of_token = [*word_of_token[: self.max_text - 1], -1]
            self.known_phrases[split, c] = phrase_masks(phrases, word_of_token)
        return self.known_phrases[split, c]

    def image(self, split, images):
        """Images by number (B,) -> features (B, R, F), boxes (B, R, 7), region_mask (B, R)."""
        return self.regions.gather(self.splits[split].rows[np.asarray(images)])

    def true_captions(self, split, images):
        """Images by number (B,) -> (B, C, T) ids of all captions of each, padded in C and T."""
        content = self.splits[split]
        images = torch.as_tensor(images)
        ranges = torch.stack(content.caption_ranges(images), 1)  # (B, 2)
        texts = []
        for image, (first, end) in zip(images.tolist(), ranges.tolist()):
            ids = [self.caption_ids(split, c) for c in range(first, end)]
            ids += [self.token_ids(text) for text in content.further.get(image, [])]
            texts.append(ids)
        pad = partial(pad_sequence, batch_first=True, padding_value=self.tokenizer.pad_id)
        padded = pad([row for ids in texts for row in ids])  # (all captions, T)
        return pad(padded.split([len(ids) for ids in texts]))


# ---- published features ------------------------------------------------------------------------
# To add a form: add a line to FORMS, its reader and its list_names; its suffix to ENDING (that of a
# picture format to PICTURE_FORMATS); its name to NEEDED, print_checklist and docs/COCO.md; and look
# at every `form.name ==`. The reader takes files, {path from the searched folder: path}, and sizes,
# {image_key: (width, height)} from the captions' JSON, and yields for each image (name, where,
# read): where is for error messages, read() gives the arguments of check_regions.
# list_names(name, path) says which images a file has without reading them, so that what is missing
# is known before anything is converted.

WHOLE = np.array([[0.0, 0.0, 1.0, 1.0]])  # the box of the whole picture
CELLS = [[x / 4, y / 4, (x + 1) / 4, (y + 1) / 4] for y in range(4) for x in range(4)]
GRID = np.concatenate([WHOLE, CELLS])
# Pillow's names of the formats of plain pictures, and their suffixes.
PICTURE_FORMATS = {"JPEG": "jpe?g", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp"}
PICTURE_FORMATS |= {"TIFF": "tiff?"}
PICTURE_SUFFIX = "|".join(PICTURE_FORMATS.values())
LARGEST = 1 << 26  # bytes that the arrays of one image, or a row of a TSV, may take

TSV_COLUMNS = {  # of files without a header, by the number of columns
    6: "id w h num_boxes boxes features".split(),  # bottom-up-attention
    10: "id h w objects_id objects_conf attrs_id attrs_conf num_boxes boxes features".split(),
}  # 10: LXMERT
NPZ_NAMES = {  # of arrays, UNITER's and those of others
    **{name: name for name in "features norm_bb bbox num_bb conf image_w image_h".split()},
    **dict.fromkeys(("x", "feat", "image_features"), "features"),
    **{"boxes": "bbox", "num_bbox": "num_bb", "num_boxes": "num_bb"},
}


def check_regions(features, boxes, size=None, conf=None, count=None):
    """What every image must pass -> features (R, F), boxes (R, 4) in 0..1, or ValueError. size:
    (width, height) where boxes are in pixels. conf: (R,) scores; as in UNITER (section 3.1) those
    above 0.2 are kept, but 10 to 100. count: how many regions there should be."""
    if features.ndim != 2 or not features.size:
        raise ValueError(f"features has shape {features.shape}, (regions, numbers) is expected")
    if count not in (None, len(features)):
        raise ValueError(f"features has shape {features.shape}, num_bb says {count}")
    if boxes.ndim == 2 and boxes.shape[1] in (6, 7):  # width, height and area follow the corners
        boxes = boxes[:, :4]
    check_array("features", features, features.shape)
    check_array("boxes", boxes, (len(features), 4))
    if conf is not None:
        check_array("conf", conf, (len(features),))
    if size is not None:
        boxes = boxes / np.array([*size, *size]).astype(np.float32)
    # Up to a per cent outside is rounding, and is clipped.
    right = (boxes >= -0.01) & (boxes <= 1.01) & (boxes >= boxes[:, [0, 1, 0, 1]])
    if not right.all():
        n = right.all(1).argmin()
        raise ValueError(f"box {n} is outside its image or inside out: {boxes[n].round(3)}")
    if conf is not None:
        kept = min(max(int((conf > 0.2).sum()), 10), 100)
        best = np.sort(np.argsort(-conf, kind="stable")[:kept])
        features, boxes = features[best], boxes[best]
    return features, boxes.clip(0, 1)


def check_array(name, array, shape):
    """ValueError unless an array has this shape, and numbers that are finite in float16."""
    right = array.shape == shape and array.dtype.kind in "fiu"
    if not right or not abs(array).max() <= 65504:  # nor is NaN
        found = f"shape {array.shape} of {array.dtype}; {shape} of numbers"
        raise ValueError(f"{name} has {found} that are finite in float16 is expected")


def read_tsv(files, sizes):
    """Bottom-up-attention's files or LXMERT's: a row an image, boxes in pixels, maybe a header."""
    for path in files.values():
        for number, columns, fields in tsv_rows(path):
            name = dict(zip(columns, fields)).get("id", "?")
            where = f"{path} row {number} (image {name[:60]})"
            yield image_key(name), where, partial(read_tsv_row, columns, fields)


def tsv_rows(path):
    """Yields for each row its number, the columns by a header or by how many they are, the fields
    of text."""
    header = None
    open_file = gzip.open if path.lower().endswith(".gz") else open
    with one_line_errors(path, "unpack or copy it again"), open_file(path, "rb") as file:
        lines = iter(partial(file.readline, LARGEST), b"")
        for number, line in enumerate(lines, 1):
            fields = line.decode("utf-8-sig", "replace").rstrip("\r\n").split("\t")
            if "features" in fields:
                header = [re.sub("^(image|img)_", "", field.strip()) for field in fields]
            elif fields != [""]:
                yield number, header or TSV_COLUMNS.get(len(fields), ["id"]), fields


def list_first_rows(name, path):
    """The first images of a TSV of features: to list them all is to read it all."""
    rows = itertools.islice(tsv_rows(path), 5)
    names = []
    for _, columns, fields in rows:
        if len(columns) == len(fields) and {"id", "features"} <= set(columns):
            names.append(fields[columns.index("id")])
    return names


def read_tsv_row(columns, fields):
    """One image: fields of text, arrays in base64."""
    if len(columns) != len(fields):
        raise ValueError(f"{len(fields)} columns; as many as a header has, or 6 or 10 are expected")
    row = dict(zip(columns, fields))
    count = int(row["num_boxes"])
    arrays = {}
    for name in {"boxes", "features", "objects_conf"} & row.keys():
        data = base64.b64decode(row[name] + "==")  # a field that is cut off is too short
        arrays[name.removeprefix("objects_")] = np.frombuffer(data, "<f4").reshape(count, -1)
    if "conf" in arrays:
        arrays["conf"] = arrays["conf"][:, 0]
    return {"size": (row["w"], row["h"]), **arrays}


def read_each(read_image, files, sizes):
    """The forms with a file an image, which read_image(path, size) reads."""
    for name, path in files.items():
        yield name, path, partial(read_image, path, sizes.get(image_key(name)))


def list_one(name, path):
    """The image of a file that holds one."""
    return [name]


def check_archive(archive):
    """ValueError unless a zip file uses only numpy's compression and unpacks to at most LARGEST
    bytes."""
    members = archive.infolist()
    if not {member.compress_type for member in members} <= {
        zipfile.ZIP_STORED,
        zipfile.ZIP_DEFLATED,
    }:
        raise ValueError("is packed in a way that numpy does not use")
    if sum(member.file_size for member in members) > LARGEST:
        raise ValueError(f"unpacks to more than {LARGEST:,} bytes")


def read_npz(file, size):
    """file: a path or an open file. size: (width, height) by the captions' JSON, or None."""
    row = {}
    with zipfile.ZipFile(file) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
        check_archive(archive)
        for name, field_name in NPZ_NAMES.items():  # of two names of one field the first counts
            if name in names and field_name not in row:
                row[field_name] = np.load(archive.open(f"{name}.npy"))
    boxes = row.get("norm_bb", row.get("bbox"))
    if boxes is None or "features" not in row:
        raise ValueError(f"has {', '.join(names)[:200]}; wanted are {', '.join(NPZ_NAMES)}")
    if len(row["features"]) != len(boxes) == row["features"].shape[-1]:
        row["features"] = row["features"].T  # OpenVQA's files have a column a region
    if "norm_bb" in row or not boxes.max(initial=0) > 1.01:
        size = None
    elif "image_w" in row:
        size = (row["image_w"].item(), row["image_h"].item())
    elif size is None:
        raise ValueError("bbox is in pixels; image_w, image_h or the size in the JSON are missing")
    image = {"features": row["features"], "boxes": boxes, "conf": row.get("conf")}
    return {"size": size, "count": row.get("num_bb", np.array(len(boxes))).item(), **image}


def read_arrays(files, sizes):
    """SCAN's *_ims.npy (images, regions, features), whose regions get the whole picture's box."""
    for path in files.values():
        names, array = open_array(path)
        for i, name in enumerate(names):
            yield name, f"{path} image {i}", partial(read_array_image, path, array, i)


def read_array_image(path, array, i):
    """One image, not by way of the map: its pages would count as memory of ours, 33 GB for COCO."""
    start = array.offset + i * array.strides[0]
    features = np.fromfile(path, array.dtype, array[i].size, offset=start)
    features = features.reshape(array.shape[1:])
    return {"features": features, "boxes": WHOLE.repeat(len(features), 0)}


def open_array(path):
    """A *_ims.npy -> the names of its images, by *_names.txt or by number, and the array, mapped
    into memory. VSE++'s have each image five times, once for each of its captions."""
    names_file = Path(path.replace("_ims.npy", "_names.txt"))
    captions_file = scan_captions_file(path)
    with one_line_errors(path, "save it again as a plain array (images, regions, features)"):
        array = np.lib.format.open_memmap(path, mode="r")
        if not array.flags.c_contiguous:
            raise ValueError("its numbers are in Fortran's order")
        rows = len(array)
        names = [f"{Path(path).stem}_{i:06d}" for i in range(rows)]
        names = read_lines(names_file) if names_file.exists() else names
        if captions_file.exists() and len(read_lines(captions_file)) == rows:
            if rows % 5 or not np.array_equal(array[0], array[4]):
                raise ValueError(f"{rows} images for {rows} captions; an image should have five")
            array = array[::5]
            names = names[::5] if len(names) == rows else names
        if len(names) != len(array):
            raise ValueError(f"{len(array)} images, but {len(names)} names in {names_file.name}")
    return names, array


def scan_captions_file(path):
    """The *_caps.txt of a *_ims.npy."""
    return Path(path.replace("_ims.npy", "_caps.txt"))


def list_array(name, path):
    """The images of a *_ims.npy."""
    return open_array(path)[0]


def read_picture(path, size):
    """A picture, rotated by its EXIF tag, 16-bit grey reduced to 8, transparency laid on white ->
    features and boxes of the whole picture and 4 x 4 cells, in place of a detector's."""
    with Image.open(path, formats=tuple(PICTURE_FORMATS)) as picture:
        picture = ImageOps.exif_transpose(picture)
        if picture.mode.startswith("I"):
            grey = np.asarray(picture).astype(np.float32) / 257
            picture = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
        if "A" in picture.getbands() or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return {"features": describe_crops(picture.convert("RGB"), GRID), "boxes": GRID}


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
        found = 0
        tree = walk(file, size, root, min(depth, 32)) if depth else []
        for key, value in tree:
            if key <= last:
                raise ValueError(f"key {key} after {last}: its page is damaged, or in a loop")
            yield key, value
            last = key
            found += 1
        if found != entries:
            raise ValueError(f"its meta page counts {entries:,} entries, the tree has {found:,}")


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


# msgpack: bytes that are an item by themselves; struct's type of what follows other first bytes.
SINGLE = {n % 256: n for n in range(-32, 128)} | {0xC0: None, 0xC2: False, 0xC3: True}
FOLLOWING = dict(zip(range(0xC4, 0xE0), "BHI...fdBHIQbhiq.....BHIHIHI"))


def unpack_msgpack(data, start=0, depth=0):
    """The item at a byte of data, `depth` levels deep -> the item, and the byte after it."""
    if start == len(data) or depth > 8:
        raise ValueError(f"ends at byte {start}, {depth} levels deep; is it cut off?")
    first = data[start]
    start += 1
    if first in SINGLE:
        return SINGLE[first], start
    # 80-8f map, 90-9f list, a0-bf text: the last bits are the length.
    number = first & (31 if first >= 0xA0 else 15)
    if first >= 0xC0:  # c4-c6 bytes, ca-d3 number, d9-db text, dc-dd list, de-df map
        form = ">" + FOLLOWING.get(first, ".")  # a point, for other kinds, is refused by struct
        (number,) = struct.unpack_from(form, data, start)
        start += struct.calcsize(form)
    if 0xCA <= first <= 0xD3:
        return number, start
    if number > len(data) - start:
        raise ValueError(f"length {number} at byte {start} of {len(data)}; is it cut off?")
    if 0xA0 <= first <= 0xDB:
        return data[start : start + number], start + number
    is_list = 0x90 <= first <= 0xDD
    items = []
    for _ in range(number if is_list else 2 * number):
        item, start = unpack_msgpack(data, start, depth + 1)
        items.append(item)
    return items if is_list else unpack_map(items), start


def unpack_map(items):
    """[key, value, key, value ...] -> the array that msgpack-numpy wrote so, or a dict."""
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
        counts_file = region_counts_file(path)
        counts = read_json(counts_file) if counts_file else {}
        for key, value in read_lmdb(path):
            name = key.decode(errors="replace")
            if name != "__keys__":
                read = partial(read_uniter_image, value, counts.get(name))
                yield name, f"{path} key {name[:60]}", read


def region_counts_file(path):
    """The nbb_*.json with the name of a database's folder, in it or beside it; None = none."""
    folder = Path(path).parent
    name = folder.name.removeprefix("feat_").removesuffix("_compressed")
    for place in (folder, folder.parent):
        file = place / f"nbb_{name}.json"
        if file.is_file():
            return file
    return None


def list_database(name, path):
    """The images of a database; one of texts has none."""
    if Path(path).with_name("id2len.json").exists():
        return []
    return [key.decode(errors="replace") for key, _ in read_lmdb(path) if key != b"__keys__"]


def read_uniter_image(value, count):
    """The npz or msgpack of one image. count: of its regions; None: as check_regions finds it."""
    if value[:2] == b"PK":
        image = read_npz(io.BytesIO(value), None)
    else:
        arrays, end = unpack_msgpack(value)
        if end < len(value) or not {b"features", b"norm_bb"} <= arrays.keys():
            raise ValueError("no msgpack of features and norm_bb; texts come from Karpathy's JSON")
        image = {"features": arrays[b"features"], "boxes": arrays[b"norm_bb"]}
        image["conf"] = arrays.get(b"conf")
    if count is None:
        return image
    return {"features": image["features"][:count], "boxes": image["boxes"][:count], "count": count}


Form = namedtuple("Form", "name ending reader list_names lists_all")
FORMS = [  # of all that lies in a folder, the first form of this list that has our images is taken
    Form("tsv", r"\.tsv(\.\d+|\.gz)?$", read_tsv, list_first_rows, False),
    Form("npz", r"\.npz$", partial(read_each, read_npz), list_one, True),
    Form("uniter", r"data\.mdb$", read_uniter, list_database, True),
    Form("arrays", r"_ims\.npy$", read_arrays, list_array, True),
    Form("pictures", rf"\.({PICTURE_SUFFIX})$", partial(read_each, read_picture), list_one, True),
]


# ---- a published data set: which files -----------------------------------------------------------

NEEDED = (
    "needed are captions, dataset_coco.json or dataset_flickr30k.json of Karpathy's "
    "caption_datasets.zip, and region features: *.tsv (bottom-up-attention, LXMERT), *.npz or "
    "data.mdb (UNITER), *_precomp/ (SCAN, whose captions need no JSON) or images/ (pictures); the "
    "smallest set that works is the JSON and images/"
)
KARPATHY = 'Karpathy\'s form is {"images": [{"filename", "split", "sentences": [{"raw"}]}]}'
SKIP = "mend it, or pass --skip-bad to leave it out"

PREFIX = re.compile(r"((coco_)?(train|val|test)20\d\d_|coco_|flickr(8|30)k_)?")
ENDING = re.compile(rf"(\.({PICTURE_SUFFIX}|np[yz]))*$")
# Files and folders that are no data of the user's: programs, tests, our own runs and pictures.
NOT_DATA = re.compile(r"\..*|site-packages|node_modules|tests|runs|(negatives|search|curves)\.png")
PICTURE_FOLDERS = r"(images|\w20\d\d)/"  # folders whose pictures are data
DATA_SET = re.compile(r"(?<![a-z0-9])(?:ms)?(coco|flickr30k|f30k|flickr8k|f8k)(?![a-z])")
ALIASES = {"f30k": "flickr30k", "f8k": "flickr8k"}

# Where to look. root: folder of the captions and vocab.txt. features: folder or file of the region
# features. by_user: True if the user named that, and did not leave it to be root.
Places = namedtuple("Places", "root features by_user")
# source: path of the JSON. data_set: see data_set_of. by_path: True if the user named the path.
Captions = namedtuple("Captions", "source images data_set by_path")
# files: {path from the searched folder: path}. names: {path from there: names of its images}.
# unused: files of the form that have no image of ours.
Features = namedtuple("Features", "form files names unused")


def image_key(name):
    """What the names of one picture share: COCO_val2014_000000391895.jpg, 391895.npz -> 391895."""
    stem = str(name)[-300:].lower().replace("\\", "/").rpartition("/")[2]
    stem = stem[PREFIX.match(stem).end() : ENDING.search(stem).start()]
    return (stem.lstrip("0") or "0") if stem.isdecimal() else unicodedata.normalize("NFC", stem)


def data_set_of(path):
    """The published data set that a path names, "coco", "flickr30k" or "flickr8k"; "" for none.
    Of several that of the innermost folder, or of the file, counts."""
    found = DATA_SET.findall(str(path).lower())
    return ALIASES.get(found[-1], found[-1]) if found else ""


def list_files(place):
    """The files below a folder that may be data (or the file `place`) -> {path from there: path},
    sorted. A folder that several links lead to counts once."""
    files = {os.path.basename(place): str(place)} if os.path.isfile(place) else {}
    walked = set()
    starts = [str(place)]
    for start in starts:  # grows by the links to folders, which are followed after all real ones
        for folder, inner, names in os.walk(start):
            real = os.path.realpath(folder)
            if real in walked:
                inner.clear()
                continue
            walked.add(real)
            inner[:] = [name for name in inner if not NOT_DATA.fullmatch(name)]
            names = [name for name in names if not NOT_DATA.fullmatch(name)]
            starts += filter(os.path.islink, [os.path.join(folder, name) for name in inner])
            for path in filter(os.path.isfile, [os.path.join(folder, name) for name in names]):
                relative = path[len(str(place)) + 1 :].replace(os.sep, "/")
                files[unicodedata.normalize("NFC", relative)] = path
    return dict(sorted(files.items()))


def features_in(places, data_set):
    """Yields the Features of each form that lies in places.features, without those of another
    data set, unless there are no others."""
    files = list_files(places.features)
    ours = {name: path for name, path in files.items() if data_set_of(name) in ("", data_set)}
    if data_set and any(files_of_form(form, ours, places.by_user) for form in FORMS):
        files = ours
    for form in FORMS:
        found = files_of_form(form, files, places.by_user)
        if found:
            names = {name: form.list_names(name, path) for name, path in found.items()}
            yield Features(form, found, names, [])


def files_of_form(form, files, anywhere):
    """Those of the files {path from a folder: path} that are of a form. Pictures count only in a
    folder *images or *train2014 and the like, unless anywhere is set."""
    found = {name: path for name, path in files.items() if re.search(form.ending, name.lower())}
    if form.name == "pictures" and not anywhere:
        found = {
            name: path for name, path in found.items() if re.search(PICTURE_FOLDERS, name.lower())
        }
    for name in list(found):
        if name.endswith("testall_ims.npy"):  # of which test is a part
            found.pop(name.replace("testall", "test"), None)
    return found


def choose_features(places, captions):
    """The first Features that have half of the images with captions, or else most of them; None if
    there are none. A TSV is always a candidate: its images are known only once it has been read
    whole."""
    best = None
    most = -1
    for features in features_in(places, captions.data_set):
        form = features.form
        if brings_captions(features, captions):
            return features
        if not captions.images:
            continue  # no features can be used
        counts = count_captioned(features, captions)
        count = sum(counts.values())
        features = without_unused(features, counts)
        if count and (not form.lists_all or 2 * count >= len(captions.images)):
            return features
        if count > most and (count or not form.lists_all):
            best = features
            most = count
    return best


def brings_captions(features, captions):
    """Whether these are SCAN's arrays, with captions of their own in *_caps.txt, which come before
    those of a JSON unless the user named it."""
    if features.form.name != "arrays" or captions.by_path:
        return False
    ours = [path for name, path in features.files.items() if may_be_of(name, captions)]
    have_captions = any(scan_captions_file(path).exists() for path in ours)
    return have_captions or bool(ours and not captions.images)


def count_captioned(features, captions):
    """{file: how many of its images have captions}; of a TSV how many of the first are images."""
    keys = {image.key for image in captions.images}
    counts = {}
    for file, names in features.names.items():
        if features.form.lists_all:
            names = [name for name in names if may_be_of(name, captions)]
            names = [name for name in names if may_have_captions(name, keys)]
        counts[file] = len(names)
    return counts


def without_unused(features, counts):
    """Sets aside the files that have no image of ours where others have some, and there are many in
    a file: databases of texts or of other pictures, a TSV of something else."""
    form, files, names, _ = features
    used = [file for file in files if counts[file]]
    if form.name not in ("tsv", "uniter") or not used:
        return features
    unused = [file for file in files if not counts[file]]
    return Features(
        form, {file: files[file] for file in used}, {file: names[file] for file in used}, unused
    )


def may_be_of(name, captions):
    """Whether an image's name does not tell that it belongs to another data set."""
    named = data_set_of(name)
    return named == captions.data_set or not (named and captions.data_set)


def load_captions(name, root, left_out):
    """The JSON that `name` is the path of, or dataset_NAME.json in root -> Captions; without an
    image if the latter is not there."""
    by_path = Path(name).suffix.lower() == ".json"
    path = Path(name) if by_path else root / f"dataset_{name}.json"
    data_set = data_set_of(Path(name).stem)
    if path.is_file():
        content = read_json(path, KARPATHY)
        images = read_captions(path, content, left_out)
        return Captions(path, images, data_set or data_set_of(content.get("dataset")), by_path)
    if by_path:
        raise InputError(f"{path}: no such file; {KARPATHY}")
    if Path(name).suffix or Path(name).name != str(name):
        expected = "coco, flickr30k or the path of a JSON is expected"
        raise InputError(f"{name}: {expected}; {KARPATHY}")
    return Captions(path, [], data_set, by_path)


def check_complete(places, captions, features):
    """InputError, and on stdout a checklist, unless there are captions and features."""
    if captions.images and features:
        return
    print_checklist(places, captions, captions.images)
    faults = []
    if not captions.images:
        there = [path.stem[8:] for path in sorted(places.root.glob("dataset_*.json"))]
        faults.append(f"{captions.source}: no such file")
        if there:
            faults.append(f"there are captions for --data {' or '.join(there)}")
    if not features and not [*count_features(places, captions)]:
        faults.append(no_features(places.features, captions))
    raise InputError(f"{'; '.join(faults)}; {NEEDED}")


def no_features(place, captions):
    """Says which files lie there instead."""
    endings = Counter(os.path.splitext(name)[1].lower() for name in list_files(place))
    found = [f"{times:,} {ending or 'without'}" for ending, times in endings.most_common(5)]
    found = ", ".join(found) or "none"
    whose = f" for {captions.images[0].path} and the others" if captions.images else ""
    advice = "if they lie elsewhere, point --features at them"
    return f"{place}: no region features{whose} here (file endings: {found}); {advice}"


def print_checklist(places, captions, missing):
    """Prints what a data set needs: what of it is there, and what is missing and goes where.
    missing: the images with captions that have no features."""
    if captions.images:
        print(f"found    captions: {captions.source}, {count_splits(captions.images)}")
    else:
        print(f"missing  captions: {captions.source}, of Karpathy's caption_datasets.zip")
    counts = [*count_features(places, captions)]
    for form, folder, count in counts:
        amount = f"{count:,} images" if form.lists_all else "images are counted when they are read"
        print(f"found    regions: {places.features / folder} ({form.name}), {amount}")
    if missing or not counts:
        what = count_splits(missing) or "all images"
        print(f"missing  regions: of {what}; put into {places.features}")
        print("         *.tsv (bottom-up-attention, LXMERT), *.npz or data.mdb (UNITER),")
        print("         *_precomp/ (SCAN's arrays, with captions) or images/ (pictures)")
    for folder, count in Counter(os.path.dirname(image.path) for image in missing).most_common(5):
        if folder:
            print(f"         {count:,} of them have the folder {folder} in the JSON")
    vocabulary = places.root / "vocab.txt"
    state = "found  " if vocabulary.is_file() else "missing"
    print(f"{state}  vocabulary: {vocabulary}, needed for published weights only")


def count_features(places, captions):
    """Yields (form, folder, number of images) of all features in a place."""
    for features in features_in(places, captions.data_set):
        folders = Counter()
        for file, count in count_captioned(features, captions).items():
            folders[os.path.dirname(file) or "."] += count
        for folder, count in folders.most_common(10):
            if count or not features.form.lists_all:
                yield features.form, folder, count


def may_have_captions(name, keys):
    """keys: image_key of the captioned images; if there are none, numeric names are taken for
    COCO's."""
    key = image_key(name)
    return key in keys if keys else key.isdecimal()


def count_splits(images):
    """Counts for messages: "train 113,287, val 5,000, test 5,000 images"; "" if there are no
    images."""
    times = Counter(image.split for image in images)
    counts = [f"{name} {times[name]:,}" for name in ("train", "val", "test") if times[name]]
    return f"{', '.join(counts)} images" if counts else ""


# ---- a published data set: its captions, regions and words ---------------------------------------

PHRASES = 'a list of {"caption", "tokens", "phrases": [{"tokens": [indices]}]} is expected'
CONVERSION = 1  # a store of published features that was converted otherwise is made anew
SPLITS = {"restval": "train", "dev": "val", "valid": "val", "validation": "val", "testall": "test"}
JSON_KINDS = {str: "a text", list: "a list"}
# path: with its folder. key: its image_key. where: for error messages. further: see Split.
CaptionedImage = namedtuple("CaptionedImage", "where split name path key size captions further")


def read_scan_captions(paths):
    """The images of SCAN's arrays in Karpathy's form: *_caps.txt have five lines for each."""
    images = []
    for path in paths:
        names, _ = open_array(path)
        path = scan_captions_file(path)
        lines = read_lines(path)
        if len(lines) != 5 * len(names):
            raise InputError(f"{path}: {len(lines)} lines for {len(names)} images, not five each")
        split = path.name.removesuffix("_caps.txt")
        for i, name in enumerate(names):
            sentences = [{"raw": line} for line in lines[5 * i : 5 * i + 5]]
            images.append({"filename": name, "split": split, "sentences": sentences})
    return {"images": images}


def read_captions(path, content, left_out):
    """Karpathy's form, which came from a path -> [CaptionedImage]."""
    with one_line_errors(path, KARPATHY):
        if isinstance(content, dict) and "annotations" in content:
            raise ValueError("this is COCO's own annotation file, which has no splits")
        entries = json_field(content, "images", list)
        if not entries:
            raise ValueError("no image is listed")
    images = []
    entry_of = {}  # path of a picture -> number of its entry
    for i, entry in enumerate(entries):
        where = f"{path} image {i}"
        with one_line_errors(where, SKIP, left_out):
            image = read_captioned_image(where, entry)
            if image.path in entry_of:
                first = entry_of[image.path]
                raise ValueError(f"{image.path} is listed twice, first as image {first}")
            entry_of[image.path] = i
            images.append(image)
    if not images:
        raise InputError(f"{path}: no usable image; left out: {left_out[0]}")
    return images


def read_captioned_image(where, entry):
    """One entry of Karpathy's JSON -> CaptionedImage. Training takes all captions, val and test
    five."""
    split = json_field(entry, "split", str).lower()
    split = SPLITS.get(split, split)
    if split not in ("train", "val", "test"):
        raise ValueError(f"split {split!r}; known: train, val, test, {', '.join(SPLITS)}")
    name = entry.get("filename", entry.get("cocoid"))
    if name is None:
        raise ValueError("lacks 'filename'")
    path = f"{entry.get('filepath') or ''}/{name}".replace("\\", "/").lstrip("/")
    captions = []
    for sentence in json_field(entry, "sentences", list):
        text = " ".join(json_field(sentence, "raw", str).split())
        captions.append(text if text.isprintable() or split_words(text) else "")
    if not captions or "" in captions:
        raise ValueError(f"{name} has no caption, or an empty one, in its sentences")
    taken = len(captions) if split == "train" else 5
    return CaptionedImage(
        where=where,
        split=split,
        name=str(name),
        path=unicodedata.normalize("NFC", path),
        key=image_key(name),
        size=(entry.get("width"), entry.get("height")),
        captions=captions[:taken],
        further=captions[taken:],
    )


def json_field(entry, name, kind):
    """entry[name] of a JSON object. ValueError if it is missing or of another kind."""
    if not isinstance(entry, dict):
        raise ValueError(f"{json.dumps(entry)[:60]} is no object with a field {name!r}")
    if name not in entry:
        raise ValueError(f"lacks {name!r}")
    if not isinstance(entry[name], kind):
        found = json.dumps(entry[name])[:60]
        raise ValueError(f"{name!r} is {found}; {JSON_KINDS[kind]} is expected")
    return entry[name]


def load_regions(places, captions, features, skip_bad, store, elsewhere):
    """The region store of these files, made first unless one of the same files is there."""
    form, files, names_in, _ = features
    left_out = [] if skip_bad else None
    sizes = known_sizes(captions.images)
    names_listed = [name for names in names_in.values() for name in names]

    def convert():
        if form.lists_all:
            match_all(places, captions, names_listed, [] if skip_bad else None)
        return usable_regions()

    def usable_regions():
        """What the reader finds and is right; of one name the first."""
        names = set()
        width = None
        for name, where, read in form.reader(files, sizes):
            with one_line_errors(where, SKIP, left_out):
                if name not in names:
                    features, boxes = check_regions(**read())
                    width = width or features.shape[1]
                    if features.shape[1] != width:
                        raise ValueError(f"features are {features.shape[1]} wide, not {width}")
                    yield name, features, boxes
                    names.add(name)
        if not names:
            first = left_out and left_out[0]
            raise InputError(f"{places.features}: not one usable image; left out: {first}")

    paths = [*files.values()]
    if form.name == "uniter":  # how many regions count may lie beside them
        paths += filter(None, map(region_counts_file, files.values()))
    stats = [(os.path.getsize(path), os.path.getmtime(path)) for path in paths]
    if form.name == "arrays":  # the names of the images may lie beside them
        stats += names_in.values()
    place = os.path.abspath(places.features)
    source = [CONVERSION, form.name, place, list(files), stats, sizes]
    total = len(names_listed) if form.lists_all else len(captions.images)
    regions = open_regions(store, source, convert, left_out, elsewhere, total)
    if regions.left_out and not skip_bad:
        raise InputError(f"{regions.left_out[0]}; {SKIP}")
    return regions


def known_sizes(images):
    """{image_key: (width, height)} of the images whose key no other has."""
    times = Counter(image.key for image in images)
    known = [image for image in images if None not in image.size and times[image.key] == 1]
    return {image.key: image.size for image in known}


def match_images(captions, names, left_out):
    """Finds for each image with captions its features among images of these names -> [(image,
    number in names)], and the images that have none. Where base names (image_key) are not unique,
    the folders must agree."""
    rows_of = {}  # image_key -> numbers in names
    for row, name in enumerate(names):
        if may_be_of(name, captions):
            rows_of.setdefault(image_key(name), []).append(row)
    times = Counter(image.key for image in captions.images)
    used = set()
    matched = []
    missing = []
    for image in captions.images:
        with one_line_errors(image.where, SKIP, left_out):
            rows = rows_of.get(image.key, [])
            if len(rows) > 1 or times[image.key] > 1:
                rows = in_same_folder(image.path, rows, names)
            if len(rows) > 1 or (rows and rows[0] in used):
                found = " and ".join(names[row] for row in rows[:2])
                fault = f"{image.path}: more than one match, or one taken twice ({found})"
                raise ValueError(f"{fault}; give the folder in 'filepath'")
            if rows:
                used.add(rows[0])
                matched.append((image, rows[0]))
            else:
                missing.append(image)
    return matched, missing


def match_all(places, captions, names, left_out):
    """As match_images, but images without features are lines in left_out or, without such a list
    or if no image has any, an InputError, with a checklist on stdout."""
    matched, missing = match_images(captions, names, left_out)
    lines = [
        f"{image.where}: captions without features: no {image.path} in {places.features}"
        for image in missing
    ]
    if missing and (left_out is None or not matched):
        print_checklist(places, captions, missing)
        advice = "get them, or pass --skip-bad to leave them out"
        raise InputError(f"{lines[0]}; {count_splits(missing)} have none: {advice}")
    if left_out is not None:
        left_out += lines
    return matched


def in_same_folder(path, rows, names):
    """The rows whose name ends in that path; if there are none, in its folder."""
    folder = os.path.dirname(f"/{path}").rstrip("/")
    same = [row for row in rows if f"/{names[row]}".endswith(f"/{path}")]
    return same or [row for row in rows if os.path.dirname(f"/{names[row]}").endswith(folder)]


def make_splits(matched, phrases):
    """[(CaptionedImage, row in the store)] -> {split: Split}. phrases: see read_phrases."""
    splits = {}
    for image, row in matched:
        split = splits.setdefault(image.split, Split([], [], [], [], []))
        if image.further:
            split.further[len(split.images)] = image.further
        split.image_of_caption += [len(split.images)] * len(image.captions)
        split.images.append(image.name)
        split.rows.append(row)
        split.captions += image.captions
        split.phrases += [phrases.get(caption) for caption in image.captions]
    for split in splits.values():
        split.rows = np.array(split.rows)
        split.image_of_caption = torch.tensor(split.image_of_caption)
    return splits


def read_phrases(path):
    """--phrases FILE -> {caption: [[positions in split_words(caption)]]}. The file may cut words
    otherwise (can't: ca n't, or can ' t): tokens and words are matched by their letters."""
    table = {}
    with one_line_errors(path, PHRASES):
        for i, entry in enumerate(read_json(path, PHRASES)):
            with one_line_errors(f"{path} entry {i}", PHRASES):
                caption = " ".join(entry["caption"].split())
                words = split_words(caption)
                letters = np.repeat(range(len(words)), [len(word) for word in words])
                tokens = ["".join(split_words(token)) for token in entry["tokens"]]
                if "".join(tokens).lower() != "".join(words).lower():
                    raise ValueError("tokens do not spell the caption")
                words_of_token = np.split(letters, np.cumsum([len(token) for token in tokens]))
                table[caption] = []
                for phrase in entry["phrases"]:
                    if not all(0 <= token < len(tokens) for token in phrase["tokens"]):
                        raise ValueError(f"phrase {phrase['tokens']} of {len(tokens)} tokens")
                    found = np.concatenate([words_of_token[token] for token in phrase["tokens"]])
                    table[caption].append(np.unique(found).tolist())
    return table


def find_tokens(root, tokens, vocab, vocab_size):
    """The tokens of a checkpoint, of vocab.txt in root or of the file vocab; None = of none.
    vocab_size: how many there must be; None = any number."""
    if tokens is not None:
        return tokens
    found = []
    for path in (root / "vocab.txt", vocab):
        if path is not None and (path == vocab or path.is_file()):
            tokens = read_lines(path)
            if vocab_size in (None, len(tokens)):
                return tokens
            found.append(f"{path} has {len(tokens):,}")
    if vocab_size is not None:
        there = "; ".join(found) or f"there is no {root / 'vocab.txt'}"
        advice = "put the vocab.txt that the weights were trained with into that folder"
        raise InputError(f"{root}: the weights know {vocab_size:,} tokens, but {there}; {advice}")
    return None


def make_tokenizer(root, splits, tokens, lowercase, notes):
    """A WordPiece of these tokens; None = of the words of the training captions."""
    if tokens is None:
        if "train" not in splits:
            raise InputError(f"{root}: no training captions to find words in, and no vocab.txt")
        tokens = build_vocabulary(splits["train"].captions, min_count=3)
        if len(tokens) < 100 + len(SPECIALS):
            tokens = build_vocabulary(splits["train"].captions, min_count=1)
            notes.append(f"few captions: {len(tokens)} tokens are known, rare words among them")
    if lowercase is None:
        lowercase = not any(re.match("(##)?[A-Z]", token) for token in tokens)
    return WordPiece(tokens, lowercase)


def check_texts(data):
    """Notes how much of the captions is unknown to the tokenizer or cut off. InputError if more
    than half of a split is unknown."""
    room = data.max_text - 2  # without [CLS] and [SEP]
    if room < 1:
        raise InputError(f"a text of {data.max_text} tokens has no room for a word")
    cut = 0
    texts_of = {}  # tokens after the cut -> the different texts that become them
    for name, split in data.splits.items():
        total = 0
        unknown = 0
        for caption in split.captions:
            ids = data.tokenizer.encode(caption)
            total += len(ids)
            unknown += ids.count(data.tokenizer.unk_id)
            cut += len(ids) > room
            if len(ids) >= room:
                texts_of.setdefault(tuple(ids[:room]), set()).add(tuple(ids))
        if unknown > 0.01 * total:
            text = f"{unknown / total:.0%} of the tokens in captions of {name} are unknown"
            data.notes.append(text)
        if unknown > 0.5 * total:
            vocabulary = f"the vocabulary of {len(data.tokenizer.tokens):,} tokens"
            raise InputError(f"{data.name}: {text} to {vocabulary}; is it of another language?")
    if cut:
        same = sum(len(texts) for texts in texts_of.values() if len(texts) > 1)
        text = f"{cut:,} captions are longer than {data.max_text} tokens and cut off"
        data.notes.append(f"{text}; {same:,} captions are equal to another one then")


def load_data(
    name,
    root=None,
    features=None,
    phrases=None,
    skip_bad=False,
    tokens=None,
    store="data",
    elsewhere=(),
    vocab=None,
    vocab_size=None,
    lowercase=None,
    max_text=64,
    needed=(),
):
    """A published data set in whatever form lies under root -> Data. Raises InputError; if files
    are missing, it says so before anything is converted, with a checklist on stdout.
    name: "coco", "flickr30k", or the path of a JSON of Karpathy's form (root: its folder).
    features: file or folder of the region features, if not below root. phrases: see read_phrases.
    skip_bad: leave out what cannot be used, counted in Data.notes.
    tokens: of a checkpoint. store, elsewhere: folders, see open_regions.
    vocab: path of a vocab.txt for a root without one. vocab_size: of the weights; the vocabulary
        must have as many tokens. lowercase: of the tokenizer; None = as the tokens look.
    max_text: see Data. needed: names of splits that must be there."""
    root = Path(root or Path(name).parent)
    places = Places(root, Path(features or root), bool(features))
    left_out = [] if skip_bad else None
    with without_warnings_and_gc():
        captions, found = find_data_set(name, places, left_out)
        check_splits(captions.source, captions.images, needed)
        tokens = find_tokens(root, tokens, vocab, vocab_size)
        table = read_phrases(phrases) if phrases else {}
        regions = load_regions(places, captions, found, skip_bad, store, elsewhere)
        matched = match_all(places, captions, regions.names, left_out)
        with_features = [image for image, _ in matched]
        check_splits(f"{captions.source} with {places.features}", with_features, needed)
        splits = make_splits(matched, table)
        notes = [
            f"captions from {captions.source}, regions from {places.features} ({found.form.name})"
        ]
        notes += note_parts(splits, found, phrases, regions, left_out)
        tokenizer = make_tokenizer(root, splits, tokens, lowercase, notes)
        data = Data(str(name), tokenizer, regions, splits, max_text, notes)
        check_texts(data)
    return data


def note_parts(splits, found, phrases, regions, left_out):
    """Notes what was left out, and which captions have given phrases."""
    notes = []
    if found.unused:
        names = ", ".join(found.unused[:4])
        text = f"not read, since none of their images has captions: {names}"
        notes.append(f"{text} ({len(found.unused):,} in all)")
    if phrases:
        known = [entry is not None for split in splits.values() for entry in split.phrases]
        notes.append(f"phrases of {sum(known):,} of {len(known):,} captions from {phrases}")
    for what, lines in (("regions", regions.left_out), ("captions", left_out)):
        if lines:
            notes.append(f"{what}: left out {len(lines):,} images, the first: {lines[0]}")
    further = sum(len(texts) for split in splits.values() for texts in split.further.values())
    if further:
        text = f"{further:,} captions of val and test left out, beyond the fifth of their image"
        notes.append(f"{text}; none of them counts as false")
    return notes


def check_splits(where, images, needed):
    """InputError unless there is an image of each of these splits. where: they come from."""
    for split in needed:
        if all(image.split != split for image in images):
            there = count_splits(images)
            raise InputError(f"{where}: no image of the {split} split, but {there}")


@contextlib.contextmanager
def without_warnings_and_gc():
    """What is read is checked, so no warning is needed; and the garbage collector's walks over
    millions of captions took three quarters of the time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        was_enabled = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if was_enabled:
                gc.enable()


def find_data_set(name, places, left_out):
    """The Captions and Features of a data set, read as far as names go. Raises InputError."""
    for folder in (places.root, places.features):
        if not folder.exists():
            raise InputError(f"{folder}: no such file or folder; {NEEDED}")
    captions = load_captions(name, places.root, left_out)
    features = choose_features(places, captions)
    if features and brings_captions(features, captions):
        content = read_scan_captions(features.files.values())
        images = read_captions(places.features, content, left_out)
        captions = captions._replace(source=places.features, images=images)
    check_complete(places, captions, features)
    return captions, features


# ---- the embedded world ------------------------------------------------------------------------
# Pictures of two to four drawn things, captions by a grammar of one sentence, and an exact oracle,
# which training never sees:
#     describes("a small red star above a blue ring", scene) -> True, False or None


def read_table(text):
    """{word: (the numbers that follow it)}"""
    rows = re.findall(r"([a-z]+)([0-9 ]+)", text)
    return {word: tuple(int(number) for number in numbers.split()) for word, numbers in rows}


COLOURS = read_table(
    "red 222 45 45  yellow 248 208 40  green 45 160 75  blue 45 85 215  "
    "purple 140 60 190  pink 250 140 195  cyan 60 200 225  brown 150 90 45"
)
BACKGROUNDS = read_table("white 247 247 244  grey 168 171 178  black 26 27 32  beige 228 208 172")
SIZES = {"small": 0.08, "large": 0.155}  # half the width, as a share of the picture

# Outlines: x and y of corners, one after the other, in 0..100; x to the right and y down.
ANGLES = np.arange(48) * np.pi / 24
CIRCLE = np.stack([np.cos(ANGLES), np.sin(ANGLES)], 1).ravel()
HEART = 13 * np.cos(ANGLES) - 5 * np.cos(2 * ANGLES) - 2 * np.cos(3 * ANGLES) - np.cos(4 * ANGLES)
HEART = np.stack([50 + 50 * np.sin(ANGLES) ** 3, 43 - 3.25 * HEART], 1).ravel()
OUTLINES = dict.fromkeys(("circle", "ring", "moon"), 50 + 50 * CIRCLE) | {"heart": HEART}
OUTLINES |= read_table(
    "square 5 5  95 5  95 95  5 95 "
    "diamond 50 0  100 50  50 100  0 50 "
    "triangle 50 0  100 100  0 100 "
    "house 50 0  100 50  85 50  85 100  15 100  15 50  0 50 "
    "tree 50 0  80 40  65 40  100 80  60 80  60 100  40 100  40 80  0 80  35 40  20 40 "
    "fish 0 50  20 26  44 20  72 40  100 15  100 85  72 60  44 80  20 74 "
    "cross 30 0  70 0  70 30  100 30  100 70  70 70  70 100  30 100  30 70  0 70  0 30  30 30 "
    "star 50 0  62 36  100 38  70 62  80 100  50 78  20 100  30 62  0 38  38 36"
)
HOLES = {"ring": 50 + 26 * CIRCLE, "moon": np.tile([80, 38], 48) + 44 * CIRCLE}

# Words of one kind may stand for each other; a relation counts by its telling word.
KINDS = {
    "size": (*SIZES,),
    "pattern": ("plain", "striped", "dotted", "checked"),
    "colour": (*COLOURS,),
    "shape": (*OUTLINES,),
    "background": (*BACKGROUNDS,),
    "relation": ("left", "right", "above", "below", "and"),
}
RELATIONS = ("left of", "right of", "above", "below", "and")
INVERSE = dict(zip(RELATIONS, ("right of", "left of", "below", "above", "and")))

# The grammar: two noun phrases and a relation, with an optional "there is" before or a background
# after.
ADJECTIVES = "".join(f"(?: (?:{'|'.join(KINDS[kind])}))?" for kind in ("size", "pattern", "colour"))
NOUN = f"a{ADJECTIVES} (?:{'|'.join(KINDS['shape'])})"
SENTENCE = re.compile(
    rf"(?P<start>there is )?(?P<first>{NOUN}) (?P<relation>{'|'.join(RELATIONS)}) "
    rf"(?P<second>{NOUN})(?P<end> on a (?P<background>{'|'.join(BACKGROUNDS)}) background)?"
)

WORLD = 3  # a store of another world is made anew
Thing = namedtuple("Thing", "size pattern colour shape x y")
Scene = namedtuple("Scene", "objects background")  # a list of Things, a word


def direction(a, b):
    """Where thing a is, seen from b: the one definition, for writer and oracle."""
    across = b.x - a.x
    down = b.y - a.y
    if abs(across) > abs(down):
        return "left of" if across > 0 else "right of"
    return "above" if down > 0 else "below"


def describes(caption, scene):
    """The oracle: True or False, whether a sentence is true of a scene; None if it is none."""
    sentence = SENTENCE.fullmatch(caption)
    if sentence is None:
        return None
    if sentence["background"] not in (None, scene.background):
        return False
    first = set(sentence["first"].split()[1:])
    second = set(sentence["second"].split()[1:])
    for a, b in itertools.permutations(scene.objects, 2):
        fit = first <= set(a[:4]) and second <= set(b[:4])
        if fit and sentence["relation"] in ("and", direction(a, b)):
            return True
    return False


def paraphrase(caption):
    """The same statement with the things swapped: "B right of A" for "A left of B". None if that
    changes nothing or the caption is no sentence."""
    sentence = SENTENCE.fullmatch(caption)
    if sentence is None:
        return None
    turned = f"{sentence['second']} {INVERSE[sentence['relation']]} {sentence['first']}"
    turned = (sentence["start"] or "") + turned + (sentence["end"] or "")
    return None if turned == caption else turned


def phrases_of(caption):
    """Word positions of what can be masked: shapes, adjectives, backgrounds, whole relations."""
    phrases = []
    for n, word in enumerate(caption.split()):
        if word == "of":
            phrases[-1].append(n)
        elif any(word in words for words in KINDS.values()):
            phrases.append([n])
    return phrases


def well_placed(things):
    """True if things lie in the picture, apart, and no direction is in doubt."""
    for thing in things:
        room = 1.15 * SIZES[thing.size]
        if not (room < thing.x < 1 - room and room < thing.y < 1 - room):
            return False
    for a, b in itertools.combinations(things, 2):
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
    """Two to four things; often two share a colour or a shape, so one word is not enough."""
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
    """The scene with one attribute or the place of one thing changed, or two places swapped."""
    while True:
        a, b = rng.sample(scene.objects, 2)
        change = rng.choice(("size", "pattern", "colour", "shape", "place", "swap"))
        new = random_thing(rng)
        if change == "swap":
            changed = {a: a._replace(x=b.x, y=b.y), b: b._replace(x=a.x, y=a.y)}
        elif change == "place":
            changed = {a: a._replace(x=new.x, y=new.y)}
        else:
            changed = {a: a._replace(**{change: getattr(new, change)})}
        things = [changed.get(thing, thing) for thing in scene.objects]
        if things != scene.objects and well_placed(things):
            return Scene(things, scene.background)


def write_caption(rng, scene):
    """A true sentence about two things of a scene; each adjective is mentioned or not."""
    a, b = rng.sample(scene.objects, 2)
    relation = "and" if rng.random() < 0.15 else direction(a, b)
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


def five_captions(rng, scene, family):
    """Five captions that are true of no other scene of the family; None if 200 tries find fewer."""
    others = [other for other in family if other is not scene]
    captions = []
    for _ in range(200):
        caption = write_caption(rng, scene)
        if caption not in captions and not any(describes(caption, other) for other in others):
            captions.append(caption)
        if len(captions) == 5:
            return captions
    return None


def make_scenes(seed, split, size):
    """[(scene, five captions)] of a split; in val and test four near-twins follow each scene."""
    rng = random.Random(f"{seed} {split}")
    made = []
    while len(made) < size:
        family = [random_scene(rng)]
        while split != "train" and len(family) < 5:
            family.append(near_twin(rng, family[0]))
        captions = [five_captions(rng, scene, family) for scene in family]
        if None not in captions:
            made += zip(family, captions)
    return made[:size]


def draw(scene, size=112):
    """The picture of a scene, size x size pixels; drawn three times as large and reduced."""
    sheet = Image.new("RGB", (3 * size, 3 * size), BACKGROUNDS[scene.background])
    for thing in scene.objects:
        width = round(2 * SIZES[thing.size] * sheet.width)
        x = np.arange(width) * 4 / width % 2  # a pattern repeats every two of four columns or rows
        y = x[:, None]
        dark = {
            "plain": y < 0,
            "striped": y % 1 >= 0.5,
            "dotted": np.hypot(x % 1 - 0.5, y % 1 - 0.5) < 0.3,
            "checked": (x >= 1) != (y >= 1),
        }
        dark = np.broadcast_to(dark[thing.pattern], (width, width))[..., None]
        bright = np.array(COLOURS[thing.colour])
        paint = np.where(dark, np.uint8(11 * bright // 20), np.uint8(bright))

        mask = Image.new("L", (width, width))  # what the thing covers
        pen = ImageDraw.Draw(mask)
        pen.polygon([place * width / 100 for place in OUTLINES[thing.shape]], fill=255)
        if thing.shape in HOLES:
            pen.polygon([place * width / 100 for place in HOLES[thing.shape]], fill=0)
        corner = [round(place * sheet.width - width / 2) for place in (thing.x, thing.y)]
        sheet.paste(Image.fromarray(paint), tuple(corner), mask)
    return sheet.reduce(3)


def scene_regions(seed, splits):
    """Yields (name, features (R, F), boxes (R, 4)), from the pixels alone: the whole picture, then
    a loose box around each thing, in random order."""
    rng = random.Random(f"{seed} boxes")
    for split in splits.values():
        for name, scene in zip(split.images, split.scenes):
            boxes = []
            for thing in scene.objects:
                size = SIZES[thing.size]
                reach = size * rng.uniform(1.1, 1.2)
                x = thing.x + size * rng.uniform(-0.06, 0.06)
                y = thing.y + size * rng.uniform(-0.06, 0.06)
                boxes.append([x - reach, y - reach, x + reach, y + reach])
            rng.shuffle(boxes)
            boxes = np.concatenate([WHOLE, boxes]).clip(0, 1)
            yield name, describe_crops(draw(scene), boxes), boxes


def load_scenes(seed, sizes, store, tokens=None, elsewhere=(), max_text=64):
    """The embedded world as Data. sizes: images in train, val, test; the others as in load_data."""
    splits = {}
    for n, name in enumerate(("train", "val", "test")):
        made = make_scenes(seed, name, sizes[n])
        captions = [caption for _, five in made for caption in five]
        splits[name] = Split(
            images=[f"{name}_{i:04d}" for i in range(len(made))],
            rows=sum(sizes[:n]) + np.arange(len(made)),
            captions=captions,
            image_of_caption=torch.arange(len(made)).repeat_interleave(5),
            phrases=[phrases_of(caption) for caption in captions],
            scenes=[scene for scene, _ in made],
        )
    source = ["scenes", WORLD, seed, *sizes]
    regions = open_regions(
        store, source, lambda: scene_regions(seed, splits), elsewhere=elsewhere, total=sum(sizes)
    )
    tokens = tokens or build_vocabulary(splits["train"].captions, min_count=1)
    data = Data("scenes", WordPiece(tokens, lowercase=True), regions, splits, max_text)
    check_texts(data)
    return data


def describe_crops(picture, boxes):
    """Appearance of boxes (R, 4) of an RGB picture -> (R, 339). In a crop of 24 x 24 pixels, what
    differs from the border is taken for the thing: 144 numbers tell its silhouette, 64 its
    colours, 64 those around it, 49 its pattern, 18 its extent."""
    corners = boxes * [*picture.size, *picture.size]
    crops = [picture.resize((24, 24), Image.BOX, tuple(box)) for box in corners]
    crops = np.stack([np.asarray(crop, np.float32) for crop in crops]) / 255  # (R, 24, 24, 3)
    border = np.pad(np.zeros((22, 22), bool), 1, constant_values=True)
    ground = np.median(crops[:, border], 1)  # (R, 3)
    inside = (4 * np.abs(crops - ground[:, None, None]).max(-1)).clip(0, 1)  # (R, 24, 24)
    silhouette = inside.reshape(-1, 12, 2, 12, 2).mean((2, 4)).reshape(-1, 144)
    # Shares of four levels of red, green and blue, so that a colour is a point of 64.
    levels = (1 - np.abs(3 * crops[..., None] - np.arange(4))).clip(0).reshape(-1, 576, 3, 4)
    red, green, blue = levels.transpose(2, 0, 1, 3)  # (R, 576, 4) each
    pairs = (red[..., None] * green[..., None, :]).reshape(-1, 576, 16)
    share = inside.reshape(-1, 576, 1)
    own = (pairs * share).transpose(0, 2, 1) @ blue / share.sum(1, keepdims=True).clip(1)
    around = (pairs * (1 - share)).transpose(0, 2, 1) @ blue / 576
    # How alike is the light at places 0 to 6 pixels apart: it tells a pattern wherever it begins.
    light = crops.mean(-1)
    mean = (light * inside).sum((1, 2)) / inside.sum((1, 2)).clip(1)
    light = (light - mean[:, None, None]) * inside
    waves = np.abs(np.fft.rfft2([light, inside], (32, 32))) ** 2
    both = np.fft.irfft2(waves)[..., :7, :7]  # (2, R, 7, 7)
    alike = both[0] / (both[1] + 10)
    alike = (alike / (alike[:, :1, :1] + 5e-4)).reshape(-1, 49)
    # What share of the picture the crop takes, across and down: between which eighths.
    sides = boxes[:, 2:] - boxes[:, :2]
    extent = (1 - np.abs(8 * sides[..., None] - np.arange(9))).clip(0).reshape(-1, 18)
    # Roots and weights: each part spreads as widely as the silhouette does, so that none is louder.
    own, around = np.sqrt(own).reshape(-1, 64), np.sqrt(around).reshape(-1, 64)
    return np.concatenate([silhouette - 0.5, 5 * own, 4 * around, 2 * alike, 3 * extent], 1)
