"""What lies in folders: pictures, texts and folders by their names, and what is passed over and why.

Names are compared in Unicode's form NFC: macOS and some archives write é as e and an accent, lists do not.
"""

import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from flux import images
from flux.errors import FluxError

RUN_MARKS = ("events.jsonl", "states", "checkpoints")  # in the folder of a training run
SYSTEM_FOLDERS = ("__MACOSX", "@eaDir", "__pycache__")
DRIVE = re.compile(r"[A-Za-z]:/")  # of a Windows path, once its slashes are turned
ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


def nfc(name: str) -> str:
    """The name as it is compared."""
    return unicodedata.normalize("NFC", name)


def is_picture(name: str) -> bool:
    """Whether a file of this name is a picture that can be read here."""
    return _suffix(name) in images.readable_suffixes()


def _suffix(name: str) -> str:
    return Path(name).suffix.lower()


def stem(name: str) -> str:
    """A name without its last suffix, as it is compared."""
    return nfc(Path(name).stem)


@dataclass(frozen=True)
class Folder:
    """A folder's visible content: names in NFC (of two that are then equal one as it is) -> paths, in order.

    unreadable: pictures of a format that is not read here. left_out: these and others, and why.
    """

    path: Path
    files: dict[str, Path] = field(default_factory=dict)
    folders: dict[str, Path] = field(default_factory=dict)
    unreadable: list[Path] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    @cached_property
    def pictures(self) -> list[Path]:
        """Files that have a readable picture's suffix; masks are among them."""
        return [path for name, path in self.files.items() if is_picture(name)]

    @cached_property
    def _stems(self) -> dict[str, Path]:
        return {stem(path.name): path for path in reversed(self.pictures)}

    @cached_property
    def _caseless(self) -> dict[tuple[str, str], Path]:
        return {(stem(name), _suffix(name)): path for name, path in reversed(self.files.items())}

    def by_stem(self, wanted: str) -> Path | None:
        """The first picture of this stem."""
        return self._stems.get(wanted)

    def file(self, name: str) -> Path | None:
        """The file of this name, whose suffix may be in capitals."""
        return self.files.get(nfc(name)) or self._caseless.get((stem(name), _suffix(name)))


class Disk:
    """Looks into each folder once. It lives for one reading, so that it sees what is there."""

    def __init__(self) -> None:
        self._looks: dict[Path, Folder] = {}
        self._folders: dict[Path, Path] = {}

    def look(self, path: Path) -> Folder:
        """What is in a folder; hidden files (also macOS's `._x.jpg`) are passed over.

        FluxError where it cannot be read.
        """
        if path not in self._looks:
            self._looks[path] = _look(path)
        return self._looks[path]

    def where(self, path: Path) -> tuple[Path, str]:
        """A file's folder, without links and dots, and its name: equal for all ways to write its path."""
        if path.parent not in self._folders:
            self._folders[path.parent] = path.parent.resolve()
        return self._folders[path.parent], path.name

    def walk(self, path: Path) -> Iterator[Folder]:
        """The folder and those in it, in order of their names; a folder that a link leads back to once."""
        seen: set[Path] = set()
        waiting = [path]
        while waiting:
            folder = self.look(waiting.pop(0))
            if folder.path.resolve() not in seen:
                seen.add(folder.path.resolve())
                waiting[:0] = folder.folders.values()
                yield folder

    def resolve(self, name: str, folder: Path) -> Path:
        r"""The file that a list in `folder` names: relative, absolute, with / or \, with or without a suffix.

        A path of another machine is looked for by its last part beside the list. The path from the folder
        where there is none. FluxError for the address of a file on the network.
        """
        name = name.removeprefix("file://")
        if ADDRESS.match(name):
            raise FluxError(f"{name} is an address: download the picture, and name its file")
        if os.path.exists(folder / name):  # not Path.exists, which raises for names that cannot be
            return folder / name
        turned = name.replace("\\", "/")
        if DRIVE.match(turned) or turned.startswith("/"):
            tries = [(Path("/"), turned.split("/")[1:])] if turned.startswith("/") else []
            tries.append((folder, [turned.rsplit("/", 1)[-1]]))
        else:
            parts = turned.split("/")
            tries = [(folder, parts), (Path.cwd(), parts), (folder, parts[-1:])]
        found = (self._descend(*each) for each in tries)
        return next((path for path in found if path is not None), folder / turned)

    def _descend(self, start: Path, parts: Sequence[str]) -> Path | None:
        for i, part in enumerate(parts):
            last, wanted = i == len(parts) - 1, nfc(part)
            following: Path | None = start / part
            if part not in ("", ".", "..") and not os.path.exists(start / part):
                if not os.path.isdir(start):
                    return None
                look = self.look(start)
                following = (look.files if last else look.folders).get(wanted)
                if following is None and last and not is_picture(part):
                    following = look.by_stem(wanted)
            if following is None:
                return None
            start = following
        return start


def _look(path: Path) -> Folder:
    found = Folder(path)
    try:
        names = dict.fromkeys(sorted(os.listdir(path)))
    except OSError as error:
        raise FluxError(f"{path}: the folder cannot be read: {error.strerror}") from None
    for name in names:
        if name.startswith(".") or name in SYSTEM_FOLDERS:
            continue
        key = name if nfc(name) in names else nfc(name)
        entry, pictorial = path / name, is_picture(name) or _suffix(name) in images.unreadable_suffixes()
        if entry.is_dir():
            if pictorial:
                found.left_out.append(f"{entry} is a folder, not a picture")
            elif any((entry / mark).exists() for mark in RUN_MARKS):
                found.left_out.append(f"{entry} is the folder of a training run")
            else:
                found.folders[key] = entry
        elif entry.is_file():
            if _suffix(name) in images.unreadable_suffixes():
                found.unreadable.append(entry)
                found.left_out.append(f"{entry} has a format that is not read here{_advice(name)}")
            else:
                found.files[key] = entry
        elif pictorial:
            found.left_out.append(
                f"{entry} is a link to nothing" if entry.is_symlink() else f"{entry} is no file"
            )
    return found


def _advice(name: str) -> str:
    return " (pip install pillow-heif)" if _suffix(name) in (".heic", ".heif", ".hif") else ""


def read_text(path: Path) -> str:
    """A file's text, without a byte order mark: UTF-8, or UTF-16 with its mark.

    FluxError, by name, for other encodings: a guess would be seen in the captions only.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise FluxError(f"{path}: cannot be read: {error.strerror}") from None
    wide = content.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        text = content.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError:
        raise FluxError(f"{path}: is not UTF-8 text: save it as UTF-8") from None
    if "\0" in text:
        raise FluxError(f"{path}: holds NUL characters: save it as UTF-8 text")
    return text


def some(names: Iterable[object], shown: int = 5) -> str:
    """The first names, and how many more there are."""
    texts = [str(name) for name in names]
    more = f" and {len(texts) - shown} more" if len(texts) > shown else ""
    return ", ".join(texts[:shown]) + more
