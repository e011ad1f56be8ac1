"""The one-stream image-text encoder (UNITER) with the four heads of TAGS-DC.

Letters: B pairs, T text positions, R regions, S = T + R, D hidden size, V vocabulary, F feature
size; A captions and I images that are prepared once and then meet in N pairs; L positions of
either; h heads, each d = D / h wide; q chosen places. Every mask: True = real, None = all is.
A sequence is [CLS] w1 .. wn [SEP], padded to T, then R regions."""

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

layer_norm = partial(nn.LayerNorm, eps=1e-12)  # BERT's epsilon
TEMPERATURE = 0.1  # of the similarity; a learnt one falls to 0.03 and overfits
PRESETS = {
    "flat": dict(hidden=256, layers=2, heads=4, intermediate=1024, max_positions=64),
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
    similarity: bool = False  # added to the matching logits, see TagsDC.similarity

    @classmethod
    def preset(cls, name, **changes):
        """The sizes called `name` with `changes` laid over them."""
        return cls(**(PRESETS[name] | changes))

    @classmethod
    def from_uniter(cls, state_dict, heads=None, dropout=0.1, vocab_size=None):
        """Reads the sizes off official weights; ValueError if these are none. heads: 64 wide
        unless given. vocab_size: words of the vocabulary file, if the weights may be padded."""
        weights = official_weights(state_dict)
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
            raise ValueError(f"not UNITER weights, whose sizes can be read: {fault}") from None


class TextEmbedding(nn.Module):
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


class Layer(nn.Module):  # a post-norm BERT layer
    def __init__(self, config):
        super().__init__()
        D = config.hidden
        self.heads = config.heads
        self.attention = nn.ModuleDict({n: nn.Linear(D, D) for n in ("query", "key", "value")})
        self.attention_dropout = config.dropout
        self.out = nn.Linear(D, D)
        self.attention_norm = layer_norm(D)
        self.up = nn.Linear(D, config.intermediate)
        self.down = nn.Linear(config.intermediate, D)
        self.norm = layer_norm(D)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, mask, qkv=None):
        """(N, S, D), mask (N, S) or None -> (N, S, D). qkv: as in `gather`."""
        return self.finish(x, self.gather(x, mask, qkv))

    def gather(self, x, mask, qkv=None):
        """Multi-head self-attention, what each position takes from all: (N, S, D) -> (N, S, D).
        qkv: query, key and value, (N, S, D) each, if known already."""
        if qkv is None:
            qkv = [part(x) for part in self.attention.values()]
        # (N, h, S, d) each: a head is a part of the columns.
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in qkv)
        context = attend(q, k, v, mask, self.attention_dropout if self.training else 0.0)
        return context.transpose(1, 2).flatten(2)  # the heads side by side again

    def finish(self, x, context):
        """What follows attention, each position for itself: (..., D), (..., D) -> (..., D)."""
        x = self.attention_norm(x + self.dropout(self.out(context)))
        return self.norm(x + self.dropout(self.down(F.gelu(self.up(x)))))


class WordHead(nn.Module):  # BERT's masked-LM head, its decoder tied to the word embeddings
    def __init__(self, config):
        super().__init__()
        self.transform = nn.Linear(config.hidden, config.hidden)
        self.norm = layer_norm(config.hidden)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden, word_embeddings):  # (..., D), (V, D) -> (..., V)
        return F.linear(self.norm(F.gelu(self.transform(hidden))), word_embeddings, self.bias)


