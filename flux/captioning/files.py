"""Which pictures are to be captioned, and where their captions go."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image

from flux.errors import FluxError

NO_PICTURES = ("BUFR", "GRIB", "HDF5", "MPEG")  # Pillow knows these files and cannot decode them
# Pictures that Pillow cannot read without a plugin: tried all the same, so that they are named and not
# passed over in silence.
OTHER_PICTURES = (".heic", ".heif", ".jxl", ".svg", ".dng", ".raw")


@dataclass(frozen=True)
class Picture:
    """A picture's file. home: the folder whose list it belongs in. name: from there, with slashes."""

    path: Path
    home: Path
    name: str


def find(paths: Iterable[str | Path], passed_over: Iterable[Path] = ()) -> list[Picture]:
    """The pictures of folders, with their sub-folders, and files, in order and each once.

    A folder's pictures have it as their home, a file its own folder. Hidden files and folders are passed over
    in folders, and so are the files `passed_over`. Raises FluxError for a path that is absent or a folder
    without pictures.
    """
    passed = {path.resolve() for path in passed_over}
    found: dict[Path, Picture] = {}
    for path in map(Path, paths):
        if not path.exists():
            raise FluxError(f"{path}: no such file or folder")
        files = (
            [file for file in in_folder(path) if file.resolve() not in passed] if path.is_dir() else [path]
        )
        if not files:
            raise FluxError(f"{path}: no pictures in it, nor in its sub-folders")
        home = path if path.is_dir() else path.parent
        for file in files:
            found.setdefault(file.resolve(), Picture(file, home, file.relative_to(home).as_posix()))
    return list(found.values())


def in_folder(folder: Path) -> list[Path]:
    """The files of a folder and of those in it that have a picture's suffix, in order of their names."""

    def refuse(error: OSError) -> None:
        raise FluxError(f"{error.filename}: the folder cannot be read: {error.strerror}") from None

    found = []
    for place, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        visible = (Path(place, name) for name in sorted(files) if not name.startswith("."))
        found += [path for path in visible if path.suffix.lower() in suffixes()]
    return found


@cache
def suffixes() -> frozenset[str]:
    """Of every picture that Pillow can read, and of some that it cannot."""
    readable = Image.registered_extensions().items()
    known = {suffix for suffix, kind in readable if kind in Image.OPEN and kind not in NO_PICTURES}
    return frozenset(known | set(OTHER_PICTURES))
