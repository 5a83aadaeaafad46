"""A sample's picture: read, put into its bucket, and as the pixels that are trained on."""

import hashlib
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from flux import images
from flux.data import buckets
from flux.data.buckets import Size
from flux.data.samples import Dataset, Sample
from flux.errors import FluxError

HUE_SHIFT = 8 / 180  # of the circle, either way, as sd-scripts' color_aug
GAMMA = 0.05  # either way
SHOWN = 10  # faults in a line
THREADS = 8  # that decode
SAME_RATIO = 0.02  # a mask's ratio of width to height may differ so much from its picture's


class NamedBytes(io.BytesIO):
    """A file in memory that messages can name: `images.load` puts its argument into them."""

    def __init__(self, content: bytes, name: str):
        super().__init__(content)
        self._name = name

    def __str__(self) -> str:
        return self._name


@dataclass(frozen=True)
class Placed:
    """A sample whose picture was found: how large it is, where it goes, and what tells it from others."""

    sample: Sample
    size: Size  # (height, width) of the upright picture
    bucket: Size
    digest: str  # SHA-256 of the encoded picture, in hexadecimal
    mask: str = ""  # that of the mask's file; "" where there is none


@dataclass(frozen=True)
class Look:
    """What is seen of a picture when it is decoded."""

    placed: Placed
    pixels: str  # a digest of what is seen: equal for copies in other formats
    has_alpha: bool
    animated: bool


def read(sample: Sample) -> bytes:
    """The encoded picture. FluxError, by name, where its file is absent or cannot be read."""
    return sample.picture if isinstance(sample.picture, bytes) else _bytes(sample.picture, "picture")


def _bytes(path: Path, kind: str) -> bytes:
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:  # the latter: a name that cannot be
        raise FluxError(f"cannot read the {kind} {path}: {getattr(error, 'strerror', error)}") from None


def fit(dataset: Dataset) -> list[Placed]:
    """The samples and those of the validation, in their buckets.

    FluxError names all that is wrong with the data set and all pictures that cannot be used.
    """
    looks, faults = look_at_all(dataset)
    if dataset.errors:
        raise FluxError("; ".join([*dataset.errors, *faults[:SHOWN]]))
    refuse(faults)
    return [look.placed for look in looks]


def refuse(faults: Sequence[str]) -> None:
    """FluxError with what is wrong with pictures, where anything is."""
    if faults:
        raise FluxError(f"{len(faults)} picture(s) cannot be used: {'; '.join(faults[:SHOWN])}")


def look_at_all(dataset: Dataset) -> tuple[list[Look], list[str]]:
    """Decodes every picture; those that can be used, and what is wrong with the others."""

    def one(sample: Sample) -> Look | str:
        try:
            return look(sample, dataset)
        except FluxError as error:
            return str(error)

    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(one, dataset.samples + dataset.validation))
    return [each for each in found if isinstance(each, Look)], [
        each for each in found if isinstance(each, str)
    ]


def look(sample: Sample, dataset: Dataset) -> Look:
    """Decodes a picture and its mask, and finds its bucket.

    FluxError, by name, where they are damaged or nothing of the picture would be seen or trained.
    """
    content = read(sample)
    picture, alpha = load(sample, content)
    height, width, _ = picture.shape
    bucket = buckets.choose((height, width), dataset.groups[sample.group])
    digest = hashlib.sha256(content).hexdigest()
    mask_digest = ""
    if sample.mask is not None:
        mask_content = _bytes(sample.mask, "mask")
        mask_digest = hashlib.sha256(mask_content).hexdigest()
        if not read_mask(sample.mask, mask_content, (height, width)).any() and not sample.subset.mask_floor:
            raise FluxError(
                f"{sample.mask}: the mask is all black: nothing of {sample.name} would be trained"
            )
    if alpha is not None and not alpha.any():
        raise FluxError(f"{sample.name}: the picture is all transparent: there is nothing to see in it")
    pixels = hashlib.sha256(repr(picture.shape).encode())
    pixels.update(np.ascontiguousarray(picture).data)
    pixels.update(b"" if alpha is None else np.ascontiguousarray(alpha).data)
    has_alpha = alpha is not None and bool(np.any(alpha < 255))
    placed = Placed(sample, (height, width), bucket, digest, mask_digest)
    return Look(placed, pixels.hexdigest(), has_alpha, is_animated(content))


