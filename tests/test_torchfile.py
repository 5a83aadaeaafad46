"""PyTorch's files: what they hold is read, to the last element; what a pickle could do besides is refused."""

import os
import pickle
import struct
import time
import tracemalloc
import zipfile
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from flux.errors import FluxError
from flux.weights import torchfile
from tests import torch_files as files

ARRAYS = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array([1, 2], np.float16)}
STORAGE = {"s": np.arange(6, dtype=np.float32).tobytes()}


def view(offset: int, shape: tuple, strides: tuple) -> bytes:
    return files.tensor("FloatStorage", "s", 6, offset, shape, strides)


def fault(path: Path) -> str:
    """The one line, after a short time and without much memory."""
    tracemalloc.start()
    start = time.process_time()
    with pytest.raises(FluxError, match="not a PyTorch file of weights") as error:
        torchfile.load([path])
    assert time.process_time() - start < 5
    assert tracemalloc.get_traced_memory()[1] < 200e6
    tracemalloc.stop()
    line = str(error.value)
    assert line.startswith(str(path))
    assert "\n" not in line
    assert len(line) < len(str(path)) + 250
    return line


def test_both_formats(tmp_path):
    pickled = files.table(files.whole(ARRAYS))
    files.write_zip(tmp_path / "new.bin", pickled, files.arrays_of(ARRAYS))
    storages = {f"s-{name}": (array.size, array.tobytes()) for name, array in ARRAYS.items()}
    (tmp_path / "old.bin").write_bytes(files.legacy(pickled, storages))
    for name in ("new.bin", "old.bin"):
        found = torchfile.load([tmp_path / name])
        assert {name: tensor.tolist() for name, tensor in found.items()} == {
            name: array.tolist() for name, array in ARRAYS.items()
        }
        assert found["b"].dtype == mx.float16


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("new", [True, False])
def test_state_dicts_as_pytorch_writes_them(tmp_path, protocol, new):
    """A module's: with its versions as attributes of the table, parameters, and tied weights."""
    torch = pytest.importorskip("torch")
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    model[1].weight = model[0].weight
    state = model.state_dict(keep_vars=True)
    path = tmp_path / "m.bin"
    torch.save(state, path, pickle_protocol=protocol, _use_new_zipfile_serialization=new)
    found = torchfile.load([path])
    assert {k: t.tolist() for k, t in found.items()} == {k: t.tolist() for k, t in state.items()}
    assert found["0.weight"] is found["1.weight"]  # not twice in memory


VIEWS = [
    (0, (6,), (1,), True),
    (0, (7,), (1,), False),
    (5, (1,), (1,), True),
    (6, (1,), (1,), False),
    (5, (), (), True),
    (6, (), (), False),
    (1, (5,), (1,), True),
    (1, (6,), (1,), False),
    (0, (3, 2), (1, 3), True),
    (0, (2, 3), (3, 1), True),
    (0, (2, 3), (4, 1), False),
    (1, (1, 5), (0, 1), True),  # an axis of one has any stride
    (0, (4, 3), (1, 1), False),  # 12 of 6 numbers
    (0, (10**9,), (0,), False),
    (0, (1000, 1000, 1000), (0, 0, 0), False),
    (0, (2,), (0,), False),
    (0, (0,), (1,), False),
    (0, (2,), (-1,), False),
    (-1, (2,), (1,), False),
    (0, (2, 2), (1,), False),
    (2**40, (1,), (1,), False),
    (0, (1,) * 9, (1,) * 9, False),
]


@pytest.mark.parametrize(("offset", "shape", "strides", "sound"), VIEWS, ids=range(len(VIEWS)))
def test_views(offset, shape, strides, sound, tmp_path):
    """To the last element of the storage and not beyond."""
    path = files.write_zip(tmp_path / "f.bin", files.table({"w": view(offset, shape, strides)}), STORAGE)
    if not sound:
        assert fault(path)
        return
    numbers = np.frombuffer(STORAGE["s"], np.float32)[offset:]
    wanted = np.lib.stride_tricks.as_strided(numbers, shape, [4 * step for step in strides])
    assert torchfile.load([path])["w"].tolist() == wanted.tolist()


