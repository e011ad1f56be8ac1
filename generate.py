"""Tailored synthetic negatives: mask phrases, refill, filter, select (METHOD 3). Integers in, integers out.
Letters: B pairs, T text positions, P phrases of a caption, M maskings of it, K refills of each, N = M * K candidates, H kept negatives,
C captions of an image, V vocabulary, Q masked positions of all sentences together. Every mask: True = real / usable. Everything runs on
the device of `input_ids`, draws from one torch.Generator, needs no gradient and knows no tokenizer: `fill` and `match` are any callables
    (input_ids (n, T) long, image index (n,) long in 0..B-1) -> logits (n, T, V), respectively (n,),
in eval mode, since dropout would blur both the words drawn and the scores compared.

A worked example, M = 1, K = 2, H = 1 (phrases: "two dogs", "running", "on", "grass"):
    [CLS] two dogs running on grass [SEP]
    [CLS] [MASK] [MASK] running on grass [SEP]     labels: -1 two dogs -1 -1 -1 -1         mask_phrases
    [CLS] two dogs running on grass [SEP]          the caption itself: dropped             refill_masks, drop_non_negatives
    [CLS] three cows running on grass [SEP]        kept; labels: -1 two dogs -1 -1 -1 -1   select_hardest"""
from typing import NamedTuple

import torch
import torch.nn.functional as F

class Negatives(NamedTuple):
    """What `tailor_negatives` keeps of a batch."""
    sentences: torch.Tensor  # (B, H, T) long; all padding where not valid
    valid: torch.Tensor      # (B, H) bool; False = the caption ran out of usable candidates
    labels: torch.Tensor     # (B, H, T) long; the original word where the sentence differs from the caption, else -1

def mask_phrases(input_ids, phrases, mask_id, vocabulary_range, maskings=1, probability=0.15, generator=None):
    """Masks whole phrases of each caption, M times over (METHOD 3.1).
    input_ids: (B, T) long.  phrases: (B, P, T) bool membership; a caption without any phrase, or None, masks single words.
    vocabulary_range: (first, end) of the ordinary word ids; others (special tokens, padding, unknown words) are never masked.
    A phrase is chosen with `probability`, averaged over its tokens (a token in f phrases counts probability / f), and one at random if none
    was. All its tokens are masked together: 80% become mask_id, 10% a random word, 10% stay.
    Returns masked ids and labels, both (B, M, T) long; labels hold the original word at masked positions and -1 elsewhere."""
    (b, t), device, (first, end) = input_ids.shape, input_ids.device, vocabulary_range
    ordinary = (input_ids >= first) & (input_ids < end)  # (B, T)
    words = torch.eye(t, dtype=torch.bool, device=device) & ordinary[:, None]  # (B, T, T)
    phrases = words[:, :0] if phrases is None else phrases & ordinary[:, None]
    phrases = torch.cat((phrases, words & ~phrases.flatten(1).any(1)[:, None, None]), 1)  # (B, P, T), P grown by T
    member = phrases.float()
    share = probability / member.sum(1).clamp(min=1)                                    # (B, T)
    chance = (member * share[:, None]).sum(2) / member.sum(2).clamp(min=1)              # (B, P)
    draw = torch.rand(b, maskings, phrases.size(1), device=device, generator=generator)  # (B, M, P)
    chosen = draw < chance[:, None]
    among_rest = (draw - chance[:, None]) / (1 - chance[:, None])                       # uniform again, where nothing was chosen
    fallback = among_rest.masked_fill(~phrases.any(2)[:, None], 2.0).argmin(2, keepdim=True)
    chosen = torch.where(chosen.any(2, keepdim=True), chosen, torch.zeros_like(chosen).scatter(2, fallback, True))
    masked = torch.matmul(chosen.float(), member) > 0                                   # (B, M, T)
    original = input_ids[:, None].expand(b, maskings, t)
    coin = torch.rand(b, maskings, t, device=device, generator=generator)
    random_words = torch.randint(first, end, (b, maskings, t), device=device, generator=generator)
    shown = torch.where(coin < 0.8, mask_id, torch.where(coin < 0.9, random_words, original))
    return torch.where(masked, shown, original), torch.where(masked, original, -1)

def refill_masks(fill, masked, labels, vocabulary_range, refills=1, temperature=1.5, generator=None, chunk_size=512, project=None,
                 truth_threshold=1.0):
    """Samples every masked position anew from softmax(logits / temperature), K times (METHOD 3.2).
    masked, labels: (B, M, T) long from `mask_phrases`; labels may lie on the CPU when all else is on a GPU, and nothing waits for it then.
    Only ids in vocabulary_range are ever sampled.  chunk_size: sentences a call of `fill`.  project: if given, `fill` returns states
    (n, T, D), and project (q, D) -> (q, V) makes logits of the masked ones alone.  truth_threshold: a word more probable than this is likely
    true of the image and never sampled, save the original, so that single words of a phrase can be wrong. 1 = off, as in the paper.
    Returns candidates (B, M * K, T) long: the K refills of masking 0 first, then those of masking 1, ..."""
    (b, m, t), (first, end) = masked.shape, vocabulary_range
    candidates = masked.flatten(0, 1)[:, None].repeat(1, refills, 1)  # (B * M, K, T)
    image_index = torch.arange(b, device=masked.device).repeat_interleave(m)
    for rows, targets, images in zip(candidates.split(chunk_size), labels.flatten(0, 1).split(chunk_size), image_index.split(chunk_size)):
        row, column = (targets >= 0).nonzero().to(masked.device, non_blocking=True).unbind(1)  # (q,) each
        states = fill(rows[:, 0], images)[row, column]
        logits = (project(states) if project else states)[:, first:end].float()       # (q, V)
        if truth_threshold < 1:
            original = targets[targets >= 0].to(logits.device, non_blocking=True)[:, None] - first  # (q, 1)
            logits = logits.masked_fill((logits.softmax(-1) > truth_threshold).scatter(1, original, False), float("-inf"))
        cumulative = (logits / temperature).softmax(-1).cumsum(-1)
        uniform = torch.rand(len(row), refills, device=masked.device, generator=generator)
        words = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)  # (q, K)
        rows[row, :, column] = words.clamp(max=end - first - 1) + first
    return candidates.view(b, m * refills, t)

