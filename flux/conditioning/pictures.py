"""Pictures that a request is given."""

import hashlib
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import numpy as np

from flux import images
from flux.errors import FluxError


@dataclass(frozen=True)
class Picture:
    """A picture as it lies in its file, upright. Equal to another of the same name and content.

    name: of its file, "" where it has none. sha256: of the file, or of the pixels. pixels (H, W, 3), uint8.
    alpha (H, W), uint8, or None.
    """

    name: str
    sha256: str
    pixels: np.ndarray = field(compare=False, repr=False)
    alpha: np.ndarray | None = field(default=None, compare=False, repr=False)

    @classmethod
    def read(cls, path: str | Path) -> "Picture":
        """The picture of a file; FluxError for one that is absent or no picture."""
        return cls.from_bytes(str(path), read_bytes(path))

    @classmethod
    def from_bytes(cls, name: str, data: bytes) -> "Picture":
        """The picture of a file's bytes; FluxError, with the file's name, where they are no picture."""
        pixels, alpha = images.load(_File(name, data))
        return cls(name, hashlib.sha256(data).hexdigest(), pixels, alpha)

    @classmethod
    def from_array(cls, pixels: np.ndarray) -> "Picture":
        """The picture of an array: (H, W, 3) or, with alpha, (H, W, 4), uint8. FluxError for any other."""
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in (3, 4) or not pixels.size:
            raise FluxError(f"a picture is (H, W, 3 or 4) of uint8, not {pixels.shape} of {pixels.dtype}")
        sha256 = hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()
        return cls("", sha256, pixels[..., :3], pixels[..., 3] if pixels.shape[2] == 4 else None)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        height, width, _ = self.pixels.shape
        return height, width


class _File(BytesIO):
    """A file's bytes, with its name for error lines."""

    def __init__(self, name: str, data: bytes):
        super().__init__(data)
        self._name = name

    def __str__(self) -> str:
        return self._name


def read_bytes(path: str | Path) -> bytes:
    """A picture file's bytes; FluxError for one that cannot be read."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise FluxError(f"cannot read the picture {path}: {error.strerror}") from None
