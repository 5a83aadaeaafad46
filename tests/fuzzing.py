"""Files as a stranger may have made them: valid small files, spoilt in one or two places, by a seed.

A mutation takes a file apart and puts it together again, so that what is spoilt is one thing at a time: a
shape, an offset, a name, a type, a number, a text. Random bytes alone would end at the first check.
"""

import copy
import json
import random
import resource
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from flux.errors import FluxError

SIZES = {
    "F8_E4M3": 1,
    "F64": 8,
    "I64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "U8": 1,
    "BOOL": 1,
}
DEEP: Any = {"a": 1}
for _ in range(40):
    DEEP = [DEEP, {"b": DEEP}] if len(json.dumps(DEEP)) < 4000 else [DEEP]
JUNK: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 3, 2.5, 1e30, 1e400, float("nan"), 2**31, 2**63, 10**18, 10**400),
    *("", "x", "64", "a\nb", "\ud800", "\0", "x" * 5000, [], [1], [[]], [0, 0], {}, {"a": 1}, DEEP),
)


class Broken(AssertionError):
    """A case that ended in neither a result nor a clear line."""


@dataclass
class File:
    """A safetensors file taken apart. exact: whether what is read of it, if anything, must be as it was."""

    header: dict[str, Any]
    data: bytearray
    exact: bool = True
    raw: list[Callable[[bytes], bytes]] = field(default_factory=list)  # done to the bytes at the end

    @classmethod
    def read(cls, path: Path) -> "File":
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        return cls(json.loads(content[8 : 8 + length]), bytearray(content[8 + length :]))

    def copy(self) -> "File":
        return copy.deepcopy(self)

    def names(self) -> list[str]:
        return [name for name in self.header if name != "__metadata__"]

    def write(self, path: Path) -> None:
        text = json.dumps(self.header).encode()
        content = len(text).to_bytes(8, "little") + text + self.data
        for change in self.raw:
            content = change(content)
        path.write_bytes(content)

    def resize(self, name: str, content: bytes) -> None:
        """Another content of another length; all the offsets follow."""
        start, end = self.header[name]["data_offsets"]
        self.data[start:end] = content
        for other in self.names():
            offsets = self.header[other]["data_offsets"]
            self.header[other]["data_offsets"] = [
                n + len(content) - (end - start) if n >= end and (other, i) != (name, 0) else n
                for i, n in enumerate(offsets)
            ]
        self.header[name]["data_offsets"] = [start, start + len(content)]


Mutation = Callable[[File, random.Random], None]


def junk_somewhere(file: File, rng: random.Random) -> None:
    """Anything in the place of any value of the header."""
    name = rng.choice([*file.header, "__metadata__"])
    value = rng.choice(JUNK)
    entry = file.header.get(name)
    if not isinstance(entry, dict) or not entry or rng.random() < 0.2:
        file.header[name] = value
        return
    key = rng.choice(list(entry))
    if isinstance(entry[key], list) and entry[key] and rng.random() < 0.5:
        entry[key][rng.randrange(len(entry[key]))] = value
    else:
        entry[key] = value


def shift_offsets(file: File, rng: random.Random) -> None:
    offsets = file.header[rng.choice(file.names())]["data_offsets"]
    step = rng.choice((-8, -4, -1, 1, 4, 8, len(file.data), 2**40))
    for i in rng.choice(((0,), (1,), (0, 1))):
        offsets[i] += step


def exchange_offsets(file: File, rng: random.Random) -> None:
    """Two tensors on the same bytes."""
    one, other = rng.sample(file.names(), 2)
    file.header[one]["data_offsets"] = list(file.header[other]["data_offsets"])
    if rng.random() < 0.5:
        file.header[one]["shape"] = list(file.header[other]["shape"])


def other_shape(file: File, rng: random.Random) -> None:
    """Of the same size: an axis too few or too many, or the axes in another order."""
    name = rng.choice(file.names())
    entry = file.header[name]
    file.exact &= "relative_attention_bias" not in name  # its shape alone says how many heads T5 has
    shape = entry["shape"]
    entry["shape"] = rng.choice(
        ([_product(shape)], [1, *shape], [*shape, 1], shape[::-1], [_product(shape), 1], shape + [1] * 12)
    )


