"""Masks: where a picture changes. Arrays (H, W), uint8: 255 (white) changes, 0 stays, as in diffusers.

Between them a mask is a map of strengths: what has the value v is free in the last v/255 of the steps, and is
put back in those before, so that it changes less (Levin and Fried 2023, "Differential Diffusion").
"""

import numpy as np
from PIL import Image, ImageFilter

from flux.errors import FluxError

Box = tuple[int, int, int, int]  # top, left, height, width
NOISE = 16  # JPEG makes black and white grey by up to so much
WHITE = 255
LEAST_PADDING = 32  # pixels


def read(pixels: np.ndarray, alpha: np.ndarray | None) -> np.ndarray:
    """The mask that a picture (H, W, 3) shows: each pixel's brightest colour; transparent parts are black."""
    mask = pixels.max(axis=2)
    return clean(mask if alpha is None else np.minimum(mask, alpha))


def clean(mask: np.ndarray) -> np.ndarray:
    """The mask with what is nearly black or nearly white made so."""
    mask = np.where(mask < NOISE, 0, mask)
    return np.where(mask > WHITE - NOISE, WHITE, mask).astype(np.uint8)


def align(mask: np.ndarray, size: tuple[int, int], name: str) -> np.ndarray:
    """The mask at its picture's size (height, width). FluxError, with the mask's name, for another aspect.

    The aspects agree where sides that are rounded to whole pixels can explain the difference.
    """
    height, width = size
    h, w = mask.shape
    if 2 * abs(w * height - h * width) > max(h + w, height + width):
        raise FluxError(
            f"the mask {name} is {h}x{w} (height x width) and its picture {height}x{width}: they should have "
            "one aspect ratio"
        )
    return reduce(mask, size)


def check_changes(mask: np.ndarray, name: str) -> None:
    """FluxError where a mask is black all over."""
    if not mask.any():
        raise FluxError(f"the mask {name} is black all over, so that nothing changes: white is what changes")


def reduce(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The mask at another size: each cell has the greatest value of its pixels, so that no thin line is lost.

    The one rule from a file to the latent. Where the mask is enlarged, each pixel becomes several.
    """
    for axis, (new, old) in enumerate(zip(size, mask.shape, strict=True)):
        if new != old:
            mask = np.maximum.reduceat(mask, np.arange(new) * old // new, axis=axis)
    return mask


def grow(mask: np.ndarray, pixels: int) -> np.ndarray:
    """The mask with its white part grown by so many pixels to all sides, squarely; shrunk where negative.

    What touches the picture's edge does not shrink there.
    """
    if pixels < 0:
        return WHITE - grow(WHITE - mask, -pixels)
    for axis in (0, 1):
        mask = np.swapaxes(_spread(np.swapaxes(mask, 0, axis), pixels), 0, axis)
    return mask


def _spread(mask: np.ndarray, pixels: int) -> np.ndarray:
    """The greatest value within so many rows, up and down."""
    rows = len(mask)
    pixels = min(pixels, rows)
    out = np.pad(mask, ((pixels, pixels), (0, 0)))
    reach = 0
    while reach < pixels:
        step = min(pixels - reach, 2 * reach + 1)  # no further, or gaps would be left
        before = out.copy()
        np.maximum(out[step:], before[:-step], out=out[step:])
        np.maximum(out[:-step], before[step:], out=out[:-step])
        reach += step
    return out[pixels : pixels + rows]


def feather(mask: np.ndarray, pixels: int) -> np.ndarray:
    """The share of the new picture in the result, (H, W), uint8: 255 where the mask is not black.

    From there it falls evenly to 0 over so many pixels, or over the picture's longer side if that is less.
    """
    changed = np.where(mask > 0, WHITE, 0).astype(np.uint8)
    pixels = min(pixels, max(mask.shape))
    if pixels <= 0:
        return changed
    # A box around each pixel: centred on the mask it is full, further away than `pixels` it is empty.
    reach = (pixels + 1) // 2
    wide = grow(np.pad(changed, 2 * reach), reach)  # beyond the picture too, where boxes reach
    ramp = np.array(Image.fromarray(wide).filter(ImageFilter.BoxBlur(pixels / 2)))
    ramp = cut(ramp, (2 * reach, 2 * reach, *mask.shape))
    return np.where(grow(changed, pixels) > 0, np.maximum(ramp, changed), 0).astype(np.uint8)


def bounds(mask: np.ndarray) -> Box:
    """The smallest box around what is not black; the mask must have some."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(rows[0]), int(columns[0]), int(np.ptp(rows)) + 1, int(np.ptp(columns)) + 1


def crop_box(mask: np.ndarray, padding: int | None, aspect: float) -> Box:
    """The box to work in: around what is not black with `padding` pixels, widened to height / width = aspect.

    padding: None for a quarter of the mask's longer side, and at least LEAST_PADDING. The box stays within
    the picture: where that has no room, it is as near to the aspect as it can be.
    """
    top, left, height, width = bounds(mask)
    if padding is None:
        padding = max(LEAST_PADDING, max(height, width) // 4)
    wanted = height + 2 * padding, width + 2 * padding
    rows = max(wanted[0], round(wanted[1] * aspect))
    columns = max(wanted[1], round(wanted[0] / aspect))
    rows, columns = min(rows, mask.shape[0]), min(columns, mask.shape[1])
    return (
        _around(top, height, rows, mask.shape[0]),
        _around(left, width, columns, mask.shape[1]),
        rows,
        columns,
    )


def _around(start: int, inner: int, outer: int, whole: int) -> int:
    """Where `outer` pixels begin that have `inner` pixels from `start` in their middle, if there is room."""
    return min(max(0, start - (outer - inner) // 2), whole - outer)


def cut(array: np.ndarray, box: Box) -> np.ndarray:
    """The part of a picture or a mask in a box; a view."""
    top, left, height, width = box
    return array[top : top + height, left : left + width]


def compose(original: np.ndarray, made: np.ndarray, share: np.ndarray) -> np.ndarray:
    """A picture (H, W, 3) with another's pixels in the share (H, W) that `feather` gives; all uint8.

    Where the share is 0 the pixels are the first one's to the bit, where it is 255 the other's.
    """
    out = original.copy()
    if share.any():
        box = bounds(share)
        weight = cut(share, box)[..., None].astype(np.float32) / WHITE
        part = cut(original, box)
        cut(out, box)[:] = np.rint(part + weight * (cut(made, box).astype(np.float32) - part))
    return out
