"""Guidance by a loss from Python: each step's estimate of the picture moves to where the loss is less."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx

from flux import images, machine, sampler
from flux.errors import FluxError
from flux.models.autoencoder import AutoEncoder

Loss = Callable[[mx.array, float], mx.array]
SPACES = ("latent", "pixels")


@dataclass(frozen=True)
class Guide:
    """A loss that pictures are led by, and how.

    loss: `loss(estimate, t)` is one number, 0 where the picture is as wanted and above 0 elsewhere, made of
    mlx.core's operations. estimate: of the finished picture at time t, from 1 (noise) to 0. on "latent" it is
    (1, h, w, C), and on "pixels" (1, H, W, 3) in 0..1.
    strength: 1 moves the estimate to where the loss, if it were linear, would be 0: for a squared distance
    half the way. A loss that is multiplied by a number leads the same.
    start, end: the steps that are led, as shares of all of them.
    FluxError, naming the value, for others.
    """

    loss: Loss
    strength: float = 1.0
    on: str = "latent"
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        if not callable(self.loss):
            raise FluxError(f"a guide is a function of an estimate and a time, not {self.loss!r}")
        if self.on not in SPACES:
            raise FluxError(f"a guide's loss is on {' or '.join(SPACES)}, not {self.on!r}")
        if not 0 < self.strength < math.inf:
            raise FluxError(f"a guide's strength must be above 0 and finite, not {self.strength}")
        if not 0 <= self.start < self.end <= 1:
            raise FluxError(
                f"a guide's start and end must be shares of the steps with 0 <= start < end <= 1, "
                f"not {self.start} and {self.end}"
            )

    def bound(self, ae: AutoEncoder, latent_size: tuple[int, int]) -> "BoundGuide":
        """The guide for packed latents of this (height, width); ae decodes and encodes for one on pixels."""

        def unpack(x: mx.array) -> mx.array:
            return sampler.unpack(x, latent_size)

        def decode(x: mx.array) -> mx.array:
            return images.denormalize(ae.decode(unpack(x), machine.autoencoder_memory()))

        def encode(pixels: mx.array) -> mx.array:
            x = (2 * mx.clip(pixels, 0, 1) - 1).astype(ae.encoder.conv_in.weight.dtype)
            return sampler.pack(ae.encode(x, memory=machine.autoencoder_memory())).astype(mx.float32)

        return BoundGuide(self, *((unpack, sampler.pack) if self.on == "latent" else (decode, encode)))


def as_guide(given: Guide | Loss | None) -> Guide | None:
    """A guide as it is; a function is its loss, on latents."""
    return given if given is None or isinstance(given, Guide) else Guide(given)


class BoundGuide(NamedTuple):
    """A guide with what shows its loss a packed latent, and what makes a packed latent of it again."""

    guide: Guide
    show: Callable[[mx.array], mx.array]
    back: Callable[[mx.array], mx.array]

    def velocity(self, v: mx.array, x: mx.array, t: float, step: int, steps: int) -> mx.array:
        """The velocity v (B, L, C), float32, at x in step `step` of `steps`, led by the loss.

        The estimate x0 = x - t v of each picture is moved along the loss's gradient with respect to what the
        loss is shown: not through the transformer, nor through the autoencoder, which decodes before and
        encodes after it, so that x0 stays a picture's latent (He et al. 2024, MPGD). Then v leads to that x0.
        """
        if not self.guide.start <= step / steps < self.guide.end:
            return v
        changes = [self._change(x[i : i + 1] - t * v[i : i + 1], t, step) for i in range(len(x))]
        return v - mx.concatenate(changes) / t

    def _change(self, x0: mx.array, t: float, step: int) -> mx.array:
        """What is added to an estimate (1, L, C)."""
        shown = self.show(x0)
        moved = shown + self.guide.strength * descent(self.guide.loss, shown, t, step)
        return self.back(moved) - self.back(shown)


def descent(loss: Loss, shown: mx.array, t: float, step: int) -> mx.array:
    """-L g / |g|^2, of `shown`'s shape: the step to where the loss L, linear with its gradient g, would be 0.

    It does not depend on the loss's scale (Polyak 1969), and is at most as long as `shown` itself. FluxError
    where the loss is not one finite number from 0 on, or does not depend on what it is shown.
    """
    value, gradient = _value_and_gradient(loss, shown, t)
    where = f"in step {step + 1} (t = {t:.3f})"
    numbers: Any = mx.stack([value, mx.square(gradient).sum(), mx.square(shown).sum()]).tolist()
    found, square, size = numbers
    if not (math.isfinite(found) and math.isfinite(square)):
        raise FluxError(f"the guide's loss or its gradient is not finite {where}: the loss is {found}")
    if found < 0:
        raise FluxError(f"the guide's loss is {found:g} {where}: it must be 0 where the picture is as wanted")
    if found == 0:
        return mx.zeros_like(shown)
    if square == 0:
        raise FluxError(f"the guide's loss, {found:g} {where}, does not depend on the picture: no gradient")
    return -min(found / square, math.sqrt(size / square)) * gradient


def _value_and_gradient(loss: Loss, shown: mx.array, t: float) -> tuple[mx.array, mx.array]:
    """A loss and its gradient, float32. FluxError where it is not one number."""

    def one_number(x: mx.array) -> mx.array:
        value = loss(x, t)
        if not isinstance(value, mx.array):
            raise FluxError(f"the guide's loss must be one number, an mx.array, not {type(value).__name__}")
        if value.size != 1:
            raise FluxError(f"the guide's loss must be one number, not an array of shape {value.shape}")
        return value.reshape(()).astype(mx.float32)

    return mx.value_and_grad(one_number)(shown)
