"""Agreement with the official UNITER / TAGS code (tests/golden), and its weights in and out of our model."""

import copy

import pytest
import torch

import losses
from model import Config, TagsDC

TIED = ("cls.predictions.decoder.weight", "correction_output.predictions.decoder.weight")
WORDS = "uniter.embeddings.word_embeddings.weight"
UNUSED = [
    "itm_output.bias",
    "itm_output.weight",
    "uniter.img_embeddings.mask_embedding.weight",
]  # not in our model
HEADS = ("rank_output.", "disc_output.", "correction_output.")


def kept(weights):
    """The weights that have a place in our model."""
    return {key: value for key, value in weights.items() if key not in UNUSED}


@pytest.fixture(scope="module")
def weights(golden):
    """The official state dict. Not to be changed."""
    return {
        key.removeprefix("param/"): value
        for key, value in golden.items()
        if key.startswith("param/")
    }


def official_model(weights, **changes):
    return TagsDC(
        Config(**{**vars(Config.from_uniter(weights, heads=4, dropout=0.0)), **changes})
    ).eval()


def loaded(weights):
    model = official_model(weights)
    model.load_uniter(weights)
    return model


def batch_of(golden):
    text_mask = torch.arange(golden["input_ids"].size(1)) < golden["text_lens"][:, None]
    region_mask = torch.arange(golden["img_feat"].size(1)) < golden["num_bbs"][:, None]
    return golden["input_ids"], golden["img_feat"], golden["img_pos_feat"], text_mask, region_mask


def bits_equal(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a
    )


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


# ---- the same numbers: outputs


@pytest.fixture(scope="module")
def ours(weights, golden):
    """Our outputs under the official names."""
    model = loaded(weights)
    ids, features, boxes, text_mask, region_mask = batch_of(golden)
    with torch.no_grad():
        hidden = model(ids, features, boxes, text_mask, region_mask)
        words = hidden[:, : ids.size(1)]
        pooled = torch.tanh(model.pooler(hidden[:, 0]))
        texts = model.prepare_text(ids, text_mask)
        images = model.prepare_regions(features, boxes, region_mask)
        return {
            "hidden": hidden,
            "pooled": pooled,
            "rank_scores": model.match(hidden)[:, None],
            "rank_scores_sigmoid": model.match(hidden)[:, None].sigmoid(),
            "itm_logits": pooled @ weights["itm_output.weight"].T + weights["itm_output.bias"],
            "embedding": torch.cat((texts.states, images.states), 1),
            "mlm_logits": model.fill(words),
            "disc_logits": model.discriminate(words),
            "correction_logits": model.correct(words),
        }


def compact(rows, golden):
    """(B, T + R, D) -> the real rows of all pairs in the official layout: a pair's regions follow its text directly."""
    return rows[torch.cat(batch_of(golden)[3:], 1)]


def close(found, expected, tolerance=2e-5):
    """True if no entry differs by more than this; float32 on any CPU gives 5e-6."""
    return (found - expected).abs().max().item() < tolerance


@pytest.mark.parametrize(
    "name, mine", [("embedding_output", "embedding"), ("sequence_output", "hidden")]
)
def test_states_agree_with_the_official_code(ours, golden, name, mine):
    real = golden["attn_masks"] == 1
    assert close(compact(ours[mine], golden), golden[f"out/{name}"][real])


@pytest.mark.parametrize("name", ["pooled", "rank_scores", "rank_scores_sigmoid", "itm_logits"])
def test_pair_outputs_agree_with_the_official_code(ours, golden, name):
    """itm_logits: the official two-way matching output, which our model does not use, on our pooled states."""
    assert ours[name].shape == golden[f"out/{name}"].shape
    assert close(ours[name], golden[f"out/{name}"])


@pytest.mark.parametrize("name", ["mlm_logits", "disc_logits", "correction_logits"])
def test_word_outputs_agree_with_the_official_code(ours, golden, name):
    assert ours[name].shape == golden[f"out/{name}"].shape
    real = batch_of(golden)[3]
    assert close(ours[name][real], golden[f"out/{name}"][real])


