"""GGUF files against the `gguf` package: its writer's files, its dequantization to the bit, its T5 names."""

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from flux.models.t5 import T5Encoder
from flux.models.transformer import Flux
from flux.weights import checkpoints, ggml, gguf, keymaps, quantize, tensors
from flux.weights.layouts import Part
from tests import tiny
from tests.gguf_files import BLOCKS, blocks

reference = pytest.importorskip("gguf")

FLUX = replace(tiny.FLUX, hidden_size=256, num_heads=8, depth=1, depth_single_blocks=1)  # 256: K's blocks
T5 = replace(tiny.T5, d_model=256, d_ff=512, d_kv=64, num_heads=4)
EXACT = [name for name, kind in ggml.TYPES.items() if kind.bits]  # what MLX's layers can hold


def number(dtype: str) -> "reference.GGMLQuantizationType":
    return reference.GGMLQuantizationType[dtype]


def dequantized(raw: bytes, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    rows = np.frombuffer(raw, np.uint8).reshape(*shape[:-1], -1)
    return reference.quants.dequantize(rows, number(dtype))


def write(path, arrays, architecture="flux", keys=()):
    """By the package's own writer. arrays: name -> float array, or (type, shape, bytes of blocks)."""
    writer = reference.GGUFWriter(path, architecture)
    for name, value in keys:
        writer.add_array(name, value)
    for name, array in arrays.items():
        if isinstance(array, tuple):
            dtype, shape, raw = array
            rows = np.frombuffer(raw, np.uint8).reshape(*shape[:-1], -1)
            writer.add_tensor(name, rows, raw_dtype=number(dtype))
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("dtype", BLOCKS)
@pytest.mark.parametrize("shape", [(6, 512), (1, 256), (3, 2, 256)])
def test_dequantized_to_the_bit(dtype, shape, tmp_path):
    raw = blocks(dtype, shape, np.random.default_rng(len(dtype) + shape[0]))
    path = write(tmp_path / "f.gguf", {"x.weight": (dtype, shape, raw)})
    out = np.array(tensors.load([path])["x.weight"])
    assert out.dtype == np.float32
    assert out.shape == shape
    np.testing.assert_array_equal(out.view(np.uint32), dequantized(raw, dtype, shape).view(np.uint32))


@pytest.mark.parametrize("dtype", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_what_the_package_quantizes(dtype, tmp_path):
    weight = np.random.default_rng(1).standard_normal((5, 96)).astype(np.float32)
    rows = reference.quants.quantize(weight, number(dtype))
    path = write(tmp_path / "f.gguf", {"x.weight": (dtype, weight.shape, rows.tobytes())})
    wanted = reference.quants.dequantize(rows, number(dtype))
    np.testing.assert_array_equal(np.array(tensors.load([path])["x.weight"]), wanted)
    assert np.abs(wanted - weight).max() < 0.5


@pytest.mark.parametrize("dtype", EXACT)
def test_repacked_to_the_bit(dtype, tmp_path):
    shape = (7, 768)
    raw = blocks(dtype, shape, np.random.default_rng(3))
    path = write(tmp_path / "f.gguf", {"x.weight": (dtype, shape, raw), "x.bias": np.zeros(7, np.float32)})
    header = gguf.read_header(path)
    packed = tensors.load([path], packed=True)
    assert {name: w.dtype for name, w in packed.items()} == {
        "x.weight": mx.uint32,
        "x.scales": mx.float32,
        "x.biases": mx.float32,
        "x.bias": mx.float32,
    }
    wide, layers = quantize.split(packed, header.metadata, {})
    assert (layers["x.weight"].bits, layers["x.weight"].group_size) == (ggml.TYPES[dtype].bits, 32)
    np.testing.assert_array_equal(np.array(wide["x.weight"]), dequantized(raw, dtype, shape))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_floats(dtype, tmp_path):
    array = np.random.default_rng(4).standard_normal((3, 5)).astype(dtype)
    out = tensors.load([write(tmp_path / "f.gguf", {"a": array})])["a"]
    assert out.dtype == getattr(mx, dtype)
    np.testing.assert_array_equal(np.array(out), array)


def test_bfloat16(tmp_path):
    array = np.random.default_rng(5).standard_normal((3, 8)).astype(np.float32)
    rows = reference.quants.quantize(array, number("BF16"))
    path = write(tmp_path / "f.gguf", {"a": ("BF16", array.shape, rows.tobytes())})
    out = tensors.load([path])["a"]
    assert out.dtype == mx.bfloat16
    wanted = reference.quants.dequantize(rows, number("BF16"))
    np.testing.assert_array_equal(np.array(out.astype(mx.float32)), wanted)


def test_a_shape_that_the_blocks_changed(tmp_path):
    """ComfyUI-GGUF's converter reshapes what has too short a last axis, and says so."""
    raw = blocks("Q8_0", (4, 64), np.random.default_rng(6))
    keys = [("comfy.gguf.orig_shape.x.weight", [16, 4, 2, 2])]
    path = write(tmp_path / "f.gguf", {"x.weight": ("Q8_0", (4, 64), raw)}, keys=keys)
    out = np.array(tensors.load([path])["x.weight"])
    np.testing.assert_array_equal(out, dequantized(raw, "Q8_0", (4, 64)).reshape(16, 4, 2, 2))


def encoded(network, dtype: str, seed: int, chosen) -> tuple[dict, dict]:
    """A network's tensors with the chosen matrices in blocks; and all of them as floats."""
    rng, coded, plain = np.random.default_rng(seed), {}, {}
    for name, w in tiny.parameters(network).items():
        if chosen(name, w):
            raw = blocks(dtype, w.shape, rng, 0.3 * w.shape[1] ** -0.5 / 2 ** (4 if "K" in dtype else 3))
            coded[name], plain[name] = (dtype, w.shape, raw), mx.array(dequantized(raw, dtype, w.shape))
        else:
            coded[name], plain[name] = np.array(w), w
    return coded, plain


def velocity(flux) -> mx.array:
    return flux(
        img=mx.random.normal((1, 6, 16), key=mx.random.key(0)),
        img_ids=mx.zeros((1, 6, 3)),
        txt=mx.random.normal((1, 5, 48), key=mx.random.key(1)),
        txt_ids=mx.zeros((1, 5, 3)),
        timesteps=mx.array([0.5]),
        y=mx.random.normal((1, 32), key=mx.random.key(2)),
        guidance=mx.array([3.5]),
    )


def distance(a: mx.array, b: mx.array) -> float:
    return (mx.linalg.norm(a - b) / mx.linalg.norm(b)).item()


@pytest.mark.parametrize("layout", ["bfl", "diffusers"])
@pytest.mark.parametrize("dtype", ["Q8_0", "Q4_0", "Q5_1", "Q4_K", "Q6_K"])
def test_a_transformer(dtype, layout, tmp_path):
    """City96's files have BFL's names and quantize matrices of the blocks."""
    network = tiny.randomize(Flux(FLUX), 7)
    coded, plain = encoded(network, dtype, 8, lambda name, w: w.ndim == 2 and "blocks" in name)
    network.load_weights(list(plain.items()))
    if layout == "diffusers":  # rows of blocks are rows of weights: what is fused is cut between them
        as_bytes = {
            name: np.frombuffer(t[2], np.uint8).reshape(t[1][0], -1) if isinstance(t, tuple) else t
            for name, t in coded.items()
        }
        rows = keymaps.to_file("transformer", {n: mx.array(a) for n, a in as_bytes.items()}, diffusers=True)
        values, size = BLOCKS[dtype]
        coded = {
            name: (dtype, (a.shape[0], a.shape[1] // size * values), np.array(a).tobytes())
            if a.dtype == mx.uint8
            else np.array(a)
            for name, a in rows.items()
        }
    path = write(tmp_path / "flux1-dev.gguf", coded)
    loaded = checkpoints.load_part(Part("transformer", (path,)), mx.float32)
    quantized = [name for name, m in loaded.named_modules() if isinstance(m, nn.QuantizedLinear)]
    chosen = [name for name, w in tiny.parameters(network).items() if w.ndim == 2 and "blocks" in name]
    assert len(quantized) == (len(chosen) if dtype in EXACT else 0)
    assert distance(velocity(loaded), velocity(network)) <= 1e-5


def test_parts_of_a_fused_layer_of_different_types(tmp_path):
    """diffusers' q in 8 bits and k in 4: no layer of MLX's holds both, so that one is widened."""
    network = tiny.randomize(Flux(FLUX), 9)
    theirs = keymaps.to_file("transformer", tiny.parameters(network), diffusers=True)
    coded, plain = {name: np.array(w) for name, w in theirs.items()}, dict(theirs)
    rng = np.random.default_rng(10)
    for which, dtype in (("to_q", "Q8_0"), ("to_k", "Q4_0"), ("to_out.0", "Q4_1")):
        name = f"transformer_blocks.0.attn.{which}.weight"
        raw = blocks(dtype, theirs[name].shape, rng)
        coded[name] = (dtype, theirs[name].shape, raw)
        plain[name] = mx.array(dequantized(raw, dtype, theirs[name].shape))
    network.load_weights(list(keymaps.to_ours("transformer", plain).items()))
    path = write(tmp_path / "f.gguf", coded)
    loaded = checkpoints.load_part(Part("transformer", (path,)), mx.float32)
    assert isinstance(loaded.double_blocks[0].img_attn.proj, nn.QuantizedLinear)
    assert isinstance(loaded.double_blocks[0].img_attn.qkv, nn.Linear)
    assert mx.array_equal(
        loaded.double_blocks[0].img_attn.qkv.weight, network.double_blocks[0].img_attn.qkv.weight
    )
    assert distance(velocity(loaded), velocity(network)) <= 1e-5


@pytest.mark.parametrize("dtype", ["Q8_0", "Q5_K"])
def test_a_t5_with_llama_cpps_names(dtype, tmp_path):
    network = tiny.randomize(T5Encoder(T5), 11)
    table = reference.get_tensor_name_map(reference.MODEL_ARCH.T5ENCODER, T5.num_layers)
    coded, plain = encoded(
        network, dtype, 12, lambda name, w: w.ndim == 2 and "relative_attention" not in name
    )
    network.load_weights(list(plain.items()))
    renamed = {table.get_name(name, try_suffixes=(".weight",)): t for name, t in coded.items()}
    path = write(tmp_path / "t5.gguf", renamed, "t5encoder")
    assert set(tensors.read_header(path).tensors) == set(coded)
    loaded = checkpoints.load_part(Part("t5", (path,)), mx.float32)
    tokens = mx.array([[3, 17, 99, 1, 0, 0]])
    assert distance(loaded(tokens), network(tokens)) <= 1e-5
    assert mx.array_equal(loaded.shared.weight, network.shared.weight)
