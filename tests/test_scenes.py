"""The embedded world: its captions are true, its oracle is right, its regions see pixels only, and it depends on the seed alone."""
import hashlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ImageChops, ImageOps

import data as world
from data import Scene, Thing, describe_crops, describes, draw, identification_ceiling, load_scenes, make_scenes

SIZES = {"train": 60, "val": 100}


@pytest.fixture(scope="module")
def made():
    """{split: [(scene, [(words, phrases)], features, boxes)]}"""
    return {split: list(make_scenes(0, split, size)) for split, size in SIZES.items()}


def sentences(made, split):
    return [(" ".join(words), scene) for scene, captions, *_ in made[split] for words, _ in captions]


def thing(words, x, y, radius=0.08):
    """thing("large plain red circle", ...): size, pattern, colour, shape."""
    size, pattern, colour, shape = words.split()
    return Thing(shape=shape, colour=colour, size=size, pattern=pattern, x=x, y=y, radius=radius)


# ---- a second opinion: the geometry of one-clause captions, from the objects alone ----

def fits(name, objects):
    """Which objects "a large red circle" may mean: each of its words is one of theirs."""
    return [o for o in objects if set(name.split()[1:]) <= {o.shape, o.colour, o.size, o.pattern}]


def in_hole(a, b):
    """The four sides of the box of a lie in the hole of b: a frame's is 0.66 of its width, a ring's (round) at most 0.75."""
    return b.shape in ("ring", "frame") and b.x - 0.75 * b.radius < a.x - a.radius and a.x + a.radius < b.x + 0.75 * b.radius and (
        b.y - 0.75 * b.radius < a.y - a.radius and a.y + a.radius < b.y + 0.75 * b.radius)


GEOMETRY = {"left of": lambda a, b: a.x < b.x, "right of": lambda a, b: a.x > b.x, "above": lambda a, b: a.y < b.y,
            "below": lambda a, b: a.y > b.y, "inside": in_hole,
            "touching": lambda a, b: a.x - a.radius < b.x + b.radius and b.x - b.radius < a.x + a.radius and
            a.y - a.radius < b.y + b.radius and b.y - b.radius < a.y + a.radius and not in_hole(a, b) and not in_hole(b, a)}


def second_opinion(caption, objects):
    """Whether "a ... RELATION a ..." holds, or None if the caption is of another form."""
    for relation, holds in GEOMETRY.items():
        for verb in ("", " is", " sits", " lies"):
            for link in (f"{verb} {relation} ", f"{verb} to the {relation} "):
                first, found, second = caption.partition(link)
                if found and all(name.startswith("a ") and " a " not in name and " and " not in name and " on " not in name
                                 and name.split()[-1] in world.SHAPES for name in (first, second)):
                    return any(a is not b and holds(a, b) for a in fits(first, objects) for b in fits(second, objects))
    return None


def test_captions_are_true_to_an_independent_geometry(made):
    seen = {relation: 0 for relation in GEOMETRY}
    for caption, scene in sentences(made, "train") + sentences(made, "val"):
        opinion = second_opinion(caption, scene.objects)
        assert opinion is not False, caption
        for relation in GEOMETRY:
            seen[relation] += opinion is True and relation in caption
    assert min(seen.values()) >= 5, seen


def test_every_named_object_and_background_is_there(made):
    for caption, scene in sentences(made, "train"):
        assert describes(caption, scene) is True
        assert "background" not in caption or caption.endswith(f"on a {scene.background} background")
        words = caption.split()
        for i, word in enumerate(words):                             # each single noun with the words back to its article
            if word in world.SHAPES and "same" not in words[max(i - 3, 0):i]:
                start = max(j for j in range(i) if words[j] == "a")
                assert fits(" ".join(words[start:i + 1]), scene.objects), caption


# ---- the world ----

def test_scenes_are_varied_and_lie_in_the_picture(made):
    scenes = [scene for split in made.values() for scene, *_ in split]
    assert {len(scene.objects) for scene in scenes} == {2, 3, 4, 5}
    for o in itertools.chain(*(scene.objects for scene in scenes)):
        assert o.radius < min(o.x, o.y) and max(o.x, o.y) < 1 - o.radius
    for attribute, values in world.ATTRIBUTES.items():
        assert {getattr(o, attribute) for scene in scenes for o in scene.objects} == set(values)
    assert {scene.background for scene in scenes} == set(world.BACKGROUNDS)