@dataclass
class Prepared:
    """What captions or images bring to every pair they meet, whoever the partner is."""

    states: torch.Tensor  # (A, L, D) embeddings
    qkv: torch.Tensor  # (A, L, 3D) query, key and value of the first layer
    mask: torch.Tensor  # (A, L) bool
    mean: torch.Tensor  # (A, D) of the real embeddings; a text's times an image's: similarity
    padded: bool  # False: the mask is True everywhere


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
        self.recompute = False  # activations in the backward pass: less memory, a third more work
        self.apply(initialise)
        nn.init.normal_(self.text.word.weight, std=config.hidden**-0.5)  # tied logits of size 1

    def forward(self, input_ids, features, boxes, text_mask, region_mask):
        """Encodes B pairs: input_ids (B, T) long, features (B, R, F), boxes (B, R, 7) as shares of
        the picture (x1, y1, x2, y2, w, h, w * h), text_mask (B, T) and region_mask (B, R).
        Returns hidden (B, T + R, D), text first. No real row depends on what lies in padding."""
        pair = torch.arange(len(input_ids), device=input_ids.device)
        texts = self.prepare_text(input_ids, text_mask)
        images = self.prepare_regions(features, boxes, region_mask)
        return self.encode_pairs(texts, pair, images, pair)

    def prepare_text(self, input_ids, text_mask=None):
        """Embeds captions, once, whatever images they will meet: (A, T) long -> Prepared."""
        return prepared(self, self.text(input_ids, self.token_type.weight[0]), text_mask)

    def prepare_regions(self, features, boxes, region_mask=None):
        """The same for images: (I, R, F) and (I, R, 7) -> Prepared."""
        states = self.region(features, boxes, self.token_type.weight[1])
        area = boxes[..., 6]  # (I, R)
        largest = area == area.amax(1, keepdim=True)  # which is often the whole picture
        return prepared(self, states, region_mask, largest)

    def encode_pairs(self, texts, text_index, images, image_index, last=None):
        """The pairs (texts[text_index], images[image_index]), both (N,) -> hidden (N, T + R, D).
        last: what stands for the last layer, None = itself; its result is returned."""
        x = torch.cat((texts.states[text_index], images.states[image_index]), 1)
        qkv = torch.cat((texts.qkv[text_index], images.qkv[image_index]), 1)
        mask = None
        if texts.padded or images.padded:
            mask = torch.cat((texts.mask[text_index], images.mask[image_index]), 1)
        return self.encode(x, mask, qkv.chunk(3, -1), last)

    def encode(self, x, mask, qkv=None, last=None):
        """All layers, (N, S, D) -> (N, S, D). qkv: of the first layer, if known. last: as above."""
        for layer in [*self.layers[:-1], last or self.layers[-1]]:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, x, mask, qkv, use_reentrant=False)
            else:
                x = layer(x, mask, qkv)
            qkv = None  # later layers make their own
        return x

    def score_pairs(self, texts, text_index, images, image_index, batch=None):
        """match(encode_pairs(...)) + similarity(...) for less work, `batch` pairs in one pass ->
        (N,) logits."""
        return fast_scores(self, texts, text_index, images, image_index, batch)

    def similarity(self, texts, text_index, images, image_index):
        """What can be said of the pairs without the encoder, which is most where data are few:
        cosine of the mean embeddings / TEMPERATURE -> (N,), or 0 if the config has none."""
        if not self.config.similarity:
            return 0.0
        return (texts.mean[text_index] * images.mean[image_index]).sum(-1)

    def encode_places(self, texts, text_index, images, image_index, places):
        """encode_pairs(...)[:, :T].flatten(0, 1)[places] for less work: (q,) long -> (q, D)."""
        T, R = texts.states.size(1), images.states.size(1)
        places = places // T * (T + R) + places % T  # the same among (N, S) positions
        last = partial(places_alone, self.layers[-1], places)
        return self.encode_pairs(texts, text_index, images, image_index, last)

    def match(self, hidden):
        """Matching logits (B,) of hidden (B, S, D), read off [CLS]. s(I, T) is the sigmoid of their
        sum with `similarity`, which is 0 in UNITER."""
        with autocast(hidden.device, torch.float32):  # in bfloat16 one of 256 would tie
            cls = hidden[:, 0].to(self.matching.weight.dtype)
            return self.matching(torch.tanh(self.pooler(cls)))[:, 0]

    def fill(self, hidden):  # masked-LM logits: (..., D) -> (..., V)
        return self.mlm(hidden, self.text.word.weight)

    def discriminate(self, hidden):  # (..., D) -> (..., 2) logits: class 1 = original, 0 = replaced
        return self.discrimination(hidden)

    def correct(self, hidden):  # logits of the original word: (..., D) -> (..., V)
        return self.correction(hidden, self.text.word.weight)

    def load_uniter(self, state_dict):
        """Takes official UNITER or TAGS weights, in place; missing heads start as COPIES says.
        Returns official names: {"loaded": [..], "ignored": [..], "initialised": ["x from y", ..]}.
        Raises ValueError, changing nothing, if a part of the encoder is missing or does not fit."""
        given = official_weights(state_dict)
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
                raise ValueError(f"not complete UNITER weights: {name} is missing")
            else:
                initialised.append(f"{name} at random")
        self.load_state_dict(fitted, strict=False)
        loaded = given.keys() & set(map(official_name, fitted))
        for name in given.keys() & TIED:  # a decoder of other numbers is ignored
            if torch.is_tensor(given[name]) and torch.equal(given[name], given[WORDS]):
                loaded.add(name)
        ignored = sorted(given.keys() - loaded)
        return {"loaded": sorted(loaded), "initialised": initialised, "ignored": ignored}

    def export_uniter(self):
        """The weights under official names, for the official code, which has no similarity."""
        weights = {official_name(name): value.clone() for name, value in self.state_dict().items()}
        return weights | {name: weights[WORDS] for name in TIED}


