"""Files of tensors, safetensors and GGUF: read lazily, widened from other encodings, written atomically."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import cast

import mlx.core as mx

from flux import outputs
from flux.errors import FluxError
from flux.weights import encodings, gguf, headers, lazy, mflux
from flux.weights.headers import Entry, Header

SHOWN = 12  # how many names an error line shows of each kind
TYPES = {
    **{"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16, "BOOL": mx.bool_},
    **{"I8": mx.int8, "I16": mx.int16, "I32": mx.int32, "I64": mx.int64},
    **{"U8": mx.uint8, "U16": mx.uint16, "U32": mx.uint32, "U64": mx.uint64},
}


def read_header(path: Path) -> Header:
    """The header of a file of either format, with the names and axes that this program knows.

    FluxError, naming the file, where it is absent, damaged, cut short or of a type that is not read.
    """
    header = gguf.read_header(path) if gguf.is_gguf(path) else headers.read_header(path)
    return mflux.header(header) if mflux.is_mflux(header) else header


def fingerprint(path: Path) -> str:
    """A short text that differs where files do: from the header and a little of every tensor.

    All of a large file would take minutes; two sets of weights differ in nearly every tensor.
    """
    digest = hashlib.sha256()
    header = read_header(path)
    with path.open("rb") as file:
        for name, entry in sorted(header.tensors.items()):
            digest.update(repr((name, entry)).encode())
            file.seek(entry.start + entry.size // 2)
            digest.update(file.read(64))
    return digest.hexdigest()[:12]


def load(files: Iterable[Path], packed: bool = False) -> dict[str, mx.array]:
    """All tensors of some files (shards of one network), lazily, widened from other programs' encodings.

    packed: matrices of a GGUF file that MLX's quantized layers can hold stay in few bits, as `quantize.split`
    takes them apart. FluxError where a file is damaged, holds an encoding that is not read, or where two
    files hold the same name.
    """
    out: dict[str, mx.array] = {}
    metadata: dict[str, str] = {}
    for path in files:
        is_gguf = gguf.is_gguf(path)
        header = (gguf if is_gguf else headers).read_header(path)
        tensors = gguf.load(path, header, packed) if is_gguf else _load(path, header)
        if mflux.is_mflux(header):
            tensors = mflux.tensors(tensors)
        if twice := out.keys() & tensors.keys():
            raise FluxError(f"{path}: {_some(twice)} is also in another file of the same folder")
        out.update(tensors)
        metadata.update(header.metadata)
    return encodings.decode(str(path), out, metadata) if out else out


def _load(path: Path, header: Header) -> dict[str, mx.array]:
    """A safetensors file's tensors, fp8 widened, which is exact."""
    entries = header.tensors
    if all(entry.dtype in TYPES or entry.dtype == "F8_E4M3" for entry in entries.values()):
        tensors = cast(dict[str, mx.array], mx.load(str(path), format="safetensors"))
    else:  # mx.load refuses the whole file for one tensor of another type
        spans = {name: (entry.start, entry.start + entry.size) for name, entry in entries.items()}
        tensors = {name: _typed(raw, entries[name]) for name, raw in lazy.read(path, spans).items()}
    return {
        name: mx.from_fp8(tensors[name], mx.bfloat16) if entry.dtype == "F8_E4M3" else tensors[name]
        for name, entry in entries.items()
    }


def _typed(raw: mx.array, entry: Entry) -> mx.array:
    """The bytes of a tensor as its type; float8_e4m3 as bytes."""
    if entry.dtype == "F8_E5M2":  # the upper byte of a float16
        return (raw.astype(mx.uint16) << 8).view(mx.float16).reshape(entry.shape)
    if entry.dtype == "F8_E4M3":
        return raw.reshape(entry.shape)
    if entry.dtype == "F64":  # which no GPU has
        return mx.view(raw, mx.float64, stream=mx.cpu).astype(mx.float32, stream=mx.cpu).reshape(entry.shape)
    return raw.view(TYPES[entry.dtype]).reshape(entry.shape)


def save(
    path: Path, tensors: Mapping[str, mx.array], metadata: Mapping[str, str] | None = None, sync: bool = True
) -> None:
    """Writes a safetensors file whole or not at all. sync: see `outputs.replacing`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with outputs.replacing(path, ".safetensors", sync) as partial:
            mx.save_safetensors(str(partial), dict(tensors), {"format": "pt", **(metadata or {})})
    except (OSError, RuntimeError) as error:
        raise FluxError(f"{path}: cannot be written: {error}") from None


def check(label: str, found: Mapping[str, mx.array], expected: Mapping[str, mx.array]) -> None:
    """FluxError in one line with every missing, unexpected, misshapen and mistyped tensor.

    label: the file's name. Of very many names the first dozen and the count are shown.
    """
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    misshapen = [
        f"{name} is {tuple(found[name].shape)} and should be {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    mistyped = [
        f"{name} is {_kind(found[name])} and should be {_kind(tensor)}"
        for name, tensor in expected.items()
        if name in found and _kind(found[name]) != _kind(tensor)
    ]
    kinds = {
        "missing": missing,
        "unexpected": unexpected,
        "wrong shape": misshapen,
        "wrong type": mistyped,
    }
    faults = [f"{kind}: {_some(names)}" for kind, names in kinds.items() if names]
    if faults:
        raise FluxError(f"{label}: {'; '.join(faults)}")


def _kind(tensor: mx.array) -> str:
    """Floats of any size are one kind: they are cast to the type that is asked for."""
    is_float = mx.issubdtype(tensor.dtype, mx.floating)
    return "a float" if is_float else str(tensor.dtype).removeprefix("mlx.core.")


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - SHOWN} more ({len(names)} in all)" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
