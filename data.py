"""The data of TAGS-DC: captions as token ids and phrases, pictures as region features; published data sets and made ones.
In this order: words and word pieces (WordPiece), phrases of a caption (parse_phrases), the region store (write_regions, Regions), data sets
and their batches (Data), published region features (check_regions), a data set on disk (load_data), the embedded world (load_scenes).
Letters: B images or captions of a batch, T tokens, R regions, F feature size, P phrases, C captions, I images.
Masks are True where something real stands. Boxes are x1 y1 x2 y2 as shares of the picture, y down."""
from collections import Counter, namedtuple
from dataclasses import dataclass
from pathlib import Path
import binascii
import contextlib
import functools
import itertools
import json
import math
import os
import random
import re
import sys
import time
import unicodedata

from PIL import Image
import numpy as np
import torch

class InputError(ValueError):
    """Bad input. Its text is one line: what is wrong, where (file, row or image, field), how to mend it."""

@contextlib.contextmanager
def _blame(where, left_out=None, mend="mend it, or pass --skip-bad to leave it out"):
    """Whatever goes wrong inside becomes an InputError of one line that names where, or an entry of the list left_out."""
    try:
        yield
    except Exception as e:                               # numpy, Pillow, zipfile and base64 raise a dozen kinds
        what = " ".join(f"{where}: {'' if type(e) in (ValueError, InputError) else type(e).__name__} {e}".split())
        if left_out is None:
            raise (e if type(e) is InputError else InputError(f"{what}; {mend}")) from None
        left_out.append(what)

def _read(path, parse=lambda text: text.rstrip("\n").split("\n"), mend="a whole UTF-8 text file is expected here"):
    with _blame(path, mend=mend):
        return parse(Path(path).read_text(encoding="utf-8"))

def write_atomically(path, write):
    """write(temporary path), then take the name: a killed run leaves the old file or the new one, never half of one."""
    write(path.with_name(path.name + ".part"))
    os.replace(path.with_name(path.name + ".part"), path)

def _remember(path, key, make, again=False):
    """The JSON value of make(), or what the file `path` holds of it since the last call, if that had the same key."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):       # no such file, or a harmed one
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["key"] == key and not again:
            return kept["value"]
    text = json.dumps({"key": key, "value": make()})
    write_atomically(path, lambda part: part.write_text(text, encoding="utf-8"))
    return json.loads(text)["value"]                     # of the same types as later

# ---- words and word pieces -------------------------------------------------------------------------------------------
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
CJK = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002ceaf\U0002f800-\U0002fa1f]")

@functools.lru_cache(1 << 18)
def _cut(chunk):
    """Text without spaces -> its words: punctuation and CJK characters stand alone, as BERT has it."""
    marks = [not c.isalnum() if c.isascii() else unicodedata.category(c)[0] == "P" or CJK.match(c) for c in chunk]
    return "".join(f" {c} " if mark else c for c, mark in zip(chunk, marks)).split()

def split_words(text):
    """Caption -> words and punctuation marks, case kept. WordPiece.encode(text) is the words' pieces, concatenated."""
    if not (text.isascii() and text.isprintable()):      # drop control characters, make every space a plain one
        kinds = [(c, "Zs" if c in "\t\n\r" else unicodedata.category(c)) for c in text if c != "\ufffd"]
        text = "".join(" " if kind == "Zs" else c for c, kind in kinds if kind[0] != "C")
    return [word for chunk in text.split() for word in _cut(chunk)]

def _plain(word):
    """Lower case without accents; letter by letter as BERT does, so no final sigma."""
    letters = unicodedata.normalize("NFD", "".join(c.lower() for c in word))
    return "".join(c for c in letters if c.isascii() or unicodedata.category(c) != "Mn")

class WordPiece:
    """BERT's tokenizer: words are cut greedily into the longest known pieces; later pieces of a word start with ##.
    vocab: path of a BERT vocab.txt (one token a line, id = line number) or a list of tokens. Raises InputError.
    word_range: first and behind-last id that may be masked and sampled; those below are special or [unused]."""
    def __init__(self, vocab, lowercase):
        self.tokens, self.lowercase = vocab if isinstance(vocab, list) else _read(vocab), lowercase
        self.ids, self._cache = {token: i for i, token in enumerate(self.tokens)}, {}
        if not self.ids.keys() >= set(SPECIALS):
            raise InputError(f"{str(vocab)[:99]}: a vocabulary needs {' '.join(SPECIALS)}; give BERT's vocab.txt")
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = (self.ids[token] for token in SPECIALS)
        words = (i for i, token in enumerate(self.tokens) if token not in SPECIALS and token[:7] != "[unused")
        self.word_range = next(words, len(self.tokens)), len(self.tokens)

    def pieces(self, word):
        """One word of split_words -> its ids (several where it is cut; none if nothing visible is left of it)."""
        if word not in self._cache:
            parts = _cut(_plain(word)) if self.lowercase else [word]
            self._cache[word] = [i for part in parts for i in self._longest_match(part)]
        return self._cache[word]

    def _longest_match(self, word):
        ids, rest = [], word
        while rest and len(word) <= 100:
            end = next((end for end in range(len(rest), 0, -1) if "##" * bool(ids) + rest[:end] in self.ids), len(rest))
            ids.append(self.ids.get("##" * bool(ids) + rest[:end], self.unk_id))
            rest = rest[end:]
        return ids if ids and self.unk_id not in ids else [self.unk_id]

    def encode(self, text):
        """Text -> list of ids, without [CLS] and [SEP]."""
        return [i for word in split_words(text) for i in self.pieces(word)]

    def decode(self, ids):
        """Ids -> readable text: pieces joined, [PAD] [CLS] [SEP] dropped."""
        return " ".join(self.tokens[i] for i in map(int, ids) if i not in (self.pad_id, self.cls_id, self.sep_id)).replace(" ##", "")

def build_vocabulary(captions, min_count):
    """The special tokens, then every word seen min_count times, frequent first, ties by alphabet (lower case)."""
    counts = Counter(part for text in captions for word in split_words(text) for part in _cut(_plain(word)))
    return SPECIALS + sorted((w for w, n in counts.items() if n >= min_count), key=lambda w: (-counts[w], w))

# ---- phrases of a caption --------------------------------------------------------------------------------------------
# Tags: X in no phrase (articles, pronouns, conjunctions, auxiliaries, adverbs), P preposition, A frequent adjective or number, V frequent
# verb form. Other words go by their ending, and what is left is a noun (N).
TAGS = {word: tag for tag, text in {
    "X": """a all an another both each either few half her his its many more most much no other others own same several some the their these
    this those my our your and as but how if or so that though what when where while he here herself him himself i it itself me she someone
    something them there they us we you which who ahead almost also apart away backwards forward just not outdoors indoors overhead sideways
    still together too upside very well yet 're 's n't am are be been being can do does has have had is may was were will would could""",
    "P": """about above across after against along alongside among around at atop before behind below beneath beside between by down during for
    from in inside into like near of off on onto out outside over past through to toward towards under underneath up upon with within without""",
    "A": """adult alone antique asian asleep assorted back big black blue blurry bottom bright broken brown busy checkered clean clear
    cloudy colored colorful concrete crowded cute dark different dirty double dry eight elderly empty fast female five flat four french
    fresh front full furry giant gold grassy gray great green grey happy hard high hot huge large left light little lone long low lush male
    middle military mini modern multi multiple narrow nearby new next nice old older one open orange outdoor pink plain polar pretty purple
    ready red right ripe rocky round sandy seated silver single six small snowy square striped sunny tall tan three tiny top two various
    vintage wet white wide wild wooden yellow young""",
    "V": """built catch caught come contain cover cut drawn drive eat eaten enjoy fall feature fill fly get go hang held hold hung include
    jump laid lay lean lie lit look made make park pass play pull ride run say see seen set show shown sit ski stand surf swing take taken
    talk throw thrown try use wait walk watch wear worn"""}.items() for word in text.split()}
