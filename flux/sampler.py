"""Flow matching, sampled: times, noise and packing; `flux.solvers` has the steps. Pure functions of arrays.

A picture on its way from noise is x_t = (1 - t) x_0 + t noise, the model predicts noise - x_0 = dx/dt, and
sampling walks t from 1 to 0. Between steps x stays in float32, whatever type the model computes in.
"""

import math
import secrets
from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from flux.errors import FluxError
from flux.jsonfiles import shown
from flux.noise import randn

MAX_SEED = 2**64 - 1  # what mx.random.key takes, and torch.manual_seed
NOISES = ("mlx", "torch", "diffusers")
COMFYUI_SCHEDULES = ("simple", "normal", "sgm_uniform", "beta", "karras")
SCHEDULES = ("model", *COMFYUI_SCHEDULES)


class Shift(NamedTuple):
    """A time shift that grows with the picture: mu is linear in its tokens through two points.

    The defaults are dev's (BFL's sampling.py; in diffusers' words base_shift, max_shift, base_image_seq_len
    and max_image_seq_len).
    """

    base: float = 0.5
    most: float = 1.15
    base_tokens: int = 256
    most_tokens: int = 4096


DEV_SHIFT = Shift()
MOST_TOKENS = 2**18  # of a picture of 8192x8192

# How a model shifts its times: False not at all, True as dev, a number by that factor in any size.
AnyShift = bool | float | Shift


def timesteps(num_steps: int, image_tokens: int, shift: AnyShift, schedule: str = "model") -> list[float]:
    """The `num_steps + 1` times from 1 down to 0, evenly spaced and then, with `shift`, moved towards noise.

    Large pictures need more noise to be destroyed as much, so dev shifts by the number of picture tokens:
    t -> e^mu / (e^mu + 1/t - 1) (Esser et al. 2024, eq. 23, as in BFL's and diffusers' code). schnell not.
    A fixed factor s is the same with s for e^mu: t -> s t / (1 + (s - 1) t).
    Computed in float32 in the reference's order, so that the times are diffusers' to the bit.
    schedule: "model" for these, or one of `COMFYUI_SCHEDULES`, which shift dev by the same in any size.
    """
    if num_steps < 1:
        raise FluxError(f"steps must be at least 1, not {num_steps}")
    if schedule != "model":
        shift = DEV_SHIFT if shift is True else shift
        factor = math.exp(shift.most) if isinstance(shift, Shift) else shift
        return comfyui_times(schedule, num_steps, None if factor is False else float(factor))
    times: Any = np.linspace(1.0, 1.0 / num_steps, num_steps).astype(np.float32)
    if isinstance(shift, Shift) or shift is True:
        e_mu = time_shift(image_tokens, shift if isinstance(shift, Shift) else DEV_SHIFT)
        times = e_mu / (e_mu + (1 / times - 1))
    elif shift is not False:
        times = shift * times / (1 + (shift - 1) * times)
    return [*times.tolist(), 0.0]


def time_shift(image_tokens: int, shift: Shift = DEV_SHIFT) -> float:
    """e^mu, by which dev's times are shifted; mu is linear in the number of picture tokens."""
    slope = (shift.most - shift.base) / (shift.most_tokens - shift.base_tokens)
    return math.exp(image_tokens * slope + (shift.base - slope * shift.base_tokens))


def read_shift(value: Any) -> AnyShift:
    """A shift as people and files write it: "dev" or true, "none" or false, a factor, or a Shift's numbers.

    FluxError for anything else.
    """
    words: dict[str, AnyShift] = {"dev": True, "none": False}
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value in words:
        return words[value]
    try:
        if isinstance(value, list | tuple):
            base, most, base_tokens, most_tokens = value
            read = Shift(base, most, base_tokens, most_tokens)
            if math.isfinite(time_shift(MOST_TOKENS, read)):
                return read
        elif 0 < float(value) < math.inf:
            return float(value)
    except (TypeError, ValueError, ZeroDivisionError, OverflowError):
        pass
    raise FluxError(f"a shift is dev, none or a factor above 0, not {shown(value)}")


