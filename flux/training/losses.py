"""What training minimises: functions of arrays."""

import math
from collections.abc import Callable

import mlx.core as mx

from flux import sampler
from flux.errors import FluxError

TIME_SAMPLING = ("sigmoid", "shift", "flux_shift", "uniform", "logit_normal", "schnell")
SCHNELL_STEPS = 4
SHIFT = math.exp(1.15)  # dev's time shift at 1024x1024: sampler.time_shift(4096)


def reconstruction(picture: mx.array, target: mx.array, mse_weight: float) -> tuple[mx.array, mx.array]:
    """L1 + mse_weight * MSE of pictures in -1..1, and the MSE alone: two scalars."""
    difference = picture - target
    mse = mx.square(difference).mean()
    return mx.abs(difference).mean() + mse_weight * mse, mse


def posterior(mean: mx.array, logvar: mx.array, normal: mx.array) -> mx.array:
    """A sample of N(mean, e^logvar) from one of N(0, 1), all of one shape (Kingma & Welling 2013, 2.4)."""
    return mean + mx.exp(0.5 * logvar) * normal


def kl(mean: mx.array, logvar: mx.array, free_bits: float = 0.0) -> mx.array:
    """Kullback-Leibler divergence of N(mean, e^logvar) from N(0, 1), mean over the elements.

    An element is never less than `free_bits` (nats; Kingma et al. 2016, appendix C): nothing pushes it then.
    """
    elements = -0.5 * (1 + logvar - mx.square(mean) - mx.exp(logvar))
    return (mx.maximum(elements, free_bits) if free_bits else elements).mean()


def psnr(mse: mx.array) -> mx.array:
    """Peak signal to noise ratio, dB, of pictures in -1..1 (peak to peak 2) with this mean squared error."""
    return 10 * mx.log10(4 / mse)


def flow_times(count: int, shift: float, key: mx.array) -> mx.array:
    """(count,) logit-normal times in 0..1, moved towards the noise: t -> s t / (1 + (s - 1) t).

    Esser et al. 2024, "Scaling Rectified Flow Transformers", 3.1 and 5.3.2 (arXiv:2403.03206).
    """
    return _shifted(mx.sigmoid(mx.random.normal((count,), key=key)), shift)


def sample_times(
    name: str,
    key: mx.array,
    count: int,
    tokens: int,
    *,
    scale: float = 1.0,
    mean: float = 0.0,
    std: float = 1.0,
) -> mx.array:
    """(count,) random times in 0..1, float32, for pictures of `tokens` tokens.

    sigmoid: sigmoid(scale N(0, 1)). shift: the same, moved towards the noise as FLUX.1-dev samples 1024x1024.
    flux_shift: moved as dev samples pictures of this size. uniform. logit_normal: sigmoid(N(mean, std)).
    schnell: its four times, 1 to 0.25. FluxError for another name.
    """
    if name not in TIME_SAMPLING:
        raise FluxError(f"unknown time sampling {name!r}: choose {', '.join(TIME_SAMPLING)}")
    if name == "uniform":
        return mx.random.uniform(shape=(count,), key=key)
    if name == "schnell":
        return mx.random.randint(1, SCHNELL_STEPS + 1, (count,), key=key) / SCHNELL_STEPS
    normal = mx.random.normal((count,), key=key)
    if name == "logit_normal":
        return mx.sigmoid(mean + std * normal)
    times = mx.sigmoid(scale * normal)
    if name == "sigmoid":
        return times
    return _shifted(times, SHIFT if name == "shift" else sampler.time_shift(tokens))


def _shifted(t: mx.array, shift: float) -> mx.array:
    return shift * t / (1 + (shift - 1) * t)


def noised(x0: mx.array, noise: mx.array, times: mx.array) -> mx.array:
    """The straight path of a rectified flow: (1 - t) x0 + t noise, times (B,). Its velocity is noise - x0."""
    t = times.reshape(-1, *[1] * (x0.ndim - 1))
    return (1 - t) * x0 + t * noise


def _huber(difference: mx.array, delta: mx.array | float) -> mx.array:
    return delta * _smooth_l1(difference, delta)


def _smooth_l1(difference: mx.array, delta: mx.array | float) -> mx.array:
    # 2 (sqrt(x^2 + d^2) - d), without the difference of two nearly equal numbers
    square = mx.square(difference)
    return 2 * square / (mx.sqrt(square + delta * delta) + delta)


LOSSES: dict[str, Callable[[mx.array, mx.array | float], mx.array]] = {
    "mse": lambda difference, delta: mx.square(difference),
    "l1": lambda difference, delta: mx.abs(difference),
    "huber": _huber,
    "smooth_l1": _smooth_l1,
}


def error(name: str, prediction: mx.array, target: mx.array, delta: mx.array | float = 0.1) -> mx.array:
    """The error of each element in float32, of the arrays' shape.

    With x = prediction - target and d = delta, a number or an array that broadcasts, above 0: mse is x^2; l1
    is |x|; smooth_l1 is 2 (sqrt(x^2 + d^2) - d), about 2 |x| for |x| >> d; huber is d times that, about x^2
    for |x| << d. These are the smooth ("pseudo") forms of sd-scripts and diffusers' training scripts, not
    torch.nn's, which are made of two pieces. FluxError for another name.
    """
    if name not in LOSSES:
        raise FluxError(f"unknown loss {name!r}: choose {', '.join(LOSSES)}")
    return LOSSES[name](prediction.astype(mx.float32) - target.astype(mx.float32), delta)
