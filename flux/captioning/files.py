"""Which pictures are to be captioned."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from flux import images
from flux.data.files import Disk
from flux.data.folders import MASK_FOLDERS, is_mask
from flux.errors import FluxError


@dataclass(frozen=True)
class Picture:
    """A picture's file. folder: the folder whose list it belongs in. name: from there, with slashes."""

    path: Path
    folder: Path
    name: str


def find(paths: Iterable[str | Path], passed_over: Iterable[Path] = ()) -> list[Picture]:
    """The pictures of folders, with their sub-folders, and files, in order and each once.

    A folder's pictures belong to its list, a file to that of the folder that it is in. Hidden files, masks
    and the files `passed_over` are left out in folders. Pictures whose format cannot be read are among them,
    so that they are named. Raises FluxError for a path that is absent or a folder without pictures.
    """
    passed = {path.resolve() for path in passed_over}
    disk = Disk()
    found: dict[Path, Picture] = {}
    for path in map(Path, paths):
        if not path.exists():
            raise FluxError(f"{path}: no such file or folder")
        files = [path]
        if path.is_dir():
            files = [file for file in in_folder(path, disk) if file.resolve() not in passed]
        if not files:
            raise FluxError(f"{path}: no pictures in it, nor in its sub-folders")
        folder = folder_of(path)
        for file in files:
            found.setdefault(file.resolve(), Picture(file, folder, file.relative_to(folder).as_posix()))
    return list(found.values())


def folder_of(path: Path) -> Path:
    """The folder whose list the pictures of a folder, or a picture, belong in."""
    return path if path.is_dir() else path.parent


def in_folder(folder: Path, disk: Disk) -> list[Path]:
    """The pictures of a folder and of those in it, in order of their names."""
    found = []
    for look in disk.walk(folder):
        if look.path != folder and look.path.name.lower() in MASK_FOLDERS:
            continue
        suffixes = images.readable_suffixes() | images.unreadable_suffixes()
        visible = [*look.files.values(), *look.unreadable]
        pictures = [path for path in visible if path.suffix.lower() in suffixes]
        found += sorted(path for path in pictures if not is_mask(path, look))
    return found
