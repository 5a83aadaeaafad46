"""A contact sheet: pictures with their captions in one file, to check them by eye."""

import base64
import html
import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from flux import images, outputs, sheets
from flux.captioning.files import Picture
from flux.captioning.pictures import load
from flux.errors import FluxError

SUFFIXES = (".html", ".png")
THUMBNAIL = 256  # pixels, the longer side
COLUMNS = 4  # of the PNG
MOST = 400  # pictures in a PNG; a page of HTML has no such limit

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Captions</title><style>
body {{ font: 14px/1.4 sans-serif; margin: 16px; background: #f4f4f4; color: #222 }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax({size}px, 1fr)); gap: 16px }}
figure {{ margin: 0; padding: 8px; background: #fff }}
img {{ display: block; max-width: 100%; margin: 0 auto 8px }}
small {{ color: #777; overflow-wrap: anywhere }}
</style></head><body><p>{count} pictures</p><main>
{figures}
</main></body></html>
"""
FIGURE = (
    '<figure><img src="data:image/jpeg;base64,{data}" alt="{caption}">'
    "<figcaption>{caption}<br><small>{name}</small></figcaption></figure>"
)


def check(path: Path, count: int) -> None:
    """Raise FluxError where a sheet of so many pictures could not be written there."""
    if path.suffix.lower() not in SUFFIXES:
        raise FluxError(f"the contact sheet {path} should end in {' or '.join(SUFFIXES)}")
    if path.suffix.lower() == ".png" and count > MOST:
        raise FluxError(f"a contact sheet of {count} pictures is too much for one PNG ({MOST}): use .html")
    images.check_output(path.with_suffix(".png"))  # the folder is there and can be written to
    if path.is_dir():
        raise FluxError(f"the contact sheet {path} is a folder")


def save(path: Path, captions: Mapping[Picture, str]) -> None:
    """Writes the sheet, atomically, as HTML or PNG by its suffix; pictures that cannot be read are left out.

    Raises FluxError where it cannot be written.
    """
    entries = [(picture, text, small) for picture, text in captions.items() if (small := thumbnail(picture))]
    if path.suffix.lower() == ".png":
        images.save(path, _drawn(entries))
        return
    try:
        with outputs.replacing(path) as partial:
            partial.write_text(_page(entries), encoding="utf-8", errors="replace")
    except OSError as error:
        raise FluxError(f"cannot write {path}: {error.strerror}") from None


def thumbnail(picture: Picture) -> Image.Image | None:
    """The picture, shrunk; None where it cannot be read."""
    try:
        image = load(picture.path)
    except FluxError:
        return None
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return image


def _page(entries: list[tuple[Picture, str, Image.Image]]) -> str:
    figures = []
    for picture, text, small in entries:
        file = io.BytesIO()
        small.save(file, format="JPEG", quality=85)
        data = base64.b64encode(file.getvalue()).decode()
        name = html.escape(str(picture.path))
        figures.append(FIGURE.format(data=data, caption=html.escape(text), name=name))
    return PAGE.format(size=THUMBNAIL, count=len(entries), figures="\n".join(figures))


def _drawn(entries: list[tuple[Picture, str, Image.Image]]) -> np.ndarray:
    """(H, W, 3), uint8: the pictures in rows of COLUMNS, their names and captions below them."""
    rows: list[sheets.Row] = []
    for start in range(0, len(entries), COLUMNS):
        part = entries[start : start + COLUMNS]
        rows.append([small for _, _, small in part])
        rows.append([f"[{picture.name}]\n{text}" for picture, text, _ in part])
    return sheets.table(rows, THUMBNAIL)
