"""PyTorch's `.bin` and `.pth` files, read without PyTorch, and without running what a pickle may ask for.

Such a file is a zip archive, in which `data.pkl` says what tensors there are and `data/KEY` holds the bytes
of one storage. In the format before PyTorch 1.6 a pickle and then all storages follow each other in the file.

A pickle is a program. Python's machine for it takes gigabytes for a few bytes (a memo of 2^32 places),
or never ends (the hash of nested tuples), so that a small one runs here: it makes texts, numbers, tables and
views of storages, of which none can be larger than the file says it in so many words.
"""

import pickletools
import stat
import sys
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from io import BytesIO, FileIO
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from flux.errors import FluxError
from flux.jsonfiles import shown
from flux.weights.headers import MAX_AXES, MAX_NAME, MAX_SIDE

TYPES: dict[str, np.dtype] = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype("<u2"),  # numpy has no bfloat16: its bits
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
}
TABLE, PARAMETER = "collections OrderedDict", "torch._utils _rebuild_parameter"
TENSORS = ("torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor")
KNOWN = {TABLE, PARAMETER, *TENSORS, *(f"torch {kind}" for kind in TYPES)}  # all that weights ask for
MAGIC = 0x1950A86A20F9469CFC6C  # what the older format begins with
MAX_PICKLE = 16 * 2**20  # bytes; Florence-2-large's has 130,000
MAX_DIRECTORY = 8 * 2**20  # bytes of an archive's; it has about 100 a tensor
MAX_READ = 2**40
MAX_STEPS = 500_000  # of a pickle, which has about 30 a tensor
MAX_COPIES = 4  # how often the views of a file may hold its bytes: tied weights are views of the same
NOT_WEIGHTS = (
    *(OSError, zipfile.BadZipFile, NotImplementedError),
    *(ValueError, LookupError, TypeError, AttributeError),
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


# --- The pickle ---

TEXTS = ("BINUNICODE", "SHORT_BINUNICODE", "BINSTRING", "SHORT_BINSTRING")
VALUES = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", *TEXTS)
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
COUNTED = {
    "TUPLE1": 1,
    "TUPLE2": 2,
    "TUPLE3": 3,
    "SETITEM": 2,
    "APPEND": 1,
}  # how much of the stack they take
PUTS, GETS = ("BINPUT", "LONG_BINPUT", "MEMOIZE"), ("BINGET", "LONG_BINGET")


class Machine:
    """Runs the steps of a pickle that a file of weights consists of; ValueError at all others."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, file: BytesIO) -> Any:
        """The value of the pickle at the file's position, which is then after it."""
        for steps, (code, argument, _) in enumerate(pickletools.genops(file)):
            if code.name == "STOP":
                return self.stack.pop()
            if steps >= MAX_STEPS:
                raise ValueError(f"a pickle of more than {MAX_STEPS} steps")
            self.step(code.name, argument)
        raise ValueError("a pickle without an end")

    def step(self, name: str, argument: Any) -> None:
        """Does one step, by its name in pickletools. ValueError for one that files of weights do not need."""
        if name in VALUES:
            self.stack.append(argument)
        elif name in CONSTANTS:
            self.stack.append(CONSTANTS[name])
        elif name in ("EMPTY_DICT", "EMPTY_LIST"):
            self.stack.append({} if name == "EMPTY_DICT" else [])
        elif name == "MARK":
            self.marks.append(len(self.stack))
        elif name in PUTS:
            self.memo[len(self.memo) if argument is None else argument] = self.stack[-1]
        elif name in GETS:
            self.stack.append(self.memo[argument])
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            self.stack.append(_known(argument or " ".join(self.take(2))))
        elif name in ("REDUCE", "BUILD", "BINPERSID"):
            self.call(name)
        elif name.startswith(("TUPLE", "SETITEM", "APPEND")):
            self.collect(name)
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(f"its pickle has a {name}, which a file of weights has no need of")

    def take(self, count: int) -> list[Any]:
        """The last so many values, which leave the stack."""
        start = len(self.stack) - count
        if start < (self.marks[-1] if self.marks else 0):
            raise ValueError("a pickle that takes more than it has")
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def collect(self, name: str) -> None:
        """Values into a tuple, a list or a table, whose names are texts."""
        values = self.take(COUNTED.get(name) or len(self.stack) - self.marks[-1])
        if name not in COUNTED:
            self.marks.pop()
        if name.startswith("TUPLE"):
            self.stack.append(tuple(values))
        elif name.startswith("APPEND"):
            _of(list, self.stack[-1]).extend(values)
        else:
            names, items = values[::2], values[1::2]
            _of(dict, self.stack[-1]).update(zip([_of(str, n) for n in names], items, strict=True))

    def call(self, name: str) -> None:
        """What stands for Python's objects: storages, tensors, tables."""
        if name == "BINPERSID":
            self.stack.append(_storage(*self.take(1)))
        elif name == "BUILD":  # attributes: a state dict notes its modules' versions there
            self.take(1)
        else:
            self.stack.append(_made(*self.take(2)))


def _of(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise ValueError(f"a {type(value).__name__} stands where a {kind.__name__} should")
    return value


def _known(name: str) -> str:
    if name not in KNOWN:
        raise ValueError(
            f"it asks for {shown('.'.join(name.split()))}, which a file of weights has no need of"
        )
    return name


def _storage(pid: Any) -> Storage:
    _, kind, key, *_ = _of(tuple, pid)  # ("storage", kind, key, device, number of elements)
    kind = _of(str, kind).removeprefix("torch ")
    if kind not in TYPES:
        raise ValueError(f"a storage of the kind {shown(kind)}")
    return Storage(kind, _of(str, key))


def _made(function: Any, arguments: Any) -> Any:
    """What a function of KNOWN makes of its arguments."""
    arguments = _of(tuple, arguments)
    if function == TABLE:
        pairs = _of(list, arguments[0]) if arguments else []
        return {_of(str, name): value for name, value in pairs}
    if function == PARAMETER:
        return arguments[0]
    if function not in TENSORS:
        raise ValueError("it calls a function that files of weights do not need")
    storage, offset, shape, strides, *_ = arguments
    numbers = (offset, *_of(tuple, shape), *_of(tuple, strides))
    if len(shape) != len(strides) or len(shape) > MAX_AXES:
        raise ValueError("a tensor whose shape and strides do not belong together")
    if any(type(n) is not int or not 0 <= n <= MAX_SIDE for n in numbers):
        raise ValueError("a tensor whose offset, shape or strides are not counts")
    return Tensor(_of(Storage, storage), offset, shape, strides)


# --- The file ---


class Bounded(FileIO):
    """A file of which at most so many bytes are read at once: zipfile reads an archive's directory so."""

    most = MAX_DIRECTORY

    def read(self, size: int | None = -1) -> bytes:
        """As of other files. ValueError for more; what zipfile reads without a number is the last 64 KiB."""
        if size is not None and size > self.most:
            raise ValueError(f"a directory of more than {self.most} bytes")
        return super().read(size)


def load(files: Iterable[Path]) -> dict[str, mx.array]:
    """All tensors of some files. FluxError, naming the file, where one is damaged or holds other things."""
    out: dict[str, mx.array] = {}
    for path in files:
        try:
            if not stat.S_ISREG(path.stat().st_mode):
                raise ValueError("not a file")
            tensors, numbers = (_read_zip if zipfile.is_zipfile(path) else _read_legacy)(path)
            out.update(_views(tensors, numbers, path.stat().st_size))
        except NOT_WEIGHTS as error:
            raise FluxError(f"{path}: not a PyTorch file of weights, or damaged: {error}") from None
    return out


def _tensors(content: Any) -> dict[str, Tensor]:
    """The pickle's content where it is named tensors."""
    if type(content) is not dict or not content or not all(type(t) is Tensor for t in content.values()):
        raise ValueError("it holds something else than named tensors")
    if strange := [shown(n) for n in content if not n.isprintable() or not 0 < len(n) <= MAX_NAME]:
        raise ValueError(f"a tensor is called {strange[0]}")
    return content


def _read_zip(path: Path) -> tuple[dict[str, Tensor], dict[str, np.ndarray]]:
    """The tensors that the pickle names, and the numbers of each storage by its key."""
    with Bounded(path) as file, zipfile.ZipFile(file) as archive:
        file.most = MAX_READ
        index = next((name for name in archive.namelist() if name.endswith("/data.pkl")), None)
        if index is None:
            raise ValueError("no data.pkl in it")
        tensors = _tensors(Machine().run(BytesIO(_stored(archive, index, MAX_PICKLE))))
        kinds = {tensor.storage.key: TYPES[tensor.storage.kind] for tensor in tensors.values()}
        folder, left, numbers = index.removesuffix("data.pkl") + "data/", path.stat().st_size, {}
        for key, kind in kinds.items():
            numbers[key] = np.frombuffer(_stored(archive, folder + key, left), kind)
            left -= numbers[key].nbytes
    return tensors, numbers


def _stored(archive: zipfile.ZipFile, name: str, most: int) -> bytes:
    """An archive's file of at most so many bytes, as PyTorch writes it: neither compressed nor encrypted."""
    if name not in archive.NameToInfo:
        raise ValueError(f"no {shown(name)} in it")
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.file_size > most:
        raise ValueError(f"{shown(name)} in it is compressed, encrypted or too large")
    return archive.read(info)


def _read_legacy(path: Path) -> tuple[dict[str, Tensor], dict[str, np.ndarray]]:
    """The same of a file in the older format."""
    with path.open("rb") as file:
        head = BytesIO(file.read(MAX_PICKLE))
        magic, _, system = (Machine().run(head) for _ in range(3))
        if magic != MAGIC or not _of(dict, system).get("little_endian", sys.byteorder == "little"):
            raise ValueError("neither of PyTorch's formats")
        tensors = _tensors(Machine().run(head))
        kinds = {tensor.storage.key: TYPES[tensor.storage.kind] for tensor in tensors.values()}
        numbers = {}
        keys = _of(list, Machine().run(head))  # the order in which the storages follow
        file.seek(head.tell())
        for key in keys:
            if _of(str, key) not in kinds:
                raise ValueError(f"no tensor is in the storage {shown(key)}")
            size = int.from_bytes(file.read(8), "little") * kinds[key].itemsize
            data = file.read(min(size, path.stat().st_size))
            if len(data) < size:
                raise ValueError("cut short")
            numbers[key] = np.frombuffer(data, kinds[key])
    if absent := kinds.keys() - numbers.keys():
        raise ValueError(f"cut short: no storage {shown(min(absent))}")
    return tensors, numbers


def _views(tensors: dict[str, Tensor], numbers: dict[str, np.ndarray], size: int) -> dict[str, mx.array]:
    """The tensors by their names, each view copied once. size: of the file, in bytes."""
    arrays: dict[Tensor, mx.array] = {}
    left = MAX_COPIES * size
    for name, tensor in tensors.items():
        if tensor in arrays:
            continue
        elements = numbers[tensor.storage.key]
        try:
            _check(tensor, len(elements))
        except ValueError as error:
            raise ValueError(f"{shown(name)} {error}") from None
        arrays[tensor] = _view(tensor, elements)
        left -= arrays[tensor].nbytes
        if left < 0:
            raise ValueError(f"its tensors are more than {MAX_COPIES} times its size")
    return {name: arrays[tensor] for name, tensor in tensors.items()}


def _check(tensor: Tensor, count: int) -> None:
    """ValueError where the tensor is not within the storage's so many elements, or repeats them."""
    last = tensor.offset + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.strides, strict=True))
    if 0 in tensor.shape or last >= count:
        raise ValueError("is empty, or reaches beyond its storage")
    if any(n > 1 and step == 0 for n, step in zip(tensor.shape, tensor.strides, strict=True)):
        raise ValueError("repeats the same numbers")
    if np.prod(tensor.shape, dtype=object) > count:
        raise ValueError("has more numbers than its storage")


def _view(tensor: Tensor, elements: np.ndarray) -> mx.array:
    steps = [step * elements.itemsize for step in tensor.strides]
    view = np.lib.stride_tricks.as_strided(elements[tensor.offset :], tensor.shape, steps)
    array = mx.array(np.ascontiguousarray(view).reshape(tensor.shape))
    return array.view(mx.bfloat16) if tensor.storage.kind == "BFloat16Storage" else array
