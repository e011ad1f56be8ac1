"""The embedded world: its captions are true, its oracle is right, its regions see pixels only, and
it depends on the seed alone."""

import hashlib
import inspect
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops, ImageOps

import data as world
from data import Scene, Thing, describe_crops, describes, draw, load_scenes, make_scenes, paraphrase

ATTRIBUTES = ("size", "pattern", "colour", "shape")


@pytest.fixture(scope="module")
def made():
    """{split: [(scene, five captions)]}"""
    return {"train": make_scenes(0, "train", 150), "val": make_scenes(0, "val", 150)}


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    return load_scenes(3, (150, 20, 10), tmp_path_factory.mktemp("world") / "data")


def sentences(made, split):
    return [(caption, scene) for scene, captions in made[split] for caption in captions]


def thing(words, x, y):
    """thing("large plain red circle", ...): size, pattern, colour, shape."""
    return Thing(*words.split(), x, y)


# ---- a second opinion: the words of a caption one after the other, without the grammar ----------

# The side of the first thing that the second lies on, as an angle, x to the right and y down.
ANGLES = {"left": 0, "above": 90, "right": 180, "below": -90}


def naive_truth(caption, scene):
    """Cuts the caption at its relation and counts the pairs of things that fit it."""
    words = caption.removeprefix("there is ").split()
    if words[-1] == "background":
        if words[-2] != scene.background:
            return False
        words = words[:-4]
    cut = next(n for n, word in enumerate(words) if word in (*ANGLES, "and"))
    told = words[cut]
    first = words[1:cut]
    second = words[cut + 1 :][words[cut + 1] == "of" :][1:]
    pairs = 0
    for a in scene.objects:
        for b in scene.objects:
            looks = all(w in a for w in first) and all(w in b for w in second)
            angle = math.degrees(math.atan2(b.y - a.y, b.x - a.x))
            turn = abs((angle - ANGLES.get(told, 0) + 180) % 360 - 180)
            pairs += a is not b and looks and (told == "and" or turn < 45)
    return bool(pairs > 0)


def test_captions_are_true_and_the_oracle_agrees_with_a_naive_checker(made):
    pairs = sentences(made, "train") + sentences(made, "val")
    assert all(describes(caption, scene) is True for caption, scene in pairs)
    seen = {True: 0, False: 0}
    for caption, _ in pairs[::4]:
        for _, other in pairs[::61]:
            seen[naive_truth(caption, other)] += 1
            assert describes(caption, other) is naive_truth(caption, other), caption
    assert min(seen.values()) > 20


def test_every_change_of_a_word_is_judged_as_the_naive_checker_does(made):
    seen = {True: 0, False: 0}
    for caption, scene in sentences(made, "val")[::5]:
        words = caption.split()
        for n, word in enumerate(words):
            for kind in world.KINDS.values():
                for other in kind if word in kind else ():
                    changed = " ".join([*words[:n], other, *words[n + 1 :]])
                    truth = describes(changed, scene)
                    if truth is not None:
                        seen[truth] += 1
                        assert truth is naive_truth(changed, scene), changed
    assert seen[False] > 4 * seen[True] > 0


# ---- the world ----------------------------------------------------------------------------------


def test_scenes_are_varied_and_lie_in_the_picture(made):
    scenes = [scene for split in made.values() for scene, _ in split]
    things = [thing for scene in scenes for thing in scene.objects]
    assert {len(scene.objects) for scene in scenes} == {2, 3, 4}
    for attribute in ATTRIBUTES:
        assert {getattr(thing, attribute) for thing in things} == set(world.KINDS[attribute])
    assert {scene.background for scene in scenes} == set(world.BACKGROUNDS)
    for thing in things:
        assert world.SIZES[thing.size] < min(thing.x, thing.y)
        assert max(thing.x, thing.y) < 1 - world.SIZES[thing.size]


def test_two_things_stand_apart_in_one_direction_and_relations_are_inverse(made):
    seen = set()
    for scene, _ in made["train"]:
        for a, b in itertools.permutations(scene.objects, 2):
            reach = world.SIZES[a.size] + world.SIZES[b.size]
            assert max(abs(a.x - b.x), abs(a.y - b.y)) > reach
            held, back = world.direction(a, b), world.direction(b, a)
            opposite = {"left of": "right of", "above": "below"}
            opposite |= {b: a for a, b in opposite.items()}
            assert back == opposite[held]
            first, second = " ".join(a[:4]), " ".join(b[:4])
            told = [r for r in world.RELATIONS if describes(f"a {first} {r} a {second}", scene)]
            unlike = len({thing[:4] for thing in scene.objects}) == len(scene.objects)
            assert not unlike or told == [held, "and"]
            seen.add(held)
    assert len(seen) == 4


