"""TAGS-DC from one command: train, evaluate, search (see README.md).
Letters: B anchor pairs of a step, P pairs in its retrieval pool (the anchors first), T text positions, R regions, M maskings,
K refills, H kept negatives, C captions of an image, V vocabulary. Every mask: True = real / usable."""
import argparse
import itertools
import json
import math
import os
import platform
import re
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import data as datasets
import evaluate
import generate
import losses
from model import PRESETS, Config, TagsDC

# The schedules of the official release (METHOD 5), one stage each; what a row leaves out is in RELEASE.
RELEASE = dict(batch_size=32, pool=399, hard=31, maskings=20, refills=20, temperature=1.5, truth_threshold=1.0, margin=0.2, dropout=0.1,
               lambda_wod=5e-4, lambda_woc=5e-4, score_batch=2048, recompute=True)
RECIPES = {name: RELEASE | dict(size=name.split("-")[1], phases=["dc=1" if name.endswith("2") else "tags=1"], **changes) for name, changes in {
    "coco-base-1": dict(lr=5e-5, steps=5000, lambda_tags=5e-5, lambda_mlm=0.01),
    "coco-base-2": dict(dc_lr=1e-5, steps=1500, lambda_tags=1e-4, lambda_mlm=0.05),
    "coco-large-1": dict(lr=4e-5, steps=5000, lambda_tags=1e-3, lambda_mlm=0.05, hard=23),
    "coco-large-2": dict(dc_lr=1e-5, steps=5000, lambda_tags=1e-3, lambda_mlm=0.05),
    "flickr-base-1": dict(lr=5e-5, steps=5000, lambda_tags=5e-4, lambda_mlm=0.05, temperature=2.0, batch_size=16),
    "flickr-base-2": dict(dc_lr=1e-5, steps=5000, lambda_tags=5e-4, lambda_mlm=0.1),
    "flickr-large-1": dict(lr=5e-5, steps=5000, lambda_tags=1e-3, lambda_mlm=0.05, hard=23),
    "flickr-large-2": dict(dc_lr=1e-5, steps=1500, lambda_tags=1e-3, lambda_mlm=0.05, hard=23)}.items()}
PHASES = {"warmup": ("itm", "mlm"), "tags": ("hard", "mlm", "tags"), "dc": ("hard", "mlm", "tags", "wod", "woc")}
SYNTHETIC = {"tags", "wod", "woc"}  # the terms that need generated negatives

# ---- one training step -----------------------------------------------------------------------------------------------
def draw_pairs(split, count, rng):
    """`count` different images of a split, and a caption of each: (P,) long indices of captions."""
    images = torch.randperm(len(split.images), generator=rng)[:count]
    first, end = (torch.searchsorted(split.image_of_caption, images, right=right) for right in (False, True))
    return first + (torch.rand(len(images), generator=rng) * (end - first)).long()

def make_batch(data, split, captions, anchors, device, rng, maskings, probability):
    """Tensors of P pairs, their captions given by index, the first B of them the anchors that are also masked. All that is random is
    drawn on the CPU by rng, so that no size need be asked of a GPU. Returns a dict of tensors on `device`: input_ids (P, T),
    anchor_ids (B, T), own (P, C, T') all true captions of each image, features (P, R, F), boxes (P, R, 7), region_mask (P, R),
    masked (B, M, T); and labels (B, M, T), which stays on the CPU."""
    images, phrases = data.splits[split].image_of_caption[captions], data.phrases(split, captions[:anchors])
    input_ids = data.text(split, captions)
    anchor_ids = input_ids[:anchors, :phrases.size(2)]
    masked, labels = generate.mask_phrases(anchor_ids, phrases, data.tokenizer.mask_id, data.tokenizer.word_range, maskings, probability, rng)
    batch = dict(zip(("features", "boxes", "region_mask"), data.image(split, images)), input_ids=input_ids, anchor_ids=anchor_ids,
                 own=data.own_captions(split, images), masked=masked)
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()} | {"labels": labels}

def retrieve_negatives(model, texts, images, batch, args):
    """The H hardest images of the pool for each anchor caption, and captions for each anchor image (METHOD 2): index (B, H) long into the
    pool and valid (B, H) bool of each. A caption that equals one of an image's own is never its negative, nor the image the caption's."""
    b, p, ids, own = len(batch["anchor_ids"]), len(batch["input_ids"]), batch["input_ids"], batch["own"]
    pool, rest = torch.arange(p, device=ids.device), torch.arange(b, p, device=ids.device)  # the anchors meet each other once
    scores = model.score_pairs(texts, torch.cat((pool[:b].repeat_interleave(p), rest.repeat_interleave(b))),
                               images, torch.cat((pool.repeat(b), pool[:b].repeat(p - b))), args.score_batch)
    image_scores = scores[:b * p].view(b, p)                                        # (B, P)
    text_scores = torch.cat((image_scores[:, :b], scores[b * p:].view(p - b, b))).T  # (B, P)
    false_images = ~generate.is_true(ids[:b].expand(p, b, -1), own).T               # (B, P)
    false_texts = ~generate.is_true(ids.expand(b, p, -1), own[:b])                  # (B, P)
    return tuple(generate.select_hardest(*each, min(args.hard, p)) for each in ((image_scores, false_images), (text_scores, false_texts)))