@torch.no_grad()
def test_pairs_alone_and_the_fast_path_agree_with_the_official_code(weights, golden):
    """The release runs each pair alone and without padding; ours gives its scores any way."""
    model = loaded(weights)
    scores = golden["out/rank_scores"][:, 0]
    ids, features, boxes, text_mask, region_mask = batch_of(golden)
    row = torch.arange(4)
    texts = model.prepare_text(ids, text_mask)
    images = model.prepare_regions(features, boxes, region_mask)
    assert close(model.score_pairs(texts, row, images, row, 3), scores)
    for i in range(4):
        t = golden["text_lens"][i]
        r = golden["num_bbs"][i]
        pair = ids[i : i + 1, :t], features[i : i + 1, :r], boxes[i : i + 1, :r]
        assert close(model.match(model(*pair, None, None)), scores[i : i + 1])


@torch.no_grad()
def test_words_of_the_first_positions_agree_with_the_official_code(weights, golden):
    model = loaded(weights)
    ids, features, boxes, text_mask, region_mask = batch_of(golden)
    row = torch.arange(4)
    texts = model.prepare_text(ids, text_mask)
    images = model.prepare_regions(features, boxes, region_mask)
    logits = model.fill(model.encode_pairs(texts, row, images, row, ids.size(1)))
    assert close(logits[text_mask], golden["out/mlm_logits"][text_mask])


# ---- the same numbers: losses and gradients


def our_losses(model, golden, golden_losses):
    """{rank, mlm, disc, corr} of the golden batch, computed as its README says."""
    ids, features, boxes, text_mask, region_mask = batch_of(golden)
    hidden = model(ids, features, boxes, text_mask, region_mask)
    words, labels = hidden[:, : ids.size(1)], golden_losses["txt_labels"]
    groups = model.match(hidden).sigmoid().view(-1, golden_losses["sample_size"])
    replaced, original_weight = (
        ids != golden_losses["gt_input_ids"],
        golden_losses["disc_weights"][1].item(),
    )
    return {
        "rank": losses.triplet_loss(
            groups[:, 0], groups[:, 1:], margin=golden_losses["margin"].item()
        ),
        "mlm": losses.masked_lm_loss(model.fill(words), labels),
        "disc": losses.word_discrimination_loss(
            model.discriminate(words), replaced, text_mask, original_weight=original_weight
        ),
        "corr": losses.word_correction_loss(model.correct(words), labels),
    }


def summed(terms, golden_losses, which):
    factors = golden_losses["loss_weights"].tolist() if which == "total" else [1.0] * 4
    return sum(
        factor * terms[name] for factor, name in zip(factors, ("rank", "mlm", "disc", "corr"))
    )


def test_losses_agree_with_the_official_code(weights, golden, golden_losses):
    terms = our_losses(loaded(weights), golden, golden_losses)
    terms.update({which: summed(terms, golden_losses, which) for which in ("total", "unit")})
    official = {
        key[len("loss/") :]: value.item()
        for key, value in golden_losses.items()
        if key.startswith("loss/")
    }
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(
        official, abs=5e-6, rel=0
    )


@pytest.mark.parametrize("which", ["total", "unit"])
def test_gradients_agree_with_the_official_code(weights, golden, golden_losses, which):
    """Under official names: the gradients are put in the place of the weights of a copy, which is then exported."""
    model = loaded(weights)
    summed(our_losses(model, golden, golden_losses), golden_losses, which).backward()
    gradients = copy.deepcopy(model)
    for holder, parameter in zip(gradients.parameters(), model.parameters()):
        holder.data = parameter.grad
    gradients = gradients.export_uniter()
    prefix = f"grad_{which}/"
    official = {
        key.removeprefix(prefix): value
        for key, value in golden_losses.items()
        if key.startswith(prefix)
    }
    assert len(official) == 10
    for name, expected in official.items():
        assert (gradients[name] - expected).abs().max() <= 2e-5 * expected.abs().max(), name


def test_rank_loss_agrees_on_chosen_logits(golden_losses):
    """Groups of five, with inactive hinge terms; per term and on average."""
    scores = (
        golden_losses["aux/rank_logits"].sigmoid().view(-1, golden_losses["aux/rank_sample_size"])
    )
    positive, negatives, official = scores[:, 0], scores[:, 1:], golden_losses["aux/rank_none"]
    assert (official == 0).any()
    mean = losses.triplet_loss(positive, negatives, margin=0.2)
    assert mean.item() == pytest.approx(golden_losses["aux/rank"].item(), abs=5e-6)
    for group, k in ((group, k) for group in range(6) for k in range(4)):
        one = losses.triplet_loss(
            positive[group : group + 1], negatives[group : group + 1, k : k + 1], margin=0.2
        )
        assert one.item() == pytest.approx(official[group, k].item(), abs=5e-6)
    assert torch.equal(
        (negatives <= positive[:, None]).float(), golden_losses["aux/rank_corrects"].float()
    )


