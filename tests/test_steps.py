"""The training steps against loops over pairs, on a model whose scores are known."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import tagsdc
from generate import Negatives
from model import Prepared

PAD = 0


def near(value):
    return pytest.approx(value, rel=1e-4, abs=1e-6)


class Toy(torch.nn.Module):
    """A model whose hidden states (N, T, 3) are word embeddings plus the image's feature."""

    def __init__(self, vocabulary=9):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.words = torch.nn.Parameter(torch.randn(vocabulary, 3, generator=generator))

    def prepare_text(self, input_ids, text_mask):
        assert input_ids.is_meta or torch.equal(text_mask, input_ids != PAD)
        return Prepared(input_ids, text_mask)

    def prepare_regions(self, features, boxes, region_mask):
        return Prepared(features, region_mask)

    def encode_pairs(self, texts, text_index, images, image_index, first=None):
        hidden = self.words[texts.states[text_index]] + images.states[image_index][:, None]
        return hidden[:, :first]

    def match(self, hidden):
        return hidden.sum((1, 2))

    def score_pairs(self, *pairs):
        return self.match(self.encode_pairs(*pairs))

    def fill(self, hidden):
        return hidden @ self.words.T

    def discriminate(self, hidden):
        return hidden[..., :2]

    def correct(self, hidden):
        return 2 * hidden @ self.words.T


