"""Lists of pictures with captions: JSON Lines, JSON, CSV and parquet, under the names that people use."""

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flux import jsonfiles
from flux.data import files
from flux.data.files import Disk, some
from flux.errors import FluxError

# In a folder, the first of these that is there: this project's, Hugging Face's imagefolder, and others.
LISTS = (
    *("train.jsonl", "index.json", "metadata.jsonl", "metadata.csv", "metadata.parquet", "metadata.json"),
    *("captions.jsonl", "captions.csv", "captions.tsv", "captions.json"),
)
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
IMAGE_KEYS = ("image", "file_name", "image_path", "filename", "file", "path", "img")
CAPTION_KEYS = ("prompt", "text", "caption", "captions", "prompts", "description", "tags")
DELIMITERS = (",", "\t", ";")
MAX_VALUES = 20 * jsonfiles.MAX_VALUES  # of a list in one JSON text
PARQUET_GROWTH, PARQUET_LEAST = 32, 2**26  # the bytes in memory to one of the file, and of any file
ROW_BYTES = 300  # of Python's objects for a row
TOO_MANY = "has more values than there are columns: put quotes around a text with commas"
NO_OBJECT = "should be one object, with a picture's file and its caption"


@dataclass(frozen=True)
class Unread:
    """A line that cannot be read, and why."""

    reason: str


@dataclass(frozen=True)
class Row:
    """A picture with its captions: none, one, or several of which one is drawn each epoch."""

    name: str  # what messages call the picture
    picture: Path | bytes  # its file, or a file's content
    captions: tuple[str, ...] = ()
    mask: Path | None = None


def read(path: Path, folder: Path, disk: Disk, column: str | None, errors: list[str]) -> list[Row]:
    """The rows of a list whose pictures lie in `folder`; the files may be absent.

    column: that holds the captions, instead of CAPTION_KEYS. What is wrong comes into `errors`, each
    kind with all its lines.
    """
    try:
        objects = read_objects(path)
    except FluxError as error:
        errors.append(str(error))
        return []
    rows, faults = [], []
    for where, entry in objects:
        try:
            rows.append(_row(f"{path}, {where}", entry, folder, disk, column))
        except ValueError as error:  # a FluxError is one
            faults.append((where, str(error)))
    for reason in dict.fromkeys(reason for _, reason in faults):
        errors.append(f"{path}, {some(where for where, why in faults if why == reason)}: {reason}")
    if not objects:
        errors.append(f"{path}: lists no pictures")
    errors += _columns(path, [entry for _, entry in objects], rows, column)
    return rows


def _row(where: str, entry: Any, folder: Path, disk: Disk, column: str | None) -> Row:
    if not isinstance(entry, Mapping):
        raise FluxError(entry.reason if isinstance(entry, Unread) else NO_OBJECT)
    image = next((entry[key] for key in IMAGE_KEYS if entry.get(key)), None)
    captions = captions_of(entry, column)
    if isinstance(image, Mapping):  # a parquet file with the pictures in it
        if image.get("bytes"):
            return Row(where, image["bytes"], captions)
        image = image.get("path")
    if not isinstance(image, str):
        raise FluxError(f"names no picture: should have one of {', '.join(IMAGE_KEYS)}, a text")
    path = disk.resolve(image, folder)
    return Row(str(path), path, captions)


def captions_of(entry: Mapping[str, Any], column: str | None = None) -> tuple[str, ...]:
    """The captions of an object: those of the first key that has any. FluxError for what is not a text."""
    for key in (column,) if column else CAPTION_KEYS:
        value = entry.get(key)
        if value is None:
            continue
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise FluxError(f"{key} should be a text or a list of texts")
        texts = [", ".join(texts)] if key == "tags" else texts
        if found := tuple(text.strip() for text in texts if text.strip()):
            return found
    return ()


def _columns(path: Path, entries: list[Any], rows: list[Row], column: str | None) -> list[str]:
    """What to say where no row has a caption and the reason is its name."""
    if not rows or any(row.captions for row in rows):
        return []
    keys = dict.fromkeys(key for entry in entries if isinstance(entry, Mapping) for key in entry)
    known = (column,) if column else CAPTION_KEYS
    others = [key for key in keys if key not in (*IMAGE_KEYS, *CAPTION_KEYS)]
    if any(key in keys for key in known) or not (others or column):
        return []
    wanted = f"the column {column!r}" if column else f"one of {', '.join(CAPTION_KEYS)}"
    return [f"{path}: no captions: it has {', '.join(keys)}, not {wanted}; --caption-column names another"]


# --- Files -> objects ---


