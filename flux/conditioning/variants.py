"""Models that are given pictures in every step, Fill, Canny, Depth and Kontext: which, and of what sizes."""

import math
import warnings
from collections.abc import Sequence

import mlx.core as mx

from flux import sampler
from flux.conditioning import edges
from flux.conditioning.canvas import Size
from flux.conditioning.edit import Edit
from flux.conditioning.pictures import Picture
from flux.errors import FluxError
from flux.weights.registry import CONTROL, FILL, REFERENCE, ModelSpec

# (height, width) of the pictures that Kontext was trained with, as BFL's code and diffusers have them.
KONTEXT_SIZES: tuple[Size, ...] = (
    *((1568, 672), (1504, 688), (1456, 720), (1392, 752), (1328, 800), (1248, 832), (1184, 880)),
    *((1104, 944), (1024, 1024), (944, 1104)),
    *((880, 1184), (832, 1248), (800, 1328), (752, 1392), (720, 1456), (688, 1504), (672, 1568)),
)


def check(
    spec: ModelSpec,
    edit: Edit | None,
    references: Sequence[Picture],
    control: Picture | None,
    of_photo: bool,
) -> None:
    """FluxError for a picture that the model needs and is not given, or is given and does not take.

    of_photo: the control picture is one, whose edges are meant. Warns where Kontext is given no reference: it
    then makes pictures of texts alone.
    """
    if of_photo:
        edges.opencv()
    if references and spec.input != REFERENCE:
        raise FluxError(f"{spec.name} takes no reference: --reference needs Kontext (--model kontext)")
    if control is not None and spec.input != CONTROL:
        raise FluxError(
            f"{spec.name} takes no control picture: --control needs --model canny or depth, one of their "
            "LoRAs as --adapter, or a --controlnet"
        )
    if spec.input == CONTROL and control is None:
        raise FluxError(
            f"{spec.name} follows a control picture, such as one of edges or of depth: --control PICTURE"
        )
    if spec.input == FILL and (edit is None or (edit.mask is None and edit.expand is None)):
        raise FluxError(
            f"{spec.name} fills a part of a picture: --image PICTURE, and --mask PICTURE or --expand T,R,B,L"
        )
    if spec.input == REFERENCE and not references and edit is None:
        warnings.warn(
            f"{spec.name} changes pictures, and none is given to it (--reference PICTURE): it makes pictures "
            "from the text alone",
            stacklevel=2,
        )


# --- Sizes ---


def default_size(references: Sequence[Picture], control: Picture | None, best: Size) -> Size:
    """The size (height, width) to make where none is given; best: the model's.

    The first reference's, as Kontext is given it, or the control picture's.
    """
    if references:
        return reference_size(references[0])
    return best if control is None else bounded(control.size, best)


def bounded(size: Size, best: Size, step: int = 16) -> Size:
    """A size in multiples of `step`, and with the same aspect of no more pixels than the best one."""
    factor = min(1.0, math.sqrt(math.prod(best) / math.prod(size)))
    height, width = (max(1, int(factor * side / step + 0.5)) * step for side in size)
    return height, width


def reference_size(picture: Picture) -> Size:
    """The size (height, width) at which Kontext is given a reference: the one of the nearest aspect."""
    height, width = picture.size
    return min(KONTEXT_SIZES, key=lambda size: (abs(width / height - size[1] / size[0]), size[1]))


def reference_positions(latent_sizes: Sequence[Size]) -> mx.array:
    """Positions (1, Lr, 3) of references' tokens, int32: index 1, beside or below those before.

    As ComfyUI lays several ("offset"): each goes where the whole stays the less long. One alone is at (0, 0),
    as in BFL's code and diffusers, which take one.
    """
    height = width = 0  # of what is laid so far, in tokens
    positions = []
    for size in latent_sizes:
        rows, columns = size[0] // 2, size[1] // 2
        top, left = (0, width) if height + rows > width + columns else (height, 0)
        positions.append(sampler.image_positions(size, index=1) + mx.array([0, top, left]))
        height, width = max(height, top + rows), max(width, left + columns)
    return mx.concatenate(positions, axis=1)


def count_tokens(references: Sequence[Picture], cell: int) -> int:
    """How many tokens references add."""
    return sum(math.prod(reference_size(picture)) // (2 * cell) ** 2 for picture in references)
