"""JSON from files of strangers: bounded in size, depth and count before `json` reads it, unambiguous after.

`json` itself takes any size and depth, the last of two equal keys, NaN, and text that is not Unicode.
"""

import json
import math
import stat
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np

from flux.errors import FluxError
from flux.outputs import replacing

MAX_BYTES = 64 * 2**20  # the largest tokenizer.json that is in use has 33 MB
MAX_DEPTH = 32  # a tokenizer.json has 7
MAX_VALUES = 1_000_000  # of about 100 bytes each; CLIP's tokenizer has 200,000
MAX_NUMBER = 3e38  # of float32
MAX_COUNT = 2**24  # rows, pixels, tokens: no config comes near
MAX_LIST = 64
NOT_JSON = "not JSON"  # what the line begins with where `json` cannot read a text
OPENING, CLOSING = (np.frombuffer(signs, np.uint8) for signs in (b"[{", b"]}"))


def read(path: Path, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """The JSON object in a file. FluxError, one line that names the file, where it holds something else."""
    try:
        return parse_object(read_bytes(path, max_bytes))
    except ValueError as error:
        raise FluxError(f"{path}: {error}") from None


def write(path: Path, table: Mapping[str, Any]) -> None:
    """Writes an object, whole or not at all. FluxError where the disk refuses."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial_file:
            partial_file.write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise FluxError(f"{path}: cannot be written: {error.strerror}") from None


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """A file's content. ValueError, without the file's name, where it cannot be read or is larger."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would block, /dev/zero has no end
            raise ValueError("not a file")
        if status.st_size > max_bytes:
            raise ValueError(f"it has {status.st_size} bytes; {max_bytes} are the most that is read")
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None


def read_text(path: Path, max_bytes: int = MAX_BYTES) -> str:
    """A file's text, in UTF-8. FluxError, one line that names the file, where it cannot be read as that."""
    try:
        return read_bytes(path, max_bytes).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise FluxError(f"{path}: its text is not UTF-8") from None
    except ValueError as error:
        raise FluxError(f"{path}: {error}") from None


def parse_object(text: bytes | str, infinite: bool = False) -> dict[str, Any]:
    """As `parse`, and ValueError too where it is not an object."""
    value = parse(text, infinite)
    if not isinstance(value, dict):
        raise ValueError(f"should hold a JSON object, not {_kind(value)}")
    return value


def parse(text: bytes | str, infinite: bool = False, max_values: int = MAX_VALUES) -> Any:
    """The value of a JSON text in UTF-8. ValueError, in one line, for what is not JSON or beyond bounds.

    Refused, other than by `json`: deep nesting, very many values, a key that comes twice in an object, text
    with half of a surrogate pair, and, unless they may be `infinite`, NaN and numbers beyond a float.
    """
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    _check_structure(data, max_values)
    read_number = float if infinite else _float
    try:
        value = json.loads(
            data.decode("utf-8-sig"),
            object_pairs_hook=_object,
            parse_constant=read_number,
            parse_float=read_number,
        )
        if rb"\ud" in data.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeError:
        raise ValueError("its text is not UTF-8, or holds half of a surrogate pair") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{NOT_JSON}: {error}") from None
    return value


def _check_structure(data: bytes, max_values: int) -> None:
    """Depth and count from the signs outside of texts, at numpy's speed; short ones need no look."""
    if data.count(b"[") + data.count(b"{") <= MAX_DEPTH and data.count(b",") <= max_values:
        return
    signs = np.frombuffer(data.replace(rb"\\", b"").replace(rb"\"", b""), np.uint8)
    signs = signs[~np.bitwise_xor.accumulate(signs == ord('"'))]
    if np.count_nonzero(signs == ord(",")) > max_values:
        raise ValueError(f"more than {max_values} values")
    steps = np.isin(signs, OPENING).astype(np.int8) - np.isin(signs, CLOSING)
    if (depth := np.cumsum(steps[steps != 0], dtype=np.int32).max(initial=0)) > MAX_DEPTH:
        raise ValueError(f"nested {depth} deep; {MAX_DEPTH} is the most that is read")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {shown(twice)} comes twice")
    return out


def _float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:20]} is not a number of JSON's")
    return value


# --- What a value should be ---


def number(value: Any, what: str) -> float:
    """A JSON number as a float. FluxError, naming what it is, where it is not a finite number of float32."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MAX_NUMBER:
        raise FluxError(f"{what} is {shown(value)}; it should be a finite number")
    return float(value)


def positive(value: Any, what: str) -> float:
    """As `number`, and above 0."""
    if (found := number(value, what)) <= 0:
        raise FluxError(f"{what} is {found:g}; it should be above 0")
    return found


def count(value: Any, what: str, least: int = 1, most: int = MAX_COUNT) -> int:
    """A whole number within bounds. FluxError, naming what it is, for others."""
    if type(value) is not int or not least <= value <= most:
        raise FluxError(f"{what} is {shown(value)}; it should be a whole number from {least} to {most}")
    return value


def counts(value: Any, what: str) -> tuple[int, ...]:
    """A list of whole numbers above 0."""
    if not isinstance(value, list) or not 0 < len(value) <= MAX_LIST:
        raise FluxError(f"{what} is {shown(value)}; it should be a list of whole numbers")
    return tuple(count(item, what) for item in value)


def text(value: Any, what: str) -> str:
    """A text, which is not very long."""
    if not isinstance(value, str) or len(value) > 1000:
        raise FluxError(f"{what} is {shown(value)}; it should be a text")
    return value


def fields(kind: type, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Values for the fields of a dataclass, lists as tuples.

    FluxError for one that is not of its field's type, or no whole number from 0, which may still be too
    little for those who use it. where: the file, for errors.
    """
    hints = get_type_hints(kind)
    if unknown := [shown(name) for name in values if name not in hints]:
        raise FluxError(f"{where}: {unknown[0]} is not known; it may have {', '.join(hints)}")
    return {name: _field(hints[name], value, f"{where}: {name}") for name, value in values.items()}


def _field(hint: Any, value: Any, what: str) -> Any:
    if get_origin(hint) is tuple:
        if not isinstance(value, list) or not 0 < len(value) <= MAX_LIST:
            raise FluxError(f"{what} is {shown(value)}; it should be a list")
        kinds = get_args(hint)
        if kinds[-1] is not ... and len(kinds) != len(value):
            raise FluxError(f"{what} is {shown(value)}; it should be a list of {len(kinds)}")
        return tuple(_field(kinds[0], item, what) for item in value)
    if hint is bool:
        if not isinstance(value, bool):
            raise FluxError(f"{what} is {shown(value)}; it should be true or false")
        return value
    if type(None) in get_args(hint):
        return None if value is None else _field(get_args(hint)[0], value, what)
    readers: dict[Any, Callable[[Any, str], Any]] = {int: partial(count, least=0), float: number, str: text}
    return readers[hint](value, what)


def shown(value: object) -> str:
    """A value as an error line quotes it: on one line, in ASCII where it has to be, not too long."""
    text = ascii(value) if not isinstance(value, str) or not value.isprintable() else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _kind(value: object) -> str:
    names = {list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
