"""The one-stream image-text encoder (UNITER) with the four heads of TAGS-DC (METHOD 1 and 4).
Letters: B pairs, T text positions, R regions, S = T + R, D hidden, V vocabulary, F feature size; A captions and I images that are
prepared once and then met in N pairs. Every mask: True = real. A sequence: T text positions ([CLS] w1 .. wn [SEP], padded), then R regions."""
import re
from dataclasses import dataclass
from functools import partial, reduce

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

PRESETS = {"tiny": dict(hidden=128, layers=3, heads=4, intermediate=512, max_positions=64),
           "small": dict(hidden=256, layers=4, heads=4, intermediate=1024, max_positions=64),
           "base": dict(hidden=768, layers=12, heads=12, intermediate=3072),
           "large": dict(hidden=1024, layers=24, heads=16, intermediate=4096)}

@dataclass
class Config:
    """Sizes of the network; `Config.preset("base", vocab_size=28996, feature_size=2048)` is UNITER-base."""
    vocab_size: int
    feature_size: int = 2048
    hidden: int = 768
    layers: int = 12
    heads: int = 12
    intermediate: int = 3072
    max_positions: int = 512
    dropout: float = 0.1

    @classmethod
    def preset(cls, name, **changes):
        """The sizes called `name`, with `changes` laid over them. Raises ValueError for an unknown name."""
        if name not in PRESETS:
            raise ValueError(f"unknown size {name!r}: choose from {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **changes})

    @classmethod
    def from_uniter(cls, state_dict, heads=None, dropout=0.1):
        """Reads the sizes off official weights. They do not tell the number of heads: 64 wide, as UNITER's, unless given."""
        state = _official(state_dict)
        try:
            vocab_size, hidden = state["uniter.embeddings.word_embeddings.weight"].shape
            layers = len({key.split(".")[3] for key in state if key.startswith("uniter.encoder.layer.")})
            return cls(vocab_size, state["uniter.img_embeddings.img_linear.weight"].shape[1], hidden, layers,
                       heads or max(hidden // 64, 1), state["uniter.encoder.layer.0.intermediate.dense.weight"].shape[0],
                       state["uniter.embeddings.position_embeddings.weight"].shape[0], dropout)
        except (KeyError, ValueError) as missing:
            raise ValueError(f"not UNITER weights: {missing} is not among its {len(state)} entries") from None

@dataclass
class Prepared:
    """What one modality brings to every pair it meets: embeddings and the first layer's q, k, v, which do not depend on the partner."""
    states: torch.Tensor       # (A, L, D)
    qkv: torch.Tensor          # (A, L, 3D)
    mask: torch.Tensor | None  # (A, L) bool, None = nothing is padded
    def first(self, n):  # the first n alone
        return Prepared(*(t if t is None else t[:n] for t in (self.states, self.qkv, self.mask)))

def _join(texts, text_index, images, image_index):
    """The sequences of N pairs: states (A * T + I * R, D) and q, k, v (A * T + I * R, 3D) of all texts and images, where among them each
    sequence lies (N, S) long, and what of it is real (N, S) bool or None."""
    both, index = (texts, images), (text_index, image_index)
    states, qkv = (torch.cat([getattr(p, name).flatten(0, 1) for p in both]) for name in ("states", "qkv"))
    rows = torch.arange(len(states), device=text_index.device).split([p.states[..., 0].numel() for p in both])
    places = torch.cat([row.view(p.states.shape[:2])[i] for row, p, i in zip(rows, both, index)], 1)
    masks = [p.states.new_ones(p.states.shape[:2], dtype=torch.bool) if p.mask is None else p.mask for p in both]
    return states, qkv, places, None if texts.mask is None and images.mask is None else torch.cat([mask[i] for mask, i in zip(masks, index)], 1)

_norm = partial(nn.LayerNorm, eps=1e-12)

class TextEmbedding(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.word = nn.Embedding(c.vocab_size, c.hidden, padding_idx=0)
        self.position = nn.Embedding(c.max_positions, c.hidden)
        self.norm, self.dropout = _norm(c.hidden), nn.Dropout(c.dropout)

    def forward(self, input_ids, token_type):  # (A, T), (D,) -> (A, T, D)
        if input_ids.size(1) > self.position.num_embeddings:
            raise ValueError(f"{input_ids.size(1)} text positions, the model has {self.position.num_embeddings}")
        return self.dropout(self.norm(self.word(input_ids) + self.position.weight[:input_ids.size(1)] + token_type))

class RegionEmbedding(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.feature, self.feature_norm = nn.Linear(c.feature_size, c.hidden), _norm(c.hidden)
        self.box, self.box_norm = nn.Linear(7, c.hidden), _norm(c.hidden)
        self.norm, self.dropout = _norm(c.hidden), nn.Dropout(c.dropout)

    def forward(self, features, boxes, token_type):  # (I, R, F), (I, R, 7), (D,) -> (I, R, D)
        return self.dropout(self.norm(self.feature_norm(self.feature(features)) + self.box_norm(self.box(boxes)) + token_type))

class Layer(nn.Module):
    """One post-norm BERT layer."""
    def __init__(self, c):
        super().__init__()
        self.heads, self.p = c.heads, c.dropout
        self.qkv, self.out, self.attention_norm = nn.Linear(c.hidden, 3 * c.hidden), nn.Linear(c.hidden, c.hidden), _norm(c.hidden)
        self.up, self.down, self.norm = nn.Linear(c.hidden, c.intermediate), nn.Linear(c.intermediate, c.hidden), _norm(c.hidden)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x, mask, qkv=None, at=...):  # (N, S, D), (N, S) bool or None -> (N, S, D)[at]
        qkv, mask = self.qkv(x) if qkv is None else qkv, mask if mask is None else mask[:, None, None]
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in qkv.chunk(3, -1))  # (N, heads, S, D / heads)
        if q.device.type == "cpu" and q.dtype == torch.bfloat16:  # there fused attention is half as fast, and its backward an eighth
            context = self.weights(q * q.size(-1) ** -0.5 @ k.transpose(2, 3), mask).to(v.dtype) @ v
        else:
            context = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=self.p if self.training else 0.0)
        return self.finish(x[at], context.transpose(1, 2).flatten(2)[at])

    def first_row(self, x, mask, qkv=None):
        """The same for row 0 ([CLS]) alone, all that matching needs of the last layer: (N, S, D) -> (N, 1, D). With one query it is cheaper
        to write q (x Wk)' as (q Wk) x' and a (x Wv) as (a x) Wv. The keys' bias adds the same to every score: it changes no weight a."""
        with torch.autocast(x.device.type, enabled=False):
            (wq, wk, wv), (bq, _, bv) = (t.to(x.dtype).unflatten(0, (3, self.heads, -1)) for t in (self.qkv.weight, self.qkv.bias))
            q = torch.einsum("nd,hed->nhe", x[:, 0], wq) + bq              # (N, heads, D / heads); wq, wk, wv: (heads, D / heads, D)
            scores = torch.einsum("nhe,hed->nhd", q * q.size(-1) ** -0.5, wk) @ x.transpose(1, 2)
            a = self.weights(scores, mask if mask is None else mask[:, None]).to(x.dtype)  # (N, heads, S)
            context = torch.einsum("nhd,hed->nhe", a @ x, wv) + a.sum(-1, keepdim=True) * bv
        return self.finish(x[:, :1], context.flatten(1)[:, None])

    def weights(self, scores, mask):  # (..., S) -> (..., S) float32
        scores = scores if mask is None else scores.where(mask, -torch.inf)
        return F.dropout(scores.softmax(-1, dtype=torch.float32), self.p, self.training)

    def finish(self, x, context):  # (..., D) each -> (..., D)
        x = self.attention_norm(x + self.dropout(self.out(context)))
        return self.norm(x + self.dropout(self.down(F.gelu(self.up(x)))))

class WordHead(nn.Module):
    """BERT's masked-LM head, its decoder tied to the word embeddings it is handed; used for MLM and for word correction."""
    def __init__(self, c):
        super().__init__()
        self.transform, self.norm = nn.Linear(c.hidden, c.hidden), _norm(c.hidden)
        self.bias = nn.Parameter(torch.zeros(c.vocab_size))

    def forward(self, hidden, word_embeddings):  # (..., D), (V, D) -> (..., V)
        return F.linear(self.norm(F.gelu(self.transform(hidden))), word_embeddings, self.bias)

class TagsDC(nn.Module):
    """UNITER with a matching, a masked-LM, a word-discrimination and a word-correction head on one shared encoder."""
    def __init__(self, config):
        super().__init__()
        if config.hidden % config.heads:
            raise ValueError(f"hidden size {config.hidden} does not divide into {config.heads} heads")
        self.config = config
        self.text, self.region = TextEmbedding(config), RegionEmbedding(config)
        self.token_type = nn.Embedding(2, config.hidden)  # 0 text, 1 region
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.pooler, self.rank = nn.Linear(config.hidden, config.hidden), nn.Linear(config.hidden, 1)
        self.mlm, self.correction = WordHead(config), WordHead(config)
        self.discrimination = nn.Linear(config.hidden, 2)
        self.checkpointing = False  # recompute activations in the backward pass: less memory, a third more work
        self.uniter_extras = {}     # official entries without a place here, kept for export_uniter
        self.apply(self._initialise)

    @staticmethod
    def _initialise(module):
        """Linear maps keep the variance of their input. BERT's 0.02 suits 768 wide layers; at 128 it starves the attention, and
        a model trained from scratch spends thousands of steps on language alone before it looks at the image."""
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features ** -0.5)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)

    def forward(self, input_ids, features, boxes, text_mask, region_mask):
        """Encodes B pairs: input_ids (B, T) long, features (B, R, F), boxes (B, R, 7) as fractions of the image (x1, y1, x2, y2, w, h,
        w*h), text_mask (B, T) and region_mask (B, R) bool; a None mask says that nothing is padded.
        Returns hidden (B, T + R, D), text positions first. Rows of padding are meaningless, and no real row depends on them."""
        row = torch.arange(len(input_ids), device=input_ids.device)
        return self.encode_pairs(self.prepare_text(input_ids, text_mask), row, self.prepare_regions(features, boxes, region_mask), row)

    def prepare_text(self, input_ids, text_mask=None):
        """Embeds captions and projects them for the first layer, once, whatever images they will meet. (A, T) long -> Prepared."""
        states = self.text(input_ids, self.token_type.weight[0])
        return Prepared(states, self.layers[0].qkv(states), text_mask)

    def prepare_regions(self, features, boxes, region_mask=None):
        """The same for images: (I, R, F) and (I, R, 7) -> Prepared."""
        states = self.region(features, boxes, self.token_type.weight[1])
        return Prepared(states, self.layers[0].qkv(states), region_mask)

    def encode_pairs(self, texts, text_index, images, image_index, at=...):
        """forward() for the pairs (texts[text_index], images[image_index]), both (N,) long -> hidden (N, T + R, D); at: two (q,) long, of
        pairs and of positions -> hidden[at] (q, D) alone, which spares the rest most of the last layer."""
        return self._encode(*_join(texts, text_index, images, image_index), partial(self.layers[-1], at=at))

    def score_pairs(self, texts, text_index, images, image_index, batch=None):
        """match(encode_pairs(...)) with the last layer worked out for [CLS] alone -> (N,) matching logits.
        batch: pairs in one pass, None = all at once; a hundred or so keep the working set in a CPU's cache. On a CPU pairs of about equal
        length share a pass, and no padding stands between text and regions ([CLS] is always real); a GPU would have to be asked for lengths."""
        (states, qkv, places, mask), order, logits = _join(texts, text_index, images, image_index), None, []
        if mask is not None and mask.device.type == "cpu":
            order = mask.sum(1).argsort()
            mask, front = mask[order].sort(stable=True, dim=1, descending=True)
            places = places[order].gather(1, front)
        passes = places.split(batch or max(len(places), 1))
        for rows, real in zip(passes, [None] * len(passes) if mask is None else mask.split(len(passes[0]) or 1)):
            if order is not None:
                width = real.any(0).sum().clamp(min=1)
                rows, real = rows[:, :width], None if real[:, :width].all() else real[:, :width]
            logits.append(self.match(self._encode(states, qkv, rows, real, self.layers[-1].first_row)))
        return torch.cat(logits) if order is None else torch.cat(logits)[order.argsort()]

    def _encode(self, states, qkv, places, mask, last):  # what _join returns; what stands for the last layer -> its result
        x, qkv = F.embedding(places, states), F.embedding(places, qkv)
        for layer in (*self.layers[:-1], last):
            x = checkpoint(layer, x, mask, qkv, use_reentrant=False) if self.checkpointing and torch.is_grad_enabled() else layer(x, mask, qkv)
            qkv = None  # later layers make their own
        return x

    def match(self, hidden):
        """Matching logits (B,) of hidden (B, S, D), read off the pooled [CLS]; s(I, T) is their sigmoid."""
        with torch.autocast(hidden.device.type, enabled=False):  # one bfloat16 logit in 256 would tie with another
            return self.rank(torch.tanh(self.pooler(hidden[:, 0].to(self.rank.weight.dtype))))[:, 0]

    def fill(self, hidden):
        """Masked-LM logits of text positions: (..., D) -> (..., V). Hand it the masked positions alone to spare the rest."""
        return self.mlm(hidden, self.text.word.weight)

    def discriminate(self, hidden):
        """Word-discrimination logits of text positions: (..., D) -> (..., 2), class 1 = original, 0 = replaced."""
        return self.discrimination(hidden)

    def correct(self, hidden):
        """Word-correction logits of text positions: (..., D) -> (..., V)."""
        return self.correction(hidden, self.text.word.weight)

    def load_uniter(self, state_dict):
        """Takes weights under official UNITER or TAGS names, in place (METHOD 1).
        Understands pre-trained UNITER (`uniter.*`, `cls.*`, `itm_output.*`), the older `bert.*` prefix and gamma / beta names, and fine-tuned
        TAGS. If heads are missing, `rank_output` copies the "match" row of `itm_output`, `disc_output` all of it, `correction_output` `cls`.
        Returns {"loaded": [official names], "initialised": ["name from name"], "ignored": [official names]}.
        Raises ValueError, changing nothing, when a part of the encoder is missing or a shape does not fit the config."""
        state, initialised = _official(state_dict), []
        given = set(state)
        for name, source, rows in (("rank_output.", "itm_output.", slice(1, 2)), ("disc_output.", "itm_output.", slice(None)),
                                   ("correction_output.predictions.", "cls.predictions.", slice(None))):
            for key in [k for k in state if k.startswith(source) and k.replace(source, name) not in state]:
                state[key.replace(source, name)] = state[key][rows].clone()
                initialised.append(f"{key.replace(source, name)} from {key}")
        own, names = self.state_dict(), self._official_names()
        for name, parts in names.items():
            for part, place in zip(parts, own[name].chunk(len(parts))):
                if part in state and state[part].shape != place.shape:
                    raise ValueError(f"{part} is {(*state[part].shape,)}, not {(*place.shape,)}: check the sizes and the vocabulary")
                if part not in state and part.startswith("uniter."):
                    raise ValueError(f"not complete UNITER weights: {part} is missing")
        fitted = {name: torch.cat([state[part] for part in parts]) for name, parts in names.items() if parts[0] in state}
        initialised += [f"{names[name][0]} at random" for name in names if name not in fitted]
        self.load_state_dict({**own, **fitted})
        words = state["uniter.embeddings.word_embeddings.weight"]
        used = {name for name in _TIED if name in state and torch.equal(state[name], words)}.union(*names.values())  # an untied one is ignored
        self.uniter_extras = {key: state[key].clone() for key in sorted(given - used)}
        return {"loaded": sorted(given & used), "initialised": initialised, "ignored": sorted(given - used)}

    def export_uniter(self):
        """The weights under official names (the inverse of load_uniter, bit for bit), for use in the official code."""
        own, official = self.state_dict(), {name: value.clone() for name, value in self.uniter_extras.items()}
        for name, parts in self._official_names().items():
            official.update(zip(parts, (part.clone() for part in own[name].chunk(len(parts)))))
        return {name: official["uniter.embeddings.word_embeddings.weight"] for name in _TIED} | official

    def _official_names(self):
        """{our name: [official names whose rows, one below the other, make it]}."""
        table = {module: [official] for module, official in _NAMES.items()} | {
            f"layers.{n}.{part}": [f"uniter.encoder.layer.{n}.{name}" for name in names]
            for n in range(self.config.layers) for part, names in _LAYER_NAMES.items()}
        return {name: [f"{part}.{leaf}" for part in table[module]] for name in self.state_dict() for module, leaf in [name.rsplit(".", 1)]}