def test_many_views_of_one_storage(tmp_path):
    """As often as the file has reason to; then no more."""
    views = {f"w{i}": view(i % 3, (3,), (1,)) for i in range(300)}
    assert len(torchfile.load([files.write_zip(tmp_path / "f.bin", files.table(views), STORAGE)])) == 300
    data = bytes(4 * 20_000)
    many = {f"w{i}": files.tensor("FloatStorage", "s", 20_000, i, (10_000,), (1,)) for i in range(1000)}
    assert "more than 4 times its size" in fault(
        files.write_zip(tmp_path / "g.bin", files.table(many), {"s": data})
    )


SOUND = view(0, (6,), (1,))
NESTED = b")" + b"q\x01h\x01\x86" * 60  # a tuple of two of itself, 60 times: its hash takes 2^60 steps
HOSTILE = {
    "memo of 2^32": b"\x80\x02}r\xff\xff\xff\xff.",
    "text of 4 GB": b"\x80\x02X\xff\xff\xff\xff.",
    "text of 2^63": b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7f.",
    "bytes": b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f.",
    "array of bytes": b"\x80\x05\x96" + b"\xff" * 7 + b"\x7f.",
    "frame": b"\x80\x04\x95" + b"\xff" * 8 + b".",
    "nested as name": b"\x80\x02}" + NESTED + b"K\x01s.",
    "nested as key": files.table({"w": SOUND.replace(files.text("s") + files.text("cpu"), NESTED + b"N")}),
    "nested as shape": files.table({"w": SOUND.replace(files.numbers((6,)), NESTED)}),
    "nothing": b"",
    "no end": b"\x80\x02}",
    "nothing to end with": b"\x80\x02.",
    "pops": b"\x80\x020.",
    "takes too much": b"\x80\x02}s.",
    "mark in between": b"\x80\x02}K\x01(K\x02s.",
    "no mark": b"\x80\x02}u.",
    "no memo": b"\x80\x02h\x05.",
    "many steps": b"\x80\x02" + b"N" * 500_001 + b".",
    "os.system": b"cos\nsystem\n(X\x02\x00\x00\x00idtR.",
    "builtins.eval": b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93(X\x01\x00\x00\x001tR.",
    "numpy": b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n.",
    "long name": b"\x80\x02c" + b"x" * 10_000 + b"\ny\n.",
    "instance": b"(ios\nsystem\n.",
    "newobj": b"\x80\x02ccollections\nOrderedDict\n)\x81.",
    "extension": b"\x80\x02\x82\x01.",
    "calls a number": b"\x80\x02K\x01)R.",
    "a table of what": b"\x80\x02ccollections\nOrderedDict\nK\x05\x85R.",
    "a parameter of nothing": b"\x80\x02ctorch._utils\n_rebuild_parameter\n)R.",
    "a tensor of nothing": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",
    "a tensor of no storage": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(NK\x00))tR.",
    "a storage of what": b"\x80\x02NQ.",
    "another storage": b"\x80\x02(" + files.text("storage") + files.text("x") + files.text("s") + b"tQ.",
    "a list": b"\x80\x02].",
    "numbers by name": b"\x80\x02}(" + files.text("w") + b"K\x01u.",
    "names that are numbers": b"\x80\x02}K\x01" + SOUND + b"s.",
    "an odd table": b"\x80\x02}(" + files.text("w") + b"u.",
    "half a surrogate": b"\x80\x02}(X\x03\x00\x00\x00\xed\xa0\x80" + SOUND + b"u.",
    "a name of two lines": files.table({"a\nb": SOUND}),
    "a name without end": files.table({"a" * 5000: SOUND}),
    "huge number": files.table({"w": view(2**1000, (1,), (1,))}),
    "LONG4": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    "a text as number": b"\x80\x02I" + b"1" * 10**6 + b"\n.",
    "not unicode": b"\x80\x02X\x01\x00\x00\x00\xff.",
    "unknown step": b"\x80\x02\xff.",
    "no such storage": files.table({"w": files.tensor("FloatStorage", "other", 6, 0, (6,), (1,))}),
    "a storage elsewhere": files.table({"w": files.tensor("FloatStorage", "../data.pkl", 6, 0, (6,), (1,))}),
}


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("pickled", HOSTILE.values(), ids=HOSTILE)
def test_hostile_pickles(pickled, new, tmp_path):
    path = tmp_path / "f.bin"
    if new:
        files.write_zip(path, pickled, STORAGE)
    else:
        path.write_bytes(files.legacy(pickled, {"s": (6, STORAGE["s"])}))
    fault(path)


