"""The captioner in the box: small enough, and right about pictures that it was never shown."""

import mlx.core as mx
import pytest
from PIL import Image

from flux import FluxPipeline
from flux.captioning.captioner import Captioner
from flux.recipes.captioner import evaluate
from flux.recipes.emoji import FONT
from flux.weights import checkpoints
from flux.weights.registry import TINY_CAPTIONER_FOLDER

pytestmark = [
    pytest.mark.skipif(not TINY_CAPTIONER_FOLDER.is_dir(), reason="the built-in captioner is not there yet"),
    pytest.mark.skipif(not FONT.is_file(), reason="needs the font Noto Color Emoji"),
]


@pytest.fixture(scope="module")
def say() -> evaluate.Say:
    captioner = Captioner.from_folder(checkpoints.find_captioner("tiny"), mx.float32)
    return evaluate.speaker(captioner)


def test_it_is_small():
    assert sum(file.stat().st_size for file in TINY_CAPTIONER_FOLDER.iterdir()) < 8e6


def test_held_out_renderings(say):
    """`python -m flux.recipes.captioner.evaluate` counts hundreds of them."""
    shares = evaluate.evaluate(say, 60)
    assert shares["true renderings"]["subject and background"].right >= 55
    assert shares["true renderings"]["place"].right >= 55
    assert shares["damaged renderings"]["subject and background"].right >= 51


def test_read_back(say):
    shares, _ = evaluate.read_back(say, FluxPipeline("tiny"), 12)
    assert shares["subject and background"].right >= 9


def test_pictures_of_other_kinds_are_captioned_too(say):
    assert all(
        isinstance(text, str) for text in say([Image.linear_gradient("L"), Image.new("RGBA", (9, 300))])
    )