def test_five_different_captions_of_5_to_16_words_in_three_forms(made):
    forms = set()
    for split in made.values():
        for _, captions in split:
            assert len(captions) == len(set(captions)) == 5
    for caption, _ in sentences(made, "train"):
        assert 5 <= len(caption.split()) <= 16
        assert not {"a a", "a i", "a o"} & {caption[n : n + 3] for n in range(len(caption))}
        forms.add((caption.startswith("there is"), caption.endswith("background")))
    assert forms == {(False, False), (True, False), (False, True)}
    lengths = [len(caption.split()) for caption, _ in sentences(made, "train")]
    assert min(lengths) <= 6 and max(lengths) >= 15


def test_vocabulary_has_forty_words_and_a_word_is_of_one_kind(made):
    words = {word for split in made for text, _ in sentences(made, split) for word in text.split()}
    assert len(words) >= 40, len(words)
    kinds = [word for kind in world.KINDS.values() for word in kind]
    assert len(kinds) == len(set(kinds))
    assert words - set(kinds) == {"a", "of", "on", "background", "there", "is"}
    assert set(kinds) <= words


def test_phrases_are_the_words_that_carry_meaning(made):
    for caption, _ in sentences(made, "train"):
        words = caption.split()
        phrases = world.phrases_of(caption)
        positions = [n for phrase in phrases for n in phrase]
        assert positions == sorted(set(positions))
        outside = [word for n, word in enumerate(words) if n not in positions]
        assert set(outside) <= {"a", "on", "background", "there", "is"}
        for phrase in phrases:
            text = " ".join(words[n] for n in phrase)
            attribute = any(text in world.KINDS[kind] for kind in world.KINDS if kind != "relation")
            assert attribute or text in world.RELATIONS


def test_phrases_align_with_the_tokens(stored):
    ids = stored.text("train", range(50))
    member = stored.phrases("train", range(50))
    assert member.shape[::2] == ids.shape
    for c in range(50):
        caption = stored.splits["train"].captions[c]
        words = ["[CLS]", *caption.split(), "[SEP]"]
        assert [stored.tokenizer.tokens[i] for i in ids[c] if i != stored.tokenizer.pad_id] == words
        found = [row.nonzero()[:, 0].tolist() for row in member[c] if row.any()]
        assert found == [[n + 1 for n in phrase] for phrase in world.phrases_of(caption)]


# ---- near-twins and ceilings --------------------------------------------------------------------


def identification_ceiling(split):
    """R@1 of one who knows all and guesses among ties: {"ceiling_tr_r1", "ceiling_ir_r1"}."""
    true = [[describes(text, scene) is True for scene in split.scenes] for text in split.captions]
    true = torch.tensor(true)  # (C, I)
    own = true & (split.image_of_caption[:, None] == torch.arange(len(split.scenes)))
    tr = own.sum(0) / true.sum(0)
    ir = own.sum(1) / true.sum(1)
    return {"ceiling_tr_r1": 100 * tr.mean().item(), "ceiling_ir_r1": 100 * ir.mean().item()}


def differences(a, b):
    """What leads from the things of one scene to those of another: attributes, place or swap."""
    changed = [(p, q) for p, q in zip(a.objects, b.objects) if p != q]
    if len(changed) == 1:
        p, q = changed[0]
        names = [name for name in ATTRIBUTES if getattr(p, name) != getattr(q, name)]
        return names + ["place"] * ((p.x, p.y) != (q.x, q.y))
    (p, q), (r, s) = changed  # two things changed places, and nothing else
    assert p[:4] == q[:4] and r[:4] == s[:4]
    assert p[4:] == s[4:] and r[4:] == q[4:]
    return ["swap"]


def test_twins_differ_in_one_thing_and_no_caption_fits_two_of_a_family(made):
    kinds = set()
    for start in range(0, len(made["val"]), 5):
        family = made["val"][start : start + 5]
        for (scene, captions), (other, _) in itertools.permutations(family, 2):
            assert scene.objects != other.objects and scene.background == other.background
            assert not any(describes(caption, other) for caption in captions)
        for twin, _ in family[1:]:
            found = differences(family[0][0], twin)
            assert len(found) == 1
            kinds.update(found)
    assert kinds == {*ATTRIBUTES, "place", "swap"}


