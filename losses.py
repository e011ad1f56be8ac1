"""The training objective of TAGS-DC (section 3 of the paper), one function a term.

    L = L_hard + a * L_tags + b * L_mlm + c * L_wod + d * L_woc

Letters: P pairs of a pool, the first B of them the anchors, H negatives of an anchor, M maskings
of its caption, T text positions, V words of the vocabulary, q masked words of the whole batch.
Every mask: True = real / usable, None = all are. Every label: -1 = no target here. s(I, T) is the
sigmoid of a matching logit; [x]+ is max(x, 0). `count` is what the sum of a term is divided by,
None = the number of its usable entries. A term without any is 0 and passes a zero gradient."""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F

FLOOR = math.log(1e-10)  # as in the official code p is at least 1e-10, and has no gradient below


def masked_mean(values, valid=None, count=None):
    """(sum of the valid values; the others may be NaN) / count: (...) float, (...) bool -> ()."""
    valid = torch.ones_like(values, dtype=torch.bool) if valid is None else valid
    if values.shape != valid.shape:
        raise ValueError(f"values are {tuple(values.shape)}, but valid is {tuple(valid.shape)}")
    count = valid.sum().clamp(min=1) if count is None else count
    return torch.where(valid, values, 0.0).sum() / count


def triplet_loss(positive, negatives, margin=0.2, valid=None, count=None):
    """L_hard, L_tags (3.2, 3.3): mean of [margin + s(negative) - s(positive)]+ over all negatives.
    positive: (B,) float, scores in 0..1. negatives: (B, H) float. valid: (B, H) bool."""
    if positive.dim() != 1 or negatives.dim() != 2 or len(negatives) != len(positive):
        shapes = f"{tuple(positive.shape)} and {tuple(negatives.shape)}"
        raise ValueError(f"positive must be (B,) and negatives (B, H), got {shapes}")
    hinge = (margin + negatives.float() - positive.float()[:, None]).clamp(min=0)  # (B, H)
    return masked_mean(hinge, valid, count)


def matching_loss(logits, matches, valid=None, count=None):
    """Warm-up (UNITER's matching): mean of -log s for true pairs and -log(1 - s) for wrong ones.
    logits: (N,) float. matches: (N,) bool or float, 1 = true pair. valid: (N,) bool."""
    cost = F.binary_cross_entropy_with_logits(logits.float(), matches.float(), reduction="none")
    return masked_mean(cost, valid, count)


def contrastive_loss(logits):
    """Image-text contrast (ITC of ALBEF, InfoNCE): -log softmax of the true pairs over their rows,
    and columns, means of both added. logits: (P, P) float, true on the diagonal alone."""
    own = torch.arange(len(logits), device=logits.device)
    return F.cross_entropy(logits.float(), own) + F.cross_entropy(logits.float().T, own)


def masked_lm_loss(logits, labels, count=None):
    """L_mlm (3.3): mean of -log p(original word) over the masked positions.
    logits: (..., V) float, of all positions or of the masked alone. labels: (...) integers."""
    labels = labels.flatten().long()
    cost = F.cross_entropy(logits.float().flatten(0, -2), labels, ignore_index=-1, reduction="none")
    return masked_mean(cost, labels >= 0, count)


def word_discrimination_loss(logits, replaced, text_mask, original_weight=0.11, count=None):
    """L_wod (3.4): mean over the real positions, [CLS] and [SEP] too, of -log p(replaced) where a
    word was replaced and, as few are, -original_weight * log p(original) elsewhere; p >= 1e-10.
    logits: (B, T, 2) float, class 1 = original, 0 = replaced. replaced, text_mask: (B, T) bool."""
    log_p = logits.float().log_softmax(-1).clamp(min=FLOOR)  # (B, T, 2)
    cost = -torch.where(replaced, log_p[..., 0], original_weight * log_p[..., 1])  # (B, T)
    return masked_mean(cost, text_mask, count)


def word_correction_loss(logits, labels, count=None):
    """L_woc (3.4): mean of -log p(original word) over the replaced positions, p >= 1e-10.
    logits: (..., V) float. labels: (...) long."""
    log_p = logits.float().log_softmax(-1)  # (..., V)
    log_p = log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0]  # (...)
    return masked_mean(-log_p.clamp(min=FLOOR), labels >= 0, count)


