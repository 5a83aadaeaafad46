"""Pictures -> what the transformer is given of them in every step."""

import warnings
from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np

from flux import images, sampler
from flux.conditioning import edges, masks
from flux.conditioning.canvas import Canvas
from flux.conditioning.encoded import PictureConditioning
from flux.conditioning.pictures import Picture
from flux.conditioning.variants import reference_positions, reference_size

SQUEEZED = 1.25  # the aspect of a reference may change by this factor without a word
HALF = 128  # from this grey on a pixel of a mask is white: Fill knows no greys


class PictureEncoder:
    """Encodes pictures with an autoencoder, lazily.

    encode: pictures (1, H, W, 3) in -1..1 -> their packed latent (1, L, C). cell: pixels to one of the latent
    along each side, 8 for FLUX.1.
    """

    def __init__(self, encode: Callable[[mx.array], mx.array], cell: int):
        self.encode, self.cell = encode, cell

    def edit(self, canvas: Canvas, fill: bool, starts: bool) -> PictureConditioning:
        """What a picture that is changed brings. fill: to Fill, which is told of the mask.

        starts: the picture is what sampling starts with. Of Fill's picture nothing is put back in the steps.
        """
        if fill:
            known = self._encode(canvas.picture) if starts else None
            return PictureConditioning(channels=self._fill(canvas), known=known)
        known = self._encode(canvas.picture)
        return PictureConditioning(known=known, mask=self._mask(canvas, known.shape[2]))

    def control(self, picture: Picture, of_photo: bool, fit: Callable[[np.ndarray], np.ndarray]) -> mx.array:
        """Channels (1, L, C) of a control picture, or of a photo's edges; fit: see `ControlNets.encode`."""
        fitted = fit(picture.pixels)
        return self._encode(edges.canny(fitted) if of_photo else fitted)

    def references(self, pictures: Sequence[Picture]) -> tuple[mx.array, mx.array]:
        """References' tokens (1, Lr, C) and their positions (1, Lr, 3)."""
        fitted = list(map(_scaled, pictures))
        latent_sizes = [(p.shape[0] // self.cell, p.shape[1] // self.cell) for p in fitted]
        return mx.concatenate(list(map(self._encode, fitted)), axis=1), reference_positions(latent_sizes)

    def _encode(self, pixels: np.ndarray) -> mx.array:
        """(H, W, 3), uint8 -> (1, L, C)."""
        return self.encode(images.normalize(pixels[None]))

    def _mask(self, canvas: Canvas, channels: int) -> mx.array | None:
        """The canvas's mask for its latent: (1, L, channels) in 0..1."""
        if canvas.mask is None:
            return None
        h, w = (side // self.cell for side in canvas.mask.shape)
        cells = mx.array(masks.reduce(canvas.mask, (h, w))).astype(mx.float32) / masks.WHITE
        return sampler.pack(mx.broadcast_to(cells[None, ..., None], (1, h, w, channels // 4)))

    def _fill(self, canvas: Canvas) -> mx.array:
        """Fill's channels (1, L, C + 4 * cell^2): the picture, grey where it changes, and the mask.

        The mask has each pixel of a cell as a channel, as in BFL's code and diffusers.
        """
        assert canvas.mask is not None  # by `variants.check`
        mask = mx.array(canvas.mask >= HALF).astype(mx.float32)[None, ..., None]  # (1, H, W, 1)
        picture = self.encode(images.normalize(canvas.picture[None]) * (1 - mask))
        h, w = (side // self.cell for side in canvas.mask.shape)
        cells = mask.reshape(1, h, self.cell, w, self.cell).transpose(0, 1, 3, 2, 4)
        return mx.concatenate([picture, sampler.pack(cells.reshape(1, h, w, self.cell**2))], axis=2)


def _scaled(picture: Picture) -> np.ndarray:
    """A reference as a whole at Kontext's size, as BFL's code and diffusers; warns where that shows."""
    size = reference_size(picture)
    aspects = [side[1] / side[0] for side in (picture.size, size)]
    if max(aspects) > SQUEEZED * min(aspects):
        height, width = picture.size
        warnings.warn(
            f"{picture.name or 'the reference'} is {height}x{width} (height x width); Kontext is given it as "
            f"{size[0]}x{size[1]}, squeezed: cut it to less than 2.3 times as long as wide",
            stacklevel=2,
        )
    return images.resize(images.over_white(picture.pixels, picture.alpha), size)
