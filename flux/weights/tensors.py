"""Safetensors files: checked before they are mapped, read lazily, widened from fp8, written atomically.

`mx.load` reads a tensor when it is first used, so that a file cut short would fail in the middle of a
picture. The header says how long the file must be: it is compared with the file's size first.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np

from flux.errors import FluxError
from flux.weights.headers import Entry, Header

# Bytes of an element, for every type that a checkpoint has been seen with.
SIZES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"), 1),
}
SHOWN = 12  # how many names an error line shows of each kind


def read_header(path: Path) -> Header:
    """Reads and checks the header. FluxError, naming the file, where it is absent, damaged or cut short."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            text = file.read(length) if length <= size - 8 else b""
    except OSError as error:
        raise FluxError(f"{path}: cannot be read: {error.strerror}") from None
    if size < 8 or not text:
        raise FluxError(f"{path}: not a safetensors file, or cut short within its header ({size} bytes)")
    try:
        entries = json.loads(text)
        metadata = entries.pop("__metadata__", None) or {}  # MLX writes null for none
        tensors = {name: _entry(entry, 8 + length) for name, entry in entries.items()}
        ends = [8 + length + entry["data_offsets"][1] for entry in entries.values()]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise FluxError(f"{path}: not a safetensors file: its header cannot be understood") from None
    if size < max(ends, default=0):
        raise FluxError(
            f"{path}: cut short: it has {size} bytes and its header promises {max(ends)}; download it again"
        )
    for name, entry in tensors.items():
        if entry.dtype not in SIZES:
            raise FluxError(f"{path}: {name} has the type {entry.dtype}, which this program cannot read")
    return Header(tensors, metadata)


def _entry(entry: dict, data_start: int) -> Entry:
    """An entry of the header's JSON; ValueError where its bytes do not make up its shape."""
    dtype, shape = entry["dtype"], tuple(entry["shape"])
    start, end = entry["data_offsets"]
    if start < 0 or (dtype in SIZES and end - start != SIZES[dtype] * math.prod(shape)):
        raise ValueError
    return Entry(dtype, shape, data_start + start)


def fingerprint(path: Path) -> str:
    """A short text that differs where files do: from the header and a little of every tensor.

    All of a large file would take minutes; two sets of weights differ in nearly every tensor.
    """
    digest = hashlib.sha256()
    header = read_header(path)
    with path.open("rb") as file:
        for name, entry in sorted(header.tensors.items()):
            digest.update(repr((name, entry)).encode())
            file.seek(entry.start + SIZES[entry.dtype] * math.prod(entry.shape) // 2)
            digest.update(file.read(64))
    return digest.hexdigest()[:12]


def load(files: Iterable[Path]) -> dict[str, mx.array]:
    """All tensors of some files (shards of one network), lazily; fp8 comes widened, which is exact.

    FluxError where a file is damaged or two files hold the same name.
    """
    out: dict[str, mx.array] = {}
    for path in files:
        header = read_header(path)
        tensors = _scaled(_load_one(path, header))
        if twice := out.keys() & tensors.keys():
            raise FluxError(f"{path}: {_some(twice)} is also in another file of the same folder")
        out.update(tensors)
    return out


def _load_one(path: Path, header: Header) -> dict[str, mx.array]:
    entries = header.tensors
    if any(entry.dtype == "F8_E5M2" for entry in entries.values()):
        # mx.load refuses the whole file for it; such files are read through numpy instead.
        return {name: _load_by_numpy(path, entry) for name, entry in entries.items()}
    tensors = mx.load(str(path), format="safetensors")
    return {
        name: mx.from_fp8(tensors[name], mx.bfloat16) if entry.dtype == "F8_E4M3" else tensors[name]
        for name, entry in entries.items()
    }


def _load_by_numpy(path: Path, entry: Entry) -> mx.array:
    size = SIZES[entry.dtype] * math.prod(entry.shape)
    data = mx.array(np.fromfile(path, np.uint8, size, offset=entry.start))
    if entry.dtype == "F8_E5M2":  # the upper byte of a float16
        return (data.astype(mx.uint16) << 8).view(mx.float16).reshape(entry.shape)
    if entry.dtype == "F8_E4M3":
        return mx.from_fp8(data, mx.bfloat16).reshape(entry.shape)
    types = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}
    if entry.dtype not in types:
        raise FluxError(f"{path}: {entry.dtype} beside F8_E5M2 is a mixture this program cannot read")
    return data.view(types[entry.dtype]).reshape(entry.shape)


def _scaled(tensors: dict[str, mx.array]) -> dict[str, mx.array]:
    """ComfyUI's "scaled fp8": `x.weight` times `x.scale_weight`; `x.scale_input` is for products in fp8."""
    scales = [name for name in tensors if name.endswith(".scale_weight")]
    for name in scales:
        weight = name.removesuffix("scale_weight") + "weight"
        if weight in tensors:
            scale = tensors.pop(name).astype(mx.float32)
            tensors[weight] = tensors[weight].astype(mx.float32) * scale
            tensors.pop(name.removesuffix("scale_weight") + "scale_input", None)
    return tensors


def save(path: Path, tensors: Mapping[str, mx.array], metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file whole or not at all: under another name beside it first."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.safetensors")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        mx.save_safetensors(str(temporary), dict(tensors), {"format": "pt", **(metadata or {})})
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        raise FluxError(f"{path}: cannot be written: {error}") from None
    finally:
        if temporary.exists():
            temporary.unlink()


def check(label: str, found: Mapping[str, mx.array], expected: Mapping[str, mx.array]) -> None:
    """FluxError in one line with every missing, unexpected and misshapen tensor, unless found is expected.

    label: the file's name. Of very many names the first dozen and the count are shown.
    """
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    misshapen = [
        f"{name} is {tuple(found[name].shape)} and should be {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "wrong shape": misshapen}
    faults = [f"{kind}: {_some(names)}" for kind, names in kinds.items() if names]
    if faults:
        raise FluxError(f"{label}: {'; '.join(faults)}")


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - SHOWN} more ({len(names)} in all)" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