def initialise(module):
    """Linear maps keep the variance of their input: BERT's 0.02 is too little below 768 wide."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=module.in_features**-0.5)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.03)


# ---- official names ----------------------------------------------------------------------------

WORDS = "uniter.embeddings.word_embeddings.weight"
TIED = ("cls.predictions.decoder.weight", "correction_output.predictions.decoder.weight")
VOCABULARY = (WORDS, "cls.predictions.bias", "correction_output.predictions.bias")
NAMES = {  # a prefix of official names: "ours=the rest of theirs"; # is the number of a layer
    "uniter.embeddings.": """text.word=word_embeddings text.position=position_embeddings
        text.norm=LayerNorm token_type=token_type_embeddings""",
    "uniter.img_embeddings.": """region.feature=img_linear region.feature_norm=img_layer_norm
        region.box=pos_linear region.box_norm=pos_layer_norm region.norm=LayerNorm""",
    "uniter.encoder.layer.#.": """layers.#.attention.query=attention.self.query
        layers.#.attention.key=attention.self.key layers.#.attention.value=attention.self.value
        layers.#.out=attention.output.dense layers.#.attention_norm=attention.output.LayerNorm
        layers.#.up=intermediate.dense layers.#.down=output.dense layers.#.norm=output.LayerNorm""",
    "": "pooler=uniter.pooler.dense matching=rank_output discrimination=disc_output",
    "cls.predictions": "mlm= mlm.transform=.transform.dense mlm.norm=.transform.LayerNorm",
    "correction_output.predictions": """correction= correction.transform=.transform.dense
        correction.norm=.transform.LayerNorm""",
}
OFFICIAL = {}
for prefix, pairs in NAMES.items():
    for pair in pairs.split():
        ours, rest = pair.split("=")
        OFFICIAL[ours] = prefix + rest
# What a head that plain UNITER lacks starts as; matching as the row "match" of two.
COPIES = {"rank_output": "itm_output", "disc_output": "itm_output", "correction_output": "cls"}


def official_name(name):
    """Our name of a parameter -> the official one."""
    number = re.search(r"\d+", name)
    module, _, leaf = re.sub(r"\d+", "#", name).rpartition(".")
    return f"{OFFICIAL[module]}.{leaf}".replace("#", number[0] if number else "")


def official_weights(state_dict):
    """{official name: value} of weights that may stand in {"model": ...} or {"state_dict": ...},
    with `model.` or `module.` before the names, `bert.` for `uniter.`, gamma and beta."""
    for wrapper in ("model", "state_dict"):
        if isinstance(state_dict, dict) and isinstance(state_dict.get(wrapper), dict):
            state_dict = state_dict[wrapper]
    if not isinstance(state_dict, dict) or not state_dict:
        raise ValueError(f"not UNITER weights: a {type(state_dict).__name__} names no tensors")
    weights = {}
    for name, value in state_dict.items():
        name = re.sub(r"^((module|model)\.)+", "", str(name))
        name = re.sub(r"^bert\.", "uniter.", name)
        name = re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name))
        weights[name] = value
    return weights


def fit(name, value, parameter):
    """The value for a parameter, without rows that pad the vocabulary to a multiple of 8."""
    if not torch.is_tensor(value) or not value.is_floating_point() or not value.dim():
        raise ValueError(f"{name} is no tensor of floating-point numbers")
    if name.startswith("itm_output.") and len(parameter) == 1:
        value = value[1:2]
    rows = len(parameter)
    if name in VOCABULARY and len(value) == rows + -rows % 8:
        value = value[:rows]
    if value.shape != parameter.shape:
        shapes = f"{tuple(value.shape)}, not {tuple(parameter.shape)}"
        raise ValueError(f"{name} is {shapes}: check the sizes and the vocabulary")
    if not value.isfinite().all():
        raise ValueError(f"{name} holds numbers that are not finite: take other weights")
    return value


# ---- the fast path -----------------------------------------------------------------------------
# Read last. Nothing here changes a result beyond rounding; all that bfloat16, a CPU or a GPU needs
# is here. Gains: time without over time with, size tiny, one thread, float32 / bfloat16.


def fast_dtype(device):
    """The dtype that `--dtype auto` means: bfloat16 where the hardware is fast. Gain: 2.2."""
    kind = torch.device(device).type
    fast = kind == "cuda" and torch.cuda.is_bf16_supported()
    if kind == "cpu" and Path("/proc/cpuinfo").exists():
        fast = re.search("avx512_bf16|amx_bf16", Path("/proc/cpuinfo").read_text())
    return torch.bfloat16 if fast else torch.float32


def autocast(device, dtype):
    """A context in which matrix products are done in dtype, float32 or bfloat16."""
    half = dtype == torch.bfloat16
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=half)


