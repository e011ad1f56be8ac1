"""The one-stream image-text encoder (UNITER) with the four heads of TAGS-DC.

A minimal reference of TAGS-DC (Fan et al., Findings of NAACL 2022, arXiv 2111.03349); UNITER is
arXiv 1909.11740. MIT licence.

Letters: B pairs, T text positions, R regions, S = T + R, D hidden size, V vocabulary, F feature
size; A captions and I images that are prepared once and then meet in N pairs; L positions of
either; n first positions of a sequence; h heads, each d = D / h wide. Every mask is bool: True
means real, and no mask (None) that everything is. A sequence is [CLS] words [SEP], padded to T,
then R regions.

Reading order: TagsDC.forward and what it calls; the fast path at the end of the file comes last."""

import json
import math
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

layer_norm = partial(nn.LayerNorm, eps=1e-12)  # BERT's epsilon
PRESETS = {
    "tiny": dict(hidden=128, layers=3, heads=4, intermediate=512, max_positions=64),
    "small": dict(hidden=256, layers=4, heads=4, intermediate=1024, max_positions=64),
    "base": dict(hidden=768, layers=12, heads=12, intermediate=3072),
    "large": dict(hidden=1024, layers=24, heads=16, intermediate=4096),
}


@dataclass
class Config:
    """Sizes of the network; Config.preset("base", vocab_size=28996) is UNITER-base."""

    vocab_size: int
    feature_size: int = 2048  # numbers that describe a region
    hidden: int = 768
    layers: int = 12
    heads: int = 12
    intermediate: int = 3072  # width of the feed-forward part
    max_positions: int = 512  # longest text
    dropout: float = 0.1

    @classmethod
    def preset(cls, name, **changes):
        """The sizes called `name` with `changes` laid over them."""
        return cls(**(PRESETS[name] | changes))

    @classmethod
    def from_uniter(cls, state_dict, heads=None, dropout=0.1, vocab_size=None):
        """Reads the sizes off official weights; ValueError if these are none. heads: 64 wide
        unless given. vocab_size: words of the vocabulary file, if the weights may be padded."""
        weights = official_weights(state_dict)
        check_regions(weights)
        try:
            rows, hidden = weights[WORDS].shape
            return cls(
                vocab_size=vocab_size or rows,
                feature_size=weights["uniter.img_embeddings.img_linear.weight"].size(1),
                hidden=hidden,
                layers=sum(name.endswith("attention.self.query.weight") for name in weights),
                heads=heads or max(hidden // 64, 1),
                intermediate=len(weights["uniter.encoder.layer.0.intermediate.dense.weight"]),
                max_positions=len(weights["uniter.embeddings.position_embeddings.weight"]),
                dropout=dropout,
            )
        except (KeyError, AttributeError, TypeError, ValueError, IndexError) as fault:
            text = f"not UNITER weights, no sizes can be read off them: {fault}"
            raise ValueError(text) from fault

    @classmethod
    def from_bert(cls, bert, feature_size, dropout=0.0, vocab_size=None):
        """Reads the sizes off `bert`, the content of a published BERT's config.json; ValueError if
        a size is missing or this is a relative of BERT that computes something else.
        feature_size: numbers that describe a region. vocab_size: words of the vocabulary file, if
        the weights may be padded."""
        for field, wanted in BERT_FIELDS.items():
            found = bert.get(field, wanted)
            if found != wanted:
                text = f"a BERT with {wanted!r} there is wanted, such as bert-base-uncased"
                raise ValueError(f"config.json has {field} {found!r}: {text}")
        return cls(
            vocab_size=vocab_size or bert_size(bert, "vocab_size"),
            feature_size=feature_size,
            hidden=bert_size(bert, "hidden_size"),
            layers=bert_size(bert, "num_hidden_layers"),
            heads=bert_size(bert, "num_attention_heads"),
            intermediate=bert_size(bert, "intermediate_size"),
            max_positions=bert_size(bert, "max_position_embeddings"),
            dropout=dropout,
        )


class TextEmbedding(nn.Module):
    """Word + position + type, normalised."""

    def __init__(self, config):
        super().__init__()
        self.word = nn.Embedding(config.vocab_size, config.hidden, padding_idx=0)
        self.position = nn.Embedding(config.max_positions, config.hidden)
        self.norm = layer_norm(config.hidden)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, input_ids, token_type):  # (A, T), (D,) -> (A, T, D)
        x = self.word(input_ids) + self.position.weight[: input_ids.size(1)] + token_type
        return self.dropout(self.norm(x))


