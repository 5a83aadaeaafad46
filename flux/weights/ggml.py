"""ggml's blocks: how the integers, scales and offsets of each type lie in its bytes.

Every type says the same with other bits: a weight is scale * (integer - zero) + low, where groups of 16 or 32
weights share scale and low (ggml's ggml-common.h and ggml-quants.c). So each has a function that takes a
block apart, and one function makes weights of the parts, or MLX's quantized layer, which is the same formula.
All are lazy.
"""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

GROUP = 32  # weights that share a scale in a repacked layer


@dataclass(frozen=True)
class Parts:
    """Blocks taken apart. ...: any leading axes. G groups of S weights."""

    values: mx.array  # (..., G, S) uint8
    zero: int
    scale: mx.array  # (..., G) float32
    low: mx.array | None = None  # (..., G) float32


# Blocks are (..., bytes) uint8.


def _half(blocks: mx.array, byte: int) -> mx.array:
    """The float16 at a byte of every block, as float32: (..., bytes) -> (..., 1)."""
    return blocks.view(mx.float16)[..., byte // 2, None].astype(mx.float32)


def _fields(data: mx.array, bits: int, run: int) -> mx.array:
    """Numbers of so many bits, packed so that the lowest fields of `run` bytes come first, then the next.

    (..., n * run) -> (..., n * 8 / bits, run)
    """
    shifts = mx.arange(0, 8, bits, dtype=mx.uint8)[:, None]
    runs = data.reshape(*data.shape[:-1], -1, 1, run)
    return ((runs >> shifts) & (2**bits - 1)).reshape(*data.shape[:-1], -1, run)


def _grouped(values: mx.array, size: int) -> mx.array:
    """(..., a, b) -> (..., a * b / size, size)"""
    return values.reshape(*values.shape[:-2], -1, size)


def _high_bits(data: mx.array) -> mx.array:
    """4 bytes of single bits: (..., 4) -> (..., 1, 32), as the fifth bit of numbers."""
    return _grouped(_fields(data, 1, 1), 32) << 4


def _q4_0(b: mx.array) -> Parts:
    return Parts(_grouped(_fields(b[..., 2:], 4, 16), 32), 8, _half(b, 0))


def _q4_1(b: mx.array) -> Parts:
    return Parts(_grouped(_fields(b[..., 4:], 4, 16), 32), 0, _half(b, 0), _half(b, 2))


def _q5_0(b: mx.array) -> Parts:
    values = _grouped(_fields(b[..., 6:], 4, 16), 32) | _high_bits(b[..., 2:6])
    return Parts(values, 16, _half(b, 0))


def _q5_1(b: mx.array) -> Parts:
    values = _grouped(_fields(b[..., 8:], 4, 16), 32) | _high_bits(b[..., 4:8])
    return Parts(values, 0, _half(b, 0), _half(b, 2))


def _q8_0(b: mx.array) -> Parts:
    return Parts(b[..., None, 2:] ^ 128, 128, _half(b, 0))  # a signed byte plus 128


def _q2_k(b: mx.array) -> Parts:
    scales, values = b[..., :16], _grouped(_fields(b[..., 16:80], 2, 32), 16)
    return Parts(values, 0, _half(b, 80) * (scales & 15), -(_half(b, 82) * (scales >> 4)))


def _q3_k(b: mx.array) -> Parts:
    values = _fields(b[..., 32:96], 2, 32) | (_fields(b[..., :32], 1, 32) << 2)
    low, high = _fields(b[..., 96:104], 4, 8), _fields(b[..., 104:108], 2, 4)
    scales = _grouped(low, 16)[..., 0, :] | (_grouped(high, 16)[..., 0, :] << 4)
    return Parts(_grouped(values, 16), 4, _half(b, 108) * (scales.astype(mx.float32) - 32))


def _scales_and_lows(b: mx.array) -> tuple[mx.array, mx.array]:
    """Q4_K's and Q5_K's 8 scales and 8 offsets of 6 bits, in bytes 4 to 15: two (..., 8)."""
    first, second, third = b[..., 4:8], b[..., 8:12], b[..., 12:16]
    scales = mx.concatenate([first & 63, (third & 15) | ((first >> 2) & 48)], axis=-1)
    lows = mx.concatenate([second & 63, (third >> 4) | ((second >> 2) & 48)], axis=-1)
    return _half(b, 0) * scales, -(_half(b, 2) * lows)


def _q4_k(b: mx.array) -> Parts:
    return Parts(_fields(b[..., 16:], 4, 32), 0, *_scales_and_lows(b))


def _q5_k(b: mx.array) -> Parts:
    values = _fields(b[..., 48:], 4, 32) | (_fields(b[..., 16:48], 1, 32) << 4)
    return Parts(values, 0, *_scales_and_lows(b))


def _q6_k(b: mx.array) -> Parts:
    low = _grouped(_fields(b[..., :128], 4, 64), 32)
    values = low | (_fields(b[..., 128:192], 2, 32) << 4)
    return Parts(_grouped(values, 16), 32, _half(b, 208) * b[..., 192:208].view(mx.int8))


@dataclass(frozen=True)
class Type:
    """values, size: weights and bytes of a block. bits: of an integer, 0 where MLX has no such layers."""

    values: int
    size: int
    parts: Callable[[mx.array], Parts] | None = None
    bits: int = 0


TYPES: dict[str, Type] = {
    "F32": Type(1, 4),
    "F16": Type(1, 2),
    "BF16": Type(1, 2),
    "Q4_0": Type(32, 18, _q4_0, bits=4),
    "Q4_1": Type(32, 20, _q4_1, bits=4),
    "Q5_0": Type(32, 22, _q5_0, bits=5),
    "Q5_1": Type(32, 24, _q5_1, bits=5),
    "Q8_0": Type(32, 34, _q8_0, bits=8),
    "Q2_K": Type(256, 84, _q2_k),
    "Q3_K": Type(256, 110, _q3_k),
    "Q4_K": Type(256, 144, _q4_k, bits=4),
    "Q5_K": Type(256, 176, _q5_k, bits=5),
    "Q6_K": Type(256, 210, _q6_k),
}
FLOATS = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}


