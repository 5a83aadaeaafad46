"""Photographs and PNGs with alpha as inputs, of random weights: what is kept and which size comes out."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from flux.conditioning import Edit, Picture
from flux.errors import FluxError

from . import tiny, tiny_pipeline

pytestmark = pytest.mark.filterwarnings("ignore:the part around the mask")  # the model makes 64x64 pixels
NAMES = (
    *("dog6/00.jpg", "dog6/03.jpg", "two_concepts/sparkgpu/1.jpeg", "two_concepts/sparkgpu/4.jpg"),
    *("two_concepts/sparkgpu/6.png", "two_concepts/tjtoy/1.png", "two_concepts/tjtoy/4.png"),
)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    tiny.write_tokenizers(folder)
    return tiny_pipeline.make_pipeline(folder)


@pytest.fixture(params=NAMES)
def photo(request, shared: Path) -> Picture:
    path = shared / "data" / request.param
    if not path.is_file():
        pytest.skip(f"needs ../shared/data/{request.param}")
    return Picture.read(path)


def mask_of(photo: Picture) -> tuple[np.ndarray, Picture]:
    """A truth table, white for a tenth of the photo in its middle, and its mask."""
    height, width = photo.size
    white = np.zeros((height, width), bool)
    white[height // 2 : height // 2 + height // 10, width // 2 : width // 2 + width // 10] = True
    return white, Picture.from_array(np.repeat(np.where(white, 255, 0)[..., None], 3, 2).astype(np.uint8))


def test_around_a_mask_in_a_photo(pipeline, photo):
    white, mask = mask_of(photo)
    edit = Edit(photo, mask=mask, crop_mask="auto")
    made = pipeline.generate_images("a b", edit=edit, image_size=(64, 64), num_steps=1, seed=1)[0]
    assert made.shape == photo.pixels.shape
    assert np.array_equal(made[~white], photo.pixels[~white])
    assert (made[white] != photo.pixels[white]).any(axis=1).mean() > 0.8


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_a_photo_made_smaller(pipeline, photo, fit):
    edit = Edit(photo, 0.0, fit=fit)
    made = pipeline.generate_images("a b", edit=edit, image_size=(72, 100), num_steps=1, seed=1)[0]
    assert made.shape == (72, 100, 3)


def test_a_photo_with_a_hole(pipeline, photo):
    """The photo with a transparent part, which is its mask."""
    white, _ = mask_of(photo)
    alpha = np.where(white, 0, 255).astype(np.uint8)
    holed = Picture.from_array(np.dstack([photo.pixels, alpha]))
    edit = Edit(holed, mask="alpha", crop_mask=16)
    made = pipeline.generate_images("a b", edit=edit, image_size=(48, 64), num_steps=1, seed=1)[0]
    assert np.array_equal(made[~white], photo.pixels[~white])


def test_a_photo_as_it_is_is_too_large(pipeline, photo):
    """For a model of 64x64 pixels: never made smaller without a word."""
    pipeline.spec = replace(pipeline.spec, image_size=(64, 64))
    with pytest.raises(FluxError, match=f"{Path(photo.name).name} is .* --image-size makes it smaller"):
        pipeline.generate_images("a b", edit=Edit(photo), num_steps=1, seed=1)