def test_word_losses_agree_on_chosen_logits(golden_losses):
    """Among them probabilities under the floor of 1e-10, which cost 23.02585 and have no gradient."""
    replaced = golden_losses["aux/syn_input_ids"] != golden_losses["aux/gt_input_ids"]
    disc_logits = golden_losses["aux/disc_logits"].clone().requires_grad_()
    logits = golden_losses["aux/correction_logits"].clone().requires_grad_()
    labels = golden_losses["aux/txt_labels"]
    disc = losses.word_discrimination_loss(disc_logits, replaced, torch.ones_like(replaced))
    corr = losses.word_correction_loss(logits, labels)
    assert disc.item() == pytest.approx(golden_losses["aux/disc"].item(), abs=5e-6)
    assert corr.item() == pytest.approx(golden_losses["aux/corr"].item(), abs=5e-6)

    per_word = [
        losses.word_correction_loss(row[None], label[None]).item()
        for row, label in zip(logits[labels >= 0], labels[labels >= 0])
    ]
    assert per_word == pytest.approx(golden_losses["aux/corr_none"].tolist(), abs=5e-6)
    per_place = [
        losses.word_discrimination_loss(row[None], r[None], torch.ones(1, dtype=torch.bool)).item()
        for row, r in zip(disc_logits.flatten(0, 1), replaced.flatten())
    ]
    assert per_place == pytest.approx(golden_losses["aux/disc_none"].tolist(), abs=5e-6)

    (disc + corr).backward()
    floored = [golden_losses[f"aux/{name}"] for name in ("corr_none", "disc_none")]
    floored = (
        floored[0] > 23.025,
        (floored[1] > 23.025) | ((floored[1] - 0.11 * 23.02585).abs() < 1e-4),
    )
    assert floored[0].any()
    assert torch.equal(logits.grad[labels >= 0].abs().sum(1) == 0, floored[0])
    assert not disc_logits.grad.flatten(0, 1)[floored[1]].any()


# ---- weights in and out


def test_a_round_trip_changes_no_bit(weights):
    """The same names, shapes, types and bits come out as went in, but for what has no place in our model."""
    before = {key: value.clone() for key, value in weights.items()}
    assert bits_equal(loaded(weights).export_uniter(), kept(weights))
    assert bits_equal(weights, before), "load_uniter changed what it was given"


def test_a_model_trained_here_goes_out_and_back():
    torch.manual_seed(0)
    config = Config(
        vocab_size=30, feature_size=5, hidden=8, layers=2, heads=2, intermediate=12, max_positions=9
    )
    model, other = TagsDC(config), TagsDC(config)
    official = model.export_uniter()
    report = other.load_uniter(official)
    assert bits_equal(other.state_dict(), model.state_dict())
    assert (
        report["loaded"] == sorted(official) and not report["initialised"] and not report["ignored"]
    )


def test_export_has_all_the_official_names_with_the_decoders_tied(weights):
    exported = official_model(weights).export_uniter()
    assert sorted([*exported, *UNUSED]) == sorted(weights)
    assert {key: value.shape for key, value in exported.items()} == {
        key: weights[key].shape for key in exported
    }
    assert all(
        torch.equal(exported[name], exported["uniter.embeddings.word_embeddings.weight"])
        for name in TIED
    )


def test_exported_weights_are_copies(weights):
    model = loaded(weights)
    before = snapshot(model)
    for value in model.export_uniter().values():
        value += 1.0
    assert bits_equal(snapshot(model), before)


def test_loaded_weights_are_copies(weights):
    state = {key: value.clone() for key, value in weights.items()}
    model = loaded(state)
    before = snapshot(model)
    for value in state.values():
        value += 1.0
    assert bits_equal(snapshot(model), before) and bits_equal(model.export_uniter(), kept(weights))


def to_old_names(key):
    key = key.replace("uniter.", "bert.")
    if "LayerNorm." in key or "layer_norm." in key:
        key = key.replace(".weight", ".gamma").replace(".bias", ".beta")
    return key


