"""Guidance by a loss: its step, when it acts, on what, and losses that cannot lead."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from flux import Guide, sampler
from flux.conditioning.guides import descent
from flux.errors import FluxError
from flux.generation import generate
from flux.requests import Request
from flux.weights.quantize import quantize

from . import tiny
from .tiny_pipeline import make_pipeline

SIZE = (32, 48)
APPLE = Request("a red apple", seeds=(5, 3), image_size=SIZE, steps=4)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    tiny.write_tokenizers(folder)
    return folder


@pytest.fixture(scope="module")
def dev(tokenizers):
    return make_pipeline(tokenizers)


def latents(pipeline, request: Request) -> list[mx.array]:
    """The latents after each step of a request of one picture."""
    steps: list[mx.array] = []
    list(generate(pipeline, [request], on_step=lambda _, i, x: steps.append(x), keep_models=True))
    return steps


def distance(x: mx.array, t: float) -> mx.array:
    return mx.square(x - 0.5).sum()


def test_the_step_leads_to_where_a_linear_loss_is_0_and_half_the_way_for_a_square():
    x = mx.random.normal((1, 4, 6, 16), key=mx.random.key(0))
    direction = mx.random.normal(x.shape, key=mx.random.key(1))

    def linear(x: mx.array, t: float) -> mx.array:
        return 3 + (x * direction).sum()

    assert abs(linear(x + descent(linear, x, 1, 0), 1).item()) < 1e-4
    assert mx.allclose(descent(distance, x, 1, 0), (0.5 - x) / 2, atol=1e-5)
    assert mx.array_equal(descent(lambda x, t: distance(x, t) * 0, x, 1, 0), mx.zeros_like(x))


def test_the_losss_scale_has_no_effect_and_the_step_is_bounded():
    x = mx.random.normal((1, 4, 6, 16), key=mx.random.key(0))
    for scale in (1e-6, 1e6):
        assert mx.allclose(
            descent(lambda x, t, s=scale: s * distance(x, t), x, 1, 0), descent(distance, x, 1, 0), atol=1e-5
        )
    far = descent(lambda x, t: 1000 + x.mean(), x, 1, 0)
    assert mx.allclose(mx.linalg.norm(far.flatten()), mx.linalg.norm(x.flatten()))


def test_on_latents_the_last_step_ends_half_way_to_the_target(dev):
    """Strength 1 of a squared distance moves the last estimate, which is the picture, half the way."""
    request = replace(APPLE, seeds=(5,))
    *_, before, plain = latents(dev, request)
    *_, same, led = latents(dev, replace(request, guide=Guide(distance, start=0.75)))
    assert mx.array_equal(before, same)
    assert mx.abs(led - (plain + 0.5) / 2).max() < 1e-4


def test_the_range_of_steps(dev):
    request = replace(APPLE, seeds=(5,))
    plain = latents(dev, request)
    seen: list[float] = []

    def loss(x: mx.array, t: float) -> mx.array:
        seen.append(t)
        assert x.shape == (1, 4, 6, 16)
        return distance(x, t)

    led = latents(dev, replace(request, guide=Guide(loss, start=0.25, end=0.75)))
    assert seen == sampler.timesteps(4, 6, dev.spec.shift)[1:3]
    assert [mx.array_equal(a, b).item() for a, b in zip(plain, led, strict=True)] == [
        True,
        False,
        False,
        False,
    ]


def test_on_pixels(dev):
    """The estimate is shown as a picture in 0..1, and the picture comes nearer to what is wanted."""
    request = replace(APPLE, seeds=(5,))

    def loss(x: mx.array, t: float) -> mx.array:
        assert x.shape == (1, *SIZE, 3)
        assert 0 <= x.min().item() < x.max().item() <= 1
        return mx.square(x - 0.5).mean()

    (plain,), (led,) = (
        list(generate(dev, [replace(request, guide=guide)], keep_models=True))
        for guide in (None, Guide(loss, on="pixels", start=0.75))
    )
    error = [np.square(picture / 255 - 0.5).mean() for picture in (plain, led)]
    assert error[1] < error[0]


@pytest.mark.parametrize("on", ["latent", "pixels"])
def test_pictures_do_not_depend_on_each_other(tokenizers, on):
    """Each alone, all in a request, streamed, and with the modulation let go: the same bits."""
    request = replace(APPLE, guide=Guide(distance, on=on, strength=0.3), cfg_scale=2.0, negative_prompt="a")
    made = list(generate(make_pipeline(tokenizers), [request]))
    alone = [
        next(generate(make_pipeline(tokenizers), [replace(request, seeds=(seed,))], stream=True))
        for seed in request.seeds
    ]
    assert all(np.array_equal(a, b) for a, b in zip(made, alone, strict=True))


def test_generate_images_takes_a_function_or_a_guide(dev):
    settings = {"seed": 5, "image_size": SIZE, "num_steps": 2}
    plain, bare, whole = (
        dev.generate_images("a red apple", guide=guide, **settings)
        for guide in (None, distance, Guide(distance))
    )
    assert np.array_equal(bare, whole)
    assert not np.array_equal(bare, plain)


def test_quantized_weights(tokenizers):
    pipeline = make_pipeline(tokenizers)
    quantize(pipeline.flow, 4, 32)
    request = replace(APPLE, seeds=(5,), guide=Guide(distance, start=0.75))
    *_, led = latents(pipeline, request)
    *_, plain = latents(pipeline, replace(request, guide=None))
    assert mx.abs(led - (plain + 0.5) / 2).max() < 1e-3


LOSSES = {
    "not of shape": (
        lambda x, t: mx.square(x).mean(-1),
        r"must be one number, not an array of shape \(1, 4, 6\)",
    ),
    "not an array": (lambda x, t: 3.0, "must be one number, an mx.array, not float"),
    "nothing": (lambda x, t: None, "must be one number, an mx.array, not NoneType"),
    "evaluated": (lambda x, t: mx.array(mx.square(x).sum().item()), "does not depend on the picture"),
    "numpy": (lambda x, t: mx.array(np.square(np.array(x)).sum()), "does not depend on the picture"),
    "nan": (lambda x, t: mx.log(-mx.square(x)).sum(), r"not finite in step 1 \(t = 1.000\): the loss is nan"),
    "infinite": (lambda x, t: mx.square(x).sum() / 0, "not finite in step 1"),
    "negative": (lambda x, t: -mx.square(x).sum(), "loss is -.* in step 1 .*: it must be 0 where"),
    "constant": (
        lambda x, t: mx.array(2.0),
        "loss, 2 in step 1 .*, does not depend on the picture",
    ),
    "stopped": (lambda x, t: mx.square(mx.stop_gradient(x)).sum(), "does not depend on the picture"),
}


@pytest.mark.parametrize("case", LOSSES)
def test_losses_that_cannot_lead(dev, case):
    loss, said = LOSSES[case]
    with pytest.raises(FluxError, match=said) as error:
        list(generate(dev, [replace(APPLE, guide=Guide(loss))], keep_models=True))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"on": "picture"}, "is on latent or pixels, not 'picture'"),
        ({"strength": 0}, "strength must be above 0 and finite, not 0"),
        ({"strength": float("nan")}, "strength must be above 0 and finite, not nan"),
        ({"start": 0.5, "end": 0.5}, "not 0.5 and 0.5"),
        ({"end": 1.5}, "not 0.0 and 1.5"),
        ({"loss": 3}, "a guide is a function of an estimate and a time, not 3"),
    ],
)
def test_bad_values_are_named(values, said):
    with pytest.raises(FluxError, match=said):
        Guide(**{"loss": distance, **values})
