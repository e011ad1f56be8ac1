"""The training objective of TAGS-DC, one function a term: tensors in, a scalar out (METHOD 2-5).
Letters: B pairs, H negatives of a pair, T text positions, V vocabulary.
Every mask says True = real / usable; every label -1 = no target here. A term without any target is 0 and passes a zero gradient."""
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F

FLOOR = math.log(1e-10)  # the official code clamps probabilities at 1e-10 before the logarithm

def masked_mean(values, valid):
    """Mean of `values` where `valid` (bool, same shape), a scalar; 0 if nothing is valid. Among several processes the sum is divided by
    the mean count of all, so that the average of their gradients is that of the joint batch, however unevenly the valid entries lie."""
    total, processes = valid.sum().float(), 1
    if dist.is_available() and dist.is_initialized():
        processes = dist.get_world_size()
        dist.all_reduce(total)
    return torch.where(valid, values, 0.0).sum() * processes / total.clamp(min=1)

def triplet_loss(positive, negatives, margin=0.2, valid=None):
    """mean [margin + s(negative) - s(positive)]+ over all usable negatives, not only the hardest (METHOD 2 and 3.5).
    positive: (B,) float, matching scores in [0, 1] (sigmoid) of the true pairs.  negatives: (B, H) float, those that must lie `margin` below.
    valid: (B, H) bool, None = all are usable.  Agrees with the official rank loss. Raises ValueError when the shapes do not fit."""
    if positive.dim() != 1 or negatives.dim() != 2 or negatives.size(0) != positive.size(0):
        raise ValueError(f"positive must be (B,) and negatives (B, H), got {tuple(positive.shape)} and {tuple(negatives.shape)}")
    hinge = (margin + negatives.float() - positive.float()[:, None]).clamp(min=0)  # (B, H)
    return masked_mean(hinge, torch.ones_like(hinge, dtype=torch.bool) if valid is None else valid)

def matching_loss(logits, matches):
    """Binary cross-entropy of matching logits (...) with float labels (...), 1 = true pair (UNITER's ITM, one output)."""
    cost = F.binary_cross_entropy_with_logits(logits.float(), matches.float(), reduction="none")
    return masked_mean(cost, torch.ones_like(cost, dtype=torch.bool))

def masked_lm_loss(logits, labels):
    """Cross-entropy of the MLM head at the masked positions (METHOD 3.5), a mean over them.
    logits: (..., V) float, of all positions or the masked alone; labels: (...) long, the original word or -1 where nothing was masked."""
    cost = F.cross_entropy(logits.float().flatten(0, -2), labels.flatten(), ignore_index=-1, reduction="none")
    return masked_mean(cost, labels.flatten() >= 0)

def word_discrimination_loss(logits, replaced, text_mask, original_weight=0.11):
    """Which words were replaced? Weighted cross-entropy over every text position (METHOD 4).
    logits: (B, T, 2) float, class 1 = original, 0 = replaced.  replaced: (B, T) bool.  text_mask: (B, T) bool.  Few words are replaced: those
    weigh 1, original ones `original_weight`. Divides by the number of positions ([CLS], [SEP] too), not by the weight sum, as officially."""
    log_p = logits.float().log_softmax(-1).clamp(min=FLOOR)  # (B, T, 2)
    cost = -torch.where(replaced, log_p[..., 0], original_weight * log_p[..., 1])  # (B, T)
    return masked_mean(cost, text_mask)

def word_correction_loss(logits, labels):
    """Cross-entropy of the correction head with the original words (METHOD 4).
    logits: (..., V) float; labels: (...) long, the original word or -1 where there is nothing to correct.
    Returns the mean over labelled positions, probabilities floored at 1e-10 as in the official code (no gradient below)."""
    log_p = logits.float().log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]  # (...)
    return masked_mean(-log_p.clamp(min=FLOOR), labels >= 0)
