"""Masks: read, aligned, grown, feathered, brought to the latent; and what they leave as it is."""

import time

import numpy as np
import pytest

from flux.conditioning import masks
from flux.errors import FluxError


def mask_of(*box: int, size: tuple[int, int] = (40, 50)) -> np.ndarray:
    """White in a box (top, left, height, width)."""
    mask = np.zeros(size, np.uint8)
    masks.cut(mask, box)[:] = 255
    return mask


def test_read_takes_the_brightest_colour_and_cleans_what_jpeg_has_soiled():
    colours = np.array([[[0, 0, 0], [255, 0, 0], [9, 15, 3], [240, 241, 239], [0, 128, 100]]], np.uint8)
    assert masks.read(colours, None).tolist() == [[0, 255, 0, 255, 128]]


def test_what_is_transparent_in_a_mask_stays():
    white = np.full((1, 3, 3), 255, np.uint8)
    assert masks.read(white, np.array([[0, 100, 255]], np.uint8)).tolist() == [[0, 100, 255]]


@pytest.mark.parametrize("size", [(40, 50), (80, 100), (20, 25), (13, 17), (27, 33)])
def test_align(size):
    """The mask's box is where it was, as a share of the picture; none of it is lost."""
    aligned = masks.align(mask_of(10, 20, 8, 10), size, "m.png")
    assert aligned.shape == size
    top, left, height, width = masks.bounds(aligned)
    scale = size[0] / 40
    assert abs(top - 10 * scale) <= 1
    assert abs(left - 20 * scale) <= 1
    assert abs(height - 8 * scale) <= 1
    assert abs(width - 10 * scale) <= 1


@pytest.mark.parametrize("size", [(50, 40), (40, 53), (64, 64), (1000, 1300)])
def test_a_mask_of_another_aspect_is_refused_by_name(size):
    words = rf"the mask m\.png is 40x50 \(height x width\) and its picture {size[0]}x{size[1]}"
    with pytest.raises(FluxError, match=words):
        masks.align(mask_of(0, 0, 1, 1), size, "m.png")


def test_a_black_mask_is_refused_by_name():
    with pytest.raises(FluxError, match=r"the mask m\.png is black all over"):
        masks.check_changes(np.zeros((4, 4), np.uint8), "m.png")
    masks.check_changes(mask_of(0, 0, 1, 1), "m.png")


@pytest.mark.parametrize("size", [(5, 7), (6, 7), (40, 50), (3, 3), (80, 75)])
def test_reduce_loses_no_line_at_any_size(size):
    for row in range(40):
        small = masks.reduce(mask_of(row, 0, 1, 50), size)
        assert small.shape == size
        assert (small == 255).all(axis=1).any()  # a whole line of it


def test_reduce_takes_the_greatest_of_each_cell():
    mask = np.random.default_rng(0).integers(0, 256, (16, 24)).astype(np.uint8)
    expected = mask.reshape(2, 8, 3, 8).max(axis=(1, 3))
    assert np.array_equal(masks.reduce(mask, (2, 3)), expected)
    assert np.array_equal(masks.reduce(mask, (32, 48))[::2, 1::2], mask)


@pytest.mark.parametrize("pixels", [1, 2, 3, 7, 100])
def test_grow_is_the_greatest_within_reach_and_shrink_the_least(pixels):
    mask = np.random.default_rng(1).integers(0, 256, (17, 23)).astype(np.uint8)

    def window(y, x):
        return mask[max(0, y - pixels) : y + pixels + 1, max(0, x - pixels) : x + pixels + 1]

    grown, shrunk = masks.grow(mask, pixels), masks.grow(mask, -pixels)
    for y, x in np.ndindex(mask.shape):
        assert grown[y, x] == window(y, x).max()
        assert shrunk[y, x] == window(y, x).min()
    assert np.array_equal(masks.grow(mask, 0), mask)


def test_feather_is_full_on_the_mask_and_falls_evenly_to_nothing():
    share = masks.feather(mask_of(15, 15, 10, 10), 6)
    assert (masks.cut(share, (15, 15, 10, 10)) == 255).all()
    row = share[20].astype(int)
    assert row[8] == 0
    assert row[32] == 0
    assert row[9] > 0
    assert row[30] > 0
    falls = -np.diff(row[24:32])
    assert (falls > 0).all()
    assert falls.max() - falls.min() <= 255 / 6
    assert np.array_equal(row[24:32], row[15:7:-1])