@pytest.mark.parametrize(
    "rename",
    [to_old_names, "module.{}".format, "model.{}".format, "module.model.{}".format],
    ids=["bert, gamma and beta", "module.", "model.", "module.model."],
)
def test_older_and_wrapped_names_are_understood(weights, rename):
    renamed = {rename(key): value for key, value in weights.items()}
    assert not set(renamed) & {
        key for key in weights if key.startswith("uniter.") and "LayerNorm" in key
    }
    assert Config.from_uniter(renamed, heads=4, dropout=0.0) == Config.from_uniter(
        weights, heads=4, dropout=0.0
    )
    model = official_model(weights)
    report = model.load_uniter(renamed)
    assert report == {
        "loaded": sorted(set(weights) - set(UNUSED)),
        "initialised": [],
        "ignored": UNUSED,
    }
    assert bits_equal(model.export_uniter(), kept(weights))


def test_half_precision_weights_are_taken(weights):
    exported = loaded({key: value.half() for key, value in weights.items()}).export_uniter()
    assert all(
        torch.equal(exported[key], weights[key].half().float())
        for key in set(weights) - set(UNUSED)
    )


def test_the_report_names_what_was_loaded_and_what_was_ignored(weights):
    extra = {**weights, "feat_regress.net.0.weight": torch.ones(3, 3)}
    model = official_model(weights)
    report = model.load_uniter(extra)
    assert report["loaded"] == sorted(set(weights) - set(UNUSED)) and report["initialised"] == []
    assert report["ignored"] == sorted([*UNUSED, "feat_regress.net.0.weight"])
    assert bits_equal(model.export_uniter(), kept(weights)), "what was ignored goes out again"


def test_an_untied_decoder_goes_out_tied(weights):
    name = TIED[0]
    model = official_model(weights)
    model.load_uniter({**weights, name: weights[name] + 1})
    assert bits_equal(model.export_uniter(), kept(weights))


# ---- missing heads


def pretrained(weights):
    """Pre-trained UNITER: no heads of TAGS."""
    return {key: value for key, value in weights.items() if not key.startswith(HEADS)}


def test_missing_heads_start_from_uniters_own(weights):
    """As in the release: matching takes the "match" row of the two-way output, discrimination a copy of both rows, correction a
    copy of the masked-LM head."""
    model = official_model(weights)
    report = model.load_uniter(pretrained(weights))
    out = model.export_uniter()
    assert torch.equal(out["rank_output.weight"], weights["itm_output.weight"][1:])
    assert torch.equal(out["rank_output.bias"], weights["itm_output.bias"][1:])
    for leaf in ("weight", "bias"):
        assert torch.equal(out[f"disc_output.{leaf}"], weights[f"itm_output.{leaf}"])
    masked_lm = [key for key in weights if key.startswith("cls.")]
    assert all(
        torch.equal(out[key.replace("cls.", "correction_output.")], weights[key])
        for key in masked_lm
    )
    assert set(report["initialised"]) >= {
        "rank_output.weight from itm_output.weight",
        "disc_output.bias from itm_output.bias",
        "correction_output.predictions.bias from cls.predictions.bias",
    }
    assert {line.split(".")[0] for line in report["initialised"]} == {
        "rank_output",
        "disc_output",
        "correction_output",
    }
    assert (
        report["loaded"] == sorted(set(pretrained(weights)) - set(UNUSED))
        and report["ignored"] == UNUSED
    )
    assert sorted(out) == sorted(kept(weights))


def test_heads_that_started_alike_are_copies_not_views(weights):
    """Fault of the release: the ranking head was a view of the matching output. Changing one head changes it alone."""
    source = {key: value.clone() for key, value in pretrained(weights).items()}
    model = official_model(weights)
    model.load_uniter(source)
    heads = {
        "rank_output.": model.matching,
        "disc_output.": model.discrimination,
        "correction_output.": model.correction,
        "cls.": model.mlm,
    }
    for official, head in heads.items():
        before = model.export_uniter()
        with torch.no_grad():
            for parameter in head.parameters():
                parameter += 1.0
        changed = {
            key
            for key, value in model.export_uniter().items()
            if not torch.equal(value, before[key])
        }
        assert changed == {key for key in weights if key.startswith(official)} - set(TIED)
    assert bits_equal(source, pretrained(weights)), (
        "training changed the weights it was started from"
    )


def test_a_trained_ranking_head_is_taken_though_the_matching_output_is_there_too(weights):
    """Fault of the release (init_output): it always overwrote the trained ranking head with the matching row. Stage 1
    of TAGS has a ranking head and neither of the other two."""
    stage_1 = {key: value for key, value in weights.items() if not key.startswith(HEADS[1:])}
    model = official_model(weights)
    report = model.load_uniter(stage_1)
    out = model.export_uniter()
    assert torch.equal(out["rank_output.weight"], weights["rank_output.weight"])
    assert torch.equal(out["disc_output.weight"], weights["itm_output.weight"])
    assert not any(line.startswith("rank_output") for line in report["initialised"])


