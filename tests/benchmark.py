"""How fast are scoring and the TAGS-DC step, against the same network written in the obvious way? Run by hand:

    python tests/benchmark.py --size base --device cpu --json benchmark.json

All that is compared runs in one process, in turn, round by round; figures are medians, a ratio is the median of the rounds'
ratios. Weights, captions and regions are random; caption lengths and region numbers are those of the data the size is for.

  score    ours: evaluate.score_matrix. plain: `Plain` below in float32, all captions mixed in padded batches; official: the
           same with one caption to a batch, as the official inference has it, so that only regions are padded.
  step     ours: tagsdc.training_step and backward, M = K = 20, H = 31, pools of 399. plain: `plain_step` and backward, with
           the same draws; it scores candidates that the filter drops and applies the vocabulary matrix everywhere.
  savings  each saving of scoring alone: what it costs to do without it, or brings where it is not the default.
  growth   seconds and peak memory of scoring while the number of captions grows.

Useful FLOPs of a pair of T text positions and R regions, S = T + R, in L layers of width D and intermediate size E:
    L * (8 S D^2 + 4 S^2 D + 4 S D E)  +  2 R D (F + 7)  +  2 D^2 + 2 D
       q,k,v,out   attention   MLP        regions           pooler, score
the plain network's at the pair's own length, without padding; of a step that of every pair it scores (2 P + M + M K for each
anchor), and three times that of those it learns from (1 + 3 H + M), heads left out. peak_share sets ours' useful FLOPs a second
against a large matrix product in the same dtype, so work that ours saves counts as done.
agree: of scores the rank correlation with plain (and `difference`, the greatest); of steps 1 - relative difference of the losses.
"""
import argparse
import contextlib
import json
import sys
import time
import types
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import evaluate, generate, losses, tagsdc  # noqa: E401,E402
from model import Config, TagsDC  # noqa: E402

COCO = {8: 1, 9: 2, 10: 8, 11: 24, 12: 24, 13: 16, 14: 10, 15: 6, 16: 3, 17: 2, 18: 1, 20: 1, 22: 1, 25: 1}  # length: %
SIZES = {"tiny": dict(vocab=72, features=256, lengths=range(8, 19), regions=range(4, 10)),
         "base": dict(vocab=28996, features=2048, lengths=[n for n, share in COCO.items() for _ in range(share)], regions=[36])}
WEIGHTS = {"hard": 1.0, "tags": 1.0, "mlm": 0.2, "wod": 0.2, "woc": 0.2}


