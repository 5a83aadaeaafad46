"""What pictures bring to every step."""

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx


class PictureConditioning(NamedTuple):
    """What pictures tell the transformer and the sampler; of a batch of 1, so that it serves any batch.

    A tuple of arrays, so that `mx.eval` takes it. L is the number of the latent's tokens.
    channels (1, L, C'): beside the noise's channels. tokens (1, Lr, C): after the noise's tokens, at
    positions (1, Lr, 3). known (1, L, C): the latent of the picture that is changed. mask (1, L, C) or
    (1, L, 1): 1 where it changes, 0 where it is put back after each step, v between them where it is put back
    until the last v of the steps; None: it changes everywhere.
    controls (1, L, C') each: the control picture of each ControlNet, packed.
    """

    channels: mx.array | None = None
    tokens: mx.array | None = None
    positions: mx.array | None = None
    known: mx.array | None = None
    mask: mx.array | None = None
    controls: tuple[mx.array, ...] = ()

    def start(self, noise: mx.array, t: float) -> mx.array:
        """What sampling starts with at time t: noise (B, L, C), or with a picture the picture under it."""
        return noise if self.known is None else (1 - t) * self.known + t * noise

    def put_back(self, x: mx.array, noise: mx.array, times: Sequence[float], step: int) -> mx.array:
        """x (B, L, C) after a step of those between times, with the picture where it does not change yet.

        The picture is as noisy as x is. Where the mask is v it is put back until the last v of the steps,
        rounded to whole steps.
        """
        if self.mask is None:
            return x
        left = 1 - (step + 0.5) / (len(times) - 1)
        return mx.where(self.mask >= left, x, self.start(noise, times[step + 1]))


NO_PICTURES = PictureConditioning()
