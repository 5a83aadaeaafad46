"""GGUF files written by hand, and blocks of any type with reasonable scales."""

import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np

NUMBERS = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q2_K": 10, "Q3_K": 11}
NUMBERS |= {"Q4_K": 12, "Q5_K": 13, "Q6_K": 14, "IQ4_XS": 23, "BF16": 30}
BLOCKS = {"Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34)}
BLOCKS |= {"Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210)}
HALVES = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2)}
HALVES |= {"Q6_K": (208,)}  # where a block has its float16 numbers; elsewhere at 0

Tensor = tuple[str, tuple[int, ...], bytes]  # type, shape, bytes


def blocks(dtype: str, shape: tuple[int, ...], rng: np.random.Generator, scale: float = 0.01) -> bytes:
    """Random blocks whose float16 numbers are of about this size."""
    values, size = BLOCKS[dtype]
    raw = rng.integers(0, 256, (int(np.prod(shape)) // values, size), dtype=np.uint8)
    for byte in HALVES.get(dtype, (0,)):
        half = (scale * rng.uniform(0.2, 1.0, (len(raw), 1))).astype(np.float16)
        raw[:, byte : byte + 2] = half.view(np.uint8)
    return raw.tobytes()


def text(content: str) -> bytes:
    return struct.pack("<Q", len(content.encode())) + content.encode()


def key(name: str, value: str | int | list[int]) -> bytes:
    if isinstance(value, str):
        return text(name) + struct.pack("<I", 8) + text(value)
    if isinstance(value, int):
        return text(name) + struct.pack("<II", 4, value)
    return text(name) + struct.pack("<IIQ", 9, 5, len(value)) + struct.pack(f"<{len(value)}i", *value)


def write(
    path: Path, tensors: Mapping[str, Tensor], keys: Mapping[str, str | int | list[int]] | None = None
) -> Path:
    """A file of version 3, aligned to 32 bytes."""
    keys = {"general.architecture": "flux"} if keys is None else keys
    infos, data, start = b"", [], 0
    for name, (dtype, shape, content) in tensors.items():
        sides = struct.pack(f"<{len(shape)}Q", *reversed(shape))
        infos += text(name) + struct.pack("<I", len(shape)) + sides
        infos += struct.pack("<IQ", NUMBERS[dtype], start)
        data += [content, b"\0" * (-len(content) % 32)]
        start += len(content) + len(data[-1])
    data = data[:-1]  # nothing need follow the last
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys))
    head += b"".join(key(name, value) for name, value in keys.items()) + infos
    path.write_bytes(b"".join([head, b"\0" * (-len(head) % 32), *data]))
    return path
