"""Safetensors headers: each fault is one line that names it; what the safetensors package writes is read."""

import json
import os
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import safetensors.numpy

from flux.errors import FluxError
from flux.weights import checkpoints, headers, layouts, tensors

A = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
B = {"dtype": "F16", "shape": [4], "data_offsets": [24, 32]}


def write(path: Path, header: object, data: bytes = bytes(32)) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def fault(path: Path) -> str:
    start = time.process_time()
    with pytest.raises(FluxError) as error:
        headers.read_header(path)
    line = str(error.value)
    assert line.startswith(f"{path}: ")
    assert "\n" not in line
    assert len(line) < len(str(path)) + 300
    assert time.process_time() - start < 5
    return line


def test_sound(tmp_path):
    found = headers.read_header(write(tmp_path / "f", {"__metadata__": {"k": "v"}, "a": A, "b": B}))
    begin = os.path.getsize(tmp_path / "f") - 32
    assert found.metadata == {"k": "v"}
    assert found.tensors == {
        "a": headers.Entry("F32", (2, 3), begin),
        "b": headers.Entry("F16", (4,), begin + 24),
    }
    assert found.tensors["a"].size == 24


def test_empty_tensors_and_any_order(tmp_path):
    empty = {"dtype": "F32", "shape": [0, 5], "data_offsets": [24, 24]}
    header = {"z": B, "marker": empty, "last": {**empty, "data_offsets": [32, 32]}, "a": A}
    assert list(headers.read_header(write(tmp_path / "f", header)).tensors) == ["z", "marker", "last", "a"]
    assert headers.read_header(write(tmp_path / "g", {}, b"")).tensors == {}


def test_what_others_write(tmp_path):
    arrays = {f"w{i}": np.full((i, 2), i, np.float16 if i % 2 else np.float32) for i in range(1, 6)}
    safetensors.numpy.save_file(arrays, tmp_path / "f", {"format": "np"})
    mx.save_safetensors(str(tmp_path / "g.safetensors"), {k: mx.array(v) for k, v in arrays.items()})
    for file in ("f", "g.safetensors"):
        found = headers.read_header(tmp_path / file)
        assert {name: entry.shape for name, entry in found.tensors.items()} == {
            name: array.shape for name, array in arrays.items()
        }


ENTRIES = [
    ({"a": 5}, "'a' should have dtype, shape and data_offsets"),
    ({"a": []}, "'a' should have"),
    ({"a": {"dtype": "F32", "shape": [8]}}, "'a' should have"),
    ({"a": A | {"dtype": None}}, "'a' has the dtype None"),
    ({"a": A | {"dtype": "F\n32"}}, "has the dtype"),
    ({"a": A | {"shape": 6}}, "'a' has the shape 6"),
    ({"a": A | {"shape": [2.0, 3]}}, "'a' has the shape"),
    ({"a": A | {"shape": [True, 6]}}, "'a' has the shape"),
    ({"a": A | {"shape": [-2, -3]}}, "'a' has the shape"),
    ({"a": A | {"shape": [0, 2**31], "data_offsets": [0, 0]}}, "'a' has the shape"),
    ({"a": A | {"shape": [1] * 7 + [2, 3]}}, "'a' has the shape"),
    ({"a": A | {"shape": [2, 2]}}, "'a' has 24 bytes, which do not make up F32"),
    ({"a": A | {"data_offsets": [0, 24.0]}}, "'a' has the data_offsets"),
    ({"a": A | {"data_offsets": [False, 24]}}, "'a' has the data_offsets"),
    ({"a": A | {"data_offsets": [24, 0]}}, "'a' has the data_offsets"),
    ({"a": A | {"data_offsets": [-24, 0]}}, "'a' has the data_offsets"),
    ({"a": A | {"data_offsets": [0, 24, 24]}}, "'a' has the data_offsets"),
    ({"a": A | {"data_offsets": {"0": 24}}}, "'a' has the data_offsets"),
    ({"a": A, "b": B | {"data_offsets": [23, 31]}}, "'b' and 'a' overlap"),
    ({"a": A, "b": A}, "overlap"),
    ({"a": A, "b": B | {"data_offsets": [25, 33]}}, "1 bytes before 'b' belong to no tensor"),
    ({"a": A | {"data_offsets": [8, 32]}}, "8 bytes before 'a' belong to no tensor"),
    ({"a": A}, "8 bytes are left over after the last tensor"),
    ({"a": A, "b": A | {"data_offsets": [24, 48]}}, "cut short: its header promises 48 bytes of tensors"),
    ({"a": A, "b": B | {"dtype": "F4", "shape": [16]}}, "b has the type F4, which this program cannot read"),
    ({"": A, "b": B}, "a tensor is called ''"),
    ({"x" * 600: A, "b": B}, "a tensor is called 'xxx"),
    ({"a\nb": A, "b": B}, "a tensor is called"),
    ({"__metadata__": 5, "a": A, "b": B}, "__metadata__ should hold texts by name"),
    ({"__metadata__": ["x"], "a": A, "b": B}, "__metadata__ should hold texts by name"),
    ({"__metadata__": "text", "a": A, "b": B}, "__metadata__ should hold texts by name"),
    ({"__metadata__": {"n": 5}, "a": A, "b": B}, "__metadata__ should hold texts by name"),
    ({"__metadata__": {"n": None}, "a": A, "b": B}, "__metadata__ should hold texts by name"),
    ([A], "should hold a JSON object, not a list"),
]


