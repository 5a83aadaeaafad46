"""The model in the box: small enough, and its pictures show what prompts say."""

import numpy as np
import pytest

from flux import FluxPipeline
from flux.recipes.emoji import COLOURS, FONT
from flux.recipes.tiny.evaluate import draw, held_out_prompts, judge
from flux.weights.registry import TINY_FOLDER


@pytest.fixture(scope="module")
def flux() -> FluxPipeline:
    return FluxPipeline("tiny")


def test_it_is_small():
    assert sum(file.stat().st_size for file in TINY_FOLDER.rglob("*") if file.is_file()) < 15e6


@pytest.mark.parametrize("colour", ["blue", "yellow", "black"])
def test_backgrounds(flux, colour):
    pictures, _ = draw(flux, [f"a red apple on a {colour} background"])
    assert np.abs(np.median(pictures[0][:4], axis=(0, 1)) - COLOURS[colour]).max() < 20


@pytest.mark.skipif(not FONT.exists(), reason=f"needs the emoji font {FONT}")
def test_held_out_prompts(flux):
    """Never trained on; `python -m flux.recipes.tiny.evaluate` counts hundreds of them."""
    shown, prompts = zip(*held_out_prompts(16), strict=True)
    right = judge(draw(flux, prompts)[0], shown)
    assert right["all three"].right >= 13


@pytest.mark.parametrize("size", [(64, 96), (96, 64), (128, 128), (32, 32)])
def test_other_sizes_do_not_break(flux, size):
    latent_size = flux.latent_size(size)
    *_, x = flux.generate_latents("a red apple on a blue background", 2, 2, latent_size=latent_size, seed=1)
    pictures = np.array(flux.decode(x, latent_size))
    assert pictures.shape == (2, *size, 3)
    assert np.isfinite(pictures).all()