def write_negatives(model, images, batch, tokenizer, args, rng):
    """`generate.tailor_negatives` for the anchors of a batch, this model's heads over prepared images being its fill and match."""
    pad, b = tokenizer.pad_id, len(batch["anchor_ids"])

    def pairs(ids, image_index):
        return model.prepare_text(ids, ids != pad), torch.arange(len(ids), device=ids.device), images, image_index

    def fill(ids, image_index):  # (n, T) -> (n, T, D); `project` makes words of the masked positions alone
        return model.encode_pairs(*pairs(ids, image_index))[:, :ids.size(1)]

    def match(ids, image_index):  # (n, T) -> (n,)
        return model.score_pairs(*pairs(ids, image_index))
    return generate.tailor_negatives(
        fill, match, batch["anchor_ids"], None, batch["own"][:b], mask_id=tokenizer.mask_id, vocabulary_range=tokenizer.word_range, pad_id=pad,
        refills=args.refills, hard=args.hard, temperature=args.temperature, generator=rng, chunk_size=args.score_batch, project=model.fill,
        masks=(batch["masked"], batch["labels"]), truth_threshold=args.truth_threshold)

class Objective(torch.nn.Module):
    """The losses of one batch, so that a data-parallel wrapper sees one forward call for them all (METHOD 5)."""
    def __init__(self, model, tokenizer, args):
        super().__init__()
        self.model, self.pad, self.args = model, tokenizer.pad_id, args

    def forward(self, batch, weights, retrieved, negatives):
        """weights: {term: weight}; a term that is not in it costs nothing. Returns {term: scalar} and {diagnostic: scalar}."""
        model, margin, ids = self.model, self.args.margin, batch["input_ids"]
        texts = model.prepare_text(ids, ids != self.pad)
        images = model.prepare_regions(batch["features"], batch["boxes"], batch["region_mask"])
        b = len(batch["masked"])
        row, terms, seen = torch.arange(b, device=ids.device), {}, {}
        if "itm" in weights:  # the true pair, one random caption, one random image
            logits = model.score_pairs(texts, torch.cat((row, (row + 1) % b, row)), images, torch.cat((row, row, (row + 1) % b)))
            terms["itm"] = losses.matching_loss(logits, (torch.arange(3 * b, device=ids.device) < b).float())
        if "hard" in weights:
            (image_index, image_valid), (text_index, text_valid) = retrieved  # (B, H) each
            h = image_index.size(1)
            every = row.repeat_interleave(h)
            scores = model.score_pairs(texts, torch.cat((row, every, text_index.flatten())),
                                       images, torch.cat((row, image_index.flatten(), every))).sigmoid()
            positive, false_images, false_texts = scores[:b], scores[b:b + b * h].view(b, h), scores[b + b * h:].view(b, h)
            seen.update(hard_text=losses.triplet_loss(positive, false_texts, margin, text_valid), positive=positive.mean(),
                        hard_image=losses.triplet_loss(positive, false_images, margin, image_valid), retrieved=losses.masked_mean(false_texts, text_valid))
            terms["hard"] = seen["hard_text"] + seen["hard_image"]
        if negatives:
            sentences, valid, labels = negatives  # (B, H, T), (B, H), (B, H, T)
            flat, labels, h = sentences.flatten(0, 1), labels.flatten(0, 1), sentences.size(1)  # (B * H, T) each
            hidden = model.encode_pairs(model.prepare_text(flat, flat != self.pad), torch.arange(b * h, device=ids.device),
                                        images.first(b), row.repeat_interleave(h))
            synthetic, words = model.match(hidden).sigmoid().view(b, h), hidden[:, :flat.size(1)]
            seen.update(synthetic=losses.masked_mean(synthetic, valid), kept=valid.float().mean())
            if "tags" in weights:
                terms["tags"] = losses.triplet_loss(positive, synthetic, margin, valid)
            if "wod" in weights:
                terms["wod"] = losses.word_discrimination_loss(model.discriminate(words), labels >= 0, flat != self.pad)
            if "woc" in weights:
                terms["woc"] = losses.word_correction_loss(model.correct(words), labels)
        if "mlm" in weights:
            masked, targets = batch["masked"].flatten(0, 1), batch["labels"].flatten(0, 1)  # (B * M, T)
            places, words = (targets >= 0).nonzero().T, targets[targets >= 0]  # (2, q), (q,), on the CPU as labels are; q in 128s: bfloat16 compiles for each
            places, words = (torch.nn.functional.pad(x, (0, -len(words) % 128), value=none) for x, none in ((places, 0), (words, -1)))
            hidden = model.encode_pairs(model.prepare_text(masked, masked != self.pad), torch.arange(len(masked), device=ids.device),
                                        images.first(b), row.repeat_interleave(len(masked) // b), tuple(places.to(ids.device, non_blocking=True)))
            terms["mlm"] = losses.masked_lm_loss(model.fill(hidden), words.to(ids.device, non_blocking=True))
        return terms, seen

def training_step(objective, data, args, weights, rng, device_rng, device):
    """One TAGS-DC step without the optimiser: draw, retrieve, tailor, and the weighted sum of the losses.
    Returns the loss (a scalar with gradient) and {name: detached scalar} of its terms and diagnostics."""
    model, mining = getattr(objective, "module", objective).model, "hard" in weights
    b, p, m, probability = ((args.batch_size, args.pool, args.maskings, args.mask_probability) if mining else
                            (args.warmup_batch_size, args.warmup_batch_size, 1, args.warmup_mask_probability))
    captions = draw_pairs(data.splits["train"], p, rng)
    batch = make_batch(data, "train", captions, min(b, len(captions)), device, rng, m, probability)
    retrieved = negatives = None
    if mining:
        with evaluate.inference(model, device, args.dtype):
            texts = model.prepare_text(batch["input_ids"], batch["input_ids"] != data.tokenizer.pad_id)
            images = model.prepare_regions(batch["features"], batch["boxes"], batch["region_mask"])
            retrieved = retrieve_negatives(model, texts, images, batch, args)
            if SYNTHETIC & weights.keys():
                negatives = write_negatives(model, images.first(len(batch["masked"])), batch, data.tokenizer, args, device_rng)
    with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=args.dtype == torch.bfloat16):
        terms, seen = objective(batch, weights, retrieved, negatives)
    loss = sum(weights[name] * term for name, term in terms.items())
    return loss, {name: value.detach() for name, value in {**terms, **seen}.items()}

# ---- the run ---------------------------------------------------------------------------------------------------------
def phase_plan(args):
    """[(phase, steps, {term: weight}, peak learning rate)] of the run; the phases share --steps by their weights in --phases."""
    shares = {name: float(share) for name, share in (phase.split("=") for phase in args.phases) if not (args.init and name == "warmup")}
    given = {"itm": 1.0, "hard": 1.0, "tags": args.lambda_tags, "mlm": args.lambda_mlm, "wod": args.lambda_wod, "woc": args.lambda_woc}
    ends = [round(args.steps * part / sum(shares.values())) for part in itertools.accumulate(shares.get(name, 0) for name in PHASES)]
    return [(name, end - begin, {term: given[term] for term in PHASES[name] if given[term]} | ({"mlm": 1.0} if name == "warmup" else {}),
             {"warmup": args.warmup_lr, "tags": args.lr, "dc": args.dc_lr}[name]) for name, begin, end in zip(PHASES, [0, *ends], ends) if end > begin]

def say(text, passing=False):
    """Prints a line; on a terminal a passing one is overwritten by the next."""
    if world()[0] == 0:
        print("\r\033[K" * sys.stdout.isatty() + text, end="" if passing and sys.stdout.isatty() else "\n", flush=True)

def world():
    """(rank of this process, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

class Run:
    """A training run: the model, where it stands, and all that its checkpoints hold. With several processes each draws its
    own batches and pools; the first one alone writes."""
    def __init__(self, args, data, model, device):
        self.args, self.data, self.model, self.device, self.out = args, data, model, device, Path(args.out)
        self.plan, self.rank, self.asked, self.signal = phase_plan(args), world()[0], 0, 0  # signals: the one that came, what all agreed on
        self.objective, self.optimizer = Objective(model, data.tokenizer, args), None
        if world()[1] > 1:  # a term that is off, or a phase without it, leaves heads without gradient
            self.objective = DistributedDataParallel(self.objective, find_unused_parameters=True)
        self.rng, self.device_rng = (torch.Generator(where).manual_seed(args.seed + self.rank) for where in ("cpu", device))  # batches; refills
        self.at, self.started = dict(phase=0, step=0, val={}, seconds=0.0, warmup=None, log=[]), time.time()

    def new_optimizer(self):
        """AdamW; weight decay 0.01, none on biases and LayerNorm (METHOD 5). Every phase begins with a fresh one."""
        groups = [dict(params=[p for p in self.model.parameters() if (p.dim() > 1) == decayed], weight_decay=0.01 * decayed)
                  for decayed in (True, False)]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=self.device != "mps")  # which torch 2.4 cannot

    def save(self, name):
        """Writes everything that --resume, --eval and --checkpoint need."""
        if self.rank == 0:
            state = dict(self.at, seconds=self.at["seconds"] + time.time() - self.started, config=vars(self.model.config), extras=self.model.uniter_extras,
                         model=self.model.state_dict(), optimizer=self.optimizer.state_dict(), tokens=self.data.tokenizer.tokens,
                         rng=[self.rng.get_state(), self.device_rng.get_state(), torch.get_rng_state()],
                         arguments=vars(self.args) | dict(dtype=str(self.args.dtype).removeprefix("torch.")))
            datasets.write_atomically(self.out / name, lambda path: torch.save(state, path))

    def resume(self, state):
        """Takes up where the checkpoint `state` stands; processes other than the first, and another kind of device, draw afresh from there on."""
        self.at = {key: state[key] for key in self.at}
        self.model.load_state_dict(state["model"])
        self.new_optimizer()
        self.optimizer.load_state_dict(state["optimizer"])
        for generator, value in zip((self.rng, self.device_rng, torch.default_generator), state["rng"]):
            known = self.rank == 0 and len(value) == len(generator.get_state())
            generator.set_state(value) if known else generator.manual_seed(self.args.seed + self.rank + 1000 * self.at["step"])

    def train(self):
        """Runs what is left of the plan, each phase from the best weights of the one before. Returns False when interrupted."""
        for self.at["phase"] in range(self.at["phase"], len(self.plan)):
            if self.at["step"] == 0:
                self.new_optimizer(), self.at.update(val={})  # a phase is judged by itself: it alone trains its own heads
            self.model.train()
            before = [signal.signal(number, lambda number, _: setattr(self, "asked", number)) for number in (signal.SIGINT, signal.SIGTERM)]
            self.train_phase(*self.plan[self.at["phase"]])
            signal.signal(signal.SIGINT, before[0]), signal.signal(signal.SIGTERM, before[1])
            if self.signal:
                return False
            if world()[1] > 1:
                dist.barrier()  # best.pt is whole before anyone reads it
            self.model.load_state_dict(load_checkpoint(self.out / "best.pt")["model"])
            if self.plan[self.at["phase"]][0] == "warmup":
                self.at["warmup"] = test_report(self.model, self.data, final_split(self.data), self.args, self.device)[0]
            self.at["step"] = 0
        self.at["phase"] = len(self.plan)
        self.save("last.pt")
        return True

    def train_phase(self, phase, steps, weights, peak):
        """One phase of the plan, from self.at["step"] on: steps, lines of the log, validations."""
        args, history, clock, since = self.args, {}, time.time(), 0
        for step in range(self.at["step"], steps):
            lr = peak * min((step + 1) / max(0.1 * steps, 1), (steps - step) / max(0.9 * steps, 1))  # warm-up, then linear decay
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            terms = {"mlm": weights["mlm"]} if phase == "warmup" and step < args.words_first * steps else weights
            self.optimizer.zero_grad(set_to_none=True)
            for _ in range(args.accumulate):
                loss, seen = training_step(self.objective, self.data, args, terms, self.rng, self.device_rng, self.device)
                (loss / args.accumulate).backward()
                for name, value in {"loss": loss.detach(), **seen}.items():
                    history.setdefault(name, []).append(value)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 2.0)
            self.optimizer.step()
            self.at["step"], since = step + 1, since + 1
            if (step + 1) % args.log_every == 0 or step + 1 == steps or (self.asked and world()[1] == 1):
                means = {name: torch.stack(values).mean().item() for name, values in history.items()}
                self.report(phase, terms, means, (time.time() - clock) / since, lr, step + 1 == steps)
                history, clock, since = {}, time.time(), 0
            if self.signal:
                return self.save("last.pt")

    def report(self, phase, terms, means, pace, lr, last):
        """A row of the log after `pace` seconds a step; a validation where one is due, which is not before the phase's heads have learnt.
        Raises InputError if training diverged."""
        args, total, split = self.args, sum(steps for _, steps, _, _ in self.plan), "val" if "val" in self.data.splits else "train"
        done = sum(steps for _, steps, _, _ in self.plan[:self.at["phase"]]) + self.at["step"]
        row = {"phase": phase, "step": done, "lr": lr, **{name: round(mean, 5) for name, mean in means.items()}}
        if not math.isfinite(row["loss"]):
            raise datasets.InputError(f"the loss became {row['loss']} at step {done} ({phase}): lower the learning rate, now {lr:.1e}; "
                                      f"{self.out / 'best.pt'} holds the best weights before that")
        if "hard" in terms:
            candidates = 2 * args.pool + args.maskings * args.refills * bool(SYNTHETIC & terms.keys())
            means["negatives/s"] = row["negatives_per_s"] = round(args.batch_size * args.accumulate * candidates * world()[1] / pace)
        say(f"{phase} {done}/{total}  " + "  ".join(f"{name} {mean:.4g}" for name, mean in means.items())
            + f"  ETA {pace * (total - done) / 60:.1f} min", not last)
        signals = torch.tensor(self.asked, device=self.device)
        dist.all_reduce(signals, dist.ReduceOp.MAX) if world()[1] > 1 else None  # all stop at the same step, or none
        self.signal = signals.item()
        self.at["log"].append(row)
        steps, step = self.plan[self.at["phase"]][1], self.at["step"]
        learnt = terms.keys() - {"mlm"} and step >= steps / 2 * (phase == "dc")  # matching; the heads that are new in dc
        if last or not self.signal and learnt and step // args.log_every % max(1, steps // args.log_every // args.validations) == 0:
            metrics = evaluate.retrieval_metrics(*scores_of(self.model, self.data, split, args, self.device, args.val_images))
            row.update({f"val_{name}": round(metrics[name], 2) for name in ("rsum", "tr_r1", "ir_r1")})
            say(f"  validation: RSum {metrics['rsum']:.1f}  TR@1 {metrics['tr_r1']:.1f}  IR@1 {metrics['ir_r1']:.1f}")
            if metrics["rsum"] > self.at["val"].get("rsum", -1):
                self.at["val"] = metrics
                self.save("best.pt")
            self.save("last.pt")
        if self.rank == 0:
            names = list(dict.fromkeys(name for row in self.at["log"] for name in row))
            table = "".join(",".join(str(line.get(name, "")) for name in names) + "\n" for line in [dict(zip(names, names)), *self.at["log"]])
            datasets.write_atomically(self.out / "log.csv", lambda path: path.write_text(table))

def load_checkpoint(path, own=False):
    """The dictionary in a file: a checkpoint of ours, or, unless `own`, official weights. Raises InputError."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as fault:  # torch.load raises half a dozen kinds for a file that is none of its own
        raise datasets.InputError(f"{path}: not a readable checkpoint ({str(fault).splitlines()[0]})") from None
    if not isinstance(state, dict) or (own and "arguments" not in state):
        raise datasets.InputError(f"{path}: no checkpoint of this program; official weights start a run with --init")
    return state

# ---- evaluation ------------------------------------------------------------------------------------------------------
def scoring(args, device):  # what every function of evaluate.py is told
    return dict(device=device, dtype=args.dtype, score_batch=args.score_batch)

def scores_of(model, data, split, args, device, images=None):
    """Score matrix (C, I) of a split, or of its first `images` images and their captions, and the image of each caption, as
    retrieval_metrics takes them. Several processes share the captions."""
    owner, (rank, processes) = data.splits[split].image_of_caption, world()
    owner = owner[:torch.searchsorted(owner, images)] if images else owner
    rows, columns = torch.arange(len(owner)).tensor_split(processes)[rank], torch.arange(len(data.splits[split].images))[:images]
    show = lambda done, total: sys.stdout.isatty() and say(f"scored {done:,} of {total:,} pairs", True)
    part = evaluate.score_matrix(model, data, split, progress=show, captions=rows, images=columns, **scoring(args, device))
    if processes == 1:
        return part, owner
    scores = torch.zeros(len(owner), len(columns), device=device)
    scores[rows.to(device)] = part.to(device)
    dist.all_reduce(scores)
    return scores.cpu(), owner

def tailored_examples(model, data, split, captions, args, device):
    """Generated negatives of some captions of a split, and what the heads say of them, the same for the same seed: CPU tensors captions,
    images (N,), originals (N, T), sentences, corrections (N, H, T), valid, scores (N, H), discrimination (N, H, T, 2) logits."""
    batch = make_batch(data, split, captions, len(captions), device, torch.Generator().manual_seed(args.seed), args.maskings, args.mask_probability)
    with evaluate.inference(model, device, args.dtype):
        regions = model.prepare_regions(batch["features"], batch["boxes"], batch["region_mask"])
        sentences, valid, _ = (x.cpu() for x in write_negatives(model, regions, batch, data.tokenizer, args, torch.Generator(device).manual_seed(args.seed)))
    images = data.splits[split].image_of_caption[captions]
    judged = evaluate.judge_words(model, data, split, sentences.flatten(0, 1), images.repeat_interleave(args.hard), **scoring(args, device))
    logits, discrimination, corrections = (part.unflatten(0, valid.shape) for part in judged)
    return dict(captions=captions, images=images, originals=batch["anchor_ids"].cpu(), sentences=sentences, valid=valid,
                scores=logits.sigmoid(), discrimination=discrimination, corrections=corrections)

def final_split(data):
    """The split that is reported and searched: test, or the nearest there is."""
    return next(name for name in ("test", "val", "train") if name in data.splits)

def test_report(model, data, split, args, device):
    """Everything measured on a split -> ({metric: value}, score matrix, the generated examples)."""
    content, (scores, owner) = data.splits[split], scores_of(model, data, split, args, device)
    metrics = evaluate.retrieval_metrics(scores, owner)
    if data.name == "coco" and len(content.images) == 5000:
        metrics.update({f"1k_{name}": value for name, value in evaluate.fold_metrics(scores, owner).items()})
    if args.root:
        metrics |= evaluate.eccv_metrics(scores, data, split, Path(args.root))
    some = torch.searchsorted(content.image_of_caption, torch.arange(min(len(content.images), args.analyse_images)))
    made = tailored_examples(model, data, split, some, args, device)
    sentences, originals = made["sentences"].flatten(0, 1), made["originals"].repeat_interleave(args.hard, 0)
    metrics |= evaluate.word_metrics(made["discrimination"].flatten(0, 1), made["corrections"].flatten(0, 1), sentences, originals,
                                     sentences != data.tokenizer.pad_id)  # what is not valid is all padding
    metrics["synthetic_score"] = made["scores"][made["valid"]].mean().item()
    if content.scenes:
        metrics |= evaluate.false_negative_share(data, split, made["images"].repeat_interleave(args.hard), sentences, made["valid"].flatten())
        wrong = evaluate.one_word_wrong(data, split, args.seed)
        metrics["one_word_wrong"] = evaluate.pairwise_accuracy(model, data, split, *wrong, **scoring(args, device))
    return {name: round(value, 4) for name, value in metrics.items()}, scores, made

def picture_negatives(path, data, split, scores, made, count=6):
    """negatives.png: what was retrieved and what was written against some captions, and what the heads say of it."""
    content, decode, rows = data.splits[split], data.tokenizer.tokens.__getitem__, []
    for n in torch.linspace(0, len(made["captions"]) - 1, count).long().tolist():
        caption, image, generated = made["captions"][n].item(), made["images"][n].item(), []
        false = scores[:, image].masked_fill(content.image_of_caption == image, float("-inf"))
        for h in made["valid"][n].nonzero()[:3, 0].tolist():
            ids, flagged = made["sentences"][n, h], (made["discrimination"][n, h].argmin(1) == 1).tolist()
            words = range(1, (ids != data.tokenizer.pad_id).sum().item() - 1)
            generated.append(([decode(ids[i]) for i in words], made["scores"][n, h].item(), [(ids[i] != made["originals"][n, i]).item() for i in words],
                              [flagged[i] for i in words], [decode(made["corrections"][n, h, i]) if flagged[i] else None for i in words]))
        rows.append(dict(picture=evaluate.picture_of(data, split, image), caption=content.captions[caption], score=scores[caption, image].sigmoid().item(),
                         retrieved=(content.captions[false.argmax()], false.max().sigmoid().item()), generated=generated))
    evaluate.draw_negatives(path, rows)

TABLE = {f"{way}_r{k}": f"{asked} retrieval R@{k}" for way, asked in (("tr", "text"), ("ir", "image")) for k in (1, 5, 10)} | {
    "rsum": "RSum", "one_word_wrong": "caption over one word wrong, %", "false_negatives": "generated sentences that are true, %",
    "parse": "generated sentences that parse, %", "wod_precision": "word discrimination, precision %", "wod_recall": "word discrimination, recall %",
    "woc_accuracy": "word correction, accuracy %", "synthetic_score": "mean score of generated negatives",
    "ceiling_tr_r1": "who knows all and guesses ties: text R@1", "ceiling_ir_r1": "who knows all and guesses ties: image R@1"}

def finish(args, data, model, device, state):
    """Evaluates on the test split (val or train, if there is none): table, metrics.json, pictures. Among processes the first one writes."""
    split, out, warmup = final_split(data), Path(args.out), state.get("arguments", vars(args))["data"] == args.data and state["warmup"] or {}
    content, (metrics, scores, made) = data.splits[split], test_report(model, data, split, args, device)
    if world()[0] > 0:
        return
    for path in args.probe:
        metrics.update(evaluate.run_probe(path, model, data, split, **scoring(args, device)))
    if content.scenes:
        metrics |= zip(("ceiling_tr_r1", "ceiling_ir_r1"), datasets.identification_ceiling(content.scenes, content.captions, content.image_of_caption))
    say(f"{split} split: {len(content.images):,} images, {len(content.captions):,} captions\n{'':42}{'warm-up' if warmup else '':>10}{'final':>10}")
    for name, value in metrics.items():
        say(f"{TABLE.get(name, name):42}" + (f"{warmup[name]:10.2f}" if name in warmup else f"{'':10}") + f"{value:10.2f}")
    if args.save_scores:
        datasets.write_atomically(out / "scores.npy", lambda path: np.save(path.open("wb"), scores.numpy()))
    picture_negatives(out / "negatives.png", data, split, scores, made)
    if not args.eval:
        evaluate.draw_curves(out / "curves.png", state["log"])
        record = {"test": metrics, "val": state["val"], "warmup": state["warmup"], "arguments": vars(args) | {"dtype": str(args.dtype)}, "seed": args.seed,
                  "versions": {"python": platform.python_version(), "torch": torch.__version__}, "seconds": round(state["seconds"], 1)}
        datasets.write_atomically(out / "metrics.json", lambda path: path.write_text(json.dumps(record, indent=1)))
    say(f"in {out}: " + ", ".join(sorted(path.name for path in out.iterdir() if path.is_file())))

def search(args, data, model, device, count=6):
    """--query: the test images that a sentence describes best; --image: the captions that describe a test image best."""
    content, out, picture = data.splits[split := final_split(data)], Path(args.out), None
    if args.query:
        unknown = [word for word in datasets.split_words(args.query) if data.tokenizer.unk_id in data.tokenizer.encode(word)]
        if unknown or not args.query.strip():
            raise datasets.InputError(f"--query: the model does not know {', '.join(unknown) or 'an empty sentence'}; use words of its vocabulary")
        images = torch.arange(len(content.images))
        ids = evaluate.own_words(data, [args.query]).text("own", [0]).expand(len(images), -1)
    elif args.image in content.images:
        own = content.images.index(args.image)
        ids, images = data.text(split, torch.arange(len(content.captions))), torch.full((len(content.captions),), own)
        picture = evaluate.picture_of(data, split, own)
    else:
        raise datasets.InputError(f"--image {args.image}: no such image in the {split} split; its first are {', '.join(content.images[:3])}")
    scores = evaluate.score_sentences(model, data, split, ids, images, **scoring(args, device)).sigmoid()
    best = scores.topk(min(count, len(scores))).indices.tolist()
    results = [(evaluate.picture_of(data, split, i), content.images[i], scores[i].item()) if args.query else
               (None, content.captions[i] + "  (its own)" * bool(content.image_of_caption[i] == own), scores[i].item()) for i in best]
    evaluate.draw_search(out / "search.png", args.query or args.image, picture, results)
    say("\n".join(f"{score:.4f}  {text}" for _, text, score in results) + f"\ndrawn as {out / 'search.png'}")

# ---- the command line ------------------------------------------------------------------------------------------------
def parse_arguments(argv):
    """Defaults are for the embedded scenes; the paper's values stand in the help. A recipe or a checkpoint changes defaults."""
    parser = argparse.ArgumentParser(prog="tagsdc.py", description="TAGS-DC: image-text retrieval with tailored synthetic negatives.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument_group("what to do").add_argument
    add("--eval", metavar="CHECKPOINT", help="evaluate a checkpoint instead of training")
    add("--checkpoint", metavar="FILE", help="checkpoint for --query and --image")
    add("--query", metavar="TEXT", help="find the test images that a sentence describes best")
    add("--image", metavar="NAME", help="find the test captions that describe an image best")
    add("--probe", metavar="FILE", nargs="+", default=[], help="fine-grained tests: SugarCrepe, RoCOCO or VALSE FOIL files")
    add("--resume", action="store_true", help="go on with the interrupted run in --out")
    add("--quick", action="store_true", help="everything in miniature, to see that it works")
    add = parser.add_argument_group("data").add_argument
    add("--data", default="scenes", help="scenes, coco, flickr30k, or a JSON file of Karpathy's form")
    add("--root", help="folder of the captions and region features")
    add("--features", help="file or folder of the region features, if not under --root")
    add("--phrases", help="JSON with the phrases of the captions; without it they are parsed by rules")
    add("--skip-bad", action="store_true", help="leave out unusable images and captions, and count them")
    add("--scenes", type=int, nargs=3, default=[5000, 500, 500], metavar="N", help="images in train, val and test of the embedded world")
    add = parser.add_argument_group("model").add_argument
    add("--size", default="tiny", choices=PRESETS, help="of the network (paper: base, large)")
    add("--init", metavar="FILE", help="start from our checkpoint or official UNITER / TAGS weights, without a warm-up phase")
    add("--heads", type=int, help="attention heads of --init weights, if not 64 wide")
    add("--dropout", type=float, default=0.0, help="paper: 0.1")
    add = parser.add_argument_group("training").add_argument
    add("--recipe", choices=RECIPES, help="a schedule of the official release, in place of the defaults below")
    add("--steps", type=int, default=7000, help="optimiser steps in all; the phases share them")
    add("--phases", nargs="+", default=["warmup=16", "tags=3", "dc=1"], metavar="NAME=SHARE", help="phases and their shares of --steps")
    add("--batch-size", type=int, default=16, help="anchor pairs a step (paper: 32 on each of 8 GPUs)")
    add("--warmup-batch-size", type=int, default=64, help="pairs a step of the warm-up phase")
    add("--words-first", type=float, default=0.8, help="share of the warm-up that learns words (MLM) alone, before matching")
    add("--mask-probability", type=float, default=0.15, help="of a phrase, for the negatives (paper: 0.15)")
    add("--warmup-mask-probability", type=float, default=0.3, help="of a phrase, in the warm-up")
    add("--accumulate", type=int, default=1, help="batches whose gradients make one optimiser step")
    add("--recompute", action=argparse.BooleanOptionalAction, default=False, help="recompute activations in the backward pass: less memory, a third more work")
    add("--warmup-lr", type=float, default=1e-3, help="peak learning rate of the warm-up phase")
    add("--lr", type=float, default=6e-4, help="peak learning rate of the tags phase (paper: 5e-5)")
    add("--dc-lr", type=float, default=2e-4, help="peak learning rate of the dc phase (paper: 1e-5)")
    add("--pool", type=int, default=32, help="pairs among which hard negatives are retrieved (paper: 399)")
    add("--hard", type=int, default=4, help="negatives kept of each kind (paper: 31)")
    add("--maskings", type=int, default=4, help="maskings of each caption (paper: 20)")
    add("--refills", type=int, default=4, help="refills of each masking (paper: 20)")
    add("--temperature", type=float, default=2.0, help="of the refilling (paper: 1.5)")
    add("--truth-threshold", type=float, default=0.1, help="likelier words are taken for true and not refilled (paper: 1, no such filter)")
    add("--margin", type=float, default=0.2, help="of the triplet losses (paper: 0.2)")
    for term, default, text in (("tags", 0.3, "synthetic triplet loss (paper: 5e-5 to 1e-3)"), ("mlm", 0.2, "masked LM (paper: 0.01 to 0.1)"),
                                ("wod", 0.02, "word discrimination (paper: 5e-4)"), ("woc", 0.02, "word correction (paper: 5e-4)")):
        add(f"--lambda-{term}", type=float, default=default, help=f"weight of {text}; 0 switches it off")
    add = parser.add_argument_group("run").add_argument
    add("--out", help="run directory (default: runs/ and the name of the data)")
    add("--seed", type=int, default=0, help="of everything random")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="where to compute")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="auto: bfloat16 autocast where the hardware has it")
    add("--log-every", type=int, default=50, help="steps between two lines of the log")
    add("--validations", type=int, default=4, help="validations in a phase")
    add("--val-images", type=int, default=100, help="images of val that a validation looks at")
    add("--analyse-images", type=int, default=200, help="test images whose generated negatives are analysed")
    add("--score-batch", type=int, default=128, help="pairs in one pass without gradient (fit for a CPU; recipes: 2048, for a GPU)")
    add("--save-scores", action="store_true", help="keep the test score matrix as scores.npy in the run directory")
    known = vars(parser.parse_known_args(argv)[0])
    name = known["out"] or f"runs/{Path(known['data']).stem.removeprefix('dataset_')}"
    parser.set_defaults(out=name, **RECIPES.get(known["recipe"], {}))
    if known["quick"]:
        parser.set_defaults(scenes=[400, 50, 50], steps=120, phases=["warmup=2", "tags=1", "dc=1"], warmup_batch_size=16, analyse_images=30, log_every=20)
    source = known["eval"] or known["checkpoint"] or (f"{name}/last.pt" if known["resume"] else None)
    if source:  # what it was trained with
        of_this_call = ("eval", "checkpoint", "query", "image", "resume", "out", *(() if known["resume"] else ("probe", "save_scores", "device")))
        kept = load_checkpoint(source, own=True)["arguments"]
        parser.set_defaults(**{k: v for k, v in kept.items() if k in known and k not in of_this_call}, out=str(Path(source).parent))
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        zero = name.startswith("lambda_") or name in ("dropout", "words_first", "seed")
        if type(value) in (int, float) and not (0 <= value < math.inf if zero else 0 < value < math.inf):
            parser.error(f"--{name.replace('_', '-')} {value}: must be {'at least' if zero else 'above'} 0")
    faults = {f"--dropout {args.dropout}: must be below 1": args.dropout >= 1,
        f"--scenes {args.scenes}: each split needs an image": min(args.scenes) < 1,
        "--warmup-batch-size 1: matching needs a second pair to be wrong": args.warmup_batch_size < 2,
        "--checkpoint (a trained model: runs/scenes/best.pt) and --query or --image go together": bool(args.query or args.image) != bool(args.checkpoint),
        f"--hard {args.hard} exceeds --maskings {args.maskings} times --refills {args.refills}: there are not that many candidates":
            args.hard > args.maskings * args.refills,
        f"--pool {args.pool} is smaller than --batch-size {args.batch_size}: the pool holds the anchors": args.pool < args.batch_size,
        f"--phases {' '.join(args.phases)}: expected NAME=SHARE, a share above 0 and a name among {', '.join(PHASES)}":
            not all(re.fullmatch(rf"({'|'.join(PHASES)})=(?=.*[1-9])\d*\.?\d+", phase) for phase in args.phases),
        "--init goes without a warm-up, and --phases names no other phase": args.init and all(phase.startswith("warmup") for phase in args.phases)}
    faults |= {f"{path}: no such file": not Path(path).is_file() for path in (args.phrases, *args.probe, None if source else args.init) if path}
    for fault in [text for text, wrong in faults.items() if wrong]:
        parser.error(fault)
    return args