def empty(file: File, rng: random.Random) -> None:
    name = rng.choice(file.names())
    entry = file.header[name]
    file.resize(name, b"")
    entry["shape"] = rng.choice(
        ([0, *entry["shape"][1:]], [0], [*entry["shape"], 0], [0, 2**31], [0, 10**18])
    )


def other_type(file: File, rng: random.Random) -> None:
    """Another type for the same bytes, or for as many numbers."""
    name = rng.choice(file.names())
    entry = file.header[name]
    if rng.random() < 0.5:
        same = [kind for kind, size in SIZES.items() if size == SIZES.get(entry["dtype"])]
        entry["dtype"] = rng.choice([*same, "F4", "F8_E8M0", "C64", "float32"])
        file.exact &= entry["dtype"] not in ("F16", "BF16")  # of one tensor, nobody can tell
    else:
        entry["dtype"] = rng.choice(list(SIZES))
        file.resize(name, rng.randbytes(SIZES[entry["dtype"]] * _product(entry["shape"])))
        file.exact = False


def rename(file: File, rng: random.Random) -> None:
    name = rng.choice(file.names())
    number = rng.choice(("1000000", "1000000000000000000", "-1", "01", "٣", "9" * 600, "511", "x", ""))
    digits = [i for i, part in enumerate(name.split(".")) if part.isdigit()]
    if digits and rng.random() < 0.6:
        parts = name.split(".")
        parts[rng.choice(digits)] = number
        new = ".".join(parts)
    else:
        new = rng.choice(
            (name + ".weight", name[:-1], "model." + name, name.upper(), "", "\ud800" + name, name + "\n")
        )
    file.header = {new if key == name else key: value for key, value in file.header.items()}


def drop(file: File, rng: random.Random) -> None:
    name = rng.choice(file.names())
    file.resize(name, b"")
    del file.header[name]


def add(file: File, rng: random.Random) -> None:
    name = rng.choice(("extra", rng.choice(file.names()) + ".scales", "logit_scale", "scaled_fp8", "a.b.c"))
    start = len(file.data)
    kind = rng.choice(("F32", "U32", "F16", "U8"))
    file.data += rng.randbytes(SIZES[kind] * 4)
    file.header[name] = {"dtype": kind, "shape": [4], "data_offsets": [start, len(file.data)]}


def twice(file: File, rng: random.Random) -> None:
    """A key twice, which json takes for one."""
    name = rng.choice(file.names())
    entry = {**file.header[name], "shape": file.header[name]["shape"][::-1]}
    extra = b"," + json.dumps({name: entry}).encode()[1:]

    def change(content: bytes) -> bytes:
        length = int.from_bytes(content[:8], "little")
        text = content[8 : 8 + length][:-1] + extra
        return len(text).to_bytes(8, "little") + text + content[8 + length :]

    file.raw.append(change)


def cut_or_longer(file: File, rng: random.Random) -> None:
    keep, more = rng.random(), rng.randbytes(rng.choice((1, 8, 1000)))
    cut = rng.random() < 0.5
    file.raw.append(lambda content: content[: int(len(content) * keep)] if cut else content + more)


def other_length(file: File, rng: random.Random) -> None:
    """Of the header, in the file's first 8 bytes."""
    value = rng.choice((0, 1, 2, 100, 2**31, 2**63, 2**64 - 1))
    file.raw.append(lambda content: value.to_bytes(8, "little") + content[8:])


def bytes_of_the_header(file: File, rng: random.Random) -> None:
    places = [rng.random() for _ in range(rng.choice((1, 3, 30)))]
    values = rng.randbytes(len(places))

    def change(content: bytes) -> bytes:
        out = bytearray(content)
        length = min(int.from_bytes(content[:8], "little"), len(content) - 9)
        for place, value in zip(places, values, strict=True):
            out[8 + int(place * length)] = value
        return bytes(out)

    file.raw.append(change)
    file.exact = False  # a letter of a number may be another number that fits


