"""FluxPipeline on a tiny random model: the documented API, seeds, guidance, and what may be let go when."""

import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from flux import FluxPipeline, images, sampler
from flux.errors import FluxError
from flux.loading import Parts
from flux.tokenizers import T5Tokenizer

from . import tiny, tiny_pipeline
from .tiny_pipeline import T5_LENGTH, make_parts, make_pipeline

SIZE = (8, 12)
PROMPT = "a red apple on a blue background"
LONG_PROMPT = "a red apple green birds " * 12


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    tiny.write_tokenizers(folder)
    return folder


@pytest.fixture(scope="module")
def dev(tokenizers):
    return make_pipeline(tokenizers)


@pytest.fixture(scope="module")
def schnell(tokenizers):
    return make_pipeline(tokenizers, guidance=False)


def latents(flux, text=PROMPT, **options):
    """The last latent of a generation, evaluated."""
    generated = flux.generate_latents(text, **{"num_steps": 3, "latent_size": SIZE, **options})
    mx.eval(next(generated))
    for x_t in generated:
        mx.eval(x_t)
    return x_t


def size_of(*networks):
    """Bytes of the networks' weights."""
    return sum(w.nbytes for network in networks for _, w in tree_flatten(network.parameters()))


def test_the_documented_api(tokenizers):
    flux = make_pipeline(tokenizers)
    generated = flux.generate_latents(PROMPT, n_images=2, num_steps=4, latent_size=SIZE, seed=7)
    conditioning = next(generated)
    x_T, x_positions, t5_conditioning, t5_positions, clip_conditioning = conditioning
    mx.eval(conditioning)
    del flux.t5, flux.clip
    assert x_T.shape == (2, 24, 64)
    assert x_positions.shape == (2, 24, 3)
    assert t5_conditioning.shape == (2, T5_LENGTH, 48)
    assert t5_positions.shape == (2, T5_LENGTH, 3)
    assert clip_conditioning.shape == (2, 32)
    assert mx.array_equal(x_T, sampler.pack(sampler.noise([7, 8], SIZE, 16)))
    steps = list(generated)
    assert len(steps) == 4
    assert all(x_t.shape == x_T.shape and x_t.dtype == mx.float32 for x_t in steps)
    mx.eval(steps)
    del flux.flow
    picture = flux.decode(steps[-1], latent_size=SIZE)
    assert picture.shape == (2, 64, 96, 3)
    assert picture.dtype == mx.float32
    assert 0 <= picture.min() < picture.max() <= 1


def test_the_pipeline_is_the_plain_model_under_euler(dev):
    """Whatever is computed once a picture, the result is that of the plain call at every step."""
    generated = dev.generate_latents(PROMPT, 2, num_steps=3, guidance=2.5, latent_size=SIZE, seed=3)
    x, *conditioning = next(generated)
    x_positions, t5, t5_positions, clip = conditioning
    times = sampler.timesteps(3, 24, shift=True)
    for ours, t, t_next in zip(generated, times[:-1], times[1:], strict=True):
        v = dev.flow(x, x_positions, t5, t5_positions, mx.full(2, t), clip, mx.full(2, 2.5))
        x = x + (t_next - t) * v
        assert mx.abs(ours - x).max() < 1e-5


@pytest.mark.parametrize("size", [(8, 12), (10, 2), (6, 6)])
@pytest.mark.parametrize("kind", ["dev", "schnell"])
def test_a_batch_equals_single_pictures(request, kind, size):
    """Within rounding: a batch goes through one matrix product, which sums in another order for few rows."""
    flux = request.getfixturevalue(kind)
    batch = latents(flux, n_images=4, latent_size=size, seed=11)
    pictures = images.to_uint8(flux.decode(batch, size))
    for i in range(4):
        single = latents(flux, latent_size=size, seed=11 + i)
        assert mx.abs(batch[i : i + 1] - single).max() <= 1e-5
        picture = images.to_uint8(flux.decode(single, size))
        error = np.mean((picture[0].astype(float) - pictures[i]) ** 2)
        assert error < 255**2 / 10**6  # PSNR above 60 dB
    assert mx.abs(batch[0] - batch[1]).max() > 0.1


def test_seeds(dev):
    assert mx.array_equal(latents(dev, seed=5), latents(dev, seed=5))
    assert not mx.array_equal(latents(dev, seed=5), latents(dev, seed=6))
    assert not mx.array_equal(latents(dev), latents(dev))  # a fresh one every time


