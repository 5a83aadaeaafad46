"""The look at a file's numbers: what befalls whole tensors is named at load, and sound files pass."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from flux.errors import FluxError
from flux.weights import headers, tensors, values
from tests.test_checkpoints import write_raw


def check(path: Path, arrays: dict[str, mx.array]) -> None:
    tensors.save(path, arrays)
    entries = headers.read_header(path).tensors
    values.check(path, entries, entries)


def weights(shape: tuple[int, ...] = (64, 64), scale: float = 0.02) -> mx.array:
    return mx.array(np.random.default_rng(0).standard_normal(shape).astype(np.float32) * scale)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_sound(dtype, tmp_path):
    arrays = {
        "w": weights().astype(dtype),
        "large": weights((300, 50)).astype(dtype),
        "odd": weights((3, 1)).astype(dtype),
        "zero": mx.zeros((64, 64), dtype),
        "ones": mx.ones((64,), dtype),
        "empty": mx.zeros((0, 4), dtype),
        "one": mx.array(1.0, dtype),
        "packed": mx.zeros((4, 4), mx.uint32),
    }
    check(tmp_path / "f.safetensors", arrays)


def test_floats_are_those_of_mlx():
    numbers = weights((500,), 1.0)
    for name, dtype in (("F32", mx.float32), ("F16", mx.float16), ("BF16", mx.bfloat16)):
        cast = numbers.astype(dtype)
        data = bytes(memoryview(cast.view(mx.uint8)))
        np.testing.assert_array_equal(values.floats(data, name), np.array(cast.astype(mx.float32)))


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("shape", [(1,), (3, 5), (2000, 30)])
def test_not_finite(dtype, value, shape, tmp_path):
    path = tmp_path / "f.safetensors"
    with pytest.raises(FluxError, match=r"f\.safetensors: broken holds NaN or infinity"):
        check(path, {"w": weights(), "broken": mx.full(shape, value, dtype)})
    entries = headers.read_header(path).tensors
    values.check(path, entries, ["w"])  # what nobody asked about is nobody's fault


def test_one_type_called_the_other(tmp_path):
    bits = {kind: weights().astype(kind).view(mx.uint16) for kind in (mx.float16, mx.bfloat16)}
    with pytest.raises(FluxError, match="its BF16 tensors hold the bytes of float16"):
        check(tmp_path / "f.safetensors", {"w": bits[mx.float16].view(mx.bfloat16)})
    with pytest.raises(FluxError, match="its F16 tensors hold the bytes of bfloat16"):
        check(tmp_path / "f.safetensors", {"w": bits[mx.bfloat16].view(mx.float16)})


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 30.0])
def test_sizes_of_weights_that_are_sound(scale, tmp_path):
    """A young LoRA's are small, and embeddings' are large."""
    for dtype in (mx.float16, mx.bfloat16):
        check(tmp_path / "f.safetensors", {"w": weights(scale=scale).astype(dtype)})


@pytest.mark.parametrize(
    ("dtype", "sound", "broken"),
    [
        ("F64", np.array([1e-3, -5.0]).tobytes(), np.array([1e-3, 1e300]).tobytes()),
        ("F8_E4M3", bytes([0x7E, 0xFE]), bytes([0x10, 0xFF])),
        ("F8_E5M2", bytes([0x7B, 0x01]), bytes([0x7C, 0x01])),
    ],
)
def test_other_types(dtype, sound, broken, tmp_path):
    for data in (sound, broken):
        path = write_raw(tmp_path / "f.safetensors", {"w": (dtype, (2,), data)})
        entries = headers.read_header(path).tensors
        if data is sound:
            values.check(path, entries, entries)
        else:
            with pytest.raises(FluxError, match="w holds NaN or infinity"):
                values.check(path, entries, entries)


def test_float64_is_read(tmp_path):
    numbers = np.array([0.5, -3.0, 1e-3])
    path = write_raw(tmp_path / "f.safetensors", {"w": ("F64", (3,), numbers.tobytes())})
    found = tensors.load([path])["w"]
    assert found.dtype == mx.float32
    np.testing.assert_array_equal(np.array(found), numbers.astype(np.float32))