def comfyui_times(schedule: str, num_steps: int, factor: float | None) -> list[float]:
    """The `num_steps + 1` times that ComfyUI gives a FLUX model, one of `COMFYUI_SCHEDULES`.

    factor: t -> factor / (factor + 1/t - 1): e^1.15 for dev unless its node ModelSamplingFlux says another;
    None for schnell, whose times are not shifted. "simple" takes every n-th entry of a table of
    10,000 times (of schnell's 1,000), and "beta" the entries at the quantiles of the Beta(0.6, 0.6)
    distribution: dense at both ends (Lee et al. 2024). "normal" and "sgm_uniform" shift evenly spaced times,
    from the table's first to its last, which is shifted then already: they stop earlier. "karras" goes from
    the one to the other evenly in t^(1/7) (Karras et al. 2022, eq. 5). In float32 and ComfyUI's order.
    """
    if schedule not in COMFYUI_SCHEDULES:
        raise FluxError(f"the schedule must be one of {', '.join(SCHEDULES)}, not {schedule!r}")

    def shifted(times: np.ndarray) -> np.ndarray:
        return times if factor is None else 1 / (factor + (1 / times - 1)) * factor  # as PyTorch divides

    size = 1000 if factor is None else 10000
    table = shifted(np.arange(1, size + 1, dtype=np.float32) / np.float32(size))
    if schedule == "simple":
        times = table[[-1 - int(i * (size / num_steps)) for i in range(num_steps)]]
    elif schedule == "beta":
        places = [round(beta_quantile(1 - i / num_steps) * (size - 1)) for i in range(num_steps)]
        if len(set(places)) < num_steps:
            raise FluxError(f"the schedule beta has no {num_steps} different times; take fewer steps")
        times = table[places]
    elif schedule == "karras":
        ends = table[[-1, 0]] ** np.float32(1 / 7)
        times = (ends[0] + np.linspace(0, 1, num_steps, dtype=np.float32) * (ends[1] - ends[0])) ** 7
    else:
        count = num_steps + (schedule == "sgm_uniform")
        times = shifted(np.linspace(table[-1], table[0], count, dtype=np.float32)[:num_steps])
    return [*times.tolist(), 0.0]


def beta_quantile(p: float, a: float = 0.6) -> float:
    """The p-quantile (0..1) of the symmetric Beta(a, a) distribution.

    By bisection of its distribution function, for x <= 1/2 the series x^a sum_k (1-a)_k / k! x^k / (a + k)
    over its value at 1/2, which is half of all (Abramowitz & Stegun 26.5.4 and 6.6.8).
    """
    if p > 0.5:
        return 1 - beta_quantile(1 - p, a)

    def area(x: float) -> float:
        total, factor = 0.0, 1.0
        for k in range(60):
            total += factor * x**k / (a + k)
            factor *= (1 - a + k) / (k + 1)
        return x**a * total

    low, high, wanted = 0.0, 0.5, 2 * p * area(0.5)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if area(middle) < wanted else (low, middle)
    return high if p else 0.0


def from_strength(times: list[float], strength: float) -> list[float]:
    """The last times, the share `strength` (0..1) of the steps, for a picture as the start; as in diffusers.

    At least the last time, 0, is left: strength 0 makes no step.
    """
    steps = len(times) - 1
    return times[int(max(steps - min(steps * strength, steps), 0)) :]


def estimate(x: mx.array, x_next: mx.array, t: float, t_next: float) -> mx.array:
    """The model's x_0 = x - t v in a step from t to t_next, of float32 latents of one shape.

    From v = (x_next - x) / (t_next - t): exact for Euler's step, and for those of other solvers what they put
    in for x_0.
    """
    return (t * x_next - t_next * x) / (t - t_next)


def random_seed() -> int:
    """A seed from the operating system, short enough to be typed again."""
    return secrets.randbits(32)