def test_heads_without_any_source_keep_what_they_had(weights):
    """A text-image encoder alone is enough; the report says that its heads are random."""
    model = official_model(weights)
    before = model.export_uniter()
    report = model.load_uniter(
        {key: value for key, value in weights.items() if key.startswith("uniter.")}
    )
    out = model.export_uniter()
    heads = [key for key in out if not key.startswith("uniter.") and key not in TIED]
    assert all(torch.equal(out[key], before[key]) for key in heads)
    assert sorted(report["initialised"]) == sorted(f"{key} at random" for key in heads)


# ---- weights in wrappers, of other vocabularies, with other things beside them


@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: {"model": weights},
        lambda weights: {"state_dict": weights, "epoch": 3, "optimizer": {"lr": 0.1}},
        lambda weights: {"model": {f"module.{key}": value for key, value in weights.items()}},
        lambda weights: {"model": {"state_dict": weights}},
    ],
    ids=["model", "state_dict", "model, module.", "model, state_dict"],
)
def test_wrapped_weights_are_understood(weights, wrap):
    wrapped = wrap(weights)
    assert Config.from_uniter(wrapped, heads=4) == Config.from_uniter(weights, heads=4)
    model = official_model(weights)
    assert model.load_uniter(wrapped) == official_model(weights).load_uniter(weights)
    assert bits_equal(model.export_uniter(), kept(weights))


def test_what_is_no_weight_beside_the_weights_is_ignored(weights):
    beside = {"epoch": 3, "name": "uniter", "uniter.embeddings.position_ids": torch.arange(64)}
    assert Config.from_uniter({**weights, **beside}) == Config.from_uniter(weights)
    model = official_model(weights)
    report = model.load_uniter({**weights, **beside})
    assert report["ignored"] == sorted([*UNUSED, *beside])
    assert bits_equal(model.export_uniter(), kept(weights))


def padded(weights):
    """As UNITER's pre-training has it: the 211 words stand in 216 rows."""
    vocabulary = [WORDS, *TIED, "cls.predictions.bias", "correction_output.predictions.bias"]
    rows = {key: torch.full((5, *weights[key].shape[1:]), 9.0) for key in vocabulary}
    return {**weights, **{key: torch.cat((weights[key], rows[key])) for key in vocabulary}}


def test_a_vocabulary_padded_to_a_multiple_of_8_is_taken_without_the_padding(weights):
    config = Config.from_uniter(padded(weights), heads=4, dropout=0.0, vocab_size=211)
    assert config == Config.from_uniter(weights, heads=4, dropout=0.0)
    model = official_model(weights)
    report = model.load_uniter(padded(weights))
    assert bits_equal(model.export_uniter(), kept(weights))
    assert report["ignored"] == UNUSED
    assert report["loaded"] == sorted(kept(weights))


def test_a_padded_vocabulary_is_kept_where_no_vocabulary_is_named(weights):
    config = Config.from_uniter(padded(weights), heads=4, dropout=0.0)
    assert config.vocab_size == 216
    model = TagsDC(config)
    assert model.load_uniter(padded(weights))["ignored"] == UNUSED
    assert bits_equal(model.export_uniter(), kept(padded(weights)))


@pytest.mark.parametrize("words", [210, 212, 219, 224])
def test_a_vocabulary_that_is_another_is_refused(weights, words):
    other = {**weights, WORDS: torch.zeros(words, 48)}
    with pytest.raises(ValueError, match="vocabulary"):
        official_model(weights).load_uniter(other)


# ---- what is refused


@pytest.mark.parametrize(
    "state",
    [None, [], [torch.ones(2)], {}, 3, "weights", {"model": {}}, {"state_dict": None}],
    ids=repr,
)
def test_what_holds_no_weights_is_refused_in_one_line(weights, state):
    model = official_model(weights)
    before = snapshot(model)
    with pytest.raises(ValueError, match="UNITER weights") as fault:
        Config.from_uniter(state)
    assert "\n" not in str(fault.value)
    with pytest.raises(ValueError, match="UNITER weights|weights are not complete") as fault:
        model.load_uniter(state)
    assert "\n" not in str(fault.value)
    assert bits_equal(snapshot(model), before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("key", ["uniter.encoder.layer.1.output.dense.bias", "itm_output.weight"])
def test_weights_that_are_not_finite_are_named_and_nothing_changes(weights, key, bad):
    state = pretrained(weights)
    state[key] = state[key].clone()
    state[key].view(-1)[-1] = bad
    model = official_model(weights)
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"{key}.*finite") as fault:
        model.load_uniter(state)
    assert "\n" not in str(fault.value)
    assert bits_equal(snapshot(model), before)


