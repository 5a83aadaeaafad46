"""A file's picture, as the captioner and its tasks take it."""

from pathlib import Path

from PIL import Image

from flux import images


def load(path: str | Path) -> Image.Image:
    """A file's picture, RGB, upright, transparency laid over white: the colours below it are arbitrary.

    Raises FluxError for a file that is absent or no picture.
    """
    return Image.fromarray(images.over_white(*images.load(path)))
