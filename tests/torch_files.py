"""PyTorch's files of weights, written without PyTorch: one step of a pickle after the other, to be spoilt."""

import struct
import zipfile
from pathlib import Path

import numpy as np

KINDS = {"f4": "FloatStorage", "f2": "HalfStorage", "u2": "BFloat16Storage", "f8": "DoubleStorage"}
MAGIC = b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    size = value.bit_length() // 8 + 1
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)


def numbers(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def tensor(kind: str, key: str, count: int, offset: int, shape: tuple, strides: tuple) -> bytes:
    """The steps of a tensor: a view of a storage of `count` elements."""
    pid = (
        b"("
        + text("storage")
        + f"ctorch\n{kind}\n".encode()
        + text(key)
        + text("cpu")
        + number(count)
        + b"tQ"
    )
    hooks = b"ccollections\nOrderedDict\n)R"
    head = b"ctorch._utils\n_rebuild_tensor_v2\n("
    return head + pid + number(offset) + numbers(shape) + numbers(strides) + b"\x89" + hooks + b"tR"


def table(items: dict[str, bytes]) -> bytes:
    """A pickle of a table of values, each of them given by its steps."""
    return b"\x80\x02}q\x00(" + b"".join(text(name) + steps for name, steps in items.items()) + b"u."


def whole(arrays: dict[str, np.ndarray]) -> dict[str, bytes]:
    """The steps of arrays, each of a storage with its name."""
    out = {}
    for name, array in arrays.items():
        strides = tuple(step // array.itemsize for step in array.strides)
        kind = KINDS[array.dtype.str[1:]]
        out[name] = tensor(kind, f"s-{name}", array.size, 0, array.shape, strides)
    return out


def write_zip(path: Path, pickle: bytes, storages: dict[str, bytes], compression: int = 0) -> Path:
    """Today's format."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickle)
        for key, data in storages.items():
            archive.writestr(f"archive/data/{key}", data)
    return path


def legacy(pickle: bytes, storages: dict[str, tuple[int, bytes]]) -> bytes:
    """The format before PyTorch 1.6; storages: key -> (elements, bytes)."""
    head = (
        b"\x80\x02" + MAGIC + b"." + b"\x80\x02M\xe9\x03." + b"\x80\x02}(" + text("little_endian") + b"\x88u."
    )
    keys = b"\x80\x02](" + b"".join(map(text, storages)) + b"e."
    data = b"".join(struct.pack("<q", count) + content for count, content in storages.values())
    return head + pickle + keys + data


def arrays_of(arrays: dict[str, np.ndarray]) -> dict[str, bytes]:
    return {f"s-{name}": array.tobytes() for name, array in arrays.items()}
