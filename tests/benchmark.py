"""Scoring and the TAGS-DC step against the same network written in the obvious way, and against
the machine. Run by hand:
    python tests/benchmark.py --size base --device cpu --json benchmark.json

All that is compared runs in one process, in turn, round by round; figures are medians, ratios
medians of the rounds' ratios. Weights, captions and regions are random; caption lengths and region
numbers are those of the data a size is for.
  score    ours: evaluate.score_matrix. plain: `Plain`, float32, batches of different captions
           padded to the longest. official: the same with one caption to a batch, as in the
           official inference, so that only regions are padded.
  step     ours: tagsdc.tailored_step and backward, M = K = 20, H = 31, pools of 399. plain:
           `plain_step` and backward, the same draws; it scores candidates that the filter drops
           and applies the vocabulary matrix everywhere.
  savings  each saving of scoring alone: seconds without it over seconds with it.
  growth   seconds and peak memory of scoring while the number of captions grows.
Useful FLOPs of a pair of T text positions and R regions, S = T + R, in L layers of width D and
intermediate size E (q k v out, attention, MLP; regions; pooler, score):
    L (8 S D^2 + 4 S^2 D + 4 S D E)  +  2 R D (F + 7)  +  2 D^2 + 2 D
without padding, whatever is saved of them; of an anchor's step those of all pairs scored,
2 P + M + M K, and three times those learnt from, 1 + 3 H + M, word heads left out.
peak_share: ours' useful FLOPs a second over those of a large matrix product in the same dtype.
agree: rank correlation with plain's scores, or 1 - relative difference of the losses.
difference: the absolute one.
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
from model import Config, TagsDC  # noqa: E402

COCO = {
    8: 1,
    9: 2,
    10: 8,
    11: 24,
    12: 24,
    13: 16,
    14: 10,
    15: 6,
    16: 3,
    17: 2,
    18: 1,
    20: 1,
    22: 1,
    25: 1,
}  # length: %
SIZES = {
    "tiny": dict(vocab=72, features=256, lengths=range(8, 19), regions=range(4, 10)),
    "base": dict(
        vocab=28996,
        features=2048,
        lengths=[n for n, share in COCO.items() for _ in range(share)],
        regions=[36],
    ),
}
WEIGHTS, DTYPES = (
    {"hard": 1.0, "tags": 1.0, "mlm": 0.2, "wod": 0.2, "woc": 0.2},
    (torch.float32, torch.bfloat16),
)


class Made:
    """What the code asks of a data.Data, made of random words and regions; phrases are pairs of
    neighbouring words."""

    def __init__(self, size, captions, images):
        made, rng = SIZES[size], torch.Generator().manual_seed(0)

        def spread(values, count):  # as evenly over the values as count allows, in random order
            return torch.tensor(values)[
                (torch.randperm(count, generator=rng) * 2 + 1) * len(values) // (2 * count)
            ]

        self.lengths, counts = spread(made["lengths"], captions), spread(made["regions"], images)
        self.tokenizer = SimpleNamespace(pad_id=0, mask_id=4, word_range=(5, made["vocab"]))
        place, end = torch.arange(max(made["lengths"])), self.lengths[:, None] - 1
        words = torch.randint(5, made["vocab"], (captions, len(place)), generator=rng)
        self.ids = (
            words.masked_fill(place == 0, 2)
            .masked_fill(place == end, 3)
            .masked_fill(place > end, 0)
        )
        self.mask = torch.arange(max(made["regions"])) < counts[:, None]
        self.features = torch.rand(*self.mask.shape, made["features"], generator=rng)
        self.boxes, self.regions = (
            torch.rand(*self.mask.shape, 7, generator=rng),
            SimpleNamespace(counts=counts.numpy()),
        )
        self.splits = {
            "train": SimpleNamespace(
                images=range(images),
                captions=range(captions),
                rows=torch.arange(images).numpy(),
                image_of_caption=torch.arange(captions) * images // captions,
            )
        }

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
        every = len(self.ids) // len(self.features)
        return self.ids[images[:, None] * every + torch.arange(every)]


class Plain:
    """The network of `model` from its official weights, float32: padded batches, everything worked
    out for every pair."""

    def __init__(self, model, device):
        self.w = {
            name: value.to(device).requires_grad_() for name, value in model.export_uniter().items()
        }
        self.layers, self.heads = model.config.layers, model.config.heads

    def linear(self, name, x):
        return F.linear(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"])

    def norm(self, name, x):
        return F.layer_norm(
            x, x.shape[-1:], self.w[f"{name}.weight"], self.w[f"{name}.bias"], 1e-12
        )

    def encode(
        self, ids, features, boxes, region_mask
    ):  # (N, T), (N, R, F), (N, R, 7), (N, R) -> (N, T + R, D)
        text, image = "uniter.embeddings", "uniter.img_embeddings"
        kind, position = (
            self.w[f"{text}.token_type_embeddings.weight"],
            self.w[f"{text}.position_embeddings.weight"],
        )
        words = (
            F.embedding(ids, self.w[f"{text}.word_embeddings.weight"])
            + position[: ids.size(1)]
            + kind[0]
        )
        regions = (
            self.norm(f"{image}.img_layer_norm", self.linear(f"{image}.img_linear", features))
            + self.norm(f"{image}.pos_layer_norm", self.linear(f"{image}.pos_linear", boxes))
            + kind[1]
        )
        x = torch.cat(
            (self.norm(f"{text}.LayerNorm", words), self.norm(f"{image}.LayerNorm", regions)), 1
        )
        mask = (1 - torch.cat((ids != 0, region_mask), 1).float())[:, None, None] * -10000
        for n in range(self.layers):
            layer = f"uniter.encoder.layer.{n}"
            q, k, v = (
                self.linear(f"{layer}.attention.self.{part}", x)
                .unflatten(-1, (self.heads, -1))
                .transpose(1, 2)
                for part in ("query", "key", "value")
            )
            context = (q @ k.transpose(2, 3) / q.size(-1) ** 0.5 + mask).softmax(-1) @ v
            context = self.linear(
                f"{layer}.attention.output.dense", context.transpose(1, 2).flatten(2)
            )
            x = self.norm(f"{layer}.attention.output.LayerNorm", x + context)
            wide = self.linear(
                f"{layer}.output.dense", F.gelu(self.linear(f"{layer}.intermediate.dense", x))
            )
            x = self.norm(f"{layer}.output.LayerNorm", x + wide)
        return x

    def match(self, hidden):
        return self.linear("rank_output", self.linear("uniter.pooler.dense", hidden[:, 0]).tanh())[
            :, 0
        ]

    def words(self, head, hidden):  # head: cls (MLM) or correction_output
        hidden = F.gelu(self.linear(f"{head}.predictions.transform.dense", hidden))
        hidden = self.norm(f"{head}.predictions.transform.LayerNorm", hidden)
        return F.linear(
            hidden,
            self.w["uniter.embeddings.word_embeddings.weight"],
            self.w[f"{head}.predictions.bias"],
        )

    def score(
        self, ids, text_index, images, image_index, batch
    ):  # images: features, boxes, region_mask
        return torch.cat(
            [
                self.match(self.encode(ids[t], *(x[i] for x in images)))
                for t, i in zip(text_index.split(batch), image_index.split(batch))
            ]
        )

    @torch.no_grad()
    def score_matrix(self, data, device, batch, together):
        """(C, I) on the CPU; `together` captions share the batches, padded to the longest."""
        scores, images = (
            [],
            [x.to(device) for x in data.image("train", torch.arange(len(data.features)))],
        )
        for captions in torch.arange(len(data.ids)).split(together):
            ids, pairs = (
                data.text("train", captions).to(device),
                torch.arange(len(captions) * len(data.features), device=device),
            )
            scores.append(
                self.score(ids, pairs % len(ids), images, pairs // len(ids), batch)
                .view(-1, len(ids))
                .T
            )
        return torch.cat(scores).cpu()


def plain_negatives(plain, batch, args, vocabulary_range, device_rng):
    """What plain_step learns from: (index, valid) of hard images and of hard texts, sentences
    (B, H, T), valid (B, H) and originals (B * H, T), -1 where a word is the caption's."""
    ids, own, masked, labels = batch.input_ids, batch.true_captions, batch.masked, batch.labels
    images = [batch.features, batch.boxes, batch.region_mask]
    p, size, n = len(ids), args.score_batch, args.maskings * args.refills
    b, _, t = masked.shape
    anchors = ids[:b, :t]
    row, other = torch.arange(b, device=ids.device), torch.arange(p, device=ids.device).repeat(b)
    image_scores = plain.score(ids, row.repeat_interleave(p), images, other, size).view(b, p)
    text_scores = plain.score(ids, other, images, row.repeat_interleave(p), size).view(b, p)
    false_images = generate.select_hardest(
        image_scores, ~generate.equals_a_caption(ids[:b].expand(p, b, -1), own, 0).T, args.hard
    )
    false_texts = generate.select_hardest(
        text_scores, ~generate.equals_a_caption(ids.expand(b, p, -1), own[:b], 0), args.hard
    )

    def fill(ids, index, places):
        hidden = plain.encode(ids, *(x[index] for x in images))[:, :t]
        return plain.words("cls", hidden).flatten(0, 1)[places]

    candidates = generate.refill_masks(
        fill,
        masked,
        labels,
        vocabulary_range,
        args.refills,
        args.temperature,
        chunk_size=size,
        generator=device_rng,
    )
    every = torch.arange(b * n, device=ids.device)
    scores = plain.score(candidates.flatten(0, 1), every, images, row.repeat_interleave(n), size)
    usable = generate.usable_candidates(candidates, anchors, own[:b], 0)
    index, valid = generate.select_hardest(scores.view(b, n), usable, args.hard)
    sentences = candidates.gather(1, index[..., None].expand(-1, -1, t))
    sentences = torch.where(valid[..., None], sentences, anchors[:, None])
    replaced = sentences != anchors[:, None]
    originals = torch.where(replaced, anchors[:, None], -1).flatten(0, 1)
    return false_images, false_texts, sentences, valid, originals