@pytest.mark.parametrize("pixels", [1, 2, 5, 9, 16])
def test_no_feather_reaches_further_than_asked(pixels):
    mask = mask_of(18, 24, 2, 3)
    share = masks.feather(mask, pixels)
    assert np.array_equal(share > 0, (share > 0) & (masks.grow(mask, pixels) > 0))
    assert (share[mask > 0] == 255).all()
    assert (share > 0).sum() > (mask > 0).sum()


@pytest.mark.parametrize("pixels", [49, 50, 10**7])
def test_a_feather_as_wide_as_the_picture_still_falls(pixels):
    row = masks.feather(mask_of(10, 10, 10, 10), pixels)[15].astype(int)
    assert (row[10:20] == 255).all()
    assert (np.diff(row[:11]) > 0).all()
    assert (np.diff(row[19:]) < 0).all()


def test_feather_at_the_pictures_edge_is_as_elsewhere():
    """Beside a mask that reaches from edge to edge, every row is the same."""
    share = masks.feather(mask_of(0, 0, 40, 20), 8)
    assert (share == share[20]).all()
    assert share[0, 20:28].tolist() == masks.feather(mask_of(15, 10, 10, 10), 8)[20, 20:28].tolist()


def test_without_feather_greys_change_as_a_whole():
    """A grey mask says how much the model changes; half of both pictures over each other it does not mean."""
    mask = np.array([[0, 1, 128, 255]], np.uint8)
    assert masks.feather(mask, 0).tolist() == [[0, 255, 255, 255]]


@pytest.mark.parametrize(
    ("box", "padding", "aspect", "expected"),
    [
        ((10, 20, 10, 10), 2, 1.0, (8, 18, 14, 14)),
        ((10, 20, 10, 20), 0, 1.0, (5, 20, 20, 20)),
        ((10, 20, 10, 20), 0, 0.5, (10, 20, 10, 20)),
        ((0, 0, 10, 10), 5, 1.0, (0, 0, 20, 20)),  # moved into the picture
        ((35, 45, 5, 5), 5, 1.0, (25, 35, 15, 15)),
        ((0, 0, 40, 50), 8, 1.0, (0, 0, 40, 50)),  # no room
        ((15, 0, 4, 50), 0, 2.0, (0, 0, 40, 50)),
    ],
)
def test_crop_box(box, padding, aspect, expected):
    assert masks.crop_box(mask_of(*box), padding, aspect) == expected


def test_the_default_padding():
    assert masks.crop_box(mask_of(100, 100, 20, 20, size=(400, 400)), None, 1.0) == (68, 68, 84, 84)
    assert masks.crop_box(mask_of(100, 100, 200, 20, size=(400, 400)), None, 1.0)[2] == 300


def test_compose_leaves_pixels_to_the_bit():
    rng = np.random.default_rng(2)
    original, made = rng.integers(0, 256, (2, 40, 50, 3)).astype(np.uint8)
    share = masks.feather(mask_of(12, 12, 8, 9), 4)
    result = masks.compose(original, made, share)
    assert np.array_equal(result[share == 0], original[share == 0])
    assert np.array_equal(result[share == 255], made[share == 255])
    between = (share > 0) & (share < 255)
    low, high = np.minimum(original, made), np.maximum(original, made)
    assert ((result >= low) & (result <= high))[between].all()
    assert np.array_equal(masks.compose(original, made, np.zeros_like(share)), original)


def test_a_photograph_of_12_megapixels_takes_no_time():
    mask = mask_of(1000, 1200, 300, 200, size=(3000, 4000))
    start = time.process_time()
    share = masks.feather(masks.grow(mask, 40), 24)
    masks.compose(np.zeros((3000, 4000, 3), np.uint8), np.ones((3000, 4000, 3), np.uint8), share)
    masks.reduce(mask, (64, 64))
    assert time.process_time() - start < 10
