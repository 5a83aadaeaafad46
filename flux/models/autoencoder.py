"""FLUX's autoencoder: pictures <-> latents of an eighth of the height and width.

Attribute names are those of the BFL checkpoint (`ae.safetensors`). Tensors are channels-last, so a
checkpoint's convolutions (O, I, H, W) are transposed to (O, H, W, I) at load, and the attention's
1x1 convolutions, which are `nn.Linear` here, lose their last two axes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from flux.models.layers import fused, silu

Layer = Callable[[mx.array], mx.array]

MEMORY = 16 * 2**30  # bytes that a decode or an encode may take before it goes in pieces
SCORES_MEMORY = 2**28  # bytes of attention scores at a time
MIN_TILE = 32  # latents; smaller tiles would show: their statistics are too local
OVERLAP = 8  # latents in which neighbouring tiles fade into each other


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
    """Normalisation of groups of neighbouring channels over the whole picture, in float32.

    The mean goes first, the variance is that of what is left, and both are sums of short sums: the error then
    stays at the rounding of a number or two, however large the picture. One long sum, or E[x^2] - E[x]^2,
    would lose digits as pictures grow: on a CPU, MLX's GroupNorm is wrong by 9e-4 at 768x768.
    """

    def __init__(self, groups: int, channels: int, eps: float = 1e-6):
        super().__init__()
        self.groups = groups
        self.eps = eps
        self.weight = mx.ones(channels)
        self.bias = mx.zeros(channels)

    def __call__(self, x: mx.array) -> mx.array:
        mean = self._group_mean(x.astype(mx.float32))
        variance = self._group_mean(_squared_distance(x, mean))
        return _scale_and_shift(x, mean, mx.rsqrt(variance + self.eps) * self.weight, self.bias)

    def _group_mean(self, x: mx.array) -> mx.array:
        """(B, H, W, C) -> (B, 1, 1, C), where the channels of a group share one value."""
        b, _, _, c = x.shape
        mean = _mean_of_rows(_mean_of_rows(x)).reshape(b, self.groups, -1)  # (B, C) -> (B, G, C/G)
        return mx.broadcast_to(mean.mean(axis=2, keepdims=True), mean.shape).reshape(b, 1, 1, c)


def _mean_of_rows(x: mx.array) -> mx.array:
    """(B, N, ...) -> (B, ...), by means of eight, of eight such means, and so on."""
    while x.shape[1] % 8 == 0:
        x = x.reshape(x.shape[0], -1, 8, *x.shape[2:]).mean(axis=2)
    return x.mean(axis=1)


@fused
def _squared_distance(x: mx.array, mean: mx.array) -> mx.array:
    return mx.square(x.astype(mx.float32) - mean)


@fused
def _scale_and_shift(x: mx.array, mean: mx.array, scale: mx.array, shift: mx.array) -> mx.array:
    # Compiled, as the above, so that no float32 copy of a 16-bit picture comes to exist.
    return ((x.astype(mx.float32) - mean) * scale + shift).astype(x.dtype)


class ResnetBlock(nn.Module):
    """Two convolutions beside an identity, or beside a 1x1 convolution where the width changes."""

    def __init__(self, in_channels: int, out_channels: int, groups: int):
        super().__init__()
        self.norm1 = GroupNorm(groups, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        self.norm2 = GroupNorm(groups, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, kernel_size=1)

    def __call__(self, x: mx.array) -> mx.array:
        h = self.conv1(silu(self.norm1(x)))
        h = self.conv2(silu(self.norm2(h)))
        if "nin_shortcut" in self:
            x = self.nin_shortcut(x)
        return x + h


class AttnBlock(nn.Module):
    """Self-attention among all pixels, one head as wide as the channels.

    MLX has no fused kernel for heads of 512, so the scores exist in memory, 17 GB of them for a picture of
    2048x2048: the queries go in chunks whose scores take at most `scores_memory` bytes. Each query sees all
    keys, so the chunks change nothing but the order of work. More than one chunk cannot be in `mx.compile`.
    """

    def __init__(self, channels: int, groups: int, scores_memory: int = SCORES_MEMORY):
        super().__init__()
        self.scores_memory = scores_memory
        self.norm = GroupNorm(groups, channels)
        self.q = nn.Linear(channels, channels)
        self.k = nn.Linear(channels, channels)
        self.v = nn.Linear(channels, channels)
        self.proj_out = nn.Linear(channels, channels)

    def __call__(self, x: mx.array) -> mx.array:
        b, height, width, c = x.shape
        length = height * width
        h = self.norm(x).reshape(b, 1, length, c)  # one head
        q, k, v = self.q(h), self.k(h), self.v(h)
        # A query's scores are one float32 for each pixel of each picture.
        chunk = min(length, max(1, self.scores_memory // (4 * b * length)))
        parts = []
        for i in range(0, length, chunk):
            parts.append(mx.fast.scaled_dot_product_attention(q[:, :, i : i + chunk], k, v, scale=c**-0.5))
            if chunk < length:
                mx.eval(parts)  # MLX would make room for all chunks' scores ahead of time
        h = mx.concatenate(parts, axis=2)
        return x + self.proj_out(h.reshape(b, height, width, c))


class MidBlock(nn.Module):
    """Attention between two residual blocks, at the lowest resolution. (B, h, w, C) -> the same."""

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
        return self.conv(doubled(x))


def doubled(x: mx.array) -> mx.array:
    """(B, H, W, C) -> (B, 2H, 2W, C): every pixel becomes four."""
    b, height, width, c = x.shape
    x = mx.broadcast_to(x[:, :, None, :, None], (b, height, 2, width, 2, c))
    return x.reshape(b, 2 * height, 2 * width, c)


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
    """Pictures (B, H, W, in) -> means and log variances (B, H/8, W/8, 2 z)."""

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
        return self.finish(self.shrink(x))

    def shrink(self, x: mx.array) -> mx.array:
        """(B, H, W, in) -> (B, H/8, W/8, widest): the part that needs memory, and sees near pixels only."""
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        return h

    def finish(self, h: mx.array) -> mx.array:
        """(B, H/8, W/8, widest) -> (B, H/8, W/8, 2 z)."""
        return self.conv_out(silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """Raw latents (B, H/8, W/8, z) -> pictures (B, H, W, out)."""

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
        return self.grow(self.start(z))

    def start(self, z: mx.array) -> mx.array:
        """(B, H/8, W/8, z) -> (B, H/8, W/8, widest)."""
        return self.mid(self.conv_in(z))

    def grow(self, h: mx.array) -> mx.array:
        """(B, H/8, W/8, widest) -> (B, H, W, out): the part that needs memory, and sees near pixels only."""
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(silu(self.norm_out(h)))


class AutoEncoder(nn.Module):
    """Encoder and decoder, with the scale and shift between the encoder's latent and the transformer's.

    Sizes of pictures are multiples of 8 (of 2 to the number of levels less one). What would take more than
    about `memory` bytes is done in pieces: a batch picture by picture, a large picture in overlapping tiles.
    Tiles differ slightly from the whole, since each is normalised by itself; the layers around the attention,
    where a pixel sees the whole picture, are never cut.
    """

    def __init__(self, params: AutoEncoderParams):
        super().__init__()
        self.params = params
        self.encoder = Encoder(params)
        self.decoder = Decoder(params)

    @property
    def downscale(self) -> int:
        """Pixels to a latent along one axis."""
        return 2 ** (len(self.params.ch_mult) - 1)

    def moments(self, x: mx.array, memory: int = MEMORY) -> tuple[mx.array, mx.array]:
        """Mean and log variance of the raw latent, each (B, H/8, W/8, z), of x (B, H, W, 3) in -1..1."""
        h = self._in_pieces(self.encoder.shrink, self._cast(x), memory, step_in=self.downscale, step_out=1)
        mean, logvar = mx.split(self.encoder.finish(h), 2, axis=-1)
        return mean, logvar

    def encode(self, x: mx.array, noise: mx.array | None = None, memory: int = MEMORY) -> mx.array:
        """The scaled latent (B, H/8, W/8, z) of x (B, H, W, 3) in -1..1.

        It is the mean, or with `noise` (standard normal, of the latent's shape) a sample.
        """
        z, logvar = self.moments(x, memory)
        if noise is not None:
            z = z + mx.exp(0.5 * logvar) * noise
        return self.params.scale_factor * (z - self.params.shift_factor)

    def decode(self, z: mx.array, memory: int = MEMORY) -> mx.array:
        """The picture (B, H, W, 3), about -1..1, of a scaled latent (B, H/8, W/8, z)."""
        h = self.decoder.start(self._cast(z / self.params.scale_factor + self.params.shift_factor))
        return self._in_pieces(self.decoder.grow, h, memory, step_in=1, step_out=self.downscale)

    def _cast(self, x: mx.array) -> mx.array:
        return x.astype(self.decoder.conv_in.weight.dtype)

    def _in_pieces(self, part: Layer, x: mx.array, memory: int, step_in: int, step_out: int) -> mx.array:
        """part(x), whole where that takes no more than `memory` bytes. Steps: as for `in_tiles`."""
        batch, rows, columns = x.shape[0], x.shape[1] // step_in, x.shape[2] // step_in
        # The peak is at full resolution, where a pixel has up to 2 ch numbers: 19 times these, measured on a
        # CPU, where MLX's convolution copies each pixel nine times. 10, without such copies, is an estimate.
        multiple = 19 if mx.default_device() == mx.cpu else 10
        latent_bytes = multiple * 2 * self.params.ch * x.dtype.size * self.downscale**2
        fitting = memory // latent_bytes
        if batch * rows * columns <= fitting:
            return part(x)
        side = max(rows, columns) if rows * columns <= fitting else max(MIN_TILE, math.isqrt(fitting))
        return mx.concatenate([in_tiles(part, x[i : i + 1], side, step_in, step_out) for i in range(batch)])


def in_tiles(part: Layer, x: mx.array, side: int, step_in: int, step_out: int) -> mx.array:
    """part(x) of one picture, from overlapping tiles of `side` latents that fade into each other.

    A latent is `step_in` pixels wide in x (1, H, W, C) and `step_out` pixels in the result.
    """
    height, width = x.shape[1] // step_in, x.shape[2] // step_in
    canvas: mx.array | None = None
    for top, row_weights in _tiles(height, side, step_out):
        for left, column_weights in _tiles(width, side, step_out):
            tile = part(x[:, top * step_in :, left * step_in :][:, : side * step_in, : side * step_in])
            if canvas is None:
                canvas = mx.zeros((1, height * step_out, width * step_out, tile.shape[-1]))
            tile = tile * row_weights[:, None, None] * column_weights[:, None]
            y0, x0 = top * step_out, left * step_out
            canvas = canvas.at[:, y0 : y0 + tile.shape[1], x0 : x0 + tile.shape[2]].add(tile)
            mx.eval(canvas)  # else all tiles would be in memory together
    assert canvas is not None  # there is one tile at least
    return canvas.astype(x.dtype)


def _tiles(length: int, side: int, step: int) -> list[tuple[int, mx.array]]:
    """Evenly spaced tiles along one axis: where each starts, in latents, and the weights of its pixels.

    The weights rise over the overlap from either end, and those of all tiles add up to one at every pixel.
    """
    if length <= side:
        return [(0, mx.ones(length * step))]
    count = math.ceil((length - OVERLAP) / (side - OVERLAP))
    starts = [i * (length - side) // (count - 1) for i in range(count)]
    position = mx.arange(side * step) + 0.5
    weights = mx.minimum(mx.minimum(position, side * step - position), OVERLAP * step)
    total = mx.zeros(length * step)
    for start in starts:
        total = total.at[start * step : (start + side) * step].add(weights)
    return [(start, weights / total[start * step : (start + side) * step]) for start in starts]