def plain_step(plain, data, args, rng, device_rng, device):
    """The loss of tagsdc.tailored_step with the same draws."""
    captions = tagsdc.draw_pairs(data.splits["train"], args.pool, rng)
    batch = tagsdc.make_batch(
        data, "train", captions, args.batch_size, device, rng, args.maskings, args.mask_probability
    )
    with torch.no_grad():
        found = plain_negatives(plain, batch, args, data.tokenizer.word_range, device_rng)
    (false_images, image_valid), (false_texts, text_valid), sentences, valid, originals = found
    ids, masked, labels = batch.input_ids, batch.masked, batch.labels
    images = [batch.features, batch.boxes, batch.region_mask]
    b, h, t = sentences.shape
    row = torch.arange(b, device=device)
    every, sentences = row.repeat_interleave(h), sentences.flatten(0, 1)
    positive = plain.score(ids, row, images, row, b).sigmoid()
    hidden = plain.encode(sentences, *(x[every] for x in images))
    triplets = {
        "images": (plain.score(ids, every, images, false_images.flatten(), b * h), image_valid),
        "texts": (plain.score(ids, false_texts.flatten(), images, every, b * h), text_valid),
        "tags": (plain.match(hidden), valid),
    }
    terms = {
        name: losses.triplet_loss(
            positive, logits.sigmoid().view(b, h), margin=args.margin, valid=ok
        )
        for name, (logits, ok) in triplets.items()
    }
    terms["wod"] = losses.word_discrimination_loss(
        plain.linear("disc_output", hidden[:, :t]),
        originals >= 0,
        (sentences != 0) & valid.flatten()[:, None],
        original_weight=args.original_weight,
    )
    terms["woc"] = losses.word_correction_loss(
        plain.words("correction_output", hidden[:, :t]), originals
    )
    hidden = plain.encode(
        masked.flatten(0, 1), *(x[row.repeat_interleave(args.maskings)] for x in images)
    )
    terms["mlm"] = losses.masked_lm_loss(
        plain.words("cls", hidden[:, :t]), labels.flatten(0, 1).to(device)
    )
    return sum({**WEIGHTS, "images": 1, "texts": 1}[name] * term for name, term in terms.items())


