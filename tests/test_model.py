"""The encoder and its heads: masks, positions, batching, the tie to the word embeddings, gradients."""

import contextlib

import pytest
import torch
import torch.nn.functional as F

from losses import triplet_loss
import model as model_module
from model import Config, TagsDC, attend, autocast, fast_dtype

TEXT_LENGTHS, REGION_COUNTS = (5, 3, 6), (2, 4, 1)
SIZES = dict(
    vocab_size=40, feature_size=6, hidden=16, layers=3, heads=2, intermediate=24, max_positions=12
)


def make_model(dropout=0.0):
    """A model all of whose parameters matter: biases and LayerNorms are not left at their initial 0 and 1."""
    torch.manual_seed(0)
    model = TagsDC(Config(**SIZES, dropout=dropout))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return make_model()


def make_batch(seed=0):
    """Three pairs of different lengths; what lies in the padding is random, not zero."""
    rng = torch.Generator().manual_seed(seed)
    b, t, r = len(TEXT_LENGTHS), max(TEXT_LENGTHS), max(REGION_COUNTS)
    ids = torch.randint(1, 40, (b, t), generator=rng)
    features, boxes = torch.randn(b, r, 6, generator=rng), torch.rand(b, r, 7, generator=rng)
    text_mask = torch.arange(t) < torch.tensor(TEXT_LENGTHS)[:, None]
    return ids, features, boxes, text_mask, torch.arange(r) < torch.tensor(REGION_COUNTS)[:, None]


def one_pair(batch, i, extra_text=0, extra_regions=0):
    """Pair i as a batch of its own, cut to its lengths or followed by `extra` positions of padding noise."""
    ids, features, boxes, _, _ = (x[i : i + 1] for x in batch)
    t = TEXT_LENGTHS[i]
    r = REGION_COUNTS[i]
    return (
        torch.cat((ids[:, :t], torch.full((1, extra_text), 7)), 1),
        torch.cat((features[:, :r], 9 * torch.ones(1, extra_regions, 6)), 1),
        torch.cat((boxes[:, :r], torch.ones(1, extra_regions, 7)), 1),
        torch.arange(t + extra_text)[None] < t,
        torch.arange(r + extra_regions)[None] < r,
    )


def real_rows(hidden, batch):
    return hidden[torch.cat(batch[3:], 1)]


def close(a, b, tolerance=1e-5):
    """True if no entry differs by more than this share of the largest one."""
    if a.shape != b.shape:
        return False
    if a.numel() == 0:
        return True
    return (a - b).abs().max().item() <= tolerance * b.abs().max().item()


# ---- shapes and sizes


def test_shapes_of_the_encoder_and_its_heads(model):
    batch = make_batch()
    hidden = model(*batch)
    assert hidden.shape == (3, 6 + 4, 16)
    assert model.match(hidden).shape == (3,)
    assert model.fill(hidden[:, :6]).shape == model.correct(hidden[:, :6]).shape == (3, 6, 40)
    assert model.discriminate(hidden[:, :6]).shape == (3, 6, 2)


def test_presets_base_and_large_are_uniter():
    base, large = (Config.preset(name, vocab_size=28996) for name in ("base", "large"))
    assert (base.hidden, base.layers, base.heads, base.intermediate) == (768, 12, 12, 3072)
    assert (large.hidden, large.layers, large.heads, large.intermediate) == (1024, 24, 16, 4096)
    assert (
        base.feature_size == large.feature_size == 2048
        and base.max_positions == large.max_positions == 512
    )
    assert Config.preset("tiny", vocab_size=9, hidden=64).hidden == 64


def test_sizes_that_cannot_be_are_refused():
    with pytest.raises(KeyError, match="enormous"):
        Config.preset("enormous", vocab_size=9)
    with pytest.raises(ValueError, match="16.*3"):
        TagsDC(Config(**{**SIZES, "heads": 3}))


def test_a_text_longer_than_the_position_table_is_refused(model):
    ids, features, boxes, _, _ = make_batch()
    with pytest.raises(RuntimeError, match="13"):
        model(torch.ones(3, 13, dtype=torch.long), features, boxes, None, None)


# ---- masks and batches


