"""From pictures to the input of networks that look at them, with the values of their image processors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from flux import jsonfiles
from flux.errors import FluxError

MAX_SIDE = 4096  # of the pictures that a config may ask for; Florence-2 asks for 768
# What other image processors may do and `prepare` does not; Pillow's number for bicubic is 3.
FIXED = {"resample": 3, **dict.fromkeys(("do_resize", "do_rescale", "do_normalize"), True)}


@dataclass(frozen=True)
class PictureParams:
    """The size that pictures are brought to, and each colour's mean and deviation, of values 0..1.

    The defaults are Florence-2's; its mean and deviation are ImageNet's.
    """

    height: int = 768
    width: int = 768
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    deviation: tuple[float, float, float] = (0.229, 0.224, 0.225)


def prepare(pictures: Sequence[Image.Image], params: PictureParams) -> mx.array:
    """B pictures of any size and mode -> (B, height, width, 3) float32, normalised.

    Proportions are given up: the networks were trained on pictures stretched to a square.
    """
    size = (params.width, params.height)
    resized = [image.convert("RGB").resize(size, Image.Resampling.BICUBIC) for image in pictures]
    # Through float64, as the reference does: the same float32 to the last bit.
    pixels = (np.stack([np.asarray(image) for image in resized]) * np.float64(1 / 255)).astype(np.float32)
    mean, deviation = np.array(params.mean, np.float32), np.array(params.deviation, np.float32)
    return mx.array((pixels - mean) / deviation)


def params_of(config: Mapping[str, Any], known: PictureParams, where: str) -> PictureParams:
    """What an image processor's config says, known for what it does not.

    where: the config's file or folder, for errors. FluxError for values that make no sense, and for what is
    not done here.
    """
    for key, value in FIXED.items():
        if config.get(key, value) != value:
            raise FluxError(f"{where}: {key} is {jsonfiles.shown(config[key])}; only {value} is known")
    try:
        size = dict(config.get("size", {}))
        height, width = (
            jsonfiles.count(size.get(side, getattr(known, side)), side, most=MAX_SIDE)
            for side in ("height", "width")
        )
        mean, deviation = (
            tuple(jsonfiles.number(value, name) for value in config.get(name, default))
            for name, default in (("image_mean", known.mean), ("image_std", known.deviation))
        )
    except (AttributeError, TypeError, ValueError) as error:
        raise FluxError(f"{where}: the settings for pictures make no sense: {error}") from None
    if len(mean) != 3 or len(deviation) != 3 or not min(deviation) > 0:
        raise FluxError(f"{where}: image_mean and image_std should be three numbers each, the latter above 0")
    return PictureParams(height, width, mean, deviation)