def alternate(runners, rounds, device):
    """Runs all of {name: function} in turn, `rounds` times after a warm-up -> {name: [seconds]},
    {name: MB}, the most allocated on the GPU, or resident in the process, meanwhile."""
    seconds, memory, cuda = {name: [] for name in runners}, {}, device.startswith("cuda")
    for turn in range(rounds + 1):
        for name, run in runners.items():
            torch.cuda.reset_peak_memory_stats() if cuda else Path(
                "/proc/self/clear_refs"
            ).write_text("5")
            start = time.perf_counter()
            run()
            torch.cuda.synchronize() if cuda else None
            seconds[name] += [time.perf_counter() - start] * (turn > 0)
            memory[name] = round(
                torch.cuda.max_memory_allocated() / 2**20
                if cuda
                else int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
                / 2**10
            )
    return seconds, memory


def compare(args, model, data, runners, items, pairs, agree):
    """Rows of both dtypes. runners: {dtype: ours, "plain": .. }; one run takes `items` items worth
    `pairs` pairs of FLOPs each."""
    n = 8192 if args.device.startswith("cuda") else 2048
    products = {
        f"peak {dtype}": partial(torch.mm, *torch.randn(2, n, n).to(args.device, dtype))
        for dtype in DTYPES
    }
    seconds, memory = alternate({**runners, **products}, args.rounds, args.device)
    c, r, d = model.config, data.mask.sum(1).double(), model.config.hidden
    s = data.lengths[:, None] + r
    flops = (
        c.layers * s * d * (8 * d + 4 * s + 4 * c.intermediate)
        + 2 * r * d * (c.feature_size + 7)
        + 2 * d**2
        + 2 * d
    )
    rate, work, rows = (
        {name: items / median(times) for name, times in seconds.items()},
        flops.mean().item() * pairs,
        [],
    )
    for dtype in DTYPES:
        peak = rate[f"peak {dtype}"] / items * 2 * n**3
        ratio = {
            name: median(a / b for a, b in zip(seconds[name], seconds[dtype])) for name in runners
        }
        rows.append(
            {
                "dtype": dtype,
                "ours_per_s": rate[dtype],
                "plain_per_s": rate["plain"],
                "ratio": ratio["plain"],
                "peak_share": rate[dtype] * work / peak,
                **agree(dtype),
                "gflops": work / 1e9,
                "peak_gflops": peak / 1e9,
                "memory_mb": memory[dtype],
                "plain_memory_mb": memory["plain"],
                "items": items,
                "rounds": args.rounds,
                **(
                    {"official_per_s": rate["official"], "official_ratio": ratio["official"]}
                    if "official" in rate
                    else {}
                ),
            }
        )
    return rows


