"""A data set, from wherever it is, as one plain list of samples with their options."""

import os
import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from flux.data import datasets, folders, lists, schema
from flux.data.files import some
from flux.data.folders import Reading, Rules
from flux.data.lists import Row
from flux.data.schema import Group, Source, Subset
from flux.errors import FluxError
from flux.tables import Faults

KINDS = {
    "image_dir": "folder image_dir",
    "metadata_file": "file metadata_file",
    "mask_dir": "folder mask_dir (conditioning_data_dir)",
}
BEFORE_TOML = lists.LISTS[:2]  # a folder's train.jsonl and index.json go before its data.toml


@dataclass(frozen=True)
class Sample:
    """A picture of a data set, with all that is to be done with it."""

    name: str  # what messages call it
    picture: Path | bytes  # its file, or a file's content
    # As written for it or its class, before the rules of captions.py; of several one is drawn each epoch.
    texts: tuple[str, ...]
    subset: Subset
    group: int  # of Dataset.groups
    mask: Path | None = None  # white where the picture is trained

    @property
    def text(self) -> str:
        """Its first caption; "" where it has none."""
        return self.texts[0] if self.texts else ""


@dataclass(frozen=True)
class Dataset:
    """Samples to train on, in a fixed order, those held out for validation, and what is or seems wrong.

    With errors it cannot be trained on: `batches.Plan` refuses it.
    """

    name: str
    groups: tuple[Group, ...]
    samples: tuple[Sample, ...]
    validation: tuple[Sample, ...]
    warnings: tuple[str, ...]
    errors: tuple[str, ...] = ()


def load(source: str | os.PathLike, options: Mapping[str, Any]) -> Dataset:
    """A data set from a data.toml, a list, a folder, or a repository of the Hub.

    A folder is read by the first that it has of train.jsonl, index.json, data.toml, a table saved by the
    `datasets` package; else as `folders.read` says. options: of the command line, named as in the schema,
    `resolution` as (height, width); a data.toml goes before them.
    Pictures are not opened here and may be absent. What is wrong with lists, texts and options comes into
    `errors`, all of it. FluxError in one line for a source that is not there.
    """
    path = Path(source).expanduser()
    made = _Assembly(str(source))
    if path.is_dir():
        named = [path / name for name in (*BEFORE_TOML, "data.toml")]
        first = next((file for file in named if file.is_file()), path)
        path = first if first.suffix == ".toml" else path
    if path.suffix == ".toml" and path.is_file():
        made.toml(path, options)
    else:
        group, subset = schema.of_options(options)
        made.groups = [group]
        made.add(read_source(str(source), rules_of(subset)), 0, subset)
    return made.dataset()


def rules_of(subset: Subset) -> Rules:
    """How a source is read other than a data.toml's."""
    return Rules(subset.caption_extension, subset.caption_column, _folder(subset.mask_dir))


def _folder(name: str | None) -> Path | None:
    return None if name is None else Path(name).expanduser()


def read_source(source: str, rules: Rules, captions_file: str | None = None) -> Reading:
    """What a folder, a list or a repository of the Hub holds. FluxError for anything else.

    captions_file: the list of a folder's pictures, by its path or its name in the folder.
    """
    path = Path(source).expanduser()
    if captions_file is not None:
        return _given_list(path, Path(captions_file).expanduser(), rules)
    if datasets.is_saved_table(path):
        return datasets.read_hugging_face(str(path), rules.caption_column)
    if path.is_dir():
        return folders.read(path, rules)
    if path.suffix.lower() in lists.SUFFIXES and path.is_file():
        return folders.read_list(path, rules)
    if path.exists():
        raise FluxError(
            f"{source}: a data set is a folder, a data.toml or a list ({', '.join(lists.SUFFIXES)})"
        )
    owner, slash, name = source.partition("/")
    if not (slash and owner and name) or "/" in name or path.suffix in (".toml", *lists.SUFFIXES):
        raise FluxError(
            f"{source}: is not a folder, a file or the name of a data set of the Hub (owner/name)"
        )
    return datasets.read_hugging_face(source, rules.caption_column)


def _given_list(folder: Path, given: Path, rules: Rules) -> Reading:
    if not folder.is_dir():
        raise FluxError(f"no folder {folder}")
    return folders.read_list(given if given.is_file() else folder / given, rules, folder)


def find_folder(image_dir: str, toml: Path) -> Path | None:
    """The folder (or file) that a data.toml names; None where there is none.

    It is looked for from the working folder, as sd-scripts does, then from the data.toml's folder and from
    the one above, and last by its name beside the data.toml, so that a data set may be moved as a whole.
    """
    named = Path(image_dir.replace("\\", "/")).expanduser()
    beside = toml.absolute().parent
    candidates = [Path(image_dir), named, beside / named, beside.parent / named, beside / named.name]
    return next((path for path in candidates if os.path.exists(path)), None)


