"""Pictures that are changed against diffusers' FluxImg2ImgPipeline and FluxInpaintPipeline.

The same checkpoint, noise, picture and mask. diffusers samples the autoencoder's latent; here both take its
mean. It brings a mask to the latent by the nearest pixel and makes it black and white: masks that are whole
cells of 8x8 pixels are the same there and here.
"""

import mlx.core as mx
import numpy as np
import pytest

from flux import FluxPipeline, sampler
from flux.conditioning import Edit, Picture

from .test_pipeline import PROMPT, T5_LENGTH, checkpoint, psnr

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
PIL = pytest.importorskip("PIL.Image")

STEPS, SEEDS = 5, (7, 8)
CASES = [((64, 64), 0.6), ((48, 112), 1.0), ((96, 64), 0.35)]  # size, strength
__all__ = ["checkpoint"]  # a fixture


def photo(size: tuple[int, int]) -> np.ndarray:
    """A smooth picture with some noise."""
    y, x = np.mgrid[: size[0], : size[1]] / 64
    waves = np.stack([np.sin(3 * x), np.cos(4 * y), np.sin(5 * (x + y))], axis=-1)
    noise = np.random.default_rng(0).normal(0, 10, (*size, 3))
    return (128 + 100 * waves + noise).clip(0, 255).astype(np.uint8)


def cells(size: tuple[int, int]) -> np.ndarray:
    """White cells of 8x8 pixels at random."""
    chosen = np.random.default_rng(1).random((size[0] // 8, size[1] // 8)) < 0.4
    return np.repeat(np.kron(chosen, np.full((8, 8), 255)).astype(np.uint8)[..., None], 3, axis=2)


def theirs(monkeypatch, reference, kind, flux, size, strength, **given):
    """diffusers' pictures: its class of that kind, with our noise and the latents' means."""
    pipeline = getattr(diffusers, f"Flux{kind}Pipeline")(**reference.components)
    pipeline.set_progress_bar_config(disable=True)
    module = __import__(type(pipeline).__module__, fromlist=["x"])
    latent_size = (size[0] // 8, size[1] // 8)
    noise = np.array(sampler.unpack(flux.noise(SEEDS, latent_size), latent_size))
    mean = module.retrieve_latents
    monkeypatch.setattr(module, "retrieve_latents", lambda out, **_: mean(out, sample_mode="argmax"))
    monkeypatch.setattr(
        module, "randn_tensor", lambda *_, **__: torch.from_numpy(noise.transpose(0, 3, 1, 2).copy())
    )
    made = pipeline(
        PROMPT,
        height=size[0],
        width=size[1],
        strength=strength,
        num_inference_steps=STEPS,
        guidance_scale=3.5,
        num_images_per_prompt=len(SEEDS),
        max_sequence_length=T5_LENGTH,
        output_type="np",
        **given,
    )
    return (made.images * 255).round().astype(np.uint8)


def ours(flux, edit, **options):
    given = {"num_steps": STEPS, "guidance": 3.5, "n_images": len(SEEDS), "seed": SEEDS[0]}
    return flux.generate_images(PROMPT, edit=edit, **given, **options)


def load(folder) -> FluxPipeline:
    flux = FluxPipeline(str(folder), dtype=mx.float32)
    flux.t5_tokenizer.max_length = T5_LENGTH
    return flux


@pytest.mark.parametrize(("size", "strength"), CASES)
def test_image_to_image(monkeypatch, checkpoint, size, strength):
    reference, folder = checkpoint
    flux, picture = load(folder), photo(size)
    expected = theirs(monkeypatch, reference, "Img2Img", flux, size, strength, image=PIL.fromarray(picture))
    made = ours(flux, Edit(Picture.from_array(picture), strength))
    assert made.shape == expected.shape == (2, *size, 3)
    assert expected.std() > 10
    assert psnr(made, expected) >= 60
    assert psnr(ours(flux, Edit(Picture.from_array(picture), strength - 0.3)), expected) < 40


@pytest.mark.parametrize(("size", "strength"), CASES)
def test_inpainting(monkeypatch, checkpoint, size, strength):
    reference, folder = checkpoint
    flux, picture, mask = load(folder), photo(size), cells(size)
    given = {"image": PIL.fromarray(picture), "mask_image": PIL.fromarray(mask)}
    expected = theirs(monkeypatch, reference, "Inpaint", flux, size, strength, **given)
    edit = Edit(Picture.from_array(picture), strength, Picture.from_array(mask), keep=False)
    made = ours(flux, edit)
    assert made.shape == expected.shape == (2, *size, 3)
    assert psnr(made, expected) >= 60
    assert psnr(ours(flux, Edit(Picture.from_array(picture), strength)), expected) < 40  # the mask matters
