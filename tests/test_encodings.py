"""Other programs' encodings beside formulas of their own in NumPy and PyTorch: to the bit, in float32."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from flux.errors import FluxError
from flux.models.transformer import Flux
from flux.weights import checkpoints, keymaps, layouts, tensors
from flux.weights.layouts import Part
from tests import tiny

torch = pytest.importorskip("torch")
save_file = pytest.importorskip("safetensors.torch").save_file

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def text(content: dict) -> torch.Tensor:
    return torch.frombuffer(bytearray(json.dumps(content).encode()), dtype=torch.uint8).clone()


def load(path: Path, content: dict, metadata: dict | None = None) -> dict[str, np.ndarray]:
    save_file({name: tensor.contiguous() for name, tensor in content.items()}, path, metadata)
    return {name: np.array(w.astype(mx.float32)) for name, w in tensors.load([path]).items()}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def same(out: np.ndarray, wanted: torch.Tensor) -> bool:
    return out.shape == tuple(wanted.shape) and bool((out == wanted.float().numpy()).all())


# --- Scaled fp8 and int8 ---

SCALES = {
    "tensor": ((), lambda s, w: s),
    "tensor of one": ((1,), lambda s, w: s),
    "row": ((6, 1), lambda s, w: s),
    "row without an axis": ((6,), lambda s, w: s[:, None]),
    "block": ((2, 4), lambda s, w: s.repeat_interleave(3, 0).repeat_interleave(2, 1)),
    "row and block": ((6, 4), lambda s, w: s.repeat_interleave(2, 1)),
    "block with a third axis": ((6, 4, 1), lambda s, w: s[..., 0].repeat_interleave(2, 1)),
    "column": ((1, 8), lambda s, w: s),
}


@pytest.mark.parametrize("kind", SCALES)
@pytest.mark.parametrize("dtype", [E4M3, E5M2, torch.int8])
@pytest.mark.parametrize("spelling", ["old", "new", "marker", "no input"])
def test_scaled(kind, dtype, spelling, tmp_path):
    shape, spread = SCALES[kind]
    weight = (20 * random(6, 8)).to(dtype)
    scale = random(*shape, seed=1).abs() + 0.1
    names = ("scale_weight", "scale_input") if spelling == "old" else ("weight_scale", "input_scale")
    content = {"x.weight": weight, f"x.{names[0]}": scale, "x.bias": random(6)}
    if spelling != "no input":
        content[f"x.{names[1]}"] = torch.tensor(1.0)
    if spelling == "old":
        content["scaled_fp8"] = torch.zeros(2, dtype=E4M3)
    if spelling == "marker":
        names = {E4M3: "float8_e4m3fn", E5M2: "float8_e5m2", torch.int8: "int8_tensorwise"}
        content["x.comfy_quant"] = text({"format": names[dtype]})
    out = load(tmp_path / "f.safetensors", content)
    assert out.keys() == {"x.weight", "x.bias"}
    assert same(out["x.weight"], weight.float() * spread(scale, weight))


def test_a_marker_alone_is_plain_fp8(tmp_path):
    weight = random(4, 4).to(E4M3)
    content = {"x.weight": weight, "x.comfy_quant": text({"format": "float8_e4m3fn"})}
    out = load(tmp_path / "f.safetensors", content)
    assert same(out["x.weight"], weight)


def test_e5m2_beside_every_other_type(tmp_path):
    content = {
        "a": random(3, 5).to(E5M2),
        "b": random(3, 5).to(E4M3),
        "c": random(3, 5),
        "d": random(3, 5).half(),
        "e": random(3, 5).bfloat16(),
        "f": torch.arange(7),
        "g": torch.tensor([True, False]),
        "h": torch.zeros(0, 3),
        "i": torch.tensor(2.5),
    }
    out = load(tmp_path / "f.safetensors", content)
    assert all(same(out[name], tensor) for name, tensor in content.items())


# --- bitsandbytes ---


Coded = tuple[dict[str, torch.Tensor], torch.Tensor]


def four_bits(weight: torch.Tensor, kind: str, block: int, nested: bool, seed: int) -> Coded:
    """Tensors as bitsandbytes names them, with random contents, and the weight that they stand for."""
    g = torch.Generator().manual_seed(seed)
    count = weight.numel()
    blocks = -(-count // block)
    table = torch.sort(torch.rand(16, generator=g) * 2 - 1)[0]
    packed = torch.randint(0, 256, (-(-count // 2), 1), generator=g, dtype=torch.uint8)
    state = {"quant_type": kind, "blocksize": block, "dtype": "bfloat16", "shape": list(weight.shape)}
    content = {"": packed, ".quant_map": table}
    if nested:
        codes = torch.randint(0, 256, (blocks,), generator=g, dtype=torch.uint8)
        inner, outer = torch.rand(256, generator=g), torch.rand(-(-blocks // 256), generator=g)
        state |= {"nested_blocksize": 256, "nested_offset": 0.25, "nested_dtype": "float32"}
        content |= {".absmax": codes, ".nested_quant_map": inner, ".nested_absmax": outer}
        largest = inner[codes.long()] * outer.repeat_interleave(256)[:blocks] + 0.25
    else:
        largest = content[".absmax"] = torch.rand(blocks, generator=g)
    content[f".quant_state.bitsandbytes__{kind}"] = text(state)
    flat = packed.flatten()
    entries = torch.stack([flat >> 4, flat & 15], 1).flatten()[:count].long()
    wanted = table[entries] * largest.repeat_interleave(block)[:count]
    return content, wanted.reshape(weight.shape)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(6, 64), (5, 7), (130, 260)])
def test_four_bits(kind, nested, shape, tmp_path):
    content, wanted = four_bits(torch.zeros(shape), kind, 64, nested, 3)
    out = load(tmp_path / "f.safetensors", {f"p.x.weight{name}": t for name, t in content.items()})
    assert out.keys() == {"p.x.weight"}
    assert same(out["p.x.weight"], wanted)


def test_int8_of_bitsandbytes(tmp_path):
    weight, largest = (40 * random(5, 8)).to(torch.int8), random(5, seed=1).abs()
    content = {"x.weight": weight, "x.SCB": largest, "x.weight_format": torch.tensor(0, dtype=torch.uint8)}
    out = load(tmp_path / "f.safetensors", content)
    assert out.keys() == {"x.weight"}
    assert same(out["x.weight"], weight.float() * (largest[:, None] / 127))


@pytest.mark.parametrize("layout", ["one file", "diffusers"])
def test_a_transformer_in_nf4(layout, tmp_path):
    """As Forge's files (BFL's names behind a prefix) and as a folder that diffusers saved."""
    network = tiny.randomize(Flux(tiny.FLUX), 4)
    theirs = keymaps.to_file("transformer", tiny.parameters(network), diffusers=layout == "diffusers")
    prefix = "model.diffusion_model." if layout == "one file" else ""
    content, plain = {}, {}
    for i, (name, w) in enumerate(theirs.items()):
        weight = torch.from_numpy(np.array(w))
        if w.ndim == 2 and "blocks" in name:
            coded, wanted = four_bits(weight, "nf4", 64, layout == "diffusers", i)
            content |= {prefix + name + part: t for part, t in coded.items()}
            plain[name] = mx.array(wanted.numpy())
        else:
            content[prefix + name], plain[name] = weight, w
    load(tmp_path / "f.safetensors", content)
    loaded = checkpoints.load_part(Part("transformer", (tmp_path / "f.safetensors",)), mx.float32)
    network.load_weights(list(keymaps.to_ours("transformer", plain).items()))
    assert tiny.same(loaded, network)


NAMES = {  # of a layer's data and scale
    "quanto": (".weight._data", ".weight._scale"),
    "torchao": ("._weight_qdata", "._weight_scale"),
    "ComfyUI": (".weight", ".weight_scale"),
}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("layout", ["BFL", "diffusers"])
@pytest.mark.parametrize("kind", NAMES)
def test_a_transformer_in_int8(kind, layout, prefix, tmp_path):
    """Every matrix in bytes, so that none of the file's weights has its plain name."""
    network = tiny.randomize(Flux(tiny.FLUX), 4)
    theirs = keymaps.to_file("transformer", tiny.parameters(network), diffusers=layout == "diffusers")
    content, plain, metadata = {}, {}, {}
    for name, w in theirs.items():
        weight, layer = torch.from_numpy(np.array(w)), name.removesuffix(".weight")
        if w.ndim == 2:
            scale = weight.abs().amax(1, keepdim=True) / 127
            data = (weight / scale).round().to(torch.int8)
            content |= dict(zip((prefix + layer + part for part in NAMES[kind]), (data, scale), strict=True))
            metadata[f"{prefix}{name}"] = json.dumps({"_type": "Int8Tensor"})
            plain[name] = mx.array((data.float() * scale).numpy())
        else:
            content[prefix + name], plain[name] = weight, w
    load(tmp_path / "f.safetensors", content, metadata)
    part = layouts.part_of_file(tmp_path / "f.safetensors", "transformer")
    loaded = checkpoints.load_part(part, mx.float32)
    network.load_weights(list(keymaps.to_ours("transformer", plain).items()))
    assert tiny.same(loaded, network)


