"""Scoring and the TAGS-DC step against the same network written in the obvious way, and against
the machine. Run by hand:
    python tests/benchmark.py --size base --device cpu --json benchmark.json

All that is compared runs in one process, in turn, round by round; figures are medians, ratios
medians of the rounds' ratios. Time is CPU time where one thread computes (OMP_NUM_THREADS=1), so
that other work on the machine hardly disturbs it, and else that of the clock. Weights, captions
and regions are random; caption lengths and region numbers are those of the data that a size is for.
  score    ours: evaluate.score_matrix. plain: `PlainModel`, float32, batches of different captions
           padded to the longest. official: the same with one caption to a batch, as in the
           official inference, so that only regions are padded.
  step     ours: tagsdc.tailored_step and backward, M = K = 20, H = 31, pools of 399. plain:
           `plain_step` and backward, the same draws; it scores candidates that the filter drops
           and applies the vocabulary matrix everywhere.
  savings  each saving alone, in scoring and in the step: seconds without it over seconds with it.
  growth   seconds and peak memory of scoring while the number of captions grows.

Columns: ours_per_s, plain_per_s: pairs (score) or anchors (step) a second; ratio: how many times
faster ours is; peak_share: ours' useful FLOPs a second over those of a large matrix product in the
same dtype; agree: rank correlation with plain's scores, or 1 - relative difference of the losses;
difference: the largest absolute one.

Useful FLOPs of a pair of T text positions and R regions, S = T + R, in L layers of width D and
intermediate size E (q k v out, attention, feed-forward; regions; pooler and matching):
    L (8 S D^2 + 4 S^2 D + 4 S D E)  +  2 R D (F + 7)  +  2 D^2 + 2 D
without padding, whatever is saved of them; of an anchor's step those of all pairs scored,
2 P + M + M K, and three times those learnt from, 1 + 3 H + M, word heads left out.
"""

import argparse
import contextlib
import json
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import evaluate  # noqa: E402
import generate  # noqa: E402
import losses  # noqa: E402
import model as model_module  # noqa: E402
import tagsdc  # noqa: E402
from data import Split  # noqa: E402
from model import Config, TagsDC  # noqa: E402

# Caption lengths of COCO with [CLS] and [SEP], and their shares in percent.
LENGTHS = [8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 20, 22, 25]
SHARES = [1, 2, 8, 24, 24, 16, 10, 6, 3, 2, 1, 1, 1, 1]
COCO = [length for length, share in zip(LENGTHS, SHARES) for _ in range(share)]
SIZES = {
    "tiny": {"vocab": 72, "features": 256, "lengths": range(8, 19), "regions": range(4, 10)},
    "base": {"vocab": 28996, "features": 2048, "lengths": COCO, "regions": [36]},
}
DTYPES = (torch.float32, torch.bfloat16)
WEIGHTS = {"hard": 1.0, "tags": 1.0, "mlm": 0.2, "wod": 0.2, "woc": 0.2}


# ---- random data -------------------------------------------------------------------------------


