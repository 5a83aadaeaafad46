"""The options of a data set: sd-scripts' schema of data.toml, looked up from the nearest table outwards.

A subset's option is looked for in its own table, then in its [[datasets]] table, in [general], on the command
line, and at last here. Sizes are (height, width) in this program, and a side or [width, height] in data.toml.
"""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from flux.errors import FluxError

SIZE_STEP = 16  # pixels: the autoencoder's 8 times the transformer's patches of 2


@dataclass(frozen=True)
class Rule:
    """What an option may be: in words, and as a function that says whether a value is."""

    words: str
    holds: Callable[[Any], bool]


def _integer(low: int, multiple: int = 1) -> Rule:
    words = f"an integer from {low}" + (f", a multiple of {multiple}" if multiple > 1 else "")
    return Rule(words, lambda v: type(v) is int and v >= low and v % multiple == 0)


def _is_size(value: Any) -> bool:
    sides = value if isinstance(value, tuple) else ()
    return len(sides) == 2 and all(type(s) is int and s > 0 and s % SIZE_STEP == 0 for s in sides)


FLAG = Rule("true or false", lambda v: type(v) is bool)
TEXT = Rule("a text", lambda v: isinstance(v, str))
NON_EMPTY = Rule("a text that is not empty", lambda v: isinstance(v, str) and v != "")
RATE = Rule("a number from 0 to 1", lambda v: type(v) in (int, float) and 0 <= v <= 1)
SIZE = Rule(f"a side or [width, height] in pixels, multiples of {SIZE_STEP}", _is_size)


def _option(rule: Rule, default: Any = MISSING) -> Any:
    return field(default=default, metadata={"rule": rule})


@dataclass(frozen=True)
class Group:
    """A [[datasets]] table: pictures that share a size and a batch."""

    resolution: tuple[int, int] = _option(SIZE)  # (height, width)
    batch_size: int = _option(_integer(1), 1)
    enable_bucket: bool = _option(FLAG, False)
    min_bucket_reso: int = _option(_integer(SIZE_STEP, SIZE_STEP), 256)
    max_bucket_reso: int = _option(_integer(SIZE_STEP, SIZE_STEP), 1024)
    bucket_reso_steps: int = _option(_integer(SIZE_STEP, SIZE_STEP), 64)
    bucket_no_upscale: bool = _option(FLAG, False)
    validation_split: float = _option(RATE, 0.0)
    validation_seed: int = _option(_integer(0), 0)


@dataclass(frozen=True)
class Subset:
    """A [[datasets.subsets]] table: one folder, or another source, and what is done with its pictures."""

    num_repeats: int = _option(_integer(1), 1)
    class_tokens: str | None = _option(TEXT, None)
    is_reg: bool = _option(FLAG, False)
    caption_extension: str | None = _option(NON_EMPTY, None)  # None: .caption, then .txt
    shuffle_caption: bool = _option(FLAG, False)
    keep_tokens: int = _option(_integer(0), 0)
    caption_separator: str = _option(NON_EMPTY, ",")
    keep_tokens_separator: str = _option(TEXT, "")
    caption_prefix: str = _option(TEXT, "")
    caption_suffix: str = _option(TEXT, "")
    enable_wildcard: bool = _option(FLAG, False)
    flip_aug: bool = _option(FLAG, False)
    color_aug: bool = _option(FLAG, False)
    random_crop: bool = _option(FLAG, False)
    caption_dropout_rate: float = _option(RATE, 0.0)
    caption_tag_dropout_rate: float = _option(RATE, 0.0)
    caption_dropout_every_n_epochs: int = _option(_integer(0), 0)
    alpha_mask: bool = _option(FLAG, False)


GROUP = {option.name: option for option in fields(Group)}
SUBSET = {option.name: option for option in fields(Subset)}
TABLE_KEYS = {"": ("general", "datasets"), "[[datasets]]": ("subsets",), "subset": ("image_dir",)}


@dataclass(frozen=True)
class Source:
    """A subset's folder and options, and the number of the group that it belongs to."""

    image_dir: str
    group: int
    subset: Subset


def read_toml(path: Path, defaults: Mapping[str, Any]) -> tuple[list[Group], list[Source]]:
    """The groups and subsets of a data.toml.

    defaults: options of the command line, `resolution` as (height, width). FluxError names every unknown key
    with the nearest right one, every value that cannot be, and what is missing, all at once.
    """
    try:
        return parse(_toml().loads(path.read_text(encoding="utf-8")), defaults)
    except OSError as error:
        raise FluxError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:  # FluxError, TOMLDecodeError and UnicodeDecodeError are ValueErrors
        raise FluxError(f"{path}: {error}") from None


def _toml() -> Any:
    try:
        import tomllib
    except ModuleNotFoundError:
        try:
            import tomli as tomllib
        except ModuleNotFoundError:
            raise FluxError(
                "data.toml needs Python 3.11 or newer (or `pip install tomli`); "
                "a folder with train.jsonl works with any"
            ) from None
    return tomllib