class Gallery:
    """What identification_ceiling looks at."""

    def __init__(self, pairs):
        self.captions = [caption for _, captions in pairs for caption in captions]
        self.scenes = [scene for scene, _ in pairs]
        counts = torch.tensor([len(captions) for _, captions in pairs])
        self.image_of_caption = torch.arange(len(pairs)).repeat_interleave(counts)


def test_captions_identify(made):
    ceiling = identification_ceiling(Gallery(made["val"])).values()
    assert 90 <= min(ceiling) <= max(ceiling) <= 100


def test_the_ceiling_of_one_who_guesses_among_ties():
    right = thing("large plain blue ring", 0.8, 0.5)
    circle, star = (
        Scene([thing(f"large plain red {shape}", 0.2, 0.5), right], "white")
        for shape in ("circle", "star")
    )
    captions = [f"a red {shape} and a ring" for shape in ("circle", "star", "circle")]
    pairs = [(scene, [text]) for scene, text in zip((circle, star, circle), captions)]
    # The first and the third picture fit both captions, one of them its own; captions likewise.
    ceiling = identification_ceiling(Gallery(pairs))
    assert [*ceiling.values()] == pytest.approx([100 * (1 / 2 + 1 + 1 / 2) / 3] * 2)


# ---- the oracle by hand -------------------------------------------------------------------------

ROOM = Scene(
    [
        thing("large plain red circle", 0.2, 0.2),
        thing("small striped red circle", 0.8, 0.25),
        thing("large dotted blue ring", 0.45, 0.75),
        thing("small plain green star", 0.48, 0.22),
    ],
    "grey",
)


@pytest.mark.parametrize(
    "caption, truth",
    [
        ("a red circle left of a green star", True),
        ("a green star left of a large red circle", False),
        ("a green star left of a red circle", True),
        ("a green star left of a small striped red circle", True),
        ("there is a star above a blue ring", True),
        ("there is a star below a blue ring", False),
        ("a ring below a star on a grey background", True),
        ("a ring below a star on a white background", False),
        ("a circle and a circle", True),
        ("a star and a star", False),
        ("a large circle and a small circle", True),
        ("a large circle and a large circle", False),
        ("a circle right of a circle", True),
        ("a small circle right of a large circle", True),
        ("a small circle left of a large circle", False),
        ("a small circle above a large circle", False),
        ("a striped green star and a ring", False),
    ],
)
def test_the_oracle_by_hand(caption, truth):
    assert describes(caption, ROOM) is truth
    assert naive_truth(caption, ROOM) is truth


@pytest.mark.parametrize(
    "caption",
    [
        *["", " ", "a red", "red circle", "a circle above", "above a circle", "a circle a square"],
        *["a circle above above a ring", "a dog above a circle", "a circle above a ring "],
        *["a circle left a ring", "a circle above of a ring", "two circles above a ring"],
        "a circle on a red background",
        "a circle above a ring on a grey background on a grey background",
        "a circle above a ring on a red background",
        "there is a circle",
        "a right checked blue ring and a star",
        "a red blue circle and a star",
        "a red small circle and a star",
        "a small large circle and a star",
        "a circle and a circle and a circle",
        "A circle and a star",
    ],
)
def test_what_is_no_sentence(caption):
    assert describes(caption, ROOM) is None
    assert paraphrase(caption) is None


def test_paraphrases_by_hand():
    assert paraphrase("a red star left of a blue ring") == "a blue ring right of a red star"
    assert paraphrase("there is a star and a small ring") == "there is a small ring and a star"
    assert (
        paraphrase("a star below a ring on a grey background")
        == "a ring above a star on a grey background"
    )
    assert paraphrase("a star and a star") is None


def test_a_paraphrase_is_true_of_the_same_scenes_and_leads_back(made):
    scenes = [scene for scene, _ in made["val"]]
    count = 0
    for caption, _ in sentences(made, "val")[::3]:
        turned = paraphrase(caption)
        if turned is not None:
            count += 1
            assert turned != caption and paraphrase(turned) == caption
            for scene in scenes[::7]:
                assert describes(turned, scene) is describes(caption, scene)
    assert count > 200


# ---- pictures and regions -----------------------------------------------------------------------


