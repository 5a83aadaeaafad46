"""Datasets: what is in their folders, captions read and corrected, and their data.toml."""

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flux.captioning import files, records
from flux.captioning.files import Picture
from flux.data import schema, sd_scripts
from flux.errors import FluxError
from flux.outputs import locked, replacing
from flux.server.folders import Folders, existing, inside, listed, subfolders
from flux.server.problems import wrong
from flux.tables import Faults

CAPTION_BYTES = 10_000
_CORRECTING = threading.Lock()  # a correction reads a file and writes it


def names(folders: Folders) -> list[str]:
    """The datasets that there are."""
    return subfolders(folders.datasets)


def pictures(folders: Folders, name: str) -> list[Picture]:
    """The pictures of a dataset; none of an empty folder. Problem 404 without the folder."""
    return in_folder(existing(folders.dataset(name), f"dataset {name}"))


def in_folder(folder: Path) -> list[Picture]:
    """The pictures of a folder that is there; none of an empty one."""
    try:
        return files.find([folder])
    except FluxError:
        return []


def captions(found: list[Picture]) -> dict[str, str]:
    """The captions of pictures by their names, as a training would read them."""
    all_forms = (records.read(found, form) for form in ("txt", "csv", "jsonl"))  # the last goes first
    return {picture.name: caption for form in all_forms for picture, caption in form.items()}


def picture_file(folders: Folders, name: str, file: str) -> Path:
    """A picture of a dataset. Problem 404 where it is none."""
    folder = existing(folders.dataset(name), f"dataset {name}")
    path = listed(folder, file, f"picture {file[:100]!a} in {name}")
    if path.resolve() not in {picture.path.resolve() for picture in pictures(folders, name)}:
        raise wrong(f"{file[:100]!a} is not a picture of {name}")
    return path


def correct(folders: Folders, name: str, file: str, caption: str) -> str:
    """Write the caption of a picture where a training reads it; the caption as it was written."""
    text = " ".join(caption.split())
    if not text or len(text.encode()) > CAPTION_BYTES:
        raise wrong(f"a caption has 1 to {CAPTION_BYTES} bytes of text")
    path = picture_file(folders, name, file)
    with _CORRECTING, locked(folders.dataset(name)):
        found = [picture for picture in pictures(folders, name) if picture.path == path]
        format = next((kind for kind in ("jsonl", "csv") if records.read(found, kind)), "txt")
        records.write(dict.fromkeys(found, text), format, overwrite=True)
    return text


# --- data.toml ---


def write_config(folders: Folders, name: str, options: Mapping[str, Any]) -> Path:
    """Write a dataset's data.toml from options of its schema; the path. Problem with every fault."""
    folder = existing(folders.dataset(name), f"dataset {name}")
    general = {sd_scripts.ALIASES.get(key, key): value for key, value in options.items() if value is not None}
    if (mask_dir := general.get("mask_dir")) is not None:
        if not isinstance(mask_dir, str):
            raise wrong("mask_dir is a folder in the dataset's")
        general["mask_dir"] = str(existing(inside(folder, mask_dir), f"folder of masks {mask_dir[:100]!a}"))
    subset = {"image_dir": str(folder)}
    document = {"general": general, "datasets": [{"subsets": [subset]}]}
    faults = Faults()
    schema.parse(document, {}, faults)
    if faults.lines:
        raise wrong("; ".join(dict.fromkeys(faults.lines)))
    text = "[general]\n" + _lines(general) + "\n[[datasets]]\n\n[[datasets.subsets]]\n" + _lines(subset)
    path = folders.config(name)
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return path


def _lines(table: Mapping[str, Any]) -> str:
    return "".join(f"{key} = {_toml(value)}\n" for key, value in table.items())


def _toml(value: Any) -> str:
    """A value as TOML writes it: as JSON does, but for one character."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
