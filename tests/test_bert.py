"""A published BERT as a start: the same numbers for text alone, the parts it lacks, damaged files."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import read

from model import Config, TagsDC, read_bert, read_safetensors

SHARED = Path(__file__).resolve().parents[2] / "shared"
MINILM = SHARED / "real" / "minilm"
CONFIG = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "vocab_size": 120,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
}
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}
NEW = ("region.", "matching.", "discrimination.")  # what no BERT has


@pytest.fixture(scope="session")
def bert():
    """A random BERT's outputs, and its published state dict under `state/`. Not to be changed."""
    return read("bert_random.npz")


@pytest.fixture(scope="session")
def weights(bert):
    names = [name for name in bert if name.startswith("state/")]
    return {name.removeprefix("state/"): bert[name] for name in names}


def safetensors_bytes(weights, **changes):
    """A .safetensors file; changes: {name: what its entry in the header says instead}."""
    header = {"__metadata__": {"format": "pt"}}
    numbers = b""
    for name, value in weights.items():
        content = value.contiguous().view(torch.uint8).numpy().tobytes()
        place = [len(numbers), len(numbers) + len(content)]
        header[name] = {
            "dtype": DTYPES[value.dtype],
            "shape": list(value.shape),
            "data_offsets": place,
        }
        numbers += content
    for name, change in changes.items():
        header[name].update(change)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + numbers


def write_folder(folder, weights, kind="safetensors", words=120, **fields):
    """A BERT as it is published; fields: of config.json, None leaves a field out."""
    folder.mkdir(exist_ok=True)
    config = {key: value for key, value in (CONFIG | fields).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "vocab.txt").write_text("".join(f"word{i}\n" for i in range(words)))
    if kind == "safetensors":
        (folder / "model.safetensors").write_bytes(safetensors_bytes(weights))
    else:
        torch.save(weights, folder / "pytorch_model.bin")
    return folder


@torch.no_grad()
def text_alone(model, ids, mask):
    """Hidden states and masked-LM logits of captions all of whose regions are masked out; the
    regions are noise, zero where the text is masked out."""
    B, T = ids.shape
    features = torch.randn(B, 3, model.config.feature_size)
    nothing = torch.zeros(B, 3, dtype=torch.bool)
    hidden = model(ids, features, torch.rand(B, 3, 7), mask, nothing)[:, :T]
    return hidden * mask[..., None], model.fill(hidden) * mask[..., None]


def assert_close(found, expected):
    assert (found - expected).abs().max().item() < 2e-5


# ---- the same numbers


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_text_alone_agrees_with_bert(bert, weights, tmp_path, kind):
    folder = write_folder(tmp_path / "bert", weights, kind)
    model = TagsDC.from_bert(folder, feature_size=6).eval()
    hidden, logits = text_alone(model, bert["ids"], bert["mask"])
    assert_close(hidden, bert["hidden"])
    assert_close(logits, bert["logits"])


def test_text_alone_agrees_with_minilm():
    """Its heads are 32 wide, which only config.json says; its numbers are float16."""
    if not MINILM.exists():
        pytest.skip("the shared BERT is not here")
    with np.load(SHARED / "golden" / "bert_minilm.npz") as arrays:
        golden = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    model = TagsDC.from_bert(MINILM, feature_size=6).eval()
    assert (model.config.heads, model.config.hidden, model.config.layers) == (12, 384, 6)
    hidden, _ = text_alone(model, golden["ids"], golden["mask"])
    assert_close(hidden, golden["hidden"])


def no_prefix(name):
    return name.removeprefix("bert.")


def old_norms(name):
    if "LayerNorm" in name:
        return name.replace(".weight", ".gamma").replace(".bias", ".beta")
    return name


def wrapped(name):
    return f"module.{name}"


@pytest.mark.parametrize("rename", [no_prefix, old_norms, wrapped])
def test_published_names_of_any_age_are_understood(bert, weights, rename):
    model = TagsDC(Config.from_bert(CONFIG, 6)).eval()
    report = model.load_bert({rename(name): value for name, value in weights.items()})
    hidden, logits = text_alone(model, bert["ids"], bert["mask"])
    assert_close(hidden, bert["hidden"])
    assert_close(logits, bert["logits"])
    assert report["ignored"] == []


