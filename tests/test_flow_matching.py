"""The loss of fine-tuning: a sample's is its own, whatever the batch; masks, weights, options."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from flux.errors import FluxError
from flux.models.clip import CLIPTextModel
from flux.models.transformer import Flux
from flux.training.flow_matching import FlowLoss
from flux.training.trainer import sample_key

from .tiny import CLIP, FLUX, randomize

KEY = mx.random.key(0)
SIZE = (4, 6)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.flow = randomize(Flux(FLUX), 0)
        self.clip = randomize(CLIPTextModel(CLIP), 1)


class Echo(nn.Module):
    """Answers with what it was asked: x_t."""

    def __init__(self):
        super().__init__()
        self.flow = lambda img, *rest: img


def make_batch(count: int, first: int = 0) -> dict[str, mx.array]:
    def rows(*shape: int) -> mx.array:
        rng = [np.random.default_rng((1, first + i)) for i in range(count)]
        return mx.array(np.stack([r.standard_normal(shape) for r in rng]).astype(np.float32))

    return {
        "mean": rows(*SIZE, 4),
        "logvar": rows(*SIZE, 4),
        "t5": rows(5, 48),
        "clip": rows(32),
        "is_reg": mx.zeros(count),
        "keys": mx.stack([sample_key(3, first + i) for i in range(count)]),
    }


@pytest.mark.parametrize("time_sampling", ["sigmoid", "flux_shift", "uniform", "schnell"])
def test_a_sample_has_one_loss_in_any_batch(time_sampling):
    model, loss = Model(), FlowLoss(0.1, 0.4, time_sampling=time_sampling)
    alone = [loss.per_sample(model, make_batch(1, i)).item() for i in range(3)]
    assert np.allclose(loss.per_sample(model, make_batch(3)), alone, rtol=1e-5)
    assert len(set(alone)) == 3
    # and the trainer's key does not matter
    assert loss(model, make_batch(3), KEY)[0].item() == loss(model, make_batch(3), mx.random.key(9))[0].item()


def test_by_hand():
    """x_t and target from the same posterior sample and noise, scaled and shifted as the autoencoder does."""
    batch = make_batch(2) | {"times": mx.array([0.25, 1.0])}
    x0, noise, times = (np.array(a) for a in FlowLoss(0.1, 0.4)._draw(batch))
    t = times[:, None, None, None]
    expected = (((1 - t) * x0 + t * noise - (noise - x0)) ** 2).mean(axis=(1, 2, 3))
    assert np.allclose(FlowLoss(0.1, 0.4).per_sample(Echo(), batch), expected, rtol=1e-5)
    assert times.tolist() == [0.25, 1.0]
    z = x0 / 0.4 + 0.1
    standard = (z - np.array(batch["mean"])) / np.exp(0.5 * np.array(batch["logvar"]))
    assert abs(standard.mean()) < 0.3
    assert abs(standard.std() - 1) < 0.2
    wide = np.array(FlowLoss(0.1, 0.4)._draw(batch | {"logvar": batch["logvar"] + 2})[0]) / 0.4 + 0.1
    assert np.allclose(wide - batch["mean"], np.e * (z - batch["mean"]), rtol=1e-3, atol=1e-4)
    assert abs(np.corrcoef(standard.ravel(), noise.ravel())[0, 1]) < 0.2


def test_prior_weight():
    batch = make_batch(2)
    one, two = FlowLoss(0.1, 0.4).per_sample(Echo(), batch).tolist()
    batch["is_reg"] = mx.array([0.0, 1.0])
    loss, _ = FlowLoss(0.1, 0.4, prior_weight=0.3)(Echo(), batch, KEY)
    assert loss.item() == pytest.approx((one + 0.3 * two) / 2, rel=1e-6)


def test_masked():
    """A mean over what the mask shows: half of a picture in any shade counts as that half alone would."""
    batch = make_batch(2)
    x0, noise, times = FlowLoss(0.1, 0.4)._draw(batch)
    t = times[:, None, None, None]
    error = np.array(mx.square((1 - t) * x0 + t * noise - (noise - x0)))
    mask = np.zeros((2, *SIZE), np.float32)
    mask[0, 1:3, 2:] = 0.5
    batch["mask"] = mx.array(mask)
    one, empty = FlowLoss(0.1, 0.4).per_sample(Echo(), batch).tolist()
    assert one == pytest.approx(error[0, 1:3, 2:].mean(), rel=1e-5)
    assert empty == 0


def test_losses_and_their_schedule():
    batch = make_batch(2) | {"times": mx.array([0.0, 1.0])}
    constant, falling, wide, mse = (
        FlowLoss(0.1, 0.4, loss=name, delta=delta, delta_schedule=schedule).per_sample(Echo(), batch).tolist()
        for name, delta, schedule in (
            ("huber", 0.1, "constant"),
            ("huber", 0.1, "exponential"),
            ("huber", 1.0, "constant"),
            ("mse", 0.1, "constant"),
        )
    )
    assert falling == pytest.approx([wide[0], constant[1]], rel=1e-5)  # delta 1 for a picture, 0.1 for noise
    assert constant[0] < wide[0] < mse[0]


def test_guidance_goes_to_the_model():
    model, batch = Model(), make_batch(1)
    losses = [FlowLoss(0.1, 0.4, guidance=g).per_sample(model, batch).item() for g in (1.0, 1.0, 3.5)]
    assert losses[0] == losses[1] != losses[2]


def test_clip_is_trained_by_its_ids():
    model, batch = Model(), make_batch(2)
    ids = mx.array([[512, 5, 6, 513], [512, 7, 513, 513]])
    loss = FlowLoss(0.1, 0.4, end_token=513)
    batch["clip"] = model.clip(ids, 513).pooled_output
    pooled = loss.per_sample(model, batch)
    del batch["clip"]
    batch["clip_ids"] = ids
    assert mx.array_equal(loss.per_sample(model, batch), pooled)
    _, gradients = nn.value_and_grad(model, loss)(model, batch, KEY)
    assert mx.abs(gradients["clip"]["text_model"]["final_layer_norm"]["weight"]).max() > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"time_sampling": "cubic"}, "unknown time sampling 'cubic': choose sigmoid"),
        ({"loss": "l2"}, "unknown loss 'l2': choose mse"),
        ({"delta_schedule": "snr"}, "unknown schedule of delta 'snr': choose constant, exponential"),
        ({"delta": 0.0}, "delta 0.0: give a number above 0"),
    ],
)
def test_refused(options, message):
    with pytest.raises(FluxError, match=message):
        FlowLoss(0.1, 0.4, **options)
