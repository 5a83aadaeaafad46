"""A folder of pictures, read by what is in it: lists, caption files, masks, kohya's names, sub-folders.

One set of rules for fine-tuning, pretraining and captioning. Whatever looks like a caption, a mask or a
picture and is not used is named, with the reason.
"""

import os
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from flux.data import files, lists
from flux.data.files import Disk, Folder, nfc, some, stem
from flux.data.lists import Row
from flux.errors import FluxError

EXTENSIONS = (".caption", ".txt", ".json")  # of caption files, the first that has a text
TEXTS = (*EXTENSIONS, ".captions", ".text", ".cap", ".yaml")  # what may be meant for one
KOHYA = re.compile(r"(\d{1,3})_(.+)")  # 10_sks dog: 10 repeats, the words of its class; 2024_x is a year
REGULARISATION = "reg"  # kohya's folder beside img
TESTS = ("test", "val", "valid", "validation", "eval")  # sub-folders that are held out where there is a train
# OneTrainer's a-masklabel.png, and others' a_mask.png: of a.jpg. Its a-condlabel.png is no picture either.
MASK = re.compile(r"(.+)[-_.](masklabel|condlabel|mask)")
MASK_FOLDERS = ("masks", "mask")


@dataclass(frozen=True)
class Rules:
    """How folders are read. recursive: with sub-folders, as all but a data.toml's subsets are.

    mask_dir: a folder of masks under the pictures' names.
    """

    caption_extension: str | None = None  # None: EXTENSIONS
    caption_column: str | None = None
    mask_dir: Path | None = None
    recursive: bool = True

    @property
    def extensions(self) -> tuple[str, ...]:
        """What comes after a picture's name, in the order in which it is looked for."""
        given = self.caption_extension
        if given is None:
            return EXTENSIONS
        return (given if given[0] in "._-" else f".{given}",)


@dataclass
class Part:
    """Pictures that are treated alike. options: what the folder's name says, as in data.toml."""

    folder: Path
    rows: list[Row] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Reading:
    """What a source holds. errors: it cannot be used; notes: what is left out or may not be meant."""

    parts: list[Part] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    lists: list[Path] = field(default_factory=list)  # the lists that were read

    @property
    def rows(self) -> list[Row]:
        """All pictures."""
        return [row for part in self.parts for row in part.rows]


def read(folder: Path, rules: Rules) -> Reading:
    """The pictures of a folder. FluxError where there are none."""
    reader = _Reader(rules)
    reader.from_folder(folder, {})
    reader.leftovers()
    reading = reader.reading
    below = [part.folder for part in reading.parts if part.folder != folder and not part.options]
    if below:
        reading.notes.append(f"with the pictures of the folders in it: {some(below)}")
    if any(not row.captions for row in reading.rows) and (named := _kohya(folder)):
        repeats, words = named
        reading.notes.append(
            f"{folder}: its name stands for {repeats} repeats of {words!r} where the folder above is given"
        )
    if not reading.rows and not reading.errors:
        more = f" ({'; '.join(reading.notes)})" if reading.notes else ""
        raise FluxError(f"{folder}: no pictures in it{more}")
    return reading


def read_list(path: Path, rules: Rules, folder: Path | None = None) -> Reading:
    """The pictures of a list, which lie in `folder` or beside it."""
    reader = _Reader(rules)
    reader.from_list(path, folder or path.parent, {})
    reader.leftovers()
    return reader.reading


