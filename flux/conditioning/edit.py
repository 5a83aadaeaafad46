"""A picture that is changed: image to image, inpainting, outpainting."""

import warnings
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from flux import images
from flux.conditioning import canvas, masks
from flux.conditioning.canvas import Canvas, Sides, Size
from flux.conditioning.pictures import Picture
from flux.errors import FluxError
from flux.jsonfiles import shown

WHOLE_STRENGTH = 0.6  # as diffusers' default
ALPHA, AUTO = "alpha", "auto"
COARSE = 1.5  # times that a part may be larger than the model makes it before that is said


@dataclass(frozen=True)
class Edit:
    """A picture that is changed instead of one made from noise alone.

    strength: from 0, the picture as it is, to 1, as from noise alone: the share of the steps that are made.
    None: 1 where a part changes, and WHOLE_STRENGTH where all of it does, since 1 would be the prompt alone.
    mask: where it changes, white, or "alpha" for where the picture is transparent; greys change less, see
    `masks`. None: everywhere. expand: pixels to add, (top, right, bottom, left), which change.
    fit: how the picture becomes one of another size, of `images.FITS`.
    grow: pixels by which what changes grows, or shrinks where negative. feather: pixels around it over which
    the result goes over into the picture.
    crop_mask: work on the part around the mask, with so many pixels around it or "auto", at the model's best
    size, and put it back. None: work on the whole picture.
    keep: leave the picture as it is, to the bit, outside mask and feather; False: as the autoencoder has it.
    """

    image: Picture
    strength: float | None = None
    mask: Picture | str | None = None
    expand: Sides | None = None
    fit: str = "crop"
    grow: int = 0
    feather: int = 0
    crop_mask: int | str | None = None
    keep: bool = True

    @property
    def share(self) -> float:
        """The share of the steps that are made: the strength that is given, or else what stands for it."""
        if self.strength is not None:
            return self.strength
        return WHOLE_STRENGTH if self.mask is None and self.expand is None else 1.0

    def check(self) -> None:
        """FluxError, naming the value, where no picture can be made."""
        if not 0 <= self.share <= 1:
            raise FluxError(f"the strength must lie between 0 (the picture itself) and 1, not {self.share}")
        if self.fit not in images.FITS:
            raise FluxError(f"a picture is fitted by {', '.join(images.FITS)}, not {self.fit!r}")
        if self.feather < 0:
            raise FluxError(f"the feather must be 0 or more pixels, not {self.feather}")
        self._check_mask()
        if self.expand is not None and (min(self.expand) < 0 or max(self.expand) == 0):
            raise FluxError(
                f"a picture is expanded by 0 or more pixels at each side, at one by more, not {self.expand}"
            )

    def _check_mask(self) -> None:
        if isinstance(self.mask, str) and self.mask != ALPHA:
            raise FluxError(f"the mask is a picture or {ALPHA!r}, not {self.mask!r}")
        padding = self.crop_mask
        if padding not in (None, AUTO) and not (isinstance(padding, int) and padding >= 0):
            raise FluxError(f"the crop's padding is {AUTO!r} or 0 or more pixels, not {shown(padding)}")
        if self.mask is None and self.expand is None:
            needing = {"grow": self.grow, "feather": self.feather, "crop_mask": self.crop_mask is not None}
            for name in (name for name, given in needing.items() if given):
                raise FluxError(f"{name} has no effect without a mask: the whole picture changes")
            if not self.keep:
                raise FluxError("without a mask nothing of the picture is kept")
        elif self.feather and not self.keep:
            raise FluxError("a feather has no effect where nothing of the picture is kept")

    def default_size(self, best: Size) -> Size:
        """The size (height, width) to take where none is given.

        It is the picture's; of the part that is worked on `best`, the model's. FluxError for a picture that
        is far too large for a model of that size.
        """
        if self.crop_mask is not None:
            return best
        height, width = self.image.size
        top, right, bottom, left = self.expand or (0, 0, 0, 0)
        name = self.image.name or "the picture"
        canvas.check_size((height + top + bottom, width + left + right), best, name)
        return self.image.size

    def canvas(self, size: Size, step: int) -> Canvas:
        """What the model works on for a size (height, width), its sides being multiples of `step`.

        size: the picture's, before it is expanded; with `crop_mask` that of the part that is worked on.
        FluxError for a mask of another aspect than the picture's, or one that changes nothing.
        """
        return _canvas(self, size, step)

    def read_mask(self) -> np.ndarray | None:
        """The mask at the picture's size, (H, W), uint8."""
        if self.mask is None:
            return None
        if isinstance(self.mask, Picture):
            name = self.mask.name or "given"
            mask = masks.read(self.mask.pixels, self.mask.alpha)
            masks.check_changes(mask, name)
            return masks.align(mask, self.image.size, name)
        alpha = self.image.alpha
        if alpha is None or (alpha > masks.WHITE - masks.NOISE).all():
            raise FluxError(f"{self.image.name or 'the picture'} has no transparent part to be its mask")
        return masks.clean(masks.WHITE - alpha)


@lru_cache(maxsize=2)  # a request asks several times, and pictures may be large
def _canvas(edit: Edit, size: Size, step: int) -> Canvas:
    edit.check()
    if min(size) < 1:
        raise FluxError(f"a picture's height and width must be positive, not {size[0]}x{size[1]}")
    picture, mask = _fitted(edit, size)
    whole = (picture.shape[0], picture.shape[1])
    if mask is None:
        return canvas.make(picture, None, None, (0, 0, *whole), whole, step)
    mask = _grown(edit, mask)
    share = masks.feather(mask, edit.feather) if edit.keep else None
    if edit.crop_mask is None:
        return canvas.make(picture, mask, share, (0, 0, *whole), whole, step)
    padding = edit.crop_mask if isinstance(edit.crop_mask, int) else None
    made = canvas.make(picture, mask, share, masks.crop_box(mask, padding, size[0] / size[1]), size, step)
    _warn_if_coarse(made)
    return made


def _fitted(edit: Edit, size: Size) -> tuple[np.ndarray, np.ndarray | None]:
    """The picture (H, W, 3) and its mask (H, W), at the size unless a part is cropped, and expanded."""
    picture, mask = images.over_white(edit.image.pixels, edit.image.alpha), edit.read_mask()
    if edit.crop_mask is None:
        picture = images.fit(picture, size, edit.fit)
        mask = None if mask is None else canvas.fit_mask(mask, size, edit.fit)
    if edit.expand is not None:
        mask = canvas.expand_mask(mask, (picture.shape[0], picture.shape[1]), edit.expand)
        picture = canvas.expand(picture, edit.expand)
    return picture, mask


def _grown(edit: Edit, mask: np.ndarray) -> np.ndarray:
    mask = masks.grow(mask, edit.grow)
    if not mask.any():
        shrunk = f"shrunk by {-edit.grow} pixels"
        cause = shrunk if edit.grow < 0 else "cut with the picture (fit pad cuts none)"
        raise FluxError(f"the mask, {cause}, is empty: nothing changes")
    return mask


def _warn_if_coarse(made: Canvas) -> None:
    """Warn of a part around a mask that the model makes much smaller than it is."""
    (height, width), (h, w) = made.box[2:], made.inner
    if height > COARSE * h:
        text = f"the part around the mask is {height}x{width} pixels and made as {h}x{w}, so it is blurred"
        warnings.warn(f"{text}; --image-size makes it larger", stacklevel=2)
