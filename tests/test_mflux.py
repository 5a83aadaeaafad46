"""Models that mflux saved, written here as mflux writes them: the same parameters, to the bit."""

import json
import re
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest

from flux.errors import FluxError
from flux.models.autoencoder import AutoEncoder
from flux.models.clip import CLIPTextModel
from flux.models.t5 import T5Encoder
from flux.models.transformer import Flux
from flux.weights import checkpoints, keymaps, tensors
from flux.weights.layouts import FOLDERS, Part, part_of_file
from tests import tiny

PARAMS = {
    "transformer": replace(tiny.FLUX, vec_in_dim=64, context_in_dim=64),
    "ae": replace(tiny.AE, ch=32),
    "clip": replace(tiny.CLIP, hidden_size=64, num_attention_heads=4, vocab_size=70),
    "t5": replace(tiny.T5, d_model=64, d_ff=128, d_kv=32),
}
CLASSES = {"transformer": Flux, "ae": AutoEncoder, "clip": CLIPTextModel, "t5": T5Encoder}
CONFIGS = {
    "transformer": {"axes_dims_rope": [4, 12, 16]},
    "ae": {"norm_num_groups": 8, "scaling_factor": 0.5},
    "clip": {"num_attention_heads": 4},
}
# Our (diffusers' or transformers') names -> mflux's, as its weight mapping has them.
RENAMED = (
    (r"(transformer_blocks\.\d+\.ff(_context)?)\.net\.0\.proj", r"\1.linear1"),
    (r"(transformer_blocks\.\d+\.ff(_context)?)\.net\.2", r"\1.linear2"),
    (r"encoder\.block\.(\d+)\.layer\.0\.", r"t5_blocks.\1.attention."),
    (r"encoder\.block\.(\d+)\.layer\.1\.", r"t5_blocks.\1.ff."),
    (r"^encoder\.final_layer_norm", "final_layer_norm"),
    (r"((en|de)coder\.conv_(in|out))\.", r"\1.conv2d."),
    (r"((en|de)coder\.conv_norm_out)\.", r"\1.norm."),
)


def network(kind: str) -> nn.Module:
    built = tiny.randomize(CLASSES[kind](PARAMS[kind]), 5)
    built.set_dtype(mx.bfloat16)
    return built


def renamed(name: str, kind: str) -> str:
    for pattern, theirs in RENAMED:
        if kind != "clip":
            name = re.sub(pattern, theirs, name)
    return name


def is_matrix(name: str, w: mx.array) -> bool:
    """What mflux quantizes: every Linear and Embedding whose width 64 divides."""
    return name.endswith("weight") and w.ndim == 2 and w.shape[1] % 64 == 0


def write(folder: Path, kind: str, bits: int | None, index: bool = True, plain_header: bool = False) -> Part:
    """A part's files as mflux saves them, in two shards."""
    diffusers = keymaps.to_file(kind, tiny.parameters(network(kind)), diffusers=kind in ("transformer", "ae"))
    out = {}
    for name, w in diffusers.items():
        w = w.transpose(0, 2, 3, 1) if w.ndim == 4 else w
        layer = renamed(name, kind).rpartition(".")[0]
        if bits and is_matrix(name, w):
            parts = dict(zip(("weight", "scales", "biases"), mx.quantize(w, 64, bits), strict=True))
            out |= {f"{layer}.{part}": array for part, array in parts.items()}
        else:
            out[f"{layer}.{name.rpartition('.')[2]}"] = w
    if kind == "t5":  # mflux repeats the first block's in every block
        first = "t5_blocks.0.attention.SelfAttention.relative_attention_bias"
        for name in [name for name in out if name.startswith(first)]:
            out[name.replace(".0.", ".1.")] = out[name]
    folder.mkdir(parents=True)
    metadata = {} if plain_header else {"quantization_level": str(bits), "mflux_version": "0.11.0"}
    names, half = list(out), len(out) // 2
    shards = {"0.safetensors": names[:half], "1.safetensors": names[half:]}
    for file, own in shards.items():
        mx.save_safetensors(str(folder / file), {name: out[name] for name in own}, metadata)
    if index:
        files = {name: file for file, own in shards.items() for name in own}
        content = {"metadata": metadata, "weight_map": files}
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    return Part(kind, tuple(folder / file for file in shards), CONFIGS.get(kind, {}))


def expected(kind: str, bits: int | None) -> nn.Module:
    """Ours with the same layers quantized: each row is by itself, so that fused ones are the same."""
    built = network(kind)
    if bits:
        linear = [m for _, m in built.named_modules() if isinstance(m, nn.Embedding)]
        for layer in linear:
            if layer.weight.shape[1] % 64 == 0:
                layer.weight = mx.dequantize(*mx.quantize(layer.weight, 64, bits), 64, bits)
        chosen = lambda _, m: isinstance(m, nn.Linear) and m.weight.shape[1] % 64 == 0  # noqa: E731
        nn.quantize(built, 64, bits, class_predicate=chosen)
    return built