@torch.no_grad()
@pytest.mark.parametrize("half", [False, True])  # bfloat16 has an attention of its own on a CPU
@pytest.mark.parametrize("what", ["words", "features", "boxes"])
def test_what_lies_in_the_padding_has_no_influence(model, what, half):
    batch = ids, features, boxes, text_mask, region_mask = make_batch()
    noise, real = torch.Generator().manual_seed(1), region_mask[..., None]
    changed = {
        "words": (
            torch.where(text_mask, ids, torch.randint(40, ids.shape, generator=noise)),
            features,
            boxes,
        ),
        "features": (
            ids,
            torch.where(real, features, 50 * torch.randn(features.shape, generator=noise)),
            boxes,
        ),
        "boxes": (
            ids,
            features,
            torch.where(real, boxes, 50 * torch.rand(boxes.shape, generator=noise)),
        ),
    }[what]
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        before, after = model(*batch), model(*changed, text_mask, region_mask)
    assert not torch.equal(before, after), "the padding was not changed at all"
    assert close(real_rows(before, batch), real_rows(after, batch))
    assert close(model.match(before), model.match(after))


@torch.no_grad()
@pytest.mark.parametrize("extra", [(0, 0), (3, 0), (0, 5), (4, 2)])
def test_a_pair_scores_the_same_alone_padded_and_in_a_batch(model, extra):
    batch = make_batch()
    together = model.match(model(*batch))
    alone = torch.cat([model.match(model(*one_pair(batch, i, *extra))) for i in range(3)])
    assert close(together, alone)


@torch.no_grad()
def test_the_order_of_a_batch_does_not_matter(model):
    batch, order = make_batch(), torch.tensor([2, 0, 1])
    assert close(model(*batch)[order], model(*(x[order] for x in batch)))


@torch.no_grad()
def test_a_batch_of_two_equals_two_of_one_and_an_empty_one_is_empty(model):
    batch = make_batch()
    two = model(*(x[:2] for x in batch))
    assert close(two, torch.cat([model(*(x[i : i + 1] for x in batch)) for i in range(2)]))
    none = model(*(x[:0] for x in batch))
    assert none.shape == (0, 10, 16) and model.match(none).shape == (0,)


@torch.no_grad()
def test_no_mask_means_that_everything_is_real(model):
    ids, features, boxes, text_mask, region_mask = make_batch()
    everything = torch.ones_like(text_mask), torch.ones_like(region_mask)
    full = model(ids, features, boxes, *everything)
    assert close(full, model(ids, features, boxes, None, None))
    assert close(full, model(ids, features, boxes, everything[0], None))
    half = model(ids, features, boxes, None, region_mask)
    assert close(half, model(ids, features, boxes, everything[0], region_mask))
    assert not close(half, full), "a region mask beside a missing text mask was forgotten"


@pytest.mark.parametrize("wrong", ["numbers", "shape", "one"])
def test_a_mask_that_is_not_bool_or_of_another_shape_is_refused(model, wrong):
    """A mask of 0 and 1 would be added to the scores of attention."""
    ids, features, boxes, text_mask, region_mask = make_batch()
    change = {
        "numbers": lambda mask: mask.long(),
        "shape": lambda mask: mask[:, :-1],
        "one": lambda mask: mask[:1],
    }[wrong]
    with pytest.raises(ValueError, match=r"a mask must be torch.bool \(3, 6\)"):
        model(ids, features, boxes, change(text_mask), region_mask)
    with pytest.raises(ValueError, match=r"a mask must be torch.bool \(3, 4\)"):
        model(ids, features, boxes, text_mask, change(region_mask))


def random_batch(b, t, r):
    """B pairs of T text positions and R regions, padding anywhere but at [CLS]."""
    text_mask = torch.rand(b, t) < 0.8
    text_mask[:, 0] = True
    ids = torch.randint(1, 40, (b, t))
    return ids, torch.randn(b, r, 6), torch.rand(b, r, 7), text_mask, torch.rand(b, r) < 0.8


@torch.no_grad()
def test_forward_is_exported_once_for_every_number_of_pairs_words_and_regions(model):
    pairs = torch.export.Dim("pairs", max=64)
    words = torch.export.Dim("words", max=12)
    regions = torch.export.Dim("regions", max=100)
    text = {0: pairs, 1: words}
    image = {0: pairs, 1: regions}
    shapes = (text, image, image, text, image)
    exported = torch.export.export(model, random_batch(3, 6, 4), dynamic_shapes=shapes).module()
    for sizes in ((5, 9, 2), (2, 12, 30), (40, 3, 7)):
        batch = random_batch(*sizes)
        assert close(exported(*batch), model(*batch))


