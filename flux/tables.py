"""From tables of a file to data classes: the fields of a class are the keys that its table may have.

The reader knows no key. A class says what it takes (type, default, bounds) and whoever uses it reads the same
fields, so nothing is admitted that is then not understood. Every fault is collected; none ends the reading.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any

from flux import jsonfiles
from flux.errors import FluxError
from flux.jsonfiles import shown

MAX_BYTES = 2**18  # of a file of options: tomllib and PyYAML take seconds for more
MAX_YAML = 2**16
MAX_DOTS = 64  # in a line of TOML: for a key of n parts tomllib keeps n ** 2 / 2 of them, 10 GB for 100 KB
TOO_DEEP = "its tables and lists are nested too deeply"
MAX_VALUES = 100_000  # of a file, where YAML's aliases are as many values as they stand for


def read_file(path: Path) -> dict[str, Any]:
    """The tables of a YAML, TOML or JSON file, by its suffix. FluxError for any other file."""
    readers: dict[str, Callable[[str], Any]] = {
        ".yaml": _yaml,
        ".yml": _yaml,
        ".toml": parse_toml,
        ".json": jsonfiles.parse,
    }
    if path.suffix not in readers:
        raise FluxError(f"{path}: the suffix of a file of options must be one of {', '.join(readers)}")
    try:
        text = jsonfiles.read_bytes(path, MAX_BYTES).decode("utf-8-sig")
        tables = readers[path.suffix](text)
    except ValueError as error:  # also FluxError and UnicodeDecodeError
        raise FluxError(f"{path}: {' '.join(str(error).split())}") from None
    if not isinstance(tables, dict):
        raise FluxError(f"{path}: must hold a table of keys, not a {type(tables).__name__}")
    return tables


def parse_toml(text: str) -> dict[str, Any]:
    """The tables of a TOML text. ValueError where it is not TOML or beyond bounds.

    FluxError without a reader for it.
    """
    if len(text) > MAX_BYTES:
        raise ValueError(f"it has {len(text)} letters; {MAX_BYTES} are the most that is read")
    for number, line in enumerate(text.split("\n"), 1):
        if line.count(".") > MAX_DOTS:
            raise ValueError(
                f"line {number} has {line.count('.')} dots; {MAX_DOTS} are the most that is read"
            )
    try:
        import tomllib
    except ImportError:  # Python 3.10
        try:
            import tomli as tomllib  # type: ignore[no-redef]  # the same functions
        except ImportError:
            raise FluxError("TOML needs Python 3.11 or newer, or `pip install tomli`") from None
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None


def _yaml(text: str) -> Any:
    try:
        import yaml  # comes with huggingface-hub
    except ImportError:
        raise FluxError("YAML needs `pip install pyyaml`; TOML and JSON do not") from None
    if len(text) > MAX_YAML:
        raise ValueError(f"it has {len(text)} letters; {MAX_YAML} are the most that is read of YAML")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(error) from None
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    _check_count(value)
    return value


def _check_count(value: Any) -> None:
    """ValueError for more values than a file can have without aliases, also of one that holds itself."""
    waiting, found = [value], 0
    while waiting:
        each = waiting.pop()
        inner = list(each.values()) if isinstance(each, dict) else each if isinstance(each, list) else []
        found += len(inner)
        if found > MAX_VALUES:
            raise ValueError(f"more than {MAX_VALUES} values")
        waiting += inner


class Faults:
    """What is wrong with a file: one line each, with the key that it concerns."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, where: str, text: str) -> None:
        """Adds a line. where: the key, "" for the whole file."""
        self.lines.append(f"{where}: {text}" if where else text)