class Made:
    """What the code asks of a data.Data, made of random words and regions; phrases are pairs of neighbouring words."""

    def __init__(self, size, captions, images):
        made, rng = SIZES[size], torch.Generator().manual_seed(0)

        def spread(values, count):  # as evenly over the values as count allows, in random order
            values = torch.tensor(values)
            return values[(torch.randperm(count, generator=rng) * 2 + 1) * len(values) // (2 * count)]
        self.lengths, self.counts = spread(made["lengths"], captions), spread(made["regions"], images)
        self.tokenizer = types.SimpleNamespace(pad_id=0, mask_id=4, first_word=5, tokens=range(made["vocab"]))
        self.ids = torch.randint(5, made["vocab"], (captions, max(made["lengths"])), generator=rng)
        self.ids[:, 0] = 2
        self.ids[torch.arange(captions), self.lengths - 1] = 3
        self.ids[torch.arange(self.ids.size(1)) >= self.lengths[:, None]] = 0
        self.features = torch.rand(images, max(made["regions"]), made["features"], generator=rng)
        self.boxes = torch.rand(images, max(made["regions"]), 7, generator=rng)
        self.regions = types.SimpleNamespace(counts=self.counts.numpy())
        self.splits = {"train": types.SimpleNamespace(
            images=range(images), captions=range(captions), rows=torch.arange(images).numpy(),
            image_of_caption=torch.arange(captions) * images // captions)}

    def text(self, split, captions):
        return self.ids[captions, :self.lengths[captions].max()]

    def phrases(self, split, captions):
        word = torch.arange(self.lengths[captions].max())
        phrase = torch.arange((len(word) + 1) // 2)[:, None]
        return ((word - 1) // 2 == phrase) & (word > 0) & (word < self.lengths[captions, None, None] - 1)

    def image(self, split, images):
        real = torch.arange(self.counts[images].max()) < self.counts[images, None]
        return self.features[images, :real.size(1)], self.boxes[images, :real.size(1)], real

    def own_captions(self, split, images):
        every = len(self.ids) // len(self.features)
        return self.text(split, (images[:, None] * every + torch.arange(every)).flatten()).unflatten(0, (-1, every))


# ---- the obvious way -------------------------------------------------------------------------------------------------

class Plain:
    """The network of `model` under official names, float32: padded batches, everything worked out for every pair."""

    def __init__(self, model, device):
        self.w = {name: value.to(device).requires_grad_() for name, value in model.export_uniter().items()}
        self.layers, self.heads = model.config.layers, model.config.heads

    def linear(self, name, x):
        return F.linear(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"])

    def norm(self, name, x):
        return F.layer_norm(x, x.shape[-1:], self.w[f"{name}.weight"], self.w[f"{name}.bias"], 1e-12)

    def encode(self, ids, features, boxes, region_mask):  # (N, T), (N, R, F), (N, R, 7), (N, R) -> (N, T + R, D)
        text, image = "uniter.embeddings", "uniter.img_embeddings"
        kind, position = self.w[f"{text}.token_type_embeddings.weight"], self.w[f"{text}.position_embeddings.weight"]
        words = F.embedding(ids, self.w[f"{text}.word_embeddings.weight"]) + position[:ids.size(1)] + kind[0]
        regions = (self.norm(f"{image}.img_layer_norm", self.linear(f"{image}.img_linear", features))
                   + self.norm(f"{image}.pos_layer_norm", self.linear(f"{image}.pos_linear", boxes)) + kind[1])
        x = torch.cat((self.norm(f"{text}.LayerNorm", words), self.norm(f"{image}.LayerNorm", regions)), 1)
        mask = (1 - torch.cat((ids != 0, region_mask), 1).float())[:, None, None] * -10000
        for n in range(self.layers):
            layer = f"uniter.encoder.layer.{n}"
            q, k, v = (self.linear(f"{layer}.attention.self.{part}", x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                       for part in ("query", "key", "value"))
            context = (q @ k.transpose(2, 3) / q.size(-1) ** 0.5 + mask).softmax(-1) @ v
            context = self.linear(f"{layer}.attention.output.dense", context.transpose(1, 2).flatten(2))
            x = self.norm(f"{layer}.attention.output.LayerNorm", x + context)
            wide = F.gelu(self.linear(f"{layer}.intermediate.dense", x))
            x = self.norm(f"{layer}.output.LayerNorm", x + self.linear(f"{layer}.output.dense", wide))
        return x

    def match(self, hidden):
        return self.linear("rank_output", self.linear("uniter.pooler.dense", hidden[:, 0]).tanh())[:, 0]

    def words(self, head, hidden):  # head: cls (MLM) or correction_output
        hidden = F.gelu(self.linear(f"{head}.predictions.transform.dense", hidden))
        hidden = self.norm(f"{head}.predictions.transform.LayerNorm", hidden)
        return F.linear(hidden, self.w["uniter.embeddings.word_embeddings.weight"], self.w[f"{head}.predictions.bias"])

    def score(self, ids, text_index, images, image_index, batch):  # images: features, boxes, region_mask
        return torch.cat([self.match(self.encode(ids[t], *(x[i] for x in images)))
                          for t, i in zip(text_index.split(batch), image_index.split(batch))])

    @torch.no_grad()
    def score_matrix(self, data, device, batch, together):
        """(C, I); `together` captions share a batch, padded to the longest of them."""
        scores, images = [], [x.to(device) for x in data.image("train", torch.arange(len(data.features)))]
        for captions in torch.arange(len(data.ids)).split(together):
            ids = data.text("train", captions).to(device)
            pairs = torch.arange(len(ids) * len(data.features), device=device)  # an image meets all the captions in turn
            part = self.score(ids, pairs % len(ids), images, pairs // len(ids), batch)
            scores.append(part.view(-1, len(ids)).T)
        return torch.cat(scores).cpu()


def plain_step(plain, data, args, rng, device_rng, device):
    """tagsdc.training_step with the same draws -> the loss."""
    batch = tagsdc.make_batch(data, "train", tagsdc.draw_pairs(data.splits["train"], args.pool, rng), args.batch_size, device, rng,
                              args.maskings, args.mask_probability)
    ids, own, images = batch["input_ids"], batch["own"], [batch[name] for name in ("features", "boxes", "region_mask")]
    anchors, p, h, size = batch["anchor_ids"], args.pool, args.hard, args.score_batch
    b, t = anchors.shape
    row, every = torch.arange(b, device=device), torch.arange(b, device=device).repeat_interleave(h)
    with torch.no_grad():
        anchor, other = row.repeat_interleave(p), torch.arange(p, device=device).repeat(b)
        image_scores = plain.score(ids, anchor, images, other, size).view(b, p)
        text_scores = plain.score(ids, other, images, anchor, size).view(b, p)
        false_images, image_valid = generate.select_hardest(image_scores, ~generate.is_true(ids[:b].expand(p, b, -1), own).T, h)
        false_texts, text_valid = generate.select_hardest(text_scores, ~generate.is_true(ids.expand(b, p, -1), own[:b]), h)
        candidates = generate.refill_masks(
            lambda ids, index: plain.words("cls", plain.encode(ids, *(x[index] for x in images))[:, :t]), batch["masked"],
            batch["labels"], tagsdc.word_range(data.tokenizer), args.refills, args.temperature, device_rng, size)
        n = candidates.size(1)
        scores = plain.score(candidates.flatten(0, 1), torch.arange(b * n, device=device), images, row.repeat_interleave(n), size)
        index, valid = generate.select_hardest(scores.view(b, n), generate.drop_non_negatives(candidates, own[:b]), h)
        sentences = torch.where(valid[..., None], candidates.gather(1, index[..., None].expand(-1, -1, t)), 0)
        labels = torch.where(valid[..., None] & (sentences != anchors[:, None]), anchors[:, None], -1).flatten(0, 1)
        sentences = sentences.flatten(0, 1)
    positive = plain.score(ids, row, images, row, b).sigmoid()
    terms = {"hard": losses.triplet_loss(positive, plain.score(ids, false_texts.flatten(), images, every, b * h).sigmoid().view(b, h),
                                         args.margin, text_valid)
             + losses.triplet_loss(positive, plain.score(ids, every, images, false_images.flatten(), b * h).sigmoid().view(b, h),
                                   args.margin, image_valid)}
    hidden = plain.encode(sentences, *(x[every] for x in images))
    terms["tags"] = losses.triplet_loss(positive, plain.match(hidden).sigmoid().view(b, h), args.margin, valid)
    terms["wod"] = losses.word_discrimination_loss(plain.linear("disc_output", hidden[:, :t]), labels >= 0, sentences != 0)
    terms["woc"] = losses.word_correction_loss(plain.words("correction_output", hidden[:, :t]), labels)
    hidden = plain.encode(batch["masked"].flatten(0, 1), *(x.repeat_interleave(args.maskings, 0) for x in (y[:b] for y in images)))
    terms["mlm"] = losses.masked_lm_loss(plain.words("cls", hidden[:, :t]), batch["labels"].flatten(0, 1).to(device))
    return sum(WEIGHTS[name] * term for name, term in terms.items())


# ---- measuring -------------------------------------------------------------------------------------------------------

def alternate(runners, rounds, device):
    """Runs all of {name: function} in turn, `rounds` times after a warm-up. Returns {name: [seconds]} and {name: MB}: the
    most memory allocated on a GPU, or resident in the process, while it ran."""
    seconds, memory, cuda = {name: [] for name in runners}, {}, device.startswith("cuda")
    for turn in range(rounds + 1):
        for name, run in runners.items():
            with contextlib.suppress(OSError):  # where there is no such file the process's peak so far is taken
                torch.cuda.reset_peak_memory_stats() if cuda else Path("/proc/self/clear_refs").write_text("5")
            start = time.perf_counter()
            run()
            torch.cuda.synchronize() if cuda else None
            seconds[name] += [time.perf_counter() - start] * (turn > 0)
            memory[name] = (torch.cuda.max_memory_allocated() / 2 ** 20 if cuda else
                            int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2 ** 10)
    return seconds, memory


def matrix_product(device, dtype):
    """A function that does 2 n^3 FLOPs in one matrix product, and that number."""
    n = 8192 if device.startswith("cuda") else 2048
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    return lambda: torch.mm(a, b), 2 * n ** 3


def pair_flops(c, t, r):
    """The formula above, for tensors (or numbers) T and R."""
    s, d = t + r, c.hidden
    return c.layers * (8 * s * d ** 2 + 4 * s ** 2 * d + 4 * s * d * c.intermediate) + 2 * r * d * (c.feature_size + 7) + 2 * d ** 2 + 2 * d


def compare(what, args, runners, items, flops, agreement):
    """Rows of both dtypes. runners: ours by dtype, plain, maybe official; items: pairs or anchors that one run takes."""
    products = {dtype: matrix_product(args.device, dtype) for dtype in (torch.float32, torch.bfloat16)}
    runners = {**runners, **{f"peak {dtype}": run for dtype, (run, _) in products.items()}}
    seconds, memory = alternate(runners, args.rounds, args.device)
    rows = []
    for dtype, (_, work) in products.items():
        rates = {name: items / median(seconds[name]) for name in (dtype, "plain", "official") if name in seconds}
        ratios = {name: median(a / b for a, b in zip(seconds[name], seconds[dtype])) for name in rates}
        peak = work / median(seconds[f"peak {dtype}"])
        rows.append({"what": what, "size": args.size, "dtype": str(dtype).removeprefix("torch."), "ours_per_s": rates[dtype],
                     "plain_per_s": rates["plain"], "ratio": ratios["plain"], "peak_share": rates[dtype] * flops / peak,
                     **agreement(dtype), "flops": flops, "peak_gflops": peak / 1e9, "memory_mb": memory[dtype],
                     "plain_memory_mb": memory["plain"], "rounds": args.rounds, "items": items})
        if "official" in rates:
            rows[-1].update(official_per_s=rates["official"], official_ratio=ratios["official"])
    return rows


def score(model, args, data, plain):
    """The rows of "score"; stops if ours and plain disagree."""
    ours = {dtype: lambda dtype=dtype: evaluate.score_matrix(model, data, "train", args.device, dtype, args.batch)
            for dtype in (torch.float32, torch.bfloat16)}
    runners = {**ours, **{name: lambda together=together: plain.score_matrix(data, args.device, args.batch, together)
                          for name, together in (("plain", args.batch), ("official", 1))}}
    right, ranks = runners["plain"](), lambda x: x.flatten().argsort().argsort().double()
    found = {dtype: run() for dtype, run in ours.items()}
    if (found[torch.float32] - right).abs().max() > 1e-4:
        sys.exit(f"ours and plain differ by {(found[torch.float32] - right).abs().max():.1e}")
    flops = pair_flops(model.config, data.lengths[:, None].double(), data.counts[None]).mean().item()
    return compare("score", args, runners, right.numel(), flops, lambda dtype: {
        "agree": torch.corrcoef(torch.stack((ranks(found[dtype]), ranks(right))))[0, 1].item(),
        "difference": (found[dtype] - right).abs().max().item()})


def step(model, args, data, plain):
    """The rows of "step"; stops if the losses disagree. On a GPU also whether a step makes the host wait."""
    options = tagsdc.parse_arguments(f"--batch-size {args.anchors} --pool 399 --hard 31 --maskings 20 --refills 20 --score-batch {args.batch}".split())
    objective = tagsdc.Objective(model.train(), data.tokenizer, options)

    def run(dtype):
        options.dtype, rng = dtype, torch.Generator().manual_seed(0)
        draws = rng, torch.Generator(args.device).manual_seed(0), args.device
        loss = plain_step(plain, data, options, *draws) if dtype == "plain" else tagsdc.training_step(objective, data, options, WEIGHTS, *draws)[0]
        loss.backward()
        return loss.detach()
    runners = {name: lambda name=name: run(name) for name in (torch.float32, torch.bfloat16, "plain")}
    found = {name: run().item() for name, run in runners.items()}
    if abs(found[torch.float32] - found["plain"]) > 1e-4:
        sys.exit(f"ours and plain lose {found[torch.float32]:.5f} and {found['plain']:.5f}")
    if args.device.startswith("cuda"):
        torch.cuda.set_sync_debug_mode("error")
        try:
            run(torch.bfloat16)
            print("step: the host never waits for the GPU")
        except RuntimeError as fault:
            print(f"step: the host waits for the GPU: {fault}")
        torch.cuda.set_sync_debug_mode("default")
    mean = pair_flops(model.config, data.lengths[:, None].double(), data.counts[None]).mean().item()
    m, k, h = options.maskings, options.refills, options.hard
    return compare("step", args, runners, args.anchors, mean * (2 * options.pool + m + m * k + 3 * (1 + 3 * h + m)), lambda dtype: {
        "agree": 1 - abs(found[dtype] / found["plain"] - 1), "loss": found[dtype], "difference": abs(found[dtype] - found["plain"])})


@contextlib.contextmanager
def explicit_attention():
    def attend(q, k, v, attn_mask=None, dropout_p=0.0):
        weights = q @ k.transpose(2, 3) * q.size(-1) ** -0.5
        return (weights if attn_mask is None else weights.masked_fill(~attn_mask, float("-inf"))).softmax(-1) @ v
    fused, F.scaled_dot_product_attention = F.scaled_dot_product_attention, attend
    try:
        yield
    finally:
        F.scaled_dot_product_attention = fused


def score_without(model, args, data, dtype, once=True, cls_only=True, grouped=True):
    """evaluate.score_matrix, its savings to be switched off -> (C, I) on the device."""
    captions, images = torch.arange(len(data.ids)), torch.arange(len(data.features))
    scores = torch.empty(len(captions), len(images), device=args.device)
    columns_of, rows_of = (list(evaluate.equal_groups(sizes, 1024)) if grouped else [(None, torch.arange(len(sizes)))]
                           for sizes in (data.counts, data.lengths))
    with evaluate.inference(model, args.device, dtype):
        for _, columns in columns_of:
            *regions, real = (x.to(args.device) for x in data.image("train", columns))
            regions.append(None if grouped else real)
            for _, rows in rows_of:
                ids = data.text("train", rows).to(args.device)
                words = [ids, None if grouped else ids != 0]
                pick = lambda tensors, index: [x if x is None else x[index] for x in tensors]  # noqa: E731
                texts, seen = model.prepare_text(*words), model.prepare_regions(*regions)
                logits = []
                for block in torch.arange(len(rows) * len(columns), device=args.device).split(args.batch):
                    t, i = (block // len(columns), block % len(columns)) if grouped else (block % len(rows), block // len(rows))
                    pairs = (texts, t, seen, i) if once else (
                        model.prepare_text(*pick(words, t)), (each := torch.arange(len(t), device=args.device)),
                        model.prepare_regions(*pick(regions, i)), each)
                    logits.append(model.score_pairs(*pairs) if cls_only else model.match(model.encode_pairs(*pairs)))
                part = torch.cat(logits)
                scores[rows[:, None], columns] = part.view(len(rows), -1) if grouped else part.view(-1, len(rows)).T
    return scores


def savings(model, args, data, plain):
    """Rows {"what": "savings", "name", "dtype", "gain"}: seconds without over seconds with, in rounds of all variants."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        def variant(within=contextlib.nullcontext, dtype=dtype, **off):
            def run():
                with within():
                    return score_without(model, args, data, dtype, **off)
            return run
        runners = {"all": variant(), "embeddings and first q, k, v once, not per pair": variant(once=False),
                   "last layer for [CLS] alone": variant(cls_only=False), "equal lengths instead of padding": variant(grouped=False),
                   "fused attention": variant(explicit_attention), "inference mode instead of no_grad": variant(torch.inference_mode)}
        if dtype == torch.bfloat16:
            runners["bfloat16 instead of float32"] = variant(dtype=torch.float32)
        seconds, _ = alternate(runners, args.rounds, args.device)
        for name in list(runners)[1:]:
            gain = median(off / on for off, on in zip(seconds[name], seconds["all"]))
            gain = 1 / gain if name.startswith("inference mode") else gain  # not the default: what it would bring
            rows.append({"what": "savings", "size": args.size, "dtype": str(dtype).removeprefix("torch."), "name": name, "gain": gain})
    return rows


def growth(model, args, data, plain):
    """Rows {"what": "growth", "pairs", "seconds", "memory_mb"}: float32 scoring of ever more captions with the same images."""
    rows = []
    for captions in (len(data.ids) * 2 ** n for n in range(4)):
        more = Made(args.size, captions, len(data.features))
        seconds, memory = alternate({0: lambda: evaluate.score_matrix(model, more, "train", args.device, torch.float32, args.batch)},
                                    max(args.rounds // 3, 1), args.device)
        rows.append({"what": "growth", "size": args.size, "pairs": captions * len(data.features), "seconds": median(seconds[0]),
                     "memory_mb": memory[0]})
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", help="file to write")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each, after a warm-up (default 5)")
    parser.add_argument("--pairs", type=int, help="to score in a round (default: 8192 tiny, 128 base; 64 times that on a GPU)")
    parser.add_argument("--anchors", type=int, help="in a step (default: 2 tiny, 1 base; 32 on a GPU)")
    parser.add_argument("--batch", type=int, help="pairs in one pass without gradient (default 128; 2048 on a GPU)")
    parser.add_argument("--what", nargs="+", choices=["score", "step", "savings", "growth"], help="default: score and step")
    args = parser.parse_args()
    gpu, tiny = args.device.startswith("cuda"), args.size == "tiny"
    args.pairs = args.pairs or (8192 if tiny else 128) * (64 if gpu else 1)
    args.anchors, args.batch = args.anchors or (32 if gpu else 2 if tiny else 1), args.batch or (2048 if gpu else 128)
    torch.manual_seed(0)
    made = SIZES[args.size]
    model = TagsDC(Config.preset(args.size, vocab_size=made["vocab"], feature_size=made["features"], dropout=0.0)).to(args.device)
    plain, captions, rows = Plain(model, args.device), max(1, round((args.pairs / 2) ** 0.5)), []
    for what in args.what or ["score", "step"]:
        data = Made(args.size, 800, 400) if what == "step" else Made(args.size, captions, args.pairs // captions)
        rows += globals()[what](model, args, data, plain)
        for row in rows[-len(rows):]:
            pass
    if args.json:
        Path(args.json).write_text(json.dumps({"rows": rows}, indent=1))


if __name__ == "__main__":
    main()
