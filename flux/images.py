"""Files <-> arrays: load, fit, grid, and save with what made the picture written into it.

Pictures are numpy arrays (H, W, 3), uint8, or floats (B, H, W, 3) in 0..1 where they come from the decoder.
"""

import json
import math
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import BinaryIO

import mlx.core as mx
import numpy as np
from PIL import ExifTags, Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from flux import jsonfiles, outputs
from flux.errors import FluxError

# Pillow knows these files and does not decode them by itself, or they are not pictures.
NOT_READ = ("BUFR", "GRIB", "HDF5", "MPEG", "WMF", "EPS")
# Pictures that are named where they are not read.
OTHER_SUFFIXES = (
    *(".heic", ".heif", ".hif", ".avif", ".jxl", ".svg", ".eps", ".psd", ".exr", ".hdr"),
    *(".dng", ".raw", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".rw2", ".orf"),
)
PARAMETERS = "parameters"  # the chunk in which other programs look for how a picture was made
DESCRIPTION = ExifTags.Base.ImageDescription
UNICODE = b"UNICODE\0"  # how EXIF marks a comment in UTF-16
FITS = ("crop", "pad", "stretch")  # how a picture becomes one of another size
MAX_SIDES = {"JPEG": 65_500, "WEBP": 16_383}
MAX_JPEG_EXIF = 65_533
SAVE_OPTIONS = {"PNG": {}, "JPEG": {"quality": 95}, "WEBP": {"quality": 95}}


@cache
def readable_suffixes() -> frozenset[str]:
    """The suffixes of pictures that can be read here: Pillow's, and HEIC with the package pillow-heif."""
    try:
        import pillow_heif  # optional

        pillow_heif.register_heif_opener()
    except ImportError:
        pass
    known = Image.registered_extensions().items()
    return frozenset(suffix for suffix, kind in known if kind in Image.OPEN and kind not in NOT_READ)


@cache
def unreadable_suffixes() -> frozenset[str]:
    """The suffixes of pictures that cannot be read here."""
    return frozenset(OTHER_SUFFIXES) - readable_suffixes()


def load(path: str | Path | BinaryIO) -> tuple[np.ndarray, np.ndarray | None]:
    """A file's picture (H, W, 3) and its alpha (H, W) or None, uint8, upright as its EXIF says.

    The alpha is kept apart and the colours under it are left as they are: what transparency means is the
    caller's affair. Raises FluxError for a file that is absent or no picture.
    """
    with _open(path) as image:
        image = ImageOps.exif_transpose(_to_8_bits(image, path))
        if not image.has_transparency_data:
            return np.array(image.convert("RGB")), None
        rgba = np.array(image.convert("RGBA"))
        return np.ascontiguousarray(rgba[..., :3]), np.ascontiguousarray(rgba[..., 3])


def _to_8_bits(image: Image.Image, path: str | Path | BinaryIO) -> Image.Image:
    """Pillow's `convert` clips greys of more than 8 bits instead of scaling them; the rest it does well."""
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.array(image)
    scaled = Image.fromarray((values * _scale(image, values, path)).round().astype(np.uint8))
    scaled.info = image.info
    return scaled


def _scale(image: Image.Image, values: np.ndarray, path: str | Path | BinaryIO) -> float:
    """What brings a picture's values to 0..255. Only a mode of 16 bits says itself what its white is."""
    if not np.isfinite(values).all():
        raise FluxError(
            f"cannot read the picture {path}: it holds values that are not numbers (NaN or infinite)"
        )
    low, high = values.min(), values.max()
    if image.mode.startswith("I;16") or image.format == "PNG":
        return 1 / 257
    ranges = (
        ((1, 255.0), (255, 1.0), (65535, 1 / 257)) if image.mode == "F" else ((255, 1.0), (65535, 1 / 257))
    )
    for most, factor in ranges:
        if low >= 0 and high <= most:
            return factor
    raise FluxError(
        f"cannot read the picture {path}: its values go from {low:g} to {high:g}; "
        f"it should be saved with 8 or 16 bits, or with values from 0 to 1"
    )


def _open(path: str | Path | BinaryIO) -> Image.Image:
    readable_suffixes()  # so that HEIC is known, where its package is there
    try:
        image = Image.open(path)
        image.load()
    except UnidentifiedImageError:
        raise FluxError(f"{path} is not a picture that Pillow can read{_hint(path)}") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise FluxError(f"cannot read the picture {path}: {_reason(error)}") from None
    return image


def _hint(path: str | Path | BinaryIO) -> str:
    suffix = Path(str(path)).suffix.lower()
    if suffix in (".heic", ".heif", ".hif") and suffix in unreadable_suffixes():
        return " (HEIC needs the package pillow-heif: pip install pillow-heif)"
    return ""


def _reason(error: Exception) -> str:
    """An error's message in one line, without the file name that its text may repeat."""
    return getattr(error, "strerror", None) or str(error).splitlines()[0]