def is_true(sentences, positives, pad_id=0):
    """Which of the sentences (B, N, T) equal, word for word, one of their row's captions (B, C, T')? -> (B, N) bool."""
    width = max(sentences.size(2), positives.size(2))
    sentences, positives = (F.pad(ids, (0, width - ids.size(2)), value=pad_id) for ids in (sentences, positives))
    true = torch.zeros(sentences.shape[:2], dtype=torch.bool, device=sentences.device)
    for caption in positives.unbind(1):
        true |= (sentences == caption[:, None]).all(2)
    return true

def drop_non_negatives(candidates, positives, pad_id=0):
    """Which candidates may serve as negatives: none of the image's own captions, and no duplicate (METHOD 3.3).
    candidates: (B, N, T) long.  positives: (B, C, T') long, the image's own captions padded with pad_id, T' need not be T.
    Returns valid (B, N) bool. Of equal candidates the first stays; hashes only bring them together, words decide."""
    factors = torch.randint(2 ** 62, (candidates.size(2),), generator=torch.Generator().manual_seed(0))
    keys = (candidates * factors.to(candidates.device, non_blocking=True)).sum(2)       # (B, N), wraps around
    order = keys.sort(dim=1, stable=True).indices
    ordered = candidates.gather(1, order[..., None].expand_as(candidates))              # (B, N, T)
    repeat = F.pad((ordered[:, 1:] == ordered[:, :-1]).all(2), (1, 0))                  # (B, N), equals its predecessor
    return ~is_true(candidates, positives, pad_id) & ~torch.zeros_like(repeat).scatter(1, order, repeat)

def select_hardest(scores, valid, h):
    """The h highest-scoring usable candidates of each row (METHOD 3.4).
    scores: (B, N) float, the higher the harder; one that is not finite is not usable.  valid: (B, N) bool, True = usable.
    Returns index (B, h) long, hardest first, and kept (B, h) bool, False where a row ran out of candidates. Raises ValueError if h > N."""
    if h > scores.size(1):
        raise ValueError(f"cannot keep {h} of {scores.size(1)} candidates")
    usable = valid & scores.isfinite()
    index = scores.float().masked_fill(~usable, float("-inf")).topk(h, dim=1).indices
    return index, usable.gather(1, index)

@torch.no_grad()
def tailor_negatives(fill, match, input_ids, phrases, positives, *, mask_id, vocabulary_range, pad_id=0, maskings=20, refills=20,
                     hard=31, temperature=1.5, probability=0.15, generator=None, chunk_size=512, project=None, masks=None,
                     truth_threshold=1.0):
    """Writes the H hardest false sentences for each caption: mask, refill, filter, select (METHOD 3).
    fill, match: the two callables of the module docstring.  input_ids: (B, T) long.  phrases: (B, P, T) bool, or None.
    positives: (B, C, T') long, all true captions of each image, the anchor among them, padded with pad_id.
    masks: (masked ids, labels) of `mask_phrases`, drawn here if not given, so that the MLM loss can share them. Others as above; H <= M * K.
    Returns Negatives(sentences, valid, labels). Valid sentences are pairwise different within a row, hardest first, hold no
    special token that the caption lacks, and equal none of `positives`; the others are all padding with labels of -1."""
    masked, labels = masks or mask_phrases(input_ids, phrases, mask_id, vocabulary_range, maskings, probability, generator)
    candidates = refill_masks(fill, masked, labels, vocabulary_range, refills, temperature, generator, chunk_size, project, truth_threshold)
    usable = drop_non_negatives(candidates, positives, pad_id)  # (B, N)
    index, valid = select_hardest(_score_usable(match, candidates, usable, chunk_size), usable, hard)
    sentences = candidates.gather(1, index[..., None].expand(-1, -1, candidates.size(2))).where(valid[..., None], pad_id)  # (B, H, T)
    replaced = valid[..., None] & (sentences != input_ids[:, None])
    return Negatives(sentences, valid, torch.where(replaced, input_ids[:, None], -1))

def _score_usable(match, candidates, usable, chunk_size):
    """Matching logits (B, N) of the usable candidates; on a GPU of all, since to count the usable ones would halt it."""
    (b, n), flat = usable.shape, candidates.flatten(0, 1)
    pick = usable.flatten().nonzero()[:, 0] if flat.device.type == "cpu" else torch.arange(b * n, device=flat.device)
    scores = [match(flat[chunk], chunk // n).float() for chunk in pick.split(chunk_size)]
    return torch.zeros(b * n, device=flat.device).scatter(0, pick, torch.cat(scores)).view(b, n)
