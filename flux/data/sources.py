"""Pictures with captions, by number, for a training from scratch: folders, train.jsonl, data sets of the Hub.

Every source is a sequence, so that a training can ask for any picture at any time, and for the same one again
after it was stopped.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from flux import images
from flux.data.datasets import SUFFIXES, load_table, read_list, some
from flux.data.pictures import over_white
from flux.errors import FluxError


class Pictures(Protocol):
    """A sequence of pictures with captions."""

    @property
    def captions(self) -> Sequence[str]:
        """All captions, in order."""

    def picture(self, index: int) -> np.ndarray:
        """The picture (H, W, 3), uint8, in its own size."""


@dataclass(frozen=True)
class Files:
    """Pictures in files of their own."""

    paths: list[Path]
    captions: list[str]

    def picture(self, index: int) -> np.ndarray:
        return over_white(*images.load(self.paths[index]))


def open_folder(folder: str | Path, captions_file: str | Path | None = None) -> Files:
    """A folder's pictures, with the captions of the first that is there:

    `captions_file`, lines of `name<TAB>caption` (relative to the folder, or a path of its own);
    `train.jsonl`, lines of {"image": name, "prompt": caption}; a text file beside each picture, `name.txt`.
    FluxError names the file and line, or the pictures, that are wrong.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FluxError(f"no folder {folder}")
    if captions_file is not None:
        given = Path(captions_file).expanduser()
        return _listed(folder, _read_tsv(given if given.is_file() else folder / given))
    if (folder / "train.jsonl").is_file():
        rows = read_list(folder / "train.jsonl")
        return _listed(folder, [(str(row.picture.absolute()), row.caption) for row in rows])
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise FluxError(f"{folder}: no pictures ({', '.join(SUFFIXES)})")
    without = [path.name for path in paths if not path.with_suffix(".txt").is_file()]
    if without:
        raise FluxError(
            f"{folder}: no caption for {some(without)}: give captions_file, train.jsonl, or a .txt each"
        )
    texts = [path.with_suffix(".txt").read_text(encoding="utf-8").strip() for path in paths]
    return Files(paths, texts)


def _read_tsv(path: Path) -> list[tuple[str, str]]:
    rows = []
    for number, line in enumerate(_lines(path), 1):
        name, tab, caption = line.partition("\t")
        if not tab:
            raise FluxError(f"{path}, line {number}: should be name<TAB>caption")
        rows.append((name, caption.strip()))
    return rows


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise FluxError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _listed(folder: Path, rows: list[tuple[str, str]]) -> Files:
    if not rows:
        raise FluxError(f"{folder}: its list of captions is empty")
    absent = [name for name, _ in rows if not (folder / name).is_file()]
    if absent:
        raise FluxError(f"{folder}: no picture {some(absent)}")
    return Files([folder / name for name, _ in rows], [caption for _, caption in rows])


@dataclass(frozen=True)
class Rows:
    """Rows of a table of the `datasets` package."""

    table: Any
    image_key: str
    caption_key: str

    @property
    def captions(self) -> Sequence[str]:
        return [str(caption) for caption in self.table[self.caption_key]]

    def picture(self, index: int) -> np.ndarray:
        image = self.table[index][self.image_key]
        if not isinstance(image, Image.Image):
            raise FluxError(f"the column {self.image_key!r} holds {type(image).__name__}, not pictures")
        if not image.has_transparency_data:
            return np.array(image.convert("RGB"))
        rgba = np.array(image.convert("RGBA"))
        return over_white(rgba[..., :3], rgba[..., 3])


def open_hugging_face(path: str, name: str | None, split: str, image_key: str, caption_key: str) -> Rows:
    """A data set of the Hub, downloaded first; or a folder that `Dataset.save_to_disk` wrote.

    FluxError for one that cannot be had, or lacks a split or a column.
    """
    table = load_table(path, name, split)
    for key in (image_key, caption_key):
        if key not in table.column_names:
            columns = ", ".join(table.column_names)
            raise FluxError(f"the data set {path} has no column {key!r}; it has {columns}")
    return Rows(table, image_key, caption_key)