@dataclass(frozen=True)
class Bounds:
    """What a value must be besides its type. `kinds`: the table is one of these classes, named by `type`."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    multiple: int | None = None
    filled: bool = False  # of a text: not empty
    choices: tuple[str, ...] = ()
    kinds: Mapping[str, type] | None = None

    def fault(self, value: Any) -> str | None:
        """What the value must be and is not: what a line says after the value. None where it is right."""
        if self.choices and value not in self.choices:
            return f"must be one of {', '.join(self.choices)}"
        if isinstance(value, float) and not math.isfinite(value):
            return "must be a finite number"
        if self.least is not None and not value >= self.least:
            return f"must be at least {self.least}"
        if self.above is not None and not value > self.above:
            return f"must be above {self.above}"
        if self.most is not None and not value <= self.most:
            return f"must be at most {self.most}"
        if self.below is not None and not value < self.below:
            return f"must be below {self.below}"
        if self.multiple is not None and value % self.multiple:
            return f"must be a multiple of {self.multiple}"
        if self.filled and not value:
            return "must not be empty"
        return None


def faults_of(instance: Any) -> dict[str, str]:
    """What is wrong with a data class's values by the bounds of its fields: name -> "VALUE must be ...".

    None is right everywhere: it stands for what is not given.
    """
    found = {}
    for f in dataclasses.fields(instance):
        value = getattr(instance, f.name)
        text = f.metadata.get("bounds", Bounds()).fault(value) if value is not None else None
        if text:
            found[f.name] = f"{shown(value)} {text}"
    return found


def option(default: Any = MISSING, **bounds: Any) -> Any:
    """A field with bounds; without a default it must be given."""
    return field(default=default, metadata=limits(**bounds))


def limits(**bounds: Any) -> dict[str, Any]:
    """The metadata of a field with bounds, where `option` cannot serve."""
    return {"bounds": Bounds(**bounds)}


def read(cls: type, table: Any, where: str, faults: Faults, derived: tuple[str, ...] = ()) -> Any:
    """An instance of a data class from its table; None, and lines in `faults`, if that is impossible.

    `derived` fields follow from other parts of the file and are not keys. A key that is null is not given.
    """
    if not isinstance(table, Mapping):
        faults.add(where, f"must be a table of keys, not {shown(table)}")
        return None
    fields = {f.name: f for f in dataclasses.fields(cls) if f.name not in derived}
    before = len(faults.lines)
    for name in table:
        if name not in fields:
            faults.add(where, f"unknown key {shown(name)}{nearest(str(name), fields)}")
    table = {name: table[name] for name in fields if table.get(name) is not None}
    values = given(cls, table, where, faults)
    for name, f in fields.items():
        if name not in table and f.default is MISSING and f.default_factory is MISSING:
            faults.add(where, f"the key {name!r} is missing")
    if len(faults.lines) > before:
        return None
    try:
        return cls(**values)
    except FluxError as error:  # of a class that checks how its fields go together
        faults.add(where, str(error))
        return None


def partly(cls: type, table: Any) -> Any:
    """What can be read of a table with faults, with defaults for the rest; None if that makes no instance."""
    if not isinstance(table, Mapping):
        return None
    known = {name: table[name] for name in field_names(cls) if table.get(name) is not None}
    try:
        return cls(**given(cls, known, "", Faults()))
    except (FluxError, TypeError):  # a class that checks its fields; a field without a default
        return None


def given(cls: type, table: Mapping[str, Any], where: str, faults: Faults) -> dict[str, Any]:
    """The values of a data class's fields that a table has; those with faults are left out of it."""
    hints, found = typing.get_type_hints(cls), {}
    bounds = {f.name: f.metadata.get("bounds", Bounds()) for f in dataclasses.fields(cls)}
    for name, value in table.items():
        before = len(faults.lines)
        read_value = _value(hints[name], value, bounds[name], f"{where}.{name}".strip("."), faults)
        if len(faults.lines) == before:
            found[name] = read_value
    return found


def field_names(cls: type) -> list[str]:
    """The keys of a data class's table."""
    return [f.name for f in dataclasses.fields(cls)]


