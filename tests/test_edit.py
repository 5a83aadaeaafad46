"""A picture that is changed: what the model is given, what is refused, and the result of a tiny pipeline."""

import warnings
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

import flux  # noqa: F401  before mlx.core
from flux.conditioning import Edit, Picture, PictureConditioning
from flux.conditioning.masks import cut
from flux.errors import FluxError

from . import tiny, tiny_pipeline


def picture(*size: int, alpha: np.ndarray | None = None, seed: int = 0, name: str = "") -> Picture:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3)).astype(np.uint8)
    made = Picture.from_array(pixels if alpha is None else np.dstack([pixels, alpha]))
    return Picture(name, made.sha256, made.pixels, made.alpha)


def mask(*box: int, size: tuple[int, int] = (40, 56), value: int = 255, name: str = "m.png") -> Picture:
    pixels = np.zeros((*size, 3), np.uint8)
    cut(pixels, box)[:] = value
    return Picture(name, str((box, size, value)), pixels)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("edit")
    tiny.write_tokenizers(folder)
    return tiny_pipeline.make_pipeline(folder)


def draw(pipeline, edit, **options):
    return pipeline.generate_images("a b", edit=edit, **{"seed": 3, "num_steps": 4} | options)


# --- What is refused ---

SOME = picture(40, 56, name="a.png")


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (Edit(SOME, 1.1), "strength must lie between 0 .* and 1.*, not 1.1"),
        (Edit(SOME, -0.1), "not -0.1"),
        (Edit(SOME, float("nan")), "not nan"),
        (Edit(SOME, fit="squeeze"), "fitted by crop, pad, stretch, not 'squeeze'"),
        (Edit(SOME, mask="beta"), "a picture or 'alpha', not 'beta'"),
        (Edit(SOME, mask="alpha"), r"a\.png has no transparent part"),
        (Edit(SOME, mask=mask(0, 0, 9, 9), feather=-1), "feather must be 0 or more pixels, not -1"),
        (Edit(SOME, mask=mask(0, 0, 9, 9), crop_mask=-3), "'auto' or 0 or more pixels, not -3"),
        (Edit(SOME, mask=mask(0, 0, 0, 0)), r"the mask m\.png is black all over"),
        (Edit(SOME, mask=mask(0, 0, 9, 9, value=9)), r"the mask m\.png is black all over"),
        (Edit(SOME, mask=mask(0, 0, 9, 9, size=(56, 40))), r"the mask m\.png is 56x40 .* picture 40x56"),
        (Edit(SOME, mask=mask(4, 4, 9, 9), grow=-5), "shrunk by 5 pixels, is empty"),
        (Edit(SOME, grow=3), "grow has no effect without a mask"),
        (Edit(SOME, feather=3), "feather has no effect without a mask"),
        (Edit(SOME, crop_mask="auto"), "crop_mask has no effect without a mask"),
        (Edit(SOME, mask=mask(0, 0, 9, 9), feather=2, keep=False), "a feather has no effect where nothing"),
        (Edit(SOME, keep=False), "without a mask nothing"),
        (Edit(SOME, expand=(0, 0, 0, 0)), "at one by more"),
        (Edit(SOME, expand=(0, -8, 0, 0)), "0 or more pixels at each side"),
        (Edit(picture(800, 2700, name="b.png")), r"b\.png is 800x2700 .* --image-size"),
    ],
)
def test_what_is_refused(pipeline, edit, words):
    pipeline.spec = replace(pipeline.spec, image_size=(256, 256))
    with pytest.raises(FluxError, match=words):
        draw(pipeline, edit)


def test_an_opaque_picture_has_an_alpha_that_changes_nothing(pipeline):
    opaque = picture(40, 56, alpha=np.full((40, 56), 255, np.uint8))
    with pytest.raises(FluxError, match="has no transparent part"):
        draw(pipeline, Edit(opaque, mask="alpha"))


# --- What the model is given ---


