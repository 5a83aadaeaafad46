"""Files <-> arrays: load, fit, grid, and save with what made the picture written into it.

Pictures are numpy arrays (H, W, 3), uint8, or floats (B, H, W, 3) in 0..1 where they come from the decoder.
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from flux.errors import FluxError

SAVE_OPTIONS = {"PNG": {}, "JPEG": {"quality": 95}, "WEBP": {"quality": 95}}


def load(path: str | Path) -> tuple[np.ndarray, np.ndarray | None]:
    """A file's picture (H, W, 3) and its alpha (H, W) or None, uint8, upright as its EXIF says.

    The alpha is kept apart and the colours under it are left as they are: what transparency means is the
    caller's affair. Raises FluxError for a file that is absent or no picture.
    """
    with _open(path) as image:
        image = ImageOps.exif_transpose(_to_8_bits(image))
        if not image.has_transparency_data:
            return np.array(image.convert("RGB")), None
        rgba = np.array(image.convert("RGBA"))
        return np.ascontiguousarray(rgba[..., :3]), np.ascontiguousarray(rgba[..., 3])


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Pillow's `convert` clips 16-bit greys to white instead of scaling them; the rest it does well."""
    if not image.mode.startswith("I"):
        return image
    scaled = Image.fromarray((np.array(image).clip(0, 65535) / 257).round().astype(np.uint8))
    scaled.info = image.info
    return scaled


def _open(path: str | Path) -> Image.Image:
    try:
        image = Image.open(path)
        image.load()
    except UnidentifiedImageError:
        raise FluxError(f"{path} is not a picture that Pillow can read") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise FluxError(f"cannot read the picture {path}: {_reason(error)}") from None
    return image


def _reason(error: Exception) -> str:
    """An error's message in one line, without the file name that its text may repeat."""
    return getattr(error, "strerror", None) or str(error).splitlines()[0]


def fit(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The picture (H, W, 3) scaled to cover size (height, width), and its middle cut out."""
    height, width = size
    fitted = ImageOps.fit(Image.fromarray(picture), (width, height), Image.Resampling.LANCZOS)
    return np.array(fitted)


def normalize(pictures: mx.array | np.ndarray) -> mx.array:
    """uint8 -> floats in -1..1 of the same shape, float32, as the autoencoder takes them."""
    pictures = mx.array(pictures) if isinstance(pictures, np.ndarray) else pictures
    return pictures.astype(mx.float32) / 127.5 - 1


def denormalize(x: mx.array) -> mx.array:
    """The autoencoder's floats, about -1..1 -> floats in 0..1 of the same shape, float32."""
    return mx.clip(x.astype(mx.float32) * 0.5 + 0.5, 0, 1)


def to_uint8(x: mx.array | np.ndarray) -> np.ndarray:
    """Floats in 0..1 -> uint8 of the same shape, rounded as diffusers rounds."""
    x = np.array(x.astype(mx.float32) if isinstance(x, mx.array) else x)
    return (x.clip(0, 1) * 255).round().astype(np.uint8)


def grid(pictures: Sequence[np.ndarray], rows: int = 1) -> np.ndarray:
    """Pictures (H, W, 3) of one size, row by row, as one (rows * H, columns * W, 3); the rest is black."""
    if not 1 <= rows <= len(pictures):
        raise FluxError(f"{len(pictures)} picture(s) do not fill {rows} rows")
    columns = math.ceil(len(pictures) / rows)
    height, width, _ = pictures[0].shape
    out = np.zeros((rows, columns, height, width, 3), dtype=np.uint8)
    for i, picture in enumerate(pictures):
        out[i // columns, i % columns] = picture
    return out.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, 3)


def check_output(path: str | Path) -> None:
    """Raise FluxError where `save` could not write; called before the long work, so that none is lost."""
    path = Path(path)
    _format(path)
    if path.is_dir():
        raise FluxError(f"the output {path} is a folder; name a file in it, such as {path / 'out.png'}")
    if not path.parent.is_dir():
        raise FluxError(f"the output's folder {path.parent} does not exist")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise FluxError(f"cannot write into the output's folder {path.parent}")


def make_folder(path: str | Path) -> None:
    """Make a folder in one that is there, unless it is there itself; FluxError where that cannot be."""
    try:
        Path(path).mkdir(exist_ok=True)
    except OSError as error:
        raise FluxError(f"cannot make the output's folder {path}: {error.strerror}") from None


def _format(path: Path) -> str:
    Image.init()
    writable = {s: f for s, f in sorted(Image.EXTENSION.items()) if f in SAVE_OPTIONS and f in Image.SAVE}
    if path.suffix.lower() not in writable:
        raise FluxError(f"the output {path} has no suffix that can be written ({', '.join(writable)})")
    return writable[path.suffix.lower()]


def save(path: str | Path, picture: np.ndarray, metadata: dict[str, str] | None = None) -> None:
    """Write a picture (H, W, 3), uint8, in the format of the path's suffix; never a part of one.

    The file is written under another name and then renamed. `metadata` becomes text chunks of a PNG; other
    formats do not carry it.
    """
    path = Path(path)
    check_output(path)
    format = _format(path)
    options = dict(SAVE_OPTIONS[format])
    if format == "PNG" and metadata:
        options["pnginfo"] = PngImagePlugin.PngInfo()
        for key, value in metadata.items():
            options["pnginfo"].add_itxt(key, value)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(partial, "xb") as file:
            Image.fromarray(picture).save(file, format=format, **options)
        os.replace(partial, path)
    except OSError as error:
        raise FluxError(f"cannot write {path}: {_reason(error)}") from None
    finally:
        partial.unlink(missing_ok=True)


def read_metadata(path: str | Path) -> dict[str, str]:
    """The text chunks of a PNG, those that `save` wrote and any other; empty for other formats."""
    with _open(path) as image:
        return {key: str(value) for key, value in getattr(image, "text", {}).items()}
