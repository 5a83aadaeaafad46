"""Bytes of any file as MLX arrays that are read when they are first used.

MLX reads lazily from files of its formats alone. So it is given one, a safetensors file that is nothing
but a header, whose offsets count in the true file; MLX keeps that file open, and under its number the true
file replaces it (`dup2`). Every read that follows is of the true file.
"""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import mlx.core as mx
import numpy as np

from flux.errors import FluxError

Spans = Mapping[str, tuple[int, int]]
LINE = 160  # bytes of one entry of such a header, at most
LARGEST = 2**31 - 1  # MLX counts the elements of an axis in 32 bits
CHECK = 8  # bytes at the end of the file by which the exchange is checked


def read(path: Path, spans: Spans) -> dict[str, mx.array]:
    """name -> (first, end), in bytes of a file -> these bytes as uint8 (end - first,), lazily.

    The spans must lie in the file: whoever read its header has seen to that. FluxError where a span is larger
    than MLX can count. Should MLX open files otherwise one day, all is read at once.
    """
    if larger := [name for name, (first, end) in spans.items() if end - first > LARGEST]:
        raise FluxError(f"{path}: {larger[0]} is larger than 2 GiB, which MLX cannot read in one piece")
    base = LINE * (len(spans) + 2)  # the header's length; what lies before in the true file is read at once
    late = {name: (max(first, base), end) for name, (first, end) in spans.items() if end > base}
    arrays = _mapped(path, late, base) if late else {}
    bytes_of = np.memmap(path, np.uint8, "r")
    if arrays is None:
        return {name: mx.array(bytes_of[first:end]) for name, (first, end) in spans.items()}
    out = {}
    for name, (first, end) in spans.items():
        pieces = [mx.array(bytes_of[first : min(end, base)])] if first < base or first == end else []
        pieces += [arrays[name]] if name in arrays else []
        out[name] = pieces[0] if len(pieces) == 1 else mx.concatenate(pieces)
    return out


def _mapped(path: Path, spans: Spans, base: int) -> dict[str, mx.array] | None:
    """The arrays of a header alone, which find their bytes in the true file; None where they do not."""
    size = path.stat().st_size
    last = (max(base, size - CHECK), size)
    names = dict(zip(map(str, range(len(spans))), spans, strict=True))
    header = {short: _entry(spans[name], base) for short, name in names.items()}
    header["last"] = _entry(last, base)
    text = json.dumps(header).encode().ljust(base - 8)
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as stand_in, path.open("rb") as true:
        stand_in.write(len(text).to_bytes(8, "little") + text)
        stand_in.truncate(size)  # a hole that takes no disk: MLX compares the offsets with the size
        stand_in.flush()
        arrays = cast(dict[str, mx.array], mx.load(stand_in.name))
        for number in _numbers(stand_in.fileno()):
            os.dup2(true.fileno(), number, inheritable=False)
        true.seek(last[0])
        if np.array(arrays.pop("last")).tobytes() != true.read():
            return None
    return {name: arrays[short] for short, name in names.items()}


def _entry(span: tuple[int, int], base: int) -> dict:
    first, end = span
    return {"dtype": "U8", "shape": [end - first], "data_offsets": [first - base, end - base]}


def _numbers(descriptor: int) -> list[int]:
    """The other numbers under which this process has the same file open."""
    file, found = os.fstat(descriptor), []
    for number in map(int, os.listdir("/dev/fd")):
        try:
            if number != descriptor and os.path.samestat(os.fstat(number), file):
                found.append(number)
        except OSError:  # the number of the listing, closed by now
            continue
    return found
