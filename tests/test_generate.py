"""The generator of negatives against plain loops: mask, refill, filter, select; with mocks and with
the real model."""

import inspect
import itertools
import json
import random
from pathlib import Path

import pytest
import torch

import generate
import losses
from data import split_words
from model import Config, TagsDC

PAD, UNK, CLS, SEP, MASK, FIRST, END = 0, 1, 2, 3, 4, 5, 25
REAL = Path(__file__).resolve().parents[2] / "shared" / "real"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="the real files are not here")
WORDS = (FIRST, END)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def sentence(*words, length=None):
    """[CLS] words [SEP], padded to `length`."""
    ids = [CLS, *words, SEP]
    return ids + [PAD] * ((length or len(ids)) - len(ids))


def membership(length, *phrases):
    """(P, T) bool from the word positions of each phrase; [CLS] is position 0."""
    member = torch.zeros(len(phrases), length, dtype=torch.bool)
    for row, positions in zip(member, phrases):
        row[list(positions)] = True
    return member


def mask(input_ids, phrases, maskings=1, seed=0, words=WORDS, **options):
    return generate.mask_phrases(
        input_ids, phrases, MASK, words, maskings, generator=seeded(seed), **options
    )


# ---- mask


def exact_patterns(phrases, probability):
    """{set of masked positions: probability}, by a loop over every subset of phrases (section
    3.3)."""
    often = {}
    for position in itertools.chain(*phrases):
        often[position] = often.get(position, 0) + 1
    chance = [
        sum(probability / often[position] for position in phrase) / len(phrase)
        for phrase in phrases
    ]
    patterns = {}
    for chosen in itertools.product((False, True), repeat=len(phrases)):
        p = 1.0
        for is_chosen, c in zip(chosen, chance):
            p *= c if is_chosen else 1 - c
        for taken in (
            [chosen]
            if any(chosen)
            else [[i == j for j in range(len(phrases))] for i in range(len(phrases))]
        ):
            pattern = frozenset(
                x for phrase, taken_too in zip(phrases, taken) if taken_too for x in phrase
            )
            patterns[pattern] = patterns.get(pattern, 0.0) + p / (
                1 if any(chosen) else len(phrases)
            )
    return patterns


def drawn_patterns(phrases, probability, length=8, maskings=40000, pad_phrases=0):
    input_ids = torch.tensor([sentence(*range(FIRST, FIRST + length - 2))])
    member = torch.cat(
        (membership(length, *phrases), torch.zeros(pad_phrases, length, dtype=torch.bool))
    )
    _, labels = mask(input_ids, member[None], maskings, probability=probability)
    patterns, counts = (labels[0] >= 0).unique(dim=0, return_counts=True)
    return {
        frozenset(row.nonzero().flatten().tolist()): count / maskings
        for row, count in zip(patterns, counts.tolist())
    }


DISJOINT = [(1,), (2, 3), (4,), (5, 6)]
OVERLAPPING = [
    (1, 2, 3),
    (3,),
    (3, 4),
    (5, 6),
]  # word 3 lies in three phrases, and one of them is only it


def check_patterns(phrases, probability, **options):
    expected, drawn = (
        exact_patterns(phrases, probability),
        drawn_patterns(phrases, probability, **options),
    )
    assert drawn.keys() <= expected.keys(), "a pattern that is no union of phrases"
    for pattern, p in expected.items():
        assert drawn.get(pattern, 0.0) == pytest.approx(p, abs=0.01), set(pattern)


@pytest.mark.parametrize(
    "phrases, probability",
    [
        (DISJOINT, 0.15),
        (DISJOINT, 0.5),
        (DISJOINT, 0.001),
        (DISJOINT, 1.0),
        (OVERLAPPING, 0.9),
        ([(2, 3)], 0.15),
    ],
)
def test_whole_phrases_are_masked_with_the_probability_of_the_method(phrases, probability):
    """The frequency of every pattern of masked words agrees with its exact probability."""
    check_patterns(phrases, probability)


def test_a_phrase_drawn_for_want_of_another_is_drawn_uniformly():
    """Also where the phrases' own probabilities differ (if nothing was chosen, one random phrase
    is)."""
    check_patterns(OVERLAPPING, 0.5)


def test_four_disjoint_phrases_are_each_masked_with_probability_28_percent():
    drawn = drawn_patterns(
        DISJOINT, 0.15, pad_phrases=3
    )  # rows of the membership that hold no phrase do not count
    for phrase in DISJOINT:
        share = sum(p for pattern, p in drawn.items() if set(phrase) <= pattern)
        assert share == pytest.approx(0.15 + 0.85**4 / 4, abs=0.01)


def test_every_masking_masks_something_and_phrases_stay_whole():
    input_ids = torch.tensor([sentence(*range(5, 11)), sentence(*range(11, 15), length=8)])
    member = torch.stack((membership(8, *DISJOINT), membership(8, (1, 2), (4,), (), ())))
    _, labels = mask(input_ids, member, 500)
    masked = labels >= 0
    assert masked.any(2).all()
    assert torch.equal(masked[0, :, 2], masked[0, :, 3]) and torch.equal(
        masked[0, :, 5], masked[0, :, 6]
    )
    assert torch.equal(masked[1, :, 1], masked[1, :, 2])
    assert not masked[1, :, 3].any(), "a word in no phrase was masked"


@pytest.mark.parametrize("without", ["None", "no rows", "empty rows"])
def test_without_phrases_every_word_is_its_own(without):
    ids = torch.tensor([sentence(5, 6, 7, length=7), sentence(8, 9, 10, 11, 12)])
    empty = torch.zeros(2, 3, 7, dtype=torch.bool)
    _, labels = mask(
        ids, {"None": None, "no rows": empty[:, :0], "empty rows": empty}[without], 20000
    )
    for row, words in ((0, 3), (1, 5)):
        share = (labels[row] >= 0).float().mean(0)
        expected = 0.15 + 0.85**words / words
        assert share.tolist() == pytest.approx(
            [expected if 0 < j <= words else 0.0 for j in range(7)], abs=0.015
        )


def test_a_caption_without_phrases_beside_one_with():
    """The one is masked word by word, the other only where its phrase is."""
    ids = torch.tensor([sentence(5, 6, 7), sentence(8, 9, 10)])
    _, labels = mask(ids, torch.stack((membership(5, (1, 2)), membership(5, ()))), 300)
    assert (labels >= 0).any(1).tolist() == [
        [False, True, True, False, False],
        [False, True, True, True, False],
    ]


def test_masked_words_become_80_percent_mask_10_percent_random_10_percent_kept():
    ids = torch.tensor([sentence(*range(5, 15))])
    masked, labels = mask(ids, None, 20000)
    at = labels >= 0
    shown, original = masked[at], labels[at]
    random = (shown != MASK) & (shown != original)
    n = END - FIRST
    shares = [
        (shown == MASK).float().mean(),
        random.float().mean(),
        (shown == original).float().mean(),
    ]
    assert [share.item() for share in shares] == pytest.approx(
        [0.8, 0.1 * (n - 1) / n, 0.1 + 0.1 / n], abs=0.01
    )
    assert set(shown[random].tolist()) == set(range(FIRST, END)), (
        "random words are all ordinary words and nothing else"
    )