def test_a_layer_in_two_files(tmp_path):
    """diffusers cuts shards between tensors, so that a layer's parts may lie in two."""
    content, wanted = four_bits(torch.zeros(8, 64), "nf4", 64, False, 5)
    items = [(f"x.weight{name}", tensor) for name, tensor in content.items()]
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    save_file(dict(items[:2]), files[0])
    save_file(dict(items[2:]), files[1])
    assert same(np.array(tensors.load(files)["x.weight"]), wanted)


# --- optimum-quanto and torchao ---


@pytest.mark.parametrize("dtype", [torch.int8, E4M3])
def test_quanto_8_bits(dtype, tmp_path):
    data, scale = (20 * random(6, 8)).to(dtype), random(6, 1, seed=1).abs()
    content = {"x.weight._data": data, "x.weight._scale": scale}
    content |= {"x.input_scale": torch.tensor(1.0), "x.output_scale": torch.tensor(1.0)}
    out = load(tmp_path / "f.safetensors", content)
    assert out.keys() == {"x.weight"}
    assert same(out["x.weight"], data.float() * scale)


@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize(("rows", "width", "group"), [(6, 64, 32), (5, 96, 32), (6, 16, 16)])
def test_quanto_few_bits(bits, rows, width, group, tmp_path):
    """A byte holds one row of groups from each 1/n of all of them, the first lowest."""
    groups, each = rows * width // group, 8 // bits
    values = random(groups, group).view(torch.uint8)[:, ::4] & (2**bits - 1)
    height = -(-groups // each)
    padded = torch.cat([values, torch.zeros(height * each - groups, group, dtype=torch.uint8)])
    packed = sum(padded[i * height : (i + 1) * height] << (bits * i) for i in range(each)).to(torch.uint8)
    scale, shift = random(groups, 1, seed=3).abs(), random(groups, 1, seed=4)
    content = {"x.weight._data._data": packed, "x.weight._scale": scale, "x.weight._shift": shift}
    out = load(tmp_path / "f.safetensors", content | {"x.bias": random(rows)})
    assert out.keys() == {"x.weight", "x.bias"}
    assert same(out["x.weight"], (scale * values.float() - shift).reshape(rows, width))


@pytest.mark.parametrize("kind", ["Int8Tensor", "IntxUnpackedToInt8Tensor", "Float8Tensor"])
@pytest.mark.parametrize("columns", [1, 2])
def test_torchao_whole_bytes(kind, columns, tmp_path):
    data = (20 * random(6, 8)).to(E4M3 if kind == "Float8Tensor" else torch.int8)
    scale = random(6, columns, seed=1).abs()
    content = {"p.x._weight_qdata": data, "p.x._weight_scale": scale, "p.x.bias": random(6)}
    wanted = data.float()
    if kind != "Float8Tensor":
        zero = torch.randint(-3, 4, (6, columns), generator=torch.Generator().manual_seed(2)).to(torch.int8)
        content["p.x._weight_zero_point"] = zero
        wanted = wanted - zero.float().repeat_interleave(8 // columns, 1)
    metadata = {"p.x.weight": json.dumps({"_type": kind})}
    out = load(tmp_path / "f.safetensors", content, metadata)
    assert out.keys() == {"p.x.weight", "p.x.bias"}
    wanted = wanted * scale.repeat_interleave(8 // columns, 1)
    np.testing.assert_allclose(out["p.x.weight"], wanted.numpy(), rtol=1e-6, atol=1e-6)


def test_torchao_int4(tmp_path):
    """Signed numbers, the even column in a byte's lower half; scale and zero point (I / group, O)."""
    numbers = torch.randint(-8, 8, (6, 64), generator=torch.Generator().manual_seed(1))
    packed = ((numbers[:, 1::2] & 15) << 4 | (numbers[:, ::2] & 15)).to(torch.uint8).view(torch.int8)
    scale, zero = random(2, 6, seed=2).abs(), random(2, 6, seed=3)
    content = {"x._weight_qdata": packed, "x._weight_scale": scale, "x._weight_zero_point": zero}
    out = load(tmp_path / "f.safetensors", content, {"x.weight": json.dumps({"_type": "Int4Tensor"})})
    wide = [t.T.repeat_interleave(32, 1) for t in (scale, zero)]
    assert same(out["x.weight"], numbers.float() * wide[0] + wide[1])


# --- What is not read, and nonsense ---

UNREAD = {
    "SVDQuant": {"x.qweight": torch.zeros(2, 2), "x.wscales": torch.zeros(2)},
    "nvfp4": {"x.weight": torch.zeros(2, 2, dtype=torch.uint8), "x.weight_scale_2": torch.tensor(1.0)},
    "exl3": {"x.trellis": torch.zeros(2)},
    "GPTQ or AWQ": {"x.qweight": torch.zeros(2), "x.qzeros": torch.zeros(2)},
    "mxfp8": {"x.weight": random(2, 2).to(E4M3), "x.weight_scale": torch.zeros(2, 1, dtype=torch.uint8)},
    "format 'nvfp4'": {"x.weight": random(2, 2).to(E4M3), "x.comfy_quant": text({"format": "nvfp4"})},
    "rotated (convrot)": {
        "x.weight": torch.zeros(2, 2, dtype=torch.int8),
        "x.weight_scale": torch.ones(2),
        "x.comfy_quant": text({"format": "int8_tensorwise", "convrot": True}),
    },
    "does not say of which class": {"x._weight_qdata": torch.zeros(2), "x._weight_scale": torch.ones(1)},
    "a GPU's order": {
        "x.weight": torch.zeros(2, 2, dtype=torch.int8),
        "x.SCB": torch.ones(2),
        "x.weight_format": torch.tensor(2, dtype=torch.uint8),
    },
    "without a bias": {
        "x.weight._data._data": torch.zeros(2, 4, dtype=torch.uint8),
        "x.weight._scale": torch.ones(4, 1),
        "x.weight._shift": torch.ones(4, 1),
    },
    "scales of the shape (3,)": {"x.weight": random(4, 4).to(E4M3), "x.weight_scale": torch.ones(3)},
    "weight._scale is missing": {"x.weight._data": torch.zeros(2, 2, dtype=torch.int8)},
}


@pytest.mark.parametrize("words", UNREAD)
def test_refused_by_name(words, tmp_path):
    with pytest.raises(FluxError) as error:
        load(tmp_path / "f.safetensors", UNREAD[words])
    assert words in str(error.value)
    assert "f.safetensors" in str(error.value)
    assert "use this model in bf16" in str(error.value)


def test_a_class_of_torchao_that_is_not_read(tmp_path):
    content = {"x._weight_qdata": torch.zeros(2, 2), "x._weight_scale": torch.ones(1)}
    with pytest.raises(FluxError, match="x is torchao: the class 'MXTensor' is not read"):
        load(tmp_path / "f.safetensors", content, {"x.weight": '{"_type": "MXTensor"}'})


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"shape": [8, 64], "blocksize": 0},
        {"shape": [8, 64], "blocksize": "64"},
        {"shape": [8, 64], "blocksize": 2**30},
        {"shape": "8", "blocksize": 64},
        {"shape": [2**40, 2**40], "blocksize": 64},
        {"shape": [8, 65], "blocksize": 64},
        {"shape": [8, 64], "blocksize": 128},
        {"shape": [-8, -64], "blocksize": 64},
    ],
)
def test_a_state_of_bitsandbytes_that_makes_no_sense(state, tmp_path):
    content, _ = four_bits(torch.zeros(8, 64), "nf4", 64, False, 5)
    content[".quant_state.bitsandbytes__nf4"] = text(state)
    with pytest.raises(FluxError, match="x is bitsandbytes nf4 or fp4: its"):
        load(tmp_path / "f.safetensors", {f"x.weight{name}": t for name, t in content.items()})


def test_a_state_that_is_no_json(tmp_path):
    content, _ = four_bits(torch.zeros(8, 64), "nf4", 64, False, 5)
    for bad in (b"{", b"[" * 5000, b"\xff", b"3"):
        content[".quant_state.bitsandbytes__nf4"] = torch.tensor(list(bad), dtype=torch.uint8)
        with pytest.raises(FluxError, match="x is bitsandbytes"):
            load(tmp_path / "f.safetensors", {f"x.weight{name}": t for name, t in content.items()})