@pytest.mark.parametrize("bias", ["cls.predictions.bias", "cls.predictions.decoder.bias"])
def test_the_bias_of_words_may_stand_at_either_place_alone(bert, weights, bias):
    """As may the decoder be left out, which is the word embeddings."""
    left_out = {"cls.predictions.bias", "cls.predictions.decoder.bias"} - {bias}
    left_out.add("cls.predictions.decoder.weight")
    model = TagsDC(Config.from_bert(CONFIG, 6)).eval()
    given = {name: value for name, value in weights.items() if name not in left_out}
    model.load_bert(given | {bias: weights["cls.predictions.bias"]})
    assert_close(text_alone(model, bert["ids"], bert["mask"])[1], bert["logits"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_taken_as_float32(weights, tmp_path, dtype):
    half = {name: value.to(dtype) for name, value in weights.items()}
    model = TagsDC.from_bert(write_folder(tmp_path / "bert", half), feature_size=6)
    name = "bert.embeddings.word_embeddings.weight"
    assert torch.equal(model.text.word.weight, half[name].float())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


# ---- the parts that BERT lacks


def test_the_report_names_what_begins_at_random(weights):
    model = TagsDC(Config.from_bert(CONFIG, 6))
    beside = {
        "bert.embeddings.position_ids": torch.arange(40)[None],
        "cls.seq_relationship.weight": torch.ones(2, 32),
    }
    pooler = {
        "bert.pooler.dense.weight": torch.ones(32, 32),
        "bert.pooler.dense.bias": torch.ones(32),
    }
    report = model.load_bert({**weights, **beside, **pooler})
    ours = [name for name, _ in model.named_parameters()]
    assert report["initialised"] == [name for name in ours if name.startswith(NEW)]
    assert report["ignored"] == ["cls.seq_relationship.weight", "uniter.embeddings.position_ids"]
    assert "uniter.pooler.dense.weight" in report["loaded"]
    assert (model.pooler.weight == 1).all()


def test_pooler_and_word_heads_begin_at_random_where_there_are_none(weights):
    model = TagsDC(Config.from_bert(CONFIG, 6))
    encoder = {name: value for name, value in weights.items() if not name.startswith("cls.")}
    report = model.load_bert(encoder)
    new = (*NEW, "pooler.", "mlm.", "correction.")
    ours = [name for name, _ in model.named_parameters()]
    assert report["initialised"] == [name for name in ours if name.startswith(new)]
    assert not any("cls." in name or "correction" in name for name in report["loaded"])


@pytest.mark.parametrize("head", [True, False])
def test_correction_starts_as_a_copy_of_the_masked_lm_head(weights, head):
    model = TagsDC(Config.from_bert(CONFIG, 6))
    model.load_bert({k: v for k, v in weights.items() if head or not k.startswith("cls.")})
    for mlm, correction in zip(model.mlm.parameters(), model.correction.parameters()):
        assert torch.equal(mlm, correction)
        assert mlm.data_ptr() != correction.data_ptr()


def test_new_parts_start_as_uniters_code_starts_them(weights):
    model = TagsDC(Config.from_bert(CONFIG, feature_size=600))
    for parameter in model.parameters():
        parameter.data.fill_(9.0)
    model.load_bert({k: v for k, v in weights.items() if not k.startswith("cls.")})
    for linear in (model.region.feature, model.pooler, model.mlm.transform):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.1)
    for bias in (model.region.box.bias, model.matching.bias, model.mlm.bias):
        assert (bias == 0).all()
    for norm in (model.region.feature_norm, model.region.box_norm, model.region.norm):
        assert (norm.weight == 1).all() and (norm.bias == 0).all()
    assert (model.mlm.norm.weight == 1).all()
    kinds = weights["bert.embeddings.token_type_embeddings.weight"]
    assert torch.equal(model.token_type.weight, kinds), "type 1 is that of regions"


def test_a_bert_without_a_part_is_refused_and_nothing_changes(weights):
    model = TagsDC(Config.from_bert(CONFIG, 6))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    part = "encoder.layer.1.attention.self.key.bias"
    with pytest.raises(ValueError, match=part):
        model.load_bert({name: value for name, value in weights.items() if part not in name})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_load_uniter_says_that_a_bert_has_no_regions(weights):
    advice = "no region embeddings: to start from a plain BERT, give the folder"
    with pytest.raises(ValueError, match=advice):
        Config.from_uniter(weights)
    with pytest.raises(ValueError, match=advice):
        TagsDC(Config.from_bert(CONFIG, 6)).load_uniter(weights)


# ---- config.json and vocab.txt


@pytest.mark.parametrize(
    "field, value",
    [
        ("model_type", "roberta"),
        ("model_type", "albert"),
        ("model_type", "distilbert"),
        ("hidden_act", "relu"),
        ("hidden_act", "gelu_new"),
        ("position_embedding_type", "relative_key"),
        ("layer_norm_eps", 1e-5),
        ("is_decoder", True),
    ],
)
def test_relatives_of_bert_are_refused_in_one_line(weights, tmp_path, field, value):
    folder = write_folder(tmp_path / "bert", weights, **{field: value})
    with pytest.raises(ValueError, match=f"{field} .*{value}.*there is wanted") as fault:
        TagsDC.from_bert(folder, feature_size=6)
    assert "\n" not in str(fault.value)


@pytest.mark.parametrize("value", [None, 0, -4, 4.0, "4", True])
def test_a_size_that_is_missing_or_none_is_named(weights, tmp_path, value):
    folder = write_folder(tmp_path / "bert", weights, num_attention_heads=value)
    with pytest.raises(ValueError, match="num_attention_heads.*whole number"):
        TagsDC.from_bert(folder, feature_size=6)


def test_a_vocabulary_of_another_size_is_refused(weights, tmp_path):
    folder = write_folder(tmp_path / "bert", weights, words=121)
    with pytest.raises(ValueError, match=r"\(120, 32\), not \(121, 32\).*vocabulary"):
        TagsDC.from_bert(folder, feature_size=6)


def test_rows_that_pad_the_vocabulary_to_a_multiple_of_8_are_left_out(weights, tmp_path):
    model = TagsDC.from_bert(write_folder(tmp_path / "bert", weights, words=117), feature_size=6)
    rows = weights["bert.embeddings.word_embeddings.weight"]
    assert torch.equal(model.text.word.weight, rows[:117])


def test_without_a_vocabulary_file_config_json_says_the_size(weights, tmp_path):
    folder = write_folder(tmp_path / "bert", weights)
    (folder / "vocab.txt").unlink()
    assert TagsDC.from_bert(folder, feature_size=6).config.vocab_size == 120
    folder = write_folder(tmp_path / "bert", weights, vocab_size=130)
    (folder / "vocab.txt").unlink()
    with pytest.raises(ValueError, match="vocabulary"):
        TagsDC.from_bert(folder, feature_size=6)


# ---- files


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "all"])
def test_a_folder_that_lacks_a_file_is_refused_in_one_line(weights, tmp_path, missing):
    folder = write_folder(tmp_path / "bert", weights)
    for path in list(folder.iterdir()):
        if missing in ("all", path.name):
            path.unlink()
    with pytest.raises(FileNotFoundError, match="a BERT is a folder with config.json") as fault:
        TagsDC.from_bert(folder, feature_size=6)
    assert "\n" not in str(fault.value)


