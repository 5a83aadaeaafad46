"""Times and errors of fine-tuning."""

import math

import mlx.core as mx
import numpy as np
import pytest

from flux import sampler
from flux.errors import FluxError
from flux.training import losses

KEY = mx.random.key(5)


def quantiles(name: str, tokens: int = 1024, **options: float) -> np.ndarray:
    times = np.array(losses.sample_times(name, KEY, 40000, tokens, **options))
    assert times.shape == (40000,)
    assert times.min() >= 0
    assert times.max() <= 1
    return np.quantile(times, [0.1, 0.5, 0.9])


def expected(z: np.ndarray, k: float = 1.0) -> np.ndarray:
    s = 1 / (1 + np.exp(-z))
    return k * s / (1 + (k - 1) * s)


@pytest.mark.parametrize(
    ("name", "tokens", "options", "answer"),
    [
        ("sigmoid", 1024, {}, lambda z: expected(z)),
        ("sigmoid", 1024, {"scale": 1.7}, lambda z: expected(1.7 * z)),
        ("shift", 77, {}, lambda z: expected(z, 3.1582)),
        ("flux_shift", 256, {}, lambda z: expected(z, math.exp(0.5))),
        ("flux_shift", 4096, {"scale": 0.5}, lambda z: expected(0.5 * z, math.exp(1.15))),
        ("logit_normal", 1024, {"mean": -0.5, "std": 2.0}, lambda z: expected(2 * z - 0.5)),
        ("uniform", 1024, {}, lambda z: np.array([0.1, 0.5, 0.9])),
    ],
)
def test_times(name, tokens, options, answer):
    normal = np.array([-1.28155, 0, 1.28155])  # the same quantiles of N(0, 1)
    assert np.abs(quantiles(name, tokens, **options) - answer(normal)).max() < 0.01


def test_times_of_schnell_are_those_it_samples_with():
    times = losses.sample_times("schnell", KEY, 4000, 1024)
    values, counts = np.unique(np.array(times), return_counts=True)
    assert values.tolist() == sampler.timesteps(4, 1024, shift=False)[3::-1]
    assert counts.min() > 900


def test_unknown_names():
    with pytest.raises(FluxError, match="unknown time sampling 'cubic': choose sigmoid, shift"):
        losses.sample_times("cubic", KEY, 1, 1)
    with pytest.raises(FluxError, match="unknown loss 'l2': choose mse, l1, huber"):
        losses.error("l2", KEY, KEY)


def test_errors_are_made_in_float32():
    """16-bit predictions near their targets: the difference would lose most of its digits."""
    a, b = mx.array([1.0, 1.0], mx.bfloat16), mx.array([1.003, 0.9])
    assert losses.error("mse", a, b).dtype == mx.float32
    assert losses.error("mse", a, b)[0].item() == pytest.approx(9e-6, rel=1e-3)
