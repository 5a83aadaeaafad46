"""The picture so far: which estimate is shown, in which colours, and its file."""

import mlx.core as mx
import numpy as np
import pytest

from flux import FluxPipeline, generation, images, previews, sampler
from flux.errors import FluxError
from flux.models.autoencoder import AutoEncoder, AutoEncoderParams
from flux.models.autoencoder_tiny import TinyDecoder, TinyDecoderParams
from flux.requests import Request
from flux.solvers import SOLVERS

from . import tiny


@pytest.fixture(scope="module")
def pipeline():
    return FluxPipeline("tiny")


@pytest.fixture(scope="module")
def steps(pipeline):
    """Request, step, latent and estimate of each step of a picture, and the picture."""
    latents, estimates = [], []
    request = Request("a red apple on a blue background", (1,), steps=8)
    made = generation.generate(
        pipeline,
        [request],
        on_step=lambda *args: latents.append(args),
        on_estimate=lambda *args: estimates.append(args),
        keep_models=True,
    )
    (picture,) = made
    return latents, estimates, picture


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_estimate_is_the_picture_where_the_model_knows_it(solver):
    """The model that knows the picture has v = noise - picture = (x - picture) / t."""
    picture, noise = mx.random.normal((2, 1, 6, 8), key=mx.random.key(1))
    times = [1.0, 0.7, 0.65, 0.2, 0.0]
    x = noise
    for i, x_next in enumerate(SOLVERS[solver](lambda x, i: (x - picture) / times[i], noise, times)):
        assert np.abs(sampler.estimate(x, x_next, *times[i : i + 2]) - picture).max() <= 1e-5
        x = x_next


def test_each_step_has_its_estimate(pipeline, steps):
    latents, estimates, _ = steps
    assert [step for _, step, _ in estimates] == list(range(8)) == [step for _, step, _ in latents]
    (_, _, last), (_, _, finished) = estimates[-1], latents[-1]
    assert np.abs(last - finished).max() <= 1e-5

    def likeness(x):  # true guidance makes the first estimates too strong, and like the picture all the same
        return np.corrcoef(np.array(x).flatten(), np.array(finished).flatten())[0, 1]

    for (_, _, x), (_, _, estimate) in zip(latents[:4], estimates[:4], strict=True):
        assert likeness(estimate) > likeness(x) + 0.05


def test_a_fitted_map_shows_the_colours(pipeline, steps):
    _, estimates, picture = steps
    request, _, last = estimates[-1]
    colours = previews.choose(pipeline.ae)
    shown = previews.draw(colours, last, request.latent_size, pipeline.downscale)
    assert shown.shape == picture.shape
    d = pipeline.downscale

    def coarse(pixels):  # a colour for each latent, 0..1
        h, w, _ = pixels.shape
        return pixels.reshape(h // d, d, w // d, d, 3).mean(axis=(1, 3)) / 255

    error = np.sqrt(np.square(coarse(shown) - coarse(picture)).mean())
    assert error < 0.09  # 0.070, where the picture's colours vary by 0.27
    assert error < 0.4 * coarse(picture).std()


def test_a_fit_finds_a_linear_map():
    """Latents that are the colours of 2x2 pixels, mixed and shifted: the fit is exact."""

    class Mixing:
        downscale = 2

        def encode(self, x):
            n, h, w, _ = x.shape
            colours = x.reshape(n, h // 2, 2, w // 2, 2, 3).mean(axis=(2, 4))
            return colours @ mx.array([[1.0, 0.5, 0.0], [0.0, 2.0, 1.0], [0.3, 0.0, -1.0]]) + 0.7

    x = mx.random.uniform(-1, 1, (1, 4, 6, 3), key=mx.random.key(2))
    shown = previews.linear(*previews.fit(Mixing()))(Mixing().encode(x))
    assert np.abs(shown - x.reshape(1, 2, 2, 3, 2, 3).mean(axis=(2, 4))).max() <= 1e-4


def test_flux_has_published_factors():
    params = AutoEncoderParams()
    ae = AutoEncoder.__new__(AutoEncoder)
    object.__setattr__(ae, "params", params)
    colours = previews.choose(ae)
    z = mx.random.normal((1, 4, 6, 16))
    expected = np.array(z) @ np.array(previews.FLUX_FACTORS) + previews.FLUX_BIAS
    assert np.abs(np.array(colours(z)) - expected).max() <= 1e-5
    assert np.shape(previews.FLUX_FACTORS) == (16, 3)


def test_a_tiny_decoder_must_fit_the_latents(tmp_path, pipeline):
    network = tiny.randomize(TinyDecoder(TinyDecoderParams(16, 8, (1, 1, 1, 1))), 1)

    def save(network, name):
        weights = {
            f"decoder.{key}": w.transpose(0, 3, 1, 2) if w.ndim == 4 else w
            for key, w in tiny.parameters(network).items()
        }
        mx.save_safetensors(str(tmp_path / name), weights)
        return str(tmp_path / name)

    colours = previews.choose(pipeline.ae, save(network, "taef1.safetensors"))
    x = mx.random.normal((1, 16, 64))
    shown = previews.draw(colours, x, (8, 8), 8)
    expected = images.to_uint8(images.denormalize(network(sampler.unpack(x, (8, 8)))))[0]
    assert shown.shape == (64, 64, 3)
    assert np.abs(shown.astype(int) - expected).max() <= 1
    other = save(TinyDecoder(TinyDecoderParams(4, 8, (1, 1, 1))), "other.safetensors")
    with pytest.raises(FluxError, match="for latents of 4 channels and 4 pixels a side; the model's have 16"):
        previews.choose(pipeline.ae, other)


def test_the_file(tmp_path, steps, pipeline):
    _, estimates, _ = steps
    path = tmp_path / "out.preview.png"
    shown = previews.Previews(path, 3, previews.choose(pipeline.ae), pipeline.downscale)
    there = []
    for arguments in estimates:
        path.unlink(missing_ok=True)
        shown(*arguments)
        there.append(path.exists())
    assert there == [False, False, True, False, False, True, False, False]
    assert shown.write()  # the latest, where it was not its turn
    assert images.load(path)[0].shape == (64, 64, 3)
    shown.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written_ends_nothing(tmp_path, steps, pipeline):
    _, estimates, _ = steps
    shown = previews.Previews(
        tmp_path / "none" / "a.png", 1, previews.choose(pipeline.ae), pipeline.downscale
    )
    with pytest.warns(UserWarning, match="no preview: .*none"):
        shown(*estimates[0])


def test_names(tmp_path, monkeypatch):
    (tmp_path / "made.v1").mkdir()
    monkeypatch.chdir(tmp_path / "made.v1")
    assert previews.path_beside("a/out.1.jpg").as_posix() == "a/out.1.preview.png"
    assert previews.path_beside(tmp_path / "made.v1") == tmp_path / "made.v1.preview.png"
    assert previews.path_beside(".") == tmp_path / "made.v1.preview.png"
