"""The terms of the TAGS-DC objective (section 3 of the paper): tensors in, a scalar out.

    L = L_hard + a * L_tags + b * L_mlm + c * L_wod + d * L_woc

A part of TAGS-DC (Fan et al., Findings of NAACL 2022) in PyTorch, MIT licence; this file stands
on its own.

Letters: B pairs, H negatives of a pair, N pairs of a list, T text positions, V vocabulary, D hidden
size.
s(I, T) is the sigmoid of a matching logit; [x]+ is max(x, 0). In every mask True means real or
usable, and None that all entries are. Every negative label (-1, -100) means: no target here.
Each term of TAGS-DC is a mean over its usable entries; without any it is 0, its gradient too."""

import math

import torch
import torch.nn.functional as F

FLOOR = math.log(1e-10)  # as in the official code p is at least 1e-10, and has no gradient below


def masked_mean(values, valid=None):
    """Mean of the valid values: (...) float, (...) bool -> (). The others have no say, even if they
    are NaN; but then what they were computed from may get a gradient of NaN."""
    if valid is None:
        valid = torch.ones_like(values, dtype=torch.bool)
    if values.shape != valid.shape or valid.dtype != torch.bool:
        found = f"values are {tuple(values.shape)}, but valid is {tuple(valid.shape)}"
        raise ValueError(f"{found} {valid.dtype}; torch.bool is wanted")
    total = torch.where(valid, values, 0.0).sum()
    return total / valid.sum().clamp(min=1)


def triplet_loss(positive, negatives, *, margin=0.2, valid=None):
    """L_hard, L_tags (3.2, 3.3): mean of [margin + s(negative) - s(positive)]+ over all negatives.
    positive: (B,) float, scores in 0..1. negatives: (B, H) float. valid: (B, H) bool."""
    if positive.dim() != 1 or negatives.dim() != 2 or len(negatives) != len(positive):
        shapes = f"{tuple(positive.shape)} and {tuple(negatives.shape)}"
        raise ValueError(f"positive must be (B,) and negatives (B, H), got {shapes}")
    hinge = (margin + negatives.float() - positive.float()[:, None]).clamp(min=0)  # (B, H)
    return masked_mean(hinge, valid)


def matching_loss(logits, matches, *, valid=None):
    """Warm-up (UNITER's matching): mean of -log s for true pairs and -log(1 - s) for wrong ones.
    logits: (N,) float. matches: (N,) bool or float, 1 = true pair. valid: (N,) bool."""
    cost = F.binary_cross_entropy_with_logits(logits.float(), matches.float(), reduction="none")
    return masked_mean(cost, valid)


def contrastive_loss(scores, *, valid=None):
    """Warm-up from BERT (InfoNCE): each caption of a batch is to find its image, and each image its
    caption. Mean of -log softmax of the true pairs, both ways.
    scores: (B, B) float, caption a with image b; the diagonal belongs together. valid: (B, B) bool,
    False leaves a wrong pair out."""
    if scores.dim() != 2 or scores.size(0) != scores.size(1):
        raise ValueError(f"scores must be (B, B), got {tuple(scores.shape)}")
    scores = scores.float()
    pair = torch.arange(len(scores), device=scores.device)
    if valid is not None:
        wrong = pair[:, None] != pair
        scores = scores.masked_fill(wrong & ~valid, float("-inf"))
    return (F.cross_entropy(scores, pair) + F.cross_entropy(scores.T, pair)) / 2


def alignment_loss(words, regions, *, temperature=0.1, valid=None):
    """First part of a warm-up from BERT: `contrastive_loss` of the cosines of mean embeddings, of a
    caption's words and of an image's regions, over the temperature.
    words, regions: (B, D) float, row b of both belongs together. valid: as there."""
    if words.dim() != 2 or words.shape != regions.shape:
        shapes = f"{tuple(words.shape)} and {tuple(regions.shape)}"
        raise ValueError(f"words and regions must be (B, D), got {shapes}")
    words = F.normalize(words.float(), dim=1)
    regions = F.normalize(regions.float(), dim=1)
    return contrastive_loss(words @ regions.T / temperature, valid=valid)


def masked_lm_loss(logits, labels):
    """L_mlm (3.3): mean of -log p(original word) over the masked positions.
    logits: (..., V) float, of all positions or of the masked alone. labels: (...) integers."""
    logits = logits.float().flatten(0, -2)
    labels = labels.flatten().long()
    masked = labels >= 0
    cost = F.cross_entropy(logits, labels.where(masked, -100), ignore_index=-100, reduction="none")
    return masked_mean(cost, masked)


def word_discrimination_loss(logits, replaced, text_mask, *, original_weight=0.11):
    """L_wod (3.4): mean over the real positions, [CLS] and [SEP] too, of -log p(replaced) where a
    word was replaced and -original_weight * log p(original) elsewhere: few words are replaced.
    Every p is taken to be at least 1e-10. logits: (..., T, 2) float, class 1 = original, 0 =
    replaced. replaced, text_mask: (..., T) bool; in `replaced` True means replaced."""
    if replaced.dtype != torch.bool:
        raise ValueError(f"replaced must be torch.bool, got {replaced.dtype}")
    log_p = logits.float().log_softmax(-1).clamp(min=FLOOR)  # (..., T, 2)
    cost = torch.where(replaced, -log_p[..., 0], -original_weight * log_p[..., 1])  # (..., T)
    return masked_mean(cost, text_mask)


def word_correction_loss(logits, labels):
    """L_woc (3.4): mean of -log p(original word) over the replaced positions, p >= 1e-10.
    logits: (..., V) float. labels: (...) integers."""
    labels = labels.long()
    log_p = logits.float().log_softmax(-1)  # (..., V)
    log_p = log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0]  # (...)
    return masked_mean(-log_p.clamp(min=FLOOR), labels >= 0)
