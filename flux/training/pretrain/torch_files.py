"""Tensors of a PyTorch file (.pth), without PyTorch: LPIPS' learned weights come in no other form.

Both of its formats are pickles with the numbers beside them: in a zip archive, or one after the other in the
file. Unpickling can run any code, so only the few names that a table of tensors needs are let through.
"""

import pickle
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from flux.errors import FluxError

STORAGES = {"FloatStorage": np.float32, "DoubleStorage": np.float64, "HalfStorage": np.float16}
STORAGES |= {"LongStorage": np.int64, "IntStorage": np.int32, "ByteStorage": np.uint8}
BAD_FILE = (pickle.UnpicklingError, EOFError, LookupError, TypeError, ValueError, zipfile.BadZipFile)
MAGIC = 0x1950A86A20F9469CFC6C  # of the older format


def read_torch(path: Path) -> dict[str, np.ndarray]:
    """The state dict of a file that `torch.save` wrote. FluxError for any other content."""
    try:
        state = _read_zip(path) if zipfile.is_zipfile(path) else _read_legacy(path)
        if not isinstance(state, dict):
            raise ValueError(f"it holds {type(state).__name__}")
        return {name: _array(lazy) for name, lazy in state.items() if isinstance(lazy, _Tensor)}
    except BAD_FILE as error:
        raise FluxError(f"{path}: no state dict of PyTorch ({error})") from None


class _Storage:
    """A run of numbers; `data` is there once the file has been read to its end."""

    def __init__(self, dtype: type, key: str, count: int):
        self.dtype, self.key, self.count = np.dtype(dtype), key, count
        self.data: np.ndarray | None = None


class _Tensor:
    def __init__(self, storage: _Storage, offset: int, shape: tuple, strides: tuple, *_: Any):
        self.storage, self.offset, self.shape, self.strides = storage, offset, shape, strides


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: BinaryIO, storage: Callable[[tuple], _Storage]):
        super().__init__(file, encoding="latin1")
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        known = {
            ("torch._utils", "_rebuild_tensor_v2"): _Tensor,
            ("torch._utils", "_rebuild_tensor"): _Tensor,
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
            ("collections", "OrderedDict"): OrderedDict,
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed")
        return known[module, name]

    def persistent_load(self, saved: tuple) -> _Storage:
        return self._storage(saved)


def _read_zip(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        name = next((n for n in archive.namelist() if n.endswith("/data.pkl")), "data.pkl")

        def storage(saved: tuple) -> _Storage:
            _, dtype, key, _, count = saved
            made = _Storage(dtype, key, count)
            made.data = np.frombuffer(archive.read(f"{name.removesuffix('data.pkl')}data/{key}"), made.dtype)
            return made

        with archive.open(name) as file:
            return _Unpickler(file, storage).load()


def _read_legacy(path: Path) -> Any:
    storages: dict[str, _Storage] = {}

    def storage(saved: tuple) -> _Storage:
        _, dtype, key, _, count = saved[:5]
        return storages.setdefault(key, _Storage(dtype, key, count))

    with path.open("rb") as file:
        header = [_Unpickler(file, storage).load() for _ in range(3)]  # magic, version, the writer's system
        if header[0] != MAGIC or not header[2].get("little_endian", sys.byteorder == "little"):
            raise ValueError("another format")
        state = _Unpickler(file, storage).load()
        for key in _Unpickler(file, storage).load():
            count = int.from_bytes(file.read(8), "little")
            made = storages[key]
            made.data = np.frombuffer(file.read(count * made.dtype.itemsize), made.dtype)
    return state


def _array(tensor: _Tensor) -> np.ndarray:
    storage = tensor.storage
    last = tensor.offset + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.strides, strict=True))
    if not 0 <= tensor.offset <= last < len(storage.data):
        raise ValueError("a tensor reaches beyond its storage")
    strides = [stride * storage.dtype.itemsize for stride in tensor.strides]
    return np.lib.stride_tricks.as_strided(storage.data[tensor.offset :], tensor.shape, strides).copy()
