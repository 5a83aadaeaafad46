"""What a reader of an encoding is given: one layer's tensors by their parts' names, and the file's header."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

LONGEST = 2**16  # bytes of a JSON text that is kept as a tensor


@dataclass(frozen=True)
class Layer:
    """name: of the module. tensors: all of the part's. metadata: of the headers. Readers raise ValueError."""

    name: str
    tensors: Mapping[str, mx.array]
    metadata: Mapping[str, str]

    def part(self, name: str) -> mx.array | None:
        return self.tensors.get(f"{self.name}.{name}")

    def need(self, name: str) -> mx.array:
        tensor = self.part(name)
        if tensor is None:
            raise ValueError(f"{name} is missing")
        return tensor

    def json(self, name: str) -> dict[str, Any]:
        """What a uint8 tensor of text says; {} where the layer has none."""
        tensor = self.part(name)
        if tensor is None:
            return {}
        if tensor.dtype != mx.uint8 or tensor.size > LONGEST:
            raise ValueError(f"{name} should hold a short text")
        return parse(bytes(tensor.reshape(-1).tolist()))


def parse(text: str | bytes) -> dict[str, Any]:
    """A JSON object; ValueError for any other text."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("its description is not valid JSON") from None
    if not isinstance(content, dict):
        raise ValueError("its description should be a JSON object")
    return content


def integer(content: Mapping[str, Any], name: str) -> int:
    """A positive integer of a description."""
    value = content.get(name)
    if type(value) is not int or not 0 < value < 2**31:
        raise ValueError(f"its description's {name} is {value!r}")
    return value


def times(values: mx.array, scale: mx.array, low: mx.array | None = None) -> mx.array:
    """values * scale (+ low), float32, where each scale belongs to a block of the values.

    values: (O, I). scale, low: one number; (O,) or (O, 1) for the rows; (O / a, I / b) for blocks of a x b.
    ValueError where the scales divide the values in no such way.
    """
    out = values.astype(mx.float32) * _spread(scale, values.shape)
    return out if low is None else out + _spread(low, values.shape)


def _spread(scale: mx.array, shape: tuple[int, ...]) -> mx.array:
    """Scales of blocks -> an array that multiplies values of this shape."""
    scale = scale.astype(mx.float32)
    if scale.size == 1:
        return scale.reshape(())
    counts = [*scale.shape, *[1] * (len(shape) - scale.ndim)]
    while len(counts) > len(shape) and counts[-1] == 1:
        counts.pop()
    if len(counts) > len(shape):
        raise ValueError(f"scales of the shape {scale.shape} for weights of the shape {shape}")
    scale = scale.reshape(counts)
    for axis, (count, length) in enumerate(zip(counts, shape, strict=True)):
        block = math.ceil(length / max(count, 1))
        if count != 1 and math.ceil(length / block) != count:
            raise ValueError(f"scales of the shape {scale.shape} for weights of the shape {shape}")
        if count not in (1, length):
            scale = mx.repeat(scale, block, axis)
            scale = mx.take(scale, mx.arange(length), axis) if scale.shape[axis] > length else scale
    return scale