def spread(values, count, rng):
    """`count` of the values, each about as often as the others, in random order."""
    place = torch.randperm(count, generator=rng)
    return torch.tensor(values)[(2 * place + 1) * len(values) // (2 * count)]


class RandomData:
    """What the code reads of a data.Data, made of random words and regions; phrases are pairs of
    neighbouring words."""

    def __init__(self, size, captions, images):
        sizes = SIZES[size]
        rng = torch.Generator().manual_seed(0)
        whole_words = torch.ones(sizes["vocab"], dtype=torch.bool)
        self.tokenizer = SimpleNamespace(
            pad_id=0, mask_id=4, word_range=(5, sizes["vocab"]), whole_words=whole_words
        )
        self.lengths = spread(sizes["lengths"], captions, rng)  # (C,)
        place = torch.arange(max(sizes["lengths"]))  # (T,)
        end = self.lengths[:, None] - 1
        words = torch.randint(5, sizes["vocab"], (captions, len(place)), generator=rng)
        words = words.masked_fill(place == 0, 2)
        words = words.masked_fill(place == end, 3)
        self.ids = words.masked_fill(place > end, 0)  # (C, T)
        counts = spread(sizes["regions"], images, rng)  # (I,)
        self.mask = torch.arange(max(sizes["regions"])) < counts[:, None]  # (I, R)
        self.features = torch.rand(*self.mask.shape, sizes["features"], generator=rng)
        self.boxes = torch.rand(*self.mask.shape, 7, generator=rng)
        self.regions = SimpleNamespace(counts=counts.numpy())
        split = Split(
            images=range(images),
            captions=range(captions),
            rows=torch.arange(images).numpy(),
            image_of_caption=torch.arange(captions) * images // captions,
        )
        self.splits = {"train": split}

    def text(self, split, captions):
        return self.ids[captions, : self.lengths[captions].max()]

    def phrases(self, split, captions):
        word = torch.arange(self.lengths[captions].max())
        pair = (word - 1) // 2 == torch.arange((len(word) + 1) // 2)[:, None]
        return pair & (word > 0) & (word < self.lengths[captions, None, None] - 1)

    def image(self, split, images):
        most = self.mask[images].sum(1).max()
        return tuple(x[images, :most] for x in (self.features, self.boxes, self.mask))

    def true_captions(self, split, images):
        each = len(self.ids) // len(self.features)
        return self.ids[images[:, None] * each + torch.arange(each)]


# ---- the same network in the obvious way -------------------------------------------------------


class PlainModel:
    """The network of `model` from its official weights, float32: padded batches, everything
    computed for every pair."""

    def __init__(self, model, device):
        self.weights = {}
        for name, value in model.export_uniter().items():
            self.weights[name] = value.to(device).requires_grad_()
        self.layers = model.config.layers
        self.heads = model.config.heads

    def linear(self, name, x):
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def norm(self, name, x):
        weight = self.weights[f"{name}.weight"]
        return F.layer_norm(x, x.shape[-1:], weight, self.weights[f"{name}.bias"], 1e-12)

    def embed(self, ids, features, boxes):
        """(N, T), (N, R, F), (N, R, 7) -> (N, T + R, D)"""
        text = "uniter.embeddings"
        image = "uniter.img_embeddings"
        token_type = self.weights[f"{text}.token_type_embeddings.weight"]
        position = self.weights[f"{text}.position_embeddings.weight"][: ids.size(1)]
        words = F.embedding(ids, self.weights[f"{text}.word_embeddings.weight"])
        words = self.norm(f"{text}.LayerNorm", words + position + token_type[0])
        what = self.norm(f"{image}.img_layer_norm", self.linear(f"{image}.img_linear", features))
        where = self.norm(f"{image}.pos_layer_norm", self.linear(f"{image}.pos_linear", boxes))
        regions = self.norm(f"{image}.LayerNorm", what + where + token_type[1])
        return torch.cat((words, regions), 1)

    def encode(self, ids, features, boxes, region_mask):
        """(N, T), (N, R, F), (N, R, 7), (N, R) -> (N, T + R, D)"""
        x = self.embed(ids, features, boxes)
        mask = torch.cat((ids != 0, region_mask), 1)
        mask = (1 - mask.float())[:, None, None] * -10000
        for n in range(self.layers):
            x = self.layer(f"uniter.encoder.layer.{n}", x, mask)
        return x

    def layer(self, name, x, mask):
        parts = []
        for part in ("query", "key", "value"):
            projected = self.linear(f"{name}.attention.self.{part}", x)
            parts.append(projected.unflatten(-1, (self.heads, -1)).transpose(1, 2))
        q, k, v = parts
        context = (q @ k.transpose(2, 3) / q.size(-1) ** 0.5 + mask).softmax(-1) @ v
        context = context.transpose(1, 2).flatten(2)
        context = self.linear(f"{name}.attention.output.dense", context)
        x = self.norm(f"{name}.attention.output.LayerNorm", x + context)
        wide = F.gelu(self.linear(f"{name}.intermediate.dense", x))
        return self.norm(f"{name}.output.LayerNorm", x + self.linear(f"{name}.output.dense", wide))

    def match(self, hidden):
        pooled = self.linear("uniter.pooler.dense", hidden[:, 0]).tanh()
        return self.linear("rank_output", pooled)[:, 0]

    def words(self, head, hidden):
        """Logits of the head "cls" (masked LM) or "correction_output"."""
        hidden = F.gelu(self.linear(f"{head}.predictions.transform.dense", hidden))
        hidden = self.norm(f"{head}.predictions.transform.LayerNorm", hidden)
        words = self.weights["uniter.embeddings.word_embeddings.weight"]
        return F.linear(hidden, words, self.weights[f"{head}.predictions.bias"])

    def score(self, ids, text_index, images, image_index, batch):
        """Logits (N,) of pairs given by index; images: features, boxes, region_mask."""
        logits = []
        for t, i in zip(text_index.split(batch), image_index.split(batch)):
            logits.append(self.match(self.encode(ids[t], *(x[i] for x in images))))
        return torch.cat(logits)

    @torch.no_grad()
    def score_matrix(self, data, device, batch, together):
        """(C, I) on the CPU; `together` captions share the batches, padded to the longest."""
        images = [x.to(device) for x in data.image("train", torch.arange(len(data.features)))]
        rows = []
        for captions in torch.arange(len(data.ids)).split(together):
            ids = data.text("train", captions).to(device)
            pairs = torch.arange(len(ids) * len(data.features), device=device)
            logits = self.score(ids, pairs % len(ids), images, pairs // len(ids), batch)
            rows.append(logits.view(-1, len(ids)).T.cpu())
        return torch.cat(rows)


def plain_negatives(plain, batch, args, word_range):
    """What plain_step learns from: (index, valid) of hard images and of hard texts, sentences
    (B, H, T), valid (B, H) and originals (B * H, T), -1 where a word is the caption's."""
    ids = batch.input_ids
    captions = batch.true_captions
    images = [batch.features, batch.boxes, batch.region_mask]
    size = args.score_batch
    P = len(ids)
    B, _, T = batch.masked.shape
    N = args.maskings * args.refills
    row = torch.arange(B, device=ids.device)
    anchor = row.repeat_interleave(P)
    other = torch.arange(P, device=ids.device).repeat(B)

    scores = plain.score(ids, anchor, images, other, size).view(B, P)
    false = ~generate.equals_a_caption(ids[:B].expand(P, B, -1), captions, 0).T
    hard_images = generate.select_hardest(scores, false, args.hard)
    scores = plain.score(ids, other, images, anchor, size).view(B, P)
    false = ~generate.equals_a_caption(ids.expand(B, P, -1), captions[:B], 0)
    hard_texts = generate.select_hardest(scores, false, args.hard)

    def fill(ids, index, places):
        hidden = plain.encode(ids, *(x[index] for x in images))[:, :T]
        return plain.words("cls", hidden).flatten(0, 1)[places]

    candidates = generate.refill_masks(
        fill,
        batch.masked,
        batch.labels,
        word_range,
        args.refills,
        args.temperature,
        chunk_size=size,
    )  # (B, N, T)
    every = torch.arange(B * N, device=ids.device)
    scores = plain.score(candidates.flatten(0, 1), every, images, row.repeat_interleave(N), size)
    anchors = ids[:B, :T]
    usable = generate.usable_candidates(candidates, anchors, captions[:B], 0)
    index, valid = generate.select_hardest(scores.view(B, N), usable, args.hard)
    sentences = candidates.gather(1, index[..., None].expand(-1, -1, T))
    sentences = torch.where(valid[..., None], sentences, anchors[:, None])
    originals = torch.where(sentences != anchors[:, None], anchors[:, None], -1)
    return hard_images, hard_texts, sentences, valid, originals.flatten(0, 1)


def plain_step(plain, data, batch, args):
    """The loss of tagsdc.tailored_step with the same draws."""
    with torch.no_grad():
        found = plain_negatives(plain, batch, args, data.tokenizer.word_range)
    (hard_images, image_valid), (hard_texts, text_valid), sentences, valid, originals = found
    ids = batch.input_ids
    images = [batch.features, batch.boxes, batch.region_mask]
    B, H, T = sentences.shape
    row = torch.arange(B, device=ids.device)
    every = row.repeat_interleave(H)
    sentences = sentences.flatten(0, 1)

    positive = plain.score(ids, row, images, row, B).sigmoid()
    to_images = plain.score(ids, every, images, hard_images.flatten(), B * H).view(B, H).sigmoid()
    to_texts = plain.score(ids, hard_texts.flatten(), images, every, B * H).view(B, H).sigmoid()
    hidden = plain.encode(sentences, *(x[every] for x in images))
    to_written = plain.match(hidden).view(B, H).sigmoid()
    triplet = partial(losses.triplet_loss, positive, margin=args.margin)
    hard = triplet(to_images, valid=image_valid) + triplet(to_texts, valid=text_valid)
    tags = triplet(to_written, valid=valid)
    wod = losses.word_discrimination_loss(
        plain.linear("disc_output", hidden[:, :T]),
        originals >= 0,
        (sentences != 0) & valid.flatten()[:, None],
    )
    woc = losses.word_correction_loss(plain.words("correction_output", hidden[:, :T]), originals)
    image_of_masked = row.repeat_interleave(args.maskings)
    hidden = plain.encode(batch.masked.flatten(0, 1), *(x[image_of_masked] for x in images))
    labels = batch.labels.flatten(0, 1).to(ids.device)
    mlm = losses.masked_lm_loss(plain.words("cls", hidden[:, :T]), labels)
    terms = {"hard": hard, "tags": tags, "mlm": mlm, "wod": wod, "woc": woc}
    return sum(WEIGHTS[name] * term for name, term in terms.items())


# ---- measuring ---------------------------------------------------------------------------------


def start_memory_peak(cuda):
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def memory_peak(cuda):
    """MB, the most that was allocated on the GPU, or resident in the process, since its start."""
    if cuda:
        return round(torch.cuda.max_memory_allocated() / 2**20)
    status = Path("/proc/self/status").read_text()
    return round(int(status.split("VmHWM:")[1].split()[0]) / 2**10)


def run_in_turn(runners, rounds, device):
    """Runs all of {name: function} in turn, `rounds` times after a warm-up -> {name: [seconds]},
    {name: MB at the peak}."""
    cuda = device.startswith("cuda")
    one_thread = not cuda and torch.get_num_threads() == 1
    clock = time.process_time if one_thread else time.perf_counter
    seconds = {name: [] for name in runners}
    memory = {}
    for turn in range(rounds + 1):
        for name, run in runners.items():
            start_memory_peak(cuda)
            start = clock()
            run()
            if cuda:
                torch.cuda.synchronize()
            if turn > 0:
                seconds[name].append(clock() - start)
            memory[name] = memory_peak(cuda)
    return seconds, memory


def median_ratio(above, below):
    return median(a / b for a, b in zip(above, below))


def flops_of_a_pair(config, data):
    """The mean over all captions with all images; the formula stands above."""
    L = config.layers
    D = config.hidden
    E = config.intermediate
    R = data.mask.sum(1).double()  # (I,)
    S = data.lengths[:, None] + R  # (C, I)
    layers = L * (8 * S * D**2 + 4 * S**2 * D + 4 * S * D * E)
    return (layers + 2 * R * D * (config.feature_size + 7) + 2 * D**2 + 2 * D).mean().item()


def compare(args, flops, runners, items, agreement):
    """Rows of both dtypes. runners: {dtype: ours, "plain": .. , maybe "official": ..}; one run
    takes `items` items worth `flops` each; agreement: {dtype: (agree, difference)}."""
    n = 8192 if args.device.startswith("cuda") else 2048
    runners = dict(runners)
    for dtype in DTYPES:
        factors = torch.randn(2, n, n).to(args.device, dtype)
        runners[f"peak {dtype}"] = partial(torch.mm, *factors)
    seconds, memory = run_in_turn(runners, args.rounds, args.device)
    rows = []
    for dtype in DTYPES:
        ours = items / median(seconds[dtype])
        peak = 2 * n**3 / median(seconds[f"peak {dtype}"])
        row = {
            "dtype": dtype,
            "ours_per_s": ours,
            "plain_per_s": items / median(seconds["plain"]),
            "ratio": median_ratio(seconds["plain"], seconds[dtype]),
            "peak_share": ours * flops / peak,
            "agree": agreement[dtype][0],
            "difference": agreement[dtype][1],
            "gflops": flops / 1e9,
            "peak_gflops": peak / 1e9,
            "memory_mb": memory[dtype],
            "plain_memory_mb": memory["plain"],
            "items": items,
            "rounds": args.rounds,
        }
        if "official" in runners:
            row["official_per_s"] = items / median(seconds["official"])
            row["official_ratio"] = median_ratio(seconds["official"], seconds[dtype])
        rows.append(row)
    return rows


# ---- what is measured --------------------------------------------------------------------------


def ranks(scores):
    return scores.flatten().argsort().argsort().double()


def score_ours(args, model, data, dtype):
    return evaluate.score_matrix(model, data, "train", args.device, dtype, args.batch)


def score(args, model, data):
    plain = PlainModel(model, args.device)
    runners = {dtype: partial(score_ours, args, model, data, dtype) for dtype in DTYPES}
    runners["plain"] = partial(plain.score_matrix, data, args.device, args.batch, args.batch)
    runners["official"] = partial(plain.score_matrix, data, args.device, args.batch, 1)
    expected = runners["plain"]()
    agreement = {}
    for dtype in DTYPES:
        scores = runners[dtype]()
        correlation = torch.corrcoef(torch.stack((ranks(scores), ranks(expected))))[0, 1].item()
        agreement[dtype] = correlation, (scores - expected).abs().max().item()
    difference = agreement[torch.float32][1]
    assert difference < 1e-4, f"scores differ by {difference}"
    return compare(args, flops_of_a_pair(model.config, data), runners, expected.numel(), agreement)


def step_options(args):
    return tagsdc.parse_arguments(
        [
            f"--batch-size={args.anchors}",
            f"--score-batch={args.batch}",
            "--pool=399",
            "--retrieved=31",
            "--hard=31",
            "--maskings=20",
            "--refills=20",
            "--temperature=1.5",
            "--truth-threshold=1",
            "--writer-sees=own",
        ]
    )


def step_batch(args, data, options):
    """One batch and the state of all generators, for every runner the same."""
    rng = torch.Generator().manual_seed(0)
    captions = tagsdc.draw_pairs(data.splits["train"], options.pool, rng)
    shape = (options.batch_size, options.maskings, 0.15, options.writer_sees)
    torch.manual_seed(0)
    return tagsdc.make_batch(data, "train", captions, *shape, rng).to(args.device)


def step_ours(args, model, data, options, dtype):
    model.train()
    batch = step_batch(args, data, options)
    settings = tagsdc.settings_of(options, data.tokenizer, args.device, dtype)
    loss, _ = tagsdc.tailored_step(model, model, batch, WEIGHTS, settings)
    loss.backward()
    return loss.detach()


def step_plain(args, plain, data, options):
    loss = plain_step(plain, data, step_batch(args, data, options), options)
    loss.backward()
    return loss.detach()


def step(args, model, data):
    flops = flops_of_a_pair(model.config, data)
    plain = PlainModel(model, args.device)
    data = RandomData(args.size, 800, 400)
    options = step_options(args)
    runners = {dtype: partial(step_ours, args, model, data, options, dtype) for dtype in DTYPES}
    runners["plain"] = partial(step_plain, args, plain, data, options)
    expected = runners["plain"]().item()
    agreement = {}
    for dtype in DTYPES:
        loss = runners[dtype]().item()
        agreement[dtype] = 1 - abs(loss / expected - 1), abs(loss - expected)
    difference = agreement[torch.float32][1]
    assert difference < 1e-4, f"losses differ by {difference}"
    if args.device.startswith("cuda"):
        torch.cuda.set_sync_debug_mode("error")  # raises where the host would wait for the GPU
        runners[torch.bfloat16]()
        torch.cuda.set_sync_debug_mode("default")
    M = options.maskings
    pairs = 2 * options.pool + M + M * options.refills + 3 * (1 + 3 * options.hard + M)
    return compare(args, flops * pairs, runners, args.anchors, agreement)


# Each function below makes a context in which a model works without one of its savings.


@contextlib.contextmanager
def without_prefix(model):
    """The last layer is computed at every position."""

    def whole_layer(layer, x, mask, first=None):
        return layer(x, mask)[:, :first]

    with mock.patch.object(model, "run_layer", whole_layer):
        yield


@contextlib.contextmanager
def without_prepared(model):
    """The embeddings are computed for every pair."""
    prepare_text = model.prepare_text
    prepare_regions = model.prepare_regions
    encode_pairs = model.encode_pairs
    score_pairs = model.score_pairs

    def keep(*inputs):
        return inputs

    def select(inputs, index):
        return [None if x is None else x[index] for x in inputs]

    def encode_anew(texts, text_index, images, image_index, first=None):
        texts = prepare_text(*select(texts, text_index))
        images = prepare_regions(*select(images, image_index))
        pair = torch.arange(len(text_index), device=text_index.device)
        return encode_pairs(texts, pair, images, pair, first)

    def score_anew(texts, text_index, images, image_index, batch=None):
        logits = []
        batch = batch or len(text_index)
        for t, i in zip(text_index.split(batch), image_index.split(batch)):
            text = prepare_text(*select(texts, t))
            image = prepare_regions(*select(images, i))
            pair = torch.arange(len(t), device=t.device)
            logits.append(score_pairs(text, pair, image, pair))
        return torch.cat(logits)

    with (
        mock.patch.object(model, "prepare_text", keep),
        mock.patch.object(model, "prepare_regions", keep),
        mock.patch.object(model, "encode_pairs", encode_anew),
        mock.patch.object(model, "score_pairs", score_anew),
    ):
        yield


@contextlib.contextmanager
def without_packing(model):
    """Pairs are scored in their order, with the padding between them and inside them."""
    with mock.patch.object(model_module, "can_pack", lambda texts, images: False):
        yield


@contextlib.contextmanager
def without_plain_products(model):
    """Attention in bfloat16 on a CPU is torch's fused one."""

    def fused(q, k, v, mask, dropout):
        mask = None if mask is None else mask[:, None, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)

    with mock.patch.object(model_module, "attend", fused):
        yield


@contextlib.contextmanager
def without_fused_attention(model):
    with sdpa_kernel(SDPBackend.MATH):
        yield


SAVINGS = {
    "none": contextlib.nullcontext,
    "last layer at the first positions alone": without_prefix,
    "embeddings once, not for each pair": without_prepared,
    "pairs of about one length, without padding (CPU)": without_packing,
    "attention by plain products (bfloat16, CPU)": without_plain_products,
    "fused attention": without_fused_attention,
}


def run_without(context, model, run):
    with context(model):
        run()


def savings(args, model, data):
    step_data = RandomData(args.size, 800, 400)
    options = step_options(args)
    rows = []
    for dtype in DTYPES:
        runs = {
            "score": partial(score_ours, args, model, data, dtype),
            "step": partial(step_ours, args, model, step_data, options, dtype),
        }
        for where, run in runs.items():
            runners = {}
            for name, context in SAVINGS.items():
                runners[name] = partial(run_without, context, model, run)
            seconds, _ = run_in_turn(runners, args.rounds, args.device)
            for name, times in seconds.items():
                gain = median_ratio(times, seconds["none"])
                rows.append({"dtype": dtype, "in": where, "saving": name, "gain": gain})
    return rows


def growth(args, model, data):
    rows = []
    for times in (1, 2, 4, 8):
        more = RandomData(args.size, len(data.ids) * times, len(data.features))
        run = partial(score_ours, args, model, more, torch.float32)
        seconds, memory = run_in_turn({"score": run}, 1, args.device)
        row = {
            "dtype": torch.float32,
            "pairs": len(more.ids) * len(more.features),
            "seconds": seconds["score"][0],
            "memory_mb": memory["score"],
        }
        rows.append(row)
    return rows


MEASURES = {"score": score, "step": step, "savings": savings, "growth": growth}


# ---- the command -------------------------------------------------------------------------------


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--json", help="file to write")
    parser.add_argument("--what", nargs="+", choices=MEASURES, default=["score", "step"])
    parser.add_argument("--rounds", type=int, default=5, help="after a warm-up (default 5)")
    parser.add_argument(
        "--pairs", type=int, help="scored in a round (default: tiny 8192, base 512; GPU: x 64)"
    )
    parser.add_argument("--anchors", type=int, help="in a step (default: tiny 8, base 1; GPU: 32)")
    parser.add_argument("--batch", type=int, help="pairs in one pass (default 128; GPU: 2048)")
    args = parser.parse_args()
    gpu = args.device.startswith("cuda")
    tiny = args.size == "tiny"
    if args.pairs is None:
        args.pairs = (8192 if tiny else 512) * (64 if gpu else 1)
    if args.anchors is None:
        args.anchors = 32 if gpu else 8 if tiny else 1
    if args.batch is None:
        args.batch = 2048 if gpu else 128
    return args


def main():
    args = parse_arguments()
    sizes = SIZES[args.size]
    torch.manual_seed(0)
    config = Config.preset(
        args.size, vocab_size=sizes["vocab"], feature_size=sizes["features"], dropout=0.0
    )
    model = TagsDC(config).to(args.device)
    captions = max(1, round((args.pairs / 2) ** 0.5))
    data = RandomData(args.size, captions, args.pairs // captions)
    rows = []
    for what in args.what:
        for row in MEASURES[what](args, model, data):
            row["dtype"] = str(row["dtype"]).removeprefix("torch.")
            rows.append({"what": what, "size": args.size, **row})
            texts = []
            for key, value in rows[-1].items():
                texts.append(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}")
            print("  ".join(texts), flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps({"rows": rows}, indent=1))


if __name__ == "__main__":
    main()