COMPLEX = re.compile(r"(in (the )?(middle|center|front|back) of|on (top|the side) of|next to|close to|(out|off|ahead) of|(in|out)side of|"
                     r"in between|(in|on) to|because of|away from)\b")

def _tag(word):
    """The tag of a word by itself; of words with hyphens the last part decides."""
    word = word.rsplit("-", 1)[-1] or word
    if word in TAGS or not any(map(str.isalpha, word)):
        return TAGS.get(word, "A" if word.isdigit() else "X")
    if len(word) > 4 and word.endswith(("ing", "ed")) or "V" in (TAGS.get(word.removesuffix("s")), TAGS.get(word.removesuffix("es"))):
        return "V"
    return "X" if word.endswith("ly") else "A" if re.search(r"..(ful|less|ous|ish|[ai]ble|ive|ic|al)$", word) else "N"

def parse_phrases(words):
    """Words -> [(type, [word positions])], in order, disjoint: objects are nouns with the nouns before them; attributes adjectives, numbers
    and participles, each alone; relations verbs with their prepositions, and prepositions between objects. Other words are never masked.
    >>> parse_phrases("A black dog is jumping over a fire hydrant".split())
    [('attribute', [1]), ('object', [2]), ('relation', [4, 5]), ('object', [7, 8])]"""
    low, spans, phrases, i = [], [], [], 0               # words joined by hyphens count as one
    for n, word in enumerate(word.lower() for word in words):
        if 0 < n < len(words) - 1 and word == "-" or n > 1 and words[n - 1] == "-":
            low[-1], spans[-1] = low[-1] + word, [*spans[-1], n]
        else:
            low.append(word), spans.append([n])
    tags = [*map(_tag, low), "X", "X", "X"]
    for n, word in enumerate(low):                       # the same in context: a running dog, a painting; stop signs; the young
        participle, last, after = word.endswith(("ing", "ed")), tags[n - 1] if n else "P", tags[n + 1]
        article = n > 0 and low[n - 1] in ("a", "an", "the", "his", "her", "their", "its", "some")
        if tags[n] == "V" and (last == "A" or article):
            tags[n] = "A" if participle and after == "N" else "N"
        elif tags[n] == "V" and last in "PX" and word.endswith("ed") and after == "N":
            tags[n] = "A"
        elif tags[n] == "A" and after in "PX" and (article or n and last == "P") or (
                tags[n] == "V" and last == "N" and not participle and word[-1] not in "sn" and low[n - 1][-1] not in "sn"):
            tags[n] = "N"

    def preposition(j):                                  # how many words, 0 if none
        several = COMPLEX.match(" ".join(low[j:j + 4]))
        return len(several[0].split()) if several else tags[j] == "P"
    while i < len(low):
        j, kind = i + max(preposition(i), 1), {"N": "object", "A": "attribute", "V": "relation"}.get(tags[i])
        if preposition(i):                               # between objects: a man in a hat, a tool for cutting
            following = next((tag for tag, word in zip(tags[j:], low[j:]) if tag not in "XA" or word == "."), "X")
            kind = "relation" if "N" in tags[:i] and following in "NV" else None
        elif tags[i] == "N":
            j = next(k for k in range(i, len(tags)) if tags[k] != "N")
        while kind and tags[i] == "V" and preposition(j) and low[j:j + 1] + [tags[j + 1]] != ["to", "V"]:
            j += preposition(j)
        phrases += [(kind, [p for span in spans[i:j] for p in span])] if kind else []
        i = j
    return phrases

def read_phrases(path):
    """--phrases FILE: [{"caption", "tokens", "phrases": [{"tokens": [indices]}]}] -> {caption: (words, positions)}.
    The file may cut words otherwise than we do (can't: ca n't, or can ' t), so tokens and words are matched by their letters."""
    table, mend = {}, 'a list of {"caption", "tokens", "phrases": [{"tokens": [indices]}]} is expected'
    for i, entry in enumerate(_read(path, lambda text: list(json.loads(text)), mend)):
        with _blame(f"{path} entry {i}", mend=mend):
            words, groups = split_words(entry["caption"]), [set(phrase["tokens"]) for phrase in entry["phrases"] if phrase["tokens"]]
            letters = [t for t, token in enumerate(entry["tokens"]) for _ in "".join(split_words(token))]        # token of each letter
            if len(letters) != sum(map(len, words)) or not set().union(*groups) <= set(range(len(entry["tokens"]))):
                raise ValueError("tokens do not spell the caption, or phrases point beyond them")
            owners = [{letters.pop(0) for _ in word} for word in words]
            table[" ".join(entry["caption"].split())] = words, [[w for w, own in enumerate(owners) if own & group] for group in groups]
    return table

# ---- the region store ------------------------------------------------------------------------------------------------
MAGIC = b"TAGSDC-REGIONS-1"

def _record(feature_size):
    return np.dtype([("features", np.float16, (feature_size,)), ("box", np.float32, (4,))])

def write_regions(path, items, source):
    """Streams region features into one file: a record a region (float16 features, float32 box), images end to end.
    items: iterator of (name, features (R,F), boxes (R,4)), or a function that makes one, given what is stored already (a dict by name).
    source: JSON-able, where they came from. The file takes its name only when complete; a killed conversion goes on behind the last image
    of its log. After the records come a JSON header, its length and a magic word. Raises InputError if there are no images."""
    part, log, rows = Path(f"{path}.part"), Path(f"{path}.log"), {}      # rows: name -> [count, CRC-32, size, end]
    part.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(OSError, ValueError):       # nothing to go on with, or a harmed log
        first, *logged = [json.loads(line) for line in log.read_text(encoding="utf-8").split("\n")[:-1]]        # whole lines
        rows = {name: row for name, *row in logged if first == [source] and row[3] <= part.stat().st_size}
    alive, old = sys.stderr.isatty(), len(rows)          # old: stored before this call
    start = told = time.monotonic()
    with open(part, "r+b" if rows else "wb") as data, open(log, "w", encoding="utf-8", buffering=1) as lines:
        data.seek(data.truncate(max((row[3] for row in rows.values()), default=0)))
        lines.writelines(json.dumps(line) + "\n" for line in [[source], *([name, *row] for name, row in rows.items())])
        for name, features, boxes in filter(lambda item: item[0] not in rows, items(rows) if callable(items) else items):
            records = np.empty(len(features), _record(features.shape[1]))
            records["features"], records["box"] = features, boxes
            data.write(records)
            rows[name] = [len(records), binascii.crc32(records), features.shape[1], data.tell()]
            lines.write(json.dumps([name, *rows[name]]) + "\n")
            if (now := time.monotonic()) - told > (1 if alive else 10):  # a terminal's line is written over, a log gets few
                told, line = now, f"regions: {len(rows):,} images, {data.tell() / 1e9:.2f} GB, {(len(rows) - old) / (now - start):.0f} images/s"
                print(f"\r{line}" if alive else line, end=" " if alive else "\n", file=sys.stderr, flush=True)
        if not rows:
            raise InputError(f"{source}: not one usable image; the README names the forms that can be read")
        header = json.dumps(dict(zip(("counts", "checks", "sizes", "ends"), zip(*rows.values())), source=source, names=list(rows))).encode()
        data.write(header + len(header).to_bytes(8, "little") + MAGIC)
        data.flush(), os.fsync(data.fileno())
    os.replace(part, path)
    log.unlink()
    print(end="\n" * (alive and told > start), file=sys.stderr)

