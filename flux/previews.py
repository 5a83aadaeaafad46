"""The picture so far, shown while it is made: a small decoder of the model's estimate, and its file.

Without weights of a tiny autoencoder it is a linear map from latents to colours, one pixel a latent: the
published factors for FLUX.1's autoencoder, and for others a fit on pictures that their encoders encode.
"""

import warnings
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
from PIL import Image

from flux import images, sampler
from flux.errors import FluxError
from flux.models.autoencoder import AutoEncoder, AutoEncoderParams
from flux.requests import ResolvedRequest
from flux.weights import tiny_decoder

Colours = Callable[
    [mx.array], mx.array
]  # the transformer's latents (1, h, w, z) -> (1, H, W, 3), about -1..1

Factors = np.ndarray | tuple[tuple[float, ...], ...] | tuple[float, ...]

# Of FLUX.1's 16 channels, in red, green and blue, and what is added to their sum: `class Flux` in ComfyUI's
# comfy/latent_formats.py.
FLUX_FACTORS = (
    *((-0.0346, 0.0244, 0.0681), (0.0034, 0.0210, 0.0687), (0.0275, -0.0668, -0.0433)),
    *((-0.0174, 0.0160, 0.0617), (0.0859, 0.0721, 0.0329), (0.0004, 0.0383, 0.0115)),
    *((0.0405, 0.0861, 0.0915), (-0.0236, -0.0185, -0.0259), (-0.0245, 0.0250, 0.1180)),
    *((0.1008, 0.0755, -0.0421), (-0.0515, 0.0201, 0.0011), (0.0428, -0.0012, -0.0036)),
    *((0.0817, 0.0765, 0.0749), (-0.1264, -0.0522, -0.1103), (-0.0280, -0.0881, -0.0499)),
    (-0.1262, -0.0982, -0.0778),
)
FLUX_BIAS = (-0.0329, -0.0718, -0.0851)
FIT_PICTURES, FIT_LATENTS = 16, 8  # how many pictures a fit takes, and their sides
FIT_CELLS = (2, 4, 8)  # into how many squares or blots of one colour a side is divided


class Previews:
    """The file of the picture so far. Called after each step, as `generate`'s `on_estimate`.

    path: written over with every preview, whole, and gone after `remove`. every: steps from one to the next.
    downscale: pixels to a latent.
    """

    def __init__(self, path: Path, every: int, colours: Colours, downscale: int):
        self.path = path
        self._is_written = False
        self._every = every
        self._colours = colours
        self._downscale = downscale
        self._latest: tuple[ResolvedRequest, mx.array] | None = None

    def __call__(self, request: ResolvedRequest, step: int, estimate: mx.array) -> None:
        """Show a picture's estimate (1, L, channels) after a step, counted from 0, if it is its turn."""
        self._latest = request, estimate
        if (step + 1) % self._every == 0:
            self.write()

    def write(self) -> bool:
        """Show the latest estimate; whether a picture's is there to be seen. A fault is only warned of."""
        if self._latest is not None:
            request, estimate = self._latest
            self._latest = None
            picture = draw(self._colours, estimate, request.latent_size, self._downscale)
            try:
                images.save(self.path, picture)
                self._is_written = True
            except FluxError as error:
                warnings.warn(f"no preview: {error}", stacklevel=2)
        return self._is_written

    def remove(self) -> None:
        """Take the file away: the pictures are there."""
        if self._is_written:
            self.path.unlink(missing_ok=True)


def path_beside(output: str | Path) -> Path:
    """The preview's file for an output: out.preview.png for out.png, and beside a folder that is one."""
    path = Path(output) if Path(output).name else Path(output).resolve()
    return path.with_name(f"{path.name if path.is_dir() else path.stem}.preview.png")


def draw(colours: Colours, tokens: mx.array, latent_size: tuple[int, int], downscale: int) -> np.ndarray:
    """A packed latent (1, L, channels) as a picture (H, W, 3), uint8, of its full size."""
    found = colours(sampler.unpack(tokens, latent_size)).astype(mx.float32)
    picture = images.to_uint8(images.denormalize(found))[0]
    height, width = (downscale * side for side in latent_size)
    if picture.shape[:2] == (height, width):
        return picture
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC))


# --- From latents to colours ---


def choose(ae: AutoEncoder, decoder: str | None = None) -> Colours:
    """What shows the latents of an autoencoder: a tiny decoder by its file or repository, or a linear map.

    FluxError for a decoder that cannot be had, or is for other latents.
    """
    if decoder is None:
        is_flux = ae.params == AutoEncoderParams()
        return linear(FLUX_FACTORS, FLUX_BIAS) if is_flux else linear(*fit(ae))
    network = tiny_decoder.load(decoder)
    takes, gives = (network.params.latent_channels, network.downscale), (ae.params.z_channels, ae.downscale)
    if takes != gives:
        raise FluxError(
            f"{decoder} is for latents of {takes[0]} channels and {takes[1]} pixels a side; the model's have "
            f"{gives[0]} and {gives[1]}"
        )
    return network


def linear(factors: Factors, bias: Factors) -> Colours:
    """The map that multiplies each latent's channels by factors (z, 3) and adds a bias (3,)."""
    matrix, offset = mx.array(np.array(factors, np.float32)), mx.array(np.array(bias, np.float32))
    return lambda z: z.astype(mx.float32) @ matrix + offset


def fit(ae: AutoEncoder) -> tuple[np.ndarray, np.ndarray]:
    """Factors (z, 3) and bias (3,) that fit pictures of squares and blots best, by least squares.

    Each latent's colour is the mean of its pixels. The pictures are always the same.
    """
    d = ae.downscale
    pixels = fit_pictures(FIT_LATENTS * d)  # (N, H, W, 3)
    latents = np.array(ae.encode(images.normalize(pixels)).astype(mx.float32))  # (N, h, w, z)
    n, h, w, z = latents.shape
    colours = np.array(images.normalize(pixels)).reshape(n, h, d, w, d, 3).mean(axis=(2, 4))
    columns = np.concatenate([latents.reshape(-1, z), np.ones((n * h * w, 1))], axis=1)
    solution = np.linalg.lstsq(columns, colours.reshape(-1, 3), rcond=None)[0].astype(np.float32)
    return solution[:-1], solution[-1]


def fit_pictures(side: int) -> np.ndarray:
    """Pictures (N, side, side, 3), uint8, of random colours with hard and soft edges."""
    random = np.random.default_rng(0)
    out = []
    for i in range(FIT_PICTURES):
        cells = FIT_CELLS[i % len(FIT_CELLS)]
        small = Image.fromarray(random.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        out.append(np.asarray(small.resize((side, side), Image.Resampling(3 * (i % 2)))))  # NEAREST, BICUBIC
    return np.stack(out)