_NAMES = {"text.word": "uniter.embeddings.word_embeddings", "text.position": "uniter.embeddings.position_embeddings", "rank": "rank_output",
          "text.norm": "uniter.embeddings.LayerNorm", "token_type": "uniter.embeddings.token_type_embeddings", "discrimination": "disc_output",
          "region.feature": "uniter.img_embeddings.img_linear", "region.feature_norm": "uniter.img_embeddings.img_layer_norm",
          "region.box": "uniter.img_embeddings.pos_linear", "region.box_norm": "uniter.img_embeddings.pos_layer_norm",
          "region.norm": "uniter.img_embeddings.LayerNorm", "pooler": "uniter.pooler.dense"}
_NAMES |= {ours + place: f"{theirs}.predictions{official}" for ours, theirs in (("mlm", "cls"), ("correction", "correction_output"))
           for place, official in (("", ""), (".transform", ".transform.dense"), (".norm", ".transform.LayerNorm"))}
_LAYER_NAMES = dict(qkv=[f"attention.self.{part}" for part in ("query", "key", "value")], out=["attention.output.dense"],
                    attention_norm=["attention.output.LayerNorm"], up=["intermediate.dense"], down=["output.dense"], norm=["output.LayerNorm"])
_TIED = ("cls.predictions.decoder.weight", "correction_output.predictions.decoder.weight")

def _official(state_dict):
    """Modern official names: no `module.` prefix, `bert.` -> `uniter.`, gamma / beta -> weight / bias."""
    changes = ((r"^module\.", ""), (r"^bert\.", "uniter."), (r"\.gamma$", ".weight"), (r"\.beta$", ".bias"))
    return {reduce(lambda name, change: re.sub(*change, name), changes, key): value for key, value in state_dict.items()}