def nearest(name: str, known: Any) -> str:
    """ "; did you mean X?", or what there is to choose from."""
    return close(name, known) or f"; known: {', '.join(known)}"


def close(name: str, known: Any) -> str:
    """ "; did you mean X?" where a name is near; else ""."""
    found = difflib.get_close_matches(name, list(known), 1, 0.7)
    return f"; did you mean {found[0]!r}?" if found else ""


def _value(hint: Any, value: Any, bounds: Bounds, where: str, faults: Faults) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        kinds = [a for a in arguments if a is not type(None)]
        if value is None and len(kinds) < len(arguments):
            return None
        matching = [a for a in kinds if _fits(a, value)] or kinds
        return _value(matching[0], value, bounds, where, faults)
    if origin is dict:
        return _table(arguments[1], value, bounds, where, faults)
    if origin is tuple:
        return _sequence(arguments, value, bounds, where, faults)
    if bounds.kinds is not None:
        return _kind(value, bounds.kinds, where, faults)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return read(hint, value, where, faults)
    return _scalar(hint, value, bounds, where, faults)


def _fits(hint: Any, value: Any) -> bool:
    """Whether a value is of this kind, of the several that a field may have."""
    if typing.get_origin(hint) is tuple:
        return isinstance(value, (list, tuple))
    return isinstance(value, str) == (hint is str) and not isinstance(value, (list, tuple))


def _table(hint: Any, value: Any, bounds: Bounds, where: str, faults: Faults) -> Any:
    if not isinstance(value, Mapping):
        faults.add(where, f"must be a table by name, not {shown(value)}")
        return None
    for name in value:
        if bounds.choices and name not in bounds.choices:
            faults.add(where, f"unknown name {shown(name)}{nearest(str(name), bounds.choices)}")
    inner = dataclasses.replace(bounds, choices=())
    given = {n: v for n, v in value.items() if v is not None}
    return {n: _value(hint, v, inner, f"{where}.{n}", faults) for n, v in given.items()}


def _sequence(arguments: tuple, value: Any, bounds: Bounds, where: str, faults: Faults) -> Any:
    if not isinstance(value, (list, tuple)):
        faults.add(where, f"must be a list, not {shown(value)}")
        return None
    if arguments[-1] is not Ellipsis and len(value) != len(arguments):
        faults.add(where, f"must have {len(arguments)} elements, not {len(value)}")
        return None
    return tuple(_value(arguments[0], element, bounds, where, faults) for element in value)


def _kind(value: Any, kinds: Mapping[str, type], where: str, faults: Faults) -> Any:
    """One of several classes: `{type: NAME, ...}`, or the name alone."""
    table = {"type": value} if isinstance(value, str) else value
    if not isinstance(table, Mapping) or "type" not in table:
        faults.add(where, f"must be a table with the key 'type' ({', '.join(kinds)}), not {shown(value)}")
        return None
    names = {name.lower(): cls for name, cls in kinds.items()}
    kind = str(table["type"]).lower().replace("-", "_")
    if kind not in names:
        faults.add(where, f"unknown type {shown(table['type'])}{nearest(kind, kinds)}")
        return None
    return read(names[kind], {k: v for k, v in table.items() if k != "type"}, where, faults)


def _scalar(hint: type, value: Any, bounds: Bounds, where: str, faults: Faults) -> Any:
    if hint is float and isinstance(value, str):
        value = _number(value)  # YAML 1.1 takes 1e-4, without a point, for a string
    right = {float: (int, float), int: (int,), str: (str,), bool: (bool,)}[hint]
    if not isinstance(value, right) or (isinstance(value, bool) and hint is not bool):
        words = {float: "a number", int: "a whole number", str: "a text", bool: "true or false"}
        faults.add(where, f"must be {words[hint]}, not {shown(value)}")
        return None
    if text := bounds.fault(value):
        faults.add(where, f"{shown(value)} {text}")
    return float(value) if hint is float else value


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