def test_pictures_show_what_the_scene_says():
    picture = np.asarray(draw(ROOM), int)
    assert picture.shape == (112, 112, 3)
    for o in (ROOM.objects[0], ROOM.objects[3]):  # the plain ones: their colour at their centre
        centre = picture[round(112 * o.y), round(112 * o.x)]
        assert abs(centre - world.COLOURS[o.colour]).max() < 4
    assert abs(picture[0, 0] - world.BACKGROUNDS["grey"]).max() < 4
    ring = ROOM.objects[2]
    hole = picture[round(112 * ring.y), round(112 * ring.x)]
    assert abs(hole - world.BACKGROUNDS["grey"]).max() < 4
    assert np.asarray(draw(ROOM, 60)).shape == (60, 60, 3)
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 20  # anti-aliased


def test_pixels_match_the_attributes_of_many_scenes(made):
    """Without our drawing code: the ground's colour in a corner, and inside the box of a thing its
    own bright colour, nothing of another thing's, and for patterns half of it darker."""
    for scene, _ in made["train"][:30]:
        picture = np.asarray(draw(scene), float)
        assert abs(picture[0, 0] - world.BACKGROUNDS[scene.background]).max() < 2
        for o in scene.objects:
            reach = world.SIZES[o.size]
            rows = slice(int(112 * (o.y - reach)) + 1, int(112 * (o.y + reach)))
            columns = slice(int(112 * (o.x - reach)) + 1, int(112 * (o.x + reach)))
            crop = picture[rows, columns].reshape(-1, 3)
            near = {
                colour: (abs(crop - value).max(1) < 12).mean()
                for colour, value in world.COLOURS.items()
            }
            assert max(near, key=near.get) == o.colour
            dark = (abs(crop - 0.55 * np.array(world.COLOURS[o.colour])).max(1) < 12).mean()
            assert dark > 0.02 or o.pattern == "plain"
            assert dark < 0.01 or o.pattern != "plain"


def test_each_attribute_changes_the_picture():
    before = draw(ROOM)
    changes = dict(size="small", shape="heart", colour="cyan", pattern="checked", x=0.3, y=0.3)
    for name, value in changes.items():
        changed = Scene([ROOM.objects[0]._replace(**{name: value}), *ROOM.objects[1:]], "grey")
        assert ImageChops.difference(before, draw(changed)).getbbox(), name


def test_every_shape_and_pattern_looks_different():
    looks = []
    for shape, pattern in itertools.product(world.KINDS["shape"], world.KINDS["pattern"]):
        one = Scene([Thing("large", pattern, "red", shape, 0.5, 0.5)], "white")
        looks.append(np.asarray(draw(one), np.int16)[36:76, 36:76])  # all of the thing
    for a, b in itertools.combinations(looks, 2):
        assert (abs(a - b).max(-1) > 50).sum() > 40


def regions_of(data, split):
    """Features and things of all regions but the whole picture's, found by their places."""
    features, things = [], []
    content = data.splits[split]
    for n, scene in enumerate(content.scenes):
        own, places, mask = (x[0][1:] for x in data.image(split, [n]))
        for feature, box, real in zip(own, places, mask):
            if real:
                x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
                distances = [abs(o.x - x) + abs(o.y - y) for o in scene.objects]
                features.append(feature)
                things.append(scene.objects[int(np.argmin(distances))])
    return torch.stack(features), things


def test_what_a_thing_is_is_nearly_linear_in_its_features(stored):
    """A ridge regression tells shape, colour, pattern and size from the features."""
    features, things = regions_of(stored, "train")
    new_features, new_things = regions_of(stored, "val")
    for attribute, least in (("shape", 0.97), ("colour", 0.99), ("pattern", 0.97), ("size", 0.97)):
        x, new = features, new_features
        x = torch.cat([x, torch.ones(len(x), 1)], 1).double()
        new = torch.cat([new, torch.ones(len(new), 1)], 1).double()
        kinds = world.KINDS[attribute]
        targets = torch.tensor([[getattr(o, attribute) == k for k in kinds] for o in things])
        weights = torch.linalg.solve(x.T @ x + 0.1 * torch.eye(x.size(1)), x.T @ targets.double())
        guess = (new @ weights).argmax(1).tolist()
        right = [kinds[g] == getattr(o, attribute) for g, o in zip(guess, new_things)]
        assert np.mean(right) > least, (attribute, np.mean(right))