class Regions:
    """The memory-mapped store that write_regions made. Opening reads the header and checks the CRC of 64 images.
    names: list of str. counts: (I,) regions of each image. Raises InputError if the file is missing or harmed."""
    def __init__(self, path):
        with _blame(path, mend="delete it, and it is made again from its source"):
            file = np.memmap(path, np.uint8, "r")
            end = len(file) - 24 - int.from_bytes(file[-24:-16].tobytes(), "little")
            header = json.loads(file[end:-24].tobytes() if file[-16:].tobytes() == MAGIC else "no store")
            self.source, self.names, self.feature_size = header["source"], header["names"], header["sizes"][0]
            self.counts, width = np.array(header["counts"], np.int64), _record(self.feature_size).itemsize
            self._ends, self._bytes = self.counts.cumsum(), file[:end].reshape(-1, width)
            for i in np.linspace(0, len(self.names) - 1, 64).astype(int):
                if binascii.crc32(self._bytes[self._ends[i] - self.counts[i]:self._ends[i]]) != header["checks"][i]:
                    raise ValueError(f"image {self.names[i]} fails its checksum")

    def gather(self, rows):
        """rows (B,) -> features (B,R,F), boxes (B,R,7) x1 y1 x2 y2 w h area, mask (B,R); R = most in this batch."""
        counts = self.counts[rows]
        steps = np.arange(counts.max(initial=1))
        mask = steps < counts[:, None]                                           # (B,R)
        index = (self._ends[rows] - counts)[:, None] + steps * mask              # padding repeats the first region
        records, split = np.take(self._bytes, index.ravel(), axis=0), 2 * self.feature_size                 # (B*R, bytes)
        features = torch.from_numpy(records[:, :split].view(np.float16)).float().view(*index.shape, self.feature_size)
        corner = torch.from_numpy(records[:, split:].copy().view(np.float32)).view(*index.shape, 4)
        sides, mask = corner[..., 2:] - corner[..., :2], torch.from_numpy(mask)
        boxes = torch.cat([corner, sides, sides.prod(-1, keepdim=True)], -1)
        features[~mask], boxes[~mask] = 0, 0
        return features, boxes, mask

# ---- data sets and their batches -------------------------------------------------------------------------------------
NAME = re.compile(r"(.*[/\\])?((coco_)?(train|val|test)20\d\d_|coco_|flickr(8|30)k_)?(?P<stem>.*?)(\.(jpe?g|png|np[yz]))?", re.DOTALL)

def image_key(name):
    """What two names of one picture share: COCO_val2014_000000391895.jpg, coco_val2014_...npz and 391895 are 391895."""
    stem = NAME.fullmatch(str(name).lower())["stem"]
    return str(int(stem)) if stem.isdecimal() else stem

@dataclass
class Split:
    """Images and captions of train, val or test. Captions of one image stand together, images in order."""
    images: list                                         # names
    rows: np.ndarray                                     # (I,) row of each image in the region store
    captions: list
    image_of_caption: torch.Tensor                       # (C,) long
    phrases: list = None                                 # per caption (words, [[word positions] of a phrase]), or None: parse it
    scenes: list = None                                  # only in the embedded world: the Scene of each image

@dataclass
class Data:
    """A data set: captions in memory, regions in the mapped store. The methods make batches of CPU tensors."""
    name: str
    tokenizer: WordPiece
    regions: Regions
    splits: dict                                         # "train", "val", "test"; a data set may lack some
    max_text: int = 64                                   # longest text in tokens with [CLS] and [SEP]; the rest is cut off
    notes: tuple = ()                                    # what was found, left out or guessed, a line each

    def __post_init__(self):
        self.feature_size, self._cache = self.regions.feature_size, {}

    def _batch(self, split_name, captions, encode, padding):
        """encode(split, c) is a number a token; of captions (B,) -> (B,T) int64 array, padded; kept for the next time."""
        split, captions = self.splits[split_name], np.asarray(captions)
        if (split_name, encode) not in self._cache:      # untouched pages take no memory; the last column is the length
            self._cache[split_name, encode] = np.zeros((len(split.captions), self.max_text + 1), np.int64)
        table = self._cache[split_name, encode]
        for c in captions[table[captions, -1] == 0].tolist():
            row = encode(split, c)
            table[c, :len(row)], table[c, len(row):-1], table[c, -1] = row, padding, len(row)
        return table[captions, :table[captions, -1].max(initial=2)]

    def _ids(self, split, c):
        return [self.tokenizer.cls_id, *self.tokenizer.encode(split.captions[c])[:self.max_text - 2], self.tokenizer.sep_id]

    def _phrase_bits(self, split, c):
        """Of each token the phrases that it belongs to, phrase p as bit p. Without a single phrase every word is one (METHOD 3.1)."""
        words, phrases = split.phrases and split.phrases[c] or (split_words(split.captions[c]), None)
        phrases = [at for _, at in parse_phrases(words)] if phrases is None else phrases
        bits = np.zeros(len(words), np.int64)
        for p, positions in enumerate((phrases or [[i] for i in range(len(words))])[:62]):       # as many as int64 has bits
            bits[positions] |= 1 << p
        return [0, *np.repeat(bits, [len(self.tokenizer.pieces(word)) for word in words])[:self.max_text - 2], 0]

    def text(self, split_name, captions):
        """captions (B,) -> input_ids (B,T) long: [CLS] words [SEP], padded to the longest of the batch."""
        return torch.from_numpy(self._batch(split_name, captions, self._ids, self.tokenizer.pad_id))

    def phrases(self, split_name, captions):
        """captions (B,) -> (B,P,T) bool, aligned with text(): True = the token belongs to the phrase."""
        bits = self._batch(split_name, captions, self._phrase_bits, 0)[:, None]                  # (B,1,T)
        return torch.from_numpy(bits >> np.arange(int(bits.max(initial=1)).bit_length())[:, None] & 1 > 0)

    def image(self, split_name, images):
        """images (B,) -> features (B,R,F), boxes (B,R,7), region_mask (B,R)."""
        return self.regions.gather(self.splits[split_name].rows[np.asarray(images)])

    def own_captions(self, split_name, images):
        """images (B,) -> (B,C,T) ids of all captions of each image; rows beyond an image's captions are all pad."""
        owner, images = self.splits[split_name].image_of_caption.numpy(), np.asarray(images)
        first, last = np.searchsorted(owner, images, "left"), np.searchsorted(owner, images, "right")
        steps = np.arange((last - first).max(initial=1))
        real = steps < (last - first)[:, None]                                   # (B,C)
        texts = self.text(split_name, (first[:, None] + steps * real).ravel()).view(*real.shape, -1)
        return texts.where(torch.from_numpy(real)[..., None], self.tokenizer.pad_id)

