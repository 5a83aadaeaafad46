"""From a picture of any size to the one that the model works on, and back."""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from flux import images
from flux.conditioning import masks
from flux.conditioning.masks import Box
from flux.errors import FluxError

Size = tuple[int, int]  # height, width
Sides = tuple[int, int, int, int]  # top, right, bottom, left
MOST_AREAS = 16  # so many times the pixels that a model makes by itself are left as they are


@dataclass(frozen=True, eq=False)
class Canvas:
    """What the model works on, and what its result is put into.

    picture (h, w, 3), mask (h, w) or None: what the model is given, of sides that it can make.
    whole (H, W, 3): the picture that the result is a part of. share (H, W): of the result's pixels in it, as
    `masks.compose` takes it; None: all of them in the box. box: the part of `whole` that is worked on.
    inner: the size (height, width) of that part in `picture`; what is below and right of it fills it up.
    """

    picture: np.ndarray
    mask: np.ndarray | None
    whole: np.ndarray
    share: np.ndarray | None
    box: Box
    inner: Size

    def compose(self, made: np.ndarray) -> np.ndarray:
        """The result (H, W, 3) of what the model has made of `picture`, (h, w, 3); all uint8."""
        made = images.resize(made[: self.inner[0], : self.inner[1]], self.box[2:])
        out = self.whole.copy()
        part = masks.cut(out, self.box)
        part[:] = made if self.share is None else masks.compose(part, made, masks.cut(self.share, self.box))
        return out

    def over(self, pixels: np.ndarray) -> np.ndarray:
        """Of another picture (H', W', 3), laid over `whole`, what goes with `picture`: (h, w, 3), uint8."""
        part = masks.cut(images.fit(pixels, self.whole.shape[:2]), self.box)
        rest = [(0, side - inner) for side, inner in zip(self.picture.shape, self.inner, strict=False)]
        return np.pad(images.resize(part, self.inner), (*rest, (0, 0)), "edge")


def make(
    whole: np.ndarray, mask: np.ndarray | None, share: np.ndarray | None, box: Box, size: Size, step: int
) -> Canvas:
    """The canvas for a box of a picture, scaled to lie within a size and filled up to multiples of `step`."""
    inner = images.inner_size(box[2:], size)
    rest = tuple((0, -side % step) for side in inner)
    picture = np.pad(images.resize(masks.cut(whole, box), inner), (*rest, (0, 0)), "edge")
    if mask is not None:
        mask = np.pad(masks.reduce(masks.cut(mask, box), inner), rest, "edge")
    return Canvas(picture, mask, whole, share, box, inner)


def check_size(size: Size, best: Size, name: str) -> None:
    """FluxError, with the picture's name, where it has far more pixels than a model makes by itself."""
    most = MOST_AREAS * best[0] * best[1]
    if size[0] * size[1] > most:
        raise FluxError(
            f"{name} is {size[0]}x{size[1]} (height x width), more than {most} pixels, which is too much for "
            "this model: --image-size makes it smaller, --crop-mask works on the part around a mask"
        )


def fit_mask(mask: np.ndarray, size: Size, how: str) -> np.ndarray:
    """A mask at a size, as `images.fit` brings its picture to it; what `pad` adds stays as it is."""
    source = (mask.shape[0], mask.shape[1])
    if how == "pad":
        inner = images.inner_size(source, size)
        return np.pad(masks.reduce(mask, inner), images.centred(inner, size))
    if how == "crop":
        part = images.inner_size(size, source)
        (top, _), (left, _) = images.centred(part, source)
        mask = masks.cut(mask, (top, left, *part))
    return masks.reduce(mask, size)


def expand(picture: np.ndarray, sides: Sides) -> np.ndarray:
    """The picture (H, W, 3) with so many pixels added: its outermost ones repeated, and blurred."""
    around = _around(sides)
    wide = np.pad(picture, (*around, (0, 0)), "edge")
    blur = ImageFilter.GaussianBlur(max(sides) / 8)
    out = np.array(Image.fromarray(wide).filter(blur))
    (top, _), (left, _) = around
    masks.cut(out, (top, left, *picture.shape[:2]))[:] = picture
    return out


def expand_mask(mask: np.ndarray | None, size: Size, sides: Sides) -> np.ndarray:
    """A mask, or none, of a picture of this size, for the expanded one: what is new changes."""
    inside = np.zeros(size, np.uint8) if mask is None else mask
    return np.pad(inside, _around(sides), constant_values=masks.WHITE)


def _around(sides: Sides) -> tuple[tuple[int, int], tuple[int, int]]:
    top, right, bottom, left = sides
    return (top, bottom), (left, right)
