"""Pictures with captions, by number: folders, train.jsonl, data sets of Hugging Face. Reaches the Hub.

Every source is a sequence, so that a training can ask for any picture at any time, and for the same one again
after it was stopped.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from flux import images
from flux.errors import FluxError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
PICTURE_KEYS = ("image", "file_name")
CAPTION_KEYS = ("prompt", "text", "caption")


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


def over_white(picture: np.ndarray, alpha: np.ndarray | None) -> np.ndarray:
    """A picture (H, W, 3) with its alpha (H, W), if any, laid over white: what lies under it is arbitrary."""
    if alpha is None:
        return picture
    share = alpha[..., None].astype(np.float32) / 255
    return np.rint(share * picture + (1 - share) * 255).astype(np.uint8)


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
        return _listed(folder, _read_jsonl(folder / "train.jsonl"))
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise FluxError(f"{folder}: no pictures ({', '.join(SUFFIXES)})")
    without = [path.name for path in paths if not path.with_suffix(".txt").is_file()]
    if without:
        raise FluxError(
            f"{folder}: no caption for {_some(without)}: give captions_file, train.jsonl, or a .txt each"
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


def _read_jsonl(path: Path) -> list[tuple[str, str]]:
    rows = []
    for number, line in enumerate(_lines(path), 1):
        try:
            row = json.loads(line)
            name = next(row[key] for key in PICTURE_KEYS if key in row)
            rows.append((name, next(str(row[key]) for key in CAPTION_KEYS if key in row)))
        except (ValueError, TypeError, StopIteration):
            wanted = f"{' or '.join(PICTURE_KEYS)} and {' or '.join(CAPTION_KEYS)}"
            raise FluxError(f"{path}, line {number}: should be an object with {wanted}") from None
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
        raise FluxError(f"{folder}: no picture {_some(absent)}")
    return Files([folder / name for name, _ in rows], [caption for _, caption in rows])


def _some(names: list[str]) -> str:
    rest = len(names) - 3
    return ", ".join(names[:3]) + (f" and {rest} more" if rest > 0 else "")


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
    import datasets  # it takes seconds to import

    folder = Path(path).expanduser()
    try:
        if folder.is_dir() and any((folder / n).is_file() for n in ("state.json", "dataset_dict.json")):
            table = datasets.load_from_disk(str(folder))
            table = table[split] if isinstance(table, Mapping) else table
        else:
            table = datasets.load_dataset(path, name, split=split)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FluxError(f"the data set {path}, split {split!r}, cannot be had: {reason}") from None
    for key in (image_key, caption_key):
        if key not in table.column_names:
            columns = ", ".join(table.column_names)
            raise FluxError(f"the data set {path} has no column {key!r}; it has {columns}")
    return Rows(table, image_key, caption_key)