def parse(document: Mapping[str, Any], defaults: Mapping[str, Any]) -> tuple[list[Group], list[Source]]:
    """As `read_toml`, of a document that has been read."""
    check_defaults(defaults)
    faults = _unknown("the file", document, {}, TABLE_KEYS[""])
    general = _table(faults, "[general]", document.get("general", {}), GROUP | SUBSET)
    groups, sources = [], []
    for i, table in enumerate(_tables(faults, "[[datasets]]", document.get("datasets")), 1):
        where = f"[[datasets]] {i}"
        dataset = _table(faults, where, table, GROUP | SUBSET, TABLE_KEYS["[[datasets]]"])
        layers = [dataset, general, defaults]
        groups.append(_build(faults, where, Group, layers))
        for j, own in enumerate(_tables(faults, f"{where}: [[datasets.subsets]]", table.get("subsets")), 1):
            place = f"[[datasets]] {i}, subset {j}"
            options = _table(faults, place, own, SUBSET, TABLE_KEYS["subset"])
            if not isinstance(own.get("image_dir"), str) or not own["image_dir"]:
                faults.append(f"{place}: image_dir, the folder of its pictures, is missing")
            subset = _build(faults, place, Subset, [options, *layers])
            sources.append(Source(str(own.get("image_dir")), i - 1, subset))
    if faults:
        raise FluxError("; ".join(dict.fromkeys(faults)))  # a fault of [general] would come once a table
    return groups, sources


def of_options(options: Mapping[str, Any]) -> tuple[Group, Subset]:
    """The options of a source without a data.toml: those of the command line, and the defaults."""
    check_defaults(options)
    faults: list[str] = []
    group, subset = (_build(faults, "the options", kind, [options]) for kind in (Group, Subset))
    if faults:
        raise FluxError("; ".join(faults))
    return group, subset


def check_defaults(options: Mapping[str, Any]) -> None:
    """FluxError where an option is none of the schema's or has a value that cannot be; None is not given."""
    faults = _unknown("the options", options, GROUP | SUBSET, ())
    faults += _wrong_values("the options", {k: v for k, v in options.items() if k in GROUP | SUBSET})
    if faults:
        raise FluxError("; ".join(faults))


def _tables(faults: list[str], where: str, value: Any) -> list[Mapping[str, Any]]:
    if isinstance(value, list) and value and all(isinstance(table, dict) for table in value):
        return value
    faults.append(f"{where}: there should be at least one such table")
    return []


def _table(
    faults: list[str], where: str, table: Any, known: Mapping[str, Any], others: tuple[str, ...] = ()
) -> dict[str, Any]:
    """The options of a table in this program's terms; its faults are added to `faults`."""
    if not isinstance(table, dict):
        faults.append(f"{where} should be a table")
        return {}
    faults += _unknown(where, table, known, others)
    options = {key: _to_height_width(key, value) for key, value in table.items() if key in known}
    faults += _wrong_values(where, options)
    return options


def _to_height_width(key: str, value: Any) -> Any:
    if key != "resolution":
        return value
    return tuple(reversed(value)) if isinstance(value, list) else (value, value)


def _unknown(
    where: str, table: Mapping[str, Any], known: Mapping[str, Any], others: tuple[str, ...]
) -> list[str]:
    faults = []
    for key in table:
        if key in known or key in others:
            continue
        if key in GROUP:
            faults.append(f"{where}: {key} belongs into [[datasets]] or [general]")
            continue
        if key in SUBSET:
            faults.append(f"{where}: {key} belongs into [general], [[datasets]] or a subset")
            continue
        near = difflib.get_close_matches(key, [*known, *others], n=1, cutoff=0.0)
        faults.append(f"{where}: unknown key {key!r}; the nearest right one is {near[0]!r}")
    return faults


def _wrong_values(where: str, options: Mapping[str, Any]) -> list[str]:
    known = GROUP | SUBSET
    return [
        f"{where}: {key} = {_shown(key, value)} should be {known[key].metadata['rule'].words}"
        for key, value in options.items()
        if value is not None and not known[key].metadata["rule"].holds(value)
    ]


def _shown(key: str, value: Any) -> str:
    if key == "resolution" and isinstance(value, tuple) and len(value) == 2:
        return f"{value[1]} wide, {value[0]} high"
    return repr(value).lower() if isinstance(value, bool) else repr(value)


def _build(faults: list[str], where: str, kind: type, layers: list[Mapping[str, Any]]) -> Any:
    """A Group or a Subset from the first layer that has each option."""
    options = {}
    for option in fields(kind):
        values = [layer[option.name] for layer in layers if layer.get(option.name) is not None]
        if values:
            options[option.name] = values[0]
        elif option.default is MISSING:
            faults.append(f"{where}: {option.name} is missing: {option.metadata['rule'].words}")
            return None
    built = kind(**options)
    if kind is Group and not faults:
        faults += [f"{where}: {fault}" for fault in _bucket_faults(built)]
    return built


def _bucket_faults(group: Group) -> list[str]:
    """A range of buckets that leaves out the resolution would silently train at another size."""
    if not group.enable_bucket or group.bucket_no_upscale:  # the latter takes any size
        return []
    if group.min_bucket_reso > min(group.resolution):
        return [f"min_bucket_reso {group.min_bucket_reso} is above the resolution {_name(group.resolution)}"]
    if group.max_bucket_reso < max(group.resolution):
        return [f"max_bucket_reso {group.max_bucket_reso} is below the resolution {_name(group.resolution)}"]
    return []


def _name(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]} (height x width)"
