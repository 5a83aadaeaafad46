"""Which size a picture is trained at, and how it is brought to it: aspect-ratio buckets as in sd-scripts.

Sizes are (height, width) in pixels.
"""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from flux.data.schema import Group

Size = tuple[int, int]


def table(group: Group) -> list[Size]:
    """The group's buckets, sorted. (training.md, "Buckets".)

    For each width of the range the height that keeps the area at most the resolution's, in both orientations,
    and the square.
    """
    step = group.bucket_reso_steps
    low, high = -(-group.min_bucket_reso // step) * step, group.max_bucket_reso // step * step
    area = group.resolution[0] * group.resolution[1]
    side = math.isqrt(area) // step * step
    sizes = {(side, side)} if side else set()
    for width in range(low, high + 1, step):
        height = min(area // width // step * step, high)
        if height >= low:
            sizes |= {(height, width), (width, height)}
    return sorted(sizes)


def choose(size: Size, group: Group) -> Size:
    """The bucket of a picture of this size; the group's resolution where buckets are off.

    The nearest ratio of width to height; of several with that ratio the picture's size, else the largest.
    """
    if not group.enable_bucket:
        return group.resolution
    if group.bucket_no_upscale:
        return _shrunk(size, group)
    ratio = size[1] / size[0]
    return min(
        table(group),
        key=lambda bucket: (abs(bucket[1] / bucket[0] - ratio), bucket != size, -bucket[0] * bucket[1]),
    )


def nearest(size: Size, sizes: Sequence[Size]) -> int:
    """Which of `sizes` a picture goes to: that with the nearest ratio of width to height.

    Of several with that ratio the largest that is not larger than the picture, else the smallest.
    """
    ratio, area = size[1] / size[0], size[0] * size[1]

    def distance(i: int) -> tuple[float, bool, int]:
        height, width = sizes[i]
        is_larger = height * width > area
        return abs(width / height - ratio), is_larger, height * width if is_larger else -height * width

    return min(range(len(sizes)), key=distance)


def _shrunk(size: Size, group: Group) -> Size:
    """The picture's size, shrunk to the resolution's area if it is above, rounded down to the step.

    A side below one step becomes one step: such a picture is enlarged after all, as it would vanish.
    """
    area = group.resolution[0] * group.resolution[1]
    scale = min(1.0, math.sqrt(area / (size[0] * size[1])))
    step = group.bucket_reso_steps
    # The tiny term: a side that is a whole number of steps must not lose one to the root's rounding.
    height, width = (max(step, int(side * scale + 1e-6) // step * step) for side in size)
    return height, width


def scale_to_cover(size: Size, bucket: Size) -> float:
    """The factor that makes a picture just cover its bucket; above 1 it is enlarged."""
    return max(bucket[0] / size[0], bucket[1] / size[1])


def fit(picture: np.ndarray, bucket: Size, rng: np.random.Generator | None = None) -> np.ndarray:
    """A picture (H, W) or (H, W, 3), uint8, scaled to cover the bucket, and a part of that size cut out.

    The part is the middle, or anywhere with `rng`. Scaling down averages areas, scaling up is Lanczos.
    """
    scale = scale_to_cover(picture.shape[:2], bucket)
    height, width = (
        max(least, int(side * scale + 0.5)) for side, least in zip(picture.shape, bucket, strict=False)
    )
    if (height, width) != picture.shape[:2]:
        method = Image.Resampling.BOX if scale < 1 else Image.Resampling.LANCZOS
        picture = np.array(Image.fromarray(picture).resize((width, height), method))
    spare = (height - bucket[0], width - bucket[1])
    top, left = (n // 2 for n in spare) if rng is None else (int(rng.integers(n + 1)) for n in spare)
    return picture[top : top + bucket[0], left : left + bucket[1]]