@pytest.mark.parametrize("bits", [None, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("kind", PARAMS)
def test_to_the_bit(kind, bits, tmp_path):
    part = write(tmp_path / "m", kind, bits)
    loaded, wanted = checkpoints.load_part(part, mx.bfloat16), expected(kind, bits)
    assert loaded.params == wanted.params
    assert tiny.same(loaded, wanted)
    kinds = {(m.bits, m.group_size) for _, m in loaded.named_modules() if isinstance(m, nn.QuantizedLinear)}
    assert kinds == ({(bits, 64)} if bits else set())


def test_a_header_without_metadata(tmp_path):
    """What copies safetensors files often drops it."""
    part = write(tmp_path / "m", "transformer", 4, plain_header=True)
    assert tiny.same(checkpoints.load_part(part, mx.bfloat16), expected("transformer", 4))


def test_the_header_has_the_names_and_shapes_of_diffusers(tmp_path):
    part = write(tmp_path / "m", "ae", None)
    headers = [tensors.read_header(file).tensors for file in part.files]
    shapes = {name: entry.shape for header in headers for name, entry in header.items()}
    theirs = keymaps.to_file("ae", tiny.parameters(network("ae")), diffusers=True)
    assert shapes == {name: w.shape for name, w in theirs.items()}


@pytest.mark.parametrize("index", [True, False])
def test_a_whole_model(index, tmp_path):
    """mflux's folder, with its index as today and without as before; either shard stands for both."""
    parts = {kind: write(tmp_path / "m" / FOLDERS[kind], kind, 4, index) for kind in PARAMS}
    for kind, part in parts.items():
        (tmp_path / "m" / FOLDERS[kind] / "config.json").write_text(json.dumps(CONFIGS.get(kind, {})))
        given = part_of_file(part.files[1], kind)
        assert given.files == part.files
    tiny.write_tokenizers(tmp_path / "t")
    for name in ("tokenizer", "tokenizer_2"):
        (tmp_path / "t" / name).rename(tmp_path / "m" / name)
    found = checkpoints.find(str(tmp_path / "m"))
    assert {kind: part.files for kind, part in found.parts.items()} == {k: p.files for k, p in parts.items()}
    for kind in PARAMS:
        assert tiny.same(checkpoints.load_part(found.parts[kind], mx.bfloat16), expected(kind, 4))


# --- Files of other MLX programs: the same layers, described by a config.json beside them ---


@pytest.mark.parametrize(
    ("bits", "group_size", "mode"),
    [
        (4, 32, "affine"),
        (8, 32, "affine"),
        (2, 64, "affine"),
        (4, 32, "mxfp4"),
        (8, 32, "mxfp8"),
        (4, 16, "nvfp4"),
    ],
)
@pytest.mark.parametrize("place", ["config", "header"])
def test_mlx_layers_under_our_names(bits, group_size, mode, place, tmp_path):
    wanted = network("transformer")
    chosen = lambda path, m: isinstance(m, nn.Linear) and "blocks" in path  # noqa: E731
    nn.quantize(wanted, group_size, bits, mode=mode, class_predicate=chosen)
    how = {"group_size": group_size, "bits": bits, "mode": mode}
    metadata = {"quantization": json.dumps(how)} if place == "header" else {}
    mx.save_safetensors(str(tmp_path / "f.safetensors"), tiny.parameters(wanted), metadata)
    config = {"quantization": how} if place == "config" else {}
    part = Part("transformer", (tmp_path / "f.safetensors",), {"axes_dims_rope": [4, 12, 16], **config})
    assert tiny.same(checkpoints.load_part(part, mx.bfloat16), wanted)


def test_layers_that_make_no_sense(tmp_path):
    wanted = network("transformer")
    nn.quantize(wanted, 32, 4, class_predicate=lambda path, _: path == "double_blocks.0.img_mlp.0")
    content = tiny.parameters(wanted)
    path = tmp_path / "f.safetensors"
    layer = "double_blocks.0.img_mlp.0"
    for name, bad, words in (
        ("weight", mx.zeros((256, 3), dtype=mx.uint32), "cannot be split into groups of 32"),
        ("weight", mx.zeros((256, 8)), "do not make up a quantized layer"),
        ("scales", mx.zeros((256, 3)), "do not make up a quantized layer"),
        ("scales", mx.zeros((2,)), "do not make up a quantized layer"),
    ):
        mx.save_safetensors(str(path), content | {f"{layer}.{name}": bad}, {})
        config = {"quantization": {"group_size": 32, "bits": 4}}
        with pytest.raises(FluxError, match=rf"f\.safetensors: {layer}.*{words}"):
            checkpoints.load_part(Part("transformer", (path,), config))
    for bad in ({"group_size": 7}, {"mode": "x"}, {"mode": []}, {"group_size": [64]}, [], 3):
        with pytest.raises(FluxError, match=r"f\.safetensors: its quantization"):
            checkpoints.load_part(Part("transformer", (path,), {"quantization": bad}))
