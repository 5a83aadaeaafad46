"""PyTorch's `.bin` and `.pth` files, read without PyTorch, and without running what a pickle may ask for.

Such a file is a zip archive, in which `data.pkl` says what tensors there are and `data/KEY` holds the bytes
of one storage. In the format before PyTorch 1.6 a pickle and then all storages follow each other in the file.
"""

import pickle
import sys
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
MAGIC = 0x1950A86A20F9469CFC6C  # what the older format begins with
NOT_WEIGHTS = (
    OSError,
    zipfile.BadZipFile,
    pickle.UnpicklingError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
)


@dataclass(frozen=True)
class Storage:
    """The kind of some bytes, by PyTorch's name, and the name that the file has for them."""

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
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_tensor"):
            return lambda storage, offset, shape, strides, *_: Tensor(storage, offset, shape, strides)
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        if module == "torch" and name in TYPES:
            return name
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which a file of weights has no need of")

    def persistent_load(self, pid: tuple) -> Storage:
        _, kind, key, *_ = pid  # ("storage", kind, key, device, number of elements)
        return Storage(kind, key)


def load(files: Iterable[Path]) -> dict[str, mx.array]:
    """All tensors of some files. FluxError, naming the file, where one is damaged or holds other things."""
    out: dict[str, mx.array] = {}
    for path in files:
        try:
            content, numbers = (_read_zip if zipfile.is_zipfile(path) else _read_legacy)(path)
            if not isinstance(content, dict) or not all(isinstance(t, Tensor) for t in content.values()):
                raise ValueError("it holds something else than named tensors")
            out.update((name, _view(tensor, numbers[tensor.storage.key])) for name, tensor in content.items())
        except NOT_WEIGHTS as error:
            raise FluxError(f"{path}: not a PyTorch file of weights, or damaged: {error}") from None
    return out


def _read_zip(path: Path) -> tuple[Any, dict[str, np.ndarray]]:
    """What the pickle says, and the numbers of each storage by its key."""
    with zipfile.ZipFile(path) as archive:
        index = next((name for name in archive.namelist() if name.endswith("/data.pkl")), None)
        if index is None:
            raise ValueError("no data.pkl in it")
        with archive.open(index) as file:
            content = Reader(file, encoding="latin1").load()
        tensors = content.values() if isinstance(content, dict) else ()
        storages = {t.storage for t in tensors if isinstance(t, Tensor)}
        folder = index.removesuffix("data.pkl") + "data/"
        return content, {s.key: np.frombuffer(archive.read(folder + s.key), TYPES[s.kind]) for s in storages}


def _read_legacy(path: Path) -> tuple[Any, dict[str, np.ndarray]]:
    """The same of a file in the older format."""
    with path.open("rb") as file:
        magic, _, system = (Reader(file, encoding="latin1").load() for _ in range(3))
        if magic != MAGIC or not system.get("little_endian", sys.byteorder == "little"):
            raise ValueError("neither of PyTorch's formats")
        content = Reader(file, encoding="latin1").load()
        tensors = content.values() if isinstance(content, dict) else ()
        kinds = {t.storage.key: TYPES[t.storage.kind] for t in tensors if isinstance(t, Tensor)}
        numbers = {}
        for key in Reader(file, encoding="latin1").load():  # the order in which the storages follow
            size = int.from_bytes(file.read(8), "little") * kinds[key].itemsize
            numbers[key] = np.frombuffer(file.read(size), kinds[key])
    return content, numbers


def _view(tensor: Tensor, elements: np.ndarray) -> mx.array:
    last = tensor.offset + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.strides, strict=True))
    if 0 in tensor.shape or min(tensor.strides, default=0) < 0 or tensor.offset < 0 or last >= len(elements):
        raise ValueError("a tensor reaches beyond its storage")
    steps = [step * elements.itemsize for step in tensor.strides]
    view = np.lib.stride_tricks.as_strided(elements[tensor.offset :], tensor.shape, steps)
    array = mx.array(np.ascontiguousarray(view).reshape(tensor.shape))
    return array.view(mx.bfloat16) if tensor.storage.kind == "BFloat16Storage" else array