def check_seeds(seeds: Sequence[int]) -> None:
    """FluxError, naming the seed, for one that `noise` cannot take."""
    for seed in seeds:
        if not 0 <= seed <= MAX_SEED:
            raise FluxError(f"a seed must lie between 0 and {MAX_SEED}, not {seed}")


def noise(
    seeds: Sequence[int],
    latent_size: tuple[int, int],
    channels: int,
    kind: str = "mlx",
    dtype: mx.Dtype = mx.float32,
) -> mx.array:
    """Standard normal latents (B, h, w, channels), float32; picture i depends on seeds[i] and the shape.

    kind: whose random numbers, one of `NOISES`. "torch" is PyTorch's CPU generator in float32, with which
    ComfyUI draws; "diffusers" the same rounded to `dtype`, the type that the model computes in.
    """
    check_seeds(seeds)
    check_noise(kind)
    if kind == "mlx":
        shape = (*latent_size, channels)
        return mx.stack([mx.random.normal(shape, key=mx.random.key(seed)) for seed in seeds])
    drawn = [randn(seed, channels * math.prod(latent_size)) for seed in seeds]
    x = mx.array(np.stack(drawn)).reshape(-1, channels, *latent_size)  # (B, C, h, w), PyTorch's order
    if kind == "diffusers":
        x = x.astype(dtype).astype(mx.float32)
    return x.transpose(0, 2, 3, 1)


def check_noise(kind: str) -> None:
    """Raise FluxError for what is not one of `NOISES`."""
    if kind not in NOISES:
        raise FluxError(f"the noise must be one of {', '.join(NOISES)}, not {kind!r}")


def pack(latent: mx.array) -> mx.array:
    """Latent (B, h, w, C) -> tokens (B, h/2 * w/2, 4C): one token a 2x2 patch, channels first within it."""
    B, h, w, C = latent.shape
    if h % 2 or w % 2:
        raise FluxError(f"a latent's height and width must be even, not {h}x{w}")
    x = latent.reshape(B, h // 2, 2, w // 2, 2, C)
    x = x.transpose(0, 1, 3, 5, 2, 4)  # (B, h/2, w/2, C, 2, 2)
    return x.reshape(B, h // 2 * (w // 2), 4 * C)


def unpack(tokens: mx.array, latent_size: tuple[int, int]) -> mx.array:
    """Tokens (B, h/2 * w/2, 4C) -> latent (B, h, w, C), the inverse of `pack`."""
    h, w = latent_size
    B, L, C = tokens.shape
    if h % 2 or w % 2 or h // 2 * (w // 2) != L:
        raise FluxError(f"{L} tokens cannot form a latent of {h}x{w}")
    x = tokens.reshape(B, h // 2, w // 2, C // 4, 2, 2)
    x = x.transpose(0, 1, 4, 2, 5, 3)  # (B, h/2, 2, w/2, 2, C)
    return x.reshape(B, h, w, C // 4)


def image_positions(latent_size: tuple[int, int], index: int = 0) -> mx.array:
    """Positions (1, h/2 * w/2, 3) of a picture's tokens, int32: (index, row, column).

    `index` is 0 for the picture that is made; reference pictures have others.
    """
    h, w = latent_size[0] // 2, latent_size[1] // 2
    rows = mx.broadcast_to(mx.arange(h)[:, None], (h, w))
    columns = mx.broadcast_to(mx.arange(w)[None, :], (h, w))
    positions = mx.stack([mx.full((h, w), index, dtype=mx.int32), rows, columns], axis=-1)
    return positions.astype(mx.int32).reshape(1, h * w, 3)


def text_positions(length: int) -> mx.array:
    """Positions (1, length, 3) of text tokens, int32: all zero, FLUX gives text no position."""
    return mx.zeros((1, length, 3), dtype=mx.int32)


def guide(positive: mx.array, negative: mx.array, scale: float) -> mx.array:
    """True classifier-free guidance: away from the negative prompt's prediction; scale 1 has no effect."""
    return negative + scale * (positive - negative)
