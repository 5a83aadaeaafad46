"""DaViT, Florence-2's vision tower (Ding et al. 2022, arXiv:2204.03645): stages of two kinds of attention.

Every stage shrinks the picture with a convolution, then alternates two blocks: one attends among the pixels
of small windows, the other among the channels, each channel being a token that sees the whole picture.
Pictures are channels-last throughout. Attribute names are those of transformers' checkpoints.
"""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from flux.models.florence2.depthwise import DepthwiseConv2d
from flux.models.florence2.gelu import gelu


@dataclass(frozen=True)
class VisionParams:
    """The shape of the tower, one entry a stage; the defaults are Florence-2-base's."""

    in_channels: int = 3
    depths: tuple[int, ...] = (1, 1, 9, 1)
    patch_size: tuple[int, ...] = (7, 3, 3, 3)
    patch_stride: tuple[int, ...] = (4, 2, 2, 2)
    patch_padding: tuple[int, ...] = (3, 1, 1, 1)
    patch_prenorm: tuple[bool, ...] = (False, True, True, True)
    embed_dim: tuple[int, ...] = (128, 256, 512, 1024)
    num_heads: tuple[int, ...] = (4, 8, 16, 32)
    num_groups: tuple[int, ...] = (4, 8, 16, 32)
    window_size: int = 12
    mlp_ratio: float = 4.0
    qkv_bias: bool = True


class ConvEmbed(nn.Module):
    """The convolution that opens a stage, with a norm before it (over its input) or after it."""

    def __init__(self, params: VisionParams, stage: int):
        super().__init__()
        width = params.embed_dim[stage]
        in_width = params.embed_dim[stage - 1] if stage else params.in_channels
        self._prenorm = params.patch_prenorm[stage]
        self.conv = nn.Conv2d(
            in_width,
            width,
            params.patch_size[stage],
            stride=params.patch_stride[stage],
            padding=params.patch_padding[stage],
        )
        self.norm = nn.LayerNorm(in_width if self._prenorm else width)

    def __call__(self, x: mx.array) -> mx.array:
        # (B, H, W, C of the stage before) -> (B, H / stride, W / stride, C)
        return self.conv(self.norm(x)) if self._prenorm else self.norm(self.conv(x))


class WindowAttention(nn.Module):
    """Attention inside windows of window_size x window_size pixels.

    A picture that the windows do not divide gets zeros below and on the right. Nothing masks them: the
    network was trained to see them.
    """

    def __init__(self, params: VisionParams, stage: int):
        super().__init__()
        width = params.embed_dim[stage]
        self._window = params.window_size
        self._head_dim = width // params.num_heads[stage]
        self.qkv = nn.Linear(width, 3 * width, bias=params.qkv_bias)
        self.proj = nn.Linear(width, width)

    def __call__(self, x: mx.array) -> mx.array:
        b, height, width, channels = x.shape
        n = self._window
        x = mx.pad(x, [(0, 0), (0, -height % n), (0, -width % n), (0, 0)])
        rows, columns = x.shape[1] // n, x.shape[2] // n

        # (B, rows * n, columns * n, C) -> (B * rows * columns, n * n, C): one sequence a window
        x = x.reshape(b, rows, n, columns, n, channels).swapaxes(2, 3).reshape(-1, n * n, channels)
        # (windows, n * n, 3 * heads * D) -> 3 x (windows, heads, n * n, D)
        q, k, v = mx.unflatten(self.qkv(x), -1, (3, -1, self._head_dim)).transpose(2, 0, 3, 1, 4)
        x = mx.fast.scaled_dot_product_attention(q, k, v, scale=self._head_dim**-0.5)
        x = self.proj(x.swapaxes(1, 2).flatten(2))  # (windows, heads, n * n, D) -> (windows, n * n, C)

        x = x.reshape(b, rows, columns, n, n, channels).swapaxes(2, 3)
        return x.reshape(b, rows * n, columns * n, channels)[:, :height, :width]


