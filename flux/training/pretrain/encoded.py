"""The latents of a data set: what a frozen autoencoder makes of its pictures, encoded once, kept on disk."""

import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from threading import Lock

import mlx.core as mx
import numpy as np

from flux import images
from flux.data.buckets import Size
from flux.errors import FluxError
from flux.models.autoencoder import AutoEncoder
from flux.trees import named_arrays

Encode = Callable[[mx.array], tuple[mx.array, mx.array]]  # (1, H, W, 3) in -1..1 -> mean, log variance


class Encoded:
    """Means and log variances (2, h, w, z), float32, by a picture's number and size (height, width).

    A picture is encoded alone, so that its numbers do not depend on what else was in the batch: a run that
    was killed, and processes that share the file, find what they would have made themselves. A record carries
    its check sum: one that was torn or never written counts as absent.
    """

    def __init__(self, folder: Path, identity: str, shape: Callable[[Size], tuple[int, ...]], encode: Encode):
        """identity: of the data and the encoder. shape: of a record, (2, h, w, z), by the size in pixels."""
        self._folder, self._identity, self._shape, self._encode = folder, identity, shape, encode
        self._lock = Lock()  # the threads that read pictures ask here first

    def read(self, row: int, size: Size) -> np.ndarray | None:
        """The record; None where it is absent."""
        shape = self._shape(size)
        length = 4 * int(np.prod(shape))
        try:
            with self._lock, self._path(size).open("rb") as file:
                file.seek(row * (4 + length))
                found = file.read(4 + length)
        except FileNotFoundError:
            return None
        if len(found) < 4 + length or struct.unpack("<I", found[:4])[0] != zlib.crc32(found[4:]):
            return None
        return np.frombuffer(found, np.float32, offset=4).reshape(shape)

    def make(self, row: int, picture: np.ndarray) -> np.ndarray:
        """The record of a picture (H, W, 3), uint8, which is kept. FluxError where the disk refuses."""
        mean, logvar = self._encode(images.normalize(picture[None]))
        record = np.array(mx.concatenate([mean, logvar]).astype(mx.float32))
        data, path = record.tobytes(), self._path(picture.shape[:2])
        try:
            with self._lock:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
                with path.open("r+b") as file:
                    file.seek(row * (4 + len(data)))
                    file.write(struct.pack("<I", zlib.crc32(data)) + data)
        except OSError as error:
            raise FluxError(f"cannot keep the latents in {path}: {error.strerror}") from None
        return record

    def _path(self, size: Size) -> Path:
        return self._folder / f"{self._identity}-{size[0]}x{size[1]}.latents"


def identity(model: AutoEncoder, *settings: object) -> str:
    """Tells encoders and data from others."""
    total = zlib.crc32(repr(settings).encode())
    for name, array in sorted(named_arrays(model.encoder.parameters())):
        total = zlib.crc32(np.array(array).tobytes(), zlib.crc32(name.encode(), total))
    return f"{total:08x}"