@torch.no_grad()
@pytest.mark.parametrize("first", [0, 1, 4, 7])
def test_a_layer_at_the_first_positions_is_the_whole_layer_there(model, first):
    x, mask = torch.randn(3, 7, 16), torch.arange(7) < torch.tensor([7, 4, 5])[:, None]
    for layer in model.layers:
        assert close(layer(x, mask, first), layer(x, mask)[:, :first])
        assert close(layer(x, first=first), layer(x)[:, :first])


# ---- what the encoder is told about places


@torch.no_grad()
def test_regions_have_no_order_but_words_have(model):
    ids, features, boxes, _, _ = make_batch()
    hidden = model(ids, features, boxes, None, None)
    turned = model(ids, features.flip(1), boxes.flip(1), None, None)
    assert close(hidden[:, :6], turned[:, :6]) and close(hidden[:, 6:], turned[:, 6:].flip(1))
    swapped = ids[:, [0, 2, 1, 3, 4, 5]]
    assert not close(
        model.match(hidden), model.match(model(swapped, features, boxes, None, None)), 1e-3
    )


@torch.no_grad()
@pytest.mark.parametrize("coordinate", range(7))
def test_every_box_coordinate_matters(model, coordinate):
    ids, features, boxes, text_mask, region_mask = batch = make_batch()
    moved = boxes.clone()
    moved[:, 0, coordinate] += 0.5
    change = model.match(model(ids, features, moved, text_mask, region_mask)) - model.match(
        model(*batch)
    )
    assert (change.abs() > 1e-4).all()


@torch.no_grad()
def test_boxes_and_features_of_two_regions_belong_together(model):
    ids, features, boxes, _, _ = make_batch()
    mixed = model.match(model(ids, features, boxes[:, [1, 0, 2, 3]], None, None))
    assert not close(mixed, model.match(model(ids, features, boxes, None, None)), 1e-3)


@torch.no_grad()
def test_every_real_word_and_region_reaches_the_score_whatever_else_is_in_the_batch(model):
    """Fault of the release: the image offset was the last caption's length, so pairs lost most of their regions."""
    batch = make_batch()
    for order in ([0, 1, 2], [1, 2, 0]):  # the last caption is now the longest, now not
        ids, features, boxes, text_mask, region_mask = (x[order] for x in batch)
        scores = model.match(model(ids, features, boxes, text_mask, region_mask))
        for j in range(4):
            altered = features.clone()
            altered[:, j] += 1
            change = (
                model.match(model(ids, altered, boxes, text_mask, region_mask)) - scores
            ).abs()
            assert ((change > 1e-4) == region_mask[:, j]).all()
        for j in range(6):
            altered = ids.clone()
            altered[:, j] = altered[:, j] % 39 + 1
            change = (
                model.match(model(altered, features, boxes, text_mask, region_mask)) - scores
            ).abs()
            assert ((change > 1e-4) == text_mask[:, j]).all()


# ---- heads


@torch.no_grad()
@pytest.mark.parametrize("head", ["fill", "correct"])
def test_word_heads_are_tied_to_the_word_embeddings(head):
    """Moving the embedding of a word moves the logit of that word in both heads, and no other logit."""
    model, hidden = make_model(), torch.randn(5, 16)
    logits, other = getattr(model, head), {"fill": "correct", "correct": "fill"}[head]
    before = logits(hidden)
    model.text.word.weight[11] += 1.0
    moved = (logits(hidden) - before).abs() > 1e-4
    assert moved[:, 11].all() and not moved[:, torch.arange(40) != 11].any()
    assert not close(logits(hidden), getattr(model, other)(hidden), 0.1), "the two heads are one"


@pytest.mark.parametrize("head", ["fill", "correct"])
def test_word_heads_send_their_gradient_to_the_word_embeddings(head):
    model = make_model()
    getattr(model, head)(torch.randn(5, 16))[:, 11].sum().backward()
    rows = model.text.word.weight.grad.abs().sum(1) > 0
    assert rows.nonzero().flatten().tolist() == [11]