def test_five_different_captions_in_many_forms(made):
    for split in made.values():
        for _, captions, *_ in split:
            texts = {" ".join(words) for words, _ in captions}
            assert len(captions) == len(texts) == 5 and all(6 <= len(text.split()) <= 16 for text in texts)
    forms = {world.PIECES.sub(lambda piece: piece.lastgroup, text) for text, _ in sentences(made, "train")}
    assert len(forms) >= 12, forms


def test_vocabulary_has_sixty_words(made):
    words = {word for split in made for text, _ in sentences(made, split) for word in text.split()}
    assert len(words) >= 60, len(words)


CLOSED = {"a", "the", "is", "are", "there", "sits", "lies", "and", "to", "on", "background"}


def test_phrases_lie_in_the_caption_and_leave_closed_words_alone(made):
    kinds = set()
    for split in made.values():
        for words, phrases in itertools.chain(*(captions for _, captions, *_ in split)):
            positions = [i for phrase in phrases for i in phrase]
            assert len(positions) == len(set(positions)) and set(positions) <= set(range(len(words))) and all(phrases)
            kinds |= {" ".join(words[i] for i in phrase) for phrase in phrases}
            outside = [word for i, word in enumerate(words) if i not in positions]
            assert set(outside) <= CLOSED | {"of", "same", "as", "the"}, words       # what carries meaning can be masked
            assert not any("_" in word or "*" in word or "?" in word for word in words)
    assert not kinds & CLOSED and {"left of", "left", "inside", "red", "circle", "two", "same size as", "between"} <= kinds


def differences(a, b):
    """Which single changes lead from the objects of one scene to those of another, object by object."""
    changed = [(p, q) for p, q in zip(a.objects, b.objects) if p != q]
    if len(changed) == 1:
        (p, q), = changed
        return [name for name in ("shape", "colour", "size", "pattern") if getattr(p, name) != getattr(q, name)] + (
            ["place"] if (p.x, p.y) != (q.x, q.y) else []) + (
            ["radius"] if p.radius != q.radius and p.size == q.size else [])
    (p, q), (r, s) = changed                                         # two objects changed places, and nothing else
    assert p._replace(x=0, y=0) == q._replace(x=0, y=0) and r._replace(x=0, y=0) == s._replace(x=0, y=0)
    assert (p.x, p.y) == (s.x, s.y) and (r.x, r.y) == (q.x, q.y)
    return ["swap"]


def test_twins_differ_in_one_thing_and_no_caption_fits_two_of_a_family(made):
    kinds = set()
    for start in range(0, SIZES["val"], 5):
        family = made["val"][start:start + 5]
        for (scene, captions, *_), (other, *_) in itertools.permutations(family, 2):
            assert scene.objects != other.objects and scene.background == other.background
            assert not any(describes(" ".join(words), other) for words, _ in captions)
        for twin, *_ in family[1:]:
            assert len(differences(family[0][0], twin)) == 1
            kinds.update(differences(family[0][0], twin))
    assert kinds == {"shape", "colour", "size", "pattern", "place", "swap"}


