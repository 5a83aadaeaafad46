"""PyTorch's `.bin` files, read without PyTorch, and without running what a pickle may ask to be run.

Such a file is a zip archive: `data.pkl` says which tensors there are, `data/KEY` holds the bytes of one
storage.
"""

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from flux.errors import FluxError

TYPES = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype("<u2"),  # numpy has no bfloat16: its bits
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
}


@dataclass(frozen=True)
class Storage:
    """The kind of some bytes, by PyTorch's name, and where in the archive they are."""

    kind: str
    key: str


@dataclass(frozen=True)
class Tensor:
    """A view of a storage; offset and strides in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Reader(pickle.Unpickler):
    """Knows the few things that a state dict is made of, and refuses all others."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, strides, *_: Tensor(storage, offset, shape, strides)
        if module == "torch" and name in TYPES:
            return name
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which a file of weights has no need of")

    def persistent_load(self, pid: tuple) -> Storage:
        _, kind, key, _, _ = pid  # ("storage", kind, key, device, number of elements)
        return Storage(kind, key)


def load(files: Iterable[Path]) -> dict[str, mx.array]:
    """All tensors of some files. FluxError, naming the file, where one is damaged or holds other things."""
    out: dict[str, mx.array] = {}
    for path in files:
        try:
            with zipfile.ZipFile(path) as archive:
                out.update(_load_one(archive))
        except (OSError, zipfile.BadZipFile, pickle.UnpicklingError, EOFError, ValueError, KeyError) as error:
            raise FluxError(f"{path}: not a PyTorch file of weights, or damaged: {error}") from None
    return out


def _load_one(archive: zipfile.ZipFile) -> dict[str, mx.array]:
    index = next((name for name in archive.namelist() if name.endswith("/data.pkl")), None)
    if index is None:
        raise ValueError("no data.pkl in it")
    with archive.open(index) as file:
        content = Reader(file).load()
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError("it holds something else than named tensors")
    storages: dict[Storage, np.ndarray] = {}
    out = {}
    for name, tensor in content.items():
        storage = tensor.storage
        if storage not in storages:
            raw = archive.read(f"{index.removesuffix('data.pkl')}data/{storage.key}")
            storages[storage] = np.frombuffer(raw, TYPES[storage.kind])
        out[name] = _view(tensor, storages[storage])
    return out


def _view(tensor: Tensor, elements: np.ndarray) -> mx.array:
    last = tensor.offset + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.strides, strict=True))
    if 0 in tensor.shape or min(tensor.strides, default=0) < 0 or tensor.offset < 0 or last >= len(elements):
        raise ValueError("a tensor reaches beyond its storage")
    steps = [step * elements.itemsize for step in tensor.strides]
    view = np.lib.stride_tricks.as_strided(elements[tensor.offset :], tensor.shape, steps)
    array = mx.array(np.ascontiguousarray(view).reshape(tensor.shape))
    return array.view(mx.bfloat16) if tensor.storage.kind == "BFloat16Storage" else array