def test_every_parameter_takes_part():
    """All four heads together leave no parameter of the model without a gradient."""
    model = make_model()
    hidden = model(*make_batch())
    words = hidden[:, :6]
    loss = (
        model.match(hidden).sum()
        + model.fill(words).pow(2).sum()
        + model.correct(words).pow(2).sum()
        + model.discriminate(words).pow(2).sum()
    )
    loss.backward()
    assert [
        name
        for name, p in model.named_parameters()
        if p.grad is None or not p.grad.abs().max() > 1e-6
    ] == []


# ---- the fast path


def prepared(model, masked=True):
    """The batch as Prepared texts and images."""
    ids, features, boxes, text_mask, region_mask = make_batch()
    return (
        model.prepare_text(ids, text_mask if masked else None),
        model.prepare_regions(features, boxes, region_mask if masked else None),
    )


def pair_index():
    return torch.tensor([0, 0, 2, 1, 2, 2, 0]), torch.tensor([0, 2, 1, 1, 2, 0, 0])


def scored_both_ways(model, masked, batch_size=None):
    """The same seven pairs by score_pairs and by match(forward(...))."""
    ids, features, boxes, text_mask, region_mask = make_batch()
    t, i = pair_index()
    texts, images = prepared(model, masked)
    masks = (text_mask[t], region_mask[i]) if masked else (None, None)
    return model.score_pairs(texts, t, images, i, batch_size), model.match(
        model(ids[t], features[i], boxes[i], *masks)
    )


def gradients_of(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(found, expected, tolerance=1e-5):
    """Each within this share of its largest entry. The bias of a layer's keys is left to `vanishing`:
    it adds the same to all scores of a query, so that its gradient is 0 but for rounding."""
    vanishing = {name for name in found.keys() | expected.keys() if name.endswith("key.bias")}
    assert found.keys() - vanishing == expected.keys() - vanishing
    for name in expected.keys() - vanishing:
        assert close(found[name], expected[name], tolerance), name
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    for gradients in (found, expected):
        assert all(gradients[n].abs().max() <= 1e-5 * largest for n in vanishing & gradients.keys())


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("masked", [True, False])
def test_score_pairs_is_match_of_forward_gradients_included(masked, layers):
    torch.manual_seed(0)
    model = TagsDC(Config(**{**SIZES, "layers": layers}, dropout=0.0))
    fast, plain = scored_both_ways(model, masked)
    assert close(fast, plain)
    found, expected = (
        gradients_of(model, (scores * torch.arange(1, 8)).sum()) for scores in (fast, plain)
    )
    assert_same_gradients(found, expected)


@torch.no_grad()
def test_score_pairs_gives_the_same_without_packing(model, monkeypatch):
    """As on a GPU, which is not asked for lengths: pairs in their order, padding and all."""
    expected = scored_both_ways(model, True)[1]
    (texts, images), (t, i) = prepared(model), pair_index()
    widths = []
    encode = model.encode

    def watched(x, mask=None, first=None):
        widths.append(x.size(1))
        return encode(x, mask, first)

    monkeypatch.setattr(model, "encode", watched)
    assert close(model.score_pairs(texts, t, images, i, 2), expected)
    assert widths == sorted(widths) and widths[0] < 10, "nothing was packed"
    monkeypatch.setattr(model_module, "can_pack", lambda texts, images: False)
    del widths[:]
    assert close(model.score_pairs(texts, t, images, i, 2), expected)
    assert widths == [10] * 4


def test_nothing_waits_for_a_device(monkeypatch):
    """Tensors of the device "meta" have no numbers: to ask for one, as would halt a GPU, is an
    error."""
    monkeypatch.setattr(model_module, "autocast", lambda *_: contextlib.nullcontext())
    model = TagsDC(Config(**SIZES, dropout=0.0)).to("meta")
    ids, features, boxes, text_mask, region_mask = (x.to("meta") for x in make_batch())
    t, i = (index.to("meta") for index in pair_index())
    texts = model.prepare_text(ids, text_mask)
    images = model.prepare_regions(features, boxes, region_mask)
    assert model.score_pairs(texts, t, images, i, 3).shape == (7,)
    assert model.encode_pairs(texts, t, images, i, first=6).shape == (7, 6, 16)
    assert model(ids, features, boxes, text_mask, region_mask).shape == (3, 10, 16)


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_score_pairs_does_not_depend_on_its_batch_size(model, batch_size):
    fast, plain = scored_both_ways(model, True, batch_size)
    assert close(fast, plain)


@torch.no_grad()
@pytest.mark.parametrize(
    "text_padded, regions_padded", [(True, True), (True, False), (False, True)]
)
def test_padding_may_lie_anywhere_and_in_either_modality(model, text_padded, regions_padded):
    ids, features, boxes, text_mask, region_mask = make_batch()
    text_mask[:, 2] = False  # holes
    region_mask[:, 0] = region_mask.sum(1) == 1
    text_mask, region_mask = (
        text_mask if text_padded else None,
        region_mask if regions_padded else None,
    )
    t, i = pair_index()
    fast = model.score_pairs(
        model.prepare_text(ids, text_mask),
        t,
        model.prepare_regions(features, boxes, region_mask),
        i,
        3,
    )
    masks = text_mask[t] if text_padded else None, region_mask[i] if regions_padded else None
    assert close(fast, model.match(model(ids[t], features[i], boxes[i], *masks)))


@torch.no_grad()
def test_encode_pairs_is_forward(model):
    ids, features, boxes, text_mask, region_mask = make_batch()
    (texts, images), (t, i) = prepared(model), pair_index()
    fast = model.encode_pairs(texts, t, images, i)
    assert close(fast, model(ids[t], features[i], boxes[i], text_mask[t], region_mask[i]))


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("masked", [True, False])
def test_encode_pairs_at_the_first_positions_is_that_of_all_gradients_included(layers, masked):
    torch.manual_seed(0)
    model = TagsDC(Config(**{**SIZES, "layers": layers}, dropout=0.0))
    t, i = pair_index()
    texts, images = prepared(model, masked)
    some = model.encode_pairs(texts, t, images, i, first=6)
    every = model.encode_pairs(texts, t, images, i)[:, :6]
    assert close(some, every)
    weight = torch.randn(some.shape)
    expected = gradients_of(model, (every * weight).sum())
    texts, images = prepared(model, masked)
    some = model.encode_pairs(texts, t, images, i, first=6)
    assert_same_gradients(gradients_of(model, (some * weight).sum()), expected)


@torch.no_grad()
@pytest.mark.parametrize("masked", [True, False])
def test_attention_by_plain_products_is_the_fused_one(masked):
    """In bfloat16 on a CPU; the float32 result is rounded no worse than that of fused attention."""
    q, k, v = torch.randn(3, 5, 2, 7, 8).unbind(0)
    mask = torch.arange(7) < torch.tensor([7, 1, 3, 5, 6])[:, None] if masked else None
    wide = mask[:, None, None] if masked else None
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=wide)
    found = attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), mask, 0.0)
    assert found.dtype == torch.bfloat16 and close(found.float(), expected, 2e-2)
    assert close(attend(q, k, v, mask, 0.0), expected)