def test_labels_hold_the_original_word_where_something_was_masked():
    ids = torch.tensor([sentence(5, 6, 7, 8, length=8), sentence(9, 10, 11, 12, 13, 14)])
    masked, labels = mask(ids, None, 200)
    assert masked.shape == labels.shape == (2, 200, 8)
    original = ids[:, None].expand_as(labels)
    assert (
        torch.equal(labels[labels >= 0], original[labels >= 0]) and (labels[labels < 0] == -1).all()
    )
    assert torch.equal(masked[labels < 0], original[labels < 0])


def test_special_tokens_padding_and_unknown_words_are_never_masked():
    """Not even when a phrase claims them, nor as single words, nor by the fallback; ids at or above
    the end neither."""
    ids = torch.tensor([sentence(5, UNK, 6, MASK, END, length=9)])
    everything = torch.ones(1, 2, 9, dtype=torch.bool)
    for phrases in (None, everything, membership(9, (1, 2), (0,), (4,), (5, 7, 8))[None]):
        _, labels = mask(ids, phrases, 500)
        assert set((labels >= 0).any(1)[0].nonzero().flatten().tolist()) <= {1, 3}


def test_a_phrase_of_specials_alone_is_no_phrase():
    """It neither draws the fallback, which would then mask nothing, nor halves the chance of
    another."""
    ids = torch.tensor([sentence(5, UNK, 6)])
    _, labels = mask(ids, membership(5, (0,), (2,), (3,))[None], 500)
    assert (labels[0, :, 3] == 6).all()


def test_a_caption_without_ordinary_words_comes_back_unmasked():
    ids = torch.tensor([sentence(UNK, UNK), sentence(length=4)])
    for phrases in (None, torch.ones(2, 1, 4, dtype=torch.bool)):
        masked, labels = mask(ids, phrases, 50)
        assert torch.equal(masked, ids[:, None].expand(2, 50, 4)) and (labels == -1).all()


def test_masks_come_from_the_generator_and_nothing_else():
    ids = torch.tensor([sentence(*range(5, 15))])
    state = torch.get_rng_state()
    first, again, other = (mask(ids, None, 20, seed=seed) for seed in (7, 7, 8))
    assert torch.equal(state, torch.get_rng_state()), "the global generator was used"
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[1], other[1])


# ---- refill


def flat_fill(ids, image, places):
    """A `fill` that finds every word as likely as any other."""
    return torch.zeros(len(places), END)


def constant_fill(logits):
    """A `fill` that finds the same words likely everywhere: (V,) -> callable."""
    return lambda ids, image, places: logits.expand(len(places), -1)


def refill(fill, masked, labels, seed=0, words=WORDS, **options):
    return generate.refill_masks(fill, masked, labels, words, generator=seeded(seed), **options)