class RegionEmbedding(nn.Module):
    """Feature + box + type, normalised; feature and box have norms of their own."""

    def __init__(self, config):
        super().__init__()
        self.feature = nn.Linear(config.feature_size, config.hidden)
        self.feature_norm = layer_norm(config.hidden)
        self.box = nn.Linear(7, config.hidden)
        self.box_norm = layer_norm(config.hidden)
        self.norm = layer_norm(config.hidden)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, features, boxes, token_type):  # (I, R, F), (I, R, 7), (D,) -> (I, R, D)
        what = self.feature_norm(self.feature(features))
        where = self.box_norm(self.box(boxes))
        return self.dropout(self.norm(what + where + token_type))


def attend(q, k, v, mask, dropout):
    """Scaled dot-product attention: (N, h, S, d) each, mask (N, S) or None -> (N, h, S, d).
    In bfloat16 on a CPU plain products are faster: a step of TAGS-DC 1.2 times, `tiny`."""
    mask = None if mask is None else mask[:, None, None]  # (N, 1, 1, S)
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    scores = q * q.size(-1) ** -0.5 @ k.transpose(2, 3)
    if mask is not None:
        scores = scores.where(mask, -torch.inf)
    weights = F.dropout(scores.softmax(-1, dtype=torch.float32), dropout)
    return weights.to(v.dtype) @ v