class ChannelAttention(nn.Module):
    """Attention among the channels of a group: a channel's features are its values at all pixels."""

    def __init__(self, params: VisionParams, stage: int):
        super().__init__()
        width = params.embed_dim[stage]
        self._groups = params.num_groups[stage]
        self.qkv = nn.Linear(width, 3 * width, bias=params.qkv_bias)
        self.proj = nn.Linear(width, width)

    def __call__(self, x: mx.array) -> mx.array:
        b, height, width, channels = x.shape
        pixels = height * width
        qkv = self.qkv(x).reshape(b, pixels, 3, self._groups, channels // self._groups)
        q, k, v = qkv.transpose(2, 0, 3, 4, 1)  # 3 x (B, groups, D, pixels)
        # The scale goes into q first: a sum over 36,864 pixels would leave float16's range.
        scores = (q * pixels**-0.5) @ k.swapaxes(2, 3)  # (B, groups, D, D)
        x = mx.softmax(scores, axis=-1, precise=True) @ v
        x = x.transpose(0, 3, 1, 2).reshape(b, height, width, channels)  # (B, groups, D, pixels) -> picture
        return self.proj(x)


class MLP(nn.Module):
    """Two layers with GELU between. (..., C) -> (..., C)."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def __call__(self, x: mx.array) -> mx.array:
        return self.fc2(gelu(self.fc1(x)))


class Block(nn.Module):
    """What both kinds of block share: a depthwise convolution before the attention and one before the MLP.

    The convolutions tell the network where things are: windows and channels have no position embedding.
    """

    def __init__(self, params: VisionParams, stage: int):
        super().__init__()
        width = params.embed_dim[stage]
        self.conv1 = DepthwiseConv2d(width)
        self.norm1 = nn.LayerNorm(width)
        self.conv2 = DepthwiseConv2d(width)
        self.norm2 = nn.LayerNorm(width)
        self.ffn = MLP(width, int(width * params.mlp_ratio))

    def attend(self, x: mx.array) -> mx.array:
        """The block's attention: (B, H, W, C) -> the same."""
        raise NotImplementedError

    def __call__(self, x: mx.array) -> mx.array:
        # (B, H, W, C) -> (B, H, W, C)
        x = x + self.conv1(x)
        x = x + self.attend(self.norm1(x))
        x = x + self.conv2(x)
        return x + self.ffn(self.norm2(x))


class SpatialBlock(Block):
    """A block whose attention is among the pixels of a window."""

    def __init__(self, params: VisionParams, stage: int):
        super().__init__(params, stage)
        self.window_attn = WindowAttention(params, stage)

    def attend(self, x: mx.array) -> mx.array:
        return self.window_attn(x)


class ChannelBlock(Block):
    """A block whose attention is among the channels of a group."""

    def __init__(self, params: VisionParams, stage: int):
        super().__init__(params, stage)
        self.channel_attn = ChannelAttention(params, stage)

    def attend(self, x: mx.array) -> mx.array:
        return self.channel_attn(x)


class DualBlock(nn.Module):
    """A spatial block and a channel block. (B, H, W, C) -> the same."""

    def __init__(self, params: VisionParams, stage: int):
        super().__init__()
        self.spatial_block = SpatialBlock(params, stage)
        self.channel_block = ChannelBlock(params, stage)

    def __call__(self, x: mx.array) -> mx.array:
        return self.channel_block(self.spatial_block(x))


class VisionTower(nn.Module):
    """DaViT (Ding et al. 2022, arXiv:2204.03645): stages of blocks, each at half the resolution or less."""

    def __init__(self, params: VisionParams):
        super().__init__()
        stages = range(len(params.depths))
        self.convs = [ConvEmbed(params, stage) for stage in stages]
        self.blocks = [[DualBlock(params, stage) for _ in range(params.depths[stage])] for stage in stages]

    def __call__(self, pixels: mx.array) -> mx.array:
        """Normalised pictures (B, H, W, 3) -> features (B, H / 32, W / 32, last stage's C), rounded up."""
        x = pixels.astype(self.convs[0].conv.weight.dtype)
        for conv, blocks in zip(self.convs, self.blocks, strict=True):
            x = conv(x)
            for block in blocks:
                x = block(x)
        return x
