"""Safetensors files: read lazily, widened from fp8, written atomically. headers.py checks them before."""

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np

from flux.errors import FluxError
from flux.weights.headers import Entry, Header, read_header

SHOWN = 12  # how many names an error line shows of each kind


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
    if any(entry.dtype in ("F8_E5M2", "F64") for entry in entries.values()):
        # mx.load refuses the whole file for them; such files are read through numpy instead.
        return {name: _load_by_numpy(path, entry) for name, entry in entries.items()}
    tensors = mx.load(str(path), format="safetensors")
    return {
        name: mx.from_fp8(tensors[name], mx.bfloat16) if entry.dtype == "F8_E4M3" else tensors[name]
        for name, entry in entries.items()
    }


def _load_by_numpy(path: Path, entry: Entry) -> mx.array:
    size = entry.size
    data = mx.array(np.fromfile(path, np.uint8, size, offset=entry.start))
    if entry.dtype == "F8_E5M2":  # the upper byte of a float16
        return (data.astype(mx.uint16) << 8).view(mx.float16).reshape(entry.shape)
    if entry.dtype == "F8_E4M3":
        return mx.from_fp8(data, mx.bfloat16).reshape(entry.shape)
    if entry.dtype == "F64":  # no GPU has it
        return mx.array(np.fromfile(path, "<f8", size // 8, offset=entry.start).astype("<f4")).reshape(
            entry.shape
        )
    types = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}
    if entry.dtype not in types:
        raise FluxError(f"{path}: {entry.dtype} beside F8_E5M2 or F64 is a mixture this program cannot read")
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