class Layer(nn.Module):
    """BERT's layer: attention and feed-forward part, each followed by a sum and a LayerNorm."""

    def __init__(self, config):
        super().__init__()
        D = config.hidden
        self.heads = config.heads
        self.query = nn.Linear(D, D)
        self.key = nn.Linear(D, D)
        self.value = nn.Linear(D, D)
        self.attention_dropout = config.dropout
        self.out = nn.Linear(D, D)
        self.attention_norm = layer_norm(D)
        self.up = nn.Linear(D, config.intermediate)
        self.down = nn.Linear(config.intermediate, D)
        self.norm = layer_norm(D)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, mask=None, first=None):
        """x (N, S, D), mask (N, S) or None -> (N, n, D): the output at the first n positions, which
        attend to all S. first: n; None means all S."""
        start = x[:, :first]  # (N, n, D)
        # Self-attention. Each head takes d of the D columns: (N, h, n or S, d).
        q = self.query(start).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k = self.key(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        v = self.value(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        context = attend(q, k, v, mask, self.attention_dropout if self.training else 0.0)
        context = context.transpose(1, 2).flatten(2)  # (N, n, D), the heads side by side again
        # The rest treats each position by itself.
        x = self.attention_norm(start + self.dropout(self.out(context)))
        return self.norm(x + self.dropout(self.down(F.gelu(self.up(x)))))


class WordHead(nn.Module):
    """BERT's masked-LM head; its decoder is the matrix of word embeddings."""

    def __init__(self, config):
        super().__init__()
        self.transform = nn.Linear(config.hidden, config.hidden)
        self.norm = layer_norm(config.hidden)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden, word_embeddings):  # (..., D), (V, D) -> (..., V)
        return F.linear(self.norm(F.gelu(self.transform(hidden))), word_embeddings, self.bias)


class Prepared(NamedTuple):
    """Captions or images, embedded once for all the pairs that they will be part of. Gain in
    scoring: 1.35 in float32, 1.25 in bfloat16 (size base: none and 1.1)."""

    states: torch.Tensor  # (A, L, D) embeddings
    mask: torch.Tensor | None  # (A, L) bool, None = all is real


class TagsDC(nn.Module):
    """UNITER (section 3.1) and heads for matching, masked LM, discrimination, correction (3.4)."""

    def __init__(self, config):
        super().__init__()
        if config.hidden % config.heads:
            raise ValueError(f"hidden size {config.hidden} is no multiple of {config.heads} heads")
        self.config = config
        self.text = TextEmbedding(config)
        self.region = RegionEmbedding(config)
        self.token_type = nn.Embedding(2, config.hidden)  # 0 text, 1 region
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.pooler = nn.Linear(config.hidden, config.hidden)
        self.matching = nn.Linear(config.hidden, 1)
        self.mlm = WordHead(config)
        self.discrimination = nn.Linear(config.hidden, 2)
        self.correction = WordHead(config)
        self.recompute = False  # True: less memory in training for a third more work
        self.apply(initialise)
        nn.init.normal_(self.text.word.weight, std=config.hidden**-0.5)  # tied logits of size 1

    def forward(self, input_ids, features, boxes, text_mask=None, region_mask=None):
        """Encodes B pairs of a caption and an image.
        input_ids: (B, T) long.
        features: (B, R, F) float, one row for each region.
        boxes: (B, R, 7) float, x1, y1, x2, y2, w, h as shares of width and height, and w * h.
        text_mask, region_mask: (B, T), (B, R) bool; ValueError if they are anything else.
        Returns hidden (B, T + R, D), text first. No real position depends on the padding."""
        texts = self.prepare_text(input_ids, text_mask)
        images = self.prepare_regions(features, boxes, region_mask)
        pair = torch.arange(input_ids.size(0), device=input_ids.device)
        return self.encode_pairs(texts, pair, images, pair)

    def prepare_text(self, input_ids, text_mask=None):
        """Embeds captions: input_ids (A, T) long, text_mask (A, T) bool or None -> Prepared."""
        check_mask(text_mask, input_ids.shape)
        return Prepared(self.text(input_ids, self.token_type.weight[0]), text_mask)

    def prepare_regions(self, features, boxes, region_mask=None):
        """Embeds images: features (I, R, F), boxes (I, R, 7), region_mask (I, R) bool or None ->
        Prepared."""
        check_mask(region_mask, features.shape[:2])
        return Prepared(self.region(features, boxes, self.token_type.weight[1]), region_mask)

    def encode_pairs(self, texts, text_index, images, image_index, first=None):
        """Encodes N pairs of what was prepared.
        texts, images: Prepared.
        text_index, image_index: (N,) long; pair number j is caption text_index[j] with image
            image_index[j].
        first: how many positions are wanted: 1 is [CLS] alone, T the text, None all.
        Returns hidden (N, T + R, D), or (N, first, D)."""
        x = torch.cat((texts.states[text_index], images.states[image_index]), 1)
        mask = None
        if texts.mask is not None or images.mask is not None:
            mask = torch.cat((mask_of(texts)[text_index], mask_of(images)[image_index]), 1)
        return self.encode(x, mask, first)

    def encode(self, x, mask=None, first=None):
        """All layers: (N, S, D) -> (N, S, D), or (N, first, D): the last layer need not compute
        positions that nobody reads. Gain in scoring: 1.35 / 1.25, in a step of TAGS-DC: 1.2; size
        base, in scoring: 1.1."""
        for layer in self.layers[:-1]:
            x = self.run_layer(layer, x, mask)
        return self.run_layer(self.layers[-1], x, mask, first)

    def run_layer(self, layer, x, mask, first=None):
        """layer(x, mask, first), whose inner results are computed again for the gradient if
        `recompute` is set."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(layer, x, mask, first, use_reentrant=False)
        return layer(x, mask, first)

    def score_pairs(self, texts, text_index, images, image_index, batch=None):
        """Matching logits (N,) of the pairs that encode_pairs takes, `batch` of them in one pass
        (None: all), with less work."""
        batch = batch or max(text_index.size(0), 1)
        if can_pack(texts, images):
            return packed_scores(self, texts, text_index, images, image_index, batch)
        logits = []
        for t, i in zip(text_index.split(batch), image_index.split(batch)):
            logits.append(self.match(self.encode_pairs(texts, t, images, i, first=1)))
        return torch.cat(logits)

    def match(self, hidden):
        """Matching logits (B,) of hidden (B, S, D), read off [CLS]; s(I, T) is their sigmoid."""
        with autocast(hidden.device, torch.float32):  # bfloat16 would make many scores equal
            cls = hidden[:, 0].to(self.matching.weight.dtype)
            return self.matching(torch.tanh(self.pooler(cls)))[:, 0]

    def fill(self, hidden):
        """Masked-LM logits of every word: (..., D) -> (..., V)."""
        return self.mlm(hidden, self.text.word.weight)

    def discriminate(self, hidden):
        """Logits of "replaced" (class 0) and "original" (class 1): (..., D) -> (..., 2)."""
        return self.discrimination(hidden)

    def correct(self, hidden):
        """Logits of the word that stood there originally: (..., D) -> (..., V)."""
        return self.correction(hidden, self.text.word.weight)

    def load_uniter(self, state_dict):
        """Loads official UNITER or TAGS weights. Heads that are missing start as COPIES says: where
        there is no ranking head, `matching` is row 1, "match", of the two outputs of ITM, as in the
        release. (That is a start for training; the probability of a match that UNITER itself gives
        is the sigmoid of row 1 minus row 0.)
        Returns official names: {"loaded": [..], "ignored": [..], "initialised": ["x from y", ..]}.
        Raises ValueError, changing nothing, if a part of the encoder is missing or does not fit."""
        given = official_weights(state_dict)
        check_regions(given)
        fitted = {}  # {our name: tensor}
        initialised = []
        for ours, parameter in self.state_dict().items():
            name = official_name(ours)
            head = name.split(".")[0]
            source = name if name in given else name.replace(head, COPIES.get(head, head))
            if source in given:
                fitted[ours] = fit(source, given[source], parameter)
                if source != name:
                    initialised.append(f"{name} from {source}")
            elif head == "uniter":
                raise ValueError(f"these weights are not complete: {name} is missing")
            else:
                initialised.append(f"{name} at random")
        self.load_state_dict(fitted, strict=False)
        loaded = given.keys() & set(map(official_name, fitted))
        for name in given.keys() & TIED:  # a decoder of other numbers is ignored
            if torch.is_tensor(given[name]) and torch.equal(given[name], given[WORDS]):
                loaded.add(name)
        ignored = sorted(given.keys() - loaded)
        return {"loaded": sorted(loaded), "initialised": initialised, "ignored": ignored}

    @classmethod
    def from_bert(cls, folder, feature_size, dropout=0.0):
        """A model that starts as a published BERT.
        folder: holds config.json, model.safetensors or pytorch_model.bin, and perhaps vocab.txt.
        feature_size: F, the numbers that describe a region.
        Raises FileNotFoundError or ValueError, of one line. To learn which parameters begin at
        random, write these three steps out and keep what load_bert returns."""
        bert, weights, vocab_size = read_bert(folder)
        model = cls(Config.from_bert(bert, feature_size, dropout, vocab_size))
        model.load_bert(weights)
        return model

    def load_bert(self, state_dict):
        """Loads the weights of a published BERT. What it lacks starts as in UNITER's code: the
        embedding of regions, matching and discrimination at random, as do pooler and masked-LM head
        if they are missing; correction is a copy of the masked-LM head. Type 1, BERT's second
        sentence, becomes the type of regions.
        Returns {"loaded": official names, "ignored": official names, "initialised": the names of
        our parameters that begin at random and may want a higher learning rate}.
        Raises ValueError, changing nothing, if a part of BERT is missing or does not fit."""
        given = official_weights(state_dict)
        lacking = {}  # {official name: new values}
        initialised = []
        for ours, parameter in self.state_dict().items():
            name = official_name(ours).replace("correction_output", "cls")
            if name not in given and not name.startswith(BERT_PARTS):
                initialised.append(ours)
                lacking.setdefault(name, new_values(name, parameter))
        report = self.load_uniter(lacking | given)
        loaded = [name for name in report["loaded"] if name in given]
        return {"loaded": loaded, "initialised": initialised, "ignored": report["ignored"]}

    def export_uniter(self):
        """The weights under official names, for the official code."""
        weights = {official_name(name): value.clone() for name, value in self.state_dict().items()}
        return weights | {name: weights[WORDS] for name in TIED}


def initialise(module):
    """Linear maps keep the variance of their input: BERT's 0.02 is too little below 768 wide."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=module.in_features**-0.5)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.03)


def check_mask(mask, shape):
    """ValueError unless a mask is None or bool of this shape: numbers would be added to scores."""
    if mask is not None and (mask.dtype != torch.bool or mask.shape != shape):
        found = f"{mask.dtype} {tuple(mask.shape)}"
        raise ValueError(f"a mask must be torch.bool {tuple(shape)}, True = real; got {found}")


def mask_of(prepared):
    """The mask (A, L) of what is Prepared, also where none was given."""
    if prepared.mask is None:
        return prepared.states.new_ones(prepared.states.shape[:2], dtype=torch.bool)
    return prepared.mask


# ---- published weights: UNITER's names, BERT's files -------------------------------------------

WORDS = "uniter.embeddings.word_embeddings.weight"
TIED = ("cls.predictions.decoder.weight", "correction_output.predictions.decoder.weight")
VOCABULARY = (WORDS, "cls.predictions.bias", "correction_output.predictions.bias")
OFFICIAL = {  # our module: theirs, {} is the number of a layer
    "text.word": "uniter.embeddings.word_embeddings",
    "text.position": "uniter.embeddings.position_embeddings",
    "text.norm": "uniter.embeddings.LayerNorm",
    "token_type": "uniter.embeddings.token_type_embeddings",
    "region.feature": "uniter.img_embeddings.img_linear",
    "region.feature_norm": "uniter.img_embeddings.img_layer_norm",
    "region.box": "uniter.img_embeddings.pos_linear",
    "region.box_norm": "uniter.img_embeddings.pos_layer_norm",
    "region.norm": "uniter.img_embeddings.LayerNorm",
    "layers.query": "uniter.encoder.layer.{}.attention.self.query",
    "layers.key": "uniter.encoder.layer.{}.attention.self.key",
    "layers.value": "uniter.encoder.layer.{}.attention.self.value",
    "layers.out": "uniter.encoder.layer.{}.attention.output.dense",
    "layers.attention_norm": "uniter.encoder.layer.{}.attention.output.LayerNorm",
    "layers.up": "uniter.encoder.layer.{}.intermediate.dense",
    "layers.down": "uniter.encoder.layer.{}.output.dense",
    "layers.norm": "uniter.encoder.layer.{}.output.LayerNorm",
    "pooler": "uniter.pooler.dense",
    "matching": "rank_output",
    "mlm": "cls.predictions",
    "mlm.transform": "cls.predictions.transform.dense",
    "mlm.norm": "cls.predictions.transform.LayerNorm",
    "discrimination": "disc_output",
    "correction": "correction_output.predictions",
    "correction.transform": "correction_output.predictions.transform.dense",
    "correction.norm": "correction_output.predictions.transform.LayerNorm",
}
# What a head that plain UNITER lacks starts as; matching as the row "match" of two.
COPIES = {"rank_output": "itm_output", "disc_output": "itm_output", "correction_output": "cls"}


def official_name(name):
    """Our name of a parameter -> the official one."""
    module, _, leaf = name.rpartition(".")
    if not module.startswith("layers."):
        return f"{OFFICIAL[module]}.{leaf}"
    _, number, part = module.split(".")
    return f"{OFFICIAL[f'layers.{part}'].format(number)}.{leaf}"


def official_weights(state_dict):
    """{official name: value} of weights that may stand in {"model": ...} or {"state_dict": ...},
    with `model.` or `module.` before their names, `bert.` or nothing for `uniter.`, gamma and beta
    for weight and bias, or the bias of the words under the decoder's name."""
    for wrapper in ("model", "state_dict"):
        if isinstance(state_dict, dict) and isinstance(state_dict.get(wrapper), dict):
            state_dict = state_dict[wrapper]
    if not isinstance(state_dict, dict) or not state_dict:
        kind = type(state_dict).__name__
        raise ValueError(f"not UNITER weights, nor a BERT's: a {kind} names no tensors")
    weights = {}
    for name, value in state_dict.items():
        name = re.sub(r"^((module|model)\.)+", "", str(name))
        name = re.sub(r"^bert\.", "uniter.", name)
        name = re.sub(r"^(embeddings|encoder|pooler)\.", r"uniter.\1.", name)
        name = re.sub(r"predictions\.decoder\.bias$", "predictions.bias", name)
        name = re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name))
        weights[name] = value
    return weights