def load(sample: Sample, content: bytes) -> tuple[np.ndarray, np.ndarray | None]:
    """The picture (H, W, 3) and its alpha (H, W) or None, uint8, upright; an animation's first frame.

    FluxError, by name, where it is damaged.
    """
    return images.load(NamedBytes(content, sample.name))


def varies(sample: Sample) -> bool:
    """Whether each repeat of the picture is a different variant, by its crop or its colours."""
    return sample.subset.random_crop or sample.subset.color_aug


def prepare(placed: Placed, seed: int, repeat: int) -> tuple[np.ndarray, np.ndarray | None]:
    """The picture (h, w, 3) in its bucket, and its mask (h, w) or None, uint8.

    Crops and colours that vary come from (seed, content, repeat). The mask is that of its file, or the alpha
    with `alpha_mask`; without that, transparency is laid over white, as the colours below it are arbitrary.
    FluxError where the file is not what it was when it was placed.
    """
    sample = placed.sample
    content = read(sample)
    mask_content = b"" if sample.mask is None else _bytes(sample.mask, "mask")
    for kind, data, digest in (("picture", content, placed.digest), ("mask", mask_content, placed.mask)):
        if digest and hashlib.sha256(data).hexdigest() != digest:
            raise FluxError(f"the {kind} {sample.mask if kind == 'mask' else sample.name} has changed since "
                            "the start: start again")  # fmt: skip
    picture, alpha = load(sample, content)
    mask = alpha if sample.subset.alpha_mask else None
    if sample.mask is not None:
        mask = read_mask(sample.mask, mask_content, picture.shape[:2])
    if not sample.subset.alpha_mask:
        picture = images.over_white(picture, alpha)
    # From the content, not from the position in the list: more pictures must not change those there were.
    origin = [seed, int(placed.digest[:16], 16), repeat]
    if sample.subset.color_aug:
        picture = vary_colours(picture, np.random.default_rng([1, *origin]))

    def cut(array: np.ndarray) -> np.ndarray:
        # A new generator each time: picture and mask must be cut alike.
        rng = np.random.default_rng([0, *origin]) if sample.subset.random_crop else None
        return buckets.fit(array, placed.bucket, rng)

    return cut(picture), None if mask is None else cut(mask)


def read_mask(path: Path, content: bytes, size: Size) -> np.ndarray:
    """A mask's file as (H, W), uint8, of the picture's size: white is trained, black is not.

    FluxError where it is damaged or of another shape than the picture.
    """
    colours, alpha = images.load(NamedBytes(content, str(path)))
    height, width, _ = colours.shape
    if abs(width / height * size[0] / size[1] - 1) > SAME_RATIO:
        raise FluxError(
            f"{path}: the mask is {height}x{width} (height x width) and its picture {size[0]}x{size[1]}: "
            "they should have one shape"
        )
    mask = Image.fromarray(colours).convert("L")
    if alpha is not None:  # what is transparent in a mask is not trained
        mask = Image.fromarray(np.minimum(np.array(mask), alpha))
    return np.array(mask.resize((size[1], size[0]), Image.Resampling.BILINEAR))


def vary_colours(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The picture with its hue shifted and its brightness bent a little."""
    hue, gamma = rng.uniform(-HUE_SHIFT, HUE_SHIFT), 1 + rng.uniform(-GAMMA, GAMMA)
    bands = list(Image.fromarray(picture).convert("HSV").split())
    bands[0] = bands[0].point([(value + round(hue * 256)) % 256 for value in range(256)])
    turned = np.array(Image.merge("HSV", bands).convert("RGB"))
    curve = np.rint(255 * (np.arange(256) / 255) ** gamma).astype(np.uint8)
    return curve[turned]


def is_animated(content: bytes) -> bool:
    """Whether a file has several frames, of which the first is taken."""
    with Image.open(io.BytesIO(content)) as image:
        return getattr(image, "n_frames", 1) > 1