def test_what_python_would_have_done():
    """The same bytes in Python's own machine, so that the cases above are what they are said to be."""
    with pytest.raises((MemoryError, pickle.UnpicklingError, EOFError, ValueError)):
        pickle.loads(HOSTILE["no end"])
    assert pickle.loads(HOSTILE["newobj"]) == {}
    assert len(pickle.loads(b"\x80\x02" + NESTED + b".")) == 2


def test_a_high_place_in_the_memo(tmp_path):
    """Python would make room for all the places before it, 16 GB; here it is a place like another."""
    pickled = b"\x80\x02}(" + files.text("w") + SOUND + b"r\xff\xff\xff\x7fu."
    path = files.write_zip(tmp_path / "f.bin", pickled, STORAGE)
    tracemalloc.start()
    assert torchfile.load([path])["w"].tolist() == [0, 1, 2, 3, 4, 5]
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


def test_zip_archives(tmp_path):
    pickled = files.table({"w": SOUND})
    path = tmp_path / "f.bin"
    files.write_zip(path, pickled, {"s": bytes(10**7)}, zipfile.ZIP_DEFLATED)
    assert "is compressed" in fault(path)
    files.write_zip(path, pickled, {"s": STORAGE["s"] + b"x"})
    assert "element size" in fault(path)
    data = files.write_zip(path, pickled, STORAGE).read_bytes()
    path.write_bytes(data.replace(STORAGE["s"], STORAGE["s"][::-1]))
    assert "Bad CRC" in fault(path)
    path.write_bytes(data[:-5])
    assert fault(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a", "b")
    assert "no data.pkl" in fault(path)
    files.write_zip(path, b"\x80\x02" + b"N" * 2**24, {})
    assert "too large" in fault(path)


def test_older_files_cut_short(tmp_path):
    data = files.legacy(files.table({"w": SOUND}), {"s": (6, STORAGE["s"])})
    path = tmp_path / "f.bin"
    for keep in range(0, len(data), 7):
        path.write_bytes(data[:keep])
        assert fault(path)
    for count in (2**40, -1, 5, 7):
        path.write_bytes(files.legacy(files.table({"w": SOUND}), {"s": (count, STORAGE["s"])}))
        assert fault(path)
    path.write_bytes(files.legacy(files.table({"w": SOUND}), {"t": (6, STORAGE["s"])}))
    assert "no tensor is in the storage 't'" in fault(path)
    assert struct.unpack("<q", data[-32:-24]) == (6,)


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.bin")
    assert "not a file" in fault(tmp_path / "pipe.bin")
    assert "not a file" in fault(tmp_path)
    assert "No such file" in fault(tmp_path / "none.bin")


def test_the_number_of_steps(tmp_path):
    for name, line in (
        ("many steps", "a pickle of more than 500000 steps"),
        ("memo of 2^32", "something else"),
    ):
        assert line in fault(files.write_zip(tmp_path / "f.bin", HOSTILE[name], STORAGE))


def test_a_directory_of_very_many_files(tmp_path):
    """zipfile makes a kilobyte of each 47 bytes."""
    entry = b"PK\1\2" + bytes(24) + b"\1" + bytes(17) + b"a"
    directory = entry * 200_000
    end = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 65535, 65535, len(directory), 0, 0)
    (tmp_path / "f.bin").write_bytes(directory + end)
    with pytest.raises(FluxError, match=r"f\.bin: .*a directory of more than 8388608 bytes"):
        torchfile.load([tmp_path / "f.bin"])