def check_regions(weights):
    """ValueError if these weights have words and no regions, as those of a BERT."""
    if WORDS in weights and "uniter.img_embeddings.img_linear.weight" not in weights:
        text = "to start from a plain BERT, give the folder with its config.json and vocab.txt"
        raise ValueError(f"not UNITER weights, they have no region embeddings: {text}")


def fit(name, value, parameter):
    """The value for a parameter, without rows that pad the vocabulary to a multiple of 8. Raises
    ValueError, with the official name, if it does not fit."""
    if not torch.is_tensor(value) or not value.is_floating_point() or not value.dim():
        raise ValueError(f"{name} is no tensor of floating-point numbers")
    if name.startswith("itm_output.") and len(parameter) == 1:
        value = value[1:2]
    rows = len(parameter)
    if name in VOCABULARY and len(value) == rows + -rows % 8:
        value = value[:rows]
    if value.shape != parameter.shape:
        shapes = f"{tuple(value.shape)}, not {tuple(parameter.shape)}"
        advice = "check the sizes"
        if name in VOCABULARY:
            advice = "take the vocabulary that was published with these weights"
        raise ValueError(f"{name} is {shapes}: {advice}")
    if not value.isfinite().all():
        raise ValueError(f"{name} holds numbers that are not finite: take other weights")
    return value


