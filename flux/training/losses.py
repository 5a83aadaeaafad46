"""What training minimises: functions of arrays."""

import mlx.core as mx


def reconstruction(picture: mx.array, target: mx.array, mse_weight: float) -> tuple[mx.array, mx.array]:
    """L1 + mse_weight * MSE of pictures in -1..1, and the MSE alone: two scalars."""
    difference = picture - target
    mse = mx.square(difference).mean()
    return mx.abs(difference).mean() + mse_weight * mse, mse


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
    t = mx.sigmoid(mx.random.normal((count,), key=key))
    return shift * t / (1 + (shift - 1) * t)


def noised(x0: mx.array, noise: mx.array, times: mx.array) -> mx.array:
    """The straight path of a rectified flow: (1 - t) x0 + t noise, times (B,). Its velocity is noise - x0."""
    t = times.reshape(-1, *[1] * (x0.ndim - 1))
    return (1 - t) * x0 + t * noise