@pytest.mark.parametrize("half", [False, True])
def test_attention_weights_are_dropped_out_in_training_alone(half):
    """Also for [CLS] alone and in bfloat16, where attention is written out."""
    model = make_model()
    for layer in model.layers:
        layer.attention_dropout = 0.5  # and nothing else

    def scores():
        with torch.no_grad(), autocast("cpu", torch.bfloat16 if half else torch.float32):
            return scored_both_ways(model, True)

    fast, plain = scores()
    assert all(torch.equal(a, b) for a, b in zip(scores(), (fast, plain)))
    model.train()
    assert not close(scores()[0], fast, 1e-2) and not close(scores()[1], plain, 1e-2)


def test_no_pairs_no_scores(model):
    (texts, images), none = prepared(model), torch.zeros(0, dtype=torch.long)
    assert model.score_pairs(texts, none, images, none).shape == (0,)


def test_the_positive_is_encoded_like_any_pair():
    """Fault of the release: the positive row of the synthetic triplet lost its image and all its words, because its
    attention mask served as gather index. A "negative" that is the caption itself must cost exactly the margin, and
    have no gradient."""
    model, row = make_model(), torch.arange(3)
    texts, images = prepared(model)
    positive = model.score_pairs(texts, row, images, row).sigmoid()
    copies = row.repeat_interleave(4)
    negatives = model.match(model.encode_pairs(texts, copies, images, copies)).sigmoid().view(3, 4)
    loss = triplet_loss(positive, negatives, margin=0.2)
    assert loss.item() == pytest.approx(0.2, abs=1e-6)
    loss.backward()
    assert max(p.grad.abs().max().item() for p in model.parameters() if p.grad is not None) < 1e-5