def hardware(args):
    """(device, dtype) that --device and --dtype come to on this machine. Raises InputError if it lacks what was asked for."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    device = next(name for name in there if there[name]) if args.device == "auto" else args.device
    if not there[device]:
        raise datasets.InputError(f"--device {device}: PyTorch finds no such device here; use --device cpu")
    cpu = Path("/proc/cpuinfo").read_text() if device == "cpu" and Path("/proc/cpuinfo").exists() else ""
    fast = torch.cuda.is_bf16_supported() if device == "cuda" else "avx512_bf16" in cpu or "amx_bf16" in cpu
    dtype = ("bfloat16" if fast else "float32") if args.dtype == "auto" else args.dtype
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if device == "cuda" else device, getattr(torch, dtype)

def make_model(args, data, given):
    """The network for this data: from a checkpoint of ours or official weights if `given`, else fresh. Raises InputError."""
    sizes = dict(vocab_size=len(data.tokenizer.tokens), feature_size=data.feature_size, dropout=args.dropout)
    if given is None:
        return TagsDC(Config.preset(args.size, **sizes))
    own = "config" in given
    try:
        config = Config(**given["config"] | dict(dropout=args.dropout)) if own else Config.from_uniter(given, args.heads, args.dropout)
        for field in ("vocab_size", "feature_size"):
            if getattr(config, field) != sizes[field]:
                raise ValueError(f"its {field} is {getattr(config, field)}, the data's {sizes[field]}: give the vocab.txt and features of these weights")
        model = TagsDC(config)
        report = {} if own else model.load_uniter(given)
    except ValueError as fault:
        raise datasets.InputError(f"{args.init or args.eval or args.checkpoint}: {fault}") from None
    if own:
        model.load_state_dict(given["model"])
        model.uniter_extras = given["extras"]
    for what, names in report.items():
        say(f"{args.init}: {what} {len(names)} entries" + (f", {'; '.join(names[:4])}{'; ...' if names[4:] else ''}" if names and what != "loaded" else ""))
    return model

def main(argv=None):
    """The command; returns its exit code."""
    try:
        return run(parse_arguments(argv)) or 0
    except (datasets.InputError, OSError) as fault:
        print(f"tagsdc.py: error: {' '.join(str(fault).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    finally:
        dist.destroy_process_group() if dist.is_initialized() else None

def run(args):
    """Loads data and model, then trains, evaluates or searches. Returns an exit code if the run was interrupted."""
    device, args.dtype = hardware(args)
    if "LOCAL_RANK" in os.environ:  # started by torchrun
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=8 * dist.constants.default_pg_timeout)
    source = args.eval or args.checkpoint or (f"{args.out}/last.pt" if args.resume else None)
    state = load_checkpoint(source, own=True) if source else None
    given = load_checkpoint(args.init) if args.init and not state else state
    torch.manual_seed(args.seed + world()[0])
    (store := Path(args.out) / "data" / Path(args.data).stem).mkdir(parents=True, exist_ok=True)
    if world()[0] > 0:
        dist.barrier()  # the first process converts the data, for hours if need be, the others then find it done
    known = given or {}
    data = datasets.load_scenes(args.seed, args.scenes, store, known.get("tokens")) if args.data == "scenes" else datasets.load_data(
        args.data, args.root, args.features, args.phrases, args.skip_bad, known.get("tokens"), known.get("config", {}).get("feature_size"), store)
    if world()[1] > 1 and world()[0] == 0:
        dist.barrier()
    for note in data.notes:
        say(note)
    model = make_model(args, data, given).to(device)
    model.checkpointing = args.recompute
    if args.query or args.image:
        return search(args, data, model, device)
    if not args.eval:
        if "train" not in data.splits:
            raise datasets.InputError(f"{args.data}: no captions of the train split to learn from; --eval CHECKPOINT needs none")
        training = Run(args, data, model, device)
        if args.resume:
            training.resume(state)
        if not training.train():
            say(f"interrupted; {args.out}/last.pt is saved, --resume goes on")
            return 128 + training.signal
        state = dict(training.at, seconds=training.at["seconds"] + time.time() - training.started)
    return finish(args, data, model, device, state)

if __name__ == "__main__":
    sys.exit(main())