def score(args, model, data):
    plain, rank = (
        Plain(model, args.device),
        lambda scores: scores.flatten().argsort().argsort().double(),
    )
    runners = {
        dtype: partial(evaluate.score_matrix, model, data, "train", args.device, dtype, args.batch)
        for dtype in DTYPES
    }
    runners.update(
        plain=partial(plain.score_matrix, data, args.device, args.batch, args.batch),
        official=partial(plain.score_matrix, data, args.device, args.batch, 1),
    )
    right, found = runners["plain"](), {dtype: runners[dtype]() for dtype in DTYPES}
    off = {dtype: (found[dtype] - right).abs().max().item() for dtype in DTYPES}
    assert off[torch.float32] < 1e-4, f"scores differ by {off[torch.float32]}"
    return compare(
        args,
        model,
        data,
        runners,
        right.numel(),
        1,
        lambda dtype: {
            "agree": torch.corrcoef(torch.stack((rank(found[dtype]), rank(right))))[0, 1].item(),
            "difference": off[dtype],
        },
    )


def step(args, model, data):
    plain, data, device = Plain(model, args.device), Made(args.size, 800, 400), args.device
    options = [
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
    options = tagsdc.parse_arguments(options)
    model.train()

    def run(kind):
        rng = torch.Generator().manual_seed(0)
        device_rng = torch.Generator(device).manual_seed(0)
        if kind == "plain":
            loss = plain_step(plain, data, options, rng, device_rng, device)
        else:
            options.dtype = str(kind).removeprefix("torch.")
            draws = (device, rng, device_rng)
            loss, _ = tagsdc.tailored_step(model, model, data, options, WEIGHTS, *draws)
        loss.backward()
        return loss.detach()

    runners = {kind: partial(run, kind) for kind in (*DTYPES, "plain")}
    loss = {kind: run(kind).item() for kind in runners}
    assert abs(loss[torch.float32] - loss["plain"]) < 1e-4, f"losses differ: {loss}"
    if device.startswith("cuda"):
        torch.cuda.set_sync_debug_mode("error")  # raises where the host would wait for the GPU
        run(torch.bfloat16)
        torch.cuda.set_sync_debug_mode("default")
    m, n, h = options.maskings, options.maskings * options.refills, options.hard
    return compare(
        args,
        model,
        data,
        runners,
        args.anchors,
        2 * options.pool + m + n + 3 * (1 + 3 * h + m),
        lambda dtype: {
            "agree": 1 - abs(loss[dtype] / loss["plain"] - 1),
            "difference": abs(loss[dtype] - loss["plain"]),
        },
    )


def fused(q, k, v, mask, dropout):
    """model.attend without plain products."""
    mask = None if mask is None else mask[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)


def savings(args, model, data):
    text, image, scored = (
        model.prepare_text,
        model.prepare_regions,
        model.score_pairs,
    )
    replace, rows = mock.patch.object, []
    row = torch.arange(args.batch, device=args.device)

    def given(*inputs):  # in place of model.prepare_text and prepare_regions
        return inputs

    def each_anew(texts, text_index, images, image_index, batch):  # in place of model.score_pairs
        logits = []
        for t, i in zip(text_index.split(batch), image_index.split(batch)):
            pictures = image(*(x[i] for x in images))
            logits.append(
                scored(text(*(x[t] for x in texts)), row[: len(t)], pictures, row[: len(t)])
            )
        return torch.cat(logits)

    def whole_layers(layer, x, mask, first=None):  # in place of model.run_layer
        return layer(x, mask)[:, :first]

    without = {  # name: [functions that make a context without the saving]
        "all": [],
        "embeddings once, not per pair": [
            partial(replace, model, name, value)
            for name, value in (
                ("prepare_text", given),
                ("prepare_regions", given),
                ("score_pairs", each_anew),
            )
        ],
        "last layer for [CLS] alone": [partial(replace, model, "run_layer", whole_layers)],
        "pairs of equal length, not padding (CPU)": [
            partial(replace, model_module, "can_pack", lambda texts, images: False)
        ],
        "attention by plain products (bfloat16, CPU)": [
            partial(replace, model_module, "attend", fused)
        ],
        "fused attention": [partial(sdpa_kernel, SDPBackend.MATH)],
        "no_grad, not inference_mode": [torch.inference_mode],
    }

    def run(contexts, dtype):
        with contextlib.ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context())
            return evaluate.score_matrix(model, data, "train", args.device, dtype, args.batch)

    for dtype in DTYPES:
        runners = {name: partial(run, contexts, dtype) for name, contexts in without.items()}
        seconds, _ = alternate(
            {**runners, "bfloat16": partial(run, [], torch.float32)}, args.rounds, args.device
        )
        rows += [
            {
                "dtype": dtype,
                "gain": median(a / b for a, b in zip(times, seconds["all"])),
                "saving": name,
            }
            for name, times in seconds.items()
        ]
    return rows