# ---- published region features ---------------------------------------------------------------------------------------
GRID = np.array([(0, 0, 4, 4), *((x, y, x + 1, y + 1) for y in range(4) for x in range(4))]) / 4       # the whole picture and 4 x 4 cells
TSV_COLUMNS = {6: "id w h num_boxes boxes features".split(),                                             # bottom-up-attention
               10: "id h w objects_id objects_conf attrs_id attrs_conf num_boxes boxes features".split()}               # LXMERT

def _tsv_row(columns):
    if len(columns) not in TSV_COLUMNS:
        raise ValueError(f"{len(columns)} columns; 6 (bottom-up-attention) or 10 (LXMERT) are expected")
    row = dict(zip(TSV_COLUMNS[len(columns)], columns))
    count, arrays = int(row["num_boxes"]), {"size": (int(row["w"]), int(row["h"]))}
    for name, width in (("boxes", 4), ("features", 0), ("objects_conf", 1)):
        if name in row:
            data = binascii.a2b_base64(row[name] + b"==")                        # a field that is cut off is then too short
            if count < 1 or not data or len(data) % (4 * count) or width and len(data) != 4 * count * width:
                raise ValueError(f"{name} has {len(data):,} bytes, not as many as num_boxes {count} needs")
            arrays[name.split("_")[-1]] = np.frombuffer(data, np.float32).reshape((count, -1) if width != 1 else -1)
    return arrays

def _npz_image(path, sizes):
    """sizes: image key -> (width, height) from the captions' JSON, in case that boxes are in pixels."""
    with np.load(path, allow_pickle=False) as file:
        row = {k: file[k] for k in file.files if k in "features norm_bb bbox conf num_bb image_w image_h".split()}
    name, widths = ("norm_bb", (6, 7)) if "norm_bb" in row else ("bbox", (4,))
    boxes, size = row[name], None
    if boxes.ndim != 2 or boxes.shape[1] not in widths:
        raise ValueError(f"{name} has shape {boxes.shape}; {' or '.join(map(str, widths))} columns are expected")
    if name == "bbox" and boxes.max(initial=0) > 1.01:
        size = (row["image_w"], row["image_h"]) if "image_w" in row else sizes.get(image_key(path))
        if size is None:
            raise ValueError("bbox is in pixels, but neither image_w, image_h here nor the captions' JSON has the size")
    return dict(features=row["features"], boxes=boxes[:, :4], size=size, conf=row.get("conf"), count=row.get("num_bb"))

def _precomp(path):
    """One *_ims.npy of SCAN -> its array (mapped) and the images' names, from *_names.txt or made from the row."""
    with _blame(path, mend="save it again as a plain float32 array (images, regions, features)"):
        array, split = np.load(path, mmap_mode="r", allow_pickle=False), path.name.removesuffix("_ims.npy")
        listed = path.with_name(f"{split}_names.txt")
        names = _read(listed) if listed.exists() else [f"{split}_{i:06d}" for i in range(len(array))]
        if array.ndim != 3 or len(array) != len(names):
            raise ValueError(f"shape {array.shape} and {len(names)} names; 3 dimensions and as many names are expected")
    return array, names

def describe_crops(picture, boxes):
    """Appearance of boxes (R,4) of an RGB PIL picture, from its pixels alone: (R,256) floats in [-1, 1].
    A thumbnail of 4 x 4 colours (48), a histogram of 64 colours (64) and the edges of 4 directions in 6 x 6 cells (144)."""
    places = np.asarray(boxes, np.float64) * [*picture.size, *picture.size]
    crops = np.stack([np.asarray(picture.resize((24, 24), Image.BOX, tuple(place))) for place in places]) / np.float32(256)
    n = len(crops)                                                                                               # (R,24,24,3)
    thumbnail = crops.reshape(n, 4, 6, 4, 6, 3).mean((2, 4)).reshape(n, 48)
    histogram = np.sqrt((((crops * 4).astype(int) @ [16, 4, 1]).reshape(n, -1, 1) == np.arange(64)).mean(1))     # (R,64)
    dy, dx = np.gradient(crops.mean(-1), axis=(1, 2))
    direction = np.floor(np.arctan2(dy, dx) * 4 / np.pi + 0.5).astype(int) % 4                                   # (R,24,24)
    edges = np.hypot(dx, dy)[..., None] * (direction[..., None] == np.arange(4))
    edges = np.minimum(6 * edges.reshape(n, 6, 4, 6, 4, 4).mean((2, 4)), 1).reshape(n, 144)
    return np.concatenate([2 * thumbnail - 1, histogram, edges], 1)

def _entries(form, files, sizes):
    """-> (name, where it is, function that reads it) of every image in these files."""
    for path in files:
        if form == "npz":
            yield os.path.basename(path), path, lambda: _npz_image(path, sizes)
        elif form == "images":                           # no detector
            yield os.path.basename(path), path, lambda: dict(features=describe_crops(Image.open(path).convert("RGB"), GRID), boxes=GRID)
        elif form == "precomp":                          # no boxes: every region gets the box of the whole image
            array, names = _precomp(Path(path))
            for i, name in enumerate(names):
                yield name, f"{path} image {i}", lambda: dict(features=np.array(array[i]), boxes=GRID[:1].repeat(array.shape[1], 0))
        else:
            with open(path, "rb") as rows:
                for number, line in enumerate(rows, 1):
                    columns = line.rstrip(b"\r\n").split(b"\t")
                    name = columns[0].decode(errors="replace")
                    if name not in ("", "image_id", "img_id"):
                        yield name, f"{path} row {number} (image {name[:60]})", lambda: _tsv_row(columns)

def check_regions(features, boxes, size=None, conf=None, count=None):
    """What every image must pass -> features (R,F), boxes (R,4) in 0..1; ValueError says what is wrong.
    size: (width, height) where boxes are in pixels. conf: scores, by which 10 to 100 regions are kept (METHOD 1)."""
    if features.ndim != 2 or 0 in features.shape:
        raise ValueError(f"features has shape {features.shape}; (regions, feature size) is expected")
    for name, array in (("features", features), ("boxes", boxes), ("conf", conf)):
        if array is not None and len(array) != (len(features) if count is None else count):
            raise ValueError(f"{name} has {len(array)} regions, features {len(features)}, num_bb says {count}")
        if array is not None and not np.isfinite(array).all() or np.abs(features).max() > 65504:
            raise ValueError(f"{name} is not finite in float16")
    boxes = np.asarray(boxes, np.float32) / (1 if size is None else np.array([*size, *size], np.float32))
    wrong = (boxes < -0.01).any(1) | (boxes > 1.01).any(1) | (boxes[:, 2:] < boxes[:, :2]).any(1)
    if wrong[n := wrong.argmax()]:                       # up to 1% outside is rounding, and is clipped
        raise ValueError(f"box {n} is outside its image or inside out: x1 y1 x2 y2 = {np.round(boxes[n], 3).tolist()} of width and height")
    if conf is not None:
        best = np.sort(np.argsort(-conf, kind="stable")[:min(max(int((conf > 0.2).sum()), 10), 100)])
        features, boxes = features[best], boxes[best]
    return features, boxes.clip(0, 1)

