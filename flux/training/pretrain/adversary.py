"""The adversary of the autoencoder: a PatchGAN discriminator, its hinge loss and the R1 penalty."""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from flux.models.autoencoder import GroupNorm
from flux.tables import option


@dataclass(frozen=True)
class DiscriminatorParams:
    """Sizes of the discriminator."""

    channels: int = option(64, least=1)  # of the first layer; each next one has twice as many, up to 8 times
    layers: int = option(3, least=1)  # each halves the size
    norm_groups: int = option(32, least=1)


class Discriminator(nn.Module):
    """Judges overlapping patches: pictures (B, H, W, 3) in -1..1 -> scores (B, H/2^layers, W/2^layers, 1).

    Isola et al., "Image-to-Image Translation with Conditional Adversarial Networks" (2017), with group norms,
    so that a picture's score depends on that picture alone.
    """

    def __init__(self, params: DiscriminatorParams):
        super().__init__()
        widths = [params.channels * min(2**i, 8) for i in range(params.layers)]
        inputs = [3, *widths[:-1]]
        self.convs = [nn.Conv2d(i, o, 4, stride=2, padding=1) for i, o in zip(inputs, widths, strict=True)]
        self.norms = [GroupNorm(params.norm_groups, width) for width in widths[1:]]  # not next to the pixels
        self.out = nn.Conv2d(widths[-1], 1, 3, padding=1)

    def __call__(self, x: mx.array) -> mx.array:
        h = _leaky(self.convs[0](x))
        for conv, norm in zip(self.convs[1:], self.norms, strict=True):
            h = _leaky(norm(conv(h)))
        return self.out(h)


def _leaky(x: mx.array) -> mx.array:
    return mx.maximum(x, 0.2 * x)


def hinge(real: mx.array, fake: mx.array) -> mx.array:
    """The discriminator's loss of its scores, relu(1 - real) + relu(1 + fake), mean (Lim & Ye 2017)."""
    return mx.maximum(1 - real, 0).mean() + mx.maximum(1 + fake, 0).mean()


def r1(discriminator: Callable[[mx.array], mx.array], real: mx.array) -> mx.array:
    """Squared length of the gradient of each picture's score by its pixels, mean over pictures (B, H, W, 3).

    A patch network has many scores a picture: the sum of them is derived. Mescheder et al., "Which Training
    Methods for GANs do actually Converge?" (2018), eq. 9, there weighted by gamma / 2.
    """
    gradient = mx.grad(lambda x: discriminator(x).sum())(real).astype(mx.float32)
    return mx.square(gradient).sum(axis=(1, 2, 3)).mean()
