"""Captions on the disk: a train.jsonl, a captions.csv, or a .txt beside each picture.

Each write reads what is there, adds to it, and replaces it by the whole at once: a process that is killed
leaves the old file or the new one, and what was edited in the meantime, by hand, is kept. Rows are read by
the rules of flux.data, under any of its keys; new rows have `image` and `prompt`.
"""

import csv
import io
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flux import outputs
from flux.captioning.files import Picture
from flux.data import files, folders, lists
from flux.data.files import nfc
from flux.errors import FluxError

LISTS = {"jsonl": "train.jsonl", "csv": "captions.csv"}
FORMATS = ("jsonl", "txt", "csv")
IMAGE, PROMPT = "image", "prompt"
# Line breaks to Python's str.splitlines, and to many readers, that JSON leaves as they are.
LINE_BREAKS = {ord(letter): f"\\u{ord(letter):04x}" for letter in "\x85\u2028\u2029"}

Row = dict[str, Any]


def caption_file(picture: Picture, format: str) -> Path:
    """The file that a picture's caption is in."""
    return picture.path.with_suffix(".txt") if format == "txt" else picture.folder / LISTS[format]


def check(pictures: Iterable[Picture], format: str) -> None:
    """Raise FluxError where `write` could not write, or two pictures would share one caption file."""
    owners: dict[Path, Picture] = {}
    for picture in pictures:
        path = caption_file(picture, format)
        if format == "txt" and path in owners:
            raise FluxError(
                f"{owners[path].path} and {picture.path} would share {path.name}: "
                "rename one, or choose --format jsonl or csv"
            )
        owners[path] = picture
    for folder in {path.parent for path in owners}:
        if not os.access(folder, os.W_OK | os.X_OK):
            raise FluxError(f"cannot write captions into the folder {folder}")


def read(pictures: Iterable[Picture], format: str) -> dict[Picture, str]:
    """The captions that are there already in this form. Raises FluxError for a list that cannot be read."""
    found: dict[Picture, str] = {}
    for path, group in _by_place(pictures, format).items():
        captions: dict[str, str | None]
        if format == "txt":
            captions = dict.fromkeys(_names(group), _text(path))
        else:
            captions = {_normal(_image(row)): _caption(row) for row in _rows(path)}
        found |= {picture: text for name, picture in _names(group).items() if (text := captions.get(name))}
    return found


def read_elsewhere(pictures: Iterable[Picture]) -> dict[Picture, str]:
    """The captions in whatever form the trainer would read them: other lists, other caption files."""
    pictures = list(pictures)
    found: dict[Path, str] = {}
    for folder in dict.fromkeys(picture.folder for picture in pictures):
        try:
            rows = folders.read(folder, folders.Rules()).rows
        except FluxError:  # only pictures that cannot be read
            continue
        found |= {row.picture.resolve(): row.captions[0] for row in rows
                  if row.captions and isinstance(row.picture, Path)}  # fmt: skip
    known = ((picture, found.get(picture.path.resolve())) for picture in pictures)
    return {picture: text for picture, text in known if text}


def goes_before(pictures: Iterable[Picture], format: str) -> list[Path]:
    """The lists that the trainer reads instead of what `write` writes in this form."""
    order = lists.LISTS if format == "txt" else lists.LISTS[: lists.LISTS.index(LISTS[format])]
    bases = dict.fromkeys(picture.folder for picture in pictures)
    firsts = ([folder / name for name in order if (folder / name).is_file()] for folder in bases)
    return [found[0] for found in firsts if found]


def write(captions: Mapping[Picture, str], format: str, overwrite: bool) -> None:
    """Adds captions to what is there; those of pictures that have one replace it only to overwrite.

    Other rows, and other values in a row, stay as they are.
    """
    for path, group in _by_place(captions, format).items():
        if format == "txt":
            if overwrite or not _text(path):
                _replace(path, captions[group[0]] + "\n")
            continue
        new = {name: captions[picture] for name, picture in _names(group).items()}
        rows = _rows(path)
        known = {_normal(_image(row)) for row in rows}
        for row in rows:
            name = _normal(_image(row))
            if name in new and (overwrite or not _caption(row)):
                row[_caption_key(row)] = new[name]
        rows += [{IMAGE: name, PROMPT: text} for name, text in new.items() if name not in known]
        _replace(path, _as_csv(rows) if format == "csv" else _as_lines(rows))


def _by_place(pictures: Iterable[Picture], format: str) -> dict[Path, list[Picture]]:
    groups = defaultdict(list)
    for picture in pictures:
        groups[caption_file(picture, format)].append(picture)
    return groups


def _names(pictures: Iterable[Picture]) -> dict[str, Picture]:
    return {_normal(picture.name): picture for picture in pictures}


def _normal(name: str) -> str:
    """One spelling of a path for the many there are, such as ./a.jpg."""
    return nfc(Path(os.path.normpath(name.replace("\\", "/"))).as_posix())


# --- Rows ---


def _image(row: Row) -> str:
    return next((row[key] for key in lists.IMAGE_KEYS if row.get(key)), "")


def _caption(row: Row) -> str | None:
    """The first of a row's captions."""
    return next(iter(lists.captions_of(row)), None)


def _caption_key(row: Row) -> str:
    """The key that the row's caption is under, or would be."""
    filled = (key for key in lists.CAPTION_KEYS if row.get(key))
    return next(filled, next((key for key in lists.CAPTION_KEYS if key in row), PROMPT))


def _rows(path: Path) -> list[Row]:
    """A list's rows; none where there is no file. FluxError for the lines that are wrong."""
    if not path.exists():
        return []
    objects = lists.read_objects(path)
    faults = [where for where, row in objects if not _is_row(row)]
    if faults:
        raise FluxError(
            f"{path}, {files.some(faults)}: should have an {IMAGE} and a {PROMPT}, both texts: "
            "mend it, or move the file away"
        )
    return [dict(row) for _, row in objects]


def _is_row(row: Any) -> bool:
    if not isinstance(row, Mapping) or not isinstance(name := _image(dict(row)), str):
        return False
    try:
        lists.captions_of(row)
    except FluxError:
        return False
    return bool(name)


# --- Files ---


def _text(path: Path) -> str | None:
    """A file's text; None where there is none."""
    return files.read_text(path).strip() if path.exists() else None


def _replace(path: Path, text: str) -> None:
    """Writes beside the file, then renames: the file is never there in part."""
    try:
        with outputs.replacing(path) as partial:
            partial.write_bytes(text.encode())
    except OSError as error:
        raise FluxError(f"cannot write {path}: {error.strerror}") from None


def _as_lines(rows: list[Row]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False).translate(LINE_BREAKS) + "\n" for row in rows)


def _as_csv(rows: list[Row]) -> str:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