def _checked(entries, done, left_out):
    """_entries -> items for write_regions, each picture once; the bad ones go to left_out if that is a list."""
    seen, widths = set(map(image_key, done)), {row[2] for row in done.values()}
    for name, where, read in entries:
        if (key := image_key(name)) not in seen:
            with _blame(where, left_out):
                features, boxes = check_regions(**read())
                if not widths <= {features.shape[1]}:
                    raise ValueError(f"features are {features.shape[1]} wide, unlike those before ({widths})")
                seen.add(key), widths.add(features.shape[1])
                yield name, features, boxes

# ---- a data set on disk ----------------------------------------------------------------------------------------------
NOTHING = """: no {} here. Expected: dataset_coco.json or dataset_flickr30k.json (Karpathy's caption_datasets.zip) and one of: *.tsv
(bottom-up-attention's trainval_36.tsv; LXMERT's train2014_obj36.tsv, val2014_obj36.tsv), a folder of *.npz (UNITER's extractor:
coco_val2014_000000391895.npz), *_precomp/ (SCAN's release: train_ims.npy, train_caps.txt, dev_..., test_...; needs no JSON), images/
(COCO's train2014.zip, val2014.zip, flickr30k-images). The smallest that does: the JSON and images/ with its pictures""".replace("\n", " ")
FORMS = {"tsv": ".tsv", "npz": ".npz", "precomp": "_ims.npy", "images": (".jpg", ".jpeg", ".png")}

def find_features(place, anywhere):
    """-> (form, paths), form in tsv | npz | precomp | images, or (None, []). Pictures count in a folder *images or *train2014
    and the like only, unless anywhere is set, since a run's own pictures may lie below the root, too."""
    files = sorted(os.path.join(folder, name) for folder, _, names in os.walk(place, followlinks=True) for name in names)
    for form, endings in FORMS.items():
        found = [f for f in files or [str(place)] if f.lower().endswith(endings) and os.path.isfile(f) and (
            form != "images" or anywhere or re.search(r"(images|\w20\d\d)[/\\]", f[len(str(place)):]))]
        found = [f for f in found if not f.endswith("test_ims.npy") or f.replace("test_ims.npy", "testall_ims.npy") not in found]
        if form == "precomp" and len(set(map(os.path.dirname, found))) > 1:
            raise InputError(f"{place}: several folders with *_ims.npy; name one with --features")
        if found:
            return form, found
    return None, []

def _listed(path):
    """Karpathy's JSON, or SCAN's *_caps.txt (five lines for each image of *_ims.npy) -> its images in Karpathy's form."""
    if path.suffix == ".json":
        mend = 'Karpathy\'s form {"images": [{"filename", "split", "sentences": [{"raw"}]}]} is expected'
        return _read(path, lambda text: list(json.loads(text)["images"]), mend)
    texts, split = _read(path), path.name.removesuffix("_caps.txt")
    names = _precomp(path.with_name(f"{split}_ims.npy"))[1]
    if len(texts) != 5 * len(names):
        raise InputError(f"{path}: {len(texts)} lines, {texts.count('')} of them empty, for {len(names)} images; five each are expected")
    return [{"filename": name, "split": split, "sentences": [{"raw": text} for text in texts[5 * i:5 * i + 5]]} for i, name in enumerate(names)]

def read_captions(paths, left_out):
    """-> [(split, name, COCO id or name, (width, height) or None, first five captions)] of the images in these files."""
    images, seen = [], set()
    for path, i, image in ((path, i, image) for path in paths for i, image in enumerate(_listed(path))):
        with _blame(f"{path} image {i} ({str(image)[:60]})", left_out):
            name = str(image["filename"] if "filename" in image else image["cocoid"])
            for part in (name, str(image.get("filepath", ""))):
                if re.match(r"[/\\]|\w:", part) or ".." in re.split(r"[/\\]", part):
                    raise ValueError(f"filename or filepath {part!r} leaves the root; give a name below it")
            texts = [" ".join((s.get("raw") or " ".join(s.get("tokens", ()))).split()) for s in image["sentences"][:5]]
            split = {"restval": "train", "dev": "val", "testall": "test"}.get(image["split"], image["split"])
            if not texts or not all(texts):
                raise ValueError("sentences: no caption, or an empty one")
            if split not in ("train", "val", "test") or image_key(name) in seen:
                raise ValueError(f"filename {name} occurs twice" if image_key(name) in seen else f"split {split!r} is none")
            seen.add(image_key(name))
            size = (image["width"], image["height"]) if "width" in image and "height" in image else None
            images.append((split, name, image.get("cocoid", name), size, texts))
    return images

def _stamp(files):
    """Changes when the name, size or time of one of these files does."""
    stats = [(str(f), s.st_size, s.st_mtime_ns) for f in files for s in [os.stat(f)]]
    return f"{binascii.crc32(json.dumps(stats).encode()):08x}"

def load_data(name, root=None, features=None, phrases=None, skip_bad=False, tokens=None, feature_size=None, store="data",
              min_count=3, max_text=64):
    """Whatever form of a data set lies under root -> Data. Raises InputError.
    name: "coco", "flickr30k", or the path of a JSON of Karpathy's form (root is then its folder unless given). features: file or folder of
    the region features, if not below root. phrases: JSON file instead of parse_phrases. skip_bad: leave out what cannot be used, counted in
    Data.notes. tokens, feature_size: of a checkpoint; without tokens vocab.txt below root, else words seen min_count times in training
    captions. store: folder for what is made from the sources, used again while their names, sizes and times are the same."""
    captions, store, left_out = Path(name), Path(store), [] if skip_bad else None
    root = Path(root or (captions.parent if captions.suffix == ".json" else "."))
    if captions.suffix != ".json":
        patterns = (f"dataset_{name}.json", f"dataset_{name}*.json", "dataset_*.json")
        captions = next((path for pattern in patterns for path in sorted(root.glob(pattern))), root / patterns[0])
    form, files = find_features(features or root, bool(features))
    named = [f for f in (f.replace("_ims.npy", "_names.txt") for f in files if form == "precomp") if os.path.exists(f)]
    scan = form == "precomp" and not (captions.is_file() and len(named) == len(files))       # SCAN's own captions go with its arrays
    if not files or not (scan or captions.is_file()):
        lacking = ["region features"] * (not files) + [captions.name] * (not captions.is_file())
        raise InputError(f"{features if features and not files else root}{NOTHING.format(' and no '.join(lacking))}")
    place = Path(files[0]).parent
    captions, listings = (place, [Path(f.replace("_ims.npy", "_caps.txt")) for f in files]) if scan else (captions, [captions])
    listed = functools.cache(lambda: read_captions(listings, left_out))                      # only if something is to be made anew
    source, target = {"form": form, "files": len(files), "first": files[0], "digest": _stamp(files + named)}, store / "regions.bin"
    regions = Regions(target) if target.exists() else None
    if not regions or regions.source != source:
        sizes = {image_key(image): size for _, image, _, size, _ in listed() if size}
        write_regions(target, lambda done: _checked(_entries(form, files, sizes), done, left_out), source)
        regions = Regions(target)
    if feature_size not in (None, regions.feature_size):
        raise InputError(f"{files[0]}: features are {regions.feature_size} wide, the checkpoint's are {feature_size}; give its --features")

    def match():                                         # {split: (names, rows in the store, captions of each)}, what is left out
        found, known = {"train": [], "val": [], "test": []}, {image_key(name): row for row, name in enumerate(regions.names)}
        for split, image, cocoid, _, five in listed():
            with _blame(f"{captions} image {image} ({split})", left_out):
                if (row := known.get(image_key(image), known.get(image_key(cocoid)))) is None:
                    raise ValueError(f"captions without features: no such image in {place}")
                found[split].append((image, row, five))
        return [{split: list(zip(*images)) for split, images in found.items() if images}, left_out]
    key = [source, _stamp(filter(os.path.exists, listings)), skip_bad]
    matched, left_out = _remember(store / "captions.json", key, match)
    table, splits = read_phrases(phrases) if phrases else {}, {}
    for split, (names, rows, texts) in matched.items():
        owner = torch.arange(len(names)).repeat_interleave(torch.tensor([len(own) for own in texts]))
        texts = [text for own in texts for text in own]
        splits[split] = Split(names, np.array(rows), texts, owner, [table.get(text) for text in texts] if phrases else None)
    if not splits:
        raise InputError(f"{captions}: no image has both captions and features in {place}; compare the names")
    tokens = tokens or (root / "vocab.txt").exists() and _read(root / "vocab.txt")
    if not tokens and "train" not in splits:
        raise InputError(f"{captions}: no training captions to find words in; put BERT's vocab.txt under {root}, or give a checkpoint")
    tokens = tokens or _remember(store / "vocabulary.json", [key, min_count], lambda: build_vocabulary(splits["train"].captions, min_count))
    notes = [f"captions from {captions}, regions from {files[0]} ({form}, {len(files)} files)"]
    known = [own is not None for split in splits.values() for own in split.phrases or ()]
    notes += [f"phrases of {sum(known):,} of {len(known):,} captions from {phrases}; the others are parsed"] if phrases else []
    notes += [f"left out {len(left_out):,}, the first: {left_out[0]}"] if left_out else []
    capitals = any(re.match("[A-Z]|##[A-Z]", token) for token in tokens)
    return Data(str(name), WordPiece(tokens, not capitals), regions, splits, max_text, notes)