def test_the_models_own_defaults(dev):
    dev_with_defaults = FluxPipeline.from_parts(
        Parts(
            replace(dev.spec, steps=2, guidance=1.5, cfg_scale=2.0),
            *(dev.flow, dev.ae, dev.clip, dev.t5, dev.clip_tokenizer, dev.t5_tokenizer),
        )
    )
    expected = latents(dev, seed=1, num_steps=2, guidance=1.5, cfg_scale=2.0)
    assert mx.array_equal(latents(dev_with_defaults, seed=1, num_steps=None), expected)


def test_guidance_reaches_dev_and_not_schnell(dev, schnell):
    assert mx.abs(latents(dev, seed=1, guidance=1.0) - latents(dev, seed=1, guidance=4.0)).max() > 1e-3
    assert mx.array_equal(latents(schnell, seed=1, guidance=1.0), latents(schnell, seed=1, guidance=4.0))


def test_the_prompt_matters(dev):
    assert mx.abs(latents(dev, seed=1) - latents(dev, "two birds", seed=1)).max() > 1e-3


def test_true_guidance_follows_its_formula(dev):
    generated = dev.generate_latents(
        PROMPT, num_steps=1, latent_size=SIZE, seed=2, negative_prompt="two birds", cfg_scale=3.5
    )
    x_T, *_ = next(generated)
    (guided,) = generated
    v = {text: x_T - latents(dev, text, num_steps=1, seed=2) for text in (PROMPT, "two birds")}
    expected = x_T - (v["two birds"] + 3.5 * (v[PROMPT] - v["two birds"]))
    assert mx.abs(guided - expected).max() < 1e-4
    assert mx.abs(guided - latents(dev, num_steps=1, seed=2)).max() > 1e-2


def test_without_a_negative_prompt_true_guidance_leads_away_from_the_empty_one(dev):
    assert mx.array_equal(
        latents(dev, seed=2, cfg_scale=2.0), latents(dev, seed=2, cfg_scale=2.0, negative_prompt="")
    )


def test_prompts_of_different_lengths_under_guidance_without_padding(tokenizers):
    flux = FluxPipeline.from_parts(make_parts(tokenizers), t5_padding=False)
    generated = flux.generate_latents(
        PROMPT, num_steps=1, latent_size=SIZE, seed=2, negative_prompt="birds", cfg_scale=2.0
    )
    _, _, t5, t5_positions, _ = next(generated)
    tokens = len(flux.t5_tokenizer.encode(PROMPT, pad=False))
    assert t5.shape[1] == t5_positions.shape[1] == tokens < T5_LENGTH
    (x,) = generated
    assert mx.isfinite(x).all()
    assert mx.abs(x - latents(flux, num_steps=1, seed=2, negative_prompt="two", cfg_scale=2.0)).max() > 1e-3


def test_padding_changes_the_result(dev, tokenizers):
    unpadded = FluxPipeline.from_parts(make_parts(tokenizers), t5_padding=False)
    assert mx.abs(latents(dev, seed=1) - latents(unpadded, seed=1)).max() > 1e-3