@pytest.mark.parametrize(
    "value", [3, None, [1.0], "x", torch.ones(48, dtype=torch.long), torch.tensor(1.0)], ids=repr
)
def test_what_is_no_tensor_of_floats_is_named_and_nothing_changes(weights, value):
    key = "uniter.encoder.layer.1.output.dense.bias"
    model = official_model(weights)
    before = snapshot(model)
    with pytest.raises(ValueError, match=key) as fault:
        model.load_uniter({**weights, key: value})
    assert "\n" not in str(fault.value)
    assert bits_equal(snapshot(model), before)


@pytest.mark.parametrize(
    "key, shape",
    [
        ("uniter.embeddings.word_embeddings.weight", (200, 48)),
        ("uniter.embeddings.position_embeddings.weight", (32, 48)),
        ("uniter.img_embeddings.img_linear.weight", (48, 21)),
        ("uniter.encoder.layer.1.intermediate.dense.weight", (90, 48)),
        ("uniter.encoder.layer.0.attention.self.query.weight", (40, 48)),
        pytest.param("uniter.encoder.layer.0.attention.self.value.weight", (40, 48)),
        pytest.param("uniter.encoder.layer.0.attention.self.key.weight", (48, 40)),
        ("rank_output.weight", (2, 48)),
        ("cls.predictions.bias", (200,)),
    ],
)
def test_a_shape_that_does_not_fit_is_refused_in_one_line_and_nothing_changes(weights, key, shape):
    model = official_model(weights)
    before = snapshot(model)
    with pytest.raises(ValueError) as fault:
        model.load_uniter({**weights, key: torch.zeros(shape)})
    message = str(fault.value)
    assert (
        all(part in message for part in (key, str(shape), str(tuple(weights[key].shape))))
        and "\n" not in message
    )
    assert bits_equal(snapshot(model), before)


def test_weights_of_another_size_are_refused(weights):
    for size, other in dict(
        vocab_size=100, layers=4, intermediate=64, feature_size=19, max_positions=32
    ).items():
        with pytest.raises(ValueError):
            official_model(weights, **{size: other}).load_uniter(weights)


@pytest.mark.parametrize(
    "key",
    [
        "uniter.encoder.layer.2.output.dense.weight",
        "uniter.encoder.layer.0.attention.self.key.bias",
        "uniter.pooler.dense.bias",
        "uniter.embeddings.word_embeddings.weight",
    ],
)
def test_an_incomplete_encoder_is_refused_and_nothing_changes(weights, key):
    model = official_model(weights)
    before = snapshot(model)
    with pytest.raises(ValueError, match=key) as fault:
        model.load_uniter({name: value for name, value in weights.items() if name != key})
    assert "\n" not in str(fault.value)
    assert bits_equal(snapshot(model), before)


# ---- sizes read off the weights


def test_sizes_are_read_off_the_weights(weights, golden):
    sizes = dict(
        vocab_size=211,
        feature_size=20,
        hidden=48,
        layers=3,
        heads=4,
        intermediate=96,
        max_positions=64,
    )
    assert Config.from_uniter(weights, heads=4, dropout=0.3) == Config(**sizes, dropout=0.3)
    assert Config.from_uniter(pretrained(weights), heads=4) == Config.from_uniter(weights, heads=4)


@pytest.mark.parametrize("preset", ["base", "large"])
def test_heads_are_64_wide_unless_told(preset):
    config = Config.preset(preset, vocab_size=28996)
    with torch.device("meta"):
        official = TagsDC(config).export_uniter()
    assert Config.from_uniter(official) == config
    assert Config.from_uniter(official, heads=8).heads == 8


@pytest.mark.parametrize(
    "state", [{}, {"fc.weight": torch.ones(2, 2)}], ids=["nothing", "something else"]
)
def test_other_weights_are_no_uniter(state):
    with pytest.raises(ValueError, match="not UNITER weights"):
        Config.from_uniter(state)
