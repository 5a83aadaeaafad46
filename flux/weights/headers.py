"""Safetensors headers: checked whole, before MLX or anything else works with what they say.

A file is 8 bytes (the header's length, little-endian), the header (a JSON object: name -> dtype, shape,
data_offsets; and `__metadata__`, texts by name), and the tensors' bytes, without gaps
(https://huggingface.co/docs/safetensors). Whoever maps such a file trusts its header, so that a wrong one is
another picture, a crash, or all of the machine's memory.
"""

import math
import re
import stat
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flux import jsonfiles
from flux.errors import FluxError
from flux.jsonfiles import shown
from flux.weights import strangers

# Bytes of an element, for every type that a checkpoint has been seen with.
SIZES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"), 1),
}
MAX_LENGTH = 32 * 2**20  # bytes of a header; FLUX.1's has 90,000, and a trainer's notes may have some 10^6
MAX_TENSORS = 2**14  # FLUX.1 in 4 bits by bitsandbytes has 4,000
MAX_NAME = 512  # letters; the longest name of an adapter has 120
MAX_AXES = 8
MAX_SIDE = 2**31 - 1  # MLX counts along an axis in 32 bits
MAX_BLOCKS = 512  # FLUX.1 has 38 single blocks, T5 24
MAX_LEVELS = 16  # resolutions of an autoencoder, or its blocks in each; FLUX.1's has 4 and 3


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its type in safetensors' words, its shape, where its bytes begin."""

    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def size(self) -> int:
        """In bytes; for a type of SIZES."""
        return SIZES[self.dtype] * math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """What a file says it holds."""

    tensors: dict[str, Entry]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """Reads and checks the header. FluxError, naming the file, where it is absent, damaged or cut short."""
    text, length = _read(path)
    try:
        entries = jsonfiles.parse_object(text)
        metadata = _metadata(entries.pop("__metadata__", None))
        if len(entries) > MAX_TENSORS:
            raise ValueError(f"{len(entries)} tensors; {MAX_TENSORS} are the most that is read")
        spans = {name: _span(name, entry) for name, entry in entries.items()}
        fault = _gap(spans, length)
    except ValueError as error:
        raise FluxError(f"{path}: not a safetensors file: its header cannot be understood: {error}") from None
    if fault:
        raise FluxError(f"{path}: {fault}")
    tensors = {
        name: Entry(entries[name]["dtype"], tuple(entries[name]["shape"]), 8 + len(text) + start)
        for name, (start, _) in spans.items()
    }
    for name, entry in tensors.items():
        if entry.dtype not in SIZES:
            raise FluxError(f"{path}: {name} has the type {entry.dtype}, which this program cannot read")
    return Header(tensors, metadata)


def _read(path: Path) -> tuple[bytes, int]:
    """The header's text and how many bytes follow it."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would block
            raise FluxError(f"{path}: not a safetensors file: {'a folder' if path.is_dir() else 'no file'}")
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            fits = 0 < length <= min(status.st_size - 8, MAX_LENGTH)
            text = file.read(length) if fits else b""
    except OSError as error:
        raise FluxError(f"{path}: cannot be read: {error.strerror}") from None
    size = status.st_size
    if size >= 8 and MAX_LENGTH < length <= size - 8:
        raise FluxError(f"{path}: not a safetensors file: a header of {length} bytes")
    if (len(text) != length or not text) and (instead := strangers.disguise(path)):
        raise FluxError(f"{path}: not a safetensors file but {instead}")
    if len(text) != length or not text:
        raise FluxError(f"{path}: not a safetensors file, or cut short within its header ({size} bytes)")
    return text, size - 8 - length


def _metadata(metadata: Any) -> dict[str, str]:
    """The file's texts by name; MLX writes null for none."""
    if metadata is None:
        return {}
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("__metadata__ should hold texts by name")
    return metadata


def _span(name: str, entry: Any) -> tuple[int, int]:
    """Where a tensor's bytes begin and end after the header; ValueError where its entry makes no sense."""
    if not name.isprintable() or not 0 < len(name) <= MAX_NAME:
        raise ValueError(f"a tensor is called {shown(name)}")
    if not isinstance(entry, dict) or not entry.keys() >= {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{shown(name)} should have dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or not re.fullmatch("[A-Z0-9_]{1,16}", dtype):
        raise ValueError(f"{shown(name)} has the dtype {shown(dtype)}")
    if not _integers(shape, MAX_SIDE) or len(shape) > MAX_AXES:
        raise ValueError(f"{shown(name)} has the shape {shown(shape)}")
    if not _integers(offsets, 2**63) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{shown(name)} has the data_offsets {shown(offsets)}")
    start, end = offsets
    if dtype in SIZES and end - start != SIZES[dtype] * math.prod(shape):
        raise ValueError(
            f"{shown(name)} has {end - start} bytes, which do not make up {dtype} {shown(shape)}"
        )
    return start, end


def _integers(values: Any, most: int) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value <= most for value in values)


def _gap(spans: Mapping[str, tuple[int, int]], length: int) -> str | None:
    """What is wrong with the file's length; ValueError where tensors overlap or leave gaps.

    length: of the bytes after the header, all of which should belong to the tensors.
    """
    end, before = 0, None
    for name, span in sorted(spans.items(), key=lambda item: item[1]):
        if span[0] < end:
            raise ValueError(f"{shown(name)} and {shown(before)} overlap")
        if span[0] > end:
            raise ValueError(f"{span[0] - end} bytes before {shown(name)} belong to no tensor")
        end, before = span[1], name
    if end > length:
        return (
            f"cut short: its header promises {end} bytes of tensors and {length} are there; download it again"
        )
    if end < length:
        return f"{length - end} bytes are left over after the last tensor: damaged; download it again"
    return None


def block_count(numbers: Collection[str], what: str, most: int = MAX_BLOCKS) -> int:
    """How many blocks there are, from the numbers in their names; FluxError for one that is too high.

    A network is made of this many before a single name is compared, and 10^6 blocks take gigabytes.
    """
    for number in numbers:
        if len(number) > len(str(most)) or int(number) >= most:
            raise FluxError(f"{what}.{number[:24]}: a block's number may be {most - 1} at most")
    return 1 + max(map(int, numbers), default=-1)
