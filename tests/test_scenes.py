"""Scenes and wordings of the built-in model's recipe, and the judge that knows what was asked for."""

import re

import numpy as np
import pytest

from flux.recipes import emoji
from flux.recipes.emoji import subjects
from flux.recipes.tiny import judge, recipe, scenes, wording
from flux.recipes.tiny.scenes import Scene

needs_font = pytest.mark.skipif(not emoji.FONT.is_file(), reason="needs the font Noto Color Emoji")
NAMES = list(subjects())[: recipe.SUBJECTS]


@pytest.fixture(scope="module")
def drawn() -> list[Scene]:
    rng = np.random.default_rng(0)
    return [scenes.draw_scene(rng, NAMES) for _ in range(3000)]


def test_boxes_lie_in_the_picture_on_the_grid_and_apart(drawn):
    assert {scene.canvas for scene in drawn} == set(scenes.CANVASES)
    for scene in drawn:
        corners, (height, width) = scene.corners(), scene.canvas
        assert len(corners) == len(scene.subjects)
        for x, y in corners:
            assert (x % 8, y % 8, scene.side % 16) == (0, 0, 0)
            assert 0 <= x <= width - scene.side
            assert 0 <= y <= height - scene.side
        assert all(
            max(abs(a[0] - b[0]), abs(a[1] - b[1])) >= scene.side
            for i, a in enumerate(corners)
            for b in corners[:i]
        )


def test_no_scene_is_held_out_and_a_tenth_would_be(drawn):
    assert not any(scene.held_out for scene in drawn)
    every = [Scene((name,), colour, "large", "left", (64, 64)) for name in NAMES for colour in scenes.COLOURS]
    assert 0.08 < np.mean([scene.held_out for scene in every]) < 0.12


def test_a_composition_is_held_out_as_its_scene_is():
    for composition in emoji.compositions(True, NAMES[:20]):
        assert judge.scene_of(composition).held_out


@needs_font
def test_a_scene_of_64_pixels_is_the_compositions_picture():
    for composition in (
        emoji.Composition(("red apple",), "blue", "small", "right"),
        emoji.Composition(("owl",), "pink", "large", "bottom"),
        emoji.Composition(("key", "bus"), "red", "small", "pair"),
    ):
        expected = emoji.Renderer()(composition)
        assert np.array_equal(scenes.render(emoji.Renderer(), judge.scene_of(composition)), expected)


@needs_font
def test_a_data_set_of_scenes_is_the_same_again():
    first, again = scenes.Scenes(50), scenes.Scenes(50)
    assert list(first.texts(7)) == list(again.texts(7))
    assert len(set(first.texts(7))) > 4
    assert first.texts(7)[3] == list(first.texts(7))[3] == first.texts(7)[3:4][0]
    assert np.array_equal(first.picture(7), again.picture(7))
    assert [first.picture(i).shape[:2] for i in range(9)] == first.sizes[:9]


# --- wording ---


def test_descriptions_say_all_that_is_not_plain(drawn):
    rng = np.random.default_rng(1)
    for scene in drawn[:800]:
        text = wording.describe(scene, rng).lower()
        assert any(noun in text or wording.plural(noun) in text for noun in wording.nouns(scene.subjects[0]))
        assert (scene.size == "small" and len(scene.subjects) == 1) <= any(w in text for w in wording.SMALL)
        if scene.place in ("left", "right", "top", "bottom"):
            assert scene.place in text
        if len(scene.subjects) > 1 and len(set(scene.subjects)) == 1:
            assert re.search(r"\b(two|2|pair|couple|three|3)\b", text)
        assert "  " not in text
        assert not re.search(r"\ba ([aio]|e[^w]|hour)|\ban ([^aeioh]|ew)", text), text


def test_descriptions_are_as_people_write(drawn):
    rng = np.random.default_rng(2)
    texts = [wording.describe(scene, rng) for scene in drawn for _ in range(2)]
    without_ground = np.mean(
        [not any(c in text.lower() for c in ("background", " on ", "backdrop")) for text in texts]
    )
    assert 0.2 < without_ground < 0.4
    assert 0.08 < np.mean([text[0].isupper() for text in texts]) < 0.3
    assert any(text.isupper() for text in texts)
    assert any("car" in text.split() for text in texts)


@pytest.mark.parametrize(
    ("noun", "several"),
    [
        ("dog", "dogs"),
        ("slice of pizza", "slices of pizza"),
        ("cherry", "cherries"),
        ("fish", "fish"),
        ("fox", "foxes"),
        ("mouse", "mice"),
        ("monkey", "monkeys"),
        ("grapes", "grapes"),
        ("tomato", "tomatoes"),
        ("flamingo", "flamingos"),
        ("steam train", "steam trains"),
    ],
)
def test_plurals(noun, several):
    assert wording.plural(noun) == several


def test_a_synonym_belongs_to_one_subject():
    every = [noun for name in subjects() for noun in wording.nouns(name)]
    assert len(every) == len(set(every))


def test_natural_prompts_are_no_training_captions(drawn):
    rng = np.random.default_rng(3)
    seen = {wording.describe(scene, rng) for scene in drawn}
    prompts = judge.natural_prompts(400)
    assert not {text for text, _ in prompts} & seen
    assert all(any(noun in text.lower() for noun in wording.nouns(name)) for text, name in prompts)


# --- judge ---


@needs_font
def test_likeness_is_of_the_box_alone():
    scene = Scene(("owl",), "blue", "small", "left", (64, 128))
    true = scenes.render(emoji.Renderer(), scene)
    outside = true.copy()
    outside[:, 40:] = 0
    other = scenes.render(emoji.Renderer(), Scene(("key",), "blue", "small", "left", (64, 128)))
    found = judge.likeness([true, outside, other], [scene] * 3)
    assert found.ssim[:2] == pytest.approx([1, 1])
    assert found.psnr[0] == found.psnr[1] > 70
    assert found.ssim[2] < 0.6
    assert "SSIM median 1.000, worst tenth below" in str(found)


@needs_font
@pytest.mark.parametrize("canvas", [(64, 64), (128, 128), (64, 128)])
def test_the_subject_of_a_picture_whatever_its_background(canvas):
    judged, render = judge.SubjectJudge(canvas), emoji.Renderer()
    noise = np.random.default_rng(0).normal(0, 10, (*canvas, 3))
    for name, colour in (("owl", "beige"), ("pizza", "navy"), ("key", "gold")):
        picture = scenes.render(render, Scene((name,), colour, "large", "centre", canvas))
        assert judged(np.clip(picture + noise, 0, 255).astype(np.uint8)) == name


def test_the_page_has_forty_prompts():
    assert len(set(judge.page_prompts())) == 40