@pytest.mark.parametrize("content", ["", "{", "[]", "\udcff"])
def test_a_damaged_config_is_named(weights, tmp_path, content):
    folder = write_folder(tmp_path / "bert", weights)
    (folder / "config.json").write_text(content, errors="surrogateescape")
    with pytest.raises(ValueError, match="config.json: ") as fault:
        TagsDC.from_bert(folder, feature_size=6)
    assert "\n" not in str(fault.value)


def test_weights_that_are_more_than_numbers_are_not_unpickled(weights, tmp_path):
    folder = write_folder(tmp_path / "bert", weights)
    (folder / "model.safetensors").unlink()
    for content in (b"", b"not weights", b"PK\x03\x04"):
        (folder / "pytorch_model.bin").write_bytes(content)
        with pytest.raises(ValueError, match="pytorch_model.bin: damaged"):
            TagsDC.from_bert(folder, feature_size=6)
    torch.save({"model": Path("a class that is none of torch's")}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin: damaged, or not"):
        TagsDC.from_bert(folder, feature_size=6)


TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.arange(4), "c": torch.ones(2).half()}


def test_safetensors_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors_bytes(TENSORS))
    found = read_safetensors(path)
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)
    assert all(found[name].dtype == TENSORS[name].dtype for name in TENSORS)


@pytest.mark.parametrize(
    "change",
    [
        {"data_offsets": [0, 32]},  # numbers of another tensor
        {"data_offsets": [24, 60]},  # more than the shape says
        {"data_offsets": [24, 48]},  # fewer
        {"data_offsets": [10**18, 10**18 + 32]},  # beyond the end
        {"data_offsets": [56, 24]},  # backwards
        {"data_offsets": [24]},
        {"data_offsets": "here"},
        {"shape": [2**40, 2**40]},
        {"shape": [-1, -4]},
        {"shape": [1.5]},
        {"shape": None},
        {"dtype": "F8_E4M3"},
        {"dtype": []},
    ],
    ids=str,
)
def test_safetensors_that_lie_are_refused_in_one_line(tmp_path, change):
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors_bytes(TENSORS, b=change))
    with pytest.raises(ValueError, match="x.safetensors: cut off or damaged at .*again") as fault:
        read_safetensors(path)
    assert "\n" not in str(fault.value)


def test_safetensors_cut_off_anywhere_or_too_long_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    whole = safetensors_bytes(TENSORS)
    contents = [whole[:size] for size in range(0, len(whole), 7)]
    contents += [whole[:-1], whole + b"0", b"\xff" * 8 + whole[8:], whole[:8] + b"[1]" + whole[11:]]
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(ValueError, match="x.safetensors: cut off or damaged"):
            read_safetensors(path)


def test_read_bert_gives_what_a_model_is_made_of(weights, tmp_path):
    config, state, vocab_size = read_bert(write_folder(tmp_path / "bert", weights))
    assert config == CONFIG
    assert state.keys() == weights.keys()
    assert vocab_size == 120
