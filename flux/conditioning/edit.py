"""A picture that is changed: image to image."""

import math
from dataclasses import dataclass

import numpy as np

from flux import images
from flux.conditioning.pictures import Picture
from flux.errors import FluxError


@dataclass(frozen=True)
class Edit:
    """A picture that is changed instead of one made from noise alone.

    strength: from 0, the picture as it is, to 1, as from noise alone: the share of the steps that are made.
    """

    image: Picture
    strength: float = 1.0

    def check(self) -> None:
        """FluxError, naming the value, where no picture can be made."""
        if not (math.isfinite(self.strength) and 0 <= self.strength <= 1):
            raise FluxError(
                f"the strength must lie between 0 (the picture itself) and 1, not {self.strength}"
            )

    def canvas(self, size: tuple[int, int]) -> np.ndarray:
        """The picture at a size (height, width): (H, W, 3), uint8."""
        return images.fit(self.image.pixels, size)