def attend(q, k, v, mask, dropout):
    """Scaled dot-product attention: (N, h, S, d) each, mask (N, S) or None -> (N, h, S, d).
    In bfloat16 on a CPU by plain products. Gain: 1.08 in scoring, 1.8 to 2.0 in training."""
    mask = None if mask is None else mask[:, None, None]  # (N, 1, 1, S)
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    scores = q * q.size(-1) ** -0.5 @ k.transpose(2, 3)
    if mask is not None:
        scores = scores.where(mask, -torch.inf)
    weights = F.dropout(scores.softmax(-1, dtype=torch.float32), dropout)
    return weights.to(v.dtype) @ v


def prepared(model, states, mask, largest=0.0):
    """Embeddings (A, L, D) with query, key and value of the first layer, once. Gain: 1.06.
    largest: (A, L), of regions: counts in the mean as much as all regions together."""
    qkv = torch.cat([part(states) for part in model.layers[0].attention.values()], -1)
    real = torch.ones_like(states[..., 0], dtype=torch.bool) if mask is None else mask
    weight = real * (largest + 1 / real.sum(1, keepdim=True).clamp(min=1))  # (A, L)
    mean = F.normalize((states * weight[..., None]).sum(1), dim=-1) * TEMPERATURE**-0.5
    return Prepared(states, qkv, real, mean, mask is not None)


def places_alone(layer, places, x, mask, qkv=None):
    """The last layer at flat places (q,) alone: (N, S, D) -> (q, D). Gain: 1.20 in float32."""
    context = layer.gather(x, mask, qkv).flatten(0, 1)
    return layer.finish(F.embedding(places, x.flatten(0, 1)), F.embedding(places, context))


def cls_alone(layer, x, mask, qkv=None):
    """The last layer at position 0 alone: (N, S, D) -> (N, 1, D). Gain: 1.47 in float32.
    With one query, q (x Wk)' is cheaper as (q Wk) x', and a (x Wv) as (a x) Wv: the h queries meet
    x itself (the bias of keys changes no attention a). Gain: 1.05, training 1.16 / 1.05."""
    query, key, value = layer.attention.values()
    split = (layer.heads, -1)
    dropout = layer.attention_dropout if layer.training else 0.0
    with autocast(x.device, torch.float32):
        q = query(x[:, 0]).unflatten(1, split)  # (N, h, d)
        q = torch.einsum("nhd,hdD->nhD", q, key.weight.unflatten(0, split))
        q = q[:, None] * layer.heads**0.5  # attend divides by D**0.5, not d**0.5
        a = attend(q, x[:, None], x[:, None], mask, dropout)[:, 0]  # (N, h, D)
        context = torch.einsum("nhD,hdD->nhd", a, value.weight.unflatten(0, split))
    return layer.finish(x[:, :1], (context.flatten(1) + value.bias)[:, None])


def can_pack(device):
    return device.type == "cpu"  # a GPU would wait for the lengths


def fast_scores(model, texts, text_index, images, image_index, batch):
    """TagsDC.score_pairs: on a CPU pairs of about one length share a pass, and no padding stands
    between text and regions. Gain: 1.52 / 1.41."""
    A, T = texts.mask.shape
    R = images.mask.size(1)
    device = text_index.device
    # All positions of all texts and images below each other, and where among them a pair lies.
    states = torch.cat((texts.states.flatten(0, 1), images.states.flatten(0, 1)))
    qkv = torch.cat((texts.qkv.flatten(0, 1), images.qkv.flatten(0, 1)))
    words = text_index[:, None] * T + torch.arange(T, device=device)
    regions = image_index[:, None] * R + torch.arange(R, device=device) + A * T
    places = torch.cat((words, regions), 1)  # (N, S)
    mask = torch.cat((texts.mask[text_index], images.mask[image_index]), 1)
    packed = can_pack(device)
    padded = texts.padded or images.padded
    last = partial(cls_alone, model.layers[-1])
    order = mask.sum(1).argsort() if packed else torch.arange(len(mask), device=device)
    logits = []
    for pairs in order.split(batch or max(len(order), 1)):
        rows, real = places[pairs], mask[pairs]
        if packed:  # the real positions first, as many as the longest pair has
            real, front = real.sort(dim=1, descending=True, stable=True)
            longest = real.any(0).sum().clamp(min=1)
            real = real[:, :longest]
            rows = rows.gather(1, front)[:, :longest]
            padded = not real.all()
        first = F.embedding(rows, qkv).chunk(3, -1)
        cls = model.encode(F.embedding(rows, states), real if padded else None, first, last)
        similarity = model.similarity(texts, text_index[pairs], images, image_index[pairs])
        logits.append(model.match(cls) + similarity)
    return torch.cat(logits)[order.argsort()]