@pytest.mark.parametrize(("header", "line"), ENTRIES, ids=range(len(ENTRIES)))
def test_faulty_entries(header, line, tmp_path):
    assert line in fault(write(tmp_path / "f", header))


TEXTS = [
    (b'{"a":' * 50_000, "nested"),
    (b"not json", "not JSON"),
    (json.dumps({"a": A})[:-1].encode() + b',"a":' + json.dumps(B).encode() + b"}", "'a' comes twice"),
    (rb'{"\ud800": {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}}', "surrogate"),
    (rb'{"__metadata__": {"\ud800": "x"}}', "surrogate"),
    (b'{"a": \xff}', "UTF-8"),
]


@pytest.mark.parametrize(("text", "line"), TEXTS, ids=range(len(TEXTS)))
def test_faulty_texts(text, line, tmp_path):
    assert line in fault(write(tmp_path / "f", text))


def test_lengths(tmp_path):
    path = tmp_path / "f"
    for content in (b"", b"\1\0\0", bytes(8), (10**15).to_bytes(8, "little") + b"{}", b"\xff" * 100):
        path.write_bytes(content)
        assert "not a safetensors file" in fault(path)
    with path.open("wb") as file:  # sparse: as long as its header promises
        file.write((2**30).to_bytes(8, "little"))
        file.truncate(2**31)
    assert "a header of 1073741824 bytes" in fault(path)


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "no file" in fault(tmp_path / "pipe")
    assert "a folder" in fault(tmp_path)
    assert "cannot be read: No such file" in fault(tmp_path / "none")


def test_very_many_tensors(tmp_path):
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    path = write(tmp_path / "f", {f"t{i}": entry for i in range(headers.MAX_TENSORS + 1)}, b"")
    assert f"{headers.MAX_TENSORS + 1} tensors" in fault(path)


def test_fast(tmp_path):
    """780 tensors, as FLUX.1 has, in milliseconds."""
    entry = {"dtype": "BF16", "shape": [2, 2]}
    name = "double_blocks.{}.img_attn.norm.query_norm.scale"
    header = {name.format(i): {**entry, "data_offsets": [8 * i, 8 * i + 8]} for i in range(780)}
    path = write(tmp_path / "f", header, bytes(8 * 780))
    times = []
    for _ in range(5):
        start = time.process_time()
        headers.read_header(path)
        times.append(time.process_time() - start)
    assert min(times) < 0.05


def test_as_many_tensors_as_are_read(tmp_path):
    """Each under a name that some table knows, as many blocks as there may be."""
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    for kind, names in (
        ("ae", [f"encoder.down_blocks.{i % 16}.resnets.{i // 16}.conv1.weight" for i in range(2**14)]),
        ("transformer", [f"double_blocks.{i % 512}.img_attn.{i}.weight" for i in range(2**14)]),
    ):
        path = write(tmp_path / "f.safetensors", dict.fromkeys(names, entry), b"")
        start = time.process_time()
        with pytest.raises(FluxError):
            checkpoints.load_part(layouts.part_of_file(path, kind))
        assert time.process_time() - start < 5


def test_block_count():
    assert headers.block_count([], "x") == 0
    assert headers.block_count(["0", "3", "1"], "x") == 4
    assert headers.block_count(["511"], "x") == 512
    for number in ("512", "2000000", "1" + "0" * 18, "1" * 500):
        with pytest.raises(FluxError, match=r"double_blocks.* a block's number may be 511 at most") as error:
            headers.block_count(["0", number], "double_blocks")
        assert len(str(error.value)) < 100


def test_a_block_number_takes_no_memory(tmp_path):
    """Through the loader: before a network is sized."""
    for kind, name in (
        ("transformer", "double_blocks.{}.img_attn.qkv.weight"),
        ("transformer", "transformer_blocks.{}.ff.net.0.proj.weight"),
        ("ae", "encoder.down.{}.block.0.conv1.weight"),
        ("ae", "encoder.down_blocks.{}.resnets.0.conv1.weight"),
        ("clip", "text_model.encoder.layers.{}.mlp.fc1.weight"),
        ("t5", "encoder.block.{}.layer.0.SelfAttention.q.weight"),
    ):
        for number in (0, 10**6, 10**18):
            path = tmp_path / "f.safetensors"
            tensors.save(path, {name.format(number): mx.zeros((2, 2))})
            start = time.process_time()
            with pytest.raises(FluxError) as error:
                checkpoints.load_part(layouts.part_of_file(path, kind))
            most = 15 if kind == "ae" else 511
            assert (f"{most} at most" in str(error.value)) == (number > 0), name
            assert str(path) in str(error.value)
            assert time.process_time() - start < 2