def test_features_are_those_of_the_pixels_alone(stored):
    for n in range(10):
        scene = stored.splits["train"].scenes[n]
        features, boxes, mask = (x[0].numpy() for x in stored.image("train", [n]))
        assert mask.all() and len(boxes) == len(scene.objects) + 1
        assert boxes[0, :4].tolist() == [0, 0, 1, 1]
        assert np.isfinite(features).all() and 0 <= boxes.min() and boxes.max() <= 1
        again = describe_crops(draw(scene), boxes[:, :4])  # nothing but the picture and the boxes
        assert again.shape == features.shape and abs(again - features).max() < 0.02
        inverted = describe_crops(ImageOps.invert(draw(scene)), boxes[:, :4])
        assert (abs(inverted - features).max(1) > 0.1).all()
        for o in scene.objects:  # a box a little off each thing, and around all of it
            reach = world.SIZES[o.size]
            corners = [o.x - reach, o.y - reach, o.x + reach, o.y + reach]
            assert abs(boxes[:, :4] - corners).max(1).min() < 0.3 * reach


def test_any_picture_can_be_described():
    boxes = np.array([[0, 0, 1, 1], [0.25, 0.5, 0.5, 0.75]])
    noise = np.random.default_rng(0).integers(0, 256, (37, 50, 3), dtype=np.uint8)
    for picture in (Image.fromarray(noise), Image.new("RGB", (8, 8), (9, 9, 9))):
        features = describe_crops(picture, boxes)
        assert features.shape[0] == len(boxes) and np.isfinite(features).all()
        assert abs(features).max() < 100


# ---- the same from run to run -------------------------------------------------------------------


def fingerprint(seed, split, size):
    print_of = hashlib.sha256()
    for scene, captions in make_scenes(seed, split, size):
        print_of.update(json.dumps([scene.objects, scene.background, captions]).encode())
        print_of.update(draw(scene).tobytes())
    return print_of.hexdigest()


def test_two_processes_make_the_same_world():
    code = "import hashlib, json\nfrom data import draw, make_scenes\n"
    code += inspect.getsource(fingerprint) + "print(fingerprint(7, 'val', 5))"
    root = Path(world.__file__).parent
    salted = dict(os.environ, PYTHONHASHSEED="12345")  # the order of sets must not matter
    other = subprocess.check_output([sys.executable, "-c", code], cwd=root, env=salted, text=True)
    assert other.strip() == fingerprint(7, "val", 5)
    assert len({other.strip(), fingerprint(8, "val", 5), fingerprint(7, "test", 5)}) == 3


def contents(data):
    """All that a loaded world holds."""
    texts = {name: (s.images, s.captions, s.phrases, s.scenes) for name, s in data.splits.items()}
    numbers = [x for name, s in data.splits.items() for x in data.image(name, range(len(s.images)))]
    return texts, [x.numpy().tobytes() for x in numbers], data.tokenizer.tokens


def test_the_store_is_read_back_unchanged_and_made_again_when_it_must(tmp_path):
    store = tmp_path / "data"
    sizes = (6, 5, 5)
    first = contents(load_scenes(3, sizes, store))
    times = {path: path.stat().st_mtime_ns for path in store.iterdir()}
    assert contents(load_scenes(3, list(sizes), store)) == first
    assert {path: path.stat().st_mtime_ns for path in store.iterdir()} == times  # nothing was made

    (store / "regions.bin").write_text("{")
    assert contents(load_scenes(3, sizes, store)) == first
    for seed, other in ((4, sizes), (3, (5, 5, 5))):  # another world in the same folder
        assert contents(load_scenes(seed, other, store)) != first
    assert contents(load_scenes(3, sizes, store)) == first


def test_an_interrupted_world_is_none(tmp_path, monkeypatch):
    whole = contents(load_scenes(5, (6, 5, 5), tmp_path / "whole"))
    calls = []

    def killed(scene, size=112):
        calls.append(scene)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return draw(scene, size)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(world, "draw", killed)
        load_scenes(5, (6, 5, 5), tmp_path / "cut")
    assert contents(load_scenes(5, (6, 5, 5), tmp_path / "cut")) == whole


def test_a_vocabulary_can_be_given(tmp_path):
    first = load_scenes(3, (6, 5, 5), tmp_path / "data")
    tokens = [*first.tokenizer.tokens, "zebra"]
    assert load_scenes(3, (6, 5, 5), tmp_path / "data", tokens).tokenizer.tokens == tokens
