"""Pictures with their captions, as their authors left them: lists, folders, the Hub. Reaches the network.

What is done with them (repeats, flips, sizes, ...) is no affair of this file: see samples.py.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flux.errors import FluxError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
OTHER_PICTURES = (".heic", ".heif", ".avif", ".jxl", ".psd", ".svg", ".dng", ".raw")  # named, never read
LISTS = ("train.jsonl", "index.json")
IMAGE_KEYS = ("image", "file_name")
CAPTION_KEYS = ("prompt", "text", "caption")  # train.jsonl says prompt, the older index.json says text
CAPTION_EXTENSIONS = (".caption", ".txt")


@dataclass(frozen=True)
class Row:
    """A picture and its caption; None where there is none."""

    name: str  # what messages call the picture
    picture: Path | bytes  # its file, or a file's content
    caption: str | None


def read_list(path: Path) -> list[Row]:
    """The rows of a train.jsonl, an object a line, or of an index.json of {"data": [object, ...]}.

    An object has `image`, a file relative to the list's folder, and `prompt` or `text`. The files may be
    absent. FluxError names each line or entry that is wrong.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        objects = _lines(path, text) if path.suffix == ".jsonl" else _index(path, text)
    except OSError as error:
        raise FluxError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise FluxError(f"{path}: is not UTF-8: {error}") from None
    rows, faults = [], []
    for place, entry in objects:
        image, caption = _value(entry, IMAGE_KEYS), _value(entry, CAPTION_KEYS)
        if image is None or caption is None:
            faults.append(place)
        else:
            rows.append(Row(str(path.parent / image), path.parent / image, caption))
    if faults:
        raise FluxError(
            f"{path}, {some(faults)}: should be an object with {' or '.join(IMAGE_KEYS)} and "
            f"{' or '.join(CAPTION_KEYS)}, both texts"
        )
    if not rows:
        raise FluxError(f"{path}: lists no pictures")
    return rows


def _lines(path: Path, text: str) -> list[tuple[str, Any]]:
    """JSON objects with their places; what is no JSON comes as None."""
    lines = [(f"line {i}", line) for i, line in enumerate(text.splitlines(), 1) if line.strip()]
    return [(place, _json(line)) for place, line in lines]


def _index(path: Path, text: str) -> list[tuple[str, Any]]:
    document = _json(text)
    entries = document.get("data") if isinstance(document, dict) else None
    if not isinstance(entries, list):
        raise FluxError(f'{path}: should be {{"data": [{{"image": "file", "text": "caption"}}, ...]}}')
    return [(f"entry {i}", entry) for i, entry in enumerate(entries, 1)]


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _value(entry: Any, keys: Iterable[str]) -> str | None:
    if not isinstance(entry, dict):
        return None
    found = [entry[key] for key in keys if key in entry]
    return found[0] if found and isinstance(found[0], str) else None


def read_folder(folder: Path, caption_extension: str | None = None) -> list[Row]:
    """The pictures of a folder, by name, each with the caption file that bears its name.

    caption_extension: None looks for .caption, then .txt. FluxError for a folder without pictures and for
    caption files that are no UTF-8.
    """
    paths = [path for path in _visible(folder) if path.suffix.lower() in SUFFIXES]
    if not paths:
        raise FluxError(f"{folder}: no pictures in it ({', '.join(SUFFIXES)})")
    extensions = (_dotted(caption_extension),) if caption_extension else CAPTION_EXTENSIONS
    return [Row(str(path), path, _caption(path, extensions)) for path in paths]


def unread_pictures(folder: Path) -> list[Path]:
    """Pictures of the folder in formats that this program does not read."""
    return [path for path in _visible(folder) if path.suffix.lower() in OTHER_PICTURES]


def stray_captions(folder: Path, rows: Iterable[Row], caption_extension: str | None = None) -> list[Path]:
    """Caption files of the folder that belong to no picture."""
    extensions = (_dotted(caption_extension),) if caption_extension else CAPTION_EXTENSIONS
    pictures = {row.picture.with_suffix("") for row in rows if isinstance(row.picture, Path)}
    return [
        path
        for path in _visible(folder)
        if path.suffix in extensions and path.with_suffix("") not in pictures
    ]


def _visible(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_file() and path.name[0] != ".")
    except OSError as error:
        raise FluxError(f"{folder}: the folder cannot be read: {error.strerror}") from None


def _dotted(extension: str) -> str:
    return extension if extension.startswith(".") else f".{extension}"


def _caption(picture: Path, extensions: Iterable[str]) -> str | None:
    for path in map(picture.with_suffix, extensions):
        if path.is_file():
            try:
                return path.read_text(encoding="utf-8-sig").strip()
            except (OSError, UnicodeDecodeError) as error:
                raise FluxError(f"the caption {path} cannot be read as UTF-8: {error}") from None
    return None


def is_saved_table(folder: Path) -> bool:
    """Whether `Dataset.save_to_disk` wrote this folder."""
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def load_table(path: str, name: str | None, split: str) -> Any:
    """A table of the `datasets` package: of the Hub, downloaded, or a folder of `Dataset.save_to_disk`.

    FluxError, with the reason, for one that cannot be had.
    """
    import datasets  # it takes seconds to import

    folder = Path(path).expanduser()
    try:
        if is_saved_table(folder):
            table = datasets.load_from_disk(str(folder))
            return table[split] if isinstance(table, Mapping) else table
        return datasets.load_dataset(path, name, split=split)
    except (OSError, ValueError, KeyError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FluxError(f"the data set {path}, split {split!r}, cannot be had: {reason}") from None


def read_hugging_face(repo: str, split: str = "train") -> list[Row]:
    """The rows of a table, as `load_table` finds it, with the columns image and prompt.

    All encoded pictures come into memory. FluxError, with advice, for one that cannot be had or has other
    columns.
    """
    import datasets  # it takes seconds to import

    table = load_table(repo, None, split)
    columns = table.features
    image = next((key for key in IMAGE_KEYS if isinstance(columns.get(key), datasets.Image)), None)
    caption = next((key for key in CAPTION_KEYS if key in columns), None)
    if image is None:
        raise FluxError(f"{repo}: no column `image` that holds pictures; it has {', '.join(columns)}")
    table = table.cast_column(image, datasets.Image(decode=False))  # the bytes as they were uploaded
    return [_row(f"{repo}[{i}]", row, image, caption) for i, row in enumerate(table)]


def _row(name: str, row: Mapping[str, Any], image: str, caption: str | None) -> Row:
    value = row[image] or {}
    picture = value.get("bytes") or (Path(value["path"]) if value.get("path") else b"")
    text = row[caption] if caption else None
    return Row(name, picture, text if isinstance(text, str) else None)


def some(names: Iterable[object], shown: int = 5) -> str:
    """The first names, and how many more there are."""
    names = [str(name) for name in names]
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