# A BERT whose config.json has another value here computes something else than our layers.
BERT_FIELDS = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
    "layer_norm_eps": 1e-12,
    "is_decoder": False,
}
BERT_PARTS = ("uniter.embeddings.", "uniter.encoder.")  # what every BERT has
BERT_FILES = ("model.safetensors", "pytorch_model.bin")
SAFETENSORS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def bert_size(bert, field):
    """The whole number in a field of config.json."""
    value = bert.get(field)
    if type(value) is not int or value < 1:
        found = f"{field} {value!r}" if field in bert else f"no {field}"
        raise ValueError(f"config.json has {found}: a whole number above 0 is wanted")
    return value


def new_values(name, parameter):
    """What a parameter that BERT lacks starts as in UNITER's code. name: the official one."""
    if name.endswith(".bias"):
        return torch.zeros_like(parameter)
    if "LayerNorm" in name or "layer_norm" in name:
        return torch.ones_like(parameter)
    return 0.02 * torch.randn_like(parameter)


def read_bert(folder):
    """Reads a published BERT from its folder. Returns the content of config.json, the state dict,
    and how many words vocab.txt has, None if there is no such file. Raises FileNotFoundError or
    ValueError, of one line."""
    folder = Path(folder)
    weights = [folder / name for name in BERT_FILES if (folder / name).is_file()]
    if not weights or not (folder / "config.json").is_file():
        lacking = "config.json" if weights else " or ".join(BERT_FILES)
        text = f"a BERT is a folder with config.json, vocab.txt and {' or '.join(BERT_FILES)}"
        raise FileNotFoundError(f"{folder}: no {lacking}; {text}")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as fault:
        raise ValueError(f"{folder / 'config.json'}: not JSON: {fault}") from fault
    if not isinstance(config, dict):
        raise ValueError(f"{folder / 'config.json'}: {{...}} with a BERT's sizes is expected")
    vocab_size = None
    if (folder / "vocab.txt").is_file():
        vocab_size = (folder / "vocab.txt").read_bytes().rstrip(b"\r\n").count(b"\n") + 1
    return config, read_weights(weights[0]), vocab_size