def one_blank(count=1):
    ids = torch.tensor([sentence(5, MASK, 7)]).expand(count, 1, -1)
    return ids, torch.where(ids == MASK, 6, -1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_words_are_drawn_from_the_softmax_at_the_temperature(temperature):
    """Restricted to the vocabulary range: the [MASK] or [UNK] that the model finds most likely is
    never drawn."""
    logits = torch.randn(END + 3, generator=seeded(1))
    logits[:FIRST], logits[END:] = 50.0, 50.0
    candidates = refill(constant_fill(logits), *one_blank(), refills=40000, temperature=temperature)
    drawn = torch.bincount(candidates[0, :, 2], minlength=END + 3) / 40000
    expected = torch.zeros(END + 3)
    expected[FIRST:END] = (logits[FIRST:END] / temperature).exp() / (
        logits[FIRST:END] / temperature
    ).exp().sum()
    assert drawn.tolist() == pytest.approx(expected.tolist(), abs=0.01)


def test_higher_temperature_draws_more_different_words():
    logits = torch.zeros(END)
    logits[9] = 4.0
    drawn = [
        refill(constant_fill(logits), *one_blank(), refills=4000, temperature=t)[0, :, 2]
        for t in (0.3, 1, 2, 50)
    ]
    shares = [(words == 9).float().mean().item() for words in drawn]
    assert shares == sorted(shares, reverse=True) and shares[0] > 0.99 and shares[3] < 0.1


def test_the_default_temperature_is_the_releases():
    assert inspect.signature(generate.refill_masks).parameters["temperature"].default == 1.5


def test_impossible_words_are_never_drawn():
    logits = torch.full((END,), float("-inf"))
    logits[[9, 13]] = 0.0
    assert set(refill(constant_fill(logits), *one_blank(), refills=2000)[0, :, 2].tolist()) == {
        9,
        13,
    }


def by_image_and_place(ids, image, places):
    """A `fill` that leaves no doubt: at position j of a sentence about image i, word 5 + (3 i + j)
    % 20."""
    word = FIRST + (3 * image[:, None] + torch.arange(ids.size(1))) % (END - FIRST)
    return 1e4 * torch.nn.functional.one_hot(word, END).float().flatten(0, 1)[places]


@pytest.mark.parametrize("chunk_size, refills", [(1, 3), (4, 3), (1000, 3), (1000, 1)])
def test_only_masked_positions_are_refilled_and_each_for_its_own_image(chunk_size, refills):
    """Also where the 80/10/10 rule showed a random word or kept the original; the refills of
    masking 0 come first."""
    ids = torch.tensor(
        [sentence(5, 6, 7, 8, length=8), sentence(9, 10, 11, 12, 13, 14), sentence(15, length=8)]
    )
    masked, labels = mask(ids, None, 5)
    before = masked.clone()
    candidates = refill(by_image_and_place, masked, labels, refills=refills, chunk_size=chunk_size)
    expected = ids[:, None].expand(3, 5, 8).clone()
    for i, m, j in (labels >= 0).nonzero().tolist():
        expected[i, m, j] = FIRST + (3 * i + j) % (END - FIRST)
    assert torch.equal(candidates, expected.repeat_interleave(refills, dim=1))
    assert torch.equal(masked, before), (
        "the masked captions were written over; the MLM loss needs them"
    )


def test_fill_sees_the_masked_sentences():
    ids = torch.tensor([sentence(5, 6, 7, 8), sentence(9, 10, 11, 12)])
    masked, labels = mask(ids, None, 3)
    asked = []

    def fill(sentences, image, places):
        asked.append((sentences.clone(), image.clone(), places.clone()))
        return torch.zeros(len(places), END)

    refill(fill, masked, labels, refills=4, chunk_size=4)
    assert max(len(sentences) for sentences, _, _ in asked) <= 4
    assert torch.equal(torch.cat([sentences for sentences, _, _ in asked]), masked.flatten(0, 1))
    assert torch.cat([image for _, image, _ in asked]).tolist() == [0, 0, 0, 1, 1, 1]
    for chunk, (_, _, places) in zip(labels.flatten(0, 1).split(4), asked):
        assert places.tolist() == [i for i, label in enumerate(chunk.flatten()) if label >= 0]


def test_blanks_are_filled_independently_of_each_other():
    ids = torch.tensor([[sentence(MASK, MASK, MASK)]])
    words = refill(flat_fill, ids, torch.where(ids == MASK, 6, -1), refills=20000)[0, :, 1:4]
    first, second, third = words.unbind(1)
    for one, other in ((first, second), (second, third), (first, third), (words[1:], words[:-1])):
        assert (one == other).float().mean().item() == pytest.approx(1 / (END - FIRST), abs=0.01)


def test_nothing_masked_nothing_refilled():
    ids = torch.tensor([[sentence(UNK, UNK)]])
    assert torch.equal(
        refill(flat_fill, ids, torch.full_like(ids, -1), refills=3), ids.expand(1, 3, -1)
    )


def test_refills_come_from_the_generator_and_nothing_else():
    masked, labels = mask(torch.tensor([sentence(*range(5, 11))]), None, 20)
    state = torch.get_rng_state()
    first, again, other = (
        refill(flat_fill, masked, labels, refills=4, seed=seed) for seed in (7, 7, 8)
    )
    assert torch.equal(state, torch.get_rng_state()), "the global generator was used"
    assert torch.equal(first, again) and not torch.equal(first, other)


# ---- filter


def brute_force_valid(candidates, positives):
    """Row by row, sentence by sentence, with Python's lists and sets."""

    def words(ids):
        while ids and ids[-1] == PAD:
            ids = ids[:-1]
        return tuple(ids)

    valid = []
    for row, own in zip(candidates.tolist(), positives.tolist()):
        seen = {words(caption) for caption in own}
        for candidate in row:
            valid.append(words(candidate) not in seen)
            seen.add(words(candidate))
    return torch.tensor(valid, dtype=torch.bool).view(candidates.shape[:2])


def random_sentences(rows, count, longest, width, words, rng):
    """Sentences over so few words that many are equal."""
    ids = torch.randint(FIRST, FIRST + words, (rows, count, width), generator=rng)
    lengths = torch.randint(1, longest + 1, (rows, count, 1), generator=rng)
    return torch.where(torch.arange(width) < lengths, ids, PAD)


def usable(candidates, captions, pad_id=PAD):
    """usable_candidates of sentences that were made from one that they never equal."""
    made_from = torch.full_like(candidates[:, 0], 99)
    return generate.usable_candidates(candidates, made_from, captions, pad_id)


def test_a_candidate_that_equals_the_caption_it_was_made_from_is_not_usable():
    """Even where the given captions forget it."""
    candidates = torch.tensor([[sentence(5, 6), sentence(5, 7)], [sentence(5, 6), sentence(8, 9)]])
    made_from = torch.tensor([sentence(5, 6), sentence(8, 9)])
    others = torch.tensor([[sentence(10, 11)], [sentence(10, 11)]])
    found = generate.usable_candidates(candidates, made_from, others, PAD)
    assert found.tolist() == [[False, True], [True, False]]
    made = tailor(own=OTHERS[:, None])
    equal = (made.sentences == CAPTIONS[:, None]).all(2)
    assert made.valid.any(1).all() and not (equal & made.valid).any()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("widths", [(4, 4), (3, 6), (6, 3)])
def test_filter_is_exact(seed, widths):
    """Own captions and duplicates go, the first of equal ones stays, whatever the widths. The
    release's stage 2 stops here with a shape error, its stage 1 compares with the anchor caption
    alone."""
    rng = seeded(seed)
    candidates = random_sentences(5, 60, 3, widths[0], 3, rng)
    positives = random_sentences(5, 4, min(4, widths[1]), widths[1], 3, rng)
    positives[1, 2:] = PAD  # an image with fewer captions
    before = candidates.clone(), positives.clone()
    valid = usable(candidates, positives)
    assert torch.equal(valid, brute_force_valid(candidates, positives))
    assert valid.any() and not valid.all()
    assert torch.equal(candidates, before[0]) and torch.equal(positives, before[1])


def test_filter_compares_sentences_within_a_row_only():
    same = torch.tensor([[sentence(5, 6)], [sentence(5, 6)]])
    own = torch.tensor([[sentence(7, 8)], [sentence(5, 6)]])
    assert usable(same, own).tolist() == [[True], [False]]


def test_filter_keeps_what_merely_resembles_a_caption():
    """One word more, one less, one changed, two exchanged: all are negatives. So is the start of a
    longer caption."""
    own = torch.tensor([[sentence(5, 6, 7, length=7)]])
    near = torch.tensor(
        [
            [
                sentence(5, 6, length=6),
                sentence(5, 6, 7, 7)[:6],
                sentence(5, 6, 8, length=6),
                sentence(6, 5, 7, length=6),
                sentence(5, 6, 7, length=6),
            ]
        ]
    )
    assert usable(near, own).tolist() == [[True, True, True, True, False]]
    assert usable(torch.tensor([[[CLS, 5, 6]]]), own).tolist() == [[True]]


@pytest.mark.parametrize("seed", range(3))
def test_equals_a_caption_finds_exactly_the_equal_captions(seed):
    rng = seeded(seed)
    sentences, positives = (
        random_sentences(3, 20, 3, 3, 2, rng),
        random_sentences(3, 3, 3, 5, 2, rng),
    )
    expected = [
        [any(s[:3] == p[:3] and not any(p[3:]) for p in own) for s in row]
        for row, own in zip(sentences.tolist(), positives.tolist())
    ]
    assert generate.equals_a_caption(sentences, positives, PAD).tolist() == expected


def test_another_padding_id_works_too():
    candidates, positives = (
        torch.tensor([[[5, 6, 9], [5, 6, 0]]]),
        torch.tensor([[[5, 6, 9, 9, 9]]]),
    )
    assert usable(candidates, positives, pad_id=9).tolist() == [[False, True]]


# ---- select


@pytest.mark.parametrize("h", [1, 5, 12])
def test_the_hardest_usable_candidates_are_selected(h):
    rng = seeded(3)
    scores, valid = torch.rand(6, 12, generator=rng), torch.rand(6, 12, generator=rng) < 0.5
    valid[0], valid[1] = True, False
    before = scores.clone(), valid.clone()
    index, kept = generate.select_hardest(scores, valid, h)
    for row in range(6):
        best = sorted(
            valid[row].nonzero().flatten().tolist(), key=lambda i: -scores[row, i].item()
        )[:h]
        assert kept[row].tolist() == [True] * len(best) + [False] * (h - len(best))
        assert index[row, : len(best)].tolist() == best
    assert torch.equal(scores, before[0]) and torch.equal(valid, before[1])


def test_unusable_candidates_lose_whatever_their_score():
    """Fault of the release: penalties of 2 and 3 were taken off unbounded logits, so true captions
    could be kept."""
    scores, valid = (
        torch.tensor([[1e30, -1e30, 5.0, float("inf")]]),
        torch.tensor([[False, True, True, False]]),
    )
    index, kept = generate.select_hardest(scores, valid, 3)
    assert index[0, :2].tolist() == [2, 1] and kept.tolist() == [[True, True, False]]


def test_more_than_there_are_cannot_be_selected():
    with pytest.raises(RuntimeError, match="out of range"):
        generate.select_hardest(torch.zeros(2, 12), torch.ones(2, 12, dtype=torch.bool), 13)


# ---- all together

CAPTIONS = torch.tensor(
    [sentence(5, 6, 7, 8, length=8), sentence(9, 10, 11, 12, 13, 14), sentence(15, 16, length=8)]
)
OTHERS = torch.tensor(
    [sentence(5, 6, 7, 9, length=8), sentence(9, 10, length=8), sentence(15, 17, length=8)]
)
OWN = torch.stack((CAPTIONS, OTHERS), 1)
PHRASES = torch.stack(
    (
        membership(8, (1, 2), (3,), (4,)),
        membership(8, (1,), (2, 3), (5, 6)),
        membership(8, (1,), (2,), ()),
    )
)


def mock_match(ids, image):
    """Some score that depends on the words, their places and the image; without ties in
    practice."""
    weights = torch.rand(ids.size(1), generator=seeded(), dtype=torch.float64)
    return torch.sin(ids.double() @ weights * 7 + image)


def tailor(
    fill=flat_fill,
    match=mock_match,
    ids=CAPTIONS,
    phrases=PHRASES,
    own=OWN,
    seed=0,
    words=WORDS,
    **options,
):
    options = {"maskings": 6, "refills": 5, "hard": 8, **options}
    return generate.tailor_negatives(
        fill,
        match,
        ids,
        own,
        phrases=phrases,
        pad_id=PAD,
        mask_id=MASK,
        vocabulary_range=words,
        generator=seeded(seed),
        **options,
    )


def check_invariants(made, ids, own, phrases):
    """What the docstring promises of every output."""
    assert (
        made.valid.dtype == torch.bool and made.sentences.dtype == made.labels.dtype == torch.long
    )
    for i in range(len(ids)):
        kept = [tuple(s) for s in made.sentences[i][made.valid[i]].tolist()]
        assert len(set(kept)) == len(kept), "a negative is repeated"
        assert not set(kept) & {tuple(s) for s in own[i].tolist()}, "a true caption is kept"
        changeable = phrases[i].any(0) & (ids[i] >= FIRST)
        unchanged = made.sentences[i][made.valid[i]] == ids[i]
        assert unchanged[:, ~changeable].all(), "a word in no phrase, or a special token, changed"
    new = (made.sentences != ids[:, None]) & made.valid[..., None]
    assert ((made.sentences[new] >= FIRST) & (made.sentences[new] < END)).all(), (
        "a special token was written"
    )
    assert torch.equal(made.labels, torch.where(new, ids[:, None], -1)), (
        "labels are the original word where it differs"
    )
    unused = ids[:, None].expand_as(made.sentences)[~made.valid]
    assert torch.equal(made.sentences[~made.valid], unused), "a row that ran out holds the caption"
    assert (made.valid[:, 1:] <= made.valid[:, :-1]).all()


@pytest.mark.parametrize("seed", range(5))
def test_what_tailor_negatives_promises(seed):
    made = tailor(seed=seed)
    assert made.sentences.shape == made.labels.shape == (3, 8, 8) and made.valid.shape == (3, 8)
    check_invariants(made, CAPTIONS, OWN, PHRASES)
    scores = mock_match(made.sentences.flatten(0, 1), torch.arange(3).repeat_interleave(8)).view(
        3, 8
    )
    assert (scores[:, 1:] <= scores[:, :-1])[made.valid[:, 1:]].all(), "not the hardest first"


@pytest.mark.parametrize("seed", range(3))
def test_tailor_negatives_keeps_what_a_plain_loop_keeps(seed):
    """The same candidates, filtered by brute force and sorted by score."""
    rng = seeded(seed)
    masked, labels = generate.mask_phrases(CAPTIONS, PHRASES, MASK, WORDS, 6, generator=rng)
    candidates = generate.refill_masks(flat_fill, masked, labels, WORDS, 5, generator=rng)
    usable, made = brute_force_valid(candidates, OWN), tailor(seed=seed)
    for i in range(3):
        left = candidates[i][usable[i]]
        expected = left[mock_match(left, torch.full((len(left),), i)).argsort(descending=True)][
            :8
        ].tolist()
        assert made.sentences[i][made.valid[i]].tolist() == expected


def test_the_seed_decides_everything():
    state = torch.get_rng_state()
    first, again, other = (tailor(seed=seed) for seed in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state()), "the global generator was used"
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not torch.equal(first.sentences, other.sentences)


def test_given_masks_are_used():
    """So that the MLM loss is trained on the very same masked captions."""
    masked, labels = mask(CAPTIONS, membership(8, (2,))[None].expand(3, 1, 8), 4)
    made = tailor(masks=(masked, labels), phrases=None, hard=6)
    assert made.valid.any()
    assert set((made.labels >= 0).nonzero()[:, 2].tolist()) == {2}


@pytest.mark.parametrize("chunk_size", [1, 7, 10000])
def test_chunks_do_not_matter(chunk_size):
    whole = tailor(fill=by_image_and_place)
    assert all(
        torch.equal(a, b)
        for a, b in zip(whole, tailor(fill=by_image_and_place, chunk_size=chunk_size))
    )


def test_each_pair_is_made_as_if_alone():
    """A batch of three equals three of one, when the masks are given and the refills leave nothing
    to chance."""
    masked, labels = mask(CAPTIONS, PHRASES, 6)

    def alone(i):
        def fill(ids, image, places):
            return by_image_and_place(ids, image + i, places)

        def match(ids, image):
            return mock_match(ids, image + i)

        one = slice(i, i + 1)
        return tailor(
            fill, match, CAPTIONS[one], None, OWN[one], masks=(masked[one], labels[one]), hard=4
        )

    together = tailor(by_image_and_place, masks=(masked, labels), phrases=None, hard=4)
    for part, parts in zip(together, zip(*(alone(i) for i in range(3)))):
        assert torch.equal(part, torch.cat(parts))


def test_true_captions_are_never_kept_however_well_they_match():
    """Fault of the release: penalties instead of a mask, and the image's other captions not
    excluded at all."""

    def match(ids, image):
        return torch.where(
            generate.equals_a_caption(ids[:, None], OWN[image], PAD)[:, 0], 1e9, -1e9
        )

    for seed in range(5):
        made = tailor(match=match, seed=seed, words=(5, 19), refills=20, hard=40)
        assert made.valid.any(1).all()
        check_invariants(made, CAPTIONS, OWN, PHRASES)


def test_dropped_candidates_are_not_scored():
    scored = []

    def match(ids, image):
        scored.extend(zip(image.tolist(), map(tuple, ids.tolist())))
        return mock_match(ids, image)

    tailor(match=match, words=(5, 19), refills=20)
    assert len(set(scored)) == len(scored)
    assert not {(i, tuple(caption)) for i in range(3) for caption in OWN[i].tolist()} & set(scored)


def test_the_callables_run_without_gradient():
    weight, seen = torch.ones((), requires_grad=True), []

    def watched(function):
        def call(*arguments):
            seen.append(torch.is_grad_enabled())
            return weight * function(*arguments)

        return call

    made = tailor(watched(flat_fill), watched(mock_match))
    assert seen and not any(seen)
    assert not any(tensor.requires_grad for tensor in made)
    assert torch.is_grad_enabled()


def test_a_word_refilled_by_itself_is_not_labelled():
    """Fault of the release: a word kept by the 80/10/10 rule, or refilled by itself, still counted
    as replaced."""

    def fill(ids, image, places):  # writes the caption's own words back, but for place 2
        logits = 1e4 * torch.nn.functional.one_hot(CAPTIONS[image], END).float()
        logits[:, 2] = 0.0
        return logits.flatten(0, 1)[places]

    made = tailor(fill, phrases=membership(8, (1, 2, 3, 4))[None].expand(3, 1, 8))
    assert made.valid.any(1).all()
    assert set((made.labels >= 0).nonzero()[:, 2].tolist()) == {2}
    check_invariants(made, CAPTIONS, OWN, membership(8, (1, 2, 3, 4))[None].expand(3, 1, 8))


# ---- few candidates, and none


def test_fewer_than_h_left():
    """Four words, one blank: of four sentences two are true, so two negatives are left of the eight
    asked for."""
    ids, own = torch.tensor([sentence(5)]), torch.tensor([[sentence(5), sentence(7)]])
    made = tailor(ids=ids, phrases=None, own=own, words=(5, 9), maskings=8, refills=16)
    assert made.valid.tolist() == [[True] * 2 + [False] * 6]
    assert sorted(made.sentences[0, :2, 1].tolist()) == [6, 8]
    assert (made.sentences[0, 2:] == ids).all() and (made.labels[0, 2:] == -1).all()


def hopeless():
    """Pair 0 has nothing but true refills, pair 1 no ordinary word, pair 2 has negatives."""
    ids = torch.tensor([sentence(5), sentence(UNK), sentence(6)])
    own = torch.tensor([[sentence(w) for w in (5, 6, 7)], [sentence(UNK)] * 3, [sentence(6)] * 3])
    return ids, own


def small_model():
    torch.manual_seed(0)
    model = TagsDC(
        Config(END, feature_size=6, hidden=16, layers=2, heads=2, intermediate=24, dropout=0.5)
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model, torch.randn(3, 4, 6), torch.rand(3, 4, 7)


def callables(model, features, boxes):
    def encode(ids, image):
        regions = torch.ones(len(ids), features.size(1), dtype=torch.bool)
        return model(ids, features[image], boxes[image], ids != PAD, regions)

    def fill(ids, image, places):
        return model.fill(encode(ids, image)[:, : ids.size(1)].flatten(0, 1)[places])

    def match(ids, image):
        return model.match(encode(ids, image))

    return fill, match


@pytest.mark.parametrize("rows", [[0, 1, 2], [0, 1], [1]])
def test_a_pair_without_negatives_gives_no_loss_no_gradient_and_no_nan(rows):
    """From the generator through the model into all four terms; also when no pair of the batch has
    any."""
    ids, own = (x[rows] for x in hopeless())
    model, features, boxes = small_model()
    features, boxes = features[rows], boxes[rows]
    made = tailor(
        *callables(model, features, boxes),
        ids,
        None,
        own,
        words=(5, 8),
        maskings=3,
        refills=3,
        hard=3,
    )
    assert made.valid.any(1).tolist() == [row == 2 for row in rows]

    flat, image = made.sentences.flatten(0, 1), torch.arange(len(rows)).repeat_interleave(3)
    regions = torch.ones(len(rows), 4, dtype=torch.bool)
    hidden = model(flat, features[image], boxes[image], flat != PAD, regions[image])
    words, labels = hidden[:, :3], made.labels.flatten(0, 1)
    used = (flat != PAD) & made.valid.flatten()[:, None]
    positive = model.match(model(ids, features, boxes, ids != PAD, regions)).sigmoid()
    terms = [
        losses.triplet_loss(
            positive, model.match(hidden).sigmoid().view(len(rows), 3), valid=made.valid
        ),
        losses.masked_lm_loss(model.fill(words), labels),
        losses.word_correction_loss(model.correct(words), labels),
        losses.word_discrimination_loss(model.discriminate(words), labels >= 0, used),
    ]
    positive.retain_grad()
    sum(terms).backward()
    assert all(term.isfinite() for term in terms)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert [g.item() != 0 for g in positive.grad] == [row == 2 for row in rows]
    if 2 not in rows:
        assert sum(terms).item() == 0.0 and not any(
            p.grad.any() for p in model.parameters() if p.grad is not None
        )


def test_more_negatives_than_candidates_are_refused():
    with pytest.raises(ValueError, match="hard 31 exceeds 6 maskings x 5 refills"):
        tailor(maskings=6, refills=5, hard=31)
    with pytest.raises(ValueError, match="hard 9 exceeds 4 maskings x 2 refills"):
        tailor(masks=mask(CAPTIONS, PHRASES, 4), refills=2, hard=9)


def test_captions_of_another_shape_are_refused():
    for own in (CAPTIONS, OWN[:2], OWN[:, :, :, None]):
        with pytest.raises(ValueError, match=r"captions must be \(B, C, T'\) = \(3, C, T'\)"):
            tailor(own=own)


def test_a_mask_id_among_the_words_is_refused():
    """It would be written like a word, and masked."""
    for call in (lambda: mask(CAPTIONS, PHRASES, words=(4, 25)), lambda: tailor(words=(1, 25))):
        with pytest.raises(ValueError, match="mask_id 4 lies in vocabulary_range"):
            call()


def test_a_padding_id_among_the_words_is_refused():
    with pytest.raises(ValueError, match="pad_id 0 lies in vocabulary_range"):
        tailor(words=(0, 3))


def test_masks_of_another_shape_are_refused():
    masked, labels = mask(CAPTIONS, PHRASES, 4)
    for masks in ((masked[:2], labels[:2]), (masked, labels[:, :3]), (masked[0], labels[0])):
        with pytest.raises(ValueError, match=r"masks must be two of \(B, M, T\) = \(3, M, 8\)"):
            tailor(masks=masks)
    with pytest.raises(ValueError, match=r"input_ids must be \(B, T\)"):
        tailor(ids=CAPTIONS[0])


def test_a_word_gives_way_to_a_word_and_a_piece_to_a_piece():
    allowed = torch.zeros(END, dtype=torch.bool)
    allowed[FIRST::2] = True
    made = tailor(allowed=allowed, maskings=20, refills=20, hard=60)
    replaced = made.labels >= 0
    assert replaced.any(-1)[made.valid].all()
    written = made.sentences[replaced]
    assert torch.equal(allowed[written], allowed[made.labels[replaced]])
    assert allowed[written].any() and not allowed[written].all()


@pytest.mark.parametrize("elsewhere", [False, True])
def test_what_is_likely_true_is_judged_among_the_words_allowed(elsewhere):
    """Word 6 has 9% of all words and a half of those that are allowed beside the original."""
    logits = torch.zeros(END)
    logits[[7, 8, 9]] = 3.0
    allowed = torch.zeros(END, dtype=torch.bool)
    allowed[[5, 6]] = True
    captions = torch.tensor([sentence(5, length=4)] * 2)
    masked, labels = mask(captions, None, 1)
    made = generate.refill_masks(
        lambda ids, images, places: logits.expand(len(places), -1),
        masked,
        labels,
        WORDS,
        refills=50,
        truth_threshold=0.3,
        writer_images=torch.tensor([[1], [0]]) if elsewhere else None,
        allowed=allowed,
        generator=seeded(),
    )
    assert set(made[:, :, 1].flatten().tolist()) == {5}


def test_phrase_masks_take_what_the_parser_returns():
    words = "two dogs running on grass".split()
    phrases = generate.parse_phrases(words)
    expected = generate.phrase_masks([[0], [1], [2, 3], [4]], [-1, 0, 1, 2, 3, 4, -1])
    assert torch.equal(generate.phrase_masks(phrases, [-1, 0, 1, 2, 3, 4, -1]), expected)


def test_ids_and_phrases_of_another_dtype_are_refused():
    with pytest.raises(ValueError, match="32 or 64 bits, got torch.uint8"):
        tailor(ids=CAPTIONS.byte())
    with pytest.raises(ValueError, match="torch.bool, got torch.float32"):
        tailor(phrases=PHRASES.float())


def test_padding_must_be_told():
    with pytest.raises(TypeError, match="pad_id"):
        generate.tailor_negatives(
            flat_fill, mock_match, CAPTIONS, OWN, mask_id=MASK, vocabulary_range=WORDS
        )


# ---- with the real model


def test_the_model_writes_its_own_negatives():
    """In eval mode, in spite of a dropout of one half, the same seed writes the same sentences; the
    image has a say."""
    model, features, boxes = small_model()
    first, again = (tailor(*callables(model, features, boxes), seed=3, refills=8) for _ in range(2))
    check_invariants(first, CAPTIONS, OWN, PHRASES)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert first.valid.all() and not model.training
    other = tailor(*callables(model, features.flip(0), boxes), seed=3, refills=8)
    assert not torch.equal(first.sentences, other.sentences)


def test_special_tokens_are_never_sampled_however_likely():
    """Fault of the release: the model that thinks of nothing but [SEP] and [MASK] still writes
    words."""
    write, match = callables(*small_model())

    def fill(ids, image, places):
        logits = write(ids, image, places)
        logits[:, :FIRST] += 100
        return logits

    made = tailor(fill, match, refills=8)
    assert made.valid.all()
    check_invariants(made, CAPTIONS, OWN, PHRASES)


# ---- the truth filter and the writer's picture


def test_words_that_the_writer_believes_in_are_not_written_but_the_original_may_stay():
    """Believed above the threshold: word 6 (0.6) and the original 5 (0.3), at both masked
    positions; 7, 8, 9 share the rest."""
    belief = torch.full((12,), 1e-6)
    belief[5:10] = torch.tensor([0.3, 0.6, 0.04, 0.03, 0.03])
    masked, labels = torch.tensor([[[2, 4, 4, 3]]]), torch.tensor([[[-1, 5, 5, -1]]])
    made = {}
    for threshold in (1.0, 0.1):
        options = dict(refills=2000, temperature=1.0, truth_threshold=threshold)
        made[threshold] = refill(
            constant_fill(belief.log()), masked, labels, words=(5, 12), **options
        )
    assert (made[1.0][..., 1:3] == 6).float().mean() > 0.5
    words = made[0.1][..., 1:3]
    assert not (words == 6).any() and ((words == 5) ^ (words >= 7)).all()
    assert abs((words == 5).float().mean().item() - 0.3 / 0.4) < 0.03


def by_image(ids, image, places):
    """A `fill` that leaves no doubt: word 5 + i wherever it looks at image i."""
    logits = 1e4 * torch.nn.functional.one_hot(FIRST + image, END).float()  # (n, V)
    return logits[places // ids.size(1)]


def blanks(B, M):
    """B pairs, M maskings: one blank each, in which word 24 stood."""
    ids = torch.tensor(sentence(20, MASK, 21)).expand(B, M, -1)
    return ids, torch.where(ids == MASK, 24, -1)


@pytest.mark.parametrize("chunk_size", [1, 4, 1000])
def test_the_writer_looks_at_the_image_it_is_told(chunk_size):
    masked, labels = blanks(3, 2)
    writer_images = torch.tensor([[1, 2], [0, 2], [1, 0]])
    options = dict(refills=3, chunk_size=chunk_size)
    candidates = refill(by_image, masked, labels, writer_images=writer_images, **options)
    assert torch.equal(candidates[..., 2], FIRST + writer_images.repeat_interleave(3, 1))
    own = torch.arange(3)[:, None].expand(3, 2)
    told = refill(by_image, masked, labels, writer_images=own, **options)
    assert torch.equal(told, refill(by_image, masked, labels, **options)), "own is the default"


@pytest.mark.parametrize("chunk_size", [1, 4, 1000])
def test_the_truth_filter_asks_the_own_image(chunk_size):
    """The writer's image finds 5, 6, 7 equally likely; the own image i is sure of word 5 + i, which
    is never written, and the two others are."""
    asked = []

    def fill(ids, image, places):
        asked.append(image.tolist())
        if len(asked) % 2:  # the writer's turn
            logits = torch.full((len(places), END), -1e4)
            logits[:, FIRST : FIRST + 3] = 0.0
            return logits
        return by_image(ids, image, places)

    masked, labels = blanks(3, 2)
    writer_images = torch.tensor([[1, 2], [0, 2], [1, 0]])
    candidates = refill(
        fill,
        masked,
        labels,
        refills=200,
        truth_threshold=0.5,
        writer_images=writer_images,
        chunk_size=chunk_size,
    )
    written = [set(row.tolist()) for row in candidates[..., 2]]
    assert written == [{6, 7}, {5, 7}, {5, 6}]
    assert sum(asked[0::2], []) == [1, 2, 0, 2, 1, 0], "the writer's images"
    assert sum(asked[1::2], []) == [0, 0, 1, 1, 2, 2], "then the own ones"


def test_the_truth_filter_lets_the_original_return_when_the_writer_looks_elsewhere():
    """The own image is sure of the original word; the writer would write it half of the time."""
    masked, labels = blanks(2, 1)
    logits = torch.full((2, END), -1e4)
    logits[:, [9, 24]] = 0.0  # of the writer's image

    def fill(ids, image, places):
        own = image.tolist() == [0, 1]
        return torch.where(torch.tensor(own), 1e4 * (torch.arange(END) == 24), logits)

    options = dict(refills=400, truth_threshold=0.5, writer_images=torch.tensor([[1], [0]]))
    words = refill(fill, masked, labels, **options)[..., 2]
    assert set(words.unique().tolist()) == {9, 24}
    assert (words == 24).float().mean().item() == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize(
    "threshold, elsewhere, calls",
    [(1.0, False, 1), (1.0, True, 1), (0.5, False, 1), (0.5, True, 2)],
)
def test_what_the_writer_costs(threshold, elsewhere, calls):
    """A pass over the maskings, and one more only if the filter has to ask another image."""
    asked = []

    def fill(ids, image, places):
        asked.append(len(ids))
        return torch.zeros(len(places), END)

    images = torch.tensor([[1, 2], [0, 2], [1, 0]]) if elsewhere else None
    refill(fill, *blanks(3, 2), refills=5, truth_threshold=threshold, writer_images=images)
    assert asked == [6] * calls


def test_the_judge_looks_at_the_own_image_whatever_the_writer_sees():
    """Written for pair i is the word of the other image; match says which image it is asked
    about."""
    judged = []

    def match(ids, image):
        judged.extend(zip(image.tolist(), ids[:, 2].tolist()))
        return torch.zeros(len(ids))

    captions = torch.tensor([sentence(20, 24, 21)]).expand(2, -1)
    options = dict(masks=blanks(2, 1), hard=1, writer_images=torch.tensor([[1], [0]]))
    made = tailor(by_image, match, captions, None, captions[:, None], **options)
    assert sorted(judged) == [(0, FIRST + 1), (1, FIRST)]
    assert made.sentences[:, 0, 2].tolist() == [FIRST + 1, FIRST] and made.valid.all()


def test_other_images_are_never_the_own_one_and_equally_likely():
    images = generate.other_images(4, 30000, seeded())
    assert images.shape == (4, 30000) and images.dtype == torch.long
    for pair in range(4):
        shares = torch.bincount(images[pair], minlength=4) / 30000
        expected = [0.0 if other == pair else 1 / 3 for other in range(4)]
        assert shares.tolist() == pytest.approx(expected, abs=0.01)
    assert torch.equal(images, generate.other_images(4, 30000, seeded()))


def test_in_a_batch_of_one_the_writer_has_its_own_image_alone():
    assert generate.other_images(1, 3, seeded()).tolist() == [[0, 0, 0]]
    one = slice(0, 1)
    images = generate.other_images(1, 6, seeded(1))
    made = tailor(ids=CAPTIONS[one], phrases=PHRASES[one], own=OWN[one], writer_images=images)
    check_invariants(made, CAPTIONS[one], OWN[one], PHRASES[one])
    assert made.valid.any()


# ---- arguments that cannot be meant


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan"), float("inf")])
def test_a_temperature_must_be_a_number_above_0(temperature):
    """With 0 every refill was the last word of the vocabulary."""
    with pytest.raises(ValueError, match="temperature"):
        tailor(temperature=temperature)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_allow_no_word_are_refused(value):
    """NaN anywhere in a row, an infinite one, or nothing but impossible words."""
    logits = torch.zeros(END)
    logits[FIRST + 3] = value
    if value == float("-inf"):
        logits[:] = value
    with pytest.raises(ValueError, match="fill gave NaN"):
        tailor(constant_fill(logits))


def test_a_truth_filter_that_gets_nan_from_the_own_image_is_refused():
    def fill(ids, image, places):
        return torch.full((len(places), END), float("nan") if image[0] == 0 else 0.0)

    images = torch.tensor([[1, 2], [2, 2], [1, 1]])
    refill(fill, *blanks(3, 2), writer_images=images)
    with pytest.raises(ValueError, match="fill gave NaN"):
        refill(fill, *blanks(3, 2), writer_images=images, truth_threshold=0.5)


def test_scores_that_are_no_number_are_refused():
    with pytest.raises(ValueError, match="match gave NaN"):
        tailor(match=lambda ids, image: torch.full((len(ids),), float("nan")))


@pytest.mark.parametrize("words", [(5, 5), (9, 5)])
def test_an_empty_vocabulary_is_refused(words):
    with pytest.raises(ValueError, match="holds no word"):
        mask(CAPTIONS, PHRASES, words=words)


@pytest.mark.parametrize("probability", [-0.1, 1.1, float("nan")])
def test_a_probability_lies_in_0_to_1(probability):
    with pytest.raises(ValueError, match="probability"):
        tailor(probability=probability)


@pytest.mark.parametrize("chunk_size", [0, -1])
def test_a_chunk_holds_a_sentence(chunk_size):
    with pytest.raises(ValueError, match="chunk_size"):
        tailor(chunk_size=chunk_size)


@pytest.mark.parametrize("shape", [(3, 8), (2, 3, 8), (3, 3, 7), (1, 3, 8)])
def test_phrases_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"phrases must be \(B, P, T\) = \(3, P, 8\)"):
        mask(CAPTIONS, torch.zeros(shape, dtype=torch.bool))


@pytest.mark.parametrize("shape", [(1, 5, END), (5, END), (1, END - 1), (END,)])
def test_logits_of_another_shape_are_refused(shape):
    """Of all positions, say, where those of the masked ones are asked for."""
    with pytest.raises(ValueError, match=r"fill must return \(1, V >= 25\)"):
        refill(lambda ids, image, places: torch.zeros(shape), *one_blank())


def test_ids_of_32_bits_work_and_stay_what_they_are():
    whole, half = tailor(), tailor(ids=CAPTIONS.int(), own=OWN.int())
    masked, labels = mask(CAPTIONS.int(), PHRASES, 4)
    candidates = refill(flat_fill, masked, labels, refills=2)
    for ids in (masked, labels, candidates, half.sentences, half.labels):
        assert ids.dtype == torch.int32
    assert all(torch.equal(a, b) for a, b in zip(whole, half))


# ---- on another device


def test_nothing_waits_for_a_device():
    """Tensors of the device "meta" have no numbers: to ask for one, as .item(), a boolean index or
    `nonzero` do and as would halt a GPU, is an error. The labels lie on the CPU."""
    masked, labels = mask(CAPTIONS, PHRASES, 4)
    asked = []

    def fill(ids, image, places):
        asked.append(len(places))
        return torch.zeros(len(places), END, device="meta")

    def match(ids, image):
        asked.append(len(ids))
        return torch.zeros(len(ids), device="meta")

    for refills in (1, 5):
        made = generate.tailor_negatives(
            fill,
            match,
            CAPTIONS.to("meta"),
            OWN.to("meta"),
            pad_id=PAD,
            mask_id=MASK,
            vocabulary_range=WORDS,
            refills=refills,
            hard=3,
            truth_threshold=0.5,
            writer_images=torch.zeros(3, 4, dtype=torch.long),
            masks=(masked.to("meta"), labels),
        )
        masked_words = int((labels >= 0).sum())
        assert asked == [masked_words, masked_words, 12 * refills], "all candidates are scored"
        assert made.sentences.device.type == "meta" and made.sentences.shape == (3, 3, 8)
        asked.clear()


def test_a_judge_without_usable_candidates_is_not_called():
    """An encoder may not like a batch of none."""
    ids = torch.tensor([sentence(5)])
    made = tailor(match=None, ids=ids, phrases=None, own=ids[:, None], words=(5, 6), hard=3)
    assert not made.valid.any()


# ---- phrases of a caption


@needs_real
def test_phrases_against_the_reference():
    kinds = ("any", "object", "attribute", "relation")
    hit, ours, theirs = ({kind: 0 for kind in kinds} for _ in range(3))
    for entry in json.loads((REAL / "phrases/phrases_reference.json").read_text()):
        parsed = generate.parse_phrases(entry["tokens"])
        got = {i: kind for kind, positions in parsed for i in positions}
        want = {i: phrase["type"] for phrase in entry["phrases"] for i in phrase["tokens"]}
        for kind in hit:
            a = {i for i in got if kind in ("any", got[i])}
            b = {i for i in want if kind in ("any", want[i])}
            hit[kind] += len(a & b)
            ours[kind] += len(a)
            theirs[kind] += len(b)
    for kind in hit:
        least = 0.95 if kind == "any" else 0.85
        assert hit[kind] / ours[kind] >= least and hit[kind] / theirs[kind] >= least, kind


@pytest.mark.parametrize(
    "caption, phrases",
    [
        (
            "A fire hydrant on a red curb",
            "object: fire hydrant, relation: on, attribute: red, object: curb",
        ),
        (
            "two dogs are standing in front of a t - shirt",
            "attribute: two, object: dogs, relation: standing in front of, object: t - shirt",
        ),
        (
            "A black dog is jumping over a fire hydrant",
            "attribute: black, object: dog, relation: jumping over, object: fire hydrant",
        ),
        (
            "a man with crossed arms",
            "object: man, relation: with, attribute: crossed, object: arms",
        ),
        ("a painting at a bus stop", "object: painting, relation: at, object: bus stop"),
        (
            "a running dog goes to eat",
            "attribute: running, object: dog, relation: goes, relation: to, relation: eat",
        ),
        (
            "a boy walks off to play near the young",
            "object: boy, relation: walks off, relation: to, relation: play near, object: young",
        ),
        ("dogs run in . cats", "object: dogs, relation: run in, object: cats"),
        ("a tool for cutting", "object: tool, relation: for, relation: cutting"),
        (
            "a slowly melting , beautiful 3 & cake",
            "relation: melting, attribute: beautiful, attribute: 3, object: cake",
        ),
        ("She is there .", ""),
        ("the man ' s dog isn ' t near it", "object: man, object: dog"),
        ("they ' re riding , we ' ll run", "relation: riding, relation: run"),
        ("a woman \u2019 s hat I ' m I ' d I ' ve", "object: woman, object: hat"),
        ("a man 's hat it 'll 've 'd 'm", "object: man, object: hat"),
        ("a t - shirt", "object: t - shirt"),
        ("a t shirt", "object: t shirt"),
        (
            "the lamp's kettle doesn't see it's can't won't",
            "object: lamp's kettle, relation: see",
        ),
        (
            "the dog s bowl isn t red , they re wet",
            "object: dog, object: bowl, attribute: red, attribute: wet",
        ),
        ("it does n't ca n ` t won \u2019 t doesnt 'em", ""),
        (
            "rock ' n ' roll at two o ' clock",
            "object: rock, object: roll, relation: at, object: two, object: clock",
        ),
        ("two dogs ' bowls", "attribute: two, object: dogs, object: bowls"),
        ("A dog - a cat", "object: dog, object: cat"),
        ("", ""),
        ("-", ""),
        ("- - -", ""),
        ("- dog", "object: dog"),
    ],
)
def test_phrases_of(caption, phrases):
    words = caption.split()
    parsed = generate.parse_phrases(words)
    got = [f"{kind}: {' '.join(words[i] for i in positions)}" for kind, positions in parsed]
    assert ", ".join(got) == phrases


@pytest.mark.parametrize(
    "touching, phrases",
    [
        ((False, False, False, False), [[0], [2, 3]]),  # dog - cat food
        ((False, True, False, False), [[0], [2, 3]]),
        ((False, False, True, False), [[0], [2, 3]]),
        ((False, True, True, False), [[0, 1, 2, 3]]),  # dog-cat food
        (None, [[0, 1, 2, 3]]),
    ],
)
def test_a_dash_joins_only_the_words_that_it_touches(touching, phrases):
    parsed = generate.parse_phrases("dog - cat food".split(), touching)
    assert [positions for _, positions in parsed] == phrases


@needs_real
def test_no_contraction_in_real_captions_is_a_phrase():
    """Of all COCO test captions with a quote; but a 't-ball' is a thing."""
    images = json.loads((REAL / "captions/coco_karpathy_test.json").read_text())
    texts = [caption for image in images for caption in image["caption"] if "'" in caption]
    assert len(texts) > 100
    contracted = ("s", "t", "re", "ll", "ve", "d", "m")
    for text in texts:
        words = [*split_words(text.lower()), ""]
        for _, positions in generate.parse_phrases(words[:-1]):
            for n in positions:
                if words[n - 1] == "'" and words[n + 1] != "-":
                    assert words[n] not in contracted, text


def test_phrase_masks_tell_which_tokens_belong_to_which_phrase():
    """[CLS] a fire hyd ##rant on cur ##b [SEP]; the last phrase is cut off."""
    word_of_token = [-1, 0, 1, 2, 2, 3, 4, 4, -1]
    found = generate.phrase_masks([[1, 2], [3], [4], [7]], word_of_token)
    rows = [row.nonzero().flatten().tolist() for row in found]
    assert found.dtype == torch.bool and found.shape == (3, 9)
    assert rows == [[2, 3, 4], [5], [6, 7]]
    assert torch.equal(
        found, generate.phrase_masks([[1, 2], [3], [4]], torch.tensor(word_of_token))
    )


def test_without_a_phrase_phrase_masks_has_a_row_for_each_word():
    for phrases in ([], [[5]]):
        found = generate.phrase_masks(phrases, [-1, 0, 0, 1, -1])
        assert found.tolist() == [
            [False, True, True, False, False],
            [False, False, False, True, False],
        ]
    assert generate.phrase_masks([], [-1, -1]).shape == (0, 2)


def test_phrase_masks_fit_mask_phrases():
    ids = torch.tensor([sentence(5, 6, 7, 8)])
    phrases = generate.phrase_masks([[0, 1], [3]], [-1, 0, 1, 2, 3, -1])[None]
    _, labels = mask(ids, phrases, 200)
    masked = {tuple(row.nonzero().flatten().tolist()) for row in labels[0] >= 0}
    assert masked == {(1, 2), (4,), (1, 2, 4)}


def test_phrases_are_disjoint_in_order_and_never_crash():
    rng = random.Random(0)
    odd = "- . , ' to in front of next the a red 7 n't dog dogs run running stop closed é ½ & xly"
    odd = odd.split()
    captions = [[rng.choice(odd) for _ in range(rng.randrange(12))] for _ in range(2000)]
    captions += [
        text.split() for text in ("to", "next to", "a red and", "hot dog -", "in the middle of")
    ]
    for words in captions:
        positions = [i for _, phrase in generate.parse_phrases(words) for i in phrase]
        assert positions == sorted(set(positions)) and set(positions) <= set(range(len(words)))


@needs_real
def test_phrases_of_strings_that_are_no_captions_do_not_crash():
    for entry in json.loads((REAL / "tokenizer/wordpiece_cased.json").read_text(encoding="utf-8")):
        generate.parse_phrases(entry["text"].split())


def test_wrong_shapes_of_writer_images_and_scores_are_told():
    ids = torch.tensor([[5, 6, 7], [6, 7, 8]])
    options = dict(pad_id=0, mask_id=4, vocabulary_range=(5, 9), maskings=3, refills=2, hard=1)

    def fill(ids, images, places):
        return torch.zeros(len(places), 9)

    def match(ids, images):
        return torch.zeros(len(ids))

    with pytest.raises(ValueError, match="writer_images must be"):
        wrong = torch.zeros(3, 2, dtype=torch.long)
        generate.tailor_negatives(fill, match, ids, ids[:, None], writer_images=wrong, **options)
    with pytest.raises(ValueError, match="match must return"):
        generate.tailor_negatives(fill, lambda *a: match(*a)[:, None], ids, ids[:, None], **options)