def test_the_canvas_of_an_expanded_picture():
    canvas = Edit(SOME, expand=(8, 0, 0, 16)).canvas((40, 56), 16)
    assert canvas.whole.shape == (48, 72, 3)
    assert np.array_equal(canvas.whole[8:, 16:], SOME.pixels)
    assert canvas.picture.shape == (48, 80, 3)
    assert (canvas.mask[:8] == 255).all()
    assert (canvas.mask[8:, :16] == 255).all()
    assert not canvas.mask[8:, 16:].any()


def test_growing_an_expansion_repaints_the_border():
    canvas = Edit(SOME, expand=(0, 16, 0, 0), grow=4).canvas((40, 56), 16)
    assert (canvas.mask[:, 52:72] == 255).all()
    assert not canvas.mask[:, :52].any()
    assert np.array_equal(canvas.share > 0, canvas.mask[:40, :72] > 0)


def test_the_transparent_part_as_mask():
    alpha = np.full((40, 56), 255, np.uint8)
    alpha[8:16, 8:24] = 0
    alpha[20, 20] = 100
    canvas = Edit(picture(40, 56, alpha=alpha), mask="alpha").canvas((40, 56), 16)
    assert np.array_equal(canvas.mask[:40, :56], 255 - alpha)
    assert (canvas.picture[8:16, 8:24] == 255).all()  # transparent lies over white


def test_a_fitted_picture_and_its_mask():
    edit = Edit(picture(40, 80), mask=mask(0, 0, 40, 20, size=(40, 80)), fit="crop")
    canvas = edit.canvas((64, 96), 16)
    assert canvas.whole.shape == (64, 96, 3)
    assert (canvas.mask[:, :16] == 255).all()  # 32 of 128 columns were white, of which 16 are cut off
    assert not canvas.mask[:, 16:].any()


def test_a_mask_that_is_cut_off_with_the_picture_is_refused():
    edit = Edit(picture(40, 80), mask=mask(0, 0, 40, 10, size=(40, 80)))
    with pytest.raises(FluxError, match=r"cut with the picture \(fit pad cuts none\), is empty"):
        edit.canvas((64, 64), 16)
    assert replace(edit, fit="pad").canvas((64, 64), 16).mask.any()


def test_a_crop_around_the_mask_is_worked_on_at_the_models_size():
    large = picture(300, 500)
    canvas = Edit(large, mask=mask(100, 200, 20, 30, size=(300, 500)), crop_mask=5).canvas((64, 64), 16)
    assert canvas.picture.shape == (64, 64, 3)
    assert canvas.box == (90, 195, 40, 40)
    assert canvas.whole.shape == (300, 500, 3)


