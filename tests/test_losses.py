"""The terms of the objective against closed forms worked out by hand, the whole against loops."""

import math

import pytest
import torch
import torch.nn.functional as F

import losses


def leaf(values):
    return torch.tensor(values, requires_grad=True)


def approx(values, tolerance=1e-6):
    return pytest.approx(values, abs=tolerance)


# ---- triplet


def test_triplet_loss_and_its_gradient_by_hand():
    """Hinges 0.2 + n - p: row 0 has 0.3 and an inactive one, row 1 has 0.1 and 0.6; their mean is
    0.25."""
    positive, negatives = leaf([0.5, 0.7]), leaf([[0.6, 0.1], [0.6, 1.1]])
    loss = losses.triplet_loss(positive, negatives, 0.2)
    assert loss.shape == () and loss.item() == approx(0.25)
    loss.backward()
    assert negatives.grad.flatten().tolist() == approx([0.25, 0.0, 0.25, 0.25])
    assert positive.grad.tolist() == approx([-0.25, -0.5])


def test_triplet_loss_wants_the_positive_above_the_negative_by_the_margin():
    def loss(p, n, **options):
        return losses.triplet_loss(torch.tensor([p]), torch.tensor([[n]]), **options).item()

    assert loss(0.9, 0.1) == 0.0
    assert loss(0.1, 0.9) == approx(1.0)
    assert loss(0.5, 0.5) == approx(0.2), "the default margin is 0.2"
    assert loss(0.5, 0.5, margin=0.35) == approx(0.35)


def test_triplet_loss_averages_over_the_usable_negatives_of_the_whole_batch():
    """Two of three negatives of row 0, one of row 1: divided by 3, neither by 6 nor row by row."""
    valid = torch.tensor([[True, True, False], [False, False, True]])
    negatives = leaf([[0.5, 0.6, 0.9], [0.9, 0.9, 0.8]])
    positive = leaf([0.5, 0.5])
    loss = losses.triplet_loss(positive, negatives, 0.2, valid)
    assert loss.item() == approx((0.2 + 0.3 + 0.5) / 3)
    loss.backward()
    assert torch.equal(negatives.grad != 0, valid)
    assert positive.grad.tolist() == approx([-2 / 3, -1 / 3])


@pytest.mark.parametrize("junk", [0.9, float("inf"), float("nan")])
def test_a_pair_without_negatives_contributes_nothing(junk):
    """Whatever its unusable scores are: no value, no gradient, no NaN. The other pair counts as if
    alone."""
    positive, negatives = leaf([0.3, 0.5]), leaf([[junk, junk], [0.4, 0.6]])
    valid = torch.tensor([[False, False], [True, True]])
    loss = losses.triplet_loss(positive, negatives, 0.2, valid)
    assert (
        loss.item()
        == approx(losses.triplet_loss(positive[1:], negatives[1:], 0.2).item())
        == approx(0.2)
    )
    loss.backward()
    assert positive.grad.tolist() == approx([0.0, -1.0])
    assert negatives.grad.flatten().tolist() == approx([0.0, 0.0, 0.5, 0.5])


