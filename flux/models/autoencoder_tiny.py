"""The tiny autoencoder's decoder (TAESD and its kin, Bohan 2023): latents -> pictures by few convolutions.

Attribute names are those of diffusers' AutoencoderTiny; layers without weights count in its numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from flux.models.autoencoder import doubled

CLAMP = 3.0  # latents are squeezed into -3..3, softly


@dataclass(frozen=True)
class TinyDecoderParams:
    """The shape of the network; the defaults are TAEF1's, for FLUX.1. blocks: in each resolution."""

    latent_channels: int = 16
    width: int = 64
    blocks: tuple[int, ...] = (3, 3, 3, 1)
    scale_factor: float = 1.0
    shift_factor: float = 0.0


class TinyBlock(nn.Module):
    """Three convolutions beside an identity. (B, h, w, width) -> the same."""

    def __init__(self, width: int):
        super().__init__()
        convolutions = [nn.Conv2d(width, width, kernel_size=3, padding=1) for _ in range(3)]
        self.conv = [convolutions[0], nn.ReLU(), convolutions[1], nn.ReLU(), convolutions[2]]

    def __call__(self, x: mx.array) -> mx.array:
        return nn.relu(x + one_by_one(self.conv, x))


class Double(nn.Module):
    """Twice the size, without weights."""

    def __call__(self, x: mx.array) -> mx.array:
        return doubled(x)


class TinyDecoder(nn.Module):
    """The transformer's latents (B, h, w, z) -> pictures (B, H, W, 3), about -1..1.

    There are as many pixels to a latent, along each side, as 2 to the number of resolutions less one.
    """

    def __init__(self, params: TinyDecoderParams):
        super().__init__()
        self.params = params
        width = params.width
        self.layers = [nn.Conv2d(params.latent_channels, width, kernel_size=3, padding=1), nn.ReLU()]
        for count in params.blocks:
            self.layers += [TinyBlock(width) for _ in range(count)]
            self.layers += [Double(), nn.Conv2d(width, width, kernel_size=3, padding=1, bias=False)]
        self.layers[-2:] = [nn.Conv2d(width, 3, kernel_size=3, padding=1)]

    @property
    def downscale(self) -> int:
        """Pixels to a latent along one axis."""
        return 2 ** (len(self.params.blocks) - 1)

    def __call__(self, z: mx.array) -> mx.array:
        x = (z / self.params.scale_factor + self.params.shift_factor).astype(self.layers[0].weight.dtype)
        return 2 * one_by_one(self.layers, mx.tanh(x / CLAMP) * CLAMP) - 1


def one_by_one(layers: Sequence[nn.Module], x: mx.array) -> mx.array:
    """x through the layers, each evaluated: on a CPU the convolutions' copies would add up in memory."""
    for layer in layers:
        x = layer(x)
        mx.eval(x)
    return x
