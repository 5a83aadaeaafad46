"""A data set, from wherever it is, as one plain list of samples with their options."""

import os
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flux.data import datasets, schema
from flux.data.datasets import Row, some
from flux.data.schema import Group, Subset
from flux.errors import FluxError


@dataclass(frozen=True)
class Sample:
    """A picture of a data set, with all that is to be done with it."""

    name: str  # what messages call it
    picture: Path | bytes  # its file, or a file's content
    text: str  # as written for it or its class, before the rules of captions.py; "" where there is nothing
    subset: Subset
    group: int  # of Dataset.groups


@dataclass(frozen=True)
class Dataset:
    """Samples to train on, in a fixed order, those held out for validation, and what seems wrong."""

    name: str
    groups: tuple[Group, ...]
    samples: tuple[Sample, ...]
    validation: tuple[Sample, ...]
    warnings: tuple[str, ...]


def load(source: str | os.PathLike, options: Mapping[str, Any]) -> Dataset:
    """A data set from a data.toml, a train.jsonl, an index.json, a folder, or a repository of the Hub.

    A folder is read by the first that it has of train.jsonl, index.json, data.toml, a table saved by the
    `datasets` package; else its pictures are taken, with a caption file each. options: of the command line,
    named as in the schema, `resolution` as (height, width); a data.toml goes before them.
    Pictures are not opened here and may be absent. FluxError in one line for a source that is not there and
    for every fault of its text.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        named = [path / name for name in (*datasets.LISTS, "data.toml")]
        path = next((file for file in named if file.is_file()), path)
    if path.suffix == ".toml" and path.is_file():
        groups, subsets = _of_toml(path, options)
    else:
        group, subset = schema.of_options(options)
        groups, subsets = [group], [_Rows(*_rows(str(source), path, subset), 0, subset)]
    if not any(not part.subset.is_reg for part in subsets):
        raise FluxError(f"{source}: every subset is_reg: there is nothing to learn")
    return _assemble(str(source), groups, subsets)


@dataclass(frozen=True)
class _Rows:
    """The rows of a subset before they become samples."""

    rows: list[Row]
    folder: Path | None
    group: int
    subset: Subset


def _of_toml(path: Path, options: Mapping[str, Any]) -> tuple[list[Group], list[_Rows]]:
    groups, sources = schema.read_toml(path, options)
    parts = []
    for source in sources:
        folder = find_folder(source.image_dir, path)
        rows = datasets.read_folder(folder, source.subset.caption_extension)
        parts.append(_Rows(rows, folder, source.group, source.subset))
    return groups, parts


def find_folder(image_dir: str, toml: Path) -> Path:
    """The folder that a data.toml names.

    It is looked for from the working folder, as sd-scripts does, then from the data.toml's folder and from
    the one above, and last by its own name beside the data.toml, so that a data set may be moved as a whole.
    """
    named = Path(image_dir).expanduser()
    beside = toml.absolute().parent
    places = [named, beside / named, beside.parent / named, beside / named.name]
    found = next((place for place in places if place.is_dir()), None)
    if found is None:
        raise FluxError(f"{toml}: no folder image_dir = {image_dir!r}, neither here nor beside the file")
    return found


def _rows(source: str, path: Path, subset: Subset) -> tuple[list[Row], Path | None]:
    if datasets.is_saved_table(path):
        return datasets.read_hugging_face(str(path)), None
    if path.is_dir():
        return datasets.read_folder(path, subset.caption_extension), path
    if path.suffix in (".jsonl", ".json") and path.is_file():
        return datasets.read_list(path), None
    if path.exists():
        raise FluxError(f"{source}: a data set is a folder, a data.toml, a train.jsonl or an index.json")
    owner, slash, name = source.partition("/")
    if not (slash and owner and name) or "/" in name or path.suffix in (".toml", ".json", ".jsonl"):
        raise FluxError(
            f"{source}: no such folder or file, and no name of a data set of the Hub (owner/name)"
        )
    return datasets.read_hugging_face(source), None


def _assemble(name: str, groups: list[Group], parts: list[_Rows]) -> Dataset:
    samples: list[Sample] = []
    validation: list[Sample] = []
    warnings: list[str] = []
    for part in parts:
        own = [
            Sample(row.name, row.picture, _text(row, part.subset), part.subset, part.group)
            for row in part.rows
        ]
        kept, held_out = _split(own, groups[part.group])
        samples += kept
        validation += held_out
        warnings += _warnings(part)
        if not kept:
            raise FluxError(f"{name}: validation_split leaves nothing of {own[0].name} ... to train on")
    return Dataset(name, tuple(groups), tuple(samples), tuple(validation), tuple(warnings))


def _text(row: Row, subset: Subset) -> str:
    return (row.caption if row.caption is not None else subset.class_tokens) or ""


def _split(samples: list[Sample], group: Group) -> tuple[list[Sample], list[Sample]]:
    """A subset's samples to train on and to validate with; regularisation pictures are all trained on."""
    count = round(len(samples) * group.validation_split)
    if not count or samples[0].subset.is_reg:
        return samples, []
    held_out = set(random.Random(group.validation_seed).sample(range(len(samples)), count))
    kept = [sample for i, sample in enumerate(samples) if i not in held_out]
    return kept, [samples[i] for i in sorted(held_out)]


def _warnings(part: _Rows) -> list[str]:
    warnings = []
    without = [row.name for row in part.rows if not _text(row, part.subset)]
    if without:
        warnings.append(
            f"{len(without)} without a caption, trained with none (--class-prompt gives them one, a "
            f"data.toml's class_tokens too): {some(without)}"
        )
    if part.folder is not None:
        if unread := datasets.unread_pictures(part.folder):
            warnings.append(f"left out, as their format is not read: {some(unread)}")
        if stray := datasets.stray_captions(part.folder, part.rows, part.subset.caption_extension):
            warnings.append(f"captions without a picture: {some(stray)}")
    return warnings