def read_objects(path: Path) -> list[tuple[str, Any]]:
    """What a list holds, each with its line in the file; what is not JSON comes as `Unread`.

    FluxError for a file that cannot be read at all.
    """
    if path.suffix.lower() == ".parquet":
        return _parquet(path)
    text = files.read_text(path)
    if path.suffix.lower() == ".jsonl" and not isinstance(parse(text), list):
        # At \n alone: str.splitlines also cuts at characters that JSON leaves in its texts.
        lines = [(f"line {i}", line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
        return [(where, parse(line)) for where, line in lines]
    if path.suffix.lower() in (".json", ".jsonl"):
        return _document(path, parse(text))
    return _separated(path, text)


def parse(text: str) -> Any:
    """The value of a JSON text; `Unread` where it is not JSON. Infinite numbers are other columns' matter."""
    try:
        return jsonfiles.parse(text, infinite=True, max_values=MAX_VALUES)
    except ValueError as error:
        return Unread(NO_OBJECT if str(error).startswith(jsonfiles.NOT_JSON) else str(error))


def _document(path: Path, document: Any) -> list[tuple[str, Any]]:
    """[object, ...], {"data": [object, ...]}, or sd-scripts' {file: {"caption": text, "tags": text}}."""
    if isinstance(document, Mapping) and isinstance(document.get("data"), list):
        document = document["data"]
    if isinstance(document, list):
        return [(f"entry {i}", entry) for i, entry in enumerate(document, 1)]
    if not isinstance(document, Mapping):
        if isinstance(document, Unread) and document.reason != NO_OBJECT:
            raise FluxError(f"{path}: {document.reason}")
        raise FluxError(
            f'{path}: should be [{{"image": file, "text": caption}}, ...], {{"data": [...]}} or '
            f'{{file: {{"caption": text}}, ...}}'
        )
    return [(f"entry {name!r}", _named(name, value)) for name, value in document.items()]


def _named(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {"image": name, "caption": value}
    caption, tags = value.get("caption"), value.get("tags")
    if isinstance(caption, str) and caption and isinstance(tags, str) and tags:
        return {**value, "image": name, "caption": f"{caption}, {tags}"}  # as sd-scripts joins them
    return {**value, "image": name}


def _separated(path: Path, text: str) -> list[tuple[str, Any]]:
    """CSV with a header, or without one where the first line already names a picture: file, caption."""
    first = text.lstrip("\n").split("\n", 1)[0]
    delimiter = max(DELIMITERS, key=first.count)
    if delimiter == "\t" and files.is_picture(first.split("\t")[0]):  # no quotes: a caption is all the rest
        lines = [(f"line {i}", line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
        return [(where, _pair(*line.rstrip("\r").partition("\t"))) for where, line in lines]
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        rows = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise FluxError(f"{path}, line {reader.line_num}: cannot be read as CSV: {error}") from None
    if not rows:
        return []
    pair = files.is_picture(rows[0][1][0])
    header = ["image", "caption"] if pair else [cell.strip() for cell in rows.pop(0)[1]]
    found: list[tuple[str, Any]] = []
    for number, row in rows:
        too_many = len(row) > len(header)
        entry = Unread(TOO_MANY) if too_many else dict(zip(header, row, strict=False))
        found.append((f"line {number}", entry))
    if not set(header) & set(IMAGE_KEYS):
        raise FluxError(
            f"{path}: its first line should name the columns, such as image,prompt; it is {first.strip()!r}"
        )
    return found


def _pair(name: str, tab: str, caption: str) -> dict[str, str] | None:
    return {"image": name, "caption": caption} if tab else None


def _parquet(path: Path) -> list[tuple[str, Any]]:
    import pyarrow.parquet  # comes with `datasets`

    rows: list[dict[str, Any]] = []
    try:
        left = PARQUET_GROWTH * path.stat().st_size + PARQUET_LEAST
        with pyarrow.parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(256):  # rows
                columns = [c.dictionary_decode() if hasattr(c, "dictionary") else c for c in batch.columns]
                left -= sum(column.nbytes for column in columns) + batch.num_rows * ROW_BYTES
                if left < 0:
                    raise ValueError("its rows are very much larger than the file")
                rows += batch.to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise FluxError(f"{path}: cannot be read as parquet: {str(error).splitlines()[0]}") from None
    return [(f"row {i}", row) for i, row in enumerate(rows, 1)]


def lists_in(folder: files.Folder) -> list[Path]:
    """The lists of a folder, the one that is read first."""
    return [folder.files[name] for name in LISTS if name in folder.files]
