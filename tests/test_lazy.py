"""Files are read when a tensor is first used, whatever their encoding: measured in processes of their own."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from flux.errors import FluxError
from flux.models.transformer import Flux, FluxParams
from flux.weights import lazy
from tests import tiny
from tests.gguf_files import BLOCKS, write

ROOT = Path(__file__).parents[1]
WIDE = FluxParams(
    hidden_size=768, num_heads=6, depth=2, depth_single_blocks=4, vec_in_dim=64, context_in_dim=64
)
SLACK = 12 * 2**20  # bytes that MLX's own tables and Python take


def test_any_part_of_a_file(tmp_path):
    content = np.random.default_rng(0).integers(0, 256, 70_001, dtype=np.uint8)
    path = tmp_path / "f.any"
    content.tofile(path)
    spans = {
        "all": (0, 70_001),
        "none": (5, 5),
        "first": (0, 3),
        "odd": (333, 1111),
        "last": (69_999, 70_001),
    }
    for _ in range(3):  # the numbers of open files come back
        out = lazy.read(path, spans)
        for name, (first, end) in spans.items():
            assert out[name].tolist() == content[first:end].tolist(), name


@pytest.mark.parametrize("size", [1, 479, 480, 481, 488, 500])
def test_short_files(size, tmp_path):
    """About as long as the header that stands in for the file."""
    content = bytes(i % 251 for i in range(size))
    (tmp_path / "f").write_bytes(content)
    assert bytes(lazy.read(tmp_path / "f", {"x": (0, size)})["x"].tolist()) == content


def test_many_spans(tmp_path):
    content = np.random.default_rng(1).integers(0, 256, 4000 * 100, dtype=np.uint8)
    content.tofile(tmp_path / "f")
    out = lazy.read(tmp_path / "f", {str(i): (100 * i, 100 * i + 100) for i in range(4000)})
    assert mx.array_equal(mx.concatenate(list(out.values())), mx.array(content))


def test_without_the_exchange(tmp_path, monkeypatch):
    """Should MLX open files otherwise one day, the bytes are right all the same."""
    content = np.random.default_rng(2).integers(0, 256, 9999, dtype=np.uint8)
    content.tofile(tmp_path / "f")
    monkeypatch.setattr(lazy, "_numbers", lambda descriptor: [])
    out = lazy.read(tmp_path / "f", {"a": (0, 50), "b": (5000, 9999)})
    assert out["a"].tolist() == content[:50].tolist()
    assert out["b"].tolist() == content[5000:].tolist()


def test_a_span_beyond_what_mlx_counts(tmp_path):
    with pytest.raises(FluxError, match="larger than 2 GiB"):
        lazy.read(tmp_path / "f", {"x": (0, 2**31)})


# --- Memory ---


def safetensors(
    path: Path, tensors: Mapping[str, tuple[str, tuple, bytes]], metadata: dict | None = None
) -> Path:
    header, start = {"__metadata__": metadata or {}}, 0
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, start + len(content)]}
        start += len(content)
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, _, content in tensors.values():
            file.write(content)
    return path


def is_large(name: str, shape: tuple) -> bool:
    return len(shape) == 2 and "blocks" in name


def gguf_file(path: Path, shapes: dict, rng: np.random.Generator, dtype: str) -> Path:
    tensors, (values, size) = {}, BLOCKS[dtype]
    for name, shape in shapes.items():
        count, large = int(np.prod(shape)), is_large(name, shape)
        length = count // values * size if large else 4 * count
        tensors[name] = (dtype, shape, rng.bytes(length)) if large else ("F32", shape, bytes(length))
    return write(path.with_suffix(".gguf"), tensors)


def fp8_file(path: Path, shapes: dict, rng: np.random.Generator, dtype: str) -> Path:
    tensors = {}
    for name, shape in shapes.items():
        count, large = int(np.prod(shape)), is_large(name, shape)
        data = (np.frombuffer(rng.bytes(count), np.uint8) & 0xBF).tobytes()  # no exponent of NaN or infinity
        tensors[name] = (dtype, shape, data) if large else ("BF16", shape, bytes(2 * count))
        if large:
            tensors[f"{name}_scale"] = ("F32", (), bytes(4))
    return safetensors(path, tensors)


def nf4_file(path: Path, shapes: dict, rng: np.random.Generator, dtype: str) -> Path:
    tensors = {}
    for name, shape in shapes.items():
        count = int(np.prod(shape))
        if not is_large(name, shape):
            tensors[name] = ("BF16", shape, bytes(2 * count))
            continue
        state = json.dumps({"shape": shape, "blocksize": 64}).encode()
        tensors[name] = ("U8", (count // 2, 1), rng.bytes(count // 2))
        tensors[f"{name}.absmax"] = ("F32", (count // 64,), rng.bytes(count // 16))
        tensors[f"{name}.quant_map"] = ("F32", (16,), rng.bytes(64))
        tensors[f"{name}.quant_state.bitsandbytes__nf4"] = ("U8", (len(state),), state)
    return safetensors(path, tensors)


def mlx_file(path: Path, shapes: dict, rng: np.random.Generator, dtype: str) -> Path:
    tensors = {}
    for name, shape in shapes.items():
        count = int(np.prod(shape))
        if is_large(name, shape):
            layer = name.removesuffix("weight")
            groups = (shape[0], shape[1] // 64)
            tensors[name] = ("U32", (shape[0], shape[1] // 4), rng.bytes(count))
            tensors |= {layer + part: ("BF16", groups, bytes(count // 32)) for part in ("scales", "biases")}
        else:
            tensors[name] = ("BF16", shape, bytes(2 * count))
    return safetensors(path, tensors, {"quantization_level": "8", "mflux_version": "0.9.0"})


FILES = {
    **{dtype: (gguf_file, dtype) for dtype in ("Q8_0", "Q5_K", "Q6_K")},
    **{"e4m3": (fp8_file, "F8_E4M3"), "e5m2": (fp8_file, "F8_E5M2")},
    **{"nf4": (nf4_file, ""), "mflux": (mlx_file, "")},
}
PROGRAM = """
import resource, sys
import flux
import mlx.core as mx
from flux.weights import checkpoints
from flux.weights.layouts import Part
from pathlib import Path

def peak():
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    status = Path("/proc/self/status").read_text()  # ru_maxrss begins with the parent's
    return 1024 * int(status.split("VmHWM:")[1].split()[0])

before = peak()
network = checkpoints.load_part(Part("transformer", (Path(sys.argv[1]),)), mx.bfloat16)
loaded = peak()
mx.eval(network.double_blocks[0].img_attn.qkv.parameters())
print(loaded - before, peak() - before)
"""


@pytest.mark.parametrize("kind", FILES)
def test_memory_before_a_tensor_is_used(kind, tmp_path):
    """Loading a file of tens of MB takes less than its largest tensor; using one layer, that one."""
    write_file, dtype = FILES[kind]
    shapes = {name: w.shape for name, w in tiny.parameters(Flux(WIDE)).items()}
    path = write_file(tmp_path / "flux1-dev.safetensors", shapes, np.random.default_rng(3), dtype)
    size, largest = path.stat().st_size, 4 * max(np.prod(shape) for shape in shapes.values())
    assert size > 25e6
    command = [sys.executable, "-c", PROGRAM, str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    loaded, used = map(int, done.stdout.split())
    assert loaded < min(SLACK, largest)
    assert used < size / 2 + largest + SLACK
    path.unlink()