def dequantize(raw: mx.array, dtype: str, shape: tuple[int, ...]) -> mx.array:
    """The bytes of a tensor of one of TYPES -> its weights: float32, or the file's float type."""
    if dtype in FLOATS:
        return raw.view(FLOATS[dtype]).reshape(shape)
    parts = _parts(raw, dtype)
    weights = parts.scale[..., None] * (parts.values.astype(mx.float32) - parts.zero)
    return (weights if parts.low is None else weights + parts.low[..., None]).reshape(shape)


def repack(raw: mx.array, dtype: str, shape: tuple[int, ...]) -> tuple[mx.array, mx.array, mx.array]:
    """The bytes of a matrix -> MLX's packed weights, scales and biases of groups of 32.

    Its type must have `bits`. Exact: the same integers, and scales and biases in float32, which holds them.
    """
    parts, rows = _parts(raw, dtype), shape[0]
    low = -parts.zero * parts.scale if parts.low is None else parts.low
    packed = _pack(parts.values.reshape(rows, -1), TYPES[dtype].bits)
    return packed, parts.scale.reshape(rows, -1), low.reshape(rows, -1)


def _parts(raw: mx.array, dtype: str) -> Parts:
    kind = TYPES[dtype]
    if kind.parts is None:
        raise ValueError(f"{dtype} has no blocks")
    return kind.parts(raw.reshape(-1, kind.size))


def _pack(values: mx.array, bits: int) -> mx.array:
    """Numbers (N, M) uint8 as one stream of bits, the lowest first: (N, M * bits / 32) uint32."""
    eights = values.reshape(values.shape[0], -1, 8)
    if bits == 8:
        return values.view(mx.uint32)
    if bits == 4:
        return (eights[..., 0::2] | (eights[..., 1::2] << 4)).reshape(values.shape[0], -1).view(mx.uint32)
    word = eights[..., 0].astype(mx.uint64)
    for i in range(1, 8):
        word = word | (eights[..., i].astype(mx.uint64) << (bits * i))
    streams = word[..., None].view(mx.uint8)[..., :bits]  # (N, M / 8, bits)
    return streams.reshape(values.shape[0], -1).view(mx.uint32)
