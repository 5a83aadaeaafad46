"""The options of a data set: sd-scripts' schema of data.toml, looked up from the nearest table outwards.

A subset's option is looked for in its table, then in its [[datasets]] table, in [general], on the command
line, and at last here. Sizes are (height, width) in this program, and a side or [width, height] in data.toml.
"""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from flux import tables
from flux.data import files, sd_scripts
from flux.errors import FluxError
from flux.tables import Faults, option

SIZE_STEP = 16  # pixels: the autoencoder's 8 times the transformer's patches of 2
SIDE = {"least": SIZE_STEP, "multiple": SIZE_STEP, "most": 16384}  # a bound on what a small file can ask for
RATE = {"least": 0, "most": 1}


@dataclass(frozen=True)
class Group:
    """A [[datasets]] table: pictures that share a size and a batch."""

    resolution: tuple[int, int] = option(**SIDE)  # (height, width)
    batch_size: int = option(1, least=1, most=65536)
    enable_bucket: bool = False
    min_bucket_reso: int = option(256, **SIDE)
    max_bucket_reso: int = option(1024, **SIDE)
    bucket_reso_steps: int = option(64, **SIDE)
    bucket_no_upscale: bool = False


@dataclass(frozen=True)
class Subset:
    """A [[datasets.subsets]] table: one folder, or another source, and what is done with its pictures.

    The last five are this project's: which column of a list holds the captions, whether pictures without one
    are meant, a folder of masks under the pictures' names, the weight of what a mask covers, 0 to 1.
    """

    num_repeats: int = option(1, least=1, most=100_000)
    class_tokens: str | None = None
    is_reg: bool = False
    caption_extension: str | None = option(None, filled=True)  # None: .caption, then .txt, then .json
    shuffle_caption: bool = False
    keep_tokens: int = option(0, least=0)
    caption_separator: str = option(",", filled=True)
    keep_tokens_separator: str = ""
    caption_prefix: str = ""
    caption_suffix: str = ""
    enable_wildcard: bool = False
    flip_aug: bool = False
    color_aug: bool = False
    random_crop: bool = False
    caption_dropout_rate: float = option(0.0, **RATE)
    caption_tag_dropout_rate: float = option(0.0, **RATE)
    caption_dropout_every_n_epochs: int = option(0, least=0)
    alpha_mask: bool = False
    validation_split: float = option(0.0, **RATE)
    validation_seed: int = option(0, least=0)
    caption_column: str | None = option(None, filled=True)
    uncaptioned: bool = False
    mask_dir: str | None = option(None, filled=True)
    mask_floor: float = option(0.0, **RATE)

    @property
    def may_lack_captions(self) -> bool:
        """Whether pictures without a caption are meant."""
        return self.uncaptioned or self.caption_dropout_rate > 0 or self.caption_dropout_every_n_epochs > 0


GROUP = {option.name: option for option in fields(Group)}
SUBSET = {option.name: option for option in fields(Subset)}
# Keys of a table that are not options: where the pictures are, and other tables.
PATHS = ("image_dir", "metadata_file")


@dataclass(frozen=True)
class Source:
    """A subset's folder, list and options, and the number of the group that it belongs to.

    image_dir or metadata_file is there; the other may be None.
    """

    image_dir: str | None
    metadata_file: str | None
    group: int
    subset: Subset


def read_toml(path: Path, defaults: Mapping[str, Any], faults: Faults) -> tuple[list[Group], list[Source]]:
    """The groups and subsets of a data.toml.

    defaults: options of the command line, `resolution` as (height, width). Into `faults` comes every key that
    is unknown or not supported, every value that cannot be, and what is missing; what is right is read all
    the same. FluxError for a file that is not TOML.
    """
    text = files.read_text(path)
    try:
        document = tables.parse_toml(text)
    except ValueError as error:  # FluxError and TOMLDecodeError are ValueErrors
        raise FluxError(f"{path}: {error}") from None
    within = Faults()
    found = parse(document, defaults, within)
    for line in within.lines:
        faults.add(str(path), line)
    return found


def parse(
    document: Mapping[str, Any], defaults: Mapping[str, Any], faults: Faults
) -> tuple[list[Group], list[Source]]:
    """As `read_toml`, of a document that has been read."""
    check_defaults(defaults)
    _unknown("the file", document, ("general", "datasets"), faults)
    general = _table("[general]", document.get("general", {}), GROUP | SUBSET, (), faults)
    groups: list[Group] = []
    sources: list[Source] = []
    for i, table in enumerate(_tables("[[datasets]]", document.get("datasets"), faults), 1):
        where = f"[[datasets]] {i}"
        layers = [_table(where, table, GROUP | SUBSET, ("subsets",), faults), general, defaults]
        group = _build(where, Group, layers, faults)
        if group is None:
            continue
        groups.append(group)
        for j, inner in enumerate(_tables(f"{where}: [[datasets.subsets]]", table.get("subsets"), faults), 1):
            sources += _source(f"{where}, subset {j}", inner, len(groups) - 1, layers, faults)
    return groups, sources


