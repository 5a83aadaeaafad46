"""GGUF without its package: values by hand, names, and files from strangers."""

import random
import struct

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from flux.errors import FluxError
from flux.models.transformer import Flux
from flux.weights import checkpoints, gguf, tensors
from flux.weights.layouts import Part
from tests import tiny
from tests.gguf_files import blocks, key, text, write

HALF = np.float16(0.5).tobytes()


def one(tmp_path, dtype, shape, content, **keys) -> np.ndarray:
    path = write(tmp_path / "f.gguf", {"x.weight": (dtype, shape, content)}, keys)
    return np.array(tensors.load([path])["x.weight"])


def test_q8_0(tmp_path):
    values = np.arange(-16, 16, dtype=np.int8)
    out = one(tmp_path, "Q8_0", (1, 32), HALF + values.tobytes())
    assert out.tolist() == [(values * 0.5).tolist()]


def test_q4_0(tmp_path):
    """The lower halves of 16 bytes are the first 16 weights, the upper ones the others; zero is 8."""
    out = one(tmp_path, "Q4_0", (1, 32), HALF + bytes(i | (15 - i) << 4 for i in range(16)))
    assert out.tolist() == [[0.5 * (i - 8) for i in range(16)] + [0.5 * (7 - i) for i in range(16)]]


def test_q4_1(tmp_path):
    out = one(tmp_path, "Q4_1", (1, 32), HALF + np.float16(3).tobytes() + bytes([0x21] * 16))
    assert out.tolist() == [[3.5] * 16 + [4.0] * 16]


def test_in_the_working_type_and_in_few_bits(tmp_path):
    """A Q8_0 file stays in 8 bits, its scales in the working type."""
    network = tiny.randomize(Flux(tiny.FLUX), 3)
    rng, coded = np.random.default_rng(4), {}
    for name, w in tiny.parameters(network).items():
        small = name.startswith(("double_blocks", "img_in")) and w.ndim == 2 and w.shape[1] % 32 == 0
        content = blocks("Q8_0", w.shape, rng) if small else np.array(w).tobytes()
        coded[name] = ("Q8_0" if small else "F32", w.shape, content)
    path = write(tmp_path / "flux1-dev.gguf", coded)
    flux = checkpoints.load_part(Part("transformer", (path,)), mx.bfloat16)
    qkv = flux.double_blocks[0].img_attn.qkv
    assert isinstance(qkv, nn.QuantizedLinear)
    assert (qkv.bits, qkv.group_size, qkv.mode, qkv.scales.dtype) == (8, 32, "affine", mx.bfloat16)
    assert isinstance(flux.single_blocks[0].linear1, nn.Linear)
    assert {w.dtype for w in tiny.parameters(flux).values()} == {mx.bfloat16, mx.uint32}
    wide = tensors.load([path])["double_blocks.0.img_attn.qkv.weight"]
    again = mx.dequantize(qkv.weight, qkv.scales, qkv.biases, group_size=32, bits=8)
    assert mx.linalg.norm(again - wide) / mx.linalg.norm(wide) < 2**-8


def test_names_of_a_whole_t5(tmp_path):
    """The decoder of a T5 that llama.cpp converted whole is named so that it is passed over."""
    one_number = ("F32", (1,), b"\0\0\0\0")
    names = ("token_embd.weight", "enc.blk.3.ffn_down.weight", "dec.blk.0.attn_q.weight", "strange.weight")
    path = write(tmp_path / "f.gguf", dict.fromkeys(names, one_number), {"general.architecture": "t5"})
    assert list(tensors.read_header(path).tensors) == [
        "shared.weight",
        "encoder.block.3.layer.1.DenseReluDense.wo.weight",
        "decoder.blk.0.attn_q.weight",
        "strange.weight",
    ]


def test_keys(tmp_path):
    keys = {"general.architecture": "flux", "general.alignment": 32, "a.list": [1, 2, 3]}
    header = gguf.read_header(write(tmp_path / "f.gguf", {}, keys))
    assert header.metadata["general.alignment"] == "32"
    assert "a.list" not in header.metadata