# ---- the embedded world ----------------------------------------------------------------------------------------------
SHAPES = ("circle", "square", "triangle", "star", "heart", "diamond", "cross", "moon", "ring", "frame")
HOLLOW = ("ring", "frame")                               # the shapes that can hold another object
COLOURS = {"red": (225, 35, 40), "yellow": (250, 215, 30), "green": (30, 155, 60), "blue": (35, 75, 220), "purple": (135, 40, 185),
           "pink": (255, 135, 195), "cyan": (40, 205, 225), "brown": (130, 75, 30)}
SIZES = {"small": (0.065, 0.08), "large": (0.125, 0.15)}         # half the width, as a share of the picture
BACKGROUNDS = {"white": (245, 245, 245), "grey": (150, 152, 158), "black": (25, 25, 30), "beige": (228, 206, 168)}
ATTRIBUTES = dict(size=[*SIZES], pattern=["plain", "striped", "dotted", "checked"], colour=[*COLOURS], shape=SHAPES)
PLURALS = {shape: shape + ("es" if shape == "cross" else "s") for shape in ("shape", *SHAPES)}
COUNTS = {"a": 1, "the": 1, "two": 2, "three": 3, "four": 4}
# One bit a value: an object fits a noun phrase if it has all its bits, so contradictory adjectives fit nothing.
BITS = {value: 1 << i for i, value in enumerate(itertools.chain(*ATTRIBUTES.values()))}
BITS |= {plural: BITS.get(shape, 0) for shape, plural in PLURALS.items()}
Thing = namedtuple("Thing", "shape colour size pattern x y radius")      # centre and radius (half a box) are shares of the picture

@dataclass(eq=False)
class Scene:
    """What a picture shows. `light`: how much brighter its background is at the bottom, in -1..1."""
    objects: list
    background: str
    light: float

    def __post_init__(self):
        self.bits = [sum(BITS[getattr(thing, attribute)] for attribute in ATTRIBUTES) for thing in self.objects]
        self.facts = dict.fromkeys(relations(self.objects))      # all that holds: (relation, two or three objects)

def relations(objects):
    """Every relation that holds. This is their one definition, for the writer of captions and for the oracle."""
    for (i, a), (j, b) in itertools.permutations(enumerate(objects), 2):
        dx, dy = b.x - a.x, b.y - a.y
        if dx > 0.1 and abs(dy) < 2 * dx:                # clearly to one side, and not almost straight above
            yield from (("left", i, j), ("right", j, i))
        if dy > 0.1 and abs(dx) < 2 * dy:
            yield from (("above", i, j), ("below", j, i))
        if holder(a, b):
            yield "inside", i, j
        elif not holder(b, a) and max(abs(dx), abs(dy)) < a.radius + b.radius:
            yield "touching", i, j
        yield from ((same, i, j) for same in ATTRIBUTES if getattr(a, same) == getattr(b, same))
    for (i, a), (j, b), (k, c) in itertools.permutations(enumerate(objects), 3):
        ux, uy, vx, vy = c.x - b.x, c.y - b.y, a.x - b.x, a.y - b.y
        length = math.hypot(ux, uy)
        if length > 0.3 and 0.25 < (ux * vx + uy * vy) / length ** 2 < 0.75 and abs(ux * vy - uy * vx) < 0.12 * length:
            yield "between", i, j, k                     # a lies near the middle half of the line from b to c

def holder(a, b):                                        # True if a lies in the hole of b
    return b.shape in HOLLOW and max(abs(a.x - b.x), abs(a.y - b.y)) + a.radius < 0.72 * b.radius

def clear(objects):
    """True if every two are apart, well overlapping or one in the other, and all in the picture: no case of doubt."""
    for a, b in itertools.combinations(objects, 2):
        (near, far), reach = sorted((abs(a.x - b.x), abs(a.y - b.y))), a.radius + b.radius
        overlap = 0.6 * reach < far < 0.85 * reach and near < 0.5 * min(a.radius, b.radius)
        if far < 1.2 * reach and (a.colour == b.colour or not (overlap or holder(a, b) or holder(b, a))):
            return False
    return all(thing.radius < place < 1 - thing.radius for thing in objects for place in (thing.x, thing.y))

def random_scene(rng):
    """A scene of 2 to 5 objects: mostly apart, some in another or touching it, some alike in shape or colour."""
    objects, count = [], rng.choices((2, 3, 4, 5), (2, 4, 5, 4))[0]
    while len(objects) < count:
        shape, colour = rng.choice(SHAPES if objects or rng.random() < 0.8 else HOLLOW), rng.choice(tuple(COLOURS))
        size, pattern = rng.choices(tuple(SIZES), (1, 3))[0], rng.choices(ATTRIBUTES["pattern"], (3, 2, 2, 2))[0]
        other, x, y = rng.choice(objects or [None]), rng.random(), rng.random()
        if other and rng.random() < 0.4:                 # alike in one way, so that one word does not find the object
            shape, colour = (other.shape, colour) if rng.random() < 0.6 else (shape, other.colour)
        if other and other.shape in HOLLOW and shape not in HOLLOW and rng.random() < 0.5:
            size, x, y = "small", other.x, other.y
        elif other and rng.random() < 0.2:
            x, y = other.x + rng.uniform(-0.2, 0.2), other.y + rng.uniform(-0.2, 0.2)
        new = Thing(shape, colour, size, pattern, x, y, rng.uniform(*SIZES[size]) * (1.25 if shape in HOLLOW and size == "large" else 1))
        objects += [new] if clear([*objects, new]) else []
    return Scene(objects, rng.choice(tuple(BACKGROUNDS)), rng.uniform(-1, 1))