def not_finite(file: File, rng: random.Random) -> None:
    """A whole tensor of NaN or infinity."""
    name = rng.choice(file.names())
    kind = file.header[name]["dtype"]
    bits = {"F32": rng.choice((b"\0\0\xc0\x7f", b"\0\0\x80\x7f")), "F16": b"\0\x7e", "BF16": b"\xc0\x7f"}
    start, end = file.header[name]["data_offsets"]
    if kind in bits:
        file.data[start:end] = bits[kind] * ((end - start) // SIZES[kind])


def nested_metadata(file: File, rng: random.Random) -> None:
    """Texts that are JSON themselves, and are no good."""
    texts = ("[" * 100_000, '{"a":' * 50_000, "[]", "5", "{", '{"bits": 4}', "{}", '"\\ud800"', "NaN", "null")
    metadata = file.header.setdefault("__metadata__", {})
    if isinstance(metadata, dict):
        key = rng.choice(("config", "quantization", "lora_adapter_metadata", "ss_network_args", "x" * 1000))
        metadata[key] = rng.choice(texts)


MUTATIONS: tuple[Mutation, ...] = (
    *(junk_somewhere, junk_somewhere, shift_offsets, exchange_offsets, other_shape, empty, other_type),
    *(rename, rename, drop, add, twice, cut_or_longer, other_length, bytes_of_the_header, not_finite),
    nested_metadata,
)


def mutate(file: File, rng: random.Random) -> File:
    """The file spoilt in a place, or in two."""
    file = file.copy()
    for mutation in rng.choices(MUTATIONS, k=rng.choice((1, 1, 1, 2))):
        with suppress(Exception):  # the first of two may have left nothing to work on
            mutation(file, rng)
    return file


def json_place(value: Any, rng: random.Random) -> tuple[Any, Any] | None:
    """A place in nested JSON: the object or list, and the key in it."""
    if not isinstance(value, dict | list) or not value:
        return None
    key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
    return (rng.random() < 0.6 and json_place(value[key], rng)) or (value, key)


def mutate_json(value: Any, rng: random.Random) -> bytes:
    """A JSON text spoilt in a place: a value, a key, or its bytes."""
    value = copy.deepcopy(value)
    kind = rng.random()
    if (place := json_place(value, rng)) and kind < 0.7:
        inside, key = place
        if kind < 0.5 or isinstance(inside, list):
            inside[key] = rng.choice(JUNK)
        else:
            inside[rng.choice(("", "\ud800", "x" * 999, str(key).upper()))] = inside.pop(key)
    text = json.dumps(value).encode()
    if 0.7 <= kind < 0.8:
        return text[: int(len(text) * rng.random())]
    if 0.8 <= kind < 0.9:
        return rng.choice(
            (b"[" * 10**5, b"", b"\xff\xfe" + text, b"null", b"[]", text[:-1] + b"," + text[1:])
        )
    if kind >= 0.9:
        return mutate_bytes(text, rng)
    return text


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, taken out or put in."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        place = rng.randrange(len(out) + 1)
        how = rng.random()
        if how < 0.6 and place < len(out):
            out[place] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif how < 0.8:
            out[place:place] = rng.randbytes(rng.choice((1, 2, 16)))
        else:
            del out[place : place + rng.choice((1, 2, 16))]
    return bytes(out)


def _product(shape: list[int]) -> int:
    out = 1
    for side in shape:
        out *= side
    return out


def outcome(work: Callable[[], Any], case: str) -> Any:
    """What the work gives, or the line that it ends with; Broken where it ends otherwise, or late."""
    start = time.process_time()
    try:
        result = work()
    except FluxError as error:
        result = error
        line = str(error)
        if not line.isprintable() or len(line) > 3000:
            raise Broken(f"{case}: no clear line: {line[:300]!r}") from error
    except Exception as error:
        raise Broken(f"{case}: {type(error).__name__}: {str(error)[:300]}") from error
    if (seconds := time.process_time() - start) > 5:
        raise Broken(f"{case}: {seconds:.1f} s")
    return result


@contextmanager
def bounded_memory(most: float = 1e9):
    """The process may grow by so many bytes, at its largest."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    mx.reset_peak_memory()
    yield
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert max(grown, mx.get_peak_memory()) < most