@pytest.mark.parametrize("h", [0, 2])
def test_a_batch_without_any_negative_has_loss_zero_and_gradient_zero(h):
    positive, negatives = leaf([0.3, 0.5]), torch.full((2, h), 0.9, requires_grad=True)
    loss = losses.triplet_loss(positive, negatives, 0.2, torch.zeros(2, h, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0.0 and positive.grad.tolist() == [0.0, 0.0] and not negatives.grad.any()


@pytest.mark.parametrize("shapes", [((2, 1), (2, 3)), ((2,), (3, 2)), ((3,), (3,))])
def test_triplet_loss_refuses_shapes_that_would_broadcast(shapes):
    with pytest.raises(ValueError, match="positive must be"):
        losses.triplet_loss(torch.zeros(shapes[0]), torch.zeros(shapes[1]))


# ---- matching


def test_matching_loss_and_its_gradient_by_hand():
    """One true pair with probability 1/4, one false pair with 1/2: (log 4 + log 2) / 2; gradient (p
    - y) / 2."""
    logits = leaf([-math.log(3), 0.0])
    loss = losses.matching_loss(logits, torch.tensor([1.0, 0.0]))
    assert loss.item() == approx((math.log(4) + math.log(2)) / 2)
    loss.backward()
    assert logits.grad.tolist() == approx([(0.25 - 1) / 2, 0.5 / 2])


# ---- contrast


def test_contrast_and_its_gradient_by_hand():
    """Two pairs: each row and each column is a choice among two; gradient (p - own) / 2, twice."""
    logits = leaf([[1.0, 3.0], [0.0, 2.0]])
    loss = losses.contrastive_loss(logits)
    chance = lambda x: 1 / (1 + math.exp(-x))  # of the first of two that differ by x
    rows = [chance(1 - 3), chance(2 - 0)]
    columns = [chance(1 - 0), chance(2 - 3)]
    expected = -sum(math.log(p) for p in rows) / 2 - sum(math.log(p) for p in columns) / 2
    assert loss.item() == approx(expected, 1e-5)
    loss.backward()
    own = [(rows[n] - 1) / 2 + (columns[n] - 1) / 2 for n in (0, 1)]
    other = [(1 - rows[0]) / 2 + (1 - columns[1]) / 2, (1 - rows[1]) / 2 + (1 - columns[0]) / 2]
    found = logits.grad.flatten().tolist()
    assert found == approx([own[0], other[0], other[1], own[1]], 1e-5)


def test_contrast_of_a_single_pair_is_nothing():
    assert losses.contrastive_loss(torch.tensor([[3.0]])).item() == 0


# ---- masked words


def word_case(b=2, t=4, v=5):
    torch.manual_seed(0)
    return torch.randn(b, t, v, requires_grad=True), torch.tensor([[-1, 2, -1, 0], [4, -1, -1, -1]])


def mean_over_labels(logits, labels):
    """A plain loop: the mean of -log softmax at the labels, and its gradient (softmax - one-hot) /
    number of labels."""
    total, count, slope = 0.0, int((labels >= 0).sum()), torch.zeros_like(logits)
    for index in (labels >= 0).nonzero().tolist():
        row, label = logits.detach()[tuple(index)], labels[tuple(index)].item()
        p = row.exp() / row.exp().sum()
        total -= math.log(p[label]) / count
        slope[tuple(index)] = p / count
        slope[tuple(index)][label] -= 1 / count
    return total, slope


@pytest.mark.parametrize("loss", [losses.masked_lm_loss, losses.word_correction_loss])
def test_word_losses_count_labelled_positions_alone(loss):
    """The label -1 is ignored, 0 is a word like any other, and the mean is over the labels."""
    logits, labels = word_case()
    value, slope = mean_over_labels(logits, labels)
    assert loss(logits, labels).item() == approx(value)
    loss(logits, labels).backward()
    assert (logits.grad - slope).abs().max() < 1e-6
    assert not logits.grad[labels < 0].any()


@pytest.mark.parametrize("loss", [losses.masked_lm_loss, losses.word_correction_loss])
def test_word_losses_take_selected_logits_as_well(loss):
    logits, labels = word_case()
    picked = labels >= 0
    assert loss(logits[picked], labels[picked]).item() == approx(loss(logits, labels).item())


@pytest.mark.parametrize("loss", [losses.masked_lm_loss, losses.word_correction_loss])
@pytest.mark.parametrize("shape", [(2, 4), (0,)])
def test_word_losses_without_any_label_are_zero_with_zero_gradient(loss, shape):
    logits = torch.randn(*shape, 5, requires_grad=True)
    value = loss(logits, torch.full(shape, -1))
    value.backward()
    assert value.item() == 0.0 and not logits.grad.any()


def test_word_correction_is_floored_at_1e_10_without_gradient_below():
    """A hopeless word costs -log(1e-10) = 23.02585 and no more; the word beside it learns as
    ever."""
    logits, labels = leaf([[40.0, 0.0], [0.0, 0.0]]), torch.tensor([1, 1])
    loss = losses.word_correction_loss(logits, labels)
    assert loss.item() == approx((23.02585 + math.log(2)) / 2, 1e-5)
    loss.backward()
    assert logits.grad.flatten().tolist() == approx([0.0, 0.0, 0.25, -0.25])


# ---- word discrimination


def test_word_discrimination_and_its_gradient_by_hand():
    """Every p is 1/2 but one: replaced words weigh 1, original ones 0.11, divided by the 3 real
    positions."""
    logits = torch.zeros(1, 4, 2)
    logits[0, 1, 1] = math.log(3)  # an original word: p(original) = 3/4
    logits.requires_grad_()
    replaced, text_mask = (
        torch.tensor([[False, False, True, True]]),
        torch.tensor([[True, True, True, False]]),
    )
    loss = losses.word_discrimination_loss(logits, replaced, text_mask)
    assert loss.item() == approx((0.11 * math.log(2) + 0.11 * math.log(4 / 3) + math.log(2)) / 3)
    loss.backward()
    assert (3 * logits.grad).flatten().tolist() == approx(
        [0.055, -0.055, 0.0275, -0.0275, -0.5, 0.5, 0.0, 0.0]
    )


def test_word_discrimination_weight_and_classes():
    """Class 1 = original, class 0 = replaced; the weight falls on original words alone."""
    logits, mask = torch.tensor([[[2.0, -1.0]]]), torch.ones(1, 1, dtype=torch.bool)
    original, replaced = torch.zeros(1, 1, dtype=torch.bool), torch.ones(1, 1, dtype=torch.bool)
    wrong, right = math.log(1 + math.exp(3)), math.log(1 + math.exp(-3))
    assert losses.word_discrimination_loss(logits, original, mask).item() == approx(0.11 * wrong)
    assert losses.word_discrimination_loss(
        logits, original, mask, original_weight=0.5
    ).item() == approx(0.5 * wrong)
    assert losses.word_discrimination_loss(
        logits, replaced, mask, original_weight=0.5
    ).item() == approx(right)


def test_word_discrimination_ignores_padding_and_survives_sentences_of_padding_alone():
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 2, requires_grad=True)
    replaced = torch.tensor([[False, True, True], [True, False, True]])
    mask = torch.tensor(
        [[True, True, False], [False, False, False]]
    )  # row 1: a pair that ran out of negatives
    loss = losses.word_discrimination_loss(logits, replaced, mask)
    assert loss.item() == approx(
        losses.word_discrimination_loss(logits[:1, :2], replaced[:1, :2], mask[:1, :2]).item()
    )
    loss.backward()
    assert torch.equal(logits.grad.abs().sum(2) > 0, mask)
    nothing = losses.word_discrimination_loss(logits, replaced, torch.zeros_like(mask))
    assert nothing.item() == 0.0 and not torch.autograd.grad(nothing, logits)[0].any()


def test_word_discrimination_is_floored_at_1e_10_without_gradient_below():
    logits = leaf(
        [[[40.0, 0.0], [0.0, 40.0]]]
    )  # an original and a replaced word, each taken for the other
    loss = losses.word_discrimination_loss(
        logits, torch.tensor([[False, True]]), torch.ones(1, 2, dtype=torch.bool)
    )
    assert loss.item() == approx(1.11 * 23.02585 / 2, 1e-5)
    loss.backward()
    assert not logits.grad.any()


# ---- all of them


def test_bfloat16_scores_are_averaged_in_float32():
    """In bfloat16 a sum of 4,096 hinges would stick at a few digits."""
    positive, negatives = (
        torch.zeros(1, dtype=torch.bfloat16),
        torch.full((1, 4096), 0.5, dtype=torch.bfloat16),
    )
    logits = torch.zeros(4096, 3, dtype=torch.bfloat16)
    labels = torch.zeros(4096, dtype=torch.long)
    assert losses.triplet_loss(positive, negatives).item() == approx(0.7)
    assert losses.masked_lm_loss(logits, labels).item() == approx(math.log(3), 1e-5)
    assert losses.word_correction_loss(logits, labels).item() == approx(math.log(3), 1e-5)
    discrimination = losses.word_discrimination_loss(logits[:, :2], labels > 0, labels == 0)
    assert discrimination.item() == approx(0.11 * math.log(2), 1e-5)


# ---- counts, and several processes

TERMS = {  # each term on arguments with 1, 2, 2, 3 and 1 usable entries
    "triplet": lambda **options: losses.triplet_loss(
        torch.tensor([0.5, 0.4]),
        torch.tensor([[0.6], [0.9]]),
        0.2,
        torch.tensor([[True], [False]]),
        **options,
    ),
    "matching": lambda **options: losses.matching_loss(
        torch.tensor([1.0, 2.0, 3.0]),
        torch.tensor([1, 0, 0]),
        torch.tensor([True, True, False]),
        **options,
    ),
    "masked_lm": lambda **options: losses.masked_lm_loss(
        torch.eye(3), torch.tensor([2, -1, 0]), **options
    ),
    "discrimination": lambda **options: losses.word_discrimination_loss(
        torch.ones(1, 4, 2),
        torch.tensor([[True, False, False, False]]),
        torch.tensor([[True, True, True, False]]),
        **options,
    ),
    "correction": lambda **options: losses.word_correction_loss(
        torch.eye(3), torch.tensor([-1, 2, -1]), **options
    ),
}
USABLE = {"triplet": 1, "matching": 2, "masked_lm": 2, "discrimination": 3, "correction": 1}


@pytest.mark.parametrize("term", TERMS)
def test_the_count_is_what_the_sum_is_divided_by(term):
    alone = TERMS[term]().item()
    assert alone > 0
    for count in (0.5, 2.5, torch.tensor(7.0)):
        value = TERMS[term](count=count).item()
        assert value == approx(alone * USABLE[term] / float(count))


def test_masked_mean_by_hand():
    values, valid = leaf([1.0, 5.0, 3.0]), torch.tensor([True, False, True])
    assert losses.masked_mean(values, valid).item() == 2.0
    assert losses.masked_mean(values, valid, 8).item() == 0.5
    assert losses.masked_mean(values, torch.zeros(3, dtype=torch.bool)).item() == 0.0
    with pytest.raises(ValueError, match="valid is"):
        losses.masked_mean(values, valid[:1])


@pytest.fixture
def two_processes(monkeypatch):
    """As if another process ran beside this one, whose valid entries number `others`."""
    talk = {"others": 0, "calls": 0}

    def all_reduce(total):
        talk["calls"] += 1
        total += talk["others"]

    monkeypatch.setattr(losses.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(losses.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(losses.dist, "all_reduce", all_reduce)
    return talk


@pytest.mark.parametrize("term", TERMS)
def test_a_loss_does_not_talk_to_other_processes(two_processes, term):
    """So it may be computed on one of them alone, where waiting for the others would never end."""
    TERMS[term]()
    assert two_processes["calls"] == 0


def test_the_joint_count_is_the_mean_over_the_processes(two_processes):
    valid = torch.tensor([True, False, True])
    two_processes["others"] = 5
    assert losses.joint_count(valid).item() == 3.5
    two_processes["others"] = 0
    assert losses.joint_count(~valid).item() == 0.5
    assert losses.joint_count(valid & ~valid).item() > 0, "a term without any entry is 0, not NaN"
    assert two_processes["calls"] == 3


def test_alone_there_is_no_joint_count():
    assert losses.joint_count(torch.ones(3, dtype=torch.bool)) is None


# ---- all terms of a batch

PAD = 0


def near(value):
    return pytest.approx(value, rel=1e-4, abs=1e-6)


class Images:
    """What prepare_regions of `Toy` returns."""

    def __init__(self, features):
        self.features = features


class Toy(torch.nn.Module):
    """A model whose hidden states (N, T, 3) are word embeddings plus the image's feature."""

    def __init__(self, vocabulary=9):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.words = torch.nn.Parameter(torch.randn(vocabulary, 3, generator=generator))

    def prepare_text(self, input_ids, text_mask):
        assert torch.equal(text_mask, input_ids != PAD)
        return input_ids

    def prepare_regions(self, features, boxes, region_mask):
        return Images(features)

    def encode_pairs(self, texts, text_index, images, image_index):
        return self.words[texts[text_index]] + images.features[image_index][:, None]

    def encode_places(self, texts, text_index, images, image_index, places):
        return self.encode_pairs(texts, text_index, images, image_index).flatten(0, 1)[places]

    def match(self, hidden):
        return hidden.sum((1, 2))

    def score_pairs(self, *pairs):
        return self.match(self.encode_pairs(*pairs)) + self.similarity(*pairs)

    def similarity(self, texts, text_index, images, image_index):
        return self.words[texts[:, 0]].sum(1)[text_index] * images.features.sum(1)[image_index]

    def fill(self, hidden):
        return hidden @ self.words.T

    def discriminate(self, hidden):
        return hidden[..., :2]

    def correct(self, hidden):
        return 2 * hidden @ self.words.T


def batch_of(B=2, P=3, M=2, T=4):
    """P pairs, B of them anchors, everything that the objective asks for."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 9, (P, T), generator=generator)
    labels = torch.where(torch.rand(B, M, T, generator=generator) < 0.4, ids[:B, None], -1)
    labels[:, :, 0] = ids[:B, :1]
    places = (labels.flatten() >= 0).nonzero()[:, 0]
    wrong = (torch.arange(B) + 1) % B
    batch = {
        "input_ids": ids,
        "features": torch.randn(P, 3, generator=generator),
        "boxes": None,
        "region_mask": None,
        "masked": torch.where(labels >= 0, 8, ids[:B, None]),
        "places": torch.cat((places, torch.zeros(3, dtype=torch.long))),
        "targets": torch.cat((labels.flatten()[places], torch.full((3,), -1))),
        "wrong_images": wrong,
        "wrong_texts": wrong,
        "wrong_valid": torch.ones(B, dtype=torch.bool),
    }
    return batch, labels


def score(model, batch, text, image):
    """Matching logit of one caption of the pool and one image, or of ids (T,) and one image."""
    ids = batch["input_ids"][text] if isinstance(text, int) else text
    similarity = model.words[ids[0]].sum() * batch["features"][image].sum()
    return (model.words[ids] + batch["features"][image]).sum() + similarity


def hinges(model, batch, pairs):
    """The mean hinge over (anchor, negative text, negative image), one by one."""
    total = 0.0
    for anchor, text, image in pairs:
        positive = score(model, batch, anchor, anchor).sigmoid()
        total += max(0.0, 0.2 + (score(model, batch, text, image).sigmoid() - positive).item())
    return total / len(pairs)


def objective_of(batch, weights, retrieved=None, negatives=None, **options):
    model = Toy()
    objective = losses.Objective(model, PAD, 0.2, **options)
    terms, diagnostics = objective(batch, dict.fromkeys(weights, 1.0), retrieved, negatives)
    return model, terms, diagnostics


def test_matching_takes_the_true_pair_a_wrong_caption_and_a_wrong_image():
    batch, _ = batch_of(B=3)
    batch["wrong_texts"] = torch.tensor([2, 0, 1])
    model, terms, diagnostics = objective_of(batch, ["itm"])
    cost = 0.0
    for row in range(3):
        image, text = batch["wrong_images"][row].item(), batch["wrong_texts"][row].item()
        cost -= F.logsigmoid(score(model, batch, row, row))
        cost -= F.logsigmoid(-score(model, batch, text, row))
        cost -= F.logsigmoid(-score(model, batch, row, image))
    assert terms.keys() == {"itm"} and diagnostics == {}
    assert terms["itm"].item() == near(cost.item() / 9)


def test_a_partner_that_is_true_after_all_is_not_learnt_as_wrong():
    """Row 1 has an equal caption beside it; what its partner scores has no say and no gradient."""
    batch, _ = batch_of(B=2)
    batch["wrong_valid"] = torch.tensor([True, False])
    model, terms, _ = objective_of(batch, ["itm"])
    cost = 0.0
    for text, image, match in ((0, 0, 1), (1, 1, 1), (1, 0, 0), (0, 1, 0)):
        logit = score(model, batch, text, image)
        cost -= F.logsigmoid(logit if match else -logit)
    assert terms["itm"].item() == near(cost.item() / 4)


def test_matching_in_a_batch_of_one_learns_the_true_pair_alone():
    """It has no wrong partner: the pair itself was taken for one."""
    batch, _ = batch_of(B=1, P=1)
    batch["wrong_valid"] = torch.tensor([False])
    model, terms, _ = objective_of(batch, ["itm"])
    expected = -F.logsigmoid(score(model, batch, 0, 0))
    assert terms["itm"].item() == near(expected.item())


def retrieved_of():
    image_index, image_valid = (
        torch.tensor([[1, 2], [2, 0]]),
        torch.tensor([[True, True], [True, False]]),
    )
    text_index, text_valid = (
        torch.tensor([[2, 1], [0, 2]]),
        torch.tensor([[True, False], [True, True]]),
    )
    return (image_index, image_valid), (text_index, text_valid)


def test_retrieved_negatives_of_both_kinds():
    batch, _ = batch_of()
    model, terms, diagnostics = objective_of(batch, ["hard"], retrieved_of())
    by_image = hinges(model, batch, [(0, 0, 1), (0, 0, 2), (1, 1, 2)])
    by_text = hinges(model, batch, [(0, 2, 0), (1, 0, 1), (1, 2, 1)])
    assert diagnostics["hard_image"].item() == near(by_image)
    assert diagnostics["hard_text"].item() == near(by_text)
    assert terms["hard"].item() == near(by_image + by_text)
    positive = [score(model, batch, row, row).sigmoid().item() for row in (0, 1)]
    assert diagnostics["positive"].item() == near(sum(positive) / 2)
    scores = [
        score(model, batch, text, image).sigmoid().item()
        for text, image in ((2, 0), (0, 1), (2, 1))
    ]
    assert diagnostics["retrieved"].item() == near(sum(scores) / 3)


def negatives_of(batch):
    """Two sentences of pair 0, one of pair 1 and a row of padding; one word differs in each."""
    own = batch["input_ids"][:2, None].expand(2, 2, 4)
    sentences = torch.where(torch.arange(4) == 2, (own % 8) + 1, own).clone()
    valid = torch.tensor([[True, True], [True, False]])
    sentences[1, 1] = PAD
    labels = torch.where(valid[..., None] & (sentences != own), own, -1)
    return sentences, valid, labels


@pytest.mark.parametrize("original_weight", [0.11, 0.5])
def test_the_terms_of_generated_sentences(original_weight):
    batch, _ = batch_of()
    negatives = negatives_of(batch)
    sentences = negatives[0]
    weights = ["hard", "tags", "wod", "woc"]
    model, terms, diagnostics = objective_of(
        batch, weights, retrieved_of(), negatives, original_weight=original_weight
    )
    assert terms.keys() == set(weights)
    kept = [(0, sentences[0, 0], 0), (0, sentences[0, 1], 0), (1, sentences[1, 0], 1)]
    assert terms["tags"].item() == near(hinges(model, batch, kept))
    scores = [score(model, batch, text, image).sigmoid().item() for _, text, image in kept]
    assert diagnostics["synthetic"].item() == near(sum(scores) / 3)
    assert diagnostics["kept"].item() == 0.75
    wod = 0.0
    woc = 0.0
    for pair, text, _ in kept:
        hidden = model.words[text] + batch["features"][pair]  # (T, 3)
        for place, word in enumerate(batch["input_ids"][pair].tolist()):
            log_p = hidden[place, :2].log_softmax(0)
            wrong = text[place] != word
            wod -= log_p[0].item() if wrong else original_weight * log_p[1].item()
            if wrong:
                woc -= (2 * hidden[place] @ model.words.T).log_softmax(0)[word].item()
    assert terms["wod"].item() == near(wod / 12)
    assert terms["woc"].item() == near(woc / 3)


def test_masked_words_are_learnt_at_their_places_and_padding_of_the_list_is_not():
    batch, labels = batch_of()
    model, terms, _ = objective_of(batch, ["mlm"])
    cost = []
    for pair, masking, place in (labels >= 0).nonzero().tolist():
        hidden = model.words[batch["masked"][pair, masking, place]] + batch["features"][pair]
        word = labels[pair, masking, place]
        cost.append(-(hidden @ model.words.T).log_softmax(0)[word].item())
    assert terms["mlm"].item() == near(sum(cost) / len(cost))


def test_a_term_without_weight_is_not_worked_out():
    batch, _ = batch_of()
    for weights in (["itm", "mlm"], ["hard"], ["hard", "mlm", "wod"]):
        written = negatives_of(batch) if "wod" in weights else None
        _, terms, _ = objective_of(batch, weights, retrieved_of(), written)
        assert set(terms) == set(weights)


def test_every_count_of_the_objective_is_the_joint_one(two_processes):
    """If another process has a billion entries of each term, all terms almost vanish."""
    batch, _ = batch_of()
    weights = ["itm", "hard", "tags", "wod", "woc", "mlm"]
    arguments = batch, weights, retrieved_of(), negatives_of(batch)
    _, joint, _ = objective_of(*arguments)
    assert two_processes["calls"] >= len(weights)
    two_processes["others"] = 1e9
    _, drowned, _ = objective_of(*arguments)
    assert all(0 < drowned[term] < 1e-6 for term in weights)
    assert all(joint[term] > 1e-6 for term in weights)


def test_nothing_waits_for_a_device():
    """Tensors of the device "meta" have no numbers: to ask for one, as would halt a GPU, is an
    error."""
    batch, _ = batch_of()
    batch = {name: value if value is None else value.to("meta") for name, value in batch.items()}
    model = Toy().to("meta")
    model.prepare_text = lambda input_ids, text_mask: input_ids  # without looking at the numbers
    retrieved = [[part.to("meta") for part in kind] for kind in retrieved_of()]
    negatives = [torch.empty_like(part, device="meta") for part in negatives_of(batch_of()[0])]
    weights = dict.fromkeys(["itm", "hard", "tags", "wod", "woc", "mlm"], 1.0)
    terms, diagnostics = losses.Objective(model, PAD, 0.2)(batch, weights, retrieved, negatives)
    assert all(value.shape == () for value in (terms | diagnostics).values())
    sum(terms.values()).backward()


def test_masked_lm_takes_labels_of_any_integer_type():
    logits = torch.randn(3, 7)
    labels = torch.tensor([2, -1, 6])
    assert losses.masked_lm_loss(logits, labels.int()) == losses.masked_lm_loss(logits, labels)
