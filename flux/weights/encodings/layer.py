"""What a reader of an encoding is given: one layer's tensors by their parts' names, and the file's header."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from flux import jsonfiles

LARGEST_BLOCK = 2**16
LONGEST = 2**16  # bytes of a JSON text that is kept as a tensor


@dataclass(frozen=True)
class Layer:
    """name: of the module. tensors: all of the part's. metadata: of the headers. Readers raise ValueError."""

    name: str
    tensors: Mapping[str, mx.array]
    metadata: Mapping[str, str]

    def part(self, name: str) -> mx.array | None:
        """One of the layer's tensors, None where it has none of that name."""
        return self.tensors.get(f"{self.name}.{name}")

    def need(self, name: str) -> mx.array:
        """One of the layer's tensors. ValueError where it is missing."""
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
        return jsonfiles.parse_object(np.array(tensor).tobytes())


def block_size(content: Mapping[str, Any], name: str) -> int:
    """How many weights share a scale, of a description; ValueError for what no program writes."""
    value = content.get(name)
    if type(value) is not int or not 0 < value <= LARGEST_BLOCK:
        raise ValueError(f"its description's {name} is {jsonfiles.shown(value)}")
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
    pairs = list(zip(counts, shape, strict=False))
    if len(counts) > len(shape) or any(not count or side % count for count, side in pairs):
        raise ValueError(f"scales of the shape {tuple(scale.shape)} for weights of the shape {tuple(shape)}")
    scale = scale.reshape(counts)
    for axis, (count, side) in enumerate(pairs):
        scale = scale if count in (1, side) else mx.repeat(scale, side // count, axis)
    return scale