def read_weights(path):
    """The state dict in a .safetensors file or one of torch.save; ValueError if it is damaged."""
    if Path(path).suffix == ".safetensors":
        return read_safetensors(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except Exception as fault:  # torch.load raises half a dozen kinds, with unsafe advice
        raise ValueError(f"{path}: damaged, or not a file of weights alone") from fault


def read_safetensors(path):
    """{name: tensor} of a .safetensors file, which has three parts: the length of the header in 8
    bytes; the header, JSON with dtype, shape and place of each tensor; the numbers of all tensors,
    end to end. Raises ValueError if the file is cut off or the header does not fit the numbers."""
    tensors = {}
    name = "its header"
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        left = Path(path).stat().st_size - 8 - length  # bytes of numbers
        try:
            header = json.loads(file.read(length) if left > 0 else "")
            header.pop("__metadata__", None)
            place = 0
            for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
                dtype = SAFETENSORS[entry["dtype"]]
                end = place + math.prod(entry["shape"]) * dtype.itemsize
                if entry["data_offsets"] != [place, end] or not place < end <= left:
                    raise ValueError("its numbers do not follow those of the tensor before")
                numbers = bytearray(file.read(end - place))
                tensors[name] = torch.frombuffer(numbers, dtype=dtype).reshape(entry["shape"])
                place = end
            if place != left:
                raise ValueError("numbers that belong to no tensor follow")
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as fault:
            text = f"cut off or damaged at {name}: download it again"
            raise ValueError(f"{path}: {text}") from fault
    return tensors


# ---- the fast path -----------------------------------------------------------------------------
# Read last. Nothing here changes a result beyond rounding. Gains, here and above: time without the
# trick over time with it, in float32 / bfloat16, size tiny unless said, one thread of a Xeon with
# AMX (python tests/benchmark.py --what savings).


def fast_dtype(device):
    """The dtype that `--dtype auto` means: bfloat16 where the hardware computes in it; GPUs before
    Ampere (capability 8) would emulate it. Gain in scoring: 1.9; size base: 3."""
    kind = torch.device(device).type
    fast = kind == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8
    if kind == "cpu" and Path("/proc/cpuinfo").exists():
        fast = re.search("avx512_bf16|amx_bf16", Path("/proc/cpuinfo").read_text())
    return torch.bfloat16 if fast else torch.float32


def autocast(device, dtype):
    """A context in which matrix products are done in dtype, float32 or bfloat16."""
    half = dtype == torch.bfloat16
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=half)