def near_twin(rng, scene, pair):
    """The scene with one attribute or the place of one of a pair of objects changed, or with the two swapped."""
    while True:
        objects, (i, j) = list(scene.objects), rng.sample(pair, 2)
        a, b, kind = objects[i], objects[j], rng.choice((*ATTRIBUTES, *3 * ("swap", "move")))
        if kind in ATTRIBUTES:
            value = rng.choice([value for value in ATTRIBUTES[kind] if value != getattr(a, kind)])
            objects[i] = a._replace(**{kind: value}, radius=rng.uniform(*SIZES.get(value, [a.radius] * 2)))
        elif kind == "swap":
            objects[i], objects[j] = a._replace(x=b.x, y=b.y), b._replace(x=a.x, y=a.y)
        else:
            objects[i] = a._replace(x=rng.random(), y=rng.random())
        if clear(objects):
            return Scene(objects, scene.background, scene.light)

def inside_shape(shape, x, y):
    """Which of the points x, y in [-1, 1] (y down) the shape covers."""
    side, r, v = np.maximum(abs(x), abs(y)), np.hypot(x, y), 1.15 * y - 0.15
    fold = lambda: abs((np.arctan2(x, -y) + math.pi / 5) % (0.4 * math.pi) - math.pi / 5)   # a star onto half of one of its points
    return {"star": lambda: 0.27 * r * np.cos(turn := fold()) + 0.63 * r * np.sin(turn) < 0.28, "ring": lambda: (r < 1) & (r > 0.62),
            "heart": lambda: (1.3 * x * x + v * v - 1) ** 3 < -2 * x * x * v ** 3, "cross": lambda: np.minimum(abs(x), abs(y)) < 0.34,
            "triangle": lambda: abs(x) < (y + 1) / 2, "diamond": lambda: abs(x) + abs(y) < 1, "frame": lambda: side > 0.66,
            "moon": lambda: (r < 1) & (np.hypot(x - 0.5, y + 0.3) > 0.75), "square": lambda: side < 0.93, "circle": lambda: r < 1}[shape]()

def draw(scene, size=112):
    """The picture of a scene: an RGB image of size x size pixels, drawn three times as large and reduced."""
    full = 3 * size
    column = np.linspace(-9, 9, full)[:, None] * scene.light + BACKGROUNDS[scene.background]
    canvas = np.repeat(np.uint8(column)[:, None], full, axis=1)
    for thing in sorted(scene.objects, key=lambda thing: -thing.radius):
        left, top, right, bottom = (round(full * (c + d * thing.radius)) for d in (-1, 1) for c in (thing.x, thing.y))
        x = (np.arange(left, right) + 0.5 - full * thing.x)[None] / (full * thing.radius)
        y = (np.arange(top, bottom) + 0.5 - full * thing.y)[:, None] / (full * thing.radius)
        whole, part = inside_shape(thing.shape, x, y), canvas[top:bottom, left:right]
        colour = part[whole] = np.array(COLOURS[thing.colour])
        ink = {"plain": lambda: False, "striped": lambda: 1.5 * y % 1 < 0.5, "dotted": lambda: np.hypot(2 * x % 1 - 0.5, 2 * y % 1 - 0.5) < 0.3,
               "checked": lambda: (2 * x % 2 < 1) ^ (2 * y % 2 < 1)}[thing.pattern]()
        part[whole & ink] = 0.3 * colour + (0 if colour.sum() > 390 else 178)
    return Image.fromarray(canvas).reduce(3)

def look(rng, scene):
    """Regions as a detector gives them, from pixels alone: the whole picture, then in random order the objects' boxes, a little
    off, and one to three boxes of anything. Features (R,F) float16 in [-1, 1], boxes (R,4) float32."""
    spots = [[v + rng.uniform(-0.07, 0.07) * o.radius for v in (o.x, o.y, o.radius)] for o in scene.objects]
    spots += [[rng.random(), rng.random(), rng.uniform(0.06, 0.25)] for _ in range(rng.randint(1, 3))]
    rng.shuffle(spots)
    boxes = np.clip([(0, 0, 1, 1), *((x - r, y - r, x + r, y + r) for x, y, r in spots)], 0, 1)
    return describe_crops(draw(scene), boxes).astype(np.float16), boxes.astype(np.float32)

ADJECTIVES = f"(?:(?:{'|'.join((*COLOURS, *SIZES, *ATTRIBUTES['pattern']))}) )*"
PIECES = re.compile(rf"(?:(?P<n>(?:a|the) {ADJECTIVES}(?:{'|'.join(SHAPES)}))|(?P<b>between)|(?P<j>and)"
                    rf"|(?P<p>(?:two|three|four) {ADJECTIVES}(?:{'|'.join(PLURALS.values())}))"
                    rf"|(?P<r>(?:to the )?(?:left|right) of|above|below|inside|touching|the same (?:{'|'.join(ATTRIBUTES)}) as)"
                    rf"|(?P<t>there (?:is|are))|(?P<v>is|are|sits|lies)|(?P<g>on a (?:{'|'.join(BACKGROUNDS)}) background))(?: |$)")
PREDICATE = re.compile("r[np](?:j[np](?!v?[rb]))?|bnjn")         # left of A; left of A and B (of each); between A and B
CLAUSE = re.compile("t?[np](?:v?(?:{0})(?:j(?:{0}))?)?|(?:{0})v[np]".format(PREDICATE.pattern))

def parse(caption):
    """Sentence -> nouns [(count, bits)], facts [(relation, two or three nouns)], background or None. Returns None if it does not parse."""
    pieces = list(PIECES.finditer(caption))
    if "".join(piece.group() for piece in pieces) != caption or caption.endswith(" "):
        return None
    texts, codes = [piece.group().split() for piece in pieces], "".join(piece.lastgroup for piece in pieces)
    background = texts[-1][2] if codes.endswith("g") else None
    codes, facts, at = codes.removesuffix("g"), [], 0
    number = {i: n for n, i in enumerate(i for i, code in enumerate(codes) if code in "np")}
    nouns = [(COUNTS[texts[i][0]], sum({BITS[word] for word in texts[i][1:]})) for i in number]
    while clause := CLAUSE.match(codes, at):
        end = clause.end()
        subject = number[end - 1 if codes[at] in "rb" else at + (codes[at] == "t")]
        for found in PREDICATE.finditer(codes, at, end):
            ends = [number[i] for i in range(*found.span()) if i in number]
            name = next(word for word in texts[found.start()] if word not in ("to", "the", "same"))
            facts += [(name, subject, *ends)] if name == "between" else [(name, subject, end) for end in ends]
        if end == len(codes):
            return nouns, facts, background
        at = end + 1 if codes[end] == "j" else len(codes)
    return None

def holds(meaning, scene):
    """Whether different objects fit a parsed sentence's nouns and all its facts hold. Two red circles: exactly two, and facts of each."""
    (nouns, facts, background), choices = meaning, []
    for count, bits in nouns:
        fit = [i for i, have in enumerate(scene.bits) if have & bits == bits]
        if len(fit) < count or len(fit) > count > 1:
            return False
        choices.append([(i,) for i in fit] if count == 1 else [fit])
    return background in (None, scene.background) and any(
        len(set().union(*chosen)) == sum(map(len, chosen))
        and all((name, *ends) in scene.facts for name, *numbers in facts for ends in itertools.product(*(chosen[n] for n in numbers)))
        for chosen in itertools.product(*choices))