@dataclass
class _Assembly:
    """What of a data set has been read so far."""

    name: str
    groups: list[Group] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    validation: list[Sample] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    without: list[str] = field(default_factory=list)  # pictures that have no caption, and are meant to have

    def toml(self, path: Path, options: Mapping[str, Any]) -> None:
        """Reads the subsets of a data.toml."""
        faults = Faults()
        self.groups, sources = schema.read_toml(path, options, faults)
        self.errors += dict.fromkeys(faults.lines)  # a fault of [general] would come once a table
        for source in sources:
            self._subset(path, source)

    def _subset(self, toml: Path, source: Source) -> None:
        subset = source.subset
        named = {
            "image_dir": source.image_dir,
            "metadata_file": source.metadata_file,
            "mask_dir": subset.mask_dir,
        }
        found = {key: find_folder(name, toml) for key, name in named.items() if name is not None}
        if absent := [key for key, path in found.items() if path is None]:
            self.errors += [
                f"{toml}: no {KINDS[key]} = {named[key]!r}, neither here nor beside the file"
                for key in absent
            ]
            return
        paths = {key: path for key, path in found.items() if path is not None}
        rules = Rules(subset.caption_extension, subset.caption_column, paths.get("mask_dir"), recursive=False)
        try:
            if "metadata_file" in paths:
                reading = folders.read_list(paths["metadata_file"], rules, paths.get("image_dir"))
            else:
                reading = folders.read(paths["image_dir"], rules)
        except FluxError as error:
            self.errors.append(str(error))
            return
        self._to_one_line(toml, reading, subset)
        self.add(reading, source.group, subset)

    def _to_one_line(self, toml: Path, reading: Reading, subset: Subset) -> None:
        """sd-scripts' rule: of a caption of several lines the first; with wildcards any of them is drawn."""
        if subset.enable_wildcard:
            return
        cut = []
        for part in reading.parts:
            for i, row in enumerate(part.rows):
                texts = tuple(_first_line(text) for text in row.captions)
                if texts != row.captions:
                    part.rows[i] = replace(row, captions=texts)
                    cut.append(row.name)
        if cut:
            self.warnings.append(
                f"{toml}: of captions of several lines only the first is taken, as by sd-scripts "
                f"(enable_wildcard draws one of them): {some(cut)}"
            )

    def add(self, reading: Reading, group: int, subset: Subset) -> None:
        """Adds the parts of a source: the folder's name goes before the options, a caption before both."""
        self.errors += reading.errors
        self.warnings += reading.notes
        if masks := [row.mask for row in reading.rows if row.mask]:
            self.warnings.append(f"the loss is masked: {len(masks)} pictures have a mask, such as {masks[0]}")
            if whole := [row.name for row in reading.rows if not row.mask]:
                self.warnings.append(f"without a mask, trained whole: {some(whole)}")
        for part in reading.parts:
            self._part(part.rows, group, replace(subset, **part.options))

    def _part(self, rows: list[Row], group: int, subset: Subset) -> None:
        classes = (subset.class_tokens,) if subset.class_tokens else ()
        made = [
            Sample(row.name, row.picture, row.captions or classes, subset, group, row.mask) for row in rows
        ]
        self._uncaptioned([sample.name for sample in made if not sample.texts], subset)
        kept, held_out = _split(made)
        self.samples += kept
        self.validation += held_out
        if not kept:
            self.errors.append(
                f"{self.name}: validation_split leaves nothing of {made[0].name} ... to train on"
            )

    def _uncaptioned(self, without: list[str], subset: Subset) -> None:
        if not without:
            return
        if subset.may_lack_captions:
            self.warnings.append(f"{len(without)} without a caption, trained with none: {some(without)}")
        else:
            self.without += without

    def dataset(self) -> Dataset:
        """What has been read."""
        if self.without:
            self.errors.append(
                f"{len(self.without)} without a caption: {some(self.without)}; give captions (a .txt beside "
                "each picture or a train.jsonl; caption.py writes them), one for all (--class-prompt, a "
                "data.toml's class_tokens), or say that this is meant (--uncaptioned)"
            )
        split = max((sample.subset.validation_split for sample in self.samples), default=0)
        if split and not self.validation:
            count = sum(not sample.subset.is_reg for sample in self.samples)
            self.warnings.append(
                f"validation_split {split:g} of {count} pictures holds none out: give a larger one"
            )
        if self.samples and all(sample.subset.is_reg for sample in self.samples):
            self.errors.append(f"{self.name}: every subset is_reg: there is nothing to learn")
        return Dataset(
            self.name,
            tuple(self.groups),
            tuple(self.samples),
            tuple(self.validation),
            tuple(dict.fromkeys(self.warnings)),
            tuple(self.errors),
        )


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.split("\n") if line.strip()), "")


def _split(samples: list[Sample]) -> tuple[list[Sample], list[Sample]]:
    """Samples to train on and to validate with; regularisation pictures are all trained on."""
    subset = samples[0].subset
    count = round(len(samples) * subset.validation_split)
    if not count or subset.is_reg:
        return samples, []
    held_out = set(random.Random(subset.validation_seed).sample(range(len(samples)), count))
    kept = [sample for i, sample in enumerate(samples) if i not in held_out]
    return kept, [samples[i] for i in sorted(held_out)]