def test_captions_identify(made):
    captions, scenes = zip(*sentences(made, "val"))
    text, image = identification_ceiling([scene for scene, *_ in made["val"]], captions, np.arange(500) // 5)
    assert 90 <= min(text, image) <= max(text, image) <= 100


def test_the_ceiling_of_one_who_guesses_among_ties():
    circle, star = (Scene([thing(f"large plain red {shape}", 0.5, 0.5)], "white", 0) for shape in ("circle", "star"))
    captions = ["there is a red circle", "there is a red star", "there is a circle"]
    text, image = identification_ceiling([circle, star, circle], captions, [0, 1, 2])
    # pictures: the first and the third fit both captions, one of them its own; captions: likewise two pictures
    assert text == image == pytest.approx(100 * (1 / 2 + 1 + 1 / 2) / 3)


# ---- the oracle on scenes made by hand ----

ROOM = Scene([thing("large plain red circle", 0.2, 0.2, 0.13), thing("small striped red circle", 0.8, 0.2),
              thing("large dotted blue ring", 0.5, 0.75, 0.18), thing("small plain green star", 0.5, 0.75, 0.07),
              thing("small checked blue square", 0.48, 0.22)], "grey", 0.0)


@pytest.mark.parametrize("caption, truth", [
    ("a red circle left of a blue square", True), ("a blue square left of a large red circle", False),
    ("a green star is inside a blue ring", True), ("a blue ring is inside a green star", False),
    ("a green star inside a blue square", False), ("a green star touching a blue ring", False),
    ("a blue square to the right of a large circle", True), ("above a ring sits a red circle", True),
    ("a ring is below a square and a circle", True), ("a square between a large circle and a small circle", True),
    ("a large circle is between a square and a small circle", False),
    ("two red circles above a ring", True), ("two circles and a star on a grey background", True),
    ("two circles and a star on a white background", False), ("two red circles are left of a square", False),
    ("two plain red circles above a ring", False), ("three red circles above a ring", False),
    ("there are two shapes and a star", False), ("there are two blue shapes and a star", True),
    ("a square is the same colour as a ring", True), ("a square is the same shape as a ring", False),
    ("there is a small large circle and a star", False), ("there is a red blue circle and a star", False),
    ("there is a small striped red circle and a star", True), ("there is a striped red small circle and a star", True),
    ("there is a star and a star", False), ("there is a circle and a circle", True),
    ("a large circle above a ring and left of a square", True), ("a large circle above a ring and right of a square", False)])
def test_the_oracle_by_hand(caption, truth):
    assert describes(caption, ROOM) is truth


@pytest.mark.parametrize("caption", [
    "", " ", "a red", "red circle", "a circle above", "above a circle", "a circle a square", "the of a circle",
    "a circle above above a ring", "a dog above a circle", "a circle between a ring", "a circle above a ring ",
    "two circle above a ring", "a circles above a ring",
    "a circle on a red background", "a circle above a ring on a grey background on a grey background",
    "a circle is the same red as a ring"])
def test_what_does_not_parse(caption):
    assert describes(caption, ROOM) is None


def test_a_count_is_exact():
    def room(n):
        circles = [thing("small plain red circle", 0.1 + 0.2 * i, 0.2) for i in range(n)]
        return Scene([*circles, thing("large plain blue ring", 0.4, 0.7)], "white", 0)
    assert [describes("two red circles are above a ring", room(n)) for n in (1, 2, 3)] == [False, True, False]
    assert [describes("a red circle is above a ring", room(n)) for n in (0, 1, 3)] == [False, True, True]


# ---- pictures and regions ----

def test_pictures_show_what_the_scene_says():
    picture = np.asarray(draw(ROOM), int)
    assert picture.shape == (112, 112, 3)
    for o in (ROOM.objects[0], ROOM.objects[3]):                     # the plain ones: their colour is at their centre
        assert abs(picture[round(112 * o.y), round(112 * o.x)] - world.COLOURS[o.colour]).max() < 4
    assert abs(picture[0, 0] - world.BACKGROUNDS["grey"]).max() < 4
    assert np.asarray(draw(ROOM, 60)).shape == (60, 60, 3)
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 30       # anti-aliased: shades between the 8 colours of this one


def test_each_attribute_changes_the_picture():
    before = draw(ROOM)
    changes = dict(shape="heart", colour="cyan", pattern="checked", radius=0.1, x=0.3, y=0.3)
    for name, value in changes.items():
        changed = Scene([ROOM.objects[0]._replace(**{name: value}), *ROOM.objects[1:]], "grey", 0.0)
        assert ImageChops.difference(before, draw(changed)).getbbox(), name


def test_features_are_those_of_the_pixels_alone(made):
    counts = set()
    for scene, _, features, boxes in made["train"][:20]:
        counts.add(len(boxes))
        assert features.dtype == np.float16 and boxes.dtype == np.float32 and features.shape == (len(boxes), 256)
        assert len(scene.objects) + 2 <= len(boxes) <= len(scene.objects) + 4 and boxes[0].tolist() == [0, 0, 1, 1]
        assert 0 <= boxes.min() and boxes.max() <= 1 and abs(features).max() <= 1 and (boxes[:, 2:] > boxes[:, :2]).all()
        again = describe_crops(draw(scene), boxes)                   # nothing but the picture and the boxes
        assert abs(again - features).max() < 0.02
        recoloured = describe_crops(ImageOps.invert(draw(scene)), boxes)
        assert (abs(recoloured - features).max(1) > 0.1).all()
        for o in scene.objects:                                      # a box a little off each object
            corners = [o.x - o.radius, o.y - o.radius, o.x + o.radius, o.y + o.radius]
            assert abs(boxes - corners).max(1).min() < 0.15 * o.radius + 1e-6
    assert len(counts) >= 4


# ---- the same from run to run ----

def fingerprint(seed, split, size):
    print_of = hashlib.sha256()
    for scene, captions, features, boxes in make_scenes(seed, split, size):
        print_of.update(json.dumps([scene.objects, scene.background, scene.light, captions]).encode())
        print_of.update(features.tobytes() + boxes.tobytes())
    return print_of.hexdigest()


def test_two_processes_make_the_same_world():
    code = "import sys; sys.path[:0] = ['tests', '.']; from test_scenes import fingerprint; print(fingerprint(7, 'val', 5))"
    salted = dict(os.environ, PYTHONHASHSEED="12345")                # sets and dicts of strings must not matter
    other = subprocess.check_output([sys.executable, "-c", code], cwd=Path(world.__file__).parent, env=salted, text=True).strip()
    assert other == fingerprint(7, "val", 5)
    assert len({other, fingerprint(8, "val", 5), fingerprint(7, "test", 5)}) == 3


def contents(data):
    return {split: (own.images, own.rows.tolist(), own.captions, own.image_of_caption.tolist(), own.phrases,
                    [(scene.objects, scene.background, scene.light) for scene in own.scenes]) for split, own in data.splits.items()}


def test_the_cache_is_read_back_unchanged_and_made_again_when_it_must(tmp_path, capsys):
    store, sizes = tmp_path / "data", (6, 2, 1)
    first = load_scenes(3, sizes, store)
    files = {path.name: path.read_bytes() for path in store.iterdir()}
    assert files.keys() == {"regions.bin", "scenes.json"} and capsys.readouterr() == ("", "")
    times = [(store / name).stat().st_mtime_ns for name in sorted(files)]
    second = load_scenes(3, list(sizes), store)
    assert [(store / name).stat().st_mtime_ns for name in sorted(files)] == times            # nothing was made again
    assert contents(first) == contents(second) and first.tokenizer.tokens == second.tokenizer.tokens
    for made, kept in zip(first.image("val", [0, 1]), second.image("val", [0, 1])):
        assert torch.equal(made, kept)

    harms = [lambda: (store / "scenes.json").write_text("{"), lambda: (store / "scenes.json").unlink(),
             lambda: (store / "regions.bin").unlink(), lambda: (store / "regions.bin").write_bytes(files["regions.bin"][:-9]),
             lambda: (store / "scenes.json").write_text("[]")]
    for harm in harms:
        harm()
        assert contents(load_scenes(3, sizes, store)) == contents(first)
        assert {path.name: path.read_bytes() for path in store.iterdir()} == files
    for seed, other in ((4, sizes), (3, (5, 2, 1))):                # another world in the same folder
        assert contents(load_scenes(seed, other, store)) != contents(first)
    assert contents(load_scenes(3, sizes, store)) == contents(first)


def test_an_interrupted_world_goes_on(tmp_path, monkeypatch):
    whole = contents(load_scenes(5, (6, 1, 1), tmp_path / "whole"))

    def killed(*arguments):
        for i, item in enumerate(make_scenes(*arguments)):
            if i == 4:
                raise KeyboardInterrupt
            yield item

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(world, "make_scenes", killed)
        load_scenes(5, (6, 1, 1), tmp_path / "cut")
    assert not (tmp_path / "cut/scenes.json").exists() and not (tmp_path / "cut/regions.bin").exists()
    assert contents(load_scenes(5, (6, 1, 1), tmp_path / "cut")) == whole
    for name in ("regions.bin", "scenes.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_the_phrases_of_a_scene_are_those_of_its_grammar_and_text_parses_none(tmp_path, monkeypatch):
    data = load_scenes(3, (2, 1, 5), tmp_path)
    monkeypatch.setattr(world, "parse_phrases", None)                # a call would fail
    ids, member = data.text("test", range(25)), data.phrases("test", range(25))
    assert ids.shape == member.shape[::2]
    for c, (words, phrases) in enumerate(data.splits["test"].phrases):
        assert [row.nonzero()[:, 0].tolist() for row in member[c] if row.any()] == [[i + 1 for i in at] for at in phrases]
        assert " ".join(words) == data.splits["test"].captions[c]