def test_a_long_prompt_warns_with_what_was_cut(dev):
    with pytest.warns(UserWarning, match="green birds") as record:
        latents(dev, LONG_PROMPT)
    assert f"{T5_LENGTH} tokens" in str(record[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        latents(dev, "a red apple")


def test_a_prompt_too_long_for_clip_alone_warns_of_that(tokenizers):
    parts = make_parts(tokenizers)
    flux = FluxPipeline.from_parts(
        parts._replace(t5_tokenizer=T5Tokenizer.from_folder(tokenizers / "tokenizer_2", 512))
    )
    with pytest.warns(UserWarning, match="CLIP's 77 tokens.*green birds"):
        latents(flux, LONG_PROMPT)


def test_modulation_may_be_let_go(tokenizers, dev):
    flux = make_pipeline(tokenizers)
    whole = size_of(flux.flow)
    expected = latents(dev, n_images=2, seed=4, cfg_scale=2.0)
    assert mx.array_equal(latents(flux, n_images=2, seed=4, cfg_scale=2.0, keep_modulation=False), expected)
    assert size_of(flux.flow) < 0.8 * whole


def test_one_stage_at_a_time_is_in_memory(tmp_path):
    """Loading is lazy; `del flux.t5, flux.clip` and `del flux.flow` give their memory back."""
    folder = tiny_pipeline.write_checkpoint(tmp_path)
    mx.clear_cache()
    before = mx.get_active_memory()

    def active() -> int:
        return mx.get_active_memory() - before

    flux = FluxPipeline(str(folder), dtype=mx.float32)
    text, flow, ae = size_of(flux.t5, flux.clip), size_of(flux.flow), size_of(flux.ae.decoder)
    assert active() < 0.05 * text
    generated = flux.generate_latents(PROMPT, num_steps=2, latent_size=SIZE, seed=1, cfg_scale=2.0)
    conditioning = next(generated)
    mx.eval(conditioning)
    assert text <= active() < text + 0.5 * min(flow, ae)
    del flux.t5, flux.clip
    assert active() < 0.5 * text
    for x_t in generated:
        mx.eval(x_t)
    assert flow <= active() < flow + 0.5 * ae
    del flux.flow
    assert active() < 0.2 * flow
    mx.eval(flux.decode(x_t, SIZE))
    assert ae <= active() < ae + 0.2 * flow


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_16_bit_weights_keep_a_float32_latent(tokenizers, dev, dtype):
    parts = make_parts(tokenizers)
    for module in (parts.flow, parts.ae, parts.clip, parts.t5):
        module.set_dtype(dtype)
    flux = FluxPipeline.from_parts(parts)
    flux.flow.round_embeddings = False  # or the comparison would measure that
    x = latents(flux, n_images=2, seed=6)
    assert x.dtype == mx.float32
    exact = latents(dev, n_images=2, seed=6)
    assert mx.linalg.norm(x - exact) / mx.linalg.norm(exact) < 0.05
    picture = flux.decode(x, SIZE)
    assert picture.dtype == mx.float32
    assert mx.abs(picture - dev.decode(x, SIZE)).mean() < 0.02


def test_an_odd_autoencoder_has_its_own_downscale(tokenizers):
    flux = make_pipeline(tokenizers, ae=tiny.AE)
    assert flux.downscale == 2
    assert flux.decode(latents(flux), SIZE).shape == (1, 16, 24, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, "steps.*0"),
        ({"num_steps": -2}, "steps.*-2"),
        ({"n_images": 0}, "pictures.*0"),
        ({"latent_size": (0, 8)}, r"\(0, 8\)"),
        ({"latent_size": (8, 7)}, r"\(8, 7\)"),
        ({"latent_size": (-8, 8)}, r"\(-8, 8\)"),
        ({"seed": -1}, "seed.*-1"),
        ({"seed": 2**64 - 1, "n_images": 2}, "seed"),
        ({"cfg_scale": 0.5}, r"cfg scale.*0\.5"),
        ({"negative_prompt": "blurry"}, "blurry.*cfg scale"),
    ],
)
def test_bad_values_are_named_before_any_work(dev, options, message):
    with pytest.raises(FluxError, match=message):
        dev.generate_latents(PROMPT, **{"latent_size": SIZE, "num_steps": 1, **options})


@pytest.mark.parametrize(
    ("image_size", "latent_size", "warned"),
    [
        ((64, 64), (8, 8), False),
        ((256, 512), (32, 64), False),
        ((100, 65), (12, 8), True),
        ((3, 24), (2, 4), True),
    ],
)
def test_picture_sizes_are_rounded_to_16(dev, image_size, latent_size, warned):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert dev.latent_size(image_size) == latent_size
    assert bool(caught) == warned
    if warned:
        height, width = (8 * side for side in latent_size)
        assert f"{image_size[0]}x{image_size[1]}" in str(caught[0].message)
        assert f"{height}x{width}" in str(caught[0].message)


@pytest.mark.parametrize("image_size", [(0, 64), (64, -16)])
def test_impossible_picture_sizes(dev, image_size):
    with pytest.raises(FluxError, match=f"{image_size[0]}x{image_size[1]}"):
        dev.latent_size(image_size)


def test_importing_the_package_imports_no_mlx():
    program = "import flux, sys; print('mlx.core' in sys.modules, flux.FluxPipeline.__name__)"
    root = Path(__file__).parents[1]
    out = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True
    )
    assert out.stdout.split() == ["False", "FluxPipeline"]


def test_the_package_names_what_it_lacks():
    import flux

    with pytest.raises(AttributeError, match="no_such_name"):
        _ = flux.no_such_name