def batch_of(B=2, P=3, M=2, T=4):
    """P pairs, B of them anchors."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 9, (P, T), generator=generator)
    labels = torch.where(torch.rand(B, M, T, generator=generator) < 0.4, ids[:B, None], -1)
    labels[:, :, 0] = ids[:B, :1]
    places = (labels.flatten() >= 0).nonzero()[:, 0]
    return tagsdc.Batch(
        input_ids=ids,
        true_captions=ids[:, None],
        features=torch.randn(P, 3, generator=generator),
        boxes=torch.zeros(P, 1, 7),
        region_mask=torch.ones(P, 1, dtype=torch.bool),
        masked=torch.where(labels >= 0, 8, ids[:B, None]),
        labels=labels,
        places=torch.cat((places, torch.zeros(3, dtype=torch.long))),
        targets=torch.cat((labels.flatten()[places], torch.full((3,), -1))),
        writer_images=torch.arange(B)[:, None].expand(B, M),
    )


def score(model, batch, text, image):
    """Matching logit of one caption of the pool and one image, or of ids (T,) and one image."""
    ids = batch.input_ids[text] if isinstance(text, int) else text
    return (model.words[ids] + batch.features[image]).sum()


def hinges(model, batch, pairs):
    """The mean hinge over (anchor, negative text, negative image), one by one."""
    total = 0.0
    for anchor, text, image in pairs:
        positive = score(model, batch, anchor, anchor).sigmoid()
        total += max(0.0, 0.2 + (score(model, batch, text, image).sigmoid() - positive).item())
    return total / len(pairs)


SETTINGS = tagsdc.Settings(
    tokenizer=SimpleNamespace(pad_id=PAD),
    device="cpu",
    dtype=torch.float32,
    margin=0.2,
    retrieved=2,
    hard=2,
    refills=2,
    temperature=1.0,
    truth_threshold=1.0,
    score_batch=8,
)


@pytest.fixture
def step(monkeypatch):
    """A step with a given batch and given negatives -> model, loss, {name: value}."""

    def take(batch, weights, partners=None, retrieved=None, written=None):
        model = Toy().to(batch.input_ids.device)
        monkeypatch.setattr(tagsdc, "draw_wrong_partners", lambda *_: partners)
        monkeypatch.setattr(tagsdc, "retrieve_negatives", lambda *_: retrieved)
        monkeypatch.setattr(tagsdc, "write_negatives", lambda *_: written)
        if retrieved is None:
            result = tagsdc.warmup_step(model, batch, weights, SETTINGS)
        else:
            result = tagsdc.tailored_step(model, model, batch, weights, SETTINGS)
        return model, *result

    return take


# ---- the warm-up


def partners_of(B):
    """The next pair of the batch."""
    other = (torch.arange(B) + 1) % B
    return other, other, torch.ones(B, dtype=torch.bool)


MATCHING = {"mlm": 1.0, "itm": 1.0}


def test_matching_takes_the_true_pair_a_wrong_caption_and_a_wrong_image(step):
    batch = batch_of(B=3)
    wrong_images, _, valid = partners_of(3)
    wrong_texts = torch.tensor([2, 0, 1])
    model, _, values = step(batch, MATCHING, (wrong_images, wrong_texts, valid))
    cost = 0.0
    for row in range(3):
        cost -= F.logsigmoid(score(model, batch, row, row))
        cost -= F.logsigmoid(-score(model, batch, wrong_texts[row].item(), row))
        cost -= F.logsigmoid(-score(model, batch, row, wrong_images[row].item()))
    assert values.keys() == {"loss", "mlm", "itm"}
    assert values["itm"].item() == near(cost.item() / 9)


def test_a_partner_that_is_true_after_all_is_not_learnt_as_wrong(step):
    """Row 1 has an equal caption beside it; what its partner scores has no say and no gradient."""
    batch = batch_of(B=2, P=2)
    images, texts, _ = partners_of(2)
    model, _, values = step(batch, MATCHING, (images, texts, torch.tensor([True, False])))
    cost = 0.0
    for text, image, match in ((0, 0, 1), (1, 1, 1), (1, 0, 0), (0, 1, 0)):
        logit = score(model, batch, text, image)
        cost -= F.logsigmoid(logit if match else -logit)
    assert values["itm"].item() == near(cost.item() / 4)


def test_matching_in_a_batch_of_one_learns_the_true_pair_alone(step):
    """It has no wrong partner: the pair itself was taken for one."""
    batch = batch_of(B=1, P=1)
    partners = (torch.tensor([0]), torch.tensor([0]), torch.tensor([False]))
    model, _, values = step(batch, MATCHING, partners)
    assert values["itm"].item() == near(-F.logsigmoid(score(model, batch, 0, 0)).item())


def test_from_a_bert_every_caption_meets_every_image():
    """But for one whose caption, of another pair, is true of it after all."""
    batch = batch_of(B=3, P=3)
    true_captions = batch.true_captions.clone()
    true_captions[2] = batch.input_ids[0]  # caption 0 is true of image 2 as well
    batch = batch._replace(true_captions=true_captions)
    model = Toy()
    weights = {"mlm": 0.5, "contrast": 1.0}
    loss, values = tagsdc.contrast_step(model, batch, weights, SETTINGS)
    scores = [[score(model, batch, a, b).item() for b in range(3)] for a in range(3)]
    scores = torch.tensor(scores)
    scores[0, 2] = float("-inf")
    cost = -(scores.log_softmax(1).diagonal() + scores.log_softmax(0).diagonal()).mean() / 2
    assert values.keys() == {"loss", "mlm", "contrast"}
    assert values["contrast"].item() == near(cost.item())
    expected = values["contrast"] + 0.5 * masked_words_by_hand(model, batch)
    assert loss.item() == values["loss"].item() == near(expected.item())
    loss.backward()
    assert model.words.grad.isfinite().all() and model.words.grad.any()


def masked_words_by_hand(model, batch):
    cost = []
    for pair, masking, place in (batch.labels >= 0).nonzero().tolist():
        hidden = model.words[batch.masked[pair, masking, place]] + batch.features[pair]
        word = batch.labels[pair, masking, place]
        cost.append(-(hidden @ model.words.T).log_softmax(0)[word].item())
    return sum(cost) / len(cost)


def test_words_alone_are_learnt_at_their_places_and_padding_of_the_list_is_not(step):
    batch = batch_of()
    model, loss, values = step(batch, {"mlm": 1.0})
    assert values.keys() == {"loss", "mlm"}
    assert loss.item() == values["mlm"].item() == near(masked_words_by_hand(model, batch))


# ---- TAGS-DC


def retrieved_of():
    images = (torch.tensor([[1, 2], [2, 0]]), torch.tensor([[True, True], [True, False]]))
    texts = (torch.tensor([[2, 1], [0, 2]]), torch.tensor([[True, False], [True, True]]))
    return tagsdc.Retrieved(*images), tagsdc.Retrieved(*texts)


def written_of(batch):
    """Two sentences of pair 0, one of pair 1, which ran out; one word differs in each."""
    own = batch.input_ids[:2, None].expand(2, 2, 4)
    sentences = torch.where(torch.arange(4) == 2, (own % 8) + 1, own).clone()
    valid = torch.tensor([[True, True], [True, False]])
    sentences[1, 1] = own[1, 1]
    return Negatives(sentences, valid, torch.where(sentences != own, own, -1))


def test_retrieved_negatives_of_both_kinds(step):
    batch = batch_of()
    model, loss, values = step(batch, {"hard": 2.0}, retrieved=retrieved_of())
    by_image = hinges(model, batch, [(0, 0, 1), (0, 0, 2), (1, 1, 2)])
    by_text = hinges(model, batch, [(0, 2, 0), (1, 0, 1), (1, 2, 1)])
    assert values["hard_image"].item() == near(by_image)
    assert values["hard_text"].item() == near(by_text)
    assert values["hard"].item() == near(by_image + by_text)
    assert loss.item() == near(2 * values["hard"].item())
    positive = [score(model, batch, row, row).sigmoid().item() for row in (0, 1)]
    assert values["positive"].item() == near(sum(positive) / 2)
    pairs = ((2, 0), (0, 1), (2, 1))
    scores = [score(model, batch, text, image).sigmoid().item() for text, image in pairs]
    assert values["retrieved"].item() == near(sum(scores) / 3)


ALL = {"hard": 1.0, "tags": 0.5, "mlm": 0.25, "wod": 0.125, "woc": 2.0}


def test_the_five_terms_and_their_sum(step):
    batch = batch_of()
    written = written_of(batch)
    model, loss, values = step(batch, ALL, retrieved=retrieved_of(), written=written)
    sentences = written.sentences
    kept = [(0, sentences[0, 0], 0), (0, sentences[0, 1], 0), (1, sentences[1, 0], 1)]
    assert values["tags"].item() == near(hinges(model, batch, kept))
    scores = [score(model, batch, text, image).sigmoid().item() for _, text, image in kept]
    assert values["synthetic"].item() == near(sum(scores) / 3)
    assert values["kept"].item() == 0.75
    wod = 0.0
    woc = 0.0
    for pair, text, _ in kept:
        hidden = model.words[text] + batch.features[pair]  # (T, 3)
        for place, word in enumerate(batch.input_ids[pair].tolist()):
            log_p = hidden[place, :2].log_softmax(0)
            wrong = text[place] != word
            wod -= log_p[0].item() if wrong else 0.11 * log_p[1].item()
            if wrong:
                woc -= (2 * hidden[place] @ model.words.T).log_softmax(0)[word].item()
    assert values["wod"].item() == near(wod / 12), "a sentence that is not valid has no say"
    assert values["woc"].item() == near(woc / 3)
    assert values["mlm"].item() == near(masked_words_by_hand(model, batch))
    assert loss.item() == near(sum(ALL[name] * values[name].item() for name in ALL))


def test_a_term_without_weight_is_not_worked_out(step):
    batch = batch_of()
    for names in (["hard"], ["hard", "mlm", "wod"], ["hard", "tags"], ["hard", "woc"]):
        weights = dict.fromkeys(names, 1.0)
        _, _, values = step(batch, weights, retrieved=retrieved_of(), written=written_of(batch))
        assert values.keys() & {*ALL, "itm"} == set(names)


def test_what_the_log_shows_has_no_gradient_and_the_loss_has(step):
    batch = batch_of()
    _, loss, values = step(batch, ALL, retrieved=retrieved_of(), written=written_of(batch))
    assert loss.requires_grad and not any(value.requires_grad for value in values.values())
    assert all(value.shape == () for value in values.values())


def test_replaced_words_are_all_taken_with_their_labels():
    B, H, T, D = 2, 3, 6, 4
    words = torch.randn(B, H, T, D)
    masked = torch.full((B, 2, T), -1)
    masked[0, 0, 1:4] = 5  # three words of a masking at most
    labels = torch.full((B, H, T), -1)
    labels[0, 0, [1, 3]] = torch.tensor([7, 8])
    labels[1, 2, 5] = 9
    taken, found = tagsdc.replaced_words(words, labels, masked)
    assert taken.shape == (B, H, 3, D) and found.shape == (B, H, 3)
    pairs = {
        (label.item(), *word.tolist())
        for label, word in zip(found.flatten(), taken.flatten(0, 2))
        if label >= 0
    }
    expected = {
        (labels[where].item(), *words[where].tolist())
        for where in ((0, 0, 1), (0, 0, 3), (1, 2, 5))
    }
    assert pairs == expected


def test_nothing_waits_for_a_device(step):
    """Tensors of the device "meta" have no numbers: to ask for one, as would halt a GPU, is an
    error."""

    def on_meta(tensors):
        return [tensor.to("meta") for tensor in tensors]

    whole = batch_of()
    batch = tagsdc.Batch(*on_meta(whole))._replace(labels=whole.labels)
    retrieved = [tagsdc.Retrieved(*on_meta(kind)) for kind in retrieved_of()]
    written = Negatives(*on_meta(written_of(whole)))
    _, loss, values = step(batch, ALL, retrieved=retrieved, written=written)
    assert all(value.shape == () for value in values.values())
    loss.backward()
    every = batch_of(B=3)
    batch = tagsdc.Batch(*on_meta(every))
    loss, _ = tagsdc.contrast_step(Toy().to("meta"), batch, {"mlm": 0.5, "contrast": 1.0}, SETTINGS)
    loss.backward()
