"""Data sets of the Hub, and folders that the `datasets` package saved. Reaches the network."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flux import jsonfiles
from flux.data.files import some
from flux.data.folders import Part, Reading
from flux.data.lists import CAPTION_KEYS, IMAGE_KEYS, Row, captions_of
from flux.errors import FluxError

TABLES = ("state.json", "dataset_dict.json", "dataset_info.json")  # beside the data in a saved folder


def is_saved_table(folder: Path) -> bool:
    """Whether `Dataset.save_to_disk` wrote this folder."""
    return any((folder / name).is_file() for name in TABLES[:2])


def load_table(path: str, name: str | None, split: str) -> Any:
    """A table of the `datasets` package: of the Hub, downloaded, or a folder of `Dataset.save_to_disk`.

    FluxError, with the reason, for one that cannot be loaded.
    """
    import datasets  # it takes seconds to import

    folder = Path(path).expanduser()
    try:
        if is_saved_table(folder):
            for file in (path for name in TABLES for path in folder.rglob(name)):
                jsonfiles.read(file)  # the package believes them
            table = datasets.load_from_disk(str(folder))
            return table[split] if isinstance(table, Mapping) else table
        return datasets.load_dataset(path, name, split=split)
    except FluxError:
        raise
    except Exception as error:  # of all kinds: the package does not look before it takes
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FluxError(f"the data set {path}, split {split!r}, cannot be loaded: {reason}") from None


def with_bytes(table: Any, path: str, column: str | None = None) -> tuple[Any, str]:
    """The table with its pictures as they were uploaded, {"bytes", "path"}, and the name of their column.

    column: its name, if it is known. FluxError where there are no pictures.
    """
    import datasets

    columns = table.features
    keys = (column,) if column else (*IMAGE_KEYS, *columns)
    found = next((key for key in keys if isinstance(columns.get(key), datasets.Image)), None)
    if found is None:
        wanted = f"column {column!r}" if column else "column `image`"
        raise FluxError(f"{path}: no {wanted} that holds pictures; it has {', '.join(columns)}")
    return table.cast_column(found, datasets.Image(decode=False)), found


def read_hugging_face(repo: str, caption_column: str | None = None, split: str = "train") -> Reading:
    """The rows of a table, as `load_table` finds it.

    Its captions are in `caption_column`, or else in one of CAPTION_KEYS. All encoded pictures come into
    memory. FluxError, with advice, for one that cannot be loaded or has other columns.
    """
    table, image = with_bytes(load_table(repo, None, split), repo)
    known = (caption_column,) if caption_column else CAPTION_KEYS
    others = [key for key in table.features if key != image]
    reading = Reading()
    if others and not set(known) & set(others):
        reading.errors.append(
            f"{repo}: no column {' or '.join(known)} for the captions; it has {', '.join(table.features)}: "
            "--caption-column names one"
        )
    rows, faults = [], []
    for i, entry in enumerate(table):
        try:
            rows.append(_row(f"{repo}[{i}]", entry, image, caption_column))
        except FluxError as error:
            faults.append(f"{i}: {error}")
    if faults:
        reading.errors.append(f"{repo}: {some(faults)}")
    reading.parts = [Part(Path(repo), rows)] if rows else []
    return reading


def _row(name: str, entry: Mapping[str, Any], image: str, column: str | None) -> Row:
    value = entry[image] or {}
    picture = value.get("bytes") or (Path(value["path"]) if value.get("path") else b"")
    return Row(name, picture, captions_of({k: v for k, v in entry.items() if k != image}, column))