def fit(picture: np.ndarray, size: tuple[int, int], how: str = "crop") -> np.ndarray:
    """The picture (H, W, 3) at a size (height, width), in one of the ways of FITS.

    "crop": scaled to cover the size, and its middle cut out. "pad": scaled to lie within it, in the middle,
    and its outermost pixels repeated. "stretch": scaled, each side by itself.
    """
    if how == "pad":
        inner = inner_size(picture.shape[:2], size)
        return np.pad(resize(picture, inner), (*centred(inner, size), (0, 0)), "edge")
    if how == "stretch":
        return resize(picture, size)
    fitted = ImageOps.fit(Image.fromarray(picture), (size[1], size[0]), Image.Resampling.LANCZOS)
    return np.array(fitted)


def resize(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The picture (H, W, 3) scaled to a size (height, width); itself where it has it."""
    if picture.shape[:2] == tuple(size):
        return picture
    return np.array(Image.fromarray(picture).resize((size[1], size[0]), Image.Resampling.LANCZOS))


def inner_size(source: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """The largest size (height, width) of a source's aspect that lies within a size."""
    scale = min(size[0] / source[0], size[1] / source[1])
    return max(1, min(size[0], round(source[0] * scale))), max(1, min(size[1], round(source[1] * scale)))


def centred(inner: tuple[int, int], size: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """What is to be added to a size before and behind, in height and in width, so that it becomes another."""
    above, left = ((size[axis] - inner[axis]) // 2 for axis in (0, 1))
    return (above, size[0] - inner[0] - above), (left, size[1] - inner[1] - left)


def over_white(picture: np.ndarray, alpha: np.ndarray | None) -> np.ndarray:
    """A picture (H, W, 3) with its alpha (H, W), if any, laid over white."""
    if alpha is None:
        return picture
    share = alpha[..., None].astype(np.float32) / 255
    return np.rint(share * picture + (1 - share) * 255).astype(np.uint8)


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


def check_output(path: str | Path, size: tuple[int, int] | None = None) -> None:
    """Raise FluxError where `save` could not write; called before the long work, so that none is lost.

    size: (height, width) that the picture will have; JPEG and WebP have bounds.
    """
    path = Path(path)
    limit = MAX_SIDES.get(_format(path))
    if limit and size and max(size) > limit:
        height, width = size
        raise FluxError(
            f"{path}: a side can have {limit} pixels at most there, not {height}x{width}; take .png"
        )
    try:
        if path.is_dir():
            raise FluxError(f"the output {path} is a folder; name a file in it, such as {path / 'out.png'}")
        if not path.parent.is_dir():
            raise FluxError(f"the output's folder {path.parent} does not exist")
    except OSError as error:
        raise FluxError(f"cannot write {path}: {_reason(error)}") from None
    outputs.check_writable(path)


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


def save(
    path: str | Path,
    picture: np.ndarray,
    metadata: dict[str, str] | None = None,
    parameters: str | None = None,
) -> None:
    """Write a picture (H, W, 3), uint8, in the format of the path's suffix; never a part of one.

    The file is written under another name and then renamed. `metadata` becomes text chunks of a PNG; in
    JPEG and WebP, as JSON, EXIF's ImageDescription. `parameters`, what other programs look for, is the PNG's
    chunk of that name, or EXIF's UserComment.
    """
    path = Path(path)
    check_output(path)
    format = _format(path)
    options = SAVE_OPTIONS[format] | _carried(path, format, metadata or {}, parameters)
    try:
        with outputs.replacing(path) as partial, open(partial, "xb") as file:
            Image.fromarray(picture).save(file, format=format, **options)
    except OSError as error:
        raise FluxError(f"cannot write {path}: {_reason(error)}") from None


def _carried(path: Path, format: str, metadata: dict[str, str], parameters: str | None) -> dict[str, object]:
    """Pillow's option by which a file of the format carries texts."""
    texts = metadata | ({} if parameters is None else {PARAMETERS: parameters})
    if not texts:
        return {}
    if format == "PNG":
        chunks = PngImagePlugin.PngInfo()
        for key, value in texts.items():
            chunks.add_itxt(key, value)
        return {"pnginfo": chunks}
    exif = Image.Exif()
    exif[DESCRIPTION] = json.dumps(metadata)
    if parameters is not None:
        comment = UNICODE + parameters.encode("utf-16-be")
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = comment
    data = exif.tobytes()
    if format == "JPEG" and len(data) > MAX_JPEG_EXIF:
        warnings.warn(f"{path}: what made the picture is too long for a JPEG; left out", stacklevel=3)
        return {}
    return {"exif": data}


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata that `save` wrote, and any other text chunk of a PNG but `parameters`; {} without any."""
    with _open(path) as image:
        if text := getattr(image, "text", None):
            return {key: str(value) for key, value in text.items() if key != PARAMETERS}
        exif = image.getexif()
    try:
        found = jsonfiles.parse_object(str(exif.get(DESCRIPTION, "{}")))
    except ValueError:
        return {}
    return {key: value for key, value in found.items() if isinstance(value, str)}


def read_workflow(path: str | Path) -> dict[str, str]:
    """ComfyUI's "prompt" and "workflow" in a picture: text chunks of a PNG, in WebP and JPEG EXIF's texts."""
    with _open(path) as image:
        texts = dict(getattr(image, "text", {}))
        for value in image.getexif().values():
            name, colon, text = value.partition(":") if isinstance(value, str) else ("", "", "")
            if colon:
                texts.setdefault(name, text)
    return {name: str(texts[name]) for name in ("prompt", "workflow") if name in texts}
