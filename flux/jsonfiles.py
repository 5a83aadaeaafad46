"""JSON from files of strangers: bounded in size, depth and count before `json` reads it, unambiguous after.

`json` itself takes any size and depth, the last of two equal keys, NaN, and text that is not Unicode.
"""

import json
import math
import stat
from pathlib import Path
from typing import Any

import numpy as np

from flux.errors import FluxError

MAX_BYTES = 64 * 2**20  # the largest tokenizer.json that is in use has 33 MB
MAX_DEPTH = 32  # a tokenizer.json has 7
MAX_VALUES = 1_000_000  # of about 100 bytes each; CLIP's tokenizer has 200,000
OPENING, CLOSING = (np.frombuffer(signs, np.uint8) for signs in (b"[{", b"]}"))


def read(path: Path, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """The JSON object in a file. FluxError, one line that names the file, where it holds something else."""
    try:
        return parse_object(read_bytes(path, max_bytes))
    except ValueError as error:
        raise FluxError(f"{path}: {error}") from None


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


def parse_object(text: bytes | str) -> dict[str, Any]:
    """As `parse`, and ValueError too for what is no object."""
    value = parse(text)
    if not isinstance(value, dict):
        raise ValueError(f"should hold a JSON object, not {_kind(value)}")
    return value


def parse(text: bytes | str) -> Any:
    """The value of a JSON text in UTF-8. ValueError, in one line, for what is not JSON or beyond bounds.

    Refused, other than by `json`: deep nesting, very many values, a key that comes twice in an object, NaN
    and numbers beyond a float, and text with half of a surrogate pair.
    """
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    _check_structure(data)
    try:
        value = json.loads(
            data.decode("utf-8-sig"),
            object_pairs_hook=_object,
            parse_constant=_number,
            parse_float=_number,
        )
        if rb"\ud" in data.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeError:
        raise ValueError("not JSON: its text is not UTF-8, or holds half of a surrogate pair") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from None
    return value


def _check_structure(data: bytes) -> None:
    """Depth and count from the signs outside of strings, at numpy's speed."""
    if data.count(b'"') > 8 * MAX_VALUES:  # two around each text, and a key before each value
        raise ValueError(f"more than {MAX_VALUES} values")
    bare = data.replace(rb"\\", b"").replace(rb"\"", b"")
    signs = np.frombuffer(b"".join(bare.split(b'"')[::2]), np.uint8)
    if np.count_nonzero(signs == ord(",")) > MAX_VALUES:
        raise ValueError(f"more than {MAX_VALUES} values")
    steps = np.isin(signs, OPENING).astype(np.int8) - np.isin(signs, CLOSING)
    if (depth := np.cumsum(steps[steps != 0], dtype=np.int32).max(initial=0)) > MAX_DEPTH:
        raise ValueError(f"nested {depth} deep; {MAX_DEPTH} is the most that is read")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {shown(twice)} comes twice")
    return out


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is no number that JSON has")
    return value


def shown(value: object) -> str:
    """A value as an error line quotes it: on one line, in ASCII where it has to be, not too long."""
    text = ascii(value) if not isinstance(value, str) or not value.isprintable() else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _kind(value: object) -> str:
    names = {list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