def test_a_large_part_made_small_is_blurred_and_that_is_said():
    large = picture(300, 500)
    edit = Edit(large, mask=mask(10, 20, 90, 90, size=(300, 500)), crop_mask=5)
    with pytest.warns(UserWarning, match="is 100x100 pixels and made as 64x64, .* --image-size"):
        edit.canvas((64, 64), 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        edit.canvas((96, 96), 16)


# --- Steps ---


def test_a_grey_place_is_put_back_until_its_share_of_the_steps():
    """Of 4 steps white changes in all, 0.65 in three, half in two, a quarter in one, black in none."""
    values = mx.array([1.0, 0.65, 0.5, 0.25, 0.0])[None, :, None]
    pictures = PictureConditioning(known=mx.full((1, 5, 1), 3.0), mask=values)
    x, noise, times = mx.full((1, 5, 1), 7.0), mx.full((1, 5, 1), 1.0), [1.0, 0.75, 0.5, 0.25, 0.0]
    after = [pictures.put_back(x, noise, times, step)[0, :, 0].tolist() for step in range(4)]
    # The picture is 3 and the noise 1: as noisy as x is, 1.5, 2, 2.5, 3. Put back before the first free step.
    assert after == [[7, 1.5, 1.5, 1.5, 1.5], [7, 7, 2, 2, 2], [7, 7, 7, 2.5, 2.5], [7, 7, 7, 7, 3]]


# --- Results ---


def test_outside_the_mask_the_result_is_the_picture_to_the_bit(pipeline):
    made = draw(pipeline, Edit(SOME, mask=mask(7, 9, 11, 13)), n_images=2)
    assert made.shape == (2, 40, 56, 3)
    inside = np.zeros((40, 56), bool)
    inside[7:18, 9:22] = True
    for one in made:
        assert np.array_equal(one[~inside], SOME.pixels[~inside])
        assert (one[inside] != SOME.pixels[inside]).mean() > 0.9
    assert not np.array_equal(*made)
    loose = draw(pipeline, Edit(SOME, mask=mask(7, 9, 11, 13), keep=False))[0]
    assert np.array_equal(loose[inside], made[0][inside])
    assert (loose[~inside] != SOME.pixels[~inside]).mean() > 0.5


def test_feather_blends_around_the_mask(pipeline):
    made = draw(pipeline, Edit(SOME, mask=mask(16, 16, 8, 8), feather=4))[0]
    inside = np.zeros((40, 56), bool)
    inside[12:28, 12:28] = True
    assert np.array_equal(made[~inside], SOME.pixels[~inside])
    assert (made[12:16, 16:24] != SOME.pixels[12:16, 16:24]).any()


def test_strength_1_is_the_prompt_alone_and_0_the_autoencoder(pipeline):
    one = picture(48, 64)
    alone = pipeline.generate_images("a b", seed=3, num_steps=4, image_size=(48, 64))
    assert np.array_equal(draw(pipeline, Edit(one, 1.0)), alone)
    assert np.array_equal(
        draw(pipeline, Edit(one)), draw(pipeline, Edit(one, 0.6))
    )  # else it would not count
    latent = pipeline.encode_picture(one.pixels)
    decoded = np.array(pipeline.decode(latent, (6, 8)))[0]
    assert np.abs(draw(pipeline, Edit(one, 0.0))[0] / 255 - decoded).max() <= 1 / 255
    # An all-white mask changes everything, to the bit as none.
    white = mask(0, 0, 48, 64, size=(48, 64))
    assert np.array_equal(draw(pipeline, Edit(one, mask=white)), alone)


def test_a_picture_depends_on_its_seed_alone(pipeline):
    edit = Edit(SOME, 0.7, mask(7, 9, 11, 13))
    several = draw(pipeline, edit, n_images=2)
    assert np.array_equal(several[1], draw(pipeline, edit, seed=4)[0])


def test_weaker_changes_less(pipeline):
    def change(strength: float, grey: int) -> float:
        made = draw(pipeline, Edit(SOME, strength, mask(0, 0, 40, 56, value=grey)), num_steps=8)[0]
        unchanged = draw(pipeline, Edit(SOME, 0.0), num_steps=8)[0]
        return float(np.abs(made.astype(float) - unchanged).mean())

    assert change(1.0, 255) > change(1.0, 128) > change(1.0, 64) > 0
    assert change(1.0, 255) > change(0.5, 255) > change(0.25, 255) > 0
    assert change(0.5, 255) > change(0.5, 128) > 0


def test_a_large_picture_is_changed_within_the_crop(pipeline):
    large = picture(300, 500)
    edit = Edit(large, mask=mask(100, 200, 20, 30, size=(300, 500)), crop_mask="auto", feather=2)
    made = draw(pipeline, edit, image_size=(64, 64))[0]
    assert made.shape == (300, 500, 3)
    changed = (made != large.pixels).any(axis=2)
    rows, columns = np.nonzero(changed)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (98, 121, 198, 231)


@pytest.mark.parametrize(("strength", "line"), [(0.0, "the prompt has no"), (1.0, "the picture has no")])
def test_what_has_no_effect_is_said(pipeline, strength, line):
    with pytest.warns(UserWarning, match=line):
        draw(pipeline, Edit(SOME, strength), num_steps=4)