def _source(
    where: str, table: Mapping[str, Any], group: int, layers: list[Mapping[str, Any]], faults: Faults
) -> list[Source]:
    options = _table(where, table, SUBSET, PATHS, faults)
    subset = _build(where, Subset, [options, *layers], faults)
    folder, metadata = (table.get(key) for key in PATHS)
    if not all(value is None or (isinstance(value, str) and value) for value in (folder, metadata)):
        faults.add(where, "image_dir and metadata_file should be paths")
    elif folder is None and metadata is None:
        faults.add(where, "image_dir, the folder of its pictures, is missing")
    elif subset is not None:
        return [Source(folder, metadata, group, subset)]
    return []


def of_options(options: Mapping[str, Any]) -> tuple[Group, Subset]:
    """The options of a source without a data.toml: those of the command line, and the defaults."""
    check_defaults(options)
    faults = Faults()
    group, subset = (_build("", kind, [options], faults) for kind in (Group, Subset))
    if faults.lines:
        raise FluxError("; ".join(faults.lines))
    return group, subset


def check_defaults(options: Mapping[str, Any]) -> None:
    """FluxError where an option is not of the schema or has a value that cannot be; None is not given."""
    faults = Faults()
    _unknown("", options, GROUP | SUBSET, faults)
    _values("", {key: value for key, value in options.items() if value is not None}, faults)
    if faults.lines:
        raise FluxError("; ".join(faults.lines))


def _tables(where: str, value: Any, faults: Faults) -> list[Mapping[str, Any]]:
    if isinstance(value, list) and value and all(isinstance(table, dict) for table in value):
        return value
    faults.add(where, "there should be at least one such table")
    return []


def _table(
    where: str, table: Any, known: Mapping[str, Any], others: tuple[str, ...], faults: Faults
) -> dict[str, Any]:
    """The options of a table in this program's terms; what is wrong comes into `faults` and is left out."""
    if not isinstance(table, dict):
        faults.add(where, "should be a table")
        return {}
    table = {sd_scripts.ALIASES.get(key, key): value for key, value in table.items()}
    _unknown(where, table, (*known, *others), faults)
    return _values(where, {key: _height_width(key, v) for key, v in table.items() if key in known}, faults)


def _height_width(key: str, value: Any) -> Any:
    if key != "resolution":
        return value
    return tuple(reversed(value)) if isinstance(value, list) else (value, value)


def _values(where: str, options: Mapping[str, Any], faults: Faults) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for kind, known in ((Group, GROUP), (Subset, SUBSET)):
        found |= tables.given(kind, {k: v for k, v in options.items() if k in known}, where, faults)
    return found


def _unknown(where: str, table: Mapping[str, Any], known: Any, faults: Faults) -> None:
    for key, value in table.items():
        if key in known or sd_scripts.passes(key, value):
            continue
        if key in GROUP:
            faults.add(where, f"{key} belongs into [[datasets]] or [general]")
        elif key in SUBSET:
            faults.add(where, f"{key} belongs into [general], [[datasets]] or a subset")
        else:
            refusal = sd_scripts.refusal(key)
            faults.add(where, refusal or f"unknown key {key!r}{tables.close(str(key), known)}")


def _build(where: str, kind: type, layers: list[Mapping[str, Any]], faults: Faults) -> Any:
    """A Group or a Subset from the first layer that has each option; None where one is missing."""
    options = {}
    for each in fields(kind):
        values = [layer[each.name] for layer in layers if layer.get(each.name) is not None]
        if values:
            options[each.name] = values[0]
        elif each.default is MISSING:
            faults.add(where, f"{each.name} is missing: a side or [width, height], multiples of {SIZE_STEP}")
            return None
    built = kind(**options)
    if kind is Group:
        _check_buckets(where, built, faults)
    return built


def _check_buckets(where: str, group: Group, faults: Faults) -> None:
    """A range of buckets that leaves out the resolution would silently train at another size."""
    if not group.enable_bucket or group.bucket_no_upscale:  # the latter takes any size
        return
    size = f"{group.resolution[0]}x{group.resolution[1]} (height x width)"
    if group.min_bucket_reso > min(group.resolution):
        faults.add(where, f"min_bucket_reso {group.min_bucket_reso} is above the resolution {size}")
    if group.max_bucket_reso < max(group.resolution):
        faults.add(where, f"max_bucket_reso {group.max_bucket_reso} is below the resolution {size}")
