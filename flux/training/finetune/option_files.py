"""Options in a file, and the options of a run kept beside it: YAML, TOML or JSON, one key an option."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from flux import jsonfiles, tables
from flux.data.schema import GROUP, SUBSET, Group, Subset
from flux.errors import FluxError
from flux.tables import Faults
from flux.training.finetune import foreign_options as foreign
from flux.training.finetune.options import PARTS, Options, shown

KEPT = "options.json"  # in the run's folder
TABLES = ("data_options", "files")  # of Options, whose keys are options by themselves
OPTIONS = tuple(field.name for field in fields(Options) if field.name not in TABLES)
ELSEWHERE = ("config", *PARTS)  # texts that are no fields of one of the classes
LISTS = ("progress_prompts", "adapters")

Converter = Callable[[str], Any]


def read(path: Path, texts: Mapping[str, Converter]) -> tuple[dict[str, Any], list[str]]:
    """As `of_table`, of a file."""
    faults = Faults()
    found = of_table(tables.read_file(path), texts, faults)
    if faults.lines:
        raise FluxError("; ".join(f"{path}: {line}" for line in faults.lines))
    return found


def of_table(
    table: Mapping[str, Any], texts: Mapping[str, Converter], faults: Faults
) -> tuple[dict[str, Any], list[str]]:
    """The options of a table by our names, and what is not used of it, a line each.

    Keys are long options of the command line or names of other trainers, in tables of any name. texts: reads
    the values that the command line has as texts. Every fault comes into `faults`.
    """
    notes: list[str] = []
    given: dict[str, Any] = {}
    for key, value in _flat(table):
        name = _ours(key)
        if name is None:
            _unknown(key, value, faults, notes)
        elif foreign.in_iterations(name) in map(foreign.in_iterations, given):
            faults.add(key, f"{_called(foreign.in_iterations(name))} is given twice")
        elif value is not None:
            value, note = foreign.translated(name, value)
            notes += [f"{key}: {note}"] * bool(note)
            of_file = Faults()
            given[name] = None if value is None else _checked(name, value, texts, of_file)
            for line in of_file.lines:
                faults.add(key, line.removeprefix(f"{name}: "))
    return {name: value for name, value in given.items() if value is not None}, notes


def merged(file: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a file and of the command line, which goes first, in our units."""
    left = dict(file)
    for one_of in (("iterations", "epochs", "max_updates"), ("data", "config")):
        if given.keys() & set(one_of):
            left = {name: value for name, value in left.items() if name not in one_of}
    both = {**left, **given}
    return foreign.iterations(both, both.get("accumulate", 1))


def save(options: Options) -> None:
    """Keeps a run's options in its folder, as `read` takes them."""
    jsonfiles.write(Path(options.output_dir).expanduser() / KEPT, as_table(options))


def as_table(options: Options) -> dict[str, Any]:
    """The options that are not left to the program, by the command line's names."""
    flat = {name: getattr(options, name) for name in OPTIONS}
    flat |= options.data_options | options.files
    flat["adapters"] = [f"{file}:{strength:g}" for file, strength in options.adapters]
    if resolution := options.data_options.get("resolution"):
        flat["resolution"] = "x".join(map(str, resolution))
    given = {name: value for name, value in flat.items() if value not in (None, (), [])}
    return {_called(name): value for name, value in given.items() if value is not False}


def _flat(table: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The keys of a table and of those inside it."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value)
        else:
            yield str(key).replace("-", "_"), value


def _known() -> dict[str, str]:
    """Every name of an option -> our name."""
    ours = [*OPTIONS, *GROUP, *SUBSET, *ELSEWHERE]
    return {
        **{name: name for name in ours},
        **{_called(name).replace("-", "_"): name for name in ours},
        **foreign.OURS,
    }


def _ours(key: str) -> str | None:
    return _known().get(key)


def _called(name: str) -> str:
    return shown(name).removeprefix("--")


def _unknown(key: str, value: Any, faults: Faults, notes: list[str]) -> None:
    if foreign.passes(key, value):
        return
    if key in foreign.LEFT_OUT:
        notes.append(f"{key} is not used: {foreign.LEFT_OUT[key]}")
    else:
        known = [_called(name) for name in _known().values()]
        faults.add("", f"unknown option {key!r}{tables.close(key.replace('_', '-'), [*known, *_known()])}")


def _checked(name: str, value: Any, texts: Mapping[str, Converter], faults: Faults) -> Any:
    """The value of an option, converted; None, and lines in `faults`, where it cannot be."""
    if name in LISTS and isinstance(value, str):
        value = [value]
    if name == "targets" and isinstance(value, list):
        value = ",".join(map(str, value))
    if name in texts:
        return _from_text(name, value, texts[name], faults)
    if name in foreign.IN_UPDATES:
        return tables.given(Options, {"iterations": value}, "", faults).get("iterations")
    if name in ELSEWHERE:
        if not isinstance(value, str):
            faults.add(name, f"must be a text, not {value!r}")
        return value
    kind = Options if name in OPTIONS else Group if name in GROUP else Subset
    return tables.given(kind, {name: value}, "", faults).get(name)


def _from_text(name: str, value: Any, convert: Converter, faults: Faults) -> Any:
    """Of a text, a number or a list of texts."""
    try:
        if isinstance(value, list):
            return tuple(convert(str(each)) for each in value)
        return convert(str(value))
    except FluxError as error:
        faults.add(name, str(error))
        return None