# ---- modes, memory, precision


@torch.no_grad()
def test_dropout_acts_in_train_mode_alone():
    model, batch = make_model(dropout=0.3), make_batch()
    without = make_model(dropout=0.0)
    assert torch.equal(model(*batch), model(*batch)) and close(model(*batch), without(*batch))
    model.train()
    assert not close(model(*batch), model(*batch), 1e-2)
    states = torch.cat(
        [model.prepare_text(batch[0]).states, model.prepare_regions(*batch[1:3]).states], 1
    )
    assert (states == 0).float().mean().item() == pytest.approx(0.3, abs=0.08), (
        "the embeddings are not dropped out"
    )
    assert close(without.train()(*batch), without.eval()(*batch))


def test_recomputing_saves_memory_and_changes_no_gradient():
    gradients, stored = [], []
    for recompute in (False, True):
        model = make_model(dropout=0.2).train()
        model.recompute = recompute
        torch.manual_seed(1)
        kept = []

        def keep(tensor):
            kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            scores = model.match(model(*make_batch()))
        stored.append(sum(kept))
        scores.sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert stored[1] < stored[0] / 2
    assert len(gradients[0]) == len(gradients[1]) and all(
        close(a, b, 1e-6) for a, b in zip(*gradients)
    )


@pytest.mark.parametrize("gradient", [False, True])
def test_bfloat16_autocast_is_close_and_scores_stay_float32(gradient):
    """Scores are not rounded to bfloat16, where one in 256 would tie with another; gradients agree to a few percent."""
    model, gradients = make_model(), []
    exact = scored_both_ways(model, True)[0]
    exact.sum().backward()
    gradients.append(
        torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    )
    model.zero_grad()
    with torch.set_grad_enabled(gradient), torch.autocast("cpu", torch.bfloat16):
        fast, plain = scored_both_ways(model, True)
    assert fast.dtype == plain.dtype == torch.float32
    assert close(fast, exact, 0.05) and close(plain, exact, 0.05)
    assert not torch.equal(fast, exact), "autocast had no effect"
    assert not torch.equal(fast, fast.bfloat16().float())
    if gradient:
        fast.sum().backward()
        gradients.append(
            torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        )
        assert (gradients[1] - gradients[0]).norm() < 0.05 * gradients[0].norm()


@pytest.mark.parametrize("route", ["score_pairs", "encode_pairs", "first"])
def test_recomputing_changes_nothing_on_any_route(route):
    gradients = []
    for recompute in (False, True):
        model = make_model(dropout=0.2).train()
        model.recompute = recompute
        torch.manual_seed(1)
        (texts, images), (t, i) = prepared(model), pair_index()
        first = [3] if route == "first" else []
        method = model.score_pairs if route == "score_pairs" else model.encode_pairs
        result = method(texts, t, images, i, *first)
        gradients.append(gradients_of(model, result.pow(2).sum()))
    assert_same_gradients(gradients[1], gradients[0])


def test_the_dtype_of_auto_is_one_that_autocast_takes():
    assert fast_dtype("cpu") in (torch.float32, torch.bfloat16)
    assert fast_dtype("mps") == torch.float32
    for dtype in (torch.float32, torch.bfloat16):
        with autocast("cpu", dtype):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


@pytest.mark.parametrize(
    "flags, dtype",
    [
        ("flags : avx2 fma", torch.float32),
        ("flags : avx512_bf16", torch.bfloat16),
        ("flags : amx_bf16", torch.bfloat16),
    ],
)
def test_auto_takes_bfloat16_where_the_cpu_multiplies_it(monkeypatch, flags, dtype):
    monkeypatch.setattr(model_module.Path, "exists", lambda path: True)
    monkeypatch.setattr(model_module.Path, "read_text", lambda path: flags)
    assert fast_dtype("cpu") == dtype


@pytest.mark.parametrize("capability, dtype", [((7, 5), torch.float32), ((8, 0), torch.bfloat16)])
def test_auto_takes_no_bfloat16_that_a_gpu_only_emulates(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert fast_dtype("cuda:0") == dtype
