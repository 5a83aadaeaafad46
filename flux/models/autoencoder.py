"""FLUX's autoencoder: pictures <-> latents of an eighth of the height and width.

Attribute names are those of the BFL checkpoint (`ae.safetensors`). Tensors are channels-last, so a
checkpoint's convolutions (O, I, H, W) are transposed to (O, H, W, I) at load, and the attention's
1x1 convolutions, which are `nn.Linear` here, lose their last two axes.
"""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn


@dataclass(frozen=True)
class AutoEncoderParams:
    """The shape of the network; the defaults are FLUX.1's."""

    in_channels: int = 3
    ch: int = 128
    out_ch: int = 3
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_channels: int = 16
    norm_groups: int = 32
    scale_factor: float = 0.3611
    shift_factor: float = 0.1159


class GroupNorm(nn.Module):
    """Normalisation of groups of neighbouring channels over the whole picture, in float32."""

    def __init__(self, groups: int, channels: int, eps: float = 1e-6):
        super().__init__()
        self.groups = groups
        self.eps = eps
        self.weight = mx.ones(channels)
        self.bias = mx.zeros(channels)

    def __call__(self, x: mx.array) -> mx.array:
        y = x.astype(mx.float32)
        y = y - self._group_mean(y)
        variance = self._group_mean(mx.square(y))
        y = y * (mx.rsqrt(variance + self.eps) * self.weight) + self.bias
        return y.astype(x.dtype)

    def _group_mean(self, x: mx.array) -> mx.array:
        b, _, _, c = x.shape
        mean = x.mean(axis=1).mean(axis=1).reshape(b, self.groups, -1)  # (B, H, W, C) -> (B, G, C/G)
        mean = mx.broadcast_to(mean.mean(axis=2, keepdims=True), mean.shape)
        return mean.reshape(b, 1, 1, c)


class ResnetBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, groups: int):
        super().__init__()
        self.norm1 = GroupNorm(groups, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        self.norm2 = GroupNorm(groups, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, kernel_size=1)

    def __call__(self, x: mx.array) -> mx.array:
        h = self.conv1(nn.silu(self.norm1(x)))
        h = self.conv2(nn.silu(self.norm2(h)))
        if "nin_shortcut" in self:
            x = self.nin_shortcut(x)
        return x + h


class AttnBlock(nn.Module):
    """Self-attention among all pixels, one head as wide as the channels."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = GroupNorm(groups, channels)
        self.q = nn.Linear(channels, channels)
        self.k = nn.Linear(channels, channels)
        self.v = nn.Linear(channels, channels)
        self.proj_out = nn.Linear(channels, channels)

    def __call__(self, x: mx.array) -> mx.array:
        b, height, width, c = x.shape
        h = self.norm(x).reshape(b, 1, height * width, c)  # one head
        h = mx.fast.scaled_dot_product_attention(self.q(h), self.k(h), self.v(h), scale=c**-0.5)
        return x + self.proj_out(h.reshape(b, height, width, c))


class MidBlock(nn.Module):
    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, groups)
        self.attn_1 = AttnBlock(channels, groups)
        self.block_2 = ResnetBlock(channels, channels, groups)

    def __call__(self, x: mx.array) -> mx.array:
        return self.block_2(self.attn_1(self.block_1(x)))


class Downsample(nn.Module):
    """Half the size. The convolution is padded at the right and the bottom only."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2)

    def __call__(self, x: mx.array) -> mx.array:
        return self.conv(mx.pad(x, [(0, 0), (0, 1), (0, 1), (0, 0)]))


class Upsample(nn.Module):
    """Twice the size: every pixel becomes four, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1)

    def __call__(self, x: mx.array) -> mx.array:
        b, height, width, c = x.shape
        x = mx.broadcast_to(x[:, :, None, :, None], (b, height, 2, width, 2, c))
        return self.conv(x.reshape(b, 2 * height, 2 * width, c))


class Level(nn.Module):
    """The blocks of one resolution, and the way to the next one, if any."""

    def __init__(self, in_channels: int, out_channels: int, blocks: int, groups: int):
        super().__init__()
        self.block = [
            ResnetBlock(in_channels if i == 0 else out_channels, out_channels, groups) for i in range(blocks)
        ]

    def __call__(self, x: mx.array) -> mx.array:
        for block in self.block:
            x = block(x)
        if "downsample" in self:
            x = self.downsample(x)
        if "upsample" in self:
            x = self.upsample(x)
        return x


class Encoder(nn.Module):
    def __init__(self, params: AutoEncoderParams):
        super().__init__()
        widths = [params.ch * mult for mult in params.ch_mult]
        groups = params.norm_groups
        self.conv_in = nn.Conv2d(params.in_channels, params.ch, kernel_size=3, padding=1)
        inputs = [params.ch, *widths[:-1]]
        self.down = [Level(i, o, params.num_res_blocks, groups) for i, o in zip(inputs, widths, strict=True)]
        for level, width in zip(self.down[:-1], widths, strict=False):
            level.downsample = Downsample(width)
        self.mid = MidBlock(widths[-1], groups)
        self.norm_out = GroupNorm(groups, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * params.z_channels, kernel_size=3, padding=1)

    def __call__(self, x: mx.array) -> mx.array:
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        h = self.mid(h)
        return self.conv_out(nn.silu(self.norm_out(h)))


class Decoder(nn.Module):
    def __init__(self, params: AutoEncoderParams):
        super().__init__()
        widths = [params.ch * mult for mult in params.ch_mult]
        groups = params.norm_groups
        self.conv_in = nn.Conv2d(params.z_channels, widths[-1], kernel_size=3, padding=1)
        self.mid = MidBlock(widths[-1], groups)
        # up[0] has the highest resolution, as down[0] has, and comes last.
        inputs = [*widths[1:], widths[-1]]
        self.up = [
            Level(i, o, params.num_res_blocks + 1, groups) for i, o in zip(inputs, widths, strict=True)
        ]
        for level, width in zip(self.up[1:], widths[1:], strict=True):
            level.upsample = Upsample(width)
        self.norm_out = GroupNorm(groups, params.ch)
        self.conv_out = nn.Conv2d(params.ch, params.out_ch, kernel_size=3, padding=1)

    def __call__(self, z: mx.array) -> mx.array:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(nn.silu(self.norm_out(h)))


class AutoEncoder(nn.Module):
    """Encoder and decoder, with the scale and shift between the encoder's latent and the transformer's."""

    def __init__(self, params: AutoEncoderParams):
        super().__init__()
        self.params = params
        self.encoder = Encoder(params)
        self.decoder = Decoder(params)

    def moments(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """Mean and log variance of the raw latent, each (B, H/8, W/8, z), of x (B, H, W, 3) in -1..1."""
        mean, logvar = mx.split(self.encoder(x), 2, axis=-1)
        return mean, logvar

    def encode(self, x: mx.array, noise: mx.array | None = None) -> mx.array:
        """The scaled latent (B, H/8, W/8, z) of x (B, H, W, 3) in -1..1.

        It is the mean, or with `noise` (standard normal, of the latent's shape) a sample.
        """
        z, logvar = self.moments(x)
        if noise is not None:
            z = z + mx.exp(0.5 * logvar) * noise
        return self.params.scale_factor * (z - self.params.shift_factor)

    def decode(self, z: mx.array) -> mx.array:
        """The picture (B, H, W, 3), about -1..1, of a scaled latent (B, H/8, W/8, z)."""
        return self.decoder(z / self.params.scale_factor + self.params.shift_factor)