def test_fingerprint(tmp_path):
    content = bytearray(blocks("Q8_0", (4, 64), np.random.default_rng(5)))
    first = tensors.fingerprint(write(tmp_path / "a.gguf", {"x": ("Q8_0", (4, 64), bytes(content))}))
    content[len(content) // 2] ^= 1
    assert first != tensors.fingerprint(write(tmp_path / "b.gguf", {"x": ("Q8_0", (4, 64), bytes(content))}))


# --- Files from strangers ---


def fault(path) -> str:
    with pytest.raises(FluxError) as error:
        tensors.load([path])
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    return str(error.value)


def test_types_that_are_not_read_are_named(tmp_path):
    path = write(tmp_path / "f.gguf", {"x.weight": ("IQ4_XS", (1, 256), bytes(136))})
    assert "x.weight has the type IQ4_XS; read are F32, F16, BF16, Q4_0" in fault(path)


def head(tensors_count: int, keys: int, rest: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors_count, keys) + rest


def entry(name: str, shape=(4,), dtype=0, offset=0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, dtype, offset)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"GGUF", "ends within its header"),
        (head(0, 0, version=1), "version is 1"),
        (head(2**63, 0), "promises 9223372036854775808 tensors"),
        (head(0, 2**40), "1099511627776 keys"),
        (head(0, 1, struct.pack("<Q", 2**62)), "a text of 4611686018427387904 bytes"),
        (
            head(0, 1, text("k") + struct.pack("<IIQ", 9, 0, 2**60)),
            "an array of 1152921504606846976 elements",
        ),
        (head(0, 1, text("k") + struct.pack("<IIQ", 9, 9, 1)), "elements of type 9"),
        (head(0, 1, text("k") + struct.pack("<I", 77)), "unknown type 77"),
        (head(1, 0, entry("a", (1,) * 9)), "a' has 9 axes"),
        (head(1, 0, entry("a", (2**40, 0))), "a has the shape (0, 1099511627776)"),
        (head(1, 0, entry("a", (33,), dtype=8)), "Q8_0 has blocks of 32"),
        (head(1, 0, entry("a", (2**30,))), "cut short: a ends at"),
        (head(1, 0, entry("a", offset=2**60)), "cut short: a ends at"),
        (head(1, 0, entry("a", offset=8)), "overlaps"),
        (head(2, 0, entry("a") + entry("b")) + bytes(64), "b overlaps"),
        (head(2, 0, entry("a") + entry("a", offset=32)) + bytes(99), "two tensors have the same name"),
        (head(1, 0, entry("a\nb")) + bytes(64), "'a\\nb' has 1 axes"),
        (head(0, 1, key("general.alignment", 0)), "alignment is 0"),
    ],
)
def test_damaged(content, words, tmp_path):
    path = tmp_path / "f.gguf"
    path.write_bytes(content)
    assert words in fault(path)


def test_cut_short(tmp_path):
    path = write(tmp_path / "f.gguf", {"x.weight": ("Q8_0", (4, 32), bytes(136))})
    path.write_bytes(path.read_bytes()[:-1])
    assert "cut short: x.weight ends at" in fault(path)


def test_no_file_and_no_bytes(tmp_path):
    (tmp_path / "empty.gguf").write_bytes(b"")
    with pytest.raises(FluxError, match=r"empty\.gguf"):
        gguf.read_header(tmp_path / "empty.gguf")
    with pytest.raises(FluxError, match="No such file"):
        gguf.read_header(tmp_path / "none.gguf")


def test_any_bytes_end_in_one_line(tmp_path):
    """300 files with a few bytes changed, cut or put in: read, or refused in one line."""
    rng, path = random.Random(6), tmp_path / "f.gguf"
    content = {
        "x.weight": ("Q8_0", (4, 32), bytes(136)),
        "y": ("F16", (3, 2), bytes(12)),
        "z.weight": ("Q4_0", (2, 32), bytes(36)),
    }
    good = write(path, content, {"general.architecture": "flux", "n": 3, "l": [1, 2]}).read_bytes()
    for _ in range(300):
        bad = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            bad[rng.randrange(len(bad) * 3 // 4)] = rng.choice((0, 1, 2, 8, 9, 127, 128, 255))
        path.write_bytes(bad[: rng.choice((len(bad), rng.randrange(len(bad))))])
        assert "\n" not in outcome(path, packed=rng.random() < 0.5)


def outcome(path, packed: bool) -> str:
    try:
        mx.eval(tensors.load([path], packed))
    except FluxError as error:
        return str(error)
    return "read"