def joint_count(valid):
    """How many entries are valid, a mean over the processes, which must all call it; None if there
    is only one. Terms divided by it have, averaged, the gradient of the joint batch."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    total = valid.sum().float()
    dist.all_reduce(total)
    return total.clamp(min=1) / dist.get_world_size()


class Objective(torch.nn.Module):
    """All losses of one batch in one forward call, as a data-parallel wrapper wants it."""

    def __init__(self, model, pad_id, margin, original_weight=0.11):
        super().__init__()
        self.model = model
        self.pad_id = pad_id
        self.margin = margin
        self.original_weight = original_weight

    def forward(self, batch, weights, retrieved, negatives):
        """The terms of L (3.5): {term: scalar} and {diagnostic: scalar}.
        batch: input_ids (P, T), features, boxes and region_mask of P images; masked (B, M, T),
            places (q,) flat positions in it, targets (q,) the words there. For "itm" also
            wrong_images and wrong_texts (B,), indices into the pool, and wrong_valid (B,) bool.
        weights: {term: weight} of those to compute.
        retrieved: for "hard", images and captions, (index (B, H), valid (B, H) bool) each.
        negatives: `generate.Negatives` of the anchors or None; it goes with "hard"."""
        texts = self.prepare(batch["input_ids"])
        images = self.model.prepare_regions(batch["features"], batch["boxes"], batch["region_mask"])
        terms = {}
        diagnostics = {}
        if "itc" in weights:
            terms["itc"] = contrastive_loss(texts.mean @ images.mean.T)
        if "itm" in weights:
            terms["itm"] = self.matching(texts, images, batch)
        if "hard" in weights:
            positive, diagnostics = self.against_retrieved(texts, images, *retrieved)
            terms["hard"] = diagnostics["hard_image"] + diagnostics["hard_text"]
        if negatives is not None:
            written, scores = self.against_written(images, positive, negatives, weights)
            terms |= written
            diagnostics |= scores
        if "mlm" in weights:
            terms["mlm"] = self.masked_lm(images, batch)
        return terms, diagnostics

    def prepare(self, input_ids):
        return self.model.prepare_text(input_ids, input_ids != self.pad_id)

    def triplet(self, positive, negatives, valid):
        return triplet_loss(positive, negatives, self.margin, valid, joint_count(valid))

    def matching(self, texts, images, batch):
        """The true pair, one wrong caption and one wrong image of each anchor."""
        wrong = batch["wrong_valid"]
        true = torch.ones_like(wrong)
        row = torch.arange(len(wrong), device=wrong.device)
        text_index = torch.cat((row, batch["wrong_texts"], row))
        image_index = torch.cat((row, row, batch["wrong_images"]))
        logits = self.model.score_pairs(texts, text_index, images, image_index)  # (3B,)
        matches = torch.cat((true, ~true, ~true))
        valid = torch.cat((true, wrong, wrong))
        return matching_loss(logits, matches, valid, joint_count(valid))

    def against_retrieved(self, texts, images, hard_images, hard_texts):
        """Scores (B,) of the true pairs, and the triplet losses against retrieved negatives."""
        image_index, image_valid = hard_images  # (B, H) each
        text_index, text_valid = hard_texts
        B, H = image_index.shape
        row = torch.arange(B, device=image_index.device)
        anchor = row.repeat_interleave(H)  # (B * H,)
        # The true pairs, each caption with its hard images, each image with its hard captions.
        text_index = torch.cat((row, anchor, text_index.flatten()))
        image_index = torch.cat((row, image_index.flatten(), anchor))
        scores = self.model.score_pairs(texts, text_index, images, image_index).sigmoid()
        positive = scores[:B]
        false_images, false_texts = scores[B:].view(2, B, H)
        return positive, {
            "hard_image": self.triplet(positive, false_images, image_valid),
            "hard_text": self.triplet(positive, false_texts, text_valid),
            "positive": positive.mean(),
            "retrieved": masked_mean(false_texts, text_valid, joint_count(text_valid)),
        }

    def against_written(self, images, positive, negatives, weights):
        """Triplet loss, word discrimination and word correction on generated sentences."""
        sentences, valid, labels = negatives  # (B, H, T), (B, H), (B, H, T)
        B, H, T = sentences.shape
        flat = sentences.flatten(0, 1)  # (B * H, T)
        text_mask = flat != self.pad_id
        labels = labels.flatten(0, 1)
        row = torch.arange(B * H, device=flat.device)
        texts = self.prepare(flat)
        hidden = self.model.encode_pairs(texts, row, images, row // H)
        words = hidden[:, :T]
        logits = self.model.match(hidden) + self.model.similarity(texts, row, images, row // H)
        scores = logits.sigmoid().view(B, H)
        mean_score = masked_mean(scores, valid, joint_count(valid))
        terms = {}
        if "tags" in weights:
            terms["tags"] = self.triplet(positive, scores, valid)
        if "wod" in weights:
            logits = self.model.discriminate(words)
            terms["wod"] = word_discrimination_loss(
                logits, labels >= 0, text_mask, self.original_weight, joint_count(text_mask)
            )
        if "woc" in weights:
            count = joint_count(labels >= 0)
            terms["woc"] = word_correction_loss(self.model.correct(words), labels, count)
        return terms, {"synthetic": mean_score, "kept": valid.float().mean()}

    def masked_lm(self, images, batch):
        """The masked words of the anchors, each looking at its own picture."""
        B, M, T = batch["masked"].shape
        texts = self.prepare(batch["masked"].flatten(0, 1))  # of (B * M, T)
        row = torch.arange(B * M, device=batch["masked"].device)
        hidden = self.model.encode_places(texts, row, images, row // M, batch["places"])  # (q, D)
        targets = batch["targets"]  # (q,), -1 where the list is padded
        return masked_lm_loss(self.model.fill(hidden), targets, joint_count(targets >= 0))