class _Reader:
    """Goes through folders, and remembers what it has used."""

    def __init__(self, rules: Rules):
        self.rules = rules
        self.disk = Disk()
        self.reading = Reading()
        self._used: set[tuple[Path, str]] = set()  # files, as of Disk.where
        self._seen: dict[Path, Path] = {}  # folders: without links and dots -> as they were named
        self._unreadable: list[str] = []  # caption files, and why
        self._empty: list[Path] = []  # caption files
        self._shared: dict[Path, list[Path]] = defaultdict(list)  # caption file -> pictures

    # --- folders ---

    def from_folder(self, path: Path, options: dict[str, Any]) -> None:
        """Reads a folder by its list, or by its files and sub-folders."""
        look = self.disk.look(path)
        if path.resolve() in self._seen:
            return
        self._seen[path.resolve()] = path
        found = lists.lists_in(look)
        if found and self._reads_lists(look):
            self.from_list(found[0], path, options)
            return
        if pictures := [each for each in look.pictures if not is_mask(each, look)]:
            rows = [Row(str(each), each) for each in pictures]
            self._add(Part(path, rows, options))
        if self.rules.recursive:
            self._sub_folders(look, options)
        else:
            self._not_entered(look)

    def _reads_lists(self, look: Folder) -> bool:
        """A data.toml means caption files, as sd-scripts does: a list is read where there are none."""
        extensions = self.rules.extensions
        return self.rules.recursive or not any(
            _beside(picture, look, extension) for picture in look.pictures for extension in extensions
        )

    def _sub_folders(self, look: Folder, options: dict[str, Any]) -> None:
        has_train = "train" in look.folders
        for name, path in look.folders.items():
            if name.lower() in MASK_FOLDERS:
                continue
            held_out = has_train and name.lower() in TESTS
            if held_out and any(each.pictures for each in self.disk.walk(path)):
                self.reading.notes.append(f"{path} is not used: the pictures in train beside it are")
            if not held_out:
                reg = {"is_reg": True} if name == REGULARISATION and "img" in look.folders else {}
                self.from_folder(path, options | reg | self._named_options(path))

    def from_list(self, path: Path, folder: Path, options: dict[str, Any]) -> None:
        """Reads a list; rows without a caption have that of a file beside the picture, if there is one."""
        rows = lists.read(path, folder, self.disk, self.rules.caption_column, self.reading.errors)
        self.reading.lists.append(path)
        self._used.add(self.disk.where(path))
        self._add(Part(folder, rows, options))
        self._unlisted(path, folder)

    def _add(self, part: Part) -> None:
        if part.rows:
            self.reading.parts.append(replace(part, rows=[self._complete(row) for row in part.rows]))

    def _complete(self, row: Row) -> Row:
        """With what lies beside the picture: its mask, and its caption if it has none."""
        if not isinstance(row.picture, Path) or not os.path.isdir(row.picture.parent):
            return row
        self._used.add(self.disk.where(row.picture))
        look = self.disk.look(row.picture.parent)
        captions = row.captions or self._caption(row.picture, look)
        return replace(row, captions=captions, mask=self._mask(row.picture, look))

    # --- captions ---

    def _caption(self, picture: Path, look: Folder) -> tuple[str, ...]:
        for extension in self.rules.extensions:
            for path in _beside(picture, look, extension):
                self._used.add(self.disk.where(path))
                self._shared[path].append(picture)
                if found := self._text(path):
                    return found
        return ()

    def _text(self, path: Path) -> tuple[str, ...]:
        try:
            text = files.read_text(path).strip()
            found: tuple[str, ...] = (text,) if text else ()
            if path.suffix.lower() == ".json":
                entry = lists.parse(text)
                found = lists.captions_of(entry, self.rules.caption_column) if isinstance(entry, dict) else ()
        except FluxError as error:
            self._unreadable.append(str(error))
            return ()
        if not found:
            self._empty.append(path)
        return found

    # --- masks ---

    def _mask(self, picture: Path, look: Folder) -> Path | None:
        name = stem(picture.name)
        if self.rules.mask_dir is not None:
            found = self.disk.look(self.rules.mask_dir).by_stem(name)
        else:
            found = self._mask_beside(name, look)
        if found is not None:
            self._used.add(self.disk.where(found))
        return found

    def _mask_beside(self, name: str, look: Folder) -> Path | None:
        for kind in ("-masklabel", "_masklabel", "-mask", "_mask", ".mask"):
            if (found := look.by_stem(name + kind)) is not None:
                return found
        folders = [path for each, path in look.folders.items() if each.lower() in MASK_FOLDERS]
        found_in = (self.disk.look(path) for path in folders)
        tries = (each.by_stem(name) or self._mask_beside(name, each) for each in found_in)
        return next((path for path in tries if path is not None), None)

    # --- what is left ---

    def _unlisted(self, used: Path, folder: Path) -> None:
        """Pictures beside a list that it does not name."""
        looks = [look for look in self.disk.walk(folder) if look.path.name.lower() not in MASK_FOLDERS]
        pictures = [path for look in looks for path in look.pictures if not is_mask(path, look)]
        if unlisted := self._unused(pictures):
            self.reading.notes.append(f"not in {used}, and not used: {some(unlisted)}")

    def _unused(self, found: Iterable[Path]) -> list[Path]:
        return [path for path in found if self.disk.where(path) not in self._used]

    def _not_entered(self, look: Folder) -> None:
        filled = [path for name, path in look.folders.items() if self.disk.look(path).pictures]
        if filled := [path for path in filled if path.name.lower() not in MASK_FOLDERS]:
            text = f"a data.toml's folder is read without those in it, so these are not used: {some(filled)}"
            self.reading.notes.append(text)

    def leftovers(self) -> None:
        """Notes on all that was seen and not used, and errors of caption files."""
        reading = self.reading
        for row in reading.rows:
            if isinstance(row.picture, Path) and os.path.isdir(row.picture.parent):
                self._seen.setdefault(self.disk.where(row.picture)[0], row.picture.parent)
        looks = [self.disk.look(path) for path in self._seen.values()]
        reading.errors += self._unreadable
        reading.notes += [note for look in looks for note in look.left_out]
        if self._empty:
            reading.notes.append(f"caption files without a caption: {some(self._empty)}")
        for text, pictures in self._shared.items():
            if len(pictures) > 1:
                reading.notes.append(f"{text} is the caption of {some(pictures)}")
        self._stray(path for look in looks for path in look.files.values())
        self._masks(looks)

    def _stray(self, found: Iterable[Path]) -> None:
        """Files that look like captions or lists and are not used, by the reason."""
        reasons: dict[str, list[Path]] = defaultdict(list)
        pictures = [row.picture for row in self.reading.rows if isinstance(row.picture, Path)]
        stems = {(self.disk.where(path)[0], stem(path.name)) for path in pictures}
        for path in self._unused(found):
            if reason := self._why_not(path, stems):
                reasons[reason].append(path)
        self.reading.notes += [f"{reason}: {some(paths)}" for reason, paths in reasons.items()]

    def _why_not(self, path: Path, stems: set[tuple[Path, str]]) -> str | None:
        """Why a file is not used; None for one that is neither a caption nor a list."""
        suffix = path.suffix.lower()
        folder = self.disk.where(path)[0]
        of_picture = {(folder, stem(path.name)), (folder, stem(path.stem))} & stems
        if path.name in lists.LISTS:
            first = ", ".join(map(str, self.reading.lists)) or "a caption file"
            return f"not used, as {first} goes first"
        if suffix in lists.SUFFIXES and not of_picture:
            return "not read as a list (name the file instead of the folder, if it is one)"
        if suffix not in TEXTS:
            return None
        if not of_picture:
            return "captions without a picture"
        if suffix in self.rules.extensions:
            return "not used, as other captions of the same pictures go first"
        return f"not used as captions, as only {', '.join(self.rules.extensions)} are"

    def _masks(self, looks: Iterable[Folder]) -> None:
        folders = {path for look in looks for name, path in look.folders.items() if name in MASK_FOLDERS}
        folders |= {self.rules.mask_dir} if self.rules.mask_dir else set()
        masks = [path for folder in sorted(folders) for path in self.disk.look(folder).pictures]
        masks += [path for look in looks for path in look.pictures if is_mask(path, look)]
        if unused := self._unused(dict.fromkeys(masks)):
            self.reading.notes.append(f"masks that are not used: {some(unused)}")

    def _named_options(self, path: Path) -> dict[str, Any]:
        if (named := _kohya(path)) is None or not any(look.pictures for look in self.disk.walk(path)):
            return {}
        repeats, words = named
        self.reading.notes.append(f"{path}: {repeats} repeats, class {words!r}, as its name says")
        return {"num_repeats": repeats, "class_tokens": words}


def _kohya(path: Path) -> tuple[int, str] | None:
    """What kohya's way of naming a folder says: repeats, and the words of the class."""
    match = KOHYA.fullmatch(nfc(path.name))
    return (int(match[1]), match[2].strip()) if match and int(match[1]) else None


def is_mask(picture: Path, look: Folder) -> bool:
    """Whether a file is a mask by its name and by those beside it: man_mask.png alone is a picture."""
    match = MASK.fullmatch(stem(picture.name))
    return match is not None and (match[2] != "mask" or look.by_stem(match[1]) is not None)


def _beside(picture: Path, look: Folder, extension: str) -> list[Path]:
    """The caption files of a picture: a.txt, and a.png.txt."""
    names = (picture.stem + extension, picture.name + extension)
    return [path for name in names if (path := look.file(name)) is not None]
