"""What is in the weight files of a folder, by their headers: shards together, faults named."""

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, takewhile
from pathlib import Path

from flux import jsonfiles
from flux.errors import FluxError
from flux.weights import prefixes, strangers, tensors
from flux.weights.headers import MAX_NAME, Entry, Header

SUFFIXES = (".safetensors", ".sft", ".gguf")
MOST_FILES, DEPTH = 2000, 5  # of a folder, and of folders in it, that are looked at
# Folders of such trees that hold no part of a model, and many files.
SKIPPED = {
    "loras",
    "lora",
    "controlnet",
    "embeddings",
    "upscale_models",
    "esrgan",
    "clip_vision",
    "ipadapter",
}
SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(.*)")
PACKED = ("U8", "I8", "U32", "I32")  # types of quantized weights, whose shapes say little


@dataclass(frozen=True)
class Found:
    """A file of weights, or the shards of one network, and what is in it.

    entries: of all files by name. parts: "transformer", "ae", "clip" or "t5", as many as it holds.
    fault: why it cannot be used, as a line that begins with its path; None where it can. foreign: whether
    that is because it is of another model.
    """

    files: tuple[Path, ...]
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    parts: tuple[str, ...]
    fault: str | None = None
    foreign: bool = False

    @property
    def label(self) -> str:
        """What lines call it: the file, or the folder of the shards."""
        return str(self.files[0] if len(self.files) == 1 else self.files[0].parent)

    @property
    def size(self) -> int:
        """Of all files together, in bytes."""
        return sum(file.stat().st_size for file in self.files)

    def elements(self, part: str) -> int:
        """How many numbers a part has."""
        names = prefixes.bare_names_of(part, self.entries)
        return sum(math.prod(self.entries[name].shape) for name in names)

    def axis(self, part: str, *axes: tuple[str, int]) -> int | None:
        """The size of a part's tensor along an axis, the first of these (bare name, axis) that is there."""
        names = prefixes.bare_names_of(part, self.entries).items()
        entries = {bare: self.entries[name] for name, bare in names}
        for name, axis in axes:
            entry = entries.get(name)
            if entry and axis < len(entry.shape) and entry.dtype not in PACKED:
                return entry.shape[axis]
        return None


def read_header(path: Path) -> Header:
    """The header of a weight file of any format; FluxError too for a download that is not finished."""
    if strangers.is_unfinished(path):
        raise FluxError(f"{path}: a download that is not finished: go on with it")
    return tensors.read_header(path)


def look(files: Sequence[Path], fault: str | None = None) -> Found:
    """What is in a file, or in the shards of one network. No FluxError: a fault is in the result."""
    entries: dict[str, Entry] = {}
    metadata: dict[str, str] = {}
    foreign = None
    try:
        for header in map(read_header, files if fault is None else ()):
            entries |= header.tensors
            metadata = metadata or header.metadata
        foreign = strangers.model(entries)
    except FluxError as error:
        fault = str(error)
    found = Found(tuple(files), entries, metadata, tuple(prefixes.parts_in(entries)), fault, bool(foreign))
    return Found(**{**vars(found), "fault": f"{found.label}: {foreign}"}) if foreign else found


def is_shard(path: Path) -> bool:
    """Whether a file's name says that it is one of several."""
    return bool(SHARD.fullmatch(path.name)) or path.stem.isdigit()


def survey(folder: Path) -> list[Found]:
    """All weight files of a folder and of the folders in it, shards as one."""
    return [look(files, fault) for files, fault in _groups(list(weight_files(folder)))]


def weight_files(folder: Path) -> Iterator[Path]:
    """The weight files of a folder and of the folders in it, the nearest first, and unfinished downloads."""
    level, seen, count = [folder], {folder.resolve()}, 0
    for _ in range(DEPTH):
        below: list[Path] = []
        for path in (path for directory in level for path in _entries(directory)):
            if not path.is_dir() and not _is_weights(path):
                continue
            if (real := path.resolve()) in seen:  # by another link
                continue
            seen.add(real)
            if path.is_dir():
                below += [path] if path.name.lower() not in SKIPPED else []
            elif count < MOST_FILES:
                count += 1
                yield path
        level = below


def _entries(directory: Path) -> list[Path]:
    try:
        return sorted(path for path in directory.iterdir() if not path.name.startswith("."))
    except OSError:  # a folder that may not be read
        return []


def _is_weights(path: Path) -> bool:
    suffix = path.with_suffix("").suffix if path.suffix in strangers.UNFINISHED else path.suffix
    return suffix.lower() in SUFFIXES


def _groups(paths: list[Path]) -> Iterator[tuple[list[Path], str | None]]:
    """The files that belong together, by an index or by their numbers, each with what is wrong with them."""
    left = dict.fromkeys(paths)
    for directory in dict.fromkeys(path.parent for path in paths):
        for index in sorted(directory.glob("*.safetensors.index*.json")):
            files, fault = _indexed(index)
            for file in files:
                left.pop(file, None)
            yield files or [index], fault
    for directory in dict.fromkeys(path.parent for path in left):
        if files := _counted(directory, left):
            yield files, None
    numbered: dict[tuple[str, ...], list[Path]] = {}
    for path in left:
        match = SHARD.fullmatch(path.name)
        key = (match[3], str(path.parent), match[1], match[4]) if match else ("1", str(path))
        numbered.setdefault(key, []).append(path)
    for (wanted, *_), files in numbered.items():
        lacking = f"{files[0]}: {len(files)} of {int(wanted)} shards are there"
        yield files, lacking if len(files) != int(wanted) else None


def _counted(directory: Path, left: dict[Path, None]) -> list[Path]:
    """mflux's shards, 0.safetensors, 1.safetensors, ..., which are taken from those that are left."""
    files = list(takewhile(left.__contains__, (directory / f"{i}.safetensors" for i in count())))
    for file in files:
        del left[file]
    return files


def _indexed(index: Path) -> tuple[list[Path], str | None]:
    """The files that an index lists, and what is wrong with it."""
    try:
        listed = sorted(set(jsonfiles.read(index)["weight_map"].values()))
        if any(not name.isprintable() or len(name) > MAX_NAME for name in listed):
            raise ValueError
        files = [index.parent / Path(name).name for name in listed]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return [], f"{index}: not an index of safetensors files"
    there = [file for file in files if os.path.isfile(file)]  # which no name is too long for
    if absent := [file.name for file in files if file not in there]:
        return there, f"{index}: lists files that are not there: {', '.join(absent)}"
    return files, None
