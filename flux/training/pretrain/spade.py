"""A decoder whose norms are modulated, pixel by pixel, by the latent that it decodes.

SPADE: Park et al., "Semantic Image Synthesis with Spatially-Adaptive Normalization" (2019), with the latent
instead of the segmentation map. A norm wipes out what the latent says about contrast and colour at a
point; the modulation says it again at every resolution. Its last layers start at zero, so a network begins as
the plain decoder that it extends.
"""

import mlx.core as mx
import mlx.nn as nn

from flux.models.autoencoder import AutoEncoderParams, Decoder, ResnetBlock
from flux.models.layers import silu

HIDDEN = 64  # channels between the latent and a norm's scale and shift


class Spade(nn.Module):
    """What one norm's output is scaled by and shifted by, from the latent."""

    def __init__(self, z_channels: int, channels: int):
        super().__init__()
        self.shared = nn.Conv2d(z_channels, HIDDEN, 3, padding=1)
        self.both = nn.Conv2d(HIDDEN, 2 * channels, 3, padding=1)
        self.both.weight = mx.zeros_like(self.both.weight)

    def __call__(self, x: mx.array, z: mx.array) -> mx.array:
        """x (B, H, W, C), z (B, h, w, z) with h a divisor of H -> x's shape."""
        z = nearest(z, x.shape[1] // z.shape[1])
        scale, shift = mx.split(self.both(mx.maximum(self.shared(z), 0)), 2, axis=-1)
        return x * (1 + scale) + shift


def nearest(x: mx.array, times: int) -> mx.array:
    """(B, h, w, C) -> (B, times * h, times * w, C), each pixel repeated."""
    b, h, w, c = x.shape
    x = mx.broadcast_to(x[:, :, None, :, None], (b, h, times, w, times, c))
    return x.reshape(b, times * h, times * w, c)


class SpadeLayers(nn.Module):
    """Two modulations a residual block, in the order of the blocks' use."""

    def __init__(self, z_channels: int, blocks: list[ResnetBlock]):
        super().__init__()
        self.layers = [
            [Spade(z_channels, block.norm1.weight.size), Spade(z_channels, block.norm2.weight.size)]
            for block in blocks
        ]


class SpadeDecoder(Decoder):
    """The autoencoder's decoder with its residual blocks' norms modulated by the latent."""

    def __init__(self, params: AutoEncoderParams):
        super().__init__(params)
        self.spade = SpadeLayers(params.z_channels, self._blocks())

    def _blocks(self) -> list[ResnetBlock]:
        levels = [block for level in reversed(self.up) for block in level.block]
        return [self.mid.block_1, self.mid.block_2, *levels]

    def start(self, z: mx.array) -> mx.array:
        """(B, h, w, z) -> (B, h, w, widest + z): the latent goes along, for the rest needs it, too."""
        first, second, *_ = self.spade.layers
        h = _modulated(self.mid.block_1, first, self.conv_in(z), z)
        h = _modulated(self.mid.block_2, second, self.mid.attn_1(h), z)
        return mx.concatenate([h, z], axis=-1)

    def grow(self, h: mx.array) -> mx.array:
        """(B, h, w, widest + z) -> (B, H, W, 3)."""
        h, z = mx.split(h, [h.shape[-1] - self.conv_in.weight.shape[-1]], axis=-1)
        pairs = iter(self.spade.layers[2:])
        for level in reversed(self.up):
            for block in level.block:
                h = _modulated(block, next(pairs), h, z)
            if "upsample" in level:
                h = level.upsample(h)
        return self.conv_out(silu(self.norm_out(h)))


def _modulated(block: ResnetBlock, spades: list[Spade], x: mx.array, z: mx.array) -> mx.array:
    """A residual block with modulated norms."""
    first, second = spades
    h = block.conv1(silu(first(block.norm1(x), z)))
    h = block.conv2(silu(second(block.norm2(h), z)))
    if "nin_shortcut" in block:
        x = block.nin_shortcut(x)
    return x + h
