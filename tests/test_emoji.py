"""The generator of the built-in model's pictures and captions."""

import hashlib

import numpy as np
import pytest
from PIL import Image

from flux.errors import FluxError
from flux.recipes import emoji
from flux.recipes.emoji import Composition

needs_font = pytest.mark.skipif(not emoji.FONT.is_file(), reason="needs the font Noto Color Emoji")


def test_subjects_are_many_and_distinct():
    table = emoji.subjects()
    assert len(table) >= 200
    assert len({character for character, _ in table.values()}) == len(table)
    assert all(len(character) == 1 for character, _ in table.values())


@pytest.mark.parametrize(
    ("composition", "caption"),
    [
        (Composition(("red apple",), "blue", "large", "centre"), "a red apple on a blue background"),
        (Composition(("red apple",), "orange", "large", "centre"), "a red apple on an orange background"),
        (Composition(("owl",), "red", "large", "top"), "an owl at the top of a red background"),
        (Composition(("owl",), "red", "small", "left"), "a small owl on the left of a red background"),
        (Composition(("unicorn",), "pink", "large", "right"), "a unicorn on the right of a pink background"),
        (Composition(("grapes",), "white", "small", "centre"), "small grapes on a white background"),
        (Composition(("owl", "key"), "gray", "small", "pair"), "an owl and a key on a gray background"),
    ],
)
def test_plainest_caption(composition, caption):
    assert emoji.captions(composition)[0] == caption


def test_captions_tell_compositions_apart():
    """No caption may belong to two pictures: what it leaves out must not matter."""
    owners: dict[str, Composition] = {}
    for held_out in (True, False):
        for composition in emoji.compositions(held_out, ["owl", "grapes", "red apple"]):
            for caption in emoji.captions(composition):
                assert owners.setdefault(caption, composition) == composition


def test_parse_is_the_inverse_of_captions():
    for composition in emoji.compositions(True)[::7] + emoji.compositions(False)[::50]:
        assert {emoji.parse(caption) for caption in emoji.captions(composition)} == {composition}
    names = list(emoji.subjects())
    for first, second in zip(names, reversed(names), strict=True):
        pair = Composition((first, second), "orange", "small", "pair")
        assert {emoji.parse(caption) for caption in emoji.captions(pair)} == {pair}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a red apple",
        "a red apple on a blue sky",
        "a red apple on a blue background, framed",
        "a red pear on a blue background",
        "a red apple and an owl on the left of a blue background",
    ],
)
def test_other_texts_are_no_captions(text):
    assert emoji.parse(text) is None


def test_one_in_ten_is_held_out_and_never_drawn():
    held, trained = emoji.compositions(True), emoji.compositions(False)
    assert 0.08 < len(held) / (len(held) + len(trained)) < 0.12
    rng = np.random.default_rng(0)
    drawn = [emoji.draw_composition(rng) for _ in range(3000)]
    assert not any(composition.held_out for composition in drawn)
    assert {c.place for c in drawn} == {*emoji.PLACES, emoji.PAIR}
    assert {c.colour for c in drawn} == set(emoji.COLOURS)


def test_held_out_does_not_depend_on_the_process():
    flags = "".join(str(int(c.held_out)) for c in emoji.compositions(True) + emoji.compositions(False))
    assert emoji.Composition(("red apple",), "red", "small", "left").held_out == (
        hashlib.blake2b(b"red apple|red|left", digest_size=4).digest()[0] % 10 == 0
    )
    assert flags == "1" * flags.count("1") + "0" * flags.count("0")


@needs_font
def test_every_subject_is_one_glyph_within_its_box():
    render = emoji.Renderer()
    for name in emoji.subjects():
        alpha = render.glyph(name, 32)[..., 3]
        assert (alpha > 128).mean() > 0.04, name  # drawn at all
        assert max(alpha[0].max(), alpha[-1].max(), alpha[:, 0].max(), alpha[:, -1].max()) < 250, name


@needs_font
def test_subjects_look_different():
    render = emoji.Renderer()
    small = np.stack([render(Composition((n,), "gray", "small", "centre")) for n in emoji.subjects()])
    flat = small[:, 16:48, 16:48].reshape(len(small), -1).astype(np.float32)
    for i in range(len(flat) - 1):
        distances = np.sqrt(np.square(flat[i + 1 :] - flat[i]).mean(axis=1))
        assert distances.min() > 10, list(emoji.subjects())[i]


@needs_font
@pytest.mark.parametrize("place", emoji.PLACES)
@pytest.mark.parametrize("size", emoji.SIZES)
def test_the_subject_stands_where_the_caption_says(size, place):
    composition = Composition(("red apple",), "blue", size, place)
    picture = emoji.Renderer()(composition)
    assert picture.shape == (64, 64, 3)
    rows, columns = np.nonzero((picture != emoji.COLOURS["blue"]).any(axis=-1))
    x, y = emoji.corners(composition)[0]
    side = emoji.SIZES[size]
    assert x % 8 == 0  # the grid of the latent
    assert y % 8 == 0
    assert x <= columns.min() and columns.max() < x + side  # noqa: PT018
    assert y <= rows.min() and rows.max() < y + side  # noqa: PT018
    middle = ((columns.min() + columns.max()) / 2 - 31.5, (rows.min() + rows.max()) / 2 - 31.5)
    expected = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1), "centre": (0, 0)}[place]
    reach = (64 - side) / 2
    assert middle == pytest.approx((expected[0] * reach, expected[1] * reach), abs=3)


@needs_font
def test_pairs_stand_side_by_side():
    picture = emoji.Renderer()(Composition(("red apple", "banana"), "blue", "small", "pair"))
    single = emoji.Renderer()(Composition(("red apple",), "blue", "small", "left"))
    assert np.array_equal(picture[:, :32], single[:, :32])
    assert (picture[16:48, 32:] != emoji.COLOURS["blue"]).any()


@needs_font
def test_the_same_seed_gives_the_same_folder(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        emoji.write_folder(tmp_path / name, 5, seed)
    contents = {
        name: [(file.name, file.read_bytes()) for file in sorted((tmp_path / name).iterdir())]
        for name in "abc"
    }
    assert contents["a"] == contents["b"]
    assert contents["a"] != contents["c"]
    lines = (tmp_path / "a" / "captions.tsv").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 5
    assert Image.open(tmp_path / "a" / lines[0].split("\t")[0]).size == (64, 64)
    assert "Open Font License" in (tmp_path / "a" / "LICENCE").read_text(encoding="utf-8")


def test_bad_input_is_named(tmp_path):
    with pytest.raises(FluxError, match=r"nowhere\.ttf is missing"):
        emoji.Renderer(tmp_path / "nowhere.ttf")
    with pytest.raises(FluxError, match="--count 0"):
        emoji.write_folder(tmp_path, 0, 0)
