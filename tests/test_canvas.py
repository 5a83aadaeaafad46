"""From a picture of any size to the model's and back."""

import numpy as np
import pytest

from flux import images
from flux.conditioning import Edit, Picture, canvas, masks
from flux.errors import FluxError


def picture(*size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3)).astype(np.uint8)


def whole_canvas(size, step=16, mask=None, share=None):
    return canvas.make(picture(*size), mask, share, (0, 0, *size), size, step)


@pytest.mark.parametrize("size", [(64, 64), (1, 1), (61, 70), (16, 33)])
def test_the_result_has_the_pictures_size(size):
    made = whole_canvas(size)
    assert all(side % 16 == 0 for side in made.picture.shape[:2])
    assert all(0 <= new - old < 16 for new, old in zip(made.picture.shape, size, strict=False))
    assert np.array_equal(made.compose(made.picture), made.whole)


def test_the_filling_repeats_the_outermost_pixels():
    made = whole_canvas((30, 20), mask=masks.grow(np.zeros((30, 20), np.uint8), 0))
    assert made.picture.shape == (32, 32, 3)
    assert (made.picture[:30, 20:] == made.whole[:, -1:]).all()
    assert (made.picture[30:, :20] == made.whole[-1:]).all()
    assert made.mask.shape == (32, 32)


def test_compose_changes_the_share_alone():
    share = np.zeros((61, 70), np.uint8)
    share[10:20, 30:69] = 255
    made = whole_canvas((61, 70), share=share)
    result = made.compose(255 - made.picture)
    assert np.array_equal(result[share == 0], made.whole[share == 0])
    assert np.array_equal(result[share == 255], 255 - made.whole[share == 255])


def test_a_box_is_scaled_and_put_back():
    """What is worked on is the box at the model's size; the rest of a large picture stays."""
    whole = np.full((300, 400, 3), 50, np.uint8)
    mask = np.zeros((300, 400), np.uint8)
    mask[100:130, 200:230] = 255
    box = masks.crop_box(mask, 10, 1.0)
    made = canvas.make(whole, mask, masks.feather(mask, 4), box, (64, 64), 16)
    assert made.picture.shape == (64, 64, 3)
    assert made.inner == (64, 64)
    assert masks.bounds(made.mask)[2:] == (39, 39)  # of 64, as 30 of 50
    result = made.compose(np.full((64, 64, 3), 200, np.uint8))
    assert (result[100:130, 200:230] == 200).all()
    assert (result[masks.grow(mask, 4) == 0] == 50).all()
    assert 50 < result[98, 215, 0] < 200


def test_a_box_without_room_keeps_its_aspect():
    whole = picture(100, 400)
    mask = np.zeros((100, 400), np.uint8)
    mask[:, 100:300] = 255
    made = canvas.make(whole, mask, masks.feather(mask, 0), masks.crop_box(mask, 0, 1.0), (64, 64), 16)
    assert made.box == (0, 100, 100, 200)
    assert made.inner == (32, 64)
    assert made.compose(made.picture).shape == whole.shape


def test_a_picture_that_is_too_large_is_named():
    canvas.check_size((256, 256), (64, 64), "a.png")
    with pytest.raises(FluxError, match=r"a\.png is 257x256 .* --image-size .* --crop-mask"):
        canvas.check_size((257, 256), (64, 64), "a.png")


@pytest.mark.parametrize("how", images.FITS)
@pytest.mark.parametrize("size", [(40, 40), (30, 90), (20, 40), (80, 160), (33, 41)])
def test_masks_are_fitted_as_their_pictures(how, size):
    """White in the picture is where the mask is white."""
    mask = np.zeros((60, 120), np.uint8)
    mask[20:40, 50:70] = 255
    fitted = images.fit(np.repeat(mask[..., None], 3, axis=2), size, how)
    aligned = canvas.fit_mask(mask, size, how)
    assert fitted.shape == (*size, 3)
    assert aligned.shape == size
    assert (aligned[fitted[..., 0] > 140] == 255).all()
    assert (masks.grow(np.where(fitted[..., 0] > 20, 255, 0).astype(np.uint8), 2)[aligned > 0] == 255).all()


def test_pad_keeps_the_aspect_and_repeats_edges():
    fitted = images.fit(picture(20, 40), (40, 40), "pad")
    assert (fitted[:10] == fitted[10]).all()
    assert (fitted[30:] == fitted[29]).all()
    assert np.array_equal(fitted[10:30], picture(20, 40))
    assert not canvas.fit_mask(np.full((20, 40), 255, np.uint8), (40, 40), "pad")[:10].any()


def test_stretch_takes_all_of_the_picture():
    source = np.zeros((20, 40, 3), np.uint8)
    source[:, :20] = 255
    fitted = images.fit(source, (40, 40), "stretch")
    assert (fitted[:, :17] > 250).all()
    assert (fitted[:, 23:] < 5).all()


def test_expand():
    source = picture(20, 30)
    wide = canvas.expand(source, (1, 20, 0, 8))
    assert wide.shape == (21, 58, 3)
    assert np.array_equal(wide[1:, 8:38], source)
    assert wide[1:, 38:].std() < source.std()
    mask = canvas.expand_mask(None, (20, 30), (1, 20, 0, 8))
    assert not mask[1:, 8:38].any()
    assert (mask == 255).sum() == 21 * 58 - 20 * 30
    inner = np.zeros((20, 30), np.uint8)
    inner[3, 4] = 99
    assert canvas.expand_mask(inner, (20, 30), (1, 20, 0, 8))[4, 12] == 99


def test_a_flat_picture_expands_flat():
    assert (canvas.expand(np.full((8, 8, 3), 77, np.uint8), (8, 8, 8, 8)) == 77).all()


@pytest.mark.parametrize(
    "changes",
    [{"mask": None}, {"expand": (0, 10, 6, 0)}, {"crop_mask": 3}, {"mask": None, "expand": (5, 0, 0, 9)}],
)
def test_another_picture_is_laid_over_the_whole_one(changes):
    """The whole picture itself lies where it is, whatever is worked on; so does one of another scale."""
    rng = np.random.default_rng(0)
    pixels = np.kron(rng.integers(0, 256, (10, 13, 3)), np.ones((4, 4, 1))).astype(np.uint8)
    mask = np.zeros((40, 52, 3), np.uint8)
    mask[12:20, 30:44] = 255
    edit = Edit(Picture.from_array(pixels), **{"mask": Picture.from_array(mask)} | changes)
    made = edit.canvas((32, 48) if "crop_mask" in changes else (40, 52), 16)
    assert made.over(made.whole).shape == made.picture.shape
    assert np.array_equal(made.over(made.whole), made.picture)
    larger = np.kron(made.whole, np.ones((2, 2, 1), np.uint8))
    assert np.abs(made.over(larger).astype(int) - made.picture).mean() < 12
