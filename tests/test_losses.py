"""The terms of the objective against closed forms worked out by hand and loops."""

import math
from pathlib import Path

import pytest
import torch

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
    loss = losses.triplet_loss(positive, negatives, margin=0.2)
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
    loss = losses.triplet_loss(positive, negatives, margin=0.2, valid=valid)
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
    loss = losses.triplet_loss(positive, negatives, margin=0.2, valid=valid)
    assert (
        loss.item()
        == approx(losses.triplet_loss(positive[1:], negatives[1:], margin=0.2).item())
        == approx(0.2)
    )
    loss.backward()
    assert positive.grad.tolist() == approx([0.0, -1.0])
    assert negatives.grad.flatten().tolist() == approx([0.0, 0.0, 0.5, 0.5])


@pytest.mark.parametrize("h", [0, 2])
def test_a_batch_without_any_negative_has_loss_zero_and_gradient_zero(h):
    positive, negatives = leaf([0.3, 0.5]), torch.full((2, h), 0.9, requires_grad=True)
    loss = losses.triplet_loss(positive, negatives, valid=torch.zeros(2, h, dtype=torch.bool))
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


# ---- all pairs of a batch


def test_contrastive_loss_and_its_gradient_by_hand():
    """Caption 0 finds its image with probability 3/4 and caption 1 with 1/2; image 0 its caption
    with 3/4 and image 1 with 1/2. The gradient is the mean of both softmaxes less the true pairs,
    over B."""
    scores = leaf([[math.log(3), 0.0], [0.0, 0.0]])
    loss = losses.contrastive_loss(scores)
    assert loss.item() == approx((math.log(4 / 3) + math.log(2)) / 2)
    loss.backward()
    slopes = [[(3 / 4 - 1) / 2, (1 / 4 + 1 / 2) / 4], [(1 / 4 + 1 / 2) / 4, (1 / 2 - 1) / 2]]
    for row, expected in zip(scores.grad.tolist(), slopes):
        assert row == approx(expected)


def test_contrastive_loss_leaves_out_what_is_not_valid_but_never_a_true_pair():
    scores = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    valid = torch.ones(3, 3, dtype=torch.bool)
    valid[0, 1] = valid[2, 2] = False
    found = losses.contrastive_loss(scores, valid=valid)
    scores[0, 1] = -1e9
    assert found.item() == approx(losses.contrastive_loss(scores).item())


def test_contrastive_loss_does_not_change_with_the_order_of_the_pairs():
    scores = torch.randn(5, 5)
    order = torch.randperm(5)
    shuffled = losses.contrastive_loss(scores[order][:, order])
    assert shuffled.item() == approx(losses.contrastive_loss(scores).item())


@pytest.mark.parametrize("shape", [(3,), (3, 2), (2, 3, 3)])
def test_contrastive_loss_refuses_anything_but_a_square(shape):
    with pytest.raises(ValueError, match="scores must be"):
        losses.contrastive_loss(torch.zeros(shape))


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


def test_matching_loss_leaves_out_what_is_not_valid():
    logits, matches = leaf([1.0, 2.0, 3.0]), torch.tensor([True, False, False])
    loss = losses.matching_loss(logits, matches, valid=torch.tensor([True, False, True]))
    expected = (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(3))) / 2
    assert loss.item() == approx(expected, 1e-5)
    loss.backward()
    assert (logits.grad != 0).tolist() == [True, False, True]


def test_masked_mean_by_hand():
    values, valid = leaf([1.0, 5.0, 3.0]), torch.tensor([True, False, True])
    assert losses.masked_mean(values).item() == 3.0
    assert losses.masked_mean(values, valid).item() == 2.0
    assert losses.masked_mean(values, torch.zeros(3, dtype=torch.bool)).item() == 0.0
    with pytest.raises(ValueError, match="valid is"):
        losses.masked_mean(values, valid[:1])


@pytest.mark.parametrize("loss", [losses.masked_lm_loss, losses.word_correction_loss])
def test_every_negative_label_means_no_target(loss):
    """Ours are -1, torch's and those of other libraries -100."""
    logits, labels = word_case()
    expected = loss(logits, labels)
    for other in (-100, -7):
        found = loss(logits, labels.masked_fill(labels < 0, other))
        assert torch.equal(found, expected)
    found.backward()
    assert not logits.grad[labels < 0].any()


@pytest.mark.parametrize("loss", [losses.masked_lm_loss, losses.word_correction_loss])
def test_broken_logits_without_a_target_have_no_say(loss):
    logits, labels = torch.randn(3, 5), torch.tensor([2, -100, 4])
    broken = logits.clone()
    broken[1] = float("nan")
    broken.requires_grad_()
    loss(broken, labels).backward()
    assert torch.equal(loss(broken, labels), loss(logits, labels))
    assert broken.grad[[0, 2]].isfinite().all()


def test_options_are_given_by_name():
    scores, logits = torch.rand(2), torch.zeros(2, 3, 2)
    some = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(TypeError):
        losses.triplet_loss(scores, scores[:, None], 0.2)
    with pytest.raises(TypeError):
        losses.word_discrimination_loss(logits, some, some, 0.11)
    with pytest.raises(TypeError):
        losses.matching_loss(scores, some[0, :2], some[0, :2])


def test_a_loss_does_not_talk_to_other_processes():
    """So it may be computed on one of them alone, where waiting for others would never end."""
    assert "distributed" not in Path(losses.__file__).read_text()


def test_masked_lm_takes_labels_of_any_integer_type():
    logits = torch.randn(3, 7)
    labels = torch.tensor([2, -1, 6])
    assert losses.masked_lm_loss(logits, labels.int()) == losses.masked_lm_loss(logits, labels)
