"""Pictures with captions, by number, for a training from scratch: folders, lists, data sets of the Hub.

Every source is a sequence, so that a training can ask for any picture at any time, and for the same one again
after it was stopped. Files are read by the same rules as for fine-tuning (folders.py).
"""

import importlib
import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from flux import images
from flux.data import datasets, pictures, samples
from flux.data.buckets import Size
from flux.data.files import some
from flux.data.folders import Rules
from flux.data.lists import captions_of
from flux.errors import FluxError

THREADS = 8  # that decode
AT_ONCE = 256


class Pictures(Protocol):
    """A sequence of pictures with captions."""

    @property
    def captions(self) -> Sequence[str]:
        """All captions, also the several of a picture: what a vocabulary is made of."""

    def __len__(self) -> int:
        """How many pictures there are."""

    def texts(self, index: int) -> Sequence[str]:
        """The captions of a picture: none, one or several."""

    def picture(self, index: int) -> np.ndarray:
        """The picture (H, W, 3), uint8, in its size."""


def unreadable(source: Pictures, rows: Sequence[int] | None = None, quiet: bool = True) -> list[str]:
    """Decodes all pictures, or those of some rows; what is wrong with those that cannot be read.

    A bar shows how far it is, after a second.
    """

    def fault(index: int) -> str | None:
        try:
            source.picture(index)
        except FluxError as error:
            return str(error)
        return None

    rows = range(len(source)) if rows is None else rows
    bar = tqdm(total=len(rows), desc="checking pictures", unit="", delay=1, disable=quiet or None)
    found: list[str] = []
    with bar, ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(rows), AT_ONCE):  # pool.map begins with all that it is given
            part = rows[start : start + AT_ONCE]
            found += [each for each in pool.map(fault, part) if each]
            bar.update(len(part))
    return found


@dataclass(frozen=True)
class Files:
    """Pictures in a file each."""

    paths: list[Path | bytes]
    names: list[str]
    of_each: list[tuple[str, ...]]  # the captions of each picture

    @cached_property
    def captions(self) -> list[str]:
        """All captions, also the several of a picture."""
        return [caption for texts in self.of_each for caption in texts]

    def __len__(self) -> int:
        return len(self.paths)

    def texts(self, index: int) -> tuple[str, ...]:
        """The captions of a picture: none, one or several."""
        return self.of_each[index]

    def picture(self, index: int) -> np.ndarray:
        """The picture (H, W, 3), uint8, over white. FluxError where it cannot be read."""
        found = self.paths[index]
        file = pictures.NamedBytes(found, self.names[index]) if isinstance(found, bytes) else found
        return images.over_white(*images.load(file))


def open_folder(
    folder: str | Path,
    captions_file: str | Path | None = None,
    caption_column: str | None = None,
    uncaptioned: bool = False,
) -> Files:
    """The pictures of a folder or a list, as `samples.read_source` finds them.

    Where a folder is named as kohya does, its class is the caption of those that have none. captions_file:
    a list, such as lines of `name<TAB>caption` (relative to the folder, or absolute). uncaptioned:
    pictures without a caption are meant. FluxError names the files, lines and pictures that are
    wrong, all of them; what is left out is a warning.
    """
    given = None if captions_file is None else str(captions_file)
    reading = samples.read_source(str(folder), Rules(caption_column=caption_column), given)
    rows, captions = [], []
    for part in reading.parts:
        words = part.options.get("class_tokens")
        for row in part.rows:
            rows.append(row)
            captions.append(row.captions or ((words,) if words else ()))
    errors = list(reading.errors)
    without = [row.name for row, texts in zip(rows, captions, strict=True) if not texts]
    if without and not uncaptioned:
        errors.append(
            f"no caption for {some(without)}: give captions_file, train.jsonl, or a .txt each "
            "(or uncaptioned: true, if that is meant)"
        )
    absent = [row.name for row in rows if isinstance(row.picture, Path) and not os.path.isfile(row.picture)]
    if absent:
        errors.append(f"no picture {some(absent)}")
    if errors:
        raise FluxError("; ".join(errors))
    masks = [row.mask for row in rows if row.mask]
    notes = [f"masks are not used in a training from scratch: {some(masks)}"] if masks else []
    if any(part.options.get("num_repeats", 1) > 1 for part in reading.parts):
        notes.append(
            "a training from scratch has every picture once an epoch, whatever its folder's name says"
        )
    for note in [*reading.notes, *notes]:
        warnings.warn(f"{folder}: {note}", stacklevel=2)
    return Files([row.picture for row in rows], [row.name for row in rows], captions)


@dataclass(frozen=True)
class Rows:
    """Rows of a table of the `datasets` package, whose pictures are read when they are asked for."""

    path: str
    table: Any
    image_key: str
    caption_key: str

    @cached_property
    def _captions(self) -> list[tuple[str, ...]]:
        key = self.caption_key
        return [captions_of({key: value}, key) for value in self.table[key]]

    @property
    def captions(self) -> list[str]:
        """All captions, also the several of a picture."""
        return [caption for texts in self._captions for caption in texts]

    def __len__(self) -> int:
        return len(self.table)

    def texts(self, index: int) -> tuple[str, ...]:
        """The captions of a picture: none, one or several."""
        return self._captions[index]

    def picture(self, index: int) -> np.ndarray:
        """The picture (H, W, 3), uint8, over white. FluxError where it cannot be read."""
        value = self.table[index][self.image_key] or {}
        name = f"{self.path}[{index}]"
        content = value.get("bytes")
        file = pictures.NamedBytes(content, name) if content else Path(value.get("path") or name)
        return images.over_white(*images.load(file))


def open_drawn(source: str) -> Pictures:
    """What a function draws, "package.module:function". FluxError where there is no such function."""
    module, _, name = source.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, ValueError, AttributeError) as error:
        raise FluxError(f'{source!r} must be "package.module:function" of a module here: {error}') from None
    return function()


def sizes(source: Pictures) -> Sequence[Size]:
    """(height, width) of each picture, which is decoded for it where the source does not know."""
    known = getattr(source, "sizes", None)
    if known is not None:
        return known
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(lambda index: source.picture(index).shape[:2], range(len(source))))


def open_hugging_face(path: str, name: str | None, split: str, image_key: str, caption_key: str) -> Rows:
    """A data set of the Hub, downloaded first; or a folder that `Dataset.save_to_disk` wrote.

    FluxError for one that cannot be loaded, or lacks a split or a column.
    """
    table = datasets.load_table(path, name, split)
    for key in (image_key, caption_key):
        if key not in table.column_names:
            columns = ", ".join(table.column_names)
            raise FluxError(f"the data set {path} has no column {key!r}; it has {columns}")
    table, _ = datasets.with_bytes(table, path, image_key)
    return Rows(path, table, image_key, caption_key)