def describes(caption, scene):
    """The oracle: True or False, whether a sentence is true of a scene, or None if it does not parse."""
    return (meaning := parse(caption)) and holds(meaning, scene)

# "*" opens a scene-graph phrase and "_" joins its words. a, b, c: objects; n: all objects of a kind; r: a relation from
# a to b, both: to b and c, s: from a to c, each: from all n to b; v: a verb; on: the background.
SENTENCES = ("{a} {r} {b}", "{a} {r} {b}", "{a} {v} {r} {b}", "{a} {v} {r} {b}", "{r} {b} {v} {a}", "there is {a} {r} {b}",
             "{a} {r} {b} {on}", "{a} and {b} {on}", "there is {a} and {b}", "{a} {both} {b} and {c}", "{n} and {b} {on}",
             "{a} {r} {b} and {s} {c}", "{a} *between {b} and {c}", "{a} {v} *between {b} and {c}", "there are {n} and {b}",
             "{n} are {each} {b}", "{a} is the *same_{same}_as {b}")

def draft_caption(rng, scene, pair):
    """One try at a caption about two objects: words, phrases [[word positions]]. It need not be true: its form may not suit the scene."""
    things, (a, b), form = scene.objects, rng.sample(pair, 2), rng.choice(SENTENCES)
    c = rng.choice([i for i in range(len(things)) if i not in pair] or pair)
    if "between" in form:
        a, b, c = rng.choice([ends for name, *ends in scene.facts if name == "between"] or [(a, b, c)])
    kind = rng.choice(("shape", "shape", "colour", "pattern"))
    alike = [i for i, thing in enumerate(things) if getattr(thing, kind) == getattr(things[a], kind)]
    same = rng.choice([name for name, *ends in scene.facts if name in ATTRIBUTES and ends == [a, b]] or ["size"])

    def relation(subjects, ends):
        names = [name for name in ("inside", "touching", "left", "right", "above", "below")
                 if all((name, *both) in scene.facts for both in itertools.product(subjects, ends))] or ["?"]
        name = names[0] if names[0] in ("inside", "touching") and rng.random() < 0.6 else rng.choice(names)
        return rng.choice((f"*{name}_of", f"to the *{name} of")) if name in ("left", "right") else f"*{name}"

    def noun(*numbers, omit=None):
        shared = {name: getattr(things[numbers[0]], name) for name in ATTRIBUTES if len({getattr(things[i], name) for i in numbers}) == 1}
        shape, one = shared.pop("shape", "shape"), len(numbers) == 1
        words = [value for name, value in shared.items() if name != omit and rng.random() < 0.78 * (0.6 if value == "plain" else 1.1)]
        return " *".join(["a" if one else f"*{list(COUNTS)[len(numbers)]}", *words, shape if one else PLURALS[shape]])
    say = {"a": lambda: noun(a, omit=same if "same" in form else None), "b": lambda: noun(b), "c": lambda: noun(c),
           "n": lambda: noun(*alike) if 1 < len(alike) < 5 else "?", "each": lambda: relation(alike, [b]),
           "r": lambda: relation([a], [b]), "s": lambda: relation([a], [c]), "both": lambda: relation([a], [b, c]),
           "same": lambda: same, "v": lambda: rng.choice(("is", "sits", "lies")), "on": lambda: f"on a *{scene.background} background"}
    words, phrases = [], []
    for piece in re.sub(r"{(\w+)}", lambda slot: say[slot[1]](), form).split():
        parts = piece.strip("*").split("_")
        phrases += [list(range(len(words), len(words) + len(parts)))] if piece[0] == "*" else []
        words += parts
    return words, phrases

def five_captions(rng, scene, pairs, twins):
    """Five different true captions of 6 to 16 words, none of them true of a twin; None if they do not turn up."""
    captions = {}
    for _ in range(300):
        words, phrases = draft_caption(rng, scene, rng.choice(pairs))
        meaning = parse(" ".join(words)) if 6 <= len(words) <= 16 else None
        if meaning and holds(meaning, scene) and not any(holds(meaning, twin) for twin in twins):
            captions[tuple(words)] = words, phrases
        if len(captions) == 5:
            return list(captions.values())
    return None

def make_scenes(seed, split, size):
    """Yields `size` times (scene, five captions (words, phrases), features (R,F), boxes (R,4)), a function of its arguments only.
    Val and test come in families of five near-twins, and no caption there is true of another of its family."""
    rng, made = random.Random(f"{seed} {split}"), 0
    while made < size:
        members = [random_scene(rng)]
        pairs = list(itertools.combinations(range(len(members[0].objects)), 2))
        pairs = pairs if split == "train" else [rng.choice(pairs)]
        while split != "train" and len(members) < 5:
            twin = near_twin(rng, members[0], pairs[0])
            members += [twin] if twin.objects not in [scene.objects for scene in members] else []
        captions = [five_captions(rng, scene, pairs, [t for t in members if t is not scene]) for scene in members]
        for scene, five in zip(members[:size - made], captions if None not in captions else ()):
            made += 1
            yield (scene, five, *look(rng, scene))

def identification_ceiling(scenes, captions, image_of_caption):
    """R@1 in percent, (text, image) retrieval, to expect of one who knows the whole truth and guesses among ties.
    scenes: list; captions: list of str; image_of_caption: the number of each caption's scene."""
    true = np.array([[holds(meaning, scene) for scene in scenes] for meaning in map(parse, captions)])
    own = true & (np.asarray(image_of_caption)[:, None] == np.arange(len(scenes)))
    return tuple(float(100 * (own.sum(axis) / true.sum(axis).clip(1)).mean()) for axis in (0, 1))

def load_scenes(seed, sizes, store, tokens=None):
    """The embedded world as Data, made once and then read from the folder `store`. sizes: images in train, val and test. tokens: a checkpoint's."""
    sizes, target, splits = dict(zip(("train", "val", "test"), sizes)), Path(store) / "regions.bin", {}
    source, made, intact = {"world": 1, "seed": seed, "sizes": sizes}, {split: [] for split in sizes}, False

    def items():
        for split, size in sizes.items():
            for i, (scene, captions, features, boxes) in enumerate(make_scenes(seed, split, size)):
                made[split].append([scene.objects, scene.background, scene.light, captions])
                yield f"scene_{split}_{i:04d}", features, boxes
    with contextlib.suppress(InputError):                # no store yet, or a harmed one
        intact = Regions(target).source == source
    made = _remember(target.with_name("scenes.json"), source, lambda: write_regions(target, items(), source) or made, again=not intact)
    regions = Regions(target)
    for split, content in made.items():
        rows = np.array([row for row, name in enumerate(regions.names) if f"_{split}_" in name], np.int64)
        scenes = [Scene([Thing(*thing) for thing in things], background, light) for things, background, light, _ in content]
        captions = [(words, phrases) for *_, five in content for words, phrases in five]
        splits[split] = Split([regions.names[row] for row in rows], rows, [" ".join(words) for words, _ in captions],
                              torch.arange(len(content)).repeat_interleave(5), captions, scenes)
    return Data("scenes", WordPiece(tokens or build_vocabulary(splits["train"].captions, 1), True), regions, splits)