def growth(args, model, data):
    rows = []
    for times in (1, 2, 4, 8):
        more = Made(args.size, len(data.ids) * times, len(data.features))
        run = partial(
            evaluate.score_matrix, model, more, "train", args.device, torch.float32, args.batch
        )
        seconds, memory = alternate({"": run}, 1, args.device)
        rows.append(
            {
                "dtype": torch.float32,
                "pairs": len(more.ids) * len(more.features),
                "seconds": seconds[""][0],
                "memory_mb": memory[""],
            }
        )
    return rows


def main():
    measures = {"score": score, "step": step, "savings": savings, "growth": growth}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, options in {
        "size": dict(choices=SIZES, default="tiny"),
        "device": dict(default="cpu", help="cpu or cuda"),
        "json": dict(help="file to write"),
        "what": dict(
            nargs="+", choices=measures, default=["score", "step"], help="default: score step"
        ),
        "rounds": dict(
            type=int, default=5, help="measurements of each, after a warm-up (default 5)"
        ),
        "pairs": dict(
            type=int,
            help="to score in a round (default: tiny 8192, base 512; 64 times that on a GPU)",
        ),
        "anchors": dict(type=int, help="in a step (default: tiny 8, base 1; 32 on a GPU)"),
        "batch": dict(
            type=int, help="pairs in one pass without gradient (default 128; 2048 on a GPU)"
        ),
    }.items():
        parser.add_argument(f"--{name}", **options)
    args = parser.parse_args()
    gpu, tiny, made = args.device.startswith("cuda"), args.size == "tiny", SIZES[args.size]
    args.pairs, args.batch = (
        args.pairs or (8192 if tiny else 512) * (64 if gpu else 1),
        args.batch or (2048 if gpu else 128),
    )
    args.anchors = args.anchors or (32 if gpu else 8 if tiny else 1)
    torch.manual_seed(0)
    config = Config.preset(
        args.size, vocab_size=made["vocab"], feature_size=made["features"], dropout=0.0
    )
    model, rows, captions = (
        TagsDC(config).to(args.device),
        [],
        max(1, round((args.pairs / 2) ** 0.5)),
    )
    for what in args.what:
        for row in measures[what](args, model, Made(args.size, captions, args.pairs // captions)):
            rows.append(
                {
                    "what": what,
                    "size": args.size,
                    **row,
                    "dtype": str(row["dtype"]).removeprefix("torch."),
                }
            )
            print(
                *(
                    f"{key} {value:.4g} " if isinstance(value, float) else f"{key} {value} "
                    for key, value in rows[-1].items()
                ),
                flush=True,
            )
    if args.json:
        Path(args.json).write_text(json.dumps({"rows": rows}, indent=1))


if __name__ == "__main__":
    main()
