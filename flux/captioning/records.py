"""Captions on the disk: a train.jsonl, a captions.csv, or a .txt beside each picture.

Each write reads what is there, adds to it, and puts the whole in its place at once: a process that is killed
leaves the old file or the new one, and what was edited in the meantime, by hand, is kept.
"""

import csv
import io
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flux.captioning.files import Picture
from flux.errors import FluxError

LISTS = {"jsonl": "train.jsonl", "csv": "captions.csv"}
FORMATS = ("jsonl", "txt", "csv")
IMAGE, PROMPT = "image", "prompt"
# Line breaks to Python's str.splitlines, and to many readers, that JSON leaves as they are.
LINE_BREAKS = {ord(letter): f"\\u{ord(letter):04x}" for letter in "\x85\u2028\u2029"}

Row = dict[str, Any]


def place(picture: Picture, format: str) -> Path:
    """The file that a picture's caption is in."""
    return picture.path.with_suffix(".txt") if format == "txt" else picture.home / LISTS[format]


def check(pictures: Iterable[Picture], format: str) -> None:
    """Raise FluxError where `write` could not write, or two pictures would share one caption file."""
    owners: dict[Path, Picture] = {}
    for picture in pictures:
        path = place(picture, format)
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
    """The captions that are there already. Raises FluxError for a list that cannot be read."""
    found = {}
    for path, group in _by_place(pictures, format).items():
        if format == "txt":
            captions = dict.fromkeys(_names(group), _text(path))
        else:
            captions = {_normal(row[IMAGE]): row[PROMPT] for row in _rows(path)}
        found |= {
            picture: captions[name]
            for name, picture in _names(group).items()
            if captions.get(name) is not None
        }
    return found


def write(captions: Mapping[Picture, str], format: str, overwrite: bool) -> None:
    """Adds captions to what is there; those of pictures that have one take its place only to overwrite.

    Other rows, and other values in a row, stay as they are.
    """
    for path, group in _by_place(captions, format).items():
        if format == "txt":
            if overwrite or not path.exists():
                _replace(path, captions[group[0]] + "\n")
            continue
        new = {name: captions[picture] for name, picture in _names(group).items()}
        rows = _rows(path)
        known = {_normal(row[IMAGE]) for row in rows}
        for row in rows:
            if overwrite and _normal(row[IMAGE]) in new:
                row[PROMPT] = new[_normal(row[IMAGE])]
        rows += [{IMAGE: name, PROMPT: text} for name, text in new.items() if name not in known]
        _replace(path, _as_csv(rows) if format == "csv" else _as_lines(rows))


def _by_place(pictures: Iterable[Picture], format: str) -> dict[Path, list[Picture]]:
    groups = defaultdict(list)
    for picture in pictures:
        groups[place(picture, format)].append(picture)
    return groups


def _names(pictures: Iterable[Picture]) -> dict[str, Picture]:
    return {_normal(picture.name): picture for picture in pictures}


def _normal(name: str) -> str:
    """One spelling of a path for the many there are, such as ./a.jpg."""
    return Path(os.path.normpath(name)).as_posix()


# --- Files ---


def _text(path: Path) -> str | None:
    """A file's text; None where there is none."""
    try:
        return path.read_bytes().decode("utf-8-sig").strip()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise FluxError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise FluxError(f"{path}: the captions in it are not UTF-8 text") from None


def _replace(path: Path, text: str) -> None:
    """Writes beside the place, then renames into it: the file is never there in part."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        partial.write_bytes(text.encode())
        os.replace(partial, path)
    except OSError as error:
        raise FluxError(f"cannot write {path}: {error.strerror}") from None
    finally:
        partial.unlink(missing_ok=True)


def _rows(path: Path) -> list[Row]:
    """A list's rows; none where there is no file."""
    text = _text(path) or ""
    places, rows = _from_csv(path, text) if path.suffix == ".csv" else _from_lines(text)
    for where, row in zip(places, rows, strict=True):
        if not (isinstance(row, dict) and all(isinstance(row.get(key), str) for key in (IMAGE, PROMPT))):
            raise FluxError(
                f"{path}, line {where}: should have an {IMAGE} and a {PROMPT}, both texts: "
                "mend it, or move the file away"
            )
    return rows


def _from_lines(text: str) -> tuple[list[int], list[Any]]:
    lines = {number: line for number, line in enumerate(text.split("\n"), 1) if line.strip()}
    return list(lines), [_json(line) for line in lines.values()]


def _json(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _from_csv(path: Path, text: str) -> tuple[list[int], list[Row]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    places, rows = [], []
    try:
        for row in reader:
            if None in row:  # more values than the header has names
                row[PROMPT] = None
            places.append(reader.line_num)
            rows.append(row)
    except csv.Error as error:
        raise FluxError(f"{path}, line {reader.line_num}: no CSV: {error}") from None
    return places, rows


def _as_lines(rows: list[Row]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False).translate(LINE_BREAKS) + "\n" for row in rows)


def _as_csv(rows: list[Row]) -> str:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
