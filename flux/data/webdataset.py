"""WebDataset shards: tar files in which the members of one sample follow each other and share a name.

The shards are read through once for the offsets of their members; after that any sample is at hand.
"""

import os
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path

import numpy as np

from flux import images, jsonfiles
from flux.data.files import some
from flux.data.pictures import NamedBytes
from flux.errors import FluxError

MAX_PICTURE = 2**30  # bytes; pictures that are larger when decoded are refused by flux.images
MAX_SHARDS = 100_000
MAX_TEXT = 2**20  # bytes of a caption, or of the .json that it is in


@dataclass(frozen=True)
class Member:
    """Where a picture's or a text's bytes are."""

    shard: Path
    name: str
    offset: int
    size: int

    def read(self, most: int = MAX_PICTURE) -> bytes:
        """The member's bytes. FluxError where there are more than are read."""
        if self.size > most:
            raise FluxError(
                f"{self.shard}: {self.name} has {self.size} bytes; {most} are the most that is read"
            )
        with self.shard.open("rb") as file:
            return os.pread(file.fileno(), self.size, self.offset)


@dataclass(frozen=True)
class Samples:
    """Pictures in tar files."""

    members: list[Member]
    captions: list[str]

    def __len__(self) -> int:
        return len(self.members)

    def texts(self, index: int) -> tuple[str, ...]:
        """The caption of a picture; none where it is empty."""
        return (self.captions[index],) if self.captions[index] else ()

    def picture(self, index: int) -> np.ndarray:
        """The upright picture (H, W, 3), uint8, over white. FluxError where it cannot be read."""
        member = self.members[index]
        return images.over_white(*images.load(NamedBytes(member.read(), f"{member.shard}: {member.name}")))


def open_shards(path: str | Sequence[str], image_key: str, caption_key: str) -> Samples:
    """The samples of shards: paths, with * or {000..012} in them.

    image_key: suffixes, "jpg;png". caption_key: the suffix of a text, or else a key in the sample's .json.
    Samples without a picture are left out. FluxError for no shards, no samples, or one without a caption.
    """
    suffixes = set(image_key.split(";"))
    members: list[Member] = []
    captions: list[str] = []
    faults: list[str] = []
    for shard in shards([path] if isinstance(path, str) else path):
        for key, sample in _samples(shard):
            picture = next((member for suffix, member in sample.items() if suffix in suffixes), None)
            if picture is None:
                continue
            members.append(picture)
            try:
                captions.append(_caption(shard, key, sample, caption_key))
            except FluxError as error:
                faults.append(str(error))
    if faults:
        raise FluxError(some(faults))
    if not members:
        raise FluxError(f"{path}: no samples with a picture ({image_key})")
    return Samples(members, captions)


def shards(patterns: Sequence[str]) -> list[Path]:
    """The files that the patterns name, in order."""
    found: list[Path] = []
    for pattern in patterns:
        for name in _expand(str(Path(pattern).expanduser())):
            paths = [Path(p) for p in sorted(glob(name))]
            if not paths:
                raise FluxError(f"no shard {name}")
            found += paths
    return found


def _expand(pattern: str) -> list[str]:
    """train-{000..002}.tar -> three names."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if match is None:
        return [pattern]
    first, last = match.groups()
    if max(len(first), len(last)) > 9 or int(last) - int(first) >= MAX_SHARDS:
        raise FluxError(f"{pattern} names too many shards: {MAX_SHARDS} are the most that are read")
    numbers = (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
    before, after = pattern[: match.start()], pattern[match.end() :]
    return [name for number in numbers for name in _expand(before + number + after)]


def _samples(shard: Path) -> list[tuple[str, dict[str, Member]]]:
    """(name, members by suffix) of each sample. A name ends at the first point of its last part."""
    found: list[tuple[str, dict[str, Member]]] = []
    try:
        with tarfile.open(shard, "r:") as tar:  # not compressed, so that every member has an offset
            for entry in tar:
                if not entry.isfile():
                    continue
                folder, _, name = entry.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                key = f"{folder}/{stem}"
                if not found or found[-1][0] != key:
                    found.append((key, {}))
                found[-1][1][suffix.lower()] = Member(shard, entry.name, entry.offset_data, entry.size)
    except (tarfile.TarError, OSError) as error:
        raise FluxError(f"{shard}: not an uncompressed tar file that can be read ({error})") from None
    return found


def _caption(shard: Path, key: str, sample: dict[str, Member], caption_key: str) -> str:
    if caption_key in sample:
        return sample[caption_key].read(MAX_TEXT).decode("utf-8", "replace").strip()
    table = {}
    if "json" in sample:
        try:
            table = jsonfiles.parse_object(sample["json"].read(MAX_TEXT), infinite=True)
        except ValueError as error:  # a FluxError is one
            raise FluxError(f"{shard}: the .json of the sample {key}: {error}") from None
    caption = table.get(caption_key)
    if isinstance(caption, bool) or not isinstance(caption, str | int):
        raise FluxError(
            f"{shard}: the sample {key} has no caption {caption_key!r}, as a file or in its .json"
        )
    return str(caption)
