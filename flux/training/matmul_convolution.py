"""3x3 convolutions as matrix products: the same function, whose gradient MLX's CPU backend computes faster.

Its gradient is slow, with stride 2 most of all: 37 ms against 5 for 8 pictures of 32x32x32.
"""

from collections.abc import Callable
from functools import reduce
from typing import cast

import mlx.core as mx
import mlx.nn as nn

Padding = tuple[int, int]  # rows above and columns to the left; rows below and columns to the right


class ProductConv2d(nn.Conv2d):
    """A 3x3 convolution of stride 1 with padding 1, or of stride 2 with the padding left to the caller."""

    def __call__(self, x: mx.array) -> mx.array:
        convolve = _stride_1 if self.stride == (1, 1) else _stride_2
        return convolve(x, self.weight) + self.bias


class ProductConv1x1(nn.Conv2d):
    """A 1x1 convolution as a product. (B, H, W, I) -> (B, H, W, O)."""

    def __call__(self, x: mx.array) -> mx.array:
        return x @ self.weight[:, 0, 0].T + self.bias


class PatchConv2d(nn.Conv2d):
    """A convolution whose stride is its kernel's side, without padding: every pixel is in one patch."""

    def __call__(self, x: mx.array) -> mx.array:
        b, height, width, c = x.shape
        n, side = self.weight.shape[:2]
        x = x.reshape(b, height // side, side, width // side, side * c).swapaxes(2, 3)
        return x.reshape(*x.shape[:3], -1) @ self.weight.reshape(n, -1).T + self.bias


def use_products(model: nn.Module) -> None:
    """Makes the convolutions of a model products, in place; its parameters stay the same.

    Those that are neither 3x3 of stride 1 and padding 1, 3x3 of stride 2 without padding, nor of patches that
    touch are left.
    """
    for module in model.modules():
        if type(module) is nn.Conv2d and module.groups == 1:
            shape = (module.weight.shape[1:3], module.stride, module.padding)
            if shape in (((3, 3), (1, 1), (1, 1)), ((3, 3), (2, 2), (0, 0))):
                module.__class__ = ProductConv2d
            elif shape == ((1, 1), (1, 1), (0, 0)):
                module.__class__ = ProductConv1x1
            elif shape[0] == shape[1] and shape[2] == (0, 0):
                module.__class__ = PatchConv2d


def _make(stride: int, padding: Padding) -> Callable[[mx.array, mx.array], mx.array]:
    """The convolution (B, H, W, C), (N, 3, 3, C) -> (B, H', W', N) with its gradient."""

    @mx.custom_function
    def convolve(x: mx.array, weight: mx.array) -> mx.array:
        return _convolve(x, weight, stride, padding)

    @convolve.vjp
    def gradient(inputs: tuple[mx.array, mx.array], dy: mx.array, y: mx.array) -> tuple[mx.array, mx.array]:
        x, weight = inputs
        turned = weight[:, ::-1, ::-1].transpose(3, 1, 2, 0)  # (C, 3, 3, N)
        dx = _convolve(_spread_out(dy, stride, x.shape), turned, 1, (2 - padding[0], 2 - padding[1]))
        return dx, _weight_gradient(x, dy, stride, padding)

    return cast(Callable[[mx.array, mx.array], mx.array], convolve)


def _convolve(x: mx.array, weight: mx.array, stride: int, padding: Padding) -> mx.array:
    pixels = _pixels_at_once(x, weight, stride, padding)
    strips = _strips(x, stride, padding, pixels)  # (B, H + padding, W' / p, k)
    height = (strips.shape[1] - 3) // stride + 1
    matrices = _for_pixels(weight, stride, pixels)  # 3 x (p * N, k)
    y = _rows(strips, 0, stride, height) @ matrices[0].T
    for i in (1, 2):
        y = mx.addmm(y, _rows(strips, i, stride, height), matrices[i].T)
    return y.reshape(len(x), height, -1, len(weight))  # (B, H', W' / p, p * N) -> (B, H', W', N)


def _weight_gradient(x: mx.array, dy: mx.array, stride: int, padding: Padding) -> mx.array:
    (_, height, width, n), c = dy.shape, x.shape[-1]
    pixels = _block(max(c, n), width)
    strips = _strips(x, stride, padding, pixels)
    dy = dy.reshape(len(x), height * width // pixels, pixels * n)
    rows = []
    for i in range(3):
        product = (_rows(strips, i, stride, height).reshape(*dy.shape[:2], -1).swapaxes(1, 2) @ dy).sum(0)
        parts = (  # pixel p of a block has another offset in the strip and in the output
            product[p * stride * c : (p * stride + 3) * c, p * n : (p + 1) * n] for p in range(pixels)
        )
        rows.append(reduce(mx.add, parts).T.reshape(n, 3, c))  # (3C, N) -> (N, 3, C)
    return mx.stack(rows, axis=1)


def _spread_out(dy: mx.array, stride: int, shape: tuple[int, ...]) -> mx.array:
    """With stride 2, zeros between the pixels of dy (B, H', W', N) and after them, up to H and W less 2."""
    if stride == 1:
        return dy
    b, height, width, n = dy.shape
    spread = mx.zeros((b, shape[1] - 2, shape[2] - 2, n), dy.dtype)
    spread[:, : 2 * height : 2, : 2 * width : 2] = dy
    return spread


def _pixels_at_once(x: mx.array, weight: mx.array, stride: int, padding: Padding) -> int:
    width = (x.shape[2] + sum(padding) - 3) // stride + 1
    return _block(max(x.shape[3], len(weight)), width)


def _block(channels: int, width: int) -> int:
    """How many neighbouring pixels one row of a product makes: narrow layers make poor products otherwise."""
    pixels = 4 if channels <= 8 else 2 if channels <= 16 else 1
    return pixels if width % pixels == 0 else 1


def _strips(x: mx.array, stride: int, padding: Padding, pixels: int) -> mx.array:
    """All columns that a block of pixels sees, side by side: (B, H, W, C) -> (B, H + padding, W' / p, k)."""
    x = mx.contiguous(mx.pad(x, [(0, 0), padding, padding, (0, 0)]))
    b, height, width, c = x.shape
    blocks = ((width - 3) // stride + 1) // pixels
    seen = ((pixels - 1) * stride + 3) * c
    strides = (height * width * c, width * c, pixels * stride * c, 1)
    return mx.contiguous(mx.as_strided(x, (b, height, blocks, seen), strides))


def _rows(strips: mx.array, i: int, stride: int, height: int) -> mx.array:
    """Row i of the kernel's three for every row of the output: (B, H', W' / p, k)."""
    return strips[:, i : i + stride * (height - 1) + 1 : stride]


def _for_pixels(weight: mx.array, stride: int, pixels: int) -> mx.array:
    """(N, 3, 3, C) -> 3 x (p * N, k): the weights for each pixel of a block, at its offset in the strip."""
    n, _, _, c = weight.shape
    rows = weight.reshape(n, 3, 3 * c).swapaxes(0, 1)  # (3, N, 3C)
    step = stride * c
    padded = [mx.pad(rows, [(0, 0), (0, 0), (p * step, (pixels - 1 - p) * step)]) for p in range(pixels)]
    return mx.concatenate(padded, axis=1)


_stride_1 = _make(1, (1, 1))
_stride_2 = _make(2, (0, 0))
