"""A sample's picture: read, put into its bucket, and as the pixels that are trained on."""

import hashlib
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import ExifTags, Image

from flux import images
from flux.data import buckets
from flux.data.buckets import Size
from flux.data.samples import Sample
from flux.data.schema import Group
from flux.errors import FluxError

TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange height and width
HUE_SHIFT = 8 / 180  # of the circle, either way, as sd-scripts' color_aug
GAMMA = 0.05  # either way
SHOWN = 10  # faults in a line
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


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


def read(sample: Sample) -> bytes:
    """The encoded picture. FluxError, by name, where its file is absent or cannot be read."""
    if isinstance(sample.picture, bytes):
        return sample.picture
    try:
        return sample.picture.read_bytes()
    except OSError as error:
        raise FluxError(f"cannot read the picture {sample.name}: {error.strerror}") from None


def place(samples: Iterable[Sample], groups: Sequence[Group]) -> list[Placed]:
    """The samples in their buckets, by the pictures' sizes. FluxError names all that cannot be read."""
    placed, faults = [], []
    for sample in samples:
        try:
            placed.append(place_one(sample, groups[sample.group]))
        except FluxError as error:
            faults.append(str(error))
    if faults:
        raise FluxError(f"{len(faults)} picture(s) cannot be read: {'; '.join(faults[:SHOWN])}")
    return placed


def place_one(sample: Sample, group: Group) -> Placed:
    """As `place`, for one."""
    content = read(sample)
    own = size(content, sample.name)
    return Placed(sample, own, buckets.choose(own, group), hashlib.sha256(content).hexdigest())


def size(content: bytes, name: str) -> Size:
    """(height, width) of the upright picture. FluxError, by name, for what is no picture.

    Only a PNG without EXIF at its front is decoded: it may have it at its end.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation) in TURNED
            return image.size if turned else (image.height, image.width)
    except UNREADABLE:
        images.load(NamedBytes(content, name))  # has the words for what is wrong
        raise FluxError(f"the header of the picture {name} is damaged") from None


def load(sample: Sample, content: bytes) -> tuple[np.ndarray, np.ndarray | None]:
    """The picture (H, W, 3) and its alpha (H, W) or None, uint8, upright; an animation's first frame.

    FluxError, by name, where it is damaged.
    """
    return images.load(NamedBytes(content, sample.name))


def varies(sample: Sample) -> bool:
    """Whether each repeat of the picture is a variant of its own, by its crop or its colours."""
    return sample.subset.random_crop or sample.subset.color_aug


def prepare(placed: Placed, seed: int, repeat: int) -> tuple[np.ndarray, np.ndarray | None]:
    """The picture (h, w, 3) in its bucket, and its mask (h, w) or None, uint8.

    Crops and colours that vary come from (seed, content, repeat). The mask is the alpha with `alpha_mask`;
    without it, transparency is laid over white, as the colours below it are arbitrary.
    FluxError where the file is not what it was when it was placed.
    """
    sample = placed.sample
    content = read(sample)
    if hashlib.sha256(content).hexdigest() != placed.digest:
        raise FluxError(f"the picture {sample.name} has changed since the start: start again")
    picture, alpha = load(sample, content)
    mask = alpha if sample.subset.alpha_mask else None
    if mask is None:
        picture = over_white(picture, alpha)
    # From the content, not from the place in the list: more pictures must not change those there were.
    origin = [seed, int(placed.digest[:16], 16), repeat]
    if sample.subset.color_aug:
        picture = vary_colours(picture, np.random.default_rng([1, *origin]))

    def cut(array: np.ndarray) -> np.ndarray:
        # A new generator each time: picture and mask must be cut alike.
        rng = np.random.default_rng([0, *origin]) if sample.subset.random_crop else None
        return buckets.fit(array, placed.bucket, rng)

    return cut(picture), None if mask is None else cut(mask)


def over_white(picture: np.ndarray, alpha: np.ndarray | None) -> np.ndarray:
    """A picture (H, W, 3) with its alpha (H, W), if any, laid over white."""
    if alpha is None:
        return picture
    share = alpha[..., None].astype(np.float32) / 255
    return np.rint(share * picture + (1 - share) * 255).astype(np.uint8)


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