def can_pack(texts, images):
    """Whether packed_scores pays: there is padding, and no GPU that would wait for the lengths."""
    padded = texts.mask is not None or images.mask is not None
    return padded and texts.states.device.type == "cpu"


def packed_scores(model, texts, text_index, images, image_index, batch):
    """TagsDC.score_pairs on a CPU: pairs of about one length share a pass, and no padding stands
    between text and regions. Gain: 1.4 / 1.2, in a step of TAGS-DC 1.15."""
    A, T = texts.states.shape[:2]
    R = images.states.size(1)
    # All positions of all texts and images below each other, and where among them a pair lies.
    states = torch.cat((texts.states.flatten(0, 1), images.states.flatten(0, 1)))
    words = text_index[:, None] * T + torch.arange(T)
    regions = image_index[:, None] * R + torch.arange(R) + A * T
    positions = torch.cat((words, regions), 1)  # (N, S)
    mask = torch.cat((mask_of(texts)[text_index], mask_of(images)[image_index]), 1)  # (N, S)
    order = mask.sum(1).argsort()
    logits = []
    for pairs in order.split(batch):
        # The real positions first, as many as the longest pair has.
        kept, front = mask[pairs].sort(dim=1, descending=True, stable=True)
        longest = int(kept.any(0).sum().clamp(min=1))
        kept = kept[:, :longest]
        x = F.embedding(positions[pairs].gather(1, front)[:, :longest], states)
        hidden = model.encode(x, None if kept.all() else kept, first=1)  # (n, 1, D)
        logits.append(model.match(hidden))
    return torch.cat(logits)[order.argsort()]
