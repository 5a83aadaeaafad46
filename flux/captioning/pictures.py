"""From a Pillow picture to the captioner's input, with the values of the reference's image processor."""

from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
from PIL import Image

from flux import images


@dataclass(frozen=True)
class PictureParams:
    """The size that pictures are brought to, and each colour's mean and deviation, of values 0..1.

    The defaults are Florence-2's; its mean and deviation are ImageNet's.
    """

    height: int = 768
    width: int = 768
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    deviation: tuple[float, float, float] = (0.229, 0.224, 0.225)


def load(path: str | Path) -> Image.Image:
    """A file's picture, RGB, upright, transparency laid over white: the colours below it are arbitrary.

    Raises FluxError for a file that is absent or no picture.
    """
    return Image.fromarray(images.over_white(*images.load(path)))


def prepare(pictures: list[Image.Image], params: PictureParams | None = None) -> mx.array:
    """B pictures of any size and mode -> (B, height, width, 3) float32, normalised.

    Proportions are given up: Florence-2 was trained on pictures stretched to a square, and its places are
    parts of the width and of the height, so they still fit the picture as it was.
    """
    params = params or PictureParams()
    size = (params.width, params.height)
    resized = [image.convert("RGB").resize(size, Image.Resampling.BICUBIC) for image in pictures]
    # Through float64, as the reference does: the same float32 to the last bit.
    pixels = (np.stack([np.asarray(image) for image in resized]) * np.float64(1 / 255)).astype(np.float32)
    mean, deviation = np.array(params.mean, np.float32), np.array(params.deviation, np.float32)
    return mx.array((pixels - mean) / deviation)
